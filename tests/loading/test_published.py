"""Heads in and out: vLLM's layout, what published files leave out, and --export into the programs' own modules, which
are written out here from their descriptions."""
import json
import shutil

import pytest
import torch
from conftest import MODEL, byte_tokenizer, tiny_heads, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import silu

import train_heads
from llama import Llama
from loading import export
from loading.checkpoint import Checkpoint
from loading.files import UserError, read_json, write_json
from loading.heads import find_heads
from variants.heads import load_heads, save

SIZE, VOCABULARY, HEADS = 32, 300, 3


# --------------------------------------------------------------------------------------- the programs' own modules

class ResBlock(nn.Module):
    """FasterDecoding's."""
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return x + silu(self.linear(x))


def official_heads(num_heads, num_layers=1, size=SIZE, vocabulary=VOCABULARY) -> nn.ModuleList:
    """Theirs: with several layers the same module comes several times."""
    return nn.ModuleList([nn.Sequential(*([ResBlock(size)] * num_layers), nn.Linear(size, vocabulary, bias=False))
                          for _ in range(num_heads)])


class ResidualBlock(nn.Module):
    """vLLM's."""
    def __init__(self, size, num_layers, bias):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size, bias=bias) for _ in range(num_layers)])

    def forward(self, x):
        for layer in self.layers:
            x = x + silu(layer(x))
        return x


class Medusa(nn.Module):
    """vLLM's, by its config and its tensors. Strict: none may be missing, none left over."""
    def __init__(self, config: dict, tensors: dict):
        super().__init__()
        assert config["model_type"] == "medusa" and config["architectures"] == ["MedusaModel"]
        size, self.vocabulary, rows = (config[k] for k in ("hidden_size", "vocab_size", "truncated_vocab_size"))
        matrix = lambda: nn.Linear(size, rows, bias=False)
        block = lambda: ResidualBlock(size, config["num_hidden_layers"], config.get("medusa_fc_bias", False))
        self.blocks = nn.ModuleList([block() for _ in range(config["num_heads"])])
        if config.get("original_lm_head"):
            self.lm_head = matrix()
        else:
            self.lm_heads = nn.ModuleList([matrix() for _ in self.blocks])
        tensors = {name.replace("medusa_heads.", ""): t for name, t in tensors.items()}
        self.token_map = tensors.pop("token_map", None) if rows < self.vocabulary else None
        assert rows == self.vocabulary or self.token_map is not None
        if config.get("original_lm_head") and "lm_heads.0.weight" in tensors:
            tensors["lm_head.weight"] = tensors.pop("lm_heads.0.weight")
        chosen = lambda t: t if self.token_map is None or len(t) == rows else t[self.token_map]
        self.load_state_dict({n: chosen(t) if "lm_head" in n else t for n, t in tensors.items()}, strict=True)

    def forward(self, hidden):
        """[T, H] → [T, K, V], -inf for what can't be drafted."""
        matrices = getattr(self, "lm_heads", None) or [self.lm_head] * len(self.blocks)
        logits = torch.stack([m(block(hidden)) for block, m in zip(self.blocks, matrices, strict=True)], dim=1)
        if self.token_map is None:
            return logits
        full = torch.full((*logits.shape[:-1], self.vocabulary), -torch.inf)
        full[..., self.token_map] = logits
        return full


def drafted(heads, hidden) -> torch.Tensor:
    """The logits of ours, in the same form."""
    logits = heads(hidden[:, None], torch.zeros(len(hidden), 1, dtype=torch.long)).detach()
    if (token_map := getattr(heads, "token_map", None)) is None:
        return logits
    full = torch.full((*logits.shape[:-1], heads.model[0].config.vocab_size), -torch.inf)
    full[..., token_map] = logits
    return full


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def model() -> Llama:
    return tiny_llama(dtype=torch.float32, vocab_size=VOCABULARY, max_position_embeddings=64)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------- vLLM's layout, read

