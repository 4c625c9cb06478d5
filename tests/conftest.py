"""What holds for all tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from random import SystemRandom

import launching
import pytest
from lguest_devices import GUESTS_OF, LguestDevice, host_options, needs_lguest_device
from networks import GUEST_MAC, HOST_IP, Namespace, namespace

from lgmp.network import Tap, TapOption

pytest_plugins = ["lgmp.testing.fixtures"]

# What a guest can run on: the embedded host, and the kernel's in eras with and without eventfds. (2.6.30 is between.)
# With each, the guests of that era.
HOSTS = ("embedded", "kernel-2.6.25", "kernel-2.6.31")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where CI=true nothing may be skipped: a test that is, fails the run (its reason is in the summary)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long tests run that decide at random, and by what; scripts/fuzz has options of its own."""
    group = parser.getgroup("lgmp")
    group.addoption("--seed", type=int, metavar="N", help="what random decisions follow from (a random one; printed)")
    group.addoption("--kills", type=int, default=20, metavar="N", help="how many workers test_many_kills kills (20)")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """What a test's random decisions follow from. Whoever uses it prints it: a failed test shows what it printed."""
    given: int | None = request.config.getoption("--seed")
    return SystemRandom().randrange(1 << 32) if given is None else given


@pytest.fixture
def here() -> Iterator[Namespace]:
    """A network namespace."""
    with namespace() as made:
        yield made


@pytest.fixture
def host_tap(here: Namespace) -> Iterator[Tap]:
    """A tap in it."""
    with here.entered():
        made = Tap.open(TapOption.parse(HOST_IP), GUEST_MAC)
    with made:
        yield made


@pytest.fixture
def wire(here: Namespace, host_tap: Tap) -> Iterator[socket.socket]:
    """The host's end of that."""
    with here.wire(host_tap.name) as made:
        yield made


def pytest_configure(config: pytest.Config) -> None:
    """The marks there are."""
    config.addinivalue_line("markers", "every_host: run on every host; guests are started by launching.launch")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked so once for each host."""
    if metafunc.definition.get_closest_marker("every_host"):
        hosts = [pytest.param(name, marks=needs_lguest_device if name.startswith("kernel") else ()) for name in HOSTS]
        metafunc.parametrize("host", hosts, indirect=True)


@pytest.fixture(autouse=True)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LguestDevice | None]:
    """What the test's guests run on: None for the embedded host, or the device."""
    name = getattr(request, "param", "embedded")
    if name == "embedded":
        yield None
        return
    era = name.removeprefix("kernel-")
    with LguestDevice(era) as device:
        on_it = launching.Host(host_options(device, era), f"abi={GUESTS_OF[era]} ")
        monkeypatch.setattr(launching, "host", on_it)
        yield device


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime directory for this test; guests of others who are this user are seen all the same."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    return path / "lgmp"
