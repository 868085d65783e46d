"""Verdicts on planted numbers: effects are found, and nothing is found where there is none."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_1samp

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import (
    CONTRADICTED,
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDERPOWERED,
    decide,
    p_value,
)
from analysis.power import detectable, least_seeds
from analysis.stats import Estimate, holm, mean_interval, sign_flip_p
from analysis.verdicts import compare, judge, judge_part

NUMBERS = [0.02, -0.01, 0.05, 0.03, 0.01, 0.04]
ABOVE = Part(centre="mean", low=1.0, against=0.0)
BELOW = Part(centre="mean", high=-1.0, against=0.0)
WITHIN = Part(centre="mean", low=-0.1, high=0.1)


def claim(**parts):
    return Claim(
        says="It is so.",
        source="a test",
        unit="nats",
        section="start",
        parts=parts,
        measure=lambda _: None,
    )


def trials(n_seeds, configs=("only",), diverged=()):
    return pl.DataFrame(
        [
            {
                "trial_key": f"{config} {seed}",
                "status": "diverged" if (config, seed) in diverged else "finished",
                "config": config,
                "seed": seed,
            }
            for config in configs
            for seed in range(n_seeds)
        ]
    )


def values(runs, numbers, part="x"):
    finished = runs.filter(status="finished")["trial_key"]
    return pl.DataFrame({"trial_key": finished, "part": part, "value": list(map(float, numbers))})


def verdict_of(rule, numbers):
    runs = trials(len(numbers))
    return judge({"it": claim(x=rule)}, {"it": values(runs, numbers)}, runs, general=False)["it"]


@pytest.mark.parametrize(
    ("rule", "low", "high", "verdict"),
    [
        (ABOVE, 1.1, 3.0, SUPPORTED),
        (ABOVE, 0.9, 3.0, UNDERPOWERED),
        (ABOVE, 0.1, 0.9, NOT_SUPPORTED),
        (ABOVE, -0.5, 0.9, NOT_SUPPORTED),
        (ABOVE, -0.5, -0.1, CONTRADICTED),
        (BELOW, -3.0, -1.1, SUPPORTED),
        (BELOW, -3.0, -0.9, UNDERPOWERED),
        (BELOW, -0.9, 0.5, NOT_SUPPORTED),
        (BELOW, 0.1, 0.5, CONTRADICTED),
        (WITHIN, -0.09, 0.05, SUPPORTED),
        (WITHIN, -0.2, 0.05, UNDERPOWERED),
        (WITHIN, 0.2, 0.3, CONTRADICTED),
        (Part(centre="mean", low=0.0), -0.2, -0.1, CONTRADICTED),
        (Part(centre="mean", low=0.0), -0.2, 0.1, UNDERPOWERED),
    ],
)
def test_a_verdict_says_where_the_interval_lies(rule, low, high, verdict):
    assert decide(rule, Estimate(seeds=9, value=(low + high) / 2, low=low, high=high)) == verdict


def test_a_planted_effect_is_supported_or_contradicted_by_its_sign():
    noise = np.random.default_rng(0).normal(0, 0.1, 8)
    assert verdict_of(ABOVE, 2 + noise).verdict == SUPPORTED
    assert verdict_of(ABOVE, 0.5 + noise).verdict == NOT_SUPPORTED
    assert verdict_of(ABOVE, -2 + noise).verdict == CONTRADICTED
    assert verdict_of(WITHIN, 0.1 * noise).verdict == SUPPORTED
    assert verdict_of(Part(centre="share", low=0.8, null=0.5), np.ones(30)).verdict == SUPPORTED


def test_too_few_seeds_are_called_so_with_the_number_that_would_do():
    found = verdict_of(replace(ABOVE, centre="median"), [2.0, 2.1, 1.9])
    assert found.verdict == UNDERPOWERED  # three seeds that agree have p = 1 / 8
    assert found.p == 1 / 8
    assert found.seeds_needed == 5  # 2^-5 < 0.05
    assert found.would_be == SUPPORTED
    wide = verdict_of(ABOVE, [3.0, 0.5, 1.2, 2.6, -0.4, 1.9])
    assert wide.verdict == UNDERPOWERED
    mean, sd = (
        np.mean([3.0, 0.5, 1.2, 2.6, -0.4, 1.9]),
        np.std([3, 0.5, 1.2, 2.6, -0.4, 1.9], ddof=1),
    )
    assert wide.seeds_needed == pytest.approx((2.04 * sd / (mean - 1)) ** 2, rel=0.05)


def test_many_claims_need_more_seeds_than_one():
    runs = trials(6)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 6)
    rule = replace(ABOVE, centre="median")
    alone = judge({"it": claim(x=rule)}, {"it": values(runs, numbers)}, runs)
    names = [f"claim {i}" for i in range(10)]
    among = judge(
        dict.fromkeys(names, claim(x=rule)),
        {name: values(runs, numbers) for name in names},
        runs,
        general=False,
    )
    assert alone["it"].verdict == SUPPORTED
    assert {found.verdict for found in among.values()} == {UNDERPOWERED}
    assert {found.seeds_needed for found in among.values()} == {8}  # 10 * 2^-8 < 0.05


def test_what_holds_for_one_configuration_of_two_does_not_hold_in_general():
    runs = trials(10, configs=("a", "b"))
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(6, 0.1, 10), rng.normal(0, 0.1, 10)])
    found = judge({"it": claim(x=ABOVE)}, {"it": values(runs, numbers)}, runs)["it"]
    assert found.parts["x"].over_seeds.low > 1  # for these two, on average, it does
    assert found.verdict == UNDERPOWERED
    assert found.configurations == 2


def test_every_part_of_a_claim_has_to_hold():
    runs = trials(8)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    both = pl.concat([values(runs, numbers, "x"), values(runs, -numbers, "y")])
    found = judge({"it": claim(x=ABOVE, y=ABOVE)}, {"it": both}, runs)["it"]
    assert [found.parts[part].verdict for part in "xy"] == [SUPPORTED, CONTRADICTED]
    assert found.verdict == CONTRADICTED


def test_a_diverged_run_counts_against_the_claim_in_the_worst_case():
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 9)
    found = verdict_of(ABOVE, numbers[:8])
    assert (found.verdict, found.verdict_with_diverged) == (SUPPORTED, SUPPORTED)
    runs = trials(11, diverged=[("only", seed) for seed in (3, 8, 10)])
    found = judge({"it": claim(x=ABOVE)}, {"it": values(runs, numbers[:8])}, runs)["it"]
    assert (found.verdict, found.diverged) == (SUPPORTED, 3)
    assert found.verdict_with_diverged == UNDERPOWERED


def test_the_worst_case_is_corrected_with_its_own_p():
    """Eight medians that agree pass among 12 claims; with one diverged run they do not."""
    runs = trials(9, diverged=[("only", 8)])
    rule = Part(centre="median", low=0.0)
    numbers = values(runs, 2 + np.random.default_rng(0).normal(0, 0.1, 8))
    names = [f"claim {i}" for i in range(12)]
    found = judge(dict.fromkeys(names, claim(x=rule)), dict.fromkeys(names, numbers), runs)
    assert {one.verdict for one in found.values()} == {SUPPORTED}
    assert {one.verdict_with_diverged for one in found.values()} == {UNDERPOWERED}


def test_seeds_that_not_every_configuration_has_are_left_out():
    runs = trials(12, configs=("a", "b")).filter((pl.col("config") == "a") | (pl.col("seed") < 1))
    value = pl.when(pl.col("config") == "a").then(1.0).otherwise(-9.0)
    numbers = runs.select("trial_key", part=pl.lit("x"), value=value)
    rule = Part(centre="mean", low=0.0)
    found = judge({"it": claim(x=rule)}, {"it": numbers}, runs, general=False)["it"]
    assert found.parts["x"].estimate.value == -4.0  # of both, and not of a alone
    assert (found.seeds, found.seeds_left_out) == (1, 11)
    assert found.verdict == UNDERPOWERED
    disjoint = runs.filter((pl.col("config") == "b") | (pl.col("seed") > 0))
    found = judge({"it": claim(x=rule)}, {"it": numbers}, disjoint, general=False)["it"]
    assert found.verdict == NOT_MEASURED


def test_a_claim_without_numbers_is_not_measured_and_costs_the_others_nothing():
    runs = trials(6)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 6)
    found = judge(
        {"it": claim(x=ABOVE), "other": claim(x=ABOVE)},
        {"it": values(runs, numbers), "other": values(runs, numbers).head(0)},
        runs,
    )
    assert found["other"].verdict == NOT_MEASURED
    assert found["it"].p_holm == found["it"].p
    assert found["it"].verdict == SUPPORTED


def test_a_claim_is_not_supported_by_some_of_its_parts():
    """Over bytes, for example, no token is rare, so unused minus rare tokens is not known."""
    runs = trials(6)
    numbers = values(runs, 2 + np.random.default_rng(0).normal(0, 0.1, 6))
    judged = judge({"it": claim(x=ABOVE, y=ABOVE)}, {"it": numbers}, runs)["it"]
    assert judged.parts["x"].verdict == SUPPORTED
    assert judged.verdict == judged.verdict_with_diverged == NOT_MEASURED
    assert judged.p is judged.p_holm is None  # so it costs the other claims nothing
    reported = claim(x=ABOVE, y=replace(ABOVE, decides=False))
    assert judge({"it": reported}, {"it": numbers}, runs)["it"].verdict == SUPPORTED


def test_a_claim_that_has_numbers_only_for_what_does_not_decide_is_not_measured():
    runs = trials(6)
    rules = claim(x=ABOVE, reported=replace(ABOVE, decides=False))
    numbers = values(runs, np.arange(6.0), "reported")
    judged = judge(
        {"it": rules, "other": claim(x=ABOVE)},
        {"it": numbers, "other": numbers.with_columns(part=pl.lit("x"))},
        runs,
    )
    assert judged["it"].verdict == NOT_MEASURED
    assert list(judged["it"].parts) == ["reported"]


def test_a_claim_fails_by_one_of_its_parts_whatever_the_others():
    runs = trials(6)
    numbers = values(runs, -2 + np.random.default_rng(0).normal(0, 0.1, 6))
    judged = judge({"it": claim(x=ABOVE, y=ABOVE)}, {"it": numbers}, runs)["it"]
    assert judged.verdict == CONTRADICTED


def test_the_order_of_runs_does_not_matter():
    runs = trials(7, configs=("a", "b"))
    numbers = values(runs, np.random.default_rng(1).normal(1, 1, 14))
    found = judge({"it": claim(x=ABOVE)}, {"it": numbers}, runs)
    again = judge({"it": claim(x=ABOVE)}, {"it": numbers.reverse()}, runs.reverse())
    assert found == again


def null_numbers(part, rng, n_configs, n_seeds):
    """Numbers of runs for which a part's null holds, with effects that seeds and configs share."""
    null = next(bound for bound in (part.null, part.low, part.high) if bound is not None)
    if part.centre == "share":
        return (rng.random((n_configs, n_seeds)) < null).astype(float).ravel()
    shared = rng.normal(0, 0.7, (1, n_seeds))
    if n_configs > 1:  # with one configuration, an effect that it has would not be a null
        shared = shared + rng.normal(0, 0.7, (n_configs, 1))
    return (null + shared + rng.normal(0, 0.5, (n_configs, n_seeds))).ravel()


