#!/usr/bin/env bash
# On a host with an NVIDIA GPU and Transformer Engine: the tests of tests/gpu, then the benchmark of training on one GPU.
#
#   scripts/gpu_checks.sh OUT [SUITE...]       # SUITE: whole (the bars, default), stacks, peers, memory, all
#
# OUT gets tests.log, bench/ and bench.tgz (the whole of it). Settings: PYTHON (python3), TEST_SECONDS (400), MINUTES (60) of the benchmark,
# ARGUMENTS for the benchmark (--profile, --only REGEX). Fails if a test or a case fails; the benchmark runs either way.
# Unproven on hardware so far.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_checks.sh OUT [SUITE...]}
shift
suites=("${@:-whole}")
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,power.limit --format=csv,noheader || exit 1
"$python" -c 'import torch, transformer_engine.pytorch, megatron.core; print(torch.__version__, torch.cuda.get_device_name())' || exit 1

# A file per process: their stages share the GPU, and start-up is most of their time.
timeout "${TEST_SECONDS:-400}" "$python" -W ignore -m pytest tests/gpu -q -n 4 --dist loadfile -p no:cacheprovider --durations=10 \
  >"$out/tests.log" 2>&1
tests=$?
tail -n 40 "$out/tests.log"

# shellcheck disable=SC2086  # several words on purpose
"$python" -W ignore -m benchmarks.train_gpu --suite "${suites[@]}" --minutes "${MINUTES:-60}" --output "$out/bench" ${ARGUMENTS:-}
bench=$?
tar -czf "$out/bench.tgz" -C "$out" bench
echo "tests ended with $tests, the benchmark with $bench"
exit $((tests != 0 || bench != 0))
