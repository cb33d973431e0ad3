"""The environment contract: every variable, every bad value, no secret in any message."""

import os
import re
from pathlib import Path

import pytest
from confluent_kafka import Consumer

import load_data
from conftest import PROJECT
from kafka_enrich import (
    GUARDED,
    NAMES,
    PROPERTIES,
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
    assert (settings.kafka_tail, settings.on_lookup_failed, settings.metrics_port) == (False, "mark", 0)
    assert (settings.processes, settings.bytewax_workers_per_process) == (1, 1)
    assert (settings.exactly_once, settings.seconds_between_commits(1_000_000)) == (False, 1)


def test_transactions_are_longer_far_behind_where_nothing_is_set() -> None:
    exactly_once = {"DELIVERY_GUARANTEE": "exactly_once"}
    assert [read_settings(exactly_once).seconds_between_commits(lag) for lag in (9_999, 10_000)] == [0.1, 0.3]
    chosen = read_settings({**exactly_once, "COMMIT_SECONDS": "0.2"})
    assert [chosen.seconds_between_commits(lag) for lag in (0, 10_000)] == [0.2, 0.2]


@pytest.mark.parametrize("prefix", ["KAFKA_CLIENT_", "KAFKA_CONSUMER_"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"MESSAGE_MAX_BYTES": "10000000"},
        {"MESSAGE_MAX_BYTES": "10000000", "FETCH_MAX_BYTES": "20000000"},
        {"MAX_PARTITION_FETCH_BYTES": "10000000"},
        {"FETCH_MAX_BYTES": "1000000", "RECEIVE_MESSAGE_MAX_BYTES": "1500000"},
        {"QUEUED_MAX_MESSAGES_KBYTES": "1000"},
    ],
)
def test_client_takes_sizes_that_were_chosen(prefix: str, chosen: dict[str, str]) -> None:
    settings = read_settings({prefix + name: value for name, value in chosen.items()})
    properties = consumer_properties(settings, "localhost:1", 0)
    assert properties.items() >= {name.lower().replace("_", "."): value for name, value in chosen.items()}.items()
    Consumer({**properties, "log_level": 0}).close()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GEOIP_DATABASE": "city.mmdb"}, 50),
        ({}, None),
        ({"GEOIP_DATABASE": "city.mmdb", "KAFKA_PRODUCER_LINGER_MS": "7"}, "7"),
        ({"KAFKA_CLIENT_LINGER_MS": "7"}, "7"),
    ],
)
def test_records_linger_where_others_follow(environment: dict[str, str], expected: object) -> None:
    """Those from the HTTP API come one by one, and each would wait for the whole time."""
    assert producer_properties(read_settings(environment), "localhost:1", "a").get("linger.ms") == expected


SASL_SSL = {
    "KAFKA_CLIENT_SECURITY_PROTOCOL": "sasl_ssl",
    "KAFKA_CLIENT_SASL_MECHANISM": "PLAIN",
    "KAFKA_CLIENT_SASL_USERNAME": "alice",
    "KAFKA_CLIENT_SASL_PASSWORD": "s3cret",
    "KAFKA_CLIENT_SSL_CA_LOCATION": __file__,
    "KAFKA_CLIENT_SSL_CERTIFICATE_LOCATION": __file__,
    "KAFKA_CLIENT_SSL_KEY_LOCATION": __file__,
    "KAFKA_CLIENT_SSL_KEY_PASSWORD": "s3cret too",
}


