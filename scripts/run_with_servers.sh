#!/usr/bin/env bash
# The experiment with trainings on this machine's GPUs and sampling on vLLM servers of another: what skypilot/two-nodes.yaml runs.
#
#   SERVER=10.0.0.2 GPUS=8 scripts/run_with_servers.sh RECIPE
#
# SERVER answers on ports 8000 to 8000+GPUS-1 and takes adapters at run time (docs/scale.md); it must be reachable by ssh, with the key in
# SSH_KEY where that is not the usual one. COPIES: a folder that outlives this machine; what it has of the run is taken from there first, and the
# run is copied there every minute. Ends with the run's own exit code: 3 where people have labels to give. Run again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=$1
name=$(.venv/bin/python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["name"])' "$recipe")
run=runs/$name
urls=$(for gpu in $(seq 0 $((GPUS - 1))); do printf '"http://%s:%s/v1",' "$SERVER" $((8000 + gpu)); done)
options=(--set sample.engine.kind=endpoint --set sample.engine.server=vllm --set "sample.engine.urls=[${urls%,}]")
[ "$GPUS" -lt 2 ] || options+=(--set processes.profile=ddp --set "processes.count=$GPUS")
ssh=(-o StrictHostKeyChecking=accept-new ${SSH_KEY:+-i "$SSH_KEY"})
run() {  # 3: waiting for people; the arms that need none are finished all the same
  local code=0
  .venv/bin/suasion run "$recipe" "${options[@]}" "$@" || code=$?
  [ "$code" = 0 ] || [ "$code" = 3 ] || exit "$code"
}
ask() {  # one request to one server
  curl -sf --retry 60 --retry-delay 10 --retry-connrefused "http://$SERVER:$1/v1/$2" -H 'Content-Type: application/json' -d "$3" > /dev/null
}
serve() {  # one model of the run, exported as one adapter, to every server; one of that name from before gives way
  rm -rf "served/$1"
  .venv/bin/suasion export "$run" "$1" --to "served/$1"
  ssh "${ssh[@]}" "$SERVER" "mkdir -p served && rm -rf 'served/$1'"
  scp "${ssh[@]}" -qr "served/$1" "$SERVER:served/"
  folder=$(ssh "${ssh[@]}" "$SERVER" pwd)/served/$1
  for gpu in $(seq 0 $((GPUS - 1))); do
    curl -s "http://$SERVER:$((8000 + gpu))/v1/unload_lora_adapter" -H 'Content-Type: application/json' -d "{\"lora_name\": \"$1\"}" > /dev/null || true
    ask $((8000 + gpu)) load_lora_adapter "{\"lora_name\": \"$1\", \"lora_path\": \"$folder\"}"
  done
}
if [ -n "${COPIES:-}" ]; then
  scripts/copies.sh take "$COPIES/$name" "$run"
  # It ends with this script however that ends, and has none of its output, whose reader would wait for a last `sleep`.
  ( while sleep "${COPY_SECONDS:-60}" && kill -0 $$; do scripts/copies.sh keep "$run" "$COPIES/$name" || true; done ) > /dev/null 2>&1 &
  trap 'kill '$!' 2> /dev/null || true; scripts/copies.sh keep "$run" "$COPIES/$name" || echo "the last copy to $COPIES failed" >&2' EXIT
fi
run --until sft
serve sft
arms=$(.venv/bin/python -c 'import sys, yaml; print(*[arm["name"] for arm in yaml.safe_load(open(sys.argv[1]))["dpo"]])' "$recipe")
run --until "dpo-${arms##* }"
for arm in $arms; do [ ! -f "$run/08-dpo-$arm/manifest.json" ] || serve "$arm"; done
.venv/bin/suasion run "$recipe" "${options[@]}"
