"""One self-contained HTML page (page.html): pictures as data URIs, no script, nothing fetched."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader


def data_uri(path: Path) -> str:
    """A PNG or SVG as text."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()


_FORMS = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
# Renders a title, lead, figures (caption, path), further (lines), tables (title, head, rows, notes) and a foot; all texts are escaped.
PAGE = _FORMS.get_template("page.html", globals={"data_uri": data_uri})
