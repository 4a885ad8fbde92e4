"""generate.py --interactive through a pseudo-terminal, as people meet it; and what it keeps in the cache."""
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import stat
import struct
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import forked
import pytest
import torch
from conftest import MODEL, ROOT, byte_tokenizer, save_heads, tiny_heads, tiny_llama

import generate
from extras.chat import Chat, keep_prefix
from extras.report import COLOURS
from llama import Llama, new_cache
from loading.files import UserError, write_json
from loading.templates import VICUNA, Plain, Vicuna, template_of
from loading.tokenizer import Tokenizer
from tinymedusa import Decoder, PlainDecoder, Tree
from variants.heads import load_heads

PLAIN, CHAT = "> ", "USER: "


class Terminal:
    """A process on a pseudo-terminal: `say` a line, read on to a text."""

    def __init__(self, *args, env=None):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 1000, 0, 0))       # no line is broken
        self.process = forked.Process(
            ROOT / "generate.py", "--interactive", "--threads", "1", *args, streams=[slave] * 3, terminal=True,
            env=os.environ | {"TERM": "dumb", "NO_COLOR": ""} | (env or {}))
        os.close(slave)

    def until(self, text: str, seconds=120, last=True) -> str:
        """What is printed up to this text, behind which it waits for input; or up to its first sight."""
        read, end = "", time.monotonic() + seconds
        while not (read.endswith(text) and self.waits() if last else text in read):
            if not select.select([self.master], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"no {text!r} in {read!r}")
            try:
                data = os.read(self.master, 4096)
            except OSError:                                                      # the process has ended
                data = b""
            if not data and read.endswith(text):
                break
            if not data:
                raise AssertionError(f"ended before {text!r}: {read!r}")
            read += data.decode(errors="replace").replace("\r\n", "\n")
        return read.removesuffix(text)

    def waits(self) -> bool:
        """Nothing comes, and it sleeps; or nothing comes for a while."""
        for _ in range(15):
            comes = select.select([self.master], [], [], 0.02)[0]
            with suppress(FileNotFoundError):                                    # ended meanwhile
                asleep = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
                comes = comes or asleep and select.select([self.master], [], [], 0.02)[0]
                if comes or asleep:
                    return not comes
        return True

    def say(self, line: str, until: str) -> str:
        """What is printed between the line (echoed) and `until`."""
        os.write(self.master, f"{line}\n".encode())
        return self.until(until).partition(f"{line}\n")[2]

    def leave(self, line="!!exit") -> str:
        os.write(self.master, f"{line}\n".encode())
        rest = self.until("exit...\n")
        assert self.process.wait(20) == 0
        return rest


@pytest.fixture
def chat_folder(tiny_folder):
    """A chat model by its name; its prompts are long, in bytes nearly."""
    model = tiny_llama(dtype=torch.float32, vocab_size=300, max_position_embeddings=1200)
    folder = tiny_folder.parent / "tiny-vicuna"
    shutil.copytree(tiny_folder, folder)
    model.save(folder)
    return folder


def one_shot(cli, *args) -> dict:
    status, out, err = cli("generate", "--json", "--threads", 1, *args)
    assert status == 0, err
    return json.loads(out)


def answer_of(shown: str) -> str:
    return shown.rpartition("\n[")[0]


def test_a_story_in_turns(cli):
    """Plain: the text goes on; its first turn is what one prompt gives, its figures below; behind its end a new one."""
    terminal = Terminal("--max-new-tokens", 12)
    terminal.until(PLAIN)
    first = terminal.say("Once upon a time", PLAIN)
    expected = one_shot(cli, "--prompt", "Once upon a time", "--max-new-tokens", 12)
    assert answer_of(first) == "Once upon a time" + expected["text"]
    assert re.search(r"\n\[12 tokens, cut at --max-new-tokens, [\d.]+ tokens/s, [\d.]+ tokens/step\]\n$", first)
    second = answer_of(terminal.say("Tom saw it.", PLAIN))
    again = one_shot(cli, "--prompt", "Once upon a time" + expected["text"] + "Tom saw it.", "--max-new-tokens", 12)
    assert second == "Tom saw it." + again["text"]                               # it knows what stands before
    anew = terminal.say("!!reset", PLAIN)
    assert anew == "resetting...\n" and answer_of(terminal.say("Once upon a time", PLAIN)) == answer_of(first)
    assert "!!remove" in terminal.say("!!what", PLAIN)
    terminal.leave()


