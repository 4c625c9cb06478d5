/* SPDX-License-Identifier: GPL-2.0-only */
/* The block driver and its commands. */
#include "blk.h"

#define CHUNK_SECTORS 64u
#define CHUNK_BYTES (CHUNK_SECTORS * SECTOR_SIZE)

struct device *blk_open(unsigned int index)
{
	struct device *disk = device_find(VIRTIO_ID_BLOCK, index);

	if (!disk || !disk->desc->num_vq) {
		print("blk: no disk %u\n", index);
		return NULL;
	}
	if (!disk->started)
		device_start(disk, 1u << VIRTIO_BLK_F_BARRIER | 1u << VIRTIO_BLK_F_SEG_MAX | 1u << VIRTIO_BLK_F_FLUSH |
					   1u << VIRTIO_RING_F_INDIRECT_DESC);
	return disk;
}

u64 blk_capacity(struct device *disk)
{
	u64 sectors;

	memcpy(&sectors, device_config(disk), sizeof(sectors));
	return sectors;
}

bool blk_submit(struct device *disk, struct blk_request *request, u32 type, u64 sector, const struct buffer *segments,
		unsigned int out, unsigned int in)
{
	static struct buffer chain[BLK_MAX_SEGMENTS + 2];
	unsigned int n = out + in;

	request->header = (struct virtio_blk_outhdr){ type, 0, sector };
	request->status = BLK_STATUS_UNWRITTEN;
	request->done = false;
	chain[0] = (struct buffer){ &request->header, sizeof(request->header) };
	memcpy(chain + 1, segments, n * sizeof(*segments));
	chain[n + 1] = (struct buffer){ (void *)&request->status, 1 };
	return vq_add(&disk->vqs[0], chain, 1 + out, in + 1, request);
}

unsigned int blk_reap(struct device *disk)
{
	struct blk_request *request;
	unsigned int count = 0;
	u32 length;

	while ((request = vq_get(&disk->vqs[0], &length))) {
		request->length = length;
		request->done = true;
		count++;
	}
	return count;
}

u8 blk_do(struct device *disk, u32 type, u64 sector, const struct buffer *segments, unsigned int out, unsigned int in)
{
	static struct blk_request request;

	if (!blk_submit(disk, &request, type, sector, segments, out, in)) {
		print("blk: %u segments do not fit the queue\n", out + in);
		return BLK_STATUS_UNWRITTEN;
	}
	vq_kick(&disk->vqs[0]);
	while (!request.done) {
		if (!vq_wait_answer(&disk->vqs[0], "blk", BLK_TIMEOUT_MS)) {
			disk->started = false;
			return BLK_STATUS_TIMEOUT;
		}
		blk_reap(disk);
	}
	return request.status;
}

u8 blk_read(struct device *disk, u64 sector, void *to, u32 sectors)
{
	struct buffer data = { to, sectors * SECTOR_SIZE };

	return blk_do(disk, VIRTIO_BLK_T_IN, sector, &data, 0, 1);
}

u8 blk_write(struct device *disk, u64 sector, const void *from, u32 sectors)
{
	struct buffer data = { from, sectors * SECTOR_SIZE };

	return blk_do(disk, VIRTIO_BLK_T_OUT, sector, &data, 1, 0);
}

void blk_pattern(u8 *to, u64 sector, u32 seed)
{
	u32 state = (u32)sector * 2654435761u ^ (u32)(sector >> 32) ^ seed * 40503u ^ 0x6c677565;
	u32 *words = (u32 *)to;

	for (unsigned int i = 0; i < SECTOR_SIZE / 4; i++)
		words[i] = random_next(&state);
}

static u8 chunk[CHUNK_BYTES] __attribute__((aligned(512)));
static u8 expected[SECTOR_SIZE] __attribute__((aligned(4)));

