"""The rented machine's own scripts and the ssh to it, against a real sshd on loopback: upload, service, progress, fetch, spot notice.

Only what needs a whole machine is stood in for (standing_machine.py), and the experiment itself, a script that writes a stage as
`suasion run` does; test_launch_whole.py runs the real one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from standing_machine import needs_sshd, script, standing_machine, until

from suasion.errors import UserError
from suasion.launch import flow, machine
from suasion.launch.fetching import fetch_stages
from suasion.launch.flow import Launch, deploy, follow
from suasion.launch.machine import Upload, moved_inputs, scripts, settings, source_tree, user_data
from suasion.launch.session import Session, key_file, make_key, save_session
from suasion.launch.ssh import Host, Unreachable
from suasion.machines import load_machines
from suasion.recipe import load_recipe, validate_recipe
from suasion.records import sha256_file
from suasion.rundir import Manifest

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "recipes" / "tiny.yaml"
EXPERIMENT = """
echo "$1 $2 token=${HF_TOKEN:-none}"
trap 'echo interrupted; exit 130' INT
mkdir -p runs/tiny/03-sft; echo half > runs/tiny/03-sft/checkpoint
cp -r prepared/01-corpus runs/tiny/
while [ ! -f go ]; do [ -d prepared ] || exit 1; sleep 0.05; done
cp -r prepared/02-pools runs/tiny/
rm -r runs/tiny/03-sft; echo '{}' > runs/tiny/timings.json
echo done"""


def stage(folder: Path, text: str) -> None:
    """A finished stage as rundir writes it."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(text)
    output = {"rows.jsonl": {"sha256": sha256_file(folder / "rows.jsonl"), "bytes": len(text)}}
    manifest = Manifest(stage=folder.name, recipe={}, inputs={}, outputs=output, rows_in=1, rows_out=1, dropped={}, facts={}, packages={},
                        commit="", device="cpu", dtype="float32", threads=1)  # fmt: skip
    manifest.digest = manifest.computed_digest()
    (folder / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))


@pytest.fixture
def rented(tmp_path, monkeypatch):
    """(session, host, home): an sshd whose every command runs in `home` with the stand-ins first on PATH."""
    monkeypatch.setenv("SUASION_STATE", str(tmp_path / "state"))
    with standing_machine(tmp_path) as standing:
        session = Session(
            name="tiny",
            id="0a1b2c3d",
            account="123456789012",
            region="us-east-1",
            max_hours=1,
            max_dollars=1,
            user=standing.user,
            address="127.0.0.1",
            port=standing.port,
        )
        standing.let_in(make_key(session).decode())
        host = Host("127.0.0.1", key_file(session), session.user, session.port)
        host.wait(30)
        yield session, host, standing.home


@pytest.fixture
def launch(rented, tmp_path, monkeypatch):
    """A launch whose machine is the sshd, ready to be deployed to; its package is the stand-in."""
    session, host, home = rented
    source = tmp_path / "source"
    script(source / "scripts" / "setup_env.sh", "echo set up")
    script(source / ".venv" / "bin" / "suasion", EXPERIMENT)
    stage(home / session.label / "prepared" / "01-corpus", "one\n")
    stage(home / session.label / "prepared" / "02-pools", "two\n")
    monkeypatch.setattr(flow, "source_tree", lambda: [Upload(source, "source")])
    run = tmp_path / "runs" / "tiny"
    save_session(run, session)
    made = Launch(
        None,
        load_recipe(TINY),
        run,
        session,
        load_machines(),
        "",
        0,
        {"HF_TOKEN": "hf_secret"},
        lambda session: host,
        poll=0.05,
        boot=30,
    )  # type: ignore[arg-type]
    yield made
    folder = home / session.label
    if (home / "calls").is_file() and "enable --now suasion-notice.service suasion-run.service" in (home / "calls").read_text():
        (folder / "go").touch()  # nothing of a test outlives it
        until(lambda: (folder / "state").read_text().split()[:1] in (["finished"], ["failed"], ["reclaimed"]))


@needs_sshd
def test_a_run_is_sent_streamed_and_fetched(launch, rented, tmp_path) -> None:
    session, host, home = rented
    folder = home / session.label
    deploy(launch, host)
    until(lambda: (folder / "runs" / "tiny" / "01-corpus" / "manifest.json").is_file())
    fetched = fetch_stages(host, launch.folder, launch.run, ["01-corpus"])
    assert fetched == ["01-corpus"]
    assert fetch_stages(host, launch.folder, launch.run, ["01-corpus"]) == []
    (folder / "go").touch()
    ended = follow(launch, host)
    assert (ended.how, ended.detail) == ("finished", "0")
    assert (launch.run / "02-pools" / "rows.jsonl").read_text() == "two\n"
    assert (launch.run / "timings.json").is_file()
    assert not (launch.run / "03-sft").exists()
    log = (launch.run / "launch" / "log").read_text()
    assert log.startswith(
        "set up\nrun recipe.yaml token=hf_secret\n"
    )  # the stand-in says its token so that this test can see that it came
    assert "systemd-run --on-active=60min systemctl poweroff" in (home / "calls").read_text()

    # the token stands in memory's stand-in, readable by its owner, and nowhere else of what was sent
    assert (home / "memory" / "environment").stat().st_mode & 0o777 == 0o600
    holders = {path.name for path in home.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()}
    assert holders == {"environment", "log"}
    remote = validate_recipe(yaml.safe_load((folder / "recipe.yaml").read_text()), "sent")
    assert remote.name == "tiny"


