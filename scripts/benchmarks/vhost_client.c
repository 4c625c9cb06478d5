/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A vhost-user front end and a virtio-blk driver in one, to measure back ends with: vhost_user.py builds and runs it.
 *
 * It connects to a back end's socket, sets up one ring in a memfd of its own, keeps `depth` requests of one kind in
 * flight for a while, and prints how many were answered and how long each took, as one line of JSON.
 *
 * It drives the ring as Linux does: requests are published one by one and kicked once a batch, after a full fence, if
 * the back end wants a kick; an interrupt (the call eventfd) begins a loop that takes all answers with interrupts off,
 * allows them again, and looks once more. It never spins: with nothing to take it sleeps until it is called.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* The vhost-user specification's names (QEMU's docs/interop/vhost-user.rst). */
enum {
	VHOST_USER_GET_FEATURES = 1,
	VHOST_USER_SET_FEATURES = 2,
	VHOST_USER_SET_OWNER = 3,
	VHOST_USER_SET_MEM_TABLE = 5,
	VHOST_USER_SET_VRING_NUM = 8,
	VHOST_USER_SET_VRING_ADDR = 9,
	VHOST_USER_SET_VRING_BASE = 10,
	VHOST_USER_GET_VRING_BASE = 11,
	VHOST_USER_SET_VRING_KICK = 12,
	VHOST_USER_SET_VRING_CALL = 13,
	VHOST_USER_GET_PROTOCOL_FEATURES = 15,
	VHOST_USER_SET_PROTOCOL_FEATURES = 16,
	VHOST_USER_GET_QUEUE_NUM = 17,
	VHOST_USER_SET_VRING_ENABLE = 18,
	VHOST_USER_GET_CONFIG = 24,
};

#define VHOST_USER_F_PROTOCOL_FEATURES 30
#define VHOST_USER_PROTOCOL_F_MQ 0
#define VHOST_USER_PROTOCOL_F_REPLY_ACK 3
#define VHOST_USER_PROTOCOL_F_CONFIG 9

#define VHOST_USER_VERSION 1u
#define VHOST_USER_VERSION_MASK 3u
#define VHOST_USER_REPLY_MASK (1u << 2)
#define VHOST_USER_NEED_REPLY_MASK (1u << 3)

#define BIT(number) (1ull << (number))

/* Of the config space, what every back end has: to blk_size. Those that are asked for more than they have refuse. */
#define CONFIG_BYTES offsetof(struct virtio_blk_config, physical_block_exp)

struct message {
	uint32_t request, flags, size;
	union {
		uint64_t u64;
		struct vring_state {
			uint32_t index, num;
		} state;
		struct {
			uint32_t index, flags;
			uint64_t desc, used, avail, log;
		} addr;
		struct {
			uint32_t regions, padding;
			uint64_t guest_phys_addr, memory_size, userspace_addr, mmap_offset;
		} memory;
		struct {
			uint32_t offset, size, flags;
			uint8_t region[CONFIG_BYTES];
		} config;
	} payload;
} __attribute__((packed));

#define MESSAGE_HEADER_BYTES offsetof(struct message, payload)

#define PAGE_BYTES 4096u
#define SECTOR_BYTES 512u
#define MAX_RING 1024u
/* Whole tables and rings, one after the other at the start of memory; then what belongs to each slot. */
#define RING_ALIGN 4096u

/* Of each slot, beside its data: the header and the status of its request, on a cache line of their own. */
struct request {
	struct virtio_blk_outhdr header;
	uint8_t status;
} __attribute__((aligned(64)));

/* Latencies in ns: 64 steps for each power of two, so a percentile is right to 1.6 %. */
#define STEP_BITS 6
#define STEPS (1u << STEP_BITS)
#define BUCKETS ((64 - STEP_BITS) * STEPS)

static struct {
	bool write, indirect, event_idx, verify;
	uint32_t block, depth, ring, segment;
	uint64_t span, seed;
	double seconds, warm_up;
} job = {
	.event_idx = true, .verify = true, .block = 4096, .depth = 1, .ring = 128, .seed = 1, .seconds = 1, .warm_up = 0.2,
};

