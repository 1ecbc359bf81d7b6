"""Frame of the HTML pages: one document that asks nothing of the network and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"


def asset(name: str, folder: Path = ASSETS) -> str:
    """Text of a style or script that comes with a package, from its folder of them."""
    return (folder / name).read_text(encoding="utf-8")


def escape(text: object) -> str:
    """Text for any place in HTML, attributes included."""
    return html.escape(str(text), quote=True)


def document(title: str, body: str, style: str, script: str, media: str, data: Any = None) -> str:
    """A whole page.

    A content security policy lets the browser run `script` alone and load sound from `media` alone, so that nothing
    that slipped into a name or a text can run or call home.

    Args:
        body: HTML; whoever makes it has escaped what came from outside.
        media: sources of sound in the policy's words, e.g. `data:`.
        data: JSON value that the script reads from the element `data`.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; media-src {media}"
    )
    # `<` never stands as itself in the data, so no text in it can end the element.
    block = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{asset('base.css')}{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{block}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )
