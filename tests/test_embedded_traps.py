"""Traps of little guests: what reaches their handlers, with which frame and error code, and what ends them."""

from __future__ import annotations

import ctypes
import struct

import pytest
from embedded_guest import (
    CODE,
    DATA,
    DIRECTORY,
    DONE_CALL,
    EAX,
    ECX,
    EDX,
    ESI,
    ESP,
    FLAT_LOW,
    IRET,
    KERNEL_CS,
    KERNEL_DS,
    KERNEL_STACK,
    NOP,
    POPF,
    RAM_BYTES,
    RESULTS,
    SPARE,
    TABLE,
    UD2,
    USER_CODE,
    USER_CS,
    USER_DS,
    USER_STACK,
    Frame,
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
    push,
    store,
    store_value,
    word,
)

from lgmp.hosts import Break, Died, Notify
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded import library as uc

NOT_MAPPED = 0x300000  # no entry in the page table: above the guest's memory
OUTSIDE_TABLES = 0x80000000  # no entry in the page directory
GP = 13
PF = 14
IF = abi.X86_EFLAGS_IF
TF = abi.X86_EFLAGS_TF
NT = abi.X86_EFLAGS_NT
VM = abi.X86_EFLAGS_VM
ARITHMETIC = 0x8D5  # OF SF ZF AF PF CF

OUT_DX_AL = b"\xee"
RDTSC = b"\x0f\x31"
UC_X86_INS_RDTSC = 608  # unicorn/x86.h
RINGS = (1, 3)


def in_ring(ring: int, code: bytes, **more: object) -> LittleGuest:
    """A guest that runs `code` in that ring."""
    kernel, user = (code, None) if ring == 1 else (b"", code)
    return LittleGuest(kernel, user, **more)  # type: ignore[arg-type]


def code_address(ring: int) -> int:
    return CODE if ring == 1 else USER_CODE


# Frames.


def test_a_trap_from_ring_1_pushes_eflags_cs_and_eip_on_the_stack_in_use() -> None:
    with LittleGuest(load(ESP, SPARE + 0x800) + UD2, gates=[6]) as guest:
        assert guest.trap(6) == Frame(None, CODE + 5, KERNEL_CS, IF | 2, None, None)
        assert guest.esp == SPARE + 0x800 - 12
        assert guest.ring == 1


def test_a_trap_from_ring_3_pushes_ss_and_esp_too_on_the_stack_of_set_stack() -> None:
    with LittleGuest(user=UD2, gates=[6]) as guest:
        assert guest.trap(6) == Frame(None, USER_CODE, USER_CS, IF | 2, USER_STACK, USER_DS)
        assert guest.esp == KERNEL_STACK - 20
        assert guest.ring == 1
        assert guest.host._cpu.d[c.SS_SELECTOR] == KERNEL_DS


@pytest.mark.parametrize("ring", RINGS)
def test_iret_goes_on_with_what_was_interrupted(ring: int) -> None:
    # int 0x80; mov [RESULTS], eax; ud2, and a handler that gives 0x1234 in eax
    code = load(EAX, 1) + interrupt(0x80) + store(EAX, RESULTS) + UD2
    gates = {0x80: gate(SPARE, privilege=3), 6: gate(handler(6))}
    with in_ring(ring, code, gates=gates) as guest:
        guest.write(SPARE, load(EAX, 0x1234) + IRET)
        frame = guest.trap(6)
        assert (frame.eip, frame.cs & 3) == (code_address(ring) + len(code) - len(UD2), ring)
        assert guest.result() == 0x1234


@pytest.mark.parametrize(("enabled", "pushed"), [(IF, IF), (0, 0)])
def test_the_interrupt_flag_of_a_frame_is_what_lguest_data_says(enabled: int, pushed: int) -> None:
    with LittleGuest(store_value(DATA + abi.DATA_IRQ_ENABLED, enabled) + UD2, gates=[6]) as guest:
        assert guest.trap(6).eflags & IF == pushed