static const char *path;
static int sock = -1, kick_fd = -1, call_fd = -1;
static bool reply_ack, protocol;

/* Guest memory, from guest-physical address 0 on. */
static uint8_t *memory;
static size_t memory_bytes;
static struct vring vring;
static struct request *requests;
static struct vring_desc *tables;
static uint8_t *data;

static struct slot {
	uint64_t offset, since;
	bool in_flight, checked;
} slots[MAX_RING];

static uint32_t descriptors; /* of each request: header, data, status */
static uint16_t avail_idx, kicked_idx, last_used;
static bool no_interrupt;
static unsigned int in_flight;

static struct {
	uint64_t requests, errors, mismatches, kicks, calls, sum;
	uint64_t histogram[BUCKETS];
} result;

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...)
{
	va_list arguments;

	fprintf(stderr, "vhost_client: %s: ", path ? path : "?");
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* ---- vhost-user ---- */

static void receive(void *into, size_t size)
{
	ssize_t got = recv(sock, into, size, MSG_WAITALL);

	if (got < 0)
		die("receive: %s", strerror(errno));
	if ((size_t)got != size)
		die("the back end closed the connection");
}

static void send_message(struct message *message, int fd)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {};
	struct iovec iov = { message, MESSAGE_HEADER_BYTES + message->size };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		header.msg_control = &control;
		header.msg_controllen = sizeof(control);
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &fd, sizeof(int));
	}
	if (sendmsg(sock, &header, MSG_NOSIGNAL) != (ssize_t)iov.iov_len)
		die("message %u: the back end closed the connection (%s)", message->request, strerror(errno));
}

/* Sends a message and receives its answer, of `size` bytes, into the same place. */
static void ask(struct message *message, size_t size)
{
	uint32_t request = message->request;

	send_message(message, -1);
	receive(message, MESSAGE_HEADER_BYTES);
	if (message->request != request || message->size != size ||
	    message->flags != (VHOST_USER_VERSION | VHOST_USER_REPLY_MASK))
		die("message %u is answered with message %u, flags %#x, %u bytes", request, message->request,
		    message->flags, message->size);
	receive(&message->payload, size);
}

/* Sends a message that has no answer of its own; where the back end can, it says that it has done it. */
static void tell(struct message *message, int fd)
{
	uint32_t request = message->request;

	if (!reply_ack) {
		send_message(message, fd);
		return;
	}
	message->flags |= VHOST_USER_NEED_REPLY_MASK;
	send_message(message, fd);
	receive(message, MESSAGE_HEADER_BYTES);
	if (message->request != request || message->size != sizeof(uint64_t))
		die("message %u is acknowledged with message %u of %u bytes", request, message->request, message->size);
	receive(&message->payload, message->size);
	if (message->payload.u64)
		die("message %u is refused with %" PRIu64, request, message->payload.u64);
}

static uint64_t get(uint32_t request)
{
	struct message message = { .request = request, .flags = VHOST_USER_VERSION };

	ask(&message, sizeof(uint64_t));
	return message.payload.u64;
}

static void set(uint32_t request, uint64_t value, int fd)
{
	struct message message = { .request = request, .flags = VHOST_USER_VERSION, .size = sizeof(uint64_t) };

	message.payload.u64 = value;
	tell(&message, fd);
}

static void set_vring(uint32_t request, uint32_t num)
{
	struct message message = { .request = request, .flags = VHOST_USER_VERSION, .size = sizeof(struct vring_state) };

	message.payload.state.num = num;
	tell(&message, -1);
}

static void connect_to_back_end(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(path) >= sizeof(address.sun_path))
		die("the path is too long for a socket");
	strcpy(address.sun_path, path);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof(address)))
		die("%s", strerror(errno));
}

