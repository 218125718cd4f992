"""What can be kept of a failed trial: what the tasks that met their targets share among themselves."""

from collections.abc import Collection
from dataclasses import replace

from gemel.environment.clock import Clock
from gemel.environment.failures import is_out_of_memory
from gemel.sharing.groups import Configuration, saved_bytes, verified_part
from gemel.training.outcome import Outcome
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState


def part_to_keep(
    state: MergeState, evaluator: Evaluator, clock: Clock, proposal: Configuration, outcome: Outcome
) -> tuple[Configuration | None, Outcome]:
    """The part of a failed trial that saves more than what is kept already, or None; and who is verified there.

    Tasks some of whose scales, biases or adapters go into the weights, as those layers share nothing any more, are
    evaluated again.
    """
    while True:
        part = verified_part(state.kept, proposal, outcome.verified)
        if saved_bytes(part) <= saved_bytes(state.kept) or _changes_others(state.kept, part, outcome.verified):
            return None, outcome
        try:
            folded = {name: state.folded_for(part, name) for name in outcome.verified}
            with clock.interruptible():
                measured = evaluator.measure_all({n: model for n, model in folded.items() if model is not None})
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None, outcome
        outcome = replace(outcome, accuracies={**outcome.accuracies, **measured})
        missed = {name for name, accuracy in measured.items() if accuracy < evaluator.tasks[name].target_acc}
        if not missed:
            return part, outcome
        outcome = replace(outcome, verified=tuple(name for name in outcome.verified if name not in missed))


def saving_of_part(state: MergeState, proposal: Configuration, met: Collection[str]) -> int:
    """Bytes that are saved where only these tasks meet their targets in a trial of the proposal."""
    return saved_bytes(verified_part(state.kept, proposal, met))


def _changes_others(kept: Configuration, part: Configuration, verified: Collection[str]) -> bool:
    """Whether a task that is not verified would lose a private scale, bias or adapter that it has in what is kept.

    Its layer would share nothing any more, and the weights that take them in were never evaluated.
    """
    private = {o for group in part if group.private_bytes for o in group.occurrences}
    had = {o for group in kept if group.private_bytes for o in group.occurrences}
    return any(occurrence.task not in verified for occurrence in had - private)
