"""The test guest that is shipped, lgmp/testguest.elf, is what its source in tests/guest builds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Debian 12's. Another compiler builds a test guest that works as well, but not the same bytes.
GCC_VERSION = "12.2.0"


def _gcc_version() -> str:
    if shutil.which("gcc") is None:
        return "not installed"
    return subprocess.run(["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()


def test_the_shipped_test_guest_is_what_its_source_builds(tmp_path: Path) -> None:
    version = _gcc_version()
    if version != GCC_VERSION:
        pytest.skip(f"the shipped test guest was built with gcc {GCC_VERSION}, and gcc here is {version}")
    built = tmp_path / "guest.elf"

    result = subprocess.run([ROOT / "scripts/build-guest", built], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    shipped = ROOT / "lgmp/testguest.elf"
    assert built.read_bytes() == shipped.read_bytes(), "lgmp/testguest.elf is not up to date: run scripts/build-guest"
