"""Everything a guest must not do, in a guest that does it. The guest may come to harm, its launcher and its disk not.

The list is the guest's own (`misdeed list`). What is not in a table here must still end in one of the two orderly ways:
the guest lives on, or the launcher ends with 1 and one line.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, launch, make_disk, run

every_host = pytest.mark.every_host

SOURCE = Path(__file__).parent / "guest" / "misdeeds.c"
SECTORS = 64

# What a ring's misdeed comes to, for a disk. A line of the launcher, or else the guest's own words about it.
RING_FATAL = {
    "outside": r"descriptor [01]: Invalid address 0x[0-9a-f]+\+\d+ is outside guest memory",
    "past-end": r"descriptor [01]: Invalid address 0x[0-9a-f]+\+\d+ is outside guest memory",
    "high-address": r"descriptor [01]: Invalid address 0x1[0-9a-f]{8}\+\d+ is outside guest memory",
    "wrap-32": r"descriptor [01]: Invalid address 0xfffffff0\+32 is outside guest memory",
    "wrap-64": r"descriptor [01]: Invalid address 0xfffffffffffffff0\+32 is outside guest memory",
    "huge-length": r"descriptor [01]: Invalid address 0x[0-9a-f]+\+4294967295 is outside guest memory",
    "head": r"Guest says index 128 is available, the ring has 128",
    "head-wild": r"Guest says index 65535 is available, the ring has 128",
    "next": r"descriptor [01]: Desc next is 128, the table has 128",
    "loop": r"descriptor [01]: Looped descriptor",
    "self-loop": r"descriptor [01]: Looped descriptor",
    "out-after-in": r"descriptor [01]: Descriptor has out after in",
    "avail-jump": r"Guest moved used index from 0 to 129",
    "avail-back": r"Guest moved used index from 0 to 65535",
    "avail-trash": r"Guest moved used index from 0 to 65535",
    "descriptor-trash": r"descriptor \d+: .+",
}
INDIRECT_FATAL = {
    "indirect-outside": r"descriptor 0: .+",
    "indirect-high": r"descriptor 0: Invalid address 0x1[0-9a-f]{8}\+32 is outside guest memory",
    "indirect-length": r"descriptor 0: .+ 31 is not a multiple of 16",
    "indirect-empty": r"descriptor 0: .+ 0 is not a multiple of 16",
    "indirect-nested": r"descriptor 0: entry 0 of its indirect table: INDIRECT within an indirect table",
    "indirect-next": r"descriptor 0: both INDIRECT and NEXT",
    "indirect-loop": r"descriptor 0: entry 0 of its indirect table: Looped descriptor",
    "indirect-beyond": r"descriptor 0: entry 0 of its indirect table: Desc next is 2, the table has 2",
    "indirect-long": r"descriptor 0: .+",
}
RING_SURVIVED = {
    "same-head": "128 requests finished",
    "early": "0 requests finished",
    "pfn-lie": "1 requests finished",
}
BLOCK_FATAL = {
    "header-15": r"descriptor 0: Bad iovec size 15 for the header",
    "header-17": r"descriptor 0: Bad iovec size 17 for the header",
    "no-status": r"descriptor 0: Bad virtblk cmd 0 out=2 in=0",
    "no-header": r"descriptor 0: Bad virtblk cmd 0 out=0 in=2",
    "header-only": r"descriptor 0: Bad virtblk cmd 0 out=1 in=0",
    "status-2": r"descriptor 0: Bad iovec size 2 for the status",
    "status-0": r"descriptor 0: Bad iovec size 0 for the status",
    "status-readable": r"descriptor 0: Bad virtblk cmd 0 out=3 in=0",
    # Before the first kick: after that nobody reads it.
    "used-trash": r"the index of used was moved from 0 to 65535 by the driver",
}
BLOCK_SURVIVED = {
    "empty-data": "1 requests finished, status 0",
    "unknown-type": "1 requests finished, status 2",
    **{
        name: "1 requests finished, status 1"
        for name in (
            *("unaligned-read", "unaligned-write", "read-past-end", "write-past-end", "write-across-end"),
            *("sector-huge", "sector-overflow", "sector-negative", "capacity-lie"),
        )
    },
}
# What the host, lg or its like, ends a guest for. Its words are the embedded host's tests' to hold.
HOST_FATAL = {
    "notify-limit": r"Bad NOTIFY 0x[0-9a-f]+",
    "notify-top": r"Bad NOTIFY 0xfffff000",
    "hypercall-99": r"Bad hypercall 99",
    "hypercall-huge": r"Bad hypercall 4294967295",
    "init-twice": r"already have lguest_data",
    "set-pte-beyond": r"bad page table entry",
    "set-pte-pse": r"bad page table entry",
    "set-pgd-beyond": r"bad page directory entry",
    "set-pgd-index": r"Attempt to set pgd 5000/1024",
    "new-pgtable-outside": r"bad page directory .+",
    "new-pgtable-unaligned": r"bad page directory .+",
    "new-pgtable-empty": r"Bad address .+",
    "pte-host": r"bad page table entry.*",
    "pte-nowhere-read": r"bad page table entry.*",
    "pte-nowhere-write": r"bad page table entry.*",
    "pte-nowhere-jump": r"bad page table entry.*",
    "idt-300": r"Setting idt entry 300",
    "idt-type": r"bad IDT type 5",
    "gdt-40": r"too many gdt entries 40",
    "gdt-count": r"Bad hypercall 3",
    "stack-ring0": r"bad stack segment .+",
    "stack-pages": r"bad stack pages 3",
    "stack-gone": r"Bad address .+",
    "esp-unmapped": r"Bad address .+",
    "esp-host": r"Bad address .+",
    "tls-outside": r"bad read address .+",
    "shutdown-outside": r"bad read address .+ len 128",
    "shutdown-wild": r"bad read address 0xfffffff0 len 128",
    "async-garbage": r"Bad hypercall 1667457891",
    "async-halt": r"Bad NOTIFY .+",
    "no-handler": r"unhandled trap 6 at .+",
    "no-fault-handler": r"unhandled trap 14 at .+",
    "triple-fault": r"unhandled trap .+",
    "fault-loop": r"Bad address .+",
}
# These end when somebody ends them.
ENDLESS = ("halt-blocked", "deaf")
# One kind that a signal ends as well, where it goes on at all.
MAY_HANG = ("lguest-data-trash",)

IN_TABLES = {
    *(*RING_FATAL, *INDIRECT_FATAL, *RING_SURVIVED, *BLOCK_FATAL, *BLOCK_SURVIVED, *HOST_FATAL, *ENDLESS, *MAY_HANG),
    *("readable-input", "writable-output"),
}


def listed() -> dict[str, str]:
    """The names of all misdeeds and the kinds that the source says they are of."""
    return dict(re.findall(r'^\t\{ "([a-z0-9-]+)", \w+, ([A-Z]+),', SOURCE.read_text(), re.MULTILINE))


OTHERS = sorted(set(listed()) - IN_TABLES)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SECTORS)


# Who breaks a device dies of it; that he may live on without it is in test_launch_device_errors.py.
DIE = ("--on-device-error", "die")


def commit(misdeed: str, disk: Path) -> tuple[int, str, list[str]]:
    """Have a guest commit one misdeed: exit status, output, the launcher's lines."""
    code, out, err = run(f"quiet misdeed {misdeed}; echo alive; poweroff", "--block", str(disk), *DIE)
    assert disk.stat().st_size == SECTORS * 512
    lines = err.splitlines()
    assert all(line.startswith("lgmp: ") for line in lines), err
    return code, out, [line.removeprefix("lgmp: ") for line in lines]


