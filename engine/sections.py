"""The sections of a run file as typed values, each in a class of its own. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.arithmetic import DEFAULT_SHARD_BYTES, byte_count
from engine.tasks import TASKS

if TYPE_CHECKING:
    MetricName = str
else:  # so that errors and the JSON schema have the names
    MetricName = Literal[tuple(dict.fromkeys(name for task in TASKS.values() for name in task.known_metrics))]


class Section(BaseModel):
    """A strict section: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _path_from_text(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _bytes_from_text(value: Any) -> Any:
    return byte_count(value) if isinstance(value, str) else value


FilePath = Annotated[Path, BeforeValidator(_path_from_text)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]


class StoreSection(BaseModel):
    """The keys of ``data`` that the engine reads; the rest is data_prep's and is not checked here."""

    model_config = ConfigDict(extra="allow", frozen=True)

    store_dir: FilePath = Field(description="folder that holds the prepared token stores")
    row_tokens: PositiveInt = Field(description="length of a row, in tokens")

    @property
    def one_document_a_row(self) -> bool:
        """True with ``packing: none``: what packs may then be trained on padded rows instead."""
        return (self.model_extra or {}).get("packing") == "none"


class ModelSection(Section):
    path: str | None = Field(None, description="folder with a Hugging Face model, or its name on the Hub")
    config: dict[str, Any] | None = Field(
        None, description="model configuration in place of a folder, for init: random (needs model_type)"
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained: the weights in path; random: fresh weights from the configuration"
    )
    revision: str | None = Field(None, description="commit, branch or tag of a Hub model")
    activation_checkpointing: bool = Field(
        True, description="recompute activations in the backward pass instead of keeping them"
    )
    freeze: list[str] = Field(
        [], description="parameters that are not trained: shell patterns over their names, as vision_tower.*"
    )
    train: Literal["all", "head"] = Field(
        "all", description="head: freeze all but the task's head, the baseline of full fine-tuning"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="in place of every dropout probability of the configuration; null: as it says"
    )
    new_head: bool = Field(
        False, description="make the head anew, also where the model has one, which may be for other labels"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.path and model.config")
        if self.config is not None and self.init == "pretrained":
            raise ValueError("model.config describes an untrained model: set model.init to random, or give model.path")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs model_type (for example llama, bert, t5)")
        if self.new_head and self.init == "random":
            raise ValueError("model.new_head has no effect with model.init random: all weights are made anew")
        return self


class LossSection(Section):
    label_smoothing: Fraction = Field(
        0.0, description="share of each target's weight that is spread evenly over all labels; evaluations leave it out"
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0.0)]] | None = Field(
        None,
        description="balanced: rare labels weigh more, all labels the same in sum; or a weight for each label that"
        " is named, the others have 1; scaled to the mean 1 over the training targets; evaluations leave them out",
    )

    def given(self) -> list[str]:
        """The keys that change something, dotted."""
        keys = {"loss.label_smoothing": self.label_smoothing, "loss.class_weights": self.class_weights}
        return [key for key, value in keys.items() if value]


class OptimizerSection(Section):
    learning_rate: float = Field(gt=0, description="highest learning rate of the schedule")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False, description="AdamW's decay of both moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each layer's learning rate as a share of that of the layer above; 1 for the head"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; never of biases and norms")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = Field(
        "cosine", description="shape of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from zero")
    decay_fraction: Fraction = Field(0.1, description="warmup_stable_decay: last share of the steps that decays")
    final_fraction: Fraction = Field(0.0, description="learning rate at the end, as a share of learning_rate")


