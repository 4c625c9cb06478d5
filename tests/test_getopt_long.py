"""Command lines by the rules of getopt_long(3): what the C library makes of them, as getopt(1) shows it."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lgmp.getopt_long import Argument, OptionError, getopt_long

SHORT = {"v": "verbose"}
LONG = {
    "verbose": Argument.NONE,
    "block": Argument.REQUIRED,
    "rng": Argument.OPTIONAL,
    "initrd": Argument.REQUIRED,
    "init": Argument.NONE,
    "bridge": Argument.OPTIONAL,
}
_COLONS = {Argument.NONE: "", Argument.REQUIRED: ":", Argument.OPTIONAL: "::"}

WORDS = st.one_of(
    st.sampled_from(
        ["--", "-", "-v", "-vv", "-vx", "-x", "-=", "16", "vmlinux", "", "a=b", "two words", "--v=", "---"]
    ),
    st.builds(
        lambda name, cut, value: f"--{name[:cut]}{value}",
        st.sampled_from([*LONG, "unknown", "verbosest"]),
        st.integers(1, 10),
        st.sampled_from(["", "", "=", "=x", "=--", "=a=b"]),
    ),
)


def by_the_c_library(words: list[str]) -> tuple[list[str], list[str]] | str:
    """The options and other words, or the first complaint."""
    long = ",".join(name + _COLONS[argument] for name, argument in LONG.items())
    command = ["getopt", "--name", "lguest", "--options", "v", "--longoptions", long, "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        return done.stderr.splitlines()[0]
    split = shlex.split(done.stdout)
    at = _end_of_options(split)
    return split[:at], split[at + 1 :]


def _end_of_options(words: list[str]) -> int:
    at = 0
    while words[at] != "--":
        # getopt(1) gives every option that may have an argument one, perhaps an empty one.
        has_argument = LONG.get(words[at][2:], Argument.NONE) is not Argument.NONE
        at += 2 if has_argument else 1
    return at


def by_us(words: list[str]) -> tuple[list[str], list[str]] | str:
    try:
        options, others = getopt_long(words, SHORT, LONG)
    except OptionError as error:
        return f"lguest: {error}"
    said = []
    for name, argument in options:
        said.append("-v" if name == "verbose" else f"--{name}")
        if LONG[name] is not Argument.NONE:
            said.append(argument or "")
    return said, others


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=5))
@example(["--rng", "16", "vmlinux"])
@example(["16", "vmlinux", "--b", "disk", "--", "-v", "--"])
@example(["--block", "--"])
@example(["--block"])
@example(["--init"])
@example(["--i=x"])
@example(["--ini"])
@example(["--verbose=x"])
@example(["--verbose=", "-"])
@example(["--b=x"])
@example(["--bl=x"])
def test_options_are_what_the_c_library_makes_of_them(words: list[str]) -> None:
    theirs = by_the_c_library(words)
    ours = by_us(words)
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        theirs = ([word.replace("--verbose", "-v") for word in theirs[0]], theirs[1])
    assert ours == theirs


def test_posixly_correct_ends_options_at_the_first_other_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    words = ["-v", "16", "vmlinux", "-v", "--", "x"]
    assert by_us(words) == by_the_c_library(words) == (["-v"], ["16", "vmlinux", "-v", "--", "x"])


def test_the_word_at_fault_is_named() -> None:
    with pytest.raises(OptionError) as error:
        getopt_long(["16", "--nonsense=1"], SHORT, LONG)
    assert error.value.word == "--nonsense=1"
    assert str(error.value) == "unrecognized option '--nonsense=1'"