def test_the_commands_of_a_chat(chat_folder, cli, tmp_path):
    terminal = Terminal("--model", chat_folder, "--max-new-tokens", 8)
    terminal.until(CHAT)
    assert terminal.say("!!remove", CHAT) == "No messages to remove.\n"
    assert terminal.say("!!regen", CHAT) == "No messages to regenerate.\n"
    assert terminal.say("!!save", CHAT) == "usage: !!save <filename>\n"
    assert terminal.say("!!load", CHAT) == "usage: !!load <filename>\n"
    assert terminal.say(f"!!load {tmp_path}/none", CHAT) == f"file not found: {tmp_path}/none\n"
    first = answer_of(terminal.say("the dog", CHAT))
    alone = one_shot(cli, "--model", chat_folder, "--prompt", "the dog", "--max-new-tokens", 8)
    assert first == "ASSISTANT:" + alone["text"]                                 # the template is on for both
    second = answer_of(terminal.say("a cat", CHAT))
    removed = terminal.say("!!remove", CHAT)
    assert removed == f"removing last message...\nUSER: the dog\nASSISTANT: {alone['text'].strip()}\n"
    assert answer_of(terminal.say("a cat", CHAT)) == second                      # greedy: the same once more
    regenerated = terminal.say("!!regen", CHAT)
    assert regenerated.startswith(removed.replace("removing", "regenerating")) and second in regenerated
    assert terminal.say(f"!!save {tmp_path}/talk", CHAT) == f"saving... {tmp_path}/talk.json\n"
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert set(saved) == {"template_name", "system_message", "roles", "messages", "offset"}
    assert saved["template_name"] == "vicuna_v1.1" and saved["roles"] == ["USER", "ASSISTANT"] and saved["offset"] == 0
    assert [m[0] for m in saved["messages"]] == ["USER", "ASSISTANT"] * 2
    assert [m[1] for m in saved["messages"]][::2] == ["the dog", "a cat"]
    third = answer_of(terminal.say("again", CHAT))                               # the original crashed here
    terminal.say("!!reset", CHAT)
    loaded = terminal.say(f"!!load {tmp_path}/talk", CHAT)
    assert loaded.startswith(f"loading... {tmp_path}/talk.json\nUSER: the dog\nASSISTANT: ") and "USER: a cat" in loaded
    assert answer_of(terminal.say("again", CHAT)).startswith("ASSISTANT:") and third.startswith("ASSISTANT:")
    (tmp_path / "bad.json").write_text('{"template_name": "one_shot", "messages": []}')
    assert "has the template 'one_shot'" in terminal.say(f"!!load {tmp_path}/bad.json", CHAT)
    bad = {"template_name": "vicuna_v1.1", "system_message": "", "messages": [["A", "b"]]}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    assert "is not a saved conversation" in terminal.say(f"!!load {tmp_path}/bad.json", CHAT)
    assert "can't write" in terminal.say(f"!!save {tmp_path}/talk.json/x.json", CHAT)
    terminal.leave("")


def test_regen_draws_anew(chat_folder):
    terminal = Terminal("--model", chat_folder, "--max-new-tokens", 8, "--temperature", 2, "--seed", 3)
    terminal.until(CHAT)
    answers = [answer_of(terminal.say("the dog", CHAT))]
    answers += [answer_of(terminal.say("!!regen", CHAT)).rpartition("\n")[2] for _ in range(2)]
    assert len(set(answers)) == 3
    terminal.leave()


