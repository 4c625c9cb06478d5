"""Which host runs a guest on this machine."""

from __future__ import annotations

import os

from lgmp.errors import LgmpError
from lgmp.hosts import Host
from lgmp.memory import GuestMemory

LGUEST_DEVICE = "/dev/lguest"
HOSTS = ("auto", "kernel", "embedded")


def choose(wanted: str) -> str:
    """The host to use for `wanted`, one of HOSTS, as "kernel" or "embedded".

    Raises LgmpError where the one that is wanted cannot run here.
    """
    if wanted == "kernel":
        if not os.path.exists(LGUEST_DEVICE):
            raise LgmpError(
                f"there is no {LGUEST_DEVICE} (kernels before 4.14 have it, with the lg module loaded): "
                "use --host embedded, which needs none"
            )
        raise LgmpError(f"running guests on {LGUEST_DEVICE} is not there yet: use --host embedded")
    return "embedded"


def make(kind: str, memory: GuestMemory, guest_limit: int, entry: int) -> Host:
    """A host of that kind (from `choose`): its guest starts at `entry` and sees `guest_limit` bytes of `memory`."""
    assert kind == "embedded", kind
    # Imported here: the emulator is not needed, and need not be installed, where the kernel runs the guest.
    from lgmp.hosts.embedded.host import EmbeddedHost  # noqa: PLC0415

    return EmbeddedHost(memory, guest_limit, entry)
