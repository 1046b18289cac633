"""The rules of the design that a reader would otherwise have to trust."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastcifar_jax"
# A folder or a module of the top level may import those on the lines above it, and a folder itself.
ORDER = (
    "types serialization",
    "ops data augment losses schedules",
    "models optim evaluate",
    "muon averaging",
    "recipe",
    "hparams train_step",
    "functions",
    "train",
    "parallel torch_baseline",
    "runs",
    "analysis",
    "report",
    "cli",
    "__main__",
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
IDS = [path.relative_to(PACKAGE).as_posix() for path in FILES]


def imports(path):
    """Every module that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """The folder or top-level module of `fastcifar_jax.room.more`; None for another package."""
    package, _, rest = name.partition(".")
    return rest.split(".")[0] if package == "fastcifar_jax" and rest.split(".")[0] in LEVEL else None


def users_of(package):
    """The files that import it."""
    return {path.relative_to(PACKAGE) for path in FILES if package in {name.split(".")[0] for name in imports(path)}}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        other = room(name)
        if other is not None and other != own:
            assert LEVEL[other] < LEVEL[own], f"{path.relative_to(PACKAGE)} imports {name}"
        assert name.split(".")[0] != "experiments"


def test_no_cycles_inside_a_folder():
    graph = {}
    for path in FILES:
        own = "fastcifar_jax." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[own] = set(imports(path))
    names = {
        own: {o for o in graph if o != own and (o in found or any(f.startswith(o + ".") for f in found))}
        for own, found in graph.items()
    }
    while names:
        free = {own for own, found in names.items() if not found & names.keys()}
        assert free, f"these import each other: {sorted(names)}"
        names = {own: found for own, found in names.items() if own not in free}


def test_flax_is_imported_by_the_networks_alone():
    assert {path.parts[0] for path in users_of("flax")} == {"models"}


def test_torch_is_imported_only_to_compare_with_and_tensorflow_nowhere():
    assert {path.parts[0] for path in users_of("torch")} == {"torch_baseline"}
    assert users_of("tensorflow") == set()


def test_only_the_command_line_prints():
    printers = {
        path.relative_to(PACKAGE).parts[0]
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printers <= {"cli"}