BAD_VALUES = {
    "KAFKA_BROKERS": [
        "",
        "localhost",
        "localhost:9092,",
        "localhost:x",
        "PLAINTEXT://localhost:9092",
        "localhost:0",
        "a:1,localhost:65536",
    ],
    "KAFKA_INPUT_TOPIC": ["", "two words", "..", "line\n"],
    "KAFKA_OUTPUT_TOPIC": ["", "x" * 250],
    "KAFKA_ERROR_TOPIC": ["", "two words"],
    "KAFKA_GROUP_ID": ["", "two words", "x" * 201],
    "KAFKA_TAIL": ["", "yes", "2"],
    "DELIVERY_GUARANTEE": ["", "at_most_once"],
    "COMMIT_SECONDS": ["", "0", "0.01", "61", "1s", "nan", "inf"],
    "IP_FIELD": ["", " ", ".", "a.", ".a", "a..b", "a,", ",a", "a,.b", "/a~2", "/a/~", 'a"b', "a\\b", "a\n"],
    "LOCATION_FIELD": ["", " ", "a,", ",a", "a, ,b", 'a"b', "a\tb"],
    "FIELDS": ["", "city,", "risk=", "a b=c", "risk=a..b"],
    "GEOIP_DATABASE": ["", "a.mmdb,", ",a.mmdb"],
    "GEOIP_LANGUAGE": ["", "EN", "english", "pt-br"],
    "IPAPI_URL": [
        "",
        "ipapi.co",
        "ftp://ipapi.co",
        "http://",
        "http://localhost:x",
        "http://localhost:0",
        "http://:80",
        "https://user:s3cret@ipapi.co",
        "https://ipapi.co?s3cret",
    ],
    "IPAPI_KEY": ["", "s3cret with blanks", "s3cret\n", "s3cr\u00e9t"],
    "ON_LOOKUP_FAILED": ["", "ignore"],
    "CACHE_SIZE": ["", "-1", "1.5", "10000001", "٣"],
    "LOG_LEVEL": ["", "loud"],
    "METRICS_PORT": ["", "0", "65536", "localhost:9100"],
    "PROCESSES": ["", "0", "65", "auto"],
    "BYTEWAX_WORKERS_PER_PROCESS": ["", "0", "65"],
}


def test_every_setting_has_bad_values() -> None:
    assert BAD_VALUES.keys() == NAMES.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings({name: value})
    shown = name if name in ("IPAPI_URL", "IPAPI_KEY") else f"{name}={value!r}"  # a URL may hold a password
    assert str(error.value).startswith(f"{shown} is not ")
    assert "s3cr" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "attribute", "read"),
    [
        ("KAFKA_BROKERS", "[::1]:9092, b.example:1", "kafka_brokers", "[::1]:9092, b.example:1"),
        ("KAFKA_INPUT_TOPIC", "x" * 249, "group", "x" * 249 + "-to-ip_address_by_location"),
        ("KAFKA_GROUP_ID", "mine", "group", "mine"),
        ("KAFKA_TAIL", "0", "kafka_tail", False),
        ("KAFKA_TAIL", "1", "kafka_tail", True),
        ("COMMIT_SECONDS", "0.05", "commit_seconds", 0.05),
        ("COMMIT_SECONDS", "60", "commit_seconds", 60),
        ("IPAPI_URL", "http://[::1]:8080/path", "ipapi_url", "http://[::1]:8080/path"),
        ("ON_LOOKUP_FAILED", "stop", "on_lookup_failed", "stop"),
        ("CACHE_SIZE", "0", "cache_size", 0),
        ("CACHE_SIZE", "10000000", "cache_size", 10_000_000),
        ("METRICS_PORT", "1", "metrics_port", 1),
        ("METRICS_PORT", "65535", "metrics_port", 65_535),
        ("PROCESSES", "64", "processes", 64),
        ("BYTEWAX_WORKERS_PER_PROCESS", "64", "bytewax_workers_per_process", 64),
    ],
)
def test_good_value_is_taken(name: str, value: str, attribute: str, read: object) -> None:
    assert getattr(read_settings({name: value}), attribute) == read


@pytest.mark.parametrize("name", [name for name in NAMES if name != "GEOIP_DATABASE"] + ["KAFKA_CLIENT_CLIENT_ID"])
def test_value_that_is_no_utf_8_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}"):
        read_settings({name: os.fsdecode(b"\xff")})


