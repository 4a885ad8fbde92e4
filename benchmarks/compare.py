"""Every way to decode one model, in one run: ours and whichever peers are installed, with the floor that memory sets.

    python benchmarks/compare.py model                          # the embedded model
    python benchmarks/compare.py v0                             # a padded shape: v0, 110M, 1B, 7B (see pad_model.py)
    python benchmarks/compare.py 110M --curve                   # and what a step costs against nodes and context

One prompt at a time, greedy, up to 256 new tokens or the end of the text; the same openings and weights for all.
Each contestant is a process of its own that stays loaded; they take turns at each opening, so that what else the
machine does hits all alike; a run in which other processes used over 6 % of a core is repeated, or marked `*` where it
stays so. Seconds are prefill and decoding. A padded shape computes exactly what model/ computes, so acceptance is the
embedded model's. Peers: `pip install -r benchmarks/requirements.txt`; llama2.c by --llama2c PATH of its compiled `run`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
QUIET = 0.06  # of a core: what other processes may use while a contestant runs
PUBLISHED = 63  # nodes of mc_sim_7b_63, the root not counted

# name → (worker, its options): what --rows chooses from
ROWS = {
    "ours, plain": ("ours", {}),
    "ours, Medusa": ("ours", {"medusa": "own"}),
    "ours, Medusa, published 64 nodes": ("ours", {"medusa": "published"}),
    "ours, prompt lookup": ("ours", {"medusa": "lookup"}),
    "transformers, dynamic cache": ("transformers", {}),
    "transformers, prompt lookup": ("transformers", {"prompt_lookup_num_tokens": 10}),
    "transformers, static cache, compiled": ("transformers_static", {}),
    "llama.cpp": ("llama_cpp", {}),
    "llama.cpp, no flash attention": ("llama_cpp_no_flash", {}),
    "llama.cpp q8_0 (lossy)": ("llama_cpp_q8", {}),
    "CTranslate2": ("ctranslate2", {}),
    "onnxruntime-genai": ("onnxruntime_genai", {}),
    "llama2.c": ("llama2c", {}),
}
PREFILL = ("ours, plain", "transformers, dynamic cache", "llama.cpp", "llama.cpp, no flash attention", "CTranslate2")


# ------------------------------------------------------------------------------- workers: (folder, args) → a function
#                                                              run(prompt ids, options) → (new ids, decoding steps)


def ours(folder, args):
    import torch

    from llama import Llama
    from loading.trees import published_tree, read_tree
    from tinymedusa import Decoder, PlainDecoder, Tree, call
    from variants.heads import load_heads
    from variants.lookup import Lookup, LookupDecoder

    torch.set_num_threads(args.threads)
    model = Llama.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    heads = load_heads(folder / "medusa", model)
    own, _ = read_tree(folder / "medusa", len(heads), heads.draft_size, args.tree)
    published = published_tree(len(heads), PUBLISHED, heads.draft_size)
    decoders = {
        None: PlainDecoder(model),
        "own": Decoder(model, heads, Tree.from_paths(own)),
        "published": Decoder(model, heads, Tree.from_paths(published)),
        "lookup": LookupDecoder(model, Lookup(model.config), Tree.from_paths(Lookup.chain)),
    }

    def run(ids, medusa=None, stages=call):
        decoder = decoders[medusa]
        decoder.run = stages
        news = [new for (new,) in decoder.generate([ids], args.max_new_tokens)]
        return [t for new in news for t in new], len(news) - 1

    run.model, run.heads = model, heads
    return run


def transformers(folder, args, **generate_options):
    import torch
    import transformers as hf

    torch.set_num_threads(args.threads)
    hf.logging.set_verbosity_error()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()

    def run(ids, **options):
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        hook = model.register_forward_pre_hook(count)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
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


def llama_cpp(folder, args, flash=True, kind=None):
    import llama_cpp as lib
    import numpy as np

    kind = kind or args.dtype
    path = Path(args.scratch) / f"{folder.name}-{kind}.gguf"
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


def llama_cpp_no_flash(folder, args):
    return llama_cpp(folder, args, flash=False)


def llama_cpp_q8(folder, args):
    return llama_cpp(folder, args, flash=False, kind="q8_0")


def ctranslate2(folder, args):
    import ctranslate2 as lib

    target = Path(args.scratch) / f"{folder.name}-ct2"
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

    target = Path(args.scratch) / f"{folder.name}-onnx"
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
    c, path = model.config, Path(args.scratch) / f"{folder.name}-llama2c.bin"
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
                -c.vocab_size,
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
    """Reads {"ids", "options"} a line, answers {"tokens", "steps", "seconds"}; the first answer tells the start-up."""
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
            say(refused=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}")
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
            "--scratch",
            str(args.scratch),
            "--max-new-tokens",
            str(args.max_new_tokens),
            "--eos",
            json.dumps(args.eos),
        ]
        for option in ("tree", "llama2c"):
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
        self.process.stdin.write(json.dumps({"ids": ids, "options": options}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------------- the comparison


def contest(prompts: list, args, names=tuple(ROWS)) -> list[dict]:
    """All rows over all prompts, in turns; `repeats` rounds of each."""
    from tqdm import tqdm

    workers, rows = {}, []
    for name in [n for n in names if not args.rows or any(part in n for part in args.rows)]:
        kind, options = ROWS[name]
        row = {"row": name, "options": options, "worker": kind, "runs": []}
        if kind not in workers:
            workers[kind] = Worker(kind, args)
        if workers[kind].refused is None:
            first = workers[kind].ask(prompts[0], options)  # warms up, and compiles what is to be compiled
            row |= {"startup_s": round(time.perf_counter() - workers[kind].begin, 2), "refused": first.get("refused")}
            workers[kind].begin = time.perf_counter()
        else:
            row["refused"] = workers[kind].refused
        print(f"{name}: {row['refused'] or 'ready'}", file=sys.stderr)
        rows.append(row)
    alive = [row for row in rows if row["refused"] is None]
    for _ in tqdm(range(args.repeats), desc="rounds"):
        for i, ids in enumerate(prompts):
            for row in alive:
                for _ in range(3):  # again while something else ran; a pause, since idle threads spin for a while
                    time.sleep(0.25)
                    run = workers[row["worker"]].ask(ids, row["options"])
                    if run.get("others", 0) <= QUIET:
                        break
                row["runs"].append({"prompt": i} | run)
    for worker in workers.values():
        worker.close()
    return rows


def summary(rows: list) -> None:
    """Adds to each row what the table shows."""
    reference = {run["prompt"]: run["tokens"] for run in rows[0]["runs"]}
    speed = lambda row: statistics.median(len(r["tokens"]) / r["seconds"] for r in row["runs"])
    by_name = {row["row"]: row for row in rows if row["runs"]}
    for row in by_name.values():
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
            "tokens_per_step": round(tokens / steps, 3),
            "peak_mb": round(max(r["peak_mb"] for r in runs)),
            "disturbed": sum(r["others"] > QUIET for r in runs),
            "identical": sum(p is None for p in parts),
            "first_difference": min((p for p in parts if p is not None), default=None),
            "of": len(runs),
        }
        for ratio, other in (("to_transformers", "transformers, dynamic cache"), ("to_plain", "ours, plain")):
            if other in by_name:
                row[ratio] = round(speed(row) / speed(by_name[other]), 2)


def machine(folder, args) -> dict:
    """What a step can't beat: bytes of weights over read bandwidth at that size, multiply-adds over the peak."""
    import torch

    from llama import LlamaConfig

    torch.set_num_threads(args.threads)
    c, size = LlamaConfig.from_pretrained(folder), {"float32": 4, "bfloat16": 2}[args.dtype]
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim + c.num_attention_heads * c.head_dim
    weights = c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size) + c.vocab_size * c.hidden_size
    data, matrix = torch.ones(weights * size // 4), torch.randn(1024, 1024)

    def best(function, repeats=9):
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    bandwidth = data.numel() * 4 / best(data.sum, 99 if weights < 1e7 else 9)
    peak = 1024**3 / best(lambda: matrix @ matrix)
    return {
        "weights_mb": round(weights * size / 1e6, 2),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "multiply_adds_g_per_s": round(peak / 1e9, 1),
        "floor_ms": round(1000 * weights * size / bandwidth, 4),
        "arithmetic_ms_a_node": round(1000 * weights / peak, 4),
    }


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
    for name in (None, "own", "published"):
        run(prompts[0], medusa=name)
        clock = tinymedusa.Stages("cpu")
        for ids in prompts:
            run(ids, medusa=name, stages=clock)
        total = sum(map(sum, clock.seconds.values()))
        table[name or "plain"] = {
            stage: {"median_ms": round(1000 * statistics.median(s), 3), "share": round(sum(s) / total, 3)}
            for stage, s in clock.seconds.items()
        }
    return table


def curve(args, run) -> list[dict]:
    """ms of a whole step against nodes and context, and the tokens per step where a tree breaks even."""
    from itertools import islice

    from loading.trees import published_tree
    from tinymedusa import Decoder, PlainDecoder, Tree

    model, heads, points = run.model, run.heads, []
    context = model.config.max_position_embeddings
    sizes = [1, 2, 4, 8, 16, 32, 64]
    decoders = {1: PlainDecoder(model, eos=())}
    for n in sizes[1:]:
        paths = published_tree(len(heads), n - 1, heads.draft_size)
        decoders[n] = Decoder(model, heads, Tree.from_paths(paths), eos=())
    for length in (128, 512, 2048 - 100):
        if length + 100 > context:
            continue
        seconds = {n: [] for n in sizes}
        for _ in range(args.repeats):
            for n in sizes:
                steps = islice(decoders[n].generate([[1] * length], 60), 9)  # the prefill and 8 steps
                next(steps)
                begin = time.perf_counter()
                for _ in steps:
                    seconds[n].append(time.perf_counter() - begin)
                    begin = time.perf_counter()
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


def markdown(result: dict) -> str:
    lines = [
        f"### {result['title']}",
        "",
        result["setting"],
        "",
        "| | tokens/s (quartiles) | ms/step | tokens/step | to transformers | to ours plain | start-up s | peak MB | "
        "same tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "tokens_per_second" not in row:
            lines.append(f"| {row['row']} | {row['refused']} | | | | | | | |")
            continue
        same = f"{row['identical']} of {row['of']}" + (
            "" if row["first_difference"] is None else f", first difference at {row['first_difference']}"
        )
        lines.append(
            "| {row}{mark} | {tokens_per_second:.0f} ({q[0]:.0f} to {q[1]:.0f}) | {ms_per_step} | {tokens_per_step} "
            "| {t} | {p} | {startup_s} | {peak_mb} | {same} |".format(
                q=row["quartiles"],
                same=same,
                mark=" *" * (row["disturbed"] > row["of"] // 2),
                t=row.get("to_transformers", ""),
                p=row.get("to_plain", ""),
                **row,
            )
        )
    m = result["machine"]
    lines += [
        "",
        f"Floor: {m['weights_mb']} MB of weights a step at {m['read_gb_per_s']} GB/s = {m['floor_ms']} ms; a node's "
        f"arithmetic at {m['multiply_adds_g_per_s']} G multiply-adds/s = {m['arithmetic_ms_a_node']} ms.",
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
            f"| {mode}: step, ms (tokens per step to break even) | " + " | ".join(f"{n} nodes" for n in sizes) + " |",
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
    ax.barh([r["row"] for r in rows], [r["tokens_per_second"] for r in rows], color=colours)
    for i, r in enumerate(rows):
        ax.text(r["tokens_per_second"], i, f" {r['tokens_per_second']:.0f}", va="center", fontsize=8)
    ax.set_xlabel("tokens per second, one prompt at a time")
    ax.set_title(result["title"])
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a model folder with heads in medusa/, or a padded shape")
    parser.add_argument("--rows", action="append", help="only rows whose name contains this; may be repeated")
    parser.add_argument("--prompts", type=int, default=4, help="openings of benchmarks/openings.txt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, for 1B and 7B bfloat16")
    parser.add_argument("--tree", help="paths of the own tree (default: tree.json beside the heads)")
    parser.add_argument("--curve", action="store_true", help="also time steps against nodes and context")
    parser.add_argument("--prefill", type=int, metavar="N", help="also time the reading of a prompt of N tokens")
    parser.add_argument("--llama2c", metavar="PATH", help="a compiled `run` of llama2.c")
    parser.add_argument(
        "--scratch",
        default=str(Path(tempfile.gettempdir()) / "tinymedusa-compare"),
        help="where padded and converted models are kept",
    )
    parser.add_argument("--out", metavar="PREFIX", help="writes PREFIX.json, PREFIX.md and PREFIX.png")
    for hidden in ("--worker", "--eos"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    args.dtype = args.dtype or ("bfloat16" if args.folder in ("1B", "7B") else "float32")
    args.eos = json.loads(args.eos or "[2]")
    shape = None
    if args.folder in ("v0", "110M", "1B", "7B"):
        import pad_model

        shape, folder = args.folder, Path(args.scratch) / args.folder
        if not (folder / "medusa" / "tree.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            pad_model.write(folder, shape)
        args.folder = folder
    args.folder = Path(args.folder)
    if args.gguf:
        return write_gguf(args.folder, *args.gguf)
    if args.worker:
        return work(args)
    Path(args.scratch).mkdir(parents=True, exist_ok=True)
    from llama import LlamaConfig
    from loading.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.folder, LlamaConfig.from_pretrained(args.folder))
    openings = (ROOT / "benchmarks" / "openings.txt").read_text(encoding="utf-8").splitlines()[: args.prompts]
    prompts = [tokenizer.encode(text) for text in openings]
    rows = contest(prompts, args)
    summary(rows)
    ids, run = ([t for prompt in 99 * prompts for t in prompt][: args.prefill], ours(args.folder, args))
    what = f"padded {shape}" if shape else args.folder.resolve().name + "/"
    result = {
        "title": f"{what}, {args.dtype}, {args.threads} thread{'s' * (args.threads > 1)}",
        "setting": f"{len(prompts)} openings x {args.repeats} rounds, up to {args.max_new_tokens} new tokens, greedy, "
        "one at a time; medians. `*`: other processes ran in most of its rounds.",
        "machine": machine(args.folder, args),
        "rows": rows,
        "prefill": prefill(ids, args) if args.prefill else [],
        "stages": {"eager": stages(prompts, args, run)},
        "curve": {"eager": curve(args, run)} if args.curve else {},
    }
    text = markdown(result)
    print(text)
    if args.out:
        for row in rows:
            for run in row["runs"]:
                run["tokens"] = len(run.get("tokens", ()))
        Path(args.out + ".json").write_text(json.dumps(result) + "\n")
        Path(args.out + ".md").write_text(text)
        figure(result, args.out + ".png")


if __name__ == "__main__":
    main()
