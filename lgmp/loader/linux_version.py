"""Which version of Linux a kernel image is, by the text that every kernel carries."""

from __future__ import annotations

import re

from lgmp.loader.image import KernelImage
from lgmp.memory import GuestMemory

# As much of the text as its numbers may take.
VERSION_BYTES = 32
# init/version.c: linux_banner. (Its format strings have a % where the first number is.)
_BANNER = b"Linux version "

_VERSION = re.compile(rb"(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?")


def parse_version(text: bytes) -> tuple[int, ...] | None:
    """Return the first two or three numbers of a version that `text` begins with; None where it does not."""
    match = _VERSION.match(text)
    return None if match is None else tuple(int(each) for each in match.groups() if each is not None)


def find_version(memory: GuestMemory, image: KernelImage) -> tuple[int, ...] | None:
    """Return the version of a kernel that was loaded uncompressed; None where it has no banner."""
    for segment in image.segments:
        at = memory.map.find(_BANNER, segment.address, segment.file_end)
        while at >= 0:
            start = at + len(_BANNER)
            version = parse_version(bytes(memory.view[start : min(start + VERSION_BYTES, segment.file_end)]))
            if version is not None:
                return version
            at = memory.map.find(_BANNER, start, segment.file_end)
    return None
