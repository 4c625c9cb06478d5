"""Random bytes that `lgmp serve rng` has for QEMU, taken by Linux's own virtio-rng."""

from __future__ import annotations

import base64
import contextlib
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from qemu_guest import Guest, needs_qemu, rng
from serving import served

pytestmark = needs_qemu

# The words of the file: each is its own number, so what came of it can be told.
WORDS = 1 << 20
# Linux keeps as many bytes of the source before for whoever reads from the next one.
LEFT = 64


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with two sources: a file (virtio_rng.0), and what a source is by itself (virtio_rng.1)."""
    directory = tmp_path_factory.mktemp("rng")
    source = directory / "source"
    source.write_bytes(struct.pack(f">{WORDS}I", *range(WORDS)))
    with contextlib.ExitStack() as undo:
        devices = []
        for name, words in (("file", (str(source),)), ("system", ())):
            socket = directory / f"{name}.sock"
            undo.enter_context(served("rng", *words, socket=socket))
            devices += rng(socket)
        yield undo.enter_context(Guest(devices))


def read(guest: Guest, source: str, size: int) -> bytes:
    """What the guest reads from one of its sources."""
    guest.ask(f"echo {source} >/sys/class/misc/hw_random/rng_current")
    encoded = guest.ask(f"dd if=/dev/hwrng bs={size + LEFT} count=1 iflag=fullblock status=none | base64")
    return base64.b64decode(encoded)[LEFT:]


def check_words(data: bytes) -> None:
    """They are the file's, in its order; others, that read as well, may have had some in between."""
    words = [word for (word,) in struct.iter_unpack(">I", data)]
    assert words == sorted(set(words))
    assert words[-1] < WORDS
    follow = sum(after == word + 1 for word, after in pairwise(words))
    assert follow > len(words) // 2


def test_the_guest_has_a_source_for_each_that_is_served(guest: Guest) -> None:
    available = guest.ask("cat /sys/class/misc/hw_random/rng_available").split()
    assert {"virtio_rng.0", "virtio_rng.1"} <= set(available)


def test_what_the_guest_reads_is_what_is_in_the_file(guest: Guest) -> None:
    data = read(guest, "virtio_rng.0", 16384)
    assert len(data) == 16384
    check_words(data)


def test_without_a_file_random_bytes_come(guest: Guest) -> None:
    data = read(guest, "virtio_rng.1", 20000)
    bits = sum(byte.bit_count() for byte in data)
    assert len(data) == 20000
    assert 78000 < bits < 82000  # ten times the standard deviation of 200


def test_after_its_driver_was_bound_anew_a_source_goes_on(guest: Guest) -> None:
    before = read(guest, "virtio_rng.0", 4096)
    guest.ask("echo virtio_rng.1 >/sys/class/misc/hw_random/rng_current")
    for action in ("unbind", "bind"):
        guest.ask(f"echo virtio0 >/sys/bus/virtio/drivers/virtio_rng/{action}")

    after = read(guest, "virtio_rng.0", 4096)

    check_words(after)
    assert after > before
