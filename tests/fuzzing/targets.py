"""What can be fuzzed, by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Protocol

from fuzzing.choices import OfBytes, of_seed
from fuzzing.devices import FuzzedBlock, FuzzedConsole, FuzzedModernNet, FuzzedNet, FuzzedRng
from fuzzing.messages import FuzzedLauncher, FuzzedMailbox, FuzzedMailboxProcess, Unpack
from fuzzing.processes import FuzzedProcess
from fuzzing.rings import Rings
from fuzzing.vhost_user import FuzzedServe, FuzzedVhostUser

# A case that takes so long, in seconds, hangs.
PATIENCE = 120.0


class Target(Protocol):
    """Something to fuzz. `chains` (or messages) it has been given so far, `broken`: how often it said so."""

    name: str
    chains: int
    broken: int

    def run(self, random: Random) -> None:
        """One case, that decides by `random`. Raises what shows that something is wrong."""

    def close(self) -> None:
        """The end. Raises what shows that something is wrong."""


# How each is made, and its share of the chains (messages come on top of those).
TARGETS: dict[str, tuple[Callable[[], Target], float]] = {
    "rings": (Rings, 0.3),
    "block": (FuzzedBlock, 0.15),
    "net": (FuzzedNet, 0.15),
    "modern net": (FuzzedModernNet, 0.15),
    "console": (FuzzedConsole, 0.1),
    "rng": (FuzzedRng, 0.1),
    "block process": (partial(FuzzedProcess, FuzzedBlock), 0.05),
    "net process": (partial(FuzzedProcess, FuzzedNet), 0.05),
    "console process": (partial(FuzzedProcess, FuzzedConsole), 0.05),
    "rng process": (partial(FuzzedProcess, FuzzedRng), 0.05),
    "messages": (Unpack, 0.1),
    "mailbox": (FuzzedMailbox, 0.1),
    "mailbox process": (FuzzedMailboxProcess, 0.002),
    "launcher": (FuzzedLauncher, 0.05),
    "vhost-user": (FuzzedVhostUser, 1.0),
    "vhost-user process": (FuzzedServe, 0.05),
}
# Those in this process, of which a fuzzer can see what its bytes lead to.
GUIDED = ("rings", "block", "net", "modern net", "console", "rng", "messages", "mailbox", "vhost-user")


def run_case(target: Target, seed: int, case: int) -> None:
    """One case by its number; what it raises says how to have it again."""
    try:
        target.run(of_seed(seed, target.name, case))
    except BaseException as found:
        found.add_note(f"again: scripts/fuzz --seed {seed} --only {target.name!r} --case {case}")
        raise


def fuzz_with_atheris(name: str, arguments: Sequence[str]) -> int:
    """Let atheris, which is not among what tests need, choose the bytes that decide; `arguments` are libFuzzer's."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print("scripts/fuzz: --atheris takes atheris: pip install atheris, where there is one for this Python")
        return 1
    # Not by its import hook: what is to be looked at was imported for the targets.
    target = TARGETS[name][0]()

    def once(data: bytes) -> None:
        target.run(OfBytes(data))

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], "-max_len=1024", *arguments], once)
    atheris.Fuzz()
    return 0
