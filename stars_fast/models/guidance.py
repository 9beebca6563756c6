"""A language model and those that guide it."""

from __future__ import annotations

from typing import Literal

from stars_fast.models.lockstep import Lockstep
from stars_fast.models.paged import PagedModel


class GuidedModel(Lockstep):
    """A language model in lockstep with its guides.

    Parameters
    ----------
    lm : PagedModel
        The language model.
    guide : PagedModel
        On the device of `lm`.
    reference : PagedModel or str
        What the guide is compared with: likewise, or ``"lm"`` itself, or ``"uniform"``, nothing.
    """

    def __init__(
        self, lm: PagedModel, guide: PagedModel, reference: PagedModel | Literal["lm", "uniform"]
    ) -> None:
        super().__init__(lm, (guide,) if isinstance(reference, str) else (guide, reference))
        self.reference = reference
