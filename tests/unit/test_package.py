"""What a user installs: one wheel, of which nothing is missing, and which asks for no more than it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from colm_scale.config import RunConfig
from colm_scale.engines import ds_config
from colm_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "colm_scale"
EXTRAS = {"deepspeed", "flash", "quantize", "report", "dev"}
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "matplotlib", "rich")
# Where a distribution and its module have different names; and what comes with transformers, jsonargparse, datasets and
# DeepSpeed, which cannot do without it.
DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "sklearn": "scikit-learn"}
COMES_ALONG = {"huggingface_hub", "markupsafe", "numpy", "pyarrow", "pydantic", "threadpoolctl", "tokenizers", "yaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # as a clone has it, so that nothing that a build left behind gets in
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


def _copy(file: Path, to: Path) -> None:
    if file.is_symlink():
        to.symlink_to(file.readlink())
    else:
        to.write_bytes(file.read_bytes())


def _metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_the_wheel_has_every_file_of_the_package_and_none_beside_it(wheel):
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    folders = (PACKAGE / "base" / name for name in ("mixture", "weights"))
    data = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.iterdir()}
    configs = {f"colm_scale/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    assert {"colm_scale/base/weights/model.safetensors", "colm_scale/base/mixture/train.jsonl.gz"} <= data
    assert len(configs) == 5
    assert modules | data | configs | {"colm_scale/py.typed"} <= there
    assert {name for name in there if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in there} == {"colm_scale"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_names_its_extras_and_its_command(wheel):
    metadata = _metadata(wheel)
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {"torch", "transformers", "peft"} <= {re.match(r"[\w-]+", line)[0] for line in needed}
    assert not [line for line in needed if re.match(r"deepspeed|flash|bitsandbytes|matplotlib", line)]
    (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "colm-scale = colm_scale.cli.main:main" in wheel.read(points).decode()


@pytest.mark.parametrize("imported", ["colm_scale", "colm_scale.cli.main", "colm_scale.config.command_line"])
def test_importing_it_imports_nothing_heavy(imported):
    """So that a mistyped option is answered at once, and so that it works where an extra is not installed."""
    code = f"import sys, {imported}; print(*(name for name in {HEAVY} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []


def test_deepspeed_is_imported_by_its_engine_alone_and_never_by_importing_a_module():
    """At the top of a module it would be needed by every run; within a function only by those that ask for it."""
    at_the_top = [
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "deepspeed" in ast.unparse(node).split()[1].split(".")
    ]
    assert not at_the_top


def test_a_deepspeed_configuration_without_deepspeed_names_the_extra(monkeypatch):
    find_spec = ds_config.importlib.util.find_spec
    monkeypatch.setattr(
        ds_config.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name)
    )
    with pytest.raises(UserError, match=r"--ds_config zero2 needs DeepSpeed.*'colm_scale\[deepspeed\]'"):
        ds_config.read_ds_config(RunConfig(ds_config="zero2"), 2)


def test_what_is_imported_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {re.match(r"[\w-]+", line)[0] for line in asked}
    imported = {
        module.split(".")[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for module in _imported(node)
    }
    others = imported - sys.stdlib_module_names - {"colm_scale"}
    base = {path.stem for path in (PACKAGE / "base").glob("*.py")}  # scripts that import each other, run by hand
    assert "torch" in others
    assert not {DISTRIBUTIONS.get(name, name) for name in others - base} - names - COMES_ALONG


def test_the_lowest_versions_are_those_of_make_test_versions():
    """But for torch, which the Makefile chooses, and flash attention, which needs a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    asked = map(Requirement, [*project["dependencies"], *extras])
    lowest = {of.name.lower(): _lower_bound(of) for of in asked if of.name not in ("torch", "flash-attn")}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text("utf-8").lower(), re.M))
    found = {name: pinned[name].split(".")[: len(bound)] for name, bound in lowest.items()}
    assert found == lowest


def _lower_bound(requirement: Requirement) -> list[str]:
    (bound,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
    return bound.split(".")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
