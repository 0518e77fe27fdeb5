#!/usr/bin/env bash
# All that needs a GPU, in one go: the GPU tests, then the benchmarks in full. Rows go to benchmarks/results.
#
#   bash benchmarks/gpu.sh [WHEEL ...]      wheels (DeepSpeed's, say) are installed first, without dependencies
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 0 ] || python -m pip install --no-deps --no-index "$@"
gpus=$(nvidia-smi --list-gpus | grep -c '^GPU')
python -m pytest -m gpu
python benchmarks/runs.py gpu-default --processes "$gpus" --seeds 0 1 2
python benchmarks/runs.py gpu-cost --processes "$gpus" --seeds 0 -- --profile.floor_every 2 --eval.generate 0
python benchmarks/engines.py --processes "$gpus" --dtypes float32 bfloat16 float16
python benchmarks/selection_speed.py --device cuda --shares
python benchmarks/step_time.py --cut 1 --models Phi-2 Phi-3-mini StableLM-Zephyr-3B Llama-3-8B -- \
  --train.dtype bfloat16 --train.micro_batch_tokens 8192
python benchmarks/step_time.py --compile --cut 1 --models Phi-2 --arms last_layer stratified -- \
  --train.dtype bfloat16 --train.micro_batch_tokens 8192
python benchmarks/memory.py measure --gpu --ranks "$gpus" -- --train.dtype bfloat16
if python -c 'import trl' 2>/dev/null; then python benchmarks/against_trl.py -- --train.dtype bfloat16; fi
