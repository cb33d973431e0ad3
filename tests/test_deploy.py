"""The files of misc/deploy, executed as far as that goes without a container engine, a cluster or a cloud."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any
from urllib.request import urlopen

import kubernetes_validate
import promql_parser
import pytest
import yaml
from compose_spec import PyCompose

from conftest import PROJECT, SAMPLE_DATABASE, Program, Topics, wait_until
from harness import Reader, Stream, Tally
from kafka_enrich import RESULTS, Settings, read_settings
from kafka_server import KafkaServer, free_port

DEPLOY = PROJECT / "misc" / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


CONFIG_MAP, DEPLOYMENT = documents("kubernetes.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
[COMPOSE], [REDPANDA], [HELM_VALUES] = map(documents, ("compose.yaml", "redpanda.yaml", "helm-values.yaml"))
LOADER, ENRICHER = COMPOSE["services"]["load_data"], COMPOSE["services"]["kafka_enrich"]
# What the chart of helm-values.yaml sets (bytewax/helm-charts 0.8.1, templates/statefulset.yaml), where it matters.
CHART = {
    "BYTEWAX_PYTHON_FILE_PATH": f"/var/bytewax/{HELM_VALUES['configuration']['pythonFileName']}",
    "BYTEWAX_WORKDIR": "/var/bytewax",
    "BYTEWAX_POD_NAME": "kafka-enrich-0",
}
HELM = {name: re.sub(r"\$\((\w+)\)", lambda its: CHART[its[1]], value) for name, value in HELM_VALUES["env"].items()}


# Runs a command in an image: this machine's system and Python around a folder with what the Dockerfile adds.
ENTER = """
root=$1 python=$2 mode=$3 user=$4 workdir=$5; shift 5
mount --bind "$root" "$root"
for folder in usr bin lib lib64 etc proc dev; do
    if [ -e "/$folder" ]; then mkdir -p "$root/$folder"; mount --rbind "/$folder" "$root/$folder"; fi
done
mount --bind "$python" "$root/usr/local"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -o "remount,bind,$mode" "$root"
exec chroot --userspec "$user" --groups= "$root" env --chdir "$workdir" "$@"
"""


class Image:
    """What the Dockerfile makes, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.workdir, self.user = root, "/", "0:0"
        self.environment = {"PATH": "/opt/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": "/usr/local/lib"}
        self.command: list[str] = []
        self.started: list[Popen[str]] = []
        # This machine's Python, by the name that the image has for it.
        (root / "opt" / "bin").mkdir(parents=True)
        (root / "tmp").mkdir()
        (root / "opt" / "lib").symlink_to("/usr/local/lib")
        (root / "opt" / "bin" / "python").symlink_to(f"/usr/local/bin/python3.{sys.version_info.minor}")

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> Popen[str]:
        """Start a command as the image's user, who can write to nothing but /dev/shm once the image is whole."""
        is_root = os.getuid() == 0
        enter = ["unshare", "--mount", *([] if is_root else ["--map-root-user"]), "sh", "-euc", ENTER, "sh"]
        where = [str(self.root), sys.base_prefix, "ro" if self.command else "rw"]
        words = [*enter, *where, self.user if is_root else "0:0", self.workdir, *command]
        env = {**self.environment, **environment}
        self.started.append(Popen(words, env=env, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True))
        return self.started[-1]

    def copy(self, file: Path, place: str) -> None:
        (self.root / place[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, self.root / place[1:])


def build(folder: Path) -> Image:
    """Do what the Dockerfile says."""
    stages = {"": Image(folder / "none")}
    image = stages[""]
    for line in re.findall(r"^[A-Z].*", (DEPLOY / "Dockerfile").read_text(), re.M):
        match line.split():
            case ["FROM", "python:3.12-slim-trixie", *name]:
                image = stages[name[-1] if name else ""] = Image(folder / f"stage-{len(stages)}")
            case ["COPY", source, path, target] if source.startswith("--from="):
                stage = stages[source.removeprefix("--from=")]
                shutil.copytree(stage.root / path[1:], image.root / target[1:], symlinks=True)
            case ["COPY", *files, target]:
                for file in files:
                    assert f"!{file}" in (PROJECT / ".dockerignore").read_text().splitlines()
                    image.copy(PROJECT / file, f"{image.workdir}/{target}/{Path(file).name}")
            case ["RUN", *_]:
                process = image.start(["sh", "-c", line.removeprefix("RUN ")], {})
                output = process.communicate()[0]
                assert process.returncode == 0, output
            case ["WORKDIR", workdir]:
                image.workdir = workdir
            case ["ENV", *settings]:
                before = image.environment["PATH"]
                image.environment |= dict(setting.replace("$PATH", before).split("=", 1) for setting in settings)
            case ["USER", user]:
                image.user = user
            case ["CMD", *_]:
                image.command = json.loads(line.removeprefix("CMD "))
            case _:
                raise AssertionError(line)
    return image


@pytest.fixture(scope="module")
def built() -> Iterator[Image]:
    with tempfile.TemporaryDirectory() as folder:
        image = build(Path(folder))
        for settings in (HELM, CONFIG_MAP["data"], ENRICHER["environment"]):
            image.copy(SAMPLE_DATABASE, settings["GEOIP_DATABASE"])
        image.copy(PROJECT / "kafka_enrich.py", CHART["BYTEWAX_PYTHON_FILE_PATH"])
        yield image


@pytest.fixture
def image(built: Image) -> Iterator[Image]:
    yield built
    while built.started:
        process = built.started.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])


