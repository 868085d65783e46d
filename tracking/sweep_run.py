"""The sweep's own MLflow run: its plan, its report, and whether it is under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracking.store import Store


class SweepRun:
    """The sweep's own run while a driver works on the sweep."""

    def __init__(
        self,
        store: Store,
        experiment_id: str,
        plan: Mapping[str, Any],
        launched: float,
        interim: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the sweep's run, made if it is new.

        Args:
            store: where trials are recorded.
            experiment_id: the sweep's experiment.
            plan: what is about to run, as plan.json holds it.
            launched: seconds since the epoch; the newest sweep is found by it.
            interim: the interim analyses, for a sweep that has them.
        """
        name = plan["sweep"]
        self.store, self.experiment_id, client = store, experiment_id, store.client
        run = store.find_run("sweep", experiment_id)
        if run is None:
            # Claims are confirmatory only if they were fixed before the first trial.
            run = client.create_run(
                experiment_id,
                run_name=f"sweep {name}",
                tags={"claims_digest": plan["claims_digest"]},
            )
        self.run_id = run.info.run_id
        self.plans(plan)
        if interim:
            self.keep_interim_plan(interim)
        # The tag `kind` comes last: readers find a sweep by it, and expect its plan to be there.
        store.set_tags(self.run_id, sweep=name, launched=f"{launched:.3f}", **plan["tags"])
        store.set_tags(self.run_id, kind="sweep")
        client.update_run(self.run_id, status="RUNNING")

    def plans(self, plan: Mapping[str, Any]) -> None:
        """Record what is about to run, in place of an earlier plan."""
        self.store.client.log_dict(self.run_id, dict(plan), "plan.json")

    def keep_interim_plan(self, interim: Mapping[str, Any]) -> None:
        """Record the interim analyses, made and planned, in place of an earlier record."""
        self.store.client.log_dict(self.run_id, dict(interim), "looks.json")
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

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.store.client.set_terminated(self.run_id, status)
