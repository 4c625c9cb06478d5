"""What runs a guest. One small contract, the one /dev/lguest has; the launcher knows nothing beyond it.

A host is made with the guest's memory and entry, and runs the guest in the thread that calls `run`. That thread
also sends the interrupts. Any thread may call `break_in`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Notify:
    """The guest called LHCALL_NOTIFY with this guest-physical address (not checked)."""

    address: int


@dataclass(frozen=True, slots=True)
class Died:
    """The guest is dead; `reason` is the host's text for it, for example "CRASH: Power down"."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reboot:
    """The guest asked to be started again."""


@dataclass(frozen=True, slots=True)
class Break:
    """Somebody called `break_in`."""


Event = Notify | Died | Reboot | Break


class Host(Protocol):
    """The contract of hosts."""

    def run(self) -> Event:
        """Run the guest until something happens; only from the thread that made the host."""

    def irq(self, number: int) -> None:
        """Make interrupt `number` (1..31; 0 is the timer) pending; only from the thread that runs the guest."""

    def break_in(self) -> None:
        """Make a `run` that is under way, or else the next one, return Break; from any thread."""

    def close(self) -> None:
        """Give back what the host holds. The guest cannot be run after that."""
