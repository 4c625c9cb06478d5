"""The network device with a modern driver: the header of 12 bytes, any framing, frames in several merged buffers.

Then what it does where its rings are taken from it for a while, or where only one of them is served.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import select
import socket
import struct
from collections.abc import Iterator, Sequence

import pytest
import test_takeover as takeover
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cards import NetworkCard
from networks import GUEST_MAC, OTHER_MAC, Namespace, flood, frame, receive_test_frame
from pyroute2 import IPRoute

import workers.net
from lgmp.control import ERRORS
from lgmp.network import Tap as HostTap
from lgmp.tap import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_DEVICE, TUNSETIFF
from lgmp.testing import PATIENCE, Buffer, Driver, Used
from lgmp.virtio.ids import (
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTQUEUE_NUM,
)
from lgmp.virtio.net import (
    HEADER_BYTES,
    MODERN_HEADER_BYTES,
    QUEUES,
    RECEIVE_QUEUE,
    TRANSMIT_QUEUE,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
    features,
    header_bytes,
    modern_config_space,
    modern_features,
)
from lgmp.virtio.ring import RingError, Virtqueue
from workers.net import MAX_FRAME, Net, Stream, Tap
from workers.vhost_user import IdleRing

VERSION_1 = 1 << VIRTIO_F_VERSION_1
MRG_RXBUF = 1 << VIRTIO_NET_F_MRG_RXBUF
INDIRECT = 1 << VIRTIO_RING_F_INDIRECT_DESC
MODERN = VERSION_1 | INDIRECT
MERGING = MODERN | MRG_RXBUF
GUEST_OFFLOADS = (
    1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
)
# linux/if_tun.h, linux/if_packet.h
TUNGETVNETHDRSZ = 0x800454D7
PACKET_VNET_HDR = 15
SOL_PACKET = 263


class Received:
    """A frame as the driver found it: its header, its bytes, and the heads of the chains that it lay in."""

    def __init__(self, header: bytes, content: bytes, heads: list[int]) -> None:
        self.header = header
        self.content = content
        self.heads = heads


class Card(NetworkCard[Received]):
    """With a modern driver, which makes frames of merged buffers."""

    def __init__(self, link: Tap | Stream, accepted: int = MODERN, num: int = VIRTQUEUE_NUM) -> None:
        super().__init__(link, Driver(queues=QUEUES, num=num, ram=8 << 20), accepted)
        self.accepted = accepted
        self.chains: dict[int, list[Buffer]] = {}

    def queues(self) -> list[Virtqueue]:
        """The device's side of the rings, as after the end of whoever had them before."""
        return self.driver.device_queues("eth0", indirect=False)

    def add_rx(self, *sizes: int) -> int:
        """Offer a buffer in pieces of these sizes, in an indirect table if they are several; gives its head."""
        pieces = [self.driver.buffer(b"\xaa" * size, writable=True) for size in sizes]
        table = self.driver.buffer(16 * len(pieces)).address if len(pieces) > 1 else None
        head = self.driver.queues[RECEIVE_QUEUE].add(pieces, table)
        self.chains[head] = pieces
        return head

    def add_tx(self, *pieces: bytes) -> int:
        """Offer a frame with its header, in these pieces; gives its head."""
        return self.driver.queues[TRANSMIT_QUEUE].add([self.driver.buffer(piece) for piece in pieces])

    def received(self) -> list[Received]:
        """What came since the last time; each frame is here with all of its chains, which are full but the last one."""
        frames = []
        used = self.driver.queues[RECEIVE_QUEUE].collect()
        size = header_bytes(self.accepted)
        while used:
            first, _ = self._content(used[0])
            count = 1 if size == HEADER_BYTES else int.from_bytes(first[HEADER_BYTES:size], "little")
            assert 1 <= count <= len(used), "a frame is not here with all of its chains"
            assert count == 1 or self.accepted & MRG_RXBUF
            whole, used = used[:count], used[count:]
            content = b""
            for number, one in enumerate(whole, 1):
                written, room = self._content(one)
                content += written
                assert written
                assert len(written) == room or number == count
            for one in whole:
                del self.chains[one.head]
            frames.append(Received(content[:HEADER_BYTES], content[size:], [one.head for one in whole]))
        return frames

    def _content(self, used: Used) -> tuple[bytes, int]:
        """What was written to a chain, and its room."""
        content = b"".join(map(self.driver.content, self.chains[used.head]))
        assert used.written <= len(content)
        return content[: used.written], len(content)

    def settle(self) -> None:
        """Serve it until it waits for us, whose kick comes first."""
        more = True
        while True:
            if more:
                more = self.net.serve()
            poll = select.poll()
            for descriptor, events in self.net.wants():
                poll.register(descriptor, events)
            ready = poll.poll(0)
            for descriptor, events in ready:
                self.net.ready(descriptor, events)
            if not more and not ready:
                return

    def restart(self, queues: Sequence[Virtqueue | IdleRing] | None = None, accepted: int | None = None) -> None:
        """The rings are taken from the device, and it has these then, else the same as other objects."""
        self.net.suspend()
        self.net.queues = self.queues() if queues is None else queues  # type: ignore[assignment]
        self.net.accept(self.accepted if accepted is None else accepted)
        self.net.resume()


