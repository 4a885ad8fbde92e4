"""The step in C++ on a CPU (native.cpp): built on first use, bound by ctypes, behind the names of Llama and Decoder."""
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
import torch
from torch import Tensor, nn
from llama import Llama, LlamaConfig, RMSNorm, rotary_table
from loading import checkpoint
from loading.files import UserError
from tinymedusa import GREEDY, ROOT, Decoder, MedusaHeads, NoHeads, Sampling, Stages, State, Tree, call
from variants.heads import HydraHeads, RootHeads, StrongHeads

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-pthread")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ROW_COUNTS = {0: 4, 1: 2, 2: 2, 3: 1}           # bytes of a weight of each kind
STAGES = ("medusa", "tree", "posterior", "update")
SEEN = {"medusa": 0, "root": 1, "hydra": 2}     # tokens that heads see, as native.cpp tells them apart

class Unavailable(Exception):
    """Why there is no native engine here, in one line."""

# --------------------------------------------------------------------------------------------------------- the build
def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinymedusa"

def processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

def build(compiler: str, flags: tuple, file: Path) -> None:
    """Compile native.cpp into `file`, whole or not at all; its last 32 bytes are the hash of those before."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder, "native.so")
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{compiler} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())
        os.replace(made, file)

def is_whole(file: Path) -> bool:
    code = file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(code[:-32]).digest() == code[-32:]

@lru_cache
def library(march: str = "-march=native") -> ctypes.CDLL:
    """The engine, built if the cache folder has none for this source, compiler and processor. Unavailable: it can't be
    built here."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "clang++", "g++")), None)
    if compiler is None or not shutil.which(compiler):
        raise Unavailable(f"there is no C++ compiler ({compiler or 'c++, clang++ or g++'})")
    flags = (*FLAGS, march)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join((SOURCE.read_text(), compiler, version, *flags, processor())).encode()).hexdigest()
    for folder in (cache_folder(), Path(tempfile.gettempdir(), f"tinymedusa-{os.getuid()}")):
        file = folder / f"native-{key[:24]}.so"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_whole(file):
                build(compiler, flags, file)
            return bound(ctypes.CDLL(str(file)))
        except OSError as error:
            reason = error
    raise Unavailable(f"can't write it: {reason}")

def bound(lib: ctypes.CDLL) -> ctypes.CDLL:
    for name, result in (("new", c_void_p), ("lanes", c_int64), ("matrix_bytes", c_int64), ("forward", c_void_p),
                         ("draft", c_void_p), ("logits", c_void_p), ("clock", POINTER(c_double))):
        getattr(lib, f"engine_{name}").restype = result
    return lib

# ------------------------------------------------------------------------------------------------ structs of native.cpp
def fields(ints: str, pointers: str = "", doubles: str = "") -> list:
    return [(name, kind) for names, kind in ((ints, c_int64), (doubles, c_double), (pointers, c_void_p))
            for name in names.split()]

class MatrixStruct(Structure):
    _fields_ = fields("kind outputs inputs", "data scale bias")

class LayerStruct(Structure):
    _fields_ = [("input_norm", c_void_p), *((name, MatrixStruct) for name in "qkvo"), ("post_norm", c_void_p),
                *((name, MatrixStruct) for name in ("gate", "up", "down"))]

class ModelStruct(Structure):
    _fields_ = [*fields("hidden heads kv_heads head_dim layers", "", "eps"), *fields("", "layer norm"),
                ("lm_head", MatrixStruct), *fields("", "embedding cos sin")]

class BlockStruct(Structure):
    _fields_ = [("up", MatrixStruct), ("down", MatrixStruct)]

class HeadsStruct(Structure):
    _fields_ = [*fields("count layers recent seen trunk_width draft_size"), ("trunk", BlockStruct),
                *fields("", "block vocabulary token_map")]

class TreeStruct(Structure):
    _fields_ = fields("nodes deepest", "parent depth rank")

class SamplingStruct(Structure):
    _fields_ = [("temperature", c_double), ("top_k", c_int64), ("top_p", c_double)]

