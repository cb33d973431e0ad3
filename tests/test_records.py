"""The record contract: what every value and key becomes."""

import ipaddress
import json
import math
import re
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from hypothesis import assume, given
from hypothesis import strategies as st

import kafka_enrich
from conftest import SAMPLE_DATABASE
from kafka_enrich import (
    RESULTS,
    WAITS,
    Answer,
    Databases,
    Enriched,
    Locate,
    Location,
    Locations,
    LookupFailed,
    NotLocated,
    RunError,
    Worker,
    find_address,
    read_settings,
)

LOCATE = Databases(read_settings({"GEOIP_DATABASE": str(SAMPLE_DATABASE)})).locate
ARGENTINA = {"city": "Buenos Aires (San Telmo)", "region": "Buenos Aires F.D.", "country_name": "Argentina"}
TURKEY = {"city": "Ankara", "region": "Ankara", "country_name": "Türkiye"}
NOWHERE = {"city": None, "region": None, "country_name": None}


def make(locate: Locate = LOCATE, **environment: str) -> Callable[[bytes | None], Answer]:
    locations = Locations(locate, read_settings({"CACHE_SIZE": "100", **environment}))
    return lambda value: locations.get_location(Message(topic="t", partition=0, offset=1, value=value))[1]


def value_out(value: bytes) -> dict[str, str | None]:
    output, result = make()(value)
    record = json.loads(output or b"")
    assert isinstance(record, dict)
    assert record.get("error", "located") == result
    return record


@pytest.mark.parametrize(
    ("value", "ip", "location"),
    [
        (b"186.58.0.1", "186.58.0.1", ARGENTINA),
        (b" \t186.58.0.1\r\n", "186.58.0.1", ARGENTINA),
        ("\u00a0186.58.0.1\u2003".encode(), "186.58.0.1", ARGENTINA),
        (b"186.58.0.1" + b" " * 900_000, "186.58.0.1", ARGENTINA),
        (b"::ffff:186.58.0.1", "::ffff:186.58.0.1", ARGENTINA),
        (b"::FFFF:BA3A:1", "::FFFF:BA3A:1", ARGENTINA),
        (b"2001:1b68::1", "2001:1b68::1", TURKEY),
        (b"2001:1B68:0:0::0.0.0.1", "2001:1B68:0:0::0.0.0.1", TURKEY),
        (b"2001:1b68::1%eth0", "2001:1b68::1%eth0", TURKEY),
        (b"186.58.0.1:443", "186.58.0.1", ARGENTINA),
        (b"[2001:1b68::1]", "2001:1b68::1", TURKEY),
        (b"[2001:1b68::1]:443", "2001:1b68::1", TURKEY),
        (b"[2001:1b68::1%0]:443", "2001:1b68::1%0", TURKEY),
        (b'"186.58.0.1"', "186.58.0.1", ARGENTINA),
        (b' "186.58.0.1:443" ', "186.58.0.1", ARGENTINA),
        (b'" [2001:1b68::1]:443"', "2001:1b68::1", TURKEY),
        (b'"10.0.0.1, 186.58.0.1:443"', "186.58.0.1", ARGENTINA),
        (b"186.58.0.1, 2001:1b68::1", "186.58.0.1", ARGENTINA),
        (b"u08022, 186.58.0.1, 10.0.0.1", "186.58.0.1", ARGENTINA),
        (b"{client}, 186.58.0.1", "186.58.0.1", ARGENTINA),
        (b"10.0.0.1, unknown,,186.58.0.1:47168, 62.1.1.1", "186.58.0.1", ARGENTINA),
        (b'"[2001:1b68::1]:47011", 186.58.0.1', "2001:1b68::1", TURKEY),
        (b'["10.0.0.1", null, 7, "186.58.0.1"]', "186.58.0.1", ARGENTINA),
        (b"2002:ba3a:1::1", "2002:ba3a:1::1", ARGENTINA),
        (b"64:ff9b::186.58.0.1", "64:ff9b::186.58.0.1", ARGENTINA),
    ],
)
def test_located(value: bytes, ip: str, location: dict[str, str]) -> None:
    assert value_out(value) == {"ip": ip, **location}


def test_output_is_utf8_not_escaped() -> None:
    output, _ = make()(b"2001:1b68::1")
    assert "Türkiye".encode() in (output or b"")


