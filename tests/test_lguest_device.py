"""The stand-in for /dev/lguest: that it answers as the kernel's module does, to the byte, in each era.

Everything here is system calls on its file, from threads and processes as launchers make them; guests are a few bytes
of machine code. The words and counts are written down here a second time, as the kernels have them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from embedded_guest import (
    CODE,
    DIRECTORY,
    DONE,
    ERAS,
    RAM_BYTES,
    RESULTS,
    SETUP,
    LittleGuest,
    call_of,
    handler,
    increment,
    jump,
)
from launching import GUEST, HANGS_AFTER, wait_until
from lguest_devices import DEVICE_ERAS, LguestDevice, needs_lguest_device

from lgmp.bus import LguestBus
from lgmp.hosts.embedded import abi
from lgmp.loader import load_guest, map_memory
from lgmp.memory import PAGE_SIZE, GuestMemory

pytestmark = needs_lguest_device

# 2.6.30 has a rule of each, and none of its own.
OLD, _BETWEEN, NEW = DEVICE_ERAS
GUEST_ABIS = {each.name: each for each in ERAS}
GUEST_ABI = {OLD: GUEST_ABIS["2.6.26"], NEW: GUEST_ABIS["3.x"]}
TAKEN = {(OLD, 8): 32, (OLD, 4): 16, (NEW, 8): 24, (NEW, 4): 12}
PAGES = RAM_BYTES >> 12

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_32BIT = 0x40  # x86-64
SHARED_FIXED = mmap.MAP_SHARED | MAP_FIXED
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_size_t
LIBC.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]

SPIN = increment(RESULTS) + jump(CODE, CODE + len(increment(RESULTS)))

every_era = pytest.mark.parametrize("era", [OLD, NEW])


def words(*values: int, word: int = 8) -> bytes:
    return b"".join(value.to_bytes(word, "little") for value in values)


def initialize(era: str, base: int, pages: int = PAGES, start: int = SETUP, word: int = 8) -> bytes:
    if era == OLD:
        return words(0, base, pages, DIRECTORY, start, word=word)
    return words(0, base, pages, start, word=word)


def irq(number: int) -> bytes:
    return words(2, number)


def break_out(on: int) -> bytes:
    return words(3, on)


def eventfd(address: int, descriptor: int) -> bytes:
    return words(4, address, descriptor & 0xFFFFFFFF)


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@contextlib.contextmanager
def mapped(size: int, flags: int, fd: int = -1, protection: int = READ_WRITE) -> Iterator[int]:
    """Memory as mmap(2) gives it: its address."""
    address: int = LIBC.mmap(0, size, protection, flags, fd, 0)
    yield address
    LIBC.munmap(address, size)


def error_of(call: Callable[..., object], *arguments: object) -> str:
    """The name of the error that the call fails with."""
    try:
        result = call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    raise AssertionError(f"no error, but {result!r}")


def device_of(era: str, *, word: int = 8, **options: object) -> LguestDevice:
    """A stand-in for launchers of 64 bits, whatever these tests run on."""
    return LguestDevice(era, word=word, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def opened(device: LguestDevice) -> Iterator[int]:
    fd = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def guest_of(era: str, code: bytes = b"", gates: Iterable[int] = ()) -> LittleGuest:
    """A guest of that era's, which runs the code and then notifies DONE for ever; its own host is never run."""
    notify = call_of(GUEST_ABI[era], abi.LHCALL_NOTIFY, DONE)
    return LittleGuest(code + notify + jump(0, len(notify)), gates=gates, era=GUEST_ABI[era])


def notify(era: str, *addresses: int) -> bytes:
    return b"".join(call_of(GUEST_ABI[era], abi.LHCALL_NOTIFY, address) for address in addresses)


def halt(era: str) -> bytes:
    return call_of(GUEST_ABI[era], abi.LHCALL_HALT)


@dataclass
class Running:
    """A device, and an initialised guest on it that this thread owns."""

    device: LguestDevice
    guest: LittleGuest
    fd: int

    def write(self, data: bytes, offset: int = 0) -> int:
        return os.pwrite(self.fd, data, offset)

    def read(self, size: int = 8, offset: int = 0) -> bytes:
        return os.pread(self.fd, size, offset)

    def fails(self, data: bytes, offset: int = 0) -> str:
        return error_of(self.write, data, offset)

    def read_fails(self, size: int = 8, offset: int = 0) -> str:
        return error_of(self.read, size, offset)

    def wait_until_it_runs(self) -> None:
        """For SPIN."""
        before = self.guest.result()
        wait_until(lambda: self.guest.result() != before, "the guest counts")


