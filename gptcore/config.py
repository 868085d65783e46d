"""The configuration of one trial: what it takes, how it is spelled, and the key that names it.

A knob has one spelling everywhere: `init.scheme` is the path in these dataclasses, the flag on the
command line, the entry in Tune's config, the MLflow param and the column in the analysis.

Importing this module imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints

Scalar = int | float | str | bool

EXPERIMENT_VERSION = 2
"""Part of every trial key. Raise it when a change to gptcore changes the numbers of a trial."""


VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}
"""By the name of each tokenizer, how many tokens it has, <|endoftext|> included."""

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class InputError(ValueError):
    """Bad input from a person: one clear sentence saying what was wrong and what is accepted.

    Commands print it on stderr and exit with code 2.
    """


def seed_of(*words: str | int) -> int:
    """A 64-bit seed for one use of randomness, from the words that name the use and a seed.

    No draw depends on global state or on how many draws came before it elsewhere.
    """
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def knob(
    default: Scalar,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    in_key: bool = True,
    later: bool = False,
) -> Any:
    """A field of a config: its default, a phrase for --help and the range it accepts.

    `low` and `high` are inclusive, `above` and `below` exclusive. `in_key=False` keeps the field
    out of the trial key: it changes where a trial runs, not what it finds. `later`: there were
    trials before there was the field; at its default it is left out, so that they keep their keys.
    """
    limits = {">=": low, "<=": high, ">": above, "<": below}
    limits = {sign: limit for sign, limit in limits.items() if limit is not None}
    metadata = {"doc": doc, "limits": limits, "choices": choices, "in_key": in_key}
    metadata["later"] = later
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the GPT (no dropout anywhere)."""

    n_layer: int = knob(6, "number of blocks", low=1)
    n_head: int = knob(4, "attention heads a block", low=1)
    d_model: int = knob(64, "width of the residual stream", low=1)
    context: int = knob(64, "tokens a sequence", low=2)
    vocab_size: int = knob(
        50257, "rows of the token embedding; if not given, the tokenizer's number of tokens", low=1
    )
    tied: bool = knob(True, "whether the output head is the token embedding")
    norm: str = knob(
        "pre",
        "LayerNorm before a branch, after its sum, or after with DeepNet's scaled residual",
        choices=("pre", "post", "deepnet"),
    )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How the parameters start."""

    scheme: str = knob("model5", "rule for the starting weights")
    std: float = knob(0.02, "standard deviation, for schemes that take one", above=0.0)
    cut: float = knob(2.0, "where truncated_normal is cut, in parent standard deviations", low=0.01)
    nu: float = knob(5.0, "degrees of freedom of student_t", above=2.0)
    gain: float = knob(1.0, "factor on the std, for schemes that take one", above=0.0)
    seed: int = knob(0, "seed of the initial weights", low=0)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the trial reads, and in which order."""

    # The text's digest stands in the key instead: the same bytes under another name or path are
    # the same trial.
    name: str = knob("gulliver", "path of a UTF-8 text file, or a corpus", in_key=False)
    tokenizer: str = knob(
        "gpt2",
        "what a token is: a piece of GPT-2's encoding, or a byte",
        choices=tuple(VOCAB_SIZES),
        later=True,
    )
    subset: str = knob("all", "`all`, a section such as `part-1`, or fractions such as `0-0.25`")
    data_seed: int = knob(0, "seed of the order of batches, and of draws among tied tokens", low=0)
    windows: int = knob(4, "sequences in the probe text, and in the text that is held out", low=1)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters move."""

    name: str = knob("adamw", "optimiser")
    lr: float = knob(1e-3, "learning rate, at its highest", above=0.0)
    schedule: str = knob("constant", "learning rate after the warm-up")
    warmup: int = knob(0, "steps over which the learning rate rises to lr", low=0)
    clip: float = knob(0.0, "largest norm of the gradient, 0 for no limit", low=0.0)
    beta1: float = knob(0.9, "Adam's decay of the first moment", low=0.0, below=1.0)
    beta2: float = knob(0.999, "Adam's decay of the second moment", low=0.0, below=1.0)
    eps: float = knob(1e-8, "added to the root of Adam's second moment", above=0.0)
    momentum: float = knob(0.9, "decay of sgd's velocity", low=0.0, below=1.0)
    # 0, so that a row the corpus never uses moves by its gradient alone.
    weight_decay: float = knob(0.0, "weight decay: decoupled in adamw and coupled_adam", low=0.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how much at a time, and where."""

    steps: int = knob(200, "optimiser updates", low=1)
    batch_size: int = knob(8, "sequences a step", low=1)
    precision: str = knob(
        "float32",
        "of products: bfloat16 in the head alone, or in all of the model",
        choices=("float32", "bf16-head", "bf16"),
        later=True,
    )
    checkpoint_seconds: float = knob(
        10.0,
        "least seconds between checkpoints, which take 1 in 100 at most",
        low=0.0,
        in_key=False,
    )
    device: str = knob(
        "auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"), in_key=False
    )


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """How often the trial is looked at; at step 0 and the last step in any case."""

    every: int = knob(
        10, "steps between records of weights, updates, activations, the batch's groups", low=1
    )
    text_every: int = knob(50, "steps between readings of the fixed texts", low=1)
    histogram_every: int = knob(50, "steps between histograms", low=1)
    spectrum_every: int = knob(50, "steps between singular values", low=1)
    layers: str = knob("all", "which blocks are looked at: all, or ascending, such as 0,2,5")


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that makes a trial. `TrialConfig()` is the default trial."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)

    def __post_init__(self) -> None:
        if self.model.d_model % self.model.n_head:
            raise InputError(
                f"model.n_head must divide model.d_model: "
                f"{self.model.n_head} heads do not divide a width of {self.model.d_model}"
            )
        if self.model.vocab_size < (tokens := VOCAB_SIZES[self.corpus.tokenizer]):
            raise InputError(
                f"model.vocab_size takes a whole number >= {tokens}, the number of tokens of "
                f"corpus.tokenizer {self.corpus.tokenizer}, not {self.model.vocab_size}"
            )
        if self.optim.warmup >= self.train.steps:
            raise InputError(
                f"optim.warmup must be below train.steps: a warm-up of {self.optim.warmup} steps "
                f"does not end within {self.train.steps}"
            )
        self.probed_layers()

    def probed_layers(self) -> list[int]:
        """The blocks that probes look at. Raises InputError for one that is not there."""
        text, n_layer = self.probes.layers, self.model.n_layer
        if text == "all":
            return list(range(n_layer))
        layers = [int(word) for word in text.split(",") if re.fullmatch(r"0|[1-9]\d*", word)]
        if len(layers) != text.count(",") + 1 or layers != sorted(set(layers)):
            raise InputError(
                f"probes.layers takes all, or ascending layers such as 0,2,5, not {text!r}"
            )
        if layers[-1] >= n_layer:
            raise InputError(
                f"probes.layers {text}: there is no layer {layers[-1]}, "
                f"the model has 0 to {n_layer - 1}"
            )
        return layers

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> TrialConfig:
        """Build a config from dotted keys; keys left out take their defaults.

        The default of model.vocab_size is the tokenizer's number of tokens. Raises InputError,
        naming the key, for an unknown key, a value of the wrong type or one out of range.
        """
        sections: dict[str, dict[str, Scalar]] = {}
        for key, value in flat.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = check_value(key, value)
        tokenizer = sections.get("corpus", {}).get("tokenizer", TOKENIZER)
        sections.setdefault("model", {}).setdefault("vocab_size", VOCAB_SIZES[str(tokenizer)])
        types = get_type_hints(cls)
        return cls(**{section: types[section](**values) for section, values in sections.items()})

    def to_flat(self) -> dict[str, Scalar]:
        """The config as dotted keys, every knob of it, in the order of the dataclasses."""
        return {
            f"{section.name}.{entry.name}": getattr(getattr(self, section.name), entry.name)
            for section in fields(self)
            for entry in fields(getattr(self, section.name))
        }

    def identity(self, corpus_digest: str) -> dict[str, Scalar]:
        """All that decides what the trial finds.

        `corpus_digest` is the digest of the whole text that `corpus.subset` cuts from.
        """
        knobs = {
            key: value
            for key, value in self.to_flat().items()
            if KNOBS[key].metadata["in_key"]
            and not (KNOBS[key].metadata["later"] and value == KNOBS[key].default)
        }
        return {
            "experiment_version": EXPERIMENT_VERSION,
            "corpus_digest": corpus_digest,
            **knobs,
        }

    def key(self, corpus_digest: str) -> str:
        """The trial's identity as its name everywhere: 12 hex digits of a SHA-256."""
        canonical = json.dumps(self.identity(corpus_digest), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


KNOBS: dict[str, Field[Any]] = {
    f"{section}.{entry.name}": entry
    for section, kind in get_type_hints(TrialConfig).items()
    for entry in fields(kind)
}
"""Every knob by its dotted key, in the order of the dataclasses."""

TOKENIZER = str(KNOBS["corpus.tokenizer"].default)

COMPARED = tuple(
    knob
    for knob, entry in KNOBS.items()
    if (entry.metadata["in_key"] or knob == "corpus.name")
    and knob not in ("init.seed", "corpus.data_seed", "corpus.subset")
    and not knob.startswith("probes.")
)
"""The knobs that tell configurations apart: runs that differ in one of them are never averaged. Not
seeds, which are the sample; nor subsets, which have a place of their own; nor what changes no run.
"""


def varied(trials: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """The knobs in which trials differ, each trial given by its dotted keys.

    Not model.vocab_size where it is every trial's tokenizer's own: the tokenizer says it already.
    """
    differ = [knob for knob in KNOBS if len({trial[knob] for trial in trials}) > 1]
    follows = all(
        trial["model.vocab_size"] == VOCAB_SIZES.get(str(trial["corpus.tokenizer"]))
        for trial in trials
    )
    return [knob for knob in differ if not (knob == "model.vocab_size" and follows)]


def compared(knobs: Iterable[str]) -> list[str]:
    """Of the knobs in which trials differ those that name configurations: the scheme in any case,
    and others of COMPARED."""
    others = [knob for knob in knobs if knob in COMPARED and knob != "init.scheme"]
    return ["init.scheme", *others]


def knob_type(key: str) -> type:
    """int, float, str or bool: the type of the values that the knob `key` takes."""
    # Annotations are strings here (from __future__ import annotations).
    return {"int": int, "float": float, "str": str, "bool": bool}[str(KNOBS[key].type)]


def check_value(key: str, value: Any) -> Scalar:
    """`value` as the type that the knob takes. Raises InputError: the key, and what it takes."""
    if key not in KNOBS:
        raise InputError(f"unknown key {key!r}: the keys are {', '.join(KNOBS)}")
    kind, limits = knob_type(key), KNOBS[key].metadata["limits"]
    choices = KNOBS[key].metadata["choices"]
    if kind is float and type(value) is int:
        value = float(value)
    takes = {
        int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"
    }[kind]  # fmt: skip
    takes = ", ".join(choices) or takes
    takes += " and".join(f" {sign} {limit:g}" for sign, limit in limits.items())
    right_type = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    finite = right_type and value != "" and (kind is not float or math.isfinite(value))
    in_range = finite and all(COMPARE[sign](value, limits[sign]) for sign in limits)
    if not in_range or (choices and value not in choices):
        raise InputError(f"{key} takes {takes}, not {value!r}")
    return value


def parse_value(key: str, text: str) -> Scalar:
    """The value of a knob from its spelling on a command line. Raises as check_value does."""
    value: Any = text
    if key in KNOBS:
        kind = knob_type(key)
        # Where the text is no number, check_value says what the key takes.
        with contextlib.suppress(ValueError):
            value = {"true": True, "false": False}.get(text, text) if kind is bool else kind(text)
    return check_value(key, value)


def spelling(value: Scalar) -> str:
    """A knob's value as parse_value reads it: `true`, not Python's `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameters_of(entry: Callable[..., Any]) -> list[str]:
    """The knobs that an entry of a registry takes, its parameters behind the first: ["std"]."""
    return list(inspect.signature(entry).parameters)[1:]


def check_choice(
    section: str, config: Any, chooser: str, registry: Mapping[str, Callable[..., Any]]
) -> None:
    """Raise InputError for a name that the registry lacks, or a knob that its entry does not take.

    `chooser` is the knob of the section that names the entry. Only knobs that some entry takes are
    looked at, and those at their default count as not given.
    """
    chosen = getattr(config, chooser)
    if chosen not in registry:
        raise InputError(f"{section}.{chooser} {chosen!r} is unknown: take {', '.join(registry)}")
    takes = {name: parameters_of(entry) for name, entry in registry.items()}
    for entry in fields(config):
        takers = [name for name in registry if entry.name in takes[name]]
        given = getattr(config, entry.name) != entry.default
        if takers and chosen not in takers and given:
            raise InputError(
                f"{section}.{chooser} {chosen} takes no {section}.{entry.name}: "
                f"those that do are {', '.join(takers)}"
            )
