"""Make the parts of a paper about a sweep: figures, tables, a paragraph on methods, a citation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import vl_convert

from analysis.claims import CLAIMS
from analysis.decisions import ALPHA
from analysis.findings import Findings
from analysis.runs import RunTables
from analysis.sentences import scope_of, short
from gptcore.config import spelling
from gptcore.files import JsonObject
from gptcore.units import counted

FORMATS = ("svg", "pdf", "png")
COLUMN, PAGE = 85, 170
"""The width of a column of a paper, and of the text on a page, in millimetres."""
WIDEST_IN_A_COLUMN = 420
"""The widest figure of one column, in pixels. A wider figure takes both columns of a page."""
PRINT_DPI, SCREEN_DPI = 300, 150
"""The resolution of a PNG for a paper, and for a page on a screen, in pixels per inch."""
MM_PER_INCH = 25.4

PRINTED = {
    "background": "white",
    "axis": {"labelFontSize": 13, "titleFontSize": 14, "labelLimit": 200},
    "legend": {"labelFontSize": 13, "titleFontSize": 14},
    "header": {"labelFontSize": 14},
    "title": {"fontSize": 14},
}
"""Font sizes of figures in files. Scaled to a column, all text has at least 7 points."""


def write_figure(
    spec: JsonObject, folder: Path, name: str, formats: Sequence[str], dpi: int = PRINT_DPI
) -> list[Path]:
    """Write a figure as files, as wide as a column of a paper or as the text on a page.

    Args:
        spec: the figure in Vega-Lite.
        folder: the folder of the files. It is made if needed.
        name: the name of the files, without an ending.
        formats: some of FORMATS.
        dpi: the resolution of a PNG, in pixels per inch.

    Returns:
        The paths of the files.
    """
    printed = {**spec, "config": {**spec.get("config", {}), **PRINTED}}
    svg = vl_convert.vegalite_to_svg(printed).replace("currentColor", "black")
    size = re.search(r'<svg[^>]*? width="([\d.]+)" height="([\d.]+)"', svg)
    if size is None:
        raise ValueError(f"figure {name} was drawn without a size")
    pixels = float(size[1]), float(size[2])
    width = COLUMN if pixels[0] <= WIDEST_IN_A_COLUMN else PAGE
    height = width * pixels[1] / pixels[0]

    def sized(factor: float, unit: str) -> str:
        tag = size[0].replace(f'width="{size[1]}"', f'width="{width * factor:.2f}{unit}"')
        tag = tag.replace(f'height="{size[2]}"', f'height="{height * factor:.2f}{unit}"')
        return svg.replace(size[0], tag)

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in formats:
        file = folder / f"{name}.{kind}"
        if kind == "svg":
            file.write_text(sized(1, "mm"), encoding="utf-8")
        elif kind == "pdf":
            # vl_convert takes a pixel for a point.
            file.write_bytes(vl_convert.svg_to_pdf(sized(72 / MM_PER_INCH, "")))
        else:
            file.write_bytes(vl_convert.svg_to_png(sized(72 / MM_PER_INCH, ""), ppi=dpi))
        files.append(file)
    return files


def write_tables(tables: Mapping[str, pl.DataFrame], folder: Path) -> None:
    """Write tables as CSV, and as LaTeX for the package booktabs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.write_csv(folder / f"{name}.csv")
        (folder / f"{name}.tex").write_text(latex(table), encoding="utf-8")


def latex(table: pl.DataFrame) -> str:
    """Return a table in LaTeX. Numbers have three digits and are aligned to the right."""
    numeric = [table.schema[column].is_numeric() for column in table.columns]
    rows = [[_in_latex(value) for value in row] for row in table.iter_rows()]
    lines = [" & ".join(map(_in_latex, table.columns)), *(" & ".join(row) for row in rows)]
    head, *body = (f"{line} \\\\" for line in lines)
    columns = "".join("r" if one else "l" for one in numeric)
    return "\n".join(
        ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule", head,
         "\\midrule", *body, "\\bottomrule", "\\end{tabular}", ""]
    )  # fmt: skip


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "−": "$-$",
}  # fmt: skip


