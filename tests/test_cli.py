"""generate.py as people run it: the fields of --json, the story twice, the stage table."""
import json

import pytest
from conftest import MODEL, ROOT, tiny_llama

import generate
from extras.compare import first_difference
from llama import Llama, LlamaConfig
from loading.files import write_json
from loading.tokenizer import Tokenizer
from loading.trees import parse_tree


def test_streamed_text_is_whole_characters_and_nothing_is_lost():
    """Through characters of 1 to 4 bytes, spaces and a cut-off end: the pieces add up to the whole text."""
    tokenizer = Tokenizer(MODEL, LlamaConfig(vocab_size=4096))
    for text in ("a naïve 你好 🦊🦊 dog ", "你", "  two  spaces", "🦊"):
        prompt, ids = tokenizer.encode("Once"), tokenizer.encode(text)[1:]
        for cut in (len(ids), len(ids) - 1):
            stream = tokenizer.stream(prompt)
            pieces = [stream([i]) for i in ids[:cut]]
            assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
            whole = "".join(pieces) + stream([], end=True)
            assert whole == tokenizer.decode(prompt + ids[:cut])[len("Once"):]
    stream = tokenizer.stream([])
    assert "".join(stream([i]) for i in tokenizer.encode(" hi there")) == " hi there"


def run_json(cli, *args):
    status, out, err = cli("generate", "--json", *args)
    assert status == 0 and "Traceback" not in err, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_json_fields(tiny_folder, cli, temperature):
    first, second = run_json(cli, "--model", tiny_folder, "--prompt", "the dog", "--prompt", "once", "--compare",
                             "--profile", "--max-new-tokens", 30, "--temperature", temperature, "--seed", 4)
    tokenizer = Tokenizer(tiny_folder, tiny_llama(vocab_size=300).config)
    for result, prompt in ((first, "the dog"), (second, "once")):
        assert result["prompt"] == prompt and result["prompt_tokens"] == len(tokenizer.encode(prompt))
        assert result["new_tokens"] == len(result["token_ids"]) <= 30
        assert result["text"] == tokenizer.decode(result["token_ids"])
        assert result["tokens_per_step"] == round((result["new_tokens"] - 1) / result["steps"], 4)
        assert result["tokens_per_second"] == pytest.approx(result["new_tokens"] / result["seconds"], rel=1e-3)
        stages, steps = result["stages"], result["steps"]
        assert {k: v["calls"] for k, v in stages.items()} == {
            "init": 1, "medusa": steps, "tree": steps, "posterior": steps, "update": steps}
        assert 0 < sum(v["total_ms"] for v in stages.values()) <= 1000 * result["seconds"]
        baseline = result["baseline"]
        assert result["identical"] is True and result["first_difference"] is None
        assert baseline["token_ids"] == result["token_ids"]
        assert set(baseline["stages"]) == {"init", "base_inference"}
        assert result["speedup"] == pytest.approx(result["tokens_per_second"] / baseline["tokens_per_second"], rel=1e-2)
    alone, = run_json(cli, "--model", tiny_folder, "--prompt", "once", "--max-new-tokens", 30, "--temperature",
                      temperature, "--seed", 5)                                  # prompt i draws from seed + i
    assert alone["token_ids"] == second["token_ids"] and alone["stages"] == {} and "baseline" not in alone


def test_max_steps_means_the_same_for_both(tiny_folder, cli):
    result, = run_json(cli, "--model", tiny_folder, "--prompt", "the dog", "--max-steps", 5, "--compare")
    assert result["steps"] == 5 and result["baseline"]["steps"] == 5 and result["baseline"]["new_tokens"] == 6
    assert result["identical"]
    plain, = run_json(cli, "--model", tiny_folder, "--prompt", "the dog", "--max-steps", 5, "--heads", "none")
    assert plain["token_ids"] == result["baseline"]["token_ids"] and plain["tokens_per_step"] == 1


