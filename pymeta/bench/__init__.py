"""pymeta's benchmarks, installed with it: `python -m pymeta.bench` (see `__main__.py`)."""