@pytest.mark.parametrize(
    ("n_configs", "n_seeds", "sweeps"),
    [
        (6, 12, 60),
        pytest.param(1, 12, 1000, marks=pytest.mark.full),
        pytest.param(12, 12, 1000, marks=pytest.mark.full),
    ],
)
def test_sweeps_in_which_nothing_holds_seldom_support_anything(n_configs, n_seeds, sweeps, capsys):
    """All claims at once: at most 5% of sweeps have any claim supported that is not true."""
    runs = trials(n_seeds, configs=[f"config {i}" for i in range(n_configs)])
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(sweeps):
        numbers = {
            name: pl.concat(
                [
                    values(runs, null_numbers(part, rng, n_configs, n_seeds), label)
                    for label, part in one.parts.items()
                ]
            )
            for name, one in CLAIMS.items()
        }
        found = judge(CLAIMS, numbers, runs)
        wrong += any(one.verdict == SUPPORTED for one in found.values())
    with capsys.disabled():
        print(f"\n{n_configs} configurations x {n_seeds} seeds: {wrong} of {sweeps} null sweeps")
    assert wrong <= 0.05 * sweeps


@pytest.mark.parametrize(("n_configs", "n_seeds"), [(6, 8), (8, 20)])
def test_the_interval_in_general_covers_at_its_nominal_rate(n_configs, n_seeds, capsys):
    """Seeds, configurations and runs each have a random effect. The truth is the mean over all."""
    rng, rule, sweeps, covered = np.random.default_rng(0), Part(centre="mean", low=0.0), 1000, 0
    names = [(seed, f"config {i}") for i in range(n_configs) for seed in range(n_seeds)]
    for _ in range(sweeps):
        effects = rng.normal(0, 0.7, (n_configs, 1)) + rng.normal(0, 0.7, (1, n_seeds))
        numbers = (2 + effects + rng.normal(0, 0.5, (n_configs, n_seeds))).ravel()
        runs = [(*name, number) for name, number in zip(names, numbers.tolist(), strict=True)]
        estimate = judge_part(rule, runs, general=True).estimate
        covered += estimate.low <= 2 <= estimate.high
    with capsys.disabled():
        print(f"\n{n_configs} x {n_seeds}: {covered / sweeps:.3f} of intervals in general cover")
    # Four standard errors. The effect of a run counts for both units, so intervals are a bit wide.
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / sweeps) <= covered / sweeps <= 0.99


