"""The kit for device authors: what it offers a device, what it notices, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.errors import LgmpError
from lgmp.mailbox import Mailbox, ToLauncher, ToWorker
from lgmp.testing import (
    ANY_LAYOUT_SHAPES,
    FEATURES,
    MISDEEDS,
    PATIENCE,
    SHAPES,
    Chain,
    Driver,
    Misdeed,
    Shape,
    Unexpected,
    WorkerProcess,
    chains,
    direct,
    indirect,
    scattered,
)
from lgmp.testing.fixtures import MakeDriver, StartWorker
from lgmp.virtio.block import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from lgmp.virtio.ring import RingError
from workers.device import RequestDevice

SECTOR = 512
DISK_SECTORS = 512
ROUNDS = 12
BATCH = 40

# A device and its test, as somebody writes them who has nothing of lgmp's but what is installed.
UPSIDE_DOWN = """
from workers.device import RequestDevice
from workers.runtime import run


class UpsideDown(RequestDevice):
    def handle(self, queue, readable, writable):
        text = b"".join(readable)[::-1]
        for segment in writable:
            size = min(len(segment), len(text))
            segment[:size], text = text[:size], text[size:]
        return sum(map(len, readable)) - len(text)


if __name__ == "__main__":
    run("upside-down", lambda options: UpsideDown(), {})
"""
ITS_TEST = """
import pytest
from lgmp.testing import ANY_LAYOUT_SHAPES, direct
from upside_down import UpsideDown

pytest_plugins = ["lgmp.testing.fixtures"]


@pytest.mark.parametrize("shape", ANY_LAYOUT_SHAPES.values(), ids=ANY_LAYOUT_SHAPES)
def test_text_comes_back_upside_down(driver, worker, shape):
    process = worker("upside_down", driver())
    chain = shape(process.driver, b"hello", 5)
    process.kick()
    process.collect(1)
    assert chain.answer == b"olleh"
    print("pid", process.process.pid)


def test_without_a_process(driver):
    guest, device = driver(num=8), UpsideDown()
    recorder = guest.attach(device)
    chain = direct(guest, b"hello", 5)
    device.serve()
    assert chain.answer == b"olleh"
    assert recorder.used_queues == [0]


def test_a_kill(driver, worker):
    process = worker("upside_down", driver())
    process.kick()
    process.kill()
    chain = direct(process.driver, b"hello", 5)
    process.restart().collect(1)
    assert chain.answer == b"olleh"
