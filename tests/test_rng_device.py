"""The entropy device: what comes from its file goes into the guest's buffers, once."""

from __future__ import annotations

import os
import select
import tempfile
from collections.abc import Iterator

import pytest

from lgmp.control import BYTES_IN, ERRORS
from lgmp.testing import Driver, Recorder, Used, WorkerProcess
from lgmp.virtio.ring import RingError
from workers.device import BATCH
from workers.rng import MOST, Rng


class Fixture:
    """An entropy source on a descriptor, and its driver."""

    def __init__(self, fd: int) -> None:
        self.driver = Driver()
        self.said: list[str] = []
        self.recorder = Recorder()
        self.rng = Rng(fd, source="the source", say=self.said.append)
        self.rng.attach(self.driver.device_queues("rng0"), self.recorder)

    @property
    def queue_is_empty(self) -> bool:
        return not self.driver.queues[0].collect()


@pytest.fixture
def pipe() -> Iterator[tuple[Fixture, int]]:
    """A source that is a pipe, and the end to write to."""
    source, end = os.pipe()
    fixture = Fixture(source)
    try:
        yield fixture, end
    finally:
        fixture.driver.close()
        os.close(source)
        try:  # noqa: SIM105
            os.close(end)
        except OSError:
            pass  # a test has


@pytest.fixture
def file() -> Iterator[Fixture]:
    """A source that is a file of 100 bytes: 0, 1, 2, ..."""
    with tempfile.TemporaryFile() as content:
        content.write(bytes(range(100)))
        content.seek(0)
        fixture = Fixture(content.fileno())
        yield fixture
        fixture.driver.close()


def test_buffers_are_filled_in_order_with_what_the_file_has(file: Fixture) -> None:
    buffers = [file.driver.buffer(10, writable=True) for _ in range(3)]
    heads = [file.driver.queues[0].add([buffer]) for buffer in buffers]
    assert not file.rng.serve()
    assert file.driver.queues[0].collect() == [Used(head, 10) for head in heads]
    assert b"".join(map(file.driver.content, buffers)) == bytes(range(30))
    assert file.recorder.used_queues == [0]


def test_a_buffer_of_several_pieces_is_filled_through_all_of_them(file: Fixture) -> None:
    pieces = [file.driver.buffer(size, writable=True) for size in (1, 0, 7)]
    head = file.driver.queues[0].add(pieces)
    file.rng.serve()
    assert file.driver.queues[0].collect() == [Used(head, 8)]
    assert b"".join(map(file.driver.content, pieces)) == bytes(range(8))


def test_a_short_read_completes_the_buffer_with_what_there_is(pipe: tuple[Fixture, int]) -> None:
    fixture, end = pipe
    buffer = fixture.driver.buffer(64, writable=True)
    head = fixture.driver.queues[0].add([buffer])
    os.write(end, b"abc")
    fixture.rng.serve()
    assert fixture.driver.queues[0].collect() == [Used(head, 3)]
    assert fixture.driver.content(buffer) == b"abc" + bytes(61)


def test_a_buffer_waits_while_the_source_has_nothing(pipe: tuple[Fixture, int]) -> None:
    fixture, end = pipe
    head = fixture.driver.queues[0].add([fixture.driver.buffer(64, writable=True)])
    assert not fixture.rng.serve()
    assert fixture.queue_is_empty
    assert fixture.recorder.used_queues == []
    ((wanted, events),) = fixture.rng.wants()
    assert events == select.POLLIN
    os.write(end, b"abcd")
    fixture.rng.ready(wanted, select.POLLIN)
    assert fixture.driver.queues[0].collect() == [Used(head, 4)]
    assert fixture.rng.wants() == ()


def test_a_source_that_nobody_asks_is_not_waited_for(pipe: tuple[Fixture, int]) -> None:
    fixture, _end = pipe
    assert not fixture.rng.serve()
    assert fixture.rng.wants() == ()


def test_more_buffers_than_a_batch_are_all_filled(pipe: tuple[Fixture, int]) -> None:
    fixture, end = pipe
    for _ in range(3 * BATCH):
        fixture.driver.queues[0].add([fixture.driver.buffer(1, writable=True)])
    fixture.rng.serve()
    assert fixture.queue_is_empty
    os.write(end, bytes(3 * BATCH))
    filled = 0
    while wanted := fixture.rng.wants():
        fixture.rng.ready(wanted[0][0], select.POLLIN)
        filled += len(fixture.driver.queues[0].collect())
    assert filled == 3 * BATCH


def test_serving_says_that_there_is_more_than_a_batch(file: Fixture) -> None:
    for _ in range(BATCH + 1):
        file.driver.queues[0].add([file.driver.buffer(1, writable=True)])
    assert file.rng.serve()
    assert not file.rng.serve()
    assert len(file.driver.queues[0].collect()) == BATCH + 1


def test_at_the_end_of_the_file_buffers_are_kept_and_the_user_is_told_once(file: Fixture) -> None:
    heads = [file.driver.queues[0].add([file.driver.buffer(80, writable=True)]) for _ in range(4)]
    for _ in range(3):
        assert not file.rng.serve()
    assert file.driver.queues[0].collect() == [Used(heads[0], 80), Used(heads[1], 20)]
    assert file.said == ["rng0: the source has come to its end; the guest gets no more random bytes from it"]
    assert file.rng.wants() == ()


