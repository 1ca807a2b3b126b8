"""A launch from the offer to the fetched report, and its end in every case: finished, failed, interrupted, taken back, capped.

One rule holds it together: whatever happens after the first thing is made, everything of the session is removed, found by its tags and not
by what is remembered here; and the machine ends by itself at the cap if nobody is left to do it.
"""

from __future__ import annotations

import fcntl
import http.client
import ipaddress
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.launch.account import Account, code_of, told
from suasion.launch.fetching import NOT_UPLOADED, fetch_rest, fetch_stages
from suasion.launch.machine import Upload, moved_inputs, scripts, settings, source_tree, user_data
from suasion.launch.offers import NOT_TO_BE_HAD, Offer
from suasion.launch.resources import (
    Image,
    admit,
    find_image,
    instance_facts,
    make_access,
    make_profile,
    remove_all,
    start_instance,
    subnet_of,
)
from suasion.launch.say import say
from suasion.launch.session import Session, key_file, make_key, remove_key, save_session
from suasion.launch.ssh import Host, Unreachable
from suasion.machines import MachineTable
from suasion.pipeline import open_run
from suasion.progress import duration
from suasion.recipe import Recipe

WHO_AM_I = "https://checkip.amazonaws.com"  # AWS's own, plain text
BOOT_SECONDS = 600.0
POLL_SECONDS = 10.0
PATIENCE_SECONDS = 1800.0  # with what fails here while the machine answers: a full disk can be mended meanwhile
LOOKS = 3  # for why a machine fell silent while it was set up: AWS says it a moment later
GONE = ("terminated", "shutting-down", "stopped", "stopping", "absent")
TAKEN_BACK = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")  # AWS: StateReason codes of DescribeInstances


@dataclass(frozen=True)
class Ended:
    """How a machine ended: finished, failed, reclaimed or gone; with the run's exit code, or what AWS says."""

    how: str
    detail: str = ""


@dataclass
class Launch:
    """What a launch needs to know. host_of says where a session's machine is reached; learn, what the caller's address is by now (None: it was
    named); extras: of the package, to be installed there; poll: the pause between looks, in seconds; patience: with what fails here while the
    machine answers."""

    account: Account
    recipe: Recipe
    run: Path
    session: Session
    table: MachineTable
    caller: str
    volume_gb: int
    environment: dict[str, str]
    host_of: Callable[[Session], Host]
    learn: Callable[[], str] | None = None
    extras: tuple[str, ...] = ()
    poll: float = POLL_SECONDS
    boot: float = BOOT_SECONDS
    patience: float = PATIENCE_SECONDS
    clean_up_wait: float = 5.0

    @property
    def folder(self) -> str:
        """The session's folder in the machine's home."""
        return self.session.label

    def save(self) -> None:
        """Remember the session."""
        save_session(self.run, self.session)


def host_of(session: Session) -> Host:
    """The session's machine at its public address."""
    return Host(session.address, key_file(session), session.user, session.port)


