"""Every input error through the command line: one line that says what was wrong and what to do, status 2."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_heads, tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

import prepare_data
from extras.command_line import command_line
from llama import Llama, LlamaConfig, new_cache
from loading import checkpoint, files
from loading.documents import beside
from loading.files import UserError, read_json, write_json
from loading.heads import base_of
from loading.tokenizer import Tokenizer
from tinymedusa import MedusaHeads
from variants.heads import load_heads, save


def config(**change):
    def damage(folder):
        data = read_json(folder / "config.json")
        data.update(change)
        write_json(folder / "config.json", {k: v for k, v in data.items() if v is not None})
    return damage


def tensors(change, file="model.safetensors"):
    def damage(folder):
        data = load_file(folder / file)
        change(data)
        save_file(data, folder / file, metadata={"format": "pt"})
    return damage


def gone(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def index(*shards):
    """An index in the place of the single file, which would come first."""
    def damage(folder):
        gone("model.safetensors")(folder)
        write_json(folder / "model.safetensors.index.json", {"weight_map": {f"t{i}": s for i, s in enumerate(shards)}})
    return damage


def bigger_tokenizer(folder):
    tokenizer = Backend.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["zebra", "yak"])
    tokenizer.save(str(folder / "tokenizer.json"))


def no_bos(folder):
    edit(folder / "tokenizer.json", post_processor=None)
    write_json(folder / "tokenizer_config.json", {"add_bos_token": False})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def edit(path, **change):
    write_json(path, read_json(path) | change)


# what is done to a good folder (300 entries, context 64, 3 heads), the arguments, and what the line must say
def wrong_map(folder):
    """Heads that draft id 7 twice."""
    model = tiny_llama(dtype=torch.float32, vocab_size=300)
    save(folder / "medusa", tiny_heads(model, 3, token_map=torch.tensor([7, 7, 9])), model, "tiny")


def map_of(dtype):
    """Heads whose draft vocabulary is no list of integers."""
    def damage(folder):
        model = tiny_llama(dtype=torch.float32, vocab_size=300)
        save(folder / "medusa", tiny_heads(model, 3, token_map=torch.arange(9)), model, "tiny")
        tensors(lambda t: t.update({"token_map": t["token_map"].to(dtype)}), "medusa/model.safetensors")(folder)
    return damage


def packed(dtype, name, others):
    """Matrices as quantised files have them, whatever the config says; norms and embeddings stay."""
    def change(found):
        for weight in [n for n in found if n.endswith("_proj.weight")]:
            module = weight.removesuffix("weight")
            found |= {module + name: found.pop(weight).to(dtype)}
            found |= {module + other: torch.ones(4).to(kind) for other, kind in others.items()}
    return tensors(change)


def twice(folder):
    """Two shards that both hold the norm."""
    data = load_file(folder / "model.safetensors")
    save_file(data, folder / "a.safetensors")
    save_file({"model.norm.weight": data["model.norm.weight"]}, folder / "b.safetensors")
    index("a.safetensors", "b.safetensors")(folder)


def as_pickle(write):
    def damage(folder):
        write(folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return damage


def pickled(content):
    """A zip as torch writes it, in which the pickle is what is given."""
    def write(path):
        torch.save({}, path)
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, old in parts.items():
                file.writestr(name, content if name.endswith("data.pkl") else old)
    return write


def tokenizer(change):
    def damage(folder):
        data = read_json(folder / "tokenizer.json")
        change(data)
        write_json(folder / "tokenizer.json", data)
    return damage


CASES = {
    "no config": (gone("config.json"), [], ["has no config.json", "Hugging Face layout"]),
    "no weights": (gone("model.safetensors"), [], ["has no model.safetensors"]),
    "no tokenizer": (gone("tokenizer.json"), [], ["has no tokenizer.json"]),
    "config not json": (text("config.json", b"{"), [], ["config.json is not valid JSON"]),
    "a hundred thousand brackets": (text("config.json", b"[" * 10 ** 5), [], ["config.json is not valid JSON"]),
    "so many in a tree": (text("t.json", b"[" * 10 ** 5), ["--tree", "{folder}/t.json"], ["tree is not valid JSON"]),
    "config not utf-8": (text("config.json", b"\xff\xfe"), [], ["config.json is not valid JSON"]),
    "config a list": (text("config.json", b"[]"), [], ["holds a JSON list, expected an object"]),
    "not a llama": (config(model_type="qwen2"), [], ["model_type is 'qwen2', only 'llama' (or 'mistral')"]),
    "activation": (config(hidden_act="gelu"), [], ["hidden_act is 'gelu', only 'silu'"]),
    "rope scaling": (config(rope_scaling={"type": "ntk", "factor": 2}), [], ["rope_scaling is 'ntk', only 'default'"]),
    "yarn": (config(rope_scaling={"type": "yarn", "factor": 0}), [], ["rope_scaling has factor 0, it must be a pos"]),
    "yarn's scale": (config(rope_scaling={"type": "yarn", "mscale": "x", "mscale_all_dim": 1}), [],
                     ["rope_scaling has mscale 'x', it must be a positive number"]),
    "yarn's attention": (config(rope_scaling={"type": "yarn", "attention_factor": 0}), [],
                         ["rope_scaling has attention_factor 0"]),
    "yarn's logarithm": (config(rope_scaling={"type": "yarn"}, rope_theta=1), [], ["rope_theta is 1, which"]),
    "rope parameters": (config(rope_parameters={"rope_type": "longrope"}), [], ["rope_parameters is 'longrope', only"]),
    "rope factor": (config(rope_scaling={"type": "linear"}), [], ["rope_scaling has factor None, it must be"]),
    "rope of llama 3": (config(rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": "x"}), [],
                        ["rope_scaling has low_freq_factor 'x'"]),
    "context beyond the window": (config(model_type="mistral", sliding_window=16), ["--context", "17"],
                                  ["config: the context is 17, this model can have 1 to 16 tokens"]),
    "prompt beyond the context": (None, ["--context", "3", "--prompt", "x y z x y z"], ["the context holds 3: shor"]),
    "context without end, stretched": (config(rope_scaling={"type": "linear", "factor": 1e6}), [],
                                       ["config: the context is 64000000, this model can have 1 to 4194304 tokens"]),
    **{f"quantised by {method}": (config(quantization_config=found), [], [
        f"config.json: the weights are quantised by {method}, which is not supported: give the unquantised model"])
       for method, found in {
           "gptq": {"quant_method": "gptq", "bits": 4}, "awq": {"quant_method": "awq", "zero_point": True},
           "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"}, "bitsandbytes": {"load_in_8bit": True},
           "mxfp4": {"quant_method": "mxfp4"}, "compressed-tensors": {"quant_method": "compressed-tensors"}}.items()},
    **{f"quantised weights, {name}": (packed(*args), [], ["the weights are quantised, model.layers.", says,
                                                          ": give the unquantised model"])
       for name, says, *args in (
           ("GPTQ", "qweight holds I32", torch.int32, "qweight", {"qzeros": torch.int32, "scales": torch.float16}),
           ("bitsandbytes' 4 bits", "weight holds U8", torch.uint8, "weight", {"weight.absmax": torch.float32}),
           ("bitsandbytes' 8 bits", "weight holds I8", torch.int8, "weight", {"SCB": torch.float32}),
           ("FP8", "weight holds F8_E4M3", torch.float8_e4m3fn, "weight", {"weight_scale": torch.float32}),
           ("MLX", "weight holds U32", torch.uint32, "weight", {"scales": torch.float16, "biases": torch.float16}),
           ("compressed", "weight_packed holds I32", torch.int32, "weight_packed", {"weight_scale": torch.float16}))},
    "complex weights": (tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].cfloat()})), [],
                        ["lm_head.weight holds C64, expected floats"]),
    "pickled complex weights": (as_pickle(lambda path: torch.save(load_file(path.parent / "model.safetensors") | {
        "model.norm.weight": torch.ones(32, dtype=torch.complex128)}, path)), [],
        ["model.norm.weight holds torch.complex128, expected floats"]),
    "complex heads": (tensors(lambda t: t.update({"0.1.weight": t["0.1.weight"].cfloat()}), "medusa/model.safetensors"),
                      [], ["0.1.weight holds C64, expected floats"]),
    "ids that are complex": (map_of(torch.complex64), [], ["token_map holds C64, expected integers"]),
    "ids that are bits": (map_of(torch.bool), [], ["token_map holds BOOL, expected integers"]),
    "ids in 8-bit floats": (map_of(torch.float8_e5m2), [], ["token_map holds F8_E5M2, expected integers"]),
    **{f"git-lfs: {file}": (text(file, POINTER), [], [f"/{file} is only a git-lfs pointer to the file: fetch that"])
       for file in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors",
                    "medusa/config.json", "medusa/model.safetensors", "medusa/tree.json")},
    "git-lfs: a shard": (lambda f: (index("a.safetensors")(f), text("a.safetensors", POINTER)(f)), [],
                         ["/a.safetensors is only a git-lfs pointer"]),
    "git-lfs: a pickle": (lambda f: (gone("model.safetensors")(f), text("pytorch_model.bin", POINTER)(f)), [],
                          ["/pytorch_model.bin is only a git-lfs pointer"]),
    "sliding window": (config(model_type="mistral", sliding_window=0), [], ["sliding_window is 0"]),
    "beyond the window": (config(model_type="mistral", sliding_window=4), ["--prompt", "x y z x y z"],
                          ["the context holds 4 (beyond it this model attends to a sliding window only"]),
    "system of a story model": (None, ["--system", "Be kind."], ["--system needs a chat model"]),
    "tune and compare": (None, ["--tune", "x", "--compare"], ["--tune does not go with --compare: leave out one or"]),
    "interactive json": (None, ["--interactive"], ["--interactive does not go with --prompt: leave out one"]),
    "no heads": (config(num_attention_heads=0), [], ["num_attention_heads is 0"]),
    "not divisible": (config(hidden_size=33, head_dim=None), [], ["hidden_size 33 is not divisible"]),
    "grouping": (config(num_key_value_heads=3), [], ["num_attention_heads 4 is not a multiple of", "heads 3"]),
    "odd head_dim": (config(head_dim=7), [], ["head_dim 7 is odd"]),
    "dtype": (config(dtype="int4"), [], ["dtype is 'int4', it must be one of float64, float32"]),
    "missing tensor": (tensors(lambda t: t.pop("model.norm.weight")), [], ["missing: model.norm.weight"]),
    "unexpected tensor": (tensors(lambda t: t.update({"extra": torch.zeros(1)})), [], ["unexpected: extra"]),
    "misshapen tensor": (tensors(lambda t: t.update({"lm_head.weight": torch.zeros(299, 32)})), [],
                         ["lm_head.weight has shape [299, 32], expected [300, 32]"]),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 50_000), [], ["can't read", "safetensors"]),
    "truncated heads": (lambda f: os.truncate(f / "medusa/model.safetensors", 5_000), [], ["heads", "can't read"]),
    "no weights at all": (text("model.safetensors", b""), [], ["can't read", "model.safetensors"]),
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir() if p.is_file()], [], ["has no config.json"]),
    "a folder as config": (lambda f: (gone("config.json")(f), (f / "config.json").mkdir()), [], ["has no config.json"]),
    "a link to nothing": (lambda f: (gone("tokenizer.json")(f), (f / "tokenizer.json").symlink_to("nowhere")), [],
                          ["has no tokenizer.json"]),
    "heads of another vocabulary": (lambda f: edit(f / "medusa/config.json", vocab_size=32000), [],
                                    ["heads expect vocab_size 32000, the model has 300"]),
    "an empty prompt": (no_bos, ["--prompt", ""],
                        ["prompt 2 is empty: give at least one token"]),
    "corrupt weights": (text("model.safetensors", b"nonsense"), [], ["can't read", "model.safetensors"]),
    "shard missing": (index("a.safetensors"), [], ["has no a.safetensors"]),
    "shard elsewhere": (index("../a.safetensors"), [], ["a shard must lie beside its index"]),
    "corrupt tokenizer": (text("tokenizer.json", b"{}"), [], ["can't read the tokenizer"]),
    "context without end": (config(max_position_embeddings=10 ** 9), [],
                            ["max_position_embeddings is 1000000000, it must be a whole number from 1 to 4194304"]),
    "layers without end": (config(num_hidden_layers=500_000), [],
                           ["says 500000 layers, the files hold only 21 tensors"]),
    "too many layers": (config(num_hidden_layers=3), [], ["missing: model.layers.2.input_layernorm.weight"]),
    "heads too wide": (config(head_dim=2 ** 31), [], ["head_dim is 2147483648, it must be a whole number from 1 to"]),
    "model too wide": (config(hidden_size=2 ** 19), [], ["lm_head.weight has shape [300, 32], expected [300, 524288]"]),
    "theta of 400 digits": (config(rope_theta=10 ** 400), [], ["rope_theta is 1000", "a positive number, below 1e18"]),
    "number of 5000 digits": (text("config.json", b'{"head_dim": ' + b"9" * 5000 + b"}"), [], ["is not valid JSON"]),
    "kind of rope a list": (config(rope_scaling={"type": ["linear"]}), [], ["rope_scaling is ['linear'], only"]),
    "a novel": (config(dtype="x" * 20000), [], ["dtype is 'xxx", " [...] ", "bfloat16, float16"]),
    "no shards": (index(), [], ["weight_map must be an object of file names"]),
    "tensor twice": (twice, [], ["model.norm.weight is in", "a.safetensors and in", "which one is meant?"]),
    "integers": (tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})), [],
                 ["model.norm.weight holds I32, expected floats"]),
    "8-bit floats": (tensors(lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})), [],
                     ["model.norm.weight holds F8_E4M3, expected floats"]),
    "damaged pickle": (as_pickle(pickled(b"\x80\x02h\x05.")), [], ["pytorch_model.bin, is it whole? KeyError"]),
    "pickled list": (as_pickle(lambda path: torch.save([1], path)), [], ["is not a dictionary of tensors"]),
    "heads of any width": (lambda f: edit(f / "medusa/config.json", medusa_width=10 ** 30), [],
                           ["medusa_width 1000000000000000000000000000000, expected"]),
    "sparse pickle": (as_pickle(lambda path: torch.save(load_file(path.parent / "model.safetensors") | {
        "model.embed_tokens.weight": torch.zeros(300, 32).to_sparse()}, path)), [],
        ["can't read model.embed_tokens.weight of"]),
    "id beyond the vocabulary": (tokenizer(lambda t: t["model"]["vocab"].update({"t": 5000})), [],
                                 ["tokenizer.json has the id 5000, the model only 300 entries"]),
    "heads' recent past": (lambda f: edit(f / "medusa/config.json", medusa_recent=2 ** 19), [],
                           ["0.0.linear.weight has shape [32, 32], expected [32, 16777216]"]),
    "heads without end": (tensors(lambda t: t.update({"99999999.0.linear.weight": torch.zeros(1)}),
                                  "medusa/model.safetensors"), [], ["tell 100000000 heads of 1 blocks, but"]),
    "number of a head": (tensors(lambda t: t.update({"9" * 5000 + ".0.linear.weight": torch.zeros(1)}),
                                 "medusa/model.safetensors"), [], ["unexpected: 999"]),
    "ids of floats": (map_of(torch.float32), [], ["token_map holds F32, expected integers"]),
    "large tree": (lambda f: write_json(f / "medusa/tree.json", {"paths": [[r] for r in range(2049)]}), [],
                   ["tree: 2049 paths, at most 2048"]),
    "config of another model": (config(vocab_size=299), ["--heads", "none"], ["expected [299, 32]"]),
    "tokenizer of another model": (bigger_tokenizer, ["--prompt", "a yak"],
                                   ["tokenizer.json has the id 301, the model only 300 entries"]),
    "null": (config(rms_norm_eps="x"), [], ["rms_norm_eps is 'x', it must be a positive number"]),
    "theta": (config(rope_theta=-1), [], ["rope_theta is -1, it must be a positive number"]),
    "rope a list": (config(rope_scaling=[1]), [], ["rope_scaling is [1], only an object"]),
    "tie": (config(tie_word_embeddings="false"), [], ["tie_word_embeddings is 'false', it must be true or false"]),
    "bos": (config(bos_token_id="1"), [], ["bos_token_id is '1', it must be a token id"]),
    "eos": (text("generation_config.json", b'{"eos_token_id": [2, "3"]}'), [], ["eos_token_id is (2, '3')"]),
    "index": (lambda f: (gone("model.safetensors")(f), text("model.safetensors.index.json", b'{"weight_map": [1]}')(f)),
              [], ["weight_map must be an object"]),
    "heads' width": (lambda f: edit(f / "medusa/config.json", medusa_width=-1), [], ["medusa_width -1"]),
    "heads' kind": (lambda f: edit(f / "medusa/config.json", medusa_kind="eagle"), [],
                    ["medusa_kind 'eagle', expected one of medusa, root, hydra"]),
    "heads' recent": (lambda f: edit(f / "medusa/config.json", medusa_recent=0), [], ["medusa_recent 0, expected"]),
    "draft vocabulary": (lambda f: edit(f / "medusa/config.json", draft_vocab_size=301), [],
                         ["draft_vocab_size 301, expected at most the vocabulary"]),
    "no id map": (lambda f: edit(f / "medusa/config.json", draft_vocab_size=9), [], ["missing: token_map"]),
    "id map": (wrong_map, [], ["token_map must hold different ids below 300"]),
    "tune without heads": (None, ["--heads", "none", "--tune", "{folder}/o.txt"], ["--tune needs heads"]),
    "compare without heads": (lambda f: shutil.rmtree(f / "medusa"), ["--compare"], ["--compare needs heads: give --"]),
    "tune typically": (None, ["--tune", "{folder}/o.txt", "--acceptance", "typical"],
                       ["--tune forecasts acceptance by match"]),
    "epsilon": (None, ["--epsilon", "0"], ["--epsilon: '0' is not a number from 1e-09 to 1"]),
    "nothing to tune on": (None, ["--tune", "no.txt"], ["can't read no.txt"]),
    "no heads' weights": (gone("medusa/model.safetensors"), [], ["has no model.safetensors"]),
    "heads of another width": (lambda f: write_json(f / "medusa/config.json", {
        "medusa_num_heads": 3, "medusa_num_layers": 1, "hidden_size": 4096}), [],
        ["heads expect hidden_size 4096, the model has 32", "train heads for this model or pass --heads none"]),
    "a draft vocabulary of another model": (lambda f: edit(f / "medusa/config.json", vocab_size=301,
        draft_vocab_size=301), [], ["heads expect vocab_size 301, the model has 300"]),
    "heads short of a tensor": (tensors(lambda t: t.pop("0.0.linear.bias"), "medusa/model.safetensors"), [],
                                ["missing: 0.0.linear.bias"]),
    "a model as heads": (None, ["--heads", "{folder}"], ["not Medusa heads"]),
    "no such folder": (None, ["--model", "./nowhere"], ["./nowhere is not a folder"]),
    "no such heads": (None, ["--heads", "/no/such/heads"], ["/no/such/heads is not a folder"]),
    "tree not json": (None, ["--tree", "[[0]"], ["the tree is not valid JSON"]),
    "tree file missing": (None, ["--tree", "no_tree.json"], ["can't read the tree no_tree.json"]),
    "tree without paths": (None, ["--tree", '{"path": []}'], ["without the key 'paths'"]),
    "tree too deep": (None, ["--tree", "[[0],[0,0],[0,0,0],[0,0,0,0]]"], ["path [0, 0, 0, 0] has depth 4", "3 heads"]),
    "tree orphan": (None, ["--tree", "[[0,0]]"], ["path [0, 0] has no ancestor [0]"]),
    "tree rank": (None, ["--tree", "[[300]]"], ["rank 300", "300 entries"]),
    "tree in the heads' folder": (text("medusa/tree.json", b'{"paths": [[1, 1]]}'), [],
                                  ["medusa/tree.json: tree: path [1, 1] has no ancestor [1]"]),
    "modes of a tree": (None, ["--tree", '{"paths": [[0]], "modes": 3}'], ["'modes' must be an object of objects"]),
    "a mode of a tree": (None, ["--tree", '{"paths": [[0]], "modes": {"cpu": 3}}'], ["must be an object of objects"]),
    "heads without their config": (gone("medusa/config.json"), [], ["has no medusa/config.json"]),
    "a file without a name": (None, ["--tune", ""], ["can't read .: Is a directory"]),
    "prompt too long": (None, ["--prompt", "x y " * 40], ["the context holds 64: shorten the prompt"]),
    "tree null": (None, ["--tree", '{"paths": null}'], ["expected a list of paths"]),
    "tree empty": (None, ["--tree", ""], ["can't read the tree"]),
    "tree without heads": (None, ["--heads", "none", "--tree", "[[0]]"], ["--tree needs heads"]),
    "temperature": (None, ["--temperature", "-1"], ["--temperature: '-1' is not a number of at least 0"]),
    "temperature nan": (None, ["--temperature", "nan"], ["--temperature: 'nan' is not a number"]),
    "top-p": (None, ["--top-p", "0"], ["--top-p: '0' is not a number from 1e-09 to 1"]),
    "top-k": (None, ["--top-k", "-2"], ["--top-k: '-2' is not a whole number of at least 0"]),
    "tokens": (None, ["--max-new-tokens", "0"], ["--max-new-tokens: '0' is not a whole number of at least 1"]),
    "steps": (None, ["--max-steps", "0"], ["--max-steps: '0'"]),
    "threads": (None, ["--threads", "none"], ["--threads: 'none'"]),
    "no threads": (None, ["--threads", "0"], ["--threads: '0' is not a whole number from 1 to 1024"]),
    "seed": (None, ["--seed", "-1"], ["--seed: '-1' is not a whole number from 0"]),
    "not a number": (None, ["--top-k", "few"], ["--top-k: 'few' is not a whole number"]),
    "unknown option": (None, ["--tokens", "5"], ["unrecognized arguments: --tokens"]),
    "compile": (None, ["--compile"], ["--compile is gone: give --fast"]),
    "device": (None, ["--device", "warp"], ["--device: 'warp' can't be used here"]),
    "not UTF-8": (None, ["--prompt", "caf\udce9"], ["is not UTF-8 text"]),
    "newline in a name": (None, ["--model", "a\nb"], ["a b is not a folder"]),
}


@pytest.mark.parametrize("case", CASES)
def test_generate(case, tiny_folder, cli):
    damage, args, says = CASES[case]
    (tiny_folder / "o.txt").write_text("the dog")
    if damage:
        damage(tiny_folder)
    args = [a.replace("{folder}", str(tiny_folder)) for a in args]
    args = args if "--tune" in args else ["--prompt", "the dog", *args]
    status, out, err = cli("generate", "--model", tiny_folder, "--max-new-tokens", 3, *args)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("generate.py: "), err
    assert len(err) < 1000
    assert all(s in err for s in says), err


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
                                  "medusa/config.json", "medusa/model.safetensors"])
def test_a_file_that_may_not_be_read(file, tiny_folder, cli, monkeypatch):
    """The system's reason, not that the file is missing or damaged."""
    (tiny_folder / file).chmod(0)
    if os.access(tiny_folder / file, os.R_OK):                  # by root: then the system's answer is made up
        real = open

        def denied(path, *args, **options):
            if Path(path) == tiny_folder / file:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)
        monkeypatch.setattr("builtins.open", denied)
    status, out, err = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 3)
    assert (status, out, err) == (2, "", f"generate.py: can't read {tiny_folder / file}: Permission denied\n")


