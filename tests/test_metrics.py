"""What METRICS_PORT serves: the numbers of the log."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from conftest import (
    BROKER_SETTINGS,
    SAMPLE_DATABASE,
    Api,
    Program,
    Reply,
    Topics,
    ended,
    get,
    program,
    samples,
    wait_until,
)
from kafka_server import KafkaServer, accepts_connections, free_port
from test_kafka_enrich import shares


def free_ports() -> int:
    """A free port with another one behind it."""
    while accepts_connections((port := free_port()) + 1):
        pass
    return port


def test_metrics_count_what_becomes_of_records(topics: Topics, kafka_enrich_program: Program) -> None:
    port = free_port()
    values = [b"2001:1b68::1", b"2001:1b68::1", b"no address", b"10.0.0.1", b"9.9.9.9", None]
    topics.write([(b"key", value) for value in values])
    process = kafka_enrich_program.start(
        **topics.environment(), KAFKA_TAIL="1", GEOIP_DATABASE=str(SAMPLE_DATABASE), METRICS_PORT=str(port)
    )
    results = {"located": 2, "tombstone": 1, "invalid_ip": 1, "reserved_ip": 1, "not_found": 1, "lookup_failed": 0}
    expected = {f"kafka_enrich_records_total {result}": count for result, count in results.items()}
    wait_until(lambda: expected.items() <= samples(port).items())
    found = samples(port)
    assert found["kafka_enrich_cache_hits_total"] == 1
    assert found["kafka_enrich_cache_entries"] == 4
    assert found["kafka_enrich_lookup_seconds_count"] == 3  # of addresses
    assert found["kafka_enrich_commit_seconds_count"] >= 1
    assert found["kafka_enrich_located_total Türkiye"] == 2
    assert found["kafka_enrich_rebalances_total"] == 1
    assert found[f"kafka_enrich_database_build_timestamp_seconds {SAMPLE_DATABASE}"] > 1.6e9
    assert found["kafka_enrich_database_swaps_total used"] == found["kafka_enrich_database_swaps_total refused"] == 0
    assert found["process_resident_memory_bytes"] > 1e7
    assert any(name.startswith("kafka_enrich_build_info 0.21.1 ") for name in found)
    process.terminate()
    assert ended(process).exit_code == 0


def test_record_without_a_value_that_comes_alone_is_counted(topics: Topics, kafka_enrich_program: Program) -> None:
    port = free_port()
    process = kafka_enrich_program.start(
        **topics.environment(), KAFKA_TAIL="1", GEOIP_DATABASE=str(SAMPLE_DATABASE), METRICS_PORT=str(port)
    )
    wait_until(lambda: samples(port).get("kafka_enrich_rebalances_total") == 1)
    for value, result in [(None, "tombstone"), (b"", "invalid_ip")]:
        topics.write([(b"key", value)])
        wait_until(partial(counted, port, result), 10)
    process.terminate()
    assert ended(process).exit_code == 0
    assert topics.end_offset() == 2


@pytest.mark.timeout(600)
def test_lag_health_and_countries_where_the_source_fails(
    topics: Topics, kafka_enrich_program: Program, api: Api
) -> None:
    """What waits for the source since before the start is not committed, and after a minute that is not well."""
    api.reply = lambda _path: Reply(status=503)
    port = free_port()
    topics.write([(b"%d" % number, b"8.8.8.8") for number in range(100)])
    process = kafka_enrich_program.start(
        **topics.environment(),
        KAFKA_TAIL="1",
        IPAPI_URL=api.url,
        ON_LOOKUP_FAILED="wait",
        METRICS_PORT=str(port),
        FIELDS="city,country_name,country_code",
    )
    wait_until(lambda: samples(port).get("kafka_enrich_rebalances_total") == 1)

    def lag() -> float:
        return sum(value for name, value in samples(port).items() if name.startswith("kafka_enrich_lag_records "))

    wait_until(lambda: lag() == 100)
    assert sum(name.startswith("kafka_enrich_lag_records ") for name in samples(port)) == 4
    wait_until(lambda: "waits for the source of locations" in get(port, "/healthz"), 120)
    located = b'{"city": "Mountain View", "region": "", "country_name": "United States", "country_code": "US"}'
    api.reply = lambda _path: Reply(located)
    wait_until(lambda: samples(port).get("kafka_enrich_located_total US") == 100, 90)
    wait_until(lambda: lag() == 0)
    assert get(port, "/healthz") == "ok\n"
    assert get(port, "/health") == "here are /metrics and /healthz\n"
    process.terminate()
    assert ended(process).exit_code == 0


@pytest.mark.timeout(600)
def test_health_tells_when_brokers_are_away_for_a_minute(tmp_path: Path) -> None:
    with KafkaServer(settings=BROKER_SETTINGS) as server, contextmanager(program)(tmp_path, "kafka_enrich.py") as its:
        topics = Topics(server.address, "in", "out")
        topics.create("in")
        topics.create("out")
        port = free_port()
        database = {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}
        process = its.start(**topics.environment(), **database, KAFKA_TAIL="1", METRICS_PORT=str(port))
        wait_until(lambda: get(port, "/healthz") == "ok\n")
        server.kill()
        wait_until(lambda: "waits for Kafka: " in get(port, "/healthz"), 120)
        assert get(port).startswith("# HELP")
        process.kill()


def counted(port: int, result: str) -> bool:
    return samples(port).get(f"kafka_enrich_records_total {result}") == 1


def test_processes_have_a_port_each(topics: Topics, kafka_enrich_program: Program) -> None:
    port = free_ports()
    process = kafka_enrich_program.start(
        **topics.environment(),
        KAFKA_TAIL="1",
        GEOIP_DATABASE=str(SAMPLE_DATABASE),
        PROCESSES="2",
        METRICS_PORT=str(port),
    )
    wait_until(lambda: shares(topics) == [2, 2])
    topics.write([(b"key-%d" % number, b"9.9.9.9") for number in range(40)])

    def records(of: int) -> float:
        return samples(of).get("kafka_enrich_records_total not_found", 0)

    wait_until(lambda: records(port) + records(port + 1) == 40)
    assert records(port) > 0
    assert records(port + 1) > 0
    process.terminate()
    assert ended(process).exit_code == 0


def test_port_in_use(topics: Topics, kafka_enrich_program: Program) -> None:
    port = topics.address.rpartition(":")[2]
    result = kafka_enrich_program(**topics.environment(), GEOIP_DATABASE=str(SAMPLE_DATABASE), METRICS_PORT=port)
    assert result.exit_code == 1  # it may be free the next time, so that supervisors try again
    assert f"kafka_enrich.py: METRICS_PORT={port} cannot be used: " in result.errors
    assert "Traceback" not in result.errors
