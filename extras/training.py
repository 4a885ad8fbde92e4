"""What a training does besides learning: stop and resume, keep others out, several processes, files, reports."""
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
try:
    import fcntl
except ImportError:     # not on every system
    fcntl = None
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from extras.command_line import shard
from extras.forecast import grow_tree, joint_hits
from llama import Llama
from loading.checkpoint import TORCH_DTYPES
from loading.files import (UserError, model_name, read_json, tokenizer_files, writable, write_atomic,
                           write_json, write_text)
from loading.trees import with_temperatures
from tinymedusa import MedusaHeads, Tree
from variants.heads import save as save_heads

def start_processes(args) -> None:
    """Join the other processes that torchrun has started, if any; on GPUs each takes its own."""
    if shard()[1] == 1:
        return
    cuda = args.device.startswith("cuda")
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else args.device
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {shard()[1]}, but: {error}: start it with torchrun") from error

def end_processes() -> None:
    if dist.is_initialized():
        dist.barrier()                 # none may leave while another still listens
        dist.destroy_process_group()

def all_reduce(*tensors: Tensor) -> None:
    """Sums over the processes, in place."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)

@contextmanager
def claimed(folder):
    """Keeps another training out of a folder; nothing is left of the lock when the process ends, however it does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl and shard()[0] == 0:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another training is writing to {folder}: give --out another folder") from None
    finally:
        os.close(handle)

@contextmanager
def interruptible():
    """Ctrl-C and SIGTERM only fill the list that this yields: the training ends after the current step, not in it."""
    received = []
    before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)

reserve = getattr(os, "posix_fallocate", lambda file, begin, size: os.truncate(file, size))

def hidden_file(model: Llama, path, tokens: int, bf16: bool) -> np.memmap:
    """The base model's hidden states of a token file, FILE.hidden-.. beside it, float16 [tokens, H], zeros where they
    are not known yet. Its name says of which weights, text and arithmetic. Its size is announced and reserved."""
    digest = hashlib.sha256(f"{model.config} {read_json(f'{path}.json')['sha256']}{' bfloat16' * bf16}".encode())
    for weight in model.parameters():
        digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    file, size = Path(f"{path}.hidden-{digest.hexdigest()[:8]}"), 2 * tokens * model.config.hidden_size
    if shard()[0] == 0 and (not file.exists() or file.stat().st_size < size):
        print(f"{file}: the hidden states of {tokens} tokens take {size / 1e6:.1f} MB; keep them for the next training "
              "on this text, or delete them", file=sys.stderr)
    try:
        with open(file, "ab") as opened:
            reserve(opened.fileno(), 0, size)           # a mapped file that finds no room ends the process
    except OSError as error:
        raise UserError(f"can't write {file}, {size / 1e6:.1f} MB: {error.strerror}: move the token file "
                        "to where there is room") from error
    return np.memmap(file, np.float16, "r+", shape=(tokens, model.config.hidden_size))

def settings(args) -> dict:
    """What a resumed training must share with the one it goes on with; of the data, the contents."""
    free = ("resume", "eval", "json", "device", "out", "save_every", "log_every", "tree_nodes", "data")
    digests = [read_json(f"{path}.json").get("sha256") for path in args.data]
    return {k: v for k, v in vars(args).items() if k not in free} | {"data": digests, "processes": shard()[1]}

def save_checkpoint(path, model, heads, optimizer, step: int, fixed: dict) -> None:
    state = {"step": step, "heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "settings": fixed,
             "threads": torch.get_num_threads(), "model": model.state_dict() if fixed["medusa_2"] else None}
    def write(file: Path) -> None:
        torch.save(state, file)
        with open(file, "ab") as opened:
            opened.write(hashlib.sha256(np.memmap(file, np.uint8, "r")).digest())
    write_atomic(path, write)

def load_checkpoint(path, model, heads, optimizer, fixed: dict) -> int:
    """What `save_checkpoint` wrote, put back → the number of steps done. UserError: there is none, it is of another
    training, or not a byte of it can be trusted, since its hash is another one."""
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint to resume from: train without --resume")
    try:
        data = np.memmap(path, np.uint8, "r")
        if hashlib.sha256(data[:-32]).digest() != data[-32:].tobytes():
            raise ValueError("it is damaged, or of another version: delete it, and train without --resume")
        state = torch.load(path, map_location=model.norm.weight.device, weights_only=True)
        for key, value in fixed.items():
            if state["settings"][key] != value:
                raise UserError(f"{path} was trained with {key} {state['settings'][key]!r}, not {value!r}: "
                                "resume with the same data and options")
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        if fixed["medusa_2"]:
            model.load_state_dict(state["model"])
        torch.set_num_threads(state["threads"])              # sums of another order would differ in the last bit
        return state["step"]
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # torch raises whatever unpickling and loading do
        raise UserError(f"can't read {path}: {type(error).__name__} {error}") from error

