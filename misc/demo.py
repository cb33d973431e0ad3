"""Load the sample, enrich it and show what lies on the output topic, then the same of an event; misc/demo.sh runs this.

It starts a Kafka for that, unless KAFKA_BROKERS names one: there it uses topics of its own, and deletes them.
"""

import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from kafka_server import KafkaServer

PROJECT = Path(__file__).parent.parent
SAMPLE_DATABASE = "misc/sample-city.mmdb"
SHOWN = ("2001:1b68::1", "192.168.0.1")
EVENT = b'{"id":7, "ip":"[2001:1b68::1]:443"}'


@contextmanager
def kafka() -> Iterator[dict[str, str]]:
    """Start a Kafka, or use the one that KAFKA_BROKERS names.

    Yields:
        the environment variables that make the two scripts use it.
    """
    if brokers := os.environ.get("KAFKA_BROKERS"):
        topics = {f"KAFKA_{end}_TOPIC": f"demo_{end.lower()}_{uuid.uuid4().hex[:8]}" for end in ("INPUT", "OUTPUT")}
        try:
            yield {"KAFKA_BROKERS": brokers, **topics}
        finally:
            with KafkaAdminClient(bootstrap_servers=brokers.split(",")) as admin:
                admin.delete_topics(
                    [topic for topic in admin.list_topics() if topic.startswith(tuple(topics.values()))]
                )
    else:
        print("starting Apache Kafka ...", flush=True)
        with KafkaServer(settings={"group.initial.rebalance.delay.ms": "0"}) as server:
            yield {
                "KAFKA_BROKERS": server.address,
                "KAFKA_INPUT_TOPIC": "ip_address_by_country",
                "KAFKA_OUTPUT_TOPIC": "ip_address_by_location",
            }


def run(command: str, settings: dict[str, str]) -> None:
    """Run a command as a user would type it; end with its exit code where that is not 0."""
    print(f"$ {command}", flush=True)
    *variables, _, script = command.split()
    environment = {"PATH": os.environ["PATH"], **settings, **dict(variable.split("=") for variable in variables)}
    ended = subprocess.run([sys.executable, script], cwd=PROJECT, env=environment, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def read(brokers: str, topic: str) -> list[tuple[str, str]]:
    """Read all that a topic holds.

    Args:
        brokers: host:port, comma separated.
        topic: its name; keys and values have to be UTF-8.

    Returns:
        the keys and values.
    """
    consumer = KafkaConsumer(bootstrap_servers=brokers.split(","), enable_auto_commit=False)
    partitions = [TopicPartition(topic, partition) for partition in consumer.partitions_for_topic(topic)]
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    ends = consumer.end_offsets(partitions)
    records: list[tuple[str, str]] = []
    while any(consumer.position(partition) < ends[partition] for partition in partitions):
        for batch in consumer.poll(timeout_ms=1000).values():
            records += [(record.key.decode(), record.value.decode()) for record in batch]
    consumer.close()
    return records


def enrich_event(settings: dict[str, str]) -> bool:
    """Write an event to a topic of its own, and show it before and after; whether only a member was added."""
    brokers = settings["KAFKA_BROKERS"].split(",")
    topics = {name: f"{settings[name]}_events" for name in ("KAFKA_INPUT_TOPIC", "KAFKA_OUTPUT_TOPIC")}
    with KafkaAdminClient(bootstrap_servers=brokers) as admin:
        for topic in topics.values():
            admin.create_topics({topic: {"num_partitions": 1}}, wait_for_metadata=True)
    with KafkaProducer(bootstrap_servers=brokers) as producer:
        producer.send(topics["KAFKA_INPUT_TOPIC"], EVENT, b"7").get(30)
    print("$ export", *(f"{name}={topic}" for name, topic in topics.items()))
    run(f"IP_FIELD=ip GEOIP_DATABASE={SAMPLE_DATABASE} python kafka_enrich.py", {**settings, **topics})
    [(_, event)] = read(settings["KAFKA_BROKERS"], topics["KAFKA_OUTPUT_TOPIC"])
    print(f"an event, and what lies on topic {topics['KAFKA_OUTPUT_TOPIC']}:\n  {EVENT.decode()}\n  {event}")
    return event.startswith(EVENT.decode()[:-1]) and "location" in json.loads(event)


def main() -> int:
    """Run the demo.

    Returns:
        0 where every record came through.
    """
    with kafka() as settings:
        run("python load_data.py", settings)
        run(f"GEOIP_DATABASE={SAMPLE_DATABASE} python kafka_enrich.py", settings)
        loaded = read(settings["KAFKA_BROKERS"], settings["KAFKA_INPUT_TOPIC"])
        enriched = read(settings["KAFKA_BROKERS"], settings["KAFKA_OUTPUT_TOPIC"])

        print(f"some of the {len(enriched)} records on topic {settings['KAFKA_OUTPUT_TOPIC']}:")
        rows, results = Counter[tuple[str, str]](), Counter[str]()
        for key, value in enriched:
            record = json.loads(value)
            rows[key, record["ip"]] += 1
            results[record.get("error", "located")] += 1
            if record["ip"] in SHOWN:
                print(f"  {key}: {value}")
        counts = ", ".join(f"{n} {what}" for what, n in results.items())
        print(f"{len(loaded)} records in, {len(enriched)} out: {counts}")
        return 0 if enrich_event(settings) and rows == Counter(loaded) else 1


if __name__ == "__main__":
    sys.exit(main())