def test_one_topic_for_both_ends() -> None:
    with pytest.raises(SettingsError, match="KAFKA_OUTPUT_TOPIC='a' is the input topic too"):
        read_settings({"KAFKA_INPUT_TOPIC": "a", "KAFKA_OUTPUT_TOPIC": "a"})


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"KAFKA_ERROR_TOPIC": "a", "KAFKA_INPUT_TOPIC": "a"},
            "KAFKA_ERROR_TOPIC='a' is the input or the output topic",
        ),
        ({"KAFKA_ERROR_TOPIC": "a", "KAFKA_OUTPUT_TOPIC": "a"}, "KAFKA_ERROR_TOPIC='a' is the input or the output"),
        ({"LOCATION_FIELD": "geo"}, "LOCATION_FIELD='geo' is of no use without IP_FIELD"),
        ({"IP_FIELD": "a,b"}, "IP_FIELD='a,b' needs as many names in LOCATION_FIELD='location'"),
        ({"IP_FIELD": "a", "LOCATION_FIELD": "b,c"}, "IP_FIELD='a' needs as many names in LOCATION_FIELD='b,c'"),
        ({"IP_FIELD": "a,b", "LOCATION_FIELD": "c, c"}, "LOCATION_FIELD='c, c' has a name twice"),
        ({"IP_FIELD": "location.ip"}, "LOCATION_FIELD='location' is what IP_FIELD='location.ip' reads"),
        ({"IP_FIELD": "/location"}, "LOCATION_FIELD='location' is what IP_FIELD='/location' reads"),
        (
            {"FIELDS": "city,county,town"},
            "FIELDS='city,county,town' has county, town; known are city, region, region_code, ",
        ),
        ({"FIELDS": "city;region"}, "FIELDS='city;region' has city;region; known are city, region, region_code, "),
        ({"FIELDS": "ip"}, "FIELDS='ip' has ip or error, names that the output has itself"),
        ({"FIELDS": "city, city"}, "FIELDS='city, city' has a name twice"),
        (
            {"FIELDS": "city,error=traits.x"},
            "FIELDS='city,error=traits.x' has ip or error, names that the output has itself",
        ),
        ({"GEOIP_LANGUAGE": "de"}, "GEOIP_LANGUAGE='de' is of no use without GEOIP_DATABASE"),
        ({"METRICS_PORT": "65535", "PROCESSES": "2"}, "METRICS_PORT=65535 is too high for 2 processes"),
    ],
)
def test_settings_that_do_not_go_together(environment: dict[str, str], line: str) -> None:
    with pytest.raises(SettingsError, match=f"^{line}"):
        read_settings(environment)


def test_each_wrong_setting_has_a_line() -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(
            {"CACHE_SIZE": "many", "PROCESSES": "0", "KAFKA_CONSUMER_GROUP_ID": "s3cret", "IPAPI_KEY": "s3 cret"}
        )
    lines = str(error.value).splitlines()
    assert {re.split("[= ]", line)[0] for line in lines} == {
        "CACHE_SIZE",
        "PROCESSES",
        "KAFKA_CONSUMER_GROUP_ID",
        "IPAPI_KEY",
    }
    assert len(lines) == 4


def test_properties_reach_the_ends_that_they_are_for() -> None:
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
    assert "compression.type" not in consumer
    assert "fetch.wait.max.ms" not in producer


@pytest.mark.parametrize("prefix", sorted(PROPERTIES))
@pytest.mark.parametrize("name", sorted(GUARDED))
def test_property_that_carries_the_guarantee_is_refused(prefix: str, name: str) -> None:
    variable = prefix + name.replace(".", "_").upper()
    with pytest.raises(SettingsError, match=f"^{variable} .*") as error:
        read_settings({variable: "s3cret"})
    assert "s3cret" not in str(error.value)


def test_own_properties_come_before_the_defaults_and_those_of_both_ends() -> None:
    names = ("SESSION_TIMEOUT_MS", "TOPIC_METADATA_REFRESH_INTERVAL_MS", "QUEUE_BUFFERING_MAX_KBYTES")
    ends = ("KAFKA_CLIENT_", "KAFKA_CONSUMER_", "KAFKA_PRODUCER_")
    settings = read_settings({end + name: end for end in ends for name in names})
    for properties, end in (
        (consumer_properties(settings, "a:1", 0), "KAFKA_CONSUMER_"),
        (producer_properties(settings, "a:1", "name"), "KAFKA_PRODUCER_"),
    ):
        assert {properties[name.lower().replace("_", ".")] for name in names} == {end}


