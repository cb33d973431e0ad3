"""Databases: every vendor's schema, what is none, several of them, and files that change."""

import gzip
import io
import json
import logging
import tarfile
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from conftest import SAMPLE_DATABASE, Program, write_database
from kafka_enrich import FIELDS, Databases, Location, LookupFailed, NotLocated, SettingsError, read_settings, to_json

EVERYTHING = ",".join(FIELDS)
BERLIN = {"city": "Berlin", "country_name": "Germany"}
GERMANY = {
    "iso_code": "DE",
    "is_in_european_union": True,
    "names": {"de": "Deutschland", "en": "Germany", "fr": "Allemagne"},
}
EUROPE = {"code": "EU", "names": {"de": "Europa", "en": "Europe"}}


def opened(*paths: str, **environment: str) -> Databases:
    return Databases(read_settings({"GEOIP_DATABASE": ",".join(paths), **environment}))


def found(path: str, address: str = "8.8.8.8", public: bool = True, **environment: str) -> Location:
    return opened(path, **environment).locate(address, public)


def names(english: str) -> dict[str, Any]:
    return {"names": {"de": "anders", "en": english}}


def refusal(path: Path | str, **environment: str) -> str:
    with pytest.raises(SettingsError) as error:
        opened(str(path), **environment)
    line = str(error.value)
    assert line.startswith(f"GEOIP_DATABASE: {path}")
    assert "\n" not in line
    return line


# --- What records say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "location"),
    [
        (
            {"city": names("Boxford"), "subdivisions": [names("England"), names("Berkshire")], "country": names("UK!")},
            ("Boxford", "England", "UK!"),
        ),
        ({"city": names("Singapore"), "country": names("Singapore")}, ("Singapore", None, "Singapore")),
        ({"country": names("Bhutan")}, (None, None, "Bhutan")),
        ({"city": names("X"), "subdivisions": [], "country": {"iso_code": "DE"}}, ("X", None, "DE")),
        ({"registered_country": names("Germany")}, (None, None, "Germany")),
        ({"registered_country": {"iso_code": "DE"}}, (None, None, "DE")),
        (
            {"city": "Mountain View", "state1": "California", "country_code": "US"},
            ("Mountain View", "California", "US"),
        ),
        ({"city": "Rome", "region": "Lazio", "country": "IT", "country_name": "Italy"}, ("Rome", "Lazio", "Italy")),
        ({"city": "Rome", "region": "62", "region_name": "Lazio", "country": "Italy"}, ("Rome", "Lazio", "Italy")),
        ({"city": "Rome", "region": "Lazio", "country": "IT"}, ("Rome", "Lazio", "IT")),
        ({"city": "Rome", "country": "Italy", "country_code": "IT"}, ("Rome", None, "Italy")),
        ({"city": "", "state1": " ", "country_code": "FR"}, (None, None, "FR")),
        ({"city": "-", "region": "-", "country": "FR"}, (None, None, "FR")),
        ({"city": ["odd"], "subdivisions": "odd", "region": 3, "country_code": "FR"}, (None, None, "FR")),
    ],
)
def test_city_region_and_country(tmp_path: Path, record: dict[str, Any], location: tuple[str | None, ...]) -> None:
    path = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": BERLIN})
    assert tuple(found(path).values()) == location


