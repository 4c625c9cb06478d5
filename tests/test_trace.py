"""`lgmp trace`: what is told of a device while its guest runs, and that nobody who reads can harm the guest."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from launching import SECTOR, Launch, make_disk, prompt, wait_until
from networks import needs
from traces import TracedWorker, Tracing, drain, lgmp

from lgmp.mailbox import ToWorker
from lgmp.testing import MISDEEDS, Driver, WorkerProcess, direct, indirect
from lgmp.testing.fixtures import MakeDriver, StartWorker
from lgmp.tracing import wire
from lgmp.tracing.events import Bad, Done, Finish, Lost, Reset, Start, Take
from lgmp.tracing.pcapng import Direction, PcapngWriter
from lgmp.tracing.wire import setting
from lgmp.virtio.block import HEADER, VIRTIO_BLK_T_IN
from lgmp.virtio.ring import Virtqueue
from workers.block import Block
from workers.traced import TracedVirtqueue, Tracer

every_host = pytest.mark.every_host

TIME = r"\d\d:\d\d:\d\d\.\d{6}"
LATENCY = r"[\d.]+ (us|ms|s)"

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def disk(tmp_path: Path) -> list[str]:
    return ["--block", str(make_disk(tmp_path / "disk.img"))]


# A guest is traced


@every_host
def test_a_disks_requests_are_shown_as_the_guest_makes_them(disk: list[str]) -> None:
    with prompt(*disk) as guest, Tracing(guest, "vda") as trace:
        guest.command("blk write 3 2 7")
        guest.command("blk read 3 1")
        guest.command("blk flush")
        guest.command("blk id")
        guest.command("blk read 1000 1")
        trace.out.wait_for("ioerr")
        code, lines, said = trace.interrupt()
        # The guest is none the wiser.
        guest.command("blk read 4 1")

    shown = [re.sub(rf"^{TIME}  ", "", line) for line in lines]
    requests = [line for line in shown if not line.startswith(("reset", "features"))]
    wanted = [
        r"write  sector 3 +1024 bytes  ok",
        r"read   sector 3 +512 bytes  ok",
        r"flush +0 bytes  ok",
        r"id +20 bytes  ok",
        r"read   sector 1000 +512 bytes  ioerr",
    ]
    assert len(requests) == len(wanted)
    for line, pattern in zip(requests, wanted, strict=True):
        assert re.fullmatch(rf"{pattern} +{LATENCY}", line), line
    assert code == 0
    assert re.fullmatch(rf"lgmp: vda: 5 requests in {LATENCY}, 0 events lost", said)


@every_host
def test_the_end_of_the_guest_is_the_end_of_a_trace(disk: list[str]) -> None:
    with prompt(*disk) as guest, Tracing(guest, "vda") as trace:
        guest.send("blk read 0 1\npoweroff\n")
        code, lines, said = trace.end()
        assert guest.wait() == 0

    assert code == 0
    assert any("read   sector 0" in line for line in lines)
    assert "vda: 1 requests" in said


def test_a_launcher_that_is_killed_ends_a_trace(disk: list[str]) -> None:
    with prompt(*disk) as guest, Tracing(guest, "vda") as trace:
        guest.signal(signal.SIGKILL)

        assert trace.end()[0] == 0


def test_what_a_guest_writes_on_its_console_goes_to_a_file(tmp_path: Path) -> None:
    with prompt() as guest, Tracing(guest, "console", "-o", tmp_path / "text") as trace:
        before = guest.out.text
        guest.command("echo hello")
        wait_until(lambda: (tmp_path / "text").read_bytes().endswith(b"\ntest> "), "all of it in the file")
        code, lines, _said = trace.interrupt()

        assert (code, lines) == (0, [])
        assert before + (tmp_path / "text").read_text() == guest.out.text
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o600


def test_a_consoles_lines_say_which_way_text_went() -> None:
    with prompt() as guest, Tracing(guest, "console") as trace:
        guest.command("echo hello")
        trace.out.wait_for("'hello\\n'")
        _code, lines, _said = trace.interrupt()

    assert re.match(rf"{TIME}  in  'echo hello\\n'", lines[0])
    assert any(re.match(rf"{TIME}  out 'hello\\n'", line) for line in lines)


def test_random_bytes_are_counted_and_not_shown() -> None:
    with prompt("--rng") as guest, Tracing(guest, "rng0") as trace:
        guest.command("rng read 48")
        trace.out.wait_for("of 48 bytes")
        _code, lines, _said = trace.interrupt()

    assert re.fullmatch(rf"{TIME}  +48 of 48 bytes +{LATENCY}", lines[-1]), lines


def test_requests_of_a_device_of_ones_own_are_shown_in_hexadecimal() -> None:
    upside_down = f"{Path(__file__).parent}/examples/upside_down.py:UpsideDown"
    with prompt("--device", upside_down) as guest, Tracing(guest, "upside0") as trace:
        guest.command("ask 42 sos")
        trace.out.wait_for("written")
        _code, lines, _said = trace.interrupt()

    assert re.fullmatch(rf"{TIME}  queue 0 +3 bytes read 736f73 +3 written 736f73 +{LATENCY}", lines[-1]), lines


def test_frames_are_shown_and_captured(tmp_path: Path) -> None:
    needs("passt")
    capture = tmp_path / "frames.pcapng"
    with prompt("--net", "user") as guest:
        with Tracing(guest, "eth0") as trace:
            guest.command("net addr 10.0.2.15")
            guest.command("net ping 10.0.2.2 1")
            trace.out.wait_for("in ")
            _code, lines, _said = trace.interrupt()
        with Tracing(guest, "eth0", "-o", capture) as trace:
            guest.command("net ping 10.0.2.2 1")
            trace.interrupt()
        with Tracing(guest, "eth0", "-o", "-") as trace:
            guest.command("net ping 10.0.2.2 1")
            trace.process.send_signal(signal.SIGINT)
            trace.process.wait()
            trace.out.join()
            piped = trace.out.data

    mac = r"([0-9a-f]{2}:){5}[0-9a-f]{2}"
    assert any(re.search(rf"  out {mac} > {mac}  ARP +\d+ bytes +{LATENCY}", line) for line in lines), lines
    assert any(re.search(rf"  in  {mac} > {mac}  ARP +\d+ bytes +{LATENCY}", line) for line in lines), lines
    for data in (capture.read_bytes(), piped):
        interface, frames = read_pcapng(data)
        assert interface[2].startswith(b"eth0 of ")
        assert interface[9] == b"\x09"
        assert {direction for _time, _frame, direction in frames} >= {Direction.OUT}
        assert all(len(frame) >= 14 for _time, frame, _direction in frames)


def test_a_worker_that_is_killed_is_traced_on(disk: list[str]) -> None:
    with prompt(*disk) as guest, Tracing(guest, "vda") as trace:
        guest.command("blk read 1 1")
        os.kill(guest.workers()["vda"], signal.SIGKILL)
        guest.err.wait_for("started again")
        guest.command("blk read 2 1")
        trace.out.wait_for("sector 2")
        _code, lines, said = trace.interrupt()

    assert [line.split()[3] for line in lines if " read " in line] == ["1", "2"]
    assert ": 2 requests" in said
    assert "0 events lost" in said


@every_host
def test_a_rule_that_is_broken_is_shown(disk: list[str]) -> None:
    with prompt(*disk) as guest, Tracing(guest, "vda") as trace:
        guest.send("misdeed loop\n")
        trace.out.wait_for("BROKEN")
        _code, lines, _said = trace.interrupt()

    assert any(re.search(r"BROKEN vda: queue 0: descriptor [01]: Looped descriptor", line) for line in lines)


def test_a_second_trace_is_refused_while_there_is_one(disk: list[str]) -> None:
    with prompt(*disk) as guest:
        with Tracing(guest, "vda") as trace:
            code, out, err = lgmp("trace", guest.pid, "vda")
            assert (code, out) == (1, "")
            assert err == "lgmp: vda is being traced already: end that trace (^C) first\n"
            trace.interrupt()
        with Tracing(guest, "vda") as trace:
            assert trace.interrupt()[0] == 0


def test_what_cannot_be_traced_is_said(disk: list[str], tmp_path: Path) -> None:
    with prompt(*disk) as guest:
        code, _out, err = lgmp("trace", guest.pid, "vdb")
        assert (code, err) == (1, f"lgmp: guest testguest.elf-{guest.pid} has no device vdb; it has vda, console\n")
        code, _out, err = lgmp("record", guest.pid, "vda", "-o", tmp_path / "no" / "file")
        assert (code, err) == (1, f"lgmp: Failed to open {tmp_path}/no/file: No such file or directory\n")
    code, _out, err = lgmp("trace", "nobody", "vda")
    assert code == 1 and err.count("\n") == 1


# Whoever reads cannot harm the guest


def many_requests(guest: Launch) -> None:
    """More than the socket takes, whatever size it has."""
    guest.command("bench blk 6000")


def test_a_reader_that_is_stopped_loses_events_and_the_guest_goes_on(disk: list[str]) -> None:
    with prompt(*disk) as guest, Tracing(guest, "vda") as trace:
        trace.process.send_signal(signal.SIGSTOP)
        many_requests(guest)
        trace.process.send_signal(signal.SIGCONT)
        trace.out.wait_for("bytes  ok")
        guest.command("blk read 5 1")
        trace.out.wait_for("sector 5 ")
        _code, lines, said = trace.interrupt()

    assert any("LOST" in line for line in lines)
    lost = re.search(r"(\d+) events lost", said)
    assert lost is not None and int(lost[1]) > 0


def test_a_reader_that_is_killed_leaves_nothing_to_the_next(disk: list[str]) -> None:
    with prompt(*disk) as guest:
        with Tracing(guest, "vda") as trace:
            trace.process.send_signal(signal.SIGSTOP)
            guest.command("blk read 7 1")
            trace.process.kill()
            trace.process.wait()
            many_requests(guest)
        with Tracing(guest, "vda") as trace:
            guest.command("blk read 5 1")
            trace.out.wait_for("sector 5 ")
            _code, lines, _said = trace.interrupt()

    assert [line.split()[3] for line in lines if " read " in line] == ["5"]


# A worker alone


def block_worker(worker: StartWorker, driver: Driver, tmp_path: Path) -> WorkerProcess:
    file = os.open(make_disk(tmp_path / "alone.img"), os.O_RDWR)
    try:
        return worker("workers.block", driver, ["--disk-fd", str(file)], pass_fds=[file], trace=True)
    finally:
        os.close(file)


def read_request(driver: Driver, sector: int, how: str = "direct") -> int:
    make = indirect if how == "indirect" else direct
    return make(driver, HEADER.pack(VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1).head


def test_what_is_told_in_full_is_all_that_was_in_the_ring(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path
) -> None:
    process = block_worker(worker, driver(), tmp_path)
    traced = TracedWorker(process)
    head = read_request(process.driver, 9, "indirect")
    process.kick()
    process.collect(1)
    start, *_, take, done, finish = traced.events()

    layout = process.driver.layouts[0]
    address, size, flags, _next = struct.unpack_from("<QIHH", process.driver.memory.view, layout.desc + 16 * head)
    assert isinstance(start, Start) and start.level == wire.FULL and start.queues[0].heads == ()
    assert isinstance(take, Take) and isinstance(done, Done) and isinstance(finish, Finish)
    assert take.data == HEADER.pack(VIRTIO_BLK_T_IN, 0, 9)
    assert (take.head, take.readable, take.writable) == (head, 16, SECTOR + 1)
    assert take.descriptors == ((head, address, size, flags, 0),)
    assert take.table == (address, bytes(process.driver.memory.view[address : address + size]))
    disk = (tmp_path / "alone.img").read_bytes()
    assert (done.written, done.data, done.last) == (SECTOR + 1, disk[9 * SECTOR : 10 * SECTOR] + b"\0", 0)
    assert done.time >= take.time


def test_chains_in_flight_are_told_of_when_a_trace_begins(driver: MakeDriver, worker: StartWorker) -> None:
    # An entropy source whose file has nothing as yet.
    readable, writable = os.pipe()
    process = worker("workers.rng", driver(), ["--source-fd", str(readable)], pass_fds=[readable], trace=True)
    chain = direct(process.driver, 32)
    process.kick()
    wait_until(process.driver.control.inflight[0].heads, "it is taken")
    traced = TracedWorker(process)
    os.write(writable, bytes(range(32)))
    process.collect(1)
    start, take, done, _finish = traced.events()
    os.close(readable)
    os.close(writable)

    assert isinstance(start, Start) and start.queues[0].heads == (chain.head,)
    assert isinstance(take, Take) and take.held and take.writable == 32
    assert isinstance(done, Done) and done.data == bytes(range(32))


def test_a_broken_ring_is_told_with_a_picture_of_it(driver: MakeDriver, worker: StartWorker, tmp_path: Path) -> None:
    process = block_worker(worker, driver(), tmp_path)
    traced = TracedWorker(process)
    misdeed = MISDEEDS["loop in a table"]
    misdeed(process.driver)
    process.kick()
    text = process.broken()
    process.reset()
    events = traced.events()

    (bad,) = [event for event in events if isinstance(event, Bad)]
    assert (bad.queue, bad.text) == (0, text)
    assert len(bad.table) == 16 * process.driver.layouts[0].num
    assert len(bad.indirect) == 1 and len(bad.indirect[0].content) == 32
    assert any(isinstance(event, Reset) for event in events)


def test_a_request_that_is_none_is_told_of_once(driver: MakeDriver, worker: StartWorker, tmp_path: Path) -> None:
    process = block_worker(worker, driver(), tmp_path)
    traced = TracedWorker(process)
    direct(process.driver, b"short", 1)
    process.kick()
    text = process.broken()

    assert [(event.queue, event.text) for event in traced.events() if isinstance(event, Bad)] == [(None, text)]


def test_events_that_find_no_room_are_counted(driver: MakeDriver, worker: StartWorker, tmp_path: Path) -> None:
    process = block_worker(worker, driver(), tmp_path)
    traced = TracedWorker(process, wire.HEADS)
    told = 0
    for _ in range(2000):
        process.driver.forget()
        read_request(process.driver, 1)
        process.kick()
        process.collect(1)
        told += 2
    assert process.trace is not None
    drained = drain(process.trace)
    read_request(process.driver, 2)
    process.kick()
    process.collect(1)
    _start, lost, *rest = traced.events()

    assert isinstance(lost, Lost)
    # FEATURES are told as well.
    assert drained + lost.events == told + 1
    assert [type(event) for event in rest] == [Take, Done, Finish]


def test_a_reader_that_has_gone_does_not_end_a_worker(driver: MakeDriver, worker: StartWorker, tmp_path: Path) -> None:
    process = block_worker(worker, driver(), tmp_path)
    process.send(ToWorker.TRACE, setting(wire.FULL, 1))
    assert process.trace is not None
    process.trace.close()
    read_request(process.driver, 1)
    process.kick()
    process.collect(1)

    assert process.stop() == 0


def test_a_device_has_its_own_rings_again_when_a_trace_has_ended(driver: MakeDriver, tmp_path: Path) -> None:
    made = driver()
    file = os.open(make_disk(tmp_path / "alone.img"), os.O_RDWR)
    block = Block(file, size=64 * SECTOR, serial="x")
    made.attach(block)
    rings = block.queues
    ours, theirs = os.pipe()
    tracer = Tracer(theirs, block, rings)
    assert block.queues is rings

    tracer.set(setting(wire.HEADS, 1))
    assert all(isinstance(queue, TracedVirtqueue) for queue in block.queues)
    tracer.set(wire.OFF)
    assert block.queues is rings
    for descriptor in (ours, theirs, file):
        os.close(descriptor)


def test_rings_that_tell_have_all_that_a_device_uses_of_its_own() -> None:
    for_watchers = {
        *("used_index", "heads_in_flight", "descriptor_table", "available_ring", "memory_at", "look_at"),
    }
    for_a_bus = {"spin", "begin", "stop", "lag", "look", "disable_kicks", "enable_kicks", "needs_call"}
    # A ring that tells has no requests to show to `peek`.
    for_what_was_peeked = {"answer"}
    public = {name for name in dir(Virtqueue) if not name.startswith("_")}

    assert public - for_watchers - for_a_bus - for_what_was_peeked <= set(dir(TracedVirtqueue)) | {"name", "indirect"}


def test_a_worker_does_not_load_what_it_takes_to_be_traced() -> None:
    program = "import sys, workers.block, workers.runtime; print('workers.traced' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ran.stdout == "False\n"


def test_a_confined_worker_can_be_traced(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("takes root")
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        prompt("--block", str(make_disk(tmp_path / "disk.img")), "--chroot", str(empty)) as guest,
        Tracing(guest, "vda") as trace,
    ):
        guest.command("blk read 5 1")
        trace.out.wait_for("sector 5 ")
        assert trace.interrupt()[0] == 0


# pcapng


def read_pcapng(data: bytes) -> tuple[dict[int, bytes], list[tuple[int, bytes, int]]]:
    """The options of the interface, and the frames: time in nanoseconds, content, direction."""
    blocks = []
    while data:
        kind, size = struct.unpack_from("<II", data)
        assert size % 4 == 0 and size <= len(data)
        assert struct.unpack_from("<I", data, size - 4) == (size,)
        blocks.append((kind, data[8 : size - 4]))
        data = data[size:]
    assert [kind for kind, _body in blocks[:2]] == [0x0A0D0D0A, 1]
    assert struct.unpack_from("<IHHq", blocks[0][1]) == (0x1A2B3C4D, 1, 0, -1)
    assert struct.unpack_from("<HHI", blocks[1][1]) == (1, 0, 0)
    frames = []
    for kind, body in blocks[2:]:
        assert kind == 6
        interface, high, low, kept, size = struct.unpack_from("<IIIII", body)
        assert interface == 0 and kept <= size
        (flags,) = struct.unpack("<I", options(body[20 + (kept + 3) // 4 * 4 :])[2])
        frames.append((high << 32 | low, body[20 : 20 + kept], flags))
    return options(blocks[1][1][8:]), frames


def options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while True:
        code, size = struct.unpack_from("<HH", data)
        if not code:
            return found
        found[code] = data[4 : 4 + size]
        data = data[4 + (size + 3) // 4 * 4 :]


def test_a_capture_has_times_directions_and_frames(tmp_path: Path) -> None:
    time = 1_700_000_000_123_456_789
    with (tmp_path / "capture").open("wb") as file:
        writer = PcapngWriter(file, "eth0", "lgmp")
        for size in range(14, 22):
            writer.frame(time + size, bytes(range(size)), size + 100, Direction.OUT if size % 2 else Direction.IN)
    interface, frames = read_pcapng((tmp_path / "capture").read_bytes())

    assert interface == {2: b"eth0", 9: b"\x09"}
    assert frames == [(time + size, bytes(range(size)), 2 if size % 2 else 1) for size in range(14, 22)]
