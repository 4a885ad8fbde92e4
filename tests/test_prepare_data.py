"""prepare_data.py: texts and conversations become token files; self-distilled text is the model's own."""
import io
import json
import signal
import subprocess
import sys
from collections import Counter

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, TESTS, byte_tokenizer, tiny_heads, tiny_llama
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import prepare_data
from llama import LlamaConfig
from loading.documents import Partial, beside, read_tokens, texts, write_tokens
from loading.files import write_json
from loading.templates import SYSTEM, Vicuna, load_template
from loading.tokenizer import Tokenizer
from loading.trees import published_tree
from prepare_data import answered_anew, continuations, continued, opening, rendered, tokenised, usable
from tinymedusa import Decoder, PlainDecoder, Sampling, Tree
from variants import batches

SAMPLE = TESTS / "sharegpt.json"        # of our own writing


def messages(*rounds):
    """Of rounds (question, answer)."""
    return [{"role": role, "content": text} for pair in rounds
            for role, text in zip(("user", "assistant"), pair, strict=True)]


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer(tmp_path / "tokenizer.json")
    return Tokenizer(tmp_path, LlamaConfig(vocab_size=300))


def test_text_to_tokens_and_back(tmp_path, tokenizer):
    stories = ["A dog.\nIt was happy.\n\nThe end.", "Once upon a time", "é ü 你好"]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(["", *stories, "  \n "]), encoding="utf-8")
    found = texts(tmp_path / "s.txt", "<|endoftext|>")
    facts = write_tokens(tmp_path / "s.bin", tokenised(found, tokenizer), tokenizer, 300, {"text": "s"})
    documents = read_tokens(tmp_path / "s.bin", tokenizer)
    assert [tokenizer.decode(d.ids) for d in documents] == stories
    assert all(d.ids[0] == 1 and d.ids[-1] == 2 and 1 not in d.ids[1:] for d in documents)
    assert all(d.loss.tolist() == [False] + [True] * (len(d) - 1) for d in documents)
    assert facts == json.loads((tmp_path / "s.bin.json").read_text()) and facts["dtype"] == "uint16"
    assert facts["documents"] == 3 and facts["tokens"] == sum(map(len, documents)) and facts["source"] == {"text": "s"}


def test_texts_are_encoded_in_batches_of_like_size(monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH", 50)
    assert list(prepare_data.of_like_size([30 * "a", 30 * "b", 60 * "c", "d", "e"])) == [
        [30 * "a", 30 * "b"], [60 * "c"], ["d", "e"]]


def test_special_tokens_in_a_text_are_text(tmp_path, tokenizer, cli, tiny_folder):
    """HTML's <s> must not begin a document, nor </s> end one."""
    (tmp_path / "s.txt").write_text("a <s> b </s> c\n<|endoftext|>\nd")
    cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.txt", "--out", tmp_path / "s.bin")
    documents = read_tokens(tmp_path / "s.bin", Tokenizer(tiny_folder, LlamaConfig(vocab_size=300)))
    assert [tokenizer.decode(d.ids) for d in documents] == ["a <s> b </s> c", "d"]


# --------------------------------------------------------------------------------------------------- conversations

def test_the_template_and_its_loss(tokenizer):
    """vicuna_v1.1 to the letter, and loss on the answers with their leading space and eos, on nothing else."""
    document, = rendered(iter([(messages(["What is 2 squared?", "Four."], ["And of four?", "Sixteen <s>."]), None)]),
                         Vicuna(tokenizer))
    ids, loss = document.ids, document.loss
    system = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
              "detailed, and polite answers to the user's questions.")
    assert tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False) == (
        f"<s>{system} USER: What is 2 squared? ASSISTANT: Four.</s>USER: And of four? ASSISTANT: Sixteen <s>.</s>")
    parts = np.split(ids, np.flatnonzero(np.diff(loss.astype(int))) + 1)
    assert [tokenizer.backend.decode(p.tolist(), skip_special_tokens=False) for p in parts] == [
        f"<s>{system} USER: What is 2 squared? ASSISTANT:", " Four.</s>", "USER: And of four? ASSISTANT:",
        " Sixteen <s>.</s>"]
    assert not loss[0] and loss[-1] and ids[0] == 1 and ids[-1] == 2


CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture
def templated(tiny_folder):
    """templated(template): the tiny model with a chat template and its special tokens; its tokenizer."""
    def build(template):
        backend = byte_tokenizer(tiny_folder / "tokenizer.json")
        backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
        backend.save(str(tiny_folder / "tokenizer.json"))
        settings = {"chat_template": template, "tokenizer_class": "Tokenizer"}
        write_json(tiny_folder / "tokenizer_config.json", settings)
        tiny_llama(8, torch.float32, vocab_size=304, max_position_embeddings=400).save(tiny_folder)
        return Tokenizer(tiny_folder, LlamaConfig.from_pretrained(tiny_folder))
    return build


def pieces(document, tokenizer):
    """[(text, whether it carries loss)] of a document."""
    parts = np.split(document.ids, np.flatnonzero(np.diff(document.loss.astype(int))) + 1)
    texts = [tokenizer.backend.decode(p.tolist(), skip_special_tokens=False) for p in parts]
    return list(zip(texts, [bool(document.loss[0]) ^ (i % 2 == 1) for i in range(len(texts))], strict=True))


def test_conversations_in_the_models_own_template(templated, tmp_path, tiny_folder, cli):
    """Loss on the answers and their end of a turn; the whole is what the template renders; what is left out is told."""
    tokenizer = templated(CHATML)
    talk = [{"role": "system", "content": "Be brief."}, *messages(["a <|end|>", "b </s>"], ["c", "d"])]
    odd = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (talk, talk[1:] + odd, odd)))
    status, out, err = cli("prepare_data", "--model", tiny_folder, "--sharegpt", tmp_path / "m.jsonl", "--out",
                           tmp_path / "m.bin")
    first, second = read_tokens(tmp_path / "m.bin", tokenizer)
    rest = [("b </s><|end|>", True), ("\n<|user|>c<|end|>\n<|assistant|>", False), ("d<|end|>", True)]
    assert pieces(first, tokenizer) == [
        ("<|system|>Be brief.<|end|>\n<|user|>a <|end|><|end|>\n<|assistant|>", False), *rest]
    assert pieces(second, tokenizer) == [("<|user|>a <|end|><|end|>\n<|assistant|>", False), *rest]
    whole = load_template(tiny_folder, tokenizer).ids(talk, answer=False)
    assert first.ids.tolist() == whole[:-1] and tokenizer.decode(whole[-1:]) == "\n"
    assert first.ids.tolist().count(300) == 5 and 2 not in first.ids             # a message's own <|end|> is text
    assert "4 turns are left out: 2 out of turn or empty, 2 of the role 'tool'\n" in err and status == 0


def test_a_template_that_rewrites_earlier_turns_gives_several_documents(templated, tiny_folder):
    """Each answer is learned once, behind the prompt that the model gets for it."""
    tokenizer = templated(CHATML.replace("m.content", "(m.content if loop.last or m.role == 'user' else '..')"))
    template = load_template(tiny_folder, tokenizer)
    talk = messages("ab", "cd", "ef")
    found = [pieces(d, tokenizer) for d in rendered([(talk, template.ids(talk, answer=False))], template)]
    heads = ["<|user|>a<|end|>\n<|assistant|>", "..<|end|>\n<|user|>c<|end|>\n<|assistant|>",
             "..<|end|>\n<|user|>e<|end|>\n<|assistant|>"]
    assert found == [[("".join(heads[:i + 1]), False), (f"{'bdf'[i]}<|end|>", True)] for i in range(3)]


