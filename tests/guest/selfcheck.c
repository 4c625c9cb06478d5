/* SPDX-License-Identifier: GPL-2.0-only */
/* Checks of the CPU, the host and the devices, reported as TAP lines. */
#include "abi.h"
#include "blk.h"
#include "user.h"

static unsigned int passed, failed;

/* One check: its name, and what to say of it when it fails. */
static void printf_like(3, 4) check(bool ok, const char *name, const char *details, ...)
{
	char text[160];
	va_list args;

	if (ok)
		passed++;
	else
		failed++;
	va_start(args, details);
	vformat(text, sizeof(text), details, args);
	va_end(args);
	if (ok)
		print("ok %u - %s\n", passed + failed, name);
	else
		print("not ok %u - %s: %s\n", passed + failed, name, text);
}

/* Memory */

static void check_memory(void)
{
	u32 start = alloc_mark(), end = memory_end & ~3u, wrong = 0, where = 0;
	/* All of it in a small guest; a word in each cache line or so in a big one, for the sake of time. */
	u32 step = end - start > 64u << 20 ? 1024 : 4;

	for (u32 address = start; address < end; address += step)
		*(volatile u32 *)address = address ^ 0xa5a5a5a5;
	for (u32 address = start; address < end; address += step)
		if (*(volatile u32 *)address != (address ^ 0xa5a5a5a5) && !wrong++)
			where = address;
	check(!wrong, "memory holds what was written", "%u words wrong, the first at %x", wrong, where);
}

/* Page tables */

#define TEST_PAGE (TEST_AREA + 0x10000)
#define ALIAS_PAGE (TEST_AREA + 0x11000)

static void read_byte(void *address)
{
	*(volatile u8 *)address;
}

static void write_byte(void *address)
{
	*(volatile u8 *)address = 1;
}

static void call_address(void *address)
{
	((void (*)(void))address)();
}

static void check_trap(bool trapped, const char *name, u32 number, u32 error)
{
	check(trapped && last_trap.number == number && last_trap.error == error, name,
	      "expected trap %u error %x, got %s %u error %x at %x", number, error, trapped ? "trap" : "no trap, last",
	      last_trap.number, last_trap.error, last_trap.eip);
}

static void check_fault(void (*fn)(void *), u32 address, u32 error, const char *name)
{
	bool trapped = traps(fn, (void *)address);

	check(trapped && last_trap.number == TRAP_PF && last_trap.error == error && last_trap.cr2 == address, name,
	      "expected a page fault, error %x, at %x; got %s %u error %x cr2 %x", error, address,
	      trapped ? "trap" : "no trap, last", last_trap.number, last_trap.error, last_trap.cr2);
}

static void check_paging(void)
{
	u32 mark = alloc_mark();
	u8 *a = alloc_pages(1), *b = alloc_pages(1);
	u32 *directory = alloc_pages(1), *table = alloc_pages(1);
	volatile u8 *test = (u8 *)TEST_PAGE, *alias = (u8 *)ALIAS_PAGE;
	u8 first, second;

	a[0] = 0xaa;
	b[0] = 0xbb;
	check_fault(read_byte, TEST_PAGE, 0, "reading an unmapped page faults");
	check_fault(write_byte, TEST_PAGE, 2, "writing an unmapped page faults");
	check_fault(call_address, TEST_PAGE, 0, "jumping to an unmapped page faults");
	check(last_trap.eip == TEST_PAGE, "a fault on a fetch is where the fetch was", "eip %x", last_trap.eip);

	map_page(TEST_PAGE, (u32)a, PTE_KERNEL);
	map_page(ALIAS_PAGE, (u32)a, PTE_KERNEL);
	check(test[0] == 0xaa, "a mapped page can be read", "%x", test[0]);
	test[1] = 0x11;
	check(alias[1] == 0x11 && a[1] == 0x11, "what is written is seen through an alias", "%x %x", alias[1], a[1]);
	map_page(TEST_PAGE, (u32)b, PTE_KERNEL);
	check(test[0] == 0xbb, "SET_PTE maps another page in its place", "%x", test[0]);
	unmap_page(TEST_PAGE);
	check_fault(read_byte, TEST_PAGE, 0, "reading a page that was unmapped faults");
	map_page(TEST_PAGE, (u32)a, PTE_PRESENT | PTE_ACCESSED);
	check(test[0] == 0xaa, "a read-only page can be read", "%x", test[0]);
	check_fault(write_byte, TEST_PAGE, 3, "writing a read-only page faults in ring 1");
	map_page(TEST_PAGE, (u32)a, PTE_KERNEL);
	check(!traps(write_byte, (void *)TEST_PAGE), "it can be written once it is writable", "trap %u error %x",
	      last_trap.number, last_trap.error);

	map_page(TEST_PAGE, (u32)a, PTE_PRESENT | PTE_RW);
	first = test[0];
	first = *pte_of(TEST_PAGE) & (PTE_ACCESSED | PTE_DIRTY);
	test[0] = 0xaa;
	second = *pte_of(TEST_PAGE) & (PTE_ACCESSED | PTE_DIRTY);
	check(first == PTE_ACCESSED && second == (PTE_ACCESSED | PTE_DIRTY), "accessed and dirty bits are set", "%x after "
	      "the read, %x after the write", first, second);

	*pte_of(TEST_PAGE) = (u32)b | PTE_KERNEL;
	hcall(LHCALL_FLUSH_TLB, 1, 0, 0, 0);
	check(test[0] == 0xbb, "FLUSH_TLB 1 makes a changed entry count", "%x", test[0]);
	*pte_of(TEST_PAGE) = (u32)a | PTE_KERNEL;
	hcall(LHCALL_FLUSH_TLB, 0, 0, 0, 0);
	check(test[0] == 0xaa, "FLUSH_TLB 0 makes a changed entry count", "%x", test[0]);

	/* A second page directory, the same but for the test area. Entry 1023 is for the host to fill. */
	memcpy(directory, page_directory, 1023 * 4);
	memcpy(table, (void *)(page_directory[TEST_AREA >> 22] & ~0xfffu), PAGE_SIZE);
	directory[TEST_AREA >> 22] = (u32)table | PTE_KERNEL | PTE_USER;
	table[(TEST_PAGE >> PAGE_SHIFT) % 1024] = (u32)b | PTE_KERNEL;
	hcall(LHCALL_NEW_PGTABLE, (u32)directory, 0, 0, 0);
	first = test[0];
	hcall(LHCALL_NEW_PGTABLE, (u32)page_directory, 0, 0, 0);
	second = test[0];
	check(first == 0xbb && second == 0xaa, "NEW_PGTABLE changes to another page directory and back", "%x %x", first,
	      second);

	page_directory[(TEST_AREA >> 22) + 1] = (u32)table | PTE_KERNEL | PTE_USER;
	hcall(LHCALL_SET_PGD, (u32)page_directory, (TEST_AREA >> 22) + 1, 0, 0);
	first = *(volatile u8 *)(TEST_PAGE + (4u << 20));
	check(first == 0xbb, "SET_PGD adds a page table", "%x", first);
	page_directory[(TEST_AREA >> 22) + 1] = 0;
	hcall(LHCALL_SET_PGD, (u32)page_directory, (TEST_AREA >> 22) + 1, 0, 0);
	check_fault(read_byte, TEST_PAGE + (4u << 20), 0, "SET_PGD takes it away again");

	unmap_page(TEST_PAGE);
	unmap_page(ALIAS_PAGE);
	alloc_release(mark);
	if (abi->pgdir != NO_FIELD)
		check(first_tables_seen && first_page_directory < memory_size,
		      "paging was on from the start, and RAM mapped where the kernel is linked", "tables at %x",
		      first_page_directory);
	check(*lguest_field(abi->reserve_mem) >= PAGE_SIZE && *lguest_field(abi->reserve_mem) <= 64u << 20,
	      "the host keeps some memory at the top for itself", "%x", *lguest_field(abi->reserve_mem));
	check(traps(write_byte, (void *)(0u - *lguest_field(abi->reserve_mem))) && last_trap.number == TRAP_PF,
	      "which can't be written", "trap %u error %x", last_trap.number, last_trap.error);
}