def test_an_interval_in_general_stays_where_its_number_can_be():
    """Seeds agree on a share and a median that configurations do not share."""
    runs = trials(8, configs=[f"config {i}" for i in range(4)])
    config = pl.col("config").str.tail(1).cast(int)
    for centre, numbers in (("share", config >= 3), ("median", 2.0 * (config >= 3) - 1)):
        numbers = runs.select("trial_key", part=pl.lit("x"), value=numbers.cast(float))
        rule = claim(x=Part(centre=centre, low=0.8))
        found = judge({"it": rule}, {"it": numbers}, runs)["it"].parts["x"]
        low, high = found.estimate.low, found.estimate.high
        if centre == "share":
            assert 0 <= low < 0.25 < high <= 1
        else:  # four configurations are too few for a median's interval
            assert (low, high) == (None, None)


def test_schemes_are_compared_on_the_same_seed_and_subset():
    runs = pl.DataFrame(
        [
            {"trial_key": f"{scheme} {subset} {seed}", "scheme": scheme, "corpus.subset": subset,
             "seed": seed, "value": 10.0 * seed + (subset == "half") + shift * (1 + seed)}
            for scheme, shift in (("a", 0.0), ("b", 0.5))
            for subset in ("all", "half")
            for seed in range(4)
            if (scheme, subset, seed) != ("b", "half", 3)
        ]
    )  # fmt: skip
    numbers = runs.select("trial_key", "value", part=pl.lit("x"))
    trials = runs.drop("value").with_columns(pl.lit(0).alias("corpus.data_seed"))
    found = compare(claim(x=ABOVE), numbers, trials, "a")
    differences = [0.5, 1.0, 1.5, 2.0]  # seeds differ by 10, schemes within a seed by little
    assert found["x"]["b"].value == pytest.approx(np.mean(differences))
    assert found["x"]["b"].seeds == 4
    assert found["x"]["b"].p == pytest.approx(ttest_1samp(differences, 0).pvalue)
    assert list(found["x"]) == ["b"]
    # Shares and medians come in steps, and differences of a few of them are soon all alike.
    ranks = compare(claim(x=replace(ABOVE, centre="share")), numbers, trials, "a")
    assert ranks["x"]["b"].p == 2 * 2**-4
    alike = numbers.with_columns(value=pl.col("trial_key").str.starts_with("b").cast(float))
    assert compare(claim(x=ABOVE), alike, trials, "a")["x"]["b"].p == 2 * 2**-4


