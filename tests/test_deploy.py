"""The files of misc/deploy, executed as far as that goes without a container engine, a cluster or a cloud."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from conftest import PROJECT, SAMPLE_DATABASE, Topics, wait_until
from kafka_enrich import NAMES, PREFIXES, read_settings
from kafka_server import KafkaServer, free_port
from test_metrics import get

DEPLOY = PROJECT / "misc" / "deploy"
NOBODY = 65532


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


SERVICE, STATEFUL_SET = documents("kubernetes.yaml")
POD = STATEFUL_SET["spec"]["template"]["spec"]
[COMPOSE] = documents("compose.yaml")
[HELM_VALUES] = documents("helm-values.yaml")
[INIT_CONTAINER], [CONTAINER] = POD["initContainers"], POD["containers"]


# --- The image: the Dockerfile's steps, in folders ----------------------------------------------------------------


# Of what users other than root can write to, a container that is read-only has /dev/shm alone.
READ_ONLY = """
mount -t tmpfs tmpfs /dev/shm
for folder in /tmp /var/tmp; do
    mount --bind "$folder" "$folder"
    mount -o remount,bind,ro "$folder"
done
exec "$@"
"""


@dataclass
class Image:
    """What the Dockerfile makes, in a folder instead of a container, whose paths are below `root`."""

    root: Path
    environment: dict[str, str]
    workdir: str = ""
    user: str = "root"
    command: list[str] = field(default_factory=list)
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def here(self, text: str) -> str:
        """Put a container's paths into the folder."""
        return re.sub(r"(?<![\w./])/(build|venv|bytewax|var/bytewax|data|etc/bytewax)\b", rf"{self.root}/\1", text)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
        """Start a command as the image's user, with a root file system that is read-only."""
        uid, gid = self.user.split(":")
        namespace, user = ["unshare", "--mount", "--map-root-user"], []
        if os.getuid() == 0:
            namespace.pop()
            user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all"]
        process = subprocess.Popen(
            [*namespace, "sh", "-euc", READ_ONLY, "sh", *user, *(self.here(word) for word in command)],
            cwd=self.here(self.workdir),
            env={name: self.here(value) for name, value in {**self.environment, **environment}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process


def base_image(root: Path) -> Image:
    """This machine's Python, where a user other than its owner can read it."""
    library = Path(sysconfig.get_path("stdlib"))
    (root / "usr" / "bin").mkdir(parents=True)
    shutil.copytree(
        library, root / "usr" / "lib" / library.name, ignore=shutil.ignore_patterns("site-packages", "test", "config-*")
    )
    for shared in library.parent.glob("libpython3.10.so*"):
        shutil.copy(shared, root / "usr" / "lib", follow_symlinks=False)
    shutil.copy(Path(sys.base_prefix, "bin", "python3.10"), root / "usr" / "bin" / "python")
    path = f"{root}/usr/bin:{os.environ['PATH']}"
    return Image(root, {"PATH": path, "LD_LIBRARY_PATH": f"{root}/usr/lib"})


def instructions() -> Iterator[tuple[str, list[str]]]:
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line and not line.startswith("#"):
            instruction, _, arguments = line.partition(" ")
            yield instruction, json.loads(arguments) if arguments.startswith("[") else arguments.split()


def build(folder: Path) -> Image:
    """Do what the Dockerfile says."""
    not_ignored = [line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    stages: dict[str, Image] = {}
    image = Image(folder, {})
    for instruction, arguments in instructions():
        match instruction, arguments:
            case "FROM", [base, *name]:
                assert base == "python:3.10-slim-trixie"
                image = stages[name[-1] if name else "last"] = base_image(folder / f"stage-{len(stages)}")
            case "COPY", [source, from_path, to_path] if source.startswith("--from="):
                stage = stages[source.removeprefix("--from=")]
                shutil.copytree(stage.here(from_path), image.here(to_path), symlinks=True)
            case "COPY", [*files, target]:
                place = Path(image.here(f"{image.workdir}/{target}".replace("//", "/")))
                place.mkdir(parents=True, exist_ok=True)
                for file in files:
                    assert file in not_ignored
                    shutil.copy(PROJECT / file, place)
            case "RUN", command:
                script = image.here(" ".join(command))
                subprocess.run(["sh", "-c", script], cwd=image.here(image.workdir), env=image.environment, check=True)
            case "WORKDIR", [workdir]:
                image.workdir = workdir
                Path(image.here(image.workdir)).mkdir(parents=True)
            case "ENV", settings:
                values = dict(setting.split("=", 1) for setting in settings)
                values["PATH"] = image.here(values["PATH"]).replace("$PATH", image.environment["PATH"])
                image.environment.update(values)
            case "USER", [user]:
                image.user = user
            case "CMD", command:
                image.command = command
            case _:
                raise AssertionError(instruction)
    return image


@pytest.fixture(scope="module")
def built() -> Iterator[Image]:
    # Not below pytest's own folder, which only its owner can enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # which READ_ONLY covers
        Path(folder).chmod(0o755)
        image = build(Path(folder))
        (image.root / "data").mkdir()
        shutil.copy(SAMPLE_DATABASE, image.root / "data" / "city.mmdb")
        yield image


@pytest.fixture
def image(built: Image) -> Iterator[Image]:
    yield built
    while built.started:
        process = built.started.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])


def stop(processes: Sequence["subprocess.Popen[str]"], seconds: float) -> list[str]:
    """Stop processes as containers are stopped; what they printed."""
    for process in processes:
        process.terminate()
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def on_the_topics_of(topics: Topics, environment: Mapping[str, str]) -> dict[str, str]:
    """A container's variables, with the broker, the topics and the port that this test has."""
    changed = {**topics.environment(), "METRICS_PORT": str(free_port())}
    return {**environment, **{name: value for name, value in changed.items() if name in environment}}


def with_topics(environment: Mapping[str, str]) -> dict[str, str]:
    return {"KAFKA_INPUT_TOPIC": "", "KAFKA_OUTPUT_TOPIC": "", **environment}


@pytest.mark.timeout(600)
def test_image_follows_as_nobody_and_stops(image: Image, topics: Topics) -> None:
    environment = on_the_topics_of(topics, with_topics(COMPOSE["services"]["kafka_enrich"]["environment"]))
    topics.write([(b"key", b"2001:1b68::1")])
    process = image.start(image.command, environment)
    wait_until(lambda: topics.end_offset() == 1)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert f"Uid:\t{NOBODY if os.getuid() == 0 else os.getuid()}" in status
    assert "Name:\tpython" in status  # and not the shell of entrypoint.sh
    assert stop([process], 10)[0].endswith(
        "1 located, 0 invalid_ip, 0 reserved_ip, 0 not_found, 0 lookup_failed; 0 from the cache\n"
    )


def test_image_runs_the_loader(image: Image, topic_names: Topics) -> None:
    command = COMPOSE["services"]["load_data"]["command"]
    environment = with_topics(COMPOSE["services"]["load_data"]["environment"])
    process = image.start(command, on_the_topics_of(topic_names, environment))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "loaded 154 records" in output


# --- Kubernetes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [SERVICE, STATEFUL_SET], ids=lambda document: str(document["kind"]))
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def variables(container: dict[str, Any], pod: str) -> dict[str, str]:
    """The variables of a container in a pod, as Kubernetes sets them."""
    metadata = {"metadata.name": pod}
    return {
        variable["name"]: variable.get("value") or metadata[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container["env"]
    }


def test_stateful_set_is_one_cluster(image: Image, topics: Topics) -> None:
    replicas = STATEFUL_SET["spec"]["replicas"]
    host_file = image.root / "etc" / "bytewax" / "hostfile.txt"
    host_file.parent.mkdir(parents=True)
    subprocess.run(
        [image.here(word) for word in INIT_CONTAINER["command"]], env=variables(INIT_CONTAINER, "any"), check=True
    )
    port = SERVICE["spec"]["ports"][0]["port"]
    hosts = [f"{STATEFUL_SET['metadata']['name']}-{n}.{SERVICE['metadata']['name']}" for n in range(replicas)]
    assert host_file.read_text().splitlines() == [f"{host}:{port}" for host in hosts]
    assert STATEFUL_SET["spec"]["serviceName"] == SERVICE["metadata"]["name"]
    host_file.write_text("".join(f"localhost:{free_port()}\n" for _ in hosts))  # each pod has an address of its own

    environments = [on_the_topics_of(topics, variables(CONTAINER, host.partition(".")[0])) for host in hosts]
    processes = [image.start(image.command, environment) for environment in environments]
    probe = CONTAINER["livenessProbe"]["httpGet"]
    assert probe["port"] == "metrics"
    ports = [int(environment["METRICS_PORT"]) for environment in environments]
    wait_until(lambda: all(get(port, probe["path"]) for port in ports))
    topics.write([(b"key-%d" % number, b"2001:1b68::1") for number in range(60)])
    wait_until(lambda: topics.end_offset() == 60)
    outputs = stop(processes, POD["terminationGracePeriodSeconds"])
    counts = [int(re.findall(r"(\d+) located", output)[-1]) for output in outputs]
    assert sum(counts) == 60
    assert all(count > 0 for count in counts)


def test_containers_can_do_nothing_but_run() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["runAsUser"] == NOBODY
    for container in (INIT_CONTAINER, CONTAINER):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert all(mount["readOnly"] for mount in mounts.values())
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}


def test_chart_starts_it(image: Image, topics: Topics) -> None:
    """With the variables of the chart's StatefulSet (bytewax/helm-charts, templates/statefulset.yaml), one process."""
    host_file = image.root / "chart-hostfile.txt"
    host_file.write_text(f"localhost:{free_port()}\n")
    script = Path(image.here("/var/bytewax/")) / HELM_VALUES["configuration"]["pythonFileName"]
    script.parent.mkdir(parents=True)
    shutil.copy(PROJECT / "kafka_enrich.py", script)
    from_the_chart = {
        "BYTEWAX_PYTHON_FILE_PATH": str(script),
        "BYTEWAX_WORKDIR": "/var/bytewax",
        "BYTEWAX_WORKERS_PER_PROCESS": "1",
        "BYTEWAX_POD_NAME": "kafka-enrich-0",
        "BYTEWAX_REPLICAS": "1",
        "BYTEWAX_KEEP_CONTAINER_ALIVE": "false",
        "BYTEWAX_HOSTFILE_PATH": str(host_file),
        "BYTEWAX_STATEFULSET_NAME": "kafka-enrich",
        "BYTEWAX_DATAFLOW_API_ENABLED": "true",
        "BYTEWAX_DATAFLOW_API_PORT": str(free_port()),
    }
    from_the_values = {**HELM_VALUES["env"], "GEOIP_DATABASE": "/data/city.mmdb"}
    environment = on_the_topics_of(topics, with_topics(from_the_values))
    topics.write([(b"key", b"2001:1b68::1")])
    image.start(["sh", "-c", "sh ./entrypoint.sh"], {**from_the_chart, **environment})
    wait_until(lambda: topics.end_offset() == 1)


# --- Compose, systemd, Prometheus -----------------------------------------------------------------------------------


def test_compose_file_is_valid() -> None:
    without_variables = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", json.dumps(COMPOSE))
    PyCompose.from_json(without_variables).validate_volumes()
    profiles = {profile for service in COMPOSE["services"].values() for profile in service.get("profiles", [])}
    assert (DEPLOY / ".env").read_text().splitlines()[-1] == "COMPOSE_PROFILES=kafka"
    assert profiles == {"kafka", "redpanda"}
    for name in ("kafka", "redpanda"):
        assert COMPOSE["services"][name]["networks"]["default"]["aliases"] == ["broker"]


def test_broker_of_the_compose_file_takes_records() -> None:
    """The image of Apache Kafka makes a property of each variable: KAFKA_NODE_ID is node.id."""
    port, controller = free_port(), free_port()
    properties = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
        .replace("broker:9092", f"localhost:{port}")
        .replace(":9092", f":{port}")
        .replace(":9093", f":{controller}")
        for name, value in COMPOSE["services"]["kafka"]["environment"].items()
        if name.startswith("KAFKA_") and name != "KAFKA_LOG_DIRS"
    }
    with KafkaServer(port, settings=properties) as server:
        topics = Topics(server.address, "from", "to")
        topics.create("from")
        topics.write([(None, b"9.9.9.9")])
        assert topics.read("from") == [(None, b"9.9.9.9")]


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(DEPLOY / "kafka_enrich.service")
    return parser["Service"]


