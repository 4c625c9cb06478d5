"""What is written to /dev/lguest and read from it: pure words, no system calls.

From linux/lguest_launcher.h and drivers/lguest/lguest_user.c of the kernels; a word is the host's `unsigned long`.
There are three eras. The table LGUEST_ABIS has the rules of each; nowhere else is it asked which era this is.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

LHREQ_INITIALIZE = 0
LHREQ_IRQ = 2
LHREQ_BREAK = 3  # to 2.6.30
LHREQ_EVENTFD = 4  # from 2.6.31

WORD_BYTES = struct.calcsize("@L")

# A dead guest's last words are at most so long, with their NUL.
REASON_BYTES = 1024

# The lines that every host has: one without an interrupt controller's worth of them has NR_IRQS = 16.
LEAST_LGUEST_IRQS = 16

_TEXT_LIMIT = REASON_BYTES - 1


class LguestAbi(NamedTuple):
    """How the /dev/lguest of one era is spoken to.

    `name` is what --lguest-abi takes, `kernels` says which kernels those are, and `since` is the first version.
    """

    name: str
    kernels: str
    since: tuple[int, ...]
    # Whether INITIALIZE has a word for the page directory: the guest's first page tables are the launcher's to make.
    page_directory: bool
    # Whether there is BREAK, which ends the owner's read. It waits for the owner to take it back.
    breaks: bool
    # Whether there is EVENTFD.
    eventfds: bool
    # Whether IRQ is for any thread, and wakes a halted guest; else it is for the owner, between its reads.
    irq_from_any_thread: bool

    @property
    def taken(self) -> int:
        """What a write of INITIALIZE returns: the bytes of its arguments."""
        return WORD_BYTES * (4 if self.page_directory else 3)


LGUEST_ABI_2_6_31 = LguestAbi(
    name="2.6.31",
    kernels="Linux 2.6.31 to 3.19",
    since=(2, 6, 31),
    page_directory=False,
    breaks=False,
    eventfds=True,
    irq_from_any_thread=True,
)
# In 2.6.30 the page tables went to the host already, and BREAK was still there.
LGUEST_ABI_2_6_30 = LguestAbi(
    name="2.6.30",
    kernels="Linux 2.6.30",
    since=(2, 6, 30),
    page_directory=False,
    breaks=True,
    eventfds=False,
    irq_from_any_thread=False,
)
LGUEST_ABI_2_6_25 = LGUEST_ABI_2_6_30._replace(
    name="2.6.25",
    kernels="Linux 2.6.25 to 2.6.29",
    since=(2, 6, 25),
    page_directory=True,
)

# Newest first.
LGUEST_ABIS = (LGUEST_ABI_2_6_31, LGUEST_ABI_2_6_30, LGUEST_ABI_2_6_25)

# From this version on, the launcher has to emulate instructions and a PCI bus; and from this one there is no lguest.
LGUEST_ON_PCI = (4, 0)
NO_LGUEST = (4, 14)


def abi_of(linux_version: tuple[int, ...]) -> LguestAbi | None:
    """How /dev/lguest is spoken to on a kernel of that version; None where lgmp cannot, or it has none."""
    if linux_version >= LGUEST_ON_PCI:
        return None
    return next((abi for abi in LGUEST_ABIS if linux_version >= abi.since), None)


def initialize(abi: LguestAbi, base: int, pages: int, page_directory: int | None, start: int) -> bytes:
    """The words that make the guest.

    `base`: the address of guest memory in the launcher; `pages`: how many of it are the guest's; `page_directory`
    (where the era has it) and `start`: guest-physical addresses. Raises ValueError for what no word can hold.
    """
    if not abi.page_directory:
        return _words(LHREQ_INITIALIZE, base, pages, start)
    assert page_directory is not None
    return _words(LHREQ_INITIALIZE, base, pages, page_directory, start)


def irq(number: int) -> bytes:
    """The words that make interrupt `number` pending."""
    return _words(LHREQ_IRQ, number)


def break_out(on: bool) -> bytes:
    """The words that end the owner's reads, or with `on` false let them go on."""
    return _words(LHREQ_BREAK, int(on))


def eventfd(address: int, descriptor: int) -> bytes:
    """The words that have a NOTIFY of `address` signal an eventfd."""
    return _words(LHREQ_EVENTFD, address, descriptor)


def parse_notify(raw: memoryview) -> int:
    """The address that a read gave. Raises ValueError where it is not one word."""
    if len(raw) != WORD_BYTES:
        raise ValueError(f"{len(raw)} bytes are not an address of {WORD_BYTES}")
    return int.from_bytes(raw, "little")


def parse_reason(raw: bytes) -> str:
    """The last words of a dead guest, as text."""
    return raw[:_TEXT_LIMIT].partition(b"\0")[0].decode(errors="replace")


def _words(*words: int) -> bytes:
    try:
        return struct.pack(f"@{len(words)}L", *words)
    except struct.error as error:
        raise ValueError(f"a word of {WORD_BYTES} bytes cannot hold one of {', '.join(map(hex, words))}") from error
