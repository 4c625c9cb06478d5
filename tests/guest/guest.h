/* SPDX-License-Identifier: GPL-2.0-only */
/* What the parts of the test guest share. Sections are in the order of the files that define them. */
#ifndef GUEST_H
#define GUEST_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE_SIZE 4096u
#define PAGE_SHIFT 12
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define packed __attribute__((packed))
#define noreturn __attribute__((noreturn))
#define noinline __attribute__((noinline))
#define printf_like(f, a) __attribute__((format(printf, f, a)))

/* Keeps the compiler from moving memory accesses; the CPU too (a locked instruction: i686 has no mfence). */
#define barrier() asm volatile("" ::: "memory")
#define mb() asm volatile("lock; addl $0, 0(%%esp)" ::: "memory", "cc")
#define cpu_relax() asm volatile("pause" ::: "memory")

/* string.c */
void *memset(void *to, int byte, size_t length);
void *memcpy(void *to, const void *from, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *s);
int strcmp(const char *a, const char *b);
int strncmp(const char *a, const char *b, size_t length);
char *strchr(const char *s, int c);
/* A number in decimal or 0x hexadecimal; false if it isn't one. */
bool parse_number(const char *s, u64 *value);
u64 div_u64(u64 value, u32 by, u32 *remainder);
#define FNV1A_START 2166136261u
u32 fnv1a(u32 hash, const void *data, size_t length);
u32 random_next(u32 *state);
size_t vformat(char *to, size_t size, const char *fmt, va_list args);
printf_like(3, 4) size_t format(char *to, size_t size, const char *fmt, ...);
printf_like(1, 2) void print(const char *fmt, ...);

/* main.c */
extern u32 memory_size; /* bytes of RAM; the descriptor page is here */
extern u32 memory_end;	/* where an initrd begins, else memory_size; pages given out for good are above */
extern u32 initrd_size;
extern char *kernel_arguments;
extern bool setting_poll, setting_noindirect, setting_noconsole;
void early_print(const char *text, size_t length);
noreturn void shutdown(const char *message, u32 reason);
noreturn void panic_at(const char *file, int line, const char *fmt, ...) printf_like(3, 4);
#define panic(...) panic_at(__FILE__, __LINE__, __VA_ARGS__)

/* paging.c */
#define PTE_PRESENT 0x001u
#define PTE_RW 0x002u
#define PTE_USER 0x004u
#define PTE_ACCESSED 0x020u
#define PTE_DIRTY 0x040u
#define PTE_PSE 0x080u
#define PTE_KERNEL (PTE_PRESENT | PTE_RW | PTE_ACCESSED | PTE_DIRTY)
#define TEST_AREA 0x40000000u /* 4 MiB of virtual addresses with a page table but no pages: for checks */
extern u32 page_directory[1024];
void paging_init(void);
void *alloc_pages(u32 pages); /* zeroed; panics when there are none left */
void *alloc_page_for_good(void); /* alloc_release() does not touch it */
u32 pages_free(void);
u32 alloc_mark(void);
void alloc_release(u32 mark); /* frees what was allocated since the mark */
volatile u32 *pte_of(u32 address);
void map_page(u32 address, u32 physical, u32 flags);
void unmap_page(u32 address);
extern char kernel_start[], kernel_end[];

