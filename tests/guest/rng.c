/* SPDX-License-Identifier: GPL-2.0-only */
/* The entropy driver: one queue of buffers for the launcher to fill. */
#include "virtio.h"

#define TIMEOUT_MS 30000

u32 rng_read(void *to, u32 count)
{
	struct device *rng = device_find(VIRTIO_ID_RNG, 0);
	struct buffer buffer = { to, count };
	u32 length = 0;

	if (!rng || !rng->desc->num_vq) {
		print("rng: no such device\n");
		return 0;
	}
	if (!rng->started)
		device_start(rng, 0);
	vq_add(&rng->vqs[0], &buffer, 0, 1, to);
	vq_kick(&rng->vqs[0]);
	if (!vq_wait_answer(&rng->vqs[0], "rng read", TIMEOUT_MS)) {
		rng->started = false;
		return 0;
	}
	vq_get(&rng->vqs[0], &length);
	if (length && length <= count)
		return length;
	print("rng read: %u bytes in a buffer of %u\n", length, count);
	return 0;
}

bool cmd_rng(int argc, char **argv)
{
	static u8 data[PAGE_SIZE];
	u32 count, done = 0, buffers = 0, hash = FNV1A_START, ones = 0;

	if (argc != 3 || strcmp(argv[1], "read") || !word_number(argc, argv, 2, &count))
		return false;
	while (done < count) {
		u32 length = rng_read(data, min(count - done, (u32)sizeof(data)));

		if (!length)
			return true;
		hash = fnv1a(hash, data, length);
		for (u32 i = 0; i < length; i++)
			for (u8 byte = data[i]; byte; byte &= byte - 1)
				ones++;
		done += length;
		buffers++;
	}
	print("rng read: %u bytes in %u buffers, checksum %08x, %u of %u bits set\n", done, buffers, hash, ones, 8 * done);
	return true;
}
