"""One boot after the other, and several at once."""

from __future__ import annotations

import contextlib
from pathlib import Path

from launching import checksum, launch, make_disk, run

SECTORS = 256


def test_fifty_boots_in_a_row() -> None:
    for number in range(50):
        assert run(f"quiet echo boot {number}; poweroff") == (0, f"boot {number}\n", "")


def test_several_guests_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{number}.img", SECTORS, seed=number) for number in range(4)]
    before = [checksum(disk.read_bytes()) for disk in disks]
    with contextlib.ExitStack() as stack:
        guests = [
            stack.enter_context(
                launch(f"quiet blk crc; blk stress 1000 {number}; blk crc; poweroff", "--block", str(disk))
            )
            for number, disk in enumerate(disks)
        ]
        ends = [launched.end() for launched in guests]

    for number, (code, out, err) in enumerate(ends):
        assert (code, err) == (0, "")
        after = checksum(disks[number].read_bytes())
        assert f"blk stress 1000 {number}: status 0" in out
        assert [line[-8:] for line in out.splitlines() if line.startswith("blk crc")] == [before[number], after]