def test_an_interrupt_gate_turns_interrupts_off_and_a_trap_gate_does_not() -> None:
    with LittleGuest(UD2, gates={6: gate(handler(6), disables=True)}) as guest:
        assert guest.trap(6).eflags & IF
        assert guest.data(abi.DATA_IRQ_ENABLED) == 0
    with LittleGuest(UD2, gates={6: gate(handler(6))}) as guest:
        guest.trap(6)
        assert guest.data(abi.DATA_IRQ_ENABLED) == IF


@pytest.mark.parametrize("flags", [0, ARITHMETIC, 0x400, 0x40000])  # DF, AC
def test_flags_reach_the_frame_as_they_are(flags: int) -> None:
    with LittleGuest(push(flags | 2) + POPF + UD2, gates=[6]) as guest:
        assert guest.trap(6).eflags == flags | IF | 2


def test_a_handler_starts_with_trap_and_nested_task_flags_off() -> None:
    # With both on, an exception of int3: the flags are in the frame, and off in the handler.
    with LittleGuest(push(NT | TF | 2) + POPF + NOP, gates=[1]) as guest:
        frame = guest.trap(1)
        assert frame.eflags & (NT | TF) == NT | TF
        assert frame.eip == CODE + 7
        assert guest.host._cpu.read_eflags() & (NT | TF) == 0


def test_iret_with_the_nested_task_flag_finds_no_task_to_go_back_to() -> None:
    with LittleGuest(push(NT | 2) + POPF + IRET, gates=[10]) as guest:
        assert guest.trap(10).error_code == 0


@pytest.mark.parametrize("esp", [SPARE + 0x801, SPARE + 0x1005, SPARE + 0x1008, SPARE + 0x1003])
def test_a_stack_may_be_odd_and_may_cross_pages(esp: int) -> None:
    # The two pages are mapped the wrong way round, so that only an address found page by page is right.
    swap = (
        store_value(TABLE + 4 * (SPARE >> 12), SPARE + 0x1000 | 7)
        + store_value(TABLE + 4 * ((SPARE >> 12) + 1), SPARE | 7)
        + hypercall(abi.LHCALL_FLUSH_TLB, 1)
    )
    # pop eax; pop ecx; pop edx: the guest reads its own frame
    show = b"\x58\x59\x5a" + store(EAX, RESULTS) + store(ECX, RESULTS + 4) + store(EDX, RESULTS + 8) + DONE_CALL
    with LittleGuest(swap + load(ESP, esp) + UD2, gates={6: gate(SPARE + 0x4000)}) as guest:
        guest.write(SPARE + 0x4000, show)
        guest.finish()
        at_fault = CODE + len(swap) + 5
        assert [guest.result(number) for number in range(3)] == [at_fault, KERNEL_CS, IF | 2]
        assert guest.esp == esp


@pytest.mark.parametrize("esp", [NOT_MAPPED + 12, NOT_MAPPED + 0x1004, OUTSIDE_TABLES + 0x80])
def test_a_kernel_stack_that_is_not_mapped_ends_the_guest(esp: int) -> None:
    with LittleGuest(load(ESP, esp) + UD2, gates=[6]) as guest:
        assert guest.run() == Died(f"Bad address {esp - 12:#x}")


@pytest.mark.parametrize("esp", [0xFFC00800, 0xFFFFFFF0, 0])
def test_set_stack_in_the_host_s_pages_ends_the_guest_at_its_next_trap(esp: int) -> None:
    kernel = hypercall(abi.LHCALL_SET_STACK, KERNEL_DS, esp, 1) + move_to_ring_3(USER_CODE)
    with LittleGuest(kernel, gates=[6]) as guest:
        guest.write(USER_CODE, UD2)
        assert guest.run() == Died(f"Bad address {(esp - 20) & 0xFFFFFFFF:#x}")


