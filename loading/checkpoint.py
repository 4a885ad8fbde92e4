"""Weights on disk: safetensors or pickles, whole or in shards, → checked (name, rows, values), a few rows at a time."""
import gc
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from loading.config import DTYPES, read_config, to_json
from loading.files import UserError, locate, read_json, write_json, write_tensors

HEADS_INSIDE = "medusa_head."       # how the names begin of heads in the model's own file, as Medusa 1.0 writes them
READ_AT_ONCE = 2 ** 23              # bytes that are read of a mapped file before it is opened anew
TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
FLOATS = ("F64", "F32", "F16", "BF16", *TORCH_DTYPES.values())      # as safetensors names them, and torch
INTEGERS = ("I64", "I32", "I16", "I8", "U8", torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = ("C64", torch.complex64, torch.complex128)

class Stored(NamedTuple):
    """Where a tensor is: nothing of it is read yet."""
    file: Path
    shape: tuple
    dtype: object
    name: str           # in the file

class Checkpoint(NamedTuple):
    """What a model or heads are built with, and the tensors of their files by our parameters' names."""
    source: str
    config: dict
    tensors: dict[str, Stored]
    name_in_files: object = str     # a function of a parameter's name

    def check(self, parameters: dict) -> None:
        """UserError that names every missing, unexpected and wrongly shaped or typed tensor."""
        found = self.tensors
        matrices = tuple(name.removesuffix("weight") for name, tensor in parameters.items() if tensor.dim() == 2)
        for name, stored in found.items():          # else hundreds would be missing, and hundreds unexpected
            if name.startswith(matrices) and stored.dtype not in FLOATS + COMPLEX:
                raise UserError(f"{self.source}: the weights are quantised, {stored.name} holds {stored.dtype}: "
                                "give the unquantised model")
        missing = [self.name_in_files(n) for n in parameters if n not in found]
        # inv_freq: rotary frequencies that old transformers stored; they are derived from the config
        unexpected = [s.name for n, s in found.items() if n not in parameters and not n.endswith("rotary_emb.inv_freq")]
        problems = [f"{title}: {', '.join(names)}"
                    for title, names in (("missing", missing), ("unexpected", unexpected)) if names]
        stored = [(found[n], tensor) for n, tensor in parameters.items() if n in found]
        problems += [f"{s.name} has shape {list(s.shape)}, expected {list(tensor.shape)}"
                     for s, tensor in stored if s.shape != tuple(tensor.shape)]
        for s, tensor in stored:
            kind, fitting = ("floats", FLOATS) if tensor.is_floating_point() else ("integers", INTEGERS)
            problems += [f"{s.name} holds {s.dtype}, expected {kind}"] if s.dtype not in fitting else []
        if problems:
            raise UserError(f"{self.source}: the tensors do not fit the config: {'; '.join(problems)}")

    def read(self, parameters: dict):
        """Yield (name, rows, values): a slice of rows of a parameter and what it is to hold. `check` comes first. At
        the end a line on stderr names the first tensor that holds NaN or a number too large to be squared, if any."""
        opened, used, odd = {}, 0, None
        for name, parameter in parameters.items():
            stored = self.tensors[name]
            step = max(1, READ_AT_ONCE // max(1, 4 * math.prod(stored.shape[1:])))
            for begin in range(0, len(parameter), step):
                if used >= READ_AT_ONCE:
                    opened, used, values = {}, 0, None  # unmapped: else all that was read would count as ours,
                    gc.collect(1)                       # and so would a pickle's, which keeps itself alive
                if stored.file not in opened:
                    opened[stored.file] = open_file(stored.file, self.source)
                rows = slice(begin, min(begin + step, len(parameter)))
                try:
                    values = opened[stored.file][stored.name][rows].contiguous()
                    finite = not values.numel() or all(-1e18 < v < 1e18 for v in values.aminmax())
                except (RuntimeError, SafetensorError) as error:    # a sparse tensor, one without data
                    raise UserError(f"{self.source}: can't read {stored.name} of {stored.file}: {error}") from error
                yield name, rows, values
                used += 4 * values.numel()
                odd = odd if finite else odd or stored.name
        if odd:
            print(f"{self.source}: {odd} holds NaN or numbers too large to compute with: expect nonsense",
                  file=sys.stderr)

def full_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"

def default_dtype(stored: str, device) -> torch.dtype:
    """What a model is loaded in unless told: float32 on a CPU, else as it is stored."""
    return torch.float32 if torch.device(device).type == "cpu" else TORCH_DTYPES[stored]

def find(name_or_path, revision=None) -> Checkpoint:
    """The model in a folder or under a hub id. UserError: a file can't be read."""
    source, config = f"model {name_or_path}", read_config(name_or_path, revision)
    tensors = {name.removeprefix("model."): stored
               for name, stored in open_tensors(weight_files(name_or_path, revision), source).items()
               if not name.startswith(HEADS_INSIDE)}
    layers = config.get("num_hidden_layers", 32)
    if isinstance(layers, int) and layers > len(tensors):       # before they are built
        raise UserError(f"{source}: config.json says {layers} layers, the files hold only "
                        f"{len(tensors)} tensors: they don't belong together")
    if "lm_head.weight" in tensors and config.get("tie_word_embeddings") is True:
        config["tie_word_embeddings"] = False       # though the config says tied: HF, too, takes the file's word
    return Checkpoint(source, config, tensors, full_name)

def weight_files(name_or_path, revision=None) -> list[Path]:
    """The weights of a model: safetensors, else PyTorch's pickles; one file, else the shards that an index names, as in
    HF. An index that was left without any shard is passed over."""
    names = ["model.safetensors"]
    for single in ("model.safetensors", "pytorch_model.bin"):
        if file := locate(name_or_path, single, revision, required=False):
            return [file]
        if index := locate(name_or_path, f"{single}.index.json", revision, required=False):
            names = shards_of(index)
            if any(locate(name_or_path, name, revision, required=False) for name in names):
                break
    return [locate(name_or_path, name, revision) for name in names]

def shards_of(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not {str}.issuperset(map(type, weight_map.values() or [None])):
        raise UserError(f"{index}: weight_map must be an object of file names")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if Path(name).name != name:
            raise UserError(f"{index} names the shard {name!r}: a shard must lie beside its index")
    return shards

def open_file(file: Path, source: str) -> dict:
    """A safetensors file, or a pickle of tensors and nothing else: name → something with a shape to take rows [a:b] of.
    Mapped, not read: what is used of it counts as memory until it is closed."""
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, "pt")
            return {name: handle.get_slice(name) for name in handle.keys()}
        with warnings.catch_warnings(action="ignore"):      # about what a damaged pickle calls
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:      # of a damaged pickle it may be any
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{source}: can't read {file}, is it whole? {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{source}: {file} is not a dictionary of tensors")
    return tensors

def open_tensors(files, source: str) -> dict[str, Stored]:
    """The tensors of some files by name; none is read yet."""
    found = {}
    for file in map(Path, files):
        for name, t in open_file(file, source).items():
            if name in found:
                raise UserError(f"{source}: {name} is in {found[name].file} and in {file}: which one is meant?")
            shape, dtype = (t.shape, t.dtype) if isinstance(t, Tensor) else (t.get_shape(), t.get_dtype())
            found[name] = Stored(file, tuple(shape), dtype, name)
    return found

def save(folder, fields: dict, parameters: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write a LlamaConfig's fields and the parameters, in `dtype` or as they are, in HF's layout: the weights first."""
    tensors = {full_name(name): p.detach().to("cpu", dtype).contiguous().clone() for name, p in parameters.items()}
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_tensors(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", to_json(fields | {"dtype": stored}))

def entire(pieces) -> dict:
    """What `Checkpoint.read` yields, put together: name → tensor."""
    found = {}
    for name, _, values in pieces:
        found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}

def check_token_map(ids, vocab_size: int, source: str) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) < len(ids):
        raise UserError(f"{source}: token_map must hold different ids below {vocab_size}")