@pytest.mark.parametrize(
    ("value", "ip"),
    [
        (b"", ""),
        (b"  ", ""),
        (b"ip", "ip"),
        (b"ip,country", "ip,country"),
        (b"localhost", "localhost"),
        (b"dns.google", "dns.google"),
        (b"8.8.8.8:", "8.8.8.8:"),
        (b"8.8.8.8:http", "8.8.8.8:http"),
        (b"8.8.8.8:123456", "8.8.8.8:123456"),
        (b"8.8.8.8%eth0", "8.8.8.8%eth0"),
        (b"[2001:1b68::1", "[2001:1b68::1"),
        (b"[2001:1b68::1]53", "[2001:1b68::1]53"),
        (b"[localhost]:53", "[localhost]:53"),
        (b'"', '"'),
        (b'""', '""'),
        (b"unknown, localhost", "unknown, localhost"),
        (b",", ","),
        (b"[]", "[]"),
        (b"[134744072]", "[134744072]"),
        (b"null", "null"),
        (b'{"a":"b, 8.8.8.8, c"}', '{"a":"b, 8.8.8.8, c"}'),
        (b'"{\\"a\\":[1, 8.8.8.8 ,2]}"', '"{\\"a\\":[1, 8.8.8.8 ,2]}"'),
        (b"8.8.8.8/32", "8.8.8.8/32"),
        (b"8.8.8.256", "8.8.8.256"),
        (b"8.8.8", "8.8.8"),
        (b"134744072", "134744072"),
        (b"0x8.8.8.8", "0x8.8.8.8"),
        (b"010.8.8.8", "010.8.8.8"),
        (b"8.8.8.8 9.9.9.9", "8.8.8.8 9.9.9.9"),
        (b"8.8.8.8\x00", "8.8.8.8\x00"),
        ("٨.٨.٨.٨".encode(), "٨.٨.٨.٨"),
        ("\ufeff8.8.8.8".encode(), "\ufeff8.8.8.8"),
        (b"\xff\xfe8", "\ufffd\ufffd8"),
        (b"x" * 65, "x" * 64),
        (b"\x00" * 1_000_000, "\x00" * 64),
    ],
)
def test_invalid_ip(value: bytes, ip: str) -> None:
    assert value_out(value) == {"ip": ip, **NOWHERE, "error": "invalid_ip"}


