"""Search over configurations, one trial after the other, each suggested by those before (Optuna).

python sweeps/search.py best --metric loss/val
python sweeps/search.py best --init.scheme normal --init.std 0.005..0.1 --optim.lr 1e-4..1e-2
python sweeps/search.py refute --claim depth_gradient

`best` finds the init scheme, its parameters and the learning rate that train best, and gives up
trials that fall behind. `refute` looks for configurations in which a claim does not hold, and tries
those it finds on fresh seeds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# The checkout's root, not its sweeps/, is where imports start, also before an installed `sweeps`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from analysis.claims import CLAIMS, Part
from analysis.findings import format_estimate
from analysis.runs import read_looks, read_sweeps, trial_status
from analysis.verdicts import ALPHA, CONTRADICTED, INTERVALS, combined, decide, judge_part
from gptcore.config import KNOBS, TOKENIZER, VOCAB_SIZES, InputError, Scalar, TrialConfig, spelling
from gptcore.files import write_atomically
from gptcore.init_schemes import INIT_SCHEMES
from sweeps.command_line import add_knobs, parse, sweep_parser
from sweeps.launch import guarded
from sweeps.plan import Plan, checked, jobs_of, with_corpus
from sweeps.session import Session, sound_store
from sweeps.study import (
    PARAMETERS,
    Domain,
    Range,
    Suggestions,
    answered,
    in_order,
    open_study,
    parse_domain,
    takes,
)
from sweeps.tracking import DONE, close_run, find_run

matplotlib.use("Agg")  # no screen is needed to write a file

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
"""What may be suggested for each goal, as a command line gives it."""

FIGURES: dict[str, Callable[[optuna.Study], Any]] = {
    "history": optuna.visualization.matplotlib.plot_optimization_history,
    "importances": optuna.visualization.matplotlib.plot_param_importances,
}
METRICS = ("loss/val", "loss/probe", "loss/train")
REFUTABLE = [name for name, claim in CLAIMS.items() if not claim.over_subsets]
"""The claims that one trial alone has a number for."""
SHOWN = 10
"""Trials in the table that a search ends with."""
FEW = 20
"""Trials that say little of what mattered."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; -> its exit code, as sweeps.launch.guarded."""
    return guarded(lambda console: search(*command_line(argv), console))


def command_line(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """The options, and what was typed for each knob. Raises InputError."""
    parser = sweep_parser(__doc__)
    parser.add_argument("goal", choices=GOALS)
    parser.add_argument("--trials", type=int, default=30, help="how many to try (30)")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        help="of best: what is made small (loss/val, of the held-out text)",
    )
    parser.add_argument("--claim", choices=REFUTABLE, help="of refute: the claim")
    parser.add_argument("--finds", type=int, default=3, help="of refute: how many to confirm (3)")
    parser.add_argument("--seeds", type=int, default=9, help="of refute: fresh seeds of each (9)")
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
            f"--seeds {args.seeds} cannot contradict {args.claim} with --finds {args.finds}: "
            f"{need} can"
        )
    return args, given


def search(args: argparse.Namespace, given: Mapping[str, Sequence[str]], console: Console) -> int:
    """Try as many trials as wanted, say what was found; -> the exit code."""
    typed = {**GOALS[args.goal], **given}
    domains: dict[str, Domain] = {knob: parse_domain(knob, typed[knob]) for knob in typed}
    if args.goal == "best" and not is_fixed(domains.get("corpus.tokenizer", [TOKENIZER])):
        raise InputError(
            "best takes one --corpus.tokenizer: a loss over bytes is smaller than one over words"
        )
    if args.goal == "refute" and not is_fixed(domains.setdefault("init.seed", [0])):
        raise InputError("refute takes one --init.seed: what it finds is tried on fresh ones")
    listed = {knob: domain for knob, domain in domains.items() if not isinstance(domain, Range)}
    (choices,), notes = with_corpus([listed])
    domains = {**PARAMETERS, **domains, **choices}
    for knob in given:
        if domains[knob] == [KNOBS[knob].default]:
            continue  # as if it were not given, as everywhere
        schemes, optimizers = (choices.get(name, [""]) for name in ("init.scheme", "optim.name"))
        flats = [
            {"init.scheme": scheme, **({"optim.name": optimizer} if optimizer else {})}
            for scheme in schemes
            for optimizer in optimizers
        ]
        if not any(takes(knob, flat) for flat in flats):
            raise InputError(f"{knob} is taken by nothing that may be suggested: leave it out")
    largest = largest_trial(domains)
    checked([largest, *each_choice(domains)])
    question = {
        "goal": args.goal,
        "of": args.claim or args.metric or METRICS[0],
        "knobs": {
            knob: str(domain) if isinstance(domain, Range) else [spelling(one) for one in domain]
            for knob, domain in domains.items()
        },
    }
    runs_dir, name = args.runs_dir.resolve(), args.name or args.claim or args.goal
    for note in notes:
        console.print(f"NOTE: {note}", style="bold", soft_wrap=True)
    with sound_store(runs_dir) as uri:
        if read_looks(uri, name):
            raise InputError(f"sweep {name} gets seeds until it is decided: take another --name")
        with Session(name, runs_dir, console, measures=not args.no_estimate) as session:
            study = open_study(runs_dir, name, question, largest)
            tried = Tried(session, study, question, domains, notes)
            return try_and_tell(tried, args, largest)


