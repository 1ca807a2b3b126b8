"""Results in S3, for a caller who was away when the machine ended."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from suasion.errors import UserError
from suasion.launch.account import Account, told
from suasion.launch.fetching import arriving, check_stage, is_final, is_here, is_provisional, put_in_place
from suasion.launch.flow import parse_s3
from suasion.launch.say import say
from suasion.launch.session import Session
from suasion.records import read_json
from suasion.rundir import MANIFEST, TIMINGS, Manifest, RunDir

STAGE = re.compile(rf"(\d\d-[\w.-]+)/{re.escape(MANIFEST)}")


def fetch_from_s3(account: Account, session: Session, run: Path) -> list[str]:
    """Fetch finished stages that are not here yet, and their times. Returns the names of the stages.

    A provisional one here gives way, to attic/, to one that was made once people had labelled.

    A stage counts only where its files are what its manifest says. One that is not whole, because the machine ended while it was sent, is
    named and left out: it is made again.
    """
    bucket, prefix = parse_s3(session.s3)
    base = f"{prefix}/{session.name}/"
    s3 = account.client("s3")
    fetched = []

    def get(key: str, folder: Path) -> Path:
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, base + key, str(target))
        return target

    with told(f"fetch from {session.s3}"):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=base)
        keys = {item["Key"].removeprefix(base) for page in pages for item in page.get("Contents", [])}
        for stage in sorted(found[1] for key in keys if (found := STAGE.fullmatch(key))):
            if is_final(run, stage):
                continue
            with arriving(run) as folder:
                try:
                    wanted = _outputs(get(f"{stage}/{MANIFEST}", folder), stage, keys)
                    if is_here(run, stage) and is_provisional(folder, stage):
                        continue  # most likely the same; certainly no better
                    for key in wanted:
                        get(key, folder)
                    check_stage(folder / stage)
                except UserError as error:
                    why = str(error).partition(". ")[0]
                    say(f"{stage} in {session.s3} is not whole and left out, a run makes it again: {why}", "yellow")
                    continue
                if is_final(run, stage):
                    continue  # another command was faster
                put_in_place(folder / stage, run / stage)
            fetched.append(stage)
        if TIMINGS in keys:
            with arriving(run) as folder:
                RunDir(run, {}).add_times(read_json(get(TIMINGS, folder)))
    return fetched


def _outputs(manifest: Path, stage: str, keys: Collection[str]) -> list[str]:
    """The keys of a stage's files; its folder in S3 holds older ones besides. Raises UserError where one is missing or none of its own."""
    try:
        names = Manifest.model_validate(read_json(manifest)).outputs
    except ValidationError as error:
        raise UserError(f"{MANIFEST}: {error.errors()[0]['msg']}") from error
    wanted = [f"{stage}/{name}" for name in names]
    for key in wanted:
        if key not in keys or ".." in Path(key).parts:
            raise UserError(f"{key} is missing")
    return wanted