def test_every_misdeed_of_the_guest_is_known_here() -> None:
    with Launch("run", MEM, GUEST, "quiet misdeed list; poweroff") as launched:
        _code, out, _err = launched.end()

    assert [line.partition(":")[0] for line in out.splitlines()] == list(listed())
    assert set(listed()) >= IN_TABLES


@every_host
@pytest.mark.parametrize(("misdeed", "reason"), (RING_FATAL | INDIRECT_FATAL | BLOCK_FATAL).items())
def test_a_broken_ring_of_a_disk_ends_the_guest_and_names_the_place(misdeed: str, reason: str, disk: Path) -> None:
    code, out, lines = commit(misdeed, disk)

    assert code == 1
    assert len(lines) == 1 and re.match(f"vda: queue 0: {reason}", lines[0]), lines
    assert out == f"misdeed {misdeed}\n"
    assert disk.read_bytes() == make_disk(disk, SECTORS).read_bytes()


@pytest.mark.parametrize(("misdeed", "reason"), RING_FATAL.items())
def test_a_broken_ring_of_the_console_ends_the_guest_and_names_the_place(misdeed: str, reason: str, disk: Path) -> None:
    code, out, lines = commit(f"{misdeed}@console", disk)

    assert code == 1
    assert len(lines) == 1 and re.match(f"console: queue 1: {reason}", lines[0]), lines
    assert out == f"misdeed {misdeed}\n"


