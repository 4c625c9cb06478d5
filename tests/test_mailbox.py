"""The message queues: what goes in comes out, full is said and not waited for, and nothing is left behind."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgmp.errors import LgmpError
from lgmp.mailbox import (
    COMPLETION_MESSAGE_BYTES,
    MAILBOX_MESSAGE_BYTES,
    MAILBOX_MESSAGES,
    Mailbox,
    ToLauncher,
    ToWorker,
    pack,
    queue_name,
    sweep_stale_queues,
    unlink,
    unpack,
)


def gone(name: str) -> bool:
    try:
        Mailbox.open(name).close()
    except LgmpError:
        return True
    return False


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox.create(queue_name(os.getpid(), "test"), MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES)
    yield mailbox
    mailbox.unlink()
    mailbox.close()


# Messages


@given(st.lists(st.integers(0, (1 << 64) - 1) | st.text(max_size=50), max_size=7), st.integers(0, 255))
def test_a_message_comes_out_as_it_went_in(rest: list[int | str], kind: int) -> None:
    assert unpack(pack(kind, *rest)) == [kind, *rest]


@given(st.binary(max_size=100))
def test_noise_is_no_message(noise: bytes) -> None:
    try:
        message = unpack(noise)
    except ValueError:
        return
    assert type(message[0]) is int
    assert all(type(element) in (int, str) for element in message)


@pytest.mark.parametrize(
    "message",
    [None, 1, "kick", [], {}, ["kick"], [True], [1, None], [1, 2.0], [1, [2]], [1, {}], [1, b"bytes"], list(range(9))],
)
def test_what_has_the_wrong_shape_is_no_message(message: object) -> None:
    with pytest.raises(ValueError, match="not a message"):
        unpack(msgpack.packb(message))


def test_every_message_to_a_worker_fits_its_mailbox() -> None:
    assert all(len(pack(kind)) <= MAILBOX_MESSAGE_BYTES for kind in ToWorker)


def test_every_short_message_fits_the_completion_queue_with_room_for_a_text() -> None:
    assert all(len(pack(kind, 0xFFFF, 0xFFFF)) <= 32 for kind in ToLauncher)
    assert len(pack(ToLauncher.FAILED, 0xFFFF, "x" * (COMPLETION_MESSAGE_BYTES - 32))) <= COMPLETION_MESSAGE_BYTES


# Queues


def test_messages_arrive_in_order(mailbox: Mailbox) -> None:
    other = Mailbox.open(mailbox.name)
    for number in range(MAILBOX_MESSAGES):
        assert other.post(pack(number))
    assert [unpack(mailbox.receive()) for _ in range(MAILBOX_MESSAGES)] == [[n] for n in range(MAILBOX_MESSAGES)]
    other.close()


def test_a_full_queue_refuses_a_post_at_once(mailbox: Mailbox) -> None:
    posted = [mailbox.post(pack(ToWorker.KICK)) for _ in range(MAILBOX_MESSAGES + 2)]
    assert posted == [True] * MAILBOX_MESSAGES + [False] * 2


def test_a_send_waits_for_room(mailbox: Mailbox) -> None:
    while mailbox.post(pack(1)):
        pass
    assert not mailbox.send(pack(2), timeout=0.01)
    sender = threading.Thread(target=mailbox.send, args=(pack(3),))
    sender.start()
    received = [unpack(mailbox.receive()) for _ in range(MAILBOX_MESSAGES + 1)]
    sender.join()
    assert received == [[1]] * MAILBOX_MESSAGES + [[3]]


def test_an_empty_queue_gives_nothing_without_waiting(mailbox: Mailbox) -> None:
    assert mailbox.take() is None
    assert mailbox.wait(0.01) is None


def test_a_wait_ends_with_a_message(mailbox: Mailbox) -> None:
    sender = threading.Thread(target=mailbox.send, args=(pack(ToWorker.STOP),))
    sender.start()
    assert mailbox.wait(30) == pack(ToWorker.STOP)
    sender.join()


def test_a_signal_does_not_end_a_wait(mailbox: Mailbox) -> None:
    seen: list[int] = []
    old = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    main = threading.main_thread().ident
    assert main is not None

    def disturb() -> None:
        for _ in range(5):
            signal.pthread_kill(main, signal.SIGUSR2)
        mailbox.post(pack(7))

    sender = threading.Thread(target=disturb)
    sender.start()
    assert unpack(mailbox.receive()) == [7]
    sender.join()
    signal.signal(signal.SIGUSR2, old)
    assert seen


def test_who_wants_a_signal_to_end_a_wait_can_have_that(mailbox: Mailbox) -> None:
    """How a worker that sleeps in its mailbox learns of the launcher's death: posix_ipc loses what a handler raises."""

    class EndedError(Exception):
        pass

    def end() -> None:
        raise EndedError

    mailbox.on_signal = end
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    # Again and again: one that comes before the wait does not end it.
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with pytest.raises(EndedError):
            mailbox.receive()
        with pytest.raises(EndedError):
            mailbox.wait(30)
        with pytest.raises(EndedError):
            while True:
                mailbox.send(pack(1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_queue_can_be_polled(mailbox: Mailbox) -> None:
    poll = select.poll()
    poll.register(mailbox, select.POLLIN)
    assert poll.poll(0) == []
    mailbox.post(pack(1))
    assert poll.poll(0) == [(mailbox.fileno(), select.POLLIN)]


def test_a_queue_works_on_without_its_name(mailbox: Mailbox) -> None:
    other = Mailbox.open(mailbox.name)
    mailbox.unlink()
    mailbox.unlink()
    assert gone(mailbox.name)
    other.post(pack(5))
    assert mailbox.take() == pack(5)
    other.close()


def test_a_queue_is_its_owners_alone_and_not_inherited(mailbox: Mailbox) -> None:
    assert os.fstat(mailbox.fileno()).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(mailbox.fileno())


def test_a_leftover_of_the_same_name_is_replaced(mailbox: Mailbox) -> None:
    mailbox.post(pack(1))
    again = Mailbox.create(mailbox.name, MAILBOX_MESSAGES, MAILBOX_MESSAGE_BYTES)
    assert again.take() is None
    again.close()


def test_a_queue_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(LgmpError, match=r"^cannot open the message queue /lgmp\.0\.nobody: "):
        Mailbox.open("/lgmp.0.nobody")
    assert not unlink("/lgmp.0.nobody")


def test_a_queue_the_system_refuses_is_one_clear_line_with_its_remedy() -> None:
    with pytest.raises(LgmpError, match="ulimit -q"):
        Mailbox.create(queue_name(os.getpid(), "huge"), 1 << 20, 1 << 20)


# Sweeping


def test_queues_of_launchers_that_are_no_more_are_swept(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    stale = Mailbox.create(queue_name(child, "vda"), 1, 64)
    alive = Mailbox.create(queue_name(os.getpid(), "vda"), 1, 64)
    # The kernel's file system of queues may not be mounted here: a directory with such names stands for it.
    for name in (stale.name, alive.name, "/lgmp.nonsense.vda", "/other.1", f"/lgmp.{child}.gone"):
        (tmp_path / name[1:]).touch()
    assert sweep_stale_queues(tmp_path) == [stale.name[1:]]
    assert gone(stale.name)
    assert not gone(alive.name)
    alive.unlink()
    stale.close()
    alive.close()


def test_sweeping_where_queues_are_not_shown_does_nothing(tmp_path: Path) -> None:
    assert sweep_stale_queues(tmp_path / "not mounted") == []
