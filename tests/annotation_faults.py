"""Faults of annotations, one per row: (writer of format_samples.py, damage, the problems that are reported)."""

import json

from format_samples import SIZE, voc_object, voc_text

TEXT, IMAGE_A = "train/annotations/a.txt", "train/images/a.png"
LABELS = "labels/train/a.txt"
JSON = "annotations/instances_train2017.json"
XML = "Annotations/a.xml"
GOOD = "0 0.5 0.5 0.2 0.2\n"
FIVE = "5 numbers: class x_center y_center width height"
OUTLINE = FIVE + ", or a class and the x y of 3 or more points"
WHOLE = "class ids that are whole numbers from 0"
AREA = "boxes with a width and a height above 0"
SHARES = "boxes inside the image, relative to its width and height"
PATHS = "a folder of images, a text file with an image per line, or a list of these"
PIXELS = "4 finite numbers: x, y, width, height in pixels"
COCO_BOX = "[x, y, width, height] in pixels, inside the image, neither side negative"
CORNERS = "one <bndbox> with finite numbers xmin, ymin, xmax, ymax"
STEMS = "stems of images with an annotation file, each once, one per line"
SUFFIXES = (
    "images (.avif, .bmp, .dib, .gif, .j2k, .jfif, .jp2, .jpe, .jpeg, .jpg, .pbm, .pgm, .png, .pnm, .ppm, .tga, .tif, "
    ".tiff, .webp) that exist"
)


def put(file, content):
    """Replaces a file; content: text, bytes, or a function of the text that was there."""

    def damage(root):
        path = root / file
        text = content(path.read_text()) if callable(content) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def swap(file, old, new):
    def change(text):
        assert old in text
        return text.replace(old, new, 1)

    return put(file, change)


def edit(change, file=JSON):
    """Changes the parsed JSON in place, or replaces it by what `change` returns."""

    def damage(root):
        content = json.loads((root / file).read_text())
        changed = change(content)
        (root / file).write_text(json.dumps(content if changed is None else changed))

    return damage


def note(**values):
    """Changes the second annotation of train; a value of ... removes the key."""

    def change(content):
        entry = content["annotations"][1]
        entry.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del entry[key]

    return edit(change)


def picture(**values):
    return edit(lambda content: content["images"][1].update(values))


def remove(file):
    return lambda root: (root / file).unlink()


def xml(*objects, size=SIZE):
    text = voc_text([]).replace("<width>40</width><height>20</height>", size) if isinstance(size, str) else voc_text([])
    return put(XML, text.replace("</annotation>", "\n".join(objects) + "</annotation>"))


def frame(corners):
    return f"<object><name>car</name><bndbox>{corners}</bndbox></object>"


def bomb(root):
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    text = f'<?xml version="1.0"?>\n<!DOCTYPE annotation [<!ENTITY a0 "ha">{entities}]>\n<annotation>&a9;</annotation>'
    (root / XML).write_text(text)


def external(root):
    (root / "secret").write_text("secret")
    text = f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{root}/secret">]>\n<annotation>&e;</annotation>'
    (root / XML).write_bytes(text.encode("utf-16"))


def yaml_bomb(root):
    levels = "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
    (root / "data.yaml").write_text(f"train: images/train\nb0: &b0 {{a: 1}}\n{levels}")


