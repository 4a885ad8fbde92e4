"""Tiny models with vocabularies so small that even random heads get accepted; no weights, milliseconds."""
import os
import random
import shutil
import sys
from pathlib import Path

# so that a command doesn't time how many threads are best, which takes long beside another test; `cli` lets it do so
# where `auto` is among the arguments, and test_readme.py in the first command of each script
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parent         # pytest puts it on the path: `from conftest import ..` in any folder
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT))

from extras.command_line import command_line  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from loading.files import write_json  # noqa: E402
from tinymedusa import MedusaHeads  # noqa: E402
from variants.heads import build_heads, save  # noqa: E402

torch.set_num_threads(1)
MODEL = ROOT / "model"


def tiny_llama(seed=0, dtype=torch.float64, std=0.35, **over) -> Llama:
    """A random Llama, float64 by default so that equality can be exact."""
    torch.manual_seed(seed)
    config = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    model = Llama(LlamaConfig.from_dict(config | over))
    for p in model.parameters():
        p.data.normal_(0, std) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    model = model.to(dtype)
    model.fill_rotary_table()                   # in float32 again
    return model.eval()


def tiny_heads(model, num_heads=4, noise=0.2, seed=1, **options) -> MedusaHeads:
    """Heads that guess about as the base model does; options of build_heads."""
    torch.manual_seed(seed)
    heads = build_heads(model, num_heads, **options)
    for p in heads.parameters():
        p.data.add_(noise * torch.randn_like(p))
    return heads.eval()


def native_llama(model, dtype=None, quantized=False):
    """The C++ engine's copy of a torch model's weights; dtype None: the model's own."""
    from fast.native import NativeLlama
    pieces = ((name, slice(0, len(p)), p.detach()) for name, p in model.named_parameters())
    return NativeLlama(model.config, pieces, dtype or model.norm.weight.dtype, quantized)


def save_heads(heads, folder, model, base="tiny") -> None:
    save(folder, heads, model, base)


def random_tree(rng: random.Random, num_heads=4, ranks=4, nodes=20) -> list:
    """Random paths, every ancestor in, in random order."""
    paths = [()]
    for _ in range(rng.randint(0, nodes)):
        parent = rng.choice(paths)
        if len(parent) < num_heads:
            paths.append((*parent, rng.randrange(ranks)))
    paths = [list(p) for p in set(paths) if p]
    rng.shuffle(paths)
    return paths


def random_prompt(rng: random.Random, longest=60, vocab_size=12) -> list:
    return [1] + [rng.randrange(3, vocab_size) for _ in range(rng.randint(0, longest))]


def byte_tokenizer(path, vocab_size=300) -> Tokenizer:
    """A byte-level BPE with ids 0/1/2 = <unk>/<s>/</s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((ROOT / "benchmarks" / "openings.txt").read_text().splitlines(), trainer)
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    """The folder that every `tiny_folder` is a copy of."""
    folder = tmp_path_factory.mktemp("made_once")
    model = tiny_llama(dtype=torch.float32, vocab_size=300, max_position_embeddings=64)
    model.save(folder)
    byte_tokenizer(folder / "tokenizer.json")
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    save_heads(tiny_heads(model, 3), folder / "medusa", model)
    return folder


@pytest.fixture
def tiny_folder(made_once, tmp_path) -> Path:
    """A whole model folder, with heads in `medusa/`."""
    torch.manual_seed(1)                        # as if made here
    return Path(shutil.copytree(made_once, tmp_path / "tiny"))


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli("generate", "--json", ...) → (exit status, stdout, stderr), by the script's own main, in this process."""
    def run(script, *args):
        module = __import__(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        threads, status = torch.get_num_threads(), 0
        with monkeypatch.context() as patch:
            if "auto" in args:
                patch.delenv("OMP_NUM_THREADS", raising=False)
            try:
                command_line(module.main)
            except SystemExit as stop:
                status = stop.code
        torch.set_num_threads(threads)
        return status, *capfd.readouterr()
    return run


class Tape(TorchDispatchMode):
    """In a CUDA graph's place: every operation with the very tensors that it reads and writes, and no Python between.
    As there, nothing has happened when all is recorded."""
    def __init__(self, function):
        super().__init__()
        self.operations, self.before = [], []
        with self:
            function()
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.__name__.partition(".")[0].endswith("_"):                  # in place
            self.before.append((args[0], args[0].clone()))
        out = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, out in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, tuple | list) else [x] for x in (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():      # no view, nor in place
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """How often a tape was recorded, in a graph's place."""
    made = []
    def recorded(function, device):
        made.append(Tape(function))
        return made[-1].replay
    monkeypatch.setattr("fast.graphs.recorded", recorded)
    return made
