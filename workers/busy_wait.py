"""A look at the rings before their worker sleeps, as hypervisors do before they let a halted processor go.

To sleep and to be woken takes two processors some 60 microseconds together, which is longer than many a request. A
driver that goes on at once is met awake, needs no kick, and costs less than it would asleep.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Ring(Protocol):
        """What is looked at: lgmp.virtio.ring.Virtqueue is one."""

        def spin(self, rounds: int) -> bool:
            """Look so many times at most; gives whether something came."""


# How often the rings are looked at, all together: some 60 microseconds.
LOOKS = 2000
# Of several rings each is looked at so many times before the next one is.
_LOOKS_IN_TURN = 20
# Where that was in vain it is left out, so many times at most.
MOST_SKIPS = 1023


class BusyWait:
    """Waits for a driver to go on, as long as that pays.

    In vain it is where the driver has nothing to ask for, and where it waits for this very processor: there each look
    only delays it. So each time in vain the next attempt comes later, until one meets with something.
    """

    def __init__(self) -> None:
        """Begin with hope."""
        self._skips = 0
        self._misses = 0

    def __call__(self, rings: Sequence[Ring]) -> bool:
        """Wait a moment for something to come into one of `rings`, or not at all; gives whether it has."""
        if self._skips:
            self._skips -= 1
            return False
        each = LOOKS if len(rings) == 1 else _LOOKS_IN_TURN
        for _ in range(LOOKS // (each * len(rings)) or 1):
            for ring in rings:
                if ring.spin(each):
                    self._misses = 0
                    return True
        self._skips = self._misses = min(2 * self._misses + 1, MOST_SKIPS)
        return False
