"""The sweep's own MLflow run: its plan, its report, and whether it is under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracking.store import Store


class SweepRun:
    """The sweep's own run: its plan, its report, and whether it is under way."""

    def __init__(
        self,
        store: Store,
        experiment_id: str,
        plan: Mapping[str, Any],
        launched: float,
        looks: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the sweep's run for what is about to run.

        `launched` is a time in seconds since the epoch, by which the newest sweep is found.
        `looks`: as `keep_looks` takes them, where the sweep is looked at while it grows.
        """
        name = plan["sweep"]
        self.store, self.experiment_id, client = store, experiment_id, store.client
        run = store.find_run("sweep", experiment_id)
        if run is None:
            # What is claimed counts as said beforehand if it was said before the first trial.
            run = client.create_run(
                experiment_id,
                run_name=f"sweep {name}",
                tags={"claims_digest": plan["claims_digest"]},
            )
        self.run_id = run.info.run_id
        self.plans(plan)
        if looks:
            self.keep_looks(looks)
        # A reader sees a sweep by its kind: it has a plan by then.
        store.set_tags(self.run_id, sweep=name, launched=f"{launched:.3f}", **plan["tags"])
        store.set_tags(self.run_id, kind="sweep")
        client.update_run(self.run_id, status="RUNNING")

    def plans(self, plan: Mapping[str, Any]) -> None:
        """Record what is about to run, in place of what was planned before."""
        self.store.client.log_dict(self.run_id, dict(plan), "plan.json")

    def keep_looks(self, looks: Mapping[str, Any]) -> None:
        """Record the looks taken and to come, in place of those before."""
        self.store.client.log_dict(self.run_id, dict(looks), "looks.json")
        self.store.set_tags(self.run_id, until_decided=str(len(looks["seeds"])))

    def keep(self, files: Sequence[Path], **tags: str) -> None:
        """Keep files in the run's folder `report`, then tags that say what they are."""
        for file in files:
            self.store.client.log_artifact(self.run_id, str(file), "report")
        if tags:
            self.store.set_tags(self.run_id, **tags)

    def report_of(self) -> str | None:
        """The tag that the latest report was kept with."""
        tag: str | None = self.store.client.get_run(self.run_id).data.tags.get("report_of")
        return tag

    def end(self, status: str) -> None:
        self.store.client.set_terminated(self.run_id, status)
