"""Run a sweep with --until-decided: add seeds until its claims are decided, or up to a maximum.

The trials of each interim analysis are run, then judged at the alpha that analysis.interim plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from analysis.claims import CLAIMS
from analysis.frames import with_scheme
from analysis.interim import InterimPlan, find_sweep, plan_interim, read_interim_plan
from analysis.runs import read_sweeps
from analysis.sweep_verdicts import judge_sweep
from gptcore.config import InputError
from sweeps.plan import Plan
from sweeps.session import Session
from tracking.store import DONE, Store


def agreed_interim_plan(plan: Plan, given: int | None, store: Store) -> InterimPlan | None:
    """Return the interim analyses of a sweep, including those that were made.

    The plan of a sweep cannot change after an interim analysis, because the error would be spent
    twice. A report of a sweep without interim analyses has spent all of the error.

    Args:
        plan: the trials of all seeds that the sweep may get.
        given: how many seeds were asked for by name; None without --until-decided.
        store: where the sweep is recorded.

    Returns:
        None for a sweep without interim analyses.

    Raises:
        InputError: the sweep was started in another way.
    """
    sweep_run = find_sweep(store, plan.name)
    kept = read_interim_plan(store, sweep_run) if sweep_run else None
    if given is None:
        if kept:
            raise InputError(
                f"sweep {plan.name} has interim analyses at {_sizes(kept)} seeds: continue it with "
                f"--until-decided {len(kept.seeds)} and the same trials, or take another --name"
            )
        return None
    seeds = list(dict.fromkeys(config.init.seed for config in plan.trials.values()))
    wanted = plan_interim(seeds, given, list(plan.trials), plan.claims)
    if sweep_run is None:
        return wanted
    other = "take another --name and seeds that it has not run"
    if kept is None:
        raise InputError(
            f"sweep {plan.name} was run without --until-decided, so its report has spent all of "
            f"the error rate: {other}"
        )
    if _sizes(kept) != _sizes(wanted):
        raise InputError(
            f"sweep {plan.name} has interim analyses at {_sizes(kept)} seeds, not "
            f"{_sizes(wanted)}, and a change after an interim analysis spends error twice: keep "
            f"those, or {other}"
        )
    for what, differs in (
        ("trials", kept.trials != wanted.trials),
        ("claims", kept.claims_digest != wanted.claims_digest),
    ):
        if differs:
            raise InputError(
                f"sweep {plan.name} has interim analyses with other {what} than these, and a "
                f"change after an interim analysis spends error twice: {other}"
            )
    return kept


def follow(
    session: Session,
    plan: Plan,
    interim: InterimPlan,
    redo: Sequence[str],
    console: Console,
) -> bool:
    """Run a sweep up to its last interim analysis. Return whether the user stopped it.

    An interim analysis that was recorded is not made again: a sweep that was cut off continues with
    the next one. An analysis needs the results of all its trials. If one failed, the sweep ends
    before the analysis.

    Args:
        session: the session of the sweep.
        plan: the trials of all seeds that the sweep may get.
        interim: the interim analyses, made and to come.
        redo: trials to run anew, as --redo takes them.
        console: where to print.
    """
    session.keep_interim_plan(interim)
    if interim.is_over:
        return session.run(next_analysis(plan, interim)[0], redo)
    while not interim.is_over:
        wanted, alpha = next_analysis(plan, interim)
        if session.run(wanted, redo):
            return True
        redo = ()
        ends = {entry.status for entry in session.ledger.values()}
        if "finished" not in ends or not ends <= set(DONE):
            console.print("no interim analysis: it needs the results of all its trials")
            return False
        sweep = read_sweeps(session.store, [plan.name], None, session.runs_dir / "cache")
        unreadable = sweep.trials.filter(status="unreadable")["trial_key"].to_list()
        if unreadable:
            console.print(
                f"no interim analysis: the tables of {', '.join(unreadable)} cannot be read; "
                "--redo runs such trials anew",
                soft_wrap=True,
            )
            return False
        sweep = replace(sweep, trials=with_scheme(sweep.trials))
        interim = interim.with_findings(judge_sweep(sweep, alpha))
        session.keep_interim_plan(interim)
        say_latest(interim, console)
    return False


def next_analysis(plan: Plan, interim: InterimPlan) -> tuple[Plan, float]:
    """Return the trials and the alpha of the next interim analysis, or of the last one made."""
    planned = interim.schedule[len(interim.made) - interim.is_over]
    return plan.of_seeds(interim.seeds[: planned.seeds]), planned.alpha


def say_schedule(interim: InterimPlan, console: Console) -> None:
    """Print when the sweep is judged, and which claims it cannot wait for."""
    alphas = ", ".join(f"{planned.alpha:.2g}" for planned in interim.schedule)
    console.print(
        f"interim analyses at {_sizes(interim)} seeds, alpha {alphas}; {len(interim.made)} made",
        soft_wrap=True,
    )
    asked = interim.asked or CLAIMS
    if never := [name for name in asked if name not in interim.waits_for]:
        console.print(
            f"  not waited for, because {len(interim.seeds)} seeds cannot support them: "
            + ", ".join(never),
            soft_wrap=True,
        )


def say_latest(interim: InterimPlan, console: Console) -> None:
    """Print what the latest interim analysis decided, and how many seeds may still be added."""
    latest, number = interim.made[-1], len(interim.made)
    decided = [f"{name} {latest.findings[name].verdict}" for name in latest.decided]
    more = len(interim.seeds) - latest.seeds
    console.print(
        f"interim analysis {number} of {len(interim.schedule)}, {latest.seeds} seeds, alpha "
        f"{latest.alpha:.2g}: decided {', '.join(decided) or 'nothing'}; undecided "
        f"{', '.join(interim.undecided()) or 'nothing'}; {more} more seeds allowed",
        soft_wrap=True,
    )


def _sizes(interim: InterimPlan) -> str:
    """Return the numbers of seeds of the interim analyses: `2, 3, 4`."""
    return ", ".join(str(planned.seeds) for planned in interim.schedule)
