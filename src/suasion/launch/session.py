"""What the caller remembers of a launch: `runs/<name>/launch/session.json`, written before anything is made.

It holds no secret. The private key of the machine lies in the user's state folder, below the number of the AWS account, readable by the
user alone. A session belongs to one account: with the credentials of another, every command refuses.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from suasion.errors import UsageError, UserError
from suasion.launch.account import Account
from suasion.records import read_json, write_json

State = Literal["making", "running", "removed"]
LONGEST_ROLE = 64  # characters in the name of a role. AWS documentation "IAM and AWS STS quotas"


class Session(BaseModel):
    """One launch. Times are seconds since 1970; spent counts machines that have ended already. log_start: bytes of the log here that earlier
    machines wrote. had: the exit code that the stages that were here when it began stand for ('3': people were waited for), else ''."""

    model_config = ConfigDict(extra="ignore")  # another version may remember more, and its machine must still be found

    format: Literal["launch/1"] = "launch/1"
    name: str
    id: str
    account: str
    region: str
    state: State = "making"
    max_hours: float
    max_dollars: float
    hourly: float = 0.0
    started: float | None = None
    spent_hours: float = 0.0
    spent_dollars: float = 0.0
    launches: int = 0
    offer: str = ""
    instance: str = ""
    address: str = ""
    user: str = "ubuntu"
    port: int = 22
    s3: str = ""
    log_start: int = 0
    had: str = ""

    @property
    def label(self) -> str:
        """Name of everything that this session makes in the account."""
        return f"suasion-{self.name}-{self.id}"

    def hours_left(self, hourly: float) -> float:
        """Hours that a machine of this price may still run until one of the caps is reached."""
        return min(self.max_hours - self.spent_hours, (self.max_dollars - self.spent_dollars) / hourly)

    def begin(self, hourly: float) -> None:
        """A machine starts to cost."""
        self.hourly, self.started = hourly, time.time()

    def end(self) -> None:
        """It has ended: what it took is spent."""
        if self.started is not None:
            hours = (time.time() - self.started) / 3600
            self.spent_hours += hours
            self.spent_dollars += hours * self.hourly
        self.started, self.instance, self.address = None, "", ""


def new_session(run: Path, account: Account, max_hours: float, max_dollars: float, s3: str) -> Session:
    """A fresh session of a run directory. Raises UsageError where an earlier one has not ended, or where AWS takes no name as long."""
    refuse_launched(run)
    session = Session(
        name=run.name, id=secrets.token_hex(4), account=account.id, region=account.region, max_hours=max_hours, max_dollars=max_dollars, s3=s3
    )  # fmt: skip
    if s3 and (over := len(session.label) - LONGEST_ROLE) > 0:
        raise UsageError(
            f"with --s3 a role is made that is named {session.label}, and AWS takes at most {LONGEST_ROLE} characters: give the recipe a name "
            f"of at most {len(run.name) - over}, or leave --s3 out. Nothing was made."
        )
    return session


def refuse_launched(run: Path) -> None:
    """Raises UsageError where an earlier session has not ended."""
    if (old := session_file(run)).is_file():
        earlier = load_session(run)
        if earlier.state != "removed":
            raise UsageError(
                f"{run.name} is launched already ({old}: {earlier.state}). Look at it with: suasion launch status {run.name}, or end it with: "
                f"suasion launch stop {run.name}"
            )


def session_file(run: Path) -> Path:
    """Where a run directory's session stands."""
    return run / "launch" / "session.json"


def save_session(run: Path, session: Session) -> None:
    """Write it, by rename from a file of this process's own: `launch stop` may write at the same time."""
    file = session_file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_name(f"session-{os.getpid()}.json")
    write_json(own, session.model_dump(mode="json"))
    own.replace(file)


@contextmanager
def in_charge(run: Path) -> Iterator[bool]:
    """Whether this process is the one that ends the run's machines. One is, the others look on: where a spot machine is taken back, the
    one in charge may have the next one already. The lock goes with the process, so that kill -9 releases it."""
    folder = session_file(run).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            mine = False
        else:
            mine = True
        yield mine


def load_session(run: Path) -> Session:
    """Raises UsageError where there is none, UserError where it is broken."""
    file = session_file(run)
    if not file.is_file():
        raise UsageError(
            f"{run.name} was never launched from here (no {file}). suasion launch sweep-up lists what stands in the account."
        )
    try:
        return Session.model_validate(read_json(file))
    except ValidationError as error:
        raise UserError(
            f"{file} is broken: {error.errors()[0]['msg']}. suasion launch sweep-up finds what it made by its tags."
        ) from error


def require_same_account(session: Session, account: Account) -> None:
    """Raises UsageError where the credentials belong to another account than the session."""
    if session.account != account.id:
        raise UsageError(
            f"{session.name} was launched in AWS account {session.account}, your credentials belong to {account.id}. Set AWS_PROFILE to the "
            "account of the launch."
        )


def key_file(session: Session) -> Path:
    """The private key of a session's machines."""
    base = os.environ.get("SUASION_STATE") or Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "suasion"
    return Path(base) / "launch" / session.account / session.label / "key"


def make_key(session: Session) -> bytes:
    """Make the session's key pair here, so that the private half never leaves this machine. Returns the public half."""
    path = key_file(session)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.is_file():
        if shutil.which("ssh-keygen") is None:
            raise UserError("launch needs OpenSSH's client (ssh, ssh-keygen). Debian and Ubuntu: apt-get install openssh-client")
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", session.label, "-f", str(path)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    return path.with_name("key.pub").read_bytes()


def remove_key(session: Session) -> None:
    """Forget the private key once its machines are gone."""
    shutil.rmtree(key_file(session).parent, ignore_errors=True)
