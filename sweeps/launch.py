"""From a command line to finished trials: plan, then a dry run, a debug run, or trials and report.

A sweep is a set of trial keys. Running it runs the trials that do not exist yet. So the same
command continues a sweep that was cut off, and a command with more values runs only the new ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from gptcore.config import InputError, TrialConfig, parse_value
from gptcore.corpus import NO_TEXTS
from gptcore.experiment import device_of
from sweeps.command_line import add_knobs, parse, sweep_parser
from sweeps.estimate.arrays import check_array, check_together
from sweeps.execution.faults import Fault, fault_of_trial, is_out_of_memory
from sweeps.execution.interrupts import Interrupts
from sweeps.plan import (
    Plan,
    complete_seeds,
    make_plan,
    recorded_again,
    seeds_of,
    with_more_seeds,
    with_overrides,
)
from sweeps.presets import Preset, Space
from tracking.access import private_files, write_for
from tracking.arguments import check_writable, give_up_output, prepare_output, print_error
from tracking.health import GO_ON
from tracking.untrusted import printable

if TYPE_CHECKING:
    from tracking.store import Store


WIDTH_OF_FILES = 160
"""Characters in a line of output that no terminal shows."""


@private_files()
def main(doc: str, presets: Mapping[str, Preset], argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code: 0, 1 if a trial failed, else as `exit_code`."""
    console = make_console()
    try:
        args, overrides = command_line(doc, presets, argv)
        write_for(args.runs_dir)
        plan, first_seeds = planned(args, overrides, presets, console)
        check_together(args.array, plan.trials)
        for note in plan.notes:
            console.print(f"NOTE: {note}", style="bold", soft_wrap=True)
        if args.debug:
            return debug(plan, args, console)
        return run_sweep(plan, args, console, first_seeds)
    except (InputError, Fault, KeyboardInterrupt) as error:
        return exit_code(error)


def planned(
    args: argparse.Namespace, overrides: Space, presets: Mapping[str, Preset], console: Console
) -> tuple[Plan, int | None]:
    """Return the trials that the command line asks for.

    A command that gives a sweep's name, but no preset and no knob, means the trials that this sweep
    has already, if there are any.

    Returns:
        The plan, and the number of seeds before --until-decided adds more; None without it.

    Raises:
        InputError: a trial cannot run.
    """
    if args.name and not (args.preset or overrides or args.claims) and args.until_decided is None:
        # Not at the top: MLflow takes seconds to import.
        from analysis.interim import find_sweep
        from sweeps.session import check_kind, naming_faults
        from tracking.address import store_address
        from tracking.store import Store
        from tracking.sweep_run import read_plan

        runs_dir = args.runs_dir.resolve()
        store = Store(store_address(runs_dir))
        with naming_faults(store, runs_dir):
            sweep_run = find_sweep(store, args.name)
            check_kind(sweep_run, is_search=False)
            recorded = read_plan(store, sweep_run) if sweep_run else None
            if not recorded and store.address.exists and store.has_trials_of(args.name):
                raise InputError(
                    f"sweep {args.name} has trials, but no run of its own that says which: give "
                    "its --preset or its knobs"
                )
        if recorded:
            console.print(
                f"sweep {args.name}: the trials of its last command, {recorded.command}",
                soft_wrap=True,
            )
            return recorded_again(recorded), None
    name = args.preset or "quick"
    spaces, first_seeds = with_overrides(name, presets[name].spaces, overrides), None
    if args.until_decided is not None:
        first_seeds = len(seeds_of(spaces))
        spaces = with_more_seeds(spaces, args.until_decided)
    return make_plan(args.name or name, name, spaces, args.claims), first_seeds


class PlainConsole(Console):
    """A console on which no text is a command of the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text as it is: all that is printed comes through here."""
        return super().render_str(printable(text), **options)


def make_console() -> Console:
    """Return a console that prints text as it is.

    In a file or a pipe, lines are wide enough for a table of many knobs.
    """
    prepare_output()
    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    return PlainConsole(highlight=False, markup=False, emoji=False, width=width)


