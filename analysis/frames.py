"""Compute the data frames of the report: one frame for each statistic of runs."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from analysis.depth_gradient import depth_gradient, gradient_tau, last_steps
from analysis.measures import changes_of, closed_form, growth_of, init_errors, rare_by_size
from analysis.rare_tokens import orders_hold, primary
from analysis.runs import RunTables, read_some
from gptcore.config import VOCAB_SIZES, compared_knobs, spelling, varying_knobs
from gptcore.tokenizer import spell

SEEDS_OF_LARGE_TABLES = 4
"""The number of seeds for which large tables are read."""
TOKENS_FOLLOWED = 12


def with_scheme(trials: pl.DataFrame) -> pl.DataFrame:
    """Add a column `scheme` to the trials. Results of different schemes are never averaged.

    A scheme is init.scheme and every other knob of COMPARED_KNOBS that the sweep varies. An example
    is `model5, optim.name sgd`. Intervals and lines are over the seeds of one scheme.
    """
    scheme, *others = compared_knobs(varying_knobs(trials.to_dicts()))
    labels = [f"{knob} " + pl.col(knob).map_elements(spelling, pl.String) for knob in others]
    return trials.with_columns(scheme=pl.concat_str(scheme, *labels, separator=", "))


def with_trial(frame: pl.DataFrame, sweep: RunTables) -> pl.DataFrame:
    """Add the columns scheme, subset and seed of the trial to each row, and keep the order."""
    trials = sweep.trials.select("trial_key", "scheme", subset="corpus.subset", seed="init.seed")
    return frame.join(trials, on="trial_key", maintain_order="left")


def trials_to_judge(sweep: RunTables) -> pl.DataFrame:
    """Select the columns of the trials that analysis.verdicts needs.

    The column `scheme` is the column of with_scheme. The column `config` is scheme and subset.
    """
    return sweep.trials.select(
        "trial_key", "status", "scheme", "init.scheme", "corpus.subset", "corpus.data_seed",
        "optim.name", "optim.lr",
        config=pl.concat_str("scheme", "corpus.subset", separator=", "), seed="init.seed",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFrames:
    """The frame of each statistic of runs, with the columns of with_trial.

    A frame is empty if the sweep has no such numbers. The names of the fields are also the names of
    the Parquet files of the report. Figures use the same names.
    """

    losses: pl.DataFrame
    layer_growth: pl.DataFrame
    growth_of_kinds: pl.DataFrame
    depth_gradient: pl.DataFrame
    tau_over_steps: pl.DataFrame
    group_changes: pl.DataFrame
    group_orders: pl.DataFrame
    init_errors: pl.DataFrame
    group_log_probs: pl.DataFrame
    rare_by_size: pl.DataFrame
    histograms: pl.DataFrame
    same_tokens: pl.DataFrame
    updates: pl.DataFrame
    spectra: pl.DataFrame
    activations: pl.DataFrame
    attention: pl.DataFrame
    left_out: pl.DataFrame  # runs whose large tables cannot be read, and why

    def by_name(self) -> dict[str, pl.DataFrame]:
        """Return the frames by the names of their files."""
        return dict(vars(self))


def frames_of_runs(sweep: RunTables) -> RunFrames:
    """Compute all statistics of runs."""
    growth, changes = growth_of(sweep, "qkv"), changes_of(sweep)
    log_probs = primary(sweep.tables["token_groups"].lazy()).collect()
    rates = sweep.trials.select("trial_key", lr="optim.lr", init_scheme="init.scheme")
    frames = {
        "losses": losses(sweep),
        "layer_growth": growth,
        "growth_of_kinds": growth_of_kinds(sweep),
        "depth_gradient": depth_gradient(growth).join(
            rates, on="trial_key", maintain_order="left", how="left"
        ),
        "tau_over_steps": gradient_tau(growth.filter(pl.col("step") > 0), ["trial_key", "step"]),
        "group_changes": changes,
        "group_orders": orders_hold(changes),
        "init_errors": init_errors(sweep),
        "group_log_probs": log_probs.join(closed_form(sweep), on="trial_key"),
        "rare_by_size": rare_by_size(sweep),
    }
    frames["histograms"], no_histograms = histograms(sweep)
    frames["same_tokens"], no_tokens = same_tokens(sweep)
    one = runs_of_lowest_seeds(sweep, 1).unique("scheme", keep="first", maintain_order=True)
    frames |= {
        name: read_some(name, sweep, one["trial_key"].to_list(), *columns)[0]
        for name, columns in RECORDED.items()
    }
    left_out = [*no_histograms.items(), *no_tokens.items()]
    frames["left_out"] = pl.DataFrame(
        left_out, schema={"trial_key": pl.String, "why": pl.String}, orient="row"
    )
    ordered = {name: in_order_of_trials(frame, sweep) for name, frame in frames.items()}
    return RunFrames(**{name: with_trial(frame, sweep) for name, frame in ordered.items()})


def in_order_of_trials(frame: pl.DataFrame, sweep: RunTables) -> pl.DataFrame:
    """Sort the rows in the order of the trials in the sweep.

    Figures colour schemes in the order of rows. A scheme therefore has the same colour everywhere.
    """
    trials = sweep.trials.select("trial_key")
    return trials.join(frame, on="trial_key", maintain_order="left_right").select(frame.columns)


RECORDED = {
    "updates": ("step", "kind", "layer", "ratio"),
    "spectra": ("step", "kind", "layer", "spectral_norm", "stable_rank"),
    "activations": ("step", "site", "layer", "rms"),
    "attention": ("step", "layer", "head", "entropy_share"),
}
"""Tables that no claim needs, and the columns that a figure shows, in one run of each scheme."""
MOST_STEPS = 60
"""The largest number of steps in the figure of losses."""


def losses(sweep: RunTables) -> pl.DataFrame:
    """Collect the losses of training and the losses on the fixed texts.

    Returns:
        One row for each run, text and step: trial_key, text, step, loss (nats per token). Training
        has evenly spaced steps and the last step.
    """
    names = {"probe": "probe text", "held_out": "held-out text"}
    train = sweep.tables["training"].select(
        "trial_key", "step", "loss", text=pl.lit("training batches")
    )
    fixed = sweep.tables["text_losses"].select(
        "trial_key", "step", "loss", text=pl.col("text").replace(names)
    )
    last = pl.col("step").max().over("trial_key", "text")
    each = (last // MOST_STEPS).clip(lower_bound=1)
    rows = pl.concat([train, fixed]).filter(
        (pl.col("text") != "training batches") | (pl.col("step") % each == 0)
        | (pl.col("step") == last)
    )  # fmt: skip
    return rows.select("trial_key", "text", "step", "loss")


def growth_of_kinds(sweep: RunTables) -> pl.DataFrame:
    """Compute the growth of Q, K and V at the last step of each run.

    Returns:
        One row for each run, kind and layer: trial_key, kind, layer, growth, displacement, start
        (the std at step 0).
    """
    frames = [
        last_steps(growth_of(sweep, kind)).select(
            "trial_key", "layer", "growth", "displacement", kind=pl.lit(kind),
            start=pl.col("std") / pl.col("growth").exp(),
        )
        for kind in "qkv"
    ]  # fmt: skip
    return pl.concat(frames).with_columns(
        pl.when(pl.col("growth").is_finite()).then("growth"), pl.col("start").fill_nan(0.0)
    )


def runs_of_lowest_seeds(sweep: RunTables, seeds: int) -> pl.DataFrame:
    """Select the finished trials of the lowest seeds of each scheme and subset."""
    finished = sweep.trials.filter(pl.col("trial_key").is_in(list(sweep.folders)))
    rank = pl.col("init.seed").rank("dense").over("scheme", "corpus.subset")
    return finished.filter(rank <= seeds)


def histograms(sweep: RunTables) -> tuple[pl.DataFrame, dict[str, str]]:
    """Read the histograms of one run of each scheme, on the first subset.

    Returns:
        One row for each bin that is not empty: trial_key, layer, step, low and high (its edges),
        density (the share of elements in it, divided by its width). Also the reason why a run
        cannot be read, by trial key.
    """
    one = runs_of_lowest_seeds(sweep, 1).unique("scheme", keep="first", maintain_order=True)
    columns = ("step", "layer", "edges", "counts")
    rows, unreadable = read_some("histograms", sweep, one["trial_key"].to_list(), *columns)
    if rows.is_empty():
        return rows, unreadable
    n_edges, n_counts = pl.col("edges").list.len(), pl.col("counts").list.len()
    inner = rows.filter(n_edges > 0, n_counts == n_edges + 1).select(
        "trial_key", "layer", "step",
        low=pl.col("edges").list.head(pl.col("edges").list.len() - 1),
        high=pl.col("edges").list.tail(pl.col("edges").list.len() - 1),
        # The first and the last count are the elements outside of the edges.
        count=pl.col("counts").list.slice(1, pl.col("counts").list.len() - 2),
        size=pl.col("counts").list.sum(),
    )  # fmt: skip
    bins = inner.explode("low", "high", "count").filter(pl.col("count") > 0)
    width = pl.col("high") - pl.col("low")
    density = pl.col("count") / pl.col("size") / width
    return bins.select("trial_key", "layer", "step", "low", "high", density=density), unreadable


def same_tokens(sweep: RunTables) -> tuple[pl.DataFrame, dict[str, str]]:
    """Follow tokens that one subset never uses and another uses often, in runs of one scheme.

    Returns:
        One row for each run and token: trial_key, token, text, count (in the text that the run
        trains on), log_prob (at its last step). Also the reason why a run cannot be read, by trial
        key.
    """
    some = runs_of_lowest_seeds(sweep, SEEDS_OF_LARGE_TABLES)
    some = some.filter(pl.col("scheme") == pl.col("scheme").first())
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
    tokenizer = str(some["corpus.tokenizer"].first())  # all runs of one scheme have the same
    followed = followed.filter(pl.col("token") < VOCAB_SIZES[tokenizer])
    text = pl.col("token").map_elements(lambda token: spell(tokenizer, token), pl.String)
    followed_tokens = tokens.join(followed.select("token"), on="token").with_columns(text=text)
    return followed_tokens, unreadable
