#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, without network, inside 9 minutes:
#
#     bash bench/gpu_check.sh
#
# builds the CUDA library, runs the tests marked gpu (gradients among them) with each backend and
# some with the default, checks both with compute-sanitizer on small shapes, and runs the
# benchmarks. The backends' tests and checks run side by side; the benchmarks run alone. A stage
# that fails is noted and the others still run. Leaves gpu_<device>_<date>.json, written anew after
# every stage, and the log beside it, in $OUT (default bench/results). Exits with 1 if a stage
# failed.
#
# Needs python3 (or $PYTHON) with a CUDA build of torch, setuptools, pytest, pytest-benchmark,
# hypothesis, the package's own dependencies, nvcc, and compute-sanitizer. With pytest-xdist the
# tests are faster.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
limit=530 # seconds, for all stages together
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))') || {
  echo "gpu_check: $python has no torch that sees a CUDA device" >&2
  exit 1
}
name=gpu_$(tr -cs '[:alnum:]' _ <<<"${device,,}" | sed 's/_*$//')_$(date -u +%F)
mkdir -p "$out"

# report: the stages so far, and the benchmarks once there are some, as one JSON.
report() {
  "$python" - "$scratch" "$out/$name.json" "$device" <<'PYTHON'
import datetime, json, os, pathlib, sys

scratch, target, device = sys.argv[1:]
stages = []
for file in sorted(pathlib.Path(scratch, "stages").iterdir()):
    stage, code, seconds = file.read_text().strip().split("\t")
    outcome = {0: "passed", 124: "ran out of time", 137: "ran out of time"}.get(int(code), "failed")
    stages.append({"stage": stage, "outcome": outcome, "exit": int(code), "seconds": int(seconds)})
found = {
    "command": "bash bench/gpu_check.sh",
    "device": device,
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "passed": all(stage["exit"] == 0 for stage in stages),
    "stages": stages,
}
benchmarks, steps = (pathlib.Path(scratch, f"{name}.json") for name in ("bench", "steps"))
if benchmarks.exists():
    found |= {k: v for k, v in json.loads(benchmarks.read_text()).items() if k not in found}
if steps.exists():
    found["steps"] = json.loads(steps.read_text())["runs"]
pathlib.Path(target + ".new").write_text(json.dumps(found, indent=2) + "\n")
os.replace(target + ".new", target)
PYTHON
}

# run NUMBER NAME SECONDS COMMAND...: run it within its seconds and those left of all.
run() {
  local number=$1 title=$2 seconds=$3 start=$SECONDS code
  shift 3
  if ((seconds > limit - SECONDS)); then seconds=$((limit - SECONDS)); fi
  echo "=== $title"
  if ((seconds > 0)); then
    # Every line says whose it is: stages may run side by side.
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | sed -u "s/^/$title: /"
    code=$?
  else
    code=124
  fi
  echo "=== $title: exit $code after $((SECONDS - start)) s"
  printf '%s\t%s\t%s\n' "$title" "$code" "$((SECONDS - start))" >"$scratch/stages/$number"
}

# stage NAME SECONDS COMMAND...: a stage alone.
stage() {
  stages=$((stages + 1))
  run "$stages" "$@"
  report
}

# beside NAME SECONDS COMMAND...: a stage beside those that began since the last "together".
beside() {
  stages=$((stages + 1))
  run "$stages" "$@" &
}

# together: wait for them.
together() {
  wait
  report
}

about() {
  nvidia-smi
  nvcc --version
  "$python" -VV
  "$python" -m pip list
  git log -1 --format=%H
}

# sanitize TOOL BACKEND TESTS
sanitize() {
  # Without torch's caching allocator every tensor has bounds of its own.
  beside "$1, $2" 60 env STEM_FAST_BACKEND="$2" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest tests/ops -x -W default -m gpu -k "$3"
}

check() {
  local stages=10 backend workers=() # numbers of two digits: their names are in order
  mkdir "$scratch/stages"
  about
  # For this device alone: other architectures only take time here.
  export TORCH_CUDA_ARCH_LIST
  TORCH_CUDA_ARCH_LIST=$("$python" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability(0))')
  # pytest-benchmark, which no test of these needs, warns beside xdist.
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6 -p no:benchmark); fi
  stage build 150 "$python" -m pip install --no-index --no-build-isolation --no-deps -v -e .
  for backend in triton cuda; do
    beside "tests, $backend" 190 env STEM_FAST_BACKEND="$backend" \
      "$python" -m pytest tests -W default -m gpu --durations=5 "${workers[@]}"
  done
  # What users get is some of either.
  beside "tests, default" 190 env -u STEM_FAST_BACKEND \
    "$python" -m pytest tests/test_step.py tests/test_inference.py tests/test_model.py \
    -W default -m gpu
  together
  for backend in triton cuda; do
    sanitize memcheck "$backend" "odd and (float32 or bfloat16 or opcheck)"
  done
  together
  stage steps 100 "$python" -m bench.run --device cuda --seconds 0.2 --threads "$(nproc)" \
    --runs default cuda --settings tall --blocks 1 \
    --ops embedding_step embedding_step_l2 adam_rows catch_up_l2 --json "$scratch/steps.json"
  stage benchmarks 240 "$python" -m bench.run --device cuda --seconds 0.1 --threads "$(nproc)" \
    --runs triton cuda --json "$scratch/bench.json"
  # Slow, and so with what time is left.
  for backend in triton cuda; do sanitize racecheck "$backend" "odd and float32"; done
  together
  awk -F '\t' '$2 != 0 { failed = 1 } END { exit failed }' "$scratch"/stages/*
}

check 2>&1 | tee "$out/$name.log"
exit "${PIPESTATUS[0]}"
