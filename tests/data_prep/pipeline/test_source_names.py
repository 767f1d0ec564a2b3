"""Sources are called by the run file, else by what tells them apart."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.config import SourceConfig
from data_prep.pipeline.source_names import source_names
from data_prep.sources.records import WHOLE_FILE, SourceFile


def names(*sources: dict[str, Any] | str) -> list[str]:
    configs = [SourceConfig.model_validate({"path": one} if isinstance(one, str) else one) for one in sources]
    first = [[_file(config)] for config in configs]
    return source_names(configs, first)


def _file(config: SourceConfig) -> SourceFile:
    path = str(
        Path(config.path or config.hub or next(iter((config.aligned or {}).values()))).parent / "first.one.jsonl"
    )
    if config.aligned:
        path = next(iter(config.aligned.values()))
    return SourceFile(path, path, "jsonl", "none", config, 1, 1, "0", (WHOLE_FILE,))


@pytest.mark.parametrize(
    ("sources", "wanted"),
    [
        (["train.jsonl"], ["train"]),
        (["data/train.jsonl.gz"], ["train"]),
        (["train.en.jsonl"], ["train"]),
        (["folder"], ["folder"]),
        (["data.zip"], ["data"]),
        (["data.zip!in/train.jsonl"], ["train"]),
        (["crawl/**/*.parquet"], ["crawl"]),
        (["/data/crawl/*/*.jsonl"], ["crawl"]),
        (["/data/wiki/part-*.jsonl"], ["part"]),
        (["/data/xquad.*.json"], ["xquad"]),
        (["/data/*-train.jsonl.gz"], ["train"]),
        (["data/*.txt"], ["data"]),
        (["data.zip!**/*.txt"], ["data"]),
        (["data.zip!in/*.txt"], ["in"]),
        (["*.txt"], ["first"]),
        (["aclImdb/train/[np]*/*.txt"], ["train"]),
        (["xquad.en.json", "xquad.zh.json", "xquad.de.json"], ["en", "zh", "de"]),
        (["d/xquad.en.json", "d/xquad.zh.json"], ["en", "zh"]),
        (["xquad.*.json", "xquad.en.json"], ["xquad", "en"]),
        (["en/train.jsonl", "de/train.jsonl"], ["en", "de"]),
        (["/x/en/data/train.jsonl", "/x/de/data/train.jsonl"], ["en", "de"]),
        (["a.zip!train.jsonl", "b.zip!train.jsonl"], ["a", "b"]),
        (["train.jsonl", "train.more.jsonl"], ["train", "train.more"]),
        (["train.v1.jsonl", "train.v2.csv"], ["v1", "v2"]),
        (["wiki-en.txt", "wiki-de.txt"], ["wiki-en", "wiki-de"]),
        (["a/*.jsonl", "b/*.jsonl"], ["a", "b"]),
        (["a.jsonl", "b/*.jsonl"], ["a", "b"]),
        (["a.jsonl", "a.jsonl"], ["a", "a-2"]),
        (["a.jsonl", "b.jsonl", "a.jsonl"], ["a", "b", "a-2"]),
        ([{"hub": "owner/set"}], ["set"]),
        ([{"hub": "owner/set", "config": "en"}, {"hub": "owner/set", "config": "de"}], ["en", "de"]),
        ([{"hub": "owner/set", "split": "a"}, {"hub": "owner/set", "split": "b"}], ["a", "b"]),
        ([{"hub": "me/set"}, {"hub": "you/set"}], ["me", "you"]),
        ([{"path": "a.jsonl", "name": "mine"}, "a.jsonl"], ["mine", "a"]),
        ([{"path": "a.x.jsonl", "name": "a"}, "a.y.jsonl"], ["a", "a-2"]),
        ([{"path": "a.jsonl", "name": "same"}, {"path": "b.jsonl", "name": "same"}], ["same", "same-2"]),
        ([{"aligned": {"source": "corpus.en", "target": "corpus.de"}}], ["corpus"]),
    ],
)
def test_names(sources: list[Any], wanted: list[str]) -> None:
    assert names(*sources) == wanted
