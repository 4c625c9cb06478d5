"""--chroot and --username: what a worker gives up before it touches anything of the guest's.

The launcher looks at both before it starts anything (`check`), and hands them to each worker as options. A worker goes
through with them (`enter`) as soon as all that it needs is open. The launcher itself stays who it is: it has to start
the workers of the next boot, and no guest ever reaches its files.
"""

from __future__ import annotations

import errno
import os
import stat

from lgmp.errors import LgmpError

# linux/capability.h
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SYS_CHROOT = 18


class Confinement:
    """Where workers are locked in and as whom they run: `directory`, and `user` as (uid, gid, groups). Either or none.

    It is true where there is anything to do.
    """

    def __init__(self, directory: str | None = None, user: tuple[int, int, list[int]] | None = None) -> None:
        """Nothing happens yet."""
        self.directory = directory
        self.user = user

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.directory is not None or self.user is not None

    @classmethod
    def check(cls, directory: str | None, username: str | None) -> Confinement:
        """What the words of a command line come to. Raises LgmpError where workers could not go through with it."""
        if directory is not None:
            _check_directory(directory)
        return cls(directory, None if username is None else _look_up(username))

    def __str__(self) -> str:
        """For --verbose."""
        parts = []
        if self.user is not None:
            uid, gid, groups = self.user
            parts += [f"uid={uid}", f"gid={gid}", f"groups={','.join(map(str, groups))}"]
        if self.directory is not None:
            parts.append(f"chroot={self.directory}")
        return " ".join(parts)

    def options(self) -> list[str]:
        """As options for a worker."""
        options = []
        if self.directory is not None:
            options += ["--chroot", self.directory]
        if self.user is not None:
            uid, gid, groups = self.user
            options += ["--user", ":".join(map(str, (uid, gid, *groups)))]
        return options

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Confinement:
        """The reverse of `options`. Raises LgmpError where they are wrong."""
        user = options.get("user")
        if user is None:
            return cls(options.get("chroot"))
        try:
            uid, gid, *groups = (int(number) for number in user.split(":"))
        except ValueError as error:
            raise LgmpError(f"--user takes UID:GID[:GROUP...], not {user!r}") from error
        return cls(options.get("chroot"), (uid, gid, groups))

    def enter(self) -> None:
        """Go through with it, for good. Raises LgmpError where the system refuses."""
        what = ""
        try:
            if self.directory is not None:
                what = _chroot(self.directory)
                os.chroot(self.directory)
                os.chdir("/")
            if self.user is not None:
                uid, gid, groups = self.user
                what = "initgroups"
                os.setgroups(groups)
                what = "setresgid"
                os.setresgid(gid, gid, gid)
                what = "setresuid"
                os.setresuid(uid, uid, uid)
        except (OSError, OverflowError, ValueError) as error:
            raise LgmpError(f"{what} failed: {getattr(error, 'strerror', None) or error}") from error


def _chroot(directory: str) -> str:
    return f'chroot("{directory}")'


def _check_directory(directory: str) -> None:
    try:
        kind = os.stat(directory).st_mode
        if not stat.S_ISDIR(kind):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise LgmpError(
            f"{_chroot(directory)} failed: {error.strerror}; an empty directory will do for --chroot"
        ) from error
    if not _has(CAP_SYS_CHROOT):
        raise LgmpError(f"{_chroot(directory)} failed: {os.strerror(errno.EPERM)}; --chroot needs root")


def _look_up(username: str) -> tuple[int, int, list[int]]:
    import pwd  # noqa: PLC0415  this file is also a worker's, which has no use for it

    try:
        entry = pwd.getpwnam(username)
    except KeyError as error:
        raise LgmpError(
            f"getpwnam failed, incorrect username? This machine has no user {username!r}: "
            "give --username one of those in `getent passwd`"
        ) from error
    if not (_has(CAP_SETGID) and _has(CAP_SETUID)):
        raise LgmpError(f"initgroups failed: {os.strerror(errno.EPERM)}; --username needs root")
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(username, entry.pw_gid)


def _has(capability: int) -> bool:
    """Whether this process has one of root's capabilities."""
    try:
        with open("/proc/self/status") as file:
            effective = next(line for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return os.geteuid() == 0
    return bool(int(effective.split()[1], 16) >> capability & 1)
