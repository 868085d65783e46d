"""Measure a run: the numbers that decide the claims, computed from the tables of runs.

Each measure takes a sweep and returns Values. analysis.claims says which measure a claim has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import polars as pl

from analysis.depth_gradient import at_report_steps, gradient_tau, last_steps, layer_growth
from analysis.rare_tokens import group_changes
from analysis.runs import RunTables
from gptcore.records import PRIMARY

Values = pl.DataFrame
"""Columns trial_key, part, value: numbers of finished runs. A run without the number has no row."""

COMMON, ONCE, UNUSED = "common tokens", "tokens that occur once", "unused tokens"
RARE_100, NEVER_100 = "100 rarest tokens, drawn", "100 unused tokens, drawn"
EXCESS = "tokens that occur once, above the smoothed unigram at the end"
LAW = "growth beyond the law of displacement"
TAU_MOVED = "tau of RMS displacement"
TAUS = {kind: f"tau of {kind}" for kind in "qkv"}
FIRST = "layer 0 - widest other layer"
FIRST_SHARE = "share of runs in which layer 0 widens most"
LOGIT, LOG_Z = "unused tokens, logit's part (nats)", "unused tokens, log Z's part (nats)"
"""Names of parts, as claims have them."""

GROUPS = {COMMON: "common_100", ONCE: "singletons", UNUSED: "never_used"}
"""The token groups that decide claims. They are complete: no token is drawn at random."""
DRAWN = {COMMON: "common_100", RARE_100: "rare_100", NEVER_100: "never_100"}
"""The source's groups of 100 tokens. Two of them are drawn at random. They are reported, too."""
ALL_GROUPS = list(dict.fromkeys([*GROUPS.values(), *DRAWN.values()]))


@functools.lru_cache(maxsize=8)
def growth_of(sweep: RunTables, kind: str) -> pl.DataFrame:
    """Return layer_growth of a sweep. It is computed once."""
    return layer_growth(sweep.tables["weights"].lazy(), kind)


@functools.lru_cache(maxsize=2)
def changes_of(sweep: RunTables) -> pl.DataFrame:
    """Return group_changes of a sweep. It is computed once."""
    return group_changes(sweep.tables["token_groups"].lazy())


def init_table(sweep: RunTables) -> Values:
    """Measure the largest relative error of the std at step 0, over the kinds of weights.

    A weight that the scheme sets to zero has no std to compare. If any of its elements is not 0,
    the error of the run is 1, which is beyond the bound of the claim.
    """
    zeros = (
        sweep.tables["init"]
        .filter(pl.col("draw") == "constant", pl.col("kind") != "ln_weight")
        .join(
            sweep.tables["weights"].filter(step=0).select("trial_key", "tensor", "max_abs"),
            on=["trial_key", "tensor"],
        )
        .group_by("trial_key")
        .agg(largest=pl.col("max_abs").max())
    )
    worst = init_errors(sweep).group_by("trial_key").agg(value=pl.col("error").abs().max())
    return _known(
        worst.join(zeros, on="trial_key", how="left")
        .with_columns(
            value=pl.when(pl.col("largest").fill_null(0.0) > 0).then(1.0).otherwise("value")
        )
        .select("trial_key", part=pl.lit("largest error of a kind"), value="value")
    )


def init_errors(sweep: RunTables) -> pl.DataFrame:
    """Compare the std at step 0 with the std of the init scheme.

    Returns:
        One row for each run and kind of weight that is drawn at random: trial_key, kind, expected
        (the scheme's std), found (the std at step 0), error (found / expected - 1).
    """
    found = sweep.tables["weights"].filter(step=0).select("trial_key", "tensor", found="std")
    return (
        sweep.tables["init"]
        .filter(pl.col("draw") != "constant")
        .join(found, on=["trial_key", "tensor"])
        .group_by("trial_key", "kind", maintain_order=True)
        .agg(
            expected=(pl.col("std") ** 2).mean().sqrt(),
            found=(pl.col("found") ** 2).mean().sqrt(),
        )
        .with_columns(error=pl.col("found") / pl.col("expected") - 1)
    )


