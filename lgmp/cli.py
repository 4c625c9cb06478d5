"""The commands: `lgmp run`, `lgmp demo`, `lgmp doctor`, `lgmp ps` and so on."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from lgmp import __version__
from lgmp.errors import LgmpError, say
from lgmp.hosts.choice import GUEST_ABI_NAMES, HOSTS, LGUEST_ABI_NAMES, LGUEST_DEVICE

if TYPE_CHECKING:
    from lgmp.devices import DeviceOption
    from lgmp.launcher import End
    from lgmp.serving.models import ServeOption

_DESCRIPTION = """\
lgmp launches lguest guests: 32-bit Linux kernels built with CONFIG_LGUEST_GUEST.
It needs no root and no kernel module, though it uses /dev/lguest where there is one, and every device of a guest is
a process of its own.

commands:
  run             boot a kernel: lgmp run [options] MEM KERNEL [ARG...]
  demo            boot the bundled test guest with a scratch disk, and show what runs where
  doctor          say what this machine can do, and what to do about the rest
  ps              list your guests, and the workers of each: lgmp ps [--json] [GUEST]
  top             the same, live on this terminal: lgmp top [GUEST]
  stop            end a guest: lgmp stop [GUEST]
  pause, resume   have a guest stand still, and go on: lgmp pause [GUEST]
  restart-worker  replace the worker of a device: lgmp restart-worker DEVICE [GUEST]
  trace           show every request of a device as it happens: lgmp trace [GUEST] DEVICE [-o FILE]
  record          keep them all, contents and all, in a file: lgmp record [GUEST] DEVICE -o FILE
  replay          have a worker do them again, without a guest: lgmp replay FILE [--device ...]
  serve           a device for QEMU and others, by vhost-user: lgmp serve block FILE --socket PATH

GUEST is a guest's name or its launcher's process id; it may be left out where there is only one.

`lgmp COMMAND --help` says more.
"""

_RUN_EPILOG = """\
examples:
  lgmp run 64 vmlinux --initrd initrd.gz console=hvc0
  lgmp run 64M bzImage --block disk.img root=/dev/vda console=hvc0
  lgmp run 256 vmlinux --block root.img,ro --block scratch.img -- root=/dev/vda ro -s

The guest's console is this terminal: what you type goes to the guest, ^C included. Three ^C within a second end
the guest. Options may stand before or after MEM and KERNEL; what follows `--` goes to the kernel untouched.

exit status:
  0      the guest powered off
  1      the guest died, or could not start: one line on stderr says why
  2      three ^C
  128+N  signal N ended the launcher
"""

_DEMO_DESCRIPTION = """\
Boot the test guest that comes with lgmp, with a scratch disk, and say which process does what.
With a terminal you get the guest's prompt (`help` lists its commands, `poweroff` ends it). Without one
(lgmp demo </dev/null) the guest checks itself and its disk, and the exit status is the result.
"""


class _Parser(argparse.ArgumentParser):
    """A parser that exits with 1 for what it does not understand, since 2 means three ^C."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"lgmp: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's own arguments) names; gives its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return carry_out(lambda: _dispatch(words))


def carry_out(command: Callable[[], int]) -> int:
    """Run a command; gives its exit status, 1 and a line on stderr for what goes wrong."""
    try:
        _open_missing_stdio()
        try:
            return command()
        finally:
            sys.stdout.flush()
    except LgmpError as error:
        say(str(error))
    except KeyboardInterrupt:  # before the guest's, or after it
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _discard_stdout()  # its reader has gone, and wants to hear no more of it
    except OSError as error:
        _say_system_error(error)
    return 1


def _dispatch(words: Sequence[str]) -> int:
    if words and words[0] in _COMMANDS:
        return _COMMANDS[words[0]](words[1:])
    _top_parser().parse_args(words)
    return 1


