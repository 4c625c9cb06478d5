"""The ring by itself: whatever lies in guest memory, and however damaged the record of what is in flight."""

from __future__ import annotations

import struct
from random import Random

from fuzzing.guest import BrokenPromise, GuardedMemory, HostileGuest, Part, WatchedVirtqueue, fresh_region
from lgmp.virtio.inflight import LAST_BATCH_HEAD_U16, USED_IDX_U16, InflightRegion
from lgmp.virtio.ring import RingError, VringLayout

_RAM_BYTES = 0x8000
_LIMIT = 0xA000
# Nearly as a disk's, a card's, a console's and an entropy source's.
_REQUESTS: tuple[tuple[Part, ...], ...] = (
    (bytes(16), 512, 1),
    (bytes(16), bytes(512), 1),
    (bytes(10), bytes(60)),
    (10, 1500),
    (b"text",),
    (64,),
    (bytes(3), bytes(4), bytes(5), 6, 7, 0, 8, 9),
)


class Rings:
    """Rings of all sizes, one for each case."""

    name = "rings"

    def __init__(self) -> None:
        """One memory serves all cases."""
        self._memory = GuardedMemory(_LIMIT)
        self.chains = self.broken = 0

    def close(self) -> None:
        """Nothing to give back."""

    def run(self, random: Random) -> None:
        """One case. Raises BrokenPromise, or what the ring should not have raised."""
        memory = self._memory
        num = random.choice((1, 2, 4, 8, 16, 64))
        layout = VringLayout.legacy(num, _RAM_BYTES)
        guest = HostileGuest(memory.view, [layout], _RAM_BYTES, _LIMIT)
        if random.random() < 0.02:
            memory.view[:_LIMIT] = random.randbytes(_LIMIT)
            guest.begin()
        region = fresh_region(num)
        queue = WatchedVirtqueue(memory, layout, "vda: queue 0", region)
        queue.indirect = random.random() < 0.8
        expected = bytearray()
        taken: list[int] = []
        for _ in range(random.randrange(1, 5)):
            self._prepare(random, guest)
            try:
                if random.random() < 0.3:
                    # A successor takes over, of a process that was killed or of one that has run amok.
                    if random.random() < 0.3:
                        _damage(random, region)
                    self.chains += queue.seen
                    queue = WatchedVirtqueue(memory, layout, "vda: queue 0", region)
                    queue.indirect = random.random() < 0.8
                    expected[:] = memory.view
                    queue.resume()
                    taken.clear()
                expected[:] = memory.view
                for _ in range(num + 1):
                    if random.random() < 0.7:
                        chain = queue.pop()
                        if chain is None:
                            break
                        taken.append(chain[0])
                        del chain
                    if taken and random.random() < 0.7:
                        self._push(queue, layout, taken.pop(random.randrange(len(taken))), random, expected)
                    if memory.view != expected:
                        raise BrokenPromise("memory that is none of the ring's was written")
            except RingError:
                self.broken += 1
                if memory.view != expected:
                    raise BrokenPromise("memory was written to by a ring that found a rule broken") from None
                if random.random() < 0.7:
                    queue.reset()
                    guest.begin()
                    taken.clear()
        self.chains += queue.seen

    @staticmethod
    def _prepare(random: Random, guest: HostileGuest) -> None:
        if random.random() < 0.15:
            guest.noise(random, 0)
        for _ in range(random.randrange(1, 4)):
            guest.offer(random, 0, random.choice(_REQUESTS))
        if random.random() < 0.7:
            for _ in range(random.randrange(1, 4)):
                guest.spoil(random, 0)

    @staticmethod
    def _push(queue: WatchedVirtqueue, layout: VringLayout, head: int, random: Random, expected: bytearray) -> None:
        """Give a chain back; what that has to write goes into `expected` as well."""
        written = random.choice((0, 1, 513, 0xFFFFFFFF))
        index = queue._next_used
        queue.push(head, written)
        struct.pack_into("<II", expected, layout.used + 4 + 8 * (index % layout.num), head, written)
        struct.pack_into("<H", expected, layout.used + 2, (index + 1) & 0xFFFF)


def _damage(random: Random, region: InflightRegion) -> None:
    """As if whoever keeps the record had lost its mind, but for what tells that it is one."""
    for _ in range(random.randrange(1, 4)):
        head = random.randrange(region.num)
        what = random.randrange(4)
        if what == 0:
            region.inflight[head] = random.choice((0, 1, 2, 0xFF))
        elif what == 1:
            region.counter[head] = random.choice((0, 1, 2, random.getrandbits(63)))
        elif what == 2:
            region.header[LAST_BATCH_HEAD_U16] = random.choice((0, region.num - 1, region.num, 0xFFFF))
        else:
            region.header[USED_IDX_U16] = (region.header[USED_IDX_U16] + random.choice((-1, 1, 2, 0x8000))) & 0xFFFF
