# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "bytewax==0.21.1", "confluent-kafka==2.15.1", "maxminddb==3.2.0", "msgspec==0.22.0",
#     "prometheus-client==0.26.0", "python-dotenv==1.2.4", "requests==2.34.2", "tqdm==4.70.1", "urllib3==2.8.0",
# ]
# ///
"""Enrich a Kafka topic of IP addresses with city, region and country.

    python load_data.py                                             # seed the input topic with sample addresses
    python kafka_enrich.py                                          # enrich what it holds, asking ipapi.co, and end
    GEOIP_DATABASE=city.mmdb python kafka_enrich.py                 # the same from a local City database
    KAFKA_TAIL=1 GEOIP_DATABASE=city.mmdb python kafka_enrich.py    # go on with what arrives, until a signal comes
    DELIVERY_GUARANTEE=exactly_once KAFKA_TAIL=1 GEOIP_DATABASE=city.mmdb python kafka_enrich.py
    python kafka_enrich.py --check                                  # check what a start needs, and say what is there
    GEOIP_DATABASE=city.mmdb python kafka_enrich.py 8.8.8.8         # what a record becomes; - reads lines from stdin

Every copy of it is a member of one consumer group: start another one to share the work. Settings come from the
environment, or from kafka_enrich.env beside this file.

    record      what lies on a topic: key b"Germany", value b"5.159.132.1", headers, a timestamp
    location    {"city": "Berlin", "region": "State of Berlin", "country_name": "Germany"}
    event       a record whose value is a JSON object, with IP_FIELD: b'{"id":1,"client":{"ip":"5.159.132.1"}}'
    result      what became of a record: located, tombstone, or why not: invalid_ip, reserved_ip, not_found ...
    answer      the output's value and the result: (b'{"ip":"5.159.132.1","city":"Berlin",...}', "located"), or
                "located Germany" where countries are counted

Exit codes: 0, done, or KAFKA_TAIL=1 was stopped by a signal; 1, Kafka or a look-up failed; 2, a setting is wrong;
128 + n, signal n ended a bounded run early.
"""

import argparse
import bisect
import difflib
import functools
import gc
import hashlib
import importlib.metadata
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from logging.handlers import BufferingHandler
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypedDict, TypeVar

import bytewax.operators as op
import maxminddb
import msgspec
import prometheus_client
import requests
import urllib3
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import cluster_main
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient
from dotenv.parser import parse_stream
from msgspec import Meta
from prometheus_client import REGISTRY, Histogram, Info, Metric, make_wsgi_app, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from urllib3.util import Retry

log = logging.getLogger("kafka_enrich")
LIBRDKAFKA_LOG = logging.getLogger("kafka_enrich.librdkafka")  # some twenty lines a second while a broker is away
T = TypeVar("T")

Location = dict[str, object]  # by field; None where the source does not know
Locate = Callable[[str, bool], Location]  # of an address, and whether it is public; raises NotLocated, LookupFailed
Answer = tuple[bytes | None, str]  # the output's value, and the result
Enriched = tuple[Message, Answer]  # what came in, and what goes out


# --- The dataflow -----------------------------------------------------------------------------------------------


def run_dataflow(settings: "Settings", workers: "list[Worker]", locations: "Locations") -> None:
    """Run the workers of this process: until a signal comes, or the group has enriched all that the topic held."""
    brokers = settings.kafka_brokers

    flow = Dataflow("kafka_enrich")
    ip_addresses = op.input(
        "ip_address", flow, KafkaInputConfig(brokers, settings.kafka_input_topic, settings.kafka_tail, workers)
    )
    # Message: key b"Germany", value b"5.159.132.1"
    located = op.map("location", ip_addresses, locations.get_location)
    # (the same Message, (b'{"ip":"5.159.132.1","city":"Berlin",...}', "located"))
    op.output("located", located, KafkaOutputConfig(brokers, settings.kafka_output_topic, workers))
    # on the output topic: the same key, headers and timestamp with the new value; committed by Worker.commit
    never = timedelta(days=10_000)  # the consumer group keeps the place, so no epoch has to end
    cluster_main(flow, addresses=[], proc_id=0, epoch_interval=never, worker_count_per_proc=len(workers))


@dataclass
class KafkaInputConfig(DynamicSource[Message]):
    """Reads a topic, each worker as a member of the consumer group: with tail what arrives, too, else what it holds."""

    brokers: str
    topic: str
    tail: bool
    workers: "list[Worker]"

    def build(self, _step_id: str, worker_index: int, _worker_count: int) -> "Worker":
        """Join the group with one worker."""
        return self.workers[worker_index].join(self.brokers, self.topic, self.tail)


@dataclass
class KafkaOutputConfig(DynamicSink[Enriched]):
    """Writes to a topic, and commits."""

    brokers: str
    topic: str
    workers: "list[Worker]"

    def build(self, _step_id: str, worker_index: int, _worker_count: int) -> "Worker":
        """Connect the producer of one worker."""
        return self.workers[worker_index].connect_output(self.brokers, self.topic)


# --- One record: bytes in, bytes out ----------------------------------------------------------------------------

RESULTS = tuple(
    "located tombstone invalid_ip reserved_ip not_found lookup_failed missing_ip invalid_record field_exists".split()
)
TOLD = {  # the first record of each of these is told, for nobody may have meant that
    "invalid_ip": "no address; of events IP_FIELD says where it stands",
    "missing_ip": "no address at IP_FIELD",
    "invalid_record": "no JSON object",
    "field_exists": "LOCATION_FIELD is there already",
}
TOMBSTONE: Answer = (None, "tombstone")
WAITS = "waits"  # what is no result: the record is kept until the source of locations answers
LONGEST_ADDRESS = 64  # characters: 45 of an IPv6 address at most, and the name of a zone


class Locations:
    """Turns records into enriched records, and remembers the final answers."""

    def __init__(self, locate: Locate, settings: "Settings") -> None:
        self._settings, self._told = settings, set[str]()
        self._nowhere = unknown_location(settings.fields)
        counted = ("country_code", "country_name") if settings.metrics_port else ()
        self._country = next((field for field in counted if field in self._nowhere), None)
        self._answer: Callable[[bytes], Answer] = self._find
        self._write: Callable[[str, Location, str | None], bytes] = to_json
        if settings.ip_field:
            self._answer, self._write = self._answer_event, to_member
            names = split_names(settings.location_field)
            self._read = event_reader([path_of(field) for field in split_names(settings.ip_field)], names)
            self._names = [b"," + msgspec.json.encode(name) + b":" for name in names]

        def locate_timed(address: str, public: bool) -> Location:
            with LOOKUPS.time():
                return locate(address, public)

        self._locate = locate_timed if settings.metrics_port else locate
        self._hits, self.remembered = 0, functools.lru_cache(settings.cache_size)(self._look_up)

    def forget(self) -> None:
        """Forget what was remembered, as the source says other things from now on.

        What is being looked up in the old source goes to the old cache, and with it.
        """
        self._hits = self.hits()
        self.remembered = functools.lru_cache(self._settings.cache_size)(self._look_up)

    def hits(self) -> int:
        """Count the answers that came from the cache."""
        return self._hits + self.remembered.cache_info().hits

    def get_location(self, record: Message) -> Enriched:
        """Find where the address of a record is.

        Args:
            record: with a value such as b"5.159.132.1", or with IP_FIELD=ip an event, b'{"id":1,"ip":"5.159.132.1"}'.

        Returns:
            the record, and the answer: (b'{"ip":"5.159.132.1","city":"Berlin",...}', "located"), of an event
            (b'{"id":1,"ip":"5.159.132.1","location":{"city":"Berlin",...}}', "located"); a tombstone, a record without
            a value, is answered with one.

        Raises:
            RunError: a look-up failed, and ON_LOOKUP_FAILED is stop.
        """
        value = record.value()
        if value is None:
            return record, TOMBSTONE
        try:
            answer = self._answer(value)
        except LookupFailed as failure:  # only where ON_LOOKUP_FAILED is wait
            return record, (str(failure).encode(), WAITS)
        if answer[1] in TOLD and answer[1] not in self._told:
            why = "it begins with Schema Registry's frame" if value.startswith(b"\0") else TOLD[answer[1]]
            self._tell(f"{record.topic()}[{record.partition()}] offset {record.offset()}", answer[1], why)
        return record, answer

    def _answer_event(self, event: bytes) -> Answer:
        """Answer an event with its own bytes, and a member for each of its addresses before the last brace."""
        texts = self._read(event)
        if isinstance(texts, str):
            return event, texts
        members, result = b"", ""
        for name, text in zip(self._names, texts, strict=True):
            if text:
                member, its_result = self._find(text)
                members += name + member
                if not result or (its_result.startswith("located") and not result.startswith("located")):
                    result = its_result
        brace = event.rindex(b"}")
        return (event[:brace] + members + event[brace:], result) if result else (event, "missing_ip")

    def _find(self, address: bytes | str) -> tuple[bytes, str]:
        """Find what goes out for an address, if it can be one from what is remembered; failures are not."""
        try:
            return self.remembered(address) if len(address) <= LONGEST_ADDRESS else self._look_up(address)
        except LookupFailed as failure:
            if self._settings.on_lookup_failed == "wait":
                raise
            ip, _, _ = find_address(text_of(address))
            if self._settings.on_lookup_failed == "stop":
                why = f"{ip} was not looked up: {failure}; a new start tries again (ON_LOOKUP_FAILED=stop)"
                raise RunError(why) from None
            self._tell(ip, "lookup_failed", failure)
            return self._write(ip, self._nowhere, "lookup_failed"), "lookup_failed"

    def _look_up(self, address: bytes | str) -> tuple[bytes, str]:
        """Find the final answer to an address; a LookupFailed where there is none now."""
        ip = text_of(address)
        try:
            ip, asked, public = find_address(ip)
            alone = ip.encode() if isinstance(address, bytes) else ip
            if alone != address and len(alone) <= LONGEST_ADDRESS:  # as each client has a port of its own
                return self.remembered(alone)
            location = self._locate(asked, public)
            country = location[self._country] if self._country else None
            return self._write(ip, location, None), sys.intern(f"located {country}") if country else "located"
        except NotLocated as reason:
            return self._write(ip, self._nowhere, str(reason)), str(reason)

    def _tell(self, what: str, result: str, why: object) -> None:
        """Warn of the first record with a result, after which there may be thousands."""
        if result not in self._told:
            self._told.add(result)
            log.warning("%s is not enriched: %s; more of them are only counted, as %s", what, why, result)


def text_of(address: bytes | str) -> str:
    """Decode a value; what is no UTF-8 becomes U+FFFD, which no address holds."""
    return (address.decode("utf-8", "replace") if isinstance(address, bytes) else address).strip()


def to_json(ip: str, location: Location, error: str | None) -> bytes:
    """Write the value of an output record; cut to the length of an address, it stays small whatever came in."""
    record = {"ip": ip[:LONGEST_ADDRESS], **location}
    return msgspec.json.encode(record if error is None else {**record, "error": error})


def to_member(_ip: str, location: Location, error: str | None) -> bytes:
    """Write what is added to an event: what is known, or the error."""
    known = {name: value for name, value in location.items() if value is not None}
    return msgspec.json.encode(known if error is None else {"error": error})


# --- Kafka: input, output, commit -------------------------------------------------------------------------------

IDLE_SECONDS = 0.05  # how long a worker waits for a record before it looks at its clock
ASK_SECONDS = 0.5  # how often a bounded run asks what the group has committed
RETRY_SECONDS = 0.5
BACKLOG = 10_000  # records of lag from which on a transaction takes longer, for its commit takes as long as thousands
LAG_SECONDS = 2.0  # without a commit, after which the group is asked where it stands
TRANSACTION_SECONDS = 15  # after a kill readers of committed records wait so long, so it is near the session's time-out
COMMIT_LIMIT = 30.0  # s; what takes longer is done again with a new producer
LEAVE_LIMIT = 1.5  # s; in the midst of a rebalance it can take longer, and the session times out anyway
UNWELL_SECONDS = 60  # after which it says so, again and again
STANDSTILL_SECONDS = 180  # no call takes as long, but some of librdkafka's have been seen never to return


