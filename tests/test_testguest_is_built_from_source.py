"""The two binaries that are shipped, so that nobody needs a compiler, are what their sources build.

They are the test guest, lgmp/testguest.elf, and what makes the embedded host fast, lgmp/hosts/embedded/tlbshim.so.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Debian 12's. Another compiler builds what works as well, but not the same bytes.
GCC_VERSION = "12.2.0"


def _gcc_version() -> str:
    if shutil.which("gcc") is None:
        return "not installed"
    return subprocess.run(["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("script", "shipped"),
    [
        ("scripts/build-guest", "lgmp/testguest.elf"),
        ("scripts/build-tlbshim", "lgmp/hosts/embedded/tlbshim.so"),
    ],
)
def test_what_is_shipped_is_what_its_source_builds(tmp_path: Path, script: str, shipped: str) -> None:
    version = _gcc_version()
    if version != GCC_VERSION:
        pytest.skip(f"{shipped} was built with gcc {GCC_VERSION}, and gcc here is {version}")
    built = tmp_path / "built"

    result = subprocess.run([ROOT / script, built], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert built.read_bytes() == (ROOT / shipped).read_bytes(), f"{shipped} is not up to date: run {script}"
