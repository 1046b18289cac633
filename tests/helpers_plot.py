"""A network with a norm that is a plain pair of functions, and records of runs that never were."""

from fastcifar_jax.runs.records import Record
from fastcifar_jax.types import EpochInfo
from tests.helpers_records import PROVENANCE, with_changes

NORMED = '''"""A plain pair of functions: convolution, norm, activation, a residual, pools, a head."""

import dataclasses

import jax
import jax.numpy as jnp

from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.models.base import Model
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Net:
    width: int = 4

    def with_width(self, width):
        return dataclasses.replace(self, width=width)

    def __call__(self, num_classes, compute_dtype):
        n = self.width

        def init(key, images):
            keys = jax.random.split(key, 3)
            params = {
                "layer1": {
                    "conv": {"kernel": jax.random.normal(keys[0], (1, 1, 3, n))},
                    "norm": {"scale": jnp.ones(n), "bias": jnp.zeros(n)},
                },
                "layer2": {"kernel": jax.random.normal(keys[1], (1, 1, n, n))},
                "head": jax.random.normal(keys[2], (n, num_classes)),
            }
            stats = {"layer1": {"norm": {"mean": jnp.zeros((1, n))}}}
            return {"params": params, "constants": {}, "batch_stats": stats}

        def apply(variables, images, train):
            params, stats = variables["params"], variables["batch_stats"]
            conv = lambda x, kernel: jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            row = lambda a: a.reshape(1, 1, 1, -1)
            x = conv(images, params["layer1"]["conv"]["kernel"])
            mean = x.mean((0, 1, 2)) if train else stats["layer1"]["norm"]["mean"][0]
            variance = jnp.square(x - row(mean)).mean((0, 1, 2))
            norm = params["layer1"]["norm"]
            x = (x - row(mean)) / jnp.sqrt(row(variance) + 1e-5) * row(norm["scale"]) + row(norm["bias"])
            x = jnp.maximum(x, 0)
            x = x + jnp.tanh(conv(x, params["layer2"]["kernel"]))
            x = x.reshape(-1, 16, 2, 16, 2, n).max((2, 4)).mean((1, 2))
            return x @ params["head"] * 0.125, {"layer1": {"norm": {"mean": mean[None]}}}

        return Model(init, apply, lambda stats: stats, lambda variables, images: {})


RECIPE = Recipe(
    name="normed",
    num_epochs=3,
    batch_size=16,
    augmentations=(),
    model=Net(),
    optim=Nesterov(peak_lr=0.1),
    tta=NoTTA(),
)
'''


def make_record(experiment="final", seed=0, epochs=3, accuracy=0.5, status="finished", **changes):
    """`accuracy` at the last epoch; a hundredth less at each epoch before."""
    rows = tuple(
        EpochInfo(i, 1.0, 2.0 / i, accuracy - 0.1, 1.5 / i, accuracy - 0.01 * (epochs - i), 1.4 / i, accuracy + 0.02)
        for i in range(1, epochs + 1)
    )
    recipe = changes.pop("recipe", {"num_epochs": epochs, "optim.peak_lr": 0.4, "optim.schedule.warmup": 1 / epochs})
    result = {"test_accuracy": accuracy, "tta_accuracy": accuracy + 0.02, "train_seconds": 1.0, "setup_seconds": 0.0}
    result |= {"transfer_seconds": 0.0, "compile_seconds": 0.0, "images_per_second": 1.0}
    fields = {
        "framework": "jax",
        "recipe_repr": "",
        "recipe_hash": f"{epochs:016x}",
        "error": None if status == "finished" else "lost",
        "command": (),
        "started": "",
    }
    result = result if status == "finished" else None
    record = Record(
        experiment, recipe=recipe, seed=seed, status=status, epochs=rows, result=result, provenance=PROVENANCE, **fields
    )
    return with_changes(record, **{"data": {"source": "digits", "hash": "aa", "train": 100, "test": 10}, **changes})
