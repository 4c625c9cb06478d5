"""What every worker runs: a process around one device.

The launcher starts a worker with an honest command line (`python -m workers.block --help`), its open files inherited.
The worker opens nothing after its start but its two message queues, tells the launcher READY, and from then on looks
at the device's rings after every message. When the launcher goes, however it goes, the worker goes.

The file is shaped by start-up time, since a guest waits for its devices: it imports as little as it can (no argparse,
no typing, no dataclasses), and sets the title that ps shows when the launcher has been told READY already.
"""

from __future__ import annotations

import ctypes
import getopt
import os
import select
import signal
import sys

from lgmp import errors
from lgmp.confinement import Confinement
from lgmp.control import KICKS, ControlPage
from lgmp.errors import LgmpError, say
from lgmp.mailbox import COMPLETION_MESSAGE_BYTES, Mailbox, ToLauncher, ToWorker, pack, unlink, unlink_queues_of, unpack
from lgmp.memory import GuestMemory
from lgmp.title import set_title
from lgmp.virtio.ring import RingError, Virtqueue, VringLayout
from workers.device import Device

TYPE_CHECKING = False  # as typing's, which is costly to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from workers.traced import Tracer
    from workers.vhost_user import Server

_libc = ctypes.CDLL(None)

# linux/prctl.h
PR_SET_PDEATHSIG = 1
# What the kernel sends us when the launcher's thread that started us ends; the launcher itself never sends it.
LAUNCHER_DEATH_SIGNAL = signal.SIGUSR1
# The launcher shares its terminal and process group with us, and tells us itself what we are to know.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP)
# A signal that arrives just before a system call sleeps does not wake it, so no sleep is longer than this, in seconds.
WATCH_SECONDS = 2.0
# In the index of a ring of vhost-user there are 8 bits.
MAX_QUEUES = 256
# The text of FAILED is cut to this many bytes: what surrounds it in the message needs less than the rest.
_FAILED_TEXT_BYTES = COMPLETION_MESSAGE_BYTES - 32

_OPTIONS = {
    "name=": "the device's name, for example vda",
    "guest=": "the guest's name",
    "device=": "the device's index, as in its messages",
    "memory-fd=": "guest memory",
    "ram=": "bytes of guest memory before the device pages",
    "control-fd=": "the control page",
    "mailbox=": "the message queue from the launcher",
    "completions=": "the message queue to the launcher",
    "kick-fd=": "an eventfd that kicks come in by as well, straight from the guest",
    "trace-fd=": "a socket for what goes through the rings, when the launcher asks for that",
    "trace=": "what to tell of that from the start on: a number, as in a TRACE message",
    "control-socket=": "the launcher's, to take its name away if the launcher cannot",
    "launcher=": "the launcher's process id; without it, the parent's",
    "program=": "what lines to the user begin with; without it, lgmp",
    "chroot=": "the directory to be locked in, once all that is needed is open",
    "user=": "UID:GID[:GROUP...], who to be from then on",
    "queue=": "NUM:DESC:AVAIL:USED, once for each ring: its size and the guest addresses of its parts",
}
_REQUIRED = ("name", "device", "memory-fd", "ram", "control-fd", "mailbox", "completions", "queue")

# In the place of those, where the device is served to another virtual machine monitor.
_VHOST_USER_OPTIONS = {
    "vhost-user-fd=": "a socket of vhost-user, that listens or is connected to a front end: what follows is for that",
    "once": "end when the first front end goes",
    "virtio-features=": "the features that are offered, a mask of 64 bits",
    "config-space=": "the configuration space, in hexadecimal",
    "queues=": "how many rings the device has",
}
_VHOST_USER_REQUIRED = ("name", "vhost-user-fd", "virtio-features", "queues")


class LauncherGone(Exception):
    """The launcher is no more."""


