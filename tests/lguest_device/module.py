"""The lg module's own rules, one `OpenFile` for each open file: which request is answered how, and when.

Nothing in here knows how calls come in. `OpenFile`'s methods are called from one thread, that of whoever takes the
calls; the guest has a thread of its own, which makes its host, runs it during reads, and takes it down.

Where this is stricter than the module: a write that is shorter than the words of its request is EFAULT, where the
module would read on past the caller's bytes; so is a read of a live guest that is shorter than a word, where it would
write on; and so is INITIALIZE with memory that the guest cannot have, for which it would kill the guest later. A second
INITIALIZE is EBUSY in every era, from whatever thread and of whatever guest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from lgmp.errors import LgmpError
from lgmp.hosts import Break, Died, Notify, Reboot
from lgmp.hosts.embedded.abi import GUEST_ABIS, GuestAbi
from lgmp.hosts.embedded.host import EmbeddedHost
from lgmp.hosts.embedded.state import GuestKilled
from lgmp.loader.boot_params import E820_MAP, RAMDISK_SIZE
from lgmp.loader.page_tables import page_table_bytes, write_identity_page_tables
from lgmp.memory import PAGE_SIZE

from .caller import CallerMemory, take_eventfd

INITIALIZE = 0
IRQ = 2
BREAK = 3
EVENTFD = 4
REQUESTS = {"INITIALIZE": INITIALIZE, "IRQ": IRQ, "BREAK": BREAK, "EVENTFD": EVENTFD}

# LGUEST_IRQS, where the kernel has as many lines.
LINES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Era:
    """In what the modules of some kernels differ from others. `guest_abi` names the guests that they were made for."""

    name: str
    # INITIALIZE has the address of page tables that the launcher made; or else the module makes them, if any.
    page_directory: bool
    breaks: bool
    eventfds: bool
    # No thread but the one that initialised may write anything but BREAK.
    owner_only: bool
    guest_abi: str


ERAS = {
    each.name: each
    for each in (
        Era(name="2.6.25", page_directory=True, breaks=True, eventfds=False, owner_only=True, guest_abi="2.6.26"),
        Era(name="2.6.30", page_directory=False, breaks=True, eventfds=False, owner_only=True, guest_abi="2.6.30"),
        Era(name="2.6.31", page_directory=False, breaks=False, eventfds=True, owner_only=False, guest_abi="3.x"),
    )
}
GUESTS = {each.name: each for each in GUEST_ABIS}


@dataclass(slots=True, eq=False)
class Call:
    """A system call under way: whose, at which file offset. It is answered once, with bytes, a count or -errno."""

    thread: int
    offset: int
    answer: Callable[[int | bytes], None]
    # A signal has come for the caller, who wants to go.
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """The machine that the module is in; `word` is how many bytes an unsigned long of the launcher's has."""

    era: Era
    guest_abi: GuestAbi
    lines: int = LINES
    word: int = struct.calcsize("@L")


@dataclass(slots=True)
class _Guest:
    """What there is once a file is initialised."""

    owner: int
    memory: CallerMemory
    host: EmbeddedHost | None = None
    # What it dies of when it is run, where there can be no host for it.
    doom: str = ""
    # Why it is dead, as the bytes that a read gives; None while it is not.
    dead: bytes | None = None
    reboots: bool = False
    eventfds: dict[int, int] = field(default_factory=dict)


