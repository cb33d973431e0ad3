"""What the README promises of faults: one after the other, every record counted in and out."""

import gc
import itertools
import json
import os
import random
import re
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Consumer, Message, Producer
from confluent_kafka import TopicPartition as PartitionOffset
from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec

from conftest import BROKER_SETTINGS, Api, Reply, Topics, wait_until, write_database
from harness import BARE_LOOP, STOP_SECONDS, Copy, Reader, Trial, record, run
from kafka_server import KafkaServer

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    # kafka-python leaves the sockets to brokers that are gone to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
PARTITIONS = 6
CHANCE = random.SystemRandom()
LOCATED = b'{"city": "Mountain View", "region": "California", "country_name": "United States"}'
INSTANCE = {"KAFKA_CONSUMER_GROUP_INSTANCE_ID": "first"}  # without it a killed copy's partitions rest for 10 s


class Counts(NamedTuple):
    """How often and how long: in CI, and with --whole as the README's table has it."""

    per_second: int = 2_000
    kills: int = 3
    chaos: int = 5
    overlaps: tuple[int, ...] = (2, 4)
    freezes: tuple[int, ...] = (12,)
    outages: tuple[int, ...] = (5,)
    swaps: int = 5
    soak_periods: int = 3
    soak_seconds: int = 10


