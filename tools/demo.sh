#!/usr/bin/env bash
# The whole pipeline on real text and on this machine; `make demo` runs it. Each command is shown before it runs, as
# you would type it yourself. About 5 minutes at most on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

bold() { if [[ -t 1 ]]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi; }
run() {
  local line='$' word
  for word in "$@"; do
    if [[ $word =~ [^A-Za-z0-9_./=,:@+-] ]]; then line+=" '$word'"; else line+=" $word"; fi
  done
  bold "$line"
  "$@"
}

PROMPT='And the LORD said unto'

run rm -rf demo-data demo-export runs/demo
run python -m data_prep.demo demo-data/kjv.jsonl
run megaloop prep demo-data/kjv.jsonl --out demo-data/shards --vocab-size 4096 --sequence-length 256 --validation-fraction 0.02
run megaloop plan configs/demo.yaml
run megaloop train configs/demo.yaml --stop-at 40
run megaloop train configs/demo.yaml --resume parallel.pp=1 parallel.dp=2 # the rest on another topology, growth included
run megaloop export runs/demo --out demo-export
run megaloop generate runs/demo --prompt "$PROMPT" --max-tokens 48 --temperature 0.7 --top-p 0.9
run megaloop generate runs/demo --prompt "$PROMPT" --max-tokens 32 --greedy
run megaloop generate runs/demo --prompt "$PROMPT" --max-tokens 32 --greedy --depth 4-4x2-4 # the middle block twice

bold '# the same through transformers'
run python -c "
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('demo-export')
model = AutoModelForCausalLM.from_pretrained('demo-export')
prompt = tokenizer('$PROMPT', return_tensors='pt')
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32, do_sample=False)[0], skip_special_tokens=True))"

bold "# done in $SECONDS s: the run is in runs/demo (metrics.jsonl, events.jsonl, checkpoints, tensorboard)"
