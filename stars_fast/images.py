"""Pictures of prompts: opened, bounded, and named by their pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels of a picture at most: a small file may unfold into a huge one.
MAX_PIXELS = 1 << 25
#: Bytes of a file at most.
MAX_BYTES = 1 << 25
#: What is decoded; other decoders of Pillow are rarely used, and seldom looked after.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class ImageGroup:
    """Pictures that a vision tower reads at once; in most models each is one by itself.

    Attributes
    ----------
    key
        Names the pixels and the way in which they are read.
    inputs
        What the model's processor makes of them, by name.
    num_tokens
        Tokens of the prompt that they take.
    """

    key: bytes
    inputs: Mapping[str, Any]
    num_tokens: int


@dataclass(frozen=True)
class PromptImages:
    """The pictures of a prompt, in their order."""

    pictures: tuple[Image, ...]
    groups: tuple[ImageGroup, ...]


def open_image(value: object, name: str) -> Image:
    """Return a picture in RGB, turned as its file says.

    Parameters
    ----------
    value
        A `PIL.Image.Image`, the path of a file, a data URL, ``data:image/png;base64,...``, or what
        a file holds.
    name
        Of the value, for errors.

    Raises
    ------
    ValueError
        It is none of these, cannot be read, or is larger than `MAX_BYTES` or `MAX_PIXELS`; or
        Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise ValueError(
            f"{name} needs Pillow, which is not installed: pip install 'stars_fast[images]'"
        ) from None
    if isinstance(value, Image.Image):
        opened = value
    else:
        try:
            opened = Image.open(io.BytesIO(_bytes_of(value, name)), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{name} is too large: {error}") from None
        except UnidentifiedImageError:
            raise ValueError(f"{name} is no picture of a format in {', '.join(FORMATS)}") from None
    width, height = opened.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"{name} must have 1 to {MAX_PIXELS} pixels, got {width} x {height}: scale it down"
        )
    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # noqa: BLE001 - decoders may raise anything on what is sent
        raise ValueError(f"{name} cannot be decoded: {error}") from None


def pixel_key(picture: Image) -> bytes:
    """Return a name of a picture's size and pixels, without chance collisions (SHA-256)."""
    digest = hashlib.sha256(repr((picture.mode, picture.size)).encode())
    digest.update(picture.tobytes())
    return digest.digest()


def _bytes_of(value: object, name: str) -> bytes:
    """Return the bytes of a file that a path or a data URL names."""
    if isinstance(value, bytes):
        return _bounded(value, name)
    if isinstance(value, str) and value.startswith("data:"):
        return _data_url(value, name)
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(
            f"{name} must be a path, a PIL image or a data URL, got a link: only a server fetches "
            "pictures, from hosts that --allow-image-host names"
        )
    if not isinstance(value, str | os.PathLike):
        raise ValueError(
            f"{name} must be a path, a PIL image or a data URL, got {type(value).__name__}"
        )
    try:
        with open(value, "rb") as file:  # noqa: PTH123 - a path of any kind
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    return _bounded(data, name)


def _data_url(url: str, name: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{name} must be data:image/...;base64,..., got {head[:60]!r}")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"{name} must have at most {MAX_BYTES} bytes")
    try:
        return _bounded(base64.b64decode(body, validate=True), name)
    except binascii.Error as error:
        raise ValueError(f"{name} is not base64: {error}") from None


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} must have at most {MAX_BYTES} bytes")
    return data
