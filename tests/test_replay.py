"""`lgmp record` and `lgmp replay`: what a guest did is done again without it, and a difference is found and said."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path
from random import Random

import pytest
from launching import SECTOR, make_disk, prompt, wait_until
from traces import TracedWorker, Tracing, lgmp

from lgmp.testing import FEATURES, MISDEEDS, Driver, WorkerProcess, direct, indirect
from lgmp.testing.fixtures import MakeDriver, StartWorker
from lgmp.tracing.events import Bad, Done, Event, Features, Lost, QueueStart, Start, Take
from lgmp.virtio import ids
from lgmp.virtio.block import HEADER, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, config_space
from lgmp.virtio.net import HEADER_BYTES

every_host = pytest.mark.every_host

SECTORS = 64
EXAMPLE = f"{Path(__file__).parent}/examples/upside_down.py:UpsideDown"

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SECTORS)


@pytest.fixture
def before(tmp_path: Path, disk: Path) -> Path:
    """The disk as it was before the guest."""
    return Path(shutil.copy(disk, tmp_path / "before.img"))


def same(count: int, device: str = "vda") -> str:
    return f"{device}: {count} answers compared, no difference\n"


# What a guest did


@every_host
def test_a_disk_answers_as_it_did(tmp_path: Path, disk: Path, before: Path) -> None:
    recording = tmp_path / "vda.rec"
    with prompt("--block", str(disk)) as guest, Tracing(guest, "vda", "-o", recording, command="record") as record:
        guest.command("blk write 3 2 7")
        guest.command("blk crc")
        guest.command("blk flush")
        guest.command("blk id")
        guest.command("blk read 1000 1")
        guest.command("reset block0")
        guest.command("blk read 3 1")
        record.interrupt()
        guest.send("poweroff\n")
        guest.wait()
    assert recording.stat().st_mode & 0o777 == 0o600
    after = disk.read_bytes()
    was = before.read_bytes()
    assert after != was

    code, out, err = lgmp("replay", recording, "--device", f"block,disk={before}")
    assert (code, err) == (0, ""), out
    assert out.endswith("no difference\n")
    assert before.read_bytes() == was  # it was a copy that was written to

    code, out, _err = lgmp("replay", recording, "--device", f"block,disk={before},inplace")
    assert code == 0, out
    assert before.read_bytes() == after


def test_a_disk_that_is_another_answers_otherwise(tmp_path: Path, disk: Path, before: Path) -> None:
    recording = tmp_path / "vda.rec"
    with prompt("--block", str(disk)) as guest, Tracing(guest, "vda", "-o", recording, command="record") as record:
        guest.command("blk read 4 2")
        guest.command("blk read 8 1")
        record.interrupt()
    content = bytearray(before.read_bytes())
    content[5 * SECTOR + 7] ^= 0xFF
    before.write_bytes(content)

    code, out, err = lgmp("replay", recording, "--device", f"block,disk={before}")

    assert (code, err) == (1, "")
    first, last = out.splitlines()
    assert first.startswith("request 1 (read sector 4 1024 bytes): sector 5: 1 bytes differ, from byte 519 on: ")
    assert last == "vda: 2 answers compared, 1 difference"


def test_a_disk_that_is_read_only_now_says_so(tmp_path: Path, disk: Path, before: Path) -> None:
    recording = tmp_path / "vda.rec"
    with prompt("--block", str(disk)) as guest, Tracing(guest, "vda", "-o", recording, command="record") as record:
        guest.command("blk write 4 1 9")
        record.interrupt()

    code, out, _err = lgmp("replay", recording, "--device", f"block,disk={before},ro")

    assert code == 1
    assert "request 1 (write sector 4 512 bytes): the status is 1, then 0\n" in out


@every_host
def test_a_console_reads_and_writes_as_it_did(tmp_path: Path) -> None:
    recording = tmp_path / "console.rec"
    with prompt() as guest, Tracing(guest, "console", "-o", recording, command="record") as record:
        guest.command("echo hello")
        guest.command("console lines 200 70")
        record.interrupt()

    code, out, err = lgmp("replay", recording)

    assert (code, err) == (0, ""), out
    assert "no difference" in out


def test_random_bytes_are_the_same_again(tmp_path: Path) -> None:
    recording = tmp_path / "rng.rec"
    with prompt("--rng") as guest, Tracing(guest, "rng0", "-o", recording, command="record") as record:
        guest.command("rng read 3000")
        guest.command("reset 4")
        guest.command("rng read 50")
        record.interrupt()

    code, out, err = lgmp("replay", recording)

    assert (code, err) == (0, ""), out


def test_a_worker_that_was_killed_meanwhile_is_no_difference(tmp_path: Path, disk: Path, before: Path) -> None:
    recording = tmp_path / "vda.rec"
    with prompt("--block", str(disk)) as guest, Tracing(guest, "vda", "-o", recording, command="record") as record:
        for number in range(12):
            guest.send(f"blk stress 100 {number + 1}\n")
            wait_until(lambda: "vda" in guest.workers(), "it has a worker")
            os.kill(guest.workers()["vda"], signal.SIGKILL)
            guest.err.wait_for("started again", number + 1)
        guest.out.wait_for("blk stress", 24)
        guest.command("blk crc")
        record.interrupt()

    code, out, _err = lgmp("replay", recording, "--device", f"block,disk={before}")

    assert code == 0, out


@every_host
@pytest.mark.parametrize(
    "misdeed",
    ["loop", "head", "avail-jump", "outside", "indirect-nested", "indirect-outside", "header-15", "no-status"],
)
def test_a_misdeed_of_a_guest_comes_to_the_same_again(misdeed: str, tmp_path: Path, disk: Path, before: Path) -> None:
    recording = tmp_path / "vda.rec"
    with prompt("--block", str(disk)) as guest, Tracing(guest, "vda", "-o", recording, command="record") as record:
        guest.command("blk read 1 1")
        guest.send(f"misdeed {misdeed}\n")
        guest.err.wait_for("out of order")
        record.interrupt()

    code, out, err = lgmp("replay", recording, "--device", f"block,disk={before}")

    assert (code, out, err) == (0, same(2), "")


def test_a_device_of_ones_own_is_asked_again(tmp_path: Path) -> None:
    recording = tmp_path / "upside.rec"
    with (
        prompt("--device", EXAMPLE) as guest,
        Tracing(guest, "upside0", "-o", recording, command="record") as record,
    ):
        guest.command("ask 42 hello")
        record.interrupt()

    # What a recording names is not run for that alone.
    code, _out, err = lgmp("replay", recording)
    assert code == 1 and "--device MODULE:CLASS" in err
    assert lgmp("replay", recording, "--device", EXAMPLE) == (0, same(1, "upside0"), "")
    code, out, _err = lgmp("replay", recording, "--device", f"{EXAMPLE},sign=x")
    assert code == 1
    assert "bytes were written, then" in out


# What a worker alone did


def block_worker(worker: StartWorker, driver: Driver, disk: Path) -> WorkerProcess:
    file = os.open(disk, os.O_RDWR)
    try:
        return worker("workers.block", driver, ["--disk-fd", str(file)], pass_fds=[file], trace=True)
    finally:
        os.close(file)


def save_block(traced: TracedWorker, path: Path) -> Path:
    return traced.save(path, traced.events(), kind=ids.VIRTIO_ID_BLOCK, config=config_space(SECTORS, 128))


@pytest.mark.parametrize("name", [name for name, misdeed in MISDEEDS.items() if not misdeed.while_in_flight])
def test_every_misdeed_of_a_driver_comes_to_the_same_again(
    name: str, driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    misdeed = MISDEEDS[name]
    made = driver(start=65530)
    process = worker(
        "workers.block",
        made,
        ["--disk-fd", "0"],
        stdin=os.open(disk, os.O_RDWR),
        trace=True,
        features=FEATURES if misdeed.indirect_accepted else 0,
    )
    traced = TracedWorker(process)
    for sector in range(7):
        direct(made, HEADER.pack(VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1)
    process.kick()
    process.collect(7)
    misdeed(made)
    process.kick()
    assert misdeed.says in process.broken()
    process.reset()
    direct(made, HEADER.pack(VIRTIO_BLK_T_IN, 0, 9), SECTOR, 1)
    process.kick()
    process.collect(1)
    recording = save_block(traced, tmp_path / "it.rec")

    assert lgmp("replay", recording, "--device", f"block,disk={disk}") == (0, same(9), "")


def test_requests_that_were_under_way_when_it_began_are_replayed(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path
) -> None:
    readable, writable = os.pipe()
    process = worker(
        "workers.rng", driver(start=3), ["--source-fd", str(readable)], name="rng0", pass_fds=[readable], trace=True
    )
    direct(process.driver, 32)
    process.kick()
    wait_until(process.driver.control.inflight[0].heads, "it is taken")
    traced = TracedWorker(process)
    for _ in range(2):
        os.write(writable, bytes(range(32)))
        process.collect(1)
        direct(process.driver, 32)
        process.kick()
    recording = traced.save(tmp_path / "it.rec", traced.events(), kind=ids.VIRTIO_ID_RNG)
    os.close(readable)
    os.close(writable)

    assert lgmp("replay", recording) == (0, same(2, "rng0"), "")


def start_on_stream(driver: MakeDriver, worker: StartWorker, stream: socket.socket) -> WorkerProcess:
    """A network device's worker on a stream, with a trace socket."""
    descriptor = stream.fileno()
    options = ["--stream-fd", str(descriptor)]
    return worker("workers.net", driver(queues=2), options, name="eth0", pass_fds=[descriptor], trace=True)


