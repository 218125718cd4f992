"""What a merge writes down: one record per round, the history of kept rounds, and the manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from gemel.environment.clock import Clock
from gemel.fitting.batch_norm import is_frozen
from gemel.forward.arithmetic import arithmetic_on
from gemel.merging.architecture import Recorded
from gemel.merging.memory_need import MemoryNeed
from gemel.merging.why_not import GOAL_REACHED, TIME_OVER, Attempts, add_attempts, not_shared
from gemel.options import LEAST_SQUARES, MergeOptions
from gemel.sharing.groups import Configuration, saved_bytes, to_plain
from gemel.sharing.memory import Memory
from gemel.strategies.base import Strategy
from gemel.training.outcome import Outcome
from gemel.trials.evaluator import Evaluator
from gemel.trials.goal import goal_part
from gemel.trials.state import MergeState


@dataclass
class RunRecord:
    """The run of a merge, over all the times that it was resumed: the only source of the manifest's `run`."""

    started_with: dict  # flags, versions and date of this run
    fingerprint: dict  # what must be equal for another run to resume this one
    groups: Configuration  # every group of the workload
    rounds: list[dict] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)  # one entry per kept round
    finished: bool = False  # whether everything was tried
    precision: dict[str, dict] = field(default_factory=dict)  # of training steps, by task (training/precision.py)
    attempts: Attempts = field(default_factory=dict)  # what was tied in a round and could not be kept
    shared_normalisation: dict | None = None  # what sharing it cost and saved; None: it was not asked for, or not yet
    would_take: dict | None = None  # what the memory goal would take (GoalReplay); {}: not found; None: not looked for
    memory_needs: list[MemoryNeed] = field(default_factory=list)  # of this run
    memory_of_before: list[dict] = field(default_factory=list)  # `memory_use` of the run that this one resumes

    @property
    def optimal_saved_bytes(self) -> int:
        """The saving if every group were kept."""
        return saved_bytes(self.groups)

    @property
    def has_trained(self) -> bool:
        """Whether a kept round has changed weights by training."""
        return any(row["kept"] and row["steps"] for row in self.rounds)

    def private_trainings(self) -> list[dict]:
        """What the short trainings after fits gained in all rounds."""
        return [gained for row in self.rounds for gained in row.get("private_training", [])]

    def add_round(
        self,
        proposal: Configuration,
        before: Configuration,
        kept: Configuration,
        outcome: Outcome,
        kept_for: list[str],
        seconds: float,
        targets: Mapping[str, float],
        ended_at: float,
    ) -> dict:
        """Adds the record of a round. before, kept: what was kept before the round, and after it.

        targets: of the tasks whose weights the trial changed. ended_at: seconds since the run began.
        kept_for: the tasks that keep what they share in the trial: all of them, some of them, or none.
        """
        new = [group for group in proposal if group not in set(before)]
        largest = max(new, key=lambda group: group.saved_bytes)
        number = len(self.rounds) + 1
        row = {
            "round": number,
            "what": largest.signature.split(":")[0],
            "num_new_groups": len(new),
            "tasks": sorted({task for group in new for task in group.tasks}),
            "trained": sorted(outcome.accuracies),
            "met": list(outcome.met),
            "accuracies": outcome.accuracies,
            "targets": dict(targets),
            "kept": bool(kept_for),
            "kept_for": sorted(kept_for),
            "reason": outcome.reason,
            "saved_bytes": saved_bytes(kept),
            "trial_saved_bytes": saved_bytes(proposal),
            "optimal_saved_bytes": self.optimal_saved_bytes,
            "steps": outcome.steps,
            "samples": outcome.samples,
            "private_training": outcome.private_training,
            "training_seconds": outcome.training_seconds,
            "reading_seconds": outcome.reading_seconds,
            "seconds": seconds,
            "ended_at": ended_at,
        }
        self.rounds.append(row)
        add_attempts(self.attempts, number, proposal, kept)
        return row

    def add_history(self, clock: Clock, kept: Configuration, num_met: int) -> None:
        """Adds what is kept by now, and its cost since the run began: undone rounds and earlier runs included."""
        self.history.append(
            {
                "seconds": clock.seconds,
                "cpu_seconds": clock.cpu_seconds,
                "steps": sum(row["steps"] for row in self.rounds)
                + sum(gained["steps"] for gained in self.private_trainings()),
                "samples": sum(row["samples"] for row in self.rounds),
                "round": len(self.rounds),
                "saved_bytes": saved_bytes(kept),
                "tasks_met": num_met,
            }
        )

    def load_rounds(self, run: Mapping) -> None:
        """Continues the record of an earlier run; run: that part of its manifest."""
        self.rounds, self.history = run["rounds"], run["history"]
        self.attempts, self.memory_of_before = run.get("attempts", {}), run.get("memory_use", [])
        self.shared_normalisation = run.get("shared_normalisation")
        devices = [part.get("flags", {}).get("device") for part in (run, self.started_with)]
        if devices[0] == devices[1]:  # what is quick on one may be slow on another
            self.precision.update(run.get("training_precision", {}))

    def memory_use(self) -> list[dict]:
        """What was predicted and used, of each memory; all ranks ask."""
        return [need.to_plain() for need in self.memory_needs] or self.memory_of_before

    def not_shared(self, strategy: Strategy, fits: bool) -> list[dict]:
        """Why each group that is not wholly shared is not. fits: whether a memory goal ended the search."""
        untried = None if self.finished else GOAL_REACHED if fits else TIME_OVER
        predicted = strategy.predicted_sensitivity()
        return not_shared(self.groups, strategy.kept, self.rounds, self.attempts, predicted, untried)


