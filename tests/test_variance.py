"""The model of variance: exact for complete designs, and correct with missing runs."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from analysis.claims import Part
from analysis.part_verdicts import judge_part
from analysis.skew import NOMINAL, SIZES, guarded
from analysis.variance import in_general, over_seeds, over_units, prediction, split, unit_columns

RULE = Part(centre="mean", low=0.0)


def frame(numbers, keep=None, own_seeds=False):
    """Make runs of schemes x configurations x seeds. `keep` selects runs."""
    scheme, config, seed = np.nonzero(np.ones(numbers.shape) if keep is None else keep)
    per_scheme, n_seeds = numbers.shape[1:]
    return pl.DataFrame(
        {
            "scheme": scheme,
            "config": scheme * per_scheme + config,
            "seed": scheme * n_seeds + seed if own_seeds else seed,
            "data_seed": np.zeros(len(seed), int),
            "value": numbers[scheme, config, seed],
        }
    )


def test_in_a_complete_sweep_the_interval_is_students_of_the_seed_means():
    numbers = np.random.default_rng(0).normal(size=(4, 2, 8))
    found = over_units(frame(numbers))
    means = numbers.mean((0, 1))
    assert found.units == pytest.approx(means)
    assert found.df == pytest.approx(7)
    expected = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    estimate = found.interval()
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_configurations_with_seeds_of_their_own_are_independent():
    """Two configurations then are two samples of Welch's test, with the same variance and df."""
    numbers = np.random.default_rng(0).normal(size=(2, 1, 6))
    found = over_units(frame(numbers, own_seeds=True))
    variances = numbers[:, 0].var(1, ddof=1) / 6
    assert found.error == pytest.approx(np.sqrt(variances.sum()) / 2)
    assert found.df == pytest.approx(10)  # for equal variances


def test_if_only_schemes_differ_the_interval_is_students_of_the_scheme_means():
    """If seeds do not matter, the interval in general is Student's interval of the scheme means."""
    schemes = np.random.default_rng(0).normal(size=7)
    numbers = np.broadcast_to(schemes[:, None, None], (7, 1, 4))
    found = in_general(frame(numbers), ["seed"])
    assert found.df == pytest.approx(6)
    assert found.error == pytest.approx(schemes.std(ddof=1) / np.sqrt(7))


def test_the_variance_splits_as_the_analysis_of_variance_says():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(9, 1, 12)) + 2 * rng.normal(size=(9, 1, 1)) + rng.normal(size=(1, 1, 12))
    table = y[:, 0]
    schemes, seeds = table.mean(1), table.mean(0)
    residual = table - schemes[:, None] - seeds + table.mean()
    of_run = (residual**2).sum() / (8 * 11)
    components = {
        "scheme": (12 * schemes.var(ddof=1) - of_run) / 12,
        "seed": (9 * seeds.var(ddof=1) - of_run) / 9,
        "run": of_run,
    }
    found = split(frame(y), ["seed"])
    total = sum(components.values())
    assert found == pytest.approx({name: one / total for name, one in components.items()})


def test_seeds_of_weights_and_of_data_that_vary_separately_add_up():
    both = pl.DataFrame(
        [{"config": "a", "seed": seed, "data_seed": data, "value": 1.0 * seed + 10.0 * data}
         for seed in range(4) for data in range(3)]
    )  # fmt: skip
    assert unit_columns(both) == ["seed", "data_seed"]
    variances = [np.var(range(4), ddof=1) / 4, 100 * np.var(range(3), ddof=1) / 3]
    assert over_seeds(both, ["seed", "data_seed"]).error == pytest.approx(np.sqrt(sum(variances)))
    follows = both.filter(pl.col("seed") == pl.col("data_seed"))
    assert unit_columns(follows) == ["seed"]
    assert unit_columns(both.filter(data_seed=0)) == ["seed"]
    assert unit_columns(both.filter(seed=0)) == ["data_seed"]


SHARES = {
    "schemes": (1.0, 0.1, 0.05, 0.15),
    "seeds": (0.05, 0.05, 1.0, 0.3),
    "even": (0.2, 0.2, 0.2, 0.4),
}
"""The variances of schemes, of configurations in schemes, of seeds and of runs."""


