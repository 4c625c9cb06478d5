"""One emulated i386 CPU: Unicorn, with the parts of its state that its API hides.

Unicorn's API refuses a change of ring and never shows the error code of a page fault, so the CPU's state is read
and written in place, at offsets that belong to one build (the 2.1.4 x86-64 wheel on PyPI). They are proved at
start: a signature written through the API must be found there, and a known page fault must leave its known error
code. Where the proof fails, the host says so and does not start.

Guest-physical addresses are Unicorn's physical addresses. Guest memory is its first RAM block, so they are its
RAM addresses too, which `forget_code` relies on.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from lgmp.errors import LgmpError
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import library as uc
from lgmp.hosts.embedded.descriptors import Segment
from lgmp.hosts.embedded.thunks import STOP_INTERRUPT, Thunks
from lgmp.memory import PAGE_SIZE

# In struct uc_struct: the function that is asked about every exception and exit, the pointer to the CPU object, the
# flag that ends the emulation once the CPU has left, and the one that keeps exit checks out of translated blocks.
_UC_STOP_INTERRUPT = 0xE0
_UC_CPU = 0x1B8
_UC_STOP_REQUEST = 0x56D
_UC_NO_EXIT_REQUEST = 0x7F2
# In the CPU object: CPUX86State (env).
_CPU_ENV = 0x8A50

# In CPUX86State, as indices into views of 64-bit and 32-bit words.
REGS = 0  # q: eax, ecx, edx, ebx, esp, ebp, esi, edi
EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
EIP = 128 // 8  # q
EFLAGS = 136 // 8  # q; without the arithmetic flags, which are computed when asked for
HFLAGS = 176 // 4  # d
_HFLAGS_BYTES = 176
_SEGMENTS = 184
_SEGMENT_BYTES = 24
SEG_ES, SEG_CS, SEG_SS, SEG_DS = range(4)
CR2 = 440 // 8  # q
CR3 = 448 // 8  # q
_GDT_BASE = 384 // 8  # q
_GDT_LIMIT = 392 // 4  # d
ERROR_CODE = 0x1508 // 4  # d
EXCEPTION_IS_INT = 0x150C // 4  # d
OLD_EXCEPTION = 0x1578 // 4  # d
_ENV_BYTES = 0x1580

CS_SELECTOR = (_SEGMENTS + SEG_CS * _SEGMENT_BYTES) // 4  # d
SS_SELECTOR = (_SEGMENTS + SEG_SS * _SEGMENT_BYTES) // 4  # d
_ES_BASE = (_SEGMENTS + SEG_ES * _SEGMENT_BYTES + 8) // 8  # q
CS_BASE = (_SEGMENTS + SEG_CS * _SEGMENT_BYTES + 8) // 8  # q
_SS_BASE = (_SEGMENTS + SEG_SS * _SEGMENT_BYTES + 8) // 8  # q
_DS_BASE = (_SEGMENTS + SEG_DS * _SEGMENT_BYTES + 8) // 8  # q
_LIMIT_AFTER_SELECTOR = 16 // 4  # d
_FLAGS_AFTER_SELECTOR = 20 // 4  # d

# hflags: what Unicorn derives from the rest of the state (QEMU's target/i386/cpu.h).
HF_CPL_MASK = 3
_HF_CS32 = 1 << 4
_HF_SS32 = 1 << 5
_HF_ADDSEG = 1 << 6
_DESC_B_SHIFT = 22

NO_EXCEPTION = 0xFFFFFFFF

# The host's own pages: at the same physical and virtual address, above everything a guest may have.
HOST_PAGES = 16
HOST_PAGES_ADDRESS = abi.SWITCHER_ADDRESS
_PAGE_TABLE_PAGE, _GDT_PAGE, _PROOF_PAGE, _PROOF_DIRECTORY_PAGE = range(4)

# Protection on, write-protect and alignment-mask on, paging off: a guest starts with linear memory.
CR0_AT_START = 0x00050033
# OSFXSR and OSXMMEXCPT: the guest may use SSE. No PSE, no PGE, no PAE.
CR4_AT_START = 0x00000600

# The high word of a descriptor: present, 32-bit TSS, not busy.
_AVAILABLE_TASK_STATE = 0x8900

_PROOF_ADDRESS = 0x12345678


class Cpu:
    """The CPU, its guest memory mapped and its GDT empty but for the kernel's two segments.

    `q` and `d` are live views of its state in 64-bit and 32-bit words; the constants of this module are their
    indices. `gdt` is a live view of the 32 entries of its GDT in 32-bit words. `fast_stores` says whether the guest's
    stores go straight to memory (tlbshim.c).
    """

    def __init__(self, guest_memory: memoryview, guest_limit: int) -> None:
        """Make a CPU that sees the first `guest_limit` bytes of `guest_memory`.

        Raises LgmpError where Unicorn is missing, refuses, or is not the build that this module knows.
        """
        self._library, shim = uc.load()
        self._callbacks: list[object] = []
        handle = ctypes.c_void_p()
        self._check(self._library.uc_open(uc.UC_ARCH_X86, uc.UC_MODE_32, ctypes.byref(handle)), "open")
        self.handle = handle
        self.q = self.d = memoryview(b"")
        self._memory_anchor: object = None
        try:
            self._set_up(handle, guest_memory, guest_limit)
        except BaseException:
            self.close()
            raise
        # Whether tlbshim.c stands where it should, by what it counted during the proof.
        self.fast_stores = shim is not None and ctypes.c_uint64.in_dll(shim, "lgmp_tlbshim_fills").value > 0

    def _set_up(self, handle: ctypes.c_void_p, guest_memory: memoryview, guest_limit: int) -> None:
        self._set_no_exit_request()
        self._control(uc.UC_CTL_CPU_MODEL, uc.UC_CPU_X86_QEMU32)
        # With exits on and none set, no address ends the emulation by itself.
        self._control(uc.UC_CTL_UC_USE_EXITS, 1)

        # The first mapping gets RAM address 0 in Unicorn: see the module's docstring.
        self._memory_anchor = (ctypes.c_char * guest_limit).from_buffer(guest_memory)
        self._map(0, guest_limit, uc.UC_PROT_READ | uc.UC_PROT_WRITE | uc.UC_PROT_EXEC, self._memory_anchor)
        self._host_pages = mmap.mmap(-1, HOST_PAGES * PAGE_SIZE)
        self._host_anchor = (ctypes.c_char * (HOST_PAGES * PAGE_SIZE)).from_buffer(self._host_pages)
        # Read-only to the CPU: a guest that maps these pages through its own tables can change nothing in them.
        self._map(HOST_PAGES_ADDRESS, HOST_PAGES * PAGE_SIZE, uc.UC_PROT_READ | uc.UC_PROT_EXEC, self._host_anchor)
        words = memoryview(self._host_pages).cast("I")
        self.gdt = words[_GDT_PAGE * 1024 : _GDT_PAGE * 1024 + 2 * abi.GDT_ENTRIES]
        for page in range(HOST_PAGES):
            # Accessed and dirty from the start, so that the CPU never wants to write them.
            words[page + (HOST_PAGES_ADDRESS >> 12 & 1023)] = (HOST_PAGES_ADDRESS + page * PAGE_SIZE) | (
                abi.PAGE_PRESENT | abi.PAGE_ACCESSED | abi.PAGE_DIRTY
            )
        self._words = words

        cpu_object = ctypes.c_uint64.from_address(handle.value + _UC_CPU if handle.value else 0).value
        env = cpu_object + _CPU_ENV
        raw = (ctypes.c_char * _ENV_BYTES).from_address(env)
        self.q = memoryview(raw).cast("B").cast("Q")
        self.d = memoryview(raw).cast("B").cast("I")
        self._cpu_object = ctypes.c_void_p(cpu_object)
        self._word = ctypes.c_uint32()
        self._word_reference = ctypes.byref(self._word)

        self.write_register(uc.UC_X86_REG_CR0, CR0_AT_START)
        self.write_register(uc.UC_X86_REG_CR4, CR4_AT_START)
        table = uc.MemoryManagementRegister(0, HOST_PAGES_ADDRESS + _GDT_PAGE * PAGE_SIZE, 8 * abi.GDT_ENTRIES - 1, 0)
        self._check(
            self._library.uc_reg_write(handle, uc.UC_X86_REG_GDTR, ctypes.byref(table)), "set the descriptor table"
        )
        # A task state of no size: a far call to an inner ring finds no stack there, #TS; without any, Unicorn aborts.
        task = uc.MemoryManagementRegister(0, 0, 0, _AVAILABLE_TASK_STATE)
        self._check(self._library.uc_reg_write(handle, uc.UC_X86_REG_TR, ctypes.byref(task)), "set the task register")
        self._thunks = Thunks(self._function_address("raise_exception_err_x86_64"), _HFLAGS_BYTES, _UC_STOP_REQUEST)
        self._stop_between_blocks()
        for instruction, thunk in (
            (uc.UC_X86_INS_IN, self._thunks.port_in),
            (uc.UC_X86_INS_OUT, self._thunks.port_out),
            (uc.UC_X86_INS_SYSCALL, self._thunks.syscall),
            (uc.UC_X86_INS_SYSENTER, self._thunks.sysenter),
        ):
            self._add_hook(uc.UC_HOOK_INSN, thunk, env, instruction)
        self._add_hook(uc.UC_HOOK_EDGE_GENERATED, self._thunks.new_block, env)
        self.read_tsc: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(self._thunks.read_tsc)
        self._prove(env)

    # Calls that hot paths make; each is one call into the library.

    def start(self, eip: int) -> int:
        """Run from `eip` until somebody stops the CPU or an access leaves memory; gives Unicorn's error number."""
        error: int = self._library.uc_emu_start(self.handle, eip, 0, 0, 0)
        return error

    def stop(self) -> None:
        """Ask the CPU to stop between two blocks; from any thread. A `start` that begins after this does not see it."""
        self._library.cpu_exit(self._cpu_object)

    def flush_page(self, address: int) -> None:
        """Drop the translation of one virtual page."""
        self._library.tlb_flush_page_x86_64(self._cpu_object, address)

    def flush_all(self) -> None:
        """Drop all address translations."""
        self._library.tlb_flush_x86_64(self._cpu_object)

    def forget_code(self, start: int, end: int) -> None:
        """Drop what was translated from guest-physical `start` to `end` (end exclusive), for its bytes have changed."""
        self._library.tb_invalidate_phys_range_x86_64(self.handle, start, end)

    def read_eflags(self) -> int:
        """EFLAGS, with the arithmetic flags computed."""
        self._library.uc_reg_read(self.handle, uc.UC_X86_REG_EFLAGS, self._word_reference)
        return self._word.value

    def read_register(self, register: int) -> int:
        """A register through the API."""
        self._check(self._library.uc_reg_read(self.handle, register, self._word_reference), "read a register")
        return self._word.value

    def write_register(self, register: int, value: int) -> None:
        """A register through the API; CR0 and CR3 flush what they must."""
        word = ctypes.c_uint32(value)
        self._check(self._library.uc_reg_write(self.handle, register, ctypes.byref(word)), "write a register")

    def load_page_directory(self, directory: int) -> None:
        """Point CR3 at a page directory (guest-physical address) of the guest's, and turn paging on."""
        self.write_register(uc.UC_X86_REG_CR3, directory)
        cr0 = self.read_register(uc.UC_X86_REG_CR0)
        if not cr0 & abi.X86_CR0_PG:
            self.write_register(uc.UC_X86_REG_CR0, cr0 | abi.X86_CR0_PG)

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS: whether the next FPU instruction traps."""
        cr0 = self.read_register(uc.UC_X86_REG_CR0) & ~abi.X86_CR0_TS
        self.write_register(uc.UC_X86_REG_CR0, cr0 | (abi.X86_CR0_TS if on else 0))

    def set_segment(self, register: int, selector: int, segment: Segment) -> None:
        """Load a segment register without any of the checks that an instruction would make.

        Setting CS sets the privilege level to the selector's; the rest of what Unicorn derives follows.
        """
        d, q = self.d, self.q
        at = (_SEGMENTS + register * _SEGMENT_BYTES) // 4
        d[at] = selector
        q[(at + 2) // 2] = segment.base
        d[at + _LIMIT_AFTER_SELECTOR] = segment.limit
        d[at + _FLAGS_AFTER_SELECTOR] = segment.flags
        hflags = d[HFLAGS] & ~(HF_CPL_MASK | _HF_CS32 | _HF_SS32 | _HF_ADDSEG)
        hflags |= d[CS_SELECTOR] & HF_CPL_MASK
        hflags |= (d[CS_SELECTOR + _FLAGS_AFTER_SELECTOR] >> _DESC_B_SHIFT & 1) << 4
        hflags |= (d[SS_SELECTOR + _FLAGS_AFTER_SELECTOR] >> _DESC_B_SHIFT & 1) << 5
        if not hflags & _HF_CS32 or q[_DS_BASE] or q[_ES_BASE] or q[_SS_BASE]:
            hflags |= _HF_ADDSEG
        d[HFLAGS] = hflags

    def on_interrupt(self, handler: Callable[[int], None]) -> None:
        """Call `handler(vector)` for every exception and `int n`. It must not raise."""

        def callback(_uc: int, vector: int, _data: int) -> None:
            handler(vector)

        self._hook_python(uc.UC_HOOK_INTR, uc.INTERRUPT_CALLBACK(callback))

    def on_invalid_opcode(self, handler: Callable[[], None]) -> None:
        """Call `handler()` for an instruction that the CPU does not know. It must not raise."""

        def callback(_uc: int, _data: int) -> bool:
            handler()
            return True

        self._hook_python(uc.UC_HOOK_INSN_INVALID, uc.INVALID_CALLBACK(callback))

    def error_text(self, error: int) -> str:
        """Unicorn's words for an error number."""
        text: bytes = self._library.uc_strerror(error)
        return text.decode()

    def close(self) -> None:
        """Free the CPU. Nothing else may be called on it afterwards."""
        if self.handle:
            self.q.release()
            self.d.release()
            self._library.uc_close(self.handle)
            self.handle = ctypes.c_void_p()
            # So that whoever owns guest memory can unmap it.
            self._memory_anchor = None

    def _check(self, error: int, what: str) -> None:
        if error:
            raise LgmpError(f"the CPU emulator cannot {what}: {self.error_text(error)}")

    def _control(self, control: int, value: int) -> None:
        self._check(self._library.uc_ctl(self.handle, ctypes.c_int(control), ctypes.c_int(value)), "be set up")

    def _map(self, address: int, size: int, protection: int, anchor: object) -> None:
        pointer = ctypes.addressof(anchor)  # type: ignore[arg-type]
        self._check(
            self._library.uc_mem_map_ptr(self.handle, address, size, protection, pointer),
            f"map {size >> 10} KiB at {address:#x}",
        )

    def _function_address(self, name: str) -> int:
        address = ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value
        if address is None:
            raise self._unknown_build(f"{name} has no address")
        return address

    def _add_hook(self, kind: int, callback: int, user_data: int, instruction: int | None = None) -> int:
        hook = ctypes.c_size_t()
        everywhere = (ctypes.c_uint64(1), ctypes.c_uint64(0))
        variadic = () if instruction is None else (ctypes.c_int(instruction),)
        error = self._library.uc_hook_add(
            self.handle,
            ctypes.byref(hook),
            ctypes.c_int(kind),
            ctypes.c_void_p(callback),
            ctypes.c_void_p(user_data),
            *everywhere,
            *variadic,
        )
        self._check(error, "set a hook")
        return hook.value

    def _hook_python(self, kind: int, callback: ctypes._CFunctionType) -> int:
        self._callbacks.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        return self._add_hook(kind, address, 0)

    def _unknown_build(self, what: str) -> LgmpError:
        return LgmpError(
            f"this build of Unicorn is not the {uc.UNICORN_VERSION} x86-64 wheel of PyPI ({what}): "
            f"pip install --force-reinstall --only-binary :all: unicorn=={uc.UNICORN_VERSION}"
        )

    def _set_no_exit_request(self) -> None:
        """Keep exit checks out of the middle of blocks.

        Unicorn compiles a check after every memory access, and a stop taken there runs the instruction again: a
        read-modify-write happens twice. With this flag, set before anything is translated, stops fall between blocks.
        """
        code = ctypes.string_at(self._function_address("check_exit_request_x86_64"), 64)
        # cmp byte [rsi + offset], 0
        compare = b"\x80\xbe" + _UC_NO_EXIT_REQUEST.to_bytes(4, "little") + b"\x00"
        if compare not in code or not self.handle.value:
            raise self._unknown_build("no_exit_request is not where it was")
        ctypes.c_uint8.from_address(self.handle.value + _UC_NO_EXIT_REQUEST).value = 1

    def _stop_between_blocks(self) -> None:
        """Have the emulation end when the CPU has left its blocks, as thunks.py says."""
        stop = ctypes.string_at(self._function_address("uc_emu_stop"), 64)
        execute = ctypes.string_at(self._function_address("cpu_exec_x86_64"), 256)
        # mov byte [rdi + offset], 1; mov rax, [rbp + offset]; test rax, rax
        sets_stop_request = b"\xc6\x87" + _UC_STOP_REQUEST.to_bytes(4, "little") + b"\x01"
        takes_stop_interrupt = b"\x48\x8b\x85" + _UC_STOP_INTERRUPT.to_bytes(4, "little") + b"\x48\x85\xc0"
        if sets_stop_request not in stop or takes_stop_interrupt not in execute or not self.handle.value:
            raise self._unknown_build("stop_request and stop_interrupt are not where they were")
        stop_interrupt = ctypes.c_uint64.from_address(self.handle.value + _UC_STOP_INTERRUPT)
        if ctypes.string_at(stop_interrupt.value, len(STOP_INTERRUPT)) != STOP_INTERRUPT:
            raise self._unknown_build("stop_interrupt does not do what it did")
        stop_interrupt.value = self._thunks.stop_between_blocks

    def _prove(self, env: int) -> None:
        """Show that the state is where this module thinks it is, or raise LgmpError."""
        q, d = self.q, self.d
        # What the API writes must be found raw.
        for number, register in enumerate((uc.UC_X86_REG_EAX, uc.UC_X86_REG_ESP)):
            signature = 0x51C0DE00 + number
            self.write_register(register, signature)
            if q[(EAX, ESP)[number]] != signature:
                raise self._unknown_build("the registers are not where they were")
        if q[_GDT_BASE] != HOST_PAGES_ADDRESS + _GDT_PAGE * PAGE_SIZE or d[_GDT_LIMIT] != 8 * abi.GDT_ENTRIES - 1:
            raise self._unknown_build("the descriptor table register is not where it was")
        # What is written raw must be found by the API, and a page fault must leave what it should.
        code = HOST_PAGES_ADDRESS + _PROOF_PAGE * PAGE_SIZE
        directory = HOST_PAGES_ADDRESS + _PROOF_DIRECTORY_PAGE * PAGE_SIZE
        # mov [_PROOF_ADDRESS], eax
        self._host_pages[_PROOF_PAGE * PAGE_SIZE : _PROOF_PAGE * PAGE_SIZE + 5] = b"\xa3" + _PROOF_ADDRESS.to_bytes(
            4, "little"
        )
        self._words[_PROOF_DIRECTORY_PAGE * 1024 + abi.SWITCHER_PGD_INDEX] = self.switcher_entry
        flat = Segment(0, 0xFFFFFFFF, 0x00CFBB00)
        self.set_segment(SEG_CS, abi.KERNEL_CS | abi.GUEST_PL, flat)
        self.set_segment(SEG_SS, abi.KERNEL_DS | abi.GUEST_PL, flat._replace(flags=0x00CFB300))
        if self.read_register(uc.UC_X86_REG_SS) & 0xFFFF != abi.KERNEL_DS | abi.GUEST_PL:
            raise self._unknown_build("the segments are not where they were")
        seen: list[tuple[int, int, int, int, int, int]] = []

        def fault(_uc: int, vector: int, _data: int) -> None:
            seen.append((vector, d[ERROR_CODE], q[CR2], q[EIP], d[EXCEPTION_IS_INT], d[OLD_EXCEPTION]))
            self.stop()

        callback = uc.INTERRUPT_CALLBACK(fault)
        hook = self._hook_python(uc.UC_HOOK_INTR, callback)
        self.load_page_directory(directory)
        self.start(code)
        write_not_present = 2
        page_fault = abi.TRAP_PAGE_FAULT
        if seen != [(page_fault, write_not_present, _PROOF_ADDRESS, code, 0, page_fault)] or q[CR3] != directory:
            raise self._unknown_build(f"a page fault left {seen}")
        self._check(self._library.uc_hook_del(self.handle, ctypes.c_size_t(hook)), "take a hook away")
        self._callbacks.remove(callback)
        d[OLD_EXCEPTION] = NO_EXCEPTION
        self.write_register(uc.UC_X86_REG_CR0, CR0_AT_START)
        self.write_register(uc.UC_X86_REG_CR3, 0)
        self._words[_PROOF_DIRECTORY_PAGE * 1024 + abi.SWITCHER_PGD_INDEX] = 0
        assert env

    @property
    def switcher_entry(self) -> int:
        """What the last entry of every page directory must hold: the page table of the host's own pages."""
        return (HOST_PAGES_ADDRESS + _PAGE_TABLE_PAGE * PAGE_SIZE) | (
            abi.PAGE_PRESENT | abi.PAGE_ACCESSED | abi.PAGE_DIRTY
        )