REFUSED = [
    # ---- text files of the README's layout
    ("readme", put(TEXT, "0 0.5 0.5 0.2\n"), f"{TEXT} line 1: got '0 0.5 0.5 0.2'; allowed: {FIVE}"),
    ("readme", put(TEXT, GOOD + "0 .5 .5 .2 .2 .9"), f"{TEXT} line 2: got '0 .5 .5 .2 .2 .9'; allowed: {FIVE}"),
    ("readme", put(TEXT, "\n\n0;0.5;0.5;0.2;0.2"), f"{TEXT} line 3: got '0;0.5;0.5;0.2;0.2'; allowed: {FIVE}"),
    ("readme", put(TEXT, "0 0.5 nan 0.2 0.2"), f"{TEXT} line 1: got '0 0.5 nan 0.2 0.2'; allowed: finite numbers"),
    ("readme", put(TEXT, "0 0.5 0.5 1e999 0.2"), f"{TEXT} line 1: got '0 0.5 0.5 1e999 0.2'; allowed: finite numbers"),
    ("readme", put(TEXT, "0 0.5 0.5 -0.2 0.2"), f"{TEXT} line 1: got the box 0.5 0.5 -0.2 0.2; allowed: {AREA}"),
    ("readme", put(TEXT, "0 0.5 0.5 0 0.2"), f"{TEXT} line 1: got the box 0.5 0.5 0 0.2; allowed: {AREA}"),
    ("readme", put(TEXT, "0 .5 .5 1e-30 .2"), f"{TEXT} line 1: got the box 0.5 0.5 1e-30 0.2; allowed: {AREA}"),
    ("readme", put(TEXT, "0 0.95 0.5 0.2 0.2"), f"{TEXT} line 1: got the box 0.95 0.5 0.2 0.2; allowed: {SHARES}"),
    ("readme", put(TEXT, "0 -.0003 .5 .0004 .2"), f"{TEXT} line 1: got the box -0.0003 0.5 0.0004 0.2; allowed: "),
    ("readme", put(TEXT, "0 1e300 0.5 0.2 0.2"), f"{TEXT} line 1: got the box 1e+300 0.5 0.2 0.2; allowed: {SHARES}"),
    ("readme", put(TEXT, "-1 0.5 0.5 0.2 0.2"), f"{TEXT} line 1: got class id -1; allowed: {WHOLE}"),
    ("readme", put(TEXT, "1.5 0.5 0.5 0.2 0.2"), f"{TEXT} line 1: got class id 1.5; allowed: {WHOLE}"),
    ("readme", put(TEXT, "9e99 0.5 0.5 0.2 0.2"), f"{TEXT} line 1: got class id 9e99; allowed: {WHOLE}"),
    (
        "readme",
        put(TEXT, "2 0.5 0.5 0.2 0.2"),
        f"{TEXT} line 1: got class id 2; allowed: class ids 0 to 1, the classes",
    ),
    ("readme", put(TEXT, "car 0.5 0.5 0.2 0.2"), f"{TEXT} line 1: got 'car 0.5 0.5 0.2 0.2'; allowed: {FIVE}"),
    ("readme", put(TEXT, "0 0_5 0.5 0.2 0.2"), f"{TEXT} line 1: got '0 0_5 0.5 0.2 0.2'; allowed: {FIVE}"),
    ("readme", put(TEXT, "0 ٠.5 0.5 0.2 0.2"), f"{TEXT} line 1: got '0 ٠.5 0.5 0.2 0.2'; allowed: {FIVE}"),
    ("readme", put(TEXT, GOOD.encode() + b"\xff\n"), f"{TEXT} line 2: got the byte 0xff; allowed: UTF-8 text"),
    ("readme", put(TEXT, GOOD.encode("utf-16")), f"{TEXT} line 1: got the byte 0xff; allowed: UTF-8 text"),
    ("readme", put(TEXT, GOOD.replace("\n", "\r") * 2), f"{TEXT} line 1: got '0 0.5 0.5 0.2 0.2\\r0 0.5"),
    ("readme", put(TEXT, "0 0.5 0.5 0.2 0.2\0"), f"{TEXT} line 1: got '0 0.5 0.5 0.2 0.2\\x00'; allowed: {FIVE}"),
    ("readme", remove(IMAGE_A), f"{TEXT}: got no image a.*; allowed: annotation files named after an image"),
    (
        "readme",
        put("train/images/a.jpg", b"0"),
        "train/images/a.jpg: got the same stem as a.png; allowed: one image",
        2,
    ),
    # ---- data.yaml
    ("yaml", put("data.yaml", ""), "data.yaml: got an empty file; allowed: keys such as train, val and names"),
    ("yaml", put("data.yaml", "- train\n"), "data.yaml: got a sequence; allowed: keys such as train, val and names"),
    ("yaml", put("data.yaml", "train: [a\nval: b\n"), "data.yaml line 2: got "),
    ("yaml", put("data.yaml", "train: a\n\tval: b\n"), "data.yaml line 2: got "),
    ("yaml", put("data.yaml", "train: a\n\x07\n"), "data.yaml line 2: got special characters are not allowed"),
    ("yaml", put("data.yaml", b"train: \xff\n"), "data.yaml line 1: got the byte 0xff; allowed: UTF-8 text"),
    ("yaml", put("data.yaml", "a: " + "[" * 5000), "data.yaml line 1: got 21 levels; allowed: YAML"),
    (
        "yaml",
        put("data.yaml", "train: !!python/object/apply:os.getcwd []\n"),
        "data.yaml line 1: got could not determine",
    ),
    ("yaml", yaml_bomb, "data.yaml line 3: got an alias; allowed: YAML without aliases, of"),
    ("yaml", swap("data.yaml", "val: ", "train: "), "data.yaml line 3: got 'train' again; allowed: every key once"),
    ("yaml", swap("data.yaml", "val: ", "vall: "), f"data.yaml val: got nothing; allowed: {PATHS}"),
    ("yaml", swap("data.yaml", "images/val", "3"), f"data.yaml line 3: val: got 3; allowed: {PATHS}"),
    ("yaml", swap("data.yaml", "images/val", "images/vol"), "data.yaml line 3: val: got 'images/vol', which does not"),
    ("yaml", swap("data.yaml", "images/val", "data.yaml"), f"data.yaml line 3: val: got 'data.yaml'; allowed: {PATHS}"),
    ("yaml", swap("data.yaml", "path: .", "path: [.]"), "data.yaml line 1: path: got ['.']; allowed: the dataset's"),
    ("yaml", swap("data.yaml", "names: ", "nc: 3\nnames: "), "data.yaml line 5: nc: got 3; allowed: 2, the number of"),
    ("yaml", swap("data.yaml", "names: ", "nc: '2'\nnames: "), "data.yaml line 5: nc: got '2'; allowed: the number of"),
    ("yaml", swap("data.yaml", "names: [car, person]", ""), "data.yaml names: got nothing; allowed: the names"),
    ("yaml", swap("data.yaml", "[car, person]", "{0: a, 2: b}"), "data.yaml line 5: names: got [0, 2]; allowed: the"),
    (
        "yaml",
        swap("data.yaml", "[car, person]", "{0: a, 1: b, 1: c}"),
        "data.yaml line 5: got '1' again; allowed: every",
    ),
    ("yaml", swap("data.yaml", "[car, person]", "[car, no]"), "data.yaml line 5: names: got the name False; allowed: "),
    ("yaml", swap("data.yaml", "[car, person]", "car"), "data.yaml line 5: names: got 'car'; allowed: a list, or a"),
    (
        "yaml",
        swap("data.yaml", "[car, person]", "[car]"),
        "labels/train/b.txt line 1: got class id 1; allowed: class ids 0",
        2,
    ),
    ("yaml", put(LABELS, "0 .1 .1 .3 .1 .3"), f"{LABELS} line 1: got '0 .1 .1 .3 .1 .3'; allowed: {OUTLINE}"),
    ("yaml", put(LABELS, "0 .1 .1 .3 .1 .3 1.3"), f"{LABELS} line 1: got the box 0.2 0.7 0.2 1.2; allowed: {SHARES}"),
    ("yaml", put("labels/train/z.txt", GOOD), "labels/train/z.txt: got no image z.*; allowed: annotation files named"),
    ("yaml_lists", put("train.txt", "images/a.png\nimages/b.png\nimages/z.png\n"), "train.txt line 3: got no image "),
    ("yaml_lists", put("train.txt", "images/a.png\nimages/b.png\ntrain.txt\n"), "train.txt line 3: got 'train.txt'; "),
    ("yaml_lists", put("train.txt", "images/a.png\nimages/b.png\n\0\n"), "train.txt line 3: got no image '\\x00'; all"),
    ("yaml_lists", put("train.txt", "images/a.png\nimages/a.png\n"), "images/a.png: got the image 2 times in a split;"),
    (
        "yaml_lists",
        put("train.txt", b"images/a.png\n\xe9.png\n"),
        "train.txt line 2: got the byte 0xe9; allowed: UTF-8",
    ),
    ("yaml_lists", put("train.txt", ""), "train: got no images"),
    ("yaml_lists", put("other.yaml", "train: x\n"), "got other.yaml and street.yaml; allowed: one yaml file that"),
    # ---- COCO JSON
    ("coco", put(JSON, ""), f"{JSON}: got Expecting value: line 1 column 1 (char 0); allowed: valid JSON"),
    ("coco", put(JSON, lambda text: text[:90]), f"{JSON}: got "),
    ("coco", put(JSON, "[" * 200_000), f"{JSON}: got "),
    ("coco", put(JSON, b'{"images": "\xff"}'), f"{JSON} byte 12: got 0xff; allowed: UTF-8 text"),
    ("coco", put(JSON, "[]"), *[f"{JSON} {part}: got " for part in ("categories", "images", "annotations")]),
    ("coco", put(JSON, '{"images": [], "images": []}'), f"{JSON}: got a key is repeated among ['images', 'images'];"),
    ("coco", edit(lambda c: c.pop("annotations") and None), f"{JSON} annotations: got nothing; allowed: a list"),
    ("coco", edit(lambda c: c.update(images={})), f"{JSON} images: got {{}}; allowed: a list"),
    ("coco", edit(lambda c: c["images"].append(None)), f"{JSON} images[3]: got None; allowed: a dictionary with id"),
    (
        "coco",
        picture(id=10),
        f"{JSON} images[1].id: got 10 again; allowed: an",
        f"{JSON} annotations[1].image_id: got 11",
        3,
    ),
    ("coco", picture(id="11"), f"{JSON} annotations[1].image_id: got 11; allowed: the id of an entry of images", 2),
    ("coco", picture(id=1.5), f"{JSON} images[1].id: got 1.5; allowed: a whole number or a string", 3),
    ("coco", picture(file_name="a.png"), f"{JSON} images[1].file_name: got 'a.png' again; allowed: one entry for", 3),
    ("coco", picture(file_name="z.png"), f"{JSON} images[1].file_name: got no image 'z.png'; allowed: {SUFFIXES}"),
    ("coco", picture(file_name="a\0.png"), f"{JSON} images[1].file_name: got 'a\\x00.png'; allowed: the name of an", 3),
    ("coco", picture(file_name=7), f"{JSON} images[1].file_name: got 7; allowed: the name of an image", 3),
    ("coco", picture(width=0), f"{JSON} images[1]: got width 0, height 20; allowed: width and height in pixels, whole"),
    ("coco", picture(height="20"), f"{JSON} images[1]: got width 40, height '20'; allowed: width and height in pixels"),
    ("coco", picture(width=80), "train2017/b.png: got 40 x 20 pixels instead of 80 x 20; allowed: the size that inst"),
    ("coco", note(id=100), f"{JSON} annotations[1].id: got 100 again; allowed: an id of its own for every annotation"),
    ("coco", note(id=...), f"{JSON} annotations[1].id: got None; allowed: a whole number or a string"),
    ("coco", note(image_id=999), f"{JSON} annotations[1].image_id: got 999; allowed: the id of an entry of images"),
    ("coco", note(image_id=[11]), f"{JSON} annotations[1].image_id: got [11]; allowed: the id of an entry of images"),
    ("coco", note(category_id=4), f"{JSON} annotations[1].category_id: got 4; allowed: the id of an entry of categ"),
    ("coco", note(category_id="3"), f"{JSON} annotations[1].category_id: got '3'; allowed: the id of an entry of"),
    ("coco", note(bbox=[1, 2, 3]), f"{JSON} annotations[1].bbox: got [1, 2, 3]; allowed: {PIXELS}"),
    ("coco", note(bbox=["1", 2, 3, 4]), f"{JSON} annotations[1].bbox: got ['1', 2, 3, 4]; allowed: {PIXELS}"),
    ("coco", note(bbox=[True, 2, 3, 4]), f"{JSON} annotations[1].bbox: got [True, 2, 3, 4]; allowed: {PIXELS}"),
    ("coco", note(bbox=None), f"{JSON} annotations[1].bbox: got None; allowed: {PIXELS}"),
    ("coco", note(bbox=...), f"{JSON} annotations[1].bbox: got None; allowed: {PIXELS}"),
    ("coco", note(bbox=[1, 2, float("nan"), 4]), f"{JSON} annotations[1].bbox: got [1, 2, nan, 4]; allowed: {PIXELS}"),
    ("coco", note(bbox=[1, float("inf"), 3, 4]), f"{JSON} annotations[1].bbox: got [1, inf, 3, 4]; allowed: {PIXELS}"),
    ("coco", note(bbox=[1, 10**400, 3, 4]), f"{JSON} annotations[1].bbox: got [1, 1000"),
    ("coco", swap(JSON, "[0, 0, 40, 20]", f"[0, {'9' * 5000}, 4, 2]"), f"{JSON}: got Exceeds the limit"),
    ("coco", note(bbox=[1, 2, -3, 4]), f"{JSON} annotations[1].bbox: got [1.0, 2.0, -3.0, 4.0] in an image of 40 x 20"),
    ("coco", note(bbox=[30, 2, 20, 4]), f"{JSON} annotations[1].bbox: got [30.0, 2.0, 20.0, 4.0] in an image of 40 x"),
    ("coco", note(bbox=[-0.9, 2, 0.8, 4]), f"{JSON} annotations[1].bbox: got [-0.9, 2.0, 0.8, 4.0] in an image of 40"),
    ("coco", note(iscrowd="no"), f"{JSON} annotations[1].iscrowd: got 'no'; allowed: 0 or 1"),
    ("coco", edit(lambda c: c["annotations"].append([])), f"{JSON} annotations[3]: got []; allowed: a dictionary with"),
    (
        "coco",
        edit(lambda c: c["categories"][0].update(id=3)),
        f"{JSON} categories[1].id: got 3 again; allowed: an id",
        2,
    ),
    (
        "coco",
        edit(lambda c: c["categories"][0].update(name=None)),
        f"{JSON} categories[0].name: got None; allowed: a",
        2,
    ),
    (
        "coco",
        edit(lambda c: c["categories"].clear()),
        f"{JSON} categories: got an empty list; allowed: at least one",
        4,
    ),
    (
        "coco",
        edit(lambda c: c["categories"][0].update(name="man"), JSON.replace("train", "val")),
        f"{JSON.replace('train', 'val')} categories: got 7: 'man'; allowed: the ids and names of the train split's",
    ),
    (
        "coco",
        put("annotations/train.json", "{}"),
        f"{JSON}: got also train.json; allowed: one annotation file for train",
    ),
    ("coco", remove(JSON.replace("train", "val")), "val: got no annotation file; allowed: annotations/instances_val*"),
    # ---- Pascal VOC XML
    ("voc", put(XML, ""), f"{XML} line 1: got no element found; allowed: valid XML"),
    ("voc", put(XML, lambda text: text[:150]), f"{XML} line "),
    ("voc", put(XML, "<annotation>\n<a></b></annotation>"), f"{XML} line 2: got mismatched tag; allowed: valid XML"),
    (
        "voc",
        put(XML, b"<annotation>\n\xff</annotation>"),
        f"{XML} line 2: got not well-formed (invalid token); allowed",
    ),
    ("voc", put(XML, '<?xml version="1.0" encoding="klingon"?><annotation/>'), f"{XML} line 1: got "),
    ("voc", put(XML, "<html/>"), f"{XML} line 1: got the element 'html'; allowed: the element 'annotation'"),
    ("voc", put(XML, "<annotation>&x;</annotation>"), f"{XML} line 1: got undefined entity; allowed: valid XML"),
    ("voc", bomb, f"{XML} line 2: got a DOCTYPE; allowed: XML without a DOCTYPE"),
    ("voc", external, f"{XML} line 1: got a DOCTYPE; allowed: XML without a DOCTYPE"),
    (
        "voc",
        swap(XML, "<xmin>3", "<xmin>nan"),
        f"{XML} line 3: got xmin 'nan', ymin '5', xmax '12', ymax '14'; allowed",
    ),
    (
        "voc",
        swap(XML, "<xmin>3", "<xmin>inf"),
        f"{XML} line 3: got xmin 'inf', ymin '5', xmax '12', ymax '14'; allowed",
    ),
    ("voc", swap(XML, "<xmin>3", "<xmin>1e30"), f"{XML} line 3: got xmin '1e30', ymin '5', xmax '12', ymax '14'; all"),
    ("voc", swap(XML, "<xmin>3</xmin>", ""), f"{XML} line 3: got xmin None, ymin '5', xmax '12', ymax '14'; allowed:"),
    ("voc", swap(XML, "<xmin>3", "<xmin>"), f"{XML} line 3: got xmin '', ymin '5', xmax '12', ymax '14'; allowed"),
    ("voc", swap(XML, "<xmin>3", "<xmin>13"), f"{XML} line 3: got the box 13 5 12 14 in an image of 40 x 20; allowed"),
    ("voc", swap(XML, "<xmax>12", "<xmax>42"), f"{XML} line 3: got the box 3 5 42 14 in an image of 40 x 20; allowed"),
    ("voc", xml("<object><name>car</name></object>"), f"{XML} line 3: got no <bndbox>; allowed: {CORNERS}"),
    ("voc", xml(frame("").replace("</o", "<bndbox/></o")), f"{XML} line 3: got 2 <bndbox>; allowed: {CORNERS}"),
    (
        "voc",
        swap(XML, "<name>car</name>", ""),
        f"{XML} line 3: got an object without a <name>; allowed: the classes of",
    ),
    (
        "voc",
        xml(voc_object("car", 1, 1, 9, 9, "<difficult>2</difficult>")),
        f"{XML} line 3: got difficult '2'; allowed",
    ),
    ("voc", swap("Annotations/d.xml", "person", "van"), "Annotations/d.xml line 3: got the object 'van'; allowed: the"),
    ("voc", swap(XML, "<width>40", "<width>-40"), f"{XML} line 2: got the size '-40' x '20'; allowed: one <size> with"),
    ("voc", swap(XML, "<width>40", "<width>wide"), f"{XML} line 2: got the size 'wide' x '20'; allowed: one <size>"),
    ("voc", swap(XML, "<width>40", "<width>50"), "JPEGImages/a.png: got 40 x 20 pixels instead of 50 x 20; allowed"),
    ("voc", remove(XML), f"ImageSets/Main/train.txt line 1: got no file {XML}; allowed: {STEMS}"),
    ("voc", remove("JPEGImages/a.png"), "ImageSets/Main/train.txt line 1: got no image JPEGImages/a.*; allowed: stems"),
    (
        "voc",
        put("ImageSets/Main/train.txt", "a\nb\nb\n"),
        "ImageSets/Main/train.txt line 3: got 'b' again; allowed: st",
    ),
    (
        "voc",
        put("ImageSets/Main/train.txt", "a\nb\nc -1\n"),
        "ImageSets/Main/train.txt line 3: got no image JPEGImages",
    ),
    (
        "voc",
        put("ImageSets/Main/train.txt", b"a\nb\n\xff"),
        "ImageSets/Main/train.txt line 3: got the byte 0xff; all",
        2,
    ),
    ("voc", remove("ImageSets/Main/val.txt"), "ImageSets/Main/val.txt: got no such file; allowed: the stems of the"),
    (
        "voc",
        put("classes.txt", "car\nperson\ncar\n"),
        "classes.txt line 3: got 'car' again; allowed: one class name per",
    ),
    (
        "voc",
        put("classes.txt", "car\n\nperson\n"),
        "classes.txt line 2: got an empty line; allowed: one class name per",
    ),
    ("voc_roboflow", remove("train/a.png"), "train/a.xml: got no image a.*; allowed: annotation files named after an"),
]

