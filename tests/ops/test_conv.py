"""The convolution by lax and by oneDNN against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastcifar_jax.ops import backend, lax_conv, onednn
from fastcifar_jax.ops.conv import conv

SHAPES = {  # batch, height, width, inputs, outputs, kernel size, and "VALID" where nothing is padded
    "plain": (4, 8, 8, 16, 32, (3, 3)),
    "batch of 1": (1, 8, 8, 16, 16, (3, 3)),
    "27 inputs 1x1": (4, 8, 8, 27, 64, (1, 1)),
    "27 inputs 3x3": (2, 6, 6, 27, 13, (3, 3)),
    "whitening": (4, 8, 8, 3, 27, (3, 3)),
    "odd sizes": (5, 7, 9, 10, 7, (3, 3)),
    "5x5": (3, 6, 6, 10, 7, (5, 5)),
    "3x1": (2, 4, 5, 4, 4, (3, 1)),
    "one pixel": (2, 1, 1, 8, 8, (3, 3)),
    "one channel": (2, 5, 5, 1, 1, (3, 3)),
    "several chunks": (70, 6, 7, 4, 5, (3, 3)),
    "small map, several chunks": (130, 4, 4, 8, 8, (3, 3)),
    "side by side": (32, 4, 3, 8, 16, (3, 3)),
    "side by side, 5x5": (24, 4, 5, 8, 8, (5, 5)),
    "side by side, 1x1": (16, 2, 2, 8, 8, (1, 1)),
    "2x2 whitening, not padded": (5, 9, 8, 3, 24, (2, 2), "VALID"),
    "3x3, not padded": (33, 5, 6, 4, 8, (3, 3), "VALID"),
    "narrow, not padded": (16, 4, 4, 8, 8, (3, 3), "VALID"),
    "as large as the map": (16, 3, 3, 8, 8, (3, 3), "VALID"),
}
LAX_SHAPES = ("odd sizes", "3x1", "2x2 whitening, not padded")  # lax has no special cases
EVERY_PRECISION = ("plain", "several chunks", "side by side", "3x3, not padded")  # by default
PRECISIONS = {  # operands, x, largest error as a fraction of the largest value
    "float32": ("float32", "float32", 1e-5),
    "mixed": ("bfloat16", "float32", 1e-2),
    "bfloat16": ("bfloat16", "bfloat16", 2e-2),
    "float16": ("float16", "float16", 2e-3),
}


@pytest.fixture
def force(monkeypatch):
    """Makes `conv` use the named backend; oneDNN only where its check succeeds."""

    def force(name):
        works, reason = backend.check_onednn()
        if name == "onednn" and not works:
            pytest.skip(f"oneDNN is not used here: {reason}")
        monkeypatch.setenv("FASTCIFAR_CONV", name)

    return force


@pytest.fixture(params=["lax", "onednn"])
def each_backend(request, force):
    """Each backend in turn."""
    force(request.param)


def arrays(batch, height, width, inputs, outputs, size, padding="SAME"):
    """Images, kernel and cotangent in float64."""
    lost = (0, 0) if padding == "SAME" else (size[0] - 1, size[1] - 1)
    shapes = (
        (batch, height, width, inputs),
        (*size, inputs, outputs),
        (batch, height - lost[0], width - lost[1], outputs),
    )
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape) for shape in shapes)


def float32(*shape):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays(*shape))


def numpy_passes(x, kernel, cotangent):
    """Output and both gradients in float64, tap by tap."""
    height, width = kernel.shape[:2]
    top, left = ((taps - 1 - a + b) // 2 for taps, a, b in zip(kernel.shape, x.shape[1:3], cotangent.shape[1:3]))
    padded = np.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    y, to_padded, to_kernel = np.zeros(cotangent.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j in np.ndindex(height, width):
        view = (slice(None), slice(i, i + cotangent.shape[1]), slice(j, j + cotangent.shape[2]))
        y += padded[view] @ kernel[i, j]
        to_padded[view] += cotangent @ kernel[i, j].T
        to_kernel[i, j] = np.einsum("nhwc,nhwk->ck", padded[view], cotangent)
    return y, to_padded[:, top : top + x.shape[1], left : left + x.shape[2]], to_kernel


def passes(x, kernel, cotangent, operands):
    padding = "SAME" if cotangent.shape[1:3] == x.shape[1:3] else "VALID"
    y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, operands, padding), x, kernel)
    return (y, *vjp(cotangent))


def close(found, expected, tolerance):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "shape", "precision"),
    [
        pytest.param(name, shape, precision, marks=pytest.mark.slow if other and name == "onednn" else ())
        for name, shapes in (("onednn", SHAPES), ("lax", LAX_SHAPES))
        for shape in shapes
        for precision in PRECISIONS
        for other in [precision != "float32" and shape not in EVERY_PRECISION]
    ],
)
def test_all_passes_match_float64(force, name, shape, precision):
    force(name)
    operands, dtype, tolerance = PRECISIONS[precision]
    exact, (x, kernel, cotangent) = arrays(*SHAPES[shape]), float32(*SHAPES[shape])
    found = jax.jit(passes, static_argnums=3)(x.astype(dtype), kernel, cotangent.astype(dtype), operands)
    assert [a.dtype for a in found] == [dtype, dtype, "float32"]
    for a, b in zip(found, numpy_passes(*exact), strict=True):
        close(a, b, tolerance)


def test_mixed_rounds_operands_but_not_results(each_backend):
    """A result that bfloat16 can represent would have been rounded to it."""
    exact = float32(*SHAPES["plain"])
    for result in jax.jit(passes, static_argnums=3)(*exact, "bfloat16"):
        assert result.dtype == jnp.float32
        assert float(jnp.mean(result == result.astype(jnp.bfloat16).astype(jnp.float32))) < 0.1
    rounded = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in exact)
    for a, b in zip(passes(*exact, "bfloat16"), passes(*rounded, "float32"), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_inside_scan_and_vmap(each_backend, precision):
    operands, _, tolerance = PRECISIONS[precision]
    stacked = tuple(jnp.stack([a, a + 1]) for a in float32(*SHAPES["plain"]))
    apart = [passes(*(a[i] for a in stacked), operands) for i in range(2)]
    together = jax.jit(jax.vmap(lambda *a: passes(*a, operands)))(*stacked)
    scanned = jax.jit(lambda *a: lax.scan(lambda c, a: (c, passes(*a, operands)), None, a)[1])(*stacked)
    for expected, *found in zip(jax.tree.map(lambda *a: np.stack(a), *apart), together, scanned, strict=True):
        for a in found:
            close(a, expected, tolerance)


def test_gradient_of_a_gradient(each_backend):
    """Through the weight gradient and through the input gradient, against lax differentiated twice."""
    x, kernel, _ = float32(2, 5, 5, 3, 4, (3, 3))

    def twice(f):
        first = jax.grad(lambda x, kernel: jnp.sin(f(x, kernel)).sum(), argnums=(0, 1))
        return jax.grad(lambda x, kernel: sum(jnp.square(g).sum() for g in first(x, kernel)), argnums=(0, 1))(x, kernel)

    by_lax = functools.partial(lax_conv.conv, padding=((1, 1), (1, 1)))
    for found, expected in zip(twice(conv), twice(by_lax), strict=True):
        close(found, expected, 1e-4)


@pytest.mark.parametrize(("dtype", "batch"), [("float64", 2), ("float32", 0)])
def test_what_onednn_does_not_support_goes_to_lax(monkeypatch, dtype, batch):
    """The call would end the process; it is not made even if oneDNN is forced."""
    monkeypatch.setenv("FASTCIFAR_CONV", "onednn")
    with jax.enable_x64(dtype == "float64"):
        x, kernel = jnp.ones((batch, 4, 4, 3), dtype), jnp.ones((3, 3, 3, 5), dtype)
        assert onednn.TARGET not in jax.jit(conv).lower(x, kernel).as_text()
        assert conv(x, kernel).shape == (batch, 4, 4, 5)


@pytest.mark.parametrize("size", [(2, 2), (4, 3), (1, 2)])
def test_an_even_kernel_is_padded_as_by_lax(each_backend, size):
    x, kernel, _ = float32(2, 6, 5, 4, 3, size)
    layout = ("NHWC", "HWIO", "NHWC")
    close(conv(x, kernel), lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout), 1e-5)


@pytest.mark.parametrize(("pool", "sides"), [((2, 2), (6, 8)), ((3, 2), (6, 8)), ((4, 2), (7, 8)), ((1, 1), (7, 9))])
def test_what_a_pool_drops_is_not_computed(each_backend, pool, sides):
    """Nothing else changes: 7 % 4 = 3 rows are more than the padding holds, and are computed."""
    x, kernel, cotangent = float32(*SHAPES["odd sizes"])
    cut = lambda y: y[:, : sides[0], : sides[1]]
    found, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, pool=pool), x, kernel)
    expected, expected_vjp = jax.vjp(lambda x, kernel: cut(conv(x, kernel)), x, kernel)
    for a, b in zip((found, *vjp(cut(cotangent))), (expected, *expected_vjp(cut(cotangent))), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_half_precision_are_added_in_float32(force, dtype):
    """10,000 products whose sum half precision would lose: it would stop growing at 2,048 or 256."""
    force("lax")
    x, kernel = jnp.ones((100, 10, 10, 1), dtype), jnp.ones((1, 1, 1, 1))
    _, vjp = jax.vjp(lambda kernel: conv(x, kernel, dtype), kernel)
    [gradient] = vjp(jnp.ones((100, 10, 10, 1), dtype))
    assert gradient.dtype == jnp.float32 and gradient.item() == 10_000


def test_a_kernel_larger_than_the_maps():
    with pytest.raises(ValueError, match="a kernel of 3x3 does not fit into maps of 2x8"):
        conv(jnp.ones((1, 2, 8, 3)), jnp.ones((3, 3, 3, 4)), padding="VALID")


def test_an_exported_program_has_both(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CONV", "onednn")
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))
    check = jax.export.DisabledSafetyCheck.custom_call(onednn.TARGET)
    exported = jax.export.export(jax.jit(conv), platforms=("cpu", "cuda"), disabled_checks=[check])(x, kernel)
    text = exported.mlir_module()
    assert onednn.TARGET in text and "stablehlo.convolution" in text
