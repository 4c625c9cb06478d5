"""What --verbose says on stderr: one line for each thing, to be read by people and found by grep."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, make_disk, run
from networks import HOST_IP, namespace

RAM = int(MEM) << 20
PAGE = 4096

FORMS = [
    r"device \d+: (?P<name>\w+) type=\w+ pid=\d+( \w+=.*)?",
    r"device \d+: \w+ driver offered=0x[0-9a-f]+ accepted=0x[0-9a-f]+",
    r"device \d+: \w+ reset",
    r"virtqueue \w+\.\d+: irq=\d+ page=0x[0-9a-f]+ num=128",
    r"[\w ]+: address=0x[0-9a-f]+ size=0x[0-9a-f]+",
    r"page tables: made by the host",
    r"guest \S+: memory=0x0-0x[0-9a-f]+ entry=0x[0-9a-f]+ host=(?:embedded|kernel) abi=\S+",
    r"guest \S+: powered off",
]
# Where the host takes eventfds.
KICKS = r"device \d+: \w+ kicks=(eventfd|launcher)"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a guest with a disk, random bytes and an initrd."""
    directory = tmp_path_factory.mktemp("verbose")
    initrd = directory / "initrd"
    initrd.write_bytes(b"x" * 5000)
    disk = make_disk(directory / "a disk.img", 64)
    code, _out, err = run(
        "quiet blk id; rng read 8; poweroff",
        *("-v", "--name", "loud", "--block", str(disk), "--rng", "--initrd", str(initrd)),
    )
    assert code == 0
    lines = err.splitlines()
    assert all(line.startswith("lgmp: ") for line in lines)
    return [line.removeprefix("lgmp: ") for line in lines]


def found(said: list[str], form: str) -> list[tuple[str, ...]]:
    """The groups of each line that a form is all of."""
    return [match.groups() for match in (re.fullmatch(form, line) for line in said) if match]


def extents(said: list[str]) -> dict[str, tuple[int, int]]:
    """The first address of each thing in memory and the first after it, by its name."""
    form = r"([\w ]+): address=(0x[0-9a-f]+) size=(0x[0-9a-f]+)"
    return {name: (int(start, 16), int(start, 16) + int(size, 16)) for name, start, size in found(said, form)}


def test_every_line_has_one_of_a_few_forms_and_each_form_occurs(said: list[str]) -> None:
    assert [line for line in said if not any(re.fullmatch(form, line) for form in (*FORMS, KICKS))] == []
    assert [form for form in FORMS if not any(re.fullmatch(form, line) for line in said)] == []


def test_devices_are_numbered_in_their_order_with_what_they_stand_on(said: list[str]) -> None:
    devices = found(said, r"device (\d+): (\w+) type=(\w+) pid=\d+ ?(.*)")
    assert [(number, name, kind) for number, name, kind, _ in devices] == [
        ("0", "vda", "block"),
        ("1", "rng0", "rng"),
        ("2", "console", "console"),
    ]
    assert devices[0][3].startswith("sectors=64 file=/") and devices[0][3].endswith("/a disk.img")
    assert devices[1][3] == "file=/dev/urandom"


def test_virtqueues_have_their_interrupts_and_lie_one_after_the_other_above_the_descriptor_page(
    said: list[str],
) -> None:
    queues = found(said, r"virtqueue (\S+): irq=(\d+) page=(0x[0-9a-f]+) num=128")
    first = RAM + PAGE
    assert extents(said)["descriptor page"] == (RAM, first)
    assert [(name, int(irq), int(page, 16)) for name, irq, page in queues] == [
        ("vda.0", 1, first),
        ("rng0.0", 2, first + 2 * PAGE),
        ("console.0", 3, first + 4 * PAGE),
        ("console.1", 4, first + 6 * PAGE),
    ]
    ((limit, _entry),) = found(
        said, r"guest loud: memory=0x0-(0x[0-9a-f]+) entry=(0x[0-9a-f]+) host=(?:embedded|kernel) abi=\S+"
    )
    assert int(limit, 16) == first + 8 * PAGE


def test_what_was_loaded_lies_in_memory_and_the_entry_within_the_kernel(said: list[str]) -> None:
    where = extents(said)
    assert where["RAM"] == (0, RAM)
    assert where["boot_params"] == (0, PAGE)
    assert where["initrd"] == (RAM - 2 * PAGE, RAM - 2 * PAGE + 5000)
    start, end = where["ELF segment 0"]
    ((entry,),) = found(said, r"guest loud: .* entry=(0x[0-9a-f]+) .*")
    assert start <= int(entry, 16) < end <= RAM


def test_a_driver_is_told_of_with_the_features_that_it_accepted(said: list[str]) -> None:
    ((offered, accepted),) = found(said, r"device 0: vda driver offered=0x([0-9a-f]+) accepted=0x([0-9a-f]+)")
    assert int(accepted, 16) and int(accepted, 16) & ~int(offered, 16) == 0


def test_a_tap_and_its_address_are_told(tmp_path: Path) -> None:
    with namespace() as here, here.entered():
        _code, _out, err = run("quiet poweroff", "-v", "--tunnet", f"{HOST_IP}:02:00:00:00:00:01")

    assert re.search(
        rf"^lgmp: device 0: eth0 type=net pid=\d+ mac=02:00:00:00:00:01 net=tap0 \({HOST_IP}/24\)$", err, re.MULTILINE
    )


def test_page_tables_are_told_where_the_launcher_makes_them() -> None:
    with Launch("run", "-v", "--guest-abi", "2.6.25", MEM, GUEST, "abi=2.6.25 quiet poweroff") as launched:
        code, _out, err = launched.end()

    assert code == 0
    # One directory, and a table for each 4 MiB.
    pages = 1 + RAM // (4 << 20)
    assert f"lgmp: page tables: address={RAM - pages * PAGE:#x} size={pages * PAGE:#x}\n" in err
    assert "made by the host" not in err


def test_who_the_workers_are_is_told(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("--chroot takes root")

    _code, _out, err = run("quiet poweroff", "-v", "--chroot", str(tmp_path))

    assert f"lgmp: workers: chroot={tmp_path}\n" in err


def test_without_it_nothing_is_said() -> None:
    assert run("quiet poweroff") == (0, "", "")
