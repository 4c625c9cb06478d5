/* SPDX-License-Identifier: GPL-2.0-only */
/* The driver's side of a split virtqueue: descriptor table, avail ring, used ring. */
#include "virtio.h"
#include "abi.h"

#define TABLE_ENTRIES (PAGE_SIZE / sizeof(struct vring_desc))

static u32 used_offset(u32 num)
{
	u32 bytes = sizeof(struct vring_desc) * num + sizeof(u16) * (2 + num);

	return (bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
}

u32 vring_bytes(u32 num)
{
	return used_offset(num) + 2 * sizeof(u16) + 8 * num;
}

void vq_init(struct virtqueue *vq, struct device *device, const struct lguest_vqconfig *config)
{
	u32 base = config->pfn << PAGE_SHIFT, num = config->num;
	u8 *mine;

	if (!num || num > MAX_VQ_NUM)
		panic("a virtqueue of %u entries", num);
	mine = alloc_pages((num * (2 + 2 + 4 + 4) + PAGE_SIZE - 1) / PAGE_SIZE);
	vq->device = device;
	vq->num = num;
	vq->irq = config->irq;
	vq->pfn = config->pfn;
	vq->desc = (void *)base;
	vq->avail = (void *)(base + sizeof(struct vring_desc) * num);
	vq->used = (void *)(base + used_offset(num));
	vq->tokens = (void *)mine;
	vq->tables = (void *)(mine + 4 * num);
	vq->free_next = (void *)(mine + 8 * num);
	vq->chain_next = (void *)(mine + 10 * num);
	vq_reset(vq);
	if (vq->irq < LGUEST_IRQS)
		irq_unblock(vq->irq);
}

void vq_reset(struct virtqueue *vq)
{
	for (unsigned int i = 0; i < vq->num; i++) {
		vq->free_next[i] = i + 1;
		vq->tokens[i] = NULL;
	}
	vq->free_head = 0;
	vq->free_count = vq->num;
	vq->last_used = 0;
	vq->pending = false;
	vq->avail->flags = setting_poll ? VRING_AVAIL_F_NO_INTERRUPT : 0;
}

static void fill(volatile struct vring_desc *desc, const struct buffer *buffer, bool in, bool last, u16 next)
{
	desc->addr = (u32)buffer->data; /* one to one: virtual is physical */
	desc->len = buffer->length;
	desc->flags = (in ? VRING_DESC_F_WRITE : 0) | (last ? 0 : VRING_DESC_F_NEXT);
	desc->next = last ? 0 : next;
}

static u16 take_descriptor(struct virtqueue *vq)
{
	u16 taken = vq->free_head;

	vq->free_head = vq->free_next[taken];
	vq->free_count--;
	return taken;
}

bool vq_add(struct virtqueue *vq, const struct buffer *buffers, unsigned int out, unsigned int in, void *token)
{
	unsigned int total = out + in;
	bool indirect = (vq->device->features >> VIRTIO_RING_F_INDIRECT_DESC & 1) && total > 1 && total <= TABLE_ENTRIES;
	u16 head;

	if (!vq->free_count || (!indirect && total > vq->free_count))
		return false;
	head = take_descriptor(vq);
	if (indirect) {
		struct buffer table;

		if (!vq->tables[head])
			vq->tables[head] = alloc_page_for_good();
		for (unsigned int i = 0; i < total; i++)
			fill(&vq->tables[head][i], &buffers[i], i >= out, i + 1 == total, i + 1);
		table = (struct buffer){ vq->tables[head], total * sizeof(struct vring_desc) };
		fill(&vq->desc[head], &table, false, true, 0);
		vq->desc[head].flags = VRING_DESC_F_INDIRECT;
		vq->chain_next[head] = 0xffff;
	} else {
		u16 at = head;

		for (unsigned int i = 0; i < total; i++) {
			bool last = i + 1 == total;
			u16 next = last ? 0xffff : take_descriptor(vq);

			fill(&vq->desc[at], &buffers[i], i >= out, last, next);
			vq->chain_next[at] = next;
			at = next;
		}
	}
	vq->tokens[head] = token;
	vq->avail->ring[vq->avail->idx % vq->num] = head;
	barrier(); /* the entry before the index: x86 keeps stores in order */
	vq->avail->idx++;
	vq->pending = true;
	return true;
}

void vq_kick(struct virtqueue *vq)
{
	if (!vq->pending)
		return;
	vq->pending = false;
	mb(); /* the index must be seen before we look whether a notification is wanted */
	if (!(vq->used->flags & VRING_USED_F_NO_NOTIFY))
		hcall(LHCALL_NOTIFY, vq->pfn << PAGE_SHIFT, 0, 0, 0);
}

bool vq_has_used(struct virtqueue *vq)
{
	return vq->used->idx != vq->last_used;
}

bool vq_idle(struct virtqueue *vq)
{
	return vq->free_count == vq->num;
}

void *vq_get(struct virtqueue *vq, u32 *length)
{
	u32 id;
	void *token;

	if (!vq_has_used(vq))
		return NULL;
	mb();
	id = vq->used->ring[vq->last_used % vq->num].id;
	if (length)
		*length = vq->used->ring[vq->last_used % vq->num].len;
	vq->last_used++;
	if (id >= vq->num || !vq->tokens[id])
		panic("%s: used ring has id %u, which is not in flight", device_type_name(vq->device->desc->type), id);
	token = vq->tokens[id];
	vq->tokens[id] = NULL;
	for (u16 at = id; at != 0xffff;) {
		u16 next = vq->chain_next[at];

		vq->free_next[at] = vq->free_head;
		vq->free_head = at;
		vq->free_count++;
		at = next;
	}
	return token;
}

static bool has_used(void *arg)
{
	return vq_has_used(arg);
}

bool vq_wait(struct virtqueue *vq, u32 timeout_ms)
{
	return wait_for(has_used, vq, timeout_ms);
}

static bool answered_or_broken(void *arg)
{
	struct virtqueue *vq = arg;

	return vq_has_used(vq) || device_needs_reset(vq->device);
}

bool vq_wait_answer(struct virtqueue *vq, const char *who, u32 timeout_ms)
{
	wait_for(answered_or_broken, vq, timeout_ms);
	if (vq_has_used(vq))
		return true;
	if (device_needs_reset(vq->device))
		print("%s: no answer, the device needs a reset\n", who);
	else
		print("%s: no answer in %u seconds\n", who, timeout_ms / 1000);
	return false;
}
