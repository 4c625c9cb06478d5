"""The embedded host with and without tlbshim.so, which only makes stores faster."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from launching import Launch

# What the CPU says of itself, in a process of its own: a library stays loaded as it was loaded first.
ASK = """
from lgmp.hosts.embedded.cpu import Cpu
from lgmp.memory import GuestMemory
with GuestMemory.create(1 << 20) as memory:
    cpu = Cpu(memory.view, 1 << 20)
    print(cpu.fast_stores)
    cpu.close()
"""


@pytest.mark.parametrize(("setting", "fast"), [("on", True), ("off", False)])
def test_the_shim_stands_in_front_of_unicorn_unless_it_is_turned_off(setting: str, fast: bool) -> None:
    environment = {**os.environ, "LGMP_TLBSHIM": setting}

    said = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)

    assert said.stdout == f"{fast}\n"


def test_without_the_shim_a_guest_runs_as_well() -> None:
    # Among its checks are code that changes itself, and code that is changed through another mapping of its page.
    with Launch("demo", env={**os.environ, "LGMP_TLBSHIM": "off"}) as launched:
        code, out, _err = launched.end()

    assert code == 0, out
    assert out.splitlines()[-1] == "SELF-CHECK PASSED"


def test_what_is_tested_of_code_that_changes_holds_without_the_shim_too() -> None:
    files = ("tests/test_embedded_cpu.py", "tests/test_embedded_isolation.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    root = os.path.dirname(os.path.dirname(__file__))

    inner = subprocess.run(
        command, env={**os.environ, "LGMP_TLBSHIM": "off"}, cwd=root, capture_output=True, text=True, check=False
    )

    assert inner.returncode == 0, inner.stdout
