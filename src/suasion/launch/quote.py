"""What a launch would take and cost, before anything is rented: the machines that may be taken, and the quote that the user agrees to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from suasion.errors import UsageError, UserError
from suasion.launch.machine import Needs
from suasion.launch.offers import Offer
from suasion.launch.session import Session
from suasion.machines import MachineTable, load_machines
from suasion.planning import uncounted
from suasion.prediction import Prediction, predict, read_sizes
from suasion.progress import duration
from suasion.recipe import Recipe

SMALLEST_VOLUME_GB = 60  # image, packages (8 GB with CUDA) and caches
BOOT_SECONDS = 900.0  # boot, upload and installation; assumed
DEARER = 2.0  # where the cheapest cannot be had, the next is taken without a question up to this many times its price


def handed_over(names: Sequence[str], needs: Needs) -> dict[str, str]:
    """The environment variables that go to the machine. Raises UsageError where one is missing, here or among what the recipe needs."""
    for name in names:
        if name not in os.environ:
            raise UsageError(f"--pass-env {name}: no such environment variable here.")
        if "\n" in os.environ[name]:
            raise UsageError(f"--pass-env {name}: its value has several lines; only one can be handed over.")
    for name in needs.variables:
        if name not in names:
            raise UsageError(f"the recipe needs the key in {name}: give --pass-env {name}. Nothing was rented.")
    if "wandb" in needs.extras and not {"WANDB_API_KEY", "WANDB_MODE"} & set(names):
        raise UsageError("report_to is wandb: give --pass-env WANDB_API_KEY (or WANDB_MODE=offline and --pass-env WANDB_MODE).")
    return {name: os.environ[name] for name in names}


@dataclass(frozen=True)
class Candidates:
    """The machines that a recipe may run on, and what is predicted of them. named: the user named them; unknown: what no prediction counts."""

    types: tuple[str, ...]
    named: bool
    table: MachineTable
    predictions: Mapping[str, Prediction]
    volume_gb: int
    unknown: tuple[str, ...] = ()

    def hourly(self, price: float) -> float:
        """Dollars an hour of a machine of this price with its disk and address."""
        return price + self.table.side_costs(self.volume_gb)

    def taken_in_turn(self, offers: Sequence[Offer], agreed: float | None = None) -> list[Offer]:
        """The offers, cheapest first, that are tried one after another: whoever names types has agreed to their prices.

        agreed: dollars an hour of the machine that the user said yes to, where this one replaces it; None: the cheapest one's. Raises
        UserError where all are much dearer than that.
        """
        most = DEARER * (offers[0].price if agreed is None else agreed)
        taken = [offer for offer in offers if self.named or offer.price <= most]
        if not taken:
            raise UserError(
                f"the cheapest machine left is {offers[0]}, more than twice the ${agreed:.4f} that you agreed to, and is not taken without "
                "asking. What is finished is here: launch the same recipe again, and it goes on."
            )
        return taken


def candidates(recipe: Recipe, named: Sequence[str]) -> Candidates:
    """Machines for a recipe: the named types, else all of the table on which it fits. Raises UserError where there is none."""
    table, sizes = load_machines(), read_sizes(recipe)
    predictions = {name: predict(recipe, sizes, machine) for name, machine in table.machines.items()}
    types = tuple(named) or tuple(name for name, one in predictions.items() if not one.problems)
    if not types:
        why = "; ".join(next(iter(predictions.values())).problems)
        raise UserError(f"{recipe.name} fits on no machine of the table: {why}")
    return Candidates(
        types, bool(named), table, predictions, SMALLEST_VOLUME_GB + round(sizes.disk_bytes / 1e9 + 0.5), tuple(uncounted(recipe))
    )


def quote(offers: Sequence[Offer], known: Candidates, session: Session) -> list[str]:
    """What is offered, estimated and capped, a line each, with what the user should think about. offers: as they are taken in turn."""
    best = offers[0]
    hourly, hours = known.hourly(best.price), max(session.hours_left(known.hourly(best.ceiling)), 0.0)
    lines = [
        f"cheapest: {best}, ${hourly:.3f} an hour with {known.volume_gb} GB of disk and an address; AWS account {session.account}"
    ]
    if predicted := known.predictions.get(best.type):
        seconds = predicted.seconds + BOOT_SECONDS
        lines.append(
            f"estimate: {duration(seconds)}, ${seconds / 3600 * hourly:.2f} (predicted from the table of {known.table.date}; see docs/scale.md)"
        )
        lines += [f"  [yellow]{problem}[/]" for problem in (*predicted.problems, *known.unknown)]
        if seconds > hours * 3600:
            lines.append(
                "  [yellow]the caps end the machine before that: raise --max-hours or --max-dollars, or the run stops half-way[/]"
            )
    else:
        lines.append(f"  [yellow]no estimate: {best.type} is not in the table of machines (suasion plan --on all lists it)[/]")
    lines.append(
        f"caps: ${session.max_dollars:.2f} and {session.max_hours:g} h; this machine ends itself after {duration(hours * 3600)}"
    )
    if (dearest := max(offers, key=lambda offer: offer.price)) is not best:
        lines.append(
            f"where that cannot be had, the next cheapest is taken, at most {dearest.type} {dearest.market} at ${dearest.price:.4f} an hour"
        )
    return lines
