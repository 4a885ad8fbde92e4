"""The compiled step and the packed weights: other kernels, the same tokens."""
import random

import pytest
import torch
from conftest import random_prompt, tiny_heads, tiny_llama

import llama
import tinymedusa
from llama import UserError
from tinymedusa import Sampling, generate, most_likely

TREE = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]


def tokens(model, prompts, compiled=None, **options):
    steps = list(generate(model, prompts, 24, eos=(2,), seeds=range(len(prompts)), compiled=compiled, **options))
    return [[t for new in steps for t in new.get(row, [])] for row in range(len(prompts))], len(steps)


def test_compiled_steps_give_the_tokens_of_eager_ones(tmp_path, monkeypatch, capfd):
    """A tree at a temperature and, in a batch that prompts wait for, the root: through windows of several sizes, and
    again from the disk."""
    monkeypatch.setattr(tinymedusa, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setitem(tinymedusa.COMPILE_OPTIONS, "max_autotune", False)       # a third of the compiler's time
    rng = random.Random(0)
    model = tiny_llama(dtype=torch.float32, max_position_embeddings=200)
    heads = tiny_heads(model, kind="root", recent=2)
    ways = ({"heads": heads, "tree": heads.tree(TREE), "sampling": Sampling(0.9)}, {})
    prompts = [random_prompt(rng, longest) for longest in (3, 40, 80, 150)]
    eager = [[tokens(model, [p], **way) for p in prompts] for way in ways]
    kept, accepted = {}, 0
    for prompt, (ids, steps) in zip(prompts, eager[0], strict=True):
        assert tokens(model, [prompt], compiled=kept, **ways[0]) == (ids, steps)
        accepted += len(ids[0]) - steps
    assert tokens(model, prompts, compiled=kept, batch_size=2)[0] == [ids[0] for ids, _ in eager[1]]
    assert len(kept) == 2 and accepted > 10 and capfd.readouterr().err.count("compiling a step") == 2
    files = sorted(tmp_path.rglob("*.pt2"))
    assert len(files) == 2
    fresh = {}                                                                   # as another process would: only loaded
    assert tokens(model, [prompts[1]], compiled=fresh, **ways[0]) == eager[0][1]
    assert "compiling" not in capfd.readouterr().err
    with torch.no_grad():
        model.layers[0].o_proj.mul_(1.5)                                         # other weights: another file
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: pytest.fail("asked to compile, as it should"))
    with pytest.raises(pytest.fail.Exception):
        tokens(model, [prompts[1]], compiled={}, **ways[0])


def test_what_cannot_be_compiled_is_one_line(monkeypatch, tmp_path, tiny_folder, cli):
    monkeypatch.setattr(tinymedusa, "cache_dir", lambda: str(tmp_path))

    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\n at all")
    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(UserError, match="^the step can't be compiled here: No working C.. compiler found$"):
        tokens(tiny_llama(dtype=torch.float32), [[1, 4]], compiled={})
    status, out, err = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--compile", "--json")
    plain = cli("generate", "--model", tiny_folder, "--prompt", "the dog", "--json")
    without_times = lambda text: text.partition('"seconds"')[0]
    assert status == 0 and without_times(out) == without_times(plain[1]) and "going on without --compile" in err
    assert not list(tmp_path.rglob("*.pt2"))


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_packed_weights(large, biases, monkeypatch):
    monkeypatch.setattr(llama, "LARGE", 0 if large else 2 ** 40)
    model = tiny_llama(dtype=torch.float32, attention_bias=biases, mlp_bias=biases)
    for layer in model.layers:
        for name, p in layer.named_parameters():
            p.data.normal_(0, 0.3) if name.endswith("bias") else None
    heads = tiny_heads(model)
    tree = heads.tree(TREE)
    prompts = [random_prompt(random.Random(i), 30) for i in range(3)]
    ids = torch.tensor([[1, 5, 6, 7, 3, 9, 4]])
    with torch.inference_mode():
        expected = model.lm_head(model(ids))
    ways = ({}, {"heads": heads, "tree": tree})
    before = [tokens(model, prompts, **way) for way in ways]
    size = model.size()
    model.pack()
    model.pack()                                                                 # twice is as good as once
    assert model.size() < size / 2 if large else model.size() == size
    with torch.inference_mode():
        assert torch.allclose(model.lm_head(model(ids)), expected, atol=1e-5)
        assert torch.allclose(model.lm_head(model(ids)[0, -1]), expected[0, -1], atol=1e-5)
    assert [tokens(model, prompts, **way) for way in ways] == before
    if large:
        with pytest.raises(UserError, match="not compiled"):
            tokens(model, prompts, compiled={})


def test_most_likely_is_argmax_with_ties_to_the_lower_id():
    generator = torch.Generator().manual_seed(0)
    for size in (4096, 128 * 33, 1000):
        logits = torch.randint(0, 40, (2, 9, size), generator=generator).float()     # many ties for the best
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(most_likely(logits), first)
    assert most_likely(torch.zeros(1, 8, 4096)).eq(0).all()


def test_a_compiled_batch_keeps_finished_rows(monkeypatch):
    """Rows leave an eager batch; a compiled one keeps the shape it was compiled for (the compiler is left out here)."""
    shapes = []

    def not_compiled(model, heads, tree, state, sampling, eos):
        def run(window, *tensors):
            shapes.append(tensors[0].shape)
            state, report = tinymedusa.step(model, heads, tree, tinymedusa.State(*tensors), window, sampling, eos)
            return *state[1:], report
        return run
    monkeypatch.setattr(tinymedusa, "compile_step", not_compiled)
    model, prompts = tiny_llama(3), [random_prompt(random.Random(i), 9) for i in range(6)]
    assert tokens(model, prompts, compiled={})[0] == tokens(model, prompts)[0]
    assert len(set(shapes)) == 1 and shapes[0][1] == 6
