"""Every way to decode one model, in one run: ours and whichever peers are installed, with the floor that memory sets.

    python benchmarks/compare.py model                          # the embedded model
    python benchmarks/compare.py v0                             # a padded shape: v0, 110M, 1B, 7B (see pad_model.py)
    python benchmarks/compare.py 110M --curve                   # and what a step costs against nodes and context
    python benchmarks/compare.py smollm2 --smollm2 FOLDER       # a published model, as benchmarks/smollm2.py writes it
    python benchmarks/compare.py 7B --device cuda               # on a GPU: ours, eager and by graphs, and transformers

One prompt at a time, greedy, up to 256 new tokens or the end of the text; the same openings and weights for all.
Each contestant is a process of its own that stays loaded; they take turns at each opening, so that what else the
machine does hits all alike; a run in which other processes used over 6 % of a core is repeated, or marked `*` where it
stays so. Seconds are prefill and decoding. A padded shape computes exactly what model/ computes, so acceptance is the
embedded model's. Peers: `pip install -r benchmarks/requirements.txt`; llama2.c by --llama2c PATH of its compiled `run`,
which has an eps and a rope_theta of 10000 compiled in. All contestants stay in memory: choose --rows where it is short.

"native" is the C++ engine (--fast) on weights in float32, bfloat16 or int8; it always computes in float32. A native
Medusa row has the tree that promises the most tokens per second for its weights and threads on this machine (the
smallest within 3 %): trees of 2 to 16 nodes by the hits in the heads' tree.json, each tree's step timed beforehand.
"graphs" is --fast on a GPU, with a tree found likewise.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
QUIET = 0.06  # of a core: what other processes may use while a contestant runs
PUBLISHED = 63  # nodes of mc_sim_7b_63, the root not counted
NODES = (2, 3, 4, 6, 8, 12, 16)  # of a native row's tree: sizes to choose from
CURVE = {"eager": (1, 2, 4, 8, 16, 32, 64), "native": (1, 2, 4, 6, 8, 16)}  # nodes
UNTRAINED = "untrained Hydra heads (4, width 256, draft vocabulary of 2048): what they cost is what trained ones cost"

# weights of a native row → what NativeLlama keeps them in, None: 8 bits, the embeddings as in the checkpoint
NATIVE = {"f32": "float32", "bf16": "bfloat16", "int8": None}
PRECISION = {"float32": "f32", "bfloat16": "bf16"}

# name → (worker, its options, its weights, None: --dtype): what --rows chooses from
ROWS = {
    "ours, plain": ("ours", {}, None),
    "ours, Medusa": ("ours", {"medusa": "own"}, None),
    "ours, Medusa, published 64 nodes": ("ours", {"medusa": "published"}, None),
    "ours, prompt lookup": ("ours", {"medusa": "lookup"}, None),
    "ours, plain, graphs": ("graphs", {}, None),
    "ours, Medusa, graphs": ("graphs", {"medusa": "own"}, None),
    "ours, plain, native f32": ("native_f32", {}, "f32"),
    "ours, Medusa, native f32": ("native_f32", {"medusa": "own"}, "f32"),
    "ours, plain, native bf16": ("native_bf16", {}, "bf16"),
    "ours, Medusa, native bf16": ("native_bf16", {"medusa": "own"}, "bf16"),
    "ours, plain, native int8": ("native_int8", {}, "int8"),
    "ours, Medusa, native int8": ("native_int8", {"medusa": "own"}, "int8"),
    "transformers, dynamic cache": ("transformers", {}, None),
    "transformers, prompt lookup": ("transformers", {"prompt_lookup_num_tokens": 10}, None),
    "transformers, static cache, compiled": ("transformers_static", {}, None),
    "llama.cpp f32": ("llama_cpp", {}, "f32"),
    "llama.cpp f32, no flash attention": ("llama_cpp_no_flash", {}, "f32"),
    "llama.cpp bf16 (lossy cache)": ("llama_cpp_bf16", {}, "bf16"),
    "llama.cpp q8_0 (lossy)": ("llama_cpp_q8", {}, "int8"),
    "CTranslate2": ("ctranslate2", {}, None),
    "onnxruntime-genai": ("onnxruntime_genai", {}, None),
    "llama2.c": ("llama2c", {}, "f32"),
}
ON_GPU = "ours", "graphs", "transformers", "transformers_static"  # workers; all but the second run on a CPU
PREFILL = (
    "ours, plain",
    "ours, plain, native f32",
    "ours, plain, native bf16",
    "transformers, dynamic cache",
    "llama.cpp f32",
    "llama.cpp f32, no flash attention",
    "llama.cpp bf16 (lossy cache)",
    "CTranslate2",
)
# ratio → (the beginning of the rows that it is to, their weights too); of several rows the fastest counts
RATIOS = {
    "to_transformers": ("transformers, dynamic cache", False),
    "to_plain": ("ours, plain", True),
    "to_llama_cpp": ("llama.cpp", True),
    "to_llama2c": ("llama2.c", True),
    "to_ctranslate2": ("CTranslate2", True),
}


# ------------------------------------------------------------------------------- workers: (folder, args) → a function
#                                                              run(prompt ids, options) → (new ids, decoding steps)


def ours(folder, args, native=None, fast=False):
    """native: the weights that the C++ engine has, None: plain torch, with `fast` by CUDA graphs."""
    from functools import lru_cache

    import torch

    from fast import engines
    from fast.native import NativeLlama
    from loading.files import UserError
    from loading.trees import published_tree, read_tree
    from tinymedusa import Tree, call
    from variants.heads import load_heads
    from variants.lookup import Lookup

    torch.set_num_threads(args.threads)
    if native:
        dtype = NATIVE[native] and getattr(torch, NATIVE[native])
        model = NativeLlama.from_pretrained(folder, dtype, quantized=native == "int8")
        model.set_threads(args.threads)
    else:
        model = engines.load(folder, getattr(torch, args.dtype), args.device, fast=fast)
    heads = load_heads(args.heads, model) if args.heads else None

    @lru_cache
    def decoder_of(medusa):
        if medusa is None:
            return engines.decoder(model)
        if medusa == "lookup":
            return engines.decoder(model, Lookup(model.config), Tree.from_paths(Lookup.chain))
        if heads is None:
            raise UserError("this folder has no heads")
        about = {}
        if medusa == "published":
            paths = published_tree(len(heads), PUBLISHED, heads.draft_size)
        elif (native or fast) and not args.tree and (hits := known_hits(args.heads)):
            paths, about = fastest_tree(model, heads, hits)
        else:
            paths, _ = read_tree(args.heads, len(heads), heads.draft_size, args.tree)
        run.about[medusa] = {"nodes": 1 + len(paths), "tree": paths} | about
        return engines.decoder(model, heads, Tree.from_paths(paths))

    def run(ids, medusa=None, stages=call):
        decoder = decoder_of(medusa)
        decoder.run = stages
        news = [new for (new,) in decoder.generate([ids], args.max_new_tokens)]
        return [t for new in news for t in new], len(news) - 1

    run.model, run.heads, run.about = model, heads, {}
    return run


graphs = partial(ours, fast=True)
native_f32, native_bf16, native_int8 = (partial(ours, native=kind) for kind in NATIVE)


def known_hits(heads: Path) -> dict:
    """Path → the share of the places where all of it was right, greedy, of all entries of the heads' tree.json. A
    padded shape's heads guess what the embedded model's do."""
    from loading.files import read_json
    from loading.trees import by_temperature

    hits, embedded = {}, ROOT / "model" / "medusa"
    if str(read_json(heads / "config.json").get("base_model_name_or_path")).startswith("padded "):
        written = lambda path: (path / "model.safetensors").stat().st_mtime
        if written(heads) < written(embedded):
            raise ValueError("padded before the heads in model/ were written: pad them anew, or give --tree")
        heads = embedded
    tree = read_json(heads / "tree.json") if (heads / "tree.json").exists() else {}
    for entry in (tree, *tree.get("modes", {}).values()):
        greedy = by_temperature(entry).get(0.0, {})
        hits |= zip(map(tuple, greedy.get("paths", ())), greedy.get("hits", ()), strict=False)
    ancestors = lambda path: (path[:depth] for depth in range(1, len(path) + 1))
    return {path: min(hits[p] for p in ancestors(path)) for path in hits}


def fastest_tree(model, heads, hits: dict) -> tuple[list, dict]:
    """The paths of the smallest tree within 3 % of the most expected tokens per second on this engine, here and now,
    and what was compared; a step costs what --tune would measure."""
    from extras.forecast import grow_tree
    from extras.tune import step_seconds
    from tinymedusa import GREEDY, Tree

    begin = time.perf_counter()
    paths = [grow_tree(hits, n - 1) for n in NODES if n <= 1 + len(hits)]
    trees, greedy = map(Tree.from_paths, paths), argparse.Namespace(sampling=GREEDY)
    costs = step_seconds(model, heads, [None, *trees], [[1] * 64], greedy)
    candidates = []
    for some, cost in zip([[], *paths], costs, strict=True):
        expected = 1 + sum(hits[tuple(path)] for path in some)
        candidates.append(
            {
                "nodes": 1 + len(some),
                "tokens_per_step": round(expected, 3),
                "step_ms": round(1000 * cost, 4),
                "tokens_per_second": round(expected / cost, 1),
            }
        )
    speeds = [c["tokens_per_second"] for c in candidates[1:]]  # the root alone is another row
    best = next(i for i, speed in enumerate(speeds) if 1.03 * speed >= max(speeds))
    return paths[best], {"candidates": candidates, "choosing_s": time.perf_counter() - begin}


def transformers(folder, args, **generate_options):
    import torch
    import transformers as hf

    torch.set_num_threads(args.threads)
    hf.logging.set_verbosity_error()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().to(args.device)

    def run(ids, **options):
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        hook = model.register_forward_pre_hook(count)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids], device=args.device),
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                **generate_options,
                **options,
            )
        hook.remove()
        return out[0, len(ids) :].tolist(), calls - 1

    run.model = model
    return run


def transformers_static(folder, args):
    import torch

    run = transformers(folder, args, cache_implementation="static")
    if args.device == "cpu":  # on a GPU generate() compiles it itself
        run.model.forward = torch.compile(run.model.forward, fullgraph=True)
    return run


def interleaved(rows, head_dim):
    """HF's half-split rows of q_proj or k_proj, (a0 a1 .. b0 b1 ..) a head → Meta's (a0 b0 a1 b1 ..), which llama.cpp
    and llama2.c read: there the two dimensions that are turned together are neighbours."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def interleaved_parameters(model) -> dict:
    """The parameters by name, as float32 arrays, q_proj and k_proj in the layout of `interleaved`."""
    return {
        name: (interleaved(p, model.config.head_dim) if "q_proj" in name or "k_proj" in name else p)
        .detach()
        .float()
        .contiguous()
        .numpy()
        for name, p in model.named_parameters()
    }


