"""The console: what is typed reaches the guest, what the guest says comes out whole, whatever is at the other end."""

from __future__ import annotations

import errno
import os
import pty
import select
import signal
import socket
import termios
import threading
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
from lgmp.testing import PATIENCE, Buffer, Driver, Recorder
from lgmp.virtio import console as virtio_console
from lgmp.virtio.console import INPUT_QUEUE, OUTPUT_QUEUE
from lgmp.virtio.ring import RingError
from workers.console import AHEAD, BACKGROUND_SECONDS, INTERRUPTS_WITHIN, TAIL, Console

INPUT_LOST = "Failed to get console input, ignoring console."


class Rig:
    """A console in this process, its driver, and what the process around it does: poll."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self.now = 1000.0
        self.said: list[str] = []
        self.recorder = Recorder()
        self.driver = Driver(queues=2)
        self.console = Console(input_fd, output_fd, say=self.said.append, clock=lambda: self.now)
        self.console.attach(self.driver.device_queues("console"), self.recorder)

    def close(self) -> None:
        self.console.close()
        self.driver.close()

    def offer_input(self, *sizes: int) -> list[Buffer]:
        """Buffers for what is typed, one chain each, and a kick."""
        buffers = [self.driver.buffer(size, writable=True) for size in sizes]
        for buffer in buffers:
            self.driver.queues[INPUT_QUEUE].add([buffer])
        self.kick()
        return buffers

    def print(self, *pieces: bytes) -> None:
        """One output chain, and a kick."""
        self.driver.queues[OUTPUT_QUEUE].add([self.driver.buffer(piece) for piece in pieces])
        self.kick()

    def kick(self) -> None:
        while self.console.serve():
            pass

    def poll(self, timeout: float = 0) -> bool:
        """Look once at what the console waits for; whether there was anything."""
        poll = select.poll()
        for descriptor, events in self.console.wants():
            poll.register(descriptor, events)
        ready = poll.poll(timeout * 1000)
        for descriptor, events in ready:
            self.console.ready(descriptor, events)
        return bool(ready)

    def settle(self) -> None:
        """Until nothing that it waits for is there."""
        while self.poll():
            pass

    def typed(self) -> bytes:
        """What the guest was given since the last time, each chain's length respected."""
        answer = b""
        for used in self.driver.queues[INPUT_QUEUE].collect():
            address = int.from_bytes(
                self.driver.memory.view[(at := self.driver.layouts[INPUT_QUEUE].desc + 16 * used.head) : at + 8],
                "little",
            )
            answer += bytes(self.driver.memory.view[address : address + used.written])
        return answer

    def printed(self) -> int:
        """How many output chains the guest got back since the last time."""
        return len(self.driver.queues[OUTPUT_QUEUE].collect())

    def wants_input(self) -> bool:
        return any(events & select.POLLIN for _, events in self.console.wants())

    def wants_output(self) -> bool:
        return any(events & select.POLLOUT for _, events in self.console.wants())


class PipeRig(Rig):
    """A console on two pipes."""

    def __init__(self) -> None:
        self.their_input, self.keyboard = os.pipe()
        self.screen, self.their_output = os.pipe()
        super().__init__(self.their_input, self.their_output)

    def type(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)

    def seen(self) -> bytes:
        """What came out so far."""
        answer = b""
        while select.select([self.screen], [], [], 0)[0]:
            piece = os.read(self.screen, 65536)
            if not piece:
                break
            answer += piece
        return answer

    def close(self) -> None:
        super().close()
        for descriptor in (self.their_input, self.keyboard, self.screen, self.their_output):
            try:
                os.close(descriptor)
            except OSError as error:
                assert error.errno == errno.EBADF  # the test has closed that one