class Options:
    """The command line of a worker: `own` are the device's own options by name, `arguments` what follows them all."""

    def __init__(self, arguments: list[str], own: dict[str, str]) -> None:
        """Parse a command line; `own` maps the device's own options, as getopt has them, to their help.

        Raises LgmpError where it is wrong.
        """
        try:
            pairs, self.arguments = getopt.getopt(arguments, "", [*_OPTIONS, *_VHOST_USER_OPTIONS, *own])
        except getopt.GetoptError as error:
            raise LgmpError(f"{error}; see --help") from error
        values = {option[2:]: value for option, value in pairs}
        required = _VHOST_USER_REQUIRED if "vhost-user-fd" in values else _REQUIRED
        missing = [f"--{name}" for name in required if name not in values]
        if missing:
            raise LgmpError(f"missing {', '.join(missing)}; see --help")
        self._values = values
        self.own = {name: value for name, value in values.items() if name in own or f"{name}=" in own}
        self.confinement = Confinement.from_options(values)
        self.program = values.get("program", errors.program)
        self.name = values["name"]
        self.guest = values.get("guest", "")
        # What is served and who wrote it, where `make` knows better than run().
        self.kind = ""
        self.author = "lgmp"
        self.control_fd = self.number("control-fd") if "control-fd" in values else None
        self.control_socket = values.get("control-socket")
        self.launcher = self.number("launcher") if "launcher" in values else os.getppid()
        self.vhost_user_fd: int | None = None
        self.mailbox = self.completions = ""
        if "vhost-user-fd" in values:
            self._take_vhost_user()
        else:
            self._take_lguest([value for option, value in pairs if option == "--queue"])

    def _take_lguest(self, queues: list[str]) -> None:
        """The options of a worker of a launcher's guest."""
        self.mailbox = self._values["mailbox"]
        self.completions = self._values["completions"]
        self.device = self.number("device")
        self.memory_fd = self.number("memory-fd")
        self.ram = self.number("ram")
        self.kick_fd = self.number("kick-fd") if "kick-fd" in self._values else None
        self.trace_fd = self.number("trace-fd") if "trace-fd" in self._values else None
        self.trace = self.number("trace") if "trace" in self._values else 0
        try:
            self.queues = [VringLayout.parse(queue) for queue in queues]
        except ValueError as error:
            raise LgmpError(f"--queue takes NUM:DESC:AVAIL:USED: {error}") from error
        self.queue_count = len(self.queues)

    def _take_vhost_user(self) -> None:
        """The options of a worker of another virtual machine monitor's guest."""
        self.vhost_user_fd = self.number("vhost-user-fd")
        self.once = "once" in self._values
        self.virtio_features = self.number("virtio-features")
        self.queue_count = self.number("queues")
        if not 1 <= self.queue_count <= MAX_QUEUES:
            raise LgmpError(f"--queues takes a number from 1 to {MAX_QUEUES}")
        try:
            self.config_space = bytes.fromhex(self._values.get("config-space", ""))
        except ValueError as error:
            raise LgmpError(f"--config-space takes bytes in hexadecimal: {error}") from error

    def number(self, name: str) -> int:
        """The value of an option as a number, decimal or 0x hexadecimal. Raises LgmpError where it is not one."""
        try:
            value = int(self._values[name], 0)
        except ValueError as error:
            raise LgmpError(f"--{name} takes a number, not {self._values[name]!r}") from error
        if value < 0:
            raise LgmpError(f"--{name} takes a number from 0 on")
        return value


