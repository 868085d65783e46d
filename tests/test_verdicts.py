"""Verdicts on planted numbers: a planted effect is found, and nothing is found without an effect.

This is one file because all of these tests plant numbers with the same helpers.
"""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest, ttest_1samp

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import (
    CONTRADICTED,
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDERPOWERED,
    p_values,
)
from analysis.differences import compare
from analysis.part_verdicts import judge_part
from analysis.power import MAX_SEEDS, detectable, forecast, least_seeds
from analysis.stats import holm, sign_p
from analysis.variance import SKEW, TIES, over_units
from analysis.verdicts import judge

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


def rows(numbers, config="only"):
    """Make runs of one configuration, for judge_part."""
    return pl.DataFrame(
        {"scheme": config, "config": config, "seed": range(len(numbers)), "data_seed": 0,
         "value": [float(number) for number in numbers]}
    )  # fmt: skip


def spread(numbers):
    return over_units(rows(numbers))


def verdict_of(rule, numbers):
    runs = trials(len(numbers))
    given = {"it": claim(x=rule)}, {"it": values(runs, numbers)}, runs
    return judge(*given, general=False, forecasts=True)["it"]


@pytest.mark.parametrize(
    ("rule", "mean", "verdict"),
    [
        (ABOVE, 2.0, SUPPORTED),
        (ABOVE, 1.1, UNDERPOWERED),
        (ABOVE, 0.5, NOT_SUPPORTED),
        (ABOVE, 0.1, NOT_SUPPORTED),
        (ABOVE, -1.0, CONTRADICTED),
        (BELOW, -2.0, SUPPORTED),
        (BELOW, -0.5, NOT_SUPPORTED),
        (BELOW, 1.0, CONTRADICTED),
        (WITHIN, 0.0, UNDERPOWERED),
        (replace(WITHIN, low=-1.0, high=1.0), 0.0, SUPPORTED),
        (WITHIN, 2.0, CONTRADICTED),
        (Part(centre="mean", low=0.0), -1.0, CONTRADICTED),
        (Part(centre="mean", low=0.0), -0.05, UNDERPOWERED),
    ],
)
def test_a_verdict_says_where_the_centre_is_shown_to_lie(rule, mean, verdict):
    noise = np.array([-0.2, -0.1, -0.05, 0.0, 0.04, 0.09, 0.22])
    assert judge_part(rule, rows(mean + noise), general=False).verdict == verdict


def test_a_planted_effect_is_supported_or_contradicted_by_its_sign():
    noise = np.random.default_rng(0).normal(0, 0.1, 8)
    assert verdict_of(ABOVE, 2 + noise).verdict == SUPPORTED
    assert verdict_of(ABOVE, 0.5 + noise).verdict == NOT_SUPPORTED
    assert verdict_of(ABOVE, -2 + noise).verdict == CONTRADICTED
    assert verdict_of(WITHIN, 0.1 * noise).verdict == SUPPORTED
    assert verdict_of(Part(centre="share", low=0.8), np.ones(30)).verdict == SUPPORTED


def test_too_few_seeds_are_underpowered_with_a_forecast():
    found = verdict_of(replace(ABOVE, centre="median"), [2.0, 2.1, 1.9])
    assert found.verdict == UNDERPOWERED  # three seeds that agree have p = 1 / 8
    assert found.p == 2 / 8
    assert found.forecast.half in range(6, 9)  # 2 * 2^-6 < 0.05, if all further seeds agree
    assert found.forecast.would_be == SUPPORTED
    wide = verdict_of(ABOVE, [3.0, 0.5, 1.2, 2.6, -0.4, 1.9])
    assert wide.verdict == UNDERPOWERED
    assert wide.forecast.half > 6
    assert wide.forecast.most is None or wide.forecast.half < wide.forecast.most <= MAX_SEEDS


@pytest.mark.parametrize("effect", [0.6, 1.0])
def test_a_forecast_comes_true_about_as_often_as_it_says(effect):
    """If eight seeds leave a claim undecided, the forecast number decides it in most sweeps."""
    rng, rule, came, said = np.random.default_rng(0), Part(centre="mean", low=0.0), [], 0
    for _ in range(300):
        numbers = rng.normal(effect, 1, 1200)
        first = spread(numbers[:8])
        if p_values(rule, first).verdict(1.0, 0.05) != UNDERPOWERED:
            continue
        found = forecast([(rule, first)], 0.05)
        if found is None or found.most is None:
            continue
        said += 1
        then = p_values(rule, spread(numbers[: found.most]))
        came.append(then.verdict(1.0, 0.05) != UNDERPOWERED)
    assert said > 50
    assert np.mean(came) > 0.6  # 0.8, over effects that are as likely as the sweep makes them


