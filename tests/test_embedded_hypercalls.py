"""The hypercalls of little guests: what each does, in lg's words where it ends the guest."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from embedded_guest import (
    CODE,
    DATA,
    DIRECTORY,
    DONE,
    EAX,
    EBP,
    EBX,
    ECX,
    EDI,
    EDX,
    ESI,
    KERNEL_DS,
    KERNEL_STACK,
    MEASURED_NANOSECONDS,
    RAM_BYTES,
    RESULTS,
    SPARE,
    TABLE,
    UD2,
    USER_CODE,
    USER_DS,
    LittleGuest,
    fetch,
    gate,
    handler,
    hypercall,
    increment,
    interrupt,
    load,
    move_to_ring_3,
    notify,
    set_pte,
    store,
    store_value,
    word,
)

from lgmp.hosts import Break, Died, Notify, Reboot
from lgmp.hosts.embedded import abi, clock
from lgmp.hosts.embedded import cpu as c

GP = 13
DATA_HIGH = 0x00CFF300


def reason(code: bytes, **more: object) -> str:
    """What a guest that runs `code` in ring 1 dies of."""
    with LittleGuest(code, **more) as guest:  # type: ignore[arg-type]
        event = guest.run()
        assert isinstance(event, Died), event
        return event.reason


# The start.


def test_a_guest_starts_in_ring_1_with_flat_segments_and_empty_registers() -> None:
    with LittleGuest(UD2, set_up=False) as guest:
        cpu = guest.host._cpu
        assert [guest.register(number) for number in range(8)] == [0] * 8
        assert (guest.ring, cpu.d[c.CS_SELECTOR], cpu.d[c.SS_SELECTOR]) == (1, 0x61, 0x69)
        assert cpu.read_eflags() == abi.X86_EFLAGS_IF | abi.X86_EFLAGS_FIXED


def test_lguest_init_comes_first() -> None:
    assert reason(hypercall(abi.LHCALL_NOTIFY), set_up=False) == "hypercall 17 before INIT"
    assert reason(hypercall(0), set_up=False) == "hypercall 0 before INIT"
    assert reason(hypercall(99), set_up=False) == "hypercall 99 before INIT"


def test_lguest_init_comes_once() -> None:
    assert reason(hypercall(abi.LHCALL_LGUEST_INIT, DATA)) == "already have lguest_data"


def test_lguest_init_fills_what_is_the_host_s_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SHORTEST_NANOSECONDS", MEASURED_NANOSECONDS)
    monkeypatch.setattr(clock, "_counter_is_steady", lambda: True)
    before = time.time()
    with LittleGuest() as guest:
        started = (time.monotonic_ns(), guest.host._cpu.read_tsc())
        guest.finish()
        assert guest.data(abi.LATEST.reserve_mem) == 0x400000
        assert before - 1 <= guest.data(abi.DATA_TIME) <= time.time()
        assert guest.data(abi.DATA_TIME + 4) < 1_000_000_000
        while time.monotonic_ns() - started[0] < MEASURED_NANOSECONDS:
            pass
        khz = (guest.host._cpu.read_tsc() - started[1]) * 1_000_000 / (time.monotonic_ns() - started[0])
        assert guest.data(abi.LATEST.tsc_khz) == pytest.approx(khz, rel=0.05)


def test_a_counter_that_changes_its_speed_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_counter_is_steady", lambda: False)
    with LittleGuest() as guest:
        guest.finish()
        assert guest.data(abi.LATEST.tsc_khz) == 0


@pytest.mark.parametrize(
    "address", [RAM_BYTES - abi.LATEST.data_size + 4, RAM_BYTES, 0xFFFFF000, 0xFFFFFFFC, 0x80000000, 0x1001]
)
def test_lguest_data_must_be_in_the_guest(address: int) -> None:
    assert reason(hypercall(abi.LHCALL_LGUEST_INIT, address), set_up=False) == f"bad guest page {address:#x}"


def test_lguest_data_may_be_the_last_bytes_of_the_guest() -> None:
    at = RAM_BYTES - abi.LATEST.data_size
    with LittleGuest(hypercall(abi.LHCALL_LGUEST_INIT, at) + hypercall(abi.LHCALL_NOTIFY, DONE), set_up=False) as guest:
        guest.write(at, bytes(guest.memory.view[DATA : DATA + abi.LATEST.data_size]))
        assert guest.run() == Notify(DONE)


@pytest.mark.parametrize("vector", [0, 31, 256, 0xFFFFFFFF])
def test_a_syscall_vector_is_none_of_the_traps(vector: int) -> None:
    init = hypercall(abi.LHCALL_LGUEST_INIT, DATA)
    assert reason(init, set_up=False, data={abi.LATEST.syscall_vec: vector}) == f"bad syscall vector {vector}"


@pytest.mark.parametrize("address", [0xFFC00000, 0xFFFFFFFF])
def test_a_kernel_is_below_the_host(address: int) -> None:
    init = hypercall(abi.LHCALL_LGUEST_INIT, DATA)
    ended = reason(init, set_up=False, data={abi.LATEST.kernel_address: address})
    assert ended == f"bad kernel address {address:#x}"


# Calls that are none.


@pytest.mark.parametrize("number", [3, 11, 12, 16 + 4, 21, 255, 0x80000000, 0xFFFFFFFF])
def test_a_number_that_is_no_hypercall_ends_the_guest(number: int) -> None:
    assert reason(hypercall(number)) == f"Bad hypercall {number}"


def test_a_pae_guest_is_told_so() -> None:
    assert reason(hypercall(abi.LHCALL_SET_PMD)) == "Bad hypercall 13: a PAE guest; build it without CONFIG_X86_PAE"


def test_a_hypercall_keeps_every_register() -> None:
    before = {EAX: abi.LHCALL_TS, EBX: 0, ECX: 0x11111111, EDX: 0x22222222, ESI: 0x33333333, EDI: 0x44444444, EBP: 5}
    loads = b"".join(load(register, value) for register, value in before.items())
    stores = b"".join(store(register, RESULTS + 4 * register) for register in before)
    with LittleGuest(loads + interrupt(0x1F) + stores) as guest:
        guest.finish()
        assert {register: guest.result(register) for register in before} == before


# SHUTDOWN.


def test_shutdown_ends_the_guest_with_its_message() -> None:
    with LittleGuest(hypercall(abi.LHCALL_SHUTDOWN, SPARE, abi.LGUEST_SHUTDOWN_POWEROFF)) as guest:
        guest.write(SPARE, b"Power down\0and not this")
        assert guest.run() == Died("CRASH: Power down")
        assert guest.run() == Died("CRASH: Power down")


@pytest.mark.parametrize("message", [SPARE, 0x40000000])  # the second is Linux's __pa(NULL): reboot without a reason
def test_shutdown_with_restart_is_a_reboot_whatever_its_message(message: int) -> None:
    with LittleGuest(hypercall(abi.LHCALL_SHUTDOWN, message, abi.LGUEST_SHUTDOWN_RESTART)) as guest:
        assert isinstance(guest.run(), Reboot)


def test_a_shutdown_message_is_127_bytes_at_most_and_any_bytes() -> None:
    with LittleGuest(hypercall(abi.LHCALL_SHUTDOWN, SPARE, 1)) as guest:
        guest.write(SPARE, b"x" * 4096)
        assert guest.run() == Died("CRASH: " + "x" * 127)
    with LittleGuest(hypercall(abi.LHCALL_SHUTDOWN, SPARE, 1)) as guest:
        guest.write(SPARE, b"\xff\xfe!\0")
        assert guest.run() == Died("CRASH: \ufffd\ufffd!")


@pytest.mark.parametrize("address", [RAM_BYTES - 127, RAM_BYTES, 0x80000000, 0xFFFFFF80, 0xFFFFFFFF])
def test_a_shutdown_message_outside_the_guest_is_the_reason(address: int) -> None:
    call = hypercall(abi.LHCALL_SHUTDOWN, address, abi.LGUEST_SHUTDOWN_POWEROFF)
    assert reason(call) == f"bad read address {address:#x} len 128"


def test_a_shutdown_message_may_be_the_last_bytes_of_the_guest() -> None:
    assert reason(hypercall(abi.LHCALL_SHUTDOWN, RAM_BYTES - 128, 1)) == "CRASH: "


# Descriptors.


def test_a_descriptor_loaded_is_there_for_segment_registers() -> None:
    # A segment from RESULTS on; mov fs, ax; mov dword fs:[4], 0x77
    code = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, (RESULTS & 0xFFFF) << 16 | 0xFFFF, DATA_HIGH)
    code += load(EAX, 20 * 8 | 3) + b"\x8e\xe0" + b"\x64\xc7\x05" + word(4) + word(0x77)
    with LittleGuest(code) as guest:
        guest.finish()
        assert guest.result(1) == 0x77


def test_three_tls_descriptors_are_loaded_from_guest_memory() -> None:
    # mov gs, 0x33; mov dword gs:[8], 0x99, in ring 3
    user = load(EAX, 0x33) + b"\x8e\xe8" + b"\x65\xc7\x05" + word(8) + word(0x99) + UD2
    kernel = hypercall(abi.LHCALL_LOAD_TLS, SPARE) + move_to_ring_3(USER_CODE)
    with LittleGuest(kernel, gates=[6]) as guest:
        guest.write(SPARE, struct.pack("<IIIIII", (RESULTS & 0xFFFF) << 16 | 0xFFFF, DATA_HIGH, 1, 0x9200, 0, 0))
        guest.write(USER_CODE, user)
        guest.trap(6)
        assert guest.result(2) == 0x99
        # Privilege 0 becomes 1, and accessed.
        assert list(guest.host._cpu.gdt[12:18]) == [(RESULTS & 0xFFFF) << 16 | 0xFFFF, DATA_HIGH, 1, 0xB300, 0, 0]


@pytest.mark.parametrize("address", [RAM_BYTES - 23, 0xFFFFFFF0])
def test_tls_descriptors_outside_the_guest_are_the_reason(address: int) -> None:
    assert reason(hypercall(abi.LHCALL_LOAD_TLS, address)) == f"bad read address {address:#x} len 24"


def test_tls_descriptors_may_be_the_last_bytes_of_the_guest() -> None:
    with LittleGuest(hypercall(abi.LHCALL_LOAD_TLS, RAM_BYTES - 24)) as guest:
        guest.finish()


@pytest.mark.parametrize("index", [32, 0x10000006, 0xFFFFFFFF])
def test_too_many_descriptors_end_the_guest(index: int) -> None:
    assert reason(hypercall(abi.LHCALL_LOAD_GDT_ENTRY, index, 0, 0)) == f"too many gdt entries {index}"


# Gates.


@pytest.mark.parametrize("number", [256, 300, 0x80000000, 0xFFFFFFFF])
def test_there_are_256_gates(number: int) -> None:
    assert reason(hypercall(abi.LHCALL_LOAD_IDT_ENTRY, number, *gate(CODE))) == f"Setting idt entry {number}"


@pytest.mark.parametrize("kind", [0, 5, 6, 7, 0xC, 0xD])
def test_a_gate_of_another_type_ends_the_guest(kind: int) -> None:
    bad = hypercall(abi.LHCALL_LOAD_IDT_ENTRY, 6, 0, 0x8000 | kind << 8)
    assert reason(bad) == f"bad IDT type {kind}"


@pytest.mark.parametrize("number", [2, 8, 15, 0x1F])
def test_gates_that_a_guest_never_handles_are_ignored_whatever_they_hold(number: int) -> None:
    code = hypercall(abi.LHCALL_LOAD_IDT_ENTRY, number, 0, 0x8500)
    code += hypercall(abi.LHCALL_LOAD_IDT_ENTRY, number, *gate(handler(number), privilege=3))
    with LittleGuest(code) as guest:
        guest.finish()
        assert guest.host._guest.gates[number] is None


def test_a_gate_can_be_taken_back() -> None:
    code = hypercall(abi.LHCALL_LOAD_IDT_ENTRY, 6, 0, 0)
    assert reason(code + UD2, gates=[6]) == f"unhandled trap 6 at {CODE + len(code):#x} (0x0)"


# SET_STACK.


@pytest.mark.parametrize("selector", [0, 0x68, 0x6A, USER_DS, 32 * 8 | 1, 0xFFFF0069])
def test_a_stack_segment_is_ring_1_s(selector: int) -> None:
    assert reason(hypercall(abi.LHCALL_SET_STACK, selector, KERNEL_STACK, 1)) == f"bad stack segment {selector}"


@pytest.mark.parametrize("pages", [3, 0xFFFFFFFF])
def test_a_stack_has_two_pages_at_most(pages: int) -> None:
    assert reason(hypercall(abi.LHCALL_SET_STACK, KERNEL_DS, KERNEL_STACK, pages)) == f"bad stack pages {pages}"


# The asynchronous ring.


def ring_call(guest: LittleGuest, slot: int, *arguments: int, status: int = 0) -> None:
    """Put a call into a slot of the ring, as guests do: the arguments first, then the status."""
    words = (*arguments, *[0] * (abi.LATEST.hcall_words - len(arguments)))
    guest.write(DATA + abi.LATEST.hcalls + 20 * slot, struct.pack("<5I", *words))
    guest.write(DATA + abi.LATEST.hcall_status + slot, bytes([status]))


def ring_status(guest: LittleGuest) -> bytes:
    at = DATA + abi.LATEST.hcall_status
    return bytes(guest.memory.view[at : at + abi.LHCALL_RING_SIZE])


FREE = bytes([abi.HCALL_FREE]) * abi.LHCALL_RING_SIZE
FLUSH = hypercall(abi.LHCALL_FLUSH_ASYNC)


def test_the_ring_is_carried_out_in_order_before_the_call_that_comes() -> None:
    # The same descriptor by three of them, and then by the call itself.
    last = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, 4, DATA_HIGH)
    with LittleGuest(notify(1) + last) as guest:
        assert guest.run() == Notify(1)
        for slot in range(3):
            ring_call(guest, slot, abi.LHCALL_LOAD_GDT_ENTRY, 20, slot + 1, DATA_HIGH)
        ring_call(guest, 3, abi.LHCALL_LOAD_GDT_ENTRY, 21, 9, DATA_HIGH)
        guest.finish()
        assert (guest.host._cpu.gdt[40], guest.host._cpu.gdt[42]) == (4, 9)
        assert ring_status(guest) == FREE


def test_the_ring_goes_on_where_it_was_left_and_wraps() -> None:
    with LittleGuest(notify(1) + (FLUSH + notify(2)) * 3) as guest:
        assert guest.run() == Notify(1)
        slot = 0
        for _round in range(3):
            for number in range(40):
                ring_call(guest, slot, abi.LHCALL_LOAD_GDT_ENTRY, 20, 1000 * _round + number, DATA_HIGH)
                slot = (slot + 1) % abi.LHCALL_RING_SIZE
            assert guest.run() == Notify(2)
            assert guest.host._cpu.gdt[40] == 1000 * _round + 39
            assert ring_status(guest) == FREE
        assert guest.host._guest.next_hcall == 120 % 64


def test_a_call_beyond_a_free_slot_waits() -> None:
    with LittleGuest(notify(1) + FLUSH + notify(2) + FLUSH + notify(3)) as guest:
        assert guest.run() == Notify(1)
        ring_call(guest, 1, abi.LHCALL_LOAD_GDT_ENTRY, 20, 7, DATA_HIGH)
        assert guest.run() == Notify(2)
        assert (guest.host._cpu.gdt[40], ring_status(guest)[1]) == (0, 0)
        ring_call(guest, 0, abi.LHCALL_TS, 0)
        assert guest.run() == Notify(3)
        assert (guest.host._cpu.gdt[40], ring_status(guest)) == (7, FREE)


def test_a_ring_that_never_empties_is_gone_round_once() -> None:
    """Each call of the ring is put back as soon as the next has begun, by what stands for another CPU of the guest."""
    with LittleGuest(notify(1) + FLUSH + notify(2)) as guest:
        assert guest.run() == Notify(1)
        for slot in range(abi.LHCALL_RING_SIZE):
            ring_call(guest, slot, abi.LHCALL_LOAD_GDT_ENTRY, 20, slot, DATA_HIGH)
        counted = []
        table = guest.host._table
        original = table.load

        def refill(index: int, low: int, high: int) -> None:
            counted.append(low)
            original(index, low, high)
            if len(counted) <= 200:
                ring_call(guest, (low - 1) % 64, abi.LHCALL_LOAD_GDT_ENTRY, 20, (low - 1) % 64, DATA_HIGH)

        table.load = refill  # type: ignore[method-assign]
        assert guest.run() == Notify(2)
        # Once for FLUSH_ASYNC, and once for the NOTIFY after it.
        assert len(counted) == 2 * abi.LHCALL_RING_SIZE


@pytest.mark.parametrize("status", [0, 1, 0x7F, 0xFE])
def test_every_status_but_free_is_a_call(status: int) -> None:
    with LittleGuest(notify(1) + FLUSH + notify(2)) as guest:
        assert guest.run() == Notify(1)
        ring_call(guest, 0, abi.LHCALL_LOAD_GDT_ENTRY, 20, 5, DATA_HIGH, status=status)
        assert guest.run() == Notify(2)
        assert (guest.host._cpu.gdt[40], ring_status(guest)) == (5, FREE)


def test_a_notify_of_the_ring_comes_first_and_the_rest_after_it() -> None:
    code = notify(1) + hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, 9, DATA_HIGH)
    with LittleGuest(code) as guest:
        assert guest.run() == Notify(1)
        ring_call(guest, 0, abi.LHCALL_NOTIFY, 0x111)
        ring_call(guest, 1, abi.LHCALL_LOAD_GDT_ENTRY, 20, 5, DATA_HIGH)
        ring_call(guest, 2, abi.LHCALL_NOTIFY, 0x222)
        assert guest.run() == Notify(0x111)
        assert guest.host._cpu.gdt[40] == 0
        assert guest.run() == Notify(0x222)
        assert guest.host._cpu.gdt[40] == 5
        assert guest.run() == Notify(DONE)
        assert guest.host._cpu.gdt[40] == 9
        assert ring_status(guest) == FREE


def test_a_break_between_a_notify_of_the_ring_and_its_call_loses_nothing() -> None:
    with LittleGuest(notify(1) + hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, 9, DATA_HIGH) + increment(RESULTS)) as guest:
        assert guest.run() == Notify(1)
        ring_call(guest, 0, abi.LHCALL_NOTIFY, 0x111)
        assert guest.run() == Notify(0x111)
        guest.host.break_in()
        assert isinstance(guest.run(), Break)
        assert guest.run() == Notify(DONE)
        assert (guest.host._cpu.gdt[40], guest.result()) == (9, 1)


def test_a_bad_call_in_the_ring_ends_the_guest_like_any_other() -> None:
    with LittleGuest(notify(1) + FLUSH) as guest:
        assert guest.run() == Notify(1)
        ring_call(guest, 0, 0xFFFFFFFF, 1, 2, 3, 4)
        assert guest.run() == Died(f"Bad hypercall {0xFFFFFFFF}")


def test_a_shutdown_in_the_ring_ends_the_guest_before_the_call_that_comes() -> None:
    with LittleGuest(notify(1) + hypercall(abi.LHCALL_NOTIFY, 2)) as guest:
        assert guest.run() == Notify(1)
        guest.write(SPARE, b"Power down\0")
        ring_call(guest, 0, abi.LHCALL_SHUTDOWN, SPARE, 1)
        assert guest.run() == Died("CRASH: Power down")


# NOTIFY.


@pytest.mark.parametrize("address", [0, 1, RAM_BYTES, 0x80000000, 0xFFFFFFFF])
def test_a_notify_address_reaches_the_launcher_as_it_is(address: int) -> None:
    with LittleGuest(notify(address)) as guest:
        assert guest.run() == Notify(address)
        assert guest.run() == Notify(DONE)


# Page tables: what a hypercall makes the CPU see.


def test_set_pte_makes_a_new_page_seen_and_an_old_one_forgotten() -> None:
    code = (
        fetch(EAX, SPARE)  # the address is now known to the CPU
        + set_pte(SPARE, SPARE + 0x1000 | 7)
        + fetch(EAX, SPARE)
        + store(EAX, RESULTS)
        + set_pte(SPARE, 0)
        + fetch(EAX, SPARE)
    )
    with LittleGuest(code, gates=[14]) as guest:
        guest.write(SPARE + 0x1000, word(0x77))
        assert guest.trap(14).error_code == 0
        assert guest.result() == 0x77
        assert guest.data(abi.DATA_CR2) == SPARE


def test_set_pte_for_a_kernel_address_counts_whatever_the_page_directory() -> None:
    code = (
        fetch(EAX, SPARE)
        + set_pte(SPARE, SPARE + 0x1000 | 7, directory=SPARE + 0x5000)
        + fetch(EAX, SPARE)
        + store(EAX, RESULTS)
    )
    with LittleGuest(code, data={abi.LATEST.kernel_address: SPARE}) as guest:
        guest.write(SPARE + 0x1000, word(0x77))
        guest.finish()
        assert guest.result() == 0x77


def test_flush_tlb_makes_the_cpu_look_again() -> None:
    for everything in (0, 1):
        code = (
            fetch(EAX, SPARE)
            + store_value(TABLE + 4 * (SPARE >> 12), SPARE + 0x1000 | 7)
            + hypercall(abi.LHCALL_FLUSH_TLB, everything)
            + fetch(EAX, SPARE)
            + store(EAX, RESULTS)
        )
        with LittleGuest(code) as guest:
            guest.write(SPARE + 0x1000, word(0x77))
            guest.finish()
            assert guest.result() == 0x77


def test_set_pgd_makes_the_cpu_look_again() -> None:
    other = SPARE + 0x8000
    code = (
        fetch(EAX, SPARE)
        + store_value(DIRECTORY, other | 7)
        + hypercall(abi.LHCALL_SET_PGD, DIRECTORY, 0)
        + fetch(EAX, SPARE)
        + store(EAX, RESULTS)
    )
    with LittleGuest(code) as guest:
        guest.write(other, bytes(guest.memory.view[TABLE : TABLE + 4096]))
        guest.write(other + 4 * (SPARE >> 12), word(SPARE + 0x1000 | 7))
        guest.write(SPARE + 0x1000, word(0x77))
        guest.finish()
        assert guest.result() == 0x77


def test_new_pgtable_changes_the_tables_and_back() -> None:
    other_directory, other_table = SPARE + 0x8000, SPARE + 0x9000
    code = (
        hypercall(abi.LHCALL_NEW_PGTABLE, other_directory)
        + fetch(EAX, SPARE)
        + store(EAX, RESULTS)
        + hypercall(abi.LHCALL_NEW_PGTABLE, DIRECTORY)
        + fetch(EAX, SPARE)
        + store(EAX, RESULTS + 4)
    )
    with LittleGuest(code) as guest:
        guest.write(other_directory, word(other_table | 7))
        guest.write(other_table, bytes(guest.memory.view[TABLE : TABLE + 4096]))
        guest.write(other_table + 4 * (SPARE >> 12), word(SPARE + 0x1000 | 7))
        guest.write(SPARE, word(0x66))
        guest.write(SPARE + 0x1000, word(0x77))
        guest.finish()
        assert (guest.result(0), guest.result(1)) == (0x77, 0x66)


def test_accessed_and_dirty_bits_are_set_in_the_guest_s_own_tables() -> None:
    read, written, neither = SPARE, SPARE + 0x1000, SPARE + 0x2000
    with LittleGuest(fetch(EAX, read) + store(EAX, written)) as guest:
        guest.finish()
        flags = [guest.read(TABLE + 4 * (page >> 12)) & 0xFFF for page in (read, written, neither)]
        assert flags == [7 | abi.PAGE_ACCESSED, 7 | abi.PAGE_ACCESSED | abi.PAGE_DIRTY, 7]


def test_hypercalls_cost_the_process_no_descriptors() -> None:
    with LittleGuest(
        hypercall(abi.LHCALL_SET_CLOCKEVENT, 1000) * 20 + hypercall(abi.LHCALL_SET_CLOCKEVENT, 0)
    ) as guest:
        before = len(list(Path("/proc/self/fd").iterdir()))
        guest.finish()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_two_notifies_of_the_ring_one_after_the_other_both_reach_the_launcher() -> None:
    with LittleGuest(notify(1) + FLUSH) as guest:
        assert guest.run() == Notify(1)
        for slot in range(10):
            ring_call(guest, slot, abi.LHCALL_NOTIFY, 0x100 + slot)
        assert [guest.run() for _ in range(11)] == [Notify(0x100 + slot) for slot in range(10)] + [Notify(DONE)]
