"""What may be diagnosed: checkpoints with more or less beside them, models of others, few prompts; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.ladders import write_word_tokenizer
from megaloop.analysis import prompts as prompts_module
from megaloop.analysis.contributions import cosine, relative_change
from megaloop.analysis.diagnose import _identity
from megaloop.analysis.diagnose import diagnose as diagnose_all
from megaloop.analysis.prompts import held_out_prompts
from megaloop.analysis.request import PromptSource, Request, TaskSource, block_layers
from megaloop.analysis.results import DiagnosisRecord, read_results
from megaloop.checkpoint import Checkpoint, CheckpointInfo, GrowthEntry, RunState, save_checkpoint
from megaloop.checkpoint.manifest import encode_manifest
from megaloop.data import DataSet, held_out_batch
from megaloop.depth import DepthPlan, grow, untie
from megaloop.errors import MegaloopError
from megaloop.huggingface.weights import export_huggingface, import_huggingface
from megaloop.layout.pieces import Box, Piece, StatePiece
from megaloop.layout.topology import Topology
from megaloop.model import Decoder
from tests.analysis.diagnosing import diagnose
from tests.analysis.models import CONFIG
from tests.cli.test_cli import megaloop
from tests.data.targeted import write_targeted


def _saved(
    folder: Path,
    rows: int,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    gain: float | None = None,
    plan: DepthPlan = DepthPlan.plain(4),
    **data: Any,
) -> Path:
    """A checkpoint of a random model, with what its configuration says of data."""
    model = Decoder(CONFIG.model_copy(update={"vocab_size": rows}), rows, plan)
    model.initialise(seed)
    if gain is not None:
        torch.nn.init.constant_(model.norm.weight, gain)
        torch.nn.init.constant_(model.embedding.weight, 1e3)
    pieces = [
        StatePiece("model", Piece(name, tuple(value.shape), Box.whole(tuple(value.shape))), value.detach())
        for name, value in model.named_parameters()
    ]
    info = CheckpointInfo(
        run=RunState.fresh(), plan=plan, model=model.config, topology=Topology(), precision="fp32", growth=None,
        config={"data": data},
    )  # fmt: skip
    save_checkpoint(folder, pieces, info, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def asked(words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that knows words, and lines to ask it."""
    folder = tmp_path_factory.mktemp("asked")
    file = folder / "lines.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"{a} + {a + 1} = {a} a b c d e f g h i j k"}) + "\n" for a in range(6))
    )
    return _saved(folder / "model", 400, tokenizer=words), file


# --- the run's data


def test_samples_are_as_long_as_those_of_training(corpus: Path, tmp_path: Path) -> None:
    """The model has seen no later positions; these are the samples of eval's held-out loss."""
    path = _saved(tmp_path / "m", 400, sources=[{"path": str(corpus)}], sequence_length=16)
    found = PromptSource(count=8).read(Checkpoint.open(path), False)
    assert DataSet.open(corpus).sequence_length == 32
    assert [len(prompt) for prompt in found.prompts] == [16] * 8


def test_a_data_set_with_more_tokens_than_the_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = _saved(tmp_path / "m", 64)
    with pytest.raises(MegaloopError, match="its tokenizer has 400 tokens, the model 64"):
        PromptSource(corpus).read(Checkpoint.open(path), False)


def test_a_fine_tuned_run_is_told_to_name_prompts(tmp_path: Path) -> None:
    path = _saved(tmp_path / "m", 64, format="sft", sources=[{"path": "answers.jsonl"}])
    with pytest.raises(MegaloopError, match=r"was fine-tuned on prompts and answers.*name prompts with --prompts"):
        diagnose(path, measures=["skip"])


def test_samples_with_targets_are_each_read_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DataSet.open(write_targeted(tmp_path, corpus))
    given: list[int] = []
    read = held_out_batch

    def recorded(places: Any, numbers: Sequence[int]) -> Any:
        given.append(len(places))
        return read(places, numbers)

    monkeypatch.setattr(prompts_module, "held_out_batch", recorded)
    held_out_prompts(dataset, 6, False)
    assert given == [1] * 6


