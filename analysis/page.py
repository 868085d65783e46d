"""Render the page of a report: one HTML file that needs no other file and no network."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import jinja2
import vl_convert

from analysis.answers import SYMBOLS, answer, matrix, question, reading
from analysis.chart_parts import MOST_SCHEMES
from analysis.claims import CLAIMS
from analysis.comparing import Row, Side, say_difference, say_rows
from analysis.figures import ALL_CLAIMS, FIGURES, FIRST_SCREEN, RECORDED
from analysis.findings import Findings
from analysis.frames import RunFrames
from analysis.next_steps import next_steps
from analysis.papers import bibtex, methods, provenance
from analysis.rare_tokens import ORDERS
from analysis.replication import replication
from analysis.runs import RunTables
from analysis.sentences import (
    format_estimate,
    holds_in,
    rule_in_words,
    say_forecast,
    say_interim,
    say_outcome,
    say_whether_confirmatory,
    scope_of,
    short,
)
from gptcore.cache import cache_dir, write_to_cache
from gptcore.config import KNOBS, InputError, spelling, varying_knobs
from gptcore.files import Json, JsonObject, is_trusted
from tracking.sweep_run import SEARCH_GOALS

SECTIONS = {
    "trained": "Did it train?",
    "start": "Do weights and probabilities start as they should?",
    "widening": "Do attention weights widen, and in which block most?",
    "depth": "Is there a gradient over depth, and does it last?",
    "tails": "Do the tails of attention weights get longer?",
    "tokens": "What happens to common, rare and unused tokens?",
    "rare": "Do rare tokens fall, and is it their frequency?",
    "unused": "Are unused tokens pushed down, and by what?",
    RECORDED: "What else was recorded?",
}
"""The sections of the report after the first screen. Every claim has a section, and so has every
figure that is not on the first screen."""
MOST_TRIALS = 500
"""The largest number of trials on the page. The file trials.csv has all trials."""


def render(
    sweep: RunTables,
    charts: Mapping[str, JsonObject],
    groups: Sequence[str],
    by_run: RunFrames,
    findings: Findings,
    shown: Sequence[str],
    runs_dir: Path,
) -> str:
    """Return the page.

    Args:
        sweep: the runs.
        charts: the Vega-Lite of the figures, by name.
        groups: the token groups, in the order of the columns of tables.
        by_run: the statistics of runs.
        findings: the findings of the sweep.
        shown: the names of the claims.
        runs_dir: the runs folder, for the commands on the page.
    """
    differ = varying_knobs(sweep.trials.to_dicts())
    if (sweep.trials["corpus.data_seed"] == sweep.trials["init.seed"]).all():
        differ = [knob for knob in differ if knob != "corpus.data_seed"]
    specs, datasets = shared_data(charts)
    is_search = any(run.data.tags.get("preset") in SEARCH_GOALS for run in sweep.sweep_runs)
    # The result of a search, such as a counterexample, is in the notes of its plan.
    found = list(sweep.notes) if is_search else []
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            sweep=sweep,
            findings=findings,
            question=question(sweep, findings),
            reading=reading(sweep, by_run),
            sources=list(dict.fromkeys(claim.source for claim in CLAIMS.values())),
            ties_cannot=ties_cannot(findings),
            report_command=report_command(sweep, runs_dir),
            answer=[*found, *answer(findings)],
            notes=[note for note in findings.notes if note not in found],
            matrix=matrix(findings, shown, MOST_SCHEMES),
            replication=replication(sweep, findings, by_run),
            next_steps=next_steps(sweep, findings),
            methods=methods(sweep, findings),
            bibtex=bibtex(sweep, findings),
            provenance=provenance(sweep, findings),
            symbols=SYMBOLS,
            charts=specs,
            datasets=datasets,
            figures={name: FIGURES[name] for name in charts},
            first_screen=FIRST_SCREEN,
            all_claims=ALL_CLAIMS,
            sections=SECTIONS,
            vega=javascript_of_figures(),
            varied={
                knob: sweep.trials[knob].unique(maintain_order=True).to_list() for knob in differ
            },
            fixed={
                knob: sweep.trials[knob][0] for knob in KNOBS if sweep.trials[knob].n_unique() == 1
            },
            schemes=list(findings.depth_gradient)[:MOST_SCHEMES],
            groups=groups,
            orders=ORDERS,
            claims={name: CLAIMS[name] for name in shown},
            trials=findings.runs[:MOST_TRIALS],
            say_forecast=say_forecast,
            say_outcome=say_outcome,
            scope_of=scope_of,
            say_whether_confirmatory=say_whether_confirmatory,
            holds_in=holds_in,
            say_interim=say_interim,
            mlflow_commands=dict.fromkeys(
                sweep.store.address.mlflow_command(runs_dir, run.data.tags["sweep"])
                for run in sweep.sweep_runs
            ),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def report_command(sweep: RunTables, runs_dir: Path) -> str:
    """Return the command that writes this report."""
    names = [run.data.tags["sweep"] for run in sweep.sweep_runs]
    folder = [] if runs_dir == Path("runs") else ["--runs-dir", str(runs_dir)]
    return shlex.join(["python", "analysis/report.py", *folder, "--name", *names])


def ties_cannot(findings: Findings) -> int | None:
    """Return the number of seeds if they are too few for the sign test of one difference.

    Returns:
        None if the seeds are enough, or if nothing is compared.
    """
    if findings.comparisons is None:
        return None
    differences = [
        one
        for parts in findings.comparisons.claims.values()
        for schemes in parts.values()
        for one in schemes.values()
    ]
    seeds = max((one.seeds for one in differences), default=0)
    least = 2.0 ** (1 - seeds)  # two-sided, where all seeds agree
    return seeds if len(differences) * least >= findings.claims.alpha else None


def environment() -> jinja2.Environment:
    """Return the Jinja environment of the templates in this folder, with their filters."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    made.filters["spelled"] = spelling
    made.filters["estimate"] = format_estimate
    made.filters["rule"] = rule_in_words
    made.filters["number"] = lambda value: "–" if value is None else short(value)
    made.filters["p"] = lambda value: (
        "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
    )
    return made


