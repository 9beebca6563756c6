"""A language model and the smaller one that drafts for it."""

from __future__ import annotations

from stars_fast.models.lockstep import Lockstep
from stars_fast.models.paged import PagedModel


class DraftedModel(Lockstep):
    """A language model in lockstep with its draft model.

    Parameters
    ----------
    lm : PagedModel
        The language model.
    draft : PagedModel
        On the device of `lm`.
    reference : PagedModel or None
        The draft model before it was aligned; None: it was not.
    """

    def __init__(self, lm: PagedModel, draft: PagedModel, reference: PagedModel | None) -> None:
        super().__init__(lm, (draft,) if reference is None else (draft, reference))
        self.draft = draft
        self.reference = reference
