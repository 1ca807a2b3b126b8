"""`suasion launch RECIPE --on aws`, and `launch status | logs | fetch | stop | sweep-up`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from suasion.errors import UsageError, UserError
from suasion.launch.say import say
from suasion.progress import console


class _RecipeFirst(TyperGroup):
    """`launch RECIPE ...` is `launch start RECIPE ...`: the recipe stands where a subcommand's name would."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["start", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RecipeFirst,
    help="Run a recipe on a rented machine that ends by itself: suasion launch RECIPE --on aws",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run, for example persuasion-rl.")]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where run directories stand.")]
RegionOption = Annotated[str | None, typer.Option(metavar="REGION", help="AWS region; AWS_REGION or your profile's if not said.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
AddressOption = Annotated[
    str, typer.Option(metavar="IPv4", help="Your address, the only one that is let in; asked for if not said.")
]


@app.command("start", hidden=True)
def start(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    on: Annotated[Literal["aws"], typer.Option("--on", help="Where: aws.")],
    max_dollars: Annotated[float, typer.Option(min=0.1, help="The machines of this launch together never cost more.")] = 25.0,
    max_hours: Annotated[float, typer.Option(min=0.2, help="Nor run longer.")] = 24.0,
    types: Annotated[
        str, typer.Option(metavar="TYPE,...", help="Allowed instance types; without, all of the table on which the recipe fits.")
    ] = "",
    market: Annotated[Literal["cheapest", "on-demand", "spot"], typer.Option(help="How to rent.")] = "cheapest",
    region: RegionOption = None,
    s3: Annotated[
        str,
        typer.Option(
            "--s3", metavar="s3://BUCKET/PREFIX", help="Copy results there too, so that nobody need be there at the end."
        ),
    ] = "",
    address: AddressOption = "",
    pass_env: Annotated[
        list[str] | None,
        typer.Option(
            "--pass-env",
            metavar="NAME",
            help="Environment variable to hand over, e.g. HF_TOKEN; it stays in the machine's memory.",
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe.")] = None,
    runs: RunsOption = Path("runs"),
    detach: Annotated[bool, typer.Option("--detach", help="Leave once it runs; go on with: launch logs NAME")] = False,
    yes: YesOption = False,
) -> None:
    """Rent the cheapest machine that will do, run the recipe there, fetch its stages, and remove everything again.

    Shows price and estimate first and asks. Ctrl-C ends the machine; stages fetched so far stay.
    """
    from suasion.launch.account import Account
    from suasion.launch.flow import Launch, caller_address, host_of, parse_s3, run_once
    from suasion.launch.machine import moved_inputs, needs_of, source_tree
    from suasion.launch.offers import find_offers
    from suasion.launch.quote import candidates, handed_over, quote
    from suasion.launch.session import in_charge, new_session, refuse_launched
    from suasion.pipeline import require_same_recipe
    from suasion.recipe import load_recipe

    # What can be known without AWS: a machine that lacks something must not be found out when it costs.
    loaded = load_recipe(recipe, tuple(set_ or ()))
    needs = needs_of(loaded)
    environment = handed_over(pass_env or [], needs)
    if s3:
        parse_s3(s3)
    moved_inputs(loaded, "")
    source_tree()
    known = candidates(loaded, [name.strip() for name in types.split(",") if name.strip()])

    account, run = Account(region), runs / loaded.name
    session = new_session(run, account, max_hours, max_dollars, s3.rstrip("/"))
    _fetch_earlier(account, session, run)
    require_same_recipe(loaded, runs)
    if _is_done(loaded, runs):
        return

    markets: list[Any] = ["on-demand", "spot"] if market == "cheapest" else [market]
    agreed: float | None = None  # dollars an hour
    with ExitStack() as held:
        while True:
            offers, refused = find_offers(account, known.types, markets, known.table)
            offers = known.taken_in_turn(offers, agreed)
            for why in refused:
                say(f"  {why}", "dim")
            for line in quote(offers, known, session):
                console.print(line)
            if detach and not s3:
                console.print(
                    "[yellow]--detach without --s3: results wait on the machine until an hour after the run's end, not longer; be back with launch logs[/]"
                )
            if agreed is None:
                if not yes and not typer.confirm("rent it?"):
                    raise typer.Exit(0)
                if not held.enter_context(in_charge(run)):
                    raise UsageError(
                        f"another suasion launch is at work on {run}. Look at it with: suasion launch status {run.name}"
                    )
                refuse_launched(run)  # another terminal may have asked, rented and left meanwhile
                if _is_done(loaded, runs):
                    return
                session.had = _how_far(loaded, runs)
                agreed = offers[0].price
            launch = Launch(
                account, loaded, run, session, known.table, address or caller_address(), known.volume_gb, environment, host_of,
                None if address else caller_address, needs.extras,
            )  # fmt: skip
            with interrupted_by_hangup():
                ended = run_once(launch, offers, detach)
            ended = _with_copies(launch, ended)
            if ended.how != "reclaimed":
                break
            say("the machine was taken back; going on with another from what is finished here", "yellow")
    if ended.how == "running":
        say(f"it runs. suasion launch logs {loaded.name} follows it, suasion launch stop {loaded.name} ends it.")
        return
    _finish(ended, loaded.name, runs)


@app.command()
def status(name: NameArgument, runs: RunsOption = Path("runs")) -> None:
    """Show a launched run: its machine, what it has cost, its stages."""
    from suasion.launch.resources import instance_facts

    account, session, run = _open(name, runs)
    console.print(f"{name}: {session.state}, AWS account {session.account}, {session.region}; {session.offer}")
    if session.instance:
        facts = instance_facts(account, session.instance)
        hours = _hours_now(session)
        console.print(
            f"{session.instance}: {facts['state']} {facts['address']}; {hours:.2f} h, about ${session.spent_dollars + (hours - session.spent_hours) * session.hourly:.2f} "
            f"of ${session.max_dollars:.2f} and {session.max_hours:g} h"
        )
    if (run / "recipe.yaml").is_file():
        from suasion.status import print_status

        print_status(run, console)


@app.command()
def logs(name: NameArgument, runs: RunsOption = Path("runs"), address: AddressOption = "") -> None:
    """Follow a launched run to its end, fetching stages as they finish. Ctrl-C stops looking; the machine goes on."""
    from suasion.launch.flow import Ended, clean_up, follow
    from suasion.launch.session import in_charge, load_session

    launch = _launch(name, runs, address)
    if not launch.session.instance:
        if code := _made(launch):
            return _finish(Ended("finished", code), name, runs)
        raise UserError(f"{name} has no machine any more. Its log is {runs / name / 'launch' / 'log'}.")
    if not launch.session.address:
        raise UserError(f"{name}: {launch.session.instance} has no address yet. Give the same command again in a minute.")
    with ExitStack() as held:
        mine = held.enter_context(in_charge(launch.run))
        ended = follow(launch, launch.host_of(launch.session))
        try:
            ended = _with_copies(launch, ended)
        finally:
            session = launch.session
            if not mine and (mine := held.enter_context(in_charge(launch.run))):
                session = load_session(launch.run)  # the process in charge has ended, or died before it removed anything
            if mine and session.id == launch.session.id and session.state != "removed":
                clean_up(launch.account, session, launch.run)
        if not mine and ended.how == "reclaimed":
            say(
                "the spot machine was taken back; the command that rented it goes on with another. Follow that one with launch logs"
            )
            return
    _finish(ended, name, runs)


@app.command()
def fetch(name: NameArgument, runs: RunsOption = Path("runs"), address: AddressOption = "") -> None:
    """Fetch the stages that are finished by now, from the machine or, where it is gone, from S3."""
    from suasion.launch.fetching import fetch_stages
    from suasion.launch.ssh import Unreachable
    from suasion.launch.store import fetch_from_s3

    launch = _launch(name, runs, address)
    host = launch.host_of(launch.session)
    try:
        if not launch.session.address:
            raise Unreachable("its machine is gone")
        stages = host.run(f"bash {launch.folder}/poll.sh 0").split(b"\n")[1].decode().split()
        fetched = fetch_stages(host, launch.folder, launch.run, stages)
    except Unreachable as error:
        if not launch.session.s3:
            raise UserError(
                f"{name} cannot be reached ({error}) and copies nothing to S3. suasion launch status {name} says more."
            ) from error
        fetched = fetch_from_s3(launch.account, launch.session, launch.run)
    console.print(f"{len(fetched)} stage(s) fetched into {launch.run}")


@app.command()
def stop(name: NameArgument, runs: RunsOption = Path("runs")) -> None:
    """End a launched run's machine and remove everything that was made for it. Unfinished work is lost; fetch first."""
    from suasion.launch.flow import clean_up

    account, session, run = _open(name, runs)
    clean_up(account, session, run)


@app.command("sweep-up")
def sweep_up(region: RegionOption = None, yes: YesOption = False) -> None:
    """List everything that launches have made in this account and region and that is still there, and remove it."""
    from suasion.launch.account import Account, told
    from suasion.launch.resources import find_all, remove_all

    account = Account(region)
    unseen: list[str] = []
    with told("look for what launches made"):
        found = find_all(account, note=unseen.append)
    console.print(f"AWS account {account.id}, {account.region}: {len(found)} thing(s)")
    for line in (*map(str, found), *unseen):
        console.print(f"  {line}", markup=False)
    if not found or not (yes or typer.confirm("remove all of it, running machines included?")):
        return
    left = remove_all(account, note=lambda line: say(f"  {line}", "dim"))
    if left:
        raise UserError("still there:\n  " + "\n  ".join(map(str, left)) + "\nRun it again, or remove it in the console.")
    console.print("nothing is left" + "".join(f"; {line}" for line in unseen))


@contextmanager
def interrupted_by_hangup() -> Iterator[None]:
    """Let a closed terminal and SIGTERM end a launch as Ctrl-C does: by removing everything.

    The first of them makes deaf for others, of which a closed terminal sends several: none may come between here and the removal. Who
    asked for one to be ignored (nohup) has it ignored.
    """

    def interrupt(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    heard = [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(name: str, runs: Path) -> Any:
    from suasion.launch.account import Account
    from suasion.launch.session import load_session, require_same_account

    session = load_session(runs / name)
    account = Account(session.region)
    require_same_account(session, account)
    return account, session, runs / name


def _launch(name: str, runs: Path, address: str) -> Any:
    """A launch that is under way, with the caller's present address let in."""
    from suasion.launch.flow import Launch, caller_address, host_of, let_in
    from suasion.machines import load_machines
    from suasion.status import load_run

    account, session, run = _open(name, runs)
    _, recipe = load_run(run)
    launch = Launch(
        account, recipe, run, session, load_machines(), "", 0, {}, host_of, (lambda: address) if address else caller_address
    )
    if session.address:
        let_in(launch)
    return launch


def _fetch_earlier(account: Any, session: Any, run: Path) -> None:
    """Stages that an earlier launch had copied to S3; and a bucket that is not there is found out now."""
    from suasion.launch.store import fetch_from_s3

    if session.s3 and (copied := fetch_from_s3(account, session, run)):
        console.print(f"{len(copied)} stage(s) of {run.name} stood in {session.s3}: fetched, they are not made again")


def _with_copies(launch: Any, ended: Any) -> Any:
    """How a launch ended once what a machine that is gone had copied to S3 is here too: with all of it, the machine was done."""
    from suasion.launch.flow import Ended
    from suasion.launch.store import fetch_from_s3

    if ended.how not in ("reclaimed", "gone"):
        return ended
    if launch.session.s3:
        try:
            fetched = fetch_from_s3(launch.account, launch.session, launch.run)
            say(f"{len(fetched)} more stage(s) fetched from {launch.session.s3}")
        except (UserError, OSError) as error:  # what is missing is made again
            say(str(error), "yellow")
    code = _made(launch)
    return Ended("finished", code) if code else ended


def _made(launch: Any) -> str:
    """The exit code that the stages that are here stand for, where the launch has brought them that far; else ''."""
    code = _how_far(launch.recipe, launch.run.parent)
    return code if code != launch.session.had else ""


def _how_far(recipe: Any, runs: Path) -> str:
    """The exit code of a run that has made all stages that are here: '0', or '3' where only those lack that wait for people; else ''.

    With people's labels here, provisional stages and the arms that waited are still to be made.
    """
    from suasion.launch.fetching import is_provisional
    from suasion.pipeline import needs_people, open_run

    directory = open_run(recipe, runs)
    missing = {stage for stage in directory.folders if directory.state(stage) != "complete"}
    if "human-labels" in missing:
        return "3" if missing <= needs_people(recipe) | {"human-labels"} else ""
    return "" if missing or any(is_provisional(directory.path, folder) for folder in directory.folders.values()) else "0"


def _is_done(recipe: Any, runs: Path) -> bool:
    """Says so where a run needs no machine."""
    if _how_far(recipe, runs) != "0":
        return False
    run = runs / recipe.name
    console.print(f"nothing to do: all stages of {run} are complete, and nothing was rented. suasion report {run}")
    return True


def _hours_now(session: Any) -> float:
    import time

    return float(session.spent_hours + ((time.time() - session.started) / 3600 if session.started else 0.0))


def _finish(ended: Any, name: str, runs: Path) -> None:
    """Say how it ended; leave with the run's own exit code."""
    if ended.how == "finished":
        console.print(f"{runs / name} is here: suasion report {runs / name}, suasion verify {runs / name}")
        if ended.detail == "3":
            console.print(
                "[yellow]waiting for people:[/] label the pairs here, then run or launch the same recipe again: it goes on."
            )
            raise typer.Exit(3)
        return
    if ended.how == "gone":
        raise UserError(
            f"the machine is gone ({ended.detail or 'no reason given'}): it reached its cap, was stopped, or ended an hour after the run. What was "
            f"fetched is in {runs / name}: look with suasion status {runs / name}. Launch the same recipe again and it goes on from there."
        )
    if ended.how == "reclaimed":
        raise UserError(
            f"the spot machine was taken back. What it had is in {runs / name}; launch the same recipe again: it goes on."
        )
    raise UserError(
        f"the run ended with exit code {ended.detail}; the log is {runs / name / 'launch' / 'log'}, and what it had is in {runs / name}. Mend the "
        "cause, then launch the same recipe again: it goes on."
    )
