"""A launch from the offer to the fetched report, and its end in every case: finished, failed, interrupted, taken back, capped.

One rule holds it together: whatever happens after the first thing is made, everything of the session is removed, found by its tags and not
by what is remembered here; and the machine ends by itself at the cap if nobody is left to do it.
"""

from __future__ import annotations

import ipaddress
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.launch.account import Account, code_of, told
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
)
from suasion.launch.session import Session, key_file, make_key, remove_key, save_session
from suasion.launch.ssh import Host, Unreachable
from suasion.machines import MachineTable
from suasion.pipeline import open_run
from suasion.progress import console, duration
from suasion.recipe import Recipe
from suasion.records import read_json, sha256_file
from suasion.rundir import MANIFEST, Manifest

WHO_AM_I = "https://checkip.amazonaws.com"  # AWS's own, plain text
BOOT_SECONDS = 600.0
POLL_SECONDS = 10.0
GONE = ("terminated", "shutting-down", "stopped", "stopping", "absent")
TAKEN_BACK = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")  # AWS: StateReason codes of DescribeInstances
NOT_FETCHED = {"labels.db"}  # people may have labelled here meanwhile
NOT_UPLOADED = {"launch", "attic", "logs", "recipe.yaml", ".lock"}


@dataclass(frozen=True)
class Ended:
    """How a machine ended: finished, failed, reclaimed or gone; with the run's exit code, or what AWS says."""

    how: str
    detail: str = ""


@dataclass
class Launch:
    """What a launch needs to know. host_of says where a session's machine is reached; learn, what the caller's address is by now (None: it was
    named); extras: of the package, to be installed there; poll: the pause between looks, in seconds."""

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
    except (OSError, ValueError) as error:
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
    launch.save()
    if not (launch.run / "recipe.yaml").is_file():
        open_run(launch.recipe, launch.run.parent).write_recipe(launch.recipe)
    failure: UserError | None = None
    try:
        rent(launch, offers)
        host = launch.host_of(launch.session)
        deploy(launch, host)
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
    refusals = []
    for offer in offers:
        hourly = offer.ceiling + launch.table.side_costs(launch.volume_gb)
        hours = session.hours_left(hourly)
        if hours < 0.1:
            raise UserError(
                f"the caps leave {max(hours, 0):.2f} hours on {offer}: raise --max-hours or --max-dollars "
                f"(so far {session.spent_hours:.2f} h, ${session.spent_dollars:.2f})."
            )
        image = images.setdefault(offer.gpus > 0, find_image(account, offer.gpus > 0))
        group, subnet = make_access(account, session, public_key, launch.caller, offer.zone)
        session.launches += 1
        session.offer = str(offer)
        launch.save()
        try:
            with told(f"start {offer}"):
                try:
                    session.instance = start_instance(
                        account, session, offer, image, group, subnet, launch.volume_gb, user_data(hours), profile
                    )
                except ClientError as error:
                    if code_of(error) not in NOT_TO_BE_HAD:
                        raise
                    refusals.append(f"{offer.type} {offer.market} in {offer.zone}: {code_of(error)}")
                    console.print(f"  [yellow]{refusals[-1]}; trying the next[/]")
                    continue
        finally:
            launch.save()
        session.begin(hourly)
        launch.save()
        console.print(f"started {session.instance}: {offer}; it ends by itself in {duration(hours * 3600)} at the latest")
        wait_for_address(launch)
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
    console.print(f"waiting for {host.address} to let us in")
    host.wait(launch.boot)
    home = host.run("pwd").decode().strip()
    text, inputs = moved_inputs(launch.recipe, f"{home}/{launch.folder}")
    earlier = [
        Upload(path, f"runs/{launch.session.name}/{path.name}")
        for path in sorted(launch.run.iterdir())
        if path.name not in NOT_UPLOADED
    ]
    console.print(
        f"sending package, recipe and {len(inputs)} inputs{f', and {len(earlier)} parts of the run so far' if earlier else ''}"
    )
    host.push(
        [*source_tree(), *scripts(), *inputs, *earlier], {"recipe.yaml": text, "settings": settings(launch.session, launch.extras)}, launch.folder
    )  # fmt: skip
    launch.session.log_read = 0
    console.print("installing the pinned packages (a few minutes)")
    tokens = "".join(f"{name}={value}\n" for name, value in launch.environment.items())
    try:
        host.run(f"bash {launch.folder}/install.sh", stdin=tokens.encode(), timeout=1800)
    except UserError as error:
        raise UserError(f"{error}\n{_log_tail(host, launch.folder)}") from error


