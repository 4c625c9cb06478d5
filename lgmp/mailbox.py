"""The message queues between the launcher and its workers, and what is said over them.

Each worker has two queues, made for it alone: its mailbox carries what the launcher tells it, its completion queue
what it tells the launcher. (One completion queue for all would have to keep its name for as long as a worker may be
started again, and what a dead worker had said could not be told from what its successor says.) A message is a msgpack
array of small integers (and one short text), never guest data. Kicks are level-triggered: a full mailbox means that a
message is waiting, and a worker looks at all its rings after every message, so a kick that finds no room need not be
sent.

Names exist only while a worker starts: both ends hold a queue by its descriptor, and the launcher unlinks the
name once the worker has said READY, so that nothing is left behind even when everything is killed at once.
"""

from __future__ import annotations

import os
import select
from enum import IntEnum

import msgpack
import posix_ipc

from lgmp.errors import LgmpError

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable

# Where Linux shows message queues as files, when mounted (mq_overview(7)).
MQUEUE_DIRECTORY = "/dev/mqueue"
NAME_PREFIX = "lgmp."

# A device has a virtqueue at least, and a bus at most so many.
_MOST_DEVICES = 31

# RLIMIT_MSGQUEUE is 800 KiB a user and fs.mqueue.msg_max 10 messages a queue: both stay small.
MAILBOX_MESSAGES = 8
MAILBOX_MESSAGE_BYTES = 64
COMPLETION_MESSAGES = 4
COMPLETION_MESSAGE_BYTES = 512


class ToWorker(IntEnum):
    """What the launcher tells a worker; the first element of each message."""

    KICK = 1  # [KICK]: look at your rings
    RESET = 2  # [RESET]: the guest reset the device; stop touching its rings, start from position 0, say RESET_DONE
    STOP = 3  # [STOP]: finish what is in the rings, then exit with 0
    TRACE = 4  # [TRACE, setting]: tell the trace socket what goes through the rings (lgmp.tracing.wire); 0: no more


class ToLauncher(IntEnum):
    """What a worker tells the launcher; each message is [kind, device index, ...]."""

    READY = 1  # [READY, device]: started; the names of its queues are needed no more
    USED = 2  # [USED, device, queue]: used elements were added to that ring
    RESET_DONE = 3  # [RESET_DONE, device]
    QUIT = 4  # [QUIT, device]: the user asked for the end of the guest (three ^C)
    FAILED = 5  # [FAILED, device, text]: the device cannot go on; the worker exits after this
    BROKEN = 7  # [BROKEN, device, text]: the driver broke a rule; its rings are left alone until it resets the device
    KICKED = 6  # [KICKED, device]: kicked past the launcher, but not told yet that the driver has begun: KICK if so


def queue_name(launcher_pid: int, what: str) -> str:
    """The name of a queue of the launcher with that process id, as for mq_open(3)."""
    return f"/{NAME_PREFIX}{launcher_pid}.{what}"


def pack(*message: int | str) -> bytes:
    """A message as bytes."""
    packed: bytes = msgpack.packb(message)
    return packed


def unpack(raw: bytes) -> list[int | str]:
    """A message from bytes; the sender is not trusted.

    Raises ValueError where `raw` is not a non-empty msgpack array of integers and strings that begins with an integer.
    """
    try:
        message = msgpack.unpackb(raw, max_array_len=8, max_map_len=0, max_ext_len=0, max_bin_len=0)
    except Exception as error:  # msgpack raises a dozen kinds, and what it is does not matter
        raise ValueError(f"not a message: {raw[:32]!r}") from error
    # type() and not isinstance(): a bool is no integer here.
    if type(message) is not list or not message or type(message[0]) is not int:
        raise ValueError(f"not a message: {raw[:32]!r}")
    if not all(type(element) in (int, str) for element in message):
        raise ValueError(f"not a message: {raw[:32]!r}")
    return message


def unlink(name: str) -> bool:
    """Take the name of a queue away; False where there is none, or it is another user's."""
    try:
        posix_ipc.unlink_message_queue(name)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return False
    return True


def _go_on() -> None:
    """What to do when a signal came: nothing, its handler has run."""


