"""--html: the page's data are the decoder's own, and a browser shows them, whatever the tokens are."""
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import byte_tokenizer, save_heads, tiny_heads, tiny_llama
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llama import Llama, attention_mask
from loading.files import write_json
from loading.tokenizer import Tokenizer
from tinymedusa import Decoder, Sampling, Tree
from variants.heads import load_heads
from variants.typical import Typical

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ["<unk>", "<s>", "</s>", "</script><script>document.title='owned'</script>", "<!--<script>",
           "<img src=x onerror=\"document.title='owned'\">", "\"'`\\", "\u2028", "&lt;b&gt;\n", "\u202eזר", "{data}",
           "\0 🦊"]
NAMES = [*HOSTILE, "<12>", "<13>"]              # the model has two ids more than its tokenizer
PROMPT_IDS = [1, 3, 5, 4, 8, 6, 3, 5]                          # longer than what the page shows of it in the cache
PROMPT = "".join(HOSTILE[i] for i in PROMPT_IDS[1:])
TREE = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0]]
FACTS = """<script>
const texts = (from, what) => [...$(from).querySelectorAll(what)].map(node => node.textContent)
const facts = () => ({step: $("step").value, now: $("now").textContent, chips: texts("tree", ".chip"),
  nodes: [...$("tree").children].map(node => [node.className, ...[...node.children].slice(1).map(c => c.textContent)]),
  rows: [...$("mask").rows].slice(1).map(row => row.cells[0].textContent),
  mask: [...$("mask").rows].slice(1).map(row => [...row.cells].slice(1).map(cell => +cell.classList.contains("sees"))),
  cache: [...$("cache").rows].map(row => [...row.cells].map(cell => cell.textContent)),
  kept: [...$("cache").rows].map(row => [...row.cells].map(cell => +cell.classList.contains("kept"))),
  colours: [...$("text").children].slice(1).map(span => span.style.getPropertyValue("--of")),
  now_tokens: texts("text", ".now"), trees: !$("trees").hidden, tracks: texts("tracks", "b"),
  stages: texts("times", ".key"), title: document.title, text: $("text").textContent,
  markup: document.querySelectorAll("#text *, #tree *, img, script").length - texts("text", "span").length -
    $("tree").querySelectorAll(".node, .node > span").length})
const seen = [facts()], press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))
const slide = k => { $("step").value = k; $("step").dispatchEvent(new Event("input")) }
for (const act of [() => slide(3), () => press("ArrowRight"), () => press("ArrowLeft"), () => slide(0),
                   () => press("ArrowLeft"), () => slide(99)]) {
  act()
  seen.push(facts())
}
add(document.body, "pre", JSON.stringify(seen), {id: "facts"})
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokens are hostile, and heads of which some drafts are accepted."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny_llama(dtype=torch.float32, std=0.3, vocab_size=len(NAMES), max_position_embeddings=256,
                       eos_token_id=None)
    model.save(folder)
    save_heads(tiny_heads(model, 3, noise=0.1), folder / "medusa", model)
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(HOSTILE)}, unk_token="<unk>"))
    backend.add_special_tokens(HOSTILE[:3])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, HOSTILE[3:9]))), "isolated")
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True})
    return folder


def write(cli, folder, path, *more):
    """→ the page's data, and the result as --json prints it."""
    given = ["--model", folder, "--prompt", PROMPT, "--threads", 1, "--max-new-tokens", 40, "--json", "--html", path]
    status, out, err = cli("generate", *given, *more)
    assert (status, err) == (0, ""), err
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]), json.loads(out)


class Spy:
    """A `run` that keeps what each step works on."""
    def __init__(self):
        self.steps = []

    def __call__(self, name, function, *args):
        if name == "medusa":
            state, = args
            self.steps.append({"length": int(state.length), "root": int(state.token)})
        if name == "update":
            step, (state, *_) = self.steps[-1], args
            step["before"] = state.cache[:, 0, step["length"]:].clone()
        result = function(*args)
        if name == "medusa":
            self.steps[-1]["ids"] = result[0][0]
        if name == "posterior":
            self.steps[-1]["path"] = result[0][0]
        if name == "update":
            step, (state, out, count) = self.steps[-1], result
            step |= {"after": state.cache[:, 0, step["length"]:].clone(), "new": out[0, :count].tolist()}
        return result


