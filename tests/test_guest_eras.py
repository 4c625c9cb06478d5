"""Guests of every era: what the host takes from the table that says how they differ, and nothing from another's row.

What a row must say is written down here a second time, as the kernels have it: `EXPECTED`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from embedded_guest import (
    CODE,
    DATA,
    DIRECTORY,
    DONE,
    EAX,
    EBX,
    ECX,
    EDX,
    ERA_NAMES,
    ERAS,
    FLAT_LOW,
    JUMP_TO_SELF,
    KERNEL_CS,
    NOP,
    RAM_BYTES,
    RESULTS,
    SPARE,
    TABLE,
    UD2,
    USER_CODE,
    USER_CS,
    USER_DATA_HIGH,
    LittleGuest,
    call_of,
    fetch,
    gate,
    handler,
    increment,
    jump,
    load,
    set_pte,
    store,
    word,
)
from images import MIB, BzImage, ElfSegment, elf_image, spoiled, write
from launching import make_disk, run

from lgmp.errors import LgmpError
from lgmp.hosts import Died, Notify, Reboot
from lgmp.hosts.choice import GUEST_ABI_NAMES, choose_abi
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded.library import UC_X86_REG_CR0
from lgmp.loader import load_guest, map_memory
from lgmp.memory import PAGE_SIZE, GuestMemory

VMCALL = b"\x0f\x01\xc1"
REWRITTEN = b"\xcd\x1f\x90"  # int 0x1f; nop
INVALID_OPCODE = 6
GP = 13
KERNEL_ADDRESS = 0xC0000000
FREE = b"\xff" * 64

every_era = pytest.mark.parametrize("era", ERAS, ids=ERA_NAMES)


class Expected(NamedTuple):
    """What the kernels of an era have: registers of the arguments, words of a ring's entry, fields of lguest_data."""

    registers: tuple[int, int, int]
    entry: Sequence[int]  # which of (call, first, second, third, fourth) each word is
    fields: tuple[int | None, ...]  # irq_pending, hcall_status, hcalls, reserve_mem, tsc_khz, pgdir, noirq_start ...


OLD = (None, 20, 84, 1108, 1112, 1116, 1120, 1124, 1128, 1132, 1136)
EXPECTED = {
    "2.6.25": Expected((EDX, EBX, ECX), (0, 2, 3, 1), OLD),
    "2.6.26": Expected((EDX, EBX, ECX), (0, 2, 3, 1), OLD),
    "2.6.30": Expected((EBX, ECX, EDX), (0, 1, 2, 3), OLD),
    "2.6.31": Expected((EBX, ECX, EDX), (0, 1, 2, 3, 4), (20, 24, 88, 1368, 1372, 1376, 1380, 1384, 1388, 1392, 1396)),
    "3.x": Expected((EBX, ECX, EDX), (0, 1, 2, 3, 4), (20, 24, 88, 1368, 1372, None, 1376, 1380, 1384, 1388, 1392)),
}
PAGED = {"2.6.25", "2.6.26", "2.6.30", "2.6.31"}
VMCALLING = {"2.6.30", "2.6.31"}


def era_named(name: str) -> abi.GuestAbi:
    return next(each for each in ERAS if each.name == name)


LATEST, LINUX_2_6_31, LINUX_2_6_30, LINUX_2_6_26, LINUX_2_6_25 = (
    era_named(name) for name in ("3.x", "2.6.31", "2.6.30", "2.6.26", "2.6.25")
)


def call(era: abi.GuestAbi, number: int, *arguments: int) -> bytes:
    """A hypercall as EXPECTED says that guests of the era make it."""
    loads = b"".join(
        load(register, value) for register, value in zip(EXPECTED[era.name].registers, arguments, strict=False)
    )
    return load(EAX, number) + loads + b"\xcd\x1f"


def end(code: bytes, **more: object) -> str:
    """What a guest dies of."""
    with LittleGuest(code, **more) as guest:  # type: ignore[arg-type]
        event = guest.run()
        assert isinstance(event, Died), event
        return event.reason


# The table.


def test_the_table_has_a_row_for_each_era_newest_first() -> None:
    assert list(EXPECTED)[::-1] == ERA_NAMES
    assert sorted((each.since for each in ERAS), reverse=True) == [each.since for each in ERAS]
    assert list(GUEST_ABI_NAMES) == ["auto", *ERA_NAMES]


