"""benchmarks/compare.py: each saved run's table is what its JSON says, on a CPU and on a GPU."""
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402

RUNS = [path for path in sorted((ROOT / "docs" / "results").glob("*.json")) if '"stages"' in path.read_text()[:10 ** 6]]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_saved_table_is_that_of_its_json(path):
    assert compare.markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_there_are_saved_runs():
    assert {"native-model", "smollm2", "gpu-7B"} <= {path.stem for path in RUNS}
