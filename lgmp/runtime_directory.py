"""The user's runtime directory, in which launchers have their control sockets.

It is `$XDG_RUNTIME_DIR/lgmp`, or `/run/user/UID/lgmp`, or `/tmp/lgmp-UID` (in $TMPDIR, where that is set). It is the
user's alone: where it is a link, another's, or open to others, it is not used, since who can write there could put a
socket of his own in the place of ours.
"""

from __future__ import annotations

import contextlib
import os
import stat

from lgmp.closing import Closing
from lgmp.errors import LgmpError

_MODE = 0o700
# struct sockaddr_un: sun_path, without the NUL that ends it.
_LONGEST_ADDRESS = 107


class RuntimeDirectory(Closing):
    """An open runtime directory, found to be the user's alone."""

    def __init__(self, path: str) -> None:
        """Open what is there. Raises OSError where it cannot be, LgmpError where it is not to be trusted."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check(path, os.fstat(self._descriptor))
        except LgmpError:
            os.close(self._descriptor)
            raise

    @classmethod
    def make(cls) -> RuntimeDirectory:
        """The first of the places that can be had. Raises LgmpError, saying of each what is wrong with it."""
        wrong = []
        for path, shared in _places():
            try:
                _check_parent(os.path.dirname(path), shared)
                _make(path)
                return cls(path)
            except LgmpError as error:
                wrong.append(str(error))
            except OSError as error:
                wrong.append(f"{error.filename or path}: {error.strerror}")
        raise LgmpError("; ".join(wrong))

    @classmethod
    def existing(cls) -> list[RuntimeDirectory]:
        """Those that there are, wherever the launchers of this user may have made theirs. Each is to be closed."""
        found = []
        for path, _shared in _places():
            try:
                found.append(cls(path))
            except (OSError, LgmpError):
                continue  # no launcher of ours has a socket there
        return found

    def names(self) -> list[str]:
        """What is in it, in order. Raises OSError."""
        return sorted(os.listdir(self._descriptor))

    def join(self, name: str) -> str:
        """The path of a file in it."""
        return os.path.join(self.path, name)

    def address(self, name: str) -> str:
        """What to bind or connect a socket in it to, for as long as the directory is open."""
        path = self.join(name)
        if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
            return path
        return f"/proc/self/fd/{self._descriptor}/{name}"

    def is_socket(self, name: str) -> bool:
        """Whether there is a socket of that name."""
        try:
            return stat.S_ISSOCK(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode)
        except OSError:
            return False

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, whether or not there is one of that. Raises OSError."""
        os.rename(old, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def unlink(self, name: str) -> None:
        """Take a name away. One that is gone already is fine. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove(self) -> None:
        """Take it away unless there is something in it."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)

    def close(self) -> None:
        """Close it; what is in it stays."""
        os.close(self._descriptor)


def _places() -> list[tuple[str, bool]]:
    """Where it may be, the best first, and whether others have their places in the same directory."""
    user = os.geteuid()
    places = []
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(given):
        places.append((os.path.join(given, "lgmp"), False))
    places.append((f"/run/user/{user}/lgmp", False))
    given = os.environ.get("TMPDIR", "")
    if os.path.isabs(given):
        places.append((os.path.join(given, f"lgmp-{user}"), True))
    places.append((f"/tmp/lgmp-{user}", True))
    return list(dict.fromkeys(places))


def _check_parent(path: str, shared: bool) -> None:
    """Raise LgmpError where others could take away what is made in `path`; OSError where there is no `path`."""
    status = os.stat(path)
    if not shared and status.st_uid != os.geteuid():
        # As after su, which leaves XDG_RUNTIME_DIR as it was: what root makes there is in its owner's way.
        raise LgmpError(f"{path} is another user's")
    if shared and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise LgmpError(f"{path} is open to others: make it sticky (chmod +t)")


def _make(path: str) -> None:
    try:
        os.mkdir(path, _MODE)
    except FileExistsError:
        return
    os.chmod(path, _MODE)  # whatever the umask has left of it


def _check(path: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise LgmpError(f"{path} is another user's")
    if status.st_mode & 0o777 != _MODE:
        raise LgmpError(f"{path} has the mode {status.st_mode & 0o777:o}: chmod {_MODE:o} it, or remove it")
