"""Prompts with pictures in a language model on pages.

Everything of vision is the model's own: its forward is run as far as the language model, on the
tokens of a picture alone, and what it would have given to that is kept. A prompt's prefill puts
these rows in the places of the picture; pages hold them like any token. The scheduler knows a
picture by an id beyond the vocabulary, a different one for other pixels, so that only prompts with
the same pictures share pages.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from stars_fast.images import ImageGroup
from stars_fast.models.interface import attention_configs, exclusive, replaced_forward
from stars_fast.models.parameters import embedding_rows
from stars_fast.ops.batch import BatchLike
from stars_fast.prompts import Prompt

#: Model types whose prompts may have pictures: those that are tested.
SEEING = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
#: Of these, the ones in which the tokens of a picture see each other, later ones too.
_BIDIRECTIONAL = frozenset({"gemma3"})

_LAST_ID = (1 << 31) - 1  # the scheduler's ids are int32
_KNOWN_IDS = 1 << 16
_KEPT_BYTES = 1 << 28  # of features of pictures that no request holds


def sees_images(model: PreTrainedModel) -> bool:
    """Whether prompts of a model may have pictures."""
    return model.config.model_type in SEEING


@dataclass(frozen=True)
class Features:
    """What the language model reads in the places of pictures.

    Attributes
    ----------
    rows
        ``[tokens, hidden]``, in place of embeddings.
    deep
        Likewise, added behind each of the first layers; empty in most models.
    """

    rows: Tensor
    deep: tuple[Tensor, ...]

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Return the rows of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        layers = zip(*(part.deep for part in parts), strict=True)
        return cls(torch.cat([part.rows for part in parts]), tuple(map(torch.cat, layers)))

    def of(self, rows: NDArray[np.int64]) -> Features:
        """Return the rows of these numbers."""
        index = torch.from_numpy(rows).to(self.rows.device)
        return Features(self.rows[index], tuple(layer[index] for layer in self.deep))

    @property
    def num_bytes(self) -> int:
        """Bytes that they take."""
        return sum(x.numel() * x.element_size() for x in (self.rows, *self.deep))


@dataclass(frozen=True)
class SeenPrompt:
    """A prompt with its pictures encoded.

    Attributes
    ----------
    token_ids
        int64 ``[T]``, of the vocabulary.
    scheduler_ids
        int64 ``[T]``: the same, but in the places of a picture, where they name its pixels.
    places
        int64 ``[T]``: the row of `features` that stands here, -1 for text.
    blocks
        int64 ``[T]``: the run of places that a token is in, -1 for text; None where tokens of a
        picture do not see later ones.
    features
        Of the groups of pictures, in order; those of the model, then of each that sees beside it.
    positions
        int64 ``[3, T]``; None: every token's is its number.
    shift
        What the positions of the tokens behind the prompt are ahead of their numbers.
    """

    token_ids: NDArray[np.int64]
    scheduler_ids: NDArray[np.int64]
    places: NDArray[np.int64]
    blocks: NDArray[np.int64] | None
    features: tuple[tuple[Features, ...], ...]
    positions: NDArray[np.int64] | None
    shift: int


@dataclass(frozen=True)
class ImageRows:
    """The tokens of a prefill in which some rows have pictures, packed row after row.

    Attributes
    ----------
    lengths
        int64 ``[R]``, tokens of each row: those of the batch, and the rest of a picture within
        which they end, if that is seen by its first tokens.
    token_ids
        int64 ``[N]``, of the vocabulary.
    positions
        int64 ``[N]``, or ``[3, N]``.
    places
        bool ``[N]``: where `features` stand.
    features
        In the order of `places`, of the model and of each that sees beside it; empty where no
        picture stands.
    blocks
        As in `SeenPrompt`, ``[N]``.
    num_models
        Models that `features` are of, or would be.
    """

    lengths: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.bool_]
    features: tuple[Features, ...]
    blocks: NDArray[np.int64] | None
    num_models: int

    def beside(self, number: int) -> ImageRows:
        """Return what the model of this number beside the language model reads."""
        return replace(self, features=self.features[number + 1 : number + 2])

    @classmethod
    def of(
        cls,
        batch: BatchLike,
        token_ids: NDArray[np.int64],
        seen: Sequence[SeenPrompt | None],
    ) -> ImageRows:
        """Return those of a batch.

        Parameters
        ----------
        batch
            Rows of a prefill.
        token_ids
            int64, the scheduler's.
        seen
            The prompt of each row, as far as it has pictures; at least one has.
        """
        ends = np.cumsum(batch.new_lengths, dtype=np.int64)
        rows = [
            _row(token_ids[end - new : end], int(start), prompt)
            for end, new, start, prompt in zip(
                ends, batch.new_lengths, batch.row_start, seen, strict=True
            )
        ]
        wide = any(row.positions.ndim == 2 for row in rows)
        positions = [
            np.broadcast_to(row.positions, (3, len(row.token_ids))) if wide else row.positions
            for row in rows
        ]
        features = zip(*(row.features for row in rows if row.features), strict=True)
        return cls(
            np.array([len(row.token_ids) for row in rows]),
            np.concatenate([row.token_ids for row in rows]),
            np.concatenate(positions, axis=-1),
            np.concatenate([row.places >= 0 for row in rows]),
            tuple(map(Features.joined, features)),
            np.concatenate([row.blocks for row in rows])
            if any(prompt is not None and prompt.blocks is not None for prompt in seen)
            else None,
            next(len(prompt.features) for prompt in seen if prompt is not None),
        )


@dataclass(frozen=True)
class _Row:
    """A row of a prefill, as in `ImageRows`; `places` as in `SeenPrompt`."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    blocks: NDArray[np.int64]
    features: tuple[Features, ...]


