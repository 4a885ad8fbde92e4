"""Which engine runs a model, and --fast in the commands: the same text by the engine, or one line that says why not."""
import json
from itertools import islice

import pytest
import torch
from conftest import save_heads, tiny_heads, tiny_llama

import generate
from extras.command_line import ArgumentParser
from fast import build, engines, graphs
from fast.graphs import GraphDecoder, GraphLookupDecoder, GraphPlainDecoder
from fast.int8 import Int8Linear
from fast.native import NativeDecoder, NativeLlama, NativeLookupDecoder
from llama import Llama
from loading.files import read_json, write_json
from loading.heads import KINDS
from tinymedusa import GREEDY, Decoder, PlainDecoder, Sampling, Stages, Tree
from variants import batches
from variants.heads import load_heads
from variants.lookup import Lookup, LookupDecoder
from variants.penalty import penalize
from variants.typical import Typical

TREE = Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])
NO_COMPILER = ("--fast: there is no C++ compiler here: install c++, clang++, g++, or name one in CXX; "
               "going on in plain torch\n")


@pytest.fixture
def folder(tiny_folder, monkeypatch):
    """The tiny model with heads of every kind, prompts and openings, and constants by which --tune is quick."""
    model = Llama.from_pretrained(tiny_folder)
    for kind in KINDS:
        save_heads(tiny_heads(model, 3, noise=0.05, kind=kind, tie_lm_head=kind != "medusa"), tiny_folder / kind, model)
    (tiny_folder / "p.txt").write_text("dog\nonce\na cat\n")
    (tiny_folder / "o.txt").write_text("\n".join(f"the dog{' x' * i}" for i in range(8)))
    for name, value in (("tune.ROUNDS", 1), ("tune.STEPS", 2), ("tune.NODES", (2, 4)), ("compare.REPEATS", 1)):
        monkeypatch.setattr(f"extras.{name}", value)
    return tiny_folder


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr("fast.native.library", build.library.__wrapped__)        # which remembers what it has loaded
    monkeypatch.setenv("CXX", "/nonexistent")


def tokens(decoder, prompts=([1, 5, 9], [1, 7]), new_tokens=30):
    rows = [[] for _ in prompts]
    for step in islice(decoder.generate(list(prompts), new_tokens), new_tokens + 1):        # if it never ends, too many
        for row, ids in zip(rows, step, strict=True):
            row += ids
    return rows


# -------------------------------------------------------------------------------------------------------- engines.py

def test_the_model_and_decoder_of_each_engine(tiny_folder, monkeypatch):
    torchs, int8s = engines.load(tiny_folder), engines.load(tiny_folder, quantize="int8")
    fast = engines.load(tiny_folder, torch.bfloat16, fast=True)
    assert type(torchs) is Llama and isinstance(int8s.lm_head, Int8Linear) and type(fast) is NativeLlama
    small = engines.load(tiny_folder, quantize="int8", fast=True)
    assert torch.equal(fast.embed_tokens(torch.arange(300)), torchs.embed_tokens.weight.bfloat16().float())
    assert torch.equal(small.embed_tokens(torch.arange(300)), torchs.embed_tokens.weight)
    assert torch.equal(small.lm_head.weight, int8s.lm_head.weight)
    assert [engines.mode(m) for m in (torchs, int8s, fast, small)] == ["cpu", "cpu", "cpu fast", "cpu fast"]
    heads, lookup = load_heads(tiny_folder / "medusa", torchs), Lookup(torchs.config)
    chain = Tree.from_paths(Lookup.chain)
    for model, plain, medusa, by_lookup in ((torchs, PlainDecoder, Decoder, LookupDecoder),
                                            (fast, NativeDecoder, NativeDecoder, NativeLookupDecoder)):
        assert type(engines.decoder(model)) is plain and type(engines.decoder(model, heads, TREE)) is medusa
        assert type(engines.decoder(model, lookup, chain)) is by_lookup
    torchs.graphs = True                                                         # as on a GPU
    assert type(engines.decoder(torchs, heads, TREE)) is GraphDecoder and engines.mode(torchs) == "cpu fast"
    assert type(engines.decoder(torchs, lookup, chain)) is GraphLookupDecoder
    assert type(engines.decoder(torchs)) is GraphPlainDecoder


