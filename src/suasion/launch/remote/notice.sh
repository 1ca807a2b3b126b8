#!/usr/bin/env bash
# Two minutes before a spot machine is taken back, its metadata say so (AWS: "Spot Instance interruption notices"; IMDSv2). The run then
# gets SIGINT: it stops where it can go on from, and the caller fetches what it has.
cd "$(dirname "$0")"
metadata=${SUASION_METADATA:-http://169.254.169.254}
while sleep "${SUASION_NOTICE_SECONDS:-5}"; do
  token=$(curl -sf --max-time 2 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") || continue
  if curl -sf --max-time 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"; then
    touch notice
    [ -f pid ] && kill -INT "$(cat pid)"
    exit 0
  fi
done