def test_the_end_of_a_pipe_is_the_end_of_a_source(pipe: tuple[Fixture, int]) -> None:
    fixture, end = pipe
    fixture.driver.queues[0].add([fixture.driver.buffer(8, writable=True)])
    fixture.rng.serve()
    os.close(end)
    fixture.rng.ready(fixture.rng.fd, select.POLLHUP)
    assert len(fixture.said) == 1
    assert fixture.rng.wants() == ()
    assert fixture.queue_is_empty


def test_a_source_that_cannot_be_read_is_told_once() -> None:
    directory = os.open("/", os.O_RDONLY)
    fixture = Fixture(directory)
    fixture.driver.queues[0].add([fixture.driver.buffer(8, writable=True)])
    fixture.rng.serve()
    fixture.rng.serve()
    assert fixture.said == ["rng0: cannot read the source: Is a directory; the guest gets no more random bytes from it"]
    os.close(directory)
    fixture.driver.close()


def test_one_buffer_is_given_a_bounded_number_of_bytes() -> None:
    with open("/dev/zero", "rb", buffering=0) as zero:
        fixture = Fixture(zero.fileno())
        head = fixture.driver.queues[0].add([fixture.driver.buffer(MOST - 1, True), fixture.driver.buffer(MOST, True)])
        fixture.rng.serve()
        assert fixture.driver.queues[0].collect() == [Used(head, MOST)]
        fixture.driver.close()


@pytest.mark.parametrize("sizes", [[0], [0, 0]])
def test_a_buffer_without_room_goes_back_as_it_came(file: Fixture, sizes: list[int]) -> None:
    head = file.driver.queues[0].add([file.driver.buffer(size, writable=True) for size in sizes])
    file.rng.serve()
    assert file.driver.queues[0].collect() == [Used(head, 0)]
    assert file.said == []


def test_something_to_read_in_a_chain_is_fatal(file: Fixture) -> None:
    file.driver.queues[0].add([file.driver.buffer(b"x"), file.driver.buffer(8, writable=True)])
    with pytest.raises(RingError, match="rng0: queue 0: descriptor 0: Output buffers in rng"):
        file.rng.serve()


def test_a_reset_forgets_the_buffer_that_waits(pipe: tuple[Fixture, int]) -> None:
    fixture, end = pipe
    old = fixture.driver.buffer(8, writable=True)
    fixture.driver.queues[0].add([old])
    fixture.rng.serve()
    fixture.rng.reset()
    fixture.driver.reset()
    assert fixture.rng.wants() == ()
    os.write(end, b"new")
    new = fixture.driver.buffer(8, writable=True)
    head = fixture.driver.queues[0].add([new])
    fixture.rng.serve()
    assert fixture.driver.queues[0].collect() == [Used(head, 3)]
    assert fixture.driver.content(old) == bytes(8)
    assert fixture.driver.content(new)[:3] == b"new"


def test_a_process_serves_random_bytes() -> None:
    driver = Driver()
    with open("/dev/urandom", "rb", buffering=0) as source:
        options = ["--source-fd", str(source.fileno()), "--", "/dev/urandom"]
        with WorkerProcess("workers.rng", driver, options, name="rng0", pass_fds=[source.fileno()]) as worker:
            worker.ready()
            buffers = [driver.buffer(32, writable=True) for _ in range(100)]
            for buffer in buffers:
                driver.queues[0].add([buffer])
            worker.kick()
            assert {used.written for used in worker.collect(100)} == {32}
            assert len({driver.content(buffer) for buffer in buffers}) == 100
            with open(f"/proc/{worker.process.pid}/cmdline") as title:
                assert title.read().rstrip("\0") == "lgmp-rng rng0 /dev/urandom (guest test)"
            assert worker.stop() == 0
    driver.close()


def test_a_process_that_waits_for_its_source_hears_its_launcher() -> None:
    driver = Driver()
    source, end = os.pipe()
    with WorkerProcess("workers.rng", driver, ["--source-fd", str(source)], name="rng0", pass_fds=[source]) as worker:
        worker.ready()
        driver.queues[0].add([driver.buffer(8, writable=True)])
        worker.kick()
        worker.reset()
        head = driver.queues[0].add([driver.buffer(8, writable=True)])
        worker.kick()
        os.write(end, b"1234")
        assert worker.collect(1) == [Used(head, 4)]
        driver.queues[0].add([driver.buffer(8, writable=True)])
        worker.kick()
        assert worker.stop() == 0
    os.close(source)
    os.close(end)
    driver.close()


def test_bytes_and_errors_are_counted(file: Fixture) -> None:
    for _ in range(3):
        file.driver.queues[0].add([file.driver.buffer(40, writable=True)])
    file.rng.serve()
    assert file.rng.statistics[BYTES_IN] == 100
    assert file.rng.statistics[ERRORS] == 0
    file.driver.queues[0].add([file.driver.buffer(40, writable=True)])
    file.rng.serve()
    assert file.rng.statistics[BYTES_IN] == 100
    assert file.rng.statistics[ERRORS] == 1
