"""Micro-batches for one data-parallel rank, read ahead in the background.

The global batch that starts at sample n holds samples n, n+1, ..., n+G-1 of the order. Data-parallel rank r of
R takes the r-th contiguous slice of it, cut into micro-batches: whatever R is, together they read the same.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaloop.data.dataset import DataSet
from megaloop.data.excluded import ExcludedSamples, past_excluded
from megaloop.data.order import SampleOrder
from megaloop.data.sft import FineTuningSet, FineTuningSplit
from megaloop.data.split import Sample, Split
from megaloop.errors import MegaloopError

__all__ = [
    "BatchLoader",
    "MicroBatch",
    "bits_per_byte",
    "held_out_batch",
    "held_out_places",
    "usable_validation",
    "validation_batches",
]

Places = Sequence[tuple[Split | FineTuningSplit, int]]
"""Samples, by split and index."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank reads; B samples of S predicted tokens.

    Attributes:
        inputs: token ids, int64 [B, S].
        targets: what each is to predict, int64 [B, S]: the token after it, or the sample's own target (0 where none counts).
        documents: for each input the index of its document within the sample, int32 [B, S].
        sample_ids: global sample numbers (positions in the order).
        bytes: UTF-8 bytes of text that the targets stand for.
        loss_weights: factors of the targets' losses, float32 [B, S], where not all targets count alike: their sum over the
            micro-batch is its loss, and the mean of micro-batches is the mean over all targets that count in the
            global batch. None: the loss is the mean of all targets.
        difficulties: of each input's document, int32 [B, S], -1: not given; None: no sample carries any.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor
    sample_ids: list[int]
    bytes: int
    loss_weights: Tensor | None = None
    difficulties: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> MicroBatch:
        """Of tokens that come from no data set; without ``documents`` each sample is one."""
        documents = torch.zeros_like(inputs, dtype=torch.int32) if documents is None else documents
        return cls(inputs, targets, documents, sample_ids=[], bytes=0)

    @property
    def labels(self) -> Tensor | tuple[Tensor, Tensor]:
        """What the loss is of: the targets, with the factors of their losses where there are some."""
        return self.targets if self.loss_weights is None else (self.targets, self.loss_weights)

    @property
    def tokens(self) -> int:
        """Predicted tokens that count."""
        return self.targets.numel() if self.loss_weights is None else int((self.loss_weights > 0).sum())

    def for_model(
        self, document_masking: bool
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]:
        """What a model takes, and what its loss is of, for training and for every held-out loss alike.

        Args:
            document_masking: the model's: its attention stays inside documents.

        Returns:
            Inputs, with their documents where those matter; targets, with their weights where there are some.
        """
        inputs = (self.inputs, self.documents) if document_masking else self.inputs
        return inputs, self.labels


