/* SPDX-License-Identifier: GPL-2.0-only */
/* The network driver, with as much of ARP, IP and ICMP as it takes to ping and be pinged. */
#include "virtio.h"

#define VIRTIO_NET_F_MAC 5
#define VIRTIO_NET_HDR_BYTES 10
#define FRAME_BYTES 1518u
#define RX_SLOTS 32
#define TX_SLOTS 16
#define SLOT_BYTES 2048u
#define DATA_OFFSET 16 /* within a slot: the header comes before it */
#define PING_TIMEOUT_MS 1000

#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ARP_REQUEST 1
#define ARP_REPLY 2
#define IPPROTO_ICMP 1
#define ICMP_ECHOREPLY 0
#define ICMP_ECHO 8
#define PING_ID 0x6c67

struct ethernet {
	u8 to[6], from[6];
	u16 type;
} packed;

struct arp {
	u16 hardware, protocol;
	u8 hardware_bytes, protocol_bytes;
	u16 operation;
	u8 sender[6];
	u32 sender_ip;
	u8 target[6];
	u32 target_ip;
} packed;

struct ip {
	u8 version, service;
	u16 length, id, fragment;
	u8 ttl, protocol;
	u16 checksum;
	u32 from, to;
} packed;

struct icmp {
	u8 type, code;
	u16 checksum, id, sequence;
} packed;

static struct net {
	struct device *device;
	u8 *rx, *tx;
	bool tx_busy[TX_SLOTS];
	u8 mac[6];
	u32 ip; /* as on the wire, like every address here */
	u32 peer_ip;
	u8 peer_mac[6];
	bool peer_known;
	u16 reply_sequence;
	bool reply_seen;
	u32 received, sent, arp_answered, ping_answered, replies, errors;
} nets[4];

static u16 swap16(u16 value)
{
	return value << 8 | value >> 8;
}

static bool parse_ip(const char *text, u32 *ip)
{
	u8 bytes[4];

	for (int i = 0; i < 4; i++) {
		u32 value = 0, digits = 0;

		for (; *text >= '0' && *text <= '9' && digits < 4; text++, digits++)
			value = value * 10 + *text - '0';
		if (!digits || value > 255 || *text != (i < 3 ? '.' : 0))
			return false;
		text++;
		bytes[i] = value;
	}
	memcpy(ip, bytes, sizeof(*ip));
	return true;
}