CLIPPED = "a box that exceeded the image by rounding was clipped to it"
MARK = "a byte order mark was skipped"
LINES = "Windows line ends were read as line ends"
REPAIRED = [
    ("readme", put(TEXT, "\ufeff" + GOOD), MARK, 1),
    ("readme", put(TEXT, GOOD.replace("\n", "\r\n")), LINES, 1),
    ("readme", put(TEXT, "0 0.9504 0.5 0.1 0.2\n" * 2), CLIPPED, 2),
    ("yaml", put("data.yaml", lambda text: "\ufeff" + text), MARK, 1),
    ("yaml", put("data.yaml", lambda text: text.replace("\n", "\r\n")), LINES, 1),
    (
        "yaml",
        swap("data.yaml", "path: .", "path: /content/x"),
        "the 'path' of the yaml file does not exist here, so",
        1,
    ),
    ("yaml_lists", put("train.txt", "\ufeff./images/a.png\r\n./images/b.png\r\n"), LINES, 1),
    ("coco", put(JSON, lambda text: "\ufeff" + text), MARK, 1),
    ("coco", note(bbox=[0, -0.5, 40.5, 20]), CLIPPED, 1),
    ("coco", note(bbox=[3, 3, 0, 5]), "a box without width or height was left out", 1),
    ("coco", picture(width=None, height=None), "the size of an image was read from the image", 1),
    ("voc", put(XML, lambda text: "\ufeff" + text), MARK, 1),
    ("voc", put(XML, lambda text: text.replace("\n", "\r\n")), None, 0),
    ("voc", swap(XML, "<xmin>3", "<xmin>0"), CLIPPED, 1),
    ("voc", swap(XML, "<width>40</width><height>20</height>", ""), "the size of an image was read from the image", 1),
    ("voc", xml(voc_object("car", 2, 4, 12, 14), size="<width>0</width><height>0</height>"), "the size of an image", 1),
    ("voc_roboflow", remove("train/c.xml"), "an image without an annotation file was taken as one without objects", 1),
]
