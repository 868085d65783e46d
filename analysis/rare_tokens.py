"""Finding B: what training does to the probability of common, rare and never-used tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl

from analysis.runs import RunTables
from gptcore.records import PRIMARY

ORDERS = {
    "never_below_rare_below_common": ("never_100", "rare_100", "common_100"),
    "never_below_singletons_below_common": ("never_used", "singletons", "common_100"),
}
"""Groups from least to most probable, as the source reports them: first its three groups of 100
tokens, then bins of all tokens."""


def primary(token_groups: pl.LazyFrame) -> pl.LazyFrame:
    """Select the rows of the primary measurement, gptcore.records.PRIMARY.

    There, a token that is among the inputs of a sequence is left out of that sequence.

    Args:
        token_groups: rows on the text and at the positions of PRIMARY.
    """
    return token_groups.filter(mask=PRIMARY["mask"])


def group_changes(token_groups: pl.LazyFrame) -> pl.DataFrame:
    """Compute the change of each token group's mean log-prob from step 0 to the last step.

    Returns:
        One row for each run and group, from the primary rows: trial_key, group, start, end, change,
        logit_change, log_z_change (nats), where change = logit_change - log_z_change; and excess,
        how far the end is above the smoothed unigram model. Numbers are null where too few tokens
        were left.
    """
    columns = ("mean_logprob", "mean_logit", "log_z", "excess")
    ordered = primary(token_groups).sort("step", maintain_order=True)
    ends = ordered.group_by("trial_key", "group", maintain_order=True).agg(
        *(pl.col(name).first().alias(f"{name}_start") for name in columns),
        *(pl.col(name).last().alias(f"{name}_end") for name in columns),
    )
    return ends.select(
        "trial_key",
        "group",
        start="mean_logprob_start",
        end="mean_logprob_end",
        change=pl.col("mean_logprob_end") - pl.col("mean_logprob_start"),
        logit_change=pl.col("mean_logit_end") - pl.col("mean_logit_start"),
        log_z_change=pl.col("log_z_end") - pl.col("log_z_start"),
        excess="excess_end",
    ).collect()


def orders_hold(changes: pl.DataFrame) -> pl.DataFrame:
    """Compute for each run whether the last log-probs are in the orders of ORDERS.

    Args:
        changes: the rows of group_changes.

    Returns:
        One row for each run: trial_key, and a column for each order, null where a group has no
        log-prob.
    """
    groups = sorted({group for order in ORDERS.values() for group in order})
    last = changes.pivot("group", groups, index="trial_key", values="end")
    return last.select(
        "trial_key",
        *(
            ((pl.col(low) < pl.col(middle)) & (pl.col(middle) < pl.col(high))).alias(name)
            for name, (low, middle, high) in ORDERS.items()
        ),
    )


def shuffled_labels(sweep: RunTables, seed: int) -> RunTables:
    """Shuffle the names of token groups within each run of a sweep, as a control.

    A claim about rare tokens is then as often about other tokens. Only groups for which the run has
    numbers are shuffled.

    Args:
        sweep: the runs.
        seed: for the random shuffling.
    """
    rng = np.random.default_rng(seed)
    numbered = primary(sweep.tables["token_groups"].lazy()).drop_nulls("mean_logprob").collect()
    names = numbered.group_by("trial_key").agg(pl.col("group").unique().sort()).sort("trial_key")
    shuffled = [rng.permutation(of_run).tolist() for of_run in names["group"].to_list()]
    names_of_runs = names.with_columns(shuffled=pl.Series(shuffled, dtype=pl.List(pl.String)))
    by_group = names_of_runs.explode("group", "shuffled")
    tables = {
        table: sweep.tables[table]
        .join(by_group, on=["trial_key", "group"], how="left", maintain_order="left")
        .with_columns(group=pl.coalesce("shuffled", "group"))
        .drop("shuffled")
        for table in ("token_groups", "group_weights")
    }
    note = f"A control: the names of token groups are shuffled within each run (seed {seed})."
    return replace(
        sweep,
        notes=(*sweep.notes, note),
        stamps={},
        tables={**sweep.tables, **tables},
    )
