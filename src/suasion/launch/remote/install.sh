#!/usr/bin/env bash
# On the rented machine, over ssh: packages, then the services. Run again, it goes on. Standard input: KEY=VALUE lines for the run's
# environment (tokens); they are kept in memory only.
set -euo pipefail
cd "$(dirname "$0")"
sudo install -d -m 0755 /var/lib/suasion
sudo touch /var/lib/suasion/claimed
sudo systemctl stop suasion-unclaimed.timer || true
memory=${SUASION_MEMORY:-/run/suasion}   # a file system that is never written to a disk
sudo install -d -m 0700 -o "$(id -u)" "$memory"
(umask 077; cat > "$memory/environment")
echo "setting up" > state
bash source/scripts/setup_env.sh --dir source >> log 2>&1 || { echo "failed setup" > state; exit 1; }
for unit in suasion-run suasion-notice; do
  sed -e "s|@HOME@|$PWD|g" -e "s|@USER@|$(id -un)|g" "$unit.service" | sudo tee "/etc/systemd/system/$unit.service" > /dev/null
done
sudo systemctl daemon-reload
echo "running" > state
sudo systemctl enable --now suasion-notice.service suasion-run.service
