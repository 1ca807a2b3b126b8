"""Which machines may be had, where and at what price: the cheapest of the allowed types and zones within the account's limits.

On-demand prices come from the Pricing API, spot prices from the price history of each zone, limits (in vCPUs) from Service Quotas less
what runs already. Where the Pricing API may not be asked, the dated table in machines.yaml stands in, and the offer says so.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from suasion.errors import UserError
from suasion.launch.account import FORBIDDEN, Account, code_of, told
from suasion.machines import MachineTable

Market = Literal["on-demand", "spot"]

#: Service Quotas codes by (family, market): limits in vCPUs. AWS documentation "Amazon EC2 service quotas" and "Spot Instance quotas",
#: codes as in `aws service-quotas list-service-quotas --service-code ec2`; P5 has a spot quota of its own. Looked up 2026-11-24.
QUOTAS = {
    ("g", "on-demand"): "L-DB2E81BA",  # Running On-Demand G and VT instances
    ("g", "spot"): "L-3819A6DF",  # All G and VT Spot Instance Requests
    ("p", "on-demand"): "L-417A185B",  # Running On-Demand P instances
    ("p", "spot"): "L-7212CCBC",  # All P4, P3 and P2 Spot Instance Requests
    ("p5", "spot"): "L-C4BD4855",  # All P5 Spot Instance Requests
    ("standard", "on-demand"): "L-1216C47A",  # Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances
    ("standard", "spot"): "L-34B43A08",  # All Standard Spot Instance Requests
}
#: What stands before the number of a type's generation, by quota. Others (inf, trn, dl, hpc, mac, f, x, u) have quotas that are not known here:
#: most of them begin with a letter of the standard families.
FAMILIES = {
    **dict.fromkeys(("g", "gr", "vt"), "g"),
    "p": "p",
    **dict.fromkeys(("a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z"), "standard"),
}
#: Errors of RunInstances after which the next offer is tried: this one cannot be had now. AWS documentation "Error codes for the EC2 API".
NOT_TO_BE_HAD = {
    "InsufficientInstanceCapacity", "InsufficientHostCapacity", "InsufficientCapacity", "SpotMaxPriceTooLow", "MaxSpotInstanceCountExceeded",
    "VcpuLimitExceeded", "InstanceLimitExceeded", "Unsupported", "UnfulfillableCapacity", "InsufficientFreeAddressesInSubnet",
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted",  # of an account's first spot request
}  # fmt: skip


#: AWS interrupts a spot machine whose price rises above the greatest that was named ("Spot price history": prices move slowly, but they
#: do). A tenth more keeps a small move from ending a run; caps in dollars are counted at that price.
SPOT_MARGIN = 1.1


@dataclass(frozen=True)
class Offer:
    """One way to get a machine. price: dollars an hour; source: who says so."""

    type: str
    zone: str
    market: Market
    price: float
    source: str
    vcpus: int
    gpus: int
    host_gib: float
    gpu_gib: float

    @property
    def ceiling(self) -> float:
        """The most that an hour can cost: of a spot machine the price above which AWS takes it back."""
        return self.price * (SPOT_MARGIN if self.market == "spot" else 1.0)

    def __str__(self) -> str:
        return f"{self.type} {self.market} in {self.zone} at ${self.price:.4f} an hour ({self.source})"


def family(instance_type: str, market: Market) -> str:
    """Which quota a type counts against: g, p, p5 (spot only) or standard. '' for families that are not known here."""
    known = FAMILIES.get(re.split("[^a-z]", instance_type, maxsplit=1)[0], "")
    return "p5" if known == "p" and market == "spot" and instance_type.startswith("p5") else known


def find_offers(
    account: Account, types: Sequence[str], markets: Sequence[Market], table: MachineTable
) -> tuple[list[Offer], list[str]]:
    """Offers within the limits, cheapest first, and why others are not among them.

    Raises UserError where there is none.
    """
    facts = describe_types(account, types)
    zones = zones_of(account, facts)
    refused = [f"{name}: not offered in {account.region}" for name in types if not zones.get(name)]
    running = running_vcpus(account)
    offers: list[Offer] = []
    for market in markets:
        prices = spot_prices(account, list(facts)) if market == "spot" else on_demand_prices(account, list(facts), table)
        left: dict[str, float] = {}
        for name, fact in facts.items():
            group = family(name, market)
            if group not in left:
                left[group] = limit(account, group, market) - running.get((group, market), 0)
            if fact["vcpus"] > left[group]:
                refused.append(
                    f"{name} {market}: needs {fact['vcpus']} vCPUs, your limit leaves {max(left[group], 0):.0f} (quota {QUOTAS.get((group, market), 'unknown')})"
                )
                continue
            for zone in zones.get(name, []):
                found = prices.get((name, zone)) or prices.get((name, ""))
                if found is None:
                    refused.append(f"{name} {market} in {zone}: no price is known")
                else:
                    offers.append(Offer(name, zone, market, found[0], found[1], **fact))
    offers.sort(key=lambda offer: (offer.price, offer.market == "spot", offer.type, offer.zone))
    if not offers:
        raise UserError(
            "no machine can be had:\n  "
            + "\n  ".join(dict.fromkeys(refused))
            + "\nRaise a quota (Service Quotas console, or: aws service-quotas "
            "request-service-quota-increase --service-code ec2 --quota-code CODE --desired-value N), allow other --types, another --region, "
            "or the other market."
        )
    return offers, list(dict.fromkeys(refused))


def describe_types(account: Account, types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """vCPUs, GPUs and memory of those of the types that AWS knows in this region."""
    from botocore.exceptions import ClientError

    found: dict[str, dict[str, Any]] = {}
    with told("look up instance types"):
        for name in types:
            try:
                described = account.ec2.describe_instance_types(InstanceTypes=[name])["InstanceTypes"]
            except ClientError as error:
                if code_of(error) == "InvalidInstanceType":
                    continue
                raise
            for item in described:
                gpus = item.get("GpuInfo", {}).get("Gpus", [])
                found[name] = {
                    "vcpus": item["VCpuInfo"]["DefaultVCpus"],
                    "gpus": sum(gpu["Count"] for gpu in gpus),
                    "host_gib": item["MemoryInfo"]["SizeInMiB"] / 1024,
                    "gpu_gib": min((gpu["MemoryInfo"]["SizeInMiB"] / 1024 for gpu in gpus), default=0.0),
                }
    return found


def zones_of(account: Account, types: Iterable[str]) -> dict[str, list[str]]:
    """Availability zones that offer each type."""
    zones: dict[str, list[str]] = {}
    with told("look up where instance types are offered"):
        pages = account.ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": list(types) or ["none"]}]
        )
        for page in pages:
            for item in page["InstanceTypeOfferings"]:
                zones.setdefault(item["InstanceType"], []).append(item["Location"])
    return {name: sorted(found) for name, found in zones.items()}


def running_vcpus(account: Account) -> dict[tuple[str, str], int]:
    """vCPUs in use by (family, market). Limits count a type's default vCPUs, whatever CPU options its instances have."""
    running: list[tuple[str, Market]] = []
    with told("look up what runs already"):
        pages = account.ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        )
        for page in pages:
            for instance in (item for reservation in page["Reservations"] for item in reservation["Instances"]):
                running.append((instance["InstanceType"], "spot" if instance.get("InstanceLifecycle") == "spot" else "on-demand"))
    facts = describe_types(account, sorted({name for name, _ in running}))
    used: dict[tuple[str, str], int] = {}
    for name, market in running:
        key = (family(name, market), market)
        used[key] = used.get(key, 0) + facts[name]["vcpus"]
    return used


