"""The rules of the design that a reader would otherwise have to trust."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastcifar_jax"
ORDER = (
    "types unpickle readers data augment whitening onednn_trial conv pooling norm activations model "
    "resnet9 airnet losses schedules optim muon evaluate recipe tunable parts step train hosts mesh seeds records "
    "checkpoint saved scores stats report comparison trade discover live runs together bench "
    "bench_worker options compare_cli plot_data plots graph drawing plot_cli saved_cli "
    "tables charts page report_cli reproduce reproduce_cli cli __main__"
).split()
LATE = {("onednn_trial", "conv")}  # the trial's own program, which runs in another process


def imports(path):
    """Every module that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users_of(package):
    """The modules that import it."""
    files = PACKAGE.glob("*.py")
    return {path.stem for path in files if any(module.split(".")[0] == package for module in imports(path))}


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    for module in imports(PACKAGE / f"{name}.py"):
        package, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if package == "fastcifar_jax" and other in ORDER:
            assert ORDER.index(other) < ORDER.index(name) or (name, other) in LATE, f"{name} imports {other}"
        assert package != "experiments"


def test_flax_is_imported_by_the_networks_alone():
    assert users_of("flax") == {"model", "resnet9", "airnet"}


def test_torch_is_imported_only_to_compare_with_and_tensorflow_nowhere():
    assert users_of("torch") == {"bench_worker"}
    assert users_of("tensorflow") == set()
