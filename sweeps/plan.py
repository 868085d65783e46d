"""What a sweep is: the trials it wants, each checked and under its key, before anything runs."""

from __future__ import annotations

import functools
import itertools
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptcore.config import KNOBS, InputError, TrialConfig, compared, spelling, varied
from gptcore.corpus import CORPORA, Corpus, CorpusUnavailable, canonical_subset, load_corpus
from gptcore.experiment import check_knobs
from sweeps.presets import Space, trials_of
from tracking.recorder import Job

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """What a sweep is: its name and, by trial key, the trials that it wants."""

    name: str
    preset: str
    trials: Mapping[str, TrialConfig]
    corpora: Mapping[str, Corpus]  # by trial key
    notes: tuple[str, ...] = ()  # what the user should know of how the plan came about
    searched: tuple[str, ...] = ()  # knobs that more trials, not known yet, may differ in

    def as_dict(self) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "preset": self.preset,
            "command": shlex.join(["python", *sys.argv]),
            "notes": list(self.notes),
            "tags": self.tags(),
            "trials": {
                key: {"params": config.to_flat(), "corpus_digest": self.corpora[key].digest}
                for key, config in self.trials.items()
            },
        }

    def of_seeds(self, seeds: Sequence[int]) -> Plan:
        """The part of the plan that has these seeds."""
        trials = {key: one for key, one in self.trials.items() if one.init.seed in seeds}
        return replace(self, trials=trials)

    def varied(self) -> list[str]:
        """The knobs in which the trials differ, or may."""
        differ = varied([config.to_flat() for config in self.trials.values()])
        return [knob for knob in KNOBS if knob in self.searched or knob in differ]

    def compared(self) -> list[str]:
        """The knobs that name the configurations of the trials."""
        return compared(self.varied())

    def tags(self) -> dict[str, str]:
        """What the driver knows and every run of the sweep should keep."""
        return {
            "notes": " ".join(self.notes),
            "git_commit": git_commit(),
            "versions": versions(),
        }


def with_overrides(preset: str, spaces: Sequence[Space], overrides: Space) -> list[Space]:
    """The preset's spaces with what the command line gives in place of their values.

    Raises InputError for a knob by which the preset's own spaces differ.
    """
    for knob in overrides:
        if any(space.get(knob) != spaces[0].get(knob) for space in spaces):
            raise InputError(
                f"--preset {preset} sets {knob} by itself, for each of its parts: "
                "vary it under another preset"
            )
    return [{**space, **overrides} for space in spaces]


def seeds_of(spaces: Sequence[Space]) -> list[int]:
    """The seeds of the spaces. Raises InputError where they differ from one to the next."""
    default = [TrialConfig().init.seed]
    seeds = [list(dict.fromkeys(space.get("init.seed", default))) for space in spaces]
    if any(one != seeds[0] for one in seeds):
        raise InputError("--until-decided takes a sweep whose parts have the same seeds")
    return [int(seed) for seed in seeds[0]]


def with_more_seeds(spaces: Sequence[Space], most: int) -> list[Space]:
    """The spaces with so many seeds: theirs, then the whole numbers after the largest.

    Raises InputError where they have more already.
    """
    seeds = seeds_of(spaces)
    if most < max(2, len(seeds)):
        raise InputError(
            f"--until-decided takes the most seeds a configuration may have, at least "
            f"{max(2, len(seeds))} here, not {most}"
        )
    more = range(max(seeds) + 1, max(seeds) + 1 + most - len(seeds))
    return [{**space, "init.seed": [*seeds, *more]} for space in spaces]


def make_plan(name: str, preset: str, spaces: Sequence[Space]) -> Plan:
    """Check every trial of the spaces and give it its key. Raises InputError for a bad one."""
    spaces, notes = with_corpus(spaces)
    configs = itertools.chain.from_iterable(map(trials_of, spaces))
    return Plan(name, preset, *checked(configs), notes)


