"""Every claim measured on real runs, and numbers planted or computed another way."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis import claims
from analysis.claims import CLAIMS, Part, digest
from analysis.measures import (
    COMMON,
    FIRST,
    FIRST_SHARE,
    LAW,
    NEVER_100,
    ONCE,
    RARE_100,
    UNUSED,
)
from analysis.rare_tokens import shuffled_labels
from analysis.runs import read_sweeps
from analysis.verdicts import judge
from gptcore.records import PRIMARY
from helpers.store import store_in


@pytest.fixture(scope="module")
def sweep(finished_sweep):
    return read_sweeps(store_in(finished_sweep), ["small"], None, finished_sweep / "cache")


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_gives_finished_runs_numbers_for_its_parts(name, sweep):
    claim = CLAIMS[name]
    values = claim.measure(sweep)
    finished = set(sweep.trials.filter(status="finished")["trial_key"])
    assert values.columns == ["trial_key", "part", "value"]
    assert set(values["trial_key"]) <= finished
    assert values["value"].is_finite().all()
    assert not values.select("trial_key", "part").is_duplicated().any()
    if "*" not in claim.parts:
        assert set(values["part"]) <= set(claim.parts)
    # On one text alone nothing can flip; all else is measured on every run.
    assert set(values["trial_key"]) == (set() if name == "rare_flips" else finished)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_has_a_rule_that_can_be_met_and_missed(name):
    for rule in CLAIMS[name].parts.values():
        assert rule.centre in ("mean", "median", "share")
        assert rule.low is not None or rule.high is not None


@pytest.mark.parametrize("name", CLAIMS)
def test_the_order_of_rows_does_not_matter(name, sweep):
    shuffled = {
        table: frame.sample(fraction=1.0, shuffle=True, seed=1)
        for table, frame in sweep.tables.items()
    }
    by_key = ["part", "trial_key"]
    found = CLAIMS[name].measure(sweep).sort(by_key)
    assert CLAIMS[name].measure(replace(sweep, tables=shuffled)).sort(by_key).equals(found)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_gives_different_numbers_to_different_runs(name, sweep):
    """A measure that does not read its rows would silently give every run the same number."""
    if name in ("rare_flips", "init_table"):  # needs two texts; is about the start
        return
    by_part = CLAIMS[name].measure(sweep).group_by("part").agg(pl.col("value").n_unique())
    differing = dict(by_part.rows())
    for part in set(differing) - {FIRST_SHARE}:
        assert differing[part] > 1 or CLAIMS[name].unit == "tau", part  # two layers have two taus
    if name == "untrained_level":
        return
    # And no number depends on the first step alone.
    first = {table: frame.filter(pl.col("step") == 0) if "step" in frame.columns else frame
             for table, frame in sweep.tables.items()}  # fmt: skip
    at_start = CLAIMS[name].measure(replace(sweep, tables=first))
    both = CLAIMS[name].measure(sweep).join(at_start, on=["trial_key", "part"], suffix="_first")
    assert both.filter(pl.col("value") == pl.col("value_first")).height < max(1, both.height // 2)


def values_of(name, sweep, **tables):
    found = CLAIMS[name].measure(replace(sweep, tables={**sweep.tables, **tables}))
    return {part: found.filter(part=part)["value"].to_list() for part in set(found["part"])}


def test_the_untrained_model_stands_at_the_closed_form(sweep):
    for part, numbers in values_of("untrained_level", sweep).items():
        assert np.abs(numbers).max() < 0.05, part


def test_an_init_that_is_not_what_it_says_is_found(sweep):
    (sound,) = values_of("init_table", sweep).values()
    assert max(sound) < 0.15  # wpe has 256 elements here
    wide = sweep.tables["weights"].with_columns(
        std=pl.when(pl.col("kind") == "fc").then(pl.col("std") * 1.5).otherwise("std")
    )
    (found,) = values_of("init_table", sweep, weights=wide).values()
    assert found == pytest.approx([0.5] * 4, abs=0.05)
    biased = sweep.tables["weights"].with_columns(
        max_abs=pl.when(pl.col("kind") == "bias").then(0.1).otherwise("max_abs")
    )
    (found,) = values_of("init_table", sweep, weights=biased).values()
    assert found == [1.0] * 4


def test_planted_growth_over_depth_is_found(sweep):
    steps = pl.col("step") > 0
    weights = sweep.tables["weights"].filter(pl.col("kind").is_in(["q", "k", "v", "qkv"]))
    for sign in (1, -1):
        planted = weights.with_columns(
            std=0.02 * pl.when(steps).then(1.5 - sign * 0.1 * pl.col("layer")).otherwise(1.0),
            excess_kurtosis=pl.when(steps).then(0.25 * sign).otherwise(0.0),
            rms_displacement=pl.when(steps).then(0.5 + sign * 0.1 * pl.col("layer")).otherwise(0.0),
        )
        assert values_of("depth_gradient", sweep, weights=planted) == {
            "tau": [sign] * 4,
            "tau of RMS displacement": [-sign] * 4,
            **{f"tau of {kind}": [sign] * 4 for kind in "qkv"},
        }
        first = values_of("first_layer_widest", sweep, weights=planted)
        assert first[FIRST_SHARE] == [float(sign > 0)] * 4
        ahead = np.log(1.5) - np.log(1.5 - sign * 0.1)
        assert first[FIRST] == pytest.approx([ahead] * 4)
        tails = values_of("heavier_tails", sweep, weights=planted)
        assert tails == {kind: [0.25 * sign] * 4 for kind in ("q", "k", "v", "qkv")}
        growth = np.median(np.log([1.5, 1.5 - sign * 0.1]))
        widening = values_of("widening", sweep, weights=planted)
        for kind in "qkv":
            assert widening[kind] == pytest.approx([growth] * 4)


def test_growth_that_follows_from_displacement_is_reported_separately(sweep):
    """A weight that moves by d in random directions grows by half log(1 + (d / std)^2)."""
    moved = 0.015
    steps = pl.col("step") > 0
    start = 0.02 + 0.01 * pl.col("layer")
    by_law = (
        sweep.tables["weights"]
        .filter(pl.col("kind").is_in(["q", "k", "v"]))
        .with_columns(
            std=pl.when(steps).then((start**2 + moved**2).sqrt()).otherwise(start),
            rms_displacement=pl.when(steps).then(moved).otherwise(0.0),
        )
    )
    found = values_of("widening", sweep, weights=by_law)
    assert min(found["q"]) > 0.05
    assert found[LAW] == pytest.approx([0.0] * 4, abs=1e-12)


def planted_groups(sweep, ends):
    """Every trial's groups go from -10.8 to their planted end; unmasked ones end a nat higher."""
    rows = [
        {"trial_key": key, "group": group, "step": step, **PRIMARY, "mask": mask}
        | {"mean_logprob": value, "mean_logit": 0.0, "log_z": -value, "excess": 0.0}
        for key in sweep.trials.filter(status="finished")["trial_key"]
        for group, end in ends.items()
        for step, at in ((0, -10.8), (5, end))
        for mask, value in (("sequence", at), ("none", at + step / 5))
    ]
    return pl.DataFrame(rows)