MAXMIND = {
    "city": names("Berlin"),
    "continent": EUROPE,
    "country": GERMANY,
    "location": {"accuracy_radius": 10, "latitude": 52.5, "longitude": 13.4, "time_zone": "Europe/Berlin"},
    "postal": {"code": "10115"},
    "registered_country": {"iso_code": "US", "names": {"en": "United States"}},
    "subdivisions": [{"iso_code": "BE", "names": {"en": "Land Berlin"}}],
    "traits": {"autonomous_system_number": 3320, "autonomous_system_organization": "Deutsche Telekom AG"},
}
KNOWN = {
    "city": "Berlin",
    "region": "Land Berlin",
    "region_code": "BE",
    "country_name": "Germany",
    "country_code": "DE",
    "continent_code": "EU",
    "postal": "10115",
    "latitude": 52.5,
    "longitude": 13.4,
    "timezone": "Europe/Berlin",
    "in_eu": True,
    "asn": "AS3320",
    "org": "Deutsche Telekom AG",
    "network": "8.8.8.0/24",
}
OTHER: dict[str, object] = {"in_eu": None}
NO_SYSTEM: dict[str, object] = {"asn": None, "org": None}
SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "MaxMind's Enterprise": (MAXMIND, {}),
    "MaxMind's City": ({name: value for name, value in MAXMIND.items() if name != "traits"}, NO_SYSTEM),
    "ip-location-db's City": (
        {
            "city": "Berlin",
            "country_code": "DE",
            "latitude": 52.5,
            "longitude": 13.4,
            "postcode": "10115",
            "state1": "Land Berlin",
            "state2": "",
            "timezone": "Europe/Berlin",
        },
        {**OTHER, **NO_SYSTEM, "country_name": "DE", "continent_code": None, "region_code": None},
    ),
    "IPinfo's first": (
        {
            "city": "Berlin",
            "country": "DE",
            "lat": "52.5",
            "lng": "13.4",
            "postal": "10115",
            "region": "Land Berlin",
            "timezone": "Europe/Berlin",
        },
        {**OTHER, **NO_SYSTEM, "country_name": "DE", "continent_code": None, "region_code": None},
    ),
    "IPinfo's second": (
        {
            "asn": "AS3320",
            "as_name": "Deutsche Telekom AG",
            "as_domain": "telekom.de",
            "city": "Berlin",
            "continent": "EU",
            "continent_name": "Europe",
            "country": "DE",
            "country_name": "Germany",
            "latitude": "52.5",
            "longitude": "13.4",
            "postal_code": "10115",
            "region": "BE",
            "region_name": "Land Berlin",
            "timezone": "Europe/Berlin",
        },
        OTHER,
    ),
    "IPinfo's third": (
        {
            "asn": "AS3320",
            "as_name": "Deutsche Telekom AG",
            "city": "Berlin",
            "continent": "Europe",
            "continent_code": "EU",
            "country": "Germany",
            "country_code": "DE",
            "latitude": 52.5,
            "longitude": 13.4,
            "postal_code": "10115",
            "region": "Land Berlin",
            "region_code": "BE",
            "timezone": "Europe/Berlin",
        },
        OTHER,
    ),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_of_every_schema(tmp_path: Path, schema: str) -> None:
    record, different = SCHEMAS[schema]
    path = write_database(tmp_path / "some.mmdb", {"8.8.8.0/24": record})
    location = found(path, FIELDS=EVERYTHING)
    assert location == {**KNOWN, **different}
    assert list(location) == list(FIELDS)


@pytest.mark.parametrize(
    ("record", "location"),
    [
        ({"country": {"iso_code": "US", "geoname_id": 6252001}}, {"country_code": "US", "in_eu": False}),
        ({"country": {"iso_code": "DE"}}, {"country_code": "DE", "in_eu": None}),
        ({"registered_country": GERMANY}, {"country_code": "DE", "in_eu": True}),
        ({"continent": EUROPE}, {"continent_code": "EU", "country_code": None}),
        ({"in_eu": True, "country": "DE"}, {"in_eu": True}),
        ({"postal": "", "country": "DE"}, {"postal": None}),
        ({"latitude": "52.5", "longitude": "x", "country": "DE"}, {"latitude": None, "longitude": None}),
        ({"latitude": 52.5, "country": "DE"}, {"latitude": None}),
        ({"location": {"latitude": 0, "longitude": -0.5}}, {"latitude": 0, "longitude": -0.5}),
        (
            {"autonomous_system_number": 13335, "autonomous_system_organization": "Org"},
            {"asn": "AS13335", "org": "Org"},
        ),
        ({"asn": "13335", "name": "Org"}, {"asn": "AS13335", "org": "Org"}),
        ({"asn": "", "autonomous_system_number": 0, "country": "DE"}, {"asn": None}),
        ({"country": "ZZ", "city": "X"}, {"country_name": None, "country_code": None}),
    ],
)
def test_field(tmp_path: Path, record: dict[str, Any], location: dict[str, object]) -> None:
    path = write_database(tmp_path / "some.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": MAXMIND})
    everything = found(path, FIELDS=EVERYTHING)
    assert {name: everything[name] for name in location} == location


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("traits.user_type", "hosting"),
        ("/traits/user_type", "hosting"),
        ("traits.is_anycast", True),
        ("subdivisions.1.iso_code", "X"),
        ("traits.score", 2.5),
        ("traits.large", str(2**100)),
        ("traits.nothing", None),
        ("traits.nested", {"large": [str(2**100)], "text": "a"}),
        ("city.names", {"en": "Berlin"}),
    ],
)
def test_any_other_value_by_its_path(tmp_path: Path, path: str, value: object) -> None:
    traits: dict[str, Any] = {"user_type": "hosting", "is_anycast": True, "score": 2.5, "large": 2**100}
    traits["nested"] = {"large": [2**100], "text": "a"}
    record = {"city": {"names": {"en": "Berlin"}}, "traits": traits, "subdivisions": [{}, {"iso_code": "X"}]}
    database = write_database(tmp_path / "some.mmdb", {"8.8.8.0/24": record})
    location = found(database, FIELDS=f"city, risk={path}")
    assert location == {"city": "Berlin", "risk": value}
    assert json.loads(to_json("8.8.8.8", location, None)) == {"ip": "8.8.8.8", **location}


