#!/usr/bin/env bash
# The service: runs the recipe, says in `state` how it went, and lets the machine end a while later. After a reboot it goes on.
cd "$(dirname "$0")"
. ./settings   # NAME, S3, LINGER_MINUTES
PATH=$PATH:$PWD/tools/bin   # the AWS CLI, where the image has none
set -m         # without job control a shell starts background processes deaf to SIGINT
trap : INT     # the run is told by its own signal; this script stays to write down how it ended
copy() {       # results to S3, where that was asked for; working files too, so that another machine can go on
  [ -z "$S3" ] || aws s3 sync --only-show-errors "runs/$NAME" "$S3/$NAME" --exclude "launch/*" >> log 2>&1
}
if ! grep -q finished state; then   # after a reboot a finished run only waits for its caller
  [ -z "$S3" ] || [ -d "runs/$NAME" ] || aws s3 sync --only-show-errors "$S3/$NAME" "runs/$NAME" --exclude "launch/*" >> log 2>&1
  echo running > state
  ( while sleep 60; do copy; done ) & copier=$!
  source/.venv/bin/suasion run recipe.yaml --runs runs >> log 2>&1 & run=$!
  echo "$run" > pid
  wait "$run"; code=$?
  while kill -0 "$run" 2> /dev/null; do wait "$run"; code=$?; done   # a signal ends `wait` before the run
  kill "$copier" 2> /dev/null
  copy
  if [ -f notice ]; then
    echo "reclaimed $code" > state
  elif [ "$code" = 0 ] || [ "$code" = 3 ]; then
    echo "finished $code" > state
  else
    echo "failed $code" > state
  fi
fi
# The caller fetches what there is and ends the machine. Without a caller it ends itself.
sudo systemd-run --on-active="${LINGER_MINUTES}min" systemctl poweroff --force
