"""A generation as a page for a browser, step by step: `generate.py --html FILE`."""
import json
from pathlib import Path
from loading.files import model_name
from loading.tokenizer import Tokenizer
from loading.trees import draw
from tinymedusa import Decoder, Sampling, Stages, Tree, sample, warp
from variants.typical import Typical

SHOWN = 6       # committed slots that are shown in front of a step's own

def recording(decoder: Decoder, emit):
    """Watch a decoder (one row) from now on → a list that gets each step, see `facts`, and what to call for `emit`: it
    comes between two steps, outside of every clock, and there reads what the stages have left."""
    steps, watched, run, now = [], {}, decoder.run, Stages(decoder.device).now
    def watching(name, function, *args):
        begin = now()
        result = run(name, function, *args)
        watched[name] = 1000 * (now() - begin), function, args, result
        return result
    def emitting(text: str, head: int) -> None:
        if watched:
            steps.append(facts(watched, steps[-1]["slots"][1] if steps else 0))
            watched.clear()
        pieces = steps[-1]["text"]
        if len(pieces) < len(steps[-1]["new"]):
            pieces.append(text)
        else:                                           # the end: what was held back of a character
            pieces[-1] += text
        emit(text, head)
    decoder.run = watching
    return steps, emitting

def sampled(rule, tree: Tree, logits, noise, sampling: Sampling):
    """What the base model samples at each node, whatever the rule of acceptance: logits [B, N, V] → ids [B, N]."""
    noise = None if noise is None or isinstance(rule, Typical) else noise[:, tree.depth]
    return sample(logits, noise, sampling)

def facts(watched: dict, before: int) -> dict:
    """Of a step: its stages in ms, the committed slots before and after, the new ids. Of a tree all ids, how probable
    each is behind its parent (per mille; the root has none), what is sampled behind each, how probable, the path."""
    state, out, count = list(watched.values())[-1][-1]
    step = {"ms": {name: round(seen[0], 4) for name, seen in watched.items()},
            "slots": [before, int(state.length)], "new": out[0, :count].tolist(), "text": []}
    if "posterior" not in watched:
        return step
    _, rule, (tree, ids, logits, noise, sampling), (path, *_) = watched["posterior"]
    choice = sampled(rule, tree, logits, noise, sampling)
    probs = warp(logits[0], sampling if sampling.temperature else Sampling(1.0)).softmax(dim=-1)            # [N, V]
    per_mille = lambda at, token: (1000 * probs[at, token]).round().long().tolist()
    return step | {"ids": ids[0].tolist(), "drafted": per_mille(tree.parent, ids[0]), "choice": choice[0].tolist(),
                   "chosen": per_mille(range(len(probs)), choice[0]), "path": path[0].tolist()}

def labels(steps: list, tokenizer: Tokenizer, prompt_ids: list) -> dict[int, str]:
    """The text of every token that a step names, of a special one its name."""
    ids = {i for step in steps for key in ("new", "ids", "choice") for i in step.get(key, ())}
    said = {i: tokenizer.stream(prompt_ids)([i], end=True) for i in ids.union(prompt_ids[-SHOWN:])}
    return {i: text or tokenizer.backend.id_to_token(i) or f"<{i}>" for i, text in said.items()}

def page_of(result: dict, tree: Tree, tokenizer: Tokenizer, prompt_ids: list, args) -> str:
    """A self-contained page about a result of `run` or `compared`, of which the recorded steps are taken out."""
    results = [r for r in (result, result.get("baseline")) if r]
    steps = [r.pop("recorded") for r in results]
    for r, *before, last in ((r, *s) for r, s in zip(results, steps, strict=True)):     # which --stop may have cut
        count = r["new_tokens"] - sum(len(step["new"]) for step in before)
        last |= {name: last[name][:count] for name in ("new", "text")}
    figures = "{new_tokens} tokens, {steps} steps, {seconds:.3f} s, {tokens_per_second:.0f} tokens/s".format_map
    names = "medusa" if len(tree.paths) > 1 else "plain", "plain"
    about = f"{model_name(args.model)} at temperature {args.temperature:g}"
    if args.compare:
        same = "the same tokens" if result["identical"] else "tokens that differ"
        about += f": {result['speedup']:.2f} times as fast as plain decoding, {same}"
    data = {
        "about": about, "prompt": tokenizer.decode(prompt_ids), "end": prompt_ids[-SHOWN:], "shown": SHOWN,
        "labels": labels(steps[0], tokenizer, prompt_ids),
        "parent": tree.parent.tolist(), "order": [node for node, _ in draw(tree.paths)],
        "ancestors": [row.nonzero()[:, 0].tolist() for row in tree.ancestors],
        "runs": [{"name": name, "figures": figures(r), "steps": s}
                 for name, r, s in zip(names, results, steps, strict=False)]}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")      # ASCII, and no tag begins in it
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("{data}", text)
