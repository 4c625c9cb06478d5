"""Networks that `lgmp serve net` has for DPDK: its driver polls, and frames as the kernel's does not."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Launch, wait_until
from networks import ETH_P_TEST, GUEST_IP, GUEST_MAC, HOST_IP, OTHER_MAC, Namespace, frame, namespace, needs
from serving import served, worker_of
from testpmd import Testpmd, needs_testpmd

pytestmark = needs_testpmd

TAP = "port0"
# linux/if_packet.h
PACKET_VNET_HDR = 15
# linux/in.h, linux/icmp.h
IP_MTU_DISCOVER = 10
IP_PMTUDISC_DO = 2
ICMP_ECHO = 8
ICMP_ECHO_REPLY = 0
SOL_PACKET = 263
NO_HEADER = bytes(10)
# rte_ethdev.h: UDP and TCP checksums, segments (TSO4 and TSO6 of virtio), several buffers a frame; to send such frames.
RX_OFFLOADS = "--rx-offloads=0x201c"
TX_OFFLOADS = "--tx-offloads=0x8000"
# Frames under way at once: the rings of testpmd have room for that many.
WINDOW = 32


@pytest.fixture
def here() -> Iterator[Namespace]:
    """With a tap of somebody's."""
    needs("ip")
    with namespace() as made:
        with made.entered():
            for command in (
                f"tuntap add dev {TAP} mode tap",
                f"address add {HOST_IP}/24 dev {TAP}",
                f"link set {TAP} up",
            ):
                subprocess.run(["ip", *command.split()], check=True)
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.sock"


@pytest.fixture
def serving(here: Namespace, path: Path) -> Iterator[Launch]:
    """A card on the tap, which has nothing to complain of."""
    with here.entered(), served("net", "--tap", TAP, socket=path) as launched:
        yield launched
        assert launched.err.text.count("\n") == 1, launched.err.text


class Pings:
    """ICMP from the host's stack to testpmd, and what comes back. (ping ends early where its last answer is late.)"""

    def __init__(self, here: Namespace) -> None:
        self._socket = here.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        self._socket.connect((GUEST_IP, 0))
        self._number = 0

    def send(self, size: int) -> bytes:
        """Send one with `size` bytes of data; gives its answer (RFC 792)."""
        self._number += 1
        body = struct.pack("!HH", os.getpid() & 0xFFFF, self._number) + os.urandom(size)
        self._socket.send(_with_checksum(ICMP_ECHO, body))
        return _with_checksum(ICMP_ECHO_REPLY, body)

    def answer(self, count: int, size: int = 56) -> None:
        """Send so many, a few at a time as sockets have room for, and wait for their answers."""
        for _ in range(0, count, 5):
            expected = [self.send(size) for _ in range(min(5, count))]
            assert [self._next_answer() for _ in expected] == expected

    def _next_answer(self) -> bytes:
        while True:
            packet = self._socket.recv(1 << 16)
            if packet[20] == ICMP_ECHO_REPLY:
                return packet[20:]

    def close(self) -> None:
        self._socket.close()


def _with_checksum(kind: int, body: bytes) -> bytes:
    """An ICMP message with its checksum; `body` has an even number of bytes."""
    total = (kind << 8) + sum(struct.unpack(f"!{len(body) // 2}H", body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBH", kind, 0, total ^ 0xFFFF) + body


@pytest.fixture
def pings(here: Namespace) -> Iterator[Pings]:
    made = Pings(here)
    yield made
    made.close()


def frames_of_guest(here: Namespace) -> int:
    """How many frames the tap has had from the other side."""
    with here.entered():
        said = subprocess.run(["ip", "-s", "-j", "link", "show", TAP], capture_output=True, check=True).stdout
    found: int = json.loads(said)[0]["stats64"]["rx"]["packets"]
    return found


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ("", "using mergeable buffer Rx path"),
        (",mrg_rxbuf=0", "using standard Rx path"),
        (",mrg_rxbuf=0,vectorized=1", "using vectorized Rx path"),
        (",queue_size=32", "using mergeable buffer Rx path"),
    ],
)
def test_pings_are_answered(here: Namespace, serving: Launch, pings: Pings, path: Path, options: str, way: str) -> None:
    """Whichever of its ways the driver goes."""
    with Testpmd(here, path, options) as testpmd:
        assert way in testpmd.started
        testpmd.forward("icmpecho")
        pings.answer(20)
        pings.answer(20, 1472)
        counts = testpmd.stop()
    # With the question for its address before them.
    assert counts.received == counts.sent
    assert counts.sent >= 41


def test_long_frames_lie_in_several_buffers(here: Namespace, serving: Launch, pings: Pings, path: Path) -> None:
    with here.entered():
        subprocess.run(["ip", "link", "set", TAP, "mtu", "9000"], check=True)
    with Testpmd(here, path, "", "--max-pkt-len=9018", "--enable-scatter") as testpmd:
        testpmd.forward("icmpecho")
        pings.answer(20, 8972)
        pings.answer(20)


def test_frames_too_long_for_the_buffers_are_dropped_and_others_are_not(
    here: Namespace, pings: Pings, path: Path
) -> None:
    with here.entered():
        subprocess.run(["ip", "link", "set", TAP, "mtu", "9000"], check=True)
        with served("net", "--tap", TAP, socket=path) as launched, Testpmd(here, path, ",mrg_rxbuf=0") as testpmd:
            testpmd.forward("icmpecho")
            pings.answer(20)
            pings.send(8000)
            launched.err.wait_for("lgmp: eth0: a frame is longer than the guest's buffer of ")
            pings.answer(20)


