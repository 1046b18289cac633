"""Wrong values of a device are found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.ops.known_values import VALUES, KnownValue, wrong_values


def fails(x):
    raise jax.errors.JaxRuntimeError("INTERNAL:\nno kernel")


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda x: x * 2, "is 6 instead of 3 (jitted) and is 6 instead of 3 (not jitted)"),
        (lambda x: x * jnp.nan, "is nan instead of 3 (jitted) and is nan instead of 3 (not jitted)"),
        (lambda x: x if isinstance(x, jax.core.Tracer) else x + 512, "is 515 instead of 3 (not jitted)"),
        (lambda x: x + 1 if isinstance(x, jax.core.Tracer) else x, "is 4 instead of 3 (jitted)"),
        (fails, "fails (jitted): INTERNAL: no kernel and fails (not jitted): INTERNAL: no kernel"),
        (lambda x: jnp.stack([x, x + 1]), "is 4 instead of 3 (jitted) and is 4 instead of 3 (not jitted)"),
        (lambda x: x + 1e-3, None),
    ],
    ids=["wrong", "NaN", "not jitted", "jitted", "failure", "one element", "rounding"],
)
def test_wrong_values_are_named(function, fault):
    assert wrong_values([KnownValue("three", function, np.float32(3), 3.0, 0.01)]).get("three") == fault


@pytest.mark.parametrize("value", VALUES, ids=[value.name for value in VALUES])
def test_each_value_reveals_a_device_that_is_off(value):
    """By 512, as in jax issue 40633, or by more where the tolerance is larger."""
    off = lambda x: value.function(x).astype(jnp.float32) + jnp.float32(512 + 2 * value.tolerance)
    assert list(wrong_values([value._replace(function=off)])) == [value.name]
