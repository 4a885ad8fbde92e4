"""Trains the embedded checkpoint's tokenizer: a byte-level BPE, ids 0/1/2 = <unk>/<s>/</s>.

    python model/train_tokenizer.py --train stories.txt --valid held-out.txt --sizes 2048 4096 8192   # only measures
    python model/train_tokenizer.py --train stories.txt --valid held-out.txt --sizes 4096 --out model/tokenizer.json
"""
import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def stories(path):
    return [t.strip() for t in Path(path).read_text(encoding="utf-8").split("<|endoftext|>") if t.strip()]


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096])
    parser.add_argument("--out")
    args = parser.parse_args()
    train, valid = stories(args.train), stories(args.valid)
    for size in args.sizes:
        tokenizer = train_tokenizer(train, size)
        count = sum(len(e.ids) - 1 for e in tokenizer.encode_batch(valid))                      # without <s>
        print(f"{size} entries: {sum(len(t.encode()) for t in valid) / count:.3f} bytes per token, held out")
        if args.out:
            tokenizer.save(args.out)
