"""`lgmp top`: the guests of this user and their workers, live on a terminal.

Twice a second each launcher is asked over a connection that stays open, and what it answers is compared with what it
said before: what is shown are rates. To be cheap, /proc is read for no more than CPU time and memory, and curses sends
the terminal what has changed alone.
"""

from __future__ import annotations

import contextlib
import locale
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lgmp.control_socket import Guest, Guests
from lgmp.errors import LgmpError
from lgmp.watching import human
from lgmp.watching.process_usage import Usage, read_cheap_usage
from lgmp.watching.ps import state_of

try:
    import curses
except ImportError:  # Python can be built without
    curses = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from curses import window

# Seconds.
_EVERY = 0.5
# A launcher that is well answers within a millisecond; one that is not is not to keep the keys waiting.
_PATIENCE = 0.2
# CPU time is counted in ticks of 10 ms: over so many samples, half a percent.
_CPU_SAMPLES = 5

_HEADINGS = ("PID", "NAME", "STATE", "REQ/s", "IN/s", "OUT/s", "KICK/s", "INT/s", "FLY", "CPU%", "MEM", "RST", "ERR")
# 79 columns.
_ROW = "{:>7} {:<8} {:<8} {:>5} {:>5} {:>5} {:>6} {:>5} {:>3} {:>4} {:>5} {:>3} {:>3}"
# What of that is left of CPU%: a guest's line has its own CPU and memory in the same place.
_BEFORE_CPU = 60
# Where the keys' signals, and the end of the terminal, are not to leave it as it is.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# What keys do to the first line that is shown, in lines and in pages.
_LINES = {"KEY_UP": -1, "KEY_DOWN": 1, "k": -1, "j": 1}
_PAGES = {"KEY_PPAGE": -1, "KEY_NPAGE": 1}
_QUIT = {"q", "Q", "\x03"}


def top(which: str | None) -> int:
    """Show all guests, or the one that `which` names, until q is typed or that has ended; gives the exit status.

    Raises LgmpError where there is no such guest, or no terminal for it.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LgmpError("top needs a terminal to show anything on; `lgmp ps` prints the same once, anywhere")
    if curses is None:
        raise LgmpError("top needs the curses module, which this Python was built without; there is `lgmp ps`")
    guests = Guests()
    try:
        guests.look()
        guests.refresh()
        if which is not None:
            guests.keep(guests.pick(which))
        with contextlib.suppress(locale.Error):  # names may have any character: curses has to know which there are
            locale.setlocale(locale.LC_ALL, "")
        with _signals() as heard:
            try:
                # That asks what the terminal can do, before it changes anything about it.
                ended = curses.wrapper(lambda screen: _Top(screen, guests, heard, only=which is not None).run())
            except curses.error as error:
                name = os.environ.get("TERM", "")
                raise LgmpError(f"top cannot use this terminal (TERM={name}): {error}; there is `lgmp ps`") from error
            except KeyboardInterrupt:  # the way out of many a program
                return 0
    finally:
        guests.close()
    if ended is not None:
        print(f"guest {human.printable(ended)} has ended")
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Signals that would end us at once unwind us instead, so that the terminal is given back as it was.

    Gives a descriptor from which the numbers of signals come, among them SIGWINCH: the terminal has another size.
    """

    def unwind(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    heard, bell = os.pipe()
    for descriptor in (heard, bell):
        os.set_blocking(descriptor, False)
    old = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGWINCH)}
    for number in _SIGNALS:
        if old[number] != signal.SIG_IGN:
            signal.signal(number, unwind)
    # One that has a handler curses leaves alone. It does not notice two changes that cancel out, and that leave a
    # terminal with less on it than it had.
    signal.signal(signal.SIGWINCH, lambda _number, _frame: None)
    old_bell = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    try:
        yield heard
    finally:
        signal.set_wakeup_fd(old_bell)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(heard)
        os.close(bell)


class Line(NamedTuple):
    """A line to show."""

    text: str
    bold: bool = False


