#!/usr/bin/env bash
# Validates skypilot/*.yaml without a cloud, in an environment of its own: SkyPilot pins other versions than this package.
#   scripts/check_skypilot.sh [FOLDER of the environment; .venv-sky if not said]
set -euo pipefail
cd "$(dirname "$0")/.."
env=${1:-.venv-sky}
[ -x "$env/bin/python" ] || { python3 -m venv "$env" && "$env/bin/pip" install --quiet "skypilot[aws]==0.14.1"; }
mkdir -p data   # named by file_mounts; SkyPilot wants it to be there
SKYPILOT_DISABLE_USAGE_COLLECTION=1 "$env/bin/python" - skypilot/*.yaml <<'CHECK'
import subprocess, sys
import sky

for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)  # refuses unknown keys, wrong types, missing local paths
    for script in (task.setup, task.run):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    print(f"{path}: {task.name}, {task.num_nodes} node(s), {', '.join(sorted(map(str, task.resources)))}")
CHECK
