"""Which tricks transfer: each of `airbench94`'s in `final`, and each of `final`'s in `airbench94`.

    python -m experiments compare final 'final_with_*' --seeds 4
    python -m experiments compare airbench94 'airbench94_with_*' --seeds 4

Each arm replaces one part and tunes nothing else: it shows the effect of a trick in a recipe that it was not made for.
"""

from dataclasses import replace

from experiments.airbench import airbench94
from experiments.bag_of_tricks import final
from fastcifar_jax.augment import AlternatingFlip, Crop, Flip, GroupedSampling
from fastcifar_jax.averaging import Ema, Lookahead
from fastcifar_jax.evaluate import FlipTTA, SixViewTTA
from fastcifar_jax.models.activations import Celu, Gelu
from fastcifar_jax.muon import Muon
from fastcifar_jax.optim import AirbenchSGD, Nesterov
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.schedules import WarmupDecay

LISTED = False  # by `list`, except with --all
GROUP = 32  # images per ghost group in `final`


def _with_model(recipe: Recipe, **changes) -> Recipe:
    return replace(recipe, model=replace(recipe.model, **changes))


def _with_norm(recipe: Recipe, **changes) -> Recipe:
    return _with_model(recipe, norm=replace(recipe.model.norm, **changes))


# airbench94's learning rates, converted to a mean loss and to a schedule in epochs instead of steps.
_NESTEROV = Nesterov(
    peak_lr=1.5, momentum=0.85, weight_decay=1.362 / 1024, bias_scale=64.0, schedule=WarmupDecay(warmup=0.23, end=0.07)
)


def _muon(recipe: Recipe) -> Recipe:
    """With Muon. Its learning rate of the head is for an output scale of 1/256; it scales with the inverse square."""
    rate = Muon().head_lr / (256 * recipe.model.output_scale) ** 2
    return replace(recipe, optim=Muon(head_lr=rate))


NEW = {
    "alternating_flip": replace(final, augmentations=(Crop(4), AlternatingFlip())),
    "translate_2": replace(final, augmentations=(Crop(2), Flip())),
    "dirac": _with_model(final, dirac=True),
    "gelu": _with_model(final, activation=Gelu()),
    "fast_statistics": _with_norm(final, momentum=0.6),
    "lookahead": replace(final, average=Lookahead()),
    "kilostep": replace(final, optim=AirbenchSGD(whiten_bias_epochs=None)),
    "muon": _muon(final),
    "six_views": replace(final, tta=SixViewTTA()),
}
OLD = {
    "random_flip": replace(airbench94, augmentations=(Crop(2), Flip())),
    "random_init": _with_model(airbench94, dirac=False),
    "celu": _with_model(airbench94, activation=Celu(0.3)),
    "ghost_norm": _with_norm(airbench94, num_groups=airbench94.batch_size // GROUP),
    "slow_statistics": _with_norm(airbench94, momentum=0.9),
    "ema": replace(airbench94, average=Ema()),
    "no_average": replace(airbench94, average=None),
    "nesterov": replace(airbench94, optim=_NESTEROV),
    "muon": _muon(airbench94),
    "shuffled_groups": replace(airbench94, augmentations=(Crop(2), Flip()), sampling=GroupedSampling(200)),
    "two_views": replace(airbench94, tta=FlipTTA()),
}


def _named(recipe: Recipe, name: str) -> Recipe:
    return replace(recipe, name=name, published=Published())


RECIPES = (
    *(_named(recipe, f"final_with_{name}") for name, recipe in NEW.items()),
    *(_named(recipe, f"airbench94_with_{name}") for name, recipe in OLD.items()),
)
PARENTS = {recipe.name: final if recipe.name.startswith("final") else airbench94 for recipe in RECIPES}
