"""What a merge measures, for TensorBoard: saving and accuracies by round, and of each task while it is trained."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from gemel.environment.units import MIB

ROUND_ENDS = ("kept", "undone", "out of memory")

log = logging.getLogger(__name__)


def is_installed() -> bool:
    """Whether the package tensorboard is there; it is no requirement of ours."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoardLog:
    """Writes events of a merge (gemel.environment.events) into a folder, once the first of them is of use there.

    Scalars: `saved/MiB` and `accuracy/<task>` by round; `training/<task>`, as a share of its target, by the number of
    the validation. What cannot be written is a warning: it never ends a merge.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.writer: Any = None
        self.num_validations = 0
        self.has_failed = False

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if self.has_failed or kind not in (*ROUND_ENDS, "validation"):
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder))
            self._write(kind, fields)
            self.writer.flush()
        except OSError as error:
            self.has_failed = True
            log.warning("%s: %s; the merge goes on without TensorBoard", self.folder, error)

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "validation":
            self.num_validations += 1
            share = fields["accuracy"] / fields["target"]
            self.writer.add_scalar(f"training/{fields['task']}", share, self.num_validations)
            return
        row = fields["row"]
        self.writer.add_scalar("saved/MiB", row["saved_bytes"] / MIB, row["round"])
        for task, accuracy in row["accuracies"].items():
            self.writer.add_scalar(f"accuracy/{task}", accuracy, row["round"])
