"""generate.py --tune: its forecast is what decoding then does, and each mode of a machine has its own tree."""
import json

import pytest
import torch
from conftest import MODEL, save_heads, tiny_heads, tiny_llama

import generate
from extras import tune
from llama import Llama
from loading.files import write_json
from loading.heads import KINDS
from loading.trees import parse_tree
from tinymedusa import Tree


def run_json(cli, *args):
    status, out, err = cli("generate", "--json", *args)
    assert status == 0 and "Traceback" not in err, err
    return [json.loads(line) for line in out.splitlines()]


def with_good_heads(folder, kind="medusa"):
    """A model that often repeats a token, so that heads which repeat the base model are often right."""
    model = tiny_llama(dtype=torch.float32, std=0.3, tie_word_embeddings=True, vocab_size=300,
                       max_position_embeddings=64)
    model.save(folder)
    save_heads(tiny_heads(model, 3, kind=kind, noise=0.05), folder / "medusa", model)


@pytest.mark.parametrize("limits", [(), ("--top-k", 9), ("--top-p", 0.8)], ids=str)
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_the_forecast_at_a_temperature_is_within_3_percent(kind, limits, tiny_folder, tmp_path, cli, monkeypatch):
    """It simulates the noise that heads and base model share; by ranks without the noise it would read far less."""
    monkeypatch.setattr("extras.tune.step_seconds", lambda model, heads, trees, ids, args: [
        0.001 * (1 if tree is None else 1 + len(tree.paths) / 200) for tree in trees])
    monkeypatch.setattr("extras.tune.NODES", (12,))                              # one tree: the choice is tested below
    with_good_heads(tiny_folder, kind)
    openings = [f"the dog{' x' * (i % 9)} {i}" for i in range(300)]
    (tmp_path / "o.txt").write_text("\n".join(openings))
    options = ["--model", tiny_folder, "--temperature", 0.4, *limits, "--max-new-tokens", 40]
    status, _, err = cli("generate", *options, "--tune", tmp_path / "o.txt", "--threads", 1)
    assert status == 0, err
    tuned = json.loads((tiny_folder / "medusa" / "tree.json").read_text())["modes"]["cpu"]
    forecast = next(c["tokens_per_step"] for c in tuned["candidates"] if c == tuned["chosen"])
    results = run_json(cli, *options, "--prompts-file", tmp_path / "o.txt", "--batch-size", 300, "--seed", 1000)
    new, steps = (sum(r[key] for r in results) for key in ("new_tokens", "steps"))
    measured = (new - len(results)) / steps
    print(f"{kind} {limits}: forecast {forecast}, measured {measured:.4f}, {steps} steps")
    assert measured > 1.15 and abs(forecast / measured - 1) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_tune_forecasts_what_decoding_then_does(kind, tiny_folder, tmp_path, cli, monkeypatch):
    """Every second text forecasts the tree's tokens per step: decoding those openings must give that very figure.

    Times are made up, so that the choice is known: a node costs a hundredth of a plain step, then a whole one.
    """
    def a_node_costs(price):
        monkeypatch.setattr("extras.tune.step_seconds", lambda model, heads, trees, ids, args: [
            0.001 * (1 if tree is None else 1 + price * len(tree.paths)) for tree in trees])
    a_node_costs(0.01)
    with_good_heads(tiny_folder, kind)
    openings = [f"the dog{' x' * i}" for i in range(12)]
    (tmp_path / "o.txt").write_text("\n".join(openings))
    status, out, err = cli("generate", "--model", tiny_folder, "--tune", tmp_path / "o.txt", "--max-new-tokens", 30,
                           "--threads", 1)
    written = json.loads((tiny_folder / "medusa" / "tree.json").read_text())
    tuned = written["modes"]["cpu"]
    assert written["paths"] == tuned["paths"] and status == 0, err
    assert "<- best" in out and "root" in out and "plain decoding" in out
    fastest = max(c["tokens_per_second"] for c in tuned["candidates"])
    best = next(c for c in tuned["candidates"] if 1.03 * c["tokens_per_second"] >= fastest)
    assert best["nodes"] == min(c["nodes"] for c in tuned["candidates"] if 1.03 * c["tokens_per_second"] >= fastest)
    assert best == tuned["chosen"] and best["nodes"] == len(tuned["paths"]) + 1
    assert best["depth"] == max(map(len, tuned["paths"])) == (2 if kind == "hydra" else 3)
    assert best["tokens_per_second"] == pytest.approx(1000 * best["tokens_per_step"] / best["step_ms"], rel=1e-2)
    assert len(tuned["hits"]) == len(tuned["paths"]) and all(0 < share < 1 for share in tuned["hits"])
    assert {2, 3, 4, 6, 8} <= {c["nodes"] for c in tuned["candidates"]}
    arguments = [a for o in openings[1::2] for a in ("--prompt", o)]             # shortest first, every second one
    results = run_json(cli, "--model", tiny_folder, *arguments, "--max-new-tokens", 30)
    new, steps = (sum(r[key] for r in results) for key in ("new_tokens", "steps"))
    assert (new - len(results)) / steps == pytest.approx(best["tokens_per_step"], abs=1e-4)
    cost = f"a step of {best['nodes']} nodes costs {1 + 0.01 * best['nodes']:.2f} plain steps and yields " \
        f"{best['tokens_per_step']:.2f} tokens"
    where = tiny_folder / "medusa" / "tree.json"
    assert results[0]["tree"] == f"{best['nodes']} nodes, {where}: tuned for cpu: {cost}"
    result, = run_json(cli, "--model", tiny_folder, "--tune", tmp_path / "o.txt", "--tree", tmp_path / "t.json",
                       "--max-new-tokens", 30, "--temperature", 0.5)
    assert result["tree"] == str(tmp_path / "t.json") and json.loads((tmp_path / "t.json").read_text())["paths"]
    a_node_costs(1.0)                                                            # no tree yields a token a node
    told = cli("generate", "--model", tiny_folder, "--tune", tmp_path / "o.txt", "--max-new-tokens", 30,
               "--threads", 1)[1]
    assert "plain decoding: best\n" in told and "best tree" not in told and told.endswith(" tokens\nroot\n")
    assert "plain decoding is faster on cpu" in told
    args = ["--model", tiny_folder, "--prompt", "the dog", "--max-new-tokens", 30, "--profile"]
    result, = run_json(cli, *args)
    assert set(result["stages"]) == {"init", "base_inference"} and result["tokens_per_step"] == 1
    assert result["tree"].startswith(f"1 node, {where}: plain decoding is faster on cpu: a step of 2 nodes costs 3.00")
    forced, = run_json(cli, *args, "--tree", "[[0], [1]]")
    assert "tree" in forced["stages"] and forced["token_ids"] == result["token_ids"]


