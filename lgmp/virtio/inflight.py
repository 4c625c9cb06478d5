"""The record of a ring's requests in flight: taken from the driver, and not given back yet.

It lies in memory that outlives the process that serves the ring and that the driver cannot reach, so that a successor
can go on exactly where the first one was killed, whichever instruction that was before. Its layout is that of
vhost-user's in-flight region for split rings (QEMU's docs/interop/vhost-user.rst, "Inflight I/O tracking").

    u64 features, u16 version, u16 desc_num, u16 last_batch_head, u16 used_idx,
    then for each descriptor: u8 inflight, 5 bytes of nothing, u16 next, u64 counter

`inflight` is 1 while the chain that begins with that descriptor is in flight; `counter` numbers the requests in the
order in which they were taken. `used_idx` follows the used ring's index, once what that index published is no longer
marked in flight: where the two differ, `last_batch_head` was published and is still marked.
"""

from __future__ import annotations

HEADER_BYTES = 16
DESCRIPTOR_STATE_BYTES = 16
VERSION = 1

# The header as u16: where its fields are.
VERSION_U16 = 4
DESC_NUM_U16 = 5
LAST_BATCH_HEAD_U16 = 6
USED_IDX_U16 = 7


def inflight_bytes(num: int) -> int:
    """The size in bytes of the region of a ring with `num` descriptors."""
    return HEADER_BYTES + num * DESCRIPTOR_STATE_BYTES


class InflightRegion:
    """A view of one ring's region. What it holds is for `lgmp.virtio.ring.Virtqueue` to keep, for others to read."""

    __slots__ = ("counter", "header", "inflight", "next", "num")

    def __init__(self, memory: memoryview, num: int) -> None:
        """`memory`: the region's bytes, writable; `num`: descriptors of its ring.

        A region of zeros is a ring at its start. Raises ValueError where it is too small, or says that it is of another
        size or version.
        """
        size = inflight_bytes(num)
        if len(memory) < size:
            raise ValueError(f"{len(memory)} bytes are no in-flight region of a ring of {num}, that has {size}")
        memory = memory[:size]
        # The header as u16, see *_U16.
        self.header = memory[:HEADER_BYTES].cast("H")
        if self.header[VERSION_U16] not in (0, VERSION) or self.header[DESC_NUM_U16] not in (0, num):
            raise ValueError(
                f"an in-flight region of version {self.header[VERSION_U16]} for {self.header[DESC_NUM_U16]} "
                f"descriptors, not of version {VERSION} for {num}"
            )
        self.header[VERSION_U16] = VERSION
        self.header[DESC_NUM_U16] = num
        # By the chain's head: whether it is in flight; how it is linked to its batch; its number.
        self.inflight = memory[HEADER_BYTES::DESCRIPTOR_STATE_BYTES]
        self.next = memory.cast("H")[(HEADER_BYTES + 6) // 2 :: DESCRIPTOR_STATE_BYTES // 2]
        self.counter = memory.cast("Q")[(HEADER_BYTES + 8) // 8 :: DESCRIPTOR_STATE_BYTES // 8]
        self.num = num

    @property
    def used_idx(self) -> int:
        """The used ring's index, as far as the record has followed it."""
        return self.header[USED_IDX_U16]

    def heads(self) -> list[int]:
        """The heads of the chains that are in flight, in the order in which they were taken."""
        marked = [head for head, inflight in enumerate(self.inflight) if inflight]
        return sorted(marked, key=self.counter.__getitem__)

    def taken(self) -> int:
        """How many requests have been taken in all, over every reset."""
        return max(self.counter)

    def reset(self) -> None:
        """Nothing is in flight, and the ring is at its start. Requests are numbered on."""
        for head in range(self.num):
            self.inflight[head] = 0
        self.header[LAST_BATCH_HEAD_U16] = self.header[USED_IDX_U16] = 0
