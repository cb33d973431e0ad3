"""Enrich a Kafka topic of IP addresses with city, region and country.

    python load_data.py                                # seed the input topic with sample addresses
    python kafka_enrich.py                             # enrich what it holds, asking ipapi.co, and stop
    GEOIP_DATABASE=city.mmdb python kafka_enrich.py    # the same from a local City database
    KAFKA_TAIL=1 GEOIP_DATABASE=city.mmdb python kafka_enrich.py    # go on with what arrives, and after a restart
    PROCESSES=4 GEOIP_DATABASE=city.mmdb python kafka_enrich.py     # on four cores

The dataflow comes first, and then what it rests on: the settings, where locations come from, how records are written,
what Kafka is asked before and after, metrics, processes, the program.

Every setting comes from the environment, or from kafka_enrich.env beside this file; the README has the table. Exit
codes: 0, each record that was read is on the output topic, or a signal ended KAFKA_TAIL=1; 1, Kafka or the dataflow
failed; 2, a setting is wrong; 128 + n, signal n ended a pass early.
"""

import bisect
import functools
import hashlib
import importlib.metadata
import ipaddress
import itertools
import logging
import mmap
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from logging.handlers import BufferingHandler
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn, TypedDict
from urllib.parse import urlsplit

import maxminddb
import orjson
import requests
import urllib3
from bytewax.dataflow import Dataflow
from bytewax.execution import PeriodicEpochConfig, cluster_main
from bytewax.inputs import KafkaInputConfig
from bytewax.outputs import KafkaOutputConfig
from bytewax.parse import proc_env
from bytewax.recovery import KafkaRecoveryConfig, RecoveryConfig, SqliteRecoveryConfig
from dotenv.parser import parse_stream
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import (
    KafkaError,
    LeaderNotAvailableError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from prometheus_client import (
    CollectorRegistry,
    Histogram,
    Metric,
    ProcessCollector,
    make_wsgi_app,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger("kafka_enrich")


# --- The dataflow -----------------------------------------------------------------------------------------------


def run_dataflow(settings: "Settings", get_location: "GetLocation") -> None:
    """Run one process of the cluster: for ever, or until every partition has been read to its end."""
    brokers, addresses, proc_id = settings.brokers, settings.addresses, settings.process_id

    flow = Dataflow()
    flow.input(
        "ip_address",
        KafkaInputConfig(brokers, settings.input_topic, settings.tail, additional_properties=settings.consumer),
    )
    # (b"Germany", b"5.159.132.1"), and None for a key or a value that is not there
    flow.map(get_location)
    # (b"Germany", b'{"ip":"5.159.132.1","city":"Berlin","region":"Berlin","country_name":"Germany"}')
    flow.capture(KafkaOutputConfig(brokers, settings.output_topic, additional_properties=settings.producer))
    # the same, in the producer's queue
    cluster_main(
        flow,
        addresses,
        proc_id,
        epoch_config=PeriodicEpochConfig(timedelta(seconds=settings.epoch_seconds) if settings.tail else ONE_EPOCH),
        recovery_config=recovery_config(settings),
        worker_count_per_proc=settings.workers_per_process,
    )


ONE_EPOCH = timedelta(days=1000)  # a pass saves no place to resume from, and workers wait for each other between epochs


def recovery_config(settings: "Settings") -> RecoveryConfig | None:
    """Choose where the place to resume from is kept: a pass has none, for the engine would skip what came after it."""
    if not settings.tail:
        return None
    if settings.recovery_dir is None:
        return KafkaRecoveryConfig(settings.brokers, settings.recovery_name)
    folder = Path(settings.recovery_dir, settings.recovery_name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"RECOVERY_DIR={settings.recovery_dir!r} cannot be used: {error}") from None
    return SqliteRecoveryConfig(str(folder))


# --- Settings: the environment, checked -----------------------------------------------------------------------


class SettingsError(Exception):
    """A setting cannot be used; the message names it."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, in values that can be used together."""

    brokers: list[str]
    input_topic: str
    output_topic: str
    tail: bool
    recovery_dir: str | None
    epoch_seconds: float
    consumer: dict[str, str] = field(repr=False)
    producer: dict[str, str] = field(repr=False)
    admin: dict[str, str | bool] = field(repr=False)
    geoip_database: str | None
    ipapi_url: str
    ipapi_key: str | None = field(repr=False)
    on_lookup_failed: str
    cache_size: int
    log_level: str
    metrics_port: int | None
    addresses: list[str]
    process_id: int | None  # None: all the processes are started here
    workers_per_process: int

    @property
    def workers(self) -> int:
        """How many workers the whole cluster has."""
        return len(self.addresses) * self.workers_per_process

    @property
    def recovery_name(self) -> str:
        """Where the recovery state is: another number of workers could not use it, and would do nothing or all."""
        return f"{self.input_topic}-to-{self.output_topic}-{self.workers}-workers"


NAMES = """
    BYTEWAX_ADDRESSES BYTEWAX_HOSTFILE_PATH BYTEWAX_POD_NAME BYTEWAX_PROCESS_ID BYTEWAX_STATEFULSET_NAME
    BYTEWAX_WORKERS_PER_PROCESS CACHE_SIZE EPOCH_SECONDS GEOIP_DATABASE IPAPI_KEY IPAPI_URL KAFKA_BROKERS
    KAFKA_INPUT_TOPIC KAFKA_OUTPUT_TOPIC KAFKA_TAIL LOG_LEVEL METRICS_PORT ON_LOOKUP_FAILED PROCESSES RECOVERY_DIR
""".split()
PREFIXES = ("KAFKA_CLIENT_", "KAFKA_CONSUMER_", "KAFKA_PRODUCER_")


def with_settings_file(env: Mapping[str, str], path: Path) -> dict[str, str]:
    """Add to the environment what a settings file says: who starts the script on an instance may set no variables.

    Args:
        env: wins where both name a setting.
        path: a file of NAME=value lines, with quotes and comments as in a shell, but nothing is expanded; it need not
            be there.

    Returns:
        both.

    Raises:
        SettingsError: the file cannot be read, or a line of it is no setting; values are not shown.
    """
    if not path.exists():
        return dict(env)
    found = {}
    try:
        with path.open(encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    for name, value, original, damaged in bindings:
        if name is None and not damaged:  # a comment, or nothing
            continue
        before = original.string[: len(original.string) - len(original.string.lstrip())]
        where = f"{path}, line {original.line + before.count(chr(10))}"
        if name is None or value is None:
            raise SettingsError(f"{where}: this is not NAME=value")
        if name not in NAMES and not name.startswith(PREFIXES):
            raise SettingsError(f"{where}: there is no setting {name}")
        found[name] = value
    return {**found, **env}


def read_settings(env: Mapping[str, str]) -> Settings:
    """Read the settings from a mapping such as os.environ.

    Args:
        env: values by name; a name that is absent takes its default, an empty value is refused.

    Returns:
        the settings.

    Raises:
        SettingsError: one of them cannot be used.
    """
    tail = choice(env, "KAFKA_TAIL", "0", "1") == "1"
    consumer, producer, admin = read_client_properties(env)
    recovery_dir = env.get("RECOVERY_DIR")
    if recovery_dir is not None and not (tail and recovery_dir.strip()):
        raise SettingsError(f"RECOVERY_DIR={recovery_dir!r} is for KAFKA_TAIL=1, and the path of a folder")
    if tail and recovery_dir is None and admin:
        raise SettingsError(
            "KAFKA_TAIL=1 needs RECOVERY_DIR with KAFKA_CLIENT_SECURITY_PROTOCOL: the engine keeps its recovery state "
            "in Kafka over plaintext only"
        )
    input_topic = topic_name(env, "KAFKA_INPUT_TOPIC", "ip_address_by_country")
    output_topic = topic_name(env, "KAFKA_OUTPUT_TOPIC", "ip_address_by_location")
    if input_topic == output_topic:
        raise SettingsError(f"KAFKA_OUTPUT_TOPIC={output_topic!r} is the input topic too; choose another one")
    addresses, process_id, workers_per_process = read_cluster(env)
    return Settings(
        brokers=host_ports("KAFKA_BROKERS", env.get("KAFKA_BROKERS", "localhost:9092").split(",")),
        input_topic=input_topic,
        output_topic=output_topic,
        tail=tail,
        recovery_dir=recovery_dir,
        epoch_seconds=read_epoch_seconds(env, len(addresses) * workers_per_process > 1),
        consumer=consumer,
        producer=producer,
        admin=admin,
        geoip_database=env.get("GEOIP_DATABASE"),
        ipapi_url=read_ipapi_url(env.get("IPAPI_URL", "https://ipapi.co")),
        ipapi_key=read_ipapi_key(env.get("IPAPI_KEY")),
        on_lookup_failed=choice(env, "ON_LOOKUP_FAILED", "mark", "stop"),
        cache_size=whole_number(env, "CACHE_SIZE", "100000", 0, 10_000_000),
        log_level=choice(env, "LOG_LEVEL", "INFO", "DEBUG", "WARNING", "ERROR"),
        metrics_port=read_metrics_port(env, len(addresses), process_id or 0),
        addresses=addresses,
        process_id=process_id,
        workers_per_process=workers_per_process,
    )


def choice(env: Mapping[str, str], name: str, default: str, *others: str) -> str:
    """Read one of several words."""
    value = env.get(name, default)
    if value not in (default, *others):
        raise SettingsError(f"{name}={value!r} is not one of {', '.join((default, *others))}")
    return value


def topic_name(env: Mapping[str, str], name: str, default: str) -> str:
    """Read the name of a topic; Kafka's own rule, org.apache.kafka.common.internals.Topic."""
    value = env.get(name, default)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", value) or value in (".", ".."):
        raise SettingsError(f"{name}={value!r} is not a topic's name (1 to 249 of A-Z a-z 0-9 . _ -)")
    return value


def whole_number(env: Mapping[str, str], name: str, default: str, low: int, high: int) -> int:
    """Read a whole number from low to high."""
    value = env.get(name, default)
    if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
        raise SettingsError(f"{name}={value!r} is not a whole number from {low} to {high}")
    return int(value)


def read_epoch_seconds(env: Mapping[str, str], several_workers: bool) -> float:
    """Read the length of an epoch.

    One costs about 18 ms, so that below 0.1 s the dataflow does little else. Each of several workers ends its epochs by
    a clock of its own, and reads only while no other one is an epoch behind it (bytewax 0.15.1,
    src/execution/epoch/periodic_epoch.rs). One worker that is held up for longer than an epoch, by a start or a slow
    look-up, would make the others read nothing from then on; so several have longer epochs.
    """
    default, low = ("10", 5) if several_workers else ("1", 0.1)
    value = env.get("EPOCH_SECONDS", default)
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", value) or not low <= float(value) <= 3600:
        workers = "several workers" if several_workers else "one worker"
        raise SettingsError(f"EPOCH_SECONDS={value!r} is not a number from {low} to 3600, as {workers} can have it")
    return float(value)


def read_metrics_port(env: Mapping[str, str], processes: int, process_id: int) -> int | None:
    """Read the port of this process: those of a cluster on one host need one each, but a pod is a host of its own."""
    if "METRICS_PORT" not in env:
        return None
    port = whole_number(env, "METRICS_PORT", "", 1, 65_535)
    if "BYTEWAX_POD_NAME" in env:
        return port
    if port + processes - 1 > 65_535:
        raise SettingsError(f"METRICS_PORT={port} is too high: {processes} processes have as many ports from there on")
    return port + process_id


def host_ports(name: str, values: list[str]) -> list[str]:
    """Check that each value is host:port, with an IPv6 address in brackets."""
    for value in values:
        match = re.fullmatch(r"\s*(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})\s*", value)
        if not match or not 1 <= int(match[1]) <= 65535:
            raise SettingsError(f"{name}: {value!r} is not host:port")
    return [value.strip() for value in values]


def read_ipapi_url(value: str) -> str:
    """Read the HTTP API's base; a password in it would end up in the log, so it is refused and not shown."""
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if "@" in value:
        raise SettingsError("IPAPI_URL holds a user name or a password; the API takes its key from IPAPI_KEY")
    if "?" in value or "#" in value:
        raise SettingsError("IPAPI_URL holds a query; the API takes its key from IPAPI_KEY")
    if not usable or not re.fullmatch(r"[!-~]+", value):
        raise SettingsError(f"IPAPI_URL={value!r} is not http://host[:port][/path] or https://…")
    return value.rstrip("/")


def read_ipapi_key(value: str | None) -> str | None:
    """Read the HTTP API's key; a wrong one is not shown."""
    if value is not None and not re.fullmatch(r"[!-~]+", value):
        raise SettingsError("IPAPI_KEY is empty or holds characters that no key has; unset it to go without")
    return value


# librdkafka's properties (its CONFIGURATION.md, version 1.8.2, which is inside the engine) that can be chosen.
CLIENT_PROPERTIES = """
    api.version.fallback.ms api.version.request api.version.request.timeout.ms broker.address.family broker.address.ttl
    broker.version.fallback client.id client.rack connections.max.idle.ms debug enable.ssl.certificate.verification
    log.connection.close max.in.flight message.copy.max.bytes metadata.max.age.ms receive.message.max.bytes
    reconnect.backoff.max.ms reconnect.backoff.ms request.timeout.ms sasl.mechanism sasl.password sasl.username
    security.protocol socket.keepalive.enable socket.max.fails socket.nagle.disable socket.receive.buffer.bytes
    socket.send.buffer.bytes socket.timeout.ms ssl.ca.location ssl.certificate.location ssl.cipher.suites
    ssl.crl.location ssl.curves.list ssl.endpoint.identification.algorithm ssl.key.location ssl.key.password
    ssl.sigalgs.list topic.metadata.refresh.interval.ms topic.metadata.refresh.sparse
""".split()
CONSUMER_PROPERTIES = """
    check.crcs fetch.error.backoff.ms fetch.max.bytes fetch.message.max.bytes fetch.min.bytes fetch.wait.max.ms group.id
    isolation.level max.partition.fetch.bytes queued.max.messages.kbytes queued.min.messages
""".split()
PRODUCER_PROPERTIES = """
    batch.num.messages batch.size compression.codec compression.level compression.type linger.ms
    queue.buffering.backpressure.threshold queue.buffering.max.kbytes queue.buffering.max.messages
    queue.buffering.max.ms retry.backoff.ms sticky.partitioning.linger.ms
""".split()

CONSUMER = {
    # Where records expire before they are read, go on with those that are left: the default skips them all.
    "auto.offset.reset": "earliest",
}
PRODUCER = {
    # A record that the broker refuses has to stop the dataflow: the default drops it without a word.
    "acks": "all",
    "enable.idempotence": "true",
    "enable.gapless.guarantee": "true",
    "message.timeout.ms": "0",
    # Which record is too large is for the broker to say; above this setting the engine would panic.
    "message.max.bytes": "1000000000",
    # A full queue is a panic as well.
    "queue.buffering.max.messages": "1000000",
    # As Java and kafka-python choose partitions: a key has the same one in two topics of the same size.
    "partitioner": "murmur2_random",
}
# What the checks before the start need to know, in the words of kafka-python.
ADMIN_PROPERTIES = {
    "security.protocol": "security_protocol",
    "sasl.mechanism": "sasl_mechanism",
    "sasl.username": "sasl_plain_username",
    "sasl.password": "sasl_plain_password",
    "ssl.ca.location": "ssl_cafile",
    "ssl.certificate.location": "ssl_certfile",
    "ssl.key.location": "ssl_keyfile",
    "ssl.key.password": "ssl_password",
}


def read_client_properties(env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], dict[str, str | bool]]:
    """Read KAFKA_CLIENT_*, KAFKA_CONSUMER_* and KAFKA_PRODUCER_*: KAFKA_CLIENT_SASL_MECHANISM is sasl.mechanism.

    Args:
        env: where they are.

    Returns:
        librdkafka's properties for the input and for the output, and kafka-python's for the checks, which are empty
        for brokers that ask for no security.

    Raises:
        SettingsError: there is no such property, or choosing it could lose records; values are not shown.
    """
    client, consumer, producer = (
        chosen_properties(env, prefix, allowed)
        for prefix, allowed in zip(PREFIXES, (CLIENT_PROPERTIES, CONSUMER_PROPERTIES, PRODUCER_PROPERTIES), strict=True)
    )
    protocol = client.get("security.protocol", "PLAINTEXT").upper()
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise SettingsError(f"KAFKA_CLIENT_SECURITY_PROTOCOL={protocol!r} is not SSL, SASL_SSL or SASL_PLAINTEXT")
    for kind, has in (("sasl", protocol.startswith("SASL")), ("ssl", protocol.endswith("SSL"))):
        if not has and any(name.startswith(f"{kind}.") for name in client):
            raise SettingsError(f"KAFKA_CLIENT_{kind.upper()}_* needs KAFKA_CLIENT_SECURITY_PROTOCOL, not {protocol}")
    mechanism = client.get("sasl.mechanism", "")
    if protocol.startswith("SASL") and mechanism not in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        raise SettingsError(f"KAFKA_CLIENT_SASL_MECHANISM={mechanism!r} is not PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512")
    admin: dict[str, str | bool] = {}
    if protocol != "PLAINTEXT":
        client.setdefault("ssl.endpoint.identification.algorithm", "https")  # librdkafka 1.8.2 trusts any host
        admin = {ADMIN_PROPERTIES[name]: value for name, value in client.items() if name in ADMIN_PROPERTIES}
        admin["security_protocol"] = protocol
        admin["ssl_check_hostname"] = client["ssl.endpoint.identification.algorithm"] == "https"
    return {**client, **consumer, **CONSUMER}, {**PRODUCER, **client, **producer}, admin


def chosen_properties(env: Mapping[str, str], prefix: str, allowed: list[str]) -> dict[str, str]:
    """Read the properties of one prefix; their values are never shown, one may be a password in the wrong place."""
    properties = {name: name[len(prefix) :].lower().replace("_", ".") for name in env if name.startswith(prefix)}
    for name, librdkafka_name in properties.items():
        if librdkafka_name not in allowed:
            raise SettingsError(
                f"{name}: {librdkafka_name} is no property of librdkafka 1.8.2, or not one to be chosen here "
                "(it belongs to another prefix, or other values of it could lose records)"
            )
    return {librdkafka_name: env[name] for name, librdkafka_name in properties.items()}


def read_cluster(env: Mapping[str, str]) -> tuple[list[str], int | None, int]:
    """Read PROCESSES, or the BYTEWAX_* variables as bytewax.parse.proc_env does.

    Args:
        env: where nothing in it tells of a cluster, this is the only process.

    Returns:
        the addresses of all processes, with port 0 where they are still to be chosen; the index of this one among them,
        None where all of them are to be started here; and the number of worker threads of each.

    Raises:
        SettingsError: one is missing, contradicts another or cannot be read.
    """
    if "PROCESSES" in env:
        processes = whole_number(env, "PROCESSES", "1", 1, 100)
        if others := [name for name in NAMES if name.startswith("BYTEWAX_") and name in env]:
            raise SettingsError(f"PROCESSES={processes} starts all processes here; with it {others[0]} cannot be set")
        if processes > 1:
            return ["localhost:0"] * processes, None, 1
    workers = whole_number(env, "BYTEWAX_WORKERS_PER_PROCESS", "1", 1, 1000)
    where = [name for name in ("BYTEWAX_ADDRESSES", "BYTEWAX_HOSTFILE_PATH") if name in env]
    which = [name for name in ("BYTEWAX_PROCESS_ID", "BYTEWAX_POD_NAME") if name in env]
    if not where and not which:
        return ["localhost:2101"], 0, workers
    if len(where) != 1 or len(which) != 1:
        raise SettingsError(
            f"{' and '.join(where + which)} set: a process of a cluster needs either BYTEWAX_ADDRESSES or "
            "BYTEWAX_HOSTFILE_PATH, and either BYTEWAX_PROCESS_ID or BYTEWAX_POD_NAME"
        )
    try:
        cluster = proc_env({**env, "BYTEWAX_WORKERS_PER_PROCESS": str(workers)})
    except KeyError:
        raise SettingsError("BYTEWAX_STATEFULSET_NAME is not set, and BYTEWAX_POD_NAME is") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"BYTEWAX_HOSTFILE_PATH={env[where[0]]!r} cannot be read: {error}") from None
    except ValueError:
        raise SettingsError(f"{which[0]}={env[which[0]]!r} holds no number of a process") from None
    addresses, process_id = host_ports(where[0], cluster["addresses"]), cluster["proc_id"]
    if len(set(addresses)) < len(addresses):
        raise SettingsError(f"{where[0]}={env[where[0]]!r} names an address twice")
    if not 0 <= process_id < len(addresses):
        raise SettingsError(f"{which[0]}={env[which[0]]!r}: {where[0]} has processes 0 to {len(addresses) - 1} only")
    return addresses, process_id, workers


# --- Locators: an address in, a Location out or one of the errors of the record contract ----------------------


class NotLocated(Exception):
    """An address has no location; `error` is what its record says instead."""

    error: str


class InvalidIp(NotLocated):
    """Not an IPv4 or IPv6 address."""

    error = "invalid_ip"


class ReservedIp(NotLocated):
    """An address that nobody has on the public Internet."""

    error = "reserved_ip"


class NotFound(NotLocated):
    """The source does not know where the address is."""

    error = "not_found"


class LookupFailed(NotLocated):
    """The source could not be asked; another time it may know."""

    error = "lookup_failed"


class Location(TypedDict):
    """Where an address is, in English; None where the source does not know. Output records have it as it is here."""

    city: str | None
    region: str | None
    country_name: str | None


Locator = Callable[[str], Location]
LONGEST_ADDRESS = 64  # characters: 45 of an IPv6 address at most, and the name of a zone


def public_address(text: str) -> str:
    """Bring an address into the one form in which every source is asked.

    Args:
        text: an IPv4 or IPv6 address. One that wraps an IPv4 address (::ffff:8.8.8.8) counts as that, and a zone
            (fe80::1%eth0) does not count: it says where a packet leaves, not where the address is.

    Returns:
        the address in its shortest form.

    Raises:
        InvalidIp: the text is no address. Host names, ports and short forms such as 8.8 are none, although the
            C reader of maxminddb would take the last (and 010.8.8.8, and 134744072) for one.
        ReservedIp: the address is private, loopback, link-local, for documentation, multicast or the like, by the
            IANA registries as Python's ipaddress has them.
    """
    if len(text) > LONGEST_ADDRESS:
        raise InvalidIp
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidIp from None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.IPv6Address(int(address))
    if not address.is_global or address.is_multicast or address.is_reserved or getattr(address, "is_site_local", False):
        raise ReservedIp
    return str(address)


# Where IANA's special-purpose blocks of IPv4 are: by the first byte of an address, or by the first two.
SPECIAL_BYTES = frozenset({0, 10, 100, 127, 169, 172, 192, 198, 203, *range(224, 256)})
PUBLIC_PAIRS = frozenset(
    bytes((first, second)) for first in (100, 169, 172, 192, 198, 203) for second in range(256)
) - frozenset(
    [
        *(bytes((100, second)) for second in range(64, 128)),
        *(bytes((172, second)) for second in range(16, 32)),
        *(bytes((192, second)) for second in (0, 31, 52, 88, 168, 175)),
        *(bytes(pair) for pair in ((169, 254), (198, 18), (198, 19), (198, 51), (203, 0))),
    ]
)


def is_plainly_public(text: str) -> bool:
    """Tell nearly all public IPv4 addresses from others, for a fraction of what public_address takes."""
    try:
        address = socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError):
        return False
    return address[0] not in SPECIAL_BYTES or address[:2] in PUBLIC_PAIRS


