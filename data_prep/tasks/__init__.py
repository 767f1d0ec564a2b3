"""The data halves of the tasks: one file a task, which is all that data preparation knows of it.

May import encode, shapes, token_store, and the types of chat, tokenizer and sources.
Read first: data_task.py, then token_classification.py.
"""

from data_prep.tasks import (
    causal_lm,
    masked_lm,
    question_answering,
    semantic_roles,
    seq2seq_lm,
    sequence_classification,
    token_classification,
)

TASKS = {
    module.TASK.name: module.TASK
    for module in (
        causal_lm,
        sequence_classification,
        token_classification,
        semantic_roles,
        question_answering,
        masked_lm,
        seq2seq_lm,
    )
}
