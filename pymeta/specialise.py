"""Compiles kernels of the CUDA executor for single calls, and keeps them on disk (native.py asks).

The native core writes the source of such a kernel where a call comes for the first time
(csrc/cuda/special.h): the call's sizes, its list of operations and the places of its arrays are
constants there. Here it is compiled, by NVRTC where the package cuda-bindings is installed, else by
nvcc where that is on the PATH; for the emulated device by the C++ compiler. What was made is kept,
so that the next process reads it:

    PYMETA_CACHE    the folder; default $XDG_CACHE_HOME/pymeta, or ~/.cache/pymeta

A call whose kernel cannot be made runs on the kernel of all calls, with one warning. The results
are the same, to the last bit where both were made by the same version of CUDA.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)
_warned: set[str] = set()
_fallback: tempfile.TemporaryDirectory[str] | None = None  # in place of the cache

# Of the C++ compiler; what the emulated device was built with, but for what takes long.
HOST_OPTIONS = (
    "-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-w", "-shared",
    "-fPIC", "-pthread", "-DPYMETA_EMULATE",
)  # fmt: skip
# Of NVRTC and nvcc: products are fused with sums where the code says so, as in all other kernels.
DEVICE_OPTIONS = ("--std=c++17", "--fmad=false", "-w")


class CannotCompile(Exception):
    """Why there is no kernel."""


def cache_folder() -> Path:
    """Where kernels are kept; it need not exist."""
    if chosen := os.environ.get("PYMETA_CACHE", "").strip():
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(caches) if caches else Path.home() / ".cache") / "pymeta"


def compiled(source: str, capability: int) -> str:
    """The path of what was made of a source.

    Args:
        source: what the native core wrote.
        capability: compute capability of the device, 90 for 9.0; 0 for the emulated one.

    Returns:
        The path, or "" where there is none; that is warned of once.
    """
    target = f"sm_{capability}" if capability else "host"
    digest = hashlib.sha256(f"{target}\n{source}".encode()).hexdigest()[:32]
    name = f"{digest}.{'cubin' if capability else 'so'}"
    try:
        folder = _own_folder()
        path = folder / name
        if not path.exists():
            began = time.perf_counter()
            _write(path, _compile(source, target))
            _logger.info("compiled %s in %.1f s", path, time.perf_counter() - began)
    except (CannotCompile, OSError) as error:
        _warn(str(error))
        return ""
    return str(path)


def failed(path: str, reason: str) -> None:
    """What was made cannot be loaded: it is deleted, and warned of."""
    Path(path).unlink(missing_ok=True)
    _warn(f"{path} could not be loaded ({reason}) and was deleted")


def _warn(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"a call has no kernel of its own, and runs on the kernel of all calls: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _own_folder() -> Path:
    """The cache; a folder of this process alone where it cannot be written to."""
    global _fallback
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    if _fallback is None:
        _fallback = tempfile.TemporaryDirectory(prefix="pymeta-")
        _warn(f"{folder} cannot be written to, so that kernels are compiled in each process anew")
    return Path(_fallback.name)


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: another process may look for it."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def finds_device_compiler() -> bool:
    """Whether there is NVRTC or nvcc."""
    try:
        has_nvrtc = importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:  # there is no `cuda` at all
        has_nvrtc = False
    return has_nvrtc or _nvcc() is not None


def _nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def _compile(source: str, target: str) -> bytes:
    if target == "host":
        compiler = shutil.which(os.environ.get("CXX") or "c++")
        if compiler is None:
            raise CannotCompile("there is no C++ compiler (CXX, or c++ on the PATH)")
        return _by_command(source, [compiler, *HOST_OPTIONS])
    for way in (_by_nvrtc, _by_nvcc):
        content = way(source, target)
        if content is not None:
            return content
    raise CannotCompile(
        'there is neither NVRTC (pip install "pymeta-kernels[nvrtc]") nor nvcc on the PATH'
    )


def _by_command(source: str, command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.out"
        given.write_text(source)
        done = subprocess.run(
            [*command, str(given), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise CannotCompile(f"{command[0]} says: {done.stderr.strip()[:2000]}")
        return made.read_bytes()


def _by_nvcc(source: str, target: str) -> bytes | None:
    nvcc = _nvcc()
    if nvcc is None:
        return None
    return _by_command(source, [nvcc, *DEVICE_OPTIONS, f"--gpu-architecture={target}", "--cubin"])


def _by_nvrtc(source: str, target: str) -> bytes | None:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        return None

    def checked(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CannotCompile(f"NVRTC says: {status.name}{_log_of(nvrtc, program)}")
        return values[0] if values else None

    program = None
    try:
        program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
        options = [
            *DEVICE_OPTIONS,
            f"--gpu-architecture={target}",
            "--device-as-default-execution-space",
        ]
        checked(
            nvrtc.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
        )
        content = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, content))
    except RuntimeError as error:  # the bindings are there, and the library is not
        raise CannotCompile(f"NVRTC: {error}") from None
    finally:
        if program is not None:
            nvrtc.nvrtcDestroyProgram(program)
    return content


def _log_of(nvrtc: Any, program: Any) -> str:
    """What NVRTC said of a program, from its beginning."""
    if program is None:
        return ""
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    return "\n" + log.decode(errors="replace").strip("\0 \n")[:2000]
