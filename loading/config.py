"""The dialects of config.json, and every check of it: what leaves here describes a Llama that can be built."""
import math
from loading.files import UserError, locate, read_json

MOST, LONGEST = 2 ** 19, 2 ** 22    # a size, so that no product of three is too large for torch; a context
DTYPES = ("float64", "float32", "bfloat16", "float16")
ROPE_NUMBERS = {        # what each kind of rope scaling needs; "dynamic" changes nothing within the context
    "default": (), "dynamic": ("factor",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")}
MISTRAL = {"sliding_window": 4096, "num_key_value_heads": 8, "intermediate_size": 14336,
           "max_position_embeddings": 4096 * 32}        # the defaults that differ from a Llama's
IGNORED = {"llama": {"sliding_window": None}, "mistral": {"attention_bias": False, "mlp_bias": False}}      # by HF

def read_config(name_or_path, revision=None) -> dict:
    """`config.json`; a `generation_config.json` beside it overrides the end-of-text ids, as in HF's generate.
    UserError: it is that of a quantised model."""
    path = locate(name_or_path, "config.json", revision)
    data = read_json(path)
    if quantised := data.get("quantization_config"):
        named = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        method = named or "bitsandbytes"                    # whose first versions named none
        raise UserError(f"{path}: the weights are quantised by {method}, which is not supported: give the unquantised "
                        "model")
    if generation := locate(name_or_path, "generation_config.json", revision, required=False):
        data |= {k: v for k, v in read_json(generation).items() if k == "eos_token_id"}
    return data

def one_dialect(data: dict) -> dict:
    """Old and new spellings → the field names of LlamaConfig, None where a value is missing."""
    def refuse(field, value, expected):
        raise UserError(f"config: {field} is {value!r}, only {expected} is supported")
    model_type = data.get("model_type", "llama")
    if model_type not in tuple(IGNORED):
        refuse("model_type", model_type, "'llama' (or 'mistral')")
    if data.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", data["hidden_act"], "'silu'")
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(data.get(field) or {}, dict):
            refuse(field, data[field], "an object")
    field = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"       # of both, HF takes the old one
    rope = data.get(field) or {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind not in tuple(ROPE_NUMBERS):
        refuse(field, kind, " or ".join(map(repr, ROPE_NUMBERS)))
    data = {"dtype": data.get("torch_dtype"), **data}
    data["rope_theta"] = rope.get("rope_theta", data.get("rope_theta"))
    outside = {k: v for k, v in data.items() if k == "original_max_position_embeddings" and v}      # HF prefers it
    data["rope_scaling"] = None if kind == "default" else rope | outside | {"rope_type": kind}
    if kind == "dynamic" and rope.get("original_max_position_embeddings"):
        data["max_position_embeddings"] = rope["original_max_position_embeddings"]
    return (MISTRAL if model_type == "mistral" else {}) | data | IGNORED[model_type]

def check_config(data: dict, defaults: dict, context: int | None) -> dict:
    """A config.json's contents → the fields of LlamaConfig, checked; its `defaults`. context None: the model's own."""
    data = one_dialect(data)
    c = defaults | {"num_key_value_heads": None, "head_dim": None, "eos_token_id": 2}
    c |= {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
          if k in c and (v is not None or k in ("bos_token_id", "eos_token_id"))}       # null elsewhere: the default
    c["eos_token_ids"] = c["eos_token_id"] if isinstance(c["eos_token_id"], tuple) else (c["eos_token_id"],)
    check_values(c)
    c["eos_token_ids"] = tuple(i for i in c["eos_token_ids"] if i in range(c["vocab_size"]))     # no other ever comes
    if c["num_key_value_heads"] is None:
        c["num_key_value_heads"] = c["num_attention_heads"]
    if c["rope_scaling"]:
        c["rope_scaling"] = rope_numbers(c["rope_scaling"], c["max_position_embeddings"], c["rope_theta"])
    c["max_position_embeddings"] = context_of(c, context)
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

def positive(value) -> bool:
    return type(value) in (int, float) and 1e-18 < value < 1e18            # else float32 overflows somewhere

def rope_numbers(rope: dict, longest: int, theta: float) -> dict:
    """A kind of rope scaling with its numbers, completed as transformers completes them; longest: the published
    max_position_embeddings. UserError: one can't be."""
    defaults = {"original_max_position_embeddings": longest, "beta_fast": 32, "beta_slow": 1}
    def number(name):
        value = defaults.get(name) if rope.get(name) is None else rope[name]
        if not positive(value):
            raise UserError(f"config: rope_scaling has {name} {value!r}, it must be a positive number, below 1e18")
        return value
    found = {"rope_type": rope["rope_type"]}
    if found["rope_type"] == "yarn":
        if theta == 1:
            raise UserError("config: rope_theta is 1, which yarn can't stretch: it must be another number")
        found["truncate"] = bool(rope.get("truncate", True))
        defaults["factor"] = longest / number("original_max_position_embeddings")
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scales = (number("mscale"), number("mscale_all_dim")) if both else (1, 0)
        sizes = [0.1 * scale * math.log(max(1, number("factor"))) + 1.0 for scale in scales]
        defaults["attention_factor"] = sizes[0] / sizes[1]
    return found | {name: number(name) for name in ROPE_NUMBERS[found["rope_type"]]}

def stretch(rope: dict | None) -> float:
    """How many times the published context a linear rope scaling allows, as in vLLM."""
    return max(1, rope["factor"]) if rope and rope["rope_type"] == "linear" else 1

def context_of(c: dict, requested: int | None) -> int:
    """The longest text in tokens: as requested, or the model's own. UserError: longer than can be."""
    rope, longest, window = c["rope_scaling"] or {}, c["max_position_embeddings"], c["sliding_window"] or LONGEST
    limit = min(window, LONGEST, longest if rope.get("rope_type") == "dynamic" else LONGEST)
    if rope.get("rope_type") == "yarn":
        longest = rope["original_max_position_embeddings"] * rope["factor"]
    context = requested or int(min(longest * stretch(rope), c["sliding_window"] or 1e99))
    if not 1 <= context <= limit:
        raise UserError(f"config: the context is {context}, this model can have 1 to {limit} tokens: give a --context")
    return context

def check_values(c: dict) -> None:
    """UserError that names the first field whose value can't be."""
    def must_be(expected, test, *names):
        for name in names:
            if not test(c[name]):
                raise UserError(f"config: {name} is {c[name]!r}, it must be {expected}")
    whole = lambda v, most=MOST: type(v) is int and 1 <= v <= most
    must_be(f"a whole number from 1 to {MOST}", whole, "vocab_size", "hidden_size", "intermediate_size",
            "num_hidden_layers", "num_attention_heads")
    must_be(f"a whole number from 1 to {LONGEST}", lambda v: whole(v, LONGEST), "max_position_embeddings")
    must_be(f"a whole number from 1 to {MOST}", lambda v: v is None or whole(v), "num_key_value_heads", "head_dim")
    must_be("a positive number, below 1e18", positive, "rms_norm_eps", "rope_theta")
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
    published = fields["max_position_embeddings"] / stretch(fields["rope_scaling"])
    fields["max_position_embeddings"] = math.ceil(published - 1e-9)
    name = "Mistral" if fields["sliding_window"] else "Llama"       # HF's Llama has no window
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "hidden_act": "silu", **fields}

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
