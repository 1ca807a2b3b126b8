"""What a launch makes in the account, and how all of it goes away again.

Everything carries the session's tags and a name derived from it, so that what a lost answer hid is found by looking: cleaning up never
trusts what the caller remembers. Asking twice makes one thing: names are unique, and RunInstances carries a client token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from suasion.launch.account import Account, code_of, told
from suasion.launch.offers import Offer
from suasion.launch.session import Session

RUN_TAG, SESSION_TAG = "suasion:run", "suasion:session"
UNSEEN = "may not be looked at"
ROUNDS = 120  # of 5 seconds: large GPU machines take minutes to shut down, and their security group stays as long
WAIT_SECONDS = 5.0
PROFILE_TRIES = 25

# Public SSM parameters that name the newest image. AWS: "Find your DLAMI ID" (docs.aws.amazon.com/dlami); Canonical: "Find Ubuntu images
# on AWS". Ubuntu 24.04, because its Python is 3.12. Looked up 2026-11-24.
GPU_IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
CPU_IMAGE = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"


@dataclass(frozen=True)
class Found:
    """One thing that a launch made and that is still there."""

    kind: str
    id: str
    run: str
    session: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}{f' ({self.detail})' if self.detail else ''}, made for {self.run or '?'}"


@dataclass(frozen=True)
class Image:
    """A machine image: its id, the name of its root device and that volume's least size in GB."""

    id: str
    root: str
    gb: int

    def volume_gb(self, wanted: int) -> int:
        """Size of the volume that is rented, and paid, where so many GB are wanted."""
        return max(wanted, self.gb)


@dataclass(frozen=True)
class Subnet:
    """A zone's default subnet and the network that it belongs to."""

    id: str
    vpc: str


def tags(session: Session) -> list[dict[str, str]]:
    """Tags of everything that a session makes."""
    return [
        {"Key": "Name", "Value": session.label},
        {"Key": RUN_TAG, "Value": session.name},
        {"Key": SESSION_TAG, "Value": session.id},
    ]


def iam_path(region: str) -> str:
    """Where roles and profiles of launches in a region stand: IAM has no region, and those of another one are not ours to remove."""
    return f"/suasion/{region}/"


def find_image(account: Account, gpu: bool) -> Image:
    """The newest deep-learning image, or plain Ubuntu for a machine without GPU."""
    with told("find a machine image"):
        image = account.client("ssm").get_parameter(Name=GPU_IMAGE if gpu else CPU_IMAGE)["Parameter"]["Value"]
        described = account.ec2.describe_images(ImageIds=[image])["Images"][0]
        root = described["RootDeviceName"]
        volumes = {item["DeviceName"]: item.get("Ebs", {}).get("VolumeSize", 8) for item in described["BlockDeviceMappings"]}
        return Image(image, root, int(volumes.get(root, 8)))


def subnet_of(account: Account, zone: str) -> Subnet | None:
    """The zone's default subnet; None where it has none."""
    with told(f"find the subnet of {zone}"):
        subnets = account.ec2.describe_subnets(
            Filters=[{"Name": "default-for-az", "Values": ["true"]}, {"Name": "availability-zone", "Values": [zone]}]
        )["Subnets"]
        return Subnet(subnets[0]["SubnetId"], subnets[0]["VpcId"]) if subnets else None


def make_access(account: Account, session: Session, public_key: bytes, caller: str, vpc: str) -> str:
    """Key pair and security group that admits only the caller's address by ssh. Returns the group.

    Both may exist already from an attempt whose answer was lost; they are the session's own then.
    """
    with told("make the key pair and the security group"):
        _unless_there(
            "InvalidKeyPair.Duplicate", account.ec2.import_key_pair, KeyName=session.label, PublicKeyMaterial=public_key,
            TagSpecifications=[{"ResourceType": "key-pair", "Tags": tags(session)}],
        )  # fmt: skip
        group = _group(account, session)
        if not group:
            _unless_there(
                "InvalidGroup.Duplicate", account.ec2.create_security_group, GroupName=session.label, VpcId=vpc,
                Description="ssh from the caller of suasion launch, nothing else",
                TagSpecifications=[{"ResourceType": "security-group", "Tags": tags(session)}],
            )  # fmt: skip
            group = _group(account, session)
        _admit(account, group, caller)
    return group