def test_a_difference_is_reported_not_hidden(tiny_folder, cli, monkeypatch):
    """Break Medusa on purpose: --compare must say where the outputs part, and how near the choice was."""
    import tinymedusa
    real = tinymedusa.sample
    monkeypatch.setattr(tinymedusa, "sample", lambda logits, *a: (real(logits, *a) + (logits.shape[1] > 1)) % 300)
    result, = run_json(cli, "--model", tiny_folder, "--prompt", "the dog", "--compare", "--max-new-tokens", 20)
    assert result["identical"] is False
    assert result["first_difference"]["position"] == 1 and result["first_difference"]["margin"] > 0
    _, out, _ = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--compare", "--max-new-tokens", 20)
    assert "identical: NO, they part at {'position': 1" in out


def test_the_tree_comes_from_the_option_the_folder_or_the_published_one(tiny_folder, cli, monkeypatch):
    seen = []
    real = generate.Tree.from_paths
    monkeypatch.setattr(generate.Tree, "from_paths", lambda paths: seen.append(paths) or real(paths))
    run = lambda *a: run_json(cli, "--model", tiny_folder, "--prompt", "dog", "--max-new-tokens", 2, "--threads", 1, *a)
    run()
    write_json(tiny_folder / "medusa" / "tree.json", {"paths": [[0], [0, 0]], "note": "more keys are fine"})
    run()
    run("--tree", "[[1]]")
    (tiny_folder / "my.json").write_text("[[0], [1]]")
    run("--tree", tiny_folder / "my.json")
    assert len(seen[0]) == 15 and seen[1:] == [[[0], [0, 0]], [[1]], [[0], [1]]]


def test_each_sample_draws_from_a_seed_of_its_own(tiny_folder, tmp_path, cli):
    """Sample j of prompt i is what seed + i N + j gives alone, one at a time or in a batch; behind 2^63 - 1 comes 0."""
    run = lambda *more: [json.loads(line) for line in cli(
        "generate", "--model", tiny_folder, "--json", "--temperature", 1.5, "--max-new-tokens", 12, *more
    )[1].splitlines()]
    prompts = ("--prompt", "the dog", "--prompt", "a cat")
    (tmp_path / "p.txt").write_text("the dog\na cat\n")
    for seed in (7, 2 ** 63 - 2):
        one_by_one = run(*prompts, "--samples", 3, "--seed", seed)
        batch = run("--prompts-file", tmp_path / "p.txt", "--batch-size", 4, "--samples", 3, "--seed", seed)
        assert [(r["prompt"], r["sample"]) for r in one_by_one] == [
            (prompt, j) for prompt in ("the dog", "a cat") for j in range(3)]
        assert [(r["prompt"], r["sample"], r["token_ids"]) for r in batch] == [
            (r["prompt"], r["sample"], r["token_ids"]) for r in one_by_one]
        rows = run(*prompts, "--batch-size", 4, "--samples", 3, "--seed", seed)
        assert [r["token_ids"] for r in rows] == [r["token_ids"] for r in batch]
        for i, result in enumerate(one_by_one):
            alone, = run("--prompt", result["prompt"], "--seed", (seed + i) % 2 ** 63)
            assert alone["token_ids"] == result["token_ids"] and "sample" not in alone
        assert len({tuple(r["token_ids"]) for r in one_by_one}) == 6
    texts = [run("--prompt", "the dog", "--seed", seed)[0]["token_ids"] for seed in (0, 2 ** 32, 2 ** 62)]
    assert len(set(map(tuple, texts))) == 3


def test_samples_are_rows_of_one_batch(tiny_folder, cli, monkeypatch):
    rows, generate_ = [], generate.batches.generate
    monkeypatch.setattr(generate.batches, "generate", lambda *a: rows.append((len(a[1]), a[4])) or generate_(*a))
    args = ["--model", tiny_folder, "--prompt", "the dog", "--temperature", 1, "--max-new-tokens", 3, "--samples", 5]
    for size, expected in ((1, []), (3, [(5, 3)]), (64, [(5, 5)])):
        rows.clear()
        status, out, _ = cli("generate", *args, "--batch-size", size, "--json")
        assert status == 0 and rows == expected and [json.loads(line)["sample"] for line in out.splitlines()] == [
            0, 1, 2, 3, 4]


