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
"""Groups from least to most probable as the source reports them: its own three, then whole bins."""


def primary(token_groups: pl.LazyFrame) -> pl.LazyFrame:
    """The rows of gptcore.records.PRIMARY, of rows that are on its text and at its positions: those
    where a token among a sequence's own inputs is left out of that sequence."""
    return token_groups.filter(mask=PRIMARY["mask"])


def group_changes(token_groups: pl.LazyFrame) -> pl.DataFrame:
    """Per run and group, from step 0 to the last step, of the primary rows.

    Columns: trial_key, group, start, end, change, logit_change, log_z_change, excess, with
    change = logit_change - log_z_change (nats) and excess that of the end over the smoothed
    unigram. Null where too few tokens were left in.
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
    """Per run: trial_key and, for each of ORDERS, whether the last log-probs stand in that order.

    Null where one of the groups has no log-prob.
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
    """The sweep with the names of its token groups dealt anew within each run: a control, in which
    what is said of rare tokens is said of others as often.

    Dealt among the groups that the run has numbers for; the others keep their names.
    """
    rng = np.random.default_rng(seed)
    numbered = primary(sweep.tables["token_groups"].lazy()).drop_nulls("mean_logprob").collect()
    names = numbered.group_by("trial_key").agg(pl.col("group").unique().sort()).sort("trial_key")
    dealt = [rng.permutation(of_run).tolist() for of_run in names["group"].to_list()]
    new_names = names.with_columns(dealt=pl.Series(dealt, dtype=pl.List(pl.String)))
    by_group = new_names.explode("group", "dealt")
    tables = {
        table: sweep.tables[table]
        .join(by_group, on=["trial_key", "group"], how="left", maintain_order="left")
        .with_columns(group=pl.coalesce("dealt", "group"))
        .drop("dealt")
        for table in ("token_groups", "group_weights")
    }
    note = f"A control: the names of token groups are shuffled within each run (seed {seed})."
    return replace(
        sweep,
        notes=(*sweep.notes, note),
        claims_digest=None,
        tables={**sweep.tables, **tables},
    )
