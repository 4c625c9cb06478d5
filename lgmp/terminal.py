"""A terminal in raw mode, and back again, whoever of us is left to do it.

The launcher takes ISIG, ICANON and ECHO away, so that every key is the guest's, and gives them back when it ends. Where
it is killed with no chance to, the console worker does: the saved modes travel on its command line in the form that
`stty -g` prints, which stty itself takes as well.
"""

from __future__ import annotations

import os
import termios

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from typing import Any

# tcgetattr's list.
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _ISPEED, _OSPEED, _CC = range(7)
_RAW_LFLAGS = termios.ISIG | termios.ICANON | termios.ECHO


class RawTerminal:
    """The modes a terminal had before it went raw; `restore` gives them back."""

    def __init__(self, fd: int, saved: list[int]) -> None:
        """`saved`: iflag, oflag, cflag, lflag and then every control character, as `stty -g` orders them."""
        self.fd = fd
        self._saved = saved

    @classmethod
    def enter(cls, fd: int) -> RawTerminal | None:
        """Make the terminal `fd` raw: keys arrive one by one, unechoed, ^C as any other.

        None where there is nothing to do: `fd` is no terminal, or it is our controlling terminal and we are in the
        background, so that its modes are somebody else's.
        """
        if not _may_set_modes(fd):
            return None
        try:
            modes = termios.tcgetattr(fd)
            saved = [*modes[_IFLAG:_ISPEED], *(_number(character) for character in modes[_CC])]
            _make_raw(fd, modes)
        except termios.error:
            return None
        return cls(fd, saved)

    def enter_again(self) -> None:
        """Make the terminal raw once more, where somebody has restored it meanwhile; not from the background."""
        if not _may_set_modes(self.fd):
            return
        try:  # noqa: SIM105  contextlib is costly to import in a worker
            _make_raw(self.fd, termios.tcgetattr(self.fd))
        except termios.error:
            pass  # the terminal is gone

    def to_argument(self) -> str:
        """The saved modes as text, as `stty -g` prints them."""
        return ":".join(f"{number:x}" for number in self._saved)

    @classmethod
    def from_argument(cls, fd: int, text: str) -> RawTerminal:
        """The reverse of `to_argument`. Raises ValueError where `text` is not of that form."""
        saved = [int(field, 16) for field in text.split(":")]
        if len(saved) < 5 or not all(0 <= number <= 0xFFFFFFFF for number in saved):
            raise ValueError(f"not the modes of a terminal: {text[:64]!r}")
        if any(character > 0xFF for character in saved[4:]):
            raise ValueError(f"not the modes of a terminal: {text[:64]!r}")
        return cls(fd, saved)

    def restore(self, only_if_raw: bool = False) -> None:
        """Give the terminal its modes back, at once (TCSANOW). May be called at any time and any number of times.

        With `only_if_raw`, leave a terminal alone that is not raw any more: somebody else has restored it, and may
        have set modes of his own since (a shell that has seen the launcher die does). Without, leave it alone where
        we are in the background: then it is somebody else's.
        """
        if not only_if_raw and not _may_set_modes(self.fd):
            return
        try:
            modes = termios.tcgetattr(self.fd)
            if only_if_raw and modes[_LFLAG] & _RAW_LFLAGS:
                return
            modes[_IFLAG:_ISPEED] = self._saved[:4]
            modes[_CC] = [bytes((character,)) for character in self._saved[4:]]
            termios.tcsetattr(self.fd, termios.TCSANOW, modes)
        except (termios.error, TypeError):
            pass  # the terminal is gone, or never was this one


def _make_raw(fd: int, modes: list[Any]) -> None:
    """Set `modes`, made raw. Raises termios.error."""
    modes[_LFLAG] &= ~_RAW_LFLAGS
    # Where ICANON was on, these two places may mean something else (termios(3)): one byte is enough for a read.
    modes[_CC][termios.VMIN] = 1
    modes[_CC][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, modes)


def _may_set_modes(fd: int) -> bool:
    try:
        foreground = os.tcgetpgrp(fd)
    except OSError:
        # A terminal, but not our controlling one: nobody's foreground is disturbed.
        return os.isatty(fd)
    return foreground == os.getpgrp()


def _number(character: bytes | int) -> int:
    return character if isinstance(character, int) else character[0]
