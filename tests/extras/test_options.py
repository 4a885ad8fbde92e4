"""Every option of generate.py with plain decoding and each kind of heads, in full precision and in int8: it works, or
it is refused in one line."""
import json
from argparse import ArgumentTypeError
from itertools import chain

import pytest
import torch
from conftest import byte_tokenizer, save_heads, tiny_heads, tiny_llama

import generate
from extras.command_line import ArgumentParser
from extras.options import APART, generate_options, prepare_options, train_options
from loading.heads import KINDS

# every option → the arguments to try it with (in int8 the first of them); {} is the folder where everything is
TRIED = {
    "--model": ["--model {}"],
    "--heads": ["--heads none", "--heads {}/root", "--heads lookup", "--heads {}/nowhere"],
    "--revision": ["--revision main"],
    "--prompt": ["--prompt once", "--prompt dog --prompt cat"],
    "--prompts-file": ["--prompts-file {}/p.txt --temperature 0.9 --profile"],
    "--batch-size": ["--batch-size 2 --prompts-file {}/p.txt", "--batch-size 2"],
    "--context": ["--context 60", "--context 0"],
    "--max-new-tokens": ["--max-new-tokens 2", "--max-new-tokens 1"],
    "--max-steps": ["--max-steps 2"],
    "--stop": ["--stop e --stop xyz", "--temperature 2 --stop e --stop a --stop o"],
    "--ignore-eos": ["--ignore-eos"],
    "--temperature": ["--temperature 0.9"],
    "--acceptance": ["--acceptance match --temperature 2", "--acceptance typical"],
    "--epsilon": ["--temperature 3 --acceptance typical --epsilon 1e-9"],
    "--delta": ["--temperature 3 --acceptance typical --delta 1e-9"],
    "--top-k": ["--top-k 5 --temperature 2"],
    "--top-p": ["--top-p 0.5 --temperature 2"],
    "--min-p": ["--min-p 0.3 --temperature 2", "--min-p 0.02 --top-p 0.9 --top-k 40 --temperature 2"],
    "--repetition-penalty": ["--repetition-penalty 1.5 --compare", "--repetition-penalty 1.3 --temperature 0.9"],
    "--seed": ["--seed 7 --temperature 2", "--seed 9223372036854775807 --temperature 2", "--seed 9223372036854775808"],
    "--samples": ["--samples 2 --temperature 2", "--samples 2 --prompts-file {}/p.txt --temperature 1", "--samples 2",
                  "--samples 3 --batch-size 2 --temperature 2"],
    "--tune": ["--tune {}/o.txt --tree {}/tuned.json", "--tune {}/o.txt --tree {}/tuned.json --batch-size 2"],
    "--tree": ["--tree [[0],[1],[0,0]]", "--tree []", "--tree {}/nowhere.json"],
    "--dtype": ["--dtype bfloat16", "--dtype float64", "--dtype float32", "--dtype float16"],
    "--quantize": ["--quantize int8"],
    "--device": ["--device cpu", "--device nowhere"],
    "--threads": ["--threads auto"],
    "--fast": ["--fast"],
    "--compile": ["--compile"],
    "--compare": ["--compare"],
    "--profile": ["--profile"],
    "--explain": ["--explain 2", "--explain 2 --temperature 0.9"],
    "--html": ["--html {}/page.html"],
    "--trace": ["--trace {}/trace.json"],
    "--show-accepted": ["--show-accepted"],
    "--interactive": ["--interactive", "--interactive --temperature 0.9 --template vicuna --profile"],
    "--multiline": ["--multiline --interactive"],
    "--chat": ["--chat --template vicuna", "--chat"],
    "--template": ["--template vicuna", "--template plain", "--template auto", "--template model"],
    "--system": ["--system S --template vicuna", "--system S"],
    "--json": ["--json"],
}
REFUSED = {
    "--heads {}/nowhere": "nowhere is not a folder", "--batch-size 2": "--batch-size needs --prompts-file (or --tune)",
    "--samples 2": "add --temperature", "--context 0": "--context: '0' is not a whole number from 1 to 4194304",
    "--seed 9223372036854775808": "--seed: '9223372036854775808' is not a whole number",
    "--device nowhere": "--device: 'nowhere' can't be used here", "--compile": "--compile is gone: give --fast",
    "--system S": "--system needs a chat model", "--chat": "--chat needs a chat model",
    "--template model": "has no chat template of its own", "--tree {}/nowhere.json": "can't read the tree"}
FAST_REFUSED = dict.fromkeys(TRIED["--explain"] + TRIED["--html"] + TRIED["--trace"], "--fast does not go with --")
PLAIN_REFUSED = {
    **dict.fromkeys(TRIED["--tree"] + TRIED["--tune"], "needs heads: give --heads FOLDER"),
    **dict.fromkeys(TRIED["--explain"], "--explain shows trees, and this is plain decoding: give --heads")}