def test_ctrl_c_stops_the_answer_and_keeps_the_client(chat_folder):
    config = json.loads((chat_folder / "config.json").read_text())               # an answer never ends by itself
    write_json(chat_folder / "config.json", config | {"eos_token_id": None, "max_position_embeddings": 20000})
    (chat_folder / "generation_config.json").unlink()
    terminal = Terminal("--model", chat_folder, "--max-new-tokens", 15000, "--heads", "none")
    terminal.until(CHAT)
    first = answer_of(terminal.say("!!help", CHAT))
    assert "unknown command !!foo\n" in terminal.say("!!foo bar", CHAT)
    os.write(terminal.master, b"the dog\n")
    terminal.until("ASSISTANT:", last=False)
    os.write(terminal.master, b"\x03")
    assert terminal.until(CHAT).endswith("\nstopped generation.\n") and first == ""
    assert terminal.say("!!regen", CHAT) == "No messages to regenerate.\n"       # the unanswered message is gone
    os.write(terminal.master, b"\x03")                                           # at the prompt it ends
    terminal.until("exit...\n")
    assert terminal.process.wait(20) == 0


def test_multiline_and_the_end_of_the_input():
    terminal = Terminal("--max-new-tokens", 3, "--multiline")
    label = "> [ctrl-d/z on empty line to end]: "
    terminal.until(label)
    os.write(terminal.master, b"One day,\nTom saw a dog.\n\x04")
    shown = terminal.until(label)
    assert "One day,\nTom saw a dog." in shown.partition("dog.\n")[2] and "[3 tokens, " in shown
    os.write(terminal.master, b"\x04")
    terminal.until("exit...\n")
    assert terminal.process.wait(20) == 0


def test_colours_tell_the_head(cli):
    """Every token accepted from head k is in its colour, and nothing is without a terminal or with NO_COLOR."""
    expected = one_shot(cli, "--prompt", "Once upon a time", "--max-new-tokens", 40)
    args = ["--max-new-tokens", 40, "--show-accepted"]
    terminal = Terminal(*args)
    terminal.until(PLAIN)
    shown = answer_of(terminal.say("Once upon a time", PLAIN))
    terminal.leave()
    pieces = re.findall(r"\033\[(\d+)m(.*?)\033\[0m", shown, flags=re.S)
    drafts = {n: steps for n, steps in enumerate(expected["accepted"]) if n}
    for head, colour in enumerate(COLOURS[:4], 1):                      # head k: steps that accepted k or more
        assert [c for c, _ in pieces].count(str(colour)) == sum(steps for n, steps in drafts.items() if n >= head)
    assert re.sub(r"\033\[\d+m", "", shown) == "Once upon a time" + expected["text"]
    terminal = Terminal(*args, env={"NO_COLOR": "1"})
    terminal.until(PLAIN)
    assert "\033" not in terminal.say("Once upon a time", PLAIN)
    terminal.leave()
    assert "\033" not in cli("generate", "--prompt", "Once", *args)[1]


def test_the_table_of_the_original(cli):
    terminal = Terminal("--max-new-tokens", 30, "--profile")
    terminal.until(PLAIN)
    shown = terminal.say("Once upon a time", PLAIN).split("\n[")[1].split("\n")
    terminal.leave()
    table = shown[1:15]
    assert table[0] == table[-1] == "=" * 50 and all(len(line) == 50 for line in table)
    labels = [*(f"Wall time {s}: " for s in ("init", "medusa", "Tree", "Posterior", "Update")), "-" * 50,
              *(f"Wall time portion {s}: " for s in ("medusa", "Tree", "Posterior", "Update")), "-" * 50,
              "Tokens/second: "]
    assert all(line.startswith(label) for line, label in zip(table[1:], labels, strict=False))
    value = lambda line: float(line.split(": ")[1])
    total = sum(value(line) for line in table[1:6])
    assert value(table[8]) == pytest.approx(value(table[3]) / total, abs=0.1)
    assert any(re.fullmatch(r"   0 +\d+ +[\d.]+%  #*", line) for line in shown)
    out = cli("generate", "--prompt", "Once", "--profile", "--max-new-tokens", 40, "--json")[1]
    accepted = json.loads(out)["accepted"]
    assert sum(accepted) == json.loads(out)["steps"]
    assert sum(n * steps for n, steps in enumerate(accepted)) + sum(accepted) == json.loads(out)["new_tokens"] - 1
    plain = Terminal("--max-new-tokens", 5, "--profile", "--heads", "none")
    plain.until(PLAIN)
    shown = plain.say("Once", PLAIN)
    plain.leave()
    assert "Wall time base inference: " in shown and "Tree" not in shown and "accepted" not in shown


