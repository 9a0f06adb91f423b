"""Which room may use which: imports point down the list of ``docs/ARCHITECTURE.md``, and nothing goes in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = (
    "ground",  # errors, text, terminal: modules of their own
    "depth",
    "config",
    "runtime",
    "tokenizer",
    "model",
    "layout",
    "checkpoint",
    "huggingface",
    "data",
    "parallel",
    "runs",
    "plan",
    "inference",
    "evaluation",
    "analysis",
    "train",
    "report",
    "bench",
    "cli",
)
"""From the ground up."""

BESIDE = {
    "launchers": {"ground", "config", "data", "tokenizer"},
    "data_prep": {"ground", "config", "data", "tokenizer", "runtime"},
}
"""What the packages beside megaloop may use of it, and that nothing in megaloop but cli uses them."""


def room_of(module: str) -> str:
    """``megaloop.depth.plan`` is in depth, ``megaloop.errors`` on the ground, ``launchers.local`` in launchers."""
    package, *rest = module.split(".")
    if package != "megaloop":
        return package
    return rest[0] if rest and rest[0] in ROOMS else "ground"


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of ours in a file, those for the type checker and those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found = [node.module or ""]
            if node.module == "megaloop":
                found = [f"megaloop.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in found if name.split(".")[0] in ("megaloop", *BESIDE))


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["megaloop", *BESIDE])
def test_arrows_point_down(package: str) -> None:
    wrong = []
    for path in files(package):
        own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for module, line in imports(path):
            other = room_of(module)
            if package == "megaloop":
                fine = own == "cli" if other in BESIDE else ROOMS.index(other) <= ROOMS.index(own)
            else:
                fine = other == own or other in BESIDE[own]
            if not fine and not (path.name == "__main__.py" and package == "megaloop"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} uses {module}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_list() -> None:
    found = {path.parent.name for path in (ROOT / "megaloop").glob("*/__init__.py")}
    found |= {path.name for path in (ROOT / "megaloop").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert found == set(ROOMS) - {"ground"}


def test_no_module_is_in_a_circle() -> None:
    """Of those that are imported when their module is; what is imported inside a function, or for types, is not."""
    graph: dict[str, set[str]] = {}
    for package in ("megaloop", *BESIDE):
        for path in files(package):
            own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            graph[own] = set(_at_the_top(ast.parse(path.read_text(encoding="utf-8")), graph, own))
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _at_the_top(tree: ast.Module, graph: dict[str, set[str]], own: str) -> Iterator[str]:
    """Modules that a module imports itself; a package stands for its ``__init__``, unless it is the module's own."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                file = (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").is_file()
                name = f"{node.module}.{alias.name}" if file else node.module
                package = (ROOT / name.replace(".", "/")).is_dir()
                if name.split(".")[0] in ("megaloop", *BESIDE):
                    yield f"{name}.__init__" if package else name


@pytest.mark.parametrize("package", ["megaloop", *BESIDE])
def test_files_and_functions_stay_small(package: str) -> None:
    """450 lines a file; 60 a function, besides its signature (of a command: its options) and its docstring."""
    long = []
    for path in files(package):
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 450:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                size = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if size > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {size} lines")
    assert not long, "\n".join(long)