class BatchSection(Section):
    """The batch is stated for the whole job; accumulation follows from ranks and micro_rows or micro_tokens."""

    global_rows: PositiveInt | None = Field(None, description="rows of one step over all ranks")
    global_tokens: PositiveInt | None = Field(None, description="the same in tokens: a multiple of data.row_tokens")
    micro_rows: PositiveInt | Literal["auto"] = Field(
        1, description="rows one rank takes through the model at once; auto: the most that fit, found at the start"
    )
    micro_tokens: PositiveInt | None = Field(
        None,
        description="instead of micro_rows: as many rows of similar length as fit in so many tokens; rows that"
        " must be padded count as the longest of them",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.global_rows is None) == (self.global_tokens is None):
            raise ValueError("give exactly one of batch.global_rows and batch.global_tokens")
        if self.micro_tokens is not None and self.micro_rows != 1:
            raise ValueError("give at most one of batch.micro_rows and batch.micro_tokens")
        return self

    @property
    def known_micro_rows(self) -> int:
        """`micro_rows`; 1 as long as it is "auto"."""
        return 1 if self.micro_rows == "auto" else self.micro_rows

    def with_micro_rows(self, rows: int) -> "BatchSection":
        """The same with the number that was found for "auto"."""
        return self.model_copy(update={"micro_rows": rows})


class DurationSection(Section):
    steps: PositiveInt | None = Field(None, description="optimizer updates")
    epochs: float | None = Field(None, gt=0, description="passes over the rows, rounded up to whole steps")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of duration.steps and duration.epochs")
        return self


class AnswersSection(Section):
    """How answers to questions are taken from their contexts and scored."""

    max_tokens: PositiveInt = Field(30, description="longest answer, in tokens")
    n_best: PositiveInt = Field(20, description="answers of a question that a prediction lists")
    null_threshold: float | None = Field(
        None,
        description="a question gets no answer where the score of none less that of the best span is above this;"
        " null: 0 where the evaluated data have questions without an answer, else each gets one",
    )
    language: Literal["en", "zh"] = Field(
        "en", description="exact match and F1 as SQuAD has them (en) or as CMRC 2018 has them (zh)"
    )


class MaskingSection(Section):
    fraction: float = Field(
        0.15, gt=0, lt=1, description="masked language modelling: share of a text's words that a step masks"
    )


class EvaluationSection(Section):
    eval_every_steps: PositiveInt | None = Field(None, description="evaluate each so many steps; null: only at the end")
    micro_rows: PositiveInt | None = Field(None, description="rows a rank evaluates at once; null: as in batch")
    metric: MetricName | None = Field(
        None, description="what best and patience go by; null: the task's own (see launcher/recipes)"
    )
    mode: Literal["min", "max"] | None = Field(
        None, description="whether lower or higher is better; null: as the metric says, which it must not contradict"
    )
    patience: PositiveInt | None = Field(None, description="stop after so many evaluations without improvement")
    least_change: float = Field(0.0, ge=0, description="the metric must improve by more than this to count as better")
    out_of_scope_label: str | None = Field(
        None,
        description="the label of records that belong to none of the others, as oos: its recall and the accuracy on"
        " all other records are figures too",
    )
    answers: AnswersSection = Field(AnswersSection(), description="of questions about a context")


class CheckpointSection(Section):
    save_every_steps: PositiveInt | None = Field(None, description="save each so many steps; null: only at the end")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints to keep; the best one is kept besides")
    archive_every_steps: PositiveInt | None = Field(
        None, description="never remove a checkpoint whose step this divides; a multiple of save_every_steps"
    )
    save_best: bool = Field(False, description="save whenever the evaluation metric improves")

    @model_validator(mode="after")
    def _archives_what_is_saved(self) -> Self:
        archive, every = self.archive_every_steps, self.save_every_steps
        if archive is not None and (every is None or archive % every):
            raise ValueError(
                f"checkpoint.archive_every_steps {archive} is not a multiple of checkpoint.save_every_steps {every}"
            )
        return self


class ExportSection(Section):
    at_end: bool = Field(False, description="write the trained model as a Hugging Face folder into run_dir/export")
    every_steps: PositiveInt | None = Field(
        None, description="also each so many steps into run_dir/weights: a model to look at, not to resume from"
    )
    keep: PositiveInt | None = Field(None, description="newest folders of run_dir/weights to keep; null: all")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="type of the weights")
    max_shard_size: Annotated[int, BeforeValidator(_bytes_from_text)] = Field(
        DEFAULT_SHARD_BYTES, gt=0, description="largest file, as 5GB or 200MB"
    )


class LogSection(Section):
    tensorboard: bool = Field(True, description="write TensorBoard events into the run folder")
    log_every_steps: PositiveInt = Field(1, description="print a progress line each so many steps")
