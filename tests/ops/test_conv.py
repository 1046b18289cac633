"""Every way against float64 NumPy, and the fall back to lax when the trial fails."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastcifar_jax.ops import conv as conv_module
from fastcifar_jax.ops import onednn_check
from fastcifar_jax.ops.conv import conv

WAYS = ("lax", "onednn")
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
PRECISIONS = {  # operands, x, largest error as a share of the largest value
    "float32": ("float32", "float32", 1e-5),
    "mixed": ("bfloat16", "float32", 1e-2),
    "bfloat16": ("bfloat16", "bfloat16", 2e-2),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both ways; oneDNN only where its trial goes well."""
    if request.param == "onednn" and not onednn_check.outcome()[0]:
        pytest.skip(f"oneDNN is not used here: {onednn_check.outcome()[1]}")
    monkeypatch.setenv("FASTCIFAR_CONV", request.param)
    return request.param


def arrays(batch, height, width, inputs, outputs, size, padding="SAME"):
    rng = np.random.default_rng(0)
    lost = (0, 0) if padding == "SAME" else (size[0] - 1, size[1] - 1)
    x = rng.normal(size=(batch, height, width, inputs))
    cotangent = rng.normal(size=(batch, height - lost[0], width - lost[1], outputs))
    return x, rng.normal(size=(*size, inputs, outputs)), cotangent


def numpy_passes(x, kernel, cotangent):
    """Output and both gradients in float64, tap by tap."""
    height, width = kernel.shape[:2]
    top, left = ((taps - 1 - a + b) // 2 for taps, a, b in zip(kernel.shape, x.shape[1:3], cotangent.shape[1:3]))
    padded = np.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    y, to_padded, to_kernel = np.zeros(cotangent.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i in range(height):
        for j in range(width):
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_passes_match_float64(way, shape, precision):
    operands, dtype, tolerance = PRECISIONS[precision]
    exact = arrays(*shape)
    x, kernel, cotangent = (jnp.asarray(a, jnp.float32) for a in exact)
    found = jax.jit(passes, static_argnums=3)(x.astype(dtype), kernel, cotangent.astype(dtype), operands)
    assert [a.dtype for a in found] == [dtype, dtype, "float32"]
    for a, b in zip(found, numpy_passes(*exact), strict=True):
        close(a, b, tolerance)


def test_mixed_rounds_operands_but_not_results(way):
    """On every way: a result that bfloat16 could hold would mean that it had been rounded to it."""
    x, kernel, cotangent = (jnp.asarray(a, jnp.float32) for a in arrays(*SHAPES["plain"]))
    for result in jax.jit(passes, static_argnums=3)(x, kernel, cotangent, "bfloat16"):
        assert result.dtype == jnp.float32
        assert float(jnp.mean(result == result.astype(jnp.bfloat16).astype(jnp.float32))) < 0.1
    operands = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel, cotangent))
    for a, b in zip(passes(x, kernel, cotangent, "bfloat16"), passes(*operands, "float32"), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_inside_scan_and_vmap(way, precision):
    operands, _, tolerance = PRECISIONS[precision]
    exact = arrays(*SHAPES["plain"])
    x, kernel, cotangent = (jnp.asarray(a, jnp.float32) for a in exact)
    stacked = tuple(jnp.stack([a, a + 1]) for a in (x, kernel, cotangent))
    one_by_one = [passes(*(a[i] for a in stacked), operands) for i in range(2)]
    together = jax.jit(jax.vmap(lambda *a: passes(*a, operands)))(*stacked)
    scanned = jax.jit(lambda *a: lax.scan(lambda c, a: (c, passes(*a, operands)), None, a)[1])(*stacked)
    for pass_ in range(3):
        expected = np.stack([np.asarray(one[pass_]) for one in one_by_one])
        close(together[pass_], expected, tolerance)
        close(scanned[pass_], expected, tolerance)


def test_gradient_of_a_gradient(way):
    """Through the weight gradient and through the input gradient, against lax differentiated twice."""
    x, kernel, _ = (jnp.asarray(a, jnp.float32) for a in arrays(2, 5, 5, 3, 4, (3, 3)))

    lax_conv = functools.partial(conv_module._lax_conv, padding=(1, 1))

    def twice(f):
        first = jax.grad(lambda x, kernel: jnp.sin(f(x, kernel)).sum(), argnums=(0, 1))
        return jax.grad(lambda x, kernel: sum(jnp.square(g).sum() for g in first(x, kernel)), argnums=(0, 1))(x, kernel)

    for found, expected in zip(twice(conv), twice(lax_conv), strict=True):
        close(found, expected, 1e-4)


@pytest.mark.parametrize(
    "case",
    ["float16", "float64", "no images"],
)
def test_cases_that_the_call_does_not_know_go_to_lax(case, monkeypatch):
    """A call would end the process; even when forced, it is not made."""
    monkeypatch.setenv("FASTCIFAR_CONV", "onednn")
    with jax.enable_x64(case == "float64"):
        dtype = case if case.startswith("float") else "float32"
        x = jnp.ones((0 if case == "no images" else 2, 4, 4, 3), dtype)
        kernel = jnp.ones((3, 3, 3, 5), dtype)
        assert "onednn" not in jax.jit(conv).lower(x, kernel).as_text()
        assert conv(x, kernel).shape == (*x.shape[:3], 5)


@pytest.mark.parametrize("size", [(2, 2), (4, 3), (1, 2)])
def test_an_even_kernel_is_padded_for_as_lax_does(way, size):
    x, kernel, _ = (jnp.asarray(a, jnp.float32) for a in arrays(2, 6, 5, 4, 3, size))
    layout = ("NHWC", "HWIO", "NHWC")
    close(conv(x, kernel), lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout), 1e-5)


