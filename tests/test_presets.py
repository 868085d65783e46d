import pytest

from analysis.claims import CLAIMS
from analysis.power import HEADLINES, least_seeds
from gptcore.config import TrialConfig
from gptcore.experiment import check_knobs
from sweeps.presets import PRESETS, trials_of


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_made_of_distinct_trials_that_can_run(preset):
    trials = [trial for space in PRESETS[preset].spaces for trial in trials_of(space)]
    assert len({trial.key("digest") for trial in trials}) == len(trials) > 0
    for trial in trials:
        check_knobs(trial)


def test_quick_is_large_enough_to_compare_schemes():
    trials = trials_of(*PRESETS["quick"].spaces)
    assert len({trial.init.scheme for trial in trials}) >= 3
    assert len({trial.corpus.subset for trial in trials}) >= 2


def test_quick_has_the_seeds_that_its_headline_claims_need():
    seeds = {trial.init.seed for trial in trials_of(*PRESETS["quick"].spaces)}
    least = least_seeds(CLAIMS)
    assert all(least[name] <= len(seeds) for name in HEADLINES)


def test_a_space_is_the_product_of_its_values_each_counted_once():
    trials = trials_of({"init.seed": [0, 1, 1], "init.scheme": ["gpt2", "normal"]})
    assert [(trial.init.seed, trial.init.scheme) for trial in trials] == [
        (0, "gpt2"),
        (0, "normal"),
        (1, "gpt2"),
        (1, "normal"),
    ]
    assert trials_of({}) == [TrialConfig()]
