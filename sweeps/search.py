"""Search over configurations: Optuna suggests each trial from the results of earlier ones.

python sweeps/search.py best --metric loss/val
python sweeps/search.py best --init.scheme normal --init.std 0.005..0.1 --optim.lr 1e-4..1e-2
python sweeps/search.py refute --claim depth_gradient

`best` finds the init scheme, its parameters and the learning rate that train best. It prunes trials
that are worse than others at the same step. `refute` searches for configurations that contradict a
claim, and tests the ones that it finds on fresh seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # Import from the root of the checkout, also where a package of that name is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from optuna.trial import TrialState
from rich.console import Console

from analysis.counterexamples import REFUTABLE, seeds_to_contradict, sentences
from analysis.decisions import ALPHA
from analysis.interim import find_sweep, read_interim_plan
from gptcore.config import KNOBS, TOKENIZER, VOCAB_SIZES, InputError, Scalar, TrialConfig, spelling
from gptcore.init_schemes import INIT_SCHEMES
from sweeps.command_line import add_knobs, parse, sweep_parser
from sweeps.execution.faults import Fault
from sweeps.launch import exit_code, make_console
from sweeps.plan import checked, with_corpus
from sweeps.presets import trial_of
from sweeps.searching.runner import SearchRunner
from sweeps.searching.study import (
    PARAMETERS,
    Domain,
    Range,
    SearchQuestion,
    answered,
    in_order,
    is_fixed,
    open_study,
    parse_domain,
    takes,
)
from sweeps.session import Session, check_kind, naming_faults
from tracking.access import private_files, write_for
from tracking.address import store_address
from tracking.arguments import check_writable
from tracking.store import Store

GOALS: dict[str, dict[str, list[str]]] = {
    "best": {"init.scheme": list(INIT_SCHEMES), "optim.lr": ["1e-4..1e-2"]},
    "refute": {
        "init.scheme": list(INIT_SCHEMES),
        "optim.lr": ["1e-4..1e-2"],
        "optim.weight_decay": ["0", "0.1"],
        "model.norm": ["pre", "post"],
        "model.tied": ["true", "false"],
        "corpus.subset": ["all", "0-0.25"],
    },
}
"""The knobs that each goal searches over by default, spelled as on the command line."""

METRICS = ("loss/val", "loss/probe", "loss/train")


@private_files()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code, as sweeps.launch.exit_code."""
    try:
        args, given = command_line(argv)
        write_for(args.runs_dir)
        return search(args, given, make_console())
    except (InputError, Fault, KeyboardInterrupt) as error:
        return exit_code(error)


