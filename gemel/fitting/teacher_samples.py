"""What the unmerged models put out at the layers of a fit: sampled once, kept in memory or in a file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemel.environment import ranks
from gemel.environment.seeds import generator as generator_of
from gemel.fitting.batch_norm import ChannelMoments, batch_norms, channel_moments
from gemel.fitting.importance import MAX_IMAGES, output_metrics
from gemel.fitting.least_squares import quotas
from gemel.fitting.memory import UNBOUNDED, FitMemory, Footprint, footprint_of
from gemel.fitting.rows import (
    Sample,
    Samples,
    is_linear_map,
    linear_map_at,
    of_regions,
    sample_outputs,
    shape_of,
)
from gemel.fitting.store import Stored, TensorStore
from gemel.forward.batches import Batch
from gemel.forward.hooks import hooked
from gemel.forward.modes import Models
from gemel.sharing.groups import Configuration, Group

MEASURED_IMAGES = 4  # of which the memory of a forward pass is measured


class StoredSample(NamedTuple):
    """As rows.Sample, with its tensors in a store."""

    positions: Stored
    input_shape: torch.Size
    output_shape: torch.Size
    y: Stored

    @property
    def picked(self) -> Tensor:
        return self.positions.load()


class StoredMoments(NamedTuple):
    """As batch_norm.ChannelMoments, with its tensors in a store."""

    num_values: int
    values: Stored  # [2, channels]: mean, variance

    @classmethod
    def put(cls, moments: ChannelMoments, store: TensorStore) -> "StoredMoments":
        return cls(moments.num_values, store.put(torch.stack([moments.mean, moments.var])))

    def load(self) -> ChannelMoments:
        return ChannelMoments(self.num_values, *self.values.load())


class StoredMetric(NamedTuple):
    """As importance.OutputMetric, with its matrix in a store."""

    matrix: Stored
    importance: float


@dataclass
class WaitingBatches:
    """The batches that wait at one layer of one task: its first ones."""

    sizes: Sequence[int]  # images in each

    @property
    def num_batches(self) -> int:
        return len(self.sizes)

    @property
    def num_images(self) -> int:
        return sum(self.sizes)


@dataclass
class LayerSummary(WaitingBatches):
    """What is known of the samples of a layer whose task belongs to another rank."""

    is_always_called: bool = False


@dataclass
class LayerSamples(WaitingBatches):
    """The samples of one layer of one task, by batch."""

    calls: list[list[StoredSample]] = field(default_factory=list)
    inputs: dict[int, Stored] = field(default_factory=dict)  # on regions, which are fitted on the teacher's inputs
    later_inputs: dict[int, Stored] = field(default_factory=dict)  # of all calls but the first
    metric: Stored | None = None  # the matrix of importance.OutputMetric, if it is known

    @property
    def is_always_called(self) -> bool:
        return bool(self.calls) and all(self.calls)

    def outputs(self) -> Tensor:
        """y [groups, n, o] of all batches."""
        parts = [call.y for calls in self.calls for call in calls]
        groups, _, width = parts[0].shape
        y = torch.empty(
            groups, sum(part.shape[1] for part in parts), width, dtype=parts[0].dtype, device=parts[0].device
        )
        end = 0
        for part in parts:
            begin, end = end, end + part.shape[1]
            y[:, begin:end] = part.load()
        return y


class TeacherSamples(dict[tuple[str, str], LayerSamples]):
    """(task, layer) -> its samples.

    waiting: task -> layer or batch normalisation, from the input on -> how many of its first batches wait there.
    norms: (task, batch normalisation that is called once in a pass) -> moments of its inputs, by number of the batch.
    elsewhere: (task, layer) -> what is known of those of other ranks' tasks; `waiting` has these as well, and `norms`
    their names. num_batches, num_images: task -> of its images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, dict[str, int]] = {}
        self.norms: dict[tuple[str, str], dict[int, StoredMoments]] = {}
        self.elsewhere: dict[tuple[str, str], LayerSummary] = {}
        self.num_batches: dict[str, int] = {}
        self.num_images: dict[str, int] = {}

    def summary(self, key: tuple[str, str]) -> "LayerSamples | LayerSummary":
        """How many batches and images there are of a layer of any rank's task."""
        return self[key] if key in self else self.elsewhere[key]

    def with_other_ranks(self) -> "TeacherSamples":
        """Adds what is to be known of the samples of other ranks' tasks; all ranks call it."""
        if ranks.size() == 1:
            return self
        layers = [[task, name, list(own.sizes), own.is_always_called] for (task, name), own in self.items()]
        own = {"waiting": self.waiting, "norms": list(self.norms), "layers": layers}
        own |= {"batches": self.num_batches, "images": self.num_images}
        for number, part in enumerate(ranks.gathered(own)):
            if number != ranks.rank():
                self.waiting |= part["waiting"]
                self.num_batches |= part["batches"]
                self.num_images |= part["images"]
                self.norms |= {(task, name): {} for task, name in part["norms"]}
                self.elsewhere |= {(task, name): LayerSummary(*values) for task, name, *values in part["layers"]}
        return self