@pytest.fixture
def card(host_tap: HostTap) -> Iterator[Card]:
    """A card on a tap with virtio headers; its driver is modern."""
    made = Card(Tap(host_tap.descriptor, has_header=True))
    yield made
    made.close()


@pytest.fixture
def merging(host_tap: HostTap) -> Iterator[Card]:
    """The same, where the driver takes whatever there is."""
    made = Card(Tap(host_tap.descriptor, has_header=True), MERGING | GUEST_OFFLOADS)
    yield made
    made.close()


@pytest.fixture
def segments_wire(here: Namespace, host_tap: HostTap) -> Iterator[socket.socket]:
    """The host's end, for frames with virtio headers."""
    with here.open_socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as made:
        made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        made.bind((host_tap.name, 0))
        yield made


class Stack:
    """A card on a stream, and the other end of that."""

    def __init__(self, accepted: int = MERGING, num: int = VIRTQUEUE_NUM, *, enlarge: bool = True) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE)
        if not enlarge:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.fd = theirs.detach()
        self.card = Card(Stream(self.fd, enlarge=enlarge), accepted, num)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.card.close()
        self.socket.close()
        os.close(self.fd)

    def send(self, *contents: bytes) -> None:
        self.socket.sendall(b"".join(len(content).to_bytes(4, "big") + content for content in contents))

    def drain(self) -> bytes:
        """What is there."""
        found = b""
        while select.select([self.socket], [], [], 0)[0]:
            found += self.socket.recv(1 << 20)
        return found


def segmented_frame(size: int = 4000) -> bytes:
    """A virtio header of 10 bytes and a TCP segment whose checksum and segmentation are left to others."""
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 40 + size, 1, 0, 64, 6, 0, bytes([192, 168, 19, 1]), bytes([192, 168, 19, 2])
    )
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 1000, 0, 0)
    header = struct.pack("<BBHHHH", VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 54, 1000, 34, 16)
    return header + GUEST_MAC + OTHER_MAC + b"\x08\x00" + ip + tcp + random.Random(size).randbytes(size)


# Features


def test_a_modern_driver_is_offered_merged_buffers_besides() -> None:
    assert modern_features(0b11) == features(0b11) | MRG_RXBUF
    assert modern_features() & 1 << VIRTIO_NET_F_MAC


def test_a_driver_is_told_of_an_mtu_that_it_would_not_guess() -> None:
    assert modern_features(mtu=1500) == modern_features()
    assert modern_features(mtu=9000) == modern_features() | 1 << VIRTIO_NET_F_MTU


def test_a_modern_config_space_has_mac_link_pairs_and_mtu() -> None:
    assert modern_config_space(GUEST_MAC, 9000) == GUEST_MAC + struct.pack("<HHH", 1, 1, 9000)


@pytest.mark.parametrize(
    ("accepted", "size"),
    [(0, 10), (1 << VIRTIO_F_ANY_LAYOUT, 10), (VERSION_1, 12), (MRG_RXBUF, 12), (VERSION_1 | MRG_RXBUF, 12)],
)
def test_the_header_has_a_count_of_buffers_where_the_driver_is_modern_or_merges_them(accepted: int, size: int) -> None:
    assert header_bytes(accepted) == size


# The header of 12 bytes


