"""The device's side of a split virtqueue (virtio 1.0, section 2.4), read and written in place in guest memory.

The guest is not trusted and runs while we read: every field is read once, checked, and the value that was checked is
the one that is used. A driver that breaks a rule gets a RingError, which is fatal to it (as it was in every lguest
launcher) and says which device, which queue and which descriptor.

Order of memory accesses: x86 keeps loads in order among themselves and stores in order among themselves, which is all
that taking from the available ring and adding to the used ring need. What would need a fence is "allow notifications,
then look again"; so notifications are never suppressed here: VRING_USED_F_NO_NOTIFY is never set.

What was taken and not given back is recorded in an in-flight region (lgmp.virtio.inflight), store by store in such an
order that a successor of this process can go on wherever it was killed.

The file is shaped by its hot path, `Virtqueue.pop` and `Virtqueue.push`: typed views of the rings are made once, a
descriptor is unpacked in one call, and nothing is allocated per request but the slices handed out.
"""

from __future__ import annotations

from struct import Struct

from lgmp.errors import LgmpError
from lgmp.virtio.ids import (
    LGUEST_VRING_ALIGN,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)
from lgmp.virtio.inflight import LAST_BATCH_HEAD_U16, USED_IDX_U16

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from typing import Protocol

    from lgmp.virtio.inflight import InflightRegion

    class Memory(Protocol):
        """What a ring needs of guest memory; lgmp.memory.GuestMemory is one."""

        view: memoryview
        limit: int


# Virtio allows a ring this many descriptors at most (section 2.4: "Maximum Queue Size value is 32768").
MAX_RING = 32768
# The longest indirect table that is looked at; Linux drivers stay far below (seg_max + 2).
MAX_INDIRECT = 1024
DESCRIPTOR_BYTES = 16
USED_ELEMENT_BYTES = 8

# One descriptor {u64 addr, u32 len, u16 flags, u16 next}, and three that lie side by side.
_unpack_one = Struct("<QIHH").unpack_from
_unpack_three = Struct("<QIHHQIHHQIHH").unpack_from

_NEXT_WRITE = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE


class RingError(LgmpError):
    """The driver broke a rule of the ring, or of the device's requests; the message says which and where."""


class VringLayout:
    """Where the three parts of a ring lie, as guest-physical addresses, and how many descriptors it has."""

    __slots__ = ("avail", "desc", "num", "used")

    def __init__(self, num: int, desc: int, avail: int, used: int) -> None:
        """`num`: descriptors; `desc`, `avail`, `used`: guest addresses of the parts. Nothing is checked here."""
        self.num = num
        self.desc = desc
        self.avail = avail
        self.used = used

    @classmethod
    def legacy(cls, num: int, start: int, align: int = LGUEST_VRING_ALIGN) -> VringLayout:
        """A ring in one piece at `start`, its used ring aligned to `align` (vring_init of linux/virtio_ring.h)."""
        avail = start + num * DESCRIPTOR_BYTES
        # Descriptors, then avail: flags, idx, ring[num] and the event index that later drivers put there.
        used = (avail + 2 * (3 + num) + align - 1) & ~(align - 1)
        return cls(num, start, avail, used)

    @staticmethod
    def legacy_bytes(num: int, align: int = LGUEST_VRING_ALIGN) -> int:
        """The size in bytes of a ring in one piece (vring_size of linux/virtio_ring.h)."""
        layout = VringLayout.legacy(num, 0, align)
        return layout.used + 2 * 3 + num * USED_ELEMENT_BYTES

    def __eq__(self, other: object) -> bool:
        """Equal where all four numbers are."""
        if not isinstance(other, VringLayout):
            return NotImplemented
        return str(self) == str(other)

    def __hash__(self) -> int:
        """Goes with `__eq__`."""
        return hash(str(self))

    def __str__(self) -> str:
        """`NUM:DESC:AVAIL:USED`, as a worker's --queue option takes it."""
        return f"{self.num}:{self.desc:#x}:{self.avail:#x}:{self.used:#x}"

    def __repr__(self) -> str:
        """For debugging."""
        return f"VringLayout({self})"

    @classmethod
    def parse(cls, text: str) -> VringLayout:
        """The reverse of `str()`; numbers may be decimal or 0x hexadecimal. Raises ValueError."""
        num, desc, avail, used = (int(field, 0) for field in text.split(":"))
        return cls(num, desc, avail, used)


