"""The places of pictures in a prompt's text, as a model's processor writes them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stars_fast.images import ImageGroup, pixel_key

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

#: What a processor gives that belongs to a text, not to its pictures.
_OF_TEXT = frozenset(
    {
        "attention_mask",
        "input_ids",
        "mm_token_type_ids",
        "text_replacement_offsets",
        "token_type_ids",
    }
)
#: Processors that cut a picture into tiles only where it is alone: all of a prompt go together.
_TOGETHER = frozenset({"llava_onevision"})


class ImageReader:
    """Makes of pictures what a model reads, and of a mark in the text the tokens that they take.

    Parameters
    ----------
    processor
        The model's, of transformers.
    model_type
        Of the model's configuration.
    place_id
        The token that stands in the places of a picture.
    """

    def __init__(self, processor: Any, model_type: str, place_id: int) -> None:  # noqa: ANN401
        self._processor = processor
        self._together = model_type in _TOGETHER
        self._lock = threading.Lock()
        self.place_id = place_id
        #: What a chat template writes for a picture.
        self.mark: str = processor.image_token

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's."""
        tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        return tokenizer

    @property
    def chat_template(self) -> Any:  # noqa: ANN401 - a text, or several by name
        """The processor's own, which the tokenizer may lack."""
        return getattr(self._processor, "chat_template", None)

    def place(self, text: str, pictures: Sequence[Image]) -> tuple[str, tuple[ImageGroup, ...]]:
        """Return a text with the tokens of its pictures, and the pictures as the model reads them.

        Parameters
        ----------
        text
            With `mark` once for each picture.
        pictures
            In RGB, in the order of the text.

        Raises
        ------
        ValueError
            There are more marks or fewer, or the processor refuses a picture.
        """
        marks = text.count(self.mark)
        if marks != len(pictures):
            raise ValueError(
                f"the model's chat template writes {marks} places for {len(pictures)} pictures "
                f"({self.mark!r})"
            )
        apart = [pictures] if self._together else [[picture] for picture in pictures]
        written: list[str] = []
        groups = []
        for together in apart:
            texts, group = self._read(together)
            written += texts
            groups.append(group)
        pieces = text.split(self.mark)
        joined = [piece for pair in zip(pieces, [*written, ""], strict=True) for piece in pair]
        return "".join(joined), tuple(groups)

    def _read(self, pictures: Sequence[Image]) -> tuple[list[str], ImageGroup]:
        """Return what stands in the text for each of some pictures, and the pictures."""
        with self._lock:  # processors keep state of their own
            try:
                found = self._processor(
                    images=[list(pictures)],
                    text=[self.mark * len(pictures)],
                    return_text_replacement_offsets=True,
                    return_tensors="pt",
                )
            except Exception as error:
                sizes = ", ".join(f"{one.width} x {one.height}" for one in pictures)
                raise ValueError(f"pictures of {sizes} pixels cannot be read: {error}") from error
        texts = [str(one["replacement"]) for one in found["text_replacement_offsets"][0]]
        tokens = int((found["input_ids"] == self.place_id).sum())
        digest = hashlib.sha256(b"%d %d " % (len(pictures), tokens))
        for picture in pictures:
            digest.update(pixel_key(picture))
        inputs = {name: value for name, value in found.items() if name not in _OF_TEXT}
        return texts, ImageGroup(digest.digest(), inputs, tokens)