class OpenFile:
    """What an open of /dev/lguest gives."""

    def __init__(self, kernel: Kernel) -> None:
        """A file that has no guest yet."""
        self._kernel = kernel
        self._words = struct.Struct("<Q" if kernel.word == 8 else "<I")
        self._guest: _Guest | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # Interrupts, as bits, that the guest's thread has yet to hand to the host.
        self._irqs = 0
        self._broken_out = False
        self._breakers: list[Call] = []
        self._released: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._serve, name="guest", daemon=True)
        self._thread.start()

    def write(self, call: Call, data: bytes) -> None:
        """write(2): INITIALIZE, IRQ, BREAK, EVENTFD."""
        try:
            request = self._words_of(data, 1)[0]
            if request == INITIALIZE:
                self._jobs.put(lambda: _answer(call, lambda: self._initialize(call, data)))
                return
            guest = self._guest_of(call)
            if guest.dead is not None:
                raise _error(errno.ENOENT)
            era = self._kernel.era
            if era.owner_only and call.thread != guest.owner and request != BREAK:
                raise _error(errno.EPERM)
            if request == IRQ:
                self._send(self._words_of(data, 2)[1])
            elif request == BREAK and era.breaks:
                if self._words_of(data, 2)[1]:
                    # Whoever writes this waits until somebody writes BREAK with 0, even if the guest dies meanwhile.
                    self._broken_out = True
                    self._breakers.append(call)
                    self._break_in()
                    return
                self._broken_out = False
                waiting, self._breakers = self._breakers, []
                for each in waiting:
                    each.answer(0)
            elif request == EVENTFD and era.eventfds:
                self._attach(guest, call, *self._words_of(data, 3)[1:3])
            else:
                raise _error(errno.EINVAL)
        except OSError as error:
            call.answer(-(error.errno or errno.EIO))
            return
        call.answer(0)

    def read(self, call: Call, size: int) -> None:
        """read(2): the guest's last words, or what comes of running it."""
        try:
            guest = self._guest_of(call)
            if call.thread != guest.owner:
                raise _error(errno.EPERM)
            if guest.reboots:
                raise _error(errno.ERESTART)
            if guest.dead is not None:
                call.answer(guest.dead[:size])
                return
            if size < self._kernel.word:
                raise _error(errno.EFAULT)
        except OSError as error:
            call.answer(-(error.errno or errno.EIO))
            return
        self._jobs.put(lambda: _answer(call, lambda: self._run(guest, call)))

    def interrupt(self, call: Call) -> None:
        """A signal came for the caller of `call`, which is not answered yet."""
        call.interrupted = True
        if call in self._breakers:
            self._breakers.remove(call)
            call.answer(-errno.EINTR)
        self._break_in()

    def release(self, done: Callable[[], None]) -> None:
        """The last descriptor is closed, no call is under way: end the guest; `done` once nothing is left of it."""
        self._released = done
        self._jobs.put(None)

    def join(self, timeout: float) -> bool:
        """Whether the guest's thread is gone, after waiting that long for it."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _words_of(self, data: bytes, least: int) -> list[int]:
        if len(data) < least * self._words.size:
            raise _error(errno.EFAULT)
        return [word for (word,) in self._words.iter_unpack(data[: len(data) // self._words.size * self._words.size])]

    def _guest_of(self, call: Call) -> _Guest:
        guest = self._guest
        # The offset is the CPU's number, an unsigned int; there is CPU 0.
        if guest is None or call.offset & 0xFFFFFFFF:
            raise _error(errno.EINVAL)
        return guest

    def _send(self, number: int) -> None:
        if number >= self._kernel.lines:
            raise _error(errno.EINVAL)
        with self._lock:
            self._irqs |= 1 << number
        self._break_in()

    def _attach(self, guest: _Guest, call: Call, address: int, descriptor: int) -> None:
        if not address:
            raise _error(errno.EINVAL)
        # The module takes it for an int.
        taken = take_eventfd(call.thread, ctypes.c_int(descriptor & 0xFFFFFFFF).value)
        # Of several for one address the first has it; the module keeps the others for nothing.
        if guest.eventfds.setdefault(address, taken) != taken:
            os.close(taken)

    def _break_in(self) -> None:
        """Have the guest's thread look around."""
        guest = self._guest
        host = guest.host if guest is not None else None
        if host is not None:
            host.break_in()

    # From here on: in the guest's thread.

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        guest, self._guest = self._guest, None
        if guest is not None:
            if guest.host is not None:
                guest.host.close()
            guest.host = None
            guest.memory.close()
            for descriptor in guest.eventfds.values():
                os.close(descriptor)
        del guest
        self._released()

    def _initialize(self, call: Call, data: bytes) -> int:
        era = self._kernel.era
        if self._guest is not None:
            raise _error(errno.EBUSY)
        taken = 4 if era.page_directory else 3
        words = self._words_of(data, 1 + taken)
        base, pages, start = words[1], words[2], words[taken] & 0xFFFFFFFF
        if pages > 1 << 20:
            raise _error(errno.EFAULT)
        guest = _Guest(call.thread, CallerMemory(call.thread, base, pages))
        try:
            directory = words[3] & 0xFFFFFFFF if era.page_directory else self._page_directory(guest.memory)
            guest.host = EmbeddedHost(guest.memory, pages * PAGE_SIZE, start, self._kernel.guest_abi, directory)
        except GuestKilled as killed:
            guest.doom = str(killed)
        except (OSError, LgmpError):
            guest.memory.close()
            raise
        self._guest = guest
        return taken * self._words.size

    def _page_directory(self, memory: CallerMemory) -> int | None:
        """Make the first page tables of a guest that starts with them, where boot_params says that RAM ends."""
        if not self._kernel.guest_abi.starts_paged:
            return None
        ram: int = struct.unpack_from("<I", memory.view, E820_MAP + 8)[0]
        initrd: int = struct.unpack_from("<I", memory.view, RAMDISK_SIZE)[0]
        # What is no whole pages, the module would make tables of that no CPU can use.
        if ram > memory.limit or (ram | initrd) % PAGE_SIZE or initrd + page_table_bytes(ram) > ram:
            raise _error(errno.EFAULT)
        return write_identity_page_tables(memory.view, ram, initrd)

    def _run(self, guest: _Guest, call: Call) -> int | bytes:
        host = guest.host
        if host is None:
            guest.dead = _last_words(guest.doom)
            return -errno.ENOENT
        while True:
            self._hand_over_irqs(host)
            if call.interrupted or self._broken_out:
                # A hypercall that waits is still done before.
                host.break_in()
            event = host.run()
            match event:
                case Notify(address):
                    # With address 0, which means nothing to the module, the guest goes on.
                    if address in guest.eventfds:
                        os.eventfd_write(guest.eventfds[address], 1)
                    elif address:
                        return self._words.pack(address)
                case Died(reason):
                    guest.dead = _last_words(reason)
                    return -errno.ENOENT
                case Reboot():
                    guest.reboots, guest.dead = True, b""
                    return -errno.ERESTART
                case Break():
                    if call.interrupted:
                        return -errno.EINTR
                    if self._broken_out:
                        return -errno.EAGAIN

    def _hand_over_irqs(self, host: EmbeddedHost) -> None:
        with self._lock:
            irqs, self._irqs = self._irqs, 0
        if irqs & 1:
            # The timer's, which a launcher may send too; hosts take none for it from outside.
            host._guest.pending |= 1
        for number in range(1, LINES):
            if irqs & 1 << number:
                host.irq(number)


def _answer(call: Call, work: Callable[[], int | bytes]) -> None:
    """Do the work of a call, in the guest's thread; whatever comes of it, there is an answer."""
    result: int | bytes = -errno.EIO
    try:
        result = work()
    except OSError as error:
        result = -(error.errno or errno.EIO)
    except LgmpError as error:
        print(f"lguest_device: {error}", file=sys.stderr, flush=True)
    finally:
        call.answer(result)


def _last_words(reason: str) -> bytes:
    return reason.encode(errors="surrogateescape") + b"\0"


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