def limit(account: Account, group: str, market: Market) -> float:
    """The account's limit in vCPUs; endless where it may not be asked, since RunInstances then says it."""
    from botocore.exceptions import ClientError

    code = QUOTAS.get((group, market))
    if code is None:
        return 0.0
    quotas = account.client("service-quotas")
    with told("look up your limits"):
        for ask in (
            quotas.get_service_quota,
            quotas.get_aws_default_service_quota,
        ):  # an account that never asked has the default
            try:
                return float(ask(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"])
            except ClientError as error:
                if code_of(error) in FORBIDDEN:
                    break
                if code_of(error) != "NoSuchResourceException":
                    raise
    return float("inf")


def spot_prices(account: Account, types: Sequence[str]) -> dict[tuple[str, str], tuple[float, str]]:
    """(type, zone) -> the newest spot price and its source."""
    newest: dict[tuple[str, str], tuple[Any, float]] = {}
    with told("look up spot prices"):
        pages = account.ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=list(types),
            ProductDescriptions=["Linux/UNIX", "Linux/UNIX (Amazon VPC)"],
            StartTime=datetime.datetime.now(datetime.UTC),
        )
        for page in pages:
            for item in page["SpotPriceHistory"]:
                key = (item["InstanceType"], item["AvailabilityZone"])
                if key not in newest or item["Timestamp"] > newest[key][0]:
                    newest[key] = (item["Timestamp"], float(item["SpotPrice"]))
    return {key: (price, f"spot price of {when:%Y-%m-%d %H:%M}") for key, (when, price) in newest.items()}


def on_demand_prices(account: Account, types: Sequence[str], table: MachineTable) -> dict[tuple[str, str], tuple[float, str]]:
    """(type, '') -> on-demand price and its source: the Pricing API, or the dated table where that may not be asked."""
    from botocore.exceptions import ClientError

    prices: dict[tuple[str, str], tuple[float, str]] = {}
    with told("look up on-demand prices"):
        for name in types:
            try:
                listed = _listed_price(account, name)
            except ClientError as error:
                if code_of(error) not in FORBIDDEN:
                    raise
                listed = None
            known = table.machines.get(name)
            if listed is not None:
                prices[name, ""] = (listed, "Pricing API")
            elif known and known.price is not None and account.region == table.region:
                prices[name, ""] = (known.price, f"table of {table.date}, the Pricing API did not answer")
    return prices


def _listed_price(account: Account, name: str) -> float | None:
    """Dollars an hour, Linux, shared tenancy, in the account's region; None where the list has no such row."""
    wanted = {
        "instanceType": name, "regionCode": account.region, "operatingSystem": "Linux", "tenancy": "Shared",
        "preInstalledSw": "NA", "capacitystatus": "Used", "licenseModel": "No License required",
    }  # fmt: skip
    answer = account.client("pricing", "us-east-1").get_products(  # the price list is served from few regions; this is one
        ServiceCode="AmazonEC2",
        Filters=[{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()],
    )
    found = [price for row in answer["PriceList"] for price in _dollars(json.loads(row))]
    return min((price for price in found if price > 0), default=None)


def _dollars(row: Mapping[str, Any]) -> list[float]:
    return [
        float(dimension["pricePerUnit"]["USD"])
        for term in row.get("terms", {}).get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
        if dimension.get("unit") == "Hrs"
    ]