def test_unit_does_not_start_again_what_cannot_work() -> None:
    environment = {"PATH": os.environ["PATH"], "CACHE_SIZE": "-1"}
    script = PROJECT / Path(shlex.split(unit()["ExecStart"])[-1]).name
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, check=False)
    assert str(ended.returncode) == unit()["RestartPreventExitStatus"]
    assert int(unit()["TimeoutStopSec"]) > 8


def test_metrics_that_are_watched_exist(image: Image, topics: Topics) -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    [alerts], [scrape] = documents("alerts.yml"), documents("prometheus.yml")
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    watched = {name for text in expressions for name in re.findall(r"\b(?:kafka_enrich|process)_\w+", text)}
    assert len(watched) > 8
    environment = on_the_topics_of(topics, with_topics(COMPOSE["services"]["kafka_enrich"]["environment"]))
    port = int(environment["METRICS_PORT"])
    process = image.start(image.command, environment)
    wait_until(lambda: bool(get(port)))
    served = get(port)
    stop([process], 10)
    assert all(re.search(rf"^{name}\b", served, re.M) for name in watched), watched
    assert scrape["scrape_configs"][0]["job_name"] == "kafka_enrich"
    assert scrape["rule_files"] == ["alerts.yml"]


# --- What all of them say -------------------------------------------------------------------------------------------


