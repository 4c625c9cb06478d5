"""A few bytes of machine code that Unicorn calls where a Python function cannot be.

Some instructions must end in a fault: `in` and `out` from ring 3, sysenter and syscall from any ring, all of them in
ring 0. Unicorn calls a hook for each from the middle of a translated block and then goes on with the block, so the
fault has to be raised inside the hook, and Unicorn's way to raise one is a longjmp, which must not cross a Python
frame. Hence hooks in machine code (x86-64, the System V calling convention): they look at the CPU's privilege level
and either answer or jump to Unicorn's own raise_exception_err(env, trap, error code).

One thunk is no hook but stands in for a function of Unicorn's, to stop the CPU between blocks alone: see
`stop_between_blocks`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from lgmp.errors import LgmpError
from lgmp.hosts.embedded import abi

_RDI_ENV_FROM = {"rsi": b"\x48\x89\xf7", "rcx": b"\x48\x89\xcf", "r8": b"\x4c\x89\xc7"}


def _raise(env_register: str, trap: int, raise_exception_err: int) -> bytes:
    """mov rdi, env; mov esi, trap; xor edx, edx; mov rax, raise_exception_err; jmp rax."""
    return (
        _RDI_ENV_FROM[env_register]
        + b"\xbe"
        + struct.pack("<I", trap)
        + b"\x31\xd2\x48\xb8"
        + struct.pack("<Q", raise_exception_err)
        + b"\xff\xe0"
    )


def _port(env_register: str, load_flags: bytes, hflags_offset: int, raise_exception_err: int) -> bytes:
    """For ring 1 nothing is there: all ones are read and what is written goes nowhere. Others get #GP(0)."""
    answer = b"\xb8\xff\xff\xff\xff\xc3"  # mov eax, -1; ret
    return (
        load_flags
        + struct.pack("<I", hflags_offset)  # mov eax, [env + hflags]
        + b"\x83\xe0\x03\x83\xf8\x01\x75"  # and eax, 3; cmp eax, 1; jne over the answer
        + bytes([len(answer)])
        + answer
        + _raise(env_register, abi.TRAP_GENERAL_PROTECTION, raise_exception_err)
    )


def _not_ring_0(hflags_offset: int, raise_exception_err: int) -> bytes:
    """#GP(0) in ring 0; env in rcx."""
    return (
        b"\x8b\x81"
        + struct.pack("<I", hflags_offset)  # mov eax, [env + hflags]
        + b"\xa8\x03\x74\x01\xc3"  # test al, 3; jz over the ret; ret
        + _raise("rcx", abi.TRAP_GENERAL_PROTECTION, raise_exception_err)
    )


# All of x86_stop_interrupt(uc, exception): cmp esi, 6; sete al; ret. An invalid opcode is for the hook of its own.
STOP_INTERRUPT = b"\x83\xfe\x06\x0f\x94\xc0\xc3"
_EXCP_INTERRUPT = 0x10000  # QEMU's exec/cpu-all.h: somebody asked the CPU to leave


def _stop_between_blocks(stop_request_offset: int) -> bytes:
    """x86_stop_interrupt, but for a CPU that was asked to leave it also sets uc->stop_request; uc in rdi."""
    set_stop_request = b"\xc6\x87" + struct.pack("<I", stop_request_offset) + b"\x01"  # mov byte [rdi + offset], 1
    return (
        b"\x81\xfe"
        + struct.pack("<I", _EXCP_INTERRUPT)  # cmp esi, EXCP_INTERRUPT
        + b"\x75"
        + bytes([len(set_stop_request)])  # jne over it
        + set_stop_request
        + STOP_INTERRUPT
    )


class Thunks:
    """The hooks, in a page of their own that is executable and no longer writable once made.

    `port_in`, `port_out`, `syscall`, `sysenter` and `new_block` are addresses for uc_hook_add with the CPU's state
    (env) as user data; `read_tsc` is the address of a function without arguments that gives the host's time-stamp
    counter.

    `stop_between_blocks` is the address of what to put in place of uc->stop_interrupt, which Unicorn asks about every
    exception and every exit. uc_emu_stop sets uc->stop_request at once, in the middle of a block where another thread
    calls it; then Unicorn looks at the first hook for an instruction only, and those of the rest (it cannot be told of
    two first ones) are passed over: a syscall or sysenter would do nothing. So whoever stops the CPU asks it to leave
    (cpu_exit), and stop_request is set when it has.
    """

    def __init__(self, raise_exception_err: int, hflags_offset: int, stop_request_offset: int) -> None:
        """Write the code.

        `raise_exception_err`: the address of Unicorn's function; `hflags_offset`: bytes into env;
        `stop_request_offset`: bytes into struct uc_struct. Raises LgmpError where the system does not let it run.
        """
        pieces = {
            # uc_cb_insn_in_t(uc, port, size, env): env in rcx
            "port_in": _port("rcx", b"\x8b\x81", hflags_offset, raise_exception_err),
            # uc_cb_insn_out_t(uc, port, size, value, env): env in r8
            "port_out": _port("r8", b"\x41\x8b\x80", hflags_offset, raise_exception_err),
            # uc_cb_insn_syscall_t(uc, env): env in rsi. A 32-bit Intel CPU does not know syscall; sysenter is
            # switched off by lguest hosts (its code segment is 0), which makes it a general protection fault.
            "syscall": _raise("rsi", abi.TRAP_INVALID_OPCODE, raise_exception_err),
            "sysenter": _raise("rsi", abi.TRAP_GENERAL_PROTECTION, raise_exception_err),
            # uc_hook_edge_gen_t(uc, block, block before, env): env in rcx. Called when a block has been translated,
            # before it runs: ring 0, should a guest ever get there, does not run one instruction.
            "new_block": _not_ring_0(hflags_offset, raise_exception_err),
            "stop_between_blocks": _stop_between_blocks(stop_request_offset),
            # rdtsc; shl rdx, 32; or rax, rdx; ret
            "read_tsc": b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3",
        }
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        addresses = {}
        offset = 0
        for name, code in pieces.items():
            self._page[offset : offset + len(code)] = code
            addresses[name] = base + offset
            offset += (len(code) + 15) & ~15
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC):
            reason = os.strerror(ctypes.get_errno())
            raise LgmpError(f"this system allows no generated code, which the embedded host needs: {reason}")
        self.port_in = addresses["port_in"]
        self.port_out = addresses["port_out"]
        self.syscall = addresses["syscall"]
        self.sysenter = addresses["sysenter"]
        self.new_block = addresses["new_block"]
        self.stop_between_blocks = addresses["stop_between_blocks"]
        self.read_tsc = addresses["read_tsc"]
