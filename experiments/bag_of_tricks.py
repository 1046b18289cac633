"""From 75 s to 26 s: every step of the bag of tricks, each added to the one before it.

    python -m experiments run final
    python -m experiments.bag_of_tricks --seeds 5

The second command runs all of them. `published` holds the accuracies, V100 times and numbers of runs that the post
"How to Train Your ResNet 8: Bag of Tricks" and its notebook state.
"""

from dataclasses import replace

from fastcifar_jax.augment import Crop, Cutout, Flip, GroupedSampling, IndependentSampling
from fastcifar_jax.averaging import Ema
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.activations import Celu, Relu
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.schedules import WarmupDecay

ORDER = 2
POST = "How to Train Your ResNet 8"


def step(recipe: Recipe, name: str, published: Published, **changes) -> Recipe:
    """The next step: `recipe` with a new name and some parts replaced."""
    return replace(recipe, name=name, published=published, **changes)


baseline = Recipe(
    name="baseline",
    num_epochs=24,
    augmentations=(Crop(4), Flip(), Cutout(8)),
    sampling=IndependentSampling(),
    model=ResNet9(activation=Relu(), norm=BatchNormConfig(), output_scale=1 / 8),
    loss=CrossEntropy(),
    optim=Nesterov(peak_lr=0.4, momentum=0.9, weight_decay=5e-4, schedule=WarmupDecay(warmup=5 / 24)),
    published=Published(0.941, 75, source=f"{POST}, baseline; dawn.py"),
)
# Here the post tries float32 master weights for its half-precision network and finds no effect on accuracy. Ours are
# float32 in every recipe, so that step is this recipe with compute_dtype="float16".
gpu_preprocessing = step(
    baseline,
    "gpu_preprocessing",
    Published(None, 70, source=f"{POST}, preprocessing on the GPU"),
    sampling=GroupedSampling(200),
)
pool_before_activation = step(
    gpu_preprocessing,
    "pool_before_activation",
    Published(None, None, source=f"{POST}, moving max-pool layers"),
    model=replace(gpu_preprocessing.model, pool_order="conv_norm_pool_act"),
)
pool_before_norm = step(
    pool_before_activation,
    "pool_before_norm",
    Published(0.940, None, runs=50, source=f"{POST}, moving max-pool layers"),
    model=replace(pool_before_activation.model, pool_order="conv_pool_norm_act"),
)
max_pool = step(
    pool_before_norm,
    "max_pool",
    Published(0.941, 64, source=f"{POST}, moving max-pool layers"),
    num_epochs=25,
    optim=replace(baseline.optim, schedule=WarmupDecay(warmup=1 / 5)),
)
label_smoothing_25 = step(
    max_pool,
    "label_smoothing_25",
    Published(0.942, None, runs=50, source=f"{POST}, label smoothing"),
    loss=CrossEntropy(label_smoothing=0.2),
)
label_smoothing = step(
    label_smoothing_25, "label_smoothing", Published(0.941, 59, source=f"{POST}, label smoothing"), num_epochs=23
)
celu_23 = step(
    label_smoothing,
    "celu_23",
    Published(0.943, None, runs=50, source=f"{POST}, CELU activations"),
    model=replace(label_smoothing.model, activation=Celu(0.075)),
)
celu = step(celu_23, "celu", Published(0.941, 52, source=f"{POST}, CELU activations"), num_epochs=20)
ghost_norm_20 = step(
    celu,
    "ghost_norm_20",
    Published(0.942, None, source=f"{POST}, ghost batch norm"),
    model=replace(celu.model, norm=BatchNormConfig(num_groups=16)),
)
ghost_norm = step(
    ghost_norm_20,
    "ghost_norm",
    Published(0.941, 46, source=f"{POST}, ghost batch norm"),
    num_epochs=18,
    optim=replace(ghost_norm_20.optim, peak_lr=0.6),
)
frozen_scales_16 = step(
    ghost_norm,
    "frozen_scales_16",
    Published(0.942, None, source=f"{POST}, frozen batch norm scales"),
    model=replace(
        ghost_norm.model,
        activation=Celu(0.3),
        norm=BatchNormConfig(num_groups=16, train_scale=False),
        output_scale=1 / 16,
    ),
    optim=replace(ghost_norm.optim, bias_scale=16.0),
)
frozen_scales_64 = step(
    frozen_scales_16,
    "frozen_scales_64",
    Published(None, None, source=f"{POST}, frozen batch norm scales"),
    optim=replace(frozen_scales_16.optim, bias_scale=64.0),
)
frozen_scales = step(
    frozen_scales_64,
    "frozen_scales",
    Published(0.941, 43, source=f"{POST}, frozen batch norm scales"),
    num_epochs=17,
)
whitening_17 = step(
    frozen_scales,
    "whitening_17",
    Published(0.944, None, source=f"{POST}, input patch whitening"),
    model=replace(frozen_scales.model, whiten=True),
)
whitening_15 = step(
    whitening_17, "whitening_15", Published(0.941, 39, source=f"{POST}, input patch whitening"), num_epochs=15
)
whitening = step(
    whitening_15,
    "whitening",
    Published(0.941, 36, source=f"{POST}, input patch whitening"),
    num_epochs=14,
    optim=replace(whitening_15.optim, peak_lr=1.0),
    augmentations=(Crop(4), Flip(), Cutout(5)),
)
ema_14 = step(
    whitening,
    "ema_14",
    Published(0.943, None, source=f"{POST}, exponential moving averages"),
    average=Ema(decay=0.99, every=5),
    optim=replace(whitening.optim, schedule=WarmupDecay(warmup=1 / 5, end=1 / 10, flat_epochs=2.0)),
)
ema = step(ema_14, "ema", Published(0.941, 34, source=f"{POST}, exponential moving averages"), num_epochs=13)
tta_13 = step(ema, "tta_13", Published(0.946, None, tta=True, source=f"{POST}, test-time augmentation"))
final = step(
    tta_13,
    "final",
    Published(0.941, 26, tta=True, source=f"{POST}, test-time augmentation; new_dawn.py"),
    num_epochs=10,
    augmentations=(Crop(4), Flip()),
)

RECIPES = (
    baseline, gpu_preprocessing, pool_before_activation, pool_before_norm, max_pool,
    label_smoothing_25, label_smoothing, celu_23, celu, ghost_norm_20, ghost_norm,
    frozen_scales_16, frozen_scales_64, frozen_scales, whitening_17, whitening_15, whitening,
    ema_14, ema, tta_13, final,
)  # fmt: skip

if __name__ == "__main__":
    import sys

    from fastcifar_jax.cli.app import main

    main(["run", *(recipe.name for recipe in RECIPES), *sys.argv[1:]])
