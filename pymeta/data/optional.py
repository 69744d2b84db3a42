"""`need`, where the parts that stand on tables look for it."""

from pymeta.spec.optional import need

__all__ = ["need"]