def _in_latex(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "--"
    if isinstance(value, float):
        mantissa, _, exponent = short(value).partition("e")
        return f"${mantissa} \\times 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"
    text = " ".join(str(value).split())
    return "".join(LATEX.get(sign, sign) for sign in text)


def tables_of(findings: Findings, estimates: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Make the tables of a paper: the verdicts, the numbers behind them, and the trials.

    Args:
        findings: the findings of a sweep.
        estimates: the rows of analysis.claim_table.estimates.

    Returns:
        The tables `verdicts`, `effects` and `trials`.
    """
    claims = findings.claims
    verdicts = [
        {
            "claim": name,
            "statement": CLAIMS[name].says,
            "verdict": claims.here[name].verdict,
            "adjusted p": claims.here[name].p_holm,
            "seeds": claims.here[name].seeds,
            **{
                scheme: found[name].verdict for scheme, found in claims.by.get("scheme", {}).items()
            },
            **({"in general": claims.in_general[name].verdict} if claims.in_general else {}),
        }
        for name in CLAIMS
    ]
    return {
        "verdicts": pl.DataFrame(verdicts, infer_schema_length=None),
        "effects": estimates.drop("claim_verdict"),
        "trials": pl.DataFrame([dict(row) for row in findings.runs], infer_schema_length=None),
    }


def methods(sweep: RunTables, findings: Findings) -> str:
    """Describe how trials were trained and how claims were decided, for the methods of a paper."""
    trials = sweep.trials
    knobs = trials.row(0, named=True)

    def all_of(knob: str) -> str:
        return " and ".join(spelling(value) for value in sorted(trials[knob].unique().to_list()))

    schemes = trials["init.scheme"].unique(maintain_order=True)
    subsets = trials["corpus.subset"].unique(maintain_order=True).to_list()
    ended = ", ".join(f"{n} {status}" for status, n in findings.trials.items() if n)
    tied = "tied to the token embedding" if knobs["model.tied"] else "not tied"
    return (
        f"We trained {counted(trials.height, 'model')} ({ended}) of the GPT-2 architecture with "
        f"{all_of('model.n_layer')} blocks, {all_of('model.n_head')} heads, width "
        f"{all_of('model.d_model')}, a context of {all_of('model.context')} tokens and an output "
        f"head that is {tied}, for {all_of('train.steps')} steps of "
        f"{all_of('train.batch_size')} sequences with {all_of('optim.name')} (learning rate "
        f"{all_of('optim.lr')}, {all_of('optim.schedule')}, weight decay "
        f"{all_of('optim.weight_decay')}) on {all_of('corpus.name')} ({all_of('corpus.tokenizer')} "
        f"tokens; subsets {', '.join(subsets)}), under {counted(len(schemes), 'init scheme')} "
        f"({', '.join(schemes)}) and with {counted(trials['init.seed'].n_unique(), 'seed')}. "
        f"{say_seeds(trials)} Runs of one seed are paired over schemes. Token groups are measured "
        "on a fixed text. A token that is among the inputs of a sequence is left out of "
        "that sequence. The units of every test are seeds. Means are tested with Student's t-test, "
        "guarded against skewed numbers, medians with the sign test, and shares with the exact "
        f"binomial test. Verdicts on {counted(len(findings.claims.asked), 'claim')} share one "
        f"error rate of {ALPHA:.2g} over both directions (weighted Holm). The digest of the claims "
        f"and rules is {findings.claims.digest}. The trials are {findings.claims.standing}. "
        f"Verdicts are about training {scope_of(findings)}."
        + "".join(f" {note}" for note in sweep.notes)
    )


def say_seeds(trials: pl.DataFrame) -> str:
    """Say what a seed fixes: the weights, and also the data if its seed follows."""
    weights, data = trials["init.seed"], trials["corpus.data_seed"]
    if (weights == data).all():
        return "A seed fixes the initial weights, the order of the batches and the draws of tokens."
    drawn = "The order of the batches and the draws of tokens"
    if data.n_unique() == 1:
        return f"A seed fixes the initial weights. {drawn} are the same in all trials."
    return (
        f"A seed fixes the initial weights. {drawn} have {counted(data.n_unique(), 'seed')} of "
        "their own."
    )


def bibtex(sweep: RunTables, findings: Findings) -> str:
    """Return a citation of a sweep, with the commit of the code that ran it."""
    commits = sweep.made_with["git_commit"]
    note = f"commit {commits[0][:12]}, " if commits else ""
    key = re.sub(r"\W+", "-", findings.sweep).strip("-")
    return (
        f"@misc{{gpt-sweeps-{key},\n"
        f"  title = {{gpt-sweeps: sweep {_in_latex(findings.sweep)}, "
        f"{counted(sweep.trials.height, 'trial')}}},\n"
        f"  note = {{{note}digest of claims and rules {findings.claims.digest}}},\n"
        f"  howpublished = {{Command: {_in_latex('; '.join(sweep.commands))}}},\n"
        "}"
    )


def provenance(sweep: RunTables, findings: Findings) -> dict[str, str]:
    """Return the versions, devices, texts and commands that the numbers of a report come from."""
    names = {
        "git_commit": "commit", "versions": "versions", "device": "devices",
        "corpus_digest": "SHA-256 of the text",
    }  # fmt: skip
    return {
        **{name: "; ".join(sweep.made_with[tag]) for tag, name in names.items()
           if sweep.made_with[tag]},
        "digest of claims and rules": findings.claims.digest,
        "command": "; ".join(sweep.commands),
    }  # fmt: skip