def vllm_folder(folder, bias=False, layers=1, draft=None, **over) -> tuple[dict, dict]:
    """Random heads as vLLM has them → config and tensors, in `folder` too."""
    g = torch.Generator().manual_seed(7)
    random = lambda *shape: 0.3 * torch.randn(*shape, generator=g)
    tensors = {f"lm_heads.{k}.weight": random(draft or VOCABULARY, SIZE) for k in range(HEADS)}
    for k in range(HEADS):
        for j in range(layers):
            tensors[f"blocks.{k}.layers.{j}.weight"] = random(SIZE, SIZE)
            tensors |= {f"blocks.{k}.layers.{j}.bias": random(SIZE)} if bias else {}
    if draft:
        tensors["token_map"] = torch.randperm(VOCABULARY, generator=g)[:draft]
    config = {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": HEADS, "num_hidden_layers": layers,
              "hidden_size": SIZE, "vocab_size": VOCABULARY, "truncated_vocab_size": draft or VOCABULARY}
    config |= ({"medusa_fc_bias": True} if bias else {}) | over
    put(folder, config, tensors)
    return config, tensors


def put(folder, config: dict, tensors: dict) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("draft", [None, 9])
def test_vllm_layout(bias, layers, draft, tmp_path, model, hidden):
    """The very tensors under other names, and the logits of vLLM's module; a bias that is left out is zero."""
    config, tensors = vllm_folder(tmp_path / "v", bias, layers, draft)
    heads = load_heads(tmp_path / "v", model)
    state = heads.state_dict()
    for k in range(HEADS):
        assert state[f"{k}.{layers}.weight"].equal(tensors[f"lm_heads.{k}.weight"])
        for j in range(layers):
            assert state[f"{k}.{j}.linear.weight"].equal(tensors[f"blocks.{k}.layers.{j}.weight"])
            assert state[f"{k}.{j}.linear.bias"].equal(tensors.get(f"blocks.{k}.layers.{j}.bias", torch.zeros(SIZE)))
    assert draft is None or state["token_map"].equal(tensors["token_map"])
    assert torch.equal(drafted(heads, hidden), Medusa(config, tensors)(hidden))


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
@pytest.mark.parametrize("draft", [None, 9])
def test_one_lm_head_for_all_of_vllms_heads(name, draft, tmp_path, model, hidden):
    """original_lm_head: a matrix of the file's, not the base model's; where it has a row for every id, token_map
    chooses."""
    config, tensors = vllm_folder(tmp_path / "v", bias=True, draft=draft, original_lm_head=True)
    matrices = [tensors.pop(f"lm_heads.{k}.weight") for k in range(HEADS)]
    for matrix in [matrices[1]] + ([torch.randn(VOCABULARY, SIZE)] if draft else []):
        tensors[name] = matrix
        put(tmp_path / "v", config, tensors)
        heads = load_heads(tmp_path / "v", model)
        assert torch.equal(drafted(heads, hidden), Medusa(config, tensors)(hidden))
        assert not heads[0][-1].weight.equal(model.lm_head.weight[:len(heads[0][-1].weight)])


@pytest.mark.parametrize("draft", [None, 9])
def test_vllms_heads_without_a_matrix_use_the_base_models(draft, tmp_path, model, hidden):
    config, tensors = vllm_folder(tmp_path / "v", draft=draft, original_lm_head=True)
    tensors = {name: t for name, t in tensors.items() if "lm_head" not in name}
    put(tmp_path / "v", config, tensors)
    expected = Medusa(config, tensors | {"lm_head.weight": model.lm_head.weight})(hidden)
    assert torch.allclose(drafted(load_heads(tmp_path / "v", model), hidden), expected, atol=1e-5)


def test_vllms_heads_with_all_rows_and_a_map(tmp_path, model, hidden):
    config, tensors = vllm_folder(tmp_path / "v", draft=9)
    tensors |= {f"lm_heads.{k}.weight": torch.randn(VOCABULARY, SIZE) for k in range(HEADS)}
    put(tmp_path / "v", config, tensors)
    assert torch.equal(drafted(load_heads(tmp_path / "v", model), hidden), Medusa(config, tensors)(hidden))
    tensors["token_map"][0] = VOCABULARY
    put(tmp_path / "v", config, tensors)
    with pytest.raises(UserError, match="token_map must hold different ids below 300"):
        load_heads(tmp_path / "v", model)


