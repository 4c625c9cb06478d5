"""Devices whose process is killed, at any instruction, and is replaced: what the next one makes of what the last left.

In the first tests an incarnation is a process that is forked here and kills itself before one of its bytecodes, in the
modules of the device or of the ring: so also at the end of any system call, before anything in it knows. The seeds say
which bytecodes; LGMP_TAKEOVER_ROUNDS has more of them tried than the few of each run. Then the worker processes
themselves are killed from outside.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import tty
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import FrameType, ModuleType
from typing import Any

import pytest

import workers.block
import workers.console
import workers.device
import workers.net
import workers.rng
from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
from lgmp.testing import PATIENCE, Buffer, Driver, WorkerProcess
from lgmp.virtio import inflight, ring
from lgmp.virtio.block import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from lgmp.virtio.console import INPUT_QUEUE, OUTPUT_QUEUE
from lgmp.virtio.net import HEADER_BYTES, RECEIVE_QUEUE, TRANSMIT_QUEUE
from workers.block import Block
from workers.console import CHUNK, Console
from workers.device import Device
from workers.net import MAX_FRAME, Net, Stream
from workers.rng import Rng

# How many scenarios of each kind are gone through, each with its own seed.
ROUNDS = int(os.environ.get("LGMP_TAKEOVER_ROUNDS", "4"))
# An incarnation serves for so many bytecodes at most, or until it has nothing to do any more.
LONGEST_LIFE = 700
# One that takes frames off a stream, as many as there are buffers at once, needs longer to get on.
LONGEST_NET_LIFE = 10_000
# One in so many is killed before it serves, while it takes over; that takes about so many bytecodes.
IN_TAKEOVER = 5
TAKEOVER = 4000
# A scenario that takes more lives than this does not get on.
MOST_LIVES = 2000
INPUT_LOST = "Failed to get console input, ignoring console."
# The processes that are killed from outside: how often.
KILLS = 50
# How many frames are sent in one test.
FRAMES = 40

Make = Callable[[Callable[[str], None]], Device]


class Lives:
    """A device on a driver's rings, served by one incarnation after another."""

    def __init__(self, driver: Driver, make: Make, module: ModuleType, seed: int) -> None:
        """`make` gives the device, told how to say something to the user; `module` is its own."""
        self.driver = driver
        self.random = random.Random(seed)
        self.lives = self.kills = 0
        self.longest = LONGEST_LIFE
        self._make = make
        self._files = {module.__file__, ring.__file__, inflight.__file__, workers.device.__file__}
        self._said, self._say = os.pipe()
        self.driver.control.live = True

    def close(self) -> None:
        os.close(self._said)
        os.close(self._say)
        self.driver.close()

    def said(self) -> list[str]:
        """The lines to the user since the last time."""
        text = b""
        while select.select([self._said], [], [], 0)[0]:
            text += os.read(self._said, 65536)
        return text.decode().splitlines()

    def live(self, bytecodes: int | None = None, *, in_takeover: bool = False) -> bool:
        """One incarnation, killed after so many bytecodes (None: not at all), of serving or of all. Whether it was."""
        self.lives += 1
        assert self.lives < MOST_LIVES
        pid = os.fork()
        if not pid:
            code = 1
            try:
                self._serve(self._make(self._tell), bytecodes, in_takeover)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        self.kills += code != 0
        return code != 0

    def _tell(self, line: str) -> None:
        os.write(self._say, f"{line}\n".encode())

    def _serve(self, device: Device, bytecodes: int | None, in_takeover: bool) -> None:
        """What workers.runtime does for a device of which there is a driver."""
        if bytecodes is not None and in_takeover:
            kill_before(bytecodes, self._files)
        self.driver.attach(device)
        device.resume()
        if bytecodes is not None and not in_takeover:
            kill_before(bytecodes, self._files)
        while device.serve():
            pass
        while ready := self._poll(device):
            for descriptor, events in ready:
                device.ready(descriptor, events)
        sys.settrace(None)
        device.close()

    @staticmethod
    def _poll(device: Device) -> list[tuple[int, int]]:
        poll = select.poll()
        for descriptor, events in device.wants():
            poll.register(descriptor, events)
        return poll.poll(0)

    def bout(self) -> bool:
        """An incarnation of a random length; whether it was killed."""
        in_takeover = not self.random.randrange(IN_TAKEOVER)
        return self.live(self.random.randrange(TAKEOVER if in_takeover else self.longest), in_takeover=in_takeover)


