import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.models.whitening import patch_moments, patches, whitening_filters
from fastcifar_jax.ops.conv import conv


def smooth_images(num_images, size=12):
    """Correlated pixels, so that the eigenvalues vary as those of images do."""
    noise = np.random.default_rng(0).normal(size=(num_images, size + 3, size + 3, 3))
    near = sum(noise[:, i : i + size, j : j + size] for i in range(4) for j in range(4)) / 8
    return near + near.mean(-1, keepdims=True)


def numpy_moments(images, size):
    """Float64 twin, window by window."""
    n, height, width, _ = images.shape
    corners = np.ndindex(height - size + 1, width - size + 1)
    x = np.concatenate([images[:, i : i + size, j : j + size].reshape(n, -1) for i, j in corners])
    return x.T @ x / (len(x) - 1)


@pytest.mark.parametrize("num_images", [3, 250, 520])
@pytest.mark.parametrize("size", [2, 3])
def test_moments_match_float64(num_images, size):
    images = smooth_images(num_images)
    found = patch_moments(jnp.asarray(images, jnp.float32), size)
    np.testing.assert_allclose(found, numpy_moments(images, size), rtol=2e-5, atol=2e-6)


def test_patches_are_rows_of_windows():
    images = jnp.arange(2 * 4 * 5 * 3, dtype=jnp.float32).reshape(2, 4, 5, 3)
    rows = patches(images, 3)
    assert rows.shape == (2 * 2 * 3, 27)
    np.testing.assert_array_equal(rows[4], images[0, 1:4, 1:4].reshape(-1))


def test_moments_are_not_centred():
    ones = jnp.ones((1, 4, 4, 1))
    np.testing.assert_allclose(patch_moments(ones, 3), np.full((9, 9), 4 / 3), rtol=1e-6)


def test_filters_whiten_their_own_sample():
    """W S W^T = diag(l / (l + eps)): uncorrelated, and smaller where the eigenvalue is small."""
    eps = 1e-2
    images = smooth_images(300)
    moments = numpy_moments(images, 3)
    bank = np.asarray(whitening_filters(jnp.asarray(images, jnp.float32), 3, eps), np.float64).reshape(27, 27)
    eigenvalues = np.linalg.eigvalsh(moments)[::-1]
    np.testing.assert_allclose(bank.T @ moments @ bank, np.diag(eigenvalues / (eigenvalues + eps)), atol=5e-4)


def test_filters_have_the_orientation_of_the_patches():
    """Through the convolution, response i has mean square l_i / (l_i + eps) where no padding is seen."""
    images = jnp.asarray(smooth_images(200), jnp.float32)
    response = jax.jit(lambda images: conv(images, whitening_filters(images)))(images)[:, 1:-1, 1:-1]
    eigenvalues = np.linalg.eigvalsh(numpy_moments(np.asarray(images, np.float64), 3))[::-1]
    second = jnp.mean(jnp.square(response), (0, 1, 2))
    np.testing.assert_allclose(second, eigenvalues / (eigenvalues + 1e-2), rtol=2e-3, atol=1e-4)
