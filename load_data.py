# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["kafka-python==3.0.12", "python-dotenv==1.2.4", "tqdm==4.70.1"]
# ///
"""Load rows of ip,country into the Kafka topic that kafka_enrich.py reads: key = country, value = address.

python load_data.py                 # the sample, misc/ip_address_w_country.txt
python load_data.py my_rows.csv     # UTF-8 of your own; a row of an address alone becomes a record without a key
From the environment or kafka_enrich.env it takes these, here with their defaults, and KAFKA_CLIENT_* for security:
  KAFKA_BROKERS       localhost:9092
  KAFKA_INPUT_TOPIC   ip_address_by_country
  KAFKA_OUTPUT_TOPIC  ip_address_by_location
Exit codes: 0 all rows are in the topic, 1 not all are, 2 wrong usage, 3 all but those that were skipped
"""

import argparse
import csv
import io
import ipaddress
import logging.handlers
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from dotenv.parser import parse_stream
from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError, TopicAlreadyExistsError, TopicAuthorizationFailedError
from tqdm import tqdm

SAMPLE = Path(__file__).parent / "misc" / "ip_address_w_country.txt"
UNACKNOWLEDGED = 10_000  # records; without a bound the producer would queue a whole file in memory
DELIVERY_SECONDS = 125  # kafka-python gives a record up after 120; with the broker away it can wait for ever then
SHOWN = 10  # skipped rows; of more the count tells enough
DISCONNECTED = "it closes the connection, as brokers do for a wrong password or security protocol (KAFKA_CLIENT_*)"
# The secured brokers' part of KAFKA_CLIENT_*, whose names are librdkafka's, in the words of kafka-python.
CLIENT = {
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
    client: dict[str, str | int] = field(repr=False)


def read_settings(env: Mapping[str, str]) -> Settings:
    """Read the settings from a mapping such as os.environ; a ValueError names the variable and its value."""
    brokers = [broker.strip() for broker in env.get("KAFKA_BROKERS", "localhost:9092").split(",")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", broker) for broker in brokers]
    if not all(match and 0 < int(match[2]) < 65_536 for match in matches):
        raise ValueError(f"KAFKA_BROKERS={env['KAFKA_BROKERS']!r} is not host:port, comma separated")
    input_topic = env.get("KAFKA_INPUT_TOPIC", "ip_address_by_country")
    output_topic = env.get("KAFKA_OUTPUT_TOPIC", "ip_address_by_location")
    for name, topic in (("KAFKA_INPUT_TOPIC", input_topic), ("KAFKA_OUTPUT_TOPIC", output_topic)):
        if not re.fullmatch(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}", topic):
            raise ValueError(f"{name}={topic!r} is not a topic's name (1 to 249 of A-Z a-z 0-9 . _ -)")
    if input_topic == output_topic:
        raise ValueError(f"KAFKA_OUTPUT_TOPIC={output_topic!r} is the input topic too; choose another one")
    client: dict[str, str | int] = {option: env[name] for name, option in CLIENT.items() if name in env}
    client["security_protocol"] = protocol = env.get("KAFKA_CLIENT_SECURITY_PROTOCOL", "PLAINTEXT").upper()
    if not re.fullmatch("(SASL_)?(PLAINTEXT|SSL)", protocol):  # kafka-python would take it for PLAINTEXT
        raise ValueError(f"KAFKA_CLIENT_SECURITY_PROTOCOL={protocol!r} is not (SASL_)PLAINTEXT or (SASL_)SSL")
    client["ssl_check_hostname"] = env.get("KAFKA_CLIENT_SSL_ENDPOINT_IDENTIFICATION_ALGORITHM", "https") == "https"
    return Settings(brokers, input_topic, output_topic, {**client, "bootstrap_timeout_ms": 8_000})


def rows(path: Path) -> Iterator[tuple[str, str] | str]:
    """Yield (ip, country) for each row of a file, with "" for no country; for what is no row, where and what it is."""
    # Bytes that are no UTF-8 pass as lone surrogates, and each line is read by itself, so that neither they nor a quote
    # that is not closed take another row with them.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = True
        for number, line in enumerate(file, 1):
            try:
                cells = [cell.strip() for cell in next(csv.reader([line]))]
            except csv.Error as error:
                yield f"{path}:{number}: {error}"
                continue
            if is_row(cells) and line.count('"') % 2 == 0:
                yield cells[0], "".join(cells[1:])
            elif any(cells) and not (first and re.fullmatch(r"(?i)(ip|address)[ _-]?(address)?", cells[0])):
                yield f"{path}:{number}: not ip,country: {','.join(cells)[:80]!r}"
            first = first and not any(cells)


def is_row(cells: list[str]) -> bool:
    """Tell whether these are an IP address and perhaps a country, text that UTF-8 can hold in one line."""
    try:
        ipaddress.ip_address(cells[0])
    except (IndexError, ValueError):
        return False
    return len(cells) <= 2 and all(cells) and not re.search("[\0\r\n\ud800-\udfff]", ",".join(cells))


def create_topics(settings: Settings, **options: int) -> None:
    """Create both topics, with num_partitions and replication_factor, or say that they exist."""
    with KafkaAdminClient(bootstrap_servers=settings.brokers, **settings.client) as admin:
        for topic in (settings.input_topic, settings.output_topic):
            try:
                admin.create_topics({topic: options}, wait_for_metadata=True)
                say("created topic {}: {} partitions, replication factor {}".format(topic, *options.values()))
            except (TopicAlreadyExistsError, TopicAuthorizationFailedError) as error:
                if isinstance(error, TopicAuthorizationFailedError) and topic not in admin.list_topics():
                    raise KafkaError(f"topic {topic!r} does not exist: no permission to CREATE") from None
                say(f"topic {topic} exists already, and is used as it is")


def load(settings: Settings, path: Path) -> int:
    """Send the rows of a file, none twice, wait until each is acknowledged or refused, and return the exit code."""
    acknowledged, skipped, problems = 0, 0, list[object]()

    def acknowledge(_metadata: object) -> None:
        nonlocal acknowledged
        acknowledged += 1
        progress.update()

    producer = KafkaProducer(bootstrap_servers=settings.brokers, enable_idempotence=True, acks="all", **settings.client)
    with tqdm(unit=" records", disable=None) as progress:
        try:
            for number, row in enumerate(takewhile(lambda _: not problems, rows(path))):
                if isinstance(row, str):
                    skipped += 1
                    if skipped <= SHOWN:
                        progress.write(f"{row}; skipped", file=sys.stderr)
                else:
                    ip, country = row
                    sent = producer.send(settings.input_topic, key=country.encode() or None, value=ip.encode())
                    sent.add_callback(acknowledge).add_errback(problems.append)
                if number % UNACKNOWLEDGED == 0:
                    producer.flush(DELIVERY_SECONDS)
        except (KafkaError, OSError, KeyboardInterrupt) as error:
            problems.append(str(error) or "interrupted")
        producer.close(30 if problems else DELIVERY_SECONDS)
    say(f"loaded {acknowledged} records into topic {settings.input_topic}")
    if skipped > SHOWN:
        print(f"load_data.py: skipped {skipped} rows; the first {SHOWN} are above", file=sys.stderr)
    if problems:
        print(f"load_data.py: ended early: {problems[0]}", file=sys.stderr)
    return 1 if problems else 3 if skipped else 0


def say(text: str = "", end: str = "\n") -> None:
    """Print to standard output, even where nobody reads it any more (`| true`)."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try once more as it ends, and complain


def why_no_connection(logged: list[str], error: Exception) -> str:
    """Choose from the log of the attempts what tells most, a time-out least; the exception, if that is all."""
    told = [reason for reason in logged if re.search("onnection|disconnected", reason)] or [str(error)]
    told = [DISCONNECTED if re.search("disconnected|reset by peer", reason) else reason for reason in told]
    return min(told, key=lambda why: 1 if why == DISCONNECTED else 2 if "timed out" in why else 0).replace("\n", " ")


def main() -> int:
    """Run the program, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=SAMPLE, help="UTF-8 text (default: the sample)")
    parser.add_argument("--partitions", type=int, default=20, help="of a topic that is created (default: 20)")
    parser.add_argument("--replication-factor", type=int, default=1, help="likewise (default: 1)")
    options = parser.parse_args()
    if not {options.partitions, options.replication_factor} <= set(range(1, 32_768)):
        parser.error("--partitions and --replication-factor are whole numbers from 1 to 32767")
    if not os.path.exists(options.file):
        parser.exit(2, f"load_data.py: {options.file}: there is no such file\n")
    try:
        path = Path(__file__).with_name("kafka_enrich.env")
        lines = list(parse_stream(io.StringIO(path.read_text("utf-8") if path.exists() else "")))
        if wrong := [line.original.line for line in lines if line.error]:
            raise ValueError(f"{path}: in or after line {wrong[0]} is something else than NAME=value")
        found = {line.key: line.value for line in lines if line.key and line.value is not None}
        settings = read_settings({**found, **os.environ})
    except (OSError, ValueError) as error:
        parser.exit(2, f"load_data.py: {error}\n")
    # kafka-python logs why there is no connection, and its exception does not tell; that becomes one line.
    kafka_log = logging.handlers.BufferingHandler(1_000)
    logging.getLogger("kafka.net.manager").addHandler(kafka_log)
    try:
        create_topics(settings, num_partitions=options.partitions, replication_factor=options.replication_factor)
        return load(settings, options.file)
    except KafkaError as error:
        why = why_no_connection([record.getMessage() for record in kafka_log.buffer], error)
        print(f"load_data.py: Kafka at {','.join(settings.brokers)} (KAFKA_BROKERS): {why}", file=sys.stderr)
        os._exit(1)  # a producer that has records left does not let go


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, KeyboardInterrupt) as error:
        sys.exit(0 if isinstance(error, BrokenPipeError) else 130)  # before Python 3.12 --help does not expect one
    finally:
        say(end="")  # what --help has printed
