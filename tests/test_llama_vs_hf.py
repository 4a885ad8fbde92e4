"""Logits and greedy text against transformers, float32, on checkpoints that transformers itself wrote."""
import pytest
import torch
from conftest import MODEL

from llama import Llama, LlamaConfig, Tokenizer, mask_table, new_cache, read_json, visible, write_json
from tinymedusa import generate

transformers = pytest.importorskip("transformers", reason="development requirement; test_golden.py runs without it")

TINY = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
        "max_position_embeddings": 256}
CONFIGS = {
    "TinyLLama-v0": {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8,
                     "num_attention_heads": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "gqa": TINY | {"num_key_value_heads": 2},
    "mqa": TINY | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "tied": TINY | {"tie_word_embeddings": True},
    "biases": TINY | {"attention_bias": True, "mlp_bias": True},
    "head_dim": TINY | {"head_dim": 16, "num_key_value_heads": 4},
    "rope_theta": TINY | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
}


def hf_twin(folder, shard="5GB", **over):
    """A random model of transformers, saved by it in `folder`; weights large enough that every part matters."""
    torch.manual_seed(0)
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**over)).eval()
    for p in twin.parameters():
        p.data.normal_(0, 0.3) if p.dim() == 2 else p.data.uniform_(-1.5, 1.5)
    twin.save_pretrained(folder, max_shard_size=shard)
    return twin


def compare(twin, ours, ids) -> float:
    """Largest difference of any logit, without a cache and as one prefill into a cache."""
    rows, length = ids.shape
    with torch.no_grad():
        expected = twin(ids).logits
        cache = new_cache(ours.config, rows, length + 7, like=ours.norm)
        slots = torch.arange(length).expand(rows, -1)
        table = mask_table(torch.ones(length, length).tril().bool())
        mask = visible(torch.zeros(rows, dtype=torch.long), table, torch.arange(length + 7))
        outputs = ours.lm_head(ours(ids)), ours.lm_head(ours(ids, slots, mask, cache, slots))
    assert expected.std() > 0.5
    return max((expected - out).abs().max().item() for out in outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name, tmp_path):
    twin = hf_twin(tmp_path, **CONFIGS[name])
    ours = Llama.from_pretrained(tmp_path)
    assert ours.norm.dtype == torch.float32
    difference = compare(twin, ours, torch.randint(3, CONFIGS[name]["vocab_size"], (2, 53)))
    print(f"{name}: largest difference {difference:.2e}")
    assert difference <= 1e-4


def test_sharded(tmp_path):
    twin = hf_twin(tmp_path, shard="150KB", **TINY)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    difference = compare(twin, Llama.from_pretrained(tmp_path), torch.randint(3, 320, (1, 40)))
    print(f"sharded: largest difference {difference:.2e}")
    assert difference <= 1e-4


def test_a_tied_config_whose_file_has_an_lm_head(tmp_path):
    """transformers 5 believes the file, and so do we."""
    hf_twin(tmp_path, **TINY)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"tie_word_embeddings": True})
    twin = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert compare(twin, Llama.from_pretrained(tmp_path), torch.randint(3, 320, (1, 20))) <= 1e-4


def test_bfloat16_on_request(tmp_path):
    """Rounds elsewhere than transformers does, but no worse: measured against float32."""
    twin, ids = hf_twin(tmp_path, **TINY), torch.randint(3, 320, (4, 40))
    ours = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert ours.embed_tokens.weight.dtype == torch.bfloat16 and ours.rotary.dtype == torch.float32
    with torch.no_grad():
        exact, mine = twin(ids).logits, ours.lm_head(ours(ids)).float()
        theirs = twin.to(torch.bfloat16)(ids).logits.float()
    print(f"bfloat16: distance to float32 {(mine - exact).norm():.3f}, transformers' {(theirs - exact).norm():.3f}")
    assert (mine - exact).norm() < 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_transformers_loads(name, tmp_path):
    twin = hf_twin(tmp_path / "theirs", **CONFIGS[name])
    Llama.from_pretrained(tmp_path / "theirs").save(tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(3, 320, (1, 30))
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, again(ids).logits)


def test_config_defaults_are_those_of_hf():
    """An old config names almost nothing; transformers decides what the rest is."""
    old = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    ours, theirs = LlamaConfig.from_dict(old), transformers.LlamaConfig(**old)
    for field in LlamaConfig.__dataclass_fields__:
        if field not in ("dtype", "rope_theta"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.dtype == "float32"
    rope = {"rope_type": "default", "rope_theta": 5e5}
    written = transformers.LlamaConfig(**old, rope_parameters=rope).to_dict()
    assert LlamaConfig.from_dict(written).rope_theta == 5e5
    assert LlamaConfig.from_dict(old | {"rope_theta": 7e4, "torch_dtype": "bfloat16"}).rope_theta == 7e4
    assert LlamaConfig.from_dict(old | {"eos_token_id": [2, 9]}).eos_token_ids == (2, 9)


def test_embedded_model_logits():
    twin = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours = Llama.from_pretrained(MODEL)
    text = "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog."
    ids = torch.tensor([Tokenizer(MODEL, ours.config).encode(text)])
    difference = compare(twin, ours, ids)
    print(f"model/: largest difference {difference:.2e}")
    assert difference <= 1e-4


def test_embedded_model_greedy_text():
    twin = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours = Llama.from_pretrained(MODEL)
    tokenizer = Tokenizer(MODEL, ours.config)
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    for prompt in ("Once upon a time, there was a cat.", "Tom and Sue went to the"):
        ids = tokenizer.encode(prompt)
        assert theirs(prompt).input_ids == ids
        expected = twin.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False, pad_token_id=0)[0, len(ids):]
        assert [t for new in generate(ours, [ids], 120) for t in new[0]] == expected.tolist()


def test_the_embedded_model_has_the_shape_of_tinyllama_v0():
    config = read_json(MODEL / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    for key, value in CONFIGS["TinyLLama-v0"].items():
        assert config[key] == (4096 if key == "vocab_size" else value)