@needs_sshd
def test_a_spot_notice_stops_the_run_and_saves_what_it_had(launch, rented) -> None:
    session, host, home = rented
    folder = home / session.label
    asked = []

    class Metadata(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self):
            asked.append((self.command, self.path, self.headers.get("X-aws-ec2-metadata-token")))
            taken = self.command == "PUT" or (self.headers.get("X-aws-ec2-metadata-token") == "token" and len(asked) > 4)
            self.send_response(200 if taken else 404)
            self.end_headers()
            self.wfile.write(b"token" if self.command == "PUT" else b"")

        do_GET = do_PUT = answer

    deploy(launch, host)
    until(lambda: (folder / "runs" / "tiny" / "01-corpus" / "manifest.json").is_file())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "SUASION_METADATA": f"http://127.0.0.1:{server.server_address[1]}",
        "SUASION_NOTICE_SECONDS": "0.05",
    }
    subprocess.run(["bash", str(folder / "notice.sh")], env=environment, timeout=30, check=True)
    server.shutdown()
    assert {path for method, path, _ in asked if method == "GET"} == {"/latest/meta-data/spot/instance-action"}
    ended = follow(launch, host)
    assert (ended.how, ended.detail) == ("reclaimed", "130")
    assert (launch.run / "01-corpus" / "manifest.json").is_file()
    assert (launch.run / "03-sft" / "checkpoint").read_text() == "half\n"


@needs_sshd
def test_what_is_here_already_is_sent_along(launch, rented) -> None:
    session, host, home = rented
    stage(launch.run / "00-earlier", "x\n")
    (launch.run / "recipe.yaml").write_text("of this machine")
    deploy(launch, host)
    there = home / session.label / "runs" / "tiny"
    assert (there / "00-earlier" / "rows.jsonl").read_text() == "x\n"
    assert not (there / "launch").exists()
    assert not (there / "recipe.yaml").exists()


@needs_sshd
def test_a_stage_that_arrived_otherwise_than_it_was_written_does_not_count(launch, rented) -> None:
    session, host, home = rented
    broken = home / session.label / "runs" / "tiny" / "02-pools"
    stage(broken, "two\n")
    (broken / "rows.jsonl").write_text("tw0\n")
    with pytest.raises(UserError, match=r"02-pools/rows\.jsonl did not arrive as it was written"):
        fetch_stages(host, launch.folder, launch.run, ["02-pools"])
    assert not (launch.run / "02-pools").exists()


@needs_sshd
def test_a_failed_set_up_shows_its_last_lines(launch, rented, tmp_path) -> None:
    _, host, _ = rented
    script(tmp_path / "source" / "scripts" / "setup_env.sh", "echo no space left on this machine; exit 1")
    with pytest.raises(UserError, match="no space left on this machine"):
        deploy(launch, host)


@needs_sshd
def test_nothing_starts_on_a_machine_that_would_not_end_by_itself(launch, rented) -> None:
    _, host, home = rented
    (home / "no-cap").touch()
    with pytest.raises(UserError, match="the timer that ends this machine at its cap does not run"):
        deploy(launch, host)
    calls = (home / "calls").read_text()
    assert "suasion-run" not in calls
    assert "systemd-run --on-active=60min systemctl poweroff" in calls  # without a caller it ends itself all the same


@needs_sshd
def test_results_are_copied_to_s3_and_a_place_that_cannot_be_written_is_found_out_first(launch, rented) -> None:
    session, host, home = rented
    session.s3 = "s3://bucket/experiments"
    with pytest.raises(UserError, match="cannot write to s3://bucket/experiments"):
        deploy(launch, host)
    (home / "bucket").mkdir()
    deploy(launch, host)
    (home / session.label / "go").touch()
    assert follow(launch, host).how == "finished"
    copied = home / "bucket" / "experiments" / "tiny"
    assert (copied / "02-pools" / "rows.jsonl").read_text() == "two\n"
    assert (copied / "launch" / "reached").read_text() == "reached\n"


