"""The record contract: what every value and key becomes."""

import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SAMPLE_DATABASE
from kafka_enrich import (
    GetLocation,
    InvalidIp,
    Location,
    Locator,
    LookupFailed,
    LookupStopped,
    Tally,
    add_up,
    make_get_location,
    new_tallies,
    open_database,
)

LOCATE = open_database(str(SAMPLE_DATABASE))
ARGENTINA = {"city": "Buenos Aires (San Telmo)", "region": "Buenos Aires F.D.", "country_name": "Argentina"}
TURKEY = {"city": "Ankara", "region": "Ankara", "country_name": "Türkiye"}
NOWHERE = {"city": None, "region": None, "country_name": None}


def make(locate: Locator = LOCATE, cache_size: int = 100, on_lookup_failed: str = "mark") -> GetLocation:
    return make_get_location(locate, cache_size, on_lookup_failed, Tally(iter(new_tallies(9))))


def value_out(value: bytes | None) -> dict[str, str | None]:
    key, output = make()((b"key", value))
    assert key == b"key"
    record = json.loads(output)
    assert isinstance(record, dict)
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
    ],
)
def test_located(value: bytes, ip: str, location: dict[str, str]) -> None:
    assert value_out(value) == {"ip": ip, **location}


def test_output_is_utf8_not_escaped() -> None:
    _, output = make()((None, b"2001:1b68::1"))
    assert "Türkiye".encode() in output


@pytest.mark.parametrize(
    ("value", "ip"),
    [
        (None, None),
        (b"", ""),
        (b"  ", ""),
        (b"ip", "ip"),
        (b"ip,country", "ip,country"),
        (b"localhost", "localhost"),
        (b"dns.google", "dns.google"),
        (b"8.8.8.8:53", "8.8.8.8:53"),
        (b"[2001:1b68::1]:53", "[2001:1b68::1]:53"),
        (b"8.8.8.8/32", "8.8.8.8/32"),
        (b"8.8.8.256", "8.8.8.256"),
        (b"8.8.8", "8.8.8"),
        (b"134744072", "134744072"),
        (b"0x8.8.8.8", "0x8.8.8.8"),
        (b"010.8.8.8", "010.8.8.8"),
        (b"8.8.8.8, 9.9.9.9", "8.8.8.8, 9.9.9.9"),
        (b"8.8.8.8\x00", "8.8.8.8\x00"),
        ("٨.٨.٨.٨".encode(), "٨.٨.٨.٨"),
        ("\ufeff8.8.8.8".encode(), "\ufeff8.8.8.8"),
        (b"\xff\xfe8", "\ufffd\ufffd8"),
        (b"2001:1b68::1%", "2001:1b68::1%"),
        (b"x" * 65, "x" * 64),
        (b"fe80::1%" + b"x" * 900_000, "fe80::1%" + "x" * 56),
        (b"\x00" * 1_000_000, "\x00" * 64),
    ],
)
def test_invalid_ip(value: bytes | None, ip: str | None) -> None:
    assert value_out(value) == {"ip": ip, **NOWHERE, "error": "invalid_ip"}


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 - nothing listens there, it is looked up
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
        "64:ff9b::808:808",
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
    assert value_out(address.encode()) == {"ip": address, **NOWHERE, "error": "reserved_ip"}


def test_not_found() -> None:
    assert value_out(b"9.9.9.9") == {"ip": "9.9.9.9", **NOWHERE, "error": "not_found"}


def test_lookup_failed() -> None:
    def fail(_text: str) -> Location:
        raise LookupFailed

    _, output = make(fail)((b"key", b" 8.8.8.8 "))
    assert json.loads(output) == {"ip": "8.8.8.8", **NOWHERE, "error": "lookup_failed"}


def test_lookup_failed_stops_where_that_is_wanted() -> None:
    def fail(_text: str) -> Location:
        raise LookupFailed

    with pytest.raises(LookupStopped, match=r"8\.8\.8\.8"):
        make(fail, on_lookup_failed="stop")((b"key", b" 8.8.8.8 "))


