"""What every contestant in Python does to a value: an address in, JSON out, remembered as kafka_enrich.py does."""

import functools
import ipaddress
import os
import socket
from typing import Any

import maxminddb
import msgspec

BROKERS, INPUT, OUTPUT = (os.environ[f"KAFKA_{name}"] for name in ("BROKERS", "INPUT_TOPIC", "OUTPUT_TOPIC"))
READER = maxminddb.open_database(os.environ["GEOIP_DATABASE"], maxminddb.MODE_MMAP_EXT)
PUBLIC_FIRST_BYTES = frozenset(range(1, 224)) - {10, 100, 127, 169, 172, 192, 198, 203}


@functools.lru_cache(100_000)
def enrich(value: bytes) -> bytes:
    """Locate an address; the benchmark's topic holds public IPv4 addresses only."""
    ip = value.decode().strip()
    if socket.inet_pton(socket.AF_INET, ip)[0] not in PUBLIC_FIRST_BYTES and not ipaddress.ip_address(ip).is_global:
        raise ValueError(ip)
    found: Any = READER.get(ip) or {}
    record = {
        "ip": ip,
        "city": name(found.get("city")),
        "region": name((found.get("subdivisions") or [found.get("state1")])[0]),
        "country_name": name(found.get("country") or found.get("country_code")),
    }
    if not (record["city"] or record["region"] or record["country_name"]):
        record["error"] = "not_found"
    return msgspec.json.encode(record)


def name(field: Any) -> Any:
    """Read a name, nested as MaxMind has it or flat."""
    return (field["names"]["en"] if isinstance(field, dict) else field) or None
