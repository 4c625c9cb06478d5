"""Taps by the numbers (linux/if_tun.h), and what their offloads are to a virtio network device.

Pure: the launcher makes taps (lgmp/network.py), a worker moves frames (workers/net.py), both go by this page.
"""

from __future__ import annotations

from lgmp.virtio.net import (
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
)

TUN_DEVICE = "/dev/net/tun"

# ioctls
TUNSETIFF = 0x400454CA
TUNGETFEATURES = 0x800454CF
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8

# Flags of TUNSETIFF.
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

# What the reader of a tap says that it can be given (TUNSETOFFLOAD). No TSO without CSUM, no ECN without a TSO.
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08

# What a tap is asked for, the most first: kernels differ in what they take.
OFFLOADS = (
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6,
    TUN_F_CSUM,
    0,
)

_GUEST_FEATURES = (
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
)

# What a reader has to take for each kind of segmented frame.
_SEGMENTED = {
    VIRTIO_NET_HDR_GSO_NONE: 0,
    VIRTIO_NET_HDR_GSO_TCPV4: TUN_F_TSO4,
    VIRTIO_NET_HDR_GSO_TCPV6: TUN_F_TSO6,
}


def features_of(offloads: int) -> int:
    """The GUEST feature bits that a tap allows which takes `offloads` (TUN_F_*)."""
    return sum(1 << feature for feature, offload in _GUEST_FEATURES if offloads & offload)


def offloads_for(features: int) -> int:
    """What to tell a tap of a driver that accepted `features`: the TUN_F_* that it may be given.

    A driver that accepts a feature without what that needs (virtio 1.0, section 5.1.3.1) does without it.
    """
    offloads = sum(offload for feature, offload in _GUEST_FEATURES if features >> feature & 1)
    if not offloads & TUN_F_CSUM:
        return 0
    if not offloads & (TUN_F_TSO4 | TUN_F_TSO6):
        offloads &= ~TUN_F_TSO_ECN
    return offloads


def may_be_given(flags: int, gso_type: int, offloads: int) -> bool:
    """Whether a frame whose header says `flags` and `gso_type` may go to a reader that said `offloads`."""
    known = VIRTIO_NET_HDR_F_DATA_VALID | (VIRTIO_NET_HDR_F_NEEDS_CSUM if offloads & TUN_F_CSUM else 0)
    if flags & ~known:
        return False
    if gso_type & VIRTIO_NET_HDR_GSO_ECN and not offloads & TUN_F_TSO_ECN:
        return False
    needed = _SEGMENTED.get(gso_type & ~VIRTIO_NET_HDR_GSO_ECN)
    return needed is not None and offloads & needed == needed