class Worker:
    """One device and the messages about it."""

    def __init__(self, options: Options, device: Device) -> None:
        """Open what `options` name and give `device` its rings. Raises LgmpError."""
        assert options.control_fd is not None
        self._device = device
        self._launcher = options.launcher
        self._index = options.device
        try:
            memory = GuestMemory(options.memory_fd, options.ram)
            self._control = ControlPage(options.control_fd, [layout.num for layout in options.queues])
        except (OSError, ValueError) as error:
            raise LgmpError(f"guest memory or control page: {error}") from error
        self._mailbox = Mailbox.open(options.mailbox)
        self._completions = Mailbox.open(options.completions, polled=True)
        # The exception of launcher_died is lost where it ends a wait for a message.
        self._mailbox.on_signal = self._completions.on_signal = lambda: check_parent(options.launcher)
        self._used = [pack(ToLauncher.USED, self._index, queue) for queue in range(len(options.queues))]
        self._kicked = pack(ToLauncher.KICKED, self._index)
        self._kick_fd = options.kick_fd
        self._was_kicked = False  # since the device last looked at its rings
        self._own_poll = select.poll()
        self._own_descriptors = {
            descriptor: select.POLLIN
            for descriptor in (self._mailbox.fileno(), self._kick_fd)
            if descriptor is not None
        }
        for descriptor in self._own_descriptors:
            self._own_poll.register(descriptor, select.POLLIN)
        self._features = -1
        self._live = False  # whether the rings are the device's to touch: from the first kick until a reset
        self._broken = False  # whether the driver broke a rule, and has not reset the device since
        self._stopping = False
        self._trace_fd = options.trace_fd
        self._trace_from_start = options.trace
        self._tracer: Tracer | None = None
        self._queues = [
            Virtqueue(memory, layout, name=f"{options.name}: queue {number}", inflight=self._control.inflight[number])
            for number, layout in enumerate(options.queues)
        ]
        device.attach(self._queues, self, statistics=self._control.statistics, state=self._control.state)

    def used(self, queue: int) -> None:
        """Tell the launcher that used elements were added to ring `queue`."""
        self._tell(self._used[queue])

    def quit(self) -> None:
        """Tell the launcher that the user asked for the end of the guest."""
        self._tell(pack(ToLauncher.QUIT, self._index))

    def confine(self, confinement: Confinement) -> None:
        """Be locked in and drop the rights, before anything of the guest's was touched. Raises LgmpError."""
        if self._trace_fd is not None:
            self._make_tracer()  # what it imports is out of reach afterwards
        if confinement.user is not None:
            # So that their names can still be taken away, should the launcher be killed now.
            for mailbox in (self._mailbox, self._completions):
                try:  # noqa: SIM105  contextlib is costly to import
                    os.fchown(mailbox.fileno(), *confinement.user[:2])
                except OSError:
                    pass  # there can be no such user here, and what follows says so
        confinement.enter()

    def ready(self) -> None:
        """Tell the launcher that the device is served from now on."""
        self._tell(pack(ToLauncher.READY, self._index))

    def failed(self, text: str) -> None:
        """Tell the launcher that the worker cannot go on, and why."""
        self._tell_text(ToLauncher.FAILED, text)

    def _tell_text(self, kind: ToLauncher, text: str) -> None:
        text = text.encode(errors="replace")[:_FAILED_TEXT_BYTES].decode(errors="ignore")
        self._tell(pack(kind, self._index, text))

    def serve(self) -> None:
        """Serve the device until the launcher says STOP.

        Raises LgmpError for what the worker cannot go on after, LauncherGone when there is nobody left to serve it for.
        """
        device = self._device
        # A predecessor was killed in the middle of this: there may be work, and no kick to tell of it.
        more = self._control.live and self._begin(self._device.resume)
        self._begin_trace()
        while True:
            wanted = device.wants()
            self._was_kicked = False
            if wanted or self._kick_fd is not None:
                raw = self._poll(wanted, more)
            elif more:
                raw = self._mailbox.take()
            else:
                raw = self._mailbox.wait(WATCH_SECONDS)
            if raw is not None:
                self._obey(raw)
            elif not more and not self._was_kicked:
                check_parent(self._launcher)
            if raw is not None or more or self._was_kicked:
                more = self._live and self._serve_rings()
            if self._stopping and not more and not device.busy:
                return

    def _begin(self, resume: Callable[[], None]) -> bool:
        """A driver works with the rings: so does the device from now on. `resume` is to take over what is under way."""
        self._live = True
        self._see_features()
        try:
            for queue in self._queues:
                queue.resume()
            self._begin_trace()  # what is popped again is told of
            resume()
        except RingError as error:
            self._break(error)
        return self._live

    def _serve_rings(self) -> bool:
        try:
            return self._device.serve()
        except RingError as error:
            self._break(error)
            return False

    def _break(self, error: RingError) -> None:
        """The driver broke a rule: its device is no more, until it resets it. Others are not concerned."""
        self._live = False
        self._broken = True
        # In this order: a successor of ours must not find the rings at their start with nobody knowing why.
        if self._tracer is not None:
            self._tracer.broken(str(error))
        self._tell_text(ToLauncher.BROKEN, str(error))
        self._device.reset()

    def _poll(self, wanted: Sequence[tuple[int, int]], more: bool) -> bytes | None:
        """Wait for a message, a kick or one of the `wanted` descriptors, and see to the latter; gives the message."""
        poll = self._own_poll
        if wanted:
            masks = dict(self._own_descriptors)
            for descriptor, events in wanted:
                masks[descriptor] = masks.get(descriptor, 0) | events
            poll = select.poll()
            for descriptor, events in masks.items():
                poll.register(descriptor, events)
        raw = None
        for descriptor, events in poll.poll(0 if more else WATCH_SECONDS * 1000):
            if descriptor == self._mailbox.fileno():
                raw = self._mailbox.take()
            elif descriptor == self._kick_fd:
                self._take_kick()
            else:
                try:
                    self._device.ready(descriptor, events)
                except RingError as error:
                    self._break(error)
        return raw

    def _take_kick(self) -> None:
        """A kick came straight from the guest. Whether that has a driver yet is the launcher's to say."""
        self._forget_kicks()
        if self._live:
            self._control.statistics[KICKS] += 1
            self._see_features()
            self._was_kicked = True
        elif not self._broken:
            self._tell(self._kicked)

    def _forget_kicks(self) -> None:
        if self._kick_fd is not None:
            try:  # noqa: SIM105  contextlib is costly to import
                os.eventfd_read(self._kick_fd)
            except BlockingIOError:
                pass  # there were none

    def _see_features(self) -> None:
        features = self._control.accepted_features
        if features != self._features:
            self._features = features
            self._device.accept(features)
            if self._tracer is not None:
                self._tracer.features(features)

    def _obey(self, raw: bytes) -> None:
        try:
            message = unpack(raw)
        except ValueError as error:
            raise LgmpError(f"a message from the launcher makes no sense: {error}") from error
        what = message[0]
        if what == ToWorker.KICK:
            self._kick()
        elif what == ToWorker.RESET:
            self._live = self._broken = False
            self._forget_kicks()
            self._device.reset()
            self._features = -1
            if self._tracer is not None:
                self._tracer.reset()
            self._tell(pack(ToLauncher.RESET_DONE, self._index))
        elif what == ToWorker.STOP:
            self._see_features()
            self._stopping = True
            self._device.stop()
        elif what == ToWorker.TRACE and self._trace_fd is not None and [*map(type, message)] == [int, int]:
            self._trace(int(message[1]))
        else:
            raise LgmpError(f"a message from the launcher makes no sense: {message}")

    def _kick(self) -> None:
        if self._broken:
            return
        self._control.statistics[KICKS] += 1
        if self._live:
            self._see_features()
        else:
            self._begin(lambda: None)

    def _begin_trace(self) -> None:
        """Its predecessor was traced when it was killed: so is it, from its first request on."""
        if self._trace_from_start and self._trace_fd is not None:
            self._trace(self._trace_from_start)
            self._trace_from_start = 0

    def _trace(self, setting: int) -> None:
        tracer = self._tracer or self._make_tracer()
        tracer.set(setting)

    def _make_tracer(self) -> Tracer:
        # Nothing that a worker needs which nobody traces.
        from workers.traced import Tracer  # noqa: PLC0415

        assert self._trace_fd is not None
        self._tracer = Tracer(self._trace_fd, self._device, self._queues)
        self._tracer.features(max(self._features, 0))
        return self._tracer

    def _tell(self, raw: bytes) -> None:
        while not self._completions.send(raw, WATCH_SECONDS):
            check_parent(self._launcher)