def test_many_claims_need_more_seeds_than_one():
    runs = trials(8)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    rule = replace(ABOVE, centre="median")
    alone = judge({"it": claim(x=rule)}, {"it": values(runs, numbers)}, runs, general=False)
    names = [f"claim {i}" for i in range(10)]
    among = judge(
        dict.fromkeys(names, claim(x=rule)),
        {name: values(runs, numbers) for name in names},
        runs,
        general=False,
    )
    assert alone["it"].verdict == SUPPORTED
    assert {found.verdict for found in among.values()} == {UNDERPOWERED}  # 20 * 2^-8 > 0.05


def test_headline_claims_are_asked_first():
    """Six seeds that agree decide the first headline claim, but not the other claims."""
    runs = trials(6)
    numbers = values(runs, 2 + np.random.default_rng(0).normal(0, 0.1, 6))
    names = ["depth_gradient", *(f"claim {i}" for i in range(12))]
    rule = claim(x=replace(ABOVE, centre="median"))
    found = judge(dict.fromkeys(names, rule), dict.fromkeys(names, numbers), runs, general=False)
    assert {name for name, one in found.items() if one.verdict == SUPPORTED} == {names[0]}


def test_what_holds_for_one_configuration_of_three_does_not_hold_in_general():
    runs = trials(10, configs=("a", "b", "c"))
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(centre, 0.1, 10) for centre in (9, 0, 0)])
    given = {"it": claim(x=ABOVE)}, {"it": values(runs, numbers)}, runs
    assert judge(*given, general=False)["it"].verdict == SUPPORTED  # on average over these three
    found = judge(*given)["it"]
    assert found.verdict == UNDERPOWERED
    assert (found.schemes, found.configurations) == (3, 3)
    prediction = found.parts["x"].prediction
    assert prediction.low < 0 < 9 < prediction.high


def test_every_part_of_a_claim_has_to_hold():
    runs = trials(8)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    both = pl.concat([values(runs, numbers, "x"), values(runs, -numbers, "y")])
    found = judge({"it": claim(x=ABOVE, y=ABOVE)}, {"it": both}, runs, general=False)["it"]
    assert [found.parts[part].verdict for part in "xy"] == [SUPPORTED, CONTRADICTED]
    assert found.verdict == CONTRADICTED


def test_a_diverged_run_counts_against_any_verdict():
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 9)
    assert verdict_of(ABOVE, numbers[:8]).verdict == SUPPORTED
    runs = trials(11, diverged=[("only", seed) for seed in (3, 8, 10)])
    given = {"it": claim(x=ABOVE)}, {"it": values(runs, numbers[:8])}, runs
    found = judge(*given, general=False)["it"]
    assert (found.verdict, found.verdict_of_finished) == (UNDERPOWERED, SUPPORTED)
    assert found.counted_against == 3
    assert found.parts["x"].estimate.value == pytest.approx(numbers[:8].mean())
    down = {"it": claim(x=ABOVE)}, {"it": values(runs, numbers[:8] - 4)}, runs
    found = judge(*down, general=False)["it"]
    assert (found.verdict, found.verdict_of_finished) == (UNDERPOWERED, CONTRADICTED)


def test_a_failed_run_does_not_count_against_a_verdict():
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    runs = trials(9, configs=("a", "b")).with_columns(
        status=pl.when(pl.col("seed") == 4).then(pl.lit("failed")).otherwise("status")
    )
    found = judge(
        {"it": claim(x=ABOVE)}, {"it": values(runs, [*numbers, *numbers])}, runs, general=False
    )["it"]
    assert (found.verdict, found.counted_against) == (SUPPORTED, 0)


