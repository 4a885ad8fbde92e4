"""Steps of a generation told in text, for readers: `generate.py --explain N`."""
import json

from llama import Tokenizer
from tinymedusa import choose, typical


def explaining(tokenizer: Tokenizer, prompt_ids: list):
    """A `run` for `generate` (one row) that tells what each step drafts, what the base chooses, and what is kept."""
    text, number = list(prompt_ids), 0                      # all tokens so far: the last one is not yet in the cache

    def shown(token: int, before: list) -> str:
        """A token as the text that it adds, quoted; a special one by its name."""
        said = tokenizer.stream(before)([token], end=True)
        return json.dumps(said, ensure_ascii=False) if said else tokenizer.backend.id_to_token(token)

    def held(cached: int) -> str:
        end = tokenizer.stream([])(text[max(0, cached - 12):cached], end=True)
        return f"{cached} tokens in slots 0 to {cached - 1}, the last ones {json.dumps(end, ensure_ascii=False)}"

    def node_line(tree, node: int, ids: list, choice: list, length: int) -> tuple[str, str]:
        """A node's token behind its ancestors', and the facts about it."""
        path = tree.paths[node]
        way = [ids[i] for i in tree.path[node][:len(path) + 1].tolist()]
        whose = f"head {len(path)}, guess {path[-1] + 1}" if path else "the base's own "
        return shown(way[-1], text[:-1] + way[:-1]), f"node {node}  {whose}  slot {length + node}  " \
            f"position {length + len(path)}  the base goes on with {shown(choice[node], text[:-1] + way)}"

    def tell(tree, ids: list, choice: list, kept: list, out: list, length: int) -> None:
        """A step: ids and choice of the N nodes, the nodes kept, the new tokens; length: slots in use before it."""
        nonlocal text, number
        number += 1
        print(f"\nstep {number}: the cache holds {held(length)}\n")
        nodes = [(node, branches, *node_line(tree, node, ids, choice, length)) for node, branches in tree.draw()]
        wide = max(len(branches + token) for _, branches, token, _ in nodes)
        for node, branches, token, facts in nodes:
            print(f"  {'*' if node in kept else ' '} {branches + token:<{wide}}  {facts}")
        new = ", ".join(shown(token, text + out[:i]) for i, token in enumerate(out))
        slots = ", ".join(str(length + node) for node in kept)
        print(f"\n  * kept: the root, and of {len(ids) - 1} drafts {len(kept) - 1} that are what the base chose there\n"
              f"  {len(out)} new tokens: {new}; the last one is the base's choice at the path's end, the next root\n"
              f"  slots {slots} become {length} to {length + len(kept) - 1}, what stands behind them is forgotten")
        text += out

    def runner(name, function, *args):
        result = function(*args)
        if name == "init":
            text.append(int(result[0].token))
            print(f"prefill: the cache holds {held(len(prompt_ids))}\n"
                  f"  the base chooses {shown(text[-1], prompt_ids)}, the root of the first tree")
        elif name == "posterior":
            (tree, ids, logits, state, sampling, _), (path, out, count) = args, result
            at = (state.emitted[:, None] + tree.depth).clamp(max=state.uniform.shape[1] - 1)    # greedy draws nothing
            choice = typical(logits, sampling)[0] if sampling.is_typical else \
                choose(logits, state.uniform.gather(1, at), sampling)
            tell(tree, ids[0].tolist(), choice[0].tolist(), path[0, :count].tolist(), out[0, :count].tolist(),
                 int(state.length))
        return result
    return runner
