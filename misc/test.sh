#!/usr/bin/env bash
# Runs every check: lint, format, types, and the tests, against a Kafka that they start. Arguments go to pytest.
# The tests need Linux, git, ps, port 9092, and root or a kernel that lets others have namespaces (unshare).
set -euo pipefail
cd "$(dirname "$0")/.."
. misc/venv.sh requirements.txt misc/requirements.txt tests/requirements.txt

"$venv/bin/ruff" check
"$venv/bin/ruff" format --check
"$venv/bin/mypy"
"$venv/bin/pytest" "$@"