def _row(token_ids: NDArray[np.int64], start: int, prompt: SeenPrompt | None) -> _Row:
    """Return a row of these tokens, the first of which is number `start`."""
    end = start + len(token_ids)
    none = np.full(len(token_ids), -1, np.int64)
    if prompt is None:
        return _Row(token_ids, np.arange(start, end), none, none, ())
    blocks = prompt.blocks
    if blocks is not None and 0 < end < len(blocks) and blocks[end] >= 0:
        while end < len(blocks) and blocks[end] == blocks[end - 1]:
            end += 1
    taken = slice(start, min(end, len(prompt.token_ids)))
    ids = np.concatenate([prompt.token_ids[taken], token_ids[max(0, taken.stop - start) :]])
    behind = np.full(len(ids) - max(0, taken.stop - start), -1, np.int64)  # the response
    positions = np.arange(start, start + len(ids)) + prompt.shift
    if prompt.positions is not None:
        positions = np.broadcast_to(positions, (3, len(ids))).copy()
        positions[:, : len(ids) - len(behind)] = prompt.positions[:, taken]
    places = np.concatenate([prompt.places[taken], behind])
    rows = places[places >= 0]
    return _Row(
        ids,
        positions,
        places,
        np.concatenate([prompt.places[taken] * 0 - 1 if blocks is None else blocks[taken], behind]),
        tuple(Features.joined(one).of(rows) for one in prompt.features) if len(rows) else (),
    )


