"""The colours of init schemes, the same ones in the report and on MLflow's pages."""

from __future__ import annotations

# Okabe & Ito's colours, which differ for every kind of colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31"]
