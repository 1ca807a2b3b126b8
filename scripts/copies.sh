#!/usr/bin/env bash
# Copies of a run in a folder that outlives the machine, such as a mounted bucket.
#
#   scripts/copies.sh take COPY RUN    what the copy has and the run has not: before the run, on a fresh machine
#   scripts/copies.sh keep RUN COPY    what is new in the run: every minute, and at the end
#
# Stages are taken whole or not at all, so that files of two attempts never meet in one folder.
set -euo pipefail
cd "$(dirname "$0")/.."
marks='/(manifest\.json|attempt\.json|complete)$'   # they say that a stage or checkpoint is whole, and whose it is
take() {
  [ -d "$1" ] || return 0
  mkdir -p "$2"
  rm -rf "$2/coming"
  find "$1" -maxdepth 1 -type f -exec cp -u --preserve=timestamps -t "$2" {} +   # people's labels: the newer file wins
  for from in "$1"/[0-9][0-9]-*/; do
    folder=$(basename "$from")
    [ -d "$from" ] && [ ! -e "$2/$folder" ] || continue
    mkdir "$2/coming"
    cp -r --preserve=timestamps "$from." "$2/coming/"
    if [ -f "$2/coming/manifest.json" ] && ! .venv/bin/python - "$2/coming" <<'WHOLE'
import sys
from pathlib import Path

from suasion.errors import UserError
from suasion.launch.fetching import check_stage

try:
    check_stage(Path(sys.argv[1]))
except UserError as error:
    sys.exit(str(error).partition(". ")[0])
WHOLE
    then
      echo "$folder in $1 is not whole: it is made again"
      rm -rf "$2/coming"
    else
      mv "$2/coming" "$2/$folder"
    fi
  done
}
keep() {
  [ -d "$1" ] || return 0
  exec 9< "$1"; flock 9   # one copies at a time: the last must not find half of a file that the one before still writes
  mkdir -p "$2"
  for here in "$1"/[0-9][0-9]-*/; do
    there=$2/$(basename "$here")
    if { [ -f "$there/manifest.json" ] && ! cmp -s "$here/manifest.json" "$there/manifest.json"; } ||
      { [ -f "$here/attempt.json" ] && [ -f "$there/attempt.json" ] && ! cmp -s "$here/attempt.json" "$there/attempt.json"; }; then
      rm -rf "$there"   # of an earlier attempt
    fi
  done
  to=$(cd "$2" && pwd)
  cd "$1"
  files=$(find . -type f ! -name .lock ! -path './coming/*')
  [ -n "$files" ] || return 0
  for part in -vE -E; do   # marks last, and of those only what was there before the rest was copied
    { grep "$part" "$marks" || true; } <<< "$files" | xargs -rd '\n' cp -u --preserve=timestamps --parents -t "$to"
  done
}
case ${1:-} in
  take | keep) "$@" ;;
  *) echo "usage: $0 take COPY RUN | keep RUN COPY" >&2; exit 2 ;;
esac
