"""The choice of the convolution, and the fallback to lax when the check of oneDNN fails."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fastcifar_jax.ops import backend
from fastcifar_jax.ops.conv import conv

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch, tmp_path):
    """`check(program)` replaces the check by a program and forgets its answer; returns the list of the runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTCIFAR_CONV", raising=False)
    backend.check_onednn.cache_clear()
    real = subprocess.run

    def check(program="pass"):
        runs = []

        def run(command, **options):
            runs.append(command)
            return real([sys.executable, "-c", program], **options)

        monkeypatch.setattr(backend.subprocess, "run", run)
        monkeypatch.setattr(backend, "CHECK_SECONDS", 1 if "sleep" in program else 60)
        return runs

    yield check
    backend.check_onednn.cache_clear()


def answer_of_another_process():
    backend.check_onednn.cache_clear()
    return backend.check_onednn()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "status -6"),
        ("import sys; sys.exit('UNIMPLEMENTED: no registered implementation for custom call')", "no registered"),
        ("import sys; sys.exit('dw of float32 -> float32 is off by 1.0e+00 of the largest value')", "off by"),
        ("print('onednn_verbose,v1,primitive,exec,cpu,convolution,gemm:jit,forward')", "it uses gemm:jit"),
        ("import time; time.sleep(60)", "did not end"),
    ],
    ids=["crash", "missing target", "wrong numbers", "slow kernel", "hang"],
)
def test_a_failed_check_means_lax_and_is_remembered(check, program, reason):
    runs = check(program)
    found, why = backend.conv_backend()
    assert found == "lax" and reason in why
    assert "onednn" not in jax.jit(conv).lower(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 5))).as_text()
    assert answer_of_another_process() == (False, why) and len(runs) == 1


@pytest.mark.parametrize("damage", [None, "", "{", "[]", '{"works": true}'])
def test_a_good_check_is_remembered_and_a_damaged_answer_replaced(check, damage):
    runs, file = check(), backend._cache_file()
    if damage is not None:
        file.parent.mkdir()
        file.write_text(damage)
    assert backend.check_onednn()[0] and answer_of_another_process()[0] and len(runs) == 1
    assert json.loads(file.read_text())["works"] is True and list(file.parent.iterdir()) == [file]


def test_a_cache_that_cannot_be_written(check, monkeypatch, tmp_path):
    """Nothing is left of the file, and the answer is remembered once it can be."""
    runs = check()
    with monkeypatch.context() as patch:
        (tmp_path / "file").write_text("")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert answer_of_another_process()[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert answer_of_another_process()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]
    assert answer_of_another_process()[0] and answer_of_another_process()[0] and len(runs) == 3


@pytest.mark.parametrize("source", sorted(path.name for path in Path(backend.__file__).parent.glob("*.py")))
def test_the_answer_depends_on_every_source_of_the_folder(monkeypatch, source):
    before, read_bytes = backend._cache_file(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.name == source))
    assert backend._cache_file() != before


def test_a_wrong_name(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CONV", "cudnn")
    with pytest.raises(ValueError, match="FASTCIFAR_CONV is 'cudnn'; set it to lax or onednn"):
        backend.conv_backend()


def test_other_platforms_use_lax(monkeypatch):
    monkeypatch.delenv("FASTCIFAR_CONV", raising=False)
    monkeypatch.setattr(backend.platform, "machine", lambda: "aarch64")
    assert backend.conv_backend() == ("lax", "no oneDNN in jaxlib for Linux aarch64")


@pytest.mark.parametrize(
    ("forced", "flags", "loop", "dtype"),
    [
        ("onednn", "avx2 avx512_bf16", "block", "mixed"),
        ("onednn", "avx2", "block", "float32"),
        ("lax", "avx2 avx512_bf16", "step", "float32"),  # in a loop, lax's weight gradients take many times as long
    ],
)
def test_defaults_of_a_cpu(monkeypatch, forced, flags, loop, dtype):
    monkeypatch.setenv("FASTCIFAR_CONV", forced)
    monkeypatch.setattr(backend, "_cpu_info", lambda: f"flags : {flags}")
    assert (backend.step_loop(), backend.default_dtype()[0]) == (loop, dtype)


class Card:
    """A device as JAX describes it."""

    platform = "gpu"

    def __init__(self, kind, capability):
        self.device_kind, self.compute_capability = kind, capability


@pytest.mark.parametrize(("platform", "dtype"), [("gpu", "float16"), ("tpu", "bfloat16")])
def test_defaults_of_an_accelerator(monkeypatch, platform, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert (backend.step_loop(), backend.default_dtype()[0]) == ("epoch", dtype)
    assert backend.conv_backend()[0] == "lax"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (Card("NVIDIA A100", "8.0"), "mixed", "on a GPU XLA converts the bfloat16 operands to float32; use float16"),
        (Card("Tesla V100", "7.0"), "bfloat16", r"Tesla V100 has no bfloat16 \(compute capability 7.0, needed 8.0\)"),
        (Card("Tesla T4", "7.5"), "bfloat16", "use float16"),
    ],
)
def test_refuses_a_dtype_that_would_be_float32(monkeypatch, device, dtype, message):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(ValueError, match=message):
        backend.check_dtype(dtype)
    backend.check_dtype("float16")