class Virtqueue:
    """One virtqueue, from the device's side.

    `indirect` says whether the driver accepted VIRTIO_RING_F_INDIRECT_DESC; indirect tables are an error without.
    """

    __slots__ = (
        "_again",
        "_avail",
        "_counter",
        "_counters",
        "_desc",
        "_header",
        "_inflight",
        "_limit",
        "_next_avail",
        "_next_used",
        "_num",
        "_region",
        "_used_head",
        "_used_id",
        "_used_len",
        "_view",
        "indirect",
        "name",
    )

    def __init__(self, memory: Memory, layout: VringLayout, *, name: str, inflight: InflightRegion) -> None:
        """Look at the ring that `layout` places in `memory`.

        `name` begins every error, for example "vda: queue 0". `inflight` is kept up to date, so that another Virtqueue
        can go on from it; it must be of a ring of this size. It is `resume` that takes over what is in it.
        Raises RingError where the ring has an impossible size or place.
        """
        num = layout.num
        if not 1 <= num <= MAX_RING or num & (num - 1):
            raise RingError(f"{name}: a ring of {num} descriptors; it must be a power of two up to {MAX_RING}")
        limit = memory.limit
        parts = (
            ("descriptor table", layout.desc, num * DESCRIPTOR_BYTES, 16),
            ("available ring", layout.avail, 4 + num * 2, 2),
            ("used ring", layout.used, 4 + num * USED_ELEMENT_BYTES, 4),
        )
        for part, start, size, align in parts:
            if start < 0 or start + size > limit or start % align:
                raise RingError(
                    f"{name}: the {part} at {start:#x}+{size} is not within guest memory ({limit:#x})"
                    f" or not a multiple of {align}"
                )
        view = memory.view
        self.name = name
        self.indirect = False
        self._num = num
        self._limit = limit
        self._view = view
        self._desc = view[layout.desc : layout.desc + num * DESCRIPTOR_BYTES]
        # As u16: flags, idx, ring[num].
        self._avail = view[layout.avail : layout.avail + 4 + num * 2].cast("H")
        self._used_head = view[layout.used : layout.used + 4].cast("H")
        elements = view[layout.used + 4 : layout.used + 4 + num * USED_ELEMENT_BYTES].cast("I")
        self._used_id = elements[::2]
        self._used_len = elements[1::2]
        self._region = inflight
        self._inflight = inflight.inflight
        self._counters = inflight.counter
        self._header = inflight.header
        # The number of the next request; the next index to take from avail, and to write of used.
        self._counter = 1
        self._next_avail = self._next_used = 0
        # Heads that a predecessor had taken and not given back, the next one last.
        self._again: list[int] = []

    def resume(self) -> None:
        """Take over the ring from whoever served it before, as the in-flight region tells.

        What was in flight is popped again, in the order in which it was first taken, before anything new. Raises
        RingError where the driver has moved the used ring's index meanwhile, which is the device's.
        """
        region = self._region
        header = self._header
        used = self._used_head[1]
        before = header[USED_IDX_U16]
        if used != before:
            # It was killed after it had published a used element, and before it had recorded that.
            if used != (before + 1) & 0xFFFF or header[LAST_BATCH_HEAD_U16] >= self._num:
                raise RingError(f"{self.name}: the index of used was moved from {before} to {used} by the driver")
            region.inflight[header[LAST_BATCH_HEAD_U16]] = 0
            header[USED_IDX_U16] = used
        heads = region.heads()
        self._counter = region.taken() + 1
        self._next_used = used
        self._next_avail = (used + len(heads)) & 0xFFFF
        heads.reverse()
        self._again = heads

    @property
    def num(self) -> int:
        """How many descriptors the ring has."""
        return self._num

    @property
    def interrupts_suppressed(self) -> bool:
        """Whether the driver asks for no interrupt now (VRING_AVAIL_F_NO_INTERRUPT).

        To be asked by who is about to send the interrupt, in the thread that runs the guest: only there is it
        certain that the driver is not just about to change its mind.
        """
        return bool(self._avail[0] & VRING_AVAIL_F_NO_INTERRUPT)

    # For whoever watches the ring; nothing of it is on the way of a request.

    @property
    def used_index(self) -> int:
        """The used ring's index, as far as the in-flight region has followed it."""
        return self._region.used_idx

    def heads_in_flight(self) -> list[int]:
        """The heads of the chains that are taken and not given back, oldest first."""
        return self._region.heads()

    @property
    def descriptor_table(self) -> memoryview:
        """The ring's descriptors as bytes, as the driver has them now."""
        return self._desc

    @property
    def available_ring(self) -> memoryview:
        """The available ring as bytes: u16 flags, u16 index, u16 heads."""
        return self._avail.cast("B")

    def memory_at(self, address: int, size: int) -> memoryview | None:
        """Guest memory; None where it is not all there."""
        return self._view[address : address + size] if 0 <= address <= self._limit - size else None

    def look_at(self, head: int) -> tuple[int, list[memoryview], list[memoryview]]:
        """The chain `head` as `pop` gives it, without taking it. Raises RingError."""
        return self._walk(head)

    def reset(self) -> None:
        """Start from the beginning of the ring again, as after a reset of the device; touches no guest memory."""
        self._region.reset()
        self._next_avail = self._next_used = 0
        self._again = []
        self.indirect = False

    def pop(self) -> tuple[int, list[memoryview], list[memoryview]] | None:
        """Take the next chain that the driver made available; None where there is none.

        Gives the chain's head (for `push`), the segments the device may read and those it may write, as slices of
        guest memory, all within it; a segment may be empty. Raises RingError where the driver broke a rule.
        """
        if self._again:
            return self._walk(self._again.pop())
        avail = self._avail
        last = self._next_avail
        index = avail[1]
        if index == last:
            return None
        count = self._num
        if (index - last) & 0xFFFF > count:
            # The original launcher's words; it is the index of avail.
            raise RingError(
                f"{self.name}: Guest moved used index from {last} to {index} (that of avail), the ring has {count}"
            )
        head = avail[2 + last % count]
        if head >= count:
            raise RingError(f"{self.name}: Guest says index {head} is available, the ring has {count}")
        if self._inflight[head]:
            raise RingError(f"{self.name}: descriptor {head} is made available again while it is in flight")
        self._next_avail = (last + 1) & 0xFFFF
        # Its number before its mark: who is marked has one.
        self._counters[head] = self._counter
        self._counter += 1
        self._inflight[head] = 1

        # Most requests are three descriptors side by side, the second of which is the data: take them in one go.
        # What does not fit that or breaks a rule goes the long way.
        if head + 3 <= count:
            start, size, flags, follows, start1, size1, flags1, follows1, start2, size2, flags2, _ = _unpack_three(
                self._desc, head << 4
            )
            if flags == VRING_DESC_F_NEXT and flags2 == VRING_DESC_F_WRITE and follows == head + 1 == follows1 - 1:
                limit = self._limit
                end = start + size
                end1 = start1 + size1
                end2 = start2 + size2
                if end <= limit and end1 <= limit and end2 <= limit:
                    view = self._view
                    if flags1 == _NEXT_WRITE:
                        return head, [view[start:end]], [view[start1:end1], view[start2:end2]]
                    if flags1 == VRING_DESC_F_NEXT:
                        return head, [view[start:end], view[start1:end1]], [view[start2:end2]]
        return self._walk(head)

    def _walk(self, head: int) -> tuple[int, list[memoryview], list[memoryview]]:
        """The chain that begins with descriptor `head`, as `pop` gives it."""
        view = self._view
        limit = self._limit
        table = self._desc
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        at = head
        count = left = self._num
        through = -1  # the descriptor that led into an indirect table
        while True:
            if not left:
                raise RingError(f"{self._where(at, through)}: Looped descriptor, the chain is longer than {count}")
            left -= 1
            start, size, flags, follows = _unpack_one(table, at << 4)
            end = start + size
            if end > limit:
                where = self._where(at, through)
                raise RingError(f"{where}: Invalid address {start:#x}+{size} is outside guest memory ({limit:#x})")
            if flags & VRING_DESC_F_INDIRECT:
                self._check_indirect(at, through, size, flags)
                through = at
                table = view[start:end]
                count = left = size >> 4
                at = 0
                continue
            if flags & VRING_DESC_F_WRITE:
                writable.append(view[start:end])
            elif writable:
                raise RingError(f"{self._where(at, through)}: Descriptor has out after in")
            else:
                readable.append(view[start:end])
            if not flags & VRING_DESC_F_NEXT:
                return head, readable, writable
            if follows >= count:
                raise RingError(f"{self._where(at, through)}: Desc next is {follows}, the table has {count}")
            at = follows

    def push(self, head: int, written: int) -> None:
        """Give the chain `head` back to the driver, with `written` bytes written to its writable segments.

        The driver may look at it at once; whoever runs the guest is yet to be told that there is an interrupt to send.
        """
        index = self._next_used
        slot = index % self._num
        self._used_id[slot] = head
        self._used_len[slot] = written
        header = self._header
        header[LAST_BATCH_HEAD_U16] = head
        # The element before the index, the index before our own record of it: the order in which others may look.
        self._next_used = index = (index + 1) & 0xFFFF
        self._used_head[1] = index
        self._inflight[head] = 0
        header[USED_IDX_U16] = index

    def _where(self, at: int, through: int) -> str:
        if through < 0:
            return f"{self.name}: descriptor {at}"
        return f"{self.name}: descriptor {through}: entry {at} of its indirect table"

    def _check_indirect(self, at: int, through: int, size: int, flags: int) -> None:
        """Raise RingError unless a descriptor with the INDIRECT flag may stand here (virtio 1.0, section 2.4.5.3)."""
        where = self._where(at, through)
        if not self.indirect:
            raise RingError(f"{where}: INDIRECT, but the driver has not accepted VIRTIO_RING_F_INDIRECT_DESC")
        if through >= 0:
            raise RingError(f"{where}: INDIRECT within an indirect table")
        if flags & VRING_DESC_F_NEXT:
            raise RingError(f"{where}: both INDIRECT and NEXT")
        if not size or size % DESCRIPTOR_BYTES:
            raise RingError(
                f"{where}: Invalid size for indirect buffer table, {size} is not a multiple of {DESCRIPTOR_BYTES}"
            )
        if size > MAX_INDIRECT * DESCRIPTOR_BYTES:
            raise RingError(
                f"{where}: an indirect table of {size // DESCRIPTOR_BYTES} descriptors, at most {MAX_INDIRECT} may be"
            )
