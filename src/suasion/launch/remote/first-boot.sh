#!/bin/bash
# User data of a machine that `suasion launch` rents: it ends by itself, whatever becomes of the caller. Holds no secret.
# At @END@, counted when it was asked for, it powers off, which terminates it; so it does after @UNCLAIMED@ minutes if nobody came to use it.
# The same number of minutes from here on is a second lock, for a caller whose clock is ahead.
set -eu
[ "$(date +%s)" -lt @SECONDS@ ] || systemctl poweroff --force   # a timer for a time that has passed would never fire
cat > /etc/systemd/system/suasion-off.service <<UNIT
[Service]
Type=oneshot
ExecStart=/usr/bin/systemctl poweroff --force
UNIT
cat > /etc/systemd/system/suasion-cap.timer <<UNIT
[Timer]
OnCalendar=@END@
OnActiveSec=@MINUTES@min
AccuracySec=1s
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
