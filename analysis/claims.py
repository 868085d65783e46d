"""The claims: what each says, how a run is measured for it, and what decides it.

A claim has parts. A part gives every run a number; the centre of that number over independent units
(mean, median or share) has an interval and a p-value, and the claim says where the interval has to
lie. Claims and margins are data, fixed before the runs: `digest` names them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import polars as pl

from analysis.depth_gradient import gradient_tau, last_steps, layer_growth, looked_at
from analysis.rare_tokens import ORDERS, group_changes, orders_hold
from analysis.runs import RunTables
from gptcore.records import PRIMARY

Values = pl.DataFrame
"""Columns trial_key, part, value: the numbers of finished runs. A run that has none has no row."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One number of a run, and what its centre over units has to be for the claim to be supported.

    Supported where the whole interval lies above `low` or below `high` (or between the two);
    contradicted where all of it lies beyond `against`, which is that bound itself if not given.
    The p-value tests against `null`, which is the bound itself if not given. A part that does not
    decide is reported beside those that do.
    """

    centre: str  # mean, median or share
    low: float | None = None
    high: float | None = None
    against: float | None = None
    null: float | None = None
    decides: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim:
    says: str
    source: str  # the experiment it comes from
    unit: str  # of the number
    parts: Mapping[str, Part]  # `*` stands for parts that the runs name
    measure: Callable[[RunTables], Values]
    section: str  # of the report: a key of its SECTIONS
    version: int = 1  # raised when `measure` gives other numbers
    course: bool = False  # its parts are one number at several steps, the last step's last
    over_subsets: bool = False  # a run has a number only beside runs on other subsets

    def rule(self, part: str) -> Part:
        return self.parts.get(part) or self.parts["*"]


@functools.lru_cache(maxsize=8)
def growth_of(sweep: RunTables, kind: str) -> pl.DataFrame:
    """layer_growth of a sweep, made once."""
    return layer_growth(sweep.tables["weights"].lazy(), kind)


@functools.lru_cache(maxsize=2)
def changes_of(sweep: RunTables) -> pl.DataFrame:
    """group_changes of a sweep, made once."""
    return group_changes(sweep.tables["token_groups"].lazy())


def init_table(sweep: RunTables) -> Values:
    """Largest error of a kind's std at step 0, relative to what it was drawn from.

    A kind drawn from zeros counts as wrong beyond any bound where it is not all zeros.
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
    return (
        worst.join(zeros, on="trial_key", how="left")
        .with_columns(
            value=pl.when(pl.col("largest").fill_null(0.0) > 0).then(1.0).otherwise("value")
        )
        .select("trial_key", part=pl.lit("largest error of a kind"), value="value")
    )


def init_errors(sweep: RunTables) -> pl.DataFrame:
    """Per run and kind of weight that is drawn at random: trial_key, kind, the std it was drawn
    from, the one found at step 0, and the error of this, relative."""
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
    """log p at step 0 of the source's three groups minus -(ln V + d std^2 / 2), and their gaps."""
    groups = ("common_100", "rare_100", "never_100")
    start = (
        sweep.tables["token_groups"]
        .filter(step=0, mask=PRIMARY["mask"])
        .pivot("group", groups, index="trial_key", values="mean_logprob")
        .join(closed_form(sweep), on="trial_key")
    )
    numbers = {f"{group} - level": pl.col(group) - pl.col("level") for group in groups}
    for i, group in enumerate(groups):
        for other in groups[:i]:
            numbers[f"{group} - {other}"] = pl.col(group) - pl.col(other)
    return _long(start, numbers)


def closed_form(sweep: RunTables) -> pl.DataFrame:
    """trial_key, level: -(ln V + d std^2 / 2), std being that of the head's rows."""
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
    """d(log std) of Q, K and V, median over the layers, at the last step."""
    frames = []
    for kind in "qkv":
        growth = last_steps(growth_of(sweep, kind))
        by_run = growth.group_by("trial_key", maintain_order=True).agg(pl.col("growth").median())
        frames.append(_long(by_run, {kind: pl.col("growth")}))
    return pl.concat(frames)


def depth_gradient(sweep: RunTables) -> Values:
    """tau over depth at the last step, of growth and of RMS displacement."""
    last = last_steps(growth_of(sweep, "qkv"))
    return pl.concat(
        [
            _long(gradient_tau(last, ["trial_key"], column), {part: pl.col("tau")})
            for column, part in (("growth", "tau"), ("displacement", "tau of RMS displacement"))
        ]
    )


def depth_gradient_lasts(sweep: RunTables) -> Values:
    """tau at each of STEPS that is recorded, and at the last step."""
    growth = looked_at(growth_of(sweep, "qkv"))
    at = pl.format("tau at step {}", "step")
    part = pl.when("is_last").then(pl.lit("tau at the last step")).otherwise(at)
    tau = gradient_tau(growth, ["trial_key", "step", "is_last"])
    return _known(tau.select("trial_key", part=part, value="tau"))


