"""Bytes, shares and seconds as people read them: the same text on the console, in the log and on the page."""

MIB = 1 << 20


def mib(num_bytes: float) -> str:
    """Bytes as MiB; below a hundredth of one as KiB, from 10,000 MiB on as GiB."""
    if 0 < num_bytes < MIB / 100:
        return f"{num_bytes / 1024:.2f} KiB"
    return f"{num_bytes / MIB:.2f} MiB" if num_bytes < 10_000 * MIB else f"{num_bytes / MIB / 1024:.2f} GiB"


def box_size(num_bytes: int) -> str:
    """Bytes of a box: whole GiB as such, else as MiB."""
    return f"{num_bytes >> 30} GiB" if num_bytes % (1 << 30) == 0 else mib(num_bytes)


def share(part: float, whole: float) -> str:
    """A percentage; 0 of 0 is 100 %."""
    return f"{100 * part / whole if whole else 100:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as at most seven characters: 12 s, 25 min, 2.5 h."""
    if seconds < 1000:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clock_time(seconds: float) -> str:
    """Seconds as 0:05, 12:40 or 1:02:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def layer_name(signature: str) -> str:
    """A signature in short: "Conv2d(64, 64, 3x3, stride 2)"; what is as usual is left out."""
    kind, _, settings = signature.rpartition(": ")[0].partition("(") if ": " in signature else (signature, "", "")
    settings = settings.removesuffix(")")
    words = []
    for part in _split(settings):
        key, _, value = part.partition("=")
        if not value:
            words.append(part)
        elif key == "kernel_size":
            words.append(value.strip("()").replace(", ", "x"))
        elif key in ("in_features", "out_features"):
            words.append(value)
        elif key == "bias":
            words += ["no bias"] if value == "False" else []
        elif key != "padding" and not (key in ("stride", "dilation") and set(value) <= set("(1, )")):
            words.append(f"{key} {value.strip('()').split(', ')[0]}")
    return f"{kind.split('.')[-1]}({', '.join(words)})" if words else kind.split(".")[-1]


def _split(settings: str) -> list[str]:
    """The settings at their commas, except those within brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(settings):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(settings[start:i].strip())
            start = i + 1
    return [part for part in [*parts, settings[start:].strip()] if part]