@every_era
def test_a_row_is_what_the_kernels_have(era: abi.GuestAbi) -> None:
    fields = (
        *(era.irq_pending, era.hcall_status, era.hcalls, era.reserve_mem, era.tsc_khz, era.pgdir),
        *(era.noirq_start, era.noirq_end, era.kernel_address, era.syscall_vec, era.data_size),
    )
    assert fields == EXPECTED[era.name].fields
    assert era.hcall_words == len(EXPECTED[era.name].entry)
    assert (era.starts_paged, era.vmcall) == (era.name in PAGED, era.name in VMCALLING)
    assert era.status_notify is (era.name != "2.6.25")


# Which row is a kernel's.


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ((2, 6, 25), "2.6.25"),
        ((2, 6, 26), "2.6.26"),
        ((2, 6, 29), "2.6.26"),
        ((2, 6, 30), "2.6.30"),
        ((2, 6, 31), "2.6.31"),
        ((2, 6, 39), "2.6.31"),
        ((3, 0), "2.6.31"),
        ((3, 0, 101), "2.6.31"),
        ((3, 1), "3.x"),
        ((3, 1, 0), "3.x"),
        ((3, 19, 8), "3.x"),
        ((4, 0, 9), "3.x"),
        (None, "3.x"),
    ],
)
def test_a_kernel_speaks_as_its_version_does(version: tuple[int, ...] | None, name: str) -> None:
    assert choose_abi("auto", version, "vmlinux").name == name


@every_era
def test_who_says_how_the_guest_speaks_is_believed(era: abi.GuestAbi) -> None:
    for version in (None, (2, 6, 23), (2, 6, 32), (3, 13, 10), (4, 9)):
        assert choose_abi(era.name, version, "vmlinux") is era


@pytest.mark.parametrize("version", [(2, 6, 24), (2, 4), (4, 1), (4, 13, 2), (6, 1)])
def test_a_kernel_whose_devices_are_elsewhere_is_refused(version: tuple[int, ...]) -> None:
    text = ".".join(map(str, version))
    with pytest.raises(LgmpError, match=rf"^vm is Linux {text}, .*: give a kernel of 2\.6\.25 to 3\.19$"):
        choose_abi("auto", version, "vm")


def version_of(directory: Path, image: bytes) -> tuple[int, ...] | None:
    with GuestMemory.create(4 * MIB, 1) as memory:
        return load_guest(memory, write(directory, image), None, []).linux_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (b"Linux version 2.6.27.41 (root@host) (gcc)", (2, 6, 27)),
        (b"Linux version 3.0-rc1 (me)", (3, 0)),
        (b"%s version %s (x)\0Linux version %s (y)\0Linux version 3.13.10-x (z)", (3, 13, 10)),
        (b"Linux version %s", None),
        (b"Linux version ", None),
        (b"nothing of the kind", None),
    ],
)
def test_an_elf_kernel_tells_its_version_by_its_banner(
    tmp_path: Path, text: bytes, version: tuple[int, ...] | None
) -> None:
    assert version_of(tmp_path, elf_image(ElfSegment(content=b"\x90 lguest " + text))) == version


@pytest.mark.parametrize(
    ("pointer", "text", "version"),
    [
        (0x100, b"2.6.32.68 (root@host) #1", (2, 6, 32)),
        (0x1FC, b"3.19", (3, 19)),  # to the very end of the set-up code
        (0x1FD, b"3.1", (3, 1)),
        (0x100, b"Unknown", None),
        (0x200, b"", None),
        (0xFFFF, b"", None),
        (0, b"", None),
    ],
)
def test_a_bzimage_tells_its_version_in_its_header(
    tmp_path: Path, pointer: int, text: bytes, version: tuple[int, ...] | None
) -> None:
    image = bytearray(spoiled(BzImage().pack(), 0x20E, "<H", pointer))
    image[0x200 + pointer : 0x200 + pointer + len(text)] = text
    assert version_of(tmp_path, bytes(image)) == version