def test_planted_effects_are_found_with_the_power_that_the_seeds_have(capsys):
    """The power that theory gives a t-test at these sizes."""
    from scipy import stats

    rng = np.random.default_rng(0)
    runs, rule, sweeps = trials(8), Part(centre="mean", low=0.0), 400
    lines = []
    for effect in (0.0, 1.0, 2.0):
        found = sum(
            judge({"it": claim(x=rule)}, {"it": values(runs, rng.normal(effect, 1, 8))}, runs)[
                "it"
            ].verdict
            == SUPPORTED
            for _ in range(sweeps)
        )
        t = stats.t.ppf(0.975, 7)
        power = 1 - stats.nct.cdf(t, 7, effect * math.sqrt(8)) if effect else 0.025
        lines.append(f"effect {effect} sd: power {found / sweeps:.2f}, of a t-test {power:.2f}")
        assert found / sweeps == pytest.approx(power, abs=0.08)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_the_least_seeds_of_a_claim_can_support_it_and_one_fewer_cannot():
    """Every claim has numbers that support it and hardly vary."""

    def supported(n_seeds):
        runs, rng = trials(n_seeds), np.random.default_rng(0)
        numbers = {}
        for name, one in CLAIMS.items():
            parts = []
            for label, rule in one.parts.items():
                best = 0.0 if rule.low is not None and rule.high is not None else (
                    rule.low + 1 if rule.low is not None else rule.high - 1
                )  # fmt: skip
                noise = best + 1e-9 * rng.normal(size=n_seeds)
                share = np.ones(n_seeds)
                parts.append(values(runs, share if rule.centre == "share" else noise, label))
            numbers[name] = pl.concat(parts)
        found = judge(CLAIMS, numbers, runs, general=False)
        return {name for name, one in found.items() if one.verdict == SUPPORTED}

    least = least_seeds(CLAIMS)
    assert set(least.values()) == {2, 8, 16}
    for n_seeds in (2, 7, 8, 15, 16):
        assert supported(n_seeds) == {name for name in CLAIMS if least[name] <= n_seeds}, n_seeds


