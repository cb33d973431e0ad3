"""What the tests share: a real broker, topics of their own, a real HTTP server, and both scripts as programs."""

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import HealthCheck
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import RetriableError, UnknownBrokerIdError
from kafka.producer.future import RecordMetadata
from mmdb_writer import MMDBWriter
from netaddr import IPSet
from prometheus_client.parser import text_string_to_metric_families

from kafka_server import KafkaServer, free_port

PROJECT = Path(__file__).parent.parent
SAMPLE_DATABASE = PROJECT / "misc" / "sample-city.mmdb"
BROKER_SETTINGS = {
    "group.initial.rebalance.delay.ms": "0",
    "log.retention.ms": "-1",  # records keep their timestamps, which may be old
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
}


# A machine that is busy takes longer now and then. The tests' modules are imported after this one.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="let the faults be as long and as many as the README counts")


@pytest.fixture(scope="session")
def broker() -> Iterator[KafkaServer]:
    with KafkaServer(settings=BROKER_SETTINGS) as server:
        yield server


@pytest.fixture
def three_brokers() -> Iterator[list[KafkaServer]]:
    """A cluster that keeps three replicas and wants two of them in sync."""
    controllers = [free_port() for _ in range(3)]
    ports = [free_port() for _ in range(3)]
    servers = [
        KafkaServer(
            port,
            settings={
                **BROKER_SETTINGS,
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


class Topics(NamedTuple):
    """An input and an output topic that only one test uses."""

    address: str
    input: str
    output: str

    def admin(self) -> KafkaAdminClient:
        return KafkaAdminClient(bootstrap_servers=self.address.split(","))

    def create(self, topic: str, partitions: int = 4, configs: dict[str, str] | None = None) -> None:
        options = {"num_partitions": partitions, "configs": configs or {}}
        with self.admin() as admin:
            admin.create_topics({topic: options}, wait_for_metadata=True)

    def write(
        self, records: Sequence[tuple[bytes | None, bytes | None]], headers: Sequence[tuple[str, bytes]] = ()
    ) -> list[RecordMetadata]:
        with KafkaProducer(bootstrap_servers=self.address.split(","), max_request_size=2_000_000) as producer:
            sent = [producer.send(self.input, key=key, value=value, headers=list(headers)) for key, value in records]
            return [future.get(timeout=30) for future in sent]

    def read(self, topic: str | None = None) -> list[tuple[bytes | None, bytes | None]]:
        """All records of a topic, each partition's in its order."""
        consumer = KafkaConsumer(bootstrap_servers=self.address, auto_offset_reset="earliest", enable_auto_commit=False)
        topic = topic or self.output
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        ends = consumer.end_offsets(partitions)
        records = []
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            for batch in consumer.poll(timeout_ms=1000).values():
                records += [(record.partition, record.key, record.value) for record in batch]
        consumer.close()
        return [(key, value) for _, key, value in sorted(records, key=lambda record: record[0])]

    def end_offset(self, topic: str | None = None, isolation_level: str = "read_uncommitted") -> int:
        """How many records have been written to a topic, the output if it is not named."""
        topic, limit = topic or self.output, time.monotonic() + 30
        while True:
            try:
                with self.admin() as admin:
                    [found] = admin.describe_topics([topic])
                    partitions = [
                        TopicPartition(topic, partition["partition_index"]) for partition in found["partitions"]
                    ]
                    ends = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST), isolation_level)
                return sum(end.offset for end in ends.values())
            except (RetriableError, UnknownBrokerIdError):  # a broker that was away leads nothing for a moment (-1)
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)

    def environment(self) -> dict[str, str]:
        return {"KAFKA_BROKERS": self.address, "KAFKA_INPUT_TOPIC": self.input, "KAFKA_OUTPUT_TOPIC": self.output}


@pytest.fixture
def topic_names(broker: KafkaServer) -> Topics:
    """Names that no topic has yet."""
    name = uuid.uuid4().hex[:12]
    return Topics(broker.address, f"in-{name}", f"out-{name}")


@pytest.fixture
def topics(topic_names: Topics) -> Topics:
    """An empty input and an empty output topic of 4 partitions each."""
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output)
    return topic_names


@dataclass
class Program:
    """One of the two scripts, alone in a folder of its own, as a program that is called or started."""

    script: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(self.script), *arguments],
            cwd=self.script.parent,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def __call__(self, *arguments: str, **environment: str) -> "Ended":
        return ended(self.start(*arguments, **environment))


class Ended(NamedTuple):
    """What a program that has ended left."""

    exit_code: int
    output: str
    errors: str


def ended(process: subprocess.Popen[str], seconds: float = 60) -> Ended:
    output, errors = process.communicate(timeout=seconds)
    return Ended(process.returncode, output, errors)


def program(tmp_path: Path, name: str) -> Iterator[Program]:
    folder = tmp_path / "alone"
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_bytes((PROJECT / name).read_bytes())
    program = Program(script, {"PATH": os.environ["PATH"]})
    yield program
    for process in program.started:
        process.kill()
        process.communicate()


@pytest.fixture
def kafka_enrich_program(tmp_path: Path) -> Iterator[Program]:
    yield from program(tmp_path, "kafka_enrich.py")


@pytest.fixture
def load_data_program(tmp_path: Path) -> Iterator[Program]:
    yield from program(tmp_path, "load_data.py")


class Reply(NamedTuple):
    """What the HTTP server answers."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    delay: float = 0


class Api(ThreadingHTTPServer):
    """A local HTTP API whose replies a test chooses, and that remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.user_agents: list[str | None] = []
        self.clients: set[tuple[str, int]] = set()
        self.reply: Callable[[str], Reply] = lambda _path: Reply(status=500)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_arguments: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """Answers as the test has chosen."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply takes 40 ms
    server: Api

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.user_agents.append(self.headers["User-Agent"])
        self.server.clients.add(self.client_address)
        reply = self.server.reply(self.path)
        time.sleep(reply.delay)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_arguments: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def write_database(path: Path, records: dict[str, Any], ip_version: int = 6, kind: str = "Test") -> str:
    """Write a database of records by network; its path."""
    writer = MMDBWriter(ip_version, kind, ["en"], ipv4_compatible=ip_version == 6)
    for network, record in records.items():
        writer.insert_network(IPSet([network]), record)
    writer.to_db_file(str(path))
    return str(path)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "what the test waits for did not happen"
        time.sleep(0.05)


def get(port: int, path: str = "/metrics") -> str:
    """What a port serves; an empty text while nothing does."""
    try:
        with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=10) as response:
            body: bytes = response.read()
            return body.decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except urllib.error.URLError:
        return ""


def samples(port: int) -> dict[str, float]:
    """Every sample, by its name and its labels' values."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(get(port))
        for sample in family.samples
    }
