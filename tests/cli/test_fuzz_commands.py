"""Whatever a user types, every command answers: in one line, with exit code 2, and nothing is lost.

Everything runs in this process, through :func:`megaloop.cli.main.main`; only where ranks would be started, nothing happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import launchers.local
import megaloop.cli.main as cli
import megaloop.cli.train
from megaloop.text import printable
from tests.data.corpus import write_corpus
from tests.report.rundirs import evaluated, write_run

pytestmark = pytest.mark.slow

LIMIT = 2000
CONFIG = """
name: fuzz
depth: 2
model: {hidden_size: 16, num_heads: 2, num_kv_heads: 1, ffn_size: 32, vocab_size: 512}
data: {sources: [{path: DATA}], sequence_length: 16}
train: {steps: 4, global_batch: 2, precision: fp32}
"""
GROUP = typer.main.get_command(cli.app)


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(its words, command) of every command and group."""
    yield path, command
    for name, item in getattr(command, "commands", {}).items():
        yield from _commands(item, (*path, name))


COMMANDS = dict(_commands(GROUP))
Answer = tuple[int, str, str]
Run = Callable[..., Answer]


class World:
    """Files that commands are given: data, a checkpoint with tokenizer, a run, a configuration."""

    def __init__(self, root: Path):
        self.root = root
        self.data = write_corpus(root, count=80, sequence_length=16)
        self.text = root / "text.jsonl"
        self.tokenizer = self.data / "tokenizer.model"
        self.config = root / "good.yaml"
        self.config.write_text(CONFIG.replace("DATA", str(self.data)) + f"run_dir: {root / 'unborn'}\n")
        self.theirs = root / "theirs"
        self._write_llama()
        self.checkpoint = root / "run/checkpoints/step-00000100"
        self.run = write_run(root / "run", "[red]$x_", steps=4, validate=2)
        evaluated(self.run, "validation", 3.0)

    def _write_llama(self) -> None:
        self.theirs.mkdir()
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
            "max_position_embeddings": 64,
        }  # fmt: skip
        (self.theirs / "config.json").write_text(json.dumps(config))
        tensors = {"model.embed_tokens.weight": torch.zeros(512, 16), "model.norm.weight": torch.ones(16)}
        for layer in range(2):
            shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
            shapes |= {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16)}
            shapes |= {"mlp.down_proj": (16, 32)}
            for name, shape in shapes.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.full(shape, 0.01)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(16)
        save_file(tensors, self.theirs / "model.safetensors")
        shutil.copy(self.tokenizer, self.theirs / "tokenizer.model")


