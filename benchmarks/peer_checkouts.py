"""Methods whose authors' code is run from a checkout of theirs: PLeaS and ZipIt, on two models of one architecture.

A checkout is imported only when it is used. Both merge every layer (PLeaS: all ratios 0) and give each model's own
classifier the channels of the merged model; the tied layers of the case then get the merged weights.
"""

import contextlib
import copy
import importlib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.peer_methods import Case, Method
from gemel.environment.seeds import generator
from gemel.forward.batches import Batch
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie

STEPS = 400  # of PLeaS: --max_steps of its experiments/different_label_space/run_torchvision.py
BATCH_SIZE = 32  # of the same file
HEAD = "fc"  # the classifier's name in the models that both know


def pleas(checkout: Path) -> Method:
    """Nasery et al., "PLeaS: Merging Models with Permutations and Least Squares", CVPR 2025: channels permuted by
    activations, then every layer trained to put out the mean of both models' outputs. Code: SewoongLab/PLeaS-Merging.

    Their entry points as in their README: get_permutation_spec, activation_matching, partial_merge, train. The
    classifiers, of which each task keeps its own, are replaced by one of a single class meanwhile.
    """

    def method(case: Case) -> None:
        names, (one, other), images = list(case.models), _pair(case), _images(case)
        for model in (one, other):
            head = nn.Linear(cast(nn.Linear, model.get_submodule(HEAD)).in_features, 1, bias=False)
            nn.init.zeros_(head.weight)
            model.set_submodule(HEAD, head.to(case.device))
        with _imported(checkout), _on(case.device):
            compiler, utils = (importlib.import_module(f"pleas.core.{name}") for name in ("compiler", "utils"))
            matching, partial, merging = (
                importlib.import_module(f"pleas.methods.{name}")
                for name in ("activation_matching", "partial_matching", "pleas_merging")
            )
            spec = compiler.get_permutation_spec(one, (images[:2],))
            orders, costs = matching.activation_matching(spec, one, other, [(images, None)], 1, output_costs=True)
            ratios = dict.fromkeys(spec, 0.0)
            merged = partial.partial_merge(spec, one, other, orders, costs, ratios).to(case.device)
            batches = _random_batches(images, STEPS + 1, case.seed)
            arguments = (spec, orders, costs, ratios, False, STEPS, None)
            merged = merging.train(batches, one, other, merged, *arguments, num_classes=1, model_type="rn18")
            utils.apply_perm(orders, spec, case.models[names[1]], inplace=True)
        _tie_to(case, dict(merged.named_parameters()))

    return method


def zipit(checkout: Path) -> Method:
    """Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", ICLR 2024: channels paired across
    models and within one, by correlation. Code: gstoica27/ZipIt.

    Their entry points as in their non_imnet_evaluation_scripts/multidataset_merging.py, with all layers zipped:
    graphify, ModelMerge.transform. The normalisation behind a layer gets the weights that theirs has; the statistics
    are each task's own.
    """

    @torch.no_grad()
    def method(case: Case) -> None:
        one, other = _pair(case)
        loaders = [[(batch, None) for batch in case.images[name]] for name in case.models]
        with _imported(checkout), _on(case.device):
            graph = importlib.import_module("graphs.resnet_graph").resnet18
            merger = importlib.import_module("model_merger")
            graphs = [graph(copy.deepcopy(model)).graphify() for model in (one, other)]
            merge = merger.ModelMerge(*graphs, device=case.device)
            merge.transform(one, loaders, transform_fn=merger.match_tensors_zipit)
            merge.clear_hooks()
        merged = {k: v for k, v in merge.merged_model.state_dict().items() if not k.startswith(f"{HEAD}.")}
        for model, part in zip(case.models.values(), graphs, strict=True):
            model.load_state_dict({**part.model.state_dict(), **merged})
        _tie_to(case, merged)

    return method


def _pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """Copies of the two models. Raises ValueError where there are not two, or where their classifier is no `fc`."""
    if len(case.models) != 2:
        raise ValueError(f"merges two models: got {len(case.models)}; --tasks picks two")
    for task, model in case.models.items():
        if not isinstance(getattr(model, HEAD, None), nn.Linear):
            raise ValueError(f"{task}: got {type(model).__name__}; allowed: a ResNet whose classifier is `{HEAD}`")
    one, other = (copy.deepcopy(model).eval() for model in case.models.values())
    return one, other


def _images(case: Case) -> Tensor:
    """The images of both tasks. Raises ValueError where a batch is not of one size."""
    batches: list[Batch] = [batch for own in case.images.values() for batch in own]
    tensors = [batch for batch in batches if torch.is_tensor(batch)]
    if len(tensors) < len(batches) or len({batch.shape[1:] for batch in tensors}) > 1:
        raise ValueError("runs both models on the images of both tasks: they are not of one size")
    return torch.cat(tensors).to(case.device)


def _random_batches(images: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, None]]:
    source = generator(seed, "pleas")
    for _ in range(count):
        yield images[torch.randperm(len(images), generator=source)[:BATCH_SIZE]], None


def _tie_to(case: Case, merged: Mapping[str, Tensor]) -> None:
    """Ties all groups to the merged weights; a group that the merged model has not in this size has the mean."""
    groups = find_groups(case.models)
    tie(case.models, groups)
    for group in groups:
        o = group.occurrences[0]
        for key, parameter in case.models[o.task].get_submodule(o.layer).named_parameters(recurse=False):
            values = merged.get(f"{o.layer}.{key}")
            if values is not None and values.shape == parameter.shape:
                parameter.data.copy_(values)
    case.reestimate()


@contextlib.contextmanager
def _imported(checkout: Path) -> Iterator[None]:
    """Within, the checkout can be imported, and what its code prints is dropped; its modules are forgotten after."""
    before, checkout = set(sys.modules), checkout.resolve()
    with mock.patch.object(sys, "path", [str(checkout), *sys.path]), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if any(Path(place).is_relative_to(checkout) for place in _places(sys.modules[name])):
                    del sys.modules[name]


def _places(module: ModuleType) -> list[str]:
    """The file of a module, and the folders of a package."""
    file = getattr(module, "__file__", None)
    return [*([file] if file else []), *getattr(module, "__path__", ())]


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Within, `cuda()` of tensors and modules, which the checkouts call everywhere, moves them to this device."""

    def move(own: Any) -> Any:
        return own.to(device)

    with mock.patch.multiple(Tensor, cuda=move), mock.patch.multiple(nn.Module, cuda=move):
        yield