def first_layer_widest(sweep: RunTables) -> Values:
    """1 where the QKV of layer 0 grows more than that of every other layer, else 0."""
    growth = last_steps(growth_of(sweep, "qkv"))
    by_run = growth.group_by("trial_key", maintain_order=True).agg(
        first=pl.col("growth").filter(pl.col("layer") == 0).first(),
        others=pl.col("growth").filter(pl.col("layer") > 0).max(),
    )
    widest = pl.col("first") > pl.col("others")
    return _long(by_run, {"layer 0 widest": widest.cast(pl.Float64)})


def heavier_tails(sweep: RunTables) -> Values:
    """d(excess kurtosis) of QKV, median over the layers."""
    qkv = sweep.tables["weights"].filter(kind="qkv").sort("step", maintain_order=True)
    by_layer = qkv.group_by("trial_key", "layer", maintain_order=True).agg(
        change=pl.col("excess_kurtosis").last() - pl.col("excess_kurtosis").first()
    )
    by_run = by_layer.group_by("trial_key", maintain_order=True).agg(pl.col("change").median())
    return _long(by_run, {"change of excess kurtosis": pl.col("change")})


def order(sweep: RunTables) -> Values:
    """1 where the last log-probs stand in the order said, by the source's groups and by bins."""
    held = orders_hold(changes_of(sweep))
    return _long(held, {name: pl.col(name).cast(pl.Float64) for name in ORDERS})


def rare_falls(sweep: RunTables) -> Values:
    """Change of rare's mean log-prob, and how far above the smoothed unigram model it ends."""
    return _change(sweep, {"rare": ("change", "rare_100"), EXCESS: ("excess", "rare_100")})


def rare_flips(sweep: RunTables) -> Values:
    """1 where the sign of rare's change is the one that calibration predicts, else 0.

    A calibrated singleton stands at ln(1 / N) for a text of N tokens: below its start on a long
    text, above it on a short one.
    """
    both = rare_by_size(sweep).with_columns(falls=pl.col("predicted") < 0)
    if both["falls"].n_unique() < 2:
        both = both.clear()  # no sweep over sizes on both sides
    return _known(
        both.select(
            "trial_key",
            part=pl.when("falls").then(pl.lit("falls on a long text"))
            .otherwise(pl.lit("rises on a short text")),
            value=((pl.col("change") < 0) == pl.col("falls")).cast(pl.Float64),
        )
    )  # fmt: skip


def rare_by_size(sweep: RunTables) -> pl.DataFrame:
    """Per run: trial_key, n_tokens that it trains on, change of rare's mean log-prob, and
    predicted: what the change would be if it ended calibrated, at ln(1 / N)."""
    # The bins hold every token once; the source's groups overlap them.
    bins = sweep.tables["group_members"].filter(~pl.col("group").str.ends_with("_100"))
    sizes = bins.group_by("trial_key").agg(n_tokens=pl.col("n_occurrences").sum())
    changes = changes_of(sweep).filter(group="rare_100")
    return (
        changes.join(sizes, on="trial_key", maintain_order="left")
        .join(closed_form(sweep), on="trial_key", maintain_order="left")
        .select(
            "trial_key", "n_tokens", "change", predicted=-pl.col("n_tokens").log() - pl.col("level")
        )
    )


def never_suppressed(sweep: RunTables) -> Values:
    """Change of never's mean log-prob, and by how much it exceeds rare's."""
    found = _change(sweep, {"never": ("change", "never_100"), "rare": ("change", "rare_100")})
    wide = found.pivot("part", ["never", "rare"], index="trial_key", values="value")
    return _long(wide, {"never": pl.col("never"), "never - rare": pl.col("never") - pl.col("rare")})


def common_at_random_or_above(sweep: RunTables) -> Values:
    """Change of common's mean log-prob, held against a margin and against none."""
    return _change(sweep, dict.fromkeys(("common", "common, margin 0"), ("change", "common_100")))


def _change(sweep: RunTables, parts: Mapping[str, tuple[str, str]]) -> Values:
    """Per run, from step 0 to the last step: of each part the (column, group) of group_changes."""
    changes = changes_of(sweep)
    frames = [
        changes.filter(group=group).select("trial_key", part=pl.lit(part), value=column)
        for part, (column, group) in parts.items()
    ]
    return _known(pl.concat(frames))


def mask_matters(sweep: RunTables) -> Values:
    """log p of the common group at the last step, without the mask minus with it."""
    rows = last_steps(sweep.tables["token_groups"]).filter(group="common_100")
    by_mask = rows.pivot("mask", ["none", "sequence"], index="trial_key", values="mean_logprob")
    return _long(by_mask, {"common, unmasked - masked": pl.col("none") - pl.col("sequence")})


