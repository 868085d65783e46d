"""Should a small budget be spent on seeds, schemes, subsets or steps?

    python benchmarks/quick_choice.py --runs-dir runs --name large [--steps 50 100 200] [--draws 8]

Reads a large recorded sweep and judges parts of it, without any training. A part has fewer seeds,
schemes, subsets or steps. The learning rate is constant, so the first steps of a run equal a
shorter run. Prints how many claims each part decides, as a mean over draws of seeds, and how often
a part decides both headline claims.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

if __name__ == "__main__":
    # Import from the root of the checkout, also where a package of that name is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.decisions import CONTRADICTED, DEPENDS, NOT_SUPPORTED, SUPPORTED
from analysis.frames import with_scheme
from analysis.power import HEADLINES
from analysis.runs import ReadTables, RunTables, read_sweeps
from analysis.sweep_verdicts import claim_findings, measured
from tracking.address import store_address
from tracking.store import Store

DECIDED = (SUPPORTED, CONTRADICTED, DEPENDS, NOT_SUPPORTED)


def cut(sweep: RunTables, steps: int) -> RunTables:
    """Return a sweep with only its first steps."""
    tables = {
        name: table.filter(pl.col("step") <= steps) if "step" in table.columns else table
        for name, table in sweep.tables.items()
    }
    return replace(sweep, tables=ReadTables(tables))


def part(sweep: RunTables, seeds: Sequence[int], schemes: Sequence[str], subsets: Sequence[str]
         ) -> RunTables:  # fmt: skip
    """Return a sweep with only some trials."""
    trials = sweep.trials.filter(
        pl.col("init.seed").is_in(seeds), pl.col("init.scheme").is_in(schemes),
        pl.col("corpus.subset").is_in(subsets),
    )  # fmt: skip
    keys = trials.select("trial_key")
    tables = {name: table.join(keys, on="trial_key", how="semi", maintain_order="left")
              for name, table in sweep.tables.items()}  # fmt: skip
    return replace(sweep, trials=with_scheme(trials.drop("scheme")), tables=ReadTables(tables))


def main() -> int:
    """Run the command. Return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--name", required=True, help="name of the recorded sweep")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 6, 7, 8])
    parser.add_argument("--draws", type=int, default=8, help="draws of seeds for each part [8]")
    args = parser.parse_args()
    store = Store(store_address(args.runs_dir))
    sweep = read_sweeps(store, [args.name], None, args.runs_dir / "cache")
    sweep = replace(sweep, trials=with_scheme(sweep.trials))
    every = sorted(sweep.trials["init.seed"].unique())
    schemes = sweep.trials["init.scheme"].unique(maintain_order=True).to_list()
    subsets = sweep.trials["corpus.subset"].unique(maintain_order=True).to_list()
    print("steps | schemes | subsets | seeds | trials | claims decided | headlines decided | never")
    for steps, some, parts, n in itertools.product(
        args.steps,
        [list(one) for size in (2, 3) for one in itertools.combinations(schemes, size)],
        [subsets[:1], subsets],
        args.seeds,
    ):
        early = cut(sweep, steps)
        draws = list(itertools.combinations(every, n))
        chosen = random.Random(0).sample(draws, min(args.draws, len(draws)))
        counts, headlines, open_claims = [], 0, Counter[str]()
        for seeds in chosen:
            smaller = part(early, seeds, some, parts)
            found = claim_findings(smaller, measured(smaller)).here
            decided = {name for name, one in found.items() if one.verdict in DECIDED}
            counts.append(len(decided))
            headlines += set(HEADLINES) <= decided
            open_claims.update(set(found) - decided)
        left = ", ".join(f"{name} {n}" for name, n in open_claims.most_common())
        print(
            f"{steps} | {'+'.join(some)} | {len(parts)} | {n} | {n * len(some) * len(parts)} | "
            f"{sum(counts) / len(counts):.1f} | {headlines} of {len(chosen)} | {left}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
