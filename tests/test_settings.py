"""The environment contract: every variable, every bad value, no secret in any message."""

import re
from pathlib import Path

import pytest

import load_data
from conftest import PROJECT
from kafka_enrich import (
    GUARDED,
    NAMES,
    SettingsError,
    consumer_properties,
    doubtful_names,
    producer_properties,
    read_settings,
    with_settings_file,
)


def test_defaults() -> None:
    settings = read_settings({})
    assert settings.kafka_brokers == "localhost:9092"
    assert settings.group == "ip_address_by_country-to-ip_address_by_location"
    assert (settings.geoip_database, settings.ipapi_url, settings.ipapi_key) == ("", "https://ipapi.co", "")
    assert (settings.cache_size, settings.log_level) == (100_000, "INFO")
    assert (settings.processes, settings.bytewax_workers_per_process) == (1, 1)
    assert (settings.exactly_once, settings.seconds_between_commits) == (False, 1)
    assert read_settings({"DELIVERY_GUARANTEE": "exactly_once"}).seconds_between_commits == 0.1


SASL_SSL = {
    "KAFKA_CLIENT_SECURITY_PROTOCOL": "sasl_ssl",
    "KAFKA_CLIENT_SASL_MECHANISM": "PLAIN",
    "KAFKA_CLIENT_SASL_USERNAME": "alice",
    "KAFKA_CLIENT_SASL_PASSWORD": "s3cret",
    "KAFKA_CLIENT_SSL_CA_LOCATION": "ca.pem",
    "KAFKA_CLIENT_SSL_CERTIFICATE_LOCATION": "client.pem",
    "KAFKA_CLIENT_SSL_KEY_LOCATION": "client.key",
    "KAFKA_CLIENT_SSL_KEY_PASSWORD": "s3cret too",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_BROKERS", ""),
        ("KAFKA_BROKERS", "localhost"),
        ("KAFKA_BROKERS", "localhost:9092,"),
        ("KAFKA_BROKERS", "localhost:x"),
        ("KAFKA_BROKERS", "PLAINTEXT://localhost:9092"),
        ("KAFKA_INPUT_TOPIC", ""),
        ("KAFKA_INPUT_TOPIC", "two words"),
        ("KAFKA_INPUT_TOPIC", ".."),
        ("KAFKA_INPUT_TOPIC", "ip_address_by_location"),
        ("KAFKA_OUTPUT_TOPIC", "x" * 250),
        ("KAFKA_OUTPUT_TOPIC", "ip_address_by_country"),
        ("KAFKA_TAIL", "yes"),
        ("IPAPI_URL", ""),
        ("IPAPI_URL", "ipapi.co"),
        ("IPAPI_URL", "ftp://ipapi.co"),
        ("CACHE_SIZE", ""),
        ("CACHE_SIZE", "-1"),
        ("CACHE_SIZE", "1.5"),
        ("CACHE_SIZE", "10000001"),
        ("CACHE_SIZE", "٣"),
        ("LOG_LEVEL", "loud"),
        ("ON_LOOKUP_FAILED", "ignore"),
        ("COMMIT_SECONDS", "0.01"),
        ("COMMIT_SECONDS", "61"),
        ("COMMIT_SECONDS", "1s"),
        ("DELIVERY_GUARANTEE", "at_most_once"),
        ("KAFKA_GROUP_ID", "two words"),
        ("BYTEWAX_WORKERS_PER_PROCESS", "0"),
        ("METRICS_PORT", ""),
        ("METRICS_PORT", "0"),
        ("METRICS_PORT", "65536"),
        ("METRICS_PORT", "localhost:9100"),
        ("PROCESSES", "0"),
        ("PROCESSES", "65"),
        ("PROCESSES", "auto"),
    ],
)
def test_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings({name: value})
    assert re.fullmatch(f"KAFKA_OUTPUT_TOPIC.*|{name}.*", str(error.value))
    assert repr(value) in str(error.value) or name == "IPAPI_URL"  # which may hold a password


def test_each_wrong_setting_has_a_line() -> None:
    with pytest.raises(SettingsError) as error:
        read_settings({"CACHE_SIZE": "many", "PROCESSES": "0", "KAFKA_CONSUMER_GROUP_ID": "mine"})
    assert len(str(error.value).splitlines()) == 3


def test_client_properties_reach_both_ends() -> None:
    settings = read_settings(
        {
            "KAFKA_CLIENT_CLIENT_ID": "enricher",
            "KAFKA_CONSUMER_FETCH_WAIT_MAX_MS": "50",
            "KAFKA_PRODUCER_COMPRESSION_TYPE": "lz4",
        }
    )
    consumer, producer = consumer_properties(settings, "a:1", 0), producer_properties(settings, "a:1", "name")
    assert (consumer["client.id"], consumer["fetch.wait.max.ms"]) == ("enricher", "50")
    assert (producer["client.id"], producer["compression.type"]) == ("enricher", "lz4")


@pytest.mark.parametrize("name", sorted(GUARDED))
def test_property_that_carries_the_guarantee_is_refused(name: str) -> None:
    variable = f"KAFKA_CLIENT_{name.replace('.', '_').upper()}"
    with pytest.raises(SettingsError, match=variable) as error:
        read_settings({variable: "s3cret"})
    assert "s3cret" not in str(error.value)


