"""City databases: both schemas, and what is no City database."""

import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from mmdb_writer import MMDBWriter
from netaddr import IPSet

from conftest import SAMPLE_DATABASE, Program
from kafka_enrich import LookupFailed, NotLocated, SettingsError, open_database


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
        ({"city": "Rome", "country": "Italy", "country_code": "IT"}, ("Rome", None, "Italy")),
        ({"city": "", "state1": " ", "country_code": "FR"}, (None, None, "FR")),
        ({"city": ["odd"], "subdivisions": "odd", "region": 3, "country_code": "FR"}, (None, None, "FR")),
    ],
)
def test_location_is_read_by_path(tmp_path: Path, record: dict[str, Any], location: tuple[str | None, ...]) -> None:
    database = write(tmp_path / "city.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": BERLIN})
    assert tuple(open_database(database).locate("8.8.8.8").values()) == location


@pytest.mark.parametrize("record", [{}, {"city": ""}, {"traits": {"is_anycast": True}}, "Berlin", [1]])
def test_record_without_a_location(tmp_path: Path, record: Any) -> None:
    database = write(tmp_path / "city.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": BERLIN})
    with pytest.raises(NotLocated, match="not_found"):
        open_database(database).locate("8.8.8.8")


def test_type_and_date_are_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, logger="kafka_enrich")
    path = write(tmp_path / "city.mmdb", {"8.8.8.0/24": BERLIN})
    built = datetime.fromtimestamp(open_database(path).built, timezone.utc)
    assert abs((datetime.now(timezone.utc) - built).total_seconds()) < 60
    assert caplog.messages == [f"locating with {path}, Test of {built.date()}"]


def test_unknown_address() -> None:
    with pytest.raises(NotLocated, match="not_found"):
        open_database(str(SAMPLE_DATABASE)).locate("9.9.9.9")


def test_ipv6_address_in_an_ipv4_database(tmp_path: Path) -> None:
    locate = open_database(write(tmp_path / "city.mmdb", {"8.8.8.0/24": BERLIN}, ip_version=4)).locate
    with pytest.raises(NotLocated, match="not_found"):
        locate("2001:4860:4860::8888")
    assert locate("8.8.8.8")["city"] == "Berlin"


def test_ipv4_address_in_an_ipv6_database(tmp_path: Path) -> None:
    locate = open_database(write(tmp_path / "city.mmdb", {"2001:4860::/32": BERLIN})).locate
    assert locate("2001:4860::1")["city"] == "Berlin"
    with pytest.raises(NotLocated, match="not_found"):
        locate("8.8.8.8")


def test_record_damaged_behind_those_read_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "city.mmdb"
    write(path, {"8.8.8.0/24": BERLIN, "9.9.9.0/24": {**BERLIN, "region": "damaged"}})
    path.write_bytes(path.read_bytes().replace(b"damaged", b"\xff\xff\xff\xff\xff\xff\xff"))
    with monkeypatch.context() as short:
        short.setattr("kafka_enrich.itertools.islice", lambda records, _number: [next(iter(records))])
        locate = open_database(str(path)).locate
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
