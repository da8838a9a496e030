"""A page of plots and tables in one HTML file that opens without a network, whatever the text in it is.

Plotly's script is part of the file (4.8 MB). Text of models and data goes in as JSON that no script element can end, or
escaped; the template's Content-Security-Policy forbids the page everything else. web_page.css and web_page.js are what
pages share: the style, cards with plots, and tables that sort and filter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any


def write_web_page(path: Path, template: str, parts: Mapping[str, str], data: Any) -> None:
    """Writes the template with its marks filled: `parts` (HTML, escaped by the caller), and what every page has.

    Those are __DATA__ (`data` as JSON), __PLOTLY__, __STYLE__ and __SHARED__ (web_page.js). The file appears whole.
    """
    import plotly.offline

    shared = resources.files("rewards")
    every = {
        **parts,
        "__DATA__": _script_json(data),
        "__PLOTLY__": plotly.offline.get_plotlyjs(),
        "__STYLE__": shared.joinpath("web_page.css").read_text(encoding="utf-8"),
        "__SHARED__": shared.joinpath("web_page.js").read_text(encoding="utf-8"),
    }
    # In one pass, as a part may contain another one's mark.
    page = re.sub("|".join(every), lambda match: every[match[0]], template)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment in it."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
