/* SPDX-License-Identifier: GPL-2.0-only */
/* A driver for whatever answers text with text: one request is a readable and a writable buffer. */
#include "virtio.h"

#define ANSWER_BYTES 1024u
#define TIMEOUT_MS 60000

static void ask(struct device *device, u8 type, const char *text)
{
	static char answer[ANSWER_BYTES + 1];
	struct buffer pieces[] = { { text, strlen(text) }, { answer, ANSWER_BYTES } };
	struct virtqueue *vq = &device->vqs[0];
	u32 length;

	if (!device->started)
		device_start(device, 1u << VIRTIO_RING_F_INDIRECT_DESC);
	memset(answer, 0, sizeof(answer));
	if (!vq_add(vq, pieces, 1, 1, answer)) {
		print("ask: no room in a queue of %u\n", vq->num);
		return;
	}
	vq_kick(vq);
	if (!vq_wait_answer(vq, "ask", TIMEOUT_MS)) {
		device->started = false;
		return;
	}
	vq_get(vq, &length);
	if (length > ANSWER_BYTES)
		print("ask: %u bytes in a buffer of %u\n", length, ANSWER_BYTES);
	else
		print("ask %u: %u bytes '%s'\n", type, length, answer);
}

bool cmd_ask(int argc, char **argv)
{
	static char text[ANSWER_BYTES];
	struct device *device;
	u32 index = 0, type;

	if (argc > 2 && !strcmp(argv[1], "-d")) {
		if (!word_number(argc, argv, 2, &index))
			return false;
		argc -= 2;
		argv += 2;
	}
	if (argc < 3 || !word_number(argc, argv, 1, &type) || type > 255)
		return false;
	device = device_find(type, index);
	join_words(text, sizeof(text), 2, argc, argv);
	if (device && device->desc->num_vq)
		ask(device, type, text);
	else
		print("ask: no device %u of type %u\n", index, type);
	return true;
}