def test_first_page_tables_lie_below_the_initrd_and_are_told_of(tmp_path: Path) -> None:
    with GuestMemory.create(4 * MIB, 1) as memory:
        guest = load_guest(memory, write(tmp_path, elf_image()), write(tmp_path, b"i" * 5000, "initrd"), [])
        directory = map_memory(memory, guest)
        assert directory == 4 * MIB - 2 * PAGE_SIZE - PAGE_SIZE
        assert guest.segments[-1] == ("page tables", directory - PAGE_SIZE, 2 * PAGE_SIZE)
        assert struct.unpack_from("<I", memory.view, directory) == (directory - PAGE_SIZE | 7,)


# The start.


@every_era
def test_a_guest_starts_with_paging_on_or_off(era: abi.GuestAbi) -> None:
    with LittleGuest(UD2, set_up=False, era=era) as guest:
        paged = bool(guest.host._cpu.read_register(UC_X86_REG_CR0) & abi.X86_CR0_PG)
        assert paged == (era.name in PAGED)
        assert guest.host._cpu.q[c.CR3] == (DIRECTORY if paged else 0)


@every_era
def test_lguest_init_fills_what_is_the_host_s_and_nothing_else(era: abi.GuestAbi) -> None:
    reserve_mem, tsc_khz, pgdir = EXPECTED[era.name].fields[3:6]
    with LittleGuest(call(era, abi.LHCALL_LGUEST_INIT, DATA), set_up=False, era=era) as guest:
        guest.write(DATA + 1104, b"\x55" * 4)
        before = bytes(guest.memory.view[DATA : DATA + PAGE_SIZE])
        guest.finish()
        after = bytes(guest.memory.view[DATA : DATA + PAGE_SIZE])
        changed = {at & ~3 for at in range(PAGE_SIZE) if before[at] != after[at]}
        assert changed <= {abi.DATA_TIME, abi.DATA_TIME + 4, reserve_mem, tsc_khz, pgdir}
        assert guest.data(era.reserve_mem) == 0x400000
        assert pgdir is None or guest.data(pgdir) == DIRECTORY


@pytest.mark.parametrize("address", [0xC0000000, 0x80000000, 0xFF800000])
def test_after_lguest_init_memory_is_where_the_kernel_is_linked_too(address: int) -> None:
    era = LINUX_2_6_31
    code = call(era, abi.LHCALL_LGUEST_INIT, DATA) + fetch(EAX, address + SPARE) + store(EAX, RESULTS)
    with LittleGuest(code, set_up=False, era=era, data={era.kernel_address: address}) as guest:
        guest.write(SPARE, word(0x77))
        guest.finish()
        assert guest.result() == 0x77
        assert guest.read(DIRECTORY + 4 * abi.SWITCHER_PGD_INDEX) == guest.host._cpu.switcher_entry


def test_a_guest_of_today_gets_no_mapping_that_it_did_not_make() -> None:
    with LittleGuest(call(LATEST, abi.LHCALL_LGUEST_INIT, DATA), set_up=False) as guest:
        guest.finish()
        assert list(guest.words[(DIRECTORY >> 2) + 1 : (DIRECTORY >> 2) + 1024]) == [0] * 1023


# Hypercalls.


@every_era
def test_arguments_are_in_the_registers_of_the_era(era: abi.GuestAbi) -> None:
    code = call(era, abi.LHCALL_LOAD_IDT_ENTRY, 0x55, *gate(handler(0x55)))
    with LittleGuest(code + call(era, abi.LHCALL_NOTIFY, 0x1234), era=era) as guest:
        assert guest.run() == Notify(0x1234)
        found = guest.host._guest.gates[0x55]
        assert found is not None
        assert found.handler == handler(0x55)


@every_era
def test_a_shutdown_says_how_in_its_second_argument(era: abi.GuestAbi) -> None:
    with LittleGuest(call(era, abi.LHCALL_SHUTDOWN, SPARE, abi.LGUEST_SHUTDOWN_RESTART), era=era) as guest:
        assert isinstance(guest.run(), Reboot)
    # The second is 0 in the CRASH that this call was at first.
    for how in (0, abi.LGUEST_SHUTDOWN_POWEROFF):
        with LittleGuest(call(era, abi.LHCALL_SHUTDOWN, SPARE, how), era=era) as guest:
            guest.write(SPARE, b"Power down\0")
            assert guest.run() == Died("CRASH: Power down")


