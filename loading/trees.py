"""Trees as lists of paths of ranks: the published one, tree.json and its modes, every check of them, a drawing."""
import re
from loading.files import UserError, locate, parsed, read_bytes

DEEPEST, LARGEST = 64, 2048     # paths: deeper than the rotary table allows for; larger than their tables should get

# mc_sim_7b_63 of the official code, best first, so any prefix is a tree: "01" is rank 0 of head 1, rank 1 of head 2
PUBLISHED_TREE = [[int(rank) for rank in path] for path in (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 "
    "011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070").split()]

def published_tree(num_heads: int, nodes: int = 15, vocab_size: int = 10) -> list[list[int]]:
    """The first `nodes` paths of mc_sim_7b_63 that `num_heads` heads that draft from `vocab_size` tokens can have."""
    return [path for path in PUBLISHED_TREE if len(path) <= num_heads and max(path) < vocab_size][:nodes]

def check_paths(paths, num_heads: int, vocab_size: int) -> list[list[int]]:
    """The paths, if they are a tree that the heads can draft. Raises UserError that names the path: not a list of
    ranks, twice, an ancestor missing, deeper than the heads or a rank beyond the vocabulary."""
    if not isinstance(paths, (list, tuple)):
        raise UserError(f"tree: expected a list of paths such as [[0], [0, 0], [1]], got {paths!r}")
    if len(paths) > LARGEST:
        raise UserError(f"tree: {len(paths)} paths, at most {LARGEST} are supported")
    seen = {()}
    for p in paths:
        if not isinstance(p, (list, tuple)) or not p or any(type(r) is not int or r < 0 for r in p):
            raise UserError(f"tree: {p!r} is not a path: expected a list of ranks such as [0, 2]")
        if tuple(p) in seen:
            raise UserError(f"tree: path {list(p)} is in it twice")
        seen.add(tuple(p))
    for p in sorted(seen - {()}, key=lambda p: (len(p), p)):
        if p[:-1] not in seen:
            raise UserError(f"tree: path {list(p)} has no ancestor {list(p[:-1])}: add it")
        if len(p) > min(num_heads, DEEPEST):
            raise UserError(f"tree: path {list(p)} has depth {len(p)}, there are only {num_heads} heads")
        if max(p) >= vocab_size:
            raise UserError(f"tree: path {list(p)} has rank {max(p)}, the vocabulary only {vocab_size} entries")
    return paths

def written_for(entry: dict) -> float:
    """The temperature of an entry of tree.json."""
    sampling = entry.get("sampling")
    temperature = sampling.get("temperature") if isinstance(sampling, dict) else None
    return temperature if isinstance(temperature, (int, float)) else 0.0

def with_temperatures(entries: dict) -> dict:
    """One entry of tree.json for several temperatures: that of the lowest, the others by their temperature in it."""
    lowest = min(entries)
    others = {str(t): entry for t, entry in sorted(entries.items()) if t != lowest}
    return entries[lowest] | ({"temperatures": others} if others else {})

def by_temperature(entry: dict) -> dict:
    """temperature → entry, of an entry for one or for several. UserError: they are no numbers and objects."""
    others = entry.get("temperatures", {})
    try:
        found = {written_for(entry): entry} | {float(t): dict(other) for t, other in others.items()}
        return {t: {k: v for k, v in other.items() if k != "temperatures"} for t, other in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError("the tree: 'temperatures' must be an object of objects by temperature") from None

def parse_tree(text, mode: str | None = None, rows: int = 1, temperature: float = 0.0) -> tuple[list, str | None]:
    """A tree from JSON, text or a file: a list of paths, or an object whose `paths` is one → the paths and a remark.
    Where such an object has been tuned for `mode` ("cpu", "cpu batch 8", ..), in `modes`, that entry's count: the one
    for this number of rows, or the next fewer; of an entry for several temperatures, the nearest."""
    source = str(text).strip()
    if source[:1] not in ("[", "{"):
        try:
            source = read_bytes(text, 2 ** 24).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"can't read the tree {text}: {error}") from error
    tree = parsed("the tree", source)
    if not isinstance(tree, dict):
        return tree, None
    modes = tree.get("modes", {})
    if not isinstance(modes, dict) or not all(isinstance(entry, dict) for entry in modes.values()):
        raise UserError("the tree: 'modes' must be an object of objects")
    named = {name: re.fullmatch(rf"{mode}(?: batch (\d{{1,9}}))?", name) for name in modes}
    tuned = {int(match[1] or 1): modes[name] for name, match in named.items() if match}
    found = by_temperature(tuned.get(max((n for n in tuned if n <= rows), default=None), tree))
    nearest = min(found, key=lambda t: (abs(t - temperature), t))
    tree = found[nearest]
    if "paths" not in tree:
        raise UserError("the tree is a JSON object without the key 'paths'")
    remarks = [tree["remark"]] if "remark" in tree else [f"not tuned for {mode}"] if mode and not tuned else []
    remarks += [f"for temperature {nearest}"] if len(found) > 1 or nearest != temperature and "sampling" in tree else []
    return tree["paths"], ", ".join(map(str, remarks)) or None

def read_tree(folder, num_heads: int, vocab_size: int, given=None, mode: str | None = None, rows: int = 1,
              temperature: float = 0.0):
    """The checked paths for some heads and where they are from: `given` (JSON or a file), else `tree.json` in their
    folder, else the published tree. What was tuned for `mode` and the rows may be empty: plain decoding is faster."""
    source = given if given is not None else locate(folder, "tree.json", required=False)
    if source is None:
        return published_tree(num_heads, vocab_size=vocab_size), "mc_sim_7b_63, published"
    try:
        paths, remark = parse_tree(source, mode, rows, temperature)
        return check_paths(paths, num_heads, vocab_size), f"{source}: {remark}" if remark else str(source)
    except UserError as error:
        raise error if source is given else UserError(f"{source}: {error}") from error

def draw(paths: list) -> list[tuple[int, str]]:
    """A tree's nodes from top to bottom: each one's number in `paths`, root first, and the branches in front of it."""
    def lines(node, before):
        children = [i for i, path in enumerate(paths) if path and list(path[:-1]) == list(paths[node])]
        for child in children:
            last = child == children[-1]
            yield child, f"{before}{'└─' if last else '├─'}"
            yield from lines(child, before + ("  " if last else "│ "))
    return [(0, ""), *lines(0, "")]

def drawing(paths: list) -> str:
    return "\n".join(branches + (str(paths[node][-1]) if node else "root") for node, branches in draw(paths))
