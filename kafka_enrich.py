"""Enrich a Kafka topic of IP addresses with city, region and country.

    python load_data.py                                # seed the input topic with sample addresses
    python kafka_enrich.py                             # enrich what it holds, asking ipapi.co, and stop
    GEOIP_DATABASE=city.mmdb python kafka_enrich.py    # the same from a local City database

Every setting comes from the environment; the README has the table. Exit codes: 0, each record that was read is
on the output topic; 1, Kafka or the dataflow failed; 2, a setting is wrong; 128 + n, signal n ended the pass early.
"""

import functools
import ipaddress
import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from types import FrameType
from typing import NamedTuple, NoReturn
from urllib.parse import urlsplit

import maxminddb
import orjson
import requests
import urllib3
from bytewax.dataflow import Dataflow
from bytewax.execution import cluster_main
from bytewax.inputs import KafkaInputConfig
from bytewax.outputs import KafkaOutputConfig
from bytewax.parse import proc_env
from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import KafkaError, UnknownTopicOrPartitionError, for_code

log = logging.getLogger("kafka_enrich")


# --- Settings: the environment, checked -----------------------------------------------------------------------


class SettingsError(Exception):
    """A setting cannot be used; the message names it."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, in values that can be used together."""

    brokers: list[str]
    input_topic: str
    output_topic: str
    geoip_database: str | None
    ipapi_url: str
    ipapi_key: str | None = field(repr=False)
    cache_size: int
    log_level: str
    addresses: list[str]
    process_id: int
    workers_per_process: int


def read_settings(env: Mapping[str, str]) -> Settings:
    """Read the settings from a mapping such as os.environ.

    Args:
        env: values by name; a name that is absent takes its default, an empty value is refused.

    Returns:
        the settings.

    Raises:
        SettingsError: one of them cannot be used.
    """
    if (tail := env.get("KAFKA_TAIL", "0")) != "0":
        raise SettingsError(f"KAFKA_TAIL={tail!r} is not 0 (enrich what the topic holds, and stop)")
    if (log_level := env.get("LOG_LEVEL", "INFO")) not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise SettingsError(f"LOG_LEVEL={log_level!r} is not one of DEBUG, INFO, WARNING, ERROR")
    input_topic = topic_name(env, "KAFKA_INPUT_TOPIC", "ip_address_by_country")
    output_topic = topic_name(env, "KAFKA_OUTPUT_TOPIC", "ip_address_by_location")
    if input_topic == output_topic:
        raise SettingsError(f"KAFKA_OUTPUT_TOPIC={output_topic!r} is the input topic too; choose another one")
    addresses, process_id, workers_per_process = read_cluster(env)
    return Settings(
        brokers=host_ports("KAFKA_BROKERS", env.get("KAFKA_BROKERS", "localhost:9092").split(",")),
        input_topic=input_topic,
        output_topic=output_topic,
        geoip_database=env.get("GEOIP_DATABASE"),
        ipapi_url=read_ipapi_url(env.get("IPAPI_URL", "https://ipapi.co")),
        ipapi_key=read_ipapi_key(env.get("IPAPI_KEY")),
        cache_size=whole_number(env, "CACHE_SIZE", "100000", 0, 10_000_000),
        log_level=log_level,
        addresses=addresses,
        process_id=process_id,
        workers_per_process=workers_per_process,
    )


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
    if not usable or not re.fullmatch(r"[!-~]+", value) or url.query or url.fragment:
        raise SettingsError(f"IPAPI_URL={value!r} is not http://host[:port][/path] or https://…")
    return value.rstrip("/")


def read_ipapi_key(value: str | None) -> str | None:
    """Read the HTTP API's key; a wrong one is not shown."""
    if value is not None and not re.fullmatch(r"[!-~]+", value):
        raise SettingsError("IPAPI_KEY is empty or holds characters that no key has; unset it to go without")
    return value