@pytest.mark.parametrize("size", [14, 60, 1514])
def test_a_frame_of_the_host_comes_behind_a_header_that_says_one_buffer(
    card: Card, wire: socket.socket, size: int
) -> None:
    head = card.add_rx(MODERN_HEADER_BYTES + size)
    card.net.serve()
    sent = frame(os.urandom(size - 14))
    wire.send(sent)
    (got,) = card.pump(1)
    assert (got.header, got.content, got.heads) == (bytes(HEADER_BYTES), sent, [head])


@pytest.mark.parametrize("size", [60, 1514])
def test_a_frame_of_the_guest_comes_whole(card: Card, wire: socket.socket, size: int) -> None:
    content = frame(os.urandom(size - 14))
    card.add_tx(bytes(MODERN_HEADER_BYTES) + content)
    card.net.serve()
    assert receive_test_frame(wire) == content
    assert len(card.sent()) == 1


@pytest.mark.parametrize("first", [1, 9, 10, 11, 12, 13, 40, 76])
@pytest.mark.parametrize("has_header", [True, False])
def test_a_modern_driver_frames_as_it_likes(here: Namespace, first: int, has_header: bool) -> None:
    with here.entered():
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if has_header else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"any", flags))
        bring_up("any")
    card = Card(Tap(fd, has_header=has_header))
    content = frame(b"x" * 50)
    whole = bytes(MODERN_HEADER_BYTES) + content
    card.add_tx(*(part for part in (whole[:first], whole[first:]) if part))
    card.add_rx(*(size for size in (first, len(whole) - first) if size))
    with here.wire("any") as wire:
        card.net.serve()
        assert receive_test_frame(wire) == content
        wire.send(content)
        (got,) = card.pump(1)
    assert (got.header, got.content) == (bytes(HEADER_BYTES), content)
    card.close()
    os.close(fd)


def bring_up(name: str) -> None:
    with IPRoute() as route:
        route.link("set", index=socket.if_nametoindex(name), state="up")


@pytest.mark.parametrize("accepted", [MODERN, MERGING, MRG_RXBUF])
@pytest.mark.parametrize("queue", [RECEIVE_QUEUE, TRANSMIT_QUEUE])
def test_a_buffer_without_room_for_the_header_is_fatal(card: Card, accepted: int, queue: int) -> None:
    card.net.accept(accepted)
    card.driver.queues[queue].add([card.driver.buffer(11, writable=queue == RECEIVE_QUEUE)])
    with pytest.raises(RingError, match="Bad iovec size 11 for the header of a frame, it is 12"):
        card.net.serve()
        card.net.ready(card.link.fd, select.POLLIN)


def test_segments_come_with_the_header_that_says_so(card: Card, segments_wire: socket.socket) -> None:
    card.net.accept(MODERN | GUEST_OFFLOADS)
    card.add_rx(65562)
    card.net.serve()
    segments_wire.send(segmented_frame())
    (got,) = card.pump(1)
    assert got.content == segmented_frame()[HEADER_BYTES:]
    flags, gso_type, _, gso_size = struct.unpack_from("<BBHH", got.header)
    assert (flags, gso_type, gso_size) == (VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 1000)


def test_segments_of_the_guest_are_taken(card: Card, wire: socket.socket) -> None:
    whole = segmented_frame()
    card.add_tx(whole[:HEADER_BYTES] + bytes(2) + whole[HEADER_BYTES:])
    card.net.serve()
    while len(got := wire.recv(65550)) < 4000:
        pass
    assert got[54:] == whole[HEADER_BYTES + 54 :]
    assert card.said == []


def test_one_driver_after_the_other_has_the_header_that_it_accepted(card: Card, wire: socket.socket) -> None:
    for accepted, size in ((MERGING, 12), (0, 10), (MODERN, 12), (1 << VIRTIO_F_ANY_LAYOUT, 10), (MRG_RXBUF, 12)):
        card.net.reset()
        card.driver.reset()
        card.chains.clear()
        card.accepted = accepted
        card.net.accept(accepted)
        assert fcntl.ioctl(card.link.fd, TUNGETVNETHDRSZ, bytes(4)) == size.to_bytes(4, "little")
        content = frame(b"%d" % accepted)
        card.driver.queues[RECEIVE_QUEUE].add(pieces := [card.driver.buffer(size, True), card.driver.buffer(100, True)])
        card.driver.memory.view[pieces[0].address : pieces[0].address + size] = b"\xaa" * size
        card.add_tx(bytes(size), content)
        card.net.serve()
        assert receive_test_frame(wire) == content
        wire.send(content)
        while not (used := card.driver.queues[RECEIVE_QUEUE].collect()):
            assert select.select([card.link.fd], [], [], PATIENCE)[0]
            card.net.ready(card.link.fd, select.POLLIN)
        assert used[0].written == size + len(content)
        assert card.driver.content(pieces[0]) == bytes(HEADER_BYTES) + b"\1\0"[: size - HEADER_BYTES]
        assert card.driver.content(pieces[1])[: len(content)] == content


