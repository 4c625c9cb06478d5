/* SPDX-License-Identifier: GPL-2.0-only */
/* Entry from traps and interrupts, the way back, and the way to ring 3. */
#include "abi.h"

	.text

	/* One 16-byte stub for each vector: traps.c computes their addresses. */
	.macro	stub
	.balign	16
	.if	!(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17)
	pushl	$0			/* those have an error code from the CPU */
	.endif
	pushl	$vector
	jmp	trap_common
	.endm

	.globl	trap_stubs, syscall_stub
	.balign	16
trap_stubs:
	.set	vector, 0
	.rept	64
	stub
	.set	vector, vector + 1
	.endr
	.balign	16
syscall_stub:
	.set	vector, SYSCALL_VECTOR
	stub

	/* The frame is struct trap_frame. */
trap_common:
	pushal
	pushl	%ds
	pushl	%es
	pushl	%fs
	pushl	%gs
	movl	$KERNEL_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	cld
	pushl	%esp
	call	trap_dispatch
	addl	$4, %esp
	popl	%gs
	popl	%fs
	popl	%es
	popl	%ds
	popal
	addl	$8, %esp
	/*
	 * iret can't restore the interrupt flag, which is soft: it is lguest_data.irq_enabled. From the moment it is set
	 * until the iret is done the host must not interrupt; lguest_data.noirq_start and _end tell it so.
	 * ds may be the user's by now, hence ss.
	 */
	pushl	%eax
	movl	12(%esp), %eax
	andl	$X86_EFLAGS_IF, %eax
	.globl	noirq_start, noirq_end
noirq_start:
	movl	%eax, %ss:lguest_data + LGUEST_DATA_irq_enabled
	popl	%eax
	iret

	/* u32 noirq_spin(volatile u32 *counter, u32 tsc_cycles): waits, reads the counter, all where no interrupt may come. */
	.globl	noirq_spin
noirq_spin:
	pushl	%ebx
	movl	8(%esp), %ecx
	rdtsc
	movl	%eax, %ebx
1:	rdtsc
	subl	%ebx, %eax
	cmpl	12(%esp), %eax
	jb	1b
	movl	(%ecx), %eax
	popl	%ebx
	ret
noirq_end:

	/*
	 * u32 guarded_call(struct guard *guard, void (*fn)(void *), void *arg): 0 if fn returned; else guard_unwind() was
	 * called for this guard, and it is what was given there.
	 */
	.globl	guarded_call, guard_unwind
guarded_call:
	pushl	%ebp
	pushl	%ebx
	pushl	%esi
	pushl	%edi
	movl	20(%esp), %eax
	movl	%esp, (%eax)
	pushl	28(%esp)
	call	*28(%esp)
	addl	$4, %esp
	xorl	%eax, %eax
1:	popl	%edi
	popl	%esi
	popl	%ebx
	popl	%ebp
	ret
guard_unwind:
	movl	8(%esp), %eax
	movl	4(%esp), %ecx
	movl	(%ecx), %esp
	jmp	1b

	/* enter_user(eip, esp, eax, ebx): to ring 3. Never returns; a trap unwinds. */
	.globl	enter_user
enter_user:
	movl	%esp, %ebp
	pushl	$USER_DS
	pushl	8(%ebp)
	pushl	$(X86_EFLAGS_IF | X86_EFLAGS_FIXED)
	pushl	$USER_CS
	pushl	4(%ebp)
	movl	12(%ebp), %eax
	movl	16(%ebp), %ebx
	movl	$USER_DS, %ecx
	movl	%ecx, %ds
	movl	%ecx, %es
	xorl	%ecx, %ecx
	xorl	%edx, %edx
	xorl	%esi, %esi
	xorl	%edi, %edi
	xorl	%ebp, %ebp
	iret

	.section .note.GNU-stack, "", @progbits