/* The Internet checksum: 0 over data that holds its own. */
static u16 checksum(const void *data, u32 length)
{
	const u8 *bytes = data;
	u32 sum = 0;

	for (u32 i = 0; i < length; i++)
		sum += i % 2 ? (u32)bytes[i] << 8 : bytes[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static void add_rx(struct net *net, u8 *slot)
{
	struct buffer pieces[] = { { slot, VIRTIO_NET_HDR_BYTES }, { slot + DATA_OFFSET, FRAME_BYTES } };

	vq_add(&net->device->vqs[0], pieces, 0, 2, slot);
}

static struct net *net_open(u32 index)
{
	struct device *device = device_find(VIRTIO_ID_NET, index);
	struct net *net = &nets[index % ARRAY_SIZE(nets)];

	if (!device || device->desc->num_vq < 2 || index >= ARRAY_SIZE(nets)) {
		print("net: no network device %u\n", index);
		return NULL;
	}
	if (net->device && device->started)
		return net;
	if (!net->device) {
		net->rx = alloc_pages(RX_SLOTS * SLOT_BYTES / PAGE_SIZE);
		net->tx = alloc_pages(TX_SLOTS * SLOT_BYTES / PAGE_SIZE);
	}
	net->device = device;
	memset(net->tx_busy, 0, sizeof(net->tx_busy));
	device_start(device, 1u << VIRTIO_NET_F_MAC | 1u << VIRTIO_RING_F_INDIRECT_DESC);
	if (device->features >> VIRTIO_NET_F_MAC & 1)
		memcpy(net->mac, device_config(device), 6);
	else
		memcpy(net->mac, "\x02lgmp0", 6);
	for (unsigned int i = 0; i < RX_SLOTS; i++)
		add_rx(net, net->rx + i * SLOT_BYTES);
	vq_kick(&device->vqs[0]);
	print("net%u: mac %02x:%02x:%02x:%02x:%02x:%02x\n", index, net->mac[0], net->mac[1], net->mac[2], net->mac[3],
	      net->mac[4], net->mac[5]);
	return net;
}

static void reap_tx(struct net *net)
{
	u8 *slot;

	while ((slot = vq_get(&net->device->vqs[1], NULL)))
		net->tx_busy[(slot - net->tx) / SLOT_BYTES] = false;
}

/* Where the next frame to send is to be put together. */
static u8 *tx_slot(struct net *net)
{
	for (;;) {
		reap_tx(net);
		for (unsigned int i = 0; i < TX_SLOTS; i++)
			if (!net->tx_busy[i])
				return net->tx + i * SLOT_BYTES;
		if (!vq_wait(&net->device->vqs[1], 10000))
			panic("network output is stuck");
	}
}

static void send(struct net *net, u8 *slot, u32 length)
{
	struct buffer pieces[] = { { slot, VIRTIO_NET_HDR_BYTES }, { slot + DATA_OFFSET, max(length, 60u) } };

	memset(slot, 0, VIRTIO_NET_HDR_BYTES);
	if (!vq_add(&net->device->vqs[1], pieces, 2, 0, slot))
		panic("no room in a queue of %u for %u frames", net->device->vqs[1].num, TX_SLOTS);
	net->tx_busy[(slot - net->tx) / SLOT_BYTES] = true;
	net->sent++;
	vq_kick(&net->device->vqs[1]);
}

static struct ethernet *start_frame(struct net *net, u8 *slot, const u8 *to, u16 type)
{
	struct ethernet *ethernet = (void *)(slot + DATA_OFFSET);

	memset(slot, 0, SLOT_BYTES);
	memcpy(ethernet->to, to, 6);
	memcpy(ethernet->from, net->mac, 6);
	ethernet->type = swap16(type);
	return ethernet;
}

static void send_arp(struct net *net, u16 operation, const u8 *to, u32 target_ip)
{
	u8 *slot = tx_slot(net);
	struct arp *arp = (void *)(start_frame(net, slot, to, ETH_P_ARP) + 1);

	*arp = (struct arp){ swap16(1), swap16(ETH_P_IP), 6, 4, swap16(operation), { 0 }, net->ip, { 0 }, target_ip };
	memcpy(arp->sender, net->mac, 6);
	if (operation == ARP_REPLY)
		memcpy(arp->target, to, 6);
	send(net, slot, sizeof(struct ethernet) + sizeof(*arp));
}

static void send_icmp(struct net *net, const u8 *mac, u32 to, u8 type, u16 id, u16 sequence, const u8 *data, u32 length)
{
	u8 *slot = tx_slot(net);
	struct ip *ip = (void *)(start_frame(net, slot, mac, ETH_P_IP) + 1);
	struct icmp *icmp = (void *)(ip + 1);

	*ip = (struct ip){ 0x45, 0, swap16(sizeof(*ip) + sizeof(*icmp) + length), 0, 0, 64, IPPROTO_ICMP, 0, net->ip, to };
	ip->checksum = checksum(ip, sizeof(*ip));
	*icmp = (struct icmp){ type, 0, 0, id, sequence };
	memcpy(icmp + 1, data, length);
	icmp->checksum = checksum(icmp, sizeof(*icmp) + length);
	send(net, slot, sizeof(struct ethernet) + sizeof(*ip) + sizeof(*icmp) + length);
}

static void receive_arp(struct net *net, struct arp *arp)
{
	if (arp->sender_ip == net->peer_ip) {
		memcpy(net->peer_mac, arp->sender, 6);
		net->peer_known = true;
	}
	if (arp->operation == swap16(ARP_REQUEST) && arp->target_ip == net->ip) {
		net->arp_answered++;
		send_arp(net, ARP_REPLY, arp->sender, arp->sender_ip);
	}
}

static void receive_ip(struct net *net, struct ethernet *ethernet, struct ip *ip, u32 length)
{
	struct icmp *icmp = (void *)(ip + 1);
	u32 bytes = swap16(ip->length);

	if (length < sizeof(*ip) + sizeof(*icmp) || bytes > length || bytes < sizeof(*ip) + sizeof(*icmp))
		return;
	if (ip->version != 0x45 || ip->to != net->ip || ip->protocol != IPPROTO_ICMP)
		return;
	if (checksum(ip, sizeof(*ip)) || checksum(icmp, bytes - sizeof(*ip))) {
		net->errors++;
		return;
	}
	if (icmp->type == ICMP_ECHO) {
		net->ping_answered++;
		send_icmp(net, ethernet->from, ip->from, ICMP_ECHOREPLY, icmp->id, icmp->sequence, (u8 *)(icmp + 1),
			  bytes - sizeof(*ip) - sizeof(*icmp));
	} else if (icmp->type == ICMP_ECHOREPLY && icmp->id == PING_ID && ip->from == net->peer_ip) {
		net->reply_sequence = icmp->sequence;
		net->reply_seen = true;
		net->replies++;
	}
}

static void receive(struct net *net)
{
	u8 *slot;
	u32 length;

	while ((slot = vq_get(&net->device->vqs[0], &length))) {
		struct ethernet *ethernet = (void *)(slot + DATA_OFFSET);

		net->received++;
		if (length < VIRTIO_NET_HDR_BYTES + sizeof(*ethernet) || length > VIRTIO_NET_HDR_BYTES + FRAME_BYTES) {
			net->errors++;
		} else {
			length -= VIRTIO_NET_HDR_BYTES + sizeof(*ethernet);
			if (ethernet->type == swap16(ETH_P_ARP) && length >= sizeof(struct arp))
				receive_arp(net, (void *)(ethernet + 1));
			else if (ethernet->type == swap16(ETH_P_IP))
				receive_ip(net, ethernet, (void *)(ethernet + 1), length);
		}
		add_rx(net, slot);
	}
	vq_kick(&net->device->vqs[0]);
}

static bool frame_or_key(void *arg)
{
	struct net *net = arg;

	return vq_has_used(&net->device->vqs[0]) || console_input_ready();
}

/* Answers until a key is hit, or for so many seconds when that is not 0. */
static void serve(struct net *net, u32 seconds)
{
	u64 end = now_ns() + (u64)seconds * NSEC_PER_SEC;

	console_flush();
	while (!console_input_ready() && (!seconds || now_ns() < end)) {
		u32 rest_ms = seconds ? (u32)div_u64(end - now_ns() + NSEC_PER_MSEC, NSEC_PER_MSEC, NULL) : 0;

		wait_for(frame_or_key, net, rest_ms);
		receive(net);
	}
	if (console_input_ready())
		console_getc();
	print("net: received %u sent %u arp %u pings %u errors %u\n", net->received, net->sent, net->arp_answered,
	      net->ping_answered, net->errors);
}

static void receive_until(struct net *net, bool *flag, u32 timeout_ms)
{
	u64 end = now_ns() + (u64)timeout_ms * NSEC_PER_MSEC;

	while (!*flag && now_ns() < end) {
		vq_wait(&net->device->vqs[0], timeout_ms);
		receive(net);
	}
}

/* Finds out who has an address, in net->peer_mac; false if nobody answers. */
static bool resolve(struct net *net, u32 target)
{
	static const u8 everyone[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

	net->peer_ip = target;
	net->peer_known = false;
	if (!net->ip) /* the next address after the target's will do on a network of two */
		net->ip = target + (1u << 24);
	for (int attempt = 0; attempt < 3 && !net->peer_known; attempt++) {
		send_arp(net, ARP_REQUEST, everyone, target);
		receive_until(net, &net->peer_known, PING_TIMEOUT_MS);
	}
	return net->peer_known;
}

static void ping(struct net *net, const char *name, u32 target, u32 count, u32 size)
{
	static u8 data[1472];
	u32 answered = 0;

	for (u32 i = 0; i < sizeof(data); i++)
		data[i] = i;
	size = min(size, (u32)sizeof(data));
	resolve(net, target);
	for (u32 i = 0; i < count && net->peer_known; i++) {
		u64 start = now_ns();

		net->reply_seen = false;
		send_icmp(net, net->peer_mac, target, ICMP_ECHO, PING_ID, swap16(i), data, size);
		receive_until(net, &net->reply_seen, PING_TIMEOUT_MS);
		if (net->reply_seen && net->reply_sequence == swap16(i)) {
			answered++;
			print("net ping %s: seq %u in %u us\n", name, i, (u32)div_u64(now_ns() - start, 1000, NULL));
		} else
			print("net ping %s: seq %u timeout\n", name, i);
		if (console_poll_cancel())
			break;
	}
	if (!net->peer_known)
		print("net ping %s: no ARP answer\n", name);
	print("net ping %s: %u of %u answered\n", name, answered, count);
}

bool net_ping_start(const char *address)
{
	struct net *net;
	u32 ip;

	if (!parse_ip(address, &ip)) {
		print("net: %s is no address\n", address);
		return false;
	}
	net = net_open(0);
	if (!net)
		return false;
	net->replies = 0;
	if (resolve(net, ip))
		return true;
	print("net ping %s: no ARP answer\n", address);
	return false;
}

void net_ping_send(u32 number)
{
	static const u8 data[56] = "how do you do";

	send_icmp(&nets[0], nets[0].peer_mac, nets[0].peer_ip, ICMP_ECHO, PING_ID, swap16(number), data, sizeof(data));
}

u32 net_ping_receive(u32 wanted, u32 timeout_ms)
{
	struct net *net = &nets[0];
	u64 end = now_ns() + (u64)timeout_ms * NSEC_PER_MSEC;

	if (!net->device || !net->device->started)
		return 0;
	receive(net);
	while (net->replies < wanted && now_ns() < end) {
		vq_wait(&net->device->vqs[0], timeout_ms);
		receive(net);
	}
	return net->replies;
}

bool cmd_net(int argc, char **argv)
{
	u32 index = 0, ip, number, size = 56;
	struct net *net;

	if (argc > 2 && !strcmp(argv[1], "-d")) {
		if (!word_number(argc, argv, 2, &index))
			return false;
		argc -= 2;
		argv += 2;
	}
	if (argc < 3 || !parse_ip(argv[2], &ip))
		return false;
	number = 0;
	if (!strcmp(argv[1], "ip")) {
		if (argc > 3 && (strcmp(argv[3], "for") || !word_number(argc, argv, 4, &number)))
			return false;
		net = net_open(index);
		if (net) {
			net->ip = ip;
			print("net: answering as %s\n", argv[2]);
			serve(net, number);
		}
	} else if (!strcmp(argv[1], "addr")) {
		net = net_open(index);
		if (net)
			net->ip = ip;
	} else if (!strcmp(argv[1], "ping")) {
		if (!word_number(argc, argv, 3, &number) || (argc > 4 && !word_number(argc, argv, 4, &size)))
			return false;
		net = net_open(index);
		if (net)
			ping(net, argv[2], ip, number, size);
	} else
		return false;
	return true;
}