def test_a_stack_segment_that_ring_1_may_not_use_ends_the_guest_at_its_next_trap() -> None:
    selector = 20 * 8 | 1
    kernel = hypercall(abi.LHCALL_SET_STACK, selector, KERNEL_STACK, 1) + move_to_ring_3(USER_CODE)
    with LittleGuest(kernel, gates=[6]) as guest:
        guest.write(USER_CODE, UD2)
        assert guest.run() == Died(f"unhandled trap 256 at {USER_CODE:#x} ({selector:#x})")


def test_a_kernel_code_segment_that_ring_1_may_not_use_ends_the_guest_at_its_next_trap() -> None:
    kernel = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 12, FLAT_LOW, 0x00CFFB00) + UD2
    with LittleGuest(kernel, gates=[6]) as guest:
        assert guest.run() == Died(f"unhandled trap 256 at {CODE + len(kernel) - 2:#x} (0x60)")


# Error codes.


@pytest.mark.parametrize(
    ("ring", "access", "user_page", "error_code"),
    [
        (1, "read", False, 0),
        (1, "write", False, 2),
        (1, "write", True, 3),
        (3, "read", False, 4),
        (3, "read", True, 5),
        (3, "write", False, 6),
        (3, "write", True, 7),
        (1, "fetch", False, 0),
        (3, "fetch", False, 4),
    ],
)
def test_a_page_fault_says_what_was_tried(ring: int, access: str, user_page: bool, error_code: int) -> None:
    """`user_page` is present, and not for what is tried: read-only to writes, the kernel's to reads."""
    address = SPARE if user_page else NOT_MAPPED
    code = {
        "read": fetch(EAX, address + 0x123),
        "write": store(EAX, address + 0x123),
        "fetch": push(address + 0x123) + b"\xc3",  # push; ret
    }[access]
    entry = SPARE | (5 if access == "write" else 3)
    with in_ring(ring, code, gates=[PF]) as guest:
        guest.words[(TABLE + 4 * (SPARE >> 12)) >> 2] = entry
        frame = guest.trap(PF)
        assert frame.error_code == error_code
        assert frame.eip == (address + 0x123 if access == "fetch" else code_address(ring))
        assert guest.data(abi.DATA_CR2) == address + 0x123


def test_addresses_above_2_gib_reach_cr2_and_the_reason_whole() -> None:
    with LittleGuest(fetch(EAX, 0xF2345678), gates=[PF]) as guest:
        guest.trap(PF)
        assert guest.data(abi.DATA_CR2) == 0xF2345678
    with LittleGuest(fetch(EAX, 0xF2345678)) as guest:
        assert guest.run() == Died(f"unhandled trap 14 at {CODE:#x} (0xf2345678)")


@pytest.mark.parametrize("ring", RINGS)
def test_segment_faults_name_the_selector(ring: int) -> None:
    # mov fs, ax
    absent = load(EAX, 20 * 8 | 3) + b"\x8e\xe0"
    with in_ring(ring, absent, gates=[GP, 11]) as guest:
        # Nothing was ever loaded there: that is a system descriptor.
        assert guest.trap(GP).error_code == 20 * 8
    not_present = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, FLAT_LOW, 0x00CF7300)
    kernel = not_present + (absent if ring == 1 else move_to_ring_3(USER_CODE))
    with LittleGuest(kernel, gates=[GP, 11]) as guest:
        guest.write(USER_CODE, absent)
        assert guest.trap(11).error_code == 20 * 8
    past_the_table = load(EAX, 32 * 8 | 3) + b"\x8e\xe0"
    with in_ring(ring, past_the_table, gates=[GP]) as guest:
        assert guest.trap(GP).error_code == 32 * 8


def test_a_stack_fault_names_the_selector() -> None:
    # mov ss, ax
    kernel = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, FLAT_LOW, 0x00CF3300) + load(EAX, 20 * 8 | 1) + b"\x8e\xd0"
    with LittleGuest(kernel, gates=[12]) as guest:
        assert guest.trap(12).error_code == 20 * 8


