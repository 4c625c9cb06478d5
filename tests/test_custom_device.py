"""--device: a class of the user's own serves a device, in a process of its own, and never in the launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, command_line, launch, prompt, run, wait_until

from lgmp.custom_device import Description, describe
from lgmp.errors import LgmpError
from lgmp.testing import direct
from lgmp.testing.fixtures import MakeDriver, StartWorker

every_host = pytest.mark.every_host
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="--chroot and --username take root")

# A device that answers with what it was given, in a file and in the request.
ECHO = '''
from helper import join
from workers.device import RequestDevice


class Echo(RequestDevice):
    device_type = 42
    config = b"\\x01\\x02"

    def __init__(self, before="", file=None):
        super().__init__()
        self.before = before.encode()
        if file is not None:
            with open(file, "rb") as opened:
                self.before += opened.read()

    def handle(self, queue, readable, writable):
        answer = self.before + join(readable)
        writable[0][: len(answer)] = answer
        return len(answer)


class Two(Echo):
    """Two rings, and a name that is not the class's."""

    kind = "pair"
    device_type = 43
    queue_count = 2
    features = 0
'''
HELPER = """
def join(segments):
    return b"".join(segments)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with a module of devices, and one that it imports."""
    (tmp_path / "echoes.py").write_text(ECHO)
    (tmp_path / "helper.py").write_text(HELPER)
    return tmp_path


def refused(directory: Path, device: str) -> str:
    """What `lgmp run` says of a device that it does not start a guest with: a traceback may come first."""
    with Launch("run", MEM, GUEST, f"--device={device}", "--", "quiet echo alive; poweroff", cwd=directory) as launched:
        code, out, err = launched.end()
    assert (code, out) == (1, "")
    *before, line = err.splitlines()
    assert before == [] or "Error" in before[-1], err
    return line.removeprefix("lgmp: ")


def module(directory: Path, text: str) -> str:
    """A device that is the class D of a module with that text; `...` stands for where it derives from RequestDevice."""
    start = "from workers.device import RequestDevice\nclass D(RequestDevice):\n    device_type = 42\n"
    (directory / "own.py").write_text(text.replace("...", start))
    return "own:D"


# In a guest


@every_host
def test_a_module_of_the_current_directory_serves_a_guest(here: Path) -> None:
    code, out, err = run("quiet ask 42 hello you; devices; poweroff", "--device", "echoes:Echo", cwd=here)

    assert (code, err) == (0, "")
    assert "ask 42: 9 bytes 'hello you'\n" in out
    assert re.search(r"^device 0: type 42 .* offered 00000010 accepted 00000010 config 0102$", out, re.MULTILINE)


@every_host
def test_a_file_wherever_it_is_serves_a_guest_with_options(here: Path) -> None:
    (here / "text").write_text("file says ")
    options = f"before=it is=so: ,file={here}/text"

    code, out, err = run("quiet ask 42 hello; poweroff", "--device", f"{here}/echoes.py:Echo,{options}")

    assert (code, out, err) == (0, "ask 42: 25 bytes 'it is=so: file says hello'\n", "")


@every_host
def test_there_may_be_many_of_any_kind_beside_others(here: Path) -> None:
    devices = [
        word for name in ("Echo,before=1", "Two,before=2", "Echo,before=3") for word in ("--device", f"echoes:{name}")
    ]
    code, out, err = run("quiet ask 42 a; ask -d 1 42 b; ask 43 c; rng read 5; poweroff", "--rng", *devices, cwd=here)

    assert (code, err) == (0, "")
    assert out.startswith("ask 42: 2 bytes '1a'\nask 42: 2 bytes '3b'\nask 43: 2 bytes '2c'\nrng read: 5 bytes")


def test_ps_says_what_each_is(here: Path) -> None:
    devices = ("--device", "echoes:Echo", "--device", "echoes:Two,before=x", "--device", f"{here}/echoes.py:Echo")
    with prompt(*devices, "--name", "testing", cwd=here) as launched:
        titles = {name: command_line(pid) for name, pid in launched.workers().items()}

    assert titles == {
        "echo0": "lgmp-echo echo0 echoes:Echo (guest testing)",
        "pair0": "lgmp-pair pair0 echoes:Two,before=x (guest testing)",
        "echo1": f"lgmp-echo echo1 {here}/echoes.py:Echo (guest testing)",
        "console": "lgmp-console console (guest testing)",
    }


@every_host
def test_a_device_that_is_killed_goes_on(here: Path) -> None:
    with prompt("--device", "echoes:Echo", cwd=here) as launched:
        launched.command("ask 42 before")
        pid = launched.workers()["echo0"]
        os.kill(pid, signal.SIGKILL)
        launched.err.wait_for("started again")
        launched.command("ask 42 after")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert "'before'" in out and "'after'" in out
    assert err.startswith(f"lgmp: worker echo0 (pid {pid}) was killed by SIGKILL; started again as pid ")


def test_a_request_in_flight_is_answered_by_the_successor(here: Path) -> None:
    with prompt("--device", "echoes:Echo", cwd=here) as launched:
        launched.command("ask 42 first")
        pid = launched.workers()["echo0"]
        os.kill(pid, signal.SIGSTOP)
        launched.send("ask 42 second\n")
        launched.out.wait_for("ask 42 second\n")
        os.kill(pid, signal.SIGKILL)
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "ask 42: 6 bytes 'second'" in out


@needs_root
def test_a_confined_device_has_opened_its_files_before_also_when_it_is_started_again(
    here: Path, tmp_path: Path
) -> None:
    jail = tmp_path / "jail"
    jail.mkdir(mode=0o700)
    secret = here / "secret"
    secret.write_text("only root may read this: ")
    secret.chmod(0o600)
    confined = ("--chroot", str(jail), "--username", "nobody")
    with prompt("--device", f"echoes:Echo,file={secret}", *confined, cwd=here) as launched:
        launched.command("ask 42 one")
        pid = launched.workers()["echo0"]
        assert os.readlink(f"/proc/{pid}/root") == str(jail)
        os.kill(pid, signal.SIGKILL)
        launched.err.wait_for("started again")
        launched.command("ask 42 two")
        wait_until(lambda: os.readlink(f"/proc/{launched.workers()['echo0']}/root") == str(jail), "the jail")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "'only root may read this: one'" in out
    assert "'only root may read this: two'" in out


def test_the_launcher_runs_no_code_of_the_module(here: Path) -> None:
    device = module(here, "import os\nopen(f'ran.{os.getpid()}', 'w').write(str(os.getppid()))\n...")
    with launch("quiet", "--device", device, cwd=here) as launched:
        launched.wait_until_ready()
        worker = launched.workers()["d0"]
        pid = launched.pid

    ran = {int(file.suffix[1:]): int(file.read_text()) for file in here.glob("ran.*")}
    assert worker in ran and pid not in ran
    assert list(ran.values()) == [pid, pid]  # who described it, and who served it


def test_a_module_does_not_take_the_place_of_pythons_own(here: Path) -> None:
    for name in ("select", "getopt", "queue"):
        (here / f"{name}.py").write_text("raise SystemExit('a trap')\n")

    assert run("quiet ask 42 hello; poweroff", "--device", "echoes:Echo", cwd=here)[0] == 0


def test_what_it_prints_goes_to_stderr_and_not_to_the_guests_output(here: Path) -> None:
    device = module(here, "print('module')\n...    def close(self):\n        print('closed')\n")
    code, out, _err = run("quiet echo alive; poweroff", "--device", device, cwd=here)

    assert (code, out) == (0, "alive\n")


@pytest.mark.parametrize("name", [b"\xff\xfe.py", "käse.py".encode(), b"two  words.py", b"-v.py", b"new\nline.py"])
def test_its_file_may_have_any_name(name: bytes, here: Path) -> None:
    os.symlink(here / "echoes.py", os.path.join(os.fsencode(here), name))
    device = os.fsdecode(name) + ":Echo"

    assert run("quiet ask 42 hello; poweroff", f"--device={device}", cwd=here)[:2] == (0, "ask 42: 5 bytes 'hello'\n")
    assert "has no class Ecko" in refused(here, device.replace("Echo", "Ecko"))


# What no guest is started with


def test_a_module_that_is_not_there_is_refused(here: Path) -> None:
    assert refused(here, "nowhere:Echo") == (
        "nowhere:Echo: no module nowhere in this directory or where Python looks for modules; its file will do as "
        "well, as FILE.py:Echo"
    )
    assert "no module echoes.deeper" in refused(here, "echoes.deeper:Echo")
    assert refused(here, "./nowhere.py:Echo") == (
        "./nowhere.py:Echo: cannot read ./nowhere.py: No such file or directory"
    )
    assert "its name has to end in .py" in refused(here, "/dev/null:Echo")


@pytest.mark.parametrize("words", ["echoes", "", ":Echo", "echoes:", "echoes:a b", ",before=x"])
def test_what_is_no_class_of_a_module_is_refused(words: str, here: Path) -> None:
    assert refused(here, words).endswith(
        " is no device: give MODULE:CLASS or FILE.py:CLASS, then ,KEY=VALUE for each option"
    )


def test_a_class_that_is_not_there_is_refused_and_those_that_are_named(here: Path) -> None:
    assert refused(here, "echoes:Ecko") == f"echoes:Ecko: {here}/echoes.py has no class Ecko; it has Echo, Two"
    assert refused(here, "helper:join") == (
        f"helper:join: {here}/helper.py has no class join; it has none that is a device"
    )


def test_a_class_that_is_no_device_is_refused(here: Path) -> None:
    (here / "own.py").write_text("class D:\n    device_type = 42\n")

    assert refused(here, "own:D") == (
        "own:D is no device: derive it from RequestDevice or Device, of the module workers.device"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("after=x", "echoes:Echo has no option after: it takes before, file"),
        ("before", "echoes:Echo: its options are KEY=VALUE, with no comma in a value, not 'before'"),
        ("before=a,b", "echoes:Echo: its options are KEY=VALUE, with no comma in a value, not 'b'"),
        ("before=a,before=b", "echoes:Echo: its option before is given twice"),
        ("file=/no/such", "echoes:Echo: /no/such: No such file or directory"),
    ],
)
def test_options_that_it_cannot_have_are_refused(options: str, line: str, here: Path) -> None:
    assert refused(here, f"echoes:Echo,{options}") == line


def test_an_option_that_it_needs_is_asked_for(here: Path) -> None:
    device = module(here, "...    def __init__(self, file): super().__init__()\n")

    assert refused(here, device) == "own:D needs the option file: --device own:D,file=VALUE"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("...    def __init__(self): 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("...    def close(self): 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("...    @property\n    def config(self): 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("...\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import not_there\n...", "ModuleNotFoundError: No module named 'not_there'"),
        ("class D(:\n", "SyntaxError: invalid syntax (own.py, line 1)"),
    ],
)
def test_an_exception_is_shown_and_said_to_be_its_authors(text: str, error: str, here: Path) -> None:
    device = module(here, text)
    with Launch("run", MEM, GUEST, "--device", device, cwd=here) as launched:
        code, out, err = launched.end()

    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"lgmp: {error}; this is a defect of own:D"
    assert f'File "{here}/own.py"' in err
    assert "workers/" not in err


@pytest.mark.parametrize(
    ("attributes", "line"),
    [
        ("device_type = 0", "device_type = 0: it has to be a number from 1 to 255"),
        ("device_type = 256", "device_type = 256: it has to be a number from 1 to 255"),
        ("device_type = '42'", "device_type = '42': it has to be a number from 1 to 255"),
        ("device_type = True", "device_type = True: it has to be a number from 1 to 255"),
        ("device_type = {1}", "device_type = {1}: it has to be a number from 1 to 255"),
        ("device_type = None", "device_type = None: it has to be a number from 1 to 255; give the class one"),
        ("queue_count = 0", "queue_count = 0: it has to be a number from 1 to 31"),
        ("queue_count = 32", "queue_count = 32: it has to be a number from 1 to 31"),
        ("features = -1", "features = -1: it has to be a number from 0 to 18446744073709551615"),
        ("features = 1 << 64", "features = 18446744073709551616: it has to be a number from 0 to 18446744073709551615"),
        ("config = 'x'", "config = 'x': it has to be bytes, 255 of them at most"),
        (
            "config = bytes(256)",
            f"config = {bytes(16)!r}..., 256 bytes: it has to be bytes, 255 of them at most",
        ),
        ("kind = 'a/b'", "kind = 'a/b': it has to be a word of letters, which with a number is the device's name"),
        ("kind = 'x1'", "kind = 'x1': it has to be a word of letters, which with a number is the device's name"),
        ("kind = 7", "kind = 7: it has to be a word of letters, which with a number is the device's name"),
        (
            "kind = 'x' * 99",
            f"kind = {'x' * 99!r}: it has to be a word of letters, which with a number is the device's ",
        ),
        ("kind = 'eth'", "kind = 'eth', as lgmp calls a kind of its own; give the class another"),
    ],
)
def test_what_no_device_can_be_is_refused(attributes: str, line: str, here: Path) -> None:
    device = module(here, f"...    {attributes}\n")

    assert refused(here, device).startswith(f"own:D: {line}")


def test_more_rings_than_a_host_has_interrupts_for_are_refused(here: Path) -> None:
    assert refused(here, module(here, "...    queue_count = 31\n")).startswith(
        "Too many devices: no interrupt line left"
    )


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("os._exit(0)", "ended with 0"),
        ("os._exit(7)", "ended with 7"),
        ("os.abort()", "was killed by SIGABRT"),
        ("raise SystemExit(3)", "ended with 3"),
        ("os.write(1, b'nonsense'); os._exit(0)", "ended with 0"),
    ],
)
def test_a_process_that_does_not_say_what_it_is_is_refused(text: str, end: str, here: Path) -> None:
    device = module(here, f"import os\n...    def __init__(self): {text}\n")
    with Launch("run", MEM, GUEST, "--device", device, cwd=here) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert err.endswith(
        f"lgmp: own:D has not said what it is, its process {end}: its module and __init__ are to return\n"
    )


def test_one_that_waits_is_not_waited_for_for_ever(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgmp.custom_device.PATIENCE", 0.5)
    monkeypatch.chdir(here)
    device = module(here, "import threading\nthreading.Event().wait()\n...")

    with pytest.raises(LgmpError, match="own:D has not said in 0 seconds what it is: its module and __init__ must not"):
        describe(device)


def test_what_it_leaves_running_does_not_keep_the_launcher_waiting(here: Path) -> None:
    text = "import subprocess\n...    def __init__(self):\n        super().__init__()\n        "
    leaves = "open('left', 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))\n"
    device = module(here, text + leaves + "    kind = 'eth'\n")
    with Launch("run", MEM, GUEST, "--device", device, cwd=here) as launched:
        assert launched.wait() == 1
        os.kill(int((here / "left").read_text()), signal.SIGKILL)


# Its own process


def test_a_device_says_what_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)

    assert describe("echoes:Echo,before=x") == Description("echo", 42, 1, 1 << 28, b"\x01\x02")
    assert describe(f"{here}/echoes.py:Two") == Description("pair", 43, 2, 0, b"\x01\x02")


def test_a_worker_serves_it(here: Path, driver: MakeDriver, worker: StartWorker) -> None:
    process = worker("workers.custom", driver(), ["--", f"{here}/echoes.py:Echo,before=you said "], name="echo0")
    chain = direct(process.driver, b"hello", 20)
    process.kick()
    process.collect(1)

    assert chain.answer.rstrip(b"\0") == b"you said hello"


def test_an_exception_in_a_worker_is_said_to_be_its_authors(
    here: Path, driver: MakeDriver, worker: StartWorker
) -> None:
    module(here, "...    def handle(self, queue, readable, writable): return 1 / 0\n")
    process = worker("workers.custom", driver(), ["--", f"{here}/own.py:D"], name="d0")
    direct(process.driver, b"hello", 5)
    process.kick()

    assert process.failure() == f"d0: ZeroDivisionError: division by zero; this is a defect of {here}/own.py:D"
    assert process.wait() == 1
    assert process.errors().endswith("ZeroDivisionError: division by zero\n")


def test_a_worker_without_a_class_says_what_it_takes() -> None:
    command = [sys.executable, "-P", "-m", "workers.custom", "--help"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)

    assert ran.stdout.startswith("Usage: python -m workers.custom OPTIONS [-- WHAT]")
