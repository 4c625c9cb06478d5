"""What is installed is whole, and starts fast."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lgmp

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "lgmp/testguest.elf",
    "lgmp/hosts/embedded/tlbshim.so",
    "lgmp/hosts/embedded/tlbshim.c",  # the source goes with what is built from it
    "lgmp/py.typed",
}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a wheel of this checkout holds."""
    directory = tmp_path_factory.mktemp("wheel")
    # What `pip install .` does, and without the isolated build environment that would have to be downloaded.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_holds_every_module_and_what_they_load(wheel_names: set[str]) -> None:
    modules = {
        str(path.relative_to(ROOT)) for package in ("lgmp", "workers") for path in (ROOT / package).rglob("*.py")
    }

    assert modules | {"lgmp/testguest.elf", "lgmp/py.typed"} <= wheel_names


def test_a_wheel_holds_nothing_else_but_its_metadata_and_licence(wheel_names: set[str]) -> None:
    others = {name for name in wheel_names - DATA if not re.fullmatch(r"(lgmp|workers)/.*\.py", name)}

    assert all(".dist-info/" in name for name in others), others
    assert any(name.endswith("licenses/LICENSE") for name in others)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert lgmp.__version__ == metadata.version("lgmp") == project["version"]


def test_the_command_is_installed_beside_its_python() -> None:
    command = Path(sys.executable).parent / "lgmp"

    result = subprocess.run([command, "--version"], check=False, capture_output=True, text=True)

    assert (result.returncode, result.stdout) == (0, f"lgmp {lgmp.__version__}\n")


def test_the_embedded_host_accepts_the_unicorn_that_is_pinned() -> None:
    from lgmp.hosts.embedded.library import UNICORN_VERSION  # noqa: PLC0415

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    # On other machines there is no embedded host.
    assert f"unicorn=={UNICORN_VERSION}; platform_machine == 'x86_64'" in project["dependencies"]


def test_being_installed_costs_nothing_when_python_starts() -> None:
    """An editable install by an import finder costs every worker 10 ms; a path in a .pth file costs none."""
    program = "import sys; print(*sys.modules)"

    bare = subprocess.run([sys.executable, "-S", "-P", "-c", program], check=True, capture_output=True, text=True)
    full = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)

    added = set(full.stdout.split()) - set(bare.stdout.split())
    assert not [name for name in added if "lgmp" in name]
