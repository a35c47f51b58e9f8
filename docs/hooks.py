"""Build hooks of mkdocs: equations become MathML, which browsers draw, and no page may load from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Links that a reader follows are free to go anywhere: <a href>, and <link rel="canonical"> and the like.
_LOADED = re.compile(
    r'<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\ssrc="(?:https?:)?//[^"]*'
    r'|<link\b[^>]*\brel="(?:stylesheet|preconnect|preload|icon)"[^>]*\shref="(?:https?:)?//[^"]*'
    r'|<link\b[^>]*\shref="(?:https?:)?//[^"]*"[^>]*\brel="(?:stylesheet|preconnect|preload|icon)'
)


def on_page_content(text: str, **_: Any) -> str:
    def equation(found: re.Match[str]) -> str:
        block = found[1] == "div"
        math = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
        return f'<div class="equation">{math}</div>' if block else math

    return _EQUATION.sub(equation, text)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_path}: loads something from elsewhere: {found[0]}")
    return output
