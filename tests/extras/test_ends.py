"""Where texts end: stop texts against their definition, end-of-text tokens, limits; what is printed and reported."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_heads, tiny_llama

from extras.ends import Text
from extras.report import ENDED
from llama import LlamaConfig
from loading.files import write_json
from loading.tokenizer import Tokenizer
from tinymedusa import PlainDecoder
from variants.heads import save

WORDS = ["the dog", " saw", " a", "ab", "abab", "é", "你好", "🦊", "\n", "\n\n", "<s", "!"]


def ended_at(text: str, stops: list) -> str | None:
    """The definition, character by character."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[:end - max(map(len, found))]
    return None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder / "tokenizer.json")
    return Tokenizer(folder, LlamaConfig(vocab_size=300))


def written(tokenizer, stops, prompt=(1,)) -> Text:
    args = SimpleNamespace(stop=stops, max_new_tokens=10 ** 6)
    return Text(tokenizer, list(prompt), PlainDecoder(tiny_llama(vocab_size=300), eos=()), args)


def test_a_text_ends_where_a_stop_text_begins(tokenizer):
    """Any texts, in any pieces: ids up to the one that completes it; what is shown on the way is never taken back."""
    stopped = across = inside = 0
    for case in range(250):
        rng = random.Random(case)
        whole = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
        ids, stops = tokenizer.encode(whole)[1:], []
        for _ in range(rng.randint(1, 3)):
            begin = rng.randrange(len(whole))
            some = whole[begin:begin + rng.randint(1, 6)]
            stops.append(rng.choice([some, some, some + "x", "zz", "aba"]))
        text, shown, steps = written(tokenizer, stops), [], list(ids)
        while steps and not text.stopped:
            step, steps = steps[:(n := rng.randint(1, 4))], steps[n:]
            before = list(step)
            assert text.add_step(step, lambda piece, head, shown=shown: shown.append(piece)) == text.stopped
            assert before[:len(step)] == step and (text.stopped or step == before)
        shown.append(text.add([], end=True))
        expected = ended_at(whole, stops)
        assert text.text == "".join(shown) == (whole if expected is None else expected)
        assert text.stopped == (expected is not None) == (text.result()["finish_reason"] == "stop")
        if text.stopped:
            number = len(text.ids)
            assert text.ids == ids[:number] and ended_at(tokenizer.decode(ids[:number - 1]), stops) is None
            assert ended_at(tokenizer.decode(ids[:number]), stops) == expected
            stopped, across = stopped + 1, across + (len(ids) > number)
            inside += tokenizer.decode(ids[:number]) != expected and len(shown) > 2
    assert stopped > 120 and across > 60 and inside > 60


def test_no_more_is_held_back_than_may_become_a_stop_text(tokenizer):
    text = written(tokenizer, ["abac", "b!"])
    pieces = [text.add(tokenizer.encode(c)[1:]) for c in "xababab-abac"]
    assert pieces == ["x", "", "", "", "ab", "", "ab", "ab-", "", "", "", ""] and text.stopped


def test_the_head_that_guessed_a_token_is_told_of_cut_steps_too(tokenizer):
    heads, text = [], written(tokenizer, ["d"])
    step = [tokenizer.encode(c)[1] for c in "abcdef"]
    assert text.add_step(step, lambda piece, head: heads.append((piece, head)))
    assert heads == [("a", 1), ("b", 2), ("c", 3), ("", 4)] and len(step) == 4 and text.text == "abc"


def test_a_special_token_that_no_text_shows_is_a_stop_text(tokenizer):
    text = written(tokenizer, ["</s>", "xyz"])
    assert not text.add_step([*tokenizer.encode("ab xy")[1:]]) and text.text == "ab "        # "xy" is undecided
    step = [2, 70]
    assert text.add_step(step) and step == [2] and text.text == "ab xy" and text.result()["finish_reason"] == "stop"


# ------------------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose texts end at an end-of-text token, at the limit or at the context, and heads of which some guesses
    are right."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama(dtype=torch.float32, std=0.3, tie_word_embeddings=True, vocab_size=300,
                       max_position_embeddings=64)
    model.save(folder)
    byte_tokenizer(folder / "tokenizer.json")
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    save(folder / "medusa", tiny_heads(model, 3, noise=0.05), model, "tiny")
    return folder


@pytest.fixture
def run(folder, cli):
    def run(*args):
        status, out, err = cli("generate", "--model", folder, "--threads", 1, "--json", *args)
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()]
    return run


def consistent(result: dict) -> bool:
    drafts = sum(n * steps for n, steps in enumerate(result["accepted"]))
    return result["new_tokens"] == len(result["token_ids"]) == 1 + result["steps"] + drafts