def test_a_decoder_gets_what_it_is_given(tiny_folder):
    for model in (engines.load(tiny_folder), engines.load(tiny_folder, fast=True)):
        heads, clock = load_heads(tiny_folder / "medusa", model), Stages("cpu")
        decoder = engines.decoder(model, heads, TREE, Sampling(0.7), (4, 5), clock)
        assert decoder.model is model and decoder.heads is heads and decoder.tree.paths == TREE.paths
        assert decoder.sampling == Sampling(0.7) and decoder.eos.tolist() == [4, 5] and decoder.run is clock
        assert engines.decoder(model).eos.tolist() == [2] and engines.decoder(model).sampling == GREEDY


def test_tokens_of_both_engines(tiny_folder):
    for quantize in (None, "int8"):
        found = []
        for fast in (False, True):
            model = engines.load(tiny_folder, quantize=quantize, fast=fast)
            heads = load_heads(tiny_folder / "medusa", model)
            lookup, chain = Lookup(model.config), Tree.from_paths(Lookup.chain)
            for sampling in (GREEDY, Sampling(0.8)):
                found.append([tokens(engines.decoder(model, sampling=sampling)),
                              tokens(engines.decoder(model, heads, TREE, sampling)),
                              tokens(engines.decoder(model, lookup, chain, sampling))])
        assert found[:2] == found[2:] and found[0] != found[1]
        assert all(texts == some[0] for some in found for texts in some)


def test_threads_of_both_engines(tiny_folder, monkeypatch):
    model, asked, before = engines.load(tiny_folder, fast=True), [], torch.get_num_threads()
    expected = tokens(engines.decoder(model))
    monkeypatch.setattr(model, "set_threads", lambda n: asked.append(n) or NativeLlama.set_threads(model, n))
    try:
        for threads in (2, 1, 3, 1):
            engines.set_threads(model, threads)
            assert torch.get_num_threads() == threads and tokens(engines.decoder(model)) == expected
        assert asked == [2, 1, 3, 1]
        engines.set_threads(engines.load(tiny_folder), 2)
        assert torch.get_num_threads() == 2 and len(asked) == 4
    finally:
        torch.set_num_threads(before)


def test_an_engine_that_cannot_be_had_is_one_line_and_torch_goes_on(tiny_folder, no_compiler, capfd, tmp_path):
    model = engines.load(tiny_folder, torch.bfloat16, fast=True)
    assert type(model) is Llama and model.norm.weight.dtype == torch.bfloat16 and engines.mode(model) == "cpu"
    assert capfd.readouterr() == ("", NO_COMPILER)
    assert isinstance(engines.load(tiny_folder, quantize="int8", fast=True).lm_head, Int8Linear)
    assert capfd.readouterr() == ("", NO_COMPILER)
    engines.load(tiny_folder)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_the_engine_cannot_run(tmp_path, capfd):
    tiny_llama(dtype=torch.float32, head_dim=258).save(tmp_path)
    assert type(engines.load(tmp_path, fast=True)) is Llama
    assert capfd.readouterr() == (
        "", "--fast: head_dim is 258, the C++ step's limit is 256; going on in plain torch\n")
    tiny_llama().save(tmp_path)                                                  # in float64, which is asked for or not
    assert type(engines.load(tmp_path, fast=True)) is NativeLlama
    assert type(engines.load(tmp_path, torch.float64, fast=True)) is Llama
    assert capfd.readouterr() == ("", IN_TORCH["--dtype float64"])


# ------------------------------------------------------------------------------------------------- generate.py --fast

