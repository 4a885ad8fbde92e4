"""Steps of a generation told in text, for readers: `generate.py --explain N`."""
import json
from extras.page import recording
from loading.tokenizer import Tokenizer
from loading.trees import draw
from tinymedusa import Decoder

def explaining(decoder: Decoder, tokenizer: Tokenizer, prompt_ids: list):
    """Watch a decoder (one row) → what to call for `emit`: it tells what each step drafts, samples and keeps."""
    text, tree, number = list(prompt_ids), decoder.tree, -1      # all tokens so far, the last one not yet in the cache
    steps, emit = recording(decoder, lambda text, head: None)
    def shown(token: int, before: list) -> str:
        said = tokenizer.stream(before)([token], end=True)
        return json.dumps(said, ensure_ascii=False) if said else tokenizer.backend.id_to_token(token) or f"<{token}>"
    def held(cached: int) -> str:
        stream, last = tokenizer.stream([]), text[max(0, cached - 12):cached]
        special = lambda token: "" if tokenizer.decode([token]) else tokenizer.backend.id_to_token(token) or ""
        said = "".join(stream([token]) + special(token) for token in last) + stream([], end=True)
        return f"{cached} tokens in slots 0 to {cached - 1}, the last ones {json.dumps(said, ensure_ascii=False)}"
    def node_line(node: int, ids: list, choice: list, length: int) -> tuple[str, str]:
        path = tree.paths[node]
        way = [ids[i] for i in tree.retrieve[node][:len(path) + 1].tolist()]
        whose = f"head {len(path)}, guess {path[-1] + 1}" if path else "the base model "
        return shown(way[-1], text[:-1] + way[:-1]), f"node {node}  {whose}  slot {length + node}  " \
            f"position {length + len(path)}  the base model samples {shown(choice[node], text[:-1] + way)}"
    def tell(step: dict) -> None:
        ids, out, length = step["ids"], step["new"], step["slots"][0]
        kept = step["path"][:len(out)]
        print(f"\nstep {number}: the cache holds {held(length)}\n")
        nodes = [(node, branches, *node_line(node, ids, step["choice"], length)) for node, branches in draw(tree.paths)]
        wide = max(len(branches + token) for _, branches, token, _ in nodes)
        for node, branches, token, facts in nodes:
            print(f"  {'*' if node in kept else ' '} {branches + token:<{wide}}  {facts}")
        new = ", ".join(shown(token, text + out[:i]) for i, token in enumerate(out))
        slots = ", ".join(str(length + node) for node in kept)
        moved = f"slot {slots} stays, what is behind it"
        if len(kept) > 1:
            moved = f"slots {slots} become {length} to {length + len(kept) - 1}, what is behind them"
        end = "the end of the text" if out[-1] in decoder.eos.tolist() else "the next root"
        print(f"\n  * kept: the root, and of {len(ids) - 1} drafts {len(kept) - 1} that the base model sampled there\n"
              f"  {len(out)} new token{'s' * (len(out) > 1)}: {new}; the last one is sampled at the path's end, "
              f"{end}\n  {moved} is discarded")
    def telling(piece: str, head: int) -> None:
        nonlocal number
        emit(piece, head)
        if number == len(steps) - 1:
            return                                              # not the step's first token
        number += 1
        if number:
            tell(steps[-1])
        else:
            print(f"prefill: the cache holds {held(len(prompt_ids))}\n"
                  f"  the base model samples {shown(steps[0]['new'][0], prompt_ids)}, the root of the first tree")
        text.extend(steps[-1]["new"])
    return telling