@every_era
def test_calls_of_other_eras_are_none(era: abi.GuestAbi) -> None:
    first_and_last = {3: ("2.6.25", "2.6.30"), 18: ("2.6.30", "3.x"), 19: ("2.6.31", "3.x")}
    order = list(EXPECTED)
    for number, (first, last) in first_and_last.items():
        if order.index(first) <= order.index(era.name) <= order.index(last):
            with LittleGuest(call(era, number, 0, 0, 0), era=era) as guest:
                guest.finish()
        else:
            assert end(call(era, number, 0, 0, 0), era=era) == f"Bad hypercall {number}"


def put(guest: LittleGuest, slot: int, *values: int) -> None:
    """Put a call with its arguments into a slot of the ring, as EXPECTED says that guests of the era do."""
    expected = EXPECTED[guest.era.name]
    status, hcalls = expected.fields[1:3]
    assert status is not None
    assert hcalls is not None
    padded = (*values, *[0] * (5 - len(values)))
    words = [padded[which] for which in expected.entry]
    guest.write(DATA + hcalls + 4 * len(words) * slot, struct.pack(f"<{len(words)}I", *words))
    guest.write(DATA + status + slot, b"\0")


@every_era
def test_the_asynchronous_ring_is_that_of_the_era(era: abi.GuestAbi) -> None:
    code = call(era, abi.LHCALL_NOTIFY, 1) + call(era, abi.LHCALL_FLUSH_ASYNC)
    with LittleGuest(code, era=era) as guest:
        assert guest.run() == Notify(1)
        for slot in range(abi.LHCALL_RING_SIZE - 1):
            put(guest, slot, abi.LHCALL_LOAD_IDT_ENTRY, 0x40 + slot, *gate(0x10000 * slot + slot))
        put(guest, 63, abi.LHCALL_NOTIFY, 0x9999)
        assert guest.run() == Notify(0x9999)
        for slot in range(abi.LHCALL_RING_SIZE - 1):
            found = guest.host._guest.gates[0x40 + slot]
            assert found is not None
            assert found.handler == 0x10000 * slot + slot
        status = EXPECTED[era.name].fields[1]
        assert status is not None
        assert bytes(guest.memory.view[DATA + status : DATA + status + 64]) == FREE
        guest.finish()


@every_era
def test_an_interrupt_that_waits_leaves_its_mark_only_where_there_is_a_place_for_it(era: abi.GuestAbi) -> None:
    vector = abi.FIRST_EXTERNAL_VECTOR + 1
    code = call(era, abi.LHCALL_NOTIFY, 1) + call(era, abi.LHCALL_FLUSH_ASYNC) + call(era, abi.LHCALL_NOTIFY, 2)
    code += call(era, abi.LHCALL_FLUSH_ASYNC)
    irq_pending, status = EXPECTED[era.name].fields[:2]
    assert status is not None
    with LittleGuest(code, era=era, gates=[vector]) as guest:
        assert guest.run() == Notify(1)
        guest.set_data(abi.DATA_IRQ_ENABLED, 0)
        guest.host.irq(1)
        assert guest.run() == Notify(2)
        assert irq_pending is None or guest.data(irq_pending) == abi.X86_EFLAGS_IF
        assert bytes(guest.memory.view[DATA + status : DATA + status + 64]) == FREE
        guest.set_data(abi.DATA_IRQ_ENABLED, abi.X86_EFLAGS_IF)
        assert guest.run() == Notify(handler(vector))
        assert irq_pending is None or guest.data(irq_pending) == 0
        assert bytes(guest.memory.view[DATA + status : DATA + status + 64]) == FREE


@every_era
def test_a_page_directory_s_entry_is_told_of_by_the_same_number(era: abi.GuestAbi) -> None:
    """SET_PGD, which was SET_PMD."""
    code = call(era, 15, DIRECTORY, 1024)
    assert end(code, era=era) == "Attempt to set pgd 1024/1024"


# LOAD_GDT, of the whole table.

OLD_ERAS = pytest.mark.parametrize("era", [LINUX_2_6_30, LINUX_2_6_26, LINUX_2_6_25], ids=lambda each: each.name)


