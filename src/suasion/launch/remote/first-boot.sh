#!/bin/bash
# User data of a machine that `suasion launch` rents: it ends by itself, whatever becomes of the caller. Holds no secret.
# @MINUTES@ minutes after its first boot it powers off, which terminates it; so it does after @UNCLAIMED@ minutes if nobody came to use it.
set -eu
install -d /var/lib/suasion
[ -f /var/lib/suasion/deadline ] || date -u -d "+@MINUTES@ minutes" '+%Y-%m-%d %H:%M:%S UTC' > /var/lib/suasion/deadline
cat > /etc/systemd/system/suasion-off.service <<UNIT
[Service]
Type=oneshot
ExecStart=/usr/bin/systemctl poweroff --force
UNIT
cat > /etc/systemd/system/suasion-cap.timer <<UNIT
[Timer]
OnCalendar=$(cat /var/lib/suasion/deadline)
Persistent=true
Unit=suasion-off.service
[Install]
WantedBy=timers.target
UNIT
cat > /etc/systemd/system/suasion-unclaimed.timer <<UNIT
[Unit]
ConditionPathExists=!/var/lib/suasion/claimed
[Timer]
OnActiveSec=@UNCLAIMED@min
Unit=suasion-off.service
[Install]
WantedBy=timers.target
UNIT
systemctl daemon-reload
systemctl enable --now suasion-cap.timer suasion-unclaimed.timer
