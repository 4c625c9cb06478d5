/* SPDX-License-Identifier: GPL-2.0-only */
/* Where lguest starts us: ring 1, paging off (or one to one), esi pointing to boot_params, no stack. */
#include "abi.h"

	.section .head, "ax"
	.globl _start
_start:
	cld
	/* Whoever loads us need not clear what the file doesn't have. */
	movl	$bss_start, %edi
	movl	$kernel_end, %ecx
	subl	%edi, %ecx
	shrl	$2, %ecx
	xorl	%eax, %eax
	rep stosl
	movl	$boot_stack_top, %esp
	xorl	%ebp, %ebp
	pushl	%esi
	call	guest_main
1:	jmp	1b

	/* A launcher can tell by this that the kernel is made for lguest. */
	.asciz	"lguest test guest"

	.section .bss.stacks, "aw", @nobits
	.balign	4096
	.globl	boot_stack, boot_stack_top
boot_stack:
	.skip	32768
boot_stack_top:

	.section .note.GNU-stack, "", @progbits