def test_planted_changes_of_groups_are_found(sweep):
    groups = planted_groups(
        sweep,
        {"common_100": -6.0, "rare_100": -12.0, "never_100": -14.0, "singletons": -15.0,
         "never_used": -14.0},
    )  # fmt: skip
    found = {
        name: values_of(name, sweep, token_groups=groups)
        for name in ("rare_falls", "never_suppressed", "common_at_random_or_above", "mask_matters")
    }
    assert found["rare_falls"][ONCE] == pytest.approx([-4.2] * 4)
    assert found["rare_falls"][RARE_100] == pytest.approx([-1.2] * 4)
    assert found["never_suppressed"][UNUSED] == pytest.approx([-3.2] * 4)
    assert found["never_suppressed"][f"{UNUSED} - {ONCE}"] == pytest.approx([1.0] * 4)
    assert found["never_suppressed"][f"{NEVER_100} - {RARE_100}"] == pytest.approx([-2.0] * 4)
    assert found["common_at_random_or_above"][COMMON] == pytest.approx([4.8] * 4)
    assert found["mask_matters"][f"{COMMON}, unmasked - masked"] == pytest.approx([1.0] * 4)
    orders = values_of("order", sweep, token_groups=groups)
    assert {name: {round(number, 9) for number in numbers} for name, numbers in orders.items()} == {
        f"{COMMON} - {RARE_100}": {6.0},
        f"{RARE_100} - {NEVER_100}": {2.0},
        f"{COMMON} - {ONCE}": {9.0},
        f"{ONCE} - {UNUSED}": {-1.0},
    }


