"""Frames per second and bytes per second between a guest and its host, beside the same over a plain veth pair.

Three kinds of frames in both directions, with a driver of our own in place of a guest: it hands the worker process
buffers as fast as that takes them, and never looks into them. Then the bundled test guest, which answers pings.
Everything happens in a network namespace of its own, that of a thread. The frames are for nobody: the kernel drops
them as soon as it has them, so that what is measured is the way there.

A veth pair is two network cards of the kernel with a wire between them; a frame takes one system call of its sender.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

import guest
from pyroute2 import IPRoute
from samples import Samples
from worker import StartedWorker

from lgmp.network import Tap, TapOption
from lgmp.virtio.ids import VIRTQUEUE_NUM, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.net import (
    HEADER_BYTES,
    QUEUES,
    RECEIVE_QUEUE,
    TRANSMIT_QUEUE,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
)

# linux/sched.h, linux/if_packet.h
CLONE_NEWNET = 0x40000000
SOL_PACKET = 263
PACKET_VNET_HDR = 15

HOST_IP = "192.168.19.1"
GUEST_IP = "192.168.19.2"
GUEST_MAC = bytes.fromhex("020000000001")
# Of nobody: who gets a frame for it drops it.
NOBODY = bytes.fromhex("020000000099")

# Frames: the shortest, the longest of an ordinary network, and a TCP segment that the cards would cut into 44 of those.
SHORT, FULL, SEGMENTED = 60, 1514, 54 + 44 * 1460
SIZES = {SHORT: "60 bytes", FULL: "1514 bytes", SEGMENTED: "64 KiB, segmented"}
DIRECTIONS = ("guest to host", "host to guest")

# Chains that a driver of ours keeps in the ring, of two descriptors each.
_CHAINS = VIRTQUEUE_NUM // 2
_SLOT_BYTES = 1 << 17
# Pings that are under way at once.
_WINDOW = 16
_PING_BYTES = {56: "56 bytes", 1472: "1472 bytes"}
_ICMP_ECHO = 8
# A ping without an answer for so long, in seconds, is lost.
_LOST_AFTER = 1.0


def measure(rounds: int = 5, seconds: float = 1.0) -> dict[str, Samples]:
    """Thousands of frames, or MB, per second by "DIRECTION, SIZE" or "veth, SIZE", and of pings; `seconds` for each.

    Raises PermissionError where this user may make no namespaces.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_measure, rounds, seconds).result()


def _measure(rounds: int, seconds: float) -> dict[str, Samples]:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise PermissionError("network namespaces and taps take root")
    for what in ("all", "default"):
        with open(f"/proc/sys/net/ipv6/conf/{what}/disable_ipv6", "w") as file:
            file.write("1")
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for size, words in SIZES.items():
            measured = {
                DIRECTIONS[0]: _guest_to_host(size, seconds),
                DIRECTIONS[1]: _host_to_guest(size, seconds),
                "veth": _veth(size, seconds),
            }
            for where, rate in measured.items():
                rates.setdefault(f"{where}, {words}", []).append(rate)
        for size, words in _PING_BYTES.items():
            rates.setdefault(f"pings, {words}", []).append(_guest_pings(size, seconds))
            rates.setdefault(f"pings, {words}, veth", []).append(_veth_pings(size, seconds))
    return {key: Samples.of(values, _unit(key)) for key, values in rates.items()}


def _unit(key: str) -> str:
    return "MB/s" if "KiB" in key else "k/s"


def _scaled(frames: float, size: int) -> float:
    """Frames per second in the unit of their table row."""
    return frames * size / 1e6 if size == SEGMENTED else frames / 1e3