@pytest.mark.parametrize("ring", RINGS)
def test_traps_without_error_code_push_none(ring: int) -> None:
    # xor ecx, ecx; div ecx
    with in_ring(ring, b"\x31\xc9\xf7\xf1", gates=[0]) as guest:
        assert guest.trap(0).eip == code_address(ring) + 2
    # bound eax, [RESULTS]: 5 is not within 0..0
    with in_ring(ring, load(EAX, 5) + b"\x62\x05" + word(RESULTS), gates=[5]) as guest:
        assert guest.trap(5).eip == code_address(ring) + 5


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("opcode", [UD2, b"\x0f\xff\xff", b"\xf1", b"\x0f\x0a", b"\xf0\x90"])
def test_what_is_no_instruction_is_an_invalid_opcode(ring: int, opcode: bytes) -> None:
    with in_ring(ring, NOP + opcode, gates=[6]) as guest:
        assert guest.trap(6).eip == code_address(ring) + 1


def test_an_invalid_opcode_between_two_page_faults_makes_no_double_fault_of_the_second() -> None:
    # #PF, whose handler is ud2, whose handler points #PF elsewhere and reads what is not mapped.
    repointed = hypercall(abi.LHCALL_LOAD_IDT_ENTRY, PF, *gate(handler(PF)))
    with LittleGuest(fetch(EAX, NOT_MAPPED), gates={PF: gate(SPARE), 6: gate(SPARE + 0x800)}) as guest:
        guest.write(SPARE, UD2)
        guest.write(SPARE + 0x800, repointed + fetch(EAX, NOT_MAPPED + 4))
        guest.write(handler(PF), notify(handler(PF)))
        guest.trap(PF)
        assert guest.data(abi.DATA_CR2) == NOT_MAPPED + 4


# Faults after faults: Unicorn never clears old_exception.


def test_a_second_page_fault_is_not_a_double_fault() -> None:
    # The handler steps over the six bytes of the access: add esp, 4; add dword [esp], 6; iret
    kernel = b"".join(fetch(EAX, NOT_MAPPED + 4096 * page) for page in range(5))
    with LittleGuest(kernel, gates={PF: gate(SPARE), 8: gate(handler(8))}) as guest:
        guest.write(SPARE, increment(RESULTS) + b"\x83\xc4\x04" + b"\x83\x04\x24\x06" + IRET)
        guest.finish()
        assert guest.result() == 5


def test_a_page_fault_in_the_page_fault_handler_is_one_too() -> None:
    # At depth n the handler reads an unmapped page, five levels deep; then it is done.
    nested = increment(RESULTS) + b"\x83\x3d" + word(RESULTS) + b"\x05" + b"\x74\x06"  # cmp dword [RESULTS], 5; je +6
    nested += fetch(EAX, NOT_MAPPED) + DONE_CALL
    with LittleGuest(fetch(EAX, NOT_MAPPED), gates={PF: gate(SPARE)}) as guest:
        guest.write(SPARE, nested)
        guest.finish()
        assert guest.result() == 5
        assert guest.esp == KERNEL_STACK - 5 * 16


def test_a_general_protection_fault_and_then_a_page_fault_are_those() -> None:
    hlt = b"\xf4"
    with LittleGuest(hlt, gates={GP: gate(SPARE), PF: gate(handler(PF))}) as guest:
        guest.write(SPARE, fetch(EAX, NOT_MAPPED))
        assert guest.trap(PF).error_code == 0


# `int n`.


@pytest.mark.parametrize(
    ("code", "vector", "length"),
    [
        (interrupt(0x21), 0x21, 2),
        (b"\xcc", 3, 1),
        (interrupt(3), 3, 2),
        (b"\xb0\x7f\x04\x01\xce", 4, 1),  # mov al, 0x7f; add al, 1; into
        (interrupt(4), 4, 2),
        (interrupt(0x1F), 0x1F, 2),  # the hypercall's gate is ring 1's
        (interrupt(0xCC), 0xCC, 2),
        (interrupt(0), 0, 2),
        (interrupt(255), 255, 2),
    ],
)
def test_ring_3_may_not_use_the_gates_of_ring_1(code: bytes, vector: int, length: int) -> None:
    with LittleGuest(user=code, gates={vector: gate(SPARE), GP: gate(handler(GP))}) as guest:
        frame = guest.trap(GP)
        assert frame.error_code == vector * 8 + 2
        assert frame.eip == USER_CODE + len(code) - length
        assert (frame.cs, frame.esp) == (USER_CS, USER_STACK)