def make_profile(account: Account, session: Session, bucket: str, prefix: str) -> str:
    """Role and instance profile that may read and write one prefix of one bucket. Made only where S3 is used."""
    trust = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
    }
    rights = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject"], "Resource": f"arn:aws:s3:::{bucket}/{prefix}/*"},
            {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{bucket}", "Condition": {"StringLike": {"s3:prefix": f"{prefix}/*"}}},
        ],
    }  # fmt: skip
    name = session.label
    with told("make the instance profile for S3"):
        _unless_there(
            "EntityAlreadyExists", account.iam.create_role, RoleName=name, Path=iam_path(session.region), AssumeRolePolicyDocument=json.dumps(trust), Tags=tags(session)
        )  # fmt: skip
        account.iam.put_role_policy(RoleName=name, PolicyName="results", PolicyDocument=json.dumps(rights))
        _unless_there(
            "EntityAlreadyExists",
            account.iam.create_instance_profile,
            InstanceProfileName=name,
            Path=iam_path(session.region),
            Tags=tags(session),
        )
        _unless_there("LimitExceeded", account.iam.add_role_to_instance_profile, InstanceProfileName=name, RoleName=name)
        account.iam.get_waiter("instance_profile_exists").wait(InstanceProfileName=name)
    return name


def start_instance(
    account: Account,
    session: Session,
    offer: Offer,
    image: Image,
    group: str,
    subnet: str,
    volume_gb: int,
    user_data: str,
    profile: str,
) -> str:
    """One machine that dies when it shuts down. Returns its id. Raises botocore's ClientError where it cannot be had."""
    request: dict[str, Any] = {
        "ImageId": image.id,
        "InstanceType": offer.type,
        "MinCount": 1,
        "MaxCount": 1,
        "KeyName": session.label,
        "ClientToken": f"{session.id}-{session.launches}",
        "UserData": user_data,
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "NetworkInterfaces": [{"DeviceIndex": 0, "SubnetId": subnet, "Groups": [group], "AssociatePublicIpAddress": True, "DeleteOnTermination": True}],
        "BlockDeviceMappings": [
            {"DeviceName": image.root, "Ebs": {"VolumeSize": image.volume_gb(volume_gb), "VolumeType": "gp3", "DeleteOnTermination": True, "Encrypted": True}}
        ],
        "TagSpecifications": [{"ResourceType": kind, "Tags": tags(session)} for kind in ("instance", "volume")],
    }  # fmt: skip
    if offer.market == "spot":  # never dearer than the price on which the cap in dollars was computed
        request["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
                "MaxPrice": f"{offer.ceiling:.6f}",
            },
        }
    if profile:
        request["IamInstanceProfile"] = {"Name": profile}
    from botocore.exceptions import ClientError

    tries = PROFILE_TRIES
    while True:
        try:
            return str(account.ec2.run_instances(**request)["Instances"][0]["InstanceId"])
        except ClientError as error:  # EC2 learns of a new instance profile later than IAM (terraform #15341: up to two minutes)
            tries -= 1
            if not profile or not tries or not _profile_unknown(error):
                raise
        time.sleep(WAIT_SECONDS)


def _profile_unknown(error: Any) -> bool:
    message = error.response["Error"].get("Message", "").lower()
    return code_of(error) == "InvalidParameterValue" and "iam" in message and "instance" in message and "profile" in message


def admit(account: Account, session: Session, caller: str) -> None:
    """Let the caller's present address in by ssh, and nobody else: laptops move between networks."""
    with told("let your address in"):
        found = account.ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": [session.label]}])[
            "SecurityGroups"
        ]
        if not found:
            return
        ranges = [one for rule in found[0].get("IpPermissions", []) for one in rule.get("IpRanges", [])]
        others = [{"CidrIp": one["CidrIp"]} for one in ranges if one["CidrIp"] != f"{caller}/32"]
        _admit(account, found[0]["GroupId"], caller)
        if others:
            account.ec2.revoke_security_group_ingress(GroupId=found[0]["GroupId"], IpPermissions=[_ssh(others)])


def _admit(account: Account, group: str, caller: str) -> None:
    _unless_there(
        "InvalidPermission.Duplicate", account.ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[_ssh([{"CidrIp": f"{caller}/32"}])]
    )  # fmt: skip


def _ssh(ranges: list[dict[str, str]]) -> dict[str, Any]:
    return {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": ranges}


def instance_facts(account: Account, instance: str) -> dict[str, Any]:
    """State, address and reason of the last change of an instance; state 'absent' where AWS no longer knows it."""
    from botocore.exceptions import ClientError

    with told(f"look at instance {instance}"):
        try:
            described = account.ec2.describe_instances(InstanceIds=[instance])["Reservations"]
        except ClientError as error:
            if code_of(error).startswith("InvalidInstanceID"):
                return {"state": "absent", "address": "", "reason": ""}
            raise
    item = described[0]["Instances"][0]
    return {
        "state": item["State"]["Name"],
        "address": item.get("PublicIpAddress", ""),
        "reason": item.get("StateReason", {}).get("Code", ""),
    }


def find_all(account: Account, session: Session | None = None, note: Callable[[str], None] = lambda line: None) -> list[Found]:
    """Everything of the region that a launch made and that is still there; of one session only, where it is named.

    note: is told what could not be looked for.
    """
    wanted = (
        [{"Name": f"tag:{SESSION_TAG}", "Values": [session.id]}] if session else [{"Name": "tag-key", "Values": [SESSION_TAG]}]
    )
    found: list[Found] = []
    states = [{"Name": "instance-state-name", "Values": ["pending", "running", "shutting-down", "stopping", "stopped"]}]
    for page in account.ec2.get_paginator("describe_instances").paginate(Filters=[*wanted, *states]):
        for item in (instance for reservation in page["Reservations"] for instance in reservation["Instances"]):
            found.append(
                _found("instance", item["InstanceId"], item.get("Tags", []), f"{item['InstanceType']}, {item['State']['Name']}")
            )
    for page in account.ec2.get_paginator("describe_security_groups").paginate(Filters=wanted):
        found += [_found("security group", item["GroupId"], item.get("Tags", [])) for item in page["SecurityGroups"]]
    keys = account.ec2.describe_key_pairs(Filters=wanted)["KeyPairs"]
    found += [_found("key pair", item["KeyName"], item.get("Tags", [])) for item in keys]
    if session is None or session.s3:  # without S3 neither role nor profile was made
        found += _find_iam(account, session, note)
    return found


def remove_all(
    account: Account,
    session: Session | None = None,
    rounds: int = ROUNDS,
    wait: float = WAIT_SECONDS,
    note: Callable[[str], None] = lambda line: None,
) -> list[Found]:
    """Remove everything of a session, or of every session; returns what is still there.

    Rounds of looking and removing until two looks in a row find nothing: what was just made may not show at once. A lost connection
    costs a round. Only an instance that is gone counts as gone: a security group cannot go before it.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    left: list[Found] = []
    gone: set[Found] = set()  # of what may not be looked at: it was removed, or AWS said that it is not there
    clean = 0
    for attempt in range(rounds):
        if attempt:
            time.sleep(wait)
        try:
            left = [item for item in find_all(account, session) if item not in gone]
        except (BotoCoreError, ClientError) as error:
            note(f"could not look for what is left: {error}")
            clean = 0
            continue
        clean = clean + 1 if not left else 0
        if clean == 2:
            return []
        for item in left:
            try:
                _remove(account, item)
                if item.detail == UNSEEN:
                    gone.add(item)
            except ClientError as error:
                if code_of(error) not in ("DependencyViolation", "DeleteConflict"):
                    note(f"could not remove {item}: {error}")
            except BotoCoreError as error:
                note(f"could not remove {item}: {error}")
    return left or ([] if clean else [Found("unknown", "AWS did not answer", "", session.id if session else "")])


def _remove(account: Account, item: Found) -> None:
    if item.kind == "instance":
        if "shutting-down" not in item.detail:
            account.ec2.terminate_instances(InstanceIds=[item.id])
    elif item.kind == "security group":
        account.ec2.delete_security_group(GroupId=item.id)
    elif item.kind == "key pair":
        account.ec2.delete_key_pair(KeyName=item.id)
    elif item.kind == "instance profile":
        _unless_there("NoSuchEntity", _remove_profile, account=account, name=item.id)
    elif item.kind == "role":
        _unless_there("NoSuchEntity", account.iam.delete_role_policy, RoleName=item.id, PolicyName="results")
        _unless_there("NoSuchEntity", account.iam.delete_role, RoleName=item.id)


def _remove_profile(account: Account, name: str) -> None:
    for role in account.iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        account.iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=role["RoleName"])
    account.iam.delete_instance_profile(InstanceProfileName=name)


def _find_iam(account: Account, session: Session | None, note: Callable[[str], None]) -> Iterator[Found]:
    """Roles and profiles by their path. The rights to make and to list them are given apart: where they may not be listed, a session's own
    are known by their name, and for all others `note` is told."""
    from botocore.exceptions import ClientError

    path = iam_path(account.region)
    for kind, operation, key, name in (
        ("instance profile", "list_instance_profiles", "InstanceProfiles", "InstanceProfileName"),
        ("role", "list_roles", "Roles", "RoleName"),
    ):
        try:
            for page in account.iam.get_paginator(operation).paginate(PathPrefix=path):
                for item in (item for item in page[key] if item["Path"] == path):
                    run, _, of_session = item[name].removeprefix("suasion-").rpartition("-")
                    if session is None or of_session == session.id:
                        yield Found(kind, item[name], run, of_session)
        except ClientError as error:
            if code_of(error) != "AccessDenied":
                raise
            if session:
                yield Found(kind, session.label, session.name, session.id, UNSEEN)
            else:
                note(f"{kind}s could not be looked for: your credentials may not list them")


def _group(account: Account, session: Session) -> str:
    groups = account.ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": [session.label]}])["SecurityGroups"]
    return str(groups[0]["GroupId"]) if groups else ""


def _found(kind: str, id_: str, tagged: list[dict[str, str]], detail: str = "") -> Found:
    values = {tag["Key"]: tag["Value"] for tag in tagged}
    return Found(kind, id_, values.get(RUN_TAG, ""), values.get(SESSION_TAG, ""), detail)


def _unless_there(code: str, call: Callable[..., Any], **arguments: Any) -> None:
    """Call, and take this error for an earlier success whose answer was lost."""
    from botocore.exceptions import ClientError

    try:
        call(**arguments)
    except ClientError as error:
        if code_of(error) != code:
            raise
