"""The network device: frames whole, in order, and none that the driver cannot take; on real taps and on sockets."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from network_cards import NetworkCard
from networks import GUEST_MAC, OTHER_MAC, Namespace, flood, frame, receive_test_frame
from pyroute2 import IPRoute

from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
from lgmp.network import Tap as HostTap
from lgmp.tap import (
    IFF_NO_PI,
    IFF_TAP,
    TUN_DEVICE,
    TUN_F_CSUM,
    TUN_F_TSO4,
    TUN_F_TSO6,
    TUN_F_TSO_ECN,
    TUNSETIFF,
    features_of,
    may_be_given,
    offloads_for,
)
from lgmp.testing import PATIENCE, Buffer, Driver, Used
from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.net import (
    HEADER_BYTES,
    QUEUES,
    RECEIVE_QUEUE,
    TRANSMIT_QUEUE,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    config_space,
    features,
)
from lgmp.virtio.ring import RingError
from workers.device import BATCH
from workers.net import MAX_FRAME, Net, Stream, Tap

NO_HEADER = bytes(HEADER_BYTES)
ANY_LAYOUT = 1 << VIRTIO_F_ANY_LAYOUT
ALL_GUEST_FEATURES = (
    1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
)
# linux/if_packet.h
PACKET_VNET_HDR = 15
SOL_PACKET = 263


class Card(NetworkCard[Used]):
    """With a driver of old, whose frames have their headers in buffers of their own."""

    def __init__(self, link: Tap | Stream, accepted: int = 1 << VIRTIO_RING_F_INDIRECT_DESC) -> None:
        super().__init__(link, Driver(queues=QUEUES), accepted)
        self.headers: dict[int, Buffer] = {}

    def add_rx(self, room: int = 1514) -> tuple[int, Buffer]:
        """A buffer for a frame of `room` bytes; gives its head and where the frame will be."""
        header, data = self.driver.buffer(b"\xaa" * HEADER_BYTES, True), self.driver.buffer(room, True)
        head = self.driver.queues[RECEIVE_QUEUE].add([header, data])
        self.headers[head] = header
        return head, data

    def header(self, head: int) -> bytes:
        """The header that the frame in the buffer `head` got."""
        return self.driver.content(self.headers[head])

    def add_tx(self, content: bytes) -> int:
        """A frame to send; gives its head."""
        return self.driver.queues[TRANSMIT_QUEUE].add([self.driver.buffer(NO_HEADER), self.driver.buffer(content)])

    def received(self) -> list[Used]:
        return self.driver.queues[RECEIVE_QUEUE].collect()


@pytest.fixture
def card(host_tap: HostTap) -> Iterator[Card]:
    """A card on a tap with virtio headers, as the launcher makes it."""
    made = Card(Tap(host_tap.descriptor, has_header=True))
    yield made
    made.close()


# Features


def test_a_card_offers_its_mac_and_what_its_host_side_has() -> None:
    assert features() == 1 << 5 | 1 << 27 | 1 << 28
    assert features(0b1011) == features() | 0b1011
    assert config_space(GUEST_MAC) == GUEST_MAC


def test_a_config_space_is_a_mac_address() -> None:
    with pytest.raises(ValueError, match="6 bytes"):
        config_space(b"12345")


@pytest.mark.parametrize(
    ("accepted", "offloads"),
    [
        (0, 0),
        (1 << VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (ALL_GUEST_FEATURES, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN),
        (1 << VIRTIO_NET_F_GUEST_TSO4, 0),  # no segments without checksums
        (1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN, TUN_F_CSUM),  # no ECN without segments
    ],
)
def test_a_tap_is_told_of_what_the_driver_accepted(accepted: int, offloads: int) -> None:
    assert offloads_for(accepted) == offloads


def test_what_a_tap_takes_is_what_is_offered() -> None:
    assert features_of(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN) == ALL_GUEST_FEATURES
    assert features_of(0) == 0


@pytest.mark.parametrize(
    ("flags", "gso_type", "needed"),
    [
        (0, 0, 0),
        (VIRTIO_NET_HDR_F_DATA_VALID, 0, 0),
        (VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, TUN_F_CSUM),
        (VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, TUN_F_CSUM | TUN_F_TSO4),
        (VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV6, TUN_F_CSUM | TUN_F_TSO6),
        (0, VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN, TUN_F_TSO4 | TUN_F_TSO_ECN),
    ],
)
def test_a_frame_goes_only_to_a_driver_that_takes_all_that_its_header_says(
    flags: int, gso_type: int, needed: int
) -> None:
    everything = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
    for offloads in range(everything + 1):
        assert may_be_given(flags, gso_type, offloads) == (offloads & needed == needed)


@pytest.mark.parametrize(("flags", "gso_type"), [(8, 0), (0, 3), (0, 5)])
def test_what_no_feature_is_known_for_goes_to_nobody(flags: int, gso_type: int) -> None:
    assert not may_be_given(flags, gso_type, 0xFF)


# Frames


@pytest.mark.parametrize("size", [14, 60, 1514])
def test_a_frame_of_the_host_comes_whole_behind_a_header_of_zeros(card: Card, wire: socket.socket, size: int) -> None:
    head, data = card.add_rx()
    card.net.serve()
    sent = frame(os.urandom(size - 14))
    wire.send(sent)
    assert card.pump(1) == [Used(head, HEADER_BYTES + size)]
    assert card.driver.content(data)[:size] == sent
    assert card.header(head) == NO_HEADER


@pytest.mark.parametrize("size", [60, 1514])
def test_a_frame_of_the_guest_comes_whole(card: Card, wire: socket.socket, size: int) -> None:
    content = frame(os.urandom(size - 14))
    head = card.add_tx(content)
    assert not card.net.serve()
    assert receive_test_frame(wire) == content
    assert card.sent() == [Used(head, 0)]


def test_a_tap_without_headers_serves_as_well(here: Namespace) -> None:
    with here.entered():
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"plain", IFF_TAP | IFF_NO_PI))
        with IPRoute() as route:
            route.link("set", index=socket.if_nametoindex("plain"), state="up")
    card = Card(Tap(fd, has_header=False))
    with here.wire("plain") as wire:
        head, data = card.add_rx(room=100)
        small, _ = card.add_rx(room=20)
        card.add_tx(frame(b"out"))
        card.net.serve()
        assert receive_test_frame(wire) == frame(b"out")
        wire.send(frame(b"1" * 86))
        assert card.pump(1) == [Used(head, HEADER_BYTES + 100)]
        assert card.header(head) == NO_HEADER
        assert card.driver.content(data) == frame(b"1" * 86)
        wire.send(frame(b"2" * 86))
        wire.send(frame(b"3"))
        assert card.pump(1) == [Used(small, HEADER_BYTES + 15)]
    card.close()
    os.close(fd)


def test_frames_come_in_order_in_both_directions(card: Card, wire: socket.socket) -> None:
    places = [card.add_rx(64) for _ in range(50)]
    for number in range(50):
        card.add_tx(frame(b"guest %d" % number))
    while card.net.serve():
        pass
    assert [receive_test_frame(wire)[14:] for _ in range(50)] == [b"guest %d" % number for number in range(50)]
    for number in range(50):
        wire.send(frame(b"host %d" % number))
    received = card.pump(50)
    assert [used.head for used in received] == [head for head, _ in places]
    for number, (_, data) in enumerate(places):
        assert card.driver.content(data).rstrip(b"\0") == frame(b"host %d" % number)


def test_a_batch_of_frames_is_announced_once(card: Card, wire: socket.socket) -> None:
    for _ in range(BATCH):
        card.add_rx(64)
        wire.send(frame(b""))
    for _ in range(BATCH - 1):
        card.add_tx(frame(b""))
    card.net.serve()
    assert card.recorder.used_queues == [TRANSMIT_QUEUE]
    card.net.ready(card.link.fd, select.POLLIN)
    assert len(card.received()) == BATCH
    assert card.recorder.used_queues == [TRANSMIT_QUEUE, RECEIVE_QUEUE]


@pytest.mark.parametrize("pieces", [[10, 14, 1, 300], [10, 0, 315]])
def test_a_frame_may_lie_in_several_pieces(card: Card, wire: socket.socket, pieces: list[int]) -> None:
    content = frame(os.urandom(sum(pieces) - HEADER_BYTES - 14))
    whole = NO_HEADER + content
    out, into = [], []
    for size in pieces:
        out.append(card.driver.buffer(whole[:size]))
        whole = whole[size:]
        into.append(card.driver.buffer(size, writable=True))
    card.driver.queues[TRANSMIT_QUEUE].add(out)
    card.driver.queues[RECEIVE_QUEUE].add(into)
    card.net.serve()
    assert receive_test_frame(wire) == content
    wire.send(content)
    card.pump(1)
    assert b"".join(card.driver.content(piece) for piece in into)[HEADER_BYTES:] == content


def test_an_indirect_chain_is_a_frame_as_any_other(card: Card, wire: socket.socket) -> None:
    parts = [card.driver.buffer(NO_HEADER), card.driver.buffer(frame(b"indirect"))]
    card.driver.queues[TRANSMIT_QUEUE].add(parts, table=1 << 20)
    card.net.serve()
    assert receive_test_frame(wire) == frame(b"indirect")


# Headers


@pytest.mark.parametrize("sizes", [[9, 100], [11, 100], [0, 110], [110], []])
def test_without_any_layout_a_header_of_another_size_is_fatal(card: Card, sizes: list[int]) -> None:
    card.driver.queues[TRANSMIT_QUEUE].add([card.driver.buffer(size) for size in sizes] or [card.driver.buffer(0)])
    with pytest.raises(RingError, match=r"eth0: queue 1: descriptor 0: Bad iovec size \d+ for the header of a frame"):
        card.net.serve()


@pytest.mark.parametrize("sizes", [[9, 100], [11, 100], [110], [0]])
def test_without_any_layout_a_buffer_has_ten_bytes_for_the_header(card: Card, sizes: list[int]) -> None:
    card.driver.queues[RECEIVE_QUEUE].add([card.driver.buffer(size, writable=True) for size in sizes])
    card.net.serve()
    with pytest.raises(RingError, match=r"eth0: queue 0: descriptor 0: Bad iovec size \d+ for the header of a frame"):
        card.net.ready(card.link.fd, select.POLLIN)


@pytest.mark.parametrize("first", [1, 9, 11, 24, 74])
def test_with_any_layout_header_and_frame_lie_as_the_driver_likes(card: Card, wire: socket.socket, first: int) -> None:
    card.net.accept(ANY_LAYOUT)
    content = frame(b"x" * 50)
    whole = NO_HEADER + content
    card.driver.queues[TRANSMIT_QUEUE].add(
        [card.driver.buffer(part) for part in (whole[:first], whole[first:]) if part]
    )
    into = [card.driver.buffer(size, writable=True) for size in (first, len(whole) - first) if size]
    card.driver.queues[RECEIVE_QUEUE].add(into)
    card.net.serve()
    assert receive_test_frame(wire) == content
    wire.send(content)
    assert card.pump(1)[0].written == len(whole)
    assert b"".join(map(card.driver.content, into)) == whole


@pytest.mark.parametrize("sizes", [[9], [4, 5], [0]])
def test_with_any_layout_there_has_to_be_a_header_all_the_same(card: Card, sizes: list[int]) -> None:
    card.net.accept(ANY_LAYOUT)
    card.driver.queues[TRANSMIT_QUEUE].add([card.driver.buffer(size) for size in sizes])
    with pytest.raises(RingError, match="Bad iovec size"):
        card.net.serve()


def test_something_to_write_in_a_frame_to_send_is_fatal(card: Card) -> None:
    parts = [card.driver.buffer(NO_HEADER), card.driver.buffer(60), card.driver.buffer(1, writable=True)]
    card.driver.queues[TRANSMIT_QUEUE].add(parts)
    with pytest.raises(RingError, match=r"eth0: queue 1: descriptor 0: Input buffers in output queue\?"):
        card.net.serve()


def test_something_to_read_in_a_buffer_is_fatal(card: Card) -> None:
    card.driver.queues[RECEIVE_QUEUE].add([card.driver.buffer(1), card.driver.buffer(100, writable=True)])
    card.net.serve()
    with pytest.raises(RingError, match=r"eth0: queue 0: descriptor 0: Output buffers in network recv queue\?"):
        card.net.ready(card.link.fd, select.POLLIN)


# Too many, too long, not now


def test_without_a_buffer_nothing_is_read_until_the_guest_kicks(card: Card, wire: socket.socket) -> None:
    assert not card.wants(select.POLLIN)  # before its first kick
    card.net.serve()
    wire.send(frame(b"first"))
    card.net.ready(card.link.fd, select.POLLIN)
    assert not card.wants(select.POLLIN)
    head, data = card.add_rx()
    assert not card.wants(select.POLLIN)
    card.net.serve()
    assert card.pump(1) == [Used(head, HEADER_BYTES + 19)]
    assert card.driver.content(data)[14:19] == b"first"


def test_after_a_flood_without_buffers_frames_come_again(card: Card, wire: socket.socket) -> None:
    card.net.serve()
    card.net.ready(card.link.fd, select.POLLIN)
    flood(wire, 5000)
    kept = 0
    while True:  # what the tap has kept of it comes first
        card.driver.forget()
        for _ in range(32):
            card.add_rx(64)
        card.net.serve()
        card.net.ready(card.link.fd, select.POLLIN)
        came = len(card.received())
        kept += came
        if came < 32:
            break
    assert 0 < kept < 5000
    wire.send(frame(b"after"))
    assert len(card.pump(1)) == 1
    assert card.said == []


def test_a_frame_longer_than_the_buffer_is_dropped_whole(card: Card, wire: socket.socket, host_tap: HostTap) -> None:
    head, data = card.add_rx(room=100)
    card.net.serve()
    wire.send(frame(b"x" * 87))
    wire.send(frame(b"fits"))
    assert card.pump(1) == [Used(head, HEADER_BYTES + 18)]
    assert card.driver.content(data)[:18] == frame(b"fits")
    card.add_rx(room=100)
    card.net.serve()
    wire.send(frame(b"y" * 86))
    assert card.pump(1)[0].written == HEADER_BYTES + 100
    assert card.said == ["eth0: a frame is longer than the guest's buffer of 110 bytes, dropped"]


def test_a_frame_that_the_tap_does_not_take_is_dropped(card: Card, wire: socket.socket) -> None:
    for content in (b"", b"short", os.urandom(70000)):
        card.add_tx(content)
    card.driver.queues[TRANSMIT_QUEUE].add([card.driver.buffer(b"\xff" * HEADER_BYTES), card.driver.buffer(frame(b""))])
    card.add_tx(frame(b"good"))
    card.net.serve()
    assert len(card.sent()) == 5
    while receive_test_frame(wire) != frame(b"good"):
        pass
    assert card.said[0].startswith("eth0: a frame from the guest is dropped: the tap does not take a frame like this")


def test_a_tap_that_is_down_takes_nothing_and_works_when_it_is_up(
    here: Namespace, card: Card, host_tap: HostTap, wire: socket.socket
) -> None:
    with here.entered():
        subprocess.run(["ip", "link", "set", host_tap.name, "down"], check=True)
    card.add_tx(frame(b"lost"))
    card.net.serve()
    assert len(card.sent()) == 1
    assert card.said == ["eth0: a frame from the guest is dropped: the tap is down"]
    with here.entered():
        subprocess.run(["ip", "link", "set", host_tap.name, "up"], check=True)
    card.add_tx(frame(b"good"))
    card.net.serve()
    with pytest.raises(OSError, match="down"):
        wire.recv(100)  # of the time when it was down
    assert receive_test_frame(wire) == frame(b"good")


def test_a_guest_whose_tap_is_deleted_goes_on_without(here: Namespace, card: Card, host_tap: HostTap) -> None:
    card.add_rx()
    card.net.serve()
    with here.entered():
        subprocess.run(["ip", "link", "del", host_tap.name], check=True)
    card.net.ready(card.link.fd, select.POLLERR)
    assert card.net.wants() == ()
    for _ in range(3):
        card.add_tx(frame(b"lost"))
        card.net.serve()
    assert len(card.sent()) == 3
    assert card.said == ["eth0: its network is gone (File descriptor in bad state); the guest goes on without it"]
    card.net.reset()
    card.driver.reset()
    card.net.accept(ALL_GUEST_FEATURES)
    card.net.serve()
    assert len(card.said) == 1


def test_a_reset_forgets_buffers_and_the_frames_that_wait(card: Card, wire: socket.socket) -> None:
    _, old = card.add_rx()
    card.net.serve()
    card.net.ready(card.link.fd, select.POLLIN)  # takes the buffer
    for _ in range(10):
        wire.send(frame(b"old"))
    card.net.reset()
    card.driver.reset()
    assert card.net.wants() == ()
    wire.send(frame(b"new"))
    head, new = card.add_rx()
    card.net.accept(0)
    card.net.serve()
    assert card.pump(1) == [Used(head, HEADER_BYTES + 17)]
    assert card.driver.content(new)[:17] == frame(b"new")
    assert card.driver.content(old) == bytes(1514)


def test_a_card_that_stops_reads_no_more_but_sends(card: Card, wire: socket.socket) -> None:
    card.add_rx()
    card.net.serve()
    card.net.stop()
    assert card.net.wants() == ()
    card.add_tx(frame(b"last words"))
    assert not card.net.serve()
    assert receive_test_frame(wire) == frame(b"last words")


# Offloads


def segmented_frame() -> bytes:
    """A virtio header, and a TCP segment of 4000 bytes whose checksum and segmentation are left to others."""
    size = 4000
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 40 + size, 1, 0, 64, 6, 0, bytes([192, 168, 19, 1]), bytes([192, 168, 19, 2])
    )
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 1000, 0, 0)
    header = struct.pack("<BBHHHH", VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 54, 1000, 34, 16)
    return header + GUEST_MAC + OTHER_MAC + b"\x08\x00" + ip + tcp + b"S" * size


@pytest.fixture
def segments_wire(here: Namespace, host_tap: HostTap) -> Iterator[socket.socket]:
    """The host's end, for frames with virtio headers."""
    with here.open_socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as made:
        made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        made.bind((host_tap.name, 0))
        yield made