def test_a_conversation_that_the_template_refuses_is_left_out(templated, tmp_path, tiny_folder, cli):
    tokenizer = templated("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
    talks = [[{"role": "system", "content": "S"}, *messages("ab")], messages("cd")]
    (tmp_path / "m.json").write_text(json.dumps(talks))
    for more in ([], ["--distill", "--max-new-tokens", 5]):
        status, out, err = cli("prepare_data", "--model", tiny_folder, "--sharegpt", tmp_path / "m.json", "--out",
                               tmp_path / "m.bin", *more)
        document, = read_tokens(tmp_path / "m.bin", tokenizer)
        assert status == 0 and pieces(document, tokenizer)[0] == ("<|user|>c<|end|>\n<|assistant|>", False)
        assert "3 turns are left out: 3 in conversations where the chat template of tiny " \
            "can't be used here: no system" in err


def test_a_conversation_is_rendered_once_as_a_whole(templated, tiny_folder):
    """To see whether the template takes it; its last answer is learned from the same ids."""
    template = load_template(tiny_folder, templated(CHATML))
    asked, ids = [], template.ids
    template.ids = lambda messages, answer=True: asked.append((len(messages), answer)) or ids(messages, answer)
    talks = [messages("ab", "cd"), messages("ef")]
    documents = list(rendered(usable(talks, template, Counter()), template))
    assert asked == [(4, False), (1, True), (2, False), (3, True), (2, False), (1, True)]
    assert [d.ids.tolist() for d in documents] == [ids(talk, answer=False)[:-1] for talk in talks]


@pytest.mark.parametrize("rewrites", [False, True])
def test_conversations_answered_anew_in_the_models_template(rewrites, templated, tiny_folder):
    """The next prompt is what the template makes of the answers so far: behind them where it begins with them, as it
    does if they encode as they were written, else a document of its own. Without an end of a turn none follows."""
    content = "(m.content if loop.last or m.role == 'user' else '..')" if rewrites else "m.content"
    tokenizer = templated(CHATML.replace("m.content", content))
    template, progress, asked = load_template(tiny_folder, tokenizer), bar(3), []
    assert tokenizer.eos == [2, 300]
    talks = {0: messages("ab", "cd", "ef"), 1: messages("ab", "cd"), 2: messages("ab", "cd")}
    encode = lambda text: tokenizer.backend.encode(text, add_special_tokens=False).ids

    def answers(turn, prompts):
        asked.append(prompts)
        return [(key, encode(f"w{key}{turn}") + [300] * (key != 2)) for key in prompts]
    found = [pieces(d, tokenizer) for d in answered_anew(talks, template, answers, 400, progress)]
    assert progress.n == 3 and [list(prompts) for prompts in asked] == [[0, 1, 2], [0, 1], [0]]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "w10"}, {"role": "user", "content": "c"}]
    assert asked[1][1] == template.ids(talk)
    first, answer = "<|user|>a<|end|>\n<|assistant|>", ("w10<|end|>", True)
    then = "\n<|user|>c<|end|>\n<|assistant|>"
    expected = [[(first, False), answer, (then, False), ("w11<|end|>", True)]]
    if rewrites:
        expected = [[(first, False), answer], [(f"{first}..<|end|>{then}", False), ("w11<|end|>", True)]]
    assert found[3 if rewrites else 1:-1] == expected and found[-1] == [(first, False), ("w20", True)]


def test_openings_of_messages(templated, tmp_path, tiny_folder, cli, monkeypatch):
    """The model answers them in its template, to the end of a turn; a text of the file it goes on with, special tokens'
    names as text."""
    ends, generate = [], batches.generate
    monkeypatch.setattr(batches, "generate", lambda decoder, *more: (
        ends.append(decoder.eos.tolist()), generate(decoder, *more))[1])
    tokenizer = templated(CHATML)
    lines = [{"messages": messages("ab")[:1]}, {"prompt": "the <|user|> dog"}]
    (tmp_path / "o.JSONL").write_text("\n".join(map(json.dumps, lines)))
    status, _, err = cli("prepare_data", "--model", tiny_folder, "--openings", tmp_path / "o.JSONL", "--out",
                         tmp_path / "o.bin", "--max-new-tokens", 7)
    first, second = read_tokens(tmp_path / "o.bin", tokenizer)
    assert status == 0 and pieces(first, tokenizer)[0] == ("<|user|>a<|end|>\n<|assistant|>", False)
    start = pieces(second, tokenizer)[0]
    assert start == ("<s>the <|user|> dog", False) and 301 in first.ids and 301 not in second.ids
    assert ends == [[2, 300]]


