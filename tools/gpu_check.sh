#!/usr/bin/env bash
# What only shows on a machine with a GPU, in parts that are cut after nine minutes each; text and JSON in $OUT (default: gpu-check).
#
#   tools/gpu_check.sh [PART...]        tests | step | reshard | savings | all; default: all, which is the first three
#   tools/gpu_check.sh step 1.7b        of step one shape alone: 360m or 1.7b
#   tools/gpu_check.sh wheels [3.12]    where there is an index: what the GPU's machine may lack, for its Python, into .whl/
#
# tests    pytest -m gpu
# step     bench step of SmolLM-360M and -1.7B against transformers, bf16, context 2048, compiled, each contender in a process
#          of its own. 8 and 4 samples: megaloop plan's memory says 29 and 53 GiB for ours without recomputation; transformers'
#          loop rests at 5 and 22 GiB, and its activations are a little larger than ours
# reshard  bench reshard of SmolLM-1.7B from 20 to 24 layers: old state 19 GiB, new engine 32 GiB
# savings  bench savings --preset gpu for eight minutes; ends with exit code 75 until it is done: call it again. Its data
#          (runs/savings-gpu/data) can be prepared elsewhere
#
# Where .whl/ has wheels, they are installed beside, not over, what is there, and found first. They must be for that machine's
# Python, and torch, triton and numpy are never among them.
#
# Exit codes: 0 all is well; 1 a part failed; 2 no GPU, or a wrong argument; 75 savings is not done.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT="${OUT:-gpu-check}"
PYTHON="${PYTHON:-python3}"
MINUTES=9 # of a part, at most

# in constraints.txt's versions; deepspeed is the only one without a wheel on the index, and is built
WHEELS=(
  mosaicml-streaming spmd_types sentencepiece xxhash zstandard safetensors pydantic pydantic_core annotated-types
  typing-inspection typing_extensions PyYAML rich markdown-it-py mdurl Pygments typer click shellingham annotated-doc
  transformers tokenizers huggingface_hub regex requests urllib3 idna certifi charset-normalizer filelock fsspec packaging
  tqdm hjson msgpack py-cpuinfo psutil einops ninja brotli catalogue cramjam python-snappy zstd Jinja2 MarkupSafe pytest
  iniconfig pluggy tensorboard tensorboard-data-server absl-py grpcio Markdown protobuf Werkzeug
)

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

refuse() {
  echo "gpu_check: $1" >&2
  exit 2
}

wheels() {
  local version="${1:-3.11}" name pinned
  [[ "$version" =~ ^3\.[0-9]+$ ]] || refuse "$version is no version of Python; give one such as 3.12"
  mkdir -p .whl
  for name in "${WHEELS[@]}"; do
    pinned="$(grep -i "^${name//[-_]/[-_]}==" constraints.txt)"
    # not every version has a wheel for every Python
    download "$version" "$pinned" || download "$version" "$name" || exit 1
  done
  pinned="$(grep '^deepspeed==' constraints.txt)"
  "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .whl "$pinned" || exit 1
  du -sh .whl
}

download() {
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$1" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux_2_12_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --dest .whl "$2"
}

machine() {
  {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    cc --version 2>&1 | head -1 # torch.compile and Triton need one
    nvcc --version 2>&1 | tail -1
    "$PYTHON" - <<'END'
import importlib.metadata as metadata
import sys

print("python", sys.version.split()[0])
for name in ("torch", "triton", "deepspeed", "transformers", "numpy", "flash_attn", "apex"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is missing")
END
  } | tee "$OUT/machine.txt"
}

limited() {
  local left=$((part_end - SECONDS))
  [ "$left" -gt 0 ] || return 124 # and 0 would be no limit to timeout
  timeout "$left" "$PYTHON" -m "$@"
}

tests() { limited pytest -q -m gpu tests/gpu 2>&1 | tee "$OUT/tests.txt"; }

step() {
  local shape batch failed=0
  for shape in "$@"; do
    batch=$([ "$shape" = 360m ] && echo 8 || echo 4)
    echo "== bench step $shape"
    limited megaloop bench step --shape "$shape" --precision bf16 --sequence-length 2048 --batch "$batch" --steps 10 \
      --rounds 4 --compile --apart --json | tee "$OUT/step-$shape.json" || failed=1
  done
  return "$failed"
}

reshard() {
  echo "== bench reshard 1.7b, 20 to 24 layers"
  limited megaloop bench reshard configs/smollm_1_7b_lidas.yaml --ranks 1 --rounds 2 --no-restart --json \
    train.global_batch=4 train.micro_batch=1 train.compile=false | tee "$OUT/reshard-1.7b.json"
}

savings() {
  limited megaloop bench savings --preset gpu --contenders baseline,baseline-matched,lidas --seeds 3 --minutes 8 \
    --examples 1000 --shots 0,1,2,5 --out runs/savings-gpu --json | tee "$OUT/savings.json"
  local status=$?
  cp runs/savings-gpu/report.html "$OUT" 2>/dev/null
  return "$status"
}

parts=()
shapes=()
if [ "${1:-}" = wheels ]; then
  wheels "${2:-}"
  exit
fi
for argument in "${@:-all}"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    all) parts+=(tests step reshard) ;;
    tests | step | reshard | savings) parts+=("$argument") ;;
    360m | 1.7b) shapes+=("$argument") ;;
    *) refuse "unknown part $argument; choose from tests, step [360m | 1.7b], reshard, savings, all, wheels" ;;
  esac
done
[ "${#parts[@]}" -gt 0 ] || parts=(step)
[ "${#shapes[@]}" -gt 0 ] || shapes=(360m 1.7b)
nvidia-smi >/dev/null 2>&1 || refuse "there is no GPU here (nvidia-smi finds none); run it on a machine that has one"

mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.whl/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target /tmp/megaloop-site .whl/*.whl || exit 1
  export PYTHONPATH="/tmp/megaloop-site:$PYTHONPATH"
fi
machine
status=0
for part in "${parts[@]}"; do
  part_end=$((SECONDS + 60 * MINUTES))
  if [ "$part" = step ]; then step "${shapes[@]}"; else "$part"; fi
  code=$?
  if [ "$code" -eq 75 ]; then status=75; elif [ "$code" -ne 0 ]; then status=1; fi
done
exit "$status"