/* traps.c */
struct trap_frame { /* as trap_common in traps.S leaves it on the stack */
	u32 gs, fs, es, ds, edi, esi, ebp, unused_esp, ebx, edx, ecx, eax;
	u32 number, error, eip, cs, eflags;
	u32 user_esp, user_ss; /* only if cs is of ring 3 */
};
struct trap_info {
	u32 number, error, eip, cs, cr2, eax;
};
#define TRAP_DE 0
#define TRAP_BP 3
#define TRAP_OF 4
#define TRAP_BR 5
#define TRAP_UD 6
#define TRAP_NM 7
#define TRAP_NP 11
#define TRAP_SS 12
#define TRAP_GP 13
#define TRAP_PF 14
#define TRAP_SYSCALL_EXIT 0x100 /* not a trap: a user program's way out, see user.S */
extern struct trap_info last_trap;
extern u32 trap_count;
/* Sees every trap first; true means that it is dealt with and the guest goes on where the frame says. */
extern bool (*trap_hook)(struct trap_frame *frame);
void traps_init(void);
void idt_set(unsigned int vector, u32 handler, unsigned int type, unsigned int dpl);
void idt_clear(unsigned int vector);
#define GATE_INTERRUPT 0xe
#define GATE_TRAP 0xf
/* Calls fn; true if a trap ended it, and last_trap says which. */
bool traps(void (*fn)(void *arg), void *arg);
/* Runs ring 3 code until it traps (last_trap says how; TRAP_SYSCALL_EXIT is the orderly way). */
void run_user(u32 eip, u32 esp, u32 eax, u32 ebx);
extern u8 trap_stack[2 * PAGE_SIZE];

/* interrupts.c */
#define NSEC_PER_SEC 1000000000u
#define NSEC_PER_MSEC 1000000u
extern volatile u32 irq_count[32];
extern void (*irq_hook)(unsigned int irq);
void interrupts_init(void);
void irq_dispatch(unsigned int irq);
void irq_block(unsigned int irq);
void irq_unblock(unsigned int irq);
u32 irq_save(void); /* disables, and returns what it was */
void irq_restore(u32 flags);
void halt(void); /* enables interrupts and waits for one, as "sti; hlt" */
void set_clockevent(u32 nanoseconds);
u64 rdtsc(void);
u32 tsc_khz(void);     /* what the host says, or what was measured at the start */
u32 measure_tsc(void); /* takes a tenth of a second */
u64 now_ns(void);	/* since boot */
u64 wallclock_ns(void); /* lguest_data.time, as the host last wrote it */
void delay_ns(u32 nanoseconds);
/* Halts until done() or the deadline; false is a timeout. A timeout of 0 is none. */
bool wait_for(bool (*done)(void *arg), void *arg, u32 timeout_ms);

/* console.c */
extern bool console_up;
extern bool console_cancelled; /* ^C was seen by console_poll_cancel() */
void console_init(void);
void console_restart(void); /* a reset */
void console_down(void);
void console_write(const char *text, size_t length);
void console_flush(void); /* sends what is buffered */
void console_drain(void); /* and waits until the launcher has taken it */
int console_getc(void);   /* waits; -1 if there is no console */
bool console_poll_cancel(void);
bool console_input_ready(void);

/* rng.c */
/* One buffer filled: how many bytes it got; 0 (and says why) if none. */
u32 rng_read(void *to, u32 count);

/* net.c */
/* Has net0 ready to ping an address; false (and says why) if nobody there answers. */
bool net_ping_start(const char *address);
void net_ping_send(u32 number);
/* Answers what came in, until so many of our pings were answered since the start; gives how many were. */
u32 net_ping_receive(u32 wanted, u32 timeout_ms);

/* shell.c */
#define MAX_WORDS 16
extern bool commands_from_arguments; /* not from the prompt */
void shell_run(char *commands); /* separated by ';' */
noreturn void shell_prompt(void);
/* The words from "first" on, a blank between them. */
void join_words(char *to, size_t size, int first, int argc, char **argv);
bool word_number(int argc, char **argv, int index, u32 *value);
bool word_number64(int argc, char **argv, int index, u64 *value);

/* The commands: argv[0] is the command's own name; false prints its usage. */
bool cmd_devices(int argc, char **argv);
bool cmd_status(int argc, char **argv);
bool cmd_reset(int argc, char **argv);
bool cmd_ask(int argc, char **argv);
bool cmd_torture(int argc, char **argv);
bool cmd_blk(int argc, char **argv);
bool cmd_console(int argc, char **argv);
bool cmd_net(int argc, char **argv);
bool cmd_rng(int argc, char **argv);
bool cmd_selfcheck(int argc, char **argv);
bool cmd_bench(int argc, char **argv);
bool cmd_misdeed(int argc, char **argv);
#endif
