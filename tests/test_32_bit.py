"""lgmp on a 32-bit Python without Unicorn, which is what there is on the kernels that have a /dev/lguest.

The Python is the one that scripts/python32 makes. The stand-in for /dev/lguest runs in the tests' own, and takes words
of four bytes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import old_kernel
import pytest
from launching import GUEST, MEM, Launch, make_disk
from lguest_device.log import Request
from lguest_devices import (
    DEVICE_ERAS,
    GUESTS_OF,
    LguestDevice,
    host_options,
    needs_lguest_device,
    on_a_machine_with,
)

TESTS = Path(__file__).resolve().parent
CHECKOUT = TESTS.parent
MADE = CHECKOUT / ".python32"
PYTHON = str(MADE / "usr/bin/python3.11")
COMMAND = ("linux32", PYTHON, "-P", "-m")
LGMP = (*COMMAND, "lgmp")
# Workers and all that they start inherit it; 64-bit programs pass over libraries of 32 bits.
ENVIRONMENT = {
    **os.environ,
    "LD_LIBRARY_PATH": f"{MADE}/lib/i386-linux-gnu:{MADE}/usr/lib/i386-linux-gnu",
    "PYTHONPATH": f"{CHECKOUT}:{MADE}/site",
}
# Those that neither run guests on the embedded host nor build anything.
UNIT_TESTS = (
    *("ring", "ring_properties", "bus", "control", "mailbox", "shared_file", "vectors", "waker", "terminal"),
    *("block_device", "modern_block_device", "net_device", "modern_net_device", "console_device", "rng_device"),
    *("worker_process", "network", "vhost_user_messages"),
    *("loader_boot", "loader_bzimage", "loader_elf", "loader_files", "loader_memory_size", "loader_page_tables"),
    *("kernel_protocol", "getopt_long", "embedded_descriptors", "embedded_paging"),
)

PAGE = 4096
RAM = int(MEM) << 20
# linux/lguest_launcher.h
LHREQ_INITIALIZE, LHREQ_IRQ, LHREQ_BREAK, LHREQ_EVENTFD = 0, 2, 3, 4

NEEDS_64_BITS = (
    "the embedded host needs a 64-bit Python on x86-64, not 32 bits on i686; "
    "--host kernel does not, where there is a /dev/lguest"
)

pytestmark = pytest.mark.skipif(not os.path.exists(PYTHON), reason="no 32-bit Python here: scripts/python32 makes one")

every_era = pytest.mark.parametrize("era", DEVICE_ERAS)


@pytest.fixture(params=["new", "old"])
def kernel(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What a command is started by, so that it sees this kernel, or an old one."""
    return () if request.param == "new" else an_old_kernel()


def an_old_kernel() -> tuple[str, ...]:
    if not old_kernel.can_be_entered():
        pytest.skip("no filters of system calls in this kernel")
    return old_kernel.PREFIX


def launch(*arguments: str, prefix: Sequence[str] = (), lgmp: Sequence[str] = LGMP) -> Launch:
    return Launch(*arguments, prefix=prefix, lgmp=lgmp, env=ENVIRONMENT)


def launch_on(device: LguestDevice, era: str, commands: str, *options: str, prefix: Sequence[str] = ()) -> Launch:
    words = (*options, *host_options(device, era), "--", f"abi={GUESTS_OF[era]} {commands}")
    return launch("run", MEM, GUEST, *words, prefix=prefix)


def words_of(request: Request) -> list[int]:
    """What was written, as words of four bytes."""
    assert len(request.sent) % 4 == 0
    return [int.from_bytes(request.sent[at : at + 4], "little") for at in range(0, len(request.sent), 4)]


def written(device: LguestDevice, kind: int) -> list[Request]:
    return [each for each in device.requests("write") if words_of(each)[0] == kind]


# On /dev/lguest