def known(values, counts: Tensor) -> list:
    """Means as JSON has them: None where nothing was counted."""
    return [value if n else None for value, n in zip(values, counts.tolist(), strict=True)]

class Log:
    """metrics.jsonl: means over the labels of some steps, and when resumed, the lines up to there."""
    def __init__(self, file: Path, done: int):
        self.file, self.tokens, self.begin, lines = file, 0, time.perf_counter(), []
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if done and file.is_file() else []:
            with suppress(ValueError, RecursionError):          # only a log: what can't be read of it is left out
                lines.append(json.loads(text))
        self.lines = [line for line in lines
                      if isinstance(line, dict) and type(line.get("step")) is int and line["step"] <= done]

    def add(self, step: int, rate: float, sums: Tensor, counts: Tensor, weights: Tensor) -> dict:
        """The means of sums [3, K], each head's loss, top-1 and top-5, over counts [3, K]. UserError: it diverged."""
        means = sums / counts.clamp(min=1)
        if not means[0].isfinite().all():
            raise UserError(f"the loss is no longer finite at step {step}: train again with a lower --lr")
        loss, top1, top5 = map(known, means.tolist(), counts)
        speed = self.tokens / (time.perf_counter() - self.begin)
        self.lines.append({"step": step, "loss": float(weights @ means[0]), "head_loss": loss, "top1": top1,
                           "top5": top5, "lr": rate, "tokens_per_second": speed})
        if shard()[0] == 0:
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in self.lines))
        return self.lines[-1]

def save_results(args, model: Llama, heads: MedusaHeads) -> Path:
    """Writes heads, or with --medusa-2 the new base model in HF's layout with its tokenizer → the heads' folder. Heads
    in the dtype that their base model is stored in; with --medusa-2 all in float32, lest small updates be lost."""
    out = Path(args.out)
    folder = out / "medusa" if args.medusa_2 else out
    writable(folder / "tree.json").unlink(missing_ok=True)   # an older one does not fit
    if not args.medusa_2:
        save_heads(folder, heads, model, model_name(args.model), TORCH_DTYPES[model.config.dtype])
        return folder
    for name, file in tokenizer_files(args.model).items():
        write_atomic(out / name, lambda p, file=file: p.write_bytes(file.read_bytes()))
    model.save(out, torch.float32)
    save_heads(folder, heads, model, model_name(out), torch.float32)
    return folder

def save_trees(folder: Path, found: dict, nodes: int) -> dict:
    """Writes tree.json, a tree for each temperature → the trees. found: temperature → (figures, ranks, own)."""
    entries = {t: {"paths": grow_tree(joint_hits(ranks), nodes), "sampling": {"temperature": t},
                   "source": f"joint hits at {sum(map(len, own))} held-out places of the heads' own data"}
               for t, (_, ranks, own) in found.items()}
    write_json(folder / "tree.json", with_temperatures(entries))
    return {t: Tree.from_paths(entry["paths"]) for t, entry in entries.items()}

def report(result: dict) -> str:
    number = lambda v: f"{'-' if v is None else f'{v:.3f}':>7}"
    lines = [f"{result['out']}: {result['kind']}, {result['parameters']} parameters"]
    for found in (result, *result["sampled"]):
        lines += [f"temperature {found['temperature']}: {found['documents']} documents",
                  f"base model: {found['base_loss']} nats per token",
                  "top: share of the tokens to learn among the head's first 1, 2, .. 10 guesses",
                  "head   loss  " + "".join(f"{f'top-{r}':>7}" for r in range(1, 11))]
        lines += [f"{k:>4}{number(loss)}  " + "".join(map(number, top or []))
                  for k, (loss, top) in enumerate(zip(found["head_loss"], found["top"], strict=True), 1)]
        tree = found["acceptance"]
        lines += [f"tree of {tree['nodes']} nodes, root included: {tree['tokens_per_step']} tokens per step",
                  "  = new tokens behind the first / steps, had the model written these very documents (prompts given)",
                  "steps that accept at least 0, 1, .. drafts: " + " ".join(f"{v:.3f}" for v in tree["depth_reach"]),
                  "steps that accept the node: " + "  ".join(f"[{n}] {v:.3f}" for n, v in tree["node_reach"].items())]
    return "\n".join(lines)
