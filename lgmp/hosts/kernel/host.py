"""A guest on /dev/lguest: reading the device runs the guest, writing to it does the rest.

The thread that initialised owns the guest, and reads. A read ends when there is something to tell. To end it from
outside takes BREAK to 2.6.30, whose write waits until the owner has taken notice, and after that a signal, which is
lost where it finds the owner just before its read. Neither is for a thread with other work, so there is one for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import threading

from lgmp.errors import LgmpError
from lgmp.hosts import Break, Died, Event, GuestStart, Notify, Reboot
from lgmp.hosts.kernel import protocol
from lgmp.hosts.kernel.protocol import LguestAbi
from lgmp.memory import PAGE_SIZE

# Not os.pread: that goes on reading after a signal, and to have its handler raise instead could lose a notify.
_pread = ctypes.CDLL(None, use_errno=True).pread
_pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
_pread.restype = ctypes.c_ssize_t

# The offset in the device is the number of the guest's CPU.
_CPU = 0

# Interrupts a read and nothing else: who does not handle it does not notice it.
_INTERRUPTING_SIGNAL = signal.SIGURG
# Seconds from one such signal to the next, until the owner has taken notice.
_SIGNAL_EVERY = 0.002

_BREAK = Break()


class LguestDevice:
    """An open /dev/lguest, and how it is spoken to. The name of its path goes into every message."""

    def __init__(self, path: str, abi: LguestAbi) -> None:
        """Open it. Raises OSError."""
        self.path = path
        self.abi = abi
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, words: bytes | memoryview) -> int:
        """Write words for the guest's one CPU, and give what that returned. Raises OSError."""
        return os.pwrite(self.fd, words, _CPU)

    def initialize(self, base: int, start: GuestStart) -> int:
        """Make the guest, with its memory at `base`; gives the bytes that were taken of the words. Raises OSError."""
        pages = start.guest_limit // PAGE_SIZE
        words = protocol.initialize(self.abi, base, pages, start.page_directory, start.entry)
        # The module of another era reads more words than it is given: those are zeros, not what lies behind.
        return self.write(memoryview(words + bytes(protocol.WORD_BYTES))[: len(words)])

    def close(self) -> None:
        """Close it; the guest that it had, if any, is gone then."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class KernelHost:
    """Runs one guest on /dev/lguest; it fulfils the contract `lgmp.hosts.Host`."""

    def __init__(self, device: LguestDevice, start: GuestStart) -> None:
        """Make the guest, in the main thread, which then owns it; `device` is this object's to close.

        Raises LgmpError, naming what was tried, where the module refuses.
        """
        self._device = device
        self._abi = device.abi
        self.irq_from_any_thread = device.abi.irq_from_any_thread
        self._irqs = [protocol.irq(number) for number in range(start.irqs + 1)]
        self._buffer = ctypes.create_string_buffer(protocol.REASON_BYTES)
        self._raw = memoryview(self._buffer).cast("B")
        # The address of guest memory; the mapping stays for as long as this is held.
        self._memory = ctypes.c_char.from_buffer(start.memory.map)
        self._initialize(start)
        if start.irqs >= protocol.LEAST_LGUEST_IRQS:
            self._check_lines(start)
        self._owner = threading.get_ident()
        # Whether the owner is in `run`, and may have to be got out.
        self._running = False
        self._break = False
        self._closing = False
        self._failure: LgmpError | None = None
        self._bell = threading.Event()
        self._breaker_idle = threading.Event()
        self._breaker_may_end = threading.Event()
        self._old_handler = signal.signal(_INTERRUPTING_SIGNAL, lambda _number, _frame: None)
        self._breaker = threading.Thread(target=self._break_out, name="lgmp-breaker", daemon=True)
        self._breaker.start()

    def run(self) -> Event:
        """Run the guest until something happens; only from the thread that made the host."""
        buffer = self._buffer
        # From here on a break finds its flag read below, or has the breaker end the read.
        self._running = True
        try:
            while not self._break and self._failure is None:
                size = _pread(self._device.fd, buffer, protocol.REASON_BYTES, _CPU)
                event = self._refused(ctypes.get_errno()) if size < 0 else self._notified(size)
                if event is not None and self._failure is None:
                    return event
        finally:
            self._running = False
        self._break = False
        if self._failure is not None:
            raise self._failure
        return _BREAK

    def _notified(self, size: int) -> Event:
        try:
            return Notify(protocol.parse_notify(self._raw[:size]))
        except ValueError as error:
            raise LgmpError(f"Running guest failed: {self._device.path} gave what is no notify: {error}") from error

    def _refused(self, number: int) -> Event | None:
        """What an error of a read means; None: nothing, read on."""
        if number == errno.EINTR:
            return None
        if number == errno.ENOENT:
            return Died(self._read_reason())
        if number == errno.ERESTART:
            return Reboot()
        if number == errno.EAGAIN and self._abi.breaks:
            # In this order: what breaks in from now on is seen by the next run.
            self._break = False
            self._device.write(protocol.break_out(False))
            return _BREAK
        raise LgmpError(f"Running guest failed: {os.strerror(number)} ({_name(number)}) from {self._device.path}")

    def irq(self, number: int) -> None:
        """Make an interrupt pending; `irq_from_any_thread` says who may call this."""
        try:
            self._device.write(self._irqs[number])
        except OSError as error:
            if error.errno == errno.ENOENT:
                return  # the guest is dead, and its owner is about to hear of it
            # For `run` to raise: other threads have nobody to tell it to.
            self._failure = LgmpError(
                f"{self._device.path} does not take interrupt {number}: {error.strerror} ({_name(error.errno)})"
            )
            self.break_in()

    def kicks_to(self, address: int, eventfd: int) -> bool:
        """Have a NOTIFY of exactly `address` signal `eventfd`, where the module can."""
        if not self._abi.eventfds:
            return False
        try:
            self._device.write(protocol.eventfd(address, eventfd))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS):
                return False  # built without: kicks come out of `run`
            raise LgmpError(
                f"{self._device.path} does not send NOTIFY {address:#x} to an eventfd: "
                f"{error.strerror} ({_name(error.errno)})"
            ) from error
        return True

    def break_in(self) -> None:
        """Make `run` return Break; from any thread."""
        self._break = True
        if self._running:
            self._bell.set()

    def close(self) -> None:
        """End the guest: the module forgets it when its device is closed."""
        if self._closing:
            return
        self._closing = True
        self._bell.set()
        # The breaker may be waiting for us in BREAK, and where the guest is dead only a signal ends that.
        while not self._breaker_idle.wait(_SIGNAL_EVERY):
            with contextlib.suppress(OSError):
                self._device.write(protocol.break_out(False))
            signal.pthread_kill(self._breaker.ident or 0, _INTERRUPTING_SIGNAL)
        # Not before: there must be a thread for the signal to go to.
        self._breaker_may_end.set()
        self._breaker.join()
        signal.signal(_INTERRUPTING_SIGNAL, self._old_handler)
        self._device.close()
        del self._memory

    def _initialize(self, start: GuestStart) -> None:
        base = ctypes.addressof(self._memory)
        tried = (
            f"INITIALIZE with {1 + self._abi.taken // protocol.WORD_BYTES} words of {protocol.WORD_BYTES} bytes, as "
            f"{self._abi.kernels} have it (base {base:#x}, {start.guest_limit // PAGE_SIZE} pages, "
            f"start {start.entry:#x})"
        )
        path = self._device.path
        try:
            taken = self._device.initialize(base, start)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "try --lguest-abi for another era's, or --host embedded")
            raise LgmpError(
                f"{path} does not take a guest: {error.strerror} ({_name(error.errno)}) for {tried}; {remedy}"
            ) from error
        if taken != self._abi.taken:
            others = " or ".join(abi.name for abi in protocol.LGUEST_ABIS if abi is not self._abi)
            raise LgmpError(
                f"{path} is of another era, or no lguest: it took {taken} bytes of {tried}, not {self._abi.taken}; "
                f"try --lguest-abi {others}, or --host embedded"
            )

    def _check_lines(self, start: GuestStart) -> None:
        """See whether the host has interrupts enough, on a guest of its own that never runs: ours would get them."""
        probe = LguestDevice(self._device.path, self._abi)
        try:
            probe.initialize(ctypes.addressof(self._memory), start)
            probe.write(protocol.irq(start.irqs))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise LgmpError(
                    f"{self._device.path} does not say which interrupts it has: {error.strerror} ({_name(error.errno)})"
                ) from error
            raise LgmpError(
                f"Too many devices: they have {start.irqs} virtqueues, and {self._device.path} has fewer interrupts "
                f"for them, perhaps {protocol.LEAST_LGUEST_IRQS - 1}; give the guest fewer, or try --host embedded"
            ) from error
        finally:
            probe.close()

    def _read_reason(self) -> str:
        while (size := _pread(self._device.fd, self._buffer, protocol.REASON_BYTES, _CPU)) < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            raise LgmpError(
                f"the guest is dead, and {self._device.path} does not say why: {os.strerror(number)} ({_name(number)})"
            )
        return protocol.parse_reason(bytes(self._raw[:size]))

    def _break_out(self) -> None:
        """The breaker's thread: ends the owner's read for `break_in`."""
        while not self._closing:
            self._bell.wait()
            self._bell.clear()
            while self._break and self._running and not self._closing:
                if not self._abi.breaks:
                    signal.pthread_kill(self._owner, _INTERRUPTING_SIGNAL)
                    self._bell.wait(_SIGNAL_EVERY)
                    continue
                try:
                    self._device.write(protocol.break_out(True))
                except OSError:
                    break  # the guest is dead, and its owner hears of it
        self._breaker_idle.set()
        self._breaker_may_end.wait()


_REMEDIES = {
    errno.EPERM: "be root, or try --host embedded",
    errno.EACCES: "be root, or try --host embedded",
    errno.EBUSY: "it runs another guest; wait for its end, or try --host embedded",
    errno.ENOMEM: "try less MEM, or --host embedded",
}


def _name(number: int | None) -> str:
    """The name of an error number, for example EINVAL."""
    return errno.errorcode.get(number or 0, f"error {number}")