def command_line(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Parse the command line. Return the options, and what was typed for each knob.

    Raises:
        InputError: an option is not accepted.
    """
    parser = sweep_parser(__doc__)
    parser.add_argument("goal", choices=GOALS)
    parser.add_argument("--trials", type=int, default=30, help="number of trials [30]")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        help="for best: the loss that is minimised [loss/val, of the held-out text]",
    )
    parser.add_argument("--claim", choices=REFUTABLE, help="for refute: the claim")
    parser.add_argument(
        "--finds",
        type=int,
        default=3,
        help="for refute: number of configurations to test on fresh seeds [3]",
    )
    parser.add_argument(
        "--seeds", type=int, default=9, help="for refute: number of fresh seeds for each [9]"
    )
    add_knobs(parser, "one value, several to choose from, or a range such as 1e-4..1e-2 [default]")
    args, given = parse(parser, argv)
    for option, goal in (("metric", "best"), ("claim", "refute")):
        if getattr(args, option) and args.goal != goal:
            raise InputError(f"--{option} is an option of {goal}, not of {args.goal}")
    if args.goal == "refute" and not args.claim:
        raise InputError(f"refute takes a --claim: {', '.join(REFUTABLE)}")
    least = {"trials": 1, "finds": 1, "seeds": 2}
    for option, low in least.items():
        if getattr(args, option) < low:
            raise InputError(f"--{option.replace('_', '-')} takes a whole number >= {low}")
    if args.goal == "refute" and args.seeds < (
        need := seeds_to_contradict(args.claim, ALPHA / args.finds)
    ):
        raise InputError(
            f"--seeds takes at least {need} to contradict {args.claim} with --finds "
            f"{args.finds}, not {args.seeds}"
        )
    return args, given


def search(args: argparse.Namespace, given: Mapping[str, Sequence[str]], console: Console) -> int:
    """Run the search and say what was found. Return the exit code.

    Args:
        args: the options.
        given: what was typed for each knob.
        console: where to print.
    """
    typed = {**GOALS[args.goal], **given}
    domains: dict[str, Domain] = {knob: parse_domain(knob, typed[knob]) for knob in typed}
    if args.goal == "best" and not is_fixed(domains.get("corpus.tokenizer", [TOKENIZER])):
        raise InputError(
            "best takes one --corpus.tokenizer, because losses over bytes and over words cannot be "
            "compared: give one of them"
        )
    if args.goal == "refute" and not is_fixed(domains.setdefault("init.seed", [0])):
        raise InputError(
            "refute takes one --init.seed, because it tests what it finds on fresh seeds: give one"
        )
    listed = {knob: domain for knob, domain in domains.items() if not isinstance(domain, Range)}
    (choices,), notes = with_corpus([listed])
    domains = {**PARAMETERS, **domains, **choices}
    for knob in given:
        if domains[knob] == [KNOBS[knob].default]:
            continue  # the default value counts as not given, as in every command
        schemes, optimizers = (choices.get(name, [""]) for name in ("init.scheme", "optim.name"))
        flats = [
            {"init.scheme": scheme, **({"optim.name": optimizer} if optimizer else {})}
            for scheme in schemes
            for optimizer in optimizers
        ]
        if not any(takes(knob, flat) for flat in flats):
            raise InputError(
                f"{knob} is a parameter of no scheme or optimiser in this search: leave it out"
            )
    largest = largest_trial(domains)
    checked([largest, *each_choice(domains)])
    question = SearchQuestion(
        goal=args.goal,
        of=args.claim or args.metric or METRICS[0],
        knobs={
            knob: str(domain) if isinstance(domain, Range) else [spelling(one) for one in domain]
            for knob, domain in domains.items()
        },
    )
    runs_dir, name = args.runs_dir.resolve(), args.name or args.claim or args.goal
    for note in notes:
        console.print(f"NOTE: {note}", style="bold", soft_wrap=True)
    store = Store(store_address(runs_dir))
    with naming_faults(store, runs_dir):
        sweep_run = find_sweep(store, name)
        check_kind(sweep_run, is_search=True)
        if sweep_run and read_interim_plan(store, sweep_run):
            raise InputError(f"sweep {name} is run with --until-decided: take another --name")
        check_writable(runs_dir, args.share)
        with Session(
            name, runs_dir, store, console, measures=not args.no_estimate, waits=args.wait
        ) as session:
            study = open_study(runs_dir, name, question, largest)
            runner = SearchRunner(session, study, question, domains, notes)
            return finish_search(runner, args, largest)


def finish_search(runner: SearchRunner, args: argparse.Namespace, largest: TrialConfig) -> int:
    """Run a search to its end, and say what it found. Return the exit code."""
    session, study, console = runner.session, runner.study, runner.session.console
    stopped = runner.run_trials(args.trials, largest)
    console.print(runner.table())
    if stopped:
        return session.stop(left=args.trials - len(answered(study)))
    finds = None
    failed = any(one.user_attrs.get("failed") for one in answered(study))
    if args.goal == "refute":
        contradicting = runner.contradicting(args.finds)
        fresh = runner.add_fresh_seeds(contradicting, args.seeds)
        if fresh and session.run(runner.plan, only=fresh):
            return session.stop()
        failed = failed or any(not session.ledger[key].is_done for key in fresh)
        finds = runner.judged_on_fresh_seeds(contradicting, args.seeds)
        trials = answered(study)
        measured = sum(one.state == TrialState.COMPLETE for one in trials)
        found = sentences(args.claim, finds, len(trials), measured)
        for line in found:
            console.print(line, soft_wrap=True)
        # The report's verdicts are on all trials of the search. What it was for stands above them.
        session.record(replace(runner.plan, notes=(*runner.plan.notes, *found)))
    session.keep(runner.write(finds))
    if not args.no_report:
        session.report()
    return session.end(failed)


def largest_trial(domains: Mapping[str, Domain]) -> TrialConfig:
    """Return a trial with the largest value of each knob, to measure how much trials need."""
    flat: dict[str, Scalar] = {}
    for knob in in_order(domains):
        domain = domains[knob]
        if isinstance(domain, Range):
            value: Scalar = domain.high
        else:
            value = domain[0] if isinstance(domain[0], str) else max(domain)
            if knob == "corpus.tokenizer":
                value = max(map(str, domain), key=VOCAB_SIZES.__getitem__)
        if takes(knob, flat):
            flat[knob] = value
    return trial_of(flat)


def each_choice(domains: Mapping[str, Domain]) -> Iterator[TrialConfig]:
    """Return a trial for each value, and for each end of a range, so that all can be checked."""
    for knob, domain in domains.items():
        ends = (domain.low, domain.high) if isinstance(domain, Range) else domain
        for value in ends:
            yield largest_trial({**domains, knob: [value]})


if __name__ == "__main__":
    sys.exit(main())
