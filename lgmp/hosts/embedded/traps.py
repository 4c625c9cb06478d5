"""Traps and interrupts: entering the guest kernel's handlers.

The CPU's own IDT is never used. Every trap comes to the host, which builds the frame that a handler expects on
the ring-1 stack and sends the CPU there, as lg does for the traps it reflects.
"""

from __future__ import annotations

import time

from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded.cpu import Cpu
from lgmp.hosts.embedded.descriptors import Gate
from lgmp.hosts.embedded.paging import guest_physical
from lgmp.hosts.embedded.state import DescriptorTable, GuestKilled, GuestState

# Cleared on the way into a handler (Intel SDM volume 3, section 6.12.1.3).
_CLEARED_EFLAGS = abi.X86_EFLAGS_TF | abi.X86_EFLAGS_VM | abi.X86_EFLAGS_RF | abi.X86_EFLAGS_NT
_ONE_BYTE_OPCODES = {abi.TRAP_INT3: 0xCC, abi.TRAP_OVERFLOW: 0xCE}
_INT_OPCODE_BYTES = 2
_IN_GATE = 2  # the IDT flag of an error code that names a gate


class Traps:
    """Delivers traps and interrupts to one guest."""

    def __init__(self, cpu: Cpu, guest: GuestState, table: DescriptorTable) -> None:
        """Work on this CPU and guest; `table`: its GDT."""
        self._cpu = cpu
        self._guest = guest
        self._table = table

    def fault(self, vector: int) -> None:
        """An exception of the CPU, with EIP at what caused it. Raises GuestKilled where it cannot be delivered."""
        d = self._cpu.d
        error_code = d[c.ERROR_CODE]
        if vector == abi.TRAP_PAGE_FAULT:
            guest = self._guest
            if guest.data is not None:
                guest.words[(guest.data + abi.DATA_CR2) >> 2] = self._cpu.q[c.CR2] & 0xFFFFFFFF
        elif vector == abi.TRAP_GENERAL_PROTECTION and error_code == 0:
            ring = d[c.HFLAGS] & c.HF_CPL_MASK
            if ring == 0:
                # Segment descriptors are read through the guest's own page tables, so it can forge them.
                raise GuestKilled(f"the guest gave itself ring 0 at {self._cpu.q[c.EIP]:#x}")
            if ring == abi.GUEST_PL and self._skip_cli():
                return
        self._deliver_trap(vector, error_code)

    def rewrite_vmcall(self) -> bool:
        """Make `int $0x1f` of the `vmcall` at EIP in ring 1, in the guest's memory, and say whether there was one.

        As lg did: the page may be read-only to the guest, and what stands there is run again from its start.
        """
        if not self.at_vmcall():
            return False
        q = self._cpu.q
        for number, byte in enumerate(abi.VMCALL_REWRITTEN):
            at = self._physical((q[c.EIP] + q[c.CS_BASE] + number) & 0xFFFFFFFF)
            self._guest.memory[at] = byte
            self._cpu.forget_code(at, at + 1)
        return True

    def at_vmcall(self) -> bool:
        """Whether EIP is at a `vmcall`, in ring 1."""
        cpu = self._cpu
        if cpu.d[c.HFLAGS] & c.HF_CPL_MASK != abi.GUEST_PL:
            return False
        eip = cpu.q[c.EIP]
        return all(self._code_at(eip + number) == byte for number, byte in enumerate(abi.VMCALL))

    def software_interrupt(self, vector: int) -> None:
        """`int vector` (int3 and into too), with EIP past it. Raises GuestKilled where nothing can be delivered."""
        q, d = self._cpu.q, self._cpu.d
        gate = self._guest.gates[vector]
        # lg fills the gates that a guest left empty with its own, of privilege 0.
        privilege = gate.privilege if gate else 0
        if privilege < d[c.HFLAGS] & c.HF_CPL_MASK:
            # Traps 3 and 4 have an instruction of one byte besides `int`, whose last byte is the vector.
            one_byte = vector in _ONE_BYTE_OPCODES and self._code_at(q[c.EIP] - 1) == _ONE_BYTE_OPCODES[vector]
            q[c.EIP] = (q[c.EIP] - (1 if one_byte else _INT_OPCODE_BYTES)) & 0xFFFFFFFF
            self._deliver_trap(abi.TRAP_GENERAL_PROTECTION, vector * 8 + _IN_GATE)
            return
        if gate is None:
            raise GuestKilled(f"unhandled trap {vector} at {q[c.EIP]:#x} ({0:#x})")
        self._enter(gate, None)

    def deliver_interrupt(self) -> None:
        """Deliver the first interrupt that is pending and not blocked, if the guest can take one now.

        What cannot be delivered stays pending. Wakes a halted guest.
        """
        guest = self._guest
        data = guest.data
        if data is None:
            return
        words = guest.words
        ready = guest.pending & ~words[(data + abi.DATA_BLOCKED_INTERRUPTS) >> 2]
        if not ready:
            return
        if guest.noirq_start <= self._cpu.q[c.EIP] < guest.noirq_end:
            return
        if guest.halted:
            words[(data + abi.DATA_IRQ_ENABLED) >> 2] = abi.X86_EFLAGS_IF
            guest.halted = False
        elif not words[(data + abi.DATA_IRQ_ENABLED) >> 2]:
            if guest.irq_pending is not None:
                words[guest.irq_pending] = abi.X86_EFLAGS_IF
            return
        lowest = ready & -ready
        gate = guest.gates[abi.FIRST_EXTERNAL_VECTOR + lowest.bit_length() - 1]
        # Without a handler (yet) it stays pending, as with lg.
        if gate is not None:
            guest.pending &= ~lowest
            self._enter(gate, None)
        write_time(guest)
        if ready == lowest and guest.irq_pending is not None:
            words[guest.irq_pending] = 0

    def _deliver_trap(self, vector: int, error_code: int) -> None:
        gate = self._guest.gates[vector]
        if gate is None:
            q = self._cpu.q
            detail = q[c.CR2] & 0xFFFFFFFF if vector == abi.TRAP_PAGE_FAULT else error_code
            raise GuestKilled(f"unhandled trap {vector} at {q[c.EIP]:#x} ({detail:#x})")
        self._enter(gate, error_code if vector in abi.TRAPS_WITH_ERROR_CODE else None)

    def _enter(self, gate: Gate, error_code: int | None) -> None:
        """Push the frame that a handler expects and go to the handler."""
        cpu, guest = self._cpu, self._guest
        q, d, words = cpu.q, cpu.d, guest.words
        eflags = cpu.read_eflags() | abi.X86_EFLAGS_IF
        # The real flag is always on; what the guest thinks of it is in lguest_data.
        if guest.data is not None and not words[(guest.data + abi.DATA_IRQ_ENABLED) >> 2] & abi.X86_EFLAGS_IF:
            eflags &= ~abi.X86_EFLAGS_IF
        if eflags & abi.X86_EFLAGS_VM:
            eflags = self._leave_virtual_8086(eflags)
        # Where the end of a segment is the end of 4 GiB, Unicorn counts on past it.
        frame = [q[c.EIP] & 0xFFFFFFFF, d[c.CS_SELECTOR], eflags]
        if error_code is not None:
            frame.insert(0, error_code)
        if d[c.SS_SELECTOR] & 3 == abi.GUEST_PL:
            top = q[c.ESP]
        else:
            top = guest.esp1
            frame += (q[c.ESP] & 0xFFFFFFFF, d[c.SS_SELECTOR])
            stack = self._table.segments[guest.ss1 >> 3 & 31]
            if not stack.usable_stack:
                raise GuestKilled(f"unhandled trap {abi.TRAP_IN_SWITCHER} at {q[c.EIP]:#x} ({guest.ss1:#x})")
            cpu.set_segment(c.SEG_SS, guest.ss1, stack)
        code = self._table.segments[abi.GDT_ENTRY_KERNEL_CS]
        if not code.usable_code:
            raise GuestKilled(f"unhandled trap {abi.TRAP_IN_SWITCHER} at {q[c.EIP]:#x} ({abi.KERNEL_CS:#x})")
        bottom = (top - 4 * len(frame)) & 0xFFFFFFFF
        self._push(bottom, frame)
        q[c.ESP] = bottom
        cpu.set_segment(c.SEG_CS, abi.KERNEL_CS | abi.GUEST_PL, code)
        q[c.EIP] = gate.handler
        q[c.EFLAGS] &= ~_CLEARED_EFLAGS
        if gate.disables_interrupts and guest.data is not None:
            words[(guest.data + abi.DATA_IRQ_ENABLED) >> 2] = 0

    def _push(self, bottom: int, frame: list[int]) -> None:
        """Write the words of a frame, lowest address first, at the guest-virtual address `bottom`."""
        guest = self._guest
        if not bottom & 3 and (bottom & 0xFFF) <= 0x1000 - 4 * len(frame):
            at = self._physical(bottom) >> 2
            for word in frame:
                guest.words[at] = word
                at += 1
            return
        # Odd or across pages: no kernel does that, but it is allowed.
        for number, byte in enumerate(b"".join(word.to_bytes(4, "little") for word in frame)):
            guest.memory[self._physical((bottom + number) & 0xFFFFFFFF)] = byte

    def _physical(self, address: int) -> int:
        guest = self._guest
        if guest.paging:
            return guest_physical(guest.words, guest.directory, address, guest.pfn_limit)
        if address >= guest.limit:
            raise GuestKilled(f"Bad address {address:#x}")
        return address

    def _leave_virtual_8086(self, eflags: int) -> int:
        """Make ring-3 code of what ran in virtual-8086 mode; gives the EFLAGS to push.

        A CPU enters that mode from ring 0 alone, so a guest of lguest's never does; Unicorn lets `iret` of any ring
        do it. There the selectors and the I/O privilege are what the code says they are: a selector that looks like
        ring 1 would have the frame pushed wherever it likes.
        """
        q, d = self._cpu.q, self._cpu.d
        d[c.CS_SELECTOR] |= 3
        d[c.SS_SELECTOR] |= 3
        q[c.EFLAGS] &= ~abi.X86_EFLAGS_IOPL
        return eflags & ~(abi.X86_EFLAGS_VM | abi.X86_EFLAGS_IOPL)

    def _skip_cli(self) -> bool:
        """Skip a `cli` of the guest kernel's, as lg does: some of its early code is not paravirtualised."""
        cli = 0xFA
        q = self._cpu.q
        if self._code_at(q[c.EIP]) != cli:
            return False
        q[c.EIP] += 1
        return True

    def _code_at(self, eip: int) -> int | None:
        """The byte of code at `eip`; None where the guest runs from a page that is not its own."""
        try:
            return self._guest.memory[self._physical((eip + self._cpu.q[c.CS_BASE]) & 0xFFFFFFFF)]
        except GuestKilled:
            return None


def write_time(guest: GuestState) -> None:
    """Tell the guest the wall-clock time, in lguest_data.time."""
    assert guest.data is not None
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    at = (guest.data + abi.DATA_TIME) >> 2
    guest.words[at] = seconds & 0xFFFFFFFF
    guest.words[at + 1] = nanoseconds
