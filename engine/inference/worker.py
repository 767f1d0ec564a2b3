"""A process of an evaluation or of predictions: ``python -m engine.inference.worker FOLDER NUMBER``.

It takes every n-th micro-batch of the plan in FOLDER, writes its part, and prints the number of rows of each
micro-batch when it is done. The micro-batches are those of an evaluation in training, so the figures are too.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

from data_prep.token_store import TokenStore, open_rows
from engine.errors import INTERNAL, FulltuneError
from engine.figures import entries_of
from engine.inference.plan import Plan, error_path, part_path
from engine.ranks.liveness import end_with_parent


def main() -> None:
    """Do the work; a failure is a file for the parent and its exit code."""
    end_with_parent(lambda _reason: sys.exit(INTERNAL))
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    progress, sys.stdout = sys.stdout, sys.stderr  # lines for people go past the parent, which reads numbers
    try:
        from engine.model.cpu_bf16 import multiply_bf16_in_fp32

        multiply_bf16_in_fp32()
        work(Plan.read(folder), folder, number, progress)
    except Exception as error:
        expected = isinstance(error, FulltuneError) or hasattr(error, "exit_code")
        if not expected:
            traceback.print_exc()
        _fail(error_path(folder, number), error, expected)


def _fail(path: Path, error: Exception, expected: bool) -> NoReturn:
    code = int(getattr(error, "exit_code", INTERNAL))
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    path.write_text(json.dumps({"code": code, "message": message}), encoding="utf-8")
    sys.exit(code)


def work(plan: Plan, folder: Path, number: int, progress: IO[str]) -> None:
    """Do the work of process `number`; `progress` gets a line with the number of rows for each micro-batch."""
    import torch

    from engine.batches import segments_of
    from engine.inference.load import load_model
    from engine.micro_batches import MicroBatches, groups_of_sources
    from engine.tasks.task import STILL

    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    store = TokenStore.open(Path(plan.store))
    rows = open_rows(store, plan.row_tokens)
    model = load_model(plan.model, plan.settled_task(store), plan.one_document_a_row, store, rows, device)
    task = model.task
    groups = groups_of_sources(rows, MicroBatches(plan.micro_rows, plan.micro_tokens, not task.packs))
    with part_path(folder, number).open("w", encoding="utf-8") as part, torch.no_grad():
        for source, group in groups[number :: plan.workers]:
            batch = task.batch(store, rows, group, int(group[-1]), STILL).to(device)
            output = model(batch)
            documents, starts, _, _ = segments_of(rows, group)
            lines: list[Any]
            if plan.predicts:
                assert task.predictions is not None
                lines = list(zip(documents.tolist(), task.predictions(output, batch, store), strict=True))
            else:
                places = zip(documents.tolist(), starts.tolist(), strict=True)
                lines = list(entries_of(task.results(output, batch), places, source))
            part.writelines(json.dumps(line) + "\n" for line in lines)
            print(len(group), file=progress, flush=True)


if __name__ == "__main__":
    main()
