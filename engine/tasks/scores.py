"""A score for each text or pair, as similarity: its loss and its figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from engine.tasks.task import DocumentResult, Output, document_results

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.token_store import TokenStore
    from engine.batches import Batch

METRICS: Mapping[str, Literal["min", "max"]] = {"pearson": "max", "spearman": "max", "mse": "min", "loss": "min"}


def loss(logits: "Tensor", targets: "Tensor") -> Output:
    """The squared error of the first logit of (U, 1) for scores (U,), in fp32.

    A target is a document, so the loss of a step is the mean over documents, as transformers defines it. Without
    gradients the values are "losses" (U,) and "predicted" (U,), fp32.
    """
    import torch

    predicted = logits.float()[:, 0]
    losses = (predicted - targets).square()
    return Output(losses.sum(), {} if torch.is_grad_enabled() else {"losses": losses, "predicted": predicted}, {})


def results(output: Output, batch: "Batch") -> list[DocumentResult]:
    """With the true and the predicted score of each document."""
    true, guessed = batch.target_ids.tolist(), output.values["predicted"].tolist()
    details = [{"score": score, "predicted": guess} for score, guess in zip(true, guessed, strict=True)]
    return document_results(output.values["losses"], batch.target_owners, len(batch.rows), details)


def figures(results: Sequence[DocumentResult], _store: "TokenStore") -> dict[str, float]:
    """Pearson's and Spearman's correlation over all documents, and the mean squared error."""
    import numpy as np

    from engine.tasks.metrics import score_figures

    truth, predicted = (
        np.array([result.details[key] for result in results], dtype=np.float64) for key in ("score", "predicted")
    )
    return score_figures(truth, predicted)


def predictions(output: Output, _batch: "Batch", _store: "TokenStore") -> list[dict[str, Any]]:
    """The score of each document."""
    return [{"score": score} for score in output.values["predicted"].tolist()]
