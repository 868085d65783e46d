"""The claims: what each one says, how a run is measured for it, and which rule decides it.

A claim has parts. A part gives every run one number. The centre of these numbers over independent
units is a mean, a median or a share. It has an interval, and the rule of the part says where the
centre has to lie. Claims and their rules are fixed before the runs. `digest` identifies them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis import measures
from analysis.measures import (
    COMMON,
    DRAWN,
    FIRST,
    FIRST_SHARE,
    NEVER_100,
    ONCE,
    RARE_100,
    UNUSED,
    Values,
    level_parts,
)
from analysis.runs import RunTables
from gptcore.config import InputError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rule for one number of a run: where its centre over units has to lie.

    The part is supported if the centre is shown to lie above `low` and below `high`, as far as
    these are given. It is contradicted if the centre is shown to lie beyond `against`. Without
    `against`, the same bound is used for both. A part that does not decide is only reported.
    """

    centre: str  # mean, median or share
    low: float | None = None
    high: float | None = None
    against: float | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)  # of all possible numbers
    decides: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about training, and the rules by which runs decide it."""

    says: str
    source: str  # where the claim comes from, such as an experiment or a paper
    unit: str  # of the number
    parts: Mapping[str, Part]  # the name `*` means all other parts that the measure returns
    measure: Callable[[RunTables], Values]
    section: str  # a key of analysis.page.SECTIONS; a new section also needs a figure
    course: bool = False  # the parts are one number at several steps of training
    over_subsets: bool = False  # the number of a run also depends on runs on other subsets

    def rule(self, part: str) -> Part:
        """Return the rule of the part with this name."""
        return self.parts.get(part) or self.parts["*"]

    def has_part(self, part: str) -> bool:
        """Return whether the claim may have a part with this name."""
        return part in self.parts or "*" in self.parts


ATTENTION, TOKENS = "weight initialisation and the spread of attention weights", "unused tokens"
"""The experiments that the claims come from."""

OF_TAU, POSITIVE = (-1.0, 1.0), (0.0, math.inf)
"""Limits of all possible numbers. Intervals are cut there."""

CLAIMS: dict[str, Claim] = {
    "init_table": Claim(
        says="Weights start as the init scheme says, and biases at 0.",
        source=ATTENTION, unit="relative error of std", measure=measures.init_table,
        section="start",
        parts={"largest error of a kind": Part(centre="mean", high=0.03, limits=POSITIVE)},
    ),
    "untrained_level": Claim(
        says="Untrained, all token groups have the same log-probability, -(ln V + d std^2 / 2).",
        source=TOKENS, unit="nats", measure=measures.untrained_level, section="start",
        parts={
            **dict.fromkeys(level_parts(DRAWN), Part(centre="mean", low=-0.05, high=0.05,
                                                     decides=False)),
            "*": Part(centre="mean", low=-0.05, high=0.05),  # level_parts(GROUPS)
        },
    ),
    "widening": Claim(
        says="Q, K and V widen in training.",
        source=ATTENTION, unit="d(log std)", measure=measures.widening, section="widening",
        parts={
            **dict.fromkeys("qkv", Part(centre="mean", low=0.0)),
            measures.LAW: Part(centre="mean", low=-0.05, high=0.05, decides=False),
        },
    ),
    "depth_gradient": Claim(
        says="The attention weights of earlier layers widen more.",
        source=ATTENTION, unit="tau", measure=measures.depth_gradient, section="depth",
        parts={
            "tau": Part(centre="median", low=0.3, against=0.0, limits=OF_TAU),
            **dict.fromkeys(
                (measures.TAU_MOVED, *measures.TAUS.values()),
                Part(centre="median", low=0.3, against=0.0, limits=OF_TAU, decides=False),
            ),
        },
    ),
    "depth_gradient_lasts": Claim(
        says="The gradient over depth is there from step 50 to the last step.",
        source=ATTENTION, unit="tau", measure=measures.depth_gradient_lasts,
        section="depth", course=True,
        parts={"*": Part(centre="mean", low=0.0, limits=OF_TAU)},
    ),
    "first_layer_widest": Claim(
        says="The block next to the embedding widens most.",
        source=ATTENTION, unit="d(log std)", measure=measures.first_layer_widest,
        section="widening",
        parts={
            FIRST: Part(centre="mean", low=0.0),
            FIRST_SHARE: Part(centre="share", low=0.8, against=0.5, limits=(0.0, 1.0),
                              decides=False),
        },
    ),
    "heavier_tails": Claim(
        says="The tails of Q, K and V get longer in training.",
        source=ATTENTION, unit="d(excess kurtosis)", measure=measures.heavier_tails,
        section="tails",
        parts={
            **dict.fromkeys("qkv", Part(centre="mean", low=0.0)),
            "qkv": Part(centre="mean", low=0.0, decides=False),
        },
    ),
    "order": Claim(
        says="After training, common tokens are more probable than rare ones, and rare tokens are "
        "more probable than unused ones.",
        source=TOKENS, unit="nats", measure=measures.order, section="tokens",
        parts={
            f"{COMMON} - {ONCE}": Part(centre="mean", low=0.0),
            f"{ONCE} - {UNUSED}": Part(centre="mean", low=0.0),
            f"{COMMON} - {RARE_100}": Part(centre="mean", low=0.0, decides=False),
            f"{RARE_100} - {NEVER_100}": Part(centre="mean", low=0.0, decides=False),
        },
    ),
    "rare_falls": Claim(
        says="The probability of rare tokens falls below its start.",
        source=TOKENS, unit="nats", measure=measures.rare_falls, section="rare",
        parts={
            ONCE: Part(centre="mean", high=0.0),
            RARE_100: Part(centre="mean", high=0.0, decides=False),
            measures.EXCESS: Part(centre="mean", high=0.0, decides=False),
        },
    ),
    "rare_flips": Claim(
        says="The probability of rare tokens rises on a text so short that calibration alone "
        "predicts a rise, and falls on a longer text.",
        source=TOKENS, unit="nats in the predicted direction", measure=measures.rare_flips,
        section="rare", over_subsets=True,
        parts={"*": Part(centre="mean", low=0.0)},
    ),
    "never_suppressed": Claim(
        says="The probability of tokens that never occur falls by more than a nat, and by more "
        "than that of rare tokens.",
        source=TOKENS, unit="nats", measure=measures.never_suppressed, section="unused",
        parts={
            UNUSED: Part(centre="mean", high=-1.0, against=0.0),
            f"{UNUSED} - {ONCE}": Part(centre="mean", high=0.0),
            NEVER_100: Part(centre="mean", high=-1.0, against=0.0, decides=False),
            f"{NEVER_100} - {RARE_100}": Part(centre="mean", high=0.0, decides=False),
        },
    ),
    "common_at_random_or_above": Claim(
        says="The probability of common tokens does not fall below its start.",
        source=TOKENS, unit="nats", measure=measures.common_at_random_or_above, section="tokens",
        parts={
            COMMON: Part(centre="mean", low=-0.1),
            f"{COMMON}, margin 0": Part(centre="mean", low=0.0, decides=False),
        },
    ),
    "mask_matters": Claim(
        says="Without the mask, common tokens look more probable than they are.",
        source=TOKENS, unit="nats", measure=measures.mask_matters, section="tokens",
        parts={f"{COMMON}, unmasked - masked": Part(centre="mean", low=0.0)},
    ),
    "unused_rows_move": Claim(
        says="The embedding rows of tokens that never occur change although they are never read.",
        source=TOKENS, unit="RMS displacement / RMS at step 0", measure=measures.unused_rows_move,
        section="unused",
        parts={
            "displacement": Part(centre="mean", low=0.01, limits=POSITIVE),
            measures.LOGIT: Part(centre="mean", high=0.0, decides=False),
            measures.LOG_Z: Part(centre="mean", high=0.0, decides=False),
        },
    ),
}  # fmt: skip


def digest(asked: Sequence[str] = ()) -> str:
    """Return 12 hex digits that identify the claims that are asked, and how they are decided.

    The digest changes with every statement and rule, and with the code that measures and decides.
    It is the stamp of a trial. The stamp has to show that nothing was changed after the result of
    the trial was seen. Comments in the code do not count.

    Args:
        asked: the names of the claims that a sweep asks. Without names, all claims.
    """
    data = {
        name: {
            "says": claim.says,
            "parts": {part: asdict(rule) for part, rule in claim.parts.items()},
        }
        for name, claim in CLAIMS.items()
    }
    measured_by = {claim.measure.__module__ for claim in CLAIMS.values()}
    code = {name: _code(name) for name in sorted({*RULES, *measured_by})}
    stamped = json.dumps([data, code, sorted(asked)], sort_keys=True)
    return hashlib.sha256(stamped.encode()).hexdigest()[:12]


RULES = tuple(
    f"analysis.{name}"
    for name in (
        "decisions", "depth_gradient", "differences", "part_verdicts", "power", "rare_tokens",
        "runs", "skew", "stats", "sweep_verdicts", "variance", "verdicts",
    )
)  # fmt: skip
"""The modules that decide claims, in addition to the modules of the measures."""


@functools.cache
def _code(module: str) -> str:
    """Return a digest of the code of a module, without its comments."""
    found = importlib.util.find_spec(module)
    if not (found and found.origin):
        raise LookupError(f"the module {module} of a claim has no file")
    code = ast.unparse(ast.parse(Path(found.origin).read_text(encoding="utf-8")))
    return hashlib.sha256(code.encode()).hexdigest()


def check_claims(names: Sequence[str]) -> None:
    """Raise InputError if one of the names is not the name of a claim."""
    for name in names:
        if name not in CLAIMS:
            raise InputError(
                f"there is no claim {name}: {did_you_mean(name, CLAIMS)}the claims are "
                f"{', '.join(CLAIMS)}"
            )
