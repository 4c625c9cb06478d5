"""A virtio device that answers text upside down: `lgmp run --device upside_down.py:UpsideDown ...`.

A request is a buffer to read the text from, in UTF-8, and one to write the answer to.
"""

from __future__ import annotations

from workers.device import RequestDevice, RequestError

TURNED = str.maketrans("abcdefghijkmnpqrtuvwy!?.,'_&()<>[]", "ɐqɔpǝɟƃɥᴉɾʞɯudbɹʇnʌʍʎ¡¿˙',‾⅋)(><][")  # noqa: RUF001


class UpsideDown(RequestDevice):
    """Answers text upside down. `sign`: what stands below every answer."""

    device_type = 42
    kind = "upside"

    def __init__(self, sign: str = "") -> None:
        super().__init__()
        self.sign = sign

    def handle(self, queue: int, readable: list[memoryview], writable: list[memoryview]) -> int:
        """Answer one request; gives the number of bytes written."""
        text = self.sign + b"".join(readable).decode(errors="replace").lower()
        answer = text[::-1].translate(TURNED).encode()
        if len(answer) > sum(map(len, writable)):
            raise RequestError(f"no room for an answer of {len(answer)} bytes")
        left = answer
        for segment in writable:
            size = min(len(segment), len(left))
            segment[:size], left = left[:size], left[size:]
        return len(answer)
