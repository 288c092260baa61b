"""A cluster that has only a head grows when a sweep asks for it, to its limit, and shrinks again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster import lab
from tests.cluster.fake_cloud import plan
from tests.cluster.hosts import Hosts, missing
from tests.toys.sweeps import SWEEPS
from tuning.demand import wanted_gpus


@pytest.mark.parametrize(("lanes", "seeds", "gpus"), [("auto", 2, 1), ("auto", 64, 3), ("4", 2, 3), ("off", 2, 6)])
def test_whole_gpus_as_many_as_the_lanes_fill(lanes, seeds, gpus):
    assert wanted_gpus(replace(plan(SWEEPS), lanes=lanes, seeds=seeds)) == gpus


@pytest.mark.heavy
@pytest.mark.skipif(bool(missing()), reason=f"needs a test host: {missing()}")
def test_a_sweep_uses_devices_that_join_and_lets_go_of_them_at_its_end(tmp_path):
    folders = lab.shared_folders(tmp_path)
    folders[-1].mkdir()
    with Hosts(Path("/var/tmp/lanewise-test-cloud"), ("cloud",), folders) as hosts:
        lab.install(hosts, ("cloud",))
        venv = "~/.lanewise/venv/bin/python"
        told = hosts.run(
            "cloud", f"cd {lab.ROOT} && {venv} -m tests.cluster.fake_cloud 3 sweep {folders[-1]} 2>&1", seconds=900
        )
    assert "DEVICE AT FIRST False" in told
    assert "ALL GPUS True" in told
    assert "ALL HOSTS True" in told, "devices that joined late are used"
    assert "ONE LEFT True" in told
    assert "THINNED True True" in told, "a GPU is given back while the sweep runs"
    assert "RELEASED True" in told


@pytest.mark.heavy
@pytest.mark.skipif(bool(missing()), reason=f"needs a test host: {missing()}")
@pytest.mark.parametrize("limit", [2, 0])
def test_an_empty_cluster_grows_on_demand(tmp_path, limit):
    with Hosts(Path("/var/tmp/lanewise-test-cloud"), ("cloud",), lab.shared_folders(tmp_path)[:3]) as hosts:
        lab.install(hosts, ("cloud",))
        venv = "~/.lanewise/venv/bin/python"
        told = hosts.run("cloud", f"cd {lab.ROOT} && {venv} -m tests.cluster.fake_cloud {limit} 2>&1")
    assert "DEVICE AT FIRST False" in told
    assert "asking the cluster for 6 GPUs" in told
    if limit:
        assert "GPUS True" in told
        assert "RELEASED True" in told
    else:
        assert "REFUSED the cluster at auto has no processor or GPU for trials, and got none in 5 s" in told