@pytest.mark.parametrize("ring", RINGS)
def test_a_gate_that_is_not_there_may_be_used_by_nobody(ring: int) -> None:
    with in_ring(ring, interrupt(0x21), gates=[GP]) as guest:
        frame = guest.trap(GP)
        assert (frame.error_code, frame.eip) == (0x21 * 8 + 2, code_address(ring))


@pytest.mark.parametrize(
    ("code", "vector"),
    [(interrupt(0x80), 0x80), (b"\xcc", 3), (interrupt(3), 3), (b"\xb0\x7f\x04\x01\xce", 4)],
)
@pytest.mark.parametrize("ring", RINGS)
def test_a_gate_of_ring_3_is_for_all_with_eip_after_the_instruction_and_no_error_code(
    ring: int, code: bytes, vector: int
) -> None:
    with in_ring(ring, code, gates={vector: gate(handler(vector), privilege=3)}) as guest:
        frame = guest.trap(vector)
        assert frame.eip == code_address(ring) + len(code)
        assert frame.error_code is None
        assert frame.cs & 3 == ring


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(
    ("code", "vector", "eip"), [(interrupt(0x80), 0x80, 0), (interrupt(0x81), GP, 0xFFFFFFFE), (UD2, 6, 0xFFFFFFFE)]
)
def test_eip_has_32_bits_at_the_end_of_a_segment_too(ring: int, code: bytes, vector: int, eip: int) -> None:
    """The segment starts at SPARE, so its last two bytes are the two before SPARE; Unicorn counts on past 32 bits."""
    high = (0x00CFBB00 if ring == 1 else 0x00CFFB00) | SPARE >> 16
    kernel = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, (SPARE & 0xFFFF) << 16 | 0xFFFF, high)
    if ring == 1:
        kernel += b"\xea" + word(0xFFFFFFFE) + struct.pack("<H", 20 * 8 | 1)  # jmp 20*8|1:0xfffffffe
    else:
        kernel += move_to_ring_3(0xFFFFFFFE, cs=20 * 8 | 3)
    gates = {0x80: gate(handler(0x80), privilege=3), GP: gate(handler(GP)), 6: gate(handler(6))}
    with LittleGuest(kernel, gates=gates) as guest:
        guest.write(SPARE - 2, code)
        assert guest.trap(vector).eip == eip


# Instructions that a guest does not have.


@pytest.mark.parametrize(
    "code",
    [
        b"\xf4",  # hlt
        b"\x0f\x01\x15" + word(SPARE),  # lgdt [SPARE]
        b"\x0f\x01\x1d" + word(SPARE),  # lidt [SPARE]
        b"\x0f\x00\xd0",  # lldt ax
        b"\x0f\x00\xd8",  # ltr ax
        b"\x0f\x20\xc0",  # mov eax, cr0
        b"\x0f\x22\xc0",  # mov cr0, eax
        b"\x0f\x22\xd8",  # mov cr3, eax
        b"\x0f\x22\xe0",  # mov cr4, eax
        b"\x0f\x23\xf8",  # mov dr7, eax
        b"\x0f\x06",  # clts
        b"\x0f\x01\xf0",  # lmsw ax
        b"\x0f\x01\x3d" + word(SPARE),  # invlpg [SPARE]
        b"\x0f\x30",  # wrmsr
        b"\x0f\x32",  # rdmsr
        b"\x0f\x09",  # wbinvd
        b"\xfb",  # sti
    ],
)
@pytest.mark.parametrize("ring", RINGS)
def test_privileged_instructions_are_general_protection_faults(ring: int, code: bytes) -> None:
    with in_ring(ring, NOP + code, gates=[GP]) as guest:
        frame = guest.trap(GP)
        assert (frame.error_code, frame.eip, frame.cs & 3) == (0, code_address(ring) + 1, ring)


