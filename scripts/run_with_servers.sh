#!/usr/bin/env bash
# The experiment with trainings on this machine's GPUs and sampling on vLLM servers of another: what skypilot/two-nodes.yaml runs.
#
#   SERVER=10.0.0.2 GPUS=8 scripts/run_with_servers.sh RECIPE
#
# SERVER answers on ports 8000 to 8000+GPUS-1 and takes adapters at run time (docs/scale.md); it must be reachable by ssh.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=$1
run=runs/$(.venv/bin/python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["name"])' "$recipe")
urls=$(for gpu in $(seq 0 $((GPUS - 1))); do printf '"http://%s:%s/v1",' "$SERVER" $((8000 + gpu)); done)
options=(--set processes.profile=ddp --set "processes.count=$GPUS"
  --set sample.engine.kind=endpoint --set sample.engine.server=vllm --set "sample.engine.urls=[${urls%,}]")
serve() {  # one model of the run, exported as one adapter, to every server
  .venv/bin/suasion export "$run" "$1" --to "served/$1"
  ssh -o StrictHostKeyChecking=accept-new "$SERVER" mkdir -p served
  scp -qr "served/$1" "$SERVER:served/"
  folder=$(ssh "$SERVER" pwd)/served/$1
  for gpu in $(seq 0 $((GPUS - 1))); do
    curl -sf --retry 60 --retry-delay 10 --retry-connrefused "http://$SERVER:$((8000 + gpu))/v1/load_lora_adapter" \
      -H 'Content-Type: application/json' -d "{\"lora_name\": \"$1\", \"lora_path\": \"$folder\"}" > /dev/null
  done
}
.venv/bin/suasion run "$recipe" "${options[@]}" --until sft
serve sft
arms=$(.venv/bin/python -c 'import sys, yaml; print(*[arm["name"] for arm in yaml.safe_load(open(sys.argv[1]))["dpo"]])' "$recipe")
last=${arms##* }
.venv/bin/suasion run "$recipe" "${options[@]}" --until "dpo-$last"
for arm in $arms; do serve "$arm"; done
.venv/bin/suasion run "$recipe" "${options[@]}"
