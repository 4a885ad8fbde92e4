"""Where a text ends: at a stop text, an end-of-text token or a limit; and its text up to there, as it comes."""
from loading.tokenizer import Tokenizer
from tinymedusa import Decoder

class Text:
    """A text as it is written. It ends where the stop text begins that is complete first, of several the longest. What
    may become one is held back until it has or has not."""
    def __init__(self, tokenizer: Tokenizer, prompt: list, decoder: Decoder, args):
        self.decode, self.stops, self.eos = tokenizer.stream(prompt), args.stop or [], decoder.eos.tolist()
        self.limits = args.max_new_tokens, decoder.model.config.max_position_embeddings - len(prompt)
        self.ids, self.text, self.held, self.stopped = [], "", "", False
        named = [tokenizer.backend.token_to_id(stop) for stop in self.stops]
        self.unseen = {i for i in named if i is not None and not tokenizer.decode([i])}     # special tokens

    def add(self, ids: list, end: bool = False) -> str:
        """What these ids add to the text for certain; at most the last one completes a stop. end: no more will come."""
        if self.stopped:
            return ""
        self.ids += ids
        by_token = not self.unseen.isdisjoint(ids)
        new = self.held + self.decode(ids, end or by_token)
        found = [(new.index(stop) + len(stop), new.index(stop)) for stop in self.stops if stop in new]
        begun = (n for stop in self.stops for n in range(1, len(stop)) if new.endswith(stop[:n]))
        open_end = 0 if end or by_token else max(begun, default=0)
        certain = min(found)[1] if found else len(new) - open_end
        self.stopped, self.held = by_token or bool(found), new[certain:]
        self.text += new[:certain]
        return new[:certain]

    def add_step(self, tokens: list, emit=lambda text, head: None) -> bool:
        """Has the text ended with a step's tokens? They are cut behind the one that completes a stop. `emit` gets what
        each adds and the head that guessed it, 0: the base model itself."""
        for head, token in enumerate(tokens, 1):
            emit(self.add([token]), head if head < len(tokens) else 0)
            if self.stopped:
                del tokens[head:]
        return self.stopped

    def result(self) -> dict:
        """What is reported of a whole text, and why it ended."""
        limit, context = (len(self.ids) == most for most in self.limits)
        reason = "length" if limit else "context" if context else "steps"
        reason = "stop" if self.stopped else "eos" if self.ids[-1] in self.eos else reason
        return {"text": self.text, "token_ids": self.ids, "finish_reason": reason}
