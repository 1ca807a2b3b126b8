"""The rented machine's own scripts, run here as they are: what it copies to S3, what it takes from there, what it is handed, when it ends.

`aws` copies into a folder and keeps what arrived in the order of its arrival; the run itself is a script.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from standing_machine import script

from suasion.launch.machine import extras_of, needs_of, scripts, user_data
from suasion.recipe import load_recipe

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
# As the AWS CLI: a folder's files in an order of its own, the last filter that fits decides, and keys below a prefix with `ls`.
AWS = """
import fnmatch, os, pathlib, shutil, sys
bucket = pathlib.Path(os.environ["BUCKET"])
verb, *words = [word for word in sys.argv[2:] if word != "--only-show-errors"]
places = [bucket / word.removeprefix("s3://") if word.startswith("s3://") else pathlib.Path(word) for word in words[:2] if word[:2] != "--"]
def send(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    if target.is_relative_to(bucket):
        with open(os.environ["ARRIVED"], "a") as handle:
            print(target.relative_to(bucket), file=handle)
    if os.environ.get("CUT") and target.name == os.environ["CUT"]:
        sys.exit(1)
if verb == "cp":
    sys.exit(1) if not places[0].is_file() else send(*places)
elif verb == "ls":
    found = sorted(places[0].iterdir()) if places[0].is_dir() else sys.exit(1)
    for path in found:
        print(f"{'':27}PRE {path.name}/" if path.is_dir() else f"2026-01-01 00:00:00{path.stat().st_size:11} {path.name}")
elif verb == "sync":
    filters = list(zip(words[2::2], words[3::2]))
    names = [str(path.relative_to(places[0])) for path in sorted(places[0].rglob("*"), reverse=True) if path.is_file()]
    for name in names:
        wanted = [kind for kind, pattern in filters if fnmatch.fnmatch(name, pattern)][-1:] != ["--exclude"]
        there = places[1] / name
        if wanted and not (there.is_file() and there.read_bytes() == (places[0] / name).read_bytes()):
            send(places[0] / name, there)
"""


class Rented:
    """The session's folder on a machine, its bucket, and its run: a script."""

    def __init__(self, folder: Path, run: str) -> None:
        self.home, self.bucket, self.memory, self.tools = (folder / name for name in ("home", "bucket", "memory", "tools"))
        self.arrived = folder / "arrived"
        for path in (self.home, self.memory):
            path.mkdir(parents=True)
        for item in scripts():
            shutil.copy(item.path, self.home / item.name)
        (self.home / "settings").write_text("NAME='tiny'\nS3='s3://b/x'\nEXTRAS=''\nLINGER_MINUTES=60\n")
        (self.home / "state").write_text("setting up\n")
        script(self.home / "source" / ".venv" / "bin" / "suasion", run)
        script(self.tools / "sudo", ":")
        (self.tools / "aws.py").write_text(AWS)
        script(self.tools / "aws", f'exec python3 "{self.tools}/aws.py" "$@"')
        self.run, self.there = self.home / "runs" / "tiny", self.bucket / "b" / "x" / "tiny"

    def serve(self, **environment: str) -> str:
        """Run the service to its end; returns its state."""
        known = {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "BUCKET": str(self.bucket),
            "ARRIVED": str(self.arrived),
            "SUASION_MEMORY": str(self.memory),
        }
        subprocess.run(["bash", str(self.home / "run.sh")], env={**os.environ, **known, **environment}, timeout=60, check=True)
        return (self.home / "state").read_text().strip()

    def log(self) -> str:
        return (self.home / "log").read_text() if (self.home / "log").is_file() else ""


def write(folder: Path, **files: str) -> None:
    """Write texts into files of a folder; __ in a name stands for a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_an_unfinished_stage_in_s3_goes_on_though_finished_ones_were_sent(tmp_path) -> None:
    """The finished ones make the run's folder; that must not keep the checkpoints away."""
    rented = Rented(tmp_path, "find runs/tiny -type f | sort")
    write(
        rented.there,
        **{
            "01-corpus__rows": "old",
            "03-sft__attempt.json": "{}",
            "03-sft__checkpoints__checkpoint-10__complete": "",
            "timings.json": "{}",
        },
    )
    write(rented.there, **{"launch__reached": "", "attic__001__03-sft__rows": "", "04-sample__manifest.json": "{}"})
    write(rented.run, **{"01-corpus__rows": "new"})
    assert rented.serve() == "finished 0"
    assert [line for line in rented.log().splitlines() if line.startswith("runs/")] == [
        "runs/tiny/01-corpus/rows",
        "runs/tiny/03-sft/attempt.json",
        "runs/tiny/03-sft/checkpoints/checkpoint-10/complete",
    ]
    assert (rented.run / "01-corpus" / "rows").read_text() == "new"
    assert "04-sample in s3://b/x/tiny is not whole" in rented.log()  # or the caller would have sent it
    assert "03-sft: what s3://b/x/tiny has of it is here" in rented.log()


def test_a_stage_of_which_only_a_part_came_is_begun_anew(tmp_path) -> None:
    rented = Rented(tmp_path, ":")
    write(rented.there, **{"03-sft__b": "", "03-sft__a": ""})
    assert rented.serve(CUT="b") == "finished 0"
    assert not rented.run.exists()


def test_files_of_an_earlier_attempt_are_left_in_s3(tmp_path) -> None:
    """Nothing is removed there; checkpoints of another learning rate would otherwise be gone on with."""
    rented = Rented(
        tmp_path, "mkdir -p runs/tiny/03-sft/checkpoints/checkpoint-10; echo new > runs/tiny/03-sft/attempt.json; exit 1"
    )
    write(rented.there, **{"03-sft__attempt.json": "old", "03-sft__checkpoints__checkpoint-30__complete": ""})
    write(rented.run, **{"03-sft__attempt.json": "new"})
    assert rented.serve() == "failed 1"
    assert (rented.there / "03-sft" / "checkpoints" / "checkpoint-30" / "complete").exists()
    shutil.rmtree(rented.run)
    write(rented.home, state="setting up\n")
    script(
        rented.home / "source" / ".venv" / "bin" / "suasion", "cat runs/tiny/03-sft/attempt.json; find runs/tiny -name complete"
    )
    rented.serve()
    assert rented.log().splitlines()[-1] == "new"


def test_what_says_that_a_stage_is_whole_arrives_last(tmp_path) -> None:
    """The stand-in sends m.. before a.., as a parallel sync may."""
    stage = "cd runs/tiny/03-sft; echo 1 > adapter; echo 1 > attempt.json; mkdir -p checkpoints/c; echo 1 > checkpoints/c/complete; echo 1 > checkpoints/c/a; echo 1 > manifest.json"
    rented = Rented(tmp_path, f"mkdir -p runs/tiny/03-sft; {stage}")
    assert rented.serve() == "finished 0"
    arrived = [line.removeprefix("b/x/tiny/") for line in rented.arrived.read_text().splitlines()]
    assert arrived[0] == "launch/copied"
    assert set(arrived[1:3]) == {"03-sft/adapter", "03-sft/checkpoints/c/a"}
    assert set(arrived[3:]) == {"03-sft/manifest.json", "03-sft/attempt.json", "03-sft/checkpoints/c/complete"}


def test_a_copy_that_breaks_off_sends_no_manifest(tmp_path) -> None:
    rented = Rented(tmp_path, "mkdir -p runs/tiny/03-sft; cd runs/tiny/03-sft; touch adapter manifest.json")
    rented.serve(CUT="adapter")
    assert not (rented.there / "03-sft" / "manifest.json").exists()


def test_a_stage_that_is_finished_while_it_is_copied_waits_for_the_next_copy(tmp_path) -> None:
    rented = Rented(tmp_path, "mkdir -p runs/tiny/03-sft; cd runs/tiny/03-sft; touch adapter")
    between = f"touch {rented.run}/03-sft/manifest.json {rented.run}/03-sft/weights"
    script(rented.tools / "aws", f'python3 "{rented.tools}/aws.py" "$@"; [ "$2" != sync ] || {between}')
    rented.serve()
    assert (rented.run / "03-sft" / "manifest.json").exists()
    assert not (rented.there / "03-sft" / "manifest.json").exists()


def test_values_arrive_as_they_are(tmp_path) -> None:
    """Quotes and backslashes too, which systemd's EnvironmentFile would take for its own."""
    value = """ a"b'c\\d $HOME `x` #e = """
    rented = Rented(tmp_path, 'printf "<%s><%s>\\n" "$TOKEN" "$OTHER"')
    (rented.memory / "environment").write_text(f"TOKEN={value}\nOTHER=plain\n")
    (rented.home / "handed_over").write_text("TOKEN\nOTHER\n")
    assert rented.serve() == "finished 0"
    assert f"<{value}><plain>\n" in rented.log()
    assert "EnvironmentFile" not in "".join(item.path.read_text() for item in scripts())


def test_a_machine_that_lost_its_keys_in_a_reboot_says_so_and_ends(tmp_path) -> None:
    rented = Rented(tmp_path, "echo ran")
    (rented.home / "handed_over").write_text("HF_TOKEN\nOTHER\n")
    write(rented.there, **{"03-sft__attempt.json": "old"})
    assert rented.serve() == "failed 1"
    assert "HF_TOKEN OTHER: handed over into the memory of a machine that has rebooted since, and gone" in rented.log()
    assert "ran" not in rented.log()
    listed = (rented.there / "launch" / "copied").read_text()
    assert "03-sft/attempt.json" in listed  # the next machine goes on with it all the same
    (rented.home / "handed_over").write_text("")
    assert rented.serve() == "finished 0"
    assert rented.log().endswith("ran\n")


def test_the_end_of_a_machine_is_a_time_and_not_a_guess() -> None:
    """Counted when it is asked for, so that neither boot nor a reboot prolongs it; to the second, where systemd's timers take a minute."""
    text = user_data(2.5, datetime(2026, 11, 26, 22, 45, 30, tzinfo=UTC))
    assert "OnCalendar=2026-11-27 01:15:30 UTC\n" in text
    assert "AccuracySec=1s\n" in text
    assert f"-lt {int(datetime(2026, 11, 27, 1, 15, 30, tzinfo=UTC).timestamp())} ]" in text
    assert "OnActiveSec=150min" in text  # for a caller whose clock is ahead


REWARD = "{kind: reward, train: {kind: judge_pairs}, model: {base: 'random:tiny', quantization: nf4}}"


@pytest.mark.parametrize(
    "change",
    [
        "model.quantization=nf4",
        f"evaluate.grader={REWARD}",
        f"ai_labels.grader={{kind: panel, train: {{kind: grader_pairs}}, members: [{REWARD}, {{kind: ngram, train: {{kind: grader_pairs}}}}]}}",
    ],
)
def test_four_bits_need_their_package(change) -> None:
    recipe = load_recipe(TINY, (change, "sft.report_to=wandb"))
    assert needs_of(recipe).extras == ("qlora", "wandb")
    assert extras_of(load_recipe(TINY)) == ()
