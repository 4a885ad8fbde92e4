"""vLLM's layout of Medusa heads: its names and config keys, and what its files leave out."""
import re
import torch
from loading.checkpoint import Checkpoint, Stored, check_token_map, entire

VLLM_KEYS = {"medusa_num_heads": "num_heads", "medusa_num_layers": "num_hidden_layers",
             "draft_vocab_size": "truncated_vocab_size"}
VLLM_BLOCK = re.compile(r"blocks\.(\d{1,9})\.layers\.(\d{1,9})\.")

def official_config(config: dict, vocab_size: int) -> dict:
    """With vLLM's keys by the names of ours; without a draft vocabulary that is the whole one."""
    named = {ours: config[theirs] for ours, theirs in VLLM_KEYS.items() if theirs in config}
    if named.get("draft_vocab_size") == vocab_size:
        del named["draft_vocab_size"]
    return named | config

def official_names(found: dict, config: dict) -> dict:
    """vLLM's names → the official ones. A matrix that all heads share (original_lm_head) becomes the first head's."""
    matrix = f".{1 + max(int(match[2]) for match in map(VLLM_BLOCK.match, found) if match)}."
    found = {VLLM_BLOCK.sub(r"\1.\2.linear.", name): stored for name, stored in found.items()}
    found = {re.sub(r"^lm_heads\.(\d{1,9})\.", rf"\1{matrix}", name): stored for name, stored in found.items()}
    if config.get("original_lm_head") and (shared := found.pop("lm_head.weight", None)):
        found.setdefault(f"0{matrix}weight", shared)
    if not config.get("draft_vocab_size"):
        found.pop("token_map", None)
    return found

def vllm_name(name: str) -> str:
    """An official name → vLLM's."""
    name = re.sub(r"^(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)
    return re.sub(r"^(\d+)\.\d+\.", r"lm_heads.\1.", name)

def without_bias(num_heads: int, num_layers: int, size: int) -> dict:
    """The biases of a file that has none: zeros."""
    zeros = Stored(None, (size,), torch.float32, "")
    return {f"{k}.{j}.linear.bias": zeros for k in range(num_heads) for j in range(num_layers)}

class VllmHeads(Checkpoint):
    """Of vLLM's layout: a bias that its file leaves out is zero; of a matrix for all ids, token_map's rows count."""
    def in_file(self, parameters: dict) -> dict:
        """The parameters' shapes, with all the rows that the file has."""
        rows = {name: (*stored.shape, 0)[0] for name, stored in self.tensors.items()
                if "token_map" in self.tensors and re.fullmatch(r"\d+\.\d+\.weight", name)}
        return {name: torch.empty(max(len(p), rows.get(name, 0)), *p.shape[1:], dtype=p.dtype, device="meta")
                for name, p in parameters.items()}

    def check(self, parameters: dict) -> None:
        super().check(self.in_file(parameters))

    def read(self, parameters: dict):
        for name, stored in self.in_file(parameters).items():
            if self.tensors[name].file is None:
                yield name, slice(None), torch.zeros(stored.shape, dtype=torch.bool)    # of no float dtype of its own
            elif stored.shape == parameters[name].shape:
                yield from super().read({name: stored})
            else:
                ids = entire(super().read({"token_map": parameters["token_map"]}))["token_map"]
                check_token_map(ids, len(stored), self.source)
                yield name, slice(None), entire(super().read({name: stored}))[name][ids]

def vllm_config(num_heads: int, num_layers: int, tensors: dict, config) -> dict:
    matrix, vocab_size = tensors[f"0.{num_layers}.weight"], config.vocab_size
    dtype = str(matrix.dtype).removeprefix("torch.")
    return {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": num_heads,
            "num_hidden_layers": num_layers, "hidden_size": config.hidden_size, "vocab_size": vocab_size,
            "truncated_vocab_size": len(matrix), "medusa_fc_bias": True, "original_lm_head": False,
            "dtype": dtype, "torch_dtype": dtype}
