"""One step of training as a pure function."""

from collections.abc import Callable

import jax
import optax
from jax import lax

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
    axis_name: str | None = None,
    skip_gradients: str | None = None,
) -> TrainStep:
    """One optimiser step as a pure function `(state, batch) -> (state, info)`.

    The summed loss is differentiated and the gradient divided by the batch size in the weights' dtype: the sum is
    what keeps small float16 gradients from vanishing (section 3.5), the mean is what the optimiser expects.

    Args:
      model: the network.
      loss: per example.
      tx: receives the gradient of the mean loss.
      average: updated after the weights; None for none.
      steps_per_epoch: for the average, with the next.
      num_steps: of the whole run.
      axis_name: mesh axis whose devices each have an equal share of the batch; the sums are taken over all of them,
        so that every device makes the same step. None for the whole batch here.
      skip_gradients: pattern of the paths of parameters whose gradients are not computed, but zero.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
        def summed_loss(params):
            params = params if skip_gradients is None else stop_gradients(params, skip_gradients)
            variables = {"params": params, "constants": state.constants, "batch_stats": state.batch_stats}
            logits, batch_stats = model.apply(variables, batch.images, True)
            return loss(logits, batch.labels).sum(), (batch_stats, num_correct(logits, batch.labels))

        (total, (batch_stats, correct)), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.params)
        batch_size = len(batch.labels)
        if axis_name is not None:
            total, correct, grads = lax.psum((total, correct, grads), axis_name)
            batch_size *= lax.axis_size(axis_name)
        grads = jax.tree.map(lambda g: g / batch_size, grads)
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
