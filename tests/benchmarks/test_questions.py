"""The questions that heads for a chat model are trained, tuned and measured on: none is in two of the three."""
import json
import subprocess
import sys

from conftest import ROOT

HELD_OUT, TUNE = ROOT / "benchmarks" / "questions.jsonl", ROOT / "heads" / "smollm2-135m-instruct" / "tune.jsonl"


def test_no_question_is_both_learned_and_measured(tmp_path):
    """With a list of held-out ones that the script would write otherwise, it leaves them out."""
    script = tmp_path / "questions.py"
    script.write_text((ROOT / "benchmarks" / "questions.py").read_text(encoding="utf-8"), encoding="utf-8")
    command = lambda number: [sys.executable, script, "--number", str(number)]
    written = lambda number: subprocess.run(command(number), capture_output=True, text=True).stdout.splitlines()
    script.with_suffix(".jsonl").write_text("")
    everything = written(40)
    script.with_suffix(".jsonl").write_text("\n".join([everything[0], everything[7]]))
    assert written(38) == everything[1:7] + everything[8:]
    script.with_suffix(".jsonl").write_text(HELD_OUT.read_text(encoding="utf-8"))
    learned, held_out = written(8100), HELD_OUT.read_text(encoding="utf-8").splitlines()
    assert learned[8000:] == TUNE.read_text(encoding="utf-8").splitlines()      # behind the 8,000 that are trained on
    assert len({*learned, *held_out}) == 8150
    assert all(json.loads(line)["messages"][0]["role"] == "user" for line in (*learned, *held_out))
