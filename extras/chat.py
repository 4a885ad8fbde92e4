"""A conversation in the terminal, as the original's client had it: `generate.py --interactive`."""
import os
import sys
from contextlib import suppress
from itertools import chain
from os.path import commonprefix
from extras.command_line import row_seed
from extras.report import ended, histogram, original_table, printer
from loading.config import check_prompts
from loading.documents import mended
from loading.files import UserError, read_json, write_json
from loading.templates import IDS, Plain
from loading.tokenizer import Tokenizer
from tinymedusa import Decoder

ROLES = ("USER", "ASSISTANT")
HELP = """!!exit or an empty line: leave            !!reset: begin anew
!!remove: take back the last round         !!regen: answer the last message anew
!!save FILE, !!load FILE: the conversation as JSON
Ctrl-C stops an answer."""

def keep_prefix(decoder) -> None:
    """Let `decoder` (one prompt at a time) keep one cache for the whole context, and the ids whose keys it holds.
    decoder.cached: these ids; whoever generates sets it to what stays known when the generation ends."""
    prefill, cache = decoder.prefill, decoder.new_cache([[]], decoder.model.config.max_position_embeddings)
    def prefill_rest(prompts: list, cache, recent: int):
        kept = len(commonprefix([prompts[0], decoder.cached]))
        decoder.cached = prompts[0][:kept]              # all that is sure if it is interrupted from here on
        return prefill(prompts, cache, recent, max(0, min(kept, len(prompts[0]) - recent)))
    decoder.cached, decoder.prefill, decoder.new_cache = [], prefill_rest, lambda prompts, max_new_tokens: cache

