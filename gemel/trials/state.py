"""The live models of a merge: what is tied now, how to undo a trial, and the order of each model's channels."""

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gemel.alignment.align import align, apply_permutations, permutations_of
from gemel.alignment.permutation import ChannelSpaces, inverse
from gemel.environment import ranks
from gemel.environment.memory import give_back_unused
from gemel.environment.threads import threads_of_waiting_ranks
from gemel.forward.batches import Batch
from gemel.forward.modes import deep_copy, set_layout, state_on_cpu
from gemel.results_store.load import load_merged
from gemel.sharing.adapters import fold, has_additions, own_modules
from gemel.sharing.groups import Configuration, affected_tasks, from_plain, joined, restrict
from gemel.sharing.memory import named_tensors
from gemel.sharing.normalisation import untie_normalisation
from gemel.sharing.precision import round_weights, stored_bytes
from gemel.sharing.tying import (
    Snapshot,
    freeze,
    frozen_parameters,
    is_tied,
    reset,
    restore_snapshot,
    retie,
    take_snapshot,
)
from gemel.trials.waiting import Waiting
from gemel.workload import Problem, Task, WorkloadError

Permutations = dict[
    str, list[int]
]  # channel space -> what was at permutation[i] is at i (gemel.alignment.align.permutations_of)

log = logging.getLogger(__name__)


@dataclass
class ChannelOrder:
    """In which order the channels of each model are, beside the order that the model came in."""

    permutations: dict[str, Permutations] = field(
        default_factory=dict
    )  # task -> found by alignment; {}: stays as it is
    applied: set[str] = field(default_factory=set)  # tasks whose live model has that order now
    spaces: dict[str, ChannelSpaces] = field(default_factory=dict)  # task -> of its model, where they are known

    def apply(self, name: str, model: nn.Module) -> None:
        """Brings a live model into the order that alignment found."""
        if name not in self.applied and self.permutations.get(name):
            apply_permutations(model, self.permutations[name], self.spaces.get(name))
            self.applied.add(name)

    def revert(self, name: str, model: nn.Module) -> None:
        """Brings a live model back, bit by bit, into the order that it came in."""
        if name in self.applied:
            back = {space: inverse(order) for space, order in self.permutations[name].items()}
            apply_permutations(model, back, self.spaces.get(name))
            self.applied.discard(name)