@pytest.mark.parametrize("path", [".", "..", "/", ""])
def test_a_file_cannot_be_written_over_a_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can't write"):
        write_json(path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["generate", "prepare_data", "train_heads"])
def test_help(script, cli):
    status, out, err = cli(script, "--help")
    assert status == 0 and out.startswith(f"usage: {script}.py") and not err and "%" not in out.replace("50%", "")


def test_the_healthy_folder_is_fine(tiny_folder, cli):
    assert cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize("change", [
    bigger_tokenizer, config(bos_token_id=300), config(bos_token_id=-1), config(eos_token_id=[-1, 300]),
    text("generation_config.json", b'{"eos_token_id": [2, 300, -1]}')])
def test_ids_that_never_come_harm_nobody(change, tiny_folder, cli):
    """More entries than the model, ids beyond its vocabulary or below zero: as in transformers, none is ever used."""
    run = ["generate", "--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 40, "--json"]
    whole = json.loads(cli(*run)[1])
    change(tiny_folder)
    status, out, err = cli(*run)
    assert status == 0 and err == "" and json.loads(out)["token_ids"] == whole["token_ids"]
    config = LlamaConfig.from_pretrained(tiny_folder)
    assert set(config.eos_token_ids) <= {2} and Tokenizer(tiny_folder, config).bos == [1]


@pytest.mark.parametrize("damage, says", [
    (lambda t: t["model"].update(continuing_subword_prefix="tt"), "can't read the tokenizer"),
    (lambda t: t["post_processor"].update(single=[{"SpecialToken": {"id": "none", "type_id": 0}}]), "can't encode"),
    (lambda t: t.update(decoder={"type": "Strip", "content": "t", "start": 10, "stop": 10}), "can't decode"),
])
def test_panics_of_the_tokenizer_library(damage, says, tiny_folder, cli):
    """They are no Exceptions, and the library prints them itself; our line is the last one."""
    tokenizer(damage)(tiny_folder)
    status, out, err = cli("generate", "--model", tiny_folder, "--prompt", "t", "--max-new-tokens", 3)
    assert status == 2 and says in err.splitlines()[-1] and err.splitlines()[-1].startswith("generate.py: ")
    assert "Traceback" not in err and out in ("", "t")


@pytest.mark.parametrize("file", ["model.safetensors", "medusa/model.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_no_numbers(file, value, tiny_folder, cli):
    """One line names the first of them; then it goes on."""
    def damage(data):
        for name in list(data)[1:]:
            data[name].view(-1)[-1] = value
    tensors(damage, file)(tiny_folder)
    status, out, err = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 3)
    assert status == 0 and out.startswith("the dog") and err.count("\n") == 1
    assert "holds NaN or numbers too large to compute with: expect nonsense" in err


def test_large_sums_are_no_large_numbers(tmp_path, capfd):
    """A half-precision sum may overflow where no number is odd."""
    model = tiny_llama(dtype=torch.float16)
    model.norm.weight.data.fill_(60000)
    model.save(tmp_path)
    Llama.from_pretrained(tmp_path)
    assert capfd.readouterr().err == ""


def test_heads_take_no_memory_before_they_are_checked(tiny_folder, monkeypatch):
    monkeypatch.setattr(MedusaHeads, "to_empty", lambda *a, **o: pytest.fail("memory was taken"))
    edit(tiny_folder / "medusa" / "config.json", medusa_recent=2 ** 19)
    with pytest.raises(UserError, match="expected .32, 16777216."):
        load_heads(tiny_folder / "medusa", Llama.from_pretrained(tiny_folder))


def test_nothing_but_our_line_about_a_pickle(tmp_path, monkeypatch):
    """Only tensors are unpickled; what torch warns of on the way is not printed."""
    def load(file, weights_only, **options):
        assert weights_only
        warnings.warn("deprecated", UserWarning, stacklevel=1)
        raise IndexError("no such memo")
    monkeypatch.setattr(torch, "load", load)
    with warnings.catch_warnings(record=True) as seen, pytest.raises(UserError, match="IndexError: no such memo"):
        checkpoint.open_file(tmp_path / "a.bin", "model")
    assert seen == []


def test_a_base_that_is_no_name(tmp_path):
    write_json(tmp_path / "config.json", {"base_model_name_or_path": 5})
    assert base_of(tmp_path) is None


@pytest.mark.parametrize("args, says", [
    (["--text", "none.txt", "--out", "a.bin"], "can't read none.txt"),
    (["--openings", "none.txt", "--out", "a.bin"], "can't read none.txt"),
    (["--text", "latin.txt", "--out", "a.bin"], "latin.txt is not UTF-8 text"),
    (["--text", "empty.txt", "--out", "a.bin"], "a.bin: nothing to write"),
    (["--openings", "empty.txt", "--out", "a.bin"], "empty.txt holds nothing to continue: add an opening or question"),
    (["--out", "a.bin"], "one of the arguments --text --tinystories --sharegpt --openings is required"),
    (["--text", "fine.txt", "--out", "a.bin", "--limit", "0"], "--limit: '0' is not a whole number of at least 1"),
    (["--text", "fine.txt", "--out", "a.bin", "--device", "warp"], "--device: 'warp' can't be used here"),
    (["--text", "fine.txt", "--out", "."], ". is a folder: --out names a file"),
    (["--text", "fine.txt", "--out", "fine.txt"], "fine.txt is the source itself"),
    (["--text", "fine.txt", "--heads", "h", "--out", "a.bin"], "add --distill"),
    (["--text", "fine.json", "--out", "a.bin"], "conversations go to --sharegpt"),
    (["--openings", "fine.txt", "--first-words", "3", "--out", "a.bin"], "give --text or --tinystories"),
    (["--openings", "long.txt", "--out", "a.bin"], "the context holds 64: shorten the prompt"),
    (["--text", "fine.txt", "--out", "fine.txt/a.bin"], "can't write fine.txt/a.bin"),
])
def test_prepare_data(args, says, tiny_folder, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").write_bytes(b"\n\n")
    Path("fine.txt").write_bytes(b"the dog")
    Path("fine.json").write_text('[{"conversations": []}]')
    Path("long.txt").write_bytes(b"the dog\n" + b"x" * 70)
    status, out, err = cli("prepare_data", "--model", tiny_folder, *args)
    line = err.splitlines()[-1]                                                  # above it a progress bar may stand
    assert status == 2 and out == "" and line.startswith("prepare_data.py: ") and says in line
    assert not list(tmp_path.glob("*a.bin*"))


@pytest.mark.parametrize("args, says", [
    (["--data", "none.bin"], "no token file none.bin"),
    (["--data", "half.bin"], "was the preparation of half.bin interrupted"),
    (["--data", "half.bin", "--num-heads", "0"], "--num-heads: '0' is not a whole number from 1 to 64"),
    (["--data", "half.bin", "--lr", "nan"], "--lr: 'nan' is not a number from 0 to 10"),
    (["--data", "half.bin", "--out", "half.bin"], "half.bin is a file: --out names a folder"),
    ([], "the following arguments are required: --data"),
])
def test_train_heads(args, says, tiny_folder, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("half.bin").write_bytes(b"\1\0")
    status, out, err = cli("train_heads", "--model", tiny_folder, "--out", "h", *args)
    assert status == 2 and out == "" and err.count("\n") == 1 and says in err and not Path("h").exists()


def facts(**change):
    return lambda path: edit(beside(path)[3], **change)


def old_version(path):
    """One file of entries, 2 * id + loss, and no others beside it."""
    ids, loss, starts, _ = beside(path)
    entries = np.fromfile(ids, np.uint16) * 2 + np.fromfile(loss, np.uint8)
    entries.tofile(ids)
    loss.unlink()
    starts.unlink()
    facts(sha256=hashlib.sha256(entries.tobytes()).hexdigest())(path)


def suffix(name, change):
    """FILE.loss or FILE.starts, changed as an array."""
    def damage(path):
        file, dtype = Path(f"{path}.{name}"), {"loss": np.uint8, "starts": np.uint64}[name]
        np.array(change(np.fromfile(file, dtype)), dtype).tofile(file)
    return damage


# what is done to a good token file of three documents, and what the line must say
TOKEN_FILES = {
    "old": (old_version, "fine.bin.json: not a token file of this version: prepare it again"),
    "no loss": (lambda path: Path(f"{path}.loss").unlink(), "fine.bin.json: not a token file of this version"),
    "no starts": (lambda path: Path(f"{path}.starts").unlink(), "fine.bin.json: not a token file of this version"),
    "no number of documents": (facts(documents=None), "fine.bin.json: not a token file of this version"),
    "no hash": (facts(sha256=""), "fine.bin.json: not a token file of this version"),
    "short": (lambda path: os.truncate(path, 20), "fine.bin has 20 bytes, fine.bin.json says "),
    "loss short": (suffix("loss", lambda loss: loss[:-1]), "fine.bin.loss has "),
    "loss long": (suffix("loss", lambda loss: [*loss, 1]), "fine.bin.loss has "),
    "loss changed": (suffix("loss", lambda loss: 1 - loss), "fine.bin is not what fine.bin.json says"),
    "starts short": (suffix("starts", lambda starts: starts[:2]), "fine.bin.starts has 16 bytes, fine.bin.json says"),
    "starts long": (suffix("starts", lambda starts: [*starts, 20]), "fine.bin.starts has 32 bytes"),
    "half a start": (lambda path: os.truncate(f"{path}.starts", 20), "fine.bin.starts has 20 bytes"),
    "starts descend": (suffix("starts", lambda starts: starts[[0, 2, 1]]), "fine.bin is not what fine.bin.json says"),
    "a start twice": (suffix("starts", lambda starts: starts[[0, 1, 1]]), "fine.bin is not what fine.bin.json says"),
    "not from 0": (suffix("starts", lambda starts: [1, *starts[1:]]), "fine.bin is not what fine.bin.json says"),
    "a start elsewhere": (suffix("starts", lambda starts: [0, starts[1] + 1, starts[2]]), "fine.bin is not what"),
    "a start behind the end": (suffix("starts", lambda starts: [*starts[:2], 10 ** 6]), "fine.bin is not what"),
    "a start beyond int64": (suffix("starts", lambda starts: [*starts[:2], 2 ** 64 - 1]), "fine.bin is not what"),
    "more documents": (lambda path: (facts(documents=4)(path), suffix("starts", lambda starts: [*starts, len(
        Path(f"{path}.loss").read_bytes())])(path)), "fine.bin is not what fine.bin.json says"),
    "empty": (lambda path: (facts(tokens=0)(path), os.truncate(path, 0), os.truncate(f"{path}.loss", 0)),
              "fine.bin.json: not a token file of this version"),
    "nothing where tokens are": (lambda path: os.truncate(path, 0), "fine.bin has 0 bytes, fine.bin.json says "),
    "a temperature of words": (facts(source={"distill": True, "temperature": "hot"}),
                               "fine.bin.json: the temperature 'hot' is not a number from 0 on: prepare it again"),
    "a temperature below 0": (facts(source={"openings": "o", "temperature": -1}), "the temperature -1 is not a number"),
    "no source": (facts(source=[]), "fine.bin.json: not a token file of this version"),
    "no documents": (lambda path: (facts(documents=0)(path), suffix("starts", lambda starts: [])(path)),
                     "fine.bin.json: not a token file of this version"),
    "another tokenizer": (lambda path: tokenizer(lambda t: t["added_tokens"].pop())(path.parent / "tiny"),
                          "fine.bin was written with another tokenizer than "),
}


@pytest.mark.parametrize("case", TOKEN_FILES)
def test_token_files(case, tiny_folder, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)       # threads need not be measured
    damage, says = TOKEN_FILES[case]
    separator = "\n<|endoftext|>\n"
    Path("fine.txt").write_text(separator.join(("the dog ran", "a cat", "the bird sang a song")))
    assert cli("prepare_data", "--model", tiny_folder, "--text", "fine.txt", "--out", "fine.bin")[0] == 0
    assert read_json("fine.bin.json")["documents"] == 3
    damage(tmp_path / "fine.bin")
    status, out, err = cli("train_heads", "--model", tiny_folder, "--data", "fine.bin", "--out", "h")
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("train_heads.py: "), err
    assert says in err and "prepare it" in err and not Path("h").exists()


def test_the_hub_code(monkeypatch, tmp_path):
    """The hub can't be reached in a test: its function is replaced, its errors are the library's own."""
    import huggingface_hub
    from huggingface_hub import errors
    calls = []

    def download(repo, filename, revision=None, repo_type="model", local_files_only=False):
        assert not local_files_only
        calls.append((repo, filename, revision) if repo_type == "model" else (repo, filename, revision, repo_type))
        if filename == "model.safetensors.index.json":
            raise errors.EntryNotFoundError("404")
        if filename == "tokenizer.json":
            raise errors.LocalEntryNotFoundError("offline")
        return str(tmp_path / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    (tmp_path / "model.safetensors").touch()
    assert checkpoint.weight_files("some/model", "v1") == [tmp_path / "model.safetensors"]
    assert calls == [("some/model", "model.safetensors", "v1")]
    assert files.locate("some/model", "tokenizer.json", required=False) is None        # offline, optional
    with pytest.raises(UserError, match="the hub can't be reached"):
        files.locate("some/model", "tokenizer.json")
    with pytest.raises(UserError, match="on the hub has no model.safetensors.index.json"):
        files.locate("some/model", "model.safetensors.index.json")
    with pytest.raises(UserError, match="not a folder: give a folder or a hub id"):
        files.locate("nowhere", "config.json")
    args = prepare_data.arguments(["--tinystories", "--split", "validation", "--out", "a.bin"])
    (tmp_path / "TinyStoriesV2-GPT4-valid.txt").write_text("A dog.\n<|endoftext|>\nA cat.\n")
    assert list(prepare_data.source_items(args, None, [], None)) == ["A dog.", "A cat."]
    assert calls[-1] == ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-valid.txt", None, "dataset")


def test_nothing_half_written(tmp_path, monkeypatch):
    def save_half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error
    monkeypatch.setattr(files, "save_file", save_half)
    for full in (OSError(28, "No space left"), SafetensorError("No space left")):      # the library raises its own
        error = full
        with pytest.raises(UserError, match="can't write .*model.safetensors: No space left"):
            tiny_llama().save(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == []
    monkeypatch.undo()
    tiny_llama().save(tmp_path)
    assert Llama.from_pretrained(tmp_path).config.vocab_size == 12
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == (tmp_path / "config.json").stat().st_mode & 0o777


def test_a_real_process_has_status_2_and_no_traceback(tiny_folder):
    run = lambda *a: subprocess.run([sys.executable, ROOT / "generate.py", *a], capture_output=True, text=True)
    bad = run("--model", "nowhere/at/all")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    shell = f"{sys.executable} {ROOT}/generate.py --model {tiny_folder} --prompt dog --json | head -c 1"
    closed = subprocess.run(shell, shell=True, capture_output=True, text=True, env=os.environ)
    assert closed.stdout == "{" and closed.stderr == ""
    fine = forked.run(ROOT / "generate.py", "--model", tiny_folder, "--prompt", "the dog", "--json")
    assert fine.returncode == 0 and json.loads(fine.stdout)["new_tokens"] > 0


def test_no_memory_for_the_cache(monkeypatch, capsys):
    """Keys and values of 512 TB, what numpy and a GPU say of it; a RuntimeError of another kind is a bug, not this."""
    def full_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a capacity of 9 GiB")
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    model = tiny_llama()
    for too_much in (lambda: new_cache(model.config, 10 ** 9, 1000, like=model.norm.weight),
                     lambda: np.zeros(64 * 10 ** 12), full_gpu):
        with pytest.raises(SystemExit) as stop:
            command_line(too_much)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith("generate.py: not enough memory: smaller batches or fewer new tokens need less (")
        assert "capacity" not in err
    with pytest.raises(RuntimeError, match="must match"):
        command_line(lambda: torch.zeros(2) + torch.zeros(3))