def test_what_is_detectable_is_found_four_times_of_five():
    rng, rule = np.random.default_rng(0), Part(centre="mean", low=0.0)
    effect = detectable(8, 1)
    found = sum(p_value(rule, rng.normal(effect, 1, 8).tolist()) < 0.05 for _ in range(2000))
    assert found / 2000 == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 2000))
    assert detectable(8, 14) > effect > detectable(20, 1)


def test_sign_flips_are_exact_and_one_sided():
    assert sign_flip_p([1.0] * 8) == 2**-8
    assert sign_flip_p([-1.0] * 8) == 1.0
    assert sign_flip_p([3.0, -1.0]) == 0.5  # 4, 2, -2, -4: two of four are at least 2
    assert sign_flip_p([1.0] * 30) == pytest.approx(1 / 4001)
    assert sign_flip_p([0.1, 0.2, -0.3]) == pytest.approx(5 / 8)  # sums that are equal but rounded


def test_holm_is_holms():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_p_of_a_region_with_two_bounds_is_the_larger_of_both():
    low, high = (ttest_1samp(NUMBERS, bound, alternative=side).pvalue
                 for bound, side in ((-0.1, "greater"), (0.1, "less")))  # fmt: skip
    assert p_value(WITHIN, NUMBERS) == pytest.approx(max(low, high))
    assert low != high
    assert p_value(replace(WITHIN, centre="median"), [0.0] * 8) == 2**-8
    assert p_value(WITHIN, [0.09] * 7 + [0.3]) > 0.3


def test_p_of_a_mean_is_students_and_agrees_with_its_interval():
    rule = Part(centre="mean", low=0.0)
    assert p_value(rule, NUMBERS) == pytest.approx(
        ttest_1samp(NUMBERS, 0, alternative="greater").pvalue
    )
    assert (p_value(rule, NUMBERS) < 0.025) == (mean_interval(NUMBERS).low > 0)
    assert p_value(rule, [1.0]) == 1.0
    assert p_value(rule, [1.0, 1.0]) == 0.25  # equal values do not show how they vary
    assert p_value(rule, [0.0, 0.0]) == 1.0


def test_a_part_that_does_not_decide_is_reported_and_decides_nothing():
    runs = trials(8)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    both = pl.concat([values(runs, numbers, "x"), values(runs, -numbers, "y")])
    rules = {"x": ABOVE, "y": replace(ABOVE, decides=False)}
    found = judge({"it": claim(**rules)}, {"it": both}, runs)["it"]
    assert found.parts["y"].verdict == CONTRADICTED
    alone = judge({"it": claim(x=ABOVE)}, {"it": values(runs, numbers)}, runs)["it"]
    assert (found.verdict, found.p_holm) == (SUPPORTED, alone.p_holm)


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [(1, 1, None), (1, 0, "transient"), (1, -1, "reversed"), (0, 0, None), (-1, -1, None)],
)
def test_what_was_there_and_is_gone_is_transient_or_reversed(first, last, says):
    runs, noise = trials(8), np.random.default_rng(0).normal(0, 0.1, 8)
    numbers = pl.concat([values(runs, first + noise, "at 1"), values(runs, last + noise, "last")])
    rule = Part(centre="median", low=0.0)
    found = judge({"it": replace(claim(**{"*": rule}), course=True)}, {"it": numbers}, runs)
    assert found["it"].course == says
