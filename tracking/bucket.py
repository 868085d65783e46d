"""The folders of a cluster in its bucket, and whose each is.

The rights that sweeps/clusters/aws_rights.py gives to machines follow these names.
"""

from __future__ import annotations

FOLDER = "gpt-sweeps"
"""All that a cluster keeps in its bucket, such as artifacts and the files of Tune."""
CHECKPOINTS = "checkpoints"
"""The part of FOLDER that workers read and write. Everything else belongs to the head alone."""
HEADS = "head"
"""The part of FOLDER with the copy of MLflow's database. To restore it runs what is in it."""