@pytest.mark.parametrize(
    "address",
    [
        str(ipaddress.IPv4Address(0)),
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.2.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "192.0.0.8",
        "64:ff9b::a00:1",
        "64:ff9b:1::1",
        "64:ff9b:1::808:808",
        "1000::1",
        "2001:db8::",
        "2002:a00:1::1",
        "3fff::1",
        "5f00::1",
        "100::1",
        "2001:db8::1",
        "4000::1",
        "fc00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_reserved_ip(address: str) -> None:
    for written in (address, f'"{address}"', f"unknown, {address}, 127.0.0.1"):
        assert value_out(written.encode()) == {"ip": address, **NOWHERE, "error": "reserved_ip"}


@pytest.mark.parametrize(
    ("before", "first", "last", "after"),
    [
        ("9.255.255.255", "10.0.0.0", "10.255.255.255", "11.0.0.0"),
        ("100.63.255.255", "100.64.0.0", "100.127.255.255", "100.128.0.0"),
        ("126.255.255.255", "127.0.0.0", "127.255.255.255", "128.0.0.0"),
        ("169.253.255.255", "169.254.0.0", "169.254.255.255", "169.255.0.0"),
        ("172.15.255.255", "172.16.0.0", "172.31.255.255", "172.32.0.0"),
        ("191.255.255.255", "192.0.0.0", "192.0.0.8", "192.0.0.9"),
        ("192.0.0.10", "192.0.0.11", "192.0.0.255", "192.0.1.0"),
        ("192.0.1.255", "192.0.2.0", "192.0.2.255", "192.0.3.0"),
        ("192.167.255.255", "192.168.0.0", "192.168.255.255", "192.169.0.0"),
        ("198.17.255.255", "198.18.0.0", "198.19.255.255", "198.20.0.0"),
        ("198.51.99.255", "198.51.100.0", "198.51.100.255", "198.51.101.0"),
        ("203.0.112.255", "203.0.113.0", "203.0.113.255", "203.0.114.0"),
        ("2001:1::3", "2001:1::4", "2001:2:ffff:ffff:ffff:ffff:ffff:ffff", "2001:3::"),
        ("2001:4:112:ffff::", "2001:4:113::", "2001:1f:ffff:ffff::", "2001:20::"),
        ("2001:3f:ffff::", "2001:40::", "2001:1ff:ffff::", "2001:200::"),
        ("2001:db7:ffff::", "2001:db8::", "2001:db8:ffff::", "2001:db9::"),
        ("3ffe:ffff::", "3fff::", "3fff:fff:ffff::", "3fff:1000::"),
    ],
)
def test_reserved_block_ends_where_iana_says(before: str, first: str, last: str, after: str) -> None:
    for address, public in ((before, True), (first, False), (last, False), (after, True)):
        assert find_address(address) == (address, address, public)


def test_event_where_no_field_is_set_is_told(caplog: pytest.LogCaptureFixture) -> None:
    answer = make()
    for value in (b'{"ip":"9.9.9.9"}', b"no address"):
        assert answer(value)[1] == "invalid_ip"
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("t[0] offset 1 is not enriched: no address; of events IP_FIELD says where it stands")


def test_not_found() -> None:
    assert value_out(b"9.9.9.9") == {"ip": "9.9.9.9", **NOWHERE, "error": "not_found"}


def fail(_address: str, _public: bool) -> Location:
    raise LookupFailed("no answer")


def test_lookup_failed() -> None:
    output, result = make(fail)(b"unknown, 8.8.8.8:53 ")
    assert json.loads(output or b"") == {"ip": "8.8.8.8", **NOWHERE, "error": "lookup_failed"}
    assert result == "lookup_failed"


def test_lookup_failed_stops_where_that_is_wanted() -> None:
    with pytest.raises(RunError, match=r"8\.8\.8\.8 was not looked up: no answer"):
        make(fail, ON_LOOKUP_FAILED="stop")(b" 8.8.8.8 ")


@given(value=st.binary() | st.text().map(str.encode))
def test_any_value_becomes_one_record(value: bytes) -> None:
    output, result = make()(value)
    record = json.loads(output or b"")
    assert list(record)[:4] == ["ip", "city", "region", "country_name"]
    assert len(output or b"") < 1000
    assert set(record) - {"ip", "city", "region", "country_name"} <= {"error"}
    assert ("error" in record) == (record["city"] is None)
    assert result in RESULTS


@given(value=(st.ip_addresses() | st.ip_addresses(v=6)).map(lambda address: str(address).encode()))
def test_any_address_is_not_invalid(value: bytes) -> None:
    assert value_out(value).get("error") in (None, "not_found", "reserved_ip")


@given(
    address=(st.ip_addresses() | st.ip_addresses(v=6)).map(str),
    zone=st.just("") | st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"])).map("%{}".format),
    written=st.sampled_from(["{}", " {} ", '"{}"', "[{}]", "[{}]:443", "unknown, {}", '["{}"]']),
)
def test_address_by_itself_is_read_as_it_was_in_what_it_stood_in(address: str, zone: str, written: str) -> None:
    try:
        found = find_address(written.format(address + zone))
    except NotLocated:
        return
    assert find_address(found[0]) == found


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("192.0.0.9", "192.0.0.9"),
        ("192.31.196.1", "192.31.196.1"),
        ("2001:1::1", "2001:1::1"),
        ("2001:1::2", "2001:1::2"),
        ("2001:20::1", "2001:20::1"),
        ("2001:4:112::1", "2001:4:112::1"),
        ("2001:4860:4860:0::8888%eth0", "2001:4860:4860::8888"),
        ("::ffff:8.8.8.8", "8.8.8.8"),
        ("64:ff9b::808:808", "8.8.8.8"),
        ("2002:808:808::1", "8.8.8.8"),
    ],
)
def test_the_form_in_which_sources_are_asked(text: str, asked: str) -> None:
    assert find_address(text) == (text, asked, True)


@given(address=st.ip_addresses(v=4))
def test_private_networks_are_reserved_whatever_python_runs(address: ipaddress.IPv4Address) -> None:
    private = address.is_loopback or address.is_multicast or address.is_link_local or address.is_reserved
    stood, asked, public = find_address(str(address))
    assert stood == asked == str(address)
    assert not (public and private)
    assert public or private or not address.is_global or str(address).startswith("192.0.0.")