def exit_code(error: BaseException) -> int:
    """Print why a command ended. Return its exit code: 2 for bad input, 1 for a fault, 130 for
    Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        print(f"stopped: {GO_ON}", file=sys.stderr)
        return 130
    print_error(error)
    give_up_output()
    return 2 if isinstance(error, InputError) else 1


def debug(plan: Plan, args: argparse.Namespace, console: Console) -> int:
    """Run the first trial of the plan in this process, without Ray. Return the exit code."""
    from sweeps.debug import debug_trial

    key, config = next(iter(plan.trials.items()))
    device_of(config)
    check_writable(args.runs_dir, args.share)
    try:
        debug_trial(config, key, args.runs_dir, console)
    except Exception as error:
        if not is_out_of_memory(error):
            raise  # a debugger wants the error itself
        raise Fault(f"trial {key} failed: {fault_of_trial(error)}") from error
    return 0


def command_line(
    doc: str, presets: Mapping[str, Preset], argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Space]:
    """Parse the command line. Raise InputError for bad arguments.

    Returns:
        The options, and the values given for knobs.
    """
    parser = sweep_parser(doc)
    parser.add_argument(
        "--preset",
        help="; ".join(f"{name}: {preset.doc}" for name, preset in presets.items()) + " [quick]",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="list which trials are done and missing, and estimate time, memory and disk",
    )
    mode.add_argument(
        "--debug", action="store_true", help="run the first trial in this process, without Ray"
    )
    parser.add_argument(
        "--array", default="auto", metavar="auto|off|K",
        help="how many trials train together in one process, if they differ only in init and "
        "corpus: as many as make it faster, none, or K [auto]",
    )  # fmt: skip
    parser.add_argument(
        "--redo", nargs="+", default=[], metavar="KEY|failed|all",
        help="run these trials again; their old runs are kept, and marked as replaced",
    )  # fmt: skip
    parser.add_argument(
        "--until-decided", type=int, metavar="N",
        help="add seeds until every claim that N seeds can support is decided, at most N seeds per "
        "configuration, with up to five interim analyses",
    )  # fmt: skip
    parser.add_argument(
        "--claims", nargs="+", default=[], metavar="CLAIM",
        help="ask only these claims, which then share the whole error rate of the sweep",
    )  # fmt: skip
    parser.add_argument(
        "--watch", action="store_true",
        help="print a link to a page on this machine that shows the main figures while trials run, "
        "until the sweep ends",
    )  # fmt: skip
    add_knobs(parser, "one value, or several to sweep over [default; a preset may have others]")
    args, given = parse(parser, argv)
    if args.preset not in (None, *presets):
        raise InputError(f"unknown preset {args.preset!r}: take {', '.join(presets)}")
    if args.watch and (args.dry_run or args.debug):
        raise InputError(
            "--watch shows a running sweep: it cannot be combined with --dry-run or --debug"
        )
    check_array(args.array)
    if args.claims:
        from analysis.claims import check_claims  # not at the top: it takes seconds

        check_claims(args.claims)
    return args, {key: [parse_value(key, text) for text in texts] for key, texts in given.items()}


def run_sweep(
    plan: Plan, args: argparse.Namespace, console: Console, first_seeds: int | None
) -> int:
    """Run the missing trials of the plan, then report. Return the exit code.

    Args:
        plan: all trials that the sweep may get.
        args: the command line.
        console: where to print.
        first_seeds: number of seeds before --until-decided adds more; None without it.
    """
    # Not at the top: MLflow takes seconds to import, and --debug and --help do not need it.
    from analysis.interim import find_sweep
    from sweeps.interim import agreed_interim_plan, follow, say_schedule
    from sweeps.session import Session, check_kind, naming_faults
    from sweeps.watch import Watch
    from tracking.address import store_address
    from tracking.store import Store

    runs_dir = args.runs_dir.resolve()
    store = Store(store_address(runs_dir))
    with naming_faults(store, runs_dir):
        check_kind(find_sweep(store, plan.name), is_search=False)
        if args.dry_run:
            return dry_run(plan, args, store, console, first_seeds)
        check_writable(runs_dir, args.share)
        with Session(
            plan.name,
            runs_dir,
            store,
            console,
            array=args.array,
            measures=not args.no_estimate,
            waits=args.wait,
            watch=Watch(plan.name, runs_dir, store.address, console) if args.watch else None,
        ) as session:
            interim = agreed_interim_plan(plan, first_seeds, store)
            if interim is None:
                stopped = session.run(plan, args.redo)
            else:
                say_schedule(interim, console)
                stopped = follow(session, plan, interim, args.redo, console)
            return session.stop() if stopped else session.finish(report=not args.no_report)


def dry_run(
    plan: Plan,
    args: argparse.Namespace,
    store: Store,
    console: Console,
    first_seeds: int | None,
) -> int:
    """Print which trials are missing, and what they need. Return the exit code."""
    from analysis.claims import CLAIMS
    from analysis.decisions import ALPHA
    from analysis.power import say_power
    from sweeps.interim import agreed_interim_plan, next_analysis, say_schedule
    from sweeps.ledger import holder, read_ledger, say_how_far, to_redo, trial_table

    interim, alpha = agreed_interim_plan(plan, first_seeds, store), ALPHA
    if interim:
        say_schedule(interim, console)
        plan, alpha = next_analysis(plan, interim)
    runs_dir = args.runs_dir.resolve()
    ledger = read_ledger(plan.trials, plan.name, store, runs_dir)
    again = to_redo(ledger, args.redo)
    say_how_far(plan, ledger, again, store, console)
    if by := holder(runs_dir, plan.name, store):
        console.print(f"sweep {plan.name} is being run by {by}", soft_wrap=True)
    console.print(trial_table(plan, ledger, again))
    missing = {
        key: config
        for key, config in plan.trials.items()
        if key in again or not ledger[key].is_done
    }
    asked = {name: CLAIMS[name] for name in CLAIMS if not plan.claims or name in plan.claims}
    powers = say_power(complete_seeds(plan.trials.values()), asked, alpha)
    for line in [*expected(missing, args, console), *powers]:
        console.print(line, soft_wrap=True)
    return 0


def expected(
    missing: Mapping[str, TrialConfig], args: argparse.Namespace, console: Console
) -> list[str]:
    """Return lines about the time, memory and disk that the missing trials need.

    These are measured on Ray. With --no-estimate, they come from earlier measurements, and Ray is
    not started.
    """
    if not missing:
        return []
    interrupts = Interrupts()
    with interrupts.handled():
        with interrupts.postponed():  # see Session.open
            from sweeps.estimate.estimate import estimate
            from sweeps.execution import ray_cluster
            from sweeps.execution.resources import cluster_address

        trials, measuring = {config.train for config in missing.values()}, not args.no_estimate
        texts = NO_TEXTS
        try:
            if measuring or cluster_address():  # only a running Ray knows a cluster's machines
                with interrupts.postponed():
                    ray_cluster.start_ray()
                ray_cluster.await_ray(trials, console)
            else:
                ray_cluster.check_devices(trials)
            if measuring:
                texts = ray_cluster.texts_for({config.corpus.name for config in missing.values()})
            runs_dir = args.runs_dir.resolve()
            found, _ = estimate(missing, texts, console, runs_dir, args.array, measuring)
            return found.lines()
        finally:
            ray_cluster.stop_ray()