def test_the_tree_that_was_tuned_for_so_many_rows(tiny_folder, tmp_path, cli, monkeypatch):
    """--tune writes an entry a batch size; without one of that size the next smaller one counts."""
    sizes = []

    def costs(model, heads, trees, prompts, args):
        sizes.append(len(prompts))
        return [0.001 * (1 if tree is None else 1 + 0.004 * len(prompts) * len(tree.paths)) for tree in trees]
    monkeypatch.setattr("extras.tune.step_seconds", costs)
    with_good_heads(tiny_folder)
    (tmp_path / "o.txt").write_text("\n".join(f"the dog{' x' * i}" for i in range(12)))
    tune = ["--model", tiny_folder, "--tune", tmp_path / "o.txt", "--max-new-tokens", 30, "--threads", 1]
    tree = tiny_folder / "medusa" / "tree.json"
    for batch in (1, 8, 500):
        assert cli("generate", *tune, "--batch-size", batch)[0] == 0
        tree.write_text(json.dumps(json.loads(tree.read_text()) | {"source": "joint hits"}))
    modes = json.loads(tree.read_text())["modes"]
    assert sizes == [1, 8, 500] and list(modes) == ["cpu", "cpu batch 8", "cpu batch 500"]
    for name, batch in zip(modes, sizes, strict=True):
        for c in modes[name]["candidates"]:
            assert c["tokens_per_second"] == pytest.approx(1000 * batch * c["tokens_per_step"] / c["step_ms"], rel=1e-2)
    one, eight, many = (modes[name]["paths"] for name in modes)
    assert len(one) > len(eight) > 0 == len(many)
    for rows, paths in ((1, one), (7, one), (8, eight), (499, eight), (501, many)):
        assert parse_tree(tree, "cpu", rows)[0] == paths
    assert parse_tree(tree, "cuda", 8)[0] == one                             # not tuned: the file's own
    assert cli("generate", *tune, "--batch-size", 9)[0] == 0                     # leaves alone what else is in there
    assert json.loads(tree.read_text())["paths"] == one and json.loads(tree.read_text())["source"] == "joint hits"
    (tmp_path / "p.txt").write_text("dog\n" * 500)
    for batch, says in ((9, f"tree: {len(eight) + 1} nodes"), (500, "plain decoding is faster on cpu batch 500")):
        out = cli("generate", "--model", tiny_folder, "--prompts-file", tmp_path / "p.txt", "--batch-size", batch,
                  "--max-new-tokens", 3)[1]
        assert says in out
    (tmp_path / "p.txt").write_text("dog\n")                                     # fewer prompts than rows
    assert f"tree: {len(one) + 1} nodes" in cli("generate", "--model", tiny_folder, "--prompts-file",
                                                tmp_path / "p.txt", "--batch-size", 500, "--max-new-tokens", 3)[1]


