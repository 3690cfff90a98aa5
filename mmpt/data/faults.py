"""What can be wrong with a document, in words that are counted."""

from __future__ import annotations

REASONS = {
    "json": "the JSON member is not a document",
    "missing": "a member that the document names is not there",
    "crc": "bytes differ from their CRC",
    "size": "another size or duration than the index says",
    "limit": "over a limit on bytes, pixels, seconds or frames",
    "decode": "bytes that no decoder reads",
    "text": "text that is not UTF-8",
    "length": "another number of tokens than was planned",
}


MAX_DETAIL = 300  # characters: what a stranger wrote may be in it


class BadMedia(ValueError):
    """A part or a document that cannot be used. `reason` is one of REASONS; the message says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(detail[:MAX_DETAIL])
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, str(self))