@pytest.mark.parametrize(("value", "result"), [(None, "tombstone"), (b"", "invalid_ip"), (b"186.58.0.1", "located")])
def test_record_goes_on_beside_its_answer(value: bytes | None, result: str) -> None:
    record = Message(topic="t", partition=0, offset=1, key=b"k", value=value, headers=[("h", b"1")], timestamp=(1, 2))
    passed, answer = Locations(LOCATE, read_settings({})).get_location(record)
    assert passed is record
    assert answer[1] == result
    assert (answer[0] is None) == (value is None)


PUBLIC = ipaddress.IPv6Network("2000::/3")
PARTLY_RESERVED = [ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


@given(address=st.ip_addresses(network=PUBLIC))
def test_other_ipv6_addresses_are_public_and_in_python_s_form(address: ipaddress.IPv6Address) -> None:
    assume(not any(address in network for network in PARTLY_RESERVED))
    assert find_address(address.exploded.upper()) == (address.exploded.upper(), str(address), True)


@given(
    text=st.lists(st.sampled_from(["0", "1", "8", "08", "255", "256", "ffff", "g", "10000", ".", ":", "::"])).map(
        "".join
    )
    | st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", fullmatch=True)
    | st.from_regex(r"([0-9a-f]{1,4}:){0,8}(:[0-9a-f]{1,4}){0,8}(:[0-9.]{0,9})?", fullmatch=True)
)
def test_what_is_an_address_is_what_python_takes_for_one(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"[0-9.]+:[0-9]{1,5}", text):  # with a port
            with pytest.raises(NotLocated, match="invalid_ip"):
                find_address(text)
    else:
        assert find_address(text)[0] == text


class Counting:
    """A locator that counts what it is asked, and fails when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails = False

    def locate(self, text: str, _public: bool) -> Location:
        self.asked.append(text)
        if self.fails:
            raise LookupFailed("no answer")
        if text == "9.9.9.9":
            raise NotLocated("not_found")
        return {"city": None, "region": None, "country_name": text}


def test_final_answers_are_remembered() -> None:
    source = Counting()
    answer = make(source.locate)
    for _ in range(3):
        answer(b"8.8.8.8")
        answer(b"9.9.9.9")
    assert source.asked == ["8.8.8.8", "9.9.9.9"]


def test_failed_lookups_are_not_remembered() -> None:
    source = Counting()
    answer = make(source.locate)
    source.fails = True
    assert answer(b"8.8.8.8")[1] == "lookup_failed"
    source.fails = False
    assert answer(b"8.8.8.8")[1] == "located"


def test_least_recently_used_answer_goes_first() -> None:
    source = Counting()
    answer = make(source.locate, CACHE_SIZE="2")
    for value in (b"1.1.1.1", b"2.2.2.2", b"1.1.1.1", b"3.3.3.3", b"1.1.1.1", b"2.2.2.2"):
        answer(value)
    assert source.asked == ["1.1.1.1", "2.2.2.2", "3.3.3.3", "2.2.2.2"]


def test_longest_address_is_remembered() -> None:
    source = Counting()
    answer = make(source.locate)
    for _ in range(2):
        answer(b"2001:4860:4860:0000:0000:0000:8.8.8.8%eth0")
    assert source.asked == ["2001:4860:4860::808:808"]


@pytest.mark.parametrize(("cache_size", "value"), [("0", b"1.1.1.1"), ("100", b"fe80::1%" + b"z" * 100)])
def test_not_remembered_without_a_cache_or_with_a_long_zone(cache_size: str, value: bytes) -> None:
    source = Counting()
    answer = make(source.locate, CACHE_SIZE=cache_size)
    answer(value)
    answer(value)
    assert len(source.asked) == 2


def written_otherwise(address: str) -> list[str]:
    listed = f"{address}, {', '.join(f'10.0.0.{number}' for number in range(20))}"
    return [address, f" {address}\n", f'"{address}"', *(f"[{address}]:{port}" for port in (50_000, 50_001)), listed]


@pytest.mark.parametrize("event", [False, True], ids=["values", "events"])
@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888"])
def test_address_is_asked_for_once_however_it_is_written(address: str, event: bool) -> None:
    source = Counting()
    answer = make(source.locate, **({"IP_FIELD": "ip"} if event else {}))
    for text in written_otherwise(address) * 2:
        output, result = answer(json.dumps({"ip": text}).encode() if event else text.encode())
        assert result == "located"
        assert json.loads(output or b"")["ip"] == (text if event else address)
    assert source.asked == [address]


def test_nothing_gets_past_a_record_that_waits_for_the_source(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kafka_enrich, "UNWELL_SECONDS", 0)
    caplog.set_level("INFO")
    settings = read_settings({"ON_LOOKUP_FAILED": "wait", "COMMIT_SECONDS": "60"})
    worker = Worker(settings, "process", 0, threading.Event())
    worker.consumer = Consumer({"group.id": "none"}, logger=kafka_enrich.LIBRDKAFKA_LOG)

    def item(partition: int, offset: int, result: str = "located") -> Enriched:
        return Message(topic="t", partition=partition, offset=offset), (b"", result)

    def kept() -> list[tuple[int | None, int | None]]:
        return [(record.partition(), record.offset()) for record in worker.again]

    first, second = item(0, 5), item(0, 7)
    assert worker.set_aside([first, item(0, 6, WAITS), second, item(1, 3)]) == [first]
    assert worker.set_aside([item(0, 8), item(2, 1)]) == []  # the rest of a batch that the engine cut in two
    assert kept() == [(0, 6), (0, 7), (1, 3), (0, 8), (2, 1)]
    assert worker.why_unwell() == "worker process-0 waits for the source of locations"
    worker.again.clear()
    again = [item(0, 6), second]
    assert worker.set_aside([*again, item(1, 3, WAITS), item(0, 8), item(2, 1)]) == again
    assert kept() == [(1, 3), (0, 8), (2, 1)]
    assert worker.why_unwell()
    worker.again.clear()
    assert len(worker.set_aside([item(1, 3), item(0, 8), item(2, 1)])) == 3
    assert [line.split(": ")[1] for line in caplog.messages] == ["", "the source of locations answers again"]
    assert worker.why_unwell() is None
    worker.set_aside([item(3, 1, WAITS), item(4, 1)])
    worker.forget([TopicPartition("t", 4)])
    assert kept() == [(3, 1)]
    assert worker.why_unwell()
    worker.forget([TopicPartition("t", 3)])
    worker.read_on_or_pause()
    assert worker.why_unwell() is None
    worker.consumer.close()


def test_end_of_a_partition_is_not_committed_before_what_waits() -> None:
    """A transaction's marker may be last, so that only the end tells the offset to commit."""
    worker = Worker(read_settings({"ON_LOOKUP_FAILED": "wait"}), "process", 0, threading.Event())
    worker.consumer = Consumer({"group.id": "none"}, logger=kafka_enrich.LIBRDKAFKA_LOG)
    worker.consumer.subscribe(["none"])
    worker.commit_at = worker.ask_at = worker.again_at = math.inf
    worker.again = [Message(topic="t", partition=0, offset=6)]
    worker.ends = {0: 9, 1: 4, 2: 5}
    assert worker.next_batch() == []
    assert worker.produced == {}
    worker.forget([TopicPartition("t", 2)])
    worker.moved = False
    worker.again.clear()
    assert worker.next_batch() == []
    assert worker.produced == {0: 9, 1: 4}
    worker.consumer.close()


def test_what_was_produced_in_part_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_enrich, "commit_offsets", pytest.fail)
    worker = Worker(read_settings({}), "process", 0, threading.Event())
    worker.output_topic, worker.errors = "none", set()
    worker.producer = Producer({}, logger=kafka_enrich.LIBRDKAFKA_LOG)
    worker.produced = {0: 5}  # of a batch before it
    items: list[Any] = [(Message(topic="t", partition=0, offset=5), (b"", "located")), (None, (b"", "located"))]
    with pytest.raises(AttributeError):
        worker.write_batch(items)
    assert not worker.commit()