@contextlib.contextmanager
def running(era: str, code: bytes = b"", gates: Iterable[int] = (), **options: object) -> Iterator[Running]:
    """A guest that this thread owns and nobody has run yet."""
    with (
        device_of(era, **options) as device,  # type: ignore[arg-type]
        guest_of(era, code, gates) as guest,
        opened(device) as fd,
    ):
        run = Running(device, guest, fd)
        assert run.write(initialize(era, address_of(guest.memory.map))) == TAKEN[era, 8]
        yield run


class OwnThread:
    """A thread, the same for all that is submitted to it, which can be sent signals."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._ident = executor.submit(threading.get_ident).result()
        self.id = executor.submit(threading.get_native_id).result()

    def signal(self) -> None:
        signal.pthread_kill(self._ident, signal.SIGUSR1)

    def submit(self, call: Callable[..., object], *arguments: object) -> Future[object]:
        return self._executor.submit(call, *arguments)

    def call(self, call: Callable[..., object], *arguments: object) -> object:
        return self.submit(call, *arguments).result(HANGS_AFTER)

    def wait_until_it_waits(self) -> None:
        """For an answer of the device's, in the kernel."""

        def waits() -> bool:
            with open(f"/proc/self/task/{self.id}/wchan", encoding="ascii") as file:
                where = file.read()
            return "request_wait_answer" in where or "fuse" in where

        wait_until(waits, "the thread waits for the device")


@contextlib.contextmanager
def own_thread() -> Iterator[OwnThread]:
    with ThreadPoolExecutor(1) as executor:
        yield OwnThread(executor)


def elsewhere(call: Callable[..., object], *arguments: object) -> object:
    """What the call gives in another thread."""
    with own_thread() as thread:
        return thread.call(call, *arguments)


def bare_read(fd: int) -> int | str:
    """pread(2) of a word, where Python's would start anew after a signal: its value, or the error's name."""
    buffer = ctypes.create_string_buffer(8)
    ctypes.set_errno(0)
    result = LIBC.pread64(fd, buffer, ctypes.c_size_t(8), ctypes.c_int64(0))
    return int.from_bytes(buffer.raw, "little") if result == 8 else errno.errorcode[ctypes.get_errno()]


def bare_write(fd: int, data: bytes) -> int | str:
    """pwrite(2) likewise: the count, or the error's name."""
    ctypes.set_errno(0)
    result: int = LIBC.pwrite64(fd, data, ctypes.c_size_t(len(data)), ctypes.c_int64(0))
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]


@pytest.fixture
def signals() -> Iterator[None]:
    """SIGUSR1 does nothing, but interrupts."""
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, old)


# INITIALIZE.


@every_era
@pytest.mark.parametrize("word", [8, 4])
def test_initialize_returns_the_bytes_of_its_arguments(era: str, word: int) -> None:
    with device_of(era, word=word) as device, guest_of(era) as guest, opened(device) as fd:
        with mapped(RAM_BYTES, mmap.MAP_SHARED | MAP_32BIT, guest.memory.fd) as base:
            data = initialize(era, base, word=word)

            assert os.pwrite(fd, data, 0) == TAKEN[era, word]
            assert os.pread(fd, 1024, 0) == DONE.to_bytes(word, "little")

        seen = [(each.operation, each.sent, each.size, each.result) for each in device.requests("write", "read")]
    assert seen == [("write", data, len(data), TAKEN[era, word]), ("read", b"", 1024, word)]


@every_era
def test_initialize_takes_more_than_its_words(era: str) -> None:
    with device_of(era) as device, guest_of(era) as guest, opened(device) as fd:
        data = initialize(era, address_of(guest.memory.map)) + b"more"
        assert os.pwrite(fd, data, 0) == TAKEN[era, 8]


@every_era
def test_initialize_with_too_few_words_is_a_fault(era: str) -> None:
    with device_of(era) as device, guest_of(era) as guest, opened(device) as fd:
        data = initialize(era, address_of(guest.memory.map))
        assert [error_of(os.pwrite, fd, data[:size], 0) for size in (4, 8, len(data) - 1)] == ["EFAULT"] * 3
        assert os.pwrite(fd, data, 0) == TAKEN[era, 8]


