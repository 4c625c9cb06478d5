"""Hostile guests by the hundred: hypercalls with any arguments, and any bytes at all as code.

Whatever they do, `run` returns an event, nothing outside the guest's memory changes, and this process lives.

`LGMP_LONG=1` runs many times as many. The random machine code runs in a process of its own, so that a crash of the
emulator is a failed test; `python tests/test_embedded_fuzz.py SEED COUNT` is that process.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

from embedded_guest import (
    CODE,
    DATA,
    DIRECTORY,
    KERNEL_DS,
    KERNEL_STACK,
    RAM_BYTES,
    SPARE,
    TABLE,
    USER_CODE_HIGH,
    LittleGuest,
    gate,
    handler,
    hypercall,
    notify,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.hosts import Break, Died, Event, Notify, Reboot
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded.traps import Traps

LONG = os.environ.get("LGMP_LONG") == "1"
HOST = abi.SWITCHER_ADDRESS
EVENTS = (Notify, Died, Reboot, Break)

# Numbers that mean something to some hypercall, and their neighbours.
LANDMARKS = [0, 1, 2, 3, 4, 6, 8, 0xE, 0xF, 0x1F, 0x20, 0x69, 0x7F, 0x80, 0xFF, 256, 1023, 1024, 4096]
LANDMARKS += [
    DATA,
    DIRECTORY,
    TABLE,
    CODE,
    SPARE,
    SPARE | 5,
    SPARE | 7,
    SPARE | 0x87,
    TABLE | 7,
    KERNEL_DS,
    KERNEL_STACK,
]
LANDMARKS += [RAM_BYTES - 4096, RAM_BYTES - 128, RAM_BYTES - 4, RAM_BYTES, RAM_BYTES | 7, HOST, HOST | 7, HOST + 0x1000]
LANDMARKS += [0x80000000, 0xFFFFF000, 0xFFFFFFF0, 0xFFFFFFFF, USER_CODE_HIGH, 0xC0000000, *gate(handler(6))]

words = (
    st.sampled_from(LANDMARKS) | st.integers(0, 0xFFFFFFFF) | st.integers(0, RAM_BYTES >> 12).map(lambda pfn: pfn << 12)
)
numbers = st.sampled_from(range(20)) | words
calls = st.tuples(numbers, words, words, words, words)


def host_pages(guest: LittleGuest) -> bytes:
    """The host's pages but for the first 256 bytes of its second: the descriptors, which are the guest's to load."""
    pages = bytes(guest.host._cpu._host_pages)
    return pages[:4096] + pages[4096 + 256 :]


def check(guest: LittleGuest, event: Event, pages: bytes) -> None:
    """The event is one, the host's pages are what they were, and nothing in the live table is of ring 0."""
    assert isinstance(event, EVENTS), event
    assert host_pages(guest) == pages
    assert guest.ring != 0 or isinstance(event, Died)
    for high in list(guest.host._cpu.gdt)[1::2]:
        assert not high & 0x8000 or (high & 0x6000 and high & 0x1000)


@settings(max_examples=20_000 if LONG else 200, deadline=None)
@given(st.lists(calls, max_size=6), st.lists(st.tuples(st.integers(0, 255), calls), max_size=8), st.booleans())
def test_any_hypercalls_end_in_an_event_and_touch_nothing_of_ours(
    direct: list[tuple[int, int, int, int, int]],
    ring: list[tuple[int, tuple[int, int, int, int, int]]],
    paging: bool,
) -> None:
    code = b"".join(hypercall(*call) for call in direct)
    with LittleGuest(notify(1) + code, gates=[6, 13, 14], paging=paging) as guest:
        pages = host_pages(guest)
        assert guest.run() == Notify(1)
        for slot, (status, call) in enumerate(ring):
            at = (DATA + abi.LATEST.hcalls >> 2) + abi.LATEST.hcall_words * slot
            for number, value in enumerate(call):
                guest.words[at + number] = value
            guest.memory.view[DATA + abi.LATEST.hcall_status + slot] = status
        for _ in range(20):
            # A halt may well be for ever.
            event = guest.run_for(0.005)
            check(guest, event, pages)
            if not isinstance(event, Notify):
                break


# Any bytes as code.

# Instructions that have to do with rings, segments, the system or memory, and prefixes.
_OPCODES = """
    0f20 0f22 0f01 0f00 0f05 0f34 0f35 0f07 0f30 0f32 0fa2 0fae 0fc7 0f09 0f06 0f0b f4 fa fb cd cc
    ce cf ca cb 9a ea ff 8e 8c c4 c5 0fb2 0fb4 0fb5 9c 9d ec ee 6c 6e f3 f2 66 67 f0 64 65 2e a3 a1
    89 8b c705 ff05 d9 db dd df 62 63 c8 c9 60 61 aa ab a4 a5 e2 e3 eb 74 e8 e9 c3 0f38 0f3a f1 d6
    d7 0fa0 0fa9 0f02 0f03 0f31 0f33 0f37 0f0d 0f18
"""
OPCODES = [bytes.fromhex(opcode) for opcode in _OPCODES.split()]