class Chat:
    """A conversation: rounds [message, answer, the answer's ids], with a template a question and its answer.
    Plain, a message goes on with the text so far, and behind an end of text begins a new one."""
    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, template: Plain, args, write):
        """write(ids, seed, emit): generate.py's `run`, all else given."""
        self.decoder, self.tokenizer, self.template, self.args, self.write = decoder, tokenizer, template, args, write
        self.config, self.rounds, self.answers, self.chat = decoder.model.config, [], 0, template.name != "plain"
        keep_prefix(decoder)

    def encode(self, rounds: list, message: str) -> list:
        """The ids of some rounds and of a message behind them, up to where its answer begins."""
        if self.chat:
            turns = (({"role": "user", "content": text}, {"role": "assistant", "content": answer, IDS: ids})
                     for text, answer, ids in rounds)
            return self.template.prompt([*chain.from_iterable(turns), {"role": "user", "content": message}])
        ids = []
        for i, (text, answer, answer_ids) in enumerate([*rounds, (message, "", [])]):
            new = self.tokenizer.encode(text if answer_ids is not None else text + answer)
            ids += (new if i == 0 else new[len(self.tokenizer.bos):]) + (answer_ids or [])
        return ids

    def prompt(self, message: str) -> list:
        """All that the model is to see, without the oldest rounds where the context can't hold them and an answer."""
        ended = [i for i, r in enumerate(self.rounds) if not self.chat and r[2] and r[2][-1] in self.tokenizer.eos]
        rounds, context = self.rounds[ended[-1] + 1 if ended else 0:], self.config.max_position_embeddings
        room, dropped = context - min(self.args.max_new_tokens, context // 2), 0
        while len(ids := self.encode(rounds[dropped:], message)) > room and dropped < len(rounds):
            dropped += 1
        if dropped:
            print(f"(the context of {context} tokens is full: the first {dropped} rounds are no longer seen)")
        return ids

    def answer(self, message: str) -> dict:
        """The model's answer, streamed to the terminal; each one has a seed of its own."""
        ids, seed = self.prompt(message), row_seed(self.args.seed, self.answers)
        check_prompts([ids], self.config)
        self.answers += 1
        result = self.write(ids, seed, printer(self.args, self.template.label or message))
        self.decoder.cached = ids + result["token_ids"][:-1]
        answer_ids = None if result["finish_reason"] == "stop" else result["token_ids"]     # which hold the stop
        self.rounds.append([message, result["text"].strip() if self.chat else result["text"], answer_ids])
        return result

    def show(self) -> None:
        for message, answer, _ in self.rounds:
            print(f"USER: {message}\nASSISTANT: {answer}" if self.chat else message + answer)

    def save(self, path: str) -> None:
        """In the format of FastChat, the original's."""
        messages = [pair for r in self.rounds for pair in zip(ROLES, r[:2], strict=True)]
        write_json(path, {"template_name": self.template.name, "system_message": self.template.system, "roles": ROLES,
                          "offset": 0, "messages": messages})

    def load(self, path: str) -> None:
        data, name = read_json(path), self.template.name
        messages = data.get("messages")
        if data.get("template_name") != name:
            raise UserError(f"{path} has the template {data.get('template_name')!r}, this conversation {name!r}")
        if not isinstance(messages, list) or not isinstance(data.get("system_message"), str | None) or not all(
                isinstance(m, list) and len(m) == 2 and m[0] == ROLES[i % 2] and (isinstance(m[1], str) or m[1] is None)
                for i, m in enumerate(messages)):
            raise UserError(f"{path} is not a saved conversation: expected messages of {' and '.join(ROLES)} in turn")
        pairs = zip(messages[::2], messages[1::2], strict=False)
        self.rounds = [[mended(m[1]), mended(a[1]), None] for m, a in pairs if m[1] is not None and a[1] is not None]
        if self.chat:
            system = data.get("system_message")
            self.template.system = system and mended(system)

def read_message(args, label: str) -> str:
    """What the user types; with --multiline up to Ctrl-D. Empty at the end of the input."""
    with suppress(EOFError, KeyboardInterrupt):
        if not args.multiline:
            return input(label)
        lines = [input(f"{label.rstrip(': ')} [ctrl-d/z on empty line to end]: ")]
        with suppress(EOFError):
            while True:
                lines.append(input())
        return "\n".join(lines)
    print()
    return ""

def command(chat: Chat, name: str, file: str) -> str | None:
    """One of the original's commands; a message to be answered once more, if any."""
    if name in ("!!save", "!!load") and not file:
        print(f"usage: {name} <filename>")
    elif name == "!!save":
        path = file if "." in file else file + ".json"
        print(f"saving... {path}")
        chat.save(path)
    elif name == "!!load":
        path = next((f for f in (file, file + ".json") if os.path.isfile(f)), None)
        print(f"loading... {path}" if path else f"file not found: {file}")
        if path:
            chat.load(path)
            chat.show()
    elif name == "!!reset":
        print("resetting...")
        chat.rounds = []
    elif name in ("!!remove", "!!regen") and not chat.rounds:
        print(f"No messages to {'remove' if name == '!!remove' else 'regenerate'}.")
    elif name in ("!!remove", "!!regen"):
        print("removing last message..." if name == "!!remove" else "regenerating last message...")
        message = chat.rounds.pop()[0]
        chat.show()
        return message if name == "!!regen" else None
    else:
        print(HELP if name == "!!help" else f"unknown command {name}\n{HELP}")
    return None

def interactive(chat: Chat) -> None:
    """Reads messages and commands until !!exit, an empty line or the end of the input."""
    with suppress(ImportError, AttributeError):
        sys.stdin.reconfigure(errors="replace")         # half a character is no reason to stop
        import readline  # noqa: F401 - line editing and history for input()
    while (text := read_message(chat.args, "USER: " if chat.chat else "> ")).strip() not in ("", "!!exit"):
        try:
            if text.strip().startswith("!!"):
                name, _, file = text.strip().partition(" ")
                text = command(chat, name, file.strip())
            if text is None:
                continue
            result = chat.answer(text)
            print(f"\n[{result['new_tokens']} tokens{ended(result, ', {}')}, "
                  f"{result['tokens_per_second']:.1f} tokens/s, {result['tokens_per_step'] or 0:.2f} tokens/step]")
            if chat.args.profile:
                print("\n".join([original_table(result), *(histogram(result) if "medusa" in result["stages"] else [])]))
        except KeyboardInterrupt:
            print("\nstopped generation.")
            chat.show()
        except UserError as error:
            print(error, file=sys.stderr)
    print("exit...")
