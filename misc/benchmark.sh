#!/usr/bin/env bash
# Measures kafka_enrich.py beside its alternatives, half an hour or more. Usage: misc/benchmark.sh [CITY_DATABASE]
set -euo pipefail
cd "$(dirname "$0")/.."
. misc/venv.sh requirements.txt misc/requirements.txt misc/contestants/requirements.txt
exec "$venv/bin/python" misc/benchmark.py "$@"
