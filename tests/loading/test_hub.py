"""Folders laid out as the published checkpoints are: every tensor lands, and the text is that of our own format."""
import http.server
import io
import json
import pickle
import shutil
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, byte_tokenizer, tiny_heads, tiny_llama
from safetensors.torch import load_file, save_file

from extras.training import save_results
from llama import Llama
from loading import checkpoint, files
from loading.files import UserError, read_json, write_json
from loading.heads import base_of
from loading.templates import Vicuna
from loading.tokenizer import Tokenizer
from tinymedusa import MedusaHeads
from variants.heads import load_heads, save

SMALL = ROOT / "tests" / "small.model"
PROMPT = [1, 40, 300, 77]


def model_of(vocab_size=700, **over) -> Llama:
    return tiny_llama(dtype=torch.float32, vocab_size=vocab_size, max_position_embeddings=200, **over)


def rounded(model, dtype):
    """The model after its weights went through a file of this dtype."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    return model


def hf_tensors(folder, dtype=torch.float32) -> dict:
    return {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()}


def as_bin(folder, dtype=torch.float32, shards=1, extra=None) -> None:
    """Replaces model.safetensors by pickles, as old repositories have them."""
    tensors = hf_tensors(folder, dtype) | (extra or {})
    (folder / "model.safetensors").unlink()
    if shards == 1:
        return torch.save(tensors, folder / "pytorch_model.bin")
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def parameters(model) -> dict:
    return dict(model.named_parameters())


def official(heads: MedusaHeads, dtype=torch.float32, prefix="") -> dict:
    return {prefix + name: t.detach().to(dtype).clone() for name, t in heads.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def text(cli, *args):
    status, out, err = cli("generate", "--prompt", "Once upon a time", "--max-new-tokens", 12, "--json", *args)
    assert status == 0, err
    return json.loads(out), err


def small_repository(folder, **over) -> Llama:
    model = model_of(**over)
    model.save(folder)
    shutil.copy(SMALL, folder / "tokenizer.model")
    return model


def test_tinyllama_v0(tmp_path, monkeypatch):
    """An old config that leaves out what is the default, bfloat16 weights, also as a pickle, some rows at a time."""
    monkeypatch.setattr(checkpoint, "READ_AT_ONCE", 1000)
    model = rounded(small_repository(tmp_path, num_key_value_heads=4), torch.bfloat16)
    model.save(tmp_path, torch.bfloat16)
    config = read_json(tmp_path / "config.json")
    for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "head_dim", "dtype", "attention_bias", "mlp_bias"):
        config.pop(key)
    write_json(tmp_path / "config.json", config | {"pad_token_id": 0})
    assert same(parameters(Llama.from_pretrained(tmp_path)), parameters(model))
    as_bin(tmp_path, torch.bfloat16)
    assert same(parameters(Llama.from_pretrained(tmp_path)), parameters(model))


def test_tiny_vicuna(tmp_path, cli):
    """float32 safetensors and a pickle beside them, grouped keys, only tokenizer.model; a chat model by its name."""
    model = small_repository(tmp_path / "Tiny-Vicuna-1B")
    folder = tmp_path / "Tiny-Vicuna-1B"
    torch.save({"rubbish": torch.zeros(1)}, folder / "pytorch_model.bin")          # safetensors are preferred
    assert same(parameters(Llama.from_pretrained(folder)), parameters(model))
    result, _ = text(cli, "--model", folder)
    asked = Vicuna(Tokenizer(folder, model.config), chat=True).prompt("Once upon a time")
    assert result["prompt_tokens"] == len(asked)


def test_vicuna_7b(tmp_path):
    """float16 pickles in shards, with the rotary frequencies that old transformers stored."""
    model = rounded(small_repository(tmp_path), torch.float16)
    as_bin(tmp_path, torch.float16, shards=2, extra={
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    assert same(parameters(Llama.from_pretrained(tmp_path)), parameters(model))
    for file in tmp_path.glob("*-00002-*"):
        file.unlink()
    with pytest.raises(UserError, match="has no pytorch_model-00002-of-00002.bin"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("where", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_heads_of_version_0_1(layers, where, tmp_path, cli, monkeypatch):
    """A pickle of five bfloat16 heads beside a config that names the base and says 2; and heads without matrices."""
    monkeypatch.chdir(tmp_path)
    model = small_repository(tmp_path / "lmsys" / "vicuna-7b-v1.3")
    tied = where.endswith(".safetensors")
    heads = tiny_heads(model, 5, num_layers=layers, tie_lm_head=tied)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(p.bfloat16())
    save(tmp_path / "own", heads, model, "vicuna")
    published = tmp_path / "medusa-vicuna-7b-v1.3"
    write_json(published / "config.json", {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "medusa_num_heads": 2, "medusa_num_layers": layers,
        "transformers_version": "4.34.0"} | ({"version": "2"} if tied else {}))
    state = official(heads, torch.bfloat16)
    (save_file if tied else torch.save)(state, published / where)
    read = load_heads(published, model)
    assert same(read.state_dict(), heads.state_dict()) and len(read) == 5
    assert getattr(read, "tie_lm_head", False) == tied
    assert base_of(published) == "lmsys/vicuna-7b-v1.3" and base_of(tmp_path / "lmsys" / "vicuna-7b-v1.3") is None
    own, _ = text(cli, "--model", "lmsys/vicuna-7b-v1.3", "--heads", "own")
    for args in (["--model", "lmsys/vicuna-7b-v1.3", "--heads", published], ["--model", published]):
        result, err = text(cli, *args)
        assert result["token_ids"] == own["token_ids"] and result["steps"] == own["steps"]
        assert "config.json says 2 heads, the file holds 5: all are used" in err


def test_a_model_of_version_1_0_with_its_heads_inside(tmp_path, cli):
    """float16 pickles in shards; heads under medusa_head.; as --model, and as --heads of the same base."""
    folder = tmp_path / "medusa-1.0-vicuna-7b-v1.5"
    model = rounded(small_repository(folder), torch.float16)
    heads = tiny_heads(model, 5)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(p.half())
    model.save(tmp_path / "plain")
    shutil.copy(SMALL, tmp_path / "plain" / "tokenizer.model")
    save(tmp_path / "plain" / "medusa", heads, model, "plain")
    as_bin(folder, torch.float16, shards=3, extra=official(heads, torch.float16, "medusa_head."))
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"medusa_num_heads": 5, "medusa_num_layers": 1})
    write_json(folder / "added_tokens.json", {"<pad>": 0})
    assert same(parameters(Llama.from_pretrained(folder)), parameters(model))
    assert same(load_heads(folder, model).state_dict(), heads.state_dict())
    own, _ = text(cli, "--model", tmp_path / "plain", "--template", "vicuna")
    for args in (["--model", folder], ["--model", folder, "--heads", folder],
                 ["--model", tmp_path / "plain", "--heads", folder, "--template", "vicuna"]):
        result, err = text(cli, *args)
        assert result["token_ids"] == own["token_ids"] and result["steps"] == own["steps"] and err == ""


@pytest.mark.parametrize("change, says", [
    (lambda t, c: t.update({"0.0.weight_extra": torch.zeros(1)}), "unexpected: 0.0.weight_extra"),
    (lambda t, c: t.pop("1.0.linear.bias"), "missing: 1.0.linear.bias"),
    (lambda t, c: t.pop("2.1.weight"), "missing: 2.1.weight"),
    (lambda t, c: c.update(medusa_num_heads=6), "medusa_num_heads 6, the tensors tell 5"),
    (lambda t, c: c.update(medusa_num_layers=2), "medusa_num_layers 2, the tensors tell 1"),
    (lambda t, c: c.update(tie_lm_head=True), "tie_lm_head True, the tensors tell False"),
    (lambda t, c: t.clear(), "no Medusa heads among its tensors"),
    (lambda t, c: t.update({"0.0.linear.weight": torch.zeros(8, 8)}), r"has shape \[8, 8\], expected \[32, 32\]"),
    (lambda t, c: t.update({"x": 3}), "is not a dictionary of tensors"),
])
def test_what_is_not_understood_is_named(change, says, tmp_path):
    model = model_of()
    state = official(tiny_heads(model, 5))
    config = {"base_model_name_or_path": "x/y", "medusa_num_heads": 2, "medusa_num_layers": 1}
    change(state, config)
    write_json(tmp_path / "config.json", config)
    torch.save(state, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(UserError, match=says):
        load_heads(tmp_path, model)


def test_plain_heads_of_ours_load_in_the_official_code(tmp_path):
    """The official module, written from its description: ResBlock layers, then a vocabulary matrix."""
    class ResBlock(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.linear = torch.nn.Linear(size, size)

        def forward(self, x):
            return x + torch.nn.functional.silu(self.linear(x))
    model = model_of()
    heads = tiny_heads(model, 3)
    save(tmp_path, heads, model, "tiny")
    theirs = torch.nn.ModuleList(torch.nn.Sequential(ResBlock(32), torch.nn.Linear(32, 700, bias=False))
                                 for _ in range(3))
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    hidden = torch.randn(5, 32)
    assert torch.allclose(torch.stack([head(hidden) for head in theirs], dim=1),
                          heads(hidden[:, None], torch.zeros(5, 1, dtype=torch.long)), atol=1e-5)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of folders: hub/<owner>/<name>; a file that is not there is missing on it, too."""
    import huggingface_hub
    from huggingface_hub import errors
    fetched = []

    def download(repo, filename, revision=None, repo_type="model", local_files_only=False):
        assert not local_files_only
        if not (path := tmp_path / "hub" / repo / filename).is_file():
            raise errors.EntryNotFoundError(f"404 {filename}")
        fetched.append((repo, filename))
        return str(path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    return tmp_path / "hub", fetched


# ----------------------------------------------------------------------------------------------- which files are read

SOURCES = {"model.safetensors": 1.0, "model.safetensors.index.json": 2.0, "pytorch_model.bin": 3.0,
           "pytorch_model.bin.index.json": 4.0}


def one_of_several(folder, sources, model) -> None:
    """Each source has its number as the last norm."""
    model.save(folder)
    tensors = hf_tensors(folder)
    (folder / "model.safetensors").unlink()
    for name in sources:
        part = tensors | {"model.norm.weight": torch.full((32,), SOURCES[name])}
        file = name.replace(".index.json", "").replace("model.", "model-00001-of-00001.") if "index" in name else name
        save = (lambda t, path: save_file(t, path, {"format": "pt"})) if "safetensors" in name else torch.save
        save(part, folder / file)
        if "index" in name:
            write_json(folder / name, {"metadata": {}, "weight_map": dict.fromkeys(part, file)})


@pytest.mark.parametrize("number", range(1, 16))
def test_the_order_of_weight_files_is_transformers(number, tmp_path):
    """Every choice of the four that may lie beside each other."""
    transformers = pytest.importorskip("transformers")
    sources = [name for i, name in enumerate(SOURCES) if number >> i & 1]
    one_of_several(tmp_path, sources, model_of(vocab_size=12))
    found = Llama.from_pretrained(tmp_path).norm.weight[0].item()
    assert found == min(SOURCES[name] for name in sources)
    assert found == transformers.LlamaForCausalLM.from_pretrained(tmp_path).model.norm.weight[0].item()


@pytest.mark.parametrize("left, rest", [
    ("model.safetensors.index.json", "model.safetensors"), ("model.safetensors.index.json", "pytorch_model.bin"),
    ("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin")])
def test_an_index_that_was_left_without_its_shards(left, rest, tmp_path):
    one_of_several(tmp_path, [left, rest], model_of(vocab_size=12))
    shard, = set(read_json(tmp_path / left)["weight_map"].values())
    (tmp_path / shard).unlink()
    assert Llama.from_pretrained(tmp_path).norm.weight[0] == SOURCES[rest]
    for file in checkpoint.weight_files(tmp_path):
        file.unlink()
    with pytest.raises(UserError, match="has no .*00001.*: give a folder in Hugging Face layout"):
        Llama.from_pretrained(tmp_path)


TEXT_FILES = ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "generation_config.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
              "additional_chat_templates/tools.jinja", "tokenizer.json"]