def codes(names: str) -> set[int]:
    """Find the codes of Kafka's errors by their names."""
    return {getattr(KafkaError, name) for name in names.split()}


# What brokers answer where doing it again cannot help: of one record, or of all.
RECORD_REFUSALS = codes(
    "INVALID_MSG INVALID_MSG_SIZE INVALID_RECORD INVALID_TIMESTAMP MSG_SIZE_TOO_LARGE POLICY_VIOLATION "
    "RECORD_LIST_TOO_LARGE"
)
REFUSALS = RECORD_REFUSALS | codes(
    "CLUSTER_AUTHORIZATION_FAILED GROUP_AUTHORIZATION_FAILED TOPIC_AUTHORIZATION_FAILED UNKNOWN_TOPIC_OR_PART "
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED UNSUPPORTED_COMPRESSION_TYPE _UNKNOWN_PARTITION _UNKNOWN_TOPIC"
)
# What makes the records of a fetch unreadable, which librdkafka skips, or asks for again for ever.
UNREADABLE = codes("_BAD_COMPRESSION _BAD_MSG _NOT_IMPLEMENTED")
# Why a member cannot join its group: what another one took over, has chosen, or what the brokers forbid.
GROUP_REFUSALS = codes(
    "_FATAL FENCED_INSTANCE_ID GROUP_AUTHORIZATION_FAILED INCONSISTENT_GROUP_PROTOCOL INVALID_SESSION_TIMEOUT"
)
REBALANCING = codes("ILLEGAL_GENERATION REBALANCE_IN_PROGRESS UNKNOWN_MEMBER_ID")
UNREACHABLE = codes("_ALL_BROKERS_DOWN _AUTHENTICATION _SSL")  # one broker away of several is no trouble


# What poll and flush raise when a client has failed for good, as one that is fenced; the second, with the first for its
# cause, where call-backs were due after that: what they had to report is lost.
CLIENT_FAILED = (KafkaException, SystemError)


class RunError(Exception):
    """The run cannot go on; the message says why, and what to do."""

    exit_code = 1


