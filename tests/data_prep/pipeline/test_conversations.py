"""Conversations through a whole preparation: what a store holds and what is said, for every setting of `data.chat`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_fixtures import byte_level_folder, prepared, section, write_jsonl
from pyarrow import ipc, parquet

from data_prep.errors import BadDataError, DataConfigError, MissingInputError, UnusableError
from data_prep.prepare import _summary
from data_prep.token_store import TokenStore
from data_prep.tokenizer.open import open_tokenizer

CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TOOLS = """\
{%- for tool in tools or [] %}{{- '<|im_start|>tool\\n' + tool|tojson + '<|im_end|>\\n' }}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{- call.function.name + call.function.arguments|tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
#: Writes the reasoning of the last turn only.
THINKING = """\
{%- for m in messages %}{%- set words = m.content.split('</think>')[-1].lstrip() %}
{%- set thought = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content or m.reasoning_content else '' %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last and thought %}{{- '<think>\\n' + thought + '\\n</think>\\n' }}{%- endif %}
{{- words + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
STRICT = """\
{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
MARKS = ("<|im_start|>", "<|im_end|>")


def tokenizer(folder: Path, template: str | None = CHATML, extra: tuple[str, ...] = MARKS) -> Path:
    return byte_level_folder(folder / "tokenizer", template, extra=extra)


def turns(*pairs: str) -> list[dict[str, str]]:
    """Turns written as `s words`, `u words` and `a words`."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[pair[0]], "content": pair[2:]} for pair in pairs]


def store_of(folder: Path, records: Any, template: str | None = CHATML, **options: Any) -> TokenStore:
    path = records if isinstance(records, Path) else write_jsonl(folder / "a.jsonl", records)
    chat = options.pop("chat", {})
    values = section(folder, tokenizer(folder, template), path, row_tokens=512, chat=chat, **options)
    return prepared(values)[0]


def trained(store: TokenStore) -> list[str]:
    """The targets of every document as text."""
    opened = open_tokenizer(str(store.tokenizer_dir))
    found = []
    for document in range(store.num_documents):
        ids = np.asarray(store.tokens(document))[np.asarray(store.targets(document))]
        found.append(opened.decode(ids.tolist()))
    return found


def texts(store: TokenStore) -> list[str]:
    opened = open_tokenizer(str(store.tokenizer_dir))
    return [opened.decode(store.tokens(document).tolist()) for document in range(store.num_documents)]


THOUGHTS = [
    *({"role": "user", "content": "two?"}, {"role": "assistant", "content": "four", "reasoning_content": "FIRST"}),
    *({"role": "user", "content": "three?"}, {"role": "assistant", "content": "<think>SECOND</think>five"}),
    *({"role": "user", "content": "and?"}, {"role": "assistant", "content": "six", "thinking": "six"}),
]


def test_reasoning_that_a_template_drops_is_counted_and_said(tmp_path: Path) -> None:
    store = store_of(tmp_path, [{"messages": THOUGHTS}, {"messages": THOUGHTS[:2]}], THINKING)
    assert store.manifest["sources"][0]["notes"] == {"reasoning_lost": 2}
    (line,) = [line for line in _summary("train", store).splitlines() if line.startswith("reasoning lost")]
    assert "2 trained turns" in line and "`data.chat.train_turns: each`" in line
    assert trained(store)[0] == "four<|im_end|>five<|im_end|><think>\nsix\n</think>\nsix<|im_end|>"
    never = store_of(tmp_path, [{"messages": THOUGHTS[:2]}], CHATML)
    assert never.manifest["sources"][0]["notes"] == {"reasoning_lost": 1, "last_reasoning_lost": 1}
    assert "of these 1 end their conversation: give a template that writes reasoning" in _summary("train", never)


def test_each_trained_turn_in_a_document_of_its_own(tmp_path: Path) -> None:
    records = [{"messages": turns("u hi", "a hello")}, {"messages": THOUGHTS}, {"messages": turns("u more", "a words")}]
    store = store_of(tmp_path, records, THINKING, chat={"train_turns": "each"})
    assert "notes" not in store.manifest["sources"][0]
    assert trained(store) == [
        "hello<|im_end|>",
        "<think>\nFIRST\n</think>\nfour<|im_end|>",
        "<think>\nSECOND\n</think>\nfive<|im_end|>",
        "<think>\nsix\n</think>\nsix<|im_end|>",
        "words<|im_end|>",
    ]
    assert "FIRST" not in texts(store)[2] and texts(store)[2].count("<|im_start|>") == 4
    total = store.ledger["total"]
    assert (total["records_read"], total["documents"], total["extra_documents"]) == (3, 5, 2)
    assert [store.locate(document).rpartition(":")[2] for document in range(5)] == list("12223")
    flagged = [{"messages": [*turns("u hi"), {**turns("a bad")[0], "loss": 0}, *turns("u again", "a good")]}]
    assert trained(store_of(tmp_path / "b", flagged, chat={"train_turns": "each"})) == ["good<|im_end|>"]


def test_folded_and_merged_turns_make_records_fit(tmp_path: Path) -> None:
    double = {"messages": turns("s be brief", "u hello", "u are you there", "a yes", "a I am")}
    with pytest.raises((BadDataError, UnusableError), match="roles must alternate") as caught:
        store_of(tmp_path, [double], STRICT)
    for words in ("a.jsonl:1", "`data.chat.system: fold`", "`data.chat.merge_turns: true`", "data.unusable"):
        assert words in str(caught.value)
    with pytest.raises((BadDataError, UnusableError), match="merge_turns") as caught:
        store_of(tmp_path, [{"messages": turns("u a", "u b", "a c")}], STRICT)
    assert "data.chat.system" not in str(caught.value)
    store = store_of(
        tmp_path, [double, {"messages": turns("u x", "a y")}], STRICT, chat={"system": "fold", "merge_turns": True}
    )
    assert texts(store)[0] == (
        "<|im_start|>user\nbe brief\n\nhello\n\nare you there<|im_end|>\n<|im_start|>assistant\nyes\n\nI am<|im_end|>\n"
    )
    assert trained(store) == ["yes\n\nI am<|im_end|>", "y<|im_end|>"]
    assert store.manifest["sources"][0]["notes"] == {"systems_folded": 1, "turns_merged": 2}
    said = _summary("train", store)
    assert "folded: 1 system prompts" in said and "merged: 2 turns" in said
    uneven = [{"messages": [*turns("u a"), {**turns("a b")[0], "loss": 0}, *turns("a c")]}]
    with pytest.raises((BadDataError, UnusableError), match="of which one is trained and one is not, cannot be merged"):
        store_of(tmp_path, uneven, STRICT, chat={"merge_turns": True})
    with pytest.raises((BadDataError, UnusableError), match="no user turn follows the system prompt"):
        store_of(tmp_path, [{"messages": turns("u a", "a b", "s c")}], chat={"system": "fold"})


def test_flags_of_turns_and_records_decide_the_targets(tmp_path: Path) -> None:
    bad, good = {**turns("a BAD")[0], "loss": False}, turns("u again", "a GOOD")
    user = {**turns("u hi")[0], "train": True}
    store = store_of(tmp_path, [{"messages": [*turns("u hi"), bad, *good]}, {"messages": [user, *turns("a GOOD")]}])
    assert trained(store) == ["GOOD<|im_end|>", "hi<|im_end|>\nGOOD<|im_end|>".replace("\n", "")]
    with pytest.raises((BadDataError, UnusableError), match=r"messages\[1\] must not be trained"):
        store_of(tmp_path, [{"messages": [*turns("u hi"), bad, *good]}], chat={"train_on_prompt": True})
    records = [{"text": "the river", "weight": 0}, {"text": "the bridge", "weight": 1}, {"text": "old stone"}]
    with pytest.raises((BadDataError, UnusableError), match=r"a\.jsonl:1: nothing in this record would be trained"):
        store_of(tmp_path, records)
    store = store_of(tmp_path, records, min_targets=1)
    assert texts(store) == ["the bridge<|end|>", "old stone<|end|>"]
    assert store.ledger["total"]["dropped_at_encoding"] == {"no_targets": 1}


CALLS = [
    {
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": parameters}}}],
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "content": "done", "name": name},
            {"role": "assistant", "content": "ok", **more},
        ],
    }
    for name, parameters, arguments, more in (
        ("weather", {"city": {"type": "string"}}, {"city": "paris"}, {}),
        ("add", {"a": {"type": "number", "enum": [1, 2]}, "b": {"type": "number"}}, {"a": 2, "b": 2}, {"loss": False}),
        ("deep", {"place": {"type": "object", "properties": {"x": {"type": "integer"}}}}, {"place": {"x": 1}}, {}),
        ("none", {}, {}, {}),
    )
]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_table_gives_the_store_of_its_json_lines(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist(CALLS)
    path = tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with (ipc.new_file if kind == "file" else ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table)
    lines, columns = store_of(tmp_path / "lines", CALLS, TOOLS), store_of(tmp_path / "table", path, TOOLS)
    assert texts(lines) == texts(columns) and trained(lines) == trained(columns)
    assert all("null" not in text for text in texts(columns))
    assert "notes" not in lines.manifest["sources"][0]
    assert columns.manifest["sources"][0]["notes"]["nulls_left_out"] > 20
    assert "nulls left out: " in _summary("train", columns)


def test_maps_are_objects_and_nulls_of_json_lines_stay(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    call = pa.struct({"name": pa.string(), "arguments": kind})
    turn = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
    rows = [[{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": [("city", "paris")]}]}]]  # fmt: skip
    parquet.write_table(pa.table({"messages": pa.array(rows, pa.list_(turn))}), tmp_path / "a.parquet")
    assert 'f{"city": "paris"}' in texts(store_of(tmp_path, tmp_path / "a.parquet", TOOLS))[0]
    said = [
        *turns("u go"),
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"city": None}}]},
    ]
    assert 'f{"city": null}' in texts(store_of(tmp_path / "b", [{"messages": said, "system": None}], TOOLS))[0]


def test_prompts_go_through_the_template_where_the_run_file_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": "hello", "response": "how are you"}]
    assert texts(store_of(tmp_path, records)) == ["hellohow are you<|end|>"]
    store = store_of(tmp_path, records, chat={"apply_to": ["prompt", "alpaca"]})
    assert texts(store) == ["<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhow are you<|im_end|>\n"]
    assert trained(store) == ["how are you<|im_end|>"]
    values = section(tmp_path, tokenizer(tmp_path), tmp_path / "a.jsonl", chat={"apply_to": "prompt"})
    with pytest.raises(DataConfigError, match=r"data\.chat\.apply_to: task seq2seq_lm takes no conversations"):
        prepared(values, "seq2seq_lm")


def test_tokens_that_a_template_needs_and_the_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("u a", "a b")}])
    folder = tokenizer(tmp_path, CHATML, extra=())
    with pytest.raises(DataConfigError) as caught:
        prepared(section(tmp_path, folder, path))
    assert "'<|im_start|>' and '<|im_end|>' are no tokens of the tokenizer" in str(caught.value)
    assert "`fulltune tokenizer add MODEL OUT --special '<|im_start|>' --special '<|im_end|>'`" in str(caught.value)
    prepared(section(tmp_path, folder, path, chat={"allow_untrained_stop": True}))


def named(folder: Path, **templates: str) -> Path:
    made = tokenizer(folder, None)
    config = json.loads((made / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def test_named_templates_are_chosen_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("u a", "a b")}])
    calls = write_jsonl(tmp_path / "b.jsonl", CALLS)
    both = named(tmp_path, default=CHATML, tool_use=TOOLS)
    for path, template in ((plain, CHATML), (calls, TOOLS)):
        store, _ = prepared(section(tmp_path, both, path, row_tokens=512))
        assert (store.tokenizer_dir / "chat_template.jinja").read_text() == template
    store, _ = prepared(section(tmp_path, both, plain, chat={"template": "tool_use"}))
    assert (store.tokenizer_dir / "chat_template.jinja").read_text() == TOOLS
    (both / "additional_chat_templates").mkdir()
    (both / "additional_chat_templates" / "mine.jinja").write_text(STRICT)
    store, _ = prepared(section(tmp_path, both, plain, chat={"template": "mine"}))
    assert (store.tokenizer_dir / "chat_template.jinja").read_text() == STRICT
    with pytest.raises(
        MissingInputError, match=r"nope: no such file .*; the tokenizer's own templates are default, tool_use, mine"
    ):
        prepared(section(tmp_path, both, plain, chat={"template": "nope"}))
    (both / "additional_chat_templates" / "mine.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(BadDataError, match=r"mine\.jinja: not UTF-8 \(byte 3\)"):
        prepared(section(tmp_path, both, plain, chat={"template": "mine"}))
    (both / "additional_chat_templates" / "mine.jinja").unlink()
    without = named(tmp_path / "c", chat=CHATML, tool_use=TOOLS)
    with pytest.raises(
        DataConfigError, match=r"no chat template named default, but chat, tool_use; .*data\.chat\.template: chat"
    ):
        prepared(section(tmp_path, without, plain))
