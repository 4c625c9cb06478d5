/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Our own page directory: RAM and the device pages one to one, and an empty area for checks. Directory entry 1023 is the
 * host's. Pages are given out upwards from the end of the kernel and taken back in the opposite order.
 */
#include "abi.h"

u32 page_directory[1024] __attribute__((aligned(4096)));

static u32 next_page;

void *alloc_pages(u32 pages)
{
	void *page = (void *)next_page;

	if (pages > pages_free())
		panic("out of memory: %u pages wanted, %u free", pages, pages_free());
	next_page += pages * PAGE_SIZE;
	return memset(page, 0, pages * PAGE_SIZE);
}

void *alloc_page_for_good(void)
{
	if (!pages_free())
		panic("out of memory");
	memory_end = (memory_end & ~(PAGE_SIZE - 1)) - PAGE_SIZE;
	return memset((void *)memory_end, 0, PAGE_SIZE);
}

u32 pages_free(void)
{
	return next_page < memory_end ? (memory_end - next_page) / PAGE_SIZE : 0;
}

u32 alloc_mark(void)
{
	return next_page;
}

void alloc_release(u32 mark)
{
	next_page = mark;
}

volatile u32 *pte_of(u32 address)
{
	u32 entry = page_directory[address >> 22];

	if (!(entry & PTE_PRESENT))
		return NULL;
	return (volatile u32 *)(entry & ~0xfffu) + (address >> PAGE_SHIFT) % 1024;
}

static void add_page_table(u32 address)
{
	page_directory[address >> 22] = (u32)alloc_pages(1) | PTE_KERNEL | PTE_USER;
}

void map_page(u32 address, u32 physical, u32 flags)
{
	volatile u32 *pte = pte_of(address);

	if (!pte)
		panic("no page table for %x", address);
	*pte = physical | flags;
	hcall(LHCALL_SET_PTE, (u32)page_directory, address, *pte, 0);
}

void unmap_page(u32 address)
{
	volatile u32 *pte = pte_of(address);

	if (!pte)
		panic("no page table for %x", address);
	*pte = 0;
	hcall(LHCALL_SET_PTE, (u32)page_directory, address, 0, 0);
}

void paging_init(void)
{
	u32 address;

	next_page = (u32)kernel_end;
	/* The device pages too: at most 256 of them, mapped when the bus is scanned. */
	for (address = 0; address < memory_size + 256 * PAGE_SIZE; address += 1024 * PAGE_SIZE)
		add_page_table(address);
	add_page_table(TEST_AREA);
	for (address = 0; address < memory_size; address += PAGE_SIZE)
		*pte_of(address) = address | PTE_KERNEL;
	hcall(LHCALL_NEW_PGTABLE, (u32)page_directory, 0, 0, 0);
}
