#!/usr/bin/env bash
# Builds the wheel of the Python package, installs it into a fresh virtual environment and runs its tests there.
#
#   scripts/test-python.sh            numpy only: the tests of floe.transformers say that they are skipped
#   FLOE_TORCH_SITE=FOLDER scripts/test-python.sh    with the torch and transformers in a site-packages folder
#
# Needs Rust, Python 3.10 or later with venv, and a package index (maturin, numpy, pytest). FLOE_PYTHON picks the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

MAX_WHEEL_MB=15
suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
python=
for candidate in ${FLOE_PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if suitable "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
    echo "test-python.sh: no Python of at least 3.10 with the modules venv and ensurepip was found" >&2
    exit 1
fi

out=$PWD/target/python-test
rm -rf "$out" && mkdir -p "$out"
"$python" -m venv "$out/build"
"$out/build/bin/pip" install --quiet --disable-pip-version-check 'maturin>=1.9,<2'
(cd python && "$out/build/bin/maturin" build --release --quiet --interpreter "$python" --out "$out/wheel" ${FLOE_WHEEL_FLAGS:-})
wheel=$(ls "$out"/wheel/*.whl)
bytes=$(stat -c %s "$wheel")
echo "$(basename "$wheel"): $((bytes / 1000)) kB"
if [ "$bytes" -gt $((MAX_WHEEL_MB * 1000000)) ]; then
    echo "test-python.sh: the wheel is larger than $MAX_WHEEL_MB MB" >&2
    exit 1
fi

"$python" -m venv "$out/fresh"
"$out/fresh/bin/pip" install --quiet --disable-pip-version-check "$wheel" 'pytest>=8'
if [ -n "${FLOE_TORCH_SITE:-}" ]; then
    echo "$FLOE_TORCH_SITE" >"$("$out/fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
fi
# From another folder, so that the installed package is tested and not the sources.
cd "$out" && fresh/bin/python -m pytest -q -rs -p no:cacheprovider --rootdir "$OLDPWD/python" "$OLDPWD/python/tests"
