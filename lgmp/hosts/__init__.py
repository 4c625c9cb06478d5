"""What runs a guest. One small contract, the one /dev/lguest has; the launcher knows nothing beyond it.

A host is made with the guest's memory and entry (`GuestStart`), by the kind of host that was chosen (`HostKind`), and
runs the guest in the thread that made it. What differs between hosts, and matters to who uses one, is said by them:
who may send interrupts, whether kicks can go straight to a worker, who makes the first page tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from lgmp.hosts.embedded.abi import GuestAbi
    from lgmp.memory import GuestMemory


class Notify(NamedTuple):
    """The guest called LHCALL_NOTIFY with this guest-physical address (not checked)."""

    address: int


class Died(NamedTuple):
    """The guest is dead; `reason` is the host's text for it, for example "CRASH: Power down"."""

    reason: str


class Reboot:
    """The guest asked to be started again."""

    __slots__ = ()


class Break:
    """Somebody called `break_in`."""

    __slots__ = ()


Event = Notify | Died | Reboot | Break


class GuestStart(NamedTuple):
    """What a host is made with.

    The guest starts at guest-physical `entry` and sees the first `guest_limit` bytes of `memory`; boot_params lies at 0
    in it already. `guest_abi`: how it speaks with its host; `page_directory`: the guest-physical address of its first
    page tables, None where the launcher makes none; `irqs`: the highest interrupt that its devices have.
    """

    memory: GuestMemory
    guest_limit: int
    entry: int
    guest_abi: GuestAbi
    page_directory: int | None
    irqs: int


class Host(Protocol):
    """The contract of hosts."""

    @property
    def irq_from_any_thread(self) -> bool:
        """Whether any thread may call `irq` at any time, or else the one that runs the guest, between two `run`s."""

    def run(self) -> Event:
        """Run the guest until something happens; only from the thread that made the host.

        Raises LgmpError where the host itself cannot go on.
        """

    def irq(self, number: int) -> None:
        """Make interrupt `number` (1..31; 0 is the timer) pending. A guest that is dead takes no notice."""

    def kicks_to(self, address: int, eventfd: int) -> bool:
        """Have a NOTIFY of exactly `address` signal `eventfd` from now on, and not come out of `run`.

        False where the host cannot: then `run` returns it as a Notify. Before the first `run`.
        """

    def break_in(self) -> None:
        """Make a `run` that is under way, or else the next one, return Break; from any thread. Does not wait."""

    def close(self) -> None:
        """Give back what the host holds; nothing else may be called after that."""


class HostKind(Protocol):
    """A way to run guests on this machine, chosen before there is a guest."""

    @property
    def name(self) -> str:
        """What --verbose calls it."""

    @property
    def takes_kicks(self) -> bool:
        """Whether `Host.kicks_to` is worth an eventfd for each worker."""

    def wants_page_tables(self, guest_abi: GuestAbi) -> bool:
        """Whether it is for the launcher to make the first page tables of such a guest."""

    def make(self, start: GuestStart) -> Host:
        """A host for one guest. Raises LgmpError where there can be none."""

    def close(self) -> None:
        """Give back what was opened to choose it, if no host has taken it over."""
