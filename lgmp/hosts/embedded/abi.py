"""The numbers between an lguest guest and its host.

From asm/lguest_hcall.h and linux/lguest.h of the kernels; the layout of `struct lguest_data` is that of i386. What is
the same for all guests are constants here; what differs between the kernels' versions is in the table GUEST_ABIS, a row
for each era, and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

# `int $0x1f` is the hypercall (LGUEST_TRAP_ENTRY).
LGUEST_TRAP_ENTRY = 0x1F

LHCALL_FLUSH_ASYNC = 0
LHCALL_LGUEST_INIT = 1
LHCALL_SHUTDOWN = 2
LHCALL_LOAD_GDT = 3  # to 2.6.30
LHCALL_NEW_PGTABLE = 4
LHCALL_FLUSH_TLB = 5
LHCALL_LOAD_IDT_ENTRY = 6
LHCALL_SET_STACK = 7
LHCALL_TS = 8
LHCALL_SET_CLOCKEVENT = 9
LHCALL_HALT = 10
LHCALL_SET_PMD = 13  # PAE guests alone, from 2.6.31
LHCALL_SET_PTE = 14
LHCALL_SET_PGD = 15  # to 2.6.30 under the name of SET_PMD
LHCALL_LOAD_TLS = 16
LHCALL_NOTIFY = 17
LHCALL_LOAD_GDT_ENTRY = 18  # from 2.6.30
LHCALL_SEND_INTERRUPTS = 19  # from 2.6.31

LGUEST_SHUTDOWN_POWEROFF = 1
LGUEST_SHUTDOWN_RESTART = 2

# The ring of asynchronous hypercalls in lguest_data.
LHCALL_RING_SIZE = 64
HCALL_FREE = 0xFF

# struct lguest_data, byte offsets: what all of them begin with. The rest is in GuestAbi.
DATA_IRQ_ENABLED = 0
DATA_BLOCKED_INTERRUPTS = 4
DATA_CR2 = 8
DATA_TIME = 12  # struct timespec, two 32-bit words

# `vmcall`, and what a host writes in its place: `int $0x1f` and a nop.
VMCALL = b"\x0f\x01\xc1"
VMCALL_REWRITTEN = b"\xcd\x1f\x90"

# LGUEST_IRQS: the timer is 0, the virtqueues follow.
LGUEST_IRQS = 32
TIMER_IRQ = 0
# Interrupt n comes in at this vector + n (FIRST_EXTERNAL_VECTOR).
FIRST_EXTERNAL_VECTOR = 32

# The guest kernel runs in ring 1 (GUEST_PL).
GUEST_PL = 1

# asm/segment.h (i386): the entries of the GDT that matter here.
GDT_ENTRIES = 32
GDT_ENTRY_TLS_MIN = 6
GDT_ENTRY_TLS_ENTRIES = 3
GDT_ENTRY_LGUEST_CS = 10
GDT_ENTRY_LGUEST_DS = 11
GDT_ENTRY_KERNEL_CS = 12
GDT_ENTRY_KERNEL_DS = 13
GDT_ENTRY_TSS = 16
GDT_ENTRY_DOUBLEFAULT_TSS = 31
KERNEL_CS = GDT_ENTRY_KERNEL_CS * 8
KERNEL_DS = GDT_ENTRY_KERNEL_DS * 8

# The virtual addresses from here on belong to the host: the last entry of every page directory.
SWITCHER_ADDRESS = 0xFFC00000
SWITCHER_PGD_INDEX = 1023
RESERVE_MEM = 0x400000

# asm/pgtable_types.h
PAGE_PRESENT = 0x001
PAGE_RW = 0x002
PAGE_USER = 0x004
PAGE_ACCESSED = 0x020
PAGE_DIRTY = 0x040
PAGE_PSE = 0x080
PAGE_TABLE = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY

# asm/processor-flags.h
X86_EFLAGS_FIXED = 0x00000002
X86_EFLAGS_TF = 0x00000100
X86_EFLAGS_IF = 0x00000200
X86_EFLAGS_IOPL = 0x00003000
X86_EFLAGS_NT = 0x00004000
X86_EFLAGS_RF = 0x00010000
X86_EFLAGS_VM = 0x00020000
X86_CR0_TS = 0x00000008
X86_CR0_PG = 0x80000000

# Traps (Intel SDM volume 3, table 6-1) that the host treats in its own way.
TRAP_INT3 = 3
TRAP_OVERFLOW = 4
TRAP_INVALID_OPCODE = 6
TRAP_DOUBLE_FAULT = 8
TRAP_GENERAL_PROTECTION = 13
TRAP_PAGE_FAULT = 14
# Double fault, the four segment traps, page fault and alignment check push an error code.
TRAPS_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
# What lg says when the guest's own segments do not allow its handler to be entered.
TRAP_IN_SWITCHER = 256
# A guest never handles NMI, double fault, the spurious interrupt or the hypercall; setting them is ignored.
IDT_IGNORED = frozenset({2, 8, 15, LGUEST_TRAP_ENTRY})


# General registers, as instructions number them.
_EAX, _ECX, _EDX, _EBX, _ESP, _EBP, _ESI, _EDI = range(8)

_CALLS_OF_ALL = frozenset(
    {
        LHCALL_FLUSH_ASYNC,
        LHCALL_LGUEST_INIT,
        LHCALL_SHUTDOWN,
        LHCALL_NEW_PGTABLE,
        LHCALL_FLUSH_TLB,
        LHCALL_LOAD_IDT_ENTRY,
        LHCALL_SET_STACK,
        LHCALL_TS,
        LHCALL_SET_CLOCKEVENT,
        LHCALL_HALT,
        LHCALL_SET_PTE,
        LHCALL_SET_PGD,
        LHCALL_LOAD_TLS,
        LHCALL_NOTIFY,
    }
)


class GuestAbi(NamedTuple):
    """How the guests of one era speak with their host: all in which they differ from those of other eras.

    `name` is what --guest-abi takes, `kernels` says which kernels those are, and `since` is the first version (two or
    three numbers). The other fields are facts about them; offsets are in bytes, into struct lguest_data.
    """

    name: str
    kernels: str
    since: tuple[int, ...]
    # The registers of a hypercall's arguments, the first to the fourth. (The fourth is for PAE guests alone.)
    registers: tuple[int, int, int, int]
    # Whether the guest may make hypercalls with `vmcall`, which the host replaces in its memory.
    vmcall: bool
    # The calls that there are.
    calls: frozenset[int]
    # An entry of the asynchronous ring: how many words it has, and which of them are the call and its arguments.
    hcall_words: int
    hcall_order: tuple[int, ...]
    # Offsets; None where there is no such field.
    irq_pending: int | None
    hcall_status: int
    hcalls: int
    reserve_mem: int
    tsc_khz: int
    pgdir: int | None
    noirq_start: int
    noirq_end: int
    kernel_address: int
    syscall_vec: int
    # The size of the whole struct.
    data_size: int
    # Whether the guest starts with paging on: RAM is mapped to itself and, from LGUEST_INIT on, at kernel_address too.
    # Others start with linear memory, until their first NEW_PGTABLE.
    starts_paged: bool
    # Whether NOTIFY of a device's descriptor says that its status was written. If not, it always resets the device.
    status_notify: bool


_ABI_3_X = GuestAbi(
    name="3.x",
    kernels="Linux 3.1 to 3.19",
    since=(3, 1),
    registers=(_EBX, _ECX, _EDX, _ESI),
    vmcall=False,
    calls=_CALLS_OF_ALL | {LHCALL_LOAD_GDT_ENTRY, LHCALL_SEND_INTERRUPTS},
    hcall_words=5,
    hcall_order=(0, 1, 2, 3, 4),
    irq_pending=20,
    hcall_status=24,
    hcalls=88,
    reserve_mem=1368,
    tsc_khz=1372,
    pgdir=None,
    noirq_start=1376,
    noirq_end=1380,
    kernel_address=1384,
    syscall_vec=1388,
    data_size=1392,
    starts_paged=False,
    status_notify=True,
)
# To 2.6.33 all calls are vmcalls; after that some are, to 3.0.
_ABI_2_6_31 = _ABI_3_X._replace(
    name="2.6.31",
    kernels="Linux 2.6.31 to 3.0",
    since=(2, 6, 31),
    vmcall=True,
    pgdir=1376,
    noirq_start=1380,
    noirq_end=1384,
    kernel_address=1388,
    syscall_vec=1392,
    data_size=1396,
    starts_paged=True,
)
_ABI_2_6_30 = _ABI_2_6_31._replace(
    name="2.6.30",
    kernels="Linux 2.6.30",
    since=(2, 6, 30),
    calls=_CALLS_OF_ALL | {LHCALL_LOAD_GDT, LHCALL_LOAD_GDT_ENTRY},
    hcall_words=4,
    hcall_order=(0, 1, 2, 3),
    irq_pending=None,
    hcall_status=20,
    hcalls=84,
    reserve_mem=1108,
    tsc_khz=1112,
    pgdir=1116,
    noirq_start=1120,
    noirq_end=1124,
    kernel_address=1128,
    syscall_vec=1132,
    data_size=1136,
)
_ABI_2_6_26 = _ABI_2_6_30._replace(
    name="2.6.26",
    kernels="Linux 2.6.26 to 2.6.29",
    since=(2, 6, 26),
    registers=(_EDX, _EBX, _ECX, _ESI),
    vmcall=False,
    calls=_CALLS_OF_ALL | {LHCALL_LOAD_GDT},
    # In memory they are eax, ebx, ecx, edx: the call, the second argument, the third, the first.
    hcall_order=(0, 3, 1, 2),
)
_ABI_2_6_25 = _ABI_2_6_26._replace(
    name="2.6.25",
    kernels="Linux 2.6.25",
    since=(2, 6, 25),
    status_notify=False,
)

# Newest first.
GUEST_ABIS = (_ABI_3_X, _ABI_2_6_31, _ABI_2_6_30, _ABI_2_6_26, _ABI_2_6_25)
LATEST = _ABI_3_X
# The first version whose guests are none of these: they look for their devices on a PCI bus.
TOO_NEW = (4, 1)