def untrained_level(sweep: RunTables) -> Values:
    """Measure the log-probs of token groups at step 0.

    The parts are the difference between each group and closed_form, and the differences between the
    groups (nats). Their names are those of level_parts.
    """
    start = (
        sweep.tables["token_groups"]
        .filter(step=0, mask=PRIMARY["mask"])
        .pivot("group", ALL_GROUPS, index="trial_key", values="mean_logprob")
        .join(closed_form(sweep), on="trial_key")
    )
    columns = {"level": "level", **GROUPS, **DRAWN}
    numbers = {
        f"{one} - {other}": pl.col(columns[one]) - pl.col(columns[other])
        for groups in (GROUPS, DRAWN)
        for one, other in _pairs(groups)
    }
    return _long(start, numbers)


def level_parts(groups: Mapping[str, str]) -> list[str]:
    """Return the parts of untrained_level for some groups: GROUPS or DRAWN."""
    return [f"{one} - {other}" for one, other in _pairs(groups)]


def _pairs(groups: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pair groups with the untrained level, and with each other."""
    return [*((one, "level") for one in groups), *itertools.combinations(groups, 2)]


def closed_form(sweep: RunTables) -> pl.DataFrame:
    """Compute the expected log-prob of any token in an untrained model.

    Returns:
        One row for each run: trial_key, level = -(ln V + d std^2 / 2) in nats, for V tokens, d
        channels and the std from which the rows of the head are drawn.
    """
    knobs = sweep.trials.select("trial_key", "model.vocab_size", "model.d_model", "model.tied")
    stds = sweep.tables["init"].filter(pl.col("kind").is_in(["wte", "head"]))
    head = stds.join(knobs, on="trial_key").filter(
        pl.col("kind") == pl.when("model.tied").then(pl.lit("wte")).otherwise(pl.lit("head"))
    )
    return head.select(
        "trial_key",
        level=-(
            pl.col("model.vocab_size").log() + pl.col("model.d_model") * pl.col("std") ** 2 / 2
        ),
    )


def widening(sweep: RunTables) -> Values:
    """Measure d(log std) of Q, K and V at the last step, as the median over the layers.

    The last part is the growth that a law does not explain. A weight of std s that moves by d (RMS)
    in random directions grows by d(log std) = 1/2 ln(1 + (d / s)^2). Growth therefore depends on
    the std at step 0, even if all weights move by the same distance.
    """
    frames, beyond = [], []
    for kind in "qkv":
        growth = last_steps(growth_of(sweep, kind))
        by_run = growth.group_by("trial_key", maintain_order=True).agg(pl.col("growth").median())
        frames.append(_long(by_run, {kind: pl.col("growth")}))
        start = pl.col("std") / pl.col("growth").exp()
        law = (1 + (pl.col("displacement") / start) ** 2).log() / 2
        beyond.append(growth.select("trial_key", beyond=pl.col("growth") - law))
    by_run = pl.concat(beyond).group_by("trial_key", maintain_order=True).agg(
        pl.col("beyond").median()
    )  # fmt: skip
    return pl.concat([*frames, _long(by_run, {LAW: pl.col("beyond")})])


def depth_gradient(sweep: RunTables) -> Values:
    """Measure tau over depth at the last step: of growth, of RMS displacement, of Q, K and V."""
    merged = last_steps(growth_of(sweep, "qkv"))
    numbers = [("tau", merged, "growth"), (TAU_MOVED, merged, "displacement")]
    numbers += [(part, last_steps(growth_of(sweep, kind)), "growth") for kind, part in TAUS.items()]
    return pl.concat(
        [
            _long(gradient_tau(growth, ["trial_key"], column), {part: pl.col("tau")})
            for part, growth, column in numbers
        ]
    )


def depth_gradient_lasts(sweep: RunTables) -> Values:
    """Measure tau at the last step, and at each recorded step of STEPS."""
    growth = at_report_steps(growth_of(sweep, "qkv"))
    at = pl.format("tau at step {}", "step")
    part = pl.when("is_last").then(pl.lit("tau at the last step")).otherwise(at)
    tau = gradient_tau(growth, ["trial_key", "step", "is_last"])
    return _known(tau.select("trial_key", part=part, value="tau"))


def first_layer_widest(sweep: RunTables) -> Values:
    """Measure how much more the QKV weight of layer 0 grows than any other layer's.

    The second part is 1 if layer 0 grows most, else 0.
    """
    growth = last_steps(growth_of(sweep, "qkv"))
    by_run = growth.group_by("trial_key", maintain_order=True).agg(
        first=pl.col("growth").filter(pl.col("layer") == 0).first(),
        others=pl.col("growth").filter(pl.col("layer") > 0).max(),
    )
    ahead = pl.col("first") - pl.col("others")
    return _long(by_run, {FIRST: ahead, FIRST_SHARE: (ahead > 0).cast(pl.Float64)})


def heavier_tails(sweep: RunTables) -> Values:
    """Measure the change of the excess kurtosis, as the median over the layers.

    The weights are Q, K, V and the merged QKV. The merged weight mixes three stds, so its tails can
    get longer although the tails of Q, K and V do not.
    """
    frames = []
    for kind in ("q", "k", "v", "qkv"):
        rows = sweep.tables["weights"].filter(kind=kind).sort("step", maintain_order=True)
        by_layer = rows.group_by("trial_key", "layer", maintain_order=True).agg(
            change=pl.col("excess_kurtosis").last() - pl.col("excess_kurtosis").first()
        )
        by_run = by_layer.group_by("trial_key", maintain_order=True).agg(pl.col("change").median())
        frames.append(_long(by_run, {kind: pl.col("change")}))
    return pl.concat(frames)


def order(sweep: RunTables) -> Values:
    """Measure the last log-prob of each group minus that of the next group (nats)."""
    changes = changes_of(sweep)
    last = changes.pivot("group", ALL_GROUPS, index="trial_key", values="end")
    return _long(
        last,
        {
            f"{above} - {below}": pl.col(columns[above]) - pl.col(columns[below])
            for columns in (GROUPS, DRAWN)
            for above, below in itertools.pairwise(columns)
        },
    )


def rare_falls(sweep: RunTables) -> Values:
    """Measure the change of the mean log-prob of rare tokens (nats).

    The last part is their last log-prob minus that of the smoothed unigram model of the text.
    """
    return _change(
        sweep,
        {
            ONCE: ("change", "singletons"),
            RARE_100: ("change", "rare_100"),
            EXCESS: ("excess", "singletons"),
        },
    )


def rare_flips(sweep: RunTables) -> Values:
    """Measure the change of the log-prob of rare tokens in the predicted direction (nats).

    A calibrated model gives ln(1 / N) to a token that occurs once in a text of N tokens. That is
    below the start of training for a long text, and above it for a short text.
    """
    both = rare_by_size(sweep).with_columns(falls=pl.col("predicted") < 0)
    if both["falls"].n_unique() < 2:
        both = both.clear()  # the sweep has no texts of both kinds
    return _known(
        both.select(
            "trial_key",
            part=pl.when("falls").then(pl.lit("falls on a long text"))
            .otherwise(pl.lit("rises on a short text")),
            value=pl.when("falls").then(-pl.col("change")).otherwise("change"),
        )
    )  # fmt: skip


def rare_by_size(sweep: RunTables) -> pl.DataFrame:
    """Compare the change of rare tokens with the change that calibration predicts.

    Returns:
        One row for each run: trial_key, n_tokens (the size of the text that the run trains on),
        change (of the mean log-prob of rare tokens, nats), predicted (the change if the model ended
        calibrated, at ln(1 / n_tokens)).
    """
    # The bins hold every token once; the source's groups, which end in _100, overlap with them.
    bins = sweep.tables["group_members"].filter(~pl.col("group").str.ends_with("_100"))
    sizes = bins.group_by("trial_key").agg(n_tokens=pl.col("n_occurrences").sum())
    changes = changes_of(sweep).filter(group="singletons")
    return (
        changes.join(sizes, on="trial_key", maintain_order="left")
        .join(closed_form(sweep), on="trial_key", maintain_order="left")
        .select(
            "trial_key", "n_tokens", "change", predicted=-pl.col("n_tokens").log() - pl.col("level")
        )
    )


def never_suppressed(sweep: RunTables) -> Values:
    """Measure the change of the mean log-prob of tokens that never occur (nats).

    The other parts are the differences of this change from that of rare tokens.
    """
    groups = {UNUSED: "never_used", ONCE: "singletons", NEVER_100: "never_100",
              RARE_100: "rare_100"}  # fmt: skip
    found = _change(sweep, {part: ("change", group) for part, group in groups.items()})
    wide = found.pivot("part", list(groups), index="trial_key", values="value")
    return _long(
        wide,
        {
            UNUSED: pl.col(UNUSED),
            f"{UNUSED} - {ONCE}": pl.col(UNUSED) - pl.col(ONCE),
            NEVER_100: pl.col(NEVER_100),
            f"{NEVER_100} - {RARE_100}": pl.col(NEVER_100) - pl.col(RARE_100),
        },
    )


def common_at_random_or_above(sweep: RunTables) -> Values:
    """Measure the change of the mean log-prob of common tokens (nats).

    Both parts are this number: one rule has a margin, the other has none.
    """
    return _change(sweep, dict.fromkeys((COMMON, f"{COMMON}, margin 0"), ("change", "common_100")))


def _change(sweep: RunTables, parts: Mapping[str, tuple[str, str]]) -> Values:
    """Select numbers of group_changes: for each part a (column, group)."""
    changes = changes_of(sweep)
    frames = [
        changes.filter(group=group).select("trial_key", part=pl.lit(part), value=column)
        for part, (column, group) in parts.items()
    ]
    return _known(pl.concat(frames))


def mask_matters(sweep: RunTables) -> Values:
    """Measure the log-prob of common tokens at the last step, without the mask minus with it."""
    rows = last_steps(sweep.tables["token_groups"]).filter(group="common_100")
    by_mask = rows.pivot("mask", ["none", "sequence"], index="trial_key", values="mean_logprob")
    return _long(by_mask, {f"{COMMON}, unmasked - masked": pl.col("none") - pl.col("sequence")})


def unused_rows_move(sweep: RunTables) -> Values:
    """Measure how far the embedding rows of never-used tokens move.

    The first part is their RMS displacement relative to their RMS at step 0. The other parts add up
    to the change of their log-prob: the logit's part and log Z's part (nats). A run with weight
    decay, which moves every row, has no number.
    """
    free = sweep.trials.filter(pl.col("optim.weight_decay") == 0).select("trial_key")
    unused = sweep.tables["group_weights"].filter(group="never_used").join(free, on="trial_key")
    by_run = unused.sort("step", maintain_order=True).group_by("trial_key", maintain_order=True)
    moved = by_run.agg(value=pl.col("rms_displacement").last() / pl.col("rms").first())
    changes = changes_of(sweep).filter(group="never_used")
    split = changes.join(free, on="trial_key", maintain_order="left")
    return pl.concat(
        [
            _long(moved, {"displacement": pl.col("value")}),
            _long(split, {LOGIT: pl.col("logit_change"), LOG_Z: -pl.col("log_z_change")}),
        ]
    )


def _long(wide: pl.DataFrame, numbers: Mapping[str, pl.Expr]) -> Values:
    """Turn a frame with one row for each run into Values, with one part for each number."""
    table = wide.select("trial_key", **numbers)
    return _known(table.unpivot(index="trial_key", variable_name="part", value_name="value"))


def _known(values: Values) -> Values:
    """Leave out numbers that are null or not finite."""
    return values.filter(pl.col("value").is_not_null() & pl.col("value").is_finite())
