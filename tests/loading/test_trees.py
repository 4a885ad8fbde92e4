"""Trees as lists of paths: what is refused and how, the published tree, the drawing."""
import pytest

from loading.files import UserError
from loading.trees import PUBLISHED_TREE, check_paths, drawing, published_tree
from tinymedusa import Tree


def test_drawing():
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 2], [0, 0, 1]])
    assert drawing(tree.paths).splitlines() == ["root", "├─0", "│ ├─0", "│ │ └─1", "│ └─2", "└─1"]


@pytest.mark.parametrize("paths, says", [
    ([[0, 0]], "path [0, 0] has no ancestor [0]"),
    ([[0], [0, 1], [0, 1, 2], [0, 1, 2, 0]], "path [0, 1, 2, 0] has depth 4, there are only 3 heads"),
    ([[0], [12]], "path [12] has rank 12, the vocabulary only 12 entries"),
    ([[0], [0]], "path [0] is in it twice"),
    ([[0], []], "[] is not a path"),
    ([[0], [-1]], "[-1] is not a path"),
    ([[0.5]], "[0.5] is not a path"),
    ([[True]], "[True] is not a path"),
    ([0], "0 is not a path"),
    ("01", "expected a list of paths"),
])
def test_errors_name_the_path(paths, says):
    with pytest.raises(UserError) as error:
        check_paths(paths, 3, 12)
    assert says in str(error.value)


def test_what_can_be_drafted_passes_as_it_is():
    for paths in ([], [[0], [11], [0, 3], [0, 3, 11]], [[0, 0], [0]]):
        assert check_paths(paths, 3, 12) == paths


def test_published_tree():
    assert len(PUBLISHED_TREE) == 63 and len(set(map(tuple, PUBLISHED_TREE))) == 63
    assert [sum(len(p) == d for p in PUBLISHED_TREE) for d in (1, 2, 3, 4)] == [10, 28, 23, 2]
    assert published_tree(4)[:6] == [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0]]
    for heads in (1, 2, 3, 4):
        for nodes in (1, 5, 15, 63):
            paths = published_tree(heads, nodes)
            check_paths(paths, heads, 32)                                        # every prefix is a tree
            assert all(len(p) <= heads for p in paths)