def test_a_driver_that_takes_segments_gets_them_with_the_header_that_says_so(
    card: Card, segments_wire: socket.socket
) -> None:
    card.net.accept(ALL_GUEST_FEATURES)
    head, _ = card.add_rx(room=65550)
    card.net.serve()
    segments_wire.send(segmented_frame())
    assert card.pump(1) == [Used(head, len(segmented_frame()))]
    flags, gso_type, _, gso_size, _, _ = struct.unpack("<BBHHHH", card.header(head))
    assert (flags, gso_type, gso_size) == (VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 1000)


def test_a_driver_that_takes_no_segments_gets_plain_frames(card: Card, segments_wire: socket.socket) -> None:
    places = [card.add_rx() for _ in range(4)]
    card.net.serve()
    segments_wire.send(segmented_frame())
    assert [used.written for used in card.pump(4)] == [HEADER_BYTES + 54 + 1000] * 4
    for head, data in places:
        assert card.header(head)[:2] == b"\0\0"
        assert card.driver.content(data)[54:1054] == b"S" * 1000


def test_segments_from_before_the_driver_changed_its_mind_are_not_given_to_it(
    card: Card, wire: socket.socket, segments_wire: socket.socket
) -> None:
    card.net.accept(ALL_GUEST_FEATURES)
    segments_wire.send(segmented_frame())
    wire.send(frame(b"plain"))
    card.net.accept(0)
    head, data = card.add_rx(room=65550)
    card.net.serve()
    assert card.pump(1) == [Used(head, HEADER_BYTES + 19)]
    assert card.driver.content(data)[:19] == frame(b"plain")
    assert card.said == []


