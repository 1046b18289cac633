import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastcifar_jax.optim import (
    AirbenchSGD,
    Nesterov,
    freeze_after,
    label_by_path,
    nesterov,
    scale_by_schedule_of_epochs,
)
from fastcifar_jax.schedules import WarmupDecay, piecewise_linear


def test_golden_update():
    """Section 10: w = 1, mean gradient 1 twice, rate 0.1 then 0.2. `optax.sgd`'s order would give 0.26767011805."""
    schedule = piecewise_linear((1.0, 2.0), (0.1, 0.2))  # one step an epoch: the first step sees time 1
    tx = nesterov(schedule, 1, momentum=0.9, weight_decay=5e-4)
    params = {"w": jnp.float32(1)}
    state = tx.init(params)
    for expected in (0.809905, 0.34871061805):
        updates, state = tx.update({"w": jnp.float32(1)}, state, params)
        params = optax.apply_updates(params, updates)
        assert float(params["w"]) == pytest.approx(expected, rel=1e-6)
    assert float(optax.tree.get(state, "trace")["w"]) == pytest.approx(-0.2901259905, rel=1e-6)


def test_last_step_of_a_schedule_to_zero_moves_by_momentum_alone():
    tx = Nesterov(peak_lr=0.4, schedule=WarmupDecay(warmup=0.5))(2, 2, 1)
    params = {"kernel": jnp.float32(1)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"kernel": jnp.float32(1)}, state, params)
    velocity = optax.tree.get(state, "trace")["kernel"]
    updates, _ = tx.update({"kernel": jnp.float32(123)}, state, params)
    np.testing.assert_allclose(updates["kernel"], 0.81 * velocity, rtol=1e-6)


def test_time_is_counted_in_epochs_from_the_first_step():
    tx = scale_by_schedule_of_epochs(lambda time: time, steps_per_epoch=4)
    state, rates = tx.init({}), []
    for _ in range(5):
        update, state = tx.update(jnp.float32(1), state)
        rates.append(float(-update))
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_bias_group_has_its_own_rate_and_decay():
    """Rate times 64, decay divided by 64: their product, which is what decays a weight, stays."""
    params = {"conv": {"kernel": jnp.float32(2)}, "norm": {"bias": jnp.float32(2)}, "linear": jnp.float32(2)}
    optim = Nesterov(peak_lr=0.5, momentum=0.0, weight_decay=0.1, bias_scale=64.0, schedule=WarmupDecay(warmup=0.5))
    tx = optim(2, 1, 1)  # the first step is at the peak

    def update(gradient):
        return tx.update(jax.tree.map(lambda _: jnp.float32(gradient), params), tx.init(params), params)[0]

    chex.assert_trees_all_close(
        update(0), {"conv": {"kernel": -0.1}, "norm": {"bias": -0.1}, "linear": -0.1}, rtol=1e-6
    )
    chex.assert_trees_all_close(
        jax.tree.map(jnp.subtract, update(1), update(0)),
        {"conv": {"kernel": -0.5}, "norm": {"bias": -32.0}, "linear": -0.5},
        rtol=1e-6,
    )


def test_every_parameter_needs_a_group():
    with pytest.raises(ValueError, match=r"a/kernel is in none of the groups"):
        label_by_path({"a": {"kernel": jnp.zeros(1)}}, {"bias": r"bias$"})


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (Nesterov, {"peak_lr": 0.0}),
        (Nesterov, {"momentum": 1.0}),
        (Nesterov, {"weight_decay": -1.0}),
        (Nesterov, {"bias_scale": 0.0}),
        (AirbenchSGD, {"momentum": 1.0}),
        (AirbenchSGD, {"weight_decay": -1.0}),
        (AirbenchSGD, {"bias_scale": 0.0}),
    ],
    ids=str,
)
def test_refuses(part, fields):
    (name, value) = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} {value}"):
        part(**fields)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (Nesterov, {"peak_lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "bias_scale": 0.01}),
        (AirbenchSGD, {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "bias_scale": 0.01, "whiten_bias_epochs": 0}),
    ],
)
def test_takes_what_is_just_allowed(part, fields):
    made = part(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("part", "published"),
    [
        (Nesterov(), {"peak_lr": 0.4, "momentum": 0.9, "weight_decay": 5e-4, "bias_scale": 1.0}),
        (AirbenchSGD(), {"lr": 11.5, "momentum": 0.85, "weight_decay": 0.0153, "bias_scale": 64.0}),
        (AirbenchSGD(), {"whiten_bias_epochs": 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_defaults_are_the_published_numbers(part, published):
    """Sections 3.2, 3.3 and 3.7, of the baseline; airbench.md, section 5."""
    assert {name: getattr(part, name) for name in published} == published


def test_frozen_from_a_step_on():
    """The updates of steps 0 and 1 pass; other parameters' always do."""
    tx = freeze_after(r"b$", 2)
    updates = {"a": jnp.float32(3), "b": jnp.float32(4)}
    state, passed = tx.init(updates), []
    for _ in range(4):
        found, state = tx.update(updates, state)
        passed.append((float(found["a"]), float(found["b"])))
    assert passed == [(3, 4), (3, 4), (3, 0), (3, 0)]