class StateStruct(Structure):
    _fields_ = [("cache", c_void_p), *fields("layer_stride row_stride blocks rows", "length token recent_hidden emitted "
                "remaining seed"), ("recent", c_int64)]

# ---------------------------------------------------------------------------------------------------------- the model
class Packed:
    """A matrix in the engine's layout, filled some rows at a time; in 8 bits the way of int8.py."""
    def __init__(self, lib: ctypes.CDLL, outputs: int, inputs: int, dtype: torch.dtype, bias: Tensor | None = None):
        self.lib, self.dtype, self.shape, self.bias = lib, dtype, (outputs, inputs), bias
        self.scale = torch.empty(outputs) if dtype == torch.int8 else None
        pointer = lambda tensor: None if tensor is None else tensor.data_ptr()
        self.struct = MatrixStruct(KINDS[dtype], outputs, inputs, None, pointer(self.scale), pointer(bias))
        self.bytes = lib.engine_matrix_bytes(byref(self.struct))

    def fill(self, rows: slice, values: Tensor) -> "Packed":
        values = values.to(torch.float32 if self.dtype == torch.int8 else self.dtype).contiguous()
        self.lib.engine_pack(byref(self.struct), c_int64(rows.start), c_int64(len(values)), c_void_p(values.data_ptr()))
        return self

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows as float32: ids [..] → [.., inputs]."""
        ids = ids.long().contiguous()
        out = torch.empty(*ids.shape, self.shape[1], device="cpu")
        self.lib.engine_embed(byref(self.struct), c_int64(ids.numel()), c_void_p(ids.data_ptr()),
                              c_void_p(out.data_ptr()))
        return out

def allocate(lib: ctypes.CDLL, matrices) -> Tensor:
    """One piece of memory for all of them, in their order, on large pages where the system has them."""
    sizes = [-(-matrix.bytes // 64) * 64 for matrix in matrices]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    lib.engine_large_pages(c_void_p(memory.data_ptr()), c_int64(len(memory)))
    for matrix, begin in zip(matrices, accumulate(sizes, initial=memory.data_ptr()), strict=False):
        matrix.struct.data = begin
    return memory

class NativeLinear(nn.Module):
    """lm_head, as a module."""
    def __init__(self, model: "NativeLlama", matrix: Packed):
        super().__init__()
        self.model, self.matrix = [model], matrix

    @property
    def weight(self) -> Tensor:
        weight = torch.empty(self.matrix.shape)
        return weight if weight.is_meta else self.matrix.rows(torch.arange(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] → [.., V] float32."""
        return self.model[0].product(self.matrix, x)

