"""Is a `tokenizer.model` read as the sentencepiece library reads it? The same ids, and the same text back.

    python benchmarks/tokenizer.py FOLDER/tokenizer.model FILE ...     # any texts; random Unicode as well

Each document of a file (between lines of <|endoftext|>, else the whole file's lines and the file itself) is encoded and
decoded by both.
"""
import argparse
import random
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from extras.command_line import command_line  # noqa: E402
from loading import sentencepiece as ours  # noqa: E402
from loading.files import UserError  # noqa: E402

HARD = ["", " ", "   ", "a", " a", "a ", "  two  spaces   and more ", "tab\tand\nnew\r\nline\n\n", "▁", "a▁b ▁ c▁ ",
        "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "a<s>b</s>", "</s>USER: hi ASSISTANT:", "naïve café 你好 🦊🦊",
        "\ufeffbom", "\u00a0\u2003\u3000x", "ﬁﬀ Å Ａ①㍿ e\u0301", "\x00\x01\x7f", "¡", "\U0010ffff",
        "👩‍👩‍👧‍👦 flags 🇩🇪", "\u0e33\u0c4d", "ab" * 300]


def random_texts(words: list[str], count: int, seed=0) -> list[str]:
    """Words, all planes of Unicode, runs of spaces and newlines and the HARD ones, in any order."""
    rng = random.Random(seed)

    def piece():
        kind = rng.randrange(6)
        if kind == 0:
            return "".join(chr(rng.choice((rng.randrange(1, 0x250), rng.randrange(0x250, 0xd800),
                                           rng.randrange(0xe000, 0x110000)))) for _ in range(rng.randint(1, 5)))
        return {1: rng.choice(words), 2: " " * rng.randint(1, 6), 3: "\n" * rng.randint(1, 3), 4: rng.choice(HARD),
                5: f" {rng.choice(words)} {rng.choice(words)}"}[kind]
    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(count)]


def differences(path, texts) -> list[str]:
    """The texts whose ids, or whose text decoded from them, are not those of the library."""
    import sentencepiece
    judge, (backend, before) = sentencepiece.SentencePieceProcessor(model_file=str(path)), ours.read(path)
    assert [backend.id_to_token(i) for i in range(backend.get_vocab_size())] == \
        [judge.id_to_piece(i) for i in range(judge.vocab_size())]
    wrong = []
    for text in texts:
        ids = judge.encode(text)
        if backend.encode(before(text), add_special_tokens=False).ids != ids or \
                backend.decode(ids, skip_special_tokens=True) != judge.decode(ids):
            wrong.append(text)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="tokenizer.model")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--random", type=int, default=20_000, help="random texts beside those of the files")
    args = parser.parse_args()
    wrong = []
    for file in args.files:
        text = Path(file).read_text(encoding="utf-8")
        stories = text.split("\n<|endoftext|>\n")
        documents = stories if len(stories) > 1 else [*text.splitlines(), text]
        begin = time.perf_counter()
        wrong += differences(args.model, tqdm(documents, desc=Path(file).name))
        print(f"{Path(file).name}: {len(documents)} documents, {len(text)} characters, {len(wrong)} differ so far "
              f"({time.perf_counter() - begin:.0f} s for both)")
    random_ones = random_texts(text.split()[:5000], args.random) + HARD
    wrong += differences(args.model, tqdm(random_ones, desc="random Unicode"))
    print(f"random Unicode and special tokens: {len(random_ones)} texts, {len(wrong)} differ in all")
    if wrong:
        raise UserError(f"the first one that differs: {wrong[0]!r}")


if __name__ == "__main__":
    command_line(main)
