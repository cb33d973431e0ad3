"""The program on a real broker: from one topic to the other, and every way in which it cannot."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from kafka import TopicPartition
from kafka.admin import OffsetSpec

import kafka_enrich
from conftest import PROJECT, SAMPLE_DATABASE, Api, Ended, Program, Reply, Topics, ended, wait_until
from kafka_server import free_port
from load_data import SAMPLE, rows

DATABASE = {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}


def summary(
    located: int = 0, invalid_ip: int = 0, reserved_ip: int = 0, not_found: int = 0, lookup_failed: int = 0
) -> str:
    return (
        f"{located + invalid_ip + reserved_ip + not_found + lookup_failed} records in: {located} located, "
        f"{invalid_ip} invalid_ip, {reserved_ip} reserved_ip, {not_found} not_found, {lookup_failed} lookup_failed"
    )


def test_sample_from_load_to_output(
    kafka_enrich_program: Program, load_data_program: Program, topic_names: Topics
) -> None:
    assert load_data_program(str(SAMPLE), **topic_names.environment()).exit_code == 0
    enriched = kafka_enrich_program(**topic_names.environment(), **DATABASE)
    assert (enriched.exit_code, enriched.output) == (0, "")
    loaded = [row for row in rows(SAMPLE) if isinstance(row, tuple)]
    assert summary(located=len(loaded) - 2, reserved_ip=1, not_found=1) in enriched.errors

    records = [(key, json.loads(value or b"")) for key, value in topic_names.read()]
    assert Counter((record["ip"], (key or b"").decode()) for key, record in records) == Counter(loaded)
    for key, record in records:
        assert record.get("country_name") == (None if "error" in record else (key or b"").decode())


def test_every_kind_of_record(kafka_enrich_program: Program, topics: Topics) -> None:
    values = [b"186.58.0.1", b" 186.58.0.1\n", b"10.0.0.1", b"9.9.9.9", b"ip", b"", b"\xff", b"8.8.8.8:53"]
    topics.write([(b"key", value) for value in values])
    topics.write([(b"", b"186.58.0.1"), (None, b"186.58.0.1"), (b"tombstone", None)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE)
    assert enriched.exit_code == 0
    assert summary(located=4, invalid_ip=5, reserved_ip=1, not_found=1) in enriched.errors
    assert Counter(key for key, _ in topics.read()) == Counter({b"key": 8, b"": 1, None: 1, b"tombstone": 1})


def test_order_and_partition_within_a_key(kafka_enrich_program: Program, topics: Topics) -> None:
    written = [(b"key-%d" % (number % 7), b"value %d" % number) for number in range(2000)]
    topics.write(written)
    assert kafka_enrich_program(**topics.environment(), **DATABASE, BYTEWAX_WORKERS_PER_PROCESS="2").exit_code == 0
    expected: dict[bytes | None, list[str]] = defaultdict(list)
    found: dict[bytes | None, list[str]] = defaultdict(list)
    for key, value in written:
        expected[key].append(value.decode())
    for output_key, output in topics.read():
        found[output_key].append(json.loads(output or b"")["ip"])
    assert found == expected
    # The same key has the same partition number in both topics, so each partition holds the same keys.
    assert [key for key, _ in topics.read()] == [key for key, _ in topics.read(topics.input)]


def test_largest_records(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"k" * 1_040_000, b"186.58.0.1"), (b"k", b"v" * 1_040_000), (b"k" * 500_000, b"v" * 500_000)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE)
    assert enriched.exit_code == 0, enriched.errors
    assert sorted(len(key or b"") for key, _ in topics.read()) == [1, 500_000, 1_040_000]


def test_empty_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE)
    assert enriched.exit_code == 0
    assert summary() in enriched.errors


def test_http_api(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    located = {"city": "Mountain View", "region": "California", "country_name": "United States"}

    def reply(path: str) -> Reply:
        return Reply(json.dumps(located).encode()) if "8.8.8.8" in path else Reply(b"", 403)

    api.reply = reply
    topics.write([(b"key", value) for value in (b"8.8.8.8", b"8.8.8.8", b"10.0.0.1", b"9.9.9.9", b"1.1.1.1")])
    enriched = kafka_enrich_program(**topics.environment(), IPAPI_URL=api.url, IPAPI_KEY="s3cret", LOG_LEVEL="DEBUG")
    assert enriched.exit_code == 0
    assert summary(located=2, reserved_ip=1, lookup_failed=2) in enriched.errors
    assert api.asked == ["/8.8.8.8/json/?key=s3cret", "/9.9.9.9/json/?key=s3cret"]
    assert "s3cret" not in enriched.errors
    assert enriched.errors.count("WARNING") == 1
    assert json.loads(topics.read()[0][1] or b"") == {"ip": "8.8.8.8", **located}


def test_bad_setting_ends_it_before_it_touches_kafka(kafka_enrich_program: Program) -> None:
    enriched = kafka_enrich_program(CACHE_SIZE="many")
    assert enriched.exit_code == 2
    assert enriched.errors == "kafka_enrich.py: CACHE_SIZE='many' is not a whole number from 0 to 10000000\n"


def one_error(enriched: object) -> str:
    """The one line that the program left besides its log."""
    assert isinstance(enriched, tuple)
    exit_code, output, errors = enriched
    assert exit_code == 1
    # The engine prints that where its processes have not all begun to listen.
    assert all("error connecting to worker" in line for line in output.splitlines())
    lines = [line for line in errors.splitlines() if " INFO " not in line]
    assert len(lines) == 1, errors
    assert lines[0].startswith("kafka_enrich.py: ")
    return str(lines[0])


def test_broker_away(kafka_enrich_program: Program) -> None:
    error = one_error(kafka_enrich_program(KAFKA_BROKERS="localhost:1", **DATABASE))
    assert "Kafka at localhost:1 (KAFKA_BROKERS) cannot be used: " in error
    assert "ECONNREFUSED" in error


@pytest.mark.parametrize("missing", ["input", "output"])
def test_missing_topic_is_not_created(kafka_enrich_program: Program, topic_names: Topics, missing: str) -> None:
    topic_names.create(topic_names.output if missing == "input" else topic_names.input)
    name = getattr(topic_names, missing)
    for _ in range(2):
        error = one_error(kafka_enrich_program(**topic_names.environment(), **DATABASE))
        assert f"topic {name!r} does not exist; create it, or run: python load_data.py" in error


def test_more_workers_than_partitions(kafka_enrich_program: Program, topics: Topics) -> None:
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, BYTEWAX_WORKERS_PER_PROCESS="5")
    assert "5 workers are too many" in one_error(enriched)


def test_as_many_workers_as_partitions(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(100)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, BYTEWAX_WORKERS_PER_PROCESS="4")
    assert enriched.exit_code == 0
    assert summary(located=100) in enriched.errors


def assert_missing_are_counted(enriched: Ended, topic_names: Topics, written: int) -> None:
    assert enriched.exit_code == 1
    last = enriched.errors.splitlines()[-1]
    missing = written - topic_names.end_offset()
    assert missing >= 1
    if "the dataflow died" in last:  # it does where a record is sent after the refusal has come
        assert re.search(r"; [1-9][0-9]* of the records it read did not reach topic", last)
    else:
        assert last.startswith(f"kafka_enrich.py: {missing} of {written} records did not reach topic")


def test_refused_record_is_counted_as_missing(kafka_enrich_program: Program, topic_names: Topics) -> None:
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output, configs={"max.message.bytes": "1000"})
    topic_names.write([(b"small", b"186.58.0.1"), (b"k" * 2000, b"186.58.0.1")])
    enriched = kafka_enrich_program(**topic_names.environment(), **DATABASE)
    assert_missing_are_counted(enriched, topic_names, 2)


def test_refused_record_stops_the_dataflow(kafka_enrich_program: Program, topic_names: Topics) -> None:
    topic_names.create(topic_names.input, partitions=1)
    topic_names.create(topic_names.output, partitions=1, configs={"max.message.bytes": "20000"})
    topic_names.write([(b"k" * 30_000, b"186.58.0.1")])
    topic_names.write([(b"key-%d" % number, b"186.58.0.1") for number in range(20_000)])
    enriched = kafka_enrich_program(**topic_names.environment(), **DATABASE)
    assert enriched.exit_code == 1
    last = enriched.errors.splitlines()[-1]
    assert last.startswith("kafka_enrich.py: ")
    assert "did not reach" in last


def test_compression_that_the_engine_cannot_read(kafka_enrich_program: Program, topic_names: Topics) -> None:
    topic_names.create(topic_names.input, configs={"compression.type": "zstd"})
    topic_names.create(topic_names.output)
    topic_names.write([(b"key", b"186.58.0.1")])
    enriched = kafka_enrich_program(**topic_names.environment(), **DATABASE)
    assert enriched.exit_code == 1
    assert "zstd" in enriched.errors.splitlines()[-1]


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4"])
def test_compression_that_the_engine_reads(
    kafka_enrich_program: Program, topic_names: Topics, compression: str
) -> None:
    topic_names.create(topic_names.input, configs={"compression.type": compression})
    topic_names.create(topic_names.output)
    topic_names.write([(b"key", b"186.58.0.1")])
    assert kafka_enrich_program(**topic_names.environment(), **DATABASE).exit_code == 0
    assert len(topic_names.read()) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_pass(kafka_enrich_program: Program, topics: Topics, api: Api, signum: signal.Signals) -> None:
    api.reply = lambda _path: Reply(b'{"city": "Somewhere", "region": null, "country_name": null}', delay=0.1)
    topics.write([(b"key", b"8.8.%d.8" % number) for number in range(200)])
    process = kafka_enrich_program.start(**topics.environment(), IPAPI_URL=api.url)
    wait_until(lambda: len(api.asked) > 2)
    process.send_signal(signum)
    enriched = ended(process, seconds=10)
    assert enriched.exit_code == 128 + signum
    assert "Traceback" not in enriched.errors
    assert " records in: " in enriched.errors
    counted = int(enriched.errors.split(" records in: ")[0].split()[-1])
    assert 2 <= counted < 200
    assert len(topics.read()) == counted


def cluster(processes: int) -> list[dict[str, str]]:
    addresses = ";".join(f"localhost:{free_port()}" for _ in range(processes))
    return [{"BYTEWAX_ADDRESSES": addresses, "BYTEWAX_PROCESS_ID": str(number)} for number in range(processes)]


def test_two_processes(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(1000)])
    processes = [
        kafka_enrich_program.start(**topics.environment(), **DATABASE, **environment) for environment in cluster(2)
    ]
    results = [ended(process) for process in processes]
    assert [result.exit_code for result in results] == [0, 0]
    assert sum(int(result.errors.split(" records in: ")[0].split()[-1]) for result in results) == 1000
    assert len(topics.read()) == 1000


def test_signal_ends_a_process_that_waits_for_the_others(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, **cluster(2)[0])
    wait_until(lambda: listening_sockets(process.pid) > 0)
    process.send_signal(signal.SIGTERM)
    assert ended(process, seconds=kafka_enrich.STOP_SECONDS + 5).exit_code == 128 + signal.SIGTERM


def listening_sockets(pid: int) -> int:
    """Count the listening TCP sockets of a process, as Linux tells them."""
    inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists() or link.is_symlink()}
    table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[3] == "0A" and f"socket:[{row.split()[9]}]" in inodes for row in table)


def test_address_of_a_process_in_use(kafka_enrich_program: Program, topics: Topics) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        addresses = f"localhost:{taken.getsockname()[1]};localhost:{free_port()}"
        enriched = kafka_enrich_program(
            **topics.environment(), **DATABASE, BYTEWAX_ADDRESSES=addresses, BYTEWAX_PROCESS_ID="0"
        )
    assert "Address already in use" in one_error(enriched)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a process has started, as Linux tells them."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_processes_are_as_one(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(1000)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, PROCESSES="3")
    assert enriched.exit_code == 0
    assert enriched.errors.count(" records in: ") == 1
    assert summary(located=1000) in enriched.errors
    assert len(topics.read()) == 1000


def test_processes_count_what_is_missing(kafka_enrich_program: Program, topic_names: Topics) -> None:
    topic_names.create(topic_names.input)
    topic_names.create(topic_names.output, configs={"max.message.bytes": "1000"})
    topic_names.write([(b"%d" % number, b"8.8.8.8") for number in range(100)] + [(b"k" * 2000, b"8.8.8.8")])
    enriched = kafka_enrich_program(**topic_names.environment(), **DATABASE, PROCESSES="2")
    assert_missing_are_counted(enriched, topic_names, 101)


def test_signal_ends_all_processes(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(1000)])
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, PROCESSES="2", KAFKA_TAIL="1")
    wait_until(lambda: topics.end_offset() == 1000)
    started = children(process)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.exit_code == 0
    assert time.monotonic() - before < 5
    assert summary(located=1000) in stopped.errors
    assert len(started) == 2
    assert gone(started)


def test_process_that_dies_ends_all(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(1000)])
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, PROCESSES="2", KAFKA_TAIL="1")
    wait_until(lambda: topics.end_offset() == 1000)
    started = children(process)
    os.kill(started[1], signal.SIGKILL)
    died = ended(process)
    assert died.exit_code == 1
    assert died.errors.splitlines()[-1].startswith("kafka_enrich.py: the dataflow died: process ")
    assert gone(started)


def test_setting_that_a_process_cannot_use(kafka_enrich_program: Program, topics: Topics, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**topics.environment(), **DATABASE, "KAFKA_TAIL": "1", "RECOVERY_DIR": str(tmp_path / "file")}
    enriched = kafka_enrich_program(**environment, PROCESSES="2")
    assert enriched.exit_code == 2
    assert "kafka_enrich.py: RECOVERY_DIR=" in enriched.errors
    assert re.search(r"kafka_enrich.py: process [01] of 2 cannot use a setting, see above\n$", enriched.errors)


def test_processes_and_a_child_of_somebody_else(
    kafka_enrich_program: Program, topics: Topics, api: Api, tmp_path: Path
) -> None:
    end_it, ended_it = tmp_path / "end", tmp_path / "ended"
    api.reply = lambda _path: Reply(b'{"city": "Somewhere", "region": null, "country_name": null}', delay=0.2)
    topics.write([(b"%d" % number, b"8.8.8.%d" % number) for number in range(20)])
    child = f"(until [ -e {end_it} ]; do sleep 0.1; done; touch {ended_it}) &"
    process = subprocess.Popen(  # as process 1 of a container has children that it did not start
        ["sh", "-c", f'{child} exec "$0" "$1"', sys.executable, str(kafka_enrich_program.script)],
        env={**kafka_enrich_program.environment, **topics.environment(), "IPAPI_URL": api.url, "PROCESSES": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: bool(api.asked))
    end_it.touch()
    enriched = ended(process)
    assert ended_it.exists()
    assert enriched.exit_code == 0
    assert summary(located=20) in enriched.errors


def test_processes_end_with_the_one_that_started_them(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, PROCESSES="2", KAFKA_TAIL="1")
    wait_until(lambda: len(children(process)) == 2)
    started = children(process)
    process.kill()
    wait_until(lambda: gone(started))


def test_http_api_keeps_its_connection(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda _path: Reply(b'{"city": "Somewhere", "region": null, "country_name": null}')
    topics.write([(b"key", b"8.8.8.%d" % number) for number in range(20)])
    assert kafka_enrich_program(**topics.environment(), IPAPI_URL=api.url).exit_code == 0
    assert len(api.asked) == 20
    assert len(api.clients) == 1


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Read the program's log up to a line with a text; what was read."""
    assert process.stderr
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} is not in the log:\n{seen}")


