"""`lgmp ps`: the guests of this user and their workers, once.

With --json it is an array of guests. Their keys, and those of their workers, are in `guest_status.py`; both have
`cpu_seconds`, `rss_bytes` and `pss_bytes` besides (`process_usage.py`). A guest's `error` is null, or says why its
launcher does not answer; all but `pid`, `state` ("not answering") and `workers` (none) is null then.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from lgmp.control_socket import Guest, Guests
from lgmp.guest_status import GUEST_KEYS
from lgmp.watching import human
from lgmp.watching.process_usage import Usage, read_usage

_WIDTH = 80
_INDENT = " " * 8
_HEADINGS = ("PID", "NAME", "STATE", "RST", "REQS", "IN", "OUT", "KICKS", "INTS", "ERR", "CPU", "MEM")
# 77 columns.
_ROW = "{:>7} {:<8} {:<8} {:>3} {:>5} {:>5} {:>5} {:>5} {:>5} {:>4} {:>6} {:>5}"


def ps(which: str | None, as_json: bool) -> int:
    """Print all guests, or the one that `which` names; gives the exit status. Raises LgmpError where there is none."""
    guests = Guests()
    try:
        guests.look()
        guests.refresh()
        found = guests.all() if which is None else [guests.pick(which)]
        described = [describe(guest) for guest in found]
    finally:
        guests.close()
    if as_json:
        print(json.dumps(described, indent=2))
    elif described:
        width = max(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
        print("\n\n".join("\n".join(_table(guest, width)) for guest in described))
    else:
        print("no guests")
    return 0


def describe(guest: Guest) -> dict[str, Any]:
    """A guest as --json has it."""
    if guest.status is None:
        nothing = dict.fromkeys(GUEST_KEYS)
        return {
            **nothing,
            "pid": guest.pid,
            "state": "not answering",
            "workers": [],
            "error": guest.problem,
            **Usage()._asdict(),
        }
    # Elsewhere the process ids are those of other processes.
    here = guest.connection is not None and guest.connection.same_processes

    def usage(pid: int | None) -> dict[str, Any]:
        return read_usage(pid if here else None)._asdict()

    return {
        **guest.status,
        "error": None,
        **usage(guest.pid),
        "workers": [{**worker, **usage(worker["pid"])} for worker in guest.status["workers"]],
    }


def _table(guest: dict[str, Any], width: int) -> list[str]:
    """The lines of one guest."""
    if guest["error"] is not None:
        return [f"guest {guest['pid']}", *_wrap(guest["error"], "  ", width)]
    used = guest["pss_bytes"] if guest["pss_bytes"] is not None else guest["rss_bytes"]
    about = (
        f"  pid {guest['pid']}, {guest['state']}, up {human.seconds(guest['uptime_seconds'])}, "
        f"{human.size(guest['memory_bytes'])} on the {human.printable(guest['host'])} host, "
        f"CPU {human.seconds(guest['cpu_seconds'])}, memory {human.size(used)}"
    )
    lines = [human.cut(f"guest {human.printable(guest['name'])}", width), about, _ROW.format(*_HEADINGS)]
    for worker in guest["workers"]:
        lines += _worker(worker, width)
    return lines


def _worker(worker: dict[str, Any], width: int) -> list[str]:
    requests = sum(queue["requests"] for queue in worker["queues"])
    used = worker["pss_bytes"] if worker["pss_bytes"] is not None else worker["rss_bytes"]
    row = _ROW.format(
        worker["pid"] if worker["pid"] is not None else "-",
        human.cut(human.printable(worker["name"]), 8),
        state_of(worker),
        human.count(worker["restarts"]),
        human.count(requests),
        human.size(worker["bytes_in"]),
        human.size(worker["bytes_out"]),
        human.count(worker["kicks"]),
        human.count(worker["interrupts"]),
        human.count(worker["errors"]),
        human.seconds(worker["cpu_seconds"]),
        human.size(used),
    )
    lines = [row]
    about = " ".join(part for part in (worker["kind"], worker["details"]) if part)
    lines.append(human.cut(_INDENT + human.printable(about), width))
    for number, queue in enumerate(worker["queues"]):
        lines.append(
            f"{_INDENT}queue {number}: next avail {queue['next_avail']}, next used {queue['next_used']}, "
            f"{queue['in_flight']} of {queue['num']} in flight"
        )
    if worker["error"] is not None:
        lines += _wrap(f"last error: {human.printable(worker['error'])}", _INDENT, width)
    return lines


def state_of(worker: dict[str, Any]) -> str:
    """A worker's state in a word or two: where it runs, but its device is out of order, that."""
    return "broken" if worker["broken"] and worker["state"] == "running" else str(worker["state"])


def _wrap(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "  ")
