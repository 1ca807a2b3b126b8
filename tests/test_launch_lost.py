"""A launch and what is lost on the way: the terminal, the connection, a fetch, the machine. Nothing is left, and nothing healthy is ended."""

from __future__ import annotations

import errno
import functools
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("boto3")

from aws_server import IMAGE, MAKING
from standing_machine import needs_sshd, script, standing_machine, until
from test_launch import TINY, Machine, asked, aws, command, left, make, offers_of, past_the_proxy, server, start  # noqa: F401
from test_launch_machine import stage

from suasion.errors import UsageError, UserError
from suasion.launch import flow, resources
from suasion.launch.fetching import fetch_stages
from suasion.launch.flow import Ended, follow, run_once
from suasion.launch.machine import Upload
from suasion.launch.offers import family
from suasion.launch.session import in_charge, key_file, load_session, new_session, save_session, session_file
from suasion.launch.ssh import Host, Unreachable
from suasion.pipeline import PROVISIONAL, needs_people, open_run, recipe_slice, stages
from suasion.progress import console
from suasion.recipe import load_recipe
from suasion.records import sha256_file
from suasion.rundir import StageResult

REPOSITORY = Path(__file__).parents[1]
RENTS = """
import fcntl, functools, os, signal, termios
from test_launch import Machine
from suasion.cli import main
from suasion.launch import flow
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this was started under
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
flow.source_tree = list
flow.host_of = lambda session: Machine("running")
flow.Launch = functools.partial(flow.Launch, poll=0.1, clean_up_wait=0.0)
main()
"""


class Holding(Machine):
    """A machine that has finished stages, in a folder here, and a log; `faults` are raised, one a call, by its polls or pulls."""

    def __init__(
        self, says: str = "finished 0", names: tuple[str, ...] = (), folder: Path | None = None, log: bytes = b"", **faults
    ):
        super().__init__(says)
        self.names, self.folder, self.log, self.faults = names, folder, log, faults
        self.pulled: list[str] = []

    def fail(self, what: str) -> None:
        if self.faults.get(what):
            raise self.faults[what].pop()

    def run(self, command, stdin=b"", timeout=0):
        if command.startswith("ls "):
            return "\n".join(path.name for path in self.folder.iterdir()).encode() if self.folder else b""
        if "sha256sum" in command:
            files = [word for word in command.split() if word.endswith("/manifest.json") and (self.folder / word).is_file()]
            return "".join(f"{sha256_file(self.folder / word)}  {word}\n" for word in files).encode()
        if "poll.sh" not in command:
            return super().run(command, stdin, timeout)
        self.fail("poll")
        rest = self.log[int(command.split()[-1]) :]
        return f"{self.says}\n{' '.join(self.names)}\n".encode() + rest

    def pull(self, names, folder, into):
        super().pull(names, folder, into)
        self.fail("pull")
        for name in names:
            if self.folder and (self.folder / name).exists():
                self.pulled.append(name)
                shutil.copytree(self.folder / name, into / name)


@pytest.fixture
def quick(monkeypatch):
    """Commands that do not wait between looks."""
    monkeypatch.setattr(flow, "Launch", functools.partial(flow.Launch, poll=0.0, clean_up_wait=0.0))
    monkeypatch.setattr(flow.clean_up, "__defaults__", (0.0,))