/* A read that traps is skipped: the instruction is two bytes. */
static bool skip_two(struct trap_frame *frame)
{
	if (frame->number != TRAP_PF)
		return false;
	frame->eip += 2;
	return true;
}

static u32 inner_faults;

static bool skip_two_and_fault(struct trap_frame *frame)
{
	if (!skip_two(frame))
		return false;
	trap_hook = NULL;
	inner_faults += traps(write_byte, (void *)ALIAS_PAGE) && last_trap.error == 2 && last_trap.cr2 == ALIAS_PAGE;
	trap_hook = skip_two_and_fault;
	return true;
}

static void check_many_faults(void)
{
	u32 before = trap_count;

	trap_hook = skip_two;
	for (unsigned int i = 0; i < 1000; i++)
		asm volatile("movb (%%ebx), %%al" : : "b"(TEST_PAGE + i % 2 * PAGE_SIZE) : "eax", "memory");
	trap_hook = NULL;
	check(trap_count - before == 1000, "1000 page faults in a row are 1000 page faults", "%u", trap_count - before);
	inner_faults = 0;
	before = trap_count;
	trap_hook = skip_two_and_fault;
	for (unsigned int i = 0; i < 100; i++)
		asm volatile("movb (%%ebx), %%al" : : "b"(TEST_PAGE) : "eax", "memory");
	trap_hook = NULL;
	check(inner_faults == 100 && trap_count - before == 200, "a fault may come within a fault",
	      "%u traps, %u inner ones as expected", trap_count - before, inner_faults);
}

/*
 * Traps in ring 1. Segment limits and reads through a null segment are not checked here, since Unicorn's CPU doesn't
 * check them; nor are ins and outs, which it can't tell from in and out. The misdeeds have them.
 */

static volatile u32 instruction __attribute__((used)), after_instruction __attribute__((used));

/* A function that runs "setup" and then an instruction whose address it notes. */
#define INSTRUCTION(name, setup, text)                                                                                   \
	static noinline void name(void *arg)                                                                             \
	{                                                                                                                \
		asm volatile("movl $1f, instruction\n\tmovl $2f, after_instruction\n\t" setup "\n1:\t" text "\n2:\n"     \
			     : "+a"(arg)                                                                                  \
			     :                                                                                            \
			     : "ecx", "edx", "memory", "cc");                                                             \
	}

INSTRUCTION(do_divide, "xorl %%ecx, %%ecx", "divl %%ecx")
INSTRUCTION(do_int3, "", "int3")
INSTRUCTION(do_into, "movb $127, %%cl; addb $1, %%cl", "into")
INSTRUCTION(do_bound, "movl $bounds, %%ecx; movl $21, %%eax", "bound %%eax, (%%ecx)")
INSTRUCTION(do_ud2, "", "ud2")
INSTRUCTION(do_hlt, "", "hlt")
INSTRUCTION(do_sti, "", "sti")
INSTRUCTION(do_read_cr0, "", "movl %%cr0, %%ecx")
INSTRUCTION(do_write_cr0, "movl $0x80050033, %%ecx", "movl %%ecx, %%cr0")
INSTRUCTION(do_write_cr3, "xorl %%ecx, %%ecx", "movl %%ecx, %%cr3")
INSTRUCTION(do_clts, "", "clts")
INSTRUCTION(do_lgdt, "", "lgdt (%%eax)")
INSTRUCTION(do_lidt, "", "lidt (%%eax)")
INSTRUCTION(do_ltr, "movl $0x80, %%ecx", "ltr %%cx")
INSTRUCTION(do_invlpg, "", "invlpg (%%eax)")
INSTRUCTION(do_wbinvd, "", "wbinvd")
INSTRUCTION(do_rdmsr, "movl $0x10, %%ecx", "rdmsr")
INSTRUCTION(do_wrmsr, "movl $0x174, %%ecx", "wrmsr")
INSTRUCTION(do_int21, "", "int $0x21")
INSTRUCTION(do_int90, "", "int $0x90")
INSTRUCTION(do_load_ds, "", "movl %%eax, %%ds")
INSTRUCTION(do_load_fs, "", "movl %%eax, %%fs")
INSTRUCTION(do_load_ss, "", "movl %%eax, %%ss")
INSTRUCTION(do_far_jump, "pushl %%eax; pushl $0", "ljmp *(%%esp)")
INSTRUCTION(do_far_return, "pushl %%eax; pushl $0", "lret")
INSTRUCTION(do_cli, "", "cli")

static const u32 bounds[2] __attribute__((used)) = { 10, 20 };

/* Descriptors for the selector checks: not-present ones and a code segment that can't be read. */
#define GDT_ENTRY_DATA_ABSENT 20
#define GDT_ENTRY_CODE_ONLY 21
#define GDT_ENTRY_CODE_ABSENT 22
#define SELECTOR(entry, rpl) ((entry) * 8 + (rpl))

