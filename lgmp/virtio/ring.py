"""The device's side of a split virtqueue (virtio 1.0, section 2.4), read and written in place in guest memory.

The guest is not trusted and runs while we read: every field is read once, checked, and the value that was checked is
the one that is used. A driver that breaks a rule gets a RingError, which is fatal to it (as it was in every lguest
launcher) and says which device, which queue and which descriptor.

Order of memory accesses: x86 keeps loads in order among themselves and stores in order among themselves, which is all
that taking from the available ring and adding to the used ring need. "Ask for kicks, then look again" and "publish,
then ask whether a call is wanted" need a fence between the store and the load (`full_barrier`), on both sides. Not
every guest has one: an emulated one does not. So whoever serves such a ring never suppresses its kicks, and leaves
`look`, `enable_kicks` and `needs_call` alone.

What was taken and not given back is recorded in an in-flight region (lgmp.virtio.inflight), store by store in such an
order that a successor of this process can go on wherever it was killed.

The file is shaped by its hot path, `Virtqueue.pop` and `Virtqueue.push`: typed views of the rings are made once, a
descriptor is unpacked in one call, and nothing is allocated per request but the slices handed out.
"""

from __future__ import annotations

from _thread import allocate_lock
from array import array
from struct import Struct

from lgmp.errors import LgmpError
from lgmp.virtio.ids import (
    LGUEST_VRING_ALIGN,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from lgmp.virtio.inflight import LAST_BATCH_HEAD_U16, USED_IDX_U16

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol, TypeAlias

    from lgmp.virtio.inflight import InflightRegion

    # What `Virtqueue.peek` gives: where in `Virtqueue.view` the header begins, the data begins and ends; whether the
    # data is to be written; where the trailer begins.
    Request: TypeAlias = tuple[int, int, int, bool, int]

    class Memory(Protocol):
        """What a ring needs of guest memory: lgmp.memory.GuestMemory is one, lgmp.vhost_user.regions.Regions another.

        From guest address `low` up to `limit` lies what is wanted most, as `view[address]`. There may be more.
        """

        view: memoryview
        low: int
        limit: int

        def pieces(self, address: int, size: int) -> list[memoryview] | None:
            """The `size` bytes from a guest address on, in as few pieces as can be; None where some are no memory."""


# Virtio allows a ring this many descriptors at most (section 2.4: "Maximum Queue Size value is 32768").
MAX_RING = 32768
# The longest indirect table that is looked at; Linux drivers stay far below (seg_max + 2).
MAX_INDIRECT = 1024
# So many chains at most are shown by `Virtqueue.peek`, and answered at once.
MOST_AT_ONCE = 32
DESCRIPTOR_BYTES = 16
USED_ELEMENT_BYTES = 8

# One descriptor {u64 addr, u32 len, u16 flags, u16 next}, and three that lie side by side.
_unpack_one = Struct("<QIHH").unpack_from
_iterate = Struct("<QIHH").iter_unpack
_unpack_three = Struct("<QIHHQIHHQIHH").unpack_from
# The same with flags and next as one number, their link: it is compared as one.
_unpack_linked = Struct("<QIIQIIQII").unpack_from

_NEXT_WRITE = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE
# The links of the first two of three that lie side by side, beyond head << 16.
_FIRST_LINK = VRING_DESC_F_NEXT | 1 << 16
_SECOND_LINK = VRING_DESC_F_NEXT | 2 << 16
_SECOND_LINK_WRITE = _NEXT_WRITE | 2 << 16

# Requests are numbered in 64 bits. Who finds larger numbers than this in a region was not left them by one of us.
_COUNTER_MAX = 1 << 62

_lock = allocate_lock()
_acquire = _lock.acquire
_release = _lock.release


def full_barrier() -> None:
    """No load after this is done before the stores ahead of it are seen by others.

    To take a lock is an atomic compare-and-exchange, and x86 lets nothing pass one of these (Intel SDM, volume 3,
    section 8.2.3.9). Nobody else ever has this one.
    """
    _acquire()
    _release()


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
        "_avail_event",
        "_called_for",
        "_counter",
        "_counters",
        "_desc",
        "_event_idx",
        "_header",
        "_inflight",
        "_limit",
        "_low",
        "_memory",
        "_next_avail",
        "_next_used",
        "_num",
        "_peeked",
        "_peeked_from",
        "_region",
        "_seen",
        "_used_event",
        "_used_head",
        "_used_id",
        "_used_len",
        "_view",
        "indirect",
        "lag",
        "name",
    )

    def __init__(
        self,
        memory: Memory,
        layout: VringLayout,
        *,
        name: str,
        inflight: InflightRegion,
        event_idx: bool = False,
    ) -> None:
        """Look at the ring that `layout` places in `memory`.

        `name` begins every error, for example "vda: queue 0". `inflight` is kept up to date, so that another Virtqueue
        can go on from it; it must be of a ring of this size or a larger one. It is `resume` that takes over what is in
        it. `event_idx`: whether the driver accepted VIRTIO_RING_F_EVENT_IDX.
        Raises RingError where the ring has an impossible size or place.
        """
        num = layout.num
        if not 1 <= num <= MAX_RING or num & (num - 1):
            raise RingError(f"{name}: a ring of {num} descriptors; it must be a power of two up to {MAX_RING}")
        if num > inflight.num:
            raise RingError(f"{name}: a ring of {num} descriptors, and the in-flight region is of {inflight.num}")
        event = 2 if event_idx else 0
        self.name = name
        self.indirect = False
        self._num = num
        self._memory = memory
        self._low = memory.low
        self._limit = memory.limit
        self._view = memory.view
        self._desc = self._part("descriptor table", layout.desc, num * DESCRIPTOR_BYTES, 16)
        # As u16: flags, idx, ring[num]; with EVENT_IDX, used_event.
        avail = self._part("available ring", layout.avail, 4 + num * 2 + event, 2).cast("H")
        used = self._part("used ring", layout.used, 4 + num * USED_ELEMENT_BYTES + event, 4)
        self._avail = avail[: 2 + num]
        self._used_event = avail[2 + num :]
        self._used_head = used[:4].cast("H")
        elements = used[4 : 4 + num * USED_ELEMENT_BYTES].cast("I")
        self._used_id = elements[::2]
        self._used_len = elements[1::2]
        self._avail_event = used[4 + num * USED_ELEMENT_BYTES :].cast("H")
        self._event_idx = event_idx
        self._region = inflight
        self._inflight = inflight.inflight
        self._counters = inflight.counter
        self._header = inflight.header
        # The number of the next request; the next index to take from avail, and to write of used.
        self._counter = 1
        self._next_avail = self._next_used = 0
        # How far avail has gone ahead of what is used and in flight: requests that are lost, where it is not 0.
        self.lag = 0
        # Heads that a predecessor had taken and not given back, the next one last.
        self._again: list[int] = []
        # Heads that `peek` has looked at last, and the index of avail of the first of them.
        self._peeked: list[int] = []
        self._peeked_from = 0
        # The index of avail when it was last looked at, and that of used when a call was last asked about.
        self._seen = 0
        self._called_for = -1

    def _part(self, part: str, start: int, size: int, align: int) -> memoryview:
        """One of the parts of the ring, checked."""
        pieces = self._memory.pieces(start, size) if start >= 0 and not start % align else None
        if pieces is None or len(pieces) != 1:
            raise RingError(
                f"{self.name}: the {part} at {start:#x}+{size} is not within guest memory ({self._limit:#x})"
                f" or not a multiple of {align}"
            )
        return pieces[0]

    def begin(self, base: int) -> None:
        """A driver begins to use the ring, or goes on with it elsewhere: avail is to be taken from index `base` on.

        The used index is what the ring says. Where the in-flight region, which is then somebody's who served the ring
        before, has requests in it, it is they that count, and not `base`. `resume` is to follow.
        """
        used = self._used_head[1]
        self.lag = 0
        if not any(self._inflight):
            self._header[USED_IDX_U16] = used
            self.lag = (base - used) & 0xFFFF

    def stop(self) -> int:
        """Let go of the ring: nothing is taken or given back any more. Gives the index of avail to begin from again.

        What is in flight goes back as if it had never been taken, if it is what was taken last; else (of a device that
        answers in another order than it takes) the region goes on telling of it.
        """
        heads = self._region.heads()
        numbers = [self._counters[head] for head in heads]
        base = (self._header[USED_IDX_U16] + self.lag) & 0xFFFF
        taken = self._region.taken()
        if numbers != list(range(taken - len(numbers) + 1, taken + 1)):
            return (base + len(heads)) & 0xFFFF
        # The newest first: who finds the rest finds the oldest.
        for head in reversed(heads):
            self._inflight[head] = 0
        return base

    def resume(self) -> None:
        """Take over the ring from whoever served it before, as the in-flight region tells.

        What was in flight is popped again, in the order in which it was first taken, before anything new. Raises
        RingError where the driver has moved the used ring's index meanwhile, which is the device's.
        """
        region = self._region
        header = self._header
        used = self._used_head[1]
        before = header[USED_IDX_U16]
        if 0 < (used - before) & 0xFFFF <= MOST_AT_ONCE and not any(region.inflight):
            # What was not recorded was answered at once, and published.
            header[USED_IDX_U16] = used
        elif used != before:
            # It was killed after it had published used elements, and before it had recorded that.
            for head in self._last_batch((used - before) & 0xFFFF, before, used):
                region.inflight[head] = 0
            header[USED_IDX_U16] = used
        heads = region.heads()
        taken = region.taken()
        if (heads and max(heads) >= self._num) or taken > _COUNTER_MAX:
            raise RingError(f"{self.name}: the in-flight region is of another ring")
        self._counter = taken + 1
        self._next_used = used
        self._next_avail = (used + len(heads) + self.lag) & 0xFFFF
        heads.reverse()
        self._again = heads
        self._called_for = -1

    def _last_batch(self, size: int, before: int, used: int) -> list[int]:
        """The heads of the batch that moved the used index from `before` to `used`, by `size`."""
        heads = [self._header[LAST_BATCH_HEAD_U16]]
        if size <= self._num:
            while len(heads) < size and heads[-1] < self._num:
                heads.append(self._region.next[heads[-1]])
        if len(set(heads)) != size or max(heads) >= self._num:
            raise RingError(f"{self.name}: the index of used was moved from {before} to {used} by the driver")
        return heads

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
        """Guest memory, in one piece; None where it is not all there."""
        pieces = self._memory.pieces(address, size) if address >= 0 else None
        return pieces[0] if pieces is not None and len(pieces) == 1 else None

    def look_at(self, head: int) -> tuple[int, list[memoryview], list[memoryview]]:
        """The chain `head` as `pop` gives it, without taking it. Raises RingError."""
        return self._walk(head)

    def reset(self) -> None:
        """Start from the beginning of the ring again, as after a reset of the device; touches no guest memory."""
        self._region.reset()
        self._next_avail = self._next_used = self.lag = 0
        self._again = []
        self._called_for = -1
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
                low = self._low
                end = start + size
                end1 = start1 + size1
                end2 = start2 + size2
                if start >= low <= start1 and low <= start2 and end <= limit and end1 <= limit >= end2:
                    view = self._view
                    if flags1 == _NEXT_WRITE:
                        return head, [view[start:end]], [view[start1:end1], view[start2:end2]]
                    if flags1 == VRING_DESC_F_NEXT:
                        return head, [view[start:end], view[start1:end1]], [view[start2:end2]]
        return self._walk(head)

    def peek(self, most: int, header: int, trailer: int) -> list[Request] | None:
        """The next chains, at most `most`, as far as they are requests of the commonest shape; they are not taken.

        That is a header to read of `header` bytes, data, and `trailer` bytes to write, in three descriptors side by
        side or in an indirect table of three, all in the memory that `view` is. What comes first and is of another
        shape, or breaks a rule, is for `pop`; None where there is nothing.

        What is answered at once, and in its order, by `answer`, need not be recorded: what is not used yet is still in
        the available ring, where a successor finds it. So this is for a device that holds no other chains of the ring.
        """
        found: list[Request] = []
        if self._again:
            return found
        avail = self._avail
        at = self._next_avail
        count = self._num
        ready = (avail[1] - at) & 0xFFFF
        if not ready:
            return None
        if ready > count:
            return found
        self._peeked_from = at
        at = 2 + at % count
        if ready == 1:
            # With a request at a time this and its like in `answer` make a seventh of all that a driver waits for.
            heads = [avail[at]]
        else:
            ready = min(ready, most, MOST_AT_ONCE)
            heads = avail[at : at + ready].tolist()
            if len(heads) < ready:
                heads += avail[2 : 2 + ready - len(heads)].tolist()
        self._peeked = heads
        table = self._desc
        view = self._view
        low = self._low
        limit = self._limit
        last_head = count - 3
        last_header = limit - header
        last_trailer = limit - trailer
        for head in heads:
            if head > last_head:
                break
            start, size, link, data, data_size, data_link, end, end_size, end_link = _unpack_linked(table, head << 4)
            base = head << 16
            if link & VRING_DESC_F_INDIRECT:
                if size != 3 * DESCRIPTOR_BYTES or not self.indirect or start < low or start + size > limit:
                    break
                if link & 0xFFFF != VRING_DESC_F_INDIRECT:
                    break
                start, size, link, data, data_size, data_link, end, end_size, end_link = _unpack_linked(view, start)
                base = 0
            data_end = data + data_size
            data_link -= base
            if (
                link - base != _FIRST_LINK
                or (data_link != _SECOND_LINK_WRITE and data_link != _SECOND_LINK)  # noqa: PLR1714  made for speed
                or end_link & 0xFFFF != VRING_DESC_F_WRITE
                or size != header
                or end_size != trailer
                or start > last_header
                or data_end > limit
                or end > last_trailer
                or (low and (start < low or data < low or end < low))
            ):
                break
            found.append((start, data, data_end, data_link == _SECOND_LINK_WRITE, end))
        return found

    def answer(self, written: list[int]) -> None:
        """Take and give back the first of the chains that `peek` has shown, in that order: bytes written to each.

        The driver sees all of them or none.
        """
        index = self._next_used
        taken = self._next_avail
        count = self._num
        number = len(written)
        at = (taken - self._peeked_from) & 0xFFFF
        slot = index % count
        end = slot + number
        # They are numbered as others are, though one number is all that is kept of them.
        self._counter += number
        if number == 1:
            head = self._peeked[at]
            self._used_id[slot] = head
            self._used_len[slot] = written[0]
            self._counters[head] = self._counter - 1
        elif number:
            heads = self._peeked[at : at + number]
            if end <= count:
                self._used_id[slot:end] = array("I", heads)
                self._used_len[slot:end] = array("I", written)
            else:
                for head, length in zip(heads, written, strict=False):
                    self._used_id[slot] = head
                    self._used_len[slot] = length
                    slot = (slot + 1) % count
            self._counters[heads[-1]] = self._counter - 1
        self._next_avail = (taken + number) & 0xFFFF
        self._next_used = index = (index + number) & 0xFFFF
        self._used_head[1] = index
        self._header[USED_IDX_U16] = index

    @property
    def waiting(self) -> int:
        """How many chains there are to take; whatever the driver says, if it broke a rule."""
        return ((self._avail[1] - self._next_avail) & 0xFFFF) + len(self._again)

    @property
    def view(self) -> memoryview:
        """The memory that the places of a `Request` are in."""
        return self._view

    def _walk(self, head: int) -> tuple[int, list[memoryview], list[memoryview]]:  # noqa: PLR0912  one for each rule
        """The chain that begins with descriptor `head`, as `pop` gives it."""
        view = self._view
        low = self._low
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
            if low <= start and end <= limit:
                segment = view[start:end]
                others = None
            else:
                segment, others = self._elsewhere(at, through, start, size)
            if flags & VRING_DESC_F_INDIRECT:
                self._check_indirect(at, through, size, flags)
                through = at
                table = memoryview(b"".join((segment, *others))) if others else segment
                if not readable and not writable and (straight := self._straight(table)) is not None:
                    return head, *straight
                count = left = size >> 4
                at = 0
                continue
            if flags & VRING_DESC_F_WRITE:
                writable.append(segment)
                if others:
                    writable += others
            elif writable:
                raise RingError(f"{self._where(at, through)}: Descriptor has out after in")
            else:
                readable.append(segment)
                if others:
                    readable += others
            if not flags & VRING_DESC_F_NEXT:
                return head, readable, writable
            if follows >= count:
                raise RingError(f"{self._where(at, through)}: Desc next is {follows}, the table has {count}")
            at = follows

    def _straight(self, table: memoryview) -> tuple[list[memoryview], list[memoryview]] | None:
        """The segments of an indirect table each entry of which leads to the next one, as in most; else None.

        It is also None where an entry breaks a rule, or leads to memory that is not where most of it is.
        """
        view = self._view
        low = self._low
        limit = self._limit
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        for at, (start, size, flags, follows) in enumerate(_iterate(table), 1):
            end = start + size
            if start < low or end > limit:
                return None
            if flags & VRING_DESC_F_WRITE:
                writable.append(view[start:end])
            elif writable:
                return None
            else:
                readable.append(view[start:end])
            if flags & ~_NEXT_WRITE:
                return None
            if not flags & VRING_DESC_F_NEXT:
                return readable, writable
            if follows != at:
                return None
        return None

    def _elsewhere(self, at: int, through: int, start: int, size: int) -> tuple[memoryview, list[memoryview] | None]:
        """Memory that is not where most of it is: its first piece, and the others where there are more."""
        pieces = self._memory.pieces(start, size)
        if pieces is None:
            where = self._where(at, through)
            raise RingError(f"{where}: Invalid address {start:#x}+{size} is outside guest memory ({self._limit:#x})")
        return (pieces[0], pieces[1:]) if len(pieces) > 1 else (pieces[0], None)

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

    def push_all(self, answers: Sequence[tuple[int, int]]) -> None:
        """Give back several chains, (head, bytes written) each, so that the driver sees all of them or none."""
        header = self._header
        links = self._region.next
        index = self._next_used
        for head, written in answers:
            slot = index % self._num
            self._used_id[slot] = head
            self._used_len[slot] = written
            links[head] = header[LAST_BATCH_HEAD_U16]
            header[LAST_BATCH_HEAD_U16] = head
            index = (index + 1) & 0xFFFF
        self._next_used = index
        self._used_head[1] = index
        for head, _written in answers:
            self._inflight[head] = 0
        header[USED_IDX_U16] = index

    # Kicks and calls, for a driver that runs at the same time and keeps to the fences (virtio 1.0, section 2.4.7).

    def look(self) -> bool:
        """Note how far avail has come, before it is served; gives whether that is further than it was last time."""
        index = self._avail[1]
        if index == self._seen:
            return False
        self._seen = index
        return True

    def spin(self, rounds: int) -> bool:
        """Wait for avail to go beyond what was noted by `look`, for so many looks at it; gives whether it has."""
        avail = self._avail
        seen = self._seen
        for _ in range(rounds):  # noqa: SIM110  any() would take twice as long
            if avail[1] != seen:
                return True
        return False

    def disable_kicks(self) -> None:
        """The ring is looked at anyway for now: let the driver save itself the kicks. It may kick all the same."""
        if not self._event_idx:
            self._used_head[0] = VRING_USED_F_NO_NOTIFY

    def enable_kicks(self) -> bool:
        """Ask for a kick when avail goes beyond what was noted by `look`; gives whether it has already."""
        if self._event_idx:
            self._avail_event[0] = self._seen
        else:
            self._used_head[0] = 0
        full_barrier()
        return self._avail[1] != self._seen

    def needs_call(self) -> bool:
        """Whether the driver wants to be called for what was given back since this was asked last."""
        used = self._next_used
        before = self._called_for
        self._called_for = used
        full_barrier()
        if not self._event_idx:
            return not self._avail[0] & VRING_AVAIL_F_NO_INTERRUPT
        # Where the event index lies between the two, modulo 65536 (vring_need_event of linux/virtio_ring.h).
        return before < 0 or (used - self._used_event[0] - 1) & 0xFFFF < ((used - before) & 0xFFFF)

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
