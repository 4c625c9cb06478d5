/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * All devices at work at once, and everything that comes back is checked: for tests that do things to their workers.
 *
 * A disk may do what is in flight in any order, so requests in flight never overlap: each has a strip of the disk to
 * itself. But for one sector, the last: in each round it is written, the disk flushed and the sector written again, all in
 * flight at once. No write may get past a flush, so what is there in the end is the second.
 */
#include "blk.h"

#define SLOTS 24u
#define SLOT_SECTORS 4u
#define SPAN 1024u /* sectors; less on a small disk */
#define RANDOM_BYTES 32
#define LAST_REPLY_MS 2000

struct slot {
	struct blk_request request;
	u32 sector, sectors;
	bool write;
	u8 *data;
};

static struct slot slots[SLOTS + 1]; /* one more to read the last sector with */
static u32 seeds[SPAN]; /* what each sector holds */
static u32 round;

static bool wrong(u32 sector, const char *what, u32 value)
{
	print("torture failed in round %u: sector %u: %s %u\n", round, sector, what, value);
	return false;
}

static bool finish(struct device *disk, struct blk_request *request)
{
	while (!request->done) {
		if (!vq_wait_answer(&disk->vqs[0], "torture", BLK_TIMEOUT_MS))
			return wrong((u32)request->header.sector, "no answer to a request of type", request->header.type);
		blk_reap(disk);
	}
	if (request->status)
		return wrong((u32)request->header.sector, "status", request->status);
	return true;
}

static bool submit(struct device *disk, struct blk_request *request, u32 type, u32 sector, u8 *data, u32 bytes)
{
	struct buffer piece = { data, bytes };
	unsigned int out = type == VIRTIO_BLK_T_OUT, in = type == VIRTIO_BLK_T_IN;

	return blk_submit(disk, request, type, sector, &piece, out, in) || wrong(sector, "no room in a queue of", disk->vqs[0].num);
}

static bool submit_slot(struct device *disk, struct slot *slot)
{
	if (!slot->write)
		memset(slot->data, 0xaa, slot->sectors * SECTOR_SIZE);
	return submit(disk, &slot->request, slot->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, slot->sector, slot->data,
		      slot->sectors * SECTOR_SIZE);
}

/* Waits for a slot's request, and compares what it read. */
static bool finish_slot(struct device *disk, struct slot *slot)
{
	static u8 expected[SECTOR_SIZE] __attribute__((aligned(4)));

	if (!finish(disk, &slot->request))
		return false;
	for (u32 i = 0; !slot->write && i < slot->sectors; i++) {
		blk_pattern(expected, slot->sector + i, seeds[slot->sector + i]);
		if (memcmp(expected, slot->data + i * SECTOR_SIZE, SECTOR_SIZE))
			return wrong(slot->sector + i, "does not hold what was written with seed", seeds[slot->sector + i]);
	}
	return true;
}

/* The slots' requests, and the last sector's write, flush, write: in flight at once, among each other. */
static bool work(struct device *disk, u32 last, u32 *state)
{
	static struct blk_request before, flush, after;
	static u8 first[SECTOR_SIZE] __attribute__((aligned(4))), second[SECTOR_SIZE] __attribute__((aligned(4)));

	blk_pattern(first, last, random_next(state));
	seeds[last] = random_next(state);
	blk_pattern(second, last, seeds[last]);
	for (u32 i = 0; i < SLOTS; i++) {
		u32 seed = random_next(state);

		for (u32 s = 0; slots[i].write && s < slots[i].sectors; s++) {
			seeds[slots[i].sector + s] = seed;
			blk_pattern(slots[i].data + s * SECTOR_SIZE, slots[i].sector + s, seed);
		}
		if (!submit_slot(disk, &slots[i]))
			return false;
		if (i == SLOTS / 4 && !submit(disk, &before, VIRTIO_BLK_T_OUT, last, first, SECTOR_SIZE))
			return false;
		if (i == SLOTS / 2 && !submit(disk, &flush, VIRTIO_BLK_T_FLUSH, 0, NULL, 0))
			return false;
		if (i == SLOTS * 3 / 4 && !submit(disk, &after, VIRTIO_BLK_T_OUT, last, second, SECTOR_SIZE))
			return false;
		if (i % 8 == 7) /* the worker begins while we add more */
			vq_kick(&disk->vqs[0]);
	}
	for (u32 i = 0; i < SLOTS; i++)
		if (!finish_slot(disk, &slots[i]))
			return false;
	return finish(disk, &before) && finish(disk, &flush) && finish(disk, &after);
}