static void negotiate(void)
{
	/* What Linux's virtio_blk takes, but for what asks for more of the driver than this one does. */
	uint64_t wanted = BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_BLK_F_SIZE_MAX) | BIT(VIRTIO_BLK_F_SEG_MAX) |
			  BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_FLUSH) | BIT(VHOST_USER_F_PROTOCOL_FEATURES);
	uint64_t offered = get(VHOST_USER_GET_FEATURES);

	if (!(offered & BIT(VIRTIO_F_VERSION_1)))
		die("the back end does not offer VIRTIO_F_VERSION_1");
	if (job.indirect && !(offered & BIT(VIRTIO_RING_F_INDIRECT_DESC)))
		die("the back end does not offer VIRTIO_RING_F_INDIRECT_DESC");
	if (job.indirect)
		wanted |= BIT(VIRTIO_RING_F_INDIRECT_DESC);
	if (job.event_idx)
		wanted |= BIT(VIRTIO_RING_F_EVENT_IDX);
	wanted &= offered;
	job.event_idx = wanted & BIT(VIRTIO_RING_F_EVENT_IDX);
	protocol = wanted & BIT(VHOST_USER_F_PROTOCOL_FEATURES);
	send_message(&(struct message){ .request = VHOST_USER_SET_OWNER, .flags = VHOST_USER_VERSION }, -1);
	if (protocol) {
		uint64_t features = get(VHOST_USER_GET_PROTOCOL_FEATURES);

		features &= BIT(VHOST_USER_PROTOCOL_F_MQ) | BIT(VHOST_USER_PROTOCOL_F_REPLY_ACK) |
			    BIT(VHOST_USER_PROTOCOL_F_CONFIG);
		set(VHOST_USER_SET_PROTOCOL_FEATURES, features, -1);
		reply_ack = features & BIT(VHOST_USER_PROTOCOL_F_REPLY_ACK);
		if (features & BIT(VHOST_USER_PROTOCOL_F_MQ) && !get(VHOST_USER_GET_QUEUE_NUM))
			die("the back end has no queue");
		if (features & BIT(VHOST_USER_PROTOCOL_F_CONFIG)) {
			struct message message = { .request = VHOST_USER_GET_CONFIG, .flags = VHOST_USER_VERSION };
			struct virtio_blk_config config;

			message.payload.config.size = CONFIG_BYTES;
			message.size = sizeof(message.payload.config);
			ask(&message, message.size);
			memcpy(&config, message.payload.config.region, CONFIG_BYTES);
			if (job.span > config.capacity * SECTOR_BYTES)
				die("the disk has %" PRIu64 " sectors, --span is more", (uint64_t)config.capacity);
			if (wanted & BIT(VIRTIO_BLK_F_SEG_MAX) && descriptors - 2 > config.seg_max)
				die("requests of %u segments, the back end takes %u", descriptors - 2, config.seg_max);
			/* qemu-storage-daemon offers SIZE_MAX and says 0. */
			if (wanted & BIT(VIRTIO_BLK_F_SIZE_MAX) && config.size_max && job.segment > config.size_max)
				die("segments of %u bytes, the back end takes %u", job.segment, config.size_max);
		}
	}
	set(VHOST_USER_SET_FEATURES, wanted, -1);
}

