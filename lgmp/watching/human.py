"""Numbers and names for people, in columns."""

from __future__ import annotations

_UNITS = "kMGTPE"


def count(number: float | None) -> str:
    """A number in at most five characters: 0, 999, 1.2k, 999k, 1.2M; "-" where there is none."""
    return _shorten(number, 1000)


def size(bytes_: float | None) -> str:
    """So many bytes in at most five characters, in powers of 1024: 0, 1000, 1.2k, 64M; "-" where there is none."""
    return _shorten(bytes_, 1024)


def _shorten(number: float | None, base: int) -> str:
    if number is None:
        return "-"
    if number < base - 0.5:
        return f"{number:.0f}" if number >= 9.95 or number == int(number) else f"{number:.1f}"
    for unit in _UNITS:
        number /= base
        if number < 9.95:
            return f"{number:.1f}{unit}"
        if number < base - 0.5 or unit == _UNITS[-1]:
            return f"{number:.0f}{unit}"
    raise AssertionError("there is a last unit")


def seconds(number: float | None) -> str:
    """A time in at most six characters: 0.42s, 12.3s, 5m07s, 3h12m, 12d03h; "-" where there is none."""
    if number is None:
        return "-"
    if number < 9.995:
        return f"{number:.2f}s"
    if number < 59.95:
        return f"{number:.1f}s"
    whole = round(number)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02}h"


def printable(text: str) -> str:
    """A name with nothing in it that a terminal would obey, or could not show: as `errors.say` has it."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def cut(text: str, width: int) -> str:
    """At most `width` characters of a text; a "+" at the end says that there are more."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "+"
