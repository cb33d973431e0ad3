"""The verbs of the fault tests: stream records in, start, stop, kill and freeze, and count what came out."""

import ipaddress
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, TopicPartition
from kafka import KafkaProducer
from kafka.producer.future import RecordMetadata

from conftest import PROJECT, SAMPLE_DATABASE, Topics, wait_until

logging.getLogger("kafka").setLevel(logging.CRITICAL)  # it says at length that brokers are away
FIRST_ADDRESS = int(ipaddress.IPv4Address("8.0.0.0"))  # record n has the n-th address after it
KEYS = 500
STOP_SECONDS = 2
# What people write first: offsets are committed by the clock, records wait for their turn.
BARE_LOOP = """
import sys
from confluent_kafka import Consumer, Producer
brokers, source, target = sys.argv[1:]
group = {"group.id": "bare", "auto.offset.reset": "earliest", "auto.commit.interval.ms": 100}
group["session.timeout.ms"] = 6000
consumer = Consumer({"bootstrap.servers": brokers, "partition.assignment.strategy": "cooperative-sticky", **group})
producer = Producer({"bootstrap.servers": brokers, "partitioner": "murmur2_random", "linger.ms": 1000})
consumer.subscribe([source])
while True:
    for message in consumer.consume(100, 0.1):
        producer.produce(target, b'{"ip":"%s"}' % message.value(), message.key())
    producer.poll(0)
"""


def record(number: int) -> tuple[bytes, bytes]:
    """The key and value of the record with a number."""
    return b"key-%d" % (number % KEYS), str(ipaddress.IPv4Address(FIRST_ADDRESS + number)).encode()


def number_of(value: bytes) -> int:
    """The number of a record, from its value in the input or in the output."""
    address = json.loads(value)["ip"] if value.startswith(b"{") else value.decode()
    return int(ipaddress.IPv4Address(address)) - FIRST_ADDRESS


class Stream:
    """Numbered records, written at a rate by a thread from its start until it is stopped.

    By kafka-python: librdkafka's producer can stand still for ever when a leader was gone (librdkafka#5430).
    """

    def __init__(self, topics: Topics, per_second: int, first: int) -> None:
        self.written = first
        self._topic = topics.input
        self._per_second = per_second
        self._stopped = threading.Event()
        patience = {"delivery_timeout_ms": 900_000, "max_block_ms": 900_000, "metadata_max_age_ms": 2000}
        self._producer = KafkaProducer(
            bootstrap_servers=topics.address.split(","), enable_idempotence=True, acks="all", linger_ms=5, **patience
        )
        self._thread = threading.Thread(target=self._write, daemon=True)  # a test that fails ends
        self._thread.start()

    def _write(self) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            for number in range(self.written, self.written + 50):
                key, value = record(number)
                self._producer.send(self._topic, key=key, value=value)
            self.written += 50
            due += 50 / self._per_second
            self._stopped.wait(max(0.0, due - time.monotonic()))

    def stop(self) -> int:
        """Write no more; how many were written, once the broker has all of them."""
        self._stopped.set()
        self._thread.join()
        self._producer.flush(300)
        self._producer.close()
        return self.written

    def abandon(self) -> None:
        """Leave what is not written yet: without this a failed test leaves a thread that knocks at a dead broker."""
        self._stopped.set()
        self._producer._sender.force_close()
        self._thread.join(10)
        self._producer.close(timeout=1)


class Reader:
    """Reads a topic from its beginning, as a read_committed consumer sees it."""

    def __init__(self, topics: Topics, topic: str) -> None:
        self._ended: dict[int | None, bool] = {}  # whether the end of each partition was reached
        reading = {"isolation.level": "read_committed", "enable.partition.eof": True, "enable.auto.commit": False}
        self._consumer = Consumer(
            {"bootstrap.servers": topics.address, "group.id": "not used", "log_level": 0, **reading}
        )

        def find_partitions() -> bool:  # of several brokers not all know a new topic at once
            self._ended = dict.fromkeys(self._consumer.list_topics(topic, 10).topics[topic].partitions, False)
            return bool(self._ended)

        wait_until(find_partitions)
        self._consumer.assign([TopicPartition(topic, number or 0, OFFSET_BEGINNING) for number in self._ended])

    def read(self, seconds: float) -> list[Message]:
        """What arrives within some seconds, or the first ten thousand records of it."""
        messages = []
        for message in self._consumer.consume(10_000, seconds):
            error = message.error()
            assert not error or not error.fatal(), error
            if not error:
                messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._ended[message.partition()] = True
        return messages

    def read_all(self) -> Iterator[Message]:
        """All there is, and close."""
        give_up = time.monotonic() + 120
        while not all(self._ended.values()):
            assert time.monotonic() < give_up, "the end of a topic was not reached"
            yield from self.read(0.2)
        self.close()

    def close(self) -> None:
        self._consumer.close()


