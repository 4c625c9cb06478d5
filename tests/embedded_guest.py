"""Little guests for the embedded host: a few bytes of i386 machine code, and what they need around them.

There is no assembler here: code is byte strings, each with its mnemonic beside it, and small functions that make them.
A `LittleGuest` has its RAM mapped one to one and does what a kernel does at its start (LGUEST_INIT, page
tables, user segments, a stack, gates) before the code of the test runs, in ring 1 or in ring 3.

Every trap's handler that the tests do not write themselves is `handler(vector)`: it notifies the launcher of its
own address, so that `run` returns `Notify(handler(vector))` with the frame on the stack, where the test looks at it.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple

from lgmp.hosts import Event, Notify
from lgmp.hosts.embedded import abi, clock
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded.host import EmbeddedHost
from lgmp.memory import PAGE_SIZE, GuestMemory

# The host measures the time-stamp counter for this long at LGUEST_INIT; these guests have no use for a precise one.
MEASURED_NANOSECONDS = clock._SHORTEST_NANOSECONDS
clock._SHORTEST_NANOSECONDS = 50_000

# How long a `run` may take before the test is wrong, in seconds: far more than any does.
PATIENCE = 30.0

RAM_BYTES = 2 << 20
CANARY_PAGES = 4

# Where things are; virtual = physical.
DATA = 0x1000
DIRECTORY = 0x2000
TABLE = 0x3000
KERNEL_STACK = 0x5000  # tops; the stacks are a page each
USER_STACK = 0x6000
RESULTS = 0x7000
HANDLERS = 0x8000
_HANDLER_BYTES = 16
GDT = 0xA000  # for eras that load it whole
CODE = 0x10000
SETUP = 0x18000
USER_CODE = 0x20000
SPARE = 0x40000  # pages that nobody uses

USER_CS = 14 * 8 | 3
USER_DS = 15 * 8 | 3
KERNEL_CS = abi.KERNEL_CS | abi.GUEST_PL
KERNEL_DS = abi.KERNEL_DS | abi.GUEST_PL

# Flat 4 GiB segments, present, accessed, by type and DPL: the high words of their descriptors.
FLAT_LOW = 0x0000FFFF
USER_CODE_HIGH = 0x00CFFB00
USER_DATA_HIGH = 0x00CFF300
KERNEL_CODE_HIGH = 0x00CF9B00
KERNEL_DATA_HIGH = 0x00CF9300

# What a guest has at `done`, and in a data area of its own for what it wants to show.
DONE = 0x00D0_0E00

JUMP_TO_SELF = b"\xeb\xfe"  # jmp .
IRET = b"\xcf"  # iret
NOP = b"\x90"  # nop
UD2 = b"\x0f\x0b"  # ud2
PUSHF = b"\x9c"  # pushf
POPF = b"\x9d"  # popf

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)

# The eras, and their names as pytest is to show them.
ERAS = abi.GUEST_ABIS
ERA_NAMES = [each.name for each in ERAS]


def word(value: int) -> bytes:
    """A 32-bit immediate."""
    return struct.pack("<I", value & 0xFFFFFFFF)


def load(register: int, value: int) -> bytes:
    """mov register, value."""
    return bytes([0xB8 + register]) + word(value)


def store(register: int, address: int) -> bytes:
    """mov [address], register."""
    return bytes([0x89, 0x05 | register << 3]) + word(address)


def fetch(register: int, address: int) -> bytes:
    """mov register, [address]."""
    return bytes([0x8B, 0x05 | register << 3]) + word(address)


def store_value(address: int, value: int) -> bytes:
    """mov dword [address], value."""
    return b"\xc7\x05" + word(address) + word(value)


def increment(address: int) -> bytes:
    """inc dword [address]."""
    return b"\xff\x05" + word(address)


def push(value: int) -> bytes:
    """push value."""
    return b"\x68" + word(value)


def jump(to: int, at: int) -> bytes:
    """jmp to, for an instruction at `at`."""
    return b"\xe9" + word(to - at - 5)


def interrupt(vector: int) -> bytes:
    """int vector, the form of two bytes."""
    return bytes([0xCD, vector])


def hypercall(number: int, ebx: int = 0, ecx: int = 0, edx: int = 0, esi: int = 0) -> bytes:
    """mov eax, number; mov ebx, ...; mov ecx, ...; mov edx, ...; mov esi, ...; int 0x1f."""
    loads = load(EAX, number) + load(EBX, ebx) + load(ECX, ecx) + load(EDX, edx) + load(ESI, esi)
    return loads + interrupt(abi.LGUEST_TRAP_ENTRY)


def call_of(era: abi.GuestAbi, number: int, *arguments: int) -> bytes:
    """A hypercall of up to three arguments as guests of that era make it: in its registers, with `int $0x1f`."""
    loads = b"".join(load(register, value) for register, value in zip(era.registers, arguments, strict=False))
    return load(EAX, number) + loads + interrupt(abi.LGUEST_TRAP_ENTRY)


def notify(address: int) -> bytes:
    """LHCALL_NOTIFY, with no register lost but eax and ebx: mov eax, 17; mov ebx, address; int 0x1f."""
    return load(EAX, abi.LHCALL_NOTIFY) + load(EBX, address) + interrupt(abi.LGUEST_TRAP_ENTRY)


def halt() -> bytes:
    """LHCALL_HALT."""
    return hypercall(abi.LHCALL_HALT)


def set_pte(address: int, entry: int, directory: int = DIRECTORY) -> bytes:
    """Write the page table entry for `address` (below 4 MiB) and tell the host, as kernels do."""
    return store_value(TABLE + 4 * (address >> 12), entry) + hypercall(abi.LHCALL_SET_PTE, directory, address, entry)


def move_to_ring_3(eip: int, esp: int = USER_STACK, eflags: int = 0x202, cs: int = USER_CS, ss: int = USER_DS) -> bytes:
    """push ss; push esp; push eflags; push cs; push eip; iret, with USER_DS in ds and es."""
    segments = load(EAX, USER_DS) + b"\x8e\xd8" + b"\x8e\xc0"  # mov ds, ax; mov es, ax
    return segments + push(ss) + push(esp) + push(eflags) + push(cs) + push(eip) + IRET


def gate(address: int, *, disables: bool = False, privilege: int = 1) -> tuple[int, int]:
    """The two words of a trap gate, or of an interrupt gate where it `disables` interrupts."""
    high = (address & 0xFFFF0000) | 0x8000 | privilege << 13 | (0xE if disables else 0xF) << 8
    return KERNEL_CS << 16 | address & 0xFFFF, high


def handler(vector: int) -> int:
    """The address of the handler that `LittleGuest` has for a vector."""
    return HANDLERS + _HANDLER_BYTES * vector


DONE_CALL = notify(DONE) + JUMP_TO_SELF


class Frame(NamedTuple):
    """What a handler finds on its stack; `esp` and `ss` only where the trap came from another ring."""

    error_code: int | None
    eip: int
    cs: int
    eflags: int
    esp: int | None
    ss: int | None


class LittleGuest:
    """A guest of 2 MiB, its host, and its memory. Use it in a `with`.

    `gates`: vectors that get their `handler`, as trap gates of privilege 1, or with the two words that are given.
    Without `set_up` nothing is done before the test's code: no LGUEST_INIT, no page tables.
    """

    def __init__(
        self,
        kernel: bytes = b"",
        user: bytes | None = None,
        *,
        gates: Iterable[int] | Mapping[int, tuple[int, int]] = (),
        set_up: bool = True,
        paging: bool = True,
        data: Mapping[int, int] | None = None,
        era: abi.GuestAbi = abi.LATEST,
        host_abi: abi.GuestAbi | None = None,
    ) -> None:
        """`kernel`: code for ring 1, at CODE; `user`: code for ring 3, which then follows the set-up at once.

        `data`: words of lguest_data, by offset, as they are before LGUEST_INIT; `era`: what the guest is; `host_abi`:
        what the host thinks it is, where that is not the same.
        """
        self.era = era
        self.memory = GuestMemory.create(RAM_BYTES, CANARY_PAGES)
        self.canary = bytes(range(256)) * (CANARY_PAGES * PAGE_SIZE // 256)
        self.memory.view[RAM_BYTES:] = self.canary
        self.words = self.memory.view.cast("I")
        self._write_tables()
        self.write(DATA + era.hcall_status, bytes([abi.HCALL_FREE]) * abi.LHCALL_RING_SIZE)
        words = {
            abi.DATA_IRQ_ENABLED: abi.X86_EFLAGS_IF,
            era.kernel_address: 0xC0000000,
            era.syscall_vec: 0x80,
        }
        for offset, value in {**words, **(data or {})}.items():
            self.set_data(offset, value)
        self.write(CODE, kernel + self.call(abi.LHCALL_NOTIFY, DONE) + JUMP_TO_SELF)
        first = b""
        if set_up:
            first = self.set_up(gates, paging=paging)
        if user is not None:
            self.write(USER_CODE, user)
            first += move_to_ring_3(USER_CODE)
        self.write(SETUP, first + jump(CODE, SETUP + len(first)))
        host_abi = host_abi or era
        directory = DIRECTORY if host_abi.starts_paged else None
        self.host = EmbeddedHost(self.memory, RAM_BYTES, SETUP, host_abi, directory)

    def _write_tables(self) -> None:
        for page in range(RAM_BYTES >> 12):
            self.words[(TABLE >> 2) + page] = page << 12 | 7
        self.words[DIRECTORY >> 2] = TABLE | 7

    def set_up(self, gates: Iterable[int] | Mapping[int, tuple[int, int]], *, paging: bool = True) -> bytes:
        """The hypercalls that a kernel makes first, with handlers for `gates`; the stack is at KERNEL_STACK."""
        call = self.call
        code = load(ESP, KERNEL_STACK) + call(abi.LHCALL_LGUEST_INIT, DATA)
        if paging:
            code += call(abi.LHCALL_NEW_PGTABLE, DIRECTORY)
        if abi.LHCALL_LOAD_GDT_ENTRY in self.era.calls:
            code += call(abi.LHCALL_LOAD_GDT_ENTRY, USER_CS >> 3, FLAT_LOW, USER_CODE_HIGH)
            code += call(abi.LHCALL_LOAD_GDT_ENTRY, USER_DS >> 3, FLAT_LOW, USER_DATA_HIGH)
        else:
            table = {
                abi.GDT_ENTRY_KERNEL_CS: KERNEL_CODE_HIGH,
                abi.GDT_ENTRY_KERNEL_DS: KERNEL_DATA_HIGH,
                USER_CS >> 3: USER_CODE_HIGH,
                USER_DS >> 3: USER_DATA_HIGH,
            }
            for index, high in table.items():
                self.write(GDT + 8 * index, struct.pack("<II", FLAT_LOW, high))
            code += call(abi.LHCALL_LOAD_GDT, GDT, abi.GDT_ENTRIES)
        code += call(abi.LHCALL_SET_STACK, KERNEL_DS, KERNEL_STACK, 1)
        wanted = gates if isinstance(gates, Mapping) else {vector: gate(handler(vector)) for vector in gates}
        for vector, (low, high) in wanted.items():
            self.write(handler(vector), call(abi.LHCALL_NOTIFY, handler(vector)) + JUMP_TO_SELF)
            code += call(abi.LHCALL_LOAD_IDT_ENTRY, vector, low, high)
        return code

    def call(self, number: int, *arguments: int) -> bytes:
        """A hypercall as this guest makes it."""
        return call_of(self.era, number, *arguments)

    def __enter__(self) -> LittleGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        outside = bytes(self.memory.view[RAM_BYTES:])
        self.close()
        if kind is None:
            assert outside == self.canary, "the guest wrote past its limit"

    def close(self) -> None:
        """Give host and memory back."""
        self.host.close()
        self.words.release()
        self.memory.close()

    def run(self) -> Event:
        """Run the guest to its next event; a guest that does not get to one fails the test."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.host.break_in()

        watchdog = threading.Timer(PATIENCE, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            event = self.host.run()
        finally:
            watchdog.cancel()
        assert not late.is_set(), f"no event in {PATIENCE} s"
        return event

    def run_for(self, seconds: float) -> Event:
        """Run the guest until something happens or that time has passed, which gives Break."""
        clock = threading.Timer(seconds, self.host.break_in)
        clock.start()
        try:
            return self.host.run()
        finally:
            clock.cancel()
            clock.join()

    def finish(self) -> None:
        """Run the guest and see it come to its DONE_CALL."""
        event = self.run()
        assert event == Notify(DONE), event

    def trap(self, vector: int) -> Frame:
        """Run the guest and see it come to its handler for `vector`; gives the frame."""
        event = self.run()
        assert event == Notify(handler(vector)), event
        return self.frame(vector)

    def frame(self, vector: int | None = None) -> Frame:
        """The frame at the top of the stack: that of `vector`'s handler, or one without error code."""
        at = self.esp
        error_code = None
        if vector in abi.TRAPS_WITH_ERROR_CODE:
            error_code = self.read(at)
            at += 4
        eip, cs, eflags = (self.read(at + 4 * number) for number in range(3))
        if cs & 3 == abi.GUEST_PL:
            return Frame(error_code, eip, cs, eflags, None, None)
        return Frame(error_code, eip, cs, eflags, self.read(at + 12), self.read(at + 16))

    def write(self, address: int, data: bytes) -> None:
        """Write memory behind the CPU's back, as another process does."""
        self.memory.view[address : address + len(data)] = data

    def read(self, address: int) -> int:
        """A 32-bit word of memory, at any address."""
        value: int = struct.unpack_from("<I", self.memory.view, address)[0]
        return value

    def set_data(self, offset: int, value: int) -> None:
        """Set a word of lguest_data."""
        self.words[(DATA + offset) >> 2] = value

    def data(self, offset: int) -> int:
        """A word of lguest_data."""
        return self.words[(DATA + offset) >> 2]

    def result(self, number: int = 0) -> int:
        """A word of the page at RESULTS, where guests put what they find."""
        return self.words[(RESULTS >> 2) + number]

    def register(self, number: int) -> int:
        """A general register of the CPU."""
        return self.host._cpu.q[c.REGS + number]

    @property
    def esp(self) -> int:
        """The guest's stack pointer."""
        return self.register(ESP)

    @property
    def ring(self) -> int:
        """The CPU's privilege level."""
        return self.host._cpu.d[c.HFLAGS] & c.HF_CPL_MASK
