#!/bin/sh
# What waxctl and the Bytewax Helm chart start in a container, with both variables set to where they have put the script.
set -eu
cd "${BYTEWAX_WORKDIR:-.}"
# exec, so that the signal of a stop reaches Python and not this shell, which would not pass it on.
exec python "${BYTEWAX_PYTHON_FILE_PATH:-kafka_enrich.py}"
