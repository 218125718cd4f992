"""The frame of a page: one file, no script, nothing from the network; light and dark, on paper as well."""

import re
from collections.abc import Sequence

from gemel.report.html import Html, as_html

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of such bytes
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
COLOURS = {  # name -> (light, dark); pictures name them as var(--name)
    "paper": ("#ffffff", "#16181d"),
    "ink": ("#1c1f26", "#e6e8ec"),
    "muted": ("#565c68", "#a3aab8"),
    "line": ("#d5d9e0", "#3a404b"),
    "soft": ("#f3f5f8", "#20242c"),
    "private": ("#a9b0bc", "#6b7280"),
    "shared": ("#0b6bcb", "#5aa9ff"),
    "adapter": ("#b45309", "#f5a94a"),
    "good": ("#0a7a4b", "#4cc38a"),
    "bad": ("#c0292b", "#ff7a78"),
}
CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.2rem;margin:1.6em 0 .4em}h3{font-size:1rem;margin:1em 0 .3em}
h1,h2,h3,p,li,dd,td,th,code,figcaption{overflow-wrap:anywhere}
a{color:var(--shared)}
.lead{font-size:1.1rem}
.muted,figcaption,caption{color:var(--muted)}
.good{color:var(--good)}.bad{color:var(--bad)}
figure{margin:0 0 1em}figcaption,caption{font-size:.9rem;text-align:left;padding:.2em 0}
.scroll{overflow-x:auto;max-width:100%}
.scroll svg{display:block;width:100%;min-width:620px;height:auto}
svg text{fill:var(--ink)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3em .7em .3em 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td,th{overflow-wrap:normal;min-width:4.5em}tbody th{min-width:8em}td{max-width:34em}
thead th{color:var(--muted);font-weight:600}
tbody th{font-weight:400}
details{margin:.4em 0}summary{cursor:pointer;color:var(--shared)}
dl{display:grid;grid-template-columns:minmax(7em,max-content) minmax(0,1fr);gap:.2em 1em;margin:0}
dt{color:var(--muted)}dd{margin:0}
code{font-family:ui-monospace,monospace;font-size:.9em}
.cards{display:flex;flex-wrap:wrap;gap:12px}
.card{width:200px;background:var(--soft);padding:8px;border-radius:6px;font-size:.85rem}
.card svg{width:100%;height:auto;display:block}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 .8em}
.key.private{background:var(--private)}.key.shared{background:var(--shared)}.key.adapter{background:var(--adapter)}
@media print{main{max-width:none}.scroll{overflow:visible}.scroll svg{min-width:0}section{break-inside:avoid-page}}
"""


def page(title: str, content: Sequence[str], more_css: str = "") -> str:
    """A whole page, ready to be written: text that no file can hold (a file name that is no UTF-8) is replaced."""
    whole = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{as_html(title)}</title>
<style>{_variables()}{CSS}{more_css}</style>
</head>
<body>
<main>
{Html("".join(content))}
</main>
</body>
</html>
"""
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", whole)


def _variables() -> str:
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    on_screen = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{color-scheme:light dark;{light}}}{on_screen}"
