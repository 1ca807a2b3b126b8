#!/usr/bin/env bash
# What the caller asks every few seconds: the state, the finished stages, and the log from byte $1 on (at most 64 KiB).
cd "$(dirname "$0")"
. ./settings
cat state 2> /dev/null || echo "setting up"
( cd "runs/$NAME" 2> /dev/null && for manifest in */manifest.json; do [ -f "$manifest" ] && printf '%s ' "${manifest%/*}"; done )
echo
tail -c "+$(($1 + 1))" log 2> /dev/null | head -c 65536
