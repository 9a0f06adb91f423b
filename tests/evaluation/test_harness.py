"""lm-eval runs its tasks on our checkpoints, offline, and says what it says of the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from typer.testing import CliRunner

from megaloop.cli.main import app
from megaloop.errors import MegaloopError
from megaloop.evaluation.tasks import TASKS, examples
from megaloop.huggingface.weights import export_huggingface
from tests.data.corpus import documents
from tests.processes import run as megaloop

pytestmark = pytest.mark.slow  # lm-eval takes seconds to import and to list its tasks

TASK_FILES = {
    "local_choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "local_perplexity": """
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
    "local_generation": """
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    asked = examples(TASKS["copy-real"], 16, 0)
    lines = [
        {
            "query": example.query,
            "choices": [f" {text.strip()}" for text in example.candidates],
            "gold": example.correct,
        }
        for example in asked
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    texts = [{"text": text} for text in documents(4, seed=9)]  # some are longer than the context
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts), encoding="utf-8")
    for name, text in TASK_FILES.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric}": value
        for task, values in results.items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def _theirs(run: Path, tasks: Path, out: Path) -> dict[str, float]:
    """lm-eval's own model on the exported checkpoint."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export_huggingface(run, out)
    # 2 is </s>, which stands before every document in training; lm-eval would take <s>, which never does
    model = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=4, max_length=32, prefix_token_id=2)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return _numbers(lm_eval.simple_evaluate(model=model, tasks=list(TASK_FILES), task_manager=manager)["results"])


def _eval(*arguments: object) -> str:
    """What ``megaloop eval`` prints, in this process: lm-eval takes seconds to import."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_any_task_of_lm_eval_gives_what_it_gives_on_the_exported_model(
    plain_run: Path, tasks: Path, tmp_path: Path
) -> None:
    printed = _eval(plain_run, "--harness", ",".join(TASK_FILES), "--harness-path", tasks, "--json")
    ours = _numbers(json.loads(printed.splitlines()[-1]))
    assert set(ours) >= {
        "local_choice acc,none",
        "local_perplexity bits_per_byte,none",
        "local_generation exact_match,none",
    }
    assert ours == pytest.approx(_theirs(plain_run, tasks, tmp_path / "exported"), rel=1e-4)


def test_loops_reach_the_harness(plain_run: Path, tasks: Path) -> None:
    values = []
    for loops in ("1", "3"):
        arguments = ("--harness", "local_perplexity", "--harness-path", tasks, "--loops", loops, "--json")
        values.append(_numbers(json.loads(_eval(plain_run, *arguments).splitlines()[-1])))
    assert values[0] != values[1]


def test_halting_and_caches_reach_the_harness(looped_run: Path, tasks: Path) -> None:
    arguments = ("--harness", ",".join(TASK_FILES), "--harness-path", tasks, "--json")
    plain, halted = (
        json.loads(_eval(looped_run, *arguments, *options).splitlines()[-1])
        for options in ((), ("--halt", "fixed=1", "--cache", "last"))
    )
    assert "megaloop" not in plain
    loops = halted.pop("megaloop")
    assert loops["loops_mean"] == 1
    assert loops["loops_histogram"][1:] == [0]
    assert _numbers(plain) != _numbers(halted)


def test_ranks_share_what_is_asked_and_one_speaks(looped_run: Path, tasks: Path) -> None:
    arguments = ("--harness", ",".join(TASK_FILES), "--harness-path", tasks, "--halt", "latent=0.2", "--json")
    alone = json.loads(_eval(looped_run, *arguments).splitlines()[-1])
    shared = megaloop(
        "eval", looped_run, *arguments, "--ranks", 2, fresh=True
    )  # lm-eval starts threads before it forks
    assert shared.returncode == 0, shared.stderr
    (line,) = (line for line in shared.stdout.splitlines() if line.startswith("{"))
    both = json.loads(line)
    assert both.pop("megaloop") == alone.pop("megaloop")
    assert _numbers(both) == pytest.approx(_numbers(alone), rel=1e-5)


@pytest.mark.parametrize(("options", "shots"), [((), None), (("--shots", "5"), 5), (("--shots", "0"), 0)])
def test_a_number_of_shots_that_is_given_reaches_the_harness(
    options: tuple[str, ...], shots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "megaloop.evaluation.harness.run_harness", lambda *arguments, **named: given.update(named) or {}
    )
    _eval("run", "--harness", "x", *options)
    assert given["shots"] == shots


def test_a_prompt_that_generation_leaves_no_room_is_refused(plain_run: Path) -> None:
    from megaloop.evaluation.harness import HarnessModel

    asked = SimpleNamespace(args=("a prompt", {"until": ["x"], "max_gen_toks": 32}))
    with pytest.raises(MegaloopError, match="up to 32 tokens, which leaves a prompt no room in the 32 of a sample"):
        HarnessModel.load(plain_run).generate_until([asked])


def test_a_task_samples_as_it_says(plain_run: Path) -> None:
    """Of the likeliest token alone, at whatever temperature, what is drawn is greedy; of all of them it is not."""
    from megaloop.evaluation.harness import HarnessModel

    model = HarnessModel.load(plain_run)

    def made(**options: Any) -> list[str]:
        return model.generate_until([SimpleNamespace(args=("In the", {"until": [], "max_new_tokens": 8, **options}))])

    greedy = made(do_sample=False, temperature=5.0)
    assert greedy == made() == made(temperature=0.0, do_sample=None, num_beams=1)
    assert greedy == made(do_sample=True, temperature=5.0, top_k=1) == made(temperature=5.0, top_p=1e-9)
    assert greedy != made(do_sample=True, temperature=5.0)
    with pytest.raises(
        MegaloopError, match=r"^eval --harness: a task asks of its generations num_beams 4, which is not done here"
    ):
        made(num_beams=4)


def test_an_unknown_task_is_one_line(plain_run: Path) -> None:
    with pytest.raises(MegaloopError, match="eval --harness: lm-eval knows no task no-such-task"):
        _eval(plain_run, "--harness", "no-such-task")
