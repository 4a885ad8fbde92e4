"""Medusa-2: heads first, then base model and heads together, the base model held to its old self."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_heads, tiny_llama
from test_train import texts, trained

import train_heads
from llama import Llama
from loading.files import model_name
from train_heads import IGNORE, head_backward, make_batch
from variants.heads import load_heads
from variants.medusa2 import Joint, kl_losses


def test_medusa_2_trains_base_and_heads_and_saves_a_whole_model(tiny_folder, tmp_path, cli):
    stories = [f"the dog {'was happy ' * (5 + i % 3)}" for i in range(60)]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(stories))
    cli("prepare_data", "--model", tiny_folder, "--text", tmp_path / "s.txt", "--out", tmp_path / "s.bin")
    status, out, err = cli("train_heads", "--model", tiny_folder, "--data", tmp_path / "s.bin", "--out",
                           tmp_path / "m2", "--medusa-2", "--num-heads", 2, "--epochs", 6, "--base-lr", 1e-3,
                           "--draft-vocab", 40, "--tie-lm-head", "--width", 16, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["base_loss_before"] != result["base_loss"]
    old, new = Llama.from_pretrained(tiny_folder), Llama.from_pretrained(tmp_path / "m2")
    assert not any(torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters(), strict=True))
    heads = load_heads(tmp_path / "m2" / "medusa", new)
    assert heads.draft_size == 40 and model_name(tmp_path / "m2") == "m2"
    status, out, _ = cli("generate", "--model", tmp_path / "m2", "--prompt", "the dog", "--json", "--compare")
    assert status == 0 and json.loads(out)["identical"] and json.loads(out)["tokens_per_step"] > 1


def test_the_first_half_leaves_the_base_model_alone(tmp_path, monkeypatch):
    backward, call, joint = train_heads.backward, Joint.__call__, []
    monkeypatch.setattr(train_heads, "backward", lambda *a: joint.append(False) or backward(*a))
    monkeypatch.setattr(Joint, "__call__", lambda *a: joint.append(True) or call(*a))
    model, _ = trained(tmp_path, texts(), "--medusa-2", "--epochs", 2, "--base-lr", 1e-3)
    assert joint == [False, False, True, True]
    assert not torch.equal(model.layers[0].mlp.down_proj.weight, tiny_llama().layers[0].mlp.down_proj.weight)


def test_the_kl_against_its_definition():
    base, batch, hidden = tiny_llama().requires_grad_(False), make_batch(texts(1), 2), torch.randn(21, 32).double()
    base.config = replace(base.config, vocab_size=2 ** 22 // 7)                  # logits of 7 places at a time
    assert len(list(kl_losses(base, hidden, batch.next, base, hidden))) == 3
    kl = lambda before: sum(loss.item() for loss in kl_losses(base, hidden, batch.next, base, before))
    p, q = (base.lm_head(h).log_softmax(-1)[:20] for h in (2 * hidden, hidden))
    assert kl(2 * hidden) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4) and abs(kl(hidden)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"kind": "hydra", "tie_lm_head": True, "token_map": torch.arange(2, 9)}],
                         ids=["paper", "hydra"])
def test_the_gradient_is_that_of_the_whole_loss(options, tmp_path, monkeypatch):
    """Slow definition: one graph from the embeddings to heads' losses and KL; in Joint, chunks and a leaf between."""
    monkeypatch.setattr(train_heads, "LOGITS", 7 * 2 * 12)
    model, documents = tiny_llama(), texts(3, 15)
    original, batch = tiny_llama(), make_batch(documents, 2)
    joint = Joint(model, head_backward)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)                                     # no longer what it was
    heads, weights, base_weight = tiny_heads(model, 2, **options), torch.tensor([0.3, 0.2]).double(), 0.7
    model.config = replace(model.config, vocab_size=2 ** 22 // 7)                # for the KL, 7 places at a time
    places = [(int(i) // 16, int(i) % 16) for i in batch.index]
    hidden = model(batch.ids)
    logits = heads(hidden[tuple(zip(*places, strict=True))][:, None], batch.tokens)
    labels, ids = batch.labels, list(range(2, 9)) if options else list(range(12))
    labels = torch.tensor([[ids.index(v) if v in ids else IGNORE for v in row] for row in labels.tolist()])
    learned = batch.next != IGNORE
    p, q = (m.lm_head(h.flatten(0, 1)[learned]).float().log_softmax(-1)
            for m, h in ((original, original(batch.ids).detach()), (model, hidden)))
    loss = base_weight * (p.detach().exp() * (p.detach() - q)).sum() + sum(
        weights[k] * F.cross_entropy(logits[:, k], labels[k], ignore_index=IGNORE, reduction="sum") for k in range(2))
    parameters = [*heads.parameters(), *model.parameters()]
    expected = torch.autograd.grad(loss, parameters)
    args = train_heads.arguments(["--data", "d", "--out", str(tmp_path), "--medusa-2"])
    joint(model, heads, batch, weights, base_weight, args, True)
    assert all(g.abs().max() > 1e-3 for g in expected)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