def write_gguf(folder, path, kind):
    """GGUF of our checkpoint without a vocabulary."""
    import gguf
    import torch

    from llama import Llama

    model = Llama.from_pretrained(folder, dtype=torch.float32)
    c, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings), writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers), writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads), writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim), writer.add_value_length(c.head_dim), writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps), writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size), writer.add_tokenizer_model("no_vocab")
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    top = {"embed_tokens.weight": "token_embd", "norm.weight": "output_norm", "lm_head.weight": "output"}
    quant = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[kind]
    for name, data in interleaved_parameters(model).items():
        number, _, part = name.removeprefix("layers.").partition(".")
        part = part.removesuffix(".weight")
        to = top.get(name) or f"blk.{number}.{names[part]}"
        as_kind = quant if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{to}.weight", gguf.quants.quantize(data, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def kept(folder, args, what: str) -> Path:
    """Where a converted model is kept; another one for another checkpoint of the same name."""
    files = [(str(f.resolve()), f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))]
    return Path(args.scratch) / f"{folder.name}-{hashlib.sha256(repr(files).encode()).hexdigest()[:8]}-{what}"


def llama_cpp(folder, args, flash=True, kind="float32"):
    import llama_cpp as lib
    import numpy as np

    path = kept(folder, args, f"{kind}.gguf")
    if not path.exists():
        subprocess.run([sys.executable, __file__, str(folder), "--gguf", str(path), kind], check=True)
    model = lib.Llama(
        str(path),
        n_ctx=2048,
        n_batch=2048,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        flash_attn=flash,
        verbose=False,
        logits_all=False,
    )
    vocabulary, eos = model.n_vocab(), args.eos

    def run(ids):
        model.reset()
        lib.llama_memory_clear(lib.llama_get_memory(model.ctx), True)
        new, feed = [], ids
        while len(new) < args.max_new_tokens and (not new or new[-1] not in eos):
            array = (lib.llama_token * len(feed))(*feed)  # the batch only points to it
            if lib.llama_decode(model.ctx, lib.llama_batch_get_one(array, len(feed))):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(model.ctx, -1), (vocabulary,))
            new.append(int(logits.argmax()))
            feed = new[-1:]
        return new, len(new) - 1

    return run


