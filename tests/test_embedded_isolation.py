"""What a guest tries in order to get out of its memory or of ring 1, and how each try ends."""

from __future__ import annotations

import struct

import pytest
from embedded_guest import (
    DIRECTORY,
    DONE,
    DONE_CALL,
    EAX,
    ECX,
    FLAT_LOW,
    KERNEL_STACK,
    NOP,
    RAM_BYTES,
    RESULTS,
    SPARE,
    TABLE,
    UD2,
    USER_CODE,
    USER_CODE_HIGH,
    USER_CS,
    USER_DATA_HIGH,
    USER_DS,
    LittleGuest,
    fetch,
    handler,
    hypercall,
    increment,
    load,
    move_to_ring_3,
    notify,
    set_pte,
    store,
    store_value,
    word,
)

from lgmp.hosts import Died, Notify
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c

PF = 14
GP = 13
PFN_LIMIT = RAM_BYTES >> 12
HOST = 0xFFC00000
WINDOW = 0x10000000  # a virtual address for mappings of the guest's own
OWN_TABLE = SPARE + 0x10000
FLUSH = hypercall(abi.LHCALL_FLUSH_TLB, 1)


def died(guest: LittleGuest) -> str:
    event = guest.run()
    assert isinstance(event, Died), event
    return event.reason


def map_window(entry: int, upper: int = OWN_TABLE | 7) -> bytes:
    """Write the entries that map WINDOW with nothing but stores."""
    return store_value(DIRECTORY + 4 * (WINDOW >> 22), upper) + store_value(OWN_TABLE, entry) + FLUSH


def host_pages(guest: LittleGuest) -> bytes:
    return bytes(guest.host._cpu._host_pages)


# Hypercalls about page tables.


@pytest.mark.parametrize("pfn", [PFN_LIMIT, PFN_LIMIT + 1, 0x80000, HOST >> 12, 0xFFFFF])
@pytest.mark.parametrize("flags", [1, 3, 5, 7])
def test_set_pte_of_a_page_outside_the_guest_ends_it(pfn: int, flags: int) -> None:
    with LittleGuest(hypercall(abi.LHCALL_SET_PTE, DIRECTORY, SPARE, pfn << 12 | flags)) as guest:
        assert died(guest) == "bad page table entry"


def test_set_pte_takes_the_last_page_and_what_is_not_present() -> None:
    code = set_pte(SPARE, (PFN_LIMIT - 1) << 12 | 7) + store_value(SPARE, 0x77)
    code += hypercall(abi.LHCALL_SET_PTE, DIRECTORY, SPARE, 0xFFFFF006)
    with LittleGuest(code) as guest:
        guest.finish()
        assert guest.read(RAM_BYTES - 4096) == 0x77


def test_set_pte_of_a_large_page_ends_the_guest() -> None:
    with LittleGuest(hypercall(abi.LHCALL_SET_PTE, DIRECTORY, SPARE, SPARE | 7 | abi.PAGE_PSE)) as guest:
        assert died(guest) == "bad page table entry"


@pytest.mark.parametrize("address", [HOST, 0xFFFFF000])
def test_set_pte_for_an_address_of_the_host_s_ends_the_guest(address: int) -> None:
    with LittleGuest(hypercall(abi.LHCALL_SET_PTE, DIRECTORY, address, SPARE | 7)) as guest:
        assert died(guest) == "attempt to set pte into Switcher pages"


@pytest.mark.parametrize(
    "entry", [PFN_LIMIT << 12 | 7, HOST | 7, 0xFFFFF001, TABLE | 7 | abi.PAGE_PSE, TABLE | 7 | 0x100]
)
def test_set_pgd_of_a_bad_entry_ends_the_guest(entry: int) -> None:
    code = store_value(DIRECTORY + 4 * 5, entry) + hypercall(abi.LHCALL_SET_PGD, DIRECTORY, 5)
    with LittleGuest(code) as guest:
        assert died(guest) == "bad page directory entry"


@pytest.mark.parametrize("index", [1024, 0x40000000, 0xFFFFFFFF])
def test_set_pgd_past_the_directory_ends_the_guest(index: int) -> None:
    with LittleGuest(hypercall(abi.LHCALL_SET_PGD, DIRECTORY, index)) as guest:
        assert died(guest) == f"Attempt to set pgd {index}/1024"


