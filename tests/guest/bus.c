/* SPDX-License-Identifier: GPL-2.0-only */
/* The lguest bus: the descriptor page right above RAM. */
#include "abi.h"
#include "virtio.h"

#define STATUS_TIMEOUT_MS 60000

struct device devices[MAX_DEVICES];
unsigned int device_count;
u32 guest_limit;

static struct lguest_vqconfig *vq_configs(struct lguest_device_desc *desc)
{
	return (struct lguest_vqconfig *)desc->rest;
}

static u8 *feature_bytes(struct lguest_device_desc *desc)
{
	return desc->rest + desc->num_vq * sizeof(struct lguest_vqconfig);
}

u8 *device_config(struct device *device)
{
	return feature_bytes(device->desc) + 2 * device->desc->feature_len;
}

static u32 desc_size(struct lguest_device_desc *desc)
{
	return sizeof(*desc) + desc->num_vq * sizeof(struct lguest_vqconfig) + 2 * desc->feature_len + desc->config_len;
}

u32 device_offered(struct device *device)
{
	u32 features = 0;

	for (unsigned int i = 0; i < min(device->desc->feature_len, 4u); i++)
		features |= (u32)feature_bytes(device->desc)[i] << (8 * i);
	return features;
}

void device_notify_status(struct device *device)
{
	hcall(LHCALL_NOTIFY, device->address, 0, 0, 0);
}

void device_set_status(struct device *device, u8 status)
{
	*(volatile u8 *)&device->desc->status = status;
	if (abi->status_notify)
		device_notify_status(device);
}

void device_reset(struct device *device)
{
	if (abi->status_notify) /* else it is the launcher that clears it */
		*(volatile u8 *)&device->desc->status = 0;
	barrier();
	device_notify_status(device);
	device->started = false;
}

bool device_needs_reset(struct device *device)
{
	return *(volatile u8 *)&device->desc->status & VIRTIO_CONFIG_S_NEEDS_RESET;
}

void device_start(struct device *device, u32 wanted)
{
	struct lguest_device_desc *desc = device->desc;
	u8 *accepted = feature_bytes(desc) + desc->feature_len;

	device_reset(device);
	device_set_status(device, VIRTIO_CONFIG_S_ACKNOWLEDGE);
	device_set_status(device, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
	device->features = device_offered(device) & wanted;
	if (setting_noindirect)
		device->features &= ~(1u << VIRTIO_RING_F_INDIRECT_DESC);
	for (unsigned int i = 0; i < desc->feature_len; i++)
		accepted[i] = i < 4 ? device->features >> (8 * i) : 0;
	if (abi->features_notify)
		device_notify_status(device);
	for (unsigned int i = 0; i < min(desc->num_vq, MAX_VQS); i++)
		vq_reset(&device->vqs[i]);
	if (abi->features_notify)
		device_set_status(device,
				  VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_DRIVER_OK);
	else /* Linux has used the device before it tells of this; here the first kick is what tells of the features */
		*(volatile u8 *)&desc->status =
			VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_DRIVER_OK;
	device->started = true;
}

const char *device_type_name(u8 type)
{
	static const char *const names[] = { "none", "net", "block", "console", "rng" };

	return type < ARRAY_SIZE(names) ? names[type] : "unknown";
}

struct device *device_find(u8 type, unsigned int index)
{
	for (unsigned int i = 0; i < device_count; i++)
		if (devices[i].desc->type == type && devices[i].index == index)
			return &devices[i];
	return NULL;
}

static void map_pages(u32 from, u32 to)
{
	for (; from < to; from += PAGE_SIZE)
		map_page(from, from, PTE_KERNEL);
}

void bus_init(void)
{
	u32 page = memory_size, offset = 0;

	map_pages(page, page + PAGE_SIZE);
	guest_limit = page + PAGE_SIZE;
	while (offset + sizeof(struct lguest_device_desc) <= PAGE_SIZE && device_count < MAX_DEVICES) {
		struct device *device = &devices[device_count];
		struct lguest_device_desc *desc = (void *)(page + offset);

		if (!desc->type)
			break;
		if (offset + desc_size(desc) > PAGE_SIZE)
			panic("device at %u of the descriptor page is %u bytes", offset, desc_size(desc));
		device->desc = desc;
		device->address = page + offset;
		while (device_find(desc->type, device->index)) /* only earlier ones are counted yet */
			device->index++;
		for (unsigned int i = 0; i < min(desc->num_vq, MAX_VQS); i++) {
			struct lguest_vqconfig config = vq_configs(desc)[i];
			u32 start = config.pfn << PAGE_SHIFT;
			u32 end = (start + vring_bytes(config.num) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);

			map_pages(start, end);
			guest_limit = max(guest_limit, end);
			vq_init(&device->vqs[i], device, &config);
		}
		device_count++;
		offset += desc_size(desc);
	}
}

/* The device that "block0" means, or "42", the first of that virtio type; NULL (and says so) if there is none. */
static struct device *device_named(const char *name)
{
	char known[16];
	u64 type;

	for (unsigned int i = 0; i < device_count; i++) {
		format(known, sizeof(known), "%s%u", device_type_name(devices[i].desc->type), devices[i].index);
		if (parse_number(name, &type) ? devices[i].desc->type == type : !strcmp(name, known))
			return &devices[i];
	}
	print("%s: no such device\n", name);
	return NULL;
}

static bool needs_reset(void *arg)
{
	return device_needs_reset(arg);
}

bool cmd_status(int argc, char **argv)
{
	bool wait = argc == 3 && !strcmp(argv[2], "wait");
	struct device *device;

	if (argc != 2 && !wait)
		return false;
	device = device_named(argv[1]);
	if (device && wait)
		wait_for(needs_reset, device, STATUS_TIMEOUT_MS);
	if (device)
		print("status %s: %02x%s\n", argv[1], device->desc->status, device_needs_reset(device) ? " needs reset" : "");
	return true;
}

bool cmd_reset(int argc, char **argv)
{
	struct device *device;

	if (argc != 2)
		return false;
	device = device_named(argv[1]);
	if (!device)
		return true;
	if (console_up && device == device_find(VIRTIO_ID_CONSOLE, 0))
		console_restart();
	else
		device_reset(device);
	print("reset %s: status %02x\n", argv[1], device->desc->status);
	return true;
}

static void print_hex(const u8 *bytes, unsigned int length)
{
	for (unsigned int i = 0; i < length; i++)
		print("%02x", bytes[i]);
	if (!length)
		print("-");
}

bool cmd_devices(int argc, char **argv)
{
	(void)argv;
	if (argc != 1)
		return false;
	for (unsigned int i = 0; i < device_count; i++) {
		struct lguest_device_desc *desc = devices[i].desc;

		print("device %u: type %u (%s%u) at %x status %x", i, desc->type, device_type_name(desc->type),
		      devices[i].index, devices[i].address, desc->status);
		for (unsigned int q = 0; q < desc->num_vq; q++)
			print(" vq%u num %u irq %u pfn %x", q, vq_configs(desc)[q].num, vq_configs(desc)[q].irq,
			      vq_configs(desc)[q].pfn);
		print(" offered ");
		print_hex(feature_bytes(desc), desc->feature_len);
		print(" accepted ");
		print_hex(feature_bytes(desc) + desc->feature_len, desc->feature_len);
		print(" config ");
		print_hex(device_config(&devices[i]), desc->config_len);
		print("\n");
	}
	print("devices: %u\n", device_count);
	return true;
}