@every_era
def test_a_file_is_initialised_once(era: str) -> None:
    with running(era) as run:
        again = initialize(era, address_of(run.guest.memory.map))
        assert run.fails(again) == "EBUSY"
        assert elsewhere(run.fails, again) == "EBUSY"
        assert run.read() == words(DONE)


@every_era
def test_each_open_file_has_a_guest_of_its_own(era: str) -> None:
    with device_of(era) as device, guest_of(era) as first, guest_of(era) as second:
        with opened(device) as a, opened(device) as b:
            for fd, guest in ((a, first), (b, second)):
                assert os.pwrite(fd, initialize(era, address_of(guest.memory.map)), 0) == TAKEN[era, 8]
            assert os.pread(a, 8, 0) == os.pread(b, 8, 0) == words(DONE)
        assert [each.file for each in device.requests("open", "read")] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("flags", "protection", "size"),
    [
        (PRIVATE, READ_WRITE, RAM_BYTES),
        (mmap.MAP_PRIVATE, READ_WRITE, RAM_BYTES),
        (mmap.MAP_SHARED, mmap.PROT_READ, RAM_BYTES),
        (mmap.MAP_SHARED, PROT_NONE, RAM_BYTES),
        (mmap.MAP_SHARED, READ_WRITE, PAGE_SIZE),
    ],
    ids=["anonymous", "copied", "read-only", "untouchable", "truncated"],
)
def test_initialize_with_memory_that_cannot_be_shared_is_a_fault(flags: int, protection: int, size: int) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    with device_of(NEW) as device, opened(device) as lguest, mapped(RAM_BYTES, flags, fd, protection) as base:
        assert error_of(os.pwrite, lguest, initialize(NEW, base), 0) == "EFAULT"
    os.close(fd)


@every_era
def test_initialize_with_memory_that_is_not_there_or_ends_too_early_is_a_fault(era: str) -> None:
    with (
        device_of(era) as device,
        opened(device) as fd,
        guest_of(era) as guest,
        # A page that nobody may touch follows, as a fence.
        mapped(RAM_BYTES + PAGE_SIZE, PRIVATE, protection=PROT_NONE) as base,
    ):
        LIBC.mmap(base, RAM_BYTES, READ_WRITE, SHARED_FIXED, guest.memory.fd, 0)
        for pages in (0, PAGES + 1, 1 << 20, 1 << 52, (1 << 64) - 1):
            assert error_of(os.pwrite, fd, initialize(era, base, pages), 0) == "EFAULT"
        for wrong in (0, PAGE_SIZE, base + RAM_BYTES, base + 1, (1 << 64) - PAGE_SIZE):
            assert error_of(os.pwrite, fd, initialize(era, wrong), 0) == "EFAULT"
        assert os.pwrite(fd, initialize(era, base), 0) == TAKEN[era, 8]
        assert os.pread(fd, 8, 0) == words(DONE)


def test_memory_may_be_a_file_without_a_name_mapped_in_several_parts() -> None:
    with device_of(NEW) as device, opened(device) as fd, guest_of(NEW) as guest:
        file = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE, 0o600)
        os.ftruncate(file, PAGE_SIZE)  # what is before the guest
        os.pwrite(file, guest.memory.map[:], PAGE_SIZE)
        with mapped(RAM_BYTES, PRIVATE) as base:
            half = RAM_BYTES // 2
            LIBC.mmap(base + half, half, READ_WRITE, SHARED_FIXED, file, PAGE_SIZE + half)
            LIBC.mmap(base, half, READ_WRITE | mmap.PROT_EXEC, SHARED_FIXED, file, PAGE_SIZE)

            assert os.pwrite(fd, initialize(NEW, base), 0) == 24
            assert os.pread(fd, 8, 0) == words(DONE)
        os.close(file)


def test_the_old_device_starts_on_the_launcher_s_page_tables() -> None:
    with device_of(OLD) as device, guest_of(OLD) as guest, opened(device) as fd:
        base = address_of(guest.memory.map)
        assert os.pwrite(fd, words(0, base, PAGES, RAM_BYTES, SETUP), 0) == 32
        assert error_of(os.pread, fd, 8, 0) == "ENOENT"
        assert os.pread(fd, 1024, 0) == f"bad page directory {RAM_BYTES:#x}\0".encode()