def test_a_scheme_without_a_finished_run_counts_against_the_verdict():
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    runs = trials(8, configs=("a", "b")).with_columns(
        status=pl.when(pl.col("config") == "b").then(pl.lit("failed")).otherwise("status")
    )
    given = {"it": claim(x=ABOVE)}, {"it": values(runs, numbers)}, runs
    found = judge(*given, general=False)["it"]
    assert (found.verdict, found.verdict_of_finished) == (UNDERPOWERED, SUPPORTED)
    assert found.counted_against == 8


def test_a_configuration_without_the_number_is_named():
    runs = trials(6, configs=("a", "b"))
    numbers = values(runs, 2 + np.random.default_rng(0).normal(0, 0.1, 12))
    only = numbers.filter(pl.col("trial_key").str.starts_with("a"))
    found = judge({"it": claim(x=ABOVE)}, {"it": only}, runs, general=False)["it"]
    assert (found.verdict, found.undefined_in) == (SUPPORTED, ("b",))


@pytest.mark.parametrize("lacks", ["one seed in each", "half of one"])
def test_all_other_runs_are_used_if_runs_are_missing(lacks):
    rng, configs = np.random.default_rng(0), [f"config {i}" for i in range(8)]
    runs = trials(8, configs=configs)
    gone = (
        pl.col("seed") == pl.col("config").str.tail(1).cast(int)
        if lacks == "one seed in each"
        else (pl.col("config") == configs[0]) & (pl.col("seed") < 4)
    )
    shared = 0.1 * rng.normal(size=8)
    of_config = 5.0 * np.arange(8)
    numbers = runs.select(
        "trial_key",
        part=pl.lit("x"),
        value=pl.Series(np.add.outer(of_config, shared).ravel() + 0.01 * rng.normal(size=64)),
    )
    there = runs.filter(~gone)
    found = judge({"it": claim(x=ABOVE)}, {"it": numbers}, there, general=False)["it"]
    assert (found.verdict, found.seeds, found.configurations) == (SUPPORTED, 8, 8)
    # Configurations differ far more than seeds, so a mean over the wrong runs would be visible.
    assert found.parts["x"].estimate.value == pytest.approx(of_config.mean(), abs=0.2)
    assert found.parts["x"].sd < 0.5


def test_a_claim_without_numbers_is_not_measured_and_costs_the_others_nothing():
    runs = trials(6)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 6)
    found = judge(
        {"it": claim(x=ABOVE), "other": claim(x=ABOVE)},
        {"it": values(runs, numbers), "other": values(runs, numbers).head(0)},
        runs,
        general=False,
    )
    assert found["other"].verdict == NOT_MEASURED
    assert found["it"].p_holm == found["it"].p
    assert found["it"].verdict == SUPPORTED


def test_a_claim_with_a_part_that_is_not_measured_is_not_decided_by_the_others():
    """Over bytes, for example, no token is rare, so unused minus rare tokens is not known."""
    runs = trials(6)
    numbers = values(runs, 2 + np.random.default_rng(0).normal(0, 0.1, 6))
    given = {"it": numbers}, runs
    judged = judge({"it": claim(x=ABOVE, y=ABOVE)}, *given, general=False)["it"]
    assert judged.parts["x"].verdict == SUPPORTED
    assert judged.verdict == judged.verdict_of_finished == NOT_MEASURED
    assert judged.p is judged.p_holm is None  # so it costs the other claims nothing
    reported = claim(x=ABOVE, y=replace(ABOVE, decides=False))
    assert judge({"it": reported}, *given, general=False)["it"].verdict == SUPPORTED


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
    both = pl.concat([numbers, numbers.with_columns(part=pl.lit("y"), value=pl.lit(0.5))])
    judged = judge({"it": claim(x=ABOVE, y=ABOVE)}, {"it": both}, runs, general=False)["it"]
    assert judged.verdict == CONTRADICTED


def test_the_order_of_runs_does_not_matter():
    runs = trials(7, configs=("a", "b"))
    numbers = values(runs, np.random.default_rng(1).normal(1, 1, 14))
    found = judge({"it": claim(x=ABOVE)}, {"it": numbers}, runs)
    again = judge({"it": claim(x=ABOVE)}, {"it": numbers.reverse()}, runs.reverse())
    assert found == again


