"""What could be saved: planned on the models alone, without data or training."""

from gemel.merging.console import plan_table, workload_table
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.workload import WorkloadError, read_workload


def plan(model_dict: dict, tolerance: float | None = None) -> tuple[str, int]:
    """(tables as text, bytes that sharing every identical layer would save). Raises WorkloadError."""
    tasks, problems = read_workload(model_dict, tolerance)
    if problems:
        raise WorkloadError(problems)
    models = {name: task.model for name, task in tasks.items()}
    groups = find_groups(models)
    text = f"{workload_table(tasks, models, groups)}\n\n{plan_table(groups, distinct_bytes(models))}"
    return text, saved_bytes(groups)
