"""Adjusted logits in both forms: as transformers and OpenAI have them, and each row its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from stars_fast import ops

pytest.importorskip("triton", reason="Triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 300


def adjust(
    form: str,
    logits: Tensor,
    *,
    biases: Sequence[dict[int, float]] = (),
    held_ids: Sequence[Sequence[int]] = (),
    held: Sequence[bool] = (),
    counts: Sequence[dict[int, int]] = (),
    repetition: Sequence[float] = (),
    presence: Sequence[float] = (),
    frequency: Sequence[float] = (),
    known: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Of every argument an entry per row; what is left out is off."""
    rows = len(logits)

    def table(lists: Sequence[Sequence[Any]], fill: float, dtype: torch.dtype) -> Tensor:
        lists = lists or [[]] * rows
        width = max(map(len, lists))
        return torch.tensor(
            [[*values] + [fill] * (width - len(values)) for values in lists], dtype=dtype
        ).view(rows, width)

    def column(values: Sequence[Any], off: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values] or [off] * rows, dtype=dtype)

    arguments = (
        logits,
        table([list(b) for b in biases], -1, torch.int64),
        table([list(b.values()) for b in biases], 0, torch.float32),
        table(held_ids, -1, torch.int64),
        column(held, False, torch.bool),
        table([list(c) for c in counts], -1, torch.int64),
        table([list(c.values()) for c in counts], 0, torch.int32),
        column(repetition, 1.0, torch.float32),
        column(presence, 0.0, torch.float32),
        column(frequency, 0.0, torch.float32),
        known,
        allowed,
    )
    before = logits.clone()
    with ops.backend("triton" if form == "triton" else "pytorch"):
        got: Tensor = ops.adjust_logits(*(x if x is None else x.to(DEVICE) for x in arguments))
    assert torch.equal(logits, before)
    return got.cpu()


both = pytest.mark.parametrize("form", ["pytorch", "triton"])


