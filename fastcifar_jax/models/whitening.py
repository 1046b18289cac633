"""PCA whitening of image patches: second moments -> eigenbasis -> a bank of convolution filters."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastcifar_jax.types import Images

_CHUNK = 250  # images: 225,000 patches of 27 numbers are 24 MB; those of 10,000 images would be 1 GB


def patches(images: Images, size: int) -> Float[Array, "patches features"]:
    """All windows of `size x size` pixels, stride 1, as rows of features ordered (row, column, channel).

    That is the order of an HWIO kernel; the original's is (channel, row, column).
    """
    _, height, width, channels = images.shape
    rows, columns = height - size + 1, width - size + 1
    shifted = [images[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]
    return jnp.stack(shifted, axis=3).reshape(-1, size * size * channels)


def patch_moments(images: Images, size: int) -> Float[Array, "features features"]:
    """Second moments of the patches, `X^T X / (n - 1)`, without subtracting the mean (section 5, step 3).

    Products have the highest precision, because an accelerator's default precision would blur the small eigenvalues.

    Args:
      images: normalised, without padding.
      size: height and width of the patches, in pixels.
    """
    num_images, height, width, channels = images.shape
    features = size * size * channels

    def moments(chunk):
        x = patches(chunk, size)
        return jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)

    whole = num_images - num_images % _CHUNK
    total = jnp.zeros((features, features), images.dtype)
    if whole:
        total += lax.map(moments, images[:whole].reshape(-1, _CHUNK, height, width, channels)).sum(0)
    if whole < num_images:
        total += moments(images[whole:])
    num_patches = num_images * (height - size + 1) * (width - size + 1)
    return total / (num_patches - 1)


def whitening_filters(images: Images, size: int = 3, eps: float = 1e-2) -> Float[Array, "size size channels filters"]:
    """Filters whose responses to the patches of `images` are uncorrelated (Bag of Tricks, "input patch whitening").

    Filter i is eigenvector i of the patches' second moments divided by `sqrt(eigenvalue_i + eps)`, eigenvalues in
    descending order: PCA whitening, not rotated back. The variance of response i is `lambda / (lambda + eps)`, about
    1 for the first filters and near 0 for the last. The sign of an eigenvector depends on the solver.

    Args:
      images: normalised, without padding; the first 10,000 training images in the original.
      size: height and width of the filters, in pixels.
      eps: added to the eigenvalues, not to their roots.
    """
    moments = patch_moments(images, size)
    eigenvalues, eigenvectors = jnp.linalg.eigh(moments)  # ascending; eigenvectors are columns
    bank = eigenvectors[:, ::-1] / jnp.sqrt(jnp.maximum(eigenvalues[::-1], 0) + eps)[None, :]
    return bank.reshape(size, size, images.shape[-1], -1)
