"""`lgmp doctor`: what this machine can do, and what to do about what it cannot."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lgmp.errors import LgmpError
from lgmp.hosts import GuestStart
from lgmp.hosts.choice import LGUEST_DEVICE, choose
from lgmp.hosts.embedded.abi import LATEST
from lgmp.mailbox import (
    COMPLETION_MESSAGE_BYTES,
    COMPLETION_MESSAGES,
    MAILBOX_MESSAGE_BYTES,
    MAILBOX_MESSAGES,
    MQUEUE_DIRECTORY,
    Mailbox,
    queue_name,
)
from lgmp.memory import GuestMemory
from lgmp.network import PASST
from lgmp.tap import TUN_DEVICE

_MQUEUE_LIMITS = Path("/proc/sys/fs/mqueue")
# What the kernel counts for a queue besides its messages' bytes: mq_overview(7), RLIMIT_MSGQUEUE in getrlimit(2).
_BYTES_PER_MESSAGE = 8 + 48


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, whether it is fine, what was found, and the `remedy` where it is not.

    `needed`: no guest runs without it.
    """

    what: str
    fine: bool
    found: str
    remedy: str = ""
    needed: bool = False

    def __str__(self) -> str:
        """The line."""
        mark = "ok  " if self.fine else ("FAIL" if self.needed else "note")
        return f"{mark}  {self.what}: {self.found}" + (f"; {self.remedy}" if self.remedy and not self.fine else "")