def try_and_tell(tried: Tried, args: argparse.Namespace, largest: TrialConfig) -> int:
    """Go on with a search to its end, and say what it found; -> the exit code."""
    session, study, console = tried.session, tried.study, tried.session.console
    stopped = tried.go_on(args.trials, largest)
    console.print(tried.table())
    if stopped:
        left = args.trials - len(answered(study))
        console.print(f"stopped with {left} trials to go: the same command goes on")
        session.ended = "KILLED"
        return 130
    found: dict[str, Any] = {}
    failed = any(one.user_attrs.get("failed") for one in answered(study))
    if args.goal == "refute":
        contrary = tried.contrary(args.finds)
        fresh = tried.on_fresh_seeds(contrary, args.seeds)
        if fresh and session.run(tried.plan, only=fresh):
            return session.stop()
        failed = failed or any(not session.ledger[key].is_done for key in fresh)
        found["finds"] = tried.confirmed(contrary, args.seeds)
        trials = answered(study)
        measured = sum(one.state == TrialState.COMPLETE for one in trials)
        for line in sentences(args.claim, found["finds"], len(trials), measured):
            console.print(line, soft_wrap=True)
    session.keep(tried.write(found))
    if not args.no_report:
        session.report()
    session.ended = "FAILED" if failed else "FINISHED"
    return 1 if failed else 0


def is_fixed(domain: Domain) -> bool:
    """Whether there is nothing to choose."""
    return not isinstance(domain, Range) and len(set(domain)) == 1


def largest_trial(domains: Mapping[str, Domain]) -> TrialConfig:
    """A trial with the largest number of each knob, to measure what trials take at most."""
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
    return TrialConfig.from_flat(flat)


def each_choice(domains: Mapping[str, Domain]) -> Iterator[TrialConfig]:
    """A trial for every value or end of a range that may be suggested, so that all are checked."""
    for knob, domain in domains.items():
        ends = (domain.low, domain.high) if isinstance(domain, Range) else domain
        for value in ends:
            yield largest_trial({**domains, knob: [value]})