def test_settings_in_the_files_exist_and_can_be_used() -> None:
    described = {
        "kubernetes": variables(CONTAINER, "kafka-enrich-0"),
        "helm": HELM_VALUES["env"],
        "load_data": COMPOSE["services"]["load_data"]["environment"],
        "kafka_enrich": COMPOSE["services"]["kafka_enrich"]["environment"],
    }
    for environment in described.values():
        assert environment.keys() <= set(NAMES)
        read_settings({name: value for name, value in environment.items() if not name.startswith("BYTEWAX_")})


OTHERS = {"CITY_DATABASE", "COMPOSE_PROFILES", "NAME", "PATH", "PYTHONDONTWRITEBYTECODE", "TMPDIR"}


@pytest.mark.parametrize("path", [PROJECT / "README.md", *sorted(DEPLOY.glob("*"))], ids=lambda path: path.name)
def test_names_with_values_are_settings(path: Path) -> None:
    for name in re.findall(r"(?<![\w$&])([A-Z][A-Z_]{2,})=", path.read_text()):
        assert name in NAMES or name.startswith(PREFIXES) or name in OTHERS


@pytest.mark.parametrize("script", sorted(PROJECT.glob("misc/**/*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_clean(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--external-sources", script.relative_to(PROJECT)], cwd=PROJECT, check=True)


def test_dockerfile_is_clean() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], check=True)
