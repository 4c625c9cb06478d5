"""Builds a guest from its arguments and runs it to its end.

Two threads: the main thread runs the guest, takes its notifications and sends its interrupts; the waker sleeps on
the workers and on signals, and breaks the guest out when there is an interrupt to send or the end has come.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lgmp import errors, hosts
from lgmp.bus import BusDevice, LguestBus, QueueNotify, StatusNotify, vring_pages
from lgmp.confinement import Confinement
from lgmp.control_socket import ControlServer
from lgmp.devices import DeviceOption, Model, console_specification, open_devices
from lgmp.errors import LgmpError, say
from lgmp.guest_status import GuestFacts, GuestStatus
from lgmp.hosts import choice
from lgmp.hosts.embedded.abi import GuestAbi
from lgmp.loader import LoadedGuest, load_guest, map_memory
from lgmp.mailbox import sweep_stale_queues
from lgmp.memory import PAGE_SIZE, GuestMemory
from lgmp.supervisor import Supervisor, Worker, WorkerSpecification, WorkerState
from lgmp.terminal import RawTerminal
from lgmp.title import set_title
from lgmp.tracing import wire
from lgmp.virtio import console as virtio_console
from lgmp.virtio import ids
from lgmp.virtio.ring import VringLayout
from lgmp.waker import Waker

EXIT_POWERED_OFF = 0
EXIT_FAILED = 1
EXIT_QUIT = 2

# What --verbose calls the page tables that a guest starts with; the host makes them where the launcher does not.
PAGE_TABLES = "page tables"

# What a guest's power-off looks like to its host (LHCALL_SHUTDOWN with this text); any other text is a crash.
POWER_DOWN = "CRASH: Power down"

# A guest that a signal or three ^C end gets this long, in seconds, for its workers to finish.
_PATIENCE = 2.0

# How often early output that stdout does not take looks whether the end has come.
_LOOK_UP_MILLISECONDS = 100

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class GuestOptions(NamedTuple):
    """What to launch.

    `memory_bytes` is RAM in bytes, whole pages; `host`, `lguest_device` and `lguest_abi` are as hosts/choice.py has
    them; `chroot` and `username` are for the workers; `on_crash` is "restart" or "stop", for a worker that ends;
    `on_device_error` "isolate" or "die", for a guest that breaks the rules of a device, and loses that or its life;
    `on_running` is called before the guest's first instruction.
    """

    memory_bytes: int
    kernel: str
    arguments: tuple[str, ...] = ()
    initrd: str | None = None
    devices: tuple[DeviceOption, ...] = ()
    host: str = "auto"
    lguest_device: str | None = None
    lguest_abi: str = "auto"
    guest_abi: str = "auto"
    name: str | None = None
    chroot: str | None = None
    username: str | None = None
    on_crash: str = "restart"
    on_device_error: str = "isolate"
    verbose: bool = False
    on_running: Callable[[Running], None] | None = None


class Running(NamedTuple):
    """What runs, as soon as it does: `workers` are (device name, process id)."""

    workers: tuple[tuple[str, int], ...]


class End(NamedTuple):
    """How a launch ended: the exit code, and what to say, if anything.

    `reboot`: the guest wants to start again; `stopped`: `lgmp stop` ended it.
    """

    code: int
    message: str | None = None
    patience: float | None = None
    reboot: bool = False
    stopped: bool = False


def launch(options: GuestOptions) -> End:
    """Run a guest to its end. Raises LgmpError where it cannot start; nothing is left behind either way."""
    with contextlib.ExitStack() as stack:
        guest = Launch(options, stack)
        end = guest.run()
    if end.reboot and guest.signals:
        return End(128 + guest.signals[0])
    if not end.reboot:
        # The end is under way: a ^C too many must not spoil it.
        for number in _ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    return end


class Launch:
    """One guest, from its options to its end. What must be undone is on the stack that it is given."""

    def __init__(self, options: GuestOptions, stack: contextlib.ExitStack) -> None:
        """Nothing happens yet."""
        self._options = options
        self._stack = stack
        self._end: End | None = None
        self._host: hosts.Host | None = None
        # Of each ring, by device index and queue number: where its avail.flags are (guest-physical), and its interrupt.
        self._rings: dict[tuple[int, int], tuple[int, int]] = {}
        # The devices, by index, whose drivers --verbose has told of since they were reset.
        self._announced: set[int] = set()
        # The devices, by index, that are out of order, or no longer, and whose drivers are yet to be told.
        self._to_mark: set[int] = set()
        # Whether a guest notifies a device's descriptor for any status that it writes, not only to reset the device.
        self._status_notify = True
        # What devices stand on, by index, in words.
        self._details: dict[int, str] = {}
        # Whether the guest is to stand still, whether it does, and what its thread waits for while it does.
        self._paused = False
        self._stands_still = False
        self._goes_on = threading.Event()
        # The ending signals that came, whether or not there was still somebody to end the guest for them.
        self.signals: list[int] = []
        self._name = options.name or f"{os.path.basename(options.kernel)}-{os.getpid()}"
        self._say: Callable[[str], None] = say if options.verbose else _say_nothing

    def run(self) -> End:
        """Build the guest, run it, take it down."""
        options, stack = self._options, self._stack
        kind = choice.choose(options.host, options.lguest_device, options.lguest_abi)
        stack.callback(kind.close)
        confinement = Confinement.check(options.chroot, options.username)
        sweep_stale_queues()
        models = open_devices(options.devices, stack)
        memory = stack.enter_context(GuestMemory.create(options.memory_bytes, _device_pages(models)))
        self._memory = memory
        bus = LguestBus(memory)
        self._bus = bus
        # Before the workers, which start while the kernel is loaded; the guest sees neither until it runs.
        waker = Waker()
        # Before there is a queue that a signal could leave behind.
        self._catch_signals(waker)
        control_socket = self._open_control_socket(waker)
        self._supervisor = supervisor = Supervisor(
            memory,
            self._name,
            waker,
            self,
            options=("--program", errors.program, *confinement.options(), *_control_options(control_socket)),
            takes_kicks=kind.takes_kicks,
            on_crash=options.on_crash,
        )
        stack.callback(supervisor.close)
        # Last, so that it is closed first: nothing that it watches goes away under it.
        stack.callback(waker.close)
        terminal = RawTerminal.enter(sys.stdin.fileno()) if sys.stdin else None
        if terminal is not None:
            stack.callback(terminal.restore)
        self._add_devices(bus, models, terminal)
        set_title(f"lgmp: {os.path.basename(options.kernel)} {options.memory_bytes >> 20}M ({self._name})")
        loaded = load_guest(memory, options.kernel, options.initrd, options.arguments)
        guest_abi = choice.choose_abi(options.guest_abi, loaded.linux_version, options.kernel)
        directory = map_memory(memory, loaded) if kind.wants_page_tables(guest_abi) else None
        self._status_notify = guest_abi.status_notify
        self._describe(bus, loaded, kind.name, guest_abi)
        if confinement:
            self._say(f"workers: {confinement}")
        irqs = max(irq for _avail, irq in self._rings.values())
        host = kind.make(hosts.GuestStart(memory, bus.guest_limit, loaded.entry, guest_abi, directory, irqs))
        self._host = host
        stack.callback(host.close)
        # Once more: the waker has to end before the host does as well.
        stack.callback(waker.close)
        self._connect_kicks(host)
        facts = GuestFacts(
            name=self._name,
            pid=os.getpid(),
            kernel=os.path.abspath(options.kernel),
            memory_bytes=options.memory_bytes,
            host=kind.name,
            guest_abi=guest_abi.name,
            socket=control_socket.path if control_socket is not None else "",
        )
        self._status = GuestStatus(facts, supervisor.workers, self._details)
        waker.start()
        if options.on_running is not None:
            options.on_running(
                Running(tuple((worker.device.name, worker.process.pid) for worker in supervisor.workers))
            )
        end = self._run_guest(host)
        # What else wanted the end matters to a guest that has powered off, but not to one that died of itself.
        if self._end is None or end.code != EXIT_POWERED_OFF:
            self._end = end
        supervisor.stop(self._end.patience)
        for number in self.signals:
            # One that was sent to all of us, as timeout(1) does, may have found a worker first.
            if number in supervisor.killed_by and self._end.code == EXIT_FAILED:
                return End(128 + number)
        return self._end

    def _open_control_socket(self, waker: Waker) -> ControlServer | None:
        """Have `lgmp ps` and its like see and command the guest; None where no socket for that can be had."""
        try:
            server = ControlServer(waker, self)
        except LgmpError as error:
            self._say(f"no control socket, so `lgmp ps` does not show this guest: {error}")
            return None
        self._stack.callback(server.close)
        return server

    def _add_devices(self, bus: LguestBus, models: Sequence[Model], terminal: RawTerminal | None) -> None:
        """Devices in the order of the command line, the console last, as every lguest launcher had them."""
        for model in models:
            device = bus.add_device(
                model.device_type,
                model.name,
                [ids.VIRTQUEUE_NUM] * model.queues,
                model.features,
                model.config,
            )
            self._start(device, model.specification, model.details)
        device = bus.add_device(
            ids.VIRTIO_ID_CONSOLE, "console", [ids.VIRTQUEUE_NUM, ids.VIRTQUEUE_NUM], virtio_console.features(), b""
        )
        self._start(device, console_specification(terminal), "")

    def _start(self, device: BusDevice, specification: WorkerSpecification, details: str) -> None:
        worker = self._supervisor.start(device, specification)
        for number, queue in enumerate(device.queues):
            avail = VringLayout.legacy(queue.num, queue.address).avail
            self._rings[device.index, number] = (avail, queue.irq)
        self._details[device.index] = details
        kind = specification.module.removeprefix("workers.")
        self._say(f"device {device.index}: {device.name} type={kind} pid={worker.process.pid} {details}".rstrip())
        for number, queue in enumerate(device.queues):
            self._say(f"virtqueue {device.name}.{number}: irq={queue.irq} page={queue.pfn << 12:#x} num={queue.num}")

    def _describe(self, bus: LguestBus, loaded: LoadedGuest, kind: str, guest_abi: GuestAbi) -> None:
        """Say what is where in guest memory: one line each, numbers as NAME=0xHEX."""
        ram = self._memory.ram_bytes
        parts = [("RAM", 0, ram), *loaded.segments, ("descriptor page", ram, PAGE_SIZE)]
        for what, address, size in parts:
            self._say(f"{what}: address={address:#x} size={size:#x}")
        if not any(segment.what == PAGE_TABLES for segment in loaded.segments):
            self._say(f"{PAGE_TABLES}: made by the host")
        self._say(
            f"guest {self._name}: memory=0x0-{bus.guest_limit:#x} entry={loaded.entry:#x} host={kind} "
            f"abi={guest_abi.name}"
        )

    def _run_guest(self, host: hosts.Host) -> End:
        while True:
            event = host.run()
            match event:
                case hosts.Notify():
                    self._notified(event.address)
                case hosts.Break():
                    self._stand_still()
                    self._mark_broken()
                    if not host.irq_from_any_thread:
                        self._send_interrupts(host)
                case hosts.Died():
                    if event.reason == POWER_DOWN:
                        self._say(f"guest {self._name}: powered off")
                        return End(EXIT_POWERED_OFF)
                    return End(EXIT_FAILED, " ".join(event.reason.split()))
                case hosts.Reboot():
                    self._say(f"guest {self._name}: reboot")
                    return End(EXIT_POWERED_OFF, reboot=True)
            if self._end is not None:
                return self._end

    def _stand_still(self) -> None:
        """In the guest's thread: for as long as the guest is paused, unless its end has come."""
        while self._paused and self._end is None:
            self._stands_still = True
            self._goes_on.wait()
        self._stands_still = False

    def _notified(self, address: int) -> None:
        target = self._bus.find(address)
        match target:
            case QueueNotify():
                self.kicked(self._worker_of(target.device))
            case StatusNotify():
                worker = self._worker_of(target.device)
                if target.device.status == 0 or not self._status_notify:
                    self._reset(worker)
                else:
                    self._supervisor.negotiated(worker)
                    if target.device.status & ids.VIRTIO_CONFIG_S_DRIVER_OK:
                        self._announce_driver(worker.device)
            case None:
                self._early_console(address)

    def kicked(self, worker: Worker) -> None:
        """The driver notified a queue of its device.

        In the guest's thread; or in the waker where kicks go straight to the worker, and it has not begun yet.
        """
        if worker.device.status == 0:
            say(f"{worker.device.name} gave early output")
            return
        self._supervisor.kick(worker)
        if self._options.verbose:
            self._announce_driver(worker.device)

    def _announce_driver(self, device: BusDevice) -> None:
        """Say, once until the next reset, what a driver made of its device."""
        if device.index not in self._announced:
            self._announced.add(device.index)
            features = f"offered={device.features:#x} accepted={device.accepted_features:#x}"
            self._say(f"device {device.index}: {device.name} driver {features}")

    def _reset(self, worker: Worker) -> None:
        self._say(f"device {worker.device.index}: {worker.device.name} reset")
        self._announced.discard(worker.device.index)
        self._to_mark.discard(worker.device.index)
        self._supervisor.reset(worker, give_up=lambda: self._end is not None)

    def _early_console(self, address: int) -> None:
        """Before it has a console the guest notifies the address of NUL-terminated text."""
        limit = self._bus.guest_limit
        if address >= limit:
            self._finish(End(EXIT_FAILED, f"Bad NOTIFY {address:#x}"))
            return
        end = self._memory.map.find(b"\0", address, limit)
        self._write_out(self._memory.view[address : end if end >= 0 else limit])

    def _write_out(self, data: memoryview) -> None:
        """All of it to stdout, unless nobody can have it any more or the end has come."""
        poll = select.poll()
        poll.register(1, select.POLLOUT)
        while data and self._end is None:
            if not poll.poll(_LOOK_UP_MILLISECONDS):
                continue
            try:
                # A pipe that is writable takes this much without blocking.
                data = data[os.write(1, data[: select.PIPE_BUF]) :]
            except BlockingIOError:
                continue
            except OSError:
                return

    def used(self) -> None:
        """In the waker: rings got used elements."""
        host = self._host
        if host is None:
            return  # no guest yet: some worker made that up
        if host.irq_from_any_thread:
            self._send_interrupts(host)
        else:
            host.break_in()

    def _connect_kicks(self, host: hosts.Host) -> None:
        """Have the guest's kicks go straight to the workers, where the host can do that."""
        for worker in self._supervisor.workers:
            if worker.kick_descriptor is not None:
                direct = all(host.kicks_to(queue.address, worker.kick_descriptor) for queue in worker.device.queues)
                way = "eventfd" if direct else "launcher"
                self._say(f"device {worker.device.index}: {worker.device.name} kicks={way}")

    def _send_interrupts(self, host: hosts.Host) -> None:
        """Interrupts for the rings that got used elements: in the thread that may send them."""
        used, view = self._supervisor.used, self._memory.view
        while used:
            index, number = used.pop()
            avail, irq = self._rings[index, number]
            if not view[avail] & ids.VRING_AVAIL_F_NO_INTERRUPT:
                host.irq(irq)
                self._supervisor.count_interrupt(index)

    def _mark_broken(self) -> None:
        """Tell drivers which devices are out of order, in the guest's thread: it stands still."""
        while self._to_mark:
            worker = self._worker_of_index(self._to_mark.pop())
            device = worker.device
            # A driver that has just begun a reset is not to find this in the place of its 0.
            if device.status and worker.out_of_order:
                device.status |= ids.VIRTIO_CONFIG_S_NEEDS_RESET
            elif device.status:
                device.status &= ~ids.VIRTIO_CONFIG_S_NEEDS_RESET

    def _worker_of(self, device: BusDevice) -> Worker:
        return self._worker_of_index(device.index)

    def _worker_of_index(self, index: int) -> Worker:
        return self._supervisor.workers[index]

    def _break_in(self) -> None:
        if self._host is not None:
            self._host.break_in()

    def _finish(self, end: End) -> None:
        """From any thread: the guest has to end. The first word counts, unless it was that all is well."""
        if self._end is None or self._end.code == EXIT_POWERED_OFF:
            self._end = end
        self._goes_on.set()
        self._break_in()

    def quit(self) -> None:
        """In the waker: the user asked for the end."""
        self._finish(End(EXIT_QUIT, patience=_PATIENCE))

    @property
    def ending(self) -> bool:
        """Whether the end has come."""
        return self._end is not None

    def restarted(self, worker: Worker, why: str) -> None:
        """In the waker: a worker has a successor."""
        in_flight = sum(len(region.heads()) for region in worker.control.inflight)
        say(f"{why}; started again as pid {worker.process.pid}, {in_flight} in flight")
        if worker.device.status & ids.VIRTIO_CONFIG_S_NEEDS_RESET:
            self._mark(worker)  # it had been given up

    def broken(self, worker: Worker, why: str) -> None:
        """In the waker: a device is out of order."""
        if self._options.on_device_error == "die":
            self.failed(why)
            return
        name = worker.device.name
        remedy = f" or you do (lgmp restart-worker {name})" if worker.state == WorkerState.GIVEN_UP else ""
        say(f"{why}; {name} is out of order until its driver resets it{remedy}")
        self._mark(worker)

    def _mark(self, worker: Worker) -> None:
        self._to_mark.add(worker.device.index)
        self._break_in()

    def failed(self, text: str) -> None:
        """In the waker: the guest has to end."""
        self._finish(End(EXIT_FAILED, text, patience=_PATIENCE))

    def status(self) -> dict[str, object]:
        """In the waker, as all that the control socket commands: what there is to see of the guest."""
        if self.ending:
            state = "ending"
        elif self._paused:
            state = "paused" if self._stands_still else "pausing"
        else:
            state = "running"
        return self._status.read(state)

    def stop(self) -> None:
        """End the guest."""
        if not self.ending:
            self._say(f"guest {self._name}: stopped")
        self._finish(End(EXIT_POWERED_OFF, patience=_PATIENCE, stopped=True))

    def pause(self) -> None:
        """Have the guest stand still. Its workers do not: what it asked them for they still do."""
        self._refuse_at_the_end()
        if not self._paused:
            self._goes_on.clear()
            self._paused = True
            self._break_in()

    def resume(self) -> None:
        """Have the guest go on."""
        self._refuse_at_the_end()
        self._paused = False
        self._goes_on.set()

    def restart_worker(self, name: str) -> None:
        """Replace the worker of a device by a new one, also where it was given up."""
        self._refuse_at_the_end()
        self._supervisor.restart(self._worker_named(name))

    def trace(self, name: str, level: int) -> int:
        """Have a worker tell what goes through the rings of its device; gives the descriptor by which it does."""
        self._refuse_at_the_end()
        if level not in (wire.HEADS, wire.FULL, wire.PAYLOADS):
            raise LgmpError(f"there is no trace of level {level}; is this lgmp another one?")
        worker = self._worker_named(name)
        return self._supervisor.trace(worker, level, self._recording_header(worker))

    def trace_ended(self, name: str) -> None:
        """Nobody reads that trace any more."""
        self._supervisor.trace_ended(self._worker_named(name))

    def _recording_header(self, worker: Worker) -> bytes:
        """What a recording says of a device."""
        from lgmp.tracing.recording import Header  # noqa: PLC0415  nothing that a guest has to wait for

        device = worker.device
        header = Header(
            self._name,
            device.name,
            device.device_type,
            worker.specification.module,
            worker.specification.options,
            device.features,
            device.config,
            tuple(VringLayout.legacy(queue.num, queue.address) for queue in device.queues),
            self._memory.ram_bytes,
            self._memory.limit,
            time.time_ns(),
        )
        return header.pack()

    def _worker_named(self, name: str) -> Worker:
        for worker in self._supervisor.workers:
            if worker.device.name == name:
                return worker
        names = ", ".join(worker.device.name for worker in self._supervisor.workers)
        raise LgmpError(f"guest {self._name} has no device {name}; it has {names}")

    def _refuse_at_the_end(self) -> None:
        if self.ending:
            raise LgmpError(f"guest {self._name} is about to end")

    def _catch_signals(self, waker: Waker) -> None:
        """Have the waker hear of signals; Python's own handlers would wait for the guest's thread."""

        def caught(number: int) -> None:
            if self._end is not None:
                self._supervisor.kill()
            self._finish(End(128 + number, patience=_PATIENCE))

        for number in _ENDING_SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: whoever started us wants it so
            waker.on_signal(number, caught)
            # Not undone at the end: from then on it is launch() that looks at what came.
            signal.signal(number, lambda number, _frame: self.signals.append(number))


def _device_pages(models: Sequence[Model]) -> int:
    """The pages above RAM: the descriptor page, and the rings of all devices. The guest gets no more."""
    queues = sum(model.queues for model in models) + virtio_console.QUEUES
    return 1 + queues * vring_pages(ids.VIRTQUEUE_NUM)


def _control_options(server: ControlServer | None) -> tuple[str, ...]:
    """The option for workers that says where the control socket is."""
    return () if server is None else ("--control-socket", server.path)


def _say_nothing(text: str) -> None:
    pass
