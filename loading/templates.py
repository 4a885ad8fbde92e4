"""How messages are put to a chat model, as ids: by its own template, by FastChat's vicuna_v1.1, or not at all."""
import re
from pathlib import Path
from loading.documents import read_lines
from loading.files import UserError, locate, model_name, read_json

# vicuna_v1.1 of FastChat: "{SYSTEM} USER: .. ASSISTANT: ..</s>USER: .. ASSISTANT: ..</s>"
VICUNA = "vicuna_v1.1"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
ADDITIONAL = "additional_chat_templates"
START, END = "\U000f0000", "\U000f0001"         # around a special token's name in a message: there it is text
IDS = 0         # the key of an answer's ids in a message, where it was not read but written: no key of a JSON object

class Plain:
    """No template: a prompt is text, and the model goes on with it."""
    name, label, system = "plain", "", None         # label: what stands before an answer on the terminal

    def __init__(self, tokenizer, system: str | None = None, chat: bool = False):
        """system: in front of messages that have none; chat: whether a prompt that is text is a message."""
        self.tokenizer, self.chat = tokenizer, chat
        self.system = self.system if system is None else system

    def ids(self, messages: list, answer: bool = True) -> list[int]:
        """The ids of messages, {"role": .., "content": ..} each; answer: up to where an assistant's answer begins.
        Raises UserError: what the template can't hold."""
        raise UserError("messages need a chat model: this one has no template (say --template vicuna, or give text)")

    def prompt(self, prompt: str | list) -> list[int]:
        """The ids of a prompt: of a text, which is a message itself in a chat, or of messages."""
        if isinstance(prompt, str) and not self.chat:
            return self.tokenizer.encode(prompt)
        return self.ids([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def with_system(self, messages: list) -> list:
        given = self.system is None or messages and messages[0]["role"] == "system"
        return messages if given else [{"role": "system", "content": self.system}, *messages]

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a part of a text; special: the name of a special token in it is the token."""
        backend = self.tokenizer.backend
        before, backend.encode_special_tokens = backend.encode_special_tokens, not special
        try:
            return self.tokenizer.encode_batch([text], bos=False)[0]
        finally:
            backend.encode_special_tokens = before

class Vicuna(Plain):
    """vicuna_v1.1: each round is encoded on its own and ends with eos; an answer may bring its IDS."""
    name, label, system = VICUNA, "ASSISTANT:", SYSTEM

    def ids(self, messages: list, answer: bool = True) -> list[int]:
        ids, text, eos = list(self.tokenizer.bos), "", self.tokenizer.eos[:1]
        for message in self.with_system(messages):
            role, content = message["role"], message.get("content") or ""
            if role not in ("system", "user", "assistant"):
                raise UserError(f"the template {VICUNA} has no role {role!r}: it has system, user and assistant")
            if role != "assistant":
                text += f"USER: {content} " if role == "user" else content and content + " "
                continue
            own = message.get(IDS)
            ids += self.encode(f"{text}ASSISTANT:" + (f" {content}" if own is None else ""), False) + (own or [])
            ids += eos if ids[-1:] != eos else []           # of a text, or an answer cut short
            text = ""
        return ids + (self.encode(text + "ASSISTANT:", False) if answer else [])

class Own(Plain):
    """The model's own template, as `apply_chat_template` of transformers renders and encodes it; the name of a special
    token in a message stays text, as with its `sanitize_control_tokens`. The tokens that end a turn join the eos."""
    name, label = "model", "ASSISTANT: "

    def __init__(self, tokenizer, template: str, source: str, system=None, chat=False):
        """source: whose template it is."""
        from loading.jinja import compiled      # as it takes a while
        super().__init__(tokenizer, system, chat)
        self.render = compiled(template, source)
        added = tokenizer.backend.get_added_tokens_decoder()
        names = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.marks = re.compile(f"{START}({self.special.pattern}){END}|[{START}{END}]")
        ends = self.ends_of_turn({t.content: i for i, t in added.items() if i < tokenizer.vocab_size})
        tokenizer.eos = list(dict.fromkeys([*tokenizer.eos, *ends]))

    def ends_of_turn(self, added: dict[str, int]) -> list[int]:
        """eos, and the token that the template writes behind an answer, of the tokens beside the vocabulary."""
        answer, names = {"role": "assistant", "content": "The answer."}, [self.tokenizer.special.get("eos_token")]
        try:
            text = self.text([{"role": "user", "content": "A question."}, answer], False)
            behind = text.rpartition(answer["content"])[2].lstrip()
            names.append(max(filter(behind.startswith, added), key=len, default=None))
        except UserError:
            pass                                # a template of other conversations
        return [added[name] for name in names if name in added]

    def text(self, messages: list, answer: bool) -> str:
        def variables() -> dict:
            marked = [{key: self.marked(value) for key, value in message.items() if value is not None and key != IDS}
                      for message in self.with_system(messages)]
            return self.tokenizer.special | {
                "messages": marked, "tools": None, "documents": None, "add_generation_prompt": answer}
        return self.render(variables)

    def marked(self, value):
        """A message's part with START and END around the names of special tokens."""
        if isinstance(value, str):
            return self.special.sub(rf"{START}\g<0>{END}", re.sub(f"[{START}{END}]", "", value))
        if isinstance(value, dict):
            return {key: self.marked(v) for key, v in value.items()}
        return [self.marked(v) for v in value] if isinstance(value, list) else value

    def ids(self, messages: list, answer: bool = True) -> list[int]:
        first, *pieces = self.marks.split(self.text(messages, answer))
        ids, line = self.encode(first, True), self.encode("\n", True) if pieces else []
        for number, piece in enumerate(pieces):             # by turns: a token's name or None, what follows it
            if piece:           # behind a new line, for SentencePiece puts a space in front of a text
                new, named = self.encode("\n" + piece, number % 2), number % 2
                ids += new[len(line):] if new[:len(line)] == line else self.encode(piece, named)
        return ids

def own_template(name_or_path, tokenizer, revision=None) -> str | None:
    """The text of the model's chat template, of several the one that transformers takes. None: the model has none."""
    find = lambda name: locate(name_or_path, name, revision, required=False)
    legacy = find("chat_template.json")
    templates = tokenizer.settings.get("chat_template") or legacy and read_json(legacy).get("chat_template")
    if isinstance(templates, list) and all(isinstance(t, dict) for t in templates):
        templates = {t.get("name"): t.get("template") for t in templates}
    folder = Path(name_or_path).expanduser() / ADDITIONAL
    default = find(f"{ADDITIONAL}/default.jinja") or find("chat_template.jinja")
    files = {path.stem: path for path in folder.glob("*.jinja")} | {"default": default}
    if any(files.values()):
        templates = {name: "".join(read_lines(path)) for name, path in files.items() if path}
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(f"{name_or_path} has the chat templates {', '.join(map(str, templates))} and none named "
                        "default: copy the one that you want to chat_template.jinja")
    templates = templates["default"] if isinstance(templates, dict) else templates
    if not isinstance(templates, str | None):
        raise UserError(f"{name_or_path}: its chat_template is {str(templates)[:80]!r}, expected text or a list of "
                        '{"name": .., "template": ..}')
    return templates

def named_vicuna(name_or_path, revision=None) -> bool:
    """Whether the name in the model's own config, its folder or its hub id says so."""
    config = read_json(locate(name_or_path, "config.json", revision))
    return "vicuna" in f"{config.get('_name_or_path', '')} {model_name(name_or_path)}".lower()

def load_template(name_or_path, tokenizer, kind="auto", revision=None, **options) -> Plain | None:
    """The template of a model, or the kind "model" or "vicuna"; options: of `Plain`. None: it has none."""
    template = None if kind == "vicuna" else own_template(name_or_path, tokenizer, revision)
    if template is not None:
        return Own(tokenizer, template, model_name(name_or_path), **options)
    if kind == "model":
        raise UserError(f"{name_or_path} has no chat template of its own: say --template vicuna or plain")
    return Vicuna(tokenizer, **options) if kind == "vicuna" or named_vicuna(name_or_path, revision) else None

def template_of(args, tokenizer, prompts=()) -> Plain:
    """How generate.py puts these prompts to the model: text is a message where --chat, --system or --template says so
    or the model's name says vicuna; else only --interactive and prompts of messages take a template."""
    asked = "--chat" if args.chat else "--system" if args.system is not None else None
    by_name = args.template == "auto" and named_vicuna(args.model, args.revision)
    chat, template = bool(asked or by_name or args.template in ("model", "vicuna")), None
    if args.template != "plain" and (chat or args.interactive or not all(isinstance(p, str) for p in prompts)):
        template = load_template(args.model, tokenizer, args.template, args.revision, system=args.system, chat=chat)
    if asked and template is None:
        instead = "leave out --template plain" if args.template == "plain" else "say --template vicuna"
        raise UserError(f"{asked} needs a chat model: this one goes on with plain text (or {instead})")
    return template or Plain(tokenizer)
