"""generate.py --interactive through a pseudo-terminal, as people meet it; and what it keeps in the cache."""
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import MODEL, ROOT, tiny_heads, tiny_llama

import generate
from extras.chat import Chat, keep_prefix
from extras.report import COLOURS
from llama import Llama, new_cache
from loading.files import write_json
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
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "generate.py", "--interactive", "--threads", "1", *map(str, args)], stdin=slave,
            stdout=slave, stderr=slave, close_fds=True, start_new_session=True,
            preexec_fn=self.own_terminal,
            env=os.environ | {"TERM": "dumb", "NO_COLOR": ""} | (env or {}))
        os.close(slave)

    @staticmethod
    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)                                     # so that Ctrl-C reaches it,
        signal.signal(signal.SIGINT, signal.SIG_DFL)                             # though these tests may ignore it

    def until(self, text: str, seconds=120, last=True) -> str:
        """What is printed up to this text, behind which nothing more comes for a while; or up to its first sight."""
        read, end = "", time.monotonic() + seconds
        while not (read.endswith(text) and not select.select([self.master], [], [], 0.3)[0] if last else text in read):
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
    assert re.search(r"\n\[12 tokens, [\d.]+ tokens/s, [\d.]+ tokens/step\]\n$", first)
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
