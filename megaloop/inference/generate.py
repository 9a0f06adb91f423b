"""Text from a checkpoint: one prompt or many, token by token as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.inference.engine import Engine, Request, Stopped
from megaloop.inference.load import load_decoder
from megaloop.inference.passes import Passes
from megaloop.inference.sampling import Sampling, sequence_seed
from megaloop.inference.setting import Setting
from megaloop.inference.speculation import Speculation
from megaloop.model import Decoder
from megaloop.tokenizer import Tokenizer

__all__ = ["Generation", "GenerationResult", "Writer", "continue_texts", "generate_text", "generate_tokens"]


@dataclass(frozen=True)
class Generation:
    """How texts are continued.

    Attributes:
        stop: texts that end a continuation, and are no part of it.
        seed: of what is drawn; each prompt draws by itself, by its number.
        rows: prompts that are continued at a time.
        speculate: how the model drafts for itself; None: it does not. The text is that of plain generation: greedily the same
            tokens, as far as fp32 rounds, and what is drawn from the same distribution, though not the same of a seed.
    """

    max_tokens: int = 64
    sampling: Sampling = field(default_factory=lambda: Sampling(0.8))
    stop: tuple[str, ...] = ()
    seed: int = 0
    rows: int = 16
    speculate: Speculation | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A generated text.

    Attributes:
        text: prompt and continuation.
        continuation: what was generated.
        tokens: tokens generated, the end-of-text token included.
        seconds: time from the first prompt's beginning to this one's last token.
        stopped: ``end`` (the model ended the text), ``stop`` (a text that ends it came) or ``length`` (``max_tokens`` were generated).
        loops: iterations of the loop that each token's prediction took; 1 without one.
        drafted: tokens that the model drafted for it.
        accepted: those of them that came into the text.
    """

    text: str
    continuation: str
    tokens: int
    seconds: float
    stopped: Stopped
    loops: list[int]
    drafted: int = 0
    accepted: int = 0

    @property
    def loops_mean(self) -> float:
        """Iterations per token."""
        return sum(self.loops) / len(self.loops)


