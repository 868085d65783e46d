"""From a sweep's finished runs to a report that people read.

    python analysis/report.py                       # the newest sweep of ./runs
    python analysis/report.py --name quick --out somewhere
    python analysis/report.py --where "init.scheme = 'gpt2' AND init.seed < 4"

Writes report.html (opens without a network), findings.json, summary.md and the tables as Parquet.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    # The checkout's root, not its analysis/, is where imports start.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jinja2
import polars as pl
import vl_convert

from analysis import figures
from analysis.claims import CLAIMS, digest, rare_by_size
from analysis.depth_gradient import depth_gradient, last_steps, layer_growth
from analysis.rare_tokens import ORDERS, group_changes, orders_hold, primary
from analysis.runs import RunTables, read_sweep, tracking_uri
from analysis.stats import mean_interval, median_interval, share_interval
from analysis.verdicts import UNTESTED, judge
from gptcore.config import KNOBS, InputError, spelling
from gptcore.records import PRIMARY


def build_report(
    uri: str, name: str | None, out: Path | None, runs_dir: Path, where: str | None = None
) -> Path:
    """Write the report of a sweep (the newest where `name` is None); -> its folder.

    `where` narrows it to some trials, as read_sweep says.

    `out` is by default RUNS_DIR/reports/NAME. Raises InputError where there is nothing to report
    or the folder cannot be written; what was there before is then left as it was.
    """
    sweep = read_sweep(uri, name, where)
    sweep = replace(sweep, trials=with_scheme(sweep.trials))
    if where:
        notes = [*sweep.plan["notes"], f"Only the trials for which {where}."]
        sweep = replace(sweep, plan={**sweep.plan, "notes": notes})
    folder = out or runs_dir / "reports" / sweep.sweep
    by_run = statistics_of_runs(sweep)
    findings = {**find(sweep, by_run), "claims": claim_findings(sweep)}
    page = render(sweep, by_run, findings)
    frames = {**sweep.tables, **by_run, "trials": sweep.trials}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch)
            (new / "report.html").write_text(page, encoding="utf-8")
            (new / "findings.json").write_text(json.dumps(findings, indent=2, allow_nan=False))
            (new / "summary.md").write_text(summary(sweep, findings), encoding="utf-8")
            for table, frame in frames.items():
                frame.write_parquet(new / f"{table}.parquet")
            for file in list(new.iterdir()):
                file.replace(folder / file.name)
    except OSError as error:
        raise InputError(
            f"the report folder {folder} cannot be written: {error.strerror}"
        ) from error
    return folder


def statistics_of_runs(sweep: RunTables) -> dict[str, pl.DataFrame]:
    """The per-run statistics of both findings, one frame a statistic, as with_trial."""
    weights, token_groups = sweep.tables["weights"].lazy(), sweep.tables["token_groups"].lazy()
    growth, changes = layer_growth(weights), group_changes(token_groups)
    frames = {
        "layer_growth": growth,
        "depth_gradient": depth_gradient(growth),
        "group_changes": changes,
        "group_orders": orders_hold(changes),
    }
    return {name: with_trial(frame, sweep) for name, frame in frames.items()}


def with_scheme(trials: pl.DataFrame) -> pl.DataFrame:
    """The trials with a column `scheme`: what intervals and lines are over the seeds of.

    It is init.scheme, and every other knob that the sweep varies beside seeds and subsets, so that
    no two optimisers, say, are ever averaged: `model5, optim.name sgd`.
    """
    apart = ("init.scheme", "init.seed", "corpus.data_seed", "corpus.subset")
    varied = [
        f"{knob} " + pl.col(knob).map_elements(spelling, pl.String)
        for knob in KNOBS
        if knob in trials.columns and knob not in apart and trials[knob].n_unique() > 1
    ]
    return trials.with_columns(
        scheme=pl.concat_str("init.scheme", *varied, separator=", ", ignore_nulls=True)
    )


def with_trial(frame: pl.DataFrame, sweep: RunTables) -> pl.DataFrame:
    """The frame, in its order, with columns scheme, subset and seed of each row's trial."""
    trials = sweep.trials.select("trial_key", "scheme", subset="corpus.subset", seed="init.seed")
    return frame.join(trials, on="trial_key", maintain_order="left")


