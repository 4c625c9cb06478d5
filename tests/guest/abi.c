/* SPDX-License-Identifier: GPL-2.0-only */
/* Everything that differs between lguest ABIs: how a hypercall is made, and where struct lguest_data has its fields. */
#include "abi.h"

/* The whole page, zeroed: no field of any version lies outside it. */
u8 lguest_data[4096] __attribute__((aligned(4096)));

/* To 2.6.30: without irq_pending, and with four words for each asynchronous call. */
#define EARLY_DATA                                                                                                     \
	.irq_pending = NO_FIELD, .hcall_status = 20, .hcalls = 84, .hcall_size = 16, .reserve_mem = 1108,                  \
	.tsc_khz = 1112, .pgdir = 1116, .noirq_start = 1120, .noirq_end = 1124, .kernel_address = 1128, .syscall_vec = 1132

static const struct abi abis[] = {
	{
		.name = "3.x",
		.irq_pending = 20,
		.hcall_status = 24,
		.hcalls = 88,
		.hcall_size = 20,
		.reserve_mem = 1368,
		.tsc_khz = 1372,
		.pgdir = NO_FIELD,
		.noirq_start = 1376,
		.noirq_end = 1380,
		.kernel_address = 1384,
		.syscall_vec = 1388,
		.status_notify = true,
		.features_notify = true,
		.send_interrupts = true,
	},
	{
		.name = "2.6.31",
		.irq_pending = 20,
		.hcall_status = 24,
		.hcalls = 88,
		.hcall_size = 20,
		.reserve_mem = 1368,
		.tsc_khz = 1372,
		.pgdir = 1376,
		.noirq_start = 1380,
		.noirq_end = 1384,
		.kernel_address = 1388,
		.syscall_vec = 1392,
		.vmcall = true,
		.status_notify = true,
		.send_interrupts = true,
	},
	{
		.name = "2.6.30",
		EARLY_DATA,
		.vmcall = true,
		.whole_gdt = true,
		.status_notify = true,
	},
	{
		.name = "2.6.26",
		EARLY_DATA,
		.args_from_edx = true,
		.whole_gdt = true,
		.status_notify = true,
	},
	{
		.name = "2.6.25",
		EARLY_DATA,
		.args_from_edx = true,
		.whole_gdt = true,
	},
};

const struct abi *abi = &abis[0];

u32 first_page_directory;
bool first_tables_seen;

bool abi_select(const char *name)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(abis); i++) {
		if (!strcmp(name, abis[i].name)) {
			abi = &abis[i];
			return true;
		}
	}
	return false;
}

u32 hcall(u32 call, u32 arg1, u32 arg2, u32 arg3, u32 arg4)
{
	u32 ebx = arg1, ecx = arg2, edx = arg3, esi = arg4;

	if (abi->args_from_edx) {
		edx = arg1;
		ebx = arg2;
		ecx = arg3;
		esi = 0;
	}
	if (abi->vmcall) /* the host writes an int in its place, and this runs once */
		asm volatile(".byte 0x0f, 0x01, 0xc1" : "+a"(call) : "b"(ebx), "c"(ecx), "d"(edx), "S"(esi) : "memory");
	else
		asm volatile("int %1"
			     : "+a"(call)
			     : "i"(LGUEST_TRAP_ENTRY), "b"(ebx), "c"(ecx), "d"(edx), "S"(esi)
			     : "memory");
	return call;
}

bool async_hcall(u32 call, u32 arg1, u32 arg2, u32 arg3, u32 arg4)
{
	static unsigned int next;
	u32 flags = irq_save(); /* an interrupt handler might want the same slot */
	volatile u32 *slot = lguest_field(abi->hcalls + next * abi->hcall_size);
	bool queued = hcall_status()[next] == HCALL_DONE;

	if (queued) {
		slot[0] = call;
		if (abi->args_from_edx) { /* eax, ebx, ecx, edx */
			slot[1] = arg2;
			slot[2] = arg3;
			slot[3] = arg1;
		} else {
			slot[1] = arg1;
			slot[2] = arg2;
			slot[3] = arg3;
			if (abi->hcall_size == 20)
				slot[4] = arg4;
		}
		barrier();
		hcall_status()[next] = 0;
		next = (next + 1) % LHCALL_RING_SIZE;
	} else {
		/* A direct call makes the host run the whole ring first, so order is kept. */
		hcall(call, arg1, arg2, arg3, arg4);
	}
	irq_restore(flags);
	return queued;
}

/* Flat 4 GiB segments. */
#define CODE_SEGMENT(dpl) (0x00cf9b000000ffffull | (u64)(dpl) << 45)
#define DATA_SEGMENT(dpl) (0x00cf93000000ffffull | (u64)(dpl) << 45)

u64 gdt[GDT_ENTRIES] __attribute__((aligned(8))) = {
	[GDT_ENTRY_KERNEL_CS] = CODE_SEGMENT(GUEST_PL),
	[GDT_ENTRY_KERNEL_DS] = DATA_SEGMENT(GUEST_PL),
	[GDT_ENTRY_USER_CS] = CODE_SEGMENT(USER_PL),
	[GDT_ENTRY_USER_DS] = DATA_SEGMENT(USER_PL),
};

void gdt_set(unsigned int entry, u64 descriptor)
{
	gdt[entry] = descriptor;
	if (abi->whole_gdt)
		hcall(LHCALL_LOAD_GDT, (u32)gdt, GDT_ENTRIES, 0, 0);
	else
		hcall(LHCALL_LOAD_GDT_ENTRY, entry, (u32)descriptor, (u32)(descriptor >> 32), 0);
}

void abi_init(void)
{
	extern char noirq_start[], noirq_end[];

	for (unsigned int i = 0; i < LHCALL_RING_SIZE; i++)
		hcall_status()[i] = HCALL_DONE;
	*lguest_field(LGUEST_DATA_blocked_interrupts) = 0xffffffff;
	*lguest_field(abi->noirq_start) = (u32)noirq_start;
	*lguest_field(abi->noirq_end) = (u32)noirq_end;
	/* No page tables are shared above this: what we map is all below. */
	*lguest_field(abi->kernel_address) = KERNEL_ADDRESS;
	*lguest_field(abi->syscall_vec) = SYSCALL_VECTOR;
	hcall(LHCALL_LGUEST_INIT, (u32)lguest_data, 0, 0, 0);
	if (abi->pgdir != NO_FIELD) {
		/* Linux of these eras goes on at its linked address now, on the tables that it found. */
		first_page_directory = *lguest_field(abi->pgdir);
		first_tables_seen = *(volatile u32 *)(KERNEL_ADDRESS + (u32)lguest_data + abi->syscall_vec) == SYSCALL_VECTOR &&
				    (*(volatile u32 *)first_page_directory & PTE_PRESENT);
	}
}
