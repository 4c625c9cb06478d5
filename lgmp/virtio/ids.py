"""Numbers that every virtio device and driver agree on, named as in the kernel's headers.

From linux/virtio_ids.h, linux/virtio_config.h, linux/virtio_ring.h (virtio 1.0, sections 2.1, 2.6 and 5).
"""

# linux/virtio_ids.h
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_RNG = 4

# The status byte, linux/virtio_config.h.
VIRTIO_CONFIG_S_ACKNOWLEDGE = 0x01
VIRTIO_CONFIG_S_DRIVER = 0x02
VIRTIO_CONFIG_S_DRIVER_OK = 0x04
VIRTIO_CONFIG_S_FEATURES_OK = 0x08
# The device is past help until it is reset; the name is virtio 1.0's, DEVICE_NEEDS_RESET.
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# Feature bits that belong to no device: bit numbers, linux/virtio_config.h and linux/virtio_ring.h.
VIRTIO_F_NOTIFY_ON_EMPTY = 24
VIRTIO_F_ANY_LAYOUT = 27
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32

# linux/virtio_ring.h
VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4
VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_USED_F_NO_NOTIFY = 1

# How many descriptors each ring of ours has; with lguest's alignment that is two pages a ring, as in the seed launcher.
VIRTQUEUE_NUM = 128
# The alignment of the used ring within an lguest ring, in bytes (LGUEST_VRING_ALIGN).
LGUEST_VRING_ALIGN = 4096
