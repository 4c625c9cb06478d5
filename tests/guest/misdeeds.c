/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Everything that a guest must not do, one at a time. "misdeed NAME@console" and so on does a ring's misdeed to another
 * device than the disk. The launcher may end the guest for most of them; it must never come to harm itself.
 */
#include "abi.h"
#include "blk.h"
#include "user.h"

#define SETTLE_MS 300u
#define PAST_RAM 0xe0000000u /* where there is nothing at all */

/* The queue that the misdeed is done to: descriptors are written as they are, past the driver. */
static struct device *target;
static struct virtqueue *queue;
static u8 *page; /* 4 KiB for buffers */
static u16 in_flag; /* VRING_DESC_F_WRITE where the queue's buffers are for the device to fill */

static bool never(void *arg)
{
	(void)arg;
	return false;
}

static void put(u16 index, u64 address, u32 length, u16 flags, u16 next)
{
	queue->desc[index].addr = address;
	queue->desc[index].len = length;
	queue->desc[index].flags = flags;
	queue->desc[index].next = next;
}

static void publish(u16 head)
{
	queue->avail->ring[queue->avail->idx % queue->num] = head;
	barrier();
	queue->avail->idx++;
}

static void notify(u32 address)
{
	hcall(LHCALL_NOTIFY, address, 0, 0, 0);
}

static void submit(u16 head)
{
	publish(head);
	mb();
	notify(queue->pfn << PAGE_SHIFT);
}

/* A request that is right but for one buffer: of a disk the data, elsewhere all there is. */
static void submit_buffer(u64 address, u32 length, u16 flags)
{
	switch (target->desc->type) {
	case VIRTIO_ID_BLOCK:
		put(0, (u32)page, sizeof(struct virtio_blk_outhdr), VRING_DESC_F_NEXT, 1);
		put(1, address, length, flags | VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2);
		put(2, (u32)page + 1024, 1, VRING_DESC_F_WRITE, 0);
		break;
	case VIRTIO_ID_NET:
		put(0, (u32)page, 10, VRING_DESC_F_NEXT, 1);
		put(1, address, length, flags, 0);
		break;
	default:
		put(0, address, length, flags | in_flag, 0);
	}
	submit(0);
}

/* What the queue is for, done right: a disk read, or 16 bytes to print, and so on. */
static void put_good_request(void)
{
	memset(page, 0, PAGE_SIZE);
	switch (target->desc->type) {
	case VIRTIO_ID_BLOCK:
		put(0, (u32)page, sizeof(struct virtio_blk_outhdr), VRING_DESC_F_NEXT, 1);
		put(1, (u32)page + 512, 512, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2);
		put(2, (u32)page + 1024, 1, VRING_DESC_F_WRITE, 0);
		break;
	case VIRTIO_ID_NET:
		put(0, (u32)page, 10, VRING_DESC_F_NEXT, 1);
		put(1, (u32)page + 512, 60, 0, 0);
		break;
	default:
		memcpy(page, "(misdeed's bytes)\n", 18);
		put(0, (u32)page, 18, in_flag, 0);
	}
}

/* Rings: any device */

static void outside(void) { submit_buffer(guest_limit, 512, 0); }
static void past_end(void) { submit_buffer(guest_limit - 511, 512, 0); }
static void high_address(void) { submit_buffer(0x100000000ull + (u32)page, 512, 0); }
static void wrap_32(void) { submit_buffer(0xfffffff0, 32, 0); }
static void wrap_64(void) { submit_buffer(0xfffffffffffffff0ull, 32, 0); }
static void huge_length(void) { submit_buffer((u32)page, 0xffffffff, 0); }
static void zero_length(void) { submit_buffer((u32)page, 0, 0); }
static void head_num(void) { put_good_request(); submit(queue->num); }
static void head_wild(void) { put_good_request(); submit(0xffff); }
static void self_loop(void) { put(0, (u32)page, 16, in_flag | VRING_DESC_F_NEXT, 0); submit(0); }
static void unknown_flags(void) { submit_buffer((u32)page + 512, 512, 0xfff8); }

static void next_num(void)
{
	put_good_request();
	put(0, (u32)page, 16, in_flag | VRING_DESC_F_NEXT, queue->num);
	submit(0);
}

static void loop(void)
{
	put(0, (u32)page, 16, in_flag | VRING_DESC_F_NEXT, 1);
	put(1, (u32)page, 16, in_flag | VRING_DESC_F_NEXT, 0);
	submit(0);
}

