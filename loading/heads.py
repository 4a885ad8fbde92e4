"""Heads on disk: our own folders, the official v0.1 files, heads inside a whole model (1.0); every check of them."""
import re
import sys
from pathlib import Path
import torch
from loading.checkpoint import HEADS_INSIDE, Checkpoint, open_tensors, weight_files
from loading.config import MOST
from loading.files import UserError, locate, read_json, write_json, write_tensors

KINDS = ("medusa", "root", "hydra")     # what a head sees beside the hidden state: see variants/heads.py

def find_heads(name_or_path, model_config, revision=None) -> Checkpoint:
    """The heads in a folder or under a hub id, for a model with this LlamaConfig: their options, read off the tensors'
    names, and their tensors by the official names; none is read yet. UserError: the config disagrees, or the model is
    of another shape."""
    config = read_json(locate(name_or_path, "config.json", revision))
    check_heads_config(config, name_or_path, model_config)
    source = f"heads {name_or_path}"
    found = open_tensors(head_files(name_or_path, config, revision), source)
    if "model_type" in config:                              # the base model's tensors are in the same files
        found = {n: stored for n, stored in found.items() if n.startswith(HEADS_INSIDE)}
    found = {n.removeprefix(HEADS_INSIDE): stored for n, stored in found.items()}
    num_heads, num_layers, tied = count_heads(found, config, source)
    return Checkpoint(source, {
        "num_heads": num_heads, "num_layers": num_layers, "tie_lm_head": tied, "width": config.get("medusa_width"),
        "kind": config.get("medusa_kind") or "medusa", "recent": config.get("medusa_recent") or 1,
        "draft_size": config.get("draft_vocab_size")}, found)

def check_heads_config(config: dict, name_or_path, model_config) -> None:
    whole = lambda v: type(v) is int and 1 <= v <= MOST
    vocab_size = model_config.vocab_size
    for key, fits, expected in (
            ("medusa_num_heads", whole, "a whole number"), ("medusa_num_layers", whole, "a whole number"),
            ("tie_lm_head", lambda v: v in (None, True, False), "true or false"),
            ("medusa_width", lambda v: v is None or whole(v), "a whole number or null"),
            ("medusa_kind", lambda v: v in (None, *KINDS), f"one of {', '.join(KINDS)}"),
            ("medusa_recent", lambda v: v is None or whole(v), "a whole number"),
            ("draft_vocab_size", lambda v: v is None or whole(v) and v <= vocab_size, "at most the vocabulary")):
        if not fits(config.get(key)):
            raise UserError(f"{name_or_path}: not Medusa heads, config.json has {key} {config.get(key)!r}, "
                            f"expected {expected}")
    for key in ("hidden_size", "vocab_size"):
        size = getattr(model_config, key)
        if config.get(key, size) != size:
            raise UserError(f"{name_or_path}: the heads expect {key} {config[key]}, the model has {size}: "
                            "train heads for this model or pass --heads none")

def head_files(name_or_path, config: dict, revision=None) -> list[Path]:
    """Where heads are kept: ours, the official ones beside a config (v0.1), or inside a whole model's files (v1.0)."""
    if "model_type" in config:
        return weight_files(name_or_path, revision)
    for name in ("model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt"):
        if file := locate(name_or_path, name, revision, required=False):
            return [file]
    return [locate(name_or_path, "model.safetensors", revision)]

def count_heads(found: dict, config: dict, source: str) -> tuple[int, int, bool]:
    """The number of heads and of blocks by the tensors' names, and whether there is no vocabulary matrix. Published
    configs name fewer heads than their files hold: all are used, and a line on stderr says so."""
    blocks = [re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(?:linear|up)\.weight", name) for name in found]
    numbers = [tuple(map(int, match.groups())) for match in blocks if match]
    if not numbers:
        raise UserError(f"{source}: no Medusa heads among its tensors, expected names such as 0.0.linear.weight")
    num_heads, num_layers = (1 + max(column) for column in zip(*numbers, strict=True))
    if num_heads * num_layers > len(found):
        raise UserError(f"{source}: the tensors' names tell {num_heads} heads of {num_layers} blocks, but there are "
                        f"only {len(found)} tensors")
    tied, stated = f"0.{num_layers}.weight" not in found, config["medusa_num_heads"]
    if stated < num_heads:
        print(f"{source}: config.json says {stated} heads, the file holds {num_heads}: all are used", file=sys.stderr)
    for key, value, fits in (("medusa_num_heads", num_heads, stated <= num_heads),
                             ("medusa_num_layers", num_layers, config["medusa_num_layers"] == num_layers),
                             ("tie_lm_head", tied, config.get("tie_lm_head") in (None, tied))):
        if not fits:
            raise UserError(f"{source}: config.json has {key} {config[key]!r}, the tensors tell {value!r}")
    return num_heads, num_layers, tied

def check_token_map(ids, vocab_size: int, source: str) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) < len(ids):
        raise UserError(f"{source}: token_map must hold different ids below {vocab_size}")

def base_of(name_or_path, revision=None) -> str | None:
    """The model that some heads belong to, if the name is that of heads alone, as published: else None."""
    config = read_json(locate(name_or_path, "config.json", revision))
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and "model_type" not in config else None

def save_heads(folder, tensors: dict, config: dict, dtype: torch.dtype | None) -> None:
    """`model.safetensors` and `config.json`: the weights first, so that no config is ever without them."""
    tensors = {name: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous().clone()
               for name, t in tensors.items()}
    write_tensors(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", config)
