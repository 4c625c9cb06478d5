"""Where a case takes its decisions from: a seed, or the bytes of a fuzzer that looks at what they lead to."""

from __future__ import annotations

from random import Random


def of_seed(seed: int, target: str, case: int) -> Random:
    """The decisions of one case."""
    return Random(f"{seed} {target} {case}")


class OfBytes(Random):
    """Decisions made by bytes, in their order, and 0 where there are none left: small changes stay small."""

    def __new__(cls, data: bytes) -> OfBytes:
        """As any object: Random would make a seed of its argument."""
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        """Decide by `data`."""
        super().__init__(0)
        self._data = data
        self._at = 0

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\0")

    def getrandbits(self, k: int, /) -> int:
        """As many bits as wanted, from whole bytes."""
        return int.from_bytes(self._take((k + 7) // 8), "little") & ((1 << k) - 1)

    def random(self) -> float:
        """A number from 0 to less than 1, from two bytes."""
        return self.getrandbits(16) / (1 << 16)

    def randbytes(self, n: int) -> bytes:
        """The next bytes themselves."""
        return self._take(n)

    def _randbelow(self, n: int) -> int:
        """Random's would try again where a number is too large, for ever once there are only zeros."""
        return self.getrandbits(max(8, n.bit_length())) % n if n else 0