def test_cli_is_skipped_in_ring_1() -> None:
    with LittleGuest(b"\xfa\xfa" + increment(RESULTS), gates=[GP]) as guest:
        guest.finish()
        assert guest.result() == 1


def test_cli_is_skipped_where_the_code_segment_does_not_start_at_0() -> None:
    # A code segment from SPARE on; far jump to its start: jmp 20*8|1:0
    base = SPARE
    kernel = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, (base & 0xFFFF) << 16 | 0xFFFF, 0x00CFBB00 | base >> 16)
    kernel += b"\xea" + word(0) + struct.pack("<H", 20 * 8 | 1)
    with LittleGuest(kernel, gates=[GP]) as guest:
        guest.write(SPARE, b"\xfa" + increment(RESULTS) + DONE_CALL)
        guest.finish()
        assert guest.result() == 1


def test_cli_is_a_general_protection_fault_in_ring_3() -> None:
    with LittleGuest(user=NOP + b"\xfa", gates=[GP]) as guest:
        frame = guest.trap(GP)
        assert (frame.error_code, frame.eip) == (0, USER_CODE + 1)


@pytest.mark.parametrize(("code", "vector"), [(b"\x0f\x34", GP), (b"\x0f\x05", 6)])
@pytest.mark.parametrize("ring", RINGS)
def test_sysenter_and_syscall_are_faults_at_the_instruction(ring: int, code: bytes, vector: int) -> None:
    with in_ring(ring, increment(RESULTS) + code + increment(RESULTS + 4), gates=[vector]) as guest:
        frame = guest.trap(vector)
        assert frame.eip == code_address(ring) + 6
        assert frame.error_code == (0 if vector == GP else None)
        assert (guest.result(0), guest.result(1)) == (1, 0)


@pytest.mark.parametrize(("code", "vector"), [(b"\x0f\x34", GP), (b"\x0f\x05", 6)])
@pytest.mark.parametrize("ring", RINGS)
def test_a_stop_in_the_middle_of_a_block_lets_no_sysenter_or_syscall_through(
    ring: int, code: bytes, vector: int
) -> None:
    with in_ring(ring, RDTSC + code, gates=[vector]) as guest:
        cpu = guest.host._cpu

        def stop_as_another_thread_may(_uc: int, _data: int) -> int:
            guest.host.break_in()
            return 0  # go on with the instruction

        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(stop_as_another_thread_may)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        cpu._add_hook(uc.UC_HOOK_INSN, address, 0, UC_X86_INS_RDTSC)
        assert isinstance(guest.run(), Break)
        assert guest.trap(vector).eip == code_address(ring) + len(RDTSC)


# Ports.

IN_OUT = [
    b"\xec",  # in al, dx
    b"\xed",  # in eax, dx
    b"\x66\xed",  # in ax, dx
    b"\xe4\x70",  # in al, 0x70
    b"\xe5\x70",  # in eax, 0x70
    b"\xee",  # out dx, al
    b"\xef",  # out dx, eax
    b"\x66\xef",  # out dx, ax
    b"\xe6\x70",  # out 0x70, al
    b"\xe7\x70",  # out 0x70, eax
    b"\x6c",  # insb
    b"\x6d",  # insd
    b"\x6e",  # outsb
    b"\x6f",  # outsd
    b"\xf3\x6e",  # rep outsb
    b"\xf3\x6d",  # rep insd
]
STRING_REGISTERS = load(7, SPARE) + load(ESI, SPARE) + load(ECX, 2)  # edi


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (b"\xec", 0x123456FF),  # in al, dx
        (b"\xe4\x70", 0x123456FF),  # in al, 0x70
        (b"\x66\xed", 0x1234FFFF),  # in ax, dx
        (b"\xed", 0xFFFFFFFF),  # in eax, dx
        (b"\xe5\x70", 0xFFFFFFFF),  # in eax, 0x70
    ],
)
def test_ring_1_reads_all_ones_from_ports(code: bytes, found: int) -> None:
    with LittleGuest(load(EAX, 0x12345678) + load(EDX, 0x3F8) + code + store(EAX, RESULTS), gates=[GP]) as guest:
        guest.finish()
        assert guest.result() == found


