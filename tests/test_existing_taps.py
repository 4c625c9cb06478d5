"""Taps that somebody else has made, for a guest of another monitor: by their name, or as an open descriptor."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from launching import UNPRIVILEGED
from networks import GUEST_MAC, Namespace, frame, receive_test_frame

from lgmp import network, tap
from lgmp.errors import LgmpError
from lgmp.network import Network, derive_mac, open_existing_tap, parse_mac, tap_of_descriptor
from lgmp.tap import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF
from lgmp.testing import PATIENCE, Driver, Recorder
from lgmp.virtio import net as virtio_net
from lgmp.virtio.ids import VIRTIO_F_VERSION_1
from workers.net import Net, Tap

ALL_OFFLOADS = virtio_net.HOST_OFFLOADS | tap.features_of(tap.OFFLOADS[0])
# linux/if_tun.h
IFF_TUN = 1


def ip(here: Namespace, *commands: str) -> None:
    with here.entered():
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)


def open_tun(here: Namespace, name: str, flags: int) -> int:
    """An open tap or tun, as its opener hands it to others."""
    with here.entered():
        fd = os.open(tap.TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return fd


def check_frames_go_both_ways(here: Namespace, made: Network, interface: str) -> None:
    """Through a device, with a modern driver."""
    with Driver(queues=virtio_net.QUEUES) as driver, here.wire(interface) as wire:
        net = Net(Tap(made.descriptor, has_header="--vnet-header" in made.worker_options))
        net.attach(driver.device_queues("eth0"), Recorder())
        net.accept(1 << VIRTIO_F_VERSION_1 | made.offloads)
        header = virtio_net.MODERN_HEADER_BYTES
        driver.queues[virtio_net.TRANSMIT_QUEUE].add([driver.buffer(bytes(header) + frame(b"out"))])
        buffer = driver.buffer(header + 65550, writable=True)
        driver.queues[virtio_net.RECEIVE_QUEUE].add([buffer])
        net.serve()
        assert receive_test_frame(wire) == frame(b"out")
        wire.send(frame(b"in"))
        assert select.select([made.descriptor], [], [], PATIENCE)[0]
        net.ready(made.descriptor, select.POLLIN)
        (used,) = driver.queues[virtio_net.RECEIVE_QUEUE].collect()
        assert driver.content(buffer)[header : used.written] == frame(b"in")


# By name


@pytest.mark.parametrize("kind", ["", " multi_queue"])
def test_a_tap_by_its_name_serves_and_stays_when_we_go(here: Namespace, kind: str) -> None:
    ip(here, f"tuntap add dev port0 mode tap{kind}", "link set port0 up")
    with here.entered():
        made = open_existing_tap("port0", GUEST_MAC)
    with made:
        assert (made.title, made.mac, made.offloads, made.mtu) == ("port0", GUEST_MAC, ALL_OFFLOADS, 1500)
        assert made.worker_options == ("--tap-fd", str(made.descriptor), "--vnet-header")
        check_frames_go_both_ways(here, made, "port0")
    assert here.interfaces() == ["port0"]


def test_a_guest_of_such_a_tap_has_a_mac_of_its_own_and_is_told_of_an_mtu(here: Namespace) -> None:
    ip(here, "tuntap add dev port0 mode tap", "link set port0 mtu 9000")
    with here.entered(), open_existing_tap("port0") as made:
        assert made.mac == derive_mac(0)
        assert made.mtu == 9000


def test_where_there_is_no_such_tap_it_is_said_how_to_make_it_and_none_is_made(here: Namespace) -> None:
    with here.entered(), pytest.raises(LgmpError) as error:
        open_existing_tap("port0")
    assert str(error.value) == (
        "there is no tap port0: ip tuntap add dev port0 mode tap user $USER && ip link set port0 up makes it, as root"
    )
    assert here.interfaces() == []


@pytest.mark.parametrize("name", ["", ".", "a/b", "much-too-long-name", "has space"])
def test_what_cannot_be_a_name_is_said(name: str) -> None:
    with pytest.raises(LgmpError, match="cannot be the name of a tap; ip tuntap list"):
        open_existing_tap(name)


def test_a_tap_that_another_process_has_is_said_to_be_busy(here: Namespace) -> None:
    ip(here, "tuntap add dev port0 mode tap")
    fd = open_tun(here, "port0", IFF_TAP | IFF_NO_PI)
    with here.entered(), pytest.raises(LgmpError, match="cannot have the tap port0: another process has it open"):
        open_existing_tap("port0")
    os.close(fd)


@pytest.mark.parametrize("name", ["tun0", "lo", "veth0"])
def test_an_interface_that_is_no_tap_is_said_to_be_none(here: Namespace, name: str) -> None:
    ip(here, "tuntap add dev tun0 mode tun", "link add veth0 type veth peer name veth1")
    with here.entered(), pytest.raises(LgmpError, match=f"cannot have the tap {name}: it is not a tap"):
        open_existing_tap(name)


def test_a_tap_of_another_user_is_said_to_be_his(here: Namespace) -> None:
    ip(here, "tuntap add dev port0 mode tap user 65533")
    script = "from lgmp.network import *\ntry: open_existing_tap('port0')\nexcept LgmpError as error: print(error)"
    with here.entered():
        command = [*UNPRIVILEGED, sys.executable, "-c", script]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("cannot have the tap port0: it is another user's: be that user or root, or ")
    assert said.count("\n") == 1


def test_without_tun_in_the_kernel_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tap, "TUN_DEVICE", str(tmp_path / "tun"))
    with pytest.raises(LgmpError, match=r"Failed to open .*tun: No such file or directory; modprobe tun as root"):
        open_existing_tap("lo")


def test_nothing_is_left_open_where_a_tap_cannot_be_had(here: Namespace) -> None:
    ip(here, "tuntap add dev tun0 mode tun")
    before = os.listdir("/proc/self/fd")
    with here.entered(), pytest.raises(LgmpError):
        open_existing_tap("tun0")
    assert os.listdir("/proc/self/fd") == before


# By descriptor


@pytest.mark.parametrize("has_header", [True, False])
def test_an_open_tap_serves(here: Namespace, has_header: bool) -> None:
    fd = open_tun(here, "handed", IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if has_header else 0))
    os.set_inheritable(fd, True)
    ip(here, "link set handed up")
    with tap_of_descriptor(fd, GUEST_MAC) as made:
        assert (made.title, made.mac, made.descriptor) == ("handed", GUEST_MAC, fd)
        assert made.offloads == (ALL_OFFLOADS if has_header else 0)
        assert made.worker_options == ("--tap-fd", str(fd), *(["--vnet-header"] if has_header else []))
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        check_frames_go_both_ways(here, made, "handed")
    assert here.interfaces() == []


def test_a_guest_of_an_open_tap_has_a_mac_of_its_own(here: Namespace) -> None:
    with tap_of_descriptor(open_tun(here, "handed", IFF_TAP | IFF_NO_PI)) as made:
        assert made.mac == derive_mac(0)


def test_a_descriptor_that_is_none_is_said_to_be_not_open() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with pytest.raises(LgmpError, match=f"descriptor {writing} is not open: it has to be inherited"):
        tap_of_descriptor(writing)


def test_a_descriptor_that_is_no_tap_is_said_to_be_none() -> None:
    with open(os.devnull, "r+b") as null, pytest.raises(LgmpError) as error:
        tap_of_descriptor(null.fileno())
    assert str(error.value).endswith("is not a tap: it has to be /dev/net/tun, open for reading and writing")


def test_a_descriptor_that_has_not_become_a_tap_is_said_to_be_none_yet() -> None:
    with open(tap.TUN_DEVICE, "r+b", buffering=0) as tun:
        with pytest.raises(LgmpError, match="but no tap yet: its opener has to call TUNSETIFF"):
            tap_of_descriptor(tun.fileno())
        os.fstat(tun.fileno())  # it is still its opener's


def test_a_tun_has_no_frames_to_serve(here: Namespace) -> None:
    fd = open_tun(here, "other", IFF_TUN | IFF_NO_PI)
    with pytest.raises(LgmpError) as error:
        tap_of_descriptor(fd)
    assert str(error.value) == f"descriptor {fd} is other, a tun, which has no Ethernet: open it with IFF_TAP"
    os.close(fd)


# A MAC address by itself


def test_a_mac_address_is_read_and_what_is_none_is_said_where_it_stood() -> None:
    assert parse_mac("--mac", "2:0:0:0:0:1") == GUEST_MAC
    with pytest.raises(LgmpError, match="--mac: Failed to parse mac address 'x': it is six bytes"):
        parse_mac("--mac", "x")
    with pytest.raises(LgmpError, match="--mac: 01:00:00:00:00:00 is the address of a group"):
        network.parse_mac("--mac", "01:00:00:00:00:00")
