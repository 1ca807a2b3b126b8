"""Renting a machine on AWS, against moto's server over real HTTP: whatever goes wrong at whatever call, nothing is left running.

What is left is listed past the proxy, by a plain boto3 client, and not by the code under test.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import signal
import stat
import urllib.parse
from functools import lru_cache
from pathlib import Path

import pytest

boto3 = pytest.importorskip("boto3")

from aws_server import IMAGE, MAKING, serve  # noqa: E402
from boto3.exceptions import RetriesExceededError  # noqa: E402
from rich.console import Console  # noqa: E402

from suasion.errors import UsageError, UserError  # noqa: E402
from suasion.launch import flow, machine, resources  # noqa: E402
from suasion.launch.account import Account, told  # noqa: E402
from suasion.launch.flow import Launch, run_once  # noqa: E402
from suasion.launch.offers import QUOTAS, Offer, find_offers  # noqa: E402
from suasion.launch.say import say  # noqa: E402
from suasion.launch.session import key_file, load_session, new_session, require_same_account, save_session, session_file  # noqa: E402
from suasion.launch.store import fetch_from_s3  # noqa: E402
from suasion.machines import load_machines  # noqa: E402
from suasion.recipe import load_recipe  # noqa: E402
from suasion.records import read_json, write_json  # noqa: E402

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
TYPES = ["g5.xlarge"]


@pytest.fixture(scope="module")
def server():
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="not-a-secret", AWS_EC2_METADATA_DISABLED="true")
    with serve() as (aws, url):
        os.environ["AWS_ENDPOINT_URL"] = url
        yield aws
    account_of.cache_clear()
    past_the_proxy.cache_clear()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def aws(server, tmp_path, monkeypatch):
    server.reset()
    monkeypatch.setenv("SUASION_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(flow, "source_tree", list)  # ssh is tested elsewhere
    return server


class Machine:
    """Stands for the rented machine: lets in at once and says what the test wants. `sent` holds what went over 'ssh'."""

    address = "192.0.2.1"

    def __init__(self, says: str = "finished 0", raises: BaseException | None = None):
        self.says, self.raises, self.sent = says, raises, []

    def wait(self, seconds):
        pass

    def run(self, command, stdin=b"", timeout=0):
        self.sent.append((command, stdin))
        if "poll.sh" in command:
            if self.raises:
                raise self.raises
            return f"{self.says}\n\n".encode()
        return b"/srv/machine\n" if command == "pwd" else b""

    def push(self, uploads, texts, folder):
        self.sent.append((folder, "".join(texts.values()).encode()))

    def pull(self, names, folder, into):
        into.mkdir(parents=True, exist_ok=True)


@lru_cache
def account_of(attempts: int) -> Account:
    """One for all tests: botocore takes a second to read what EC2 can do."""
    return Account("us-east-1", attempts=attempts)


@lru_cache
def past_the_proxy(service: str, backend: int):
    return boto3.client(service, region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{backend}")


def make(tmp_path: Path, machine: Machine, attempts: int = 1, **more) -> Launch:
    account = account_of(attempts)
    recipe = load_recipe(TINY)
    run = tmp_path / "runs" / recipe.name
    session = new_session(run, account, more.pop("max_hours", 4.0), more.pop("max_dollars", 8.0), more.pop("s3", ""))
    environment = more.pop("environment", {})
    return Launch(
        account,
        recipe,
        run,
        session,
        load_machines(),
        "203.0.113.7",
        70,
        environment,
        lambda session: machine,
        poll=0.0,
        clean_up_wait=0.0,
    )


def offers_of(launch: Launch, markets=("on-demand",), types=TYPES) -> list[Offer]:
    return find_offers(launch.account, types, list(markets), launch.table)[0]


def left(aws) -> list[str]:
    """Everything in the account that costs or that a launch makes, listed past the proxy."""
    ec2, iam = past_the_proxy("ec2", aws.backend), past_the_proxy("iam", aws.backend)
    found = [
        f"{item['InstanceId']} {item['State']['Name']}"
        for reservation in ec2.describe_instances()["Reservations"]
        for item in reservation["Instances"]
        if item["State"]["Name"] != "terminated"
    ]
    found += [item["GroupName"] for item in ec2.describe_security_groups()["SecurityGroups"] if item["GroupName"] != "default"]
    found += [item["KeyName"] for item in ec2.describe_key_pairs()["KeyPairs"]]
    found += [item["VolumeId"] for item in ec2.describe_volumes()["Volumes"]]
    found += [item["RoleName"] for item in iam.list_roles(PathPrefix="/suasion/")["Roles"]]
    found += [item["InstanceProfileName"] for item in iam.list_instance_profiles(PathPrefix="/suasion/")["InstanceProfiles"]]
    return found


def asked(aws, action: str) -> list[dict[str, str]]:
    return [dict(urllib.parse.parse_qsl(body.decode())) for name, body in aws.requests if name == action]


def test_a_launch_makes_what_it_needs_and_removes_all_of_it(aws, tmp_path) -> None:
    machine = Machine()
    launch = make(tmp_path, machine, environment={"HF_TOKEN": "hf_very_secret"}, s3="s3://results/experiments")
    ended = run_once(launch, offers_of(launch))
    assert (ended.how, ended.detail) == ("finished", "0")
    assert left(aws) == []

    (request,) = asked(aws, "RunInstances")
    assert request["InstanceType"] == "g5.xlarge"
    assert request["ImageId"] == IMAGE
    assert request["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert request["MetadataOptions.HttpTokens"] == "required"
    assert request["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == "true"
    assert request["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
    assert int(request["BlockDeviceMapping.1.Ebs.VolumeSize"]) == 70
    assert request["IamInstanceProfile.Name"] == launch.session.label
    assert {value for key, value in request.items() if key.endswith("ResourceType")} == {"instance", "volume"}
    script = base64.b64decode(request["UserData"]).decode()
    assert "OnActiveSec=240min" in script  # 4 hours, below 8 dollars at 1.02 an hour
    (rule,) = asked(aws, "AuthorizeSecurityGroupIngress")
    assert (rule["IpPermissions.1.FromPort"], rule["IpPermissions.1.ToPort"]) == ("22", "22")
    assert rule["IpPermissions.1.IpRanges.1.CidrIp"] == "203.0.113.7/32"

    everything = b"".join(body for _, body in aws.requests) + script.encode() + session_file(launch.run).read_bytes()
    for secret in (b"hf_very_secret", b"not-a-secret", b"PRIVATE KEY"):
        assert secret not in everything
        assert base64.b64encode(secret)[:-3] not in everything
    assert [stdin for command, stdin in machine.sent if "install.sh" in command] == [b"HF_TOKEN=hf_very_secret\n"]
    assert not key_file(launch.session).exists()
    assert load_session(launch.run).state == "removed"


def test_the_guide_lists_every_right_that_a_launch_uses(aws, tmp_path) -> None:
    """And none of its own making: whoever gives exactly these rights can launch."""
    guide = (TINY.parents[1] / "docs" / "EXECUTION_GUIDE.md").read_text(encoding="utf-8")
    table = guide[guide.index("| service | rights |") : guide.index("| S3, with `--s3` |")]
    rights = {name.rpartition(":")[2] for name in re.findall(r"`([\w:]+\*?)`", table)}
    aws.faults["GetServiceQuota"] = (400, "NoSuchResourceException")  # then the default is asked for
    vars(account_of(1)).pop("id", None)  # whose it is is asked once, and the tests share an account
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    run_once(launch, offers_of(launch, ("on-demand", "spot")), detach=True)
    resources.admit(launch.account, launch.session, "198.51.100.4")
    flow.clean_up(launch.account, launch.session, launch.run, wait=0.0)
    assert left(aws) == []
    used = {
        name if not name.startswith("Describe") else "Describe*"
        for name in aws.calls
        if name not in ("GET", "PUT", "HEAD", "POST")
    }
    parts_of_calls = {"CreateTags", "TagRole", "TagInstanceProfile", "PassRole"}  # that make things
    assert used | parts_of_calls == rights


def test_the_caps_are_what_is_left_of_them(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine(), max_dollars=1.5, max_hours=10.0)
    launch.session.spent_dollars, launch.session.spent_hours = 0.5, 1.0
    run_once(launch, offers_of(launch))
    script = base64.b64decode(asked(aws, "RunInstances")[0]["UserData"]).decode()
    minutes = int(60 * 1.0 / (1.006 + launch.table.side_costs(70)))
    assert f"OnActiveSec={minutes}min" in script
    launch = make(tmp_path, Machine(), max_dollars=1.5)
    launch.session.spent_dollars = 1.45
    with pytest.raises(UserError, match="raise --max-hours or --max-dollars"):
        run_once(launch, offers_of(launch))
    assert left(aws) == []


def test_spot_is_never_dearer_than_the_cap_assumes(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    offers = offers_of(launch, ("spot",))
    assert {offer.market for offer in offers} == {"spot"}
    run_once(launch, offers)
    request = asked(aws, "RunInstances")[0]
    assert request["InstanceMarketOptions.MarketType"] == "spot"
    most = float(request["InstanceMarketOptions.SpotOptions.MaxPrice"])
    assert most == pytest.approx(1.1 * offers[0].price, abs=1e-6)
    assert launch.session.hourly == pytest.approx(
        most + launch.table.side_costs(70), abs=1e-6
    )  # the caps are counted at the dearest
    assert left(aws) == []


def test_offers_are_sorted_and_within_the_limits(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    offers = offers_of(launch, types=["g5.xlarge", "g6.xlarge"])
    assert [offer.price for offer in offers] == sorted(offer.price for offer in offers)
    assert (offers[0].type, offers[0].price, offers[0].vcpus, offers[0].gpus) == ("g6.xlarge", 0.8048, 4, 1)
    aws.quotas[QUOTAS["g", "spot"]] = 3.0
    _, refused = find_offers(launch.account, TYPES, ["on-demand", "spot"], launch.table)
    assert refused == [f"g5.xlarge spot: needs 4 vCPUs, your limit leaves 3 (quota {QUOTAS['g', 'spot']})"]


def test_no_price_list_falls_back_to_the_dated_table(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    aws.faults["GetProducts"] = (400, "AccessDeniedException")
    offer = offers_of(launch)[0]
    assert offer.price == launch.table.machines["g5.xlarge"].price
    assert str(launch.table.date) in offer.source


def test_no_quota(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    aws.quotas.update(dict.fromkeys(QUOTAS.values(), 0.0))
    with pytest.raises(UserError, match=r"needs 4 vCPUs, your limit leaves 0 \(quota L-DB2E81BA\)[\s\S]*Raise a quota"):
        offers_of(launch)
    assert not MAKING & set(aws.calls)


def test_an_account_that_never_asked_has_the_default_limit(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    aws.faults["GetServiceQuota"] = (400, "NoSuchResourceException")
    aws.quotas[QUOTAS["g", "on-demand"]] = 2.0
    with pytest.raises(UserError, match="your limit leaves 2"):
        offers_of(launch)
    assert aws.calls.count("GetAWSDefaultServiceQuota") == 1


def test_a_profile_that_ec2_does_not_know_yet_is_waited_for(aws, tmp_path, monkeypatch) -> None:
    """IAM says that it exists; RunInstances refuses it all the same for a while."""
    monkeypatch.setattr(resources, "WAIT_SECONDS", 0.0)
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    offers = offers_of(launch)
    original, message = (
        aws.number,
        f"Value ({launch.session.label}) for parameter iamInstanceProfile.name is invalid. Invalid IAM Instance Profile name",
    )

    def not_yet(name, body):
        number = original(name, body)
        if name == "RunInstances" and aws.calls.count(name) < 3:
            aws.faults[number] = (400, "InvalidParameterValue", message)
        return number

    monkeypatch.setattr(aws, "number", not_yet)
    assert run_once(launch, offers).how == "finished"
    assert aws.calls.count("RunInstances") == 3
    assert left(aws) == []
    launch = make(tmp_path / "other", Machine(), s3="s3://results/x")
    before, message = len(aws.calls), "Invalid value for another parameter"
    aws.faults["RunInstances"] = (400, "InvalidParameterValue", message)
    with pytest.raises(UserError, match=message):
        run_once(launch, offers)
    assert aws.calls[before:].count("RunInstances") == 1
    assert left(aws) == []


def test_what_runs_already_counts_against_the_limit(aws, tmp_path) -> None:
    ec2 = past_the_proxy("ec2", aws.backend)
    other = ec2.run_instances(ImageId=IMAGE, InstanceType="g5.xlarge", MinCount=1, MaxCount=1)
    aws.quotas[QUOTAS["g", "on-demand"]] = 7.0
    launch = make(tmp_path, Machine())
    with pytest.raises(UserError, match="your limit leaves 3"):
        offers_of(launch)
    ec2.terminate_instances(InstanceIds=[other["Instances"][0]["InstanceId"]])


def test_no_capacity_in_one_zone_means_the_next(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    offers = offers_of(launch)
    aws.no_capacity = {offers[0].zone}
    assert run_once(launch, offers).how == "finished"
    assert offers[1].zone in load_session(launch.run).offer
    assert left(aws) == []


def test_no_capacity_anywhere(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    offers = offers_of(launch)
    aws.no_capacity = {offer.zone for offer in offers}
    with pytest.raises(UserError, match="InsufficientInstanceCapacity"):
        run_once(launch, offers)
    assert left(aws) == []


@pytest.mark.parametrize(
    ("s3", "every"),
    [("", False), pytest.param("", True, marks=pytest.mark.slow), pytest.param("s3://results/x", True, marks=pytest.mark.slow)],
)
def test_a_connection_lost_between_any_two_calls_leaves_nothing(aws, tmp_path, monkeypatch, s3, every) -> None:
    """Every call of a launch in turn is cut off, before it does anything and after it did: ended or finished, nothing is left.

    The fast half takes the calls that make or end something; the slow one also those that look.
    """
    launch = make(tmp_path / "undisturbed", Machine(), s3=s3)
    offers = offers_of(launch)
    before = len(aws.calls)
    run_once(launch, offers)
    calls = aws.calls[before:]
    assert set(calls) >= {
        "ImportKeyPair",
        "CreateSecurityGroup",
        "AuthorizeSecurityGroupIngress",
        "RunInstances",
        "TerminateInstances",
    }
    assert ("CreateRole" in calls) == bool(s3)
    outcomes = set()
    for number, action in enumerate(calls):
        changing = action in MAKING | {"TerminateInstances"}
        for moment in ("before", "after") if changing else ("before",) if every else ():
            aws.reset()
            monkeypatch.setenv("SUASION_STATE", str(tmp_path / f"state-{number}-{moment}"))
            launch = make(tmp_path / f"{number}-{moment}", Machine(), s3=s3)
            aws.faults[len(aws.calls) + number] = moment  # the offers of the first launch are still good
            try:
                outcomes.add(run_once(launch, offers).how)
            except UserError:
                outcomes.add("ended")
            assert left(aws) == [], f"call {number}, {action}, cut off {moment}"
            assert load_session(launch.run).state == "removed"
    assert outcomes == {"finished", "ended"}


@pytest.mark.parametrize(
    "action", ["ImportKeyPair", "CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "RunInstances", "CreateRole"]
)
def test_an_answer_lost_once_is_asked_for_again_and_makes_one_thing(aws, tmp_path, monkeypatch, action) -> None:
    launch = make(tmp_path, Machine(), attempts=3, s3="s3://results/x")
    offers = offers_of(launch)
    seen = []
    monkeypatch.setattr(flow, "deploy", lambda launch, host: seen.append(left(aws)))
    original = aws.number
    first = []

    def once(name, body):
        number = original(name, body)
        if name == action and not first:
            first.append(number)
            aws.faults[number] = "after"
        return number

    monkeypatch.setattr(aws, "number", once)
    assert run_once(launch, offers).how == "finished"
    assert aws.calls.count(action) == 2
    (things,) = seen
    assert len([thing for thing in things if thing.startswith("i-")]) == 1
    assert things.count(launch.session.label) == 4  # group, key pair, role, profile
    assert left(aws) == []


def test_credentials_that_expire_after_the_start(aws, tmp_path) -> None:
    """Nothing can be removed then; the launch says so, the machine has its end in it, and new credentials remove everything."""
    launch = make(tmp_path, Machine())
    offers = offers_of(launch)
    original = aws.number

    def expire(name, body):
        if name == "RunInstances":
            aws.faults["*"] = None
            aws.expires = True
        elif getattr(aws, "expires", False):
            aws.faults["*"] = (401, "AuthFailure")
        return original(name, body)

    aws.number = expire
    try:
        with pytest.raises(UserError, match=r"could not remove[\s\S]*sweep-up[\s\S]*ends itself within 4.0 hours"):
            run_once(launch, offers)
    finally:
        del aws.number, aws.expires
    assert "OnActiveSec=240min" in base64.b64decode(asked(aws, "RunInstances")[0]["UserData"]).decode()
    assert load_session(launch.run).state != "removed"
    assert load_session(launch.run).instance.startswith("i-")  # not forgotten: it runs
    assert len(left(aws)) >= 3
    with pytest.raises(UsageError, match="is launched already"):
        new_session(launch.run, launch.account, 1, 1, "")
    aws.faults.clear()
    flow.clean_up(launch.account, launch.session, launch.run, wait=0.0)
    assert left(aws) == []


def test_expired_credentials_from_the_start(aws, tmp_path) -> None:
    aws.faults["*"] = (403, "ExpiredToken")
    with pytest.raises(UserError, match="expired or wrong: renew them"):
        new_session(tmp_path / "tiny", Account("us-east-1", attempts=1), 1, 1, "")
    aws.faults.clear()
    assert left(aws) == []


@pytest.mark.parametrize("says", ["failed 1", "reclaimed 130", "finished 3"])
def test_every_end_of_a_run_ends_the_machine(aws, tmp_path, says) -> None:
    launch = make(tmp_path, Machine(says))
    ended = run_once(launch, offers_of(launch))
    assert f"{ended.how} {ended.detail}" == says
    assert left(aws) == []


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also where the tests run in the background and inherited that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_machine_and_a_second_one_does_not_stop_that(aws, tmp_path, monkeypatch, interruptible) -> None:
    launch = make(tmp_path, Machine(raises=KeyboardInterrupt()))
    offers = offers_of(launch)
    looked = []
    original = resources.find_all

    def impatient(*arguments):
        looked.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(resources, "find_all", impatient)
    with pytest.raises(KeyboardInterrupt):
        run_once(launch, offers)
    assert len(looked) >= 2
    assert left(aws) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_machine_taken_back_without_a_word(aws, tmp_path, monkeypatch) -> None:
    launch = make(tmp_path, Machine(raises=flow.Unreachable("no route")))
    facts = iter([{"state": "running", "address": "192.0.2.1", "reason": ""}, {"state": "running", "address": "", "reason": ""},
                  {"state": "terminated", "address": "", "reason": "Server.SpotInstanceTermination"}])  # fmt: skip
    monkeypatch.setattr(flow, "instance_facts", lambda account, instance: next(facts))
    assert run_once(launch, offers_of(launch)).how == "reclaimed"
    assert left(aws) == []


def test_left_to_itself_it_stays_until_it_is_stopped(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    assert run_once(launch, offers_of(launch), detach=True).how == "running"
    session = load_session(launch.run)
    assert (session.state, len(left(aws))) == ("running", 4)  # machine, volume, group, key pair
    assert stat.S_IMODE(key_file(session).stat().st_mode) == 0o600
    flow.clean_up(launch.account, session, launch.run, wait=0.0)
    assert left(aws) == []


def test_the_region_comes_from_the_variable_that_the_message_names(server, monkeypatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert Account().region == "eu-west-1"
    assert Account("us-east-1").region == "us-east-1"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    with pytest.raises(UserError, match="or set AWS_REGION"):
        Account()


def test_another_accounts_credentials_are_refused(aws, tmp_path) -> None:
    launch = make(tmp_path, Machine())
    run_once(launch, offers_of(launch), detach=True)
    aws.account = "999999999999"
    other = Account("us-east-1", attempts=1)
    with pytest.raises(UsageError, match="launched in AWS account 123456789012, your credentials belong to 999999999999"):
        require_same_account(load_session(launch.run), other)
    theirs = launch.session.model_copy(update={"account": other.id})
    assert key_file(theirs) != key_file(launch.session)
    aws.account = ""
    flow.clean_up(launch.account, launch.session, launch.run, wait=0.0)


def test_sweep_up_finds_what_others_left_and_leaves_the_rest_alone(aws, tmp_path) -> None:
    ec2 = past_the_proxy("ec2", aws.backend)
    ec2.create_key_pair(KeyName="somebody's own")
    mine = ec2.run_instances(ImageId=IMAGE, InstanceType="t3.large", MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    for number in range(2):
        launch = make(tmp_path / str(number), Machine(), s3="s3://results/x")
        run_once(launch, offers_of(launch), detach=True)
    account = launch.account
    found = resources.find_all(account)
    assert sorted(item.kind for item in found) == sorted(
        2 * ["instance", "security group", "key pair", "instance profile", "role"]
    )
    assert {item.run for item in found} == {"tiny"}
    assert resources.remove_all(account, wait=0.0) == []
    assert sorted(thing.split()[0] for thing in left(aws) if not thing.startswith("vol")) == sorted([mine, "somebody's"])


def test_an_address_that_is_none(tmp_path) -> None:
    with pytest.raises(UserError, match="--address"):
        flow.caller_address((tmp_path / "nothing").as_uri())
    (tmp_path / "page").write_text("<html>log in first</html>")
    with pytest.raises(UserError, match="--address"):
        flow.caller_address((tmp_path / "page").as_uri())
    (tmp_path / "ip").write_text("203.0.113.7\n")
    assert flow.caller_address((tmp_path / "ip").as_uri()) == "203.0.113.7"


@pytest.mark.parametrize("text", ["results/x", "s3://bucket", "s3://bucket/x'; rm -rf /; '", "s3://bucket/a b"])
def test_an_s3_place_that_is_none(text) -> None:
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX"):
        flow.parse_s3(text)


def command(*words: str, answer: str | None = None):
    from typer.testing import CliRunner

    from suasion.cli import app

    return CliRunner().invoke(app, ["launch", *words], input=answer)


@pytest.fixture
def start(aws, tmp_path):
    """`suasion launch` of the tiny recipe from a known address into `tmp_path`, on the smallest machine where no others are named."""

    def call(*words: str, types: str = "g5.xlarge", answer: str | None = None):
        fixed = ("--on", "aws", "--region", "us-east-1", "--address", "203.0.113.7", "--runs", str(tmp_path))
        return command(str(TINY), *fixed, *(("--types", types) if types else ()), *words, answer=answer)

    return call


def test_price_and_estimate_are_shown_and_a_no_makes_nothing(aws, start, tmp_path) -> None:
    done = start("--market", "on-demand", "--max-dollars", "3", answer="n\n")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "cheapest: g5.xlarge on-demand in us-east-1a at $1.0060 an hour (Pricing API)" in text
    assert "estimate: " in text
    assert "caps: $3.00 and 24 h" in text
    assert "rent it?" in text
    unknown = start("--market", "on-demand", types="t3.large", answer="n\n")
    assert "no estimate: t3.large is not in the table of machines" in " ".join(unknown.output.split())
    assert not MAKING & set(aws.calls)
    assert not (tmp_path / "tiny").exists()


def test_no_machine_is_taken_that_costs_much_more_than_what_was_agreed(aws, start, monkeypatch) -> None:
    """Where nothing cheap can be had, a machine of eight GPUs is no substitute, unless it was named."""
    seen = []
    aws.quotas[QUOTAS["p", "on-demand"]] = 384.0
    monkeypatch.setattr(flow, "run_once", lambda launch, offers, detach: seen.append(offers) or flow.Ended("finished", "0"))
    done = start("--market", "on-demand", "--yes", "--max-hours", "0.2", types="")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "where that cannot be had, the next cheapest is taken, at most" in text
    assert "the caps end the machine before that" in text
    assert {offer.type for offer in seen[0]} == {"g6.xlarge", "g5.xlarge", "g5.2xlarge"}
    assert start("--market", "on-demand", "--yes", types="g5.xlarge,p5.48xlarge").exit_code == 0
    assert {offer.type for offer in seen[1]} == {"g5.xlarge", "p5.48xlarge"}


def test_a_machine_that_replaces_one_taken_back_costs_at_most_twice_what_was_agreed(aws, start, monkeypatch) -> None:
    """The yes, or --yes, was to a price; a machine of eight GPUs instead of one would be another question."""
    rounds, found = [], find_offers
    aws.quotas[QUOTAS["p", "on-demand"]] = 384.0
    monkeypatch.setattr(flow, "run_once", lambda launch, left, detach: rounds.append(left) or flow.Ended("reclaimed", "0"))

    def fewer(*arguments):
        everything, refused = found(*arguments)
        return [offer for offer in everything if not rounds or offer.price > 5 * rounds[0][0].price], refused

    monkeypatch.setattr("suasion.launch.offers.find_offers", fewer)
    done = start("--market", "on-demand", types="", answer="y\n")
    assert "more than twice the $0.8048 that you agreed to" in str(done.exception)
    assert "was taken back; going on with another" in done.output
    assert len(rounds) == 1
    assert done.output.count("rent it?") == 1


def test_what_the_machine_would_lack_is_said_before_it_is_rented(aws, start, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-one")
    judged = ("--set", "ai_labels.grader={kind: llm, model: some-model}")
    assert "give --pass-env OPENAI_API_KEY" in str(start(*judged).exception)
    done = start(*judged, "--pass-env", "OPENAI_API_KEY", answer="n\n")
    assert done.exit_code == 0, done.output
    assert "ai-labels asks a language model: its time and price are not in these hours" in " ".join(done.output.split())
    here = ("--set", "ai_labels.grader={kind: llm, model: some-model, base_url: 'http://127.0.0.1:8000/v1'}")
    assert "cannot reach" in str(start(*here).exception)
    tracked = ("--set", "sft.report_to=wandb")
    assert "WANDB_API_KEY" in str(start(*tracked).exception)
    assert machine.needs_of(load_recipe(TINY, ("sft.report_to=wandb",))).extras == ("wandb",)
    assert not MAKING & set(aws.calls)


def test_an_address_that_changed_is_let_in_and_the_old_one_is_not(aws, tmp_path, monkeypatch) -> None:
    launch = make(tmp_path, Machine())
    run_once(launch, offers_of(launch), detach=True)
    monkeypatch.setattr(flow, "host_of", lambda session: Machine())
    monkeypatch.setattr(resources.remove_all, "__defaults__", (None, 40, 0.0, lambda line: None))
    monkeypatch.setattr(flow.clean_up, "__defaults__", (0.0,))

    def admitted() -> list[str]:
        groups = past_the_proxy("ec2", aws.backend).describe_security_groups(GroupNames=[launch.session.label])["SecurityGroups"]
        return [one["CidrIp"] for rule in groups[0]["IpPermissions"] for one in rule["IpRanges"]]

    launch.learn = lambda: "198.51.100.4"
    flow.let_in(launch)
    assert admitted() == ["198.51.100.4/32"]
    flow.let_in(launch)
    assert aws.calls.count("AuthorizeSecurityGroupIngress") == 2
    seen = []
    original = flow.follow
    monkeypatch.setattr(flow, "follow", lambda *arguments: seen.append(admitted()) or original(*arguments))
    done = command("logs", "tiny", "--runs", str(launch.run.parent), "--address", "192.0.2.77")
    assert done.exit_code == 0, done.output
    assert seen == [["192.0.2.77/32"]]
    assert left(aws) == []


def stage_in_s3(aws, name: str, text: str, said: str | None = None) -> None:
    """A finished stage as a machine copies it; `said`: what its manifest says of the text."""
    import json

    from suasion.rundir import Manifest

    digest = hashlib.sha256((said or text).encode()).hexdigest()
    manifest = Manifest(stage=name, recipe={"seed": 0}, inputs={}, outputs={"rows.jsonl": {"sha256": digest, "bytes": len(text)}}, rows_in=1,
                        rows_out=1, dropped={}, facts={}, packages={}, commit="", device="cpu", dtype="float32", threads=1)  # fmt: skip
    s3 = past_the_proxy("s3", aws.backend)
    for key, body in (("rows.jsonl", text), ("manifest.json", json.dumps(manifest.model_dump(mode="json")))):
        s3.put_object(Bucket="results", Key=f"x/tiny/{name}/{key}", Body=body.encode())


def test_finished_stages_come_from_s3_whole_or_not_at_all(aws, tmp_path) -> None:
    s3 = past_the_proxy("s3", aws.backend)
    s3.create_bucket(Bucket="results")
    stage_in_s3(aws, "01-corpus", "one\n")
    s3.put_object(Bucket="results", Key="x/tiny/03-sft/checkpoints/state", Body=b"half")
    s3.put_object(Bucket="results", Key="x/tiny/01-corpus/../../../escaped", Body=b"out")
    launch = make(tmp_path, Machine(), s3="s3://results/x")
    assert fetch_from_s3(launch.account, launch.session, launch.run) == ["01-corpus"]
    assert (launch.run / "01-corpus" / "rows.jsonl").read_text() == "one\n"
    assert not (launch.run / "03-sft").exists()
    assert not list(tmp_path.rglob("escaped"))
    assert fetch_from_s3(launch.account, launch.session, launch.run) == []
    stage_in_s3(aws, "02-pools", "tw0\n", said="two\n")
    assert fetch_from_s3(launch.account, launch.session, launch.run) == []
    assert not (launch.run / "02-pools").exists()


def test_a_run_that_could_not_go_on_rents_nothing(aws, start) -> None:
    """A bucket that is not there, and stages of another recipe: found out before a machine costs anything."""
    done = start("--s3", "s3://results/x", "--yes")
    assert "NoSuchBucket: The specified bucket does not exist. Make it with: aws s3 mb s3://BUCKET" in str(done.exception)
    past_the_proxy("s3", aws.backend).create_bucket(Bucket="results")
    stage_in_s3(aws, "01-corpus", "one\n")
    done = start("--s3", "s3://results/x", "--yes")
    assert isinstance(done.exception, UserError)
    assert "corpus" in str(done.exception)
    assert not MAKING & set(aws.calls)


def test_commands_that_cannot_be(aws, tmp_path) -> None:
    assert isinstance(command("status", "none", "--runs", str(tmp_path)).exception, UsageError)
    assert command(str(TINY)).exit_code == 2  # where?
    done = command(str(TINY), "--on", "aws", "--pass-env", "NO_SUCH_VARIABLE", "--runs", str(tmp_path))
    assert isinstance(done.exception, UsageError)


def test_stop_status_and_sweep_up_from_the_command_line(aws, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resources, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(resources.remove_all, "__defaults__", (None, 40, 0.0, lambda line: None))
    launch = make(tmp_path, Machine())
    run_once(launch, offers_of(launch), detach=True)
    told = command("status", "tiny", "--runs", str(launch.run.parent))
    assert told.exit_code == 0, told.output
    assert launch.session.instance in told.output
    assert command("sweep-up", "--region", "us-east-1", answer="n\n").exit_code == 0
    assert len(left(aws)) == 4
    assert command("sweep-up", "--region", "us-east-1", "--yes").output.endswith("nothing is left\n")
    assert left(aws) == []


def test_what_a_terminal_cannot_show_silences_nothing(monkeypatch) -> None:
    written = io.BytesIO()
    terminal = Console(file=io.TextIOWrapper(written, encoding="ascii", write_through=True))
    monkeypatch.setattr("suasion.launch.say.console", terminal)
    say("a letter — that ASCII lacks")
    say("waiting for people")
    assert written.getvalue().decode().split("\n")[:2] == ["a letter ? that ASCII lacks", "waiting for people"]


def test_a_transfer_that_was_tried_often_enough_is_an_error_in_words() -> None:
    """It is neither of botocore's two kinds."""
    with pytest.raises(UserError, match="could not fetch"), told("fetch"):
        raise RetriesExceededError(ConnectionError("lost"))


def test_a_session_of_another_version_is_still_found(tmp_path, aws) -> None:
    session = new_session(tmp_path / "tiny", Account("us-east-1"), 1.0, 1.0, "")
    save_session(tmp_path / "tiny", session)
    file = session_file(tmp_path / "tiny")
    write_json(file, {**read_json(file), "of_another_version": 1})
    assert load_session(tmp_path / "tiny") == session
