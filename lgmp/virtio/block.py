"""What a virtio block device and its driver say to each other (virtio 1.0, section 5.2; linux/virtio_blk.h).

A legacy driver (an lguest guest's) is offered `features` and `config_space`, a modern one `modern_features` and
`modern_config_space`. DISCARD and WRITE_ZEROES are of virtio 1.1.
"""

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
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_T_BARRIER = 0x80000000

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

# GET_ID is answered with this many bytes, padded with NULs.
VIRTIO_BLK_ID_BYTES = 20

# Feature bits (bit numbers).
VIRTIO_BLK_F_BARRIER = 0
VIRTIO_BLK_F_SIZE_MAX = 1
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14

# The data of DISCARD and WRITE_ZEROES: struct virtio_blk_discard_write_zeroes {le64 sector, le32 num_sectors, le32
# flags}, once for each range.
RANGE = Struct("<QII")
RANGE_BYTES = 16
# In `flags`, of WRITE_ZEROES alone: the range may become a hole.
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

# What a modern driver is told. Sizes are in 512-byte sectors where they are called so, and in bytes otherwise.
# A request of Linux: so many segments are what a ring of 128 has room for, beside header and status.
SEG_MAX = 126
# With so many bytes each, SEG_MAX segments are still one preadv (2 GiB less a page, MAX_RW_COUNT). A power of two it is
# not: SeaBIOS takes the low 16 bits of SEG_MAX * SIZE_MAX for the bytes of a request, and none is no way to boot.
SIZE_MAX = (16 << 20) + 4096
# Holes cost next to nothing. Zeros may have to be written, by a worker that does nothing else meanwhile: 128 MiB.
MAX_DISCARD_SECTORS = 1 << 22
MAX_DISCARD_SEG = 16
MAX_WRITE_ZEROES_SECTORS = 1 << 16
MAX_WRITE_ZEROES_SEG = 4
# What file systems and the page cache work with: less is read before it is written, and never becomes a hole.
_PHYSICAL_BLOCK_BYTES = 4096

_CONFIG = Struct("<QII")
# struct virtio_blk_config as far as write_zeroes_may_unmap and the padding behind it.
_MODERN_CONFIG = Struct("<QII HBB I BBHI BxH III II B3x")


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


def modern_features(*, read_only: bool, queues: int, can_discard: bool) -> int:
    """The feature bits a block device with `queues` rings offers a modern driver; those of the bus are not among them.

    `can_discard`: whether its file can have holes (lgmp.holes.can_punch). Zeros can be written in any case.
    """
    bits = [
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_RING_F_INDIRECT_DESC,
    ]
    if queues > 1:
        bits.append(VIRTIO_BLK_F_MQ)
    if read_only:
        bits.append(VIRTIO_BLK_F_RO)
    else:
        bits.append(VIRTIO_BLK_F_WRITE_ZEROES)
        if can_discard:
            bits.append(VIRTIO_BLK_F_DISCARD)
    return sum(1 << bit for bit in bits)


def modern_config_space(capacity: int, *, queues: int, block_size: int, can_discard: bool) -> bytes:
    """The 60 bytes of struct virtio_blk_config: `capacity` in 512-byte sectors, `block_size` in bytes.

    What belongs to a feature that is not offered is there all the same, and means nothing.
    """
    physical = max(block_size, _PHYSICAL_BLOCK_BYTES)
    blocks = physical // block_size
    return _MODERN_CONFIG.pack(
        capacity,
        SIZE_MAX,
        SEG_MAX,
        *(0, 0, 0),  # the geometry, of a feature that nobody needs
        block_size,
        *(blocks.bit_length() - 1, 0, blocks, 0),  # the topology: log2 of blocks, the first is aligned, no optimum
        1,  # the cache is written back at a FLUSH, and that cannot be changed
        queues,
        *((MAX_DISCARD_SECTORS, MAX_DISCARD_SEG, physical // SECTOR_BYTES) if can_discard else (0, 0, 0)),
        *(MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEG),
        can_discard,
    )
