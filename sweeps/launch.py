"""From a command line to finished trials: plan -> dry run | debug | Ray Tune -> report.

A sweep is a set of trial keys. Running it makes the missing ones exist and leaves finished ones
alone, so the same command continues a sweep that was cut off, and a wider one runs the difference.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table

from gptcore.checkpoint import checkpoint_file
from gptcore.config import COMPARED, KNOBS, InputError, TrialConfig, parse_value, spelling
from gptcore.corpus import CORPORA, Corpus, CorpusUnavailable, canonical_subset, load_corpus
from gptcore.experiment import check_knobs, device_of
from gptcore.init_schemes import INIT_SCHEMES
from gptcore.optimizers import OPTIMIZERS, SCHEDULES
from sweeps.spaces import Preset, Space, trials_of

if TYPE_CHECKING:
    from sweeps.ledger import Entry

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """What a sweep is: its name and, by trial key, the trials that it wants."""

    name: str
    preset: str
    trials: Mapping[str, TrialConfig]
    corpora: Mapping[str, Corpus]  # by trial key
    notes: tuple[str, ...]  # what the user should know of how the plan came about

    def as_dict(self) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "preset": self.preset,
            "command": shlex.join(["python", *sys.argv]),
            "notes": list(self.notes),
            "tags": self.tags(),
            "trials": {
                key: {"params": config.to_flat(), "corpus_digest": self.corpora[key].digest}
                for key, config in self.trials.items()
            },
        }

    def varied(self) -> list[str]:
        """The knobs in which the trials differ."""
        flats = [config.to_flat() for config in self.trials.values()]
        return [knob for knob in KNOBS if len({flat[knob] for flat in flats}) > 1]

    def compared(self) -> list[str]:
        """The knobs that runs are compared over: the scheme, and others of COMPARED that vary."""
        varied = [knob for knob in self.varied() if knob in COMPARED and knob != "init.scheme"]
        return ["init.scheme", *varied]

    def tags(self) -> dict[str, str]:
        """What the driver knows and every run of the sweep should keep."""
        packages = ("torch", "ray", "mlflow", "polars", "numpy")
        versions = [f"python {platform.python_version()}"]
        versions += [f"{name} {version(name)}" for name in packages]
        return {
            "notes": " ".join(self.notes),
            "git_commit": git_commit(),
            "versions": ", ".join(versions),
        }


def main(doc: str, presets: Mapping[str, Preset], argv: Sequence[str] | None = None) -> int:
    """The command; -> its exit code: 0, 1 where a trial failed, 2 for bad input, 130 for Ctrl-C."""
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        args, overrides = command_line(doc, presets, argv)
        preset = presets[args.preset]
        spaces = with_overrides(args.preset, preset.spaces, overrides)
        plan = make_plan(args.name or args.preset, args.preset, spaces)
        for note in plan.notes:
            console.print(f"NOTE: {note}", style="bold", soft_wrap=True)
        if args.debug:
            from sweeps.debug import debug_trial

            key, config = next(iter(plan.trials.items()))
            device_of(config)
            check_writable(args.runs_dir)
            debug_trial(config, key, args.runs_dir, console)
            return 0
        return run_sweep(plan, preset, args, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def command_line(
    doc: str, presets: Mapping[str, Preset], argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Space]:
    """The options, and the values given for knobs. Raises InputError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(message)

    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset",
        default="quick",
        help="; ".join(f"{name}: {preset.doc}" for name, preset in presets.items()),
    )
    parser.add_argument(
        "--name", help="of the sweep, by default the preset's; runs are kept under it"
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where everything goes (./runs)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run", action="store_true", help="list what is done and what is missing"
    )
    mode.add_argument("--debug", action="store_true", help="run the first trial here, without Ray")
    parser.add_argument(
        "--redo", nargs="+", default=[], metavar="KEY|failed|all",
        help="run these trials anew, though they have a run, which is kept and marked",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="end without building the report")
    knobs = parser.add_argument_group(
        "knobs", "one value, or several to sweep over [default, where the preset has no other]"
    )
    defaults = TrialConfig().to_flat()
    registries: dict[str, Mapping[str, Any]] = {
        "init.scheme": INIT_SCHEMES,
        "corpus.name": CORPORA,
        "optim.name": OPTIMIZERS,
        "optim.schedule": SCHEDULES,
    }
    for key, entry in KNOBS.items():
        names = entry.metadata["choices"] or registries.get(key, ())
        knobs.add_argument(
            f"--{key}",
            nargs="+",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{entry.metadata['doc']}{': ' if names else ''}{', '.join(names)} "
            f"[{spelling(defaults[key])}]",
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{key}" for key in KNOBS], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown argument {unknown[0]}: {hint}--help names them all")
    if args.preset not in presets:
        raise InputError(f"unknown preset {args.preset!r}: take {', '.join(presets)}")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", args.name):
        raise InputError(
            "--name takes up to 100 letters, digits, dots, dashes and underscores, "
            f"the first a letter or digit, not {args.name!r}"
        )
    overrides = {
        key: [parse_value(key, text) for text in vars(args)[key]] for key in KNOBS if key in args
    }
    return args, overrides


