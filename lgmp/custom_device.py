"""What a device of the user's own is, as a process of its own says: no code but lgmp's runs in the launcher.

That process is `python -m workers.custom --describe MODULE:CLASS,...`; what it answers is checked like anything that
comes from outside.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from typing import IO, NamedTuple

import msgpack

from lgmp.bus import MAX_IRQS
from lgmp.errors import LgmpError

# How long a class may take to say what it is, in seconds.
PATIENCE = 60.0
# The names that lgmp gives to devices of its own, with a number.
_TAKEN = ("eth", "rng")
# It is part of file names and titles, and a number follows it.
_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9_-]{0,22}[A-Za-z_-])?")
# linux/lguest_launcher.h has a byte for the type and for the length of the configuration space.
_MOST_CONFIG = 255


class Description(NamedTuple):
    """What the launcher knows of it: attributes of the class, see workers/custom.py."""

    kind: str
    device_type: int
    queue_count: int
    features: int
    config: bytes


def describe(words: str) -> Description:
    """Ask the class that `words` name (MODULE:CLASS[,KEY=VALUE...]) what it is.

    Raises LgmpError, with the remedy, for what is wrong with the words, the class or its answer.
    """
    title = words.partition(",")[0]
    command = [sys.executable, "-P", "-m", "workers.custom", "--describe", words]
    # Not through a pipe what goes to stderr: a process that the class leaves behind would keep that open.
    with tempfile.TemporaryFile() as stderr:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, timeout=PATIENCE, check=False
            )
        except subprocess.TimeoutExpired as error:
            _show(stderr)
            raise LgmpError(
                f"{title} has not said in {PATIENCE:.0f} seconds what it is: its module and __init__ must not wait, "
                "nor leave a thread behind"
            ) from error
        except (OSError, ValueError) as error:
            raise LgmpError(f"cannot ask {title} what it is: {error}") from error
        said = _unpack(done.stdout)
        if done.returncode == 0 and said is not None:
            return _check(title, said)
        _show(stderr)
    if said is not None and isinstance(said.get("error"), str):
        raise LgmpError(str(said["error"]))
    raise LgmpError(
        f"{title} has not said what it is, its process {_end(done.returncode)}: its module and __init__ are to return"
    )


def _unpack(answer: bytes) -> dict[object, object] | None:
    """The answer, None where it is none."""
    try:
        said = msgpack.unpackb(answer, unicode_errors="surrogateescape")
    except (ValueError, msgpack.UnpackException):
        return None
    return said if isinstance(said, dict) else None


def _show(stderr: IO[bytes]) -> None:
    """What the process had to say for itself, a traceback for example."""
    stderr.seek(0)
    text = stderr.read().decode(errors="replace")
    if sys.stderr is not None:
        print(text, end="", file=sys.stderr, flush=True)


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _check(title: str, said: dict[object, object]) -> Description:
    """The answer, if there is no fault in it. Raises LgmpError, which names the attribute and what it may be."""
    kind, config = said.get("kind"), said.get("config")
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise LgmpError(
            f"{title}: kind = {_shown(kind)}: it has to be a word of letters, which with a number is the device's name"
        )
    if kind in _TAKEN:
        raise LgmpError(f"{title}: kind = {kind!r}, as lgmp calls a kind of its own; give the class another")
    if not isinstance(config, bytes) or len(config) > _MOST_CONFIG:
        what = f"{config[:16]!r}..., {len(config)} bytes" if isinstance(config, bytes) else _shown(config)
        raise LgmpError(f"{title}: config = {what}: it has to be bytes, {_MOST_CONFIG} of them at most")
    return Description(
        kind,
        _number(title, said, "device_type", 1, 255),
        _number(title, said, "queue_count", 1, MAX_IRQS),
        _number(title, said, "features", 0, (1 << 64) - 1),
        config,
    )


def _number(title: str, said: dict[object, object], name: str, least: int, most: int) -> int:
    value = said.get(name)
    if type(value) is not int or not least <= value <= most:
        missing = "; give the class one" if value is None else ""
        raise LgmpError(f"{title}: {name} = {_shown(value)}: it has to be a number from {least} to {most}{missing}")
    return value


def _shown(value: object) -> str:
    """As whoever wrote the class would write it; what the process could not send, it sent so."""
    return str(value["repr"]) if isinstance(value, dict) and "repr" in value else repr(value)
