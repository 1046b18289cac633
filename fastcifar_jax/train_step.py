"""One step of training as a pure function."""

from collections.abc import Callable

import jax
import optax

from fastcifar_jax.averaging import Average, Progress
from fastcifar_jax.losses import num_correct
from fastcifar_jax.models.base import Model
from fastcifar_jax.optim import stop_gradients
from fastcifar_jax.types import Batch, StepInfo, TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepInfo]]


def make_train_step(
    model: Model,
    loss: Callable,
    tx: optax.GradientTransformation,
    average: Average | None,
    steps_per_epoch: int,
    num_steps: int,
    skip_gradients: str | None = None,
) -> TrainStep:
    """One optimiser step as a pure function `(state, batch) -> (state, info)`.

    The summed loss is differentiated and the gradient divided by the batch size in the dtype of the weights: the sum
    keeps small float16 gradients from vanishing (section 3.5), and the optimiser expects the mean.

    Args:
      model: the network.
      loss: per example.
      tx: receives the gradient of the mean loss.
      average: updated after the weights; None for no average.
      steps_per_epoch: passed to the average in its `Progress`.
      num_steps: steps of the whole run, passed to the average too.
      skip_gradients: pattern of the paths of parameters whose gradients are zeros and are not computed.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
        def summed_loss(params):
            params = params if skip_gradients is None else stop_gradients(params, skip_gradients)
            variables = {"params": params, "constants": state.constants, "batch_stats": state.batch_stats}
            logits, batch_stats = model.apply(variables, batch.images, True)
            return loss(logits, batch.labels).sum(), (batch_stats, num_correct(logits, batch.labels))

        (total, (batch_stats, correct)), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.params)
        grads = jax.tree.map(lambda g: g / len(batch.labels), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = state.average
        if average is not None:
            variables = {"params": params, "batch_stats": batch_stats}
            progress = Progress(state.step + 1, state.step % steps_per_epoch, num_steps)
            averaged, variables = average.update(averaged, variables, progress)
            params, batch_stats = variables["params"], variables["batch_stats"]
        state = TrainState(state.step + 1, params, state.constants, batch_stats, opt_state, averaged)
        return state, StepInfo(total, correct)

    return train_step
