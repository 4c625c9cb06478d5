"""Hypercalls: what a guest asks of its host, with `int $0x1f` or through the asynchronous ring.

How a call is made depends on the guest's era, and `GuestAbi` says how; what it does is the same for all. The guest's
CPU walks the guest's own page tables, so the hypercalls about them only check and flush: nothing is shadowed.
Everything in a call is hostile.
"""

# Every hypercall has four arguments; few of them use all.
# ruff: noqa: ARG002

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from operator import itemgetter

from lgmp.hosts import Died, Notify, Reboot
from lgmp.hosts.embedded import abi
from lgmp.hosts.embedded import cpu as c
from lgmp.hosts.embedded.cpu import Cpu
from lgmp.hosts.embedded.descriptors import gate_of
from lgmp.hosts.embedded.paging import check_page_directory, check_page_directory_entry, check_page_table_entry
from lgmp.hosts.embedded.state import DescriptorTable, GuestKilled, GuestState
from lgmp.hosts.embedded.traps import write_time
from lgmp.memory import PAGE_SIZE

_SHUTDOWN_MESSAGE_BYTES = 128
_MAX_STACK_PAGES = 2
_DESCRIPTOR_BYTES = 8
_RING_FREE = bytes([abi.HCALL_FREE]) * abi.LHCALL_RING_SIZE

Arguments = tuple[int, int, int, int]


