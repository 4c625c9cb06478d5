/* SPDX-License-Identifier: GPL-2.0-only */
/* The ring 3 programs of user.S, which run from a copy in the test area. */
#ifndef USER_H
#define USER_H

#include "guest.h"

#define USER_CODE TEST_AREA
#define USER_DATA (TEST_AREA + PAGE_SIZE)
#define USER_STACK (TEST_AREA + 2 * PAGE_SIZE)
#define USER_STACK_TOP (USER_STACK + PAGE_SIZE)

extern char user_start[], user_end[];
extern char user_exit[], user_read[], user_write[], user_jump[], user_add[], user_wait[], user_loop[];
extern char user_in[], user_out[], user_hlt[], user_cli[], user_sti[], user_cr0[], user_sysenter[], user_syscall[];
extern char user_int13[], user_hypercall[], user_int90[], user_int3[], user_into[], user_bound[], user_divide[];
extern char user_ud2[], user_fpu[], user_load_ds[], user_load_ss[], user_call_kernel[], user_gs[], user_popf[];

void user_map(void); /* code, data and stack */
void user_unmap(void);
/* Runs a program: eax and ebx are what it wants. last_trap says how it ended. */
void user_run(const char *program, u32 eax, u32 ebx);

#endif