# every option of generate.py → what to try it with beside --fast; {} is the folder where everything is
TRIED = {
    "--model": ["--model {}"],
    "--heads": ["--heads none", "--heads lookup", *(f"--heads {{}}/{kind}" for kind in KINDS)],
    "--revision": ["--revision main"],
    "--prompt": ["--prompt once --prompt dog"],
    "--prompts-file": ["--prompts-file {}/p.txt", "--prompts-file {}/p.txt --temperature 0.9 --profile"],
    "--batch-size": ["--batch-size 2 --prompts-file {}/p.txt", "--batch-size 2 --prompts-file {}/p.txt --heads lookup"],
    "--context": ["--context 60"],
    "--max-new-tokens": ["--max-new-tokens 1", "--max-new-tokens 300"],
    "--max-steps": ["--max-steps 2"],
    "--stop": ["--stop e --stop xyz", "--temperature 2 --stop e --stop a --stop o"],
    "--ignore-eos": ["--ignore-eos"],
    "--temperature": ["--temperature 0.9", "--temperature 0.9 --heads lookup", "--temperature 0.9 --heads {}/hydra"],
    "--acceptance": ["--acceptance typical --temperature 0.8", "--acceptance typical"],
    "--epsilon": ["--temperature 2 --acceptance typical --epsilon 1e-9"],
    "--delta": ["--temperature 2 --acceptance typical --delta 1e-9"],
    "--top-k": ["--top-k 5 --temperature 2"],
    "--top-p": ["--top-p 0.5 --temperature 2", "--top-p 0.9 --top-k 20 --temperature 2"],
    "--min-p": ["--min-p 0.3 --temperature 2", "--min-p 0.02 --top-p 0.9 --top-k 40 --temperature 2"],
    "--repetition-penalty": ["--repetition-penalty 1.5 --compare", "--repetition-penalty 1.3 --temperature 0.9"],
    "--seed": ["--seed 7 --temperature 2", "--seed 9223372036854775807 --temperature 2"],
    "--samples": ["--samples 3 --temperature 2", "--samples 2 --prompts-file {}/p.txt --temperature 1 --batch-size 4"],
    "--tune": ["--tune {}/o.txt --tree {}/tuned.json", "--tune {}/o.txt --tree {}/tuned.json --batch-size 2"],
    "--tree": ["--tree [[0],[1],[0,0]]", "--tree []"],
    "--dtype": ["--dtype float32", "--dtype bfloat16", "--dtype float16", "--dtype float64"],
    "--quantize": ["--quantize int8", "--quantize int8 --temperature 0.8 --heads {}/root"],
    "--device": ["--device cpu"],
    "--threads": ["--threads auto", "--threads 2"],
    "--fast": ["--fast"],
    "--compile": ["--compile"],
    "--compare": ["--compare", "--compare --temperature 0.9"],
    "--profile": ["--profile", "--profile --heads none"],
    "--explain": ["--explain 2"],
    "--html": ["--html {}/page.html"],
    "--trace": ["--trace {}/trace.json"],
    "--show-accepted": ["--show-accepted"],
    "--interactive": ["--interactive", "--interactive --temperature 0.9 --profile", "--interactive --heads lookup"],
    "--multiline": ["--multiline --interactive"],
    "--chat": ["--chat --template vicuna --system S"],
    "--template": ["--template plain", "--template vicuna --system S"],
    "--system": ["--system S --template vicuna"],
    "--json": ["--json"],
}
REFUSED = {"--compile": "--compile is gone: give --fast", "--explain 2": "--fast does not go with --explain",
           "--html {}/page.html": "--fast does not go with --html",
           "--trace {}/trace.json": "--fast does not go with --trace"}
IN_TORCH = {"--dtype float64": "--fast: the C++ step has no float64; going on in plain torch\n"}
OTHER_ROUNDING = ("--dtype bfloat16", "--dtype float16")        # torch also rounds what the weights are multiplied with


def options_of_the_parser(monkeypatch) -> list:
    parsers = []
    monkeypatch.setattr(generate, "ArgumentParser", lambda **k: parsers.append(ArgumentParser(**k)) or parsers[-1])
    generate.arguments([])
    return [action.option_strings[-1] for action in parsers[0]._actions]


def test_every_option_is_tried(monkeypatch):
    """So that a new one is listed here."""
    assert sorted(options_of_the_parser(monkeypatch)) == sorted(["--help", *TRIED])
    assert all(option in arguments.split() for option, some in TRIED.items() for arguments in some)


def typing():
    """What input() returns: a line, then no more."""
    lines = iter(["the dog"])

    def read(label=""):
        for line in lines:
            return line
        raise EOFError
    return read


def shown(out: str, arguments: str):
    """What has been written, without what differs from run to run."""
    if "--interactive" in arguments:
        assert out.endswith("exit...\n") and out.count(" tokens/step]\n") == 1
        return out.partition("\n[")[0]
    results = [json.loads(line) for line in out.splitlines()]
    assert results and all(r["new_tokens"] == len(r["token_ids"]) for r in results)
    return [(r["prompt"], r["token_ids"], r["text"], set(r["stages"]), r.get("identical")) for r in results]