@pytest.mark.parametrize(
    ("guarantee", "promised"),
    [
        ("at_least_once", {"message.timeout.ms": 0}),
        ("exactly_once", {"transactional.id": "mine-host-0", "transaction.timeout.ms": 15_000}),
    ],
)
def test_properties_that_carry_the_guarantee(guarantee: str, promised: dict[str, object]) -> None:
    settings = read_settings({"DELIVERY_GUARANTEE": guarantee, "KAFKA_GROUP_ID": "mine"})
    consumer, producer = consumer_properties(settings, "a:1", 0), producer_properties(settings, "a:1", "host-0")
    assert {name: consumer[name] for name in GUARDED & consumer.keys()} == {
        "bootstrap.servers": "a:1",
        "group.id": "mine",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
    }
    timeouts = {"message.timeout.ms", "transaction.timeout.ms"}
    assert {name: producer[name] for name in (GUARDED | timeouts) & producer.keys()} == {
        "bootstrap.servers": "a:1",
        "delivery.report.only.error": True,
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
        **promised,
    }


def test_transactions_outlast_the_time_between_commits() -> None:
    settings = read_settings({"DELIVERY_GUARANTEE": "exactly_once", "COMMIT_SECONDS": "60"})
    assert producer_properties(settings, "a:1", "host-0")["transaction.timeout.ms"] == 75_000


@pytest.mark.parametrize("value", ["never", "none", "error", ""])
def test_offset_reset_that_would_be_ignored_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=f"KAFKA_CONSUMER_AUTO_OFFSET_RESET={value!r} is not earliest or latest"):
        read_settings({"KAFKA_CONSUMER_AUTO_OFFSET_RESET": value})


def test_newer_group_protocol_has_no_properties_of_the_classic_one() -> None:
    newer = consumer_properties(read_settings({"KAFKA_CONSUMER_GROUP_PROTOCOL": "consumer"}), "a:1", 0)
    assert not {"session.timeout.ms", "partition.assignment.strategy", "heartbeat.interval.ms"} & newer.keys()
    assert newer["group.protocol"] == "consumer"
    for environment in ({}, {"KAFKA_CONSUMER_GROUP_PROTOCOL": "CLASSIC"}):
        classic = consumer_properties(read_settings(environment), "a:1", 0)
        assert classic["session.timeout.ms"] == 10_000
        assert classic["partition.assignment.strategy"] == "cooperative-sticky"


@pytest.mark.parametrize(
    ("processes", "workers", "instances"),
    [
        ("1", "1", ["host"]),
        ("1", "3", ["host-0", "host-1", "host-2"]),
        ("3", "1", ["host-0", "host-1", "host-2"]),
        ("2", "2", ["host-0", "host-1", "host-2", "host-3"]),
    ],
)
@pytest.mark.parametrize("prefix", ["KAFKA_CLIENT", "KAFKA_CONSUMER"])
def test_workers_do_not_share_a_group_instance(prefix: str, processes: str, workers: str, instances: list[str]) -> None:
    several = {"PROCESSES": processes, "BYTEWAX_WORKERS_PER_PROCESS": workers}
    settings = read_settings({f"{prefix}_GROUP_INSTANCE_ID": "host", **several})
    properties = [consumer_properties(settings, "a:1", number) for number in range(len(instances))]
    assert [its["group.instance.id"] for its in properties] == instances


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("KAFKA_BROKER", "is KAFKA_BROKERS meant?"),
        ("CACHE_SIZES", "is CACHE_SIZE meant?"),
        ("RECOVERY_DIR", "the consumer group keeps the place"),
        ("EPOCH_SECONDS", "COMMIT_SECONDS"),
        ("BYTEWAX_ADDRESSES", "consumer group"),
        ("BYTEWAX_HOSTFILE_PATH", "consumer group"),
        ("BYTEWAX_POD_NAME", "consumer group"),
        ("BYTEWAX_PROCESS_ID", "consumer group"),
        ("BYTEWAX_STATEFULSET_NAME", "consumer group"),
    ],
)
def test_misspelt_or_former_setting_is_warned_of(name: str, says: str) -> None:
    [line] = doubtful_names({name: "s3cret", "PATH": "", "KAFKA_CLIENT_CLIENT_ID": "x"})
    assert line.startswith(name)
    assert says in line
    assert "s3cret" not in line


