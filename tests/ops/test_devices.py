"""Which GPUs, limits of cores and libraries are found."""

import subprocess
from pathlib import Path

import pytest

from fastcifar_jax.ops import devices
from fastcifar_jax.ops.devices import Gpu

OLD = 'case "$1" in *compute_cap*) echo "Field is not valid"; exit 2;; esac; echo "Tesla T4, 418.87.01"'


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'Tesla T4, 580.65.06, 7.5'; echo 'Tesla T4, 580.65.06, 7.5'", [Gpu("Tesla T4", "580.65.06", "7.5")] * 2),
        (OLD, [Gpu("Tesla T4", "418.87.01")]),
        ("echo 'NVIDIA-SMI has failed'; exit 9", [Gpu("NVIDIA GPU")]),
        ("exec sleep 5", [Gpu("NVIDIA GPU")]),
        (None, [Gpu("NVIDIA GPU")]),
    ],
    ids=["two", "old nvidia-smi", "failure", "hang", "device file alone"],
)
def test_gpus_are_found(tmp_path, monkeypatch, script, gpus):
    monkeypatch.setattr(devices, "SMI_SECONDS", 0.3 if script == "exec sleep 5" else 10)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert devices.find_gpus(f"{tmp_path}/nvidia[0-9]*") == gpus


def test_without_a_gpu_no_process_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("a process was started"))
    assert devices.find_gpus(f"{tmp_path}/nvidia[0-9]*") == []


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/user/me", {"user/cpu.max": "400000 100000", "user/me/cpu.max": "max 100000"}, 4.0),
        ("0::/user/me", {"user/cpu.max": "200000 100000", "user/me/cpu.max": "400000 100000"}, 2.0),
        ("4:memory:/\n1:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("2:cpuset:/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cpu_quota(tmp_path, membership, files, quota):
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    assert devices.cpu_quota(tmp_path / "cgroup", tmp_path / "membership") == quota


def test_files_that_another_system_lacks(tmp_path):
    assert devices.cpu_quota(membership=tmp_path / "none") is None
    assert devices.loaded_libraries("lib", tmp_path / "none") == []


def test_loaded_libraries(tmp_path):
    (tmp_path / "maps").write_text(
        "7f00-7f01 r-xp 00000000 08:01 12                 /opt/my libs/libcudnn.so.9\n"
        "7f01-7f02 r--p 00000000 08:01 12                 /opt/my libs/libcudnn.so.9\n"
        "7f02-7f03 r-xp 00000000 08:01 13                 /lib/libc.so.6\n"
        "7ffe-7fff rw-p 00000000 00:00 0                  [stack]\n"
    )
    assert devices.loaded_libraries("libcudnn.so", tmp_path / "maps") == ["/opt/my libs/libcudnn.so.9"]


def test_libraries_of_this_process():
    assert [Path(path).name for path in devices.loaded_libraries("libjax_common")] == ["libjax_common.so"]
