"""Networks for tests: namespaces that nobody else sees, wires into them, and a guest whose stack is a kernel's own.

A namespace here has no name: it goes with the last process in it and the last descriptor of it, however a test ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from types import TracebackType

import pytest
from pyroute2 import IPRoute

from lgmp import tap
from lgmp.network import Tap, TapOption, format_mac
from lgmp.testing import PATIENCE, Buffer, Driver, WorkerProcess
from lgmp.virtio.net import HEADER_BYTES, QUEUES, RECEIVE_QUEUE, TRANSMIT_QUEUE

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
# An Ethernet type for experiments (IEEE 802): no stack answers it.
ETH_P_TEST = b"\x88\xb5"
HOST_IP = "192.168.19.1"
GUEST_IP = "192.168.19.2"
GUEST_MAC = bytes.fromhex("020000000001")
OTHER_MAC = bytes.fromhex("020000000099")
# The longest that a tap hands out: a segmented packet of 64 KiB, and Ethernet's 14 bytes.
LONGEST = (1 << 16) + 64

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Namespace:
    """A network namespace with nothing in it but lo, which is up; without IPv6, whose chatter no test wants."""

    def __init__(self) -> None:
        with open("/proc/thread-self/ns/net", "rb") as here:
            _check(_libc.unshare(CLONE_NEWNET))
            try:
                self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                for what in ("all", "default"):
                    with contextlib.suppress(FileNotFoundError):
                        set_sysctl(f"net/ipv6/conf/{what}/disable_ipv6", "1")
                with IPRoute() as route:
                    route.link("set", index=1, state="up")
            finally:
                _check(_libc.setns(here.fileno(), CLONE_NEWNET))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the namespace within, and the processes that it starts are."""
        with open("/proc/thread-self/ns/net", "rb") as here:
            _check(_libc.setns(self._fd, CLONE_NEWNET))
            try:
                yield
            finally:
                _check(_libc.setns(here.fileno(), CLONE_NEWNET))

    def close(self) -> None:
        os.close(self._fd)

    def interfaces(self) -> list[str]:
        """The names of all that is there besides lo."""
        with self.entered():
            return sorted(name for _, name in socket.if_nameindex() if name != "lo")

    def open_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket in the namespace."""
        with self.entered():
            made = socket.socket(family, kind, protocol)
        made.settimeout(PATIENCE)
        return made

    def wire(self, interface: str) -> socket.socket:
        """A raw socket that sends and takes the frames of an interface."""
        made = self.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.bind((interface, ETH_P_ALL))
        return made

    def ping(self, address: str, count: int = 3, size: int = 56, *options: str) -> subprocess.CompletedProcess[str]:
        """What ping says; it exits with 0 where at least one was answered."""
        command = ["ping", "-q", "-n", "-i", "0.2", "-c", str(count), "-s", str(size), "-W", "5", *options, address]
        with self.entered():
            return subprocess.run(command, capture_output=True, text=True, check=False)


def set_sysctl(name: str, value: str) -> None:
    with open(f"/proc/sys/{name}", "w") as file:
        file.write(value)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace; who may not make one does without the test."""
    try:
        made = Namespace()
    except PermissionError:
        pytest.skip("network namespaces and taps take root")
    try:
        yield made
    finally:
        made.close()


def needs(command: str) -> None:
    """Skip where a command is not installed."""
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")


def frame(payload: bytes, to: bytes = GUEST_MAC, sender: bytes = OTHER_MAC) -> bytes:
    """An Ethernet frame that only a test looks at."""
    return to + sender + ETH_P_TEST + payload


def flood(wire: socket.socket, count: int) -> None:
    """Send many frames at once; some kernels say that there is no room for one, others drop it and say nothing."""
    for number in range(count):
        with contextlib.suppress(OSError):
            wire.send(frame(b"%d" % number))


def receive_test_frame(wire: socket.socket) -> bytes:
    """The next frame of a test, whatever else is on the wire."""
    while True:
        got = wire.recv(LONGEST)
        if got[12:14] == ETH_P_TEST:
            return got


