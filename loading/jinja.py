"""A chat template as transformers renders it: jinja2's sandbox with a few functions more, here with bounds on time,
memory and numbers, so that a template from anywhere can do nothing but write text."""
import json
import sys
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from loading.files import UserError

SECONDS, MEMORY, BITS = 5, 2 ** 28, 2 ** 12     # of CPU time, bytes, and of a whole number, that one text may take

class Generation(Extension):
    """{% generation %} .. {% endgeneration %} is around what a model writes; the text is the same without."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

    def written(self, caller) -> str:
        return caller()

class Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))         # by which a number gets too large to be computed

    def call_binop(self, context, operator, left, right):
        huge = operator == "**" and isinstance(right, int) and abs(right) > 64
        value = None if huge else super().call_binop(context, operator, left, right)
        if huge or isinstance(value, int) and value.bit_length() > BITS:
            raise SecurityError(f"a number of more than {BITS} bits")
        return value

def raise_exception(message) -> None:
    raise TemplateError(message)

def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

@contextmanager
def bounded():
    """What runs meanwhile raises where it takes more than SECONDS or MEMORY."""
    end, lines, tracing, limits = time.process_time() + SECONDS, 0, sys.gettrace(), None
    def watch(frame, event, arg):
        nonlocal lines
        lines += 1
        if lines % 256 == 0 and time.process_time() > end:
            raise SecurityError(f"more than {SECONDS} seconds")
        return watch
    with suppress(ImportError, OSError, ValueError):        # a system without such limits
        import resource
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        most = min(limit for limit in (used + MEMORY, limits[0]) if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(tracing)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)

@contextmanager
def telling(source: str):
    """Whatever a template raises is one line that names it."""
    try:
        with bounded():
            yield
    except Exception as error:
        reason = "it needs too much memory" if isinstance(error, MemoryError) else error or type(error).__name__
        raise UserError(f"the chat template of {source} can't be used here: {reason}") from error

def compiled(text: str, source: str):
    """A function (variables by name) → text. UserError: what is wrong with the template, or what it says is."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    with telling(source):
        template = environment.from_string(text)
    def render(**variables) -> str:
        with telling(source):
            return template.render(**variables)
    return render