def read_cluster(env: Mapping[str, str]) -> tuple[list[str], int, int]:
    """Read the BYTEWAX_* variables as bytewax.parse.proc_env does.

    Args:
        env: where nothing in it tells of a cluster, this is the only process.

    Returns:
        the addresses of all processes, the index of this one among them, and its number of worker threads.

    Raises:
        SettingsError: one is missing, contradicts another or cannot be read.
    """
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


class Location(NamedTuple):
    """Where an address is, in English; None where the source does not know."""

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
    subdivisions = record.get("subdivisions")
    region = subdivisions[0] if isinstance(subdivisions, list) and subdivisions else record.get("region")
    location = Location(
        city=name_in(record.get("city")),
        region=name_in(region) or name_in(record.get("state1")),
        country_name=name_in(record.get("country_name"))
        or name_in(record.get("country"))
        or name_in(record.get("country_code")),
    )
    if not any(location):
        raise NotFound
    return location


def open_database(path: str) -> Locator:
    """Open a City database and see that it holds cities, before the first record needs it.

    Args:
        path: an .mmdb file; it is mapped into memory, so processes on one machine share it.

    Returns:
        a locator that reads the database.

    Raises:
        SettingsError: there is no such file, or it is no database, or has no cities.
    """
    try:
        reader = maxminddb.open_database(path, maxminddb.MODE_MMAP_EXT)
        records = [record for _, record in itertools.islice(reader, 10_000)]
    except (OSError, ValueError, maxminddb.InvalidDatabaseError) as error:
        raise SettingsError(f"GEOIP_DATABASE={path!r} cannot be read as a MaxMind database: {error}") from None
    if not any(isinstance(record, dict) and name_in(record.get("city")) for record in records):
        raise SettingsError(f"GEOIP_DATABASE={path!r} holds no cities: it has to be a City database")
    metadata = reader.metadata()
    built = datetime.fromtimestamp(metadata.build_epoch, timezone.utc)
    log.info("locating with %s, %s of %s", path, metadata.database_type, built.date())

    def locate(text: str) -> Location:
        address = public_address(text)
        if metadata.ip_version == 4 and ":" in address:
            raise NotFound
        try:
            return location_in(reader.get(address))
        except maxminddb.InvalidDatabaseError:
            raise LookupFailed from None

    return locate


class Refused(LookupFailed):
    """The API wants no more requests for a while: a rate limit, or a key it does not accept."""

    def __init__(self, why: str, pause: float | None) -> None:
        """Keep for how many seconds the API asked to be left alone, None where it did not say."""
        super().__init__(why)
        self.pause = pause


def read_reply(status: int, retry_after: str | None, body: bytes) -> Location:
    """Read what the API replied, its error before its fields: it sends errors with status 200 too.

    Args:
        status: the HTTP status.
        retry_after: the header of that name.
        body: JSON from the API itself; anything from a proxy or a firewall in front of it.

    Returns:
        the location.

    Raises:
        NotLocated: the kind that the reply says, LookupFailed for one that is no answer about the address.
    """
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        reply = None
    if not isinstance(reply, dict):
        reply = {"error": True}
    elif status == 200 and not reply.get("error"):
        return location_in(reply)
    reason = str(reply.get("reason")).casefold()
    if reason == "reserved ip address":
        raise ReservedIp
    if reason == "invalid ip address":
        raise InvalidIp
    if status == 404 and "reason" in reply:  # any other page that is not there speaks of a wrong IPAPI_URL
        raise NotFound
    if status in (401, 403, 429) or reason == "ratelimited":
        raise Refused("rate limited" if reason == "ratelimited" else f"HTTP {status}", seconds_in(retry_after))
    raise LookupFailed(f"HTTP {status} without a location")


