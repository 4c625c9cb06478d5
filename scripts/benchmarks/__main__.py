"""Measures lgmp on this machine: scripts/bench. Nothing here decides anything; the numbers are for people to judge."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import footprint
import guestcpu
import network
import restart
import ring
import roundtrip
import startup
import vhost_user
from samples import Samples

from lgmp import __version__
from lgmp.errors import LgmpError


@dataclass(slots=True)
class Report:
    """What was measured: a table of lines for a person as it comes, and everything as JSON at the end."""

    as_json: bool
    results: dict[str, object] = field(default_factory=dict)

    def section(self, key: str, title: str) -> dict[str, object]:
        """Begin a part of the table; gives the JSON object to put its numbers into."""
        self.line(f"\n{title}")
        numbers: dict[str, object] = {}
        self.results[key] = numbers
        return numbers

    def line(self, text: str) -> None:
        """One line of the table."""
        if not self.as_json:
            print(text, flush=True)

    def samples(self, key: str, title: str, measured: dict[str, Samples], names: dict[str, str]) -> None:
        """A part of the table with a line for each of `names` (measured key, words for a person)."""
        numbers = self.section(key, title)
        for kind, words in names.items():
            if kind in measured:
                numbers[kind] = measured[kind].as_json()
                self.line(f"  {words:<48}{measured[kind]}")


def measure_ring(report: Report, options: argparse.Namespace) -> None:
    """What a request costs the worker."""
    rounds = 3 if options.quick else 15
    numbers = ring.measure(rounds=rounds)
    report.section("ring", "A disk request in the worker (three descriptors), without messages").update(numbers)
    report.line(f"  {'os.preadv of 4 KiB by itself':<48}{numbers['bare']:>8.0f} ns")
    report.line(f"  {'ring: take a request and give it back':<48}{numbers['ring']:>8.0f} ns")
    report.line(f"  {'  without a record of it in flight':<48}{numbers['ring, unrecorded']:>8.0f} ns")
    report.line(f"  {'  what the record costs':<48}{numbers['recording']:>8.0f} ns")
    report.line(f"  {'whole request with its 4 KiB read':<48}{numbers['request']:>8.0f} ns")
    report.line(f"  {'  without counting it':<48}{numbers['request, uncounted']:>8.0f} ns")
    report.line(f"  {'  what counting costs':<48}{numbers['counting']:>8.0f} ns")
    report.line(f"  {'whole request / bare read':<48}{numbers['ratio']:>8.2f}")


def measure_round_trip(report: Report, options: argparse.Namespace) -> None:
    """What the way to the worker and back costs."""
    for place, measured in roundtrip.measure(rounds=4 if options.quick else 20).items():
        report.samples(
            f"round_trip, {place}",
            f"From a kick to its completion, through the message queues, both processes on {place}",
            measured,
            {
                "queues alone": "there and back between two processes",
                "no read": "block worker, request without a read",
                "4 KiB read": "block worker, request with a 4 KiB read",
            },
        )


def measure_restart(report: Report, options: argparse.Namespace) -> None:
    """How long a disk is without a worker when that is killed."""
    report.samples(
        "restart",
        "A killed block worker's successor, from the SIGKILL",
        restart.measure(10 if options.quick else 100),
        {
            "noticed": "the launcher knows of the end",
            "exec": "the successor's exec is done",
            "READY": "the successor is READY",
            "answer": "the launcher hears of its first answer",
        },
    )


def measure_start(report: Report, options: argparse.Namespace) -> None:
    """What it takes to start."""
    report.samples(
        "start",
        "Start, from the exec",
        startup.measure_start(3 if options.quick else options.runs),
        {
            "Python": "Python alone, to its first statement",
            "worker": "block worker, to READY",
            "launcher": "launcher with a disk, to the first instruction",
        },
    )


def measure_memory(report: Report, _options: argparse.Namespace) -> None:
    """What a running guest takes."""
    numbers = report.section("memory", "Memory of a guest with 16 MiB, a console and two disks, in KiB")
    measured = footprint.measure()
    report.line(f"  {'':<48}{'PSS':>8}{'own':>8}{'files':>8}{'guest memory':>14}")
    for title, parts in measured.items():
        numbers[title] = parts
        pss, own, files, guests = parts.values()
        report.line(f"  {title:<48}{pss:>8}{own:>8}{files:>8}{guests:>14}")


def measure_boot(report: Report, options: argparse.Namespace) -> None:
    """How long a guest takes to boot."""
    runs = 3 if options.quick else options.runs
    report.samples(
        "boot",
        "Boot, from `lgmp run`",
        {"test guest": startup.measure_test_guest(runs)},
        {"test guest": "test guest with a disk, to its power-off"},
    )
    if options.kernel is not None:
        measured = {"kernel": startup.measure_kernel(_kernel_arguments(options), options.until, runs)}
        words = f"{os.path.basename(options.kernel)}, to {options.until!r}"
        report.samples("kernel", "Your kernel", measured, {"kernel": words})


def measure_guest_cpu(report: Report, options: argparse.Namespace) -> None:
    """How fast the guest runs."""
    report.samples(
        "guest",
        "In the guest, on the embedded host",
        guestcpu.measure(1 if options.quick else 5),
        {
            "hcall": "hypercall",
            "syscall": "system call",
            "fault": "page fault",
            "blk": "4 KiB disk read",
        },
    )


def measure_network(report: Report, options: argparse.Namespace) -> None:
    """How fast frames go between guest and host, beside a veth pair."""
    try:
        measured = network.measure(1 if options.quick else 5)
    except PermissionError as error:
        report.section("network", f"Network: not measured, {error}")
        return
    report.samples(
        "network",
        "Network per second: a worker and a tap with a driver of ours; a veth pair; the test guest answering pings",
        measured,
        {key: key for key in measured},
    )


def measure_vhost_user(report: Report, options: argparse.Namespace) -> None:
    """How fast a disk is for a virtual machine monitor, beside qemu-storage-daemon."""
    title = f"Disk over vhost-user, 1 GiB in the page cache: per second, mean and p99 in us; beside {vhost_user.PEER}"
    numbers = report.section("vhost_user", title)
    rounds, seconds = (2, 0.5) if options.quick else (6, 2.0)
    measured = vhost_user.measure(rounds, seconds, options.directory)
    if measured.peer_is_missing is not None:
        report.line(f"  {measured.peer_is_missing}")
    report.line(f"  {'':<24}" + "".join(f"{server:>28}" for server in next(iter(measured.figures.values()))))
    for job, servers in measured.figures.items():
        columns = ""
        result: dict[str, object] = {}
        for server, figures in servers.items():
            summaries = figures.summaries()
            iops, mean, p99 = (summary.median for summary in summaries.values())
            columns += f"{iops:>12.0f}{mean:>8.0f}{p99:>8.0f}"
            result[server] = {key: summary.as_json() for key, summary in summaries.items()}
        if vhost_user.PEER in servers:
            ratio = measured.ratio(job)
            columns += f"   {ratio}"
            result["ratio"] = ratio.as_json()
        numbers[job] = result
        report.line(f"  {job:<24}{columns}")


_PARTS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "ring": measure_ring,
    "round-trip": measure_round_trip,
    "restart": measure_restart,
    "start": measure_start,
    "memory": measure_memory,
    "boot": measure_boot,
    "guest": measure_guest_cpu,
    "network": measure_network,
    "vhost-user": measure_vhost_user,
}


def _kernel_arguments(options: argparse.Namespace) -> list[str]:
    words = [options.memory, options.kernel]
    if options.initrd is not None:
        words += ["--initrd", options.initrd]
    for disk in options.block:
        words += ["--block", disk]
    return [*words, "--", *(options.arguments or ["console=hvc0"])]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure lgmp on this machine. Run it when the machine has nothing else to do.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="fewer runs, for a first look")
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="starts and boots of each kind (default: 10)")
    parser.add_argument(
        "--only", action="append", choices=list(_PARTS), help="measure this part (may be given again; default: all)"
    )
    parser.add_argument(
        "--directory",
        metavar="DIR",
        default=vhost_user.ROOT,
        help="where vhost-user has its file of 1 GiB, on a disk (default: the checkout)",
    )
    kernel = parser.add_argument_group("a kernel of yours to boot as well")
    kernel.add_argument("--kernel", metavar="FILE", help="a vmlinux or bzImage that lgmp run boots")
    kernel.add_argument("--initrd", metavar="FILE", help="its initial RAM disk")
    kernel.add_argument("--block", metavar="FILE", action="append", default=[], help="a disk of it")
    kernel.add_argument("--memory", metavar="MEM", default="64", help="its memory (default: 64)")
    kernel.add_argument(
        "--until",
        metavar="TEXT",
        default="Freeing unused kernel memory",
        help="measure until its console shows TEXT (default: what Linux says right before it starts init)",
    )
    kernel.add_argument("arguments", metavar="ARG", nargs="*", help="its arguments, after -- (default: console=hvc0)")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs takes a number from 1 on")
    return options


def main() -> int:
    """Measure what the command line asks for; gives the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started and made is cleaned up on the way out
    options = _parse()
    report = Report(options.json)
    machine = (
        f"Python {platform.python_version()}, Linux {platform.release()}, {len(os.sched_getaffinity(0))} processors"
    )
    report.results["lgmp"] = __version__
    report.results["machine"] = machine
    report.line(f"lgmp {__version__}, {machine}")
    report.line("Each number is a median; minimum to maximum follow.")
    for name, measure in _PARTS.items():
        if not options.only or name in options.only:
            measure(report, options)
    if options.json:
        json.dump(report.results, sys.stdout, indent=2)
        print()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, LgmpError, OSError) as error:
        sys.exit(f"scripts/bench: {error}")