class TeacherSampler:
    """Draws rows of layers and records the unmerged models' outputs there, once for every layer and set of images.

    All that stays of a forward pass goes to the store at once, small tensors too: between activations they would leave
    holes that the allocator cannot give back. seed: of the positions that are drawn; those of a layer do not depend on
    which others are sampled. memory: bounds how many batches wait at a layer, the rows of a group, and what of the
    samples stays in memory.
    """

    def __init__(self, teachers: Models, seed: int, memory: FitMemory = UNBOUNDED, store: TensorStore | None = None):
        self.teachers, self.seed, self.memory = teachers, seed, memory
        self.store = TensorStore(memory.samples) if store is None else store
        self.footprints: dict[str, Footprint] = {}
        self._known: dict[tuple, LayerSamples] = {}
        self._metrics: dict[tuple[str, int], dict[str, StoredMetric]] = {}
        self._norms: dict[tuple, dict[int, dict[str, list[StoredMoments]]]] = {}
        self._images: list[Sequence[Batch]] = []  # of what is known: while they are here, their ids name them

    def footprint(self, task: str, images: Batch) -> Footprint:
        """What an image of the task takes in a forward pass; measured once, on some of these images."""
        if task not in self.footprints:
            model = self.teachers[task]
            names = [*batch_norms(model), *(name for name, m in model.named_modules() if is_linear_map(m))]
            self.footprints[task] = footprint_of(model, names, images[:MEASURED_IMAGES])
        return self.footprints[task]

    def waiting(self, groups: Configuration, images: Mapping[str, Sequence[Batch]]) -> dict[str, dict[str, int]]:
        """Task -> layer of the groups or batch normalisation, from the input on -> how many of its batches wait."""
        found: dict[str, dict[str, int]] = {}
        for task, tied in self._layers(groups, images).items():
            layers = [*tied, *batch_norms(self.teachers[task])]
            everything = dict.fromkeys(layers, len(images[task]))
            if self.memory.is_bounded:
                footprint = self.footprint(task, images[task][0])
                found[task] = self.memory.batches_that_wait(footprint, layers, sizes_of(images[task]))
                everything = {name: count for name, count in everything.items() if name not in found[task]}
            found[task] = {**found.get(task, {}), **everything}
        return found

    def is_short_of_rows(self, groups: Configuration, images: Mapping[str, Sequence[Batch]], positions: int) -> bool:
        """Whether some layer has fewer rows than half its inputs, and more images would give it more."""
        linear = self._linear(groups)
        for task, layers in self.waiting(groups, images).items():
            footprint, sizes = self.footprint(task, images[task][0]), sizes_of(images[task])
            for name, quota in quotas(self.teachers, linear, task, positions, self.memory.rows).items():
                own = footprint.layers.get(name)
                rows = 0 if own is None else int(own.positions * sum(sizes[: layers[name]]))
                enough = min(quota, shape_of(linear_map_at(self.teachers[task], name))[1] / 2)
                if 0 < rows < enough and layers[name] == len(sizes):
                    return True
        return False

    def sample(
        self, groups: Configuration, images: Mapping[str, Sequence[Batch]], positions: int = 2048
    ) -> TeacherSamples:
        """The samples of all layers of the groups; draws those that are not known of these images.

        positions: rows per layer and task. With the metrics of layers that were asked for before.
        """
        linear, found, tied = self._linear(groups), TeacherSamples(), self._layers(groups, images)
        found.waiting = self.waiting(groups, images)
        found.num_batches = {task: len(images[task]) for task in tied}
        found.num_images = {task: sum(sizes_of(images[task])) for task in tied}
        for task, layers in found.waiting.items():
            version = self._version(task)
            wanted = quotas(self.teachers, linear, task, positions, self.memory.rows)
            drawn_from = (task, id(images[task]), version)
            names = [name for name in layers if name in tied[task]]
            keys = {name: (*drawn_from, name, wanted.get(name, 0), layers[name]) for name in names}
            new = {name: wanted[name] for name in names if name in wanted and keys[name] not in self._known}
            sizes = sizes_of(images[task])
            for name in names:
                found[task, name] = self._known.get(keys[name]) or LayerSamples(sizes[: layers[name]])
            norms = dict(self._norms.get(drawn_from, {}))
            if new:
                self._draw(task, {name: found[task, name] for name in new}, new, images[task], norms)
                metrics = self._metrics.get((task, version), {})
                for name in metrics.keys() & new.keys():
                    found[task, name].metric = metrics[name].matrix
                self._images.append(images[task])
            self._known |= {keys[name]: found[task, name] for name in names}  # not before: memory may have run out
            self._norms[drawn_from] = norms
            for name in batch_norms(self.teachers[task]):
                calls = [of_batch.get(name, []) for of_batch in norms.values()]
                if calls and all(len(own) == 1 for own in calls):
                    found.norms[task, name] = {number: of_batch[name][0] for number, of_batch in norms.items()}
        return found

    def metrics(self, task: str, draw: Callable[[], Sequence[Batch]]) -> dict[str, StoredMetric]:
        """How much errors at the layers of the task's unmerged model count, on images of which few are enough.

        draw: gives them; asked once, after which the metrics of this model are known. Fewer images run at a time where
        a backward pass takes much memory.
        """
        version = self._version(task)
        if (task, version) not in self._metrics:
            images, at_a_time = draw(), MAX_IMAGES
            if self.memory.is_bounded:
                at_a_time = self.memory.images_with_gradients(self.footprint(task, images[0]), at_a_time)
            found = output_metrics(self.teachers[task], images, generator_of(self.seed, task, "metrics"), at_a_time)
            self._metrics[task, version] = {
                name: StoredMetric(self.store.put(metric.matrix), metric.importance) for name, metric in found.items()
            }
        return self._metrics[task, version]

    def _version(self, task: str) -> int:
        """A number that changes when the unmerged model does, as where its channels are reordered."""
        return sum(tensor._version for tensor in self.teachers[task].state_dict().values())

    def _draw(
        self,
        task: str,
        layers: Mapping[str, LayerSamples],
        quota_of: Mapping[str, int],
        images: Sequence[Batch],
        norms: dict[int, dict[str, list[StoredMoments]]],
    ) -> None:
        """Runs the task's unmerged model on the batches, and fills in the samples of the layers and the moments."""

        def note(name: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            norms[number].setdefault(name, []).append(StoredMoments.put(channel_moments(inputs[0]), self.store))

        def takes_inputs(call: int, inputs: Tensor) -> bool:
            return call > 0 or len(inputs) != len(batch)  # of later calls, and on regions

        generators = {name: generator_of(self.seed, task, name) for name in layers}
        teacher = self.teachers[task]
        for number in range(max(own.num_batches for own in layers.values())):
            batch = images[number]
            present = {name: own for name, own in layers.items() if number < own.num_batches}
            shares = {name: -(-quota_of[name] * len(batch) // own.num_images) for name, own in present.items()}
            norms[number] = {}
            with hooked(teacher, batch_norms(teacher), note, before=True):
                samples = sample_outputs(teacher, shares, batch, generators, takes_inputs)
            for name, own in present.items():
                own.calls.append([self._kept(sample) for sample in samples.get(name, [])])
            self._add_inputs(layers, samples, batch, number)

    def _kept(self, sample: Sample) -> StoredSample:
        return StoredSample(
            self.store.put(sample.picked), sample.input_shape, sample.output_shape, self.store.put(sample.y)
        )

    def _add_inputs(self, layers: Mapping[str, LayerSamples], samples: Samples, batch: Batch, number: int) -> None:
        """Keeps the teacher's inputs of layers on regions, and of all calls of a layer but the first."""
        for name, calls in samples.items():
            rows = [call.x for call in calls if call.x is not None]
            if of_regions(calls, batch) and len(rows) == len(calls):
                layers[name].inputs[number] = self.store.put(torch.cat(rows, 1))
            elif rows:
                layers[name].later_inputs[number] = self.store.put(torch.cat(rows[len(rows) - len(calls) + 1 :], 1))

    def _layers(self, groups: Configuration, images: Mapping[str, Sequence[Batch]]) -> dict[str, list[str]]:
        """Task, of those that have images here -> its layers in the groups."""
        tasks = dict.fromkeys(task for group in groups for task in group.tasks if task in images)
        return {task: [o.layer for group in groups for o in group.occurrences if o.task == task] for task in tasks}

    def _linear(self, groups: Configuration) -> list[Group]:
        firsts = ((group, group.occurrences[0]) for group in groups)
        return [group for group, o in firsts if is_linear_map(self.teachers[o.task].get_submodule(o.layer))]


def sample_teachers(
    teachers: Models,
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    generator: torch.Generator,
    positions: int = 2048,
) -> TeacherSamples:
    """Draws rows of the groups' layers and records the teachers' outputs there, of all images and without a bound.

    positions: rows per layer and task. The metrics of the layers are taken of the first images.
    """
    sampler = TeacherSampler(teachers, int(torch.randint(2**62, (), generator=generator)))
    for task in images:
        sampler.metrics(task, lambda task=task: images[task])  # type: ignore[misc]
    return sampler.sample(groups, images, positions)


def sizes_of(batches: Sequence[Batch]) -> list[int]:
    """Images in each batch; of batches that lie in a file without reading them."""
    return batches.sizes if isinstance(batches, StoredBatches) else [len(batch) for batch in batches]


class StoredBatches(Sequence[Batch]):
    """Batches of images in a store; each is loaded when it is asked for."""

    def __init__(self, batches: Iterable[Batch], store: TensorStore):
        self._batches = [store.put(b) if torch.is_tensor(b) else [store.put(image) for image in b] for b in batches]
        self.sizes = [len(batch) for batch in self._batches]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch = self._batches[index]
        return batch.load() if isinstance(batch, Stored) else [image.load() for image in batch]
