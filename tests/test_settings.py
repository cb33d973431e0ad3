"""The environment contract: every variable, every bad value, no secret in any message."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import load_data
from conftest import PROJECT
from kafka_enrich import NAMES, SettingsError, read_settings, with_settings_file


def test_defaults() -> None:
    settings = read_settings({})
    assert settings.brokers == ["localhost:9092"]
    assert (settings.input_topic, settings.output_topic) == ("ip_address_by_country", "ip_address_by_location")
    assert (settings.geoip_database, settings.ipapi_url, settings.ipapi_key) == (None, "https://ipapi.co", None)
    assert (settings.cache_size, settings.log_level) == (100_000, "INFO")
    assert (settings.addresses, settings.process_id, settings.workers_per_process) == (["localhost:2101"], 0, 1)


def test_several_brokers() -> None:
    settings = read_settings({"KAFKA_BROKERS": "a.example:9092, [::1]:9093"})
    assert settings.brokers == ["a.example:9092", "[::1]:9093"]


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
        ("KAFKA_BROKERS", "localhost:0"),
        ("KAFKA_BROKERS", "localhost:65536"),
        ("KAFKA_BROKERS", "PLAINTEXT://localhost:9092"),
        ("KAFKA_INPUT_TOPIC", ""),
        ("KAFKA_INPUT_TOPIC", "two words"),
        ("KAFKA_INPUT_TOPIC", ".."),
        ("KAFKA_INPUT_TOPIC", "ip_address_by_location"),
        ("KAFKA_OUTPUT_TOPIC", "x" * 250),
        ("KAFKA_OUTPUT_TOPIC", "ip_address_by_country"),
        ("KAFKA_TAIL", ""),
        ("KAFKA_TAIL", "yes"),
        ("IPAPI_URL", ""),
        ("IPAPI_URL", "ipapi.co"),
        ("IPAPI_URL", "ftp://ipapi.co"),
        ("IPAPI_URL", "http://localhost:x"),
        ("CACHE_SIZE", ""),
        ("CACHE_SIZE", "-1"),
        ("CACHE_SIZE", "1e5"),
        ("CACHE_SIZE", "10000001"),
        ("CACHE_SIZE", "٣"),
        ("LOG_LEVEL", "loud"),
        ("ON_LOOKUP_FAILED", "ignore"),
        ("EPOCH_SECONDS", "0.05"),
        ("EPOCH_SECONDS", "3601"),
        ("EPOCH_SECONDS", "1s"),
        ("RECOVERY_DIR", "/var/lib/recovery"),
        ("KAFKA_CLIENT_SECURITY_PROTOCOL", "TLS"),
        ("BYTEWAX_WORKERS_PER_PROCESS", "0"),
        ("METRICS_PORT", ""),
        ("METRICS_PORT", "0"),
        ("METRICS_PORT", "65536"),
        ("METRICS_PORT", "localhost:9100"),
        ("PROCESSES", "0"),
        ("PROCESSES", "101"),
        ("PROCESSES", "auto"),
    ],
)
def test_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings({name: value})
    assert re.fullmatch(f"KAFKA_OUTPUT_TOPIC.*|{name}.*", str(error.value))
    assert repr(value.split(",")[-1]) in str(error.value)


def test_several_workers_have_longer_epochs() -> None:
    several = {"KAFKA_TAIL": "1", "BYTEWAX_WORKERS_PER_PROCESS": "2"}
    assert read_settings({"KAFKA_TAIL": "1"}).epoch_seconds == 1
    assert read_settings(several).epoch_seconds == 10
    with pytest.raises(SettingsError, match=r"EPOCH_SECONDS='4.9' is not a number from 5 to 3600"):
        read_settings({**several, "EPOCH_SECONDS": "4.9"})


def test_following() -> None:
    settings = read_settings({"KAFKA_TAIL": "1", "EPOCH_SECONDS": "5", "BYTEWAX_WORKERS_PER_PROCESS": "3"})
    assert (settings.tail, settings.epoch_seconds, settings.recovery_dir) == (True, 5, None)
    assert settings.recovery_name == "ip_address_by_country-to-ip_address_by_location-3-workers"


def test_client_properties_reach_both_ends() -> None:
    settings = read_settings(
        {
            "KAFKA_CLIENT_CLIENT_ID": "enricher",
            "KAFKA_CONSUMER_FETCH_WAIT_MAX_MS": "50",
            "KAFKA_PRODUCER_COMPRESSION_TYPE": "lz4",
            "KAFKA_PRODUCER_QUEUE_BUFFERING_MAX_MESSAGES": "5",
        }
    )
    assert settings.consumer == {"client.id": "enricher", "fetch.wait.max.ms": "50", "auto.offset.reset": "earliest"}
    assert (settings.producer["client.id"], settings.producer["compression.type"]) == ("enricher", "lz4")
    assert settings.producer["queue.buffering.max.messages"] == "5"
    assert settings.producer["message.timeout.ms"] == "0"


@pytest.mark.parametrize(
    "name",
    [
        "KAFKA_PRODUCER_MESSAGE_TIMEOUT_MS",
        "KAFKA_PRODUCER_DELIVERY_TIMEOUT_MS",
        "KAFKA_PRODUCER_ACKS",
        "KAFKA_PRODUCER_ENABLE_IDEMPOTENCE",
        "KAFKA_PRODUCER_PARTITIONER",
        "KAFKA_PRODUCER_TRANSACTIONAL_ID",
        "KAFKA_CLIENT_ENABLE_GAPLESS_GUARANTEE",
        "KAFKA_CONSUMER_AUTO_OFFSET_RESET",
        "KAFKA_CONSUMER_ENABLE_PARTITION_EOF",
        "KAFKA_CLIENT_BOOTSTRAP_SERVERS",
        "KAFKA_CLIENT_SASL_PASWORD",
        "KAFKA_CONSUMER_LINGER_MS",
    ],
)
def test_property_that_is_unknown_or_could_lose_records_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=name) as error:
        read_settings({name: "s3cret"})
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"KAFKA_CLIENT_SECURITY_PROTOCOL": "PLAINTEXT"}, "KAFKA_CLIENT_SASL_*"),
        ({"KAFKA_CLIENT_SECURITY_PROTOCOL": "SSL"}, "KAFKA_CLIENT_SASL_*"),
        ({"KAFKA_CLIENT_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, "KAFKA_CLIENT_SSL_*"),
        ({"KAFKA_CLIENT_SASL_MECHANISM": "GSSAPI"}, "KAFKA_CLIENT_SASL_MECHANISM='GSSAPI'"),
        ({"KAFKA_TAIL": "1"}, "KAFKA_TAIL=1 needs RECOVERY_DIR"),
    ],
)
def test_security_that_contradicts_itself(changed: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(named)):
        read_settings({**SASL_SSL, **changed})


def test_hosts_are_verified_unless_told_otherwise() -> None:
    assert read_settings(SASL_SSL).consumer["ssl.endpoint.identification.algorithm"] == "https"


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


def test_one_process_with_several_workers() -> None:
    settings = read_settings({"BYTEWAX_WORKERS_PER_PROCESS": "3"})
    assert (settings.addresses, settings.workers_per_process) == (["localhost:2101"], 3)


def test_process_by_addresses() -> None:
    settings = read_settings({"BYTEWAX_ADDRESSES": "a:2101;b:2101", "BYTEWAX_PROCESS_ID": "1"})
    assert (settings.addresses, settings.process_id, settings.workers_per_process) == (["a:2101", "b:2101"], 1, 1)


def test_processes_on_this_machine() -> None:
    settings = read_settings({"PROCESSES": "3", "KAFKA_TAIL": "1"})
    assert (settings.process_id, settings.workers, settings.epoch_seconds) == (None, 3, 10)
    assert read_settings({"PROCESSES": "1"}) == read_settings({})


@pytest.mark.parametrize("other", ["BYTEWAX_WORKERS_PER_PROCESS", "BYTEWAX_ADDRESSES", "BYTEWAX_POD_NAME"])
def test_processes_beside_a_cluster(other: str) -> None:
    with pytest.raises(SettingsError, match=f"PROCESSES=2 .* {other}"):
        read_settings({"PROCESSES": "2", other: "1"})


def test_process_by_host_file_and_pod_name(tmp_path: Path) -> None:
    host_file = tmp_path / "hostfile.txt"
    host_file.write_text("enrich-0.enrich:2101\nenrich-1.enrich:2101\n\n")
    settings = read_settings(
        {
            "BYTEWAX_HOSTFILE_PATH": str(host_file),
            "BYTEWAX_POD_NAME": "enrich-1",
            "BYTEWAX_STATEFULSET_NAME": "enrich",
            "BYTEWAX_WORKERS_PER_PROCESS": "2",
        }
    )
    assert settings.addresses == ["enrich-0.enrich:2101", "enrich-1.enrich:2101"]
    assert (settings.process_id, settings.workers_per_process) == (1, 2)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"BYTEWAX_ADDRESSES": "a:1"}, "BYTEWAX_PROCESS_ID"),
        ({"BYTEWAX_PROCESS_ID": "0"}, "BYTEWAX_ADDRESSES"),
        (
            {"BYTEWAX_ADDRESSES": "a:1", "BYTEWAX_HOSTFILE_PATH": "f", "BYTEWAX_PROCESS_ID": "0"},
            "BYTEWAX_HOSTFILE_PATH",
        ),
        ({"BYTEWAX_ADDRESSES": "a:1", "BYTEWAX_PROCESS_ID": "0", "BYTEWAX_POD_NAME": "x-0"}, "BYTEWAX_POD_NAME"),
        ({"BYTEWAX_ADDRESSES": "a:1", "BYTEWAX_POD_NAME": "x-0"}, "BYTEWAX_STATEFULSET_NAME"),
        (
            {"BYTEWAX_ADDRESSES": "a:1", "BYTEWAX_POD_NAME": "x-0", "BYTEWAX_STATEFULSET_NAME": "y"},
            "BYTEWAX_POD_NAME='x-0'",
        ),
        ({"BYTEWAX_ADDRESSES": "a:1", "BYTEWAX_PROCESS_ID": "1"}, "BYTEWAX_PROCESS_ID='1'"),
        ({"BYTEWAX_ADDRESSES": "a:1", "BYTEWAX_PROCESS_ID": "one"}, "BYTEWAX_PROCESS_ID='one'"),
        (
            {"BYTEWAX_ADDRESSES": "a:1;a:1", "BYTEWAX_PROCESS_ID": "0"},
            "BYTEWAX_ADDRESSES='a:1;a:1' names an address twice",
        ),
        ({"BYTEWAX_ADDRESSES": "a", "BYTEWAX_PROCESS_ID": "0"}, "BYTEWAX_ADDRESSES: 'a'"),
        ({"BYTEWAX_HOSTFILE_PATH": "/no/such", "BYTEWAX_PROCESS_ID": "0"}, "BYTEWAX_HOSTFILE_PATH='/no/such'"),
    ],
)
def test_bad_cluster_is_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(named)):
        read_settings(environment)


@pytest.mark.parametrize(
    ("environment", "port"),
    [
        ({}, 9100),
        ({"PROCESSES": "3"}, 9100),  # of the first one; each adds its number when it is started
        ({"BYTEWAX_ADDRESSES": "a:1;b:1;c:1", "BYTEWAX_PROCESS_ID": "2"}, 9102),
        ({"BYTEWAX_ADDRESSES": "a:1;b:1", "BYTEWAX_POD_NAME": "x-1", "BYTEWAX_STATEFULSET_NAME": "x"}, 9100),
    ],
)
def test_metrics_port(environment: dict[str, str], port: int) -> None:
    assert read_settings({"METRICS_PORT": "9100", **environment}).metrics_port == port
    assert read_settings(environment).metrics_port is None


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
        (b"KAFKA_TAIL=1\n\nKAFAK_BROKERS=s3cret\n", "line 3: there is no setting KAFAK_BROKERS"),
        (b"HOME=/s3cret\n", "line 1: there is no setting HOME"),
        (b"\n# s3cret\nIPAPI_KEY s3cret\n", "line 3: this is not NAME=value"),
        (b"IPAPI_KEY\n", "line 1: this is not NAME=value"),
        (b"IPAPI_KEY='s3cret\n", "line 1: this is not NAME=value"),
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


class Recording(Mapping[str, str]):
    """An empty environment that remembers which names it was asked for: all that Mapping has comes to __getitem__."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def names_in_the_readme() -> set[str]:
    table = (PROJECT / "README.md").read_text().split("## Settings")[1].split("\n##")[0]
    return {
        name for row in re.findall(r"^\|(.*?)\|", table, re.M) for name in re.findall(r"`([A-Z][A-Z_]+[A-Z])`", row)
    }