@pytest.mark.parametrize(("left", "counted"), [({}, 0), ({1: 7}, 2)])
def test_records_of_partitions_that_have_left_count_for_their_next_owner(left: dict[int, int], counted: int) -> None:
    worker = Worker(read_settings({}), "process", 0, threading.Event())
    worker.produced, worker.pending["located"] = {0: 5, **left}, 2
    worker.forget([TopicPartition("t", 0)])
    assert worker.pending.total() == counted


@pytest.mark.parametrize("code", [KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError._NOT_IMPLEMENTED])
def test_records_that_cannot_be_read_end_it(code: int) -> None:
    """Those after them would be committed with them, or none is ever read again."""
    worker = Worker(read_settings({}), "process", 0, threading.Event())
    worker.input_topic = "in"
    with pytest.raises(RunError, match="topic 'in' cannot be read: of offsets 5 to 9"):
        worker.take_error(Message(topic="in", partition=0, error=KafkaError(code, "of offsets 5 to 9")))


@pytest.mark.parametrize(
    ("first", "committed", "end", "left"), [(0, 5, 9, {0, 1}), (5, 5, 9, {1}), (7, 5, 9, {1}), (0, 50, 9, {1})]
)
def test_partition_begins_where_the_group_stands_or_after_it(
    monkeypatch: pytest.MonkeyPatch, first: int, committed: int, end: int, left: set[int]
) -> None:
    """After it where the records between were deleted; and before it where all of the topic was."""
    worker = Worker(read_settings({}), "process", 0, threading.Event())
    monkeypatch.setattr(worker, "consumer", Mock(**{"get_watermark_offsets.return_value": (0, end)}), raising=False)
    asked = Mock(return_value=[TopicPartition("t", 0, committed)])
    monkeypatch.setattr(kafka_enrich, "committed_offsets", asked)
    worker.input_topic, worker.fresh = "t", {0, 1}
    worker.begin([Message(topic="t", partition=0, offset=first), Message(topic="t", partition=0, offset=8)])
    assert (bool(worker.broken), worker.fresh) == (left == {0, 1}, left)  # and do_again is what clears them
    worker.begin([])
    asked.assert_called_once()


