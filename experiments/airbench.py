"""What came after the bag of tricks: Keller Jordan's airbench, trained by SGD and by Muon.

    python -m experiments run airbench94 airbench94_muon --seeds 5

`published` holds the accuracies (six views), numbers of runs, A100 times (float16) and PFLOPs that the repository
KellerJordan/cifar10-airbench and arXiv 2404.00498 state.
"""

from dataclasses import replace

from fastcifar_jax.augment import AlternatingFlip, Crop, Cutout, IndependentSampling
from fastcifar_jax.averaging import Lookahead
from fastcifar_jax.evaluate import SixViewTTA
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.muon import Muon
from fastcifar_jax.optim import AirbenchSGD
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.schedules import Triangle

ORDER = 3
SOURCE = "cifar10-airbench"

airbench94 = Recipe(
    name="airbench94",
    num_epochs=9.9,
    batch_size=1024,
    mean=(125.307, 122.961, 113.8575),  # 0.4914, 0.4822, 0.4465 of 255
    std=(62.985, 62.0925, 66.708),  # 0.2470, 0.2435, 0.2616
    augmentations=(Crop(2), AlternatingFlip()),
    sampling=IndependentSampling(),
    model=AirNet(),
    loss=CrossEntropy(label_smoothing=0.2),
    optim=AirbenchSGD(),
    average=Lookahead(),
    tta=SixViewTTA(),
    init_images=5000,
    published=Published(0.9401, 3.83, 1000, True, f"{SOURCE}, legacy/airbench94.py", "A100", 0.36),
)
airbench94_muon = replace(
    airbench94,
    name="airbench94_muon",
    num_epochs=8,
    batch_size=2000,
    model=AirNet(whiten_bias="uniform", head="unit_std", output_scale=1 / 256),
    optim=Muon(),
    average=None,
    published=Published(0.9401, 2.59, 200, True, f"{SOURCE}, airbench94_muon.py", "A100", 0.29),
)
airbench93 = replace(
    airbench94,
    name="airbench93",
    num_epochs=11,
    model=AirNet(channels=(64, 128, 128)),
    published=Published(0.9300, None, 50, True, f"{SOURCE}, airbench93", "A100"),
)
airbench95 = replace(
    airbench94,
    name="airbench95",
    num_epochs=15,
    model=AirNet(channels=(128, 384, 384)),
    optim=AirbenchSGD(lr=10.0),
    published=Published(0.9501, 10.4, 200, True, f"{SOURCE}, airbench95", "A100", 1.39),
)
# The source states a warm-up of a tenth of the run. We assume that it starts from a fifth of the peak, as in the other
# recipes.
airbench96 = replace(
    airbench94,
    name="airbench96",
    num_epochs=37,
    augmentations=(Crop(4), AlternatingFlip(), Cutout(12)),
    model=AirNet(channels=(128, 384, 512), convs=3, norm=replace(AirNet().norm, momentum=0.9)),
    optim=AirbenchSGD(lr=9.0, weight_decay=0.012, schedule=Triangle(peak=0.1, end=0.0)),
    published=Published(0.9603, 34.7, 400, True, f"{SOURCE}, airbench96", "A100", 4.91),
)

RECIPES = (airbench93, airbench94, airbench94_muon, airbench95, airbench96)
PARENTS = {recipe.name: airbench94 for recipe in RECIPES if recipe is not airbench94}