static void out_after_in(void)
{
	put(0, (u32)page, 16, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
	put(1, (u32)page, 16, 0, 0);
	submit(0);
}

static void avail_jump(void)
{
	put_good_request();
	queue->avail->idx += queue->num + 1;
	notify(queue->pfn << PAGE_SHIFT);
}

static void avail_back(void)
{
	put_good_request();
	queue->avail->idx--;
	notify(queue->pfn << PAGE_SHIFT);
}

static void avail_trash(void)
{
	memset((void *)queue->avail, 0xff, sizeof(struct vring_avail) + 2 * queue->num);
	notify(queue->pfn << PAGE_SHIFT);
}

static void used_trash(void)
{
	put_good_request();
	memset((void *)queue->used, 0xff, sizeof(struct vring_used) + 8 * queue->num);
	submit(0);
}

/* A device may be sent anything: a table of chance, and sixteen heads into it. */
static void descriptor_trash(void)
{
	u32 state = 12345, *words = (u32 *)queue->desc;

	for (u32 i = 0; i < queue->num * sizeof(struct vring_desc) / 4; i++)
		words[i] = random_next(&state);
	for (u16 i = 0; i < 16; i++)
		publish(i);
	notify(queue->pfn << PAGE_SHIFT);
}

/* The same request under one head, many times: it is in flight already. */
static void same_head(void)
{
	put_good_request();
	for (u32 i = 0; i < queue->num; i++)
		publish(0);
	notify(queue->pfn << PAGE_SHIFT);
}

static void early(void)
{
	put_good_request();
	target->desc->status = 0; /* without telling: it isn't a reset */
	submit(0);
}

static void failed_status(void)
{
	device_set_status(target, target->desc->status | VIRTIO_CONFIG_S_FAILED);
	put_good_request();
	submit(0);
}

static void pfn_lie(void)
{
	struct lguest_vqconfig *config = (void *)target->desc->rest;

	for (unsigned int q = 0; q < target->desc->num_vq; q++)
		config[q].pfn = 0xfffff, config[q].num = 0xffff, config[q].irq = 0xffff;
	put_good_request();
	submit(0);
}

/* Makes the device's indirect table: "count" entries of 16 bytes each. */
static struct vring_desc *indirect_table(u32 count)
{
	struct vring_desc *table = (void *)(page + 2048);

	for (u32 i = 0; i < count; i++)
		table[i] = (struct vring_desc){ (u32)page, 16, in_flag | (i + 1 < count ? VRING_DESC_F_NEXT : 0), i + 1 };
	return table;
}

static void indirect_outside(void) { put(0, guest_limit, 64, VRING_DESC_F_INDIRECT, 0); submit(0); }
static void indirect_high(void) { put(0, 0x100000000ull + (u32)indirect_table(2), 32, VRING_DESC_F_INDIRECT, 0); submit(0); }
static void indirect_length(void) { put(0, (u32)indirect_table(2), 31, VRING_DESC_F_INDIRECT, 0); submit(0); }
static void indirect_empty(void) { put(0, (u32)indirect_table(2), 0, VRING_DESC_F_INDIRECT, 0); submit(0); }

static void indirect_nested(void)
{
	struct vring_desc *table = indirect_table(2);

	table[0].addr = (u32)table;
	table[0].len = 32;
	table[0].flags = VRING_DESC_F_INDIRECT;
	put(0, (u32)table, 32, VRING_DESC_F_INDIRECT, 0);
	submit(0);
}

static void indirect_next(void)
{
	put(0, (u32)indirect_table(2), 32, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1);
	put(1, (u32)page, 16, in_flag, 0);
	submit(0);
}

static void indirect_write(void)
{
	put(0, (u32)indirect_table(2), 32, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE, 0);
	submit(0);
}

static void indirect_loop(void)
{
	struct vring_desc *table = indirect_table(2);

	table[1].flags |= VRING_DESC_F_NEXT;
	table[1].next = 0;
	put(0, (u32)table, 32, VRING_DESC_F_INDIRECT, 0);
	submit(0);
}

static void indirect_beyond(void)
{
	struct vring_desc *table = indirect_table(2);

	table[0].next = 2;
	put(0, (u32)table, 32, VRING_DESC_F_INDIRECT, 0);
	submit(0);
}

static void indirect_long(void)
{
	u32 count = queue->num + 1;
	struct vring_desc *table = alloc_pages((count * sizeof(*table) + PAGE_SIZE - 1) / PAGE_SIZE);

	for (u32 i = 0; i < count; i++)
		table[i] = (struct vring_desc){ (u32)page, 16, in_flag | (i + 1 < count ? VRING_DESC_F_NEXT : 0), i + 1 };
	put(0, (u32)table, count * sizeof(*table), VRING_DESC_F_INDIRECT, 0);
	submit(0);
}

/* Rings: the console */

static void writable_output(void)
{
	put(0, (u32)page, 64, VRING_DESC_F_WRITE, 0);
	submit(0);
}

static void readable_input(void)
{
	queue = &target->vqs[0];
	put(0, (u32)page, 64, 0, 0);
	submit(0);
	/* Nobody may look at it before there is input. */
	wait_for(never, NULL, 3000);
}

/* Rings: the disk */

static struct virtio_blk_outhdr *header(u32 type, u64 sector)
{
	struct virtio_blk_outhdr *h = (void *)page;

	*h = (struct virtio_blk_outhdr){ type, 0, sector };
	page[1024] = BLK_STATUS_UNWRITTEN;
	return h;
}

/* A request of which each part can be wrong. */
static void request(u32 type, u64 sector, u32 header_length, u32 data_length, u32 status_length)
{
	header(type, sector);
	put(0, (u32)page, header_length, VRING_DESC_F_NEXT, 1);
	put(1, (u32)page + 1536, data_length, (type & VIRTIO_BLK_T_OUT ? 0 : VRING_DESC_F_WRITE) | VRING_DESC_F_NEXT, 2);
	put(2, (u32)page + 1024, status_length, VRING_DESC_F_WRITE, 0);
	submit(0);
}

static void header_15(void) { request(VIRTIO_BLK_T_IN, 0, 15, 512, 1); }
static void header_17(void) { request(VIRTIO_BLK_T_IN, 0, 17, 512, 1); }
static void status_2(void) { request(VIRTIO_BLK_T_IN, 0, 16, 512, 2); }
static void status_0(void) { request(VIRTIO_BLK_T_IN, 0, 16, 512, 0); }
static void empty_data(void) { request(VIRTIO_BLK_T_IN, 0, 16, 0, 1); }
static void unaligned_read(void) { request(VIRTIO_BLK_T_IN, 0, 16, 100, 1); }
static void unaligned_write(void) { request(VIRTIO_BLK_T_OUT, 0, 16, 100, 1); }
static void unknown_type(void) { request(0x40, 0, 16, 512, 1); }
static void read_past_end(void) { request(VIRTIO_BLK_T_IN, blk_capacity(target), 16, 512, 1); }
static void write_past_end(void) { request(VIRTIO_BLK_T_OUT, blk_capacity(target), 16, 512, 1); }
static void write_across_end(void) { request(VIRTIO_BLK_T_OUT, blk_capacity(target) - 1, 16, 1024, 1); }
static void sector_huge(void) { request(VIRTIO_BLK_T_OUT, 1ull << 63, 16, 512, 1); }
static void sector_overflow(void) { request(VIRTIO_BLK_T_OUT, 1ull << 55, 16, 512, 1); }
static void sector_negative(void) { request(VIRTIO_BLK_T_IN, ~0ull, 16, 512, 1); }

static void no_status(void)
{
	header(VIRTIO_BLK_T_OUT, 0);
	put(0, (u32)page, 16, VRING_DESC_F_NEXT, 1);
	put(1, (u32)page + 1536, 512, 0, 0);
	submit(0);
}

static void no_header(void)
{
	put(0, (u32)page + 1536, 512, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
	put(1, (u32)page + 1024, 1, VRING_DESC_F_WRITE, 0);
	submit(0);
}

static void header_only(void)
{
	header(VIRTIO_BLK_T_IN, 0);
	put(0, (u32)page, 16, 0, 0);
	submit(0);
}

static void status_readable(void)
{
	header(VIRTIO_BLK_T_OUT, 0);
	put(0, (u32)page, 16, VRING_DESC_F_NEXT, 1);
	put(1, (u32)page + 1536, 512, VRING_DESC_F_NEXT, 2);
	put(2, (u32)page + 1024, 1, 0, 0);
	submit(0);
}

static void capacity_lie(void)
{
	u64 more = blk_capacity(target) * 2, sector = blk_capacity(target);

	memcpy(device_config(target), &more, sizeof(more));
	request(VIRTIO_BLK_T_OUT, sector, 16, 512, 1);
}

/* Hypercalls */

static void notify_limit(void) { notify(guest_limit); }
static void notify_top(void) { notify(0xfffff000); }
static void notify_ring_inside(void) { notify((queue->pfn << PAGE_SHIFT) + 4); }
static void notify_descriptor_inside(void) { notify(target->address + 1); }

/* A string whose NUL would be beyond the guest's memory. */
static void notify_last(void)
{
	*(volatile u8 *)(guest_limit - 1) = 'x';
	notify(guest_limit - 1);
}

static void hypercall_99(void) { hcall(99, 1, 2, 3, 4); }
static void hypercall_huge(void) { hcall(0xffffffff, 1, 2, 3, 4); }
static void init_twice(void) { hcall(LHCALL_LGUEST_INIT, (u32)lguest_data, 0, 0, 0); }
static void read_test_page(void) { *(volatile u8 *)TEST_AREA; }
static void write_test_page(void) { *(volatile u32 *)TEST_AREA = 0xdead; }

static void set_pte(u32 pte)
{
	*pte_of(TEST_AREA) = pte;
	hcall(LHCALL_SET_PTE, (u32)page_directory, TEST_AREA, pte, 0);
}

static void set_pte_beyond(void) { set_pte(guest_limit | PTE_KERNEL); read_test_page(); }
static void set_pte_pse(void) { set_pte((u32)page | PTE_KERNEL | PTE_PSE); read_test_page(); }
static void set_pte_host(void) { hcall(LHCALL_SET_PTE, (u32)page_directory, 0xffc00000, (u32)page | PTE_KERNEL, 0); }
static void set_pte_nowhere(void) { hcall(LHCALL_SET_PTE, 0xfffff000, TEST_AREA, (u32)page | PTE_KERNEL, 0); }

static void set_pgd_beyond(void)
{
	page_directory[(TEST_AREA >> 22) + 1] = guest_limit | PTE_KERNEL;
	hcall(LHCALL_SET_PGD, (u32)page_directory, (TEST_AREA >> 22) + 1, 0, 0);
	*(volatile u8 *)(TEST_AREA + (4u << 20));
}

static void set_pgd_index(void) { hcall(LHCALL_SET_PGD, (u32)page_directory, 5000, 0, 0); }
static void set_pgd_host(void) { page_directory[1023] = 0; hcall(LHCALL_SET_PGD, (u32)page_directory, 1023, 0, 0); }
static void new_pgtable_outside(void) { hcall(LHCALL_NEW_PGTABLE, guest_limit, 0, 0, 0); }

/* A whole directory, so that the guest goes on where a host takes it. */
static void new_pgtable_unaligned(void)
{
	u8 *directory = (u8 *)alloc_pages(2) + 8;

	memcpy(directory, page_directory, sizeof(page_directory));
	hcall(LHCALL_NEW_PGTABLE, (u32)directory, 0, 0, 0);
	hcall(LHCALL_NEW_PGTABLE, (u32)page_directory, 0, 0, 0);
}

static void new_pgtable_empty(void) { memset(page, 0, PAGE_SIZE); hcall(LHCALL_NEW_PGTABLE, (u32)page, 0, 0, 0); }

/* Entries written into the tables behind the host's back; sixteen pages at its address are the embedded host's. */
static void pte_host(void)
{
	for (u32 i = 0; i < 16; i++) {
		*pte_of(TEST_AREA) = (0xffc00000 + i * PAGE_SIZE) | PTE_KERNEL;
		hcall(LHCALL_FLUSH_TLB, 1, 0, 0, 0);
		for (u32 word = 0; word < 1024; word++)
			((volatile u32 *)TEST_AREA)[word] = 0;
	}
}

static void pte_nowhere_read(void) { *pte_of(TEST_AREA) = PAST_RAM | PTE_KERNEL; read_test_page(); }
static void pte_nowhere_write(void) { *pte_of(TEST_AREA) = PAST_RAM | PTE_KERNEL; write_test_page(); }
static void pte_nowhere_jump(void) { *pte_of(TEST_AREA) = PAST_RAM | PTE_KERNEL; ((void (*)(void))TEST_AREA)(); }

static void pgd_nowhere(void)
{
	page_directory[(TEST_AREA >> 22) + 1] = PAST_RAM | PTE_KERNEL;
	*(volatile u8 *)(TEST_AREA + (4u << 20));
}

static void pgd_host(void)
{
	page_directory[1023] = 0;
	hcall(LHCALL_FLUSH_TLB, 1, 0, 0, 0);
	asm volatile("movl %0, %%fs" : : "r"(KERNEL_DS)); /* a look into the GDT, which was there */
}

static void idt_300(void) { hcall(LHCALL_LOAD_IDT_ENTRY, 300, 0x00610000, 0x00008e00, 0); }
static void idt_type(void) { hcall(LHCALL_LOAD_IDT_ENTRY, 200, 0x00610000, 0x00008500, 0); }
static void gdt_40(void) { hcall(LHCALL_LOAD_GDT_ENTRY, 40, 0xffff, 0x00cf9b00, 0); }
static void gdt_count(void) { hcall(LHCALL_LOAD_GDT, (u32)gdt, 4000, 0, 0); }

/* A ring 0 code segment: the host must make it a ring 1 one. */
static void gdt_ring0(void)
{
	u32 cs;

	gdt_set(20, 0x00cf9b000000ffffull);
	asm volatile("pushl %1; pushl $1f; lret\n1:\tmovl %%cs, %0\n\tljmp %2, $2f\n2:"
		     : "=a"(cs)
		     : "r"(20 * 8 + GUEST_PL), "i"(KERNEL_CS)
		     : "memory");
	print("in ring %u by selector %x\n", cs & 3, cs);
}

/* Straight to ring 0, which the descriptor's level should forbid. */
static void jump_ring0(void)
{
	gdt_set(20, 0x00cf9b000000ffffull);
	asm volatile("ljmp %0, $1f\n1:\tcli; hlt" : : "i"(20 * 8));
}

static void gdt_call_gate(void)
{
	extern char gate_target[];

	gdt_set(20, (u64)((u32)gate_target & 0xffff0000) << 32 | 0x0000ec0000000000ull |
			    (u64)(GDT_ENTRY_LGUEST_CS * 8) << 16 | ((u32)gate_target & 0xffff));
	asm volatile("lcall %0, $0\ngate_target:\n\tnop" : : "i"(20 * 8 + 1));
}

static void stack_ring0(void) { hcall(LHCALL_SET_STACK, 13 * 8, (u32)trap_stack + sizeof(trap_stack), 2, 0); }
static void stack_pages(void) { hcall(LHCALL_SET_STACK, KERNEL_DS, (u32)trap_stack + sizeof(trap_stack), 3, 0); }
static void stack_unmapped(void) { hcall(LHCALL_SET_STACK, KERNEL_DS, TEST_AREA + 0x8000, 2, 0); }

static void stack_gone(void)
{
	u8 *stack = alloc_pages(2);

	user_map();
	map_page(TEST_AREA + 0x8000, (u32)stack, PTE_KERNEL);
	map_page(TEST_AREA + 0x9000, (u32)stack + PAGE_SIZE, PTE_KERNEL);
	hcall(LHCALL_SET_STACK, KERNEL_DS, TEST_AREA + 0xa000, 2, 0);
	unmap_page(TEST_AREA + 0x8000);
	unmap_page(TEST_AREA + 0x9000);
	user_run(user_ud2, 0, 0);
}

static void esp_unmapped(void) { asm volatile("movl %0, %%esp; ud2" : : "r"(TEST_AREA + 0x8000)); }
static void esp_host(void) { asm volatile("movl %0, %%esp; pushl %%eax" : : "r"(0xffc00800)); }
static void tls_outside(void) { hcall(LHCALL_LOAD_TLS, guest_limit - 8, 0, 0, 0); }
static void shutdown_outside(void) { hcall(LHCALL_SHUTDOWN, guest_limit - 4, LGUEST_SHUTDOWN_POWEROFF, 0, 0); }
static void shutdown_wild(void) { hcall(LHCALL_SHUTDOWN, 0xfffffff0, LGUEST_SHUTDOWN_POWEROFF, 0, 0); }

static void async_garbage(void)
{
	for (unsigned int i = 0; i < LHCALL_RING_SIZE; i++) {
		memset((void *)lguest_field(abi->hcalls + i * abi->hcall_size), 0x63, abi->hcall_size);
		hcall_status()[i] = i + 1;
	}
	hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
}

static void async_halt(void)
{
	async_hcall(LHCALL_NOTIFY, guest_limit, 0, 0, 0);
	async_hcall(LHCALL_HALT, 0, 0, 0, 0);
	hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
}

static void lguest_data_trash(void)
{
	u32 blocked = *lguest_field(LGUEST_DATA_blocked_interrupts);

	memset(lguest_data, 0xff, 84);
	hcall(LHCALL_FLUSH_ASYNC, 0, 0, 0, 0);
	for (volatile u32 i = 0; i < 10000000; i++)
		;
	*lguest_field(LGUEST_DATA_blocked_interrupts) = blocked;
	if (abi->irq_pending != NO_FIELD)
		*lguest_field(abi->irq_pending) = 0;
	irq_restore(X86_EFLAGS_IF);
}

static void descriptors_trash(void)
{
	memset((void *)memory_size, 0xff, PAGE_SIZE);
	notify(memory_size);
	notify(queue->pfn << PAGE_SHIFT);
}

/* Traps */

static void no_handler(void) { idt_clear(TRAP_UD); asm volatile("ud2"); }
static void no_fault_handler(void) { idt_clear(TRAP_PF); read_test_page(); }

static void triple_fault(void)
{
	for (unsigned int vector = 0; vector < 32; vector++)
		idt_clear(vector);
	asm volatile("movl %0, %%esp; pushl %%eax" : : "r"(TEST_AREA + 0x8000));
}

static void fault_loop(void)
{
	idt_set(TRAP_PF, TEST_AREA + 0x8000, GATE_INTERRUPT, 0); /* a handler that isn't mapped */
	read_test_page();
}


static void ring3_hypercall(void)
{
	user_map();
	user_run(user_hypercall, 0, 0);
	user_unmap();
	print("trap %u error %x\n", last_trap.number, last_trap.error);
}

static void jump_unmapped(void) { ((void (*)(void))TEST_AREA)(); }
static void jump_host(void) { ((void (*)(void))0xffc00000u)(); }
static void sysenter_ring1(void) { asm volatile("sysenter"); }
static void bad_opcode(void) { asm volatile(".byte 0x0f, 0xff, 0xff, 0xff"); }
static void long_prefixes(void) { asm volatile(".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90"); }

static void string_io(void)
{
	asm volatile("insb" : : "D"(page), "d"(0x3f8) : "memory");
}

static void null_segment(void)
{
	asm volatile("movl %0, %%fs; movl %%fs:(%1), %0" : : "r"(0), "r"(page) : "memory");
}

static void beyond_segment(void)
{
	gdt_set(20, 0x0040b20000000fffull); /* 4 KiB from 0 */
	asm volatile("movl %0, %%fs; movl %%fs:(%1), %0" : : "r"(20 * 8 + GUEST_PL), "r"(page) : "memory");
}

static void iret_ring0(void)
{
	asm volatile("pushfl; pushl %0; pushl $1f; iret\n1:\tcli; hlt" : : "r"(GDT_ENTRY_KERNEL_CS * 8) : "memory");
}

static void iret_vm86(void)
{
	asm volatile("pushfl; orl $0x20000, (%%esp); pushl %0; pushl $1f; iret\n1:" : : "r"(KERNEL_CS) : "memory");
}

static void iret_nt(void)
{
	asm volatile("pushfl; orl $0x4000, (%%esp); popfl; pushfl; pushl %0; pushl $1f; iret\n1:" : : "r"(KERNEL_CS) : "memory");
}

static void popf_iopl(void) { asm volatile("pushfl; orl $0x3000, (%%esp); popfl; sti" : : : "memory", "cc"); }
static void single_step(void) { asm volatile("pushfl; orl $0x100, (%%esp); popfl; nop; nop" : : : "memory", "cc"); }

/* Interrupts */

static void irq_no_handler(void)
{
	idt_clear(FIRST_EXTERNAL_VECTOR);
	set_clockevent(NSEC_PER_MSEC);
	delay_ns(20 * NSEC_PER_MSEC);
	extern char trap_stubs[];
	idt_set(FIRST_EXTERNAL_VECTOR, (u32)trap_stubs + FIRST_EXTERNAL_VECTOR * 16, GATE_INTERRUPT, 0);
	delay_ns(20 * NSEC_PER_MSEC);
}

static void halt_blocked(void)
{
	*lguest_field(LGUEST_DATA_blocked_interrupts) = 0xffffffff;
	halt();
}

static void deaf(void)
{
	irq_save();
	for (;;)
		asm volatile("");
}

/* Timers as fast as they go, in a guest that does nothing but take them. */
static void rearm_at_once(unsigned int irq)
{
	if (!irq)
		set_clockevent(1);
}

static void clock_storm(void)
{
	irq_hook = rearm_at_once;
	set_clockevent(1);
	delay_ns(200 * NSEC_PER_MSEC);
	irq_hook = NULL;
}

enum kind { RING, CONSOLE, BLOCK, OTHER };

#define STOPS_DEVICE "the guest ends, or the device does"
#define ENDS "the guest ends"
#define IOERR "status 1, I/O error"

static const struct misdeed {
	const char *name;
	void (*commit)(void);
	enum kind kind;
	const char *expected;
} misdeeds[] = {
	{ "outside", outside, RING, STOPS_DEVICE ": a buffer beyond memory" },
	{ "past-end", past_end, RING, STOPS_DEVICE ": a buffer whose last byte is beyond memory" },
	{ "high-address", high_address, RING, STOPS_DEVICE ": an address that is fine but for its upper half" },
	{ "wrap-32", wrap_32, RING, STOPS_DEVICE ": address and length exceed 32 bits" },
	{ "wrap-64", wrap_64, RING, STOPS_DEVICE ": address and length exceed 64 bits" },
	{ "huge-length", huge_length, RING, STOPS_DEVICE ": a buffer of 4 GiB" },
	{ "zero-length", zero_length, RING, "an empty buffer: nothing, or " STOPS_DEVICE },
	{ "head", head_num, RING, STOPS_DEVICE ": a head that is the ring's size" },
	{ "head-wild", head_wild, RING, STOPS_DEVICE ": a head of 65535" },
	{ "next", next_num, RING, STOPS_DEVICE ": a next that is the ring's size" },
	{ "loop", loop, RING, STOPS_DEVICE ": a chain of two that never ends" },
	{ "self-loop", self_loop, RING, STOPS_DEVICE ": a descriptor that follows itself" },
	{ "unknown-flags", unknown_flags, RING, "flags nobody knows: nothing, or " STOPS_DEVICE },
	{ "out-after-in", out_after_in, RING, STOPS_DEVICE ": a readable descriptor after a writable one" },
	{ "avail-jump", avail_jump, RING, STOPS_DEVICE ": the avail index moves by more than the ring's size" },
	{ "avail-back", avail_back, RING, STOPS_DEVICE ": the avail index goes back by one" },
	{ "avail-trash", avail_trash, RING, STOPS_DEVICE ": the avail ring is all ones" },
	{ "used-trash", used_trash, RING, "nothing, or " STOPS_DEVICE ": the used ring, which is the device's, is all ones" },
	{ "descriptor-trash", descriptor_trash, RING, STOPS_DEVICE ": a descriptor table of chance" },
	{ "same-head", same_head, RING, "one request in every slot of the avail ring: all are done, or " STOPS_DEVICE },
	{ "early", early, RING, "a warning: output with status 0 is ignored" },
	{ "failed-status", failed_status, RING, "the driver says it failed: the request is done all the same, or not" },
	{ "pfn-lie", pfn_lie, RING, "the descriptor is spoilt, and the launcher doesn't believe it: all goes well" },
	{ "indirect-outside", indirect_outside, RING, STOPS_DEVICE ": an indirect table beyond memory" },
	{ "indirect-high", indirect_high, RING, STOPS_DEVICE ": an indirect table that is there but for its upper half" },
	{ "indirect-length", indirect_length, RING, STOPS_DEVICE ": an indirect table of 31 bytes" },
	{ "indirect-empty", indirect_empty, RING, STOPS_DEVICE ": an indirect table of 0 bytes" },
	{ "indirect-nested", indirect_nested, RING, STOPS_DEVICE ": an indirect descriptor in an indirect table" },
	{ "indirect-next", indirect_next, RING, STOPS_DEVICE ": an indirect descriptor with a next" },
	{ "indirect-write", indirect_write, RING, "an indirect descriptor that is writable: nothing, or " STOPS_DEVICE },
	{ "indirect-loop", indirect_loop, RING, STOPS_DEVICE ": an indirect table that never ends" },
	{ "indirect-beyond", indirect_beyond, RING, STOPS_DEVICE ": a next beyond the indirect table" },
	{ "indirect-long", indirect_long, RING, STOPS_DEVICE ": an indirect table longer than the ring" },

	{ "writable-output", writable_output, CONSOLE, STOPS_DEVICE ": a writable buffer for output" },
	{ "readable-input", readable_input, CONSOLE, STOPS_DEVICE ": a readable buffer for input; at the latest when there is input" },

	{ "header-15", header_15, BLOCK, STOPS_DEVICE ": a header of 15 bytes" },
	{ "header-17", header_17, BLOCK, STOPS_DEVICE ": a header of 17 bytes" },
	{ "no-status", no_status, BLOCK, STOPS_DEVICE ": no room for the status" },
	{ "no-header", no_header, BLOCK, STOPS_DEVICE ": no header" },
	{ "header-only", header_only, BLOCK, STOPS_DEVICE ": nothing but a header" },
	{ "status-2", status_2, BLOCK, "a status of two bytes: status 0 in one of them, or " STOPS_DEVICE },
	{ "status-0", status_0, BLOCK, STOPS_DEVICE ": a status of no bytes" },
	{ "status-readable", status_readable, BLOCK, STOPS_DEVICE ": a status that can't be written" },
	{ "empty-data", empty_data, BLOCK, "a read of nothing: status 0, or " STOPS_DEVICE },
	{ "unaligned-read", unaligned_read, BLOCK, "100 bytes: status 1, or " STOPS_DEVICE },
	{ "unaligned-write", unaligned_write, BLOCK, "100 bytes: status 1, or " STOPS_DEVICE },
	{ "unknown-type", unknown_type, BLOCK, "status 2, unsupported; the seed takes it for a read" },
	{ "read-past-end", read_past_end, BLOCK, IOERR },
	{ "write-past-end", write_past_end, BLOCK, IOERR " and the file doesn't grow; in the seed " ENDS },
	{ "write-across-end", write_across_end, BLOCK, IOERR " and the file doesn't grow; in the seed " ENDS },
	{ "sector-huge", sector_huge, BLOCK, IOERR ": sector 2^63" },
	{ "sector-overflow", sector_overflow, BLOCK, IOERR ": sector 2^55, where bytes exceed 64 bits" },
	{ "sector-negative", sector_negative, BLOCK, IOERR ": sector -1" },
	{ "capacity-lie", capacity_lie, BLOCK, IOERR ": the config is made to say twice as much, and believed by nobody" },

	{ "notify-limit", notify_limit, OTHER, ENDS ": NOTIFY of the first address beyond memory" },
	{ "notify-top", notify_top, OTHER, ENDS ": NOTIFY of 0xfffff000" },
	{ "notify-last", notify_last, OTHER, "prints an x: NOTIFY of the last byte, and no NUL after it" },
	{ "notify-ring-inside", notify_ring_inside, OTHER, "counts as a kick: NOTIFY of a ring's address and 4" },
	{ "notify-descriptor-inside", notify_descriptor_inside, OTHER, "is early console text: NOTIFY of a descriptor and 1" },
	{ "hypercall-99", hypercall_99, OTHER, ENDS },
	{ "hypercall-huge", hypercall_huge, OTHER, ENDS },
	{ "init-twice", init_twice, OTHER, ENDS },
	{ "set-pte-beyond", set_pte_beyond, OTHER, ENDS ": a page beyond memory" },
	{ "set-pte-pse", set_pte_pse, OTHER, ENDS ": a page table entry with PSE" },
	{ "set-pte-host", set_pte_host, OTHER, ENDS ": the address is the host's" },
	{ "set-pte-nowhere", set_pte_nowhere, OTHER, "nothing, or " ENDS ": of a page directory beyond memory" },
	{ "set-pgd-beyond", set_pgd_beyond, OTHER, ENDS ": a page table beyond memory" },
	{ "set-pgd-index", set_pgd_index, OTHER, ENDS ": entry 5000" },
	{ "set-pgd-host", set_pgd_host, OTHER, "nothing: entry 1023 stays the host's" },
	{ "new-pgtable-outside", new_pgtable_outside, OTHER, ENDS },
	{ "new-pgtable-unaligned", new_pgtable_unaligned, OTHER, ENDS ", or nothing: lg takes any address" },
	{ "new-pgtable-empty", new_pgtable_empty, OTHER, ENDS ": it maps nothing" },
	{ "pte-host", pte_host, OTHER, ENDS ": an entry for the host's pages, written behind its back, and writes there" },
	{ "pte-nowhere-read", pte_nowhere_read, OTHER, ENDS ": an entry for memory that isn't, and a read" },
	{ "pte-nowhere-write", pte_nowhere_write, OTHER, ENDS ": an entry for memory that isn't, and a write" },
	{ "pte-nowhere-jump", pte_nowhere_jump, OTHER, ENDS ": an entry for memory that isn't, and a jump" },
	{ "pgd-nowhere", pgd_nowhere, OTHER, ENDS ", or a page fault: a page table in memory that isn't" },
	{ "pgd-host", pgd_host, OTHER, "nothing, or " ENDS ": the host's directory entry is wiped behind its back" },
	{ "idt-300", idt_300, OTHER, ENDS },
	{ "idt-type", idt_type, OTHER, ENDS ": a task gate" },
	{ "gdt-40", gdt_40, OTHER, ENDS },
	{ "gdt-count", gdt_count, OTHER, ENDS ": LOAD_GDT of 4000 entries; not a hypercall in 3.x" },
	{ "gdt-ring0", gdt_ring0, OTHER, "in ring 1: a segment of ring 0 is raised" },
	{ "jump-ring0", jump_ring0, OTHER, "trap 13, or in ring 1: a jump to a segment of ring 0" },
	{ "gdt-call-gate", gdt_call_gate, OTHER, "trap 13 or 11, or " ENDS ": a call gate to the host's code segment" },
	{ "stack-ring0", stack_ring0, OTHER, ENDS },
	{ "stack-pages", stack_pages, OTHER, ENDS ": a stack of three pages" },
	{ "stack-unmapped", stack_unmapped, OTHER, "nothing yet, or " ENDS },
	{ "stack-gone", stack_gone, OTHER, ENDS ": a trap in ring 3 when the stack for it isn't mapped" },
	{ "esp-unmapped", esp_unmapped, OTHER, ENDS ": a trap in ring 1 when the stack isn't mapped" },
	{ "esp-host", esp_host, OTHER, ENDS ": a stack in the host's pages" },
	{ "tls-outside", tls_outside, OTHER, ENDS },
	{ "shutdown-outside", shutdown_outside, OTHER, ENDS ": a message whose 128 bytes go beyond memory" },
	{ "shutdown-wild", shutdown_wild, OTHER, ENDS ": a message at 0xfffffff0" },
	{ "async-garbage", async_garbage, OTHER, ENDS ": 64 asynchronous calls of number 0x63636363" },
	{ "async-halt", async_halt, OTHER, ENDS ": a bad NOTIFY and a HALT in the asynchronous ring" },
	{ "lguest-data-trash", lguest_data_trash, OTHER, "nothing: the fields shared with the host are all ones for a while" },
	{ "descriptors-trash", descriptors_trash, OTHER, "nothing, or " ENDS ": the descriptor page is all ones" },
	{ "no-handler", no_handler, OTHER, ENDS ": unhandled trap 6" },
	{ "no-fault-handler", no_fault_handler, OTHER, ENDS ": unhandled trap 14" },
	{ "triple-fault", triple_fault, OTHER, ENDS },
	{ "fault-loop", fault_loop, OTHER, ENDS " when its stack does: the page fault handler isn't mapped" },
	{ "ring3-hypercall", ring3_hypercall, OTHER, "trap 13 error fa: a hypercall from ring 3" },
	{ "jump-unmapped", jump_unmapped, OTHER, "trap 14 error 0" },
	{ "jump-host", jump_host, OTHER, "a trap, or " ENDS ": a jump into the host's pages" },
	{ "sysenter", sysenter_ring1, OTHER, "trap 13 error 0" },
	{ "bad-opcode", bad_opcode, OTHER, "trap 6" },
	{ "long-instruction", long_prefixes, OTHER, "trap 13 error 0: more than 15 bytes" },
	{ "string-io", string_io, OTHER, "trap 13 error 0; the embedded host's CPU lets it pass" },
	{ "null-segment", null_segment, OTHER, "trap 13 error 0; the embedded host's CPU lets it pass" },
	{ "beyond-segment", beyond_segment, OTHER, "trap 13 error 0; the embedded host's CPU lets it pass" },
	{ "iret-ring0", iret_ring0, OTHER, "trap 13 error 60" },
	{ "iret-vm86", iret_vm86, OTHER, "nothing: the flag is ignored; the embedded host's CPU goes to virtual 8086 mode, and traps" },
	{ "iret-nt", iret_nt, OTHER, "a trap, or " ENDS ": a return to no task" },
	{ "popf-iopl", popf_iopl, OTHER, "trap 13 error 0: the level stays, so sti traps" },
	{ "single-step", single_step, OTHER, "trap 1" },
	{ "irq-no-handler", irq_no_handler, OTHER, "nothing: the interrupt waits for a handler, or is lost" },
	{ "halt-blocked", halt_blocked, OTHER, "waits for ever: HALT with every interrupt blocked" },
	{ "deaf", deaf, OTHER, "runs for ever with interrupts off" },
	{ "clock-storm", clock_storm, OTHER, "nothing: timers of 1 ns" },
};

static void commit(void *arg)
{
	((const struct misdeed *)arg)->commit();
}

static const struct misdeed *find(const char *name)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(misdeeds); i++)
		if (!strcmp(misdeeds[i].name, name))
			return &misdeeds[i];
	return NULL;
}

