"""Corpus and model text as safe HTML: Markdown with every link, image and tag made inert.

Raw HTML is shown as the characters it is made of. Links keep their words, underlined, but lead nowhere; images become their
description; headings become bold lines, so that a text cannot disturb the page's outline. What comes out holds only the tags in
ALLOWED, and no attribute but the class of an inert link and the start of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

ALLOWED = frozenset({"p", "strong", "em", "ul", "ol", "li", "blockquote", "pre", "code", "br", "hr", "span"})


class _Renderer(RendererHTML):
    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<span class="inert-link">'

    def link_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</span>"

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"[image: {escape(tokens[idx].content)}]"

    def heading_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "<p><strong>"

    def heading_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</strong></p>\n"

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<pre><code>{escape(tokens[idx].content)}</code></pre>\n"

    code_block = fence

    def html_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return str(escape(tokens[idx].content))

    html_inline = html_block


def _markdown(breaks: bool) -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": breaks}, renderer_cls=_Renderer)
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]  # no link leads anywhere; its words stay readable
    return markdown


_MARKDOWN, _PROSE = _markdown(breaks=True), _markdown(breaks=False)


@lru_cache(maxsize=4096)
def to_html(text: str) -> Markup:
    """Safe HTML of one corpus or model text, in which a new line is a new line."""
    return Markup(_MARKDOWN.render(text))


@lru_cache(maxsize=16)
def prose_to_html(text: str) -> Markup:
    """Safe HTML of guidelines and consent texts: ordinary Markdown files, in which a line break is a space."""
    return Markup(_PROSE.render(text))