def caller_address(url: str = WHO_AM_I) -> str:
    """The address from which the caller reaches AWS. Raises UserError where it cannot be learned."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(ipaddress.IPv4Address(answer.read(64).decode().strip()))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"could not learn your address from {url} ({error}). Give it with --address, for example --address 203.0.113.7"
        ) from error


def parse_s3(text: str) -> tuple[str, str]:
    """'s3://bucket/some/prefix' -> (bucket, prefix). Raises UserError for anything else, quotes and blanks included."""
    bucket, _, prefix = text.removeprefix("s3://").strip("/").partition("/")
    fine = all(character.isalnum() or character in "-._/" for character in bucket + prefix)
    if not text.startswith("s3://") or not bucket or not prefix or not fine:
        raise UserError(f"--s3 {text}: write s3://BUCKET/PREFIX, both of letters, digits, '-', '.', '_'.")
    return bucket, prefix


def run_once(launch: Launch, offers: Sequence[Offer], detach: bool = False) -> Ended:
    """Rent one machine, run on it and see it end. Everything made is removed again, unless it was to be left running."""
    left_running = False
    if not (launch.run / "recipe.yaml").is_file():
        open_run(launch.recipe, launch.run.parent).write_recipe(launch.recipe)
    launch.session.state = "making"  # again, where an earlier machine was removed: whoever looks must find this one
    launch.save()
    failure: UserError | None = None
    try:
        rent(launch, offers)
        try:
            wait_for_address(launch)
            host = launch.host_of(launch.session)
            deploy(launch, host)
        except (Unreachable, UserError) as error:
            if taken := _taken_back(launch, LOOKS if isinstance(error, Unreachable) else 1):
                return taken
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"the machine stopped answering while it was set up ({error}). Look at your network, then run the same command again."
            ) from error
        launch.session.state = "running"
        launch.save()
        left_running = detach
        if detach:
            return Ended("running")
        return follow(launch, host)
    except UserError as error:
        failure = error
        raise
    finally:
        if not left_running:
            try:
                clean_up(launch.account, launch.session, launch.run, launch.clean_up_wait)
            except UserError as error:
                raise (UserError(f"{failure}\nAnd then: {error}") if failure else error) from error


def rent(launch: Launch, offers: Sequence[Offer]) -> Offer:
    """Make key, group and (for S3) profile, and start the first of the offers that can be had.

    Raises UserError where none can, or where the caps leave no time.
    """
    from botocore.exceptions import ClientError

    account, session = launch.account, launch.session
    public_key = make_key(session)
    launch.save()  # from here on things are made; what is made is findable by the session's tags
    profile = make_profile(account, session, *parse_s3(session.s3)) if session.s3 else ""
    images: dict[bool, Image] = {}
    refusals: list[str] = []

    def refuse(offer: Offer, why: str) -> None:
        refusals.append(f"{offer.type} {offer.market} in {offer.zone}: {why}")
        say(f"  {refusals[-1]}; trying the next", "yellow")

    for offer in offers:
        if (gpu := offer.gpus > 0) not in images:
            images[gpu] = find_image(account, gpu)
        image = images[gpu]
        hourly = offer.ceiling + launch.table.side_costs(image.volume_gb(launch.volume_gb))
        hours = session.hours_left(hourly)
        if hours < 0.1:
            raise UserError(
                f"the caps leave {max(hours, 0):.2f} hours on {offer}: raise --max-hours or --max-dollars "
                f"(so far {session.spent_hours:.2f} h, ${session.spent_dollars:.2f})."
            )
        place = subnet_of(account, offer.zone)
        if place is None:
            refuse(offer, f"no default subnet (aws ec2 create-default-subnet --availability-zone {offer.zone} makes one)")
            continue
        group = make_access(account, session, public_key, launch.caller, place.vpc)
        session.launches += 1
        session.offer = str(offer)
        launch.save()
        try:
            with told(f"start {offer}"):
                try:
                    session.instance = start_instance(
                        account, session, offer, image, group, place.id, launch.volume_gb, user_data(hours), profile
                    )
                except ClientError as error:
                    if code_of(error) not in NOT_TO_BE_HAD:
                        raise
                    refuse(offer, code_of(error))
                    continue
        finally:
            launch.save()
        session.begin(hourly)
        launch.save()
        say(f"started {session.instance}: {offer}; it ends by itself in {duration(hours * 3600)} at the latest")
        return offer
    raise UserError(
        "no machine could be had:\n  " + "\n  ".join(refusals) + "\nTry later, another --region, or the other market."
    )


def wait_for_address(launch: Launch) -> None:
    """Until the instance runs and has an address. Raises UserError where it ends before that."""
    session = launch.session
    end = time.monotonic() + launch.boot
    while True:
        facts = instance_facts(launch.account, session.instance)
        if facts["state"] == "running" and facts["address"]:
            session.address = facts["address"]
            launch.save()
            return
        if facts["state"] in GONE[:-1] or time.monotonic() > end:
            raise UserError(
                f"{session.instance} is {facts['state']} and not running ({facts['reason'] or 'no reason given'}). Run the same command again."
            )
        time.sleep(min(launch.poll, 5.0))


def deploy(launch: Launch, host: Host) -> None:
    """Send package, recipe, inputs and what exists of the run, and start the service."""
    say(f"waiting for {host.address} to let us in")
    host.wait(launch.boot)
    home = host.run("pwd").decode().strip()
    text, inputs = moved_inputs(launch.recipe, f"{home}/{launch.folder}")
    earlier = [
        Upload(path, f"runs/{launch.session.name}/{path.name}")
        for path in sorted(launch.run.iterdir())
        if path.name not in NOT_UPLOADED
    ]
    say(f"sending package, recipe and {len(inputs)} inputs{f', and {len(earlier)} parts of the run so far' if earlier else ''}")
    host.push(
        [*source_tree(), *scripts(), *inputs, *earlier], {"recipe.yaml": text, "settings": settings(launch.session, launch.extras)}, launch.folder
    )  # fmt: skip
    log = _log(launch.run)
    launch.session.log_start = log.stat().st_size if log.is_file() else 0
    launch.save()
    say("installing the pinned packages (a few minutes)")
    tokens = "".join(f"{name}={value}\n" for name, value in launch.environment.items())
    try:
        host.run(f"bash {launch.folder}/install.sh", stdin=tokens.encode(), timeout=1800)
    except UserError as error:
        raise UserError(f"{error}\n{_log_tail(host, launch.folder)}") from error


def follow(launch: Launch, host: Host) -> Ended:
    """Stream the log and fetch stages as they finish, until the run or the machine ends. A lost connection is waited out.

    What fails here while the machine answers is tried again too: a full disk is no reason to end a machine that computes. Raises UserError
    where it went on failing for as long as the launch's patience.
    """
    session, run = launch.session, launch.run
    log = _log(run)
    read = max(log.stat().st_size - session.log_start, 0) if log.is_file() else 0  # bytes of the machine's log
    failing: float | None = None  # since when
    while True:
        answered = False
        try:
            answer = host.run(f"bash {launch.folder}/poll.sh {read}")
            answered = True
            state, _, rest = answer.partition(b"\n")
            stages, _, said = rest.partition(b"\n")
            if said:
                _keep(log, session.log_start, read, said)
                say(said.decode(errors="replace"), end="")
                read += len(said)
            names = stages.decode().split()
            fetch_stages(host, launch.folder, run, names)
            how, _, code = state.decode().partition(" ")
            if how in ("finished", "failed", "reclaimed") and not said:
                fetch_rest(host, launch.folder, run, names, salvage=how != "finished")
                return Ended(how, code.strip())
            failing = None
            if said:
                continue  # there may be more of it
        except (Unreachable, UserError, OSError, subprocess.SubprocessError) as error:
            if isinstance(error, Unreachable):
                if gone := _is_gone(launch):
                    return gone
                let_in(launch)
            if isinstance(error, Unreachable) and not answered:
                failing = None
                say(f"no connection ({error}); the machine goes on, trying again", "dim")
            else:
                failing = failing or time.monotonic()
                if time.monotonic() - failing >= launch.patience:
                    raise UserError(
                        f"the machine answers, but for {duration(launch.patience)} this has failed: {error}\nMend that, then give the same command "
                        f"again: it goes on. What was fetched is in {run}."
                    ) from error
                say(f"{error}; trying again", "yellow")
        time.sleep(launch.poll)


def _log(run: Path) -> Path:
    return run / "launch" / "log"


def _keep(log: Path, start: int, position: int, said: bytes) -> None:
    """Add to the log here what is not in it yet: several commands may follow one machine. position: of `said` in the machine's own log."""
    with log.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        here = handle.seek(0, os.SEEK_END) - start
        handle.write(said[max(here - position, 0) :])