static const struct ring1_trap {
	const char *name;
	void (*run)(void *arg);
	u32 arg, number, error;
	bool after; /* a trap: eip is of the next instruction */
} ring1_traps[] = {
	{ "dividing by zero", do_divide, 0, TRAP_DE, 0, false },
	{ "int3", do_int3, 0, TRAP_BP, 0, true },
	{ "into after an overflow", do_into, 0, TRAP_OF, 0, true },
	{ "bound", do_bound, 0, TRAP_BR, 0, false },
	{ "ud2", do_ud2, 0, TRAP_UD, 0, false },
	{ "hlt", do_hlt, 0, TRAP_GP, 0, false },
	{ "sti", do_sti, 0, TRAP_GP, 0, false },
	{ "reading cr0", do_read_cr0, 0, TRAP_GP, 0, false },
	{ "writing cr0", do_write_cr0, 0, TRAP_GP, 0, false },
	{ "writing cr3", do_write_cr3, 0, TRAP_GP, 0, false },
	{ "clts", do_clts, 0, TRAP_GP, 0, false },
	{ "lgdt", do_lgdt, (u32)bounds, TRAP_GP, 0, false },
	{ "lidt", do_lidt, (u32)bounds, TRAP_GP, 0, false },
	{ "ltr", do_ltr, 0, TRAP_GP, 0, false },
	{ "invlpg", do_invlpg, 0, TRAP_GP, 0, false },
	{ "wbinvd", do_wbinvd, 0, TRAP_GP, 0, false },
	{ "rdmsr", do_rdmsr, 0, TRAP_GP, 0, false },
	{ "wrmsr", do_wrmsr, 0, TRAP_GP, 0, false },
	{ "int of a gate for ring 0", do_int21, 0, TRAP_GP, 0x21 * 8 + 2, false },
	{ "int without a gate", do_int90, 0, TRAP_GP, 0x90 * 8 + 2, false },
	{ "ds beyond the table", do_load_ds, 0x101, TRAP_GP, 0x100, false },
	{ "ds in the local table", do_load_ds, 0x0d, TRAP_GP, 0x0c, false },
	{ "ds of the host", do_load_ds, SELECTOR(GDT_ENTRY_LGUEST_CS + 1, 1), TRAP_GP, SELECTOR(GDT_ENTRY_LGUEST_CS + 1, 0),
	  false },
	{ "ds not present", do_load_ds, SELECTOR(GDT_ENTRY_DATA_ABSENT, 1), TRAP_NP, SELECTOR(GDT_ENTRY_DATA_ABSENT, 0), false },
	{ "fs not present", do_load_fs, SELECTOR(GDT_ENTRY_DATA_ABSENT, 1), TRAP_NP, SELECTOR(GDT_ENTRY_DATA_ABSENT, 0), false },
	{ "ds of execute-only code", do_load_ds, SELECTOR(GDT_ENTRY_CODE_ONLY, 1), TRAP_GP, SELECTOR(GDT_ENTRY_CODE_ONLY, 0),
	  false },
	{ "ss not present", do_load_ss, SELECTOR(GDT_ENTRY_DATA_ABSENT, 1), TRAP_SS, SELECTOR(GDT_ENTRY_DATA_ABSENT, 0), false },
	{ "ss null", do_load_ss, 0, TRAP_GP, 0, false },
	{ "ss of another ring", do_load_ss, SELECTOR(GDT_ENTRY_USER_DS, 3), TRAP_GP, SELECTOR(GDT_ENTRY_USER_DS, 0), false },
	{ "a far jump to the host's code", do_far_jump, SELECTOR(GDT_ENTRY_LGUEST_CS, 1), TRAP_GP,
	  SELECTOR(GDT_ENTRY_LGUEST_CS, 0), false },
	{ "a far jump to data", do_far_jump, KERNEL_DS, TRAP_GP, SELECTOR(GDT_ENTRY_KERNEL_DS, 0), false },
	{ "a far jump to code not present", do_far_jump, SELECTOR(GDT_ENTRY_CODE_ABSENT, 1), TRAP_NP,
	  SELECTOR(GDT_ENTRY_CODE_ABSENT, 0), false },
	{ "a far return to ring 0", do_far_return, SELECTOR(GDT_ENTRY_KERNEL_CS, 0), TRAP_GP, SELECTOR(GDT_ENTRY_KERNEL_CS, 0),
	  false },
};

static u32 flags_in_handler, frame_flags;

static bool note_flags(struct trap_frame *frame)
{
	if (frame->number != TRAP_BP)
		return false;
	flags_in_handler = *lguest_field(LGUEST_DATA_irq_enabled);
	frame_flags = frame->eflags & X86_EFLAGS_IF;
	return true;
}

static void check_gate_flags(void)
{
	u32 after;

	trap_hook = note_flags;
	do_int3(NULL);
	after = *lguest_field(LGUEST_DATA_irq_enabled);
	check(!flags_in_handler && frame_flags && after == X86_EFLAGS_IF,
	      "an interrupt gate turns interrupts off, and iret on again", "in the handler %x, in the frame %x, after %x",
	      flags_in_handler, frame_flags, after);
	irq_save();
	do_int3(NULL);
	after = *lguest_field(LGUEST_DATA_irq_enabled);
	irq_restore(X86_EFLAGS_IF);
	check(!flags_in_handler && !frame_flags && !after, "a trap with interrupts off leaves them off",
	      "in the handler %x, in the frame %x, after %x", flags_in_handler, frame_flags, after);
	extern char trap_stubs[];
	idt_set(TRAP_BP, (u32)trap_stubs + TRAP_BP * 16, GATE_TRAP, USER_PL);
	do_int3(NULL);
	after = *lguest_field(LGUEST_DATA_irq_enabled);
	idt_set(TRAP_BP, (u32)trap_stubs + TRAP_BP * 16, GATE_INTERRUPT, USER_PL);
	trap_hook = NULL;
	check(flags_in_handler && frame_flags && after, "a trap gate leaves interrupts on",
	      "in the handler %x, in the frame %x, after %x", flags_in_handler, frame_flags, after);
}

static void check_ports(void)
{
	u32 byte = 0x12345678, word = 0x12345678, dword = 0x12345678, imm_byte = 0x12345678, imm_word = 0x12345678,
	    imm_dword = 0x12345678;

	asm volatile("inb %%dx, %%al" : "+a"(byte) : "d"(0x3f8));
	asm volatile("inw %%dx, %%ax" : "+a"(word) : "d"(0x3f8));
	asm volatile("inl %%dx, %%eax" : "+a"(dword) : "d"(0x3f8));
	check(byte == 0x123456ff && word == 0x1234ffff && dword == 0xffffffff, "in (%dx) reads all ones", "%x %x %x", byte, word,
	      dword);
	asm volatile("inb $0x80, %%al" : "+a"(imm_byte));
	asm volatile("inw $0x80, %%ax" : "+a"(imm_word));
	asm volatile("inl $0x80, %%eax" : "+a"(imm_dword));
	check(imm_byte == 0x123456ff && imm_word == 0x1234ffff && imm_dword == 0xffffffff, "in $port reads all ones", "%x %x %x",
	      imm_byte, imm_word, imm_dword);
	byte = 0x12345678;
	asm volatile("outb %%al, %%dx; outw %%ax, %%dx; outl %%eax, %%dx; outb %%al, $0x80; outw %%ax, $0x80; outl %%eax, $0x80"
		     : "+a"(byte)
		     : "d"(0x3f8));
	check(byte == 0x12345678, "out does nothing", "%x", byte);
}

