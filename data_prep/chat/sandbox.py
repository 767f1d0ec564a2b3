"""Jinja as chat templates use it, in a sandbox: no code, no files, bounded time, memory and output.

A template comes with a model from the network, so it is treated as hostile. What the language itself can
reach is narrowed by `ChatEnvironment`; what an allowed construct can cost is bounded by `limits`.
"""

import json
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import BuiltinMethodType, FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from data_prep.errors import DataConfigError, RefusedError

SOURCE_LIMIT_CHARACTERS = 1 << 20
OUTPUT_LIMIT_CHARACTERS = 16 << 20  # beside a multiple of what went in
CPU_LIMIT_SECONDS = 3.0
MEMORY_LIMIT_BYTES = 2 << 30

_REPEAT_LIMIT = 16 << 20  # items of a repeated text or list
_NUMBER_LIMIT_BITS = 1 << 14
_SUMMED_LISTS_LIMIT = 4096
_WIDTH_LIMIT = 1 << 16  # of padded and printed fields
_WIDE_FIELD = re.compile(r"%(?:\([^)]*\))?[-+ #0-9.]*?(?:\*|[0-9]{6})")
_DICT_ATTRIBUTES = frozenset(dir(dict))
_PLAIN_TYPES = frozenset({str, int, float, bool, list, dict, type(None)})
_LOOP_ATTRIBUTES = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "depth", "depth0"}
)
#: Methods of text whose cost and result are bounded by what they are given.
_TEXT_METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper""".split()
)


class OutOfTime(BaseException):
    """The template used up its CPU time. No ``except Exception`` on the way may swallow it."""


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, with short cuts for what is plainly safe and bounds for what grows.

    The short cuts give what the sandbox would give: a plain dictionary's item that no attribute hides, a
    method of a text, a property of a loop.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in _TEXT_METHODS:
                return getattr(obj, attribute)
        elif kind is jinja2.runtime.LoopContext:
            if attribute in _LOOP_ATTRIBUTES:
                return getattr(obj, attribute)
        elif kind is TemplateNamespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if value is not None and type(value) in _PLAIN_TYPES:
                return value
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return super().getitem(obj, argument)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(obj) is BuiltinMethodType:
            owner = obj.__self__
            if type(owner) is str:
                if obj.__name__ in _TEXT_METHODS:
                    kwargs.pop("_loop_vars", None)  # jinja's own, for functions that ask for the context
                    kwargs.pop("_block_vars", None)
                    return obj(*args, **kwargs)
                _check_text_call(owner, obj.__name__, args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif isinstance(left, str):
            _check_printf(left, right)
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for repeated, count in ((left, right), (right, left)):
        if (
            isinstance(repeated, str | list | tuple)
            and isinstance(count, int)
            and len(repeated) * count > _REPEAT_LIMIT
        ):
            raise SecurityError(f"a text or list repeated {count} times")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _NUMBER_LIMIT_BITS:
        raise SecurityError("a number of thousands of digits")


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _NUMBER_LIMIT_BITS:
        raise SecurityError("a number of thousands of digits")


def _check_printf(pattern: str, values: Any) -> None:
    """Refuse printf fields that are wide, or whose width a value gives."""
    if _WIDE_FIELD.search(pattern):
        raise SecurityError("a very wide field in a % format")
    if isinstance(values, int) and values.bit_length() > _NUMBER_LIMIT_BITS:
        raise SecurityError("a number of thousands of digits")


def _check_text_call(text: str, method: str, args: tuple[Any, ...]) -> None:
    match method, args:
        case "ljust" | "rjust" | "center" | "zfill", (int(width), *_) if width > len(text) + _WIDTH_LIMIT:
            raise SecurityError(f"a text padded to {width} characters")
        case "expandtabs", (int(width), *_) if width > _WIDTH_LIMIT:
            raise SecurityError(f"a tab of {width} characters")
        case "replace", (str(old), str(new), *_) if (text.count(old) + 1) * len(new) > _REPEAT_LIMIT + len(text):
            raise SecurityError("a replacement that makes a huge text")


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name an attribute "self"
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute named {name!r}")


class _DictMaker:
    """``dict`` as templates know it: a function, not the type with all that hangs on it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    if (indent if isinstance(indent, int) else len(indent or "")) > _WIDTH_LIMIT:
        raise SecurityError("a very wide indent")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _center(value: Any, width: int = 80) -> str:
    _check_text_call("", "center", (width,))
    return str(value).center(width)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_printf(str(value), None)
    return jinja2.filters.do_format(value, *args, **kwargs)


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    """As Jinja's; a sum of lists costs the square of their number, so that is bounded."""
    items = list(values)
    if len(items) > _SUMMED_LISTS_LIMIT and not isinstance(start, int | float):
        raise SecurityError(f"a sum of {len(items)} lists")
    return jinja2.filters.do_sum(environment, items, attribute, start)


