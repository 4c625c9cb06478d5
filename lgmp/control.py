"""The control page: what must outlive a worker, in a small shared page that the launcher owns.

Each worker has one. It holds the position in each ring and what the driver accepted, so that a worker can be
replaced by another that goes on where it stopped. It holds nothing that a guest can write.
"""

from __future__ import annotations

import mmap
import os

from lgmp import shared_file

CONTROL_PAGE_BYTES = 4096
MAX_QUEUES = 32

# Layout: accepted features (u64) at 0; from 64 on, 64 bytes for each queue:
# next avail index to take (u16) at +0, next used index to write (u16) at +2.
_FEATURES_U64 = 0
_QUEUES_OFFSET = 64
_QUEUE_BYTES = 64
NEXT_AVAIL = 0
NEXT_USED = 1


class ControlPage:
    """The control page of one worker, mapped shared."""

    def __init__(self, fd: int) -> None:
        """Map an existing control page; this object then owns `fd`. Raises ValueError where it is too small."""
        if os.fstat(fd).st_size < CONTROL_PAGE_BYTES:
            raise ValueError("not a control page: too small")
        self.fd = fd
        self._map = mmap.mmap(fd, CONTROL_PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> ControlPage:
        """A fresh page: no features accepted, every ring at its start."""
        return cls(shared_file.create("lgmp-control", CONTROL_PAGE_BYTES))

    @property
    def accepted_features(self) -> int:
        """The feature bits (64) that the driver accepted; the launcher writes them, the worker reads them."""
        return self._words[_FEATURES_U64]

    @accepted_features.setter
    def accepted_features(self, features: int) -> None:
        self._words[_FEATURES_U64] = features

    def position(self, queue: int) -> memoryview:
        """The two u16 of ring `queue`, [NEXT_AVAIL] and [NEXT_USED], as a live view.

        Raises IndexError past MAX_QUEUES.
        """
        if not 0 <= queue < MAX_QUEUES:
            raise IndexError(f"queue {queue} of a device: at most {MAX_QUEUES} have a place in the control page")
        start = _QUEUES_OFFSET + queue * _QUEUE_BYTES
        return memoryview(self._map)[start : start + 4].cast("H")

    def reset(self) -> None:
        """No features accepted, every ring at its start again."""
        for index in range(CONTROL_PAGE_BYTES // 8):
            self._words[index] = 0

    def close(self) -> None:
        """Unmap the page and close its descriptor. Views of positions that are still held keep the mapping alive."""
        self._words.release()
        try:  # noqa: SIM105  contextlib is costly to import in a worker
            self._map.close()
        except BufferError:
            pass
        os.close(self.fd)
