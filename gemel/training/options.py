"""How a round is trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gemel.forward import FLOAT32
from gemel.workload import CLASSIFICATION, Task


@dataclass(frozen=True)
class TrainingOptions:
    """How a round is trained. The defaults were chosen by trying, on models fine-tuned on photographs.

    All 52 layers of three MobileNetV2 tied: 9984 images until all targets were met with batches of 32 and without the
    average of weights, 3648 with these. Tied heads of three FCOS detectors after 40 steps: mAP 0.36 of 0.43 at this
    learning rate, 0.23 at 1e-3.
    """

    learning_rate: float = 3e-4  # of AdamW, reached after `warmup_steps`, a fifth of it after the first stall
    warmup_steps: int = 10  # 0: none
    classification_batch_size: int = 16
    detection_batch_size: int = 4
    max_epochs: float = 4.0  # an epoch is one pass over the largest train split among the tasks that are trained
    patience_epochs: float = 0.75  # a stall as long as this first lowers the learning rate, then gives the task up
    statistics_batches: int = 8  # per task, to re-estimate batch normalisation before a trial is judged; 0: none
    average_decay: float = 0.95  # of the moving average of weights that is validated and kept; 0: no average
    validation_share: float = 0.25  # of the time of training that validation may take, as far as can be planned
    private_epochs: float = 0.0  # at first only what one model holds is trained, with fixed normalisation statistics
    private_learning_rate: float = 1e-3  # of that
    detection_private_learning_rate: float = 3e-4  # of that, where a detector among the tasks is trained by labels
    private_average_decay: float = 0.98  # of the average where labels train in that stage; it begins with the fit
    label_weight: float = 1.0  # of the losses from labels
    feature_weight: float = 0.0  # of the difference to the unmerged model's features; 0: not compared
    # Of the difference to the unmerged classifier's class probabilities, or the unmerged detector's predictions.
    probability_weight: float = 0.0
    freeze_prefix: bool = False  # whether what a classifier computes before its first tied layer stays as it is
    precision: str = (
        FLOAT32  # of training steps: a name of gemel.forward.STEP_PRECISIONS; auto: what a few steps of each model show
    )
    compile: bool = False  # whether models run compiled in training steps, where that is faster
    screening_images: int = 256  # of val, evaluated first; all of it only where these meet the target; 0: none

    @classmethod
    def of_flags(cls, flags: object) -> "TrainingOptions":
        """Those with the batch sizes that a manifest's flags name, which decide how sums round; else the defaults."""
        given = flags if isinstance(flags, dict) else {}
        sizes = {key: given.get(key) for key in ("classification_batch_size", "detection_batch_size")}
        known: dict[str, Any] = {k: n for k, n in sizes.items() if isinstance(n, int) and 1 <= n <= 1 << 20}
        return cls(**known)

    def batch_size(self, task: Task) -> int:
        default = self.classification_batch_size if task.kind == CLASSIFICATION else self.detection_batch_size
        return task.batch_size or default

    def private_rate(self, tasks: Iterable[Task]) -> float:
        """The learning rate of these tasks while only what one model holds is trained: they have one optimizer."""
        if self.imitates or all(task.kind == CLASSIFICATION for task in tasks):
            return self.private_learning_rate
        return self.detection_private_learning_rate

    @property
    def imitates(self) -> bool:
        """Whether what the unmerged model puts out is all that is compared."""
        return self.probability_weight > 0 and self.label_weight == self.feature_weight == 0

    @property
    def teaches(self) -> bool:
        return self.feature_weight > 0 or self.probability_weight > 0

    def weight_of(self, loss: str, task: Task) -> float:
        taught = {
            "features": self.feature_weight,
            "probabilities": self.probability_weight,
            "predictions": self.probability_weight,
        }
        if loss not in taught:
            return self.label_weight
        if task.labels or self.imitates:
            return taught[loss]
        return taught[loss] or 1.0  # without labels there is nothing else
