"""What the README promises of following a topic: one fault after the other, every record counted in and out."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import TopicPartition

from conftest import Topics, wait_until
from harness import Output, plain_flow, service, stream, three_brokers
from kafka_server import KafkaServer, free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.fixture
def own_broker() -> Iterator[KafkaServer]:
    """A broker that a test may freeze, stop and kill."""
    with KafkaServer() as server:
        yield server


def topics_on(address: str) -> Topics:
    topics = Topics(address, "from", "to")
    topics.create(topics.input)
    topics.create(topics.output)
    return topics


def write_all(topics: Topics, records: int, first: int = 0) -> None:
    with stream(topics, records, per_second=1_000_000, first=first):
        pass


def check(output: Output, records: int, fault: str) -> None:
    """Nothing is lost, and each key's records come in their order; duplicates are told (pytest -rP shows them)."""
    output.read_to_end()
    print(f"{fault}: {records} in, {len(output.counts)} out, {output.duplicates} duplicates")
    assert len(output.counts) == records
    assert output.out_of_order == 0


def test_kill_ten_times(topics: Topics, tmp_path: Path) -> None:
    records, output, allowed = 400_000, Output(topics), 0
    with stream(topics, records, per_second=8_000) as hurry, service(topics, tmp_path / "log") as enricher:
        for _ in range(10):
            output.wait_for_more()
            output.read_for(seconds=2)
            enricher.kill()
            # One epoch of a second is not saved yet, and the one before it may be about to be.
            killed = time.time()
            output.read_to_end()
            allowed += output.written_since(killed - 3)
            enricher.start()
        hurry.set()
        output.wait_for(records)
        assert enricher.stop() == [0]
    check(output, records, "killed ten times")
    assert output.duplicates <= allowed


def test_sigterm_ten_times(topics: Topics, tmp_path: Path) -> None:
    records, output = 200_000, Output(topics)
    with stream(topics, records, per_second=5_000) as hurry, service(topics, tmp_path / "log") as enricher:
        for _ in range(10):
            output.wait_for_more()
            output.read_for(seconds=1)
            before = time.monotonic()
            assert enricher.stop() == [0]
            assert time.monotonic() - before < 5
            output.read_to_end()
            enricher.start()
        hurry.set()
        output.wait_for(records)
    check(output, records, "stopped with SIGTERM ten times")