def test_frames_go_in_and_come_out_again(driver: MakeDriver, worker: StartWorker, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    process = start_on_stream(driver, worker, theirs)
    traced = TracedWorker(process)
    for number in range(1, 40):
        direct(process.driver, HEADER_BYTES, 2000, queue=0)
        direct(process.driver, bytes(HEADER_BYTES), bytes([number]) * 37 * number, queue=1)
        process.kick()
        process.collect(1, 1)
        size = 41 * number
        ours.sendall(size.to_bytes(4, "big") + bytes([number]) * size)
        process.collect(1, 0)
        process.driver.forget()
    recording = traced.save(tmp_path / "it.rec", traced.events(), kind=ids.VIRTIO_ID_NET)
    ours.close()
    theirs.close()

    assert lgmp("replay", recording) == (0, same(78, "eth0"), "")


def as_if_killed_before_it_told(events: list[Event], queue: int) -> list[Event]:
    """The first answer of a ring was given, the worker was killed before it told of that, and had a successor."""
    start = events[0]
    assert isinstance(start, Start)
    at = next(number for number, event in enumerate(events) if isinstance(event, Done) and event.queue == queue)
    rings = [
        QueueStart(sum(isinstance(event, Done) and event.queue == number for event in events[: at + 1]), ())
        for number in range(len(start.queues))
    ]
    features = next(event.features for event in events if isinstance(event, Features))
    events[at] = start._replace(time=events[at].time, queues=tuple(rings), features=features)
    return events


def test_random_bytes_that_nobody_has_told_of_are_passed_over(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path
) -> None:
    with open("/dev/urandom", "rb") as source:
        process = worker(
            "workers.rng",
            driver(),
            ["--source-fd", str(source.fileno())],
            name="rng0",
            pass_fds=[source.fileno()],
            trace=True,
        )
    traced = TracedWorker(process)
    for _ in range(3):
        direct(process.driver, 32)
        process.kick()
        process.collect(1)
    events = as_if_killed_before_it_told(traced.events(), 0)
    recording = traced.save(tmp_path / "it.rec", events, kind=ids.VIRTIO_ID_RNG)

    assert lgmp("replay", recording) == (0, same(2, "rng0"), "")


@pytest.mark.parametrize("queue", [0, 1])
def test_frames_that_nobody_has_told_of_are_passed_over(
    queue: int, driver: MakeDriver, worker: StartWorker, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    process = start_on_stream(driver, worker, theirs)
    traced = TracedWorker(process)
    for number in range(1, 4):
        if queue:
            direct(process.driver, bytes(HEADER_BYTES), bytes([number]) * 100, queue=1)
        else:
            direct(process.driver, HEADER_BYTES, 2000, queue=0)
            ours.sendall((100).to_bytes(4, "big") + bytes([number]) * 100)
        process.kick()
        process.collect(1, queue)
    events = as_if_killed_before_it_told(traced.events(), queue)
    recording = traced.save(tmp_path / "it.rec", events, kind=ids.VIRTIO_ID_NET)
    ours.close()
    theirs.close()

    assert lgmp("replay", recording) == (0, same(2, "eth0"), "")


def test_the_pace_of_a_recording_can_be_kept(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    process = block_worker(worker, driver(), disk)
    traced = TracedWorker(process)
    for sector in range(3):
        indirect(process.driver, HEADER.pack(VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1)
        process.kick()
        process.collect(1)
    recording = save_block(traced, tmp_path / "it.rec")

    assert lgmp("replay", recording, "--timing", "--device", f"block,disk={disk}") == (0, same(3), "")


CRASHES = """
from workers.device import RequestDevice

class Crashes(RequestDevice):
    device_type = 42
    kind = "crashes"

    def __init__(self, on: str = "") -> None:
        super().__init__()
        self.on = on.encode()

    def handle(self, queue, readable, writable):
        if bytes(readable[0]) == self.on:
            raise ZeroDivisionError("as it was told to")
        return 0
"""


def test_a_worker_that_ends_in_a_replay_is_a_difference(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path
) -> None:
    (tmp_path / "crashes.py").write_text(CRASHES)
    device = f"{tmp_path}/crashes.py:Crashes"
    process = worker("workers.custom", driver(), ["--", device], name="crashes0", trace=True)
    traced = TracedWorker(process)
    for text in (b"one", b"two", b"six"):
        direct(process.driver, text, 5)
        process.kick()
        process.collect(1)
    recording = traced.save(tmp_path / "it.rec", traced.events(), kind=42)
    assert lgmp("replay", recording, "--device", device) == (0, same(3, "crashes0"), "")

    code, out, _err = lgmp("replay", recording, "--device", f"{device},on=two")

    assert code == 1
    ended, over, last = out.splitlines()
    assert ended.startswith("the worker ended: ")
    assert "ZeroDivisionError: as it was told to" in ended
    assert (over, last) == ("the replay ends here", "crashes0: 1 answers compared, 1 difference")


def test_an_answer_that_does_not_come_is_a_difference(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    process = block_worker(worker, driver(), disk)
    traced = TracedWorker(process)
    direct(process.driver, HEADER.pack(VIRTIO_BLK_T_IN, 0, 1), SECTOR, 1)
    process.kick()
    process.collect(1)
    # To an entropy source that has nothing it is a buffer to be filled.
    events = [event._replace(data=b"", written=0) if isinstance(event, Done) else event for event in traced.events()]
    recording = traced.save(tmp_path / "it.rec", events, kind=ids.VIRTIO_ID_RNG)

    code, out, _err = lgmp("replay", recording, "--device", "rng", "--patience", "0.2")

    assert code == 1
    assert "Output buffers in rng?" in out


def test_a_recording_that_is_cut_off_is_replayed_as_far_as_it_goes(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    process = block_worker(worker, driver(), disk)
    traced = TracedWorker(process)
    for sector in range(2):
        direct(process.driver, HEADER.pack(VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1)
        process.kick()
        process.collect(1)
    recording = save_block(traced, tmp_path / "it.rec")
    os.truncate(recording, recording.stat().st_size - 100)

    code, out, _err = lgmp("replay", recording, "--device", f"block,disk={disk}")

    assert (code, out) == (
        0,
        f"{recording} is cut off in the middle of an event; what precedes that was replayed\n{same(1)}",
    )


def test_what_follows_a_loss_is_not_replayed(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    process = block_worker(worker, driver(), disk)
    traced = TracedWorker(process)
    for sector in range(2):
        direct(process.driver, HEADER.pack(VIRTIO_BLK_T_OUT, 0, sector), bytes(SECTOR), 1)
        process.kick()
        process.collect(1)
    events = traced.events()
    last = max(number for number, event in enumerate(events) if isinstance(event, Take))
    events.insert(last, Lost(events[last].time, 5))
    recording = traced.save(tmp_path / "it.rec", events, kind=ids.VIRTIO_ID_BLOCK, config=config_space(SECTORS, 128))

    code, out, _err = lgmp("replay", recording, "--device", f"block,disk={disk}")

    assert (code, out) == (0, f"here 5 events were lost: what follows is not replayed\n{same(1)}")


def test_another_error_than_then_is_a_difference(
    driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    process = block_worker(worker, driver(), disk)
    traced = TracedWorker(process)
    MISDEEDS["loop"](process.driver)
    process.kick()
    text = process.broken()
    events = [event._replace(text="it was otherwise") if isinstance(event, Bad) else event for event in traced.events()]
    recording = traced.save(tmp_path / "it.rec", events, kind=ids.VIRTIO_ID_BLOCK, config=config_space(SECTORS, 128))

    code, out, _err = lgmp("replay", recording, "--device", f"block,disk={disk}")

    assert code == 1
    assert out.splitlines()[0] == f"the device said then: it was otherwise; now it says: {text}"


@pytest.mark.parametrize("seed", range(20))
def test_a_recording_with_wrong_bytes_is_refused_or_replayed(
    seed: int, driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path
) -> None:
    process = block_worker(worker, driver(), disk)
    traced = TracedWorker(process)
    for sector in range(3):
        indirect(process.driver, HEADER.pack(VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1)
        process.kick()
        process.collect(1)
    recording = save_block(traced, tmp_path / "it.rec")
    content = bytearray(recording.read_bytes())
    random = Random(seed)
    for _ in range(random.choice([1, 2, 5])):
        content[random.randrange(len(content))] = random.randrange(256)
    recording.write_bytes(content)

    code, out, err = lgmp("replay", recording, "--device", f"block,disk={disk}", "--patience", "1")

    assert code in (0, 1)
    assert "Traceback" not in out + err
    assert err.count("\n") == (0 if out.endswith(("difference\n", "differences\n")) else 1), err


def test_what_cannot_be_replayed_is_said(driver: MakeDriver, worker: StartWorker, tmp_path: Path, disk: Path) -> None:
    process = block_worker(worker, driver(), disk)
    recording = save_block(TracedWorker(process), tmp_path / "it.rec")
    (tmp_path / "junk").write_bytes(b"junk")

    def refused(*words: str | Path) -> str:
        code, out, err = lgmp("replay", *words)
        assert (code, out) == (1, "")
        assert err.startswith("lgmp: ") and err.count("\n") == 1
        return err

    assert "Failed to open" in refused(tmp_path / "nothing")
    assert "is no recording" in refused(tmp_path / "junk")
    assert "--device block,disk=FILE" in refused(recording)
    assert "needs disk=FILE" in refused(recording, "--device", "block")
    assert "has no setting 'x=y'" in refused(recording, "--device", f"block,disk={disk},x=y")
    assert "Failed to open" in refused(recording, "--device", f"block,disk={tmp_path}/nothing")
    assert "has 2 rings" in refused(recording, "--device", "net")
    assert "there is block,disk=FILE" in refused(recording, "--device", "tape")
    assert "--patience takes seconds" in refused(recording, "--device", f"block,disk={disk}", "--patience", "nan")
    os.truncate(disk, SECTOR * 10)
    assert "has 10 sectors, the recorded one had 64" in refused(recording, "--device", f"block,disk={disk}")
