"""Baseline and final trained for 24 to 100 epochs: does final stay ahead? (The post's last experiment.)

    python -m experiments run baseline_e80 final_e80 --seeds 5

Both with 12x12 cutout and a peak learning rate of 0.4, on CIFAR-10. `published` holds means of 5 runs with flip TTA:
final reaches 96.1 % in 80 epochs, baseline 95.7 %.
"""

from dataclasses import replace

from experiments.bag_of_tricks import final, gpu_preprocessing
from fastcifar_jax.augment import Crop, Cutout, Flip
from fastcifar_jax.recipe import Published
from fastcifar_jax.schedules import WarmupDecay

ORDER = 4
AUGMENTATIONS = (Crop(4), Flip(), Cutout(12))
SOURCE = "bag_of_tricks.ipynb, cell 92"

# epochs -> mean accuracy with TTA, mean training seconds on a V100
BASELINE = {24: (0.9441, 69.6), 40: (0.9518, 115.9), 60: (0.9557, 173.8), 80: (0.9570, 231.5), 100: (0.9571, 289.2)}
FINAL = {24: (0.9512, 61.8), 40: (0.9576, 102.9), 60: (0.9590, 154.4), 80: (0.9613, 205.8), 100: (0.9612, 257.3)}


def convergence(recipe, name, published, schedule_of):
    """`recipe` with each number of epochs."""
    return tuple(
        replace(
            recipe,
            name=f"{name}_e{num_epochs}",
            num_epochs=num_epochs,
            augmentations=AUGMENTATIONS,
            optim=replace(recipe.optim, peak_lr=0.4, schedule=schedule_of(num_epochs)),
            published=Published(accuracy, seconds, runs=5, tta=True, source=SOURCE),
        )
        for num_epochs, (accuracy, seconds) in published.items()
    )


RECIPES = (
    *convergence(gpu_preprocessing, "baseline", BASELINE, lambda num_epochs: WarmupDecay(warmup=5 / num_epochs)),
    *convergence(final, "final", FINAL, lambda num_epochs: final.optim.schedule),
)
PARENTS = {recipe.name: gpu_preprocessing if recipe.name.startswith("baseline") else final for recipe in RECIPES}