def check_parent(launcher: int) -> None:
    """Raise LauncherGone unless `launcher` is still our parent."""
    if os.getppid() != launcher:
        raise LauncherGone


def run(kind: str, make: Callable[[Options], Device], own: dict[str, str]) -> None:
    """The whole life of a worker; `kind` is what it serves, `make` makes its device, `own` are the options of that.

    Exits with 0 after STOP, with 1 when the device cannot go on or the launcher is gone.
    """
    if "--help" in sys.argv[1:]:
        _help(kind, own)
        return
    sys.exit(_run(kind, make, own))


def _run(kind: str, make: Callable[[Options], Device], own: dict[str, str]) -> int:
    title = f"lgmp-{kind}"
    options: Options | None = None
    device: Device | None = None
    worker: Worker | Server | None = None
    try:
        options = Options(sys.argv[1:], own)
        errors.program = options.program
        _follow(options.launcher)
        device = make(options)
        if options.kind:
            title = f"lgmp-{options.kind}"
        worker = _around(device, options)
        if options.confinement:
            _set_title(title, options)  # where it comes from is out of reach afterwards
            worker.confine(options.confinement)
            _ask_for_death_signal(options.launcher)  # who changes his user is asked again
            worker.ready()
        else:
            worker.ready()
            _set_title(title, options)
        worker.serve()
    except LauncherGone:
        return 1
    except LgmpError as error:
        return _give_up(title, worker, str(error))
    except Exception as error:
        name, author = (options.name, options.author) if options is not None else (title, "lgmp")
        _give_up(title, worker, f"{name}: {type(error).__name__}: {error}; this is a defect of {author}")
        raise
    finally:
        signal.signal(LAUNCHER_DEATH_SIGNAL, signal.SIG_IGN)
        if device:
            device.close()
        if options and os.getppid() != options.launcher:
            for name in filter(None, (options.mailbox, options.completions)):
                unlink(name)
            # Others may have been killed before they could. In this order: who finds the socket looks for the queues.
            unlink_queues_of(options.launcher)
            if options.control_socket is not None:
                try:  # noqa: SIM105  contextlib is costly to import
                    os.unlink(options.control_socket)
                except OSError:
                    pass  # it is gone, or out of reach: whoever lists guests next takes it away
    return 0


