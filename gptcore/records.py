"""What a trial leaves behind: the row types it emits, where they go, and how it ended.

A row is one frozen dataclass, a table is all rows of one type, and a Recorder takes rows as the
trial makes them. The same rows reach a test (MemoryRecorder), a debug run and a sweep.

Importing this module imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

SCHEMA_VERSION = 2
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
class TokenGroupRow:
    """How probable the model finds a group of tokens, on the inputs of one batch.

    Means run over every position of the batch and every token of the group that `mask` leaves in:
    `sequence` leaves out, for each sequence, the tokens among that sequence's inputs; `batch`
    those among any sequence's inputs; `none` leaves out none. Below 20 tokens they are null.
    mean_logprob = mean_logit - log_z.
    """

    step: int
    group: str
    mask: str
    n_tokens: float  # tokens of the group left in, mean over the sequences
    mean_logprob: float | None  # nats
    mean_logit: float | None
    log_z: float | None  # mean log-normaliser over the same pairs of sequence and token


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
    | TokenGroupRow
    | GroupMembersRow
)

TABLES: dict[str, type[Row]] = {
    "init": InitRow,
    "training": TrainingRow,
    "weights": WeightRow,
    "updates": UpdateRow,
    "spectra": SpectrumRow,
    "histograms": HistogramRow,
    "token_groups": TokenGroupRow,
    "group_members": GroupMembersRow,
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
    tokens_per_second: float


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