def _open_missing_stdio() -> None:
    """Open /dev/null where stdin, stdout or stderr is closed: no disk may take its place and get what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest descriptor that is free: this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _discard_stdout() -> None:
    """What is still to be printed there cannot be; so that Python does not complain of it while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say_system_error(error: OSError) -> None:
    """What the system refused us, and so has no message of our own."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()
    where = f"{error.filename}: " if error.filename else ""
    remedy = "; allow more with `ulimit -n`" if error.errno == errno.EMFILE else ""
    say(f"{where}{error.strerror or error}{remedy}")


def _top_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lgmp",
        usage="lgmp COMMAND ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lgmp {__version__}")
    parser.add_argument("command", choices=sorted(_COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def run_parser() -> argparse.ArgumentParser:
    """The parser of `lgmp run`."""
    parser = _Parser(
        prog="lgmp run",
        usage="lgmp run [options] MEM KERNEL [ARG...]",
        description="Boot an lguest kernel.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("memory", metavar="MEM", help="memory of the guest: 64 is MiB, also 64M, 1G")
    parser.add_argument(
        "kernel", metavar="KERNEL", help="vmlinux (ELF) or bzImage, i386, CONFIG_LGUEST_GUEST=y, no PAE"
    )
    parser.add_argument(
        "arguments", metavar="ARG", nargs="*", default=[], help="kernel arguments, for example console=hvc0"
    )
    parser.add_argument(
        "--block",
        dest="devices",
        type=_block,
        action="append",
        default=[],
        metavar="FILE[,ro]",
        help="a disk, file or block device; the first is vda; with ,ro the guest may only read it",
    )
    parser.add_argument(
        "--tunnet",
        dest="devices",
        type=_tunnet,
        action="append",
        metavar="ADDRESS[/PREFIX][:MAC]|bridge:NAME[:MAC]",
        help="a network device (eth0) on a tap of this machine, which has ADDRESS or is in the bridge NAME; takes root",
    )
    parser.add_argument(
        "--net",
        dest="devices",
        type=_net,
        action="append",
        metavar="user",
        help="a network device without root: the guest is 10.0.2.15 (DHCP says so too), this machine is 10.0.2.2 to it",
    )
    parser.add_argument(
        "--rng",
        dest="devices",
        type=_rng,
        action="append",
        metavar="[=FILE]",
        help="random bytes for the guest; --rng alone has them from /dev/urandom, --rng=FILE from FILE",
    )
    parser.add_argument(
        "--device",
        dest="devices",
        type=_device,
        action="append",
        metavar="MODULE:CLASS[,KEY=VALUE...]",
        help="a device of your own, a class of a Python module or of FILE.py; KEY=VALUE go to the class",
    )
    parser.add_argument("--initrd", metavar="FILE", help="the initial RAM disk")
    parser.add_argument(
        "--host",
        choices=HOSTS,
        default="auto",
        help=f"what runs the guest: the kernel's {LGUEST_DEVICE} or the embedded host (default: the kernel's, where "
        "it can be opened)",
    )
    parser.add_argument(
        "--lguest-device", metavar="PATH", help=f"run the guest on this device (default: {LGUEST_DEVICE})"
    )
    parser.add_argument(
        "--lguest-abi",
        choices=LGUEST_ABI_NAMES,
        default="auto",
        help="how that device is spoken to: as in kernels from that version on (default: as the running kernel's is)",
    )
    parser.add_argument(
        "--guest-abi",
        choices=GUEST_ABI_NAMES,
        default="auto",
        help="how the guest speaks with its host: as kernels from that version on do (default: as its version says)",
    )
    parser.add_argument(
        "--on-crash",
        choices=("restart", "stop"),
        default="restart",
        help="what becomes of a worker that ends of itself or is killed: it is started again, and its device goes on "
        "where it was, or the guest ends (default: restart; one that keeps ending is given up, and its device with it)",
    )
    parser.add_argument(
        "--on-device-error",
        choices=("isolate", "die"),
        default="isolate",
        help="what becomes of a guest that breaks a rule of a device: it loses the device until it resets that, or it "
        "ends (default: isolate)",
    )
    parser.add_argument("--chroot", metavar="DIR", help="lock the workers in DIR, which may be empty; takes root")
    parser.add_argument(
        "--username", metavar="NAME", help="run the workers as the user NAME, with none of root's rights; takes root"
    )
    parser.add_argument("--name", help="what to call the guest in ps (default: the kernel's name and our process id)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is laid out where, on stderr")
    return parser


def _run(words: Sequence[str]) -> int:
    # Imported here, so that --help and doctor work where the rest cannot.
    from lgmp.launcher import GuestOptions, launch  # noqa: PLC0415
    from lgmp.loader.memory_size import check_memory_size, parse_memory_size  # noqa: PLC0415

    ours, separator, kernels = _partition(words, "--")
    # What follows --rng is no value of it unless there is a "=": it may be MEM.
    ours = ["--rng=" if word == "--rng" else word for word in ours]
    arguments = run_parser().parse_intermixed_args(ours)
    memory_bytes = parse_memory_size(arguments.memory)
    check_memory_size(memory_bytes)
    name = arguments.name
    if name is not None and not name.isprintable():
        raise LgmpError(f"{name!r} cannot be a guest's name: use printable characters")
    options = GuestOptions(
        memory_bytes=memory_bytes,
        kernel=arguments.kernel,
        arguments=(*arguments.arguments, *(kernels if separator else ())),
        initrd=arguments.initrd,
        devices=tuple(arguments.devices),
        host=arguments.host,
        lguest_device=arguments.lguest_device,
        lguest_abi=arguments.lguest_abi,
        guest_abi=arguments.guest_abi,
        name=name,
        chroot=arguments.chroot,
        username=arguments.username,
        on_crash=arguments.on_crash,
        on_device_error=arguments.on_device_error,
        verbose=arguments.verbose,
    )
    return finish(launch(options))


def _block(text: str) -> DeviceOption:
    from lgmp.devices import BlockOption  # noqa: PLC0415

    path, comma, suffix = text.rpartition(",")
    return BlockOption(path, True) if comma and suffix == "ro" else BlockOption(text)


def _tunnet(text: str) -> DeviceOption:
    from lgmp.network import TapOption  # noqa: PLC0415

    return TapOption.parse(text)


def _net(text: str) -> DeviceOption:
    from lgmp.network import UserOption  # noqa: PLC0415

    if text != "user":
        raise LgmpError(f"--net {text}: there is --net user; for a tap of this machine there is --tunnet")
    return UserOption()


def _rng(text: str) -> DeviceOption:
    from lgmp.devices import RngOption  # noqa: PLC0415

    return RngOption(text) if text else RngOption()


def _device(text: str) -> DeviceOption:
    from lgmp.devices import CustomOption  # noqa: PLC0415

    return CustomOption(text)


def _partition(words: Sequence[str], separator: str) -> tuple[Sequence[str], bool, Sequence[str]]:
    if separator not in words:
        return words, False, ()
    at = words.index(separator)
    return words[:at], True, words[at + 1 :]


def finish(end: End) -> int:
    """Say how a guest ended, or start it again if that is what it wanted; gives the exit status."""
    if end.message is not None:
        say(end.message)
    if end.reboot:
        # As every lguest launcher: the same process, the same arguments, from the start.
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError as error:
            raise LgmpError(f"Could not exec {sys.executable}: {error.strerror}") from error
    return end.code


def _demo(words: Sequence[str]) -> int:
    _Parser(
        prog="lgmp demo",
        usage="lgmp demo",
        description=_DEMO_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(words)
    from lgmp.demo import demo  # noqa: PLC0415

    return finish(demo())


def _doctor(words: Sequence[str]) -> int:
    _Parser(
        prog="lgmp doctor",
        usage="lgmp doctor",
        description="Say what this machine can do for lgmp, and the remedies. Exits with 1 where no guest can run.",
    ).parse_args(words)
    from lgmp.doctor import doctor  # noqa: PLC0415

    return doctor()


_PS_EPILOG = """\
The columns: RST how often it was started again; REQS requests; IN and OUT bytes given to the guest and taken from it;
KICKS by the guest, INTS interrupts to it; ERR requests answered with an error, frames dropped and so on; CPU time and
memory (its part of what is shared, where the system says). Below each worker: what its device stands on, the positions
of its queues (modulo 65536), and the last thing that went wrong.