def arguments_of(folder, arguments: str) -> list:
    flags = [] if "--interactive" in arguments or "--explain" in arguments else ["--json"]
    given = arguments.format(folder, folder).split()
    return ["--model", folder, "--threads", 1, "--max-new-tokens", 12, *flags, *given]


@pytest.mark.parametrize("option", TRIED)
def test_every_option_writes_the_same_or_is_refused_in_one_line(option, folder, cli, monkeypatch):
    for arguments in TRIED[option]:
        given, results = arguments_of(folder, arguments), []
        for fast in ([], ["--fast"]):
            monkeypatch.setattr("builtins.input", typing())
            results.append(cli("generate", *given, *fast))
        (expected_status, expected, _), (status, out, err) = results
        if arguments in REFUSED:
            assert (status, out, err.count("\n")) == (2, "", 1) and REFUSED[arguments] in err, err
            continue
        assert (status, expected_status) == (0, 0) and "Traceback" not in err, err
        assert err.count("--fast") == (arguments in IN_TORCH) and IN_TORCH.get(arguments, "") in err, err
        if option == "--tune":
            assert json.loads(out)["mode"] == json.loads(expected)["mode"].replace("cpu", "cpu fast")
            continue
        ours, theirs = shown(out, arguments), shown(expected, arguments)
        if arguments in OTHER_ROUNDING:
            theirs = shown(cli("generate", *given, "--fast", "--heads", "none")[1], arguments)
        assert ours == theirs, arguments


@pytest.mark.parametrize("heads", ["none", "lookup", *KINDS])
def test_texts_of_a_batch_by_all_kinds_of_heads(heads, folder, cli):
    """Drawn, in 8 bits and not: the engine's are torch's."""
    drawn = "--prompts-file {}/p.txt --batch-size 2 --samples 2 --temperature 0.9 --max-new-tokens 30"
    given = [*arguments_of(folder, drawn), "--heads", folder / heads if heads in KINDS else heads]
    for quantize in ([], ["--quantize", "int8"]):
        (_, expected, _), (status, out, err) = (cli("generate", *given, *quantize, *fast) for fast in ([], ["--fast"]))
        ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in (out, expected))
        assert status == 0 and len(ours) == 6, err
        assert [r["token_ids"] for r in ours] == [r["token_ids"] for r in theirs]
        accepted = [sum(sum(r["accepted"][1:]) for r in results) for results in (ours, theirs)]
        assert abs(accepted[0] - accepted[1]) <= 2                               # the engine's heads are in bfloat16
        assert heads in ("none", "lookup") or accepted[0] > 2


def test_the_engine_really_runs(folder, cli, monkeypatch):
    """Else all of this would compare torch with torch."""
    steps, step = [], NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, *args: steps.append(self.plain) or step(self, *args))
    monkeypatch.setattr(Llama, "forward", None)
    status, out, err = cli("generate", *arguments_of(folder, "--fast --compare"))
    assert status == 0 and json.loads(out)["identical"] and set(steps) == {True, False}, err


def test_a_tuned_tree_is_found_by_the_engine_it_was_tuned_for(folder, cli):
    for fast in ([], ["--fast"]):
        status, _, err = cli("generate", *arguments_of(folder, "--tune {}/o.txt"), *fast)
        assert status == 0, err
    found = read_json(folder / "medusa" / "tree.json")
    assert list(found["modes"]) == ["cpu", "cpu fast"]
    trees = {"cpu": [[0], [1], [2]], "cpu fast": [[0]]}
    for mode, paths in trees.items():
        found["modes"][mode]["paths"] = paths
    write_json(folder / "medusa" / "tree.json", found)
    for mode, fast in (("cpu", []), ("cpu fast", ["--fast"])):
        result = json.loads(cli("generate", *arguments_of(folder, "--prompt dog"), *fast)[1])
        assert result["tree"].startswith(f"{len(trees[mode]) + 1} nodes")


@pytest.mark.parametrize("arguments", ["", "--quantize int8 --temperature 0.9", "--heads lookup", "--interactive",
                                       "--prompts-file {}/p.txt --batch-size 3", "--compare --profile"])
