"""How often are verdicts false, how often are effects found, and do intervals cover the truth?

    python benchmarks/error_rates.py [--sweeps 1000] [errors] [power] [interim] [coverage]

Simulates the numbers of runs, without any training. The studies are:

- errors: every claim is at its bound, with several kinds of noise;
- power: the effects have several sizes;
- interim: sweeps with --until-decided;
- coverage: the variance lies between schemes, between seeds, or both.

All studies with 1,000 sweeps take some hours. Lines are printed in the order of the tables.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

if __name__ == "__main__":
    # Import from the root of the checkout, also where a package of that name is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import CONTRADICTED, SUPPORTED
from analysis.depth_gradient import gradient_tau
from analysis.interim import plan_interim
from analysis.part_verdicts import judge_part
from analysis.stats import Estimate
from analysis.verdicts import judge

SEEDS = (4, 8, 12, 20, 40)
Numbers = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Numbers]


def lognormal(sd: float, sign: int) -> Draw:
    """Return a function that draws lognormal numbers with mean 0, skewed to the side of `sign`."""
    return lambda rng, n: sign * (np.exp(sd * rng.standard_normal(n)) - np.exp(sd**2 / 2))


def taus(rng: np.random.Generator, n: int) -> Numbers:
    """Draw taus of models with six layers that grow in random order."""
    layers = pl.DataFrame({"run": np.repeat(np.arange(n), 6), "layer": np.tile(np.arange(6), n)})
    growth = layers.with_columns(growth=pl.Series(rng.random(6 * n)))
    return gradient_tau(growth, ["run"])["tau"].to_numpy()


NOISE: dict[str, Draw] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "t2": lambda rng, n: rng.standard_t(2, n),
    "t3": lambda rng, n: rng.standard_t(3, n),
    "lognormal .5": lognormal(0.5, 1),
    "-lognormal .5": lognormal(0.5, -1),
    "lognormal 1": lognormal(1.0, 1),
    "-lognormal 1": lognormal(1.0, -1),
    "taus": taus,
}
MEDIANS = {
    f"{sign}lognormal {name}": (1 if not sign else -1) * (1 - np.exp(sd**2 / 2))
    for sign in ("", "-")
    for name, sd in ((".5", 0.5), ("1", 1.0))
}
"""The medians of the kinds of noise with a median other than 0."""


def bound_of(part: Part, at: str) -> float:
    """Return the bound of a rule, or its bound against the claim."""
    if at == "against" and part.against is not None:
        return part.against
    bound = part.high if part.low is None else part.low
    assert bound is not None, "every rule has a bound"
    return bound


def null_sweep(
    noise: str, n: int, rng: np.random.Generator, share: float = 0.0, at: str = "bound"
) -> tuple[dict[str, pl.DataFrame], Numbers]:
    """Draw the numbers of every claim at its bound.

    Args:
        noise: a key of NOISE.
        n: the number of seeds.
        rng: the source of random numbers.
        share: the correlation between claims.
        at: `bound`, or `against` for the bound against the claim.

    Returns:
        The numbers of the measure of each claim, by claim. The noise that all claims share, one
        number for each seed.
    """
    shared = NOISE[noise](rng, n)
    values: dict[str, pl.DataFrame] = {}
    for name, claim in CLAIMS.items():
        own = np.sqrt(share) * shared + np.sqrt(1 - share) * NOISE[noise](rng, n)
        frames = []
        for label, part in deciding(claim).items():
            bound = bound_of(part, at)
            if part.centre == "share":
                numbers = (rng.random(n) < bound).astype(float)
            else:
                centre = MEDIANS.get(noise, 0.0) if part.centre == "median" else 0.0
                numbers = bound + 0.3 * (own - centre)
            frames.append(numbers_of(label, numbers))
        values[name] = pl.concat(frames)
    return values, shared


def deciding(claim: Claim) -> dict[str, Part]:
    """Return the parts that decide a claim."""
    return {label: part for label, part in claim.parts.items() if part.decides}


def numbers_of(part: str, numbers: Numbers) -> pl.DataFrame:
    """Return the numbers of a part in the form of a measure."""
    keys = [str(seed) for seed in range(len(numbers))]
    return pl.DataFrame({"trial_key": keys, "part": part, "value": numbers})


def trials_of(status: Sequence[str]) -> pl.DataFrame:
    """Return the trials of one configuration, with these statuses."""
    seeds = list(range(len(status)))
    return pl.DataFrame(
        {"trial_key": list(map(str, seeds)), "status": status, "config": "only", "seed": seeds}
    )


def false_verdicts(
    noise: str,
    n: int,
    sweeps: int,
    share: float = 0.0,
    at: str = "bound",
    missing: float = 0.0,
    diverging: float = 0.0,
) -> float:
    """Return the share of sweeps with any false verdict, if all claims are at a bound.

    Args:
        noise, n, share, at: as for null_sweep.
        sweeps: the number of sweeps.
        missing: the share of runs that failed, at random.
        diverging: the share of runs that diverged: the runs with the lowest numbers.
    """
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(sweeps):
        values, shared = null_sweep(noise, n, rng, share, at)
        status = np.where(rng.random(n) < missing, "failed", "finished")
        status[np.argsort(shared)[: int(np.ceil(diverging * n))]] = "diverged"
        trials = trials_of(status.tolist())
        seen = trials.filter(status="finished").select("trial_key")
        kept = {name: one.join(seen, on="trial_key", how="semi") for name, one in values.items()}
        found = judge(CLAIMS, kept, trials, general=False)
        wrong += any(one.verdict in (SUPPORTED, CONTRADICTED) for one in found.values())
    return wrong / sweeps


CASES: dict[str, Mapping[str, float | str]] = {
    "at the bounds": {},
    "at the bounds against": {"at": "against"},
    "correlation 0.5": {"share": 0.5},
    "correlation 0.95": {"share": 0.95},
    "10% of runs missing": {"missing": 0.1},
    "the worst 10% diverge, all claims alike": {"diverging": 0.1, "share": 0.95},
}


Line = Callable[[], str]
"""A function that computes a line of a table. It can be sent to another process."""


def errors(sweeps: int) -> Iterator[Line]:
    """Yield the lines of the error rates, in percent."""
    yield functools.partial(str, f"any false verdict, % of sweeps, by number of seeds {SEEDS}")
    for case in CASES:
        for noise in NOISE if case.startswith("at") else ("normal", "lognormal .5", "taus"):
            yield functools.partial(errors_of, case, noise, sweeps)


def errors_of(case: str, noise: str, sweeps: int) -> str:
    """Return the line of one case and noise."""
    rates = [100 * false_verdicts(noise, n, sweeps, **CASES[case]) for n in SEEDS]  # type: ignore[arg-type]
    return f"| {case} | {noise} | " + " | ".join(f"{one:.1f}" for one in rates)


def power(sweeps: int) -> Iterator[Line]:
    """Yield the lines of the power: how often true claims are supported."""
    yield functools.partial(
        str, "supported, %: depth_gradient / never_suppressed / mean of all others, 4 to 20 seeds"
    )
    for effect in (0.5, 1.0, 2.0, 4.0, 8.0):
        yield functools.partial(power_of, effect, sweeps)


def power_of(effect: float, sweeps: int) -> str:
    """Return the line of one effect, in standard deviations."""
    cells = []
    for n in (4, 6, 8, 12, 20):
        rng, counts = np.random.default_rng(0), np.zeros(3)
        for _ in range(sweeps):
            values = planted(effect, n, rng)
            found = judge(CLAIMS, values, trials_of(["finished"] * n), general=False)
            held = {name: one.verdict == SUPPORTED for name, one in found.items()}
            headline = held.pop("depth_gradient"), held.pop("never_suppressed")
            counts += [*headline, np.mean(list(held.values()))]
        cells.append(" / ".join(f"{100 * one / sweeps:.0f}" for one in counts))
    return f"| {effect} sd | " + " | ".join(cells)


def planted(effect: float, n: int, rng: np.random.Generator) -> dict[str, pl.DataFrame]:
    """Draw the numbers of n seeds for all claims, `effect` standard deviations beyond a bound."""
    return {
        name: pl.concat(
            [
                numbers_of(label, beyond(part, effect, rng, n))
                for label, part in deciding(claim).items()
            ]
        )
        for name, claim in CLAIMS.items()
    }


def beyond(part: Part, effect: float, rng: np.random.Generator, n: int) -> Numbers:
    """Draw numbers with a centre that is `effect` standard deviations beyond the bound."""
    noise = rng.standard_normal(n)
    if part.centre == "share":
        return np.ones(n)
    if part.low is not None and part.high is not None:
        return (part.low + part.high) / 2 + (part.high - part.low) / 2 / effect * noise
    if part.low is not None:
        return part.low + 0.1 * (effect + noise)
    assert part.high is not None
    return part.high - 0.1 * (effect + noise)


MOST = (20, 60)
"""The largest numbers of seeds that --until-decided may use."""


def interim(sweeps: int) -> Iterator[Line]:
    """Yield the lines of --until-decided: errors, power and numbers of seeds."""
    yield functools.partial(
        str, f"--until-decided: any claim decided, % of sweeps / claims supported, % / mean seeds, "
             f"for at most {MOST} seeds",
    )  # fmt: skip
    for noise in ("normal", "t2", "lognormal .5", "-lognormal .5", "taus"):
        yield functools.partial(interim_of, noise, 0.0, sweeps)
    for effect in (0.5, 1.0, 2.0, 4.0, 8.0):
        yield functools.partial(interim_of, "normal", effect, sweeps)


def interim_of(noise: str, effect: float, sweeps: int) -> str:
    """Return the line of one kind of noise without an effect, or of one effect."""
    cells = []
    for most in MOST:
        rng, decided, supported, seeds = np.random.default_rng(0), 0, 0.0, 0
        runs = trials_of(["finished"] * most)
        for _ in range(sweeps):
            values = planted(effect, most, rng) if effect else null_sweep(noise, most, rng)[0]
            plan = plan_interim(range(most), 2, [])
            while not plan.is_over:
                one = plan.schedule[len(plan.made)]
                seen = runs.head(one.seeds)
                plan = plan.with_findings(
                    judge(CLAIMS, values, seen, general=False, alpha=one.alpha)
                )
            verdicts = [found.verdict for found in plan.current_findings().values()]
            decided += SUPPORTED in verdicts or CONTRADICTED in verdicts
            supported += verdicts.count(SUPPORTED) / len(verdicts)
            seeds += plan.made[-1].seeds
        cells.append(
            f"{100 * decided / sweeps:.1f} / {100 * supported / sweeps:.0f} / {seeds / sweeps:.1f}"
        )
    return f"| {f'{effect} sd' if effect else noise} | " + " | ".join(cells)


SPLITS = {
    "schemes": (1.0, 0.1, 0.05, 0.15),
    "seeds": (0.05, 0.05, 1.0, 0.3),
    "even": (0.2, 0.2, 0.2, 0.4),
}
"""The variances of schemes, of configurations in a scheme, of seeds and of runs."""


def coverage(sweeps: int) -> Iterator[Line]:
    """Yield the lines of the coverage: how often 95% intervals contain the true mean."""
    yield functools.partial(
        str, "covered, %: here / one scheme / in general / another scheme, for 2, 4, 8, 16 seeds"
    )
    for name, n_schemes, n_configs in itertools.product(SPLITS, (2, 6, 12, 22), (1, 3, 9)):
        yield functools.partial(coverage_of, name, n_schemes, n_configs, sweeps)


def coverage_of(name: str, n_schemes: int, n_configs: int, sweeps: int) -> str:
    """Return the line of one split of the variance and one number of configurations."""
    sds = np.sqrt(SPLITS[name])
    cells = [covered((n_schemes, n_configs, n), sds, sweeps) for n in (2, 4, 8, 16)]
    return f"| {name} | {n_schemes} x {n_configs} | " + " | ".join(cells)


def covered(shape: tuple[int, int, int], sds: Numbers, sweeps: int) -> str:
    """Return the coverage of the four intervals for sweeps of one shape."""
    rng, rule, hits, few = np.random.default_rng(0), Part(centre="mean", low=0.0), *np.zeros((2, 4))
    n_schemes, n_configs, n_seeds = shape
    scheme, config, seed = (one.ravel() for one in np.indices(shape))
    for _ in range(sweeps):
        base = rng.normal(0, sds[0], (n_schemes, 1)) + rng.normal(0, sds[1], shape[:2])
        runs = base[:, :, None] + rng.normal(0, sds[2], n_seeds) + rng.normal(0, sds[3], shape)
        another = rng.normal(0, sds[0]) + rng.normal(0, sds[1], n_configs).mean()
        frame = pl.DataFrame(
            {"scheme": scheme, "config": scheme * n_configs + config, "seed": seed,
             "data_seed": seed, "value": runs.ravel()}
        )  # fmt: skip
        general = judge_part(rule, frame, general=True)
        assert general.prediction is not None
        about: list[tuple[Estimate, float]] = [
            (judge_part(rule, frame, general=False).estimate, base.mean()),
            (judge_part(rule, frame.filter(scheme=0), general=False).estimate, base[0].mean()),
            (general.estimate, 0.0),
            (general.prediction, another),
        ]
        for i, (estimate, truth) in enumerate(about):
            if estimate.low is None or estimate.high is None:
                few[i] += 1
            else:
                hits[i] += estimate.low <= truth <= estimate.high
    known = np.maximum(1, sweeps - few)
    return " / ".join(
        "too few" if missing == sweeps else f"{100 * hit / of:.1f}"
        for hit, of, missing in zip(hits, known, few, strict=True)
    )


STUDIES = {"errors": errors, "power": power, "interim": interim, "coverage": coverage}


def computed(line: Line) -> str:
    """Return a line, in the process that computes it."""
    return line()


def main() -> int:
    """Run the command. Return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="[all]")
    parser.add_argument(
        "--sweeps", type=int, default=1000, help="simulated sweeps of each kind [1000]"
    )
    parser.add_argument("--cores", type=int, default=2, help="number of processes [2]")
    args = parser.parse_args()
    lines = itertools.chain(*(STUDIES[name](args.sweeps) for name in args.studies or STUDIES))
    # Not fork: Polars has threads, which a forked process would lack.
    with multiprocessing.get_context("spawn").Pool(args.cores) as pool:
        for line in pool.imap(computed, lines):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
