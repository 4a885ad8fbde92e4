"""Heads on disk: our own folders, the official v0.1 files, heads inside a whole model (1.0), vLLM's; every check."""
import re
import sys
from pathlib import Path
import torch
from loading.checkpoint import HEADS_INSIDE, Checkpoint, open_tensors, weight_files
from loading.config import MOST
from loading.files import UserError, locate, read_json, write_json, write_tensors
from loading.vllm import VLLM_BLOCK, VLLM_KEYS, VllmHeads, official_config, official_names, vllm_name, without_bias

KINDS = ("medusa", "root", "hydra")     # what a head sees beside the hidden state: see variants/heads.py

def find_heads(name_or_path, model_config, revision=None, required=True) -> Checkpoint | None:
    """The heads in a folder or under a hub id, for a model with this LlamaConfig: their options, read off the tensors'
    names, and their tensors by the official names; none is read yet. None: not `required`, and a whole model has none
    among its tensors. UserError: the config disagrees, or the model is of another shape."""
    config = read_json(locate(name_or_path, "config.json", revision))
    whole = is_whole(config)
    config = config if whole else official_config(config, model_config.vocab_size)
    check_heads_config(config, name_or_path, model_config)
    source, files = f"heads {name_or_path}", head_files(name_or_path, config, revision)
    found = open_tensors(files, source)
    official = whole or files[0].stem == "medusa_lm_head"
    if whole:                                               # the base model's tensors are in the same files
        found = {n: stored for n, stored in found.items() if n.startswith(HEADS_INSIDE)}
        if not (required or found or "medusa_num_heads" in config):
            return None
    found = {n.removeprefix(HEADS_INSIDE).removeprefix("medusa_heads."): stored for n, stored in found.items()}
    of_vllm = any(map(VLLM_BLOCK.match, found))
    found = official_names(found, config) if of_vllm else found
    num_heads, num_layers, tied = count_heads(found, config, source, official)
    options = {
        "num_heads": num_heads, "num_layers": num_layers, "tie_lm_head": tied, "width": config.get("medusa_width"),
        "kind": config.get("medusa_kind") or "medusa", "recent": config.get("medusa_recent") or 1,
        "trunk": config.get("medusa_trunk"), "draft_size": config.get("draft_vocab_size")}
    share(found, num_heads, num_layers, config, official)
    if not of_vllm:
        return Checkpoint(source, options, found)
    if not (config.get("medusa_fc_bias") or any(name.endswith(".bias") for name in found)):
        found |= without_bias(num_heads, num_layers, model_config.hidden_size)
    return VllmHeads(source, options, found, vllm_name)

def is_whole(config: dict) -> bool:
    """Whether a config.json is that of a whole model: heads alone have the model_type medusa, or none."""
    guess = "llama" if "num_attention_heads" in config else "medusa"
    return (config.get("model_type") or guess) != "medusa"

def share(found: dict, num_heads: int, num_layers: int, config: dict, official: bool) -> None:
    """Give to all what is stored once: vLLM's shared matrix; the official code's blocks of a head, which are one
    module, so that safetensors keep one of them."""
    if config.get("original_lm_head") and (matrix := found.get(f"0.{num_layers}.weight")):
        found |= {f"{k}.{num_layers}.weight": matrix for k in range(num_heads)}
    blocks = {name: stored for name, stored in found.items() if ".linear." in name}
    if official and len(blocks) == 2 * num_heads:               # a weight and a bias for each head
        for name, stored in blocks.items():
            k, _, rest = name.split(".", 2)
            for j in range(num_layers):
                found.setdefault(f"{k}.{j}.{rest}", stored)

