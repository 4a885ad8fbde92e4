"""Logits and greedy text against transformers, float32, on checkpoints that transformers itself wrote."""
import copy
from dataclasses import asdict

import pytest
import torch
from conftest import MODEL

from fast import engines
from llama import CacheView, Llama, LlamaConfig, new_cache, rotary_table
from loading.config import check_prompts, to_json
from loading.files import UserError, read_json, write_json
from loading.tokenizer import Tokenizer
from tinymedusa import PlainDecoder, Sampling, Tree, warp
from variants.heads import load_heads
from variants.penalty import penalize

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
    "linear": TINY | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
    # wavelengths on both sides of the range that Llama 3 leaves alone, and inside it
    "llama3": TINY | {"head_dim": 32, "rope_parameters": {
        "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "dynamic": TINY | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}},
    # texts are longer than the original context
    "yarn": TINY | {"head_dim": 32, "rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}},
    "yarn by mscale": TINY | {"head_dim": 16, "rope_parameters": {
        "rope_theta": 500000.0, "rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 32,
        "mscale": 0.707, "mscale_all_dim": 1.4, "beta_fast": 8, "beta_slow": 2, "truncate": False}},
    "yarn by its attention": TINY | {"rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 20,
        "attention_factor": 1.5}},
    # the shapes of families, narrower: what their configs set is as published
    "TinyLlama-1.1B": TINY | {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 2,
                              "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "Llama-2": TINY | {"rms_norm_eps": 1e-5, "pretraining_tp": 1, "num_key_value_heads": 8},
    "Llama-3.2": TINY | {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
                         "eos_token_id": [300, 301], "bos_token_id": 299, "rope_parameters": {
                             "rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "SmolLM": TINY | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
                      "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0},
}


def plain_text(model, ids, new_tokens, **options) -> list:
    return [t for new in PlainDecoder(model, **options).generate([ids], new_tokens) for t in new[0]]


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
        cache = new_cache(ours.config, rows, length + 7, like=ours.norm.weight)
        positions, causal = torch.arange(length).expand(rows, -1), torch.ones(length, length).tril().bool()
        view = CacheView.new(cache, torch.zeros(rows, dtype=torch.long), causal, length + 7)
        outputs = ours.lm_head(ours(ids)), ours.lm_head(ours(ids, positions, view))
    assert expected.std() > 0.5
    return max((expected - out).abs().max().item() for out in outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name, tmp_path):
    twin = hf_twin(tmp_path, **CONFIGS[name])
    ours = Llama.from_pretrained(tmp_path)
    assert ours.norm.weight.dtype == torch.float32
    difference = compare(twin, ours, torch.randint(3, CONFIGS[name]["vocab_size"], (2, 53)))
    print(f"{name}: largest difference {difference:.2e}")
    assert difference <= 1e-4


def test_the_old_spelling_of_rope_scaling(tmp_path):
    """As Llama 3.1's own config.json has it: rope_theta beside rope_scaling."""
    twin = hf_twin(tmp_path, **CONFIGS["llama3"])
    config = read_json(tmp_path / "config.json")
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    write_json(tmp_path / "config.json", config | {"rope_theta": theta, "rope_scaling": rope})
    assert compare(twin, Llama.from_pretrained(tmp_path), torch.randint(3, 320, (2, 53))) <= 1e-4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize("rope", [
    YARN, {"type": "yarn", "factor": 10.0}, YARN | {"factor": None}, YARN | {"factor": 40, "beta_fast": 16},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}, YARN | {"mscale": 0.7}, YARN | {"mscale_all_dim": 1, "mscale": 0.0},
    YARN | {"attention_factor": 1.7, "truncate": False}, YARN | {"original_max_position_embeddings": 4},
    YARN | {"beta_fast": 1, "beta_slow": 8}, YARN | {"factor": 1.0}, YARN | {"beta_fast": None, "mscale": None},
    YARN | {"rope_theta": 20.0}, YARN | {"rope_theta": 4.0}, YARN | {"rope_theta": 0.5},    # ramps to beyond the end
    {"type": "linear", "factor": 2.5}], ids=str)
@pytest.mark.parametrize("beside", [
    {}, {"original_max_position_embeddings": 512}, {"rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}], ids=str)
def test_rotary_tables_are_those_of_transformers(rope, beside):
    """Bit for bit, with what a file leaves out, in HF's order of the places where it is said."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    data = TINY | {"hidden_size": 256, "max_position_embeddings": 1024, "rope_scaling": rope} | beside
    ours = LlamaConfig.from_dict(copy.deepcopy(data))
    positions = torch.arange(min(ours.max_position_embeddings, 3000))
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(data)))(torch.zeros(1), positions[None])
    half = ours.head_dim // 2
    for table, expected in zip(rotary_table(ours), theirs, strict=True):
        assert torch.equal(table[positions][:, half:], expected[0][:, half:])


LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = CONFIGS["Llama-3.2"]["rope_parameters"]


@pytest.mark.parametrize("data, context", [
    ({"max_position_embeddings": 4096, "rope_scaling": LINEAR}, 16384),                     # vicuna-7b-v1.5-16k
    ({"rope_scaling": LINEAR}, 8192), ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, 5120),
    ({"rope_scaling": LINEAR | {"factor": 0.5}}, 2048), ({"rope_scaling": LINEAR, "--context": 2048}, 2048),
    ({"--context": 100}, 100), ({"--context": 9000}, 9000), ({"--context": None}, 2048),
    ({"rope_scaling": YARN}, 1024), ({"rope_scaling": YARN, "max_position_embeddings": 1024}, 1024),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 8192), ({"rope_scaling": YARN, "--context": 4096}, 4096),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048), ({"rope_parameters": LLAMA3}, 2048),
    ({"model_type": "llama", "sliding_window": 16}, 2048), ({"sliding_window": "x", "use_sliding_window": True}, 2048),
    ({"model_type": "mistral", "sliding_window": 16}, 16), ({"model_type": "mistral"}, 4096),
    ({"model_type": "mistral", "sliding_window": None}, 131072),
    ({"model_type": "mistral", "sliding_window": 16, "--context": 12}, 12),
    ({"model_type": "mistral", "sliding_window": 9000, "max_position_embeddings": 4096, "rope_scaling": LINEAR}, 9000)])
def test_the_context(data, context, tmp_path):
    """What vLLM allows, but no more than can be computed; a model that is saved keeps it."""
    config = LlamaConfig.from_dict(data, requested := data.get("--context"))
    assert config.max_position_embeddings == context
    if requested is None:
        saved = to_json(asdict(config))
        assert LlamaConfig.from_dict(saved) == config
        published = data.get("max_position_embeddings", 2048)
        assert "linear" not in str(data) or data.get("model_type") or saved["max_position_embeddings"] == published


@pytest.mark.parametrize("data, limit", [
    ({"model_type": "mistral", "sliding_window": 16, "--context": 17}, 16), ({"--context": 2 ** 22 + 1}, 2 ** 22),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "--context": 2049}, 2048),
    ({"rope_scaling": LINEAR | {"factor": 1e9}}, 2 ** 22)])
def test_a_context_that_cannot_be(data, limit):
    with pytest.raises(UserError, match=f"the context is .*, this model can have 1 to {limit} tokens: give"):
        LlamaConfig.from_dict(data, data.get("--context"))


def test_what_a_kind_of_model_ignores(tmp_path):
    """A Llama attends to all, whatever its config says of a window; a Mistral has no biases."""
    twin = hf_twin(tmp_path / "llama", **TINY | {"sliding_window": 16, "use_sliding_window": True})
    assert read_json(tmp_path / "llama" / "config.json")["sliding_window"] == 16
    ours = Llama.from_pretrained(tmp_path / "llama")
    assert ours.config.max_position_embeddings == 256
    assert compare(twin, ours, torch.randint(3, 320, (2, 53))) <= 1e-4
    window = {"num_key_value_heads": 2, "sliding_window": 64, "attention_bias": True, "mlp_bias": True}
    twin = transformers.MistralForCausalLM(transformers.MistralConfig(**TINY | window)).eval()
    twin.save_pretrained(tmp_path / "mistral")
    Llama.from_pretrained(tmp_path / "mistral").save(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert again.config.sliding_window == 64
    with torch.no_grad():
        ids = torch.randint(3, 320, (1, 100))
        assert torch.equal(twin(ids).logits, again(ids).logits)


def test_mistral_up_to_its_sliding_window(tmp_path):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**TINY | {"num_key_value_heads": 2, "sliding_window": 64})
    twin = transformers.MistralForCausalLM(config).eval()
    for p in twin.parameters():
        p.data.normal_(0, 0.3) if p.dim() == 2 else p.data.uniform_(-1.5, 1.5)
    twin.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.max_position_embeddings == 64
    assert compare(twin, ours, torch.randint(3, 320, (2, 63))) <= 1e-4
    with pytest.raises(UserError, match="the context holds 64 .*sliding window"):
        check_prompts([[1] * 64], ours.config)
    check_prompts([[1] * 63], ours.config)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"sliding_window": None})
    assert Llama.from_pretrained(tmp_path).config.max_position_embeddings == 256


def test_dynamic_ends_with_the_original_length(tmp_path):
    hf_twin(tmp_path, **CONFIGS["dynamic"])
    ours = Llama.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="the context holds 256 .*'dynamic' would change the keys"):
        check_prompts([[1] * 256], ours.config)
    check_prompts([[1] * 255], ours.config)
    assert len(plain_text(ours, [1] * 200, 100, eos=())) == 56


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
    assert ours.embed_tokens.weight.dtype == torch.bfloat16 and ours.cos.dtype == ours.sin.dtype == torch.float32
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
        if field not in ("dtype", "rope_theta", "rope_scaling", "sliding_window", "eos_token_ids"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.eos_token_ids == (theirs.eos_token_id,)
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
        assert plain_text(ours, ids, 120) == expected.tolist()


def test_greedy_text_with_a_repetition_penalty():
    """Prompt tokens count. By the C++ step too, and by heads."""
    twin = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours, native = Llama.from_pretrained(MODEL), engines.load(MODEL, torch.float32, fast=True)
    heads, tree = load_heads(MODEL / "medusa", ours), Tree.from_paths([[0], [1], [0, 0], [0, 0, 0]])
    ids, texts = Tokenizer(MODEL, ours.config).encode("Once upon a time, there was a cat who saw a cat."), set()
    for penalty in (1.3, 5.0, 0.8):
        expected = twin.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0,
                                 repetition_penalty=penalty)[0, len(ids):].tolist()
        decoders = [engines.decoder(m, *some) for m in (ours, native) for some in ((), (heads, tree))]
        for decoder in decoders:
            penalize(decoder, penalty)
            assert [t for (new,) in decoder.generate([ids], 40) for t in new] == expected
        texts.add(tuple(expected))
    assert len(texts) == 3 and tuple(plain_text(ours, ids, 40)) not in texts


@pytest.mark.parametrize("limits", [(0, 1.0, 0.0), (0, 1.0, 0.1), (0, 1.0, 1.0), (7, 1.0, 0.3), (0, 0.8, 0.05),
                                    (30, 0.9, 0.2)], ids=str)
def test_what_sampling_leaves_out(limits):
    """In the order of HF's generate: temperature, top-k, top-p, min-p."""
    top_k, top_p, min_p = limits
    logits = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 1.7):
        config = transformers.GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p,
                                               min_p=min_p)
        twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"num_hidden_layers": 1}))
        chain = twin._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
        expected, ours = chain(None, logits), warp(logits, Sampling(temperature, top_k, top_p, min_p))
        assert torch.equal(expected.isinf(), ours.isinf()) and not ours.isinf().all(-1).any()
        assert torch.allclose(expected.softmax(-1), ours.softmax(-1), atol=1e-6)
        assert expected.isinf().any() == (limits != (0, 1.0, 0.0))


def test_the_embedded_model_has_the_shape_of_tinyllama_v0():
    config = read_json(MODEL / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    for key, value in CONFIGS["TinyLLama-v0"].items():
        assert config[key] == (4096 if key == "vocab_size" else value)