@pytest.mark.parametrize("only", [TEXT_FILES, ["tokenizer.model", "chat_template.jinja"], []], ids=len)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_model_made_of_another_gets_all_its_files_of_text(only, where, hub, tmp_path, monkeypatch, cli):
    """--medusa-2 and --export official-1.0 copy what transformers reads, and nothing else."""
    base = hub[0] / "some" / "base"
    model = model_of()
    model.save(base)
    for name in [*only, "README.md", "onnx/tokenizer.json"]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}" if name.endswith(".json") else f"all of {name}")
    name = "some/base" if where == "hub" else str(base)
    snapshot = lambda repo, allow_patterns, local_files_only: hub[0] / repo
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    heads = tiny_heads(model, 2)
    save_results(Namespace(out=tmp_path / "medusa-2", medusa_2=True, model=name), model, heads)
    save(tmp_path / "heads", heads, model, "tiny")
    status, _, err = cli("train_heads", "--export", "official-1.0", tmp_path / "heads", "--model", name, "--out",
                         tmp_path / "export")
    assert status == 0, err
    for folder, more in (("medusa-2", {"medusa/config.json", "medusa/model.safetensors"}), ("export", set())):
        found = {path.relative_to(tmp_path / folder).as_posix(): path for path in (tmp_path / folder).rglob("*")
                 if path.is_file()}
        assert found.keys() == {*only, "config.json", "model.safetensors"} | more
        assert all(found[name].read_bytes() == (base / name).read_bytes() for name in only)