@pytest.mark.parametrize("name", ["2.6.31", "3.x"])
def test_the_new_device_makes_the_page_tables_that_its_guest_starts_on(name: str) -> None:
    assert console_of(NEW, name) == b"hello\n"


@pytest.mark.parametrize("name", ["2.6.25", "2.6.26"])
def test_the_old_device_runs_the_guests_of_its_time(name: str) -> None:
    assert console_of(OLD, name) == b"hello\n"


def console_of(era: str, name: str) -> bytes:
    """What the test guest prints on the early console until its end, with a launcher of a few lines."""
    printed = b""
    with device_of(era, guest_abi=name) as device, GuestMemory.create(4 << 20) as memory, opened(device) as fd:
        limit = LguestBus(memory).guest_limit
        loaded = load_guest(memory, GUEST, None, [f"quiet noconsole abi={name} echo hello; poweroff"])
        data = [0, address_of(memory.map), limit >> 12, loaded.entry]
        if era == OLD:
            data.insert(3, map_memory(memory, loaded))
        os.write(fd, words(*data))
        try:
            while True:
                address = int.from_bytes(os.read(fd, 8), "little")
                printed += memory.map[address : memory.map.find(b"\0", address)]
        except FileNotFoundError:
            assert os.read(fd, 1024) == b"CRASH: Power down\0"
    return printed


def test_the_new_device_wants_boot_params_for_page_tables_that_fit() -> None:
    with device_of(NEW, guest_abi="2.6.31") as device, GuestMemory.create(4 << 20) as memory, opened(device) as fd:
        loaded = load_guest(memory, GUEST, None, [])
        data = words(0, address_of(memory.map), 4 << 8, loaded.entry)
        for offset, value in ((0x2D8, 0), (0x2D8, 1 << 30), (0x21C, 4 << 20), (0x21C, 5)):
            right = bytes(memory.view[offset : offset + 4])
            memory.view[offset : offset + 4] = value.to_bytes(4, "little")
            assert error_of(os.pwrite, fd, data, 0) == "EFAULT"
            memory.view[offset : offset + 4] = right
        assert os.pwrite(fd, data, 0) == 24


# Who may do what, and when.


@every_era
def test_nothing_but_initialize_is_valid_before_it(era: str) -> None:
    with device_of(era) as device, opened(device) as fd:
        requests = [irq(1), break_out(1), break_out(0), eventfd(4096, 0), words(1), words(5), words(1 << 32)]
        assert {error_of(os.pwrite, fd, each, 0) for each in requests} == {"EINVAL"}
        assert error_of(os.pread, fd, 8, 0) == "EINVAL"


@every_era
def test_there_is_no_cpu_but_0(era: str) -> None:
    with running(era) as run:
        assert [run.fails(irq(1), offset) for offset in (1, 7, 4096)] == ["EINVAL"] * 3
        assert [run.read_fails(8, offset) for offset in (1, 7, 4096)] == ["EINVAL"] * 3
        assert run.read(8, 1 << 32) == words(DONE)  # an unsigned int
        assert [each.offset for each in run.device.requests("read")] == [1, 7, 4096, 1 << 32]


@every_era
def test_reads_and_writes_without_an_offset_stay_at_cpu_0(era: str) -> None:
    with device_of(era) as device, guest_of(era) as guest, opened(device) as fd:
        assert os.write(fd, initialize(era, address_of(guest.memory.map))) == TAKEN[era, 8]
        assert os.write(fd, irq(1)) == 0
        assert [os.read(fd, 8) for _ in range(3)] == [words(DONE)] * 3
        assert [each.offset for each in device.requests("write", "read")] == [0] * 5


@every_era
def test_reading_is_for_the_thread_that_initialised(era: str) -> None:
    with running(era) as run:
        assert elsewhere(run.read_fails) == "EPERM"
        assert run.read() == words(DONE)


@every_era
def test_the_owner_may_be_any_thread(era: str) -> None:
    with device_of(era) as device, guest_of(era) as guest, opened(device) as fd, own_thread() as owner:
        assert owner.call(os.pwrite, fd, initialize(era, address_of(guest.memory.map)), 0) == TAKEN[era, 8]
        assert error_of(os.pread, fd, 8, 0) == "EPERM"
        assert owner.call(os.pread, fd, 8, 0) == words(DONE)
        assert {each.thread for each in device.requests("write")} == {owner.id}