def with_overrides(preset: str, spaces: Sequence[Space], overrides: Space) -> list[Space]:
    """The preset's spaces with what the command line gives in place of their values.

    Raises InputError for a knob by which the preset's own spaces differ.
    """
    for knob in overrides:
        if any(space.get(knob) != spaces[0].get(knob) for space in spaces):
            raise InputError(
                f"--preset {preset} sets {knob} by itself, for each of its parts: "
                "vary it under another preset"
            )
    return [{**space, **overrides} for space in spaces]


def make_plan(name: str, preset: str, spaces: Sequence[Space]) -> Plan:
    """Check every trial of the spaces and give it its key. Raises InputError for a bad one."""
    notes: list[str] = []
    load = functools.cache(load_corpus)
    if not any("corpus.name" in space for space in spaces):
        try:
            load(TrialConfig().corpus, context=2)
        except CorpusUnavailable as error:
            subsets = [subset for space in spaces for subset in space.get("corpus.subset", ())]
            if any(str(subset).startswith("part-") for subset in subsets):
                raise  # parts are the book's: it was asked for
            spaces = [{**space, "corpus.name": ["pydocs"]} for space in spaces]
            notes.append(f"pydocs (Python's manual) stands in for the default corpus: {error}")
    trials, corpora = {}, {}
    for config in itertools.chain.from_iterable(map(trials_of, spaces)):
        check_knobs(config)
        subset = canonical_subset(config.corpus.subset)
        config = replace(config, corpus=replace(config.corpus, subset=subset))
        if config.probed_layers() == list(range(config.model.n_layer)):
            config = replace(config, probes=replace(config.probes, layers="all"))
        # The order of batches does not matter to what is loaded.
        corpus = load(replace(config.corpus, data_seed=0), config.model.context)
        if config.corpus.name not in CORPORA:
            # A worker need not stand in the folder where the user typed the path.
            config = replace(config, corpus=replace(config.corpus, name=corpus.origin))
        key = config.key(corpus.digest)
        trials[key], corpora[key] = config, corpus
    return Plan(name, preset, trials, corpora, tuple(notes))


def check_writable(folder: Path) -> None:
    """Make the folder. Raises InputError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--runs-dir {folder} cannot be written: {error.strerror}") from error


def run_sweep(plan: Plan, preset: Preset, args: argparse.Namespace, console: Console) -> int:
    """Run what is missing of the plan, then report; -> the exit code."""
    from analysis.runs import connect, has_started, tracking_uri
    from sweeps.ledger import holder, holding, read_ledger, to_redo

    runs_dir = args.runs_dir.resolve()
    uri = tracking_uri(runs_dir)
    if not args.dry_run:
        check_writable(runs_dir)
        with holding(runs_dir, plan.name):
            return run_missing(plan, preset, args, uri, console)
    ledger = read_ledger(
        plan.trials, plan.name, connect(uri) if has_started(uri) else None, runs_dir
    )
    again = to_redo(ledger, args.redo)
    say_how_far(plan, ledger, again, console)
    if by := holder(runs_dir, plan.name):
        console.print(f"it is being run by {by}", soft_wrap=True)
    console.print(trial_table(plan, ledger, again))
    for line in power(plan):
        console.print(line, soft_wrap=True)
    return 0


def power(plan: Plan) -> list[str]:
    """What the plan's number of seeds can support, and what it cannot even if every seed agrees."""
    from analysis.claims import CLAIMS
    from analysis.verdicts import detectable, least_seeds

    configs_of: dict[int, set[str]] = {}
    for config in plan.trials.values():
        flat = config.to_flat()
        seed = flat.pop("init.seed")
        configs_of.setdefault(int(seed), set()).add(str(flat))
    every = set().union(*configs_of.values())
    seeds = sum(some == every for some in configs_of.values())
    needs: dict[int, list[str]] = {}
    for name, least in least_seeds(CLAIMS).items():
        needs.setdefault(least, []).append(name)
    lines = [f"{seeds} seeds in every configuration, {len(CLAIMS)} claims:"]
    if seeds >= 2:
        effect = f"{detectable(seeds, len(CLAIMS)):.2g} standard deviations of seeds"
        lines.append(
            f"  a mean is found beyond its bound (80% power) where it lies {effect} beyond"
        )
    return lines + [
        f"  {'can' if seeds >= least else 'cannot'} support {', '.join(names)}"
        + ("" if seeds >= least else f": {least} seeds can")
        for least, names in sorted(needs.items())
    ]


