#!/bin/sh
# What waxctl and the Bytewax Helm chart start in the image; they have put the script where these variables say.
set -eu
cd "$BYTEWAX_WORKDIR"
exec python "$BYTEWAX_PYTHON_FILE_PATH"
