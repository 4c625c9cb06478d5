"""The numbers between an lguest guest and its host, for the guests of Linux 3.x.

From asm/lguest_hcall.h and linux/lguest.h of those kernels; the layout of `struct lguest_data` is that of i386.
"""

from __future__ import annotations

# `int $0x1f` is the hypercall (LGUEST_TRAP_ENTRY).
LGUEST_TRAP_ENTRY = 0x1F

LHCALL_FLUSH_ASYNC = 0
LHCALL_LGUEST_INIT = 1
LHCALL_SHUTDOWN = 2
LHCALL_NEW_PGTABLE = 4
LHCALL_FLUSH_TLB = 5
LHCALL_LOAD_IDT_ENTRY = 6
LHCALL_SET_STACK = 7
LHCALL_TS = 8
LHCALL_SET_CLOCKEVENT = 9
LHCALL_HALT = 10
LHCALL_SET_PMD = 13  # PAE guests alone
LHCALL_SET_PTE = 14
LHCALL_SET_PGD = 15
LHCALL_LOAD_TLS = 16
LHCALL_NOTIFY = 17
LHCALL_LOAD_GDT_ENTRY = 18
LHCALL_SEND_INTERRUPTS = 19

LGUEST_SHUTDOWN_POWEROFF = 1
LGUEST_SHUTDOWN_RESTART = 2

# The ring of asynchronous hypercalls in lguest_data.
LHCALL_RING_SIZE = 64
HCALL_FREE = 0xFF
HCALL_WORDS = 5  # arg0 (the call) to arg4

# struct lguest_data, byte offsets.
DATA_IRQ_ENABLED = 0
DATA_BLOCKED_INTERRUPTS = 4
DATA_CR2 = 8
DATA_TIME = 12  # struct timespec, two 32-bit words
DATA_IRQ_PENDING = 20
DATA_HCALL_STATUS = 24
DATA_HCALLS = 88
DATA_RESERVE_MEM = 1368
DATA_TSC_KHZ = 1372
DATA_NOIRQ_START = 1376
DATA_NOIRQ_END = 1380
DATA_KERNEL_ADDRESS = 1384
DATA_SYSCALL_VEC = 1388
DATA_SIZE = 1392

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
