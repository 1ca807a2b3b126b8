#!/usr/bin/env bash
# On the rented machine, over ssh: packages, then the services. Run again, it goes on. Standard input: KEY=VALUE lines for the run's
# environment (tokens); they are kept in memory only.
set -euo pipefail
cd "$(dirname "$0")"
. ./settings   # NAME, S3, EXTRAS, LINGER_MINUTES
fail() {       # whoever started this may be gone: the machine must not idle until its cap
  echo "$*" >> log
  echo "failed setup" > state
  sudo systemd-run --on-active="${LINGER_MINUTES}min" systemctl poweroff --force || true
  exit 1
}
# User data may still be at work when ssh already answers. Nothing starts on a machine that would not end by itself.
tries=${SUASION_CAP_TRIES:-60}
until sudo systemctl is-active --quiet suasion-cap.timer; do
  tries=$((tries - 1))
  [ "$tries" -gt 0 ] || fail "the timer that ends this machine at its cap does not run: nothing was started"
  sleep 2
done
sudo install -d -m 0755 /var/lib/suasion
sudo touch /var/lib/suasion/claimed
sudo systemctl stop suasion-unclaimed.timer || true
memory=${SUASION_MEMORY:-/run/suasion}   # a file system that is never written to a disk
sudo install -d -m 0700 -o "$(id -u)" "$memory"
(umask 077; cat > "$memory/environment")
cut -d= -f1 "$memory/environment" > handed_over   # the names alone: after a reboot run.sh says what is missing
echo "setting up" > state
if ! python3 -c 'import ensurepip, venv' 2> /dev/null; then   # Ubuntu's images come without; apt may be busy after the first boot
  apt() { sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" >> log 2>&1; }
  { apt update && apt install -y python3-venv; } || fail "could not install python3-venv"
fi
bash source/scripts/setup_env.sh --dir source --extras "$EXTRAS" >> log 2>&1 || fail "the set-up failed"
if [ -n "$S3" ]; then   # found out now, not after hours: that copies will arrive. A role that was just made takes a while to count
  command -v aws > /dev/null || { python3 -m venv tools && tools/bin/pip install --quiet awscli >> log 2>&1; } || fail "could not install the AWS CLI"
  export PATH="$PATH:$PWD/tools/bin"
  tries=${SUASION_S3_TRIES:-24}
  until echo reached | aws s3 cp --only-show-errors - "$S3/$NAME/launch/reached" >> log 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "cannot write to $S3: does the bucket exist, and is it this account's?"
    sleep 5
  done
fi
for unit in suasion-run suasion-notice; do
  sed -e "s|@HOME@|$PWD|g" -e "s|@USER@|$(id -un)|g" "$unit.service" | sudo tee "/etc/systemd/system/$unit.service" > /dev/null
done
sudo systemctl daemon-reload
echo "running" > state
sudo systemctl enable --now suasion-notice.service suasion-run.service