def test_anyone_may_write_to_the_new_device() -> None:
    with running(NEW) as run:
        event = os.eventfd(0)
        assert elsewhere(run.write, irq(1)) == 0
        assert elsewhere(run.write, eventfd(4096, event)) == 0
        assert elsewhere(run.fails, words(5, 0)) == "EINVAL"
        os.close(event)


def test_others_may_write_nothing_but_break_to_the_old_device() -> None:
    with running(OLD) as run:
        assert elsewhere(run.fails, irq(1)) == "EPERM"
        assert elsewhere(run.fails, words(5, 0)) == "EPERM"
        assert elsewhere(run.write, break_out(0)) == 0


@pytest.mark.parametrize(
    ("era", "request_"),
    [(OLD, 1), (OLD, 4), (OLD, 5), (NEW, 1), (NEW, 3), (NEW, 5), (NEW, 1 << 32 | 2)],
)
def test_what_is_no_request_of_the_era_is_invalid(era: str, request_: int) -> None:
    with running(era) as run:
        assert run.fails(words(request_, 1, 1)) == "EINVAL"


@every_era
def test_a_request_with_too_few_words_is_a_fault(era: str) -> None:
    with running(era) as run:
        requests = [irq(1)[:15], irq(1)[:8], irq(1)[:7]]
        requests += [break_out(1)[:12]] if era == OLD else [eventfd(4096, 0)[:16]]
        assert {run.fails(each) for each in requests} == {"EFAULT"}
        assert run.read() == words(DONE)


# IRQ.


@every_era
@pytest.mark.parametrize(("options", "lines"), [({}, 32), ({"lines": 16}, 16)])
def test_irq_takes_the_lines_that_there_are(era: str, options: dict[str, int], lines: int) -> None:
    with running(era, b"", (), **options) as run:
        assert [run.write(irq(number)) for number in (0, 1, lines - 1)] == [0, 0, 0]
        assert [run.fails(irq(number)) for number in (lines, 1 << 31, (1 << 64) - 1)] == ["EINVAL"] * 3


@every_era
def test_an_interrupt_is_delivered_at_the_next_read(era: str) -> None:
    with running(era, SPIN, gates=[32 + 5]) as run:
        assert run.write(irq(5)) == 0
        assert run.read() == words(handler(32 + 5))


@every_era
def test_the_timer_s_interrupt_can_be_sent_too(era: str) -> None:
    with running(era, SPIN, gates=[32]) as run:
        assert run.write(irq(0)) == 0
        assert run.read() == words(handler(32))


def test_an_interrupt_reaches_the_new_device_s_running_guest() -> None:
    with running(NEW, SPIN, gates=[32 + 31]) as run, own_thread() as other:

        def send() -> int:
            run.wait_until_it_runs()
            return run.write(irq(31))

        sent = other.submit(send)
        assert run.read() == words(handler(32 + 31))
        assert sent.result() == 0


def test_an_interrupt_wakes_the_new_device_s_halted_guest() -> None:
    code = increment(RESULTS) + halt(NEW)
    with running(NEW, code, gates=[32 + 2]) as run, own_thread() as other:

        def send() -> int:
            wait_until(lambda: run.guest.result() == 1, "the guest halts")
            return run.write(irq(2))

        sent = other.submit(send)
        assert run.read() == words(handler(32 + 2))
        assert sent.result() == 0


# read.


@every_era
def test_a_read_gives_the_address_that_the_guest_notifies(era: str) -> None:
    with running(era, notify(era, 0x1000, 0xFFFFFFFC, 1)) as run:
        got = [run.read(size) for size in (8, 1024, 9)]
    assert got == [b"\0\x10" + bytes(6), b"\xfc\xff\xff\xff" + bytes(4), b"\1" + bytes(7)]


@every_era
def test_a_read_of_less_than_a_word_is_a_fault(era: str) -> None:
    with running(era, notify(era, 0x1000)) as run:
        assert run.read_fails(4) == "EFAULT"
        assert run.read() == words(0x1000)


@every_era
def test_a_notify_of_address_0_is_none(era: str) -> None:
    with running(era, notify(era, 0, 0x1000, 0)) as run:
        assert [run.read(), run.read()] == [words(0x1000), words(DONE)]