def stop(process: Popen[str]) -> str:
    """Stop a process as Kubernetes does; what it printed."""
    process.terminate()
    output = process.communicate(timeout=POD["terminationGracePeriodSeconds"])[0]
    assert process.returncode == 0, output
    return output


def on_the_topics_of(topics: Topics, environment: Mapping[str, str]) -> dict[str, str]:
    """A container's variables, with the broker, the topics and the port that this test has."""
    return {**environment, **topics.environment(), "METRICS_PORT": str(free_port())}


def served(environment: Mapping[str, str], path: str = "/metrics") -> str:
    """What a copy serves on its port; an empty text while it does not."""
    with suppress(OSError), urlopen(f"http://localhost:{environment['METRICS_PORT']}{path}", timeout=10) as response:
        return str(response.read().decode())
    return ""


def has_committed(environment: Mapping[str, str]) -> bool:
    metrics = served(environment, POD["containers"][0]["startupProbe"]["httpGet"]["path"])
    return bool(re.search(r"^kafka_enrich_commit_seconds_count [1-9]", metrics, re.M))


@pytest.mark.timeout(600)
def test_image_follows_as_nobody_and_stops(image: Image, topics: Topics) -> None:
    topics.write([(b"key", b"2001:1b68::1")])
    process = image.start(image.command, on_the_topics_of(topics, ENRICHER["environment"]))
    wait_until(lambda: topics.end_offset() == 1)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "Name:\tpython" in status  # and not a shell, which would keep the signal to itself
    assert f"Uid:\t{POD['securityContext']['runAsUser'] if os.getuid() == 0 else os.getuid()}" in status
    assert stop(process).endswith("1 records: 1 located; 0 from the cache\n")


def test_image_runs_the_loader(image: Image, topic_names: Topics) -> None:
    process = image.start(LOADER["command"], {**LOADER["environment"], **topic_names.environment()})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "loaded 154 records" in output


def test_manifests_are_valid() -> None:
    for document in (CONFIG_MAP, DEPLOYMENT):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_scaler_reads_the_lag_of_the_group_of_the_deployment() -> None:
    [scaler] = documents("keda.yaml")
    settings, kafka = read_settings(CONFIG_MAP["data"]), scaler["spec"]["triggers"][0]["metadata"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert (kafka["bootstrapServers"], kafka["topic"]) == (settings.kafka_brokers, settings.kafka_input_topic)
    assert kafka["consumerGroup"] == settings.group
    behavior = scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    scaled = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "kafka-enrich"}}
    target = {"kind": "Deployment", "name": scaler["spec"]["scaleTargetRef"]["name"]}
    spec = {"scaleTargetRef": target, "maxReplicas": scaler["spec"]["maxReplicaCount"], "behavior": behavior}
    kubernetes_validate.validate({**scaled, "spec": spec}, kubernetes_validate.latest_version(), strict=True)


def test_rolling_update_enriches_each_record_once(image: Image, topics: Topics) -> None:
    """Two replicas are replaced as the Deployment says: a new one has to work before an old one goes."""
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pods, outputs = [], []
    stream = Stream(topics, 2_000, 0)
    try:
        for _ in range(4):
            environment = on_the_topics_of(topics, CONFIG_MAP["data"])
            pods.append(image.start(image.command, environment))
            wait_until(functools.partial(has_committed, environment))
            if len(pods) > 2:
                outputs.append(stop(pods.pop(0)))
        written = stream.stop()
    finally:
        stream.abandon()
    wait_until(lambda: len(Tally(Reader(topics, topics.output).read_all()).seen) == written)
    outputs += [stop(pod) for pod in pods]
    out = Tally(Reader(topics, topics.output).read_all())
    assert out.seen.keys() == set(range(written))
    assert (out.doubled, out.out_of_order) == (0, 0)
    shares = [int(re.findall(r"(\d+) records", output)[-1]) for output in outputs]
    assert (sum(shares), min(shares) > 0) == (written, True)


def test_compose_files_are_valid() -> None:
    for compose in (COMPOSE, REDPANDA):
        PyCompose.from_json(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", json.dumps(compose))).validate_volumes()
    assert REDPANDA["services"].keys() == {"broker"} < COMPOSE["services"].keys()


def test_broker_of_the_compose_file_takes_records() -> None:
    """The image of Apache Kafka makes a property of each variable: KAFKA_NODE_ID is node.id."""
    port = free_port()
    text = json.dumps(COMPOSE["services"]["broker"]["environment"]).replace(":9093", f":{free_port()}")
    text = text.replace("broker:9092", f"localhost:{port}").replace(":9092", f":{port}")
    properties = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
        for name, value in json.loads(text).items()
        if name not in ("CLUSTER_ID", "KAFKA_LOG_DIRS")
    }
    with KafkaServer(port, settings=properties) as server:
        topics = Topics(server.address, "from", "to")
        topics.create("from")
        topics.write([(None, b"9.9.9.9")])
        assert topics.read("from") == [(None, b"9.9.9.9")]
        server.kill()  # nothing of it is needed any more


