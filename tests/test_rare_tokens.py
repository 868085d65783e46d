import polars as pl
import pytest

from analysis.rare_tokens import ORDERS, group_changes, orders_hold, shuffled_labels
from analysis.runs import read_sweeps
from gptcore.records import PRIMARY
from helpers.store import store_in


def token_groups(ends, start=-10.8):
    """A token_groups table: each group goes from `start` to its planted end over 100 steps."""
    rows = []
    for key, groups in ends.items():
        for group, end in groups.items():
            for step in (100, 0, 50):
                value = None if end is None else start + (end - start) * step / 100
                others = [{"mask": "batch"}, {"mask": "none"}]
                for shift, other in enumerate([{}, *others]):
                    logprob = None if value is None else value + shift
                    log_z = None if value is None else 10.8 + 0.01 * step
                    rows.append(
                        {
                            "trial_key": key,
                            "step": step,
                            "group": group,
                            **PRIMARY,
                            **other,
                            "mean_logprob": logprob,
                            "mean_logit": None if logprob is None else logprob + log_z,
                            "log_z": log_z,
                            "excess": 0.03 * step,
                        }
                    )
    return pl.LazyFrame(rows)


PLANTED = {"common_100": -6.0, "rare_100": -12.0, "never_100": -13.0, "singletons": -12.1,
           "never_used": -13.1}  # fmt: skip


def test_planted_changes_are_found_under_the_primary_mask():
    changes = group_changes(token_groups({"a": PLANTED}))
    found = {row["group"]: row for row in changes.to_dicts()}
    for group, end in PLANTED.items():
        assert found[group]["start"] == pytest.approx(-10.8)
        assert found[group]["change"] == pytest.approx(end + 10.8)
        assert found[group]["excess"] == pytest.approx(3.0)
        assert found[group]["log_z_change"] == pytest.approx(1.0)
        split = found[group]["logit_change"] - found[group]["log_z_change"]
        assert found[group]["change"] == pytest.approx(split)


def test_orders_hold_or_fail_as_planted():
    swapped = {**PLANTED, "never_100": -5.0}
    unknown = {**PLANTED, "common_100": None}
    changes = group_changes(token_groups({"as_said": PLANTED, "not": swapped, "null": unknown}))
    found = {row["trial_key"]: row for row in orders_hold(changes).to_dicts()}
    of_the_source, of_bins = ORDERS
    assert (found["as_said"][of_the_source], found["as_said"][of_bins]) == (True, True)
    assert (found["not"][of_the_source], found["not"][of_bins]) == (False, True)
    assert (found["null"][of_the_source], found["null"][of_bins]) == (None, None)


def test_shuffled_labels_give_every_name_once_within_each_run(two_sweeps):
    sweep = read_sweeps(store_in(two_sweeps), ["one", "two"], None, two_sweeps / "cache")
    shuffled = shuffled_labels(sweep, 1)
    by = ["trial_key", "step", "mask"]
    rows, shuffled_rows = (one.tables["token_groups"] for one in (sweep, shuffled))
    assert shuffled_rows.group_by(*by, "group").len()["len"].unique().to_list() == [1]
    assert (
        shuffled_rows.sort(*by, "log_z", "mean_logprob").drop("group")
        .equals(rows.sort(*by, "log_z", "mean_logprob").drop("group"))
    )  # fmt: skip
    assert not shuffled_rows["group"].equals(rows["group"])
    assert shuffled_labels(sweep, 1).tables["token_groups"].equals(shuffled_rows)
    # The names of a run are shuffled in the same way at every step and for every mask.
    joined = shuffled_rows.join(rows, on=[*by, "mean_logprob", "log_z", "excess"], suffix="_was")
    masks = joined.drop_nulls("mean_logprob").filter(
        pl.len().over(*by, "mean_logprob") == 1  # where numbers differ between groups
    )
    names = masks.group_by("trial_key", "group").agg(pl.col("group_was").n_unique())
    assert names["group_was"].to_list() == [1] * names.height
    assert names.height > 4