static void check_ring1_traps(void)
{
	u64 kernel_data = gdt[GDT_ENTRY_KERNEL_DS], kernel_code = gdt[GDT_ENTRY_KERNEL_CS];
	u64 present = 1ull << 47, readable = 1ull << 41;
	char name[80];
	u32 eflags;

	gdt_set(GDT_ENTRY_DATA_ABSENT, kernel_data & ~present);
	gdt_set(GDT_ENTRY_CODE_ONLY, kernel_code & ~readable);
	gdt_set(GDT_ENTRY_CODE_ABSENT, kernel_code & ~present);
	for (unsigned int i = 0; i < ARRAY_SIZE(ring1_traps); i++) {
		const struct ring1_trap *t = &ring1_traps[i];
		bool trapped = traps(t->run, (void *)t->arg);
		u32 eip = t->after ? after_instruction : instruction;

		format(name, sizeof(name), "ring 1: %s", t->name);
		if (trapped && last_trap.number == t->number && last_trap.error == t->error)
			check(last_trap.eip == eip && last_trap.cs == KERNEL_CS, name, "at %x:%x, expected %x:%x", last_trap.cs,
			      last_trap.eip, KERNEL_CS, eip);
		else
			check_trap(trapped, name, t->number, t->error);
	}
	check(!traps(do_cli, NULL), "cli is skipped", "trap %u error %x", last_trap.number, last_trap.error);
	asm volatile("pushfl; popl %0" : "=r"(eflags));
	check(eflags & X86_EFLAGS_IF, "after which the CPU's own interrupt flag is set, as always", "%x", eflags);
	check_gate_flags();
	check_ports();
}

/* Floating point and TS */

static void do_fpu(void *arg)
{
	(void)arg;
	asm volatile("fninit");
}

static bool clear_ts(struct trap_frame *frame)
{
	if (frame->number != TRAP_NM)
		return false;
	hcall(LHCALL_TS, 0, 0, 0, 0);
	return true;
}

/* 12 * 12 / 9 and the root of it, with the FPU stack in use across a hypercall. */
static u32 fpu_sum(void)
{
	u32 twelve = 12, nine = 9, result = 0;

	asm volatile("fninit; fildl %1; fildl %1; fmulp; fildl %2; fdivrp" : : "m"(result), "m"(twelve), "m"(nine));
	hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
	asm volatile("fsqrt; fistpl %0" : "=m"(result));
	return result;
}

static void check_fpu(void)
{
	u32 result = fpu_sum(), before;

	check(result == 4, "the FPU computes", "%u", result);
	hcall(LHCALL_TS, 1, 0, 0, 0);
	check_trap(traps(do_fpu, NULL), "the FPU traps after TS 1", TRAP_NM, 0);
	hcall(LHCALL_TS, 0, 0, 0, 0);
	check(!traps(do_fpu, NULL), "and no more after TS 0", "trap %u", last_trap.number);
	hcall(LHCALL_TS, 1, 0, 0, 0);
	before = trap_count;
	trap_hook = clear_ts;
	result = fpu_sum();
	trap_hook = NULL;
	check(result == 4 && trap_count - before == 1, "a handler of the trap may switch it on", "%u after %u traps", result,
	      trap_count - before);
}

/* Ring 3 */

void user_map(void)
{
	u8 *code = alloc_pages(3);

	memcpy(code, user_start, user_end - user_start);
	map_page(USER_CODE, (u32)code, PTE_KERNEL | PTE_USER);
	map_page(USER_DATA, (u32)code + PAGE_SIZE, PTE_KERNEL | PTE_USER);
	map_page(USER_STACK, (u32)code + 2 * PAGE_SIZE, PTE_KERNEL | PTE_USER);
}

void user_unmap(void)
{
	u32 code = *pte_of(USER_CODE) & ~0xfffu;

	unmap_page(USER_CODE);
	unmap_page(USER_DATA);
	unmap_page(USER_STACK);
	alloc_release(code);
}

void user_run(const char *program, u32 eax, u32 ebx)
{
	run_user(USER_CODE + (program - user_start), USER_STACK_TOP, eax, ebx);
}

static const struct ring3_trap {
	const char *name;
	const char *program;
	u32 number, error;
} ring3_traps[] = {
	{ "in", user_in, TRAP_GP, 0 },
	{ "out", user_out, TRAP_GP, 0 },
	{ "hlt", user_hlt, TRAP_GP, 0 },
	{ "cli", user_cli, TRAP_GP, 0 },
	{ "sti", user_sti, TRAP_GP, 0 },
	{ "reading cr0", user_cr0, TRAP_GP, 0 },
	{ "sysenter", user_sysenter, TRAP_GP, 0 },
	{ "syscall", user_syscall, TRAP_UD, 0 },
	{ "int 13", user_int13, TRAP_GP, 13 * 8 + 2 },
	{ "a hypercall", user_hypercall, TRAP_GP, LGUEST_TRAP_ENTRY * 8 + 2 },
	{ "int without a gate", user_int90, TRAP_GP, 0x90 * 8 + 2 },
	{ "int3", user_int3, TRAP_BP, 0 },
	{ "into after an overflow", user_into, TRAP_OF, 0 },
	{ "bound", user_bound, TRAP_BR, 0 },
	{ "dividing by zero", user_divide, TRAP_DE, 0 },
	{ "ud2", user_ud2, TRAP_UD, 0 },
	{ "ds of ring 1", user_load_ds, TRAP_GP, SELECTOR(GDT_ENTRY_KERNEL_DS, 0) },
	{ "ss of ring 1", user_load_ss, TRAP_GP, SELECTOR(GDT_ENTRY_KERNEL_DS, 0) },
	{ "a call into ring 1", user_call_kernel, TRAP_GP, SELECTOR(GDT_ENTRY_KERNEL_CS, 0) },
};

/* "unseen" are the bits of the error code that may also be clear. */
static void check_user_fault_unseen(const char *program, u32 address, u32 error, u32 unseen, const char *name)
{
	user_run(program, 0, address);
	check(last_trap.number == TRAP_PF && (last_trap.error | unseen) == error && last_trap.cr2 == address &&
		      last_trap.cs == USER_CS,
	      name, "expected a page fault, error %x, at %x; got trap %u error %x cr2 %x cs %x", error, address,
	      last_trap.number, last_trap.error, last_trap.cr2, last_trap.cs);
}

static void check_user_fault(const char *program, u32 address, u32 error, const char *name)
{
	check_user_fault_unseen(program, address, error, 0, name);
}

static volatile u32 *user_word;
static u32 irq_from_user;

