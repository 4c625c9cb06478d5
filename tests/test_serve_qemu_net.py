"""Networks that `lgmp serve net` has for QEMU, worked by Linux's own virtio_net and its whole stack."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import HANGS_AFTER, wait_until
from networks import GUEST_IP, HOST_IP, Namespace, namespace, needs
from qemu_guest import Guest, needs_qemu, net
from serving import served
from web_server import WebServer

pytestmark = needs_qemu

MIB = 1 << 20
BULK = 8 * MIB
MTU = 1500
MAC = "02:00:00:00:ab:0c"
# Twice a packet and Ethernet's header: frames that are longer on average were handed over whole, to be cut by nobody.
LARGE = 2 * (MTU + 14)


class Network:
    """A guest whose network ends at a tap, in a namespace of its own, where a web server is as well."""

    def __init__(self, directory: Path, here: Namespace, undo: contextlib.ExitStack) -> None:
        self.here = here
        socket = directory / "net.sock"
        with here.entered():
            self.launched = undo.enter_context(served("net", "--tunnet", HOST_IP, socket=socket))
            self.server = undo.enter_context(WebServer(HOST_IP, os.urandom(BULK)))
        self.guest = undo.enter_context(Guest(net(socket, MAC)))
        self.configure()
        self.guest.ask("httpd -p 80 -h /tmp")

    def configure(self) -> None:
        """Give the guest's interface its address."""
        self.guest.ask(f"ip address add {GUEST_IP}/24 dev eth0 && ip link set eth0 up")

    def url(self, host: str = HOST_IP) -> str:
        """Of the web server."""
        return f"http://{host}:{self.server.server_port}/"

    def statistics(self) -> dict[str, dict[str, int]]:
        """Of the tap: `rx` is what came from the guest, `tx` what went to it."""
        with self.here.entered():
            said = subprocess.run(["ip", "-s", "-j", "link", "show", "tap0"], capture_output=True, check=True).stdout
        found: dict[str, dict[str, int]] = json.loads(said)[0]["stats64"]
        return found

    def mean_size(self, direction: str, before: dict[str, dict[str, int]]) -> float:
        """Of the frames that were handed over since, in bytes."""
        after = self.statistics()
        count, size = (after[direction][what] - before[direction][what] for what in ("packets", "bytes"))
        return size / count

    def fetch(self) -> None:
        """Have the guest get what the server has; fails where it gets anything else."""
        said = self.guest.ask(f"wget -q -O - {self.url()} | md5sum")
        assert said.split()[0] == self.server.checksum

    def send(self) -> None:
        """Have the guest send the server what it has made up; fails where that gets anything else."""
        self.make_up_data()
        # busybox's wget sends text alone.
        request = f"printf 'POST / HTTP/1.0\\r\\nContent-Length: {BULK}\\r\\n\\r\\n'"
        answer = self.guest.ask(f"({request}; cat data) | nc {HOST_IP} {self.server.server_port}")
        assert answer.splitlines()[-1] == self.guest.ask("md5sum <data").split()[0]

    def make_up_data(self) -> None:
        """Have the guest make a file of random bytes."""
        self.guest.ask(f"dd if=/dev/urandom of=data bs=1M count={BULK // MIB} status=none")

    def fetch_from_guest(self) -> None:
        """Get what the guest has made up from a server there; fails where anything else comes."""
        connection = http.client.HTTPConnection(GUEST_IP, 80, timeout=HANGS_AFTER)
        with self.here.entered():
            connection.connect()
        with contextlib.closing(connection):
            connection.request("GET", "/data")
            got = connection.getresponse().read()
        assert hashlib.md5(got).hexdigest() == self.guest.ask("md5sum <data").split()[0]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    needs("ping")
    with namespace() as here:
        with contextlib.ExitStack() as undo:
            yield Network(tmp_path_factory.mktemp("network"), here, undo)
        wait_until(lambda: here.interfaces() == [], "no tap is left")


@pytest.fixture
def guest(network: Network) -> Guest:
    return network.guest


def test_the_guest_has_the_mac_that_qemu_gives_it_and_all_that_is_modern(guest: Guest) -> None:
    assert guest.ask("cat /sys/class/net/eth0/address") == MAC
    features = guest.ask("cat /sys/class/net/eth0/device/features")
    # CSUM, GUEST_CSUM, MAC, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, RING_INDIRECT_DESC, RING_EVENT_IDX, VERSION_1
    modern = {0, 1, 5, 7, 11, 15, 28, 29, 32}
    assert {bit for bit in modern if features[bit] == "1"} == modern, features


# What ping counts is up to its patience with the last answer; it exits with 0 where there was one at all.
@pytest.mark.parametrize("size", [0, 56, 1472, 20000])
def test_both_sides_ping_each_other(network: Network, size: int) -> None:
    network.guest.ask(f"ping -q -c 3 -i 0.1 -s {size} {HOST_IP}")
    said = network.here.ping(GUEST_IP, 3, size)
    assert said.returncode == 0, said


def test_what_the_guest_fetches_is_what_the_host_has_and_comes_in_large_frames(network: Network) -> None:
    before = network.statistics()
    network.fetch()
    assert network.mean_size("tx", before) > LARGE


def test_what_the_guest_sends_is_what_the_host_gets(network: Network) -> None:
    network.send()


def test_what_the_host_fetches_is_what_the_guest_has_and_comes_in_large_frames(network: Network) -> None:
    network.make_up_data()
    before = network.statistics()
    network.fetch_from_guest()
    assert network.mean_size("rx", before) > LARGE


def test_both_sides_fetch_from_each_other_at_once(network: Network) -> None:
    network.make_up_data()
    job = network.guest.start(f"for i in $(seq 3); do wget -q -O - {network.url()} | md5sum; done")
    for _ in range(3):
        network.fetch_from_guest()

    expected = network.server.checksum
    assert job.wait().output.split() == [expected, "-"] * 3


def test_after_its_driver_was_bound_anew_the_network_works_as_before(network: Network) -> None:
    for action in ("unbind", "bind"):
        network.guest.ask(f"echo virtio0 >/sys/bus/virtio/drivers/virtio_net/{action}")
    network.configure()

    network.fetch()
    network.send()


def test_a_guest_that_is_stopped_while_it_fetches_goes_on(network: Network) -> None:
    job = network.guest.start(f"for i in $(seq 3); do wget -q -O - {network.url()} | md5sum; done")
    for _ in range(6):
        with network.guest.stopped():
            pass
        network.guest.ask("usleep 50000")

    expected = network.server.checksum
    assert job.wait().output.split() == [expected, "-"] * 3


def test_the_worker_is_still_the_first_and_has_said_nothing(network: Network) -> None:
    assert len(network.launched.err.text.splitlines()) == 1, network.launched.err.text


def test_a_guest_behind_the_user_mode_stack_reaches_this_machine(tmp_path: Path) -> None:
    needs("passt")
    socket = tmp_path / "net.sock"
    serving = served("net", "--net", "user", socket=socket)
    with WebServer("127.0.0.1", os.urandom(BULK)) as server, serving, Guest(net(socket, MAC)) as guest:
        guest.ask("ip address add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2")
        said = guest.ask(f"wget -q -O - http://10.0.2.2:{server.server_port}/ | md5sum")
        assert said.split()[0] == server.checksum
