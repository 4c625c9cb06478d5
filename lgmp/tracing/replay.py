"""`lgmp replay`: a worker does again what one was recorded doing, without a guest, and its answers are compared.

Memory, rings and descriptors are as they were, at the same addresses. A chain is offered only when all the answers have
come that preceded it in the recording, so each request finds what it found then. What is behind the device is played as
well: what came in from there (typed, received, random) is handed to the worker when an answer has to have it, and what
went out has to come out again.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import sys
import time
from collections.abc import Iterator, Sequence

from lgmp.control import ControlPage
from lgmp.errors import LgmpError
from lgmp.mailbox import ToLauncher, unpack
from lgmp.memory import PAGE_SIZE, GuestMemory
from lgmp.testing.driver import Driver, DriverQueue, Unexpected
from lgmp.testing.worker import WorkerProcess
from lgmp.tracing.decoding import Pairing, Request, printable, words
from lgmp.tracing.events import Bad, Done, Features, Finish, Lost, Reset, Segment, Start, Take, segments
from lgmp.tracing.recording import Header, Recording
from lgmp.tracing.replay_worlds import World, build
from lgmp.virtio.inflight import USED_IDX_U16

# A day, in seconds.
_LONGEST_PATIENCE = 86400
# How many differences are shown; those after them are only counted.
_SHOWN = 20
# How often what is behind the device is looked at while an answer is waited for, in milliseconds.
_LOOK_MILLISECONDS = 20


class _Rings(Driver):
    """The memory and the rings of a recording."""

    def __init__(self, header: Header) -> None:
        self.memory = GuestMemory.create(header.ram, (header.limit - header.ram) // PAGE_SIZE)
        self.control = ControlPage.create([layout.num for layout in header.queues])
        self.layouts = list(header.queues)
        self.queues = [DriverQueue(self.memory, layout) for layout in self.layouts]

    def start_at(self, indexes: Sequence[int]) -> None:
        """Have the rings begin with these indexes."""
        self.queues = [
            DriverQueue(self.memory, layout, index) for layout, index in zip(self.layouts, indexes, strict=True)
        ]
        for region, index in zip(self.control.inflight, indexes, strict=True):
            region.header[USED_IDX_U16] = index

    def put(self, address: int, data: bytes) -> None:
        """Put bytes into memory, as far as they are in it."""
        if address < self.memory.limit:
            data = data[: self.memory.limit - address]
            self.memory.view[address : address + len(data)] = data

    def used_since(self, queue: int) -> Iterator[tuple[int, int]]:
        """What a ring has got of used elements since the last time: heads, and bytes written."""
        ring = self.queues[queue]
        while ring.next_used != ring.used_index():
            slot = ring.layout.used + 4 + 8 * (ring.next_used % ring.layout.num)
            head, written = struct.unpack_from("<II", self.memory.view, slot)
            ring.next_used = (ring.next_used + 1) & 0xFFFF
            yield head, written

    def read(self, pieces: Sequence[Segment], size: int) -> bytes:
        """The first `size` bytes of the writable ones of `pieces`."""
        found = bytearray()
        for piece in pieces:
            if piece.writable:
                end = min(piece.address + min(piece.size, size - len(found)), self.memory.limit)
                found += self.memory.view[piece.address : max(piece.address, end)]
        return bytes(found)

    def last_byte(self, pieces: Sequence[Segment]) -> int | None:
        """The last byte of the writable ones of `pieces`."""
        for piece in reversed(pieces):
            if piece.writable and piece.size and piece.address + piece.size <= self.memory.limit:
                return self.memory.view[piece.address + piece.size - 1]
        return None


class _Stopped(Exception):
    """The replay cannot go on; why has been said."""


class Replay:
    """One replay. `differences` counts where the worker did not do what it did in the recording."""

    def __init__(self, recording: Recording, world: World, *, timing: bool, patience: float) -> None:
        """Nothing runs yet. `patience`: the seconds that an answer may take."""
        self._recording = recording
        self._header = recording.header
        self._world = world
        self._timing = timing
        self._patience = patience
        self._rings = _Rings(self._header)
        self._worker: WorkerProcess | None = None
        self._pidfd = -1
        self._pairing = Pairing()
        # The answers that have come, by ring and head, and were not asked for yet.
        self._answers: dict[tuple[int, int], int] = {}
        self._offered: set[tuple[int, int]] = set()
        # What the worker said of a rule that the driver broke.
        self._broken: str | None = None
        # Whether the rings are nobody's until the next reset.
        self._skipping = False
        self._began: tuple[int, float] | None = None
        self.differences = 0
        self.compared = 0

    def run(self) -> None:
        """Do it all. Raises LgmpError for a recording that cannot be read."""
        with contextlib.suppress(_Stopped):
            for event in self._recording.events():
                self._keep_pace(event.time)
                match event:
                    case Start():
                        self._start(event)
                    case _ if self._worker is None:
                        raise LgmpError("the recording has events before its START: it cannot be replayed")
                    case Take():
                        self._take(event)
                    case Done():
                        self._done(event)
                    case Bad():
                        self._bad(event)
                    case Reset():
                        self._reset()
                    case Features():
                        self._features(event)
                    case Lost():
                        _print(f"here {event.events} events were lost: what follows is not replayed")
                        return
                    case Finish():
                        return
            if self._worker is not None:
                self._look()  # it may have ended since

    def close(self) -> None:
        """Kill the worker, and give everything back."""
        if self._worker is not None:
            self._worker.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._rings.close()

    def differs(self, text: str) -> None:
        """Count a difference, and say it."""
        self.differences += 1
        if self.differences <= _SHOWN:
            _print(text)
        elif self.differences == _SHOWN + 1:
            _print("more differences are only counted")

    def _named(self, request: Request) -> str:
        """A request for people."""
        return f"request {request.number} ({' '.join(words(self._header.kind, request.as_taken()).split())})"

    def _keep_pace(self, moment: int) -> None:
        if self._began is None:
            self._began = moment, time.monotonic()
        elif self._timing:
            since, began = self._began
            until = began + (moment - since) / 1e9
            while (left := until - time.monotonic()) > 0:
                self._wait(left)

    # Events

    def _start(self, start: Start) -> None:
        if self._worker is not None:
            self._start_again(start)
            return
        self._pairing.start(start)
        self._rings.start_at([queue.used_index for queue in start.queues])
        self._worker = worker = WorkerProcess(
            self._world.module,
            self._rings,
            self._world.options,
            name=self._header.device,
            pass_fds=self._world.descriptors,
            features=start.features,
        )
        self._world.started()
        self._pidfd = os.pidfd_open(worker.process.pid)
        deadline = time.monotonic() + max(self._patience, 10.0)
        while (message := worker.completions.take()) is None:
            self._hear_end()
            if time.monotonic() > deadline:
                self._stop("the worker does not say READY")
            self._wait(0.02, hear=False)
        if message and unpack(message)[0] != ToLauncher.READY:
            self._stop(f"the worker does not start: {printable(str(unpack(message)[-1]))}")

    def _start_again(self, start: Start) -> None:
        """The worker was killed then, and had a successor. This one was not."""
        answered = self._pairing.start(start)
        for number, queue in enumerate(start.queues):
            under_way = sum(request.take.queue == number for request in self._pairing.open)
            if queue.used_index != (self._rings.queues[number].next_avail - under_way) & 0xFFFF:
                # Its driver reset it when there was nobody to tell of that.
                self._reset()
                self._rings.start_at([queue.used_index for queue in start.queues])
                self._pairing.start(start)
                break
        else:
            for request in answered:
                if not self._skipping:
                    self._world.feed_unknown(request)
                    self._answer(request)
                    self._world.passed_over(request)
        self._features(Features(start.time, start.features))

    def _take(self, take: Take) -> None:
        request = self._pairing.take(take)
        if request is None or self._skipping:
            return
        if take.descriptors is None:
            raise LgmpError("the recording has no descriptors, so it is none of `lgmp record`: it cannot be replayed")
        if len(take.data) < take.readable:
            self._stop(f"request {request.number}: it is longer than what is recorded of one; the replay ends here")
        pieces = segments(take)
        if take.table is not None:
            self._rings.put(take.table.address, take.table.content)
        data = take.data
        for piece in pieces:
            if not piece.writable:
                self._rings.put(piece.address, data[: piece.size])
                data = data[piece.size :]
        ring = self._rings.queues[take.queue]
        for entry in take.descriptors:
            ring.set_descriptor(entry.number, entry.address, entry.size, entry.flags, entry.next)
        self._offered.add((take.queue, take.head))
        ring.offer(take.head)
        self._world.offered(take)
        self._kick()

    def _done(self, done: Done) -> None:
        request = self._pairing.done(done)
        if request is None or self._skipping:
            return
        self._world.feed(request)
        written = self._answer(request)
        pieces = segments(request.take)
        what = self._named(request)
        got = self._rings.read(pieces, written)
        answer = Done(done.time, done.queue, done.head, written, got, self._rings.last_byte(pieces))
        self.compared += 1
        for difference in self._world.compare(request, answer):
            self.differs(f"{what}: {difference}")

    def _answer(self, request: Request) -> int:
        """Wait until a request is answered; gives the bytes written."""
        key = request.take.queue, request.take.head
        deadline = time.monotonic() + self._patience
        self._look()
        while key not in self._answers:
            what = self._named(request)
            if self._broken is not None:
                self.differs(f"{what}: the device says: {printable(self._broken)}")
                self._stop("the replay ends here")
            if time.monotonic() > deadline:
                self.differs(f"{what}: no answer within {self._patience:g} s")
                self._stop("the replay ends here")
            self._wait(_LOOK_MILLISECONDS / 1000)
            self._look()
        self._offered.discard(key)
        return self._answers.pop(key)

    def _bad(self, bad: Bad) -> None:
        if self._skipping:
            return
        if bad.queue is not None and bad.avail:
            layout = self._header.queues[bad.queue]
            self._rings.put(layout.desc, bad.table)
            for table in bad.indirect:
                self._rings.put(table.address, table.content)
            # The index last: the rest has to be there when it is.
            self._rings.put(layout.avail + 4, bad.avail[4:])
            flags, index = struct.unpack_from("<HH", bad.avail)
            self._rings.queues[bad.queue].set_avail(flags, index)
        self._kick()
        self._world.provoke()
        deadline = time.monotonic() + self._patience
        while self._broken is None and time.monotonic() < deadline:
            self._wait(_LOOK_MILLISECONDS / 1000)
            self._look(unasked=False)
        self.compared += 1
        self._skipping = True
        if self._broken is None:
            self.differs(f"the device was broken then: {printable(bad.text)}; now it has nothing against that")
        elif self._broken != bad.text:
            self.differs(f"the device said then: {printable(bad.text)}; now it says: {printable(self._broken)}")

    def _reset(self) -> None:
        assert self._worker is not None
        self._pairing.reset()
        try:
            self._worker.reset()
        except Unexpected as error:
            self._hear_end()
            self._stop(f"the device is not reset: {printable(str(error))}")
        self._answers.clear()
        self._offered.clear()
        self._broken = None
        self._skipping = False
        self._worker.features = 0
        self._world.reset()

    def _features(self, features: Features) -> None:
        assert self._worker is not None
        self._worker.features = features.features
        if self._rings.control.live:
            self._rings.control.accepted_features = features.features

    # The worker

    def _kick(self) -> None:
        assert self._worker is not None
        self._worker.kick()

    def _wait(self, seconds: float, *, hear: bool = True) -> None:
        """Wait for a message, the worker's end or something behind the device, so long at most; see to all of it."""
        assert self._worker is not None
        poll = select.poll()
        poll.register(self._worker.completions, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        for descriptor, events in self._world.wants():
            poll.register(descriptor, events)
        poll.poll(max(0.0, seconds) * 1000)
        self._world.move()
        if hear:
            self._hear()

    def _hear(self) -> None:
        """Take what the worker has said."""
        assert self._worker is not None
        while (raw := self._worker.completions.take()) is not None:
            kind, *_, last = unpack(raw)
            if kind == ToLauncher.BROKEN:
                self._broken = str(last)
            elif kind == ToLauncher.FAILED:
                self.differs(f"the worker ended: {printable(str(last))}")
                self._stop("the replay ends here")
        self._hear_end()

    def _hear_end(self) -> None:
        assert self._worker is not None
        code = self._worker.process.poll()
        if code is None:
            return
        while (raw := self._worker.completions.take()) is not None:
            kind, *_, last = unpack(raw)
            if kind == ToLauncher.FAILED:
                self.differs(f"the worker ended: {printable(str(last))}")
                self._stop("the replay ends here")
        how = f"exited with {code}" if code >= 0 else f"was killed by signal {-code}"
        said = self._worker.errors().strip().splitlines()
        self.differs(f"the worker {how}" + (f", and said: {printable(said[-1])}" if said else ""))
        self._stop("the replay ends here")

    def _look(self, *, unasked: bool = True) -> None:
        """See what the worker has answered. `unasked`: whether answers that nobody waits for are differences."""
        self._world.move()
        for number in range(len(self._rings.queues)):
            for head, written in self._rings.used_since(number):
                if (number, head) in self._offered and (number, head) not in self._answers:
                    self._answers[number, head] = written
                elif unasked:
                    self.differs(f"ring {number}: the device gave back descriptor {head}, which it was not given")
        self._hear()

    def _stop(self, why: str) -> None:
        """Say why the replay ends here, which is no success."""
        self.differences = max(1, self.differences)
        _print(why)
        raise _Stopped


def replay(path: str, device: str | None, *, timing: bool, patience: float) -> int:
    """Replay a recording and say what differs; gives the exit status. Raises LgmpError."""
    if not 0 < patience <= _LONGEST_PATIENCE:
        raise LgmpError(f"--patience takes seconds, more than 0 and up to {_LONGEST_PATIENCE}")
    with contextlib.ExitStack() as stack:
        recording = Recording.open(path)
        stack.callback(recording.close)
        world = build(recording.header, device, stack)
        running = Replay(recording, world, timing=timing, patience=patience)
        stack.callback(running.close)
        running.run()
        if recording.truncated:
            _print(f"{path} is cut off in the middle of an event; what precedes that was replayed")
        for difference in world.finish():
            running.differs(difference)
    count = running.differences
    result = "no difference" if not count else "1 difference" if count == 1 else f"{count} differences"
    _print(f"{recording.header.device}: {running.compared} answers compared, {result}")
    return 1 if count else 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
