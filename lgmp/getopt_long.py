"""Command lines by the rules of GNU getopt_long(3).

Python's getopt.gnu_getopt has most of them, but no options whose argument may be left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import Enum


class Argument(Enum):
    """Whether an option has an argument. An optional one is only ever what follows "=" in the same word."""

    NONE = 0
    REQUIRED = 1
    OPTIONAL = 2


class OptionError(Exception):
    """The command line is wrong; the message is the C library's, `word` the word that is at fault."""

    def __init__(self, message: str, word: str) -> None:
        """Describe it."""
        super().__init__(message)
        self.word = word


def getopt_long(
    words: Sequence[str], short: Mapping[str, str], long: Mapping[str, Argument]
) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Split a command line into its options, as (long name, argument) in their order, and its other words.

    `short` gives the long names of letters, of options without argument; `long` all options. Options may stand behind
    other words (unless POSIXLY_CORRECT is in the environment) and their names may be cut short where they stay
    unambiguous; nothing after "--" is an option. Raises OptionError.
    """
    options: list[tuple[str, str | None]] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return options, others + rest
        if word.startswith("--"):
            options.append(_long_option(word, rest, long))
        elif word.startswith("-") and word != "-":
            for letter in word[1:]:
                if letter not in short:
                    raise OptionError(f"invalid option -- '{letter}'", word)
                options.append((short[letter], None))
        elif "POSIXLY_CORRECT" in os.environ:
            return options, [word, *rest]
        else:
            others.append(word)
    return options, others


def _long_option(word: str, rest: list[str], long: Mapping[str, Argument]) -> tuple[str, str | None]:
    """The option that `word` is; its argument may be the first of `rest`, which is then taken away."""
    given, equals, text = word[2:].partition("=")
    name = _complete(given, word, long)
    argument = text if equals else None
    if long[name] is Argument.NONE and equals:
        raise OptionError(f"option '--{name}' doesn't allow an argument", word)
    if long[name] is Argument.REQUIRED and not equals:
        if not rest:
            raise OptionError(f"option '--{name}' requires an argument", word)
        argument = rest.pop(0)
    return name, argument


def _complete(given: str, word: str, long: Mapping[str, Argument]) -> str:
    if given in long:
        return given
    names = [name for name in long if name.startswith(given)]
    if not names:
        raise OptionError(f"unrecognized option '{word}'", word)
    if len(names) > 1:
        possibilities = " ".join(f"'--{name}'" for name in names)
        raise OptionError(f"option '{word}' is ambiguous; possibilities: {possibilities}", word)
    return names[0]
