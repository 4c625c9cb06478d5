"""Disks that `lgmp serve block` has for QEMU, worked by Linux's own virtio_blk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from launching import HANGS_AFTER, Launch, Stream, wait_until
from networks import needs
from qemu_guest import Guest, block, needs_qemu
from serving import served, worker_of

pytestmark = needs_qemu

MIB = 1 << 20
# What a file system may need more, or less, to note down which blocks a file has.
NOTES = 1 << 16
SERIAL = "a serial of 20 bytes"


def md5(data: bytes) -> str:
    """As the guest's md5sum has it."""
    return hashlib.md5(data).hexdigest()


def random_file(path: Path, size: int, seed: int) -> Path:
    """A file of bytes that no other place in it, and no other file, has."""
    path.write_bytes(Random(seed).randbytes(size))
    return path


def guest_memory_of(worker: int) -> int:
    """How many regions of a guest's memory a worker has mapped."""
    return Path(f"/proc/{worker}/maps").read_text().count("/memfd:memory-backend")


@dataclass
class Disk:
    """A disk of the guest's: the file that it is, and who serves it."""

    path: Path
    launched: Launch

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @property
    def allocated(self) -> int:
        """The bytes that the file takes of its file system."""
        return os.stat(self.path).st_blocks * 512


class Machine:
    """A guest with four disks: vda, vdb, which is read-only, vdc, which has two queues, and vdd."""

    def __init__(self, directory: Path, undo: contextlib.ExitStack) -> None:
        self.disks: dict[str, Disk] = {}
        devices: list[str] = []
        for name, size, queues, options in (
            ("vda", 16 * MIB, 1, ("--serial", SERIAL)),
            ("vdb", 4 * MIB, 1, ("--read-only",)),
            ("vdc", 16 * MIB, 2, ("--num-queues", "2")),
            ("vdd", 16 * MIB, 1, ()),
        ):
            path = random_file(directory / f"{name}.img", size, seed=len(devices))
            socket = directory / f"{name}.sock"
            self.disks[name] = Disk(path, undo.enter_context(served("block", str(path), *options, socket=socket)))
            devices += block(socket, queues=queues)
        self.guest = undo.enter_context(Guest(devices))

    def queue(self, disk: str, limit: str) -> int:
        """What the guest's block layer has found out of a disk."""
        return int(self.guest.ask(f"cat /sys/block/{disk}/queue/{limit}"))

    def requests(self, disk: str) -> tuple[int, int]:
        """How many reads and writes a disk has been sent."""
        fields = self.guest.ask(f"cat /sys/block/{disk}/stat").split()
        return int(fields[0]), int(fields[4])

    def checksum(self, disk: str) -> str:
        """Of all that the guest reads from a disk, past its page cache."""
        return self.guest.ask(f"dd if=/dev/{disk} bs=1M iflag=direct status=none | md5sum").split()[0]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with contextlib.ExitStack() as undo:
        made = Machine(tmp_path_factory.mktemp("machine"), undo)
        yield made
        log = made.guest.kernel_log()
        assert "I/O error" not in log, log


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


# What a disk says of itself


def test_disks_have_the_size_of_their_files(machine: Machine) -> None:
    for name, disk in machine.disks.items():
        assert int(machine.guest.ask(f"blockdev --getsize64 /dev/{name}")) == len(disk.content)
        assert machine.guest.ask(f"blockdev --getss /dev/{name}") == "512"


def test_a_disk_has_the_serial_that_it_was_given_or_the_name_of_its_file(guest: Guest) -> None:
    assert guest.ask("cat /sys/block/vda/serial") == SERIAL
    assert guest.ask("cat /sys/block/vdd/serial") == "vdd.img"


def test_only_the_disk_that_was_served_so_is_read_only(guest: Guest) -> None:
    assert guest.ask("cat /sys/block/vd?/ro").split() == ["0", "1", "0", "0"]


def test_each_disk_has_as_many_queues_as_were_asked_for(guest: Guest) -> None:
    assert guest.ask("for disk in vda vdc; do ls /sys/block/$disk/mq | wc -l; done").split() == ["1", "2"]


def test_the_guest_may_send_requests_of_many_segments_and_has_all_that_is_modern(machine: Machine) -> None:
    assert machine.queue("vda", "max_segments") >= 32
    assert machine.queue("vda", "discard_max_bytes") >= MIB
    assert machine.queue("vda", "write_zeroes_max_bytes") >= MIB
    assert machine.guest.ask("cat /sys/block/vda/queue/write_cache") == "write back"
    features = machine.guest.ask("cat /sys/block/vda/device/features")
    # SEG_MAX, BLK_SIZE, FLUSH, DISCARD, WRITE_ZEROES, RING_INDIRECT_DESC, RING_EVENT_IDX, VERSION_1
    assert {bit for bit in (2, 6, 9, 13, 14, 28, 29, 32) if features[bit] == "1"} == {2, 6, 9, 13, 14, 28, 29, 32}


# Reading and writing