class Rates:
    """Turns counts that only grow into rates: of two samples, and CPU time over a few more."""

    def __init__(self) -> None:
        """There is no sample yet."""
        self._before: tuple[float, list[int]] | None = None
        self._cpu: deque[tuple[float, int | None, float | None]] = deque(maxlen=_CPU_SAMPLES)

    def take(self, when: float, counts: list[int]) -> list[float | None]:
        """What came a second since the last sample; None where there is none. `when` is in seconds."""
        before, self._before = self._before, (when, counts)
        if before is None or when <= before[0]:
            return [None] * len(counts)
        return [(now - then) / (when - before[0]) for now, then in zip(counts, before[1], strict=True)]

    def take_cpu(self, when: float, pid: int | None, cpu_seconds: float | None) -> float | None:
        """The part of a CPU that was used, in percent; None where that is not known of this process yet."""
        if self._cpu and self._cpu[-1][1] != pid:
            self._cpu.clear()  # another process has taken over
        self._cpu.append((when, pid, cpu_seconds))
        first, _pid, used = self._cpu[0]
        if cpu_seconds is None or used is None or when <= first:
            return None
        return max(0.0, 100 * (cpu_seconds - used) / (when - first))


class Sampler:
    """Makes the lines of each guest out of one status after another."""

    def __init__(self) -> None:
        """No guest is known yet."""
        # By the launcher's process id and the name of the worker, "" for the launcher itself.
        self._rates: dict[tuple[int, str], Rates] = {}

    def lines(self, guests: list[Guest]) -> list[Line]:
        """What there is to say of the guests, which have been asked just now."""
        lines: list[Line] = []
        for guest in guests:
            if lines:
                lines.append(Line(""))
            lines += self._guest(guest)
        pids = {guest.pid for guest in guests}
        for key in [key for key in self._rates if key[0] not in pids]:
            del self._rates[key]
        return lines

    def _guest(self, guest: Guest) -> Iterator[Line]:
        status = guest.status
        if status is None or guest.problem:
            yield Line(human.printable(guest.problem), bold=True)
        if status is None:
            return
        cpu, memory = self._usage(guest, guest.pid, "")
        about = (
            f"{status['state']}  up {human.seconds(status['uptime_seconds'])}  "
            f"{human.size(status['memory_bytes'])} {human.printable(status['host'])}"
        )
        name = human.cut(human.printable(status["name"]), _BEFORE_CPU - len(about) - 10)
        yield Line(f"{f'{guest.pid:>7} {name}  {about}':<{_BEFORE_CPU}} {cpu:>4} {memory:>5}", bold=True)
        for worker in status["workers"]:
            yield self._worker(guest, worker)
            if worker["error"] is not None and (worker["broken"] or worker["state"] != "running"):
                yield Line(f"{'':8}{human.printable(worker['error'])}")

    def _worker(self, guest: Guest, worker: dict[str, Any]) -> Line:
        requests = sum(queue["requests"] for queue in worker["queues"])
        counts = [requests, *(worker[key] for key in ("bytes_in", "bytes_out", "kicks", "interrupts"))]
        rates = self._of(guest, worker["name"]).take(guest.heard, counts)
        cpu, memory = self._usage(guest, worker["pid"], worker["name"])
        return Line(
            _ROW.format(
                worker["pid"] if worker["pid"] is not None else "-",
                human.cut(human.printable(worker["name"]), 8),
                state_of(worker),
                human.count(rates[0]),
                human.size(rates[1]),
                human.size(rates[2]),
                human.count(rates[3]),
                human.count(rates[4]),
                sum(queue["in_flight"] for queue in worker["queues"]),
                cpu,
                memory,
                human.count(worker["restarts"]),
                human.count(worker["errors"]),
            )
        )

    def _usage(self, guest: Guest, pid: int | None, name: str) -> tuple[str, str]:
        """CPU in percent and memory of one of a guest's processes, as text."""
        here = guest.connection is not None and guest.connection.same_processes
        usage = read_cheap_usage(pid) if here else Usage()
        cpu = self._of(guest, name).take_cpu(time.monotonic(), pid, usage.cpu_seconds)
        return ("-" if cpu is None else f"{cpu:.1f}" if cpu < 99.95 else f"{cpu:.0f}"), human.size(usage.rss_bytes)

    def _of(self, guest: Guest, name: str) -> Rates:
        return self._rates.setdefault((guest.pid, name), Rates())