def name_in(field: object) -> str | None:
    """Read a name as MaxMind nests it, {"names": {"en": name}}, or as it stands in flat records."""
    if isinstance(field, dict):
        names = field.get("names")
        field = names.get("en") if isinstance(names, dict) else None
    return field.strip() or None if isinstance(field, str) else None


def location_in(record: object) -> Location:
    """Read a location out of a City database's record or the HTTP API's reply, whatever they call it.

    Args:
        record: MaxMind's schema (GeoLite2-City, GeoIP2-City, DB-IP City), a flat one (IPinfo, ip-location-db) or
            what ipapi.co replies.

    Returns:
        the location.

    Raises:
        NotFound: the record names no city, region or country.
    """
    if not isinstance(record, dict):
        raise NotFound
    read = record.get
    subdivisions = read("subdivisions")
    nested = subdivisions[0] if isinstance(subdivisions, list) and subdivisions else None
    city = name_in(read("city"))
    region = name_in(nested or read("region") or read("state1"))
    country_name = name_in(read("country_name") or read("country") or read("country_code"))
    if not (city or region or country_name):
        raise NotFound
    return {"city": city, "region": region, "country_name": country_name}


def open_database(path: str) -> Locator:
    """Open a City database and see that it holds cities, before the first record needs it.

    Args:
        path: an .mmdb file; it is mapped into memory, so processes on one machine share it.

    Returns:
        a locator that reads the database.

    Raises:
        SettingsError: there is no such file, or it is no database, or has no cities.
    """
    if not os.path.isfile(path):
        raise SettingsError(f"GEOIP_DATABASE={path!r}: there is no such file")
    try:
        reader = maxminddb.open_database(path, maxminddb.MODE_MMAP_EXT)
        records = [record for _, record in itertools.islice(reader, 10_000)]
        metadata = reader.metadata()
        built = datetime.fromtimestamp(metadata.build_epoch, timezone.utc)
    except (OSError, ValueError, OverflowError, maxminddb.InvalidDatabaseError) as error:
        raise SettingsError(f"GEOIP_DATABASE={path!r} cannot be read as a MaxMind database: {error}") from None
    if not any(isinstance(record, dict) and name_in(record.get("city")) for record in records):
        raise SettingsError(f"GEOIP_DATABASE={path!r} holds no cities: it has to be a City database")
    log.info("locating with %s, %s of %s", path, metadata.database_type, built.date())

    def locate(text: str) -> Location:
        if not is_plainly_public(text):
            text = public_address(text)
            if metadata.ip_version == 4 and ":" in text:
                raise NotFound
        try:
            return location_in(reader.get(text))
        except (ValueError, maxminddb.InvalidDatabaseError):  # the file is damaged at this record
            raise LookupFailed from None

    return locate


