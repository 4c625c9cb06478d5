"""The host's side of network devices: what the command line says of it, taps, bridges, and the user-mode stack."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from launching import UNPRIVILEGED
from networks import GUEST_IP, GUEST_MAC, HOST_IP, KernelGuest, Namespace, namespace, needs

from lgmp import network, tap
from lgmp.errors import LgmpError
from lgmp.network import (
    USER_GUEST,
    USER_HOST,
    Network,
    Tap,
    TapOption,
    UserNetwork,
    UserOption,
    derive_mac,
    format_mac,
    open_network,
)
from lgmp.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN
from lgmp.testing import PATIENCE, WorkerProcess
from lgmp.virtio import net as virtio_net

ALL_OFFLOADS = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
ALL_FEATURES = virtio_net.HOST_OFFLOADS | tap.features_of(ALL_OFFLOADS)
BULK_BYTES = 8 << 20
# How often the answer to that repeats its digest.
ANSWERS = 100_000


@pytest.fixture
def there() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


# The command line


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.168.19.1", "192.168.19.1/24"),
        ("172.16.0.1", "172.16.0.1/16"),
        ("10.1.2.3", "10.1.2.3/8"),
        ("10.1.2.3/29", "10.1.2.3/29"),
        ("10.1.2.3/32", "10.1.2.3/32"),
    ],
)
def test_an_address_without_a_prefix_has_that_of_its_class(text: str, address: str) -> None:
    assert TapOption.parse(text) == TapOption(address=IPv4Interface(address))


def test_a_mac_address_may_follow() -> None:
    assert TapOption.parse("192.168.19.1:2:0:A:b:00:1f").mac == bytes.fromhex("02000a0b001f")
    assert TapOption.parse("10.0.0.1/24:02:00:00:00:00:01") == TapOption(
        address=IPv4Interface("10.0.0.1/24"), mac=GUEST_MAC
    )
    assert TapOption.parse("bridge:br0:02:00:00:00:00:01") == TapOption(bridge="br0", mac=GUEST_MAC)


def test_a_bridge_is_named() -> None:
    assert TapOption.parse("bridge:virbr-1") == TapOption(bridge="virbr-1")


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "192.168.19", "192.168.19.1.1", "192.168.19.256", "192.168.19.-1", "192.168.019.1", "::1"),
        *("192.168.19.1/", "192.168.19.1/33", "192.168.19.1/0", "192.168.19.1/x", "192.168.19.1/255.255.255.0"),
        *("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "192.168.19.0", "192.168.19.255"),
        *("192.168.19.1:", "192.168.19.1:1:2:3:4:5", "192.168.19.1:2:2:3:4:5:6:7", "192.168.19.1:002:2:3:4:5:6"),
        *("192.168.19.1:g:2:3:4:5:6", "192.168.19.1:01:00:00:00:00:00", "192.168.19.1:0:0:0:0:0:0"),
        *("bridge:", "bridge:a/b", "bridge:.", "bridge:has space", "bridge:much-too-long-name", "bridge::2:0:0:0:0:1"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line_that_repeats_it(text: str) -> None:
    with pytest.raises(LgmpError) as error:
        TapOption.parse(text)
    assert str(error.value).startswith(f"--tunnet {text}: ")
    assert "\n" not in str(error.value)


def test_each_device_of_each_launcher_has_a_mac_of_its_own_that_stays() -> None:
    macs = [derive_mac(number) for number in range(3)]
    assert len(set(macs)) == 3
    assert macs == [derive_mac(number) for number in range(3)]
    assert all(mac[0] == 0x02 for mac in macs)  # locally administered, of one
    other = subprocess.run(
        [sys.executable, "-c", "from lgmp.network import *; print(format_mac(derive_mac(0)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() != format_mac(macs[0])


# Taps


def links(here: Namespace) -> str:
    with here.entered():
        return subprocess.run(["ip", "-details", "address"], capture_output=True, text=True, check=True).stdout


def test_a_tap_has_its_address_is_up_and_goes_when_it_is_closed(here: Namespace) -> None:
    with here.entered(), Tap.open(TapOption.parse("192.168.19.1"), GUEST_MAC) as made:
        shown = links(here)
        assert here.interfaces() == [made.name] == ["tap0"]
        assert "inet 192.168.19.1/24 brd 192.168.19.255 scope global tap0" in shown
        assert "UP" in shown
        assert "persist off" in shown
        assert made.title == "tap0 (192.168.19.1/24)"
    assert here.interfaces() == []


def test_a_tap_offers_what_it_takes(here: Namespace) -> None:
    with here.entered(), Tap.open(TapOption.parse("192.168.19.1"), GUEST_MAC) as made:
        assert made.offloads == ALL_FEATURES
        assert made.worker_options == ("--tap-fd", str(made.descriptor), "--vnet-header")


def test_the_tap_itself_has_another_mac_than_the_guest_high_up(here: Namespace) -> None:
    with here.entered():
        with Tap.open(TapOption.parse("192.168.19.1"), GUEST_MAC):
            assert f"link/ether fe{format_mac(GUEST_MAC)[2:]}" in links(here)
        with Tap.open(TapOption.parse("192.168.19.1"), b"\xfe" + GUEST_MAC[1:]):
            assert f"link/ether fa{format_mac(GUEST_MAC)[2:]}" in links(here)


def test_a_tap_joins_its_bridge_and_leaves_it_when_it_is_closed(here: Namespace) -> None:
    with here.entered():
        subprocess.run("ip link add br0 type bridge && ip link set br0 up", shell=True, check=True)
        with Tap.open(TapOption.parse("bridge:br0"), GUEST_MAC) as made:
            assert f"{made.name}: <BROADCAST,MULTICAST,UP,LOWER_UP>" in links(here)
            assert "master br0" in links(here)
            assert made.title == "tap0 (bridge br0)"
        assert here.interfaces() == ["br0"]


@pytest.mark.parametrize(
    ("bridge", "complaint"),
    [
        ("br0", "can't add tap0 to bridge br0: there is none; ip link add br0 type bridge && ip link set br0 up"),
        ("lo", "can't add tap0 to bridge lo: it is not a bridge; ip link show type bridge lists"),
    ],
)
def test_what_is_no_bridge_is_said_and_no_tap_is_left(here: Namespace, bridge: str, complaint: str) -> None:
    with here.entered(), pytest.raises(LgmpError, match="bridge") as error:
        Tap.open(TapOption(bridge=bridge), GUEST_MAC)
    assert str(error.value).startswith(complaint)
    assert here.interfaces() == []


def test_without_tun_in_the_kernel_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tap, "TUN_DEVICE", str(tmp_path / "tun"))
    with pytest.raises(
        LgmpError, match=r"Failed to open .*tun: No such file or directory; modprobe tun as root .*--net user"
    ):
        Tap.open(TapOption.parse("192.168.19.1"), GUEST_MAC)


def test_a_device_that_is_no_tun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "TUN_DEVICE", "/dev/null")
    with pytest.raises(LgmpError, match="configuring /dev/null: "):
        Tap.open(TapOption.parse("192.168.19.1"), GUEST_MAC)


def test_who_may_make_no_tap_is_told_what_to_do() -> None:
    script = (
        "from lgmp.network import *\n"
        "try: open_network(TapOption.parse('192.168.19.1'), 0)\n"
        "except LgmpError as error: print(error)"
    )
    command = [*UNPRIVILEGED, sys.executable, "-c", script]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.match("Failed to open /dev/net/tun: |configuring /dev/net/tun: ", said)
    assert said.endswith("be root, or use --net user, which needs no rights\n")
    assert said.count("\n") == 1


# Through a worker, to a kernel's own stack: what comes out is what went in


class Wired:
    """A worker process on a network, and a guest behind it that has the kernel's stack."""

    def __init__(self, made: Network, offloads: int, stack: ExitStack) -> None:
        driver = KernelGuest.driver()
        stack.callback(driver.close)
        features = ALL_FEATURES if offloads else 0
        self.worker = stack.enter_context(
            WorkerProcess(
                "workers.net",
                driver,
                [*made.worker_options, "--", made.title],
                name="eth0",
                pass_fds=[made.descriptor],
                features=features,
            )
        ).ready()


