"""The versions of the model: files in a folder, one of which serves.

    models/
      v0001-3f9a1c20.safetensors     a version: its number, and the beginning of its SHA-256
      v0002-77be0d15.safetensors
      versions.json                  what is known of each, and which served when

Versions do not change once they are there. `versions.json` is replaced as a whole, so that a
process that is killed leaves the old one or the new one. Other processes may add versions and
promote them (`pymeta retrain` does); the service notices. No request names a file: a version's name
is looked up among those that `versions.json` has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pymeta.models.adapter import Adapter
from pymeta.serve.model import Model, Shape

_NAME = re.compile(r"v\d{4,}-[0-9a-f]{8}")
_KEPT_HISTORY = 100


class Refused(ValueError):
    """A file that will not serve; the message says why."""


@dataclass(frozen=True)
class Version:
    """What is known of a version.

    Attributes:
        name: of it, and of its file without the suffix.
        sha256: of its file.
        created: when it came here, RFC 3339.
        source: where from: "file", "retrain", "upload".
        report: how it was found to be no worse, where it was trained here.
    """

    name: str
    sha256: str
    created: str
    source: str
    report: dict[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """`versions.json`.

    Attributes:
        versions: oldest first.
        served: the names of those that served, the serving one last.
        source: SHA-256 of the file that the service was started with, as last imported.
    """

    versions: tuple[Version, ...] = ()
    served: tuple[str, ...] = ()
    source: str | None = None

    @property
    def serving(self) -> str | None:
        """The name of the version that serves."""
        return self.served[-1] if self.served else None

    def of(self, name: str) -> Version:
        """The version of a name; Refused where there is none."""
        for version in self.versions:
            if version.name == name:
                return version
        raise Refused(f"there is no version {name[:60]}")


@dataclass
class Registry:
    """A folder of versions; usable from several threads and processes.

    Args:
        folder: made where it is not there.
    """

    folder: Path
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    # ---- reading ------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """What `versions.json` says; Refused where it is damaged."""
        try:
            given = json.loads((self.folder / "versions.json").read_bytes())
        except FileNotFoundError:
            return Manifest()
        except ValueError:
            raise Refused("versions.json is damaged: restore it, or begin a new folder") from None
        try:
            versions = tuple(Version(**version) for version in given["versions"])
            found = Manifest(versions, tuple(given["served"]), given["source"])
            for version in versions:
                if not _NAME.fullmatch(version.name):
                    raise TypeError
            if found.serving is not None:
                found.of(found.serving)
        except (TypeError, KeyError, Refused):
            raise Refused("versions.json is damaged: restore it, or begin a new folder") from None
        return found

    def load(self, name: str) -> Model:
        """A version, its file checked against its SHA-256; Refused where that cannot be."""
        version = self.manifest().of(name)
        path = self._path(name)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != version.sha256:
                raise Refused(f"{name}: the file has changed since it came here")
            return Model(name, Adapter.load(path))
        except OSError as error:
            raise Refused(f"{name}: {error.strerror or type(error).__name__}") from None
        except (ValueError, TypeError) as error:
            raise Refused(f"{name}: {_without(str(error), self.folder)}") from None

    # ---- writing ------------------------------------------------------------------------------

    def add_file(self, path: Path, source: str, report: dict[str, Any] | None = None) -> Version:
        """Copy a file into the folder as a version; one that is there already is not copied.

        Raises:
            Refused: it is no adapter.
            OSError: it cannot be read, or the copy cannot be written.
        """
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        with self._alone() as manifest:
            for version in manifest.versions:
                if version.sha256 == digest and self._path(version.name).exists():
                    return version
            number = 1 + max((int(v.name[1:].split("-")[0]) for v in manifest.versions), default=0)
            name = f"v{number:04}-{digest[:8]}"
            _write(self._path(name), data)
            try:
                Adapter.load(self._path(name))
            except (ValueError, TypeError) as error:
                self._path(name).unlink()
                raise Refused(f"{path.name}: {_without(str(error), self.folder)}") from None
            created = datetime.now(timezone.utc).isoformat(timespec="seconds")
            version = Version(name, digest, created, source, report)
            self._save(replace(manifest, versions=(*manifest.versions, version)))
        return version

    def promote(self, name: str) -> str | None:
        """Let a version serve; the name of the one that did."""
        with self._alone() as manifest:
            manifest.of(name)
            before = manifest.serving
            if before != name:
                served = (*manifest.served, name)[-_KEPT_HISTORY:]
                self._save(replace(manifest, served=served))
            return before

    def roll_back(self) -> tuple[str, str]:
        """Let the version that served before serve again: (its name, that of the one before).

        Raises:
            Refused: there is none.
        """
        with self._alone() as manifest:
            if len(manifest.served) < 2:
                raise Refused("no version served before this one")
            self._save(replace(manifest, served=manifest.served[:-1]))
            return manifest.served[-2], manifest.served[-1]

    def import_source(self, path: Path) -> Version | None:
        """Make a version of the service's own file, unless that is what `imported` remembers.

        Raises:
            Refused: it is no adapter.
            OSError: it cannot be read, or the copy cannot be written.
        """
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.manifest().source == digest:
            return None
        return self.add_file(path, "file")

    def imported(self, version: Version) -> None:
        """Remember that the service's own file is this version, and serves or has served."""
        with self._alone() as manifest:
            self._save(replace(manifest, source=version.sha256))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise Refused(f"{name[:60]!r} is no version's name")
        return self.folder / f"{name}.safetensors"

    def _save(self, manifest: Manifest) -> None:
        _write(
            self.folder / "versions.json",
            json.dumps(asdict(manifest), indent=1, allow_nan=False).encode(),
        )

    @contextmanager
    def _alone(self) -> Iterator[Manifest]:
        """The manifest, while no other thread or process changes it."""
        with self._lock, (self.folder / ".lock").open("ab") as file:
            _lock_file(file.fileno())  # let go when the file is closed, or its process ends
            yield self.manifest()


def check_shape(before: Shape, after: Shape) -> None:
    """Refused where clients of the one would be broken by the other."""
    if before != after:
        raise Refused(
            f"the new model has another shape: {after}; the serving one has {before}. Clients and "
            f"stored rows have the old shape: start a service of its own for the new one"
        )


def _lock_file(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: only one process may change the folder at a time
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _without(message: str, folder: Path) -> str:
    """An error's words without the folder that they begin with."""
    return message.replace(f"{folder}{os.sep}", "")
