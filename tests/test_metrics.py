"""What METRICS_PORT serves: the numbers of the log, and 200 on /healthz while the dataflow runs."""

import time
import urllib.error
import urllib.request
from threading import get_ident

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import SAMPLE_DATABASE, Program, Topics, ended, wait_until
from kafka_enrich import (
    Location,
    LookupFailed,
    SettingsError,
    Tally,
    make_get_location,
    metrics_served,
    new_tallies,
    open_database,
    read_settings,
)
from kafka_server import accepts_connections, free_port


def get(port: int, path: str = "/metrics") -> str:
    """What a port serves; an empty text while nothing does."""
    try:
        with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=10) as response:
            body: bytes = response.read()
            return body.decode()
    except urllib.error.URLError:
        return ""


def samples(port: int) -> dict[str, float]:
    """Every sample, by its name and its labels' values."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(get(port))
        for sample in family.samples
    }


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
    results = {"located": 2, "invalid_ip": 2, "reserved_ip": 1, "not_found": 1, "lookup_failed": 0}
    expected = {f"kafka_enrich_records_total {result}": count for result, count in results.items()}
    wait_until(lambda: expected.items() <= samples(port).items())
    found = samples(port)
    assert found["kafka_enrich_cache_hits_total"] == 1
    assert found["kafka_enrich_cache_entries"] == 5
    assert found["kafka_enrich_lookup_seconds_count"] == 1  # of one to a hundred
    assert 0 < found["kafka_enrich_database_age_seconds"] < 3e8
    assert 0 <= found["kafka_enrich_seconds_since_last_record"] < 60
    assert found["process_resident_memory_bytes"] > 1e7
    assert any(name.startswith("kafka_enrich_build_info 0.15.1 3.10.") for name in found)
    process.terminate()
    assert ended(process).exit_code == 0


def test_healthz_is_there_while_the_dataflow_runs(topics: Topics, kafka_enrich_program: Program) -> None:
    port = free_port()
    environment = {**topics.environment(), "KAFKA_TAIL": "1", "GEOIP_DATABASE": str(SAMPLE_DATABASE)}
    process = kafka_enrich_program.start(**environment, METRICS_PORT=str(port))
    wait_until(lambda: get(port, "/healthz") == "the dataflow runs\n")
    process.terminate()
    assert ended(process).exit_code == 0
    assert get(port, "/healthz") == ""


def test_processes_have_a_port_each(topics: Topics, kafka_enrich_program: Program) -> None:
    port = free_ports()
    process = kafka_enrich_program.start(
        **topics.environment(),
        KAFKA_TAIL="1",
        GEOIP_DATABASE=str(SAMPLE_DATABASE),
        PROCESSES="2",
        METRICS_PORT=str(port),
    )
    wait_until(lambda: bool(get(port, "/healthz") and get(port + 1, "/healthz")))
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
    assert result.exit_code == 2
    assert f"kafka_enrich.py: METRICS_PORT: port {port} cannot be used: " in result.errors
    assert "Traceback" not in result.errors


def test_lookups_are_timed_and_failures_too() -> None:
    def locate(text: str) -> Location:
        time.sleep(0.02)
        if text == "failed":
            raise LookupFailed
        return Location(city="Here", region=None, country_name=None)

    port, tally = free_port(), Tally(iter(new_tallies(1)))
    settings = read_settings({"METRICS_PORT": str(port)})
    with metrics_served(settings, locate, tally) as timed:
        get_location = make_get_location(timed, 100, "mark", tally)
        for value in (b"known", b"known", b"failed"):
            get_location((None, value))
        found = samples(port)
    assert found["kafka_enrich_lookup_seconds_count"] == 2
    assert found["kafka_enrich_lookup_seconds_sum"] > 0.04
    assert found["kafka_enrich_cache_entries"] == 1
    assert "kafka_enrich_database_age_seconds" not in found
    assert not accepts_connections(port)


def test_one_in_a_hundred_of_a_database_s_lookups_is_timed() -> None:
    port, tally = free_port(), Tally(iter(new_tallies(1)))
    settings = read_settings({"METRICS_PORT": str(port), "GEOIP_DATABASE": str(SAMPLE_DATABASE)})
    with metrics_served(settings, open_database(str(SAMPLE_DATABASE)), tally) as timed:
        get_location = make_get_location(timed, 0, "mark", tally)
        for _ in range(250):
            get_location((None, b"186.58.0.1"))
        assert samples(port)["kafka_enrich_lookup_seconds_count"] == 3


def test_cache_hits_never_fall_while_a_lookup_waits() -> None:
    port, tally = free_port(), Tally(iter(new_tallies(1)))
    settings = read_settings({"METRICS_PORT": str(port)})
    seen = []

    def locate(text: str) -> Location:
        seen.append(samples(port)["kafka_enrich_cache_hits_total"])
        return Location(city=text, region=None, country_name=None)

    with metrics_served(settings, locate, tally) as timed:
        get_location = make_get_location(timed, 100, "mark", tally)
        for value in (b"first", b"first", b"first"):
            get_location((None, value))
        assert samples(port)["kafka_enrich_cache_hits_total"] == 2
        get_location((None, b"second"))
    assert seen == [0, 2]


def test_seconds_since_the_last_record() -> None:
    port, tally = free_port(), Tally(iter(new_tallies(1)))
    settings = read_settings({"METRICS_PORT": str(port), "GEOIP_DATABASE": str(SAMPLE_DATABASE)})
    with metrics_served(settings, open_database(str(SAMPLE_DATABASE)), tally):

        def since() -> float:
            return samples(port)["kafka_enrich_seconds_since_last_record"]

        wait_until(lambda: since() > 1)
        tally[get_ident()][0] += 1
        wait_until(lambda: since() < 1)


def test_without_a_port_nothing_is_served_or_timed() -> None:
    locate = open_database(str(SAMPLE_DATABASE))
    with metrics_served(read_settings({}), locate, Tally(iter(new_tallies(1)))) as its_locate:
        assert its_locate is locate


def test_engine_does_not_serve_its_settings(topics: Topics, kafka_enrich_program: Program) -> None:
    port, api_port = free_port(), free_port()
    topics.write([(None, b"9.9.9.9")])
    process = kafka_enrich_program.start(
        **topics.environment(),
        KAFKA_TAIL="1",
        GEOIP_DATABASE=str(SAMPLE_DATABASE),
        METRICS_PORT=str(port),
        BYTEWAX_DATAFLOW_API_ENABLED="true",
        BYTEWAX_DATAFLOW_API_PORT=str(api_port),
    )
    wait_until(lambda: samples(port).get("kafka_enrich_records_total not_found") == 1)
    assert not accepts_connections(api_port)
    process.terminate()
    assert "BYTEWAX_DATAFLOW_API_ENABLED is ignored" in ended(process).errors


def test_port_that_others_need() -> None:
    with pytest.raises(SettingsError, match="METRICS_PORT=65535 is too high: 2 processes"):
        read_settings({"METRICS_PORT": "65535", "PROCESSES": "2"})
