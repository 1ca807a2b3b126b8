#!/usr/bin/env bash
# The plain-shell way, for people who stand on a rented machine already (a g5.xlarge with AWS's deep-learning image, say):
# set-up with the packages that the recipe needs (4 bits, a tracker), checks of driver and disk, and the run, which survives a lost connection.
#
#   scripts/run_sft_aws.sh [RECIPE] [suasion run's own options]
#
# RECIPE: recipes/persuasion-rl.yaml if not said. Everything after it goes to `suasion run`: --until sft stops after SFT.
# Environment: WANDB_API_KEY (with --set sft.report_to=wandb; trackio needs none), HF_TOKEN for gated models, SUASION_ENV for an environment that is
# there already, SUASION_FOREGROUND=1 to stay with the run. No key is written anywhere.
# The machine is NOT ended at the end: do that yourself (sudo shutdown -h now), or use `suasion launch`, which does.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:-recipes/persuasion-rl.yaml}
[ $# -eq 0 ] || shift
fail() { echo "error: $*" >&2; exit 1; }
[ -f "$recipe" ] || fail "no recipe at $recipe. Shipped ones: $(ls recipes | tr '\n' ' ')"

tracker=
for name in wandb trackio; do
  if [[ " $* " == *"report_to=$name"* ]] || grep -q "report_to: *$name" "$recipe"; then tracker=$name; fi
done
[ "$tracker" != wandb ] || [ -n "${WANDB_API_KEY:-}${WANDB_MODE:-}" ] ||
  fail "report_to wandb needs WANDB_API_KEY in the environment (https://wandb.ai/authorize), or WANDB_MODE=offline."

changes=()   # what is set here can need other packages
last=
for word in "$@"; do
  if [ "$last" = --set ]; then changes+=(--set "$word"); elif [[ "$word" == --set=* ]]; then changes+=(--set "${word#--set=}"); fi
  last=$word
done

echo "== set-up"
scripts/setup_env.sh --recipe "$recipe" ${changes[@]+"${changes[@]}"}
echo "== checks"
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv
  used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | sort -n | tail -1)
  [ "$used" -lt 2000 ] || echo "warning: $used MiB of a GPU are in use already: nvidia-smi shows by whom"
else
  echo "no NVIDIA GPU: the run computes on the CPU"
fi
free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
echo "$free GB of disk free"
[ "$free" -ge 2 ] || fail "$free GB free here; a run needs at least 2 GB. Free some first."

echo "== run"
mkdir -p logs
name=$(.venv/bin/python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["name"])' "$recipe")
log=logs/$name.log
if [ "${SUASION_FOREGROUND:-0}" = 1 ]; then
  .venv/bin/suasion run "$recipe" "$@" 2>&1 | tee -a "$log"
  exit "${PIPESTATUS[0]}"
fi
set -m   # without job control a shell starts background processes deaf to SIGINT, and `kill -INT` below would do nothing
nohup .venv/bin/suasion run "$recipe" "$@" >> "$log" 2>&1 &
echo "running as process $!; it goes on when you log out"
echo "watch: tail -f $log        state: .venv/bin/suasion status runs/$name        stop: kill -INT $!"
echo "run this command again after any end: finished stages are skipped, an interrupted one resumes"