def unused_rows_move(sweep: RunTables) -> Values:
    """RMS displacement of the rows of never-used tokens, relative to their RMS at step 0; and what
    it does to their log-prob: change = logit's part + log Z's part.

    Where weight decay would move them too there is no number.
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
    """One row a run and number, from one row a run."""
    table = wide.select("trial_key", **numbers)
    return _known(table.unpivot(index="trial_key", variable_name="part", value_name="value"))


def _known(values: Values) -> Values:
    return values.filter(pl.col("value").is_not_null() & pl.col("value").is_finite())


A, B = "weight initialisation and the spread of attention weights", "unused tokens"
EXCESS = "rare, above the smoothed unigram at the end"
LOGIT, LOG_Z = "never used, logit's part (nats)", "never used, log Z's part (nats)"

CLAIMS: dict[str, Claim] = {
    "init_table": Claim(
        says="Weights start as the init scheme says, and biases at 0.",
        source=A, unit="relative error of std", measure=init_table, section="start",
        parts={"largest error of a kind": Part(centre="mean", high=0.03)},
    ),
    "untrained_level": Claim(
        says="Untrained, all token groups stand at -(ln V + d std^2 / 2), equally.",
        source=B, unit="nats", measure=untrained_level, section="start",
        parts={"*": Part(centre="mean", low=-0.05, high=0.05)},
    ),
    "widening": Claim(
        says="Q, K and V widen in training.",
        source=A, unit="d(log std)", measure=widening, section="widening",
        parts={"*": Part(centre="median", low=0.0)},
    ),
    "depth_gradient": Claim(
        says="The attention weights of earlier layers widen more.",
        source=A, unit="tau", measure=depth_gradient, section="depth",
        parts={
            "tau": Part(centre="median", low=0.3, against=0.0, null=0.0),
            "tau of RMS displacement": Part(
                centre="median", low=0.3, against=0.0, null=0.0, decides=False
            ),
        },
    ),
    "depth_gradient_lasts": Claim(
        says="The gradient over depth is there from step 50 to the last step.",
        source=A, unit="tau", measure=depth_gradient_lasts, section="depth", course=True,
        parts={"*": Part(centre="median", low=0.0)},
    ),
    "first_layer_widest": Claim(
        says="The block next to the embedding widens most.",
        source=A, unit="share of runs", measure=first_layer_widest, section="widening",
        parts={"layer 0 widest": Part(centre="share", low=0.8, against=0.5, null=0.5)},
    ),
    "heavier_tails": Claim(
        says="The tails of attention weights get longer in training.",
        source=A, unit="d(excess kurtosis)", measure=heavier_tails, section="tails",
        parts={"change of excess kurtosis": Part(centre="median", low=0.0)},
    ),
    "order": Claim(
        says="After training common tokens are more probable than rare, those than unused.",
        source=B, unit="share of runs", measure=order, section="tokens",
        parts={"*": Part(centre="share", low=0.8, against=0.5, null=0.5)},
    ),
    "rare_falls": Claim(
        says="Rare tokens fall below their start.",
        source=B, unit="nats", measure=rare_falls, section="rare",
        parts={
            "rare": Part(centre="mean", high=0.0),
            EXCESS: Part(centre="mean", high=0.0, decides=False),
        },
    ),
    "rare_flips": Claim(
        says="Rare tokens rise on a text so short that calibration alone predicts it, else fall.",
        source=B, unit="share of runs", measure=rare_flips, section="rare", over_subsets=True,
        parts={"*": Part(centre="share", low=0.8, against=0.5, null=0.5)},
    ),
    "never_suppressed": Claim(
        says="Tokens that never occur fall by more than a nat, and by more than rare ones.",
        source=B, unit="nats", measure=never_suppressed, section="unused",
        parts={
            "never": Part(centre="mean", high=-1.0, against=0.0),
            "never - rare": Part(centre="mean", high=0.0),
        },
    ),
    "common_at_random_or_above": Claim(
        says="Common tokens do not fall below their start.",
        source=B, unit="nats", measure=common_at_random_or_above, section="tokens",
        parts={
            "common": Part(centre="mean", low=-0.1),
            "common, margin 0": Part(centre="mean", low=0.0, decides=False),
        },
    ),
    "mask_matters": Claim(
        says="Without the mask common tokens look more probable than they are.",
        source=B, unit="nats", measure=mask_matters, section="tokens",
        parts={"common, unmasked - masked": Part(centre="mean", low=0.0)},
    ),
    "unused_rows_move": Claim(
        says="Embedding rows of tokens that never occur change without being read.",
        source=B, unit="RMS displacement / RMS at step 0", measure=unused_rows_move,
        section="unused",
        parts={
            "displacement": Part(centre="mean", low=0.01, against=0.01),
            LOGIT: Part(centre="mean", high=0.0, decides=False),
            LOG_Z: Part(centre="mean", high=0.0, decides=False),
        },
    ),
}  # fmt: skip


def digest() -> str:
    """12 hex digits that change with any statement, margin, rule or measure of CLAIMS."""
    data = {
        name: {
            "says": claim.says,
            "version": claim.version,
            "parts": {part: asdict(rule) for part, rule in claim.parts.items()},
        }
        for name, claim in CLAIMS.items()
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