llama_cpp_no_flash = partial(llama_cpp, flash=False)
llama_cpp_bf16 = partial(llama_cpp, kind="bfloat16")
llama_cpp_q8 = partial(llama_cpp, flash=False, kind="q8_0")


def ctranslate2(folder, args):
    import ctranslate2 as lib

    target = kept(folder, args, "ct2")
    if not target.exists():
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder)).convert(str(target), force=True)
    model = lib.Generator(str(target), compute_type=args.dtype, intra_threads=args.threads, inter_threads=1)
    names = json.loads((target / "vocabulary.json").read_text(encoding="utf-8"))
    ends = [names[i] for i in args.eos]

    def run(ids):
        result = model.generate_batch(
            [[names[i] for i in ids]],
            max_length=args.max_new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=ends,
            return_end_token=True,
        )
        new = result[0].sequences_ids[0]
        return new, len(new) - 1

    return run


def onnxruntime_genai(folder, args):
    import onnxruntime_genai as lib

    target = kept(folder, args, "onnx")
    if not (target / "genai_config.json").exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                str(folder),
                "-o",
                str(target),
                "-p",
                {"float32": "fp32", "bfloat16": "bf16"}[args.dtype],
                "-e",
                "cpu",
                "-c",
                str(args.scratch),
            ],
            check=True,
            stdout=sys.stderr,
        )
    settings = json.loads((target / "genai_config.json").read_text())
    settings["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = args.threads
    (target / "genai_config.json").write_text(json.dumps(settings))
    model = lib.Model(str(target))

    def run(ids):
        params = lib.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + args.max_new_tokens, do_sample=False)
        generator = lib.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        new = generator.get_sequence(0)[len(ids) :].tolist()
        return new, len(new) - 1

    return run


