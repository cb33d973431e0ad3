"""Secured brokers: what works with which, and one clear line for everything that does not."""

import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from kafka import KafkaAdminClient
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ACLResourcePatternType, ResourcePattern, ResourceType

import load_data
from conftest import SAMPLE_DATABASE, Program, ended, samples, wait_until
from kafka_server import VERSION, KafkaServer, free_port
from load_data import SAMPLE

DATABASE = {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}
PASSWORD = f"s3cret-{uuid.uuid4().hex}"


class Secured(NamedTuple):
    """A broker that takes SASL_SSL on one port and client certificates on another."""

    server: KafkaServer
    sasl: dict[str, str]
    certificate: dict[str, str]
    other_ca: str


def secured_broker(folder: Path, version: str, mechanism: str) -> Secured:
    authority, other = trustme.CA(), trustme.CA()
    folder.mkdir(parents=True, exist_ok=True)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    other.cert_pem.write_to_path(str(folder / "other-ca.pem"))
    certificate = authority.issue_cert("localhost")
    pem = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # Java reads no other
    (folder / "server.pem").write_bytes(pkcs8 + pem)
    client = authority.issue_cert("alice")
    client.private_key_pem.write_to_path(str(folder / "client.key"))
    client.cert_chain_pems[0].write_to_path(str(folder / "client.pem"))
    port, plain, tls, controller = (free_port() for _ in range(4))
    login = "org.apache.kafka.common.security"
    module = f"{login}.plain.PlainLoginModule" if mechanism == "PLAIN" else f"{login}.scram.ScramLoginModule"
    user = f' user_alice="{PASSWORD}" user_bob="{PASSWORD}"' if mechanism == "PLAIN" else ""
    settings = {
        "listeners": f"SASL_SSL://localhost:{port},SSL://localhost:{tls},INNER://localhost:{plain},"
        f"CONTROLLER://localhost:{controller}",
        "listener.security.protocol.map": "SASL_SSL:SASL_SSL,SSL:SSL,INNER:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "INNER",
        "controller.quorum.voters": f"1@localhost:{controller}",
        "sasl.enabled.mechanisms": mechanism,
        f"listener.name.sasl_ssl.{mechanism.lower()}.sasl.jaas.config": f"{module} required{user};",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "server.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
        "listener.name.ssl.ssl.client.auth": "required",
        "group.initial.rebalance.delay.ms": "0",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:alice",
        "allow.everyone.if.no.acl.found": "true",
    }
    options = []
    if mechanism.startswith("SCRAM"):
        options = ["--add-scram", f"{mechanism}=[name=alice,password={PASSWORD}]"]
    server = KafkaServer(port, folder / "kafka", version, settings, options)
    common = {"KAFKA_BROKERS": server.address, "KAFKA_CLIENT_SSL_CA_LOCATION": str(folder / "ca.pem")}
    sasl = {
        **common,
        "KAFKA_CLIENT_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_CLIENT_SASL_MECHANISM": mechanism,
        "KAFKA_CLIENT_SASL_USERNAME": "alice",
        "KAFKA_CLIENT_SASL_PASSWORD": PASSWORD,
    }
    by_certificate = {
        **common,
        "KAFKA_BROKERS": f"localhost:{tls}",
        "KAFKA_CLIENT_SECURITY_PROTOCOL": "SSL",
        "KAFKA_CLIENT_SSL_CERTIFICATE_LOCATION": str(folder / "client.pem"),
        "KAFKA_CLIENT_SSL_KEY_LOCATION": str(folder / "client.key"),
    }
    return Secured(server, sasl, by_certificate, str(folder / "other-ca.pem"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    secured = secured_broker(tmp_path_factory.mktemp("plain"), VERSION, "PLAIN")
    with secured.server:
        yield secured


@pytest.fixture(params=["SASL_SSL with PLAIN", "client certificate"])
def way_in(request: pytest.FixtureRequest, plain: Secured) -> dict[str, str]:
    return plain.sasl if request.param.startswith("SASL") else plain.certificate


def of_its_own(environment: dict[str, str]) -> dict[str, str]:
    """The same brokers, with topics that only one test uses."""
    name = uuid.uuid4().hex[:12]
    return {**environment, "KAFKA_INPUT_TOPIC": f"in-{name}", "KAFKA_OUTPUT_TOPIC": f"out-{name}", **DATABASE}


def test_loader_and_pass(way_in: dict[str, str], load_data_program: Program, kafka_enrich_program: Program) -> None:
    environment = of_its_own(way_in)
    loaded = load_data_program(str(SAMPLE), **environment)
    assert loaded.exit_code == 0, loaded.errors
    enriched = kafka_enrich_program(**environment)
    assert enriched.exit_code == 0, enriched.errors
    assert "154 records: 152 located" in enriched.errors
    assert PASSWORD not in loaded.output + loaded.errors + enriched.errors


def test_following_exactly_once(
    way_in: dict[str, str], load_data_program: Program, kafka_enrich_program: Program
) -> None:
    environment = {**of_its_own(way_in), "KAFKA_TAIL": "1", "DELIVERY_GUARANTEE": "exactly_once"}
    for _ in range(2):
        assert load_data_program(str(SAMPLE), **environment).exit_code == 0
        port = free_port()
        process = kafka_enrich_program.start(**environment, METRICS_PORT=str(port))
        wait_until(partial(committed, port, 152))
        process.send_signal(signal.SIGTERM)
        stopped = ended(process)
        assert stopped.exit_code == 0, stopped.errors
        assert " 154 records: 152 located" in stopped.errors  # and none of those before


def committed(port: int, located: int) -> bool:
    return samples(port).get("kafka_enrich_records_total located") == located


def arguments(script: str) -> list[str]:
    return [str(SAMPLE)] if script == "load_data_program" else []


@pytest.mark.parametrize("script", ["load_data_program", "kafka_enrich_program"])
def test_wrong_credentials_are_one_clear_line(request: pytest.FixtureRequest, plain: Secured, script: str) -> None:
    program: Program = request.getfixturevalue(script)
    refusal = "Invalid username or password|a wrong password|Authentication failed"
    wrong = [
        ({"KAFKA_CLIENT_SASL_PASSWORD": "wrong-s3cret"}, refusal),
        ({"KAFKA_CLIENT_SSL_CA_LOCATION": plain.other_ca}, "certificate verify failed"),
        ({"KAFKA_CLIENT_SSL_CA_LOCATION": "/no/such"}, "No such file or directory"),
    ]
    environment = {**of_its_own(plain.sasl), "LOG_LEVEL": "ERROR"}
    before = time.monotonic()
    started = [program.start(*arguments(script), **{**environment, **setting}) for setting, _ in wrong]
    every = [ended(process) for process in started]
    assert time.monotonic() - before < 15
    for refused, (_, says) in zip(every, wrong, strict=True):
        is_setting = script == "kafka_enrich_program" and says.startswith("No such file")
        assert refused.exit_code == (2 if is_setting else 1)
        assert re.search(says, refused.errors)
        assert refused.errors.count("\n") == 1
        assert "s3cret" not in refused.errors


@pytest.mark.parametrize("script", ["load_data_program", "kafka_enrich_program"])
def test_connection_closed_once_tells_more_than_a_time_out(request: pytest.FixtureRequest, script: str) -> None:
    program: Program = request.getfixturevalue(script)
    accepted: list[socket.socket] = []

    def close_the_first() -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                accepted.append(listener.accept()[0])
                if len(accepted) == 1:
                    accepted[0].close()

    with socket.create_server(("localhost", 0)) as listener:
        thread = threading.Thread(target=close_the_first)
        thread.start()
        refused = program(
            *arguments(script), **DATABASE, KAFKA_BROKERS=f"localhost:{listener.getsockname()[1]}", LOG_LEVEL="ERROR"
        )
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in accepted:
        connection.close()
    assert len(accepted) > 1
    assert refused.exit_code == 1
    assert "it closes the connection" in refused.errors


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_no_permission_to_write(
    plain: Secured, load_data_program: Program, kafka_enrich_program: Program, guarantee: str
) -> None:
    environment = {**of_its_own(plain.sasl), "DELIVERY_GUARANTEE": guarantee}
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    topic = environment["KAFKA_OUTPUT_TOPIC"]
    forbid(plain, ResourcePattern(ResourceType.TOPIC, topic), ACLOperation.WRITE)
    line = line_of_bob(kafka_enrich_program, environment)
    assert f"topic {topic!r} may not be used: no permission to WRITE" in line


def test_input_and_output_have_credentials_of_their_own(
    plain: Secured, load_data_program: Program, kafka_enrich_program: Program
) -> None:
    environment = of_its_own(plain.sasl)
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    for name, operation in (("INPUT", ACLOperation.READ), ("OUTPUT", ACLOperation.DESCRIBE)):
        forbid(plain, ResourcePattern(ResourceType.TOPIC, environment[f"KAFKA_{name}_TOPIC"]), operation)
    del environment["KAFKA_CLIENT_SASL_USERNAME"]
    users = {"KAFKA_CONSUMER_SASL_USERNAME": "alice", "KAFKA_PRODUCER_SASL_USERNAME": "alice"}
    forbidden = kafka_enrich_program(**{**environment, **users, "KAFKA_CONSUMER_SASL_USERNAME": "bob"})
    assert "no permission to READ" in forbidden.errors.splitlines()[-1]
    forbidden = kafka_enrich_program(**{**environment, **users, "KAFKA_PRODUCER_SASL_USERNAME": "bob"})
    assert "no permission to DESCRIBE" in forbidden.errors.splitlines()[-1]

    checked = kafka_enrich_program("--check", **environment, **users)
    assert checked.exit_code == 0, checked.errors
    enriched = kafka_enrich_program(**environment, **users)
    assert "154 records: 152 located" in enriched.errors


def test_topics_that_others_have_created(plain: Secured, load_data_program: Program) -> None:
    environment = of_its_own(plain.sasl)
    bob = {**environment, "KAFKA_CLIENT_SASL_USERNAME": "bob"}
    topics = [ResourcePattern(ResourceType.TOPIC, environment[f"KAFKA_{name}_TOPIC"]) for name in ("INPUT", "OUTPUT")]
    for resource in (*topics, ResourcePattern(ResourceType.CLUSTER, "kafka-cluster")):
        forbid(plain, resource, ACLOperation.CREATE)
    refused = load_data_program(str(SAMPLE), **bob)
    assert refused.exit_code == 1
    assert f"topic {environment['KAFKA_INPUT_TOPIC']!r} does not exist: no permission to CREATE" in refused.errors
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    loaded = load_data_program(str(SAMPLE), **bob)
    assert loaded.exit_code == 0, loaded.errors
    assert f"loaded 154 records into topic {environment['KAFKA_INPUT_TOPIC']}" in loaded.output


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ("READ", "group 'in-.*' cannot be joined: .*Group authorization failed"),
        ("DESCRIBE", "group 'in-.*' cannot be used: no permission to DESCRIBE and READ"),
    ],
)
def test_no_permission_for_the_group(
    plain: Secured, load_data_program: Program, kafka_enrich_program: Program, operation: str, says: str
) -> None:
    environment = of_its_own(plain.sasl)
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    group = f"{environment['KAFKA_INPUT_TOPIC']}-to-{environment['KAFKA_OUTPUT_TOPIC']}"
    forbid(plain, ResourcePattern(ResourceType.GROUP, group), ACLOperation[operation])
    assert re.search(says, line_of_bob(kafka_enrich_program, environment))


