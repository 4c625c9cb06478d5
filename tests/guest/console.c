/* SPDX-License-Identifier: GPL-2.0-only */
/* The console: the early one until the virtio console is up, then its queues (0 is input, 1 is output). */
#include "abi.h"
#include "virtio.h"

#define OUT_SLOTS 64
#define OUT_SIZE 256
#define IN_SLOTS 4
#define IN_SIZE 512
#define STUCK_MS 60000
#define CTRL_C 3
#define CTRL_D 4

bool console_up, console_cancelled;

static struct device *console;
static struct virtqueue *input, *output;
static u8 out_data[OUT_SLOTS][OUT_SIZE], in_data[IN_SLOTS][IN_SIZE];
static bool out_busy[OUT_SLOTS];
static unsigned int out_slot;
static size_t out_length;

/* What of the input buffer at hand is still to be read. */
static u8 *in_next;
static u32 in_left;
static unsigned int in_slot;

static void add_input_buffer(unsigned int slot)
{
	struct buffer buffer = { in_data[slot], IN_SIZE };

	vq_add(input, &buffer, 0, 1, in_data[slot]);
}

void console_init(void)
{
	console = device_find(VIRTIO_ID_CONSOLE, 0);
	if (!console || console->desc->num_vq < 2)
		return;
	input = &console->vqs[0];
	output = &console->vqs[1];
	memset(out_busy, 0, sizeof(out_busy));
	out_length = 0;
	in_left = 0;
	device_start(console, 1u << VIRTIO_RING_F_INDIRECT_DESC);
	for (unsigned int slot = 0; slot < IN_SLOTS; slot++)
		add_input_buffer(slot);
	vq_kick(input);
	console_up = true;
}

void console_restart(void)
{
	/* Nothing comes out any more of one that needs a reset. */
	if (console_up && !device_needs_reset(console))
		console_drain();
	console_init();
}

void console_down(void)
{
	console_drain();
	console_up = false;
}

static void reap_output(void)
{
	u8 *slot;

	while ((slot = vq_get(output, NULL)))
		out_busy[(slot - out_data[0]) / OUT_SIZE] = false;
}

void console_flush(void)
{
	struct buffer buffer = { out_data[out_slot], out_length };

	if (!console_up || !out_length)
		return;
	while (!vq_add(output, &buffer, 1, 0, out_data[out_slot])) {
		if (!vq_wait(output, STUCK_MS))
			panic("console output is stuck");
		reap_output();
	}
	vq_kick(output);
	out_busy[out_slot] = true;
	out_length = 0;
	out_slot = (out_slot + 1) % OUT_SLOTS;
	reap_output();
	while (out_busy[out_slot]) {
		if (!vq_wait(output, STUCK_MS))
			panic("console output is stuck");
		reap_output();
	}
}

void console_drain(void)
{
	if (!console_up)
		return;
	console_flush();
	while (!vq_idle(output)) {
		if (!vq_wait(output, STUCK_MS))
			panic("console output is stuck");
		reap_output();
	}
}

/* A line a request, or more requests when the line is long; what has no newline yet waits. */
void console_write(const char *text, size_t length)
{
	if (!console_up) {
		early_print(text, length);
		return;
	}
	for (; length; length--, text++) {
		out_data[out_slot][out_length++] = *text;
		if (out_length == OUT_SIZE || *text == '\n')
			console_flush();
	}
}

/* True if a byte can be had without waiting. */
bool console_input_ready(void)
{
	while (console_up && !in_left) {
		u8 *buffer = vq_get(input, &in_left);

		if (!buffer)
			return false;
		in_slot = (buffer - in_data[0]) / IN_SIZE;
		in_next = buffer;
		if (in_left > IN_SIZE)
			panic("console input of %u bytes in a buffer of %u", in_left, IN_SIZE);
		if (!in_left) {
			add_input_buffer(in_slot);
			vq_kick(input);
		}
	}
	return console_up;
}

int console_getc(void)
{
	int c;

	console_flush();
	while (!console_input_ready()) {
		if (!console_up)
			return -1;
		vq_wait(input, 0);
	}
	c = *in_next++;
	if (!--in_left) {
		add_input_buffer(in_slot);
		vq_kick(input);
	}
	return c;
}

bool console_poll_cancel(void)
{
	console_cancelled = false;
	while (console_input_ready() && !console_cancelled)
		console_cancelled = console_getc() == CTRL_C;
	return console_cancelled;
}

static void lines(u32 count, u32 length)
{
	static char line[OUT_SIZE];

	for (u32 i = 0; i < count; i++) {
		size_t n = format(line, sizeof(line), "line %08u ", i);
		size_t total = min(max(length, n), sizeof(line) - 1);

		for (; n < total; n++)
			line[n] = 'a' + (i + n) % 26;
		line[n++] = '\n';
		console_write(line, n);
	}
	print("console lines: %u done\n", count);
}

static bool read_input(u32 count)
{
	u32 hash = FNV1A_START;

	print("console read: waiting for %u bytes\n", count);
	for (u32 i = 0; i < count; i++) {
		int c = console_getc();
		u8 byte = c;

		if (c < 0) {
			print("console read: no console\n");
			return true;
		}
		hash = fnv1a(hash, &byte, 1);
	}
	print("console read: %u bytes, checksum %08x\n", count, hash);
	return true;
}

static void cat(void)
{
	u32 count = 0;

	for (;;) {
		int c = console_getc();
		char byte = c;

		if (c < 0 || c == CTRL_D)
			break;
		count++;
		console_write(&byte, 1);
	}
	print("\nconsole cat: %u bytes\n", count);
}

bool cmd_console(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	u32 count, length;

	if (!strcmp(what, "lines") && word_number(argc, argv, 2, &count) && word_number(argc, argv, 3, &length))
		lines(count, length);
	else if (!strcmp(what, "read") && word_number(argc, argv, 2, &count))
		return read_input(count);
	else if (!strcmp(what, "cat"))
		cat();
	else if (!strcmp(what, "reset")) {
		console_restart();
		print("console reset: %s\n", console_up ? "up again" : "no console");
	} else
		return false;
	return true;
}
