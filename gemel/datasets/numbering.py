"""Which class id of the model a class of the dataset has, where the annotations name classes or number them freely.

COCO's categories have ids of any numbers, Pascal VOC's objects have names. Where the dataset and the number of the
model's outputs leave more than one meaning, the task must say which (`class_ids`): nothing is guessed.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from gemel.datasets.records import shown
from gemel.workload import AS_NUMBERED, IN_ORDER

RENUMBERED = "categories were numbered by their order, so the model's class ids are {} (class_ids: 'in_order')"
BY_NAME = "classes were numbered by their sorted names, from {} for {!r} to {} for {!r}"
ONLY_ELSEWHERE = "the class {!r}, of which train has no object, counts among the classes, as the model has {} outputs"
TWO_CASES = "{} differ in capital letters alone and are two classes"

Wrong = tuple[str, str] | None  # what is wrong, and what is allowed


class Numbering(NamedTuple):
    """How a task's model numbers classes.

    outputs: how many it has, the background counted; None if unknown. first_label: the label of class id 0.
    wanted: the task's `class_ids`.
    """

    outputs: int | None = None
    first_label: int = 1
    wanted: str | Mapping[str, int] | None = None


def category_labels(
    categories: Mapping[int, str], used: Collection[int], numbering: Numbering
) -> tuple[dict[int, int], Wrong, Counter]:
    """(COCO category id -> label of the model, what is wrong, what is to be said); used: ids of objects in train.

    Labels either count the categories in the order of their ids, from `first_label` on, or are the category ids:
    torchvision's COCO detectors have 91 outputs for 80 categories with ids up to 90. Where both are possible and
    differ, the number of outputs decides, if it fits one of them; else the task must. Without a number of outputs, ids
    without a gap, the first of which occurs, are counted by their order.
    """
    ordered, first, outputs = sorted(categories), numbering.first_label, numbering.outputs
    counted = {category: first + index for index, category in enumerate(ordered)}
    as_numbered = {category: category for category in ordered}
    lowest = min(used, default=first)
    if isinstance(numbering.wanted, Mapping):
        names = {categories[category] for category in used}
        labels = {category: numbering.wanted[name] for category, name in categories.items() if name in numbering.wanted}
        return labels, _lacking(names, numbering.wanted, first), Counter()
    if numbering.wanted == AS_NUMBERED:
        wrong = f"category id {lowest} with {AS_NUMBERED!r}", f"category ids from {first}, as 0 is the background"
        return as_numbered, wrong if lowest < first else None, Counter()
    if numbering.wanted == IN_ORDER or all(counted[category] == category for category in used):
        return counted, None, Counter()
    if outputs is not None and len(ordered) + first != outputs == ordered[-1] + 1:
        return as_numbered, None, Counter()
    if lowest < first or outputs is not None and (ordered[-1] >= outputs or len(ordered) + first == outputs):
        return counted, None, Counter()
    if outputs is None and ordered[-1] - ordered[0] == len(ordered) - 1 and lowest == ordered[0]:
        return counted, None, Counter({RENUMBERED.format(f"{first} to {counted[ordered[-1]]}"): 1})
    got = f"category ids {shown(ordered)}, which may be the model's class ids or only number its classes in this order"
    allowed = "ids that have one meaning for a model with " + (f"{outputs} outputs" if outputs else "unknown outputs")
    return counted, (got, f"{allowed}: state class_ids ({IN_ORDER!r} or {AS_NUMBERED!r}), or num_classes"), Counter()


def name_labels(
    train: Collection[str], elsewhere: Collection[str], numbering: Numbering
) -> tuple[dict[str, int], Wrong, Counter]:
    """(class name -> label of the model, what is wrong, what is to be said) where objects have names alone.

    train, elsewhere: the names of the objects in train and in the other splits. The sorted names of train are counted
    from `first_label` on; with those of the other splits where the model then has as many outputs. With fewer names
    than outputs it is unknown which class train lacks, and so which label every class has.
    """
    first, outputs, names = numbering.first_label, numbering.outputs, sorted(train)
    if isinstance(numbering.wanted, Mapping):
        return dict(numbering.wanted), _lacking({*train, *elsewhere}, numbering.wanted, first), Counter()
    allowed = "classes.txt in the dataset, with the name of every class of the model, one per line, or class_ids"
    if numbering.wanted is not None:
        return (
            {},
            (f"class_ids {numbering.wanted!r}", "a dictionary, as objects have names alone"),
            Counter(),
        )
    said: Counter[str] = Counter()
    every = sorted({*train, *elsewhere})
    if outputs is not None and len(names) + first < outputs == len(every) + first:
        said.update({ONLY_ELSEWHERE.format(name, outputs): 1 for name in every if name not in train})
        names = every
    labels = {name: first + index for index, name in enumerate(names)}
    same: dict[str, list[str]] = defaultdict(list)
    for name in names:
        same[name.lower()].append(name)
    said.update({TWO_CASES.format(" and ".join(map(repr, found))): 1 for found in same.values() if len(found) > 1})
    if outputs is not None and names and len(names) + first < outputs:
        got = f"{len(names)} classes in train ({', '.join(names[:20])}) for a model with {outputs} outputs"
        return labels, (got, f"{allowed}: else the labels of all classes may be shifted"), said
    if outputs is None and names:
        said[BY_NAME.format(first, names[0], labels[names[-1]], names[-1])] += 1
    return labels, None, said


def _lacking(names: Collection[str], wanted: Mapping[str, int], first: int) -> Wrong:
    """Classes that occur without a class id of the model in `class_ids`."""
    lacking = sorted(name for name in names if wanted.get(name, -1) < first)
    if not lacking:
        return None
    return f"objects of {', '.join(lacking[:10])}", f"the classes of class_ids, with class ids from {first}"