def llama2c(folder, args):
    """run.c through its own command line: decoding and printing count. Token i is the character 0x4E00 + i."""
    import struct

    import torch

    from llama import Llama

    if not args.llama2c:
        raise ImportError("no --llama2c PATH")
    model = Llama.from_pretrained(folder, dtype=torch.float32)
    c, path = model.config, kept(folder, args, "llama2c.bin")
    order = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.down_proj",
        "mlp.up_proj",
    ]
    arrays = interleaved_parameters(model)
    with open(path, "wb") as file:
        file.write(
            struct.pack(
                "7i",
                c.hidden_size,
                c.intermediate_size,
                c.num_hidden_layers,
                c.num_attention_heads,
                c.num_key_value_heads,
                c.vocab_size if c.tie_word_embeddings else -c.vocab_size,
                c.max_position_embeddings,
            )
        )
        write = lambda name: file.write(arrays[name].tobytes())
        write("embed_tokens.weight")
        for part in order:
            for i in range(c.num_hidden_layers):
                write(f"layers.{i}.{part}.weight")
        write("norm.weight")
        file.write(bytes(4 * c.max_position_embeddings * c.head_dim))  # rotary tables it no longer reads
        if not c.tie_word_embeddings:
            write("lm_head.weight")
    letter = lambda i: chr(0x4E00 + i) if i < 20000 else chr(0x20000 + i)

    def run(ids):
        words = path.with_suffix(".tok")  # the first token behind bos is what its encoder puts before every text: " "
        names = [letter(i).encode() if i != ids[1] else b" " for i in range(c.vocab_size)]
        words.write_bytes(struct.pack("i", 8) + b"".join(struct.pack("fi", -1e9, len(n)) + n for n in names))
        done = subprocess.run(
            [
                args.llama2c,
                str(path),
                "-z",
                str(words),
                "-t",
                "0",
                "-n",
                str(len(ids) + args.max_new_tokens - 1),
                "-i",
                "".join(map(letter, ids[2:])),
            ],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )
        known = {letter(i): i for i in range(c.vocab_size)} | {" ": ids[1]}
        new = [known[ch] for ch in done.stdout.strip("\n") if ch in known][len(ids) - 2 :]  # it swallows the blank
        stop = next((i + 1 for i, t in enumerate(new) if t in args.eos), len(new))
        rate = float(done.stderr.rpartition("achieved tok/s:")[2])
        return new[:stop], stop - 1, stop / rate

    return run


# -------------------------------------------------------------------------------------------------- a worker's process


def work(args) -> None:
    """Reads {"ids", "options"} a line, answers {"tokens", "steps", "seconds", ..}; the first answer tells the start-up.
    about: what our function says of its tree."""
    answer, sys.stdout = sys.stdout, sys.stderr
    say = lambda **fields: print(json.dumps(fields), file=answer, flush=True)
    try:
        run = globals()[args.worker](args.folder, args)
    except ImportError as error:
        return say(refused=f"not installed: {error}")
    except Exception as error:  # a peer that refuses a shape is a result
        return say(refused=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200] if str(error) else ''}")
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin, cpu = time.perf_counter(), cpu_seconds()
        try:
            tokens, steps, *own = run(request["ids"], **request["options"])
        except Exception as error:
            name = "" if type(error).__name__ == "UserError" else f"{type(error).__name__}: "
            say(refused=f"{name}{str(error).strip().splitlines()[0][:200] if str(error) else ''}")
            continue
        wall = time.perf_counter() - begin
        total, mine = (b - a for a, b in zip(cpu, cpu_seconds(), strict=True))
        status = Path("/proc/self/status").read_text()
        say(
            tokens=tokens,
            steps=steps,
            seconds=own[0] if own else wall,
            others=max(0.0, total - mine) / wall,
            peak_mb=int(status.partition("VmHWM:")[2].split()[0]) / 1024,
            about=getattr(run, "about", {}).get(request["options"].get("medusa"), {}),
        )


def cpu_seconds() -> tuple[float, float]:
    """Seconds of CPU used so far by the whole machine and by this process with its children."""
    user, nice, system, _, _, irq, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    mine = sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), mine


class Worker:
    """One contestant's process; `ask` sends it a prompt."""

    def __init__(self, name: str, args):
        passed = [
            "--worker",
            name,
            "--threads",
            str(args.threads),
            "--dtype",
            args.dtype,
            "--device",
            args.device,
            "--scratch",
            str(args.scratch),
            "--max-new-tokens",
            str(args.max_new_tokens),
        ]
        for option in ("heads", "tree", "llama2c"):
            if getattr(args, option):
                passed += [f"--{option}", str(getattr(args, option))]
        self.begin = time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(args.folder), *passed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.refused = self.read().get("refused")

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        return {"refused": "died: " + (self.log.read().strip().splitlines() or ["without a word"])[-1][:200]}

    def ask(self, ids, options) -> dict:
        with contextlib.suppress(BrokenPipeError):  # `read` tells why
            self.process.stdin.write(json.dumps({"ids": ids, "options": options}) + "\n")
            self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------------- the comparison


def chosen(names, args) -> list[str]:
    """The rows that --rows asks for: a whole name means that row only."""
    wanted = lambda name, part: part == name if part in ROWS else part in name
    here = lambda kind: kind != "graphs" if args.device == "cpu" else kind in ON_GPU
    names = [name for name in names if here(ROWS[name][0])]
    return [name for name in names if not args.rows or any(wanted(name, part) for part in args.rows)]


