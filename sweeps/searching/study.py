"""The Optuna study of a search: which values a knob may have, which are suggested, and the results.

The study is in RUNS_DIR/optuna.db. A driver that was killed leaves suggestions without a result,
and the next driver runs those first. A suggestion becomes an ordinary trial with a key. If any
sweep has run a trial with this key, its result is used.

This is one file because Optuna's study has one state, which all of it reads or changes.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.search import Searcher
from sqlalchemy.exc import SQLAlchemyError

from gptcore.config import (
    KNOBS,
    InputError,
    Scalar,
    TrialConfig,
    knob_type,
    parameters_of,
    parse_value,
)
from gptcore.init_schemes import INIT_SCHEMES
from gptcore.optimizers import OPTIMIZERS
from sweeps.execution.trainable import Recording
from sweeps.presets import trial_of
from tracking.access import share_database
from tracking.address import sqlite_address
from tracking.job import Job
from tracking.untrusted import is_plain

REDUCTION = 3
"""The reduction factor of ASHA: one in so many trials continues to the next rung, which is at so
many times the step."""

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, on a log scale if they span a factor of ten."""

    low: float
    high: float

    @property
    def log(self) -> bool:
        """Whether numbers are drawn on a log scale."""
        return self.low > 0 and self.high >= 10 * self.low

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Domain = Range | Sequence[Scalar]
"""The values that a knob may have: a range, or a list of values."""


@dataclass(frozen=True)
class SearchQuestion:
    """What a search asks. A study has one question."""

    goal: str  # best or refute
    of: str  # the metric that is made small, or the claim
    knobs: Mapping[str, str | Sequence[str]]  # a range or the values of each knob, spelled


PARAMETERS: dict[str, Domain] = {
    "init.std": Range(0.005, 0.1),
    "init.gain": Range(0.2, 5.0),
    "init.cut": Range(1.0, 3.0),
    "init.nu": Range(2.5, 30.0),
}
"""The parameters of init schemes."""


def is_fixed(domain: Domain) -> bool:
    """Whether there is only one value."""
    return not isinstance(domain, Range) and len(set(domain)) == 1


def parse_domain(knob: str, texts: Sequence[str]) -> Domain:
    """Parse what was typed for a knob: a range such as `0.001..0.1`, or values.

    Raises:
        InputError: this is neither.
    """
    low, dots, high = texts[0].partition("..")
    if len(texts) > 1 or not dots or knob_type(knob) not in (int, float):
        return [parse_value(knob, text) for text in texts]
    kind = knob_type(knob)
    found = Range(*(kind(parse_value(knob, end)) for end in (low, high)))
    if found.low >= found.high:
        raise InputError(f"{knob} takes a range from low to high, not {texts[0]!r}")
    return found


def takes(knob: str, flat: Mapping[str, Scalar]) -> bool:
    """Whether a trial has the knob. Some knobs are parameters of some schemes or optimisers.

    Args:
        knob: its dotted key.
        flat: the knobs of the trial so far.
    """
    for chooser, registry in (("init.scheme", INIT_SCHEMES), ("optim.name", OPTIMIZERS)):
        section = chooser.partition(".")[0]
        takers = [
            name
            for name, entry in registry.items()
            if knob in [f"{section}.{parameter}" for parameter in parameters_of(entry)]
        ]
        if takers:
            return flat.get(chooser, KNOBS[chooser].default) in takers
    return True


def in_order(knobs: Iterable[str]) -> list[str]:
    """Sort knobs, so that the scheme and the optimiser come before their parameters."""
    return sorted(knobs, key=lambda knob: knob not in ("init.scheme", "optim.name"))


def suggested(optuna_trial: optuna.Trial, domains: Mapping[str, Domain]) -> dict[str, Scalar]:
    """Return the knobs that the study suggests for a trial. Numbers are rounded to three digits."""
    flat: dict[str, Scalar] = {}
    for knob in in_order(domains):
        domain = domains[knob]
        if not takes(knob, flat):
            continue
        if not isinstance(domain, Range):
            chosen = (
                optuna_trial.suggest_categorical(knob, domain) if len(domain) > 1 else domain[0]
            )
            assert chosen is not None
            flat[knob] = chosen
        elif knob_type(knob) is int:
            flat[knob] = optuna_trial.suggest_int(
                knob, int(domain.low), int(domain.high), log=domain.log
            )
        else:
            value = optuna_trial.suggest_float(knob, domain.low, domain.high, log=domain.log)
            flat[knob] = min(max(float(f"{value:.3g}"), domain.low), domain.high)
    return flat