def null_numbers(part, rng, n_configs, n_seeds):
    """Draw numbers of runs at the bound of a part, with effects of seeds and configurations."""
    bound = part.low if part.low is not None else part.high
    if part.centre == "share":
        return (rng.random((n_configs, n_seeds)) < bound).astype(float).ravel()
    shared = rng.normal(0, 0.7, (1, n_seeds))
    if n_configs > 1:  # with one configuration, an effect that it has would not be a null
        shared = shared + rng.normal(0, 0.7, (n_configs, 1))
    return (bound + shared + rng.normal(0, 0.5, (n_configs, n_seeds))).ravel()


@pytest.mark.parametrize(
    ("n_configs", "n_seeds", "sweeps"),
    [
        (6, 12, 40),
        pytest.param(1, 12, 1000, marks=pytest.mark.full),
        pytest.param(12, 12, 100, marks=pytest.mark.full),
    ],
)
def test_sweeps_in_which_nothing_holds_seldom_decide_anything(n_configs, n_seeds, sweeps, capsys):
    """All claims are at their bounds. At most 5% of sweeps may support or contradict any claim."""
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
        found = judge(CLAIMS, numbers, runs, general=n_configs > 1)
        wrong += any(one.verdict in (SUPPORTED, CONTRADICTED) for one in found.values())
    with capsys.disabled():
        print(f"\n{n_configs} configurations x {n_seeds} seeds: {wrong} of {sweeps} null sweeps")
    assert wrong <= 0.05 * sweeps


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
    # Seeds differ by 10, schemes within a seed by little. One subset lacks the last difference.
    differences = [0.5, 1.0, 1.5, 2.0]
    means = np.mean(differences), np.mean(differences[:3])
    assert found["x"]["b"].value == pytest.approx(np.mean(means))
    assert found["x"]["b"].seeds == 4
    students = ttest_1samp(differences, 0).pvalue
    assert students < found["x"]["b"].p < 10 * students
    assert list(found["x"]) == ["b"]
    # Differences of ranks and shares have few values, so a few of them are often all equal.
    alike = numbers.with_columns(value=pl.col("trial_key").str.starts_with("b").cast(float))
    assert compare(claim(x=ABOVE), alike, trials, "a")["x"]["b"].p == 2 * 2**-4


def test_planted_effects_are_found_with_the_power_that_is_promised():
    rng, rule = np.random.default_rng(0), Part(centre="mean", low=0.0)
    for seeds in (4, 8):
        effect = detectable(seeds)
        found = sum(
            judge_part(rule, rows(rng.normal(effect, 1, seeds)), False).verdict == SUPPORTED
            for _ in range(600)
        )
        assert found / 600 == pytest.approx(0.8, abs=0.07)
    assert detectable(8, 0.001) > detectable(8) > detectable(20)
    assert detectable(2, 1e-9) > 1e6  # and it is a number


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
                noise = best + 1e-12 * rng.normal(size=n_seeds)
                share = np.ones(n_seeds)
                parts.append(values(runs, share if rule.centre == "share" else noise, label))
            numbers[name] = pl.concat(parts)
        found = judge(CLAIMS, numbers, runs, general=False)
        return {name for name, one in found.items() if one.verdict == SUPPORTED}

    least = least_seeds(CLAIMS)
    assert least["depth_gradient"] == 6
    assert set(least.values()) == {2, 6}
    for n_seeds in (2, 5, 6):
        assert supported(n_seeds) == {name for name in CLAIMS if least[name] <= n_seeds}, n_seeds


def test_the_sign_test_is_exact_and_one_sided():
    assert sign_p([1.0] * 8) == 2**-8
    assert sign_p([-1.0] * 8) == 1.0
    assert sign_p([3.0, -1.0]) == 0.75
    assert sign_p([0.0] * 8) == 1.0  # a zero is not above
    for above, n in ((3, 5), (9, 12)):
        expected = binomtest(above, n, 0.5, alternative="greater").pvalue
        assert sign_p([1.0] * above + [-1.0] * (n - above)) == pytest.approx(expected)


def test_holm_is_holms():
    assert holm([0.01, 0.04, 0.03])[0] == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9])[0] == pytest.approx([1.0, 1.0])
    assert holm([])[0] == []
    # With weights 3 and 1: 0.02 / 0.75, then 0.04 alone.
    assert holm([0.02, 0.04], [3.0, 1.0])[0] == pytest.approx([0.02 / 0.75, 0.04])


