"""The view of a sweep that MLflow's pages open with: filter, grouping, columns, charts first.

MLflow keeps a shared view as a tag of the experiment (tracking.private_api). What the view's state
holds was read from MLflow's own page and is not documented: a test opens the page.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptcore.files import JsonObject
from tracking.address import VIEW
from tracking.private_api import shared_view, shared_view_tag

VIEW_TAG = shared_view_tag(VIEW)


def view_of_sweep(group_by: Sequence[str], n_layer: int) -> str:
    """Return the tag's value for a sweep.

    Args:
        group_by: the params that group the trials.
        n_layer: blocks of the largest model; the charts show the first and the last one.
    """
    return shared_view(VIEW, view_state(group_by, n_layer))


def view_state(group_by: Sequence[str], n_layer: int) -> JsonObject:
    """Return what MLflow's page of runs is to show: filter, order, columns, groups, charts."""
    first = "What the claims are about"
    charts = {
        first: [
            _lines("Held-out loss", "loss/val"),
            _lines("Spread of QKV, first and last block",
                   *dict.fromkeys(["qkv_std/layer_00", f"qkv_std/layer_{n_layer - 1:02d}"])),
            _lines("Log-prob of never used tokens", "logprob/never_used"),
            _lines("Log-prob of tokens that occur once", "logprob/singletons"),
            _lines("Log-prob of common, rare, never",
                   *(f"logprob/{group}_100" for group in ("common", "rare", "never"))),
            _lines("Training loss", "loss/train"),
        ]
    }  # fmt: skip
    params = [f"params.`{knob}`" for knob in (*group_by, "corpus.subset", "init.seed")]
    return {
        "searchFilter": "tags.kind = 'trial'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [
            "attributes.`Duration`", *dict.fromkeys(params), "tags.`trial_key`",
            "tags.`trial_status`",
            "metrics.`loss/val`", "metrics.`logprob/never_used`",
        ],
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": knob} for knob in group_by],
        },
        "useGroupedValuesInCharts": True,
        "compareRunSections": [
            {"uuid": section, "name": section, "display": True, "isReordered": False,
             "deleted": False, "isGenerated": False}
            for section in charts
        ],
        "compareRunCharts": [
            {**chart, "uuid": chart["displayName"], "metricSectionId": section}
            for section in charts
            for chart in charts[section]
        ],
        "isAccordionReordered": True,  # else sections are sorted by name
    }  # fmt: skip


def _lines(title: str, *metrics: str) -> JsonObject:
    """Return a chart of metrics over steps."""
    return {
        "type": "LINE", "displayName": title, "metricKey": metrics[0],
        "selectedMetricKeys": list(metrics), "runsCountToCompare": 10, "deleted": False,
        "isGenerated": False, "lineSmoothness": 0, "xAxisScaleType": "linear",
        "scaleType": "linear", "range": {}, "xAxisKey": "step", "selectedXAxisMetricKey": "",
        "yAxisKey": "metric", "yAxisExpressions": [], "ignoreOutliers": False,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip
