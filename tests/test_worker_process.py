"""Workers as processes: started, served, reset, stopped, failed, killed, and orphaned, with real message queues."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence

import pytest
from doomed import DoomedLauncher, signals_held

from lgmp.errors import LgmpError
from lgmp.mailbox import COMPLETION_MESSAGES, MAILBOX_MESSAGES, Mailbox, ToLauncher, ToWorker, pack
from lgmp.terminal import RawTerminal
from lgmp.testing import PATIENCE, Buffer, Driver, Used, WorkerProcess, worker_command
from lgmp.virtio.block import VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN
from lgmp.virtio.console import INPUT_QUEUE, OUTPUT_QUEUE
from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC

SECTOR = 512
DISK_SECTORS = 256
FEATURES = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_BLK_F_FLUSH
THREE_INTERRUPTS = 3


@pytest.fixture
def disk() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(bytes([number]) * SECTOR for number in range(DISK_SECTORS)))
        file.flush()
        yield file.fileno()


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture
def console_driver() -> Iterator[Driver]:
    driver = Driver(queues=2)
    yield driver
    driver.close()


def block_worker(driver: Driver, disk: int, *options: str, features: int = FEATURES) -> WorkerProcess:
    return WorkerProcess(
        "workers.block",
        driver,
        ["--disk-fd", str(disk), *options, "--", "disk.img"],
        pass_fds=[disk],
        features=features,
    )


def console_worker(driver: Driver, input_fd: int, output_fd: int, *options: str) -> WorkerProcess:
    return WorkerProcess("workers.console", driver, options, name="console", stdin=input_fd, stdout=output_fd)


def add_read(driver: Driver, sector: int, table: int | None = None) -> tuple[int, Buffer, Buffer]:
    """A read of one sector into the ring; gives its head and where data and status will be."""
    header = driver.buffer(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, sector))
    data, status = driver.buffer(SECTOR, writable=True), driver.buffer(b"\xff", writable=True)
    status = Buffer(status.address, 1, True)
    return driver.queues[0].add([header, data, status], table), data, status


def read_one(worker: WorkerProcess, sector: int) -> bytes:
    """A read of one sector, kicked and waited for."""
    head, data, status = add_read(worker.driver, sector)
    worker.kick()
    assert worker.collect(1) == [Used(head, SECTOR + 1)]
    assert worker.driver.content(status) == bytes([VIRTIO_BLK_S_OK])
    return worker.driver.content(data)


def is_gone(name: str) -> bool:
    try:
        Mailbox.open(name).close()
    except LgmpError:
        return True
    return False


# Serving


def test_a_disk_is_served_by_a_process(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        assert read_one(worker, 7) == bytes([7]) * SECTOR
        assert worker.stop() == 0
        assert worker.errors() == ""


def test_a_worker_says_in_ps_what_it_is(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 0)  # it takes its title between READY and its first message
        with open(f"/proc/{worker.process.pid}/cmdline") as file:
            assert file.read().rstrip("\0") == "lgmp-block vda disk.img (guest test)"
        with open(f"/proc/{worker.process.pid}/comm") as file:
            assert file.read() == "lgmp-block\n"


def test_a_worker_opens_nothing_after_its_start(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 0)
        before = sorted(os.listdir(f"/proc/{worker.process.pid}/fd"))
        for sector in range(20):
            read_one(worker, sector)
        worker.reset()
        assert sorted(os.listdir(f"/proc/{worker.process.pid}/fd")) == before


def test_one_kick_is_enough_for_everything_in_the_ring(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        requests = [add_read(driver, sector, table=(1 << 20) + 64 * sector) for sector in range(100)]
        worker.kick()
        assert [used.head for used in worker.collect(100)] == [head for head, _, _ in requests]
        assert [driver.content(data)[0] for _, data, _ in requests] == list(range(100))


def test_more_kicks_than_the_mailbox_holds_lose_no_request(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        for _ in range(30):
            for _ in range(MAILBOX_MESSAGES):
                add_read(driver, 1, table=None if len(driver.queues[0].free) > 64 else 1 << 20)
                worker.kick()
            worker.collect(MAILBOX_MESSAGES)
            driver.forget()


def test_what_the_driver_accepted_is_looked_at_with_every_message(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk, features=0) as worker:
        worker.ready()
        read_one(worker, 1)
        driver.control.accepted_features = FEATURES
        add_read(driver, 2, table=1 << 20)
        worker.kick()
        worker.collect(1)
        driver.control.accepted_features = 0
        add_read(driver, 3, table=1 << 20)
        worker.kick()
        assert "has not accepted VIRTIO_RING_F_INDIRECT_DESC" in worker.broken()


@pytest.mark.parametrize(("options", "serial"), [(["--serial", "S1"], b"S1"), ([], b"disk.img")])
def test_the_serial_is_the_name_of_the_disk_unless_one_is_given(
    driver: Driver, disk: int, options: list[str], serial: bytes
) -> None:
    with block_worker(driver, disk, *options) as worker:
        worker.ready()
        header = driver.buffer(struct.pack("<IIQ", VIRTIO_BLK_T_GET_ID, 0, 0))
        answer = driver.buffer(20, writable=True)
        driver.queues[0].add([header, answer, driver.buffer(1, writable=True)])
        worker.kick()
        worker.collect(1)
        assert driver.content(answer) == serial.ljust(20, b"\0")


@pytest.mark.parametrize("kicked", [True, False])
def test_a_successor_goes_on_where_a_killed_worker_stopped(driver: Driver, disk: int, kicked: bool) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 1)
        worker.kill()
        head, data, _ = add_read(driver, 9)
        worker.restart()
        if kicked:
            worker.kick()  # nor is it needed: the one that died may have taken it along
        assert worker.collect(1) == [Used(head, SECTOR + 1)]
        assert driver.content(data) == bytes([9]) * SECTOR


def test_a_successor_leaves_the_ring_alone_where_no_driver_has_begun(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        add_read(driver, 0)
        worker.restart()
        assert worker.stop() == 0
        assert driver.queues[0].collect() == []


def test_a_successor_goes_by_what_the_driver_has_accepted(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 1)
        worker.kill()
        add_read(driver, 2, table=1 << 20)
        worker.restart()
        assert len(worker.collect(1)) == 1


# Stop and reset


def test_stop_finishes_what_is_in_the_ring(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 0)
        for sector in range(40):
            add_read(driver, sector)
        assert worker.stop() == 0
        assert len(driver.queues[0].collect()) == 40


def test_a_worker_that_was_never_kicked_leaves_the_ring_alone(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        add_read(driver, 0)
        assert worker.stop() == 0
        assert driver.queues[0].collect() == []


def test_a_reset_works_at_any_moment(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        for number in range(40):
            driver.forget()
            for sector in range(number):
                add_read(driver, sector)
                worker.kick()
            worker.reset()
            assert driver.control.position(0) == (0, 0)
            assert read_one(worker, number) == bytes([number]) * SECTOR
        assert worker.stop() == 0


def test_after_a_reset_the_ring_is_left_alone_until_a_kick(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 0)
        worker.reset()
        add_read(driver, 1)
        worker.reset()  # the second answer says that the first reset is long over
        assert driver.queues[0].collect() == []


# What goes wrong


def break_a_rule(worker: WorkerProcess) -> None:
    worker.driver.queues[0].add([Buffer(1 << 33, 16)])
    worker.kick()


def test_a_broken_rule_is_told_to_the_launcher_and_the_rings_are_left_alone_from_then_on(
    driver: Driver, disk: int
) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        break_a_rule(worker)
        sentence = "vda: queue 0: descriptor 0: Invalid address 0x200000000+16 is outside guest memory (0x500000)"
        assert worker.broken() == sentence
        add_read(driver, 1)
        worker.send(ToWorker.KICK)  # the launcher would not
        assert worker.stop() == 0  # it obeys still, and says nothing a second time
        assert worker.completions.take() is None
        assert driver.queues[0].collect() == []
        assert worker.errors() == ""


def test_a_reset_revives_a_device_whose_driver_broke_a_rule(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        pid = worker.process.pid
        for sector in range(5):
            break_a_rule(worker)
            worker.broken()
            worker.reset()
            assert read_one(worker, sector) == bytes([sector]) * SECTOR
        assert worker.process.pid == pid
        assert worker.stop() == 0


def test_a_broken_rule_is_told_again_by_a_successor_that_finds_it(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        read_one(worker, 0)
        worker.kill()
        break_a_rule(worker)
        worker.restart()
        assert "Invalid address" in worker.broken()
        worker.reset()
        assert read_one(worker, 2) == bytes([2]) * SECTOR


def test_a_broken_rule_with_much_to_say_is_cut_to_fit(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk, "--name", "ü" * 2000) as worker:
        worker.ready()
        break_a_rule(worker)
        assert set(worker.broken()) == {"ü"}
        assert worker.stop() == 0


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"garbage", pack(0), pack(99), pack("kick")])
def test_a_message_that_makes_no_sense_ends_the_worker(driver: Driver, disk: int, raw: bytes) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        worker.post(raw)
        assert "makes no sense" in worker.failure()
        assert worker.wait() == 1
        assert worker.errors() == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--disk-fd", "9999"], "lgmp-block: vda: not a disk: Bad file descriptor"),
        (["--disk-fd", "zero"], "lgmp-block: --disk-fd takes a number, not 'zero'"),
        (["--disk-fd", "-1"], "lgmp-block: --disk-fd takes a number from 0 on"),
        (["--queue", "128:0"], "lgmp-block: --queue takes NUM:DESC:AVAIL:USED"),
        (["--queue", "3:0:4096:8192"], "lgmp-block: vda: queue 1: a ring of 3 descriptors"),
        (["--ram", "999999999"], "lgmp-block: guest memory is"),
        (["--control-fd", "9999"], "lgmp-block: guest memory or control page: "),
        (["--mailbox", "/lgmp.0.none"], "lgmp-block: cannot open the message queue /lgmp.0.none"),
        (["--no-such-option"], "lgmp-block: option --no-such-option not recognized; see --help"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(
    driver: Driver, disk: int, options: Sequence[str], sentence: str
) -> None:
    with block_worker(driver, disk, *options) as worker:
        assert worker.wait() == 1
        errors = worker.errors()
        assert errors.startswith(f"lgmp: {sentence}")
        assert errors.count("\n") == 1


def test_a_command_line_without_everything_says_what_is_missing() -> None:
    command = [sys.executable, "-P", "-m", "workers.block", "--name", "vda", "--device", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "lgmp: lgmp-block: missing --memory-fd, --ram, --control-fd, --mailbox, --completions, --queue; see --help\n"
    )


@pytest.mark.parametrize("module", ["workers.block", "workers.console"])
def test_a_worker_explains_its_options(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"Usage: python -m {module} OPTIONS")
    assert "--memory-fd VALUE" in result.stdout


def test_a_device_can_be_used_without_a_worker_around_it() -> None:
    """Whoever serves a device over another bus is not to pull in message queues, let alone the launcher."""
    code = "import json, sys, workers.block, workers.console; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "lgmp.virtio.ring" in modules
    assert not {"lgmp.mailbox", "workers.runtime", "posix_ipc"} & set(modules)


def test_a_worker_imports_nothing_of_the_launcher() -> None:
    code = "import json, sys, workers.runtime; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    ours = {module for module in modules if module.split(".")[0] in ("lgmp", "workers")}
    allowed = {"lgmp", "lgmp.control", "lgmp.errors", "lgmp.mailbox", "lgmp.memory", "workers", "workers.device"}
    allowed |= {
        "lgmp.closing",
        "lgmp.title",
        "lgmp.confinement",
        "lgmp.shared_file",
        "workers.runtime",
        "lgmp.virtio",
        "lgmp.virtio.ids",
        "lgmp.virtio.inflight",
        "lgmp.virtio.ring",
    }
    assert ours <= allowed


# Signals


@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGHUP", "SIGQUIT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGUSR1"]
)
def test_the_terminals_signals_are_the_launchers_affair(driver: Driver, disk: int, name: str) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        for sector in range(5):
            worker.process.send_signal(signal.Signals[name])
            assert read_one(worker, sector) == bytes([sector]) * SECTOR
        assert worker.stop() == 0


def test_sigterm_ends_a_worker(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk) as worker:
        worker.ready()
        worker.process.terminate()
        assert worker.wait() == -signal.SIGTERM


def test_signals_that_were_held_back_at_the_start_are_not_held_back_for_ever(driver: Driver, disk: int) -> None:
    with signals_held():
        worker = block_worker(driver, disk)
    with worker:
        worker.ready()
        with open(f"/proc/{worker.process.pid}/status") as file:
            blocked = next(line for line in file if line.startswith("SigBlk:"))
        assert int(blocked.split()[1], 16) == 0


def test_a_storm_of_resizes_disturbs_neither_input_nor_output(console_driver: Driver) -> None:
    screen, output = os.pipe()
    input_fd, keyboard = os.pipe()
    data = os.urandom(200_000)
    with console_worker(console_driver, input_fd, output) as worker:
        worker.ready()
        buffer = console_driver.buffer(16, writable=True)
        console_driver.queues[INPUT_QUEUE].add([buffer])
        console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(data)])
        worker.kick()
        out = b""
        while len(out) < len(data):
            worker.process.send_signal(signal.SIGWINCH)
            out += os.read(screen, 1000)
        assert out == data
        os.write(keyboard, b"typed")
        worker.collect(1, OUTPUT_QUEUE)
        worker.collect(1, INPUT_QUEUE)
        assert console_driver.content(buffer)[:5] == b"typed"
        assert worker.stop() == 0
    for descriptor in (screen, output, input_fd, keyboard):
        os.close(descriptor)


# The launcher goes


@pytest.mark.parametrize("what", ["idle", "waiting for room in the completion queue", "starting"])
def test_a_worker_goes_when_its_launcher_is_killed(driver: Driver, disk: int, what: str) -> None:
    def start() -> Sequence[WorkerProcess]:
        worker = block_worker(driver, disk)
        if what != "starting":
            worker.ready()
        if what == "waiting for room in the completion queue":
            for _ in range(COMPLETION_MESSAGES + 2):
                add_read(driver, 1)
                worker.begin()
                worker.send(ToWorker.KICK)
            while driver.queues[0].used_index() <= COMPLETION_MESSAGES:
                os.sched_yield()
        return [worker]

    launcher = DoomedLauncher(start)
    launcher.kill()
    assert launcher.workers_end()
    assert all(map(is_gone, launcher.queue_names))


@pytest.mark.parametrize("what", ["idle", "with output that cannot be written"])
def test_a_console_goes_when_its_launcher_is_killed(console_driver: Driver, what: str) -> None:
    screen, output = os.pipe()
    input_fd, keyboard = os.pipe()

    def start() -> Sequence[WorkerProcess]:
        worker = console_worker(console_driver, input_fd, output).ready()
        worker.kick()
        if what != "idle":
            console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(200_000)])
            worker.kick()
            select.select([screen], [], [])
        return [worker]

    launcher = DoomedLauncher(start)
    launcher.kill()
    assert launcher.workers_end()
    assert all(map(is_gone, launcher.queue_names))
    for descriptor in (screen, output, input_fd, keyboard):
        os.close(descriptor)


def test_the_terminal_is_given_its_modes_back_when_the_launcher_is_killed(console_driver: Driver) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)

    def start() -> Sequence[WorkerProcess]:
        terminal = RawTerminal.enter(slave)
        assert terminal is not None
        return [console_worker(console_driver, slave, slave, "--restore-termios", terminal.to_argument()).ready()]

    launcher = DoomedLauncher(start)
    assert termios.tcgetattr(slave) != before
    launcher.kill()
    assert launcher.workers_end()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_a_worker_whose_launcher_is_gone_already_goes_and_takes_the_queues_with_it(driver: Driver, disk: int) -> None:
    with block_worker(driver, disk, "--launcher", "1") as worker:
        assert worker.wait() == 1
        assert worker.errors() == ""
        assert is_gone(worker.mailbox.name)
        assert is_gone(worker.completions.name)


def test_a_worker_can_be_started_by_hand(driver: Driver, disk: int) -> None:
    """Without --launcher, who started it is its launcher."""
    with block_worker(driver, disk) as worker:
        worker.ready()
        worker.stop()
        command = worker_command("workers.block", driver, worker.mailbox.name, worker.completions.name)
        at = command.index("--launcher")
        command[at : at + 2] = []
        descriptors = (driver.memory.fd, driver.control.fd, disk)
        by_hand = subprocess.Popen([*command, f"--disk-fd={disk}"], pass_fds=descriptors)
        assert worker.completions.wait(PATIENCE) == pack(ToLauncher.READY, 0)
        worker.send(ToWorker.STOP)
        assert by_hand.wait(PATIENCE) == 0


# The console as a process


def read_all(worker: WorkerProcess, screen: int, size: int) -> bytes:
    """What a worker writes until its end, in pieces of at most `size` bytes."""
    out = b""
    while True:
        worker.wait_to_read(screen)
        piece = os.read(screen, size)
        if not piece:
            return out
        out += piece


def test_output_through_a_slow_reader_is_whole_and_in_order(console_driver: Driver) -> None:
    screen, output = os.pipe()
    pieces = [os.urandom(size) for size in (1, 4096, 70_000, 0, 200_000, 13)]
    with console_worker(console_driver, subprocess.DEVNULL, output) as worker:
        os.close(output)
        worker.ready()
        for piece in pieces:
            console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(piece)])
            worker.kick()
        worker.send(ToWorker.STOP)  # and it ends only when all is written
        out = read_all(worker, screen, 3001)
        assert out == b"".join(pieces)
        assert worker.wait() == 0
        assert len(console_driver.queues[OUTPUT_QUEUE].collect()) == len(pieces)
    os.close(screen)


def test_a_console_is_reset_while_its_output_waits(console_driver: Driver) -> None:
    screen, output = os.pipe()
    data = os.urandom(150_000)
    with console_worker(console_driver, subprocess.DEVNULL, output) as worker:
        os.close(output)
        worker.ready()
        console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(data)])
        worker.kick()
        worker.reset()
        console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(b"the next driver")])
        worker.kick()
        worker.send(ToWorker.STOP)
        out = read_all(worker, screen, 65536)
        assert out == data + b"the next driver"
        assert worker.wait() == 0
    os.close(screen)


def test_three_interrupts_on_a_terminal_are_told_to_the_launcher(console_driver: Driver) -> None:
    master, slave = pty.openpty()
    terminal = RawTerminal.enter(slave)
    assert terminal is not None
    with console_worker(console_driver, slave, slave) as worker:
        worker.ready()
        for _ in range(THREE_INTERRUPTS):
            console_driver.queues[INPUT_QUEUE].add([console_driver.buffer(8, writable=True)])
            worker.kick()
            os.write(master, b"\x03")
            worker.collect(1, INPUT_QUEUE)
        worker.expect(ToLauncher.QUIT, 0)
        assert worker.stop() == 0
    os.close(master)
    os.close(slave)


def test_a_terminal_that_hangs_up_is_the_end_of_input_and_not_of_the_guest(console_driver: Driver) -> None:
    screen, output = os.pipe()
    master, slave = pty.openpty()
    with console_worker(console_driver, slave, output) as worker:
        worker.ready()
        os.close(slave)
        os.close(master)
        console_driver.queues[INPUT_QUEUE].add([console_driver.buffer(8, writable=True)])
        console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(b"still here")])
        worker.kick()
        worker.collect(1, OUTPUT_QUEUE)
        assert os.read(screen, 100) == b"still here"
        assert worker.stop() == 0
        assert worker.errors() == "lgmp: Failed to get console input, ignoring console.\n"
    os.close(screen)
    os.close(output)


def test_a_console_without_stdin_and_stdout_lets_the_guest_go_on(console_driver: Driver) -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    with WorkerProcess("workers.console", console_driver, name="console", wrapper=closed) as worker:
        worker.ready()
        console_driver.queues[INPUT_QUEUE].add([console_driver.buffer(8, writable=True)])
        console_driver.queues[OUTPUT_QUEUE].add([console_driver.buffer(b"to nobody")])
        worker.kick()
        worker.collect(1, OUTPUT_QUEUE)
        assert worker.stop() == 0
        assert sorted(worker.errors().splitlines()) == [
            "lgmp: Failed to get console input, ignoring console.",
            "lgmp: Failed to write console output (Bad file descriptor), it is discarded.",
        ]


def test_a_console_needs_two_rings(driver: Driver) -> None:
    with console_worker(driver, subprocess.DEVNULL, subprocess.DEVNULL) as worker:
        assert worker.wait() == 1
        assert worker.errors() == "lgmp: lgmp-console: a console has 2 rings, not 1\n"