def run_part(
    record: RunRecord,
    options: MergeOptions,
    clock: Clock,
    strategy: Strategy,
    evaluator: Evaluator,
    state: MergeState,
) -> dict:
    """The `run` part of the manifest: how the run was started, and everything that a later run needs to resume it."""
    merged_bytes = state.unmerged_bytes - saved_bytes(state.kept)
    return {
        **record.started_with,
        "strategy": options.strategy,
        "seed": options.seed,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "finished": record.finished,
        "goal": goal_part(options.memory, record.would_take, merged_bytes),
        "memory_use": record.memory_use(),
        "groups": to_plain(record.groups),
        "strategy_state": strategy.state(),
        "accuracy": evaluator.state(),
        "permutations": state.order.permutations,
        "channels_last": state.channels_last,
        "shared_normalisation": record.shared_normalisation,
        "rounds": record.rounds,
        "attempts": record.attempts,
        "training_precision": record.precision,
        "not_shared": record.not_shared(strategy, options.memory is not None and merged_bytes <= options.memory),
        "history": record.history,
        "fingerprint": record.fingerprint,
    }


def task_parts(
    evaluator: Evaluator, state: MergeState, options: MergeOptions, recorded: Mapping[str, Recorded]
) -> dict[str, dict]:
    """The `tasks` part of the manifest: what was measured of every task, and what its stored tensors are."""
    return {
        name: {
            "task": task.kind,
            "class_names": list(evaluator.data[name].class_names) or None,
            "frozen_normalisation": _frozen_normalisation(name, state, options),
            "architecture": recorded[name].architecture,
            "architecture_note": recorded[name].note,
            "permuted": name in state.order.applied,
            "unmerged_acc": task.unmerged_acc,
            "measured_unmerged_acc": evaluator.accuracy[name].unmerged,
            "target_acc": task.target_acc,
            "merged_acc": evaluator.accuracy[name].merged,
            "unmerged_test_acc": evaluator.accuracy[name].unmerged_test,
            "test_acc": evaluator.accuracy[name].merged_test,
            "per_class": evaluator.accuracy[name].per_class,
            "agreement": evaluator.accuracy[name].agreement,
            "met": evaluator.accuracy[name].merged >= task.target_acc,
        }
        for name, task in evaluator.tasks.items()
    }


def memory_part(state: MergeState, record: RunRecord) -> dict:
    """The `memory` part of the manifest."""
    optimal = record.optimal_saved_bytes + saved_bytes(state.shared_norms)
    memory = Memory(state.unmerged_bytes, state.stored_bytes(), optimal)
    return {**asdict(memory), "saved_bytes": memory.saved_bytes}


def precision_part(state: MergeState) -> dict:
    """The `precision` part of the manifest: the type of the weights, and that in which they were judged."""
    weights = str(state.store_dtype).removeprefix("torch.")
    return {"weights": weights, "arithmetic": arithmetic_on(state.device.type, weights), "device": state.device.type}


def _frozen_normalisation(name: str, state: MergeState, options: MergeOptions) -> str | None:
    """How frozen batch normalisation was treated: "refitted", or "kept" where layers were fitted to it; else None."""
    if not any(map(is_frozen, state.models[name].modules())):
        return None
    shares = any(name in group.tasks for group in state.kept)
    return "refitted" if shares and options.initial_weights != LEAST_SQUARES else "kept"