static void wake_user(unsigned int irq)
{
	if (!irq) {
		*user_word = 99;
		irq_from_user++;
	}
}

static void check_tls(void)
{
	static u64 tls[GDT_ENTRY_TLS_ENTRIES] __attribute__((aligned(8)));
	u32 base = USER_DATA + 256, value = 0;

	/* Byte-granular, 16 bytes long, data for ring 3, at "base". */
	tls[0] = 0x0040f2000000000full | (u64)(base & 0xffffff) << 16 | (u64)(base >> 24) << 56;
	*(volatile u32 *)base = 0x7154;
	hcall(LHCALL_LOAD_TLS, (u32)tls, 0, 0, 0);
	asm volatile("pushl %%gs; movl %1, %%gs; movl %%gs:0, %0; popl %%gs" : "=&r"(value) : "r"(GDT_ENTRY_TLS_MIN * 8 + 3));
	check(value == 0x7154, "LOAD_TLS: ring 1 reads through gs", "%x", value);
	user_run(user_gs, 0, GDT_ENTRY_TLS_MIN * 8 + 3);
	check(last_trap.number == TRAP_SYSCALL_EXIT && last_trap.eax == 0x7154, "LOAD_TLS: ring 3 reads through gs",
	      "trap %u error %x, read %x", last_trap.number, last_trap.error, last_trap.eax);
	/* A whole table that is loaded later takes those segments away, and no register may hold one then. */
	asm volatile("movl %0, %%gs" : : "r"(0));
}

static void check_ring3(void)
{
	char name[80];

	user_map();
	user_run(user_exit, 0, 42);
	check(last_trap.number == TRAP_SYSCALL_EXIT && last_trap.eax == 42 && last_trap.cs == USER_CS,
	      "a program runs in ring 3 and ends with a system call", "trap %u error %x result %u cs %x", last_trap.number,
	      last_trap.error, last_trap.eax, last_trap.cs);
	user_run(user_add, 0, 5);
	check(last_trap.number == TRAP_SYSCALL_EXIT && last_trap.eax == 12, "a system call returns to ring 3",
	      "trap %u error %x result %u", last_trap.number, last_trap.error, last_trap.eax);
	for (unsigned int i = 0; i < ARRAY_SIZE(ring3_traps); i++) {
		const struct ring3_trap *t = &ring3_traps[i];

		user_run(t->program, 0, 0);
		format(name, sizeof(name), "ring 3: %s", t->name);
		check_trap(last_trap.cs == USER_CS, name, t->number, t->error);
	}
	user_run(user_popf, 0, 0);
	check(last_trap.number == TRAP_SYSCALL_EXIT && (last_trap.eax & X86_EFLAGS_IF),
	      "ring 3: popf leaves the interrupt flag alone", "trap %u flags %x", last_trap.number, last_trap.eax);
	check_user_fault(user_read, TEST_PAGE, 4, "ring 3: reading an unmapped page");
	check_user_fault(user_write, TEST_PAGE, 6, "ring 3: writing an unmapped page");
	check_user_fault(user_jump, TEST_PAGE, 4, "ring 3: jumping to an unmapped page");
	/*
	 * A host with shadow page tables, as lg is, fills them as pages are touched. A page that nobody has touched since is not
	 * there for the CPU, so a fault that is passed on says so. A page mapped as accessed is there from the start.
	 */
	read_byte(kernel_start);
	check_user_fault(user_read, (u32)kernel_start, 5, "ring 3: reading a kernel page");
	check_user_fault(user_write, (u32)kernel_start, 7, "ring 3: writing a kernel page");
	map_page(USER_DATA, *pte_of(USER_DATA) & ~0xfffu, PTE_PRESENT | PTE_USER);
	check_user_fault_unseen(user_write, USER_DATA, 7, PTE_PRESENT, "ring 3: writing a read-only page");
	map_page(USER_DATA, *pte_of(USER_DATA) & ~0xfffu, PTE_PRESENT | PTE_USER | PTE_ACCESSED);
	check_user_fault(user_write, USER_DATA, 7, "ring 3: writing a read-only page that is in use");
	map_page(USER_DATA, *pte_of(USER_DATA) & ~0xfffu, PTE_KERNEL | PTE_USER);
	hcall(LHCALL_TS, 1, 0, 0, 0);
	user_run(user_fpu, 0, 0);
	check_trap(last_trap.cs == USER_CS, "ring 3: the FPU traps after TS 1", TRAP_NM, 0);
	hcall(LHCALL_TS, 0, 0, 0, 0);
	check_tls();

	user_word = (u32 *)USER_DATA;
	*user_word = 0;
	irq_hook = wake_user;
	set_clockevent(2 * NSEC_PER_MSEC);
	user_run(user_wait, 0, USER_DATA);
	irq_hook = NULL;
	check(last_trap.number == TRAP_SYSCALL_EXIT && last_trap.eax == 99 && irq_from_user == 1,
	      "an interrupt comes in ring 3 and returns there", "trap %u error %x result %u", last_trap.number,
	      last_trap.error, last_trap.eax);
	user_unmap();
}

/* Time and interrupts */

/* Keeps the devices' interrupts away from checks that count on the timer's alone. */
static u32 block_devices(void)
{
	u32 blocked = *lguest_field(LGUEST_DATA_blocked_interrupts);

	console_drain();
	*lguest_field(LGUEST_DATA_blocked_interrupts) = ~1u;
	return blocked;
}

static bool ticked(void *count)
{
	return irq_count[0] != *(u32 *)count;
}

/* Busy until the timer has struck or the time is over: no halting, so the host must interrupt. */
static bool spin_for_tick(u32 count, u32 timeout_ms)
{
	u64 end = now_ns() + (u64)timeout_ms * NSEC_PER_MSEC;

	while (irq_count[0] == count && now_ns() < end)
		cpu_relax();
	return irq_count[0] != count;
}

static void check_one_shot(u32 ms)
{
	/* A host without a TSC that it trusts may have a clock that goes unevenly: its timers are right by that one. */
	bool by_host = !*lguest_field(abi->tsc_khz);
	u32 count = irq_count[0];
	u64 start, took;
	char name[60];

	if (by_host) {
		set_clockevent(NSEC_PER_MSEC); /* its interrupt brings lguest_data.time up to date */
		spin_for_tick(count, 2000);
		count = irq_count[0];
	}
	start = by_host ? wallclock_ns() : now_ns();
	set_clockevent(ms * NSEC_PER_MSEC);
	spin_for_tick(count, 2000);
	took = (by_host ? wallclock_ns() : now_ns()) - start;
	delay_ns(5 * NSEC_PER_MSEC);
	format(name, sizeof(name), "a timer of %u ms strikes once, and not early", ms);
	/* Not early but for the rounding between clocks; how late is up to the machine. */
	check(irq_count[0] - count == 1 && took + 100000 > (u64)ms * NSEC_PER_MSEC && took < 1000ull * NSEC_PER_MSEC, name,
	      "%u times, after %u us", irq_count[0] - count, (u32)div_u64(took, 1000, NULL));
}

