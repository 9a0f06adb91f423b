"""Reading token shards in a global order that no topology changes."""

from megaloop.data.dataset import DataSet
from megaloop.data.excluded import ExcludedSamples, past_excluded
from megaloop.data.loader import (
    BatchLoader,
    MicroBatch,
    bits_per_byte,
    held_out_batch,
    held_out_places,
    usable_validation,
    validation_batches,
)
from megaloop.data.order import SampleOrder
from megaloop.data.sources import Sources, embedding_rows, open_sources
from megaloop.data.split import Sample

__all__ = [
    "BatchLoader",
    "DataSet",
    "ExcludedSamples",
    "MicroBatch",
    "Sample",
    "SampleOrder",
    "Sources",
    "bits_per_byte",
    "embedding_rows",
    "held_out_batch",
    "held_out_places",
    "open_sources",
    "past_excluded",
    "usable_validation",
    "validation_batches",
]