def run_missing(
    plan: Plan, preset: Preset, args: argparse.Namespace, uri: str, console: Console
) -> int:
    """run_sweep by the one driver that works on the sweep."""
    from analysis.claims import digest
    from analysis.runs import chart_page, connect, has_started, mlflow_command
    from sweeps import tracking
    from sweeps.ledger import read_ledger, to_redo
    from sweeps.mlflow_view import VIEW_TAG, view_of_sweep

    runs_dir = args.runs_dir.resolve()

    def ledger_now() -> dict[str, Entry]:
        return read_ledger(
            plan.trials, plan.name, connect(uri) if has_started(uri) else None, runs_dir
        )

    ledger = ledger_now()
    again = to_redo(ledger, args.redo)
    missing = [key for key, entry in ledger.items() if key in again or not entry.is_done]
    say_how_far(plan, ledger, again, console)
    # A new store takes as long to make as Ray to start.
    with ThreadPoolExecutor(max_workers=1) as beside:
        opening = beside.submit(connect, uri)
        if missing:
            from sweeps.ray_runner import run_on_ray, start_ray

            start_ray({plan.trials[key].train.device for key in missing}, console)
        client = opening.result()
    n_layer = max(config.model.n_layer for config in plan.trials.values())
    view = {VIEW_TAG: view_of_sweep(plan.compared(), n_layer)}
    experiment_id = tracking.open_experiment(client, plan.name, runs_dir, view)
    tracking.close_cut_off(client, experiment_id)
    for key in again:
        run = ledger[key].run
        assert run is not None
        checkpoint_file(runs_dir, key).unlink(missing_ok=True)
        tracking.set_aside(client, run)
    said = {**plan.as_dict(), "claims_digest": digest()}
    sweep = tracking.SweepRun(client, experiment_id, said, launched=time.time())
    ended, stopped = "FAILED", False
    artifacts: list[Path] = []
    try:
        if missing:
            store = {"uri": uri, "experiment_id": experiment_id}
            jobs = [job_of(plan, key) for key in missing]
            stopped = run_on_ray(jobs, store, preset.trials_per_gpu, runs_dir, console)
            ledger = ledger_now()
        console.print(trial_table(plan, ledger))
        remain = sum(not entry.is_done for entry in ledger.values())
        if stopped:
            ended = "KILLED"
            console.print(f"stopped with {remain} trials to go: the same command goes on")
            return 130
        if not any(entry.status == "finished" for entry in ledger.values()):
            console.print("no trial finished, so there is nothing to report")
        elif not args.no_report:
            from analysis.report import build_report

            folder = build_report(uri, [plan.name], None, runs_dir)
            artifacts = [folder / name for name in ("report.html", "findings.json", "summary.md")]
            console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
        console.print(f"MLflow: {mlflow_command(uri)}", soft_wrap=True)
        console.print(f"  then: {chart_page(uri, experiment_id)}", soft_wrap=True)
        ended = "FAILED" if remain else "FINISHED"
        return 1 if remain else 0
    finally:
        sweep.end(ended, artifacts)


def say_how_far(
    plan: Plan, ledger: Mapping[str, Entry], again: Sequence[str], console: Console
) -> None:
    done = sum(entry.is_done and key not in again for key, entry in ledger.items())
    line = f"sweep {plan.name}: {len(ledger)} trials, {done} done, {len(ledger) - done} missing"
    console.print(line + (f", {len(again)} of them to be run again" if again else ""))


def job_of(plan: Plan, key: str) -> dict[str, Any]:
    """A trial as sweeps.trainable takes it."""
    corpus, flat = plan.corpora[key], plan.trials[key].to_flat()
    scheme, *others = plan.compared()
    name = [flat[scheme], *(f"{knob} {spelling(flat[knob])}" for knob in others)]
    name += [flat["corpus.subset"], f"seed {flat['init.seed']}"]
    tags = {"corpus_digest": corpus.digest, "corpus_origin": corpus.origin}
    return {
        "key": key,
        "name": ", ".join(map(str, name)),
        "params": flat,
        "tags": {"sweep": plan.name, **plan.tags(), **tags},
    }


def trial_table(plan: Plan, ledger: Mapping[str, Entry], again: Sequence[str] = ()) -> Table:
    """The trials of a plan, with the knobs in which they differ, and how each stands."""
    varied = plan.varied()
    told = any(entry.why for entry in ledger.values()) or bool(again)
    table = Table("trial", *varied, "status", *(["why"] if told else []))
    for key, config in plan.trials.items():
        flat, entry = config.to_flat(), ledger[key]
        why = "; ".join(filter(None, ["to be run again" if key in again else "", entry.why]))
        row = [key, *(spelling(flat[knob]) for knob in varied), entry.status]
        table.add_row(*row, *([why] if told else []))
    return table


@functools.cache
def git_commit() -> str:
    """The checkout's commit, with `+` where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if dirty.stdout else "")
