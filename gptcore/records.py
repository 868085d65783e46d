"""What a trial leaves behind: the row types it emits, where they go, and how it ended.

A row is one frozen dataclass, a table is all rows of one type, and a Recorder takes rows as the
trial makes them. The same rows reach a test (MemoryRecorder), a debug run and a sweep.

Importing this module imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

SCHEMA_VERSION = 4
"""Raise it when a row type changes. Readers refuse tables of another version by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitRow:
    """What one parameter tensor was drawn from before training."""

    tensor: str  # blocks.0.attn.q
    kind: str  # q k v proj fc mlp_proj wte wpe head, or bias ln_weight ln_bias
    layer: int | None  # null outside the blocks
    draw: str  # name in DRAWS
    std: float  # of the distribution, not of the draw


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    """One step. `step` counts the updates already made: step 0 is the untrained model."""

    step: int
    loss: float  # mean cross-entropy of the step's batch, nats per token
    log_z: float  # mean log-normaliser of the batch's predictions
    grad_norm: float  # L2 norm over all parameters, before clipping
    lr: float | None  # of the update that follows; null at the last step, which has none


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRow:
    """Statistics over the elements of one parameter tensor at one step."""

    step: int
    tensor: str  # blocks.0.attn.q
    kind: str  # q k v qkv proj fc mlp_proj wte wpe head, or bias ln_weight ln_bias
    layer: int | None  # null outside the blocks
    size: int  # number of elements
    mean: float
    std: float  # of the population: divided by `size`
    excess_kurtosis: float | None  # 0 for a normal; null where all elements are equal
    max_abs: float
    frobenius: float  # root of the sum of squares
    rms_displacement: float  # root mean square of (now - at step 0)
    cosine: float | None  # of the angle between now and step 0; null where either is all zeros
    grad_rms: float  # root mean square of the step's gradient, before clipping


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRow:
    """What the update that makes step + 1 out of `step` does to one parameter tensor."""

    step: int
    tensor: str
    kind: str
    layer: int | None
    rms: float  # root mean square of (after - before)
    ratio: float | None  # rms over the root mean square before; null where all is zero before


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumRow:
    """The largest singular value of one weight matrix, and how many it stands for."""

    step: int
    tensor: str
    kind: str
    layer: int | None
    spectral_norm: float
    stable_rank: float | None  # (Frobenius / spectral norm)^2; null for a matrix of zeros


@dataclass(frozen=True, kw_only=True, slots=True)
class HistogramRow:
    """How the elements of one layer's merged QKV weight spread over fixed bins.

    `counts` has one entry more than `edges`: the first counts what lies below edges[0], the last
    what lies at or above edges[-1], entry i what lies in [edges[i-1], edges[i]).
    """

    step: int
    kind: str
    layer: int
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRow:
    """The size of one stream of activations on the probe text.

    Sites of a block: q, k, v; attn and mlp, the branches' outputs; fc, before the GELU; residual,
    the block's output. Outside the blocks: embedding, what enters the first; hidden, the head's
    input.
    """

    step: int
    site: str
    layer: int | None  # null outside the blocks
    rms: float  # root mean square over sequences, positions and channels
    max_abs: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRow:
    """Where one head looks on the probe text. Position 0, which sees itself alone, is left out."""

    step: int
    layer: int
    head: int
    entropy: float  # of a position's attention, nats; mean over sequences and positions
    entropy_share: float  # mean of entropy / log(number of positions seen): 1 for uniform attention
    max_logit: float  # largest q . k / sqrt(d_head)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLossRow:
    """How well a fixed text is predicted."""

    step: int
    text: str  # probe or held_out
    loss: float  # mean cross-entropy, nats per token
    log_z: float  # mean log-normaliser


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenGroupRow:
    """How probable the model finds a group of tokens, on some sequences.

    Means run over every pair of a position and a token of the group that `mask` leaves in.
    `sequence` leaves out the tokens among the sequence's own inputs, `prefix` those among its
    inputs so far, `batch` those among any sequence's inputs, `none` leaves out none. Values are
    null where it leaves in fewer than 20 tokens. mean_logprob = mean_logit - log_z.
    """

    step: int
    text: str  # batch: the step's own inputs; probe, held_out: the fixed texts
    group: str
    mask: str
    positions: str  # first: position 0, which has one token to go by; rest: all others
    n_tokens: float  # tokens of the group left in, mean over sequences and positions
    mean_logprob: float | None  # nats
    log_mean_prob: (
        float | None
    )  # log of the mean probability; null on the batch, and where rounding rules
    mean_logit: float | None
    log_z: float | None  # mean log-normaliser over the same pairs of position and token
    excess: float | None  # mean_logprob above the mean log-prob of the smoothed unigram model


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWeightRow:
    """The head's rows of one group of tokens: those of the token embedding where it is tied."""

    step: int
    group: str
    rms: float  # root mean square over the elements of the group's rows
    rms_displacement: float  # of (now - at step 0)


