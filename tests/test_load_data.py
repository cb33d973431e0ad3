"""The loader: every kind of file, topics that exist and do not, and counts that are true."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from conftest import PROJECT, Program, Topics, ended, wait_until
from kafka_server import KafkaServer
from load_data import SAMPLE, rows

GERMANY = ("5.159.132.1", "Germany")


def test_sample_is_whole_and_real() -> None:
    found = list(rows(SAMPLE))
    assert not [row for row in found if isinstance(row, str)]
    assert len(found) == len(set(found)) == len(SAMPLE.read_text().splitlines()) - 1
    assert len({row[1] for row in found}) >= 50


@pytest.mark.parametrize(
    "content",
    [
        b"ip,country\n5.159.132.1,Germany\n",
        b"5.159.132.1,Germany\n",
        b"ip,country\n5.159.132.1,Germany",
        b"IP Address,Country\r\n5.159.132.1,Germany\r\n",
        b"\xef\xbb\xbfip,country\n5.159.132.1,Germany\n",
        b"\xef\xbb\xbf5.159.132.1,Germany\n",
        b"\n\nip,country\n\n , \n5.159.132.1,Germany\n\n",
        b'"5.159.132.1","Germany"\n',
        b" 5.159.132.1 , Germany \n",
        b"ip,country\r5.159.132.1,Germany\r",
    ],
)
def test_one_row(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert list(rows(path)) == [GERMANY]


def test_country_with_a_comma_or_more_than_ascii(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('ip,country\n1.2.3.4,"Korea, Republic of"\n2001:db8::1,Türkiye\n', encoding="utf-8")
    assert list(rows(path)) == [("1.2.3.4", "Korea, Republic of"), ("2001:db8::1", "Türkiye")]


@pytest.mark.parametrize(
    "line",
    [
        b"5.159.132.1,",
        b",Germany",
        b"Germany,5.159.132.1",
        b"5.159.132.1,Germany,Berlin",
        b"5.159.132.1;Germany",
        b"5.159.132.256,Germany",
        b"ip,country",
        b"5.159.132.1,\xff",
        b"5.159.132.1,a\x00b",
        b"ip-like-thing,Germany",
        b'5.159.132.1,"Germany',
        b"5.159.132.1," + b"x" * 200_000,
    ],
)
def test_row_that_is_none_is_reported_with_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"ip,country\n\n" + line + b"\n5.159.132.1,Germany\n")
    report, row = rows(path)
    assert row == GERMANY
    assert isinstance(report, str)
    assert report.startswith(f"{path}:3: ")
    assert len(report) < 300


def test_address_alone_has_no_country(tmp_path: Path) -> None:
    path = tmp_path / "addresses.txt"
    path.write_bytes(b"5.159.132.1\n2001:db8::1\n")
    assert list(rows(path)) == [("5.159.132.1", ""), ("2001:db8::1", "")]


def test_addresses_alone_become_records_without_a_key(
    tmp_path: Path, load_data_program: Program, topic_names: Topics
) -> None:
    path = tmp_path / "addresses.txt"
    path.write_bytes(b"5.159.132.1\n2001:db8::1\n")
    assert load_data_program(str(path), **topic_names.environment()).exit_code == 0
    assert sorted(topic_names.read(topic_names.input), key=str) == [(None, b"2001:db8::1"), (None, b"5.159.132.1")]


def test_of_many_bad_rows_ten_are_shown_and_all_are_counted(
    tmp_path: Path, load_data_program: Program, topic_names: Topics
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"no row\n" * 2_000 + b"5.159.132.1,Germany\n")
    loaded = load_data_program(str(path), **topic_names.environment())
    assert loaded.exit_code == 3
    assert loaded.errors.count("; skipped") == 10
    assert "skipped 2000 rows; the first 10 are above" in loaded.errors


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", [[], ["--help"]])
def test_output_that_nobody_reads_is_no_error(
    load_data_program: Program, topics: Topics, option: list[str], unbuffered: str
) -> None:
    process = load_data_program.start(str(SAMPLE), *option, **topics.environment(), PYTHONUNBUFFERED=unbuffered)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    assert topics.end_offset(topics.input) == (0 if option else len(list(rows(SAMPLE))))


def test_country_in_two_lines_takes_no_other_row_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'5.159.132.1,"Ger\nmany"\n5.159.132.1,Germany\n')
    *reports, row = rows(path)
    assert row == GERMANY
    assert [str(report).partition(": ")[0] for report in reports] == [f"{path}:1", f"{path}:2"]


def test_loads_file_into_topics_that_it_creates(
    load_data_program: Program, topic_names: Topics, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('ip,country\n1.2.3.4,"Korea, Republic of"\n2001:db8::1,Türkiye\n1.2.3.4,Germany', encoding="utf-8")
    ended = load_data_program(str(path), "--partitions", "3", **topic_names.environment())
    assert (ended.exit_code, ended.errors) == (0, "")
    assert ended.output.endswith(f"loaded 3 records into topic {topic_names.input}\n")
    assert Counter(topic_names.read(topic_names.input)) == Counter(
        [
            (b"Korea, Republic of", b"1.2.3.4"),
            ("Türkiye".encode(), b"2001:db8::1"),
            (b"Germany", b"1.2.3.4"),
        ]
    )
    with KafkaAdminClient(bootstrap_servers=topic_names.address) as admin:
        found = admin.describe_topics([topic_names.input, topic_names.output])
    assert [len(topic["partitions"]) for topic in found] == [3, 3]


def test_topics_that_exist_are_said_and_kept(load_data_program: Program, topics: Topics, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("1.2.3.4,Germany\n")
    ended = load_data_program(str(path), **topics.environment())
    assert ended.exit_code == 0
    assert f"topic {topics.input} exists already" in ended.output
    assert f"topic {topics.output} exists already" in ended.output
    assert "created" not in ended.output


def test_skipped_rows_are_reported_and_in_the_exit_code(
    load_data_program: Program, topics: Topics, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("1.2.3.4,Germany\nnonsense\n1.2.3.5,Germany\n")
    ended = load_data_program(str(path), **topics.environment())
    assert ended.exit_code == 3
    assert f"{path}:2: not ip,country: 'nonsense'; skipped" in ended.errors
    assert "loaded 2 records" in ended.output


def test_refused_record_is_not_counted(load_data_program: Program, topic_names: Topics, tmp_path: Path) -> None:
    topic_names.create(topic_names.input, configs={"max.message.bytes": "1000"})
    topic_names.create(topic_names.output)
    path = tmp_path / "rows.csv"
    path.write_text(f"1.2.3.4,Germany\n1.2.3.4,{'x' * 2000}\n")
    ended = load_data_program(str(path), **topic_names.environment())
    assert ended.exit_code == 1
    loaded = len(topic_names.read(topic_names.input))
    assert f"loaded {loaded} records" in ended.output
    assert "load_data.py: ended early: " in ended.errors


def test_too_many_replicas_is_an_error(load_data_program: Program, topic_names: Topics) -> None:
    ended = load_data_program(str(SAMPLE), "--replication-factor", "3", **topic_names.environment())
    assert ended.exit_code == 1
    assert "InvalidReplicationFactorError" in ended.errors
    assert ended.errors.count("\n") == 1


@pytest.mark.faults
def test_broker_that_does_not_answer_for_a_while_gets_no_record_twice(
    load_data_program: Program, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    os.mkfifo(path)
    lines = [f"1.{number // 250}.{number % 250}.1,Germany {number % 20}\n" for number in range(4_000)]
    with KafkaServer() as server:
        topics = Topics(server.address, "in", "out")
        topics.create(topics.input)
        process = load_data_program.start(str(path), **topics.environment())
        with path.open("w") as file:
            file.write("".join(lines[:2_000]))
            file.flush()
            # The loader reads on when its first record is acknowledged, and has to, for the pipe to take all.
            wait_until(lambda: topics.end_offset(topics.input) > 1)
            server.freeze()
            file.write("".join(lines[2_000:]))
        time.sleep(40)  # kafka-python sends again after 30 what is not answered
        server.thaw()
        loaded = ended(process)
        assert (loaded.exit_code, loaded.errors) == (0, "")
        assert "loaded 4000 records" in loaded.output
        found = topics.read(topics.input)
    assert Counter(f"{(value or b'').decode()},{(key or b'').decode()}\n" for key, value in found) == Counter(lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_CLIENT_SECURITY_PROTOCOL", "SASL-SSL"),
        ("KAFKA_BROKERS", "localhost:x"),
        ("KAFKA_BROKERS", "localhost"),
        ("KAFKA_INPUT_TOPIC", "two words"),
        ("KAFKA_OUTPUT_TOPIC", ""),
        ("KAFKA_OUTPUT_TOPIC", "ip_address_by_country"),
    ],
)
def test_bad_setting_is_named(load_data_program: Program, name: str, value: str) -> None:
    ended = load_data_program(str(SAMPLE), **{name: value})
    assert ended.exit_code == 2
    assert ended.errors.startswith(f"load_data.py: {name}={value!r}")
    assert ended.errors.count("\n") == 1


def test_settings_file(load_data_program: Program, topic_names: Topics) -> None:
    path = load_data_program.script.with_name("kafka_enrich.env")
    lines = [f"{name}={value}\n" for name, value in topic_names.environment().items()]
    path.write_text("".join(lines) + "GEOIP_DATABASE=city.mmdb\n")
    assert load_data_program(str(SAMPLE)).exit_code == 0
    assert topic_names.end_offset(topic_names.input) == len(list(rows(SAMPLE)))
    for unusable in (b"KAFKA_BROKERS=\xff\n", b"KAFKA_BROKERS: localhost:1\n", b"KAFKA_BROKERS=\n"):
        path.write_bytes(unusable)
        ended = load_data_program(str(SAMPLE))
        assert (ended.exit_code, ended.errors.count("\n")) == (2, 1)


def test_file_name_that_no_file_can_have(load_data_program: Program) -> None:
    ended = load_data_program("x" * 300)
    assert ended.exit_code == 2
    assert ended.errors.count("\n") == 1


def test_missing_file(load_data_program: Program) -> None:
    ended = load_data_program("/no/such.csv")
    assert (ended.exit_code, ended.errors) == (2, "load_data.py: /no/such.csv: there is no such file\n")


def test_folder_as_file(load_data_program: Program, topics: Topics, tmp_path: Path) -> None:
    ended = load_data_program(str(tmp_path), **topics.environment())
    assert ended.exit_code == 1
    assert "loaded 0 records" in ended.output
    assert "Is a directory" in ended.errors


def test_broker_away(load_data_program: Program) -> None:
    before = time.monotonic()
    ended = load_data_program(str(SAMPLE), KAFKA_BROKERS="localhost:1")
    assert ended.exit_code == 1
    assert "localhost:1 (KAFKA_BROKERS)" in ended.errors
    assert ended.errors.count("\n") == 1
    assert time.monotonic() - before < 15


@pytest.mark.parametrize("option", [["--partitions", "0"], ["--replication-factor", "x"], ["--no-such"]])
def test_wrong_usage(load_data_program: Program, option: list[str]) -> None:
    assert load_data_program(*option).exit_code == 2


def test_help_names_topics_and_variables(load_data_program: Program) -> None:
    ended = load_data_program("--help")
    for word in (
        "KAFKA_BROKERS       localhost:9092",
        "KAFKA_INPUT_TOPIC   ip_address_by_country",
        "KAFKA_OUTPUT_TOPIC  ip_address_by_location",
    ):
        assert word in ended.output


def test_default_file_is_the_sample(topic_names: Topics) -> None:
    ended = subprocess.run(
        [sys.executable, str(PROJECT / "load_data.py")],
        env=topic_names.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert len(topic_names.read(topic_names.input)) == len(list(rows(SAMPLE)))