@pytest.fixture(params=[ALL_OFFLOADS, 0], ids=["with offloads", "without offloads"])
def tapped(request: pytest.FixtureRequest, here: Namespace, there: Namespace) -> Iterator[WorkerProcess]:
    """`here` is the host, 192.168.19.1, `there` the guest, 192.168.19.2, a worker and a tap between them."""
    with ExitStack() as stack:
        with here.entered():
            made = stack.enter_context(Tap.open(TapOption.parse(HOST_IP), GUEST_MAC))
        wired = Wired(made, request.param, stack)
        stack.enter_context(KernelGuest(there, wired.worker, offloads=request.param))
        yield wired.worker


def in_thread(work: Callable[[], bytes]) -> Callable[[], bytes]:
    """Begin `work`; gives what waits for its result."""
    results: list[bytes] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()

    def join() -> bytes:
        thread.join(PATIENCE * 2)
        assert results, "it has not come to an end"
        return results[0]

    return join


def read_to_end(connection: socket.socket, count: int = 1 << 40) -> bytes:
    """The digest of all that comes, or of `count` bytes."""
    digest = hashlib.sha256()
    while count and (chunk := connection.recv(min(count, 1 << 20))):
        digest.update(chunk)
        count -= len(chunk)
    return digest.digest()


def transfer(sender: Namespace, receiver: Namespace, address: str) -> None:
    """A TCP connection from one to the other carries bulk whose checksum is the same on both sides."""
    content = os.urandom(1 << 20) * (BULK_BYTES >> 20)
    with receiver.open_socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        listener.settimeout(PATIENCE)

        def receive() -> bytes:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(PATIENCE)
                return read_to_end(connection)

        received = in_thread(receive)
        with sender.open_socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.connect((address, port))
            connection.sendall(content)
        assert received() == hashlib.sha256(content).digest()