# --- few prompts


def test_one_prompt_is_shown_without_an_interval(asked: tuple[Path, Path], tmp_path: Path) -> None:
    model, file = asked
    result = megaloop("diagnose", model, "--prompts", file, "--count", 1, "--measures", "depth-score,lens,skip")
    assert result.returncode == 0, result.stderr
    (late,) = [line for line in result.stdout.splitlines() if line.startswith("late layers")]
    assert late.endswith("unclear")
    assert " to " not in result.stdout


def test_measures_without_a_signature_are_no_mistake(asked: tuple[Path, Path]) -> None:
    model, file = asked
    result = megaloop("diagnose", model, "--prompts", file, "--measures", "exit")
    assert result.returncode == 0, result.stderr
    assert "these measures make no signature; add --json" in result.stderr


def test_prompts_of_one_token_have_no_target(asked: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(MegaloopError, match=r"skip: no prompt of .*short\.jsonl has a target"):
        diagnose(asked[0], measures=["skip"], prompts=PromptSource(file))
    with pytest.raises(MegaloopError, match="the prompt has no target"):
        diagnose(asked[0], measures=["gradients"], prompts=PromptSource(file))
    found = diagnose(asked[0], measures=["lens"], prompts=PromptSource(file))
    assert "loss" not in found[0].result.curves


def test_tasks_need_a_measure_that_they_score(asked: tuple[Path, Path]) -> None:
    with pytest.raises(MegaloopError, match="--tasks: scores interventions, and none is among the measures"):
        diagnose(asked[0], measures=["lens"], tasks=TaskSource(["copy-real"]), prompts=PromptSource(asked[1]))


# --- several models


@pytest.mark.parametrize(
    ("third", "options", "message"),
    [
        ("nowhere", {}, "checkpoint .*nowhere: no such directory"),
        ("mute", {}, "mute holds no tokenizer, and prompts are text"),
        ("small", {"block": 3}, "small: --block 3: the model executes 2 layers; choose 1 to 2"),
        ("small", {"measures": ["lens", "symmetry"], "block": 2}, "small: weight symmetry: blocks of 2 layers in a model of 2"),
        ("words", {"tasks": TaskSource(["copy-real"])}, "^tokenizer .*words/tokenizer/tokenizer.json: it cannot encode"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_third_model_is_told_before_the_first_is_measured(
    asked: tuple[Path, Path],
    words: Path,
    corpus: Path,
    third: str,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    unloaded: None,
) -> None:
    tokenizer = DataSet.open(corpus).tokenizer
    models = [_saved(tmp_path / f"model-{seed}", 400, tokenizer=tokenizer, seed=seed) for seed in range(2)]
    _saved(tmp_path / "mute", 400)
    _saved(tmp_path / "small", 400, tokenizer=tokenizer, plan=DepthPlan.plain(2))
    _saved(tmp_path / "words", 400, tokenizer=words)
    with pytest.raises(MegaloopError, match=message):
        diagnose_all([*models, tmp_path / third], Request(prompts=PromptSource(asked[1]), **options))


def test_a_model_of_others_without_a_tokenizer_is_named_as_it_was_given(
    asked: tuple[Path, Path], tmp_path: Path, unloaded: None
) -> None:
    export_huggingface(_saved(tmp_path / "mute", 400), tmp_path / "llama", dtype="fp32")
    with pytest.raises(MegaloopError) as raised:
        diagnose(tmp_path / "llama", prompts=PromptSource(asked[1]))
    assert str(raised.value) == (
        f"{tmp_path / 'llama'} holds no tokenizer, and prompts are text; import the model with one: "
        "megaloop import MODEL --out CKPT --tokenizer PATH"
    )


def test_a_model_of_others_with_another_tokenizer_is_named_as_it_was_given(
    asked: tuple[Path, Path], corpus: Path, tmp_path: Path, unloaded: None
) -> None:
    export_huggingface(asked[0], tmp_path / "llama", dtype="fp32")
    with pytest.raises(MegaloopError) as raised:
        diagnose(tmp_path / "llama", prompts=PromptSource(corpus))
    assert f"than {tmp_path / 'llama'} (" in str(raised.value)
    assert str(raised.value).endswith(f"--tokenizer {tmp_path / 'llama' / 'tokenizer.json'}")


@pytest.mark.parametrize("name", ["model.gguf", "."])
def test_a_gguf_file_is_told_to_be_imported(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    path = tmp_path / name
    with pytest.raises(
        MegaloopError, match=f"{path}: it is .*GGUF file; import it first: megaloop import {path} --out CKPT"
    ):
        diagnose(path)


def test_a_model_of_others_is_remembered_though_it_is_imported_anew(asked: tuple[Path, Path], tmp_path: Path) -> None:
    model, file = asked
    export_huggingface(model, tmp_path / "llama", dtype="fp32")
    checksums: set[str] = set()
    found: list[DiagnosisRecord] = []
    for name in ("one", "two"):
        import_huggingface(tmp_path / "llama", tmp_path / name)
        manifest = Checkpoint.open(tmp_path / name).manifest
        on_its_day = manifest.model_copy(update={"created": f"2030-01-01T00:00:0{len(found)}+00:00"})
        (tmp_path / name / "manifest.json").write_bytes(encode_manifest(on_its_day))
        checksums.add(Checkpoint.open(tmp_path / name).manifest.checksum)
        found += diagnose(
            tmp_path / name, measures=["contributions"], prompts=PromptSource(file), out=tmp_path / "d.jsonl"
        )[:1]
    assert len(checksums) == 2
    assert found[0] == found[1]
    assert len(read_results(tmp_path / "d.jsonl")) == 1
    other = _saved(tmp_path / "other", 400, seed=1)
    assert _identity(Checkpoint.open(other).manifest) != found[0].examination.checkpoint


def test_two_ranks_look_at_a_model_of_others(asked: tuple[Path, Path], tmp_path: Path) -> None:
    model, file = asked
    export_huggingface(model, tmp_path / "llama", dtype="fp32")
    found = []
    for ranks in (1, 2):
        result = megaloop("diagnose", tmp_path / "llama", "--prompts", file, "--count", 1, "--measures", "skip", "--ranks", ranks, "--json")  # fmt: skip
        assert result.returncode == 0, result.stderr
        (of_model,) = json.loads(result.stdout)["models"]
        found.append([record["result"] for record in of_model["records"]])
    assert found[0] == found[1]
    refused = megaloop("diagnose", tmp_path / "llama", "--ranks", 2)
    assert refused.returncode == 2
    assert "name prompts with --prompts" in refused.stderr


def test_lenses_of_two_models_may_lie_beside_one_file_of_results(corpus: Path, tmp_path: Path) -> None:
    tokenizer = DataSet.open(corpus).tokenizer
    for seed in range(2):
        path = _saved(tmp_path / f"m{seed}", 400, tokenizer=tokenizer, seed=seed, sources=[{"path": str(corpus)}])
        diagnose(path, measures=["tuned-lens"], lens_steps=1, prompts=PromptSource(count=2), out=tmp_path / "d.jsonl")
    assert len(list((tmp_path / "lenses").iterdir())) == 2


def test_a_lens_that_was_trained_on_other_data_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_targeted(tmp_path / "data", corpus)
    tokenizer = DataSet.open(corpus).tokenizer
    path = _saved(tmp_path / "m", 400, tokenizer=tokenizer, sources=[{"path": str(data)}])
    asked: dict[str, Any] = {"measures": ["tuned-lens"], "lens_steps": 1, "prompts": PromptSource(count=2)}
    (first, _) = diagnose(path, out=tmp_path / "d.jsonl", **asked)
    shutil.rmtree(data)
    write_targeted(tmp_path / "data", corpus, seed=1)
    with pytest.raises(
        MegaloopError, match=r"lens .* was trained on \d+ samples .*, this one is to learn from .*; remove"
    ):
        diagnose(path, out=tmp_path / "d.jsonl", **asked)
    (lens,) = (tmp_path / "lenses").iterdir()
    lens.unlink()
    (other, _) = diagnose(path, out=tmp_path / "d.jsonl", **asked)
    assert other.examination.options != first.examination.options


def test_models_that_were_asked_different_prompts_are_said_not_to_compare(
    asked: tuple[Path, Path], corpus: Path, tmp_path: Path
) -> None:
    tokenizer = DataSet.open(corpus).tokenizer
    data = [write_targeted(tmp_path / f"data-{seed}", corpus, seed=seed) for seed in range(2)]
    models = [
        _saved(tmp_path / f"m{seed}", 400, tokenizer=tokenizer, seed=seed, sources=[{"path": str(data[seed])}])
        for seed in range(2)
    ]
    arguments = ("--measures", "lens", "--count", 2)
    own = megaloop("diagnose", *models, *arguments)
    assert own.returncode == 0, own.stderr
    assert f"do not compare (2 of {data[0]}, 2 of {data[1]}); give all the same with --prompts" in own.stderr
    shared = megaloop("diagnose", *models, *arguments, "--prompts", data[0])
    assert shared.returncode == 0, shared.stderr
    assert "do not compare" not in shared.stderr


# --- the block


def test_the_block_is_that_of_the_loop_or_of_growth(asked: tuple[Path, Path]) -> None:
    manifest = Checkpoint.open(asked[0]).manifest
    grown = GrowthEntry(operator="lidas", stage=1, stages=2)
    fresh = {"growth": {"block": 3}}
    for plan, changes, block in (
        (DepthPlan.plain(24), {}, 4),
        (DepthPlan.plain(3), {}, 3),
        (DepthPlan.parse("2-2x3-1"), {}, 2),
        (grow(DepthPlan.plain(4), "lidas", 24, 2).plan, {"growth": grown}, 2),
        (grow(DepthPlan.plain(3), "midas", 12, 3).plan, {"growth": GrowthEntry(operator="midas")}, 3),
        (untie(DepthPlan.parse("2-2x3-1")).plan, {}, 2),
        (grow(DepthPlan.plain(3), "random", 12, 3).plan, {"growth": grown, "config": fresh}, 3),
        (DepthPlan.plain(12), {"config": fresh}, 4),
        (DepthPlan.plain(2), {"growth": grown, "config": fresh}, 2),
        (DepthPlan.plain(12), {"growth": grown, "config": {"growth": {"block": "3"}}}, 4),
    ):
        of_plan = manifest.model_copy(update={"plan": plan, **changes})
        assert block_layers(of_plan) == block, (str(plan), changes)
        assert block_layers(of_plan, 1) == 1


def test_a_grown_model_is_measured_by_its_block(asked: tuple[Path, Path], words: Path, tmp_path: Path) -> None:
    path = _saved(tmp_path / "m", 400, tokenizer=words, plan=grow(DepthPlan.plain(2), "midas", 6, 2).plan)
    (found, *_) = diagnose(path, measures=["contributions"], prompts=PromptSource(asked[1]))
    assert found.examination.block == 2


# --- numbers


def test_bf16_is_compared_in_fp32() -> None:
    """What a model has rounded is as it is; what is said of it is not rounded again."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 64, generator=generator).bfloat16() for _ in range(2))
    for measure in (cosine, relative_change):
        assert torch.equal(measure(x, y), measure(x.float(), y.float()))


def test_a_model_whose_numbers_are_not_finite_is_said_to_be(
    words: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    huge = _saved(tmp_path / "m", 400, tokenizer=words, gain=3e38)
    with pytest.raises(MegaloopError, match="skip: the model's numbers are NaN, infinite or huge in fp32"):
        diagnose(huge, measures=["skip"], prompts=PromptSource(asked[1]), out=tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()