def test_a_trace_names_the_stages(cli, tmp_path):
    status, _, err = cli("generate", "--prompt", "Once", "--max-new-tokens", 9, "--trace", tmp_path / "t.json")
    assert status == 0, err
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = [e.get("name") for e in events]
    for stage in ("init", "medusa", "tree", "posterior", "update"):
        assert stage in names
    (tmp_path / "file").write_text("")
    status, _, err = cli("generate", "--prompt", "Once", "--max-new-tokens", 9, "--trace", tmp_path / "file" / "t.json")
    assert status == 2 and "can't write" in err


@pytest.fixture
def talk(tiny_folder, monkeypatch):
    """A Chat of the tiny model, and the prompts' tokens that were really fed, turn by turn."""
    def build(chat=False, **over):
        args = generate.arguments(["--model", str(tiny_folder), "--max-new-tokens", "10", "--threads", "1"])
        model = Llama.from_pretrained(tiny_folder)
        heads = load_heads(tiny_folder / "medusa", model)
        decoder = generate.decoder_of(args, model, heads, Tree.from_pretrained(tiny_folder / "medusa", heads))
        fed, real = [], model.forward
        monkeypatch.setattr(model, "forward", lambda ids, *a: fed.append(ids[0].tolist()) or real(ids, *a))
        tokenizer = Tokenizer(tiny_folder, model.config)
        template = (Vicuna if chat else Plain)(tokenizer)
        client = Chat(decoder, tokenizer, template, args, lambda ids, seed, emit: generate.run(
            decoder, tokenizer, ids, args, seed, emit))
        vars(client.args).update(over)
        return client, fed
    return build


def test_only_the_new_turn_is_read(talk, capsys):
    client, fed = talk()
    client.answer("the dog")
    begun = len(client.decoder.cached)
    fed.clear()
    result = client.answer(" a cat")
    again = client.encode(client.rounds[:1], " a cat")
    assert len(fed[0]) == len(again) - begun                                     # the first forward is the prefill
    alone, _ = talk()
    fresh = alone.write(again, 0, lambda *a: None)
    assert fresh["token_ids"] == result["token_ids"] and fresh["steps"] == result["steps"]
    assert client.decoder.cached == again + result["token_ids"][:-1]


@pytest.mark.parametrize("recent", [1, 3])
def test_kept_slots_change_nothing(recent, monkeypatch):
    """Whatever is kept of a prompt, the state to decode from is that of a fresh prefill, and no more is computed."""
    model, prompt = tiny_llama(), [1, 5, 9, 3, 7, 4, 8, 11, 6]
    plain, computed, real = PlainDecoder(model), [], model.forward
    decoder = Decoder(model, tiny_heads(model, 2, recent=recent), Tree.from_paths([]), eos=(2,))
    args = [prompt], 5, [0]
    with torch.inference_mode():
        fresh, *_ = decoder.start(*args, new_cache(model.config, 1, 96, like=model.norm.weight))
        monkeypatch.setattr(model, "forward", lambda ids, *a: computed.append(ids.shape[1]) or real(ids, *a))
        for kept in range(len(prompt) + 1):
            decoder = Decoder(model, decoder.heads, Tree.from_paths([]), eos=(2,))
            keep_prefix(decoder)
            cache, cached = decoder.new_cache([], 0), prompt[:kept] + [10] * 9   # more is in it than may be used
            plain.prefill([cached], cache, 1)
            decoder.cached = cached
            computed.clear()
            state, *_ = decoder.start(*args, cache)
            assert computed == [max(len(prompt) - kept, recent + 1)]             # the newest hidden states are new
            assert torch.equal(state.token, fresh.token) and torch.equal(state.length, fresh.length)
            assert torch.allclose(state.recent_hidden, fresh.recent_hidden, atol=1e-12)
            assert torch.allclose(cache[:, :, :9], fresh.cache[:, :, :9], atol=1e-12)