class Refused(LookupFailed):
    """The API wants no more requests for a while: a rate limit, or a key it does not accept."""

    def __init__(self, why: str, pause: float | None) -> None:
        """Keep for how many seconds the API asked to be left alone, None where it did not say."""
        super().__init__(why)
        self.pause = pause


class Reply(NamedTuple):
    """What the API, or a proxy or a firewall in front of it, replied."""

    status: int
    retry_after: str | None
    body: bytes


def read_reply(reply: Reply) -> Location:
    """Read a reply, its error before its fields: the API sends errors with status 200 too.

    Args:
        reply: of any kind.

    Returns:
        the location.

    Raises:
        NotLocated: the kind that the reply says, LookupFailed for one that is no answer about the address.
    """
    try:
        fields = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        fields = {}
    if reply.status == 200 and not fields.get("error") and fields.keys() >= Location.__required_keys__:
        return location_in(fields)
    reason = str(fields.get("reason")).casefold()
    if reason == "reserved ip address":
        raise ReservedIp
    if reason == "invalid ip address":
        raise InvalidIp
    if reply.status == 404 and "reason" in fields:  # any other page that is not there speaks of a wrong IPAPI_URL
        raise NotFound
    if reply.status in (401, 403, 429) or reason == "ratelimited":
        why = "rate limited" if reason == "ratelimited" else f"HTTP {reply.status}"
        raise Refused(why, seconds_in(reply.retry_after))
    raise LookupFailed(f"HTTP {reply.status} without a location")