def test_the_originals_own_set(tiny_folder, tmp_path, cli):
    """The first five words are the human turn, the whole story the answer, five words and all."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "TinyStoriesV2-GPT4-train.txt").write_text(
        "Once upon a time there was a dog.\n<|endoftext|>\nThe end\n<|endoftext|>\nNot this one")
    (tmp_path / "hub" / "TinyStoriesV2-GPT4-valid.txt").write_text("A held out one")
    run = lambda *more: cli("prepare_data", "--model", tiny_folder, "--tinystories", tmp_path / "hub", "--out",
                            tmp_path / "o.bin", *more)
    assert run("--limit", 2, "--first-words", 5)[0] == 0
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))
    decoded = [tokenizer.decode(d.ids) for d in read_tokens(tmp_path / "o.bin", tokenizer)]
    assert [d.partition("USER: ")[2] for d in decoded] == [
        "Once upon a time there ASSISTANT: Once upon a time there was a dog.", "The end ASSISTANT: The end"]
    assert run("--split", "validation")[0] == 0
    assert [tokenizer.decode(d.ids) for d in read_tokens(tmp_path / "o.bin", tokenizer)] == ["A held out one"]


@pytest.mark.parametrize("name, text, says", [
    ("a.jsonl", '{"text": "fine"}\n{"txt": "x"}\n', 'line 2: expected an object with a "text"'),
    ("a.jsonl", '{"text": "fine"}\n{"text": \n', "line 2 is not valid JSON"),
    ("a.json", "[1]", "item 0: expected {"),
    ("a.json", '{"conversations": [{"from": "human"}]}', "as in ShareGPT"),
    ("a.json", "[", "is not valid JSON"),
    ("a.json", "[]", "holds no text"),
])
def test_bad_sources_are_named(name, text, says, tiny_folder, tmp_path, cli):
    (tmp_path / name).write_text(text)
    option = "--text" if name.endswith("l") else "--sharegpt"
    status, out, err = cli("prepare_data", "--model", tiny_folder, option, tmp_path / name, "--out", tmp_path / "a.bin")
    assert status == 2 and says in err and "Traceback" not in err and not out and not list(tmp_path.glob("*a.bin*"))


def test_splits_and_limits(tiny_folder, tmp_path, cli):
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"text": f"story {i}"}) for i in range(120)))
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))

    def numbers(*more):
        assert cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.jsonl", "--out", tmp_path / "s.bin",
                   *more)[0] == 0
        return [int(tokenizer.decode(d.ids).split()[1]) for d in read_tokens(tmp_path / "s.bin", tokenizer)]
    assert numbers("--split", "validation") == [0, 50, 100] and numbers("--limit", 3) == [0, 1, 2]
    train = numbers("--split", "train")
    assert len(train) == 117 and not {0, 50, 100} & set(train)


# ------------------------------------------------------------------------------------------------ self-distillation

def writer(model, temperature, heads=None, limit=30):
    """(turn, prompts) → the answers, two rows at a time."""
    decoder = PlainDecoder(model, Sampling(temperature))
    if heads is not None:
        decoder = Decoder(model, heads, Tree.from_paths(published_tree(len(heads))), Sampling(temperature))
    return lambda turn, prompts: continued(prompts, lambda p, seeds: batches.generate(decoder, p, limit, seeds, 2))


def bar(total):
    return tqdm(total=total, file=io.StringIO())


def written_alone(model, ids, temperature, seed, limit=30):
    steps = PlainDecoder(model, Sampling(temperature)).generate([ids], limit, [seed])
    return [t for step in steps for t in step[0]]


def with_loss(document):
    return list(zip(document.ids.tolist(), document.loss.tolist(), strict=True))


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("medusa", [False, True])
def test_self_distilled_text_is_what_each_opening_gives_alone(temperature, medusa):
    model = tiny_llama()
    openings = {5: [1, 4], 6: [1, 7, 8, 3, 5], 7: [1, 9, 9], 8: [1, 3, 3, 3], 19: [1, 6]}
    answers, progress = writer(model, temperature, tiny_heads(model) if medusa else None), bar(5)
    documents = list(continuations(openings, answers, progress))
    alone = []
    for seed, o in openings.items():
        new = written_alone(model, o, temperature, seed)
        alone.append([(t, False) for t in o] + [(t, True) for t in new])         # what the model wrote carries loss
    assert list(map(with_loss, documents)) == alone and progress.n == 5          # in the openings' order


def test_conversations_answered_anew(tokenizer):
    """Slow definition: one conversation at a time, each question behind the model's own earlier answers."""
    model = tiny_llama(8, vocab_size=300, max_position_embeddings=700)
    talks = {3: [["hi", "x"], ["and now?", "y"]], 4: [["a longer question", "z"]],
             9: [["q", "x"], ["r", "x"], ["s", "x"]]}
    progress = bar(3)
    documents = list(answered_anew({key: messages(*rounds) for key, rounds in talks.items()}, Vicuna(tokenizer),
                                   writer(model, 1.0, limit=200), 700, progress))
    expected = []
    for seed, rounds in talks.items():
        ids, loss = [1], [False]
        for i, (ask, _) in enumerate(rounds):
            text = (SYSTEM + " " if i == 0 else "") + f"USER: {ask} ASSISTANT:"
            asked = tokenizer.backend.encode(text, add_special_tokens=False).ids
            if len(ids) + len(asked) >= 700:
                break
            new = written_alone(model, ids + asked, 1.0, seed, 200)
            ids, loss = ids + asked + new, loss + [False] * len(asked) + [True] * len(new)
            if new[-1] != 2:
                break
        expected.append(list(zip(ids, loss, strict=True)))
    assert list(map(with_loss, documents)) == expected and len(set(map(len, expected))) == 3
    assert sum(d.count((2, True)) for d in expected) >= 3                             # several answers ended with eos
    assert progress.n == 3                                                       # each once, however it ended