@pytest.mark.parametrize("directory", [RAM_BYTES, HOST, 0xFFFFF000, DIRECTORY + 4, DIRECTORY + 1, 0x80000000])
@pytest.mark.parametrize("number", [abi.LHCALL_NEW_PGTABLE, abi.LHCALL_SET_PGD])
def test_a_page_directory_is_a_page_of_the_guest(number: int, directory: int) -> None:
    with LittleGuest(hypercall(number, directory)) as guest:
        assert died(guest) == f"bad page directory {directory:#x}"
    with LittleGuest(hypercall(number, directory), paging=False) as guest:
        assert died(guest) == f"bad page directory {directory:#x}"


def test_a_page_directory_may_be_the_last_page_of_the_guest() -> None:
    last = RAM_BYTES - 4096
    code = hypercall(abi.LHCALL_NEW_PGTABLE, last) + increment(RESULTS)
    with LittleGuest(code) as guest:
        guest.write(last, word(TABLE | 7))
        guest.finish()
        assert guest.result() == 1
        assert guest.read(last + 4 * 1023) == guest.host._cpu.switcher_entry


def test_the_first_page_directory_gets_the_host_s_entry_too() -> None:
    with LittleGuest() as guest:
        guest.finish()
        assert guest.read(DIRECTORY + 4 * 1023) == guest.host._cpu.switcher_entry


# Page tables that nobody told the host of.


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("page", range(c.HOST_PAGES))
def test_the_host_s_pages_can_be_mapped_and_read_for_what_that_is_worth(ring: int, page: int) -> None:
    setup = map_window(HOST + (page << 12) | 7)
    use = fetch(EAX, WINDOW + 0x60) + store(EAX, RESULTS)
    code = setup + use if ring == 1 else setup + move_to_ring_3(USER_CODE)
    with LittleGuest(code, gates=[PF, 6]) as guest:
        guest.write(USER_CODE, use + UD2)
        assert guest.run() == Notify(DONE if ring == 1 else handler(6))
        assert guest.result() == struct.unpack_from("<I", host_pages(guest), page * 4096 + 0x60)[0]


WRITES = {
    "mov": store_value(WINDOW + 0x60, 0xFFFFFFFF),
    "mov byte": b"\xc6\x05" + word(WINDOW + 0x60) + b"\xff",
    "inc": increment(WINDOW + 0x60),
    "lock inc": b"\xf0" + increment(WINDOW + 0x60),
    "xchg": b"\x87\x05" + word(WINDOW + 0x60),
    "lock cmpxchg": b"\x31\xc0\xf0\x0f\xb1\x0d" + word(WINDOW + 0x68),
    "lock cmpxchg8b": b"\xf0\x0f\xc7\x0d" + word(WINDOW + 0x60),
    "lock bts": b"\xf0\x0f\xba\x2d" + word(WINDOW + 0x60) + b"\x05",
    "lock xadd": b"\xf0\x0f\xc1\x0d" + word(WINDOW + 0x60),
    "stosd": load(7, WINDOW + 0x60) + b"\xab",
    "rep stosd": load(7, WINDOW + 0x60) + load(ECX, 8) + b"\xf3\xab",
    "fst qword": b"\xd9\xe8\xdd\x15" + word(WINDOW + 0x60),
    "fnsave": b"\xdd\x35" + word(WINDOW + 0x60),
    "fxsave": b"\x0f\xae\x05" + word(WINDOW + 0x60),
    "movups": b"\x0f\x11\x05" + word(WINDOW + 0x60),
    "push": load(4, WINDOW + 0x64) + b"\x68" + word(0xFFFFFFFF),
    "across two pages": store_value(WINDOW - 2 + 0x1000, 0xFFFFFFFF),
    "sgdt": b"\x0f\x01\x05" + word(WINDOW + 0x60),
}


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("page", [0, 1, c.HOST_PAGES - 1])
@pytest.mark.parametrize("write", WRITES)
def test_writes_to_the_host_s_pages_change_nothing_and_end_the_guest(ring: int, page: int, write: str) -> None:
    """Through a mapping of the guest's own making; by every way the CPU has to write, in ring 1 and ring 3."""
    # The next page is the guest's own, for the write that lies in both.
    setup = map_window(HOST + (page << 12) | 7) + store_value(OWN_TABLE + 4, SPARE | 7) + load(EAX, 0) + load(ECX, -1)
    code = setup + WRITES[write] if ring == 1 else setup + move_to_ring_3(USER_CODE)
    with LittleGuest(code, gates=[PF, 6]) as guest:
        guest.write(USER_CODE, WRITES[write] + NOP + UD2)
        before = []
        cpu = guest.host._cpu
        start = cpu.start

        def noting(eip: int) -> int:
            # The set-up loads descriptors, which is the host's own doing.
            before.append(host_pages(guest))
            return start(eip)

        cpu.start = noting  # type: ignore[method-assign]
        reason = died(guest)
        assert reason.startswith("bad page table entry: memory outside the guest was written, which only the host may")
        after = host_pages(guest)
        assert after[:4096] == before[0][:4096]
        assert after[8192:] == before[0][8192:]
        # What the set-up loaded, and nothing besides.
        table = struct.unpack_from("<64I", after, 4096)
        expected = [0] * 64
        for index, high in ((12, 0x00CFBB00), (13, 0x00CFB300), (14, USER_CODE_HIGH), (15, USER_DATA_HIGH)):
            expected[2 * index : 2 * index + 2] = FLAT_LOW, high
        assert list(table) == expected
        assert not any(after[4096 + 256 : 8192])