/* Reads back what this round has written. */
static bool verify(struct device *disk, u32 last)
{
	slots[SLOTS].sector = last;
	slots[SLOTS].sectors = 1;
	for (u32 i = 0; i <= SLOTS; i++) {
		slots[i].write = false;
		if (!submit_slot(disk, &slots[i]))
			return false;
	}
	vq_kick(&disk->vqs[0]);
	for (u32 i = 0; i <= SLOTS; i++)
		if (!finish_slot(disk, &slots[i]))
			return false;
	return true;
}

static bool random_bytes(void)
{
	static u8 old[RANDOM_BYTES];
	u8 new[RANDOM_BYTES] = { 0 };
	u32 length = rng_read(new, sizeof(new));

	if (!length || (length == sizeof(new) && !memcmp(old, new, sizeof(new)))) {
		print("torture failed in round %u: %u random bytes, %s\n", round, length, length ? "and no others" : "it said why");
		return false;
	}
	memcpy(old, new, sizeof(new));
	return true;
}

static bool one_round(struct device *disk, u32 span, u32 *state)
{
	u32 strip = (span - 1) / SLOTS;

	for (u32 i = 0; i < SLOTS; i++) {
		u32 choice = random_next(state);

		slots[i].sectors = 1 + choice % SLOT_SECTORS;
		slots[i].sector = i * strip + (choice >> 8) % (strip - slots[i].sectors + 1);
		slots[i].write = choice >> 4 & 1;
	}
	return work(disk, span - 1, state) && verify(disk, span - 1) &&
	       (!device_find(VIRTIO_ID_RNG, 0) || random_bytes());
}

static bool fill(struct device *disk, u32 span)
{
	for (u32 done = 0; done < span; done += SLOT_SECTORS) {
		u32 n = min(span - done, SLOT_SECTORS);

		for (u32 i = 0; i < n; i++) {
			seeds[done + i] = 1;
			blk_pattern(slots[0].data + i * SECTOR_SIZE, done + i, 1);
		}
		if (blk_write(disk, done, slots[0].data, n))
			return wrong(done, "cannot be written at the start; sectors", n);
	}
	return true;
}

static void torture(struct device *disk, u32 rounds, bool pings)
{
	u32 mark = alloc_mark(), span = min(blk_capacity(disk), (u64)SPAN), state = (u32)rdtsc() | 1, answered;
	bool good;

	for (u32 i = 0; i <= SLOTS; i++)
		slots[i].data = alloc_pages(1);
	round = 0;
	good = fill(disk, span);
	while (good && round < rounds) {
		round++;
		if (pings)
			net_ping_send(round);
		print("torture round %u\n", round);
		good = one_round(disk, span, &state);
		net_ping_receive(0, 0);
		if (console_poll_cancel())
			break;
	}
	if (pings) {
		answered = net_ping_receive(round, LAST_REPLY_MS);
		print("torture: %u of %u pings answered\n", answered, round);
	}
	if (good)
		print("torture ok %u\n", round);
	else
		device_reset(disk); /* what is in flight is not to be written to pages that are another's soon */
	alloc_release(mark);
}

bool cmd_torture(int argc, char **argv)
{
	struct device *disk;
	u32 rounds;

	if (argc > 3 || !word_number(argc, argv, 1, &rounds))
		return false;
	disk = blk_open(0);
	if (!disk || (argc == 3 && !net_ping_start(argv[2])))
		return true;
	if (blk_capacity(disk) > SLOTS * SLOT_SECTORS)
		torture(disk, rounds, argc == 3);
	else
		print("torture: takes a disk of more than %u sectors\n", SLOTS * SLOT_SECTORS);
	return true;
}
