"""Subcommands of `pymeta` on files: `inspect`, `adapt`, `predict`. None imports torch."""