static void make_memory(void)
{
	size_t requests_at = (vring_size(job.ring, RING_ALIGN) + PAGE_BYTES - 1) & -PAGE_BYTES;
	size_t tables_at = requests_at + job.depth * sizeof(struct request);
	size_t data_at = (tables_at + job.depth * descriptors * sizeof(struct vring_desc) + PAGE_BYTES - 1) & -PAGE_BYTES;
	int fd = memfd_create("vhost_client", MFD_CLOEXEC);
	struct message message = { .request = VHOST_USER_SET_MEM_TABLE, .flags = VHOST_USER_VERSION };

	memory_bytes = data_at + (size_t)job.depth * ((job.block + PAGE_BYTES - 1) & -PAGE_BYTES);
	if (fd < 0 || ftruncate(fd, memory_bytes))
		die("memfd: %s", strerror(errno));
	memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (memory == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	vring_init(&vring, job.ring, memory, RING_ALIGN);
	requests = (struct request *)(memory + requests_at);
	tables = (struct vring_desc *)(memory + tables_at);
	data = memory + data_at;

	message.size = sizeof(message.payload.memory);
	message.payload.memory.regions = 1;
	message.payload.memory.memory_size = memory_bytes;
	message.payload.memory.userspace_addr = (uintptr_t)memory;
	tell(&message, fd);
	close(fd);
}

static void start_ring(void)
{
	struct message message = { .request = VHOST_USER_SET_VRING_ADDR, .flags = VHOST_USER_VERSION };

	kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (kick_fd < 0 || call_fd < 0)
		die("eventfd: %s", strerror(errno));
	set_vring(VHOST_USER_SET_VRING_NUM, job.ring);
	set_vring(VHOST_USER_SET_VRING_BASE, 0);
	message.size = sizeof(message.payload.addr);
	message.payload.addr.desc = (uintptr_t)vring.desc;
	message.payload.addr.used = (uintptr_t)vring.used;
	message.payload.addr.avail = (uintptr_t)vring.avail;
	tell(&message, -1);
	set(VHOST_USER_SET_VRING_CALL, 0, call_fd);
	set(VHOST_USER_SET_VRING_KICK, 0, kick_fd);
	if (protocol)
		set_vring(VHOST_USER_SET_VRING_ENABLE, 1);
}

static void stop_ring(void)
{
	struct message message = { .request = VHOST_USER_GET_VRING_BASE, .flags = VHOST_USER_VERSION };

	message.size = sizeof(message.payload.state);
	ask(&message, message.size);
	if ((uint16_t)message.payload.state.num != avail_idx)
		die("the ring stopped at %u, and had %u requests", message.payload.state.num, avail_idx);
}

/* ---- the driver ---- */

static uint64_t random_offset(void)
{
	/* xorshift64*, whose upper bits are its good ones: scaled to the number of blocks by a multiplication. */
	static uint64_t state;

	if (!state)
		state = job.seed * 0x9E3779B97F4A7C15ull | 1;
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint64_t)((unsigned __int128)(state * 0x2545F4914F6CDD1Dull) * (job.span / job.block) >> 64) * job.block;
}

static uint8_t *data_of(unsigned int slot)
{
	return data + (size_t)slot * ((job.block + PAGE_BYTES - 1) & -PAGE_BYTES);
}

/* What is written: in every 8 bytes, the number of the 4 KiB block that they are of. Reads expect the same. */
static void fill(unsigned int slot)
{
	uint64_t *words = (uint64_t *)data_of(slot);

	for (uint32_t done = 0; done < job.block; done += PAGE_BYTES) {
		uint64_t number = (slots[slot].offset + done) / PAGE_BYTES;

		for (unsigned int i = 0; i < PAGE_BYTES / 8; i++)
			*words++ = number;
	}
}

static bool is_right(unsigned int slot)
{
	const uint64_t *words = (const uint64_t *)data_of(slot);

	for (uint32_t done = 0; done < job.block; done += PAGE_BYTES) {
		uint64_t number = (slots[slot].offset + done) / PAGE_BYTES, difference = 0;

		for (unsigned int i = 0; i < PAGE_BYTES / 8; i++)
			difference |= *words++ ^ number;
		if (difference)
			return false;
	}
	return true;
}

static void describe(struct vring_desc *desc, const void *start, uint32_t size, uint16_t flags, uint16_t next)
{
	desc->addr = (const uint8_t *)start - memory;
	desc->len = size;
	desc->flags = flags;
	desc->next = next;
}

