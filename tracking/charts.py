"""The points of MLflow's charts that a trial's rows become."""

from __future__ import annotations

from collections.abc import Iterator

from gptcore.records import Row, TextLossRow, TokenGroupRow, TrainingRow, WeightRow, is_primary


def chart_points(row: Row) -> Iterator[tuple[str, int, float]]:
    """Yield (metric, step, value) of a row; MLflow shows what precedes "/" as a section."""
    match row:
        case TrainingRow():
            yield "loss/train", row.step, row.loss
            yield "grad_norm/global", row.step, row.grad_norm
        case TextLossRow():
            yield f"loss/{'val' if row.text == 'held_out' else row.text}", row.step, row.loss
        case TokenGroupRow(mean_logprob=float(value)) if is_primary(row):
            yield f"logprob/{row.group}", row.step, value
        case WeightRow(kind="qkv"):
            yield f"qkv_std/layer_{row.layer:02d}", row.step, row.std
        case WeightRow(kind="q" | "k" | "v" | "proj" | "fc" | "mlp_proj"):
            inside = row.tensor.split(".", 2)[2]
            yield f"w_std/layer_{row.layer:02d}.{inside}", row.step, row.std
        case WeightRow(kind="wte" | "wpe" | "head"):
            yield f"w_std/{row.tensor}", row.step, row.std
