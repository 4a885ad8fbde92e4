"""A chat template as transformers renders it: jinja2's sandbox with a few functions more, here with bounds on time,
memory and numbers, so that a template from anywhere can do nothing but write text."""
import json
import re
import sys
import time
from contextlib import suppress
from datetime import datetime
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from loading.files import UserError

SECONDS, MEMORY, BITS = 5, 2 ** 28, 2 ** 12     # of CPU time, bytes, and of a whole number, that one text may take
GENERATION = re.compile(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})")       # around what a model writes: a mere scope

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

def bounded(source: str, do, *args):
    """do(*args). UserError: it raised anything, or took more than SECONDS or MEMORY."""
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
        return do(*args)
    except Exception as error:
        sys.settrace(tracing)
        reason = "it needs too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
        raise UserError(f"the chat template of {source} can't be used here: {reason}") from error
    finally:
        sys.settrace(tracing)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)

def compiled(text: str, source: str):
    """A function: what makes the variables → the text. UserError: what is wrong with the template, or it says is."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    text = GENERATION.sub(lambda found: f"{found[1]}{found[2] or ''}with{found[3]}", text)
    template = bounded(source, environment.from_string, text)
    return lambda variables: bounded(source, lambda: template.render(variables()))
