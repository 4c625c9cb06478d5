"""The look at the rings before a worker sleeps: what ends it, and when it is left out."""

from __future__ import annotations

import pytest

from workers.busy_wait import LOOKS, MOST_SKIPS, BusyWait


class Ring:
    """Something comes into it with the look number `comes`, if it is looked at so often."""

    def __init__(self, comes: int | None = None) -> None:
        self.comes = comes
        self.looks = 0

    def spin(self, rounds: int) -> bool:
        for _ in range(rounds):
            self.looks += 1
            if self.looks == self.comes:
                return True
        return False


@pytest.mark.parametrize("comes", [1, 2, LOOKS])
def test_what_comes_in_time_ends_it(comes: int) -> None:
    ring = Ring(comes)

    assert BusyWait()([ring])

    assert ring.looks == comes


@pytest.mark.parametrize("rings", [1, 2, 3, 100, 1000])
def test_all_rings_are_looked_at_and_together_about_as_often_as_one(rings: int) -> None:
    looked_at = [Ring() for _ in range(rings)]

    assert not BusyWait()(looked_at)

    assert all(ring.looks for ring in looked_at)
    assert sum(ring.looks for ring in looked_at) <= max(LOOKS, 20 * rings)


def pauses(wait: BusyWait, count: int) -> list[int]:
    """How often it was left out before each of the next `count` times that a ring was looked at, all in vain."""
    found: list[int] = []
    pause = 0
    while len(found) < count:
        ring = Ring()
        assert not wait([ring])
        if ring.looks:
            found.append(pause)
            pause = 0
        else:
            pause += 1
    return found


def test_with_each_time_in_vain_the_next_one_comes_later_up_to_a_limit() -> None:
    assert pauses(BusyWait(), 13) == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, MOST_SKIPS, MOST_SKIPS, MOST_SKIPS]


def test_once_it_has_paid_it_is_tried_again_at_once() -> None:
    wait = BusyWait()
    assert pauses(wait, 3) == [0, 1, 3]
    while not wait([Ring(1)]):
        pass

    assert wait([Ring(1)])

    assert pauses(wait, 3) == [0, 1, 3]
