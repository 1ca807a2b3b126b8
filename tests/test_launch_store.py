"""Results in S3, fetched from moto's server: stages that a machine could not send whole, files that are no longer of a stage, times."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("boto3")

from test_launch import Machine, aws, make, past_the_proxy, server, stage_in_s3  # noqa: F401

from suasion.launch.store import fetch_from_s3
from suasion.records import write_json


@pytest.fixture
def launch(aws, tmp_path):  # noqa: F811
    """A launch whose place in S3 is there and empty."""
    past_the_proxy("s3", aws.backend).create_bucket(Bucket="results")
    return make(tmp_path, Machine(), s3="s3://results/x")


@pytest.fixture
def put(aws, launch):  # noqa: F811
    s3 = past_the_proxy("s3", aws.backend)
    return lambda key, text: s3.put_object(Bucket="results", Key=f"x/tiny/{key}", Body=text.encode())


def fetch(launch) -> list[str]:
    return fetch_from_s3(launch.account, launch.session, launch.run)


def test_a_stage_that_is_not_whole_keeps_no_other_away(aws, launch, put, capsys) -> None:  # noqa: F811
    """The machine ended when its manifest was there and its adapter was not; or a manifest of another version."""
    stage_in_s3(aws, "01-corpus", "one\n")
    stage_in_s3(aws, "02-pools", "two\n")
    past_the_proxy("s3", aws.backend).delete_object(Bucket="results", Key="x/tiny/02-pools/rows.jsonl")
    stage_in_s3(aws, "03-sft", "thr", said="three\n")
    put("04-sample/manifest.json", "{}")
    put("05-ai-labels/manifest.json", "{")
    stage_in_s3(aws, "07-preferences", "seven\n")
    assert fetch(launch) == ["01-corpus", "07-preferences"]
    assert sorted(path.name for path in launch.run.iterdir()) == ["01-corpus", "07-preferences", "launch"]
    said = " ".join(capsys.readouterr().out.split())
    for name in ("02-pools", "03-sft", "04-sample", "05-ai-labels"):
        assert f"{name} in s3://results/x is not whole" in said
    assert not list((launch.run / "launch").glob("incoming*"))


def test_only_what_the_manifest_names_is_fetched(aws, launch, put) -> None:  # noqa: F811
    """A copy removes nothing, so that the checkpoints of a finished training stay in S3."""
    stage_in_s3(aws, "03-sft", "three\n")
    put("03-sft/checkpoints/checkpoint-10/state", "gigabytes")
    put("../manifest.json", "{}")
    put("launch/manifest.json", "{}")
    assert fetch(launch) == ["03-sft"]
    assert sorted(path.name for path in (launch.run / "03-sft").rglob("*")) == ["manifest.json", "rows.jsonl"]


def test_a_manifest_that_names_files_elsewhere_gets_none(aws, launch, put, tmp_path) -> None:  # noqa: F811
    stage_in_s3(aws, "03-sft", "three\n")
    manifest = json.loads(
        past_the_proxy("s3", aws.backend).get_object(Bucket="results", Key="x/tiny/03-sft/manifest.json")["Body"].read()
    )
    manifest["outputs"] = {"../../../escaped": manifest["outputs"]["rows.jsonl"]}
    put("03-sft/manifest.json", json.dumps(manifest))
    put("03-sft/../../../escaped", "three\n")
    assert fetch(launch) == []
    assert not list(tmp_path.rglob("escaped"))


def test_a_provisional_stage_here_gives_way_to_the_one_that_people_were_heard_for(aws, launch, put) -> None:  # noqa: F811
    stage_in_s3(aws, "07-preferences", "seven\n")
    assert fetch(launch) == ["07-preferences"]
    manifest = launch.run / "07-preferences" / "manifest.json"
    final = json.loads(manifest.read_text())
    here, older = ({**final, "facts": {"waiting": word}} for word in ("label 5", "label 10"))
    write_json(manifest, here)
    put("07-preferences/manifest.json", json.dumps(older))
    assert fetch(launch) == []
    put("07-preferences/manifest.json", json.dumps(final))
    assert fetch(launch) == ["07-preferences"]
    assert json.loads(manifest.read_text()) == final
    (attic,) = launch.run.glob("attic/*/07-preferences/manifest.json")
    assert json.loads(attic.read_text()) == here
    assert fetch(launch) == []


def test_times_come_along_and_those_of_here_stay(aws, launch, put) -> None:  # noqa: F811
    here, there = {"seconds": 1.0, "ended": "b"}, {"seconds": 2.0, "ended": "a"}
    put("timings.json", json.dumps({"corpus": [there], "sft": [there]}))
    assert fetch(launch) == []
    write_json(launch.run / "timings.json", {"corpus": [there], "sft": [here]})
    for _ in range(2):
        fetch(launch)
        assert json.loads((launch.run / "timings.json").read_text()) == {"corpus": [there], "sft": [here, there]}


def test_another_fetch_at_work_is_left_alone(aws, launch) -> None:  # noqa: F811
    stage_in_s3(aws, "01-corpus", "one\n")
    others = [launch.run / "launch" / name / "01-corpus" for name in ("incoming", f"incoming-{os.getpid() + 1}")]
    for folder in others:
        folder.mkdir(parents=True)
    assert fetch(launch) == ["01-corpus"]
    assert all(folder.is_dir() for folder in others)
