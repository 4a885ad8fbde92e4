"""How a message is put to a chat model."""
from loading.files import UserError, locate, model_name, read_json

# vicuna_v1.1 of FastChat: "{SYSTEM} USER: .. ASSISTANT: ..</s>USER: .. ASSISTANT: ..</s>"
VICUNA = "vicuna_v1.1"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

def question(index: int, text: str, system: str = SYSTEM) -> str:
    """A human turn in the vicuna_v1.1 template, up to where the answer begins (with a space)."""
    return f"{'' if index or not system else system + ' '}USER: {text} ASSISTANT:"

def template_of(args) -> str:
    """"vicuna" or "plain": as requested, else by the model's name in its own config, its folder or its hub id."""
    config = read_json(locate(args.model, "config.json", args.revision))
    names = f"{config.get('_name_or_path', '')} {model_name(args.model)}".lower()
    template = args.template or ("vicuna" if "vicuna" in names else "plain")
    if args.system is not None and template == "plain":
        raise UserError("--system needs a chat model: this one goes on with plain text (or say --template vicuna)")
    return template