def test_segments_of_the_guest_are_taken(card: Card, here: Namespace, host_tap: HostTap) -> None:
    whole = segmented_frame()
    parts = [card.driver.buffer(whole[:HEADER_BYTES]), card.driver.buffer(whole[HEADER_BYTES:])]
    with here.wire(host_tap.name) as wire:
        card.driver.queues[TRANSMIT_QUEUE].add(parts)
        card.net.serve()
        while len(got := wire.recv(65550)) < 4000:
            pass
        assert got[54:] == b"S" * 4000
    assert card.said == []


# A user-mode stack


class Stack:
    """The other end of a card's stream."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE)
        self.fd = theirs.detach()
        self.card = Card(Stream(self.fd))

    def send(self, *contents: bytes) -> None:
        self.socket.sendall(b"".join(len(content).to_bytes(4, "big") + content for content in contents))

    def receive(self) -> bytes:
        return self._exactly(int.from_bytes(self._exactly(4), "big"))

    def _exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            chunk = self.socket.recv(count - len(got))
            assert chunk
            got += chunk
        return got

    def close(self) -> None:
        self.card.close()
        self.socket.close()
        os.close(self.fd)


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = Stack()
    yield made
    made.close()


def test_on_a_stream_each_frame_follows_its_length(stack: Stack) -> None:
    head, data = stack.card.add_rx()
    stack.card.add_tx(frame(b"out"))
    stack.card.net.serve()
    assert stack.receive() == frame(b"out")
    stack.send(frame(b"in"))
    assert stack.card.pump(1) == [Used(head, HEADER_BYTES + 16)]
    assert stack.card.driver.content(data)[:16] == frame(b"in")
    assert stack.card.header(head) == NO_HEADER


def test_a_stream_may_break_anywhere(stack: Stack) -> None:
    contents = [frame(b"frame %d" % number * 20) for number in range(5)]
    places = [stack.card.add_rx() for _ in contents]
    stack.card.net.serve()
    for byte in b"".join(len(content).to_bytes(4, "big") + content for content in contents):
        stack.socket.sendall(bytes([byte]))
        stack.card.net.ready(stack.fd, select.POLLIN)
    assert [used.written for used in stack.card.received()] == [HEADER_BYTES + len(content) for content in contents]
    for content, (_, data) in zip(contents, places, strict=True):
        assert stack.card.driver.content(data)[: len(content)] == content


def test_frames_that_were_read_from_a_stream_wait_for_the_guests_buffers(stack: Stack) -> None:
    stack.card.add_rx(64)
    stack.card.net.serve()
    stack.send(*(frame(b"%d" % number) for number in range(BATCH + 20)))
    stack.card.net.ready(stack.fd, select.POLLIN)
    assert len(stack.card.received()) == 1
    assert not stack.card.wants(select.POLLIN)
    for _ in range(60):
        stack.card.add_rx(64)
    more, came = True, 0
    while more:
        more = stack.card.net.serve()
        came += len(stack.card.received())
    assert came == BATCH + 20 - 1


def test_more_than_fits_a_batch_is_served_without_news_from_the_stream(stack: Stack) -> None:
    stack.send(*[frame(b"x")] * (2 * BATCH))
    for _ in range(2 * BATCH):
        stack.card.add_rx(64)
    stack.card.net.serve()
    stack.card.net.ready(stack.fd, select.POLLIN)
    assert len(stack.card.received()) == 2 * BATCH


def test_a_stream_that_takes_nothing_keeps_frames_in_the_ring_and_whole(stack: Stack) -> None:
    contents = [frame(bytes([number]) * 60000) for number in range(24)]
    for content in contents:
        stack.card.add_tx(content)
    while stack.card.net.serve():
        pass
    sent = len(stack.card.sent())
    assert 0 < sent < len(contents)
    assert stack.card.wants(select.POLLOUT)
    for content in contents:
        while not select.select([stack.socket], [], [], 0)[0]:
            stack.card.net.ready(stack.fd, select.POLLOUT)
        got = bytearray()
        while len(got) < 4 + len(content):
            if stack.card.wants(select.POLLOUT):
                stack.card.net.ready(stack.fd, select.POLLOUT)
            got += stack.socket.recv(4 + len(content) - len(got))
        assert got[4:] == content
    assert sent + len(stack.card.sent()) == len(contents)
    assert not stack.card.wants(select.POLLOUT)


def test_the_rest_of_a_frame_goes_although_no_other_follows(stack: Stack) -> None:
    stack.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    content = frame(os.urandom(65000))
    for _ in range(8):
        stack.card.add_tx(content)
    while stack.card.net.serve():
        pass
    for _ in range(8):
        while stack.card.wants(select.POLLOUT) and select.select([], [stack.fd], [], 0)[1]:
            stack.card.net.ready(stack.fd, select.POLLOUT)
        got = bytearray()
        while len(got) < 4 + len(content):
            got += stack.socket.recv(4 + len(content) - len(got))
            if stack.card.wants(select.POLLOUT):
                stack.card.net.ready(stack.fd, select.POLLOUT)
        assert got[4:] == content


def test_a_frame_from_a_stream_that_is_longer_than_the_buffer_is_dropped_whole(stack: Stack) -> None:
    head, data = stack.card.add_rx(room=20)
    stack.card.net.serve()
    stack.send(frame(b"too long"))
    stack.send(frame(b"fits"))
    assert stack.card.pump(1) == [Used(head, HEADER_BYTES + 18)]
    assert stack.card.driver.content(data)[:18] == frame(b"fits")


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_stream_that_says_an_impossible_length_is_left(stack: Stack, length: int) -> None:
    stack.card.add_rx()
    stack.card.net.serve()
    stack.socket.sendall(length.to_bytes(4, "big"))
    stack.card.net.ready(stack.fd, select.POLLIN)
    assert stack.card.said == [
        f"eth0: its network is gone (it sent a frame of {length} bytes); the guest goes on without it"
    ]
    assert stack.card.net.wants() == ()


def test_a_guest_whose_stack_has_ended_goes_on_without(stack: Stack) -> None:
    stack.card.add_rx()
    stack.card.net.serve()
    stack.socket.close()
    stack.card.net.ready(stack.fd, select.POLLIN | select.POLLHUP)
    stack.card.add_tx(frame(b"lost"))
    stack.card.net.serve()
    assert len(stack.card.sent()) == 1
    assert stack.card.said == ["eth0: its network is gone (it has ended); the guest goes on without it"]
    assert stack.card.net.wants() == ()


def test_a_frame_too_long_for_a_stream_is_dropped(stack: Stack) -> None:
    stack.card.add_tx(bytes(MAX_FRAME + 1))
    stack.card.add_tx(frame(b"good"))
    stack.card.net.serve()
    assert stack.receive() == frame(b"good")
    assert stack.card.said == [f"eth0: a frame from the guest is dropped: a frame of {MAX_FRAME + 1} bytes"]


def test_a_reset_keeps_the_stream_in_step(stack: Stack) -> None:
    stack.card.net.serve()
    stack.card.add_rx(64)
    stack.card.net.serve()
    stack.send(frame(b"one"))
    stack.send(frame(b"two"))
    whole = len(frame(b"three")).to_bytes(4, "big") + frame(b"three")
    stack.socket.send(whole[:9])
    stack.card.net.ready(stack.fd, select.POLLIN)
    stack.card.net.reset()
    stack.card.driver.reset()
    stack.socket.send(whole[9:])
    _, data = stack.card.add_rx()
    stack.card.net.serve()
    stack.card.pump(1)
    assert stack.card.driver.content(data)[:19] == frame(b"three")


# Statistics


def test_bytes_and_lost_frames_are_counted(stack: Stack) -> None:
    statistics = stack.card.net.statistics
    stack.card.add_rx(room=20)
    stack.card.add_tx(frame(b"out"))
    stack.card.net.serve()
    stack.send(frame(b"in"))
    stack.card.pump(1)
    assert statistics[BYTES_IN] == HEADER_BYTES + 16
    assert statistics[BYTES_OUT] == HEADER_BYTES + 17
    assert statistics[ERRORS] == 0
    stack.card.add_rx(room=20)
    stack.card.add_tx(bytes(MAX_FRAME + 1))
    stack.card.net.serve()
    stack.send(frame(b"too long"), frame(b"fits"))
    stack.card.pump(1)
    assert statistics[ERRORS] == 2


# What a stream leaves in the socket


def test_a_frame_is_taken_off_a_stream_when_the_guest_has_it(stack: Stack) -> None:
    """So that a successor finds it there, should this process end before."""
    stack.card.add_rx(64)
    stack.card.net.serve()
    stack.send(frame(b"one"), frame(b"two"))
    stack.card.net.ready(stack.fd, select.POLLIN)
    left = socket.socket(fileno=os.dup(stack.fd))
    with left:
        assert left.recv(100, socket.MSG_PEEK)[4:] == frame(b"two")


@pytest.mark.parametrize("at", [1, 3, 4, 5, 15])
def test_a_successor_finds_its_place_in_a_stream(stack: Stack, at: int) -> None:
    """A frame whose beginning was taken off is lost with whoever took it, beyond its length; what follows is not."""
    whole = len(frame(b"first")).to_bytes(4, "big") + frame(b"first")
    stack.card.add_rx(64)
    stack.card.net.serve()
    stack.socket.send(whole[:at])
    stack.card.net.ready(stack.fd, select.POLLIN)
    successor = Net(Stream(stack.fd), say=stack.card.said.append)
    queues = stack.card.driver.device_queues("eth0")
    successor.attach(queues, stack.card.recorder, state=stack.card.net.state)
    successor.resume()
    stack.socket.send(whole[at:])
    stack.send(frame(b"second"))
    successor.serve()
    successor.ready(stack.fd, select.POLLIN)
    (used,) = stack.card.received()
    assert used.written == HEADER_BYTES + 14 + len(b"first" if at <= 4 else b"second")
    assert stack.card.said == []
    successor.close()