@dataclass
class _Text:
    """A text as it comes."""

    prompt: list[int]
    tokenizer: Tokenizer
    stop: tuple[str, ...]
    on_text: Callable[[str], None]
    loops: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._beginning = self._shown = self.tokenizer.decode(self.prompt)

    def decoded(self, produced: Sequence[int]) -> str:
        """Prompt and continuation, without what ended it."""
        kept = [token for token in produced if token != self.tokenizer.eos_id]
        text = self.tokenizer.decode(self.prompt + kept)
        ends = [text.index(stop, len(self._beginning)) for stop in self.stop if stop in text[len(self._beginning) :]]
        return text[: min(ends)] if ends else text

    def should_stop(self, produced: Sequence[int]) -> bool:
        made = self.tokenizer.decode([*self.prompt, *produced])[len(self._beginning) :]
        return any(stop in made for stop in self.stop)

    def result(self, produced: Sequence[int], seconds: float, stopped: Stopped) -> GenerationResult:
        text = self.decoded(produced)
        made = text[len(self._beginning) :]
        return GenerationResult(text, made, len(produced), seconds, stopped, self.loops)

    def show(self, produced: Sequence[int], *, ended: bool) -> None:
        """What is new, as far as it is sure to stay."""
        text = self.decoded(produced)
        if not ended:
            # a character of several bytes is shown when its last byte token has come, a text that may end it not before that is clear
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                return
            held = (size for stop in self.stop for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
            text = text[: len(text) - max(held, default=0)]
        if len(text) > len(self._shown):
            self.on_text(text[len(self._shown) :])
            self._shown = text


def continue_texts(
    passes: Passes,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    how: Generation,
    *,
    numbers: Sequence[int] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[GenerationResult]:
    """Continue prompts, given as tokens, many at a time; in their order.

    Args:
        prompts: an empty one makes a new document.
        numbers: of the prompts, by which they draw; default: from 0 on.
        on_text: called with each piece of text of the first prompt as it comes.
        on_done: called with the number of texts that are complete.

    Raises:
        MegaloopError: an empty prompt, and a tokenizer without an end-of-text token; a model that cannot draft as asked.
    """
    if tokenizer.eos_id < 0 and any(not prompt for prompt in prompts):
        raise MegaloopError(
            f"tokenizer {tokenizer.path} has no end-of-text token, after which a document could begin; give a prompt"
        )
    show = [on_text if on_text is not None and not place else _silent for place in range(len(prompts))]
    texts = [_Text(prompt, tokenizer, how.stop, each) for prompt, each in zip(prompts, show, strict=True)]
    numbers = range(len(prompts)) if numbers is None else numbers
    requests = [
        Request(text.prompt, how.max_tokens, sequence_seed(how.seed, number), text.should_stop if how.stop else None)
        for text, number in zip(texts, numbers, strict=True)
    ]
    engine = Engine(passes, how.sampling, rows=how.rows, end_id=tokenizer.eos_id, speculate=how.speculate)
    results: dict[int, GenerationResult] = {}
    produced: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    for event in engine.run(requests):
        text, made = texts[event.number], produced[event.number]
        made.append(event.token)
        text.loops.append(event.loops)
        if text.on_text is not _silent:
            text.show(made, ended=event.stopped is not None)
        if event.stopped is not None:
            seconds = time.perf_counter() - began
            results[event.number] = replace(
                text.result(made, seconds, event.stopped), drafted=event.drafted, accepted=event.accepted
            )
            if on_done is not None:
                on_done(len(results))
    return [results[number] for number in range(len(prompts))]


def _silent(text: str) -> None:
    pass


def generate_text(
    checkpoint: Path,
    prompt: str,
    how: Generation,
    setting: Setting = Setting(),
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    compiled: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue ``prompt`` with the model of a checkpoint.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        prompt: taken as it is, as transformers does; without one the model writes a new document.
        setting: how deep it runs.
        compiled: compile its layers, which takes tens of seconds before the first tokens.
        on_text: called with each piece of text as it comes.
        on_note: called with what a user should know.

    Raises:
        MegaloopError: a damaged checkpoint, or one without a tokenizer; no prompt, and a tokenizer without an end-of-text token.
    """
    writer = Writer.open(checkpoint, setting, precision=precision, compiled=compiled)
    (result,) = writer.continue_prompts([prompt], how, on_text=on_text, on_note=on_note)
    return result


@dataclass(frozen=True)
class Writer:
    """A checkpoint that continues texts.

    Attributes:
        context: tokens of a sample of its training; None: not known.
    """

    passes: Passes
    tokenizer: Tokenizer
    context: int | None

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        setting: Setting = Setting(),
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        compiled: bool = False,
    ) -> Self:
        """The model of a checkpoint, or of a run's newest; ``compiled``: its layers, by ``torch.compile``."""
        model, opened = load_decoder(checkpoint, precision=precision)
        if compiled:
            model.compile_layers()
        tokenizer = opened.open_tokenizer("generate writes text")
        passes = setting.passes(model, tokenizer.vocab_size)
        return cls(passes, tokenizer, opened.manifest.data.sequence_length)

    def continue_prompts(
        self,
        prompts: Sequence[str],
        how: Generation,
        *,
        numbers: Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
        on_done: Callable[[int], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> list[GenerationResult]:
        """As :func:`continue_texts`; longer contexts than those of training are said."""
        tokens = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        longest = max(map(len, tokens), default=0) + how.max_tokens
        if self.context is not None and longest > self.context and on_note is not None:
            on_note(
                f"prompt and continuation may come to {longest:,} tokens, and the model was trained on {self.context:,}: "
                "what it writes beyond them is extrapolated"
            )
        return continue_texts(
            self.passes, self.tokenizer, tokens, how, numbers=numbers, on_text=on_text, on_done=on_done
        )


def generate_tokens(
    model: Decoder,
    prompt: list[int],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    end_id: int = -1,
    calls: Sequence[LayerCall] | None = None,
) -> Iterator[int]:
    """Token ids after ``prompt``, one by one, up to ``end_id``; each new token costs one pass over itself alone.

    Args:
        prompt: may be empty where ``end_id`` is given: a new document begins.
        vocab_size: the tokenizer's tokens; rows of the embedding beyond them are padding and are never chosen.
        end_id: what ends a document, and so stands before the next.
        calls: the executions of layers; default: as trained.
    """
    engine = Engine(Passes(model, calls, vocab_size=vocab_size), sampling, rows=1, end_id=end_id)
    for event in engine.run([Request(prompt, max_tokens, seed)]):
        yield event.token