@pytest.mark.parametrize("more", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "acceptance": "typical"}],
                         ids=str)
def test_the_data_are_the_decoders_own(more, folder, tmp_path, cli):
    options = [text for name, value in more.items() for text in (f"--{name}", value)]
    data, result = write(cli, folder, tmp_path / "p.html", "--tree", json.dumps(TREE), *options)
    model = Llama.from_pretrained(folder)
    heads, tree = load_heads(folder / "medusa", model), Tree.from_paths(TREE)
    tokenizer = Tokenizer(folder, model.config)
    temperature, spy, prompt = more.get("temperature", 0), Spy(), tokenizer.encode(PROMPT)
    assert prompt == PROMPT_IDS
    decoder = Decoder(model, heads, tree, Sampling(temperature), run=spy)
    if "acceptance" in more:
        decoder.accept = Typical()
    new = [ids for (ids,) in decoder.generate([prompt], 40, [more.get("seed", 0)])]
    prefill, *steps = data["runs"][0]["steps"]
    assert prefill["slots"] == [0, len(prompt)] and prefill["new"] == new[0] and "ids" not in prefill
    assert len(steps) == len(spy.steps) == len(new) - 1 == result["steps"] > 8
    assert data["ancestors"] == [[j for j in range(8) if tree.ancestors[i, j]] for i in range(8)]
    assert data["parent"] == tree.parent.tolist() and data["order"] == [0, 1, 3, 6, 4, 7, 2, 5]
    text = prompt + new[0]
    for step, own, out in zip(steps, spy.steps, new[1:], strict=True):
        length = own["length"]
        assert step["slots"] == [length, length + len(out)] and length == len(text) - 1
        assert step["ids"] == own["ids"].tolist() and step["path"] == own["path"].tolist() and step["new"] == out
        for node in range(8):
            way = [step["ids"][i] for i in data["ancestors"][node]]
            with torch.no_grad():
                logits = model.lm_head(model(torch.tensor([text[:-1] + way]))[0])
            probs = (logits / (temperature or 1)).softmax(-1)
            assert node == 0 or abs(step["drafted"][node] - 1000 * probs[-2, way[-1]]) <= 0.51
            assert abs(step["chosen"][node] - 1000 * probs[-1, step["choice"][node]]) <= 0.51
            if temperature == 0 or "acceptance" in more:
                assert step["choice"][node] == logits[-1].argmax()
        kept = step["path"][:len(out)]
        assert "acceptance" in more or out == [step["choice"][node] for node in kept]
        for node in range(8):                               # as the page shows what each slot holds after the step
            moved = step["path"][node] if node < len(step["path"]) else node
            assert torch.equal(own["after"][:, node], own["before"][:, moved])
        text += out
    assert sum(len(out) > 1 for out in new) > 2             # so that paths were kept
    steps = data["runs"][0]["steps"]
    assert "".join(piece for step in steps for piece in step["text"]) == result["text"]
    assert all(len(step["text"]) == len(step["new"]) for step in steps)
    assert data["labels"] == {str(i): NAMES[i] for i in map(int, data["labels"])} and len(data["labels"]) > 5


def test_ids_that_the_tokenizer_does_not_have_are_explained_too(folder, cli):
    status, out, err = cli("generate", "--model", folder, "--explain", 30, "--max-new-tokens", 40, "--temperature", 2)
    assert status == 0 and "<12>" in out and "<13>" in out and "None" not in out, err


