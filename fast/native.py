"""native.cpp behind the names of llama.py and tinymedusa.py: NativeLlama holds the weights, NativeDecoder steps."""
import ctypes
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from itertools import accumulate
import torch
from torch import Tensor, nn
from fast.build import Unavailable, library
from llama import Llama, LlamaConfig, RMSNorm, rotary_table
from loading import checkpoint
from loading.files import UserError
from tinymedusa import GREEDY, ROOT, Decoder, MedusaHeads, NoHeads, Sampling, Stages, State, Tree, call
from variants.heads import HydraHeads, RootHeads, StrongHeads
from variants.lookup import LookupDecoder

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}      # enum Kind
SEEN = {"medusa": 0, "root": 1, "hydra": 2}     # Heads.seen
STAGES = ("medusa", "tree", "posterior", "update")
MOST_NODES, WIDEST_HEAD = 64, 256
CACHE = 8 * 2 ** 20     # bytes: more weights are read from memory at each step

# ------------------------------------------------------------------------------------------------ structs of native.cpp
def fields(names: str, kind=c_int64) -> list:
    return [(name, kind) for name in names.split()]

def pointers(names: str) -> list:
    return fields(names, c_void_p)

class MatrixStruct(Structure):
    _fields_ = fields("kind outputs inputs from_memory") + pointers("data scale bias")

class LayerStruct(Structure):
    _fields_ = (pointers("input_norm") + fields("q k v o", MatrixStruct) +
                pointers("post_norm") + fields("gate up down", MatrixStruct))

class ModelStruct(Structure):
    _fields_ = (fields("hidden heads kv_heads head_dim layers") + fields("eps", c_double) + pointers("layer norm") +
                fields("lm_head screen", MatrixStruct) + pointers("screen_error") + fields("table_kind") +
                pointers("table cos sin"))

class BlockStruct(Structure):
    _fields_ = fields("up down", MatrixStruct)

class HeadsStruct(Structure):
    _fields_ = (fields("count layers recent seen trunk_width draft_size") + fields("trunk", BlockStruct) +
                pointers("block vocabulary token_map"))

class TreeStruct(Structure):
    _fields_ = fields("nodes deepest") + pointers("parent depth rank")

class SamplingStruct(Structure):
    _fields_ = fields("temperature", c_double) + fields("top_k") + fields("top_p min_p", c_double)

class StateStruct(Structure):
    _fields_ = (pointers("cache") + fields("layer_stride row_stride blocks rows") +
                pointers("length token recent_hidden emitted remaining seed") + fields("recent"))

def at(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())

def on_cache(cache: Tensor, length: Tensor, *others) -> StateStruct:
    """A state on a cache of `NativeLlama.new_cache`."""
    return StateStruct(at(cache), cache.stride(0), cache.stride(1), cache.shape[4], len(length), at(length), *others)

def tensor_at(address: int, shape: tuple, kind=ctypes.c_float) -> Tensor:
    """A copy of numbers in the engine's memory."""
    numbers = (kind * torch.Size(shape).numel()).from_address(address)
    return torch.frombuffer(numbers, dtype=torch.long if kind is c_int64 else torch.float32).view(shape).clone()

def engine() -> ctypes.CDLL:
    """The compiled functions. Unavailable: see fast/build.py."""
    lib = library()
    for name in ("new", "forward", "draft", "clock"):
        getattr(lib, f"engine_{name}").restype = c_void_p
    for name in ("lanes", "screens", "matrix_bytes"):
        getattr(lib, f"engine_{name}").restype = c_int64
    return lib