def chat_environment(now: datetime, extensions: list[type[jinja2.ext.Extension]]) -> ChatEnvironment:
    """The environment transformers gives chat templates, without what is random. `now` is its clock."""
    environment = ChatEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[*extensions, jinja2.ext.loopcontrols], cache_size=0
    )
    environment.filters.update(tojson=_to_json, center=_center, format=_format, sum=_sum)
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=now.strftime, dict=_DictMaker(), namespace=TemplateNamespace
    )
    return environment


def parse_template(environment: jinja2.Environment, source: str) -> nodes.Template:
    """The syntax tree of a chat template. Raises DataConfigError if it is not valid, RefusedError for file access."""
    if len(source) > SOURCE_LIMIT_CHARACTERS:
        raise RefusedError(f"chat template: more than {SOURCE_LIMIT_CHARACTERS >> 20} MiB long")
    try:
        tree = environment.parse(source)
    except jinja2.TemplateError as error:
        raise DataConfigError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from error
    except RecursionError:
        raise RefusedError("chat template: nested too deeply") from None
    for found in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise RefusedError(
            f"chat template: line {found.lineno}: it reads another file ({type(found).__name__.lower()});"
            " a chat template stands alone"
        )
    return tree


def compile_tree(environment: jinja2.Environment, tree: nodes.Template) -> jinja2.Template:
    """The tree as a template that can be rendered. Raises DataConfigError, RefusedError."""
    try:
        code = environment.compile(tree)
    except SecurityError as error:
        raise RefusedError(f"chat template: it tries what its sandbox forbids: {error}") from error
    except jinja2.TemplateError as error:
        raise DataConfigError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from error
    except (RecursionError, SyntaxError, MemoryError) as error:
        raise RefusedError(f"chat template: too large or nested too deeply ({type(error).__name__})") from error
    return environment.template_class.from_code(environment, code, environment.make_globals(None), None)


_limited = False
_data_known = (-2.0, 0)


def limits_active() -> bool:
    """True if `limits` holds right now."""
    return _limited


@contextmanager
def limits(cpu_seconds: float = CPU_LIMIT_SECONDS, memory_bytes: int = MEMORY_LIMIT_BYTES) -> Iterator[None]:
    """Bound what the templates rendered inside may use: CPU time of this process, and memory above what it has.

    Put it around a batch: entering costs a few microseconds, a render inside nothing. Within another `limits`
    the outer one holds. Too much time raises OutOfTime where the template is, or, if that lies in one long call
    of the interpreter, ends the process (SIGPROF) a second later. Too much memory is a MemoryError.
    Time is bounded in the main thread only: signals go nowhere else.
    """
    global _limited
    if _limited:
        yield
        return
    timed = threading.current_thread() is threading.main_thread()
    old_handler = signal.signal(signal.SIGVTALRM, _out_of_time) if timed else None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _data_bytes() + memory_bytes
    ceiling = min((limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY), default=wanted)
    _limited = True
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (min(wanted, ceiling), hard))
        if timed:
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds + 1)
            signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
        yield
    except OutOfTime:  # it came up between two renders
        raise RefusedError("chat template: it takes too much time") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGVTALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        _limited = False


_data_known = (-2.0, 0)


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise OutOfTime


def _data_bytes() -> int:
    """The memory that RLIMIT_DATA counts, as of this second: asking costs more than a render."""
    global _data_known
    now = time.monotonic()
    if now - _data_known[0] > 1:
        _data_known = now, int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    return _data_known[1]