def test_the_cache_holds_what_it_is_believed_to(talk, capsys):
    """After any turns, taken back and interrupted ones too, the kept slots equal a fresh prefill's."""
    client, _ = talk()

    def check():
        cache, cached = client.decoder.new_cache([], 0), client.decoder.cached
        with torch.inference_mode():
            fresh = torch.zeros_like(cache)
            PlainDecoder(client.decoder.model).prefill([cached], fresh, 1)
        n = len(cached)
        assert n and torch.allclose(cache[:, :, :n], fresh[:, :, :n], atol=1e-5)
    for message in ("the dog", " saw", " x"):
        client.answer(message)
        check()
    client.rounds.pop()
    client.answer(" another")
    check()
    client.rounds.pop()                                                          # so that slots are written anew
    with pytest.raises(KeyboardInterrupt):
        with pytest.MonkeyPatch.context() as patch:
            def stop(args, before):
                shown = []

                def emit(text, head):
                    shown.append(text)
                    if len(shown) > 4:
                        raise KeyboardInterrupt
                return emit
            patch.setattr("extras.chat.printer", stop)
            client.answer(" more")
    check()
    client.answer(" more")
    check()


def test_a_full_context_is_trimmed_with_a_notice(talk, capsys):
    client, _ = talk()                                                           # a context of 64
    for _ in range(5):
        client.answer(" the dog saw")
    out = capsys.readouterr().out
    assert "(the context of 64 tokens is full: the first " in out and len(client.rounds) == 5
    ids = client.prompt(" the dog saw")
    assert ids[:1] == [1] and len(ids) <= 54                                     # 10 new tokens have room


def test_the_vicuna_template_to_the_letter(talk):
    client, _ = talk(chat=True, system=None)
    client.template.system = "SYS."
    backend = client.tokenizer
    client.rounds = [["hi", "yo", backend.encode(" yo")[1:] + [2]], ["more", "ok", None]]
    ids = client.encode(client.rounds, "end")
    text = [backend.encode(t)[1:] for t in ("SYS. USER: hi ASSISTANT:", " yo", "USER: more ASSISTANT: ok",
                                            "USER: end ASSISTANT:")]
    assert ids == [1, *text[0], *text[1], 2, *text[2], 2, *text[3]]
    client.rounds[0][2] = backend.encode(" yo")[1:]                              # an answer that was cut short
    assert client.encode(client.rounds, "end") == ids
    client.template.system, client.rounds = "S", [["a", "b", [50, 2]]]           # an answer's end is no end of a talk
    assert client.prompt("c") == client.encode(client.rounds, "c")
    client.template.system = ""
    assert client.encode([], "c") == backend.encode("USER: c ASSISTANT:")


def test_behind_the_end_of_a_text_a_new_one_begins(talk):
    client, _ = talk()
    client.rounds = [["the dog", " ran", [50, 2]], ["a cat", " sat", [60]]]
    assert client.prompt(" up") == client.encode(client.rounds[1:], " up")


