"""Workers killed at random, every few tens of milliseconds, while a guest works all of its devices and checks them.

    scripts/test tests/test_many_kills.py --kills 200 --seed 1

The seed decides who is killed, when and by which signal; what the victim is doing just then is up to the machine.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from launching import HANGS_AFTER, PROMPT, SECTOR, Launch, checksum, launch, make_disk
from lguest_devices import needs_lguest_device
from networks import GUEST_IP, HOST_IP, Namespace

SECTORS = 1024
# Between one kill and the next, in seconds.
PAUSES = 0.02, 0.06
OUTSIDE = [signal.SIGKILL, signal.SIGTERM]
# What looks as if the worker had done it itself. More than four within ten seconds that kept it from getting anything
# done, and it is given up, as it should be: so many are left to chance nowhere.
CRASHES = [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS]
CRASHES_AT_MOST, WITHIN = 4, 10.0

hosts = pytest.mark.parametrize(
    "host", ["embedded", pytest.param("kernel-2.6.31", marks=needs_lguest_device)], indirect=True
)


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--kills")
    return count


@pytest.fixture(autouse=True)
def no_core_files() -> Iterator[None]:
    """Whoever is killed by such signals leaves none behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


class Killer:
    """Kills a launcher's workers; `victims` are the devices whose worker it was, in their order."""

    def __init__(self, launched: Launch, random: Random) -> None:
        self._launched = launched
        self._random = random
        self._crashes: dict[str, list[float]] = {}
        self.victims: list[str] = []

    def kill(self, device: str) -> None:
        """Kill whoever serves a device now, if somebody does: a successor may not have been started yet."""
        now = time.monotonic()
        crashes = self._crashes[device] = [when for when in self._crashes.get(device, []) if now - when < WITHIN]
        number = self._random.choice(OUTSIDE + CRASHES)
        if number in CRASHES and len(crashes) >= CRASHES_AT_MOST:
            number = signal.SIGKILL
        pid = self._launched.workers().get(device)
        if pid is None:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(pidfd, number)
            self.victims.append(device)
            if number in CRASHES:
                crashes.append(now)
            # Or it might be killed twice, and die but once.
            assert select.select([pidfd], [], [], HANGS_AFTER)[0], f"{number} does not end {device}'s worker"
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)

    def kill_many(self, count: int, devices: list[str]) -> None:
        """Kill so many in all, one after another."""
        deadline = time.monotonic() + HANGS_AFTER + count
        while len(self.victims) < count:
            assert time.monotonic() < deadline, f"{len(self.victims)} of {count} killed"
            self.kill(self._random.choice(devices))
            # Not to wait for anything: this is how fast they are killed.
            time.sleep(self._random.uniform(*PAUSES))
            assert self._launched.process.poll() is None, self._launched.err.text


def check_console(output: str, kills: int) -> int:
    """All rounds were told of, in order, a line again at most for each kill; gives the number of the last."""
    last = repeated = 0
    for number in map(int, re.findall(r"torture round (\d+)\n", output)):
        if number == last:
            repeated += 1
            continue
        assert number == last + 1, f"round {number} after {last}"
        last = number
    assert repeated <= kills
    return last


@hosts
def test_a_guest_whose_workers_are_killed_all_the_time_finds_nothing_wrong(
    here: Namespace, tmp_path: Path, kills: int, seed: int
) -> None:
    print(f"--seed {seed} --kills {kills}")
    disk = make_disk(tmp_path / "disk.img", SECTORS)
    options = ("--block", str(disk), "--rng", "--tunnet", HOST_IP)
    with here.entered(), launch(f"quiet net addr {GUEST_IP}; torture 1000000 {HOST_IP}", *options) as launched:
        launched.out.wait_for("torture round 20")
        killer = Killer(launched, Random(seed))
        killer.kill_many(kills, ["vda", "console", "eth0", "rng0"])
        rounds = launched.out.text.count("torture round")
        launched.out.wait_for("torture round", rounds + 20)
        launched.send("\x03")
        launched.out.wait_for("torture ok")
        launched.out.wait_for(PROMPT)
        launched.command("blk crc")
        launched.command(f"net ping {HOST_IP} 3")
        launched.send("poweroff\n")
        code, output, errors = launched.end()

    said = errors.splitlines()
    assert code == 0, errors
    # Each was found dead and replaced, once; nothing else went wrong.
    restarts = [re.match(r"lgmp: worker (\w+) \(pid \d+\) was killed by SIG\w+; started again", line) for line in said]
    assert all(restarts), errors
    assert sorted(found[1] for found in restarts if found) == sorted(killer.victims)
    # What the guest compared itself, and what it saw as its disk in the end.
    last = check_console(output, killer.victims.count("console"))
    found = re.search(r"torture: (\d+) of (\d+) pings answered\r?\ntorture ok (\d+)", output)
    assert found, output[-500:]
    answered, sent, rounds = map(int, found.groups())
    assert rounds == sent == last
    assert f"blk crc: status 0 sectors {SECTORS} checksum {checksum(disk.read_bytes())}" in output
    assert disk.stat().st_size == SECTORS * SECTOR
    # Each time the frame that was in flight may be lost, or be sent twice.
    assert abs(sent - answered) <= killer.victims.count("eth0")
    assert f"net ping {HOST_IP}: 3 of 3 answered" in output
