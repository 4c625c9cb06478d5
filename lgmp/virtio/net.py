"""What a virtio network device and its driver agree on (virtio 1.0, section 5.1; linux/virtio_net.h), as lguest has it.

Two queues, and before each frame the legacy header of 10 bytes: merged receive buffers, whose header has 12, are not
offered, as no lguest launcher had them.
"""

from __future__ import annotations

from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_RING_F_INDIRECT_DESC

RECEIVE_QUEUE = 0
TRANSMIT_QUEUE = 1
QUEUES = 2

# struct virtio_net_hdr: u8 flags, u8 gso_type, u16 hdr_len, u16 gso_size, u16 csum_start, u16 csum_offset
HEADER_BYTES = 10
VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
VIRTIO_NET_HDR_F_DATA_VALID = 2
VIRTIO_NET_HDR_GSO_NONE = 0
VIRTIO_NET_HDR_GSO_TCPV4 = 1
VIRTIO_NET_HDR_GSO_TCPV6 = 4
VIRTIO_NET_HDR_GSO_ECN = 0x80

# Feature bits (bit numbers). HOST: the driver may send such to us; GUEST: we may send such to the driver.
VIRTIO_NET_F_CSUM = 0
VIRTIO_NET_F_GUEST_CSUM = 1
VIRTIO_NET_F_MAC = 5
VIRTIO_NET_F_GUEST_TSO4 = 7
VIRTIO_NET_F_GUEST_TSO6 = 8
VIRTIO_NET_F_GUEST_ECN = 9
VIRTIO_NET_F_HOST_TSO4 = 11
VIRTIO_NET_F_HOST_TSO6 = 12
VIRTIO_NET_F_HOST_ECN = 13

MAC_BYTES = 6

# What a tap with a header before each frame takes from the driver, whatever it can hand to it.
HOST_OFFLOADS = (
    1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6 | 1 << VIRTIO_NET_F_HOST_ECN
)


def features(offloads: int = 0) -> int:
    """The feature bits a network device offers; `offloads`: the mask of those that its host side has."""
    return 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_F_ANY_LAYOUT | 1 << VIRTIO_RING_F_INDIRECT_DESC | offloads


def config_space(mac: bytes) -> bytes:
    """The configuration space: the guest's MAC address, 6 bytes."""
    if len(mac) != MAC_BYTES:
        raise ValueError(f"a MAC address has {MAC_BYTES} bytes, not {len(mac)}")
    return mac