def test_questions_without_room(tokenizer):
    """A conversation ends before one, or is none; the bar counts it all the same."""
    talks = {0: messages("ax", ["b" * 900, "x"]), 1: messages(["c" * 900, "x"]), 2: messages("dx", "ex")}
    progress, answers = bar(3), lambda turn, prompts: ((key, [5, 2]) for key in reversed(prompts))
    documents = list(answered_anew(talks, Vicuna(tokenizer), answers, 600, progress))
    assert [(d.ids == 5).sum() for d in documents] == [1, 2] and progress.n == 3


def test_openings_are_first_sentences():
    assert opening('"Hi!" said Tom. He ran.', 1) == '"Hi!"' and opening("One. Two.", 1) == "One."
    assert opening("no end here\nsecond line.", 1) == "no end here" and opening("x" * 300, 1) == "x" * 200
    assert opening("It cost 3.50 in all. Yes.", 1) == "It cost 3.50 in all."
    assert opening("One. Two! Three.", 2) == "One. Two!" and opening("One.\n\nTwo.", 2) == "One."


def test_the_commands(tiny_folder, tmp_path, cli):
    (tmp_path / "openings.txt").write_text("the dog\n\nonce upon\nthe dog\na time\n")
    (tmp_path / "stories.txt").write_text("the dog was happy. yes\n<|endoftext|>\nthe end\n<|endoftext|>\nmore\n")
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))

    def run(*more):
        status, out, err = cli("prepare_data", "--model", tiny_folder, "--out", tmp_path / "d" / "o.bin", *more)
        assert status == 0, err
        return out, err, [tokenizer.decode(d.ids) for d in read_tokens(tmp_path / "d" / "o.bin", tokenizer)]
    out, err, written = run("--openings", tmp_path / "openings.txt", "--max-new-tokens", 9, "--temperature", 1)
    assert "3 documents" in out and "100%" in err                                # the doubled opening counts once
    assert all(d.startswith(("the dog", "once upon", "a time")) for d in written)
    assert run("--text", tmp_path / "stories.txt", "--limit", 2)[2] == ["the dog was happy. yes", "the end"]
    written = run("--text", tmp_path / "stories.txt", "--distill", "--max-new-tokens", 5)[2]
    assert len(written) == 3 and sum(d.startswith("the dog was happy.") for d in written) == 1
    facts = json.loads((tmp_path / "d" / "o.bin.json").read_text())
    assert facts["source"]["text"] == "stories.txt" and facts["source"]["distill"] and str(tmp_path) not in str(facts)
    model = tiny_llama(vocab_size=300, max_position_embeddings=512, dtype=torch.float32)
    model.save(tiny_folder)
    written = run("--sharegpt", SAMPLE, "--distill", "--max-new-tokens", 9)[2]
    assert len(written) == 4 and all("USER: " in d for d in written)


