"""The rooms of the package and the order in which they may know each other, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "colm_scale"
MODULES = sorted(ROOT.rglob("*.py"))
ROOMS = (
    *("errors", "randomness", "records", "base", "config"),
    *("data", "selection", "modeling", "sketch", "clustering"),
    *("distributed", "profiling", "engines", "estimators", "step"),
    *("reporting", "checkpoint", "plan", "run"),
    *("adapter", "sources", "explain", "doctor", "integrations", "cli"),
)
"""Every room, and the three modules beside them. A module imports from its own room and from those before it."""
FACES = {"__init__", "__main__"}
SINGLE = {"errors", "randomness", "records"}
TALKING = ("distributed", "engines")
"""The rooms that may use torch.distributed and DeepSpeed."""
PLACE = {name: place for place, name in enumerate(ROOMS)}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def room_of(module: str) -> str | None:
    """The room of ``colm_scale.X...``; None for the package itself and for others'."""
    package, _, rest = module.partition(".")
    room = rest.split(".")[0]
    return room if package == "colm_scale" and room in PLACE else None


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


def test_every_module_is_in_a_room():
    assert len(MODULES) > 30
    beside = {path.stem for path in MODULES if path.parent == ROOT}
    assert beside == FACES | SINGLE
    rooms = {path.relative_to(ROOT).parts[0] for path in MODULES if path.parent != ROOT}
    assert rooms | SINGLE == set(ROOMS)


LINKS = {
    (room_of(name_of(path)), room_of(module)): f"{name_of(path)}, line {line}: {module}"
    for path in MODULES
    for module, line in imports(path)
    if room_of(name_of(path)) and room_of(module)
}
"""An import of each pair of rooms of which the one knows the other."""
PAIRS = sorted(pair for pair in LINKS if pair[0] != pair[1])


def test_the_rooms_do_know_each_other():
    assert len(PAIRS) > 100
    assert all((upper, "config") in PAIRS for upper in ("step", "run", "cli"))


@pytest.mark.parametrize(("room", "known"), PAIRS, ids="-".join)
def test_imports_go_down_only(room, known):
    assert PLACE[known] < PLACE[room], LINKS[room, known]


def test_no_module_imports_itself_in_a_circle():
    """Within a room too: the graph of modules has no cycle."""
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


def test_only_two_rooms_talk_to_other_ranks():
    """ruff bans it as well; this holds if somebody writes a noqa, or imports within a function."""
    strangers = {}
    inside = set()
    for path in MODULES:
        used = {module for module, _ in imports(path) if _is_collective(module)}
        used |= _attributes(path)
        if room_of(name_of(path)) in TALKING:
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


def _functions(name: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / "step" / f"{name}.py").read_text("utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {f"{c.name}.{f.name}": f for c in classes for f in c.body if isinstance(f, ast.FunctionDef)}


def _spans(function: ast.FunctionDef) -> list[str]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args]
    names = [(node.lineno, node.args[0].value) for node in calls if ast.unparse(node.func).endswith("spans")]
    return [name for _, name in sorted(names)]


def test_a_step_names_its_stages_in_the_order_of_the_design():
    from colm_scale.step.step import PHASES

    select, sketch = _functions("select")["SelectionStage.__call__"], _functions("sketch")
    first, second, third = _spans(select)
    named = [first, *_spans(sketch["EstimatorStage.__call__"]), second, third, *_spans(sketch["EstimatorStage.learn"])]
    named += _spans(_functions("step")["CoresetStep.__call__"])
    assert tuple(named) == PHASES


def test_the_two_halves_of_a_step_fit_on_one_screen():
    halves = _functions("select")["SelectionStage.__call__"], _functions("step")["CoresetStep.__call__"]
    assert sum(half.end_lineno - half.lineno + 1 for half in halves) <= 50


def test_no_class_of_the_step_is_long():
    for path in (ROOT / "step").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno + 1 <= 120, node.name


def test_few_parameters():
    """Six at most; records, whose constructors are not written out, take what they hold."""
    long = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = node.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls", "ctx", "_ctx")])
                if count > 6:
                    long[f"{name_of(path)}:{node.name}"] = count
    assert not long
