"""The public names of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastcifar_jax
from fastcifar_jax.recipe import Recipe


def test_importing_the_package_does_not_import_jax():
    code = "import sys, fastcifar_jax; assert 'Recipe' in dir(fastcifar_jax); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_what_is_imported_lazily():
    tree = ast.parse(Path(fastcifar_jax.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastcifar_jax")
        for alias in node.names
    }
    lazy = {name: f"fastcifar_jax.{module}.{real}" for name, (module, real) in fastcifar_jax._HOMES.items()}
    assert seen == lazy and len(fastcifar_jax.__all__) == len(lazy)


@pytest.mark.parametrize("name", fastcifar_jax.__all__)
def test_name_can_be_imported(name):
    found = getattr(fastcifar_jax, name)
    assert callable(found) and not isinstance(found, Recipe)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Recip'"):
        fastcifar_jax.Recip  # noqa: B018