class BatchLoader:
    """An endless iterator of micro-batches; close it, or use it as a context manager.

    Args:
        datasets: the sources, in the order's numbering.
        order: which sample of which source is global sample n.
        global_batch: samples per optimizer step over all data-parallel ranks.
        micro_batch: samples per micro-batch.
        dp_rank, dp_size: this rank's slice of each global batch.
        start_sample: the first global sample of the first step.
        prefetch: micro-batches to read ahead; 0: read when asked.
        excluded: samples that no global batch takes.
    """

    def __init__(
        self,
        datasets: Sequence[DataSet] | Sequence[FineTuningSet],
        order: SampleOrder,
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
        prefetch: int = 4,
        excluded: ExcludedSamples = (),
    ):
        self._splits = [dataset.split("train") for dataset in datasets]
        self._weighted = any(split.has_loss_mask for split in self._splits)  # of one source: all sources' samples are
        self._order = order
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._numbers = _slices(start_sample, global_batch, micro_batch, dp_rank, dp_size, excluded)
        self._stop = threading.Event()
        self._queue: queue.Queue[MicroBatch | BaseException] = queue.Queue(maxsize=max(prefetch, 1))
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = threading.Thread(target=self._read_ahead, name="megaloop-data", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._thread is None:
            return self._read(*next(self._numbers))
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def _read(self, start: int, numbers: list[int]) -> MicroBatch:
        samples = [self._splits[source].sample(index) for source, index in map(self._order, numbers)]
        if not self._weighted:
            return _collate(samples, numbers)
        # what counts in the whole global batch: every rank works it out by itself, from the order
        places = map(self._order, range(start, start + self._global_batch))
        loss_mask = sum(self._splits[source].loss_mask(index) for source, index in places)
        return _collate(samples, numbers, self._global_batch // self._micro_batch / max(loss_mask, 1))

    def _read_ahead(self) -> None:
        item: MicroBatch | BaseException
        while not self._stop.is_set():
            try:
                item = self._read(*next(self._numbers))
            except BaseException as error:  # whatever it is, the reader of the queue must learn of it
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def validation_batches(
    datasets: Sequence[DataSet] | Sequence[FineTuningSet],
    *,
    samples: int,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[MicroBatch]:
    """The first ``samples`` validation samples of the sources taken in turn, as micro-batches of one rank.

    Rounded down to whole micro-batches on every rank, so that each rank has as many.

    Raises:
        MegaloopError: the sources hold fewer than one micro-batch per rank.
    """
    usable = usable_validation(datasets, samples=samples, micro_batch=micro_batch, dp_sizes=[dp_size])
    places = held_out_places(datasets, usable)
    numbers = _slices(0, usable, micro_batch, dp_rank, dp_size)
    batches = usable // micro_batch
    return [held_out_batch(places, next(numbers)[1], batches) for _ in range(batches // dp_size)]


def held_out_places(datasets: Sequence[DataSet] | Sequence[FineTuningSet], samples: int) -> Places:
    """The samples that a held-out loss is over: the first ``samples`` of the sources' validation splits, taken in turn."""
    splits = [dataset.split("validation") for dataset in datasets]
    turns = max(map(len, splits))
    places = [(split, index) for index in range(turns) for split in splits if index < len(split)]
    return places[:samples]


def held_out_batch(places: Places, numbers: Sequence[int], batches: int = 1) -> MicroBatch:
    """Some of the held-out samples as a micro-batch.

    Args:
        batches: how many micro-batches the samples of ``places`` make: where targets have weights, the mean of as many
            is the mean over all targets that count.
    """
    read = [places[number][0].sample(places[number][1]) for number in numbers]
    if not any(split.has_loss_mask for split, _ in places):
        return _collate(read, list(numbers))
    loss_mask = sum(split.loss_mask(index) for split, index in places)
    return _collate(read, list(numbers), batches / max(loss_mask, 1))


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """A loss in nats per token as bits per byte of text.

    Args:
        tokens: that the loss is over.
        size: UTF-8 bytes of text that they stand for.
    """
    return loss * (tokens / max(size, 1) / math.log(2))


def usable_validation(
    datasets: Sequence[DataSet] | Sequence[FineTuningSet], *, samples: int, micro_batch: int, dp_sizes: Collection[int]
) -> int:
    """How many validation samples make whole micro-batches on every rank, whichever of ``dp_sizes`` there are.

    Where the topology changes during a run, all its validations so go over the same samples (unless there are too few
    for that: then each size alone has to fit).

    Raises:
        MegaloopError: there are fewer than one micro-batch per rank.
    """
    found = min(sum(len(dataset.split("validation")) for dataset in datasets), samples)
    most, together = micro_batch * max(dp_sizes), micro_batch * math.lcm(*dp_sizes)
    if found < most:
        raise MegaloopError(
            f"{found} validation samples (validation.samples {samples}) are fewer than one micro-batch on each rank, "
            f"{micro_batch} x dp {max(dp_sizes)} = {most}; hold out more with --validation-fraction (of fine-tuning: data.validation_fraction), or raise validation.samples"
        )
    return found // together * together or found


def _slices(
    start: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int, excluded: ExcludedSamples = ()
) -> Iterator[tuple[int, list[int]]]:
    """(first sample of the global batch, global sample numbers) of one rank's micro-batches."""
    share = global_batch // dp_size
    while True:
        start = past_excluded(start, global_batch, excluded)
        first = start + dp_rank * share
        for offset in range(0, share, micro_batch):
            yield start, list(range(first + offset, first + offset + micro_batch))
        start += global_batch


def _collate(samples: Sequence[Sample], numbers: list[int], weight: float = 0.0) -> MicroBatch:
    """Samples as one micro-batch; ``weight``: of each target that counts, where not all do."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    begins = np.zeros((len(samples), tokens.shape[1] - 1), dtype=np.int32)
    for row, sample in enumerate(samples):
        begins[row, sample.starts] = 1
    begins[:, 0] = 0  # the first document of a sample is number 0, whether it begins there or goes on
    documents_BS = np.cumsum(begins, axis=1, dtype=np.int32)
    return MicroBatch(
        inputs=tokens[:, :-1].contiguous(),
        targets=_targets(samples, tokens),
        documents=torch.from_numpy(documents_BS),
        sample_ids=numbers,
        bytes=sum(sample.bytes for sample in samples),
        loss_weights=_weights(samples, weight),
        difficulties=_difficulties(samples, documents_BS),
    )


def _targets(samples: Sequence[Sample], tokens: Tensor) -> Tensor:
    """What each place predicts."""
    targets_BS = tokens[:, 1:].clone()  # contiguous() would be a view of a batch of one, and the inputs be written to
    for row, sample in enumerate(samples):
        if sample.targets is not None:
            targets_BS[row] = torch.from_numpy(sample.targets.clip(min=0))
    return targets_BS


def _weights(samples: Sequence[Sample], weight: float) -> Tensor | None:
    """Factors of the losses: ``weight`` where a target counts, and everywhere in a sample of which all do."""
    if not weight:
        return None
    length = len(samples[0].tokens) - 1
    masks = [np.ones(length, np.bool_) if sample.loss_mask is None else sample.loss_mask for sample in samples]
    return torch.from_numpy(np.stack(masks).astype(np.float32)) * weight


def _difficulties(samples: Sequence[Sample], documents_BS: NDArray[np.int32]) -> Tensor | None:
    if all(sample.difficulties is None for sample in samples):
        return None
    found_BS = np.full(documents_BS.shape, -1, dtype=np.int32)
    for row, sample in enumerate(samples):
        if sample.difficulties is not None and len(sample.difficulties):
            found_BS[row] = sample.difficulties[documents_BS[row]]
    return torch.from_numpy(found_BS)