def check_heads_config(config: dict, name_or_path, model_config) -> None:
    whole = lambda v: type(v) is int and 1 <= v <= MOST
    counted = lambda v: whole(v) or v is None and (is_whole(config) or "model_type" in config)  # the names tell
    spelled = lambda key: VLLM_KEYS[key] if VLLM_KEYS.get(key) in config and not is_whole(config) else key
    vocab_size = model_config.vocab_size
    for key in ("hidden_size", "vocab_size"):
        size = getattr(model_config, key)
        if config.get(key, size) != size:
            raise UserError(f"{name_or_path}: the heads expect {key} {config[key]}, the model has {size}: "
                            "train heads for this model or pass --heads none")
    for key, fits, expected in (
            ("medusa_num_heads", counted, "a whole number"), ("medusa_num_layers", counted, "a whole number"),
            ("tie_lm_head", lambda v: v in (None, True, False), "true or false"),
            ("medusa_width", lambda v: v is None or whole(v), "a whole number or null"),
            ("medusa_kind", lambda v: v in (None, *KINDS), f"one of {', '.join(KINDS)}"),
            ("medusa_recent", lambda v: v is None or whole(v), "a whole number"),
            ("medusa_trunk", lambda v: v is None or whole(v), "a whole number or null"),
            ("draft_vocab_size", lambda v: v is None or whole(v) and v <= vocab_size, "at most the vocabulary")):
        if not fits(config.get(key)):
            raise UserError(f"{name_or_path}: not Medusa heads, config.json has {spelled(key)} {config.get(key)!r}, "
                            f"expected {expected}")

def head_files(name_or_path, config: dict, revision=None) -> list[Path]:
    """Where heads are kept: ours, the official ones beside a config (v0.1), or inside a whole model's files (v1.0)."""
    names = () if is_whole(config) else ("model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt")
    for name in names:
        if file := locate(name_or_path, name, revision, required=False):
            return [file]
    return weight_files(name_or_path, revision)

def count_heads(found: dict, config: dict, source: str, official: bool) -> tuple[int, int, bool]:
    """The number of heads and of blocks by the tensors' names, and whether there is no vocabulary matrix. Published
    configs name fewer heads than their files hold: all are used, and a line on stderr says so."""
    numbers_in = lambda name: [tuple(map(int, m.groups())) for m in map(re.compile(name).fullmatch, found) if m]
    numbers = numbers_in(r"(\d{1,9})\.(\d{1,9})\.(?:linear|up)\.weight")
    if not numbers:
        raise UserError(f"{source}: not Medusa heads: no Medusa heads among its tensors, expected names such as "
                        "0.0.linear.weight")
    num_heads, num_layers = (1 + max(column) for column in zip(*numbers, strict=True))
    matrices, most = numbers_in(r"0\.(\d{1,9})\.weight"), len(found)
    if official and matrices and len(numbers) == num_heads:     # one block of each head is stored: see `share`
        (num_layers,), most = max(matrices), 64 * num_heads
    if num_heads * num_layers > most:
        raise UserError(f"{source}: the tensors' names tell {num_heads} heads of {num_layers} blocks, but there are "
                        f"only {len(found)} tensors")
    tied, stated = f"0.{num_layers}.weight" not in found, config.get("medusa_num_heads") or num_heads
    if stated < num_heads:
        print(f"{source}: config.json says {stated} heads, the file holds {num_heads}: all are used", file=sys.stderr)
    for key, value, fits in (("medusa_num_heads", num_heads, stated <= num_heads),
                             ("medusa_num_layers", num_layers, config.get("medusa_num_layers") in (None, num_layers)),
                             ("tie_lm_head", tied, config.get("tie_lm_head") in (None, tied))):
        if not fits:
            raise UserError(f"{source}: config.json has {key} {config[key]!r}, the tensors tell {value!r}")
    return num_heads, num_layers, tied

def base_of(name_or_path, revision=None) -> str | None:
    """The model that some heads belong to, if the name is that of heads alone, as published: else None."""
    config = read_json(locate(name_or_path, "config.json", revision))
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and not is_whole(config) else None

def save_heads(folder, tensors: dict, config: dict, dtype: torch.dtype | None) -> None:
    """`model.safetensors` and `config.json`: the weights first, so that no config is ever without them."""
    tensors = {name: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous().clone()
               for name, t in tensors.items()}
    write_tensors(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", config)