def doctor() -> int:
    """Print the findings; gives 1 where one that guests need is bad."""
    findings = list(examine())
    for finding in findings:
        print(finding)
    return 1 if any(finding.needed and not finding.fine for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Everything there is to know, in the order in which it matters."""
    yield Finding(
        "machine",
        platform.machine() in ("x86_64", "i386", "i486", "i586", "i686") and sys.platform == "linux",
        f"{platform.system()} {platform.release()} on {platform.machine()}, Python {platform.python_version()} "
        f"of {struct.calcsize('P') * 8} bits",
        "lgmp needs Linux on x86",
        needed=True,
    )
    yield _try("guest memory", "can be made and mapped shared", _guest_memory)
    yield from _hosts()
    yield _try("message queues", "can be made", _message_queue)
    yield from _message_queue_limits()
    mounted = os.path.ismount(MQUEUE_DIRECTORY)
    yield Finding(
        "queue file system",
        mounted,
        f"{MQUEUE_DIRECTORY} is {'' if mounted else 'not '}mounted",
        "only what a killed launch left behind is swept by it: mount -t mqueue none /dev/mqueue",
    )
    yield from _networks()
    cores = len(os.sched_getaffinity(0))
    yield Finding("processors", cores > 1, f"{cores} usable", "guests and their devices take turns on one")


def _hosts() -> Iterator[Finding]:
    """The two hosts: one of them has to be fine."""
    kernel = _kernel_host()
    embedded = _try("embedded host", "Unicorn is there and its CPU state is where it should be", _embedded_host)
    if kernel.fine:
        yield kernel
        yield replace(embedded, needed=False, remedy="nothing to do: guests run on the kernel's host")
    else:
        yield replace(kernel, remedy="nothing to do: guests run on the embedded host" if embedded.fine else "")
        yield embedded
    if embedded.fine:
        yield _fast_stores()


def _kernel_host() -> Finding:
    """Whether the lg module takes a guest: one of a few pages, that never runs."""
    if not os.path.exists(LGUEST_DEVICE):
        return Finding(
            "kernel host", False, f"no {LGUEST_DEVICE} (32-bit kernels of 2.6.25 to 3.19 with CONFIG_LGUEST have it)"
        )
    try:
        kind = choose("kernel")
        try:
            with GuestMemory.create(1 << 20) as memory:
                directory = 0 if kind.wants_page_tables(LATEST) else None
                kind.make(GuestStart(memory, memory.ram_bytes, 0, LATEST, directory, 1)).close()
        finally:
            kind.close()
    except LgmpError as error:
        return Finding("kernel host", False, str(error))
    how = "kicks go straight to the workers" if kind.takes_kicks else "as kernels to 2.6.30 have it"
    return Finding("kernel host", True, f"{LGUEST_DEVICE} takes guests; {how}")


def _networks() -> Iterator[Finding]:
    opens = os.access(TUN_DEVICE, os.R_OK | os.W_OK)
    allowed = _may_administer_networks()
    yield Finding(
        "network device",
        opens and allowed,
        f"{TUN_DEVICE} {'can' if opens else 'cannot'} be opened, taps {'can' if allowed else 'cannot'} be made",
        "modprobe tun, and be root (CAP_NET_ADMIN)" if allowed else "only root has them; --net user needs no rights",
    )
    found = shutil.which(PASST)
    yield Finding(
        "network without root", found is not None, found or "no passt", "--net user needs it: apt-get install passt"
    )


def _may_administer_networks() -> bool:
    """Whether we have CAP_NET_ADMIN (bit 12, linux/capability.h)."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "CapEff":
                return bool(int(value, 16) >> 12 & 1)
    return False


def _try(what: str, found: str, attempt: Callable[[], None]) -> Finding:
    try:
        attempt()
    except (LgmpError, OSError) as error:
        return Finding(what, False, str(error), needed=True)
    return Finding(what, True, found, needed=True)


def _guest_memory() -> None:
    with GuestMemory.create(1 << 20):
        pass


def _embedded_host() -> None:
    from lgmp.hosts.embedded.cpu import Cpu  # noqa: PLC0415 - what it needs may be missing, which is the question

    with GuestMemory.create(1 << 20) as memory:
        cpu = Cpu(memory.view, 1 << 20)
        cpu.close()


def _fast_stores() -> Finding:
    from lgmp.hosts.embedded.cpu import Cpu  # noqa: PLC0415 - as above

    fast = False
    with contextlib.suppress(LgmpError), GuestMemory.create(1 << 20) as memory:
        cpu = Cpu(memory.view, 1 << 20)
        fast = cpu.fast_stores
        cpu.close()
    return Finding(
        "speed of the embedded host",
        fast,
        "tlbshim.so is in use" if fast else "tlbshim.so is not in use, guests run two to six times slower",
        "it must lie in a file system that allows programs (noexec?), and LGMP_TLBSHIM=off must not be set",
    )


def _message_queue() -> None:
    mailbox = Mailbox.create(queue_name(os.getpid(), "doctor"), MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES)
    mailbox.unlink()
    mailbox.close()


def _message_queue_limits() -> Iterator[Finding]:
    limit, _hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    per_device = sum(
        messages * (message_bytes + _BYTES_PER_MESSAGE)
        for messages, message_bytes in (
            (MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES),
            (COMPLETION_MESSAGES, COMPLETION_MESSAGE_BYTES),
        )
    )
    unlimited = limit == resource.RLIM_INFINITY
    devices = 999 if unlimited else limit // per_device
    yield Finding(
        "bytes in message queues",
        devices >= 32,
        "no limit" if unlimited else f"{limit} for this user, enough for about {devices} devices at once",
        "raise it: ulimit -q 819200, or a line `msgqueue` in /etc/security/limits.conf",
    )
    for name, least, meaning in (("queues_max", 64, "queues"), ("msg_max", 10, "messages in a queue")):
        try:
            value = int((_MQUEUE_LIMITS / name).read_text())
        except (OSError, ValueError) as error:
            yield Finding(meaning, False, f"cannot read {_MQUEUE_LIMITS / name}: {error}")
            continue
        yield Finding(
            meaning, value >= least, f"{value} at most (fs.mqueue.{name})", f"sysctl fs.mqueue.{name}={least} as root"
        )