@pytest.mark.parametrize("lost", ["terminal", "pipe"])
def test_a_closed_terminal_and_a_pipe_that_nobody_reads_leave_nothing(aws, tmp_path, lost) -> None:  # noqa: F811
    """What is said then cannot be said; it is removed all the same."""
    words = ("--on", "aws", "--region", "us-east-1", "--types", "g5.xlarge", "--address", "203.0.113.7", "--runs", str(tmp_path))
    paths = os.pathsep.join((str(REPOSITORY / "src"), str(REPOSITORY / "tests")))
    here, there = pty.openpty() if lost == "terminal" else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", RENTS, "launch", str(TINY), *words, "--yes"], env={**os.environ, "PYTHONPATH": paths},
        stdin=there if lost == "terminal" else subprocess.DEVNULL, stdout=there, stderr=there, start_new_session=True,
    )  # fmt: skip
    try:
        os.close(there)
        run = tmp_path / "tiny"
        until(lambda: session_file(run).is_file() and load_session(run).state == "running", 300)
        assert any(thing.startswith("i-") for thing in left(aws))
        os.close(here)
        if lost == "pipe":  # Ctrl-C ends `tee` as well
            process.send_signal(signal.SIGINT)
        process.wait(300)
    finally:
        process.kill()
        process.wait()
    assert left(aws) == []
    assert load_session(run).state == "removed"


def test_a_run_whose_log_cannot_be_shown_goes_on(aws, tmp_path, monkeypatch) -> None:  # noqa: F811
    class Closed:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            pass

    monkeypatch.setattr(console, "_file", Closed())
    monkeypatch.setattr(console, "quiet", False)
    launch = make(tmp_path, Holding(log=b"step 1\n"))
    assert run_once(launch, offers_of(launch)).how == "finished"
    assert (launch.run / "launch" / "log").read_bytes() == b"step 1\n"
    assert left(aws) == []


def test_what_ssh_says_is_no_markup(aws, tmp_path, capsys) -> None:  # noqa: F811
    launch = make(tmp_path, Holding(poll=[Unreachable("closed by [/fe80::1]")]))
    assert run_once(launch, offers_of(launch)).how == "finished"
    assert "no connection (closed by [/fe80::1])" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["01-corpus", "02-pools"])
def test_two_commands_that_fetch_at_once(tmp_path, monkeypatch, other) -> None:
    """`launch fetch` in a second terminal fetches the same stage or another, while the first is in the middle of one."""
    run, there = tmp_path / "tiny", tmp_path / "there"
    stage(there / "01-corpus", "one\n")
    stage(there / "02-pools", "two\n")
    fetched = []

    class First(Holding):
        def pull(self, names, folder, into):
            super().pull(names, folder, into)
            with monkeypatch.context() as second:
                second.setattr(os, "getpid", lambda: 2)
                fetched.append(fetch_stages(Holding(folder=there), "", run, [other]))

    assert fetch_stages(First(folder=there), "", run, ["01-corpus"]) == ([] if other == "01-corpus" else ["01-corpus"])
    assert fetched == [[other]]
    assert (run / "01-corpus" / "rows.jsonl").read_text() == "one\n"
    assert list((run / "launch").iterdir()) == []


HICCUPS = [OSError(errno.ENOSPC, "No space left on device"), UserError("on the machine: bash ended with 1"), subprocess.TimeoutExpired("ssh", 60)]  # fmt: skip


