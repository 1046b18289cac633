import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.averaging import Ema, Lookahead, Progress


def test_ema_golden():
    """rho = 0.95099005, 20 updates an epoch of 97 steps, the count starting anew each epoch; no debiasing."""
    ema, steps = Ema(0.99, 5), 97
    average = ema.init({"w": jnp.float32(1)})
    update = jax.jit(ema.update)
    for step in range(2 * steps):
        progress = Progress(jnp.int32(step + 1), jnp.int32(step % steps), 2 * steps)
        average, variables = update(average, {"w": jnp.float32(0)}, progress)
        assert float(variables["w"]) == 0
        if step == 0:
            assert float(average["w"]) == pytest.approx(0.9509900499, rel=1e-6)
        if step == steps - 1:
            assert float(average["w"]) == pytest.approx(0.3660323, rel=1e-5)
    assert float(average["w"]) == pytest.approx(0.3660323**2, rel=1e-5)


def test_ema_starts_as_a_copy():
    variables = {"w": jnp.arange(3.0)}
    average = Ema().init(variables)
    chex.assert_trees_all_equal(average, variables)
    assert average["w"].unsafe_buffer_pointer() != variables["w"].unsafe_buffer_pointer()


def test_lookahead_by_hand():
    """airbench.md, section 5, for 10 steps of a weight that is moved by 1 in each; looks after steps 5 and 10."""
    lookahead = Lookahead(0.95, 5)
    slow = fast = np.float64(0)
    average = variables = {"w": jnp.float32(0)}
    for step in range(1, 11):
        fast += 1
        variables = {"w": variables["w"] + 1}
        if step % 5 == 0:
            keep = 0.95**5 * (step / 10) ** 3
            slow = fast = keep * slow + (1 - keep) * fast
        average, variables = lookahead.update(average, variables, Progress(jnp.int32(step), jnp.int32(0), 10))
        np.testing.assert_allclose([average["w"], variables["w"]], [slow, fast], rtol=1e-6)


@pytest.mark.parametrize(("part", "decay"), [(Ema, 0.99), (Lookahead, 0.95)])
def test_bounds_and_published_numbers(part, decay):
    assert part() == part(decay, 5)
    assert part(0.0, 1).every == 1
    for name, value in (("decay", 1.0), ("every", 0)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            part(**{name: value})