def test_heads_may_live_elsewhere_or_nowhere(tiny_folder, tmp_path, cli):
    (tiny_folder / "medusa").rename(tmp_path / "elsewhere")
    plain, = run_json(cli, "--model", tiny_folder, "--prompt", "dog", "--max-new-tokens", 9, "--profile")
    assert set(plain["stages"]) == {"init", "base_inference"}
    medusa, = run_json(cli, "--model", tiny_folder, "--prompt", "dog", "--heads", tmp_path / "elsewhere", "--profile",
                       "--max-new-tokens", 9)
    assert "posterior" in medusa["stages"] and medusa["token_ids"] == plain["token_ids"]


def test_the_first_command_of_the_readme(cli):
    status, out, err = cli("generate", "--compare", "--profile", "--max-new-tokens", "60")
    assert status == 0 and err == "" and "identical: yes" in out
    plain, medusa = out.split("--- plain\n")[1].split("\n\n--- medusa\n")
    assert medusa.startswith(plain) and plain.startswith("Once upon a time")
    for stage in ("base_inference", "init", "medusa", "tree", "posterior", "update"):
        assert f"\n{stage} " in out


def test_the_embedded_heads_reach_the_promised_tokens_per_step(cli, monkeypatch, tmp_path):
    """Ten held-out openings, all in a batch by the tree for one prompt, the first one alone too."""
    monkeypatch.setattr("extras.compare.REPEATS", 1)
    openings = (ROOT / "benchmarks" / "openings.txt").read_text().splitlines()[:10]
    (tmp_path / "o.txt").write_text("\n".join(openings))
    options = ["--max-new-tokens", 200, "--threads", 1]
    batch = [*options, "--prompts-file", tmp_path / "o.txt", "--batch-size", 10]
    alone, = run_json(cli, *options, "--prompt", openings[0], "--compare")
    results = run_json(cli, *batch, "--tree", json.dumps(parse_tree(MODEL / "medusa" / "tree.json", "cpu")[0]))
    model, args = Llama.from_pretrained(MODEL), generate.arguments([])
    tokenizer = Tokenizer(MODEL, model.config)
    differences = [alone["first_difference"], *(
        first_difference(model, tokenizer.encode(ours["prompt"]), ours["token_ids"], plain["token_ids"], args, 0)
        for ours, plain in zip(results, run_json(cli, *batch, "--heads", "none"), strict=True))]
    assert all(difference is None or difference["margin"] < 1e-4 for difference in differences)
    assert alone["tokens_per_step"] == pytest.approx(results[0]["tokens_per_step"], abs=0.1)     # but for a near-tie
    mean = sum(r["tokens_per_step"] for r in results) / 10
    print(f"mean tokens per step over ten held-out openings: {mean:.3f}")
    assert mean >= 3.1


def test_the_embedded_model_and_both_sets_of_heads_are_small():
    files = [f for f in MODEL.rglob("*") if f.suffix in (".json", ".safetensors") and "pretrained" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 8e6


def test_the_report_names_the_tree(tiny_folder, cli):
    out = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 5)[1]
    assert "tree: 16 nodes, mc_sim_7b_63, published" in out


@pytest.mark.parametrize("engine", [[], ["--quantize", "int8"], ["--fast"], ["--fast", "--quantize", "int8"]], ids=str)
def test_context_overrules_the_configs(engine, tiny_folder, cli):
    """Shorter or longer than the 64 that the config says; the tokens that fit are the same."""
    write_json(tiny_folder / "generation_config.json", {"eos_token_id": None})
    found = {}
    for context in (24, None, 120):
        option = [] if context is None else ["--context", context]
        status, out, err = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 500,
                               "--threads", 1, "--json", *option, *engine)
        assert status == 0, err
        result = json.loads(out)
        found[context] = result["token_ids"]
        assert result["prompt_tokens"] + len(result["token_ids"]) == (context or 64)
    for context in (24, None):
        assert found[120][:len(found[context])] == found[context]
