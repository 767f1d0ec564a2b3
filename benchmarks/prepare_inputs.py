"""Inputs of benchmarks/prepare.py: a GPT-2 tokenizer folder, conversations, plain text. Run by it, in its own process.

    python benchmarks/prepare_inputs.py SAMPLES WORK --conversations N --copies K --text-mb M

Conversations are GSM8K, Alpaca in English and Chinese, and three chat sets, as {"messages"}; `--copies` repeats all of
them, each copy with another number in front of what its user says, so that no two records are equal. Plain text is the
texts of SAMPLES, then source files of installed packages in the order of their paths, blank lines between documents.
"""

import argparse
import gzip
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

Message = dict[str, str]
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TURNS = 32
FILES = 8
SHORT_TEXT_CHARACTERS = 60
MIN_CHARACTERS = 200
FILE_CHARACTERS = 2_000_000
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "system": "system"}


def write_tokenizer(samples: Path, folder: Path) -> None:
    """GPT-2's byte-level BPE with the three control tokens of the ChatML template, as a Hugging Face folder."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    source = samples / "tokenizers" / "gpt2"
    tokenizer = Tokenizer(BPE.from_file(str(source / "encoder.json"), str(source / "vocab.bpe")))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def conversations(samples: Path) -> Iterator[list[Message]]:
    """All conversations of the sample sets as role and content, the sets one after the other."""
    generation = samples / "generation"
    for record in _json_lines(generation / "gsm8k" / "train.jsonl"):
        yield _pair(record["question"], record["answer"])
    for language in ("en", "zh"):
        for record in _json(generation / "alpaca_demo" / f"alpaca_{language}_demo.json"):
            yield _pair("\n".join(filter(None, (record["instruction"], record["input"]))), record["output"])
    for record in _json(generation / "chat" / "glaive_toolcall_en_demo.json"):
        yield [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    for name in ("v1_sft_demo", "reason_tool_use_demo_50"):
        for record in _json_lines(generation / "chat" / f"{name}.jsonl"):
            yield [_flat(message) for message in record["messages"]]


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _flat(message: dict[str, Any]) -> Message:
    """A message whose content is a list of typed parts, with one text instead."""
    content = message["content"]
    text = content if isinstance(content, str) else "\n".join(str(part["value"]) for part in content)
    return {"role": message["role"], "content": text}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def usable(messages: list[Message]) -> bool:
    """Whether every user and assistant turn says something and no text looks like a control token."""
    texts = [message["content"] for message in messages]
    roles = {message["role"] for message in messages}
    return "assistant" in roles and all(texts) and not any("<|" in text for text in texts)


def variant(messages: list[Message], copy: int, index: int) -> list[Message]:
    """The conversation itself for copy 0, else with a number in front of what the user says first."""
    if copy == 0:
        return messages
    first = next(place for place, message in enumerate(messages) if message["role"] != "assistant")
    changed = {**messages[first], "content": f"({copy}-{index}) {messages[first]['content']}"}
    return [*messages[:first], changed, *messages[first + 1 :]]


def grouped(records: list[list[Message]], turns: int) -> Iterator[list[Message]]:
    """The same messages in conversations of about `turns` messages, system turns left out."""
    pending: list[Message] = []
    for record in records:
        pending += [message for message in record if message["role"] != "system"]
        if len(pending) >= turns:
            yield pending
            pending = []


def write_json_lines(path: Path, records: list[Any]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_messages(path: Path, records: list[list[Message]]) -> None:
    """Conversations as {"messages"} records."""
    write_json_lines(path, [{"messages": record} for record in records])


def texts(samples: Path, limit_bytes: int) -> list[str]:
    """Documents of plain text, up to `limit_bytes` of UTF-8: the sample texts, then sources of installed packages.

    Blank lines are taken out, so that they can stand between documents.
    """
    chosen, total = [], 0
    for text in (*_sample_texts(samples), *_sources()):
        lines = [line.rstrip("\r") for line in text.split("\n") if line and not line.isspace()]
        document = "\n".join(lines)
        if len(document) < MIN_CHARACTERS or "<|" in document or "\0" in document:
            continue
        total += len(document.encode("utf-8"))
        if total > limit_bytes:
            break
        chosen.append(document)
    return chosen


def _sample_texts(samples: Path) -> Iterator[str]:
    plain = samples / "pretraining"
    yield from (plain / "wiki_demo" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")
    yield from (record["text"] for record in _json_lines(plain / "c4_demo" / "c4_demo.jsonl"))
    yield from (plain / "cluecorpussmall" / "CLUECorpusSmall_sampled.txt").read_text(encoding="utf-8").split("\n")
    speeches = (plain / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
    yield from ("\n".join(speeches[start : start + 50]) for start in range(0, len(speeches), 50))
    with ZipFile(plain / "inaugural" / "inaugural.zip") as archive:
        members = [name for name in archive.namelist() if name.endswith(".txt")]
        yield from (archive.read(name).decode("latin-1") for name in members)
    for language in ("en", "de"):
        with gzip.open(samples / "generation" / "multi30k" / f"train.{language}.gz", "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        yield from ("\n".join(lines[start : start + 50]) for start in range(0, len(lines), 50))


def _sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def write_texts(folder: Path, documents: list[str]) -> None:
    """Files of about 2 MB of documents with blank lines between them."""
    folder.mkdir(parents=True)
    start, number = 0, 0
    while start < len(documents):
        stop, size = start, 0
        while stop < len(documents) and size < FILE_CHARACTERS:
            size += len(documents[stop])
            stop += 1
        content = "\n\n".join(documents[start:stop]) + "\n"
        (folder / f"{number:04d}.txt").write_text(content, encoding="utf-8", newline="")
        start, number = stop, number + 1


def write_files(folder: Path, documents: list[str]) -> None:
    """One file a document, names in their order."""
    folder.mkdir(parents=True)
    for index, document in enumerate(documents):
        (folder / f"{index:06d}.txt").write_text(document, encoding="utf-8", newline="")


def first_bytes(documents: list[str], limit_bytes: int) -> list[str]:
    """As many of the documents, spread evenly over all of them, as make up about `limit_bytes` of UTF-8."""
    total = sum(len(document.encode("utf-8")) for document in documents)
    return documents[:: max(1, total // limit_bytes)]


def main() -> None:
    """Write everything into WORK and print one JSON object that says what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--conversations", type=int, required=True, help="how many the slow comparison uses")
    parser.add_argument("--copies", type=int, required=True, help="times all conversations for the fast comparison")
    parser.add_argument("--slow-text-mb", type=float, required=True)
    parser.add_argument("--text-mb", type=float, required=True)
    parser.add_argument("--short-documents", type=int, required=True, help="documents of the repacking comparison")
    arguments = parser.parse_args()
    work: Path = arguments.work
    write_tokenizer(arguments.samples, work / "tokenizer")
    own = [messages for messages in conversations(arguments.samples) if usable(messages)]
    step = max(1, len(own) // arguments.conversations)
    few = own[::step][: arguments.conversations]
    many = [variant(record, copy, index) for copy in range(arguments.copies) for index, record in enumerate(own)]
    write_messages(work / "chat_few.jsonl", few)
    write_messages(work / "chat_tiny.jsonl", few[:1])
    write_messages(work / "chat_many.jsonl", many)
    write_messages(work / "chat_turns.jsonl", list(grouped(many, TURNS)))
    for part in range(FILES):
        write_messages(work / "chat_parts" / f"{part}.jsonl", few[part::FILES])
    documents = texts(arguments.samples, int(arguments.text_mb * 1e6))
    write_texts(work / "text_many", documents)
    write_texts(work / "text_few", first_bytes(documents, int(arguments.slow_text_mb * 1e6)))
    write_texts(work / "text_tenth", documents[::10])
    write_texts(work / "text_tiny", documents[-1:])
    write_files(work / "text_files", documents[::10])
    write_json_lines(work / "text.jsonl", [{"text": document} for document in documents])
    lines = [line for document in documents for line in document.splitlines() if len(line) >= SHORT_TEXT_CHARACTERS]
    count = arguments.short_documents
    short = [{"text": f"{index} {lines[index % len(lines)][:SHORT_TEXT_CHARACTERS]}"} for index in range(count)]
    write_json_lines(work / "short.jsonl", short)
    write_json_lines(work / "short_tiny.jsonl", short[:1])
    print(
        json.dumps(
            {
                "own": len(own),
                "few": len(few),
                "many": len(many),
                "documents": len(documents),
                "files": len(documents[::10]),
            }
        )
    )


if __name__ == "__main__":
    main()
