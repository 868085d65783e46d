"""Suggest what to do after a report: commands that would decide more claims."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.claim_table import ALL
from analysis.findings import Findings
from analysis.power import HEADLINES
from analysis.runs import RunTables
from gptcore.config import KNOBS, spelling

MOST_SEEDS = 32
"""The largest number of seeds that is suggested. Beyond it, another size or rate says more."""
ONCE_ONLY = ("redo", "watch", "wait", "dry-run")
"""Flags that apply to one run of a command, and are left out of a suggestion."""


@dataclass(frozen=True, kw_only=True)
class Next:
    """What to do next: a sentence and the command."""

    says: str
    command: str


def next_steps(sweep: RunTables, findings: Findings) -> list[Next]:
    """Suggest fresh seeds, more seeds, and other learning rates, with their commands."""
    # A selection, a control, several sweeps as one, and a search have no stamps: one command cannot
    # repeat them.
    if len(sweep.commands) != 1 or not sweep.stamps or findings.interim:
        return []
    try:
        words = shlex.split(sweep.commands[0])
    except ValueError:
        return []
    if words[:1] != ["python"] or Path("".join(words[1:2])).name != "init_sweep.py":
        return []
    command, name = without_flags(shlex.join(words), ONCE_ONLY), sweep.name
    given = {word[2:].partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
    # A command that only continued a sweep does not name its trials.
    if not (given & {"preset", *KNOBS} or name == "quick"):
        return []
    seeds = sorted(sweep.trials["init.seed"].unique().to_list())
    rates = sorted(sweep.trials["optim.lr"].unique().to_list())
    steps = []
    by = findings.claims.by.get("scheme") or {ALL: findings.claims.here}
    forecasts = {
        (claim, scheme): found.forecast.half or 0
        for scheme, some in by.items()
        for claim, found in some.items()
        if found.forecast
    }
    open_claims = {one: n for one, n in forecasts.items() if len(seeds) < n <= MOST_SEEDS}
    first = min(
        open_claims, key=lambda one: (one[0] not in HEADLINES, open_claims[one]), default=None
    )
    if first:
        needed = open_claims[first]
        under = "" if first[1] == ALL else f" under {first[1]}"
        fresh = [str(seeds[-1] + 1 + seed) for seed in range(min(8, len(seeds)))]
        steps.append(
            Next(
                says="Run fresh seeds until every claim is decided. All interim analyses share one "
                "error rate:",
                command=with_flags(
                    command, name=f"{name}-fresh", **{"until-decided": str(max(needed, 24)),
                                                      "init.seed": fresh},
                ),
            )
        )  # fmt: skip
        new = range(seeds[-1] + 1, seeds[-1] + 1 + needed - len(seeds))
        more = with_flags(command, name=name, **{"init.seed": [*map(str, [*seeds, *new])]})
        steps.append(
            Next(
                says=f"Add seeds. With {needed} seeds, {first[0]}{under} would be decided in half "
                "of all cases. Finished trials are not run again. The new trials are exploratory, "
                "because this report exists already:",
                command=more,
            )
        )
    if len(rates) == 1:
        others = [spelling(float(f"{rates[0] * factor:.1g}")) for factor in (0.3, 3)]
        steps.append(
            Next(
                says="Try other learning rates, because the learning rate can change a verdict:",
                command=with_flags(command, name=f"{name}-rates", **{"optim.lr": others}),
            )
        )
    return steps


def without_flags(command: str, flags: Collection[str]) -> str:
    """Remove flags and their values from a command."""
    kept, dropping = list[str](), False
    for word in shlex.split(command):
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return shlex.join(kept)


def with_flags(command: str, **flags: str | Sequence[str]) -> str:
    """Add flags to a command. They replace flags of the same names."""
    words = shlex.split(without_flags(command, flags))
    for flag, value in flags.items():
        words += [f"--{flag}", *([value] if isinstance(value, str) else value)]
    return shlex.join(words)
