"""Samples of one quantity, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles


@dataclass(frozen=True, slots=True)
class Samples:
    """A summary of measurements of one thing, in `unit`."""

    unit: str
    count: int
    median: float
    minimum: float
    maximum: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Samples:
        """Summarise `values`, of which there must be at least one."""
        ordered = sorted(values)
        p99 = quantiles(ordered, n=100, method="inclusive")[98] if len(ordered) > 1 else ordered[0]
        return cls(unit, len(ordered), median(ordered), ordered[0], ordered[-1], p99)

    def as_json(self) -> dict[str, object]:
        """As a JSON object, its numbers rounded to four significant digits or so."""
        return {key: _rounded(value) if isinstance(value, float) else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        """One line for a person; p99 only where there are enough samples for it to mean something."""
        shown = f"{_shown(self.median):>8} {self.unit}"
        if self.count == 1:
            return shown
        tail = f", p99 {_shown(self.p99)}" if self.count >= 200 else ""
        return f"{shown}   {_shown(self.minimum)} to {_shown(self.maximum)}{tail}, {self.count} times"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