def let_in(launch: Launch) -> None:
    """Admit the caller again where the address has changed since: another network, a new lease. Without an answer nothing changes."""
    if launch.learn is None:
        return
    try:
        address = launch.learn()
        if address != launch.caller:
            admit(launch.account, launch.session, address)
            launch.caller = address
            say(f"your address is {address} now, and is let in", "dim")
    except UserError as error:
        say(str(error), "dim")


def _is_gone(launch: Launch) -> Ended | None:
    """What AWS says of a machine that does not answer; None where it runs, or where AWS cannot be asked either."""
    session = launch.session
    try:
        facts = instance_facts(launch.account, session.instance)
    except UserError as error:
        left = session.hours_left(session.hourly) - (time.time() - (session.started or 0)) / 3600
        if left < -0.25:
            raise UserError(
                f"{error} By its cap the machine has ended itself. Look again with: suasion launch status {session.name}"
            ) from error
        return None
    if facts["state"] not in GONE:
        return None
    return Ended("reclaimed" if facts["reason"] in TAKEN_BACK else "gone", facts["reason"])


def _taken_back(launch: Launch, looks: int) -> Ended | None:
    """That AWS took a machine back while it was set up; None where it did not."""
    for look in range(looks):
        if look:
            time.sleep(launch.poll)
        if gone := _is_gone(launch):
            return gone if gone.how == "reclaimed" else None
    return None


def clean_up(account: Account, session: Session, run: Path, wait: float = 5.0) -> None:
    """Remove everything of a session, deaf to Ctrl-C meanwhile. Raises UserError where something is left, and says what ends it."""
    with _uninterrupted():
        say("removing everything that was made")
        left = remove_all(account, session, wait=wait, note=lambda line: say(f"  {line}", "dim"))
        running = session.started is not None and any(item.kind in ("instance", "unknown") for item in left)
        hours = session.hours_left(session.hourly) - (time.time() - (session.started or 0)) / 3600 if running else 0.0
        if not running:  # one that may still run is not forgotten: logs, fetch and stop go on with it
            session.end()
        if left:
            save_session(run, session)
            raise UserError(
                "could not remove:\n  "
                + "\n  ".join(map(str, left))
                + "\nRemove it with: suasion launch sweep-up"
                + (f". The machine ends itself within {max(hours, 0):.1f} hours at its cap." if running else ".")
            )
        session.state = "removed"
        save_session(run, session)
        remove_key(session)
        say(f"nothing is left; {session.spent_hours:.2f} h, about ${session.spent_dollars:.2f}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    def not_now(number: int, frame: Any) -> None:
        say("  still removing what costs money; this takes a minute", "yellow")

    try:
        before = {number: signal.signal(number, not_now) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_tail(host: Host, folder: str) -> str:
    try:
        return host.run(f"tail -n 20 {folder}/log").decode(errors="replace")
    except (Unreachable, UserError):
        return ""