def test_a_successor_tells_a_tap_anew_how_long_the_header_is(host_tap: HostTap, wire: socket.socket) -> None:
    first, second = (Card(Tap(host_tap.descriptor, has_header=True), accepted) for accepted in (0, MODERN))
    second.add_rx(200)
    second.net.serve()
    wire.send(frame(b"to the second"))
    assert second.pump(1)[0].content == frame(b"to the second")
    first.close()
    second.close()


# Merged buffers


@pytest.mark.parametrize("size", [60, 1514, 4000, 20_000, 65_000])
def test_a_frame_lies_in_as_many_buffers_as_it_needs(
    merging: Card, wire: socket.socket, segments_wire: socket.socket, size: int
) -> None:
    heads = [merging.add_rx(1536) for _ in range(60)]
    merging.net.serve()
    whole = segmented_frame(size - 54)
    segments_wire.send(whole)
    wire.send(frame(b"behind it"))
    first, second = merging.pump(2)
    count = -(-(MODERN_HEADER_BYTES + size) // 1536)
    assert first.content == whole[HEADER_BYTES:]
    assert first.heads == heads[:count]
    assert second.content == frame(b"behind it")
    assert second.heads == [heads[count]]
    assert merging.said == []


def test_all_buffers_of_a_frame_are_given_back_at_once(merging: Card, segments_wire: socket.socket) -> None:
    """A driver that looks in between must not find some of them."""
    queue = merging.net.queues[RECEIVE_QUEUE]
    seen = []
    push_all = queue.push_all

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(queue, name)

        def push(self, head: int, written: int) -> None:
            raise AssertionError("a part of a frame is given back by itself")

        def push_all(self, answers: list[tuple[int, int]]) -> None:
            seen.append((merging.driver.queues[RECEIVE_QUEUE].used_index(), len(answers)))
            push_all(answers)

    merging.net.queues = (Watched(), merging.net.queues[TRANSMIT_QUEUE])  # type: ignore[assignment]
    for _ in range(8):
        merging.add_rx(1000)
    merging.net.serve()
    segments_wire.send(segmented_frame(4000))
    merging.pump(1)
    assert seen == [(0, 5)]


@pytest.mark.parametrize("has_header", [True, False])
def test_a_frame_is_one_read_however_many_buffers_it_lies_in(
    here: Namespace, monkeypatch: pytest.MonkeyPatch, has_header: bool
) -> None:
    with here.entered():
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if has_header else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"one", flags))
        bring_up("one")
    card = Card(Tap(fd, has_header=has_header), MERGING)
    for _ in range(100):
        card.add_rx(100)
    card.net.serve()
    reads = []

    def readv(descriptor: int, segments: list[memoryview]) -> int:
        reads.append(len(segments))
        return os.readv(descriptor, segments)

    monkeypatch.setattr(workers.net, "_readv", readv)
    with here.wire("one") as wire:
        for number in range(5):
            wire.send(frame(bytes([number]) * 1486))
    contents = [got.content for got in card.pump(5)]
    assert contents == [frame(bytes([number]) * 1486) for number in range(5)]
    assert len(reads) - 5 in (0, 1)  # and one that found nothing
    card.close()
    os.close(fd)


@pytest.mark.parametrize("pieces", [1, 2, 600])
def test_a_buffer_may_have_more_pieces_than_a_read_takes(
    merging: Card, segments_wire: socket.socket, pieces: int
) -> None:
    sizes = [12] + [5] * (pieces - 1)
    while len(merging.driver.queues[RECEIVE_QUEUE].free) > 1:
        merging.add_rx(*sizes)
    merging.add_rx(30_000)
    merging.net.serve()
    whole = segmented_frame(3900)
    segments_wire.send(whole)
    (got,) = merging.pump(1)
    assert got.content == whole[HEADER_BYTES:]


