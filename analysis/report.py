"""Write the report of one or several sweeps.

    python analysis/report.py                       # the newest sweep of ./runs
    python analysis/report.py --name quick --out somewhere
    python analysis/report.py --name quick mine     # several sweeps as one
    python analysis/report.py --name quick mine --compare
    python analysis/report.py --figure qkv_std --format pdf
    python analysis/report.py --where "init.scheme == 'gpt2' AND init.seed < 4"

Writes report.html (opens without a network), findings.json, summary.md, the tables as Parquet and
the two main figures as PNG.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # Import from the root of the checkout, also where a package of that name is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from analysis.claim_table import estimates, of_claims, specified, variance, weakest
from analysis.claims import CLAIMS, check_claims
from analysis.comparing import Side, compare_sweeps, estimates_of
from analysis.figures import FIGURES, FIRST_SCREEN, check_figures, drawn
from analysis.findings import Findings, find
from analysis.frames import frames_of_runs, with_scheme
from analysis.jsonable import to_json
from analysis.page import render, render_comparison
from analysis.papers import FORMATS, SCREEN_DPI, tables_of, write_figure, write_tables
from analysis.rare_tokens import shuffled_labels
from analysis.reading import UNREADABLE
from analysis.runs import read_sweeps
from analysis.sentences import (
    say_interim,
    say_outcome,
    say_where_it_holds,
    scope_of,
)
from analysis.sweep_verdicts import measured
from gptcore.config import InputError
from tracking.access import private_files, write_for
from tracking.address import store_address
from tracking.arguments import Parser, give_up_output, prepare_output, print_error
from tracking.health import store_fault
from tracking.store import Store
from tracking.untrusted import check_no_link, in_markdown, one_line, printable

MAIN_FIGURES = [name for name, figure in FIGURES.items() if figure.section == FIRST_SCREEN]
"""The figures that every report also has as PNG files, for pages that cannot show HTML."""


def build_report(
    store: Store,
    names: Sequence[str],
    out: Path | None,
    runs_dir: Path,
    *,
    where: str | None = None,
    claims: Sequence[str] = (),
    shuffle: int | None = None,
    figures: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
) -> Path:
    """Write the report of one sweep or of several, and return its folder.

    Args:
        store: where the sweeps are recorded.
        names: the names of the sweeps. Without names, the sweep that was started last.
        out: the folder of the report. By default it is reports/NAME in the runs folder. The name
            ends with `-selected` for some trials, `-claims` for some claims, or `-shuffled` for
            shuffled labels.
        runs_dir: the runs folder.
        where: report only the trials for which this SQL expression over the knobs is true.
        claims: show only the verdicts on these claims, corrected for the number of all claims.
        shuffle: a seed. With it, the names of token groups are shuffled within each run.
        figures: write only these figures, as files in the folder `figures`. The name `all` means
            all figures.
        formats: the formats of the files of figures, from FORMATS.

    Raises:
        InputError: there is nothing to report, or the folder cannot be written. An earlier report
            in the folder stays unchanged.
    """
    check_claims(claims)
    some = [] if list(figures) == ["all"] else figures
    check_figures(some)
    sweep = read_sweeps(store, names, where, runs_dir / "cache")
    sweep = replace(sweep, trials=with_scheme(sweep.trials))
    if shuffle is not None:
        sweep = shuffled_labels(sweep, shuffle)
    shown = list(dict.fromkeys(claims)) or list(CLAIMS)
    if claims:
        note = f"{len(shown)} of {len(CLAIMS)} claims are shown, corrected for all claims."
        sweep = replace(sweep, notes=(*sweep.notes, note))
    # The report of a part or of a control does not replace the report of the sweep.
    kind = (
        "-selected" * bool(where) + "-claims" * bool(claims) + "-shuffled" * (shuffle is not None)
    )
    folder = out or runs_dir / "reports" / (sweep.name.replace(" ", "") + kind)
    if out is None:
        check_no_link(folder, runs_dir)
    with naming_contradictions(sweep.name):
        by_run = frames_of_runs(sweep)
        values = measured(sweep)
        findings = find(sweep, by_run, values)
        by_scheme = estimates(findings)
        frames = {
            **sweep.tables,
            **by_run.by_name(),
            **specified(findings),
            "claims": of_claims(sweep, values, by_scheme),
            "variance": variance(findings),
            "trials": sweep.trials,
        }
        charts = drawn({**frames, "forest": weakest(by_scheme, findings, shown)}, some)
        if lacking := [name for name in some if name not in charts]:
            raise InputError(f"there are no numbers for the figure {' and '.join(lacking)}")
        groups = frames["group_changes"]["group"].unique(maintain_order=True).to_list()
        page = render(sweep, charts, groups, by_run, findings, shown, runs_dir)
        contents = json.dumps(to_json(findings), indent=2, allow_nan=False)
    with writing(folder) as new:
        for name in figures and charts:
            write_figure(charts[name], new / "figures", name, formats)
        if not figures:
            for name in charts.keys() & MAIN_FIGURES:
                write_figure(charts[name], new / "figures", name, ["png"], SCREEN_DPI)
            (new / "report.html").write_text(page, encoding="utf-8")
            (new / "findings.json").write_text(contents)
            (new / "summary.md").write_text(summary(findings, shown), encoding="utf-8")
            write_tables(tables_of(findings, by_scheme), new / "tables")
            for table, frame in frames.items():
                frame.write_parquet(new / f"{table}.parquet")
        put_in_place(new, folder)
        if not figures:
            remove_older_figures(folder / "figures", charts)
    return folder


def build_comparison(store: Store, names: Sequence[str], out: Path | None, runs_dir: Path) -> Path:
    """Write the page that compares two sweeps, and return its folder.

    Args:
        store: where the sweeps are recorded.
        names: the names of the two sweeps.
        out: the folder of the page. By default, reports/ONE+vs+TWO in the runs folder.
        runs_dir: the runs folder.

    Raises:
        InputError: there are not two sweeps, or the folder cannot be written.
    """
    if len(set(names)) != 2 or len(names) != 2:
        raise InputError("--compare needs the names of two different sweeps: --name ONE TWO")

    def read(name: str) -> Side:
        sweep = read_sweeps(store, [name], None, runs_dir / "cache")
        sweep = replace(sweep, trials=with_scheme(sweep.trials))
        with naming_contradictions(name):
            values = measured(sweep)
            findings = find(sweep, frames_of_runs(sweep), values)
        return Side(sweep=sweep, values=values, findings=findings)

    first, second = map(read, names)
    rows = compare_sweeps(first, second)
    frame = estimates_of(rows, first, second)
    folder = out or runs_dir / "reports" / "+vs+".join(names)
    if out is None:
        check_no_link(folder, runs_dir)
    chart = drawn({"forest": frame}, ["forest"])
    page = render_comparison(first, second, rows, chart)
    with writing(folder) as new:
        (new / "report.html").write_text(page, encoding="utf-8")
        (new / "comparison.json").write_text(json.dumps(to_json(rows), indent=2))
        frame.write_parquet(new / "claims.parquet")
        put_in_place(new, folder)
    return folder


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Make the folder of a report, and an empty folder inside it for new files. Yield the latter.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise InputError(
            f"the report folder {folder} cannot be written: {error.strerror}"
        ) from error


def put_in_place(new: Path, folder: Path) -> None:
    """Move all files of a folder and its subfolders into another folder, and replace older files.

    Raises:
        InputError: there is a folder where a file has to be, or a file where a folder has to be.
            Then no file is moved.
    """
    files = sorted(file.relative_to(new) for file in new.rglob("*") if file.is_file())
    for file in files:
        if (folder / file).is_dir():
            raise InputError(
                f"the report folder {folder} has a folder {file} in it, where a file of the report "
                "has to be: remove it, or give another --out"
            )
        check_no_link(folder / file.parent, folder.parent)
    for file in files:
        (folder / file.parent).mkdir(exist_ok=True)
        (new / file).replace(folder / file)


def remove_older_figures(folder: Path, names: Collection[str]) -> None:
    """Remove the figures of an earlier report, which may have other numbers.

    Args:
        folder: the folder of the figures.
        names: the names of all figures of this report. Files with other names stay.
    """
    new = {f"{name}.png" for name in MAIN_FIGURES}
    for file in folder.glob("*.*"):
        if file.stem in names and file.suffix[1:] in FORMATS and file.name not in new:
            file.unlink()


@contextlib.contextmanager
def naming_contradictions(sweep: str) -> Iterator[None]:
    """Turn an error that contradictory tables cause into an InputError.

    Somebody else may have made the tables. Python's option `-X dev` shows where the report fails.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, *UNREADABLE) as error:
        if sys.flags.dev_mode:
            raise
        why = one_line(str(error).partition("\n")[0])
        raise InputError(
            f"the tables of sweep {sweep} contradict one another, or the report has a fault "
            f"({type(error).__name__}: {why}): --redo all runs its trials again, and `python -X "
            "dev` shows where the report fails"
        ) from error


