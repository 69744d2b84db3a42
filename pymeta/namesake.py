"""The other `pymeta`: a parser generator of 2013 that installs into the folder of this package.

`pip install pymeta` installs that one; this package's distribution is `pymeta-kernels`. Installed
last, the parser replaces our `__init__.py`; installed first, its files lie beside ours, and
uninstalling it removes files of ours. Both are told here, with the way out.
"""

from __future__ import annotations

import warnings

CURE = "python -m pip uninstall -y pymeta pymeta-kernels, then python -m pip install pymeta-kernels"


def require_ours() -> None:
    """ImportError where the package `pymeta` is the parser's, which then lacks all our names."""
    import pymeta

    if not hasattr(pymeta, "_HOMES"):
        raise ImportError(
            f"{pymeta.__file__} belongs to another package, the parser generator that "
            f"`pip install pymeta` installs; it replaced that of pymeta-kernels. To repair: {CURE}"
        )


def warn_of_files() -> None:
    """Warn that the parser's files lie in our folder; `pymeta/__init__.py` has seen one there."""
    warnings.warn(
        "the parser generator that `pip install pymeta` installs lies in the same folder as "
        "pymeta-kernels. Both cannot be installed, and uninstalling the parser alone removes "
        f"files of this package. To repair: {CURE}",
        stacklevel=3,
    )
