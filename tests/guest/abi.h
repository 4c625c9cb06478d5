/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The lguest ABI as the guest sees it: hypercall numbers and where the fields of struct lguest_data are.
 *
 * Names are those of the kernel's headers (asm/lguest_hcall.h, linux/lguest.h). What differs between kernel
 * versions is in struct abi; abi.c has one of them for each ABI and nothing else in the guest knows of it.
 */
#ifndef ABI_H
#define ABI_H

#define LGUEST_TRAP_ENTRY 0x1f

#define LHCALL_FLUSH_ASYNC 0
#define LHCALL_LGUEST_INIT 1
#define LHCALL_SHUTDOWN 2
#define LHCALL_LOAD_GDT 3 /* to 2.6.30 */
#define LHCALL_NEW_PGTABLE 4
#define LHCALL_FLUSH_TLB 5
#define LHCALL_LOAD_IDT_ENTRY 6
#define LHCALL_SET_STACK 7
#define LHCALL_TS 8
#define LHCALL_SET_CLOCKEVENT 9
#define LHCALL_HALT 10
#define LHCALL_SET_PTE 14
#define LHCALL_SET_PGD 15
#define LHCALL_LOAD_TLS 16
#define LHCALL_NOTIFY 17
#define LHCALL_LOAD_GDT_ENTRY 18   /* 2.6.31 and later */
#define LHCALL_SEND_INTERRUPTS 19 /* 2.6.31 and later */

#define LGUEST_SHUTDOWN_POWEROFF 1
#define LGUEST_SHUTDOWN_RESTART 2

#define LHCALL_RING_SIZE 64
#define HCALL_DONE 0xff /* hcall_status: free slot; 0 is "to be done" */

#define LGUEST_IRQS 32
#define FIRST_EXTERNAL_VECTOR 32 /* interrupt 0, the timer, has this vector */
#define SYSCALL_VECTOR 0x80
#define KERNEL_ADDRESS 0xc0000000

/* GDT entries and selectors, from asm/segment.h. The guest's kernel runs in ring 1. */
#define GDT_ENTRIES 32
#define GDT_ENTRY_TLS_MIN 6
#define GDT_ENTRY_TLS_ENTRIES 3
#define GDT_ENTRY_LGUEST_CS 10
#define GDT_ENTRY_KERNEL_CS 12
#define GDT_ENTRY_KERNEL_DS 13
#define GDT_ENTRY_USER_CS 14
#define GDT_ENTRY_USER_DS 15
#define GUEST_PL 1
#define USER_PL 3
#define KERNEL_CS (GDT_ENTRY_KERNEL_CS * 8 + GUEST_PL)
#define KERNEL_DS (GDT_ENTRY_KERNEL_DS * 8 + GUEST_PL)
#define USER_CS (GDT_ENTRY_USER_CS * 8 + USER_PL)
#define USER_DS (GDT_ENTRY_USER_DS * 8 + USER_PL)

#define X86_EFLAGS_FIXED 0x002
#define X86_EFLAGS_IF 0x200

/* struct lguest_data: the fields that every version has in the same place. */
#define LGUEST_DATA_irq_enabled 0
#define LGUEST_DATA_blocked_interrupts 4
#define LGUEST_DATA_cr2 8
#define LGUEST_DATA_time 12 /* seconds, nanoseconds */

#ifndef __ASSEMBLER__
#include "guest.h"

#define NO_FIELD 0xffff

struct abi {
	const char *name;
	/* Offsets in struct lguest_data; NO_FIELD where this version has none. */
	u16 irq_pending, hcall_status, hcalls, hcall_size, reserve_mem, tsc_khz, pgdir;
	u16 noirq_start, noirq_end, kernel_address, syscall_vec;
	bool vmcall;		/* a hypercall is a vmcall, which the host rewrites */
	bool args_from_edx;	/* arguments in edx, ebx, ecx instead of ebx, ecx, edx, esi */
	bool whole_gdt;		/* LOAD_GDT of the table, not LOAD_GDT_ENTRY */
	bool status_notify;	/* NOTIFY of a descriptor tells the launcher to look at the status; else it always resets */
	bool features_notify;	/* so does the last word about features; else the first kick comes right after them */
	bool send_interrupts;	/* has LHCALL_SEND_INTERRUPTS */
};

extern const struct abi *abi;
extern u8 lguest_data[4096];
/* Where the tables are that paging was on with at the start, and whether they mapped what they should; if abi->pgdir. */
extern u32 first_page_directory;
extern bool first_tables_seen;
extern u64 gdt[GDT_ENTRIES]; /* what the host was told */

/* Chooses the ABI; false if there is none of that name. */
bool abi_select(const char *name);
void abi_init(void);

u32 hcall(u32 call, u32 arg1, u32 arg2, u32 arg3, u32 arg4);
/* Puts the call in the asynchronous ring; when the slot is taken, makes it directly. True if it went into the ring. */
bool async_hcall(u32 call, u32 arg1, u32 arg2, u32 arg3, u32 arg4);
void gdt_set(unsigned int entry, u64 descriptor);

static inline volatile u32 *lguest_field(u16 offset)
{
	return (volatile u32 *)(void *)(lguest_data + offset);
}

static inline volatile u8 *hcall_status(void)
{
	return lguest_data + abi->hcall_status;
}
#endif
#endif
