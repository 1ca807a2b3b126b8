#!/usr/bin/env bash
# The service: runs the recipe, says in `state` how it went, and lets the machine end a while later. After a reboot it goes on.
cd "$(dirname "$0")"
. ./settings   # NAME, S3, LINGER_MINUTES
PATH=$PATH:$PWD/tools/bin   # the AWS CLI, where the image has none
memory=${SUASION_MEMORY:-/run/suasion}
set -m         # without job control a shell starts background processes deaf to SIGINT
trap : INT     # the run is told by its own signal; this script stays to write down how it ended
copy() {       # results to S3, where that was asked for; working files too, so that another machine can go on
  [ -n "$S3" ] && [ -d "runs/$NAME" ] || return 0
  # A sync sends many files at once and removes none. So first goes the list of what belongs together (other files in S3 are older), and after
  # all the rest, of the files that say "this is whole" or "this belongs to that recipe", those that were there before the rest was sent.
  local marks
  (cd "runs/$NAME" && find . -type f -printf '%P\n') > copied
  mapfile -t marks < <(sed -nE 's#^.*/(manifest\.json|attempt\.json|complete)$#--include\n&#p' copied)
  { aws s3 cp --only-show-errors copied "$S3/$NAME/launch/copied" &&
    aws s3 sync --only-show-errors "runs/$NAME" "$S3/$NAME" --exclude "launch/*" --exclude "*/manifest.json" --exclude "*/attempt.json" --exclude "*/complete" &&
    aws s3 sync --only-show-errors "runs/$NAME" "$S3/$NAME" --exclude "*" "${marks[@]}"; } >> log 2>&1
}
restore() {    # stages that S3 has and nobody sent: the unfinished one of a machine that is gone, which goes on from its checkpoints
  [ -n "$S3" ] || return 0
  local folder
  aws s3 cp --only-show-errors "$S3/$NAME/launch/copied" copied > /dev/null 2>&1 || rm -f copied
  aws s3 ls "$S3/$NAME/" 2>> log | sed -n 's|^ *PRE \(.*\)/$|\1|p' | while read -r folder; do
    case $folder in launch | attic) continue ;; esac
    [ ! -e "runs/$NAME/$folder" ] || continue
    rm -rf coming   # a copy that breaks off counts for nothing
    aws s3 sync --only-show-errors "$S3/$NAME/$folder/" "coming/$folder" >> log 2>&1 < /dev/null || continue
    [ ! -s copied ] || (cd coming || exit; find . -type f -printf '%P\n' | grep -vxFf ../copied | xargs -rd '\n' rm; find . -type d -empty -delete)
    [ -d "coming/$folder" ] || continue
    # The caller fetched, and sent, every finished stage that was whole.
    [ ! -f "coming/$folder/manifest.json" ] || { echo "$folder in $S3/$NAME is not whole: it is made again" >> log; continue; }
    mkdir -p "runs/$NAME" && mv "coming/$folder" "runs/$NAME/" && echo "$folder: what $S3/$NAME has of it is here" >> log
  done
  rm -rf coming
}
if ! grep -q finished state; then   # after a reboot a finished run only waits for its caller
  restore   # first, or the next list would leave out what S3 has
  if [ -s handed_over ] && [ ! -f "$memory/environment" ]; then
    echo "$(paste -sd ' ' handed_over): handed over into the memory of a machine that has rebooted since, and gone. Launch again: it goes on" >> log
    code=1
  else
    # Read here and not by systemd, which would take quotes and backslashes in a value for its own.
    [ ! -f "$memory/environment" ] || while IFS= read -r line; do export "${line?}"; done < "$memory/environment"
    echo running > state
    ( while sleep 60; do copy; done ) & copier=$!
    source/.venv/bin/suasion run recipe.yaml --runs runs >> log 2>&1 & run=$!
    echo "$run" > pid
    wait "$run"; code=$?
    while kill -0 "$run" 2> /dev/null; do wait "$run"; code=$?; done   # a signal ends `wait` before the run
    kill -- "-$copier" 2> /dev/null   # with what it is sending: an older state must not arrive last
  fi
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