def test_no_permission_for_the_transactions(
    plain: Secured, load_data_program: Program, kafka_enrich_program: Program
) -> None:
    environment = {**of_its_own(plain.sasl), "DELIVERY_GUARANTEE": "exactly_once"}
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    prefix = ResourcePattern(
        ResourceType.TRANSACTIONAL_ID, environment["KAFKA_INPUT_TOPIC"], ACLResourcePatternType.PREFIXED
    )
    forbid(plain, prefix, ACLOperation.WRITE)
    assert "Transactional Id authorization failed" in line_of_bob(kafka_enrich_program, environment)


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_permission_to_write_taken_away_while_it_follows(
    plain: Secured, load_data_program: Program, kafka_enrich_program: Program, guarantee: str
) -> None:
    environment = {**of_its_own(plain.sasl), "DELIVERY_GUARANTEE": guarantee}
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    port = free_port()
    bob = {"KAFKA_CLIENT_SASL_USERNAME": "bob", "KAFKA_TAIL": "1", "METRICS_PORT": str(port)}
    process = kafka_enrich_program.start(**{**environment, **bob})
    wait_until(partial(committed, port, 152))
    forbid(plain, ResourcePattern(ResourceType.TOPIC, environment["KAFKA_OUTPUT_TOPIC"]), ACLOperation.WRITE)
    assert load_data_program(str(SAMPLE), **environment).exit_code == 0
    refused = ended(process)
    assert refused.exit_code == 1
    line = refused.errors.splitlines()[-1]
    assert line.startswith("kafka_enrich.py: ")
    assert "Topic authorization failed" in line
    assert "--reset-offsets" not in line  # no record is at fault


