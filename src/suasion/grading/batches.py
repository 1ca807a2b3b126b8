"""Asking through a provider's batch interface: about half the price, answers within a day.

Requests go out together, each on the bill at its highest price first, as they do one by one (runner.py). A batch's id is written down as
soon as the provider has told it, with the requests that it holds, so that a run that is stopped and started again waits for the same batch
instead of paying for another: only a process that dies between the provider's answer and that line pays a batch twice. What a
batch could not answer goes into the next one, at most `retries` times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from suasion.errors import UserError
from suasion.grading.ledger import Answer, Missing
from suasion.grading.providers import Came, Declined, Fault, Refused
from suasion.progress import console, progress
from suasion.servers import growing

if TYPE_CHECKING:
    from suasion.grading.runner import Runner

POLL_SECONDS = 30.0
MOST_REQUESTS = 10_000  # OpenAI takes 50,000 in 200 MB, Anthropic 100,000 in 256 MB
MOST_BYTES = 90_000_000

Body = dict[str, Any]


async def ask_in_batches(runner: Runner, waiting: Mapping[str, Body], found: dict[str, Answer | Missing], what: str) -> None:
    """Put an answer, or the reason why there is none, into `found` for every request that waits, by key.

    Raises UserError where the cap is reached, the server refuses, or a batch fails as a whole; what was answered is kept.
    """
    provider, ledger = runner.provider, runner.ledger  # the only one: a batch lives on one server
    faults = dict.fromkeys(waiting, 0)
    try:
        with progress(what, len(waiting), "requests") as advance:

            async def settle(batch: str, sent: Mapping[str, int]) -> None:
                before = len(found)
                for key, came in (await _collected(runner, batch, sent, waiting)).items():
                    if not isinstance(came, Fault):
                        found[key] = Missing(f"declined: {came}") if isinstance(came, Declined) else came
                    elif faults[key] < runner.spec.retries:
                        faults[key] += 1
                    else:
                        found[key] = Missing(f"no answer in {runner.spec.retries + 1} batches: {came}")
                advance(len(found) - before)

            for batch, sent in ledger.batches(provider.address):
                if sent.keys() & waiting.keys():
                    await settle(batch, sent)
            while left := {key: body for key, body in waiting.items() if key not in found}:
                sent = _reserved(runner, left)
                try:
                    batch = await provider.submit({key: left[key] for key in sent})
                except (Fault, Declined, Refused) as error:
                    if not (isinstance(error, Fault) and error.charged):
                        for entry in sent.values():
                            ledger.release(entry)
                    raise
                ledger.open_batch(batch, provider.address, sent)
                console.print(f"  batch {batch}: {len(sent)} requests; stop and run again whenever you like", markup=False)
                await settle(batch, sent)
    except (Fault, Declined, Refused) as error:
        raise UserError(
            f"{provider.address}: no batch for '{runner.spec.model}' ({error}). Check the grader's base_url, model and key_env, and set batch: "
            "false for a server that has no batches; or run again: what it has taken is waited for."
        ) from None
    finally:
        await provider.close()


def _reserved(runner: Runner, left: Mapping[str, Body]) -> dict[str, int]:
    """As many of these as fit into one batch and under the cap, put on the bill: key -> entry. Raises UserError where not even one fits."""
    from suasion.grading.runner import size

    sent: dict[str, int] = {}
    total = 0
    for key, body in islice(left.items(), MOST_REQUESTS):
        total += size(body)
        entry = runner.ledger.reserve(key, runner.worst(body), runner.spec.max_cost) if total <= MOST_BYTES or not sent else None
        if entry is None:
            break
        sent[key] = entry
    if not sent:
        raise runner.cap_reached(next(iter(left.values())))
    return sent


async def _collected(runner: Runner, batch: str, sent: Mapping[str, int], waiting: Mapping[str, Body]) -> dict[str, Came]:
    """Wait for a batch, put what came of it on the bill, and tell what came of the requests that wait; {} for one that nobody knows any more."""
    faults = 0
    while True:
        try:
            told = await runner.provider.collect(batch)
        except Refused as error:
            if error.status != 404:
                raise
            runner.ledger.close_batch(batch)  # forgotten by the provider: it stays on the bill at its highest price
            return {}
        except Fault as error:
            faults += 1
            if faults > runner.spec.retries:
                raise
            await asyncio.sleep(max(error.wait, growing(faults)))
            continue
        if told is not None:
            break
        faults = 0
        await asyncio.sleep(POLL_SECONDS)
    came: dict[str, Came] = {key: told.get(key, Fault("the batch ended without an answer")) for key in sent}
    for key, one in came.items():
        if isinstance(one, Answer):
            # A request of another run's is not known here; providers of batches count tokens.
            cost = runner.paid(one, waiting[key]) if key in waiting else runner.price(one.tokens_in or 0, one.tokens_out or 0)
            came[key] = answer = replace(one, cost=cost)
            runner.ledger.settle(sent[key], [key], answer)
        elif not (isinstance(one, Fault) and one.charged):
            runner.ledger.release(sent[key])
    runner.ledger.close_batch(batch)
    declined = [one for one in came.values() if isinstance(one, Declined)]
    if len(declined) == len(came):
        raise runner.declines_all(declined[0])
    return {key: one for key, one in came.items() if key in waiting}
