"""What becomes of bzImages, whole and broken."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import CODE, MIB, BzImage, spoiled, write

from lgmp.errors import LgmpError
from lgmp.loader import LoadedGuest, load_guest, payload
from lgmp.memory import GuestMemory

RAM = 4 * MIB
NO_HIGHMEM = b"Use a HIGHMEM enabled kernel.\n\0"


def load(directory: Path, image: BzImage | bytes, ram: int = RAM) -> LoadedGuest:
    content = image if isinstance(image, bytes) else image.pack()
    with GuestMemory.create(ram) as memory:
        return load_guest(memory, write(directory, content, "bzImage"), None, [])


@pytest.mark.parametrize("setup_sects", [1, 29, 0])
def test_the_code_after_the_setup_sectors_goes_to_1_mib(tmp_path: Path, setup_sects: int) -> None:
    image = BzImage(setup_sects=setup_sects, code32_start=0x100004)
    with GuestMemory.create(RAM) as memory:
        guest = load_guest(memory, write(tmp_path, image.pack()), None, [])
        assert bytes(memory.view[0x100000 : 0x100000 + len(CODE) + 1]) == CODE + b"\0"
    assert guest.entry == 0x100004
    assert ("bzImage", 0x100000, len(CODE)) in guest.segments


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (BzImage(magic=b"HdrX"), "neither ELF nor a bzImage"),
        (BzImage(version=0x206), "too old for lguest: boot protocol 2.06"),
        (BzImage(xloadflags=1), "x86-64 kernel: lguest runs 32-bit guests only"),
        (BzImage(loadflags=0), "zImage: lguest needs a bzImage"),
        (BzImage(code32_start=0xFFFFF), "code32_start 0xfffff"),
        (BzImage(code32_start=0x100000 + len(CODE)), "code32_start"),
        (BzImage(code=b""), "truncated"),
        (BzImage(syssize=len(CODE)), "truncated: its protected-mode code"),
    ],
)
def test_an_image_lguest_cannot_run_is_one_clear_line(tmp_path: Path, image: BzImage, message: str) -> None:
    with pytest.raises(LgmpError, match=message) as caught:
        load(tmp_path, image)
    assert "bzImage" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_xloadflags_mean_nothing_before_protocol_2_12(tmp_path: Path) -> None:
    assert load(tmp_path, BzImage(version=0x20B, xloadflags=1)).entry == 0x100000


def test_a_truncated_image_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    image = BzImage(code=CODE * 16).pack()
    for length in [0x206, 0x207, 0x260, 0x28F, 0x290, 1023, 1024, len(image) - 16]:
        with pytest.raises(LgmpError, match="truncated"):
            load(tmp_path, image[:length])


def test_code_bigger_than_ram_names_what_is_enough(tmp_path: Path) -> None:
    image = BzImage(version=0x207, code=CODE + bytes(3 * MIB))
    with pytest.raises(LgmpError, match="does not fit in 4 MiB of memory: give MEM 5 or more"):
        load(tmp_path, image)
    assert load(tmp_path, image, 5 * MIB).kernel_end == 4 * MIB + len(CODE)


@pytest.mark.parametrize(
    ("image", "enough"),
    [
        # Not relocatable: unpacks to where it was linked.
        (BzImage(pref_address=16 * MIB, init_size=0x422000), 21),
        (BzImage(pref_address=1 * MIB, init_size=0x422000), 6),
        # Relocatable: to the next multiple of the 16 MiB of alignment that lguest asks for, but not below pref_address.
        (BzImage(relocatable_kernel=1, pref_address=1 * MIB, init_size=2 * MIB), 18),
        (BzImage(relocatable_kernel=1, pref_address=32 * MIB, init_size=2 * MIB), 34),
    ],
)
def test_memory_to_unpack_in_is_counted(tmp_path: Path, image: BzImage, enough: int) -> None:
    with pytest.raises(LgmpError, match=f"give MEM {enough} or more"):
        load(tmp_path, image, (enough - 1) * MIB)
    assert load(tmp_path, image, enough * MIB).kernel_end > (enough - 1) * MIB


def test_init_size_means_nothing_before_protocol_2_10(tmp_path: Path) -> None:
    guest = load(tmp_path, BzImage(version=0x209, init_size=0xFFFFFFFF))
    assert guest.kernel_end == 0x100000 + len(CODE)


def test_an_absurd_pref_address_is_refused_without_a_size(tmp_path: Path) -> None:
    with pytest.raises(LgmpError, match="more than a 32-bit guest can have"):
        load(tmp_path, BzImage(pref_address=1 << 63))


def packed_kernel(pack: Callable[[bytes], bytes], content: bytes, version: int = 0x20C) -> BzImage:
    # As the kernel's build leaves it: the packed kernel, and its unpacked size after it.
    packed = pack(content) + struct.pack("<I", len(content))
    return BzImage(code=CODE + packed, version=version, payload_offset=len(CODE), payload_length=len(packed))


def xz(content: bytes) -> bytes:
    return lzma.compress(content, lzma.FORMAT_XZ, lzma.CHECK_CRC32)


def alone(content: bytes) -> bytes:
    return lzma.compress(content, lzma.FORMAT_ALONE)


# The marker lies across the border of the pieces that the payload is unpacked in.
NO_HIGHMEM_KERNEL = bytes((1 << 20) - 10) + NO_HIGHMEM + bytes(1 << 20)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, xz, alone])
def test_the_packed_kernel_is_searched_when_memory_is_above_what_every_kernel_can_use(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    without, with_highmem = packed_kernel(pack, NO_HIGHMEM_KERNEL), packed_kernel(pack, bytes(3 << 20))
    assert load(tmp_path, with_highmem, 892 * MIB)
    assert load(tmp_path, without, 891 * MIB)
    with pytest.raises(LgmpError, match="can use at most 891 MiB: give MEM 891 or less"):
        load(tmp_path, without, 892 * MIB)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, xz, alone])
@pytest.mark.parametrize("damage", ["short", "garbled"])
def test_a_damaged_packed_kernel_is_refused_when_searched(
    tmp_path: Path, pack: Callable[[bytes], bytes], damage: str
) -> None:
    content = bytes(range(256)) * 100
    image = packed_kernel(pack, content)
    if damage == "short":
        image.payload_length = len(pack(content)) // 2
    else:
        image.code = image.code[: len(CODE) + 14] + b"\xff" * 40 + image.code[len(CODE) + 54 :]
    with pytest.raises(LgmpError, match=r"bzImage is (damaged|truncated): its payload"):
        load(tmp_path, image, 892 * MIB)


def test_a_payload_that_unpacks_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "UNPACKED_MAX", 4 * MIB)
    with pytest.raises(LgmpError, match="unpacks to more than 4 MiB"):
        load(tmp_path, packed_kernel(gzip.compress, bytes(8 * MIB)), 892 * MIB)


@pytest.mark.parametrize(
    "image",
    [
        packed_kernel(lambda content: b"\x02\x21\x4c\x18" + content, NO_HIGHMEM),  # LZ4
        packed_kernel(gzip.compress, NO_HIGHMEM, version=0x207),  # which does not say where its payload is
        BzImage(code=CODE + gzip.compress(NO_HIGHMEM), payload_offset=len(CODE), payload_length=0xFFFFFFFF),
    ],
)
def test_a_payload_that_cannot_be_looked_into_is_given_the_benefit_of_the_doubt(tmp_path: Path, image: BzImage) -> None:
    assert load(tmp_path, image, 892 * MIB)


VALID = packed_kernel(gzip.compress, bytes(1000)).pack()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bzimage")


@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.one_of(st.integers(0x1F0, 0x268), st.integers(1024, len(VALID) - 4)),
            st.sampled_from(["<B", "<H", "<I"]),
            st.integers(0, 0xFFFFFFFF),
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.one_of(st.none(), st.integers(1, len(VALID))),
    ram=st.sampled_from([RAM, 892 * MIB]),
)
def test_a_corrupt_image_loads_within_ram_or_is_refused(
    directory: Path, edits: list[tuple[int, str, int]], length: int | None, ram: int
) -> None:
    image = VALID
    for offset, layout, value in edits:
        image = spoiled(image, offset, layout, value % {"<B": 1 << 8, "<H": 1 << 16, "<I": 1 << 32}[layout])
    with GuestMemory.create(ram, device_pages=2) as memory:
        try:
            guest = load_guest(memory, write(directory, image[:length]), None, [])
        except LgmpError as error:
            assert "\n" not in str(error)
        else:
            assert 0x100000 <= guest.entry < guest.kernel_end <= ram
            assert memory.view[0x1EF] == 0
            assert bytes(memory.view[0x290:0x2D0]) == bytes(0x40)
        assert bytes(memory.view[ram:]) == bytes(memory.limit - ram)
