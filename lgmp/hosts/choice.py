"""Which host runs a guest on this machine, and how the two speak with each other."""

from __future__ import annotations

import os

from lgmp.errors import LgmpError
from lgmp.hosts import Host
from lgmp.hosts.embedded.abi import GUEST_ABIS, LATEST, TOO_NEW, GuestAbi
from lgmp.memory import GuestMemory

LGUEST_DEVICE = "/dev/lguest"
HOSTS = ("auto", "kernel", "embedded")
GUEST_ABI_NAMES = ("auto", *(each.name for each in GUEST_ABIS))


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


def choose_abi(wanted: str, linux_version: tuple[int, ...] | None, kernel: str) -> GuestAbi:
    """How the guest speaks: `wanted`, one of GUEST_ABI_NAMES, or with "auto" what kernels of its version do.

    `linux_version`: None where the image does not tell, and then it is taken for one of the latest; `kernel`: its
    file, for messages. Raises LgmpError for versions that have no ABI of ours.
    """
    for each in GUEST_ABIS:
        if each.name == wanted:
            return each
    if linux_version is None:
        return LATEST
    version = ".".join(str(number) for number in linux_version)
    if linux_version >= TOO_NEW:
        raise LgmpError(
            f"{kernel} is Linux {version}, which looks for its devices on a PCI bus, and lgmp has none: "
            "give a kernel of 2.6.25 to 3.19"
        )
    for each in GUEST_ABIS:
        if linux_version >= each.since:
            return each
    raise LgmpError(
        f"{kernel} is Linux {version}, whose devices are described in another way: give a kernel of 2.6.25 to 3.19"
    )


def make(
    kind: str,
    memory: GuestMemory,
    guest_limit: int,
    entry: int,
    guest_abi: GuestAbi,
    page_directory: int | None,
) -> Host:
    """A host of that kind (from `choose`): its guest starts at `entry` and sees `guest_limit` bytes of `memory`.

    `page_directory`: the guest-physical address of its first page tables, None where it starts without.
    """
    assert kind == "embedded", kind
    # Imported here: the emulator is not needed, and need not be installed, where the kernel runs the guest.
    from lgmp.hosts.embedded.host import EmbeddedHost  # noqa: PLC0415

    return EmbeddedHost(memory, guest_limit, entry, guest_abi, page_directory)
