/* SPDX-License-Identifier: GPL-2.0-only */
/* What happens on a trap: interrupts go on to interrupts.c, the rest to whoever expects it, or it is the end. */
#include "abi.h"

struct guard { /* traps.S knows that esp comes first */
	u32 esp;
	struct guard *outer;
};

u32 guarded_call(struct guard *guard, void (*fn)(void *), void *arg);
noreturn void guard_unwind(struct guard *guard, u32 value);
noreturn void enter_user(u32 eip, u32 esp, u32 eax, u32 ebx);
void trap_dispatch(struct trap_frame *frame);
extern char trap_stubs[], syscall_stub[];

struct trap_info last_trap;
u32 trap_count;
bool (*trap_hook)(struct trap_frame *frame);
u8 trap_stack[2 * PAGE_SIZE] __attribute__((aligned(4096)));

static struct guard *current_guard;

bool traps(void (*fn)(void *arg), void *arg)
{
	u32 flags = *lguest_field(LGUEST_DATA_irq_enabled);
	struct guard guard = { 0, current_guard };
	bool trapped;

	current_guard = &guard;
	trapped = guarded_call(&guard, fn, arg);
	current_guard = guard.outer;
	irq_restore(flags); /* the gate may have disabled them */
	return trapped;
}

struct user_start {
	u32 eip, esp, eax, ebx;
};

static void enter_user_at(void *arg)
{
	struct user_start *start = arg;

	enter_user(start->eip, start->esp, start->eax, start->ebx);
}

void run_user(u32 eip, u32 esp, u32 eax, u32 ebx)
{
	struct user_start start = { eip, esp, eax, ebx };

	traps(enter_user_at, &start);
}

/* System calls of user.S: 0 ends the program with ebx as its result, 1 adds ebx, ecx and edx. */
static void system_call(struct trap_frame *frame)
{
	if (frame->eax == 1) {
		frame->eax = frame->ebx + frame->ecx + frame->edx;
		return;
	}
	last_trap = (struct trap_info){ TRAP_SYSCALL_EXIT, 0, frame->eip, frame->cs, 0, frame->ebx };
	if (current_guard)
		guard_unwind(current_guard, 1);
	panic("system call %u by nobody", frame->eax);
}

void trap_dispatch(struct trap_frame *frame)
{
	if (frame->number >= FIRST_EXTERNAL_VECTOR && frame->number < FIRST_EXTERNAL_VECTOR + LGUEST_IRQS) {
		irq_dispatch(frame->number - FIRST_EXTERNAL_VECTOR);
		return;
	}
	if (frame->number == SYSCALL_VECTOR) {
		system_call(frame);
		return;
	}
	last_trap = (struct trap_info){ frame->number,
					frame->error,
					frame->eip,
					frame->cs,
					*lguest_field(LGUEST_DATA_cr2),
					frame->eax };
	trap_count++;
	if (trap_hook && trap_hook(frame))
		return;
	if (current_guard)
		guard_unwind(current_guard, 1);
	panic("trap %u error %x at %x:%x cr2 %x", frame->number, frame->error, frame->cs, frame->eip, last_trap.cr2);
}

void idt_set(unsigned int vector, u32 handler, unsigned int type, unsigned int dpl)
{
	u32 low = (u32)KERNEL_CS << 16 | (handler & 0xffff);
	u32 high = (handler & 0xffff0000) | 0x8000 | dpl << 13 | type << 8;

	hcall(LHCALL_LOAD_IDT_ENTRY, vector, low, high, 0);
}

void idt_clear(unsigned int vector)
{
	hcall(LHCALL_LOAD_IDT_ENTRY, vector, 0, 0, 0);
}

void traps_init(void)
{
	/* Entries 12 and 13 are there from the start; ours are the same. */
	for (unsigned int entry = GDT_ENTRY_KERNEL_CS; entry <= GDT_ENTRY_USER_DS; entry++)
		gdt_set(entry, gdt[entry]);
	for (unsigned int vector = 0; vector < FIRST_EXTERNAL_VECTOR + LGUEST_IRQS; vector++) {
		/*
		 * Interrupt gates all, for those go by the host, which puts the soft interrupt flag into the frame. int3,
		 * into and bound are everybody's.
		 */
		bool for_users = vector == TRAP_BP || vector == TRAP_OF || vector == TRAP_BR;

		idt_set(vector, (u32)trap_stubs + vector * 16, GATE_INTERRUPT, for_users ? USER_PL : 0);
	}
	idt_set(SYSCALL_VECTOR, (u32)syscall_stub, GATE_TRAP, USER_PL);
	hcall(LHCALL_SET_STACK, KERNEL_DS, (u32)(trap_stack + sizeof(trap_stack)), sizeof(trap_stack) / PAGE_SIZE, 0);
}