def contest(prompts: list, args, names=tuple(ROWS)) -> list[dict]:
    """All rows over all prompts, in turns; `repeats` rounds of each."""
    from tqdm import tqdm

    workers, rows = {}, []
    for name in chosen(names, args):
        kind, options, precision = ROWS[name]
        row = {"row": name, "options": options, "worker": kind, "precision": precision or PRECISION[args.dtype]}
        row["runs"] = []
        if kind not in workers:
            workers[kind] = Worker(kind, args)
        if workers[kind].refused is None:
            first = workers[kind].ask(prompts[0], options)  # warms up, compiles what is to be compiled, finds a tree
            about = first.get("about", {})
            seconds = time.perf_counter() - workers[kind].begin - about.get("choosing_s", 0)
            row |= about | {"startup_s": round(seconds, 2), "refused": first.get("refused")}
            workers[kind].begin = time.perf_counter()
        else:
            row["refused"] = workers[kind].refused
        print(f"{name}: {row['refused'] or 'ready'}{choice(row)}", file=sys.stderr)
        rows.append(row)
    alive = [row for row in rows if row["refused"] is None]
    for _ in tqdm(range(args.repeats), desc="rounds"):
        for i, ids in enumerate(prompts):
            for row in [row for row in alive if row["refused"] is None]:
                for _ in range(3):  # again while something else ran; a pause, since idle threads spin for a while
                    time.sleep(0.25)
                    run = workers[row["worker"]].ask(ids, row["options"])
                    if run.get("others", 0) <= QUIET:
                        break
                run.pop("about", None)
                row["runs"].append({"prompt": i} | run)
                if "refused" in run:  # it failed only now
                    row |= {"refused": run["refused"], "runs": []}
    for worker in workers.values():
        worker.close()
    return rows


def choice(row: dict) -> str:
    """The tree of a row, and what it was chosen from: nodes and the tokens per second that were expected."""
    if "nodes" not in row:
        return ""
    others = ", ".join(f"{c['nodes']}: {c['tokens_per_second']:.0f}" for c in row.get("candidates", ()))
    return f", a tree of {row['nodes']} nodes" + f" (tokens/s expected by nodes: {others})" * bool(others)


