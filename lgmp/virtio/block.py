"""What a virtio block device and its driver say to each other (virtio 1.0, section 5.2; linux/virtio_blk.h)."""

from __future__ import annotations

from struct import Struct

from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC

SECTOR_BYTES = 512

# A request begins with {u32 type, u32 ioprio, u64 sector} and ends with one status byte.
HEADER = Struct("<IIQ")
HEADER_BYTES = 16
STATUS_BYTES = 1

# Type of a request: a kind, and two bits that modify it.
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_SCSI_CMD = 2
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_BARRIER = 0x80000000

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

# GET_ID is answered with this many bytes, padded with NULs.
VIRTIO_BLK_ID_BYTES = 20

# Feature bits (bit numbers).
VIRTIO_BLK_F_BARRIER = 0
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_FLUSH = 9

_CONFIG = Struct("<QII")


def features(read_only: bool) -> int:
    """The feature bits a block device offers."""
    offered = 1 << VIRTIO_BLK_F_BARRIER | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH
    offered |= 1 << VIRTIO_RING_F_INDIRECT_DESC
    if read_only:
        offered |= 1 << VIRTIO_BLK_F_RO
    return offered


def config_space(capacity: int, queue_num: int) -> bytes:
    """The configuration space: `capacity` in 512-byte sectors, and how many segments a request may have.

    A ring of `queue_num` descriptors leaves two for the header and the status. The layout is {u64 capacity,
    u32 size_max, u32 seg_max}; size_max stays 0, since its feature is not offered.
    """
    return _CONFIG.pack(capacity, 0, queue_num - 2)