def test_tcp_carries_bulk_to_the_guest(tapped: WorkerProcess, here: Namespace, there: Namespace) -> None:
    transfer(here, there, GUEST_IP)


def test_tcp_carries_bulk_from_the_guest(tapped: WorkerProcess, here: Namespace, there: Namespace) -> None:
    transfer(there, here, HOST_IP)


def test_tcp_carries_bulk_in_both_directions_at_once(tapped: WorkerProcess, here: Namespace, there: Namespace) -> None:
    def other_way() -> bytes:
        transfer(there, here, HOST_IP)
        return b"done"

    done = in_thread(other_way)
    transfer(here, there, GUEST_IP)
    assert done() == b"done"


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 9000, 65507])
def test_datagrams_of_any_size_come_whole_in_both_directions(
    tapped: WorkerProcess, here: Namespace, there: Namespace, size: int
) -> None:
    content = os.urandom(size)
    with (
        there.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as guest,
        here.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as host,
    ):
        guest.bind((GUEST_IP, 0))
        host.sendto(content, guest.getsockname())
        got, sender = guest.recvfrom(1 << 17)
        assert got == content
        guest.sendto(content[::-1], sender)
        assert host.recv(1 << 17) == content[::-1]


def test_a_reset_under_load_and_the_network_works_again(here: Namespace, there: Namespace) -> None:
    with ExitStack() as stack:
        with here.entered():
            made = stack.enter_context(Tap.open(TapOption.parse(HOST_IP), GUEST_MAC))
        worker = Wired(made, ALL_OFFLOADS, stack).worker
        stop = threading.Event()

        def flood() -> bytes:
            with here.wire(made.name) as wire:
                while not stop.is_set():
                    wire.send(GUEST_MAC + bytes(6) + b"\x88\xb5" + bytes(100))
            return b""

        flooded = in_thread(flood)
        try:
            for _ in range(5):
                for _ in range(30):
                    worker.driver.queues[0].add(
                        [worker.driver.buffer(10, writable=True), worker.driver.buffer(1514, writable=True)]
                    )
                worker.kick()
                worker.collect(30)
                worker.reset()
                worker.driver.forget()
        finally:
            stop.set()
            flooded()
        worker.reset()
        worker.features = 0
        with KernelGuest(there, worker):
            transfer(there, here, HOST_IP)


# The user-mode stack


@pytest.fixture
def user_network() -> Iterator[UserNetwork]:
    needs("passt")
    made = UserNetwork.start(GUEST_MAC)
    with made:
        yield made


def test_the_user_mode_stack_ends_with_its_device(user_network: UserNetwork) -> None:
    assert user_network.process.poll() is None
    user_network.close()
    assert user_network.process.returncode is not None


def test_with_the_user_mode_stack_the_guest_reaches_this_machine_and_is_answered(
    there: Namespace, user_network: UserNetwork
) -> None:
    with ExitStack() as stack:
        worker = Wired(user_network, 0, stack).worker
        stack.enter_context(KernelGuest(there, worker, address=str(USER_GUEST), gateway=str(USER_HOST)))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE)

        def serve() -> bytes:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(PATIENCE)
                # A count, and not the end, in both directions: passt of Debian 12 stalls where one end has closed and
                # the other goes on, and an end that comes while it sends things once more is forgotten, or comes
                # before the last byte.
                digest = read_to_end(connection, BULK_BYTES)
                connection.sendall(digest * ANSWERS)
                assert connection.recv(1) == b"."
                return digest

        served = in_thread(serve)
        content = os.urandom(BULK_BYTES)
        with there.open_socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.connect((str(USER_HOST), listener.getsockname()[1]))
            connection.sendall(content)
            digest = hashlib.sha256(content).digest()
            assert read_to_end(connection, len(digest) * ANSWERS) == hashlib.sha256(digest * ANSWERS).digest()
            connection.sendall(b".")
            assert served() == digest


def test_where_there_is_no_way_out_the_user_mode_stack_reaches_this_machine_alone(here: Namespace) -> None:
    needs("passt")
    with here.entered(), open_network(UserOption(), 0) as made:
        assert made.title == "user-mode network (10.0.2.15)"
        assert made.mac == derive_mac(0)


def test_without_passt_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LgmpError, match="passt, which is not installed: apt-get install passt"):
        UserNetwork.start(GUEST_MAC)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo it is broken >&2; exit 1", "cannot start: it is broken"),
        ("exit 0", "cannot start: it does not answer"),
        ("echo Failed to send 8 bytes to syslog >&2; echo one >&2; echo two >&2", "cannot start: one; two"),
    ],
)
def test_a_user_mode_stack_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, complaint: str
) -> None:
    false = tmp_path / "passt"
    false.write_text(f"#!/bin/sh\n{script}\n")
    false.chmod(0o755)
    monkeypatch.setattr(network, "PASST", str(false))
    with pytest.raises(LgmpError, match=complaint):
        UserNetwork.start(GUEST_MAC)