@pytest.mark.parametrize("key", [None, b"", b"\xff\x00", b"k" * 1_040_000])
def test_key_stays_as_it_is(key: bytes | None) -> None:
    assert make()((key, b"186.58.0.1"))[0] is key


@given(key=st.none() | st.binary(), value=st.none() | st.binary() | st.text().map(str.encode))
def test_any_record_becomes_one_record(key: bytes | None, value: bytes | None) -> None:
    key_out, output = make()((key, value))
    record = json.loads(output)
    assert key_out == key
    assert list(record)[:4] == ["ip", "city", "region", "country_name"]
    assert len(output) < 1000
    assert set(record) - {"ip", "city", "region", "country_name"} <= {"error"}
    assert ("error" in record) == (record["city"] is None)


@given(value=(st.ip_addresses() | st.ip_addresses(v=6)).map(lambda address: str(address).encode()))
def test_any_address_is_not_invalid(value: bytes) -> None:
    assert value_out(value).get("error") in (None, "not_found", "reserved_ip")


class Counting:
    """A locator that counts what it is asked, and fails when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails = False

    def locate(self, text: str) -> Location:
        self.asked.append(text)
        if self.fails:
            raise LookupFailed
        if text == "x":
            raise InvalidIp
        return Location(city=None, region=None, country_name=text)


def test_final_answers_are_remembered() -> None:
    source = Counting()
    get_location = make(source.locate)
    for _ in range(3):
        get_location((None, b"8.8.8.8"))
        get_location((None, b"x"))
    assert source.asked == ["8.8.8.8", "x"]


def test_failed_lookups_are_not_remembered() -> None:
    source = Counting()
    get_location = make(source.locate)
    source.fails = True
    assert b"lookup_failed" in get_location((None, b"8.8.8.8"))[1]
    source.fails = False
    assert b"lookup_failed" not in get_location((None, b"8.8.8.8"))[1]


def test_least_recently_used_answer_goes_first() -> None:
    source = Counting()
    get_location = make(source.locate, cache_size=2)
    for value in (b"1", b"2", b"1", b"3", b"1", b"2"):
        get_location((None, value))
    assert source.asked == ["1", "2", "3", "2"]


def test_no_cache() -> None:
    source = Counting()
    get_location = make(source.locate, cache_size=0)
    get_location((None, b"1"))
    get_location((None, b"1"))
    assert source.asked == ["1", "1"]


def test_large_values_are_not_remembered() -> None:
    source = Counting()
    get_location = make(source.locate)
    get_location((None, b" " * 1000 + b"1"))
    get_location((None, b" " * 1000 + b"1"))
    assert source.asked == ["1", "1"]


def test_threads_that_ask_at_once_share_one_answer() -> None:
    source = Counting()
    together = threading.Barrier(8)

    def locate(text: str) -> Location:
        time.sleep(0.2)  # long enough for all to ask
        return source.locate(text)

    get_location = make_get_location(locate, 100, "mark", Tally(iter(new_tallies(8))), one_at_a_time=True)
    outputs = []

    def work() -> None:
        together.wait()
        outputs.append(get_location((None, b"186.58.0.1")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.asked == ["186.58.0.1"]
    assert len(outputs) == 8
    assert len(set(outputs)) == 1


def test_threads_lose_no_count() -> None:
    tallies = new_tallies(4)
    get_location = make_get_location(LOCATE, 100, "mark", Tally(iter(tallies)))

    all_here = threading.Barrier(4)  # a thread that has ended leaves its identifier, and with it its counts, to others

    def work() -> None:
        all_here.wait()
        for _ in range(20_000):
            get_location((None, b"186.58.0.1"))
            get_location((None, None))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(tally)[:2] for tally in tallies] == [[20_000, 20_000]] * 4, "each thread has counts of its own"
    assert add_up(tallies)[:2] == [80_000, 80_000]