def random_code(randomly: random.Random, size: int) -> bytes:
    """Bytes that are instructions more often than not, with numbers in them that mean something."""
    code = b""
    while len(code) < size:
        kind = randomly.random()
        if kind < 0.15:
            number = randomly.choice([*range(20), randomly.randrange(256)])
            code += hypercall(number, *(randomly.choice(LANDMARKS) for _ in range(4)))
        elif kind < 0.3:
            code += bytes([0xB8 + randomly.randrange(8)]) + randomly.choice(LANDMARKS).to_bytes(4, "little")
        elif kind < 0.4:
            code += b"\x68" + randomly.choice(LANDMARKS).to_bytes(4, "little")
        elif kind < 0.8:
            code += randomly.choice(OPCODES) + randomly.randbytes(randomly.randrange(6))
        else:
            code += randomly.randbytes(randomly.randrange(1, 8))
    return code


def one_random_guest(randomly: random.Random) -> str:
    """Run one guest of random code, in ring 1 or ring 3, for some milliseconds; gives what became of it."""
    code = random_code(randomly, 400)
    ring_1 = randomly.random() < 0.6
    vectors = [*range(1, 20), 32, 33, 0x80, 0x81]
    gates = {
        vector: gate(handler(vector), disables=randomly.random() < 0.3, privilege=randomly.choice([1, 3]))
        for vector in vectors
    }
    with LittleGuest(code if ring_1 else b"", None if ring_1 else code, gates=gates) as guest:
        for vector in vectors:
            # Most handlers skip something and go back: lea esp, [esp + 4]; add dword [esp], n; iret
            error = b"\x8d\x64\x24\x04" if vector in abi.TRAPS_WITH_ERROR_CODE else b""
            skip = b"\x83\x04\x24" + bytes([randomly.randrange(1, 8)])
            guest.write(handler(vector), error + skip + b"\xcf")
        # Descriptors of all kinds, and a table that maps what it should not.
        for index in range(64):
            guest.words[(SPARE >> 2) + index] = randomly.choice(LANDMARKS) if index & 1 else randomly.getrandbits(32)
        pages = host_pages(guest)
        event: Event = Break()
        for _ in range(6):
            if randomly.random() < 0.3:
                guest.host.irq(randomly.randrange(1, 32))
            event = guest.run_for(0.004)
            check(guest, event, pages)
            if isinstance(event, (Died, Reboot)):
                break
        return type(event).__name__


def main(seed: int, count: int) -> None:
    """The process of random machine code: as many guests, two at a time."""
    ends: dict[str, int] = {}
    failures: list[BaseException] = []

    def work(number: int) -> None:
        randomly = random.Random(f"{seed} {number}")
        for example in range(count // 2):
            state = randomly.getstate()
            try:
                end = one_random_guest(randomly)
            except BaseException as failure:
                failure.add_note(f"thread {number}, example {example}, random state {hash(state)}")
                failures.append(failure)
                return
            ends[end] = ends.get(end, 0) + 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    print(ends)


def test_any_bytes_as_code_leave_the_process_alive() -> None:
    seed = random.SystemRandom().randrange(1 << 32) if LONG else 1
    count = 20_000 if LONG else 200
    done = subprocess.run(
        [sys.executable, __file__, str(seed), str(count)], capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, f"seed {seed}, exit {done.returncode}: {done.stdout}{done.stderr}"


# What the host does with numbers that no little guest gets out of a CPU, but a wide state could hold.


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.sampled_from([0, 6, 13, 14]))
@settings(max_examples=1000 if LONG else 50, deadline=None)
def test_a_frame_of_any_registers_is_pushed_or_ends_the_guest(eip: int, esp: int, vector: int) -> None:
    with LittleGuest(gates=[0, 6, 13, 14]) as guest:
        guest.finish()
        cpu = guest.host._cpu
        cpu.q[c.EIP], cpu.q[c.ESP], cpu.q[c.CR2] = eip, esp, eip
        traps: Traps = guest.host._traps
        start = cpu.start
        faulted: list[int] = []

        def fault_first(address: int) -> int:
            if not faulted:
                faulted.append(address)
                guest.host._invalid_opcode() if vector == 6 else traps.fault(vector)
            return start(cpu.q[c.EIP] & 0xFFFFFFFF)

        cpu.start = fault_first  # type: ignore[method-assign, assignment]
        event = guest.run_for(0.1)
        assert isinstance(event, (Notify, Died)), event


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