def test_what_vllm_ignores_or_leaves_open(tmp_path, model, hidden, capsys):
    """A map of the whole vocabulary; the names' prefix; counts left to the names; biases that the config denies."""
    config, tensors = vllm_folder(tmp_path / "v", bias=True)
    expected = Medusa(config, tensors)(hidden)
    tensors["token_map"] = torch.arange(VOCABULARY)
    tensors = {f"medusa_heads.{name}" if "blocks" in name else name: t for name, t in tensors.items()}
    for change in ({}, {"truncated_vocab_size": None}, {"num_heads": None, "num_hidden_layers": None},
                   {"num_heads": None, "medusa_num_heads": HEADS}, {"medusa_fc_bias": None}, {"model_type": None},
                   {"num_heads": 2}):
        put(tmp_path / "v", config | change, tensors)
        heads = load_heads(tmp_path / "v", model)
        assert torch.equal(drafted(heads, hidden), expected) and heads.draft_size == VOCABULARY
    assert "config.json says 2 heads, the file holds 3: all are used" in capsys.readouterr().err


@pytest.mark.parametrize("config, tensors, says", [
    ({"num_heads": "3"}, {}, "not Medusa heads, config.json has num_heads '3', expected a whole number"),
    ({"num_hidden_layers": 2}, {}, "medusa_num_layers 2, the tensors tell 1"),
    ({"truncated_vocab_size": 301}, {}, "config.json has truncated_vocab_size 301, expected at most the vocabulary"),
    ({"truncated_vocab_size": 9}, {}, "missing: token_map"),
    ({"hidden_size": 64}, {}, "the heads expect hidden_size 64, the model has 32"),
    ({"medusa_fc_bias": True}, {}, r"missing: blocks.0.layers.0.bias, blocks.1.layers.0.bias"),
    ({}, {"blocks.1.layers.0.bias": torch.zeros(SIZE)}, "missing: blocks.0.layers.0.bias, blocks.2.layers.0.bias$"),
    ({}, {"lm_heads.1.weight": None}, "missing: lm_heads.1.weight"),
    ({}, {"lm_head.weight": torch.zeros(VOCABULARY, SIZE)}, "unexpected: lm_head.weight"),
    ({}, {"blocks.0.layers.0.weight": torch.zeros(8, 8)}, r"blocks.0.layers.0.weight has shape \[8, 8\], expected"),
    ({}, {"lm_heads.0.weight": torch.zeros(())}, r"lm_heads.0.weight has shape \[\], expected \[300, 32\]"),
    ({}, {"blocks.999999999.layers.0.weight": torch.zeros(1)}, "tell 1000000000 heads of 1 blocks, but there are only"),
])
def test_what_is_not_understood_of_vllms_is_named(config, tensors, says, tmp_path, model):
    before, stored = vllm_folder(tmp_path / "v")
    put(tmp_path / "v", before | config, {n: t for n, t in (stored | tensors).items() if t is not None})
    with pytest.raises(UserError, match=says):
        load_heads(tmp_path / "v", model)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "pytorch_model.bin"])
def test_official_heads_that_say_model_type_medusa(file, tmp_path, model):
    heads = tiny_heads(model, HEADS)
    write_json(tmp_path / "config.json", {"model_type": "medusa", "medusa_num_heads": HEADS, "medusa_num_layers": 1})
    (save_file if file.endswith("safetensors") else torch.save)(dict(heads.state_dict()), tmp_path / file)
    assert same(load_heads(tmp_path, model).state_dict(), heads.state_dict())


# ------------------------------------------------------------------------------- heads inside a model, left-out blocks

