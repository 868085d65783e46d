"""Draw the two main figures of a report repeatedly while the trials of a sweep run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import jinja2
import polars as pl
import polars.selectors as cs

from analysis.depth_gradient import layer_growth
from analysis.figures import BY_SCHEME, FIGURES, drawn
from analysis.frames import with_scheme, with_trial
from analysis.measures import closed_form
from analysis.page import javascript_of_figures
from analysis.rare_tokens import primary
from analysis.runs import READ, read_sweeps
from gptcore.config import Scalar
from tracking.store import Store

PICTURES = ("qkv_std", "group_log_probs")
TABLES = ("init", "weights", "token_groups")
"""The tables that the figures need."""


class LivePictures:
    """The figures of one sweep. The tables of a trial are read once, after the trial has ended."""

    def __init__(self, store: Store, sweep: str, runs_dir: Path) -> None:
        """Start without any trial.

        Args:
            store: where the sweep is recorded.
            sweep: the name of the sweep.
            runs_dir: the runs folder.
        """
        self.store, self.sweep, self.cache = store, sweep, runs_dir / "cache"
        self.read: set[str] = set()  # keys of trials
        self.shown = 0  # the number of trials in the figures: neither diverged nor unreadable
        self._frames: dict[str, pl.DataFrame] = {}

    def draw(self, keys: Collection[str], planned: Mapping[str, Mapping[str, Scalar]]) -> str:
        """Read the new trials, and return the Vega-Lite of the figures as JSON.

        Args:
            keys: the keys of trials with a result. Diverged trials are not drawn.
            planned: the knobs of all trials, by trial key. Schemes are named by these knobs.
        """
        trials = with_scheme(pl.DataFrame([{"trial_key": key, **planned[key]} for key in planned]))
        if new := [key for key in keys if key not in self.read]:
            some = {table: READ[table] for table in TABLES}
            sweep = read_sweeps(
                self.store, [self.sweep], None, self.cache, new, tables_read=some, quiet=True
            )
            sweep = replace(sweep, trials=trials.filter(pl.col("trial_key").is_in(new)))
            tokens = primary(sweep.tables["token_groups"].lazy()).collect()
            frames = {
                "layer_growth": layer_growth(sweep.tables["weights"].lazy()),
                "group_log_probs": tokens.join(closed_form(sweep), on="trial_key"),
            }
            for name, frame in frames.items():
                rows = with_trial(frame.with_columns(cs.float().fill_nan(None)), sweep)
                self._frames[name] = pl.concat([self._frames.get(name, rows.clear()), rows])
            self.read.update(new)
            self.shown += len(sweep.folders)
        # In the order of the plan, whichever trial finished first.
        order = trials.select("trial_key")
        frames = {
            name: order.join(frame, on="trial_key", maintain_order="left_right")
            for name, frame in self._frames.items()
        }
        return json.dumps(drawn(frames, PICTURES), allow_nan=False)


def live_page(sweep: str) -> str:
    """Return the HTML page of the figures. The page fetches everything that changes."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("live.html.jinja").render(
        sweep=sweep,
        captions={name: FIGURES[name].caption.removesuffix(BY_SCHEME) for name in PICTURES},
        vega=javascript_of_figures(),
    )
