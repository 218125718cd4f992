"""The search: propose a configuration, tie, initialise, retrain, validate, keep or undo, store.

Until the strategy is done or the time is over. A round depends only on what was kept before it, the seed and its
number, so a run that is resumed ends as it would have ended. The parts are in gemel/trials/ and gemel/merging/.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from gemel.alignment.matching import BY_ORDER
from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.clock import Clock, TimeOver
from gemel.environment.events import emit
from gemel.environment.failures import is_out_of_memory
from gemel.forward.arithmetic import STORE_DTYPES
from gemel.merging.architecture import Architectures
from gemel.merging.check import training_problems
from gemel.merging.examples import write_examples
from gemel.merging.fingerprint import task_changes
from gemel.merging.layout import choose_layout
from gemel.merging.memory_need import predict_memory, searched_by
from gemel.merging.placement import place_tasks
from gemel.merging.records import RunRecord, memory_part, precision_part, run_part, task_parts
from gemel.merging.reloaded import ReloadedModels
from gemel.merging.resume import groups_to_tie, load_search, new_search
from gemel.merging.shared_normalisation import share_norms
from gemel.options import LEAST_SQUARES, NO_ALIGNMENT, MergeOptions
from gemel.results_store.checkpoint import drop_checkpoint, read_checkpoint, throttled, write_checkpoint
from gemel.results_store.files import first_line
from gemel.results_store.manifest import read_manifest
from gemel.results_store.write import statistics_of, update_run, write_results
from gemel.sharing.groups import (
    Configuration,
    affected_tasks,
    from_plain,
    reconciled,
    restrict,
    saved_bytes,
    to_plain,
)
from gemel.thresholds import THRESHOLDS
from gemel.training.context import RoundContext
from gemel.training.outcome import OUT_OF_MEMORY, TIME_OVER, Outcome, Standing
from gemel.training.united import united_state
from gemel.trials.evaluator import Evaluator
from gemel.trials.goal import GoalReplay, goal_problems
from gemel.trials.images import ImageSampler
from gemel.trials.initialisation import WeightFitter, refit_frozen_normalisation, rule_of
from gemel.trials.judged_as_stored import judge_folded, judged_as_stored
from gemel.trials.matched_groups import matched_groups
from gemel.trials.out_of_memory import on_fewer_images
from gemel.trials.private_training import ALONE, PrivateTraining
from gemel.trials.rounding import Rounding
from gemel.trials.sensitivity import choose_first_step, predict_for
from gemel.trials.state import MergeState
from gemel.trials.teachers import FrozenPrefixes, teachers_of
from gemel.trials.verified_part import part_to_keep, saving_of_part
from gemel.workload import Problem, Task, WorkloadError
from trainer import recover

log = logging.getLogger(__name__)


class Merger:
    """One merge of a workload, in place: the owners of its state, and the rounds between them.

    started_with: what the manifest says of how the run was started. fingerprint: what must be equal for a run to be
    resumed. Nothing is evaluated, tied or written before `preflight` and `merge`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        data: Mapping[str, TaskData],
        options: MergeOptions,
        device: torch.device,
        results_path: Path,
        clock: Clock,
        started_with: dict,
        fingerprint: dict,
    ):
        self.tasks, self.data, self.options = tasks, data, options
        self.results_path, self.clock = results_path, clock
        self.state = MergeState(tasks, device, STORE_DTYPES[options.store_dtype])
        choose_layout(self.state, tasks, data, options, clock)
        self.images = ImageSampler(tasks, data, options.seed, device, options.fit_memory)
        self.record = RunRecord(started_with, fingerprint, matched_groups(tasks, self.state, self.images, options))
        self.strategy = self._new_strategy()
        place_tasks(tasks, data, self.state, options.seed, self.strategy.searched_apart)
        screens = options.training.screening_images > 0
        self.evaluator = Evaluator(tasks, data, self.state.unmerged, screens, Rounding(self.state, self.images))
        self.prefixes = FrozenPrefixes(self.state, data, self.images, options.memory_per_task(len(tasks)))
        self.architectures = Architectures(self.state, self.images)
        self.is_new = True  # whether the results folder holds nothing of this workload yet
        self.private_training = self._new_private_training()
        self.in_flight: dict | None = None  # the state of an interrupted round, to resume it

    # ---- before the first round ------------------------------------------------------------------------------

    def preflight(self) -> None:
        """Trains nothing: checks that losses can be computed, and measures every model that was not measured yet.

        Raises WorkloadError if a model is below its own target already, or cannot be trained or evaluated, or if all
        that could be saved is not enough for the memory goal.
        """
        most = saved_bytes(groups_to_tie(self.options, self.state.models, self.record.groups))
        problems = goal_problems(self.options.memory, self.state.unmerged_bytes, most)
        if self.is_new and not problems:
            problems = training_problems(self.tasks, self.data, self.state, self.options)
        try:
            problems = problems or self.evaluator.measure_unmerged(self.clock)
        except TimeOver:
            allowed = "more seconds than measuring the unmerged models takes"
            problems = [Problem("options", "time_budget", repr(self.options.time_budget), allowed)]
        if problems:
            self.state.hand_back()
            raise WorkloadError(problems)
        given = (self.tasks, self.data, self.state, self.images, self.options)
        self.record.memory_needs = predict_memory(*given, searched_by(self.strategy, self.record.groups))

    def resume(self, manifest: Mapping) -> list[str]:
        """Puts the search where the run that wrote the manifest was, or on top of it where tasks came or went.

        Returns what is to be said about it.
        """
        changes = task_changes(manifest["run"]["fingerprint"], self.record.fingerprint)
        if changes:
            self._extend(manifest)
            return [*changes, "the other tasks keep what they share"]
        self._resume_search(manifest)
        if self.record.finished:
            return [f"{self.results_path} holds the finished result of this workload (--fresh starts anew)"]
        return [f"{self.results_path} holds {len(self.record.rounds)} rounds of this workload: resuming after them"]

    def _resume_search(self, manifest: Mapping) -> None:
        """Kept ties and weights, the search state, measurements, and the round in flight."""
        run = manifest["run"]
        self._load_kept(manifest, list(self.tasks))
        self.is_new = False
        self.record.groups = from_plain(run["groups"])  # matched again, layers could pair differently by rounding
        self.strategy = self._new_strategy()
        groups = self.record.groups
        goes_on = load_search(self.strategy, run["strategy_state"], self.options, self.state.models, groups)
        self.state.set_kept(self.strategy.kept)
        goal = run.get("goal")
        self.record.would_take = goal["would_take"] if goal and goal["bytes"] == self.options.memory else None
        self.record.finished = run["finished"]
        if self.record.finished:
            self.state.hand_back()
            return
        checkpoint = read_checkpoint(self.results_path)
        if goes_on and checkpoint is not None and checkpoint["round"] == len(self.record.rounds):
            if checkpoint["state"] is not None:
                self.in_flight = checkpoint["state"]
            if checkpoint["working"] is not None:
                self.state.load_continued_trial(checkpoint["working"], checkpoint["models"])

    def _extend(self, manifest: Mapping) -> None:
        """Tasks that are still here keep what they share; the search begins anew from there."""
        common = [name for name in self.tasks if name in manifest["tasks"]]
        self._load_kept(manifest, common)
        self.state.untie_norms()
        kept = restrict(tuple(g for g in from_plain(manifest["shared_layers"]) if not g.normalisation), common)
        if self.options.matching != BY_ORDER:  # with other tasks, others may be the most alike
            self.record.groups = reconciled(kept, self.record.groups)
            self.strategy = self._new_strategy()
        self.strategy.adopt(kept)
        self.state.set_kept(self.strategy.kept)
        judge_folded(self.state, self.evaluator, self.state.fold_adapters(common))

    def _load_kept(self, manifest: Mapping, names: list[str]) -> None:
        run = manifest["run"]
        self.state.load_kept(self.results_path, manifest, names)
        self.evaluator.load_state(run["accuracy"], names)
        self.record.load_rounds(run)
        self.clock.add_earlier_runs(run["seconds"], run["cpu_seconds"])

    def _new_strategy(self):
        return new_search(self.options, self.state, self.record.groups)

    def _new_private_training(self) -> PrivateTraining:
        purpose = ("private", len(self.record.rounds))
        context = RoundContext(self.state.device, self.options.seed, purpose, self.clock, self.record.precision)
        trained = self.record.private_trainings()
        return PrivateTraining(self.state, self.evaluator, self.options.training, context, recover, trained)

    # ---- the search ------------------------------------------------------------------------------------------

    def merge(self) -> dict:
        """Plays rounds until nothing is left to try or the time is over; returns the manifest of the results folder.

        From the first moment on, and after every round, the folder holds a complete result (at first: nothing shared).
        """
        if self.is_new:
            self.evaluator.rounding.begin()
            self.store()
            self._drop_checkpoint()
        number, about = len(self.record.groups), self.strategy.about_to_do
        emit("search begins", about_to_do=f"{number} groups of identical layers; {self.options.strategy}: {about}")
        try:
            with contextlib.suppress(TimeOver):
                self._search()
                search = (self.options, self.state, self.evaluator, self.images, self.clock, self.record, self.strategy)
                share_norms(*search, recover)
        finally:
            self.state.undo()
            self.state.hand_back()
        if ranks.of_first(lambda: self.state.is_stored_otherwise(read_manifest(self.results_path))):
            self.store()  # before normalisation was shared; or beside tasks that share, in another order of channels
        return self.confirm()

    def _search(self) -> None:
        """Alignment, prediction, rounds, until everything was tried or the memory goal is reached.

        Raises Interrupted or TimeOver; the state is then to be undone.
        """
        if self._fits():
            return
        predicts = self.strategy.needs_sensitivity
        with self.clock.interruptible():
            emit("doing", what="aligning channels")
            self._align_channels()
            choose_first_step(self.strategy, self.state, self.images, self.evaluator)
        self._update_run()  # a killed run goes on in this order of channels
        while True:
            if predicts and self.strategy.needs_sensitivity:
                predicts = False
                with self.clock.interruptible():
                    predict_for(self.strategy, self.state, self.images, self.record.groups, self.evaluator)
            self.clock.raise_if_over()
            self._see_what_the_goal_would_take()
            emit("doing", what="choosing what to try next")
            proposal = self.strategy.propose()
            if proposal is None:
                self.record.finished = True
                return
            if not self.play_round(proposal) or self._fits():
                return

    def _fits(self) -> bool:
        """Whether there is a memory goal, and what is kept reaches it."""
        goal = self.strategy.goal_saving
        return goal is not None and saved_bytes(self.state.kept) >= goal

    def _see_what_the_goal_would_take(self) -> None:
        """Once the trials that just reach the goal have failed, before anything was trained."""
        fits = self.options.initial_weights == LEAST_SQUARES and not self.record.has_trained
        closest = self.strategy.closest_to_goal() if fits and self.record.would_take is None else None
        if closest is not None:
            replay = GoalReplay(self.state, self.evaluator, self.images, self.strategy.donor_of)
            found = None
            try:
                with self.clock.interruptible():
                    found = replay.what_it_would_take(closest[0], closest[1], len(self.record.rounds))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.record.would_take = found or {}

    def play_round(self, proposal: Configuration) -> bool:
        """Tries one configuration, keeps or undoes it, and stores; False if the time ran out before it was decided."""
        began, before = time.monotonic(), self.strategy.kept
        self._say_what_begins(proposal)
        self.state.untie_norms()
        outcome = self._try(proposal)
        if outcome.reason == TIME_OVER:
            return False
        outcome = judged_as_stored(self.state, self.evaluator, self.clock, outcome)
        self.in_flight = part = None
        if self.strategy.keeps_verified_part and not outcome.success:
            part, outcome = part_to_keep(self.state, self.evaluator, self.clock, proposal, outcome)
        ratios = {name: accuracy / self.tasks[name].target_acc for name, accuracy in outcome.accuracies.items()}
        self.strategy.record(outcome.success, outcome.met, {**ratios, **outcome.fitted_ratios})
        if part is not None:
            self.state.keep_part(part, outcome.verified)
            self.strategy.keep_part(part)
        elif outcome.success:
            self.state.keep(self.strategy.kept)
        elif not self.strategy.continues_failed_trial or outcome.reason == OUT_OF_MEMORY:  # half of it may be fitted
            self.state.undo()
        kept_for = list(outcome.accuracies) if outcome.success else list(outcome.verified) if part else []
        targets = {name: self.tasks[name].target_acc for name in sorted(outcome.accuracies)}
        kept, now, seconds = self.strategy.kept, self.clock.seconds, time.monotonic() - began
        row = self.record.add_round(proposal, before, kept, outcome, kept_for, seconds, targets, now)
        emit("kept" if row["kept"] else OUT_OF_MEMORY if row["reason"] == OUT_OF_MEMORY else "undone", row=row)
        if kept_for:
            self._store_kept({name: outcome.accuracies[name] for name in kept_for})
        else:
            self._save_checkpoint(None)
            self._update_run()
        return True

    def _say_what_begins(self, proposal: Configuration) -> None:
        new = [group for group in proposal if group not in set(self.strategy.kept)]
        tasks = sorted({task for group in new for task in group.tasks})
        what = f"{len(new)} group{'s' * (len(new) != 1)} of {len(tasks)} tasks"
        saving = saved_bytes(proposal)
        emit("round begins", round=len(self.record.rounds) + 1, what=what, tasks=tasks, would_save_bytes=saving)

    def _store_kept(self, accuracies: Mapping[str, float]) -> None:
        self.evaluator.keep(accuracies)
        self.record.add_history(self.clock, self.state.kept, self.evaluator.num_met)
        self.store()
        self._drop_checkpoint()

    def _try(self, proposal: Configuration) -> Outcome:
        """Ties the proposal and recovers accuracy; the state can then be undone or kept."""
        trained = {name: self.tasks[name] for name in affected_tasks(self.state.kept, proposal)}
        needs_copies = self.in_flight is None and self.strategy.fits_to_what_is_kept
        self.private_training = self._new_private_training()
        try:
            continues = self.state.begin_trial(proposal, rule_of(self.options.initial_weights), needs_copies)
            fitted = {}
            if self.in_flight is None:
                with self.clock.interruptible():
                    fitted = self._initialise(proposal, trained, continues)
            if self.strategy.trains_alone_at_length:
                begun, self.in_flight = (self.in_flight or {}).get(ALONE), None
                fitted = self.private_training.at_length(proposal, fitted, throttled(self._save_checkpoint), begun)
            outcome = self._retrain(proposal, trained, fitted)
            return replace(outcome, private_training=self.private_training.of_round())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory in a round, which is undone: %s", first_line(error))
            return Outcome(OUT_OF_MEMORY, {name: 0.0 for name in trained}, (), 0, 0)

    def _initialise(self, proposal: Configuration, trained: Mapping[str, Task], continues: bool) -> dict[str, Standing]:
        """Fits what the trial newly ties, or everything that it changes; where every task then is."""
        number = len(self.record.rounds)
        if self.options.initial_weights != LEAST_SQUARES:
            refit_frozen_normalisation(self.state, self.images, trained, number)
            return {}
        if continues:
            return self.evaluator.standings(trained)
        improve = partial(self.private_training.improve, proposal) if self.strategy.trains_alone_shortly else None
        saving = partial(saving_of_part, self.state, proposal) if self.strategy.keeps_verified_part else None
        how = (self.strategy.chance(proposal) < THRESHOLDS.fit.no_screening_from, self.strategy.trials_take_long)
        fitter = WeightFitter(self.state, self.evaluator, self.images, self.strategy.donor_of, improve, saving, *how)
        most = THRESHOLDS.fit.max_fits if self.strategy.releases_before_training else 1  # or it is trained
        times = 2 if self.strategy.trains_alone_at_length else 1  # the images of a fit: a better one saves steps
        if self.record.has_trained or not self.strategy.refits_all_changes:
            new = tuple(group for group in proposal if group not in set(self.state.kept))
            return fitter.fit(new, trained, number, min(2, most), times)
        groups = tuple(group for group in proposal if set(group.tasks) <= set(trained))
        self.state.reset_to_unmerged(groups, trained)
        return fitter.fit(groups, trained, number, most, times)

    def _retrain(self, proposal: Configuration, trained: Mapping[str, Task], fitted: dict[str, Standing]) -> Outcome:
        """Judges the trial, and trains it as far as the strategy asks for that."""
        options, resumed = self.options.training, self.in_flight is not None
        if self.strategy.releases_before_training:
            options = replace(options, max_epochs=0)
        freezes = options.freeze_prefix and options.max_epochs > 0
        is_judged = fitted and not options.max_epochs and all(s.accuracy is not None for s in fitted.values())
        teachers = teachers_of(self.state, trained, proposal, options)
        context = RoundContext(
            device=self.state.device,
            seed=self.options.seed,
            purpose=("round", len(self.record.rounds)),
            clock=self.clock,
            fitted=fitted,
            screen_targets={} if is_judged else self.evaluator.screen_targets(trained),
            precision=self.record.precision,
            prefixes=self.prefixes.of_round(trained, proposal, resumed) if freezes else {},
            save=throttled(self._save_checkpoint),
            saved=self.in_flight,
        )
        try:
            return recover(self.state.models, trained, self.data, options, context, teachers)
        finally:
            for teacher in teachers.values():
                teacher.close()

    def _align_channels(self) -> None:
        groups, method = self.record.groups, self.options.alignment
        if method != NO_ALIGNMENT and groups and self.state.needs_alignment():

            def align(num_pixels: int, max_batch: float) -> None:
                mine = groups if ranks.is_first() else ()  # which alone aligns
                images = self.images.of_groups(mine, num_pixels, "align", max_batch=max_batch)
                self.state.align_channels(groups, images, method, self.options.seed)

            on_fewer_images("the alignment of channels", THRESHOLDS.sensitivity.alignment_pixels, align)

    # ---- storing ---------------------------------------------------------------------------------------------

    def confirm(self) -> dict:
        """Loads the result from disk as a user will and closes the manifest.

        What the first rank loads must be, bit by bit, what was judged: the same tensors compute the same. Raises
        RuntimeError if it is not.
        """
        emit("doing", what="loading what was written, and comparing it with what was judged")
        reloaded = ReloadedModels(self.results_path, self.state, self.architectures)
        ranks.of_first(reloaded.check)
        with self.clock.interrupts.immediate():
            merged = reloaded if ranks.is_first() else self.state.models
            self.evaluator.measure_reloaded(merged, self.options.per_class)
            write_examples(self.results_path, self.tasks, self.data, self.state.unmerged, merged)
        manifest = self.store()
        emit("run ends", finished=self.record.finished, saved_bytes=manifest["memory"]["saved_bytes"])
        return manifest

    def store(self) -> dict:
        """Writes the workload as it is now; returns the manifest."""
        return ranks.of_first(partial(self._write, self._run_part()))

    def _write(self, run: dict) -> dict:
        manifest = {
            "tasks": task_parts(self.evaluator, self.state, self.options, self.architectures.recorded()),
            "shared_layers": to_plain((*self.state.kept, *self.state.shared_norms)),
            "memory": memory_part(self.state, self.record),
            "run": run,
            "precision": precision_part(self.state),
        }
        return write_results(self.results_path, self.state.models, manifest, statistics_of(manifest))

    def _run_part(self) -> dict:
        return run_part(self.record, self.options, self.clock, self.strategy, self.evaluator, self.state)

    def _update_run(self) -> None:
        ranks.of_first(partial(update_run, self.results_path, self._run_part()))

    def _save_checkpoint(self, round_state: dict | None) -> None:
        """Keeps what a later run needs to resume within a round, or before a trial that continues a failed one."""
        continued = self.state.continued_trial
        if round_state is None and continued is None:
            self._drop_checkpoint()
            return
        if round_state is not None and ALONE not in round_state:
            round_state = united_state(round_state, {name: self.state.models[name] for name in round_state["members"]})
        checkpoint = {
            "round": len(self.record.rounds),
            "state": round_state,
            "working": to_plain(continued) if continued is not None and round_state is None else None,
            "models": self.state.state_of_continued_trial() if round_state is None else {},
        }
        ranks.of_first(lambda: write_checkpoint(self.results_path, checkpoint))

    def _drop_checkpoint(self) -> None:
        ranks.of_first(lambda: drop_checkpoint(self.results_path))
