"""Heads for other programs, file to file, bit for bit: FasterDecoding's code (v0.1 and 1.0) and vLLM."""
import json
import re
from functools import partial, reduce
from pathlib import Path
import torch
from safetensors.torch import save_file
from loading.checkpoint import HEADS_INSIDE, Checkpoint, check_token_map, entire
from loading.files import TOKENIZER, UserError, locate, read_json, replacing, tokenizer_files
from loading.heads import find_heads
from loading.vllm import vllm_config, vllm_name

LAYOUTS = ("official", "official-1.0", "vllm")

def export(layout: str, folder, out, model, base: Checkpoint, parameters: dict, config) -> str:
    """Write the heads in `folder` to a new folder `out`, all or nothing, and say so. Of the base model in `model`: its
    files, its parameters by name (their shapes count) and its LlamaConfig. UserError: the layout can't hold them."""
    taken = {p.name for pattern in ("config.json", "*.safetensors", "*.pt", "*.bin", *TOKENIZER)
             for p in Path(out).glob(pattern)}
    if taken:
        raise UserError(f"{out} holds {', '.join(sorted(taken))}, nothing is written over: give --out a new folder")
    heads = find_heads(folder, config)
    check_kind(layout, heads)
    tensors, copied = plain_tensors(heads, base, parameters, config), {}
    described = {"medusa_num_heads": heads.config["num_heads"], "medusa_num_layers": heads.config["num_layers"]}
    if layout == "vllm":
        described = vllm_config(*described.values(), tensors, config)
        tensors = {vllm_name(name): t for name, t in tensors.items()}
    else:
        check_blocks(layout, heads.source, tensors)
    if layout == "official":
        described = {"base_model_name_or_path": str(model)} | described
    if layout == "official-1.0":
        tensors = {HEADS_INSIDE + name: t for name, t in tensors.items()}
        tensors |= {base.name_in_files(name): t for name, t in entire(base.read(parameters)).items()}
        tied = {"tie_word_embeddings": config.tie_word_embeddings}
        described = read_json(locate(model, "config.json")) | tied | described
        copied = tokenizer_files(model)
    write(out, "medusa_lm_head.pt" if layout == "official" else "model.safetensors", tensors, copied, described)
    return f"{out}: {heads.config['num_heads']} heads in the layout {layout}"

def write(out, file: str, tensors: dict, copied: dict, config: dict) -> None:
    save = torch.save if file.endswith(".pt") else partial(save_file, metadata={"format": "pt"})
    with replacing(*(Path(out) / name for name in (file, *copied, "config.json"))) as (weights, *copies, last):
        save(tensors, weights)
        for path, original in zip(copies, copied.values(), strict=True):
            path.write_bytes(original.read_bytes())
        last.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

def check_kind(layout: str, heads: Checkpoint) -> None:
    kind, recent, width, trunk, size, count = map(heads.config.get, (
        "kind", "recent", "width", "trunk", "draft_size", "num_heads"))
    for wrong, what, reason in (
            (kind != "medusa", f"kind {kind!r}", "its heads see hidden states only"),
            (recent > 1, f"recent {recent}", "its heads see one hidden state"),
            (width, f"width {width}", "its blocks are square"),
            (trunk, f"trunk {trunk}", "its heads share no block"),
            (size and layout != "vllm", f"a draft vocabulary of {size}", "its heads guess any token"),
            (count > 5 and layout == "official", f"{count} heads", "its loader makes 5, that of official-1.0 any")):
        if wrong:
            raise UserError(f"{heads.source}: {layout} can't hold {what}: {reason}; export other heads")

def check_blocks(layout: str, source: str, tensors: dict) -> None:
    for name, t in tensors.items():
        if ".linear." in name and not t.equal(tensors[re.sub(r"\.\d+\.", ".0.", name)]):
            raise UserError(f"{source}: {layout} can't hold {name}: its blocks of a head are one module, used several "
                            "times; export heads of one block, or for vllm")

def plain_tensors(heads: Checkpoint, base: Checkpoint, parameters: dict, config) -> dict:
    """The paper's heads by the official names, in one dtype that loses nothing; a copy of a shared lm_head for each."""
    size, draft_size, num_layers = config.hidden_size, heads.config["draft_size"], heads.config["num_layers"]
    numbers = range(heads.config["num_heads"])
    block = {"weight": (size, size), "bias": (size,)}
    shapes = {f"{k}.{j}.linear.{name}": block[name] for k in numbers for j in range(num_layers) for name in block}
    matrices = {f"{k}.{num_layers}.weight": (draft_size or config.vocab_size, size) for k in numbers}
    shapes |= {} if heads.config["tie_lm_head"] else matrices
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if draft_size:
        expected["token_map"] = torch.empty(draft_size, dtype=torch.long, device="meta")
    heads.check(expected)
    tensors = entire(heads.read(expected))
    token_map = {"token_map": tensors.pop("token_map")} if draft_size else {}
    for ids in token_map.values():
        check_token_map(ids, config.vocab_size, heads.source)
    if heads.config["tie_lm_head"]:
        name = "lm_head.weight" if "lm_head.weight" in parameters else "embed_tokens.weight"
        rows = entire(base.read({name: parameters[name]}))[name]
        tensors |= dict.fromkeys(matrices, rows[token_map["token_map"]] if token_map else rows)
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    return {name: t.to(dtype, copy=True) for name, t in tensors.items()} | token_map