@pytest.mark.parametrize("engine", [[], ["--fast"]], ids=["torch", "native"])
def test_stopped_texts_are_the_same_of_every_decoder(engine, run, folder, tmp_path, tokenizer, monkeypatch):
    """Plain, by heads, by lookup, compared, in a batch: the whole text up to the stop text, whatever a step holds."""
    monkeypatch.setattr("extras.compare.REPEATS", 1)
    (tmp_path / "p.txt").write_text("the dog\na cat\nonce\n")
    draw = ["--temperature", 1.5, "--max-new-tokens", 30, "--ignore-eos", *engine]
    prompts = ["--prompt", "the dog", "--prompt", "a cat", "--prompt", "once"]
    whole, mid_step, rng = run(*draw, "--heads", "none", *prompts), 0, random.Random(1)
    for _ in range(2):
        stops = [r["text"][(begin := rng.randrange(5, 25)):begin + rng.randint(1, 4)] for r in whole]
        asked = [word for stop in stops for word in ("--stop", stop)]
        ways = [run(*draw, *asked, *prompts, "--heads", heads) for heads in ("none", "lookup", folder / "medusa")]
        ways.append(run(*draw, *asked, "--prompts-file", tmp_path / "p.txt", "--batch-size", 2))
        compared = run(*draw, *asked, *prompts, "--compare")
        ways += [compared, [r["baseline"] for r in compared]]
        for texts in ways:
            for result, full in zip(texts, whole, strict=True):
                number = result["new_tokens"]
                assert result["text"] == ended_at(full["text"], stops) and result["finish_reason"] == "stop"
                assert result["token_ids"] == full["token_ids"][:number] and consistent(result)
                before = tokenizer.stream([1])                                   # bytes that end it wait for the next
                assert ended_at("".join(before([i]) for i in full["token_ids"][:number - 1]), stops) is None
        mid_step += sum(a["new_tokens"] < 30 and len(a["accepted"]) > 1 for a in ways[2])
        assert all(r["identical"] for r in compared)
    assert mid_step > 2


def test_why_a_text_ended(run, folder, tmp_path, monkeypatch):
    """An end-of-text token, the limit, the context, --max-steps; plain and by heads, in torch and C++, in batches."""
    monkeypatch.setattr("extras.compare.REPEATS", 1)
    (tmp_path / "p.txt").write_text("the dog\n")
    for engine in ([], ["--fast"]):
        for heads in ("none", folder / "medusa"):
            one = lambda *more, e=engine, h=heads: run("--prompt", "the dog", "--heads", h, *e, *more)[0]
            drawn = ["--temperature", 1.5, "--max-new-tokens", 300]
            texts = ((seed, one(*drawn, "--seed", seed)) for seed in range(40))
            seed, found = next((seed, text) for seed, text in texts if text["finish_reason"] == "eos")
            assert found["token_ids"].index(2) == found["new_tokens"] - 1
            on = one(*drawn, "--seed", seed, "--ignore-eos", "--compare")
            assert on["identical"] and on["baseline"]["finish_reason"] == "context"
            assert on["token_ids"][:found["new_tokens"]] == found["token_ids"] and on["finish_reason"] == "context"
            assert on["prompt_tokens"] + on["new_tokens"] == 64 and consistent(on)
            assert on["text"].startswith(found["text"])
            exact = ["--ignore-eos", "--max-new-tokens", on["new_tokens"]]
            assert one(*exact)["finish_reason"] == "length" == one("--max-new-tokens", 5)["finish_reason"]
            assert one("--max-steps", 3, "--ignore-eos")["finish_reason"] == "steps"
            batch, = run("--prompts-file", tmp_path / "p.txt", "--heads", heads, *engine, "--ignore-eos")
            assert batch["finish_reason"] == "context" and batch["new_tokens"] == on["new_tokens"]
            compared = one("--compare", "--max-new-tokens", 5)
            assert compared["finish_reason"] == compared["baseline"]["finish_reason"] == "length"


def test_the_terminal_says_why(folder, tmp_path, cli, monkeypatch):
    (tmp_path / "p.txt").write_text("the dog\n")
    alone = ["--model", folder, "--threads", 1, "--ignore-eos"]
    whole = json.loads(cli("generate", *alone, "--prompt", "the dog", "--json")[1])["text"]
    for more, reason in ((["--max-new-tokens", 5], "length"), ([], "context"), (["--max-steps", 3], "steps"),
                         (["--stop", whole[5:8]], "stop")):
        out = cli("generate", *alone, *more, "--prompt", "the dog")[1]
        assert f" tokens/s   {ENDED[reason]}\n" in out
        if reason == "stop":
            assert out.startswith(f"the dog{whole.partition(whole[5:8])[0]}\n\nmedusa ")
        if reason != "steps":
            out = cli("generate", *alone, *more, "--prompts-file", tmp_path / "p.txt")[1]
            assert f"\n[{ENDED[reason]}]\n" in out
        lines = iter(["the dog"])
        monkeypatch.setattr("builtins.input", lambda label="", lines=lines: next(lines, "!!exit"))
        assert f" tokens, {ENDED[reason]}, " in cli("generate", *alone, *more, "--interactive")[1]


def test_a_conversation_goes_on_without_the_stop_text(folder, cli, monkeypatch):
    """Nor do the tokens that wrote it stay in the model's memory of the conversation."""
    args = ["--model", folder, "--threads", 1, "--ignore-eos", "--max-new-tokens", 10]
    whole = json.loads(cli("generate", *args, "--prompt", "the dog", "--json")[1])["text"]
    stop = whole[3:5]
    lines = iter(["the dog", " saw it"])
    monkeypatch.setattr("builtins.input", lambda label="": next(lines, "!!exit"))
    out = cli("generate", *args, "--stop", stop, "--interactive")[1]
    before = whole.partition(stop)[0]
    alone = cli("generate", *args, "--stop", stop, "--prompt", f"the dog{before} saw it", "--json")[1]
    second = out.split("tokens/step]\n")[1].partition("\n[")[0]
    assert out.startswith(f"the dog{before}\n[") and second == " saw it" + json.loads(alone)["text"]


def test_an_empty_stop_text_is_refused(folder, cli):
    status, out, err = cli("generate", "--model", folder, "--stop", "a", "--stop", "")
    assert (status, out, err) == (2, "", "generate.py: --stop: the text is empty, so it appears everywhere\n")