def test_times_and_both_tracks(folder, tmp_path, cli):
    data, result = write(cli, folder, tmp_path / "p.html", "--compare", "--profile")
    assert [run["name"] for run in data["runs"]] == ["medusa", "plain"] and "recorded" not in result["baseline"]
    stages = ({"medusa", "tree", "posterior", "update"}, {"base_inference"})
    for run, names, timed in zip(data["runs"], stages, (result, result["baseline"]), strict=True):
        prefill, *steps = run["steps"]
        assert set(prefill["ms"]) == {"init"} and all(set(step["ms"]) == names for step in steps)
        for name in names:
            total = sum(step["ms"][name] for step in steps)
            assert timed["stages"][name]["total_ms"] <= total <= 1000 * timed["seconds"]
        assert sum(sum(step["ms"].values()) for step in run["steps"]) <= 1000 * timed["seconds"]
        assert sum((step["new"] for step in run["steps"]), []) == timed["token_ids"]
        assert run["figures"].startswith(f"40 tokens, {timed['steps']} steps, ")
    speed = f"{result['speedup']:.2f} times as fast as plain decoding"
    assert data["about"] == f"{folder.name} at temperature 0: {speed}, the same tokens"


def test_what_is_read_for_the_page_is_outside_of_the_clock(folder, tmp_path, cli, monkeypatch):
    clock = {"ticks": 0, "read": 0}

    def now():
        clock["ticks"] += 1e-6
        return clock["ticks"]

    def reading(logits, sampling):
        clock["ticks"] += 1000
        clock["read"] += 1
        return logits
    monkeypatch.setattr("time.perf_counter", now)
    monkeypatch.setattr("extras.page.warp", reading)
    data, result = write(cli, folder, tmp_path / "p.html")
    assert result["steps"] == clock["read"] > 5 and result["seconds"] < 1
    assert all(ms < 1 for step in data["runs"][0]["steps"] for ms in step["ms"].values())