@pytest.mark.parametrize(("language", "country"), [("de", "Deutschland"), ("pt-BR", "Germany"), ("fr", "Allemagne")])
def test_language(tmp_path: Path, language: str, country: str) -> None:
    path = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": {"country": GERMANY}})
    assert found(path, GEOIP_LANGUAGE=language)["country_name"] == country


@pytest.mark.parametrize(
    ("address", "network"),
    [("8.8.8.8", "8.8.8.0/24"), ("9.9.9.9", "9.0.0.0/8"), ("2001:4860::1", "2001:4860::/32")],
)
def test_network(tmp_path: Path, address: str, network: str) -> None:
    path = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": BERLIN, "9.0.0.0/8": BERLIN, "2001:4860::/32": BERLIN})
    assert found(path, address, FIELDS="city,network") == {"city": "Berlin", "network": network}
    assert found(path, address, FIELDS="network") == {"network": network}


@pytest.mark.parametrize("record", [{}, {"city": ""}, {"traits": {"is_anycast": True}}, "Berlin", [1]])
def test_record_without_a_location(tmp_path: Path, record: Any) -> None:
    path = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": record, "9.9.9.0/24": BERLIN})
    for fields in ("city,region,country_name", "city,network"):
        with pytest.raises(NotLocated, match="not_found"):
            found(path, FIELDS=fields)


# --- Several ----------------------------------------------------------------------------------------------------


def test_each_field_comes_from_the_first_database_that_knows_it(tmp_path: Path) -> None:
    own = write_database(tmp_path / "own.mmdb", {"8.8.8.0/28": {"city": "Here"}, "10.0.0.0/8": {"city": "Office"}})
    city = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": {**MAXMIND, "traits": {}}})
    system = write_database(tmp_path / "asn.mmdb", {"8.8.0.0/16": {"autonomous_system_number": 1}}, 4)
    locate = opened(own, city, system, FIELDS="city,country_name,latitude,longitude,asn,network").locate
    place = {"latitude": 52.5, "longitude": 13.4}
    germany = {"country_name": "Germany", **place, "asn": "AS1"}
    assert locate("8.8.8.8", True) == {"city": "Here", **germany, "network": "8.8.8.0/28"}
    assert locate("8.8.8.99", True) == {"city": "Berlin", **germany, "network": "8.8.8.0/24"}
    unknown = dict.fromkeys([*germany, "city"])
    assert locate("8.8.1.1", True) == {**unknown, "asn": "AS1", "network": "8.8.0.0/16"}
    assert locate("10.1.1.1", False) == {**unknown, "city": "Office", "network": "10.0.0.0/8"}
    for address, public, result in (("127.0.0.1", False, "reserved_ip"), ("9.9.9.9", True, "not_found")):
        with pytest.raises(NotLocated, match=result):
            locate(address, public)


def test_both_ip_versions_in_two_files(tmp_path: Path) -> None:
    four = write_database(tmp_path / "4.mmdb", {"8.8.8.0/24": BERLIN}, 4)
    six = write_database(tmp_path / "6.mmdb", {"2001:4860::/32": BERLIN})
    for paths in ((four, six), (six, four)):
        locate = opened(*paths).locate
        assert locate("8.8.8.8", True)["city"] == locate("2001:4860::1", True)["city"] == "Berlin"


@pytest.mark.parametrize(("path", "address"), [("4.mmdb", "2001:4860:4860::8888"), ("6.mmdb", "8.8.8.8")])
def test_address_of_the_other_ip_version(tmp_path: Path, path: str, address: str) -> None:
    write_database(tmp_path / "4.mmdb", {"8.8.8.0/24": BERLIN}, 4)
    write_database(tmp_path / "6.mmdb", {"2001:4860::/32": BERLIN})
    with pytest.raises(NotLocated, match="not_found"):
        found(str(tmp_path / path), address)


# --- What can be used -------------------------------------------------------------------------------------------


def test_type_and_date_are_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, logger="kafka_enrich")
    path = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": BERLIN})
    [database] = opened(path).in_use
    assert abs((datetime.now(timezone.utc) - database.built).total_seconds()) < 60
    assert caplog.messages == [f"locating with {path}, Test of {database.built.date()}"]