class Tried:
    """The trials of a study, as those of a sweep."""

    def __init__(
        self,
        session: Session,
        study: optuna.Study,
        question: Mapping[str, Any],
        domains: Mapping[str, Domain],
        notes: tuple[str, ...],
    ) -> None:
        self.session, self.study, self.question, self.domains = session, study, question, domains
        known = [
            TrialConfig.from_flat(one.user_attrs["params"])
            for one in study.get_trials(deepcopy=False)
            if "params" in one.user_attrs
        ]
        varied = tuple(knob for knob, domain in domains.items() if not is_fixed(domain))
        self.trials, self.corpora = checked(known)
        self.plan = Plan(
            session.name, question["goal"], self.trials, self.corpora, notes, searched=varied
        )

    def go_on(self, trials: int, largest: TrialConfig) -> bool:
        """Try more, until there are so many trials; -> whether stopped."""
        left = trials - len(answered(self.study))
        self.session.console.print(
            f"search {self.session.name}: {trials} trials, {trials - max(0, left)} done"
        )
        names = self.domains.get("corpus.name", [largest.corpus.name])
        assert not isinstance(names, Range)
        devices = {largest.train.device} if left > 0 else set()
        self.session.open(self.plan, devices, {str(name) for name in names})
        if left <= 0:
            return False
        from sweeps.ray_runner import run_on_ray

        metric = self.question["of"] if self.question["goal"] == "best" else None
        store, runs_dir = self.session.store, self.session.runs_dir
        common = {"store": store, "runs_dir": str(runs_dir), "metric": metric}
        suggestions = Suggestions(
            self.study, trials, self.domains, self.prepared, self.answer, self.prune, common
        )
        with self.session.estimated({f"trial {i}": largest for i in range(left)}) as batches:
            return run_on_ray(
                suggestions.jobs,
                batches[:1],
                store,
                self.session.texts,
                runs_dir,
                self.session.console,
                suggestions,
            )

    def prepared(self, config: TrialConfig) -> tuple[dict[str, Any], bool]:
        """A suggested trial as a job of this sweep; -> also whether it has been run already."""
        trials, corpora = checked([config])
        ((key, _),) = trials.items()
        if key not in self.trials:
            self.trials |= trials
            self.corpora |= corpora
            self.session.record(self.plan)
        run = find_run(self.session.client, None, "trial", trial_key=key)
        (job,) = jobs_of(self.plan, [key])
        return job, trial_status(run) in DONE

    def prune(self, key: str, why: str) -> None:
        """Close the run of a trial that was given up."""
        if run := find_run(self.session.client, None, "trial", trial_key=key):
            close_run(self.session.client, run, "pruned", why)

    def answer(self, key: str) -> float | None:
        """What a trial that has been run is worth, the less the better; None where it diverged or
        has no such number."""
        run = find_run(self.session.client, None, "trial", trial_key=key)
        if trial_status(run) != "finished":
            return None
        if self.question["goal"] == "best":
            assert run is not None
            return run.data.metrics.get(self.question["of"])
        rule = CLAIMS[self.question["of"]].rule
        return min(
            (distance(rule(part), value) for _, part, value in self.numbers([key])), default=None
        )

    def numbers(self, keys: Sequence[str]) -> list[tuple[str, str, float]]:
        """(trial key, part, value) of the numbers that decide the claim, of finished trials."""
        session, claim = self.session, CLAIMS[self.question["of"]]
        try:
            sweep = read_sweeps(session.uri, [session.name], None, session.runs_dir / "cache", keys)
        except InputError as error:  # none has finished, or none can be read
            session.console.print(str(error), soft_wrap=True)
            return []
        rows = claim.measure(sweep).select("trial_key", "part", "value").rows()
        return [(key, part, value) for key, part, value in rows if claim.rule(part).decides]

    def complete(self) -> list[FrozenTrial]:
        """The trials of the study that have a value."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def contrary(self, most: int) -> list[FrozenTrial]:
        """The trials whose numbers lie on the other side of what the claim says, farthest first;
        and all that were tried again before, when the study had fewer trials."""
        by_key = {one.user_attrs["trial_key"]: one for one in self.complete() if one.values[0] < 0}
        farthest = sorted(by_key, key=lambda key: by_key[key].values[0])[:most]
        keys = list(dict.fromkeys([*self.study.user_attrs.get("tried_again", []), *farthest]))
        self.study.set_user_attr("tried_again", keys)
        return [by_key[key] for key in keys]

    def fresh_seeds(self, one: FrozenTrial, seeds: int) -> list[TrialConfig]:
        """The trial's configuration with the seeds that follow its own."""
        config = TrialConfig.from_flat(one.user_attrs["params"])
        return [
            replace(config, init=replace(config.init, seed=config.init.seed + 1 + i))
            for i in range(seeds)
        ]

    def on_fresh_seeds(self, contrary: Sequence[FrozenTrial], seeds: int) -> list[str]:
        """Add the trials of some configurations on fresh seeds to the plan; -> their keys."""
        trials, corpora = checked(
            config for one in contrary for config in self.fresh_seeds(one, seeds)
        )
        self.trials |= trials
        self.corpora |= corpora
        return list(trials)

    def confirmed(self, contrary: Sequence[FrozenTrial], seeds: int) -> list[dict[str, Any]]:
        """Of each configuration its verdict on fresh seeds: for what it showed on another one it
        was chosen. Corrected for the number of configurations (Bonferroni)."""
        claim, found = CLAIMS[self.question["of"]], []
        for one in contrary:
            trials, _ = checked(self.fresh_seeds(one, seeds))
            by_part = defaultdict(list)
            for key, part, value in self.numbers(list(trials)):
                by_part[part].append((trials[key].init.seed, "", value))
            parts = {
                part: judge_part(claim.rule(part), runs, False, ALPHA / len(contrary))
                for part, runs in by_part.items()
            }
            verdict = combined([part["verdict"] for part in parts.values() if part])
            found.append(
                {
                    "trial_key": one.user_attrs["trial_key"],
                    "knobs": self.knobs_of(one),
                    "distance": one.values[0],
                    "seeds": len({seed for runs in by_part.values() for seed, *_ in runs}),
                    "verdict": verdict,
                    "parts": parts,
                }
            )
        return found

    def knobs_of(self, one: FrozenTrial) -> dict[str, Scalar]:
        """What was suggested for a trial, as it was run."""
        params = one.user_attrs.get("params", {})
        return {knob: params[knob] for knob in self.plan.searched if knob in one.params and params}

    def table(self) -> Table:
        """The best trials of the study, best first."""
        of = self.question["of"]
        value = of if self.question["goal"] == "best" else "beyond contradiction"
        counts = Counter(one.state.name.lower() for one in answered(self.study))
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = Table("trial", value, "suggested", title=f"{of}: the best of {said}")
        for one in sorted(self.complete(), key=lambda one: one.values[0])[:SHOWN]:
            knobs = spelled(self.knobs_of(one))
            table.add_row(one.user_attrs["trial_key"], f"{one.values[0]:.4f}", knobs)
        return table

    def write(self, found: Mapping[str, Any]) -> list[Path]:
        """search.json with every trial, and Optuna's figures where there are trials enough, into
        the report's folder; -> the files."""
        folder = self.session.runs_dir / "reports" / self.session.name
        complete = self.complete()
        importances: dict[str, float] = {}
        files = []
        if len({one.values[0] for one in complete}) > 1:
            if len(complete) < FEW:
                # Optuna would warn of each parameter in turn.
                warnings.filterwarnings("ignore", category=UserWarning, module="optuna")
                self.session.console.print(
                    f"importances rest on {len(complete)} trials: they are rough", soft_wrap=True
                )
            importances = optuna.importance.get_param_importances(self.study)
            for name, draw in FIGURES.items():
                files.append(folder / f"{name}.png")
                save = functools.partial(draw(self.study).figure.savefig, bbox_inches="tight")
                write_atomically(files[-1], save)
        text = {
            **self.question,
            "trials": [
                {
                    "number": one.number,
                    "trial_key": one.user_attrs.get("trial_key"),
                    "state": one.state.name.lower(),
                    "value": one.values[0] if one.state == TrialState.COMPLETE else None,
                    "why": one.user_attrs.get("why", ""),
                    "knobs": self.knobs_of(one),
                }
                for one in answered(self.study)
            ],
            "importances": importances,
            **found,
        }
        files.append(folder / "search.json")
        write_atomically(files[-1], lambda file: file.write_text(json.dumps(text, indent=1)))
        self.session.console.print(
            f"search: {', '.join(str(file) for file in files)}", soft_wrap=True
        )
        return files


