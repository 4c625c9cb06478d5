"""What a launcher says of its guest and its workers when it is asked: the numbers behind `lgmp ps` and `lgmp top`.

They lie there anyway, most of them in the workers' control pages: no worker is disturbed, and the launcher makes no
system call for it. What the kernel knows of the processes, who asks reads himself (`process_usage.py`).

The keys of a guest: `name`, `pid`, `kernel` (its path), `memory_bytes`, `host`, `guest_abi`, `socket` (its path),
`state` ("running", "pausing", "paused" or "ending"), `uptime_seconds` and `workers`. Those of each worker:

- `name`, `kind` ("block", "net" ...) and `details` of its device: what it stands on, as --verbose has it;
- `pid`, None where no process serves the device just now; `state`, a word of `supervisor.WorkerState`; `restarts`;
- `broken`: whether the device is out of order, by its driver or its worker; `error`: the last thing that went wrong;
- `bytes_in` (given to the guest), `bytes_out` (taken from it), `kicks`, `interrupts`, `errors`: counts from the start;
- `queues`, and of each `num` (descriptors), `next_avail` and `next_used` (both modulo 65536), `in_flight`, `requests`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS, INTERRUPTS, KICKS

if TYPE_CHECKING:
    from lgmp.supervisor import Worker


class GuestFacts(NamedTuple):
    """What does not change while a guest runs; `memory_bytes` is its RAM."""

    name: str
    pid: int
    kernel: str
    memory_bytes: int
    host: str
    guest_abi: str
    socket: str


GUEST_KEYS = (*GuestFacts._fields, "state", "uptime_seconds", "workers")
_WORKER_KEYS = {
    *("name", "kind", "details", "pid", "state", "restarts", "broken", "error", "queues"),
    *("bytes_in", "bytes_out", "kicks", "interrupts", "errors"),
}
_QUEUE_KEYS = {"num", "next_avail", "next_used", "in_flight", "requests"}


def is_status(status: object) -> TypeGuard[dict[str, Any]]:
    """Whether that is what `GuestStatus.read` gives, or more of it, and not something of another lgmp's."""
    return _has(status, GUEST_KEYS, "workers") and all(
        _has(worker, _WORKER_KEYS, "queues") and all(_has(queue, _QUEUE_KEYS) for queue in worker["queues"])
        for worker in status["workers"]
    )


def _has(value: object, keys: Iterable[str], of: str | None = None) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a dictionary with all the keys, and a list at the one that is given besides."""
    return isinstance(value, dict) and value.keys() >= set(keys) and (of is None or isinstance(value[of], list))


class GuestStatus:
    """What can be said of one guest at any time."""

    def __init__(self, facts: GuestFacts, workers: Sequence[Worker], details: Mapping[int, str]) -> None:
        """It starts now; `details` are what devices stand on, by their index."""
        self._facts = facts
        self._workers = workers
        self._details = details
        self._started = time.monotonic()

    def read(self, state: str) -> dict[str, object]:
        """Everything of now, as the module's text says. The guest is in `state`."""
        return {
            **self._facts._asdict(),
            "state": state,
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "workers": [_read_worker(worker, self._details.get(worker.device.index, "")) for worker in self._workers],
        }


def _read_worker(worker: Worker, details: str) -> dict[str, object]:
    control = worker.control
    # One copy: each look at a number in shared memory costs as much.
    statistics = control.statistics.tolist()
    return {
        "name": worker.device.name,
        "kind": worker.specification.module.removeprefix("workers."),
        "details": details,
        "pid": None if worker.current.ended.is_set() else worker.process.pid,
        "state": str(worker.state),
        "restarts": worker.restarts,
        "broken": worker.out_of_order,
        "error": worker.error,
        "bytes_in": statistics[BYTES_IN],
        "bytes_out": statistics[BYTES_OUT],
        "kicks": statistics[KICKS],
        "interrupts": statistics[INTERRUPTS],
        "errors": statistics[ERRORS],
        "queues": [_read_queue(worker, number) for number in range(len(worker.device.queues))],
    }


def _read_queue(worker: Worker, number: int) -> dict[str, int]:
    region = worker.control.inflight[number]
    next_avail, next_used = worker.control.position(number)
    return {
        "num": region.num,
        "next_avail": next_avail,
        "next_used": next_used,
        "in_flight": (next_avail - next_used) & 0xFFFF,
        "requests": region.taken(),
    }