def summary(findings: Findings, shown: Sequence[str]) -> str:
    """Write the summary of a report in Markdown."""
    claims, general = findings.claims, findings.claims.in_general
    lines = [
        f"# Sweep {findings.sweep}",
        "",
        ", ".join(f"{count} {status}" for status, count in findings.trials.items() if count)
        + f" trials; {claims.standing} (claims {claims.digest}).",
        "",
        in_markdown(f"Every verdict is about training {scope_of(findings)}."),
        *([f"\n{say_interim(findings.interim)}"] if findings.interim else []),
        *(f"\nNote: {in_markdown(note)}" for note in findings.notes),
        "",
        "| claim | verdict | by scheme | in general |",
        "|---|---|---|---|",
        *(
            f"| `{name}`: {CLAIMS[name].says} | {claims.here[name].verdict} "
            f"| {say_where_it_holds(name, claims) or '–'} "
            f"| {general[name].verdict if general else '–'} |"
            for name in shown
        ),
        "",
        *(f"- `{name}`: {in_markdown(say_outcome(name, findings))}" for name in shown),
    ]
    return "\n".join(lines) + "\n"


def whole_number(text: str) -> int:
    """Parse a seed from the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0, not {text!r}")
    return int(text)


@contextlib.contextmanager
def refusing_faults(store: Store) -> Iterator[None]:
    """Turn an error of the store into an InputError with a sentence about the reason."""
    try:
        yield
    except Exception as error:
        if why := store_fault(error, store.address):
            raise InputError(why) from error
        raise


@private_files()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    prepare_output()
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--name", nargs="+", default=[], metavar="NAME",
        help="name of the sweep, or of several sweeps to report as one [the sweep started last]",
    )  # fmt: skip
    parser.add_runs_dir()
    parser.add_argument(
        "--where", help="report only some trials: a condition such as \"init.scheme = 'gpt2'\""
    )
    parser.add_argument(
        "--claims", nargs="+", default=[], metavar="CLAIM",
        help=f"show only these claims, still corrected for all claims: {', '.join(CLAIMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--shuffle-labels", type=whole_number, metavar="SEED",
        help="as a control, shuffle the names of token groups within each run",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true",
        help="put the verdicts and numbers of two sweeps side by side",
    )  # fmt: skip
    parser.add_argument(
        "--figure", nargs="+", default=[], metavar="NAME",
        help=f"write these figures as files instead of the page: all, {', '.join(FIGURES)}",
    )  # fmt: skip
    parser.add_argument(
        "--format", nargs="+", default=FORMATS, choices=FORMATS, dest="formats",
        help="formats of the files of --figure [svg pdf png]",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the report [RUNS_DIR/reports/NAME]")
    try:
        args = parser.parse_args(argv)
        if args.out == Path():
            raise InputError(
                "--out takes a folder for the files of the report, not the current folder"
            )
        if args.compare and (
            args.where or args.claims or args.figure or args.shuffle_labels is not None
        ):
            raise InputError(
                "--compare compares all trials and claims of two sweeps: it cannot be combined "
                "with --where, --claims, --figure or --shuffle-labels"
            )
        write_for(args.runs_dir)
        store = Store(store_address(args.runs_dir))
        with refusing_faults(store):
            if args.compare:
                folder = build_comparison(store, args.name, args.out, args.runs_dir)
            else:
                folder = build_report(
                    store, args.name, args.out, args.runs_dir,
                    where=args.where, claims=args.claims, shuffle=args.shuffle_labels,
                    figures=args.figure, formats=args.formats,
                )  # fmt: skip
    except InputError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    try:
        what = "figures" if args.figure else "report.html"
        print(f"report: {printable(str(folder / what))}", flush=True)
    except OSError as error:
        give_up_output()
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