@needs_lguest_device
@every_era
def test_a_guest_checks_itself_and_its_devices(era: str, kernel: tuple[str, ...], tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", 256)

    with LguestDevice(era, word=4) as device:
        options = ("--block", str(disk), "--rng")
        with launch_on(device, era, "selfcheck disk; poweroff", *options, prefix=kernel) as launched:
            code, out, err = launched.end()

    assert code == 0, out + err
    assert "SELF-CHECK PASSED" in out


@needs_lguest_device
@every_era
def test_all_that_is_written_is_words_of_four_bytes(era: str, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with LguestDevice(era, word=4) as device:
        with launch_on(device, era, "quiet", "--block", str(disk)) as launched:
            launched.wait_until_ready()
            # A halted guest, that takes an interrupt to see it.
            launched.send("poweroff\n")
            assert launched.end()[0] == 0

        (made,) = written(device, LHREQ_INITIALIZE)
        base, pages, *start = words_of(made)[1:]
        assert base >= PAGE and base % PAGE == 0
        assert pages > RAM // PAGE
        assert len(start) == (2 if era == "2.6.25" else 1)
        # The bytes it took, without the word that says INITIALIZE.
        assert made.result == len(made.sent) - 4 == (16 if era == "2.6.25" else 12)
        irqs, breaks, eventfds = (written(device, each) for each in (LHREQ_IRQ, LHREQ_BREAK, LHREQ_EVENTFD))
        assert {len(each.sent) for each in irqs} == {8}
        assert {len(each.sent) for each in breaks} == (set() if era == "2.6.31" else {8})
        assert {len(each.sent) for each in eventfds} == ({12} if era == "2.6.31" else set())


@needs_lguest_device
def test_workers_run_on_the_same_python() -> None:
    with LguestDevice(word=4) as device, launch_on(device, "2.6.31", "quiet", "--rng") as launched:
        launched.wait_until_ready()
        workers = launched.workers()
        programs = {os.readlink(f"/proc/{pid}/exe") for pid in (launched.pid, *workers.values())}
        launched.send("poweroff\n")
        assert launched.end()[0] == 0

    assert set(workers) == {"rng0", "console"}
    assert programs == {PYTHON}


@needs_lguest_device
@pytest.mark.parametrize("name", ["vda", "console"])
def test_a_worker_that_is_killed_has_a_successor(name: str, kernel: tuple[str, ...], tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with (
        LguestDevice("2.6.25", word=4) as device,
        launch_on(device, "2.6.25", "quiet", "--block", str(disk), prefix=kernel) as launched,
    ):
        launched.wait_until_ready()
        pid = launched.workers()[name]
        os.kill(pid, signal.SIGKILL)
        launched.err.wait_for("started again")
        launched.command("blk crc")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert "blk crc: status 0" in out
    assert err.startswith(f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL; started again as pid ")


@needs_lguest_device
def test_a_guest_reboots(kernel: tuple[str, ...], tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with (
        LguestDevice(word=4) as device,
        launch_on(device, "2.6.31", "quiet", "--block", str(disk), prefix=kernel) as launched,
    ):
        launched.wait_until_ready()
        launched.send("reboot\n")
        launched.out.wait_for("test> ", times=2)
        launched.wait_until_ready()
        launched.send("blk crc; poweroff\n")
        code, _out, err = launched.end()

    assert (code, err) == (0, "")


# The device is where such machines have it, and the kernel calls itself 2.6.something.
LGMP_ON_2_6 = ("setarch", "linux32", "--uname-2.6", *LGMP[1:])


@needs_lguest_device
def test_where_the_device_is_there_nothing_has_to_be_said() -> None:
    with LguestDevice(word=4) as device:
        prefix = on_a_machine_with(device)
        with launch("run", MEM, GUEST, "--", "quiet echo hello; poweroff", prefix=prefix, lgmp=LGMP_ON_2_6) as launched:
            code, out, err = launched.end()

        assert (code, out, err) == (0, "hello\n", "")
        assert written(device, LHREQ_INITIALIZE)


@needs_lguest_device
def test_doctor_is_content_with_the_device() -> None:
    with (
        LguestDevice(word=4) as device,
        launch("doctor", prefix=on_a_machine_with(device), lgmp=LGMP_ON_2_6) as launched,
    ):
        code, out, err = launched.end()

    assert (code, err) == (0, ""), out
    assert "ok    kernel host: /dev/lguest takes guests; kicks go straight to the workers\n" in out
    assert re.search(r"^note  embedded host: .*; nothing to do: guests run on the kernel's host$", out, re.MULTILINE)


# What cannot be done


@pytest.mark.parametrize("host", [("--host", "embedded"), ()], ids=["embedded", "auto"])
def test_the_embedded_host_says_that_it_needs_64_bits(host: tuple[str, ...]) -> None:
    with launch("run", MEM, GUEST, *host, "--", "quiet poweroff") as launched:
        code, out, err = launched.end()

    assert (code, out, err) == (1, "", f"lgmp: {NEEDS_64_BITS}\n")


def test_doctor_says_that_no_guest_runs_here_without_the_device() -> None:
    with launch("doctor") as launched:
        code, out, err = launched.end()

    assert (code, err) == (1, ""), out
    assert re.search(r"^ok    machine: Linux \S+ on i686, Python 3\.11\.\d+ of 32 bits$", out, re.MULTILINE)
    assert re.search(r"^note  kernel host: no /dev/lguest \(32-bit kernels of .*\)$", out, re.MULTILINE)
    assert f"FAIL  embedded host: {NEEDS_64_BITS}\n" in out


@pytest.mark.parametrize("mem", ["2G", "3G"])
def test_more_memory_than_an_address_space_has_is_refused_in_one_line(mem: str) -> None:
    with launch("run", mem, GUEST, "--", "quiet poweroff") as launched:
        code, out, err = launched.end()

    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"lgmp: cannot make \d+ MiB of guest memory: a 32-bit Python can use less than 2048 MiB; try less MEM\n", err
    )


# The parts


def test_the_tests_of_the_parts_pass() -> None:
    files = [str(TESTS / f"test_{name}.py") for name in UNIT_TESTS]

    # Where nothing may be skipped, nothing may be there. What passt does has nothing to do with us.
    tested = subprocess.run(
        [*COMMAND, "pytest", "--quiet", "-p", "no:cacheprovider", "-k", "not user_mode_stack", *files],
        check=False,
        cwd=CHECKOUT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    assert tested.returncode == 0, tested.stdout
