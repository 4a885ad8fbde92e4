"""Steps of a generation told in text, for readers: `generate.py --explain N`."""
import json
from loading.tokenizer import Tokenizer
from loading.trees import draw
from tinymedusa import sample
from variants.typical import Typical

def sampled(rule, tree, logits, noise, sampling):
    """What the base model samples at each node, whatever the rule of acceptance: logits [B, N, V] → ids [B, N]."""
    noise = None if noise is None or isinstance(rule, Typical) else noise[:, tree.depth]
    return sample(logits, noise, sampling)

def explaining(tokenizer: Tokenizer, prompt_ids: list):
    """A `run` for a decoder (one row) that tells what each step drafts, what the base model samples, what is kept."""
    # all tokens so far, the last one not yet in the cache; of the current step: tree, ids, each node's sample
    text, number, verified = list(prompt_ids), 0, ()
    def shown(token: int, before: list) -> str:
        said = tokenizer.stream(before)([token], end=True)
        return json.dumps(said, ensure_ascii=False) if said else tokenizer.backend.id_to_token(token) or f"<{token}>"
    def held(cached: int) -> str:
        end = tokenizer.stream([])(text[max(0, cached - 12):cached], end=True)
        return f"{cached} tokens in slots 0 to {cached - 1}, the last ones {json.dumps(end, ensure_ascii=False)}"
    def node_line(tree, node: int, ids: list, choice: list, length: int) -> tuple[str, str]:
        path = tree.paths[node]
        way = [ids[i] for i in tree.retrieve[node][:len(path) + 1].tolist()]
        whose = f"head {len(path)}, guess {path[-1] + 1}" if path else "the base model "
        return shown(way[-1], text[:-1] + way[:-1]), f"node {node}  {whose}  slot {length + node}  " \
            f"position {length + len(path)}  the base model samples {shown(choice[node], text[:-1] + way)}"
    def tell(tree, ids: list, choice: list, kept: list, out: list, length: int) -> None:
        nonlocal text, number
        number += 1
        print(f"\nstep {number}: the cache holds {held(length)}\n")
        nodes = [(node, branches, *node_line(tree, node, ids, choice, length)) for node, branches in draw(tree.paths)]
        wide = max(len(branches + token) for _, branches, token, _ in nodes)
        for node, branches, token, facts in nodes:
            print(f"  {'*' if node in kept else ' '} {branches + token:<{wide}}  {facts}")
        new = ", ".join(shown(token, text + out[:i]) for i, token in enumerate(out))
        slots = ", ".join(str(length + node) for node in kept)
        print(f"\n  * kept: the root, and of {len(ids) - 1} drafts {len(kept) - 1} that the base model sampled there\n"
              f"  {len(out)} new tokens: {new}; the last one is sampled at the path's end, the next root\n"
              f"  slots {slots} become {length} to {length + len(kept) - 1}, what is behind them is discarded")
        text += out
    def runner(name, function, *args):
        nonlocal verified
        result = function(*args)
        if name == "init":
            text.append(int(result[0].token))
            print(f"prefill: the cache holds {held(len(prompt_ids))}\n"
                  f"  the base model samples {shown(text[-1], prompt_ids)}, the root of the first tree")
        elif name == "posterior":
            tree, ids, logits, noise, sampling = args
            choice = sampled(function, tree, logits, noise, sampling)
            verified = tree, ids[0].tolist(), choice[0].tolist()
        elif name == "update":
            (state, _, path, *_), (_, out, count) = args, result
            tell(*verified, path[0, :count].tolist(), out[0, :count].tolist(), int(state.length))
        return result
    return runner
