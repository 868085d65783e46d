"""The claims: what each says, how a run is measured for it, and which rule decides it.

A claim has parts. A part gives every run one number. The centre of that number over independent
units (mean, median or share) has an interval and a p-value, and the rule of the part says where the
interval has to lie. Claims and their margins are data, fixed before the runs: `digest` names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from analysis import measures
from analysis.measures import Values
from analysis.runs import RunTables


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rule for one number of a run: where its centre over units has to lie.

    The part is supported where the interval lies entirely above `low` and below `high`, as far as
    they are given. It is contradicted where the interval lies entirely beyond `against`, which is
    the same bound unless given. The p-value tests against `null`, which is the same bound unless
    given. A part that does not decide is only reported.
    """

    centre: str  # mean, median or share
    low: float | None = None
    high: float | None = None
    against: float | None = None
    null: float | None = None
    decides: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about training, and the rules by which runs decide it."""

    says: str
    source: str  # where the claim comes from, such as an experiment or a paper
    unit: str  # of the number
    parts: Mapping[str, Part]  # the name `*` means: all parts that the measure names
    measure: Callable[[RunTables], Values]
    section: str  # a key of analysis.report.SECTIONS; a new section also needs a figure
    version: int = 1  # raised when `measure`, or the rows that READ gives it, change its numbers
    course: bool = False  # the parts are one number at several steps, in the order of steps
    over_subsets: bool = False  # the number of a run needs runs on other subsets

    def rule(self, part: str) -> Part:
        """Return the rule of a part by the name of the part."""
        return self.parts.get(part) or self.parts["*"]

    def has_part(self, part: str) -> bool:
        """Return whether the measure may give a number of this name."""
        return part in self.parts or "*" in self.parts


ATTENTION, TOKENS = "weight initialisation and the spread of attention weights", "unused tokens"
"""The experiments that the claims come from."""

CLAIMS: dict[str, Claim] = {
    "init_table": Claim(
        says="Weights start as the init scheme says, and biases at 0.",
        source=ATTENTION, unit="relative error of std", measure=measures.init_table,
        section="start",
        parts={"largest error of a kind": Part(centre="mean", high=0.03)},
    ),
    "untrained_level": Claim(
        says="Untrained, all token groups stand at -(ln V + d std^2 / 2), equally.",
        source=TOKENS, unit="nats", measure=measures.untrained_level, section="start",
        parts={"*": Part(centre="mean", low=-0.05, high=0.05)},
    ),
    "widening": Claim(
        says="Q, K and V widen in training.",
        source=ATTENTION, unit="d(log std)", measure=measures.widening, section="widening",
        parts={"*": Part(centre="median", low=0.0)},
    ),
    "depth_gradient": Claim(
        says="The attention weights of earlier layers widen more.",
        source=ATTENTION, unit="tau", measure=measures.depth_gradient, section="depth",
        parts={
            "tau": Part(centre="median", low=0.3, against=0.0, null=0.0),
            "tau of RMS displacement": Part(
                centre="median", low=0.3, against=0.0, null=0.0, decides=False
            ),
        },
    ),
    "depth_gradient_lasts": Claim(
        says="The gradient over depth is there from step 50 to the last step.",
        source=ATTENTION, unit="tau", measure=measures.depth_gradient_lasts,
        section="depth", course=True,
        parts={"*": Part(centre="median", low=0.0)},
    ),
    "first_layer_widest": Claim(
        says="The block next to the embedding widens most.",
        source=ATTENTION, unit="share of runs", measure=measures.first_layer_widest,
        section="widening",
        parts={"layer 0 widest": Part(centre="share", low=0.8, against=0.5, null=0.5)},
    ),
    "heavier_tails": Claim(
        says="The tails of attention weights get longer in training.",
        source=ATTENTION, unit="d(excess kurtosis)", measure=measures.heavier_tails,
        section="tails",
        parts={"change of excess kurtosis": Part(centre="median", low=0.0)},
    ),
    "order": Claim(
        says="After training common tokens are more probable than rare, those than unused.",
        source=TOKENS, unit="share of runs", measure=measures.order, section="tokens",
        parts={"*": Part(centre="share", low=0.8, against=0.5, null=0.5)},
    ),
    "rare_falls": Claim(
        says="Rare tokens fall below their start.",
        source=TOKENS, unit="nats", measure=measures.rare_falls, section="rare",
        parts={
            "rare": Part(centre="mean", high=0.0),
            measures.EXCESS: Part(centre="mean", high=0.0, decides=False),
        },
    ),
    "rare_flips": Claim(
        says="Rare tokens rise on a text so short that calibration alone predicts it, else fall.",
        source=TOKENS, unit="share of runs", measure=measures.rare_flips,
        section="rare", over_subsets=True,
        parts={"*": Part(centre="share", low=0.8, against=0.5, null=0.5)},
    ),
    "never_suppressed": Claim(
        says="Tokens that never occur fall by more than a nat, and by more than rare ones.",
        source=TOKENS, unit="nats", measure=measures.never_suppressed, section="unused",
        parts={
            "never": Part(centre="mean", high=-1.0, against=0.0),
            "never - rare": Part(centre="mean", high=0.0),
        },
    ),
    "common_at_random_or_above": Claim(
        says="Common tokens do not fall below their start.",
        source=TOKENS, unit="nats", measure=measures.common_at_random_or_above, section="tokens",
        parts={
            "common": Part(centre="mean", low=-0.1),
            "common, margin 0": Part(centre="mean", low=0.0, decides=False),
        },
    ),
    "mask_matters": Claim(
        says="Without the mask common tokens look more probable than they are.",
        source=TOKENS, unit="nats", measure=measures.mask_matters, section="tokens",
        parts={"common, unmasked - masked": Part(centre="mean", low=0.0)},
    ),
    "unused_rows_move": Claim(
        says="Embedding rows of tokens that never occur change without being read.",
        source=TOKENS, unit="RMS displacement / RMS at step 0", measure=measures.unused_rows_move,
        section="unused",
        parts={
            "displacement": Part(centre="mean", low=0.01, against=0.01),
            measures.LOGIT: Part(centre="mean", high=0.0, decides=False),
            measures.LOG_Z: Part(centre="mean", high=0.0, decides=False),
        },
    ),
}  # fmt: skip


def digest() -> str:
    """Return 12 hex digits that change with any statement, rule or measure's version of CLAIMS."""
    data = {
        name: {
            "says": claim.says,
            "version": claim.version,
            "parts": {part: asdict(rule) for part, rule in claim.parts.items()},
        }
        for name, claim in CLAIMS.items()
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
