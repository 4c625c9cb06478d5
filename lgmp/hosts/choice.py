"""Which host runs a guest on this machine, and how it and the guest speak with each other."""

from __future__ import annotations

import errno
import os
import sys

from lgmp.errors import LgmpError
from lgmp.hosts import GuestStart, Host, HostKind
from lgmp.hosts.embedded.abi import GUEST_ABIS, LATEST, TOO_NEW, GuestAbi
from lgmp.hosts.kernel.protocol import LGUEST_ABIS, LGUEST_ON_PCI, NO_LGUEST, LguestAbi, abi_of
from lgmp.loader.linux_version import parse_version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lgmp.hosts.kernel.host import LguestDevice

LGUEST_DEVICE = "/dev/lguest"
HOSTS = ("auto", "kernel", "embedded")
GUEST_ABI_NAMES = ("auto", *(each.name for each in GUEST_ABIS))
LGUEST_ABI_NAMES = ("auto", *(each.name for each in LGUEST_ABIS))


class EmbeddedKind:
    """The host of our own, on an emulated CPU."""

    name = "embedded"
    takes_kicks = False

    def wants_page_tables(self, guest_abi: GuestAbi) -> bool:
        """It makes none itself."""
        return guest_abi.starts_paged

    def make(self, start: GuestStart) -> Host:
        """A host for one guest. Raises LgmpError where the emulator cannot be used."""
        # Imported here: the emulator is not needed, and need not be installed, where the kernel runs the guest.
        from lgmp.hosts.embedded.host import EmbeddedHost  # noqa: PLC0415

        return EmbeddedHost(start.memory, start.guest_limit, start.entry, start.guest_abi, start.page_directory)

    def close(self) -> None:
        """Nothing was opened."""


class KernelKind:
    """The lg module of this machine's kernel."""

    name = "kernel"

    def __init__(self, device: LguestDevice) -> None:
        """`device`: open, with no guest yet."""
        self.device = device
        self.takes_kicks = device.abi.eventfds

    def wants_page_tables(self, guest_abi: GuestAbi) -> bool:  # noqa: ARG002
        """It is the module that decides: to 2.6.29 it wants them, after that it makes those that a guest needs."""
        return self.device.abi.page_directory

    def make(self, start: GuestStart) -> Host:
        """A host for one guest. Raises LgmpError where the module refuses."""
        from lgmp.hosts.kernel.host import KernelHost  # noqa: PLC0415 - what others have no use for

        return KernelHost(self.device, start)

    def close(self) -> None:
        """Close the device."""
        self.device.close()


def choose(wanted: str, device: str | None = None, lguest_abi: str = "auto") -> HostKind:
    """The host to use for `wanted`, one of HOSTS.

    `device`: the lguest device, None for the usual one; `lguest_abi`: how it speaks, one of LGUEST_ABI_NAMES. With
    "auto" it is the kernel's where that can be opened, and where one is named it has to be. Raises LgmpError where the
    one that is wanted cannot run here.
    """
    path = device or LGUEST_DEVICE
    if wanted == "embedded" or (wanted == "auto" and device is None and not os.path.exists(path)):
        return EmbeddedKind()
    try:
        return KernelKind(_open_lguest(path, lguest_abi))
    except LgmpError:
        # On 32 bits there is no other, and the reason is worth more than that.
        if wanted == "auto" and device is None and sys.maxsize > 1 << 32:
            return EmbeddedKind()  # `lgmp doctor` says why
        raise


def _open_lguest(path: str, wanted_abi: str) -> LguestDevice:
    from lgmp.hosts.kernel.host import LguestDevice  # noqa: PLC0415 - what others have no use for

    try:
        os.stat(path)  # one that is missing is told of before its era is asked for
        return LguestDevice(path, _lguest_abi(path, wanted_abi))
    except OSError as error:
        raise LgmpError(f"cannot open {path}: {error.strerror}; {_remedy(path, error.errno)}") from error


def _remedy(path: str, number: int | None) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return f"be root, or have root allow it (chmod or chown {path}), or use --host embedded"
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            "32-bit kernels of 2.6.25 to 3.19 that were built with CONFIG_LGUEST have it, after `modprobe lg`; "
            "--host embedded needs none"
        )
    return "try --host embedded, which needs none"


def _lguest_abi(path: str, wanted: str) -> LguestAbi:
    """How the device speaks: `wanted`, one of LGUEST_ABI_NAMES, or with "auto" what the running kernel's does."""
    for each in LGUEST_ABIS:
        if each.name == wanted:
            return each
    release = os.uname().release
    version = parse_version(release.encode()) or ()
    abi = abi_of(version)
    if abi is not None:
        return abi
    if version >= NO_LGUEST:
        why = "which has no lguest of its own"
    elif version >= LGUEST_ON_PCI:
        why = "whose lguest has its devices on a PCI bus, which lgmp has not"
    else:
        why = "whose lguest is too old"
    names = " or ".join(f"{each.name} (as {each.kernels} have it)" for each in LGUEST_ABIS)
    raise LgmpError(
        f"cannot tell how {path} is spoken to: this kernel is Linux {release}, {why}; say it with "
        f"--lguest-abi {names}, or use --host embedded"
    )


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
