"""The verbs of the fault tests: stream records in, kill and freeze and restart, count what came out."""

import bisect
import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition

from conftest import PROJECT, SAMPLE_DATABASE, Topics, wait_until
from kafka_server import KafkaServer, free_port

FIRST_ADDRESS = int(ipaddress.IPv4Address("8.0.0.0"))  # record n has the n-th address after it, and so a name
KEYS = 500


def record(number: int) -> tuple[bytes, bytes]:
    """The key and value of the record with a number."""
    return b"key-%d" % (number % KEYS), str(ipaddress.IPv4Address(FIRST_ADDRESS + number)).encode()


@contextmanager
def stream(topics: Topics, records: int, per_second: int, first: int = 0) -> Iterator[threading.Event]:
    """Write numbered records at a rate while the block runs, and the rest of them before it ends.

    The last tenth comes slowly until the block sets the event or ends: on a slow machine too, the stream outlasts the
    faults of a test.
    """
    producer = Producer(
        {
            "bootstrap.servers": topics.address,
            "enable.idempotence": True,
            "message.timeout.ms": 0,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
        }
    )

    abandoned, hurry = threading.Event(), threading.Event()

    def write() -> None:
        due = time.monotonic()
        for count in range(records):
            if abandoned.is_set():
                return
            key, value = record(first + count)
            producer.produce(topics.input, value, key)
            if count % 100 == 0:
                producer.poll(0)
                slower = 20 if count > 0.9 * records and not hurry.is_set() else 1
                due += slower * 100 / per_second
                time.sleep(max(0.0, due - time.monotonic()))
        assert producer.flush(120) == 0

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield hurry
        hurry.set()
    except BaseException:  # without this a failed test would leave a thread that no broker answers
        abandoned.set()
        producer.purge()
        raise
    finally:
        thread.join()


class Output:
    """Reads the output topic from its beginning, and counts."""

    def __init__(self, topics: Topics) -> None:
        self.counts: Counter[int] = Counter()
        self.out_of_order = 0
        self._last: dict[bytes, int] = {}
        self._written_at: list[float] = []
        self._topic = topics.output
        self._next: dict[int, int] = {}
        self._consumer = Consumer(
            {"bootstrap.servers": topics.address, "group.id": "not used", "enable.auto.commit": False}
        )

        def find_partitions() -> bool:  # of several brokers not all know a new topic at once
            found = self._consumer.list_topics(topics.output, 10).topics[topics.output].partitions
            self._next = dict.fromkeys(found, 0)
            return bool(found)

        wait_until(find_partitions)
        self._consumer.assign([TopicPartition(topics.output, partition, 0) for partition in self._next])

    def read(self, seconds: float) -> None:
        """Count what arrives within some seconds, or the first ten thousand records of it."""
        for message in self._consumer.consume(10_000, seconds):
            error = message.error()
            if error:
                assert not error.fatal(), error
                continue
            number = int(ipaddress.IPv4Address(json.loads(message.value() or b"")["ip"])) - FIRST_ADDRESS
            key = message.key() or b""
            assert key == record(number)[0]
            if number not in self.counts:
                self.out_of_order += number < self._last.get(key, -1)
                self._last[key] = number
            self.counts[number] += 1
            self._written_at.append(message.timestamp()[1] / 1000)
            self._next[message.partition() or 0] = (message.offset() or 0) + 1

    def read_for(self, seconds: float) -> None:
        """Read for some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.read(0.1)

    def read_to_end(self) -> None:
        """Read all that lies on the topic now."""
        for partition, offset in list(self._next.items()):
            _, end = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), 10)
            give_up = time.monotonic() + 60
            while max(offset, self._next[partition]) < end:
                assert time.monotonic() < give_up
                self.read(0.2)

    def read_until_quiet(self, seconds: float = 10) -> None:
        """Read until nothing has come for some seconds."""
        before = -1
        while before < len(self._written_at):
            before = len(self._written_at)
            self.read_for(seconds)

    def wait_for(self, records: int, seconds: float = 480) -> None:
        """Read until there are so many distinct records."""
        give_up = time.monotonic() + seconds
        while len(self.counts) < records:
            assert time.monotonic() < give_up, f"{len(self.counts)} of {records} records after {seconds} s"
            self.read(0.2)

    def wait_for_more(self, seconds: float = 180) -> None:
        """Read until there is at least one new record."""
        self.wait_for(len(self.counts) + 1, seconds)

    def written_since(self, moment: float) -> int:
        """Count the records written after a moment of time.time."""
        return len(self._written_at) - bisect.bisect(sorted(self._written_at), moment)

    @property
    def duplicates(self) -> int:
        return sum(self.counts.values()) - len(self.counts)

    def close(self) -> None:
        self._consumer.close()


class Service:
    """kafka_enrich.py in following mode, one process or several, as a supervisor runs it."""

    def __init__(self, topics: Topics, log: Path, environments: Sequence[dict[str, str]]) -> None:
        self._log = log
        self._environments = [
            {
                "PATH": os.environ["PATH"],
                "KAFKA_TAIL": "1",
                "GEOIP_DATABASE": str(SAMPLE_DATABASE),
                **topics.environment(),
                **environment,
            }
            for environment in environments
        ]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self.processes = [
                subprocess.Popen([sys.executable, str(PROJECT / "kafka_enrich.py")], env=environment, stderr=log)
                for environment in self._environments
            ]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def stop(self) -> list[int]:
        """Stop all with SIGTERM; their exit codes."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        return [process.wait(20) for process in self.processes]

    def wait(self, seconds: float = 30) -> list[int]:
        """Wait until all have ended by themselves; their exit codes."""
        return [process.wait(seconds) for process in self.processes]

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def megabytes(self) -> int:
        """Resident memory of the largest process, as Linux tells it."""
        sizes = [
            int(line.split()[1])
            for process in self.processes
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if line.startswith("VmRSS:")
        ]
        return max(sizes) // 1024


@contextmanager
def service(topics: Topics, log: Path, *environments: dict[str, str]) -> Iterator[Service]:
    """A service of one process, or of one for each environment, that is started with the block and ends with it."""
    running = Service(topics, log, environments or [{}])
    running.start()
    try:
        yield running
    finally:
        running.kill()


@contextmanager
def plain_flow(topics: Topics, mode: str, *properties: str) -> Iterator[subprocess.Popen[bytes]]:
    """The same wiring with the engine's own defaults, for the length of the block."""
    command = [
        sys.executable,
        str(PROJECT / "tests" / "plain_flow.py"),
        topics.address,
        topics.input,
        topics.output,
        mode,
    ]
    process = subprocess.Popen([*command, *properties], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def three_brokers() -> Iterator[list[KafkaServer]]:
    """A cluster that keeps three replicas and wants two of them in sync."""
    controllers = [free_port() for _ in range(3)]
    ports = [free_port() for _ in range(3)]
    servers = [
        KafkaServer(
            port,
            settings={
                "node.id": str(node),
                "controller.quorum.voters": ",".join(f"{n}@localhost:{c}" for n, c in enumerate(controllers, 1)),
                "listeners": f"PLAINTEXT://localhost:{port},CONTROLLER://localhost:{controllers[node - 1]}",
                "default.replication.factor": "3",
                "min.insync.replicas": "2",
                "offsets.topic.replication.factor": "3",
                "transaction.state.log.replication.factor": "3",
                "transaction.state.log.min.isr": "2",
            },
        )
        for node, port in enumerate(ports, 1)
    ]
    with ExitStack() as stack:
        for server in servers:
            server.launch()
            stack.callback(server.__exit__)
        for server in servers:
            server.wait()
        yield servers
