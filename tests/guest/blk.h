/* SPDX-License-Identifier: GPL-2.0-only */
/* The block driver. Names are those of linux/virtio_blk.h. */
#ifndef BLK_H
#define BLK_H

#include "virtio.h"

#define SECTOR_SIZE 512u

#define VIRTIO_BLK_F_BARRIER 0
#define VIRTIO_BLK_F_SEG_MAX 2
#define VIRTIO_BLK_F_FLUSH 9

#define VIRTIO_BLK_T_IN 0
#define VIRTIO_BLK_T_OUT 1
#define VIRTIO_BLK_T_SCSI_CMD 2
#define VIRTIO_BLK_T_FLUSH 4
#define VIRTIO_BLK_T_GET_ID 8
#define VIRTIO_BLK_T_BARRIER 0x80000000u

#define VIRTIO_BLK_S_OK 0
#define VIRTIO_BLK_S_IOERR 1
#define VIRTIO_BLK_S_UNSUPP 2
/* Ours: the byte was never written; and: no answer at all. */
#define BLK_STATUS_UNWRITTEN 0xee
#define BLK_STATUS_TIMEOUT 0xff

#define BLK_ID_BYTES 20
#define BLK_MAX_SEGMENTS 250
#define BLK_TIMEOUT_MS 60000

struct virtio_blk_outhdr {
	u32 type, ioprio;
	u64 sector;
} packed;

struct blk_request {
	struct virtio_blk_outhdr header;
	volatile u8 status;
	u32 length; /* as the used ring has it */
	bool done;
};

/* Brings disk N up if it isn't; NULL (and says so) if there is none. */
struct device *blk_open(unsigned int index);
u64 blk_capacity(struct device *disk);
/* The read-only segments of a request come before its writable ones; SCSI commands have both. */
bool blk_submit(struct device *disk, struct blk_request *request, u32 type, u64 sector, const struct buffer *segments,
		unsigned int out, unsigned int in);
/* Finishes requests that are done; returns how many. */
unsigned int blk_reap(struct device *disk);
/* Submits one and waits for it; its status, or BLK_STATUS_... */
u8 blk_do(struct device *disk, u32 type, u64 sector, const struct buffer *segments, unsigned int out, unsigned int in);
u8 blk_read(struct device *disk, u64 sector, void *to, u32 sectors);
u8 blk_write(struct device *disk, u64 sector, const void *from, u32 sectors);
/* What a sector holds after a write with this seed; every sector differs. */
void blk_pattern(u8 *to, u64 sector, u32 seed);
/* Writes, reads and compares: true if all went well. */
bool blk_check_rw(struct device *disk);

#endif
