"""A sweep that gets more seeds until its claims are decided, or it has as many as it may.

Look after look, each over the trials of so many seeds, at the levels that analysis.interim gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from analysis import interim
from analysis.claims import CLAIMS
from analysis.findings import look, with_scheme
from analysis.runs import read_looks, read_sweeps
from gptcore.config import InputError
from sweeps.plan import Plan
from sweeps.session import Session
from tracking.store import DONE, Store


def agreed_looks(plan: Plan, given: int | None, store: Store) -> dict[str, Any] | None:
    """The looks of the sweep, those taken among them; None for a sweep without.

    `plan` has all seeds that the sweep may get, of which `given` were asked for, None without
    --until-decided. Raises InputError where the sweep began in another way: whoever changes the
    plan after a look spends error twice, and a report at a full 5% was a look.
    """
    kept = read_looks(store, plan.name)
    if given is None:
        if kept:
            raise InputError(
                f"sweep {plan.name} is {_told(kept)}: go on with --until-decided "
                f"{len(kept['seeds'])} and the same trials, or take another --name"
            )
        return None
    seeds = list(dict.fromkeys(config.init.seed for config in plan.trials.values()))
    wanted = interim.plan_looks(seeds, given, list(plan.trials))
    if kept is None:
        return wanted
    other = "and seeds that it has not run"
    if not kept:
        raise InputError(
            f"sweep {plan.name} was run without --until-decided, so its report was a look at the "
            f"whole error: take another --name {other}"
        )
    if _sizes(kept) != _sizes(wanted):
        raise InputError(
            f"sweep {plan.name} is {_told(kept)}, not {_sizes(wanted)}, and a plan that changes "
            f"after a look spends error twice: go on with that, or take another --name {other}"
        )
    for what, part in (("trials", "trials"), ("claims", "claims_digest")):
        if kept[part] != wanted[part]:
            raise InputError(
                f"sweep {plan.name} is {_told(kept)} with other {what} than these, and what "
                f"changes after a look spends error twice: take another --name {other}"
            )
    return kept


def follow(
    session: Session,
    plan: Plan,
    record: interim.Record,
    redo: Sequence[str],
    console: Console,
) -> bool:
    """Run the sweep look by look until none is to come; -> whether stopped.

    What was recorded of a look stands: a sweep that was cut off goes on with the next one. A look
    waits for every one of its trials: where one fails, the sweep ends before it.
    """
    session.keep_looks(record)
    if interim.is_over(record):
        return session.run(next_look(plan, record)[0], redo)
    while not interim.is_over(record):
        wanted, alpha = next_look(plan, record)
        if session.run(wanted, redo):
            return True
        redo = ()
        ends = {entry.status for entry in session.ledger.values()}
        if "finished" not in ends or not ends <= set(DONE):
            console.print("the look is not taken: it waits for the results of all its trials")
            return False
        sweep = read_sweeps(session.store, [plan.name], None, session.runs_dir / "cache")
        unreadable = sweep.trials.filter(status="unreadable")["trial_key"].to_list()
        if unreadable:
            console.print(
                f"the look is not taken: the tables of {', '.join(unreadable)} cannot be read; "
                "--redo runs such trials anew",
                soft_wrap=True,
            )
            return False
        found = look(replace(sweep, trials=with_scheme(sweep.trials)), alpha)
        record = interim.take(record, found)
        session.keep_looks(record)
        say_look(record, console)
    return False


def next_look(plan: Plan, record: interim.Record) -> tuple[Plan, float]:
    """The trials of the look to come and its level; where none is, those of the last."""
    number = len(record["looks"]) - interim.is_over(record)
    to_take = record["schedule"][number]
    return plan.of_seeds(record["seeds"][: to_take["seeds"]]), to_take["alpha"]


def say_schedule(record: interim.Record, console: Console) -> None:
    levels = ", ".join(f"{one['alpha']:.2g}" for one in record["schedule"])
    taken = len(record["looks"])
    console.print(
        f"looks at {_sizes(record)} seeds, levels {levels}; {taken} taken", soft_wrap=True
    )
    if never := [name for name in CLAIMS if name not in record["waits_for"]]:
        console.print(
            f"  not waited for, as {len(record['seeds'])} seeds cannot support them: "
            + ", ".join(never),
            soft_wrap=True,
        )


def say_look(record: interim.Record, console: Console) -> None:
    """What the look just taken decided, what is open, and how many seeds are still allowed."""
    taken, number = record["looks"][-1], len(record["looks"])
    decided = [f"{name} {taken['findings'][name]['verdict']}" for name in taken["decided"]]
    still = interim.waiting(record)
    more = len(record["seeds"]) - taken["seeds"]
    console.print(
        f"look {number} of {len(record['schedule'])}, {taken['seeds']} seeds, level "
        f"{taken['alpha']:.2g}: decided {', '.join(decided) or 'nothing'}; open "
        f"{', '.join(still) or 'nothing'}; {more} more seeds allowed",
        soft_wrap=True,
    )


def _sizes(record: interim.Record) -> str:
    return ", ".join(str(one["seeds"]) for one in record["schedule"])


def _told(record: interim.Record) -> str:
    return f"followed by looks at {_sizes(record)} seeds"
