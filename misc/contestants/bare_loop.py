"""A bare loop of confluent-kafka: what Python does without an engine. It follows the topic until it is killed."""

import os

from confluent_kafka import Consumer, Producer
from enrich import BROKERS, INPUT, OUTPUT, enrich

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
            producer.produce(OUTPUT, enrich(message.value() or b""), message.key())
    producer.poll(0)