@pytest.mark.parametrize("ring", [1, 3])
def test_the_host_s_own_mapping_of_its_pages_is_not_for_writing(ring: int) -> None:
    for page in range(c.HOST_PAGES):
        code = store_value(HOST + (page << 12) + 0x60, 0xFFFFFFFF)
        kernel, user = (code, None) if ring == 1 else (b"", code)
        with LittleGuest(kernel, user, gates=[PF]) as guest:
            assert guest.trap(PF).error_code == (3 if ring == 1 else 7)


def test_ring_3_does_not_even_read_the_host_s_own_mapping() -> None:
    with LittleGuest(user=fetch(EAX, HOST + 0x60), gates=[PF]) as guest:
        assert guest.trap(PF).error_code == 5


@pytest.mark.parametrize("page", [RAM_BYTES, RAM_BYTES + 4096, 0x80000000, 0xFFBFF000, 0xFFC10000, 0xFFFFF000])
@pytest.mark.parametrize("access", ["read", "written", "run from"])
@pytest.mark.parametrize("ring", [1, 3])
def test_memory_that_is_not_there_ends_the_guest_with_the_reason(page: int, access: str, ring: int) -> None:
    use = {
        "read": fetch(EAX, WINDOW),
        "written": store(EAX, WINDOW),
        "run from": load(EAX, WINDOW) + b"\xff\xe0",  # jmp eax
    }[access]
    setup = map_window(page | 7)
    code = setup + use if ring == 1 else setup + move_to_ring_3(USER_CODE)
    with LittleGuest(code, gates=[PF, 6]) as guest:
        guest.write(USER_CODE, use + NOP + UD2)
        reason = died(guest)
        assert reason.startswith(f"bad page table entry: memory outside the guest was {access} at ")
        # It stays dead, and this process lives.
        assert died(guest) == reason


@pytest.mark.parametrize("table", [RAM_BYTES, 0x80000000, 0xFFBFF000, 0xFFFFF000])
@pytest.mark.parametrize("access", ["read", "write", "run"])
def test_page_tables_outside_memory_map_nothing_of_ours(table: int, access: str) -> None:
    use = {
        "read": fetch(EAX, WINDOW + 0x123),
        "write": store_value(WINDOW + 0x123, 0xFFFFFFFF),
        "run": load(EAX, WINDOW + 0x123) + b"\xff\xe0",
    }[access]
    with LittleGuest(map_window(0, upper=table | 7) + use, gates=[PF, GP, 6]) as guest:
        event = guest.run()
        # An absent entry, or the end.
        assert event == Notify(handler(PF)) or (
            isinstance(event, Died) and event.reason.startswith("bad page table entry: memory outside the guest was ")
        )


