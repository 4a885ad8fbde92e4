"""Many prompts in a batch of a few rows: a finished row takes the next waiting prompt, or leaves the batch."""
import time
from collections import deque
from itertools import chain
import torch
from tinymedusa import Decoder, State

def admit(decoder: Decoder, state: State, row: int, prompt: list, max_new_tokens: int, seed: int, used: int):
    """The next prompt, prefilled in a row's own slots → the state with it, and its first new ids."""
    cache, at = state.cache[:, row:row + 1], torch.tensor([row], device=state.length.device)
    cache[:, :, :used + len(decoder.tree.paths)] = 0                # a NaN left there would reach through the mask
    new, out, count = decoder.run("init", decoder.start, [prompt], max_new_tokens, [seed], cache)
    rows = (t.index_copy(0, at, n) for t, n in zip(state[1:], new[1:], strict=True))
    return State(state.cache, *rows), out[0, :int(count)].tolist()

def without_finished(state: State, rows: list) -> tuple[State, list]:
    """A smaller batch, where at least a quarter of the rows have finished: each costs as much as another."""
    alive = state.remaining.nonzero()[:, 0]
    if 4 * len(alive) > 3 * len(rows):
        return state, rows
    state = State(state.cache[:, alive], *(t[alive] for t in state[1:]))
    return state, [rows[row] for row in alive.tolist()]

@torch.inference_mode()
def generate(decoder: Decoder, prompts: list, max_new_tokens: int, seeds=None, batch_size: int | None = None,
             is_over=lambda i, new: False):
    """Yield, for the prefill and then for each step, {a prompt's index: its new ids} of the prompts in the batch, of
    batch_size rows (default: all). Prompt i draws from seeds[i] (default i), so its tokens are the same as alone.
    is_over(i, its new ids): the caller's word, before they are yielded, that its text ends; it may shorten them."""
    seeds, waiting = seeds or range(len(prompts)), deque(range(len(prompts)))
    rows = [waiting.popleft() for _ in range(min(batch_size or len(prompts), len(prompts)))]    # row → prompt
    some = [max(prompts, key=len)] * len(rows)
    state, out, count = decoder.run("init", decoder.start, [prompts[i] for i in rows], max_new_tokens,
                                    [seeds[i] for i in rows], decoder.new_cache(some, max_new_tokens))
    while True:
        new = {i: ids[:n] for i, ids, n in zip(rows, out.tolist(), count.tolist(), strict=True) if n}
        for row, (remaining, used) in enumerate(zip(state.remaining.tolist(), state.length.tolist(), strict=True)):
            over = rows[row] in new and is_over(rows[row], new[rows[row]])
            while waiting and (over or not remaining):
                rows[row] = i = waiting.popleft()
                state, new[i] = admit(decoder, state, row, prompts[i], max_new_tokens, seeds[i], used)
                over = is_over(i, new[i])
                remaining, used = int(state.remaining[row]), int(state.length[row])
            if over:
                state.remaining[row] = 0
        yield new
        if not any(state.remaining.tolist()):
            return
        state, rows = without_finished(state, rows)
        window = decoder.window(max(state.length.tolist()) + len(decoder.tree.paths), state.cache)
        state, out, count = decoder.step(state, window, decoder.run)

def finished(steps):
    """(index, its new ids step by step, seconds) of each prompt of `generate`, when the first step is without it."""
    texts, begun, now = {}, {}, time.perf_counter()
    for step in chain(steps, [{}]):
        before, now = now, time.perf_counter()
        for i in [i for i in texts if i not in step]:
            yield i, texts.pop(i), before - begun[i]
        for i, new in step.items():
            begun.setdefault(i, before)
            texts.setdefault(i, []).append(new)