def wait_for_epochs(topics: Topics) -> None:
    """Wait for the ends of three epochs: the place to resume from is behind all that came out before."""
    progress = f"{topics.input}-to-{topics.output}-1-workers-progress"
    three_more = topics.end_offset(progress) + 3
    wait_until(lambda: topics.end_offset(progress) >= three_more)


def test_following_goes_on_where_it_left_off(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, "KAFKA_TAIL": "1"}
    for number in range(2):
        topics.write([(b"key", b"186.58.0.%d" % n) for n in range(100)])
        process = kafka_enrich_program.start(**environment)
        wait_until(lambda: topics.end_offset() >= topics.end_offset(topics.input))
        wait_for_epochs(topics)
        process.send_signal(signal.SIGTERM)
        assert ended(process, seconds=10).exit_code == 0
        assert topics.end_offset() == 100 * (number + 1)


def test_following_keeps_one_execution_of_progress(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(100)])
    environment = {**topics.environment(), **DATABASE, "KAFKA_TAIL": "1", "BYTEWAX_WORKERS_PER_PROCESS": "2"}
    progress = f"{topics.input}-to-{topics.output}-2-workers-progress"
    for _ in range(4):
        process = kafka_enrich_program.start(**environment)
        wait_for_line(process, "records in")
        process.send_signal(signal.SIGTERM)
        assert ended(process, seconds=10).exit_code == 0
    executions = {int.from_bytes((key or b"")[:8], "little") for key, _ in topics.read(progress)}
    assert executions == {2, 3}, "all but the last are forgotten when another one begins"