static void read_sectors(struct device *disk, u64 sector, u32 count)
{
	u32 hash = FNV1A_START;
	u8 first[16] = { 0 }, status = 0;

	for (u32 done = 0; done < count && !status; done += CHUNK_SECTORS) {
		u32 n = min(count - done, CHUNK_SECTORS);

		memset(chunk, 0xaa, sizeof(chunk));
		status = blk_read(disk, sector + done, chunk, n);
		hash = fnv1a(hash, chunk, n * SECTOR_SIZE);
		if (!done)
			memcpy(first, chunk, sizeof(first));
	}
	print("blk read %llu %u: status %u", sector, count, status);
	if (!status) {
		print(" checksum %08x first ", hash);
		for (unsigned int i = 0; i < sizeof(first); i++)
			print("%02x", first[i]);
	}
	print("\n");
}

/* seed < 0: fill with byte instead. */
static void write_sectors(struct device *disk, const char *name, u32 type, u64 sector, u32 count, const u32 *seed, u8 byte)
{
	u8 status = 0;

	for (u32 done = 0; done < count && !status; done += CHUNK_SECTORS) {
		u32 n = min(count - done, CHUNK_SECTORS);
		struct buffer data = { chunk, n * SECTOR_SIZE };

		memset(chunk, byte, sizeof(chunk));
		for (u32 i = 0; seed && i < n; i++)
			blk_pattern(chunk + i * SECTOR_SIZE, sector + done + i, *seed);
		status = blk_do(disk, type, sector + done, &data, 1, 0);
	}
	print("blk %s %llu %u: status %u\n", name, sector, count, status);
}

static void verify_sectors(struct device *disk, u64 sector, u32 count, u32 seed)
{
	u8 status = 0;
	u32 wrong = 0;
	u64 first_wrong = 0;

	for (u32 done = 0; done < count && !status; done += CHUNK_SECTORS) {
		u32 n = min(count - done, CHUNK_SECTORS);

		status = blk_read(disk, sector + done, chunk, n);
		for (u32 i = 0; !status && i < n; i++) {
			blk_pattern(expected, sector + done + i, seed);
			if (memcmp(expected, chunk + i * SECTOR_SIZE, SECTOR_SIZE) && !wrong++)
				first_wrong = sector + done + i;
		}
	}
	print("blk verify %llu %u: status %u", sector, count, status);
	if (wrong)
		print(" MISMATCH in %u sectors, the first is %llu\n", wrong, first_wrong);
	else
		print(status ? "\n" : " all equal\n");
}

static void flush(struct device *disk)
{
	print("blk flush: status %u\n", blk_do(disk, VIRTIO_BLK_T_FLUSH, 0, NULL, 0, 0));
}

static void get_id(struct device *disk)
{
	char id[BLK_ID_BYTES + 1] = { 0 };
	struct buffer data = { id, BLK_ID_BYTES };
	u8 status = blk_do(disk, VIRTIO_BLK_T_GET_ID, 0, &data, 0, 1);

	print("blk id: status %u", status);
	if (!status)
		print(" id '%s'", id);
	print("\n");
}

/* A TEST UNIT READY in virtio_blk's old way: the command is written, sense data and a trailer are read. */
static void scsi(struct device *disk)
{
	static u8 command[6], sense[96], trailer[16];
	struct buffer data[] = { { command, sizeof(command) }, { sense, sizeof(sense) }, { trailer, sizeof(trailer) } };

	print("blk scsi: status %u\n", blk_do(disk, VIRTIO_BLK_T_SCSI_CMD, 0, data, 1, 2));
}

static u8 segmented(struct device *disk, u32 type, u64 sector, u8 *data, u32 segments, u32 bytes)
{
	static struct buffer pieces[BLK_MAX_SEGMENTS];

	for (u32 i = 0; i < segments; i++)
		pieces[i] = (struct buffer){ data + i * bytes, bytes };
	return blk_do(disk, type, sector, pieces, type & VIRTIO_BLK_T_OUT ? segments : 0,
		      type & VIRTIO_BLK_T_OUT ? 0 : segments);
}