def test_legacy_drivers_may_merge_buffers_too(card: Card, wire: socket.socket) -> None:
    """They have the header where the data of a buffer begins, but frames to send with the header by itself."""
    card.net.accept(MRG_RXBUF)
    card.accepted = MRG_RXBUF
    card.add_rx(30)
    card.add_rx(300)
    card.add_tx(bytes(MODERN_HEADER_BYTES), frame(b"out"))
    card.net.serve()
    assert receive_test_frame(wire) == frame(b"out")
    wire.send(frame(b"i" * 40))
    (got,) = card.pump(1)
    assert len(got.heads) == 2
    assert got.content == frame(b"i" * 40)
    card.add_tx(bytes(MODERN_HEADER_BYTES) + frame(b"out"))
    with pytest.raises(RingError, match="Bad iovec size 29 for the header"):
        card.net.serve()


def test_without_merging_a_frame_longer_than_its_buffer_is_dropped(card: Card, wire: socket.socket) -> None:
    card.add_rx(100)
    card.add_rx(100)
    card.net.serve()
    wire.send(frame(b"x" * 75))
    wire.send(frame(b"x" * 74))
    (got,) = card.pump(1)
    assert len(got.content) == 88
    assert card.said == ["eth0: a frame is longer than the guest's buffer of 100 bytes, dropped"]


def test_a_frame_that_the_guest_has_too_few_buffers_for_waits_for_more(
    merging: Card, wire: socket.socket, segments_wire: socket.socket
) -> None:
    for _ in range(3):
        merging.add_rx(1500)
    merging.net.serve()
    whole = segmented_frame(20_000)
    segments_wire.send(whole)
    wire.send(frame(b"behind it"))
    merging.net.ready(merging.link.fd, select.POLLIN)
    for _ in range(3):
        assert merging.received() == []
        assert not merging.wants(select.POLLIN)
        for _ in range(3):
            merging.add_rx(1500)
        assert not merging.net.serve()
    for _ in range(3):
        merging.add_rx(1500)
    merging.net.serve()
    first, second = merging.pump(2)
    assert first.content == whole[HEADER_BYTES:]
    assert len(first.heads) == 14
    assert second.content == frame(b"behind it")
    assert merging.net.statistics[ERRORS] == 0


def test_a_frame_that_no_number_of_buffers_would_take_is_dropped(
    host_tap: HostTap, wire: socket.socket, segments_wire: socket.socket
) -> None:
    card = Card(Tap(host_tap.descriptor, has_header=True), MERGING | GUEST_OFFLOADS, num=4)
    for _ in range(3):
        card.add_rx(500)
    card.net.serve()
    segments_wire.send(segmented_frame(3000))
    wire.send(frame(b"behind it"))
    card.net.ready(card.link.fd, select.POLLIN)
    assert card.said == []  # there may come one that is larger
    card.add_rx(500)
    card.settle()
    (got,) = card.received()
    assert got.content == frame(b"behind it")
    assert card.said == ["eth0: a frame is longer than all the guest's buffers of 2000 bytes together, dropped"]
    assert card.net.statistics[ERRORS] == 1
    card.close()


def test_a_flood_of_short_frames_after_long_ones_comes_in_order(
    merging: Card, wire: socket.socket, segments_wire: socket.socket
) -> None:
    for _ in range(100):
        merging.add_rx(1536)
    merging.net.serve()
    segments_wire.send(segmented_frame(30_000))
    merging.pump(1)
    flood(wire, 200)
    came: list[Received] = []
    while len(came) < 200:
        while len(merging.driver.queues[RECEIVE_QUEUE].free) > 20:
            merging.add_rx(1536)
        merging.net.serve()
        came += merging.pump(1)
    assert [got.content for got in came] == [frame(b"%d" % number) for number in range(200)]


def test_a_reset_forgets_the_frame_that_waits(merging: Card, wire: socket.socket, segments_wire: socket.socket) -> None:
    merging.add_rx(1500)
    merging.net.serve()
    segments_wire.send(segmented_frame(20_000))
    merging.net.ready(merging.link.fd, select.POLLIN)
    merging.net.reset()
    merging.driver.reset()
    merging.net.accept(merging.accepted)
    merging.add_rx(60_000)
    merging.net.serve()
    wire.send(frame(b"new"))
    assert merging.pump(1)[0].content == frame(b"new")