@every_era
def test_a_dead_guest_is_asked_why(era: str) -> None:
    crash = call_of(GUEST_ABI[era], abi.LHCALL_SHUTDOWN, RESULTS, 1)
    with running(era, crash) as run:
        run.guest.write(RESULTS, b"Because.\0")
        assert run.read_fails() == "ENOENT"
        reason = b"CRASH: Because.\0"
        assert [run.read(size) for size in (1024, len(reason), 6, 1024)] == [reason, reason, b"CRASH:", reason]
        assert elsewhere(run.read_fails) == "EPERM"
        assert {run.fails(each) for each in (irq(1), irq(99), break_out(0), words(9))} == {"ENOENT"}
        assert run.fails(initialize(era, address_of(run.guest.memory.map))) == "EBUSY"


@every_era
def test_a_reboot_is_said_at_every_read(era: str) -> None:
    with running(era, call_of(GUEST_ABI[era], abi.LHCALL_SHUTDOWN, RESULTS, 2)) as run:
        assert [run.read_fails(), run.read_fails(1024)] == ["ERESTART", "ERESTART"]
        assert run.fails(irq(1)) == "ENOENT"


# Signals.


@every_era
def test_a_signal_ends_a_read_and_nothing_is_lost(era: str, signals: None) -> None:
    with device_of(era) as device, guest_of(era, SPIN, gates=[33]) as guest, opened(device) as fd:
        with own_thread() as owner:
            run = Running(device, guest, fd)
            owner.call(run.write, initialize(era, address_of(guest.memory.map)))
            for _ in range(3):
                read = owner.submit(bare_read, fd)
                run.wait_until_it_runs()
                owner.signal()
                assert read.result(HANGS_AFTER) == "EINTR"
            assert owner.call(run.write, irq(1)) == 0
            assert owner.call(bare_read, fd) == handler(33)
        assert [each.error for each in device.requests("read")] == ["EINTR", "EINTR", "EINTR", None]


@every_era
def test_a_signal_wakes_the_reader_of_a_halted_guest(era: str, signals: None) -> None:
    with device_of(era) as device, guest_of(era, halt(era)) as guest, opened(device) as fd, own_thread() as owner:
        owner.call(os.pwrite, fd, initialize(era, address_of(guest.memory.map)), 0)
        read = owner.submit(bare_read, fd)
        owner.wait_until_it_waits()
        owner.signal()
        assert read.result(HANGS_AFTER) == "EINTR"


@every_era
def test_signals_may_come_at_any_time(era: str, signals: None) -> None:
    # The guest notifies without end, so that signals find reads at their start, under way, and answered.
    with device_of(era) as device, guest_of(era) as guest, opened(device) as fd, own_thread() as owner:
        owner.call(os.pwrite, fd, initialize(era, address_of(guest.memory.map)), 0)
        results: set[int | str] = set()
        reads = owner.submit(lambda: results.update(bare_read(fd) for _ in range(300)))
        while not reads.done():
            owner.signal()
        assert results <= {DONE, "EINTR"}
        assert owner.call(os.pread, fd, 8, 0) == words(DONE)


# BREAK, of the old device.


def test_break_ends_reads_until_it_is_taken_back() -> None:
    with running(OLD, SPIN, gates=[33]) as run, own_thread() as waker:

        def break_soon() -> int | str:
            run.wait_until_it_runs()
            return bare_write(run.fd, break_out(1))

        broken = waker.submit(break_soon)
        assert [run.read_fails() for _ in range(3)] == ["EAGAIN"] * 3
        assert not broken.done()
        assert run.write(irq(1)) == 0
        assert run.read_fails() == "EAGAIN"

        assert run.write(break_out(0)) == 0
        assert broken.result(HANGS_AFTER) == 0
        assert run.read() == words(handler(33))


def test_break_wakes_the_reader_of_a_halted_guest() -> None:
    with running(OLD, halt(OLD)) as run, own_thread() as waker:
        broken = waker.submit(bare_write, run.fd, break_out(1))
        assert run.read_fails() == "EAGAIN"
        assert run.write(break_out(0)) == 0
        assert broken.result(HANGS_AFTER) == 0


def test_all_who_break_wait_for_the_same_end_which_is_for_anyone_to_make() -> None:
    with running(OLD, SPIN) as run, own_thread() as one, own_thread() as other:
        broken = [waker.submit(bare_write, run.fd, break_out(1)) for waker in (one, other)]
        one.wait_until_it_waits()
        other.wait_until_it_waits()
        assert elsewhere(run.write, break_out(0)) == 0
        assert [each.result(HANGS_AFTER) for each in broken] == [0, 0]


