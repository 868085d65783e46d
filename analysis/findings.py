"""From runs to findings: what findings.json holds, and the frames that figures rest on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import polars as pl

from analysis.claims import (
    CLAIMS,
    changes_of,
    closed_form,
    digest,
    growth_of,
    init_errors,
    rare_by_size,
)
from analysis.depth_gradient import depth_gradient, gradient_tau, last_steps
from analysis.interim import Record, level, own_record, standing, waiting
from analysis.rare_tokens import ORDERS, orders_hold, primary
from analysis.runs import RunTables, read_some
from analysis.specifications import SPECIFIED, specifications
from analysis.stats import holm, mean_interval, median_interval, share_interval
from analysis.verdicts import ALPHA, NOT_MEASURED, compare, judge
from gptcore.config import compared_knobs, spelling, varying_knobs
from gptcore.records import PRIMARY
from gptcore.tokenizer import spell

RUNS_OF_A_SUBSET = 4
"""As many runs of one scheme and subset are read for what is too large to read of all."""
TOKENS_FOLLOWED = 12

ELSEWHERE = (
    "These trials were looked at while seeds were added, and are not judged here as planned: every "
    "verdict is at the level {:.2g} that the looks leave for it."
)
NO_LOOK = "No look has been taken yet: these verdicts are provisional, at the level of the first."


def with_scheme(trials: pl.DataFrame) -> pl.DataFrame:
    """The trials with a column `scheme`: what intervals and lines are over the seeds of.

    It is init.scheme, and every other knob of COMPARED that the sweep varies, so that no two
    optimisers, say, are ever averaged: `model5, optim.name sgd`.
    """
    scheme, *others = compared_knobs(varying_knobs(trials.to_dicts()))
    told = [f"{knob} " + pl.col(knob).map_elements(spelling, pl.String) for knob in others]
    return trials.with_columns(scheme=pl.concat_str(scheme, *told, separator=", "))


def with_trial(frame: pl.DataFrame, sweep: RunTables) -> pl.DataFrame:
    """The frame, in its order, with columns scheme, subset and seed of each row's trial."""
    trials = sweep.trials.select("trial_key", "scheme", subset="corpus.subset", seed="init.seed")
    return frame.join(trials, on="trial_key", maintain_order="left")


def frames_of_runs(sweep: RunTables) -> dict[str, pl.DataFrame]:
    """What is computed of each run, one frame a statistic, as with_trial; empty where a sweep has
    nothing of the kind."""
    growth, changes = growth_of(sweep, "qkv"), changes_of(sweep)
    log_probs = primary(sweep.tables["token_groups"].lazy()).collect()
    frames = {
        "layer_growth": growth,
        "depth_gradient": depth_gradient(growth),
        "tau_over_steps": gradient_tau(growth.filter(pl.col("step") > 0), ["trial_key", "step"]),
        "group_changes": changes,
        "group_orders": orders_hold(changes),
        "init_errors": init_errors(sweep),
        "group_log_probs": log_probs.join(closed_form(sweep), on="trial_key"),
        "rare_by_size": rare_by_size(sweep),
    }
    frames["histograms"], no_histograms = histograms(sweep)
    frames["same_tokens"], no_tokens = same_tokens(sweep)
    left_out = [*no_histograms.items(), *no_tokens.items()]
    frames["left_out"] = pl.DataFrame(
        left_out, schema={"trial_key": pl.String, "why": pl.String}, orient="row"
    )
    return {name: with_trial(frame, sweep) for name, frame in frames.items()}


def a_few_runs(sweep: RunTables, seeds: int) -> pl.DataFrame:
    """The finished trials of the lowest seeds of each scheme and subset."""
    finished = sweep.trials.filter(pl.col("trial_key").is_in(list(sweep.folders)))
    rank = pl.col("init.seed").rank("dense").over("scheme", "corpus.subset")
    return finished.filter(rank <= seeds)


def histograms(sweep: RunTables) -> tuple[pl.DataFrame, dict[str, str]]:
    """Of one run of each scheme, on the first subset: trial_key, layer, step, low and high edge of
    each bin that is not empty, and its density (share of the elements over width); -> also why
    which run cannot be read."""
    one = a_few_runs(sweep, 1).unique("scheme", keep="first", maintain_order=True)
    columns = ("step", "layer", "edges", "counts")
    rows, unreadable = read_some("histograms", sweep, one["trial_key"].to_list(), *columns)
    if rows.is_empty():
        return rows, unreadable
    inner = rows.select(
        "trial_key", "layer", "step",
        low=pl.col("edges").list.head(pl.col("edges").list.len() - 1),
        high=pl.col("edges").list.tail(pl.col("edges").list.len() - 1),
        # The first and the last count what lies outside the edges.
        count=pl.col("counts").list.slice(1, pl.col("counts").list.len() - 2),
        size=pl.col("counts").list.sum(),
    )  # fmt: skip
    bins = inner.explode("low", "high", "count").filter(pl.col("count") > 0)
    width = pl.col("high") - pl.col("low")
    density = pl.col("count") / pl.col("size") / width
    return bins.select("trial_key", "layer", "step", "low", "high", density=density), unreadable