def seconds_in(retry_after: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date (RFC 9110, 10.2.3); None where it says nothing usable."""
    try:
        if retry_after is None or re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
            return float(retry_after) if retry_after else None
        return (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return None


LARGEST_REPLY = 65_536  # bytes; a location takes about 800


class HttpApi:
    """The HTTP API of ipapi.co, asked for a bounded time and left alone when it asks for that.

    All worker threads share one, each with a session of its own.
    """

    TOTAL_SECONDS = 4.0  # for one address, retries included: a stop waits for it, and containers often give 10 s
    TRY_SECONDS = 1.5
    BACK_OFF_SECONDS = 0.2  # before the first retry, twice as long before each further one
    FAILURES_IN_A_ROW = 5
    PAUSE_SECONDS = 60.0
    LONGEST_PAUSE_SECONDS = 86_400.0

    def __init__(self, url: str, key: str | None) -> None:
        """Remember whom to ask.

        Args:
            url: the API's base, http or https.
            key: its key, or None to go without.
        """
        self._url = url
        self._params = {"key": key} if key else {}
        self._sessions: dict[int, Session] = {}  # by thread; see Tally
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._paused_until = 0.0  # on the clock of time.monotonic

    def locate(self, text: str) -> Location:
        """Ask the API where an address is.

        Args:
            text: the address; one that is not public is never sent.

        Returns:
            its location.

        Raises:
            NotLocated: what the API says of it, LookupFailed where it says nothing or is not asked.
        """
        address = public_address(text)
        if time.monotonic() < self._paused_until:
            raise LookupFailed
        try:
            location = self._ask(address)
        except LookupFailed as failure:
            self._note(failure)
            raise
        except NotLocated:
            self._failures = 0
            raise
        self._failures = 0
        return location

    def _note(self, failure: LookupFailed) -> None:
        """Count a failure, and pause where it was a refusal or one too many; only the first of a pause is logged."""
        with self._lock:
            self._failures += 1
            enough = isinstance(failure, Refused) or self._failures >= self.FAILURES_IN_A_ROW
            if not enough or time.monotonic() < self._paused_until:
                return
            wanted = failure.pause if isinstance(failure, Refused) else None
            pause = self.PAUSE_SECONDS if wanted is None else min(max(wanted, 1.0), self.LONGEST_PAUSE_SECONDS)
            self._paused_until = time.monotonic() + pause
        log.warning(
            "%s: %s; it is left alone for %d s, and records say lookup_failed meanwhile", self._url, failure, pause
        )

    def _ask(self, address: str) -> Location:
        """Ask until there is a reply, or no time for another try; only time-outs and 5xx are tried again."""
        deadline = time.monotonic() + self.TOTAL_SECONDS
        back_off = self.BACK_OFF_SECONDS
        while True:
            reply = self._try(address, min(self.TRY_SECONDS, deadline - time.monotonic()))
            if isinstance(reply, LookupFailed):
                raise reply
            if reply is not None and reply.status < 500:
                return read_reply(reply)
            if time.monotonic() + back_off >= deadline:
                raise LookupFailed("no reply in time" if reply is None else f"HTTP {reply.status}")
            time.sleep(back_off)
            back_off *= 2

    def _try(self, address: str, seconds: float) -> "Reply | LookupFailed | None":
        """Send one request, in a thread that can be left behind.

        Time-outs of sockets begin anew with every byte, and looking up a host's name has none, so only this bounds
        the time for certain.

        Args:
            address: asked for as it is.
            seconds: to wait.

        Returns:
            the reply; None where there is none in time; LookupFailed where there will be none.
        """
        session = self._sessions.get(get_ident())
        if session is None:
            session = self._sessions[get_ident()] = Session()
            session.headers["User-Agent"] = f"kafka_enrich {requests.utils.default_user_agent()}"
        replies: SimpleQueue[Reply | LookupFailed | None] = SimpleQueue()
        arguments = (session, f"{self._url}/{address}/json/", self._params, seconds, replies)
        threading.Thread(target=fetch, args=arguments, daemon=True).start()
        try:
            return replies.get(timeout=seconds)
        except Empty:
            del self._sessions[get_ident()]  # it is still in use
            return None


class Session(requests.Session):
    """A session for which a redirect is a reply like any other: following one could take any time and memory."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Find no target."""


def fetch(
    session: requests.Session,
    url: str,
    params: dict[str, str],
    seconds: float,
    replies: "SimpleQueue[Reply | LookupFailed | None]",
) -> None:
    """Send one request and put what comes of it into the queue.

    Errors of requests and urllib3 are not shown as they are: they quote the URL, and it holds the key.

    Args:
        session: used by no other thread meanwhile.
        url: without the query.
        params: the query.
        seconds: after which nobody waits any more.
        replies: gets the reply, None where it took too long, or LookupFailed.
    """
    give_up = time.monotonic() + seconds
    body = b""
    try:
        with session.get(url, params=params, timeout=seconds, stream=True) as response:
            while piece := response.raw.read1(LARGEST_REPLY, decode_content=True):
                body += piece
                if len(body) > LARGEST_REPLY or time.monotonic() > give_up:
                    raise requests.ConnectionError
            replies.put(Reply(response.status_code, response.headers.get("Retry-After"), body))
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        replies.put(None)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # requests' own errors are OSErrors
        replies.put(LookupFailed(str(error) if type(error) is OSError else type(error).__name__))


def open_locator(settings: Settings) -> Locator:
    """Open what the settings choose to locate with."""
    if settings.geoip_database is None:
        return HttpApi(settings.ipapi_url, settings.ipapi_key).locate
    return open_database(settings.geoip_database)


# --- Records: bytes in, bytes out -------------------------------------------------------------------------------

Record = tuple[bytes | None, bytes | None]
GetLocation = Callable[[Record], tuple[bytes | None, bytes]]
Answer = Callable[[bytes | None], tuple[bytes, int]]  # the output's value, and which of RESULTS it is
NOWHERE = Location(city=None, region=None, country_name=None)
LOCATED, INVALID_IP, RESERVED_IP, NOT_FOUND, LOOKUP_FAILED, NOT_CACHED = range(6)  # what is counted
RESULTS = ("located", "invalid_ip", "reserved_ip", "not_found", "lookup_failed")  # their names, and those in records


def new_tallies(workers: int) -> list[memoryview]:
    """Make counts for each worker, all 0, in memory that forked processes share."""
    size = len(RESULTS) + 1
    memory = memoryview(mmap.mmap(-1, 8 * size * workers)).cast("q")
    return [memory[size * worker :][:size] for worker in range(workers)]


class Tally(dict[int, memoryview]):
    """Counts for each worker thread: Python does not promise that a shared one loses none.

    The key is threading.get_ident(). threading.local would not do: to that, the engine's threads are new ones each time
    they take the GIL.
    """

    def __init__(self, free: Iterator[memoryview]) -> None:
        """Remember where threads find counts that no other one has."""
        super().__init__()
        self._free = free
        self.remembered: Callable[[], int] = lambda: 0  # how many answers the cache holds

    def __missing__(self, thread: int) -> memoryview:
        """Take counts for a thread."""
        counts = self[thread] = next(self._free)
        return counts


def add_up(tallies: list[memoryview]) -> list[int]:
    """Add up what all workers have counted."""
    return [sum(column) for column in zip(*tallies, strict=True)]


def text_of(value: bytes) -> str:
    """Decode a value; what is no UTF-8 becomes U+FFFD, which no address holds."""
    return value.decode("utf-8", "replace").strip()


def to_json(ip: str | None, location: Location, error: str | None = None) -> bytes:
    """Write the value of an output record; cut to the length of an address, it stays small whatever came in."""
    record = {"ip": ip and ip[:LONGEST_ADDRESS], **location}
    # orjson leaves a kilobyte or more around its result; a copy takes only what it needs in the cache.
    return b"%b" % orjson.dumps(record if error is None else {**record, "error": error})


class LookupStopped(Exception):
    """A look-up failed, and ON_LOOKUP_FAILED says to stop then."""


def make_get_location(
    locate: Locator, cache_size: int, on_lookup_failed: str, tally: Tally, one_at_a_time: bool = False
) -> GetLocation:
    """Make the function that turns each record of the input topic into one of the output topic.

    Args:
        locate: where locations come from.
        cache_size: how many final answers to remember, 0 or more; the least recently used goes first.
        on_lookup_failed: mark or stop.
        tally: where the results are counted.
        one_at_a_time: let threads that ask for one address at once wait for the first, and take its answer from the
            cache; it costs each record more than a look-up in a database does.

    Returns:
        get_location: (key, value) in; the same key and JSON by the record contract out, for any bytes or None. With
        "stop" it raises LookupStopped at a failed look-up.
    """

    def look_up(value: bytes | None) -> tuple[bytes, int]:
        tally[get_ident()][NOT_CACHED] += 1
        if value is None:
            return to_json(None, NOWHERE, InvalidIp.error), INVALID_IP
        text = text_of(value)
        try:
            return to_json(text, locate(text)), LOCATED
        except LookupFailed:
            raise  # not final: an exception is not cached, so the next record with this address asks again
        except NotLocated as not_located:
            return to_json(text, NOWHERE, not_located.error), RESULTS.index(not_located.error)

    cached = functools.lru_cache(cache_size)(look_up)
    tally.remembered = lambda: cached.cache_info().currsize
    answer: Answer = wait_for_others(cached) if one_at_a_time else cached

    def get_location(record: Record) -> tuple[bytes | None, bytes]:
        key, value = record
        try:
            # No address is longer than that; what is would fill the memory if the cache kept it.
            output, result = answer(value) if value is None or len(value) <= 2 * LONGEST_ADDRESS else look_up(value)
        except LookupFailed as failed:
            text = text_of(value or b"")
            if on_lookup_failed == "stop":
                raise LookupStopped(text) from None
            output, result = to_json(text, NOWHERE, failed.error), LOOKUP_FAILED
        tally[get_ident()][result] += 1
        return key, output

    return get_location


def wait_for_others(answer: Answer) -> Answer:
    """Let threads that ask for the same value at once wait for the first one of them."""
    asking: dict[bytes | None, threading.Lock] = {}

    def ask(value: bytes | None) -> tuple[bytes, int]:
        with asking.setdefault(value, threading.Lock()):
            try:
                return answer(value)
            finally:
                asking.pop(value, None)

    return ask


# --- Kafka: what has to be so before the dataflow starts, and after it has ended --------------------------------


class RunError(Exception):
    """Kafka or the dataflow failed; the message says what to do."""


DISCONNECTED = "it closes the connection, as brokers do for a wrong password or security protocol (KAFKA_CLIENT_*)"
KAFKA_LOG = BufferingHandler(1_000)  # kafka-python logs why there is no connection; its exception does not tell


def why_no_connection(logged: list[str], error: Exception) -> str:
    """Choose from what kafka-python has logged of its attempts what tells most; its exception, if that is all."""
    attempts = [reason for reason in logged if "onnection" in reason or "disconnected" in reason] or [str(error)]
    # A broker that refuses a password closes the connection too, and sometimes only that is noticed. A time-out tells
    # least: the last attempt has no more time than the others have left.
    most = min(attempts, key=lambda reason: 1 if "disconnected" in reason else 2 if "timed out" in reason else 0)
    return DISCONNECTED if "disconnected" in most else " ".join(most.split())


@contextmanager
def kafka_admin(settings: Settings) -> Iterator[KafkaAdminClient]:
    """Connect to Kafka for some questions; what goes wrong meanwhile becomes a RunError."""
    KAFKA_LOG.flush()
    try:
        with KafkaAdminClient(
            bootstrap_servers=settings.brokers, bootstrap_timeout_ms=5_000, request_timeout_ms=10_000, **settings.admin
        ) as admin:
            yield admin
    except (KafkaError, OSError) as error:
        reason = why_no_connection([record.getMessage() for record in KAFKA_LOG.buffer], error)
        raise RunError(f"Kafka at {','.join(settings.brokers)} (KAFKA_BROKERS) cannot be used: {reason}") from None


def describe(admin: KafkaAdminClient, topic: str, operation: str) -> list[dict[str, Any]]:
    """List the partitions of a topic that has to be there and be open to an operation; asking does not create it."""
    [found] = admin.describe_topics([topic])
    if found["error_code"] == UnknownTopicOrPartitionError.errno:
        raise RunError(f"topic {topic!r} does not exist; create it, or run: python load_data.py")
    if found["error_code"]:
        raise RunError(f"topic {topic!r} cannot be used: {for_code(found['error_code']).__name__}")
    if operation not in (found.get("authorized_operations") or [operation]):
        raise RunError(f"topic {topic!r} may not be used: the user in KAFKA_CLIENT_* has no permission to {operation}")
    partitions: list[dict[str, Any]] = found["partitions"]
    return partitions


def offsets_of(
    admin: KafkaAdminClient, partitions: list[TopicPartition], which: OffsetSpec
) -> dict[TopicPartition, int]:
    """Look up the earliest or the latest offset of each partition, which a new topic's leaders may not know yet."""
    give_up = time.monotonic() + 10
    while True:
        try:
            found = admin.list_partition_offsets(dict.fromkeys(partitions, which))
            return {partition: found[partition].offset for partition in partitions}
        except (UnknownTopicOrPartitionError, LeaderNotAvailableError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def end_offsets(admin: KafkaAdminClient, topic: str) -> int:
    """Add up the end offsets of a topic's partitions: each record written to it moves the sum by one."""
    partitions = [TopicPartition(topic, partition["partition_index"]) for partition in describe(admin, topic, "WRITE")]
    return sum(offsets_of(admin, partitions, OffsetSpec.LATEST).values())


def check_topics(settings: Settings) -> int:
    """See that the dataflow can run; the engine itself would panic, hang, or create a topic of its own.

    Args:
        settings: the brokers, the topics and the number of workers.

    Returns:
        the end offsets of the output topic, added up.

    Raises:
        RunError: no broker answers, a topic is missing or closed, or a worker would have no partition to read.
    """
    with kafka_admin(settings) as admin:
        partitions = describe(admin, settings.input_topic, "READ")
        version = admin.get_broker_version_data(partitions[0]["leader_id"]).broker_version
        if version >= (4, 0) and "SCRAM" in str(settings.admin.get("sasl_mechanism")):
            raise RunError(
                "SCRAM works with Kafka 3.9 and older only: the engine's librdkafka 1.8.2 sends a nonce that Kafka 4 "
                "refuses (librdkafka#4895); use KAFKA_CLIENT_SASL_MECHANISM=PLAIN over SASL_SSL, or client certificates"
            )
        if settings.workers > len(partitions):
            raise RunError(
                f"{settings.workers} workers are too many for topic {settings.input_topic!r} with its "
                f"{len(partitions)} partitions: every worker reads at least one"
            )
        if settings.tail and settings.recovery_dir is None:
            create_recovery_topics(admin, settings)
            if settings.process_id in (0, None):  # the others' engines wait for this one's
                forget_old_executions(admin, settings)
        return end_offsets(admin, settings.output_topic)


def create_recovery_topics(admin: KafkaAdminClient, settings: Settings) -> None:
    """Create the topics of the recovery state before the engine does, as safe as the output, and so that they last.

    The engine would have both compacted. The last record of a key is enough for the state, but not for the progress:
    there the first and the later ones of a run share a key, and without the first the engine panics at every start.

    Args:
        admin: connected.
        settings: the topics and the number of workers.
    """
    replicas = len(describe(admin, settings.output_topic, "WRITE")[0]["replica_nodes"])
    state = {"cleanup.policy": "compact", "segment.ms": "3600000", "delete.retention.ms": "3600000"}
    progress = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    for topic, configs in (("state", state), ("progress", progress)):
        wanted = {"num_partitions": settings.workers, "replication_factor": replicas, "configs": configs}
        with suppress(TopicAlreadyExistsError):
            admin.create_topics({f"{settings.recovery_name}-{topic}": wanted}, wait_for_metadata=True)


def forget_old_executions(admin: KafkaAdminClient, settings: Settings) -> None:
    """Delete the progress of all executions but the last, before the engine reads it.

    Each worker reads a partition of it and tells the others, in no order between them. Where one hears of an older
    execution after a newer one the engine panics, and does so again at every start. A record's key begins with the
    number of its execution (bytewax 0.15.1, src/recovery/model/progress.rs), which never falls within a partition.

    Args:
        admin: connected.
        settings: the brokers and the recovery state's name.

    Raises:
        RunError: the progress cannot be read.
    """
    partitions = [TopicPartition(f"{settings.recovery_name}-progress", worker) for worker in range(settings.workers)]
    begins = offsets_of(admin, partitions, OffsetSpec.EARLIEST)
    ends = offsets_of(admin, partitions, OffsetSpec.LATEST)
    written = [partition for partition in partitions if begins[partition] < ends[partition]]
    if not written:
        return
    consumer = KafkaConsumer(bootstrap_servers=settings.brokers, enable_auto_commit=False, **settings.admin)

    def execution_at(partition: TopicPartition, offset: int) -> int:
        consumer.assign([partition])
        consumer.seek(partition, offset)
        for records in consumer.poll(timeout_ms=10_000, max_records=1).values():
            return int.from_bytes(records[0].key[:8], "little")
        raise RunError(f"offset {offset} of {partition} cannot be read; start again")

    try:
        last = max(execution_at(partition, ends[partition] - 1) for partition in written)
        for partition in written:
            offsets = range(begins[partition], ends[partition])
            older = bisect.bisect_left(offsets, last, key=functools.partial(execution_at, partition))
            if older:
                admin.delete_records({partition: begins[partition] + older})
    finally:
        consumer.close()


def count_missing(settings: Settings, end_before: int, handed_over: int, seconds: float) -> int:
    """Count the records that the engine took for the output topic and that did not get there.

    At its end the engine gives its queue five seconds and ignores what is left, so only the topic itself can tell.

    Args:
        settings: the brokers and the output topic.
        end_before: what check_topics returned.
        handed_over: how many records have been enriched since.
        seconds: how long to wait for those still under way, 0 or more.

    Returns:
        how many are missing; what others write to the topic meanwhile hides as many.

    Raises:
        RunError: no broker answers.
    """
    give_up = time.monotonic() + seconds
    with kafka_admin(settings) as admin:
        while True:
            missing = handed_over - (end_offsets(admin, settings.output_topic) - end_before)
            if missing <= 0 or time.monotonic() > give_up:
                return max(missing, 0)
            time.sleep(0.1)


# --- Metrics: what Prometheus and supervisors see -------------------------------------------------------------

LOOKUP_BUCKETS = (5e-6, 1e-5, 2.5e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4)  # seconds: a database, an API


class Metrics(Collector):
    """What one process has counted, put together when Prometheus asks: records pay nothing for it."""

    def __init__(self, tally: Tally, database: str | None) -> None:
        """Remember what does not change.

        Args:
            tally: of the process.
            database: the path of its City database, if it has one.
        """
        self._tally = tally
        self._seen = 0
        self._hits = 0
        self._last_record = time.monotonic()  # or the start, where none has come
        self._built: int | None = None
        if database:
            with maxminddb.open_database(database) as reader:
                self._built = reader.metadata().build_epoch
        self._build = {
            "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
            "bytewax": importlib.metadata.version("bytewax"),
            "python": platform.python_version(),
        }

    def _counts(self) -> list[int]:
        return add_up(list(self._tally.values())) or [0] * (len(RESULTS) + 1)

    def look(self) -> None:
        """See whether a record has come since the last look."""
        records = count_records(self._counts())
        if records > self._seen:
            self._seen, self._last_record = records, time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """Put the metrics together."""
        counts = self._counts()
        self.look()
        records = CounterMetricFamily(
            "kafka_enrich_records", "Records read and handed to the output: each one in is one out.", labels=["result"]
        )
        for result, count in zip(RESULTS, counts, strict=False):
            records.add_metric([result], count)
        yield records
        # A look-up is counted before its result; a counter that goes down would look like a new start.
        self._hits = max(self._hits, count_records(counts) - counts[NOT_CACHED])
        yield CounterMetricFamily("kafka_enrich_cache_hits", "Records answered from the cache.", self._hits)
        yield GaugeMetricFamily("kafka_enrich_cache_entries", "Answers in the cache.", self._tally.remembered())
        since = time.monotonic() - self._last_record
        yield GaugeMetricFamily(
            "kafka_enrich_seconds_since_last_record", "Seconds since a record came, or since the start.", since
        )
        if self._built is not None:
            age = time.time() - self._built
            yield GaugeMetricFamily("kafka_enrich_database_age_seconds", "Age of the City database.", age)
        yield InfoMetricFamily("kafka_enrich_build", "What is running; script is its SHA-256.", self._build)


@contextmanager
def metrics_served(settings: Settings, locate: Locator, tally: Tally) -> Iterator[Locator]:
    """Serve /metrics and /healthz while the block runs, where the settings name a port for them.

    Args:
        settings: of this process.
        locate: what its look-ups go to.
        tally: its counts.

    Yields:
        the locator to use, which takes the time where somebody may ask for it.

    Raises:
        SettingsError: the port is in use.
    """
    if settings.metrics_port is None:
        yield locate
        return
    registry, metrics, ended = CollectorRegistry(), Metrics(tally, settings.geoip_database), threading.Event()
    registry.register(metrics)
    ProcessCollector(registry=registry)
    lookups = Histogram(
        "kafka_enrich_lookup_seconds",
        "Seconds that looking up an address took that was not in the cache; one in a hundred, with a City database.",
        buckets=LOOKUP_BUCKETS,
        registry=registry,
    )
    # Taking the time costs about as much as asking a database; of an API's answers it costs nothing.
    turns = itertools.cycle([True] if settings.geoip_database is None else [True, *[False] * 99])
    try:
        server, _ = start_http_server(settings.metrics_port, registry=registry)
    except OSError as error:
        raise SettingsError(f"METRICS_PORT: port {settings.metrics_port} cannot be used: {error}") from None
    metrics_app: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

    def respond(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if request["PATH_INFO"] == "/healthz":
            start("200 OK", [("Content-Type", "text/plain")])
            return [b"the dataflow runs\n"]
        return metrics_app(request, start)

    def timed(text: str) -> Location:
        if not next(turns):
            return locate(text)
        with lookups.time():
            return locate(text)

    def look() -> None:
        while not ended.wait(1):
            metrics.look()

    server.set_app(respond)
    threading.Thread(target=look, daemon=True).start()
    try:
        yield timed
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


# --- The processes: one or many run the dataflow, and tell what became of it -----------------------------------


class Died(Exception):
    """The engine gave up; the message says why, as far as that is known."""


def run_process(settings: Settings, get_location: GetLocation) -> None:
    """Run one process of the cluster, and say why where it ends before its time.

    Args:
        settings: with a process_id.
        get_location: what the records go through.

    Raises:
        Died: the engine gave up.
        RunError: a look-up failed, and ON_LOOKUP_FAILED is stop.
        SystemExit: a signal came.
    """
    raised: list[BaseException] = []

    def keep(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        raised.append(error)
        if kind is not LookupStopped:  # that one is no accident, and is told below
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = keep  # the engine prints through this what get_location raises
    let_threads_take_turns()
    try:
        run_dataflow(settings, get_location)
    except (RuntimeError, ValueError) as error:
        if raised and isinstance(raised[0], LookupStopped):
            raise RunError(
                f"the look-up of {raised[0]} failed, and ON_LOOKUP_FAILED is stop; a new start tries again"
            ) from None
        raise Died(repr(raised[0]) if raised else str(error)) from None


def let_threads_take_turns() -> None:
    """Let the threads that are started from now on wait for a free core and interrupt none: Linux calls that a batch.

    librdkafka wakes its broker's thread for nearly each record. On a busy core that one would interrupt the worker each
    time, and find one record; so it finds several. It takes a tenth to a third off what a record costs there.
    """
    with suppress(AttributeError, OSError):  # not Linux, or a sandbox forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def run_processes(
    settings: Settings, run: Callable[[Settings, Iterator[memoryview]], None], tallies: list[memoryview]
) -> None:
    """Run all processes of the cluster on this machine; they end with the first that fails, and with this one.

    They are forked, so they share the counts and what has been loaded. (The engine's own spawn_cluster waits for ever
    when one of them dies.)

    Args:
        settings: with addresses whose ports are still to be chosen.
        run: runs a process with its settings, and with counts for its workers.
        tallies: counts for all of them.

    Raises:
        Died: one of them did.
        SettingsError: one of them cannot use a setting.
        SystemExit: a signal came.
    """
    with ExitStack() as free_ports:
        sockets = [free_ports.enter_context(socket.create_server(("localhost", 0))) for _ in settings.addresses]
        addresses = [f"localhost:{taken.getsockname()[1]}" for taken in sockets]
    parent_lives, parent = os.pipe()
    processes: dict[int, int] = {}
    try:
        for process_id in range(len(addresses)):
            pid = os.fork()
            if pid == 0:
                os.close(parent)
                end_with_parent(parent_lives)
                port = settings.metrics_port and settings.metrics_port + process_id
                process = replace(settings, addresses=addresses, process_id=process_id, metrics_port=port)
                its_run = functools.partial(run, process, iter(tallies[process_id:]))
                try:
                    os._exit(exit_code_of(its_run, settings.tail, tallies))
                except BaseException:  # whatever it is: the code that follows is for the parent only
                    log.exception("process %d of %d", process_id, len(addresses))
                    os._exit(1)
            processes[pid] = process_id
        while processes:
            pid, status = os.wait()
            if pid not in processes:  # a stranger's child: in a container this may be process 1
                continue
            process_id = processes.pop(pid)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
                raise SettingsError(f"process {process_id} of {len(addresses)} cannot use a setting, see above")
            if status:
                raise Died(f"process {process_id} of {len(addresses)} {how_it_ended(status)}")
    except SystemExit:
        for pid in processes:
            os.kill(pid, signal.SIGTERM)
        while processes:
            processes.pop(os.wait()[0], None)
        raise
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(parent)
        os.close(parent_lives)


def end_with_parent(parent_lives: int) -> None:
    """End this process when the other end of a pipe is closed, as the kernel does when the parent is killed."""

    def wait() -> None:
        os.read(parent_lives, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def how_it_ended(status: int) -> str:
    """Say what os.wait tells of a process that has failed."""
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def enrich(settings: Settings, tallies: list[memoryview]) -> None:
    """Enrich what the input topic holds, and with settings.tail what arrives there, until a signal comes.

    Args:
        settings: all of them.
        tallies: counts for each worker that is started here.

    Raises:
        SettingsError: the City database or the folder for recovery cannot be used.
        RunError: Kafka or the dataflow failed, or not every record reached the output topic.
        SystemExit: a signal ended a pass.
    """
    log.info("%s", settings)
    if os.environ.pop("BYTEWAX_DATAFLOW_API_ENABLED", None):
        log.info("BYTEWAX_DATAFLOW_API_ENABLED is ignored: the engine would serve its settings, with passwords, to all")
    locate = open_locator(settings)
    end_before = check_topics(settings)

    def missing(seconds: float) -> int:
        return count_missing(settings, end_before, count_records(add_up(tallies)), seconds)

    def run(process: Settings, free: Iterator[memoryview]) -> None:
        tally = Tally(free)
        wait = settings.geoip_database is None
        with metrics_served(process, locate, tally) as its_locate:
            get_location = make_get_location(its_locate, settings.cache_size, settings.on_lookup_failed, tally, wait)
            run_process(process, get_location)

    ended = threading.Event()
    threading.Thread(target=report, args=(ended, tallies, missing), daemon=True).start()
    died = None
    try:
        if settings.process_id is None:
            run_processes(settings, run, tallies)
        else:
            run(settings, iter(tallies))
    except Died as error:
        died = error
    except SystemExit:
        if not settings.tail:
            raise
    finally:
        ended.set()
        log.info("%s", summary(add_up(tallies)))

    if died:
        try:
            lost = str(missing(0))
        except RunError as error:
            lost = f"an unknown number ({error})"
        resume = "goes on from the last epoch saved" if settings.tail else "begins from the beginning"
        raise RunError(
            f"the dataflow died: {died}; {lost} of the records it read did not reach "
            f"topic {settings.output_topic!r}; a new start {resume} (the engine's own words are above; NotImplemented "
            "there means zstd, which it cannot read)"
        )
    if lost_count := missing(2 if settings.tail else 10):
        advice = f"; to send them again, delete the topics {settings.recovery_name}-* first" if settings.tail else ""
        raise RunError(
            f"{lost_count} of {count_records(add_up(tallies))} records did not reach topic {settings.output_topic!r}: "
            "the broker was too slow or refused them, and its log tells why (often they are above max.message.bytes, "
            f"or the topic is compacted and they have no key){advice}"
        )


def count_records(counts: list[int]) -> int:
    """Add up the records of every result."""
    return sum(counts[: len(RESULTS)])


def summary(counts: list[int]) -> str:
    """Say what became of the records so far."""
    records = count_records(counts)
    results = ", ".join(f"{counts[index]} {result}" for index, result in enumerate(RESULTS))
    return f"{records} records in: {results}; {max(records - counts[NOT_CACHED], 0)} from the cache"


def report(ended: threading.Event, tallies: list[memoryview], missing: Callable[[float], int]) -> None:
    """Log every ten seconds what became of the records, and while none come, whether all have arrived.

    The engine says nothing of a record that the broker refuses until the next one is sent.

    Args:
        ended: set when there is nothing more to report.
        tallies: the counts of all workers.
        missing: counts the records that have not reached the output topic.
    """
    before = 0
    while not ended.wait(REPORT_SECONDS):
        counts = add_up(tallies)
        records = count_records(counts)
        log.info("%.0f/s; %s", (records - before) / REPORT_SECONDS, summary(counts))
        if records == before:
            try:
                if late := missing(0):
                    log.warning("%d of the records have not reached the output topic yet", late)
            except RunError as error:
                log.warning("%s", error)
        before = records


# --- The program ------------------------------------------------------------------------------------------------

REPORT_SECONDS = 10
STOP_SECONDS = 8  # a look-up may take four, and the engine's flush five; containers often give ten


def end_on_signals(tail: bool, tallies: list[memoryview]) -> None:
    """Let Ctrl-C and SIGTERM end the program: cleanly where records are under way, and at once where none are.

    The engine looks for signals while it runs, and stops in good order. While it waits for other processes it does
    not look, and while it reads its recovery state it aborts; but then no record has been handed over yet. Python's
    own C handler writes to a wake-up descriptor even while the engine does not return, and a thread reads from that.

    Args:
        tail: following has no end that a signal could come before, so its exit code is 0 then.
        tallies: what all workers have counted.
    """

    def leave(signum: int, _frame: FrameType | None = None) -> NoReturn:
        exit_code = 0 if tail else 128 + signum
        if count_records(add_up(tallies)) == 0:
            log.info("ended by %s before the first record", signal.Signals(signum).name)
            os._exit(exit_code)
        sys.exit(exit_code)

    def watch() -> None:
        signum = os.read(reader, 1)[0]
        with suppress(SystemExit):
            leave(signum)
        time.sleep(STOP_SECONDS)
        os._exit(0 if tail else 128 + signum)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave)
    threading.Thread(target=watch, daemon=True).start()


def exit_code_of(run: Callable[[], None], tail: bool, tallies: list[memoryview]) -> int:
    """Run something until its end or a signal's.

    Args:
        run: what to run.
        tail: as end_on_signals has it.
        tallies: as end_on_signals has them.

    Returns:
        the exit code, as the top of this file has them; what went wrong is printed.
    """
    end_on_signals(tail, tallies)
    try:
        run()
    except (SettingsError, RunError, Died) as error:
        print(f"kafka_enrich.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def main() -> int:
    """Run the program.

    Returns:
        its exit code.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # What goes wrong in these is told in our own words; theirs would repeat it, with the API's key in the URL.
    for library in ("kafka", "urllib3"):
        logging.getLogger(library).propagate = False
    logging.getLogger("kafka.net.manager").addHandler(KAFKA_LOG)
    try:
        settings = read_settings(with_settings_file(os.environ, Path(__file__).with_name("kafka_enrich.env")))
    except SettingsError as error:
        print(f"kafka_enrich.py: {error}", file=sys.stderr)
        return 2
    log.setLevel(settings.log_level)
    started_here = settings.workers if settings.process_id is None else settings.workers_per_process
    tallies = new_tallies(started_here)
    return exit_code_of(lambda: enrich(settings, tallies), settings.tail, tallies)


if __name__ == "__main__":
    sys.exit(main())
