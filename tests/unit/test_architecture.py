"""The order in which modules may know each other, read from their imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "colm_scale"
MODULES = sorted(ROOT.rglob("*.py"))
# A module imports only from layers below its own, or from its own layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "randomness", "records", "base", "drawing"),
    ("config",),
    ("schedule", "data", "selection", "modeling", "sources"),
    ("sketch",),
    ("distributed",),
    ("doctor", "profiling", "reporting", "evaluate", "inputs", "checkpoint", "session", "finite", "step"),
    ("assembly",),
    ("trainer",),
    ("planning", "explaining", "integrations"),
    ("dry_run",),
    ("arguments",),
    ("trained",),
    ("commands",),
    ("cli",),
)
PLACE = {name: place for place, layer in enumerate(LAYERS) for name in layer}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def layer_of(module: str) -> int | None:
    """Place of ``colm_scale.X...``; None for the package itself and for others'."""
    package, _, rest = module.partition(".")
    return PLACE.get(rest.split(".")[0]) if package == "colm_scale" else None


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, wherever in the file, and the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [(node.module, node.lineno)]
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_every_module_has_a_layer():
    assert len(MODULES) > 30
    tops = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert tops - {"__init__", "__main__"} == set(PLACE)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    own = layer_of(name)
    if own is None:
        return
    found = [(module, f"line {line}: {module}") for module, line in imports(path) if layer_of(module) is not None]
    assert not [text for module, text in found if layer_of(module) > own]


def test_no_package_imports_itself_in_a_circle():
    """Within a layer too: the graph of modules has no cycle."""
    names = {name_of(path): path for path in MODULES}
    graph = {name: {module for module, _ in imports(path) if module in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_only_one_folder_talks_to_other_ranks():
    """ruff bans it as well; this holds if somebody writes a noqa, or imports within a function."""
    strangers = {}
    inside = set()
    for path in MODULES:
        used = {module for module, _ in imports(path) if _is_collective(module)}
        used |= _attributes(path)
        if path.is_relative_to(ROOT / "distributed"):
            inside |= used
        elif used:
            strangers[name_of(path)] = used
    assert not strangers
    assert {module.split(".")[0] for module in inside} == {"torch", "deepspeed"}  # the search does find them


def _is_collective(module: str) -> bool:
    return module.split(".")[0] == "deepspeed" or module.split(".")[:2] == ["torch", "distributed"]


def _attributes(path: Path) -> set[str]:
    """``torch.distributed`` by way of the attribute."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute))
    return {
        "torch.distributed"
        for node in nodes
        if node.attr == "distributed" and isinstance(node.value, ast.Name) and node.value.id == "torch"
    }


def test_the_step_names_its_stages_in_the_order_of_the_design():
    from colm_scale.step.step import PHASES

    tree = ast.parse((ROOT / "step.py").read_text("utf-8"))
    spans = [
        (node.lineno, node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "spans"
    ]
    assert tuple(phase for _, phase in sorted(spans)) == PHASES
