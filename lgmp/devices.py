"""What the devices of a command line are to the bus and to their workers, with their backing open.

A device is asked for by an option (`BlockOption`, `TapOption`, ...). `open_devices` opens what each stands on, a disk,
a tap, a file of random bytes, and gives a `Model` of each: all that it takes to put it on the bus and start its worker.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lgmp.disk import Disk
from lgmp.errors import LgmpError
from lgmp.supervisor import WorkerSpecification
from lgmp.virtio import block, ids, net, rng

# Where random bytes come from unless the user says otherwise.
RANDOM = "/dev/urandom"

if TYPE_CHECKING:
    from lgmp.network import NetworkOption
    from lgmp.terminal import RawTerminal


class BlockOption(NamedTuple):
    """One `--block`: the file or block device, and whether the guest may only read it."""

    path: str
    read_only: bool = False


class RngOption(NamedTuple):
    """One `--rng`: the file that random bytes come from."""

    path: str = RANDOM


class CustomOption(NamedTuple):
    """One `--device`: a class of the user's own, as `MODULE:CLASS[,KEY=VALUE...]`."""

    specification: str


DeviceOption: TypeAlias = "BlockOption | RngOption | NetworkOption | CustomOption"


class Model(NamedTuple):
    """A device before it is on the bus; `details` are for people."""

    name: str
    device_type: int
    queues: int
    features: int
    config: bytes
    specification: WorkerSpecification
    details: str = ""


def open_devices(options: Sequence[DeviceOption], stack: contextlib.ExitStack) -> list[Model]:
    """Open what the devices stand on, in their order; `stack` closes it. Raises LgmpError, with the remedy."""
    models: list[Model] = []
    for option in options:
        match option:
            case BlockOption():
                models.append(_block(option, _count(models, ids.VIRTIO_ID_BLOCK), stack))
            case RngOption():
                models.append(open_rng(option, _count(models, ids.VIRTIO_ID_RNG), stack))
            case CustomOption():
                models.append(open_custom(option, models))
            case _:
                models.append(_net(option, _count(models, ids.VIRTIO_ID_NET), stack))
    return models


def _count(models: Sequence[Model], device_type: int) -> int:
    """How many devices of a type there are: a guest numbers them so."""
    return sum(model.device_type == device_type for model in models)


def _block(option: BlockOption, number: int, stack: contextlib.ExitStack) -> Model:
    disk = stack.enter_context(Disk.open(option.path, read_only=option.read_only))
    read_only = ("--read-only",) if disk.read_only else ()
    return Model(
        f"vd{_letters(number)}",
        ids.VIRTIO_ID_BLOCK,
        1,
        block.features(disk.read_only),
        block.config_space(disk.sectors, ids.VIRTQUEUE_NUM),
        WorkerSpecification(
            "workers.block",
            (*read_only, "--disk-fd", str(disk.descriptor), "--", disk.path),
            (disk.descriptor,),
        ),
        details=f"sectors={disk.sectors} file={disk.path}",
    )


def _net(option: NetworkOption, number: int, stack: contextlib.ExitStack) -> Model:
    from lgmp.network import format_mac, open_network  # noqa: PLC0415  only who has a network is to wait for its modules

    network = stack.enter_context(open_network(option, number))
    return Model(
        f"eth{number}",
        ids.VIRTIO_ID_NET,
        net.QUEUES,
        net.features(network.offloads),
        net.config_space(network.mac),
        WorkerSpecification("workers.net", (*network.worker_options, "--", network.title), (network.descriptor,)),
        details=f"mac={format_mac(network.mac)} net={network.title}",
    )


def open_rng(option: RngOption, number: int, stack: contextlib.ExitStack) -> Model:
    """An entropy source, the guest's `number`th; `stack` closes its file. Raises LgmpError, with the remedy."""
    descriptor = _open_random(option.path)
    stack.callback(os.close, descriptor)
    return Model(
        f"rng{number}",
        ids.VIRTIO_ID_RNG,
        rng.QUEUES,
        rng.features(),
        b"",
        WorkerSpecification("workers.rng", ("--source-fd", str(descriptor), "--", option.path), (descriptor,)),
        details=f"file={option.path}",
    )


def open_custom(option: CustomOption, models: Sequence[Model]) -> Model:
    """A device of the user's own, beside `models` of the same guest. Raises LgmpError, with the remedy."""
    from lgmp.custom_device import describe  # noqa: PLC0415  only who has one is to wait for its modules

    words = option.specification
    device = describe(words)
    number = sum(model.name.rstrip("0123456789") == device.kind for model in models)
    return Model(
        f"{device.kind}{number}",
        device.device_type,
        device.queue_count,
        device.features,
        device.config,
        WorkerSpecification("workers.custom", ("--kind", device.kind, "--", words)),
        details=f"device={words}",
    )


def console_specification(terminal: RawTerminal | None) -> WorkerSpecification:
    """The worker of a console on our own stdin and stdout; `terminal` is what was made raw for it."""
    if terminal is None:
        return WorkerSpecification("workers.console", has_terminal=True)
    return WorkerSpecification(
        "workers.console",
        options=("--restore-termios", terminal.to_argument()),
        has_terminal=True,
        before_restart=terminal.enter_again,
    )


def _open_random(path: str) -> int:
    """Open a file of random bytes. Raises LgmpError for what cannot be one."""
    try:
        # Not blocking: a FIFO would otherwise wait for its other end, and a guest for that.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise LgmpError(
            f"Failed to open {path}: {error.strerror}; for random bytes, {RANDOM} is always there"
        ) from error
    except ValueError as error:
        raise LgmpError(f"Failed to open {path!r}: {error}") from error
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LgmpError(f"{path} is a directory: it has no random bytes; {RANDOM} has")
    return descriptor


def _letters(number: int) -> str:
    """The letters of a disk: a, b, ... z, aa, ab, ... as Linux names them."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
