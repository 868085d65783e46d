"""The plan of a sweep: its trials, each checked and under its key, before anything runs."""

from __future__ import annotations

import functools
import itertools
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.config import (
    KNOBS,
    InputError,
    Scalar,
    TrialConfig,
    compared_knobs,
    spelling,
    varying_knobs,
)
from gptcore.corpus import CORPORA, Corpus, CorpusUnavailable, canonical_subset, load_corpus
from gptcore.experiment import check_knobs
from sweeps.presets import Space, trials_of
from tracking.colours import COLOURS
from tracking.job import Job

if TYPE_CHECKING:
    from tracking.sweep_run import RecordedPlan

MOST_SEEDS = 1000
"""The most seeds that --until-decided takes."""

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """The name of a sweep, and its trials by their keys."""

    name: str
    preset: str
    trials: Mapping[str, TrialConfig]
    corpora: Mapping[str, Corpus]  # by trial key
    notes: tuple[str, ...] = ()  # what the user has to know about the plan
    claims: tuple[str, ...] = ()  # the claims that the sweep asks; empty for all claims
    searched: tuple[str, ...] = ()  # knobs in which trials that are added later may differ

    def of_seeds(self, seeds: Sequence[int]) -> Plan:
        """Return the plan with only the trials of these seeds."""
        trials = {key: one for key, one in self.trials.items() if one.init.seed in seeds}
        return replace(self, trials=trials)

    def varied(self) -> list[str]:
        """Return the knobs in which the trials differ, or may differ."""
        differ = varying_knobs([config.to_flat() for config in self.trials.values()])
        return [knob for knob in KNOBS if knob in self.searched or knob in differ]

    def compared(self) -> list[str]:
        """Return the knobs that name the configurations of the trials."""
        return compared_knobs(self.varied())

    def tags(self) -> dict[str, str]:
        """Return the tags that every run of the sweep gets."""
        return {
            "notes": " ".join(self.notes),
            "git_commit": git_commit(),
            "versions": versions(),
        }


def with_overrides(preset: str, spaces: Sequence[Space], overrides: Space) -> list[Space]:
    """Replace values of a preset's spaces by those of the command line.

    Raises:
        InputError: the spaces of the preset differ in such a knob.
    """
    for knob in overrides:
        if any(space.get(knob) != spaces[0].get(knob) for space in spaces):
            raise InputError(
                f"--preset {preset} sets {knob} for each of its parts: vary it with another preset"
            )
    return [{**space, **overrides} for space in spaces]


def seeds_of(spaces: Sequence[Space]) -> list[int]:
    """Return the seeds of the spaces. Raise InputError where the spaces have different seeds."""
    default = [TrialConfig().init.seed]
    seeds = [list(dict.fromkeys(space.get("init.seed", default))) for space in spaces]
    if any(one != seeds[0] for one in seeds):
        raise InputError("--until-decided takes a preset whose parts have the same seeds")
    return [int(seed) for seed in seeds[0]]


def with_more_seeds(spaces: Sequence[Space], most: int) -> list[Space]:
    """Add seeds to the spaces: the whole numbers after the largest seed, up to `most` seeds.

    Raises:
        InputError: the spaces have more seeds already.
    """
    seeds = seeds_of(spaces)
    if not max(2, len(seeds)) <= most <= MOST_SEEDS:
        raise InputError(
            f"--until-decided takes the most seeds a configuration may have, from "
            f"{max(2, len(seeds))} to {MOST_SEEDS} here, not {most}"
        )
    more = range(max(seeds) + 1, max(seeds) + 1 + most - len(seeds))
    return [{**space, "init.seed": [*seeds, *more]} for space in spaces]


def make_plan(name: str, preset: str, spaces: Sequence[Space], claims: Sequence[str] = ()) -> Plan:
    """Make a plan of all trials of the spaces.

    Args:
        name: the name of the sweep.
        preset: the name of the preset.
        spaces: the values of knobs.
        claims: the claims that the sweep asks. Without names, all claims.

    Raises:
        InputError: a trial cannot run.
    """
    spaces, notes = with_corpus(spaces)
    configs = itertools.chain.from_iterable(map(trials_of, spaces))
    return Plan(name, preset, *checked(configs), notes, tuple(claims))


def complete_seeds(trials: Iterable[TrialConfig]) -> int:
    """Return the number of seeds that all configurations have."""
    configs_of: dict[int, set[str]] = {}
    for config in trials:
        flat = config.to_flat()
        seed = flat.pop("init.seed")
        if flat["corpus.data_seed"] == seed:
            del flat["corpus.data_seed"]
        configs_of.setdefault(int(seed), set()).add(str(flat))
    configs = set().union(*configs_of.values())
    return sum(some == configs for some in configs_of.values())


