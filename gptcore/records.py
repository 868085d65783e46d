"""The output of a trial: the types of its rows, the recorders that take them, and its result.

A row is a frozen dataclass. A table is all rows of one type. A Recorder takes rows as the trial
makes them: MemoryRecorder in tests, other recorders in a debug run and in a sweep.

This module is fast to import: it needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

SCHEMA_VERSION = 4
"""Raise it when a row type changes, not when one is added. Readers refuse tables of another
version, and say which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitRow:
    """The distribution from which one parameter tensor was drawn."""

    tensor: str  # blocks.0.attn.q
    kind: str  # q k v proj fc mlp_proj wte wpe head, or bias ln_weight ln_bias
    layer: int | None  # null outside the blocks
    draw: str  # name of the distribution in DRAWS
    std: float  # of the distribution; the std of the drawn values differs a little


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    """The loss and gradient of one step: the model after `step` updates, untrained at step 0."""

    step: int
    loss: float  # mean cross-entropy on the batch of the step, nats per token
    log_z: float  # mean log of the sum of exp(logits) on the batch
    grad_norm: float  # L2 norm over all parameters, before clipping
    lr: float | None  # learning rate of the next update; null at the last step, which has none


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRow:
    """Statistics over the elements of one parameter tensor at one step."""

    step: int
    tensor: str  # blocks.0.attn.q
    kind: str  # q k v qkv proj fc mlp_proj wte wpe head, or bias ln_weight ln_bias
    layer: int | None  # null outside the blocks
    size: int  # number of elements
    mean: float
    std: float  # of the population: the sum of squares is divided by `size`
    excess_kurtosis: float | None  # 0 for a normal distribution; null if all elements are equal
    max_abs: float
    frobenius: float  # root of the sum of squares
    rms_displacement: float  # root mean square of (now - at step 0)
    cosine: float | None  # of the angle between now and step 0; null if one of them is all zeros
    grad_rms: float  # root mean square of the step's gradient, before clipping


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRow:
    """The effect of the update from `step` to step + 1 on one parameter tensor."""

    step: int
    tensor: str
    kind: str
    layer: int | None
    rms: float  # root mean square of (after - before)
    ratio: float | None  # rms / root mean square before the update; null if that was 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumRow:
    """The largest singular value and the stable rank of one weight matrix."""

    step: int
    tensor: str
    kind: str
    layer: int | None
    spectral_norm: float  # infinite where its square overflows
    stable_rank: float | None  # (Frobenius / spectral norm)^2; null for zeros and after an overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class HistogramRow:
    """A histogram of the elements of one block's merged QKV weight.

    `counts` has one entry more than `edges`. Entry i counts the elements in [edges[i-1], edges[i]);
    the first entry counts those below edges[0], the last those at or above edges[-1].
    """

    step: int
    kind: str
    layer: int
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRow:
    """The size of the activations at one site on the probe text.

    Sites in a block: q, k and v; attn and mlp, the outputs of the two branches; fc, the input of
    the GELU; residual, the output of the block. Sites outside the blocks: embedding, the input of
    the first block; hidden, the input of the head.
    """

    step: int
    site: str
    layer: int | None  # null outside the blocks
    rms: float  # root mean square over sequences, positions and channels
    max_abs: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRow:
    """The attention of one head on the probe text, without position 0, which sees only itself."""

    step: int
    layer: int
    head: int
    entropy: float  # of the attention of a position, nats; mean over sequences and positions
    entropy_share: float  # mean of entropy / log(number of positions seen): 1 for uniform attention
    max_logit: float  # largest q . k / sqrt(d_head)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLossRow:
    """The loss on a fixed text."""

    step: int
    text: str  # probe or held_out
    loss: float  # mean cross-entropy, nats per token
    log_z: float  # mean log of the sum of exp(logits)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenGroupRow:
    """The probability that the model gives to a group of tokens, on some sequences.

    Means are over pairs of a position and a token of the group. `mask` says which tokens are left
    out at a position: `sequence`, those among the inputs of the sequence; `prefix`, those among the
    inputs of the sequence up to the position; `batch`, those among the inputs of any sequence;
    `none`, no tokens. Values are null where fewer than 20 tokens are left.
    mean_logprob = mean_logit - log_z.
    """

    step: int
    text: str  # batch: the inputs of the step; probe, held_out: the fixed texts
    group: str
    mask: str
    positions: str  # first: position 0, which sees one token only; rest: all others
    n_tokens: float  # tokens of the group that are left, mean over sequences and positions
    mean_logprob: float | None  # nats
    # Log of the mean probability; null on the batch, and where rounding errors dominate.
    log_mean_prob: float | None
    mean_logit: float | None
    log_z: float | None  # mean log of the sum of exp(logits), over the same pairs
    excess: float | None  # mean_logprob minus the mean log-prob of the smoothed unigram model


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWeightRow:
    """The rows of the head's weight for one group of tokens. A tied head is the token embedding."""

    step: int
    group: str
    rms: float  # root mean square over the elements of the group's rows
    rms_displacement: float  # of (now - at step 0)


