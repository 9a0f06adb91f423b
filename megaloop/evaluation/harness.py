"""EleutherAI's lm-eval on a megaloop checkpoint: any of its tasks, at any depth.

``lm-eval`` is an extra (``pip install megaloop[harness]``). Scores equal those of lm-eval's own Hugging Face model on the exported
checkpoint; here, a question and all of its continuations take one row of a batch (:mod:`megaloop.evaluation.scoring`).

On several ranks each runs all of lm-eval, which asks all of them for the same, and a request is answered by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from megaloop.checkpoint import Checkpoint
from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.evaluation.prompts import encode_text
from megaloop.evaluation.scoring import Question, score
from megaloop.evaluation.thinking import spent
from megaloop.inference.caches import CachePolicy
from megaloop.inference.generate import Generation, continue_texts
from megaloop.inference.halting import Halting
from megaloop.inference.load import load_decoder
from megaloop.inference.loops import Block, with_loops
from megaloop.inference.sampling import Sampling
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder
from megaloop.runtime.share import share_over_ranks, world_size
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise MegaloopError(f"eval --harness needs lm-eval ({error}); pip install 'megaloop[harness]'") from None

__all__ = ["HarnessModel", "run_harness"]

_Result = TypeVar("_Result")
_GENERATED = 256
"""Tokens that a request without a limit generates at most."""


class HarnessModel(TemplateLM):
    """A decoder as lm-eval sees a model.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        max_length: tokens of context and continuation together; longer contexts lose their beginning.
        calls: the executions of layers; default: as trained.
        thinking: when tokens that are asked for leave the loop, and which caches they see.

    Attributes:
        loops: iterations of each token that was asked for so far; nothing where all ran.

    Raises:
        MegaloopError: a ``thinking`` that the model cannot do.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        max_length: int,
        calls: Sequence[LayerCall] | None = None,
        thinking: Thinking = Thinking(),
    ):
        super().__init__()
        self._thinking, self.loops = thinking, list[int]()
        self._passes = thinking.passes(model, calls, tokenizer.vocab_size)
        self._decoder, self._tokens, self.max_length = model, tokenizer, max_length
        self.batch_sizes: dict[str, int] = {}

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        loops: int | None = None,
        block: Block | None = None,
        thinking: Thinking = Thinking(),
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> HarnessModel:
        """The model of a checkpoint, or of a run's newest; loops as :func:`megaloop.inference.loops.with_loops`."""
        model, checkpoint = load_decoder(path, precision=precision)
        calls = with_loops(model.plan, loops, block).calls
        tokenizer = checkpoint.open_tokenizer("lm-eval asks in text")
        return cls(model, tokenizer, _context_length(checkpoint), calls, thinking)

    @property
    def eot_token_id(self) -> int:
        """What ends a document; also what a request without context begins with."""
        return max(self._tokens.eos_id, 0)

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokens.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return encode_text(self._tokens, string, prefix=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each continuation; those that follow the same context share a row."""
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_request, context, continuation) in enumerate(requests):
            for seen, part in self._as_in_training(context, continuation):
                kept = seen[max(len(seen) + len(part) - 1 - self.max_length, 0) :]
                rows.setdefault(tuple(kept or seen[-1:]), []).append((index, part))
        questions = [Question(list(seen), [part for _, part in own]) for seen, own in rows.items()]
        results = [(0.0, True)] * len(requests)  # of an empty continuation
        if questions:
            calls, vocab_size = self._passes.calls, self._tokens.vocab_size
            scores = _shared(
                questions,
                lambda _, own: score(
                    self._decoder, [], own, calls=calls, vocab_size=vocab_size, thinking=self._thinking
                ),
            )
            self._count(loops for scored in scores for loops in scored.loops)
            for scored, own in zip(scores, rows.values(), strict=True):
                for (index, _part), likelihood, greedy in zip(own, scored.log_likelihoods, scored.greedy, strict=True):
                    before, all_greedy = results[index]
                    results[index] = (before + likelihood, all_greedy and greedy)
        for (request, _context, _continuation), result in zip(requests, results, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, result)
        return results

    def _as_in_training(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations that together make this one.

        A text without context follows the end of another document, which predicts its first token. With document masking
        the tokens after that one do not look back to this end.
        """
        parts = []
        if self._decoder.config.document_masking and context == [self.eot_token_id]:
            parts.append((context, continuation[:1]))
            context, continuation = continuation[:1], continuation[1:]
        return [*parts, (context, continuation)] if continuation else [part for part in parts if part[1]]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the context, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for (text,) in (request.args for request in requests):
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.eot_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            parts = self._loglikelihood_tokens([(None, context, continuation) for context, continuation in windows])
            totals.append(sum(likelihood for likelihood, _ in parts))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy (or sampled, where the task asks) continuations up to a stop string; those with equal options together."""
        made: list[str] = [""] * len(requests)
        groups: dict[Generation, list[int]] = {}
        for number, (_, options) in enumerate(request.args for request in requests):
            groups.setdefault(_generation(options), []).append(number)
        for how, numbers in groups.items():
            if how.max_tokens >= self.max_length:
                raise MegaloopError(
                    f"eval --harness: a task generates up to {how.max_tokens:,} tokens, which leaves a prompt no room in the "
                    f"{self.max_length:,} of a sample of training; set max_gen_toks lower in a task file of your own"
                )
            kept = how.max_tokens - self.max_length
            contexts = [self.tok_encode(requests[number].args[0])[kept:] for number in numbers]
            results = _shared(
                contexts,
                lambda places, own, how=how: continue_texts(self._passes, self._tokens, own, how, numbers=places),  # type: ignore[misc]
            )
            self._count(loops for result in results for loops in result.loops)
            for number, result in zip(numbers, results, strict=True):
                made[number] = result.continuation
        return made

    def _count(self, loops: Iterable[int]) -> None:
        if self._thinking.halting is not None:
            self.loops += loops

    def spent(self) -> dict[str, Any]:
        """The mean and the histogram of the iterations of the tokens that were asked for; nothing where all ran."""
        return spent(self.loops, self._passes.iterations) if self.loops else {}


def _shared(values: Sequence[Any], run: Callable[[range, Sequence[Any]], list[_Result]]) -> list[_Result]:
    """``run`` on the places and values of this rank's part of what is asked for; the results of all, in their order."""
    count = min(world_size(), len(values))
    parts = [range(first, len(values), count) for first in range(count)]
    found = share_over_ranks("lm-eval", parts, lambda _, part: run(part, values[part.start :: count]), _silent)
    return [found[place % count][place // count] for place in range(len(values))]


def _silent(what: str, done: int, total: int) -> None:
    """lm-eval shows its own progress."""


_TOKEN_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens of a generation, in lm-eval's order of priority."""
_ALONE = {"num_beams": 1, "repetition_penalty": 1.0}
"""What else a task may say of a generation, with the one value that changes nothing."""


def _generation(options: dict[str, Any]) -> Generation:
    """What a task of lm-eval asks of a generation.

    Raises:
        MegaloopError: something that generation here cannot do.
    """
    left = {name: value for name, value in options.items() if value is not None}
    until = left.pop("until", [])
    stops = (until,) if isinstance(until, str) else tuple(until)
    counts = [left.pop(name, None) for name in _TOKEN_COUNTS]
    most = next((int(count) for count in counts if count is not None), _GENERATED)
    temperature, top_k, top_p = (
        left.pop(name, value) for name, value in (("temperature", 0), ("top_k", 0), ("top_p", 1))
    )
    sampled = left.pop("do_sample", float(temperature) > 0)
    for name, value in left.items():
        if _ALONE.get(name) != value:
            raise MegaloopError(
                f"eval --harness: a task asks of its generations {printable(name)} {printable(str(value))}, which is not done here; leave it "
                "out in a task file of your own (--harness-path)"
            )
    sampling = Sampling(float(temperature), int(top_k), float(top_p)) if sampled else Sampling()
    return Generation(most, sampling, tuple(filter(None, stops)))


def _context_length(checkpoint: Checkpoint) -> int:
    return checkpoint.manifest.data.sequence_length or 2048


def run_harness(
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    task_directories: Sequence[Path] = (),
    shots: int | None = None,
    loops: int | None = None,
    block: Block | None = None,
    halting: Halting | None = None,
    policy: CachePolicy = CachePolicy(),
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """Run tasks of lm-eval; their metrics by task, as lm-eval names them. Ranks share the work, and the first of a machine has the result.

    With halting, ``megaloop`` stands beside the tasks: ``loops_mean`` and ``loops_histogram`` of the tokens that they all asked for.

    Args:
        task_directories: where task files of one's own lie.
        shots: default: as each task says.
        halting: None: all iterations run.

    Raises:
        MegaloopError: an unknown task, or a checkpoint that cannot be loaded.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders = [str(path) for path in task_directories] or None
    manager = TaskManager(include_path=folders, include_defaults=folders is None)
    if not set(tasks) <= set(manager.all_tasks):  # lm-eval's own, thousands of files, are read where one is asked for
        manager = TaskManager(include_path=folders)
    missing = [name for name in tasks if name not in manager.all_tasks]
    if missing or not tasks:
        raise MegaloopError(
            f"eval --harness: lm-eval knows no task {printable(missing[0]) if missing else '(none)'}; 'lm-eval ls tasks' lists them, "
            "and --harness-path adds a directory of yours"
        )
    thinking = Thinking(halting, policy)
    model = HarnessModel.load(checkpoint, loops=loops, block=block, thinking=thinking, precision=precision)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), num_fewshot=shots, task_manager=manager)
    results: dict[str, Any] = {} if found is None else found["results"]
    return results | ({"megaloop": model.spent()} if halting is not None else {})
