"""Finds declared recipes: in a folder of modules, or in one file."""

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastcifar_jax.recipe import Published, Recipe

LAST = 100  # the ORDER of a module that states none


class Experiment(NamedTuple):
    """A declared recipe and what its module says about it."""

    recipe: Recipe
    predecessor: Recipe | None  # from the module's PARENTS, or the recipe before it in the module
    path: Path
    title: str  # of the module
    data: str | None  # the module's DATA, its default data source
    listed: bool  # the module's LISTED; False for one that `list` shows only with --all


def default_folder() -> Path | None:
    """The package `experiments`, if it can be imported."""
    spec = importlib.util.find_spec("experiments")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_experiments(folder: Path | None) -> list[Experiment]:
    """Every recipe of a folder's modules, sorted by the modules' ORDER, then by their names.

    A module that cannot be imported is left out with a logged warning, so that it does not stop the others.

    Raises:
      ValueError: there are none.
    """
    found = []
    for path in sorted(folder.glob("[!_]*.py")) if folder else []:
        try:
            if "RECIPE" not in path.read_text(encoding="utf-8"):
                continue  # an unrelated module is not imported
            module = importlib.import_module(f"{path.parent.name}.{path.stem}")
            found.append((getattr(module, "ORDER", LAST), _declared(module, path)))
        except Exception as error:
            logging.getLogger(__name__).warning("%s is left out: %s: %s", path, type(error).__name__, error)
    if not found:
        raise ValueError(
            f"no experiments in {folder or 'this folder'}; run from a clone, or give the path of a file with a RECIPE"
        )
    return [experiment for _, experiments in sorted(found, key=lambda pair: pair[0]) for experiment in experiments]


def resolve(names: Sequence[str], folder: Path | None) -> list[Experiment]:
    """The experiments with these names, each once.

    A name that ends in .py is the path of a file; one with a `*` stands for all experiments that it matches.

    Raises:
      ValueError: an unknown or ambiguous name, or a file without recipes.
    """
    find_once = functools.cache(lambda: find_experiments(folder))
    chosen = []
    for name in dict.fromkeys(names):
        if name.endswith(".py"):
            chosen += _declared(_import_file(Path(name)), Path(name))
            continue
        matches = [experiment for experiment in find_once() if fnmatch.fnmatchcase(experiment.recipe.name, name)]
        if not matches:
            known = [experiment.recipe.name for experiment in find_once()]
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "none, see the command list"
            raise ValueError(f"there is no experiment {name!r}; nearest: {near}")
        if len(matches) > 1 and "*" not in name:
            raise ValueError(f"{name!r} is declared more than once: {', '.join(str(match.path) for match in matches)}")
        chosen += matches
    return chosen


def _declared(module: ModuleType, path: Path) -> list[Experiment]:
    """The module's RECIPES, or its RECIPE under the name of the file.

    A RECIPE is usually derived from another one, whose name and published figures it must not inherit.
    """
    recipes = getattr(module, "RECIPES", ())
    if recipe := getattr(module, "RECIPE", None):
        inherited = isinstance(recipe, Recipe) and recipe.name != path.stem
        recipes = (dataclasses.replace(recipe, name=path.stem, published=Published()) if inherited else recipe,)
    if not recipes or not isinstance(recipes, tuple) or not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise ValueError(f"{path} holds no recipes; it needs RECIPE = a Recipe, or RECIPES = a tuple of them")
    title = f"{path.stem}: {(module.__doc__ or '').strip().partition(chr(10))[0]}".removesuffix(": ")
    parents = getattr(module, "PARENTS", {})
    about = path, title, getattr(module, "DATA", None), getattr(module, "LISTED", True)
    return [
        Experiment(recipe, parents.get(recipe.name, before), *about)
        for recipe, before in zip(recipes, (None, *recipes[:-1]), strict=True)
    ]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    # The whole path as the name: it collides with no other module. Type hints are looked up in sys.modules.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{path}{where}: {type(error).__name__}: {error}; fix the file") from error
    return module
