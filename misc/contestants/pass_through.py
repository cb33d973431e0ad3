"""The engine of kafka_enrich.py with its settings, and nothing done to the records: what the engine itself costs."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import kafka_enrich

Record = tuple[bytes | None, bytes | None]


def pass_through(*_arguments: object) -> Callable[[Record], Record]:
    """Take the place of make_get_location."""
    return lambda record: record


kafka_enrich.make_get_location = pass_through
kafka_enrich.count_missing = lambda *_arguments: 0
sys.exit(kafka_enrich.main())
