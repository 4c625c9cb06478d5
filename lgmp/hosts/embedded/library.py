"""The Unicorn library, through ctypes.

The official Python binding imports slowly and costs two microseconds a register access; the host makes a
handful of calls on hot paths, so it declares just those. It uses the library that the binding's package ships.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from pathlib import Path

from lgmp.errors import LgmpError

# The one release whose CPU state layout cpu.py knows.
UNICORN_VERSION = "2.1.4"

# unicorn/unicorn.h
UC_ERR_OK = 0
UC_ERR_READ_UNMAPPED = 6
UC_ERR_WRITE_UNMAPPED = 7
UC_ERR_FETCH_UNMAPPED = 8
UC_ERR_WRITE_PROT = 12
UC_ERR_READ_PROT = 13
UC_ERR_FETCH_PROT = 14
UC_ARCH_X86 = 4
UC_MODE_32 = 1 << 2
UC_PROT_READ = 1
UC_PROT_WRITE = 2
UC_PROT_EXEC = 4
UC_HOOK_INTR = 1 << 0
UC_HOOK_INSN = 1 << 1
UC_HOOK_INSN_INVALID = 1 << 14
UC_HOOK_EDGE_GENERATED = 1 << 15
_UC_CTL_IO_WRITE = 1 << 30
UC_CTL_UC_USE_EXITS = _UC_CTL_IO_WRITE | (1 << 26) | 4
UC_CTL_CPU_MODEL = _UC_CTL_IO_WRITE | (1 << 26) | 7

# unicorn/x86.h
UC_CPU_X86_QEMU32 = 4
UC_X86_REG_EAX = 19
UC_X86_REG_CS = 11
UC_X86_REG_EFLAGS = 25
UC_X86_REG_EIP = 26
UC_X86_REG_ESP = 30
UC_X86_REG_SS = 49
UC_X86_REG_CR0 = 50
UC_X86_REG_CR2 = 52
UC_X86_REG_CR3 = 53
UC_X86_REG_CR4 = 54
UC_X86_REG_GDTR = 243
UC_X86_REG_TR = 245
UC_X86_INS_IN = 218
UC_X86_INS_OUT = 500
UC_X86_INS_SYSCALL = 699
UC_X86_INS_SYSENTER = 700

INTERRUPT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
INVALID_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)


class MemoryManagementRegister(ctypes.Structure):
    """`uc_x86_mmr`: how GDTR and TR are read and written."""

    _fields_ = (
        ("selector", ctypes.c_uint16),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


def library_path() -> Path:
    """Where the installed Unicorn package has its library. Raises LgmpError where there is none that could be used."""
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise LgmpError(
            f"the embedded host needs a 64-bit Python on x86-64, not {8 * ctypes.sizeof(ctypes.c_void_p)} bits on "
            f"{platform.machine()}; --host kernel does not, where there is a /dev/lguest"
        )
    spec = importlib.util.find_spec("unicorn")
    if spec is None:
        raise LgmpError(f"the embedded host needs the CPU emulator Unicorn: pip install unicorn=={UNICORN_VERSION}")
    for place in spec.submodule_search_locations or ():
        for candidate in sorted(Path(place, "lib").glob("libunicorn.so*")):
            return candidate
    raise LgmpError(f"the unicorn package has no library: pip install --force-reinstall unicorn=={UNICORN_VERSION}")


def version_of(library: ctypes.CDLL) -> str:
    """The library's own word for its version."""
    packed: int = library.uc_version(None, None)
    return f"{packed >> 24}.{packed >> 16 & 0xFF}.{packed >> 8 & 0xFF}"


# What tlbshim.c stands in front of or calls, in the order in which lgmp_tlbshim_bind takes it.
_TLBSHIM_FUNCTIONS = (
    "x86_cpu_tlb_fill_x86_64",
    "tlb_set_page_with_attrs_x86_64",
    "tlb_set_dirty_x86_64",
    "tb_invalidate_phys_page_fast_x86_64",
    "tlb_protect_code_x86_64",
    "tb_invalidate_phys_range_x86_64",
    "tlb_reset_dirty_x86_64",
    "qemu_map_ram_ptr_x86_64",
)


def load_tlbshim() -> ctypes.CDLL | None:
    """The functions that make stores fast (tlbshim.c), to be loaded before the library so that the linker prefers them.

    None where they cannot be used, or LGMP_TLBSHIM=off is in the environment: the guest runs all the same, two to six
    times slower.
    """
    if os.environ.get("LGMP_TLBSHIM") == "off":
        return None
    try:
        return ctypes.CDLL(str(Path(__file__).with_name("tlbshim.so")), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None


def bind_tlbshim(shim: ctypes.CDLL, library: ctypes.CDLL) -> None:
    """Give the shim the library's own functions. Nothing else of the library may be called before."""
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _TLBSHIM_FUNCTIONS]
    shim.lgmp_tlbshim_bind((ctypes.c_void_p * len(addresses))(*addresses))


def load() -> tuple[ctypes.CDLL, ctypes.CDLL | None]:
    """The library, with the prototypes of what the host calls, and the shim, if it can be used.

    Raises LgmpError where the library cannot be loaded.
    """
    path = library_path()
    shim = load_tlbshim()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LgmpError(f"cannot load {path}: {error}") from error
    try:
        library.uc_version.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        library.uc_version.restype = ctypes.c_uint
    except AttributeError as error:
        raise LgmpError(f"{path} is not the Unicorn {UNICORN_VERSION} of PyPI: {error}") from error
    version = version_of(library)
    if version != UNICORN_VERSION:
        raise LgmpError(
            f"the embedded host knows Unicorn {UNICORN_VERSION}, not {version}: pip install unicorn=={UNICORN_VERSION}"
        )
    pointer, word, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
    prototypes: dict[str, tuple[object, ...]] = {
        "uc_open": (ctypes.c_int, ctypes.c_int, ctypes.POINTER(pointer)),
        "uc_close": (pointer,),
        "uc_emu_start": (pointer, word, word, word, size),
        "uc_mem_map_ptr": (pointer, word, size, ctypes.c_uint32, pointer),
        "uc_reg_read": (pointer, ctypes.c_int, pointer),
        "uc_reg_write": (pointer, ctypes.c_int, pointer),
    }
    try:
        for name, arguments in prototypes.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
        library.uc_strerror.argtypes = (ctypes.c_int,)
        library.uc_strerror.restype = ctypes.c_char_p
        # Internals that the library exports, for what its API has no call.
        library.tlb_flush_x86_64.argtypes = (pointer,)
        library.tlb_flush_x86_64.restype = None
        library.tlb_flush_page_x86_64.argtypes = (pointer, word)
        library.tlb_flush_page_x86_64.restype = None
        library.tb_invalidate_phys_range_x86_64.argtypes = (pointer, word, word)
        library.tb_invalidate_phys_range_x86_64.restype = None
        library.cpu_exit.argtypes = (pointer,)
        library.cpu_exit.restype = None
        library.uc_emu_stop.argtypes = (pointer,)
        library.cpu_exec_x86_64.argtypes = (pointer, pointer)
        library.raise_exception_err_x86_64.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
        library.check_exit_request_x86_64.argtypes = (pointer,)
        if shim is not None:
            bind_tlbshim(shim, library)
    except AttributeError as error:
        raise LgmpError(f"{path} is not the Unicorn {UNICORN_VERSION} of PyPI: {error}") from error
    return library, shim
