"""What one process has compiled of a program, a later one finds on disk, though it has nothing to measure before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.families import FAMILIES

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.heavy), pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_sweep_compiles_nothing(family, device, tmp_path):
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }

    def start(*more: str) -> dict:
        command = [sys.executable, "-m", "tests.one_start", family, device, *more]
        return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)

    first, second = start("probe"), start()
    assert first["compiled"] == first["programs"] > 0
    assert second == {"programs": first["programs"], "compiled": 0, "kernels": []}
