"""Guests in QEMU: Debian's kernel for clouds, with its own virtio drivers and busybox, on devices of other processes.

The kernel and its modules are what `scripts/cloud-kernel` gets (.cloud-kernel in the checkout). The guest's files
are busybox, a few programs of this machine's, and what lies in guest_initramfs. QEMU emulates the CPU (TCG), so that
a guest is the same on every machine and needs no /dev/kvm. It has two serial lines: on the first one is what its
kernel says, on the second one its init takes commands.

A guest has half of its memory below 4 GiB and half above it: a back end is shown two regions, which have offsets.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pytest
from elftools.elf.elffile import ELFFile
from launching import HANGS_AFTER, Stream

_TESTS = Path(__file__).resolve().parent
CLOUD_KERNEL = _TESTS.parent / ".cloud-kernel"
# What a guest's file system begins with: its init, and programs of ours.
FILES = _TESTS / "guest_initramfs"
QEMU = "qemu-system-x86_64"
# What a guest has in /usr/sbin, since busybox zeroes no blocks and punches no holes. Its shell takes its own programs
# all the same, where such are called without their path.
PROGRAMS = ("blkdiscard", "fallocate")
# The drivers, each to be loaded after what it depends on.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio-rng")
# What the guest's init puts at the end of what a command printed.
MARK = "\x1e"

# Memory above 4 GiB would bring bounce buffers, which are large, and not for virtio.
COMMAND_LINE = "console=ttyS0 quiet nokaslr mitigations=off swiotlb=noforce random.trust_cpu=on"


def what_is_missing() -> str | None:
    """Why there can be no guest on this machine, if so."""
    if platform.machine() != "x86_64":
        return (
            "a guest of QEMU shares rings with processes here, whose stores have to be as ordered as its own (x86-64)"
        )
    if not glob.glob(f"{CLOUD_KERNEL}/boot/vmlinuz-*"):
        return "no kernel for QEMU here: scripts/cloud-kernel gets Debian's"
    for command, package in ((QEMU, "qemu-system-x86"), ("busybox", "busybox-static"), ("blkdiscard", "util-linux")):
        if shutil.which(command) is None:
            return f"{command} is not installed (apt-get install {package})"
    return None


needs_qemu = pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or "")


# The initial RAM disk


class _Archive:
    """An archive as the kernel takes it for an initramfs: cpio's newc format (initramfs/buffer-format.rst)."""

    _FIELDS = 13

    def __init__(self) -> None:
        self.content = bytearray()
        self._numbers = count(1)
        self._directories: set[str] = set()

    def directory(self, path: str) -> None:
        """A directory, and those that it is in."""
        if path and path not in self._directories:
            self._directories.add(path)
            self.directory(os.path.dirname(path))
            self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, content: bytes, mode: int = 0o755) -> None:
        """A file, and its directories."""
        self.directory(os.path.dirname(path))
        self._entry(path, stat.S_IFREG | mode, content)

    def character_device(self, path: str, major: int, minor: int) -> None:
        """A node, which only root could make on a file system of this machine."""
        self.directory(os.path.dirname(path))
        self._entry(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def end(self) -> bytes:
        """The archive."""
        self._entry("TRAILER!!!", 0)
        return bytes(self.content)

    def _entry(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = path.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        fields = (next(self._numbers), mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        self.content += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._pad()
        self.content += content
        self._pad()

    def _pad(self) -> None:
        self.content += bytes(-len(self.content) % 4)


def _module_path(name: str) -> str:
    """Where a module lies; a module's name may have either of - and _ where its file's has the other."""
    wanted = name.replace("-", "_")
    for directory, _, names in os.walk(CLOUD_KERNEL / "lib/modules"):
        for each in names:
            if each.endswith(".ko") and each.removesuffix(".ko").replace("-", "_") == wanted:
                return os.path.join(directory, each)
    raise AssertionError(f"Debian's kernel has no module {name}")


def _dependencies(path: str) -> list[str]:
    """The modules that a module says it needs (depmod's lists are made only where a kernel is installed)."""
    with open(path, "rb") as file:
        section = ELFFile(file).get_section_by_name(".modinfo")
        assert section is not None
        words = section.data().split(b"\0")
    (needed,) = [word.removeprefix(b"depends=").decode() for word in words if word.startswith(b"depends=")]
    return [name for name in needed.split(",") if name]


def _in_order(names: Sequence[str]) -> list[str]:
    """The paths of modules and of all that they need, each after what it needs."""
    ordered: list[str] = []

    def add(name: str) -> None:
        path = _module_path(name)
        for each in _dependencies(path):
            add(each)
        if path not in ordered:
            ordered.append(path)

    for name in names:
        add(name)
    return ordered


def _libraries(program: str) -> list[str]:
    """The libraries of a program, and the dynamic linker; a static one has none."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return re.findall(r"(/\S+) \(0x", said.stdout)


@functools.cache
def _initramfs() -> int:
    """A memfd with the guest's first and only file system; it is made once, and goes with this process."""
    archive = _Archive()
    archive.character_device("dev/console", 5, 1)
    for path in ("proc", "sys", "tmp"):
        archive.directory(path)
    contents = {os.path.relpath(path, FILES): str(path) for path in FILES.rglob("*") if path.is_file()}
    for program in ("busybox", *PROGRAMS):
        found = shutil.which(program)
        assert found is not None
        contents[f"{'bin' if program == 'busybox' else 'usr/sbin'}/{program}"] = found
        contents.update((library.lstrip("/"), library) for library in _libraries(found))
    modules = _in_order(MODULES)
    contents.update((f"modules/{os.path.basename(path)}", path) for path in modules)
    for name, source in contents.items():
        archive.file(name, Path(source).read_bytes())
    archive.file("modules/order", "".join(f"{os.path.basename(path)}\n" for path in modules).encode())
    descriptor = os.memfd_create("initramfs")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(archive.end())
    return descriptor


# Devices, as words of QEMU's command line


_numbers = count()


def _chardev(path: os.PathLike[str] | str, reconnect: bool) -> tuple[str, list[str]]:
    name = f"vhost{next(_numbers)}"
    # In seconds: how long until QEMU looks for its back end again.
    return name, ["-chardev", f"socket,id={name},path={path}{',reconnect=1' if reconnect else ''}"]


def block(path: os.PathLike[str] | str, *, queues: int = 1, reconnect: bool = False) -> list[str]:
    """A disk whose back end listens at a path."""
    name, words = _chardev(path, reconnect)
    return [*words, "-device", f"vhost-user-blk-pci,chardev={name},num-queues={queues}"]


def rng(path: os.PathLike[str] | str, *, reconnect: bool = False) -> list[str]:
    """A source of random bytes whose back end listens at a path."""
    name, words = _chardev(path, reconnect)
    return [*words, "-device", f"vhost-user-rng-pci,chardev={name}"]


def net(path: os.PathLike[str] | str, mac: str, *, reconnect: bool = False, options: str = "") -> list[str]:
    """A network device whose back end listens at a path; `options` are more of the device's, with a comma before each.

    Without MSI-X vectors: QEMU 7.2 cannot mask those of a vhost-user network without KVM.
    """
    name, words = _chardev(path, reconnect)
    device = f"virtio-net-pci,netdev=net-{name},mac={mac},vectors=0,romfile={options}"
    return [*words, "-netdev", f"vhost-user,id=net-{name},chardev={name}", "-device", device]


# The guest


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit status."""

    output: str
    status: int


class Guest:
    """A guest with such devices, to be used in a `with`: within, it is up and takes commands.

    `memory` is in MiB. At the end it is killed, as a machine is whose power goes; `power_off` ends it in order.
    """

    def __init__(self, devices: Sequence[str], *, memory: int = 256) -> None:
        self._devices = list(devices)
        self._memory = memory
        self._undo = contextlib.ExitStack()
        self._numbers = count(1)
        self._boots = 0
        self._read_to = 0

    def __enter__(self) -> Self:
        with self._undo:
            self._start()
            self._wait_until_up()
            self._undo = self._undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _start(self) -> None:
        (kernel,) = glob.glob(f"{CLOUD_KERNEL}/boot/vmlinuz-*")
        console, console_end = os.pipe()
        self._undo.callback(os.close, console)
        monitor, monitor_end = socket.socketpair()
        self._undo.callback(monitor.close)
        monitor.settimeout(HANGS_AFTER)
        command = [
            # Should the tests be killed, their guests are.
            *("setpriv", "--pdeathsig", "KILL", QEMU),
            *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", "qemu64,+rdrand"),
            # With one CPU TCG leaves barriers out, and others look at the rings.
            *("-smp", "2", "-m", f"{self._memory},slots=1,maxmem={4 * self._memory}M"),
            *("-object", f"memory-backend-memfd,id=ram,size={self._memory}M,share=on"),
            *("-machine", f"q35,memory-backend=ram,max-ram-below-4g={self._memory // 2}M,usb=off,vmport=off"),
            *("-kernel", kernel, "-initrd", f"/proc/self/fd/{_initramfs()}", "-append", COMMAND_LINE),
            *("-serial", f"file:/proc/self/fd/{console_end}", "-serial", "stdio"),
            *("-chardev", f"socket,id=monitor,fd={monitor_end.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *self._devices,
        ]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(_initramfs(), console_end, monitor_end.fileno()),
            )
        finally:
            os.close(console_end)
            monitor_end.close()
        self._console = Stream(console)
        self._answers = Stream(_descriptor(self.process.stdout))
        self._errors = Stream(_descriptor(self.process.stderr))
        self._undo.callback(self._end)
        self._monitor = self._undo.enter_context(monitor.makefile("rwb", buffering=0))
        self._ask_monitor({"execute": "qmp_capabilities"})

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self._console, self._answers, self._errors):
            stream.join()
        for file in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()

    # Commands

    def run(self, command: str) -> Answer:
        """Have the guest's shell do one line, in a shell of its own, and wait for its end; stderr goes with stdout."""
        number = next(self._numbers)
        self._send(f"{number} {command}")
        end = f"{MARK}{number}\n"
        self._wait_for(end)
        output = self._answers.data[self._read_to :].decode(errors="replace")
        printed, _, status = output[: output.index(end)].rpartition(MARK)
        self._read_to = len(self._answers.data)
        return Answer(printed, int(status))

    def ask(self, command: str) -> str:
        """What a command prints, without the last new line; fails where its exit status is not 0."""
        answer = self.run(command)
        assert answer.status == 0, (
            f"{command}: exit status {answer.status}\n{answer.output}\n{self.kernel_log()[-2000:]}"
        )
        return answer.output.removesuffix("\n")

    def start(self, command: str) -> Job:
        """Have the guest's shell do one line in the background."""
        name = f"/tmp/job{next(self._numbers)}"
        job = f"({command}) >{name}.out 2>&1; echo $? >{name}.new; mv {name}.new {name}.status"
        self.ask(f": >{name}.out; ({job}) &")
        return Job(self, name)

    def kernel_log(self) -> str:
        """All that the kernel has said."""
        return self.run("dmesg").output

    def reboot(self) -> None:
        """Have the guest start anew, its devices stay; within QEMU, nothing of which ends."""
        self._send("0 sync; reboot -f")
        self._wait_until_up()

    def power_off(self) -> None:
        """Have the guest end in order, and QEMU with it."""
        self._send("0 sync; poweroff -f")
        status = self.process.wait(HANGS_AFTER)
        assert status == 0, self._described(f"QEMU ended with {status}")

    def monitor(self, command: str, **arguments: object) -> object:
        """QEMU's answer to a command of its monitor (QMP)."""
        return self._ask_monitor({"execute": command, "arguments": arguments})

    def plug_memory(self, size: int) -> None:
        """Give the guest so many MiB more, which it uses before any other for what may move in memory."""
        memory = {"qom-type": "memory-backend-memfd", "id": "more", "size": size << 20, "share": True}
        self.monitor("object-add", **memory)
        self.monitor("device_add", driver="pc-dimm", id="dimm", memdev="more")
        state = "/sys/devices/system/memory/memory*/state"
        self.ask(f"until grep -q offline {state}; do usleep 10000; done")
        self.ask(f"for file in $(grep -l offline {state}); do echo online_movable >$file; done")

    def unplug_memory(self) -> None:
        """Ask the guest to do without what was plugged in. It may take its time."""
        self.monitor("device_del", id="dimm")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The guest's CPUs stand still within, and QEMU has taken the rings from its back ends."""
        self.monitor("stop")
        try:
            yield
        finally:
            self.monitor("cont")

    def _ask_monitor(self, request: dict[str, object]) -> object:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._monitor.write(json.dumps(request).encode() + b"\n")
            # Between greeting and answer, events.
            while line := self._monitor.readline():
                said = json.loads(line)
                assert "error" not in said, f"{request}: {said['error']}"
                if "return" in said:
                    return said["return"]
        self._errors.join()
        raise AssertionError(self._described("QEMU is gone"))

    def _wait_until_up(self) -> None:
        self._boots += 1
        self._wait_for(f"{MARK}READY\n", self._boots)
        self._read_to = len(self._answers.data)

    def _send(self, line: str) -> None:
        assert "\n" not in line
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self._described("QEMU is gone")) from None

    def _wait_for(self, text: str, times: int = 1) -> None:
        try:
            self._answers.wait_for(text, times)
        except AssertionError as error:
            raise AssertionError(self._described(str(error))) from None

    def _described(self, what: str) -> str:
        """What went wrong, with the last that was said on the way to it."""
        return f"{what}\nconsole: ...{self._console.text[-3000:]}\nQEMU: {self._errors.text[-2000:]}"


class Job:
    """A command that the guest does in the background."""

    def __init__(self, guest: Guest, name: str) -> None:
        self._guest = guest
        self._name = name

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        return self._guest.run(f"test -e {self._name}.status").status == 0

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._guest.ask(f"cat {self._name}.out")

    def wait(self) -> Answer:
        """Wait for its end."""
        status = self._guest.ask(f"until test -e {self._name}.status; do usleep 10000; done; cat {self._name}.status")
        return Answer(self.output, int(status))


def _descriptor(file: IO[bytes] | None) -> int:
    assert file is not None
    return file.fileno()