class Failed:
    """A producer that has failed for good, with no record left in its queue."""

    def __init__(self, fenced: KafkaException, late: bool) -> None:
        self.error: Exception = SystemError("a call-back was called after it") if late else fenced
        self.error.__cause__ = fenced if late else None

    def __len__(self) -> int:
        return 0

    def flush(self, _seconds: float) -> int:
        raise self.error

    poll = flush


@pytest.mark.parametrize("late", [False, True], ids=["in poll or flush", "in a call-back after that"])
@pytest.mark.parametrize("idle", [False, True], ids=["commit", "idle"])
def test_nothing_is_committed_after_a_producer_has_failed_for_good(
    monkeypatch: pytest.MonkeyPatch, late: bool, idle: bool
) -> None:
    """Its reports may be lost, so that what it had in its queue counts as not written."""
    committed: list[object] = []
    monkeypatch.setattr(kafka_enrich, "commit_offsets", lambda *offsets: committed.append(offsets))
    worker = Worker(read_settings({}), "process", 0, threading.Event())
    worker.consumer = Consumer({"group.id": "none"}, logger=kafka_enrich.LIBRDKAFKA_LOG)
    worker.consumer.subscribe(["none"])
    monkeypatch.setattr(worker, "producer", Failed(KafkaException(KafkaError(KafkaError._FATAL)), late), raising=False)
    worker.input_topic, worker.produced = "none", {0: 1}
    if idle:
        worker.commit_at = math.inf
        worker.next_batch()
    for _ in range(2):
        assert not worker.commit()
    assert worker.broken
    assert committed == []
    worker.consumer.close()


@pytest.mark.parametrize(("lag", "seconds"), [({0: 9_999}, 0.1), ({0: 5_000, 1: 5_000}, 0.3)])
def test_worker_that_is_far_behind_commits_less_often(
    monkeypatch: pytest.MonkeyPatch, lag: dict[int, int], seconds: float
) -> None:
    worker = Worker(read_settings({"DELIVERY_GUARANTEE": "exactly_once"}), "process", 0, threading.Event())
    worker.consumer = Consumer({"group.id": "none"}, logger=kafka_enrich.LIBRDKAFKA_LOG)
    worker.consumer.subscribe(["none"])
    worker.producer = Producer({}, logger=kafka_enrich.LIBRDKAFKA_LOG)
    worker.lag = lag
    monkeypatch.setattr(worker, "commit", lambda: True)
    worker.next_batch()
    assert worker.commit_at == 0  # nothing is there to commit, and what comes next is at once
    worker.pending["located"] = 1
    assert worker.next_batch() == []
    assert worker.commit_at - worker.last_turn == pytest.approx(seconds)
    worker.consumer.close()
