"""The files of a Hugging Face directory: weights in one file or several with an index, read and written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open

from megaloop.checkpoint.tensor_file import LazyTensor, write_tensors
from megaloop.errors import MegaloopError
from megaloop.files import fsync_path

__all__ = ["OutputDirectory", "open_weights", "read_json", "write_json", "write_weights"]

FILE_BYTES = 5_000_000_000
"""Largest file of weights, unless one tensor alone is larger."""
_LARGEST_JSON = 1 << 26
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def open_weights(source: Path, stack: ExitStack) -> dict[str, Any]:
    """The opened safetensors file of each tensor.

    Of a directory with an index only the files that it names are read, as transformers does; else
    ``model.safetensors``; else every ``*.safetensors`` file.

    Raises:
        MegaloopError: pickled weights only, no weights, a file that is missing or damaged, a tensor in two files.
    """
    stored: dict[str, Any] = {}
    for path in _weight_files(source):
        if path.exists() and not path.is_file():
            raise MegaloopError(f"{path}: no file; expected weights in safetensors")
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise MegaloopError(f"{source}: {path.name} is missing; the directory is not complete") from None
        except (SafetensorError, OSError) as error:
            raise MegaloopError(f"{path}: damaged, or no safetensors file ({error})") from None
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            if name in stored:
                raise MegaloopError(f"{source}: tensor {name} is in several files; remove those that do not belong")
            stored[name] = opened
    return stored


def _weight_files(source: Path) -> list[Path]:
    if (source / _INDEX).exists():
        names = read_json(source / _INDEX).get("weight_map")
        values = set(names.values()) if isinstance(names, dict) else set()
        if not values or not all(
            isinstance(name, str) and Path(name).name == name and name.isprintable() for name in values
        ):
            raise MegaloopError(f"{source}: {_INDEX} does not map tensors to files of the directory")
        return [source / name for name in sorted(values)]
    if (source / _SINGLE).exists():
        return [source / _SINGLE]
    if files := sorted(source.glob("*.safetensors")):
        return files
    if pickled := sorted([*source.glob("*.bin"), *source.glob("*.pt"), *source.glob("*.pth")]):
        raise MegaloopError(
            f"{source}: only pickled weights ({pickled[0].name}), which are never loaded; convert them to safetensors"
        )
    raise MegaloopError(f"{source}: no *.safetensors files")


def write_weights(tensors: Iterable[LazyTensor], folder: Path) -> tuple[int, int]:
    """Write tensors as one file, or as several with an index, one tensor in memory at a time.

    Returns:
        How many files, and the tensors' bytes.
    """
    parts: list[list[LazyTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if parts[-1] and filled + tensor.bytes > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.bytes
    total = sum(tensor.bytes for part in parts for tensor in part)
    if len(parts) == 1:
        write_tensors(folder / _SINGLE, parts[0])
        return 1, total
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / name, part)
        weight_map |= {tensor.name: name for tensor in part}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(parts), total


class OutputDirectory:
    """A hidden directory beside ``out`` that becomes it where the block ends well, and is gone where it does not.

    Raises:
        MegaloopError: ``out`` is not empty, or the disk is full, fails, or may not be written.
    """

    def __init__(self, out: Path):
        self._out = out.absolute()
        self._partial = self._out.with_name(f".{self._out.name}.partial-{os.getpid()}")

    def __enter__(self) -> Path:
        try:
            if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
                raise MegaloopError(f"output {self._out} is not empty; choose another directory")
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._failure(error) from None
        return self._partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as late:
            raise self._failure(late) from None
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._failure(error) from None

    def _publish(self) -> None:
        for path in (*self._partial.iterdir(), self._partial):
            fsync_path(path)
        if self._out.exists():
            self._out.rmdir()
        self._partial.rename(self._out)
        fsync_path(self._out.parent)

    def _failure(self, error: OSError) -> MegaloopError:
        reason = error.strerror or error
        return MegaloopError(f"output {self._out} cannot be written ({reason}); nothing was left behind")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; MegaloopError where it holds none."""
    try:
        if path.exists() and not path.is_file():
            raise MegaloopError(f"{path}: no file")
        if path.is_file() and path.stat().st_size > _LARGEST_JSON:
            raise MegaloopError(f"{path}: implausibly large; expected at most {_LARGEST_JSON} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MegaloopError(f"{path.parent}: no {path.name}; expected a directory in Hugging Face format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MegaloopError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise MegaloopError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