static void check_holding_back(void)
{
	u32 count = irq_count[0], flags, before, pending = X86_EFLAGS_IF, clear = 0;
	u32 blocked = block_devices();

	irq_block(0);
	set_clockevent(NSEC_PER_MSEC);
	delay_ns(20 * NSEC_PER_MSEC);
	before = irq_count[0] - count;
	irq_unblock(0);
	/* Nothing tells the host of the bitmap; but it must notice in time. */
	spin_for_tick(count, 1000);
	check(before == 0 && irq_count[0] - count == 1, "a blocked interrupt waits until it is unblocked",
	      "%u while blocked, %u in all", before, irq_count[0] - count);

	count = irq_count[0];
	flags = irq_save();
	set_clockevent(NSEC_PER_MSEC);
	delay_ns(20 * NSEC_PER_MSEC);
	before = irq_count[0] - count;
	if (abi->irq_pending != NO_FIELD) {
		/* The host may see to it when the guest next leaves it. */
		hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
		pending = *lguest_field(abi->irq_pending);
		before += irq_count[0] - count;
	}
	*lguest_field(LGUEST_DATA_irq_enabled) = flags;
	if (abi->send_interrupts)
		hcall(LHCALL_SEND_INTERRUPTS, 0, 0, 0, 0);
	else
		hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
	if (abi->irq_pending != NO_FIELD)
		clear = *lguest_field(abi->irq_pending);
	check(before == 0, "no interrupt comes while they are off", "%u", before);
	check(pending == X86_EFLAGS_IF, "but irq_pending says that one waits", "%x", pending);
	check(irq_count[0] - count == 1, "and SEND_INTERRUPTS brings it at once", "%u", irq_count[0] - count);
	if (abi->send_interrupts && clear == X86_EFLAGS_IF) {
		/* lg never clears it, for it takes "no bit found" for a bit. Then each SEND_INTERRUPTS is one in vain. */
		hcall(LHCALL_SEND_INTERRUPTS, 0, 0, 0, 0);
		check(irq_count[0] - count == 1, "after which irq_pending is still set, and nothing more waits", "%u",
		      irq_count[0] - count);
	} else {
		check(clear == 0, "after which irq_pending is clear", "%x", clear);
	}

	count = irq_count[0];
	flags = irq_save();
	set_clockevent(NSEC_PER_MSEC);
	delay_ns(10 * NSEC_PER_MSEC);
	*lguest_field(LGUEST_DATA_irq_enabled) = flags; /* and no hypercall */
	spin_for_tick(count, 1000);
	check(irq_count[0] - count == 1, "an interrupt that waited comes without a hypercall too", "%u", irq_count[0] - count);

	count = irq_count[0];
	flags = irq_save();
	set_clockevent(NSEC_PER_MSEC);
	delay_ns(10 * NSEC_PER_MSEC);
	set_clockevent(900 * NSEC_PER_MSEC); /* another timer must not make it forget */
	*lguest_field(LGUEST_DATA_irq_enabled) = flags;
	spin_for_tick(count, 500);
	before = irq_count[0] - count;
	set_clockevent(0);
	check(before == 1, "even if the timer was set again meanwhile", "%u", before);

	count = irq_count[0];
	set_clockevent(20 * NSEC_PER_MSEC);
	set_clockevent(0);
	delay_ns(50 * NSEC_PER_MSEC);
	check(irq_count[0] == count, "a timer of 0 cancels", "%u", irq_count[0] - count);
	*lguest_field(LGUEST_DATA_blocked_interrupts) = blocked;
}

u32 noirq_spin(volatile u32 *counter, u32 tsc_cycles);

static void check_noirq(void)
{
	u32 count = irq_count[0], inside;

	set_clockevent(NSEC_PER_MSEC);
	inside = noirq_spin(&irq_count[0], tsc_khz() * 20) - count;
	spin_for_tick(count, 1000);
	check(inside == 0 && irq_count[0] - count == 1, "no interrupt comes between noirq_start and noirq_end",
	      "%u inside, %u in all", inside, irq_count[0] - count);
}

static void check_halt(void)
{
	u32 count = irq_count[0], flags, enabled, blocked = block_devices();
	u64 before, after;
	bool woken;

	/* The host writes the time whenever it delivers an interrupt. */
	set_clockevent(NSEC_PER_MSEC);
	woken = wait_for(ticked, &count, 2000);
	before = wallclock_ns();
	count = irq_count[0];
	set_clockevent(50 * NSEC_PER_MSEC);
	woken = woken && wait_for(ticked, &count, 2000);
	after = wallclock_ns();
	check(woken, "HALT wakes for the timer", "no interrupt");
	check(after - before > 45ull * NSEC_PER_MSEC && after - before < 2000ull * NSEC_PER_MSEC,
	      "and lguest_data.time has gone on", "by %u us", (u32)div_u64(after - before, 1000, NULL));

	count = irq_count[0];
	flags = irq_save();
	set_clockevent(5 * NSEC_PER_MSEC);
	halt();
	enabled = *lguest_field(LGUEST_DATA_irq_enabled);
	irq_restore(flags);
	*lguest_field(LGUEST_DATA_blocked_interrupts) = blocked;
	check(irq_count[0] != count && enabled == X86_EFLAGS_IF, "HALT with interrupts off turns them on",
	      "irq_enabled %x, %u interrupts", enabled, irq_count[0] - count);
}

static void check_tsc(void)
{
	u32 khz = *lguest_field(abi->tsc_khz), count = irq_count[0], again;
	u64 tsc, wall, by_tsc;

	if (!khz) {
		khz = tsc_khz();
		again = measure_tsc();
		/* Roughly: the clock of such a host may be a count of ticks, of which it loses some while it is busy. */
		check(again > khz / 4 && again / 4 < khz,
		      "the TSC, of which the host says nothing, runs as was measured at the start", "%u kHz then, now %u",
		      khz, again);
		return;
	}
	set_clockevent(NSEC_PER_MSEC);
	wait_for(ticked, &count, 2000);
	wall = wallclock_ns();
	tsc = rdtsc();
	count = irq_count[0];
	set_clockevent(50 * NSEC_PER_MSEC);
	wait_for(ticked, &count, 2000);
	by_tsc = div_u64((rdtsc() - tsc) * 1000, khz, NULL) * 1000;
	wall = wallclock_ns() - wall;
	check(wall && by_tsc * 10 > wall * 7 && by_tsc * 10 < wall * 13, "the TSC runs at tsc_khz",
	      "%u us by the TSC of %u kHz, %u us by lguest_data.time", (u32)div_u64(by_tsc, 1000, NULL), khz,
	      (u32)div_u64(wall, 1000, NULL));
}