def open_study(
    runs_dir: Path, name: str, question: SearchQuestion, largest: TrialConfig
) -> optuna.Study:
    """Open the study of a search, or make it.

    The first rung is not before the first step, after the start, at which the fixed texts are read.

    Args:
        runs_dir: the runs folder.
        name: of the search.
        question: what the search asks.
        largest: a trial with the largest value of each knob.

    Raises:
        InputError: the study has another question, or its file is damaged.
    """
    file, wanted = runs_dir / "optuna.db", json.loads(json.dumps(asdict(question)))
    try:
        study = optuna.create_study(
            storage=sqlite_address(file),
            study_name=name,
            load_if_exists=True,
            # ASHA (Li et al. 2020, arXiv:1810.05934): Optuna uses the name of the synchronous form.
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(largest.probes.text_every, largest.train.steps // REDUCTION**2),
                reduction_factor=REDUCTION,
            ),
        )
        share_database(file)
        # With the same seed, a study that continues would draw what it drew before.
        study.sampler = optuna.samplers.TPESampler(
            seed=len(study.get_trials(deepcopy=False)), multivariate=True, group=True
        )
        asked = study.user_attrs.get("question")
        if asked is None:
            study.set_user_attr("question", wanted)
        _check_attributes(study, asked)
    except (SQLAlchemyError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file} cannot be read as an Optuna study: {why}") from error
    if asked is not None and asked != wanted:
        knobs, others = wanted["knobs"], asked.get("knobs", {})
        differ = [knob for knob in {**others, **knobs} if others.get(knob) != knobs.get(knob)]
        if asked.get("of") != wanted["of"]:
            differ = ["the claim or metric", *differ]
        raise InputError(
            f"search {name} was started with other choices ({', '.join(differ)}): give the same "
            "ones to continue it, or take another --name"
        )
    return study


def _check_attributes(study: optuna.Study, asked: Any) -> None:
    """Raise TypeError where a study holds something else than this project keeps in it."""
    again = study.user_attrs.get("tried_again", [])
    if not (asked is None or (isinstance(asked, dict) and isinstance(asked.get("knobs"), dict))):
        raise TypeError("its question is none of a search")
    trials = study.get_trials(deepcopy=False)
    known = [one.user_attrs.get("trial_key") for one in trials]
    if not (isinstance(again, list) and all(key in known for key in again)):
        raise TypeError("it tried trials again that it does not have")
    for one in trials:
        key, params = one.user_attrs.get("trial_key", ""), one.user_attrs.get("params", {})
        if not (isinstance(key, str) and is_plain(key) and isinstance(params, dict)):
            raise TypeError(f"its trial {one.number} is none of a search")


