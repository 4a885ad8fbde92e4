"""Writes questions and tasks for a chat model to answer, {"messages": [..]} a line: what heads for it are trained on.

    python benchmarks/questions.py --number 8000 > questions.jsonl
    python benchmarks/questions.py --number 6000 --model DIR_OR_HUB_ID > asked.jsonl

Each is a form of request filled with words of our own, or, with --model, the first words of one that a chat model ends
itself, as a user would: it writes at the user's place of its template. All are different; a larger number goes on
behind the same lines. None is among the 50 of benchmarks/questions.jsonl, which were written one by one, to measure
with.
"""
import argparse
import json
import random
import sys
from itertools import count, islice
from os.path import commonprefix
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras.command_line import set_threads
from fast import engines
from llama import LlamaConfig
from loading.checkpoint import TORCH_DTYPES
from loading.templates import load_template
from loading.tokenizer import Tokenizer
from tinymedusa import Sampling
from variants import batches

HELD_OUT = Path(__file__).with_suffix(".jsonl")
TOPICS = """volcanoes; the water cycle; photosynthesis; black holes; the French Revolution; the Roman Empire; jazz
music; impressionist painting; the human heart; vaccines; bees; coral reefs; whales; dinosaurs; the printing press;
steam engines; electric cars; solar panels; nuclear energy; the stock market; inflation; supply and demand; democracy;
the Silk Road; the Great Wall of China; the pyramids of Egypt; the Vikings; samurai; the Renaissance; Shakespeare's
plays; haiku; chess; football; marathon running; yoga; meditation; sleep; dreams; memory; habits; procrastination;
public speaking; teamwork; leadership; time management; budgeting; saving money; credit cards; job interviews; remote
work; learning a language; teaching children to read; mathematics in daily life; prime numbers; probability;
statistics; algebra; geometry; fractals; computers; the internet; email; computer viruses; encryption; artificial
intelligence; machine learning; robots; space travel; the Moon; Mars; comets; the Milky Way; gravity; magnetism;
electricity; sound waves; light; colours; glass; steel; paper; plastic; recycling; composting; climate change; rain
forests; deserts; glaciers; rivers; earthquakes; hurricanes; weather forecasts; maps; compasses; sailing; bridges;
skyscrapers; trains; bicycles; airplanes; submarines; coffee; tea; chocolate; bread; cheese; olive oil; spices; soup;
pasta; rice; salads; vegetarian food; gardening; roses; house plants; trees in cities; cats; dogs; horses; birds;
migration of animals; owls; ants; spiders; butterflies; sharks; penguins; elephants; wolves; libraries; museums;
theatre; cinema; photography; drawing; knitting; pottery; woodworking; playing the guitar; singing in a choir; writing
a diary; poetry; novels; fairy tales; myths; riddles; board games; video games; hiking; camping; swimming; skiing;
first aid; healthy eating; vitamins; exercise; stress; friendship; family; honesty; courage; kindness; patience;
curiosity; creativity; happiness; volunteering; festivals; weddings; holidays; moving to a new city; travelling alone;
airports; hotels; small towns; farming; fishing; markets; supermarkets; advertising; newspapers; radio; television;
social media; privacy; copyright; laws; courts; elections; taxes; the United Nations; human rights; schools;
universities; exams; homework; science fairs; inventions; patents; startups"""
PEOPLE = """a child of six; a student; a new colleague; a busy parent; an old friend; a farmer; a pilot; a nurse; a
teacher; a young cook; a shy boy; a retired sailor; a librarian; a tourist; a doctor; a carpenter; a musician; a
detective; a robot; a queen; a dragon; a gardener; a programmer; a bus driver; a painter; an astronaut; a clumsy
wizard; a lost traveller"""
PLACES = """in a small village; on a rainy island; in a busy city; on a spaceship; in an old castle; at the seaside;
in a deep forest; in a desert; on a mountain; in a library at night; at a train station; in a school; on a farm; in a
bakery; under the sea; in a hospital; at a market; in a museum; on a night train; in a lighthouse"""
THINGS = """a red umbrella; a broken clock; a silver key; an old letter; a wooden boat; a blue lamp; a bag of seeds; a
violin; a map without names; a talking mirror; a small stone; a pair of boots; a glass bird; a secret door; a yellow
bicycle; a lost dog; a magic pencil; a golden coin; a pot of honey; a paper kite"""
TASKS = """bake bread; change a bicycle tyre; write a CV; plan a birthday party; learn to swim; grow tomatoes; clean a
kitchen; paint a room; start a book club; train a puppy; save water at home; pack for a week; make a budget; prepare
for an exam; write a thank-you note; cook rice; sew on a button; choose a laptop; organise a desk; fix a slow
computer; make new friends; calm down before a talk; remember names; build a bird house; take better photos; start
running; read more books; learn the guitar; make pancakes; fold a paper plane; keep a plant alive; set up a tent;
write a short speech; plan a trip; apply for a job; wash a woollen pullover; make lemonade; teach a child to count;
start a garden; repair a leaking tap"""
CODE = """reverses a string; counts the vowels in a text; adds all numbers of a list; finds the largest number of a
list; checks whether a number is prime; prints the first ten squares; reads a file line by line; sorts a list of
names; removes doubles from a list; computes a factorial; converts Celsius to Fahrenheit; checks whether a word is a
palindrome; counts the words of a sentence; computes the average of numbers; merges two dictionaries; prints a
multiplication table; rolls a dice; finds common items of two lists; computes Fibonacci numbers; turns a sentence into
capital letters"""
LANGUAGES = "Python; JavaScript; C; Java; Python; Python"
FORMS = {
    TOPICS: """Define {}.|Explain {} in simple terms.|Tell me something interesting about {}.|Why do people care about
{}?|What are the main facts about {}?|Give me five tips about {}.|List three advantages and three disadvantages of
{}.|Write a short paragraph about {}.|What is the history of {}?|How has the view of {} changed over the last hundred
years?|What do most people get wrong about {}?|Write a poem about {}.|Write three quiz questions about {} with their
answers.|Summarise what you know about {} in two sentences.|What should a beginner know about {}?|Describe {} to
someone who has never heard the word.|Write a headline and a short news article about {}.|How would you teach a class
about {}?|What speaks for {} and what against it?|Name four words that belong to {} and say what they mean.|What are
the effects of {} on daily life?|Write a short dialogue of two friends about {}.""",
    PEOPLE: """Write a short story about {} who finds THING PLACE.|Tell a story about {} PLACE.|Write a letter from {}
to the mayor.|Describe a day in the life of {} PLACE.|What would {} say about THING?|Write a funny dialogue between {}
and a waiter.|Invent a name for {} and describe how this person looks.|Write a diary entry of {} PLACE.""",
    TASKS: """How do I {}?|Give me step-by-step instructions: how can I {}?|What do I need to {}?|What are common
mistakes when people {}?|I want to {}, but I have no time. What can I do?|Make a checklist for someone who wants to
{}.|Write an email to a friend and ask for help to {}.|Can you explain to a child how to {}?|How long does it take to
{}?""",
    CODE: """Write a LANGUAGE function that {}.|Show me a short LANGUAGE program that {}.|How do I write code in
LANGUAGE that {}? Explain it.""",
}
NUMBERS = """What is {a} plus {b}?|What is {a} times {c}?|A shop sells {c} apples a day. How many are that in {d}
days?|If a train goes {a} kilometres in {c} hours, how fast is it?|I have {a} euros and buy {c} books at {d} euros
each. What is left?|List the even numbers from {c} to {b}.|How many minutes are {c} hours and {d} minutes?"""
SENTENCES = """the weather was cold and we stayed at home; she has forgot her keys again; we are glad to tell you that
the shop opens on Monday; he don't like to wait for the bus; the meeting was long, loud and without result; my brother
gave me a book that changed how I think; there is less people in the park than yesterday; the cake was so good that
nothing was left; I would like to know when the parcel will come; the old house at the river was sold last week"""
REWRITES = """Rewrite this sentence in a formal tone: {}.|Correct the grammar: {}.|Make this sentence shorter:
{}.|Translate into French: {}.|Translate into Spanish: {}.|Write a question to which this is the answer: {}.|Continue
this text: {}.|Say this more politely: {}.|What is the mood of this sentence: {}?"""
FIRST_WORDS = """Why|Why do|Why does|Why is it important to|How|How can I|How do I|How do you|How does|How should
I|What|What is|What is a|What is the difference between|What are|What are some good|What are the|What does|What happens
when|What should I|What makes|When|Where|Which|Who|Who invented|Explain|Explain how|Explain the|Describe|Describe
a|Give me|Give me a simple|Give me tips for|List|List three|Name|Tell me|Tell me about|Tell me a|Write a|Write a
short|Write a short story about|Write a poem about|Write an email to|Write a Python function that|Write instructions
for|Write a letter|Summarise the|Compare|Is it|Can you|Imagine|I want to|I"""
TURNS = ["", "Please ", "Can you help me? ", "Hi! ", "Be brief. ", "In one paragraph: ", "Answer in a friendly way: "]