def distance(rule: Part, value: float) -> float:
    """How far a run's number lies from where it would contradict the claim; beyond, below 0."""
    if rule.low is not None and rule.high is not None:
        return min(value - rule.low, rule.high - value)
    bound, sign = (rule.low, 1) if rule.low is not None else (rule.high, -1)
    assert bound is not None
    return sign * (value - (bound if rule.against is None else rule.against))


def spelled(knobs: Mapping[str, Scalar]) -> str:
    """`init.scheme normal, init.std 0.02`, what decides about others first."""
    return ", ".join(f"{knob} {spelling(knobs[knob])}" for knob in in_order(knobs))


def seeds_to_contradict(claim: str, alpha: float) -> int:
    """The fewest seeds that can contradict a claim at the level alpha, where all agree on it."""

    def can(rule: Part, n: int) -> bool:
        found = INTERVALS[rule.centre]([0.0] * n, 1 - alpha)
        # Of a mean or median it does not matter what is known without doubt.
        known = found["low"] is not None
        return decide(rule, found) == CONTRADICTED if rule.centre == "share" else known

    rules = [rule for rule in CLAIMS[claim].parts.values() if rule.decides]
    return next(n for n in itertools.count(2) if all(can(rule, n) for rule in rules))


def sentences(
    claim: str, finds: Sequence[Mapping[str, Any]], tried: int, measured: int
) -> list[str]:
    """Say what a search for counterexamples came to; `measured` trials had the claim's number."""
    if not measured:
        return [f"{claim}: not measured, for none of {tried} trials has the number for it"]
    shown = [
        f"  {find['verdict']} on {find['seeds']} fresh seeds: "
        + spelled(find["knobs"])
        + "".join(
            f"; {part} {format_estimate(one['estimate'])}"
            for part, one in find["parts"].items()
            if one
        )
        for find in finds
    ]
    counterexamples = sum(find["verdict"] == CONTRADICTED for find in finds)
    if counterexamples:
        return [f"{claim}: {counterexamples} counterexamples found in {tried} trials", *shown]
    looked = f", {len(finds)} looked contrary on one seed" if finds else ""
    return [f"{claim}: no counterexample found in {tried} trials{looked}", *shown]


if __name__ == "__main__":
    sys.exit(main())
