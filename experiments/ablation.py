"""Ablations of the ladder: `final` without one trick at a time, and `baseline` with only one.

    python -m experiments compare final 'final_without_*' --seeds 5
    python -m experiments compare baseline 'baseline_with_*' --seeds 5

Every arm has the number of epochs of the recipe that it is derived from. Flip TTA needs no arm of its own: compare
`--metric test_accuracy` with `--metric tta_accuracy`.
"""

from collections.abc import Callable
from dataclasses import replace

from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.augment import Crop, Cutout, Flip
from fastcifar_jax.recipe import Published, Recipe

LISTED = False  # by `list`, except with --all


def _with_model(recipe: Recipe, **changes) -> Recipe:
    return replace(recipe, model=replace(recipe.model, **changes))


# Each function takes a recipe and another one to copy one trick from: `final` to add it, `baseline` to remove it.


def _sampling(recipe, like):
    return replace(recipe, sampling=like.sampling)


def _pool_order(recipe, like):
    return _with_model(recipe, pool_order=like.model.pool_order)


def _label_smoothing(recipe, like):
    return replace(recipe, loss=like.loss)


def _celu(recipe, like):
    return _with_model(recipe, activation=like.model.activation)


def _ghost_norm(recipe, like):
    return _with_model(recipe, norm=replace(recipe.model.norm, num_groups=like.model.norm.num_groups))


def _frozen_scales(recipe, like):
    # The trick is all three changes: fixed scales allow faster biases and change the best scale of the logits.
    recipe = _with_model(
        recipe,
        norm=replace(recipe.model.norm, train_scale=like.model.norm.train_scale),
        output_scale=like.model.output_scale,
    )
    return replace(recipe, optim=replace(recipe.optim, bias_scale=like.optim.bias_scale))


def _whitening(recipe, like):
    return _with_model(recipe, whiten=like.model.whiten)


def _ema(recipe, like):
    # The learning rate should end above zero with an average, and at zero without one.
    return replace(recipe, average=like.average, optim=replace(recipe.optim, schedule=like.optim.schedule))


def _peak_lr(recipe, like):
    return replace(recipe, optim=replace(recipe.optim, peak_lr=like.optim.peak_lr))


def _no_cutout(recipe, like):
    cutout = any(isinstance(augmentation, Cutout) for augmentation in like.augmentations)
    return replace(recipe, augmentations=(Crop(4), Flip(), Cutout(8)) if cutout else (Crop(4), Flip()))


TRICKS: dict[str, Callable[[Recipe, Recipe], Recipe]] = {
    "shuffled_groups": _sampling,
    "early_pool": _pool_order,
    "label_smoothing": _label_smoothing,
    "celu": _celu,
    "ghost_norm": _ghost_norm,
    "frozen_scales": _frozen_scales,
    "whitening": _whitening,
    "ema": _ema,
    "peak_lr_1": _peak_lr,
    "no_cutout": _no_cutout,
}


def _named(recipe: Recipe, name: str) -> Recipe:
    return replace(recipe, name=name, published=Published())


RECIPES = (
    *(_named(change(final, baseline), f"final_without_{name}") for name, change in TRICKS.items()),
    *(_named(change(baseline, final), f"baseline_with_{name}") for name, change in TRICKS.items()),
)
PARENTS = {recipe.name: final if recipe.name.startswith("final") else baseline for recipe in RECIPES}