def test_the_guest_reads_what_is_in_the_files(machine: Machine) -> None:
    for name, disk in machine.disks.items():
        assert machine.checksum(name) == md5(disk.content), name


@pytest.mark.parametrize(("size", "offset"), [("512", 7), ("4k", 33), ("64k", 5), ("1M", 3)])
def test_what_is_written_is_in_the_file_and_nowhere_else(machine: Machine, size: str, offset: int) -> None:
    disk = machine.disks["vda"]
    before = disk.content
    unit = {"k": 1024, "M": MIB}.get(size[-1], 1) * int(size.rstrip("kM"))
    at, length = offset * unit, 8 * unit

    machine.guest.ask(f"dd if=/dev/urandom of=data bs={size} count=8 status=none")
    machine.guest.ask(f"dd if=data of=/dev/vda bs={size} seek={offset} oflag=direct status=none")

    after = disk.content
    written = machine.guest.ask("md5sum <data").split()[0]
    assert md5(after[at : at + length]) == written
    assert (after[:at], after[at + length :]) == (before[:at], before[at + length :])
    read = machine.guest.ask(f"dd if=/dev/vda bs={size} skip={offset} count=8 iflag=direct status=none | md5sum")
    assert read.split()[0] == written


def test_what_goes_through_the_page_cache_is_in_the_file_after_a_sync(machine: Machine) -> None:
    machine.guest.ask("dd if=/dev/urandom of=data bs=1M count=8 status=none")
    machine.guest.ask("dd if=data of=/dev/vda bs=1000 conv=fsync status=none")

    assert md5(machine.disks["vda"].content[: 8 * MIB]) == machine.guest.ask("md5sum <data").split()[0]


def test_large_reads_and_writes_go_in_one_piece(machine: Machine) -> None:
    machine.guest.ask("dd if=/dev/urandom of=data bs=128k count=32 status=none")
    reads, writes = machine.requests("vda")

    machine.guest.ask("dd if=data of=/dev/vda bs=128k oflag=direct status=none")
    machine.guest.ask("dd if=/dev/vda of=/dev/null bs=128k count=32 iflag=direct status=none")

    assert machine.requests("vda") == (reads + 32, writes + 32)


def test_nothing_can_be_written_to_a_read_only_disk(machine: Machine) -> None:
    before = machine.disks["vdb"].content
    answer = machine.guest.run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct status=none")
    assert answer.status != 0
    assert machine.disks["vdb"].content == before


def test_both_queues_serve_both_processors_at_once(machine: Machine) -> None:
    guest = machine.guest
    guest.ask("for cpu in 0 1; do dd if=/dev/urandom of=data$cpu bs=1M count=4 status=none; done")
    jobs = [
        guest.start(f"taskset -c {cpu} dd if=data{cpu} of=/dev/vdc bs=16k seek={cpu * 256} oflag=direct status=none")
        for cpu in (0, 1)
    ]
    assert [job.wait().status for job in jobs] == [0, 0]

    content = machine.disks["vdc"].content
    for cpu in (0, 1):
        assert md5(content[cpu * 4 * MIB :][: 4 * MIB]) == guest.ask(f"md5sum <data{cpu}").split()[0]
    interrupts = guest.ask("grep virtio2-req /proc/interrupts").splitlines()
    assert len(interrupts) == 2
    # The number of the line, and one for each processor; a request of either had one, as each was alone.
    assert all(sum(map(int, line.split()[1:3])) >= 256 for line in interrupts), interrupts


def test_a_file_system_is_the_same_after_it_was_mounted_anew(machine: Machine) -> None:
    guest = machine.guest
    guest.ask("mke2fs -F /dev/vdc >/dev/null && mkdir -p /mnt && mount -t ext4 /dev/vdc /mnt")
    guest.ask("for i in $(seq 50); do dd if=/dev/urandom of=/mnt/$i bs=10000 count=$i status=none; done")
    before = guest.ask("cd /mnt; md5sum [0-9]*")
    guest.ask("umount /mnt && mount -t ext4 /dev/vdc /mnt")
    assert guest.ask("cd /mnt; md5sum [0-9]*") == before
    guest.ask("umount /mnt")


# Flush, discard, write zeroes


def test_a_sync_in_the_guest_is_one_of_the_file(machine: Machine, tmp_path: Path) -> None:
    needs("strace")
    calls = tmp_path / "calls"
    worker = str(worker_of(machine.disks["vda"].launched))
    tracer = subprocess.Popen(
        ["strace", "-f", "-e", "trace=fdatasync,fsync", "-o", str(calls), "-p", worker], stderr=subprocess.PIPE
    )
    with tracer:
        assert tracer.stderr is not None
        said = Stream(tracer.stderr.fileno())
        try:
            said.wait_for("attached")
            machine.guest.ask("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct status=none")
            before = calls.read_text().count("sync(")
            machine.guest.ask("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync status=none")
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(HANGS_AFTER)
            said.join()

    assert before == 0
    assert calls.read_text().count("sync(") >= 1, said.text


