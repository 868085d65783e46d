"""The sweep's own MLflow run: its plan, its report, and whether it is under way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mlflow.entities import Run

from gptcore.config import KEY_LENGTH, KNOBS, Scalar, check_value
from gptcore.files import Json, JsonObject
from tracking.places import damaged_file
from tracking.store import MADE_BY, Store
from tracking.untrusted import one_line, printable

PLAN_FILE = "plan.json"

SweepEnd = Literal["FINISHED", "FAILED", "KILLED"]
"""How a driver leaves the sweep's run."""

SEARCH_GOALS = ("best", "refute")
"""What a plan has in place of a preset where a search chooses its trials."""


@dataclass(frozen=True, kw_only=True)
class RecordedTrial:
    """One trial of a plan."""

    params: Mapping[str, Scalar]  # every knob that there was when it was planned
    corpus_digest: str
    stamp: str = ""
    """The digest of the claims when the trial was planned. It is empty if a result was seen before:
    the result of the trial itself, or a report of the sweep."""


@dataclass(frozen=True, kw_only=True)
class RecordedPlan:
    """What a sweep runs, as plan.json keeps it: the fields are its keys, in their order."""

    sweep: str
    preset: str  # or one of SEARCH_GOALS
    command: str  # that made the sweep
    notes: tuple[str, ...]  # what the user has to know
    tags: Mapping[str, str]  # of every run of the sweep
    trials: Mapping[str, RecordedTrial]  # by trial key
    claims: tuple[str, ...] = ()  # the claims that the sweep asks; empty for all claims

    @classmethod
    def from_json(cls, stored: JsonObject) -> RecordedPlan:
        """Read what to_json gave, perhaps long ago: what readers can do without may be missing.

        Texts are made fit to be shown.

        Raises:
            KeyError: it lacks what readers need.
            TypeError: a part of it has another type.
            ValueError: a trial has a knob or a value that no trial has.
        """
        trials = {
            key: RecordedTrial(
                params={
                    knob: _value(knob, value)
                    for knob, value in _object(_object(trial)["params"]).items()
                },
                corpus_digest=_text(_object(trial).get("corpus_digest", "")),
                stamp=_text(_object(trial).get("stamp", "")),
            )
            for key, trial in _object(stored["trials"]).items()
        }
        return cls(
            sweep=_text(stored.get("sweep", "")),
            preset=_text(stored.get("preset", "")),
            command=_text(stored["command"]),
            notes=tuple(map(_text, _list(stored["notes"]))),
            tags={name: _text(value) for name, value in _object(stored.get("tags", {})).items()},
            trials=trials,
            claims=tuple(map(_text, _list(stored.get("claims", [])))),
        )

    def to_json(self) -> JsonObject:
        """Return the contents of plan.json."""
        trials = {key: dict(vars(trial)) for key, trial in self.trials.items()}
        return {**vars(self), "notes": list(self.notes), "claims": list(self.claims),
                "trials": trials}  # fmt: skip


def read_plan(store: Store, sweep_run: Run) -> RecordedPlan:
    """Read the latest plan of a sweep from its own run. Raises what Store.read_json raises."""
    stored = store.read_json(sweep_run, PLAN_FILE)
    try:
        plan = RecordedPlan.from_json(stored)
        for key in plan.trials:
            if not re.fullmatch(f"[0-9a-f]{{{KEY_LENGTH}}}", key):
                raise ValueError(f"{one_line(key[:100])} is no trial key")
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_file(Path(PLAN_FILE), error) from error
    # The name was checked on the run. Files are named after it, and the plan may say another one.
    return replace(plan, sweep=sweep_run.data.tags["sweep"])


def _object(value: Json) -> JsonObject:
    if not isinstance(value, dict):
        raise TypeError(f"{one_line(str(value)[:100])} is no object")
    return value


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError(f"{one_line(str(value)[:100])} is no list")
    return value


def _value(knob: str, value: Json) -> Scalar:
    if knob not in KNOBS:
        raise ValueError(f"there is no knob {one_line(knob[:100])}")
    if isinstance(value, str) and printable(value).splitlines() != [value]:
        raise ValueError(f"{knob} has a text that is not one line to be shown")
    return check_value(knob, value)


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{one_line(str(value)[:100])} is no text")
    return one_line(value)


class SweepRun:
    """The sweep's own run while a driver works on the sweep."""

    def __init__(
        self,
        store: Store,
        experiment_id: str,
        plan: RecordedPlan,
        launched: float,
        interim: JsonObject | None = None,
        run_id: str | None = None,
    ) -> None:
        """Open the sweep's run, made if it is new.

        Args:
            store: where trials are recorded.
            experiment_id: the sweep's experiment.
            plan: what is about to run.
            launched: seconds since the epoch; the newest sweep is found by it.
            interim: the contents of looks.json, for a sweep with interim analyses.
            run_id: of the run that the sweep's lease is on; None where there is no lease.
        """
        self.store, self.experiment_id, client = store, experiment_id, store.client
        run = (
            client.get_run(run_id)
            if run_id
            else store.find_run("sweep", experiment_id, sweep=plan.sweep)
            or client.create_run(experiment_id, run_name=f"sweep {plan.sweep}", tags=MADE_BY)
        )
        self.run_id = run.info.run_id
        self.plans(plan)
        if interim:
            self.keep_interim_plan(interim)
        # The tag `kind` comes last: readers find a sweep by it, and expect its plan to be there.
        store.set_tags(
            self.run_id,
            sweep=plan.sweep,
            preset=plan.preset,
            launched=f"{launched:.3f}",
            **plan.tags,
        )
        store.set_tags(self.run_id, kind="sweep")
        client.update_run(self.run_id, status="RUNNING")

    def plans(self, plan: RecordedPlan) -> None:
        """Record what is about to run, in place of an earlier plan."""
        self.store.client.log_dict(self.run_id, plan.to_json(), PLAN_FILE)

    def keep_interim_plan(self, interim: JsonObject) -> None:
        """Record the interim analyses, made and planned, in place of an earlier record."""
        self.store.client.log_dict(self.run_id, interim, "looks.json")
        self.store.set_tags(self.run_id, until_decided=str(len(interim["seeds"])))

    def keep(self, files: Sequence[Path], **tags: str) -> None:
        """Copy files into the run's folder `report`, then set tags."""
        for file in files:
            self.store.client.log_artifact(self.run_id, str(file), "report")
        if tags:
            self.store.set_tags(self.run_id, **tags)

    def report_of(self) -> str | None:
        """Return the tag that says what the latest report was made of; None without a report."""
        tag: str | None = self.store.client.get_run(self.run_id).data.tags.get("report_of")
        return tag

    def end(self, status: SweepEnd) -> None:
        """End the run."""
        self.store.client.set_terminated(self.run_id, status)
