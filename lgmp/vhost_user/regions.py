"""Guest memory as a front end shares it: several files, or pieces of one, each at a guest address of its own.

A file is mapped once and from its beginning, however many regions lie in it: a file of huge pages can be mapped from
few offsets, and most guests have two regions of one file, below and above the hole for devices. What lies between the
regions is mapped then as well, and never touched: each address is checked against the regions.
"""

from __future__ import annotations

import mmap
import os
import stat
from bisect import bisect_right
from itertools import pairwise

from lgmp.vhost_user.messages import ProtocolError

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lgmp.vhost_user.messages import RegionDescription

# As many regions a back end takes (GET_MAX_MEM_SLOTS): a front end has one for each piece of memory that is plugged in.
MAX_REGIONS = 128
_ADDRESSES = 1 << 64


class _File:
    """A file of guest memory, mapped from its start."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map the first `size` bytes. Raises OSError and ValueError."""
        self.size = size
        self.view = memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))


class Region:
    """A region that is mapped."""

    __slots__ = ("end", "file", "key", "offset", "size", "start", "user")

    def __init__(self, description: RegionDescription, key: tuple[int, int], file: _File) -> None:
        """`key`: which file it is in, its device and inode."""
        self.start = description.guest
        self.size = description.size
        self.end = description.guest + description.size
        self.user = description.user
        self.offset = description.offset
        self.key = key
        self.file = file

    def is_the_same(self, other: RegionDescription) -> bool:
        """Whether it is what a front end means by `other`, wherever in a file it says that is."""
        return (self.start, self.size, self.user) == (other.guest, other.size, other.user)


class Regions:
    """All guest memory, as lgmp.virtio.ring.Memory.

    `view`, `low` and `limit` are the largest region that lies in its file where it lies in the guest: the lower part of
    its memory, with every front end there is. Addresses there need no arithmetic.
    """

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        """Raises ProtocolError where two of them overlap."""
        self.regions = sorted(regions, key=lambda region: region.start)
        self._starts = [region.start for region in self.regions]
        by_user = sorted(self.regions, key=lambda region: region.user)
        for ordered, what in ((self.regions, "start"), (by_user, "user")):
            for one, other in pairwise(ordered):
                if getattr(one, what) + one.size > getattr(other, what):
                    raise ProtocolError(
                        f"two regions of memory overlap, {one.start:#x}+{one.size:#x} and "
                        f"{other.start:#x}+{other.size:#x}"
                    )
        main = max(
            (region for region in self.regions if region.start == region.offset),
            key=lambda region: region.size,
            default=None,
        )
        self.view = memoryview(b"") if main is None else main.file.view
        self.low = 0 if main is None else main.start
        self.limit = 0 if main is None else main.end

    def pieces(self, address: int, size: int) -> list[memoryview] | None:
        """The `size` bytes from a guest-physical address on; None where some of them are in no region."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        pieces = []
        while True:
            region = self.regions[at]
            room = region.end - address
            if room < 0 or (not room and size):
                return None
            part = min(size, room)
            begin = region.offset + address - region.start
            pieces.append(region.file.view[begin : begin + part])
            size -= part
            if not size:
                return pieces
            address += part
            at += 1
            if at == len(self.regions) or self._starts[at] != address:
                return None

    def guest_address(self, user: int) -> int | None:
        """The guest-physical address of what the front end has at its own address `user`; None where that is none."""
        for region in self.regions:
            if region.user <= user < region.user + region.size:
                return region.start + user - region.user
        return None

    def map_table(self, table: Iterable[RegionDescription], descriptors: Iterable[int]) -> Regions:
        """Other regions in the place of these, each with the descriptor of its file; what is mapped already stays so.

        The descriptors stay the caller's. Raises ProtocolError.
        """
        wanted = [
            (description, *_identify(description, fd)) for description, fd in zip(table, descriptors, strict=True)
        ]
        sizes: dict[tuple[int, int], int] = {}
        for description, _fd, key in wanted:
            sizes[key] = max(sizes.get(key, 0), description.offset + description.size)
        files = {region.key: region.file for region in self.regions}
        made: dict[tuple[int, int], _File] = {}
        for _description, fd, key in wanted:
            if key not in made:
                known = files.get(key)
                made[key] = known if known is not None and known.size >= sizes[key] else _map(fd, sizes[key])
        return Regions([Region(description, key, made[key]) for description, _fd, key in wanted])

    def add(self, description: RegionDescription, descriptor: int) -> Regions:
        """These and one more; the descriptor stays the caller's. Raises ProtocolError."""
        if len(self.regions) >= MAX_REGIONS:
            raise ProtocolError(f"more than {MAX_REGIONS} regions of memory")
        (region,) = self.map_table([description], [descriptor]).regions
        return Regions([*self.regions, region])

    def without(self, description: RegionDescription) -> Regions:
        """These but for one. Raises ProtocolError where there is none such."""
        left = [region for region in self.regions if not region.is_the_same(description)]
        if len(left) != len(self.regions) - 1:
            raise ProtocolError(
                f"there is no region of memory at {description.guest:#x}+{description.size:#x} to remove"
            )
        return Regions(left)


def _identify(description: RegionDescription, descriptor: int) -> tuple[int, tuple[int, int]]:
    """The descriptor, and which file it is, if the region can be in there. Raises ProtocolError."""
    where = f"a region of memory at {description.guest:#x}+{description.size:#x}"
    for start in (description.guest, description.user, description.offset):
        if not description.size or start + description.size > _ADDRESSES:
            raise ProtocolError(f"{where}: no memory has such a size or place")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ProtocolError(f"{where} is in no file that can be mapped; give the guest shared memory")
    if description.offset + description.size > status.st_size:
        raise ProtocolError(f"{where} ends beyond its file, which has {status.st_size:#x} bytes")
    return descriptor, (status.st_dev, status.st_ino)


def _map(descriptor: int, size: int) -> _File:
    try:
        return _File(descriptor, size)
    except (OSError, ValueError, OverflowError) as error:
        what = getattr(error, "strerror", None) or str(error)  # not itself, which has this frame
        raise ProtocolError(f"cannot map {size:#x} bytes of guest memory: {what}") from error
