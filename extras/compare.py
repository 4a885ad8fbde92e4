"""generate.py --compare: plain decoding and Medusa in turns, whether they agree, and how near a tie they part."""
import torch
from extras.report import printer, shown
from tinymedusa import Decoder, NoHeads, Sampling, gumbel_noise, perturbed, warp
from variants.penalty import penalized
from variants.typical import Typical

REPEATS = 3     # timed runs of each, in turns; the median is reported

def compared(plain: Decoder, medusa: Decoder, decode, ids: list, seed: int, prompt: str | list, args) -> dict:
    """Medusa's result of `decode(decoder, emit=..)`, with plain decoding's as "baseline", and what they differ by."""
    # once to read, which warms both up too, then in turns, so that what else the machine does hits both alike
    before, name = shown(prompt, args), "plain" if isinstance(medusa.heads, NoHeads) else "medusa"
    decode(plain, emit=printer(args, f"--- plain\n{before}"))
    decode(medusa, emit=printer(args, f"\n\n--- {name}\n{before}"))
    silent = lambda text, head: None
    runs = [(decode(plain, emit=silent), decode(medusa, emit=silent)) for _ in range(REPEATS)]
    baseline, result = (sorted(rs, key=lambda r: r["seconds"])[REPEATS // 2] for rs in zip(*runs, strict=True))
    ours, theirs = result["token_ids"], baseline["token_ids"]
    same = min(len(theirs), len(ours)) if args.max_steps else None
    lossy = isinstance(medusa.accept, Typical) and args.temperature > 0
    return result | {
        "baseline": baseline, "identical": theirs[:same] == ours[:same],
        "speedup": round(baseline["seconds"] / result["seconds"], 3),
        "first_difference": None if lossy else first_difference(medusa.model, ids, ours, theirs, args, seed)}

def first_difference(model, prompt: list, ours: list, plain: list, args, seed: int) -> dict | None:
    """Where two outputs part, and how near the base model's sample was to another token there (0: a tie)."""
    common = min(len(ours), len(plain))
    position = next((i for i in range(common) if ours[i] != plain[i]), common)
    if ours == plain or position == common and args.max_steps:      # with --max-steps one may simply be longer
        return None
    with torch.inference_mode():
        ids = torch.tensor([prompt + plain[:position]], device=args.device)
        logits = model.lm_head(model(ids)[0, -1])
        seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, ids[0], True)
        logits = penalized(logits, seen, args.repetition_penalty or 1.0)
    noise = noise_at(seed, position, logits, args.sampling)
    return {"position": position, "margin": margin(logits, noise, args.sampling)}

def noise_at(seed: int, position: int, logits, sampling: Sampling):
    """What `sample` adds at this position of a row's output: [V], None at temperature 0."""
    if sampling.temperature == 0:
        return None
    seed, position = torch.tensor([seed], device=logits.device), torch.tensor([[position]], device=logits.device)
    return gumbel_noise(seed, position, len(logits))[0, 0]

def margin(logits, noise, sampling: Sampling) -> float:
    """How near `sample` was to another token: logits [V] → the gap of the two best, with the noise at a temperature, or
    the distance to an edge of what is left out, if that is smaller (in logits / T; of the nucleus in probability)."""
    best, second = perturbed(logits.double(), noise, sampling).topk(2).values.tolist()
    margins = [best - second]
    if sampling.temperature and 0 < sampling.top_k < len(logits):
        edge = warp(logits.double(), Sampling(sampling.temperature)).topk(sampling.top_k + 1).values
        margins.append((edge[-2] - edge[-1]).item())
    if sampling.temperature and sampling.top_p < 1:
        probs = warp(logits.double(), sampling._replace(top_p=1.0, min_p=0.0)).softmax(-1)
        nucleus = probs.sort(descending=True).values.cumsum(-1)
        margins.append((nucleus - sampling.top_p).abs().min().item())
    if sampling.temperature and sampling.min_p > 0:
        others = warp(logits.double(), sampling._replace(min_p=0.0)).sort().values[:-1]
        margins.append((others - others.new_tensor(sampling.min_p).log()).abs().min().item())
    return min(margins)
