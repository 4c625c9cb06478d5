"""Looks into the compressed kernel of a bzImage, with a bound on how much comes out of it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Protocol

from lgmp.errors import LgmpError

# No 32-bit kernel comes near; a payload that unpacks to more is damaged or a bomb.
UNPACKED_MAX = 256 << 20
_CHUNK = 1 << 20
_PIECE = 1 << 16
# xz -9 needs 65 MiB to unpack.
_LZMA_MEMORY_MAX = 256 << 20


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: memoryview | bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor with the manners of the other two: it keeps what it could not unpack yet.

    It is fed in pieces, because it copies all that is left of its input at every call.
    """

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._packed: memoryview | bytes = b""

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    def decompress(self, data: memoryview | bytes, max_length: int) -> bytes:
        self._packed = data or self._packed
        unpacked = b""
        while not (unpacked or self.eof):
            piece = self._zlib.unconsumed_tail
            if not piece:
                piece, self._packed = bytes(self._packed[:_PIECE]), self._packed[_PIECE:]
            if not piece:
                break
            unpacked = self._zlib.decompress(piece, max_length)
        return unpacked


def _decompressor(packed: memoryview) -> _Decompressor | None:
    magic = bytes(packed[:6])
    if magic.startswith(b"\x1f\x8b"):
        return _Gzip()
    if magic.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_MAX)
    if magic.startswith(b"\x5d\x00\x00"):
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_MAX)
    return None


def payload_contains(packed: memoryview, marker: bytes, name: str) -> bool:
    """Tell whether `marker` occurs in what a payload unpacks to; False where its format is not known here.

    Knows gzip, bzip2, xz and lzma by their magic numbers. `name` is the image's, for the LgmpError that is raised
    where the payload is damaged or unpacks to more than 256 MiB.
    """
    decompressor = _decompressor(packed)
    if decompressor is None:
        return False
    total = 0
    tail = b""
    data: memoryview | bytes = packed
    while not decompressor.eof:
        try:
            chunk = decompressor.decompress(data, _CHUNK)
        except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError, MemoryError) as error:
            raise LgmpError(
                f"{name} is damaged: its payload does not unpack ({error}); copy or build it again"
            ) from error
        data = b""
        if marker in tail + chunk:
            return True
        if not chunk and not decompressor.eof:
            raise LgmpError(f"{name} is truncated: its payload ends early; copy or build it again")
        tail = (tail + chunk)[-len(marker) :]
        total += len(chunk)
        if total > UNPACKED_MAX:
            raise LgmpError(
                f"{name} is damaged: its payload unpacks to more than {UNPACKED_MAX >> 20} MiB; build it again"
            )
    return False