def test_a_flip_is_looked_for_where_calibration_predicts_one(sweep):
    keys = sweep.trials.filter(status="finished")["trial_key"].to_list()
    # -ln 100,000 is below the start, -ln 10,000 above it.
    members = pl.DataFrame(
        [
            {"trial_key": key, "group": "singletons", "n_tokens": 9, "n_occurrences": n}
            for key, n in zip(keys, [100_000, 100_000, 10_000, 10_000], strict=True)
        ]
    )
    groups = planted_groups(sweep, {"singletons": -12.0})
    found = values_of("rare_flips", sweep, token_groups=groups, group_members=members)
    assert found["falls on a long text"] == pytest.approx([1.2, 1.2])
    assert found["rises on a short text"] == pytest.approx([-1.2, -1.2])


def test_unused_rows_are_those_of_the_tokens_table(sweep, finished_sweep):
    found = values_of("unused_rows_move", sweep)["displacement"]
    runs = store_in(finished_sweep).trial_runs()
    for key, moved in zip(
        CLAIMS["unused_rows_move"].measure(sweep).filter(part="displacement")["trial_key"],
        found,
        strict=True,
    ):
        file = runs[key].info.artifact_uri.removeprefix("file://") + "/tokens.parquet"
        first, last = pl.read_parquet(file).sort("step").to_dicts()
        unused = np.array(first["count"]) == 0
        rms = [np.sqrt(np.mean(np.array(row)[unused] ** 2)) for row in
               (last["displacement"], first["norm"])]  # fmt: skip
        assert moved == pytest.approx(rms[0] / rms[1], rel=1e-4)


def test_weight_decay_takes_its_runs_out_of_the_claim_on_unused_rows(sweep):
    decayed = sweep.trials.with_columns(pl.lit(0.1).alias("optim.weight_decay"))
    assert CLAIMS["unused_rows_move"].measure(replace(sweep, trials=decayed)).is_empty()


def test_the_digest_follows_every_margin_and_statement(monkeypatch):
    before = digest()
    claim = CLAIMS["depth_gradient"]
    for other in (
        replace(claim, parts={"tau": Part(centre="median", low=0.2, against=0.0)}),
        replace(claim, says="Something else."),
    ):
        monkeypatch.setattr(claims, "CLAIMS", {**CLAIMS, "depth_gradient": other})
        assert digest() != before
    monkeypatch.setattr(claims, "CLAIMS", dict(reversed(CLAIMS.items())))
    assert digest() == before
    assert digest(["depth_gradient"]) != before


def test_the_digest_follows_the_code_that_measures_and_decides(monkeypatch):
    before = digest()
    code_of = claims._code
    for changed in (
        "analysis.measures", "analysis.runs", "analysis.part_verdicts", "analysis.verdicts",
        "analysis.sweep_verdicts",
    ):  # fmt: skip
        codes = {name: code_of(name) + "x" * (name == changed) for name in
                 (*claims.RULES, "analysis.measures")}  # fmt: skip
        monkeypatch.setattr(claims, "_code", codes.__getitem__)
        assert digest() != before, changed


def test_with_shuffled_labels_no_claim_on_rare_tokens_is_supported(sweep):
    """A control: of runs in which every such claim holds, the names of the groups are shuffled."""
    changes = {
        "common_100": 4.4, "rare_100": -1.2, "never_100": -3.1, "never_used": -3.1,
        "singletons": -1.2, "count_2_3": -0.2, "count_4_15": 1.2, "count_16_63": 2.7,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    keys = [f"{config} {seed}" for config in "ab" for seed in range(20)]
    groups = pl.DataFrame(
        [
            {"trial_key": key, "group": group, "step": step, "mask": "sequence", "excess": 0.0}
            | {"mean_logprob": -10.8 + at, "mean_logit": 0.0, "log_z": 10.8 - at}
            for key in keys
            for group, change in changes.items()
            for step, at in ((0, 0.0), (5, change + rng.normal(0, 0.1)))
        ]
    )
    trials = pl.DataFrame(
        [{"trial_key": key, "status": "finished", "config": "these", "seed": key[2:]}
         for key in keys]
    )  # fmt: skip
    unused = groups.select("trial_key", "group", "step").with_columns(rms=1.0)
    planted = replace(
        sweep, trials=trials, tables={"token_groups": groups, "group_weights": unused}
    )
    on_rare_tokens = {name: CLAIMS[name] for name in ("order", "rare_falls", "never_suppressed")}

    def verdicts(tables):
        values = {name: claim.measure(tables) for name, claim in on_rare_tokens.items()}
        return [
            found.verdict for found in judge(on_rare_tokens, values, trials, general=False).values()
        ]

    assert verdicts(planted) == ["supported"] * 3
    wrong = sum("supported" in verdicts(shuffled_labels(planted, seed)) for seed in range(30))
    assert wrong <= 2  # at an error rate of 5%, 1.5 of 30 are expected at most
