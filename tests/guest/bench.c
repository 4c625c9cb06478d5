/* SPDX-License-Identifier: GPL-2.0-only */
/* How long things take, in nanoseconds each. */
#include "abi.h"
#include "blk.h"
#include "user.h"

static bool skip_read(struct trap_frame *frame)
{
	frame->eip += 2;
	return true;
}

static void report(const char *name, u32 count, u64 start)
{
	u64 total = now_ns() - start;

	print("bench %s: %u times, %llu ns each\n", name, count, count ? div_u64(total, count, NULL) : 0);
}

static void faults(u32 count)
{
	bool (*old_hook)(struct trap_frame *) = trap_hook;
	u64 start = now_ns();

	trap_hook = skip_read;
	for (u32 i = 0; i < count; i++)
		asm volatile("movb (%%ebx), %%al" : : "b"(TEST_AREA + 0x100000) : "eax", "memory"); /* two bytes long */
	trap_hook = old_hook;
	report("fault", count, start);
}

static void reads(u32 count)
{
	struct device *disk = blk_open(0);
	u32 mark = alloc_mark(), span;
	void *page;
	u64 start;

	if (!disk)
		return;
	page = alloc_pages(1);
	span = min(blk_capacity(disk), (u64)0xffffff) / 8;
	start = now_ns();
	for (u32 i = 0; i < count && span; i++)
		if (blk_read(disk, (u64)(i % span) * 8, page, 8)) {
			print("bench blk: read %u failed\n", i);
			break;
		}
	report("blk", count, start);
	alloc_release(mark);
}

bool cmd_bench(int argc, char **argv)
{
	const char *what = argc == 3 ? argv[1] : "";
	u32 count;
	u64 start;

	if (!word_number(argc, argv, 2, &count))
		return false;
	start = now_ns();
	if (!strcmp(what, "hcall")) {
		for (u32 i = 0; i < count; i++)
			hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
		report("hcall", count, start);
	} else if (!strcmp(what, "syscall")) {
		user_map();
		start = now_ns();
		user_run(user_loop, 0, max(count, 1u));
		report("syscall", max(count, 1u), start);
		user_unmap();
	} else if (!strcmp(what, "fault"))
		faults(count);
	else if (!strcmp(what, "blk"))
		reads(count);
	else
		return false;
	return true;
}