def summary(rows: list) -> str:
    """Adds to each row what the table shows. The row whose tokens all others are compared with: a plain one of ours in
    float32 where there is one."""
    finished = [row for row in rows if row["runs"]]
    exact = [row for row in finished if row["row"].startswith("ours, plain") and row["precision"] == "f32"]
    same_as = (exact or finished)[:1]
    reference = {run["prompt"]: run["tokens"] for row in same_as for run in row["runs"]}
    speed = lambda row: statistics.median(len(r["tokens"]) / r["seconds"] for r in row["runs"])
    for row in finished:
        runs = row["runs"]
        rates = sorted(len(r["tokens"]) / r["seconds"] for r in runs)
        tokens, steps = (sum(f(r) for r in runs) for f in (lambda r: len(r["tokens"]) - 1, lambda r: r["steps"]))
        parts = [
            next((i for i, (a, b) in enumerate(zip(r["tokens"], reference[r["prompt"]], strict=False)) if a != b), None)
            if r["tokens"] != reference[r["prompt"]]
            else None
            for r in runs
        ]
        row |= {
            "tokens_per_second": round(speed(row), 1),
            "quartiles": [round(rates[len(rates) * i // 4], 1) for i in (1, 3)],
            "ms_per_step": round(1000 * statistics.median(r["seconds"] / max(1, r["steps"]) for r in runs), 3),
            "tokens_per_step": round(tokens / max(1, steps), 3),
            "peak_mb": round(max(r["peak_mb"] for r in runs)),
            "others_cores": round(statistics.median(r["others"] for r in runs), 2),
            "disturbed": sum(r["others"] > QUIET for r in runs),
            "identical": sum(r["tokens"] == reference[r["prompt"]] for r in runs),
            "first_difference": min((p for p in parts if p is not None), default=None),
            "of": len(runs),
        }
        for ratio, (beginning, alike) in RATIOS.items():
            others = [r for r in finished if r["row"].startswith(beginning)]
            same = [r for r in others if r["precision"] == row["precision"]]
            others = others if not alike or ratio == "to_plain" and not same else same
            if others:
                row[ratio] = round(speed(row) / max(map(speed, others)), 2)
        for plain in finished:
            if plain["worker"] == row["worker"] and plain["row"].startswith("ours, plain"):
                own = {run["prompt"]: run["tokens"] for run in plain["runs"]}
                row["to_own_plain"] = round(speed(row) / speed(plain), 2)
                row["identical_to_own_plain"] = sum(r["tokens"] == own[r["prompt"]] for r in runs)
    return same_as[0]["row"] if same_as else "none"


def fastest_read(size: int, device: str, rounds: int = 20) -> tuple[float, str]:
    """Bytes per second of the best of `rounds` reads of `size` bytes (of at most 10^9) by any of these functions, and
    which. numpy's memory is on large pages, as the engine's is."""
    import numpy as np
    import torch

    data = np.ones(int(min(size, 1e9)) // 4, np.float32)
    tensor = torch.from_numpy(data).to(device)
    ways = {
        "torch sum": tensor.sum,
        "torch amax": tensor.amax,
        "torch dot": lambda: tensor.dot(tensor),
        "torch int32 max": tensor.view(torch.int32).max,
    }
    if device == "cpu":
        ways |= {"numpy max": data.max, "numpy dot": lambda: data.dot(data)}
    best = {name: min(seconds(read, device) for _ in range(rounds)) for name, read in ways.items()}
    way = min(best, key=best.get)
    return data.nbytes / best[way], way


def seconds(function, device: str) -> float:
    import torch

    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    begin = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begin


def machine(folder, args) -> dict:
    """What a step can't beat: bytes of weights over read bandwidth at that size, multiply-adds over the peak."""
    import torch

    from llama import LlamaConfig

    torch.set_num_threads(args.threads)
    c = LlamaConfig.from_pretrained(folder)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    outputs = c.num_hidden_layers * (queries + 2 * keys + 2 * c.hidden_size + 2 * c.intermediate_size) + c.vocab_size
    a_layer = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    weights = c.num_hidden_layers * a_layer + c.vocab_size * c.hidden_size
    reads, lm_head = {}, c.vocab_size * c.hidden_size
    for precision, size in (("f32", 4 * weights), ("bf16", 2 * weights), ("int8", weights + 4 * outputs)):
        bandwidth, way = fastest_read(size, args.device)
        in_8_bits = args.device == "cpu" and screens()  # how a greedy step reads the lm_head
        instead = lm_head * (size // weights - 1) if in_8_bits else 0
        reads[precision] = {
            "weights_mb": round(size / 1e6, 2),
            "step_mb": round((size - instead) / 1e6, 2),
            "read_gb_per_s": round(bandwidth / 1e9, 2),
            "by": way,
            "floor_ms": round(1000 * size / bandwidth, 4),
        }
    on_gpu = args.device != "cpu"
    side = 8192 if on_gpu else 1024
    matrix = torch.randn(side, side, device=args.device, dtype=getattr(torch, args.dtype) if on_gpu else None)
    peak = side**3 / statistics.median(seconds(lambda: torch.mm(matrix, matrix), args.device) for _ in range(9))
    return (
        processor()
        | ({"gpu": torch.cuda.get_device_name()} if on_gpu else {})
        | {
            "threads": args.threads,
            "torch": torch.__version__,
            "reads": reads,
            "multiply_adds_g_per_s": round(peak / 1e9, 1),
            "arithmetic_ms_a_node": round(1000 * weights / peak, 4),
        }
        | {k: v for k, v in reads[PRECISION[args.dtype]].items() if k != "by"}
    )


def processor() -> dict:
    """Its name, what it can do that matters here, and what else runs on it."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = lambda name: next(
        (line.partition(":")[2].strip() for line in info.splitlines() if line.startswith(name)), ""
    )
    return {
        "processor": field("model name") or platform.processor(),
        "flags": [f for f in field("flags").split() if f in ("avx2", "avx512f", "avx512_vnni") or f.startswith("amx")],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def add_shares(rows: list, machine: dict) -> None:
    """To each native plain row the share of the read bandwidth that its speed would take if each step read all weights,
    and the share that it takes."""
    for row in rows:
        if row["row"].startswith("ours, plain, native") and row["runs"]:
            read = machine["reads"][row["precision"]]
            row["share_of_floor"] = round(read["floor_ms"] / row["ms_per_step"], 3)
            row["share_of_read_bandwidth"] = round(row["share_of_floor"] * read["step_mb"] / read["weights_mb"], 3)


def screens() -> bool:
    """Whether a greedy native step reads most of the lm_head in 8 bits only (see `logits` in fast/native.cpp)."""
    from fast.build import Unavailable
    from fast.native import engine

    try:
        return bool(engine().engine_screens())
    except Unavailable:
        return False


def prefill(ids: list, args) -> list[dict]:
    """Tokens/s of reading one long prompt, up to the first new token."""
    rows = contest([ids], argparse.Namespace(**vars(args) | {"max_new_tokens": 1}), PREFILL)
    speed = lambda row: round(len(ids) / statistics.median(run["seconds"] for run in row["runs"]), 1)
    return [
        {"row": row["row"], "prompt_tokens": len(ids)}
        | ({"tokens_per_second": speed(row)} if row["runs"] else {"refused": row["refused"]})
        for row in rows
    ]


def stages(prompts: list, args, run) -> dict:
    """The original's profile: median ms a call of each stage for plain decoding and both trees."""
    import tinymedusa

    table = {}
    for name in (None, "own", "published") if run.heads else (None,):
        run(prompts[0], medusa=name)
        clock = tinymedusa.Stages(args.device)
        for ids in prompts:
            run(ids, medusa=name, stages=clock)
        total = sum(map(sum, clock.seconds.values()))
        table[name or "plain"] = {
            stage: {"median_ms": round(1000 * statistics.median(s), 3), "share": round(sum(s) / total, 3)}
            for stage, s in clock.seconds.items()
        }
    return table


def curve(args, run, sizes) -> list[dict]:
    """ms of a whole step against nodes and context, and the tokens per step where a tree breaks even."""
    import torch

    from extras.tune import step_times
    from fast import engines
    from loading.trees import published_tree
    from tinymedusa import Tree
    from variants.heads import build_heads

    model, heads, points = run.model, run.heads, []
    if heads is None:
        options = {"kind": "hydra", "width": 256, "recent": 1, "tie_lm_head": True}
        heads = build_heads(model, 4, token_map=torch.arange(2048), **options).requires_grad_(False).eval()
        heads.to(model.norm.weight.device).freeze()
    made = {1: engines.decoder(model, eos=())}
    for n in sizes[1:]:
        paths = published_tree(len(heads), n - 1, heads.draft_size)
        made[n] = engines.decoder(model, heads, Tree.from_paths(paths), eos=())
    makers = {n: lambda decoder=decoder: decoder for n, decoder in made.items()}
    for length in (128, 512, 2048 - 100):
        if length + 100 > model.config.max_position_embeddings:
            continue
        seconds = step_times(makers, [[1] * length], 8, args.repeats)
        cost = {n: statistics.median(s) for n, s in seconds.items()}
        points += [
            {
                "context": length,
                "nodes": n,
                "step_ms": round(1000 * cost[n], 3),
                "break_even_tokens_per_step": round(cost[n] / cost[1], 2),
            }
            for n in sizes
        ]
    return points


def profiles(prompts: list, args) -> dict:
    """The stages of each of our engines that has a row, and with --curve what its steps cost."""
    result = {"stages": {}, "curve": {}, "curve_heads": None}
    engines = dict.fromkeys(ROWS[name][0] for name in chosen(ROWS, args))
    for mode, native in {"eager": None, **{f"native {kind}": kind for kind in NATIVE}}.items():
        if (f"native_{native}" if native else "ours") not in engines:
            continue
        try:
            run = ours(args.folder, args, native)
        except Exception as error:  # its rows say so
            print(f"{mode}: {error}", file=sys.stderr)
            continue
        result["stages"][mode] = stages(prompts, args, run)
        if args.curve:
            result["curve"][mode] = curve(args, run, CURVE["native" if native else "eager"])
            result["curve_heads"] = "its heads" if run.heads else UNTRAINED
    return result


def row_name(row: dict) -> str:
    own = "nodes" in row and row["options"].get("medusa") == "own"
    return f"{row['row']} ({row['nodes']} nodes)" if own else row["row"]


def markdown(result: dict) -> str:
    rows = [row for row in result["rows"] if "tokens_per_second" in row]
    ratios = [ratio for ratio in RATIOS if any(ratio in row for row in rows)]
    title = lambda ratio: {"to_plain": "to ours plain"}.get(ratio, "to " + RATIOS[ratio][0].partition(",")[0])
    columns = ["", "weights", "tokens/s (quartiles)", "ms/step", "tokens/step", *map(title, ratios)]
    columns += ["start-up s", "peak MB" + " of the host" * ("gpu" in result["machine"]), "same tokens"]
    lines = [
        f"### {result['title']}",
        "",
        result["setting"],
        "",
        f"|{' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in result["rows"]:
        if row not in rows:
            lines.append(f"| {row['row']} | {row['precision']} | {row['refused']} " + "| " * (len(columns) - 3) + "|")
            continue
        same = f"{row['identical']} of {row['of']}" + (
            "" if row["first_difference"] is None else f", first difference at {row['first_difference']}"
        )
        if row["identical"] < row["of"] and row["options"] and "identical_to_own_plain" in row:
            same += f"; as its own plain row {row['identical_to_own_plain']} of {row['of']}"
        low, high = row["quartiles"]
        cells = [
            row_name(row) + " *" * (row["disturbed"] > row["of"] // 2),
            row["precision"],
            f"{row['tokens_per_second']:.0f} ({low:.0f} to {high:.0f})",
            row["ms_per_step"],
            row["tokens_per_step"],
            *(row.get(ratio, "") for ratio in ratios),
            row["startup_s"],
            row["peak_mb"],
            same,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    m = result["machine"]
    reads = (f"{p} {r['weights_mb']} MB at {r['read_gb_per_s']} GB/s ({r['by']})" for p, r in m["reads"].items())
    shown = lambda share: ", ".join(f"{row['precision']} {row[share]:.0%}" for row in rows if share in row)
    lines += [
        "",
        f"{m.get('gpu')} beside " * ("gpu" in m)
        + f"{m['processor']} ({', '.join(m['flags'])}), {m['cores']} cores, {m['threads']} used, load average "
        f"{m['load_average'][0]}.",
        "",
        f"Floor: {m['weights_mb']} MB of weights a step at {m['read_gb_per_s']} GB/s = {m['floor_ms']} ms; a node's "
        f"arithmetic at {m['multiply_adds_g_per_s']} G multiply-adds/s = {m['arithmetic_ms_a_node']} ms.",
        "",
        f"Best of 20 reads of as many bytes: {', '.join(reads)}."
        + f" Of that speed our native plain step reaches {shown('share_of_floor')}; in the bytes that it reads, "
        f"{shown('share_of_read_bandwidth')} (a greedy step finds its token in the lm_head in 8 bits, where the "
        "processor multiplies those fast)." * any("share_of_floor" in row for row in rows),
    ]
    if result["prefill"]:
        n = result["prefill"][0]["prompt_tokens"]
        lines += ["", f"| reading a prompt of {n} tokens | tokens/s |", "|---|---|"]
        lines += [f"| {r['row']} | {r.get('tokens_per_second') or r['refused']} |" for r in result["prefill"]]
    for mode, table in result["stages"].items():
        lines += ["", f"| {mode}: stage, ms (share) | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
        for stage in ("init", "base_inference", "medusa", "tree", "posterior", "update"):
            cells = [t.get(stage) for t in table.values()]
            if any(cells):
                shown = (f"{c['median_ms']} ({c['share']:.1%})" if c else "" for c in cells)
                lines.append(f"| {stage} | {' | '.join(shown)} |")
    for mode, points in result["curve"].items():
        sizes = sorted({p["nodes"] for p in points})
        lines += [
            "",
            f"| {mode}: whole step with its draft, ms (in plain steps); {result['curve_heads']} | "
            + " | ".join(f"{n} nodes" for n in sizes)
            + " |",
            "|---|" + "---|" * len(sizes),
        ]
        for context in sorted({p["context"] for p in points}):
            cells = [p for p in points if p["context"] == context]
            shown = (f"{p['step_ms']} ({p['break_even_tokens_per_step']})" for p in cells)
            lines.append(f"| context {context} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def figure(result: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in reversed(result["rows"]) if "tokens_per_second" in r]
    fig, ax = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    colours = ["#d95f02" if r["row"].startswith("ours") else "#7f8fa6" for r in rows]
    ax.barh([row_name(r) for r in rows], [r["tokens_per_second"] for r in rows], color=colours)
    for i, r in enumerate(rows):
        ax.text(r["tokens_per_second"], i, f" {r['tokens_per_second']:.0f}", va="center", fontsize=8)
    ax.set_xlabel("tokens per second, one prompt at a time")
    ax.set_title(result["title"])
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a model folder, or a padded shape, or smollm2")
    parser.add_argument(
        "--rows", action="append", help="only this row, or rows whose names contain this; may be repeated"
    )
    parser.add_argument("--heads", type=Path, metavar="FOLDER", help="default: medusa/ in the model's folder, if any")
    parser.add_argument("--openings", help="default: benchmarks/openings.txt, for smollm2 benchmarks/questions.jsonl")
    parser.add_argument("--prompts", type=int, default=4, help="how many of the openings")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, for 1B and 7B bfloat16")
    parser.add_argument("--tree", help="paths of the own tree (default: tree.json beside the heads; native: see above)")
    parser.add_argument("--curve", action="store_true", help="also time steps against nodes and context")
    parser.add_argument("--prefill", type=int, metavar="N", help="also time the reading of a prompt of N tokens")
    parser.add_argument("--smollm2", metavar="FOLDER", help="what benchmarks/smollm2.py wrote")
    parser.add_argument("--llama2c", metavar="PATH", help="a compiled `run` of llama2.c")
    parser.add_argument(
        "--scratch",
        default=str(Path(tempfile.gettempdir()) / "tinymedusa-compare"),
        help="where padded and converted models are kept",
    )
    parser.add_argument("--out", metavar="PREFIX", help="writes PREFIX.json, PREFIX.md and PREFIX.png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--gguf", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    args.dtype = args.dtype or ("bfloat16" if args.folder in ("1B", "7B") else "float32")
    shape = None
    if args.folder == "smollm2":
        if not args.smollm2:
            sys.exit("smollm2: give --smollm2 FOLDER, as benchmarks/smollm2.py writes it")
        shape, args.folder = "SmolLM2-135M-Instruct", args.smollm2
        args.heads = args.heads or ROOT / "heads" / "smollm2-135m-instruct"
        args.openings = args.openings or ROOT / "benchmarks" / "questions.jsonl"
    if args.folder in ("v0", "110M", "1B", "7B"):
        import pad_model

        shape, folder = f"padded {args.folder}", Path(args.scratch) / args.folder
        if not (folder / "medusa" / "tree.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            pad_model.write(folder, args.folder)
        args.folder = folder
    args.folder = Path(args.folder)
    if not args.heads and (args.folder / "medusa" / "config.json").exists():
        args.heads = args.folder / "medusa"
    if args.gguf:
        return write_gguf(args.folder, *args.gguf)
    from llama import LlamaConfig

    config = LlamaConfig.from_pretrained(args.folder)
    args.eos = list(config.eos_token_ids)
    if args.worker:
        return work(args)
    Path(args.scratch).mkdir(parents=True, exist_ok=True)
    from loading.documents import openings_of
    from loading.templates import Plain, load_template
    from loading.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.folder, config)
    template = load_template(args.folder, tokenizer) or Plain(tokenizer)
    openings = openings_of(args.openings or ROOT / "benchmarks" / "openings.txt")[: args.prompts]
    prompts = [template.prompt(opening) for opening in openings]
    rows = contest(prompts, args)
    same_as = summary(rows)
    about = machine(args.folder, args)
    add_shares(rows, about)
    ids = [t for prompt in 99 * prompts for t in prompt][: args.prefill]
    result = {
        "title": f"{shape or args.folder.resolve().name + '/'}, {args.dtype}, {args.threads} thread"
        + "s" * (args.threads > 1),
        "setting": f"{len(prompts)} openings x {args.repeats} rounds, up to {args.max_new_tokens} new tokens, greedy, "
        "one at a time; medians. `*`: other processes ran in most of its rounds. To ours plain: to our fastest plain "
        "row with the same weights, native or not (where there is none, with any); to llama.cpp, llama2.c and "
        "CTranslate2: to their fastest row with the same weights, q8_0 counts as int8. "
        f"Same tokens: as {same_as}. llama.cpp's cache is float16 in all rows."
        + " llama2.c has a rope_theta of 10000, so its tokens are others."
        * (config.rope_theta != 10000),
        "machine": about,
        "rows": rows,
        "prefill": prefill(ids, args) if args.prefill else [],
    } | profiles(prompts, args)
    if args.out:
        for row in rows:
            for run in row["runs"]:
                run["tokens"] = len(run.get("tokens", ()))
        Path(args.out + ".json").write_text(json.dumps(result) + "\n")
    text = markdown(result)
    print(text)
    if args.out:
        Path(args.out + ".md").write_text(text)
        figure(result, args.out + ".png")


if __name__ == "__main__":
    main()
