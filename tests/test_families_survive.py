"""Every family's own default sweep, interrupted in the middle and resumed, ends as if nobody had interrupted it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.families import FAMILIES
from tests.toy_sweeps import Process, Swept

SHIPPED = [name for name in FAMILIES if not name.startswith("tests.")]
SHORT = ("--trials", "3", "--seeds", "2", "--searcher", "random", "--scheduler", "none", "--engine")


def in_training(swept: Process, least: int) -> bool:
    """Something has been reported of several configs, and some of them go on."""
    events = swept.events()
    reported = {event["trial"] for event in events if event["event"] == "report"}
    ended = {event["trial"] for event in events if event["event"] == "end"}
    return len(reported) >= least and bool(reported - ended)


def whole(swept: Swept) -> Swept:
    assert swept.code == 0, swept.err + swept.log
    assert "Traceback" not in swept.log
    return swept


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("family", SHIPPED)
def test_a_family_interrupted_and_resumed(tmp_path, family, engine):
    module = f"tune_{family}"
    process = Process(tmp_path, "cut", *SHORT, engine, module=module)
    process.when(lambda _: in_training(process, 2))
    process.interrupt()
    assert process.wait().code == 130
    assert list((process.folder / "checkpoints").rglob("*.safetensors"))
    cut = whole(Process(tmp_path, "cut", "--resume", "cut", module=module).wait())
    assert len(cut.events("resumed")) >= 1
    runs = cut.runs.set_index("run_key")
    assert set(runs.stop_reason) == {"finished"}, cut.runs[["label", "stop_reason", "error"]]
    twin = whole(Process(tmp_path, "twin", *SHORT, engine, module=module).wait())
    undisturbed = twin.runs.set_index("run_key")
    assert set(runs.index) == set(undisturbed.index)
    finals = [name for name in undisturbed if name.startswith("final.")]
    assert finals
    if engine == "serial":
        pd.testing.assert_frame_equal(runs[finals].sort_index(), undisturbed[finals].sort_index(), check_exact=True)
    else:  # who shares a stack with whom is chance, and the last digits with it
        assert np.isfinite(runs[finals]).equals(np.isfinite(undisturbed[finals].loc[runs.index]))
