"""Muon, which orthogonalises the updates of convolution kernels, as in airbench94_muon."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fastcifar_jax.optim import WHITEN_BIAS, freeze_after, label_by_path, scale_by_steps
from fastcifar_jax.schedules import Triangle, count_steps
from fastcifar_jax.types import Params

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b and c below


def orthogonalize(
    matrix: Float[Array, "*batch rows columns"],
    steps: int = 3,
    eps: float = 1e-7,
    dtype: jnp.dtype | None = jnp.bfloat16,
) -> Float[Array, "*batch rows columns"]:
    """Newton-Schulz: singular values to roughly 0.5 .. 1.5, singular vectors kept (airbench.md, section 6).

    In `optax.contrib` the iteration is a private part of an optimiser with a different momentum.

    Args:
      matrix: or several of one shape.
      steps: of the iteration `X <- a X + (b A + c A A) X` with `A = X X^T`, on the wide side.
      eps: added to the Frobenius norm that the matrix is divided by.
      dtype: of the products; that of the matrix when None.

    Returns:
      Matrices in the dtype of `matrix`.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix if dtype is None else matrix.astype(dtype)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).astype(matrix.dtype)


def orthogonalize_kernels(steps: int = 3, dtype: jnp.dtype | None = jnp.bfloat16) -> optax.GradientTransformation:
    """`orthogonalize` for HWIO kernels, as matrices with one row per output channel; those of one shape together."""

    def update(updates, params):
        del params
        leaves, structure = jax.tree.flatten(updates)
        found: dict[int, Array] = {}
        for shape in dict.fromkeys(leaf.shape for leaf in leaves):
            same = [i for i, leaf in enumerate(leaves) if leaf.shape == shape]
            rows = jnp.stack([leaves[i].reshape(-1, shape[-1]).T for i in same])
            found |= zip(same, orthogonalize(rows, steps, dtype=dtype), strict=True)
        kernels = (found[i].T.reshape(leaf.shape) for i, leaf in enumerate(leaves))
        return jax.tree.unflatten(structure, kernels)

    return optax.stateless(update)


def renormalize_kernels() -> optax.GradientTransformation:
    """Rescales each kernel to the norm `sqrt(outputs)` before the update is applied; replaces weight decay."""

    def move(update, kernel):
        norm = jnp.sqrt(jnp.sum(jnp.square(kernel)))
        return update + kernel * (kernel.shape[-1] ** 0.5 / norm - 1)

    return optax.stateless_with_tree_map(move)


@dataclasses.dataclass(frozen=True)
class Muon:
    """The optimisers of airbench94_muon (airbench.md, section 6): Muon for kernels, Nesterov SGD for the rest.

    Rates are for a summed loss; each group's decay divided by its rate is the coefficient of its L2 term.

    Differences from `optax.contrib.muon`: the momentum is `B <- m B + G` and `G + m B` without bias correction, the
    kernels are rescaled to a fixed norm in every step, and no factor depends on the shape of a kernel.

    Attributes:
      lr: of the kernels.
      momentum: of the kernels.
      head_lr: of the linear head.
      bias_lr: of the biases of norms and whitening.
      sgd_momentum: of everything but the kernels.
      weight_decay: per example, of everything but the kernels: 2e-6 in the source.
      newton_schulz_steps: of the iteration.
      whiten_bias_epochs: length of the schedule of the whitening layer's bias, which is then frozen.
      schedule: multiples of the rates over the run.
      compute_dtype: of the iteration's products; None is that of the weights.
    """

    lr: float = 0.24
    momentum: float = 0.6
    head_lr: float = 0.67
    bias_lr: float = 0.053
    sgd_momentum: float = 0.85
    weight_decay: float = 2e-6
    newton_schulz_steps: int = 3
    whiten_bias_epochs: int = 3
    schedule: Triangle = Triangle(peak=0.0, end=0.0)
    compute_dtype: str | None = "bfloat16"

    def __post_init__(self):
        rates, momenta = (self.lr, self.head_lr, self.bias_lr), (self.momentum, self.sgd_momentum)
        if min(rates) <= 0 or self.weight_decay < 0 or not all(0 <= m < 1 for m in momenta):
            raise ValueError(
                f"optim has rates {rates}, momenta {momenta} and weight_decay {self.weight_decay}; expected rates "
                "above 0, momenta from 0 to below 1, weight_decay >= 0"
            )
        if self.newton_schulz_steps < 1 or self.whiten_bias_epochs < 0:
            raise ValueError(
                f"optim has newton_schulz_steps {self.newton_schulz_steps} and whiten_bias_epochs "
                f"{self.whiten_bias_epochs}; expected at least 1 and 0"
            )

    def __call__(self, num_epochs: float, steps_per_epoch: int, batch_size: int) -> optax.GradientTransformation:
        """The transformation for a run of `num_epochs` epochs; it takes the gradients of a mean loss."""
        schedule = self.schedule(count_steps(num_epochs, steps_per_epoch))
        decay, whiten_steps = self.weight_decay * batch_size, self.whiten_bias_epochs * steps_per_epoch

        def sgd(lr, schedule):
            return optax.chain(
                optax.add_decayed_weights(decay / lr),
                optax.trace(decay=self.sgd_momentum, nesterov=True),
                scale_by_steps(lambda step: lr * schedule(step)),
            )

        dtype = jnp.dtype(self.compute_dtype) if self.compute_dtype else None
        kernels = optax.chain(
            optax.trace(decay=self.momentum, nesterov=True),
            orthogonalize_kernels(self.newton_schulz_steps, dtype),
            scale_by_steps(lambda step: self.lr * schedule(step)),
            renormalize_kernels(),
        )
        whiten = optax.set_to_zero()
        if whiten_steps:
            whiten = optax.chain(sgd(self.bias_lr, self.schedule(whiten_steps)), freeze_after("", whiten_steps))
        transforms = {
            "whiten": whiten,
            "bias": sgd(self.bias_lr, schedule),
            "head": sgd(self.head_lr, schedule),
            "kernel": kernels,
        }
        groups = {"whiten": WHITEN_BIAS, "bias": r"bias$", "head": r"linear$", "kernel": r"kernel$"}

        def label(params: Params) -> Params:
            return label_by_path(params, groups)

        # Rates are for a summed loss.
        return optax.chain(optax.scale(batch_size), optax.partition(transforms, label))

    def skip_gradients(self, epoch: int) -> str | None:
        """See `optim.skipped_gradients`."""
        return WHITEN_BIAS if epoch > self.whiten_bias_epochs else None