static void segments_command(struct device *disk, u64 sector, u32 count)
{
	u32 mark = alloc_mark();
	u8 *many, *one, status, single;

	if (!count || count > BLK_MAX_SEGMENTS) {
		print("blk segs: 1 to %u segments\n", BLK_MAX_SEGMENTS);
		return;
	}
	many = alloc_pages((count * SECTOR_SIZE + PAGE_SIZE - 1) / PAGE_SIZE);
	one = alloc_pages((count * SECTOR_SIZE + PAGE_SIZE - 1) / PAGE_SIZE);
	status = segmented(disk, VIRTIO_BLK_T_IN, sector, many, count, SECTOR_SIZE);
	single = blk_read(disk, sector, one, count);
	print("blk segs %llu %u: status %u single status %u %s\n", sector, count, status, single,
	      memcmp(many, one, count * SECTOR_SIZE) ? "MISMATCH" : "all equal");
	alloc_release(mark);
}

static void checksum(struct device *disk)
{
	u64 capacity = blk_capacity(disk);
	u32 hash = FNV1A_START;
	u8 status = 0;

	for (u64 sector = 0; sector < capacity && !status; sector += CHUNK_SECTORS) {
		u32 n = min(capacity - sector, (u64)CHUNK_SECTORS);

		status = blk_read(disk, sector, chunk, n);
		hash = fnv1a(hash, chunk, n * SECTOR_SIZE);
	}
	print("blk crc: status %u sectors %llu checksum %08x\n", status, capacity, hash);
}

/*
 * Random requests in flight together. The model region, the disk's first sectors, has a copy in RAM that every read is
 * compared with; outside it, reads and writes go wherever chance says. Requests in flight never overlap, for a disk may
 * do them in any order.
 */
#define STRESS_MODEL 256u
#define STRESS_SECTORS 8u
#define STRESS_MAX 64u

struct stress_slot {
	struct blk_request request;
	u64 sector;
	u32 sectors;
	bool busy, write;
	u8 *data;
};

static bool stress_overlaps(struct stress_slot *slots, u64 sector, u32 sectors)
{
	for (unsigned int i = 0; i < STRESS_MAX; i++)
		if (slots[i].busy && sector < slots[i].sector + slots[i].sectors && slots[i].sector < sector + sectors)
			return true;
	return false;
}

static void stress(struct device *disk, u32 count, u32 seed)
{
	u32 mark = alloc_mark();
	u64 capacity = blk_capacity(disk);
	u32 model_sectors = min(capacity, (u64)STRESS_MODEL), state = seed + 1;
	u8 *model = alloc_pages(STRESS_MODEL * SECTOR_SIZE / PAGE_SIZE);
	struct stress_slot *slots = alloc_pages((STRESS_MAX * sizeof(*slots) + PAGE_SIZE - 1) / PAGE_SIZE);
	u32 started_count = 0, finished = 0, wrong = 0, failed = 0, in_flight = 0, most = 0;

	if (capacity < STRESS_SECTORS) {
		print("blk stress: disk too small\n");
		return;
	}
	for (unsigned int i = 0; i < STRESS_MAX; i++)
		slots[i].data = alloc_pages(STRESS_SECTORS * SECTOR_SIZE / PAGE_SIZE);
	for (u32 i = 0; i < model_sectors; i += CHUNK_SECTORS)
		if (blk_read(disk, i, model + i * SECTOR_SIZE, min(model_sectors - i, CHUNK_SECTORS)))
			failed++;
	while (finished < count) {
		bool full = false;

		for (unsigned int i = 0; i < STRESS_MAX && started_count < count && !full; i++) {
			struct stress_slot *slot = &slots[i];
			u32 choice = random_next(&state), limit;
			struct buffer data;
			u32 sectors = 1 + (choice >> 8) % STRESS_SECTORS, sector;

			if (slot->busy)
				continue;
			limit = choice % 4 ? model_sectors : (u32)min(capacity, (u64)0xffffffff);
			if (limit < sectors)
				continue;
			sector = random_next(&state) % (limit - sectors + 1);
			if (stress_overlaps(slots, sector, sectors))
				continue;
			slot->sector = sector;
			slot->sectors = sectors;
			slot->write = choice & 0x80;
			data = (struct buffer){ slot->data, sectors * SECTOR_SIZE };
			if (slot->write)
				for (u32 s = 0; s < sectors; s++)
					blk_pattern(slot->data + s * SECTOR_SIZE, sector + s, state);
			else
				memset(slot->data, 0xaa, sectors * SECTOR_SIZE);
			if (!blk_submit(disk, &slot->request, slot->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, sector, &data,
					slot->write, !slot->write)) {
				full = true; /* the queue; the next round tries again */
				continue;
			}
			slot->busy = true;
			started_count++;
			in_flight++;
		}
		most = max(most, in_flight);
		vq_kick(&disk->vqs[0]);
		if (!vq_wait_answer(&disk->vqs[0], "blk stress", BLK_TIMEOUT_MS)) {
			print("blk stress: %u in flight\n", in_flight);
			disk->started = false;
			alloc_release(mark);
			return;
		}
		blk_reap(disk);
		for (unsigned int i = 0; i < STRESS_MAX; i++) {
			struct stress_slot *slot = &slots[i];

			if (!slot->busy || !slot->request.done)
				continue;
			slot->busy = false;
			in_flight--;
			finished++;
			if (slot->request.status) {
				failed++;
				continue;
			}
			for (u32 s = 0; s < slot->sectors && slot->sector + s < model_sectors; s++) {
				u8 *known = model + (u32)(slot->sector + s) * SECTOR_SIZE;

				if (slot->write)
					memcpy(known, slot->data + s * SECTOR_SIZE, SECTOR_SIZE);
				else if (memcmp(known, slot->data + s * SECTOR_SIZE, SECTOR_SIZE))
					wrong++;
			}
		}
	}
	print("blk stress %u %u: status %u, %u requests, at most %u in flight, %u failed, %u sectors wrong\n", count, seed,
	      failed || wrong ? 1 : 0, finished, most, failed, wrong);
	alloc_release(mark);
}

