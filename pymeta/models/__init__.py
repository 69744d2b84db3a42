"""Adapted models, stacked for all tasks; adapters; the files of both."""