def with_corpus(spaces: Sequence[Space]) -> tuple[Sequence[Space], tuple[str, ...]]:
    """The spaces with a stand-in where none names a corpus and the default one cannot be had; ->
    also what to say of it. Raises CorpusUnavailable where a part of the default one is asked for.
    """
    if any("corpus.name" in space for space in spaces):
        return spaces, ()
    try:
        load_corpus(TrialConfig().corpus, context=2)
    except CorpusUnavailable as error:
        subsets = [subset for space in spaces for subset in space.get("corpus.subset", ())]
        if any(str(subset).startswith("part-") for subset in subsets):
            raise  # parts are the book's: it was asked for
        note = f"pydocs (Python's manual) stands in for the default corpus: {error}"
        return [{**space, "corpus.name": ["pydocs"]} for space in spaces], (note,)
    return spaces, ()


def checked(
    configs: Iterable[TrialConfig],
) -> tuple[dict[str, TrialConfig], dict[str, Corpus]]:
    """The trials by their keys, and by key the corpus of each. Raises InputError for a bad one."""
    load = functools.cache(load_corpus)
    trials, corpora = {}, {}
    for config in configs:
        check_knobs(config)
        subset = canonical_subset(config.corpus.subset)
        config = replace(config, corpus=replace(config.corpus, subset=subset))
        if config.probed_layers() == list(range(config.model.n_layer)):
            config = replace(config, probes=replace(config.probes, layers="all"))
        # The order of batches does not matter to what is loaded.
        corpus = load(replace(config.corpus, data_seed=0), config.model.context)
        if config.corpus.name not in CORPORA:
            # A worker need not stand in the folder where the user typed the path.
            config = replace(config, corpus=replace(config.corpus, name=corpus.origin))
        key = config.key(corpus.digest)
        trials[key], corpora[key] = config, corpus
    return trials, corpora


def jobs_of(plan: Plan, keys: Iterable[str]) -> list[Job]:
    """Return trials of the plan as workers are given them."""
    jobs, tags = [], {"sweep": plan.name, **plan.tags()}
    scheme, *others = plan.compared()
    for key in keys:
        corpus, flat = plan.corpora[key], plan.trials[key].to_flat()
        name = [flat[scheme], *(f"{knob} {spelling(flat[knob])}" for knob in others)]
        name += [flat["corpus.subset"], f"seed {flat['init.seed']}"]
        text = {"corpus_digest": corpus.digest, "corpus_origin": corpus.origin}
        jobs.append(Job(key, ", ".join(map(str, name)), flat, {**tags, **text}))
    return jobs


def power(plan: Plan, alpha: float | None = None) -> list[str]:
    """What the plan's number of seeds can support, and what it cannot even if every seed agrees, at
    the level alpha."""
    from analysis.claims import CLAIMS
    from analysis.verdicts import ALPHA, detectable, least_seeds

    alpha = alpha or ALPHA

    configs_of: dict[int, set[str]] = {}
    for config in plan.trials.values():
        flat = config.to_flat()
        seed = flat.pop("init.seed")
        configs_of.setdefault(int(seed), set()).add(str(flat))
    every = set().union(*configs_of.values())
    seeds = sum(some == every for some in configs_of.values())
    needs: dict[int, list[str]] = {}
    for name, least in least_seeds(CLAIMS, alpha).items():
        needs.setdefault(least, []).append(name)
    lines = [f"{seeds} seeds in every configuration, {len(CLAIMS)} claims:"]
    if seeds >= 2:
        effect = f"{detectable(seeds, len(CLAIMS), alpha):.2g} standard deviations of seeds"
        lines.append(
            f"  a mean is found beyond its bound (80% power) where it lies {effect} beyond"
        )
    return lines + [
        f"  {'can' if seeds >= least else 'cannot'} support {', '.join(names)}"
        + ("" if seeds >= least else f": {least} seeds can")
        for least, names in sorted(needs.items())
    ]


@functools.cache
def versions() -> str:
    """Of what numbers may depend on."""
    packages = ("torch", "ray", "mlflow", "polars", "numpy")
    told = [f"python {platform.python_version()}"]
    return ", ".join(told + [f"{name} {version(name)}" for name in packages])


@functools.cache
def git_commit() -> str:
    """The checkout's commit, with `+` where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if dirty.stdout else "")