/*
 * Resets the disk while requests are in flight. Of the writes, each sector must be wholly old or wholly new afterwards;
 * of the reads, nothing may arrive in memory once the reset is done; and the disk must work again.
 */
static void reset_under_load(struct device *disk, u32 count)
{
	u32 mark = alloc_mark();
	struct blk_request *requests;
	u32 n = min(count, STRESS_MAX), submitted = 0, torn = 0, late = 0, failed = 0;
	u8 *data, *again;

	if (blk_capacity(disk) < n || !n) {
		print("blk reset-under-load: 1 to %u requests, and a disk of as many sectors\n", STRESS_MAX);
		return;
	}
	requests = alloc_pages((n * sizeof(*requests) + PAGE_SIZE - 1) / PAGE_SIZE);
	data = alloc_pages(n * SECTOR_SIZE / PAGE_SIZE + 1);
	again = alloc_pages(n * SECTOR_SIZE / PAGE_SIZE + 1);
	for (u32 i = 0; i < n; i++)
		blk_pattern(data + i * SECTOR_SIZE, i, 1);
	failed += blk_write(disk, 0, data, n) != 0;
	for (u32 i = 0; i < n; i++) {
		bool write = i % 2;
		struct buffer piece = { data + i * SECTOR_SIZE, SECTOR_SIZE };

		blk_pattern(data + i * SECTOR_SIZE, i, 2);
		submitted += blk_submit(disk, &requests[i], write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, i, &piece, write, !write);
	}
	vq_kick(&disk->vqs[0]);
	device_reset(disk);
	/* Done with: from here on these pages are ours. */
	for (u32 i = 0; i < n; i += 2)
		memset(data + i * SECTOR_SIZE, 0xcc, SECTOR_SIZE);
	delay_ns(20 * NSEC_PER_MSEC);
	blk_open(disk->index);
	failed += blk_read(disk, 0, again, n) != 0;
	for (u32 i = 0; i < n; i++) {
		u8 *sector = again + i * SECTOR_SIZE;
		bool old, new;

		blk_pattern(expected, i, 1);
		old = !memcmp(sector, expected, SECTOR_SIZE);
		blk_pattern(expected, i, 2);
		new = i % 2 && !memcmp(sector, expected, SECTOR_SIZE);
		torn += !old && !new;
		for (u32 b = 0; i % 2 == 0 && b < SECTOR_SIZE; b++)
			if (data[i * SECTOR_SIZE + b] != 0xcc) {
				late++;
				break;
			}
	}
	for (u32 i = 0; i < n; i++)
		blk_pattern(data + i * SECTOR_SIZE, i, 3);
	failed += blk_write(disk, 0, data, n) != 0;
	failed += blk_read(disk, 0, again, n) != 0;
	failed += memcmp(data, again, n * SECTOR_SIZE) != 0;
	print("blk reset-under-load %u: status %u, %u submitted, %u torn, %u late, %u failed\n", n,
	      torn || late || failed ? 1 : 0, submitted, torn, late, failed);
	alloc_release(mark);
}