def find(sweep: RunTables, by_run: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """What the runs say, by scheme, as findings.json holds it."""
    counts = Counter(sweep.trials["status"])
    ended = {status: counts[status] for status in ("finished", "diverged", "failed", "unreadable")}
    schemes = sweep.trials["scheme"].unique(maintain_order=True)
    unreadable = sweep.trials.filter(status="unreadable").select("trial_key", "reason")
    return {
        "sweep": sweep.sweep,
        "notes": [
            *sweep.plan["notes"],
            *(f"Trial {key} is left out: {why}." for key, why in unreadable.rows()),
        ],
        "trials": {**ended, "unfinished": len(sweep.trials) - sum(ended.values())},
        "depth_gradient": {scheme: _depth_findings(by_run, scheme) for scheme in schemes},
        "rare_tokens": {scheme: _token_findings(by_run, scheme) for scheme in schemes},
    }


def claim_findings(sweep: RunTables) -> dict[str, Any]:
    """Every claim's verdict for the configurations of this sweep, in general, and in parts of it.

    `here` and `by` (scheme, subset, optimiser, where they vary) take seeds as units; `in_general`
    takes configurations as well. In a part of the sweep a claim is tested only if it has all the
    numbers that it has in the whole.
    """
    values = {name: claim.measure(sweep) for name, claim in CLAIMS.items()}
    trials = sweep.trials.select(
        "trial_key", "status", "scheme", "corpus.subset", "optim.name",
        config=pl.concat_str("scheme", "corpus.subset", separator=", "),
        seed="init.seed",
    )  # fmt: skip

    def as_one(some: pl.DataFrame) -> pl.DataFrame:
        return some.with_columns(config=pl.lit("these"))

    by: dict[str, dict[str, Any]] = {}
    for knob in ("scheme", "corpus.subset", "optim.name"):
        labels = trials[knob].unique(maintain_order=True).to_list()
        for label in labels if len(labels) > 1 else ():
            some = trials.filter(pl.col(knob) == label)
            whole = {
                name: numbers
                if _parts_of(numbers.join(some, on="trial_key")) == _parts_of(numbers)
                else numbers.head(0)
                for name, numbers in values.items()
            }
            by.setdefault(knob, {})[label] = judge(CLAIMS, whole, as_one(some))
    return {
        "digest": digest(),
        "standing": "confirmatory" if sweep.claims_digest == digest() else "exploratory",
        "here": judge(CLAIMS, values, as_one(trials)),
        "in_general": judge(CLAIMS, values, trials) if trials["config"].n_unique() > 1 else None,
        "by": by,
    }


def _parts_of(values: pl.DataFrame) -> set[str]:
    return set(values["part"])


def sentence(name: str, claims: Mapping[str, Any]) -> str:
    """What a paper would print of a claim: its verdict here, with the numbers, and in general."""
    claim, finding = CLAIMS[name], claims["here"][name]
    if finding["verdict"] == UNTESTED:
        return f"{claim.says} Not tested: no run of this sweep has the numbers for it."
    numbers = "; ".join(
        f"{part} {format_estimate(found['estimate'])}" for part, found in finding["parts"].items()
    )
    text = f"{claim.says} {finding['verdict'].capitalize()}: {numbers} ({claim.unit}; "
    text += f"{finding['seeds']} seeds, Holm-adjusted p = {finding['p_holm']:.2g})."
    if finding["seeds_needed"]:
        text += f" By these numbers {finding['seeds_needed']} seeds would decide it."
    if finding["verdict_with_diverged"] != finding["verdict"]:
        text += f" With {finding['diverged']} diverged runs counted against it: "
        text += f"{finding['verdict_with_diverged']}."
    if claims["in_general"]:
        general = claims["in_general"][name]
        text += f" In general, from {general['configurations']} configurations: "
        text += f"{general['verdict']}."
    return text


def summary(sweep: RunTables, findings: Mapping[str, Any]) -> str:
    """The page to paste, in Markdown."""
    claims = findings["claims"]
    lines = [
        f"# Sweep {sweep.sweep}",
        "",
        ", ".join(f"{count} {status}" for status, count in findings["trials"].items() if count)
        + f" trials; {claims['standing']} (claims {claims['digest']}).",
        *(f"\nNote: {note}" for note in findings["notes"]),
        "",
        "| claim | verdict | in general |",
        "|---|---|---|",
        *(
            f"| {claim.says} | {claims['here'][name]['verdict']} "
            f"| {claims['in_general'][name]['verdict'] if claims['in_general'] else '–'} |"
            for name, claim in CLAIMS.items()
        ),
        "",
        *(f"- {sentence(name, claims)}" for name in CLAIMS),
    ]
    return "\n".join(lines) + "\n"


def _depth_findings(by_run: dict[str, pl.DataFrame], scheme: str) -> dict[str, Any]:
    runs = by_run["depth_gradient"].filter(pl.col("scheme") == scheme)
    growth = last_steps(by_run["layer_growth"].filter(pl.col("scheme") == scheme))
    by_layer = growth.group_by("layer").agg(pl.col("growth").median()).sort("layer")
    widest = Counter(runs["widest_layer"])
    return {
        "runs": runs.height,
        "tau": median_interval(of_seeds(runs, "tau")),
        "tau_of_runs": dict(zip(runs["trial_key"], runs["tau"], strict=True)),
        "first_layer_widest": share_interval(
            of_seeds(runs.with_columns(first=pl.col("widest_layer") == 0), "first")
        ),
        "widest_layer_of_runs": {str(layer): widest[layer] for layer in sorted(widest)},
        "median_growth_by_layer": by_layer["growth"].to_list(),
        "median_growth": median_interval(of_seeds(runs, "median_growth")),
    }


def _token_findings(by_run: dict[str, pl.DataFrame], scheme: str) -> dict[str, Any]:
    changes = by_run["group_changes"].filter(pl.col("scheme") == scheme)
    orders = by_run["group_orders"].filter(pl.col("scheme") == scheme)
    groups = by_run["group_changes"]["group"].unique(maintain_order=True)
    return {
        "runs": orders.height,
        "measured_on": PRIMARY,
        "groups": {
            group: {
                column: mean_interval(of_seeds(changes.filter(pl.col("group") == group), column))
                for column in ("start", "end", "change", "logit_change", "log_z_change", "excess")
            }
            for group in groups
        },
        "change_by_subset": {
            subset: {
                group: mean_interval(of_seeds(runs.filter(pl.col("group") == group), "change"))
                for group in groups
            }
            for (subset,), runs in changes.group_by("subset", maintain_order=True)
        },
        **{name: share_interval(of_seeds(orders, name)) for name in ORDERS},
    }


def of_seeds(runs: pl.DataFrame, column: str) -> list[float]:
    """Per init.seed the mean of a column over its runs: runs of one seed are not independent."""
    known = runs.drop_nulls(column).sort("seed")
    means = known.group_by("seed", maintain_order=True).agg(pl.col(column).cast(float).mean())
    return means[column].to_list()


def render(sweep: RunTables, by_run: dict[str, pl.DataFrame], findings: dict[str, Any]) -> str:
    """The page: one HTML file with everything in it."""
    charts: dict[str, Any] = {
        "qkv_std": figures.fig_qkv_std(by_run["layer_growth"]),
        "growth_by_layer": figures.fig_growth_by_layer(by_run["layer_growth"]),
        "group_log_prob": figures.fig_group_log_prob(
            with_trial(primary(sweep.tables["token_groups"].lazy()).collect(), sweep)
        ),
    }
    rare = with_trial(rare_by_size(sweep), sweep)
    if rare["n_tokens"].n_unique() > 1:
        charts["rare_by_size"] = figures.fig_rare_by_size(rare)
    # A plan made before a knob was added does not have it.
    knobs = [knob for knob in KNOBS if knob in sweep.trials.columns]
    varied = [knob for knob in knobs if sweep.trials[knob].n_unique() > 1]
    losses = (
        sweep.tables["training"].group_by("trial_key").agg(pl.col("loss").sort_by("step").last())
    )
    trials = sweep.trials.join(losses, on="trial_key", how="left").join(
        by_run["depth_gradient"].select("trial_key", "tau", "widest_layer"),
        on="trial_key",
        how="left",
    )
    fixed = {knob: sweep.trials[knob][0] for knob in knobs if knob not in varied}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["spelled"] = spelling
    environment.filters["estimate"] = format_estimate
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    return environment.get_template("report.html.jinja").render(
        sweep=sweep,
        findings=findings,
        charts={name: chart.to_dict() for name, chart in charts.items()},
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        varied=varied,
        fixed=fixed,
        trials=trials.to_dicts(),
        groups=by_run["group_changes"]["group"].unique(maintain_order=True).to_list(),
        orders=ORDERS,
        claims=CLAIMS,
        sentence=sentence,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def format_estimate(estimate: dict[str, Any]) -> str:
    """`-3.12 [-3.40, -2.84]`, or the value alone where the seeds are too few for an interval."""
    if estimate["value"] is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g} [too few seeds]"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; -> its exit code: 0, or 2 for bad input."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(message)

    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", help="of the sweep; by default the one launched last")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where runs are (./runs)"
    )
    parser.add_argument(
        "--where", help="only these trials: a condition such as \"init.scheme = 'gpt2'\""
    )
    parser.add_argument("--out", type=Path, help="folder for the report (RUNS_DIR/reports/NAME)")
    try:
        args = parser.parse_args(argv)
        uri = tracking_uri(args.runs_dir)
        folder = build_report(uri, args.name, args.out, args.runs_dir, args.where)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