@pytest.mark.parametrize("chart", [False, True], ids=["compose", "chart"])
def test_start_after_a_kill_waits_for_no_time_out(image: Image, topics: Topics, chart: bool) -> None:
    command = ["sh", "-c", "sh ./entrypoint.sh"] if chart else image.command
    environment = on_the_topics_of(topics, {**CHART, **HELM} if chart else ENRICHER["environment"])
    topics.write([(b"key", b"2001:1b68::1")])
    killed = image.start(command, environment)
    wait_until(lambda: has_committed(environment))
    os.killpg(killed.pid, signal.SIGKILL)
    topics.write([(b"key", b"2001:1b68::1")])
    image.start(command, environment)
    wait_until(lambda: topics.end_offset() == 2, 8)  # the session of the killed one takes 10 s to end


def test_unit_starts_again_only_what_can_work(topic_names: Topics, kafka_enrich_program: Program) -> None:
    lines = re.findall(r"^(\w+)=(.*)", (DEPLOY / "kafka_enrich.service").read_text(), re.M)
    service = dict(lines)
    script = Path(service["ExecStart"].split()[-1])
    assert script.name == kafka_enrich_program.script.name
    assert service["Restart"] == "on-failure"
    chosen = dict(word.split("=") for name, value in lines if name == "Environment" for word in value.split())
    assert (chosen["KAFKA_TAIL"], Path(chosen["GEOIP_DATABASE"]).parent) == ("1", script.parent)
    chosen |= {"GEOIP_DATABASE": str(SAMPLE_DATABASE), "KAFKA_CONSUMER_GROUP_INSTANCE_ID": "host.example"}
    environment = {**topic_names.environment(), **chosen}
    assert kafka_enrich_program(**environment, CACHE_SIZE="-1").exit_code == int(service["RestartPreventExitStatus"])
    assert kafka_enrich_program(**environment).exit_code == 1  # the topics are not there yet


def expressions() -> list[str]:
    """What the dashboard and the alerts ask Prometheus."""
    dashboard, [alerts] = json.loads((DEPLOY / "grafana-dashboard.json").read_text()), documents("alerts.yml")
    return [
        *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]),
        *(rule["expr"] for group in alerts["groups"] for rule in group["rules"]),
    ]


def test_dashboard_and_alerts_ask_what_prometheus_understands() -> None:
    for expression in expressions():
        promql_parser.parse(re.sub(r"\$__\w+", "5m", expression))
        assert set(re.findall(r'result="(\w+)"', expression)) <= set(RESULTS)


def test_metrics_that_are_watched_exist(image: Image, topics: Topics) -> None:
    [scrape] = documents("prometheus.yml")
    watched = {name for text in expressions() for name in re.findall(r"\b(?:kafka_enrich|process)_\w+", text)}
    assert len(watched) > 8
    environment = on_the_topics_of(topics, ENRICHER["environment"])
    image.start(image.command, environment)
    topics.write([(b"key", b"2001:1b68::1")])

    def missing() -> set[str]:
        metrics = served(environment)
        return {name for name in watched if not re.search(rf"^{name}\b", metrics, re.M)}

    wait_until(lambda: "kafka_enrich_located_total{" in served(environment))
    wait_until(lambda: "kafka_enrich_lag_records{" in served(environment))  # it is counted twice a second
    assert missing() == set()
    assert (scrape["scrape_configs"][0]["job_name"], scrape["rule_files"]) == ("kafka_enrich", ["alerts.yml"])


def is_setting(name: str) -> bool:
    properties = ("KAFKA_CLIENT_", "KAFKA_CONSUMER_", "KAFKA_PRODUCER_")
    return name.lower() in Settings.__struct_fields__ or name.startswith(properties)


def test_settings_in_the_files_exist_and_can_be_used() -> None:
    for environment in (CONFIG_MAP["data"], HELM, LOADER["environment"], ENRICHER["environment"]):
        assert [name for name in environment if not is_setting(name)] == []
        read_settings(environment)


@pytest.mark.parametrize("path", [PROJECT / "README.md", *sorted(DEPLOY.glob("*"))], ids=lambda path: path.name)
def test_names_with_values_are_settings(path: Path) -> None:
    names = set(re.findall(r"(?<![\w$&])([A-Z][A-Z_]{2,})=", path.read_text()))
    others = {"CITY_DATABASE", "DATABASES", "NAME", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHON_VERSION"}
    assert [name for name in names - others if not is_setting(name)] == []


def test_shell_scripts_and_the_dockerfile_are_clean() -> None:
    checkers = Path(sys.executable).parent
    subprocess.run([checkers / "shellcheck", "-x", *PROJECT.glob("misc/**/*.sh")], cwd=PROJECT, check=True)
    subprocess.run([checkers / "hadolint", DEPLOY / "Dockerfile"], check=True)