bool blk_check_rw(struct device *disk)
{
	static const u32 sizes[] = { 1, 2, 3, 7, 8, 15, 64, 127 };
	u32 mark = alloc_mark();
	u8 *out = alloc_pages(16), *in = alloc_pages(16);
	u64 capacity = blk_capacity(disk);
	bool good = capacity >= 128;

	for (unsigned int i = 0; good && i < ARRAY_SIZE(sizes); i++) {
		u64 sector = i % 2 ? 0 : capacity - sizes[i];

		for (u32 s = 0; s < sizes[i]; s++)
			blk_pattern(out + s * SECTOR_SIZE, sector + s, 77 + i);
		memset(in, 0, 16 * PAGE_SIZE);
		good = !blk_write(disk, sector, out, sizes[i]) && !blk_read(disk, sector, in, sizes[i]) &&
		       !memcmp(in, out, sizes[i] * SECTOR_SIZE);
	}
	for (u32 segments = 1; good && segments <= 64; segments *= 4) {
		for (u32 s = 0; s < segments; s++)
			blk_pattern(out + s * SECTOR_SIZE, s, segments);
		memset(in, 0, 16 * PAGE_SIZE);
		good = !segmented(disk, VIRTIO_BLK_T_OUT, 0, out, segments, SECTOR_SIZE) &&
		       !segmented(disk, VIRTIO_BLK_T_IN, 0, in, segments, SECTOR_SIZE) &&
		       !memcmp(in, out, segments * SECTOR_SIZE);
	}
	alloc_release(mark);
	return good;
}

bool cmd_blk(int argc, char **argv)
{
	struct device *disk;
	u32 index = 0, count = 0, seed = 0;
	u64 sector = 0;
	bool has_sector, has_count, has_seed;
	const char *what;

	if (argc > 2 && !strcmp(argv[1], "-d")) {
		if (!word_number(argc, argv, 2, &index))
			return false;
		argc -= 2;
		argv += 2;
	}
	if (argc < 2)
		return false;
	what = argv[1];
	has_sector = word_number64(argc, argv, 2, &sector);
	has_count = word_number(argc, argv, 3, &count);
	has_seed = word_number(argc, argv, 4, &seed);
	disk = blk_open(index);
	if (!disk)
		return true;
	if (!strcmp(what, "read") && has_count)
		read_sectors(disk, sector, count);
	else if (!strcmp(what, "write") && has_seed)
		write_sectors(disk, what, VIRTIO_BLK_T_OUT, sector, count, &seed, 0);
	else if (!strcmp(what, "barrier") && has_seed)
		write_sectors(disk, what, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_BARRIER, sector, count, &seed, 0);
	else if (!strcmp(what, "fill") && has_seed)
		write_sectors(disk, what, VIRTIO_BLK_T_OUT, sector, count, NULL, seed);
	else if (!strcmp(what, "verify") && has_seed)
		verify_sectors(disk, sector, count, seed);
	else if (!strcmp(what, "segs") && has_count)
		segments_command(disk, sector, count);
	else if (!strcmp(what, "stress") && has_count)
		stress(disk, (u32)sector, count);
	else if (!strcmp(what, "reset-under-load") && has_sector)
		reset_under_load(disk, (u32)sector);
	else if (!strcmp(what, "flush"))
		flush(disk);
	else if (!strcmp(what, "id"))
		get_id(disk);
	else if (!strcmp(what, "scsi"))
		scsi(disk);
	else if (!strcmp(what, "crc"))
		checksum(disk);
	else
		return false;
	return true;
}
