#!/usr/bin/env bash
# Make the environment FOLDER (default .venv) from requirements.lock, with quarry installed in it as an editable package.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
version=$(cat .python-version)
export UV_PYTHON_DOWNLOADS=never
# --no-deps: the lock is complete, and one package of it must come without what it names (scripts/lock.sh).

if command -v uv >/dev/null 2>&1; then
  [ -x "$venv/bin/python" ] || uv venv --quiet --python "$version" "$venv"
  uv pip install --quiet --python "$venv/bin/python" --no-deps -r requirements.lock
  uv pip install --quiet --python "$venv/bin/python" --no-deps -e .
else
  if [ ! -x "$venv/bin/python" ]; then
    python=$(command -v "python$version" || true)
    if [ -z "$python" ] || ! "$python" -c '' 2>/dev/null; then
      echo "error: Quarry needs Python $version; neither uv nor a working python$version is on the PATH" >&2
      exit 1
    fi
    "$python" -m venv "$venv"
  fi
  install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps "$@"; }
  # Two at a time, because pip unpacks on one core: torch, its compiler and its libraries are most of the bytes, and share no file with the
  # rest. Both end before an error is one.
  large='^(nvidia-.*|torch|triton)=='
  grep -E "$large" requirements.lock | install -r /dev/stdin &
  first=$! failed=
  grep -vE "$large" requirements.lock | install -r /dev/stdin || failed=yes
  wait "$first" || failed=yes
  [ -z "$failed" ] || { echo "error: pip could not install requirements.lock, see above" >&2; exit 1; }
  install --no-build-isolation -e .
fi
# Byte code now, on all cores, instead of during the first run; but for what is rarely or never imported. Some packages ship templates
# that are no Python: those do not matter.
"$venv/bin/python" -m compileall -q -j 0 -x '/transformers/models/|/torch/testing/|/tests?/|/nvidia/|/leptonai/' "$venv/lib" >/dev/null 2>&1 || true
echo "environment ready: $venv ($("$venv/bin/python" --version))"