class _Top:
    """The screen and its keys."""

    def __init__(self, screen: window, guests: Guests, heard: int, only: bool) -> None:
        """`heard`: where the numbers of signals come from; `only`: those guests alone, and no others that may come."""
        self._screen = screen
        self._heard = heard
        self._poll = select.poll()
        for descriptor in (sys.stdin.fileno(), heard):
            self._poll.register(descriptor, select.POLLIN)
        self._guests = guests
        self._only = only
        self._sampler = Sampler()
        self._lines: list[Line] = []
        # The first of them that is shown.
        self._first = 0
        self._fit()
        screen.nodelay(True)
        with contextlib.suppress(curses.error):  # there are terminals without
            curses.use_default_colors()
        with contextlib.suppress(curses.error):
            curses.curs_set(0)

    def run(self) -> str | None:
        """Until the user has enough, or the only guest has ended; its name then."""
        names = [guest.name for guest in self._guests.all()]
        while True:
            began = time.monotonic()
            if not self._only:
                self._guests.look()
            self._guests.refresh(_PATIENCE)
            guests = self._guests.all()
            if self._only and not guests:
                return names[0]
            self._lines = self._sampler.lines(guests)
            self._draw(guests)
            while (left := began + _EVERY - time.monotonic()) > 0:
                for descriptor, _events in self._poll.poll(left * 1000):
                    if descriptor == self._heard:
                        self._hear()
                    elif not self._take_keys():
                        return None
                    self._draw(guests)

    def _hear(self) -> None:
        """A signal has come."""
        if signal.SIGWINCH in os.read(self._heard, 1 << 16):
            self._fit()
            self._screen.clear()  # whatever it has made of what was there

    @staticmethod
    def _fit() -> None:
        """Have curses know the terminal's size: from LINES and COLUMNS it may have that of another one."""
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        if rows and columns:
            curses.resizeterm(rows, columns)

    def _take_keys(self) -> bool:
        """Do what was typed; False where that is to quit."""
        keys = 0
        while True:
            try:
                key = self._screen.getkey()
            except curses.error:
                break
            keys += 1
            if key in _QUIT:
                return False
            self._scroll(key)
        if not keys and not sys.stdin.isatty():  # it has hung up, and nobody told us
            raise SystemExit(1)
        return True

    def _scroll(self, key: str) -> None:
        height, _width = self._screen.getmaxyx()
        body = max(height - 2, 1)
        self._first += _LINES.get(key, 0) + _PAGES.get(key, 0) * body

    def _draw(self, guests: list[Guest]) -> None:
        screen = self._screen
        height, _width = screen.getmaxyx()
        body = max(height - 2, 1)
        self._first = max(0, min(self._first, len(self._lines) - body))
        below = len(self._lines) - self._first - body
        more = "  arrows: more" if self._first or below > 0 else ""
        count = "no guests" if not guests else "1 guest" if len(guests) == 1 else f"{len(guests)} guests"
        screen.erase()
        self._put(0, Line(f"lgmp top: {count}, {time.strftime('%H:%M:%S')}  q: quit{more}"))
        self._put(1, Line(_ROW.format(*_HEADINGS)), curses.A_REVERSE)
        for row, line in enumerate(self._lines[self._first : self._first + body]):
            self._put(row + 2, line)
        screen.refresh()

    def _put(self, row: int, line: Line, attributes: int = 0) -> None:
        height, width = self._screen.getmaxyx()
        if row >= height:
            return
        attributes |= curses.A_BOLD if line.bold else 0
        # Inserted, not added: that would put the cursor behind it, and there is nothing behind the last column.
        with contextlib.suppress(curses.error):
            self._screen.insnstr(row, 0, human.cut(line.text, width), width, attributes)