@pytest.mark.parametrize("device", [Card("NVIDIA A100", "8.0"), Card("NVIDIA B200", "10.0"), Card("AMD", "gfx90a")])
def test_newer_cards_have_bfloat16(monkeypatch, device):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    backend.check_dtype("bfloat16")


def test_deterministic_is_a_flag_of_xla_that_is_set_once(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CONV", "lax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    backend.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
    for _ in range(2):
        backend.configure(deterministic=True)
        assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x --xla_gpu_deterministic_ops=true"


def test_unknown_compiler_options_are_left_out():
    assert backend.known_options({"xla_cpu_no_such_option": 1}) == {}
    assert backend.known_options({"xla_embed_ir_in_executable": False}) == {"xla_embed_ir_in_executable": False}


def python(program, **environment):
    """Standard error of a program that must succeed."""
    command, environment = [sys.executable, "-c", program], {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_no_attempt_to_cache_what_cannot_be_cached(tmp_path):
    """With JAX's persistent cache on, a process that calls oneDNN writes no warning."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from fastcifar_jax.ops import backend, conv\n"
        "backend.configure()\n"
        "jax.jit(conv.conv)(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))).block_until_ready()\n"
    )
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert python(program, **cache) == ""


@pytest.fixture
def compilation_cache(monkeypatch, tmp_path):
    """The user's cache folder; JAX's settings are put back afterwards."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache"
    before = {name: getattr(jax.config, name) for name in names}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(("platform", "kept"), [("gpu", True), ("tpu", True), ("cpu", False)])
def test_an_accelerator_keeps_compiled_programs(monkeypatch, compilation_cache, platform, kept):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backend, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("FASTCIFAR_CONV", "lax")
    backend.configure()
    folder = compilation_cache / "fastcifar_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == (str(folder) if kept else None)
    assert folder.exists() == kept
    assert jax.config.jax_persistent_cache_min_compile_time_secs == (backend.COMPILE_SECONDS if kept else 1.0)


def test_a_chosen_cache_stays(monkeypatch, compilation_cache):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # JAX reads it when it is imported; "" turns the cache off
    backend.keep_compiled_programs()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "chosen")
    backend.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "chosen" and list(compilation_cache.iterdir()) == []


def test_a_cache_for_programs_that_cannot_be_written_is_a_warning(compilation_cache, caplog):
    (compilation_cache / "fastcifar_jax").write_text("")
    backend.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
    [record] = caplog.records
    assert record.name == "fastcifar_jax" and record.levelname == "WARNING"
    assert "compiled programs are not kept" in record.message and str(compilation_cache) in record.message


def test_compiled_programs_are_kept(tmp_path):
    program = (
        "import jax\n"
        "from fastcifar_jax.ops import backend\n"
        "backend.keep_compiled_programs()\n"
        "jax.jit(lambda x: x + 1)(1.0).block_until_ready()\n"
    )
    python(program, XDG_CACHE_HOME=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list((tmp_path / "fastcifar_jax" / "compiled").glob("jit__lambda*"))


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from fastcifar_jax.ops import backend
from fastcifar_jax.ops.batch_norm import normalize_groups_and_pool
from fastcifar_jax.ops.conv import conv

rng = np.random.default_rng(0)
x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 6, 6, 4), (3, 3, 4, 8)))

def passes(x, kernel, operands):
    def f(x, kernel):
        ones = jnp.ones(8)
        shift = jnp.zeros((3, 8))
        return normalize_groups_and_pool(conv(x, kernel, operands), ones, ones, shift, 3, 1e-5, (2, 2))
    (y, *statistics), vjp = jax.vjp(f, x, kernel)
    return y, statistics, vjp((jnp.sin(y), *map(jnp.zeros_like, statistics)))

program = jax.jit(passes, static_argnums=2)
with jax.set_mesh(jax.make_mesh((1,), ("batch",), (AxisType.Auto,))):
    assert backend.conv_backend()[0] == "onednn"
for operands, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
    alone = program(x, kernel, operands)
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, P("batch")))
    with jax.set_mesh(mesh):
        assert backend.conv_backend() == ("lax", "XLA cannot partition the call of oneDNN over a mesh of 2 devices")
        compiled = program.lower(spread, kernel, operands).compile()
        together = compiled(spread, kernel)
    text = compiled.as_text()
    assert "onednn" not in text and "all-reduce" in text and "all-gather" not in text
    assert together[0].sharding.spec == P("batch")
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))
"""


def test_a_mesh_uses_lax_and_gives_the_results_of_one_device():
    """Convolution, ghost norm, pool and gradients, over two devices and with a group size that they do not divide."""
    flags = "--xla_force_host_platform_device_count=2"
    python(ON_A_MESH, JAX_PLATFORMS="cpu", FASTCIFAR_CONV="onednn", XLA_FLAGS=flags)