def test_newer_group_protocol_has_no_properties_of_the_classic_one() -> None:
    newer = consumer_properties(read_settings({"KAFKA_CONSUMER_GROUP_PROTOCOL": "consumer"}), "a:1", 0)
    assert not {"session.timeout.ms", "partition.assignment.strategy", "heartbeat.interval.ms"} & newer.keys()
    assert consumer_properties(read_settings({}), "a:1", 0)["session.timeout.ms"] == 10_000


def test_workers_do_not_share_a_group_instance() -> None:
    environment = {"KAFKA_CONSUMER_GROUP_INSTANCE_ID": "host", "BYTEWAX_WORKERS_PER_PROCESS": "2"}
    properties = [consumer_properties(read_settings(environment), "a:1", number) for number in range(2)]
    assert [its["group.instance.id"] for its in properties] == ["host-0", "host-1"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("KAFKA_BROKER", "is KAFKA_BROKERS meant?"),
        ("CACHE_SIZES", "is CACHE_SIZE meant?"),
        ("RECOVERY_DIR", "the consumer group keeps the place"),
        ("EPOCH_SECONDS", "COMMIT_SECONDS"),
    ],
)
def test_misspelt_or_former_setting_is_warned_of(name: str, says: str) -> None:
    [line] = doubtful_names({name: "s3cret", "PATH": "", "KAFKA_CLIENT_CLIENT_ID": "x"})
    assert line.startswith(name)
    assert says in line
    assert "s3cret" not in line


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(read_settings(SASL_SSL)) + repr(load_data.read_settings(SASL_SSL))


def test_key_is_not_shown() -> None:
    assert "s3cret" not in repr(read_settings({"IPAPI_KEY": "s3cret"}))
    with pytest.raises(SettingsError, match="IPAPI_KEY") as error:
        read_settings({"IPAPI_KEY": "s3cret with blanks"})
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["https://user:s3cret@ipapi.co", "https://ipapi.co?key=s3cret", "https://ipapi.co/#s3cret"]
)
def test_secret_in_the_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(SettingsError, match="IPAPI_URL") as error:
        read_settings({"IPAPI_URL": url})
    assert "s3cret" not in str(error.value)


def test_port_that_others_need() -> None:
    with pytest.raises(SettingsError, match="METRICS_PORT=65535 is too high"):
        read_settings({"METRICS_PORT": "65535", "PROCESSES": "2"})


def test_settings_file_and_the_environment_wins(tmp_path: Path) -> None:
    path = tmp_path / "kafka_enrich.env"
    path.write_text(
        "# a comment\n\nKAFKA_BROKERS=file:1\nKAFKA_TAIL=1 # another\n"
        "export CACHE_SIZE=5\nKAFKA_CLIENT_SASL_PASSWORD='a $b #c'\nIPAPI_KEY=${HOME}\n"
    )
    assert with_settings_file({"KAFKA_BROKERS": "environment:1", "HOME": "/"}, path) == {
        "HOME": "/",
        "KAFKA_BROKERS": "environment:1",
        "KAFKA_TAIL": "1",
        "CACHE_SIZE": "5",
        "KAFKA_CLIENT_SASL_PASSWORD": "a $b #c",
        "IPAPI_KEY": "${HOME}",
    }


def test_settings_file_need_not_be_there(tmp_path: Path) -> None:
    assert with_settings_file({"A": "b"}, tmp_path / "kafka_enrich.env") == {"A": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"KAFKA_TAIL=1\n\nKAFAK_BROKERS=s3cret\n", "'KAFAK_BROKERS' is no setting"),
        (b"HOME=/s3cret\n", "'HOME' is no setting"),
        (b"IPAPI_KEY\n", "'IPAPI_KEY' is no setting with a value"),
        (b"IPAPI_KEY=s3cret\xff\n", "cannot be read"),
    ],
)
def test_settings_file_that_cannot_be_used(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "kafka_enrich.env"
    path.write_bytes(text)
    with pytest.raises(SettingsError, match=re.escape(message)) as raised:
        with_settings_file({}, path)
    assert str(path) in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_readme_has_every_variable_and_no_other() -> None:
    table = (PROJECT / "README.md").read_text().split("## Settings")[1].split("\n##")[0]
    cells = re.findall(r"^\|(.*?)\|", table, re.M)
    assert {name for cell in cells for name in re.findall(r"`([A-Z][A-Z_]+[A-Z])`", cell)} == set(NAMES)


@pytest.mark.parametrize(
    "env", [{}, {"KAFKA_BROKERS": "a:1,b:2", "KAFKA_INPUT_TOPIC": "from", "KAFKA_OUTPUT_TOPIC": "to"}]
)
def test_both_scripts_share_names_and_defaults(env: dict[str, str]) -> None:
    loader, enricher = load_data.read_settings(env), read_settings(env)
    assert ",".join(loader.brokers) == enricher.kafka_brokers
    assert (loader.input_topic, loader.output_topic) == (enricher.kafka_input_topic, enricher.kafka_output_topic)