def render_comparison(
    first: Side, second: Side, rows: Sequence[Row], charts: Mapping[str, JsonObject]
) -> str:
    """Return the page that compares two sweeps."""
    specs, datasets = shared_data(charts)
    names = [side.sweep.name for side in (first, second)]
    return (
        environment()
        .get_template("compare.html.jinja")
        .render(
            names=names,
            question=say_difference(first, second),
            answer=say_rows(rows, names),
            rows=rows,
            symbols=SYMBOLS,
            caption=FIGURES["forest"].caption,
            charts=specs,
            datasets=datasets,
            vega=javascript_of_figures(),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def shared_data(
    charts: Mapping[str, JsonObject],
) -> tuple[dict[str, JsonObject], dict[str, JsonObject]]:
    """Separate the data from the figures, so that the page contains each data set only once.

    Returns:
        The figures without data, by name. The columns of each data set, in the form of _coded, by
        the name of the data set.
    """
    specs, datasets = {}, {}
    for name, spec in charts.items():
        specs[name] = {key: part for key, part in spec.items() if key != "datasets"}
        for label, rows in spec.get("datasets", {}).items():
            columns = dict.fromkeys(column for row in rows for column in row)
            datasets[label] = {
                column: _coded([row.get(column) for row in rows]) for column in columns
            }
        specs[name]["sets"] = list(spec.get("datasets", {}))
    return specs, datasets


def _coded(column: list[Json]) -> Json:
    """Compress a column for the page.

    A column of texts becomes {values, at}: each text once, and its index in every row. A column of
    equal values becomes {value, times}. Other columns stay.
    """
    if column and all(value == column[0] for value in column):
        return {"value": column[0], "times": len(column)}
    if not any(isinstance(value, str) for value in column):
        return column
    place = {value: i for i, value in enumerate(dict.fromkeys(column))}
    return {"values": list(place), "at": [place[value] for value in column]}


@functools.cache
def javascript_of_figures() -> str:
    """Return the JavaScript that draws figures. It is cached, because making it takes a second.

    A file that is damaged, or that another account may have written, is made anew.
    """
    name = f"vega-{importlib.metadata.version('vl-convert-python')}.js"
    with contextlib.suppress(InputError, OSError):
        file = cache_dir() / name
        digest, _, kept = file.read_bytes().partition(b"\n") if is_trusted(file) else [b""] * 3
        if digest == sha256(kept).hexdigest().encode():
            return kept.decode()
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    encoded = script.encode()
    kept = b"%s\n%s" % (sha256(encoded).hexdigest().encode(), encoded)
    with contextlib.suppress(InputError):  # a report needs no cache
        write_to_cache(cache_dir() / name, lambda temporary: temporary.write_bytes(kept))
    return script