def freeze_and_kill(
    broker: KafkaServer, topics: Topics, log: Path, records: int, environment: dict[str, str]
) -> Output:
    """Freeze the broker for five seconds while records stream, and kill the script during that."""
    output = Output(topics)
    write_all(topics, records)
    with service(topics, log, environment) as enricher:
        output.wait_for(records // 10)
        broker.freeze()
        time.sleep(4)  # the fault
        enricher.kill()
        time.sleep(1)  # the rest of it
        broker.thaw()
        enricher.start()
        if environment:
            output.read_until_quiet()
        else:
            output.wait_for(records)
    return output


def test_broker_frozen_and_script_killed(own_broker: KafkaServer, tmp_path: Path) -> None:
    topics = topics_on(own_broker.address)
    check(freeze_and_kill(own_broker, topics, tmp_path / "log", 400_000, {}), 400_000, "broker frozen, script killed")


def test_broker_frozen_and_script_killed_loses_with_sqlite(own_broker: KafkaServer, tmp_path: Path) -> None:
    topics = topics_on(own_broker.address)
    sqlite = {"RECOVERY_DIR": str(tmp_path / "recovery")}
    output = freeze_and_kill(own_broker, topics, tmp_path / "log", 400_000, sqlite)
    print(f"the same with RECOVERY_DIR: 400000 in, {len(output.counts)} out")
    assert len(output.counts) < 400_000


def test_broker_away_for_twenty_seconds(own_broker: KafkaServer, tmp_path: Path) -> None:
    topics = topics_on(own_broker.address)
    records, output = 200_000, Output(topics)
    with stream(topics, records, per_second=3_000) as hurry, service(topics, tmp_path / "log") as enricher:
        output.wait_for(records // 20)
        own_broker.stop()
        own_broker.start()
        output.wait_for(records // 5)
        own_broker.stop()
        time.sleep(20)  # the fault
        own_broker.start()
        output.wait_for(records // 2)
        own_broker.freeze()
        time.sleep(20)  # the fault
        own_broker.thaw()
        hurry.set()
        output.wait_for(records)
        assert enricher.stop() == [0]
    check(output, records, "broker restarted, stopped for 20 s, frozen for 20 s")
    assert output.duplicates == 0


def test_broker_away_loses_with_a_message_timeout(own_broker: KafkaServer) -> None:
    topics = topics_on(own_broker.address)
    records, output = 100_000, Output(topics)
    settings = "message.timeout.ms=5000"
    with stream(topics, records, per_second=5_000) as hurry, plain_flow(topics, "follow", settings):
        hurry.set()
        output.wait_for(records // 10)
        own_broker.freeze()
        time.sleep(20)  # the fault
        own_broker.thaw()
        output.read_until_quiet()
    output.read_to_end()
    print(f"broker frozen for 20 s with message.timeout.ms=5000: {records} in, {len(output.counts)} out")
    assert len(output.counts) < records


def test_three_brokers_restarted_one_after_the_other(tmp_path: Path) -> None:
    with three_brokers() as brokers:
        topics = topics_on(",".join(broker.address for broker in brokers))

        def all_in_sync() -> bool:
            with topics.admin() as admin:
                found = admin.describe_topics([topics.input, topics.output])
            return all(len(partition["isr_nodes"]) == 3 for topic in found for partition in topic["partitions"])

        records, output = 200_000, Output(topics)
        with stream(topics, records, per_second=3_000) as hurry, service(topics, tmp_path / "log") as enricher:
            for broker in brokers:
                output.wait_for_more()
                broker.stop()
                output.read_for(2)
                broker.start()
                wait_until(all_in_sync, seconds=300)
            hurry.set()
            output.wait_for(records)
            assert enricher.stop() == [0]
        check(output, records, "three brokers restarted one after the other")
        with topics.admin() as admin:
            found = admin.describe_topics([f"from-to-to-1-workers-{topic}" for topic in ("state", "progress")])
        assert [len(topic["partitions"][0]["replica_nodes"]) for topic in found] == [3, 3]


def pods(tmp_path: Path, replicas: int) -> list[dict[str, str]]:
    """The environments that a StatefulSet gives its pods, each on an address of this machine."""
    host_file = tmp_path / "hostfile.txt"
    host_file.write_text("".join(f"localhost:{free_port()}\n" for _ in range(replicas)))
    return [
        {
            "BYTEWAX_HOSTFILE_PATH": str(host_file),
            "BYTEWAX_POD_NAME": f"kafka-enrich-{number}",
            "BYTEWAX_STATEFULSET_NAME": "kafka-enrich",
            "BYTEWAX_WORKERS_PER_PROCESS": "1",
        }
        for number in range(replicas)
    ]


def test_one_of_two_processes_killed(topics: Topics, tmp_path: Path) -> None:
    records, output, two = 200_000, Output(topics), pods(tmp_path, 2)
    with stream(topics, records, per_second=5_000) as hurry, service(topics, tmp_path / "log", *two) as enricher:
        for victim in (0, 1, 0, 1):
            output.wait_for_more()
            output.read_for(2)
            enricher.processes[victim].kill()
            assert 0 not in enricher.wait()
            output.read_to_end()  # so that what comes next is by the two that are started now
            enricher.start()
        hurry.set()
        output.wait_for(records)
        assert enricher.stop() == [0, 0]
    check(output, records, "one of two processes killed four times")


def test_other_numbers_of_workers(topics: Topics, tmp_path: Path) -> None:
    output, written = Output(topics), 0
    for workers in (2, 1, 3, 2, 2, 3):
        write_all(topics, 20_000, first=written)
        written += 20_000
        with service(topics, tmp_path / "log", {"BYTEWAX_WORKERS_PER_PROCESS": str(workers)}) as enricher:
            output.wait_for(written)
            assert enricher.stop() == [0]
    check(output, written, "2, 1, 3, 2, 2 and 3 workers")


def test_four_workers_of_two_processes_all_read(topics: Topics, tmp_path: Path) -> None:
    environments = [{**pod, "BYTEWAX_WORKERS_PER_PROCESS": "2"} for pod in pods(tmp_path, 2)]
    output, written = Output(topics), 0
    with service(topics, tmp_path / "log", *environments) as enricher:
        for _ in range(6):
            write_all(topics, 1_000, first=written)
            written += 1_000
            output.wait_for(written, seconds=60)
            enricher.kill()
            enricher.start()
    check(output, written, "two processes of two workers, killed six times")


def expire(topics: Topics, before_the_end: int) -> int:
    """Delete the older records of the input, as its retention would; how many are left."""
    with topics.admin() as admin:
        [found] = admin.describe_topics([topics.input])
        partitions = [TopicPartition(topics.input, partition["partition_index"]) for partition in found["partitions"]]
        ends = {
            partition: offset.offset
            for partition, offset in admin.list_partition_offsets(dict.fromkeys(partitions, -1)).items()
        }
        admin.delete_records({partition: end - before_the_end for partition, end in ends.items()})
    return before_the_end * len(partitions)


def test_place_to_resume_from_expired(topics: Topics, tmp_path: Path) -> None:
    output = Output(topics)
    write_all(topics, 20_000)
    with service(topics, tmp_path / "log") as enricher:
        output.wait_for(20_000)
        assert enricher.stop() == [0]
        write_all(topics, 40_000, first=20_000)
        left = expire(topics, before_the_end=1000)
        enricher.start()
        output.wait_for(20_000 + left)
        assert enricher.stop() == [0]
    check(output, 20_000 + left, "place to resume from expired")


def test_place_to_resume_from_expired_loses_with_the_defaults(own_broker: KafkaServer) -> None:
    topics = topics_on(own_broker.address)
    output = Output(topics)
    write_all(topics, 20_000)
    with plain_flow(topics, "follow"):
        output.wait_for(20_000)
        output.read_for(12)  # an epoch of the engine's default length, so that there is a place to resume from
    write_all(topics, 40_000, first=20_000)
    left = expire(topics, before_the_end=1000)
    with plain_flow(topics, "follow"):
        output.read_until_quiet()
    print(f"expired, with the defaults: {left} left in, {len(output.counts) - 20_000} out")
    assert len(output.counts) < 20_000 + left


def test_refused_record_in_following_mode(topic_names: Topics, tmp_path: Path) -> None:
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output, configs={"max.message.bytes": "1000"})
    topic_names.write([(b"k" * 2000, b"8.8.8.8")])
    with service(topic_names, tmp_path / "log") as enricher:
        wait_until(lambda: "have not reached the output topic" in enricher.log(), seconds=60)
        assert enricher.stop() == [1]
        assert "1 of 1 records did not reach topic" in enricher.log()
        enricher.start()
        topic_names.write([(b"k" * 2000, b"8.8.8.8"), *[(b"%d" % number, b"8.8.8.8") for number in range(1000)]])

        # The producer has given up by then, but the engine hears of it only when it sends again.
        def dead() -> bool:
            topic_names.write([(b"key", b"8.8.8.8")])
            return enricher.processes[0].poll() is not None

        wait_until(dead, seconds=60)
        assert enricher.wait() == [1]
        assert enricher.log().splitlines()[-1].startswith("kafka_enrich.py: the dataflow died")


def test_refused_record_is_lost_without_a_word_with_the_defaults(topic_names: Topics) -> None:
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output, configs={"max.message.bytes": "1000"})
    topic_names.write([(b"k" * 2000, b"8.8.8.8")])
    with plain_flow(topic_names, "pass") as process:
        assert process.wait(60) == 0
    assert topic_names.read() == []


def test_partitions_added(topics: Topics, tmp_path: Path) -> None:
    output = Output(topics)
    write_all(topics, 10_000)
    with service(topics, tmp_path / "log") as enricher:
        output.wait_for(10_000)
        with topics.admin() as admin:
            admin.create_partitions({topics.input: 8})
            admin.wait_for_topics([topics.input])
        write_all(topics, 10_000, first=10_000)
        assert enricher.stop() == [0]
        enricher.start()
        output.wait_for(20_000)
        assert enricher.stop() == [0]
    output.read_to_end()
    assert len(output.counts) == 20_000


def test_hostile_input(topics: Topics, tmp_path: Path) -> None:
    big = [(os.urandom(900_000), b"8.8.8.8") for _ in range(50)] + [(b"key", os.urandom(900_000)) for _ in range(50)]
    small = [(os.urandom(number % 40), os.urandom(number % 200)) for number in range(20_000)]
    tombstones = [(b"key", None)] * 100
    invalid = [(b"key", b"no address %d" % number) for number in range(100_000)]
    with service(topics, tmp_path / "log") as enricher:
        written = 0
        for records in (small, tombstones, big, invalid, big):
            topics.write(records)
            written += len(records)
            wait_until(lambda: topics.end_offset() >= topics.end_offset(topics.input), seconds=60)
        assert enricher.megabytes() < 1200  # the producer's queue alone may hold 1 GB
        assert enricher.stop() == [0]
    assert topics.end_offset() == written


def test_soak(topics: Topics, tmp_path: Path) -> None:
    minutes, per_second = 5, 5_000
    records, output, megabytes = minutes * 60 * per_second, Output(topics), []
    with stream(topics, records, per_second) as hurry, service(topics, tmp_path / "log") as enricher:
        hurry.set()
        for _ in range(minutes):
            output.read_for(50)
            megabytes.append(enricher.megabytes())
            assert enricher.stop() == [0]
            enricher.start()
        output.wait_for(records)
        assert enricher.stop() == [0]
    check(output, records, f"soak of {minutes} minutes")
    print(f"resident memory, minute by minute: {megabytes} MB")
    assert max(megabytes) < 1.3 * min(megabytes)
