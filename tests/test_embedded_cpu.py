"""The emulated CPU: that it is the build whose state the host knows, that code is forgotten, that nothing leaks."""

from __future__ import annotations

import ctypes.util
import gc
import importlib.util
import os
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from embedded_guest import (
    DONE_CALL,
    EAX,
    KERNEL_STACK,
    RAM_BYTES,
    RESULTS,
    SPARE,
    LittleGuest,
    increment,
    load,
    notify,
    set_pte,
    store,
    store_value,
)

from lgmp.errors import LgmpError
from lgmp.hosts import Notify
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded import library as uc
from lgmp.hosts.embedded.cpu import Cpu
from lgmp.hosts.embedded.host import EmbeddedHost
from lgmp.memory import PAGE_SIZE, GuestMemory

PIP = "pip install"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create(RAM_BYTES) as memory:
        yield memory


# The proof of the offsets.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EAX", c.ECX),
        ("ESP", c.EBP),
        ("EIP", c.EIP + 1),
        ("CR2", c.CR2 - 1),
        ("CR3", c.CR3 + 1),
        ("ERROR_CODE", c.ERROR_CODE + 2),
        ("EXCEPTION_IS_INT", c.ERROR_CODE),
        ("OLD_EXCEPTION", c.OLD_EXCEPTION - 1),
        ("_GDT_BASE", c._GDT_BASE + 1),
        ("_GDT_LIMIT", c._GDT_LIMIT - 2),
        ("_UC_NO_EXIT_REQUEST", c._UC_NO_EXIT_REQUEST + 1),
        ("_UC_STOP_INTERRUPT", c._UC_STOP_INTERRUPT + 8),
        ("_UC_STOP_REQUEST", c._UC_STOP_REQUEST - 1),
    ],
)
def test_an_offset_that_does_not_hold_is_found_at_start(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(c, name, value)
    with pytest.raises(LgmpError, match=r"^this build of Unicorn is not the 2\.1\.4 x86-64 wheel of PyPI") as caught:
        Cpu(memory.view, RAM_BYTES)
    assert PIP in str(caught.value)
    assert "\n" not in str(caught.value)


def test_with_the_right_offsets_the_proof_holds_and_leaves_nothing(memory: GuestMemory) -> None:
    cpu = Cpu(memory.view, RAM_BYTES)
    try:
        assert (cpu.q[c.CR3], cpu.d[c.OLD_EXCEPTION]) == (0, c.NO_EXCEPTION)
        assert cpu.read_register(uc.UC_X86_REG_CR0) == c.CR0_AT_START
        assert not any(memory.view[:RAM_BYTES])
    finally:
        cpu.close()


def test_a_missing_package_is_one_line_with_the_remedy(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(LgmpError, match=r"pip install unicorn==2\.1\.4$"):
        EmbeddedHost(memory, RAM_BYTES, 0)


def test_a_package_without_library_is_one_line_with_the_remedy(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ModuleSpec("unicorn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(LgmpError, match=PIP):
        EmbeddedHost(memory, RAM_BYTES, 0)


def test_another_release_is_one_line_with_the_remedy(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uc, "version_of", lambda _library: "2.1.3")
    with pytest.raises(LgmpError, match=r"2\.1\.4, not 2\.1\.3: pip install unicorn==2\.1\.4$"):
        EmbeddedHost(memory, RAM_BYTES, 0)


def test_a_library_that_is_not_unicorn_is_one_line(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ctypes.util.find_library("c")
    assert other
    monkeypatch.setattr(uc, "library_path", lambda: Path(other))
    with pytest.raises(LgmpError, match=r"is not the Unicorn 2\.1\.4 of PyPI") as caught:
        EmbeddedHost(memory, RAM_BYTES, 0)
    assert "\n" not in str(caught.value)


def test_a_library_that_cannot_be_loaded_is_one_line(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libunicorn.so.2"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(uc, "library_path", lambda: broken)
    with pytest.raises(LgmpError, match=f"^cannot load {broken}"):
        EmbeddedHost(memory, RAM_BYTES, 0)


# Code that somebody else writes.


def value_in_eax(value: int) -> bytes:
    """mov eax, value; ret."""
    return load(EAX, value) + b"\xc3"


def call(address: int) -> bytes:
    """mov ecx, address; call ecx."""
    return load(1, address) + b"\xff\xd1"


@pytest.mark.parametrize("flags", [5, 7])
@pytest.mark.parametrize("page", [SPARE, RAM_BYTES - PAGE_SIZE, RAM_BYTES - 5 * PAGE_SIZE])
def test_code_that_a_device_has_written_is_run_once_its_page_is_mapped(page: int, flags: int) -> None:
    """Read-only as program text is, or writable; the page has run with other code before."""
    rounds = 4
    step = call(page) + store(EAX, RESULTS) + notify(1) + set_pte(page, page | flags)
    # As a worker does it: through a mapping of its own of the same file.
    with LittleGuest(step * rounds) as guest, GuestMemory(os.dup(guest.memory.fd), RAM_BYTES) as worker:
        for number in range(rounds):
            code = value_in_eax(0x1000 + number)
            worker.view[page : page + len(code)] = code
            assert guest.run() == Notify(1)
            assert guest.result() == 0x1000 + number


def test_code_across_two_pages_is_forgotten_with_either() -> None:
    first, second = SPARE, SPARE + PAGE_SIZE
    at = second - 3  # the immediate of the mov lies in both pages
    step = call(at) + store(EAX, RESULTS) + notify(1)
    code = step + set_pte(second, second | 5) + step + set_pte(first, first | 5) + step
    with LittleGuest(code) as guest:
        guest.write(at, value_in_eax(0x11111111))
        assert guest.run() == Notify(1)
        assert guest.result() == 0x11111111
        guest.write(second, b"\x22\x22")
        assert guest.run() == Notify(1)
        assert guest.result() == 0x22221111
        guest.write(at + 1, b"\x33\x33")
        assert guest.run() == Notify(1)
        assert guest.result() == 0x22223333


def test_pages_mapped_in_one_go_are_all_forgotten() -> None:
    pages = [SPARE + number * PAGE_SIZE for number in range(6)]
    runs = b"".join(call(page) + store(EAX, RESULTS + 4 * number) for number, page in enumerate(pages))
    maps = b"".join(set_pte(page, page | 5) for page in pages)
    with LittleGuest(runs + notify(1) + maps + runs) as guest:
        for number, page in enumerate(pages):
            guest.write(page, value_in_eax(number))
        assert guest.run() == Notify(1)
        assert [guest.result(number) for number in range(6)] == list(range(6))
        for number, page in enumerate(pages):
            guest.write(page, value_in_eax(100 + number))
        guest.finish()
        assert [guest.result(number) for number in range(6)] == list(range(100, 106))


def test_a_page_that_is_what_it_was_keeps_its_translation() -> None:
    read_only, writable = SPARE | 5, SPARE | 7
    maps = [read_only, read_only, read_only, writable, writable, read_only, read_only]
    code = b"".join(set_pte(SPARE, entry) + notify(1) for entry in maps)
    with LittleGuest(code) as guest:
        forgotten: list[tuple[int, int]] = []
        cpu, forget = guest.host._cpu, guest.host._cpu.forget_code

        def forget_code(start: int, end: int) -> None:
            forgotten.append((start, end))
            forget(start, end)

        cpu.forget_code = forget_code  # type: ignore[method-assign]

        def forgets() -> bool:
            forgotten.clear()
            assert guest.run() == Notify(1)
            assert all(pages == (SPARE, SPARE + PAGE_SIZE) for pages in forgotten)
            return bool(forgotten)

        assert forgets()  # it is new
        assert not forgets()  # nothing has changed
        guest.write(SPARE + PAGE_SIZE - 1, b"x")
        assert forgets()  # one byte has
        assert forgets()  # writable: who knows
        assert forgets()
        assert forgets()  # it was writable in between
        assert not forgets()


def test_code_that_the_guest_writes_itself_needs_nothing() -> None:
    """Even in the block that runs."""
    # mov byte [next + 1], 0x77; next: mov eax, 0x11; mov [RESULTS], eax
    length = 7
    code = b"\xc6\x05" + (0x10000 + length + 1).to_bytes(4, "little") + b"\x77" + load(EAX, 0x11) + store(EAX, RESULTS)
    with LittleGuest(code) as guest:
        guest.finish()
        assert guest.result() == 0x77
    code = b"".join(
        store_value(SPARE + 1, value) + call(SPARE) + store(EAX, RESULTS + 4 * number)
        for number, value in enumerate((5, 6, 7))
    )
    with LittleGuest(code) as guest:
        guest.write(SPARE, value_in_eax(1))
        guest.finish()
        assert [guest.result(number) for number in range(3)] == [5, 6, 7]


def test_no_address_ends_the_emulation_by_itself() -> None:
    """Least of all 0, which is what uc_emu_start is told to run until."""
    code = increment(RESULTS) + DONE_CALL
    for address in (0, 0x800, SPARE, RAM_BYTES - len(code)):
        with LittleGuest(call(address)) as guest:
            guest.write(address, code)
            guest.finish()
            assert guest.result() == 1


# What a host holds.


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped_pages() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])


def test_a_closed_host_leaves_nothing_behind() -> None:
    def one() -> None:
        with LittleGuest() as guest:
            guest.finish()

    one()
    gc.collect()
    before = (descriptors(), threading.active_count())
    pages = mapped_pages()
    for _ in range(20):
        one()
    assert (descriptors(), threading.active_count()) == before
    # Twenty guests of 2 MiB and their translation buffers would be gigabytes.
    assert mapped_pages() - pages < 64 << 20 >> 12


def test_a_host_that_could_not_start_leaves_nothing_behind(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    EmbeddedHost(memory, RAM_BYTES, 0).close()
    gc.collect()
    before = (descriptors(), threading.active_count())
    pages = mapped_pages()
    monkeypatch.setattr(c, "CR2", c.CR2 - 1)
    for _ in range(20):
        with pytest.raises(LgmpError):
            EmbeddedHost(memory, RAM_BYTES, 0)
    assert (descriptors(), threading.active_count()) == before
    assert mapped_pages() - pages < 64 << 20 >> 12


def test_a_host_can_be_closed_twice_and_broken_afterwards(memory: GuestMemory) -> None:
    host = EmbeddedHost(memory, RAM_BYTES, 0)
    host.close()
    host.close()
    host.break_in()


def test_a_guest_sees_no_more_memory_than_its_limit(memory: GuestMemory) -> None:
    memory.view[0 : len(DONE_CALL)] = DONE_CALL
    host = EmbeddedHost(memory, PAGE_SIZE, 0)
    try:
        assert host._guest.limit == PAGE_SIZE
        with pytest.raises(IndexError):
            host._guest.memory[PAGE_SIZE]
        assert KERNEL_STACK > PAGE_SIZE
    finally:
        host.close()