def test_several_processes_share_the_openings(tiny_folder, tmp_path, cli, monkeypatch):
    """Each has the very documents that one process alone would have written for its openings."""
    (tmp_path / "o.txt").write_text("".join(f"the dog {i}\n" for i in range(7)))
    tokenizer = Tokenizer(tiny_folder, LlamaConfig(vocab_size=300))
    run = lambda out: cli("prepare_data", "--model", tiny_folder, "--openings", tmp_path / "o.txt", "--out",
                          tmp_path / out, "--max-new-tokens", 12, "--temperature", 1, "--batch-size", 1)
    read = lambda name: list(map(with_loss, read_tokens(tmp_path / name, tokenizer)))
    assert run("alone.bin")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run("o.bin")[0] == 0
    first, second = read("o-00000-of-00002.bin"), read("o-00001-of-00002.bin")
    assert len(first) == 4 and len(second) == 3 and sorted(first + second) == sorted(read("alone.bin"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         str(ROOT / "prepare_data.py"), "--model", tiny_folder, "--text", tmp_path / "o.txt", "--separator", "-",
         "--out", tmp_path / "t.bin"], capture_output=True, text=True)
    assert done.returncode != 0 and "holds no text" in done.stderr               # one text for two processes


# ------------------------------------------------------------------------------------------------- stopped, and again

@pytest.fixture
def distill(tiny_folder, tmp_path, cli):
    """distill("a.bin", "--option", ..) → status, stderr; of 40 openings or, with --sharegpt, conversations."""
    (tmp_path / "o.txt").write_text("\n".join(f"the dog {i}" for i in range(40)))
    talks = [[f"{'x' * (i % 3)} {i}", "then"] for i in range(12)]
    turns = lambda talk: [{"from": who, "value": text} for ask in talk for who, text in (("human", ask), ("gpt", "y"))]
    (tmp_path / "talks.json").write_text(json.dumps([{"conversations": turns(talk)} for talk in talks]))

    def run(out, *more):
        source = [] if "--sharegpt" in more else ["--openings", tmp_path / "o.txt"]
        status, _, err = cli("prepare_data", "--model", tiny_folder, *source, "--out", tmp_path / out, "--threads", 1,
                             "--temperature", 1, "--max-new-tokens", 50, "--batch-size", 3, *more)
        return status, err
    return run


def chat(tiny_folder, tmp_path):
    """The options that answer conversations, and a model with room for them."""
    tiny_llama(8, torch.float32, vocab_size=300, max_position_embeddings=400).save(tiny_folder)
    return ["--sharegpt", tmp_path / "talks.json", "--distill", "--max-new-tokens", 120]


def written(path):
    return [file.read_bytes() for file in beside(path)]


@pytest.fixture
def asked(monkeypatch):
    """How many prompts each call of batches.generate was given."""
    counts, generate = [], batches.generate
    monkeypatch.setattr(batches, "generate", lambda decoder, prompts, *more: (
        counts.append(len(prompts)), generate(decoder, prompts, *more))[1])
    return counts


def interrupted_at(monkeypatch, number, error):
    """Partial.add raises before the text of that number is written."""
    add, texts = Partial.add, []

    def adding(self, *text):
        texts.append(text)
        if len(texts) == number:
            raise error
        add(self, *text)
    monkeypatch.setattr(Partial, "add", adding)


