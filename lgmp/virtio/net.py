"""What a virtio network device and its driver agree on (virtio 1.0, section 5.1; linux/virtio_net.h).

Two queues, and a header before each frame. lguest guests have the legacy one of 10 bytes: merged receive buffers, whose
header has 12, are not offered to them, as no lguest launcher had them. Who serves a modern driver offers those too, and
such a driver has the header of 12 bytes whether it takes them or not.

There is one pair of queues and no control queue: the front ends that want one see to it themselves.
"""

from __future__ import annotations

from struct import Struct

from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC

RECEIVE_QUEUE = 0
TRANSMIT_QUEUE = 1
QUEUES = 2

# struct virtio_net_hdr: u8 flags, u8 gso_type, u16 hdr_len, u16 gso_size, u16 csum_start, u16 csum_offset
HEADER_BYTES = 10
# struct virtio_net_hdr_v1, virtio_net_hdr_mrg_rxbuf: the same, then u16 num_buffers.
MODERN_HEADER_BYTES = 12
NUM_BUFFERS_AT = 10
VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
VIRTIO_NET_HDR_F_DATA_VALID = 2
VIRTIO_NET_HDR_GSO_NONE = 0
VIRTIO_NET_HDR_GSO_TCPV4 = 1
VIRTIO_NET_HDR_GSO_TCPV6 = 4
VIRTIO_NET_HDR_GSO_ECN = 0x80

# Feature bits (bit numbers). HOST: the driver may send such to us; GUEST: we may send such to the driver.
VIRTIO_NET_F_CSUM = 0
VIRTIO_NET_F_GUEST_CSUM = 1
VIRTIO_NET_F_MTU = 3
VIRTIO_NET_F_MAC = 5
VIRTIO_NET_F_GUEST_TSO4 = 7
VIRTIO_NET_F_GUEST_TSO6 = 8
VIRTIO_NET_F_GUEST_ECN = 9
VIRTIO_NET_F_HOST_TSO4 = 11
VIRTIO_NET_F_HOST_TSO6 = 12
VIRTIO_NET_F_HOST_ECN = 13
VIRTIO_NET_F_MRG_RXBUF = 15

# The status field of the configuration space.
VIRTIO_NET_S_LINK_UP = 1

MAC_BYTES = 6
# The MTU, in bytes, that a driver takes for granted where it is not told of one.
ETHERNET_MTU = 1500

# struct virtio_net_config, as far as any field of it is of use here: u8 mac[6], u16 status, u16 max_virtqueue_pairs,
# u16 mtu.
_CONFIG = Struct("<6sHHH")

# What a tap with a header before each frame takes from the driver, whatever it can hand to it.
HOST_OFFLOADS = (
    1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6 | 1 << VIRTIO_NET_F_HOST_ECN
)


def features(offloads: int = 0) -> int:
    """The feature bits a network device offers to an lguest guest; `offloads`: those that its host side has."""
    return 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_F_ANY_LAYOUT | 1 << VIRTIO_RING_F_INDIRECT_DESC | offloads


def config_space(mac: bytes) -> bytes:
    """The configuration space of an lguest guest's device: its MAC address, 6 bytes."""
    if len(mac) != MAC_BYTES:
        raise ValueError(f"a MAC address has {MAC_BYTES} bytes, not {len(mac)}")
    return mac


def modern_features(offloads: int = 0, mtu: int = ETHERNET_MTU) -> int:
    """The feature bits a network device offers to a modern driver, but for those of the bus (VERSION_1, EVENT_IDX).

    `offloads`: those that its host side has; `mtu`: that of the host side, in bytes, which the driver is told of where
    it would not guess it. Not offered are STATUS, since the link is up as long as the device is, MQ and the control
    queue.
    """
    return features(offloads) | 1 << VIRTIO_NET_F_MRG_RXBUF | (mtu != ETHERNET_MTU) << VIRTIO_NET_F_MTU


def modern_config_space(mac: bytes, mtu: int = ETHERNET_MTU) -> bytes:
    """The configuration space for a modern driver, 12 bytes; `mtu` in bytes, as for `modern_features`."""
    return _CONFIG.pack(config_space(mac), VIRTIO_NET_S_LINK_UP, QUEUES // 2, mtu)


def merges_buffers(features: int) -> bool:
    """Whether a driver that accepted `features` takes a frame that lies in several of its buffers."""
    return bool(features >> VIRTIO_NET_F_MRG_RXBUF & 1)


def header_bytes(features: int) -> int:
    """The size of the header before each frame, for a driver that accepted `features` (virtio 1.0, section 5.1.6.1)."""
    modern = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF
    return MODERN_HEADER_BYTES if features & modern else HEADER_BYTES
