"""From the SIGKILL of a block worker to its successor's first answer, as the launcher brings it about.

The supervisor and the waker are the launcher's own; in the place of a guest there are a ring of ours and a request in
it that nobody has answered when the worker is killed. Where the time goes, in milliseconds from the kill:

    noticed   the waker has heard of the end, and is about to start another
    exec      the successor's exec is done
    READY     its READY is heard: Python has started, has imported what it needs and opened what it was given
    answer    the used ring has the answer

Nothing here waits by looking again: the launcher hears of each by a descriptor.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
from collections.abc import Sequence
from time import perf_counter_ns

from samples import Samples

from lgmp.bus import LguestBus, vring_pages
from lgmp.mailbox import ToLauncher
from lgmp.memory import GuestMemory
from lgmp.supervisor import Incarnation, Supervisor, Worker, WorkerSpecification
from lgmp.virtio import ids
from lgmp.virtio.block import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN
from lgmp.virtio.ids import VIRTQUEUE_NUM, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lgmp.virtio.ring import VringLayout
from lgmp.waker import Waker

STAGES = ("noticed", "exec", "READY", "answer")
_RAM_BYTES = 1 << 20
_HEADER, _DATA, _STATUS = 0x1000, 0x2000, 0x1100
_READ_BYTES = 4096
# A worker that is silent for so long, in seconds, is given up.
_PATIENCE = 30.0


class _Launcher(Supervisor):
    """A supervisor that notes when its worker's READY is heard."""

    stamps: dict[str, int]

    def _heard(self, worker: Worker, incarnation: Incarnation, message: Sequence[int | str]) -> bool:
        if message[0] == ToLauncher.READY:
            self.stamps["READY"] = perf_counter_ns()
        return super()._heard(worker, incarnation, message)


class _Listener:
    """The launcher's ears; what goes wrong is in `failure`."""

    ending = False

    def __init__(self, used_index: memoryview) -> None:
        self._used_index = used_index
        self.stamps: dict[str, int] = {}
        self.wanted = 0
        self.answered = threading.Event()
        self.failure: str | None = None

    def used(self) -> None:
        """Something may have been answered."""
        if self._used_index[1] == self.wanted and not self.answered.is_set():
            self.stamps["answer"] = perf_counter_ns()
            self.answered.set()

    def kicked(self, worker: Worker) -> None:
        """Never: kicks come from here."""

    def quit(self) -> None:
        """Never: a disk asks for no end."""

    def restarted(self, worker: Worker, why: str) -> None:  # noqa: ARG002
        """The successor's exec is done, or there would be none."""
        self.stamps["exec"] = perf_counter_ns()

    def broken(self, worker: Worker, why: str) -> None:  # noqa: ARG002
        """The end of the measurement."""
        self.failed(why)

    def failed(self, text: str) -> None:
        """The end of the measurement."""
        self.failure = text
        self.answered.set()


def measure(kills: int = 100) -> dict[str, Samples]:
    """Milliseconds from a kill to each of STAGES, `kills` times. Raises RuntimeError where there is no answer."""
    values: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(tempfile.TemporaryFile())
        disk.truncate(1 << 20)
        memory = stack.enter_context(GuestMemory.create(_RAM_BYTES, 1 + vring_pages(VIRTQUEUE_NUM)))
        device = LguestBus(memory).add_device(ids.VIRTIO_ID_BLOCK, "vda", [VIRTQUEUE_NUM], 0, bytes(8))
        layout = VringLayout.legacy(VIRTQUEUE_NUM, device.queues[0].address)
        avail, used = (memory.view[at : at + 4].cast("H") for at in (layout.avail, layout.used))
        stack.callback(avail.release)
        stack.callback(used.release)
        listener = _Listener(used)
        waker = Waker()
        supervisor = _Launcher(memory, "bench", waker, listener)
        supervisor.stamps = stamps = listener.stamps
        stack.callback(supervisor.close)
        stack.callback(waker.close)
        worker = supervisor.start(
            device,
            WorkerSpecification(
                "workers.block",
                (f"--disk-fd={disk.fileno()}",),
                (disk.fileno(),),
                before_restart=lambda: stamps.__setitem__("noticed", perf_counter_ns()),
            ),
        )
        waker.start()
        stack.callback(supervisor.stop, None)
        _describe(memory.view, layout)
        for number in range(kills + 1):
            listener.answered.clear()
            listener.wanted = (number + 1) & 0xFFFF
            memory.view[_STATUS] = 0xFF
            if not number:  # the first is there to see it work
                avail[1] = 1
                supervisor.kick(worker)
                _wait(listener)
                continue
            stamps.clear()
            start = perf_counter_ns()
            os.kill(worker.process.pid, 9)
            avail[1] = listener.wanted
            _wait(listener)
            if memory.view[_STATUS] != VIRTIO_BLK_S_OK:
                raise RuntimeError(f"the worker answered with status {memory.view[_STATUS]}")
            for stage in STAGES:
                values[stage].append((stamps[stage] - start) / 1e6)
    return {stage: Samples.of(samples, "ms") for stage, samples in values.items()}


def _describe(view: memoryview, layout: VringLayout) -> None:
    """One request, which every entry of the ring leads to: a read of the disk's beginning."""
    struct.pack_into("<IIQ", view, _HEADER, VIRTIO_BLK_T_IN, 0, 0)
    chain = (
        (_HEADER, 16, VRING_DESC_F_NEXT, 1),
        (_DATA, _READ_BYTES, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 2),
        (_STATUS, 1, VRING_DESC_F_WRITE, 0),
    )
    for index, descriptor in enumerate(chain):
        struct.pack_into("<QIHH", view, layout.desc + 16 * index, *descriptor)


def _wait(listener: _Listener) -> None:
    if not listener.answered.wait(_PATIENCE):
        raise RuntimeError(f"no answer from the worker for {_PATIENCE:.0f} s")
    if listener.failure is not None:
        raise RuntimeError(listener.failure)
