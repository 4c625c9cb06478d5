"""Hostile guests and nonsense messages, some thousand of them; scripts/fuzz runs as many as wanted. See fuzzing/."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from fuzzing.choices import OfBytes
from fuzzing.devices import FuzzedBlock, FuzzedConsole, FuzzedDevice, FuzzedModernNet, FuzzedNet, FuzzedRng
from fuzzing.messages import Unpack
from fuzzing.rings import Rings
from fuzzing.targets import TARGETS, Target, run_case
from hypothesis import given, settings
from hypothesis import strategies as st

# How many chains, or messages, of those that one run takes.
CHAINS = 10_000


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_each_keeps_what_it_promises(name: str, seed: int) -> None:
    print(f"--seed {seed}")
    make, share = TARGETS[name]
    with closing(make()) as target:
        case = 0
        while target.chains < CHAINS * share:
            run_case(target, seed, case)
            case += 1
            assert case < 10 * CHAINS


# The same by hypothesis, which finds the smallest that goes wrong.


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0))
def test_any_ring_is_served_or_refused(data: bytes, seed: int) -> None:
    for random in (OfBytes(data), Random(seed)):
        Rings().run(random)


@pytest.mark.parametrize("kind", [FuzzedBlock, FuzzedNet, FuzzedModernNet, FuzzedConsole, FuzzedRng])
def test_any_requests_are_answered_or_refused(kind: type[FuzzedDevice]) -> None:
    with closing(kind()) as device:

        @settings(max_examples=150, deadline=None)
        @given(st.binary(max_size=600), st.integers(0))
        def cases(data: bytes, seed: int) -> None:
            for random in (OfBytes(data), Random(seed)):
                device.run(random)

        cases()


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_none(data: bytes) -> None:
    Unpack().run(OfBytes(data))


# What the proof stands on


class Traced(Random):
    """Remembers every decision."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.made: list[int] = []

    def getrandbits(self, k: int, /) -> int:
        self.made.append(super().getrandbits(k))
        return self.made[-1]


@pytest.mark.parametrize("name", ["rings", "block", "net", "console", "rng", "messages", "mailbox"])
def test_the_same_seed_gives_the_same_chains(name: str) -> None:
    runs = []
    for _ in range(2):
        with closing(TARGETS[name][0]()) as target:
            decisions = []
            for case in range(30):
                random = Traced(f"1 {name} {case}")
                target.run(random)
                decisions.append(random.made)
            runs.append((target.chains, target.broken, decisions))
    assert runs[0] == runs[1]
    assert runs[0][0] >= 30


def test_a_find_says_how_to_have_it_again() -> None:
    class Finds:
        name = "rings"
        chains = broken = 0

        def run(self, random: Random) -> None:
            raise ZeroDivisionError

        def close(self) -> None:
            """Nothing."""

    target: Target = Finds()
    with pytest.raises(ZeroDivisionError) as found:
        run_case(target, 5, 7)
    assert found.value.__notes__ == ["again: scripts/fuzz --seed 5 --only 'rings' --case 7"]


def test_the_command_runs_all_targets_and_says_how_many_chains_there_were() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzzing", "--chains", "100", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seed 1\n")
    assert [line.partition("  ")[0] for line in done.stdout.splitlines()[2:]] == [*TARGETS, "in all"]