def _digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The files; at the end they are what they were."""
    from megaloop.huggingface.weights import import_huggingface

    made = World(tmp_path_factory.mktemp("fuzz"))
    import_huggingface(made.theirs, made.checkpoint)
    before = _digest(made.root)
    yield made
    after = _digest(made.root)
    assert {name: after.get(name) for name in before} == before
    assert not (made.root / "unborn").exists()


class _Ended(BaseException):
    def __init__(self, code: int):
        self.code = code


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line: (exit code, stdout, stderr), or whatever error leaves it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MEGALOOP_DEBUG", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launchers.local, "launch", lambda *_, **__: None)
    monkeypatch.setattr(megaloop.cli.train, "_train_here", lambda *_, **__: None)
    monkeypatch.setattr("megaloop.evaluation.harness.run_harness", lambda *_, **__: {})  # another project's

    def leave(code: int) -> None:
        raise _Ended(code)

    monkeypatch.setattr(cli, "leave", leave)
    monkeypatch.setattr(cli, "app", GROUP)  # as typer makes it anew for each command line

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["megaloop", *map(str, words)])
        code = 0
        try:
            cli.main()
        except _Ended as ended:
            code = ended.code
        except Exception:  # a bug
            code = 1
            traceback.print_exc()
        out, err = capfd.readouterr()
        return code, out, err

    return run


def check(answer: Answer) -> Answer:
    """An answer to nonsense: no flood, nothing that a terminal obeys, a line that says what is wrong."""
    code, out, err = answer
    assert code in (0, 2), answer
    assert len(err) <= LIMIT, f"{len(err)} characters: {err[:300]}"
    for text in (out, err):
        plain = text.replace("\n", "").replace("\t", "")
        assert plain == printable(plain, len(plain) + 1), repr(text)
        assert "Traceback" not in text
    if code == 2 and "Usage:" not in err and "damaged" not in out:
        line = err.splitlines()[-1] if err else ""
        assert line.startswith("error: "), answer
    return answer


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "number": b"3",
    "date": b"name: 2024-13-45\n",
    "long integer": b"seed: " + b"9" * 5000,
    "tag": b"seed: !!int abc\n",
    "python": b"name: !!python/object/apply:os.system [id]\n",
    "deep": b"[" * 2000,
    "deep block": b"- " * 3000,
    "aliases": BOMB.encode(),
    "itself": b"name: &a [*a]\n",
    "twice": b"name: a\nname: b\n",
    "merged bomb": b"a: &a {x: 1}\n"
    + b"".join(b"%c: &%c {<<: [%s]}\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 110)),
    "utf-16": "name: a\n".encode("utf-16"),
    "latin": b"name: \xe9\xff\n",
    "escape": b"name: \x1b[2J\n",
    "escaped": b'name: "\\e[2J\\e]0;owned\\a"\n',
    "zero byte": b"name: a\0b\n",
    "markup": b"[/red]: 1\n",
    "many documents": b"--- {}\n--- {}\n",
    "long line": b"name: " + b"x" * 200_000,
    "too long": b"#" * 400_000,
    "unclosed": b"data: {sources: [",
    "surrogate": b'name: "\\ud800"\n',
    "sexagesimal": b"seed: 1" + b":1" * 5000,
    "unhashable": b"? [a]\n: b\n",
    "no text key": b"1: 2\ndata: {sources: [{path: x}]}\n",
}
TAKES_CONFIG = (
    ("train",),
    ("plan",),
    ("bench", "layers"),
    ("bench", "reshard"),
    ("bench", "checkpoint"),
    ("bench", "savings", "--preset"),
    ("submit", "--nodes", "1", "--gpus-per-node", "1", "--dry-run"),
    ("submit", "--chain", "1", "--tasks-per-node", "1", "--dry-run"),
)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_configuration_or_site(name: str, world: World, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(BAD_FILES[name])
    for command in TAKES_CONFIG:
        assert check(run(*command, path))[0] == 2, command
    if name != "empty":  # a site that has nothing to say
        assert check(run(*TAKES_CONFIG[-1], world.config, "--site", path))[0] == 2
    held = tmp_path / "held"
    held.mkdir()
    shutil.copy(world.run / "metrics.jsonl", held)
    shutil.copy(path, held / "config.yaml")
    (held / "checkpoints").mkdir()
    for words in (["report", held], ["doctor", held], ["checkpoints", held, "--prune"], ["eval", held]):
        check(run(*words))


OVERRIDES = [
    "a.b.c=1", "=1", "train=5", "train.steps=", "train=", "train.=1", ".=1", "train..steps=1", "{}=1", "ünïcode=1", "\u202e=1",
    "name=2024-13-45", "name=..", "name=.", "name=a/b", "name=a\x1b[2Jb", 'name="\\e[2J"', "name=[/red]run", "name='[red]run'",
    "name='$x_'", "name=" + "x" * 300, "name=" + "y" * 1_000_000, "x" * 100_000 + "=1", "name='\u202eabc'", "name=\udcff",
    "seed=" + "9" * 5000, "seed='" + "9" * 5000 + "'", "seed=99999999999999999999", "seed=-1", "seed=1e400", "seed=!!int abc",
    "train.steps=²", "train.steps=٣", "train.steps=true", "train.steps=1.5", "train.steps={a: 1}", "train.steps.x=1",
    "train.steps=9007199254740993", "train.steps=" + "[" * 2000, "train.steps=&a [*a]", "train.steps=*a",
    "faults.step_limit=.inf", "faults.step_limit=.nan", "optimizer.lr=.inf", "optimizer.lr=1e999", "optimizer.clip=-.inf",
    "data.sources.0.weight=.inf", "data.sources.0.weight={stable: .nan, cooldown: 1}", "data.sources.²=1",
    "data.sources." + "9" * 5000 + "=1", "data.sources.-1.path=x", "data.sources.1.path=x", "data.sources.path=x",
    'data.sources.0.path="a\\0b"', "data.sources.0.path=" + "z" * 5000, "data.sources.0.path=3", "data.sources=x",
    'run_dir="\\0"', 'init="\\0"', "init=[]", "data.sources.0={}", "data={}", "data.format=sft", "data.tokenizer=/",
    "depth=0", "depth=-1", "depth=1000000000", "depth=" + "9" * 5000, "depth=2-2x99999999-0", "depth=(0)x100001", "depth=(,)",
    "depth=[1]", "depth=.nan", "depth=²", "depth=1-0x0-1", "depth=\x1b", "model.hidden_size=9007199254740992", "model.num_heads=0",
    "growth={start: 1, block: 1, schedule: prop-99.9}", "growth={start: 1, schedule: prop-inf}", "growth.start=9007199254740992",
    "growth={start: 1, schedule: [{steps: 2, layers: 1}, {steps: 1, layers: 1000000000000}, {steps: 1, layers: 2}]}",
    "growth={start: 1, schedule: []}", "growth={start: 1, topology: [{layers: 9, pp: 9}]}", "growth=[]", "growth.schedule.0.x=1",
    "depth_events=[{at: .nan, untie: true}]", "depth_events=[{at: 0.5, depth: [/red]}]", "depth_events=[{at: 0.5}]",
    "parallel.layer_costs=[.inf, 1, 1]", "parallel.layer_costs=[]", "parallel.pp=9007199254740992", "parallel.tp=9007199254740992",
    "parallel.dp=9007199254740992", "schedule.kind=[/red]", "schedule.cooldown=.nan", "loop.sigma=.inf", "loop.count=poisson",
    "steps=1", "qwertzuiop=1", "no equals sign", "", " ", "\n=\n", "train.steps=1\n", "--", "a={[", "a=%", "a=@", "a=!!",
]  # fmt: skip


@pytest.mark.parametrize("command", [("plan",), ("train",), TAKES_CONFIG[-1]], ids=lambda words: words[0])
def test_an_override_that_is_none(command: tuple[str, ...], world: World, run: Run) -> None:
    taken = []
    for override in OVERRIDES:
        # a double dash, so that whatever follows is an argument; the run goes where nothing is
        code, *_ = check(run(*command, world.config, "--", override))
        if code == 0:
            taken.append(override)
    # valid, though odd; and what has to fail elsewhere, once ranks have opened the data
    odd = {
        "name='[red]run'",
        "model.hidden_size=9007199254740992",
        "name='$x_'",
        "train.steps=1\n",
        "train.steps=٣",
        'init="\\0"',
        "--",
    }
    assert not [item for item in taken if item not in odd and "path" not in item], taken


PATHS = [
    "missing",
    "a" * 300,
    "b/" * 3000,
    "[/red]",
    "\x1b[2J",
    "\udcff",
    "",
    ".",
    "/dev/null",
    "~",
    "$HOME",
    "-",
    "ü\u202e",
]


def _takers(world: World, path: object, out: Path) -> Iterator[list[object]]:
    """Every command that takes a path of a checkpoint, a run, data or text, with one that is none."""
    yield ["grow", path, "--out", out, "--layers", 4]
    yield ["loop", path, "--out", out, "--depth", "1-1x2-0"]
    yield ["export", path, "--out", out]
    yield ["import", path, "--out", out]
    yield ["generate", path, "--prompt", "x"]
    yield ["eval", path, "--tasks", "copying"]
    yield ["eval", world.run, "--data", path, "--tasks", "validation", "--out", out]
    yield ["eval", world.run, "--harness", "x", "--harness-path", path]
    yield ["export-tasks", f"{path}/x", "--tasks", "p-hop", "--shots", 0, "--examples", 1]
    yield ["checkpoints", path]
    yield ["checkpoints", path, "--prune"]
    yield ["doctor", path]
    yield ["report", path, "--out", out]
    yield ["report", world.run, path, "--out", out]
    yield ["status", path]
    yield ["cancel", path]
    yield ["plan", path]
    yield ["plan", world.config, f"data.sources.0.path={path}", "model.vocab_size="]
    yield ["train", path]
    yield ["bench", "savings", "--preset", path]
    yield ["bench", "prep", path]
    yield ["bench", "prep", world.text, "--tokenizer", path]
    yield ["prep", path, "--out", out, "--vocab-size", 300]
    yield ["prep", world.text, "--out", out, "--tokenizer", path]
    yield ["submit", world.config, "--nodes", 1, "--gpus-per-node", 1, "--dry-run", "--env-file", path]
    yield ["submit", world.config, "--nodes", 1, "--gpus-per-node", 1, "--dry-run", "--site", path]
    yield ["submit", world.config, "--nodes", 1, "--gpus-per-node", 1, "--dry-run", "--template", path]
    yield ["synthesize", "--out", f"{path}/x", "--documents", 1]
    task = ["synthesize", "--task", "chains", "--difficulty", 1, "--documents", 1]
    yield [*task, "--out", f"{path}/x"]
    yield [*task, "--out", out / "x.jsonl", "--tokenizer", f"{path}/x"]
    yield ["grow", world.run, "--out", f"{path}/x\0", "--layers", 4]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:12])
def test_a_path_that_leads_nowhere(path: str, world: World, run: Run, tmp_path: Path) -> None:
    for words in _takers(world, path, tmp_path / "out"):
        check(run(*words))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\xfe\0\x1b[2J", b"[" * 5000, b"null", b"[/red]" * 1000], ids=range(6)
)
def test_a_file_that_holds_something_else(content: bytes, world: World, run: Run, tmp_path: Path) -> None:
    """A file where a directory should be, and a directory whose every file is something else."""
    path = tmp_path / "[red]\x1b.jsonl"
    path.write_bytes(content)
    folder = tmp_path / "folder"
    for name in (
        "manifest.json", "data.json", "config.json", "config.yaml", "metrics.jsonl", "events.jsonl", "evaluation.jsonl",
        "ranks.jsonl", "slurm/jobs.jsonl", "slurm/history.jsonl", "submitted.yaml", "tokenizer.model", "model.safetensors",
        "checkpoints/step-00000001/manifest.json", "checkpoints/[red]/x",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for item in (path, folder):
        for words in _takers(world, item, tmp_path / "out"):
            check(run(*words))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


NUMBERS = [
    "²",
    "٣",
    "1e3",
    "",
    "-1",
    "nan",
    "inf",
    "-inf",
    "9" * 5000,
    "0x10",
    "1_0",
    "\x1b[2J",
    "[/red]",
    "x" * 100_000,
    "1.5",
]
WORDS = ["", "\x1b[2J", "[/red]", "x" * 100_000, "²", ",", ":", "0", "\udcff", "-", "../..", "{", "%", "\\", "a\nb"]


def _needed(world: World, out: Path) -> dict[tuple[str, ...], list[object]]:
    """What each command needs to go as far as its options."""
    slurm = [world.config, "--dry-run"]
    return {
        ("prep",): [world.root / "none.txt", "--out", out, "--vocab-size", 300],
        ("synthesize",): ["--out", out / "x.jsonl", "--documents", 1],
        ("train",): [world.config],
        ("plan",): [world.config],
        ("grow",): [world.root / "none", "--out", out, "--layers", 4],
        ("loop",): [world.run, "--out", out],
        ("export",): [world.run, "--out", out],
        ("import",): [world.root / "none", "--out", out],
        ("init-config",): [world.run, "--out", out / "c.yaml"],
        ("generate",): [world.run, "--prompt", "x", "--max-tokens", 1],
        ("eval",): [world.run, "--tasks", "copying", "--examples", 1, "--shots", "0", "--out", out / "e.jsonl"],
        ("export-tasks",): [out / "tasks", "--tasks", "copying"],
        ("diagnose",): [world.run, "--measures", "none", "--out", out / "d.jsonl"],
        ("report",): [world.run, "--out", out / "r.html"],
        ("checkpoints",): [world.run],
        ("doctor",): [world.run],
        ("submit",): [*slurm, "--nodes", 1, "--gpus-per-node", 1],
        ("status",): [world.run],
        ("cancel",): [world.run],
        ("bench", "step"): ["--shape", "none"],
        ("bench", "layers"): [world.root / "none"],
        ("bench", "prep"): [world.root / "none"],
        ("bench", "reshard"): [world.root / "none"],
        ("bench", "rounds"): ["--shape", "none"],
        ("bench", "schedule"): ["--shape", "none"],
        ("bench", "checkpoint"): [world.root / "none"],
        ("bench", "diagnose"): [world.root / "none"],
        ("bench", "decode"): [world.root / "none"],
        ("bench", "savings"): ["--preset", world.root / "none"],
    }


VISIBLE = [path for path, item in COMMANDS.items() if not hasattr(item, "commands") and not item.hidden]


@pytest.mark.parametrize("path", VISIBLE, ids=" ".join)
def test_an_option_that_gets_nonsense(path: tuple[str, ...], world: World, run: Run, tmp_path: Path) -> None:
    words = _needed(world, tmp_path / "out")[path]
    (tmp_path / "out").mkdir()
    for option in COMMANDS[path].params:
        name = next((opt for opt in option.opts if opt.startswith("--")), None)
        if name in (None, "--help") or getattr(option, "is_flag", False):
            continue
        numeric = option.type_descriptor.annotation in (int, float)
        words_of_it = WORDS if path != ("report",) else WORDS[:3]  # whatever the title, pictures are drawn each time
        for value in NUMBERS if numeric else words_of_it:
            if name == "--prompt" and len(value) > 1000:
                continue  # as good as any other
            code, *_ = check(run(*path, *words, f"{name}={value}"))
            if numeric and value in ("", "nan", "inf", "-inf", "x" * 100_000, "[/red]", "²"):
                assert code == 2, (name, value)
    for word in WORDS[1:]:
        if word not in ("-",):
            check(run(*path, *words, f"--{word}"))


@pytest.mark.parametrize("option", ["--difficulty", "--alphabet", "--length", "--digits"])
def test_an_option_of_a_task_that_gets_nonsense(option: str, run: Run, tmp_path: Path) -> None:
    task = [
        "--task",
        "addition" if option == "--digits" else "p-hop",
        *([] if option == "--difficulty" else ["--difficulty", 2]),
    ]
    for value in (*NUMBERS, *WORDS):
        code, *_ = check(run("synthesize", "--out", tmp_path / "x.jsonl", "--documents", 1, *task, f"{option}={value}"))
        assert code == 2 or value == "1_0", value  # which is ten


def test_words_that_are_no_command(run: Run) -> None:
    for word in ["trian", "\x1b[2J", "[/red]", "x" * 100_000, "²", "", "-", "--", "-x", "--\x1b", "\udcff", "a\nb"]:
        check(run(word))
        check(run("bench", word))
        check(run("train", "a", f"--{word}"))


ENVIRONMENT = ["abc", "", "²", "-1", "9" * 5000, "\x1b[2J", "[/red]", "1.5", "0x1"]


@pytest.mark.parametrize("value", ENVIRONMENT, ids=ascii)
def test_an_environment_full_of_nonsense(
    value: str, world: World, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    slurm = {
        "MEGALOOP_SLURM": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": "1",
    }  # fmt: skip
    for base in (torchrun, slurm):
        for name in base:
            if name in ("MASTER_ADDR", "MEGALOOP_SLURM", "SLURM_STEP_ID"):
                continue
            with monkeypatch.context() as patch:
                for other, good in base.items():
                    patch.setenv(other, good)
                patch.setenv(name, value)
                before = dict(os.environ)
                try:
                    assert check(run("train", world.config))[0] == 2, name
                finally:
                    os.environ.clear()
                    os.environ.update(before)
    for name in (
        "MEGALOOP_LAUNCHER",
        "MEGALOOP_RESTARTS",
        "MEGALOOP_EXIT_FILE",
        "MEGALOOP_ERROR_FILE",
        "SLURM_STEP_ID",
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(tmp_path / "none" / "x") if name.endswith("FILE") else value)
            check(run("train", world.config))
            check(run("train", world.root / "none"))


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(
    st.one_of(
        st.text(max_size=40),
        st.builds(
            "{}={}".format,
            st.sampled_from(
                ["train.steps", "name", "depth", "data.sources.0", "growth", "loop.ramp", "seed", "parallel"]
            ),
            st.text(max_size=30) | st.floats().map(repr) | st.integers().map(str),
        ),
        st.builds(
            "{}={}".format,
            st.text("abcdefgh.0123456789_-[]{}", max_size=20),
            st.recursive(
                st.sampled_from(["1", "x", "&a b", "*a", "!!int q", "? "]), lambda inner: st.lists(inner).map(str)
            ),
        ),
    )
)
def test_any_override(world: World, run: Run, text: str) -> None:
    check(run("plan", world.config, "--", text))
    check(run("plan", world.config, "--json", "--", text))


def test_every_command_explains_itself_in_full(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in brackets in a help text is there: rich would take it for markup."""
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    monkeypatch.setenv("COLUMNS", "400")
    for path, command in COMMANDS.items():
        code, out, _ = run(*path, "--help")
        assert code == 0, path
        shown = " ".join(out.replace("│", " ").split())
        texts = [command.help, *(getattr(param, "help", None) for param in command.params)]
        texts += [param.metavar for param in command.params]
        for text in texts:
            assert " ".join((text or "").replace("\\[", "[").split()) in shown, (path, text)