class NativeLlama(nn.Module):
    """A Llama whose weights the engine holds; what others ask of a Llama: config, norm, embed_tokens, lm_head, hidden
    states of ids."""
    def __init__(self, config: LlamaConfig, pieces, dtype: torch.dtype = torch.float32, quantized: bool = False):
        """pieces: (name, rows, values) of all parameters. quantized: 8 bits for all but embeddings. Unavailable."""
        super().__init__()
        if config.head_dim > 256:
            raise Unavailable(f"head_dim is {config.head_dim}, the engine's limit is 256")
        self.config, self.lib, self.dtype = config, library(), dtype
        with torch.device("meta"):
            skeleton = Llama(config)
        linear = torch.int8 if quantized else dtype
        self.matrices, self.vectors = {}, {}
        for name, module in skeleton.named_modules():
            if isinstance(module, nn.Linear) and not (name == "lm_head" and config.tie_word_embeddings and not quantized):
                bias = None if module.bias is None else torch.empty(len(module.bias))
                self.matrices[name] = Packed(self.lib, module.out_features, module.in_features, linear, bias)
        self.matrices["embed_tokens"] = Packed(self.lib, config.vocab_size, config.hidden_size, dtype)
        self.memory = allocate(self.lib, self.matrices.values())
        self.fill(pieces, dict(skeleton.named_parameters()))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm.weight = nn.Parameter(self.vectors["norm"], requires_grad=False)
        head = self.matrices.get("lm_head", self.matrices["embed_tokens"])
        self.lm_head, self.embed_tokens = NativeLinear(self, head), self.matrices["embed_tokens"].rows
        self.engine = self.new_engine(head)

    def fill(self, pieces, parameters: dict) -> None:
        for name, rows, values in pieces:
            owner, _, kind = name.rpartition(".")
            if kind == "bias":
                self.matrices[owner].bias[rows] = values.float()
            elif owner in self.matrices:
                self.matrices[owner].fill(rows, values)
                if owner == "embed_tokens" and self.config.tie_word_embeddings and "lm_head" in self.matrices:
                    self.matrices["lm_head"].fill(rows, values)
            else:
                vector = self.vectors.setdefault(owner, torch.empty(parameters[name].shape))
                vector[rows] = values.float()

    def new_engine(self, head: Packed) -> c_void_p:
        config, layers = self.config, (LayerStruct * self.config.num_hidden_layers)()
        names = {**{name: f"self_attn.{name}_proj" for name in "qkvo"},
                 **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}}
        for i, layer in enumerate(layers):
            for short, name in names.items():
                setattr(layer, short, self.matrices[f"layers.{i}.{name}"].struct)
            layer.input_norm = self.vectors[f"layers.{i}.input_layernorm"].data_ptr()
            layer.post_norm = self.vectors[f"layers.{i}.post_attention_layernorm"].data_ptr()
        self.tables, self.layers = rotary_table(config), layers
        cos, sin = (table.data_ptr() for table in self.tables)
        model = ModelStruct(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                            config.num_hidden_layers, config.rms_norm_eps, ctypes.addressof(layers),
                            self.norm.weight.data_ptr(), head.struct,
                            ctypes.addressof(self.matrices["embed_tokens"].struct), cos, sin)
        return c_void_p(self.lib.engine_new(byref(model)))

    def __del__(self):
        if "engine" in self.__dict__:
            self.lib.engine_free(self.engine)

    def set_threads(self, threads: int) -> None:
        self.lib.engine_threads(self.engine, c_int64(threads))

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=None, revision=None, quantized: bool = False) -> "NativeLlama":
        """As Llama.from_pretrained, packed straight from the files; dtype None: the checkpoint's own."""
        files = checkpoint.find(name_or_path, revision)
        config = LlamaConfig.from_dict(files.config)
        with torch.device("meta"):
            parameters = dict(Llama(config).named_parameters())
        files.check(parameters)
        return cls(config, files.read(parameters), dtype or checkpoint.TORCH_DTYPES[config.dtype], quantized)

    @classmethod
    def from_model(cls, model: Llama, dtype=None, quantized: bool = False) -> "NativeLlama":
        """A copy of a torch model's weights."""
        pieces = ((name, slice(0, len(p)), p.detach()) for name, p in model.named_parameters())
        return cls(model.config, pieces, dtype or model.norm.weight.dtype, quantized)

    def new_cache(self, rows: int, slots: int) -> Tensor:
        """[L, B, 2, G, blocks, D, W], see native.cpp."""
        lanes, config = self.lib.engine_lanes(), self.config
        blocks = 4 * -(-slots // (4 * lanes))
        return torch.zeros(config.num_hidden_layers, rows, 2, config.num_key_value_heads, blocks, config.head_dim, lanes)

    def product(self, matrix: Packed, x: Tensor) -> Tensor:
        rows = x.numel() // matrix.shape[1]
        x = x.float().contiguous()
        width = -(-matrix.shape[0] // (2 * self.lib.engine_lanes())) * 2 * self.lib.engine_lanes()
        y = torch.empty(rows, width)
        self.lib.engine_product(self.engine, byref(matrix.struct), c_int64(rows), c_void_p(x.data_ptr()),
                                c_void_p(y.data_ptr()))
        return y[:, :matrix.shape[0]].view(*x.shape[:-1], -1)

    def run(self, state: StateStruct, tree: TreeStruct | None, ids: Tensor, depth: Tensor) -> Tensor:
        """engine_forward: ids [B, T], depth [T] → hidden [B, T, H]."""
        at = self.lib.engine_forward(self.engine, byref(state), tree and byref(tree), c_int64(len(depth)),
                                     c_void_p(ids.data_ptr()), c_void_p(depth.data_ptr()))
        return tensor_at(at, ids.shape + (self.config.hidden_size,)).clone()

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states of whole texts: ids [B, T] → [B, T, H]."""
        hidden = []
        for row in ids.contiguous():
            cache, length = self.new_cache(1, len(row)), torch.zeros(1, dtype=torch.long)
            for part in row.split(256):
                state = StateStruct(*cache_fields(cache), 1, length.data_ptr())
                hidden.append(self.run(state, None, part[None].contiguous(), torch.arange(len(part))))
                length += len(part)
        return torch.cat(hidden, dim=1).view(*ids.shape, -1)

def cache_fields(cache: Tensor) -> tuple:
    return cache.data_ptr(), cache.stride(0), cache.stride(1), cache.shape[4]

def tensor_at(address: int, shape: tuple, kind=ctypes.c_float) -> Tensor:
    """Memory of the engine as a tensor, until its next call."""
    size = kind * torch.Size(shape).numel()
    return torch.frombuffer(size.from_address(address), dtype=torch.long if kind is c_int64 else torch.float32).view(shape)

# ---------------------------------------------------------------------------------------------------------- the heads
class PackedHeads:
    """Heads of any trained kind in bfloat16: verification decides, so their rounding changes no token."""
    def __init__(self, model: NativeLlama, heads: MedusaHeads):
        self.lib, self.kept = model.lib, []
        layers, width = len(heads[0]) - (not getattr(heads, "tie_lm_head", False)), getattr(heads, "trunk_width", None)
        blocks = [self.block(block) for k in range(len(heads)) for block in list(heads[k])[:layers]]
        self.blocks = (BlockStruct * len(blocks))(*blocks)
        self.vocabulary = (MatrixStruct * len(heads))(*self.vocabularies(model, heads, layers))
        self.token_map = getattr(heads, "token_map", None)
        self.struct = HeadsStruct(len(heads), layers, heads.recent, SEEN[getattr(heads, "kind", "medusa")], width or 0,
                                  heads.draft_size)
        if width:
            self.struct.trunk = self.block(heads.trunk)
        self.struct.block, self.struct.vocabulary = ctypes.addressof(self.blocks), ctypes.addressof(self.vocabulary)
        self.struct.token_map = None if self.token_map is None else self.token_map.data_ptr()

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> MatrixStruct:
        bias = None if bias is None else bias.detach().float().contiguous()
        packed = Packed(self.lib, *weight.shape, torch.bfloat16, bias)
        self.kept += [packed, allocate(self.lib, [packed])]
        packed.fill(slice(0, len(weight)), weight.detach())
        return packed.struct

    def block(self, block: nn.Module) -> BlockStruct:
        """A ResBlock, or a Block of variants/heads.py."""
        if hasattr(block, "linear"):
            return BlockStruct(self.pack(block.linear.weight, block.linear.bias))
        return BlockStruct(self.pack(block.up.weight, block.up.bias), self.pack(block.down.weight))

    def vocabularies(self, model: NativeLlama, heads: MedusaHeads, layers: int) -> list[MatrixStruct]:
        if not getattr(heads, "tie_lm_head", False):
            return [self.pack(heads[k][layers].weight) for k in range(len(heads))]
        shared = model.lm_head.matrix.struct if heads.token_map is None else self.pack(heads.lm_head_rows())
        return [shared] * len(heads)

# -------------------------------------------------------------------------------------------------------- the decoder
class NativeDecoder(Decoder):
    """Decoder whose step is one call of the engine; in pieces where one of its stages is replaced or watched. Its state is
    written in place."""
    REPLACED = {"draft", "verify", "accept", "commit", "forward", "noise"}

    def __init__(self, model: NativeLlama, heads=None, tree: Tree = ROOT, sampling: Sampling = GREEDY, eos=None, run=call):
        super().__init__(model, NoHeads() if heads is None else heads, tree, sampling, eos, run)
        if len(tree.paths) > 64:
            raise UserError(f"a tree of {len(tree.paths)} nodes: the native step's limit is 64")
        trained = type(heads) in (MedusaHeads, StrongHeads, RootHeads, HydraHeads)
        self.packed = PackedHeads(model, heads) if trained else None
        self.plain = isinstance(self.heads, NoHeads)
        self.bound = None
        tree = self.tree
        self.tree_struct = TreeStruct(len(tree.paths), len(tree.paths[-1]), tree.parent.data_ptr(), tree.depth.data_ptr(),
                                      tree.rank.data_ptr())
        self.sampling_struct = SamplingStruct(*map(float, sampling[:1]), sampling.top_k, sampling.top_p)

    def new_cache(self, prompts: list, max_new_tokens: int) -> Tensor:
        longest = max(map(len, prompts)) + max_new_tokens
        slots = min(longest, self.model.config.max_position_embeddings) + len(self.tree.paths)
        return self.model.new_cache(len(prompts), slots)

    def window(self, used: int, cache: Tensor) -> int:
        return used                                                             # the engine reads what there is

    def bind(self, state: State) -> State:
        """The state as the engine reads and writes it."""
        if self.bound is None or state is not self.bound:
            state = State(state.cache, *(tensor.contiguous() for tensor in state[1:]))
            pointers = [tensor.data_ptr() for tensor in state[1:]]
            self.bound, rows = state, len(state.length)
            self.state_struct = StateStruct(*cache_fields(state.cache), rows, *pointers, state.recent_hidden.shape[1])
            P = self.tree.retrieve.shape[1]
            self.out, self.count = torch.zeros(rows, P, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
            self.arguments = [self.model.engine, byref(self.state_struct), self.packed and byref(self.packed.struct),
                              byref(self.tree_struct), byref(self.sampling_struct), *self.ends(),
                              c_void_p(self.out.data_ptr()), c_void_p(self.count.data_ptr())]
        return state

    def ends(self) -> tuple:
        return c_int64(len(self.eos)), c_void_p(self.eos.data_ptr())

    def step(self, state: State, window: int, run) -> tuple[State, Tensor, Tensor]:
        watched = run is not call and type(run) is not Stages
        if watched or self.REPLACED & self.__dict__.keys() or not (self.plain or self.packed):
            return super().step(state, window, run)
        state = self.bind(state)
        self.model.lib.engine_step(*self.arguments)
        if run is not call:
            clock = self.model.lib.engine_clock(self.model.engine)
            if self.plain:
                run.seconds.setdefault("base_inference", []).append(clock[4] - clock[0])
            for i, name in enumerate(() if self.plain else STAGES):
                run.seconds.setdefault(name, []).append(clock[i + 1] - clock[i])
        return state, self.out, self.count

    def draft(self, state: State) -> tuple[Tensor, Tensor | None]:
        if not self.packed:
            return super().draft(state)
        state = self.bind(state)
        lib, (engine, *arguments) = self.model.lib, self.arguments[:5]
        ids = tensor_at(lib.engine_draft(engine, *arguments), (len(state.length), len(self.tree.paths)), c_int64)
        return ids.clone(), self.noise(state)

    def forward(self, ids, depth, ancestors, cache: Tensor, length: Tensor, window: int) -> Tensor:
        state = StateStruct(*cache_fields(cache), len(length), length.data_ptr())
        tree = self.tree_struct if ancestors is self.tree.ancestors else None
        return self.model.run(state, tree, ids.contiguous(), depth)

    def commit(self, state: State, hidden: Tensor, path: Tensor, out: Tensor, count: Tensor):
        state = self.bind(state)
        path, out, hidden, count = path.contiguous(), out.contiguous(), hidden.contiguous(), count.clone()
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (hidden, out, count)]
        self.model.lib.engine_commit(self.model.engine, byref(self.state_struct), c_int64(path.shape[1]),
                                     c_void_p(path.data_ptr()), c_int64(hidden.shape[1]), *pointers, *self.ends())
        return state, out, count
