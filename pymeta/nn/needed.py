"""Says what to install where there is no torch; imported before what needs it."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":  # it is there, but broken
        raise
    raise ImportError(
        "pymeta.nn needs torch, which is not installed: pip install 'pymeta-kernels[torch]'"
    ) from None
