#!/usr/bin/env bash
# The whole pipeline on real text and on this machine; `make demo` runs it. What it runs are the commands of the README's quick
# start, each shown before it runs. About 5 minutes at most on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

run() {
  if [[ -t 1 ]]; then printf '\n\033[1m$ %s\033[0m\n' "$1"; else printf '\n$ %s\n' "$1"; fi
  eval "$1"
}

mapfile -t commands < <(sed -n '/^<!-- quick start/,/^<!-- end/s/^    //p' README.md)
run 'rm -rf demo-data demo-export runs/demo'
for command in "${commands[@]}"; do
  run "$command"
done
printf '\n# done in %s s: the run is in runs/demo (metrics.jsonl, events.jsonl, checkpoints, tensorboard)\n' "$SECONDS"
