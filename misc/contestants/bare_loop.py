"""A bare loop of confluent-kafka: what Python does without an engine. It follows the topic until it is killed.

With "kafka_enrich" for an argument it looks up as that script does, whatever the database's schema and the spelling of
addresses, so that what is left between the two are the engine and the guarantee.
"""

import os
import sys

from confluent_kafka import Consumer, Message, Producer
from enrich import BROKERS, INPUT, OUTPUT, enrich

if sys.argv[1:] == ["kafka_enrich"]:
    sys.path.insert(0, os.getcwd())

    import kafka_enrich

    locations, _ = kafka_enrich.open_locations(kafka_enrich.read_settings(os.environ))

    def answer(message: Message) -> bytes | None:
        """Locate as kafka_enrich.py does."""
        return locations.get_location(message)[1][0]

else:

    def answer(message: Message) -> bytes | None:
        """Locate what the benchmark's topic holds, and nothing else."""
        return enrich(message.value() or b"")


consumer = Consumer(
    {"bootstrap.servers": BROKERS, "group.id": os.environ["KAFKA_GROUP_ID"], "auto.offset.reset": "earliest"}
)
producer = Producer(
    {
        "bootstrap.servers": BROKERS,
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
        "queue.buffering.max.messages": 1_000_000,
    }
)
consumer.subscribe([INPUT])
while True:
    for message in consumer.consume(1_000, 0.1):
        if message.error() is None:
            producer.produce(OUTPUT, answer(message), message.key())
    producer.poll(0)
