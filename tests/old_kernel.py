"""Runs a command as if the kernel were of Linux 3.12's time: `python tests/old_kernel.py [EPERM] COMMAND...`.

A filter (seccomp(2)) answers ENOSYS to every system call that came later, for the command and all that it starts. With
EPERM it answers that, as filters of containers do to calls that they do not know; but ENOSYS to clone3, as those do
too, since no program with threads would start otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys

# The last system call of Linux 3.12, finit_module, by architecture (linux/audit.h).
LAST_CALLS = {0xC000003E: 313, 0x40000003: 350}
CLONE3 = 435

# linux/prctl.h, linux/seccomp.h
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000

# linux/bpf_common.h; the offsets are of struct seccomp_data.
LOAD_WORD, EQUAL, GREATER, RETURN = 0x20, 0x15, 0x25, 0x06
NUMBER, ARCHITECTURE = 0, 4

PREFIX = (sys.executable, "-P", __file__)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def instructions(answer: int) -> list[bytes]:
    """The filter: `answer` is the errno of what there was not."""

    def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    program = [instruction(LOAD_WORD, ARCHITECTURE)]
    for architecture, last in LAST_CALLS.items():
        program += [
            instruction(EQUAL, architecture, 0, 6),
            instruction(LOAD_WORD, NUMBER),
            instruction(GREATER, last, 1, 0),
            instruction(RETURN, SECCOMP_RET_ALLOW),
            instruction(EQUAL, CLONE3, 0, 1),
            instruction(RETURN, SECCOMP_RET_ERRNO | errno.ENOSYS),
            instruction(RETURN, SECCOMP_RET_ERRNO | answer),
        ]
    return [*program, instruction(RETURN, SECCOMP_RET_ERRNO | errno.ENOSYS)]


def enter(answer: int = errno.ENOSYS) -> None:
    """Have this process, and all that it starts, see an old kernel from now on. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    program = instructions(answer)
    code = b"".join(program)
    fprog = Program(len(program), code)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_be_entered() -> bool:
    """Whether this kernel has filters."""
    return subprocess.run([*PREFIX, "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0


def main(arguments: list[str]) -> None:
    """Exec the command under the filter."""
    answer = errno.ENOSYS
    if arguments[:1] == ["EPERM"]:
        answer = errno.EPERM
        arguments = arguments[1:]
    enter(answer)
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