/* Interrupts in the midst of read-modify-write instructions: none may be done twice, or not at all. */

#define STORM_INTERRUPTS 2000

static void rearm(unsigned int irq)
{
	if (!irq && irq_count[0] % STORM_INTERRUPTS)
		set_clockevent(100000);
}

static void check_storm(void)
{
	static u8 bytes[PAGE_SIZE * 2] __attribute__((aligned(4096)));
	volatile u32 *plain = (u32 *)bytes;
	volatile u32 *split = (u32 *)(bytes + PAGE_SIZE - 2); /* in two pages */
	volatile u32 *swapped = (u32 *)(bytes + 64);
	volatile u32 *carried = (u32 *)(bytes + 128);
	u32 loops = 0, pushed = 0, count;
	u64 end = now_ns() + 60ull * NSEC_PER_SEC;

	memset(bytes, 0, sizeof(bytes));
	irq_count[0] = 0;
	irq_hook = rearm;
	set_clockevent(100000);
	while ((count = irq_count[0]) < STORM_INTERRUPTS && now_ns() < end) {
		for (unsigned int i = 0; i < 1000; i++) {
			u32 old;

			loops++;
			asm volatile("incl %0" : "+m"(*plain));
			asm volatile("addl $3, %0" : "+m"(*split));
			asm volatile("movl %1, %%eax; leal 1(%%eax), %%ecx; lock; cmpxchgl %%ecx, %1; setz %%al; movzbl %%al, %0"
				     : "=a"(old), "+m"(*swapped)
				     :
				     : "ecx", "cc");
			asm volatile("addl $0x80000000, (%0); adcl $0, 4(%0)" : : "r"(carried) : "cc", "memory");
			asm volatile("pushl %1; incl (%%esp); popl %0" : "=r"(pushed) : "r"(pushed));
			if (!old) {
				loops = 0; /* a failed cmpxchg: nobody else writes there */
				break;
			}
		}
	}
	irq_hook = NULL;
	set_clockevent(0);
	check(count >= STORM_INTERRUPTS, "2000 timer interrupts come", "%u in 60 seconds", count);
	check(*plain == loops && *split == 3 * loops && *swapped == loops && carried[1] == loops / 2 && pushed == loops,
	      "and every read-modify-write is done exactly once",
	      "%u loops: inc %u, add %u, cmpxchg %u, adc %u, push %u", loops, *plain, *split / 3, *swapped, carried[1] * 2,
	      pushed);
}

/* Asynchronous hypercalls */

static void check_async(void)
{
	u64 base_segment = gdt[GDT_ENTRY_KERNEL_DS];
	u32 mark = alloc_mark(), value = 0, queued = 0, waiting = 0, flags;
	u32 *words = alloc_pages(1);

	/* Each call moves a segment's base; the last one counts, and only if they are done in order. */
	for (u32 i = 0; i < 1024; i++)
		words[i] = i;
	/* With interrupts off, or async_hcall() itself would look for one that waits, and the host empty the ring. */
	flags = irq_save();
	for (u32 i = 0; i < 200; i++) {
		u64 descriptor = base_segment | (u64)((u32)&words[i] & 0xffffff) << 16 | (u64)((u32)&words[i] >> 24) << 56;

		if (abi->whole_gdt) {
			/* The table is read when the call is made, so there only the number of calls counts. */
			gdt[GDT_ENTRY_DATA_ABSENT] = descriptor;
			queued += async_hcall(LHCALL_LOAD_GDT, (u32)gdt, GDT_ENTRIES, 0, 0);
		} else {
			queued += async_hcall(LHCALL_LOAD_GDT_ENTRY, GDT_ENTRY_DATA_ABSENT, (u32)descriptor,
					      (u32)(descriptor >> 32), 0);
		}
	}
	irq_restore(flags);
	hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
	for (unsigned int i = 0; i < LHCALL_RING_SIZE; i++)
		waiting += hcall_status()[i] != HCALL_DONE;
	asm volatile("pushl %%fs; movl %1, %%fs; movl %%fs:0, %0; popl %%fs"
		     : "=&r"(value)
		     : "r"(SELECTOR(GDT_ENTRY_DATA_ABSENT, GUEST_PL)));
	check(value == 199, "asynchronous hypercalls are done in order", "the one that counts is %u", value);
	check(queued >= LHCALL_RING_SIZE && queued < 200, "the ring holds 64 of them", "%u of 200 went into it", queued);
	check(waiting == 0, "and is empty after FLUSH_ASYNC", "%u wait", waiting);
	alloc_release(mark);
}

/* Code that changes */

static u32 call_code(void *code)
{
	return ((u32(*)(void))code)();
}

/* movl $value, %eax; ret */
static void write_code(volatile u8 *code, u32 value)
{
	code[0] = 0xb8;
	memcpy((void *)(code + 1), &value, 4);
	code[5] = 0xc3;
}

/* "Serialise", as the manual asks for before code that was written is run. */
static void serialise(void)
{
	u32 leaf = 0;

	asm volatile("cpuid" : "+a"(leaf) : : "ebx", "ecx", "edx", "memory");
}

static void check_code(void)
{
	u32 mark = alloc_mark(), wrong = 0, aliased = 0, result;
	u8 *page = alloc_pages(1), *other = alloc_pages(1);

	for (u32 i = 0; i < 100; i++) {
		write_code(page, i);
		serialise();
		wrong += call_code(page) != i;
	}
	check(!wrong, "code that was written is run as written", "%u of 100 times wrong", wrong);
	map_page(ALIAS_PAGE, (u32)page, PTE_KERNEL);
	for (u32 i = 0; i < 100; i++) {
		write_code((u8 *)ALIAS_PAGE, 1000 + i);
		serialise();
		aliased += call_code(page) != 1000 + i;
	}
	check(!aliased, "so is code written through an alias", "%u of 100 times wrong", aliased);
	wrong = 0;
	for (u32 i = 0; i < 100; i++) {
		u8 *which = i % 2 ? page : other;

		write_code(which, 2000 + i);
		map_page(ALIAS_PAGE, (u32)which, PTE_KERNEL);
		wrong += call_code((void *)ALIAS_PAGE) != 2000 + i;
	}
	check(!wrong, "so is code in a page that is mapped elsewhere", "%u of 100 times wrong", wrong);
	unmap_page(ALIAS_PAGE);
	/* An instruction that changes the one right behind the jump. */
	asm volatile("movl %1, 2f + 1\n\tjmp 1f\n1:\n2:\tmovl $1, %%eax" : "=a"(result) : "r"(0x5e1f) : "memory");
	check(result == 0x5e1f, "an instruction can change the next", "%x", result);
	alloc_release(mark);
}