@pytest.mark.parametrize("error", HICCUPS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("moment", ["poll", "pull"])
def test_what_fails_here_while_the_machine_answers_is_tried_again(aws, tmp_path, moment, error) -> None:  # noqa: F811
    stage(tmp_path / "there" / "01-corpus", "one\n")
    launch = make(tmp_path, Holding(names=("01-corpus",), folder=tmp_path / "there", **{moment: [error, error]}))
    assert run_once(launch, offers_of(launch)).how == "finished"
    assert (launch.run / "01-corpus" / "rows.jsonl").read_text() == "one\n"
    assert left(aws) == []


def test_what_goes_on_failing_ends_it_and_is_named(aws, tmp_path) -> None:  # noqa: F811
    launch = make(tmp_path, Holding(names=("01-corpus",), pull=[HICCUPS[0]] * 3))
    launch.patience = 0.0
    with pytest.raises(UserError, match=r"No space left on device[\s\S]*same command again"):
        run_once(launch, offers_of(launch))
    assert left(aws) == []


def test_the_log_is_kept_once_whoever_follows_and_the_session_is_left_alone(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"of an earlier machine\n")
    start = log.stat().st_size  # noqa: F811
    flow._keep(log, start, 0, b"one\n")
    flow._keep(log, start, 0, b"one\ntwo\n")  # the second command asked before the first had written
    flow._keep(log, start, 4, b"two\nthree\n")
    assert log.read_bytes() == b"of an earlier machine\none\ntwo\nthree\n"


def test_a_follower_goes_on_where_the_log_here_ends(aws, tmp_path, capsys) -> None:  # noqa: F811
    launch = make(tmp_path, Holding(log=b"one\ntwo\n"))
    log = launch.run / "launch" / "log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"earlier\none\n")
    launch.session.log_start = len(b"earlier\n")
    launch.save()
    before = session_file(launch.run).read_bytes()
    assert follow(launch, launch.host_of(launch.session)).how == "finished"
    assert capsys.readouterr().out == "two\n"
    assert log.read_bytes() == b"earlier\none\ntwo\n"
    assert session_file(launch.run).read_bytes() == before


def test_only_the_command_in_charge_ends_the_machine(aws, start, tmp_path, monkeypatch, quick) -> None:  # noqa: F811
    """The others look on: after a spot machine was taken back they would end the one that replaced it."""
    launch = make(tmp_path, Machine("running"))
    run_once(launch, offers_of(launch), detach=True)

    def logs(says: str) -> str:
        monkeypatch.setattr(flow, "host_of", lambda session: Machine(says))
        done = command("logs", "tiny", "--runs", str(launch.run.parent), "--address", "203.0.113.7")
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    with in_charge(launch.run) as mine:
        assert mine
        logs("finished 0")
        assert "goes on with another" in logs("reclaimed 130")
        assert len(left(aws)) == 4
    logs("finished 0")
    assert left(aws) == []
    with in_charge(tmp_path / "tiny"):
        assert "another suasion launch is at work" in str(start("--yes").exception)


class Cut(Machine):
    """A machine whose n-th ssh call finds the connection lost."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.calls, self.was_cut = number, 0, False

    def count(self, error: Exception) -> None:
        self.calls += 1
        if self.calls == self.number:
            self.was_cut = True
            raise error

    def wait(self, seconds):
        self.count(UserError("192.0.2.1 did not let us in"))

    def run(self, command, stdin=b"", timeout=0):
        self.count(Unreachable("broken pipe"))
        return b"timings.json\n" if command.startswith("ls ") else super().run(command, stdin, timeout)

    def push(self, uploads, texts, folder):
        self.count(Unreachable("broken pipe"))
        super().push(uploads, texts, folder)

    def pull(self, names, folder, into):
        self.count(Unreachable("broken pipe"))
        super().pull(names, folder, into)


def test_a_connection_lost_between_any_two_ssh_calls_leaves_nothing(aws, tmp_path, monkeypatch) -> None:  # noqa: F811
    """And where that is because AWS took the machine back, another one can go on."""
    launch = make(tmp_path / "undisturbed", whole := Cut(0))
    offers = offers_of(launch)
    run_once(launch, offers)
    assert whole.calls == 7  # wait, pwd, push, install, poll, ls, pull
    original = flow.instance_facts
    taken_back = {"state": "shutting-down", "address": "", "reason": "Server.SpotInstanceTermination"}
    outcomes, said = [], []
    for number in range(1, 8):
        for taken in (False, True):
            cut = Cut(number)
            launch = make(tmp_path / f"{number}-{taken}", cut)
            monkeypatch.setattr(
                flow, "instance_facts", lambda *of, t=taken, c=cut: taken_back if t and c.was_cut else original(*of)
            )
            try:
                outcomes.append(run_once(launch, offers).how)
            except UserError as error:
                outcomes.append("ended")
                said.append(str(error))
            assert left(aws) == [], number
            assert load_session(launch.run).state == "removed"
    assert "did not let us in" in said[0]
    assert all("while it was set up (broken pipe)" in each for each in said[1:])
    assert outcomes == 4 * ["ended", "reclaimed"] + 3 * ["finished", "reclaimed"]


def finish(recipe, runs: Path, but: frozenset[str] = frozenset(), waiting: bool = False) -> None:
    """A finished run, of empty stages; waiting: as far as it goes while people label."""
    directory = open_run(recipe, runs)
    for each in stages(recipe):
        if each.name not in (but | needs_people(recipe) | {"human-labels"} if waiting else but):
            directory.folder(each.name).mkdir(parents=True)
            result = StageResult(facts={"waiting": "label"} if waiting and each.name in PROVISIONAL else {})
            directory.complete(each.name, recipe_slice(recipe, each.sections), {}, {}, result, {"device": "cpu", "dtype": "float32", "threads": 1})  # fmt: skip


MADE_AGAIN = ("07-preferences", "09-evaluate", "10-report")


def folders(runs: Path) -> tuple[str, ...]:
    """The finished stages of a run."""
    return tuple(sorted(path.parent.name for path in (runs / "tiny").glob("*/manifest.json")))


def waits(folder: Path) -> bool:
    """Whether the stages that are made again after the labelling are provisional; all are or none is."""
    (said,) = {'"waiting"' in (folder / name / "manifest.json").read_text() for name in MADE_AGAIN}
    return said


def test_what_was_provisional_is_fetched_once_people_have_labelled(aws, tmp_path) -> None:  # noqa: F811
    """The second launch makes preferences, evaluation and report again; the provisional ones that were sent are not fetched meanwhile."""
    recipe, there = load_recipe(TINY), tmp_path / "there" / "tiny"
    launch = make(tmp_path, machine := Holding(folder=there))
    finish(recipe, launch.run.parent, waiting=True)
    shutil.copytree(launch.run, there)
    assert fetch_stages(machine, "", launch.run, folders(there.parent)) == machine.pulled == []
    shutil.rmtree(there)
    finish(recipe, there.parent)
    machine.names = folders(there.parent)
    assert run_once(launch, offers_of(launch)) == Ended("finished", "0")
    assert not waits(launch.run)
    assert sorted(path.name for path in launch.run.glob("attic/*/*")) == list(MADE_AGAIN)
    assert len(machine.pulled) == len(set(machine.pulled))
    assert fetch_stages(machine, "", launch.run, machine.names) == []


def test_what_was_being_made_again_is_saved_from_a_machine_that_is_taken_back(aws, tmp_path) -> None:  # noqa: F811
    there = tmp_path / "there" / "tiny"
    launch = make(tmp_path, machine := Holding("reclaimed 130", folder=there))
    finish(load_recipe(TINY), launch.run.parent, waiting=True)
    finish(load_recipe(TINY), there.parent, frozenset({"evaluate"}))
    (there / "09-evaluate").mkdir()
    (there / "09-evaluate" / "journal.jsonl").write_text("half\n")
    machine.names = folders(there.parent)
    assert run_once(launch, offers_of(launch)).how == "reclaimed"
    assert [path.name for path in (launch.run / "09-evaluate").iterdir()] == ["journal.jsonl"]
    assert len(list(launch.run.glob("attic/*/09-evaluate/manifest.json"))) == 1


@pytest.mark.parametrize("people", ["labelled", "not yet"])
def test_a_second_launch_that_is_taken_back_rents_the_next_machine(aws, start, tmp_path, monkeypatch, people) -> None:  # noqa: F811
    """What was here when it began says nothing of what the machine has made."""
    recipe, ends = load_recipe(TINY), [Ended("reclaimed", "130"), Ended("finished", "0")]
    finish(recipe, tmp_path, waiting=True)

    def rented(launch, offers, detach):
        if people == "labelled" and len(ends) == 2:  # the arms are trained, the last stages are still the provisional ones
            finish(recipe, tmp_path / "there")
            for name in sorted(set(folders(tmp_path / "there")) - set(folders(tmp_path))):
                shutil.copytree(tmp_path / "there" / "tiny" / name, tmp_path / "tiny" / name)
        return ends.pop(0)

    monkeypatch.setattr(flow, "run_once", rented)
    done = start("--yes")
    assert (done.exit_code, done.exception, ends) == (0, None, []), done.output


def test_logs_of_a_second_launch_whose_machine_is_gone_do_not_say_that_it_is_done(aws, tmp_path, monkeypatch, quick) -> None:  # noqa: F811
    launch = make(tmp_path, Machine())
    finish(load_recipe(TINY), launch.run.parent, waiting=True)
    launch.session.had = "3"
    run_once(launch, offers_of(launch), detach=True)
    past_the_proxy("ec2", aws.backend).terminate_instances(InstanceIds=[launch.session.instance])
    monkeypatch.setattr(flow, "host_of", lambda session: Machine(raises=Unreachable("no route")))
    for said in ("the machine is gone", "no machine any more"):
        done = command("logs", "tiny", "--runs", str(launch.run.parent), "--address", "203.0.113.7")
        assert said in str(done.exception)
    assert left(aws) == []


def test_what_another_terminal_launched_before_the_answer_came_is_left_alone(aws, start, tmp_path, monkeypatch) -> None:  # noqa: F811
    other = make(tmp_path, Machine()).session

    def answer(question: str) -> bool:
        save_session(tmp_path / "tiny", other)
        return True

    monkeypatch.setattr("typer.confirm", answer)
    assert "launched already" in str(start().exception)
    assert load_session(tmp_path / "tiny").id == other.id
    assert not MAKING & set(aws.calls)


@pytest.mark.parametrize("end", ["died", "removed"])
def test_logs_removes_what_a_command_that_died_meanwhile_left(aws, tmp_path, monkeypatch, quick, end) -> None:  # noqa: F811
    launch = make(tmp_path, Machine("running"))
    run_once(launch, offers_of(launch), detach=True)
    charge = in_charge(launch.run)
    charge.__enter__()

    class Last(Machine):
        def run(self, command, stdin=b"", timeout=0):
            if "poll.sh" in command:
                if end == "removed":
                    flow.clean_up(launch.account, launch.session, launch.run)
                    aws.calls.clear()
                charge.__exit__(None, None, None)
            return super().run(command, stdin, timeout)

    monkeypatch.setattr(flow, "host_of", lambda session: Last("finished 0"))
    done = command("logs", "tiny", "--runs", str(launch.run.parent), "--address", "203.0.113.7")
    assert done.exit_code == 0, (done.output, done.exception)
    assert left(aws) == []
    assert load_session(launch.run).state == "removed"
    assert ("DescribeInstances" in aws.calls) == (end == "died")


def test_logs_before_the_machine_has_an_address(aws, tmp_path) -> None:  # noqa: F811
    launch = make(tmp_path, Machine())
    launch.session.instance = "i-0123456789abcdef0"
    launch.save()
    open_run(launch.recipe, launch.run.parent).write_recipe(launch.recipe)
    done = command("logs", "tiny", "--runs", str(launch.run.parent), "--address", "203.0.113.7")
    assert "i-0123456789abcdef0 has no address yet" in str(done.exception)


def test_a_machine_whose_set_up_failed_has_no_run_to_fetch(aws, tmp_path) -> None:  # noqa: F811
    class Bare(Machine):
        def pull(self, names, folder, into):
            raise Unreachable("the copy broke off: empty file")

    launch = make(tmp_path, Bare("failed setup"))
    launch.patience = 0.0
    assert run_once(launch, offers_of(launch)) == Ended("failed", "setup")
    assert left(aws) == []


@pytest.mark.parametrize("code", [0, 3])
def test_logs_of_a_machine_that_is_gone_after_its_work(aws, tmp_path, monkeypatch, quick, code) -> None:  # noqa: F811
    """The next morning: the machine has ended itself, S3 has everything."""
    recipe = load_recipe(TINY)
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    run_once(launch, offers_of(launch), detach=True)
    past_the_proxy("ec2", aws.backend).terminate_instances(InstanceIds=[launch.session.instance])
    finish(recipe, tmp_path / "there", waiting=bool(code))
    s3 = past_the_proxy("s3", aws.backend)
    s3.create_bucket(Bucket="results")
    for path in (tmp_path / "there" / "tiny").glob("*/*"):
        s3.put_object(Bucket="results", Key=f"x/tiny/{path.parent.name}/{path.name}", Body=path.read_bytes())
    monkeypatch.setattr(flow, "host_of", lambda session: Machine(raises=Unreachable("no route")))
    for _ in range(2):  # the second time there is no machine any more
        done = command("logs", "tiny", "--runs", str(launch.run.parent), "--address", "203.0.113.7")
        assert done.exit_code == code, (done.output, done.exception)
        assert "is here: suasion report" in " ".join(done.output.split())
        assert left(aws) == []


def test_a_run_that_is_complete_rents_nothing(aws, start, tmp_path, monkeypatch) -> None:  # noqa: F811
    finish(load_recipe(TINY), tmp_path)
    monkeypatch.setattr(flow, "run_once", lambda *arguments: pytest.fail("rented"))
    done = start("--yes")
    assert (done.exit_code, done.exception) == (0, None)
    assert "nothing to do: all stages" in done.output
    assert not MAKING & set(aws.calls)


def test_a_second_machine_is_known_while_it_is_made(aws, tmp_path, monkeypatch) -> None:  # noqa: F811
    launch = make(tmp_path, Machine())
    offers, states = offers_of(launch), []
    monkeypatch.setattr(flow, "deploy", lambda launch, host: states.append(load_session(launch.run).state))
    for _ in range(2):
        run_once(launch, offers)
    assert states == ["making", "making"]


def test_the_volume_that_is_rented_is_the_one_that_is_paid(aws, tmp_path, monkeypatch) -> None:  # noqa: F811
    launch = make(tmp_path, Machine())
    offers = offers_of(launch)
    monkeypatch.setattr(flow, "find_image", lambda account, gpu: resources.Image(IMAGE, "/dev/sda1", 200))
    run_once(launch, offers)
    assert asked(aws, "RunInstances")[0]["BlockDeviceMapping.1.Ebs.VolumeSize"] == "200"
    assert launch.session.hourly == pytest.approx(offers[0].ceiling + launch.table.side_costs(200))


def test_a_zone_without_subnet_or_addresses_is_passed_over_and_an_image_is_asked_for_once(aws, tmp_path) -> None:  # noqa: F811
    launch = make(tmp_path, Machine())
    offers = offers_of(launch)
    ec2 = past_the_proxy("ec2", aws.backend)
    (subnet,) = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [offers[0].zone]}])["Subnets"]
    ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    aws.no_capacity = {offers[1].zone}
    assert run_once(launch, offers).how == "finished"
    assert offers[2].zone in load_session(launch.run).offer
    assert len(asked(aws, "GetParameter")) == aws.calls.count("GetParameter") == 1
    aws.faults["RunInstances"] = (400, "InsufficientFreeAddressesInSubnet")
    launch = make(tmp_path / "other", Machine())
    with pytest.raises(UserError, match=r"no default subnet[\s\S]*InsufficientFreeAddressesInSubnet[\s\S]*Try later"):
        run_once(launch, offers)
    assert left(aws) == []


def test_roles_of_another_region_are_not_this_ones(aws, tmp_path) -> None:  # noqa: F811
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    elsewhere = launch.session.model_copy(update={"region": "eu-west-1", "id": "elsewhere"})
    resources.make_profile(launch.account, elsewhere, "results", "x")
    assert resources.find_all(launch.account) == []
    assert resources.remove_all(launch.account, wait=0.0) == []
    assert left(aws) == 2 * [elsewhere.label]


def test_roles_that_may_not_be_listed_are_removed_by_their_names(aws, tmp_path) -> None:  # noqa: F811
    for action in ("ListRoles", "ListInstanceProfiles"):
        aws.faults[action] = (403, "AccessDenied")
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    run_once(launch, offers_of(launch))
    assert left(aws) == []

    launch = make(tmp_path / "other", Machine(), s3="s3://results/x")
    resources.make_profile(launch.account, launch.session, "results", "x")
    told = command("sweep-up", "--region", "us-east-1", "--yes").output
    assert "roles could not be looked for: your credentials may not list them" in told
    assert "nothing is left" not in told
    aws.faults["DeleteRole"] = (403, "AccessDenied")
    (role,) = resources.remove_all(launch.account, launch.session, rounds=3, wait=0.0)
    assert (role.kind, role.id) == ("role", launch.session.label)


def test_a_launch_without_s3_does_not_ask_for_roles(aws, tmp_path) -> None:  # noqa: F811
    launch = make(tmp_path, Machine())
    run_once(launch, offers_of(launch))
    assert not {"ListRoles", "ListInstanceProfiles"} & set(aws.calls)


def test_a_name_that_is_too_long_for_a_role_is_refused_first(aws, tmp_path) -> None:  # noqa: F811
    account = make(tmp_path, Machine()).account
    assert new_session(tmp_path / ("n" * 60), account, 1, 1, "").s3 == ""
    assert new_session(tmp_path / ("n" * 47), account, 1, 1, "s3://results/x").label
    with pytest.raises(UsageError, match="a name of at most 47, or leave --s3 out"):
        new_session(tmp_path / ("n" * 48), account, 1, 1, "s3://results/x")


def test_quotas_by_family() -> None:
    known = {"g5.xlarge": "g", "gr6.4xlarge": "g", "vt1.3xlarge": "g", "p4d.24xlarge": "p", "p5en.48xlarge": "p", "c7i.large": "standard",
             "im4gn.large": "standard", "z1d.large": "standard"}  # fmt: skip
    others = ("inf2.xlarge", "trn1.2xlarge", "dl1.24xlarge", "hpc7a.12xlarge", "mac1.metal", "x2gd.large", "u-6tb1.metal")
    for name, group in {**known, **dict.fromkeys(others, "")}.items():
        assert family(name, "on-demand") == group, name
    assert family("p5en.48xlarge", "spot") == "p5"


def test_a_copy_that_is_not_whole_does_not_keep_the_next_machine_away(aws, start, monkeypatch) -> None:  # noqa: F811
    calls, ends = [], [Ended("reclaimed", "130"), Ended("finished", "0")]

    def fetch(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise UserError("03-sft/adapter did not arrive as it was written")
        return []

    monkeypatch.setattr("suasion.launch.store.fetch_from_s3", fetch)
    monkeypatch.setattr(flow, "run_once", lambda launch, offers, detach: ends.pop(0))
    done = start("--s3", "s3://results/x", "--yes")
    assert (done.exit_code, done.exception) == (0, None)
    assert "03-sft/adapter did not arrive" in done.output
    assert ends == []


def test_fetch_from_the_machine_and_from_s3_where_that_is_gone(aws, tmp_path, monkeypatch) -> None:  # noqa: F811
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    run_once(launch, offers_of(launch), detach=True)
    stage(tmp_path / "there" / "01-corpus", "one\n")
    stage(tmp_path / "there" / "02-pools", "two\n")
    fetch = ("fetch", "tiny", "--runs", str(launch.run.parent), "--address", "203.0.113.7")
    monkeypatch.setattr(flow, "host_of", lambda session: Holding("running", ("01-corpus",), tmp_path / "there"))
    for count in (1, 0):
        done = command(*fetch)
        assert done.exit_code == 0, (done.output, done.exception)
        assert f"{count} stage(s) fetched" in done.output
    assert (launch.run / "01-corpus" / "rows.jsonl").read_text() == "one\n"
    assert len(left(aws)) == 6  # it only fetches
    s3 = past_the_proxy("s3", aws.backend)
    s3.create_bucket(Bucket="results")
    for path in (tmp_path / "there").glob("*/*"):
        s3.put_object(Bucket="results", Key=f"x/tiny/{path.parent.name}/{path.name}", Body=path.read_bytes())
    monkeypatch.setattr(flow, "host_of", lambda session: Holding(poll=[Unreachable("no route")]))
    done = command(*fetch)
    assert done.exit_code == 0, (done.output, done.exception)
    assert (launch.run / "02-pools" / "rows.jsonl").read_text() == "two\n"
    launch.session.s3 = ""
    save_session(launch.run, launch.session)
    assert "cannot be reached (no route) and copies nothing to S3" in str(command(*fetch).exception)


# What runs on both machines: the first finishes one stage and is taken back in the middle of the next; the second starts with what came.
EXPERIMENT = """
trap 'exit 130' INT
mkdir -p runs/tiny; cd runs/tiny; ls; cat 02-pools/checkpoints/state
if [ -d 01-corpus ]; then rm -rf 02-pools; cp -r ../../source/prepared/02-pools .; echo done; exit 0; fi
cp -r ../../source/prepared/01-corpus .; mkdir -p 02-pools/checkpoints; echo half > 02-pools/checkpoints/state
while [ -d . ]; do sleep 0.05; done"""


@needs_sshd
def test_a_second_machine_goes_on_where_the_first_was_taken_back(aws, start, tmp_path, monkeypatch) -> None:  # noqa: F811
    source, run = tmp_path / "source", tmp_path / "tiny"
    script(source / "scripts" / "setup_env.sh", "echo set up")
    script(source / ".venv" / "bin" / "suasion", EXPERIMENT)
    stage(source / "prepared" / "01-corpus", "one\n")
    stage(source / "prepared" / "02-pools", "two\n")
    monkeypatch.setattr(flow, "source_tree", lambda: [Upload(source, "source")])
    monkeypatch.setattr(flow, "Launch", functools.partial(flow.Launch, poll=0.1, boot=60, clean_up_wait=0.0))
    machines = []
    with standing_machine(tmp_path) as standing:

        def host_of(session):
            if machines:  # the next one is a new one
                (standing.home / session.label).rename(standing.home / "taken-back")
            machines.append(session.instance)
            standing.let_in(key_file(session).with_name("key.pub").read_text())
            return Host("127.0.0.1", key_file(session), standing.user, standing.port)

        def take_back():
            until(lambda: (run / "01-corpus" / "manifest.json").is_file(), 120)
            folder = standing.home / load_session(run).label
            (folder / "notice").touch()  # as notice.sh does
            os.kill(int((folder / "pid").read_text()), signal.SIGINT)

        monkeypatch.setattr(flow, "host_of", host_of)
        amazon = threading.Thread(target=take_back)
        amazon.start()
        done = start("--market", "spot", "--yes")
        amazon.join()
    assert done.exit_code == 0, (done.output, done.exception)
    assert "the machine was taken back; going on with another" in done.output
    assert len(set(machines)) == 2
    assert (run / "02-pools" / "rows.jsonl").read_text() == "two\n"
    log = (run / "launch" / "log").read_text()
    assert log.count("set up\n") == 2
    assert "01-corpus\n02-pools\nhalf\ndone\n" in log  # what the second one found
    assert left(aws) == []
    assert load_session(run).spent_dollars > 0
