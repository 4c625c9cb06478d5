"""`lgmp serve`: the process above a worker that is served by vhost-user.

It opens the backing and the socket, and starts the worker, which does all the rest. It is there for what has to outlive
that: to take the socket's name away, to give a terminal its modes back, and to start the worker again (--supervise).
Front ends that come meanwhile wait in the socket, which is its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from lgmp.confinement import Confinement
from lgmp.control import ControlPage
from lgmp.errors import LgmpError, say
from lgmp.restarts import Restarts, describe_end
from lgmp.serving.models import ServeOption, open_model
from lgmp.supervisor import HELD_BACK_WHILE_STARTING
from lgmp.title import set_title

if TYPE_CHECKING:
    from lgmp.devices import Model

# sys/un.h, without the NUL.
_LONGEST_PATH = 107
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# How many front ends wait at most while another is served.
_BACKLOG = 16
# How long a worker may take to end, in seconds, before it is killed.
_PATIENCE = 5.0


class ServeOptions(NamedTuple):
    """The command line. Either `socket`, a path, or `descriptor`."""

    device: ServeOption
    socket: str | None = None
    descriptor: int | None = None
    once: bool = False
    supervise: bool = False
    chroot: str | None = None
    username: str | None = None


def serve(options: ServeOptions) -> int:
    """Serve a device until SIGTERM, SIGINT, or the end of what was to be served; gives the exit status.

    Raises LgmpError where it cannot be begun, with the remedy.
    """
    # From here on they are waited for, and do not end us in the middle of something.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDING, signal.SIGCHLD})
    old_handler = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    try:
        with contextlib.ExitStack() as stack:
            confinement = Confinement.check(options.chroot, options.username)
            endpoint = _Endpoint.open(options, stack)
            model = open_model(options.device, stack)
            return _Serving(options, model, endpoint, confinement, stack).run()
    finally:
        signal.signal(signal.SIGCHLD, old_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


class _Endpoint:
    """The socket: `path` is its name, if it has one; `is_listening`, or connected to a front end already."""

    def __init__(self, descriptor: int, *, path: str | None, is_listening: bool) -> None:
        self.descriptor = descriptor
        self.path = path
        self.is_listening = is_listening

    @classmethod
    def open(cls, options: ServeOptions, stack: contextlib.ExitStack) -> _Endpoint:
        """What the command line names; `stack` closes it and takes its name away. Raises LgmpError."""
        if options.socket is not None:
            path = os.path.abspath(options.socket)
            listener = stack.enter_context(_listen(path))
            stack.callback(_unlink, path, os.stat(path).st_ino)
            return cls(listener.fileno(), path=path, is_listening=True)
        assert options.descriptor is not None
        descriptor = options.descriptor
        is_listening = _is_listening(descriptor)
        if options.supervise and not is_listening:
            raise LgmpError(
                f"--fd {descriptor} is a connection, and it would end with the worker: "
                "--supervise takes --socket, or a socket that listens"
            )
        if descriptor <= 2:
            # A worker's own are others.
            descriptor = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
            stack.callback(os.close, descriptor)
        return cls(descriptor, path=None, is_listening=is_listening)

    def __str__(self) -> str:
        return self.path if self.path is not None else f"descriptor {self.descriptor}"


def _listen(path: str) -> socket.socket:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise LgmpError(f"{path} is too long for the name of a socket: choose one of at most {_LONGEST_PATH} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LgmpError(f"cannot listen at {path}: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Take away the name of a socket that nobody listens at any more. Raises LgmpError where it is anything else."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise LgmpError(f"{path} is there already, and is no socket: give --socket another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # somebody is there, and busy
    raise LgmpError(f"another process serves at {path}: end that, or give --socket another name")


def _unlink(path: str, inode: int) -> None:
    # Somebody may have put another in its place.
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def _is_listening(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as own:
            if own.family != socket.AF_UNIX or own.type != socket.SOCK_STREAM:
                raise LgmpError(f"--fd {descriptor} is no stream socket of AF_UNIX")
            return bool(own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise LgmpError(f"--fd {descriptor} is no socket that is open here: {error.strerror or error}") from error


class _Serving:
    """One device, and one worker of it after another."""

    def __init__(
        self,
        options: ServeOptions,
        model: Model,
        endpoint: _Endpoint,
        confinement: Confinement,
        stack: contextlib.ExitStack,
    ) -> None:
        self._options = options
        self._model = model
        self._endpoint = endpoint
        self._confinement = confinement
        # What a worker's successor goes by; the rings are the front end's to remember.
        self._control: ControlPage | None = None
        if options.supervise:
            self._control = ControlPage.create(())
            stack.callback(self._control.close)
        self._history = Restarts()
        self._process: subprocess.Popen[bytes]
        self._stack = stack

    def run(self) -> int:
        """Until the end; gives the exit status."""
        model = self._model
        set_title(f"lgmp: serve {model.name} {model.details} at {self._endpoint}")
        self._start()
        self._stack.callback(self._end_process)
        say(f"serving {model.name} ({model.details}) at {self._endpoint}")
        while True:
            number = signal.sigwaitinfo({*_ENDING, signal.SIGCHLD}).si_signo
            if number in _ENDING:
                self._end_process()
                return 128 + number
            code = self._process.poll()
            if code is None:
                continue  # passt's end, or it was stopped
            if code == 0:
                return 0
            if not self._start_again(code):
                return 1

    def _done(self) -> tuple[int, ...]:
        return tuple(self._control.statistics) if self._control is not None else ()

    def _start(self) -> None:
        """Start a worker. Raises LgmpError."""
        model, endpoint = self._model, self._endpoint
        descriptors = [endpoint.descriptor, *model.specification.descriptors]
        command = [
            *(sys.executable, "-P", "-m", model.specification.module),
            *("--name", model.name),
            *("--vhost-user-fd", str(endpoint.descriptor)),
            *(("--once",) if self._options.once else ()),
            *("--virtio-features", f"{model.features:#x}"),
            *("--queues", str(model.queues)),
            *(("--config-space", model.config.hex()) if model.config else ()),
            *("--launcher", str(os.getpid())),
        ]
        if self._control is not None:
            descriptors.append(self._control.fd)
            command += ["--control-fd", str(self._control.fd)]
        if endpoint.path is not None:
            command += ["--control-socket", endpoint.path]
        command += [*self._confinement.options(), *model.specification.options]
        self._history.started(self._done())
        standard = None if model.specification.has_terminal else subprocess.DEVNULL
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK_WHILE_STARTING)
        try:
            self._process = subprocess.Popen(command, stdin=standard, stdout=standard, pass_fds=descriptors)
        except OSError as error:
            raise LgmpError(f"cannot start the worker of {model.name}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)

    def _start_again(self, code: int) -> bool:
        """A worker ended that should not have: start another, if that is wanted and of use."""
        why = describe_end(f"worker {self._model.name} (pid {self._process.pid})", code)
        if not self._options.supervise:
            if code < 0:
                say(f"{why}; with --supervise it would be started again")
            return False
        pause = self._history.pause(code, self._done(), was_ready=True)
        if pause is None:
            say(f"{why}; it keeps ending, and is given up")
            return False
        if pause:
            time.sleep(pause)
        try:
            self._model.specification.before_restart()
            self._start()
        except LgmpError as error:
            say(f"{why}; it has no successor ({error})")
            return False
        say(f"{why}; started again as pid {self._process.pid}")
        return True

    def _end_process(self) -> None:
        """Have the worker end, and wait until it has."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
