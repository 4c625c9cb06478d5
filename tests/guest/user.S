/* SPDX-License-Identifier: GPL-2.0-only */
/* Small programs for ring 3. Position-independent: selfcheck.c copies them to where ring 3 may read. */
#include "abi.h"

	.macro	program name
	.globl	\name
\name:
	.endm

	.section .rodata.user, "a"
	.balign	16
program user_start
program user_read
	movl	(%ebx), %ebx
program user_exit			/* with ebx as the result */
	xorl	%eax, %eax
	int	$SYSCALL_VECTOR
program user_write
	movl	%eax, (%ebx)
	jmp	user_exit
program user_jump
	jmp	*%ebx
program user_add
	movl	$3, %ecx
	movl	$4, %edx
	movl	$1, %eax
	int	$SYSCALL_VECTOR
	movl	%eax, %ebx
	jmp	user_exit
program user_wait			/* until the word at ebx is not 0 */
	cmpl	$0, (%ebx)
	je	user_wait
	movl	(%ebx), %ebx
	jmp	user_exit
program user_loop			/* ebx system calls */
	movl	%ebx, %esi
1:	movl	$1, %eax
	int	$SYSCALL_VECTOR
	decl	%esi
	jnz	1b
	jmp	user_exit
program user_in
	inb	$0x80, %al
	jmp	user_exit
program user_out
	outb	%al, $0x80
	jmp	user_exit
program user_hlt
	hlt
	jmp	user_exit
program user_cli
	cli
	jmp	user_exit
program user_sti
	sti
	jmp	user_exit
program user_cr0
	movl	%cr0, %ebx
	jmp	user_exit
program user_sysenter
	sysenter
	jmp	user_exit
program user_syscall
	.byte	0x0f, 0x05
	jmp	user_exit
program user_int13
	int	$13
	jmp	user_exit
program user_hypercall
	xorl	%eax, %eax
	int	$LGUEST_TRAP_ENTRY
	jmp	user_exit
program user_int90
	int	$0x90
	jmp	user_exit
program user_int3
	int3
	jmp	user_exit
program user_into
	movb	$127, %al
	incb	%al
	into
	jmp	user_exit
program user_bound
	pushl	$20
	pushl	$10
	movl	$21, %eax
	bound	%eax, (%esp)
	jmp	user_exit
program user_divide
	xorl	%ecx, %ecx
	divl	%ecx
	jmp	user_exit
program user_ud2
	ud2
	jmp	user_exit
program user_fpu
	fninit
	jmp	user_exit
program user_load_ds
	movl	$(GDT_ENTRY_KERNEL_DS * 8 + 3), %eax
	movl	%eax, %ds
	jmp	user_exit
program user_load_ss
	movl	$(GDT_ENTRY_KERNEL_DS * 8 + 1), %eax
	movl	%eax, %ss
	jmp	user_exit
program user_call_kernel
	lcall	$(GDT_ENTRY_KERNEL_CS * 8 + 3), $0
	jmp	user_exit
program user_gs
	movl	%ebx, %gs
	movl	%gs:0, %ebx
	jmp	user_exit
program user_popf			/* IF stays as it is, whatever ring 3 pops */
	pushl	$0x2
	popf
	pushf
	popl	%ebx
	jmp	user_exit
program user_end

	.section .note.GNU-stack, "", @progbits