def test_a_tree_for_each_temperature(tiny_folder, tmp_path, cli, monkeypatch):
    """--tune --temperature adds a tree; the nearest one is used and named, here and by a library user."""
    monkeypatch.setattr("extras.tune.step_seconds", lambda model, heads, trees, ids, args: [
        0.001 * (1 if tree is None else 1 + len(tree.paths) / 200) for tree in trees])
    monkeypatch.setattr("extras.tune.NODES", (2, 8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)                         # --threads auto, by default
    with_good_heads(tiny_folder)
    (tmp_path / "o.txt").write_text("\n".join(f"the dog{' x' * i}" for i in range(12)))
    tree = tiny_folder / "medusa" / "tree.json"
    def tune(temperature, *more):
        assert cli("generate", "--model", tiny_folder, "--tune", tmp_path / "o.txt", "--max-new-tokens", 30,
                   "--temperature", temperature, *more)[0] == 0
        return json.loads(tree.read_text())
    alone = tune(0.7)["modes"]["cpu"]
    assert alone["sampling"]["temperature"] == 0.7 and "temperatures" not in alone
    for near in (0.7, 0.2):                                                      # the only one, for another: named
        assert parse_tree(tree, "cpu", 1, near)[1].endswith("for temperature 0.7") is (near != 0.7)
    tune(0)
    eight = tune(0, "--batch-size", 8)["modes"]["cpu batch 8"]
    written = tune(1.5)
    entry = written["modes"]["cpu"]
    assert entry["sampling"]["temperature"] == 0 and list(entry["temperatures"]) == ["0.7", "1.5"]
    assert entry["temperatures"]["0.7"] == alone and written["modes"]["cpu batch 8"] == eight
    trees = {0.0: entry["paths"], 0.7: alone["paths"], 1.5: entry["temperatures"]["1.5"]["paths"]}
    assert len({json.dumps(paths) for paths in trees.values()}) == 3
    for temperature, nearest in ((0, 0.0), (0.3, 0.0), (0.4, 0.7), (1.0, 0.7), (1.2, 1.5), (9, 1.5)):
        for mode in ("cpu", "cuda"):                                             # not tuned: the file's own, as for cpu
            paths, remark = parse_tree(tree, mode, 1, temperature)
            assert paths == trees[nearest] and remark.endswith(f"for temperature {nearest}")
            assert remark.startswith("not tuned for cuda, " if mode == "cuda" else "tuned for cpu: ")
        assert parse_tree(tree, "cpu", 8, temperature)[0] == eight["paths"]
        result, = run_json(cli, "--model", tiny_folder, "--temperature", temperature, "--max-new-tokens", 2)
        assert result["tree"].startswith(f"{len(trees[nearest]) + 1} nodes, {tree}") and str(nearest) in result["tree"]
        found = Tree.from_pretrained(tiny_folder / "medusa", tiny_heads(tiny_llama(), 3), temperature)
        assert sorted(found.paths[1:]) == sorted(map(tuple, trees[nearest]))
    assert tune(0.7)["modes"]["cpu"]["temperatures"].keys() == {"0.7", "1.5"}
    of_training = {"paths": [[0]], "sampling": {"temperature": 0.0}, "temperatures": {
        "0.9": {"paths": [[0], [1]], "sampling": {"temperature": 0.9}}}}
    write_json(tree, of_training)
    kept = tune(0)
    assert kept["paths"] == kept["modes"]["cpu"]["paths"] and kept["temperatures"] == of_training["temperatures"]
    for damaged in ([], {"x": {}}, {"0.7": 3}, None):
        tree.write_text(json.dumps(written | {"modes": {}, "temperatures": damaged}))
        status, _, err = cli("generate", "--model", tiny_folder)
        assert status == 2 and "'temperatures' must be an object of objects by temperature" in err


def test_a_tree_for_each_mode(tmp_path):
    """The shipped file: a tree for one prompt, smaller ones for batches; a tree that is the root needs no heads."""
    model = Llama.from_pretrained(MODEL)

    def found(rows, *more):
        args = generate.arguments(["--heads", str(MODEL / "medusa"), "--batch-size", str(rows), *more])
        heads, tree, source = generate.heads_and_tree(args, model)
        return heads, len(tree.paths), source
    shipped = MODEL / "medusa" / "tree.json"
    nodes = []
    for rows, tuned_for in ((1, "cpu"), (3, "cpu"), (4, "cpu batch 4"), (15, "cpu batch 4"), (64, "cpu batch 16")):
        heads, found_nodes, source = found(rows)
        assert heads is not None and f"{shipped}: tuned for {tuned_for}: a step of {found_nodes} nodes" in source
        nodes.append(found_nodes)
    assert nodes[0] == 8 and nodes == sorted(nodes, reverse=True) and nodes[-1] < 8
    tuned = {"paths": [[0]], "modes": {"cpu": {"paths": [], "remark": "plain decoding is faster on cpu"},
                                       "cpu batch 4": {"paths": [[0], [1]]}, "cuda": {"paths": [[0], [0, 0]]}}}
    write_json(tmp_path / "t.json", tuned)
    given = "--tree", str(tmp_path / "t.json")
    assert found(3, *given) == (None, 1, f"{tmp_path / 't.json'}: plain decoding is faster on cpu")
    heads, nodes, source = found(4, *given)
    assert heads is not None and (nodes, source) == (3, str(tmp_path / "t.json"))


GOOD = {"paths": [[0]], "modes": {"cpu": {"paths": [[0]]}}}


@pytest.mark.parametrize("damaged", [
    [], [[0]], 5, "text", {"modes": {}}, {"hidden_size": 32},
    GOOD | {"temperatures": 3}, *(GOOD | {"modes": modes} for modes in (
        [], None, "text", 5, {"cpu": None}, {"cpu": []}, {"cpu": {"paths": [], "temperatures": []}},
        {"cpu": {"paths": [], "temperatures": {"x": {"paths": []}}}}))], ids=json.dumps)
def test_a_file_that_a_tree_cannot_be_added_to_is_refused_before_the_work(damaged, tiny_folder, tmp_path, cli,
                                                                          monkeypatch):
    monkeypatch.setattr("extras.tune.own_texts", lambda *a: pytest.fail("the work was begun"))
    file, openings = tmp_path / "t.json", tmp_path / "o.txt"
    openings.write_text("dog\ncat\n")
    for text in (json.dumps(damaged), json.dumps(damaged)[:-1] + "\xff"):
        file.write_text(text, encoding="latin-1")
        status, out, err = cli("generate", "--model", tiny_folder, "--tune", openings, "--tree", file)
        assert status == 2 and not out and err.count("\n") == 1 and str(file) in err, err
        assert file.read_text(encoding="latin-1") == text


def test_an_entry_without_a_tree_is_left_out(tiny_folder, tmp_path, cli, monkeypatch):
    monkeypatch.setattr("extras.tune.step_seconds", lambda model, heads, trees, ids, args: [0.001] * len(trees))
    with_good_heads(tiny_folder)
    (tmp_path / "o.txt").write_text("\n".join(f"the dog{' x' * i}" for i in range(12)))
    tree = tmp_path / "t.json"
    write_json(tree, GOOD | {"modes": {"cpu": {"temperatures": {"1.0": {}, "2.0": {"paths": [[5]]}}}, "cuda": {}}})
    assert cli("generate", "--model", tiny_folder, "--tune", tmp_path / "o.txt", "--tree", tree, "--max-new-tokens", 30,
               "--threads", 1)[0] == 0
    written = json.loads(tree.read_text())
    assert written["modes"].keys() == {"cpu", "cuda"} and list(written["modes"]["cpu"]["temperatures"]) == ["2.0"]
    assert written["paths"] == written["modes"]["cpu"]["paths"] != []
    assert written["temperatures"]["2.0"]["paths"] == [[5]]


def seconds_of(monkeypatch, *turns):
    """step_seconds of a plain step and two trees, whose turns take what is given, the last of them for ever."""
    taken = []

    def turn(model, heads, trees, prompts, args):
        taken.append(turns[min(len(taken), len(turns) - 1)])
        return taken[-1]
    monkeypatch.setattr("extras.tune.turn_seconds", turn)
    return tune.step_seconds(None, None, [None, 1, 2], [], None), len(taken)


def test_disturbed_timings_are_repeated_or_reported(monkeypatch, capsys):
    quiet, slower = [1.0, 1.2, 1.5], [2.0, 2.4, 3.0]
    says = lambda: capsys.readouterr().err.rpartition("\r")[2].rpartition("]")[2].strip()
    assert seconds_of(monkeypatch, quiet) == (quiet, 6) and not says()
    assert seconds_of(monkeypatch, [5, 1.2, 1.5], quiet) == (quiet, 6) and not says()         # one turn of six
    # a machine that is half as fast in some turns: each tree belongs to the plain step of its own turn
    assert seconds_of(monkeypatch, *[quiet, slower] * 2, slower) == (slower, 6) and not says()
    assert seconds_of(monkeypatch, *[[1.0, 1.2, 1.5], [2.0, 2.8, 3.2]] * 3)[0] == [2.0, 2.8, 3.2]
    plain, tree = [5, 1.2, 1.5], [1, 9, 1.5]
    assert seconds_of(monkeypatch, *[plain] * 3, quiet) == (quiet, 12) and not says()
    assert seconds_of(monkeypatch, tree, tree, quiet, tree, tree, quiet) == (quiet, 18) and not says()
    found, turns = seconds_of(monkeypatch, plain)                                # steady, and still impossible
    assert found == pytest.approx(plain) and turns == 18
    assert says() == ("--tune: something else runs on this machine: a tree's step took 1.0 times as many plain steps "
                      "in some turns as in others, and one 0.24 plain steps; try again when it is quiet")
    found, turns = seconds_of(monkeypatch, *[quiet, [1, 4, 5]] * 9)
    assert turns == 18 and found[0] == 1 and "took 3.3 times as many plain steps" in says()


def test_a_turn_times_each_tree_though_its_text_ends_at_once():
    """Random heads and a model that ends its text with any token."""
    model = tiny_llama(dtype=torch.float32, eos_token_id=list(range(12)))
    args = generate.arguments([])
    found = tune.turn_seconds(model, tiny_heads(model), [None, Tree.from_paths([[0]])], [[1, 5]], args)
    assert len(found) == 2 and all(0 < seconds < 1 for seconds in found)