def test_a_run_stopped_by_sigterm_goes_on(distill, tiny_folder, tmp_path, asked):
    """A process of its own, stopped in the middle: nothing passes for a token file, and then the very same files."""
    assert distill("whole.bin")[0] == 0 and not list(tmp_path.glob("*.partial"))
    partial = tmp_path / "a.bin.partial"

    def stop(process):
        while not partial.exists() or partial.read_bytes().count(b"\n") < 5:
            assert not process.ended(0.002)
        process.send_signal(signal.SIGTERM)
    done = forked.run(
        ROOT / "prepare_data.py", "--model", tiny_folder, "--openings", "o.txt", "--out", "a.bin", "--threads", 1,
        "--temperature", 1, "--max-new-tokens", 50, "--batch-size", 3, cwd=tmp_path, meanwhile=stop)
    err, kept = done.stderr, partial.read_bytes().count(b"\n")
    assert done.returncode == 143 and 5 <= kept < 40
    assert err.endswith("texts: the same command goes on after them\nstopped\n"), err
    assert int(err.split("a.bin.partial keeps ")[1].split()[0]) in (kept - 1, kept)      # one may just be written
    assert [p.name for p in tmp_path.glob("*a.bin*")] == ["a.bin.partial"]
    partial.write_bytes(partial.read_bytes() + b"\n[0, 39, [7, 7")               # as kill -9 might leave it
    asked.clear()
    assert distill("a.bin")[0] == 0 and asked == [40 - kept]
    assert written(tmp_path / "a.bin") == written(tmp_path / "whole.bin") and not partial.exists()


