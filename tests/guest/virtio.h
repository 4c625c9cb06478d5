/* SPDX-License-Identifier: GPL-2.0-only */
/* The lguest bus and virtio's split rings. Names are those of linux/lguest_launcher.h and linux/virtio_*.h. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "guest.h"

#define VIRTIO_ID_NET 1
#define VIRTIO_ID_BLOCK 2
#define VIRTIO_ID_CONSOLE 3
#define VIRTIO_ID_RNG 4

#define VIRTIO_CONFIG_S_ACKNOWLEDGE 1
#define VIRTIO_CONFIG_S_DRIVER 2
#define VIRTIO_CONFIG_S_DRIVER_OK 4
#define VIRTIO_CONFIG_S_NEEDS_RESET 0x40
#define VIRTIO_CONFIG_S_FAILED 0x80

#define VIRTIO_RING_F_INDIRECT_DESC 28

struct lguest_vqconfig {
	u16 num, irq;
	u32 pfn;
} packed;

struct lguest_device_desc {
	u8 type, num_vq, feature_len, config_len, status;
	u8 rest[]; /* lguest_vqconfig[num_vq], features offered, features accepted, config */
} packed;

#define VRING_DESC_F_NEXT 1
#define VRING_DESC_F_WRITE 2
#define VRING_DESC_F_INDIRECT 4
#define VRING_AVAIL_F_NO_INTERRUPT 1
#define VRING_USED_F_NO_NOTIFY 1

struct vring_desc {
	u64 addr;
	u32 len;
	u16 flags, next;
} packed;

struct vring_avail {
	u16 flags, idx;
	u16 ring[];
};

struct vring_used {
	u16 flags, idx;
	struct {
		u32 id, len;
	} ring[];
};

struct device;

#define MAX_VQ_NUM 1024

struct virtqueue {
	struct device *device;
	u16 num, irq;
	u32 pfn;
	volatile struct vring_desc *desc;
	volatile struct vring_avail *avail;
	volatile struct vring_used *used;
	/* The driver's own side of it; never in the ring, where the other side could spoil it. */
	u16 *free_next;	 /* list of free descriptors */
	u16 *chain_next; /* and of those of each chain */
	u16 free_head, free_count, last_used;
	void **tokens;			 /* per head: whose request */
	struct vring_desc **tables;	 /* per head: a page for its indirect table, when it first needs one */
	bool pending;			 /* buffers were added since the last kick */
};

#define MAX_VQS 4
#define MAX_DEVICES 40

struct device {
	struct lguest_device_desc *desc;
	unsigned int index; /* among devices of its type: vda is block 0 */
	u32 address;	    /* guest-physical address of desc */
	u32 features;	    /* accepted, first 32 */
	bool started;	    /* a driver works with it */
	struct virtqueue vqs[MAX_VQS];
};

struct buffer { /* one piece of a request */
	const void *data;
	u32 length;
};

/* bus.c */
extern struct device devices[MAX_DEVICES];
extern unsigned int device_count;
extern u32 guest_limit; /* end of the last ring: nothing above is ours */
void bus_init(void);
struct device *device_find(u8 type, unsigned int index);
const char *device_type_name(u8 type);
u32 device_offered(struct device *device);
u8 *device_config(struct device *device);
/* Whose driver has to start it again after this. */
void device_reset(struct device *device);
/* Everything from reset to DRIVER_OK, accepting those features of "wanted" that are offered. */
void device_start(struct device *device, u32 wanted);
void device_set_status(struct device *device, u8 status);
void device_notify_status(struct device *device);
bool device_needs_reset(struct device *device);

/* virtqueue.c */
void vq_init(struct virtqueue *vq, struct device *device, const struct lguest_vqconfig *config);
void vq_reset(struct virtqueue *vq);
/* Adds a request of "out" device-readable and then "in" device-writable buffers; false if there is no room. */
bool vq_add(struct virtqueue *vq, const struct buffer *buffers, unsigned int out, unsigned int in, void *token);
void vq_kick(struct virtqueue *vq);
bool vq_has_used(struct virtqueue *vq);
/* The token of the next finished request, or NULL. */
void *vq_get(struct virtqueue *vq, u32 *length);
/* Waits for a finished request; false is a timeout. */
bool vq_wait(struct virtqueue *vq, u32 timeout_ms);
/* As vq_wait(), but no longer than the device can answer; false (and says why) if it has not. */
bool vq_wait_answer(struct virtqueue *vq, const char *who, u32 timeout_ms);
bool vq_idle(struct virtqueue *vq);
u32 vring_bytes(u32 num);
#endif