def test_a_signal_ends_the_wait_of_a_break_but_not_the_break(signals: None) -> None:
    with running(OLD, SPIN) as run, own_thread() as waker:
        broken = waker.submit(bare_write, run.fd, break_out(1))
        waker.wait_until_it_waits()
        waker.signal()
        assert broken.result(HANGS_AFTER) == "EINTR"
        assert run.read_fails() == "EAGAIN"


def test_break_0_without_a_break_is_nothing() -> None:
    with running(OLD) as run:
        assert run.write(break_out(0)) == 0
        assert run.read() == words(DONE)


# EVENTFD, of the new device.


def test_an_eventfd_is_signalled_by_a_notify_of_exactly_its_address() -> None:
    with running(NEW, notify(NEW, 0x5000, 0x5004, 0x5000, 0x4FFF)) as run:
        event = os.eventfd(0, os.EFD_NONBLOCK)
        assert run.write(eventfd(0x5000, event)) == 0

        assert [run.read(), run.read()] == [words(0x5004), words(0x4FFF)]
        assert os.eventfd_read(event) == 2
        os.close(event)


def test_an_eventfd_is_signalled_while_the_read_goes_on() -> None:
    with running(NEW, notify(NEW, 0x5000) + halt(NEW), gates=[33]) as run, own_thread() as other:
        event = os.eventfd(0)
        assert run.write(eventfd(0x5000, event)) == 0

        def answer() -> int:
            assert os.eventfd_read(event) == 1
            return run.write(irq(1))

        answered = other.submit(answer)
        assert run.read() == words(handler(33))
        assert answered.result() == 0
        os.close(event)


def test_an_eventfd_is_the_device_s_too_once_it_is_given_and_the_first_one_counts() -> None:
    with running(NEW, notify(NEW, 0x5000)) as run:
        event, second = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        kept = os.dup(event)
        assert run.write(eventfd(0x5000, event)) == 0
        os.close(event)
        assert run.write(eventfd(0x5000, second)) == 0
        assert run.read() == words(DONE)
        assert os.eventfd_read(kept) == 1
        assert error_of(os.eventfd_read, second) == "EAGAIN"
        os.close(kept)
        os.close(second)


def test_what_is_no_eventfd_is_refused() -> None:
    with running(NEW) as run:
        event = os.eventfd(0)
        reading, writing = os.pipe()
        assert run.fails(eventfd(0, event)) == "EINVAL"
        assert [run.fails(eventfd(4096, fd)) for fd in (reading, run.fd)] == ["EINVAL"] * 2
        for fd in (reading, writing, event):
            os.close(fd)
        assert [run.fails(eventfd(4096, fd)) for fd in (event, -1, 1 << 20)] == ["EBADF"] * 3


# The end.


def files_and_threads(pid: int) -> tuple[list[str], int]:
    """What a process holds of guests: memory and eventfds that are open or mapped, and how many threads it has."""
    held = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        held += [line.split(maxsplit=5)[5] for line in maps if line.count("/") and "memfd" in line]
    return [each for each in held if "lgmp-guest" in each or "eventfd" in each], len(os.listdir(f"/proc/{pid}/task"))


@every_era
def test_nothing_is_left_of_a_guest_once_its_file_is_closed(era: str) -> None:
    with device_of(era) as device:
        before = files_and_threads(device.process.pid)
        with guest_of(era, notify(era, 0x1000)) as guest, opened(device) as fd:
            os.pwrite(fd, initialize(era, address_of(guest.memory.map)), 0)
            if era == NEW:
                event = os.eventfd(0)
                os.pwrite(fd, eventfd(0x2000, event), 0)
                os.close(event)
            os.pread(fd, 8, 0)
            duplicate = os.dup(fd)
            os.close(duplicate)
            assert os.pread(fd, 8, 0) == words(DONE)
            assert files_and_threads(device.process.pid) != before
        wait_until(lambda: device.requests("release"), "the file is released")
        wait_until(lambda: files_and_threads(device.process.pid) == before, "the guest is gone")
        assert before[0] == []