def test_the_host_s_pages_as_page_tables_get_accessed_and_dirty_bits_and_no_others() -> None:
    """The CPU marks an entry wherever it finds it, in read-only memory too, and descriptors can look like entries.

    In the host's own page table both bits are set from the start. In a descriptor they are bits of the limit and of the
    base, which are the guest's to choose anyway.
    """
    entry = SPARE | 7
    code = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 0, entry, USER_DATA_HIGH)
    code += map_window(0, upper=HOST + 4096 | 7) + store_value(WINDOW, 0x77) + increment(RESULTS)
    with LittleGuest(code, gates=[PF]) as guest:
        guest.finish()
        before = [0] * 64
        for index, low, high in ((0, entry, USER_DATA_HIGH), (12, FLAT_LOW, 0x00CFBB00), (13, FLAT_LOW, 0x00CFB300)):
            before[2 * index : 2 * index + 2] = low, high
        for index, high in ((14, USER_CODE_HIGH), (15, USER_DATA_HIGH)):
            before[2 * index : 2 * index + 2] = FLAT_LOW, high
        marked = abi.PAGE_ACCESSED | abi.PAGE_DIRTY
        assert [word & ~marked for word in guest.host._cpu.gdt] == [word & ~marked for word in before]
        assert guest.read(SPARE) == 0x77
    code = map_window(0, upper=HOST | 7) + store_value(WINDOW + 0x400, 1)
    with LittleGuest(code, gates=[PF]) as guest:
        guest.trap(PF)
        own = [HOST + page * 4096 | 0x61 for page in range(c.HOST_PAGES)]
        assert list(guest.host._cpu._words[:1024]) == own + [0] * (1024 - c.HOST_PAGES)


@pytest.mark.parametrize("entry", [HOST | 7, HOST | 0x67, RAM_BYTES | 7, 0xFFFFF007])
def test_a_stack_behind_a_bad_entry_ends_the_guest(entry: int) -> None:
    for upper, what in ((OWN_TABLE | 7, "bad page table entry"), (entry, "bad page directory entry")):
        code = hypercall(abi.LHCALL_SET_STACK, 0x69, WINDOW + 0x800, 1) + map_window(entry, upper)
        with LittleGuest(code + move_to_ring_3(USER_CODE), gates=[6]) as guest:
            guest.write(USER_CODE, UD2)
            assert died(guest) == what


def test_large_pages_are_no_way_around_the_tables() -> None:
    """The CPU has no 4 MiB pages: an entry that asks for one is a page table like any other."""
    with LittleGuest(
        map_window(SPARE | 7, upper=OWN_TABLE | 7 | abi.PAGE_PSE) + fetch(EAX, WINDOW) + store(EAX, RESULTS)
    ) as guest:
        guest.write(SPARE, word(0x77))
        guest.finish()
        assert guest.result() == 0x77


def test_a_guest_without_page_tables_sees_its_memory_and_no_more() -> None:
    code = fetch(EAX, RAM_BYTES - 4) + store(EAX, RESULTS) + fetch(EAX, RAM_BYTES)
    with LittleGuest(code, paging=False) as guest:
        guest.write(RAM_BYTES - 4, word(0x77))
        assert died(guest).startswith("bad page table entry: memory outside the guest was read at ")
        assert guest.result() == 0x77
    with LittleGuest(store_value(HOST + 0x60, 1), paging=False) as guest:
        assert died(guest).startswith("bad page table entry: memory outside the guest was written, which only the host")


# Rings.


def far_jump(selector: int, offset: int = 0) -> bytes:
    """jmp selector:offset."""
    return b"\xea" + word(offset) + struct.pack("<H", selector)


def far_call(selector: int, offset: int = 0) -> bytes:
    """call selector:offset."""
    return b"\x9a" + word(offset) + struct.pack("<H", selector)


def call_gate(selector: int, offset: int) -> tuple[int, int]:
    return selector << 16 | offset & 0xFFFF, offset & 0xFFFF0000 | 0xEC00


TASK_STATE = ((SPARE & 0xFFFF) << 16 | 103, 0xE900 | SPARE >> 16)
LDT = ((SPARE & 0xFFFF) << 16 | 0xFFFF, 0xE200 | SPARE >> 16)
TASK_GATE = (0xA0 << 16, 0xE500)
SYSTEM = {
    "a call gate": call_gate(21 * 8, USER_CODE),
    "a task state": TASK_STATE,
    "an LDT": LDT,
    "a task gate": TASK_GATE,
}


