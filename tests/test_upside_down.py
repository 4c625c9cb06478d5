"""The example of a device of one's own, examples/upside_down.py, tested as its author would: alone, and in a guest."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run

from lgmp.testing import ANY_LAYOUT_SHAPES, MISDEEDS, Shape, WorkerProcess, direct
from lgmp.testing.fixtures import MakeDriver, StartWorker

UPSIDE_DOWN = f"{Path(__file__).parent}/examples/upside_down.py:UpsideDown"


@pytest.fixture
def upside(driver: MakeDriver, worker: StartWorker) -> WorkerProcess:
    return worker("workers.custom", driver(), ["--", UPSIDE_DOWN], name="upside0")


@pytest.mark.parametrize("shape", ANY_LAYOUT_SHAPES.values(), ids=ANY_LAYOUT_SHAPES)
def test_text_comes_back_upside_down(shape: Shape, upside: WorkerProcess) -> None:
    chain = shape(upside.driver, b"Hello, ", b"world!", 5, 15)
    upside.kick()
    (used,) = upside.collect(1)

    assert chain.answer[: used.written].decode() == "¡plɹoʍ 'ollǝɥ"


def test_it_signs_where_it_is_told_to(driver: MakeDriver, worker: StartWorker) -> None:
    process = worker("workers.custom", driver(), ["--", f"{UPSIDE_DOWN},sign=ole"], name="upside0")
    chain = direct(process.driver, b"you", 12)
    process.kick()
    (used,) = process.collect(1)

    assert chain.answer[: used.written].decode() == "noʎǝlo"


def test_no_room_for_the_answer_is_said(upside: WorkerProcess) -> None:
    direct(upside.driver, b"hello", 5)
    upside.kick()

    assert upside.broken() == "upside0: queue 0: descriptor 0: no room for an answer of 7 bytes"


def test_a_driver_that_breaks_a_rule_loses_it_until_a_reset(upside: WorkerProcess) -> None:
    MISDEEDS["loop"](upside.driver)
    upside.kick()
    assert "Looped descriptor" in upside.broken()

    upside.reset()
    chain = direct(upside.driver, b"sos", 3)
    upside.kick()
    upside.collect(1)
    assert chain.answer == b"sos"


def test_it_goes_on_where_it_was_killed(upside: WorkerProcess) -> None:
    upside.kill()
    chain = direct(upside.driver, b"still here", 20)
    upside.begin()
    upside.restart()
    (used,) = upside.collect(1)

    assert chain.answer[: used.written].decode() == "ǝɹǝɥ llᴉʇs"


@pytest.mark.every_host
def test_a_guest_asks_it() -> None:
    code, out, err = run("quiet ask 42 hello world; poweroff", "--device", UPSIDE_DOWN)

    assert (code, out, err) == (0, "ask 42: 15 bytes 'plɹoʍ ollǝɥ'\n", "")
