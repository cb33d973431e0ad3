"""The same work with the engine's own Kafka connectors, in a bounded run: python -m bytewax.run."""

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource
from bytewax.dataflow import Dataflow
from enrich import BROKERS, INPUT, OUTPUT, enrich

flow = Dataflow("enrich")
records = op.input("input", flow, KafkaSource([BROKERS], [INPUT], tail=False))
enriched = op.map("enrich", records, lambda record: KafkaSinkMessage(record.key, enrich(record.value)))
op.output(
    "output",
    enriched,
    KafkaSink(
        [BROKERS],
        OUTPUT,
        add_config={
            "enable.idempotence": "true",
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": "1000000",
        },
    ),
)