def test_readme_has_every_variable_and_no_other() -> None:
    environment = Recording()
    read_settings(environment)
    asked = environment.asked | {"BYTEWAX_STATEFULSET_NAME"}  # read only beside BYTEWAX_POD_NAME
    assert names_in_the_readme() == asked == set(NAMES)


def test_both_scripts_share_names_and_defaults() -> None:
    environment = Recording()
    loader = load_data.read_settings(environment)
    asked = {name for name in environment.asked if not name.startswith("KAFKA_CLIENT_")}
    assert asked == {"KAFKA_BROKERS", "KAFKA_INPUT_TOPIC", "KAFKA_OUTPUT_TOPIC"}
    for env in (
        {},
        {"KAFKA_BROKERS": "a:1,b:2", "KAFKA_INPUT_TOPIC": "from", "KAFKA_OUTPUT_TOPIC": "to"},
        SASL_SSL,
        {**SASL_SSL, "KAFKA_CLIENT_SSL_ENDPOINT_IDENTIFICATION_ALGORITHM": "none"},
    ):
        loader, enricher = load_data.read_settings(env), read_settings(env)
        assert (loader.brokers, loader.input_topic) == (enricher.brokers, enricher.input_topic)
        assert (loader.output_topic, loader.client) == (enricher.output_topic, enricher.admin)