WHOLE = Counts(5_000, 10, 12, (2, 5, 10, 20), (20, 75), (10, 60), 20, 5, 60)


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Counts:
    return WHOLE if request.config.getoption("--whole") else Counts()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Let the garbage collector find those sockets here, and not in another test."""
    yield
    gc.collect()


@pytest.fixture(params=["at_least_once", "exactly_once"])
def guarantee(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def trial_on(address: str, guarantee: str, folder: Path, counts: Counts) -> Trial:
    name = uuid.uuid4().hex[:12]
    topics = Topics(address, f"in-{name}", f"out-{name}")
    topics.create(topics.input, PARTITIONS)
    topics.create(topics.output, PARTITIONS)
    return Trial(topics, guarantee, folder, counts.per_second)


@pytest.fixture
def trial(broker: KafkaServer, guarantee: str, tmp_path: Path, counts: Counts) -> Iterator[Trial]:
    with trial_on(broker.address, guarantee, tmp_path, counts) as trial:
        yield trial


@pytest.fixture
def own_broker() -> Iterator[KafkaServer]:
    """A broker that a test may freeze, stop and kill."""
    # With its controller in the same process it would be fenced when it wakes.
    with KafkaServer(settings={**BROKER_SETTINGS, "broker.session.timeout.ms": "180000"}) as server:
        yield server
        server.thaw()  # else it cannot stop


@pytest.fixture
def supervised_trial(own_broker: KafkaServer, guarantee: str, tmp_path: Path, counts: Counts) -> Iterator[Trial]:
    """On the broker of its own, where a copy may end and be started again."""
    with trial_on(own_broker.address, guarantee, tmp_path, counts) as trial:
        trial.supervised = True
        yield trial


def test_killed(trial: Trial, counts: Counts) -> None:
    trial.stream()
    copy = trial.start(**INSTANCE)
    for _ in range(counts.kills):
        trial.wait_for_new()
        trial.read(CHANCE.uniform(0.2, 2))
        trial.kill(copy)
        copy = trial.start(**INSTANCE)
    trial.finish(f"kill -9, {counts.kills} times")


@pytest.mark.parametrize("guarantee", ["at_least_once"])
def test_killed_doubles_where_offsets_are_committed_late(trial: Trial) -> None:
    trial.write(5_000)
    copy = trial.start(COMMIT_SECONDS="60", **INSTANCE)
    trial.wait_for(range(5_000))
    trial.kill(copy)
    group = f"{trial.topics.input}-to-{trial.topics.output}"
    asks = Consumer({"bootstrap.servers": trial.topics.address, "group.id": group, "log_level": 0})
    partitions = [PartitionOffset(trial.topics.input, number) for number in range(PARTITIONS)]
    committed = sum(max(0, part.offset) for part in asks.committed(partitions, timeout=10))
    asks.close()
    assert 0 < committed <= 1_000  # of the first batch, which is committed at once
    trial.start(**INSTANCE)
    trial.write(5_000)
    trial.wait_for(range(10_000))
    trial.stop(*trial.copies)
    _, out = trial.count()
    assert out.doubled == 5_000 - committed


@pytest.mark.parametrize("guarantee", ["at_least_once"])
def test_killed_loses_in_a_bare_loop(trial: Trial, tmp_path: Path) -> None:
    trial.stream()
    bare = run(tmp_path / "bare.log", "-c", BARE_LOOP, *trial.topics)
    try:
        trial.wait_for_new()
        trial.read(0.5)  # in the midst of the second for which its producer waits
    finally:
        bare.kill()
        bare.wait()
    trial.end_stream()
    trial.ended(trial.start(KAFKA_TAIL="0", KAFKA_GROUP_ID="bare"), 0)
    put, out = trial.count()
    assert len(out.seen) < len(put.seen) == trial.written


def test_stopped(trial: Trial, counts: Counts) -> None:
    trial.stream()
    copy = trial.start()
    for _ in range(counts.kills):
        trial.wait_for_new()
        trial.read(CHANCE.uniform(0.2, 2))
        trial.stop(copy)
        copy = trial.start()
    trial.finish(f"SIGTERM, {counts.kills} times", never_doubled=True)


def test_three_copies_killed_and_stopped_at_random(trial: Trial, counts: Counts) -> None:
    trial.stream()
    for _ in range(3):
        trial.start()
    for _ in range(counts.chaos):
        trial.wait_for_new()
        trial.read(CHANCE.uniform(0.5, 3))
        if CHANCE.random() < 0.5:
            trial.kill(CHANCE.choice(trial.copies))
        else:
            # The rebalance after a kill ends with the dead member's session, and no member can commit before that.
            trial.stop(CHANCE.choice(trial.copies), seconds=10, exit_codes=(0, 1))
        trial.start()
    trial.finish(f"three copies, {counts.chaos} random kills and stops")


def test_one_three_two_five_one_copies(trial: Trial) -> None:
    trial.stream()
    for number in (1, 3, 2, 5, 1):
        while len(trial.copies) < number:
            trial.start()
        while len(trial.copies) > number:
            trial.stop(trial.copies[0])
        trial.wait_for_readers()
        trial.wait_for_new()
    trial.finish("1, 3, 2, 5 and 1 copies, started and stopped by hand", never_doubled=True)


def test_rolling_restarts(trial: Trial, counts: Counts) -> None:
    trial.stream()
    copies = [trial.start(), trial.start()]
    for overlap in counts.overlaps:
        trial.wait_for_new()
        copies.append(trial.start())
        trial.read(overlap)
        trial.stop(copies.pop(0))
    trial.stop(*copies)
    trial.start()
    trial.finish(f"two copies at once, rolling restarts {counts.overlaps} s", never_doubled=True)


def test_broker_frozen(supervised_trial: Trial, own_broker: KafkaServer, counts: Counts) -> None:
    trial = supervised_trial
    trial.stream()
    trial.start(**INSTANCE)
    for seconds in counts.freezes:
        trial.wait_for_new()
        own_broker.freeze()
        trial.read(seconds)
        own_broker.thaw()
        trial.wait_for_new(180)
    own_broker.freeze()
    trial.read(4)
    trial.kill(trial.copies[0])
    trial.read(1)
    own_broker.thaw()
    trial.start(**INSTANCE)
    trial.finish(f"broker frozen {counts.freezes} s, and 5 s with the script killed")


def test_broker_restarted(supervised_trial: Trial, own_broker: KafkaServer, counts: Counts) -> None:
    trial = supervised_trial
    trial.stream()
    trial.start()
    for seconds in counts.outages:
        trial.wait_for_new(180)
        own_broker.stop()
        trial.read(seconds)
        own_broker.start()
    trial.finish(f"broker away {counts.outages} s")


def all_in_sync(topics: Topics) -> bool:
    internal = ["__consumer_offsets", "__transaction_state"]
    with topics.admin() as admin:
        found = admin.describe_topics([topics.input, topics.output, *internal])
    return all(len(partition["isr_nodes"]) == 3 for topic in found for partition in topic["partitions"])


def test_three_brokers(three_brokers: list[KafkaServer], guarantee: str, tmp_path: Path, counts: Counts) -> None:
    addresses = ",".join(broker.address for broker in three_brokers)
    with trial_on(addresses, guarantee, tmp_path, counts) as trial:
        trial.supervised = True
        trial.stream()
        trial.start(**INSTANCE)
        for broker in three_brokers:
            trial.wait_for_new(180)
            broker.stop()
            trial.read(2)
            broker.start()
            wait_until(lambda: all_in_sync(trial.topics), 180)
        trial.wait_for_new(180)
        three_brokers[0].freeze()
        trial.read(2)
        trial.kill(trial.copies[0])
        trial.start(**INSTANCE)
        trial.read(max(counts.freezes))
        three_brokers[0].thaw()
        wait_until(lambda: all_in_sync(trial.topics), 180)
        trial.wait_for_new(180)
        three_brokers[1].kill()
        trial.wait_for_new(180)
        trial.finish("three brokers: rolling restart, one frozen with the script killed, one killed for good")


@pytest.mark.parametrize("tail", ["0", "1"], ids=["bounded", "tail"])
def test_refused_record(trial: Trial, tail: str) -> None:
    def limit(size: int) -> None:
        configs = {"max.message.bytes": str(size)}
        with trial.topics.admin() as admin:
            admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, trial.topics.output, configs)])

    limit(100_000)
    trial.write(200)
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    [refused] = trial.write(1, headers=[("padding", bytes(200_000))])
    trial.write(200)
    last_line = trial.ended(trial.start(KAFKA_TAIL=tail), 1).splitlines()[-1]
    place = rf"{trial.topics.input}\D+{refused.partition}\D+{refused.offset}\D"
    assert re.search(rf"kafka_enrich.py: .*{place}.*max.message.bytes", last_line), last_line
    limit(1_000_000)
    copy = trial.start(KAFKA_TAIL=tail)
    if tail == "0":
        trial.ended(copy, 0)
    trial.finish(f"a record refused, {'tail' if tail == '1' else 'bounded'}, and the limit raised")


def test_partitions_added(trial: Trial) -> None:
    trial.stream()
    trial.start()
    trial.start()
    trial.wait_for_new()
    with trial.topics.admin() as admin:
        admin.create_partitions({trial.topics.input: 2 * PARTITIONS})
    trial.read(5)  # the stream has heard of them by then
    trial.wait_for(range(trial.written), seconds=25)
    trial.finish("partitions added", ordered=False, never_doubled=True)


def expire(topics: Topics, left: int) -> None:
    """Delete the older records of each partition of the input, as its retention would."""
    partitions = [TopicPartition(topics.input, number) for number in range(PARTITIONS)]
    with topics.admin() as admin:
        ends = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
        admin.delete_records({partition: end.offset - left for partition, end in ends.items()})


def test_committed_offsets_expired(trial: Trial) -> None:
    trial.write(5_000)
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    trial.write(10_000)
    expire(trial.topics, left=500)
    left, _ = trial.count()
    trial.start()
    trial.finish("committed offsets expired", expected=set(range(5_000)) | left.seen.keys(), never_doubled=True)


def test_three_bounded_runs_one_killed(trial: Trial, api: Api) -> None:
    body = {"city": "Mountain View", "region": "California", "country_name": "United States"}
    api.reply = lambda _path: Reply(json.dumps(body).encode(), delay=0.005)  # slow enough to be killed in the midst
    trial.write(2_000)
    slow = {"KAFKA_TAIL": "0", "IPAPI_URL": api.url}
    victim, *others = [trial.start(**slow) for _ in range(3)]
    trial.wait_for_readers()
    wait_until(lambda: len(api.asked) > 300)
    trial.kill(victim)
    for copy in others:
        trial.ended(copy, 0)
    assert "nothing new" in trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    trial.finish("three bounded runs, one killed")


def test_bounded_run_while_records_are_written(trial: Trial) -> None:
    trial.stream()
    wait_until(lambda: trial.written >= 5_000)
    at_the_start = trial.written
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    trial.wait_for(range(at_the_start - 500), seconds=10)
    trial.end_stream()
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    trial.finish("bounded, while records are written without a pause", never_doubled=True)


def test_transactions_in_the_input(trial: Trial) -> None:
    """Aborted records are not enriched, and those of an open transaction are waited for, with all that lies behind."""
    properties = {"partitioner": "murmur2_random", "transactional.id": trial.topics.input}
    producer = Producer({"bootstrap.servers": trial.topics.address, **properties})

    def begin(numbers: range) -> None:
        producer.begin_transaction()
        for number in numbers:
            key, value = record(number)
            producer.produce(trial.topics.input, value, key)
        producer.flush()

    producer.init_transactions()
    begin(range(1_000))
    producer.commit_transaction()
    begin(range(100_000, 101_000))
    producer.abort_transaction()
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    assert "nothing new" in trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    begin(range(1_000, 2_000))
    producer.commit_transaction()
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    begin(range(2_000, 3_000))
    assert "nothing new" in trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    trial.start()
    trial.topics.write([record(number) for number in range(3_000, 4_000)])
    trial.wait_for_readers()
    trial.read(2)
    _, out = trial.count()
    assert out.seen.keys() == set(range(2_000))
    producer.commit_transaction()
    trial.finish("committed, aborted and open transactions", expected=set(range(4_000)), never_doubled=True)


@pytest.mark.parametrize("guarantee", ["exactly_once"])
@pytest.mark.parametrize("tail", ["0", "1"])
def test_started_while_offsets_wait_for_a_transaction(trial: Trial, tail: str) -> None:
    """A kill between the offsets and the end of their transaction leaves it open; a start does not wait for it."""
    trial.write(1_000)
    group = {"group.id": f"{trial.topics.input}-to-{trial.topics.output}"}
    properties = {"bootstrap.servers": trial.topics.address, "log_level": 0}
    member = Consumer({**properties, **group}).consumer_group_metadata()
    killed = Producer({**properties, "transactional.id": trial.topics.input})
    killed.init_transactions()
    killed.begin_transaction()
    offsets = [PartitionOffset(trial.topics.input, number, 5) for number in range(PARTITIONS)]
    killed.send_offsets_to_transaction(offsets, member)
    copy = trial.start(KAFKA_TAIL=tail)
    wait_until(lambda: "reads partitions [" in copy.text())
    killed.abort_transaction()
    if tail == "0":
        trial.ended(copy, 0)
    trial.finish("started while a transaction is open", never_doubled=True)


@pytest.mark.parametrize("guarantee", ["exactly_once"])
def test_members_come_while_offsets_wait_for_a_transaction(trial: Trial) -> None:
    """The first copy asks for offsets again after the second has come, and begins where the group stands, or later."""
    trial.write(1_000)
    trial.ended(trial.start(KAFKA_TAIL="0"), 0)
    group = {"group.id": f"{trial.topics.input}-to-{trial.topics.output}"}
    properties = {"bootstrap.servers": trial.topics.address, "log_level": 0}
    asks = Consumer({**properties, **group})
    numbers = [PartitionOffset(trial.topics.input, number) for number in range(PARTITIONS)]
    killed = Producer({**properties, "transactional.id": trial.topics.input})
    killed.init_transactions()
    killed.begin_transaction()
    killed.send_offsets_to_transaction(asks.committed(numbers), asks.consumer_group_metadata())
    trial.write(1_000)
    first = trial.start()
    wait_until(lambda: "reads partitions [" in first.text())
    second = trial.start()
    wait_until(lambda: re.search(r"reads partitions \[\d", second.text()) is not None)
    trial.read(3)  # the first copy asks again once a second
    killed.abort_transaction()
    trial.finish("another copy comes while a transaction is open", never_doubled=True)


COMPRESSIONS = ["none", "gzip", "snappy", "lz4", "zstd"]


def hostile_records(compression: str) -> list[dict[str, Any]]:
    """Records in every combination of keys, values and headers, and one with a key as large as a broker takes."""
    keys = [None, b"", b"\xff\x00", b"key"]
    values = [None, b"", b"8.8.8.8", b"\xff" * 50, b"no address"]
    headers = [[], [("same", b"\xff\x00"), ("same", None), ("имя", b"")]]
    records = [*itertools.product(keys, values, headers), (os.urandom(1_040_000), b"8.8.8.8", [])]
    return [
        {
            "key": key,
            "value": value,
            "headers": [*others, ("id", f"{compression} {number}".encode())],
            "timestamp": 1_600_000_000_000 + number,
        }
        for number, (key, value, others) in enumerate(records)
    ]


def test_hostile_records(trial: Trial) -> None:
    for compression in COMPRESSIONS:
        properties = {"compression.type": compression, "message.max.bytes": 2_000_000, "partitioner": "murmur2_random"}
        producer = Producer({"bootstrap.servers": trial.topics.address, **properties})
        for fields in hostile_records(compression):
            producer.produce(trial.topics.input, **fields)
        assert producer.flush(30) == 0
        trial.ended(trial.start(KAFKA_TAIL="0", KAFKA_PRODUCER_COMPRESSION_TYPE=compression), 0)

    def kept(message: Message) -> tuple[object, ...]:
        key, headers = message.key(), list(message.headers() or [])
        partition = None if key is None else message.partition()
        return headers[-1], key, partition, headers, message.timestamp(), message.value() is None

    put, out = (
        sorted(map(kept, Reader(trial.topics, topic).read_all())) for topic in (trial.topics.input, trial.topics.output)
    )
    doubled = len(out) - len({record[0] for record in out})
    print(f"hostile records ({trial.guarantee}): {len(put)} in, {len(out) - doubled} out, {doubled} doubled")
    assert put == out


def test_soak(trial: Trial, counts: Counts) -> None:
    trial.stream()
    sizes = []
    for _ in range(counts.soak_periods):
        copy = trial.start()
        for _ in range(2):
            trial.read(counts.soak_seconds / 2)
            sizes.append(max(copy.family().values()))
        trial.stop(copy)
    trial.start()
    trial.finish(f"soak with a restart every {counts.soak_seconds} s", never_doubled=True)
    print(f"resident memory, twice between two restarts: {sizes} MB")
    assert max(sizes) < 1.3 * min(sizes)


def test_processes(trial: Trial) -> None:
    def start() -> Copy:
        copy = trial.start(PROCESSES="2", **INSTANCE)
        wait_until(lambda: copy.text().count("reads partitions [") >= 2)
        trial.wait_for_new()
        return copy

    trial.stream()
    copy = start()
    os.kill(max(copy.family().keys() - {copy.process.pid}), signal.SIGKILL)
    trial.ended(copy, 1)
    copy = start()
    copy.process.kill()
    trial.ended(copy, -signal.SIGKILL)
    copy = start()
    os.killpg(copy.process.pid, signal.SIGINT)
    trial.ended(copy, 0, seconds=STOP_SECONDS)
    start()
    trial.finish("PROCESSES=2: a child killed, the parent killed, Ctrl-C")


def test_no_source_of_locations_outlasts_the_poll_interval(trial: Trial, api: Api) -> None:
    """A member that does not poll for so long is put out of its group, and all it has not committed is done again."""
    limits = {f"KAFKA_CONSUMER_{name}_MS": "6000" for name in ("SESSION_TIMEOUT", "MAX_POLL_INTERVAL")}
    api.reply = lambda _path: Reply(LOCATED, delay=1)
    trial.write(10)
    copy = trial.start(IPAPI_URL=api.url, ON_LOOKUP_FAILED="wait", **limits)
    trial.wait_for(range(10))
    api.reply = lambda _path: Reply(b"", 429, {"Retry-After": "8"})
    asked = len(api.asked)
    trial.write(10)
    wait_until(lambda: len(api.asked) > asked + 1)  # once before the pause, once after it
    api.reply = lambda _path: Reply(LOCATED)
    trial.finish("look-ups that take longer than max.poll.interval.ms", never_doubled=True)
    assert "put out of the group" not in copy.text()


@pytest.mark.parametrize("several", ["PROCESSES", "BYTEWAX_WORKERS_PER_PROCESS"])
def test_database_swapped(trial: Trial, counts: Counts, tmp_path: Path, several: str) -> None:
    """Every answer is wholly that of a file which was in use in the ten seconds before."""
    path, new = tmp_path / "city.mmdb", tmp_path / "new.mmdb"
    placed: list[float] = []

    def place(how: str) -> None:
        word = f"generation {len(placed)}"
        record = {"city": word, "region": word, "country_name": word}
        write_database(new, {"0.0.0.0/1": record, "128.0.0.0/1": record}, 4)
        content = new.read_bytes()
        placed.append(time.time())
        if how == "by rename":
            new.replace(path)
        elif how == "in place":
            path.write_bytes(content)
        elif how == "by a link":
            new.rename(tmp_path / f"{len(placed)}.mmdb")
            (tmp_path / "link").symlink_to(tmp_path / f"{len(placed)}.mmdb")
            (tmp_path / "link").replace(path)
        elif how == "after a while without it":
            path.unlink()
            trial.read(5)
            placed[-1] = time.time()
            path.write_bytes(content)
        else:
            path.write_bytes(content[:1000])
            trial.read(5)
            placed[-1] = time.time()
            path.write_bytes(content)

    place("by rename")
    copy = trial.start(**{"GEOIP_DATABASE": str(path), several: "2"})
    trial.stream()
    ways = itertools.cycle(["by rename", "in place", "half first", "by a link", "after a while without it"])
    for how in itertools.islice(ways, counts.swaps):
        trial.wait_for_new()
        place(how)
        trial.wait_for_value(b'"generation %d"' % (len(placed) - 1), 10)
    trial.finish(f"database swapped {counts.swaps} times")
    assert "Traceback" not in copy.text()

    newest: dict[int | None, int] = {}
    for message in Reader(trial.topics, trial.topics.output).read_all():
        location = json.loads(message.value() or b"")
        del location["ip"]
        [word] = set(location.values())
        generation = int(word.split()[1])
        written = message.timestamp()[1] / 1000
        assert placed[generation] < written + 5
        assert generation == len(placed) - 1 or written < placed[generation + 1] + 10
        assert generation >= newest.get(message.partition(), 0), "back to an older database"
        newest[message.partition()] = generation
