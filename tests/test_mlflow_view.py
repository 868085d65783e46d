"""What is stored; that MLflow's page opens with it is tested in test_report.py, in a browser."""

import base64
import json
import zlib

from sweeps.mlflow_view import view_of_sweep, view_state
from sweeps.tracking import chart_points


def test_the_view_is_packed_as_mlflow_unpacks_it():
    stored = json.loads(view_of_sweep(["init.scheme"], 6))
    packed = stored["state"].removeprefix("deflate;")
    assert json.loads(zlib.decompress(base64.b64decode(packed))) == view_state(["init.scheme"], 6)


def test_a_view_of_many_knobs_fits_into_a_tag():
    knobs = [f"some.knob_{i}" for i in range(40)]
    assert len(view_of_sweep(knobs, 96)) < 5000


def test_every_chart_shows_metrics_that_trials_have(tiny):
    from gptcore.experiment import run_trial
    from gptcore.records import MemoryRecorder

    recorder = MemoryRecorder()
    run_trial(tiny, recorder)
    known = {
        metric
        for rows in recorder.rows.values()
        for row in rows
        for metric, _, _ in chart_points(row)
    }
    state = view_state(["init.scheme"], tiny.model.n_layer)
    shown = {key for chart in state["compareRunCharts"] for key in chart["selectedMetricKeys"]}
    assert shown <= known
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 6
