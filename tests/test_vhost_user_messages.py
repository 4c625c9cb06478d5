"""The messages of vhost-user as bytes: what is read of them, and what is refused before anybody acts by it."""

from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgmp.vhost_user import messages
from lgmp.vhost_user.messages import (
    HEADER_BYTES,
    MAX_DESCRIPTORS,
    MAX_PAYLOAD,
    NEED_REPLY,
    REPLY,
    VERSION,
    Message,
    ProtocolError,
    Request,
    name_of,
    parse_header,
    parse_memory_region,
    parse_memory_table,
    reply,
)


def header(request: int, flags: int, size: int) -> bytes:
    return struct.pack("<III", request, flags, size)


def regions(*regions: tuple[int, int, int, int], count: int | None = None) -> Message:
    payload = struct.pack("<II", len(regions) if count is None else count, 0)
    return Message(Request.SET_MEM_TABLE, VERSION, payload + b"".join(struct.pack("<QQQQ", *one) for one in regions))


# The header


def test_a_header_is_request_flags_and_size() -> None:
    assert HEADER_BYTES == 12
    assert parse_header(header(2, VERSION, 8)) == (2, VERSION, 8)
    assert parse_header(header(77, VERSION | NEED_REPLY, MAX_PAYLOAD)) == (77, VERSION | NEED_REPLY, MAX_PAYLOAD)


@pytest.mark.parametrize(
    ("flags", "size", "says"),
    [
        (0, 0, "SET_FEATURES of version 0 of the protocol, there is 1"),
        (2, 0, "of version 2"),
        (3, 0, "of version 3"),
        (VERSION | REPLY, 0, "SET_FEATURES as an answer, and nothing was asked"),
        (VERSION, MAX_PAYLOAD + 1, "SET_FEATURES with 4097 bytes, the longest message has 4096"),
        (VERSION, 0xFFFFFFFF, "SET_FEATURES with 4294967295 bytes"),
    ],
)
def test_a_header_that_cannot_be_is_refused(flags: int, size: int, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        parse_header(header(Request.SET_FEATURES, flags, size))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_is_read_or_refused(raw: bytes) -> None:
    try:
        request, flags, size = parse_header(raw)
    except ProtocolError:
        return
    assert header(request, flags, size) == raw
    assert flags & 7 == VERSION
    assert size <= MAX_PAYLOAD


def test_an_answer_says_what_it_answers_and_that_it_is_one() -> None:
    assert reply(Request.GET_FEATURES, b"12345678") == header(1, VERSION | REPLY, 8) + b"12345678"
    assert reply(Request.GET_CONFIG, b"") == header(24, VERSION | REPLY, 0)


def test_requests_have_their_names_and_unknown_ones_their_numbers() -> None:
    assert name_of(Request.SET_VRING_KICK) == "SET_VRING_KICK"
    assert name_of(39) == "SET_STATUS"
    assert name_of(4711) == "request 4711"
    assert Message(5, VERSION, b"").name == "SET_MEM_TABLE"


def test_numbers_are_those_of_the_specification() -> None:
    numbers = {"GET_FEATURES": 1, "SET_MEM_TABLE": 5, "GET_VRING_BASE": 11, "SET_VRING_ENABLE": 18, "GET_CONFIG": 24}
    numbers |= {"GET_INFLIGHT_FD": 31, "RESET_DEVICE": 34, "ADD_MEM_REG": 37, "REM_MEM_REG": 38, "GET_STATUS": 40}
    assert {name: Request[name] for name in numbers} == numbers
    bits = {"MQ": 0, "REPLY_ACK": 3, "CONFIG": 9, "INFLIGHT_SHMFD": 12, "RESET_DEVICE": 13, "CONFIGURE_MEM_SLOTS": 15}
    assert {name: getattr(messages, f"VHOST_USER_PROTOCOL_F_{name}") for name in bits} == bits


# Fields and descriptors


def test_a_payload_of_another_size_is_refused() -> None:
    assert Message(Request.SET_FEATURES, VERSION, struct.pack("<Q", 1 << 40)).u64() == 1 << 40
    for size in (0, 7, 9, 16):
        with pytest.raises(ProtocolError, match=f"SET_FEATURES with {size} bytes, it has 8"):
            Message(Request.SET_FEATURES, VERSION, bytes(size)).u64()


def test_descriptors_are_as_many_as_are_wanted_and_whoever_takes_them_owns_them() -> None:
    message = Message(Request.SET_VRING_KICK, VERSION, b"", [100, 101])
    for count in (0, 1, 3):
        with pytest.raises(ProtocolError, match=f"SET_VRING_KICK with 2 descriptors, it has {count}"):
            message.take(count)
    assert message.descriptors == [100, 101]
    assert message.take(2) == [100, 101]
    assert message.descriptors == []
    assert message.take(0) == []


def test_need_reply_is_a_flag() -> None:
    assert Message(1, VERSION | NEED_REPLY, b"").needs_reply
    assert not Message(1, VERSION | 0xFFFFFFF0, b"").needs_reply


# Regions of memory


def test_a_memory_table_has_as_many_regions_as_it_says() -> None:
    table = [(0, 0x1000, 0x7F00, 0), (1 << 32, 0x2000, 0xFF00, 0x3000)]
    found = parse_memory_table(regions(*table))
    assert [(one.guest, one.size, one.user, one.offset) for one in found] == table
    # QEMU sends no more than there are, others the whole array.
    found = parse_memory_table(regions(*table, *[(0, 0, 0, 0)] * 6, count=2))
    assert len(found) == 2


@pytest.mark.parametrize("count", [0, MAX_DESCRIPTORS + 1, 0x80000000, 0xFFFFFFFF])
def test_a_memory_table_of_no_regions_or_too_many_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"SET_MEM_TABLE with {count} regions, there may be 1 to 8"):
        parse_memory_table(regions(*[(0, 0, 0, 0)] * 9, count=count))


def test_a_memory_table_that_is_cut_off_is_refused() -> None:
    whole = regions((0, 0x1000, 0, 0), (0x1000, 0x1000, 0x1000, 0))
    for size in range(len(whole.payload)):
        with pytest.raises(ProtocolError, match=f"SET_MEM_TABLE with {size} bytes"):
            parse_memory_table(Message(Request.SET_MEM_TABLE, VERSION, whole.payload[:size]))


def test_a_single_region_lies_behind_padding() -> None:
    payload = bytes(8) + struct.pack("<QQQQ", 1, 2, 3, 4)
    one = parse_memory_region(Message(Request.ADD_MEM_REG, VERSION, payload))
    assert (one.guest, one.size, one.user, one.offset) == (1, 2, 3, 4)
    for size in (0, 8, 32, 39, 41):
        with pytest.raises(ProtocolError, match=f"ADD_MEM_REG with {size} bytes, it has 40"):
            parse_memory_region(Message(Request.ADD_MEM_REG, VERSION, payload.ljust(41, b"\0")[:size]))


@given(st.binary(max_size=400), st.integers(0, 9), st.integers())
def test_any_payload_is_a_memory_table_or_none(noise: bytes, count: int, seed: int) -> None:
    random = Random(seed)
    payload = noise if random.random() < 0.5 else struct.pack("<II", count, 0) + noise
    for parse in (parse_memory_table, parse_memory_region):
        try:
            parse(Message(Request.SET_MEM_TABLE, VERSION, payload))
        except ProtocolError as error:
            assert "SET_MEM_TABLE with" in str(error)
