"""What a task asks of the model: batch in, summed loss out.

`TaskModel` is what DeepSpeed wraps. Its forward runs the stock Hugging Face model, so every
family works that transformers supports, and what is trained is what an export computes. A new
task is a case in each of the three `match` statements of this file and one encode function in
data_prep.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch, RowIndex, Rows64, Store, packed_batch, padded_batch
from engine.config import TaskName
from engine.errors import DataError


class TaskModel(nn.Module):
    """A Hugging Face model together with its task.

    forward(batch) returns (loss_sum, predictions): the fp32 sum over targets of the cross-entropy,
    and for classification the predicted label of each target (U,), else None. With
    ``return_logits=True`` it returns the logits at the target positions, (U, V), instead.
    """

    def __init__(self, model: Any, task: TaskName):
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch, return_logits: bool = False) -> tuple[Tensor, Tensor | None]:
        match self.task:
            case "causal_lm":
                logits = causal_logits(self.model, batch)
            case "sequence_classification":
                logits = classification_logits(self.model, batch)[batch.target_positions]
        if return_logits:
            return logits, None
        loss_sum = F.cross_entropy(logits.float(), batch.target_ids, reduction="sum")
        predictions = logits.detach().argmax(-1) if self.task == "sequence_classification" else None
        return loss_sum, predictions


def causal_logits(model: Any, batch: Batch) -> Tensor:
    """Next-token logits at the batch's target positions, (U, V): the output layer sees only those."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seq_lens_q=batch.document_ends,
        cu_seq_lens_k=batch.document_ends,
        max_length_q=batch.longest_document_tokens,
        max_length_k=batch.longest_document_tokens,
        logits_to_keep=batch.target_positions,
        use_cache=False,
    )
    return cast(Tensor, output.logits).squeeze(0)


def classification_logits(model: Any, batch: Batch) -> Tensor:
    """Label logits of each row, (B, L).

    Heads that pool the last token get it by the stored length: the stock ones search for it by
    comparing ids with the padding or end token, which is wrong as soon as a text contains one.
    Encoders pool the first token, or a masked mean, and need no help.
    """
    assert batch.lengths is not None
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    mask = (positions < batch.lengths[:, None]).long()
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask}
    last = (torch.arange(len(batch.lengths), device=mask.device), batch.lengths - 1)
    if model.config.is_encoder_decoder:
        ends = batch.input_ids[last]
        if (ends != model.config.eos_token_id).any():
            raise DataError(
                f"documents do not end with the model's end token {model.config.eos_token_id}, which its "
                "classification head needs: use the model's own tokenizer, and drop over-long records"
            )
        # The model shifts its own input right for the decoder, as the stock class does.
        decoder_ids = model._shift_right(batch.input_ids)
        hidden = model.base_model(**inputs, decoder_input_ids=decoder_ids, use_cache=False).last_hidden_state
        return cast(Tensor, model.classification_head(hidden[last]))
    if hasattr(model, "score"):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return cast(Tensor, model.score(hidden[last]))
    if (getattr(model.config, "type_vocab_size", None) or 1) > 1:  # BERT kinds tell the texts of a pair apart
        assert batch.pair_starts is not None
        starts = batch.pair_starts[:, None]
        inputs["token_type_ids"] = ((starts > 0) & (positions >= starts)).long() * mask
    return cast(Tensor, model(**inputs).logits)


def build_batch(task: TaskName, store: Store, index: RowIndex, rows: Rows64, filler_row: int) -> Batch:
    """The tensors of `rows` as the task arranges them; `filler_row` stands in where there are none."""
    match task:
        case "causal_lm":
            return packed_batch(store, index, rows, filler_row)
        case "sequence_classification":
            return padded_batch(store, index, rows, filler_row)


def auto_class(task: TaskName) -> Any:
    """The transformers class that loads this task's models."""
    import transformers

    match task:
        case "causal_lm":
            return transformers.AutoModelForCausalLM
        case "sequence_classification":
            return transformers.AutoModelForSequenceClassification
