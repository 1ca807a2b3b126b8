"""Results in S3, for a caller who was away when the machine ended."""

from __future__ import annotations

import shutil
from pathlib import Path

from suasion.launch.account import Account, told
from suasion.launch.flow import check_stage, parse_s3
from suasion.launch.session import Session
from suasion.rundir import MANIFEST


def fetch_from_s3(account: Account, session: Session, run: Path) -> list[str]:
    """Fetch finished stages that are not here yet; each is checked against its manifest before it counts. Returns their names."""
    bucket, prefix = parse_s3(session.s3)
    base = f"{prefix}/{session.name}/"
    s3 = account.client("s3")
    fetched = []
    with told(f"fetch from {session.s3}"):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=base)
        keys = [item["Key"].removeprefix(base) for page in pages for item in page.get("Contents", [])]
        stages = sorted(key.removesuffix(f"/{MANIFEST}") for key in keys if key.count("/") == 1 and key.endswith(f"/{MANIFEST}"))
        for stage in stages:
            if (run / stage / MANIFEST).is_file():
                continue
            incoming = run / "launch" / "incoming"
            shutil.rmtree(incoming, ignore_errors=True)
            for key in (key for key in keys if key.startswith(f"{stage}/")):
                target = (incoming / key).resolve()
                if not target.is_relative_to(incoming.resolve()):
                    continue  # a key that climbs out of its folder is not one of ours
                target.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, base + key, str(target))
            check_stage(incoming / stage)
            if (run / stage).exists():
                shutil.rmtree(run / stage)
            (incoming / stage).replace(run / stage)
            fetched.append(stage)
    return fetched
