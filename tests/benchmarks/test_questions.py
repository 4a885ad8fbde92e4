"""The questions that heads for a chat model are trained, tuned and measured on: none is in two of the three."""
import json
import os
import subprocess
import sys
from itertools import islice
from os.path import commonprefix

import torch
from conftest import ROOT, tiny_llama

from fast import engines
from llama import LlamaConfig
from loading.files import write_json
from loading.tokenizer import Tokenizer
from tinymedusa import Sampling

HELD_OUT, TUNE = ROOT / "benchmarks" / "questions.jsonl", ROOT / "heads" / "smollm2-135m-instruct" / "tune.jsonl"


def test_no_question_is_both_learned_and_measured(tmp_path):
    """With a list of held-out ones that the script would write otherwise, it leaves them out."""
    script = tmp_path / "questions.py"
    script.write_text((ROOT / "benchmarks" / "questions.py").read_text(encoding="utf-8"), encoding="utf-8")
    command = lambda number: [sys.executable, script, "--number", str(number)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    written = lambda number: subprocess.run(command(number), capture_output=True, text=True, check=True,
                                            env=environment).stdout.splitlines()
    script.with_suffix(".jsonl").write_text("")
    everything = written(40)
    script.with_suffix(".jsonl").write_text("\n".join([everything[0], everything[7]]))
    assert written(38) == everything[1:7] + everything[8:]
    script.with_suffix(".jsonl").write_text(HELD_OUT.read_text(encoding="utf-8"))
    lines = lambda file: file.read_text(encoding="utf-8").splitlines()
    learned, held_out, tune = written(8050), lines(HELD_OUT), lines(TUNE)
    assert learned[8000:] == tune[:50]                                          # behind the 8,000 that are trained on
    assert len({*learned, *held_out, *tune[50:]}) == 8150                       # the model's own
    assert all(json.loads(line)["messages"][0]["role"] == "user" for line in (*learned, *held_out, *tune))


def test_the_model_asks_at_the_users_place(tiny_folder):
    """Each begins with first words of ours, is in one line and was ended by the model; what is held out is left out."""
    tiny_llama(dtype=torch.float32, vocab_size=300, max_position_embeddings=1200).save(tiny_folder)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    write_json(tiny_folder / "tokenizer_config.json", {"chat_template": template, "eos_token": "</s>"})
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import questions
    tokenizer = Tokenizer(tiny_folder, LlamaConfig.from_pretrained(tiny_folder))
    first, model = questions.split(questions.FIRST_WORDS, "|"), engines.load(tiny_folder, torch.bfloat16, fast=True)
    texts = list(islice(questions.asked(str(tiny_folder), 0, "cpu"), 12))
    assert all(text.startswith(tuple(first)) and "\n" not in text for text in texts) and len(set(texts)) == 12
    before = commonprefix([tokenizer.encode("user: A")[1:], tokenizer.encode("user: 7")[1:]])    # it writes no bos
    decoder, written = engines.decoder(model, sampling=Sampling(0.8), eos=tokenizer.eos), []
    for seed, words in enumerate(first):
        prompt = before + tokenizer.encode(words)[1:]
        ids = [i for (new,) in decoder.generate([prompt], 32, [seed]) for i in new]
        written += [words + tokenizer.decode(ids)] if ids[-1] in tokenizer.eos else []
    assert [text.strip() for text in written if "\n" not in text] == texts[:len(written)] and len(written) > 2
