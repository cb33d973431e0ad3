"""The broker that the demo and the tests run on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from conftest import PROJECT, wait_until
from kafka_server import KafkaServer, accepts_connections


def topics_on(server: KafkaServer) -> list[str]:
    with KafkaAdminClient(bootstrap_servers=server.address) as admin:
        topics: list[str] = admin.list_topics()
        return topics


def test_data_outlives_a_stop_and_only_its_own_folder_goes(tmp_path: Path) -> None:
    with KafkaServer(data=tmp_path / "kept") as server:
        with KafkaAdminClient(bootstrap_servers=server.address) as admin:
            admin.create_topics({"kept": {}}, wait_for_metadata=True)
        server.stop()
        assert not accepts_connections(server.port)
        server.start()
        assert topics_on(server) == ["kept"]
    assert not accepts_connections(server.port)
    assert (tmp_path / "kept" / "server.log").exists()


def test_failed_start_shows_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="log\\.retention\\.bytes"),
        KafkaServer(data=tmp_path, settings={"log.retention.bytes": "many"}),
    ):
        pass


STARTS_A_SERVER = """
import signal, kafka_server
with kafka_server.KafkaServer() as server:
    print(server.port, flush=True)
    signal.pause()
"""


def test_dies_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", STARTS_A_SERVER]
    with subprocess.Popen(command, cwd=PROJECT / "misc", stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        port = int(parent.stdout.readline())
        assert accepts_connections(port)
        parent.kill()
    wait_until(lambda: not accepts_connections(port))


def test_command_runs_until_a_signal() -> None:
    command = [sys.executable, str(PROJECT / "misc" / "kafka_server.py")]
    assert not accepts_connections(9092), "this test needs the port"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "is ready on localhost:9092" in process.stdout.readline()
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert second.stderr == "kafka_server.py: something listens on localhost:9092 already\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert not accepts_connections(9092)
