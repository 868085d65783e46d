"""A search as Optuna sees it: what may be suggested, what was found, in a file that outlives it.

The study lives in RUNS_DIR/optuna.db. A driver that was killed leaves suggestions that nobody has
answered; the next one takes those up first. A suggestion becomes an ordinary trial with its key, so
one that any sweep has run is answered from its run.
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
from optuna.trial import FrozenTrial, Trial, TrialState
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
from tracking.recorder import Job

REDUCTION = 3
"""Of the trials that reach a rung of ASHA one in so many goes on to the next, which is as many
times as far."""

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, drawn on a log scale where they span a factor of ten."""

    low: float
    high: float

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Domain = Range | Sequence[Scalar]
"""What a knob may be: a range, or one of some values."""


@dataclass(frozen=True)
class SearchQuestion:
    """What a search asks; a study answers one question alone."""

    goal: str  # best or refute
    of: str  # the metric that is made small, or the claim
    knobs: Mapping[str, str | Sequence[str]]  # a range or the values of each knob, spelled


PARAMETERS: dict[str, Domain] = {
    "init.std": Range(0.005, 0.1),
    "init.gain": Range(0.2, 5.0),
    "init.cut": Range(1.0, 3.0),
    "init.nu": Range(2.5, 30.0),
}
"""Of the init schemes that take them."""


def is_fixed(domain: Domain) -> bool:
    """Whether there is nothing to choose."""
    return not isinstance(domain, Range) and len(set(domain)) == 1


def parse_domain(knob: str, texts: Sequence[str]) -> Domain:
    """What was typed for a knob: `0.001..0.1` is a range, else values. Raises InputError."""
    low, dots, high = texts[0].partition("..")
    if len(texts) > 1 or not dots or knob_type(knob) not in (int, float):
        return [parse_value(knob, text) for text in texts]
    kind = knob_type(knob)
    found = Range(*(kind(parse_value(knob, end)) for end in (low, high)))
    if found.low >= found.high:
        raise InputError(f"{knob} takes a range from low to high, not {texts[0]!r}")
    return found


def takes(knob: str, flat: Mapping[str, Scalar]) -> bool:
    """Whether a trial that is so far `flat` takes the knob: not every scheme or optimiser does."""
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
    """The knobs, those first that decide which others a trial takes."""
    return sorted(knobs, key=lambda knob: knob not in ("init.scheme", "optim.name"))


def suggested(trial: Trial, domains: Mapping[str, Domain]) -> dict[str, Scalar]:
    """The knobs that the study suggests for a trial; numbers have three digits, as people write."""
    flat: dict[str, Scalar] = {}
    for knob in in_order(domains):
        domain = domains[knob]
        if not takes(knob, flat):
            continue
        if not isinstance(domain, Range):
            chosen = trial.suggest_categorical(knob, domain) if len(domain) > 1 else domain[0]
            assert chosen is not None
            flat[knob] = chosen
        elif knob_type(knob) is int:
            flat[knob] = trial.suggest_int(knob, int(domain.low), int(domain.high), log=domain.log)
        else:
            value = trial.suggest_float(knob, domain.low, domain.high, log=domain.log)
            flat[knob] = min(max(float(f"{value:.3g}"), domain.low), domain.high)
    return flat


def open_study(
    runs_dir: Path, name: str, question: SearchQuestion, largest: TrialConfig
) -> optuna.Study:
    """The study of this name, which is minimised, made if it is new.

    The first rung is where the fixed texts are read for the first time after the start, or later.
    Raises InputError where it asks another question, or its file is damaged.
    """
    file, wanted = runs_dir / "optuna.db", json.loads(json.dumps(asdict(question)))
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file}",
            study_name=name,
            load_if_exists=True,
            # ASHA (Li et al. 2020, arXiv:1810.05934), which Optuna calls by its synchronous name.
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(largest.probes.text_every, largest.train.steps // REDUCTION**2),
                reduction_factor=REDUCTION,
            ),
        )
        # Another seed for each start, or a study that goes on would draw what it drew before.
        study.sampler = optuna.samplers.TPESampler(
            seed=len(study.get_trials(deepcopy=False)), multivariate=True, group=True
        )
        asked = study.user_attrs.get("question")
        if asked is None:
            study.set_user_attr("question", wanted)
    except SQLAlchemyError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{file} cannot be read as an Optuna study: {why}") from error
    if asked is not None and asked != wanted:
        differs = [key for key in wanted if wanted[key] != asked.get(key)]
        raise InputError(
            f"search {name} asks something else already ({', '.join(differs)} differ): "
            "take another --name"
        )
    return study


