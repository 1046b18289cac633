"""Whether the tests notice a broken number: each constant and each operation of a module is changed, one at a time.

    python -m tests.mutation optim stats augment

A mutant survives if the tests of its module still pass: a test is missing, or the number makes no difference. Each
mutant costs a run of the module's tests up to the first that fails, so this is no part of the suite.
"""

import ast
import copy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {  # module: the tests that are about it
    "optim": ("test_optim.py", "test_airnet.py"),
    "stats": ("test_stats.py", "test_stats_crossing.py"),
    "augment": ("test_augment.py",),
}
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """`(what was changed, changed source)` for every number and every +, -, * and / of a module."""
    tree = ast.parse(source)
    for i, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            new = node.value + 1 if type(node.value) is int else node.value * 1.5 or 0.5
            change = {"value": new}
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            change = {"op": SWAPPED[type(node.op)]()}
        else:
            continue
        mutant = copy.deepcopy(tree)
        target = next(other for j, other in enumerate(ast.walk(mutant)) if j == i)
        before = ast.unparse(target)
        for name, value in change.items():
            setattr(target, name, value)
        yield f"line {node.lineno}: {before} -> {ast.unparse(target)}", ast.unparse(mutant)


def survives(module: str, source: str, copy_of_project: Path) -> bool:
    """Whether the tests of `module` pass with `source` in its place."""
    file = copy_of_project / "fastcifar_jax" / f"{module}.py"
    original = file.read_text(encoding="utf-8")
    file.write_text(source, encoding="utf-8")
    tests = [f"tests/{name}" for name in TESTS[module]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy_of_project, capture_output=True, text=True)
    finally:
        file.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1, 2, 4):  # passed, failed, tests or conftest.py could not be imported
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(modules: list[str]) -> int:
    """Prints the survivors of each module; 1 if there are any."""
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for name in ("fastcifar_jax", "experiments", "tests"):
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.cfg", project)
        for module in modules:
            source = (ROOT / "fastcifar_jax" / f"{module}.py").read_text(encoding="utf-8")
            if not survives(module, source, project):
                sys.exit(f"the tests of {module} fail without a mutation; mend them first")
            count = alive = 0
            for what, mutant in mutants(source):
                count += 1
                if survives(module, mutant, project):
                    alive += 1
                    print(f"{module}: {what} survives", flush=True)
            print(f"{module}: {count} mutants, {alive} survive", flush=True)
            total += alive
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(TESTS)))