def test_frames_of_all_lengths_come_back_as_they_were(here: Namespace, serving: Launch, path: Path, seed: int) -> None:
    print("seed:", seed)
    script = random.Random(seed)
    sizes = [*range(15, 80), *script.sample(range(80, 1514), 400), 1514]
    contents = [frame(script.randbytes(size - 14)) for size in sizes]
    with Testpmd(here, path) as testpmd, here.wire(TAP) as wire:
        testpmd.forward("io")
        for start in range(0, len(contents), WINDOW):
            sent = contents[start : start + WINDOW]
            for content in sent:
                wire.send(content)
            assert [next_frame(wire) for _ in sent] == sent
        counts = testpmd.stop()
        assert (counts.received, counts.sent, counts.dropped) == (len(contents), len(contents), 0)


def next_frame(wire: socket.socket) -> bytes:
    """The next frame from the other side that is of a test."""
    while True:
        content, (_, _, kind, *_) = wire.recvfrom(1 << 17)
        if kind != socket.PACKET_OUTGOING and content[12:14] == ETH_P_TEST:
            return content


@pytest.mark.parametrize("size", [4000, 20_000, 65_000])
def test_segments_come_in_merged_buffers_and_back_in_long_chains(
    here: Namespace, serving: Launch, path: Path, size: int
) -> None:
    """TCP that the host has left whole, for a driver that takes such; what it sends is a frame as long."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + size, 1, 0, 64, 6, 0, b"\xc0\xa8\x13\x01", b"\xc0\xa8\x13\x02")
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 1000, 0, 0)
    content = GUEST_MAC + OTHER_MAC + b"\x08\x00" + ip + tcp + os.urandom(size)
    # NEEDS_CSUM, TCPV4, headers of 54 bytes, segments of 1000, where the checksum is.
    header = struct.pack("<BBHHHH", 1, 1, 54, 1000, 34, 16)
    with Testpmd(here, path, "", RX_OFFLOADS, TX_OFFLOADS) as testpmd, here.wire(TAP) as wire:
        wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        testpmd.forward("io")
        for _ in range(5):
            wire.send(header + content)
            while (got := wire.recvfrom(1 << 17))[1][2] == socket.PACKET_OUTGOING:
                pass
            assert got[0] == NO_HEADER + content
        assert testpmd.stop().received == 5


def test_what_a_flood_of_frames_says_that_it_sent_is_sent(here: Namespace, serving: Launch, path: Path) -> None:
    with Testpmd(here, path) as testpmd:
        testpmd.forward("txonly")
        wait_until(lambda: frames_of_guest(here) > 10_000, "a flood")
        sent = testpmd.stop().sent
        wait_until(lambda: frames_of_guest(here) == sent, f"{sent} frames at the tap")


def test_frames_go_to_and_fro_in_both_directions_at_once(here: Namespace, serving: Launch, path: Path) -> None:
    """Each that comes back is sent there again."""
    with Testpmd(here, path) as testpmd, here.wire(TAP) as wire:
        testpmd.forward("macswap")
        for number in range(WINDOW):
            wire.send(frame(b"%d" % number))
        returned = 0
        while returned < 2000:
            content = next_frame(wire)
            assert content[:6] == OTHER_MAC
            wire.send(GUEST_MAC + OTHER_MAC + content[12:])
            returned += 1
        for _ in range(WINDOW):
            next_frame(wire)
        counts = testpmd.stop()
        assert counts.received == counts.sent == 2000 + WINDOW


def test_a_port_that_is_stopped_and_started_goes_on(here: Namespace, serving: Launch, pings: Pings, path: Path) -> None:
    """Its rings are taken away, and there again from their beginning."""
    with Testpmd(here, path) as testpmd:
        for _ in range(3):
            testpmd.forward("icmpecho")
            pings.answer(5)
            testpmd.stop()
            testpmd.ask("port stop all")
            testpmd.ask("port start all")


def test_one_front_end_after_the_other_is_served_by_its_own_rules(
    here: Namespace, serving: Launch, pings: Pings, path: Path
) -> None:
    for options in ("", ",mrg_rxbuf=0", ",queue_size=64"):
        with Testpmd(here, path, options) as testpmd:
            testpmd.forward("icmpecho")
            pings.answer(5)


def test_a_front_end_that_is_killed_in_a_flood_makes_room_for_the_next(
    here: Namespace, serving: Launch, pings: Pings, path: Path
) -> None:
    worker = worker_of(serving)
    with pytest.raises(KilledError), Testpmd(here, path) as testpmd:
        testpmd.forward("txonly")
        wait_until(lambda: frames_of_guest(here) > 1000, "a flood")
        raise KilledError
    with Testpmd(here, path) as testpmd:
        testpmd.forward("icmpecho")
        pings.answer(5)
    assert worker_of(serving) == worker


class KilledError(Exception):
    """Whoever leaves a Testpmd by an exception leaves it killed."""


def test_a_worker_that_was_killed_is_replaced_for_the_next_front_end(here: Namespace, pings: Pings, path: Path) -> None:
    """testpmd as a client does not connect again by itself."""
    with here.entered(), served("net", "--tap", TAP, "--supervise", socket=path) as launched:
        with pytest.raises(KilledError), Testpmd(here, path) as testpmd:
            testpmd.forward("txonly")
            wait_until(lambda: frames_of_guest(here) > 1000, "a flood")
            os.kill(worker_of(launched), 9)
            raise KilledError
        with Testpmd(here, path) as testpmd:
            testpmd.forward("icmpecho")
            pings.answer(5)
