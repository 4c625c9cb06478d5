"""Networks and random bytes of whole guests: the test guest pings and is pinged, over taps, bridges and passt."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import (
    GUEST,
    UNPRIVILEGED,
    Launch,
    launch,
    lines_of,
    make_disk,
    prompt,
    run,
    session_processes,
    wait_until,
)
from networks import GUEST_IP, HOST_IP, Namespace, flood, namespace, needs

pytestmark = pytest.mark.every_host

TAP = ("--tunnet", HOST_IP)


@pytest.fixture
def here() -> Iterator[Namespace]:
    with namespace() as made:
        yield made
        wait_until(lambda: not any(name.startswith("tap") for name in made.interfaces()), "no tap is left")


@pytest.fixture
def bridge(here: Namespace) -> str:
    with here.entered():
        subprocess.run(
            f"ip link add br0 type bridge && ip address add {HOST_IP}/24 dev br0 && ip link set br0 up",
            shell=True,
            check=True,
        )
    return "br0"


def answered(output: str, address: str) -> str:
    """What the guest says at the end of a ping."""
    found = re.search(rf"net ping {re.escape(address)}: (\d+ of \d+) answered", output)
    assert found, output
    return found[1]


# Pings


@pytest.mark.parametrize("size", [56, 1472])
def test_the_guest_pings_the_host(here: Namespace, size: int) -> None:
    with here.entered():
        code, output, errors = run(f"quiet net addr {GUEST_IP}; net ping {HOST_IP} 5 {size}; poweroff", *TAP)
    assert (code, answered(output, HOST_IP)) == (0, "5 of 5"), errors


@pytest.mark.parametrize("size", [56, 1472])
def test_the_host_pings_the_guest(here: Namespace, size: int) -> None:
    needs("ping")
    with here.entered(), launch(f"quiet net ip {GUEST_IP}", *TAP) as guest:
        guest.out.wait_for("net: answering")
        said = here.ping(GUEST_IP, 5, size)
        assert "5 packets transmitted, 5 received" in said.stdout, said
        guest.send("x")
        guest.out.wait_for("errors 0")
        guest.send("poweroff\n")
        assert guest.end()[0] == 0


def test_the_guest_has_the_mac_that_was_chosen(here: Namespace) -> None:
    with here.entered():
        _, output, _ = run("quiet net addr 1.2.3.4; poweroff", "--tunnet", f"{HOST_IP}:2:0:0:0:ab:c")
    assert "net0: mac 02:00:00:00:ab:0c" in output


def test_polling_drivers_get_their_frames_as_well(here: Namespace) -> None:
    with here.entered():
        _, output, _ = run(f"quiet poll noindirect net addr {GUEST_IP}; net ping {HOST_IP} 3; poweroff", *TAP)
    assert answered(output, HOST_IP) == "3 of 3"


def test_two_guests_on_a_bridge_talk_to_each_other_and_to_the_host(here: Namespace, bridge: str) -> None:
    needs("ping")
    option = ("--tunnet", f"bridge:{bridge}")
    with here.entered(), launch("quiet net ip 192.168.19.3", *option) as first:
        first.out.wait_for("net: answering")
        code, output, _ = run(
            f"quiet net addr {GUEST_IP}; net ping 192.168.19.3 5; net ping {HOST_IP} 5; poweroff", *option
        )
        assert code == 0
        assert answered(output, "192.168.19.3") == "5 of 5"
        assert answered(output, HOST_IP) == "5 of 5"
        assert "5 packets transmitted, 5 received" in here.ping("192.168.19.3", 5).stdout
        first.send("xpoweroff\n")
        assert first.end()[0] == 0


def test_a_guest_with_two_networks_reaches_both(here: Namespace) -> None:
    with here.entered():
        _, output, _ = run(
            f"quiet net -d 0 addr {GUEST_IP}; net -d 1 addr 192.168.20.2; net -d 1 ping 192.168.20.1 3; "
            f"net -d 0 ping {HOST_IP} 3; poweroff",
            *TAP,
            "--tunnet",
            "192.168.20.1",
        )
    assert answered(output, "192.168.20.1") == "3 of 3"
    assert answered(output, HOST_IP) == "3 of 3"


# Frames that are too many or too long


def test_frames_longer_than_the_guests_buffers_are_dropped_whole_and_others_come(here: Namespace) -> None:
    needs("ping")
    with here.entered(), launch(f"quiet net ip {GUEST_IP}", *TAP) as guest:
        guest.out.wait_for("net: answering")
        assert here.ping(GUEST_IP, 1).returncode == 0
        subprocess.run(["ip", "link", "set", "tap0", "mtu", "9000"], check=True)
        assert "0 received" in here.ping(GUEST_IP, 3, 8000, "-M", "do", "-W", "1").stdout
        guest.err.wait_for("eth0: a frame is longer than the guest's buffer of 1528 bytes, dropped")
        assert "3 received" in here.ping(GUEST_IP, 3, 1472).stdout
        guest.send("x")
        guest.out.wait_for("pings 4 errors 0")


def test_after_a_flood_while_it_slept_the_guest_is_reached_again(here: Namespace) -> None:
    needs("ping")
    with here.entered(), prompt(*TAP) as guest:
        guest.command(f"net addr {GUEST_IP}")  # from now on it has a driver, which does not look
        with here.wire("tap0") as wire:
            flood(wire, 20000)
        guest.send(f"net ip {GUEST_IP}\n")
        guest.out.wait_for("net: answering")
        said = here.ping(GUEST_IP, 5)
        assert "5 received" in said.stdout, said
        guest.send("x")
        guest.out.wait_for("pings 5 errors 0")


# Beginning and end


def test_devices_have_the_order_of_the_command_line_across_kinds(here: Namespace, tmp_path: Path) -> None:
    disk = str(make_disk(tmp_path / "disk"))
    options = ["--rng", "--block", disk, *TAP, "--block", f"{disk},ro", "--tunnet", "192.168.20.1", "--rng=/dev/zero"]
    with here.entered():
        _, output, errors = run("quiet devices; poweroff", "--verbose", *options)
    assert re.findall(r"device \d+: type \d+ \((\w+)\)", output) == [
        *("rng0", "block0", "net0", "block1", "net1", "rng1", "console0")
    ]
    named = ["rng0", "vda", "eth0", "vdb", "eth1", "rng1", "console"]
    assert re.findall(r"device \d+: (\w+) type=\w+ pid=", errors) == named


def test_a_worker_says_in_ps_which_network_it_serves(here: Namespace) -> None:
    with here.entered(), prompt(*TAP, "--rng") as guest:
        titles = [line.partition(" (guest")[0] for line in session_processes(guest.session).values()]
        assert f"lgmp-net eth0 tap0 ({HOST_IP}/24)" in titles
        assert "lgmp-rng rng0 /dev/urandom" in titles


def test_a_tap_outlives_its_worker_and_the_guest_pings_on(here: Namespace) -> None:
    with here.entered(), prompt(*TAP) as guest:
        guest.command(f"net addr {GUEST_IP}")
        os.kill(guest.workers()["eth0"], signal.SIGKILL)
        guest.err.wait_for("started again")
        guest.command(f"net ping {HOST_IP} 2")
        assert here.interfaces() == ["tap0"]
    assert answered(guest.out.text, HOST_IP) == "2 of 2"


def test_after_a_reboot_the_network_works_with_the_same_mac(here: Namespace) -> None:
    with here.entered(), prompt(*TAP) as guest:
        guest.command(f"net addr {GUEST_IP}")
        guest.command(f"net ping {HOST_IP} 2")
        guest.send("reboot\n")
        guest.out.wait_for("test> ", 4)
        guest.command(f"net addr {GUEST_IP}")
        guest.command(f"net ping {HOST_IP} 2")
        guest.send("poweroff\n")
        code, output, _ = guest.end()
    assert code == 0
    macs = re.findall(r"net0: mac (\S+)", output)
    assert len(macs) == 2
    assert macs[0] == macs[1]
    assert output.count("2 of 2 answered") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_the_launcher_ends_no_tap_is_left(here: Namespace, number: int) -> None:
    with here.entered(), prompt(*TAP) as guest:
        assert here.interfaces() == ["tap0"]
        guest.signal(number)
        guest.wait()
        guest.wait_until_nothing_is_left()
        wait_until(lambda: here.interfaces() == [], "the tap is gone")


def test_a_guest_whose_tap_is_deleted_lives_on(here: Namespace) -> None:
    with here.entered(), prompt(*TAP) as guest:
        guest.command(f"net addr {GUEST_IP}")
        subprocess.run(["ip", "link", "del", "tap0"], check=True)
        guest.err.wait_for("eth0: its network is gone")
        guest.command(f"net ping {HOST_IP} 1")
        assert answered(guest.out.text, HOST_IP) == "0 of 1"
        guest.send("poweroff\n")
        assert guest.end()[0] == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tunnet", "192.168.19"], "lgmp: --tunnet 192.168.19: "),
        (
            ["--tunnet", "192.168.19.1:no"],
            "lgmp: --tunnet 192.168.19.1:no: Failed to parse mac address 'no'",
        ),
        (
            ["--tunnet", "bridge:none"],
            "lgmp: can't add tap0 to bridge none: there is none; ip link add none type bridge",
        ),
        (["--tunnet", "bridge:lo"], "lgmp: can't add tap0 to bridge lo: it is not a bridge"),
        (["--net", "tap"], "lgmp: --net tap: there is --net user"),
        (["--rng=/nonexistent"], "lgmp: Failed to open /nonexistent: No such file or directory"),
        (["--rng=/"], "lgmp: / is a directory"),
    ],
)
def test_what_cannot_be_is_one_line(here: Namespace, options: list[str], complaint: str) -> None:
    with here.entered():
        code, output, errors = run("quiet poweroff", *options)
    assert (code, output) == (1, "")
    assert errors.startswith(complaint)
    assert len(lines_of(errors)) == 1


# Entropy


def test_the_guest_reads_random_bytes() -> None:
    code, output, _ = run("quiet rng read 20000; poweroff", "--rng")
    assert code == 0
    (bits,) = re.findall(r"rng read: 20000 bytes in \d+ buffers, checksum \w+, (\d+) of 160000 bits set", output)
    assert 78000 < int(bits) < 82000  # ten times the standard deviation of 200


def test_what_follows_rng_is_no_file_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\xff" * 1000)
    _, output, errors = run("quiet rng read 100; poweroff", f"--rng={source}")
    assert "800 of 800 bits set" in output, errors
    with Launch("run", "--rng", "16", GUEST, "--", "quiet rng read 100; poweroff") as guest:
        assert guest.end()[0] == 0


def test_at_the_end_of_the_source_the_guest_waits_and_can_be_ended(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(50))
    with launch("quiet rng read 100", f"--rng={source}") as guest:
        guest.err.wait_for(f"rng0: {source} has come to its end; the guest gets no more random bytes from it")
        guest.signal(signal.SIGTERM)
        assert guest.end()[0] == 128 + signal.SIGTERM


# Without root


def test_an_ordinary_user_is_told_what_serves_without_root() -> None:
    code, _, errors = run("quiet poweroff", *TAP, prefix=UNPRIVILEGED)
    assert code == 1
    assert re.match("lgmp: (Failed to open|configuring) /dev/net/tun: ", errors)
    assert errors.endswith("be root, or use --net user, which needs no rights\n")


def test_an_ordinary_user_has_a_network_with_net_user_and_nothing_is_left_of_it() -> None:
    needs("passt")
    with prompt("--net", "user", prefix=UNPRIVILEGED) as guest:
        assert any(line.startswith("passt") for line in session_processes(guest.session).values())
        guest.command("net addr 10.0.2.15")
        guest.command("net ping 10.0.2.2 1")  # whether it is answered is up to the system; that there is ARP is not
        assert "no ARP answer" not in guest.out.text
        guest.send("poweroff\n")
        assert guest.end()[0] == 0


def test_the_user_mode_stack_ends_with_a_launcher_that_is_killed() -> None:
    needs("passt")
    with prompt("--net", "user") as guest:
        guest.signal(signal.SIGKILL)
        guest.wait_until_nothing_is_left()


def test_a_guest_whose_user_mode_stack_dies_lives_on() -> None:
    needs("passt")
    with prompt("--net", "user") as guest:
        guest.command("net addr 10.0.2.15")
        (stack,) = [pid for pid, line in session_processes(guest.session).items() if line.startswith("passt")]
        subprocess.run(["kill", "-9", str(stack)], check=True)
        guest.err.wait_for("eth0: its network is gone")
        guest.send("poweroff\n")
        assert guest.end()[0] == 0


def test_the_guests_frames_are_on_the_wire_as_it_sent_them(here: Namespace) -> None:
    with here.entered(), prompt(*TAP) as guest, here.wire("tap0") as wire:
        guest.send(f"net ping {HOST_IP} 1 100\n")
        while True:
            got = wire.recv(2000)
            if got[12:14] == b"\x08\x00" and got[34] == 8:  # an echo request
                break
        assert got[42:142] == bytes(range(100))
        assert got[30:34] == socket.inet_aton(HOST_IP)
