"""The control page: what must outlive a worker, in a small shared file that the launcher owns.

There is one for each device. A worker that was killed is replaced by another that goes on from what is in here: what
the driver accepted, the requests in flight of each ring, and a little state of the device's own. The guest cannot
reach it.

Statistics lie here too. Whoever counts writes his own numbers in place, and they cost nobody anything until they are
read: by `lgmp ps`, at a time of its own.
"""

from __future__ import annotations

import mmap
import os

from lgmp import shared_file
from lgmp.virtio.inflight import InflightRegion, inflight_bytes

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence

# Indexes into `ControlPage.statistics`, all u64.
KICKS = 0  # wake-ups of the worker by a kick; the worker counts
INTERRUPTS = 1  # sent to the guest; the launcher counts
BYTES_IN = 2  # given to the guest; the worker counts
BYTES_OUT = 3  # taken from the guest; the worker counts
ERRORS = 4  # requests answered with an error, frames dropped and the like; the worker counts
STATISTICS = 8

# What a device may keep for its successor, in bytes.
STATE_BYTES = 1024

# Layout, in bytes: accepted features (u64), live (u64), statistics; the device's state; then, each on a cache line of
# its own, the in-flight regions of the rings (lgmp.virtio.inflight).
_FEATURES_U64 = 0
_LIVE_U64 = 1
_STATISTICS_OFFSET = 64
_STATE_OFFSET = 1024
_QUEUES_OFFSET = 2048
_CACHE_LINE = 64


def control_bytes(nums: Sequence[int]) -> int:
    """The size in bytes of the control page of a device whose rings have `nums` descriptors."""
    return _offsets(nums)[-1]


def _offsets(nums: Sequence[int]) -> list[int]:
    """Where the region of each ring begins, and behind them all the page's end."""
    offsets = [_QUEUES_OFFSET]
    for num in nums:
        offsets.append(offsets[-1] + (inflight_bytes(num) + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE)
    offsets[-1] = (offsets[-1] + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    return offsets


class ControlPage:
    """The control page of one device, mapped shared."""

    def __init__(self, fd: int, nums: Sequence[int]) -> None:
        """Map an existing control page; `nums`: descriptors of each ring. This object then owns `fd`.

        Raises ValueError where it is too small, or one for other rings.
        """
        size = control_bytes(nums)
        if os.fstat(fd).st_size < size:
            raise ValueError("not a control page: too small")
        self.fd = fd
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        view = memoryview(self._map)
        self._words = view[:_STATISTICS_OFFSET].cast("Q")
        self.statistics = view[_STATISTICS_OFFSET : _STATISTICS_OFFSET + 8 * STATISTICS].cast("Q")
        self.state = view[_STATE_OFFSET : _STATE_OFFSET + STATE_BYTES]
        # The record of the requests in flight of each ring.
        self.inflight = [InflightRegion(view[offset:], num) for offset, num in zip(_offsets(nums), nums, strict=False)]

    @classmethod
    def create(cls, nums: Sequence[int]) -> ControlPage:
        """A fresh page: no features accepted, every ring at its start."""
        return cls(shared_file.create("lgmp-control", control_bytes(nums)), nums)

    @property
    def accepted_features(self) -> int:
        """The feature bits (64) that the driver accepted; the launcher writes them, the worker reads them."""
        return self._words[_FEATURES_U64]

    @accepted_features.setter
    def accepted_features(self, features: int) -> None:
        self._words[_FEATURES_U64] = features

    @property
    def live(self) -> bool:
        """Whether a driver works with the rings; the launcher writes it, a worker reads it at its start."""
        return bool(self._words[_LIVE_U64])

    @live.setter
    def live(self, live: bool) -> None:
        self._words[_LIVE_U64] = live

    def position(self, queue: int) -> tuple[int, int]:
        """The next index to take from the available ring, and the next to write of the used ring."""
        region = self.inflight[queue]
        used = region.used_idx
        return (used + sum(region.inflight)) & 0xFFFF, used

    def reset(self) -> None:
        """No features accepted, every ring at its start, nothing in flight. Counts and the device's state stay."""
        self.live = False
        self.accepted_features = 0
        for region in self.inflight:
            region.reset()

    def close(self) -> None:
        """Unmap the page and close its descriptor. Views that are still held keep the mapping alive."""
        self._words.release()
        try:  # noqa: SIM105  contextlib is costly to import in a worker
            self._map.close()
        except BufferError:
            pass
        os.close(self.fd)
