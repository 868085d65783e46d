"""What is stored, and that MLflow's page opens with it, in a browser."""

import base64
import json
import zlib

import pytest

from gptcore.config import TrialConfig
from helpers.paths import SCREENSHOTS
from helpers.store import open_store
from helpers.trials import WORDS, undisturbed
from tracking.address import VIEW
from tracking.charts import chart_points
from tracking.colours import COLOURS
from tracking.view import view_of_sweep, view_state


def test_the_view_is_packed_as_mlflow_unpacks_it():
    stored = json.loads(view_of_sweep(["init.scheme"], 6))
    packed = stored["state"].removeprefix("deflate;")
    assert json.loads(zlib.decompress(base64.b64decode(packed))) == view_state(["init.scheme"], 6)


def test_a_view_of_many_knobs_fits_into_a_tag():
    knobs = [f"some.knob_{i}" for i in range(40)]
    assert len(view_of_sweep(knobs, 96)) < 5000


def test_every_chart_shows_metrics_that_trials_have():
    words = TrialConfig.from_flat(WORDS)  # over bytes no token is rare
    recorder = undisturbed(words)
    known = {
        metric
        for rows in recorder.rows.values()
        for row in rows
        for metric, _, _ in chart_points(row)
    }
    state = view_state(["init.scheme"], words.model.n_layer)
    shown = {key for chart in state["compareRunCharts"] for key in chart["selectedMetricKeys"]}
    assert shown <= known
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 6


LINES = "[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data ?? [])"


@pytest.mark.browser
def test_runs_that_are_not_grouped_have_the_colours_of_the_report(server_sweep, page):
    store = open_store(server_sweep)
    experiment = store.client.get_experiment_by_name("served").experiment_id
    page.set_viewport_size({"width": 1900, "height": 1100})
    page.goto(store.address.chart_page(experiment).replace(f"&viewStateShareKey={VIEW}", ""))
    page.wait_for_function(f"{LINES}.length >= 4", timeout=60_000)
    lines = page.evaluate(f"{LINES}.map(line => [line.name, line.marker?.color])")
    # The digits after the colour of a line make the band around the line transparent.
    trials = [str(colour)[:7] for name, colour in lines if "seed" in str(name)]
    assert len(trials) >= 4, lines
    assert set(trials) == {COLOURS[0]}, lines


@pytest.mark.browser
def test_mlflow_opens_on_the_sweep_with_its_charts(server_sweep, page):
    store = open_store(server_sweep)
    experiment = store.client.get_experiment_by_name("served").experiment_id
    page.set_viewport_size({"width": 1900, "height": 1100})
    page.goto(store.address.chart_page(experiment))
    page.get_by_text("What the claims are about").wait_for(timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 4")
    for title in ("loss/val", "qkv_std/layer_00", "logprob/never_used"):
        page.get_by_text(title).first.wait_for(timeout=30_000)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "mlflow.png")
    text = page.inner_text("body")
    assert "4 matching runs" in text
    assert "Group by: init.scheme" in text
    assert "share key" not in text  # of an error
    assert "Model registry" in text  # a page about training
    assert "Prompts" not in text  # a page for language-model applications
    titles = ("loss/val", "qkv_std/layer_00", "logprob/never_used")
    assert all(title in text for title in titles)
