"""A page of ranked hits in one file: no other file, no network, no mouse needed."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape

__all__ = ["contact_sheet"]

STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 90rem; padding: 0 1rem; overflow-wrap: anywhere }
section { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)) }
h2 { grid-column: 1 / -1; margin: 1rem 0 0 }
figure { margin: 0; padding: .5rem; border: 1px solid GrayText; border-radius: .4rem }
figure:focus { outline: 4px solid LinkText }
img { display: block; width: 100%; background: white }
"""
SCRIPT = """
addEventListener("keydown", (event) => {
  const hits = [...document.querySelectorAll("figure")], at = hits.indexOf(document.activeElement)
  const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1,
    Home: 0, End: hits.length - 1 }[event.key]
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return
  event.preventDefault()
  hits[Math.min(Math.max(to, 0), hits.length - 1)].focus()
})
"""


def contact_sheet(
    queries: Sequence[tuple[str, Sequence[tuple[str, float, bytes]]]], settings: str
) -> str:
    """HTML of queries: the name of each and its hits, a name, a score and a PNG; all escaped."""
    policy = "default-src 'none'; img-src data:"
    for kind, text in (("style", STYLE), ("script", SCRIPT)):
        policy += f"; {kind}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Ranked hits</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        f"<h1>Ranked hits</h1><p>{escape(settings)}. Arrow keys, Home and End go through the hits.",
    ]
    for query, hits in queries:
        page.append(f"<section><h2>{escape(query)}</h2>")
        for rank, (name, score, picture) in enumerate(hits, 1):
            told = escape(f"{rank}. {name}, score {score:.3f}")
            image = f'src="data:image/png;base64,{b64encode(picture).decode()}"'
            image = f'<img {image} alt="hit {told}, for the query {escape(query)}">'
            page.append(f'<figure tabindex="0">{image}<figcaption>{told}</figcaption></figure>')
        page.append("</section>")
    return "\n".join([*page, f"<script>{SCRIPT}</script></html>\n"])