@OLD_ERAS
def test_a_whole_table_replaces_the_one_before(era: abi.GuestAbi) -> None:
    code = call(era, abi.LHCALL_NOTIFY, 1) + call(era, 3, SPARE, 32)
    with LittleGuest(code, era=era) as guest:
        assert guest.run() == Notify(1)
        table = bytearray(guest.memory.view[0xA000 : 0xA000 + 256]) if era is not LINUX_2_6_30 else bytearray(256)
        struct.pack_into("<II", table, 12 * 8, FLAT_LOW, 0x00CF9B00)
        struct.pack_into("<II", table, 13 * 8, FLAT_LOW, 0x00CF9300)
        struct.pack_into("<II", table, 20 * 8, FLAT_LOW, USER_DATA_HIGH)
        struct.pack_into("<II", table, 21 * 8, 1, 0x00008900)  # a task state
        guest.write(SPARE, bytes(table))
        guest.finish()
        gdt = guest.host._cpu.gdt
        assert list(gdt[24:28]) == [FLAT_LOW, 0x00CFBB00, FLAT_LOW, 0x00CFB300]
        assert list(gdt[40:44]) == [FLAT_LOW, USER_DATA_HIGH, 0, 0]
        # The host's own.
        assert list(gdt[20:24]) == [0] * 4


@OLD_ERAS
@pytest.mark.parametrize("count", [33, 0x20000000, 0xFFFFFFFF])
def test_a_whole_table_has_32_entries_at_most(era: abi.GuestAbi, count: int) -> None:
    assert end(call(era, 3, SPARE, count), era=era) == f"too many gdt entries {count}"


@OLD_ERAS
@pytest.mark.parametrize("address", [RAM_BYTES - 255, 0x80000000, 0xFFFFFF80])
def test_a_whole_table_outside_the_guest_is_the_reason(era: abi.GuestAbi, address: int) -> None:
    assert end(call(era, 3, address, 32), era=era) == f"bad read address {address:#x} len 256"


# vmcall.

VMCALL_ERAS = pytest.mark.parametrize("era", [LINUX_2_6_31, LINUX_2_6_30], ids=lambda each: each.name)


def vmcall(era: abi.GuestAbi, number: int, *arguments: int) -> bytes:
    return call(era, number, *arguments)[:-2] + VMCALL


@VMCALL_ERAS
def test_a_vmcall_is_a_hypercall_and_from_then_on_an_int(era: abi.GuestAbi) -> None:
    init = vmcall(era, abi.LHCALL_LGUEST_INIT, DATA)
    code = init + vmcall(era, abi.LHCALL_NOTIFY, 0x42)
    code += jump(CODE + len(init), CODE + len(code))
    with LittleGuest(code, set_up=False, era=era) as guest:
        for _ in range(3):
            assert guest.run() == Notify(0x42)
            assert bytes(guest.memory.view[CODE : CODE + len(code)]) == code.replace(VMCALL, REWRITTEN)


@VMCALL_ERAS
def test_a_vmcall_in_user_space_is_an_invalid_opcode(era: abi.GuestAbi) -> None:
    with LittleGuest(user=VMCALL + JUMP_TO_SELF, era=era, gates=[INVALID_OPCODE]) as guest:
        frame = guest.trap(INVALID_OPCODE)
        assert (frame.eip, frame.cs) == (USER_CODE, USER_CS)
        assert bytes(guest.memory.view[USER_CODE : USER_CODE + 3]) == VMCALL


@VMCALL_ERAS
@pytest.mark.parametrize("inside", [1, 2, 3])
def test_a_vmcall_may_be_in_pages_that_are_read_only_and_not_neighbours(era: abi.GuestAbi, inside: int) -> None:
    """Virtual pages SPARE and the next; their order in memory is the other way round."""
    first, second = SPARE + 0x5000, SPARE + 0x4000
    at = SPARE + PAGE_SIZE - inside
    code = load(EAX, abi.LHCALL_NOTIFY) + load(EXPECTED[era.name].registers[0], 0x42) + jump(0, 0)[:1]
    code += word(at - (CODE + len(code) + 4))
    with LittleGuest(code, era=era) as guest:
        guest.write(TABLE + 4 * (SPARE >> 12), word(first | 5) + word(second | 5))
        guest.write(first + PAGE_SIZE - inside, VMCALL[:inside])
        guest.write(second, VMCALL[inside:] + NOP + JUMP_TO_SELF)
        assert guest.run() == Notify(0x42)
        found = bytes(guest.memory.view[first + PAGE_SIZE - inside : first + PAGE_SIZE])
        found += bytes(guest.memory.view[second : second + 3 - inside])
        assert found == REWRITTEN