def test_a_frame_that_waits_goes_to_no_driver_that_accepted_other_features(
    merging: Card, wire: socket.socket, segments_wire: socket.socket
) -> None:
    merging.add_rx(1500)
    merging.net.serve()
    segments_wire.send(segmented_frame(20_000))
    merging.net.ready(merging.link.fd, select.POLLIN)
    merging.accepted = MODERN
    merging.restart()
    wire.send(frame(b"plain"))
    merging.net.serve()
    assert merging.pump(1)[0].content == frame(b"plain")
    assert merging.net.statistics[ERRORS] == 1


@given(
    buffers=st.lists(
        # Of so many bytes at least that 16 buffers take the longest frame.
        st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 80),
        min_size=1,
        max_size=12,
    ),
    frames=st.lists(st.one_of(st.integers(1, 120), st.integers(1, 16 * 80 - 12)), min_size=1, max_size=25),
    offered=st.lists(st.integers(1, 16), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_frames_come_whole_and_in_order_whatever_buffers_there_are(
    buffers: list[list[int]], frames: list[int], offered: list[int]
) -> None:
    """No frame is lost, each is in the next buffers in the order in which they were offered, and says how many."""
    contents = [random.Random(number).randbytes(size) for number, size in enumerate(frames)]
    with Stack(num=16) as stack:
        card = stack.card
        stack.send(*contents)
        came: list[Received] = []
        heads: list[int] = []
        added = turn = 0
        while len(came) < len(contents):
            if not card.chains:
                card.driver.forget()
            for _ in range(min(offered[turn % len(offered)], len(card.driver.queues[RECEIVE_QUEUE].free))):
                heads.append(card.add_rx(*buffers[added % len(buffers)]))
                added += 1
            turn += 1
            card.settle()
            came += card.received()
            assert turn < 2000
        assert [got.content for got in came] == contents
        assert all(got.header == bytes(HEADER_BYTES) for got in came)
        used = [head for got in came for head in got.heads]
        assert used == heads[: len(used)]
        assert card.said == []


class MergingNet(Net):
    """A card whose driver merges buffers, whatever the test kit says."""

    def accept(self, features: int) -> None:
        super().accept(features | MERGING)


@pytest.mark.parametrize("seed", range(takeover.ROUNDS))
def test_a_kill_leaves_no_frame_in_part_and_no_two_frames_as_one(seed: int) -> None:
    driver = Driver(queues=2)
    script = random.Random(seed)
    sizes = [script.choice((9, 60, 700, 1514)) for _ in range(150)]
    data = b"".join(takeover.numbered_frame(number, size) for number, size in enumerate(sizes))
    with (
        takeover.stack_that_sends(data, 200_000, seed) as fd,
        takeover.lives(driver, lambda say: MergingNet(Stream(fd), say=say), workers.net, seed) as net,
    ):
        net.longest = takeover.LONGEST_NET_LIFE
        got: list[int] = []
        chains: dict[int, Buffer] = {}
        for room in script.sample((12, 200, 700) * 4, 12):
            buffer = driver.buffer(room, writable=True)
            chains[driver.queues[RECEIVE_QUEUE].add([buffer])] = buffer
        while max(got, default=0) < 100:
            assert select.select([fd], [], [], PATIENCE)[0]
            net.bout()
            used = driver.queues[RECEIVE_QUEUE].collect()
            while used:
                count = int.from_bytes(driver.content(chains[used[0].head])[HEADER_BYTES:MODERN_HEADER_BYTES], "little")
                assert 1 <= count <= len(used)
                content = b"".join(driver.content(chains[one.head])[: one.written] for one in used[:count])
                got.append(takeover.check_frame(content[MODERN_HEADER_BYTES:]))
                for one in used[:count]:
                    buffer = chains.pop(one.head)
                    chains[driver.queues[RECEIVE_QUEUE].add([buffer])] = buffer
                del used[:count]
        assert net.said() == []
        assert net.kills
        missing = set(range(max(got))) - set(got)
        assert len(missing) <= net.lives
        assert takeover.repeats_of(got) <= net.kills


# Rings that are taken away for a while


def test_buffers_that_were_held_are_filled_when_the_rings_are_there_again(merging: Card, wire: socket.socket) -> None:
    heads = [merging.add_rx(1000) for _ in range(4)]
    merging.net.serve()
    merging.net.ready(merging.link.fd, select.POLLIN)  # takes some
    merging.restart()
    assert merging.net.wants() == ()
    merging.net.serve()
    for number in range(2):
        wire.send(frame(b"%d" % number * 1400))
    came = merging.pump(2)
    assert [got.content for got in came] == [frame(b"%d" % number * 1400) for number in range(2)]
    assert [got.heads for got in came] == [heads[:2], heads[2:]]


def test_between_suspend_and_resume_no_ring_is_touched(merging: Card, wire: socket.socket) -> None:
    merging.add_rx(1000)
    merging.net.serve()
    merging.net.ready(merging.link.fd, select.POLLIN)
    merging.net.suspend()
    wire.send(frame(b"not yet"))
    merging.net.ready(merging.link.fd, select.POLLIN | select.POLLOUT)
    assert merging.received() == []
    merging.restart()
    merging.net.serve()
    assert merging.pump(1)[0].content == frame(b"not yet")


def test_a_frame_that_waits_for_buffers_waits_over_a_suspension(
    merging: Card, wire: socket.socket, segments_wire: socket.socket
) -> None:
    for _ in range(2):
        merging.add_rx(1500)
    merging.net.serve()
    whole = segmented_frame(4000)
    segments_wire.send(whole)
    wire.send(frame(b"behind it"))
    merging.net.ready(merging.link.fd, select.POLLIN)
    assert merging.received() == []
    merging.restart()
    merging.add_rx(3000)
    merging.add_rx(3000)
    merging.settle()
    first, second = merging.received()
    assert (first.content, first.heads) == (whole[HEADER_BYTES:], [0, 1, 2])
    assert second.content == frame(b"behind it")


def test_with_the_receive_ring_alone_frames_come(merging: Card, wire: socket.socket) -> None:
    merging.add_rx(1000)
    merging.restart([merging.queues()[RECEIVE_QUEUE], IdleRing("eth0: queue 1")])
    merging.settle()
    wire.send(frame(b"in"))
    assert merging.pump(1)[0].content == frame(b"in")
    assert merging.sent() == []


def test_with_the_transmit_ring_alone_frames_go_and_others_wait(
    merging: Card, wire: socket.socket, segments_wire: socket.socket
) -> None:
    merging.add_rx(1000)
    merging.net.serve()
    segments_wire.send(segmented_frame(4000))
    merging.net.ready(merging.link.fd, select.POLLIN)  # it waits for buffers
    wire.send(frame(b"behind it"))
    merging.add_tx(bytes(MODERN_HEADER_BYTES) + frame(b"out"))
    merging.restart([IdleRing("eth0: queue 0"), merging.queues()[TRANSMIT_QUEUE]])
    merging.settle()
    assert len(merging.sent()) == 1
    assert merging.received() == []
    assert not merging.wants(select.POLLIN)
    for _ in range(5):
        merging.add_rx(1000)
    merging.restart()
    merging.settle()
    assert [len(got.content) for got in merging.received()] == [4054, 14 + len(b"behind it")]
    assert merging.said == []


def half_sent(stack: Stack) -> tuple[bytes, bytes]:
    """Have a frame go in part, a second one wait; gives both with their lengths."""
    frames = [frame(bytes([number]) * 60_000) for number in (1, 2)]
    for content in frames:
        stack.card.add_tx(bytes(MODERN_HEADER_BYTES) + content)
    stack.card.net.serve()
    assert stack.card.sent() == []
    one, two = (len(content).to_bytes(4, "big") + content for content in frames)
    return one, two


def take(stack: Stack, size: int) -> bytes:
    """So many bytes of what it sends."""
    found = b""
    while len(found) < size:
        stack.card.settle()
        came = stack.drain()
        assert came, f"only {len(found)} bytes came"
        found += came
    return found


def test_a_frame_that_has_gone_in_part_is_gone_on_with_after_a_suspension() -> None:
    with Stack(enlarge=False) as stack:
        one, two = half_sent(stack)
        stack.card.restart()
        stack.card.restart()
        assert take(stack, len(one + two)) == one + two
        assert len(stack.card.sent()) == 2
        assert stack.card.said == []


def test_a_frame_that_has_gone_in_part_goes_on_though_its_ring_is_not_served_any_more() -> None:
    """And goes again, as a whole, when it is."""
    with Stack(enlarge=False) as stack:
        one, two = half_sent(stack)
        came = stack.drain()
        stack.card.restart([stack.card.queues()[RECEIVE_QUEUE], IdleRing("eth0: queue 1")])
        came += take(stack, len(one) - len(came))
        assert came == one
        stack.card.restart()
        assert take(stack, len(one + two)) == one + two
        assert len(stack.card.sent()) == 2
        assert stack.card.said == []


def test_a_frame_that_has_gone_in_part_is_finished_for_the_next_driver() -> None:
    with Stack(enlarge=False) as stack:
        one, _ = half_sent(stack)
        stack.card.net.suspend()
        stack.card.net.reset()
        stack.card.driver.reset()
        stack.card.net.queues = stack.card.queues()
        stack.card.net.accept(MERGING)
        stack.card.net.resume()
        stack.card.add_tx(bytes(MODERN_HEADER_BYTES) + frame(b"new"))
        new = (14 + 3).to_bytes(4, "big") + frame(b"new")
        assert take(stack, len(one + new)) == one + new
        assert stack.card.said == []


def test_a_successor_whose_rings_start_singly_goes_on_with_a_frame_that_has_gone_in_part() -> None:
    with Stack(enlarge=False) as stack:
        card = stack.card
        one, two = half_sent(stack)
        successor = Net(Stream(stack.fd, enlarge=False), say=card.said.append)
        idle = [IdleRing("eth0: queue 0"), IdleRing("eth0: queue 1")]
        successor.attach(idle, card.recorder, state=card.net.state)  # type: ignore[arg-type]
        card.net.close()
        card.net = successor
        card.restart([card.queues()[RECEIVE_QUEUE], idle[1]])
        card.add_rx(1000)
        stack.send(frame(b"in"))
        card.settle()
        assert card.received()[0].content == frame(b"in")
        card.restart()
        assert take(stack, len(one + two)) == one + two
        assert card.said == []


def test_a_frame_of_a_predecessor_whose_ring_never_comes_back_ends_the_link() -> None:
    """It was taken up, and its ring stopped before any of it was popped again: nobody has its rest."""
    with Stack(enlarge=False) as stack:
        card = stack.card
        half_sent(stack)
        successor = Net(Stream(stack.fd, enlarge=False), say=card.said.append)
        successor.attach(card.queues(), card.recorder, state=card.net.state)
        card.net.close()
        card.net = successor
        successor.accept(MERGING)
        successor.resume()
        card.restart([card.queues()[RECEIVE_QUEUE], IdleRing("eth0: queue 1")])
        card.settle()
        stack.drain()
        card.restart()
        card.settle()
        assert card.said == ["eth0: its network is gone (a frame was sent only in part); the guest goes on without it"]
        assert len(card.sent()) == 2
        assert stack.drain() == b""


def test_the_longest_frame_of_a_stream_comes_in_many_buffers() -> None:
    content = os.urandom(MAX_FRAME)
    with Stack() as stack:
        stack.socket.settimeout(None)
        for _ in range(100):
            stack.card.add_rx(1000)
        stack.send(content)
        stack.card.settle()
        (got,) = stack.card.received()
        assert got.content == content


def test_a_frame_of_a_stream_that_waits_stays_in_it_for_a_successor() -> None:
    with Stack() as stack:
        stack.card.add_rx(1000)
        stack.send(frame(b"w" * 2000))
        stack.card.settle()
        with socket.socket(fileno=os.dup(stack.fd)) as left:
            assert left.recv(4000, socket.MSG_PEEK)[4:] == frame(b"w" * 2000)
        stack.card.add_rx(3000)
        stack.card.settle()
        (got,) = stack.card.received()
        assert got.content == frame(b"w" * 2000)
        with socket.socket(fileno=os.dup(stack.fd)) as left, pytest.raises(OSError) as error:
            left.recv(4000, socket.MSG_PEEK)
        assert error.value.errno == errno.EAGAIN
