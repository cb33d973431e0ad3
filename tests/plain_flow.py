"""The wiring of kafka_enrich.py with the engine's own defaults, to show what a fault does without our settings.

python plain_flow.py BROKER INPUT OUTPUT pass|follow [PRODUCER_PROPERTY=VALUE ...]
"""

import sys

from bytewax.dataflow import Dataflow
from bytewax.execution import cluster_main
from bytewax.inputs import KafkaInputConfig
from bytewax.outputs import KafkaOutputConfig
from bytewax.recovery import KafkaRecoveryConfig

broker, input_topic, output_topic, mode, *properties = sys.argv[1:]
producer = dict(text.split("=") for text in properties)
follow = mode == "follow"

flow = Dataflow()
flow.input("ip_address", KafkaInputConfig([broker], input_topic, follow))
flow.map(lambda record: (record[0], b'{"ip":"%s"}' % record[1]))
flow.capture(KafkaOutputConfig([broker], output_topic, additional_properties=producer))
cluster_main(flow, [], 0, recovery_config=KafkaRecoveryConfig([broker], "plain") if follow else None)
