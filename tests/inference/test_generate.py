"""Generation: the cache changes nothing, seeds decide, and transformers says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaloop.depth import DepthPlan, DepthSpec, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.huggingface.weights import export_huggingface
from megaloop.inference.generate import Generation, continue_texts, generate_text, generate_tokens
from megaloop.inference.load import load_decoder
from megaloop.inference.passes import Passes
from megaloop.inference.sampling import Sampling
from megaloop.inference.setting import Setting
from megaloop.inference.speculation import Speculation
from megaloop.tokenizer import load_tokenizer
from tests.data.corpus import write_corpus
from tests.distributed import run_ranks
from tests.train.runs import configuration, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps."""
    folder = tmp_path_factory.mktemp("generate")
    data = write_corpus(folder, sequence_length=32)
    run_ranks(1, train, configuration(data, folder / "run", train__steps=30))
    return folder / "run"


def _greedy(run: Path, prompt: list[int], count: int) -> list[int]:
    model, _ = load_decoder(run)
    return list(generate_tokens(model, prompt, count))


def test_greedy_generation_is_the_argmax_of_whole_passes(run: Path) -> None:
    model, _ = load_decoder(run)
    tokens = [5, 300, 7]
    for expected in _greedy(run, [5, 300, 7], 20):
        with torch.no_grad():
            assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == expected
        tokens.append(expected)


def test_transformers_generates_the_same(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_huggingface(run, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The king said", return_tensors="pt")
    expected = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    found = generate_text(run, "The king said", Generation(20, Sampling()))
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_texts_are_the_same_where_the_model_drafts_for_itself(run: Path) -> None:
    model, opened = load_decoder(run)
    tokenizer = opened.open_tokenizer("generate writes text")
    depth = DepthSpec.parse(f"0-{model.plan.layers}x3-0")
    passes = Passes(model, with_inference_loop(model.plan, depth).calls, vocab_size=tokenizer.vocab_size)
    asked = [tokenizer.encode_prompt(text) for text in ("The king", "And", "")]
    plain, drafted = (
        continue_texts(passes, tokenizer, asked, Generation(20, Sampling(), speculate=how))
        for how in (None, Speculation(3))
    )
    assert [(one.text, one.loops, one.stopped) for one in plain] == [
        (one.text, one.loops, one.stopped) for one in drafted
    ]
    assert {one.drafted for one in plain} == {0}
    assert all(0 <= one.accepted <= one.drafted for one in drafted)
    assert sum(one.drafted for one in drafted) > 0


def test_the_seed_decides_what_is_sampled(run: Path) -> None:
    texts = [generate_text(run, "The", Generation(20, Sampling(1.0), seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(run: Path, options: dict[str, float]) -> None:
    greedy = generate_text(run, "The", Generation(20, Sampling())).text
    assert generate_text(run, "The", Generation(20, Sampling(1.0, **options))).text == greedy  # type: ignore[arg-type]


def test_text_comes_as_it_is_generated(run: Path) -> None:
    parts: list[str] = []
    result = generate_text(run, "The", Generation(20, Sampling(1.0)), on_text=parts.append)
    assert len(parts) > 5
    assert result.text.startswith("The" + "".join(parts))


@pytest.mark.slow
def test_generation_ends_with_the_text(run: Path) -> None:
    """Documents end after a few dozen words; one of these samples reaches it."""
    results = [generate_text(run, "The", Generation(400, Sampling(1.2), seed=seed)) for seed in range(4)]
    ended = [result for result in results if result.stopped == "end"]
    assert all(result.tokens < 400 and "</s>" not in result.text for result in ended)
    assert all(result.tokens == 400 for result in results if result.stopped == "length")


def test_a_checkpoint_without_tokenizer_says_so(run: Path, tmp_path: Path) -> None:
    from megaloop.huggingface.weights import import_huggingface

    export_huggingface(run, tmp_path / "out")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "out" / name).unlink()
    import_huggingface(tmp_path / "out", tmp_path / "step")
    with pytest.raises(MegaloopError, match=r"holds no tokenizer, and generate writes text"):
        generate_text(tmp_path / "step", "The", Generation())


def test_bf16_generation_is_possible(run: Path) -> None:
    result = generate_text(run, "The", Generation(5, Sampling()), precision="bf16")
    assert load_tokenizer(load_decoder(run)[1].tokenizer or run).decode([]) == ""
    assert result.tokens == 5


def test_the_depth_may_be_another_at_inference(run: Path) -> None:
    plain = generate_text(run, "The king", Generation(8, Sampling()))
    assert generate_text(run, "The king", Generation(8, Sampling()), Setting(DepthSpec.parse("3"))).text == plain.text
    model, _ = load_decoder(run)
    calls = DepthPlan.parse("1-1x3-1").calls()
    looped = generate_text(run, "The king", Generation(8, Sampling()), Setting(DepthSpec.parse("1-1x3-1")))
    ids = load_tokenizer(load_decoder(run)[1].tokenizer).encode("The king")  # type: ignore[arg-type]
    tokens = list(generate_tokens(model, ids, 8, calls=calls))
    assert looped.text == load_tokenizer(load_decoder(run)[1].tokenizer).decode(ids + tokens)  # type: ignore[arg-type]
    with pytest.raises(MegaloopError, match="depth 1-2x2-1 has 4 layers of its own, and there are 3"):
        generate_text(run, "The king", Generation(), Setting(DepthSpec.parse("1-2x2-1")))