def header_and_frame(size: int) -> tuple[bytes, bytes]:
    """A virtio header and a frame of `size` bytes for nobody; the longest is a TCP segment to be cut by who can."""
    ethernet = NOBODY + GUEST_MAC
    if size != SEGMENTED:
        return bytes(HEADER_BYTES), ethernet + b"\x88\xb5" + bytes(size - 14)
    addresses = socket.inet_aton(GUEST_IP) + socket.inet_aton(HOST_IP)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, size - 14, 1, 0, 64, socket.IPPROTO_TCP, 0) + addresses
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 1000, 0, 0)
    header = struct.pack("<BBHHHH", VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, 54, 1460, 34, 16)
    return header, ethernet + b"\x08\x00" + ip + tcp + bytes(size - 54)


class Card(StartedWorker):
    """A net worker on a tap, both rings full of buffers of ours that come back in order and are offered again."""

    def __init__(self, size: int) -> None:
        """Frames sent are of `size` bytes, and those received at most."""
        self._tap = Tap.open(TapOption.parse(HOST_IP), GUEST_MAC)
        super().__init__(
            "workers.net",
            (*self._tap.worker_options, "--", "bench"),
            self._tap.descriptor,
            queues=QUEUES,
            ram=QUEUES * _CHAINS * _SLOT_BYTES,
            features=self._tap.offloads,
        )
        self.interface = self._tap.name
        content = b"".join(header_and_frame(size))
        for queue, flags in ((RECEIVE_QUEUE, VRING_DESC_F_WRITE), (TRANSMIT_QUEUE, 0)):
            for chain in range(_CHAINS):
                address = (queue * _CHAINS + chain) * _SLOT_BYTES
                self.memory.view[address : address + len(content)] = content
                self._describe(queue, 2 * chain, (address, HEADER_BYTES, flags | VRING_DESC_F_NEXT, 2 * chain + 1))
                self._describe(queue, 2 * chain + 1, (address + HEADER_BYTES, size, flags, 0))
            heads = [2 * (entry % _CHAINS) for entry in range(VIRTQUEUE_NUM)]
            struct.pack_into(f"<{VIRTQUEUE_NUM}H", self.memory.view, self.layouts[queue].avail + 4, *heads)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have the worker finish, and give the tap back."""
        super().__exit__(kind, value, trace)
        self._tap.close()

    def _describe(self, queue: int, index: int, descriptor: tuple[int, int, int, int]) -> None:
        struct.pack_into("<QIHH", self.memory.view, self.layouts[queue].desc + 16 * index, *descriptor)

    def rate(self, queue: int, seconds: float) -> float:
        """How many buffers of a ring the worker uses per second, where each is offered again at once."""
        avail, used = self.avail[queue], self.used[queue]
        count = 0
        seen = used[1]
        avail[1] = (seen + _CHAINS) & 0xFFFF
        start = time.perf_counter()
        end = start + seconds
        while (now := time.perf_counter()) < end:
            self.round_trip()
            done = (used[1] - seen) & 0xFFFF
            seen = (seen + done) & 0xFFFF
            avail[1] = (avail[1] + done) & 0xFFFF
            count += done
        return count / (now - start)


def _guest_to_host(size: int, seconds: float) -> float:
    with Card(size) as card:
        card.rate(TRANSMIT_QUEUE, seconds / 10)  # to warm up
        before = _received(card.interface)
        rate = card.rate(TRANSMIT_QUEUE, seconds)
        if _received(card.interface) - before < rate * seconds / 2:
            raise RuntimeError("the tap has not got the frames that the worker sent")
        return _scaled(rate, size)


def _host_to_guest(size: int, seconds: float) -> float:
    with Card(size) as card, _flood(card.interface, size):
        card.rate(RECEIVE_QUEUE, seconds / 10)
        return _scaled(card.rate(RECEIVE_QUEUE, seconds), size)


def _veth(size: int, seconds: float) -> float:
    with IPRoute() as route:
        route.link("add", ifname="bench0", kind="veth", peer={"ifname": "bench1"})
        for name in ("bench0", "bench1"):
            route.link("set", index=socket.if_nametoindex(name), state="up")
        try:
            with _flood("bench0", size):
                time.sleep(seconds / 10)
                before, start = _received("bench1"), time.perf_counter()
                time.sleep(seconds)
                after, end = _received("bench1"), time.perf_counter()
        finally:
            route.link("del", index=socket.if_nametoindex("bench0"))
    return _scaled((after - before) / (end - start), size)


@contextmanager
def _flood(interface: str, size: int) -> Iterator[None]:
    """A process that sends frames of `size` bytes on `interface`, as fast as it can."""
    content = b"".join(header_and_frame(size))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        wire.bind((interface, 0))
        pid = os.fork()
        if not pid:
            try:
                while True:
                    try:
                        wire.send(content)
                    except OSError:  # no room in the queue of the interface
                        time.sleep(0)
            finally:
                os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _received(interface: str) -> int:
    """How many frames an interface of this thread's namespace has received."""
    with open("/proc/thread-self/net/dev") as file:
        for line in file:
            name, _, numbers = line.strip().partition(":")
            if name == interface:
                return int(numbers.split()[1])
    raise RuntimeError(f"no interface {interface}")