def test_who_is_a_chat_model(tiny_folder, tmp_path):
    tokenizer = Tokenizer(tiny_folder, Llama.from_pretrained(tiny_folder).config)
    named = lambda *a: template_of(generate.arguments(["--model", *map(str, a)]), tokenizer).name
    assert named(MODEL) == named(tiny_folder) == "plain"
    assert named(tiny_folder, "--template", "vicuna") == VICUNA
    config = json.loads((tiny_folder / "config.json").read_text())
    write_json(tiny_folder / "config.json", config | {"_name_or_path": "lmsys/Vicuna-7b"})
    assert named(tiny_folder) == VICUNA and named(tiny_folder, "--template", "plain") == "plain"
    shutil.copytree(MODEL, tmp_path / "TinyLLama-v0")
    assert named(tmp_path / "TinyLLama-v0") == "plain"


def conversation(*messages, **change) -> bytes:
    roles = ("USER", "ASSISTANT")
    return json.dumps({"template_name": "plain", "system_message": "", "messages": [
        [roles[i % 2], message] for i, message in enumerate(messages)]} | change).encode()


def test_no_input_ends_a_conversation_but_its_end(tiny_folder, tmp_path, cli, monkeypatch):
    """Bytes that are no text, file names that no file can have, files that are no conversation."""
    monkeypatch.chdir(tmp_path)
    files = {"cut.json": conversation("the dog", " \ud800 ran"), "half.json": conversation("a")[:-9],
             "list.json": b"[]", "bytes.json": b"\xff\xfe\0", "deep.json": b"[" * 10 ** 5,
             "name.json": conversation(template_name=["x"]),
             "numbers.json": conversation(1, 2), "system.json": conversation(system_message="\udfff")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo("fifo.json")
    names = [b"a\0b", b"\xff", b"\xed\xa0\x80", b"x" * 300, b".", b"..", b"fifo.json", b"tiny", b"cut.json/x",
             b"/proc/self/mem", b"~", b"\xf0\x9f"]
    said = [b"the dog", *(b"!!save " + name for name in names), *(b"!!load " + name for name in names),
            *(b"!!load " + name.encode() for name in files), b"caf\xe9 \xff\xfe \0 \xed\xa0\x80", b"!!", b"!!save",
            b"!!\xff", b"!!load cut.json", b"!!regen", b"!!save saved"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(said)), encoding="utf-8"))
    status, out, err = cli("generate", "--model", tiny_folder, "--interactive", "--max-new-tokens", 3, "--threads", 1)
    assert status == 0 and out.endswith("> saving... saved.json\n> \nexit...\n") and "Traceback" not in out + err
    messages = json.loads((tmp_path / "saved.json").read_text())["messages"]
    assert messages[0] == ["USER", "the dog"] and messages[1][1].isprintable()   # the last one, answered anew
    assert stat.S_ISFIFO(os.stat("fifo.json").st_mode) and (tmp_path / "cut.json").read_bytes() == files["cut.json"]
    assert len(err.splitlines()) == 14, err                                      # each error is one line