def test_without_a_compiler_the_text_is_the_same(arguments, folder, cli, no_compiler, monkeypatch):
    results = []
    for fast in ([], ["--fast"]):
        monkeypatch.setattr("builtins.input", typing())
        results.append(cli("generate", *arguments_of(folder, arguments), *fast))
    (_, expected, others), (status, out, err) = results
    assert status == 0 and shown(out, arguments) == shown(expected, arguments)
    assert err.count(NO_COMPILER) == 1 and err.count("--fast") == 1
    assert err.startswith(NO_COMPILER) and (err.count("\n") == 1 or "--prompts-file" in arguments)


# --------------------------------------------------------------------------------------------- prepare_data.py --fast

@pytest.mark.parametrize("arguments", [
    "--openings {}/o.txt", "--openings {}/o.txt --temperature 0.9 --seed 3 --heads {}/root",
    "--text {}/s.txt --distill --batch-size 2", "--sharegpt {}/c.json --distill --temperature 0.7"])
def test_distilled_files_are_the_same(arguments, folder, cli):
    (folder / "s.txt").write_text("\n<|endoftext|>\n".join(f"The dog {'is ' * i}here. It ran." for i in range(6)))
    talks = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "Yes."}] for i in range(6)]
    write_json(folder / "c.json", [{"id": str(i), "conversations": talk} for i, talk in enumerate(talks)])
    write_json(folder / "config.json", read_json(folder / "config.json") | {"max_position_embeddings": 400})
    files = []
    for name, fast in (("torch", []), ("fast", ["--fast"])):
        out = folder / name / "out.bin"
        out.parent.mkdir()
        status, _, err = cli("prepare_data", "--model", folder, *arguments.format(*[folder] * 2).split(), "--out", out,
                             "--max-new-tokens", 20, "--threads", 1, *fast)
        assert status == 0, err
        files.append({file.name: file.read_bytes() for file in out.parent.iterdir()})
    assert files[0] == files[1] and len(files[0]) >= 4 and len(files[0]["out.bin"]) > 2 * 6 * 15


def test_fast_is_for_text_that_the_model_writes(folder, cli):
    (folder / "s.txt").write_text("A dog.")
    given = ["--model", folder, "--text", folder / "s.txt", "--out", folder / "o.bin"]
    status, out, err = cli("prepare_data", *given, "--fast")
    assert (status, out, err.count("\n")) == (2, "", 1) and "--fast are for text that the model writes" in err


# --------------------------------------------------------------------------------------------------- graphs.py, without

def graph_decoder(sampling=GREEDY, run=None, **options):
    model = tiny_llama(vocab_size=40, std=0.3, max_position_embeddings=700)
    heads = tiny_heads(model, noise=0.05, **options)
    return [kind(model, heads, TREE, sampling, (2,), *([run] if run else [])) for kind in (GraphDecoder, Decoder)]


@pytest.mark.parametrize("sampling, options", [
    (GREEDY, {}), (Sampling(0.8), {"kind": "hydra", "recent": 3}), (Sampling(1.0, 9), {"kind": "root", "trunk": 9})],
    ids=str)
def test_a_replayed_step_writes_the_decoders_tokens(sampling, options, recordings, monkeypatch):
    """Over several windows, each recorded once; generations one after the other, in the same memory where it fits."""
    monkeypatch.setattr(graphs, "WINDOW", 64)
    graph, decoder = graph_decoder(sampling, **options)
    graph.eos = decoder.eos = decoder.eos[:0]
    windows, step = set(), graph.step
    graph.step = lambda state, window, run: windows.add(window) or step(state, window, run)
    for prompts in ([[1, 5, 9], [1, *range(30)]], [[1, 8], [1, *range(3, 32)]], [[1, 7]]):
        again = len(recordings) > 0 and len(prompts) == 2
        windows.clear()
        recordings.clear()
        assert tokens(graph, prompts, 150) == tokens(decoder, prompts, 150)
        assert len(windows) > 2 and len(recordings) == (0 if again else len(windows))


def test_plain_decoding_and_prompt_lookup_are_replayed_too(recordings):
    graph, decoder = graph_decoder()
    lookup, chain = Lookup(graph.model.config), Tree.from_paths(Lookup.chain)
    penalized = GraphDecoder(graph.model, graph.heads, TREE)
    for decoder in (GraphPlainDecoder(graph.model, Sampling(0.8)), GraphLookupDecoder(graph.model, lookup, chain),
                    penalized):
        expected = PlainDecoder(graph.model, decoder.sampling)
        if decoder is penalized:
            penalize(decoder, 1.3), penalize(expected, 1.3)
        recordings.clear()
        for prompts in ([[1, 5, 9], [1, 7]], [[1, 8], [1, 9, 4]]):
            assert tokens(decoder, prompts, 60) == tokens(expected, prompts, 60) and len(recordings) == 1


