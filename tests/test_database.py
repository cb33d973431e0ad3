"""City databases: both schemas, and what is no City database."""

import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmdb_writer import MMDBWriter
from netaddr import IPSet

from conftest import SAMPLE_DATABASE, Program
from kafka_enrich import (
    InvalidIp,
    LookupFailed,
    NotFound,
    ReservedIp,
    SettingsError,
    is_plainly_public,
    open_database,
    public_address,
)


def write(path: Path, records: dict[str, Any], ip_version: int = 6) -> str:
    writer = MMDBWriter(ip_version, "Test", ["en"], ipv4_compatible=ip_version == 6)
    for network, record in records.items():
        writer.insert_network(IPSet([network]), record)
    writer.to_db_file(str(path))
    return str(path)


def names(english: str) -> dict[str, Any]:
    return {"names": {"de": "anders", "en": english}}


BERLIN = {"city": "Berlin", "country_name": "Germany"}


@pytest.mark.parametrize(
    ("record", "location"),
    [
        (
            {"city": names("Boxford"), "subdivisions": [names("England"), names("Berkshire")], "country": names("UK")},
            ("Boxford", "England", "UK"),
        ),
        ({"city": names("Singapore"), "country": names("Singapore")}, ("Singapore", None, "Singapore")),
        ({"country": names("Bhutan")}, (None, None, "Bhutan")),
        ({"city": {"names": {"de": "Köln"}}, "country": names("Germany")}, (None, None, "Germany")),
        ({"city": names("X"), "subdivisions": [], "country": {"iso_code": "DE"}}, ("X", None, None)),
        (
            {"city": "Mountain View", "state1": "California", "country_code": "US"},
            ("Mountain View", "California", "US"),
        ),
        ({"city": "Rome", "region": "Lazio", "country": "IT", "country_name": "Italy"}, ("Rome", "Lazio", "Italy")),
        ({"city": "Rome", "region": "Lazio", "country": "IT"}, ("Rome", "Lazio", "IT")),
        ({"city": "", "state1": " ", "country_code": "FR"}, (None, None, "FR")),
        ({"city": ["odd"], "subdivisions": "odd", "region": 3, "country_code": "FR"}, (None, None, "FR")),
    ],
)
def test_location_is_read_by_path(tmp_path: Path, record: dict[str, Any], location: tuple[str | None, ...]) -> None:
    database = write(tmp_path / "city.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": BERLIN})
    assert tuple(open_database(database)("8.8.8.8").values()) == location


@pytest.mark.parametrize("record", [{}, {"city": ""}, {"traits": {"is_anycast": True}}, "Berlin", [1]])
def test_record_without_a_location(tmp_path: Path, record: Any) -> None:
    database = write(tmp_path / "city.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": BERLIN})
    with pytest.raises(NotFound):
        open_database(database)("8.8.8.8")


def test_unknown_address() -> None:
    with pytest.raises(NotFound):
        open_database(str(SAMPLE_DATABASE))("9.9.9.9")


def test_ipv6_address_in_an_ipv4_database(tmp_path: Path) -> None:
    locate = open_database(write(tmp_path / "city.mmdb", {"8.8.8.0/24": BERLIN}, ip_version=4))
    with pytest.raises(NotFound):
        locate("2001:4860:4860::8888")
    assert locate("::ffff:8.8.8.8")["city"] == "Berlin"


def test_ipv4_address_in_an_ipv6_database(tmp_path: Path) -> None:
    locate = open_database(write(tmp_path / "city.mmdb", {"2001:4860::/32": BERLIN}))
    assert locate("2001:4860::1")["city"] == "Berlin"
    with pytest.raises(NotFound):
        locate("8.8.8.8")


def test_record_damaged_behind_those_read_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "city.mmdb"
    write(path, {"8.8.8.0/24": BERLIN, "9.9.9.0/24": {**BERLIN, "region": "damaged"}})
    path.write_bytes(path.read_bytes().replace(b"damaged", b"\xff\xff\xff\xff\xff\xff\xff"))
    monkeypatch.setattr("kafka_enrich.itertools.islice", lambda records, _number: [next(iter(records))])
    locate = open_database(str(path))
    assert locate("8.8.8.8")["city"] == "Berlin"
    with pytest.raises(LookupFailed):
        locate("9.9.9.9")


def test_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "city.mmdb")
    with pytest.raises(SettingsError, match="there is no such file"):
        open_database(str(tmp_path / "city.mmdb"))


def test_missing_file() -> None:
    with pytest.raises(SettingsError, match=r"GEOIP_DATABASE='/no/such\.mmdb'"):
        open_database("/no/such.mmdb")


@pytest.mark.parametrize("content", [b"", b"no database", SAMPLE_DATABASE.read_bytes()[:-200]])
def test_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "city.mmdb"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="cannot be read as a MaxMind database"):
        open_database(str(path))


def test_folder() -> None:
    with pytest.raises(SettingsError, match="there is no such file"):
        open_database("/")


@pytest.mark.parametrize(
    "record", [{"country": names("Germany")}, {"autonomous_system_number": 1}, {"country_code": "DE"}, "DE"]
)
def test_database_without_cities(tmp_path: Path, record: Any) -> None:
    with pytest.raises(SettingsError, match="holds no cities"):
        open_database(write(tmp_path / "country.mmdb", {"8.8.8.0/24": record}))


@pytest.mark.parametrize("database", ["/no/such.mmdb", str(Path(__file__)), ""])
def test_program_ends_with_one_line(kafka_enrich_program: Program, database: str) -> None:
    ended = kafka_enrich_program(GEOIP_DATABASE=database)
    assert ended.exit_code == 2
    assert f"GEOIP_DATABASE={database!r}" in ended.errors
    assert ended.errors.splitlines()[-1].startswith("kafka_enrich.py: GEOIP_DATABASE=")
    assert "Traceback" not in ended.errors


# IANA's special-purpose address registry for IPv4, multicast and what is reserved for future use.
SPECIAL_BLOCKS = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24
    203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
""".split()


@pytest.mark.parametrize("block", SPECIAL_BLOCKS)
def test_special_block_is_not_plainly_public(block: str) -> None:
    network = ipaddress.IPv4Network(block)
    assert not is_plainly_public(str(network[0]))
    assert not is_plainly_public(str(network[-1]))


@given(st.ip_addresses(v=4).map(str))
def test_plainly_public_address_is_public(address: str) -> None:
    if is_plainly_public(address):
        assert public_address(address) == address


@pytest.mark.parametrize("address", ["8.8.8.8", "100.63.255.255", "172.32.0.0", "192.1.0.0", "198.20.0.0", "223.0.0.1"])
def test_public_address_is_plainly_public(address: str) -> None:
    assert is_plainly_public(address)


@given(st.text(alphabet="0123456789abcdefx.:%/ \0-+", max_size=20))
def test_text_that_is_no_address_is_not_plainly_public(text: str) -> None:
    try:
        public_address(text)
    except (InvalidIp, ReservedIp):
        assert not is_plainly_public(text)


@pytest.mark.parametrize("text", ["8.8", "134744072", "0x8.8.8.8", "010.8.8.8", "8.8.8.8\0", "٨.8.8.8", "8.8.8.8 "])
def test_odd_form_of_an_address_is_not_plainly_public(text: str) -> None:
    assert not is_plainly_public(text)