@VMCALL_ERAS
def test_other_invalid_opcodes_stay_what_they_are(era: abi.GuestAbi) -> None:
    for code in (UD2, b"\x0f\x01\xc2"):  # ud2; vmlaunch
        with LittleGuest(code, era=era, gates=[INVALID_OPCODE]) as guest:
            frame = guest.trap(INVALID_OPCODE)
            assert (frame.eip, frame.cs) == (CODE, KERNEL_CS)
            assert bytes(guest.memory.view[CODE : CODE + len(code)]) == code


@pytest.mark.parametrize("era", [LATEST, LINUX_2_6_26, LINUX_2_6_25], ids=lambda each: each.name)
def test_eras_without_vmcall_have_an_invalid_opcode_there(era: abi.GuestAbi) -> None:
    with LittleGuest(VMCALL, era=era, gates=[INVALID_OPCODE]) as guest:
        assert guest.trap(INVALID_OPCODE).eip == CODE
        assert bytes(guest.memory.view[CODE : CODE + 3]) == VMCALL


# Taken for another.


def alike(first: abi.GuestAbi, second: abi.GuestAbi) -> bool:
    """Whether a host cannot tell guests of these eras from each other, nor has to."""
    return first is second or {first.name, second.name} == {"2.6.25", "2.6.26"}


@pytest.mark.parametrize("host_abi", ERAS, ids=[f"taken-for-{name}" for name in ERA_NAMES])
@every_era
def test_a_guest_taken_for_another_is_told_of_by_name(era: abi.GuestAbi, host_abi: abi.GuestAbi) -> None:
    code = call_of(era, abi.LHCALL_LGUEST_INIT, DATA)
    with LittleGuest(code, set_up=False, era=era, host_abi=host_abi) as guest:
        event = guest.run()
        if alike(era, host_abi):
            assert event == Notify(DONE)
            return
        assert isinstance(event, Died), event
        names = [each.name for each in ERAS if alike(each, era)]
        assert event.reason.startswith(f"this guest makes its hypercalls as {era_named(names[0]).kernels} ")
        assert event.reason.endswith(f", not as {host_abi.kernels}: give --guest-abi {' or '.join(names)}")


@VMCALL_ERAS
def test_a_first_vmcall_under_a_host_without_it_is_told_of_by_name(era: abi.GuestAbi) -> None:
    code = vmcall(era, abi.LHCALL_LGUEST_INIT, DATA)
    ended = end(code, set_up=False, era=era, host_abi=LATEST)
    assert ended.endswith(f", not as Linux 3.1 to 3.19: give --guest-abi {era.name}")


def test_who_is_no_guest_of_any_era_hears_of_what_is_wrong() -> None:
    assert end(call(LATEST, 1, 0x1001), set_up=False) == "bad guest page 0x1001"
    assert end(VMCALL, set_up=False) == f"unhandled trap 6 at {CODE:#x} (0x0)"
    assert end(increment(RAM_BYTES), set_up=False, era=LINUX_2_6_25).startswith("unhandled trap 14 at ")
    assert end(set_pte(SPARE, 0), set_up=False) == "hypercall 14 before INIT"


# The test guest.


@every_era
def test_the_test_guest_of_the_era_checks_itself(era: abi.GuestAbi, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", 256)

    code, out, err = run(
        f"abi={era.name} selfcheck disk; poweroff", "-v", "--guest-abi", era.name, "--block", str(disk)
    )

    assert code == 0, out + err
    assert "SELF-CHECK PASSED" in out
    assert f"lguest ABI {era.name}," in out
    assert "not ok" not in out
    assert f" abi={era.name}\n" in err
    assert ("page tables: address=0x" in err) == (era.name in PAGED)


def test_a_test_guest_of_another_era_is_refused_with_what_to_say() -> None:
    code, _out, err = run("abi=2.6.31 poweroff")

    assert code == 1
    assert err.splitlines()[-1] == (
        "lgmp: this guest makes its hypercalls as Linux 2.6.31 to 3.0 does, not as Linux 3.1 to 3.19: "
        "give --guest-abi 2.6.31"
    )