/* The device and queue to do it to; false if there is none. */
static bool aim(enum kind kind, const char *device)
{
	static const struct {
		const char *name;
		u8 type, queue;
		u16 in_flag;
	} targets[] = {
		{ "block", VIRTIO_ID_BLOCK, 0, 0 },
		{ "console", VIRTIO_ID_CONSOLE, 1, 0 },
		{ "net", VIRTIO_ID_NET, 1, 0 },
		{ "rng", VIRTIO_ID_RNG, 0, VRING_DESC_F_WRITE },
	};

	target = NULL;
	for (unsigned int i = 0; i < ARRAY_SIZE(targets) && !target; i++) {
		if (device ? strcmp(device, targets[i].name) != 0
			   : (kind == CONSOLE && targets[i].type != VIRTIO_ID_CONSOLE) ||
				     (kind == BLOCK && targets[i].type != VIRTIO_ID_BLOCK))
			continue;
		target = device_find(targets[i].type, 0);
		if (target && target->desc->num_vq <= targets[i].queue)
			target = NULL;
		if (target) {
			queue = &target->vqs[targets[i].queue];
			in_flag = targets[i].in_flag;
		}
	}
	return target != NULL;
}

/* From a fresh start, so that what is in the ring is the misdeed's alone. */
static void prepare(void)
{
	if (target->desc->type == VIRTIO_ID_CONSOLE) {
		console_drain();
		console_init();
	} else
		device_start(target, 0xffffffff);
}