@pytest.mark.parametrize("code", IN_OUT)
def test_ring_1_may_use_ports_for_all_the_good_it_does(code: bytes) -> None:
    with LittleGuest(STRING_REGISTERS + code + increment(RESULTS), gates=[GP]) as guest:
        guest.finish()
        assert guest.result() == 1


@pytest.mark.parametrize("code", IN_OUT)
@pytest.mark.parametrize("ring", [2, 3])
def test_other_rings_get_a_general_protection_fault_at_the_port_instruction_itself(ring: int, code: bytes) -> None:
    """Nothing that follows in the block has run, and flags and registers are as they were before."""
    before = STRING_REGISTERS + load(EAX, 0x1234) + increment(RESULTS) + b"\x39\xc0"  # cmp eax, eax: ZF and PF
    code_high, data_high = (0x00CFDB00, 0x00CFD300) if ring == 2 else (0x00CFFB00, 0x00CFF300)
    kernel = hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 20, FLAT_LOW, code_high)
    kernel += hypercall(abi.LHCALL_LOAD_GDT_ENTRY, 21, FLAT_LOW, data_high)
    kernel += move_to_ring_3(USER_CODE, cs=20 * 8 | ring, ss=21 * 8 | ring)
    with LittleGuest(kernel, gates=[GP]) as guest:
        guest.write(USER_CODE, before + code + increment(RESULTS + 4) + UD2)
        # Ring 2 reads the program's data as well: USER_DS is in ds and es.
        frame = guest.trap(GP)
        assert (frame.error_code, frame.eip) == (0, USER_CODE + len(before))
        assert frame.eflags & ARITHMETIC == 0x44
        assert (guest.result(0), guest.result(1)) == (1, 0)
        assert (guest.register(ECX), guest.register(ESI)) == (2, SPARE)


# The floating point unit.


@pytest.mark.parametrize("ring", RINGS)
def test_the_floating_point_unit_traps_while_ts_is_set(ring: int) -> None:
    fld1 = b"\xd9\xe8"
    kernel = hypercall(abi.LHCALL_TS, 1) + (fld1 if ring == 1 else move_to_ring_3(USER_CODE))
    clear_and_return = hypercall(abi.LHCALL_TS, 0) + increment(RESULTS) + IRET
    with LittleGuest(kernel, gates={7: gate(SPARE), 6: gate(handler(6))}) as guest:
        guest.write(SPARE, clear_and_return)
        # fld1; fld1; ud2: the handler is entered once, and the instruction is run again after it.
        at = CODE + len(hypercall(0)) if ring == 1 else USER_CODE
        guest.write(at, fld1 + fld1 + UD2)
        assert guest.trap(6).eip == at + 4
        assert guest.result() == 1


def test_sse_traps_while_ts_is_set_too() -> None:
    xorps = b"\x0f\x57\xc0"
    with LittleGuest(hypercall(abi.LHCALL_TS, 1) + xorps, gates=[7]) as guest:
        assert guest.trap(7).eip == CODE + len(hypercall(0))


# Ends.


def test_a_trap_without_handler_ends_the_guest_in_lg_s_words() -> None:
    with LittleGuest(UD2) as guest:
        assert guest.run() == Died(f"unhandled trap 6 at {CODE:#x} (0x0)")
    with LittleGuest(fetch(EAX, NOT_MAPPED + 0x10)) as guest:
        assert guest.run() == Died(f"unhandled trap 14 at {CODE:#x} ({NOT_MAPPED + 0x10:#x})")
    with LittleGuest(load(EAX, 32 * 8) + b"\x8e\xe0") as guest:
        assert guest.run() == Died(f"unhandled trap 13 at {CODE + 5:#x} (0x100)")
    with LittleGuest(interrupt(0x21)) as guest:
        assert guest.run() == Died(f"unhandled trap 13 at {CODE:#x} (0x10a)")


