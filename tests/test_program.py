"""What the program does beside enriching: it tries values out, checks, shows how far it is, and names its packages."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from conftest import PROJECT, SAMPLE_DATABASE, Api, Program, Reply, Topics

DATABASE = {"GEOIP_DATABASE": str(SAMPLE_DATABASE)}
ANKARA = '"city":"Ankara","region":"Ankara","country_name":"Türkiye"'
NOWHERE = '"city":null,"region":null,"country_name":null'


def lines_of(script: Path, values: bytes, **environment: str) -> list[str]:
    """What the script prints of values in its standard input."""
    return (
        subprocess.run(
            [sys.executable, script, "-"],
            input=values,
            capture_output=True,
            env={**DATABASE, **environment},
            check=True,
        )
        .stdout.decode()
        .splitlines()
    )


def test_values_are_tried_out_without_kafka(kafka_enrich_program: Program) -> None:
    tried = kafka_enrich_program("2001:1b68::1", "10.0.0.1", "", **DATABASE, KAFKA_BROKERS="localhost:1")
    assert tried.exit_code == 0
    assert tried.output.splitlines() == [
        f'{{"ip":"2001:1b68::1",{ANKARA}}}',
        f'{{"ip":"10.0.0.1",{NOWHERE},"error":"reserved_ip"}}',
        f'{{"ip":"",{NOWHERE},"error":"invalid_ip"}}',
    ]


def test_lines_are_tried_out(kafka_enrich_program: Program) -> None:
    found = lines_of(kafka_enrich_program.script, b"2001:1b68::1\r\n\xff\n9.9.9.9")
    assert [line.partition(",")[0] for line in found] == ['{"ip":"2001:1b68::1"', '{"ip":"\ufffd"', '{"ip":"9.9.9.9"']


def test_events_are_tried_out(kafka_enrich_program: Program) -> None:
    events = b'{"id": 1.10, "ip": "2001:1b68::1"}\nno event\n'
    found = lines_of(kafka_enrich_program.script, events, IP_FIELD="ip")
    assert found == [f'{{"id": 1.10, "ip": "2001:1b68::1","location":{{{ANKARA}}}}}', "no event"]


def test_nobody_reads_what_is_tried_out(kafka_enrich_program: Program) -> None:
    command = f"yes 9.9.9.9 | {sys.executable} {kafka_enrich_program.script} - | head -n 1"
    tried = subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **DATABASE}, check=True)
    assert tried.stdout.count(b"\n") == 1
    assert b"Traceback" not in tried.stderr


@pytest.mark.parametrize("arguments", ["- <&-", "9.9.9.9 >&-", "9.9.9.9 >/dev/full"])
def test_standard_input_or_output_that_cannot_be_used(kafka_enrich_program: Program, arguments: str) -> None:
    command = f"{sys.executable} {kafka_enrich_program.script} {arguments}"
    tried = subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **DATABASE}, check=False)
    assert tried.returncode == 1
    assert tried.stderr.splitlines()[-1].startswith(b"kafka_enrich.py: standard input or output cannot be used: ")
    assert b"Traceback" not in tried.stderr


def test_nobody_reads_the_help(kafka_enrich_program: Program) -> None:
    process = kafka_enrich_program.start("--help", PYTHONUNBUFFERED="1")
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (0, "")


def test_former_setting_in_the_settings_file_is_warned_of(kafka_enrich_program: Program) -> None:
    kafka_enrich_program.script.with_name("kafka_enrich.env").write_text("RECOVERY_DIR=/data\n")
    tried = kafka_enrich_program("9.9.9.9", **DATABASE)
    assert tried.exit_code == 0
    assert "WARNING RECOVERY_DIR is ignored: the consumer group keeps the place" in tried.errors


@pytest.mark.parametrize(
    ("wanted", "says"), [("stop", "8.8.8.8 was not looked up"), ("wait", "value 1 waits for the source of locations")]
)
def test_lookup_that_fails_ends_it_unless_failures_are_marked(
    kafka_enrich_program: Program, api: Api, wanted: str, says: str
) -> None:
    api.reply = lambda _path: Reply(status=503)
    tried = kafka_enrich_program("8.8.8.8", IPAPI_URL=api.url, ON_LOOKUP_FAILED=wanted)
    assert (tried.exit_code, tried.output) == (1, "")
    assert f"{says}: HTTP 503" in tried.errors.splitlines()[-1]


def test_check_says_what_there_is_and_starts_nothing(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"key", b"9.9.9.9")] * 5)
    checked = kafka_enrich_program("--check", **topics.environment(), **DATABASE, FIELDS="city,asn")
    assert (checked.exit_code, topics.end_offset()) == (0, 0)
    assert checked.output.splitlines() == [
        f"brokers: {topics.address}/1",
        f"topic {topics.input}: 4 partitions",
        f"topic {topics.output}: 4 partitions",
        f"group {topics.input}-to-{topics.output}: members 0, lag 5",
        "fields: city, asn",
        f"database {SAMPLE_DATABASE}: Sample-City of 2026-11-23",
        "in a sample of their records not found: asn",
    ]


def test_check_begins_nowhere(kafka_enrich_program: Program, topics: Topics) -> None:
    latest = {"KAFKA_CONSUMER_AUTO_OFFSET_RESET": "latest"}
    topics.write([(b"key", b"9.9.9.9")] * 5)
    assert kafka_enrich_program("--check", **topics.environment(), **DATABASE, **latest).exit_code == 0
    assert "INFO 5 records: " in kafka_enrich_program(**topics.environment(), **DATABASE).errors


def test_check_without_a_database_asks_nobody(kafka_enrich_program: Program, topics: Topics, api: Api) -> None:
    checked = kafka_enrich_program("--check", **topics.environment(), IPAPI_URL=api.url)
    assert checked.output.splitlines()[-2:] == [
        "fields: city, region, country_name",
        f"locations: {api.url}, which is not asked here",
    ]
    assert not api.asked


def test_check_ends_as_a_start_would(kafka_enrich_program: Program, topic_names: Topics) -> None:
    checked = kafka_enrich_program("--check", **topic_names.environment(), **DATABASE)
    assert (checked.exit_code, checked.output) == (1, "")
    assert f"topic '{topic_names.output}' (KAFKA_OUTPUT_TOPIC) does not exist" in checked.errors.splitlines()[-1]


def test_bounded_run_on_a_terminal_shows_how_far_it_is(kafka_enrich_program: Program, topics: Topics) -> None:
    topics.write([(b"%d" % number, b"9.9.9.9") for number in range(500)])
    terminal, other_end = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    with os.fdopen(terminal, "rb", buffering=0) as shown:
        process = subprocess.Popen(
            [sys.executable, kafka_enrich_program.script], env={**topics.environment(), **DATABASE}, stderr=other_end
        )
        os.close(other_end)
        text = b""
        try:
            while more := shown.read(1_000):
                text += more
        except OSError:  # so Linux says that the other end is closed
            pass
    assert process.wait(30) == 0
    assert re.search(rb"100%\|.*\| 500/500 \[", text), text
    assert b"500 records: 500 not_found" in text


@pytest.mark.parametrize("script", ["kafka_enrich.py", "load_data.py"])
def test_metadata_names_the_packages_of_the_requirements(script: str) -> None:
    """PEP 723: so that uv runs a script with what it needs."""
    source = (PROJECT / script).read_text()
    [block] = re.findall(r"^# /// script\n((?:#(?: .*)?\n)*)# ///$", source, re.M)
    required = re.findall(r"^([\w-]+==[\d.]+)", (PROJECT / "requirements.txt").read_text(), re.M)
    imported = {"kafka-python": "from kafka import", "python-dotenv": r"from dotenv\b"}

    def is_used(package: str) -> bool:
        module = package.partition("=")[0]
        return bool(re.search(f"^{imported.get(module, rf'(import|from) {module}'.replace('-', '_'))}", source, re.M))

    used = [package for package in required if is_used(package)]
    assert re.findall('"([^"]*)"', block) == [">=3.10,<3.13", *used]