PRIMARY = {"text": "probe", "mask": "sequence", "positions": "rest"}
"""The rows of token_groups that findings use; the others show how much this choice matters."""


def is_primary(row: TokenGroupRow) -> bool:
    """Return whether findings use this row."""
    return all(getattr(row, name) == value for name, value in PRIMARY.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensRow:
    """Every token, at the first or the last step. Entry i of each list belongs to token id i.

    The row of a token is its row of the head's weight. A tied head is the token embedding.
    """

    step: int
    count: list[int]  # occurrences in the training text
    log_unigram: list[float]  # log-prob under the smoothed unigram model
    log_prob: list[float]  # on the probe text, mean over all positions except 0; nats
    # The same mean over the sequences without the token; null if every sequence has it.
    log_prob_masked: list[float | None]
    norm: list[float]  # L2 norm of the token's row
    displacement: list[float]  # L2 norm of (row now - row at step 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedTextRow:
    """A text on which the trial is measured again and again, and which never changes."""

    text: str  # probe, held_out
    digest: str  # SHA-256 of `tokens` as little-endian 16-bit numbers
    starts: list[int]  # position of the first token of each window in the subset
    tokens: list[int]  # token ids of all windows in order, context + 1 per window


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMembersRow:
    """The tokens of one group in ascending order, and their counts in the training text."""

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
"""The type of the rows of each table, by the name of its Parquet file."""

TABLE_OF: dict[type[Row], str] = {row_type: table for table, row_type in TABLES.items()}
"""The name of the table of each type of row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """How a trial ended. Divergence is a result; errors are exceptions."""

    status: Literal["finished", "diverged"]
    steps: int  # updates made
    loss: float | None  # of the last recorded step; null if there is none
    reason: str  # why the trial diverged; else empty
    device: str  # cpu, or the name of the GPU
    seconds: float  # wall time of the training loop
    tokens_per_second: float  # of this trial only, without the other trials of its array
    # The errors of head_errors at the last step, for trials of less precision than float32.
    loss_error: float | None = None
    gradient_error: float | None = None


class Recorder(Protocol):
    """Takes the rows of one trial.

    Callers and recorders rely on this order of the rows:

    - First come the rows that belong to no step: InitRow, GroupMembersRow, FixedTextRow.
    - Then come the rows of step 0, of step 1, and so on, and no step is missing.
    - The TrainingRow of a step is its last row. It ends the step, and comes in the same call of
      log() as the other rows of the step.

    A trial that continues from a checkpoint logs all its rows again, from the first one on. So a
    recorder that starts empty always gets the rows of a trial that was never interrupted. A
    recorder that still has the rows of the interrupted run gets equal ones a second time.
    """

    def log(self, rows: Sequence[Row]) -> None:
        """Take rows, in the order described above."""

    def close(self, result: TrialResult) -> None:
        """Store all rows and the result durably.

        It is called once, when the trial has finished or diverged, and never after an error.
        """


@dataclass
class MemoryRecorder:
    """Keeps every row in memory, by the name of its table."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {table: [] for table in TABLES})
    result: TrialResult | None = None

    def log(self, rows: Sequence[Row]) -> None:
        """Append each row to its table."""
        for row in rows:
            self.rows[TABLE_OF[type(row)]].append(row)

    def close(self, result: TrialResult) -> None:
        """Keep the result."""
        self.result = result
