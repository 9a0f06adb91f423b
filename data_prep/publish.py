"""Where a data set is written, and how it comes to its place: by the rename of one file.

The parts are written to a folder within the output directory (which may be a link or a mount point). ``data.json``
names that folder, and moving data.json to its place publishes all of it: before, what was there is whole, afterwards the
new data set is. What follows only tidies up: the parts move to their usual places, data.json is written again without
the folder, and the folder goes, with the old parts in it. A reader looks for a part in the folder first and then beside
data.json (:meth:`megaloop.data.dataset.DataSet.part`), so whenever this is killed, one whole data set is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megaloop.data.description import DATA_JSON, Description
from megaloop.errors import MegaloopError
from megaloop.files import fsync_path, replace_file

__all__ = ["Output"]

_PARTIAL = ".partial-"
"""How the folder of a prep under way begins. One that was killed leaves it, and the next prep removes it."""
_LOCK = ".lock"
"""Ends the name of the file, beside the folder, that a prep holds locked while it works there."""


class Output:
    """The directory of a data set that is being made; a context, which leaves nothing unfinished behind.

    Attributes:
        folder: where to write the parts; exists within the context.
    """

    def __init__(self, path: Path, overwrite: bool, needed: Sequence[Path]):
        """Check that a data set may be written there.

        Args:
            overwrite: replace a data set that is there.
            needed: files that are read; they must not lie in a directory that is overwritten.

        Raises:
            MegaloopError: there is something else than a data set, or one of ``needed``.
        """
        self.path, self._overwrite = path.absolute(), overwrite
        self.folder = self.path / f"{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
        self._lock: int | None = None
        self._check(needed)

    def _check(self, needed: Sequence[Path] = ()) -> None:
        out = self.path
        try:
            if out.is_symlink() and not out.exists():
                raise MegaloopError(
                    f"output {out} is a link to {out.readlink()}, which does not exist; make that directory, or remove the link"
                )
            if not out.exists() or all(path.name.startswith(_PARTIAL) for path in out.iterdir()):
                return
        except NotADirectoryError:
            raise MegaloopError(f"output {out} is a file; choose a directory") from None
        except OSError as error:
            raise MegaloopError(f"output {out}: cannot be read ({error.strerror}); choose another directory") from None
        if not self._overwrite:
            raise MegaloopError(
                f"output {out} is not empty; choose another directory, or pass --overwrite to replace it"
            )
        if not (out / DATA_JSON).is_file():
            raise MegaloopError(
                f"output {out} holds no data set (no {DATA_JSON}), so it is not overwritten; choose another"
            )
        for path in needed:
            if path.resolve().is_relative_to(out.resolve()):
                raise MegaloopError(
                    f"output {out} holds the input {path}, so it is not overwritten; choose another directory"
                )

    def __enter__(self) -> Output:
        self._existed = self.path.is_dir()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _remove_remains(self.path)
            self._lock = os.open(_lock_of(self.folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with contextlib.suppress(OSError):  # a file system without locks: nothing can be told of this prep then
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.folder.mkdir()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._leave()
        if isinstance(error, OSError):
            raise self._explain(error) from None

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # data.json cannot be read: it may name the folder
            if _folder_in_use(self.path) != self.folder.name:
                shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                _lock_of(self.folder).unlink(missing_ok=True)
            os.close(self._lock)
        if not self._existed:
            with contextlib.suppress(OSError):  # not there, or in use: by the data set, or by somebody else
                self.path.rmdir()

    def _explain(self, error: OSError) -> MegaloopError:
        left = [path for path in (self.folder, _lock_of(self.folder)) if path.exists()]
        what = f"what it wrote could not be removed: {', '.join(map(str, left))}" if left else "nothing was left behind"
        if (self.path / DATA_JSON).exists():
            what += ", and the data set that was there is as it was"
        return MegaloopError(
            f"output {self.path}: cannot be written ({error.strerror or error}); make room or fix the permissions, "
            f"and start again: {what}"
        )

    def publish(
        self, description: Description, parts: Sequence[str], gone: Sequence[str], on_note: Callable[[str], None]
    ) -> None:
        """Make what is in the folder the data set of the directory.

        Args:
            parts: names of the files and directories in the folder that belong to it.
            gone: names that only the data set before may have had.
            on_note: is told where the new data set is in its place and whole, but something could not be tidied up.

        Raises:
            MegaloopError: somebody else was faster.
            OSError: the disk; what was there is whole.
        """
        temporary = description.model_copy(update={"folder": self.folder.name})
        _write(self.folder / DATA_JSON, temporary)
        for path in [*self.folder.rglob("*"), self.folder]:
            fsync_path(path)
        with _alone(self.path):
            self._check()
            (self.folder / DATA_JSON).replace(self.path / DATA_JSON)
            try:
                self._tidy(description, parts, gone)
            except OSError as error:
                on_note(
                    f"output {self.path}: the new data set is there and whole, but the old one's parts could not all be "
                    f"removed ({error.strerror or error}); the next prep --overwrite tries again"
                )

    def _tidy(self, description: Description, parts: Sequence[str], gone: Sequence[str]) -> None:
        fsync_path(self.path)
        for name in (*parts, *gone):
            if os.path.lexists(self.path / name):  # a link moves as a link: what it points to stays as it is
                (self.path / name).rename(self.folder / f"old-{name}")
            if name in parts:
                (self.folder / name).rename(self.path / name)
        fsync_path(self.path)
        fsync_path(self.folder)
        _write(self.folder / DATA_JSON, description)
        (self.folder / DATA_JSON).replace(self.path / DATA_JSON)
        fsync_path(self.path)
        shutil.rmtree(self.folder)
        _remove_remains(self.path)  # the folder of the data set before, if its prep was killed while it tidied up


def _write(path: Path, description: Description) -> None:
    """Write data.json; a folder is only named where there is one."""
    replace_file(path, description.to_json())


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _folder_in_use(out: Path) -> str | None:
    """The folder that data.json names; None: none. Raises OSError where it is there and cannot be read."""
    try:
        folder = json.loads((out / DATA_JSON).read_bytes())["folder"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return folder if isinstance(folder, str) else None


def _remove_remains(out: Path) -> None:
    """Remove the folders of preps that were killed: those that no prep holds locked, and that data.json does not name."""
    used = _folder_in_use(out)
    names = {path.name.removesuffix(_LOCK) for path in out.iterdir() if path.name.startswith(_PARTIAL)}
    for name in names - {used}:
        with contextlib.suppress(OSError):  # held, or somebody else's: it stays
            _remove(out / name)


def _remove(folder: Path) -> None:
    try:
        lock = os.open(_lock_of(folder), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # a prep makes it before the folder: this is of a version that had no such file
        shutil.rmtree(folder)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            shutil.rmtree(folder)
        _lock_of(folder).unlink(missing_ok=True)
    finally:
        os.close(lock)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep others out who publish in the same directory, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
