import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.losses import CrossEntropy, num_correct


def test_golden_values_of_label_smoothing():
    loss = CrossEntropy(0.2)
    logits = jnp.zeros((2, 10)).at[1, 0].set(2.0)
    np.testing.assert_allclose(loss(logits, jnp.array([3, 0])), [2.3025851, 1.1566138], rtol=1e-6)


def test_floor_is_the_entropy_of_the_target():
    target = jnp.full(10, 0.02).at[4].set(0.82)
    np.testing.assert_allclose(CrossEntropy(0.2)(jnp.log(target)[None], jnp.array([4])), [0.8668939], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.7])
def test_matches_the_formula(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(32, 7)) * 3, rng.integers(0, 7, 32)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = (1 - smoothing) * -log_p[np.arange(32), labels] - smoothing * log_p.mean(1)
    found = CrossEntropy(smoothing)(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_num_correct_counts_first_of_equal_logits():
    logits = jnp.array([[1.0, 1.0], [0.0, 2.0], [3.0, 1.0]])
    assert int(num_correct(logits, jnp.array([0, 1, 1]))) == 2
    assert int(num_correct(logits, jnp.array([1, 1, 1]))) == 1


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_refuses(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropy(smoothing)