def some_logits(rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (4 * torch.randn((rows, VOCAB), generator=generator)).to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_as_transformers_processors(form: str, dtype: torch.dtype) -> None:
    """To the bit: a bias, ends held back for some tokens, then the repetition penalty."""
    logits = some_logits(dtype=dtype)
    contexts = [[5, 7, 7, 9, 11], [8, 8, 8, 2, 299], [0, 1, 2, 3, 4]]
    prompt = [2, 3, 5]  # tokens of each context that are the prompt
    biases = [{5: 1.5, 8: -2.25, 0: -100.0}, {2: 0.125}, {}]
    repetition = [1.3, 0.7, 1.0]
    least = [4, 2, 1]
    want = []
    for row, context in enumerate(contexts):
        processors = LogitsProcessorList()
        if biases[row]:
            processors.append(
                SequenceBiasLogitsProcessor({(t,): b for t, b in biases[row].items()})
            )
        processors.append(
            MinNewTokensLengthLogitsProcessor(prompt[row], least[row], [2, 7], device="cpu")
        )
        processors.append(RepetitionPenaltyLogitsProcessor(repetition[row]))
        scores = logits[row : row + 1].float()
        want.append(processors(torch.tensor([context]), scores))  # type: ignore[arg-type]
    got = adjust(
        form,
        logits,
        biases=biases,
        held_ids=[[2, 7, 7]] * 3,
        held=[5 - p < m for p, m in zip(prompt, least, strict=True)],
        counts=[dict.fromkeys(context, 0) for context in contexts],
        repetition=repetition,
    )
    assert torch.equal(got, torch.cat(want))
    assert int((got == -torch.inf).sum()) == 4  # in the rows that are short of tokens


@both
def test_openai_penalties(form: str) -> None:
    """mu - c * frequency - (c > 0) * presence, rounded once."""
    logits = some_logits(2)
    counts = [{4: 3, 9: 0, 250: 1}, {4: 1, 7: 70_000}]
    presence, frequency = [0.3, -2.0], [0.7, 1.1]
    got = adjust(form, logits, counts=counts, presence=presence, frequency=frequency)
    want = logits.double()
    for row, named in enumerate(counts):
        f, p = (float(torch.tensor(x[row])) for x in (frequency, presence))  # as float32 has them
        for token, count in named.items():
            want[row, token] -= count * f + (count > 0) * p
    assert torch.equal(got, want.float())
    assert torch.equal(got[0, 9], logits[0, 9])


@both
def test_order_is_bias_then_repetition_then_the_others(form: str) -> None:
    logits = torch.tensor([[1.0, -3.0, 2.0]])
    got = adjust(
        form,
        logits,
        biases=[{0: 2.0, 1: 1.0}],
        counts=[{0: 2, 1: 1}],
        repetition=[2.0],
        presence=[0.25],
        frequency=[0.5],
    )
    assert got.tolist() == [[3.0 / 2 - 1.25, -2.0 * 2 - 0.75, 2.0]]


@both
def test_a_row_is_the_same_among_others(form: str) -> None:
    """Whatever its neighbours name, and however wide the tables are."""
    logits = some_logits(4)
    counts = [{1: 1}, {t: t for t in range(290)}, {}, {299: 5, 0: 0}]
    biases = [{}, {3: 1.0}, {t: -t / 10 for t in range(40)}, {0: 3.0}]
    columns = {
        "repetition": [1.5, 1.0, 1.0, 0.5],
        "presence": [0.0, 1.0, 0.0, -0.5],
        "frequency": [0.0, 0.25, 0.0, 2.0],
    }
    together = adjust(form, logits, counts=counts, biases=biases, **columns)
    for row in range(4):
        alone = adjust(
            form,
            logits[row : row + 1],
            counts=[counts[row]],
            biases=[biases[row]],
            **{name: [values[row]] for name, values in columns.items()},
        )
        assert torch.equal(alone[0], together[row])


@both
def test_ids_outside_the_vocabulary_name_nothing(form: str) -> None:
    logits = some_logits(2)
    far = {VOCAB: 3, VOCAB + 1: 1, -1: 2, -7: 1}
    got = adjust(
        form,
        logits,
        biases=[dict.fromkeys(far, 50.0)] * 2,
        held_ids=[list(far)] * 2,
        held=[True, True],
        counts=[far] * 2,
        repetition=[3.0, 3.0],
        presence=[1.0, 1.0],
    )
    assert torch.equal(got, logits)


@both
def test_unknown_tokens_and_rows_with_gaps_between_them(form: str) -> None:
    wide = some_logits(3)
    logits = wide[:, :100]  # rows that are not next to each other
    known = torch.ones(100, dtype=torch.bool)
    known[[3, 50]] = False
    got = adjust(form, logits, biases=[{3: 100.0}, {}, {}], known=known)
    assert got[:, [3, 50]].tolist() == [[-torch.inf] * 2] * 3
    assert torch.equal(got[:, known], logits[:, known])


@both
def test_what_each_row_may_draw(form: str) -> None:
    logits = some_logits(3)
    words = torch.randint(-(2**31), 2**31, (3, 10), generator=torch.Generator().manual_seed(1))
    words[1] = -1
    got = adjust(form, logits, biases=[{5: 100.0}] * 3, allowed=words.to(torch.int32))
    for row in range(3):
        for token in range(VOCAB):
            may = int(words[row, token // 32]) >> (token % 32) & 1
            want = float(logits[row, token] + 100.0 * (token == 5)) if may else -torch.inf
            assert float(got[row, token]) == want


def test_what_the_launcher_cannot_take_is_named() -> None:
    from stars_fast.kernels import adjust_named

    def arguments() -> dict[str, Tensor]:
        ids, floats = torch.zeros((2, 3), dtype=torch.int64), torch.ones(2)
        return {
            "logits": torch.zeros((2, 5)),
            "bias_ids": ids,
            "bias": torch.zeros((2, 3)),
            "held_ids": ids,
            "held": torch.zeros(2, dtype=torch.bool),
            "seen_ids": ids,
            "counts": ids.int(),
            "repetition": floats,
            "presence": floats,
            "frequency": floats,
        }

    for name, value in arguments().items():
        for bad in (value.double(), value[:1] if name != "logits" else value[0]):
            with pytest.raises((ValueError, IndexError), match=rf"^{name} must be"):
                adjust_named(**{**arguments(), name: bad})


def test_operator_schema() -> None:
    ids, floats = torch.zeros((2, 1), dtype=torch.int64), torch.ones(2)
    torch.library.opcheck(
        torch.ops.stars_fast.adjust_logits.default,
        (
            some_logits(2, torch.bfloat16), ids, torch.ones((2, 1)), ids, floats.bool(), ids,
            ids.int(), floats, floats, floats, torch.ones(VOCAB, dtype=torch.bool),
            torch.full((2, 10), -1, dtype=torch.int32),
        ),
    )  # fmt: skip
