"""--prompts-file: every text is what its prompt gives alone, and they come in order, each as soon as it can."""
import json
import sys

import pytest
from conftest import tiny_llama

import generate
from loading.config import check_prompts
from loading.files import UserError
from loading.tokenizer import Tokenizer
from tinymedusa import PlainDecoder

PROMPTS = ["the dog", "  two spaces", "a cat é 你", "x" * 30, "once", "the", "no", "a b c d", "dog dog"]


def results(cli, *args):
    status, out, err = cli("generate", "--json", "--threads", 1, *args)
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def files(tmp_path):
    (tmp_path / "p.txt").write_text("\n\n".join(PROMPTS) + "\r\n", encoding="utf-8")
    lines = [json.dumps({"prompt": p, "id": i} if i % 2 else p) for i, p in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "p.txt", tmp_path / "p.jsonl"


@pytest.mark.parametrize("more", [[], ["--temperature", 0.9, "--seed", 7], ["--heads", "none"],
                                  ["--temperature", 0.7, "--acceptance", "typical"]], ids=str)
def test_each_text_is_what_its_prompt_gives_alone(more, tiny_folder, files, cli):
    seed = 7 if "--seed" in more else 0
    args = ["--model", tiny_folder, "--max-new-tokens", 40, *more]
    alone = [results(cli, *args, "--seed", seed + i, "--prompt", p)[0][0] for i, p in enumerate(PROMPTS)]
    for file, batch_size in zip((*files, files[0]), (1, 4, 30), strict=True):
        together, err = results(cli, *args, "--prompts-file", file, "--batch-size", batch_size)
        for a, b in zip(alone, together, strict=True):
            for key in ("prompt", "prompt_tokens", "text", "token_ids", "steps", "accepted", "tokens_per_step"):
                assert a[key] == b[key], key
        assert "9/9" in err                                                      # the progress bar
        tokens, steps = (sum(r[key] for r in together) for key in ("new_tokens", "steps"))
        assert f"{tokens:>5} tokens {steps:>5} steps {(tokens - 9) / steps:>6.2f} tokens/step" in err
    assert len({r["new_tokens"] for r in alone}) > 1


def test_they_come_in_order_and_not_only_at_the_end(tiny_folder, monkeypatch):
    """The first text is the longest: the others wait for it; the last ones come while others are at work."""
    args = generate.arguments(["--model", str(tiny_folder), "--batch-size", "3"])
    texts, asked = {0: 9, 1: 2, 2: 1, 3: 3, 4: 8, 5: 2}, []

    def made_up(decoder, encoded, max_new_tokens, seeds, batch_size):
        waiting, rows = list(texts), {}
        while waiting or rows:
            rows = {i: n - 1 for i, n in rows.items() if n > 1}
            while waiting and len(rows) < batch_size:
                i = waiting.pop(0)
                rows[i] = texts[i]
            asked.append(len(rows))
            yield {i: [5] for i in rows} if rows else {}
    monkeypatch.setattr(generate.batches, "generate", made_up)
    tokenizer = Tokenizer(tiny_folder, tiny_llama(vocab_size=300).config)
    came = []
    for result in generate.many(PlainDecoder(tiny_llama()), tokenizer, list("abcdef"), [[1]] * 6, {}, args):
        came.append((result.get("prompt"), result["new_tokens"], len(asked)))
    assert [c[:2] for c in came] == [*zip("abcdef", texts.values(), strict=True), (None, 25)]
    assert [c[2] for c in came] == sorted(c[2] for c in came) and came[0][2] == 10 and came[3][2] < len(asked)


def test_the_report_of_a_batch(tiny_folder, files, cli):
    status, out, err = cli("generate", "--model", tiny_folder, "--prompts-file", files[0], "--batch-size", 4,
                           "--max-new-tokens", 5, "--profile")
    assert status == 0 and all(f"{p}" in out for p in PROMPTS) and out.index("medusa ") > out.index("dog dog")
    init = next(line.split() for line in out.splitlines() if line.startswith("init "))
    assert int(init[1]) == 6                                                     # a batch of four, then five by one


def test_more_than_fits_a_line(tiny_folder, files, tmp_path, cli):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": "x"}\n')
    (tmp_path / "half.jsonl").write_text('"fine"\n{"prompt"\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("x y " * 40 + "\n" + "a b " * 40)
    for args, says in ((["--prompts-file", tmp_path / "no.txt"], "can't read"),
                       (["--prompts-file", tmp_path / "empty.txt"], "holds no prompt: write one a line"),
                       (["--prompts-file", tmp_path / "bad.jsonl"], 'line 2: expected a string or an object with a'),
                       (["--prompts-file", tmp_path / "half.jsonl"], "line 2 is not valid JSON"),
                       (["--prompts-file", tmp_path / "latin.txt"], "is not UTF-8 text"),
                       (["--prompts-file", tmp_path / "long.txt"], "the prompt has 82 tokens, the context holds 64"),
                       (["--prompts-file", files[0], "--batch-size", 0], "--batch-size: '0' is not a whole number"),
                       (["--prompts-file", files[0], "--compare"], "--prompts-file does not go with --compare: leave"),
                       (["--batch-size", 2], "--batch-size needs --prompts-file")):
        status, out, err = cli("generate", "--model", tiny_folder, *args)
        assert status == 2 and out == "" and err.count("\n") == 1 and says in err, err


@pytest.mark.parametrize("more", [[], ["--fast"], ["--samples", 2, "--temperature", 0.9], ["--stop", "e"]], ids=str)
def test_a_prompt_that_the_context_cannot_hold_is_skipped(more, tiny_folder, tmp_path, cli):
    """With a line in its place that says so; the other texts, their seeds too, are what they are."""
    prompts = ["x y " * 40, "dog", "", "the cat", "a b c d " * 20, "once"]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    args = ["--model", tiny_folder, "--max-new-tokens", 12, "--batch-size", 2, *more]
    found, _ = results(cli, *args, "--prompts-file", tmp_path / "p.jsonl")
    samples = 2 if "--samples" in more else 1
    assert [r["prompt"] for r in found] == [p for p in prompts for _ in range(samples)]
    assert [r["prompt"] for r in found if "error" in r] == [prompts[0]] * samples + [prompts[4]] * samples
    assert {r["error"] for r in found[:samples]} == {
        "the prompt has 161 tokens, the context holds 64: shorten the prompt"}
    assert all(r["prompt_tokens"] == 161 and not r.keys() & {"text", "token_ids", "finish_reason"}
               for r in found[:samples])
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(p[:30]) for p in prompts))
    without, _ = results(cli, *args, "--prompts-file", tmp_path / "q.jsonl")
    assert [(r["text"], r["token_ids"]) for r, old in zip(without, found, strict=True) if "error" not in old] == [
        (r["text"], r["token_ids"]) for r in found if "error" not in r]
    status, out, _ = cli("generate", *args, "--prompts-file", tmp_path / "p.jsonl")
    line = "\n[the prompt has 161 tokens, the context holds 64: shorten the prompt]\n"
    assert status == 0 and out.startswith(prompts[0] + line) and out.count(line) == samples