def with_heads_inside(folder, tensors: dict, **config) -> None:
    """A whole model's folder (`tiny_folder`) → its heads among its tensors, as Medusa 1.0 has them."""
    shutil.rmtree(folder / "medusa")
    inside = {f"medusa_head.{name}": t.clone() for name, t in tensors.items()}
    save_file(load_file(folder / "model.safetensors") | inside, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", read_json(folder / "config.json") | config)


def test_heads_inside_a_model_whose_config_does_not_say_so(tiny_folder, cli):
    heads = load_heads(tiny_folder / "medusa", Llama.from_pretrained(tiny_folder))
    args = ("--prompt", "the dog", "--max-new-tokens", 12, "--tree", "[[0],[0,0],[1]]", "--json",
            "--model", tiny_folder)
    status, out, _ = cli("generate", *args)
    own = json.loads(out)
    with_heads_inside(tiny_folder, heads.state_dict())
    assert "medusa_num_heads" not in read_json(tiny_folder / "config.json")
    for more in ([], ["--heads", tiny_folder]):
        status, out, err = cli("generate", *args, *more)
        assert status == 0 and err == ""
        assert (json.loads(out)["steps"], json.loads(out)["token_ids"]) == (own["steps"], own["token_ids"])


@pytest.mark.parametrize("layers, kept, config", [
    (2, 0, {"medusa_num_heads": 3, "medusa_num_layers": 2}), (2, 1, {"medusa_num_heads": 3, "medusa_num_layers": 2}),
    (5, 0, {"medusa_num_heads": 3, "medusa_num_layers": 5}), (2, 0, {})])
def test_blocks_that_are_one_module_and_stored_once(layers, kept, config, tiny_folder, hidden):
    """safetensors keep one name of a shared tensor: the official code's two blocks are one."""
    theirs = official_heads(HEADS, layers)
    state = {n: t for n, t in theirs.state_dict().items() if ".linear." not in n or f".{kept}.linear." in n}
    with_heads_inside(tiny_folder, state, **config)
    heads = load_heads(tiny_folder, Llama.from_pretrained(tiny_folder))
    assert same(heads.state_dict(), theirs.state_dict())
    assert torch.equal(drafted(heads, hidden), torch.stack([head(hidden) for head in theirs], 1))


def test_official_heads_whose_block_is_stored_once(tmp_path, model, hidden):
    """Beside a config, too; each head may have kept another name of its block."""
    theirs = official_heads(HEADS, 3)
    state = {n: t for n, t in theirs.state_dict().items() if ".linear." not in n or n[0] == n[2]}
    write_json(tmp_path / "config.json", {"medusa_num_heads": HEADS, "medusa_num_layers": 3})
    save_file(state, tmp_path / "medusa_lm_head.safetensors")
    heads = load_heads(tmp_path, model)
    assert same(heads.state_dict(), theirs.state_dict())
    assert torch.equal(drafted(heads, hidden), torch.stack([head(hidden) for head in theirs], 1))


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("0.0.linear.bias"), "missing: 0.0.linear.bias, 0.1.linear.weight"),
    (lambda t: t.update({"1.1.linear.bias": t["1.0.linear.bias"], "0.0.linear.bias": None}),
     "missing: 0.0.linear.bias"),
    (lambda t: t.update({"1.1.linear.weight": torch.zeros(SIZE, SIZE), "1.1.linear.bias": torch.zeros(SIZE)}),
     "missing: 0.1.linear.weight, 0.1.linear.bias, 2.1.linear.weight"),
    (lambda t: t.update({f"{k}.2.weight": None for k in range(HEADS)}), "medusa_num_layers 2, the tensors tell 1"),
    (lambda t: t.update({"0.999999999.weight": torch.zeros(1)}), "999999999 blocks"),
])
def test_blocks_that_are_just_missing(change, says, tiny_folder):
    state = {n: t for n, t in official_heads(HEADS, 2).state_dict().items() if ".1.linear." not in n}
    change(state)
    with_heads_inside(tiny_folder, {n: t for n, t in state.items() if t is not None}, medusa_num_heads=3,
                      medusa_num_layers=2)
    with pytest.raises(UserError, match=says):
        load_heads(tiny_folder, Llama.from_pretrained(tiny_folder))


def test_a_block_missing_in_a_heads_folder_is_not_made_up(tmp_path, model):
    save(tmp_path, tiny_heads(model, HEADS, num_layers=2), model, "tiny")
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if ".1.linear." not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="medusa_num_layers 2, the tensors tell 1"):
        load_heads(tmp_path, model)


# ------------------------------------------------------------------------------------------------------------ --export

def exported(cli, layout, folder, model, out, *more) -> dict:
    """The tensors that --export wrote, by the names in its file."""
    status, text, err = cli("train_heads", "--export", layout, folder, "--model", model, "--out", out, *more)
    assert status == 0 and err == "", err
    assert text.startswith(f"{out}: ") and text.endswith(f"heads in the layout {layout}\n")
    weights = "medusa_lm_head.pt" if layout == "official" else "model.safetensors"
    files = {path.name for path in out.iterdir() if path.is_file()} - {"notes.txt"}
    assert files == {weights, "config.json"} or layout == "official-1.0"
    if layout == "official":
        return torch.load(out / weights, weights_only=True)
    with safe_open(out / weights, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}                # without it older transformers refuse a model
    return load_file(out / weights)


