"""One small detection dataset in every layout that is recognised: the same images, boxes and classes."""

import json
from pathlib import Path

from PIL import Image

SIZE = (40, 20)
NAMES = ("car", "person")
SPARSE = {"car": 3, "person": 7}
# image: [(class, x1, y1, x2, y2) in pixels]
TRUTH = {
    "train": {"a": [("car", 2, 4, 12, 14)], "b": [("person", 0, 0, 40, 20), ("car", 20, 10, 30, 20)], "c": []},
    "val": {"d": [("person", 10, 5, 20, 15)], "e": []},
}


def write_images(folder: Path, stems) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, stem in enumerate(stems):
        Image.new("RGB", SIZE, (number * 20, 90, 90)).save(folder / f"{stem}.png")


def yolo_text(objects) -> str:
    lines = []
    for name, x1, y1, x2, y2 in objects:
        width, height = SIZE
        x, y, w, h = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        lines.append(f"{NAMES.index(name)} {x} {y} {w} {h}\n")
    return "".join(lines)


def coco_dict(images: dict, ids=SPARSE) -> dict:
    found = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for n, i in reversed(ids.items())]}
    for number, (stem, objects) in enumerate(images.items()):
        size = {"width": SIZE[0], "height": SIZE[1]}
        found["images"].append({"id": 10 + number, "file_name": f"{stem}.png", **size})
        for name, x1, y1, x2, y2 in objects:
            key = 100 + len(found["annotations"])
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0, "area": (x2 - x1) * (y2 - y1)}
            found["annotations"].append({"id": key, "image_id": 10 + number, "category_id": ids[name], **box})
    return found


def voc_object(name, x1, y1, x2, y2, more="") -> str:
    corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    return f"<object><name>{name}</name>{more}\n<bndbox>{corners}</bndbox></object>"


def voc_text(objects) -> str:
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    return "\n".join(["<annotation>", size, *(voc_object(*item) for item in objects), "</annotation>\n"])


def write_readme(root: Path) -> None:
    for split, images in TRUTH.items():
        write_images(root / split / "images", images)
        (root / split / "annotations").mkdir()
        for stem, objects in images.items():
            (root / split / "annotations" / f"{stem}.txt").write_text(yolo_text(objects))


def write_yaml(root: Path) -> None:
    """As Ultralytics lays it out."""
    for split, images in TRUTH.items():
        write_images(root / "images" / split, images)
        (root / "labels" / split).mkdir(parents=True)
        for stem, objects in images.items():
            if objects:
                (root / "labels" / split / f"{stem}.txt").write_text(yolo_text(objects))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\ntest:\nnames: [car, person]\n")


def write_yaml_roboflow(root: Path) -> None:
    for split, images in TRUTH.items():
        folder = root / {"val": "valid"}.get(split, split)
        write_images(folder / "images", images)
        (folder / "labels").mkdir()
        for stem, objects in images.items():
            (folder / "labels" / f"{stem}.txt").write_text(yolo_text(objects))
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['car', 'person']\n")


def write_yaml_lists(root: Path) -> None:
    """Text files that list images, under a yaml file of any name."""
    for split, images in TRUTH.items():
        write_images(root / "images", images)
        (root / "labels").mkdir(exist_ok=True)
        (root / f"{split}.txt").write_text("".join(f"./images/{stem}.png\n" for stem in images))
        for stem, objects in images.items():
            (root / "labels" / f"{stem}.txt").write_text(yolo_text(objects))
    (root / "street.yaml").write_text("train: [train.txt]\nval: val.txt\nnames:\n  0: car\n  1: person\n")


def write_coco(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    for split, images in TRUTH.items():
        write_images(root / f"{split}2017", images)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco_dict(images)))


def write_coco_roboflow(root: Path) -> None:
    for split, images in TRUTH.items():
        folder = root / {"val": "valid"}.get(split, split)
        write_images(folder, images)
        (folder / "_annotations.coco.json").write_text(json.dumps(coco_dict(images)))


def write_voc(root: Path) -> None:
    for part in ("Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    for split, images in TRUTH.items():
        write_images(root / "JPEGImages", images)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            (root / "Annotations" / f"{stem}.xml").write_text(voc_text(objects))


def write_voc_roboflow(root: Path) -> None:
    for split, images in TRUTH.items():
        folder = root / {"val": "valid"}.get(split, split)
        write_images(folder, images)
        for stem, objects in images.items():
            (folder / f"{stem}.xml").write_text(voc_text(objects))


WRITERS = {
    "readme": write_readme,
    "yaml": write_yaml,
    "yaml_roboflow": write_yaml_roboflow,
    "yaml_lists": write_yaml_lists,
    "coco": write_coco,
    "coco_roboflow": write_coco_roboflow,
    "voc": write_voc,
    "voc_roboflow": write_voc_roboflow,
}