def drawn(rng, shape, variances):
    """Draw runs. Return them with the true means: here, first scheme, in general, new scheme."""
    n_schemes, n_configs, n_seeds = shape
    of_scheme, of_config, of_seed, of_run = np.sqrt(variances)
    base = rng.normal(0, of_scheme, (n_schemes, 1)) + rng.normal(0, of_config, shape[:2])
    numbers = base[:, :, None] + rng.normal(0, of_seed, n_seeds) + rng.normal(0, of_run, shape)
    new = rng.normal(0, of_scheme) + rng.normal(0, of_config, n_configs).mean()
    return numbers, (base.mean(), base[0].mean(), 0.0, new)


@pytest.mark.parametrize("variances", SHARES)
@pytest.mark.parametrize(
    ("shape", "missing", "sweeps"),
    [
        ((6, 1, 8), 0.0, 200),
        ((6, 3, 8), 0.1, 200),
        *(
            pytest.param((schemes, configs, seeds), missing, 300, marks=pytest.mark.full)
            for schemes, configs, seeds in ((6, 3, 4), (12, 9, 8), (22, 1, 4))
            for missing in (0.0, 0.1)
        ),
    ],
)
def test_intervals_cover_the_true_mean(shape, missing, sweeps, variances, capsys):
    rng, covered, known = np.random.default_rng(0), np.zeros(4), np.zeros(4)
    for _ in range(sweeps):
        numbers, truths = drawn(rng, shape, SHARES[variances])
        runs = frame(numbers, rng.random(shape) >= missing)
        general = judge_part(RULE, runs, general=True)
        estimates = (
            judge_part(RULE, runs, general=False).estimate,
            judge_part(RULE, runs.filter(scheme=0), general=False).estimate,
            general.estimate,
            general.prediction,
        )
        # A scheme of four seeds may have lost all seeds but one.
        known += [one.low is not None for one in estimates]
        covered += [one.low is not None and one.low <= truth <= one.high
                    for one, truth in zip(estimates, truths, strict=True)]  # fmt: skip
    assert known.min() > 0.95 * sweeps
    rates = covered / known
    with capsys.disabled():
        said = ", ".join(f"{rate:.1%}" for rate in rates)
        print(
            f"\n{variances}, {shape}, {missing:.0%} missing: here, one scheme, general, new: {said}"
        )
    error = 4 * np.sqrt(0.95 * 0.05 / sweeps)
    assert rates.min() > 0.95 - error - 0.01
    assert rates[:3].max() < min(1.0, 0.98 + error)


@pytest.mark.parametrize("shape", [(2, 1, 8), (6, 1, 2)])
def test_too_few_schemes_or_seeds_give_no_interval_in_general(shape):
    runs = frame(np.random.default_rng(0).normal(size=shape))
    assert in_general(runs, ["seed"]).interval().low is None
    assert prediction(runs, ["seed"]).low is None
    assert over_units(runs).interval().low is not None


def test_a_single_run_shows_no_variance():
    found = over_units(frame(np.array([[[3.0]]])))
    assert (found.mean, found.error) == (3.0, None)
    one_of_many = frame(np.array([[[3.0, 4.0, 5.0]], [[9.0, 0.0, 0.0]]]),
                        np.array([[[1, 1, 1]], [[1, 0, 0]]]))  # fmt: skip
    assert over_units(one_of_many).mean == 4.0  # the configuration with one run is left out


@pytest.mark.parametrize("sd", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("n", [4, 8, 20])
def test_a_guarded_test_keeps_its_error_rate_of_both_directions_on_skewed_numbers(n, sd):
    """The numbers are lognormal, at most as skewed as the guard assumes."""
    units = np.exp(np.random.default_rng(n).normal(0, sd, (200_000, n)))
    t, _ = stats.ttest_1samp(units, np.exp(sd**2 / 2), axis=1)
    for level in (0.04, 0.004):
        far = np.abs(t[np.abs(t) > stats.t.isf(level / 2, n - 1)])
        wrong = sum(2 * guarded(float(one), n - 1) < level for one in stats.t.sf(far, n - 1))
        assert wrong / len(units) < 1.15 * level + 4 * np.sqrt(level / len(units))
        if sd == 0.5:
            assert len(far) / len(units) > 1.4 * level, "without a guard it errs too often"


def test_the_guard_never_helps_a_claim_and_fades_with_many_seeds():
    for n in (2, 3, 7, 30, 90, 1000):
        found = [guarded(p, n - 1) for p in (0.4, *NOMINAL, 1e-9, 1e-30)]
        assert found == sorted(found, reverse=True)
        assert all(one >= p for one, p in zip(found, (0.4, *NOMINAL, 1e-9, 1e-30), strict=True))
    assert guarded(0.01, 10**6) == pytest.approx(0.01, rel=0.01)
    assert max(SIZES) >= 40
