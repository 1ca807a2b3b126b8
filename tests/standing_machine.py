"""A rented machine for tests: a real sshd on loopback whose commands run in a folder, with stand-ins for what needs a whole machine.

`sudo` runs as is, `systemctl` and `systemd-run` start what the unit says, `aws` copies into a folder. sshd comes with Debian's
openssh-server; .ci/run installs it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server")

SUDO = 'case $1 in systemctl|systemd-run|tee) ;; install) shift; mkdir -p "${@: -1}"; exit ;; touch) exit 0 ;; esac; exec "$@"'
TEE = 'cat > "$HOME_OF_MACHINE/units/$(basename "$1")"'
SYSTEMCTL = """
cd "$HOME_OF_MACHINE"; echo "systemctl $*" >> calls
case "$*" in is-active*) [ ! -f no-cap ]; exit ;; esac
case "$*" in *enable*suasion-run*)
  set -a; script=$(sed -n 's/^ExecStart=.bin.bash //p' units/suasion-run.service)
. "$SUASION_MEMORY/environment"; set +a
  env --default-signal=INT setsid bash "$script" > /dev/null 2>&1 < /dev/null & ;;
esac"""
AWS = """
verb=$2; shift 2
[ "$1" = --only-show-errors ] && shift
place() { case $1 in s3://*) echo "$HOME_OF_MACHINE/${1#s3://}" ;; *) echo "$1" ;; esac; }
from=$(place "$1") to=$(place "$2")
case $verb in
  cp) [ -d "$HOME_OF_MACHINE/bucket" ] || exit 1; mkdir -p "$(dirname "$to")"; cat > "$to" ;;
  sync) [ -d "$from" ] || exit 0; mkdir -p "$to"; cp -r "$from/." "$to/" ;;
esac"""


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def until(what, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


@dataclass(frozen=True)
class Standing:
    """Where the machine listens, the folder that stands for its home, and the file of the public keys that it lets in."""

    port: int
    home: Path
    keys: Path
    user: str

    def let_in(self, public_key: str) -> None:
        """Every command of this key runs in the home, with the stand-ins first on PATH."""
        self.keys.write_text(f'command="{self.home.parent}/tools/enter" {public_key}')


@contextmanager
def standing_machine(folder: Path, **environment: str) -> Iterator[Standing]:
    """The machine, as long as the context lasts. environment: what its commands find besides."""
    home, tools = folder / "home", folder / "tools"
    (home / "units").mkdir(parents=True)
    for name, body in (
        ("sudo", SUDO),
        ("tee", TEE),
        ("systemctl", SYSTEMCTL),
        ("systemd-run", 'cd "$HOME_OF_MACHINE"; echo "systemd-run $*" >> calls'),
        ("aws", AWS),
    ):
        script(tools / name, body)
    known = {
        "HOME_OF_MACHINE": home,
        "SUASION_MEMORY": home / "memory",
        "SUASION_CAP_TRIES": 1,
        "SUASION_S3_TRIES": 1,
        **environment,
    }
    exported = " ".join(f"{name}={value}" for name, value in known.items())
    script(tools / "enter", f'export PATH={tools}:$PATH {exported}; cd {home} && eval "$SSH_ORIGINAL_COMMAND"')
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "authorized",
        "PidFile": "none", "UsePAM": "no", "StrictModes": "no", "PasswordAuthentication": "no", "PermitRootLogin": "yes",
    }  # fmt: skip
    command = [
        "env",
        "--default-signal=INT",  # a test run that was started in the background is deaf to it, and so would be all that it starts
        SSHD,
        "-D",
        "-e",
        "-f",
        "/dev/null",
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
    ]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield Standing(port, home, folder / "authorized", getpass.getuser())
    finally:
        server.terminate()
        server.wait()
