"""The pages in headless Chromium: nothing is said on the console, nothing scrolls sideways, axe finds nothing.

Without Chromium (Debian's package) these tests are skipped. axe-core is not part of the suite: AXE names its
axe.min.js (npm install axe-core), and without it that one test is skipped.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from results_samples import pico_models, write

from gemel.merging.plan import build_named, make_plan
from gemel.report.page import write_report
from gemel.report.plan_page import plan_page
from gemel.report.style import POLICY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--enable-logging=stderr")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
FRAMES = """<!doctype html><title>frames</title><body>
{frames}<script>
onload = () => {{
  const said = [...document.querySelectorAll("iframe")].map(frame => {{
    const root = frame.contentDocument.documentElement;
    frame.contentDocument.querySelectorAll("details").forEach(part => part.open = true);
    return [frame.clientWidth, root.scrollWidth, frame.contentDocument.querySelectorAll("svg,table").length];
  }});
  document.title = JSON.stringify(said);
}};
</script>"""
AXE_RUN = "<script>axe.run().then(found => document.title = JSON.stringify(found.violations.map(v => v.id)))</script>"


def dump(file):
    """(the page after it was loaded, what Chromium said on its console)"""
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={file.parent / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, re.findall(r"CONSOLE[^\n]*", done.stderr)


def title_of(dom: str) -> list:
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write(folder / "results", pico_models())
    plan = folder / "plan.html"
    plan.write_text(plan_page(make_plan(build_named(["resnet18", "resnet34", "squeezenet1_1"]))))
    return [write_report(folder / "results"), plan]


def test_no_message_on_the_console(pages):
    for page in pages:
        dom, said = dump(page)
        assert said == [] and "</main>" in dom


def test_no_page_scrolls_sideways_on_a_telephone_or_a_screen(pages, tmp_path):
    """In frames of both widths, without the policy, which forbids the script that measures."""
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
        for text in (page.read_text().replace(POLICY, "") for page in pages)
        for width in (360, 1440)
    )
    (tmp_path / "frames.html").write_text(FRAMES.format(frames=frames))
    measured = title_of(dump(tmp_path / "frames.html")[0])
    assert [width for width, _, _ in measured] == [360, 1440] * len(pages)
    assert all(scrolled <= width and parts > 2 for width, scrolled, parts in measured), measured


@pytest.mark.skipif("AXE" not in os.environ, reason="AXE does not name axe.min.js")
def test_axe_finds_nothing(pages, tmp_path):
    script = Path(os.environ["AXE"]).read_text()
    for page in pages:
        text = page.read_text().replace(POLICY, "").replace("<details>", "<details open>")
        (tmp_path / "axe.html").write_text(f"{text}<script>{script}</script>{AXE_RUN}")
        assert title_of(dump(tmp_path / "axe.html")[0]) == []