@pytest.mark.parametrize("what", SYSTEM)
@pytest.mark.parametrize("how", ["jmp", "call"])
@pytest.mark.parametrize("ring", [1, 3])
def test_system_descriptors_are_never_there(what: str, how: str, ring: int) -> None:
    load_them = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, *SYSTEM[what])
    load_them += hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 21, FLAT_LOW, 0x00CF9B00)
    use = (far_jump if how == "jmp" else far_call)(20 * 8 | 3)
    code = load_them + (use if ring == 1 else move_to_ring_3(USER_CODE))
    with LittleGuest(code, gates=[GP, 10, 11]) as guest:
        guest.write(USER_CODE, use)
        assert guest.trap(GP).error_code == 20 * 8
        assert list(guest.host._cpu.gdt[40:42]) == [0, 0]


def test_a_code_segment_of_ring_0_is_ring_1_s() -> None:
    code = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, FLAT_LOW, 0x00CF9A00) + far_jump(20 * 8, SPARE)
    # mov eax, cs
    with LittleGuest(code, gates=[GP]) as guest:
        guest.write(SPARE, b"\x8c\xc8" + store(EAX, RESULTS) + DONE_CALL)
        guest.finish()
        assert guest.result() == 20 * 8 | 1


@pytest.mark.parametrize("index", [10, 11, 16, 31])
def test_the_descriptors_of_the_host_s_are_not_the_guest_s_to_set(index: int) -> None:
    code = (
        hypercall(abi.LHCALL_LOAD_GDT_ENTRY, index, FLAT_LOW, USER_DATA_HIGH) + load(EAX, index * 8 | 3) + b"\x8e\xe0"
    )
    with LittleGuest(code, gates=[GP]) as guest:
        assert guest.trap(GP).error_code == index * 8


@pytest.mark.parametrize("ring", [1, 3])
def test_there_is_no_local_descriptor_table(ring: int) -> None:
    """After a reset Unicorn's could lie at address 0, where a guest can write."""
    use = far_call(2 * 8 | 7)
    kernel, user = (use, None) if ring == 1 else (b"", use)
    with LittleGuest(kernel, user, gates=[GP]) as guest:
        guest.write(8, struct.pack("<II", FLAT_LOW, 0x00CF9B00))
        guest.write(16, struct.pack("<II", *call_gate(1 * 8 | 4, USER_CODE)))
        assert guest.trap(GP).error_code == 2 * 8 | 4
    data = load(EAX, 8 | 7) + b"\x8e\xe0"  # mov fs, ax
    kernel, user = (data, None) if ring == 1 else (b"", data)
    with LittleGuest(kernel, user, gates=[GP]) as guest:
        guest.write(8, struct.pack("<II", FLAT_LOW, USER_DATA_HIGH))
        assert guest.trap(GP).error_code == 8 | 4


FORGED = SPARE + 0x8000
FORGED_TABLE = SPARE + 0x9000
FORGED_TASK = SPARE + 0xA000
RING_0_CODE = 18 * 8
RING_0_DATA = 19 * 8


def forge(guest: LittleGuest, *, task_directory: int = DIRECTORY, task_cs: int = RING_0_CODE) -> None:
    """A table of descriptors of the guest's own making, which FORGE puts where the CPU looks for the host's."""
    for number in range(1024):
        guest.words[(FORGED_TABLE >> 2) + number] = FORGED | 7
    for selector, low, high in (
        (12 * 8, FLAT_LOW, 0x00CFBB00),
        (13 * 8, FLAT_LOW, 0x00CFB300),
        (14 * 8, FLAT_LOW, USER_CODE_HIGH),
        (15 * 8, FLAT_LOW, USER_DATA_HIGH),
        (RING_0_CODE, FLAT_LOW, 0x00CF9B00),
        (RING_0_DATA, FLAT_LOW, 0x00CF9300),
        (20 * 8, *call_gate(RING_0_CODE, USER_CODE)),
        (21 * 8, (FORGED_TASK & 0xFFFF) << 16 | 103, 0xE900 | FORGED_TASK >> 16),
        (22 * 8, FLAT_LOW, 0x00CF9F00),  # conforming code of ring 0
    ):
        guest.write(FORGED + selector, struct.pack("<II", low, high))
    ss = {0: RING_0_DATA, 1: 13 * 8 | 1, 3: USER_DS}[task_cs & 3]
    task = {28: task_directory, 32: USER_CODE, 36: 2, 56: KERNEL_STACK, 72: ss, 76: task_cs, 80: ss, 84: ss}
    for offset, value in task.items():
        guest.write(FORGED_TASK + offset, word(value))


