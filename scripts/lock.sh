#!/usr/bin/env bash
# Resolve requirements.lock from pyproject.toml: base, data, rl and dev, pinned, without the address of any index.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
uv=$(command -v uv || echo "$venv/bin/uv")
cp requirements.lock requirements.lock.new  # pins stay unless pyproject.toml asks for others; delete the file to move all of them
UV_PYTHON_DOWNLOADS=never "$uv" pip compile --quiet --python "$venv/bin/python" --extra data --extra rl --extra dev --no-header \
  --output-file requirements.lock.new pyproject.toml
{ echo "# Resolved from pyproject.toml (base, data, rl and dev) by \`make lock\`; do not edit."; cat requirements.lock.new; } > requirements.lock
rm requirements.lock.new
