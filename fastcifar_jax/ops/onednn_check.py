"""Whether the oneDNN convolution inside jaxlib can be used here: tried in another process, remembered in a file.

The call is no public interface: another jaxlib may lack it, and on another processor it may end the process or give
wrong numbers. So a process of its own computes small convolutions and both gradients for each pair of dtypes and
compares them with lax.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

SECONDS = 120  # a trial that takes longer has hung

_CASES = (  # batch, height, width, input channels, output channels, kernel size, padding
    (2, 8, 8, 16, 32, 3, "SAME"),
    (1, 5, 7, 27, 13, 1, "SAME"),
    (1, 3, 3, 3, 5, 3, "SAME"),
    (33, 4, 4, 8, 24, 3, "SAME"),
    (3, 8, 9, 3, 24, 2, "VALID"),
)
_TOLERANCES = {  # (operands, result): largest difference from float32 lax, as a share of the largest value
    ("float32", "float32"): 1e-4,
    ("bfloat16", "float32"): 2e-2,
    ("bfloat16", "bfloat16"): 2e-2,
}


# The name of the kernel in a line of ONEDNN_VERBOSE. Those called gemm start parallel work inside parallel work, for
# which XLA's thread pool waits for ever; those called ref are a thousand times slower.
_KERNEL = re.compile(r"^onednn_verbose,.*,convolution,([^,]*),", re.MULTILINE)


def outcome() -> tuple[bool, str]:
    """Whether the call works here, and why it is or isn't used; a trial takes seconds, and only the first time.

    The answer is kept in the user's cache folder, by jaxlib's version, the processor and this package's sources; a
    folder that cannot be written costs a trial in each process.
    """
    file = _cache_file()
    try:
        known = json.loads(file.read_text())
        return bool(known["works"]), str(known["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    works, reason = run_trial()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps({"works": works, "reason": reason}))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return works, reason


def run_trial() -> tuple[bool, str]:
    """Runs this file as a program; anything but its success means no."""
    command = [sys.executable, "-m", "fastcifar_jax.ops.onednn_check"]
    environment = {**os.environ, "FASTCIFAR_CONV": "onednn", "JAX_PLATFORMS": "cpu", "ONEDNN_VERBOSE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"the trial of oneDNN did not end: {type(error).__name__}; delete {_cache_file()} to try again"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return False, f"the trial of oneDNN ended with status {done.returncode}: {last}"
    slow = sorted({name for name in _KERNEL.findall(done.stdout) if name.startswith(("gemm", "ref"))})
    if slow:
        return False, f"oneDNN has no fast convolution for this processor: it uses {', '.join(slow)}"
    return True, f"oneDNN in jaxlib {importlib.metadata.version('jaxlib')} agreed with lax in a trial"


def _cache_file() -> Path:
    processor = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    except OSError:
        pass
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in ("conv.py", "onednn_check.py"))
    settings = os.environ.get("XLA_FLAGS", "") + os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    text = "\n".join([importlib.metadata.version("jaxlib"), processor, settings, sys.version])
    name = hashlib.sha256(text.encode() + sources).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastcifar_jax" / f"onednn-{name}.json"


def _main():
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fastcifar_jax.ops import conv

    for batch, height, width, inputs, outputs, size, padding in _CASES:
        margin, edge = (size // 2, 0) if padding == "SAME" else (0, size - 1)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(batch, height, width, inputs)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(size, size, inputs, outputs)), jnp.float32)
        cotangent = jnp.asarray(rng.normal(size=(batch, height - edge, width - edge, outputs)), jnp.float32)

        def three_passes(f, x=x, kernel=kernel, cotangent=cotangent):
            def run(x, kernel, cotangent):
                y, gradients = jax.vjp(f, x, kernel)
                return (y, *gradients(cotangent.astype(y.dtype)))

            return jax.jit(run)(x, kernel, cotangent)

        exact = three_passes(functools.partial(conv._lax_conv, padding=(margin, margin)))
        for (operands, result), tolerance in _TOLERANCES.items():
            f = lambda x, kernel, operands=operands, result=result, padding=padding: conv.conv(
                x.astype(result), kernel, operands, padding
            )
            for name, found, expected in zip(("y", "dx", "dw"), three_passes(f), exact, strict=True):
                scale = float(jnp.abs(expected).max())
                error = float(jnp.abs(found.astype(jnp.float32) - expected).max()) / scale
                if not error < tolerance:
                    sys.exit(f"{name} of {operands} -> {result} is off by {error:.1e} of the largest value")


if __name__ == "__main__":
    _main()