def test_what_is_discarded_is_a_hole_in_the_file(machine: Machine) -> None:
    disk = machine.disks["vdd"]
    before, allocated = disk.content, disk.allocated

    machine.guest.ask("/usr/sbin/blkdiscard --offset 1M --length 4M /dev/vdd")

    assert disk.allocated <= allocated - 4 * MIB + NOTES
    assert disk.content == before[:MIB] + bytes(4 * MIB) + before[5 * MIB :]
    assert machine.checksum("vdd") == md5(disk.content)


def test_what_is_zeroed_reads_as_zeroes_and_keeps_its_room(machine: Machine) -> None:
    disk = machine.disks["vdd"]
    before, allocated = disk.content, disk.allocated

    machine.guest.ask("/usr/sbin/blkdiscard --zeroout --offset 6M --length 2M /dev/vdd")

    assert disk.content == before[: 6 * MIB] + bytes(2 * MIB) + before[8 * MIB :]
    assert abs(disk.allocated - allocated) <= NOTES
    assert machine.checksum("vdd") == md5(disk.content)


def test_what_is_zeroed_and_may_be_unmapped_is_a_hole(machine: Machine) -> None:
    disk = machine.disks["vdd"]
    before, allocated = disk.content, disk.allocated

    machine.guest.ask("/usr/sbin/fallocate --punch-hole --offset 10MiB --length 2MiB /dev/vdd")

    assert disk.content == before[: 10 * MIB] + bytes(2 * MIB) + before[12 * MIB :]
    assert disk.allocated <= allocated - 2 * MIB + NOTES


# Beginnings and ends


def test_after_its_driver_was_bound_anew_a_disk_works_as_before(machine: Machine) -> None:
    guest = machine.guest
    for action in ("unbind", "bind"):
        guest.ask(f"echo virtio3 >/sys/bus/virtio/drivers/virtio_blk/{action}")
    guest.ask("dd if=/dev/urandom of=data bs=64k count=16 status=none")
    guest.ask("dd if=data of=/dev/vdd bs=64k oflag=direct status=none")

    assert machine.checksum("vdd") == md5(machine.disks["vdd"].content)
    assert md5(machine.disks["vdd"].content[:MIB]) == guest.ask("md5sum <data").split()[0]


def test_a_guest_that_is_stopped_in_the_middle_of_writing_goes_on(machine: Machine) -> None:
    guest = machine.guest
    guest.ask("dd if=/dev/urandom of=data bs=1M count=8 status=none")
    job = guest.start("for i in $(seq 4); do dd if=data of=/dev/vdc bs=8k oflag=direct status=none; done")
    for _ in range(6):
        with guest.stopped():
            pass
        guest.ask("usleep 50000")
    assert job.wait().status == 0

    assert md5(machine.disks["vdc"].content[: 8 * MIB]) == guest.ask("md5sum <data").split()[0]


def test_memory_that_comes_and_goes_while_a_disk_is_written_to_is_memory_for_it(machine: Machine) -> None:
    guest = machine.guest
    worker = worker_of(machine.disks["vdc"].launched)
    regions = guest_memory_of(worker)
    guest.ask("dd if=/dev/urandom of=data bs=1M count=8 status=none")
    writing = "for i in $(seq 4); do dd if=data of=/dev/vdc bs=8k oflag=direct status=none || exit 1; done"

    jobs = [guest.start(writing)]
    guest.plug_memory(128)
    assert guest_memory_of(worker) == regions + 1
    # What dd reads into and writes from is there, since it is new.
    guest.ask("dd if=/dev/vda of=/dev/vdd bs=1M count=8 iflag=direct oflag=direct status=none")
    jobs.append(guest.start(writing))
    guest.unplug_memory()
    wait_until(lambda: guest_memory_of(worker) == regions, "the worker has let go of the memory")
    jobs.append(guest.start(writing))

    assert [job.wait().status for job in jobs] == [0, 0, 0]
    assert md5(machine.disks["vdc"].content[: 8 * MIB]) == guest.ask("md5sum <data").split()[0]
    assert machine.disks["vdd"].content[: 8 * MIB] == machine.disks["vda"].content[: 8 * MIB]


def test_after_a_reboot_of_the_guest_all_disks_are_there(machine: Machine) -> None:
    machine.guest.reboot()

    for name, disk in machine.disks.items():
        assert machine.checksum(name) == md5(disk.content), name


def test_with_once_all_ends_with_the_first_guest(tmp_path: Path) -> None:
    path = random_file(tmp_path / "disk.img", MIB, 1)
    socket = tmp_path / "disk.sock"
    with Launch("serve", "block", str(path), "--once", "--socket", str(socket)) as launched:
        launched.err.wait_for("lgmp: serving ")
        with Guest(block(socket)) as guest:
            guest.ask("dd if=/dev/zero of=/dev/vda bs=512 count=1 oflag=direct status=none")
            guest.power_off()
        code, _, errors = launched.end()

    assert code == 0, errors
    assert not os.path.exists(socket)
    assert path.read_bytes()[:512] == bytes(512)
