"""The same work with Quix Streams. It follows the topic until it is killed."""

import os

from enrich import BROKERS, INPUT, OUTPUT, enrich
from quixstreams import Application

application = Application(
    broker_address=BROKERS,
    consumer_group=os.environ["KAFKA_GROUP_ID"],
    auto_offset_reset="earliest",
    loglevel="WARNING",
    producer_extra_config={"enable.idempotence": True, "queue.buffering.max.messages": 1_000_000},
)
records = application.dataframe(application.topic(INPUT, key_deserializer="bytes", value_deserializer="bytes"))
records = records.apply(enrich)
records.to_topic(application.topic(OUTPUT, key_serializer="bytes", value_serializer="bytes"))
application.run()