class TerminalRig(Rig):
    """A console on a pseudo-terminal, raw as the launcher makes it."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        super().__init__(self.slave, self.slave)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        super().close()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def pipes() -> Iterator[PipeRig]:
    rig = PipeRig()
    yield rig
    rig.close()


@pytest.fixture
def terminal() -> Iterator[TerminalRig]:
    rig = TerminalRig()
    yield rig
    rig.close()


def test_a_console_offers_no_features() -> None:
    assert virtio_console.features() == 0


# Input


def test_what_is_typed_lands_in_the_guests_buffer(pipes: PipeRig) -> None:
    (buffer,) = pipes.offer_input(64)
    pipes.type(b"ls\r")
    pipes.settle()
    assert pipes.driver.content(buffer)[:4] == b"ls\r\0"
    assert pipes.typed() == b"ls\r"
    assert pipes.recorder.used_queues == [INPUT_QUEUE]


def test_input_fills_one_buffer_after_another_in_order(pipes: PipeRig) -> None:
    pipes.offer_input(3, 4, 100)
    pipes.type(b"abcdefghijkl")
    pipes.settle()
    assert pipes.typed() == b"abcdefghijkl"


def test_input_may_be_spread_over_the_segments_of_a_chain(pipes: PipeRig) -> None:
    buffers = [pipes.driver.buffer(size, writable=True) for size in (2, 0, 5)]
    pipes.driver.queues[INPUT_QUEUE].add(buffers)
    pipes.kick()
    pipes.type(b"abcdef")
    pipes.settle()
    assert b"".join(map(pipes.driver.content, buffers)) == b"abcdef\0"


def test_a_pipe_is_left_alone_while_the_guest_has_no_buffer(pipes: PipeRig) -> None:
    assert not pipes.wants_input()
    pipes.offer_input(2)
    assert pipes.wants_input()
    pipes.type(b"abcd")
    pipes.settle()
    assert pipes.typed() == b"ab"
    assert not pipes.wants_input()
    pipes.offer_input(2)
    pipes.settle()
    assert pipes.typed() == b"cd"


def test_buffers_without_room_are_given_back_empty_and_are_no_end_of_input(pipes: PipeRig) -> None:
    pipes.offer_input(0, 0, 8)
    pipes.type(b"x")
    pipes.settle()
    assert pipes.typed() == b"x"
    assert pipes.said == []


@pytest.mark.parametrize("left", [b"", b"last words"])
def test_the_guest_outlives_the_end_of_its_input(pipes: PipeRig, left: bytes) -> None:
    pipes.offer_input(64, 64)
    pipes.type(left) if left else None
    os.close(pipes.keyboard)
    pipes.settle()
    assert pipes.typed() == left
    assert pipes.said == [INPUT_LOST]
    assert not pipes.wants_input()
    pipes.offer_input(64)
    pipes.print(b"still here")
    assert pipes.seen() == b"still here"
    assert pipes.said == [INPUT_LOST]


def test_the_guest_outlives_input_that_cannot_be_read(pipes: PipeRig, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as only_for_writing:
        rig = Rig(only_for_writing.fileno(), pipes.their_output)
        rig.offer_input(64)
        rig.settle()
        assert rig.said == [INPUT_LOST]
        rig.close()


def test_a_pipe_is_never_read_from_the_end_that_is_for_writing(pipes: PipeRig) -> None:
    rig = Rig(pipes.their_output, pipes.their_output)
    rig.offer_input(64)
    rig.print(b"for the reader")
    rig.settle()
    assert pipes.seen() == b"for the reader"
    assert rig.typed() == b""
    rig.close()


def test_dev_null_is_the_end_of_input(pipes: PipeRig) -> None:
    with open(os.devnull, "rb") as null:
        rig = Rig(null.fileno(), pipes.their_output)
        rig.offer_input(64)
        rig.settle()
        assert rig.said == [INPUT_LOST]
        rig.close()


def test_input_from_a_file_is_read_to_its_end(pipes: PipeRig, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"0123456789" * 10)
    with script.open("rb") as file:
        rig = Rig(file.fileno(), pipes.their_output)
        rig.offer_input(*[7] * 15)
        rig.settle()
        assert rig.typed() == b"0123456789" * 10
        rig.offer_input(7)
        rig.settle()
        assert rig.said == [INPUT_LOST]
        rig.close()


def test_a_readable_buffer_in_the_input_queue_is_fatal(pipes: PipeRig) -> None:
    pipes.driver.queues[INPUT_QUEUE].add([pipes.driver.buffer(8)])
    pipes.kick()
    pipes.type(b"x")
    with pytest.raises(RingError, match=r"^console: queue 0: descriptor 0: Output buffers in console in queue\?$"):
        pipes.settle()


def test_what_is_typed_before_the_guest_takes_input_waits_in_order(terminal: TerminalRig) -> None:
    terminal.type(b"one ")
    terminal.settle()
    terminal.type(b"two ")
    terminal.settle()
    terminal.offer_input(6)
    assert terminal.typed() == b"one tw"
    terminal.type(b"three")
    terminal.settle()
    terminal.offer_input(64, 64)
    terminal.settle()
    assert terminal.typed() == b"o three"


def test_no_more_is_taken_from_a_terminal_ahead_than_there_is_room_for(terminal: TerminalRig) -> None:
    keys = bytes(33 + number % 90 for number in range(3 * AHEAD))
    terminal.type(keys)
    terminal.settle()
    assert not terminal.wants_input()
    terminal.offer_input(4096, 4096, 4096)
    terminal.settle()
    assert terminal.typed() == keys


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.tuples(st.just("type"), st.integers(1, 40)), st.tuples(st.just("offer"), st.integers(0, 40))),
        max_size=25,
    )
)
def test_no_key_is_lost_or_reordered(script: list[tuple[str, int]]) -> None:
    """Typing and offering buffers in any order, on a terminal, where keys are read ahead."""
    rig = TerminalRig()
    keys = got = b""
    for what, size in script:
        if what == "type":
            more = bytes(97 + (len(keys) + number) % 26 for number in range(size))
            keys += more
            rig.type(more)
        else:
            rig.offer_input(size)
        rig.settle()
        got += rig.typed()
    rig.offer_input(4096, 4096, 4096)  # what was read ahead has its own, and what the terminal held back
    rig.settle()
    got += rig.typed()
    assert got == keys
    rig.close()


def test_a_terminal_whose_foreground_is_anothers_is_no_end_of_input() -> None:
    """`lgmp run ... &`: reading fails with EIO for as long as a shell has the terminal."""

    def background() -> bool:
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # as a worker has them
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.setpgid(0, 0)
        with open(os.devnull, "wb") as null:
            rig = Rig(0, null.fileno())
            rig.offer_input(8)
            tried = rig.poll(PATIENCE)
            left_alone = rig.said == [] and not rig.wants_input() and rig.typed() == b""
            os.tcsetpgrp(0, os.getpgrp())
            rig.now += BACKGROUND_SECONDS
            rig.settle()
            return tried and left_alone and rig.typed() == b"x\n"

    session, master = pty.fork()
    if not session:
        worker = os.fork()
        if not worker:
            answer = 2
            try:
                answer = 0 if background() else 1
            finally:
                os._exit(answer)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    os.write(master, b"x\n")
    status = os.waitpid(session, 0)[1]
    os.close(master)
    assert os.waitstatus_to_exitcode(status) == 0


# Three ^C


def test_three_interrupts_within_a_second_ask_for_the_end_and_reach_the_guest_too(pipes: PipeRig) -> None:
    pipes.offer_input(8, 8, 8)
    for _ in range(3):
        assert pipes.recorder.quits == 0
        pipes.type(b"\x03")
        pipes.settle()
        pipes.now += 0.3
    assert pipes.recorder.quits == 1
    assert pipes.typed() == b"\x03\x03\x03"


def test_what_the_terminal_answers_to_a_shell_between_interrupts_does_not_count_as_input(pipes: PipeRig) -> None:
    pipes.offer_input(*[8] * 5)
    for read in (b"\x03", b"\x1b[24;5R", b"\x03", b"\x1b[25;5R", b"\x03"):
        assert pipes.recorder.quits == 0
        pipes.type(read)
        pipes.settle()
        pipes.now += 0.1
    assert pipes.recorder.quits == 1


@pytest.mark.parametrize("key", [b"x", b"\x1b[A", b"\x1bR", b"\x1b[R"])
def test_a_key_between_interrupts_starts_the_count_anew(pipes: PipeRig, key: bytes) -> None:
    pipes.offer_input(*[8] * 4)
    for read in (b"\x03", b"\x03", key, b"\x03"):
        pipes.type(read)
        pipes.settle()
    assert pipes.recorder.quits == 0


@pytest.mark.parametrize("live", [False, True])
def test_three_interrupts_are_seen_when_the_guest_takes_no_input(terminal: TerminalRig, live: bool) -> None:
    if live:
        terminal.kick()
    for _ in range(3):
        terminal.type(b"\x03")
        terminal.settle()
    assert terminal.recorder.quits == 1


def test_slow_interrupts_are_only_keys(pipes: PipeRig) -> None:
    pipes.offer_input(*[8] * 6)
    for _ in range(6):
        pipes.type(b"\x03")
        pipes.settle()
        pipes.now += INTERRUPTS_WITHIN / 2 + 0.1
    assert pipes.recorder.quits == 0


def test_the_last_three_interrupts_count_however_slow_the_ones_before(pipes: PipeRig) -> None:
    pipes.offer_input(*[8] * 4)
    for pause in (10.0, 0.1, 0.1, 0.1):
        pipes.type(b"\x03")
        pipes.settle()
        pipes.now += pause
    assert pipes.recorder.quits == 1


def test_any_other_key_resets_the_count(pipes: PipeRig) -> None:
    pipes.offer_input(*[8] * 5)
    for key in (b"\x03", b"\x03", b"x", b"\x03", b"\x03"):
        pipes.type(key)
        pipes.settle()
    assert pipes.recorder.quits == 0


def test_interrupts_that_are_read_together_do_not_count(pipes: PipeRig) -> None:
    pipes.offer_input(*[8] * 3)
    for keys in (b"\x03", b"\x03\x03", b"\x03"):
        pipes.type(keys)
        pipes.settle()
    assert pipes.recorder.quits == 0


# Output


def test_what_the_guest_says_comes_out_and_its_buffers_go_back(pipes: PipeRig) -> None:
    pipes.print(b"Hello, ", b"", b"world!\n")
    assert pipes.seen() == b"Hello, world!\n"
    assert pipes.printed() == 1
    assert pipes.recorder.used_queues == [OUTPUT_QUEUE]


def test_an_empty_output_buffer_goes_back(pipes: PipeRig) -> None:
    pipes.print(b"")
    assert pipes.printed() == 1


def test_a_writable_buffer_in_the_output_queue_is_fatal(pipes: PipeRig) -> None:
    pipes.driver.queues[OUTPUT_QUEUE].add([pipes.driver.buffer(b"x"), pipes.driver.buffer(8, writable=True)])
    with pytest.raises(RingError, match=r"^console: queue 1: descriptor 0: Input buffers in output queue\?$"):
        pipes.kick()


def test_output_waits_for_a_full_pipe_without_blocking_and_comes_out_whole(pipes: PipeRig) -> None:
    first, second = os.urandom(150_000), os.urandom(3)
    pipes.print(first)
    pipes.print(second)
    assert pipes.wants_output()
    assert pipes.console.busy
    assert pipes.printed() == 0
    out = b""
    while pipes.console.busy:
        out += pipes.seen()
        pipes.settle()
    out += pipes.seen()
    assert out == first + second
    assert pipes.printed() == 2
    assert not pipes.wants_output()


def test_input_goes_on_while_output_waits(pipes: PipeRig) -> None:
    pipes.print(bytes(150_000))
    pipes.offer_input(8)
    pipes.type(b"q")
    pipes.settle()
    assert pipes.typed() == b"q"
    assert pipes.console.busy


def test_a_descriptor_that_somebody_made_nonblocking_loses_nothing(pipes: PipeRig) -> None:
    os.set_blocking(pipes.their_output, False)
    data = os.urandom(100_000)
    pipes.print(data)
    out = b""
    while pipes.console.busy:
        out += pipes.seen()
        pipes.settle()
    assert out + pipes.seen() == data


def test_our_own_way_of_writing_is_not_forced_on_who_shares_the_descriptor(pipes: PipeRig) -> None:
    pipes.print(b"x")
    assert os.get_blocking(pipes.their_output)
    assert os.get_blocking(pipes.their_input)


def test_a_socket_for_output_is_written_in_pieces_that_do_not_block() -> None:
    ours, theirs = socket.socketpair()
    rig = Rig(theirs.fileno(), theirs.fileno())
    data = os.urandom(1_000_000)
    rig.offer_input(16)
    rig.print(data)
    assert rig.console.busy
    out = b""
    while rig.console.busy:
        out += ours.recv(1 << 20)
        rig.settle()
    while len(out) < len(data):
        out += ours.recv(1 << 20)
    assert out == data
    ours.send(b"key")
    rig.settle()
    assert rig.typed() == b"key"
    rig.close()
    ours.close()
    theirs.close()


def test_a_terminal_stopped_by_flow_control_loses_nothing(terminal: TerminalRig) -> None:
    text = b"".join(b"%06d\n" % number for number in range(3000))
    termios.tcflow(terminal.slave, termios.TCOOFF)
    terminal.print(text)
    assert terminal.wants_output()
    terminal.offer_input(8)
    terminal.type(b"k")
    terminal.settle()
    assert terminal.typed() == b"k"
    out = bytearray()
    reader = threading.Thread(target=read_count, args=(terminal.master, len(text), out))
    reader.start()
    termios.tcflow(terminal.slave, termios.TCOON)
    while terminal.console.busy:
        assert terminal.poll(PATIENCE)
    reader.join(PATIENCE)
    assert out == text


def read_count(fd: int, count: int, into: bytearray) -> None:
    while len(into) < count:
        into += os.read(fd, 4096)


def test_a_reader_that_goes_away_is_said_once_and_the_guest_goes_on(pipes: PipeRig) -> None:
    os.close(pipes.screen)
    pipes.print(b"to nobody")
    pipes.print(b"to nobody at all")
    assert pipes.printed() == 2
    assert pipes.said == ["Failed to write console output (Broken pipe), it is discarded."]


def test_a_reader_that_goes_away_while_output_waits_is_noticed(pipes: PipeRig) -> None:
    pipes.print(bytes(150_000))
    os.close(pipes.screen)
    pipes.settle()
    assert pipes.printed() == 1
    assert not pipes.console.busy
    assert len(pipes.said) == 1


def test_a_full_disk_under_the_output_is_said_once_and_may_have_room_again(pipes: PipeRig) -> None:
    target = os.open("/dev/full", os.O_WRONLY)
    rig = Rig(pipes.their_input, target)
    rig.print(b"lost")
    rig.print(b"lost as well")
    assert rig.printed() == 2
    assert rig.said == ["Failed to write console output (No space left on device), it is discarded."]
    os.dup2(pipes.their_output, target)
    rig.print(b"there again")
    assert pipes.seen() == b"there again"
    rig.close()
    os.close(target)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20_000), min_size=1, max_size=4), max_size=12), st.integers(1, 70_000))
def test_output_is_whole_and_in_order_however_slow_the_reader(chains: list[list[int]], gulp: int) -> None:
    rig = PipeRig()
    expected = out = b""
    for chain in chains:
        pieces = [bytes([len(expected) % 251]) * size for size in chain]
        expected += b"".join(pieces)
        rig.print(*pieces)
        if select.select([rig.screen], [], [], 0)[0]:
            out += os.read(rig.screen, gulp)
        rig.settle()
    while rig.console.busy or len(out) < len(expected):
        out += os.read(rig.screen, gulp)
        rig.settle()
    assert out == expected
    assert rig.printed() == len(chains)
    rig.close()


# Reset and the end


def test_a_reset_loses_no_output_that_was_given_out(pipes: PipeRig) -> None:
    first = os.urandom(100_000)
    pipes.print(first)
    pipes.print(b"and more")
    pipes.console.reset()
    pipes.driver.memory.view[:] = bytes(pipes.driver.memory.limit)  # the guest uses its memory for something else
    pipes.driver.reset()
    assert pipes.console.busy
    out = b""
    while pipes.console.busy:
        out += pipes.seen()
        pipes.settle()
    assert out + pipes.seen() == first + b"and more"
    assert pipes.printed() == 0
    pipes.print(b"new driver")
    assert pipes.seen() == b"new driver"
    assert pipes.printed() == 1


def test_output_after_a_reset_comes_behind_what_was_left_before(pipes: PipeRig) -> None:
    pipes.print(b"a" * 100_000)
    pipes.console.reset()
    pipes.driver.reset()
    pipes.print(b"b" * 100_000)
    out = b""
    while pipes.console.busy:
        out += pipes.seen()
        pipes.settle()
    assert out + pipes.seen() == b"a" * 100_000 + b"b" * 100_000
    assert pipes.printed() == 1


def test_resets_do_not_pile_up_output_without_bound(pipes: PipeRig) -> None:
    for _ in range(4):
        pipes.driver.forget()
        pipes.print(bytes(1 << 20))
        pipes.console.reset()
        pipes.driver.reset()
    out = 0
    while pipes.console.busy:
        out += len(pipes.seen())
        pipes.settle()
    assert out + len(pipes.seen()) <= TAIL + 65536


def test_a_reset_of_a_ring_that_makes_no_sense_is_no_error(pipes: PipeRig) -> None:
    pipes.print(bytes(100_000))
    pipes.driver.queues[OUTPUT_QUEUE].set_avail(0, 40_000)
    pipes.console.reset()
    pipes.driver.reset()
    pipes.seen()
    pipes.settle()
    assert not pipes.console.busy


def test_after_a_reset_the_rings_are_left_alone_until_a_kick(pipes: PipeRig) -> None:
    pipes.offer_input(8)
    pipes.console.reset()
    pipes.driver.reset()
    pipes.driver.queues[INPUT_QUEUE].add([pipes.driver.buffer(8, writable=True)])
    pipes.type(b"x")
    pipes.settle()
    assert pipes.typed() == b""
    pipes.kick()
    pipes.settle()
    assert pipes.typed() == b"x"


def test_a_reset_forgets_the_buffer_that_was_held_for_input(pipes: PipeRig) -> None:
    pipes.offer_input(8)
    # Somebody else takes what was typed: a buffer is held, empty.
    pipes.console.ready(pipes.console.wants()[0][0], select.POLLIN)
    pipes.console.reset()
    pipes.driver.reset()
    pipes.offer_input(16)
    pipes.type(b"0123456789")
    pipes.settle()
    assert pipes.typed() == b"0123456789"


def test_a_console_that_stops_reads_no_more_but_writes_what_is_left(pipes: PipeRig) -> None:
    pipes.offer_input(8)
    data = os.urandom(100_000)
    pipes.print(data)
    pipes.console.stop()
    pipes.type(b"x")
    out = b""
    while pipes.console.busy:
        out += pipes.seen()
        pipes.settle()
    assert out + pipes.seen() == data
    assert pipes.typed() == b""


# Statistics


def test_bytes_in_both_directions_are_counted(pipes: PipeRig) -> None:
    pipes.offer_input(4, 64)
    pipes.type(b"ls -l\r")
    pipes.settle()
    pipes.print(b"total ", b"0\n")
    assert pipes.console.statistics[BYTES_IN] == 6
    assert pipes.console.statistics[BYTES_OUT] == 8
    assert pipes.console.statistics[ERRORS] == 0


def test_chains_whose_output_is_discarded_are_counted(pipes: PipeRig) -> None:
    os.close(pipes.screen)
    pipes.print(b"to nobody")
    pipes.print(b"to nobody at all")
    assert pipes.console.statistics[ERRORS] == 2