def test_heads_in_a_whole_model_without_a_model_type(tmp_path, cli):
    """The tensors' names tell, where the config says nothing of heads nor of a kind of model."""
    model = small_repository(tmp_path)
    heads = tiny_heads(model, 3)
    as_bin(tmp_path, shards=2, extra=official(heads, prefix="medusa_head."))
    config = read_json(tmp_path / "config.json")
    del config["model_type"]
    write_json(tmp_path / "config.json", config)
    result, err = text(cli, "--model", tmp_path)
    assert result["tree"].startswith("16 nodes") and err == ""
    assert same(load_heads(tmp_path, model).state_dict(), heads.state_dict())


# ------------------------------------------------------------------------------------------------------ on the network

@pytest.fixture
def network(tmp_path, monkeypatch):
    """network(status): a hub on this machine that answers all with it, None: nobody listens, 0: never an answer."""
    from huggingface_hub import constants
    servers = []

    def start(status):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append(self.path)
                if status == 0:
                    time.sleep(0.4)
                self.send_response(status or 500)
                self.end_headers()

            def log_message(self, *args):
                pass
        asked, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        if status is None:
            server.server_close()
        else:
            servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        return asked
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files.unreachable.cache_clear()
    yield start
    files.unreachable.cache_clear()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status, says, patience", [
    (None, "Connection refused", 60), (0, "no answer within 0.3 s", 0.3), (503, "503 Service Unavailable", 60),
    (429, "429 Too Many Requests", 60)])
