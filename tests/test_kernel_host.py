"""Guests on /dev/lguest: what is said to it, byte by byte and by whom, and what becomes of everything it may answer.

The device is a stand-in (lguest_device/), as strict as the real one. That guests and their devices do the same there as
on the embedded host is for the tests marked every_host to show.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, make_disk, run, wait_until
from lguest_device.log import Request
from lguest_devices import (
    DEVICE_ERAS,
    GUESTS_OF,
    LguestDevice,
    host_options,
    needs_lguest_device,
    on_a_machine_with,
)

from lgmp.hosts.kernel.protocol import WORD_BYTES

pytestmark = needs_lguest_device

PAGE = 4096
RAM = int(MEM) << 20
ENTRY = 0x100000
# The devices of a guest with one disk: the disk's ring, the console's two, each of two pages above the descriptor page.
VDA, CONSOLE_IN, CONSOLE_OUT = RAM + PAGE, RAM + 3 * PAGE, RAM + 5 * PAGE
GUEST_LIMIT = RAM + 7 * PAGE
# linux/lguest_launcher.h
LHREQ_INITIALIZE, LHREQ_IRQ, LHREQ_BREAK, LHREQ_EVENTFD = 0, 2, 3, 4

every_era = pytest.mark.parametrize("era", DEVICE_ERAS)


def words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(WORD_BYTES, "little") for number in numbers)


def request_of(request: Request) -> int:
    return int.from_bytes(request.sent[:WORD_BYTES], "little")


def written(device: LguestDevice, kind: int) -> list[Request]:
    """What was written of one kind of request."""
    return [each for each in device.requests("write") if request_of(each) == kind]


def commands(era: str, text: str) -> str:
    return f"abi={GUESTS_OF[era]} {text}"


def run_on(device: LguestDevice, era: str, text: str, *more: str) -> tuple[int, str, str]:
    return run(commands(era, text), *host_options(device, era), *more)


def mapping(pid: int, descriptor_path: str) -> list[int]:
    """Where a process has mapped a file, by what /proc calls it."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [int(line.partition("-")[0], 16) for line in lines if descriptor_path in line]


# What is said


