"""The examples in docstrings say what comes out."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastcifar_jax"
EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    module = importlib.import_module(f"fastcifar_jax.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_the_modules_that_are_called_by_users_have_examples():
    assert {"augment", "analysis.compare", "cli.options", "recipe", "schedules", "analysis.stats"} <= set(EXAMPLES)
