"""A disk that is really full: a small tmpfs in a mount namespace of its own, filled to the brim before a stage starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from suasion.pipeline import stages
from suasion.recipe import load_recipe

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"

LATER = ("sample", "ai-labels", "human-labels", "preferences", "dpo-rlaif", "dpo-rlaif-rlhf", "evaluate", "report")  # sft: above
# Arguments: mount point, then the command. Before the second stage of each of $PAIRS the disk is filled, after it the space is given back.
STAGES = """
mount -t tmpfs -o size=64m tmpfs "$1" || exit 77
disk=$1; shift
for pair in $PAIRS; do
  stage=${pair#*:}
  "$@" --until "${pair%:*}" >/dev/null || exit 1
  dd if=/dev/zero of="$disk/filler" bs=1024 count=65536 2>/dev/null
  "$@" --until "$stage" 2>&1; echo "full: $? in $stage"
  rm "$disk/filler"
done
"$@" 2>&1; echo "freed: $?"
"""
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


def in_a_mount_namespace(script: str, *arguments: str, **environment: str) -> str:
    """What the script prints, as root of a namespace of its own. Skips where there can be none."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs mount namespaces")
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs mount namespaces")
    return done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kib", [0, 64, 400])
def test_a_full_disk_is_a_message_and_the_next_run_goes_on(tmp_path, kib):
    """0: nothing can be written; 64: the attempt is noted, no checkpoint fits; 400: a checkpoint breaks off half-way."""
    command = [sys.executable, "-m", "suasion", "--threads", "1", "run", str(TINY), "--runs", str(tmp_path)]
    printed = in_a_mount_namespace(SCRIPT, str(tmp_path), str(kib), *command)
    full, freed = printed.split("full: ")
    assert "no space left on the device" in full, printed
    assert "run the same command again" in full
    assert "Traceback" not in printed
    assert freed.startswith("1\n")
    assert "a manifest on a full disk" not in freed
    assert freed.rstrip().endswith("freed: 0"), printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_is_full_before_a_later_stage_is_a_message_and_the_stage_is_made_once_there_is_room(tmp_path):
    names = [stage.name for stage in stages(load_recipe(TINY))]
    pairs = " ".join(f"{names[names.index(name) - 1]}:{name}" for name in LATER)
    command = [sys.executable, "-m", "suasion", "--threads", "1", "run", str(TINY), "--runs", str(tmp_path)]
    printed = in_a_mount_namespace(STAGES, str(tmp_path), *command, PAIRS=pairs)
    assert "Traceback" not in printed
    for name in LATER:
        assert f"full: 1 in {name}" in printed, printed
    assert printed.count("no space left on the device") == len(LATER), printed
    assert printed.rstrip().endswith("freed: 0"), printed
