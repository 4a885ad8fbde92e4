"""--explain: what is told is what happens, checked against decoding and against plain forwards of the whole text."""
import json
import re

import pytest
import torch
from conftest import MODEL, ROOT

from llama import Llama
from loading.tokenizer import Tokenizer

NODE = re.compile(r"  ([* ]) ([│├└─ ]*)(.+?) +node (\d+)  (the base model|head (\d+), guess (\d+)) +slot (\d+)  "
                  r"position (\d+)  the base model samples (.+)")


def told(text):
    """A quoted token as text, a special one by its name."""
    return json.loads(text) if text.startswith('"') else text


@pytest.mark.parametrize("more", [[], ["--temperature", 0.8, "--seed", 3], ["--tree", "[[0],[0,0],[1],[0,0,0],[2]]"]],
                         ids=str)
def test_what_is_told_is_what_happens(more, cli):
    prompt = "Tom had a red"
    status, out, err = cli("generate", "--prompt", prompt, "--explain", 6, "--threads", 1, *more)
    assert status == 0, err
    result = json.loads(cli("generate", "--prompt", prompt, "--max-steps", 6, "--threads", 1, "--json", *more)[1])
    model = Llama.from_pretrained(MODEL)
    tokenizer = Tokenizer(MODEL, model.config)
    text, steps = tokenizer.encode(prompt), re.split(r"\nstep \d+: ", out)
    assert len(steps) == 7
    new, accepted = [told(re.search(r"the base model samples (.+), the root", steps[0])[1])], []
    for step in steps[1:]:
        cached = len(text) + len(new) - 1                                        # all but the pending token
        ids = (text + result["token_ids"])[max(0, cached - 12):cached]
        last = "<s>" * (cached <= 12) + tokenizer.stream([])(ids, end=True)
        assert step.startswith(f"the cache holds {cached} tokens in slots 0 to {cached - 1}, the last ones "
                               f"{json.dumps(last)}\n")
        nodes = {int(m[4]): m for m in map(NODE.fullmatch, step.splitlines()) if m}
        kept = [n for n in sorted(nodes) if nodes[n][1] == "*"]
        assert sorted(nodes) == list(range(len(nodes))) and len(nodes) > 4 and told(nodes[0][3]) == new[-1]
        for number, node in nodes.items():
            assert int(node[8]) == cached + number
            assert int(node[9]) == cached + int(node[6] or 0)                    # a head's number is its node's depth
        assert [told(nodes[n][3]) for n in kept[1:]] == [told(nodes[n][10]) for n in kept[:-1]]
        some = [told(nodes[n][10]) for n in kept]
        plural = "s" * (len(some) > 1)
        assert f"  {len(some)} new token{plural}: {', '.join(nodes[n][10] for n in kept)}; the last" in step
        slots = ", ".join(str(cached + n) for n in kept)
        moved = f"slots {slots} become {cached} to {cached + len(kept) - 1}, what is behind them is discarded"
        assert (moved if len(kept) > 1 else f"slot {cached} stays, what is behind it is discarded") in step
        if not more:                                                             # greedy: the base alone says the same
            ids = torch.tensor([text + result["token_ids"][:len(new)]])
            with torch.no_grad():
                best = model.lm_head(model(ids)[0, -1]).argmax().item()
            assert told(nodes[0][10]) == tokenizer.stream(ids[0].tolist())([best], end=True)
        new += some
        accepted.append(len(kept) - 1)
    assert "".join(new) == result["text"] and len(new) == result["new_tokens"] and sum(accepted) > 2
    assert [accepted.count(n) for n in range(max(accepted) + 1)] == result["accepted"]


def test_the_step_in_the_readme(cli):
    out = cli("generate", "--explain", 1)[1]
    assert out.partition("\n\ntree: 8 nodes")[0] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_end_is_told(cli):
    """In the last step alone; special tokens have their names."""
    steps = cli("generate", "--prompt", "The end.", "--explain", 60)[1].split("\nstep ")
    assert ["the end of the text" in step for step in steps] == [False] * (len(steps) - 1) + [True]
    assert ["the next root" in step for step in steps[1:]] == [True] * (len(steps) - 2) + [False]
    assert re.search(r"new tokens?: (.*, )?</s>; the last one", steps[-1]) and '"<s>The end."' in steps[0]


def test_what_cannot_be_explained(cli):
    for args, says in ((["--heads", "none"], "--explain shows trees, and this is plain decoding: give --heads"),
                       (["--json"], "--explain does not go with --json: leave out one or the other"),
                       (["--explain", "0"], "--explain: '0' is not a whole number")):
        status, out, err = cli("generate", "--explain", 2, *args)
        assert status == 2 and out == "" and says in err and err.count("\n") == 1
