"""The final recipe on scikit-learn's handwritten digits: a complete run in about a minute, without a download.

    python -m experiments run quickstart

1,437 training and 360 test images of 8x8 pixels, enlarged to 32x32. The network is a quarter as wide as the original,
and digits are not mirrored. A batch of 64 in two ghost groups keeps 32 images per group; in 20 epochs, 400 steps, the
average forgets the initial weights.
"""

from dataclasses import replace

from experiments.bag_of_tricks import final
from fastcifar_jax.augment import Crop
from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.recipe import Published

ORDER = 1
DATA = "digits"

quickstart = replace(
    final,
    name="quickstart",
    num_epochs=20,
    batch_size=64,
    mean=(77.9,) * 3,
    std=(82.5,) * 3,
    augmentations=(Crop(4),),
    model=replace(final.model, norm=replace(final.model.norm, num_groups=2)).with_width(16),
    tta=NoTTA(),
    published=Published(),
)

RECIPES = (quickstart,)
PARENTS = {"quickstart": final}
