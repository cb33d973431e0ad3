#!/usr/bin/env bash
# Loads the sample into Kafka, enriches it, and shows what came out. Starts a Kafka, unless KAFKA_BROKERS names one.
set -euo pipefail
cd "$(dirname "$0")/.."
. misc/venv.sh requirements.txt misc/requirements.txt
exec "$venv/bin/python" misc/demo.py
