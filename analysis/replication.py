"""Compare the numbers that the source reports with the numbers of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from analysis.findings import Findings
from analysis.frames import RunFrames
from analysis.runs import RunTables
from analysis.sentences import short


@dataclass(frozen=True, kw_only=True)
class Replicated:
    """A number of the source, and the same number in each scheme of a sweep."""

    what: str
    source: str
    here: str  # the result of the source's formula at the size of the sweep; empty without one
    found: Mapping[str, tuple[str, bool]]  # by scheme: the number, and whether it agrees


def replication(sweep: RunTables, findings: Findings, by_run: RunFrames) -> list[Replicated]:
    """Compare each number that the source reports with the number of each scheme of a sweep.

    The source has one model with d_model 768 and context 256. If the source's number follows from
    a formula, the sweep is compared with the formula at its own size.
    """
    knobs = sweep.trials.row(0, named=True)
    wpe = (2 / (knobs["model.context"] + knobs["model.d_model"])) ** 0.5
    schemes = list(findings.depth_gradient)

    def of_init(kind: str) -> dict[str, float]:
        rows = by_run.init_errors.filter(kind=kind).group_by("scheme").agg(pl.col("found").mean())
        return dict(rows.iter_rows())

    def near(target: float, found: Mapping[str, float]) -> dict[str, tuple[str, bool]]:
        return {
            scheme: (short(value), abs(value / target - 1) < 0.03)
            for scheme, value in found.items()
        }

    start = by_run.group_changes.filter(
        pl.col("group").is_in(["common_100", "rare_100", "never_100"])
    )
    levels = {
        str(scheme): (float(rows["start"].min()), float(rows["start"].max()))  # type: ignore[arg-type]
        for (scheme,), rows in start.drop_nulls("start").group_by("scheme")
    }
    widest = {
        scheme: max(found.widest_layer_of_runs, key=lambda layer: found.widest_layer_of_runs[layer])
        for scheme, found in findings.depth_gradient.items()
        if found.widest_layer_of_runs
    }
    taus = {scheme: found.tau.value for scheme, found in findings.depth_gradient.items()}
    orders = {
        scheme: found.orders["never_below_rare_below_common"].value
        for scheme, found in findings.rare_tokens.items()
    }
    of_groups = {
        group: {scheme: found.groups[group]["change"].value
                for scheme, found in findings.rare_tokens.items() if group in found.groups}
        for group in ("common_100", "rare_100", "never_100")
    }  # fmt: skip

    def change(group: str, *, falls: bool) -> dict[str, tuple[str, bool]]:
        return {
            scheme: (f"{value:+.2f} nats", (value < 0) == falls)
            for scheme, value in of_groups[group].items()
            if value is not None
        }

    rows = [
        Replicated(what="std of linear weights (MLP) at the start", source="0.02", here="",
                   found=near(0.02, of_init("fc"))),
        Replicated(what="std of position embeddings at the start", source="0.044",
                   here=f"sqrt(2 / (context + d_model)) = {short(wpe)}",
                   found=near(wpe, of_init("wpe"))),
        Replicated(what="std of token embeddings at the start", source="0.02", here="",
                   found=near(0.02, of_init("wte"))),
        Replicated(what="mean log-prob of all three groups at the start", source="-10.8 to -11",
                   here="", found={
                       scheme: (f"{low:.2f} to {high:.2f}" if high - low >= 0.005 else f"{low:.2f}",
                                low >= -11.05 and high <= -10.75)
                       for scheme, (low, high) in levels.items()}),
        Replicated(what="layer whose QKV weights widen most", source="0", here="",
                   found={scheme: (layer, layer == "0") for scheme, layer in widest.items()}),
        Replicated(what="earlier layers widen more: tau over depth", source="> 0", here="",
                   found={scheme: (short(tau), tau > 0) for scheme, tau in taus.items()
                          if tau is not None}),
        Replicated(what="never used < rare < common at the end", source="yes", here="",
                   found={scheme: (f"{share:.0%} of seeds", share > 0.5)
                          for scheme, share in orders.items() if share is not None}),
        Replicated(what="100 most common tokens, change", source="not below the start", here="",
                   found=change("common_100", falls=False)),
        Replicated(what="100 rare tokens, change", source="falls", here="",
                   found=change("rare_100", falls=True)),
        Replicated(what="100 unused tokens, change", source="falls", here="",
                   found=change("never_100", falls=True)),
    ]  # fmt: skip
    return [row for row in rows if any(scheme in row.found for scheme in schemes)]