def test_p_and_interval_test_the_same_sentence():
    """For normal numbers, p is at most 0.025 only if the 95% interval lies beyond the bound."""
    rng = np.random.default_rng(0)
    for centre in ("mean", "median"):
        rule = Part(centre=centre, low=0.3, against=0.0)
        for _ in range(200):
            part = judge_part(rule, rows(rng.normal(0.2, 0.3, 9)), general=False)
            low, high = part.estimate.low, part.estimate.high
            assert part.supported_p > 0.025 or low > 0.3
            assert part.not_supported_p > 0.025 or high < 0.3
            assert part.contradicted_p > 0.025 or high < 0.0
            assert part.contradicted_p >= part.not_supported_p


def test_support_of_a_region_takes_both_of_its_bounds():
    numbers = spread(NUMBERS)
    each = [p_values(Part(centre="mean", **bound), numbers).supported
            for bound in ({"low": -0.1}, {"high": 0.1})]  # fmt: skip
    assert p_values(WITHIN, numbers).supported == max(each)
    outside = [p_values(Part(centre="mean", **bound), numbers).supported
               for bound in ({"high": -0.1}, {"low": 0.1})]  # fmt: skip
    assert p_values(WITHIN, numbers).contradicted == min(1.0, 2 * min(outside))


def test_p_of_a_mean_is_students_guarded_against_skew():
    rule = Part(centre="mean", low=0.0)
    students = ttest_1samp(NUMBERS, 0, alternative="greater").pvalue
    guarded = p_values(rule, spread(NUMBERS)).supported
    assert students < guarded < 5 * students
    assert p_values(rule, spread([1.0])).supported == 1.0


def test_with_equal_numbers_the_sign_test_has_to_agree():
    rule = Part(centre="mean", low=0.0)
    ties = judge_part(rule, rows([1.0, 1.0, 1.001, 0.999]), general=False)
    assert ties.doubts == (TIES,)
    assert ties.supported_p == 2**-4  # and not as small as the t-test's
    assert judge_part(rule, rows([1.0] * 4), general=False).supported_p == 2**-4
    skewed = judge_part(rule, rows([*np.linspace(1, 1.1, 11), 9.0]), general=False)
    assert SKEW in skewed.doubts


def test_a_part_that_does_not_decide_is_reported_and_decides_nothing():
    runs = trials(8)
    numbers = 2 + np.random.default_rng(0).normal(0, 0.1, 8)
    both = pl.concat([values(runs, numbers, "x"), values(runs, -numbers, "y")])
    rules = {"x": ABOVE, "y": replace(ABOVE, decides=False)}
    found = judge({"it": claim(**rules)}, {"it": both}, runs, general=False)["it"]
    assert found.parts["y"].verdict == CONTRADICTED
    alone = judge({"it": claim(x=ABOVE)}, {"it": values(runs, numbers)}, runs, general=False)["it"]
    assert (found.verdict, found.p_holm) == (SUPPORTED, alone.p_holm)


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [(1, 1, None), (1, 0, "transient"), (1, -1, "reversed"), (0, 0, None), (-1, -1, None)],
)
def test_what_was_there_and_is_gone_is_transient_or_reversed(first, last, says):
    runs, rng = trials(10), np.random.default_rng(0)
    steps = {"at 1": first, "at the last step": last}
    numbers = pl.concat(
        [values(runs, at + rng.normal(0, 0.1, 10), part) for part, at in steps.items()]
    )
    rule = replace(claim(**{"*": Part(centre="mean", low=0.0)}), course=True)
    assert judge({"it": rule}, {"it": numbers}, runs, general=False)["it"].course == says


def test_a_number_that_is_only_no_longer_significant_is_not_called_transient():
    """The mean is the same at every step. The noise is small at first and large at the end."""
    runs, rng, called = trials(8), np.random.default_rng(0), 0
    rule = replace(claim(**{"*": Part(centre="mean", low=0.0)}), course=True)
    for _ in range(100):
        steps = {"at 1": 0.1, "at the last step": 0.7}
        numbers = pl.concat(
            [values(runs, rng.normal(0.4, sd, 8), part) for part, sd in steps.items()]
        )
        judged = judge({"it": rule}, {"it": numbers}, runs, general=False)
        called += judged["it"].course is not None
    assert called <= 5
