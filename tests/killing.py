"""Has the device's side of a ring die between any two instructions, as a process does that is killed."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from lgmp.virtio import inflight, ring

_FILES = {ring.__file__, inflight.__file__}
_STORE = dis.opmap["STORE_SUBSCR"]


class _KilledError(BaseException):
    """Nothing of the ring's may catch it: who is killed does nothing more."""


def killed_before_instruction(call: Callable[[], object], number: int) -> bool:
    """Call what works with a ring, and have it die before its `number`th bytecode in the ring's own modules, from 0 on.

    Gives False where it came to its end before. A store to shared memory is one bytecode: what is in memory afterwards
    is what a process would leave that is killed there.
    """
    return _killed(call, number, lambda _frame: True)


def killed_before_store(call: Callable[[], object], number: int) -> bool:
    """As `killed_before_instruction`, but only what may be a store to shared memory counts."""
    return _killed(call, number, lambda frame: frame.f_code.co_code[frame.f_lasti] == _STORE)


def _killed(call: Callable[[], object], number: int, counts: Callable[[FrameType], bool]) -> bool:
    left = number

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in _FILES:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        if event == "opcode" and counts(frame):
            if not left:
                raise _KilledError
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except _KilledError:
        return True
    finally:
        sys.settrace(before)
    return False