PRIMARY = {"text": "probe", "mask": "sequence", "positions": "rest"}
"""The rows of token_groups that findings rest on; the others say how much the choice matters."""


def is_primary(row: TokenGroupRow) -> bool:
    return all(getattr(row, name) == value for name, value in PRIMARY.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensRow:
    """Every token at the first or last step. Entry i of a list is of token id i.

    Rows are those of the head's weight: of the token embedding where it is tied.
    """

    step: int
    count: list[int]  # occurrences in what the trial trains on
    log_unigram: list[float]  # log-prob under the smoothed unigram model
    log_prob: list[float]  # on the probe text, mean over all positions but 0; nats
    # The same over the sequences without the token; null where every sequence has it.
    log_prob_masked: list[float | None]
    norm: list[float]  # L2 norm of the token's row
    displacement: list[float]  # L2 norm of (row now - row at step 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedTextRow:
    """A text that the trial is measured on at every step alike."""

    text: str  # probe, held_out
    digest: str  # SHA-256 of `tokens` as little-endian 16-bit numbers
    starts: list[int]  # first token of each window, in the subset
    tokens: list[int]  # ids of the windows one after another, context + 1 each


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMembersRow:
    """The tokens of one group, ascending, and how often each occurs in the trial's text."""

    group: str
    tokens: list[int]
    counts: list[int]


# A new row type goes here and into TABLES.
Row = (
    InitRow
    | TrainingRow
    | WeightRow
    | UpdateRow
    | SpectrumRow
    | HistogramRow
    | ActivationRow
    | AttentionRow
    | TextLossRow
    | TokenGroupRow
    | GroupWeightRow
    | TokensRow
    | GroupMembersRow
    | FixedTextRow
)

TABLES: dict[str, type[Row]] = {
    "init": InitRow,
    "training": TrainingRow,
    "weights": WeightRow,
    "updates": UpdateRow,
    "spectra": SpectrumRow,
    "histograms": HistogramRow,
    "activations": ActivationRow,
    "attention": AttentionRow,
    "text_losses": TextLossRow,
    "token_groups": TokenGroupRow,
    "group_weights": GroupWeightRow,
    "tokens": TokensRow,
    "group_members": GroupMembersRow,
    "fixed_texts": FixedTextRow,
}
"""Name of the Parquet file -> type of its rows."""

TABLE_OF: dict[type[Row], str] = {row_type: table for table, row_type in TABLES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """How a trial ended. A diverged trial is a result; faults are exceptions."""

    status: Literal["finished", "diverged"]
    steps: int  # updates made
    loss: float | None  # of the last recorded step; null where there is none
    reason: str  # why it diverged; empty otherwise
    device: str  # cpu, or the name of the GPU
    seconds: float  # wall time of the training loop
    tokens_per_second: float  # of this trial, whatever else its array trained in that time
    # What less precision than float32 does to the head at the last step, as head_errors.
    loss_error: float | None = None
    gradient_error: float | None = None


class Recorder(Protocol):
    """Where the rows of one trial go."""

    def log(self, rows: Sequence[Row]) -> None:
        """Take rows in the order the trial makes them."""

    def close(self, result: TrialResult) -> None:
        """Make everything logged durable. Called once, when the trial has ended by itself."""


@dataclass
class MemoryRecorder:
    """Keeps every row in memory, by table."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {table: [] for table in TABLES})
    result: TrialResult | None = None

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows[TABLE_OF[type(row)]].append(row)

    def close(self, result: TrialResult) -> None:
        self.result = result