@needs_sshd
def test_a_key_that_is_not_let_in_and_a_host_that_changed(rented, tmp_path) -> None:
    session, host, _ = rented
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    with pytest.raises(Unreachable, match="denied"):
        Host("127.0.0.1", other, session.user, session.port).run("true")
    known = host.key.with_name("known_hosts")
    wrong = (tmp_path / "other.pub").read_text().split()[1]
    known.write_text(f"[127.0.0.1]:{session.port} ssh-ed25519 {wrong}\n")
    with pytest.raises(Unreachable, match=r"(?i)host key"):
        host.run("true")


def test_nobody_there(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match="did not let us in within"):
        Host("127.0.0.1", tmp_path / "key", "nobody", port).wait(0.2)


def test_first_boot_ends_the_machine_and_holds_nothing_else() -> None:
    text = user_data(2.5)
    assert "OnActiveSec=150min" in text
    assert "OnActiveSec=45min" in text
    assert "@" not in text.replace("@reboot", "")
    assert len(text) < 16 * 1024  # AWS's limit
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_all_scripts_are_valid_and_packaged() -> None:
    for item in scripts():
        assert item.path.is_file()
        if item.name.endswith(".sh"):
            assert subprocess.run(["bash", "-n", str(item.path)], check=False).returncode == 0
    for name in re.findall(r"^ExecStart=/bin/bash @HOME@/(\S+)", "\n".join(i.path.read_text() for i in scripts()), re.MULTILINE):
        assert name in machine.SCRIPTS


def test_inputs_keep_their_names_and_move(tmp_path) -> None:
    corpus, labels = tmp_path / "a" / "winning-args-corpus", tmp_path / "labels.jsonl"
    corpus.mkdir(parents=True)
    labels.write_text("")
    recipe = load_recipe(
        TINY, (f"corpus.sources=[{{kind: cmv, path: {corpus}}}]", f"human_labels.source={{kind: file, path: {labels}}}")
    )  # fmt: skip
    text, uploads = moved_inputs(recipe, "/srv/machine/x")
    assert [(item.path, item.name) for item in uploads] == [
        (corpus, "inputs/0/winning-args-corpus"),
        (labels, "inputs/1/labels.jsonl"),
    ]
    assert str(tmp_path) not in text
    moved = validate_recipe(yaml.safe_load(text), "moved")
    from suasion.pipeline import recipe_slice

    for sections in (("corpus",), ("human_labels",)):
        assert recipe_slice(moved, sections) == recipe_slice(recipe, sections)  # stages made there count here
    labels.unlink()
    with pytest.raises(UserError, match=r"labels.jsonl, which is not there[\s\S]*nothing was rented"):
        moved_inputs(recipe, "")


def test_models_and_rubrics_of_the_caller_move_too_and_stand_in_no_manifest(tmp_path) -> None:
    from suasion.pipeline import recipe_slice

    base, rubric = tmp_path / "my-base", tmp_path / "mine.yaml"
    base.mkdir()
    rubric.write_text("")
    recipe = load_recipe(
        TINY,
        (
            f"model.base={base}",
            f"ai_labels.grader={{kind: llm, provider: local, model: {base}, template: {rubric}}}",
            f"evaluate.grader={{kind: reward, train: {{kind: judge_pairs}}, model: {{base: {base}}}}}",
        ),
    )
    text, uploads = moved_inputs(recipe, "/srv/machine/x")
    assert [(item.path, item.name) for item in uploads] == [(base, "inputs/0/my-base"), (rubric, "inputs/1/mine.yaml")]
    moved = validate_recipe(yaml.safe_load(text), "moved")
    for sections in (("model.base",), ("ai_labels", "evaluate")):
        assert recipe_slice(moved, sections) == recipe_slice(recipe, sections)
        assert str(tmp_path) not in text + str(recipe_slice(recipe, sections))
    served = load_recipe(TINY, (f"ai_labels.grader={{kind: llm, model: {base}, base_url: 'http://127.0.0.1:1/v1'}}",))
    assert moved_inputs(served, "/srv/machine/x")[1] == []  # a name on that server


def test_the_source_tree_installs_this_package() -> None:
    names = {item.name for item in source_tree()}
    assert {
        "source/pyproject.toml",
        "source/constraints.txt",
        "source/scripts/setup_env.sh",
        "source/src/suasion/cli.py",
    } <= names
    assert {"source/src/suasion/machines.yaml", "source/src/suasion/launch/remote/run.sh"} <= names
    assert not any(".git/" in name or "__pycache__" in name or name.startswith("source/tests") for name in names)


def test_settings_are_read_by_the_shell(tmp_path) -> None:
    session = Session(name="a.b-c", id="x", account="1", region="r", max_hours=1, max_dollars=1, s3="s3://b/p")
    (tmp_path / "settings").write_text(settings(session, ("anthropic", "wandb")))
    said = subprocess.run(
        ["bash", "-c", '. ./settings; echo "$NAME|$S3|$EXTRAS|$LINGER_MINUTES"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "a.b-c|s3://b/p|anthropic,wandb|60\n"