def test_a_hub_that_does_not_answer(status, says, patience, network, cli, monkeypatch):
    """One line, and none of the library's; asked once, by no file twice."""
    assert files.PATIENCE <= 5                                  # and not ten for each file
    monkeypatch.setattr(files, "PATIENCE", patience)
    asked = network(status)
    code, out, err = cli("generate", "--model", "some/model")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "generate.py: some/model: the hub can't be reached (" in err and says in err
    assert "and config.json is not in its cache; give a local folder or try again" in err
    assert len(asked) <= 1
    assert files.locate("some/model", "tokenizer.json", required=False) is None and len(asked) <= 1


def test_a_hub_that_can_not_even_be_looked_for(network, monkeypatch):
    """Where a name is looked up in vain, no time limit of the library's holds."""
    network(None)
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: time.sleep(1))
    with pytest.raises(UserError, match="the hub can't be reached .no answer within 0.1 s. and config.json is not"):
        files.locate("some/model", "config.json")


def test_a_hub_without_an_answer_gives_what_its_cache_has(network, tmp_path):
    network(None)
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / ("a" * 40)
    small_repository(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    assert Llama.from_pretrained("some/model").config.vocab_size == 700
    assert files.tokenizer_files("some/model") == {"tokenizer.model": snapshot / "tokenizer.model"}


def test_a_hub_that_says_no(network, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 60)
    network(401)
    with pytest.raises(UserError, match="the hub .*401"):
        files.locate("some/model", "config.json")


def test_the_systems_of_the_original_by_their_hub_ids(hub, cli, tmp_path):
    """Every id of the original and of the published heads, as --model and as --heads: the same text, fewer steps."""
    root, fetched = hub
    base = rounded(small_repository(root / "lmsys/vicuna-7b-v1.5"), torch.float16)
    heads = tiny_heads(base, 5, noise=0.01)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(p.half())
    for size in ("7b", "13b", "33b"):
        model = small_repository(root / f"lmsys/vicuna-{size}-v1.3")
        beside = root / f"FasterDecoding/medusa-vicuna-{size}-v1.3"
        write_json(beside / "config.json", {
            "base_model_name_or_path": f"lmsys/vicuna-{size}-v1.3", "medusa_num_heads": 2, "medusa_num_layers": 1})
        torch.save(official(tiny_heads(model, 5, noise=0.01), torch.bfloat16), beside / "medusa_lm_head.pt")
    inside = root / "FasterDecoding/medusa-1.0-vicuna-7b-v1.5"
    base.save(inside)
    shutil.copy(SMALL, inside / "tokenizer.model")
    as_bin(inside, torch.float16, shards=2, extra=official(heads, torch.float16, "medusa_head."))
    config = read_json(inside / "config.json")
    write_json(inside / "config.json", config | {"medusa_num_heads": 5, "medusa_num_layers": 1})
    as_bin(root / "lmsys/vicuna-7b-v1.5", torch.float16, shards=2)
    small_repository(root / "Jiayi-Pan/Tiny-Vicuna-1B")
    small_repository(root / "Maykeye/TinyLLama-v0")
    for model, others in (("lmsys/vicuna-7b-v1.5", "FasterDecoding/medusa-1.0-vicuna-7b-v1.5"),
                          *((f"lmsys/vicuna-{s}-v1.3", f"FasterDecoding/medusa-vicuna-{s}-v1.3")
                            for s in ("7b", "13b", "33b")),
                          ("Jiayi-Pan/Tiny-Vicuna-1B", None), ("Maykeye/TinyLLama-v0", None)):
        plain, err = text(cli, "--model", model)
        assert plain["tokens_per_step"] in (1, None)
        assert err == f"no heads in {model}: plain decoding; --heads FOLDER names some\n"
        chat = "vicuna" in model.lower()
        assert (plain["prompt_tokens"] > 60) == chat                             # a story model gets no template
        for args in ([["--model", others], ["--model", model, "--heads", others]] if others else []):
            result, err = text(cli, *args)
            assert result["token_ids"] == plain["token_ids"] and "tree" in result
    assert ("FasterDecoding/medusa-vicuna-33b-v1.3", "medusa_lm_head.pt") in fetched
    assert ("Maykeye/TinyLLama-v0", "tokenizer.model") in fetched


def test_the_shipped_heads_of_a_chat_model_by_its_hub_id(hub, cli, monkeypatch):
    """A random layer of the real one's shape under its id: --interactive --fast with the heads and their tree, and the
    very answer of plain decoding."""
    name, shipped = "HuggingFaceTB/SmolLM2-135M-Instruct", ROOT / "heads" / "smollm2-135m-instruct"
    model = tiny_llama(
        dtype=torch.float32, std=0.04, vocab_size=49152, hidden_size=576, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, eos_token_id=2,
        rope_theta=100000.0, max_position_embeddings=512)
    model.save(folder := hub[0] / name, torch.bfloat16)
    byte_tokenizer(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {
        "bos_token": "<s>", "eos_token": "</s>", "chat_template":
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"})
    asked = ("--model", name, "--max-new-tokens", 12, "--fast", "--threads", 1)
    plain, drafted = (json.loads(cli("generate", *asked, "--heads", heads, "--chat", "--prompt", "Hello", "--json")[1])
                      for heads in ("none", shipped))
    assert drafted["token_ids"] == plain["token_ids"] and len(plain["token_ids"]) == 12
    assert "tree.json" in drafted["tree"] and drafted["prompt_tokens"] == plain["prompt_tokens"] > 5
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n\n"), encoding="utf-8"))
    status, out, err = cli("generate", *asked, "--heads", shipped, "--interactive")
    assert status == 0 and plain["text"].strip() in out and "12 tokens" in out, err


class Malicious:
    def __reduce__(self):
        return print, ("this code must never run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    small_repository(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for write in (lambda p: torch.save({"a": Malicious()}, p), lambda p: p.write_bytes(pickle.dumps(Malicious()))):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="can't read .*pytorch_model.bin"):
            Llama.from_pretrained(tmp_path)
    assert "must never run" not in capsys.readouterr().out
    (tmp_path / "pytorch_model.bin").unlink()
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"a": "../evil.bin"}})
    with pytest.raises(UserError, match="a shard must lie beside its index"):
        Llama.from_pretrained(tmp_path)