class Suggestions(Searcher):
    """What Tune asks for the next trial, and tells how one went.

    `prepare` makes a job of a suggested trial, and says whether it has been run already; `answer`
    gives the value of a finished trial by its key, None where it has none; `prune` is told the key
    of a trial that is given up, and why. Tune keeps to itself what is raised in here, so it is put
    into `errors` for whoever runs it.
    """

    def __init__(
        self,
        study: optuna.Study,
        trials: int,
        domains: Mapping[str, Domain],
        prepare: Callable[[TrialConfig], tuple[Job, bool]],
        answer: Callable[[str], float | None],
        prune: Callable[[str, str], None],
        common: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.study, self.trials, self.domains = study, trials, domains
        self.prepare, self.answer, self.prune = prepare, answer, prune
        self.common = common
        self.jobs: list[Job] = []
        self.errors: list[Exception] = []
        self.asked: dict[str, Trial] = {}  # that run, by Tune's id
        self.keys: dict[str, str] = {}  # of these, by Tune's id
        self.unanswered = [
            Trial(study, one._trial_id)  # Optuna gives one that can be answered only as it suggests
            for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ]
        self.prunes = Pruning(self)

    @property
    def left(self) -> int:
        """How many trials the study may still have answered."""
        return self.trials - len(answered(self.study))

    def suggest(self, trial_id: str) -> Any:
        """The next job that has to be run: what is known already is answered at once."""
        try:
            while trial := self._next():
                if job := self._job(trial):
                    self.asked[trial_id], self.keys[trial_id] = trial, job.key
                    self.jobs.append(job)
                    return {**self.common, "key": job.key, "batch": [job]}
        except Exception as error:
            self.errors.append(error)
        return Searcher.FINISHED

    def _next(self) -> Trial | None:
        if self.unanswered:
            return self.unanswered.pop(0)
        if len(self.study.get_trials(deepcopy=False)) < self.trials:
            return self.study.ask()
        return None

    def _job(self, trial: Trial) -> Job | None:
        """The job of a suggestion; None where it could be answered at once."""
        try:
            job, is_done = self.prepare(TrialConfig.from_flat(suggested(trial, self.domains)))
        except InputError as error:
            self._tell(trial, TrialState.FAIL, str(error))
            return None
        key = job.key
        before = {one.user_attrs.get("trial_key"): one.state for one in answered(self.study)}
        trial.set_user_attr("trial_key", key)
        trial.set_user_attr("params", dict(job.params))
        if is_done:
            self._tell_value(trial, key)
        elif key in before:
            self._tell(trial, before[key], "suggested before, and did not finish then either")
        elif key in self.keys.values():
            self._tell(trial, TrialState.FAIL, "suggested twice at a time")
        else:
            return job
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial, key = self.asked.pop(trial_id), self.keys.pop(trial_id)
        status = (result or {}).get("status")
        try:
            if error or status == "failed":
                trial.set_user_attr("failed", True)
                self._tell(trial, TrialState.FAIL, "failed")
            elif status:
                self._tell_value(trial, key)
            elif trial_id in self.prunes.pruned:
                why = f"pruned at step {self.prunes.pruned[trial_id]}"
                self.prune(key, why)
                self._tell(trial, TrialState.PRUNED, why)
            # Else Ctrl-C: it is not answered, and the next driver takes it up.
        except Exception as raised:
            self.errors.append(raised)

    def _tell_value(self, trial: Trial, key: str) -> None:
        value = self.answer(key)
        if value is not None and math.isfinite(value):
            self.study.tell(trial, value)
        else:  # as bad as can be, and no value to learn from
            self._tell(trial, TrialState.PRUNED, "diverged, or has no such number")

    def _tell(self, trial: Trial, state: TrialState, why: str) -> None:
        trial.set_user_attr("why", why)
        self.study.tell(trial, state=state)

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """The study's own file has it all."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Pruning(tune.Stopper):
    """Ends the trials that the study's pruner gives up."""

    def __init__(self, suggestions: Suggestions) -> None:
        self.suggestions = suggestions
        self.pruned: dict[str, int] = {}  # the step, by Tune's id

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        trial = self.suggestions.asked.get(trial_id)
        if trial is None or "value" not in result:
            return False
        try:
            frozen = self.suggestions.study.get_trials(deepcopy=False)[trial.number]
            told = result["step"] in frozen.intermediate_values  # by the driver before this one
            if told or result["step"] == frozen.user_attrs["params"]["train.steps"]:
                return False
            trial.report(result["value"], result["step"])
            if trial.should_prune():
                self.pruned[trial_id] = result["step"]
        except Exception as error:
            self.suggestions.errors.append(error)
        return trial_id in self.pruned

    def stop_all(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {}


def answered(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of the study that have ended."""
    return [one for one in study.get_trials(deepcopy=False) if one.state.is_finished()]
