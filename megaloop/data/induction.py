"""p-hop induction: what follows a chain of look-ups in the same text (arXiv 2402.09268)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["p_hop"]


def p_hop(sequence: Sequence[str], hops: int) -> str | None:
    """What p-hop induction gives (arXiv 2502.17416, section 3); None where a hop leads nowhere.

    A hop goes from a symbol to the one after the latest earlier place of that symbol.
    """
    at = len(sequence) - 1
    for _ in range(hops):
        earlier = [place for place in range(at) if sequence[place] == sequence[at]]
        if not earlier:
            return None
        at = earlier[-1] + 1
    return sequence[at]