class KernelGuest:
    """A guest whose network stack is the kernel's, in a namespace of its own: sockets there are the guest's.

    Its interface is a second tap. A thread is the virtio driver: it moves frames, header and all, between that and the
    rings of a worker process. What the tap may be given and hands out is what the driver accepted as `offloads`.
    """

    RX_BUFFERS = 32
    TX_BUFFERS = 24

    def __init__(
        self,
        here: Namespace,
        worker: WorkerProcess,
        *,
        address: str = f"{GUEST_IP}/24",
        gateway: str | None = None,
        mac: bytes = GUEST_MAC,
        offloads: int = 0,
    ) -> None:
        self._worker = worker
        self._driver = driver = worker.driver
        self._view = driver.memory.view
        with here.entered():
            made = Tap.open(TapOption.parse(address), b"\xfe" + mac[1:])
            self._fd = made.descriptor
            with IPRoute() as route:
                index = socket.if_nametoindex(made.name)
                route.link("set", index=index, state="down")
                route.link("set", index=index, address=format_mac(mac), state="up")
                if gateway is not None:
                    route.route("add", dst="default", gateway=gateway)
        assert made.worker_options[-1] == "--vnet-header"
        tap_offloads(self._fd, offloads)
        self._rx: dict[int, Buffer] = {}
        for _ in range(self.RX_BUFFERS):
            self._add_rx(driver.buffer(HEADER_BYTES + LONGEST, writable=True))
        self._free = [driver.buffer(HEADER_BYTES + LONGEST) for _ in range(self.TX_BUFFERS)]
        self._tx: dict[int, Buffer] = {}
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        worker.kick()
        self._thread.start()

    @staticmethod
    def driver() -> Driver:
        """A driver with room for the buffers of such a guest."""
        return Driver(queues=QUEUES, ram=8 << 20)

    def __enter__(self) -> KernelGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        os.close(self._fd)

    def _add_rx(self, buffer: Buffer) -> None:
        # Two descriptors, as drivers without ANY_LAYOUT have it.
        rest = Buffer(buffer.address + HEADER_BYTES, buffer.size - HEADER_BYTES, True)
        head = self._driver.queues[RECEIVE_QUEUE].add([Buffer(buffer.address, HEADER_BYTES, True), rest])
        self._rx[head] = buffer

    def _run(self) -> None:
        poll = select.poll()
        completions = self._worker.completions
        poll.register(completions.fileno(), select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            poll.register(self._fd, select.POLLIN if self._free else 0)
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._stop in ready:
                return
            if completions.fileno() in ready:
                completions.take()
            for used in self._driver.queues[TRANSMIT_QUEUE].collect():
                self._free.append(self._tx.pop(used.head))
            if self._take_received() | self._send_frames():
                self._worker.kick()

    def _take_received(self) -> bool:
        received = self._driver.queues[RECEIVE_QUEUE].collect()
        for used in received:
            buffer = self._rx.pop(used.head)
            with contextlib.suppress(OSError):  # what the stack does not take
                os.write(self._fd, self._view[buffer.address : buffer.address + used.written])
            self._add_rx(buffer)
        return bool(received)

    def _send_frames(self) -> bool:
        sent = False
        while self._free:
            buffer = self._free[-1]
            try:
                count = os.readv(self._fd, [self._view[buffer.address : buffer.address + buffer.size]])
            except BlockingIOError:
                break
            parts = [Buffer(buffer.address, HEADER_BYTES), Buffer(buffer.address + HEADER_BYTES, count - HEADER_BYTES)]
            self._tx[self._driver.queues[TRANSMIT_QUEUE].add(parts)] = self._free.pop()
            sent = True
        return sent


def tap_offloads(fd: int, offloads: int) -> None:
    """Have a tap hand out what a reader of such offloads (TUN_F_*) can take."""
    fcntl.ioctl(fd, tap.TUNSETOFFLOAD, offloads)
