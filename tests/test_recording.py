"""Recordings and the packets of a trace: what is written is read, and what is hostile or cut off is said to be so."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lgmp.errors import LgmpError
from lgmp.tracing import wire
from lgmp.tracing.events import (
    Bad,
    Descriptor,
    Done,
    Event,
    Features,
    Finish,
    Lost,
    QueueStart,
    Reset,
    Start,
    Table,
    Take,
    parse,
    raw,
    segments,
)
from lgmp.tracing.recording import FORMAT, VERSION, Header, Recording, Writer
from lgmp.tracing.wire import Assembler, packets
from lgmp.virtio.ring import VringLayout

NUM = 16
RAM = 1 << 20
LAYOUTS = (VringLayout.legacy(NUM, RAM), VringLayout.legacy(NUM, RAM + 8192))
HEADER = Header(
    "a guest", "vda", 2, "workers.block", ("--disk-fd", "3", "--", "a\udcff.img"), 0x10000205, b"config", LAYOUTS,
    RAM, RAM + 16384, 1_700_000_000_000_000_000,
)  # fmt: skip

times = st.integers(0, (1 << 64) - 1)
queues = st.integers(0, len(LAYOUTS) - 1)
heads = st.integers(0, NUM - 1)
u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u16 = st.integers(0, (1 << 16) - 1)
data = st.binary(max_size=200)
tables = st.builds(Table, u64, data)


@st.composite
def takes(draw: st.DrawFn) -> Take:
    content = draw(data)
    chain = st.lists(st.builds(Descriptor, heads, u64, u32, u16, u16), max_size=5).map(tuple)
    return Take(
        draw(times),
        draw(queues),
        draw(heads),
        draw(st.booleans()),
        len(content) + draw(u16),
        draw(u32),
        content,
        draw(st.none() | chain),
        draw(st.none() | tables),
    )


@st.composite
def dones(draw: st.DrawFn) -> Done:
    content = draw(data)
    written = len(content) + draw(u16)
    return Done(draw(times), draw(queues), draw(heads), written, content, draw(st.none() | st.integers(0, 255)))


bads = st.one_of(
    st.builds(lambda time, text: Bad(time, None, text), times, st.text(max_size=50)),
    st.builds(
        Bad,
        times,
        queues,
        st.text(max_size=50),
        st.binary(min_size=16 * NUM, max_size=16 * NUM),
        st.binary(min_size=4 + 2 * NUM, max_size=4 + 2 * NUM),
        st.lists(tables, max_size=3).map(tuple),
    ),
)
starts = st.builds(
    Start,
    times,
    times,
    st.integers(0, 3),
    u64,
    st.tuples(*[st.builds(QueueStart, u16, st.lists(heads, max_size=NUM).map(tuple)) for _ in LAYOUTS]),
)
events: st.SearchStrategy[Event] = st.one_of(
    starts,
    takes(),
    dones(),
    bads,
    st.builds(Reset, times),
    st.builds(Features, times, u64),
    st.builds(Lost, times, u64),
    st.builds(Finish, times),
)
lists = st.lists(events, max_size=8)


def recorded(what: list[Event]) -> bytes:
    file = io.BytesIO()
    writer = Writer(file, HEADER)
    for event in what:
        writer.write(raw(event))
    return file.getvalue()


def read(content: bytes) -> tuple[Header, list[Event], bool]:
    recording = Recording(io.BytesIO(content), "it")
    found = list(recording.events())
    return recording.header, found, recording.truncated


@given(lists)
def test_what_is_written_is_read(what: list[Event]) -> None:
    assert read(recorded(what)) == (HEADER, what, False)


@given(lists, st.data())
def test_a_recording_that_is_cut_off_is_as_good_as_it_is_long(what: list[Event], choice: st.DataObject) -> None:
    whole = recorded(what)
    begin = len(HEADER.pack())
    end = choice.draw(st.integers(begin, len(whole)))
    ends = [begin]
    for event in what:
        ends.append(ends[-1] + len(msgpack.packb(raw(event))))

    header, found, truncated = read(whole[:end])

    assert header == HEADER
    assert found == what[: sum(place <= end for place in ends) - 1]
    assert truncated == (end not in ends)


@pytest.mark.parametrize("size", [0, 1, 20, len(HEADER.pack()) - 1])
def test_without_a_whole_header_it_is_none(size: int) -> None:
    with pytest.raises(LgmpError, match="it is no recording"):
        read(HEADER.pack()[:size])


def harmless(content: bytes) -> None:
    """It is a recording, or an LgmpError of one line, and nothing else."""
    try:
        read(content)
    except LgmpError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("it")


@given(st.binary(max_size=400))
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\x91" * 5000)
def test_what_is_no_recording_is_said_to_be_none(content: bytes) -> None:
    harmless(content)
    harmless(HEADER.pack() + content)


@given(lists, st.data())
def test_a_byte_that_is_wrong_is_found_or_does_not_matter(what: list[Event], choice: st.DataObject) -> None:
    content = bytearray(recorded(what))
    content[choice.draw(st.integers(0, len(content) - 1))] = choice.draw(st.integers(0, 255))
    harmless(bytes(content))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, (1 << 64) - 1) | st.binary(max_size=20) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=20,
)


@given(st.integers(0, 9), st.lists(anything, max_size=10))
def test_an_event_of_anything_is_one_or_a_value_error(kind: int, fields: list[Any]) -> None:
    try:
        event = parse([kind, *fields])
    except ValueError:
        return
    assert parse(raw(event)) == event
    segments(event) if isinstance(event, Take) else None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "something else"}, "whose format is"),
        ({"version": VERSION + 1}, "of version 2, and this lgmp knows version 1"),
        ({"queues": []}, "not an array of rings"),
        ({"queues": [[NUM, 0, 0, 1 << 33]]}, "not a number"),
        ({"queues": [[NUM, RAM + 16384, RAM, RAM]]}, "not within guest memory"),
        ({"queues": [[NUM, 8, 0, 0]]}, "not within guest memory"),
        ({"queues": [[3, 0, 0, 0]]}, "no ring of 3 descriptors"),
        ({"ram": 0}, "no guest with"),
        ({"ram": RAM + 1}, "no guest with"),
        ({"limit": 1 << 60}, "not a number up to"),
        ({"device": 7}, "device is 7, not a text"),
        ({"device": "a/b"}, "'a/b' is no name of a device"),
        ({"options": "x"}, "not an array of texts"),
        ({"config": b"x" * 300}, "not up to 255 bytes"),
        ({"type": True}, "not a number"),
    ],
)
def test_a_header_that_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    fields = msgpack.unpackb(HEADER.pack(), unicode_errors="surrogateescape")
    assert fields["format"] == FORMAT
    with pytest.raises(LgmpError, match=says):
        read(msgpack.packb({**fields, **change}, unicode_errors="surrogateescape"))


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (Take(0, 2, 0, False, 0, 0, b""), "an event of ring 2, the device has 2"),
        (Take(0, 0, NUM, False, 0, 0, b""), "begins with descriptor 16, the ring has 16"),
        (Take(0, 0, 0, False, 0, 0, b"", (Descriptor(NUM, 0, 0, 0, 0),)), "descriptors that the ring of 16"),
        (Done(0, 1, NUM + 1, 0, b"", None), "begins with descriptor 17"),
        (Bad(0, 0, "x", b"short", b""), "not of its size"),
        (Start(0, 0, 2, 0, ()), "a START of 0 rings"),
        (Start(0, 0, 2, 0, (QueueStart(0, (NUM,)), QueueStart(0, ()))), "a chain in flight that"),
    ],
)
def test_an_event_of_what_the_device_does_not_have_is_refused(event: Event, says: str) -> None:
    with pytest.raises(LgmpError, match=rf"it, byte \d+: .*{says}"):
        read(recorded([event]))


# Packets


@given(st.integers(1, 1 << 30), st.lists(st.binary(max_size=100) | st.just(b"x" * 100_000), max_size=4))
def test_events_come_out_of_packets_as_they_went_in(session: int, contents: list[bytes]) -> None:
    assembler = Assembler(session)
    found = []
    for content in contents:
        event = raw(Done(1, 0, 0, len(content), content, None))
        for packet in packets(session, event):
            assert len(packet) <= wire.PACKET_BYTES
            # What is left of another trace is passed over.
            assert assembler.take(packets(session + 1, [wire.RESET, 5])[0]) is None
            whole = assembler.take(packet)
            if whole is not None:
                found.append(whole)
    assert found == [raw(Done(1, 0, 0, len(content), content, None)) for content in contents]


def test_an_event_of_which_a_part_was_lost_is_none() -> None:
    event = raw(Done(1, 0, 0, 100_000, b"x" * 100_000, None))
    first, second, *others = packets(1, event)
    assembler = Assembler(1)
    for packet in (first, *others, packets(1, [wire.RESET, 5])[0], second):
        found = assembler.take(packet)
        assert found in (None, [wire.RESET, 5])
    assert [assembler.take(packet) for packet in packets(1, event)][-1] == event


@given(st.binary(max_size=100) | anything.map(msgpack.packb))
def test_a_packet_of_anything_is_none_or_a_value_error(packet: bytes) -> None:
    with contextlib.suppress(ValueError):
        Assembler(1).take(packet)
    with contextlib.suppress(ValueError):
        wire.header_of(packet)