def test_a_dead_guest_stays_dead() -> None:
    with LittleGuest(UD2) as guest:
        reason = guest.run()
        assert guest.run() == reason
        assert guest.run() == reason


def test_a_trap_before_lguest_init_ends_the_guest() -> None:
    with LittleGuest(UD2, set_up=False) as guest:
        assert guest.run() == Died(f"unhandled trap 6 at {CODE:#x} (0x0)")


def test_traps_reach_handlers_before_there_are_page_tables() -> None:
    with LittleGuest(UD2, gates=[6], paging=False) as guest:
        assert guest.trap(6).eip == CODE
    with LittleGuest(load(ESP, RAM_BYTES + 8) + UD2, gates=[6], paging=False) as guest:
        assert guest.run() == Died(f"Bad address {RAM_BYTES:#x}")


def test_before_there_are_page_tables_memory_ends_where_the_guest_s_does() -> None:
    with LittleGuest(fetch(EAX, RAM_BYTES), paging=False) as guest:
        event = guest.run()
        assert isinstance(event, Died)
        assert event.reason.startswith("bad page table entry: memory outside the guest was read at ")


# Virtual-8086 mode, which Unicorn lets any ring enter.


@pytest.mark.parametrize("ring", RINGS)
def test_virtual_8086_mode_is_ring_3_to_the_guest_s_kernel(ring: int) -> None:
    """Its selectors look like ring 1, and its stack pointer points where it likes: nothing may be pushed there."""
    segment = USER_CODE >> 4 | 1
    target = SPARE + 0x900
    # Pushed last to first: gs fs ds es ss esp eflags cs eip.
    frame = [segment] * 4 + [segment, target, VM | 0x3000 | 2, segment, 0x10]
    code = b"".join(push(value) for value in frame) + IRET
    with in_ring(ring, code, gates=[6, GP]) as guest:
        guest.write((segment << 4) + 0x10, UD2)
        guest.write(target - 64, b"\x5a" * 128)
        seen = guest.trap(6)
        assert guest.read(target - 12) == 0x5A5A5A5A
        assert (seen.cs & 3, seen.ss) == (3, segment | 3)
        assert seen.eflags & (VM | 0x3000) == 0
        assert (guest.ring, guest.esp) == (1, KERNEL_STACK - 20)
        assert guest.host._cpu.read_eflags() & (VM | 0x3000) == 0


# More pages than one: handlers whose stack and code are not mapped one to one.


def test_the_frame_is_pushed_where_the_page_tables_say() -> None:
    elsewhere = 0x10000000
    kernel = (
        store_value(DIRECTORY + 4 * (elsewhere >> 22), TABLE | 7)
        + hypercall(abi.LHCALL_SET_PGD, DIRECTORY, elsewhere >> 22)
        + load(ESP, elsewhere + SPARE + 0x100)
        + UD2
    )
    with LittleGuest(kernel, gates=[6]) as guest:
        assert guest.run() == Notify(handler(6))
        assert guest.esp == elsewhere + SPARE + 0x100 - 12
        assert guest.read(SPARE + 0x100 - 12) == CODE + len(kernel) - 2


def test_what_is_pushed_marks_nothing_else() -> None:
    with LittleGuest(load(ESP, SPARE + 0x100) + UD2, gates=[6]) as guest:
        guest.write(SPARE, b"\x5a" * 4096)
        guest.trap(6)
        assert bytes(guest.memory.view[SPARE : SPARE + 0x100 - 12]) == b"\x5a" * (0x100 - 12)
        assert bytes(guest.memory.view[SPARE + 0x100 : SPARE + 0x1000]) == b"\x5a" * 0xF00