def kill_before(bytecodes: int, files: set[str | None]) -> None:
    """Have this process kill itself before a bytecode of one of these files: that which comes after so many others."""
    left = bytecodes

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        if event == "opcode":
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    sys.settrace(trace)


@contextlib.contextmanager
def lives(driver: Driver, make: Make, module: ModuleType, seed: int) -> Iterator[Lives]:
    made = Lives(driver, make, module, seed)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


def read_all(descriptor: int) -> bytes:
    """What is there."""
    data = b""
    while select.select([descriptor], [], [], 0)[0]:
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            break
        data += piece
    return data


def words(first: int, count: int) -> bytes:
    """Numbers from `first` on, of four bytes each: what is repeated or lost of them is seen."""
    return struct.pack(f">{count}I", *range(first, first + count))


def check_repeats(output: bytes, count: int, kills: int) -> None:
    """All of `count` words are there, in order, but that after a kill the chunk may be repeated which it fell into."""
    assert len(output) % 4 == 0
    expected = repeats = 0
    for (word,) in struct.iter_unpack(">I", output):
        if word != expected:
            repeats += 1
            assert expected - CHUNK // 4 <= word < expected, f"{word} follows {expected - 1}"
        expected = word + 1
    assert expected == count
    assert repeats <= kills


# The console


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_console_output_is_whole_and_in_order_and_repeats_a_chunk_at_most(seed: int) -> None:
    driver = Driver(queues=2)
    with (
        pipe() as (keyboard, _),
        pipe() as (screen, output),
        lives(driver, lambda say: Console(keyboard, output, say=say), workers.console, seed) as console,
    ):
        sizes = [1, 3000, 0, CHUNK // 4, 2 * CHUNK // 4 + 7, 1, 9000]
        first = 0
        for size in sizes:
            driver.queues[OUTPUT_QUEUE].add([driver.buffer(words(first, size))])
            first += size
        seen = b""
        heads: list[int] = []
        while len(heads) < len(sizes):
            console.bout()
            seen += read_all(screen)
            heads += [used.head for used in driver.queues[OUTPUT_QUEUE].collect()]
        check_repeats(seen, first, console.kills)
        assert heads == list(range(len(sizes)))
        assert console.kills


def test_console_output_goes_on_from_the_chunk_before_the_one_that_the_kill_fell_into() -> None:
    """A pipe that is full in the middle of a chain: what is written of it is known."""
    driver = Driver(queues=2)
    with (
        pipe() as (keyboard, _),
        pipe() as (screen, output),
        lives(driver, lambda say: Console(keyboard, output, say=say), workers.console, 0) as console,
    ):
        driver.queues[OUTPUT_QUEUE].add([driver.buffer(words(0, 50_000))])
        seen = b""
        while not driver.queues[OUTPUT_QUEUE].collect():
            assert not console.live()
            seen += read_all(screen)
        assert seen == words(0, 50_000)
        assert driver.control.statistics[BYTES_OUT] == 200_000


def test_progress_is_never_taken_for_that_of_another_chain() -> None:
    """The driver resets while nobody serves it, and offers the same head again."""
    driver = Driver(queues=2)
    with (
        pipe() as (keyboard, _),
        pipe() as (screen, output),
        lives(driver, lambda say: Console(keyboard, output, say=say), workers.console, 0) as console,
    ):
        driver.queues[OUTPUT_QUEUE].add([driver.buffer(bytes(200_000))])
        assert not console.live()
        assert driver.control.inflight[OUTPUT_QUEUE].heads() == [0]
        driver.reset()
        driver.control.live = True
        read_all(screen)
        driver.queues[OUTPUT_QUEUE].add([driver.buffer(words(0, 1000))])
        assert not console.live()
        assert read_all(screen) == words(0, 1000)


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("terminal", [False, True])
def test_no_key_is_lost_or_given_twice(seed: int, terminal: bool) -> None:
    driver = Driver(queues=2)
    with contextlib.ExitStack() as stack:
        if terminal:
            keyboard, source = os.openpty()
            tty.setraw(source)
            stack.callback(os.close, keyboard)
            stack.callback(os.close, source)
        else:
            source, keyboard = stack.enter_context(pipe())
        console = stack.enter_context(
            lives(driver, lambda say: Console(source, output.fileno(), say=say), workers.console, seed)
        )
        output = stack.enter_context(open(os.devnull, "wb"))
        script = console.random
        typed = given = b""
        while len(typed) < 900:
            keys = bytes(script.choice(range(0x20, 0xFF)) for _ in range(script.randrange(1, 300)))
            typed += keys
            os.write(keyboard, keys)
            for size in script.choices(range(200), k=2):
                driver.queues[INPUT_QUEUE].add([driver.buffer(size // 2, True), driver.buffer(size, True)])
            while console.bout():
                given += input_of(driver)
            given += input_of(driver)
        while len(given) < len(typed):
            driver.queues[INPUT_QUEUE].add([driver.buffer(100, True)])
            console.bout()
            given += input_of(driver)
        assert given == typed
        assert console.kills
        assert driver.control.statistics[BYTES_IN] <= len(typed)


def input_of(driver: Driver) -> bytes:
    """What the guest was given since the last time."""
    data = b""
    table = driver.layouts[INPUT_QUEUE].desc
    for used in driver.queues[INPUT_QUEUE].collect():
        left = used.written
        at = used.head
        while left:
            address, size, _, at = struct.unpack_from("<QIHH", driver.memory.view, table + 16 * at)
            data += bytes(driver.memory.view[address : address + min(size, left)])
            left -= min(size, left)
    return data


def test_a_read_that_the_kill_followed_at_once_is_not_lost() -> None:
    """At one bytecode after the other: with three keys there, and a buffer for them."""
    for bytecodes in range(0, 10_000, 3):
        driver = Driver(queues=2)
        with (
            pipe() as (source, keyboard),
            open(os.devnull, "wb") as output,
            lives(driver, lambda say: Console(source, output.fileno(), say=say), workers.console, 0) as console,
        ):
            os.write(keyboard, b"ls\r")
            driver.queues[INPUT_QUEUE].add([driver.buffer(64, True)])
            killed = console.live(bytecodes)
            assert not console.live()
            assert input_of(driver) == b"ls\r"
        if not killed:
            assert bytecodes > 100
            return


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_end_of_input_is_said_once_whoever_finds_it(seed: int) -> None:
    driver = Driver(queues=2)
    with (
        open(os.devnull, "r+b") as null,
        lives(driver, lambda say: Console(null.fileno(), null.fileno(), say=say), workers.console, seed) as console,
    ):
        driver.queues[INPUT_QUEUE].add([driver.buffer(64, True)])
        while console.bout():
            pass
        assert not console.live()
        # The kill may have come between the note that it is said and the saying.
        assert console.said() in ([INPUT_LOST], [])
        assert driver.queues[INPUT_QUEUE].collect() == []


def test_a_reader_that_went_away_is_said_once_over_all_successors() -> None:
    driver = Driver(queues=2)
    with pipe() as (keyboard, _), pipe() as (screen, output):
        os.close(screen)
        with lives(driver, lambda say: Console(keyboard, output, say=say), workers.console, 0) as console:
            for _ in range(3):
                driver.queues[OUTPUT_QUEUE].add([driver.buffer(b"to nobody")])
                assert not console.live()
                assert len(driver.queues[OUTPUT_QUEUE].collect()) == 1
            assert console.said() == ["Failed to write console output (Broken pipe), it is discarded."]
            assert driver.control.statistics[ERRORS] == 3


# The entropy source


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_random_bytes_are_given_once(seed: int) -> None:
    driver = Driver()
    with tempfile.TemporaryFile() as source:
        source.write(words(0, 1000))
        source.seek(0)
        with lives(driver, lambda say: Rng(source.fileno(), source="it", say=say), workers.rng, seed) as rng:
            buffers = {}
            for _ in range(20):
                buffer = driver.buffer(40, writable=True)
                buffers[driver.queues[0].add([buffer])] = buffer
            given: list[int] = []
            while len(given) < 200:
                rng.bout()
                for used in driver.queues[0].collect():
                    assert used.written == 40
                    given += struct.unpack(">10I", driver.content(buffers[used.head]))
            assert given == sorted(set(given))
            assert rng.kills


def test_the_end_of_a_source_is_said_once_over_all_successors() -> None:
    driver = Driver()
    with (
        open(os.devnull, "rb") as source,
        lives(driver, lambda say: Rng(source.fileno(), source="it", say=say), workers.rng, 0) as rng,
    ):
        driver.queues[0].add([driver.buffer(40, writable=True)])
        for _ in range(3):
            assert not rng.live()
        assert rng.said() == ["rng0: it has come to its end; the guest gets no more random bytes from it"]
        assert driver.control.statistics[ERRORS] == 1


# The disk


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_requests_of_a_disk_are_answered_once_and_in_order(seed: int) -> None:
    """Each write is of one sector more of the same place, and is read back behind a FLUSH."""
    driver = Driver()
    with tempfile.TemporaryFile() as image:
        image.truncate(512 * 64)
        make: Make = lambda say: Block(image.fileno(), size=512 * 64, serial="s", say=say)  # noqa: E731
        with lives(driver, make, workers.block, seed) as disk:
            expected = []
            answers = {}
            for number in range(10):
                sector = number % 3
                data = bytes([number + 1]) * 512
                for kind, out in ((VIRTIO_BLK_T_OUT, data), (VIRTIO_BLK_T_FLUSH, b""), (VIRTIO_BLK_T_IN, None)):
                    header = driver.buffer(struct.pack("<IIQ", kind, 0, sector))
                    answer = driver.buffer(512, writable=True)
                    status = driver.buffer(1, writable=True)
                    body = [answer] if out is None else [driver.buffer(out)]
                    head = driver.queues[0].add([header, *body, status])
                    expected.append(head)
                    answers[head] = status, answer if out is None else None, data
            done: list[int] = []
            while len(done) < len(expected):
                disk.bout()
                for used in driver.queues[0].collect():
                    status, read, data = answers[used.head]
                    assert driver.content(status) == bytes([VIRTIO_BLK_S_OK])
                    assert read is None or driver.content(read) == data
                    done.append(used.head)
            assert done == expected
            assert disk.kills


# The stream to a user-mode network


def numbered_frame(number: int, size: int) -> bytes:
    """A frame with its length before it: its number, its size, and bytes that follow from the number."""
    content = struct.pack(">II", number, size) + bytes([number & 0xFF]) * (size - 8)
    return size.to_bytes(4, "big") + content


def check_frame(content: bytes) -> int:
    """The number of a frame that is whole."""
    number, size = struct.unpack_from(">II", content)
    assert numbered_frame(number, size)[4:] == content
    return int(number)


@contextlib.contextmanager
def stack_that_sends(data: bytes, room: int, seed: int) -> Iterator[int]:
    """The other end of a stream, in a process of its own, that sends `data` in pieces; gives ours."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        pieces = random.Random(seed)
        try:
            ours.close()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
            at = 0
            while at < len(data):
                size = pieces.choice((3, 700, 5000, 70_000))
                theirs.sendall(data[at : at + size])
                at += size
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield ours.fileno()
    finally:
        ours.close()
        os.waitpid(pid, 0)


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("room", [4096, 200_000])
def test_received_frames_stay_whole(seed: int, room: int) -> None:
    """Some come twice; where the beginning of one is taken off by itself, that one is lost with who took it."""
    driver = Driver(queues=2)
    script = random.Random(seed)
    sizes = [script.choice((9, 60, 1514, 30_000)) for _ in range(150)]
    data = b"".join(numbered_frame(number, size) for number, size in enumerate(sizes))
    with (
        stack_that_sends(data, room, seed) as fd,
        lives(driver, lambda say: Net(Stream(fd), say=say), workers.net, seed) as net,
    ):
        net.longest = LONGEST_NET_LIFE
        got: list[int] = []
        buffers: dict[int, Buffer] = {}
        for _ in range(6):
            offer_buffer(driver, buffers, driver.buffer(HEADER_BYTES + 31_000, writable=True))
        while max(got, default=0) < 100:
            assert select.select([fd], [], [], PATIENCE)[0]
            net.bout()
            for used in driver.queues[RECEIVE_QUEUE].collect():
                buffer = buffers.pop(used.head)
                got.append(check_frame(driver.content(buffer)[HEADER_BYTES : used.written]))
                offer_buffer(driver, buffers, buffer)
        assert net.said() == []
        assert net.kills
        missing = set(range(max(got))) - set(got)
        assert len(missing) <= net.lives
        assert repeats_of(got) <= net.kills


def offer_buffer(driver: Driver, buffers: dict[int, Buffer], buffer: Buffer) -> None:
    """Offer a buffer for a frame."""
    parts = [
        Buffer(buffer.address, HEADER_BYTES, True),
        Buffer(buffer.address + HEADER_BYTES, buffer.size - HEADER_BYTES, True),
    ]
    buffers[driver.queues[RECEIVE_QUEUE].add(parts)] = buffer


def repeats_of(numbers: list[int]) -> int:
    """How often a number is followed by one that is not greater."""
    return sum(second <= first for first, second in pairwise(numbers))


@contextlib.contextmanager
def sent_frames(enlarge: bool) -> Iterator[tuple[socket.socket, int]]:
    ours, theirs = socket.socketpair()
    if not enlarge:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setblocking(False)
    with ours, theirs:
        yield theirs, ours.fileno()


def offer_frames(driver: Driver, seed: int) -> None:
    """Frames to send, each with its number."""
    script = random.Random(seed)
    sizes = [script.choice((9, 60, 1514, 14_000, 16_000, 33_000, 60_000, MAX_FRAME)) for _ in range(FRAMES)]
    for number, size in enumerate(sizes):
        frame = numbered_frame(number, size)[4:]
        middle = script.randrange(len(frame))
        parts = [bytes(HEADER_BYTES), frame[:middle], frame[middle:]]
        driver.queues[TRANSMIT_QUEUE].add([driver.buffer(part) for part in parts])


def what_came(peer: socket.socket) -> bytes:
    """What a socket that does not block has."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := peer.recv(1 << 20):
            data += piece
    return data


def take_frames(stream: bytearray) -> list[int]:
    """The numbers of the whole frames at the beginning of what a stream gave, which are taken away."""
    numbers = []
    while len(stream) >= 4 and len(stream) >= (end := 4 + int.from_bytes(stream[:4], "big")):
        assert end <= 4 + MAX_FRAME
        numbers.append(check_frame(bytes(stream[4:end])))
        del stream[:end]
    return numbers


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("enlarge", [True, False])
def test_sent_frames_stay_whole(seed: int, enlarge: bool) -> None:
    """Some go twice. Where the socket's buffer is too small for a frame, a kill may end the link, not garble it."""
    driver = Driver(queues=2, ram=8 << 20)
    with sent_frames(enlarge) as (peer, fd):
        make: Make = lambda say: Net(Stream(fd, enlarge=enlarge), say=say)  # noqa: E731
        with lives(driver, make, workers.net, seed) as net:
            net.longest = LONGEST_NET_LIFE // 4
            offer_frames(driver, seed)
            stream = bytearray()
            got: list[int] = []
            used = 0
            while used < FRAMES:
                net.bout()
                stream += what_came(peer)
                got += take_frames(stream)
                used += len(driver.queues[TRANSMIT_QUEUE].collect())
            assert net.kills
            said = net.said()
            if said:
                assert not enlarge
                (line,) = said
                assert "its network is gone (a frame was sent only in part)" in line
                assert set(got) == set(range(max(got, default=-1) + 1))
            else:
                assert not stream
                assert set(got) == set(range(FRAMES))
            assert repeats_of(got) <= net.kills


def test_a_frame_that_went_in_part_is_gone_on_with() -> None:
    """Each incarnation ends of itself, where the socket takes no more."""
    driver = Driver(queues=2, ram=8 << 20)
    with (
        sent_frames(enlarge=False) as (peer, fd),
        lives(driver, lambda say: Net(Stream(fd, enlarge=False), say=say), workers.net, 0) as net,
    ):
        frame = numbered_frame(7, 60_000)
        for _ in range(2):
            parts = [driver.buffer(part) for part in (bytes(HEADER_BYTES), frame[4:])]
            driver.queues[TRANSMIT_QUEUE].add(parts)
        stream = b""
        while len(stream) < 2 * len(frame):
            assert not net.live()
            stream += what_came(peer)
        assert stream == 2 * frame
        assert net.lives > 5
        assert not net.live()
        assert len(driver.queues[TRANSMIT_QUEUE].collect()) == 2
        assert net.said() == []


def test_a_stream_whose_frame_nobody_can_finish_is_left() -> None:
    """The driver resets while half of a frame has gone and nobody serves it."""
    driver = Driver(queues=2, ram=8 << 20)
    with (
        sent_frames(enlarge=False) as (peer, fd),
        lives(driver, lambda say: Net(Stream(fd, enlarge=False), say=say), workers.net, 0) as net,
    ):
        for _ in range(2):
            driver.queues[TRANSMIT_QUEUE].add([driver.buffer(bytes(HEADER_BYTES)), driver.buffer(bytes(60_000))])
            assert not net.live()
            driver.reset()
            driver.control.live = True
        assert net.said() == ["eth0: its network is gone (a frame was sent only in part); the guest goes on without it"]
        assert 0 < len(what_came(peer)) < 60_000
        driver.queues[TRANSMIT_QUEUE].add([driver.buffer(bytes(HEADER_BYTES)), driver.buffer(bytes(60))])
        assert not net.live()
        assert len(driver.queues[TRANSMIT_QUEUE].collect()) == 1
        assert net.said() == []
        assert what_came(peer) == b""


# Worker processes, killed from outside


def test_what_a_guest_says_is_whole_over_many_kills_of_the_console() -> None:
    driver = Driver(queues=2)
    script = random.Random(1)
    with (
        pipe() as (keyboard, _),
        pipe() as (screen, output),
        WorkerProcess("workers.console", driver, name="console", stdin=keyboard, stdout=output) as worker,
    ):
        worker.ready()
        seen = bytearray()
        first = 0
        for _ in range(KILLS):
            driver.queues[OUTPUT_QUEUE].collect()
            driver.forget()
            size = script.randrange(20_000, 40_000)
            driver.queues[OUTPUT_QUEUE].add([driver.buffer(words(first, size))])
            first += size
            worker.kick()
            # More than the pipe takes is left, so that it is in the middle of it.
            until = len(seen) + script.randrange(size * 4 - 66_000)
            while len(seen) < until:
                seen += os.read(screen, 4096)
            worker.kill()
            worker.restart()
            while driver.queues[OUTPUT_QUEUE].outstanding:
                if select.select([screen], [], [], 0.01)[0]:
                    seen += os.read(screen, 65536)
                driver.queues[OUTPUT_QUEUE].collect()
        seen += read_all(screen)
        check_repeats(bytes(seen), first, KILLS)
    driver.close()


def test_what_is_typed_reaches_the_guest_once_over_many_kills_of_the_console() -> None:
    driver = Driver(queues=2)
    script = random.Random(2)
    with (
        pipe() as (source, keyboard),
        open(os.devnull, "wb") as output,
        WorkerProcess("workers.console", driver, name="console", stdin=source, stdout=output.fileno()) as worker,
    ):
        worker.ready()
        typed = given = b""
        for _ in range(KILLS // 2):
            for size in (1, 50, 200, 300):
                driver.queues[INPUT_QUEUE].add([driver.buffer(size, True)])
            worker.kick()
            keys = bytes(script.randrange(0xFF) for _ in range(400))
            typed += keys
            for key in range(0, 400, 8):
                os.write(keyboard, keys[key : key + 8])
                if key == 8 * script.randrange(50):
                    break
            os.write(keyboard, keys[key + 8 :])
            worker.restart()
            while len(given) < len(typed):
                used = input_of(driver)
                given += used
                if not driver.queues[INPUT_QUEUE].outstanding:
                    driver.forget()
                    driver.queues[INPUT_QUEUE].add([driver.buffer(500, True)])
                    worker.kick()
        assert given == typed
    driver.close()


def test_a_stream_keeps_its_step_over_many_kills_under_load() -> None:
    """The other end answers each frame, and the guest sends as fast as its ring takes."""
    driver = Driver(queues=2, ram=8 << 20)
    script = random.Random(3)
    ours, theirs = socket.socketpair()
    answering = os.fork()
    if not answering:
        try:
            ours.close()
            answer_frames(theirs)
        finally:
            os._exit(1)
    theirs.close()
    options = ["--stream-fd", str(ours.fileno())]
    with ours, WorkerProcess("workers.net", driver, options, name="eth0", pass_fds=[ours.fileno()]) as worker:
        worker.ready()
        buffers: dict[int, Buffer] = {}
        for _ in range(12):
            offer_buffer(driver, buffers, driver.buffer(HEADER_BYTES + 31_000, writable=True))
        places = [driver.buffer(31_000) for _ in range(12)]
        header = driver.buffer(bytes(HEADER_BYTES))
        sending: dict[int, Buffer] = {}
        number = 0
        got: list[int] = []
        for _ in range(KILLS):
            until = len(got) + script.randrange(5, 200)
            while len(got) < until:
                for used in driver.queues[TRANSMIT_QUEUE].collect():
                    places.append(sending.pop(used.head))
                while places:
                    frame = numbered_frame(number, script.choice((60, 1514, 9000, 30_000)))[4:]
                    number += 1
                    place = places.pop()
                    driver.memory.view[place.address : place.address + len(frame)] = frame
                    sending[driver.queues[TRANSMIT_QUEUE].add([header, Buffer(place.address, len(frame))])] = place
                for used in driver.queues[RECEIVE_QUEUE].collect():
                    buffer = buffers.pop(used.head)
                    got.append(check_frame(driver.content(buffer)[HEADER_BYTES : used.written]))
                    offer_buffer(driver, buffers, buffer)
                worker.kick()
                worker.completions.take()
            worker.kill()
            worker.restart()
        assert worker.kill() == -signal.SIGKILL
        assert worker.errors() == ""
        # In order, but for what came twice; and nearly all.
        assert repeats_of(got) <= 2 * KILLS
        assert len(set(got)) >= max(got) - 2 * KILLS * 12
    os.waitpid(answering, 0)
    driver.close()


def answer_frames(stream: socket.socket) -> None:
    """Send back each frame that comes; ends with the stream, and where a frame makes no sense with the process."""
    data = bytearray()
    while piece := stream.recv(1 << 18):
        data += piece
        whole = bytes(data)
        numbers = take_frames(data)
        assert numbers == sorted(set(numbers)) or repeats_of(numbers)
        stream.sendall(whole[: len(whole) - len(data)])
    os._exit(0)
