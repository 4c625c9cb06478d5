"""The embedded host: the lg module's work in user space, on an emulated CPU.

The loop is lg's own: go on with a hypercall that waits, deliver an interrupt, sleep if the guest is halted, run.
Traps and hypercalls are handled in a callback while the CPU is between two blocks of guest code; the CPU is
stopped only for what `run` has to return, for a halt, and when the kicker says that it is time to look around.
"""

from __future__ import annotations

import queue
import time

from lgmp.errors import LgmpError
from lgmp.hosts import Break, Died, Event
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded.clock import TscClock
from lgmp.hosts.embedded.cpu import Cpu
from lgmp.hosts.embedded.hypercalls import Hypercalls
from lgmp.hosts.embedded.library import (
    UC_ERR_FETCH_UNMAPPED,
    UC_ERR_OK,
    UC_ERR_READ_UNMAPPED,
    UC_ERR_WRITE_PROT,
    UC_ERR_WRITE_UNMAPPED,
)
from lgmp.hosts.embedded.state import DescriptorTable, GuestKilled, GuestState
from lgmp.hosts.embedded.timer import Kicker
from lgmp.hosts.embedded.traps import Traps
from lgmp.memory import GuestMemory

_OUTSIDE = {
    UC_ERR_READ_UNMAPPED: "read",
    UC_ERR_WRITE_UNMAPPED: "written",
    UC_ERR_FETCH_UNMAPPED: "run from",
    UC_ERR_WRITE_PROT: "written, which only the host may,",
}
_BREAK = Break()