def _guest_pings(size: int, seconds: float) -> float:
    with guest.running(["16", guest.TEST_GUEST, "--tunnet", HOST_IP, f"quiet net ip {GUEST_IP}"]) as running:
        running.wait_for("net: answering")
        return _pings(size, seconds)


def _veth_pings(size: int, seconds: float) -> float:
    """The same where the other end is a namespace of its own, whose kernel answers."""
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as there, IPRoute() as route:
        route.link("add", ifname="bench0", kind="veth", peer={"ifname": "bench1"})
        ours = socket.if_nametoindex("bench0")
        try:
            route.addr("add", index=ours, address=HOST_IP, prefixlen=24)
            route.link("set", index=ours, state="up")
            _wait_until(lambda: _is_elsewhere(there.pid))
            route.link("set", index=socket.if_nametoindex("bench1"), net_ns_pid=there.pid)
            set_up = f"ip address add {GUEST_IP}/24 dev bench1 && ip link set bench1 up"
            subprocess.run(["nsenter", f"--net=/proc/{there.pid}/ns/net", "sh", "-c", set_up], check=True)
            return _pings(size, seconds)
        finally:
            route.link("del", index=ours)  # with its other end; with its namespace it would go some time later
            there.kill()


def _is_elsewhere(pid: int) -> bool:
    return os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/thread-self/ns/net").st_ino


def _wait_until(predicate: Callable[[], bool]) -> None:
    while not predicate():
        time.sleep(0.001)


def _pings(size: int, seconds: float) -> float:
    """Thousands of pings that are answered per second, with a few under way at once."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.settimeout(_LOST_AFTER)
        icmp.connect((GUEST_IP, 0))
        request = _echo_request(size)
        _first_answer(icmp, request)
        answered, under_way = 0, 0
        start = time.perf_counter()
        end = start + seconds
        while (now := time.perf_counter()) < end:
            while under_way < _WINDOW:
                icmp.send(request)
                under_way += 1
            try:
                icmp.recv(1 << 16)
            except TimeoutError:
                under_way = 0
                continue
            answered += 1
            under_way -= 1
        return answered / (now - start) / 1e3


def _first_answer(icmp: socket.socket, request: bytes) -> None:
    for _ in range(10):
        icmp.send(request)
        try:
            icmp.recv(1 << 16)
        except OSError:
            continue
        return
    raise RuntimeError(f"{GUEST_IP} answers no ping")


def _echo_request(size: int) -> bytes:
    """An ICMP echo request with `size` bytes of zeros (RFC 792); 16 bits of checksum, ones' complement."""
    return struct.pack("!BBHHH", _ICMP_ECHO, 0, 0xFFFF - (_ICMP_ECHO << 8) - 1, 1, 0) + bytes(size)