def same_tokens(sweep: RunTables) -> tuple[pl.DataFrame, dict[str, str]]:
    """The tokens that one subset never uses and another uses most, in some runs of one scheme:
    trial_key, token, text, count in what the run trains on, log_prob at its last step; -> also why
    which cannot be read."""
    some = a_few_runs(sweep, RUNS_OF_A_SUBSET)
    some = some.filter(pl.col("scheme") == some["scheme"].first())
    if some["corpus.subset"].n_unique() < 2:
        return pl.DataFrame(schema={"trial_key": pl.String}), {}
    keys = some["trial_key"].to_list()
    rows, unreadable = read_some("tokens", sweep, keys, "step", "count", "log_prob_masked")
    if rows.is_empty():
        return rows, unreadable
    tokens = (
        last_steps(rows)
        .select(
            "trial_key",
            "count",
            log_prob="log_prob_masked",
            token=pl.int_ranges(pl.col("count").list.len()),
        )
        .explode("token", "count", "log_prob")
    )
    followed = (
        tokens.group_by("token")
        .agg(least=pl.col("count").min(), most=pl.col("count").max())
        .filter(least=0)
        .sort("most", "token", descending=[True, False])
        .head(TOKENS_FOLLOWED)
    )
    tokenizer = str(some["corpus.tokenizer"].first())  # one scheme's runs have one tokenizer
    text = pl.col("token").map_elements(lambda token: spell(tokenizer, token), pl.String)
    followed_tokens = tokens.join(followed.select("token"), on="token").with_columns(text=text)
    return followed_tokens, unreadable


