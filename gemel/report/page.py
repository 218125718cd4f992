"""results/report.html: one self-contained file, made from a results folder.

python -m gemel report results
"""

from pathlib import Path

from gemel.environment.units import mib, share
from gemel.report import sections
from gemel.report.examples import examples
from gemel.report.html import Html, as_html
from gemel.report.layer_map import map_css
from gemel.report.record import Record, read_record
from gemel.report.style import page
from gemel.results_store import files
from gemel.results_store.files import ResultsError

MAX_BYTES = 300_000
EXAMPLES_PER_TASK = (3, 1, 0)  # the most that fit


def write_report(results_path: str | Path) -> Path:
    """Writes the report of a results folder into it; returns its file. Raises ResultsError if there is no result."""
    file, record = Path(results_path) / files.REPORT, read_record(results_path)
    try:
        text = report_of(record)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # its checks leave out `run`
        said = f"{type(error).__name__}: {files.first_line(error)}"
        raise ResultsError(f"{record.path / files.MANIFEST}: run: is not what a merge writes: {said}") from error
    files.write(file, [text.encode()])
    return file


def report_of(record: Record) -> str:
    """The whole page; of a large workload with fewer examples, so that it stays below MAX_BYTES."""
    memory, tasks = record.manifest["memory"], record.manifest["tasks"]
    title = f"{len(tasks)} models merged: {mib(memory['unmerged_bytes'])} to {mib(memory['merged_bytes'])}"
    subtitle = (
        f"{share(memory['saved_bytes'], memory['unmerged_bytes'])} less memory, from {record.path.resolve().name}/"
    )
    before = (
        Html(f'<h1>{as_html(title)}</h1><p class="muted">{as_html(subtitle)}</p>'),
        sections.summary(record),
        sections.the_map(record),
        sections.saving(record),
        sections.accuracy(record),
        sections.memory(record),
        sections.why_not(record),
    )
    after = (sections.per_class(record), sections.card(record))
    css = map_css(len(record.manifest["shared_layers"]))
    for most in EXAMPLES_PER_TASK:
        text = page(title, (*before, examples(record, most), *after), css)
        if len(text.encode()) < MAX_BYTES:
            break
    return text