@pytest.mark.parametrize("name, value", [
    ("accept", Typical(1e-9, 1e-9)), ("eos", torch.tensor([25])), ("sampling", Sampling(2.0)),
    ("sampling", GREEDY), ("tree", Tree.from_paths([[0], [1], [2], [3], [4]])), ("heads", None)],
    ids="accept eos sampling greedy tree heads".split())
def test_what_is_replaced_after_a_recording_counts(name, value, recordings):
    found = []
    for decoder in graph_decoder(Sampling(0.9)):
        first = tokens(decoder)
        setattr(decoder, name, tiny_heads(decoder.model, noise=0.5, seed=7) if name == "heads" else value)
        steps = list(decoder.generate([[1, 5, 9], [1, 7]], 30))
        found.append((first, steps))
    assert found[0] == found[1] and len(recordings) == 2


@torch.inference_mode()
def test_memory_that_somebody_holds_is_not_given_away(recordings):
    graph, _ = graph_decoder()
    held = graph.new_cache([[1]], 20)
    other = graph.new_cache([[1]], 20)
    assert held.data_ptr() != other.data_ptr()
    at = other.data_ptr()
    other[:] = torch.nan
    del other
    again = graph.new_cache([[1, 2]], 20)
    assert again.data_ptr() == at and not again.any()
    del again
    assert graph.new_cache([[1], [2]], 20).shape[1] == 2 and graph.new_cache([[1]], 300).shape[2] > held.shape[2]


def test_a_batch_whose_rows_change_is_recorded_once(recordings):
    graph, decoder = graph_decoder(Sampling(0.9))
    prompts = [[1, 3 + i] for i in range(12)]
    for _ in batches.generate(graph, prompts, 20, batch_size=2):
        pass
    assert len(recordings) <= 2                             # a second one when one row is left


def test_replayed_steps_in_batches_and_generations_that_alternate(recordings):
    graph, decoder = graph_decoder(Sampling(0.9))
    prompts = [[1, 3 + i, *[5] * (i * 7 % 40)] for i in range(9)]
    for batch_size in (1, 3):
        found = []
        for each in (graph, decoder):
            rows = [[] for _ in prompts]
            for step in batches.generate(each, prompts, 25, batch_size=batch_size):
                for i, ids in step.items():
                    rows[i] += ids
            found.append(rows)
        assert found[0] == found[1]
    first, second = graph.generate([[1, 5]], 20), graph.generate([[1, 9]], 20)
    rows = [[], []]
    for _ in range(21):
        for row, steps in zip(rows, (first, second), strict=True):
            row += next(steps, [[]])[0]
    assert rows == [tokens(decoder, [[1, 5]], 20)[0], tokens(decoder, [[1, 9]], 20)[0]] and recordings


def test_steps_that_are_watched_or_look_at_numbers_are_not_recorded(recordings):
    clock = Stages("cpu")
    for sampling, run in ((GREEDY, clock), (Sampling(1.0, 0, 0.9), None)):
        graph, decoder = graph_decoder(sampling, run)
        found = tokens(graph, new_tokens=40)
        decoder.run = Decoder(decoder.model, decoder.heads, TREE).run
        assert found == tokens(decoder, new_tokens=40) and not recordings
    calls = {name: len(times) for name, times in clock.seconds.items()}
    assert calls["medusa"] == calls["tree"] == calls["posterior"] == calls["update"] > 10 and calls["init"] == 1


def test_a_watched_generation_between_others(recordings):
    graph, decoder = graph_decoder(Sampling(0.8))
    expected, run = tokens(decoder), graph.run
    assert tokens(graph) == expected
    graph.run = Stages("cpu")
    assert tokens(graph) == expected
    graph.run = run
    assert tokens(graph) == expected and len(recordings) == 1


def test_the_window_grows_in_large_steps():
    graph, _ = graph_decoder()
    cache = graph.new_cache([[1]], 600)
    slots = cache.shape[2]
    assert [graph.window(used, cache) for used in (1, 256, 257, 512, 513, slots)] == [256, 256, 512, 512, slots, slots]
