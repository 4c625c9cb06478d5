/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Makes stores fast on Unicorn 2.1.4.
 *
 * i386 page tables without PAE have no no-execute bit, so Unicorn enters every page in its TLB as executable, and it
 * never takes the write trap (TLB_NOTDIRTY) off an executable entry: each store of the guest goes through a helper
 * that looks for translated code under it. These functions stand in front of five of Unicorn's own (the dynamic linker
 * prefers them, since this library is loaded first) and keep one rule instead: an entry is without a write trap only
 * while its page holds no translated code.
 *
 *   - a page is entered as executable only when the CPU fetches from it;
 *   - before the write trap is taken off an entry, the code translated from its page is dropped;
 *   - when the first code is translated from a page, every entry of that page gets its write trap back.
 *
 * Freestanding: it calls nothing but the functions that lgmp_tlbshim_bind is given. The names on both sides are
 * Unicorn's and QEMU's.
 */
#include <stdbool.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* QEMU's MMUAccessType and PAGE_EXEC, and the page size of the i386 target. */
#define MMU_INST_FETCH 2
#define PAGE_EXEC 4
#define TARGET_PAGE_SIZE 4096ULL

/* Where struct uc_struct keeps its CPU; lgmp proves it before the guest starts (cpu.py, _UC_CPU). */
#define UC_CPU 0x1b8

typedef bool tlb_fill_fn(void *cpu, uint64_t addr, int size, int access_type, int mmu_idx, bool probe,
			 uintptr_t retaddr);
typedef void tlb_set_page_fn(void *cpu, uint64_t vaddr, uint64_t paddr, uint32_t attrs, int prot, int mmu_idx,
			     uint64_t size);
typedef void tlb_set_dirty_fn(void *cpu, uint64_t vaddr);
typedef void tb_invalidate_fast_fn(void *uc, void *pages, uint64_t start, int len, uintptr_t retaddr);
typedef void tlb_protect_code_fn(void *uc, uint64_t ram_addr);
typedef void tb_invalidate_range_fn(void *uc, uint64_t start, uint64_t end);
typedef void tlb_reset_dirty_fn(void *cpu, uint64_t start, uint64_t length);
typedef void *qemu_map_ram_ptr_fn(void *uc, void *block, uint64_t ram_addr);

/* Unicorn's own functions, in the order in which cpu.py passes them. */
static struct {
	tlb_fill_fn *x86_cpu_tlb_fill;
	tlb_set_page_fn *tlb_set_page_with_attrs;
	tlb_set_dirty_fn *tlb_set_dirty;
	tb_invalidate_fast_fn *tb_invalidate_phys_page_fast;
	tlb_protect_code_fn *tlb_protect_code;
	tb_invalidate_range_fn *tb_invalidate_phys_range;
	tlb_reset_dirty_fn *tlb_reset_dirty;
	qemu_map_ram_ptr_fn *qemu_map_ram_ptr;
} unicorn;

/* A guest has a thread of its own, so what passes between two of these functions is per thread. */
static __thread int access_type_of_fill;
static __thread uint64_t ram_addr_of_write;
static __thread void *uc_of_write;

/* How often a page was entered through here; cpu.py sees by it that the linker did put these functions in front. */
EXPORT uint64_t lgmp_tlbshim_fills;

EXPORT void lgmp_tlbshim_bind(void *const *functions)
{
	unicorn.x86_cpu_tlb_fill = (tlb_fill_fn *)functions[0];
	unicorn.tlb_set_page_with_attrs = (tlb_set_page_fn *)functions[1];
	unicorn.tlb_set_dirty = (tlb_set_dirty_fn *)functions[2];
	unicorn.tb_invalidate_phys_page_fast = (tb_invalidate_fast_fn *)functions[3];
	unicorn.tlb_protect_code = (tlb_protect_code_fn *)functions[4];
	unicorn.tb_invalidate_phys_range = (tb_invalidate_range_fn *)functions[5];
	unicorn.tlb_reset_dirty = (tlb_reset_dirty_fn *)functions[6];
	unicorn.qemu_map_ram_ptr = (qemu_map_ram_ptr_fn *)functions[7];
}

/* The CPU fills its TLB: note what for, since tlb_set_page is not told. */
EXPORT bool x86_cpu_tlb_fill_x86_64(void *cpu, uint64_t addr, int size, int access_type, int mmu_idx, bool probe,
				    uintptr_t retaddr)
{
	access_type_of_fill = access_type;
	return unicorn.x86_cpu_tlb_fill(cpu, addr, size, access_type, mmu_idx, probe, retaddr);
}

EXPORT void tlb_set_page_with_attrs_x86_64(void *cpu, uint64_t vaddr, uint64_t paddr, uint32_t attrs, int prot,
					   int mmu_idx, uint64_t size)
{
	lgmp_tlbshim_fills++;
	if (access_type_of_fill != MMU_INST_FETCH)
		prot &= ~PAGE_EXEC;
	unicorn.tlb_set_page_with_attrs(cpu, vaddr, paddr, attrs, prot, mmu_idx, size);
}

/* A store met a write trap: note where, since tlb_set_dirty, which may follow, is told the virtual address alone. */
EXPORT void tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t start, int len, uintptr_t retaddr)
{
	uc_of_write = uc;
	ram_addr_of_write = start;
	unicorn.tb_invalidate_phys_page_fast(uc, pages, start, len, retaddr);
}

/* The write trap comes off: from here on nobody looks for code in this page, so there must be none. */
EXPORT void tlb_set_dirty_x86_64(void *cpu, uint64_t vaddr)
{
	uint64_t page = ram_addr_of_write & ~(TARGET_PAGE_SIZE - 1);

	unicorn.tb_invalidate_phys_range(uc_of_write, page, page + TARGET_PAGE_SIZE);
	unicorn.tlb_set_dirty(cpu, vaddr);
}

/* The first code was translated from a page: whatever maps that page traps writes again. */
EXPORT void tlb_protect_code_x86_64(void *uc, uint64_t ram_addr)
{
	void *cpu = *(void **)((char *)uc + UC_CPU);
	uint64_t page = ram_addr & ~(TARGET_PAGE_SIZE - 1);

	unicorn.tlb_reset_dirty(cpu, (uintptr_t)unicorn.qemu_map_ram_ptr(uc, 0, page), TARGET_PAGE_SIZE);
	unicorn.tlb_protect_code(uc, ram_addr);
}