FORGE = store_value(DIRECTORY + 4 * 1023, FORGED_TABLE | 7) + FLUSH
# mov cr3, eax; then to show that it ran at all
IN_RING_0 = b"\x0f\x22\xd8" + increment(RESULTS) + UD2


@pytest.mark.parametrize("how", ["jmp", "call"])
def test_forged_descriptors_of_a_task_do_not_run_one_instruction_in_ring_0(how: str) -> None:
    use = (far_jump if how == "jmp" else far_call)(21 * 8)
    with LittleGuest(FORGE + use, gates=[GP, PF, 6, 10, 11]) as guest:
        forge(guest)
        guest.write(USER_CODE, increment(RESULTS) + IN_RING_0)
        assert died(guest) == f"the guest gave itself ring 0 at {USER_CODE:#x}"
        assert guest.result() == 0


def test_a_cpu_that_is_stopped_on_its_way_into_ring_0_is_not_started_again() -> None:
    with LittleGuest(notify(1)) as guest:
        assert guest.run() == Notify(1)
        cpu = guest.host._cpu

        def stopped_in_ring_0(_eip: int) -> int:
            cpu.d[c.HFLAGS] &= ~c.HF_CPL_MASK
            return 0

        cpu.start = stopped_in_ring_0  # type: ignore[method-assign, assignment]
        assert died(guest).startswith("the guest gave itself ring 0 at ")


@pytest.mark.parametrize("ring", [1, 3])
def test_a_forged_call_gate_finds_no_stack(ring: int) -> None:
    """Without a task state Unicorn would abort, and this process with it."""
    use = far_call(20 * 8 | 3)
    with LittleGuest(FORGE + (use if ring == 1 else move_to_ring_3(USER_CODE + 0x100)), gates=[GP, 10]) as guest:
        forge(guest)
        guest.write(USER_CODE, increment(RESULTS) + IN_RING_0)
        guest.write(USER_CODE + 0x100, use)
        assert guest.trap(10).error_code == 0
        assert guest.result() == 0


def test_forged_conforming_code_stays_in_its_ring() -> None:
    with LittleGuest(FORGE + far_jump(22 * 8, SPARE), gates=[GP]) as guest:
        forge(guest)
        guest.write(SPARE, b"\x8c\xc8" + store(EAX, RESULTS) + DONE_CALL)  # mov eax, cs
        guest.finish()
        assert guest.result() & 3 == 1


@pytest.mark.parametrize("directory", [0x80000000, RAM_BYTES, 0xFFFFF000, HOST])
@pytest.mark.parametrize("ring", [1, 3])
def test_page_tables_that_a_forged_task_brings_do_not_lead_the_host_astray(directory: int, ring: int) -> None:
    cs = {1: 12 * 8 | 1, 3: USER_CS}[ring]
    with LittleGuest(FORGE + far_jump(21 * 8), gates=[GP, PF, 6, 10, 11]) as guest:
        forge(guest, task_directory=directory, task_cs=cs)
        guest.write(USER_CODE, UD2)
        event = guest.run()
        assert isinstance(event, (Died, Notify))
        assert guest.ring != 0


def test_a_guest_that_overwrites_the_last_entry_without_using_it_goes_on() -> None:
    code = store_value(DIRECTORY + 4 * 1023, 0) + FLUSH + increment(RESULTS)
    with LittleGuest(code) as guest:
        guest.finish()
        assert guest.result() == 1


def test_a_guest_that_takes_the_descriptors_away_from_its_cpu_faults() -> None:
    # mov fs, ax: the CPU looks for the descriptor where nothing is mapped any more
    code = store_value(DIRECTORY + 4 * 1023, 0) + FLUSH + load(EAX, USER_DS) + b"\x8e\xe0"
    with LittleGuest(code, gates=[PF]) as guest:
        assert guest.trap(PF).error_code == 0
        assert guest.data(abi.DATA_CR2) & ~0xFFF == HOST + 4096


def test_new_pgtable_gives_the_host_its_entry_back() -> None:
    code = FORGE + hypercall(abi.LHCALL_NEW_PGTABLE, DIRECTORY) + load(EAX, USER_DS) + b"\x8e\xe0" + notify(1)
    with LittleGuest(code) as guest:
        assert guest.run() == Notify(1)
        assert guest.read(DIRECTORY + 4 * 1023) == guest.host._cpu.switcher_entry
