#!/usr/bin/env bash
# One round on a machine with a GPU: the GPU tests, the step benchmarks of SmolLM-360M and -1.7B, and a growth in flight of
# SmolLM-1.7B from 20 to 24 layers; as text and as JSON in $OUT.
# `tools/gpu_check.sh savings` instead trains the contenders of `megaloop bench savings --preset gpu` for eight minutes and ends with exit code 75
# until they are done: call it again. Its data (runs/savings-gpu/data) can be prepared elsewhere.
# Where DeepSpeed and the rest are not installed there, put their wheels into .whl/: they are installed beside, not over, what is there.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-gpu-check}"
mkdir -p "$OUT"
if compgen -G '.whl/*.whl' >/dev/null; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target /tmp/megaloop-site .whl/*.whl || exit 1
  export PYTHONPATH="/tmp/megaloop-site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader | tee "$OUT/machine.txt"
if [ "${1:-}" = savings ]; then
  python3 -m megaloop bench savings --preset gpu --contenders baseline,baseline-matched,lidas --seeds 3 --minutes 8 --examples 1000 \
    --shots 0,1,2,5 --out runs/savings-gpu --json | tee "$OUT/savings.json"
  status=${PIPESTATUS[0]}
  cp runs/savings-gpu/report.html "$OUT" 2>/dev/null
  exit "$status"
fi
status=0
python3 -m pytest -q -m gpu tests/gpu 2>&1 | tee "$OUT/tests.txt" || status=1
for shape in 360m 1.7b; do
  batch=$([ "$shape" = 360m ] && echo 16 || echo 8)
  echo "== bench step $shape"
  python3 -m megaloop bench step --shape "$shape" --precision bf16 --sequence-length 2048 --batch "$batch" \
    --steps 5 --rounds 4 --compile --json | tee "$OUT/step-$shape.json" || status=1
done
echo "== bench reshard 1.7b, 20 to 24 layers"
python3 -m megaloop bench reshard configs/smollm_1_7b_lidas.yaml --ranks 1 --rounds 2 --no-restart --json \
  train.global_batch=4 train.micro_batch=1 train.compile=false | tee "$OUT/reshard-1.7b.json" || status=1
exit $status