def in_a_browser(page, fragment=""):
    """What `FACTS` has seen in a copy of a page; nothing may be said on the console."""
    if not CHROMIUM:
        pytest.skip("no chromium here")
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</html>", FACTS), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom", f"file://{copy}{fragment}"],
        capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search(r'<pre id="facts">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


def shown(token: int) -> str:
    """A token as the page's trees name it."""
    text = NAMES[token].replace(" ", "\u00b7").replace("\n", "\u23ce")
    return re.sub("[\0\u2028\u202e]", lambda match: f"\\u{ord(match[0]):04x}", text)


def test_a_browser_shows_the_steps_and_hostile_text_as_text(folder, tmp_path, cli):
    page = tmp_path / "p.html"
    data, result = write(cli, folder, page, "--compare", "--tree", json.dumps(TREE))
    run, plain = (run["steps"] for run in data["runs"])
    seen, tree = in_a_browser(page, "#step=2"), Tree.from_paths(TREE)
    last = len(run) - 1
    assert [int(s["step"]) for s in seen] == [2, 3, 4, 3, 0, 0, last]
    for s in seen:
        step, k = run[int(s["step"])], int(s["step"])
        assert s["title"] == "TinyMedusa, step by step" and s["markup"] == 3     # scripts: data, page, FACTS
        assert s["text"] == PROMPT + result["text"] and s["tracks"] == ["medusa", "plain"]
        assert "".join(s["now_tokens"]) == "".join(step["text"])
        assert s["trees"] == (k > 0)
        names = [text.split()[0] for text in s["stages"]]
        assert names == (["medusa", "tree", "posterior", "update"] if k else ["init"])
        ended, time, by_then = sum(sum(x["ms"].values()) for x in run[:k + 1]), 0, 0
        for other in plain:
            time += sum(other["ms"].values())
            by_then += len(other["new"]) * (time <= ended)
        so_far = sum(len(x["new"]) for x in run[:k + 1])
        assert s["now"].endswith(f"{len(step['new'])} new, {so_far} tokens so far; plain decoding: {by_then}")
        if k == 0:
            assert s["chips"] == s["mask"] == s["cache"] == []
            continue
        length, kept = step["slots"][0], step["path"][:len(step["new"])]
        assert f"step {k} of {last}: {len(kept) - 1} of 7 drafts accepted" in s["now"]
        assert s["chips"] == [f"{node}: {shown(step['ids'][node])}" for node in data["order"]]
        assert s["rows"] == [f"{node}: {shown(id)}" for node, id in enumerate(step["ids"])]
        for node, (state, drafted, chosen) in zip(data["order"], s["nodes"], strict=True):
            assert state == ("node kept" if node in kept else "node out")
            assert drafted == (f"{step['drafted'][node] / 10:g}%" if node else "")
            assert chosen == f"→ {shown(step['choice'][node])} {step['chosen'][node] / 10:g}%"
        mask = attention_mask(torch.tensor([length]), tree.ancestors, length + 8)[0].long()
        assert s["mask"] == mask[:, length - 1:].tolist()                   # one cell for all committed slots
        text = [*PROMPT_IDS, *(i for x in run for i in x["new"])]
        before = [shown(i) for i in text[max(0, length - 6):length]]
        after = [step["path"][j] if j < len(step["path"]) else j for j in range(8)]
        slots, was, is_now = s["cache"]
        assert slots == ["slot", *map(str, range(max(0, length - 6), length + 8))]
        assert was == ["before", *before, *(shown(i) for i in step["ids"])]
        assert is_now == ["after", *before, *(shown(step["ids"][node]) for node in after)]
        assert s["kept"][1][len(before) + 1:] == [int(node in kept) for node in range(8)]
        assert s["kept"][2][len(before) + 1:] == [int(j < len(kept)) for j in range(8)]
    heads = [i + 1 if i + 1 < len(step["new"]) else 0 for step in run for i in range(len(step["text"]))]
    assert seen[0]["colours"] == [f"var(--head{head})" if head else "transparent" for head in heads]


@pytest.mark.parametrize("more", [["--heads", "none", "--temperature", 2], ["--max-new-tokens", 1]], ids=str)
def test_pages_without_a_tree(more, folder, tmp_path, cli):
    data, result = write(cli, folder, tmp_path / "p.html", *more)
    seen = in_a_browser(tmp_path / "p.html")
    assert not any(s["trees"] for s in seen) and seen[0]["text"] == PROMPT + result["text"]
    assert seen[0]["step"] == ("1" if "none" in more else "0") and len(seen[0]["tracks"]) == 1
    if "none" in more:
        assert seen[1]["now"] == "step 3 of 39: 1 new, 4 tokens so far"
        held = [shown(i) for i in PROMPT_IDS[4:] + result["token_ids"][:3]]
        assert seen[1]["cache"] == [["slot", *map(str, range(4, 11))], ["before", *held], ["after", *held]]


def test_a_page_is_small(tmp_path, cli):
    """200 tokens by 64 nodes, of which hardly any is accepted."""
    model = tiny_llama(dtype=torch.float32, vocab_size=300, max_position_embeddings=256, eos_token_id=None)
    model.save(tmp_path)
    save_heads(tiny_heads(model, 2, noise=3), tmp_path / "medusa", model)
    byte_tokenizer(tmp_path / "tokenizer.json")
    tree, page = [[i] for i in range(32)] + [[0, i] for i in range(31)], tmp_path / "p.html"
    status, out, err = cli("generate", "--model", tmp_path, "--prompt", "a", "--max-new-tokens", 200, "--tree", tree,
                           "--html", page, "--json", "--threads", 1)
    assert status == 0, err
    result = json.loads(out)
    assert result["new_tokens"] == 200 and result["steps"] > 150 and 100_000 < page.stat().st_size < 300_000


@pytest.mark.parametrize("more", [["--prompt", "b"], ["--samples", 2, "--temperature", 1]], ids=str)
def test_one_text_a_page(more, tiny_folder, tmp_path, cli):
    status, out, err = cli("generate", "--model", tiny_folder, "--prompt", "a", "--html", tmp_path / "p.html", *more)
    assert (status, out, err) == (
        2, "", "generate.py: --html shows one text: give one --prompt, and no --samples\n")
    assert not (tmp_path / "p.html").exists()
