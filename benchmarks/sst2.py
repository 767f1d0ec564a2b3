"""A small BERT with random weights on a thousand sentences of SST-2, beside a bag of words.

    python benchmarks/sst2.py [--seeds 3] [--data FOLDER] [--work FOLDER]

The shipped recipe (launcher/recipes/classify.yaml) is run by `fulltune train` once a seed; the score is the
development-set accuracy of the best evaluation, as the recipe keeps it. The baseline is logistic regression
on word counts, its L2 penalty chosen on a tenth of the training sentences. Last line: one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
TRAIN_SENTENCES = 1000
Labelled = list[tuple[str, int]]


def read_tsv(path: Path) -> Labelled:
    """Sentence and 0 or 1, as the upstream files have them (no header)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines)]


def write_records(path: Path, sentences: Labelled) -> None:
    """The same as the records of the classification recipe."""
    names = ("negative", "positive")
    records = ({"text": text, "label": names[label]} for text, label in sentences)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def word_counts(sentences: Labelled, vocabulary: dict[str, int]) -> torch.Tensor:
    """(sentences, words + 1), the last column constant."""
    counts = torch.zeros(len(sentences), len(vocabulary) + 1)
    counts[:, -1] = 1.0
    for row, (text, _) in enumerate(sentences):
        for word, count in Counter(text.split()).items():
            if word in vocabulary:
                counts[row, vocabulary[word]] = count
    return counts


def fit_bag_of_words(train: Labelled, test: Labelled, penalty: float) -> float:
    """Accuracy on `test` of logistic regression on word counts."""
    words = sorted({word for text, _ in train for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(words)}
    features, labels = word_counts(train, vocabulary), torch.tensor([float(label) for _, label in train])
    weights = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ weights, labels) + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        predicted = word_counts(test, vocabulary) @ weights > 0
    return float((predicted == torch.tensor([label == 1 for _, label in test])).float().mean())


def bag_of_words(train: Labelled, test: Labelled) -> float:
    """The baseline, its penalty chosen on the last tenth of `train`."""
    cut = len(train) * 9 // 10
    penalties = [10.0**-exponent for exponent in (1, 2, 3, 4, 5)]
    best = max(penalties, key=lambda penalty: fit_bag_of_words(train[:cut], train[cut:], penalty))
    return fit_bag_of_words(train, test, best)


def run_recipe(work: Path, tokenizer: Path, seed: int) -> float:
    """Best development-set accuracy of one run of the recipe."""
    run_dir = work / f"run-{seed}"
    overrides = {
        "run_dir": run_dir, "seed": seed, "data.store_dir": work / "stores", "data.train": work / "train.jsonl",
        "data.validation": work / "dev.jsonl", "data.tokenizer": tokenizer, "log.tensorboard": "false",
    }  # fmt: skip
    recipe = ROOT / "launcher" / "recipes" / "classify.yaml"
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "launcher.cli", "train", str(recipe), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return max(line["accuracy"] for line in lines if line["kind"] == "evaluation" and line["step"] > 0)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    samples = Path(os.environ.get("FULLTUNE_SAMPLES", ROOT.parent / "shared" / "data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=samples, help="folder with classification/sst2 and tokenizers/")
    parser.add_argument("--work", type=Path, help="where to train; default: a temporary folder")
    arguments = parser.parse_args()
    train = read_tsv(arguments.data / "classification" / "sst2" / "train.tsv")[:TRAIN_SENTENCES]
    test = read_tsv(arguments.data / "classification" / "sst2" / "dev.tsv")
    tokenizer = arguments.data / "tokenizers" / "bert_uncased_en" / "google_uncased_en_vocab.txt"
    majority = max(Counter(label for _, label in test).values()) / len(test)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write_records(work / "train.jsonl", train)
        write_records(work / "dev.jsonl", test)
        baseline = bag_of_words(train, test)
        print(f"{len(train)} training sentences, {len(test)} development sentences")
        print(f"majority class      {majority:.1%}\nbag of words        {baseline:.1%}", flush=True)
        scores = []
        for seed in range(1, arguments.seeds + 1):
            scores.append(run_recipe(work, tokenizer, seed))
            print(f"BERT, seed {seed}        {scores[-1]:.1%}", flush=True)
    mean = statistics.mean(scores)
    print(f"BERT, mean          {mean:.1%}")
    print(json.dumps({"majority": majority, "bag_of_words": baseline, "scores": scores, "mean": mean}))


if __name__ == "__main__":
    main()
