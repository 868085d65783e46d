"""Trials that Optuna suggests."""
