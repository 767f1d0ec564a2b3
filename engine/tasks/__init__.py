"""All that differs between tasks on the engine's side: one frozen `Task` in a file of its own for each.

May import errors; batches, transformers, torch and forward.py only inside functions, because `engine.sections` reads
the names here. Read first: task.py, then causal_lm.py; forward.py runs stock models on batches.
"""

from collections.abc import Mapping

from engine.tasks import (
    causal_lm,
    masked_lm,
    question_answering,
    semantic_roles,
    sequence_classification,
    token_classification,
)
from engine.tasks.task import Task

#: The tasks that the engine trains, by name.
TASKS: Mapping[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        causal_lm,
        sequence_classification,
        token_classification,
        semantic_roles,
        question_answering,
        masked_lm,
    )
}
#: The tasks whose data can be prepared and inspected, but not trained yet.
PREPARED_ONLY = ("seq2seq_lm",)
#: The task of records whose run file names none, where they are only prepared.
DEFAULT_TASK = causal_lm.TASK.name