def test_messages_that_the_template_refuses_are_skipped(tiny_folder, tmp_path, cli):
    """As a prompt that is too long is; only where no prompt can be continued the run ends with the error."""
    refusing = """{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{- m.content }}{% endfor %}"""
    (tiny_folder / "chat_template.jinja").write_text(refusing)
    tool, dog, long = ({"messages": [{"role": role, "content": text}]} for role, text in (
        ("tool", "4"), ("user", "dog"), ("user", "x y " * 40)))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, (tool, dog, long, tool, dog))))
    args = ["--model", tiny_folder, "--max-new-tokens", 9, "--seed", 4, "--temperature", 0.9, "--prompts-file"]
    found, _ = results(cli, *args, tmp_path / "p.jsonl", "--batch-size", 2)
    refused = "the chat template of tiny can't be used here: no tools here"
    assert [(r["prompt_tokens"], r.get("error")) for r in found] == [
        (0, refused), (3, None), (160, "the prompt has 160 tokens, the context holds 64: shorten the prompt"),
        (0, refused), (3, None)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [dog] * 5)))
    without, _ = results(cli, *args, tmp_path / "q.jsonl")
    assert [found[i]["token_ids"] for i in (1, 4)] == [without[i]["token_ids"] for i in (1, 4)]      # seeds as well
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, [tool, tool])))
    status, out, err = cli("generate", *args, tmp_path / "r.jsonl")
    assert (status, out, err) == (2, "", f"generate.py: {refused}\n")


def test_every_write_is_a_whole_line(tiny_folder, files, cli, monkeypatch):
    """So that whoever reads along never meets half a line, even if the run is stopped."""
    writes, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: writes.append(text) or write(text))
    results(cli, "--model", tiny_folder, "--prompts-file", files[0], "--batch-size", 2, "--max-new-tokens", 4)
    assert len(writes) > len(PROMPTS) and all(text[-1:] in ("", "\n") for text in writes)


@pytest.mark.parametrize("name, content", [("b.txt", "dog\ncat\n"), ("b.jsonl", '"dog"\n{"prompt": "cat"}\n')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name, content, tiny_folder, tmp_path, cli):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    found, _ = results(cli, "--model", tiny_folder, "--prompts-file", tmp_path / name, "--max-new-tokens", 2)
    assert [r["prompt"] for r in found] == ["dog", "cat"]


def test_a_chat_models_prompts_are_questions(tiny_folder, files, cli):
    together, _ = results(cli, "--model", tiny_folder, "--template", "vicuna", "--system", "", "--batch-size", 4,
                          "--prompts-file", files[0], "--max-new-tokens", 4)
    alone, _ = results(cli, "--model", tiny_folder, "--prompt", "USER: once ASSISTANT:", "--max-new-tokens", 4)
    assert together[4]["text"] == alone[0]["text"] and together[4]["prompt"] == "once"


def test_limits_of_the_rows():
    model = tiny_llama()
    with pytest.raises(UserError, match="prompt 3 has 96 tokens"):
        check_prompts([[1], [1], [1] * 96], model.config)
    check_prompts([[1], [1], [1] * 95], model.config)