class Tally:
    """Counts numbered records."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self.seen: Counter[int] = Counter()
        self.newest = -1
        self.last_value = b""
        self.out_of_order = 0  # of first sightings, within a key
        self._last: dict[bytes, int] = {}
        self.add(messages)

    def add(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.last_value = message.value() or b""
            number, key = number_of(self.last_value), message.key() or b""
            assert key == record(number)[0]
            if number not in self.seen:
                self.out_of_order += number < self._last.get(key, -1)
                self._last[key] = number
            self.seen[number] += 1
            self.newest = max(number, self.newest)

    @property
    def doubled(self) -> int:
        return sum(self.seen.values()) - len(self.seen)


@dataclass
class Copy:
    """One copy of the script that was started, with the processes that it started itself."""

    process: "subprocess.Popen[bytes]"
    environment: dict[str, str]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> dict[int, int]:
        """The resident MB of each living process of its session, by its id."""
        command = ["ps", "-o", "pid=,rss=", "-s", str(self.process.pid)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        found = [line.split() for line in listed]  # what has ended, and waits to be asked for, has no memory
        return {int(pid): int(size) // 1024 for pid, size in found if int(size)}


class Trial:
    """One fault: records that are written, copies of kafka_enrich.py that follow them, and what has come out."""

    def __init__(self, topics: Topics, guarantee: str, folder: Path, per_second: int) -> None:
        self.topics = topics
        self.copies: list[Copy] = []
        self.supervised = False  # whether a copy that ends with exit code 1 is started again
        self.restarts = 0
        self.guarantee = guarantee
        self._per_second = per_second
        self._folder = folder
        self._started = 0
        self._stream: Stream | None = None
        self._written = 0
        self._reader = Reader(topics, topics.output)
        self._out = Tally()

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_exception: object) -> None:
        for copy in self.copies:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(copy.process.pid, signal.SIGKILL)
            copy.process.wait()
        if self._stream:
            self._stream.abandon()
        self._reader.close()

    @property
    def written(self) -> int:
        return self._stream.written if self._stream else self._written

    def write(self, count: int, headers: Sequence[tuple[str, bytes]] = ()) -> list[RecordMetadata]:
        """Write so many records at once; where they lie."""
        numbers = range(self._written, self._written + count)
        self._written += count
        return self.topics.write([record(number) for number in numbers], headers)

    def stream(self) -> None:
        """Write records at a rate from now on."""
        self._stream = Stream(self.topics, self._per_second, self._written)

    def end_stream(self) -> None:
        """Write no more."""
        if self._stream:
            self._written, self._stream = self._stream.stop(), None

    def start(self, **environment: str) -> Copy:
        """Start a copy that follows the topic, or does what the environment says."""
        source = {} if "IPAPI_URL" in environment else {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}
        defaults = {"PATH": os.environ["PATH"], "KAFKA_TAIL": "1", "DELIVERY_GUARANTEE": self.guarantee, **source}
        environment = {**defaults, **self.topics.environment(), **environment}
        log = self._folder / f"copy-{self._started}.log"
        self._started += 1
        self.copies.append(Copy(run(log, str(PROJECT / "kafka_enrich.py"), env=environment), environment, log))
        return self.copies[-1]

    def kill(self, copy: Copy) -> None:
        self.copies.remove(copy)
        os.killpg(copy.process.pid, signal.SIGKILL)
        copy.process.wait()

    def stop(self, *copies: Copy, seconds: float = STOP_SECONDS, exit_codes: tuple[int, ...] = (0,)) -> None:
        """Stop copies with SIGTERM, and see that they end in good order and in time."""
        wait_until(lambda: all(copy.text() for copy in copies))  # before its first line Python itself ends it
        for copy in copies:
            self.copies.remove(copy)
            copy.process.terminate()
        began = time.monotonic()
        for copy in copies:
            assert copy.process.wait(30) in exit_codes, copy.text()[-2000:]
        assert time.monotonic() - began < seconds, f"a stop took {time.monotonic() - began:.1f} s"

    def ended(self, copy: Copy, exit_code: int, seconds: float = 60) -> str:
        """Wait until a copy has ended by itself, with this exit code and nothing left behind; its log."""
        self.copies.remove(copy)
        assert copy.process.wait(seconds) == exit_code, copy.text()[-2000:]
        wait_until(lambda: not copy.family(), STOP_SECONDS)
        return copy.text()

    def read(self, seconds: float) -> None:
        """Read the output for some seconds, as a supervisor with an eye on the copies."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._out.add(self._reader.read(0.1))
            for copy in [copy for copy in self.copies if copy.process.poll() is not None]:
                assert self.supervised, f"a copy ended by itself: {copy.text()[-2000:]}"
                self.ended(copy, 1)
                self.restarts += 1
                self.start(**copy.environment)

    def wait_for(self, numbers: set[int] | range, seconds: float = 180) -> None:
        """Read until these records are out."""
        give_up, missing = time.monotonic() + seconds, list(numbers)
        while missing := [number for number in missing if number not in self._out.seen]:
            assert time.monotonic() < give_up, f"{len(missing)} records not out after {seconds} s{self.state()}"
            self.read(0.2)

    def wait_for_new(self, seconds: float = 60) -> None:
        """Read until a record is out that is written from now on."""
        give_up, newest = time.monotonic() + seconds, self.written
        while self._out.newest < newest:
            assert time.monotonic() < give_up, f"no new record out after {seconds} s{self.state()}"
            self.read(0.1)

    def wait_for_value(self, part: bytes, seconds: float) -> None:
        """Read until the last record that came out has this in its value."""
        give_up = time.monotonic() + seconds
        while part not in self._out.last_value:
            assert time.monotonic() < give_up, f"no {part!r} out after {seconds} s{self.state()}"
            self.read(0.1)

    def state(self) -> str:
        logs = [f"{copy.log} ends with:\n{copy.text()[-2000:]}" for copy in self.copies]
        return "\n".join([f"; {self.written} written, the newest out is {self._out.newest}", *logs])

    def wait_for_readers(self) -> None:
        """Read until every copy reads partitions."""
        wait_until(lambda: all("reads partitions [" in copy.text() for copy in self.copies))

    def finish(
        self, fault: str, expected: set[int] | None = None, ordered: bool = True, never_doubled: bool = False
    ) -> None:
        """Let all that was written come out, stop, and count: nothing is lost, with exactly once nothing is doubled."""
        self.end_stream()
        numbers = set(range(self._written)) if expected is None else expected
        self.wait_for(numbers)
        self.stop(*self.copies)
        put, out = self.count()
        print(f"{fault} ({self.guarantee}): {len(numbers)} in, {len(out.seen)} out, {out.doubled} doubled")
        if self.restarts:
            print(f"copies that ended with exit code 1 and were started again: {self.restarts}")
        assert put.doubled == 0, "the stream of the test is at fault"
        assert out.seen.keys() == numbers
        assert out.out_of_order == 0 or not ordered
        assert out.doubled == 0 or (self.guarantee == "at_least_once" and not never_doubled)

    def count(self) -> tuple[Tally, Tally]:
        """Count the input and the output anew, once no transaction is open."""

        def settled() -> bool:
            return self.topics.end_offset() == self.topics.end_offset(isolation_level="read_committed")

        wait_until(settled, 60)
        put, out = (Reader(self.topics, topic) for topic in (self.topics.input, self.topics.output))
        return Tally(put.read_all()), Tally(out.read_all())


def run(log: Path, *arguments: str, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start Python in a session of its own, so that a signal can reach it and all that it starts."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], env=env, stdout=output, stderr=output, start_new_session=True
        )
