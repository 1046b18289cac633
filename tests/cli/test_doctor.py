"""The command `doctor`, and the line of other commands about a GPU that is not used."""

import importlib.metadata

import pytest

from fastcifar_jax.cli import doctor
from fastcifar_jax.ops import known_values

JAX, JAXLIB = importlib.metadata.version("jax"), importlib.metadata.version("jaxlib")
A100, V100 = "NVIDIA A100-SXM4-40GB, {}, 8.0", "Tesla V100-SXM2-16GB, 580.65.06, 7.0"
PLUGIN_12, PLUGIN_13 = ((f"jax_cuda{major}_plugin", f"jax_cuda{major}_pjrt") for major in (12, 13))
INSTALL_12, INSTALL_13 = (f'pip install -U "jax[cuda{major}]=={JAX}"' for major in (12, 13))
INSTEAD_13 = f"pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && {INSTALL_12}"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(smi, packages, version)`: an `nvidia-smi` that prints a line, and packages that seem to be installed."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def machine(smi, packages=(), version=JAXLIB):
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\necho '{smi}'\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        for name in packages:
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return machine


def labelled(out):
    return dict(line.strip().split(": ", 1) for line in out.splitlines())


def test_this_machine(call):
    status, out, err = call("doctor")
    lines = labelled(out)
    assert (status, err) == (0, "")
    assert {"device", "convolutions", "loop", "dtype", "memory", "versions", "data", "GPU", "environment"} <= set(lines)
    assert lines["values"] == "10 of 10 values right, jitted and not"


@pytest.mark.parametrize(
    ("smi", "packages", "version", "reason", "repair"),
    [
        (A100.format("580.65.06"), (), "", "no CUDA plugin of JAX is installed", INSTALL_13),
        (A100.format("550.54.14"), (), "", "no CUDA plugin of JAX is installed", INSTALL_12),
        (V100, (), "", "no CUDA plugin of JAX is installed", f'{INSTALL_12} "nvidia-cudnn-cu12<9.11"'),
        ("Quadro, 580.65.06, [N/A]", (), "", "no CUDA plugin of JAX is installed", INSTALL_13),
        (
            A100.format("580.65.06"), PLUGIN_13, "0.1.2",
            f"jax-cuda13-plugin is 0.1.2 and jax-cuda13-pjrt is 0.1.2, but jaxlib is {JAXLIB}", INSTALL_13,
        ),
        (
            A100.format("550.54.14"), PLUGIN_12[:1], JAXLIB,
            f"jax-cuda12-pjrt is missing, but jaxlib is {JAXLIB}", INSTALL_12,
        ),
        (
            A100.format("550.54.14"), PLUGIN_13, JAXLIB,
            "CUDA 13 needs driver 580 or newer, and the driver is 550.54.14",
            f"update the NVIDIA driver to 580 or newer; or {INSTEAD_13}",
        ),
        (
            A100.format("470.82.01"), PLUGIN_12, JAXLIB,
            "CUDA 12 needs driver 525 or newer, and the driver is 470.82.01",
            "update the NVIDIA driver to 525 or newer",
        ),
        (
            V100, PLUGIN_13, JAXLIB,
            "CUDA 13 needs compute capability 7.5 or higher, and Tesla V100-SXM2-16GB has 7.0",
            f'{INSTEAD_13} "nvidia-cudnn-cu12<9.11"',
        ),
    ],
    ids=[
        "no plugin", "no plugin, older driver", "no plugin, V100", "no plugin, unknown capability", "another version",
        "half a plugin", "driver for CUDA 12", "driver for neither", "V100 with cuda13",
    ],
)  # fmt: skip
def test_what_keeps_jax_from_a_gpu(machine, smi, packages, version, reason, repair):
    machine(smi, packages, version)
    lines = list(doctor.gpu_lines())
    assert dict(lines)["GPU"].startswith(f"1 x {smi.split(',')[0]}; driver {smi.split(', ')[1]}, compute capability")
    assert [line for line in lines if line[0] in ("problem", "repair")] == [("problem", reason), ("repair", repair)]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("JAX_PLATFORMS", "cpu", "JAX_PLATFORMS=cpu chooses the CPU"),
        ("CUDA_VISIBLE_DEVICES", "", "CUDA_VISIBLE_DEVICES= hides the GPUs"),
    ],
)
def test_variables_that_keep_jax_from_a_gpu(machine, monkeypatch, name, value, reason):
    machine(A100.format("580.65.06"), PLUGIN_13)
    monkeypatch.setenv(name, value)
    lines = list(doctor.gpu_lines())
    assert ("problem", reason) in lines and ("repair", f"unset {name}") in lines
    assert f"{name}={value}" in dict(doctor.machine_lines())["environment"]


def test_a_gpu_that_jax_cannot_open(machine):
    """Nothing is wrong with versions, so JAX's own message is shown."""
    machine(A100.format("580.65.06"), PLUGIN_13)
    assert dict(doctor.gpu_lines())["problem"].startswith("JAX cannot open the GPU: Unknown backend")


def test_jax_that_does_not_start(call, monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno driver")

    monkeypatch.setattr(doctor.provenance.jax, "devices", devices)
    status, out, _ = call("doctor")
    assert status == 0 and labelled(out)["device"] == (
        "JAX does not start: Unable to initialize backend 'cuda': no driver"
    )
    assert "GPU" in labelled(out) and "values" not in labelled(out)


def test_a_wrong_convolution_backend_is_one_line(call, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CONV", "cudnn")
    assert call("doctor") == (2, "", "error: FASTCIFAR_CONV is 'cudnn'; set it to lax or onednn, or unset it\n")


@pytest.mark.parametrize(
    ("counted", "usable", "quota", "text"),
    [
        (8, 8, None, "8 counted"),
        (8, 8, 8.0, "8 counted"),
        (8, 4, None, "8 counted, but the affinity of this process allows 4"),
        (8, None, 2.5, "8 counted, but its cgroup grants the time of 2.5"),
        (8, 4, 2.5, "8 counted, but the affinity of this process allows 4 and its cgroup grants the time of 2.5"),
    ],
)
def test_cores(counted, usable, quota, text):
    assert doctor.cores_text(counted, usable, quota) == text


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "JAX takes 75 % when it starts (its default)"),
        ({"XLA_CLIENT_MEM_FRACTION": ".9"}, "a fraction of .9 when it starts (XLA_CLIENT_MEM_FRACTION)"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, "a fraction of .5 when it starts (XLA_PYTHON_CLIENT_MEM_FRACTION)"),
        (
            {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": ".9"},
            "allocated as needed (XLA_PYTHON_CLIENT_PREALLOCATE=false)",
        ),
    ],
)
def test_gpu_memory(environment, text):
    assert text in doctor.gpu_memory_text(environment)


def test_wrong_values(call, monkeypatch):
    monkeypatch.setattr(known_values, "wrong_values", lambda: {"sqrt(512)": "is 0 instead of 22.6274 (not jitted)"})
    assert labelled(call("doctor")[1])["values"].startswith(
        "9 of 10 values right; sqrt(512) is 0 instead of 22.6274 (not jitted); do not train here"
    )


@pytest.mark.parametrize("platforms", ["", "cuda,cpu", "cpu"])
def test_run_mentions_a_gpu_that_is_not_used(machine, workplace, call, monkeypatch, platforms):
    machine(A100.format("580.65.06"))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    line = (
        "a GPU is present (NVIDIA A100-SXM4-40GB) but JAX uses the CPU: no CUDA plugin of JAX is installed; "
        "the command doctor shows more\n"
    )
    assert call("run", "no_such_experiment")[1] == ("" if platforms == "cpu" else line)