class ImageEncoder:
    """Encodes the pictures of prompts, each once.

    Parameters
    ----------
    model
        One that `sees_images`, in eval mode.
    beside
        Models beside it, in eval mode.

    Attributes
    ----------
    guides_see
        Those beside it see the same pictures, with vision towers of their own: all are of its type.
    encoded
        Groups of pictures that the vision tower has run.
    """

    def __init__(self, model: PreTrainedModel, beside: Sequence[PreTrainedModel] = ()) -> None:
        kind = model.config.model_type
        self.guides_see = all(one.config.model_type == kind for one in beside)
        self._beside = [ImageEncoder(one) for one in beside if self.guides_see]
        self._model = model
        self._decoder = model.get_decoder()  # type: ignore[no-untyped-call]
        self._token = int(model.config.image_token_id)  # stands in the places of a picture
        self._bidirectional = model.config.model_type in _BIDIRECTIONAL
        self._configs = attention_configs(model)
        self._next_id = embedding_rows(model)
        self._ids: OrderedDict[bytes, int] = OrderedDict()
        self._features: OrderedDict[bytes, Features] = OrderedDict()
        self.encoded = 0

    @torch.inference_mode()
    def see(self, prompt: Prompt) -> SeenPrompt:
        """Return a prompt with its pictures encoded, those seen before by what was kept of them.

        Raises
        ------
        ValueError
            It ends with a picture, or its places are not those of its pictures.
        """
        assert prompt.images is not None
        ids = np.array(prompt.token_ids, np.int64)
        groups = prompt.images.groups
        is_place = ids == self._token
        if is_place[-1]:
            raise ValueError("prompt must not end with a picture: text has to follow it")
        counts = [group.num_tokens for group in groups]
        if int(is_place.sum()) != sum(counts):
            raise ValueError(
                f"prompt has {int(is_place.sum())} places of pictures, and its pictures take "
                f"{sum(counts)}"
            )
        places = np.where(is_place, np.cumsum(is_place) - 1, -1)
        scheduler_ids = ids.copy()
        scheduler_ids[is_place] = np.repeat([self._id_of(group.key) for group in groups], counts)
        blocks = None
        if self._bidirectional:
            begins = is_place & ~np.concatenate(([False], is_place[:-1]))
            blocks = np.where(is_place, np.cumsum(begins) - 1, -1)
        positions, shift = self._positions(ids, is_place, groups)
        features = tuple(
            tuple(one._features_of(group) for group in groups) for one in (self, *self._beside)
        )
        return SeenPrompt(ids, scheduler_ids, places, blocks, features, positions, shift)

    def _id_of(self, key: bytes) -> int:
        """Return the scheduler's id of pictures; one that is forgotten is not given again."""
        found = self._ids.get(key)
        if found is None:
            if self._next_id > _LAST_ID:
                raise ValueError("no ids are left for further pictures: restart the engine")
            found, self._next_id = self._next_id, self._next_id + 1
            self._ids[key] = found
            if len(self._ids) > _KNOWN_IDS:
                self._ids.popitem(last=False)
        self._ids.move_to_end(key)
        return found

    def _features_of(self, group: ImageGroup) -> Features:
        found = self._features.get(group.key)
        if found is None:
            found = self._features[group.key] = self._encode(group)
            held = sum(one.num_bytes for one in self._features.values())
            while held > _KEPT_BYTES and len(self._features) > 1:
                held -= self._features.popitem(last=False)[1].num_bytes
        self._features.move_to_end(group.key)
        return found

    def _encode(self, group: ImageGroup) -> Features:
        """Run the vision tower: the model's own forward on the places, up to its language model."""
        model = self._model
        ids = torch.full((1, group.num_tokens), self._token, device=model.device)
        given = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in group.inputs.items()
        }
        positions = torch.arange(group.num_tokens, device=model.device).unsqueeze(0)
        with self._up_to_decoder() as reached, contextlib.suppress(_ReachedError):
            model.base_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                use_cache=False,
                **given,
            )
        self.encoded += 1
        deep = reached.get("deepstack_visual_embeds") or ()
        return Features(reached["inputs_embeds"][0], tuple(deep))

    @contextlib.contextmanager
    def _up_to_decoder(self) -> Iterator[dict[str, Any]]:
        """End a forward where the language model begins; yield what that is called with."""
        reached: dict[str, Any] = {}

        def forward(*_: object, **given: object) -> None:
            reached.update(given)
            raise _ReachedError

        with exclusive(self._configs), replaced_forward(self._decoder, forward):
            yield reached

    def _positions(
        self, ids: NDArray[np.int64], is_place: NDArray[np.bool_], groups: Sequence[ImageGroup]
    ) -> tuple[NDArray[np.int64] | None, int]:
        """Return `SeenPrompt.positions` and `SeenPrompt.shift`."""
        index = getattr(self._model.base_model, "get_rope_index", None)
        if index is None:
            return None, 0
        given: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).unsqueeze(0),
            "mm_token_type_ids": torch.from_numpy(is_place).int().unsqueeze(0),
            "image_grid_thw": torch.cat([group.inputs["image_grid_thw"] for group in groups]),
        }
        names = inspect.signature(index).parameters
        positions, shift = index(**{name: value for name, value in given.items() if name in names})
        return positions[:, 0].numpy(), int(shift.flatten()[0])


def encoder_like(
    model: PreTrainedModel, language_model: PreTrainedModel | None
) -> ImageEncoder | None:
    """Return what shows a model the images of prompts that a language model reads; None: nothing.

    They are ready for a model of the same type alone.
    """
    if language_model is None or not sees_images(model):
        return None
    same = model.config.model_type == language_model.config.model_type
    return ImageEncoder(model) if same else None


class _ReachedError(Exception):
    """A forward has come to its language model."""