@pytest.mark.parametrize("source", ["openings", "conversations"])
def test_it_goes_on_after_any_number_of_stops(source, distill, tiny_folder, tmp_path, asked, monkeypatch):
    """Conversations too, answer by answer, in another batch and by heads."""
    more = chat(tiny_folder, tmp_path) if source == "conversations" else []
    assert distill("whole.bin", *more)[0] == 0
    answers, steps = sum(asked), 0
    assert len(asked) == (2 if more else 1) and (not more or 12 < answers < 24)
    for number in (4, 1, answers // 2):
        with monkeypatch.context() as patch:
            interrupted_at(patch, number, KeyboardInterrupt())
            status, err = distill("a.bin", *more)
        steps += number - 1
        assert status == 130 and f"a.bin.partial keeps {steps} texts: the same command goes on" in err
    asked.clear()
    assert distill("a.bin", *more, "--batch-size", 5, "--heads", tiny_folder / "medusa")[0] == 0
    assert sum(asked) == answers - steps
    assert written(tmp_path / "a.bin") == written(tmp_path / "whole.bin")


def test_each_process_goes_on_after_its_own(distill, tmp_path, asked, monkeypatch):
    assert distill("whole.bin")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, number in ("0", 7), ("1", 11):
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch:
            interrupted_at(patch, number, SystemExit(143))
            assert distill("a.bin")[0] == 143
    asked.clear()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert distill("a.bin")[0] == 0
    assert asked == [20 - 6, 20 - 10] and not list(tmp_path.glob("*.partial"))
    ids = [np.fromfile(tmp_path / f"{name}.bin", "uint16").tolist()
           for name in ("whole", "a-00000-of-00002", "a-00001-of-00002")]
    assert sorted(ids[0]) == sorted(ids[1] + ids[2])


@pytest.mark.parametrize("other", ["option", "source", "model", "a weight", "a field", "tokenizer"])
def test_a_partial_file_of_another_run_is_not_mixed_in(other, distill, tiny_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_at(patch, 4, KeyboardInterrupt())
        assert distill("a.bin")[0] == 130
    before = (tmp_path / "a.bin.partial").read_bytes()
    if other == "source":
        (tmp_path / "o.txt").write_text("\n".join(f"the cat {i}" for i in range(40)))
    elif other == "model":
        tiny_llama(1, torch.float32, vocab_size=300, max_position_embeddings=64).save(tiny_folder)
    elif other == "a weight":                                                    # the very last one, of all
        tensors = load_file(tiny_folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1
        save_file(tensors, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    elif other == "a field":
        config = json.loads((tiny_folder / "config.json").read_text())
        (tiny_folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    elif other == "tokenizer":
        (tiny_folder / "tokenizer.json").write_text((tiny_folder / "tokenizer.json").read_text() + " ")
    status, err = distill("a.bin", *(["--temperature", 0.9] if other == "option" else []))
    line = err.splitlines()[-1]
    assert status == 2 and line.startswith("prepare_data.py: ") and line.endswith(
        "a.bin.partial is left from a stopped run with other options, files or another model: run that command again, "
        "or delete it")
    assert (tmp_path / "a.bin.partial").read_bytes() == before and not (tmp_path / "a.bin").exists()


# ----------------------------------------------------------------------------------------------------- what it says

def test_the_bar_moves_with_each_document(distill, tiny_folder, tmp_path, monkeypatch):
    """Its total is the documents; it moves while others are written; at the end it is full, for conversations too."""
    bars, steps, finished = [], [], batches.finished

    class Bar(tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self.at = []
            bars.append(self)

        def update(self, n=1):
            self.at += [len(steps)] * int(n)
            return super().update(n)
    monkeypatch.setattr(prepare_data, "tqdm", Bar)
    monkeypatch.setattr(batches, "finished", lambda found: finished(steps.append(0) or step for step in found))
    assert distill("a.bin")[0] == 0
    assert (bars[0].total, bars[0].n, bars[0].desc) == (40, 40, "preparing") and bars[0].miniters == 1
    assert len(set(bars[0].at)) > 20 and max(np.diff([0, *bars[0].at])) <= 51     # never longer than a text takes
    with monkeypatch.context() as patch:
        interrupted_at(patch, 30, KeyboardInterrupt())
        assert distill("b.bin")[0] == 130 and bars[1].n == 29
    assert distill("b.bin")[0] == 0 and (bars[2].total, bars[2].n) == (40, 40)
    assert distill("c.bin", *chat(tiny_folder, tmp_path))[0] == 0 and (bars[3].total, bars[3].n) == (12, 12)


def test_texts_that_loop_are_told(distill, tiny_folder, capfd):
    tiny_llama(0, torch.float32, std=0.1, vocab_size=300, max_position_embeddings=64).save(tiny_folder)
    says = "texts repeat the same 12 tokens three times or more, which heads would learn: try --temperature 0.8"
    status, err = distill("a.bin", "--temperature", 0)
    count, line = err.splitlines()[-1].split(" ", 1)
    assert status == 0 and line == f"of 40 {says}" and 2 < int(count) < 40
    status, err = distill("b.bin")
    assert status == 0 and "repeat" not in err
    once, twice, thrice = (np.arange(12).tolist() * n + [50] for n in (1, 2, 3))
    assert [prepare_data.repeats_itself(ids) for ids in (once, twice, thrice, [])] == [False, False, True, False]
    assert not prepare_data.repeats_itself([i for n in range(9) for i in (*range(11), 90 + n)])      # 11 in a row
    texts = lambda many: [np.array(thrice)] * many + [np.array(once)] * (40 - many)
    prepare_data.warn_of_loops(texts(2), 0)                                      # 5 %: stories happen to
    assert capfd.readouterr().err == ""
    prepare_data.warn_of_loops(texts(3), 0.9)
    assert capfd.readouterr().err == f"3 of 40 {says[:-3]}1.1\n"


def test_dtype_and_threads_reach_the_model(distill, tmp_path, monkeypatch, tiny_folder, cli):
    seen, generate = [], batches.generate

    def spy(decoder, *args):
        seen.append((decoder.model.norm.weight.dtype, torch.get_num_threads()))
        return generate(decoder, *args)
    monkeypatch.setattr(batches, "generate", spy)
    more = ["--limit", 2, "--max-new-tokens", 3]
    assert distill("a.bin", *more, "--dtype", "bfloat16", "--threads", 2)[0] == 0
    assert distill("b.bin", *more, "--threads", 3)[0] == 0
    assert seen == [(torch.bfloat16, 2), (torch.float32, 3)]
    facts = [json.loads((tmp_path / f"{name}.bin.json").read_text())["source"] for name in "ab"]
    assert facts[0]["dtype"] == "bfloat16" and "dtype" not in facts[1] and "threads" not in facts[0]
    for args, says in ((["--openings", "o.txt", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
                       (["--openings", "o.txt", "--threads", "none"], "--threads: 'none' is not a whole number"),
                       (["--text", "o.txt", "--dtype", "bfloat16"], "--fast are for text that the model writes")):
        status, _, err = cli("prepare_data", "--model", tiny_folder, "--out", tmp_path / "c.bin", *args)
        assert status == 2 and err.count("\n") == 1 and says in err
