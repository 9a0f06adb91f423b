"""When tokens leave the loop, and which iterations keep keys and values: the same for what is generated and what is scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megaloop.depth import LayerCall
from megaloop.inference.caches import CachePolicy
from megaloop.inference.halting import Halting
from megaloop.inference.passes import Passes
from megaloop.model import Decoder

__all__ = ["Thinking"]


@dataclass(frozen=True)
class Thinking:
    """By default every token runs all iterations, and each iteration has its own caches.

    Attributes:
        halting: when tokens leave the loop before; None: never.
        policy: which iterations keep keys and values.
    """

    halting: Halting | None = None
    policy: CachePolicy = field(default_factory=CachePolicy)

    @property
    def is_plain(self) -> bool:
        """As the model's own forward pass."""
        return self.halting is None and self.policy == CachePolicy()

    def passes(self, model: Decoder, calls: Sequence[LayerCall] | None, vocab_size: int | None = None) -> Passes:
        """The model, run so.

        Raises:
            MegaloopError: halting or shared caches of a model without a loop, a gate that it lacks.
        """
        return Passes(model, calls, halting=self.halting, policy=self.policy, vocab_size=vocab_size)

    def thresholds(self, places: Iterable[tuple[int, int]]) -> list[float]:
        """Of tokens at these places of so many."""
        return [self.halting.threshold_at(*place) if self.halting is not None else 0.0 for place in places]

    def memory(self, model: Decoder, calls: Sequence[LayerCall]) -> dict[str, int]:
        """Bytes of keys and values per token, beside those of ``full``; nothing where they are the same."""
        if self.policy == CachePolicy():
            return {}
        passes = self.passes(model, calls)
        return {
            "cache_bytes": passes.caches(1, 1).bytes,
            "cache_bytes_full": passes.caches(1, 1, CachePolicy()).bytes,
        }
