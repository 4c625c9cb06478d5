/* SPDX-License-Identifier: GPL-2.0-only */
/* Interrupts, which are soft under lguest, and time. */
#include "abi.h"

volatile u32 irq_count[LGUEST_IRQS];
void (*irq_hook)(unsigned int irq);

/*
 * How fast the TSC is, by lguest_data.time, which is right just after an interrupt. The host may be kept busy between its look
 * at the time and ours at the TSC, or lose ticks that it counts its time by, which makes the TSC look faster. Hence several
 * measurements, of which one of the lower ones counts.
 */
#define TSC_SAMPLES 16
#define TSC_SAMPLE_MS 5

static u64 boot_tsc;
static u32 measured_khz;
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

/*
 * A host that doesn't trust its TSC says 0. Linux then goes by lguest_data.time, but that goes on with interrupts alone, and
 * we want a clock while they are off.
 */
u32 tsc_khz(void)
{
	u32 khz = *lguest_field(abi->tsc_khz);

	return khz ? khz : measured_khz;
}

u64 now_ns(void)
{
	u32 rest;
	u64 ms;

	ms = div_u64(rdtsc() - boot_tsc, tsc_khz(), &rest);
	return ms * NSEC_PER_MSEC + div_u64((u64)rest * NSEC_PER_MSEC, tsc_khz(), NULL);
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

static void halt_for_ms(u32 ms)
{
	u32 count = irq_count[0];

	set_clockevent(ms * NSEC_PER_MSEC);
	while (irq_count[0] == count)
		halt();
}

u32 measure_tsc(void)
{
	u64 tsc[TSC_SAMPLES], wall[TSC_SAMPLES];
	u32 khz[TSC_SAMPLES / 2];

	for (unsigned int i = 0; i < TSC_SAMPLES; i++) {
		halt_for_ms(TSC_SAMPLE_MS);
		tsc[i] = rdtsc();
		wall[i] = wallclock_ns();
	}
	for (unsigned int i = 0; i < TSC_SAMPLES / 2; i++) {
		/* In units of 1024 ns, so that the divisor has 32 bits; and somebody may have set the host's clock. */
		u64 cycles = tsc[i + TSC_SAMPLES / 2] - tsc[i], time = (wall[i + TSC_SAMPLES / 2] - wall[i]) >> 10;
		u32 value = time && !(time >> 32) ? div_u64(cycles * 15625 / 16, time, NULL) : 0;
		unsigned int place;

		for (place = i; place && khz[place - 1] > value; place--)
			khz[place] = khz[place - 1];
		khz[place] = value;
	}
	return khz[TSC_SAMPLES / 8];
}

void interrupts_init(void)
{
	irq_unblock(0);
	irq_restore(X86_EFLAGS_IF);
	if (!*lguest_field(abi->tsc_khz))
		measured_khz = measure_tsc();
	if (!tsc_khz())
		panic("lguest_data.time does not go on");
	boot_tsc = rdtsc();
}
