"""--chroot and --username: workers that are locked in and have no rights, and work all the same."""

from __future__ import annotations

import os
import pwd
import signal
import stat
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, Terminal, launch, make_disk, prompt, run
from networks import GUEST_IP, HOST_IP, Namespace

from lgmp.confinement import Confinement
from lgmp.errors import LgmpError

USER = "nobody"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="--chroot and --username take root")


@pytest.fixture
def jail(tmp_path: Path) -> Path:
    """An empty directory that only root may enter."""
    directory = tmp_path / "jail"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk that only root may open."""
    made = make_disk(tmp_path / "disk.img")
    made.chmod(0o600)
    return made


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def root_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/root")


def open_directories(pid: int) -> list[str]:
    """The directories that a process has open, each of which would be a way out."""
    directory = f"/proc/{pid}/fd"
    return [name for name in os.listdir(directory) if stat.S_ISDIR(os.stat(f"{directory}/{name}").st_mode)]


def confined(jail: Path) -> tuple[str, ...]:
    return ("--chroot", str(jail), "--username", USER)


# Where it takes effect


@needs_root
def test_workers_are_locked_in_as_the_user_with_no_rights_and_the_launcher_is_not(jail: Path, disk: Path) -> None:
    user = pwd.getpwnam(USER)
    with prompt("--block", str(disk), "--rng", *confined(jail)) as launched:
        workers = launched.workers()
        assert sorted(workers) == ["console", "rng0", "vda"]
        for pid in workers.values():
            found = status(pid)
            assert found["Uid"].split() == [str(user.pw_uid)] * 4
            assert found["Gid"].split() == [str(user.pw_gid)] * 4
            assert found["Groups"].split() == [str(group) for group in os.getgrouplist(USER, user.pw_gid)]
            assert (int(found["CapPrm"], 16), int(found["CapEff"], 16)) == (0, 0)
            assert root_of(pid) == os.readlink(f"/proc/{pid}/cwd") == str(jail)
            assert open_directories(pid) == []
        assert root_of(launched.pid) == "/"
        assert status(launched.pid)["Uid"].split()[0] == str(os.getuid())


@needs_root
def test_each_goes_without_the_other(jail: Path) -> None:
    with prompt("--username", USER) as launched:
        (pid,) = launched.workers().values()
        assert root_of(pid) == "/"
        assert status(pid)["Uid"].split()[0] == str(pwd.getpwnam(USER).pw_uid)
    with prompt("--chroot", str(jail)) as launched:
        (pid,) = launched.workers().values()
        assert root_of(pid) == str(jail)
        assert status(pid)["Uid"].split()[0] == str(os.getuid())


@needs_root
def test_a_directory_may_be_named_from_where_we_are(jail: Path) -> None:
    code, out, err = run("quiet echo hello; poweroff", "--chroot", jail.name, cwd=jail.parent)

    assert (code, out, err) == (0, "hello\n", "")


@needs_root
def test_a_confined_disk_is_read_and_written_and_reset_under_load(jail: Path, disk: Path) -> None:
    code, out, err = run(
        "quiet blk write 0 64 5; blk verify 0 64 5; blk reset; blk verify 0 64 5; blk flush; rng read 100; poweroff",
        *("--block", str(disk), "--rng", *confined(jail)),
    )

    assert (code, err) == (0, "")
    assert out.count("blk verify 0 64: status 0 all equal") == 2, out
    assert "rng read: 100 bytes" in out


@needs_root
def test_a_confined_network_works(jail: Path, here: Namespace) -> None:
    with here.entered():
        code, out, err = run(
            f"quiet net addr {GUEST_IP}; net ping {HOST_IP} 3 1472; poweroff", "--tunnet", HOST_IP, *confined(jail)
        )

    assert (code, err) == (0, "")
    assert "3 of 3 answered" in out


@needs_root
def test_a_confined_console_takes_what_is_typed(jail: Path) -> None:
    with prompt(*confined(jail)) as launched:
        launched.command("echo typed")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert (code, err) == (0, "")
    assert "typed\n" in out


@needs_root
def test_a_confined_worker_names_what_is_wrong(jail: Path, disk: Path) -> None:
    code, _out, err = run(
        "quiet misdeed loop; echo alive", "--block", str(disk), "--on-device-error", "die", *confined(jail)
    )

    assert code == 1
    assert err.startswith("lgmp: vda: queue 0: descriptor ") and err.endswith("\n") and err.count("\n") == 1


@needs_root
def test_workers_are_confined_again_after_a_reboot(jail: Path, disk: Path) -> None:
    with prompt("--block", str(disk), *confined(jail)) as launched:
        launched.command("reboot")
        launched.wait_until_ready()
        assert {root_of(pid) for pid in launched.workers().values()} == {str(jail)}
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


# Nothing stays behind


@needs_root
def test_confined_workers_go_when_their_launcher_is_killed(jail: Path, disk: Path) -> None:
    with prompt("--block", str(disk), "--rng", *confined(jail)) as launched:
        launched.signal(signal.SIGKILL)
        launched.wait_until_nothing_is_left()


@needs_root
def test_a_signal_ends_a_guest_whose_confined_worker_is_stuck(jail: Path, disk: Path) -> None:
    with prompt("--block", str(disk), *confined(jail)) as launched:
        os.kill(launched.workers()["vda"], signal.SIGSTOP)
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


@needs_root
def test_a_killed_launcher_leaves_nothing_at_any_moment_of_its_start(jail: Path) -> None:
    for worker in ("vda", "console", ""):
        with launch("quiet", "--block", str(make_disk(jail.parent / "d.img")), *confined(jail)) as launched:
            while worker and worker not in launched.workers():
                assert launched.process.poll() is None
            launched.signal(signal.SIGKILL)
            launched.wait()
            launched.wait_until_nothing_is_left()


@needs_root
def test_a_confined_console_gives_the_terminal_back_when_the_launcher_is_killed(jail: Path) -> None:
    with Terminal() as terminal:
        before = terminal.modes()
        with prompt(*confined(jail), terminal=terminal) as launched:
            assert terminal.raw
            launched.signal(signal.SIGKILL)
            launched.wait_until_nothing_is_left()
            assert terminal.modes() == before


# What cannot be


def test_a_user_or_directory_that_is_not_there_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for option, value, words in (
        ("--username", "no-such-user", "incorrect username? This machine has no user 'no-such-user'"),
        ("--chroot", "/no/such/directory", "No such file or directory"),
        ("--chroot", str(file), "Not a directory"),
        ("--chroot", "", "No such file or directory"),
    ):
        with Launch("run", option, value, MEM, "/no/such/kernel") as launched:
            code, out, err = launched.end()
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert words in err


def test_what_only_turns_out_in_the_worker_is_one_line_and_nothing_is_left() -> None:
    # Root, but of a user namespace in which there is nobody else.
    prefix = ("unshare", "--user", "--map-root-user")
    with Launch("run", "--username", USER, MEM, GUEST, "quiet", prefix=prefix) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert err.startswith("lgmp: ") and " failed: " in err and err.count("\n") == 1, err


@pytest.mark.parametrize("user", ["1", "a:b", "", "1:2:x"])
def test_a_worker_refuses_a_user_that_is_no_number(user: str) -> None:
    with pytest.raises(LgmpError, match="UID:GID"):
        Confinement.from_options({"user": user})


def test_options_for_a_worker_say_all_of_it() -> None:
    options = Confinement("/jail", (1000, 100, [100, 27])).options()
    names = [name.removeprefix("--") for name in options[::2]]
    back = Confinement.from_options(dict(zip(names, options[1::2], strict=True)))
    assert (back.directory, back.user) == ("/jail", (1000, 100, [100, 27]))
    assert not Confinement()
