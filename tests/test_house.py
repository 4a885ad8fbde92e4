"""Where lines may live: imports go down only, and the two reading files stay plain, short and without a check."""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ["generate.py", "prepare_data.py", "train_heads.py"]
READING = {"llama.py": 300, "tinymedusa.py": 450}                   # and the most lines they may have
ROOMS = ["loading", "fast", "variants", "extras"]
# what a file of each room may import of the project
MAY_IMPORT = {
    "loading": {"loading"}, "llama": {"loading"}, "tinymedusa": {"loading", "llama"},
    "variants": {"loading", "llama", "tinymedusa", "variants"},
    "fast": {"loading", "llama", "tinymedusa", "variants", "fast"},
    "extras": {"loading", "llama", "tinymedusa", "fast", "variants", "extras"},
    "scripts": {"loading", "llama", "tinymedusa", "fast", "variants", "extras", "prepare_data", "train_heads"}}
PROJECT = {"llama", "tinymedusa", "generate", "prepare_data", "train_heads", *ROOMS}
RUN_TIME = {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "tqdm", "jinja2"}
READ_WITH = {"torch", "safetensors"}                                # what the reading files may import of these
FORWARD = {"llama.py": ["apply_rotary", "attention_mask", "new", "update", "RMSNorm.forward", "Attention.forward",
                        "MLP.forward", "Layer.forward", "Llama.forward"]}


def files():
    return [ROOT / name for name in (*READING, *SCRIPTS)] + [p for room in ROOMS for p in (ROOT / room).glob("*.py")]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """The first names of all that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def room_of(path: Path) -> str:
    if path.parent != ROOT:
        return path.parent.name
    return path.stem if path.name in READING else "scripts"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    import sys
    names = imported(path)
    assert names & PROJECT <= MAY_IMPORT[room_of(path)]
    foreign = names - PROJECT - set(sys.stdlib_module_names)
    assert foreign <= (READ_WITH if path.name in READING else RUN_TIME)


def code_lines(path: Path, tree: ast.Module) -> list[int]:
    """The numbers of the lines that are neither blank, comment nor docstring."""
    lines, skip = path.read_text(encoding="utf-8").splitlines(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            skip |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [i for i, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#") and i not in skip]


def thoughts(tree: ast.Module) -> int:
    """AST nodes, type hints left out."""
    hints = [h for n in ast.walk(tree) for h in (getattr(n, "annotation", None), getattr(n, "returns", None)) if h]
    hinted = {id(n) for h in hints for n in ast.walk(h)}
    return sum(not isinstance(n, (ast.Load, ast.Store, ast.Del)) and id(n) not in hinted for n in ast.walk(tree))


@pytest.mark.parametrize("name", READING)
def test_the_reading_files_are_plain(name):
    path, tree = ROOT / name, parse(ROOT / name)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= READING[name]
    assert thoughts(tree) / len(code_lines(path, tree)) <= 8.5
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.Raise, ast.Assert, ast.Try)), f"line {node.lineno}"
        assert not (isinstance(node, ast.Name) and node.id in ("isinstance", "hasattr")), f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 30, node.name


@pytest.mark.parametrize("path", [p for p in files() if p.parent.name != "fast"], ids=lambda p: p.name)
def test_no_private_names_of_torch(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            private = dotted.startswith("torch.") and any(part.startswith("_") for part in dotted.split(".")[1:])
            assert not private and not dotted.startswith(("torch.ops.mkldnn", "torch.ops.aten._")), dotted
        if isinstance(node, ast.ImportFrom) and node.module.startswith("torch"):
            assert "._" not in node.module


def functions(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def test_the_path_of_one_forward_hardly_branches():
    found = {}
    for name, node in functions(parse(ROOT / "llama.py")):
        if name in FORWARD["llama.py"] or name.startswith("CacheView."):
            found[name] = sum(isinstance(n, (ast.If, ast.IfExp, ast.BoolOp)) for n in ast.walk(node))
    assert {"Llama.forward", "Attention.forward", "CacheView.update", "CacheView.new"} <= found.keys()
    assert sum(found.values()) <= 4, found


def test_sizes():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    assert sum(n for path, n in lines.items() if path.parent == ROOT) <= 1750
    assert sum(lines.values()) <= 5855