def test_a_closed_input_is_the_end(tiny_folder, cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, out, _ = cli("generate", "--model", tiny_folder, "--interactive", "--threads", 1)
    assert status == 0 and out.endswith("exit...\n")
# -------------------------------------------------------------------------------------------- the model's own template

HEAD = "{% for m in messages %}{{ '<|0|>' + m.role + ': ' + m.content }}"
TAIL = "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|0|>assistant:{% endif %}"


def with_template(folder, template):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    write_json(folder / "tokenizer_config.json", settings)


@pytest.fixture
def own_folder(tmp_path):
    """A chat model with 40 special tokens, that writes some of them; and the one that ends its answer to "the dog", as
    nothing but its template says; the ids of the prompt, and of the answer."""
    folder, model = tmp_path / "own", tiny_llama(3, torch.float32, vocab_size=340, max_position_embeddings=400)
    model.save(folder)
    backend = byte_tokenizer(folder / "tokenizer.json")
    backend.add_special_tokens([f"<|{i}|>" for i in range(40)])
    backend.save(str(folder / "tokenizer.json"))
    save_heads(tiny_heads(model, 3), folder / "medusa", model)
    prompt = backend.encode("<|0|>user: the dog\n<|0|>assistant:", add_special_tokens=False).ids
    ids = [token for (new,) in PlainDecoder(model, eos=()).generate([prompt], 200) for token in new]
    at = next(i for i, token in enumerate(ids) if i > 1 and token >= 300 and token not in ids[:i])
    with_template(folder, HEAD + "{% if m.role == 'assistant' %}" + f"<|{ids[at] - 300}|>" + "{% endif %}" + TAIL)
    assert 2 not in ids[:at] and at < 60
    return folder, prompt, ids[:at + 1]


@pytest.mark.parametrize("more", [[], ["--heads", "none"], ["--compare"]], ids=str)
def test_a_chat_of_one_message(own_folder, cli, tmp_path, more):
    """The prompt is the template's, and its end of a turn ends the answer; without --chat a prompt is text."""
    folder, prompt, answer = own_folder
    run = lambda *args: one_shot(cli, "--model", folder, "--max-new-tokens", 80, *more, *args)
    result = run("--chat", "--prompt", "the dog")
    assert (result["prompt"], result["prompt_tokens"], result["token_ids"]) == ("the dog", len(prompt), answer)
    assert run("--template", "model", "--prompt", "the dog")["token_ids"] == answer
    plain = run("--prompt", "the dog")
    assert plain["prompt_tokens"] == len(Tokenizer(folder, Llama.from_pretrained(folder).config).encode("the dog"))
    system = run("--chat", "--system", "S", "--prompt", "the dog")
    assert system["prompt_tokens"] > len(prompt) and system["prompt"] == "the dog"
    if "--compare" not in more:
        shown = cli("generate", "--model", folder, "--chat", "--prompt", "the dog", *more, "--max-new-tokens", 80)[1]
        assert shown.startswith(f"the dog\n{result['text']}\n\n")


def test_a_file_of_messages(own_folder, cli, tmp_path):
    folder, prompt, answer = own_folder
    messages = [{"role": "user", "content": [{"type": "text", "text": "the dog"}]}]
    lines = [{"messages": messages}, "the dog", {"prompt": "the dog"}, {"messages": messages, "id": 4}]
    (tmp_path / "p.JSONL").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "p.json").write_text(json.dumps(lines, indent=1))
    for name in ("p.JSONL", "p.json"):
        status, out, err = cli("generate", "--model", folder, "--prompts-file", tmp_path / name, "--json",
                               "--threads", 1, "--batch-size", 3, "--max-new-tokens", 80)
        results = [json.loads(line) for line in out.splitlines()]
        assert status == 0 and [r["token_ids"] == answer for r in results] == [True, False, False, True], err
        assert results[0]["prompt"] == [{"role": "user", "content": "the dog"}]
        assert results[1]["prompt_tokens"] < len(prompt) == results[0]["prompt_tokens"]
    status, out, err = cli("generate", "--model", folder, "--template", "plain", "--prompts-file", tmp_path / "p.json")
    assert (status, out) == (2, "") and "messages need a chat model" in err