class Worker(StatelessSourcePartition[Message], StatelessSinkPartition[Enriched]):
    """One member of the consumer group: what it reads, what it writes, and how far that has come.

    Input, look-up and output run one after another in one thread, and a batch is read when the one before it is
    written, so that nothing is under way when it commits, when partitions move, and when it ends.
    """

    consumer: Consumer
    producer: Producer

    def __init__(self, settings: "Settings", copy: str, number: int, stop: threading.Event) -> None:
        """Connect nothing yet; no other copy has this one's name, and stop is set to end the worker."""
        self.settings, self.number, self.stop = settings, number, stop
        self.name = f"{copy}-{number}"  # in logs and of transactions
        # A look-up over HTTP may take seconds, and between two batches the group and a stop get their turn.
        self.batch_size = self.whole_batch = 1_000 if settings.geoip_database else 1
        self.in_group = False
        self.member = ""  # of the group, its id when partitions came last
        self.moved = False  # whether partitions came or went
        self.fresh = set[int]()  # partitions that have come, of which nothing was read
        self.under_way = 0  # records that were read and are not written
        self.again: list[Message] = []  # records that were read, and wait for the source of locations
        self.waits_since = math.inf  # when they began to
        self.ends: dict[int, int] = {}  # by partition: the offset after its last record, when there is no next one
        self.remaining: dict[int, range] | None = None  # of a bounded run: what the group has not committed
        self.total = 0  # records that remained at its start
        self.produced: dict[int, int] = {}  # by partition: the offset after the last record that was produced
        self.committed: dict[int, int] = {}  # by partition: the offset that the group has committed, if that is known
        self.pending: Counter[str] = Counter()  # results since the last commit
        self.counts = Counter[str]()  # results that are committed
        self.broken = ""  # why everything since the last commit has to be done again
        self.refused: RunError | None = None
        self.batch_refused = False  # and so the next ones are smaller
        self.suspects = 0  # records that are left of those of which one was refused; each batch of them is committed
        self.suspect: Message | None = None  # the one that is produced and not committed
        self.attempt = 0  # of its producers, the one in use
        self.lag: dict[int, int] = {}  # by partition: records that are not committed
        self.trouble, self.reminder = "", 0.0
        self.commit_at = self.ask_at = self.again_at = 0.0
        self.last_turn = self.last_commit = self.up_to_date = time.monotonic()

    def join(self, brokers: str, topic: str, tail: bool) -> "Worker":
        """Connect a consumer, find what a bounded run has to do, and join the group."""
        self.input_topic, settings = topic, self.settings
        properties = consumer_properties(settings, brokers, self.number)
        self.consumer = Consumer({**properties, "error_cb": self.complain}, logger=LIBRDKAFKA_LOG)
        self.in_group = True
        # Of a member that waits for a rebalance, brokers answer no question before that ends; of who only asks they do.
        self.asks = self.consumer if tail else Consumer(consumer_properties(settings, brokers), logger=LIBRDKAFKA_LOG)
        if not tail:
            self.remaining = remaining(self.consumer, self.asks, topic)
            self.total = sum(map(len, self.remaining.values()))
            if not self.remaining:
                why = "another one, or one that is reset, does all again"
                log.info("nothing new for KAFKA_GROUP_ID=%s; %s", settings.group, why)
                return self
        self.subscribe()
        return self

    def subscribe(self) -> None:
        """Join the group."""
        topics = [self.input_topic]
        self.consumer.subscribe(topics, on_assign=self.assigned, on_revoke=self.revoked, on_lost=self.lost)

    def next_batch(self) -> list[Message]:
        """Read what there is, up to a batch, but nothing before the output has written the batch before it."""
        now = self.last_turn = time.monotonic()
        if self.under_way:
            return []
        if not self.again:
            for partition, end in self.ends.items():
                self.produced[partition] = max(end, self.produced.get(partition, 0))
            self.ends.clear()
        if self.stop.is_set() or self.remaining == {}:  # of a bounded run the group has committed all that there was
            self.finish()
            raise StopIteration
        if self.refused:
            raise self.refused
        if self.broken:
            self.do_again()
            return []
        if now >= self.commit_at or self.suspects:
            if self.pending:  # what comes after a pause is committed at once, and what follows waits for its turn
                self.commit_at = now + self.settings.seconds_between_commits(sum(self.lag.values()))
            self.commit()
        if now >= self.ask_at:
            self.ask_at = now + ASK_SECONDS
            try:
                self.producer.poll(0)  # what it says of its connections, where nothing is produced
            except CLIENT_FAILED as error:
                self.broken = self.broken or error_of(error).str()
            self.note_lag()
            self.ask()
        records = self.read()
        if self.again:
            self.again += records
            if now < self.again_at:
                return []
            records, self.again = self.again, []
        self.under_way = len(records)
        return records

    def read(self) -> list[Message]:
        """Read records, take what else the consumer has to tell, and let the group have its turn."""
        messages = self.consumer.consume(self.batch_size, 0)
        if not messages:
            if self.remaining is not None:
                self.commit()  # so that a bounded run does not wait for its end
            message = self.consumer.poll(IDLE_SECONDS)
            messages = [] if message is None else [message]  # one without a value is false
        records = [message for message in messages if message.error() is None]
        if len(records) < len(messages):
            for message in messages:
                self.take_error(message)
        if self.moved:  # of partitions that have just left, the next owner reads it
            self.moved = False
            owned = {part.partition for part in self.consumer.assignment()}
            records = [record for record in records if record.partition() in owned]
            self.ends = {partition: end for partition, end in self.ends.items() if partition in owned}
            self.read_on_or_pause()
            log.info("worker %s reads partitions %s", self.name, sorted(owned))
        if self.fresh:
            self.begin(records)
        return [] if self.broken else records

    def begin(self, records: list[Message]) -> None:
        """See that partitions which have come begin where the group stands.

        While their offsets wait for a transaction that a killed copy has left open, and another member comes or goes,
        librdkafka 2.15 takes them for missing (rd_kafka_assignment_apply_offsets), and begins with the oldest record.
        """
        first = {record.partition() or 0: record.offset() or 0 for record in reversed(records)}
        fresh, why = [TopicPartition(self.input_topic, partition) for partition in self.fresh & first.keys()], ""
        try:
            for part in committed_offsets(self.consumer, fresh, ASK_SECONDS) if fresh else ():
                _, end = self.consumer.get_watermark_offsets(part, cached=True)
                if first[part.partition] < part.offset <= end:  # beyond the end they are of a topic that was deleted
                    why = f"partition {part.partition} began before its committed offset"
        except KafkaException as error:
            why = error_of(error).str()
        if why:
            self.commit()  # so that only these are done again
            self.broken = self.broken or why
        else:
            self.fresh -= first.keys() | self.ends.keys()

    def take_error(self, message: Message) -> None:
        """Take a message that is no record: the end of a partition, or an error of the consumer."""
        error, group = message.error(), f"group {self.settings.group!r}"
        if error is None:
            return
        if error.code() == KafkaError._PARTITION_EOF:
            self.ends[message.partition() or 0] = message.offset() or 0
        elif error.fatal() or error.code() in GROUP_REFUSALS:
            who = "; does another copy have its group.instance.id?" if "instance" in error.str() else ""
            raise RunError(f"{group} cannot be joined: {error.str()}{who}")
        elif error.code() in REFUSALS | UNREADABLE:
            raise RunError(f"topic {self.input_topic!r} cannot be read: {error.str()}")
        elif error.str().startswith("Failed to fetch committed offsets"):  # and librdkafka (#5586) gives up
            log.info("worker %s joins the group again: %s", self.name, error.str())
            self.consumer.unsubscribe()
            self.subscribe()
        else:
            log.info("worker %s: %s", self.name, error.str())

    def connect_output(self, brokers: str, topic: str) -> "Worker":
        """Connect a producer to the topic of what is located, or passes unchanged."""
        self.output_topic, self.error_topic = topic, self.settings.kafka_error_topic
        self.errors = set(RESULTS) - {"located", "tombstone"} if self.error_topic else set[str]()
        self.producer_properties = producer_properties(self.settings, brokers, self.name)
        chosen = self.settings.kafka_client.keys() | self.settings.kafka_producer.keys()
        self.lingers = not chosen.isdisjoint(("linger.ms", "queue.buffering.max.ms"))
        self.connect_producer()
        return self

    def write_batch(self, items: list[Enriched]) -> None:
        """Produce records, each with the key, the headers and the timestamp of what came in."""
        self.under_way -= len(items)
        if self.settings.on_lookup_failed == "wait":
            items = self.set_aside(items)
        if not items:
            return
        alone = self.suspects and len(items) == 1 and not self.pending  # the engine may have cut a batch in two
        self.suspect = items[0][0] if alone else None
        self.pending.update([result for _, (_, result) in items])
        produce, errors, topic = self.producer.produce, self.errors, self.output_topic
        try:
            for record, (value, result) in items:
                topic, headers, moment = self.output_topic, record.headers(), record.timestamp()[1]
                if result in errors:
                    topic, value = self.error_topic, record.value()
                    headers = [*(headers or ()), *error_headers(record, result)]
                while True:
                    try:  # a record without a timestamp has -1, and 0 is now
                        produce(topic, value, record.key(), -1, None, None, moment if moment > 0 else 0, headers)
                        break
                    except BufferError:  # the queue is full: wait for the brokers, and not for linger.ms
                        self.last_turn = time.monotonic()
                        self.producer.flush(0.1)
            last = {record.partition() or 0: record for record, _ in items}
            self.produced.update({partition: (record.offset() or 0) + 1 for partition, record in last.items()})
            if self.lingers or len(items) * 10 > self.batch_size:
                self.producer.poll(0)
            else:  # little waits behind them, so they need not wait for linger.ms
                self.producer.flush(0.001)
        except (*CLIENT_FAILED, UnicodeDecodeError) as error:  # of the transaction, or of a header's name
            its = error_of(error)
            if its.code() == KafkaError._APPLICATION:
                its = KafkaError(KafkaError.INVALID_RECORD, f"a header's name is odd: {its.str()}")
            self.undelivered(self.attempt, its, Message(topic=topic))
        except Exception:  # a fault of this script, after which close commits: with this not a part of the batch
            self.broken = "a batch was produced in part"
            raise

    def set_aside(self, items: list[Enriched]) -> list[Enriched]:
        """Keep for the next batch what begins with a look-up that failed, and read nothing more before it works."""
        # Where the engine has cut a batch in two, what follows in the second part may not get past the first.
        answered = [] if self.again else list(itertools.takewhile(lambda item: item[1][1] != WAITS, items))
        self.again += [record for record, _ in items[len(answered) :]]
        waited, now = self.waits_since < math.inf, time.monotonic()
        self.again_at = now + RETRY_SECONDS
        if self.again and not waited:
            self.waits_since, why = now, items[len(answered)][1][0] or b""
            self.read_on_or_pause()
            log.warning("worker %s waits for the source of locations: %s", self.name, why.decode())
        elif waited and not self.again:
            self.read_on_or_pause()
            log.info("worker %s: the source of locations answers again", self.name)
        return answered

    def read_on_or_pause(self) -> None:
        """Read no more records as long as some wait for the source of locations, but serve the group."""
        self.waits_since = self.waits_since if self.again else math.inf
        (self.consumer.pause if self.again else self.consumer.resume)(self.consumer.assignment())

    def commit(self) -> bool:
        """Commit what was produced: the whole delivery guarantee, in the order in which it happens.

        At least once: offsets are committed when the brokers have acknowledged all records before them; a kill between
        the two repeats those. Exactly once: records and offsets become visible together, or never. False where it did
        not work: it is tried again the next time, or everything since the last one done again.
        """
        if self.broken:
            return False
        offsets = self.uncommitted()
        if not offsets:
            self.up_to_date = self.up_to_date if self.trouble else time.monotonic()
            return True
        if self.settings.exactly_once and not self.is_member():
            self.broken = "the group has another member in its place"
            return False
        began = time.monotonic()
        try:
            self.flush()
            if self.settings.exactly_once:
                member = self.consumer.consumer_group_metadata()  # with it the brokers refuse who is no member any more
                within(COMMIT_LIMIT, self.producer.send_offsets_to_transaction, offsets, member, COMMIT_LIMIT)
                within(COMMIT_LIMIT, self.producer.commit_transaction, COMMIT_LIMIT)
                self.producer.begin_transaction()
            else:
                within(COMMIT_LIMIT, commit_offsets, self.consumer, offsets)
        except (*CLIENT_FAILED, TimeoutError) as error:
            self.not_committed(error)
            return False
        self.committed.update((offset.partition, offset.offset) for offset in offsets)
        self.counts.update(self.pending)
        if self.suspects:
            self.suspects = max(0, self.suspects - self.pending.total())
            self.batch_size = self.batch_size if self.suspects else self.whole_batch
        self.pending.clear()
        self.last_commit = time.monotonic()
        COMMITS.observe(self.last_commit - began)
        self.all_is_well()
        return True

    def uncommitted(self) -> list[TopicPartition]:
        """Find what a commit has to tell the group."""
        new = self.produced.items() - self.committed.items()
        return [TopicPartition(self.input_topic, partition, offset) for partition, offset in new]

    def is_member(self) -> bool:
        """Tell whether partitions came to the member that it still is.

        One that was put out while it had to give away partitions is told of these only, keeps the others for a while,
        and could commit theirs with its next membership, though somebody else reads them.
        """
        return self.member != "" and self.consumer.memberid() == self.member

    def finish(self) -> None:
        """Commit at the end, or abort: readers of committed records would wait for the transaction's time-out."""
        while not (self.commit() or self.broken or self.settings.exactly_once):
            self.consumer.poll(0.1)  # a rebalance that is under way has to end before a commit
        if self.settings.exactly_once and self.broken:  # whoever reads on does it again
            with suppress(*CLIENT_FAILED, TimeoutError):
                within(LEAVE_LIMIT, self.producer.abort_transaction, LEAVE_LIMIT)

    def flush(self) -> None:
        """Wait until the brokers have acknowledged every record that was produced.

        A transaction's commit would do that too, but does not notice before its time-out that one was refused.
        """
        limit, left = time.monotonic() + COMMIT_LIMIT, len(self.producer)
        before = left
        try:
            while (left := self.producer.flush(0.5)) and time.monotonic() < limit and not (self.refused or self.broken):
                self.last_turn = time.monotonic()
                if left < before:
                    limit, before = self.last_turn + COMMIT_LIMIT, left
        except CLIENT_FAILED as error:  # with the reports that are lost goes what is known of the records
            self.broken = self.broken or error_of(error).str()
        if left or self.refused or self.broken:
            raise TimeoutError(self.broken or f"no record was acknowledged for {COMMIT_LIMIT:.0f} s")

    def not_committed(self, error: Exception) -> None:
        """Say what follows from a commit that failed."""
        if self.refused:
            raise self.refused
        reason, code = error_of(error).str(), error_of(error).code()
        if not self.settings.exactly_once and code in REFUSALS:
            raise RunError(f"group {self.settings.group!r}: offsets cannot be committed: {reason}")
        # Whether a transaction took effect may be unknown: a new producer puts an end to it, and then the group's
        # offsets tell. Offsets alone are just committed the next time.
        if self.settings.exactly_once or isinstance(error, TimeoutError):
            self.broken = reason
        if code in REBALANCING:
            log.info("worker %s could not commit: %s", self.name, reason)
        else:
            self.in_trouble(reason)

    def do_again(self) -> None:
        """Go back to the committed offsets with a new producer, which aborts what the old one left open."""
        message = self.consumer.poll(RETRY_SECONDS)  # the group has its turn; a record that it returns is read again
        if message is not None:
            self.take_error(message)
        self.ends.clear()
        try:
            if self.settings.exactly_once:
                self.learn_why()
            if self.batch_refused:
                self.search()
            threading.Thread(target=retire, args=[self.producer], daemon=True).start()
            self.connect_producer()
            for position in committed_offsets(self.consumer, self.consumer.assignment(), CONNECT_SECONDS):
                position.offset = max(position.offset, -2)  # the beginning, where nothing is committed
                self.consumer.seek(position)
        except (KafkaException, TimeoutError) as failure:
            if error_of(failure).code() in REFUSALS:
                raise RunError(f"group {self.settings.group!r} cannot go on: {error_of(failure).str()}") from None
            self.in_trouble(error_of(failure).str())
            return
        for forgotten in (self.produced, self.committed, self.pending, self.again, self.fresh):
            forgotten.clear()
        self.read_on_or_pause()
        self.broken = ""

    def learn_why(self) -> None:
        """Ask a transaction that failed why: the reports of its records only say that they were purged."""
        try:
            within(ASK_SECONDS, self.producer.begin_transaction)  # in the midst of one it says what has become of it
        except (KafkaException, TimeoutError) as error:
            if error_of(error).code() in REFUSALS and self.suspect:
                topics = " or ".join(map(repr, self.settings.written))
                raise RunError(f"topic {topics} cannot be written: {error_of(error).str()}") from None
            self.batch_refused = self.batch_refused or error_of(error).code() in REFUSALS

    def search(self) -> None:
        """Search for the record that was refused: all of a batch have the same report, so only a single one is named.

        What comes before it is committed, or else whoever skips it would skip that, too.
        """
        self.batch_refused = False
        self.suspects = max(self.suspects, self.pending.total(), 1)
        self.batch_size = max(1, self.batch_size // 10)
        log.warning("worker %s commits every %d records now, as some were refused", self.name, self.batch_size)

    def connect_producer(self) -> None:
        """Connect a producer, and begin its first transaction where there are any."""
        self.attempt += 1
        calls = {"error_cb": self.complain, "on_delivery": functools.partial(self.undelivered, self.attempt)}
        self.producer = Producer({**self.producer_properties, **calls}, logger=LIBRDKAFKA_LOG)
        if self.settings.exactly_once:
            within(COMMIT_LIMIT, self.producer.init_transactions, COMMIT_LIMIT)
            self.producer.begin_transaction()

    def undelivered(self, attempt: int, error: KafkaError, output: Message) -> None:
        """Take the report of a record that did not get to its topic; of the others there is none."""
        if attempt != self.attempt:  # its producer was given up, and its records are done again
            return
        if error.code() not in REFUSALS or self.suspect is None:
            self.batch_refused = self.batch_refused or error.code() in REFUSALS
            self.broken = self.broken or error.str()
            return
        REFUSED.inc()
        record, advice = self.suspect, "mend that; nothing after it is committed"
        if error.code() in RECORD_REFUSALS:
            at = f"--topic {record.topic()}:{record.partition()}"
            skip = f"{at} --reset-offsets --to-offset {(record.offset() or 0) + 1} --execute"
            command = f"kafka-consumer-groups.sh --group {self.settings.group} {skip}"
            advice = f"mend that (max.message.bytes?), or skip the record: {command}"
        what = f"{record.topic()}[{record.partition()}] offset {record.offset()}"
        self.refused = RunError(f"{what} is refused by topic {output.topic()!r}: {error.str()}; {advice}")

    def assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Note that partitions have come, and to which member."""
        self.fresh |= {part.partition for part in partitions}
        self.member, self.moved = consumer.memberid() or "", True
        REBALANCES.inc()

    def revoked(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Commit before another member reads on; no exception may leave a callback."""
        try:
            self.commit()
        except RunError as error:
            self.refused = error
        self.forget(partitions)

    def lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Give up what is not committed: another member may have begun with it."""
        if self.uncommitted():
            self.broken = "partitions were lost"
        log.warning("worker %s was put out of the group, and joins again", self.name)
        self.forget(partitions)

    def forget(self, partitions: list[TopicPartition]) -> None:
        """Forget how far partitions have come that belong to others now."""
        self.moved = True
        REBALANCES.inc()
        gone = {part.partition for part in partitions}
        self.fresh -= gone
        self.again = [record for record in self.again if record.partition() not in gone]
        for known in (self.ends, self.produced, self.committed, self.lag):
            for partition in gone & known.keys():
                del known[partition]
        if not self.produced:  # else the next owner's are counted with these
            self.pending.clear()

    def ask(self) -> None:
        """Ask what the group has committed: a bounded run ends with that, and so does trouble."""
        if not self.remaining and not self.trouble:
            return
        partitions = [TopicPartition(self.input_topic, number) for number in self.remaining or [0]]
        try:
            found = committed_offsets(self.asks, partitions, ASK_SECONDS)
        except KafkaException as error:
            if self.trouble:  # one time-out by itself is none
                self.in_trouble(error_of(error).str())
            return
        if self.trouble and not self.uncommitted():  # else the next commit tells
            self.all_is_well()
        if self.remaining:
            ranges = ((part, self.remaining[part.partition]) for part in found)
            left = {part.partition: range(max(part.offset, its.start), its.stop) for part, its in ranges}
            self.remaining = {number: its for number, its in left.items() if its}

    def note_lag(self) -> None:
        """Note how many records of each partition are not committed, up to the ends that the last fetch has told."""
        new = [part for part in self.consumer.assignment() if part.partition not in self.committed]
        if new and time.monotonic() - self.last_commit > LAG_SECONDS:  # a question may take half a second
            with suppress(KafkaException):
                for part in committed_offsets(self.asks, new, ASK_SECONDS):
                    self.committed[part.partition] = max(part.offset, 0)
        for number, offset in self.committed.items():
            _, end = self.consumer.get_watermark_offsets(TopicPartition(self.input_topic, number), cached=True)
            if end >= 0:  # else no fetch has told it
                self.lag[number] = max(0, end - offset)

    def complain(self, error: KafkaError) -> None:
        """Take what librdkafka says of its connections."""
        if error.code() in UNREACHABLE:  # librdkafka counts only the brokers that it has heard of
            self.in_trouble("no broker answers" if error.code() == KafkaError._ALL_BROKERS_DOWN else error.str())

    def in_trouble(self, reason: str) -> None:
        """Say that Kafka does not answer: once when it begins, and once a minute."""
        self.trouble, now = reason, time.monotonic()
        if now >= self.reminder:
            self.reminder = now + UNWELL_SECONDS
            log.warning("worker %s waits for Kafka: %s", self.name, reason)

    def all_is_well(self) -> None:
        """Say that Kafka answers again, where it did not."""
        now = time.monotonic()
        if self.trouble:
            log.info("worker %s goes on after %.0f s", self.name, now - self.up_to_date)
        self.trouble, self.reminder, self.up_to_date = "", 0.0, now

    def why_unwell(self) -> str | None:
        """Say why it has not got on for a minute; None where all is well."""
        now = time.monotonic()
        if now - self.waits_since > UNWELL_SECONDS:
            return f"worker {self.name} waits for the source of locations"
        waiting = now - self.up_to_date
        if waiting <= UNWELL_SECONDS + self.settings.commit_seconds:
            return None
        why = f"waits for Kafka: {self.trouble}" if self.trouble else f"has committed nothing for {waiting:.0f} s"
        return f"worker {self.name} {why}"

    def close(self) -> None:
        """Leave the group, whose other members would wait for the session's time-out, which they do if it fails."""
        self.last_turn = math.inf  # it has none any more
        if self.in_group:
            self.in_group = False  # a second call of close would take the consumer away from under the first
            with suppress(KafkaException, TimeoutError, RuntimeError):
                within(LEAVE_LIMIT, self.leave_group)

    def leave_group(self) -> None:
        """Leave the group with or without partitions: close by itself says nothing where there are none."""
        if not self.consumer.assignment():
            self.consumer.unsubscribe()
        self.consumer.close()


def remaining(consumer: Consumer, asks: Consumer, topic: str) -> dict[int, range]:
    """Find, by partition, the offsets that the group has not committed yet, up to those that consumer may read."""
    found = {}
    for part in committed_offsets(asks, partitions_of(asks, topic), CONNECT_SECONDS):
        low, end = consumer.get_watermark_offsets(part, timeout=CONNECT_SECONDS)
        if max(part.offset, low) < end:
            found[part.partition] = range(max(part.offset, low), end)
    return found


def partitions_of(client: Consumer | Producer, topic: str) -> list[TopicPartition]:
    """Find the partitions of a topic that is there; one that is not may come about by the question."""
    return [TopicPartition(topic, its) for its in client.list_topics(topic, CONNECT_SECONDS).topics[topic].partitions]


def committed_offsets(consumer: Consumer, partitions: list[TopicPartition], seconds: float) -> list[TopicPartition]:
    """Ask what the group has committed, again while its coordinator is about to begin."""
    limit = time.monotonic() + seconds
    while True:
        try:
            found = consumer.committed(partitions, timeout=seconds)
            if failed := [part.error for part in found if part.error]:
                raise KafkaException(failed[0])
            return found
        except KafkaException as error:
            if error_of(error).code() in REFUSALS or time.monotonic() > limit:
                raise
            time.sleep(0.1)


def commit_offsets(consumer: Consumer, offsets: list[TopicPartition]) -> None:
    """Commit offsets, and raise what any of their partitions says."""
    for committed in consumer.commit(offsets=offsets, asynchronous=False) or []:
        if committed.error:
            raise KafkaException(committed.error)


def retire(producer: Producer) -> None:
    """Let a producer go that nobody waits for; in a thread, for librdkafka may take its time."""
    with suppress(*CLIENT_FAILED):
        producer.purge()
        producer.flush(COMMIT_LIMIT)


def within(seconds: float, call: Callable[..., T], *arguments: Any) -> T:
    """Call something in a thread that can be left behind: librdkafka (#5511) and sockets do not keep all time-outs."""
    thread = ThreadPoolExecutor(1)
    called = thread.submit(call, *arguments)
    thread.shutdown(wait=False)
    if not wait([called], seconds).done:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return called.result()


def error_of(failure: BaseException | None) -> KafkaError:
    """Find Kafka's error in an exception, or in what made a SystemError of it (CLIENT_FAILED); make one of another."""
    cause = failure.__cause__ if isinstance(failure, SystemError) else failure
    found = cause.args[0] if cause and cause.args else None
    return found if isinstance(found, KafkaError) else KafkaError(KafkaError._APPLICATION, str(cause or failure))


def error_headers(record: Message, error: str) -> list[tuple[str, bytes]]:
    """Make the headers that tell, on the error topic, why a record is there and where it was."""
    values = {"error": error, "topic": record.topic(), "partition": record.partition(), "offset": record.offset()}
    return [(f"kafka_enrich.{name}", str(value).encode()) for name, value in values.items()]


def consumer_properties(settings: "Settings", brokers: str, number: int | None = None) -> dict[str, Any]:
    """Choose the properties of a worker's consumer, or without its number of one that asks and is no member."""
    chosen = {**settings.kafka_client, **settings.kafka_consumer}
    if number is None:
        chosen.pop("group.instance.id", None)
    elif "group.instance.id" in chosen and settings.processes * settings.bytewax_workers_per_process > 1:
        chosen["group.instance.id"] += f"-{number}"
    classic = {
        "partition.assignment.strategy": "cooperative-sticky",
        "heartbeat.interval.ms": 1_000,  # how long a rebalance waits for its members, and a stop for the rebalance
        "session.timeout.ms": 10_000,  # how long the partitions of a killed copy rest
    }
    return {
        **(classic if chosen.get("group.protocol", "classic").lower() == "classic" else {}),
        "topic.metadata.refresh.interval.ms": 10_000,  # how long new partitions are not seen
        # Each message that waits takes some 250 bytes beside its own, so that few wait, and more are fetched in time:
        # librdkafka looks once a second by itself, in which all that it may fetch at once has to wait. Where messages
        # may be larger it chooses how much that is, as it takes no less than one of them.
        **({} if "message.max.bytes" in chosen else {"fetch.max.bytes": 2_000_000}),
        "fetch.queue.backoff.ms": 5,
        "queued.min.messages": 20_000,
        **chosen,
        "bootstrap.servers": brokers,
        "group.id": settings.group,
        "auto.offset.reset": "earliest",  # prepare does what latest is for
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        # Of a member the offsets of an open transaction must not count; who asks would have to wait for its end.
        "isolation.level": "read_uncommitted" if number is None else "read_committed",
    }


def producer_properties(settings: "Settings", brokers: str, name: str) -> dict[str, Any]:
    """Choose the properties of a producer: transactions have a limit of time, what is sent at least once has none."""
    guarantee: dict[str, Any] = {"message.timeout.ms": 0}
    if settings.exactly_once:
        guarantee = {
            "transactional.id": f"{settings.group}-{name}",
            "transaction.timeout.ms": int(TRANSACTION_SECONDS + settings.commit_seconds) * 1000,
        }
    return {
        "message.max.bytes": 1_000_000_000,  # the topic's own limit decides
        "queue.buffering.max.kbytes": 262_144,  # what waits in memory for brokers
        # A partition's next batch goes out when the one before it is acknowledged. Where that takes longer than this,
        # librdkafka's thread does not sleep in between. What comes in small batches is flushed, and does not wait; what
        # comes one by one from the HTTP API is not, and keeps librdkafka's 5 ms.
        **({"linger.ms": 50} if settings.geoip_database else {}),
        # A broker that was frozen leads nothing for a moment, and who asks just then asks again after five minutes.
        "topic.metadata.refresh.interval.ms": 10_000,
        **settings.kafka_client,
        **settings.kafka_producer,
        "bootstrap.servers": brokers,
        "delivery.report.only.error": True,
        "enable.idempotence": True,
        "partitioner": "murmur2_random",  # as Java has it
        **guarantee,
    }


# --- Settings: the environment, checked -------------------------------------------------------------------------


class SettingsError(RunError):
    """A setting cannot be used; the message names it."""

    exit_code = 2


def like(pattern: str, description: str = "") -> Meta:
    """Describe a text that is wholly like a pattern, which may be a choice of words."""
    return Meta(pattern=rf"^(?:{pattern})\Z", description=description or pattern.replace("|", " or "))


def list_of(pattern: str, description: str) -> Meta:
    """Describe texts like a pattern, comma separated."""
    return like(rf" *(?:{pattern}) *(?:, *(?:{pattern}) *)*", description)


PORT = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
URL = rf"https?://{HOST}(:{PORT})?(/[A-Za-z0-9._~:/%-]*)?"
NOT = r"\"\\\x00-\x1f\ud800-\udfff,"  # in names of members; msgspec has none with quotes, backslashes or controls
PATH = rf"/([^{NOT}~]|~[01])*|[^{NOT}./\s][^{NOT}.]*(\.[^{NOT}.]+)*"
Topic = Annotated[str, like(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}", "a topic's name (1 to 249 of A-Z a-z 0-9 . _ -)")]
Count = Annotated[int, Meta(ge=1, le=64, description="a whole number from 1 to 64")]
Fields = Annotated[str, list_of(rf"[^,=]+|[A-Za-z0-9_]+= *({PATH})", "names of fields, or name=path, comma separated")]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment asks for: each field is the variable of that name in capitals."""

    kafka_brokers: Annotated[str, list_of(f"{HOST}:{PORT}", "host:port, comma separated")] = "localhost:9092"
    kafka_input_topic: Topic = "ip_address_by_country"
    kafka_output_topic: Topic = "ip_address_by_location"
    kafka_error_topic: Topic = ""
    kafka_group_id: Annotated[str, like(r"[!-~]{1,200}", "a consumer group's name")] = ""
    kafka_tail: Annotated[bool, Meta(description="0 or 1")] = False
    delivery_guarantee: Annotated[str, like("at_least_once|exactly_once")] = "at_least_once"
    commit_seconds: Annotated[float, Meta(ge=0.05, le=60, description="a number from 0.05 to 60")] = 0
    ip_field: Annotated[str, list_of(PATH, "a path such as client.ip or /client/ip, or several")] = ""
    location_field: Annotated[str, list_of(rf"[^{NOT}\s][^{NOT}]*", "the name of a member, or several")] = "location"
    fields: Fields = "city,region,country_name"
    geoip_database: Annotated[str, list_of("[^,]+", "the path of an .mmdb file, or several, comma separated")] = ""
    geoip_language: Annotated[str, like("[a-z]{2}(-[A-Z]{2})?", "a language, as en or pt-BR")] = "en"
    ipapi_url: Annotated[str, like(URL, "http(s)://host[:port][/path], without a key")] = "https://ipapi.co"
    ipapi_key: Annotated[str, like("[!-~]+", "visible characters")] = ""
    on_lookup_failed: Annotated[str, like("mark|stop|wait")] = "mark"
    cache_size: Annotated[int, Meta(ge=0, le=10_000_000, description="a whole number from 0 to 10000000")] = 100_000
    log_level: Annotated[str, like("DEBUG|INFO|WARNING|ERROR")] = "INFO"
    metrics_port: Annotated[int, Meta(ge=1, le=65_535, description="a port from 1 to 65535")] = 0
    processes: Count = 1
    bytewax_workers_per_process: Count = 1
    kafka_client: dict[str, str] = {}
    kafka_consumer: dict[str, str] = {}
    kafka_producer: dict[str, str] = {}

    @property
    def group(self) -> str:
        """The consumer group: who shares the work, and where it stands."""
        return self.kafka_group_id or f"{self.kafka_input_topic}-to-{self.kafka_output_topic}"

    @property
    def written(self) -> list[str]:
        """The topics that are written to."""
        return [topic for topic in (self.kafka_output_topic, self.kafka_error_topic) if topic]

    @property
    def exactly_once(self) -> bool:
        """Whether records and offsets are written in transactions."""
        return self.delivery_guarantee == "exactly_once"

    def seconds_between_commits(self, lag: int) -> float:
        """How often a worker commits: readers wait for the end of a transaction, and for a backlog anyway."""
        return self.commit_seconds or (1 if not self.exactly_once else 0.1 if lag < BACKLOG else 0.3)

    def __repr__(self) -> str:
        """Show what was set, and of secrets nothing: of properties only the names."""
        default, shown = Settings(), msgspec.structs.replace(self, ipapi_key="(set)" if self.ipapi_key else "")
        values = {
            name.upper(): " ".join(value) if isinstance(value, dict) else int(value) if value is True else value
            for name, value in msgspec.structs.asdict(shown).items()
            if value != getattr(default, name)
        }
        return ", ".join(f"{name}={value}" for name, value in values.items()) or "all settings have their defaults"


PROPERTIES = ("KAFKA_CLIENT_", "KAFKA_CONSUMER_", "KAFKA_PRODUCER_")  # before a property's name in capitals
NAMES = {name.upper(): hint for name, hint in Settings.__annotations__.items() if hint != dict[str, str]}
BY_GROUP = "BYTEWAX_ADDRESSES BYTEWAX_HOSTFILE_PATH BYTEWAX_POD_NAME BYTEWAX_PROCESS_ID BYTEWAX_STATEFULSET_NAME"
FORMER = {
    "EPOCH_SECONDS": "COMMIT_SECONDS has taken its place",
    "RECOVERY_DIR": "the consumer group keeps the place",
    **dict.fromkeys(BY_GROUP.split(), "each copy of the script is a member of the consumer group"),
}
# Properties that carry the guarantee, and that settings of this script decide.
GUARDED = set(
    """
    acks bootstrap.servers default.topic.config delivery.report.only.error delivery.timeout.ms enable.auto.commit
    enable.auto.offset.store enable.idempotence enable.partition.eof group.id isolation.level message.timeout.ms
    metadata.broker.list partitioner request.required.acks transaction.timeout.ms transactional.id
    """.split()
)


def with_settings_file(env: Mapping[str, str], path: Path) -> dict[str, str]:
    """Add to the environment what a settings file says, of which the environment has the last word."""
    found = dict[str, str]()
    try:
        lines = list(parse_stream(io.StringIO(path.read_text("utf-8")))) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    for line in lines:
        if line.error:
            raise SettingsError(f"{path}: in or after line {line.original.line} is something else than NAME=value")
        if line.key is None:  # a comment
            continue
        if line.value is None:
            raise SettingsError(f"{path}: {line.key!r} has no value")
        if not (line.key in NAMES or line.key in FORMER or line.key.startswith(PROPERTIES)):
            raise SettingsError(f"{path}: {line.key!r} is no setting{meant(line.key)}")
        found[line.key] = line.value
    return {**found, **env}


def meant(name: str) -> str:
    """Ask whether a setting is meant that has a similar name, if there is one."""
    similar = difflib.get_close_matches(name, NAMES, 1, 0.85)
    return f"; is {similar[0]} meant?" if similar else ""


def read_settings(env: Mapping[str, str]) -> Settings:
    """Read the settings from a mapping such as os.environ; a SettingsError has a line for each that cannot be used."""
    values: dict[str, Any] = {}
    wrong = []
    for name in [name for name in NAMES if name in env]:
        try:
            values[name.lower()] = msgspec.convert(env[name], NAMES[name], strict=False)
        except (msgspec.ValidationError, UnicodeEncodeError):
            # What does not look like a URL may hold a password, too.
            shown = name if name in ("IPAPI_KEY", "IPAPI_URL") else f"{name}={env[name]!r}"
            wrong.append(f"{shown} is not {NAMES[name].__metadata__[0].description}")
    for prefix in PROPERTIES:
        names = {name: name[len(prefix) :].lower().replace("_", ".") for name in env if name.startswith(prefix)}
        values[prefix[:-1].lower()] = {its: env[name] for name, its in names.items()}
        wrong += [f"{name}{why}" for name, its in names.items() if (why := why_refused(its, env[name]))]
    settings = Settings(**values)
    if wrong := wrong or contradictions(settings):
        raise SettingsError("\n".join(wrong))
    return settings


def why_refused(its: str, value: str) -> str | None:
    """Say why a property of librdkafka cannot be used; what else is wrong with one librdkafka says."""
    if its in GUARDED:
        return " would break the guarantee: leave it out; see DELIVERY_GUARANTEE, KAFKA_BROKERS, KAFKA_GROUP_ID"
    if re.search("[\ud800-\udfff]", value):
        return " is not UTF-8"
    if its == "auto.offset.reset" and value not in ("earliest", "latest"):
        return f"={value!r} is not earliest or latest"
    if its.endswith(".location") and value != "probe" and not os.path.exists(value):  # librdkafka does not name it
        return f"={value!r}: No such file or directory"
    return None


def contradictions(settings: Settings) -> list[str]:
    """Find settings that do not go together, and say so in a line for each."""
    paths, members = split_names(settings.ip_field), split_names(settings.location_field)
    topics, processes = (settings.kafka_input_topic, settings.kafka_output_topic), settings.processes
    names, language = split_names(settings.fields), settings.geoip_language
    titles = [name.partition("=")[0] for name in names]
    unknown = [name for name in titles if name in names and name not in (*FIELDS, "ip", "error")]
    unequal, read = settings.ip_field and len(paths) != len(members), {path_of(path)[0] for path in paths}
    rules = (
        ("fields", unknown, f"has {', '.join(unknown)}; known are {', '.join(FIELDS)}, or name=path"),
        ("fields", len(set(titles)) < len(titles), "has a name twice"),
        ("fields", {"ip", "error"} & set(titles), "has ip or error, names that the output has itself"),
        ("geoip_language", language != "en" and not settings.geoip_database, "is of no use without GEOIP_DATABASE"),
        ("kafka_output_topic", topics[0] == topics[1], "is the input topic too"),
        ("kafka_error_topic", settings.kafka_error_topic in topics, "is the input or the output topic too"),
        ("location_field", len(set(members)) < len(members), "has a name twice"),
        ("location_field", members != ["location"] and not settings.ip_field, "is of no use without IP_FIELD"),
        ("location_field", read & set(members), f"is what IP_FIELD={settings.ip_field!r} reads"),
        ("ip_field", unequal, f"needs as many names in LOCATION_FIELD={settings.location_field!r}"),
        ("metrics_port", settings.metrics_port + processes > 65_536, f"is too high for {processes} processes"),
    )
    return [f"{name.upper()}={getattr(settings, name)!r} {why}" for name, broken, why in rules if broken]


def doubtful_names(env: Mapping[str, str]) -> list[str]:
    """Find variables that look like a misspelt setting, or that were one, and say what to do."""
    lines = [f"{name} is ignored: {why}" for name, why in FORMER.items() if name in env]
    others = sorted(name for name in env.keys() - NAMES.keys() - FORMER.keys() if not name.startswith(PROPERTIES))
    lines += [f"{name} is no setting{meant(name)}" for name in others if meant(name)]
    protocols = [env[name] for name in env if name.endswith("_SECURITY_PROTOCOL") and name.startswith(PROPERTIES)]
    if any(re.match("KAFKA_[A-Z]+_SASL_", name) for name in env) and "SASL" not in "".join(protocols).upper():
        lines.append("KAFKA_CLIENT_SASL_* is of no use without KAFKA_CLIENT_SECURITY_PROTOCOL=SASL_SSL")
    return lines


# --- Addresses --------------------------------------------------------------------------------------------------

Address = tuple[str, str, bool]  # as it stands, but for a port; in the form that sources know; whether it is public


class NotLocated(Exception):
    """An address has no location: invalid_ip, reserved_ip (nobody's on the public Internet), or not_found."""


class LookupFailed(Exception):
    """The source did not answer; it may the next time, so that this is never remembered."""


# IANA's special-purpose registries (iana-ipv4-special-registry, iana-ipv6-special-registry) as of April 2025: blocks
# that are not globally reachable, and, where a block lies in another one, what is. Of IPv6 only 2000::/3 is in use.
RESERVED_4 = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.9/32 192.0.0.10/32
    192.0.2.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
"""
RESERVED_6 = """
    ::/3 2001::/23 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:3::/32 2001:4:112::/48 2001:20::/28 2001:30::/28
    2001:db8::/32 3fff::/20 4000::/2 8000::/1
"""
# Of addresses of which no other byte matters: all blocks but the last lie within one first byte.
PUBLIC_FIRST_BYTES = {*range(224)} - {int(block.partition(".")[0]) for block in RESERVED_4.split()}
# Where an IPv4 address stands in an IPv6 address: mapped (RFC 4291), NAT64 (RFC 6052), 6to4 (RFC 3056).
EMBEDDED = ((bytes(10) + b"\xff\xff", 12), (bytes.fromhex("0064ff9b") + bytes(8), 12), (bytes.fromhex("2002"), 2))
# How an address is written: in brackets with a port or without one, IPv4 with a port, or as it is.
WRITTEN = re.compile(r"\[(\S+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}|(\S+)")
OBJECT = re.compile(r'[\s"]*\{.*\}[\s"]*', re.DOTALL)


def edges(blocks: str) -> list[int]:
    """Find the addresses at which what is reserved begins or ends."""
    networks = [ipaddress.ip_network(block) for block in blocks.split()]
    return sorted(edge for network in networks for edge in (int(network[0]), int(network[-1]) + 1))


EDGES = {4: edges(RESERVED_4), 16: edges(RESERVED_6)}  # by the number of bytes of an address


def find_address(text: str) -> Address:
    """Find the address that counts in a text: its first public one from the left, or else its first one."""
    try:
        if socket.inet_pton(socket.AF_INET, text)[0] in PUBLIC_FIRST_BYTES:  # as nearly all are
            return text, text, True
    except (OSError, ValueError):
        pass
    if text.startswith("["):  # an array in JSON, or an address in brackets
        with suppress(ValueError, RecursionError):
            text = address_in(msgspec.json.decode(text))
    first = None
    for part in () if OBJECT.fullmatch(text) else text.split(","):  # a member of an object may look like one
        found = parse_address(part)
        if found and found[2]:
            return found
        first = first or found
    if first is None:
        raise NotLocated("invalid_ip")
    return first


def parse_address(text: str) -> Address | None:
    """Read one address; an IPv4 address inside an IPv6 address counts as that."""
    match = WRITTEN.fullmatch(text.strip(' \t\r\n"'))
    stood = match[match.lastindex or 0] if match else ""
    try:
        if ":" in stood:  # perhaps with a zone, which says where a packet leaves, and not where the address is
            packed = socket.inet_pton(socket.AF_INET6, stood.partition("%")[0])
            for prefix, start in EMBEDDED:
                if packed.startswith(prefix):
                    packed = packed[start : start + 4]
                    break
        else:
            packed = socket.inet_pton(socket.AF_INET, stood)
    except (OSError, ValueError):
        return None
    asked = socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
    return stood, asked, bisect.bisect(EDGES[len(packed)], int.from_bytes(packed, "big")) % 2 == 0


# --- Locations: their fields, wherever a source has them --------------------------------------------------------

Read = Callable[[object], object]  # takes what stands in a record, and returns None where it says nothing
ReadLocation = Callable[[object, Location], Location]  # of a record, and what is known already
CODE = re.compile("([A-Z]{2}-)?[A-Z0-9]{1,3}")


def as_text(value: object) -> str | None:
    """Read a text; placeholders say nothing."""
    found = value.strip() if isinstance(value, str) else ""
    return found if found not in {"", "-", "ZZ"} else None


def as_code(value: object) -> str | None:
    """Read the code of a country, a region or a continent, where some databases have its name."""
    found = as_text(value)
    return found if found and CODE.fullmatch(found) else None


def as_degrees(value: object) -> float | None:
    """Read a latitude or a longitude, which some databases have as text."""
    try:
        found = float(value if isinstance(value, float) else str(value))
    except ValueError:
        return None
    return found if -180 <= found <= 180 else None


def as_asn(value: object) -> str | None:
    """Read the number of an autonomous system, as AS13335."""
    match = re.fullmatch("(?:AS)?([1-9][0-9]*)", str(value))
    return f"AS{match[1]}" if match else None


def in_eu(value: object) -> bool | None:
    """Read a flag, or whether a country of MaxMind's schema is in the European Union: only those that are say so."""
    if isinstance(value, dict):  # with a geoname_id it is MaxMind's
        value = value.get("is_in_european_union", False if "geoname_id" in value else None)
    return value if isinstance(value, bool) else None


def anything(value: object) -> object:
    """Read a value of whatever type, in a form that JSON has."""
    if isinstance(value, dict):
        return {name: anything(its) for name, its in value.items()}
    if isinstance(value, list):
        return [anything(its) for its in value]
    large = isinstance(value, int) and not -(2**63) <= value < 2**64
    return as_text(str(value)) if isinstance(value, str) or large else value


COUNTRY_CODES = "country_code country country.iso_code registered_country.iso_code"
# What a location can hold, in ipapi.co's words: how it is read, and from where, flat schemas (DB-IP, IPinfo,
# ip-location-db, ipapi.co) before MaxMind's, and names before codes. In a path * is the language, or else English.
FIELDS: dict[str, tuple[Read, str]] = {
    "city": (as_text, "city city.names.*"),
    "region": (as_text, "region_name region state1 subdivisions.0.names.*"),
    "region_code": (as_code, "region_code region subdivisions.0.iso_code"),
    "country_name": (as_text, f"country_name country country.names.* registered_country.names.* {COUNTRY_CODES}"),
    "country_code": (as_code, COUNTRY_CODES),
    "continent_code": (as_code, "continent_code continent continent.code"),
    "postal": (as_text, "postal postal_code postcode postal.code"),
    "latitude": (as_degrees, "latitude lat location.latitude"),
    "longitude": (as_degrees, "longitude lng lon location.longitude"),
    "timezone": (as_text, "timezone time_zone location.time_zone"),
    "in_eu": (in_eu, "in_eu country registered_country"),
    "asn": (as_asn, "asn autonomous_system_number traits.autonomous_system_number"),
    "org": (as_text, "org as_name name autonomous_system_organization traits.autonomous_system_organization"),
    "network": (as_text, "network"),
}


def unknown_location(fields: str) -> Location:
    """Make a location of which nothing is known."""
    return dict.fromkeys(field.partition("=")[0] for field in split_names(fields))


def location_reader(fields: str, language: str) -> ReadLocation:
    """Make a function that reads from a record, in whichever schema it is, what of a location is not known yet."""
    places: list[tuple[str, Read, str, list[str]]] = []
    for field in split_names(fields):
        title, _, path = field.partition("=")
        read, paths = (anything, [path.strip()]) if path else (FIELDS[title][0], FIELDS[title][1].split())
        in_words = dict.fromkeys(path.replace("*", name) for path in paths for name in (language, "en"))
        places += [(title, read, first, rest) for first, *rest in map(path_of, in_words)]
    pair = {"latitude", "longitude"} & unknown_location(fields).keys()

    # By the members of records: databases have some tens of these, and nearly all places are in none of them.
    places_in = functools.lru_cache(1_000)(lambda members: [place for place in places if place[2] in members])

    def read_location(record: object, known: Location) -> Location:
        if not isinstance(record, dict):
            return known
        location = known.copy()
        for title, read, first, rest in places_in(tuple(record)):
            if location[title] is None:
                location[title] = read(value_at(record[first], rest) if rest else record[first])
        if pair and None in map(location.get, pair):  # half a place is none
            location.update(dict.fromkeys(pair))
        return location

    return read_location


def value_at(record: object, path: list[str]) -> object:
    """Follow a path through a record or an event; None where it leads nowhere."""
    found = record
    for key in path:
        if isinstance(found, dict):
            found = found.get(key)
        elif isinstance(found, list) and PLACE.fullmatch(key) and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


# --- Locations in databases -------------------------------------------------------------------------------------

LOOK_SECONDS = 2.0  # between two looks at the files; one that is the same at both is not being written
SAMPLE = 100_000  # networks of a database that are searched for a field before it is refused


class Database:
    """A database that is open, and holds some of the fields that are wanted."""

    def __init__(self, path: str, settings: "Settings") -> None:
        self.path, self._read = path, location_reader(settings.fields, settings.geoip_language)
        self._nowhere = unknown_location(settings.fields)
        self.mark = self.seen = mark_of(path)  # of the file that was opened or refused last, and at the last look
        try:
            self._reader = open_copy(path)
            metadata = self._reader.metadata()
            self.kind, self._version = metadata.database_type, metadata.ip_version
            self.built = datetime.fromtimestamp(metadata.build_epoch, timezone.utc)
            usable = any(location != self._nowhere for location in self.sample())
        except OSError as error:
            raise SettingsError(f"GEOIP_DATABASE: {path} cannot be read: {error.strerror}") from None
        except (ValueError, OverflowError, maxminddb.InvalidDatabaseError, LookupFailed):
            raise SettingsError(f"GEOIP_DATABASE: {path} is no MaxMind database, or has to be unpacked") from None
        if mark_of(path) != self.mark:
            raise SettingsError(f"GEOIP_DATABASE: {path} is being written")
        if not usable:
            raise SettingsError(f"GEOIP_DATABASE: {path}, {self.kind}, has none of FIELDS={settings.fields}")
        log.info("locating with %s, %s of %s", path, self.kind, self.built.date())

    def sample(self) -> Iterator[Location]:
        """Find what the first networks have, and then all of IPv4 in large steps."""
        first = (str(network[0]) for network, _ in itertools.islice(self._reader, SAMPLE))
        steps = (str(ipaddress.IPv4Address(number)) for number in range(0, 1 << 32, (1 << 32) // SAMPLE))
        return (self.find(address, self._nowhere) for address in itertools.chain(first, steps))

    def find(self, address: str, known: Location) -> Location:
        """Find what the database adds to what is known of an address."""
        if ":" in address and self._version == 4:
            return known
        try:
            record = self._reader.get(address)
        except (ValueError, maxminddb.InvalidDatabaseError):  # the file is damaged at this record
            raise LookupFailed(f"{self.path} is damaged at {address}") from None
        if record is None:
            return known
        location = self._read(record, known)
        # A record that tells nothing else has no network to tell either, unless that is all that is wanted.
        if location.get("network", "") is None and (location != known or len(known) == 1):
            _, length = self._reader.get_with_prefix_len(address)
            location["network"] = str(ipaddress.ip_network((address, length), strict=False))
        return location


def mark_of(path: str) -> tuple[int, ...]:
    """Tell a file from any other that was or will be in its place; empty where there is none."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return ()


def open_copy(path: str) -> maxminddb.Reader:
    """Open a copy of a file in memory, as quick: the mapping of a file that is overwritten kills the process."""
    with (
        open(path, "rb") as file,
        os.fdopen(os.memfd_create("mmdb"), "wb") if sys.platform == "linux" else tempfile.TemporaryFile() as copy,
    ):
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        return maxminddb.open_database(f"/dev/fd/{copy.fileno()}", maxminddb.MODE_MMAP_EXT)


class Databases:
    """The databases that are in use, and the files that they came from."""

    def __init__(self, settings: "Settings") -> None:
        self._settings, self._nowhere = settings, unknown_location(settings.fields)
        self.in_use = [Database(path, settings) for path in split_names(settings.geoip_database)]
        self.swaps = self.refusals = 0

    def locate(self, address: str, public: bool) -> Location:
        """Ask the databases in their order, each for the fields that are not known yet, as Locate has it."""
        location = self._nowhere
        for database in self.in_use:
            if None in location.values():
                location = database.find(address, location)
        if location == self._nowhere:
            raise NotLocated("not_found" if public else "reserved_ip")
        return location

    def look(self) -> bool:
        """Use files that are new and not being written, or refuse each with one warning; tell whether any is used."""
        newest = self.in_use.copy()
        for number, database in enumerate(self.in_use):
            mark = mark_of(database.path)
            changing, database.seen = mark != database.seen, mark
            if changing or mark == database.mark:
                continue
            database.mark = mark
            try:
                newest[number] = Database(database.path, self._settings)
                self.swaps += 1
            except SettingsError as error:
                self.refusals += 1
                log.warning("%s; the one of %s stays in use", error, database.built.date())
        before, self.in_use = self.in_use, newest  # all together
        return newest != before


def follow_files(databases: Databases, locations: "Locations") -> NoReturn:
    """Use databases that take the place of those in use."""
    while True:
        time.sleep(LOOK_SECONDS)
        if databases.look():
            locations.forget()


# --- Locations over HTTP ----------------------------------------------------------------------------------------

LOOKUP_LIMIT = 4.0  # s for one address, retries included: a stop waits for it
CONNECT_LIMIT = 1.5  # s
LARGEST_REPLY = 65_536  # bytes; a location takes about 800
FAILURES_IN_A_ROW = 5  # before the API is left alone
PAUSE_SECONDS, LONGEST_PAUSE = 60.0, 86_400
OF_EVERY_REPLY = {"city", "region", "country_name"}
FINAL_REASONS = {"Reserved IP Address": "reserved_ip", "Invalid IP Address": "invalid_ip"}
logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # its lines hold the URL, and that one the key


class Again(Retry):
    """What is tried again: a connection that failed or was dropped, and errors of the server."""

    def increment(self, *arguments: Any, **named: Any) -> "Again":
        """Count a try, but for an answer that is slow: what is asked again has its price, and is no quicker."""
        if isinstance(named.get("error"), urllib3.exceptions.ReadTimeoutError):
            raise named["error"]
        return super().increment(*arguments, **named)


class HttpApi:
    """The HTTP API of ipapi.co, asked for a bounded time and left alone when it asks for that."""

    def __init__(self, settings: "Settings") -> None:
        self._url = settings.ipapi_url.rstrip("/")
        self._nowhere = unknown_location(settings.fields)
        self._read = location_reader(settings.fields, settings.geoip_language)
        self._session = requests.Session()
        self._session.params = {"key": settings.ipapi_key or None}
        self._session.headers["User-Agent"] = f"kafka_enrich {requests.utils.default_user_agent()}"
        again = Again(2, backoff_factor=0.1, status_forcelist=range(500, 600), raise_on_status=False)
        again.respect_retry_after_header = False  # a pause is for all addresses, and not slept here
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64, max_retries=again))
        self._failures = 0  # in a row
        self._paused_until = 0.0  # on the clock of time.monotonic

    def locate(self, address: str, public: bool) -> Location:
        """Ask the API where an address is, as Locate has it: it sends errors with status 200 too, proxies anything."""
        if not public:
            raise NotLocated("reserved_ip")
        if time.monotonic() < self._paused_until:
            raise LookupFailed(f"{self._url} is left alone")
        try:
            status, retry_after, fields = within(LOOKUP_LIMIT, self._ask, address)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # requests' are OSErrors
            raise self._failure(cause_of(error)) from None
        reason = str(fields.get("reason"))
        if status in (401, 403, 429) or reason == "RateLimited":
            why = "rate limited" if reason == "RateLimited" else f"HTTP {status}"
            raise self._failure(why, retry_after, fields.get("wait"))
        located = status == 200 and not fields.get("error") and fields.keys() >= OF_EVERY_REPLY
        # A page that is not there, and does not give a reason, speaks of a wrong IPAPI_URL.
        if not located and reason not in FINAL_REASONS and not (status == 404 and "reason" in fields):
            raise self._failure(f"HTTP {status} without a location")
        self._failures = 0
        location = self._read(fields if located else {}, self._nowhere)
        if location == self._nowhere:
            raise NotLocated(FINAL_REASONS.get(reason, "not_found"))
        return location

    def _ask(self, address: str) -> tuple[int, str | None, dict[str, Any]]:
        """Fetch a reply of bounded size: its status, its Retry-After header, and the members of its body."""
        url = f"{self._url}/{address}/json/"
        with self._session.get(
            url, timeout=(CONNECT_LIMIT, LOOKUP_LIMIT), stream=True, allow_redirects=False
        ) as response:
            body = response.raw.read(LARGEST_REPLY, decode_content=True)
        fields: dict[str, Any] = {}
        with suppress(ValueError, RecursionError):
            fields = msgspec.json.decode(body, type=dict[str, Any])
        return response.status_code, response.headers.get("Retry-After"), fields

    def _failure(self, why: str, *waits: object) -> LookupFailed:
        """Count a failure, and leave the API alone where it says for how long, or after several of them."""
        self._failures += 1
        if (waits or self._failures >= FAILURES_IN_A_ROW) and time.monotonic() >= self._paused_until:
            pause = PAUSE_SECONDS
            for said in reversed(waits):  # in seconds or until a date (RFC 9110, 10.2.3); the first one counts
                with suppress(ValueError, OverflowError, urllib3.exceptions.HTTPError):
                    pause = max(1.0, Retry(retry_after_max=LONGEST_PAUSE).parse_retry_after(str(said)))
            self._paused_until = time.monotonic() + pause
            log.warning("%s: %s; left alone for %.0f s", self._url, why, pause)
        return LookupFailed(why)


def cause_of(error: BaseException) -> str:
    """Say why a request failed, without the URL that requests puts into its errors: it holds the key."""
    while error.__context__ is not None:
        error = error.__context__
    without_url = type(error) in (OSError, TimeoutError)  # of certificates that are not there, or of within
    return getattr(error, "strerror", None) or (str(error) if without_url else type(error).__name__)


# --- Events: the address is read, and nothing else is touched ---------------------------------------------------

PLACE = re.compile("0|[1-9][0-9]{0,8}")  # of an item in an array


def split_names(names: str) -> list[str]:
    """Take comma separated names apart."""
    return [name.strip() for name in names.split(",")]


def path_of(field: str) -> list[str]:
    """Read the path of a field: dotted (client.ip), or a JSON Pointer (/client/ip, RFC 6901) for names with dots."""
    if field.startswith("/"):
        return [name.replace("~1", "/").replace("~0", "~") for name in field[1:].split("/")]
    return field.split(".")


def event_reader(paths: list[list[str]], taken: list[str]) -> Callable[[bytes], list[str] | str]:
    """Make a function that reads the fields at some paths: the text of each, "" where there is none, or the result."""
    decode = msgspec.json.Decoder(event_type([*paths, *([name] for name in taken)])).decode

    def read(event: bytes) -> list[str] | str:
        body = event.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        try:
            found = decode(body)
        except (ValueError, RecursionError):  # it is not as event_type has it, or nothing that msgspec can read
            found = None
            with suppress(ValueError, RecursionError):  # float takes integers of any length, and int takes no NaN
                found = json.loads(body.decode("utf-8", "surrogateescape"), parse_int=float, parse_constant=int)
        if not isinstance(found, dict):
            return "invalid_record"
        if not found.keys().isdisjoint(taken):
            return "field_exists"
        return [address_in(value_at(found, path)) for path in paths]

    return read


def event_type(paths: list[list[str]]) -> Any:
    """Make a type that has the fields at some paths: msgspec skips all others, which takes it a microsecond."""
    if not all(path[0].isascii() for path in paths):  # msgspec 0.22 does not find these
        return dict[str, Any]
    fields: dict[str, Any] = {}
    for path in paths:
        rest = [other[1:] for other in paths if other[0] == path[0]]
        whole = any(not other or PLACE.fullmatch(other[0]) for other in rest)  # of arrays all is decoded
        fields[path[0]] = Any if whole else event_type(rest)
    make: Any = TypedDict  # mypy knows it with literal names only
    return make("Event", fields, total=False)


def address_in(field: object) -> str:
    """Read a field: a text, or an array of them; "" where it is empty, and what is no address of all else."""
    if isinstance(field, str):
        return field.strip()
    if isinstance(field, list):
        return ",".join(item if isinstance(item, str) else "?" for item in field if item not in (None, ""))
    return "" if field is None else "?"


# --- Counts and metrics -----------------------------------------------------------------------------------------

REPORT_SECONDS = 10
COUNTRIES = 250  # in the metrics; a database of one's own may have anything for a country


def counted(workers: list[Worker]) -> tuple[Counter[str], Counter[str]]:
    """Count the records that are committed, by result, and where METRICS_PORT is set those located by country."""
    results, countries = Counter[str](), Counter[str]()
    for worker in workers:
        for result, count in list(worker.counts.items()):  # a copy: its worker goes on counting
            result, _, country = result.partition(" ")
            results[result] += count
            if country:
                countries[country] += count
    return results, countries


def summary(workers: list[Worker], locations: Locations) -> str:
    """Say what became of the records that are committed."""
    counts, _ = counted(workers)
    results = ", ".join(f"{counts[result]} {result}" for result in RESULTS if counts[result])
    return f"{counts.total()} records{': ' if results else ''}{results}; {locations.hits()} from the cache"


def report(workers: list[Worker], locations: Locations, over: threading.Event) -> None:
    """Log every ten seconds what became of the records, and how many wait."""
    before = 0
    while not over.wait(REPORT_SECONDS):
        end_a_standstill(workers)
        records = sum(worker.counts.total() for worker in workers)
        lags = [lag for worker in workers for lag in list(worker.lag.values())]
        lag = f"lag {sum(lags)}" if lags else "lag unknown"
        log.info("%.0f/s, %s; %s", (records - before) / REPORT_SECONDS, lag, summary(workers, locations))
        before = records


def end_a_standstill(workers: list[Worker]) -> None:
    """End the program where a call of Kafka's client does not return, for whoever starts it again."""
    if any(time.monotonic() - worker.last_turn > STANDSTILL_SECONDS for worker in workers):
        log.error("ends, as Kafka's client has not returned for %d s: start it again", STANDSTILL_SECONDS)
        leave(1)


def show_progress(workers: list[Worker], over: threading.Event) -> None:
    """Show on a terminal how far the group has come with a bounded run, as the first of its workers sees it."""
    with logging_redirect_tqdm(), tqdm(unit=" records") as bar:
        last = False
        while not last:
            last = over.wait(ASK_SECONDS)
            end_a_standstill(workers)
            if workers[0].remaining is not None:
                bar.total = workers[0].total
                bar.update(bar.total - sum(map(len, workers[0].remaining.values())) - bar.n)


class Metrics(Collector):
    """What Prometheus reads, taken from the workers when it asks."""

    def __init__(self, workers: list[Worker], locations: Locations, databases: Databases | None) -> None:
        self._workers, self._locations, self._databases = workers, locations, databases

    def collect(self) -> Iterator[Metric]:
        """Take the numbers of this moment."""
        results, countries = counted(self._workers)
        every = {result: results[result] for result in RESULTS}
        yield labelled(CounterMetricFamily, "records", "Records committed, by what became of them.", "result", every)
        some = dict(countries.most_common(COUNTRIES))
        yield labelled(CounterMetricFamily, "located", "Those located, by country.", "country", some)
        lag = {str(number): count for worker in self._workers for number, count in sorted(worker.lag.items())}
        yield labelled(GaugeMetricFamily, "lag_records", "Records that are not committed.", "partition", lag)
        hits, entries = self._locations.hits(), self._locations.remembered.cache_info().currsize
        yield CounterMetricFamily("kafka_enrich_cache_hits", "Addresses answered from the cache.", hits)
        yield GaugeMetricFamily("kafka_enrich_cache_entries", "Answers in the cache.", entries)
        if self._databases:
            built = {database.path: database.built.timestamp() for database in self._databases.in_use}
            yield labelled(GaugeMetricFamily, "database_build_timestamp_seconds", "When built.", "path", built)
            looked = {"used": self._databases.swaps, "refused": self._databases.refusals}
            yield labelled(CounterMetricFamily, "database_swaps", "New files, used or refused.", "what", looked)


def labelled(family: Callable[..., Any], name: str, text: str, label: str, values: Mapping[str, float]) -> Any:
    """Make a metric that has a value for each of its label's."""
    metric = family(f"kafka_enrich_{name}", text, labels=[label])
    for value, number in values.items():
        metric.add_metric([value], number)
    return metric


REBALANCES = prometheus_client.Counter("kafka_enrich_rebalances", "Times that partitions came or went.")
REFUSED = prometheus_client.Counter("kafka_enrich_refused_records", "Records that a topic refused.")
COMMITS = Histogram("kafka_enrich_commit_seconds", "Commits, each with all that was produced since the last.")
LOOKUPS = Histogram(
    "kafka_enrich_lookup_seconds",
    "Look-ups that the cache had no answer to.",
    buckets=(0.00001, 0.0001, 0.001, 0.01, 0.1, 0.5, 1, 2, 4),  # a database takes some µs, the HTTP API up to 4 s
)
VERSIONS = {name.replace("-", "_"): importlib.metadata.version(name) for name in ("bytewax", "confluent-kafka")}
SCRIPT = {"python": platform.python_version(), "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
Info("kafka_enrich_build", "Versions.").info({**VERSIONS, **SCRIPT})


def serve_metrics(port: int, metrics: Metrics, workers: list[Worker]) -> None:
    """Serve metrics on a port, and on /healthz whether the workers get on."""
    REGISTRY.register(metrics)
    try:
        server, _ = start_http_server(port)
    except OSError as error:
        raise RunError(f"METRICS_PORT={port} cannot be used: {error.strerror}") from None
    serve = make_wsgi_app()

    def serve_health(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/metrics":
            return serve(environ, start_response)
        if environ["PATH_INFO"] != "/healthz":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"here are /metrics and /healthz\n"]
        reasons = [reason for worker in workers if (reason := worker.why_unwell())]
        start_response("503 Service Unavailable" if reasons else "200 OK", [("Content-Type", "text/plain")])
        return [f"{'; '.join(reasons) or 'ok'}\n".encode()]

    server.set_app(serve_health)


# --- The program ------------------------------------------------------------------------------------------------

CONNECT_SECONDS = 8.0  # to find brokers before the start
DISCONNECTED = "it closes the connection, as brokers do for a wrong password or security protocol (KAFKA_CLIENT_*)"
GARBAGE = 50_000  # objects; batches make thousands that live for milliseconds, and at 700 the search takes a tenth
STOP_SECONDS = 8.0  # after a signal; containers often give ten


class Stop(threading.Event):
    """What Ctrl-C and SIGTERM set; before anything is under way, and some seconds later, the process ends at once."""

    exit_code = 0
    under_way = False

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._tail = settings.kafka_tail
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._take)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if not self.under_way:
            leave(0 if self._tail else 128 + signum)
        if not self.exit_code:  # another one in the midst of set would wait for ever for its lock
            self.exit_code = 128 + signum
            self.set()
            threading.Timer(STOP_SECONDS, self._leave).start()

    def _leave(self) -> NoReturn:
        log.error("did not end within %.0f s: the next start does again what was not committed", STOP_SECONDS)
        leave(1)


Clients = tuple[Producer, Consumer, AdminClient, AdminClient]  # of the output, of the input, and who asks of each


def check_kafka(settings: Settings) -> Clients:
    """See that the brokers answer, and that the topics and the group may be used, and return the clients for that."""
    logger, said = logging.Logger("librdkafka"), BufferingHandler(10_000)  # of these clients alone
    logger.addHandler(said)
    clients = _, _, reader, writer = connect(settings, logger)
    every = {settings.kafka_input_topic: (reader, AclOperation.READ)}
    every |= dict.fromkeys(settings.written, (writer, AclOperation.WRITE))
    wanted: dict[str, Any] = {"include_authorized_operations": True, "request_timeout": CONNECT_SECONDS}
    group = reader.describe_consumer_groups([settings.group], request_timeout=CONNECT_SECONDS)[settings.group]
    found = {topic: its.describe_topics(TopicCollection([topic]), **wanted)[topic] for topic, (its, _) in every.items()}
    while not all(answer.done() for answer in found.values()):
        for client in clients:
            client.poll(0.02)  # each gives away what it logs only in its own poll
    lines = [record.getMessage() for record in said.buffer]
    failures = [(topic, failure) for topic, answer in found.items() if (failure := answer.exception())]
    if failures:  # when brokers cannot be reached the same is said of each topic
        raise RunError("\n".join(dict.fromkeys(why_not(settings, *failure, lines) for failure in failures)))
    for topic, (_, operation) in every.items():
        allowed = found[topic].result().authorized_operations
        if allowed and not {operation, AclOperation.ALL} & set(allowed):
            raise RunError(f"topic {topic!r} may not be used: no permission to {operation.name}")
    wait([group], timeout=1)  # of a group without permission only this tells more than a time-out
    if group.done() and error_of(group.exception()).code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
        raise RunError(f"group {settings.group!r} cannot be used: no permission to DESCRIBE and READ")
    return clients


def connect(settings: Settings, logger: logging.Logger) -> Clients:
    """Make clients, with which librdkafka checks its properties."""
    brokers = settings.kafka_brokers
    every: dict[str, Any] = {"bootstrap.servers": brokers}
    try:
        return (
            Producer(producer_properties(settings, brokers, "check"), logger=logger),
            Consumer(consumer_properties(settings, brokers), logger=logger),
            AdminClient({**settings.kafka_client, **settings.kafka_consumer, **every}, logger=logger),
            AdminClient({**settings.kafka_client, **settings.kafka_producer, **every}, logger=logger),
        )
    except KafkaException as error:
        raise SettingsError(f"{wrong_property(settings)}: {error_of(error).str()}") from None


def wrong_property(settings: Settings) -> str:
    """Find the property that a client does not take by itself: librdkafka may call it by another name."""
    for prefix, make in zip(PROPERTIES, (Producer, Consumer, Producer), strict=True):
        for its, value in getattr(settings, prefix[:-1].lower()).items():
            try:
                make({its: value} if make is Producer else {its: value, "group.id": "-"}, logger=LIBRDKAFKA_LOG)
            except KafkaException:
                return f"{prefix}{its.replace('.', '_').upper()}"
    return "KAFKA_CLIENT_*, KAFKA_CONSUMER_* and KAFKA_PRODUCER_* do not go together"


def why_not(settings: Settings, topic: str, failure: BaseException, said: list[str]) -> str:
    """Say why a topic cannot be used: what librdkafka logs of its connections tells more than a time-out."""
    if error_of(failure).code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        names = ("KAFKA_INPUT_TOPIC", "KAFKA_OUTPUT_TOPIC", "KAFKA_ERROR_TOPIC")
        name = next(name for name in names if getattr(settings, name.lower()) == topic)
        loader = ", or run: python load_data.py" if topic == getattr(Settings(), name.lower()) else ""
        return f"topic {topic!r} ({name}) does not exist: create it{loader}"
    if error_of(failure).code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return f"topic {topic!r} may not be used: no permission to DESCRIBE"
    failures = [line.partition("]: ")[2] for line in said if line.startswith("FAIL")]
    reason = min(failures, key=lambda its: not re.search("SASL|SSL|resolve", its), default=error_of(failure).str())
    # A broker that takes no such client just closes the connection, and one that is away refuses it.
    reason = DISCONNECTED if re.search("Disconnected|reset by peer", reason) else reason
    return f"Kafka at {settings.kafka_brokers} (KAFKA_BROKERS) cannot be used: {reason}"


def prepare(settings: Settings) -> None:
    """Check what a start needs of Kafka; for latest commit the ends for a group that is new, as a kill may follow."""
    check_kafka(settings)
    if {**settings.kafka_client, **settings.kafka_consumer}.get("auto.offset.reset") != "latest":
        return
    asks = Consumer(consumer_properties(settings, settings.kafka_brokers), logger=LIBRDKAFKA_LOG)
    # What is in a transaction that is open arrives when that ends.
    reads = Consumer(consumer_properties(settings, settings.kafka_brokers, 0), logger=LIBRDKAFKA_LOG)
    partitions = partitions_of(asks, settings.kafka_input_topic)
    offsets = committed_offsets(asks, partitions, CONNECT_SECONDS)
    if any(part.offset >= 0 for part in offsets):
        return  # partitions that are added later are read from their beginning
    for part in offsets:
        part.offset = reads.get_watermark_offsets(part, timeout=CONNECT_SECONDS)[1]
    try:
        commit_offsets(asks, offsets)
    except KafkaException as error:
        if error_of(error).code() not in REBALANCING:  # which tells that another copy was quicker, and has done it
            raise


def open_locations(settings: Settings) -> tuple[Locations, Databases | None]:
    """Open what the settings choose to locate with."""
    if settings.geoip_database:
        databases = Databases(settings)
        return Locations(databases.locate, settings), databases
    log.info("locating with %s, which is told the addresses", settings.ipapi_url)
    return Locations(HttpApi(settings).locate, settings), None


def enrich(settings: Settings, stop: Stop) -> int:
    """Check what can be checked before the start, run, and return the exit code."""
    log.info("%s", settings)
    copy = f"{socket.gethostname()}-{free_slot(settings.group)}"
    run = functools.partial(run_process, settings, copy, stop, *open_locations(settings))
    if settings.processes == 1:
        prepare(settings)
        stop.under_way = True
        exit_code = run(0)
    else:  # no client of librdkafka outlives a fork, so that this has a process of its own
        exit_code = run_processes([functools.partial(prepare, settings)], stop)
        stop.under_way = True
        each = [functools.partial(run, number) for number in range(settings.processes)]
        exit_code = exit_code or run_processes(each, stop)
    return 0 if settings.kafka_tail and exit_code == stop.exit_code else exit_code


def run_process(
    settings: Settings, copy: str, stop: Stop, locations: Locations, databases: Databases | None, number: int
) -> int:
    """Run the workers of one process of a copy, until they are done or a signal comes, and return the exit code."""
    each = settings.bytewax_workers_per_process
    workers = [Worker(settings, copy, worker, stop) for worker in range(number * each, (number + 1) * each)]
    if settings.metrics_port:
        serve_metrics(settings.metrics_port + number, Metrics(workers, locations, databases), workers)
    if databases:
        threading.Thread(target=follow_files, args=[databases, locations], daemon=True).start()
    over = threading.Event()
    watch = threading.Thread(target=report, args=[workers, locations, over])
    if settings.processes == 1 and sys.stderr.isatty() and not settings.kafka_tail:
        watch = threading.Thread(target=show_progress, args=[workers, over])
    watch.start()
    gc.freeze()  # what is there now stays
    gc.set_threshold(GARBAGE)
    try:
        run_dataflow(settings, workers, locations)
    finally:
        for worker in workers:
            worker.close()
        over.set()
        watch.join()
        log.info("%s", summary(workers, locations))
    return stop.exit_code


def free_slot(group: str) -> int:
    """Find a number that no other copy on this host has: it makes a transactional id, which a restart takes up again.

    A socket with an abstract name (Linux, man 7 unix) is free again whenever its process ends, in whatever way.
    """
    for number in range(1_000 if sys.platform == "linux" else 0):
        taken = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            taken.bind(f"\0kafka_enrich {group[:80]} {number}")
            taken.detach()  # and so it stays open as long as the process lives
            return number
    return os.getpid()


def run_processes(runs: Sequence[Callable[[], int | None]], stop: Stop) -> int:
    """Run each in a process of its own, end them all with the first that fails, and return the exit code."""
    running, parent, failed = dict[int, int](), os.getpid(), 0
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # some shells let it be ignored, and then there are no exit codes
    for number, run in enumerate([] if stop.is_set() else runs):
        if not (pid := os.fork()):
            threading.Thread(target=follow, args=[parent], daemon=True).start()
            leave(stop.exit_code if stop.is_set() else exit_code_of(run))
        running[pid] = number
    while running:
        time.sleep(0.05)
        for pid, number in list(running.items()):
            if failed or stop.is_set():
                os.kill(pid, signal.SIGTERM)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del running[pid]
            exit_code = os.waitstatus_to_exitcode(status)
            if exit_code in (1, 2):  # it has said why
                failed = failed or exit_code
            elif exit_code and not stop.is_set() and not failed:
                failed = 1
                log.error("process %d of %d ended with %d", number, len(runs), exit_code)
    return failed or stop.exit_code


def follow(parent: int) -> None:
    """Stop this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def exit_code_of(run: Callable[[], int | None]) -> int:
    """Run something, and say in a line why it failed where it did."""
    try:
        return run() or 0
    except BrokenPipeError:  # nobody reads standard output any more, as in `| head`
        return 0
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the engine wraps what a step raises
            cause = cause.__cause__
        if isinstance(cause, (KafkaException, TimeoutError)):
            cause = RunError(f"Kafka (KAFKA_BROKERS) cannot be used: {error_of(cause).str()}")
        if not isinstance(cause, RunError):
            log.exception("this is a fault of kafka_enrich.py")
            return 1
        for line in str(cause).splitlines():
            print(f"kafka_enrich.py: {line}", file=sys.stderr)
        return cause.exit_code


def leave(exit_code: int) -> NoReturn:
    """End the process without waiting for librdkafka's clients, whose end can hang when all is committed and said."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, RuntimeError, ValueError):  # closed, gone, full, or being flushed
            stream.flush()
    os._exit(exit_code)


def check(settings: Settings) -> None:
    """Do every check of a start, and print what it found."""
    _, databases = open_locations(settings)
    producer, asks, reader, _ = check_kafka(settings)
    topic, group, members = settings.kafka_input_topic, settings.group, 0
    with suppress(KafkaException):  # of a group that nobody has joined yet
        members = len(reader.describe_consumer_groups([group])[group].result(CONNECT_SECONDS).members)
    brokers = asks.list_topics(topic, CONNECT_SECONDS).brokers.values()
    print(f"brokers: {', '.join(sorted(map(str, brokers)))}")
    print(f"topic {topic}: {len(partitions_of(asks, topic))} partitions")
    for name in settings.written:
        print(f"topic {name}: {len(partitions_of(producer, name))} partitions")
    lag = sum(map(len, remaining(asks, asks, topic).values()))
    print(f"group {group}: members {members}, lag {lag}")
    print(f"fields: {', '.join(split_names(settings.fields))}")
    if databases is None:
        print(f"locations: {settings.ipapi_url}, which is not asked here")
        return
    for database in databases.in_use:
        print(f"database {database.path}: {database.kind} of {database.built.date()}")
    unseen = set(unknown_location(settings.fields))
    with suppress(LookupFailed):  # at a damaged record
        for location in itertools.chain.from_iterable(database.sample() for database in databases.in_use):
            unseen -= {field for field, value in location.items() if value is not None}
            if not unseen:
                break
    if unseen:
        print(f"in a sample of their records not found: {', '.join(sorted(unseen))}")


def try_out(settings: Settings, values: Sequence[bytes]) -> None:
    """Print what records with these values become, or with - the lines of standard input; Kafka is not asked."""
    locations, _ = open_locations(settings)
    try:
        with (
            open(0, "rb", closefd=False) if values == [b"-"] else nullcontext(values) as lines,
            open(1, "wb", closefd=False) as output,
        ):
            for number, line in enumerate(lines):
                record = Message(topic="values", partition=0, offset=number, value=line.rstrip(b"\r\n"))
                _, (answer, result) = locations.get_location(record)
                if result == WAITS:  # whoever looks on wants to know why
                    why = (answer or b"").decode()
                    raise RunError(
                        f"value {number + 1} waits for the source of locations: {why} (ON_LOOKUP_FAILED=wait)"
                    )
                output.write((answer or b"") + b"\n")
                output.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"standard input or output cannot be used: {error.strerror}") from None


def main() -> int:
    """Run the program, and return its exit code, as the top of this file has them."""
    parser = argparse.ArgumentParser(add_help=False, usage="python kafka_enrich.py [--help | --check | value ... | -]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-h", "--help", action="store_true")
    what.add_argument("--check", action="store_true")
    what.add_argument("values", nargs="*", type=os.fsencode, default=[])
    arguments = parser.parse_args()
    if arguments.help:
        chosen = {name: getattr(Settings(), name.lower()) for name in NAMES}
        default = {name: f" (default: {value})" if value else "" for name, value in chosen.items()}
        lines = [f"  {name:27}  {its.__metadata__[0].description}{default[name]}" for name, its in NAMES.items()]
        lines += [f"  {prefix + '*':27}  a property of librdkafka" for prefix in PROPERTIES]
        print(__doc__ or "", "Settings:\n", *lines, sep="\n")
        return 0
    environment = with_settings_file(os.environ, Path(__file__).with_name("kafka_enrich.env"))
    settings = read_settings(environment)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    log.setLevel(settings.log_level)
    LIBRDKAFKA_LOG.disabled = settings.log_level != "DEBUG"
    for line in doubtful_names(environment):
        log.warning("%s", line)
    stop = Stop(settings)
    if arguments.check:
        check(settings)
    elif arguments.values:
        try_out(settings, arguments.values)
    else:
        return enrich(settings, stop)
    return 0


if __name__ == "__main__":
    leave(exit_code_of(main))
