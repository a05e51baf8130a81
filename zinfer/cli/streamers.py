"""What `generate` hands each token to: its text, or its id, goes out at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"  # what decoding gives for the first bytes of a character


class TokenStreamer(BaseStreamer, ABC):
    """Collects the new tokens of one sequence in `ids`; the prompt is left out.

    `on_token` is called after each. Only the thread that generates may call it.
    """

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.ids: list[int] = []
        self._on_token = on_token
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take the prompt's ids first, then one new id at a time."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.ids.extend(value.flatten().tolist())
        self.show()
        self._on_token()

    def end(self) -> None:
        """The sequence is complete."""

    @abstractmethod
    def show(self) -> None:
        """Write what the newest id adds."""


class IdStreamer(TokenStreamer):
    """Writes ids with a space between."""

    def __init__(self, write: Callable[[str], None], on_token: Callable[[], None]) -> None:
        super().__init__(on_token)
        self._write = write

    def show(self) -> None:
        """Write the newest id."""
        self._write(f"{' ' if len(self.ids) > 1 else ''}{self.ids[-1]}")


class TextStreamer(TokenStreamer):
    """Writes text as soon as it is certain, in the middle of a word too.

    transformers' own TextStreamer holds a word back until the next begins, which is a whole sweep away
    here. The ids fall into three runs:

        0 .. start: out          start .. shown: out, decoded again as context          shown ..: not out yet

    so that a tokenizer that drops a leading space, or needs several ids for one character, gives the same
    text piece by piece as at once.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], on_token: Callable[[], None]) -> None:
        super().__init__(on_token)
        self._tokenizer = tokenizer
        self._write = write
        self._start = 0
        self._shown = 0

    def show(self) -> None:
        """Write the text that the newest id completes."""
        text = self._pending()
        if text and not text.endswith(UNFINISHED):
            self._write(text)
            self._start, self._shown = self._shown, len(self.ids)

    def end(self) -> None:
        """Write what is left, characters that never became whole included."""
        if text := self._pending():
            self._write(text)
            self._start = self._shown = len(self.ids)

    @property
    def text(self) -> str:
        """All new tokens decoded at once."""
        return self._decode(self.ids)

    def _pending(self) -> str:
        context = self._decode(self.ids[self._start : self._shown])
        return self._decode(self.ids[self._start :])[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