def find(sweep: RunTables, by_run: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
    """What the runs say, as findings.json holds it. `by_run`: as frames_of_runs."""
    counts = Counter(sweep.trials["status"])
    ended = {status: counts[status] for status in ("finished", "diverged", "failed", "unreadable")}
    schemes = sweep.trials["scheme"].unique(maintain_order=True)
    unreadable = sweep.trials.filter(status="unreadable").select("trial_key", "reason")
    values = measured(sweep)
    record, alpha = own_record(sweep), level(sweep.looks)
    return {
        "sweep": sweep.name,
        "notes": [
            *sweep.notes,
            *([ELSEWHERE.format(alpha)] if sweep.looks and record is None else []),
            *([NO_LOOK] if record and not record["looks"] else []),
            *(f"Trial {key} is left out: {why}." for key, why in unreadable.rows()),
            *(
                f"Trial {key} is left out of a figure: {why}."
                for key, why in by_run["left_out"].select("trial_key", "why").rows()
            ),
        ],
        "trials": {**ended, "unfinished": len(sweep.trials) - sum(ended.values())},
        "looks": record and _looks(record),
        "claims": claim_findings(sweep, values, record, alpha),
        "depth_gradient": {scheme: _depth_findings(by_run, scheme) for scheme in schemes},
        "rare_tokens": {scheme: _token_findings(by_run, scheme) for scheme in schemes},
        "comparisons": comparisons(sweep, values, alpha),
        "specifications": _counted(specifications(sweep, trials_to_judge(sweep), alpha)),
        "runs": runs(sweep, by_run),
    }


def trials_to_judge(sweep: RunTables) -> pl.DataFrame:
    """The trials as analysis.verdicts takes them; a configuration is a scheme and a subset."""
    return sweep.trials.select(
        "trial_key", "status", "scheme", "corpus.subset", "corpus.data_seed", "optim.name",
        config=pl.concat_str("scheme", "corpus.subset", separator=", "), seed="init.seed",
    )  # fmt: skip


def measured(sweep: RunTables) -> dict[str, pl.DataFrame]:
    """The numbers of every claim."""
    return {name: claim.measure(sweep) for name, claim in CLAIMS.items()}


def look(sweep: RunTables, alpha: float) -> dict[str, dict[str, Any]]:
    """The finding on each claim for the configurations of this sweep, at the level alpha."""
    return judge(CLAIMS, measured(sweep), trials_to_judge(sweep), general=False, alpha=alpha)


def claim_findings(
    sweep: RunTables,
    values: Mapping[str, pl.DataFrame],
    record: Record | None = None,
    alpha: float = ALPHA,
) -> dict[str, Any]:
    """Every claim's verdict for the configurations of this sweep, in general, and in parts of it.

    `here` and `by` (scheme, subset, optimiser, where they vary) take seeds as units; `in_general`
    takes configurations as well. In a part of the sweep a claim is tested only if it has all the
    numbers that it has in the whole. All at the level `alpha`; but `here` is what stands in the
    `record` of looks, where there is one.
    """
    trials = trials_to_judge(sweep)
    by: dict[str, dict[str, Any]] = {}
    for knob in ("scheme", "corpus.subset", "optim.name"):
        labels = trials[knob].unique(maintain_order=True).to_list()
        for label in labels if len(labels) > 1 else ():
            some = trials.filter(pl.col(knob) == label)
            whole = {
                name: numbers
                if _parts_of(numbers.join(some, on="trial_key")) == _parts_of(numbers)
                else numbers.head(0)
                for name, numbers in values.items()
            }
            by.setdefault(knob, {})[label] = judge(CLAIMS, whole, some, general=False, alpha=alpha)
    several = trials["config"].n_unique() > 1
    stands = standing(record) if record else {}
    return {
        "digest": digest(),
        "standing": "confirmatory" if sweep.claims_digest == digest() else "exploratory",
        "alpha": alpha,
        "here": stands or judge(CLAIMS, values, trials, general=False, alpha=alpha),
        "in_general": judge(CLAIMS, values, trials, alpha=alpha) if several else None,
        "by": by,
    }


def _looks(record: Record) -> dict[str, Any]:
    """The looks as findings.json names them; the findings of each are among those of `claims`."""
    return {
        "schedule": record["schedule"],
        "taken": [
            {
                "seeds": one["seeds"],
                "alpha": one["alpha"],
                "decided": {name: one["findings"][name]["verdict"] for name in one["decided"]},
            }
            for one in record["looks"]
        ],
        "open": waiting(record),
        "not_waited_for": [name for name in CLAIMS if name not in record["waits_for"]],
    }


def _parts_of(values: pl.DataFrame) -> set[str]:
    return set(values["part"])


def comparisons(
    sweep: RunTables, values: Mapping[str, pl.DataFrame], alpha: float = ALPHA
) -> dict[str, Any] | None:
    """Every claim's numbers under each scheme, minus those of the first one with the same seed and
    subset, with intervals of 1 - alpha; p-values adjusted for the number of differences (Holm).
    None where there is one scheme.
    """
    trials = trials_to_judge(sweep).filter(status="finished")
    reference = str(trials["scheme"].first())
    if trials["scheme"].n_unique() < 2:
        return None
    found = {
        name: compare(CLAIMS[name], numbers, trials, reference, alpha)
        for name, numbers in values.items()
    }
    cells = [cell for parts in found.values() for part in parts.values() for cell in part.values()]
    for cell, adjusted in zip(cells, holm([cell["p"] for cell in cells]), strict=True):
        cell["p_holm"] = adjusted
    return {
        "reference": reference,
        "claims": {name: parts for name, parts in found.items() if parts},
    }


def _counted(specified: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each claim its specifications, and how many have which verdict: in all, and by choice."""
    return {
        claim: {
            "verdicts": dict(Counter(one["verdict"] for one in every)),
            "by_choice": {
                choice: {
                    option: dict(Counter(one["verdict"] for one in every if one[choice] == option))
                    for option in dict.fromkeys(one[choice] for one in every)
                }
                for choice in SPECIFIED[claim].choices
            },
            "all": every,
        }
        for claim, every in specified.items()
    }


def runs(sweep: RunTables, by_run: Mapping[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """Every trial of the plan: its key, what it varies, how it ended, and its main numbers."""
    losses = (
        sweep.tables["training"]
        .group_by("trial_key")
        .agg(last_loss=pl.col("loss").sort_by("step").last())
    )
    tau = by_run["depth_gradient"].select("trial_key", "tau", "widest_layer")
    knobs = varying_knobs(sweep.trials.to_dicts())
    return (
        sweep.trials.select("trial_key", *knobs, "status", "reason")
        .join(losses, on="trial_key", how="left", maintain_order="left")
        .join(tau, on="trial_key", how="left", maintain_order="left")
        .to_dicts()
    )


def _depth_findings(by_run: Mapping[str, pl.DataFrame], scheme: str) -> dict[str, Any]:
    runs = by_run["depth_gradient"].filter(pl.col("scheme") == scheme)
    growth = last_steps(by_run["layer_growth"].filter(pl.col("scheme") == scheme))
    by_layer = growth.group_by("layer").agg(pl.col("growth").median()).sort("layer")
    widest = Counter(runs["widest_layer"])
    return {
        "runs": runs.height,
        "tau": median_interval(of_seeds(runs, "tau")),
        "tau_of_runs": dict(zip(runs["trial_key"], runs["tau"], strict=True)),
        "first_layer_widest": share_interval(
            of_seeds(runs.with_columns(first=pl.col("widest_layer") == 0), "first")
        ),
        "widest_layer_of_runs": {str(layer): widest[layer] for layer in sorted(widest)},
        "median_growth_by_layer": by_layer["growth"].to_list(),
        "median_growth": median_interval(of_seeds(runs, "median_growth")),
    }


def _token_findings(by_run: Mapping[str, pl.DataFrame], scheme: str) -> dict[str, Any]:
    changes = by_run["group_changes"].filter(pl.col("scheme") == scheme)
    orders = by_run["group_orders"].filter(pl.col("scheme") == scheme)
    groups = by_run["group_changes"]["group"].unique(maintain_order=True)
    return {
        "runs": orders.height,
        "measured_on": PRIMARY,
        "groups": {
            group: {
                column: mean_interval(of_seeds(changes.filter(pl.col("group") == group), column))
                for column in ("start", "end", "change", "logit_change", "log_z_change", "excess")
            }
            for group in groups
        },
        "change_by_subset": {
            subset: {
                group: mean_interval(of_seeds(runs.filter(pl.col("group") == group), "change"))
                for group in groups
            }
            for (subset,), runs in changes.group_by("subset", maintain_order=True)
        },
        **{name: share_interval(of_seeds(orders, name)) for name in ORDERS},
    }


def of_seeds(runs: pl.DataFrame, column: str) -> list[float]:
    """Per init.seed that every subset has, the mean of a column over its runs: runs of one seed are
    not independent."""
    known = runs.drop_nulls(column).sort("seed")
    complete = known.filter(pl.col("subset").n_unique().over("seed") == known["subset"].n_unique())
    means = complete.group_by("seed", maintain_order=True).agg(pl.col(column).cast(float).mean())
    return means[column].to_list()


def outcome(name: str, claims: Mapping[str, Any]) -> str:
    """What a paper would print after the claim: its verdict here, with the numbers, in general."""
    claim, finding = CLAIMS[name], claims["here"][name]
    if finding["verdict"] == NOT_MEASURED:
        return (
            "Not measured: no seed has all the numbers for it in every configuration of this sweep."
        )
    numbers = "; ".join(
        f"{part} {format_estimate(found['estimate'])}" for part, found in finding["parts"].items()
    )
    text = f"{finding['verdict'].capitalize()}"
    text += f", {finding['course']}" if finding["course"] else ""
    seeds = f"{finding['seeds']} seed{'s' * (finding['seeds'] != 1)}"
    if "look" in finding:
        seeds += f" at look {finding['look']}, level {finding['alpha']:.2g}"
    # Without one where a part of the claim, which others already decide, has no numbers.
    p = "" if finding["p_holm"] is None else f", Holm-adjusted p = {finding['p_holm']:.2g}"
    text += f": {numbers} ({claim.unit}; {seeds}{p})."
    if finding["seeds_needed"]:
        text += f" By these numbers {finding['seeds_needed']} seeds would decide it: "
        text += f"{finding['would_be']}."
    if finding["seeds_left_out"]:
        text += f" {finding['seeds_left_out']} seeds that not every configuration has are left out."
    if finding["verdict_with_diverged"] != finding["verdict"]:
        text += f" With {finding['diverged']} diverged runs counted against it: "
        text += f"{finding['verdict_with_diverged']}."
    if claims["in_general"]:
        general = claims["in_general"][name]
        text += f" In general, from {general['configurations']} configurations: "
        text += f"{general['verdict']}."
    return text


def say_looks(looks: Mapping[str, Any]) -> str:
    """One sentence on the looks, as `find` gives them."""
    taken, planned = looks["taken"], looks["schedule"]
    sizes = ", ".join(str(one["seeds"]) for one in planned)
    decided = sum(len(one["decided"]) for one in taken)
    return (
        f"Seeds were added until claims were decided: {len(taken)} of at most {len(planned)} looks "
        f"(at {sizes} seeds) were taken, with {decided} claims decided and {len(looks['open'])} "
        "open; each at the level that it spends of 0.05 (Lan & DeMets 1983)."
    )


def format_estimate(estimate: dict[str, Any]) -> str:
    """`-3.12 [-3.40, -2.84]`, or the value alone where the seeds are too few for an interval."""
    if estimate["value"] is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g} [too few seeds]"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"