class EmbeddedHost:
    """Runs one guest on Unicorn; it fulfils the contract `lgmp.hosts.Host`."""

    # Interrupts are delivered, and NO_INTERRUPT looked at, where the guest stands still: it has no memory barriers.
    irq_from_any_thread = False

    def __init__(
        self,
        memory: GuestMemory,
        guest_limit: int,
        entry: int,
        guest_abi: abi.GuestAbi = abi.LATEST,
        page_directory: int | None = None,
    ) -> None:
        """A guest that starts at guest-physical `entry` and sees the first `guest_limit` bytes of `memory`.

        `guest_abi`: how it speaks with its host; `page_directory`: the guest-physical address of its first page
        tables, where it starts with paging on. boot_params lies at 0 already. Raises LgmpError where the emulator
        cannot be used.
        """
        self._cpu = Cpu(memory.view, guest_limit)
        self._guest = GuestState(memory.view, guest_limit)
        self._table = DescriptorTable(self._cpu.gdt)
        self._traps = Traps(self._cpu, self._guest, self._table)
        self._clock = TscClock(self._cpu.read_tsc)
        self._hypercalls = Hypercalls(
            self._cpu, self._guest, self._table, guest_abi, set_timer=self._set_timer, tsc_khz=self._clock.khz
        )
        self._rewrites_vmcall = guest_abi.vmcall
        # When interrupt 0 is due, in nanoseconds of the monotonic clock; 0 for never.
        self._deadline = 0
        self._running = False
        self._break = False
        self._failure: BaseException | None = None
        # What wakes a halted guest's thread; what is put there does not matter.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._set_registers(entry)
        if page_directory is not None:
            self._hypercalls.use_page_tables(page_directory)
        self._cpu.on_interrupt(self._interrupted)
        self._cpu.on_invalid_opcode(self._invalid_opcode)
        try:
            self._kicker = Kicker(self._kick)
        except LgmpError:
            self._cpu.close()
            raise

    def run(self) -> Event:
        """Run the guest until something happens; only from the thread that made the host."""
        guest = self._guest
        # From here on a break stops the CPU or finds its flag read below.
        self._running = True
        try:
            while True:
                if guest.event is None:
                    self._hypercalls.resume()
                if guest.event is not None:
                    event = guest.event
                    # Death is final; whoever runs a dead guest again hears of it again.
                    if not isinstance(event, Died):
                        guest.event = None
                    return event
                if self._break:
                    self._break = False
                    return _BREAK
                self._expire_timer()
                self._traps.deliver_interrupt()
                if guest.halted:
                    self._sleep()
                    continue
                self._set_kicker()
                self._run_cpu()
        except GuestKilled as killed:
            guest.event = Died(str(killed))
            return guest.event
        finally:
            self._running = False

    def irq(self, number: int) -> None:
        """Make an interrupt pending; only from the thread that runs the guest."""
        if not 0 < number < abi.LGUEST_IRQS:
            raise ValueError(f"interrupt {number} is not one of 1..{abi.LGUEST_IRQS - 1}")
        self._guest.pending |= 1 << number

    def kicks_to(self, address: int, eventfd: int) -> bool:  # noqa: ARG002
        """Kicks go through the launcher: it is in the guest's thread already, and a message is cheaper for a worker."""
        return False

    def break_in(self) -> None:
        """Make `run` return Break; from any thread."""
        self._break = True
        if self._running:
            self._wake.put(None)
            self._cpu.stop()
            self._kicker.soon()

    def close(self) -> None:
        """Give the CPU back. The guest cannot be run after that."""
        self._kicker.close()
        self._cpu.close()
        self._guest.close()

    def _set_registers(self, entry: int) -> None:
        """What lguest guests start with: flat ring-1 segments, everything else 0 (boot_params is at 0)."""
        cpu = self._cpu
        for register in range(8):
            cpu.q[c.REGS + register] = 0
        data = self._table.segments[abi.GDT_ENTRY_KERNEL_DS]
        for segment in (c.SEG_ES, c.SEG_SS, c.SEG_DS):
            cpu.set_segment(segment, abi.KERNEL_DS | abi.GUEST_PL, data)
        cpu.set_segment(c.SEG_CS, abi.KERNEL_CS | abi.GUEST_PL, self._table.segments[abi.GDT_ENTRY_KERNEL_CS])
        cpu.q[c.EFLAGS] = abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF
        cpu.q[c.EIP] = entry

    def _run_cpu(self) -> None:
        cpu = self._cpu
        error = cpu.start(cpu.q[c.EIP] & 0xFFFFFFFF)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if not cpu.d[c.HFLAGS] & c.HF_CPL_MASK:
            raise GuestKilled(f"the guest gave itself ring 0 at {cpu.q[c.EIP]:#x}")
        if error != UC_ERR_OK:
            at = f"at {cpu.q[c.EIP]:#x}"
            if error in _OUTSIDE:
                raise GuestKilled(f"bad page table entry: memory outside the guest was {_OUTSIDE[error]} {at}")
            raise LgmpError(f"the CPU emulator gave up {at}: {cpu.error_text(error)}")

    def _interrupted(self, vector: int) -> None:
        """Unicorn's callback for exceptions and `int n`; what is raised here is kept for `_run_cpu`."""
        d = self._cpu.d
        # Unicorn never clears this; left alone it makes a double fault of the next fault.
        d[c.OLD_EXCEPTION] = c.NO_EXCEPTION
        guest = self._guest
        try:
            if d[c.EXCEPTION_IS_INT]:
                if vector == abi.LGUEST_TRAP_ENTRY and d[c.HFLAGS] & c.HF_CPL_MASK == abi.GUEST_PL:
                    self._hypercalls.from_registers()
                    if guest.pending and guest.event is None and not guest.halted:
                        self._traps.deliver_interrupt()
                    if guest.event is not None or guest.halted:
                        self._cpu.stop()
                else:
                    self._traps.software_interrupt(vector)
            else:
                self._traps.fault(vector)
        except BaseException as failure:  # it must not cross Unicorn's frames
            self._failure = failure
            self._cpu.stop()

    def _invalid_opcode(self) -> None:
        try:
            if self._rewrites_vmcall and self._traps.rewrite_vmcall():
                return
            if self._guest.data is None and self._traps.at_vmcall():
                self._hypercalls.check_era()
            self._traps.fault(abi.TRAP_INVALID_OPCODE)
        except BaseException as failure:  # it must not cross Unicorn's frames
            self._failure = failure
            self._cpu.stop()

    def _set_timer(self, nanoseconds: int) -> None:
        self._deadline = time.monotonic_ns() + nanoseconds if nanoseconds else 0
        self._set_kicker()

    def _set_kicker(self) -> None:
        """Have the CPU stopped when there will be something to do."""
        if self._guest.pending:
            # The guest has interrupts off, or this one blocked, and will not always say when that ends: look
            # again soon.
            self._kicker.soon()
        else:
            self._kicker.at(self._deadline)
        if self._break:
            # It came before this, its stop perhaps before the CPU started, and its kick was taken back just now.
            self._cpu.stop()
            self._kicker.soon()

    def _expire_timer(self) -> None:
        if self._deadline and time.monotonic_ns() >= self._deadline:
            self._deadline = 0
            self._guest.pending |= 1 << abi.TIMER_IRQ

    def _sleep(self) -> None:
        """Sleep until the timer is due or somebody breaks in."""
        timeout = max(0.0, (self._deadline - time.monotonic_ns()) / 1e9) if self._deadline else None
        try:
            self._wake.get(timeout=timeout)
        except queue.Empty:
            return
        while not self._wake.empty():
            self._wake.get()

    def _kick(self) -> bool:
        """Stop the CPU if it may be running; True for once more later, since this stop may come too early."""
        if not self._running or self._guest.halted:
            return False
        self._cpu.stop()
        return True