/* Make a request available. `now` is when it begins. */
static void submit(unsigned int slot, uint64_t now)
{
	static uint64_t count;
	/* A slot has descriptors of its own, in the ring or in its indirect table. */
	uint16_t first = job.indirect ? 0 : slot * descriptors, head = job.indirect ? slot : first, at = first;
	struct vring_desc *table = job.indirect ? tables + (size_t)slot * descriptors : vring.desc;
	struct request *request = &requests[slot];
	uint16_t direction = job.write ? 0 : VRING_DESC_F_WRITE;

	slots[slot].offset = random_offset();
	slots[slot].since = now;
	slots[slot].in_flight = true;
	/* Looking at data costs as much as some requests do: every 64th is enough to notice a back end that errs. */
	slots[slot].checked = job.verify && !job.write && !(count++ % 64);
	if (job.write)
		fill(slot);
	request->header.type = job.write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
	request->header.ioprio = 0;
	request->header.sector = slots[slot].offset / SECTOR_BYTES;
	request->status = 0xFF;

	describe(&table[at], &request->header, sizeof(request->header), VRING_DESC_F_NEXT, at + 1);
	for (uint32_t done = 0; done < job.block; done += job.segment) {
		uint32_t size = job.block - done < job.segment ? job.block - done : job.segment;

		at++;
		describe(&table[at], data_of(slot) + done, size, direction | VRING_DESC_F_NEXT, at + 1);
	}
	at++;
	describe(&table[at], &request->status, sizeof(request->status), VRING_DESC_F_WRITE, 0);
	if (job.indirect)
		describe(&vring.desc[head], table, descriptors * sizeof(*table), VRING_DESC_F_INDIRECT, 0);

	vring.avail->ring[avail_idx % job.ring] = head;
	/* The chain and its entry before the index, by which the back end sees them. */
	__atomic_store_n(&vring.avail->idx, ++avail_idx, __ATOMIC_RELEASE);
	in_flight++;
}

