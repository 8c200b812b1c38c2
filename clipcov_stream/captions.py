"""Captions that somebody else wrote: bytes -> text -> token ids, in bounded time and memory.

One place for scoring, training and embedding, so that all read the same tokens. open_clip's byte-pair encoder takes
time with the square of a word's length, 2.6 s for 8,192 random letters, and keeps every word that it ever met.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

CHARACTERS_PER_TOKEN = 24
SHORTEST_CUT = 2048
"""Characters of a caption that are read at least, whatever the context."""
MAX_WORDS = 1 << 18
"""Words that a tokenizer keeps the encoding of, some 60 MB."""


def caption_of(data: bytes | str) -> str:
    """A stored caption as text; what is not UTF-8, lone surrogates included, becomes U+FFFD."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return bytes(data).decode("utf-8", "replace")


def cut(caption: str, context: int) -> str:
    """The part of a caption that is read: as it is up to some 2,000 characters, of a longer one the beginning.

    `context` tokens are full well before: a token stands for 4 or 5 characters of text, and for 24 of none. White space
    is made one blank first, so that a page of it hides nothing.
    """
    limit = max(SHORTEST_CUT, CHARACTERS_PER_TOKEN * context)
    return caption if len(caption) <= limit else " ".join(caption[: 16 * limit].split())[:limit]


def first_of(tokenizer: Callable[[str], Tensor], context: int, caption: str | bytes) -> Tensor:
    """(context,) token ids of a caption, as text or as it is stored."""
    # A function of the module, not a lambda: worker processes may have to pickle it.
    words: Any = getattr(tokenizer, "cache", None)
    if isinstance(words, dict) and len(words) > MAX_WORDS:
        special = {word: kept for word, kept in words.items() if word == kept}
        words.clear()
        words.update(special)
    return tokenizer(cut(caption_of(caption), context))[0]
