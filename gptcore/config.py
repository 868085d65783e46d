"""The configuration of one trial: its knobs, their names and ranges, and the trial's key.

A knob has one name everywhere: `init.scheme` is the path in these dataclasses, the flag on the
command line, the entry in Tune's config, the MLflow param and the column in the analysis.

This module is fast to import: it needs neither torch nor numpy. It is one file because the knobs,
the checks of their values and the key change together.
"""

from __future__ import annotations

import contextlib
import difflib
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
"""Part of every trial key. Raise it when a change to gptcore changes the numbers of a trial.

A new table changes none: runs that exist stay as they are, without the table."""


KEY_LENGTH = 12
"""Hex digits of a trial key."""

VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}
"""The number of tokens of each tokenizer, with <|endoftext|>."""

LARGEST_INTEGER = 2**53
"""The largest whole number that a knob takes: every program that reads JSON reads it exactly."""

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class InputError(ValueError):
    """Wrong input of a user. The message is one sentence: what is wrong, and what is accepted.

    Commands print it on stderr and exit with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean gpt2? ` where a known word is close to this one; else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def seed_of(*words: str | int) -> int:
    """Return a 64-bit seed for one use of randomness.

    No draw depends on a global state, or on the number of draws elsewhere.

    Args:
        words: they name the use, and contain the seed that the user gave.
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
    """Declare a knob, which is a field of a config dataclass.

    Args:
        default: the value of a trial that does not set the knob.
        doc: a phrase for --help.
        low, high: smallest and largest value.
        above, below: limits that the value itself must not reach.
        choices: the values of a knob that takes one of a few words.
        in_key: whether the knob is part of the trial key. False for a knob that changes how a trial
            runs, but not its numbers.
        later: whether the knob is newer than the first trials. At its default it is then left out
            of the key, so that older trials keep their keys.
    """
    if type(default) is int and high is None:
        high = LARGEST_INTEGER
    limits = {">=": low, "<=": high, ">": above, "<": below}
    limits = {sign: limit for sign, limit in limits.items() if limit is not None}
    metadata = {"doc": doc, "limits": limits, "choices": choices, "in_key": in_key}
    metadata["later"] = later
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the GPT, which has no dropout."""

    n_layer: int = knob(6, "number of blocks", low=1, high=1000)
    n_head: int = knob(4, "attention heads per block", low=1, high=10**7)
    d_model: int = knob(64, "width of the residual stream", low=1, high=10**7)
    context: int = knob(64, "tokens per sequence", low=2, high=10**6)
    vocab_size: int = knob(
        50257,
        "rows of the token embedding; by default the number of tokens of the tokenizer",
        low=1,
        high=10**7,
    )
    tied: bool = knob(True, "whether the output head and the token embedding share their weight")
    norm: str = knob(
        "pre",
        "LayerNorm before each branch (pre), after each residual sum (post), or after each sum "
        "with the scaled residual of DeepNet (deepnet)",
        choices=("pre", "post", "deepnet"),
    )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Initial values of the parameters."""

    scheme: str = knob("model5", "rule for the initial weights")
    std: float = knob(0.02, "standard deviation, for schemes that take one", above=0.0)
    cut: float = knob(
        2.0, "where truncated_normal is cut, in standard deviations before the cut", low=0.01
    )
    nu: float = knob(5.0, "degrees of freedom of student_t", above=2.0)
    gain: float = knob(1.0, "factor on the std, for schemes that take one", above=0.0)
    seed: int = knob(0, "seed of the initial weights", low=0)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The text of the trial, and the order of its batches."""

    # The key has the digest of the text instead: a trial on the same bytes under another name or
    # path is the same trial.
    name: str = knob("gulliver", "name of a corpus, or path of a UTF-8 text file", in_key=False)
    tokenizer: str = knob(
        "gpt2",
        "tokens: pieces of GPT-2's byte-pair encoding (gpt2), or single bytes (bytes)",
        choices=tuple(VOCAB_SIZES),
        later=True,
    )
    subset: str = knob(
        "all", "part of the text: `all`, a section such as `part-1`, or fractions such as `0-0.25`"
    )
    data_seed: int = knob(
        0, "seed of the batches, and of draws among tokens of equal count; in a sweep, the same as "
        "init.seed unless given", low=0,
    )  # fmt: skip
    windows: int = knob(
        4, "sequences in each of the two fixed texts, probe and held_out", low=1, high=10**6
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its learning rate."""

    name: str = knob("adamw", "optimiser")
    lr: float = knob(1e-3, "highest learning rate", above=0.0)
    schedule: str = knob("constant", "shape of the learning rate after the warm-up")
    warmup: int = knob(0, "steps in which the learning rate rises to lr", low=0)
    clip: float = knob(0.0, "largest norm of the gradient, 0 for no limit", low=0.0)
    beta1: float = knob(0.9, "Adam's decay of the first moment", low=0.0, below=1.0)
    beta2: float = knob(0.999, "Adam's decay of the second moment", low=0.0, below=1.0)
    eps: float = knob(1e-8, "added to the square root of Adam's second moment", above=0.0)
    momentum: float = knob(0.9, "decay of the velocity of sgd", low=0.0, below=1.0)
    # 0 by default, so that only its gradient moves the row of a token that never occurs.
    weight_decay: float = knob(0.0, "weight decay, decoupled in adamw and coupled_adam", low=0.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the training, size of the batches, precision and device."""

    steps: int = knob(200, "optimiser updates", low=1, high=10**7)
    batch_size: int = knob(8, "sequences per step", low=1, high=10**6)
    precision: str = knob(
        "float32",
        "precision of products: tf32 is TensorFloat-32, which a GPU has; bf16-head is bfloat16 in "
        "the head only, bf16 in the complete model",
        choices=("float32", "tf32", "bf16-head", "bf16"),
        later=True,
    )
    checkpoint_seconds: float = knob(
        10.0,
        "shortest time between checkpoints, which take at most 1 % of the time of the trial",
        low=0.0,
        in_key=False,
    )
    device: str = knob(
        "auto",
        "device; auto uses a GPU if there is one",
        choices=("auto", "cpu", "cuda"),
        in_key=False,
    )


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """How often probes measure the model. All probes measure step 0 and the last step."""

    every: int = knob(
        10,
        "steps between rows on weights, updates, activations and token groups of the batch",
        low=1,
    )
    text_every: int = knob(50, "steps between rows on the fixed texts", low=1)
    histogram_every: int = knob(50, "steps between histograms", low=1)
    spectrum_every: int = knob(50, "steps between rows on singular values", low=1)
    layers: str = knob(
        "all", "the blocks to measure: all, or their numbers in ascending order, such as 0,2,5"
    )


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """All knobs of a trial. `TrialConfig()` is the default trial."""

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
        """Return the blocks to measure. Raises InputError for a block that does not exist."""
        text, n_layer = self.probes.layers, self.model.n_layer
        if text == "all":
            return list(range(n_layer))
        layers = [int(word) for word in text.split(",") if re.fullmatch(r"0|[1-9]\d*", word)]
        if len(layers) != text.count(",") + 1 or layers != sorted(set(layers)):
            raise InputError(
                f"probes.layers takes all, or layers in ascending order such as 0,2,5, not {text!r}"
            )
        if layers[-1] >= n_layer:
            raise InputError(
                f"probes.layers {text}: there is no layer {layers[-1]}, "
                f"the model has 0 to {n_layer - 1}"
            )
        return layers

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> TrialConfig:
        """Build a config from dotted keys; missing keys take their defaults.

        The default of model.vocab_size is the number of tokens of the tokenizer.

        Raises:
            InputError: a key is unknown, or its value has the wrong type or is out of range. The
                message names the key.
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
        """Return every knob by its dotted key, in the order of the dataclasses."""
        return {
            f"{section.name}.{entry.name}": getattr(getattr(self, section.name), entry.name)
            for section in fields(self)
            for entry in fields(getattr(self, section.name))
        }

    def identity(self, corpus_digest: str) -> dict[str, Scalar]:
        """Return all that decides the numbers of the trial.

        Args:
            corpus_digest: digest of the complete text, from which `corpus.subset` takes a part.
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
        """Return the key that names the trial: 12 hex digits of the SHA-256 of its identity."""
        canonical = json.dumps(self.identity(corpus_digest), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]


KNOBS: dict[str, Field[Any]] = {
    f"{section}.{entry.name}": entry
    for section, kind in get_type_hints(TrialConfig).items()
    for entry in fields(kind)
}
"""Every knob by its dotted key, in the order of the dataclasses."""

TOKENIZER = str(KNOBS["corpus.tokenizer"].default)

COMPARED_KNOBS = tuple(
    knob
    for knob, entry in KNOBS.items()
    if (entry.metadata["in_key"] or knob == "corpus.name")
    and knob not in ("init.seed", "corpus.data_seed", "corpus.subset")
    and not knob.startswith("probes.")
)
"""The knobs that define a configuration: trials that differ in one of them are never averaged.

Left out are the seeds, which make the sample; the subset, which the analysis treats separately; and
knobs that do not change the training.
"""


def varying_knobs(trials: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """List the knobs in which trials differ.

    model.vocab_size is left out where it always is the number of tokens of the tokenizer, because
    corpus.tokenizer then says the same.

    Args:
        trials: the knobs of each trial by their dotted keys.
    """
    differ = [knob for knob in KNOBS if len({trial[knob] for trial in trials}) > 1]
    follows = all(
        trial["model.vocab_size"] == VOCAB_SIZES.get(str(trial["corpus.tokenizer"]))
        for trial in trials
    )
    return [knob for knob in differ if not (knob == "model.vocab_size" and follows)]


def compared_knobs(varying: Iterable[str]) -> list[str]:
    """List the knobs that name the configurations of trials.

    Args:
        varying: the knobs in which the trials differ.

    Returns:
        init.scheme always, then those of `varying` that are in COMPARED_KNOBS.
    """
    others = [knob for knob in varying if knob in COMPARED_KNOBS and knob != "init.scheme"]
    return ["init.scheme", *others]


def knob_type(key: str) -> type:
    """Return the type of the values of a knob: int, float, str or bool."""
    # Annotations are strings here (from __future__ import annotations).
    return {"int": int, "float": float, "str": str, "bool": bool}[str(KNOBS[key].type)]


def check_value(key: str, value: Any) -> Scalar:
    """Return `value` in the type of the knob. Raises InputError with the key and what it takes."""
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
    takes += " and".join(f" {sign} {plain(limit)}" for sign, limit in limits.items())
    right_type = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    finite = right_type and value != "" and (kind is not float or math.isfinite(value))
    in_range = finite and all(COMPARISONS[sign](value, limits[sign]) for sign in limits)
    if not in_range or (choices and value not in choices):
        raise InputError(f"{key} takes {takes}, not {value!r}")
    checked: Scalar = value
    return checked


def plain(limit: float) -> str:
    """Write a limit of a knob: whole numbers with all their digits."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def parse_value(key: str, text: str) -> Scalar:
    """Read the value of a knob from a command line. Raises what check_value raises."""
    value: Any = text
    if key in KNOBS:
        kind = knob_type(key)
        # If the text is not a number, check_value says what the key takes.
        with contextlib.suppress(ValueError):
            value = {"true": True, "false": False}.get(text, text) if kind is bool else kind(text)
    return check_value(key, value)


def spelling(value: Scalar) -> str:
    """Write the value of a knob as parse_value reads it: `true`, not Python's `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameters_of(entry: Callable[..., Any]) -> list[str]:
    """List the knobs that an entry of a registry takes: its parameters after the first, ["std"]."""
    return list(inspect.signature(entry).parameters)[1:]


def check_choice(
    section: str, config: Any, chooser: str, registry: Mapping[str, Callable[..., Any]]
) -> None:
    """Check the choice of an entry of a registry, and that it takes the knobs that are given.

    Knobs that no entry takes are not checked. A knob at its default counts as not given.

    Args:
        section: name of the section, such as init.
        config: the section.
        chooser: the knob of the section that names the entry, such as scheme.
        registry: the entries by name; their parameters after the first are knobs of the section.

    Raises:
        InputError: the registry lacks the entry, or the entry does not take a knob.
    """
    chosen = getattr(config, chooser)
    if chosen not in registry:
        raise InputError(
            f"{section}.{chooser} {chosen!r} is unknown: {did_you_mean(chosen, registry)}"
            f"take one of {', '.join(registry)}"
        )
    takes = {name: parameters_of(entry) for name, entry in registry.items()}
    for entry in fields(config):
        takers = [name for name in registry if entry.name in takes[name]]
        given = getattr(config, entry.name) != entry.default
        if takers and chosen not in takers and given:
            raise InputError(
                f"{section}.{chooser} {chosen} does not take {section}.{entry.name}: "
                f"leave it out, or take one of {', '.join(takers)}"
            )