def recorded_again(recorded: RecordedPlan) -> Plan:
    """Make the plan of a sweep again from its record.

    Raises:
        InputError: a trial cannot run, or would be another one.
    """
    configs = (TrialConfig.from_flat(trial.params) for trial in recorded.trials.values())
    trials, corpora = checked(configs)
    if trials.keys() != recorded.trials.keys():
        raise InputError(
            f"the trials of sweep {recorded.sweep} would be other ones now, because a text or the "
            f"experiment has changed: run its command again, {recorded.command}"
        )
    return Plan(recorded.sweep, recorded.preset, trials, corpora, recorded.notes, recorded.claims)


def with_corpus(spaces: Sequence[Space]) -> tuple[Sequence[Space], tuple[str, ...]]:
    """Replace the default corpus by another one where this machine cannot get it.

    Returns:
        The spaces, and notes for the user.

    Raises:
        CorpusUnavailable: a part of the default corpus was asked for by name.
    """
    if any("corpus.name" in space for space in spaces):
        return spaces, ()
    try:
        load_corpus(TrialConfig().corpus, context=2)
    except CorpusUnavailable as error:
        subsets = [subset for space in spaces for subset in space.get("corpus.subset", ())]
        if any(str(subset).startswith("part-") for subset in subsets):
            raise  # only the book has parts
        note = f"pydocs (Python's manual) is used instead of the default corpus: {error}"
        return [{**space, "corpus.name": ["pydocs"]} for space in spaces], (note,)
    return spaces, ()


def checked(
    configs: Iterable[TrialConfig],
) -> tuple[dict[str, TrialConfig], dict[str, Corpus]]:
    """Check trials.

    Returns:
        The trials by their keys, and by key the corpus of each.

    Raises:
        InputError: a trial cannot run.
    """
    load = functools.cache(load_corpus)
    trials, corpora = {}, {}
    for config in configs:
        check_knobs(config)
        subset = canonical_subset(config.corpus.subset)
        config = replace(config, corpus=replace(config.corpus, subset=subset))
        if config.probed_layers() == list(range(config.model.n_layer)):
            config = replace(config, probes=replace(config.probes, layers="all"))
        # What is loaded does not depend on the order of batches.
        corpus = load(replace(config.corpus, data_seed=0), config.model.context)
        if config.corpus.name not in CORPORA:
            # A worker may run in another folder than the user's.
            config = replace(config, corpus=replace(config.corpus, name=corpus.origin))
        key = config.key(corpus.digest)
        trials[key], corpora[key] = config, corpus
    return trials, corpora


def jobs_of(plan: Plan, keys: Iterable[str]) -> list[Job]:
    """Return one Job for each of these trials."""
    jobs, tags = [], {"sweep": plan.name, **plan.tags()}
    names, schemes = names_of(plan), schemes_of(plan)
    colours = dict(zip(dict.fromkeys(schemes.values()), itertools.cycle(COLOURS), strict=False))
    for key in keys:
        corpus, flat = plan.corpora[key], plan.trials[key].to_flat()
        text = {"corpus_digest": corpus.digest, "corpus_origin": corpus.origin}
        scheme = schemes[key]
        jobs.append(Job(key, names[key], flat, {**tags, **text}, scheme, colours[scheme]))
    return jobs


def names_of(plan: Plan) -> dict[str, str]:
    """Name each trial by its scheme, the other knobs in which trials differ, and its seed.

    A text has no prefix, as in `gpt2, 0-0.25, seed 1`. A number follows the last part of the name
    of the knob, as in `gpt2, lr 0.001, seed 1`.
    """
    flats = {key: config.to_flat() for key, config in plan.trials.items()}
    # These knobs are in every name, or repeat one that is.
    known = {"init.scheme", "init.seed"}
    if all(flat["corpus.data_seed"] == flat["init.seed"] for flat in flats.values()):
        known.add("corpus.data_seed")
    others = [knob for knob in plan.varied() if knob not in known]

    def said(knob: str, value: Scalar) -> str:
        if isinstance(value, str):
            return Path(value).name if knob == "corpus.name" else value
        return f"{knob.rpartition('.')[2]} {spelling(value)}"

    knobs = ["init.scheme", *others, "init.seed"]
    return {key: ", ".join(said(knob, flat[knob]) for knob in knobs) for key, flat in flats.items()}


def schemes_of(plan: Plan) -> dict[str, str]:
    """Return the scheme of each trial, with all knobs by which trials are compared.

    The report names schemes in the same way, and gives them colours in this order.
    """
    scheme, *others = plan.compared()
    flats = {key: config.to_flat() for key, config in plan.trials.items()}
    return {
        key: ", ".join(
            [spelling(flat[scheme]), *(f"{knob} {spelling(flat[knob])}" for knob in others)]
        )
        for key, flat in flats.items()
    }


@functools.cache
def versions() -> str:
    """Return the versions on which numbers may depend."""
    packages = ("torch", "ray", "mlflow", "polars", "numpy")
    parts = [f"python {platform.python_version()}"]
    return ", ".join(parts + [f"{name} {version(name)}" for name in packages])


@functools.cache
def git_commit() -> str:
    """Return the checkout's commit, with `+` if files were changed; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if dirty.stdout else "")