@every_era
def test_a_guest_is_made_of_its_memory_its_pages_and_its_start(era: str, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with LguestDevice(era) as device:
        with Launch(
            *("run", MEM, GUEST, "--block", str(disk), *host_options(device, era), "--", commands(era, "quiet"))
        ) as launched:
            launched.wait_until_ready()
            (base,) = mapping(launched.pid, "lgmp-guest")
            launched.send("poweroff\n")
            assert launched.end()[0] == 0

        opened, made = device.requests()[:2]
        assert (opened.operation, opened.error) == ("open", None)
        pages = GUEST_LIMIT // PAGE
        if era == "2.6.25":
            # 16 MiB take four page tables, below the directory in the topmost page of RAM.
            assert made.sent == words(LHREQ_INITIALIZE, base, pages, RAM - PAGE, ENTRY)
            assert made.result == 4 * WORD_BYTES
        else:
            assert made.sent == words(LHREQ_INITIALIZE, base, pages, ENTRY)
            assert made.result == 3 * WORD_BYTES
        assert written(device, LHREQ_INITIALIZE) == [made]


@every_era
def test_all_calls_are_about_cpu_0(era: str) -> None:
    with LguestDevice(era) as device:
        assert run_on(device, era, "quiet echo hello; poweroff")[0] == 0

        assert {each.offset for each in device.requests()} == {0}


def test_from_2_6_31_on_each_queue_has_an_eventfd_before_the_guest_runs(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with LguestDevice("2.6.31") as device:
        assert run_on(device, "2.6.31", "quiet poweroff", "--block", str(disk))[0] == 0

        requests = device.requests("write", "read")
        before = requests[: [each.operation for each in requests].index("read")]
        connected = [each for each in before if request_of(each) == LHREQ_EVENTFD]
        assert [each.sent[WORD_BYTES : 2 * WORD_BYTES] for each in connected] == [
            words(VDA),
            words(CONSOLE_IN),
            words(CONSOLE_OUT),
        ]
        assert {len(each.sent) for each in connected} == {3 * WORD_BYTES}
        assert {each.result for each in connected} == {0}
        assert written(device, LHREQ_EVENTFD) == connected
        assert written(device, LHREQ_BREAK) == []


def test_a_kick_by_eventfd_does_not_wake_the_launcher(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with LguestDevice("2.6.31") as device:
        with Launch(
            *("run", MEM, GUEST, "--block", str(disk), *host_options(device, "2.6.31"), "--", "quiet blk crc"),
        ) as launched:
            launched.wait_until_ready()
            reads = len(device.requests("read"))
            for _ in range(5):
                launched.command("blk crc")
            assert len(device.requests("read")) == reads
            launched.send("poweroff\n")
            assert launched.end()[0] == 0

        irqs = written(device, LHREQ_IRQ)
        assert {each.sent for each in irqs} <= {words(LHREQ_IRQ, number) for number in (1, 2, 3)}
        assert words(LHREQ_IRQ, 1) in {each.sent for each in irqs}
        assert {each.error for each in irqs} <= {None, "ENOENT"}


def test_from_2_6_31_on_interrupts_come_from_a_thread_that_does_not_run_the_guest(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with LguestDevice("2.6.31") as device:
        assert run_on(device, "2.6.31", "quiet blk crc; poweroff", "--block", str(disk))[0] == 0

        owner = device.requests("open")[0].thread
        assert {each.thread for each in device.requests("read")} == {owner}
        assert owner not in {each.thread for each in written(device, LHREQ_IRQ)}


with_breaks = pytest.mark.parametrize("era", ["2.6.25", "2.6.30"])


def type_at_its_prompt(device: LguestDevice, era: str) -> None:
    """Have a guest do what it does only once it is got out of its sleep: a disk may be done before it sleeps."""
    with Launch("run", MEM, GUEST, *host_options(device, era), "--", commands(era, "quiet")) as launched:
        launched.wait_until_ready()
        for number in range(10):
            launched.command(f"echo {number}")
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


@with_breaks
def test_to_2_6_30_another_thread_breaks_the_owner_out_who_then_sends_the_interrupt(era: str) -> None:
    with LguestDevice(era) as device:
        type_at_its_prompt(device, era)

        owner = device.requests("open")[0].thread
        breaks = written(device, LHREQ_BREAK)
        on = [each for each in breaks if each.sent == words(LHREQ_BREAK, 1)]
        off = [each for each in breaks if each.sent == words(LHREQ_BREAK, 0)]
        assert on and len(on) + len(off) == len(breaks)
        assert owner not in {each.thread for each in on}
        assert {each.thread for each in off} == {owner}
        assert {each.thread for each in written(device, LHREQ_IRQ)} == {owner}
        assert {each.thread for each in device.requests("read")} == {owner}
        log = device.requests("read", "write")
        death = next(at for at, each in enumerate(log) if each.operation == "read" and each.error == "ENOENT")
        assert {each.error for each in log[:death] if each in breaks} == {None}
        # Who breaks into a guest that dies just then waits for its owner in vain, until a signal ends that.
        assert {each.error for each in breaks} <= {None, "ENOENT", "EINTR"}
        assert written(device, LHREQ_EVENTFD) == []


@with_breaks
def test_to_2_6_30_a_read_that_was_broken_is_followed_by_break_0_and_nothing_else(era: str) -> None:
    with LguestDevice(era) as device:
        type_at_its_prompt(device, era)

        owner = device.requests("open")[0].thread
        owners = [each for each in device.requests("read", "write") if each.thread == owner]
        after = [owners[at + 1] for at, each in enumerate(owners) if each.error == "EAGAIN"]
        assert after
        assert {each.sent for each in after} == {words(LHREQ_BREAK, 0)}


@every_era
def test_the_reason_of_a_death_is_read_once_after_enoent(era: str) -> None:
    with LguestDevice(era) as device:
        code, _out, err = run_on(device, era, "quiet crash oh dear")

        assert (code, err) == (1, "lgmp: CRASH: oh dear\n")
        died, reason = device.requests("read")[-2:]
        assert (died.error, reason.got) == ("ENOENT", b"CRASH: oh dear\0")
        assert reason.size > len(b"CRASH: oh dear\0")


@every_era
def test_a_launcher_that_is_killed_gives_its_guest_back(era: str, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with LguestDevice(era) as device:
        words = ("run", MEM, GUEST, "--block", str(disk), *host_options(device, era), "--", commands(era, "quiet"))
        with Launch(*words) as launched:
            launched.wait_until_ready()
            launched.signal(signal.SIGKILL)
            assert launched.wait() == -signal.SIGKILL
            launched.wait_until_nothing_is_left()

        wait_until(lambda: len(device.requests("release")) == 1, "the device released")


@every_era
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("text", "shown"), [("quiet", "test> "), ("quiet misdeed deaf", "misdeed deaf")], ids=["halted", "busy"]
)
def test_a_signal_gets_the_owner_out_of_its_read(era: str, number: signal.Signals, text: str, shown: str) -> None:
    with LguestDevice(era) as device:
        with Launch("run", MEM, GUEST, *host_options(device, era), "--", commands(era, text)) as launched:
            launched.out.wait_for(shown)
            launched.signal(number)
            code, _out, err = launched.end()

        assert (code, err) == (128 + number, "")


def test_a_lost_signal_is_sent_again() -> None:
    # The read goes on after the first two, as if they had come just before it.
    with LguestDevice("2.6.31", inject=["read:EINTR@1", "read:EINTR@2", "read:EINTR@4"]) as device:
        with Launch("run", MEM, GUEST, *host_options(device, "2.6.31"), "--", "quiet") as launched:
            launched.out.wait_for("test> ")
            launched.signal(signal.SIGTERM)
            code, _out, err = launched.end()

        assert (code, err) == (128 + signal.SIGTERM, "")
        assert "EINTR" in {each.error for each in device.requests("read")}


# What it answers


def test_without_eventfds_kicks_go_through_the_launcher(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", 256)

    with LguestDevice("2.6.31", inject=["write:EVENTFD:EINVAL"]) as device:
        code, out, err = run_on(device, "2.6.31", "selfcheck disk; poweroff", "-v", "--block", str(disk))

        assert code == 0, out + err
        assert "SELF-CHECK PASSED" in out
        assert "vda kicks=launcher" in err
        assert words(VDA) in {each.got for each in device.requests("read")}


def test_how_kicks_go_is_told_with_verbose() -> None:
    with LguestDevice("2.6.31") as device:
        code, _out, err = run_on(device, "2.6.31", "quiet poweroff", "-v")

    assert code == 0
    assert "lgmp: device 0: console kicks=eventfd\n" in err
    assert " host=kernel abi=3.x\n" in err


REFUSED = {
    "open:EACCES": r"cannot open {path}: Permission denied; be root, or .* or use --host embedded",
    "open:EPERM": r"cannot open {path}: Operation not permitted; be root, .*",
    "open:EBUSY": r"cannot open {path}: Device or resource busy; try --host embedded, which needs none",
    "open:ENODEV": r"cannot open {path}: No such device; 32-bit kernels .* `modprobe lg`; --host embedded needs none",
    "write:INITIALIZE:EINVAL": r"{path} does not take a guest: Invalid argument \(EINVAL\) for INITIALIZE with {count} "
    r"words of \d bytes, as Linux {kernels} have it \(base 0x[0-9a-f]+, 4101 pages, start 0x100000\); "
    r"try --lguest-abi for another era's, or --host embedded",
    "write:INITIALIZE:EPERM": r"{path} does not take a guest: .*\(EPERM\) .*; be root, or try --host embedded",
    "write:INITIALIZE:EBUSY": r"{path} does not take a guest: .*\(EBUSY\) .*; it runs another guest; .*",
    "write:INITIALIZE:ENOMEM": r"{path} does not take a guest: .*\(ENOMEM\) .*; try less MEM, or --host embedded",
    "write:INITIALIZE:EFAULT": r"{path} does not take a guest: .*\(EFAULT\) .*; try --lguest-abi .*",
    "write:INITIALIZE:=0": r"{path} is of another era, or no lguest: it took 0 bytes of INITIALIZE .*, not \d+; "
    r"try --lguest-abi {other}, or --host embedded",
    "read:EPERM": r"Running guest failed: Operation not permitted \(EPERM\) from {path}",
    "read:EFAULT": r"Running guest failed: Bad address \(EFAULT\) from {path}",
    "read:EINVAL@2": r"Running guest failed: Invalid argument \(EINVAL\) from {path}",
    "read:EIO@3": r"Running guest failed: Input/output error \(EIO\) from {path}",
}
COUNTS = {"2.6.25": "5", "2.6.30": "4", "2.6.31": "4"}
KERNELS = {"2.6.25": r"2\.6\.25 to 2\.6\.29", "2.6.30": r"2\.6\.30", "2.6.31": r"2\.6\.31 to 3\.19"}
OTHERS = {"2.6.25": "2.6.31 or 2.6.30", "2.6.30": "2.6.31 or 2.6.25", "2.6.31": "2.6.30 or 2.6.25"}
# INITIALIZE tells them apart.
OTHER = {"2.6.25": "2.6.31", "2.6.30": "2.6.25", "2.6.31": "2.6.25"}


@every_era
@pytest.mark.parametrize(("fault", "line"), REFUSED.items())
def test_a_refusal_is_one_line_that_says_what_was_tried(era: str, fault: str, line: str) -> None:
    with LguestDevice(era, inject=[fault]) as device:
        code, _out, err = run_on(device, era, "quiet poweroff")

    assert code == 1
    expected = line.format(path=re.escape(device.path), count=COUNTS[era], kernels=KERNELS[era], other=OTHERS[era])
    assert re.fullmatch(f"lgmp: {expected}\n", err), err


@every_era
def test_a_device_of_the_other_era_is_recognised(era: str) -> None:
    with LguestDevice(era) as device:
        code, _out, err = run("quiet poweroff", *host_options(device, OTHER[era]))

        assert code == 1
        assert re.fullmatch(rf"lgmp: {device.path} .*INITIALIZE with {COUNTS[OTHER[era]]} words.*--lguest-abi.*\n", err)
        assert device.requests("read") == []


@every_era
def test_an_interrupt_that_the_host_refuses_ends_the_guest_with_a_line(era: str, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    # A guest that does not end by itself: it finds what the disk has read even without the interrupt.
    words = ("run", MEM, GUEST, "--block", str(disk))
    with (
        LguestDevice(era, inject=["write:IRQ:EINVAL"]) as device,
        Launch(*words, *host_options(device, era), "--", commands(era, "quiet blk crc")) as launched,
    ):
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(rf"lgmp: {device.path} does not take interrupt \d: Invalid argument \(EINVAL\)\n", err), err


def test_an_eventfd_that_cannot_be_had_for_want_of_memory_is_an_error() -> None:
    with LguestDevice("2.6.31", inject=["write:EVENTFD:ENOMEM@2"]) as device:
        code, _out, err = run_on(device, "2.6.31", "quiet poweroff")

    assert code == 1
    assert re.fullmatch(rf"lgmp: {device.path} does not send NOTIFY 0x1003000 to an eventfd: .*\(ENOMEM\)\n", err), err


@every_era
def test_a_dead_guest_without_a_reason_is_told_of(era: str) -> None:
    # The last read is the one that asks for the reason; how many there are before it depends on the era.
    with LguestDevice(era) as device:
        assert run_on(device, era, "quiet noconsole crash x")[0] == 1
        reads = len(device.requests("read"))

    with LguestDevice(era, inject=[f"read:EFAULT@{reads}"]) as device:
        code, _out, err = run_on(device, era, "quiet noconsole crash x")

    assert code == 1
    assert re.fullmatch(rf"lgmp: the guest is dead, and {device.path} does not say why: .*\(EFAULT\)\n", err), err


# How many devices


def disks(tmp_path: Path, count: int) -> Sequence[str]:
    found = []
    for number in range(count):
        found += ["--block", str(make_disk(tmp_path / f"disk{number}.img", 8, number + 1))]
    return found


@every_era
def test_a_host_with_16_lines_has_15_for_virtqueues(era: str, tmp_path: Path) -> None:
    with LguestDevice(era, lines=16) as device:
        code, out, err = run_on(device, era, "quiet blk crc; poweroff", *disks(tmp_path, 13))

        assert code == 0, out + err
        assert len(device.requests("open")) == 1


@every_era
def test_more_than_that_are_refused_before_the_guest_runs(era: str, tmp_path: Path) -> None:
    with LguestDevice(era, lines=16) as device:
        code, _out, err = run_on(device, era, "quiet blk crc; poweroff", *disks(tmp_path, 14))

        assert code == 1
        assert re.fullmatch(r"lgmp: Too many devices: they have 16 virtqueues, and .*; give the guest fewer, .*\n", err)
        assert device.requests("read") == []


@every_era
def test_where_there_are_more_lines_they_are_used(era: str, tmp_path: Path) -> None:
    with LguestDevice(era) as device:
        code, out, err = run_on(device, era, "quiet blk crc; poweroff", *disks(tmp_path, 20))

        assert code == 0, out + err


# Which host


def test_a_file_that_is_no_lguest_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "lguest"
    file.write_bytes(b"")

    code, _out, err = run("quiet poweroff", "--lguest-device", str(file), "--lguest-abi", "2.6.31")

    assert code == 1
    assert re.fullmatch(rf"lgmp: {file} is of another era, or no lguest: it took \d+ bytes of .*\n", err), err


def test_where_the_device_is_there_guests_run_on_it_and_the_era_is_the_kernels() -> None:
    with LguestDevice("2.6.31") as device:
        code, out, err = run("quiet echo hello; poweroff", "-v", prefix=on_a_machine_with(device))

        assert code == 0, err
        assert "hello" in out
        assert " host=kernel abi=3.x\n" in err
        assert written(device, LHREQ_INITIALIZE)


def test_where_it_cannot_be_opened_guests_run_on_the_embedded_host() -> None:
    with LguestDevice("2.6.31", inject=["open:EACCES"]) as device:
        code, out, err = run("quiet echo hello; poweroff", "-v", prefix=on_a_machine_with(device))

    assert code == 0, err
    assert "hello" in out
    assert " host=embedded abi=3.x\n" in err


def test_embedded_does_not_touch_it() -> None:
    with LguestDevice("2.6.31") as device:
        code, _out, err = run("quiet poweroff", "--host", "embedded", prefix=on_a_machine_with(device))

        assert code == 0, err
        assert device.requests() == []


def test_doctor_tries_it_with_a_guest_that_never_runs() -> None:
    with LguestDevice("2.6.31") as device:
        with Launch("doctor", prefix=on_a_machine_with(device)) as launched:
            _code, out, _err = launched.end()

        assert "ok    kernel host: /dev/lguest takes guests; kicks go straight to the workers\n" in out
        assert written(device, LHREQ_INITIALIZE)
        assert device.requests("read") == []


def test_doctor_says_why_it_cannot_be_used() -> None:
    with (
        LguestDevice("2.6.31", inject=["write:INITIALIZE:EPERM"]) as device,
        Launch("doctor", prefix=on_a_machine_with(device)) as launched,
    ):
        code, out, _err = launched.end()

    assert code == 0
    assert re.search(r"^note  kernel host: /dev/lguest does not take .*EPERM.*embedded host$", out, re.MULTILINE)


@pytest.mark.parametrize("words", [("--host", "kernel"), ("--lguest-device", "/nowhere/lguest")])
def test_where_there_is_none_who_wants_it_hears_where_it_would_be(words: Sequence[str]) -> None:
    if os.path.exists("/dev/lguest"):
        pytest.fail("this machine has a /dev/lguest: run the tests where there is none")

    code, _out, err = run("quiet poweroff", *words)

    assert code == 1
    assert re.fullmatch(r"lgmp: cannot open \S+/lguest: No such file or directory; .*--host embedded needs none\n", err)


def test_on_a_kernel_without_lguest_a_named_device_needs_its_era() -> None:
    with LguestDevice("2.6.31") as device:
        code, _out, err = run("quiet poweroff", "--lguest-device", device.path)

        assert code == 1
        assert re.fullmatch(
            rf"lgmp: cannot tell how {device.path} is spoken to: this kernel is Linux \S+, which has no lguest .*"
            r"--lguest-abi 2\.6\.31 \(as Linux 2\.6\.31 to 3\.19 have it\) or 2\.6\.30 .* or 2\.6\.25 .*\n",
            err,
        )
        assert device.requests() == []


def test_the_emulator_is_not_loaded(tmp_path: Path) -> None:
    with LguestDevice("2.6.31") as device:
        words = ("run", MEM, GUEST, *host_options(device, "2.6.31"), "--", "quiet")
        with Launch(*words) as launched:
            launched.wait_until_ready()
            mapped = Path(f"/proc/{launched.pid}/maps").read_text()
            launched.send("poweroff\n")
            launched.end()

    assert "unicorn" not in mapped
    assert "tlbshim" not in mapped