def test_good_databases_are_not_refused(tmp_path: Path) -> None:
    whole = write_database(tmp_path / "whole.mmdb", {"0.0.0.0/1": BERLIN, "128.0.0.0/1": BERLIN}, 4)
    assert found(whole)["city"] == "Berlin"
    late = {f"1.{number // 256}.{number % 256}.0/24": {"odd": number} for number in range(3000)}
    assert found(write_database(tmp_path / "late.mmdb", {**late, "8.8.8.0/24": BERLIN}))["city"] == "Berlin"
    assert (
        found(write_database(tmp_path / "country.mmdb", {"8.8.8.0/24": {"country": GERMANY}}))["country_name"]
        == "Germany"
    )


def test_large_database_whose_only_city_comes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kafka_enrich.SAMPLE", 1000)
    records: dict[str, Any] = {f"1.{number // 256}.{number % 256}.0/24": {"odd": number} for number in range(3000)}
    assert (
        found(write_database(tmp_path / "late.mmdb", {**records, "128.0.0.0/8": BERLIN}), "128.1.1.1")["city"]
        == "Berlin"
    )


def packed() -> dict[str, bytes]:
    sample, archive = SAMPLE_DATABASE.read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("city.mmdb"))
    return {
        "empty": b"",
        "text": b"no database",
        "cut off": sample[:-200],
        "gzip": gzip.compress(sample),
        "tar": archive.getvalue(),
        "zip": b"PK\x03\x04" + sample,
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }


@pytest.mark.parametrize("kind", packed())
def test_file_that_is_no_database(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "city.mmdb"
    path.write_bytes(packed()[kind])
    assert refusal(path).endswith(" is no MaxMind database, or has to be unpacked")


def test_what_is_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith(" cannot be read: Is a directory")
    assert refusal(tmp_path / "missing.mmdb").endswith(" cannot be read: No such file or directory")


@pytest.mark.parametrize("record", [{"autonomous_system_number": 1}, {"isp": "x"}, "DE", [1]])
def test_database_with_none_of_the_fields(tmp_path: Path, record: Any) -> None:
    path = write_database(tmp_path / "other.mmdb", {"8.8.8.0/24": record}, kind="GeoLite2-ASN")
    assert refusal(path).endswith("GeoLite2-ASN, has none of FIELDS=city,region,country_name")


def test_one_of_several_is_refused(tmp_path: Path) -> None:
    city = write_database(tmp_path / "city.mmdb", {"8.8.8.0/24": BERLIN})
    with pytest.raises(SettingsError, match=r"^GEOIP_DATABASE: /no/such\.mmdb cannot be read: No such file"):
        opened(city, "/no/such.mmdb")


@pytest.mark.parametrize("length", [*range(0, 3000, 97), *range(-3000, 0, 97)])
def test_damaged_database_is_refused_or_fails_address_by_address(tmp_path: Path, length: int) -> None:
    whole = bytearray(SAMPLE_DATABASE.read_bytes())
    cut = tmp_path / "cut.mmdb"
    cut.write_bytes(whole[:length])
    refusal(cut)
    place = length % len(whole)
    zeroed, pointing = tmp_path / "zeroed.mmdb", tmp_path / "pointing.mmdb"
    zeroed.write_bytes(bytes(200) + whole[200:] if not length else whole[:place] + bytes(200) + whole[place + 200 :])
    pointing.write_bytes(whole[:place] + b"\x3f\xff\xff\xff" * 20 + whole[place + 80 :])
    for path in (zeroed, pointing):
        try:
            locate = opened(str(path)).locate
        except SettingsError:
            continue
        for address in ("186.58.0.1", "9.9.9.9", "2001:1b68::1", "1.1.1.1"):
            with suppress(NotLocated, LookupFailed):
                locate(address, True)


def test_record_damaged_behind_those_read_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "city.mmdb"
    write_database(path, {"8.8.8.0/24": BERLIN, "9.9.9.0/24": {**BERLIN, "region": "damaged"}})
    path.write_bytes(path.read_bytes().replace(b"damaged", b"\xff\xff\xff\xff\xff\xff\xff"))
    locate = opened(str(path)).locate
    assert locate("8.8.8.8", True)["city"] == "Berlin"
    with pytest.raises(LookupFailed):
        locate("9.9.9.9", True)


@pytest.mark.parametrize("path", ["/no/such.mmdb", str(Path(__file__))])
def test_program_ends_with_one_line(kafka_enrich_program: Program, path: str) -> None:
    ended = kafka_enrich_program(GEOIP_DATABASE=path)
    assert ended.exit_code == 2
    assert ended.errors.splitlines()[-1].startswith(f"kafka_enrich.py: GEOIP_DATABASE: {path}")
    assert "Traceback" not in ended.errors


# --- Files that change ------------------------------------------------------------------------------------------


def city(path: Path, name: str) -> None:
    write_database(path, {"8.8.8.0/24": {"city": name}})


def by_rename(path: Path, name: str) -> None:
    city(path.with_suffix(".new"), name)
    path.with_suffix(".new").replace(path)


def in_place(path: Path, name: str) -> None:
    city(path.with_suffix(".new"), name)
    path.write_bytes(path.with_suffix(".new").read_bytes())


def by_its_link(path: Path, name: str) -> None:
    target = path.with_name(name + ".mmdb")
    city(target, name)
    path.with_suffix(".link").symlink_to(target)
    path.with_suffix(".link").replace(path)


def by_the_link_of_its_folder(path: Path, name: str) -> None:
    """As Kubernetes mounts: city.mmdb -> ..data/city.mmdb, ..data -> ..a_date."""
    folder = path.with_name(f"..{name}")
    folder.mkdir()
    city(folder / path.name, name)
    link = path.with_name("..new")
    link.symlink_to(folder)
    link.replace(path.with_name("..data"))


WAYS = [by_rename, in_place, by_its_link, by_the_link_of_its_folder]


def looks(databases: Databases) -> list[bool]:
    return [databases.look() for _ in range(3)]


@pytest.mark.parametrize("change", WAYS)
def test_database_is_swapped(tmp_path: Path, change: Callable[[Path, str], None]) -> None:
    path = tmp_path / "city.mmdb"
    if change is by_the_link_of_its_folder:
        change(path, "First")
        path.symlink_to("..data/city.mmdb")
    else:
        city(path, "First")
    databases = opened(str(path))
    assert looks(databases) == [False, False, False]
    change(path, "Second")
    assert looks(databases) == [False, True, False]  # the first look only sees that it is another one
    assert databases.locate("8.8.8.8", True) == {"city": "Second", "region": None, "country_name": None}
    assert (databases.swaps, databases.refusals) == (1, 0)


@pytest.mark.parametrize("broken", ["half", "empty", "gone", "no city", "a folder"])
def test_what_cannot_be_used_is_refused_once_and_the_old_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    path = tmp_path / "city.mmdb"
    city(path, "First")
    databases = opened(str(path))
    content = path.read_bytes()
    path.unlink()
    if broken == "a folder":
        path.mkdir()
    elif broken == "no city":
        write_database(path, {"8.8.8.0/24": {"autonomous_system_number": 1}})
    elif broken != "gone":
        path.write_bytes(b"" if broken == "empty" else content[: len(content) // 2])
    assert looks(databases) == [False, False, False]
    assert (databases.swaps, databases.refusals) == (0, 1)
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"GEOIP_DATABASE: {path}")
    assert line.endswith(f"the one of {databases.in_use[0].built.date()} stays in use")
    assert databases.locate("8.8.8.8", True)["city"] == "First"
    if broken == "a folder":
        path.rmdir()
    by_rename(path, "Second")
    assert looks(databases) == [False, True, False]
    assert databases.locate("8.8.8.8", True)["city"] == "Second"


def test_file_that_is_being_written_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "city.mmdb"
    city(path, "First")
    databases = opened(str(path))
    city(tmp_path / "new.mmdb", "Second")
    content = (tmp_path / "new.mmdb").read_bytes()
    with open(path, "wb") as file:
        for start in range(0, len(content), 500):
            file.write(content[start : start + 500])
            file.flush()
            assert not databases.look()
    assert not caplog.records
    assert looks(databases) == [True, False, False]


def test_back_to_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "city.mmdb"
    city(path, "First")
    databases = opened(str(path))
    for _ in range(2):
        path.rename(tmp_path / "kept")
        assert looks(databases) == [False, False, False]
        (tmp_path / "kept").rename(path)
        assert looks(databases) == [False, True, False]
    assert (databases.swaps, databases.refusals) == (2, 2)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


def test_several_are_swapped_together(tmp_path: Path) -> None:
    one, two = tmp_path / "one.mmdb", tmp_path / "two.mmdb"
    write_database(one, {"8.8.8.0/24": {"city": "First"}})
    write_database(two, {"8.8.8.0/24": {"region": "First"}})
    databases = opened(str(one), str(two))
    write_database(one, {"8.8.8.0/24": {"city": "Second"}})
    write_database(two, {"8.8.8.0/24": {"region": "Second"}})
    assert looks(databases) == [False, True, False]
    assert list(databases.locate("8.8.8.8", True).values()) == ["Second", "Second", None]
    assert databases.swaps == 2