class MergeState:
    """The models of a workload while they are merged, in place and on the device.

    models: the live ones, in one container, so that a tied parameter is there once. unmerged: copies of them as they
    came, in eval mode, with the channels in the order of the live ones. store_dtype: of the store's weights; what is
    kept has weights of such values, so that a run which is resumed from the store goes on as this one would.
    """

    def __init__(self, tasks: Mapping[str, Task], device: torch.device, store_dtype: torch.dtype = torch.float32):
        self.device, self.store_dtype = device, store_dtype
        self.models = nn.ModuleDict({name: task.model for name, task in tasks.items()}).to(device)
        self.channels_last = False
        self.given_frozen = {name: frozen_parameters(model) for name, model in self.models.items()}
        self._came_frozen = {n for n, m in self.models.items() if not any(p.requires_grad for p in m.parameters())}
        self._frozen = {name: _frozen_in_training(name, model) for name, model in self.models.items()}
        self.unmerged = _copies(self.models).eval().requires_grad_(False)
        freeze(self.models, self._frozen)
        self.unmerged_bytes = self.stored_bytes()
        self.kept: Configuration = ()  # tied in the last trial that was kept
        self.shared_norms: Configuration = ()  # groups of normalisation layers, which no trial of the search ties
        self.tied: Configuration = ()  # tied now: more than `kept` within a trial, and where the next one continues it
        self.order = ChannelOrder()
        self.as_kept: nn.ModuleDict | None = None  # copies of the models that a trial changes, as they were before it
        self._undo: Snapshot | None = None  # of what is kept, while the models hold something else
        self._before_look: Snapshot | None = None  # of what the models hold, within `all_tied`
        self.waiting = Waiting(self.models, self.unmerged, device)

    def use_layout(self, channels_last: bool) -> None:
        """From now on the weights are laid out channels-last, or not; values and objects stay."""
        if channels_last != self.channels_last:
            self.channels_last = channels_last
            for models in (self.models, self.unmerged):
                set_layout(models, torch.channels_last if channels_last else torch.contiguous_format)

    def stored_bytes(self) -> int:
        """Bytes of the live models' distinct parameters and buffers in the store."""
        return stored_bytes(self.models, self.store_dtype)

    def round_weights(self) -> None:
        """Gives the live models weights of values of the store's type."""
        round_weights(self.models.values(), self.store_dtype)

    def lay_out(self, models: nn.ModuleDict) -> None:
        """Gives models that were loaded the layout of the live ones."""
        if self.channels_last:
            set_layout(models, torch.channels_last)

    # ---- trials ----------------------------------------------------------------------------------------------

    def begin_trial(self, proposal: Configuration, initial: str, needs_copies: bool = False) -> bool:
        """Ties the proposal, new ties with the values of a data-free rule; whether it was tied already.

        needs_copies: whether `as_kept` is to be there in this trial.
        """
        give_back_unused()  # else what earlier trials left in pieces adds up
        changed = affected_tasks(self.kept, proposal)
        self.waiting.all_but(changed)
        continues = self.continued_trial == proposal
        self.as_kept = deep_copy(self._container(changed)).eval().requires_grad_(False) if needs_copies else None
        if self._undo is None:
            self._undo = take_snapshot(self._container(changed))
        retie(self.models, self.tied, proposal, self.unmerged, initial)
        freeze(self.models, self._frozen)
        self.tied = proposal
        return continues

    def keep(self, kept: Configuration) -> None:
        """Makes what is tied now, with its weights, what later trials are undone to; kept: as the strategy has it."""
        self.kept = self.tied = kept
        self._undo = None
        self.round_weights()

    def keep_part(self, part: Configuration, met: Collection[str]) -> None:
        """Keeps a part of a failed trial: the tasks of `met` keep their weights of now, all others are undone.

        part: as gemel.sharing.groups.verified_part has it.
        """
        folded = {name: self.folded_for(part, name) for name in met}
        weights = {name: state_on_cpu(folded[name] or self.models[name]) for name in met}
        trial = self.tied
        self.undo()
        others = set(affected_tasks(self.kept, trial)) - set(met)
        weights |= {name: state_on_cpu(self.models[name]) for name in others}
        retie(self.models, self.kept, part, self.unmerged)
        freeze(self.models, self._frozen)
        for name, values in weights.items():
            self.models[name].load_state_dict(values)
        self.kept = self.tied = part
        self.round_weights()

    def folded_for(self, part: Configuration, name: str) -> nn.Module | None:
        """A copy of a task's model as it is now, for a part of what is tied; None if the model itself will do.

        Layers that share nothing in the part have their scales, biases and adapters in their own weights.
        """
        sharing = {o.layer for group in part if group.private_bytes for o in group.occurrences if o.task == name}
        added = [layer for layer, module in own_modules(self.models[name]) if has_additions(module)]
        if not (left := [layer for layer in added if layer not in sharing]):
            return None
        copied = deep_copy(self.models[name])
        for layer in left:
            fold(copied.get_submodule(layer))
        return copied

    @contextlib.contextmanager
    def all_tied(self, groups: Configuration) -> Iterator[None]:
        """Within, these groups are tied as well, which is no trial; `undo` ends it if its end is interrupted."""
        self._before_look = take_snapshot(self.models)
        try:
            retie(self.models, self.kept, joined(self.kept, groups), self.unmerged)
            yield
        finally:
            self._end_look()

    def _end_look(self) -> None:
        if self._before_look is not None:
            restore_snapshot(self._before_look)
        self._before_look = None

    def undo(self) -> None:
        """Brings the models back to what is kept, bit by bit."""
        self._end_look()
        if self._undo is not None:
            restore_snapshot(self._undo)
        self.tied, self._undo = self.kept, None

    def hand_back(self) -> None:
        """Freezes the parameters that came frozen, and gives models that share nothing their own order of channels.

        Of a model that came frozen as a whole, private scales, biases and adapters are frozen as well.
        """
        self.waiting.end()
        self.restore_channel_order()
        own = {name: [key for key, _ in model.named_parameters()] for name, model in self.models.items()}
        freeze(self.models, {n: self.given_frozen[n] if n not in self._came_frozen else own[n] for n in own})

    @property
    def continued_trial(self) -> Configuration | None:
        """The failed trial whose weights the next one starts from, if any."""
        return self.tied if self.tied != self.kept else None

    def reset_to_unmerged(self, groups: Configuration, names: Iterable[str]) -> None:
        """Gives tied groups the mean of the unmerged models' weights, and all that is private its unmerged values."""
        for name in names:
            self.models[name].load_state_dict(self.unmerged[name].state_dict(), strict=False)  # it has no adapters
        reset(self.models, groups, self.unmerged)

    # ---- the order of channels -------------------------------------------------------------------------------

    def needs_alignment(self) -> bool:
        """Whether a model that shares nothing has not been aligned yet."""
        return not set(self.models) <= self.sharing() | set(self.order.permutations)

    def align_channels(self, groups: Configuration, images: Mapping[str, list[Batch]], method: str, seed: int) -> None:
        """Permutes the channels of models that share nothing yet so that they line up with those of the others.

        What they compute stays the same. A model that was aligned once stays as it is. The first rank finds the order.
        """
        found = ranks.of_first(threads_of_waiting_ranks()(lambda: self._find_alignment(groups, images, method, seed)))
        for name, permutations in found.items():
            if not ranks.is_first():
                apply_permutations(self.unmerged[name], permutations)
            self.order.permutations[name] = permutations
            if self.store_dtype == torch.int8:  # rounded on images: other values than those of rounding it again
                self.order.apply(name, self.models[name])
            else:
                self.models[name].load_state_dict(self.unmerged[name].state_dict())
            self.order.applied.add(name)
        for name in self.models:
            self.order.permutations.setdefault(name, {})
        self.round_weights()

    def _find_alignment(
        self, groups: Configuration, images: Mapping[str, list[Batch]], method: str, seed: int
    ) -> dict[str, Permutations]:
        """Aligns the unmerged models; returns what was permuted."""
        fixed = self.sharing() | set(self.order.permutations)
        aligned = deep_copy(self.unmerged)  # so that an interrupt leaves no model half aligned
        done = align(aligned, groups, images, method=method, seed=seed, fixed=fixed)
        self.unmerged.load_state_dict(aligned.state_dict())
        self.order.spaces.update(done.found)
        return permutations_of(done)

    def restore_channel_order(self) -> None:
        """Gives the models that share nothing the order of channels that they came with, bit by bit."""
        for name in set(self.order.applied) - self.sharing():
            self.order.revert(name, self.models[name])

    def is_stored_otherwise(self, manifest: Mapping) -> bool:
        """Whether a stored task has its channels in another order than now, or other normalisation is shared."""
        tasks, num_shared = manifest["tasks"], sum(g.get("normalisation", False) for g in manifest["shared_layers"])
        permuted = any(task["permuted"] and name not in self.order.applied for name, task in tasks.items())
        return permuted or num_shared != len(self.shared_norms)

    def sharing(self) -> set[str]:
        """Tasks that share something in what is kept."""
        return {task for group in self.kept for task in group.tasks}

    # ---- resuming --------------------------------------------------------------------------------------------

    def load_kept(self, results_path: Path, manifest: Mapping, names: Collection[str]) -> None:
        """Loads the named models from a results folder, with its ties, into the order of channels of its search.

        Stored models that share nothing may be in either order: the manifest says of each whether it is `permuted`.
        """
        self.use_layout(manifest["run"].get("channels_last", self.channels_last))  # earlier versions do not say it
        models = {name: self.models[name] for name in names}
        load_merged(results_path, models, self.device, tasks=names, verify=True, dtype=self._computed_in)
        self.lay_out(self.models)
        shared = restrict(from_plain(manifest["shared_layers"]), names)
        self.shared_norms = tuple(group for group in shared if group.normalisation)
        sharing = {o["task"] for group in manifest["shared_layers"] for o in group["occurrences"]}
        recorded = manifest["run"]["permutations"]
        self.order.permutations = {name: recorded[name] for name in names if name in recorded}
        for name in self.order.permutations:
            if manifest["tasks"][name].get("permuted", name in sharing):
                self.order.applied.add(name)
            apply_permutations(self.unmerged[name], self.order.permutations[name])
            self.order.apply(name, self.models[name])
        freeze(self.models, self._frozen)

    @property
    def _computed_in(self) -> torch.dtype | None:
        """The type of the live models' weights; None: as they came."""
        return None if self.store_dtype == torch.float32 else torch.float32

    def set_kept(self, kept: Configuration) -> None:
        """Says what the loaded models have tied."""
        assert all(is_tied(self.models, group) for group in kept), "the store and the search state disagree"
        self.kept = self.tied = kept

    def untie_norms(self) -> None:
        """Gives every task normalisation of its own again, with the values that it has now."""
        untie_normalisation(self.models, self.shared_norms)
        self.shared_norms = ()

    def fold_adapters(self, names: Iterable[str]) -> list[str]:
        """Writes adapters, scales and biases of layers that no longer share into the layers' own weights.

        Returns the tasks that had such layers.
        """
        folded = []
        adapted = {occurrence for group in self.kept if group.private_bytes for occurrence in group.occurrences}
        for name in names:
            for layer, module in list(own_modules(self.models[name])):
                if (name, layer) not in adapted and has_additions(module):
                    fold(module)
                    folded.append(name)
        self.round_weights()
        return list(dict.fromkeys(folded))

    def difference_to(self, reloaded: Mapping[str, nn.Module]) -> str | None:
        """The first tensor, as "task: name", in which models loaded from disk differ from the live ones by a bit.

        Weights of the store's type must be those of the live ones, which have such values in float32.
        """
        for name, model in reloaded.items():
            own, other = named_tensors(self.models[name]), named_tensors(model)
            for key in {**own, **other}:
                if key not in own or key not in other or not self._same_values(own[key], other[key]):
                    return f"{name}: {key}"
        return None

    def _same_values(self, own: Tensor, loaded: Tensor) -> bool:
        is_rounded = own.dtype == torch.float32 and loaded.dtype == self.store_dtype
        return _same_bits(own, loaded.float() if is_rounded else loaded)

    def state_of_continued_trial(self) -> dict:
        """The weights of the failed trial that the next one continues."""
        return self._container(affected_tasks(self.kept, self.tied)).state_dict()

    def load_continued_trial(self, plain: list[dict], weights: Mapping) -> None:
        """Ties and loads a failed trial that the next one continues; plain: its configuration."""
        self.begin_trial(from_plain(plain), "mean")
        self.models.load_state_dict(weights, strict=False)

    def _container(self, names: Iterable[str]) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.models[name] for name in names})


def _copies(models: nn.ModuleDict) -> nn.ModuleDict:
    """Copies of the models. Raises WorkloadError with every model that cannot be copied."""
    copies, problems = nn.ModuleDict(), []
    for name, model in models.items():
        try:
            copies[name] = deep_copy(model)
        except Exception as error:  # a user's model may hold anything: a lock, a file, a generator
            got = f"a model that cannot be copied: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            problems.append(Problem(name, "model", got, "a model of which copy.deepcopy makes a copy"))
    if problems:
        raise WorkloadError(problems)
    return copies


def _frozen_in_training(name: str, model: nn.Module) -> list[str]:
    """The parameters that are not trained: those that came frozen, unless all did, as of a model that is deployed."""
    frozen = frozen_parameters(model)
    if any(parameter.requires_grad for parameter in model.parameters()):
        return frozen
    log.warning(
        "%s: all parameters are frozen; they are trained where that is needed, and frozen again at the end", name
    )
    return []


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
