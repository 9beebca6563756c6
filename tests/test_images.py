"""Pictures are opened from what names them, and bounded."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from stars_fast.images import MAX_BYTES, open_image, pixel_key

PICTURE = Image.linear_gradient("L").resize((6, 4)).convert("RGB")


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_all_ways_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(PICTURE))
    given = (PICTURE, path, str(path), data_url(path.read_bytes()), path.read_bytes())
    assert {pixel_key(open_image(one, "image")) for one in given} == {pixel_key(PICTURE)}


def test_it_is_turned_as_its_file_says_and_has_no_other_colours() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = open_image(encoded(PICTURE, "JPEG", exif=exif), "image")
    assert (turned.size, turned.mode) == ((4, 6), "RGB")
    assert open_image(PICTURE.convert("RGBA"), "image").mode == "RGB"


def test_keys_differ_by_shape() -> None:
    flat = Image.frombytes("RGB", (12, 2), PICTURE.tobytes())
    assert pixel_key(flat) != pixel_key(PICTURE)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nowhere.png", "image cannot be read: .*No such file"),
        ("", "image cannot be read"),
        ("\0", "image cannot be read"),
        ("https://host/cat.png", "image must be a path.* got a link"),
        ("data:image/png,AAAA", "image must be data:image/...;base64"),
        ("data:image/png;base64,?", "image is not base64"),
        (data_url(b"no picture"), "image is no picture of a format in PNG"),
        (encoded(PICTURE, "TIFF"), "image is no picture"),
        (encoded(PICTURE)[:-30], "image cannot be decoded"),
        (bytes(MAX_BYTES + 1), f"at most {MAX_BYTES} bytes"),
        (encoded(Image.new("1", (1 << 13, (1 << 12) + 1))), "1 to 33554432 pixels, got 8192 x"),
        (Image.new("1", (1 << 13, (1 << 12) + 1)), "1 to 33554432 pixels, got 8192 x"),
        (None, "image must be a path, a PIL image or a data URL, got NoneType"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_picture_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_image(value, "image")