def test_offsets_of_a_topic_that_is_only_just_created(topic_names: Topics) -> None:
    created_soon = threading.Timer(1, topic_names.create, [topic_names.input])
    created_soon.start()
    partition = TopicPartition(topic_names.input, 0)
    with topic_names.admin() as admin:
        assert kafka_enrich.offsets_of(admin, [partition], OffsetSpec.LATEST) == {partition: 0}
    created_soon.join()


def test_signal_ends_following_in_a_lookup(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda _path: Reply(delay=5)
    topics.write([(b"key", b"8.8.8.8"), (b"key", b"8.8.4.4")])
    process = kafka_enrich_program.start(**topics.environment(), IPAPI_URL=api.url, KAFKA_TAIL="1")
    wait_until(lambda: len(api.asked) >= 4)  # the second address, so that a record has been handed over
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process).exit_code == 0
    assert time.monotonic() - before < 5


def test_signal_ends_following_of_an_empty_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, KAFKA_TAIL="1")
    wait_for_line(process, "locating with")
    process.send_signal(signal.SIGINT)
    stopped = ended(process, seconds=5)
    assert stopped.exit_code == 0
    assert "ended by SIGINT before the first record" in stopped.errors


def test_threads_of_librdkafka_interrupt_none(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"key", b"8.8.8.8")])
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, KAFKA_TAIL="1")
    wait_until(lambda: topics.end_offset() == 1)
    threads = list(Path(f"/proc/{process.pid}/task").iterdir())
    of_librdkafka = [thread for thread in threads if (thread / "comm").read_text().startswith("rdk:broker")]
    assert of_librdkafka
    assert {os.sched_getscheduler(int(thread.name)) for thread in of_librdkafka} == {os.SCHED_BATCH}
    process.terminate()
    assert ended(process).exit_code == 0


def test_failed_lookup_stops_where_that_is_wanted(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda path: (
        Reply(b'{"city": "Somewhere", "region": null, "country_name": null}') if "8.8.8.8" in path else Reply(b"", 403)
    )
    topics.write([(b"key", b"8.8.8.8"), (b"key", b"8.8.4.4"), (b"key", b"10.0.0.1")])
    environment = {**topics.environment(), "IPAPI_URL": api.url, "ON_LOOKUP_FAILED": "stop"}
    enriched = kafka_enrich_program(**environment, KAFKA_TAIL="1")
    assert enriched.exit_code == 1
    assert enriched.errors.splitlines()[-1] == (
        "kafka_enrich.py: the look-up of 8.8.4.4 failed, and ON_LOOKUP_FAILED is stop; a new start tries again"
    )
    assert "Traceback" not in enriched.errors
    assert not any(b"lookup_failed" in (value or b"") for _, value in topics.read())


def test_settings_are_logged_without_secrets(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, "IPAPI_KEY": "s3cret"}
    enriched = kafka_enrich_program(**environment)
    assert f"input_topic={topics.input!r}" in enriched.errors
    assert "s3cret" not in enriched.errors


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