def test_usual_variables_are_not_warned_of() -> None:
    usual = {"PATH", "HOME", "HOSTNAME", "LANG", "KAFKA_HOME", "KAFKA_OPTS", "PYTHONPATH", "REQUESTS_CA_BUNDLE", *NAMES}
    assert doubtful_names(dict.fromkeys(usual, "x")) == []


def test_secrets_are_not_shown() -> None:
    secret = {f"{prefix}SASL_PASSWORD": "s3cret" for prefix in PROPERTIES} | {"IPAPI_KEY": "s3cret"}
    shown = repr(read_settings({**SASL_SSL, **secret, "CACHE_SIZE": "5"}))
    assert "CACHE_SIZE=5" in shown
    assert "sasl.password" in shown
    assert "s3cret" not in shown + repr(load_data.read_settings(SASL_SSL))


def test_port_that_others_need() -> None:
    assert read_settings({"METRICS_PORT": "65534", "PROCESSES": "2"}).metrics_port == 65_534
    with pytest.raises(SettingsError, match="METRICS_PORT=65535 is too high"):
        read_settings({"METRICS_PORT": "65535", "PROCESSES": "2"})


def test_bad_value_is_not_told_as_a_contradiction() -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings({"IP_FIELD": "a,b", "LOCATION_FIELD": 'x"y,z'})
    assert str(raised.value) == "LOCATION_FIELD='x\"y,z' is not the name of a member, or several"


@pytest.mark.parametrize("prefix", ["KAFKA_CLIENT_", "KAFKA_CONSUMER_"])
def test_password_that_would_not_be_used(prefix: str) -> None:
    secured = {f"{prefix}SASL_MECHANISM": "PLAIN", f"{prefix}SASL_PASSWORD": "s3cret"}
    [line] = doubtful_names(secured)
    assert line == "KAFKA_CLIENT_SASL_* is of no use without KAFKA_CLIENT_SECURITY_PROTOCOL=SASL_SSL"
    for protocol in ("SASL_SSL", "sasl_plaintext"):
        assert doubtful_names({**secured, f"{prefix}SECURITY_PROTOCOL": protocol}) == []


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
        (b"KAFKA_TAIL=1\n\nKAFAK_BROKERS=s3cret\n", "'KAFAK_BROKERS' is no setting; is KAFKA_BROKERS meant?"),
        (b"HOME=/s3cret\n", "'HOME' is no setting"),
        (b"KAFKA_TAIL=1\nIPAPI_KEY: s3cret\n", "line 2 is something else than NAME=value"),
        (b"IPAPI_KEY\n", "'IPAPI_KEY' has no value"),
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
    section = (PROJECT / "README.md").read_text().split("## Settings")[1].split("\n## ")[0]
    cells = re.findall(r"^\|(.*?)\|", section, re.M)
    assert {name for cell in cells for name in re.findall(r"`([A-Z][A-Z_]+[A-Z])`", cell)} == set(NAMES)
    assert set(re.findall(r"`(KAFKA_[A-Z]+_)[^A-Z]", section)) == set(PROPERTIES)


@pytest.mark.parametrize(
    "env", [{}, {"KAFKA_BROKERS": "a:1,b:2", "KAFKA_INPUT_TOPIC": "from", "KAFKA_OUTPUT_TOPIC": "to"}]
)
def test_both_scripts_share_names_and_defaults(env: dict[str, str]) -> None:
    loader, enricher = load_data.read_settings(env), read_settings(env)
    assert ",".join(loader.brokers) == enricher.kafka_brokers
    assert (loader.input_topic, loader.output_topic) == (enricher.kafka_input_topic, enricher.kafka_output_topic)


@pytest.mark.parametrize("name", ["KAFKA_BROKERS", "KAFKA_INPUT_TOPIC", "KAFKA_OUTPUT_TOPIC"])
def test_both_scripts_refuse_the_same_values(name: str) -> None:
    for value in BAD_VALUES[name]:
        with pytest.raises(ValueError, match=f"^{name}="):
            load_data.read_settings({name: value})