/* Devices */

static void check_console(void)
{
	struct device *console = device_find(VIRTIO_ID_CONSOLE, 0);

	check(console && console->desc->num_vq == 2, "there is a console of two queues", "%s", console ? "other queues" : "none");
	if (setting_noconsole)
		return;
	console_drain();
	early_print("# by the early console\n", 23);
	print("# by the console\n");
	console_drain();
	check(console_up && vq_idle(&console->vqs[1]), "the console takes what is printed", "-");
}

static void check_bus(void)
{
	bool sane = device_count > 0;
	u32 irqs = 0;

	for (unsigned int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];

		for (unsigned int q = 0; q < min(device->desc->num_vq, MAX_VQS); q++) {
			struct virtqueue *vq = &device->vqs[q];

			sane = sane && vq->pfn << PAGE_SHIFT > memory_size && !(vq->num & (vq->num - 1)) && vq->irq &&
			       vq->irq < LGUEST_IRQS && !(irqs >> vq->irq & 1);
			irqs |= 1u << vq->irq;
		}
	}
	check(sane, "each virtqueue has a ring above RAM and an interrupt of its own", "see devices");
}

static void check_reset(struct device *device)
{
	struct virtqueue *vq = &device->vqs[0];
	char name[60];
	u32 accepted = 0, first;

	device_set_status(device, VIRTIO_CONFIG_S_ACKNOWLEDGE);
	vq->desc[0].len = 7;
	vq->avail->idx = 0;
	device_reset(device);
	first = vq->desc[0].len | vq->avail->flags | vq->avail->idx | vq->used->idx;
	for (unsigned int i = 0; i < device->desc->feature_len; i++)
		accepted |= device_config(device)[(int)i - device->desc->feature_len];
	format(name, sizeof(name), "reset clears %s%u", device_type_name(device->desc->type), device->index);
	check(!first && !accepted && !device->desc->status, name, "ring %x, accepted features %x, status %x", first, accepted,
	      device->desc->status);
}

/*
 * Programs come from disks, and a device writes memory without the CPU's knowledge: a host that translates code must notice.
 * As in Linux, the page is mapped for ring 3, read-only, before anything in it runs.
 */
static void check_code_from_disk(struct device *disk)
{
	u32 mark, wrong = 0;
	u8 *page;

	user_map();
	mark = alloc_mark();
	page = alloc_pages(1);
	for (u32 i = 0; i < 50; i++) {
		u32 result = 3000 + i;

		memset(page, 0, SECTOR_SIZE);
		page[0] = 0xbb; /* movl $result, %ebx; xorl %eax, %eax; int $0x80 */
		memcpy(page + 1, &result, 4);
		memcpy(page + 5, "\x31\xc0\xcd\x80", 4);
		blk_write(disk, i, page, 1);
	}
	for (u32 i = 0; i < 50; i++) {
		blk_read(disk, i, page, 1);
		map_page(TEST_PAGE, (u32)page, PTE_PRESENT | PTE_USER | PTE_ACCESSED);
		run_user(TEST_PAGE, USER_STACK_TOP, 0, 0);
		wrong += last_trap.number != TRAP_SYSCALL_EXIT || last_trap.eax != 3000 + i;
		unmap_page(TEST_PAGE);
	}
	check(!wrong, "code read from the disk is run as read", "%u of 50 times wrong", wrong);
	alloc_release(mark);
	user_unmap();
}

static void check_disk(bool overwrite)
{
	u32 mark = alloc_mark();
	struct device *disk = device_find(VIRTIO_ID_BLOCK, 0);
	u8 *a, *b, status;
	u32 irqs;

	if (!disk) {
		check(!overwrite, "there is a disk", "none");
		return;
	}
	check_reset(disk);
	blk_open(0);
	a = alloc_pages(8);
	b = alloc_pages(8);
	status = blk_read(disk, 0, a, 1);
	check(status == VIRTIO_BLK_S_OK, "the disk's first sector can be read", "status %u", status);
	memset(b, 0x55, 8 * PAGE_SIZE);
	for (u32 i = 0; i < 20; i++)
		status |= blk_read(disk, 0, b, 1);
	check(!status && !memcmp(a, b, SECTOR_SIZE), "and is the same when read again", "status %u", status);
	check(b[SECTOR_SIZE] == 0x55, "nothing is written behind the buffer", "%x", b[SECTOR_SIZE]);
	status = blk_read(disk, blk_capacity(disk), b, 1);
	check(status == VIRTIO_BLK_S_IOERR, "reading behind the end is an I/O error", "status %u", status);

	/* Without interrupts: the flag in the avail ring, and polling. */
	disk->vqs[0].avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
	setting_poll = true;
	/* An interrupt for what was asked before may be on its way. */
	do {
		irqs = irq_count[disk->vqs[0].irq];
		delay_ns(20 * NSEC_PER_MSEC);
	} while (irqs != irq_count[disk->vqs[0].irq]);
	status = 0;
	for (u32 i = 0; i < 20; i++)
		status |= blk_read(disk, 0, b, 1);
	delay_ns(2 * NSEC_PER_MSEC);
	irqs = irq_count[disk->vqs[0].irq] - irqs;
	disk->vqs[0].avail->flags = 0;
	setting_poll = false;
	check(!status && !irqs, "with NO_INTERRUPT it works and doesn't interrupt", "status %u, %u interrupts", status, irqs);
	if (overwrite) {
		check(blk_check_rw(disk), "what is written can be read back", "see blk verify");
		check_code_from_disk(disk);
		if (disk->features >> VIRTIO_BLK_F_FLUSH & 1)
			check(blk_do(disk, VIRTIO_BLK_T_FLUSH, 0, NULL, 0, 0) == 0, "the disk can be flushed", "-");
	}
	alloc_release(mark);
}

bool cmd_selfcheck(int argc, char **argv)
{
	bool disk = argc == 2 && !strcmp(argv[1], "disk"), polled = setting_poll;

	if (argc > 2 || (argc == 2 && !disk))
		return false;
	passed = failed = 0;
	setting_poll = false;
	set_clockevent(0);
	check_memory();
	check_paging();
	check_many_faults();
	check_ring1_traps();
	check_fpu();
	check_ring3();
	check_one_shot(1);
	check_one_shot(20);
	check_holding_back();
	check_noirq();
	check_halt();
	check_tsc();
	check_storm();
	check_async();
	check_code();
	check_bus();
	check_console();
	check_disk(disk);
	setting_poll = polled;
	print("# %u passed, %u failed\n", passed, failed);
	print("SELF-CHECK %s\n", failed ? "FAILED" : "PASSED");
	if (failed && commands_from_arguments)
		shutdown("self-check failed", LGUEST_SHUTDOWN_POWEROFF);
	return true;
}