def _around(device: Device, options: Options) -> Worker | Server:
    """What has the device work: the bus it is on. Raises LgmpError."""
    if options.vhost_user_fd is None:
        return Worker(options, device)
    from workers.vhost_user import Server  # noqa: PLC0415  the workers of lguest guests have no use for it

    return Server(options, device)


def _give_up(title: str, worker: Worker | Server | None, text: str) -> int:
    """Say why the device cannot go on: to the launcher, or to the user where that is not possible yet."""
    if worker is None:
        say(f"{title}: {text}")
        return 1
    try:  # noqa: SIM105  contextlib is costly to import
        worker.failed(text)
    except LauncherGone:
        pass
    return 1


def _follow(launcher: int) -> None:
    """End when the launcher does, and leave the terminal's signals to it. Raises LauncherGone where it has ended."""
    for standard in range(3):
        # A closed one would be given to the next file that is opened, and written to as if it were what it was.
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if standard else os.O_WRONLY)  # so that its use fails as it should
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def launcher_died(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if os.getppid() != launcher:
            signal.signal(LAUNCHER_DEATH_SIGNAL, signal.SIG_IGN)
            raise LauncherGone

    signal.signal(LAUNCHER_DEATH_SIGNAL, launcher_died)
    # The launcher starts us with signals blocked, so that none finds us unprepared.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _ask_for_death_signal(launcher)


def _ask_for_death_signal(launcher: int) -> None:
    """Have the kernel tell us when the launcher ends. Raises LauncherGone where it has already."""
    _libc.prctl(PR_SET_PDEATHSIG, int(LAUNCHER_DEATH_SIGNAL), 0, 0, 0)
    check_parent(launcher)


def _set_title(title: str, options: Options) -> None:
    """What ps shows: `lgmp-block vda disk.img (guest NAME)`, and `lgmp-block` where there is room for less."""
    words = [title, options.name, *options.arguments]
    if options.guest:
        words.append(f"(guest {options.guest})")
    set_title(" ".join(words), title)


def _help(kind: str, own: dict[str, str]) -> None:
    print(f"Usage: python -m workers.{kind} OPTIONS [-- WHAT]\n\nServes one virtio device of a launcher's guest.\n")
    for option, text in {**_OPTIONS, **_VHOST_USER_OPTIONS, **own}.items():
        shown = f"--{option[:-1]} VALUE" if option.endswith("=") else f"--{option}"
        print(f"  {shown:24}{text}")
