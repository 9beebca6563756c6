"""Halves of surrogate pairs: JSON and Python can hold them, and they are no text."""

from __future__ import annotations

from collections.abc import Mapping


def check_unicode(value: object, name: str = "") -> None:
    """Refuse half of a surrogate pair, which JSON and Python can hold and no tokenizer takes.

    Parameters
    ----------
    value
        Of JSON: every text in it is looked at.
    name
        Of the field; empty for a whole record, whose fields have their own.

    Raises
    ------
    ValueError
        With the field's name, and where in it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ord(value[error.start])
            raise ValueError(
                f"{name or 'a text'} must be text, got half of a surrogate pair (U+{half:04X}) at "
                f"character {error.start}"
            ) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_unicode(key, f"a key of {name}" if name else "a key")
            check_unicode(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            check_unicode(inner, f"{name}[{number}]")
