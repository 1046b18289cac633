"""Finds declared recipes: in a folder of modules, or in one file."""

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastcifar_jax.recipe import Published, Recipe


class Experiment(NamedTuple):
    """A declared recipe and where it was declared."""

    recipe: Recipe
    predecessor: Recipe | None  # the module's PARENTS names it; else the one before it in the module
    path: Path
    title: str  # of its module
    data: str | None  # default source of its module


def default_folder() -> Path | None:
    """The package `experiments`, where it can be imported."""
    spec = importlib.util.find_spec("experiments")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_experiments(folder: Path | None) -> list[Experiment]:
    """Every recipe of a folder's modules, in the order of the modules' names.

    A module that cannot be imported is left out with a warning: one broken file need not stop the others.

    Raises:
      ValueError: there are none.
    """
    experiments = []
    paths = sorted(folder.glob("[!_]*.py")) if folder else []
    for path in paths:
        try:
            if "RECIPE" not in path.read_text(encoding="utf-8"):
                continue  # not ours: nothing is imported that does not ask for it
            experiments += _declared(importlib.import_module(f"{path.parent.name}.{path.stem}"), path)
        except Exception as error:
            print(f"warning: {path} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    if not experiments:
        raise ValueError(
            f"no experiments in {folder or 'this folder'}; run from a clone, or give the path of a file with a RECIPE"
        )
    return experiments


def resolve(names: Sequence[str], folder: Path | None) -> list[Experiment]:
    """The experiments of these names, each once.

    A name that ends with .py is the path of a file; one with a `*` stands for all experiments that it matches.

    Raises:
      ValueError: an unknown or ambiguous name, or a file without recipes.
    """
    find_once = functools.cache(lambda: find_experiments(folder))
    chosen = []
    for name in dict.fromkeys(names):
        if name.endswith(".py"):
            path = Path(name)
            chosen += _declared(_import_file(path), path)
            continue
        declared = find_once()
        matches = [experiment for experiment in declared if fnmatch.fnmatchcase(experiment.recipe.name, name)]
        if not matches:
            known = [experiment.recipe.name for experiment in declared]
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "none, see the command list"
            raise ValueError(f"there is no experiment {name!r}; nearest: {near}")
        if len(matches) > 1 and "*" not in name:
            raise ValueError(f"{name!r} is declared more than once: {', '.join(str(match.path) for match in matches)}")
        chosen += matches
    return chosen


def _declared(module: ModuleType, path: Path) -> list[Experiment]:
    """The module's RECIPES, or its RECIPE under the name of the file.

    A RECIPE is made from another one as a rule; the name and the published figures that it inherits are not its own.
    """
    recipes = getattr(module, "RECIPES", ())
    if recipe := getattr(module, "RECIPE", None):
        inherited = isinstance(recipe, Recipe) and recipe.name != path.stem
        recipes = (dataclasses.replace(recipe, name=path.stem, published=Published()) if inherited else recipe,)
    if not recipes or not isinstance(recipes, tuple) or not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise ValueError(f"{path} holds no recipes; it needs RECIPE = a Recipe, or RECIPES = a tuple of them")
    title = f"{path.stem}: {(module.__doc__ or '').strip().partition(chr(10))[0]}".removesuffix(": ")
    data = getattr(module, "DATA", None)
    bases = getattr(module, "PARENTS", {})
    return [
        Experiment(recipe, bases.get(recipe.name, before), path, title, data)
        for recipe, before in zip(recipes, (None, *recipes[:-1]), strict=True)
    ]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    # The whole path as the name: it collides with no module. Type hints are looked up in sys.modules.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; give one whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{path}{where}: {type(error).__name__}: {error}; mend the file") from error
    return module
