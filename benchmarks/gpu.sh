#!/usr/bin/env bash
# One run of at most 8 minutes on one GPU: it proves that the GPU computes what the CPU does, then measures.
#
#   bash benchmarks/gpu.sh wheels   prints the command that fetches into build/wheels what the GPU's python may lack
#   bash benchmarks/gpu.sh          uses what lies there, without dependencies or index; runs the GPU tests that are
#                                   not slow, and only if they pass the measurements, the most important first
#
# Rows are appended to benchmarks/results; new ones, and the log of the proof, also go to $OUT (default: build/gpu).
# Variables: PYTHON, the python that holds torch; PYTHON_VERSION, its version, for the wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET=470
PROOF=210
WHEELS=build/wheels

# What the package and DeepSpeed import at the start, but for torch, transformers, peft and what these need themselves.
BINARY=(datasets dill multiprocess xxhash jsonargparse docstring_parser typeshed_client openpyxl et_xmlfile nvidia-ml-py
  rich hjson msgpack ninja py-cpuinfo pydantic pydantic_core annotated-types typing-inspection)
SOURCE=(deepspeed)

pinned() { # NAME ...: NAME==VERSION of each
  local name
  for name in "$@"; do
    grep -E "^$name==" constraints.txt || { echo "constraints.txt has no $name" >&2; return 1; }
  done | tr '\n' ' '
}

wheels() {
  local binary source
  binary=$(pinned "${BINARY[@]}")
  source=$(pinned "${SOURCE[@]}")
  cat <<END
python3 -m pip download --no-deps --only-binary=:all: --implementation cp --python-version ${PYTHON_VERSION:-3.12} \\
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
  --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 -d $WHEELS $binary && \\
python3 -m pip wheel --no-deps --no-build-isolation -w $WHEELS $source
END
}

measure() { # SECONDS COMMAND ...: run it for at most so long; if it fails or too little time is left, say so and go on
  local most=$1 left=$((BUDGET - SECONDS)) status=0
  shift
  if ((left < 30)); then
    echo "skipped, $left s are left: $*"
    return
  fi
  ((most < left)) || most=$left
  echo "at $SECONDS s, for at most $most s: $*"
  timeout --kill-after=5 "$most" "$@" || status=$?
  case $status in
    0) ;;
    124 | 137) echo "stopped after $most s: $*" ;;
    *) echo "failed with $status: $*" ;;
  esac
}

keep_rows() { # the rows that this run has added
  local file
  for file in benchmarks/results/*.jsonl; do
    tail -n "+$(($(cat "$before/${file##*/}" 2>/dev/null | wc -l) + 1))" "$file" >"$OUT/${file##*/}"
    [ -s "$OUT/${file##*/}" ] || rm "$OUT/${file##*/}"
  done
}

if [ "${1:-}" = wheels ]; then
  wheels
  exit
fi
[ $# -eq 0 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

OUT=${OUT:-build/gpu}
before=$(mktemp -d)
mkdir -p "$OUT"
cp benchmarks/results/*.jsonl "$before"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  PYTHONPATH=$PYTHONPATH:$site
else
  echo "no wheels in $WHEELS"
fi
"$PYTHON" -c 'import deepspeed' 2>"$OUT/deepspeed.txt" || echo "without DeepSpeed ($OUT/deepspeed.txt): ZeRO is skipped"
trap keep_rows EXIT

timeout --kill-after=5 "$PROOF" "$PYTHON" -m pytest tests/gpu -m 'gpu and not slow' -q --durations=10 2>&1 |
  tee "$OUT/proof.txt" || { echo "not proved after $SECONDS s (at most $PROOF): nothing is measured"; exit 1; }
grep -Eq '[0-9]+ passed' "$OUT/proof.txt" || { echo "no GPU test ran"; exit 1; }
echo "proved after $SECONDS s"

model=build/Phi-2 # random weights
[ -e "$model" ] || measure 90 "$PYTHON" -c 'import sys; from pathlib import Path; sys.path.insert(0, "benchmarks"); import models
from colm_scale.config import ModelConfig
from colm_scale.modeling.load import load_tokenizer
models.write(models.CONFIGS["Phi-2"], Path(sys.argv[1]), load_tokenizer(ModelConfig()))' "$model"
measure 150 "$PYTHON" benchmarks/memory.py measure --gpu --ranks 1 --engine DDP -- --model.name "$model" \
  --train.dtype bfloat16
measure 120 "$PYTHON" benchmarks/step_time.py --cut 1 --models Phi-2 --arms last_layer stratified --rounds 3 -- \
  --train.dtype bfloat16 --train.micro_batch_tokens 8192
if "$PYTHON" -c 'import deepspeed' 2>/dev/null; then
  measure 90 "$PYTHON" benchmarks/runs.py gpu-default --processes 1 --seeds 0 --methods colm -- --eval.generate 0
else # no row, but its lines
  measure 90 "$PYTHON" launchers/train.py --eval.generate 0 --output_dir "$before/default"
  cp "$before/default/metrics.jsonl" "$OUT/default.jsonl" 2>/dev/null || true
fi
echo "ended after $SECONDS s"
