"""What a device is to a modern driver, with its backing open: features, configuration space, its worker's command line.

As lgmp.devices has it for lguest guests; there are more features here, and the bus adds its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NamedTuple

from lgmp import holes
from lgmp.devices import CustomOption, Model, RngOption, console_specification, open_custom, open_rng
from lgmp.disk import Disk
from lgmp.errors import LgmpError
from lgmp.supervisor import WorkerSpecification
from lgmp.terminal import RawTerminal
from lgmp.virtio import block, console, ids, net

# What the bus offers, whatever the device.
BUS_FEATURES = 1 << ids.VIRTIO_F_VERSION_1 | 1 << ids.VIRTIO_RING_F_EVENT_IDX | 1 << ids.VIRTIO_RING_F_INDIRECT_DESC
# A disk's rings: more than there are processors are of no use to any driver.
MAX_BLOCK_QUEUES = 64


class ServeBlock(NamedTuple):
    """`lgmp serve block`: the file or block device, and what else was said of it."""

    path: str
    read_only: bool = False
    serial: str | None = None
    queues: int = 1


class ServeNet(NamedTuple):
    """`lgmp serve net`: one of a tap by its name, a tap's descriptor, what --tunnet takes, and --net user."""

    tap: str | None = None
    tap_fd: int | None = None
    tunnet: str | None = None
    user: bool = False
    mac: str | None = None


class ServeConsole(NamedTuple):
    """`lgmp serve console`: our own stdin and stdout."""


ServeOption = ServeBlock | ServeNet | ServeConsole | RngOption | CustomOption


def open_model(option: ServeOption, stack: contextlib.ExitStack) -> Model:
    """Open what a device stands on; `stack` closes it. Raises LgmpError, with the remedy."""
    match option:
        case ServeBlock():
            model = _block(option, stack)
        case ServeNet():
            model = _net(option, stack)
        case ServeConsole():
            model = _console(stack)
        case RngOption():
            model = open_rng(option, 0, stack)
        case CustomOption():
            model = open_custom(option, ())
    return model._replace(features=model.features | BUS_FEATURES)


def _block(option: ServeBlock, stack: contextlib.ExitStack) -> Model:
    if not 1 <= option.queues <= MAX_BLOCK_QUEUES:
        raise LgmpError(f"--num-queues {option.queues}: it takes a number from 1 to {MAX_BLOCK_QUEUES}")
    disk = stack.enter_context(Disk.open(option.path, read_only=option.read_only))
    can_discard = not disk.read_only and holes.can_punch(disk.descriptor)
    options: tuple[str, ...] = ("--disk-fd", str(disk.descriptor))
    if disk.read_only:
        options += ("--read-only",)
    if option.serial is not None:
        options += ("--serial", option.serial)
    return Model(
        "vda",
        ids.VIRTIO_ID_BLOCK,
        option.queues,
        block.modern_features(read_only=disk.read_only, queues=option.queues, can_discard=can_discard),
        block.modern_config_space(
            disk.sectors,
            queues=option.queues,
            block_size=holes.logical_block_size(disk.descriptor),
            can_discard=can_discard,
        ),
        WorkerSpecification("workers.block", (*options, "--", disk.path), (disk.descriptor,)),
        details=disk.path,
    )


def _net(option: ServeNet, stack: contextlib.ExitStack) -> Model:
    from lgmp.network import (  # noqa: PLC0415  only who has a network is to wait for its modules
        TapOption,
        UserOption,
        open_existing_tap,
        open_network,
        parse_mac,
        tap_of_descriptor,
    )

    mac = None if option.mac is None else parse_mac(f"--mac {option.mac}", option.mac)
    if option.tap is not None:
        network = open_existing_tap(option.tap, mac)
    elif option.tap_fd is not None:
        network = tap_of_descriptor(option.tap_fd, mac)
    elif option.tunnet is not None:
        parsed = TapOption.parse(option.tunnet)
        network = open_network(parsed if mac is None else parsed._replace(mac=mac), 0)
    else:
        network = open_network(UserOption(), 0)
        if mac is not None:
            network.mac = mac
    stack.enter_context(network)
    return Model(
        "eth0",
        ids.VIRTIO_ID_NET,
        net.QUEUES,
        net.modern_features(network.offloads, network.mtu),
        net.modern_config_space(network.mac, network.mtu),
        WorkerSpecification("workers.net", (*network.worker_options, "--", network.title), (network.descriptor,)),
        details=network.title,
    )


def _console(stack: contextlib.ExitStack) -> Model:
    terminal = RawTerminal.enter(sys.stdin.fileno()) if sys.stdin else None
    if terminal is not None:
        stack.callback(terminal.restore)
    return Model(
        "console",
        ids.VIRTIO_ID_CONSOLE,
        console.QUEUES,
        console.features(),
        b"",
        console_specification(terminal),
        details=os.ttyname(0) if terminal is not None else "stdin and stdout",
    )
