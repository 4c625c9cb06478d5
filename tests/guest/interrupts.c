/* SPDX-License-Identifier: GPL-2.0-only */
/* Interrupts, which are soft under lguest, and time. */
#include "abi.h"

volatile u32 irq_count[LGUEST_IRQS];
void (*irq_hook)(unsigned int irq);

static u64 boot_tsc, boot_wallclock;
static volatile bool clock_armed;

void irq_dispatch(unsigned int irq)
{
	irq_count[irq]++;
	if (irq == 0)
		clock_armed = false;
	if (irq_hook)
		irq_hook(irq);
}

void irq_block(unsigned int irq)
{
	*lguest_field(LGUEST_DATA_blocked_interrupts) |= 1u << irq;
}

void irq_unblock(unsigned int irq)
{
	*lguest_field(LGUEST_DATA_blocked_interrupts) &= ~(1u << irq);
}

u32 irq_save(void)
{
	u32 flags = *lguest_field(LGUEST_DATA_irq_enabled);

	*lguest_field(LGUEST_DATA_irq_enabled) = 0;
	barrier();
	return flags;
}

void irq_restore(u32 flags)
{
	barrier();
	*lguest_field(LGUEST_DATA_irq_enabled) = flags & X86_EFLAGS_IF;
	/* The host may have an interrupt that it held back; without this it would see only later that it need not. */
	if ((flags & X86_EFLAGS_IF) && abi->send_interrupts && *lguest_field(abi->irq_pending))
		hcall(LHCALL_SEND_INTERRUPTS, 0, 0, 0, 0);
}

void halt(void)
{
	hcall(LHCALL_HALT, 0, 0, 0, 0);
}

void set_clockevent(u32 nanoseconds)
{
	clock_armed = nanoseconds != 0;
	hcall(LHCALL_SET_CLOCKEVENT, nanoseconds, 0, 0, 0);
}

u64 rdtsc(void)
{
	u64 value;

	asm volatile("rdtsc" : "=A"(value));
	return value;
}

/* The host writes the seconds and then the nanoseconds, and may do so in between our reads. */
u64 wallclock_ns(void)
{
	volatile u32 *time = lguest_field(LGUEST_DATA_time);
	u32 seconds, nanoseconds;

	do {
		seconds = time[0];
		nanoseconds = time[1];
	} while (seconds != time[0]);
	return (u64)seconds * NSEC_PER_SEC + nanoseconds;
}

u64 now_ns(void)
{
	u32 khz = *lguest_field(abi->tsc_khz);
	u32 rest;
	u64 ms;

	if (!khz)
		return wallclock_ns() - boot_wallclock;
	ms = div_u64(rdtsc() - boot_tsc, khz, &rest);
	return ms * NSEC_PER_MSEC + div_u64((u64)rest * NSEC_PER_MSEC, khz, NULL);
}

void delay_ns(u32 nanoseconds)
{
	u64 end = now_ns() + nanoseconds;

	while (now_ns() < end)
		cpu_relax();
}

bool wait_for(bool (*done)(void *arg), void *arg, u32 timeout_ms)
{
	u64 start = now_ns();
	u64 limit = (u64)timeout_ms * NSEC_PER_MSEC;

	for (;;) {
		u32 flags;

		if (done(arg))
			return true;
		if (timeout_ms && now_ns() - start > limit)
			return false;
		if (setting_poll) {
			cpu_relax();
			continue;
		}
		/* Off, so that no interrupt comes between the look and the halt; the halt puts them on. */
		flags = irq_save();
		if (!done(arg)) {
			/* Without a timeout nothing but the event itself may wake us. */
			if (timeout_ms && !clock_armed)
				set_clockevent(min((u64)NSEC_PER_SEC, limit));
			halt();
		}
		irq_restore(flags);
	}
}

void interrupts_init(void)
{
	boot_tsc = rdtsc();
	boot_wallclock = wallclock_ns();
	irq_unblock(0);
	irq_restore(X86_EFLAGS_IF);
}
