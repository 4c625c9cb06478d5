"""The command `lguest`: the command line of the launcher that came with Linux, for scripts that were written for it.

Its syntax, its exit statuses and the words of its messages are those of the original; what was broken there (a bad
memory size was 0, an address was not checked) is refused. What comes of the words is `lgmp run`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lgmp import errors
from lgmp.cli import carry_out, finish
from lgmp.errors import LgmpError, say
from lgmp.getopt_long import Argument, OptionError, getopt_long

if TYPE_CHECKING:
    from lgmp.devices import DeviceOption
    from lgmp.launcher import GuestOptions

PROGRAM = "lguest"

USAGE = (
    "Usage: lguest [--verbose] [--tunnet=(<ipaddr>:<macaddr>|bridge:<bridgename>:<macaddr>)"
    "|--block=<filename>|--initrd=<filename>|--rng|--username=<name>|--chroot=<dir>]... "
    "<mem-in-mb> vmlinux [args...]"
)

HELP = f"""\
{USAGE}

Launch an lguest guest with the command line of Linux's own launcher (tools/lguest). `lgmp run --help` has the same and
more under names of today.

  -v, --verbose            say what is laid out where, on stderr
  --tunnet=ADDRESS[:MAC]   a network device on a tap with that address; takes root
  --tunnet=bridge:NAME[:MAC]  the same in a bridge
  --block=FILE             a disk; may be given many times
  --initrd=FILE            the initial RAM disk
  --rng[=FILE]             random bytes for the guest, from /dev/urandom or from FILE
  --username=NAME          run the workers as that user; takes root
  --chroot=DIR             lock the workers in that directory; takes root

Options may stand anywhere and be abbreviated; after `--` come words only. The first word is the memory in MiB, the
second the kernel (vmlinux or bzImage), the rest are the kernel's arguments; one that begins with "-" needs a `--`.

exit status:
  0      `lgmp stop` ended the guest
  1      the guest ended, or could not start: one line on stderr says why. As ever, a guest that powers off is no
         exception: "lguest: CRASH: Power down" (`lgmp run` exits with 0 and says nothing)
  2      three ^C within a second
  128+N  signal N ended the launcher
"""

_LONG_OPTIONS = {
    "verbose": Argument.NONE,
    "tunnet": Argument.REQUIRED,
    "block": Argument.REQUIRED,
    "rng": Argument.OPTIONAL,
    "initrd": Argument.REQUIRED,
    "username": Argument.REQUIRED,
    "chroot": Argument.REQUIRED,
    "help": Argument.NONE,
}
_SHORT_OPTIONS = {"v": "verbose"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own arguments); gives the exit status."""
    errors.program = PROGRAM
    words = list(sys.argv[1:] if argv is None else argv)
    return carry_out(lambda: _lguest(words))


def _lguest(words: Sequence[str]) -> int:
    # Imported here, so that --help works where the rest cannot.
    from lgmp.launcher import EXIT_POWERED_OFF, POWER_DOWN, launch  # noqa: PLC0415

    try:
        pairs, positional = getopt_long(words, _SHORT_OPTIONS, _LONG_OPTIONS)
    except OptionError as error:
        say(str(error))
        say(f"Unknown argument {error.word}")
        raise LgmpError(USAGE) from error
    if ("help", None) in pairs:
        print(HELP, end="")
        return 0
    if len(positional) < 2:
        raise LgmpError(USAGE)
    end = launch(_guest_options(pairs, positional))
    status = finish(end)
    if status == EXIT_POWERED_OFF and not end.stopped:
        raise LgmpError(POWER_DOWN)
    return status


def _guest_options(pairs: Sequence[tuple[str, str | None]], positional: Sequence[str]) -> GuestOptions:
    from lgmp.devices import BlockOption, RngOption  # noqa: PLC0415
    from lgmp.launcher import GuestOptions  # noqa: PLC0415
    from lgmp.loader.memory_size import check_memory_size, parse_memory_size  # noqa: PLC0415

    memory, kernel, *arguments = positional
    memory_bytes = parse_memory_size(memory)
    check_memory_size(memory_bytes)
    devices: list[DeviceOption] = []
    given: dict[str, str] = {}
    for name, value in pairs:
        match name, value:
            case "tunnet", str():
                devices.append(_tunnet(value))
            case "block", str():
                devices.append(BlockOption(value))
            case "rng", _:
                devices.append(RngOption(value) if value else RngOption())
            case _, str():
                given[name] = value  # the last one counts
    return GuestOptions(
        memory_bytes=memory_bytes,
        kernel=kernel,
        arguments=tuple(arguments),
        initrd=given.get("initrd"),
        devices=tuple(devices),
        chroot=given.get("chroot"),
        username=given.get("username"),
        on_device_error="die",  # as ever
        verbose=("verbose", None) in pairs,
    )


def _tunnet(text: str) -> DeviceOption:
    from lgmp.network import TapOption  # noqa: PLC0415  only who has a network is to wait for its modules

    return TapOption.parse(text)


if __name__ == "__main__":
    sys.exit(main())
