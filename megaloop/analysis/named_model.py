"""Models as a user names them: checkpoints, runs, and Hugging Face directories, which are imported for as long as they are looked at."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megaloop.checkpoint import Checkpoint, resolve_checkpoint
from megaloop.errors import MegaloopError
from megaloop.huggingface.weights import import_huggingface
from megaloop.runtime.collectives import broadcast_object, gather_objects, raise_on_all_ranks
from megaloop.runtime.share import rank
from megaloop.tokenizer import find_tokenizer

__all__ = ["NamedModel", "open_named"]

_DESCRIBED, _COMPLETE = "described", "complete"


@dataclass(frozen=True)
class NamedModel:
    """A model that was found.

    Attributes:
        name: the path that the user gave.
        checkpoint: it, or of one that is imported what describes it: no tensors.
        folder: where an import lies; None: it is none.
        group: the first rank alone, which imports.
    """

    name: Path
    checkpoint: Checkpoint
    folder: Path | None = None
    group: dist.ProcessGroup | None = None

    @contextmanager
    def complete(self) -> Iterator[Path]:
        """The checkpoint with its tensors; an import is removed afterwards, so that one at a time takes room."""
        if self.folder is None:
            yield self.checkpoint.path
            return
        path = self.folder / _COMPLETE
        _import(self.name, path, self.group)
        yield path
        gather_objects(None)  # the others have read what they need
        if rank() == 0:
            shutil.rmtree(path)

    @contextmanager
    def errors(self, say_which: bool) -> Iterator[None]:
        """Errors within it name what the user gave, not where it was imported to.

        Args:
            say_which: there are several models: each error begins with its own.
        """
        try:
            yield
        except MegaloopError as error:
            text = str(error) if self.folder is None else self._renamed(str(error), self.folder)
            raise MegaloopError(f"{self.name}: {text}" if say_which and str(self.name) not in text else text) from None

    def _renamed(self, text: str, folder: Path) -> str:
        own = self.checkpoint.manifest.tokenizer
        for checkpoint in (folder / _DESCRIBED, folder / _COMPLETE):
            if own is not None:
                text = text.replace(str(checkpoint / own.file), str(find_tokenizer(self.name) or self.name))
            text = text.replace(f"checkpoint {checkpoint}", str(self.name)).replace(str(checkpoint), str(self.name))
        return text


@contextmanager
def open_named(name: Path) -> Iterator[NamedModel]:
    """Find a model, and keep what an import needs until it was looked at.

    Raises:
        MegaloopError: no checkpoint there, no model that can be imported, or a damaged one.
    """
    if not (name / "config.json").is_file() or (name / "manifest.json").is_file():
        with raise_on_all_ranks():
            checkpoint = Checkpoint.open(resolve_checkpoint(name))
        with checkpoint:
            yield NamedModel(name, checkpoint)
        return
    group = dist.new_group([0], backend="gloo") if dist.is_initialized() else None
    with tempfile.TemporaryDirectory(prefix="megaloop-diagnose-") if rank() == 0 else nullcontext("") as made:
        folder = Path(broadcast_object(made))
        _import(name, folder / _DESCRIBED, group, without_values=True)
        with Checkpoint.open(folder / _DESCRIBED) as checkpoint:
            yield NamedModel(name, checkpoint, folder, group)
        gather_objects(None)


def _import(name: Path, out: Path, group: dist.ProcessGroup | None, *, without_values: bool = False) -> None:
    """On the first rank; the others wait for it."""
    with raise_on_all_ranks():
        if rank() == 0:
            import_huggingface(name, out, without_values=without_values, group=group)
