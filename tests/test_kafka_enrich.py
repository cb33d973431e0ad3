"""The program on a real broker: from one topic to the other, and every way in which it cannot."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer

import kafka_enrich
from conftest import PROJECT, SAMPLE_DATABASE, Api, Program, Reply, Topics, ended, wait_until
from load_data import SAMPLE, rows

DATABASE = {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}


def summary(**results: int) -> str:
    return f"{sum(results.values())} records: {', '.join(f'{count} {result}' for result, count in results.items())}; "


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
    assert summary(located=4, tombstone=1, invalid_ip=4, reserved_ip=1, not_found=1) in enriched.errors
    assert dict(topics.read())[b"tombstone"] is None
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
    assert "nothing new" in enriched.errors
    assert "INFO 0 records; 0 from the cache" in enriched.errors


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


def test_unknown_argument_and_help(kafka_enrich_program: Program) -> None:
    assert kafka_enrich_program("--fast").exit_code == 2
    helped = kafka_enrich_program("--help")
    assert helped.exit_code == 0
    assert all(name in helped.output for name in kafka_enrich.NAMES)


def test_property_that_librdkafka_does_not_know(kafka_enrich_program: Program) -> None:
    refused = kafka_enrich_program(KAFKA_CLIENT_NO_SUCH="1", **DATABASE)
    assert refused.exit_code == 2
    assert 'No such configuration property: "no.such"' in refused.errors.splitlines()[-1]


def test_second_run_finds_nothing_new_and_another_group_does_all(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"key", b"186.58.0.1")])
    environment = {**topics.environment(), **DATABASE}
    assert summary(located=1) in kafka_enrich_program(**environment).errors
    assert "nothing new" in kafka_enrich_program(**environment).errors
    assert summary(located=1) in kafka_enrich_program(**environment, KAFKA_GROUP_ID=topics.input).errors
    assert len(topics.read()) == 2


def test_key_headers_and_timestamp_are_kept(kafka_enrich_program: Program, topics: Topics) -> None:
    headers = [("name", b"\xff\x00"), ("name", b"")]
    with KafkaProducer(bootstrap_servers=topics.address) as producer:
        producer.send(topics.input, b"186.58.0.1", b"\xff", headers, timestamp_ms=1_600_000_000_000).get(10)
    assert kafka_enrich_program(**topics.environment(), **DATABASE).exit_code == 0
    with KafkaConsumer(topics.output, bootstrap_servers=topics.address, auto_offset_reset="earliest") as consumer:
        record = next(consumer)
    assert (record.key, record.headers, record.timestamp) == (b"\xff", headers, 1_600_000_000_000)


def test_latest_starts_from_now(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"key", b"186.58.0.1")])
    environment = {**topics.environment(), **DATABASE, "KAFKA_CONSUMER_AUTO_OFFSET_RESET": "latest"}
    assert "nothing new" in kafka_enrich_program(**environment).errors
    topics.write([(b"key", b"186.58.0.1")])
    assert summary(located=1) in kafka_enrich_program(**environment).errors


def test_two_copies_share_a_topic(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, "KAFKA_TAIL": "1", "DELIVERY_GUARANTEE": "exactly_once"}
    copies = [kafka_enrich_program.start(**environment) for _ in range(2)]
    for copy in copies:
        wait_for_line(copy, "reads partitions")
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(500)])
    wait_until(lambda: sum(1 for _ in topics.read()) >= 500)
    for copy in copies:
        copy.terminate()
    assert [ended(copy).exit_code for copy in copies] == [0, 0]
    assert len(topics.read()) == 500


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
    assert "Connection refused" in error


@pytest.mark.parametrize("missing", ["input", "output"])
def test_missing_topic_is_not_created(kafka_enrich_program: Program, topic_names: Topics, missing: str) -> None:
    topic_names.create(topic_names.output if missing == "input" else topic_names.input)
    name = getattr(topic_names, missing)
    for _ in range(2):
        error = one_error(kafka_enrich_program(**topic_names.environment(), **DATABASE))
        assert f"topic {name!r} does not exist; create it, or run: python load_data.py" in error


def test_as_many_workers_as_partitions(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(100)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, BYTEWAX_WORKERS_PER_PROCESS="4")
    assert enriched.exit_code == 0
    assert summary(located=100) in enriched.errors


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
def test_compression(kafka_enrich_program: Program, topic_names: Topics, compression: str) -> None:
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
    counted = int(enriched.errors.split(" records: ")[0].split()[-1])
    assert 2 <= counted < 200
    assert len(topics.read()) == counted


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a process has started, as Linux tells them."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_processes_share_a_bounded_run(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(1000)])
    enriched = kafka_enrich_program(**topics.environment(), **DATABASE, PROCESSES="3")
    assert enriched.exit_code == 0
    assert sum(int(count) for count in re.findall(r"INFO (\d+) records", enriched.errors)) == 1000
    assert len(topics.read()) == 1000


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
    assert sum(int(count) for count in re.findall(r"INFO (\d+) records", stopped.errors)) == 1000
    wait_until(lambda: gone(started), 5)  # the resource tracker of multiprocessing ends after the others


def test_process_that_dies_ends_all(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"186.58.0.1") for number in range(1000)])
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, PROCESSES="2", KAFKA_TAIL="1")
    wait_until(lambda: topics.end_offset() == 1000)
    started = children(process)
    os.kill(started[-1], signal.SIGKILL)
    died = ended(process)
    assert died.exit_code == 1
    assert "of 2 ended with -9" in died.errors
    wait_until(lambda: gone(started), 5)  # the resource tracker of multiprocessing ends after the others


def test_processes_end_with_the_one_that_started_them(kafka_enrich_program: Program, topics: Topics) -> None:
    process = kafka_enrich_program.start(**topics.environment(), **DATABASE, PROCESSES="2", KAFKA_TAIL="1")
    wait_for_line(process, "reads partitions")
    started = children(process)
    assert len(started) >= 2
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


def test_following_goes_on_where_it_left_off(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, "KAFKA_TAIL": "1"}
    for number in range(2):
        topics.write([(b"key", b"186.58.0.%d" % n) for n in range(100)])
        process = kafka_enrich_program.start(**environment)
        wait_until(lambda: topics.end_offset() >= topics.end_offset(topics.input))
        process.send_signal(signal.SIGTERM)
        assert ended(process, seconds=10).exit_code == 0
        assert topics.end_offset() == 100 * (number + 1)


def test_signal_ends_following_in_a_lookup(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda _path: Reply(delay=5)
    topics.write([(b"key", b"8.8.8.8"), (b"key", b"8.8.4.4")])
    process = kafka_enrich_program.start(**topics.environment(), IPAPI_URL=api.url, KAFKA_TAIL="1")
    wait_until(lambda: bool(api.asked))
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
    assert "Traceback" not in stopped.errors


def test_failed_lookup_stops_where_that_is_wanted(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    api.reply = lambda path: (
        Reply(b'{"city": "Somewhere", "region": null, "country_name": null}') if "8.8.8.8" in path else Reply(b"", 403)
    )
    topics.write([(b"key", b"8.8.8.8"), (b"key", b"8.8.4.4"), (b"key", b"10.0.0.1")])
    environment = {**topics.environment(), "IPAPI_URL": api.url, "ON_LOOKUP_FAILED": "stop"}
    enriched = kafka_enrich_program(**environment, KAFKA_TAIL="1")
    assert enriched.exit_code == 1
    assert enriched.errors.splitlines()[-1] == (
        "kafka_enrich.py: 8.8.4.4 was not looked up: HTTP 403; a new start tries again (ON_LOOKUP_FAILED=stop)"
    )
    assert "Traceback" not in enriched.errors
    assert not any(b"lookup_failed" in (value or b"") for _, value in topics.read())


def test_settings_are_logged_without_secrets(kafka_enrich_program: Program, topics: Topics) -> None:
    environment = {**topics.environment(), **DATABASE, "IPAPI_KEY": "s3cret"}
    enriched = kafka_enrich_program(**environment)
    assert f"KAFKA_INPUT_TOPIC={topics.input}," in enriched.errors
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
