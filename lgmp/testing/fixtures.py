"""Fixtures for pytest. In a conftest.py, or in a test's own file: `pytest_plugins = ["lgmp.testing.fixtures"]`.

`driver` and `worker` make what a test asks them for, as often as it asks, and clean up when it has ended:

    def test_text_comes_back_upside_down(driver: MakeDriver, worker: StartWorker) -> None:
        process = worker("workers.custom", driver(), ["--", "upside_down.py:UpsideDown"])
        chain = direct(process.driver, b"hello", 5)
        process.kick()
        process.collect(1)
        assert chain.answer == b"olleh"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

import pytest

from lgmp.testing.driver import Driver
from lgmp.testing.worker import WorkerProcess

# What the fixtures give, for tests that have types: they take what Driver and WorkerProcess take.
MakeDriver: TypeAlias = Callable[..., Driver]
StartWorker: TypeAlias = Callable[..., WorkerProcess]


@pytest.fixture
def driver() -> Iterator[MakeDriver]:
    """`driver()`, `driver(queues=2)`: a `Driver` of these arguments."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Driver(*arguments, **options))


@pytest.fixture
def worker() -> Iterator[StartWorker]:
    """`worker("workers.block", driver(), ["--disk-fd", "3"])`: a `WorkerProcess` of these arguments, which is ready."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(WorkerProcess(*arguments, **options)).ready()