# ---------------------------------------------------------------------------------------------------------- the model
class Packed:
    """A matrix in the engine's layout, filled some rows at a time; in 8 bits as int8.py rounds."""
    def __init__(self, lib: ctypes.CDLL, shape: tuple, dtype: torch.dtype, bias: Tensor | None = None):
        self.lib, self.shape, self.dtype, self.bias = lib, shape, dtype, bias
        self.scale = torch.empty(shape[0]) if dtype == torch.int8 else None
        self.struct = MatrixStruct(KINDS[dtype], *shape, 0, None, at(self.scale), at(bias))
        self.bytes, panel = lib.engine_matrix_bytes(byref(self.struct)), 2 * lib.engine_lanes()
        self.width = -(-shape[0] // panel) * panel      # of a row of outputs

    def fill(self, rows: slice, values: Tensor) -> None:
        values = values.to(torch.float32 if self.dtype == torch.int8 else self.dtype).contiguous()
        self.lib.engine_pack(byref(self.struct), c_int64(rows.start), c_int64(len(values)), at(values))

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows as float32: ids [..] → [.., inputs]."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1], device="cpu")
        self.lib.engine_rows(byref(self.struct), c_int64(ids.numel()), at(ids), at(out))
        return out

def allocate(lib: ctypes.CDLL, matrices, from_memory: bool = False) -> Tensor:
    """One piece of memory for all of them, in their order, on large pages where the system has them."""
    sizes = [-(-matrix.bytes // 64) * 64 for matrix in matrices]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    lib.engine_large_pages(at(memory), c_int64(len(memory)))
    for matrix, begin in zip(matrices, accumulate(sizes, initial=memory.data_ptr()), strict=False):
        matrix.struct.data, matrix.struct.from_memory = begin, from_memory or sum(sizes) > CACHE
    return memory

class Screen(Packed):
    """The lm_head in 8 bits as well: a logit and its 8-bit one differ by at most |hidden| times the output's `error`:
    by Cauchy and Schwarz |rounding of the weights|, and |weights| times the rounding of the inputs (1/65278 of the
    largest, each) and of the sums (2^-24 each); 60000, + 16 and 1.001 leave room for all that is rounded besides."""
    def __init__(self, lib: ctypes.CDLL, shape: tuple, kept: torch.dtype):
        super().__init__(lib, shape, torch.int8)
        self.kept, self.error = kept, torch.zeros(self.width, device="cpu")

    def fill(self, rows: slice, values: Tensor) -> None:
        values, inputs = values.to(self.kept).float(), values.shape[1]
        super().fill(rows, values)
        rounding = values - self.rows(torch.arange(rows.start, rows.start + len(values)))
        relative = inputs ** 0.5 / 60000 + (inputs + 16) / 2 ** 23
        self.error[rows] = 1.001 * (rounding.norm(dim=1) + relative * values.norm(dim=1)) + 1e-20     # of tiny rows

class NativeLinear(nn.Module):
    """lm_head, as a module."""
    def __init__(self, model: "NativeLlama", matrix: Packed):
        super().__init__()
        self.model, self.matrix = [model], matrix

    @property
    def weight(self) -> Tensor:
        weight = torch.empty(self.matrix.shape)             # on "meta", where shapes are all that is asked for
        return weight if weight.is_meta else self.matrix.rows(torch.arange(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] → [.., V] float32."""
        model, (outputs, inputs) = self.model[0], self.matrix.shape
        x, rows = x.float().contiguous(), x.numel() // inputs
        y = torch.empty(rows, self.matrix.width)
        model.lib.engine_product(model.engine, byref(self.matrix.struct), c_int64(rows), at(x), at(y))
        return y[:, :outputs].view(*x.shape[:-1], outputs)

class NativeLlama(nn.Module):
    """A Llama whose weights the engine holds, with what is asked of a Llama: config, norm, embed_tokens, lm_head, and
    hidden states of whole texts."""
    def __init__(self, config: LlamaConfig, pieces, dtype: torch.dtype, quantized: bool = False):
        """pieces: (name, rows, values) of all parameters; dtype: what they are kept in, quantized: 8 bits for all but
        the embeddings. Unavailable: no engine, or not for this shape."""
        super().__init__()
        if dtype not in KINDS:
            raise Unavailable(f"the C++ step has no {str(dtype).removeprefix('torch.')}")
        if config.head_dim > WIDEST_HEAD:
            raise Unavailable(f"head_dim is {config.head_dim}, the C++ step's limit is {WIDEST_HEAD}")
        self.config, self.lib, self.matrices, self.vectors = config, engine(), {}, {}
        self.table = None               # of embeddings: none where they are lm_head's rows
        if quantized or not config.tie_word_embeddings:
            self.table = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device="cpu")
        with torch.device("meta"):
            skeleton = Llama(config)
        for name, module in skeleton.named_modules():
            if isinstance(module, nn.Linear):
                bias = None if module.bias is None else torch.empty(module.bias.shape, device="cpu")
                kept = torch.int8 if quantized else dtype
                self.matrices[name] = Packed(self.lib, tuple(module.weight.shape), kept, bias)
            elif isinstance(module, RMSNorm):
                self.vectors[name] = torch.empty(module.weight.shape, device="cpu")
                self.register_buffer(name.replace(".", "_") + "_weight", self.vectors[name])
        self.screen = None
        if not quantized and self.lib.engine_screens():
            self.screen = Screen(self.lib, self.matrices["lm_head"].shape, dtype)
        self.memory = allocate(self.lib, [m for m in (*self.matrices.values(), self.screen) if m])
        for name, rows, values in pieces:
            self.fill(name, rows, values)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm.weight = nn.Parameter(self.vectors["norm"], requires_grad=False)
        self.lm_head = NativeLinear(self, self.matrices["lm_head"])
        self.engine = self.new_engine()

    def fill(self, parameter: str, rows: slice, values: Tensor) -> None:
        """Some rows of a parameter of Llama."""
        name, _, kind = parameter.rpartition(".")
        if name == "embed_tokens":
            if self.table is not None:
                self.table[rows] = values.to(self.table.dtype)
            name = "lm_head" if self.config.tie_word_embeddings else name
        if name in self.vectors:
            self.vectors[name][rows] = values.float()
        elif kind == "bias":
            self.matrices[name].bias[rows] = values.float()
        elif name != "embed_tokens":
            self.matrices[name].fill(rows, values)
            if name == "lm_head" and self.screen:
                self.screen.fill(rows, values)

    def new_engine(self) -> c_void_p:
        config = self.config
        self.layers = (LayerStruct * config.num_hidden_layers)()
        for i, layer in enumerate(self.layers):
            for name in ("q", "k", "v", "o"):
                setattr(layer, name, self.matrices[f"layers.{i}.self_attn.{name}_proj"].struct)
            for name in ("gate", "up", "down"):
                setattr(layer, name, self.matrices[f"layers.{i}.mlp.{name}_proj"].struct)
            layer.input_norm = at(self.vectors[f"layers.{i}.input_layernorm"])
            layer.post_norm = at(self.vectors[f"layers.{i}.post_attention_layernorm"])
        self.cos, self.sin = rotary_table(config)
        table_kind = 0 if self.table is None else KINDS[self.table.dtype]
        bounded = self.screen and self.screen.error.isfinite().all()            # not where a weight is inf or NaN
        screen = (self.screen.struct, at(self.screen.error)) if bounded else (MatrixStruct(), None)
        model = ModelStruct(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                            config.num_hidden_layers, config.rms_norm_eps, ctypes.addressof(self.layers),
                            at(self.vectors["norm"]), self.lm_head.matrix.struct, *screen, table_kind,
                            at(self.table), at(self.cos), at(self.sin))
        return c_void_p(self.lib.engine_new(byref(model)))

    def __del__(self):
        if "engine" in self.__dict__:
            self.lib.engine_free(self.engine)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """[..] → [.., H] float32."""
        return self.lm_head.matrix.rows(ids) if self.table is None else self.table[ids].float()

    def set_threads(self, threads: int) -> None:
        self.lib.engine_threads(self.engine, c_int64(threads))

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=None, revision=None, quantized=False, context=None) -> "NativeLlama":
        """As Llama.from_pretrained, packed straight from the files; dtype None: the checkpoint's own 16 bits, or
        float32."""
        files = checkpoint.find(name_or_path, revision)
        config = LlamaConfig.from_dict(files.config, context)
        with torch.device("meta"):
            parameters = dict(Llama(config).named_parameters())
        files.check(parameters)
        stored = checkpoint.TORCH_DTYPES[config.dtype]
        own = stored if stored in KINDS else torch.float32
        return cls(config, files.read(parameters), dtype or own, quantized)

    def new_cache(self, rows: int, slots: int) -> Tensor:
        """[L, B, 2, G, blocks, D, W], see native.cpp."""
        lanes, c = self.lib.engine_lanes(), self.config
        blocks = 4 * -(-slots // (4 * lanes))
        return torch.zeros(c.num_hidden_layers, rows, 2, c.num_key_value_heads, blocks, c.head_dim, lanes)

    def read(self, ids: Tensor, depth: Tensor, state: StateStruct, tree: TreeStruct | None = None) -> Tensor:
        """New tokens behind each row's prefix, ids [B, T] and depth [T]: a chain, or a tree → hidden [B, T, H].
        UserError: an id is not in the vocabulary, a text is longer than the context."""
        ids, depth = ids.contiguous(), depth.contiguous()
        context = self.config.max_position_embeddings
        longest = max((c_int64 * state.rows).from_address(state.length))
        if longest + (len(depth) if tree is None else 0) > context:
            raise UserError(f"a text has more tokens than the context of {context}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        hidden = self.lib.engine_forward(self.engine, byref(state), tree and byref(tree), c_int64(len(depth)), at(ids),
                                         at(depth))
        return tensor_at(hidden, (*ids.shape, self.config.hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states of whole texts: ids [B, T] → [B, T, H]."""
        cache, length = self.new_cache(*ids.shape), torch.zeros(len(ids), dtype=torch.long)
        hidden = []
        for part in ids.split(256, dim=1):
            hidden.append(self.read(part, torch.arange(part.shape[1]), on_cache(cache, length)))
            length += part.shape[1]
        return torch.cat(hidden, dim=1)

# ---------------------------------------------------------------------------------------------------------- the heads
class PackedHeads:
    """Heads of any trained kind, in 16 bits, or in 8 where each step reads them from memory anew: verification decides,
    so their rounding changes no token."""
    def __init__(self, model: NativeLlama, heads: MedusaHeads):
        self.lib, self.kept, self.from_memory = model.lib, [], len(model.memory) > CACHE
        self.tied, trunk = getattr(heads, "tie_lm_head", False), getattr(heads, "trunk_width", None)
        layers = len(heads[0]) - (not self.tied)
        modules = [heads[k] for k in range(len(heads))]
        blocks = [self.block(module) for head in modules for module in list(head)[:layers]]
        if self.tied:
            own = heads.token_map is None           # else the lm_head's rows that may be drafted
            vocabulary = [model.lm_head.matrix.struct if own else self.pack(heads.lm_head_rows())] * len(modules)
        else:
            vocabulary = [self.pack(head[layers].weight) for head in modules]
        self.token_map = getattr(heads, "token_map", None)
        self.blocks, self.vocabulary = (BlockStruct * len(blocks))(*blocks), (MatrixStruct * len(modules))(*vocabulary)
        self.struct = HeadsStruct(
            len(modules), layers, heads.recent, SEEN[getattr(heads, "kind", "medusa")], trunk or 0, heads.draft_size,
            self.block(heads.trunk) if trunk else BlockStruct(), ctypes.addressof(self.blocks),
            ctypes.addressof(self.vocabulary), at(self.token_map))

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> MatrixStruct:
        bias = None if bias is None else bias.detach().float().contiguous()
        dtype = torch.int8 if self.from_memory else torch.bfloat16
        packed = Packed(self.lib, tuple(weight.shape), dtype, bias)
        self.kept += [packed, allocate(self.lib, [packed], self.from_memory)]
        packed.fill(slice(0, len(weight)), weight.detach())
        return packed.struct

    def block(self, block: nn.Module) -> BlockStruct:
        """A ResBlock, or a Block of variants/heads.py."""
        if hasattr(block, "linear"):
            return BlockStruct(self.pack(block.linear.weight, block.linear.bias))
        return BlockStruct(self.pack(block.up.weight, block.up.bias), self.pack(block.down.weight))

# -------------------------------------------------------------------------------------------------------- the decoder
class NativeDecoder(Decoder):
    """Decoder whose step is one call of the engine, or four where a part of it is replaced, in a subclass or on the
    decoder itself, or watched. The numbers of its state are written in place."""
    PARTS = {"noise", "draft", "verify", "accept", "commit", "forward", "logits"}

    def __init__(self, model: NativeLlama, heads=None, tree: Tree = ROOT, sampling: Sampling = GREEDY, eos=None,
                 run=call):
        """heads None: plain decoding. UserError: the tree is too large."""
        super().__init__(model, NoHeads() if heads is None else heads, tree, sampling, eos, run)
        nodes = len(tree.paths)
        if nodes > MOST_NODES:
            raise UserError(f"a tree of {nodes} nodes: the C++ step's limit is {MOST_NODES}, leave out --fast")
        trained = type(heads) in (MedusaHeads, StrongHeads, RootHeads, HydraHeads) and "draft" not in heads.__dict__
        self.packed = PackedHeads(model, heads) if trained else None
        self.plain, self.bound = heads is None, None
        self.overridden = {name for name in self.PARTS if getattr(type(self), name) is not getattr(NativeDecoder, name)}
        self.tree_struct = TreeStruct(nodes, len(tree.paths[-1]), at(tree.parent), at(tree.depth), at(tree.rank))
        self.sampling_struct = SamplingStruct(*sampling)
        self.ends = c_int64(len(self.eos)), at(self.eos)

    def window(self, used: int, cache: Tensor) -> int:
        return used                                                             # the engine reads what there is

    def bind(self, state: State) -> State:
        """The same state, with numbers that the engine can read and write."""
        if state is self.bound:
            return state
        self.bound = state = State(state.cache, *(tensor.contiguous() for tensor in state[1:]))
        self.state_struct = on_cache(state.cache, state.length, *map(at, state[2:]), state.recent_hidden.shape[1])
        self.out = torch.zeros(len(state.length), self.tree.retrieve.shape[1], dtype=torch.long)
        self.count = torch.zeros_like(state.length)
        self.drafting = (self.model.engine, byref(self.state_struct), self.packed and byref(self.packed.struct),
                         byref(self.tree_struct), byref(self.sampling_struct))
        self.stepping = (*self.drafting, *self.ends, at(self.out), at(self.count))
        return state

    def step(self, state: State, window: int, run) -> tuple[State, Tensor, Tensor]:
        watched = run is not call and type(run) is not Stages
        if watched or self.replaced() or not (self.plain or self.packed):
            step, whole = super().step, self.plain and not watched
            return run("base_inference", step, state, window, call) if whole else step(state, window, run)
        state = self.bind(state)
        self.model.lib.engine_step(*self.stepping)
        if run is not call:
            self.tell(run)
        return state, self.out, self.count

    def replaced(self) -> set:
        """The parts of the step that are not the engine's own."""
        return self.overridden | (self.PARTS & self.__dict__.keys())

    def tell(self, stages: Stages) -> None:
        """How long the stages of the newest step took, by the engine's own clock."""
        clock = (c_double * 5).from_address(self.model.lib.engine_clock(self.model.engine))
        spans = [("base_inference", 0, 4)] if self.plain else [(name, i, i + 1) for i, name in enumerate(STAGES)]
        for name, begin, end in spans:
            stages.seconds.setdefault(name, []).append(clock[end] - clock[begin])

    def draft(self, state: State) -> tuple[Tensor, Tensor | None]:
        if not self.packed or "noise" in self.replaced():       # which the engine makes itself
            return super().draft(state)
        state = self.bind(state)
        ids = self.model.lib.engine_draft(*self.drafting)
        return tensor_at(ids, (len(state.length), len(self.tree.paths)), c_int64), self.noise(state)

    def forward(self, ids, depth, ancestors, cache: Tensor, length: Tensor, window: int) -> Tensor:
        tree = self.tree_struct if ancestors is self.tree.ancestors else None
        return self.model.read(ids, depth, on_cache(cache, length), tree)

    def commit(self, state: State, hidden: Tensor, path: Tensor, out: Tensor, count: Tensor):
        state = self.bind(state)
        path, hidden, out, count = path.contiguous(), hidden.contiguous(), out.contiguous(), count.clone()
        self.model.lib.engine_commit(self.model.engine, byref(self.state_struct), c_int64(path.shape[1]), at(path),
                                     c_int64(hidden.shape[1]), at(hidden), at(out), at(count), *self.ends)
        return state, out, count

class NativeLookupDecoder(LookupDecoder, NativeDecoder):
    """Prompt lookup, verified by the engine."""