class Hypercalls:
    """Carries out the hypercalls of one guest."""

    def __init__(
        self,
        cpu: Cpu,
        guest: GuestState,
        table: DescriptorTable,
        guest_abi: abi.GuestAbi,
        *,
        set_timer: Callable[[int], None],
        tsc_khz: Callable[[], int],
    ) -> None:
        """Work on this CPU and guest; `table`: its GDT; `guest_abi`: how it makes its calls.

        `set_timer(nanoseconds)`: make interrupt 0 pending after that time, or never for 0; `tsc_khz()`: the speed of
        the time-stamp counter, for the guest to know.
        """
        self._cpu = cpu
        self._guest = guest
        self._table = table
        self._abi = guest_abi
        self._registers = guest_abi.registers
        self._hcall_words = guest_abi.hcall_words
        self._arrange: Callable[[list[int]], tuple[int, ...]] = itemgetter(*guest_abi.hcall_order)
        self._set_timer = set_timer
        self._tsc_khz = tsc_khz
        # The call that waits for the ring before it to be done, as it does while a NOTIFY from there is with the
        # launcher.
        self._waiting: tuple[int, Arguments] | None = None
        # Checksums of pages as they were when they were last mapped read-only into user space.
        self._code_checksums: dict[int, int] = {}
        calls: dict[int, Callable[[int, int, int, int], None]] = {
            abi.LHCALL_FLUSH_ASYNC: self._nothing,
            abi.LHCALL_SEND_INTERRUPTS: self._nothing,
            abi.LHCALL_LGUEST_INIT: self._lguest_init,
            abi.LHCALL_SHUTDOWN: self._shutdown,
            abi.LHCALL_NEW_PGTABLE: self._new_pgtable,
            abi.LHCALL_FLUSH_TLB: self._flush_tlb,
            abi.LHCALL_LOAD_IDT_ENTRY: self._load_idt_entry,
            abi.LHCALL_SET_STACK: self._set_stack,
            abi.LHCALL_TS: self._ts,
            abi.LHCALL_SET_CLOCKEVENT: self._set_clockevent,
            abi.LHCALL_HALT: self._halt,
            abi.LHCALL_SET_PTE: self._set_pte,
            abi.LHCALL_SET_PGD: self._set_pgd,
            abi.LHCALL_LOAD_TLS: self._load_tls,
            abi.LHCALL_NOTIFY: self._notify,
            abi.LHCALL_LOAD_GDT: self._load_gdt,
            abi.LHCALL_LOAD_GDT_ENTRY: self._load_gdt_entry,
        }
        self._calls = {number: calls[number] for number in guest_abi.calls}

    def from_registers(self) -> None:
        """The guest made a hypercall, its number in eax. Raises GuestKilled for one that ends it."""
        q = self._cpu.q
        number = q[c.EAX]
        first, second, third, fourth = self._registers
        arguments = (q[first], q[second], q[third], q[fourth])
        if self._guest.data is None:
            if number != abi.LHCALL_LGUEST_INIT:
                raise GuestKilled(f"hypercall {number} before INIT")
            self.check_era()
            self._initialise(arguments[0])
            return
        self._waiting = (number, arguments)
        self.resume()

    def resume(self) -> None:
        """Go on with the hypercall that is under way, if one is: first the asynchronous ones before it, then itself."""
        if self._waiting is None:
            return
        self._run_ring()
        if self._guest.event is not None:
            return
        number, arguments = self._waiting
        self._waiting = None
        self._call(number, *arguments)

    def check_era(self) -> None:
        """Raise GuestKilled where the call that is being made is the LGUEST_INIT of a guest of another era."""
        q = self._cpu.q
        if q[c.EAX] != abi.LHCALL_LGUEST_INIT:
            return
        eras = [each for each in abi.GUEST_ABIS if self._seems_initialised(each, q[each.registers[0]])]
        if eras and self._abi not in eras:
            raise GuestKilled(
                f"this guest makes its hypercalls as {' or '.join(each.kernels for each in eras)} does, "
                f"not as {self._abi.kernels}: give --guest-abi {' or '.join(each.name for each in eras)}"
            )

    def _seems_initialised(self, guest_abi: abi.GuestAbi, data: int) -> bool:
        """Whether a guest of that era can have filled the struct lguest_data at `data` for its LGUEST_INIT."""
        guest = self._guest
        if data & 3 or data + guest_abi.data_size > guest.limit:
            return False
        base = data >> 2
        status = data + guest_abi.hcall_status
        kernel_address = guest.words[base + guest_abi.kernel_address // 4]
        return (
            guest.memory[status : status + abi.LHCALL_RING_SIZE] == _RING_FREE
            and abi.FIRST_EXTERNAL_VECTOR <= guest.words[base + guest_abi.syscall_vec // 4] < len(guest.gates)
            and 0 < kernel_address < abi.SWITCHER_ADDRESS
            and not kernel_address & (PAGE_SIZE - 1)
        )

    def _run_ring(self) -> None:
        """Carry out what the guest has put in the asynchronous ring, once around at most, up to a NOTIFY."""
        guest = self._guest
        assert guest.data is not None
        memory, words, call = guest.memory, guest.words, self._call
        size, arrange = self._hcall_words, self._arrange
        status = guest.data + self._abi.hcall_status
        entries = (guest.data + self._abi.hcalls) >> 2
        for _ in range(abi.LHCALL_RING_SIZE):
            slot = guest.next_hcall
            if memory[status + slot] == abi.HCALL_FREE:
                return
            guest.next_hcall = (slot + 1) % abi.LHCALL_RING_SIZE
            at = entries + slot * size
            call(*arrange(words[at : at + size].tolist()))
            memory[status + slot] = abi.HCALL_FREE
            if guest.event is not None:
                return

    def _call(self, number: int, a1: int, a2: int, a3: int, a4: int = 0) -> None:
        try:
            call = self._calls[number]
        except KeyError:
            hint = ": a PAE guest; build it without CONFIG_X86_PAE" if number == abi.LHCALL_SET_PMD else ""
            raise GuestKilled(f"Bad hypercall {number}{hint}") from None
        call(a1, a2, a3, a4)

    def _initialise(self, data: int) -> None:
        guest, era = self._guest, self._abi
        if data & 3 or data + era.data_size > guest.limit:
            raise GuestKilled(f"bad guest page {data:#x}")
        words = guest.words
        base = data >> 2
        guest.noirq_start = words[base + era.noirq_start // 4]
        guest.noirq_end = words[base + era.noirq_end // 4]
        guest.kernel_address = words[base + era.kernel_address // 4]
        vector = words[base + era.syscall_vec // 4]
        if guest.kernel_address >= abi.SWITCHER_ADDRESS:
            raise GuestKilled(f"bad kernel address {guest.kernel_address:#x}")
        if not abi.FIRST_EXTERNAL_VECTOR <= vector < len(guest.gates):
            raise GuestKilled(f"bad syscall vector {vector}")
        words[base + era.reserve_mem // 4] = abi.RESERVE_MEM
        words[base + era.tsc_khz // 4] = self._tsc_khz()
        if era.pgdir is not None:
            words[base + era.pgdir // 4] = guest.directory
        if era.irq_pending is not None:
            guest.irq_pending = base + era.irq_pending // 4
        if guest.paging:
            self._map_at_kernel_address()
        guest.data = data
        write_time(guest)

    def _map_at_kernel_address(self) -> None:
        """Map RAM where the kernel is linked to be, too: it goes on there before it has tables of its own."""
        guest = self._guest
        tables, first = guest.directory >> 2, guest.kernel_address >> 22
        for index in range(min(first, abi.SWITCHER_PGD_INDEX - first)):
            guest.words[tables + first + index] = guest.words[tables + index]
        self._cpu.flush_all()

    def _nothing(self, a1: int, a2: int, a3: int, a4: int) -> None:
        """FLUSH_ASYNC and SEND_INTERRUPTS do their work by coming here at all."""

    def _lguest_init(self, a1: int, a2: int, a3: int, a4: int) -> None:
        raise GuestKilled("already have lguest_data")

    def _shutdown(self, message: int, how: int, a3: int, a4: int) -> None:
        guest = self._guest
        if how == abi.LGUEST_SHUTDOWN_RESTART:
            # Linux gives its reason, which is often NULL, so this address is not looked at (nor does lg care for it).
            guest.event = Reboot()
            return
        guest.check_range(message, _SHUTDOWN_MESSAGE_BYTES, "read")
        text = bytes(guest.memory[message : message + _SHUTDOWN_MESSAGE_BYTES - 1]).split(b"\0", 1)[0]
        guest.event = Died("CRASH: " + text.decode("utf-8", "replace"))

    def _new_pgtable(self, directory: int, a2: int, a3: int, a4: int) -> None:
        self.use_page_tables(directory)

    def use_page_tables(self, directory: int) -> None:
        """Walk the guest's page tables from that page directory on. Raises GuestKilled for what cannot be one."""
        guest = self._guest
        check_page_directory(directory, guest.pfn_limit)
        guest.words[(directory >> 2) + abi.SWITCHER_PGD_INDEX] = self._cpu.switcher_entry
        self._cpu.load_page_directory(directory)
        guest.directory = directory
        guest.paging = True

    def _flush_tlb(self, everything: int, a2: int, a3: int, a4: int) -> None:
        # With 0, user pages alone; dropping more than that is always allowed.
        self._cpu.flush_all()

    def _set_pte(self, directory: int, address: int, entry: int, a4: int) -> None:
        guest, cpu = self._guest, self._cpu
        if entry & abi.PAGE_PRESENT:
            if address >= abi.SWITCHER_ADDRESS:
                raise GuestKilled("attempt to set pte into Switcher pages")
            check_page_table_entry(entry, guest.pfn_limit)
            if entry & abi.PAGE_USER:
                self._note_user_page(entry)
        if directory == guest.directory or address >= guest.kernel_address:
            cpu.flush_page(address)

    def _note_user_page(self, entry: int) -> None:
        """Drop code that was translated from this page if the page is not what it was.

        A device writes guest memory behind the CPU's back, so a page that comes back from disk may have translated
        code of its former life. A page is mapped anew before anything runs from it. Pages mapped read-only
        (program text) are compared by checksum, so that a new process does not cost the C library its translation.
        """
        page = entry & 0xFFFFF000
        if entry & abi.PAGE_RW:
            self._code_checksums.pop(page, None)
        else:
            checksum = zlib.crc32(self._guest.memory[page : page + PAGE_SIZE])
            if self._code_checksums.get(page) == checksum:
                return
            self._code_checksums[page] = checksum
        self._cpu.forget_code(page, page + PAGE_SIZE)

    def _set_pgd(self, directory: int, index: int, a3: int, a4: int) -> None:
        guest = self._guest
        if index > abi.SWITCHER_PGD_INDEX:
            raise GuestKilled(f"Attempt to set pgd {index}/{abi.SWITCHER_PGD_INDEX + 1}")
        check_page_directory(directory, guest.pfn_limit)
        if index == abi.SWITCHER_PGD_INDEX:
            return
        check_page_directory_entry(guest.words[(directory >> 2) + index], guest.pfn_limit)
        if directory == guest.directory:
            self._cpu.flush_all()

    def _load_idt_entry(self, number: int, low: int, high: int, a4: int) -> None:
        if number in abi.IDT_IGNORED:
            return
        if number >= len(self._guest.gates):
            raise GuestKilled(f"Setting idt entry {number}")
        try:
            self._guest.gates[number] = gate_of(low, high)
        except ValueError as error:
            raise GuestKilled(str(error)) from None

    def _set_stack(self, selector: int, top: int, pages: int, a4: int) -> None:
        if selector & 3 != abi.GUEST_PL or selector >> 3 >= abi.GDT_ENTRIES:
            raise GuestKilled(f"bad stack segment {selector}")
        if pages > _MAX_STACK_PAGES:
            raise GuestKilled(f"bad stack pages {pages}")
        self._guest.ss1 = selector
        self._guest.esp1 = top

    def _ts(self, on: int, a2: int, a3: int, a4: int) -> None:
        self._cpu.set_task_switched(bool(on))

    def _set_clockevent(self, nanoseconds: int, a2: int, a3: int, a4: int) -> None:
        self._set_timer(nanoseconds)

    def _halt(self, a1: int, a2: int, a3: int, a4: int) -> None:
        self._guest.halted = True

    def _load_tls(self, address: int, a2: int, a3: int, a4: int) -> None:
        self._load_descriptors(address, abi.GDT_ENTRY_TLS_MIN, abi.GDT_ENTRY_TLS_ENTRIES)

    def _notify(self, address: int, a2: int, a3: int, a4: int) -> None:
        self._guest.event = Notify(address)

    def _load_gdt(self, address: int, count: int, a3: int, a4: int) -> None:
        if count > abi.GDT_ENTRIES:
            raise GuestKilled(f"too many gdt entries {count}")
        self._load_descriptors(address, 0, count)

    def _load_descriptors(self, address: int, first: int, count: int) -> None:
        """Load `count` descriptors at the guest-physical `address` into the GDT from its entry `first` on."""
        guest, size = self._guest, _DESCRIPTOR_BYTES * count
        guest.check_range(address, size, "read")
        raw = bytes(guest.memory[address : address + size])
        for index, (low, high) in enumerate(struct.iter_unpack("<II", raw), first):
            self._table.load(index, low, high)

    def _load_gdt_entry(self, index: int, low: int, high: int, a4: int) -> None:
        self._table.load(index, low, high)