class Suggestions(Searcher):
    """Suggests trials to Ray Tune, and gets their results from it.

    Tune hides errors that are raised in here, so they are collected in `errors`.
    """

    def __init__(
        self,
        study: optuna.Study,
        trials: int,
        domains: Mapping[str, Domain],
        prepare: Callable[[TrialConfig], tuple[Job, bool]],
        answer: Callable[[str], float | None],
        prune: Callable[[str, str], None],
        recording: Recording,
        metric: str | None,
    ) -> None:
        """Find suggestions that an earlier driver left without a result.

        Args:
            study: the Optuna study.
            trials: how many trials the study is to have.
            domains: the values that each knob may have.
            prepare: makes a job of a suggested trial, and says whether it was run before.
            answer: gives the value of a finished trial by key, None where it has none.
            prune: closes the run of a trial, by key, with the reason why it is pruned.
            recording: where workers record trials.
            metric: workers report every value of it; None where it is not asked for.
        """
        super().__init__()
        self.study, self.trials, self.domains = study, trials, domains
        self.prepare, self.answer, self.prune = prepare, answer, prune
        self.recording, self.reported_metric = recording, metric
        self.jobs: list[Job] = []
        self.errors: list[Exception] = []
        self.running: dict[str, optuna.Trial] = {}  # trials that are running, by Tune's id
        self.keys: dict[str, str] = {}  # their keys, by Tune's id
        self.unanswered = [
            # A trial that Optuna lists cannot get a result; one with its id can.
            optuna.Trial(study, one._trial_id)
            for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ]
        self.prunes = Pruning(self)

    @property
    def left(self) -> int:
        """How many trials are left to run."""
        return self.trials - len(answered(self.study))

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial to run. A trial with a known result is answered here."""
        try:
            while optuna_trial := self._next():
                if job := self._job(optuna_trial):
                    self.running[trial_id], self.keys[trial_id] = optuna_trial, job.key
                    self.jobs.append(job)
                    return {
                        "recording": self.recording,
                        "metric": self.reported_metric,
                        "key": job.key,
                        "batch": [job],
                    }
        except Exception as error:
            self.errors.append(error)
        return Searcher.FINISHED

    def _next(self) -> optuna.Trial | None:
        """Return the next suggestion, None where the study has enough trials."""
        if self.unanswered:
            return self.unanswered.pop(0)
        if len(self.study.get_trials(deepcopy=False)) < self.trials:
            return self.study.ask()
        return None

    def _job(self, optuna_trial: optuna.Trial) -> Job | None:
        """Return the job of a suggestion, None where its result is known."""
        try:
            job, is_done = self.prepare(trial_of(suggested(optuna_trial, self.domains)))
        except InputError as error:
            self._tell(optuna_trial, TrialState.FAIL, str(error))
            return None
        key = job.key
        before = {one.user_attrs.get("trial_key"): one.state for one in answered(self.study)}
        optuna_trial.set_user_attr("trial_key", key)
        optuna_trial.set_user_attr("params", dict(job.params))
        if is_done:
            self._tell_value(optuna_trial, key)
        elif key in before:
            self._tell(optuna_trial, before[key], "suggested before, and did not finish")
        elif key in self.keys.values():
            self._tell(optuna_trial, TrialState.FAIL, "suggested while the same trial runs")
        else:
            return job
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Give the study the result of a trial, unless the user stopped it (Ctrl-C).

        A trial that was stopped has no result, and the next driver runs it.
        """
        optuna_trial, key = self.running.pop(trial_id), self.keys.pop(trial_id)
        status = (result or {}).get("status")
        try:
            if error or status == "failed":
                optuna_trial.set_user_attr("failed", True)
                self._tell(optuna_trial, TrialState.FAIL, "failed")
            elif status:
                self._tell_value(optuna_trial, key)
            elif trial_id in self.prunes.pruned:
                why = f"pruned at step {self.prunes.pruned[trial_id]}"
                self.prune(key, why)
                self._tell(optuna_trial, TrialState.PRUNED, why)
        except Exception as raised:
            self.errors.append(raised)

    def _tell_value(self, optuna_trial: optuna.Trial, key: str) -> None:
        """Give the study the value of a trial that was run."""
        value = self.answer(key)
        if value is not None and math.isfinite(value):
            self.study.tell(optuna_trial, value)
        else:  # it counts as worse than every trial with a value
            self._tell(optuna_trial, TrialState.PRUNED, "diverged, or has no such number")

    def _tell(self, optuna_trial: optuna.Trial, state: TrialState, why: str) -> None:
        """Tell the study that a trial ended without a value."""
        optuna_trial.set_user_attr("why", why)
        self.study.tell(optuna_trial, state=state)

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """Accept the metric and mode that Tune sets, which are not used."""
        return True

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """Save nothing: the study's file has everything."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out of what Tune saves: the study's file has it."""
        return {}


class Pruning(tune.Stopper):
    """Stops the trials that the study's pruner rejects."""

    def __init__(self, suggestions: Suggestions) -> None:
        self.suggestions = suggestions
        self.pruned: dict[str, int] = {}  # the last step, by Tune's id

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Report a value of a trial to the study. Return whether the trial is to be stopped."""
        optuna_trial = self.suggestions.running.get(trial_id)
        if optuna_trial is None or "value" not in result:
            return False
        try:
            frozen = self.suggestions.study.get_trials(deepcopy=False)[optuna_trial.number]
            # An earlier driver may have reported this step.
            is_reported = result["step"] in frozen.intermediate_values
            if is_reported or result["step"] == frozen.user_attrs["params"]["train.steps"]:
                return False
            optuna_trial.report(result["value"], result["step"])
            if optuna_trial.should_prune():
                self.pruned[trial_id] = result["step"]
        except Exception as error:
            self.suggestions.errors.append(error)
        return trial_id in self.pruned

    def stop_all(self) -> bool:
        """Never stop all trials."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out of what Tune saves: the study's file has it."""
        return {}


def answered(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials of the study that have ended."""
    return [one for one in study.get_trials(deepcopy=False) if one.state.is_finished()]
