"""The colours of schemes in the report and on MLflow's pages."""

from __future__ import annotations

# The colours of Okabe & Ito, which people with any kind of colour vision can distinguish. The last
# colour is our own.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31"]