def split(text: str, by: str = ";") -> list[str]:
    return [" ".join(part.split()) for part in text.split(by)]


def question(rng: random.Random) -> str:
    """One request."""
    kind = rng.choices([*FORMS, NUMBERS, REWRITES], weights=[10, 4, 4, 1.5, 0.7, 1.2])[0]
    if kind is NUMBERS:
        numbers = {name: rng.randint(2, most) for name, most in zip("abcd", (200, 90, 12, 9), strict=True)}
        return rng.choice(split(NUMBERS, "|")).format(**numbers)
    if kind is REWRITES:
        return rng.choice(split(REWRITES, "|")).format(rng.choice(split(SENTENCES)))
    text = rng.choice(split(FORMS[kind], "|")).format(rng.choice(split(kind)))
    for word, others in (("THING", THINGS), ("PLACE", PLACES), ("LANGUAGE", LANGUAGES)):
        text = text.replace(word, rng.choice(split(others)))
    opening = rng.choices(TURNS, weights=[12] + [1] * (len(TURNS) - 1))[0]
    return opening + (text[0].lower() + text[1:] if opening == "Please " else text)


def filled(seed: int):
    """Requests of our own forms and words."""
    rng = random.Random(seed)
    while True:
        yield question(rng)


def asked(name: str, seed: int, device: str):
    """Requests that the model writes at the user's place, behind first words of ours; only short ones that it ends."""
    tokenizer = Tokenizer(name, LlamaConfig.from_pretrained(name))
    template = load_template(name, tokenizer)
    before = commonprefix([template.ids([{"role": "user", "content": letter}]) for letter in "A7"])
    model = engines.load(name, TORCH_DTYPES["bfloat16"], device, fast=True)
    rows = 32 if device == "cpu" else 1024
    set_threads(model, rows=32)
    decoder = engines.decoder(model, sampling=Sampling(0.8), eos=tokenizer.eos)
    openings = split(FIRST_WORDS, "|") * 8                  # so many that the batch stays full
    prompts = [before + tokenizer.encode(words)[len(tokenizer.bos):] for words in openings]
    for first in count(seed, len(prompts)):
        seeds = list(range(first, first + len(prompts)))
        texts = [[] for _ in prompts]
        for i, new, _ in batches.finished(batches.generate(decoder, prompts, 32, seeds, rows)):
            texts[i] = sum(new, [])
        for words, ids in zip(openings, texts, strict=True):
            text = words + tokenizer.decode(ids)
            if ids[-1] in tokenizer.eos and "\n" not in text:
                yield text.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=8000)
    parser.add_argument("--model", help="the chat model that ends the requests: a folder or a hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seen = set(HELD_OUT.read_text(encoding="utf-8").splitlines())

    def new(line: str) -> bool:
        """Whether a line comes for the first time."""
        return not (line in seen or seen.add(line))

    requests = asked(args.model, args.seed, args.device) if args.model else filled(args.seed)
    lines = filter(new, (json.dumps({"messages": [{"role": "user", "content": text}]}) for text in requests))
    for line in tqdm(islice(lines, args.number), total=args.number, disable=not args.model):
        print(line)


if __name__ == "__main__":
    main()
