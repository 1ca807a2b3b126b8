"""A disk that is really full: a small tmpfs in a mount namespace of its own, filled to the brim before a training starts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"

# Arguments: mount point, KiB to leave free, then the command. Prints its exit codes: on the full disk, and after space was freed.
SCRIPT = """
mount -t tmpfs -o size=64m tmpfs "$1" || exit 77
disk=$1 leave=$2; shift 2
"$@" --until pools >/dev/null || exit 1
free=$(df --output=avail -k "$disk" | tail -1)
dd if=/dev/zero of="$disk/filler" bs=1024 count=$((free - leave)) 2>/dev/null || exit 1
"$@" --until sft 2>&1; echo "full: $?"
test -e "$disk/tiny/03-sft/manifest.json" && echo "a manifest on a full disk"
rm "$disk/filler"
"$@" --until sft 2>&1; echo "freed: $?"
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kib", [0, 64, 400])
def test_a_full_disk_is_a_message_and_the_next_run_goes_on(tmp_path, kib):
    """0: nothing can be written; 64: the attempt is noted, no checkpoint fits; 400: a checkpoint breaks off half-way."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs mount namespaces")
    command = [sys.executable, "-m", "suasion", "--threads", "1", "run", str(TINY), "--runs", str(tmp_path)]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", str(tmp_path), str(kib), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs mount namespaces")
    full, freed = done.stdout.split("full: ")
    assert "no space left on the device" in full, done.stdout
    assert "run the same command again" in full
    assert "Traceback" not in done.stdout
    assert freed.startswith("1\n")
    assert "a manifest on a full disk" not in freed
    assert freed.rstrip().endswith("freed: 0"), done.stdout
