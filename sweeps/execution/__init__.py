"""Trials on Ray: its machines, its workers, and what goes wrong there."""