def seconds_in(retry_after: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date (RFC 9110, 10.2.3); None where it says nothing usable."""
    try:
        if retry_after is None or re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
            return float(retry_after) if retry_after else None
        return (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds()
    except (TypeError, ValueError):
        return None


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
    LARGEST_REPLY = 65_536  # bytes; a location takes about 800

    def __init__(self, url: str, key: str | None) -> None:
        """Remember whom to ask.

        Args:
            url: the API's base, http or https.
            key: its key, or None to go without.
        """
        self._url = url
        self._params = {"key": key} if key else {}
        self._thread = threading.local()
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
            try:
                status, retry_after, body = self._get(address, deadline)
                problem = f"HTTP {status}"
            except TimeoutError as error:
                status, problem = 504, str(error)
            if status < 500:
                return read_reply(status, retry_after, body)
            if time.monotonic() + back_off >= deadline:
                raise LookupFailed(problem)
            time.sleep(back_off)
            back_off *= 2

    def _get(self, address: str, deadline: float) -> tuple[int, str | None, bytes]:
        """Send one request.

        Errors of requests and urllib3 are never shown as they are: they quote the URL, and it holds the key.

        Args:
            address: asked for as it is.
            deadline: on the clock of time.monotonic.

        Returns:
            the status, the header Retry-After, and the body.

        Raises:
            TimeoutError: the reply took too long.
            LookupFailed: there is no connection, or what came over it is no HTTP or is too much.
        """
        if not hasattr(self._thread, "session"):
            self._thread.session = requests.Session()
            self._thread.session.headers["User-Agent"] = f"kafka_enrich {requests.utils.default_user_agent()}"
        # A reply that trickles in is looked at piece by piece, and each piece may take the time-out once more: so
        # a try takes twice its time-out at most.
        seconds = min(self.TRY_SECONDS, (deadline - time.monotonic()) / 2)
        give_up = time.monotonic() + seconds
        body = b""
        try:
            with self._thread.session.get(
                f"{self._url}/{address}/json/",
                params=self._params,
                timeout=urllib3.Timeout(total=seconds),
                allow_redirects=False,
                stream=True,
            ) as response:
                while piece := response.raw.read1(self.LARGEST_REPLY, decode_content=True):
                    body += piece
                    if len(body) > self.LARGEST_REPLY:
                        raise LookupFailed(f"a reply of more than {self.LARGEST_REPLY} bytes")
                    if time.monotonic() > give_up:
                        raise TimeoutError("the reply trickles in too slowly")
                return response.status_code, response.headers.get("Retry-After"), body
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise TimeoutError("no reply in time") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise LookupFailed(type(error).__name__) from None


def open_locator(settings: Settings) -> Locator:
    """Open what the settings choose to locate with."""
    if settings.geoip_database is None:
        return HttpApi(settings.ipapi_url, settings.ipapi_key).locate
    return open_database(settings.geoip_database)


# --- Records: bytes in, bytes out -------------------------------------------------------------------------------

Record = tuple[bytes | None, bytes | None]
RESULTS = ("located", "invalid_ip", "reserved_ip", "not_found", "lookup_failed")
NOWHERE = Location(None, None, None)


class Tally(threading.local):
    """Counts of records by result, one for each worker thread: a count that they shared would lose some."""

    def __init__(self, tallies: list[dict[str, int]]) -> None:
        """Start the calling thread's counts, and put them where all can be added up."""
        self.count = dict.fromkeys(RESULTS, 0)
        tallies.append(self.count)


def text_of(value: bytes) -> str:
    """Decode a value; what is no UTF-8 becomes U+FFFD, which no address holds."""
    return value.decode(errors="replace").strip()


def to_json(ip: str | None, location: Location, error: str | None = None) -> bytes:
    """Write the value of an output record; cut to the length of an address, it stays small whatever came in."""
    record = {"ip": ip and ip[:LONGEST_ADDRESS], **location._asdict()}
    return orjson.dumps(record if error is None else {**record, "error": error})


def make_get_location(locate: Locator, cache_size: int, tally: Tally) -> Callable[[Record], tuple[bytes | None, bytes]]:
    """Make the function that turns each record of the input topic into one of the output topic.

    Args:
        locate: where locations come from.
        cache_size: how many final answers to remember, 0 or more; the least recently used goes first.
        tally: where the results are counted.

    Returns:
        get_location: (key, value) in; the same key and JSON by the record contract out, for any bytes or None.
    """

    @functools.lru_cache(cache_size)
    def answer(value: bytes | None) -> tuple[bytes, str]:
        if value is None:
            return to_json(None, NOWHERE, InvalidIp.error), InvalidIp.error
        text = text_of(value)
        try:
            return to_json(text, locate(text)), "located"
        except LookupFailed:
            raise  # not final: an exception is not cached, so the next record with this address asks again
        except NotLocated as not_located:
            return to_json(text, NOWHERE, not_located.error), not_located.error

    def get_location(record: Record) -> tuple[bytes | None, bytes]:
        key, value = record
        # No address is longer; what is would fill the memory if the cache kept it.
        small = value is None or len(value) <= 2 * LONGEST_ADDRESS
        try:
            output, result = answer(value) if small else answer.__wrapped__(value)
        except LookupFailed as failed:
            output, result = to_json(text_of(value or b""), NOWHERE, failed.error), failed.error
        tally.count[result] += 1
        return key, output

    return get_location


# --- Kafka: what has to be so before the dataflow starts, and after it has ended --------------------------------


class RunError(Exception):
    """Kafka or the dataflow failed; the message says what to do."""


@contextmanager
def kafka_admin(settings: Settings) -> Iterator[KafkaAdminClient]:
    """Connect to Kafka for some questions; what goes wrong meanwhile becomes a RunError."""
    try:
        with KafkaAdminClient(
            bootstrap_servers=settings.brokers, bootstrap_timeout_ms=5_000, request_timeout_ms=10_000
        ) as admin:
            yield admin
    except KafkaError as error:
        raise RunError(
            f"Kafka does not answer at {','.join(settings.brokers)} ({error}); is it running, and KAFKA_BROKERS right?"
        ) from None


def partitions_of(admin: KafkaAdminClient, topic: str) -> list[TopicPartition]:
    """List the partitions of a topic that has to be there; asking does not create it."""
    [found] = admin.describe_topics([topic])
    if found["error_code"] == UnknownTopicOrPartitionError.errno:
        raise RunError(f"topic {topic!r} does not exist; create it, or run: python load_data.py")
    if found["error_code"]:
        raise RunError(f"topic {topic!r} cannot be used: {for_code(found['error_code']).__name__}")
    return [TopicPartition(topic, partition["partition_index"]) for partition in found["partitions"]]


def end_offsets(admin: KafkaAdminClient, topic: str) -> int:
    """Add up the end offsets of a topic's partitions: each record written to it moves the sum by one."""
    latest = dict.fromkeys(partitions_of(admin, topic), OffsetSpec.LATEST)
    return sum(found.offset for found in admin.list_partition_offsets(latest).values())


def check_topics(settings: Settings) -> int:
    """See that the dataflow can run; the engine itself would panic, hang, or create a topic of its own.

    Args:
        settings: the brokers, the topics and the number of workers.

    Returns:
        the end offsets of the output topic, added up.

    Raises:
        RunError: no broker answers, a topic is missing, or a worker would have no partition to read.
    """
    with kafka_admin(settings) as admin:
        partitions = len(partitions_of(admin, settings.input_topic))
        workers = len(settings.addresses) * settings.workers_per_process
        if workers > partitions:
            raise RunError(
                f"{workers} workers are too many for topic {settings.input_topic!r} with its {partitions} partitions: "
                "every worker reads at least one"
            )
        return end_offsets(admin, settings.output_topic)


def count_missing(settings: Settings, end_before: int, handed_over: int) -> int:
    """Count the records that the engine took for the output topic and did not get there.

    At its end the engine gives its queue five seconds and ignores what is left, so only the topic itself can tell.

    Args:
        settings: the brokers and the output topic.
        end_before: what check_topics returned.
        handed_over: how many records this process has enriched since.

    Returns:
        how many are missing; what others write to the topic meanwhile hides as many.

    Raises:
        RunError: no broker answers.
    """
    give_up = time.monotonic() + 10
    with kafka_admin(settings) as admin:
        while True:
            missing = handed_over - (end_offsets(admin, settings.output_topic) - end_before)
            if missing <= 0 or time.monotonic() > give_up:
                return max(missing, 0)
            time.sleep(0.1)


# --- The dataflow -----------------------------------------------------------------------------------------------

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


def run_dataflow(settings: Settings, get_location: Callable[[Record], tuple[bytes | None, bytes]]) -> None:
    """Run this process of the cluster until every partition of the input topic has been read to its end."""
    brokers, addresses, proc_id = settings.brokers, settings.addresses, settings.process_id

    flow = Dataflow()
    flow.input("ip_address", KafkaInputConfig(brokers, settings.input_topic, False, additional_properties=CONSUMER))
    # (b"Germany", b"5.159.132.1"), and None for a key or a value that is not there
    flow.map(get_location)
    # (b"Germany", b'{"ip":"5.159.132.1","city":"Berlin","region":"Berlin","country_name":"Germany"}')
    flow.capture(KafkaOutputConfig(brokers, settings.output_topic, additional_properties=PRODUCER))
    # the same, in the producer's queue
    cluster_main(flow, addresses, proc_id, worker_count_per_proc=settings.workers_per_process)


def enrich(settings: Settings) -> None:
    """Enrich what the input topic holds.

    Args:
        settings: all of them.

    Raises:
        SettingsError: the City database cannot be used.
        RunError: Kafka or the dataflow failed, or not every record reached the output topic.
    """
    locate = open_locator(settings)
    tallies: list[dict[str, int]] = []
    get_location = make_get_location(locate, settings.cache_size, Tally(tallies))
    end_before = check_topics(settings)
    died = None
    try:
        run_dataflow(settings, get_location)
    except (RuntimeError, ValueError) as error:
        died = error
    finally:
        results = {result: sum(tally[result] for tally in tallies) for result in RESULTS}
        records = sum(results.values())
        log.info("%d records in: %s", records, ", ".join(f"{count} {result}" for result, count in results.items()))

    missing = count_missing(settings, end_before, records)
    if died:
        raise RunError(
            f"the dataflow died: {died} (NotImplemented there means zstd, which the engine cannot read); {missing} of "
            f"{records} records did not reach topic {settings.output_topic!r}, and the rest is unread; a new start "
            "begins from the beginning"
        )
    if missing:
        raise RunError(
            f"{missing} of {records} records did not reach topic {settings.output_topic!r}: the broker refused them "
            "(its log tells why; often they are above the topic's max.message.bytes) or was too slow"
        )


# --- The program ------------------------------------------------------------------------------------------------

STOP_SECONDS = 8  # a look-up may take four, and the engine's flush five; containers often give ten


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the program cleanly, or at all.

    The engine looks for signals while it runs and stops in good order. While it waits for other processes it does
    not; but Python's own C handler writes to a wake-up descriptor at once, so a thread that reads from it can end
    the process after a while.
    """

    def leave(signum: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    def watch() -> None:
        signum = os.read(reader, 1)[0]
        time.sleep(STOP_SECONDS)
        os._exit(128 + signum)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave)
    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the program.

    Returns:
        its exit code, as the top of this file has them.
    """
    end_on_signals()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # What goes wrong in these is told in our own words; theirs would repeat it, with the API's key in the URL.
    for library in ("kafka", "urllib3"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        settings = read_settings(os.environ)
        log.setLevel(settings.log_level)
        enrich(settings)
    except (SettingsError, RunError) as error:
        print(f"kafka_enrich.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