def test_a_kernel_larger_than_the_maps(way):
    with pytest.raises(ValueError, match="a kernel of 3x3 does not fit into maps of 2x8"):
        conv(jnp.ones((1, 2, 8, 3)), jnp.ones((3, 3, 3, 4)), padding="VALID")


def test_both_ways_stand_in_one_exported_program(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CONV", "onednn")
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))
    check = jax.export.DisabledSafetyCheck.custom_call("__onednn$convolution")
    exported = jax.export.export(jax.jit(conv), platforms=("cpu", "cuda"), disabled_checks=[check])(x, kernel)
    text = exported.mlir_module()
    assert "__onednn$convolution" in text and "stablehlo.convolution" in text


def test_a_wrong_name_of_a_way(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CONV", "cudnn")
    with pytest.raises(ValueError, match="FASTCIFAR_CONV is 'cudnn'; set it to lax or onednn"):
        conv_module.conv_backend()


def fake_trial(monkeypatch, tmp_path, program):
    """`outcome()` with another program as the trial and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTCIFAR_CONV", raising=False)
    real, runs = subprocess.run, []

    def run(command, **options):
        runs.append(command)
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(onednn_check.subprocess, "run", run)
    return runs


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "status -6"),
        ("import sys; sys.exit('UNIMPLEMENTED: no registered implementation for custom call')", "no registered"),
        ("import sys; sys.exit('dw of float32 -> float32 is off by 1.0e+00 of the largest value')", "off by"),
        ("import time; time.sleep(60)", "did not end"),
    ],
    ids=["crash", "missing target", "wrong numbers", "hang"],
)
def test_a_failed_trial_means_lax_and_is_remembered(monkeypatch, tmp_path, program, reason):
    monkeypatch.setattr(onednn_check, "SECONDS", 5)
    runs = fake_trial(monkeypatch, tmp_path, program)
    conv_module._tried.cache_clear()
    try:
        found, why = conv_module.conv_backend()
        assert found == "lax" and reason in why
        lowered = jax.jit(lambda x, kernel: conv(x, kernel)).lower(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 5)))
        assert "onednn" not in lowered.as_text()
        assert onednn_check.outcome() == (False, why)
        assert len(runs) == 1
    finally:
        conv_module._tried.cache_clear()


def test_a_good_trial_is_remembered(monkeypatch, tmp_path):
    runs = fake_trial(monkeypatch, tmp_path, "pass")
    assert onednn_check.outcome()[0] and onednn_check.outcome()[0]
    assert len(runs) == 1
    [file] = (tmp_path / "fastcifar_jax").iterdir()
    assert json.loads(file.read_text())["works"] is True


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"works": true}'])
def test_a_damaged_memory_is_replaced(monkeypatch, tmp_path, damage):
    runs = fake_trial(monkeypatch, tmp_path, "pass")
    file = onednn_check._cache_file()
    file.parent.mkdir(parents=True)
    file.write_text(damage)
    assert onednn_check.outcome()[0] and len(runs) == 1
    assert json.loads(file.read_text())["works"] is True


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    runs = fake_trial(monkeypatch, tmp_path / "file", "pass")
    assert onednn_check.outcome()[0] and len(runs) == 1


def test_other_platforms_use_lax(monkeypatch):
    monkeypatch.delenv("FASTCIFAR_CONV", raising=False)
    monkeypatch.setattr(conv_module.platform, "machine", lambda: "aarch64")
    assert conv_module.conv_backend() == ("lax", "no oneDNN in jaxlib for Linux aarch64")


@pytest.mark.parametrize(
    ("forced", "in_hardware", "driver", "dtype"),
    [
        ("onednn", True, "scan", "mixed"),
        ("onednn", False, "scan", "float32"),
        ("lax", True, "python", "float32"),  # in a loop, lax's weight gradients take many times as long
    ],
)
def test_defaults_of_a_cpu(monkeypatch, forced, in_hardware, driver, dtype):
    monkeypatch.setenv("FASTCIFAR_CONV", forced)
    monkeypatch.setattr(conv_module, "_multiplies_bfloat16", lambda: in_hardware)
    assert (conv_module.default_driver(), conv_module.default_dtype()) == (driver, dtype)


def test_no_attempt_to_cache_what_cannot_be_cached(tmp_path):
    """With JAX's persistent cache on, a process that calls oneDNN says nothing."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from fastcifar_jax.conv import conv, configure_cpu\n"
        "configure_cpu()\n"
        "jax.jit(conv)(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))).block_until_ready()\n"
    )
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    root = str(Path(__file__).parents[2])
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and done.stderr == ""
