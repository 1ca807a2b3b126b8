"""`suasion launch` as a user gives it, to the fetched report: moto for AWS, a real sshd for the machine, and on it the tiny recipe itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("boto3")

from standing_machine import needs_sshd, standing_machine
from test_launch import TINY, command, left, server  # noqa: F401

from suasion.launch import flow
from suasion.launch.session import key_file, load_session
from suasion.launch.ssh import Host
from suasion.verify import verify_run

REPOSITORY = Path(__file__).parents[1]
ONE_ARM = "dpo=[{name: rlaif, labels: ai, pool: rlaif, learning_rate: 1.0e-2, epochs: 1, batch_size: 4}]"  # in half the time


@needs_sshd
@pytest.mark.slow
def test_from_the_command_to_the_fetched_report(server, tmp_path, monkeypatch) -> None:  # noqa: F811
    server.reset()
    monkeypatch.setenv("SUASION_STATE", str(tmp_path / "state"))
    runs = tmp_path / "runs"
    with standing_machine(tmp_path, SUASION_ENV=sys.prefix, PYTHONPATH=str(REPOSITORY / "src")) as standing:

        def host_of(session):
            standing.let_in(key_file(session).with_name("key.pub").read_text())
            return Host("127.0.0.1", key_file(session), standing.user, standing.port)

        monkeypatch.setattr(flow, "host_of", host_of)
        words = ("--on", "aws", "--region", "us-east-1", "--types", "g5.xlarge", "--address", "203.0.113.7", "--runs", str(runs))
        done = command(
            str(TINY), *words, "--set", ONE_ARM, "--market", "on-demand", "--max-dollars", "2", "--max-hours", "1", answer="y\n"
        )
        print(done.output)
        assert done.exit_code == 0, (done.output, done.exception)
        said = " ".join(done.output.split())
        order = (
            "cheapest: g5.xlarge on-demand",
            "rent it?",
            "waiting for 127.0.0.1 to let us in",
            "installing the pinned packages",
            "ready: torch",
            "fetched 03-sft",
            "fetched 10-report",
            "nothing is left; 0.0",
            "is here: suasion report",
        )
        places = [said.find(words) for words in order]
        assert -1 not in places, order[places.index(-1)]
        assert places == sorted(places)
    assert left(server) == []
    assert load_session(runs / "tiny").state == "removed"
    assert verify_run(runs / "tiny").faults == []
    assert (runs / "tiny" / "10-report" / "index.html").is_file()