"""


class Echo(RequestDevice):
    """Gives back what it was given, as far as there is room."""

    def handle(self, queue: int, readable: list[memoryview], writable: list[memoryview]) -> int:
        text = b"".join(readable)
        written = 0
        for segment in writable:
            piece = text[written : written + len(segment)]
            segment[: len(piece)] = piece
            written += len(piece)
        return written


@pytest.fixture
def disk() -> Iterator[int]:
    """A disk whose sectors say their numbers."""
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(content(sector) for sector in range(DISK_SECTORS)))
        file.flush()
        yield file.fileno()


@pytest.fixture
def block(driver: MakeDriver, worker: StartWorker, disk: int) -> WorkerProcess:
    return worker("workers.block", driver(), [f"--disk-fd={disk}"], pass_fds=[disk])


def content(sector: int, generation: int = 0) -> bytes:
    return struct.pack("<II", sector, generation) * (SECTOR // 8)


def read(driver: Driver, sector: int, shape: Shape = direct) -> Chain:
    return shape(driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1)


def write(driver: Driver, sector: int, data: bytes, shape: Shape = direct) -> Chain:
    return shape(driver, struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, sector), data, 1)


def is_there(name: str) -> bool:
    """Whether there is a message queue of that name."""
    try:
        Mailbox.open(name).close()
    except LgmpError:
        return False
    return True


# Chains


@pytest.mark.parametrize("shape", ANY_LAYOUT_SHAPES.values(), ids=ANY_LAYOUT_SHAPES)
def test_every_shape_says_the_same_to_a_device(driver: MakeDriver, shape: Shape) -> None:
    guest = driver(queues=2, num=16)
    queue = guest.device_queues()[1]
    for parts in ([b"one"], [5], [b"a", b"", b"bcd", 3, 0, 4], [b"out", 3]):
        chain = shape(guest, *parts, queue=1)
        taken = queue.pop()
        assert taken is not None
        head, readable, writable = taken
        assert head == chain.head
        assert b"".join(readable) == b"".join(part for part in parts if isinstance(part, bytes))
        assert sum(map(len, writable)) == sum(part for part in parts if isinstance(part, int))
        for segment in writable:
            segment[:] = b"x" * len(segment)
        assert chain.answer == b"".join(writable)
        queue.push(head, 0)
        (used,) = guest.queues[1].collect()
        assert used.head == head
    assert sorted(guest.queues[1].free) == list(range(16))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_disk_answers_requests_of_every_shape(block: WorkerProcess, shape: Shape) -> None:
    chain = read(block.driver, 7, shape)
    block.kick()
    block.collect(1)
    assert chain.answer == content(7) + bytes([VIRTIO_BLK_S_OK])


@settings(max_examples=200, deadline=None)
@given(chains.parts(), chains.shapes(), st.integers(0, 65535))
def test_any_request_is_answered_in_any_shape(parts: list[bytes | int], shape: Shape, start: int) -> None:
    guest = Driver(start=start)
    device = Echo()
    recorder = guest.attach(device)
    room = sum(part for part in parts if isinstance(part, int))
    text = b"".join(part for part in parts if isinstance(part, bytes))
    try:
        chain = shape(guest, *parts)
    except MemoryError:
        guest.close()
        return
    device.serve()
    (used,) = guest.queues[0].collect()
    assert (used.head, used.written) == (chain.head, min(room, len(text)))
    assert chain.answer[: used.written] == text[:room]
    assert recorder.used_queues == [0]
    guest.close()


def test_a_ring_without_room_for_a_chain_says_so_and_is_as_it_was(driver: MakeDriver) -> None:
    guest = driver(num=2)
    with pytest.raises(MemoryError, match="a chain of 3 descriptors, and 2 are free"):
        direct(guest, b"1", b"2", b"3")
    with pytest.raises(ValueError, match="at least one descriptor"):
        direct(guest)
    direct(guest, b"1", b"2")
    assert guest.device_queues()[0].pop() is not None


def test_a_guest_without_memory_for_a_buffer_says_so(driver: MakeDriver) -> None:
    guest = driver(ram=8192)
    guest.buffer(8000)
    with pytest.raises(MemoryError, match=r"see Driver\.forget"):
        guest.buffer(200)
    guest.forget()
    assert guest.buffer(b"x").address == 0


# Misdeeds


@pytest.mark.parametrize("misdeed", MISDEEDS.values(), ids=MISDEEDS)
def test_a_ring_names_every_misdeed(driver: MakeDriver, misdeed: Misdeed) -> None:
    guest = driver(queues=2, num=8)
    queue = guest.device_queues(indirect=misdeed.indirect_accepted)[1]
    direct(guest, b"before", queue=1)
    before = queue.pop()
    assert before is not None
    queue.push(before[0], 0)
    misdeed(guest, queue=1)
    if misdeed.while_in_flight:
        assert queue.pop() is not None
    with pytest.raises(RingError, match=re.escape(misdeed.says)):
        queue.pop()


@pytest.mark.parametrize(
    "misdeed",
    [misdeed for misdeed in MISDEEDS.values() if not misdeed.while_in_flight],
    ids=lambda misdeed: misdeed.name,
)
def test_a_worker_survives_every_misdeed_and_a_reset_revives_its_device(block: WorkerProcess, misdeed: Misdeed) -> None:
    block.features = FEATURES if misdeed.indirect_accepted else 0
    pid = block.process.pid
    chain = read(block.driver, 1)
    block.kick()
    block.collect(1)
    assert chain.answer[:SECTOR] == content(1)
    misdeed(block.driver)
    block.kick()
    assert misdeed.says in block.broken()
    block.reset()
    chain = read(block.driver, 2)
    block.kick()
    block.collect(1)
    assert chain.answer[:SECTOR] == content(2)
    assert block.process.pid == pid
    assert block.stop() == 0
    assert block.errors() == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(chains.misdeeds(), min_size=1, max_size=5), chains.parts(most=2), st.sampled_from([4, 64]))
def test_misdeeds_one_after_another_each_cost_a_reset_and_no_more(
    misdeeds: list[Misdeed], parts: list[bytes | int], num: int
) -> None:
    guest = Driver(num=num)
    device = Echo()
    for misdeed in misdeeds:
        guest.attach(device, features=FEATURES if misdeed.indirect_accepted else 0)
        misdeed(guest)
        if misdeed.while_in_flight:
            device.serve()  # it answers at once, so that the second is not while the first is in flight
            with pytest.raises(Unexpected, match="has used a chain with the head 0; there is none, or no longer"):
                guest.queues[0].collect()
        else:
            with pytest.raises(RingError, match=re.escape(misdeed.says)):
                device.serve()
        device.reset()
        guest.reset()
        guest.forget()
    direct(guest, *parts)
    device.serve()
    assert len(guest.queues[0].collect()) == 1
    guest.close()


# What is noticed


def test_a_chain_that_is_given_back_twice_is_noticed(driver: MakeDriver) -> None:
    guest = driver()
    (queue,) = guest.device_queues()
    chain = direct(guest, b"once")
    queue.pop()
    queue.push(chain.head, 0)
    queue.push(chain.head, 0)
    with pytest.raises(Unexpected, match="used a chain with the head 0; there is none, or no longer"):
        guest.queues[0].collect()


def test_a_chain_that_was_never_offered_is_noticed(driver: MakeDriver) -> None:
    guest = driver()
    guest.device_queues()[0].push(5, 0)
    with pytest.raises(Unexpected, match="used a chain with the head 5"):
        guest.queues[0].collect()


def test_a_worker_that_ends_instead_of_answering_is_noticed(block: WorkerProcess) -> None:
    block.kill(signal.SIGTERM)
    with pytest.raises(Unexpected, match="it ended with -15"):
        block.next_message()


def test_a_worker_that_says_something_else_is_noticed(block: WorkerProcess) -> None:
    block.post(b"garbage")
    with pytest.raises(Unexpected, match=r"the worker said \[FAILED, 0, .*makes no sense.*\], not BROKEN and why"):
        block.broken()


def test_a_worker_that_breaks_is_noticed_where_an_answer_is_waited_for(block: WorkerProcess) -> None:
    MISDEEDS["loop"](block.driver)
    block.kick()
    with pytest.raises(Unexpected, match=r"the worker said \[BROKEN, .*\], with 0 of 1 chains used"):
        block.collect(1)


# Killed and started again


@pytest.mark.parametrize("seed", range(4))
def test_every_request_is_answered_once_however_often_the_worker_is_killed(block: WorkerProcess, seed: int) -> None:
    """Writes of whole batches, then reads; the worker is killed wherever it is, even while it starts."""
    random = Random(seed)
    guest, ring = block.driver, block.driver.queues[0]
    shapes: list[Callable[..., Chain]] = [direct, indirect, scattered]
    expected = {sector: content(sector) for sector in range(DISK_SECTORS)}
    for generation in range(1, ROUNDS + 1):
        guest.forget()
        sectors = random.sample(range(DISK_SECTORS), BATCH)
        reading = bool(generation % 2)
        requests = {}
        for sector in sectors:
            shape = random.choice(shapes)
            if reading:
                requests[sector] = read(guest, sector, shape)
            else:
                expected[sector] = content(sector, generation)
                requests[sector] = write(guest, sector, expected[sector], shape)
        block.kick()
        # Somewhere in the batch, or before it has begun to look.
        until = (ring.next_used + random.randrange(-5, BATCH)) & 0xFFFF
        while (ring.used_index() - until) & 0xFFFF >= 0x8000:
            os.sched_yield()
        block.kill(random.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
        used = ring.collect()
        if random.random() < 0.3:
            block.restart(ready=False).kill()
        block.restart()
        if len(used) < BATCH:
            used += block.collect(BATCH - len(used))
        assert sorted(element.head for element in used) == sorted(chain.head for chain in requests.values())
        for sector, chain in requests.items():
            assert chain.answer == (expected[sector] if reading else b"") + bytes([VIRTIO_BLK_S_OK])
    assert ring.outstanding == []
    assert block.stop() == 0


def test_a_successor_knows_what_was_accepted_and_hears_its_launcher(block: WorkerProcess) -> None:
    block.kick()
    old = block.mailbox.name, block.completions.name
    pid = block.process.pid
    assert block.kill() == -signal.SIGKILL
    chain = read(block.driver, 3, indirect)
    block.restart()
    assert block.process.pid != pid
    assert (block.driver.control.live, block.driver.control.accepted_features) == (True, FEATURES)
    block.collect(1)
    assert chain.answer[:SECTOR] == content(3)
    assert not any(map(is_there, old))
    block.reset()
    assert not block.driver.control.live
    assert block.stop() == 0


@pytest.mark.parametrize("said", [True, False])
def test_a_misdeed_is_heard_of_whether_the_worker_had_said_so_or_was_killed_before(
    block: WorkerProcess, said: bool
) -> None:
    block.kick()
    if not said:
        block.kill()
    MISDEEDS["loop"](block.driver)
    block.kick()
    if said:
        assert select.select([block.completions], [], [], PATIENCE)[0]
    block.restart()
    assert "Looped descriptor" in block.broken()
    assert not block.driver.control.live
    block.kick()  # of no effect, as with the launcher
    block.restart()
    block.reset()
    chain = read(block.driver, 5)
    block.kick()
    block.collect(1)
    assert chain.answer[:SECTOR] == content(5)
    assert block.stop() == 0


def test_errors_are_those_of_all_its_processes(driver: MakeDriver, worker: StartWorker) -> None:
    complain = ["sh", "-c", 'echo complaint >&2; exec "$@"', "sh"]
    with tempfile.TemporaryFile() as file:
        file.truncate(SECTOR)
        disk = file.fileno()
        process = worker("workers.block", driver(), [f"--disk-fd={disk}"], pass_fds=[disk], wrapper=complain)
        process.restart()
        assert process.stop() == 0
        assert process.errors() == process.errors() == "complaint\n" * 2


# Tracing


def test_a_trace_socket_is_given_to_each_of_its_processes(driver: MakeDriver, worker: StartWorker, disk: int) -> None:
    process = worker("workers.block", driver(), [f"--disk-fd={disk}"], pass_fds=[disk], trace=True)
    for _ in range(2):
        process.send(ToWorker.TRACE, 1)
        read(process.driver, 1)
        process.kick()
        process.collect(1)
        assert process.trace is not None
        assert select.select([process.trace], [], [], PATIENCE)[0]
        process.restart()


# The kit itself


def test_the_kit_needs_neither_pytest_nor_hypothesis() -> None:
    code = "import json, sys, lgmp.testing; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "lgmp.testing.chains" in modules
    assert not {"pytest", "_pytest", "hypothesis", "lgmp.launcher", "unicorn"} & set(modules)


def test_somebody_elses_device_is_tested_with_the_fixtures_alone(tmp_path: Path) -> None:
    (tmp_path / "upside_down.py").write_text(UPSIDE_DOWN)
    (tmp_path / "test_upside_down.py").write_text(ITS_TEST)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rP", "test_upside_down.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{len(ANY_LAYOUT_SHAPES) + 2} passed" in result.stdout, result.stdout + result.stderr
    # And nothing is left of it.
    pids = re.findall(r"^pid (\d+)$", result.stdout, re.MULTILINE)
    assert len(pids) == len(ANY_LAYOUT_SHAPES)
    assert not any(Path("/proc", pid).exists() for pid in pids)


def test_a_worker_that_a_test_leaves_running_is_killed(disk: int) -> None:
    with Driver() as guest, WorkerProcess("workers.block", guest, [f"--disk-fd={disk}"], pass_fds=[disk]) as process:
        process.expect(ToLauncher.READY, 0)
    assert process.process.returncode == -signal.SIGKILL
    assert not is_there(process.mailbox.name)