static void run(const struct misdeed *misdeed)
{
	u32 mark = alloc_mark(), used;
	bool trapped;

	page = alloc_pages(1);
	print("misdeed %s\n", misdeed->name);
	console_drain();
	if (target && misdeed->kind != OTHER)
		prepare();
	used = target ? queue->used->idx : 0;
	trapped = traps(commit, (void *)misdeed);
	/* Workers are processes of their own: give them time to notice. */
	wait_for(never, NULL, SETTLE_MS);
	if (misdeed->kind != OTHER) {
		u16 finished = queue->used->idx - used;
		u8 status = page[1024];

		target->started = false;
		/* The console's messages go through it, so put it right first. */
		if (target->desc->type == VIRTIO_ID_CONSOLE)
			console_init();
		print("%s: %u requests finished", misdeed->name, finished);
		if (misdeed->kind == BLOCK)
			print(", status %u", status);
		print("\n");
	}
	if (trapped)
		print("%s: trap %u error %x\n", misdeed->name, last_trap.number, last_trap.error);
	print("survived %s\n", misdeed->name);
	alloc_release(mark);
}

bool cmd_misdeed(int argc, char **argv)
{
	const struct misdeed *misdeed;
	char *device;

	if (argc != 2)
		return false;
	if (!strcmp(argv[1], "list")) {
		for (unsigned int i = 0; i < ARRAY_SIZE(misdeeds); i++)
			print("%s: %s\n", misdeeds[i].name, misdeeds[i].expected);
		return true;
	}
	device = strchr(argv[1], '@');
	if (device)
		*device++ = 0;
	misdeed = find(argv[1]);
	if (!misdeed)
		print("misdeed: no such misdeed as %s\n", argv[1]);
	else if (!aim(misdeed->kind, device) && (misdeed->kind != OTHER || device))
		print("misdeed: no device for %s\n", argv[1]);
	else
		run(misdeed);
	return true;
}
