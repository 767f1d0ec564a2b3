"""The rows of benchmarks/scores.py: data, split, settings, and published figures where the split is the published one.

Learning rates and epochs are changed by what the tenth that is held out of train gives, never by what is scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import scores_data as data

ROWS_A_STEP = 32
#: A run of two CPU ranks stays below eight minutes: steps are cut, never records.
MOST_STEPS = 600


@dataclass(frozen=True)
class Published:
    """A figure of somebody else, and where it stands."""

    figure: str
    source: str


@dataclass(frozen=True)
class Row:
    """A data set, how it is trained on, and what is scored."""

    name: str
    title: str
    task: str
    read: data.Read
    metric: str
    split: str
    epochs: float
    learning_rate: float
    row_tokens: int
    write: data.Write = data.write_lines
    count: Callable[[Sequence[Any]], int] = len
    num_seeds: int = 1
    published: tuple[Published, ...] = ()
    note: str = ""
    #: Keys of the run file: of a source, and of its data section.
    reading: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=lambda: {"overlong": "truncate"})

    def steps(self, train: Sequence[Any]) -> int:
        """Steps of a whole run on these records."""
        return min(MOST_STEPS, -(-int(self.count(train) * self.epochs) // ROWS_A_STEP))


#: A tag of what is scored that train has not is a word that is wrong.
_TAGS = {"overlong": "truncate", "unknown_labels": "count_wrong"}
_CUT = "only its dev part is here: {} is scored, cut by a hash of the {}; no published figure is comparable"
ROWS = (
    Row(
        "sst2", "SST-2, sentiment", "sequence_classification", data.sst2, "accuracy",
        "6,920 sentences of train, scored on the 872 of dev", 3, 1e-4, 96, num_seeds=3,
        published=(
            Published("91.5 MiniLM-L6, trained on GLUE's 67,349 phrases", "Wang et al. 2020, arXiv:2002.10957"),
        ),
    ),
    Row(
        "clinc", "CLINC-150 small, intents", "sequence_classification", data.clinc, "accuracy",
        "7,500 requests of train, scored on the 4,500 of test; those out of scope left out", 3, 2e-4, 64, num_seeds=3,
    ),
    Row(
        "stsb", "STS-B, similarity", "sequence_classification", data.stsb, "pearson",
        "5,749 pairs of train, scored on the 1,500 of dev", 3, 1e-4, 128, num_seeds=3,
        published=(
            Published("88.6 BERT-base, dev", "transformers, examples/pytorch/text-classification/README.md"),
            Published("85.5 cross-encoder TinyBERT-L4, test", "sbert.net, pretrained cross-encoders"),
        ),
    ),
    Row(
        "snli", "SNLI, inference", "sequence_classification", data.snli, "accuracy",
        _CUT.format("a fifth of its 9,842 pairs", "premise"), 2, 5e-5, 128,
        note="the base model has seen SNLI",
    ),
    Row(
        "wnut17", "WNUT17, entities", "token_classification", data.wnut17, "f1",
        "3,394 posts of train, scored on the 1,009 of dev; published figures are of test, which is not here",
        5, 2e-4, 128, num_seeds=3, data=_TAGS,
    ),
    Row(
        "ud_pos", "UD EWT, parts of speech", "token_classification", data.ud_pos, "accuracy",
        _CUT.format("a fifth of its 2,001 sentences", "document"), 8, 3e-4, 128, data=_TAGS,
    ),
    Row(
        "up_roles", "UP EWT, semantic roles", "semantic_roles", data.up_roles, "f1",
        _CUT.format("a fifth of its sentences", "document"), 4, 2e-4, 192, data.write_conllup, data.num_predicates,
        reading={"format": "conllup"},
        data={**_TAGS, "min_targets": 1},
    ),
    Row(
        "policyqa", "PolicyQA, answers", "question_answering", data.policyqa, "f1",
        _CUT.format("a fifth of its 3,809 questions", "context"), 2, 1e-4, 320, data.write_squad, data.num_questions,
        data={"stride_tokens": 128},
    ),
)  # fmt: skip
QUICK = ("clinc", "ud_pos")