--json has all of that and more, as an array of guests.
"""

_TOP_EPILOG = """\
Twice a second, all a second's worth: REQ/s requests; IN/s and OUT/s bytes given to the guest and taken from it; KICK/s
by the guest, INT/s interrupts to it. FLY are the requests in flight just now, RST the times that the worker was started
again, ERR requests answered with an error, frames dropped and so on.

Keys: q quits; arrows, PageUp and PageDown show what finds no room.
"""


def _guest_parser(command: str, words: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command to a guest that runs; `words` are its own, before GUEST."""
    parser = _Parser(
        prog=f"lgmp {command}",
        usage=f"lgmp {command} {words}[GUEST]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if words == "DEVICE ":
        parser.add_argument("device", metavar="DEVICE", help="the device, for example vda; `lgmp ps` shows them")
    parser.add_argument(
        "guest",
        metavar="GUEST",
        nargs="?",
        help="the guest's name or its launcher's process id; may be left out where there is only one",
    )
    return parser


def _ps(words: Sequence[str]) -> int:
    parser = _guest_parser("ps", "[--json] ", "List your guests, and the workers of each.", _PS_EPILOG)
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    arguments = parser.parse_args(words)
    from lgmp.watching.ps import ps  # noqa: PLC0415

    return ps(arguments.guest, arguments.json)


def _top(words: Sequence[str]) -> int:
    parser = _guest_parser("top", "", "Show your guests and the workers of each, live on this terminal.", _TOP_EPILOG)
    arguments = parser.parse_args(words)
    from lgmp.watching.top import top  # noqa: PLC0415

    return top(arguments.guest)


def _stop(words: Sequence[str]) -> int:
    arguments = _guest_parser(
        "stop", "", "End a guest, and wait until it has. Its launcher exits with 0; the guest is not asked."
    ).parse_args(words)
    from lgmp.watching.commands import stop  # noqa: PLC0415

    return stop(arguments.guest)


def _pause(words: Sequence[str]) -> int:
    arguments = _guest_parser(
        "pause", "", "Have a guest stand still until `lgmp resume`. Its workers finish what it has asked them for."
    ).parse_args(words)
    from lgmp.watching.commands import pause  # noqa: PLC0415

    return pause(arguments.guest)


def _resume(words: Sequence[str]) -> int:
    arguments = _guest_parser("resume", "", "Have a guest that was paused go on.").parse_args(words)
    from lgmp.watching.commands import resume  # noqa: PLC0415

    return resume(arguments.guest)


def _restart_worker(words: Sequence[str]) -> int:
    arguments = _guest_parser(
        "restart-worker",
        "DEVICE ",
        "Replace the worker of a device by a new one, also where it was given up. The guest notices nothing of it.",
    ).parse_args(words)
    from lgmp.watching.commands import restart_worker  # noqa: PLC0415

    return restart_worker(arguments.device, arguments.guest)


_TRACE_EPILOG = """\
A disk's requests are a line each: when it was taken, what it is, its sector and length, what became of it, and how long
the worker had it. A network device's are a line for each frame; with -o they go to FILE as a capture for Wireshark
(pcapng), and `-o -` can be piped to one: lgmp trace eth0 -o - | tshark -r -. A console's are its texts; with -o FILE
gets what the guest wrote, as it is. Those of other devices are shown in hexadecimal.

^C ends the trace. The guest and the worker go on as before, and while nobody traces it a worker does nothing for it.
"""

_RECORD_EPILOG = """\
FILE holds all that went through the rings: what is on the disk and the wire is in it, so only you may read it. Keep a
copy of the disk from before, or `lgmp replay` has nothing to begin with. DEVICES.md has the format. ^C ends it.
"""

_REPLAY_EPILOG = """\
KIND is what the worker is to stand on:
  block,disk=FILE[,ro][,inplace]  the disk as it was when the recording began; what is written goes to a copy of it,
                                  with inplace to FILE itself
  net, console, rng               the recording is the other side as well
  MODULE:CLASS[,KEY=VALUE...]     a device of your own, as --device of `lgmp run` has it
Without --device it is as in the recording; but a disk has to be given, and so has a device of your own.

exit status:
  0  the same answers
  1  others, or the worker ended: stdout says which
"""


def _traced_parser(command: str, words: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command about a device of a guest that runs; `words` follow those."""
    parser = _Parser(
        prog=f"lgmp {command}",
        usage=f"lgmp {command} [GUEST] DEVICE {words}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "guest",
        metavar="GUEST",
        nargs="?",
        help="the guest's name or its launcher's process id; may be left out where there is only one",
    )
    parser.add_argument("device", metavar="DEVICE", help="the device, for example vda; `lgmp ps` shows them")
    return parser


def _trace(words: Sequence[str]) -> int:
    parser = _traced_parser(
        "trace", "[-o FILE]", "Show every request of a device of a running guest as it happens.", _TRACE_EPILOG
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where it goes, `-` is stdout; net: as pcapng")
    arguments = parser.parse_args(words)
    from lgmp.tracing.trace import trace  # noqa: PLC0415

    return trace(arguments.guest, arguments.device, arguments.output)


def _record(words: Sequence[str]) -> int:
    parser = _traced_parser(
        "record", "-o FILE", "Keep every request of a device of a running guest, for `lgmp replay`.", _RECORD_EPILOG
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="where it goes")
    arguments = parser.parse_args(words)
    from lgmp.tracing.trace import record  # noqa: PLC0415

    return record(arguments.guest, arguments.device, arguments.output)


def _replay(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="lgmp replay",
        usage="lgmp replay FILE [--device KIND[,...]] [--timing] [--patience SECONDS]",
        description="Have a worker do again what `lgmp record` has kept, without a guest, and compare its answers.",
        epilog=_REPLAY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the recording")
    parser.add_argument("--device", metavar="KIND[,...]", help="what serves it, and what that stands on: see below")
    parser.add_argument("--timing", action="store_true", help="at the pace of the recording (default: at once)")
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="how long an answer may take (default: 10)",
    )
    arguments = parser.parse_args(words)
    from lgmp.tracing.replay import replay  # noqa: PLC0415

    return replay(arguments.file, arguments.device, timing=arguments.timing, patience=arguments.patience)


_SERVE_EPILOG = """\
examples:
  lgmp serve block disk.img --socket /tmp/vda.sock
  lgmp serve net --tap tap0 --socket /tmp/net.sock --supervise
  lgmp serve --device mine.py:Echo --socket /tmp/echo.sock

Front ends (QEMU, cloud-hypervisor, crosvm) come and go, one at a time. README.md has their command lines. The memory of
their guests has to be shared: -object memory-backend-memfd,share=on for QEMU.

exit status:
  0      the only front end has gone (--once, or --fd with a connection)
  1      it could not be served, or its worker ended: a line on stderr says why
  128+N  signal N ended it
"""

_SERVE_KINDS = ("block", "net", "rng", "console")


def serve_parser() -> argparse.ArgumentParser:
    """The parser of `lgmp serve`."""
    parser = _Parser(
        prog="lgmp serve",
        usage="lgmp serve KIND [WHAT] --socket PATH [options]",
        description="Serve a device to the guest of another virtual machine monitor, by vhost-user.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="KIND", nargs="?", choices=_SERVE_KINDS, help=", ".join(_SERVE_KINDS))
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        help="block: the disk, a file or block device; rng: where random bytes come from (default: /dev/urandom)",
    )
    parser.add_argument("--socket", "--socket-path", metavar="PATH", help="the socket to listen at")
    parser.add_argument("--fd", type=int, metavar="N", help="an open socket instead, which listens or is connected")
    parser.add_argument("--once", action="store_true", help="end when the first front end goes")
    parser.add_argument(
        "--supervise", action="store_true", help="start the worker again when it ends; front ends that reconnect go on"
    )
    parser.add_argument("--chroot", metavar="DIR", help="lock the worker in DIR, which may be empty; takes root")
    parser.add_argument("--username", metavar="NAME", help="run the worker as the user NAME; takes root")
    block = parser.add_argument_group("block")
    block.add_argument("--read-only", action="store_true", help="the guest may only read it")
    block.add_argument("--serial", metavar="TEXT", help="its serial number (default: the name of the file)")
    block.add_argument("--num-queues", type=int, metavar="N", help="how many rings a driver may use (default: 1)")
    net = parser.add_argument_group("net")
    net.add_argument("--tap", metavar="NAME", help="a tap that is there")
    net.add_argument("--tap-fd", type=int, metavar="N", help="an open tap")
    net.add_argument("--tunnet", metavar="ADDRESS[/PREFIX][:MAC]|bridge:NAME[:MAC]", help="a tap to be made, as of run")
    net.add_argument("--net", choices=("user",), help="a user-mode network, which takes no rights (passt)")
    net.add_argument("--mac", help="the guest's address, for front ends that ask (QEMU does not)")
    own = parser.add_argument_group("a device of your own, in the place of KIND")
    own.add_argument("--device", metavar="MODULE:CLASS[,KEY=VALUE...]", help="a class of a Python module or of FILE.py")
    return parser


def _serve(words: Sequence[str]) -> int:
    from lgmp.serving.serve import ServeOptions, serve  # noqa: PLC0415

    arguments = serve_parser().parse_intermixed_args(words)
    if (arguments.socket is None) == (arguments.fd is None):
        raise LgmpError("lgmp serve takes either --socket PATH or --fd N")
    options = ServeOptions(
        device=_served_device(arguments),
        socket=arguments.socket,
        descriptor=arguments.fd,
        once=arguments.once,
        supervise=arguments.supervise,
        chroot=arguments.chroot,
        username=arguments.username,
    )
    return serve(options)


# Which options belong to which kind, by their names in argparse.
_SERVE_OPTIONS = {
    "block": ("read_only", "serial", "num_queues"),
    "net": ("tap", "tap_fd", "tunnet", "net", "mac"),
}


def _served_device(arguments: argparse.Namespace) -> ServeOption:
    """What is to be served. Raises LgmpError where the words do not go together."""
    from lgmp.devices import CustomOption, RngOption  # noqa: PLC0415
    from lgmp.serving.models import ServeBlock, ServeConsole, ServeNet  # noqa: PLC0415

    kind = arguments.kind
    if (kind is None) == (arguments.device is None):
        raise LgmpError(f"lgmp serve takes one of {', '.join(_SERVE_KINDS)}, or --device MODULE:CLASS")
    for other, names in _SERVE_OPTIONS.items():
        for name in names:
            given = getattr(arguments, name)
            if other != kind and given is not None and given is not False:
                raise LgmpError(f"--{name.replace('_', '-')} is an option of `lgmp serve {other}`")
    if arguments.what is not None and kind not in ("block", "rng"):
        raise LgmpError(f"`lgmp serve {kind or '--device'}` takes no {arguments.what!r}")
    match kind:
        case "block":
            if arguments.what is None:
                raise LgmpError("`lgmp serve block` takes a disk: lgmp serve block disk.img --socket PATH")
            queues = 1 if arguments.num_queues is None else arguments.num_queues
            return ServeBlock(arguments.what, arguments.read_only, arguments.serial, queues)
        case "net":
            given = [name for name in ("tap", "tap_fd", "tunnet", "net") if getattr(arguments, name) is not None]
            if len(given) != 1:
                raise LgmpError("`lgmp serve net` takes one of --tap NAME, --tap-fd N, --tunnet ADDRESS and --net user")
            return ServeNet(arguments.tap, arguments.tap_fd, arguments.tunnet, bool(arguments.net), arguments.mac)
        case "rng":
            return RngOption() if arguments.what is None else RngOption(arguments.what)
        case "console":
            return ServeConsole()
    return CustomOption(arguments.device)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "demo": _demo,
    "doctor": _doctor,
    "ps": _ps,
    "top": _top,
    "stop": _stop,
    "pause": _pause,
    "resume": _resume,
    "restart-worker": _restart_worker,
    "trace": _trace,
    "record": _record,
    "replay": _replay,
    "serve": _serve,
}

if __name__ == "__main__":
    sys.exit(main())
