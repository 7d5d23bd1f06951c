"""HTML pages in one style: a file of its own, light and dark, for a wide screen, a phone and paper.

A template extends `page` (blocks `title`, `head` and `main`) and takes macros from `parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from nemotron_h.core import plot
from nemotron_h.core.units import duration, gib, short_count

_CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.55 var(--font)}
body>*{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:36px;padding-bottom:8px}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.01em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:36px 0 10px}
p{margin:6px 0}p.note,.note{color:var(--muted);font-size:.9rem}
a{color:var(--series-1)}
code,pre{font:.86em/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
pre{margin:8px 0 14px;padding:10px 14px;overflow-x:auto;background:var(--surface);border:1px solid var(--line);
 border-radius:8px}
.state{display:inline-block;padding:2px 11px;border-radius:99px;font-size:.85rem;font-weight:600;color:var(--surface);
 background:var(--series-7)}
.state.finished{background:var(--series-3)}.state.stopped{background:var(--series-2)}
.state.running{background:var(--series-1)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(124px,1fr));gap:1px;margin:18px 0;padding:0;
 background:var(--surface);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.facts div{box-shadow:0 0 0 1px var(--line);padding:12px 14px}
.facts dt{color:var(--muted);font-size:.8rem}
.facts dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.facts small{display:block;color:var(--muted);font-size:.78rem;font-weight:400;letter-spacing:0}
figure{margin:0 0 16px;padding:14px 14px 8px;background:var(--surface);border:1px solid var(--line);border-radius:10px}
figure svg{display:block;width:100%;height:auto}
figure.hero{padding:18px 18px 10px}
figcaption{color:var(--muted);font-size:.85rem;padding:4px 4px 6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px}
.charts section{display:flex;flex-direction:column}.charts h2{margin-top:20px}.charts figure{margin:0;flex:1}
.narrow{display:none!important}
.box{overflow-x:auto;background:var(--surface);border:1px solid var(--line);border-radius:10px;margin:8px 0 16px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:7px 14px;text-align:left;border-top:1px solid var(--line);white-space:nowrap}
tr:first-child>*{border-top:0}
th{color:var(--muted);font-weight:600;font-size:.8rem}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td.wide{white-space:normal;min-width:16em;overflow-wrap:anywhere}
details>summary{cursor:pointer;color:var(--muted);margin:8px 0}
footer{color:var(--muted);font-size:.85rem;padding-top:24px;padding-bottom:40px}
@media screen and (max-width:600px){
 body>*{padding:0 14px}header{padding-top:22px}h1{font-size:1.4rem}
 .wide-only{display:none!important}.narrow{display:block!important}
 .facts{grid-template-columns:1fr 1fr}figure,figure.hero{padding:10px 8px 6px}th,td{padding:6px 10px}
}
@media print{
 body{background:none;font-size:11px}body>*{max-width:none;padding:0}h2{break-after:avoid}
 figure,.facts,tr,pre{break-inside:avoid}.charts{grid-template-columns:1fr 1fr}
 .box{overflow:visible}th,td{padding:3px 6px;white-space:normal}pre{white-space:pre-wrap}
 details>*{display:block}
}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{% block title %}{% endblock %}</title>
<style>{{ css }}</style></head><body>
<header>{% block head %}{% endblock %}</header>
<main>{% block main %}{% endblock %}</main>
<footer>{% block foot %}{% endblock %}</footer>
</body></html>
"""

#: facts are (name, value, remark), columns (name, class): `n` for numbers, `wide` for sentences
_PARTS = """
{% macro facts(rows) %}<dl class="facts">{% for name, value, remark in rows %}<div><dt>{{ name }}</dt>
<dd>{{ value }}{% if remark %}<small>{{ remark }}</small>{% endif %}</dd></div>{% endfor %}</dl>{% endmacro %}
{% macro table(columns, rows) %}<div class="box" tabindex="0"><table>
{% if columns | map("first") | join %}<tr>{% for name, kind in columns %}<th class="{{ kind }}">{{ name }}</th>
{% endfor %}</tr>{% endif %}
{% for row in rows %}<tr>{% for cell in row %}<td class="{{ columns[loop.index0][1] }}">{{ cell }}</td>
{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% macro chart(title, note, svg) %}<figure>{{ svg }}{% if note %}<figcaption>{{ note }}</figcaption>{% endif %}
</figure>{% endmacro %}
"""


def render(template: str, **values: Any) -> str:
    """Return the page of a template; values are escaped, but those that `inline` made."""
    pages = DictLoader({"page": _PAGE, "parts": _PARTS})
    environment = Environment(autoescape=True, loader=pages, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"count": short_count, "gib": gib, "duration": duration}
    css = Markup(f":root{{--font:{plot.FONT}}}{plot.css()}{_CSS}")
    return environment.from_string(template).render(css=css, **values)


def inline(figure: Figure, label: str) -> Markup:
    """Return a figure as part of a page."""
    return Markup(plot.svg(figure, label))


def for_both(draw: Callable[[int, int], Figure], label: str, wide: int = 340, narrow: int = 320) -> Markup:
    """Return a figure for a wide screen and paper, and one for a phone, of which a page shows the one that fits.

    Args:
        draw: of width and height in CSS pixels.
        wide, narrow: heights of the two.
    """
    pictures = [inline(draw(width, height), f"{label}, {width} px") for width, height in ((1040, wide), (350, narrow))]
    return Markup('<div class="wide-only">{}</div><div class="narrow">{}</div>').format(*pictures)