/* Kick the back end, if it wants that for what was made available since this was last called. */
static void kick(void)
{
	uint16_t old = kicked_idx;
	bool wanted;

	kicked_idx = avail_idx;
	if (old == avail_idx)
		return;
	/* The index must be out before we look whether the back end sleeps, as it looks at the index before it does. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (job.event_idx)
		wanted = vring_need_event(__atomic_load_n(&vring_avail_event(&vring), __ATOMIC_RELAXED), avail_idx, old);
	else
		wanted = !(__atomic_load_n(&vring.used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
	if (!wanted)
		return;
	if (eventfd_write(kick_fd, 1) && errno != EAGAIN)
		die("kick: %s", strerror(errno));
	result.kicks++;
}

static void disable_interrupts(void)
{
	if (no_interrupt)
		return;
	no_interrupt = true;
	/* With EVENT_IDX there is no off, only an index that is far from here most of the time; 0 is Linux's choice. */
	if (job.event_idx)
		__atomic_store_n(&vring_used_event(&vring), 0, __ATOMIC_RELAXED);
	else
		__atomic_store_n(&vring.avail->flags, VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
}

static bool has_more(void)
{
	return __atomic_load_n(&vring.used->idx, __ATOMIC_ACQUIRE) != last_used;
}

/* Gives false where there is an answer already, for which there may be no interrupt. */
static bool enable_interrupts(void)
{
	no_interrupt = false;
	if (job.event_idx)
		__atomic_store_n(&vring_used_event(&vring), last_used, __ATOMIC_RELAXED);
	else
		__atomic_store_n(&vring.avail->flags, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return !has_more();
}

static void sleep_until_called(void)
{
	struct pollfd waiting = { .fd = call_fd, .events = POLLIN };
	eventfd_t value;

	/* Not a read that blocks: some back ends make the descriptor non-blocking, for us too, and some do not. */
	do {
		if (poll(&waiting, 1, -1) < 0 && errno != EINTR)
			die("poll: %s", strerror(errno));
	} while (eventfd_read(call_fd, &value) && (errno == EAGAIN || errno == EINTR));
	result.calls++;
}

static unsigned int bucket_of(uint64_t latency)
{
	unsigned int shift;

	if (latency < 2 * STEPS)
		return latency;
	shift = 63 - __builtin_clzll(latency) - STEP_BITS;
	return shift * STEPS + (latency >> shift);
}

/* The middle of a bucket, in ns. */
static double value_of(unsigned int bucket)
{
	unsigned int shift = bucket < 2 * STEPS ? 0 : bucket / STEPS - 1;

	return ((double)(bucket - shift * STEPS) + 0.5) * (double)BIT(shift);
}

/* In microseconds. */
static double percentile(double part)
{
	uint64_t wanted = part * result.requests, seen = 0;

	for (unsigned int bucket = 0; bucket < BUCKETS; bucket++) {
		seen += result.histogram[bucket];
		if (seen > wanted)
			return value_of(bucket) / 1e3;
	}
	return 0;
}

/* Take the answer that the used ring holds next; gives its slot. */
static unsigned int take(uint64_t now, bool measured)
{
	const struct vring_used_elem *element = &vring.used->ring[last_used % job.ring];
	uint32_t id = element->id, slot = job.indirect ? id : id / descriptors;

	if (slot >= job.depth || !slots[slot].in_flight || id != (job.indirect ? slot : slot * descriptors))
		die("the back end gave back descriptor %u, which it did not have", id);
	last_used++;
	in_flight--;
	slots[slot].in_flight = false;
	if (requests[slot].status != VIRTIO_BLK_S_OK)
		result.errors++;
	else if (slots[slot].checked && !is_right(slot))
		result.mismatches++;
	if (measured) {
		uint64_t latency = now - slots[slot].since;

		result.requests++;
		result.sum += latency;
		result.histogram[bucket_of(latency)]++;
	}
	return slot;
}

/* Gives how long was measured, in seconds. */
static double run(void)
{
	uint64_t start = now_ns(), begin = start + job.warm_up * 1e9, end = begin + job.seconds * 1e9, now = start;
	bool measured = false;

	for (unsigned int slot = 0; slot < job.depth; slot++)
		submit(slot, now);
	kick();
	while (in_flight) {
		if (enable_interrupts())
			sleep_until_called();
		disable_interrupts();
		while (has_more()) {
			unsigned int slot;

			now = now_ns();
			if (!measured && now >= begin && now < end) {
				measured = true;
				begin = now;
				result.kicks = result.calls = 0;
			}
			/* Those that end after the end are not counted: there would be no others beside them. */
			slot = take(now, measured && now < end);
			if (now < end)
				submit(slot, now);
		}
		kick();
	}
	return (end - begin) / 1e9;
}

/* ---- the process ---- */

static void __attribute__((noreturn)) end_from_signal(const char *text)
{
	ssize_t written = write(STDERR_FILENO, text, strlen(text));

	_exit(written < 0 ? 2 : 1);
}

static void connection_changed(int number)
{
	char byte;

	(void)number;
	if (!recv(sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT))
		end_from_signal("vhost_client: the back end closed the connection while requests were in flight\n");
}

static void took_too_long(int number)
{
	(void)number;
	end_from_signal("vhost_client: the back end does not answer\n");
}

/* While the job runs nobody reads the socket: a signal tells when the other end goes away, and when nothing moves. */
static void watch_back_end(bool on)
{
	signal(SIGIO, on ? connection_changed : SIG_IGN);
	signal(SIGALRM, took_too_long);
	alarm(on ? job.warm_up + job.seconds + 20 : 20);
	if (fcntl(sock, F_SETOWN, getpid()) || fcntl(sock, F_SETFL, on ? O_ASYNC : 0))
		die("fcntl: %s", strerror(errno));
	if (on)
		connection_changed(0); /* it may have gone before this */
}

static void __attribute__((noreturn)) usage(int status)
{
	fprintf(status ? stderr : stdout,
		"Usage: vhost_client [OPTIONS] SOCKET\n\n"
		"Keeps requests in flight at a vhost-user block device, and prints how fast they are answered.\n\n"
		"  --write            write, in place of read\n"
		"  --block BYTES      of each request, a multiple of 4096 (default: 4096)\n"
		"  --segment BYTES    of each data descriptor, at most (default: one for the whole block)\n"
		"  --depth N          requests in flight (default: 1)\n"
		"  --span BYTES       offsets are below this: the file's size, or less\n"
		"  --seconds S        to measure (default: 1)\n"
		"  --warm-up S        before that (default: 0.2)\n"
		"  --ring N           descriptors of the ring, a power of two (default: 128)\n"
		"  --seed N           of the random offsets (default: 1)\n"
		"  --indirect         a request is one descriptor with an indirect table\n"
		"  --no-event-idx     do without VIRTIO_RING_F_EVENT_IDX\n"
		"  --no-verify        do not look whether what is read is the number of its block\n");
	exit(status);
}

static void parse(int count, char **words)
{
	static const struct option options[] = {
		{ "write", no_argument, NULL, 'w' },	    { "block", required_argument, NULL, 'b' },
		{ "segment", required_argument, NULL, 'g' }, { "depth", required_argument, NULL, 'd' },
		{ "span", required_argument, NULL, 's' },    { "seconds", required_argument, NULL, 't' },
		{ "warm-up", required_argument, NULL, 'u' }, { "ring", required_argument, NULL, 'r' },
		{ "seed", required_argument, NULL, 'e' },    { "indirect", no_argument, NULL, 'i' },
		{ "no-event-idx", no_argument, NULL, 'E' },  { "no-verify", no_argument, NULL, 'V' },
		{ "help", no_argument, NULL, 'h' },	     {},
	};

	for (int option; (option = getopt_long(count, words, "", options, NULL)) != -1;) {
		switch (option) {
		case 'w': job.write = true; break;
		case 'b': job.block = strtoul(optarg, NULL, 0); break;
		case 'g': job.segment = strtoul(optarg, NULL, 0); break;
		case 'd': job.depth = strtoul(optarg, NULL, 0); break;
		case 's': job.span = strtoull(optarg, NULL, 0); break;
		case 't': job.seconds = strtod(optarg, NULL); break;
		case 'u': job.warm_up = strtod(optarg, NULL); break;
		case 'r': job.ring = strtoul(optarg, NULL, 0); break;
		case 'e': job.seed = strtoull(optarg, NULL, 0); break;
		case 'i': job.indirect = true; break;
		case 'E': job.event_idx = false; break;
		case 'V': job.verify = false; break;
		case 'h': usage(0);
		default: usage(2);
		}
	}
	if (optind != count - 1)
		usage(2);
	path = words[optind];
	if (!job.segment)
		job.segment = job.block;
	if (!job.block || job.block % PAGE_BYTES || job.segment % SECTOR_BYTES)
		die("--block takes a multiple of %u, --segment one of %u", PAGE_BYTES, SECTOR_BYTES);
	if (job.span < job.block)
		die("--span takes at least one block, %u bytes", job.block);
	if (!job.ring || job.ring & (job.ring - 1) || job.ring > MAX_RING)
		die("--ring takes a power of two up to %u", MAX_RING);
	descriptors = 2 + (job.block + job.segment - 1) / job.segment;
	if (!job.depth || job.depth * (uint64_t)(job.indirect ? 1 : descriptors) > job.ring)
		die("%u requests of %u descriptors do not fit a ring of %u", job.depth, descriptors, job.ring);
	if (!(job.seconds > 0 && job.seconds < 3600) || !(job.warm_up >= 0 && job.warm_up < 3600))
		die("--seconds and --warm-up take less than an hour");
}

int main(int count, char **words)
{
	double seconds;

	parse(count, words);
	connect_to_back_end();
	watch_back_end(false);
	negotiate();
	make_memory();
	start_ring();
	watch_back_end(true);
	seconds = run();
	watch_back_end(false);
	stop_ring();
	if (!result.requests)
		die("no request was answered within %g s", job.seconds);
	printf("{\"iops\": %.1f, \"mean_us\": %.3f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"requests\": %" PRIu64
	       ", \"errors\": %" PRIu64 ", \"mismatches\": %" PRIu64 ", \"kicks\": %" PRIu64 ", \"calls\": %" PRIu64
	       ", \"event_idx\": %s, \"indirect\": %s}\n",
	       result.requests / seconds, result.sum / 1e3 / result.requests, percentile(0.5), percentile(0.99),
	       result.requests, result.errors, result.mismatches, result.kicks, result.calls,
	       job.event_idx ? "true" : "false", job.indirect ? "true" : "false");
	return 0;
}