LOOKUP_REFUSED = {
    "--tree [[0],[1],[0,0]]": "path [1] has rank 1, the vocabulary only 1 entries",
    **dict.fromkeys(TRIED["--tune"], "prompt lookup drafts a chain")}
ROUNDED = ("--dtype bfloat16", "--dtype float16")       # where a tree's logits differ from a single token's
MEDUSA = {"init", "medusa", "tree", "posterior", "update"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, heads of every kind for it, the files of `TRIED`, and constants by which all of it is quick."""
    model = tiny_llama(dtype=torch.float32, std=0.3, tie_word_embeddings=True, vocab_size=300,
                       max_position_embeddings=256)
    model.save(tmp_path)
    byte_tokenizer(tmp_path / "tokenizer.json")
    for kind in KINDS:
        save_heads(tiny_heads(model, 3, noise=0.05, kind=kind), tmp_path / kind, model)
    (tmp_path / "p.txt").write_text("dog\nonce\na cat\n")
    (tmp_path / "o.txt").write_text("\n".join(f"the dog{' x' * i}" for i in range(8)))
    for name, value in (("tune.ROUNDS", 1), ("tune.STEPS", 2), ("tune.NODES", (2, 4)), ("compare.REPEATS", 1)):
        monkeypatch.setattr(f"extras.{name}", value)
    return tmp_path


def one_message():
    """What input() returns: a line, then no more. With --multiline too that is one message."""
    lines = iter(["the dog"])

    def typing(label=""):
        for line in lines:
            return line
        raise EOFError
    return typing


def written(arguments: str, out: str, medusa: bool):
    """What has been written, to compare with plain decoding; and all that an option is to show is there."""
    if "--interactive" in arguments:
        assert out.endswith("exit...\n") and out.count(" tokens/step]\n") == 1
        return out.partition("\n[")[0]
    if "--explain" in arguments:
        assert "\nstep 2: the cache holds " in out and "\nstep 3" not in out
        return None
    results = [json.loads(line) for line in out.splitlines()]
    if "--tune" in arguments:
        modes = [r["mode"].replace(" fast", "") for r in results]
        assert modes == ["cpu batch 2" if "--batch-size" in arguments else "cpu"]
        return None
    for result in results:
        assert ("tree" in result) == medusa
        if "--profile" in arguments and "--prompts-file" not in arguments:
            assert set(result["stages"]) == (MEDUSA if medusa else {"init", "base_inference"})
        assert ("baseline" in result) == ("--compare" in arguments) and result.get("identical", True)
    return [(r["prompt"], r["token_ids"], r["text"]) for r in results]


@pytest.mark.parametrize("mode", [[], ["--quantize", "int8"], ["--fast"], ["--fast", "--quantize", "int8"]], ids=str)
def test_every_option_works_or_is_refused_in_one_line(mode, folder, cli, monkeypatch):
    plain = {}                                          # arguments → what plain decoding writes
    for heads in ("none", "lookup", *KINDS):
        for arguments in chain.from_iterable(some[:1] if "int8" in mode else some for some in TRIED.values()):
            monkeypatch.setattr("builtins.input", one_message())
            at_first = ["--model", folder, "--heads", folder / heads if heads in KINDS else heads, "--threads", 1,
                        "--max-new-tokens", 6, *mode]
            if not {"--interactive", "--explain"} & set(arguments.split()):
                at_first.append("--json")
            status, out, err = cli("generate", *at_first, *arguments.format(*[folder] * 2).split())
            case = f"{heads} {arguments}: {err}"
            refused = (FAST_REFUSED.get(arguments) if "--fast" in mode else None) \
                or {"none": PLAIN_REFUSED, "lookup": LOOKUP_REFUSED}.get(heads, {}).get(arguments) \
                or REFUSED.get(arguments)
            if refused:
                assert (status, out, err.count("\n")) == (2, "", 1) and refused in err, case
                continue
            assert status == 0 and "Traceback" not in err, case
            medusa = "/root" in arguments or "lookup" in arguments or \
                heads != "none" and "--heads none" not in arguments
            texts = written(arguments, out, medusa)
            if heads == "none":
                plain[arguments] = texts
            elif "typical" in arguments and "--temperature" in arguments:       # which draws nothing
                assert texts != plain[arguments], case
            elif texts and arguments not in ROUNDED and "--max-steps" not in arguments:
                assert texts == plain.get(arguments, plain["--json"]), case     # a tree is refused without heads


def options_of_the_parser(monkeypatch) -> list:
    parsers = []
    monkeypatch.setattr(generate, "ArgumentParser", lambda **k: parsers.append(ArgumentParser(**k)) or parsers[-1])
    generate.arguments([])
    parser, = parsers
    return [action.option_strings[-1] for action in parser._actions]


def test_every_option_is_tried(monkeypatch):
    """So that a new one is listed here."""
    assert sorted(options_of_the_parser(monkeypatch)) == sorted(["--help", *TRIED])
    for option, some in TRIED.items():
        assert some and all(option in arguments.split() for arguments in some)


def test_options_that_make_no_sense_together(folder, cli):
    for option, others in APART.items():
        for other in others.split():
            one, two = (TRIED[name][0].format(*[folder] * 2).split() for name in (option, other))
            status, out, err = cli("generate", "--model", folder, "--heads", folder / "root", *one, *two)
            assert (status, out, err.count("\n")) == (2, "", 1), (option, other, err)
            assert " does not go with " in err and option in err and other in err


@pytest.mark.parametrize("more", [[], ["--heads", "none"], ["--prompts-file", "p.txt"], ["--interactive"]], ids=str)
def test_compile_is_refused_and_says_what_there_is(more, tiny_folder, cli):
    status, out, err = cli("generate", "--model", tiny_folder, "--compile", *more)
    assert (status, out) == (2, "") and err == \
        "generate.py: --compile is gone: give --fast\n"


def numbers(script) -> dict:
    """The options of a script that are numbers → what parses them."""
    parser = ArgumentParser()
    {"generate": generate_options, "prepare_data": prepare_options, "train_heads": train_options}[script](parser)
    return {action.option_strings[0]: action.type for action in parser._actions
            if getattr(action.type, "__name__", "") in ("parse", "<lambda>")}


# the largest number that an option takes: what goes on with all of them at once
LARGEST = {"generate": "--prompt dog --max-new-tokens {} --max-steps {} --top-k {} --temperature 1",
           "prepare_data": "--text {dir}/t.txt --limit {} --distill --sentences {} --max-new-tokens {} --out {dir}/d",
           "train_heads": "--data {dir}/d --draft-vocab {} --batch-tokens {} --accumulate {} --pack {} --save-every {} "
                          "--log-every {} --warmup {} --num-heads 2 --width 8 --out {dir}/h"}


@pytest.mark.parametrize("script", LARGEST)
def test_no_number_is_too_large_for_what_it_counts(script, tiny_folder, tmp_path, cli):
    for option, parse in numbers(script).items():
        for text in ("9" * 40, "9" * 5000, "-" + "9" * 40, "1e400", "nan", "1e39", "", "1e-400x"):
            with pytest.raises(ArgumentTypeError, match="is not a"):
                print(option, parse(text))
    assert len(numbers(script)) > 5
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"the dog saw a cat {i}" for i in range(8)))
    if script == "train_heads":
        cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "t.txt", "--out", tmp_path / "d")
    command = LARGEST[script].replace("{dir}", str(tmp_path)).replace("{}", str(10 ** 9))
    status, _, err = cli(script, "--model", tiny_folder, *command.split())
    assert status == 0 and "Traceback" not in err, err
    status, _, err = cli(script, "--model", tiny_folder, *command.replace(str(10 ** 9), "9" * 20).split())
    assert status == 2 and "is not a whole number from 1 to 1000000000" in err


@pytest.mark.parametrize("temperature", ["1e30", "1e-9", "1e-30", "1e-300"])
@pytest.mark.parametrize("fast", [[], ["--fast"]], ids=str)
def test_temperatures_at_the_edge(temperature, fast, tiny_folder, cli):
    """As good as none: greedy; as good as without an end: any token, but some."""
    run = lambda t: json.loads(cli("generate", "--model", tiny_folder, "--prompt", "dog", "--max-new-tokens", 9,
                                   "--json", "--threads", 1, "--temperature", t, *fast)[1])["token_ids"]
    assert run(temperature) == run(0) if float(temperature) < 1 else len(set(run(temperature))) > 4


@pytest.mark.parametrize("rank, world", [("abc", "2"), ("0", "x"), ("0", "0"), ("2", "2"), ("-1", "2"), ("0", "-1"),
                                         ("0", "1.5"), ("", "2"), ("0", ""), ("\u0662", "2"), ("9" * 5000, "9" * 5001)])
def test_ranks_that_torchrun_does_not_give(rank, world, tiny_folder, tmp_path, cli, monkeypatch):
    (tmp_path / "o.txt").write_text("the dog")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for script, *args in (("generate", "--prompt", "a", "--max-new-tokens", 2),
                          ("prepare_data", "--openings", tmp_path / "o.txt", "--out", tmp_path / "d"),
                          ("train_heads", "--data", tmp_path / "d", "--out", tmp_path / "h")):
        status, out, err = cli(script, "--model", tiny_folder, *args)
        assert status == 2 and not out and err.count("\n") == 1 and "RANK is " in err and "torchrun" in err, err
