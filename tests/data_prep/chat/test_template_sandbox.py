"""Hostile chat templates: nothing is read, run or kept, and time, memory and output have an end."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_templates import CHATML, CONTROL, NOW, SPECIAL, chat_format, talk
from repository import ROOT

from data_prep.chat.child import prove_apart
from data_prep.chat.proof import Plan, prove
from data_prep.chat.render import ChatTemplate
from data_prep.chat.sandbox import limits, limits_active
from data_prep.errors import BadDataError, DataConfigError, PreparationError, RefusedError

MESSAGES = talk("ua", "hello", "there").messages


def render(template: str, cpu_seconds: float = 0.5, memory_bytes: int = 200 << 20) -> str:
    with limits(cpu_seconds, memory_bytes):
        return "".join(ChatTemplate(template, SPECIAL, NOW, marked=True).render(MESSAGES, None, False, "a.jsonl:1"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages[0]['__class__'] | string }}{{ (messages[0] | attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__['os'].environ }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
        "{{ ('{0.__class__.__mro__}'['format'])(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set loop = namespace() %}{% for m in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ [''] | map(attribute='__class__') | list }}{{ (''|attr('__class__')).mro() }}",
    ],
)
def test_nothing_inside_python_is_reached(template: str) -> None:
    before = [dict(message) for message in MESSAGES]
    try:
        shown = render(template)
    except RefusedError as error:
        assert error.exit_code == 77 and "sandbox" in str(error)
    else:
        assert shown == ""  # an undefined value: Jinja complains only when more is asked of it
    assert before == MESSAGES


@pytest.mark.parametrize("statement", ["include '/etc/passwd'", "import 'x' as x", "from 'x' import y", "extends 'x'"])
def test_no_file_is_read(statement: str) -> None:
    with pytest.raises(RefusedError, match="line 2: it reads another file"):
        render("a\n{% if false %}{% " + statement + " %}{% endif %}")


GROW = "{% set ns = namespace(s='%') %}{% for i in range(60) %}{% set ns.s = NEXT %}{% endfor %}{{ ns.s | length }}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 10 ** 999999999 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(100) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n % 7 }}",
        GROW.replace("NEXT", "ns.s + ns.s"),
        GROW.replace("NEXT", "ns.s ~ ns.s"),
        GROW.replace("NEXT", "[ns.s, ns.s] | join"),
        GROW.replace("NEXT", "ns.s.replace('%', '%%')"),
        GROW.replace("'%'", "[0]").replace("NEXT", "ns.s + ns.s"),
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}{{ ('a' | attr('rjust'))(10000000000) }}",
        "{{ 'a'['zfill'](10000000000) }}",
        "{{ '\t'.expandtabs(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ 'a\nb' | indent(10000000000) }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ range(100000) | batch(10000000000, 0) | list }}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}",
        "{% for i in range(20000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% set ns = namespace(a=[]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "{{ range(100000) | map('batch', 1) | map('list') | list | sum(start=[]) | length }}",
        "{{ '" + "(" * 5000 + "' }}{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)  # fmt: skip
def test_time_memory_and_output_have_an_end(template: str) -> None:
    began = time.process_time()
    with pytest.raises((RefusedError, BadDataError)):
        render(template)
    assert time.process_time() - began < 5


def test_constants_that_the_compiler_would_fold_are_bounded_too() -> None:
    for template in (
        "{{ 'a' * 9000000000 }}",
        "{{ 'a' | center(9000000000) }}",
        "{% if false %}{{ 9 ** 999999999 }}{% endif %}",
    ):
        with pytest.raises(PreparationError):
            render(template + "{{ undefined_name.x }}")


def test_what_is_random_does_not_exist() -> None:
    for template in ("{{ messages | random }}", "{{ lipsum() }}"):
        with pytest.raises(PreparationError):
            render(template)


def test_a_process_of_its_own_ends_what_python_cannot_interrupt() -> None:
    """Two nested lists with 2^60 leaves are compared inside the interpreter, where no signal handler runs."""
    template = (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}" + CHATML
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(RefusedError, match="too much time or memory"):
        prove_apart(template, SPECIAL, CONTROL, (), NOW, cpu_seconds=0.5)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 5


def test_a_process_of_its_own_finds_the_same_plan_and_the_same_faults() -> None:
    plan = prove_apart(CHATML, SPECIAL, CONTROL, ("<|unused|>",), NOW)
    assert plan == prove(CHATML, SPECIAL, CONTROL, ("<|unused|>",), NOW)
    assert isinstance(plan, Plan) and not plan.unproven and ("assistant", "<|im_start|>assistant\n") in plan.headers
    with pytest.raises(DataConfigError, match="chat template: line 2"):
        prove_apart("a\n{% for %}", SPECIAL, CONTROL, (), NOW)
    with pytest.raises(RefusedError, match="sandbox"):
        prove_apart("{{ messages.__class__.__mro__ }}", SPECIAL, CONTROL, (), NOW)
    assert prove_apart("{{ messages | length }}", SPECIAL, CONTROL, (), NOW).unproven


def test_proving_starts_without_heavy_imports() -> None:
    code = "import sys, data_prep.chat.child, data_prep.chat.proof; print([m for m in ('pydantic', 'numpy', 'torch', 'transformers', 'tokenizers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert shown.stdout.strip() == "[]"


def test_limits_end_with_their_block() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)
    with limits(5, 1 << 30):
        assert limits_active() and signal.getitimer(signal.ITIMER_PROF)[0] > 0
        with limits(0.001, 1):  # the outer ones hold
            assert sum(range(10**6)) > 0
            assert len(bytearray(100 << 20)) > 0
    assert not limits_active()
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == signal.getitimer(signal.ITIMER_PROF)[0] == 0.0


def test_a_template_that_turns_hostile_later_is_ended_where_it_is(tmp_path: Path) -> None:
    sleeper = CHATML + (
        "{% if messages[0].content == 'now' %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}"
        "{% endfor %}{% endif %}"
    )
    chat = chat_format(sleeper)
    with limits(cpu_seconds=0.5):
        chat.render(talk("ua", "later", "b"), "a:1")
        with pytest.raises(RefusedError, match="a:2: the chat template takes too much time"):
            chat.render(talk("ua", "now", "b"), "a:2")


def test_faults_of_a_template_are_the_records_with_the_line_in_the_template() -> None:
    fails = CHATML + "\n{%- set x = 1 // (messages[0].content | length) %}"
    with pytest.raises(BadDataError, match=r"a:4: line 8 of the chat template fails .*: ZeroDivisionError"):
        chat_format(fails).render(talk("ua", "", "b"), "a:4")
    with pytest.raises(DataConfigError, match="chat template: line 2"):
        chat_format("a\n{% for %}")


def test_short_cuts_of_the_sandbox_change_no_result() -> None:
    """Names that a dictionary has itself, missing keys, methods of texts, loops, namespaces."""
    template = (
        "{% set d = {'items': 1, 'get': 2, 'x': 3} %}{{ d.items is callable }}{{ d['items'] }}{{ d.x }}{{ d['x'] }}"
        "{{ d.y is defined }}{{ d['y'] is defined }}{{ d.get('y', 7) }}{{ d.keys() | list }}"
        "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }}"
        "{{ loop.nothing is defined }}{% endfor %}"
        "{% set ns = namespace(f='x'.upper, s='t', n=none) %}{{ ns.f() }}{{ ns.s }}{{ ns.n }}{{ ns.z is defined }}"
        "{{ 'aXb'.split('X') }}{{ 'a'.nothing is defined }}{{ 'x%d' % 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 'ab' * 2 }}{{ [1] * 2 }}"
        "{{ 'a'.center(5) }}{{ 'aa'.replace('a', 'b') }}{{ 'a b'.expandtabs() }}{{ '{} {x}'.format(1, x=2) }}"
        "{{ [1, 2.5] | sum }}{{ [[1], [2]] | sum(start=[]) }}{{ [{'a': 2}] | sum(attribute='a') }}{{ 'a' | center(3) }}"
        "{{ '%s-%s' | format(1, 2) }}{{ {'b': '<é>'} | tojson }}{{ [1] | tojson(indent=2) }}{{ dict(a=1).a }}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs = render_jinja_template([MESSAGES], chat_template=template)[0][0]
    assert render(template) == theirs
