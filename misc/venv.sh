# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv with Python 3.10, and installs into it what the given files require.
# Usage: . misc/venv.sh REQUIREMENTS_FILE...

is_python_310() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; }

make_venv() {
    for python in python3.10 python3 python; do
        if is_python_310 "$python"; then
            "$python" -m venv .venv
            return
        fi
    done
    # Without a Python 3.10 at hand uv brings one, and any Python brings uv.
    if ! command -v uv >/dev/null; then
        if python3 -m venv .venv/uv >/dev/null; then
            .venv/uv/bin/pip install -q uv || true
        fi
        PATH="$PWD/.venv/uv/bin:$PATH"
    fi
    uv venv -q --seed --allow-existing --python 3.10 .venv && return
    rm -rf .venv
    echo "no Python 3.10 found: install it (python3.10 of your system's packages, pyenv install 3.10) or uv (pip install uv)" >&2
    exit 1
}

if ! is_python_310 .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    make_venv
fi
for requirements in "$@"; do
    installed=".venv/installed-$(echo "$requirements" | tr / -)"
    cmp -s "$requirements" "$installed" && continue
    .venv/bin/python -m pip install -q --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$installed"
done
