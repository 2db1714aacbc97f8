"""The page of an audit: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from imsm.evaluation import figures
from imsm.evaluation.audit import Audit
from imsm.evaluation.pictures import COLOURS, against, bars
from imsm.evaluation.verdict import sentence, verdict
from imsm.folders import write_text

#: Records shown a task; of the others the page gives the number.
SHOWN = 20
#: Control characters, which have no place in HTML and which a broken model may well say.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with a mark in the place of each control character."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def render(audit: Audit) -> str:
    """The page's HTML. Whatever models, data and file names hold is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "visible": visible,
        "percent": figures.percent,
        "p_value": figures.p_value,
        "count": figures.count,
    }
    template = environment.from_string((files("imsm.evaluation") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        audit=audit,
        headline=verdict(audit),
        sentences=[sentence(entry) for entry in audit.entries],
        against=against(audit),
        bars={name: bars(audit, name) for name in audit.tasks},
        groups=[
            ("targets", audit.targets),
            ("the rest", [name for name in audit.tasks if name not in audit.targets]),
        ],
        score=figures.score,
        signed=figures.signed,
        interval=figures.interval,
        colours=COLOURS,
        shown=SHOWN,
        version=version("imsm"),
    )


def write_page(audit: Audit, path: str | os.PathLike[str]) -> None:
    """Writes the page."""
    write_text(Path(path), render(audit))
