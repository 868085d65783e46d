"""Run the trials of a search: a study suggests them, a session runs and records them."""

from __future__ import annotations

import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from analysis.claims import CLAIMS
from analysis.counterexamples import Counterexample, distance, judge_on_fresh_seeds, spelled
from analysis.runs import read_sweeps
from gptcore.config import InputError, Scalar, TrialConfig
from gptcore.corpus import Corpus
from gptcore.files import write_atomically
from sweeps.plan import Plan, checked, jobs_of
from sweeps.presets import trial_of
from sweeps.searching.study import (
    Domain,
    Range,
    SearchQuestion,
    Suggestions,
    answered,
    in_order,
    is_fixed,
)
from sweeps.session import Session
from tracking.job import Job
from tracking.recorder import close_run
from tracking.store import DONE, trial_status
from tracking.untrusted import check_no_link

matplotlib.use("Agg")  # no screen is needed to write a file

FIGURES: dict[str, Callable[[optuna.Study], Any]] = {
    "history": optuna.visualization.matplotlib.plot_optimization_history,
    "importances": optuna.visualization.matplotlib.plot_param_importances,
}
SHOWN = 10
"""How many trials the table at the end of a search has."""
FEW = 20
"""With fewer trials, importances are rough."""


class SearchRunner:
    """Runs the trials of a study as the trials of a sweep."""

    def __init__(
        self,
        session: Session,
        study: optuna.Study,
        question: SearchQuestion,
        domains: Mapping[str, Domain],
        notes: tuple[str, ...],
    ) -> None:
        """Read the trials that the study has suggested before.

        Args:
            session: the session of the sweep that has the search's name.
            study: suggests trials.
            question: what the search asks.
            domains: what each knob may be.
            notes: what the user should know of how the search came about.
        """
        self.session, self.study, self.question, self.domains = session, study, question, domains
        known = [
            TrialConfig.from_flat(one.user_attrs["params"])
            for one in study.get_trials(deepcopy=False)
            if "params" in one.user_attrs
        ]
        varied = tuple(knob for knob, domain in domains.items() if not is_fixed(domain))
        self.plan = Plan(session.name, question.goal, *checked(known), notes, searched=varied)

    def run_trials(self, trials: int, largest: TrialConfig) -> bool:
        """Run trials until the study has enough. Return whether the user stopped it.

        Args:
            trials: how many trials the study is to have in all.
            largest: a trial that needs as much as any that may be suggested.
        """
        left = trials - len(answered(self.study))
        self.session.console.print(
            f"search {self.session.name}: {trials} trials, {trials - max(0, left)} done"
        )
        names = self.domains.get("corpus.name", [largest.corpus.name])
        assert not isinstance(names, Range)
        training = {largest.train} if left > 0 else set()
        self.session.open(self.plan, training, {str(name) for name in names})
        if left <= 0:
            return False
        from sweeps.execution.runner import run_search

        metric = self.question.of if self.question.goal == "best" else None
        context = self.session.run_context()
        suggestions = Suggestions(
            self.study,
            trials,
            self.domains,
            self.prepared,
            self.answer,
            self.prune,
            context.recording,
            metric,
        )
        with self.session.estimated({f"trial {i}": largest for i in range(left)}) as batches:
            return run_search(suggestions, batches[0], context)

    def prepared(self, config: TrialConfig) -> tuple[Job, bool]:
        """Make a suggested trial a job of this sweep. Return it, and whether it was run before."""
        trials, corpora = checked([config])
        ((key, _),) = trials.items()
        if key not in self.plan.trials:
            self._add(trials, corpora)
            self.session.record(self.plan)
        run = self.session.store.find_run("trial", trial_key=key)
        (job,) = jobs_of(self.plan, [key])
        return job, trial_status(run) in DONE

    def prune(self, key: str, why: str) -> None:
        """Close the run of a trial that was given up."""
        if run := self.session.store.find_run("trial", trial_key=key):
            close_run(self.session.store, run, "pruned", why)

    def answer(self, key: str) -> float | None:
        """Return the value of a trial that was run, which the study minimises.

        It is the metric, or for a claim the distance of the trial from contradicting it. It is None
        where the trial diverged or has no such number.
        """
        run = self.session.store.find_run("trial", trial_key=key)
        if trial_status(run) != "finished":
            return None
        if self.question.goal == "best":
            assert run is not None
            return run.data.metrics.get(self.question.of)
        rule = CLAIMS[self.question.of].rule
        return min(
            (distance(rule(part), value) for _, part, value in self.numbers([key])), default=None
        )

    def numbers(self, keys: Sequence[str]) -> list[tuple[str, str, float]]:
        """Return (trial key, part, value) of finished trials, for parts that decide the claim."""
        session, claim = self.session, CLAIMS[self.question.of]
        try:
            sweep = read_sweeps(
                session.store, [session.name], None, session.runs_dir / "cache", keys
            )
        except InputError as error:  # none has finished, or none can be read
            session.console.print(str(error), soft_wrap=True)
            return []
        rows = claim.measure(sweep).select("trial_key", "part", "value").rows()
        return [(key, part, value) for key, part, value in rows if claim.rule(part).decides]

    def complete(self) -> list[FrozenTrial]:
        """Return the trials of the study that have a value."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def contradicting(self, most: int) -> list[FrozenTrial]:
        """Return trials that contradict the claim, and that are to be tested on fresh seeds.

        Trials that were chosen before, when the study had fewer trials, stay chosen.

        Args:
            most: how many trials to choose now, those that are farthest from the claim.
        """
        by_key = {one.user_attrs["trial_key"]: one for one in self.complete() if one.values[0] < 0}
        farthest = sorted(by_key, key=lambda key: by_key[key].values[0])[:most]
        keys = list(dict.fromkeys([*self.study.user_attrs.get("tried_again", []), *farthest]))
        self.study.set_user_attr("tried_again", keys)
        return [by_key[key] for key in keys]

    def fresh_seeds(self, one: FrozenTrial, seeds: int) -> list[TrialConfig]:
        """Return a trial's configuration with the seeds that follow the seed of the trial."""
        flat = dict(one.user_attrs["params"])
        if "corpus.data_seed" not in self.domains:
            del flat["corpus.data_seed"]
        return [trial_of({**flat, "init.seed": flat["init.seed"] + 1 + i}) for i in range(seeds)]

    def add_fresh_seeds(self, contradicting: Sequence[FrozenTrial], seeds: int) -> list[str]:
        """Add trials of some configurations on fresh seeds to the plan. Return their keys."""
        trials, corpora = checked(
            config for one in contradicting for config in self.fresh_seeds(one, seeds)
        )
        self._add(trials, corpora)
        return list(trials)

    def _add(self, trials: Mapping[str, TrialConfig], corpora: Mapping[str, Corpus]) -> None:
        """Add trials to the plan."""
        self.plan = replace(
            self.plan,
            trials={**self.plan.trials, **trials},
            corpora={**self.plan.corpora, **corpora},
        )

    def judged_on_fresh_seeds(
        self, contradicting: Sequence[FrozenTrial], seeds: int
    ) -> list[Counterexample]:
        """Judge each configuration on fresh seeds."""
        claim, found = CLAIMS[self.question.of], []
        for one in contradicting:
            trials, _ = checked(self.fresh_seeds(one, seeds))
            numbers = [
                (trials[key].init.seed, part, value)
                for key, part, value in self.numbers(list(trials))
            ]
            verdict, judged, parts = judge_on_fresh_seeds(claim, numbers, len(contradicting))
            found.append(
                Counterexample(
                    trial_key=one.user_attrs["trial_key"],
                    knobs=self.knobs_of(one),
                    distance=one.values[0],
                    seeds=judged,
                    verdict=verdict,
                    parts=parts,
                )
            )
        return found

    def knobs_of(self, one: FrozenTrial) -> dict[str, Scalar]:
        """Return the knobs that were suggested for a trial, with the values that it ran with."""
        params = one.user_attrs.get("params", {})
        suggested = [knob for knob in self.plan.searched if knob in one.params and params]
        return {knob: params[knob] for knob in in_order(suggested)}

    def table(self) -> Table:
        """Return a table of the best trials of the study, best first."""
        of = self.question.of
        value = of if self.question.goal == "best" else "distance from contradicting"
        counts = Counter(one.state.name.lower() for one in answered(self.study))
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = Table("trial", value, "suggested", title=f"{of}: the best of {said}")
        for one in sorted(self.complete(), key=lambda one: one.values[0])[:SHOWN]:
            knobs = spelled(self.knobs_of(one))
            table.add_row(one.user_attrs["trial_key"], f"{one.values[0]:.4f}", knobs)
        return table

    def write(self, finds: Sequence[Counterexample] | None) -> list[Path]:
        """Write search.json and Optuna's figures into the report's folder. Return the files.

        There are figures where at least two trials have different values.

        Args:
            finds: the configurations that were tested on fresh seeds, None for `best`.
        """
        folder = self.session.runs_dir / "reports" / self.session.name
        check_no_link(folder, self.session.runs_dir)
        complete = self.complete()
        importances: dict[str, float] = {}
        files = []
        if len({one.values[0] for one in complete}) > 1:
            if len(complete) < FEW:
                # Optuna would print a warning for each parameter.
                warnings.filterwarnings("ignore", category=UserWarning, module="optuna")
                self.session.console.print(
                    f"importances are rough, because there are only {len(complete)} trials",
                    soft_wrap=True,
                )
            importances = optuna.importance.get_param_importances(self.study)
            for name, draw in FIGURES.items():
                files.append(folder / f"{name}.png")
                save = functools.partial(draw(self.study).figure.savefig, bbox_inches="tight")
                write_atomically(files[-1], save)
        text = {
            **asdict(self.question),
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
            **({} if finds is None else {"finds": [find.to_json() for find in finds]}),
        }
        files.append(folder / "search.json")
        write_atomically(files[-1], lambda file: file.write_text(json.dumps(text, indent=1)))
        self.session.console.print(
            f"search: {', '.join(str(file) for file in files)}", soft_wrap=True
        )
        return files