@pytest.fixture
def own_talk(own_folder):
    """A Chat with a template, and the number of ids of each forward."""
    def build(template):
        folder, *_ = own_folder
        with_template(folder, template)
        model = Llama.from_pretrained(folder)
        args = generate.arguments(["--model", str(folder), "--max-new-tokens", "10", "--interactive"])
        tokenizer = Tokenizer(folder, model.config)
        template = template_of(args, tokenizer)
        heads = load_heads(folder / "medusa", model)
        decoder = generate.decoder_of(args, model, heads, Tree.from_pretrained(folder / "medusa", heads), tokenizer.eos)
        prefill, fed = decoder.prefill, []
        decoder.prefill = lambda prompts, cache, recent, kept: fed.append(len(prompts[0]) - kept) or prefill(
            prompts, cache, recent, kept)
        return Chat(decoder, tokenizer, template, args, lambda ids, seed, emit: generate.run(
            decoder, tokenizer, ids, args, seed, emit)), fed
    return build


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_template_that_rewrites_earlier_turns(rewrites, own_talk, capsys):
    """Each answer is that of a fresh decoder on the rendered messages; of the cache the common prefix alone is kept."""
    gone = "{% if m.role == 'user' and not loop.last and not loop.first %} (gone){% endif %}" if rewrites else ""
    client, fed = own_talk(HEAD + gone + TAIL)
    model, messages, before, cached, rewritten = client.decoder.model, [], [], [], []
    for text in ("the dog", "a cat </s>", "once", "and"):
        messages.append({"role": "user", "content": text})
        ids = client.template.ids(messages)
        result = client.answer(text)
        fresh = [t for (new,) in PlainDecoder(model, eos=client.tokenizer.eos).generate([ids], 10) for t in new]
        assert result["token_ids"] == fresh
        same = next((i for i, (a, b) in enumerate(zip(ids, cached, strict=False)) if a != b), len(cached))
        assert fed.pop() == len(ids) - min(same, len(ids) - 1) and (not cached or same > 5)
        assert client.decoder.cached == ids + fresh[:-1]
        rewritten.append(same < len(before))
        before, cached = ids, client.decoder.cached
        messages.append({"role": "assistant", "content": result["text"].strip()})
    assert rewritten == [False, False, rewrites, rewrites]


def test_what_a_saved_conversation_is_called(own_talk, talk, tmp_path, capsys):
    """A plain one has no system message, and none is taken from a file that an earlier version saved."""
    own, (plain, _), (vicuna, _) = own_talk(HEAD + TAIL)[0], talk(), talk(chat=True)
    for client, name, system in ((own, "model", None), (plain, "plain", None), (vicuna, VICUNA, Vicuna.system)):
        client.rounds = [["the dog", "ran", None]]
        client.save(tmp_path / "a.json")
        saved = json.loads((tmp_path / "a.json").read_text())
        assert (saved["template_name"], saved["system_message"]) == (name, system)
        assert saved["messages"] == [["USER", "the dog"], ["ASSISTANT", "ran"]]
        write_json(tmp_path / "a.json", saved | {"system_message": "S"})
        client.rounds = []
        client.load(tmp_path / "a.json")
        assert client.rounds == [["the dog", "ran", None]]
        assert client.template.system == (None if name == "plain" else "S")
    with pytest.raises(UserError, match="has the template 'vicuna_v1.1', this conversation 'model'"):
        own.load(tmp_path / "a.json")
    own.rounds, own.template.system = [], "S"
    assert own.prompt("x") == own.template.ids([{"role": "system", "content": "S"}, {"role": "user", "content": "x"}])


def test_what_a_template_refuses_is_told_and_the_client_goes_on(own_folder):
    folder, *_ = own_folder
    with_template(folder, "{% if messages[-1].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
                  + HEAD + TAIL)
    terminal = Terminal("--model", folder, "--max-new-tokens", 3)
    terminal.until(CHAT)
    assert terminal.say("no", CHAT) == "the chat template of own can't be used here: not this\n"
    assert terminal.say("yes", CHAT).startswith("ASSISTANT: ")
    terminal.leave()


def test_openings_and_tuning_with_messages(own_folder, cli, tmp_path, monkeypatch):
    """--tune writes its texts behind the very prompts that a chat has, up to the end of a turn."""
    folder, prompt, answer = own_folder
    seen = []

    def evaluate(model, heads, documents, *more):
        seen.extend(documents)
        return 1 // (4 - len(seen)), [], []                                      # stops it when all are seen
    monkeypatch.setattr("generate.evaluate", evaluate)
    say = lambda text: {"messages": [{"role": "user", "content": text}]}
    (tmp_path / "o.jsonl").write_text("\n".join(map(json.dumps, [say("the dog"), say("x"), {"prompt": "y"}, "z", "z"])))
    with pytest.raises(ZeroDivisionError):
        cli("generate", "--model", folder, "--tune", tmp_path / "o.jsonl", "--max-new-tokens", 80, "--threads", 1)
    assert (prompt + answer) in [d.ids.tolist() for d in seen]
