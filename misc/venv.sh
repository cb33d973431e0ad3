# shellcheck shell=bash
# Sourced by demo.sh, test.sh and benchmark.sh: makes $venv with a Python, and installs what the given files require.
# Usage: [PYTHON_VERSION=3.10] . misc/venv.sh REQUIREMENTS_FILE...    # else the newest of 3.12, 3.11 and 3.10

versions=${PYTHON_VERSION:-3.12 3.11 3.10}
venv=.venv${PYTHON_VERSION:+-$PYTHON_VERSION}

has_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] not in '$2'.split())" 2>/dev/null; }

make_venv() {
    for version in $versions; do
        for python in "python$version" python3 python; do
            # pyenv's commands find what is not its global version only where that is named.
            if PYENV_VERSION=$version has_version "$python" "$version"; then
                PYENV_VERSION=$version "$python" -m venv "$venv"
                return
            fi
        done
    done
    # Without such a Python at hand uv brings one, and any Python brings uv.
    if ! command -v uv >/dev/null; then
        if python3 -m venv "$venv/uv" >/dev/null; then
            "$venv/uv/bin/pip" install -q uv || true
        fi
        PATH="$PWD/$venv/uv/bin:$PATH"
    fi
    uv venv -q --seed --allow-existing --python "${versions%% *}" "$venv" && return
    rm -rf "$venv"
    echo "no Python $versions found: install one (python3.12 of your system's packages, pyenv) or uv (pip install uv)" >&2
    exit 1
}

if ! has_version "$venv/bin/python" "$versions" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    make_venv
fi
for requirements in "$@"; do
    installed="$venv/installed-$(echo "$requirements" | tr / -)"
    cmp -s "$requirements" "$installed" && continue
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$installed"
done