def follow(launch: Launch, host: Host) -> Ended:
    """Stream the log and fetch stages as they finish, until the run or the machine ends. A lost connection is waited out."""
    session, run = launch.session, launch.run
    log = run / "launch" / "log"
    while True:
        try:
            answer = host.run(f"bash {launch.folder}/poll.sh {session.log_read}")
            state, _, rest = answer.partition(b"\n")
            stages, _, said = rest.partition(b"\n")
            if said:
                with log.open("ab") as handle:
                    handle.write(said)
                console.print(said.decode(errors="replace"), end="", markup=False, soft_wrap=True)
                session.log_read += len(said)
                launch.save()
            fetch_stages(host, launch.folder, run, stages.decode().split())
            how, _, code = state.decode().partition(" ")
            if how in ("finished", "failed", "reclaimed") and not said:
                fetch_rest(host, launch, salvage=how != "finished")
                return Ended(how, code.strip())
            if said:
                continue  # there may be more of it
        except Unreachable as error:
            gone = _is_gone(launch)
            if gone:
                return gone
            console.print(f"[dim]no connection ({error}); the machine goes on, trying again[/]")
            let_in(launch)
        time.sleep(launch.poll)


def let_in(launch: Launch) -> None:
    """Admit the caller again where the address has changed since: another network, a new lease. Without an answer nothing changes."""
    if launch.learn is None:
        return
    try:
        address = launch.learn()
        if address != launch.caller:
            admit(launch.account, launch.session, address)
            launch.caller = address
            console.print(f"[dim]your address is {address} now, and is let in[/]")
    except UserError as error:
        console.print(f"[dim]{error}[/]")


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


def fetch_stages(host: Host, folder: str, run: Path, names: Sequence[str]) -> list[str]:
    """Fetch finished stages that are not here yet, each checked against the hashes of its own manifest before it counts.

    Returns the names of those that came. Raises Unreachable where the connection ends, UserError where a file is not what the manifest says.
    """
    fetched = []
    for name in names:
        if (run / name / MANIFEST).is_file():
            continue
        incoming = run / "launch" / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        host.pull([name], f"{folder}/runs/{run.name}", incoming)
        check_stage(incoming / name)
        if (run / name).exists():  # an unfinished attempt that the machine has finished
            shutil.rmtree(run / name)
        (incoming / name).replace(run / name)
        fetched.append(name)
        console.print(f"[green]fetched {name}[/]")
    return fetched


def check_stage(folder: Path) -> None:
    """Raises UserError where a fetched stage differs from its manifest."""
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    for name, output in manifest.outputs.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != output.sha256:
            raise UserError(
                f"{folder.name}/{name} did not arrive as it was written. Fetch it again with: suasion launch fetch NAME"
            )


def fetch_rest(host: Host, launch: Launch, salvage: bool) -> None:
    """Times, and of a run that did not finish the unfinished stage with its checkpoints and journals, so that another machine goes on."""
    run = launch.run
    incoming = run / "launch" / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    listed = host.run(f"ls {launch.folder}/runs/{run.name} 2> /dev/null || true").decode().split()
    names = [name for name in listed if name not in NOT_UPLOADED | NOT_FETCHED and not (run / name / MANIFEST).is_file()]
    host.pull(
        names if salvage else [name for name in names if name == "timings.json"], f"{launch.folder}/runs/{run.name}", incoming
    )
    for path in sorted(incoming.iterdir()):
        target = run / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    shutil.rmtree(incoming)


def clean_up(account: Account, session: Session, run: Path, wait: float = 5.0) -> None:
    """Remove everything of a session, deaf to Ctrl-C meanwhile. Raises UserError where something is left, and says what ends it."""
    with _uninterrupted():
        console.print("removing everything that was made")
        left = remove_all(account, session.id, wait=wait, note=lambda line: console.print(f"  [dim]{line}[/]", soft_wrap=True))
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
        console.print(f"nothing is left; {session.spent_hours:.2f} h, about ${session.spent_dollars:.2f}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    def say(number: int, frame: Any) -> None:
        console.print("  still removing what costs money; this takes a minute", style="yellow")

    try:
        before = {number: signal.signal(number, say) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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
