"""The dialects of config.json, and every check of it: what leaves here describes a Llama that can be built."""
from loading.files import UserError, locate, read_json

MOST, LONGEST = 2 ** 19, 2 ** 22    # a size, so that no product of three is too large for torch; a context
DTYPES = ("float64", "float32", "bfloat16", "float16")
ROPE_NUMBERS = {        # what each kind of rope scaling needs; "dynamic" changes nothing within the context
    "default": (), "dynamic": ("factor",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
MISTRAL = {"sliding_window": 4096, "num_key_value_heads": 8, "intermediate_size": 14336,
           "max_position_embeddings": 4096 * 32}        # the defaults that differ from a Llama's

def read_config(name_or_path, revision=None) -> dict:
    """`config.json`; a `generation_config.json` beside it overrides the end-of-text ids, as in HF's generate."""
    data = read_json(locate(name_or_path, "config.json", revision))
    if generation := locate(name_or_path, "generation_config.json", revision, required=False):
        data |= {k: v for k, v in read_json(generation).items() if k == "eos_token_id"}
    return data

def one_dialect(data: dict) -> dict:
    """Old and new spellings → the field names of LlamaConfig, None where a value is missing."""
    def refuse(field, value, expected):
        raise UserError(f"config: {field} is {value!r}, only {expected} is supported")
    if data.get("model_type", "llama") not in ("llama", "mistral"):
        refuse("model_type", data["model_type"], "'llama' (or 'mistral')")
    if data.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", data["hidden_act"], "'silu'")
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(data.get(field) or {}, dict):
            refuse(field, data[field], "an object")
    rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind not in tuple(ROPE_NUMBERS):
        refuse("rope_parameters" if data.get("rope_parameters") else "rope_scaling", kind,
               " or ".join(map(repr, ROPE_NUMBERS)))
    data = {"dtype": data.get("torch_dtype"), **data}
    data["rope_theta"] = rope.get("rope_theta", data.get("rope_theta"))
    data["rope_scaling"] = None if kind == "default" else {"rope_type": kind} | {
        name: rope.get(name) for name in ROPE_NUMBERS[kind]}
    if kind == "dynamic" and rope.get("original_max_position_embeddings"):
        data["max_position_embeddings"] = rope["original_max_position_embeddings"]
    return MISTRAL | data if data.get("model_type") == "mistral" else data

def check_config(data: dict, defaults: dict) -> dict:
    """The contents of a config.json → the checked fields of LlamaConfig, whose `defaults` are given."""
    data = one_dialect(data)
    c = defaults | {"num_key_value_heads": None, "head_dim": None, "eos_token_id": 2}
    c |= {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
          if k in c and (v is not None or k in ("bos_token_id", "eos_token_id"))}       # null elsewhere: the default
    c["eos_token_ids"] = c["eos_token_id"] if isinstance(c["eos_token_id"], tuple) else (c["eos_token_id"],)
    check_values(c)
    c["eos_token_ids"] = tuple(i for i in c["eos_token_ids"] if i in range(c["vocab_size"]))     # no other ever comes
    if c["num_key_value_heads"] is None:
        c["num_key_value_heads"] = c["num_attention_heads"]
    if c["sliding_window"]:
        c["max_position_embeddings"] = min(c["max_position_embeddings"], c["sliding_window"])
    if c["head_dim"] is None:
        c["head_dim"], rest = divmod(c["hidden_size"], c["num_attention_heads"])
        if rest:
            raise UserError(f"config: hidden_size {c['hidden_size']} is not divisible by num_attention_heads "
                            f"{c['num_attention_heads']} and no head_dim is given")
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise UserError(f"config: num_attention_heads {c['num_attention_heads']} is not a multiple of "
                        f"num_key_value_heads {c['num_key_value_heads']}")
    if c["head_dim"] % 2:
        raise UserError(f"config: head_dim {c['head_dim']} is odd, rotary embedding needs an even one")
    del c["eos_token_id"]
    return c

def check_values(c: dict) -> None:
    """UserError that names the first field whose value can't be."""
    def must_be(expected, test, *names):
        for name in names:
            if not test(c[name]):
                raise UserError(f"config: {name} is {c[name]!r}, it must be {expected}")
    whole = lambda v, most=MOST: type(v) is int and 1 <= v <= most
    positive = lambda v: type(v) in (int, float) and 1e-18 < v < 1e18      # else float32 overflows somewhere
    must_be(f"a whole number from 1 to {MOST}", whole, "vocab_size", "hidden_size", "intermediate_size",
            "num_hidden_layers", "num_attention_heads")
    must_be(f"a whole number from 1 to {LONGEST}", lambda v: whole(v, LONGEST), "max_position_embeddings")
    must_be(f"a whole number from 1 to {MOST}", lambda v: v is None or whole(v), "num_key_value_heads", "head_dim")
    must_be("a positive number, below 1e18", positive, "rms_norm_eps", "rope_theta")
    rope = c["rope_scaling"] or {}
    for name in ROPE_NUMBERS[rope.get("rope_type", "default")]:
        if not positive(rope[name]):
            raise UserError(f"config: rope_scaling has {name} {rope[name]!r}, it must be a positive number, below 1e18")
    must_be("a whole number of at least 1", lambda v: v is None or whole(v, float("inf")), "sliding_window")
    must_be("true or false", lambda v: type(v) is bool, "tie_word_embeddings", "attention_bias", "mlp_bias")
    must_be(f"one of {', '.join(DTYPES)}", lambda v: v in DTYPES, "dtype")
    must_be("a token id", lambda v: v is None or type(v) is int, "bos_token_id")
    must_be("a token id or a list of them", lambda v: v is None or {int}.issuperset(map(type, c["eos_token_ids"])),
            "eos_token_id")

def to_json(fields: dict) -> dict:
    """The fields of a LlamaConfig as HF writes them, in the spelling that old and new transformers both read."""
    eos = fields["eos_token_ids"]
    fields = fields | {"eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None, "torch_dtype": fields["dtype"]}
    del fields["eos_token_ids"]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **fields}

def check_prompts(prompts: list, config) -> None:
    """UserError: an empty prompt, or one that leaves no room in the context."""
    context, reason = config.max_position_embeddings, ""
    if config.sliding_window == context:
        reason = " (beyond it this model attends to a sliding window only, which is not supported)"
    elif config.rope_scaling and config.rope_scaling["rope_type"] == "dynamic":
        reason = " (beyond it rope_scaling 'dynamic' would change the keys that are cached already: not supported)"
    for number, prompt in enumerate(prompts, 1):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise UserError(f"{name} is empty: give at least one token")
        if len(prompt) >= context:
            raise UserError(f"{name} has {len(prompt)} tokens, the context holds {context}{reason}: shorten the prompt")
