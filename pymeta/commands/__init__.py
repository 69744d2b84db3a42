"""Subcommands of `pymeta`: `inspect`, `adapt`, `predict` (without torch), and `finance`."""
