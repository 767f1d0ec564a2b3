"""A model is looked at before ranks start, in a process of its own: ``python -m engine.model.examine < request``.

Everything is done that building it does, without a weight: its configuration is read, the model is made on the meta
device, packed rows are tried on it, its files' headers are matched with it. The launcher, which has no torch, sends
a line of JSON and reads one.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import FulltuneError
from engine.finding import Finding, failure
from engine.fit.labels import names_of
from engine.fit.model_facts import ModelFacts
from engine.model.build import StoreFacts, fitting_task, freeze_and_check, made_model, model_config, model_folder
from engine.model.dropout import set_dropout
from engine.model.empty_model import check_missing, has_head
from engine.model.frozen import untrained_lines
from engine.model.model_files import FileTensor, read_model_files
from engine.model.positions import positions_of
from engine.model.weight_names import NameMap, map_names
from engine.sections import ModelSection
from engine.tasks import TASKS
from engine.tasks.task import Task

#: Nothing of a store is needed: what it must agree on with the model is compared afterwards.
_NO_STORE = StoreFacts(vocab_size=0, pad_id=0, bos_id=None, eos_id=None, label_names=())


def examine(
    section: ModelSection, task: Task, needs_weights: bool, one_document_a_row: bool
) -> tuple[ModelFacts | None, list[Finding]]:
    """The facts of a model, and everything that would stop a run from building it; no facts if it cannot be built."""
    findings: list[Finding] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except FulltuneError as error:
            findings.append(failure("model", error))
            return None

    folder = attempt(lambda: model_folder(section))
    if findings:
        return None, findings
    made = attempt(lambda: model_config(section, folder, _NO_STORE, None, None))
    if made is None:
        return None, findings
    config = made[0]
    fitting = attempt(lambda: fitting_task(section, task, _NO_STORE, one_document_a_row))
    if fitting is None:
        return None, findings
    task = fitting
    reads = folder is not None and section.init == "pretrained" and needs_weights
    stored: dict[str, FileTensor] = (attempt(lambda: read_model_files(folder, config)) if reads else None) or {}
    if (dropout := section.dropout) is not None:
        attempt(lambda: set_dropout(config, dropout))
    model = attempt(lambda: made_model(section, folder, config, task, 0, stored, is_empty=True))
    if model is None:
        return None, findings
    attempt(lambda: freeze_and_check(model, config, task, section))
    name = "model.config" if folder is None else f"model.path {section.path}"
    rows = int(model.get_input_embeddings().weight.shape[0])
    facts = ModelFacts(name, rows, positions_of(model), names_of(config.id2label) if task.new_head else ())
    if stored:
        names = attempt(lambda: _match(model, stored, task))
        if names is not None:
            facts = dataclasses.replace(facts, has_head=task.new_head and has_head(model, names))
            findings += map(_warning, untrained_lines(model, names.missing, ()))
    return facts, findings


def _match(model: Any, stored: Mapping[str, FileTensor], task: Task) -> NameMap:
    """The files' weights by the model's names. DataError for weights that are not the model's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = map_names(model, stored, shapes, other_heads=task.new_head)
    check_missing(model, names, task, dict(stored))
    return names


def _warning(line: str) -> Finding:
    found, _, to_do = line.removeprefix("warning: ").partition("; ")
    return Finding("model", "warning", found, to_do)


def main() -> int:
    """Answer one request. Always 0: the launcher reads the findings."""
    request = json.load(sys.stdin)
    section = ModelSection.model_validate(request["model"])
    task, one_document_a_row = TASKS[request["task"]], request["one_document_a_row"]
    facts, findings = examine(section, task, request["needs_weights"], one_document_a_row)
    values = {
        "facts": None if facts is None else dataclasses.asdict(facts),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    print(json.dumps(values), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
