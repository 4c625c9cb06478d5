"""A kit for the authors of devices: the other side of a device, to test it by itself, without a guest.

A `Driver` has a guest's memory and the driver's side of its virtqueues. A device in the test's own process is given
them by `Driver.attach`; a `WorkerProcess` is a real worker that serves them, to be kicked, reset, killed and started
again as the launcher does it. `lgmp.testing.chains` has requests in every lawful shape and a catalogue of what a driver
may do wrong, `lgmp.testing.fixtures` what pytest needs to clean up, and `lgmp.testing.front_end` drives devices that
are served by vhost-user.

    with Driver() as driver, WorkerProcess("workers.custom", driver, ["--", "upside_down.py:UpsideDown"]) as worker:
        chain = direct(driver, b"hello", 5)
        worker.kick()
        worker.collect(1)
        assert chain.answer == b"olleh"

What a device does that it may not is `Unexpected`, an AssertionError.
"""

from __future__ import annotations

from lgmp.testing.chains import ANY_LAYOUT_SHAPES, MISDEEDS, SHAPES, Chain, Misdeed, Shape, direct, indirect, scattered
from lgmp.testing.driver import FEATURES, PATIENCE, RAM_BYTES, Buffer, Driver, DriverQueue, Recorder, Unexpected, Used
from lgmp.testing.front_end import FrontEnd, FrontEndRing, InflightFile, ServedWorker, SharedMemory, SharedRegion
from lgmp.testing.worker import WorkerProcess, worker_command

__all__ = [
    "ANY_LAYOUT_SHAPES",
    "FEATURES",
    "MISDEEDS",
    "PATIENCE",
    "RAM_BYTES",
    "SHAPES",
    "Buffer",
    "Chain",
    "Driver",
    "DriverQueue",
    "FrontEnd",
    "FrontEndRing",
    "InflightFile",
    "Misdeed",
    "Recorder",
    "ServedWorker",
    "Shape",
    "SharedMemory",
    "SharedRegion",
    "Unexpected",
    "Used",
    "WorkerProcess",
    "direct",
    "indirect",
    "scattered",
    "worker_command",
]
