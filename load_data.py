"""Load rows of ip,country into the Kafka topic that kafka_enrich.py reads: key = country, value = address.

python load_data.py                 # the sample, misc/ip_address_w_country.txt
python load_data.py my_rows.csv     # a file of your own
"""

import argparse
import csv
import ipaddress
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError, TopicAlreadyExistsError
from tqdm import tqdm

SAMPLE = Path(__file__).parent / "misc" / "ip_address_w_country.txt"
CONNECT_SECONDS = 8  # to find a broker
UNACKNOWLEDGED = 10_000  # records; without a bound the producer would queue a whole file in memory
DISCONNECTED = "it closes the connection, as brokers do for a wrong password or security protocol (KAFKA_CLIENT_*)"
EXIT_CODES = "0 all rows are in the topic, 1 not all are, 2 wrong usage, 3 all but those that are no rows of ip,country"


# The secured brokers' part of KAFKA_CLIENT_*, whose names are librdkafka's, in the words of kafka-python.
CLIENT = {
    "KAFKA_CLIENT_SECURITY_PROTOCOL": "security_protocol",
    "KAFKA_CLIENT_SASL_MECHANISM": "sasl_mechanism",
    "KAFKA_CLIENT_SASL_USERNAME": "sasl_plain_username",
    "KAFKA_CLIENT_SASL_PASSWORD": "sasl_plain_password",
    "KAFKA_CLIENT_SSL_CA_LOCATION": "ssl_cafile",
    "KAFKA_CLIENT_SSL_CERTIFICATE_LOCATION": "ssl_certfile",
    "KAFKA_CLIENT_SSL_KEY_LOCATION": "ssl_keyfile",
    "KAFKA_CLIENT_SSL_KEY_PASSWORD": "ssl_password",
}


@dataclass(frozen=True)
class Settings:
    """The names and defaults of kafka_enrich.py."""

    brokers: list[str]
    input_topic: str
    output_topic: str
    client: dict[str, str | bool] = field(repr=False)


def read_settings(env: Mapping[str, str]) -> Settings:
    """Read the settings from a mapping such as os.environ.

    Args:
        env: values by name; a name that is absent takes its default.

    Returns:
        the settings.

    Raises:
        ValueError: brokers or topics cannot be used; the message names the variable and the value.
    """
    brokers = [broker.strip() for broker in env.get("KAFKA_BROKERS", "localhost:9092").split(",")]
    topics = {
        "KAFKA_INPUT_TOPIC": env.get("KAFKA_INPUT_TOPIC", "ip_address_by_country"),
        "KAFKA_OUTPUT_TOPIC": env.get("KAFKA_OUTPUT_TOPIC", "ip_address_by_location"),
    }
    for broker in brokers:
        if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", broker):
            raise ValueError(f"KAFKA_BROKERS={env['KAFKA_BROKERS']!r} is not host:port, comma separated")
    for name, topic in topics.items():
        if not re.fullmatch(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}", topic):
            raise ValueError(f"{name}={topic!r} is not a topic's name (1 to 249 of A-Z a-z 0-9 . _ -)")
    if len(set(topics.values())) == 1:
        raise ValueError(
            f"KAFKA_OUTPUT_TOPIC={topics['KAFKA_OUTPUT_TOPIC']!r} is the input topic too; choose another one"
        )
    client: dict[str, str | bool] = {option: env[name] for name, option in CLIENT.items() if name in env}
    if client:
        client["security_protocol"] = str(client.get("security_protocol", "PLAINTEXT")).upper()
        verify = env.get("KAFKA_CLIENT_SSL_ENDPOINT_IDENTIFICATION_ALGORITHM", "https")
        client["ssl_check_hostname"] = verify == "https"
    return Settings(brokers, topics["KAFKA_INPUT_TOPIC"], topics["KAFKA_OUTPUT_TOPIC"], client)


def rows(path: Path) -> Iterator[tuple[str, str] | str]:
    """Read a file of ip,country rows: UTF-8, quoted as Excel does, with or without a header row.

    Args:
        path: of the file.

    Yields:
        (ip, country) for a row, and for what is none a line that says where and what it is.

    Raises:
        OSError: the file cannot be read.
    """
    # Bytes that are no UTF-8 pass as lone surrogates, so that only their own row is lost.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        first_row, first_line = True, 1
        while True:
            try:
                cells = [cell.strip() for cell in next(reader)]
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{path}:{reader.line_num}: {error}"
            else:
                if first_row and cells and re.fullmatch(r"(ip|address)[ _-]?(address)?", cells[0].casefold()):
                    pass  # the header
                elif is_row(cells):
                    yield cells[0], cells[1]
                elif any(cells):
                    yield f"{path}:{first_line}: not ip,country: {','.join(cells)[:80]!r}"
                first_row = first_row and not any(cells)
            first_line = reader.line_num + 1


def is_row(cells: list[str]) -> bool:
    """Tell whether these are an IP address and a country, both text that UTF-8 can hold."""
    try:
        ipaddress.ip_address(cells[0])
        "".join(cells).encode()
    except (IndexError, ValueError):
        return False
    return len(cells) == 2 and cells[1] != "" and "\n" not in cells[1]