def module_of(layout, out, tensors, num_layers, size=SIZE, vocabulary=VOCABULARY):
    """The program's module, with these tensors in it → a function of hidden states."""
    if layout == "vllm":
        return Medusa(read_json(out / "config.json"), tensors)
    config = read_json(out / "config.json")
    heads = official_heads(config["medusa_num_heads"], config["medusa_num_layers"], size, vocabulary)
    assert config["medusa_num_layers"] == num_layers
    prefix = "medusa_head." if layout == "official-1.0" else ""
    heads.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, strict=True)
    return lambda hidden: torch.stack([head(hidden) for head in heads], dim=1)


def official_name(name: str, num_layers: int) -> str:
    """Of any layout's name."""
    part = name.removeprefix("medusa_head.").split(".")
    if part[0] == "blocks":
        return f"{part[1]}.{part[3]}.linear.{part[4]}"
    return f"{part[1]}.{num_layers}.weight" if part[0] == "lm_heads" else ".".join(part)


@pytest.mark.parametrize("layout, options", [
    ("official", {}), ("official-1.0", {}), ("vllm", {}), ("vllm", {"num_layers": 2}),
    ("official", {"tie_lm_head": True}), ("official-1.0", {"tie_lm_head": True}), ("vllm", {"tie_lm_head": True}),
    ("vllm", {"token_map": torch.tensor([7, 3, 250, 12])}),
    ("vllm", {"token_map": torch.tensor([7, 3, 250, 12]), "tie_lm_head": True, "num_layers": 2})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_export(layout, options, dtype, tiny_folder, hidden, tmp_path, cli):
    """Ours → the program's own module, strictly, with the very tensors and our logits → ours again."""
    model = Llama.from_pretrained(tiny_folder)
    num_layers, tied = options.get("num_layers", 1), options.get("tie_lm_head", False)
    save(tmp_path / "own", tiny_heads(model, HEADS, **options), model, "tiny", dtype)
    own, stored = load_heads(tmp_path / "own", model), load_file(tmp_path / "own" / "model.safetensors")
    out = tmp_path / "new"
    tensors = exported(cli, layout, tmp_path / "own", tiny_folder, out)
    if tied:
        rows = load_file(tiny_folder / "model.safetensors")["lm_head.weight"]
        rows = rows[options["token_map"]] if "token_map" in options else rows
        stored |= {f"{k}.{num_layers}.weight": rows for k in range(HEADS)}
    base = load_file(tiny_folder / "model.safetensors") if layout == "official-1.0" else {}
    assert same({n: tensors[n] for n in base}, base)
    found = {official_name(n, num_layers): t for n, t in tensors.items() if n not in base}
    assert same({n: t.to(found[n].dtype) for n, t in stored.items()}, found)
    assert tied or {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in stored.items()}
    theirs, ours = module_of(layout, out, tensors, num_layers)(hidden), drafted(own, hidden)
    assert torch.allclose(theirs, ours, atol=1e-5) if tied else torch.equal(theirs, ours)
    again = load_heads(out, model)
    assert torch.equal(drafted(again, hidden), theirs)
    assert same(again.state_dict(), {n: t.float() if t.is_floating_point() else t for n, t in stored.items()})
    assert tied or same(again.state_dict(), own.state_dict())


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_the_embedded_heads_exported(layout, tmp_path, cli):
    """`model/medusa-paper` for FasterDecoding's code and for vLLM: the same tensors, logits and text."""
    model = Llama.from_pretrained(MODEL)
    own, hidden = load_heads(MODEL / "medusa-paper", model), torch.randn(5, 64)
    tensors = exported(cli, layout, MODEL / "medusa-paper", MODEL, tmp_path / "new")
    stored = load_file(MODEL / "medusa-paper" / "model.safetensors")
    base = load_file(MODEL / "model.safetensors") if layout == "official-1.0" else {}
    assert same({official_name(n, 1): t for n, t in tensors.items() if n not in base}, stored)
    assert same({n: tensors[n] for n in base}, base) and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert torch.equal(module_of(layout, tmp_path / "new", tensors, 1, 64, 4096)(hidden), drafted(own, hidden))
    assert same(load_heads(tmp_path / "new", model).state_dict(), own.state_dict())
    args = ("generate", "--max-new-tokens", 24, "--tree", "[[0],[0,0],[1]]", "--json", "--heads")
    texts = [json.loads(cli(*args, heads)[1]) for heads in (MODEL / "medusa-paper", tmp_path / "new")]
    assert texts[0]["token_ids"] == texts[1]["token_ids"] and texts[0]["steps"] == texts[1]["steps"] < 20


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_of_1_0_in_transformers(tied, tmp_path, cli):
    """As the official class is, a LlamaForCausalLM with heads in it; from_pretrained finds nothing missing or over."""
    transformers = pytest.importorskip("transformers")

    class MedusaLlama(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.medusa_head = official_heads(config.medusa_num_heads, config.medusa_num_layers)
            self.post_init()
    model = tiny_llama(dtype=torch.float32, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    model.save(tmp_path / "base")
    byte_tokenizer(tmp_path / "base" / "tokenizer.json")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"also")
    heads = tiny_heads(model, HEADS, tie_lm_head=tied)
    save(tmp_path / "own", heads, model, "base")
    exported(cli, "official-1.0", tmp_path / "own", tmp_path / "base", tmp_path / "new")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    theirs, info = MedusaLlama.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.tensor([[1, 40, 77, 200]])
    hidden = model(ids)
    assert torch.allclose(theirs(ids).logits, model.lm_head(hidden), atol=1e-4)
    logits = torch.stack([head(hidden[0]) for head in theirs.medusa_head], 1)
    assert torch.allclose(logits, drafted(heads, hidden[0]), atol=1e-5)
    status, _, err = cli("generate", "--model", tmp_path / "new", "--prompt", "the dog", "--max-new-tokens", 3)
    assert status == 0, err


@pytest.mark.parametrize("layout", ["official", "official-1.0"])
def test_blocks_that_are_one_module_go_back(layout, tiny_folder, hidden, tmp_path, cli):
    theirs = official_heads(HEADS, 2)
    state = {n: t for n, t in theirs.state_dict().items() if ".1.linear." not in n}
    with_heads_inside(tiny_folder, state, medusa_num_heads=HEADS, medusa_num_layers=2)
    tensors = exported(cli, layout, tiny_folder, tiny_folder, tmp_path / "new")
    logits = torch.stack([head(hidden) for head in theirs], 1)
    assert torch.equal(module_of(layout, tmp_path / "new", tensors, 2)(hidden), logits)


@pytest.mark.parametrize("bias", [False, True])
def test_vllms_heads_to_vllm(bias, tiny_folder, hidden, tmp_path, cli):
    """Biases that were left out are written as zeros, in the dtype of the rest."""
    config, tensors = vllm_folder(tmp_path / "v", bias, layers=2)
    put(tmp_path / "v", config, {n: t.half() for n, t in tensors.items()})
    found = exported(cli, "vllm", tmp_path / "v", tiny_folder, tmp_path / "new")
    assert {t.dtype for t in found.values()} == {torch.float16} and same({n: found[n].float() for n in tensors}, {
        n: t.half().float() for n, t in tensors.items()})
    assert torch.equal(Medusa(read_json(tmp_path / "new" / "config.json"), found)(hidden),
                       drafted(load_heads(tmp_path / "v", Llama.from_pretrained(tiny_folder)), hidden))


ALL = ("official", "official-1.0", "vllm")


@pytest.mark.parametrize("layouts, options, says", [
    (ALL, {"kind": "root"}, "kind 'root': its heads see hidden states only"), (ALL, {"kind": "hydra"}, "kind 'hydra'"),
    (ALL, {"recent": 2}, "recent 2: its heads see one hidden state"),
    (ALL, {"width": 8}, "width 8: its blocks are square"),
    (ALL[:2], {"token_map": torch.arange(9)}, "a draft vocabulary of 9: its heads guess any token"),
    (ALL[:2], {"num_layers": 2}, "0.1.linear.weight: its blocks of a head are one module"),
    (ALL[:1], {"num_heads": 6}, "6 heads: its loader makes 5")])
def test_export_refuses_what_a_layout_can_not_hold(layouts, options, says, tiny_folder, tmp_path, cli):
    model = Llama.from_pretrained(tiny_folder)
    save(tmp_path / "own", tiny_heads(model, **{"num_heads": HEADS} | options), model, "tiny")
    for layout in layouts:
        refused(cli, tmp_path / "new", f"{layout} can't hold {says}", "--export", layout, tmp_path / "own", "--model",
                tiny_folder)


@pytest.mark.parametrize("layout", ALL)
def test_export_refuses_a_shared_first_block(layout):
    options = {"kind": "medusa", "recent": 1, "width": None, "draft_size": None, "num_heads": 3, "trunk": 64}
    with pytest.raises(UserError, match=f"{layout} can't hold trunk 64: its heads share no block"):
        export.check_kind(layout, Checkpoint("heads x", options, {}))


def refused(cli, out, says, *args) -> None:
    status, text, err = cli("train_heads", "--out", out, *args)
    assert status == 2 and text == "" and err.count("\n") == 1 and says in err, err
    assert not out.exists()


@pytest.mark.parametrize("args, says", [
    (["--export", "vllm", "{}", "--epochs", "3", "--eval"], "--export does not go with --eval, --epochs: leave"),
    (["--export", "vllm", "{}", "--data", "x.bin"], "--export does not go with --data"),
    (["--export", "gguf", "{}"], "--export: the layout 'gguf' is none of official, official-1.0, vllm"),
    (["--export", "vllm"], "argument --export: expected 2 arguments"),
    (["--export", "vllm", "./nowhere"], "./nowhere is not a folder"),
    (["--export", "vllm", "{}", "--model", "./nowhere"], "./nowhere is not a folder"),
    ([], "the following arguments are required: --data")])
def test_export_and_the_other_options(args, says, tiny_folder, tmp_path, cli):
    args = [a.replace("{}", str(tiny_folder / "medusa")) for a in args]
    refused(cli, tmp_path / "new", says, "--model", tiny_folder, *args)


def test_a_training_knows_nothing_of_export():
    """So that a checkpoint from before there was one can be resumed."""
    assert "export" not in train_heads.arguments(["--data", "d", "--out", "o"])


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "medusa_lm_head.pt", "tokenizer.json"])
def test_export_writes_over_nothing(layout, name, tiny_folder, tmp_path, cli):
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("these may stay")
    status, _, err = cli("train_heads", "--export", layout, tiny_folder / "medusa", "--model", tiny_folder, "--out",
                         tmp_path)
    assert status == 2 and f"holds {name}, nothing is written over: give --out a new folder" in err
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    exported(cli, layout, tiny_folder / "medusa", tiny_folder, tmp_path)


@pytest.mark.parametrize("layout", ALL)
def test_export_writes_all_or_nothing(layout, tiny_folder, tmp_path, cli, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(export.json, "dumps", full)             # the last file's
    status, _, err = cli("train_heads", "--export", layout, tiny_folder / "medusa", "--model", tiny_folder, "--out",
                         tmp_path / "new")
    assert status == 2 and "No space left on device" in err and err.count("\n") == 1
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("1.0.linear.bias"), "missing: 1.0.linear.bias"),
    (lambda t: t.update({"0.1.weight": torch.zeros(299, SIZE)}), "0.1.weight has shape [299, 32], expected [300, 32]")])
def test_damaged_heads_are_not_exported(change, says, tiny_folder, tmp_path, cli):
    tensors = load_file(tiny_folder / "medusa" / "model.safetensors")
    change(tensors)
    save_file(tensors, tiny_folder / "medusa" / "model.safetensors")
    refused(cli, tmp_path / "new", says, "--export", "vllm", tiny_folder / "medusa", "--model", tiny_folder)


def test_a_map_of_wrong_ids_is_not_exported(tiny_folder, tmp_path, cli):
    model = Llama.from_pretrained(tiny_folder)
    save(tmp_path / "own", tiny_heads(model, HEADS, token_map=torch.tensor([7, 7])), model, "tiny")
    assert find_heads(tmp_path / "own", model.config).config["draft_size"] == 2
    refused(cli, tmp_path / "new", "token_map must hold different ids below 300", "--export", "vllm", tmp_path / "own",
            "--model", tiny_folder)