def test_a_device_whose_file_is_still_open_at_its_end_says_so() -> None:
    device = device_of(NEW)
    fd = os.open(device.path, os.O_RDWR)
    with pytest.raises(AssertionError, match="not every open file was released"):
        device.__exit__(None, None, None)
    assert error_of(os.pread, fd, 8, 0) == error_of(os.close, fd) == "ENOTCONN"
    assert not os.path.exists(os.path.dirname(device.path))


LAUNCHER = """
import ctypes, mmap, os, sys
path, memory, words = sys.argv[1], int(sys.argv[2]), [int(each) for each in sys.argv[3:]]
memory = mmap.mmap(memory, os.fstat(memory).st_size)
words[1] = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fd = os.open(path, os.O_RDWR)
os.write(fd, b"".join(each.to_bytes(8, "little") for each in words))
os.pread(fd, 8, 0)
"""


@every_era
def test_a_launcher_that_reads_can_be_killed(era: str) -> None:
    with device_of(era) as device, guest_of(era, SPIN) as guest:
        data = [0, 0, PAGES, *([DIRECTORY] if era == OLD else []), SETUP]
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, device.path, str(guest.memory.fd), *map(str, data)],
            pass_fds=(guest.memory.fd,),
        )
        wait_until(lambda: guest.result() > 0, "the guest counts")
        launcher.kill()
        assert launcher.wait(HANGS_AFTER) == -signal.SIGKILL
        wait_until(lambda: device.requests("release"), "the file is released")
        assert [each.error for each in device.requests("read")] == ["EINTR"]


STARTER = """
import sys
from lguest_devices import LguestDevice
device = LguestDevice()
print(device.process.pid, device.path, flush=True)
sys.stdin.read()
"""


def test_a_device_ends_with_whoever_started_it() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        cwd=os.path.dirname(os.path.abspath(__file__)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with starter:
        assert starter.stdout is not None
        pid, path = starter.stdout.readline().split()
        assert os.path.exists(path)
        pidfd = os.pidfd_open(int(pid))
        starter.kill()
    assert select.select([pidfd], [], [], HANGS_AFTER)[0]
    os.close(pidfd)
    wait_until(lambda: not os.path.exists(os.path.dirname(path)), "its directory is gone")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        assert os.path.dirname(path) not in mounts.read()


def test_a_device_that_is_killed_leaves_nothing_behind() -> None:
    device = device_of(NEW)
    device.process.kill()
    with pytest.raises(AssertionError, match="the stand-in died: -9"):
        device.__exit__(None, None, None)
    assert not os.path.exists(os.path.dirname(device.path))


# Faults.


def test_faults_are_injected_where_they_were_asked_for() -> None:
    inject = ["open:EBUSY@2", "write:INITIALIZE:EPERM@1", "write:INITIALIZE:=16@2", "write:IRQ:EINVAL@2", "read:EIO@2"]
    with device_of(NEW, inject=inject) as device, guest_of(NEW, notify(NEW, 0x1000)) as guest:
        with opened(device) as fd:
            run = Running(device, guest, fd)
            assert error_of(os.open, device.path, os.O_RDWR) == "EBUSY"
            assert run.fails(initialize(NEW, address_of(guest.memory.map))) == "EPERM"
            assert run.write(initialize(NEW, address_of(guest.memory.map))) == 16
            assert run.write(irq(1)) == 0
            assert run.fails(irq(1)) == "EINVAL"
            assert run.write(irq(1)) == 0
            assert run.read() == words(0x1000)
            assert run.read_fails() == "EIO"
            assert run.read() == words(DONE)
        results = [(each.operation, each.error or each.result) for each in device.requests("open", "write")]
    assert results == [
        ("open", 0),
        ("open", "EBUSY"),
        *(("write", result) for result in ("EPERM", 16, 0, "EINVAL", 0)),
    ]


def test_a_fault_without_a_number_is_in_every_call() -> None:
    with running(NEW, inject=["write:EVENTFD:EPERM", "read:EINTR@1"]) as run:
        assert [run.fails(eventfd(4096, 0)), run.fails(eventfd(8192, 0))] == ["EPERM"] * 2
        assert bare_read(run.fd) == "EINTR"
        assert bare_read(run.fd) == DONE


@pytest.mark.parametrize("text", ["read", "read:EWHAT", "read:=3", "write:WHAT:EIO", "close:EIO", "read:EIO@x"])
def test_a_fault_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(AssertionError, match="does not start"):
        device_of(NEW, inject=[text])