def create_topics(settings: Settings, partitions: int, replication_factor: int) -> None:
    """Create both topics, or say that they exist.

    Args:
        settings: the brokers and the topics.
        partitions: of a topic that is created, 1 or more.
        replication_factor: likewise, 1 or more.

    Raises:
        KafkaError: a topic cannot be created for another reason than that it exists.
    """
    with KafkaAdminClient(
        bootstrap_servers=settings.brokers, bootstrap_timeout_ms=CONNECT_SECONDS * 1000, **settings.client
    ) as admin:
        for topic in (settings.input_topic, settings.output_topic):
            try:
                admin.create_topics(
                    {topic: {"num_partitions": partitions, "replication_factor": replication_factor}},
                    wait_for_metadata=True,
                )
                print(f"created topic {topic}: {partitions} partitions, replication factor {replication_factor}")
            except TopicAlreadyExistsError:
                print(f"topic {topic} exists already, and is used as it is")


class Outcome(NamedTuple):
    """What became of a file's rows."""

    acknowledged: int
    skipped: int
    problem: str | None


def load(settings: Settings, path: Path) -> Outcome:
    """Send the rows of a file, and wait until the brokers have acknowledged or failed each one sent.

    Args:
        settings: the brokers and the input topic.
        path: of the file.

    Returns:
        how many records were acknowledged and how many rows skipped; the first problem that ended it early, if any.
    """
    acknowledged = skipped = 0
    problem = None
    sent: deque[Any] = deque()
    with (
        KafkaProducer(
            bootstrap_servers=settings.brokers, bootstrap_timeout_ms=CONNECT_SECONDS * 1000, **settings.client
        ) as producer,
        tqdm(unit=" records", disable=None) as progress,
    ):

        def settle(most: int) -> None:
            nonlocal acknowledged
            while len(sent) > most:
                sent.popleft().get()
                acknowledged += 1
                progress.update()

        try:
            for row in rows(path):
                if isinstance(row, str):
                    progress.write(f"{row}; skipped", file=sys.stderr)
                    skipped += 1
                else:
                    ip, country = row
                    sent.append(producer.send(settings.input_topic, key=country.encode(), value=ip.encode()))
                    settle(UNACKNOWLEDGED)
        except (KafkaError, OSError) as error:
            problem = str(error)
        except KeyboardInterrupt:
            problem = "interrupted"
        while sent:
            try:
                settle(0)
            except KafkaError as error:
                problem = problem or str(error)
    return Outcome(acknowledged, skipped, problem)


def why_no_connection(logged: list[str], error: Exception) -> str:
    """Choose from what kafka-python has logged of its attempts what tells most; its exception, if that is all."""
    attempts = [reason for reason in logged if "onnection" in reason or "disconnected" in reason] or [str(error)]
    # A broker that refuses a password closes the connection too, and sometimes only that is noticed. A time-out tells
    # least: the last attempt has no more time than the others have left.
    most = min(attempts, key=lambda reason: 1 if "disconnected" in reason else 2 if "timed out" in reason else 0)
    return DISCONNECTED if "disconnected" in most else " ".join(most.split())


def arguments(settings: Settings) -> argparse.Namespace:
    """Read the command line."""

    def positive(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 32_767:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 32767")
        return int(text)

    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Load rows of ip,country into Kafka for kafka_enrich.py: key = country, value = address.\n"
        "Both topics are created where they are missing.",
        epilog="from the environment, now:\n"
        f"  KAFKA_BROKERS       {','.join(settings.brokers)}\n"
        f"  KAFKA_INPUT_TOPIC   {settings.input_topic}\n"
        f"  KAFKA_OUTPUT_TOPIC  {settings.output_topic}\n"
        "  KAFKA_CLIENT_*      security; the names are in the README\n\n"
        f"exit codes: {EXIT_CODES}",
    )
    parser.add_argument("file", nargs="?", type=Path, default=SAMPLE, help="UTF-8 text (default: the sample)")
    parser.add_argument("--partitions", type=positive, default=20, help="of a topic that is created (default: 20)")
    parser.add_argument("--replication-factor", type=positive, default=1, help="likewise (default: 1)")
    return parser.parse_args()


def main() -> int:
    """Run the program.

    Returns:
        its exit code, one of EXIT_CODES.
    """
    # kafka-python logs why there is no connection, and its exception does not tell; below that becomes one line.
    kafka_log = BufferingHandler(1_000)
    logging.getLogger("kafka").propagate = False
    logging.getLogger("kafka.net.manager").addHandler(kafka_log)
    try:
        settings = read_settings(os.environ)
    except ValueError as error:
        print(f"load_data.py: {error}", file=sys.stderr)
        return 2
    options = arguments(settings)
    if not os.path.exists(options.file):
        print(f"load_data.py: {options.file}: there is no such file", file=sys.stderr)
        return 2
    try:
        create_topics(settings, options.partitions, options.replication_factor)
        acknowledged, skipped, problem = load(settings, options.file)
    except KafkaError as error:
        why = why_no_connection([record.getMessage() for record in kafka_log.buffer], error)
        print(f"load_data.py: Kafka at {','.join(settings.brokers)} (KAFKA_BROKERS): {why}", file=sys.stderr)
        return 1
    print(f"loaded {acknowledged} records into topic {settings.input_topic}")
    if problem:
        print(f"load_data.py: ended early: {problem}", file=sys.stderr)
        return 1
    return 3 if skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
