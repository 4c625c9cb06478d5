"""What is closed at the end of a `with`."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Closing:
    """Something that a `with` closes, however it ends. What it takes to close it is for each kind to say."""

    __slots__ = ()

    def close(self) -> None:
        """Give back what it has."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