class Mailbox:
    """One end of a message queue. `fileno()` can be polled for readability.

    A signal does not end a wait. Its Python handler runs, but what that raises is lost in posix_ipc; who wants to raise
    something sets `on_signal`, which is called after the handler and whose exception does end the wait.

    A `polled` end never waits in the queue itself: what waits there is a poll(2). Its `post` and `take` are one system
    call each, where others look at the clock as well (a system call of its own on old machines).
    """

    def __init__(self, queue: posix_ipc.MessageQueue, name: str, polled: bool) -> None:
        """Take an open queue; `create` and `open` are what callers want."""
        self.on_signal: Callable[[], None] = _go_on
        self._queue = queue
        self.name = name
        self._polled = polled
        # The timeout of a send and a receive that do not wait.
        self._at_once = None if polled else 0
        if polled:
            queue.block = False

    @classmethod
    def create(cls, name: str, messages: int, message_bytes: int, polled: bool = False) -> Mailbox:
        """Make the queue `name`, its owner's alone, for `messages` messages of at most `message_bytes` bytes.

        Raises LgmpError where the system's or the user's limits forbid it. A leftover of the same name (from a
        process that had this process id before) is replaced.
        """
        options = {"max_messages": messages, "max_message_size": message_bytes, "mode": 0o600}
        try:
            try:
                queue = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, **options)
            except posix_ipc.ExistentialError:
                posix_ipc.unlink_message_queue(name)
                queue = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, **options)
            os.fchmod(queue.mqd, options["mode"])  # whatever the umask has left of it
        except (OSError, MemoryError, ValueError, posix_ipc.Error) as error:
            raise LgmpError(
                f"cannot make the message queue {name}: {error}; see `ulimit -q` and /proc/sys/fs/mqueue"
            ) from error
        return cls(queue, name, polled)

    @classmethod
    def open(cls, name: str, polled: bool = False) -> Mailbox:
        """Open the existing queue `name`. Raises LgmpError where there is none or it is another user's."""
        try:
            return cls(posix_ipc.MessageQueue(name), name, polled)
        except (OSError, posix_ipc.Error) as error:
            raise LgmpError(f"cannot open the message queue {name}: {error}") from error

    def fileno(self) -> int:
        """The descriptor of the queue, for poll(2)."""
        descriptor: int = self._queue.mqd
        return descriptor

    def post(self, raw: bytes) -> bool:
        """Send without waiting; False where the queue is full."""
        return self._send(raw, self._at_once)

    def send(self, raw: bytes, timeout: float | None = None) -> bool:
        """Send, waiting for room; `timeout` in seconds (None: for ever); False where it ran out."""
        if not self._polled:
            return self._send(raw, timeout)
        while not self.post(raw):
            if not self._poll(select.POLLOUT, timeout):
                return False
        return True

    def take(self) -> bytes | None:
        """Receive without waiting; None where there is nothing."""
        return self._receive(self._at_once)

    def receive(self) -> bytes:
        """Receive, waiting for a message."""
        while (raw := self.wait(None)) is None:
            pass
        return raw

    def wait(self, timeout: float | None) -> bytes | None:
        """Receive, waiting `timeout` seconds at most (None: for ever); None where nothing came."""
        if not self._polled:
            return self._receive(timeout)
        while (raw := self.take()) is None:
            if not self._poll(select.POLLIN, timeout):
                return None
        return raw

    def _send(self, raw: bytes, timeout: float | None) -> bool:
        while True:
            try:
                self._queue.send(raw, timeout=timeout)
            except posix_ipc.BusyError:
                return False
            except posix_ipc.SignalError:
                self.on_signal()
                continue
            return True

    def _receive(self, timeout: float | None) -> bytes | None:
        while True:
            try:
                raw: bytes = self._queue.receive(timeout=timeout)[0]
            except posix_ipc.BusyError:
                return None
            except posix_ipc.SignalError:
                self.on_signal()
                continue
            return raw

    def _poll(self, events: int, timeout: float | None) -> bool:
        """Wait for room or a message, whoever takes it; False where the time ran out."""
        poll = select.poll()
        poll.register(self.fileno(), events)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def unlink(self) -> None:
        """Take the queue's name away; who has it open keeps it. A name that is gone already is fine."""
        unlink(self.name)

    def close(self) -> None:
        """Close this end."""
        self._queue.close()


def create_pair(what: str, polled: bool = False) -> tuple[Mailbox, Mailbox]:
    """The queues of a worker that this process is about to start: its mailbox, named for `what`, and its completions.

    Raises LgmpError, and then there is neither.
    """
    name = queue_name(os.getpid(), what)
    mailbox = Mailbox.create(name, MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES, polled)
    try:
        return mailbox, Mailbox.create(f"{name}.done", COMPLETION_MESSAGES, COMPLETION_MESSAGE_BYTES, polled)
    except LgmpError:
        mailbox.unlink()
        mailbox.close()
        raise


def sweep_stale_queues(directory: str | os.PathLike[str] = MQUEUE_DIRECTORY) -> list[str]:
    """Unlink queues of launchers that are no more; gives the names it took away.

    It sees them only where the kernel's queue file system is mounted on `directory` (it is, on systemd systems); who
    knows the process id of such a launcher has `unlink_queues_of`. Queues that belong to another user are left alone.
    """
    swept: list[str] = []
    try:
        names = os.listdir(directory)
    except OSError:
        return swept
    for name in names:
        if not name.startswith(NAME_PREFIX):
            continue
        pid = name[len(NAME_PREFIX) :].split(".", 1)[0]
        if not pid.isdigit() or os.path.exists(f"/proc/{pid}"):
            continue
        if unlink("/" + name):
            swept.append(name)
    return swept


def unlink_queues_of(launcher_pid: int) -> None:
    """Unlink what a launcher that is no more may have left, by the names that devices of lgmp's own have.

    It and its workers were all killed at once while those started: later the queues have no names.
    """
    numbers = range(_MOST_DEVICES)
    letters = "abcdefghijklmnopqrstuvwxyz"
    disks = [*(f"vd{letter}" for letter in letters), *(f"vda{letter}" for letter in letters)][:_MOST_DEVICES]
    for device in ("console", *disks, *(f"{kind}{number}" for kind in ("eth", "rng") for number in numbers)):
        name = queue_name(launcher_pid, device)
        unlink(name)
        unlink(f"{name}.done")