def test_an_indirect_descriptor_that_was_not_agreed_on_ends_the_guest(disk: Path) -> None:
    # The console offers no such thing.
    code, _out, lines = commit("indirect-loop@console", disk)

    assert code == 1
    assert len(lines) == 1 and re.match(r"console: queue 1: descriptor 0: INDIRECT, but", lines[0]), lines


@every_host
def test_a_writable_buffer_for_output_ends_the_guest(disk: Path) -> None:
    code, _out, lines = commit("writable-output", disk)

    assert (code, lines) == (1, ["console: queue 1: descriptor 0: Input buffers in output queue?"])


@every_host
def test_a_readable_buffer_for_input_ends_the_guest_when_input_comes() -> None:
    with open("/dev/zero", "rb") as endless:
        code, _out, err = run("quiet misdeed readable-input; poweroff", *DIE, stdin=endless.fileno())

    assert code == 1
    assert re.fullmatch(r"lgmp: console: queue 0: descriptor \d+: Output buffers in console in queue\?\n", err), err


@every_host
def test_a_guest_lives_on_where_a_ring_is_spoilt_that_nobody_reads(disk: Path) -> None:
    commands = "; ".join(f"misdeed {name}" for name in RING_SURVIVED)

    code, out, err = run(f"quiet {commands}; blk crc; poweroff", "--block", str(disk))

    assert code == 0
    for name, words in RING_SURVIVED.items():
        assert f"{name}: {words}" in out
        assert f"survived {name}" in out
    assert "blk crc: status 0" in out
    assert err == "lgmp: vda gave early output\n"


@every_host
def test_a_bad_disk_request_is_answered_and_changes_nothing(disk: Path) -> None:
    before = disk.read_bytes()
    commands = "; ".join(f"misdeed {name}" for name in BLOCK_SURVIVED)

    code, out, err = run(f"quiet {commands}; poweroff", "--block", str(disk))

    assert code == 0
    for name, words in BLOCK_SURVIVED.items():
        assert f"{name}: {words}\n" in out
    assert disk.read_bytes() == before
    assert all(line.startswith("lgmp: vda: ") for line in err.splitlines())


@pytest.mark.parametrize(("misdeed", "reason"), HOST_FATAL.items())
def test_what_the_host_ends_a_guest_for_is_said_in_one_line(misdeed: str, reason: str, disk: Path) -> None:
    code, out, lines = commit(misdeed, disk)

    assert code == 1
    assert len(lines) == 1 and re.fullmatch(reason, lines[0]), lines
    assert "alive" not in out


@pytest.mark.parametrize("misdeed", OTHERS)
def test_any_other_misdeed_ends_the_guest_in_order_or_not_at_all(misdeed: str, disk: Path) -> None:
    code, out, lines = commit(misdeed, disk)

    if code == 0:
        assert out.endswith("alive\n")
    else:
        assert code == 1
        assert len(lines) == 1
        assert "alive" not in out


@every_host
@pytest.mark.parametrize("misdeed", ENDLESS + MAY_HANG)
def test_a_guest_that_never_ends_is_ended_by_a_signal(misdeed: str, disk: Path) -> None:
    with launch(f"quiet misdeed {misdeed}", "--block", str(disk)) as launched:
        launched.out.wait_for(f"misdeed {misdeed}")
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


@every_host
def test_early_console_text_is_printed_to_its_end_or_that_of_memory(disk: Path) -> None:
    code, out, err = run("quiet misdeed notify-last; misdeed notify-descriptor-inside; poweroff", "--block", str(disk))

    assert (code, err) == (0, "")
    assert "misdeed notify-last\nxsurvived" in out


@every_host
def test_a_notify_within_a_ring_is_a_kick(disk: Path) -> None:
    code, out, err = run("quiet blk crc; misdeed notify-ring-inside; blk crc; poweroff", "--block", str(disk))

    assert (code, err) == (0, "")
    assert out.count("blk crc: status 0") == 2