def test_client_without_security_on_a_secured_port(plain: Secured, kafka_enrich_program: Program) -> None:
    before = time.monotonic()
    refused = kafka_enrich_program(**DATABASE, KAFKA_BROKERS=plain.sasl["KAFKA_BROKERS"], LOG_LEVEL="ERROR")
    assert time.monotonic() - before < 15
    assert refused.exit_code == 1
    assert "it closes the connection, as brokers do for a wrong password or security protocol" in refused.errors
    assert refused.errors.count("\n") == 1


def line_of_bob(program: Program, environment: dict[str, str]) -> str:
    """The one line of a run that another user may not do."""
    before = time.monotonic()
    refused = program(**{**environment, "KAFKA_CLIENT_SASL_USERNAME": "bob"}, LOG_LEVEL="ERROR")
    assert time.monotonic() - before < 15
    assert (refused.exit_code, refused.output) == (1, "")
    assert refused.errors.count("\n") == 1, refused.errors
    assert PASSWORD not in refused.errors
    return refused.errors


def forbid(secured: Secured, resource: ResourcePattern, operation: ACLOperation) -> None:
    """Take one permission from bob, and leave him the others."""
    client = load_data.read_settings(secured.sasl)
    with KafkaAdminClient(bootstrap_servers=client.brokers, **client.client) as admin:
        admin.create_acls(
            [
                ACL("User:bob", "*", ACLOperation.ALL, ACLPermissionType.ALLOW, resource),
                ACL("User:bob", "*", operation, ACLPermissionType.DENY, resource),
            ]
        )


@pytest.mark.parametrize("version", ["3.9.1", VERSION])
def test_scram(tmp_path: Path, load_data_program: Program, kafka_enrich_program: Program, version: str) -> None:
    secured = secured_broker(tmp_path / "broker", version, "SCRAM-SHA-512")
    with secured.server:
        environment = {**of_its_own(secured.sasl), "DELIVERY_GUARANTEE": "exactly_once"}
        assert load_data_program(str(SAMPLE), **environment).exit_code == 0
        enriched = kafka_enrich_program(**environment, LOG_LEVEL="ERROR")
    assert (enriched.exit_code, enriched.errors) == (0, "")
