"""What lgmp says when it cannot go on: one clear line that names the remedy."""

from __future__ import annotations

import os

# What each line begins with: the command that the user gave, "lgmp" or "lguest". Workers are told by --program.
program = "lgmp"


class LgmpError(Exception):
    """A condition the user can understand and mend.

    The command line prints it as one line, `<program>: <message>`, and exits with 1; it never becomes a
    traceback. The message therefore says what is wrong and, where there is one, what to do about it.
    """


def say(text: str) -> None:
    """One line to the user on stderr, with nothing in it that a terminal would obey. Never raises."""
    line = "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
    try:  # noqa: SIM105  contextlib is costly to import in a worker
        # Not through sys.stderr, which buffers: what failed here would fail again at exit.
        os.write(2, f"{program}: {line}\n".encode(errors="backslashreplace"))
    except OSError:
        pass  # stderr may be gone
