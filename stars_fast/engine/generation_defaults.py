"""What a model's generation_config would change in every draw, and a request has to ask for."""

from __future__ import annotations

import logging
from typing import Any

from stars_fast.params import StarsParams

_log = logging.getLogger(__name__)

#: Names in transformers, with the value that is off and the parameter of ours, if there is one.
_CHANGES: dict[str, tuple[object, str | None]] = {
    "repetition_penalty": (1.0, "repetition_penalty"),
    "sequence_bias": (None, "logit_bias"),
    "min_new_tokens": (0, "min_tokens"),
    "min_length": (0, "min_tokens"),
    "suppress_tokens": (None, "logit_bias"),
    "begin_suppress_tokens": (None, None),
    "bad_words_ids": (None, "bad_words"),
    "no_repeat_ngram_size": (0, None),
    "exponential_decay_length_penalty": (None, None),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "guidance_scale": (1.0, None),
}
_DEFAULTS = StarsParams()


class GenerationDefaults:
    """Reports, once, what requests leave out though the model's authors ask for it.

    Parameters
    ----------
    config
        The model's ``generation_config``; None if it has none.
    """

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - transformers'
        self._asked = {
            name: value
            for name, (off, _) in _CHANGES.items()
            if (value := getattr(config, name, None)) not in (None, off, [])
        }

    def report(self, params: StarsParams) -> None:
        """Warn in the log of what is asked for and `params` do not set, if that is not done yet."""
        left_out = [name for name in self._asked if not _is_set(params, _CHANGES[name][1])]
        if not left_out:
            return
        shown = ", ".join(f"{name}={self._asked[name]!r}" for name in left_out)
        ours = sorted({own for name in left_out if (own := _CHANGES[name][1]) is not None})
        instead = f"ask for it by StarsParams({', '.join(f'{own}=...' for own in ours)})"
        _log.warning(
            "the model's generation_config has %s, which changes no draw here: %s",
            shown,
            instead if ours else "StarsParams has nothing like it",
        )
        self._asked = {}


def _is_set(params: StarsParams, name: str | None) -> bool:
    return name is not None and getattr(params, name) != getattr(_DEFAULTS, name)
