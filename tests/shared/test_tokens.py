"""Masks, batches and packing against a slow reference that walks token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from shared.hooks import capture, edit
from shared.interventions import Add
from shared.models import load
from shared.tokens import History, Phase, TrainingRow, collate, pack, pad, phase_mask

PHASES = st.sampled_from(list(Phase))


def in_phase(phase, t, n, generated=()):
    """One token at position t of a document with a prompt of n tokens: the definition, spelt out."""
    is_generated = t >= n or (t < len(generated) and generated[t])
    next_is_generated = t + 1 >= n or (t + 1 < len(generated) and generated[t + 1])
    return {
        Phase.PREFILL: not is_generated,
        Phase.DECODE: is_generated,
        Phase.DECODE_BOUNDARY: is_generated or next_is_generated,
        Phase.ALL: True,
    }[phase]


@st.composite
def documents(draw):
    """Rows as (length, prompt length, flags of earlier generated tokens)."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 9))
        n = draw(st.integers(0, length))
        flags = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        rows.append((length, n, [flag and t < n for t, flag in enumerate(flags)]))
    return rows


@settings(deadline=None)
@given(documents(), PHASES, st.sampled_from(["left", "right"]), st.booleans())
def test_phase_masks_equal_the_definition_under_padding(rows, phase, side, sticky):
    flags = [generated for _, _, generated in rows] if sticky else None
    ids = [[7] * length for length, _, _ in rows]
    batch = pad(ids, [n for _, n, _ in rows], 0, side, generated=flags)
    width = batch.input_ids_BT.shape[1]
    expected = []
    for length, n, generated in rows:
        real = [in_phase(phase, t, n, generated if sticky else ()) for t in range(length)]
        gap = [False] * (width - length)
        expected.append(gap + real if side == "left" else real + gap)
    assert batch.phase_mask(phase).tolist() == expected


@settings(deadline=None)
@given(documents(), PHASES, st.integers(9, 24))
def test_packing_restarts_positions_and_phases_in_every_document(rows, phase, max_length):
    training = [
        TrainingRow([100 * i + t for t in range(length)], [i] * length, n, flags)
        for i, (length, n, flags) in enumerate(rows)
    ]
    batch = pack(training, 0, max_length)
    mask = batch.phase_mask(phase)
    found = {}
    for row in range(len(batch)):
        documents_T = batch.document_ids_BT[row]
        assert (batch.attention_mask_BT[row].bool() == (documents_T >= 0)).all()
        for document in range(int(documents_T.max()) + 1):
            columns = documents_T == document
            ids = batch.input_ids_BT[row, columns].tolist()
            found[ids[0] // 100] = (ids, mask[row, columns].tolist(), batch.labels_BT[row, columns].tolist())
            assert batch.position_ids_BT[row, columns].tolist() == list(range(len(ids)))
    for i, (length, n, flags) in enumerate(rows):
        ids, got, labels = found[i]
        assert ids == training[i].input_ids
        assert labels == [i] * length
        assert got == [in_phase(phase, t, n, flags) for t in range(length)]
    assert batch.input_ids_BT.shape[1] <= max_length


@given(documents(), st.sampled_from(["left", "right"]))
def test_prefill_and_decode_are_complements_and_the_boundary_is_one_token(rows, side):
    batch = pad([[1] * length for length, _, _ in rows], [n for _, n, _ in rows], 0, side)
    masks = {phase: batch.phase_mask(phase) for phase in Phase}
    assert torch.equal(masks[Phase.PREFILL] ^ masks[Phase.DECODE], masks[Phase.ALL])
    assert torch.equal(masks[Phase.ALL], batch.attention_mask_BT.bool())
    boundary = masks[Phase.DECODE_BOUNDARY] & masks[Phase.PREFILL]
    assert boundary.sum(1).tolist() == [min(n, 1) for _, n, _ in rows]
    assert batch.rows() == [[1] * length for length, _, _ in rows]
    assert batch.last_columns_B.tolist() == [
        (batch.input_ids_BT.shape[1] if side == "left" else length) - 1 for length, _, _ in rows
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_packed_documents_equal_single_ones_also_under_edits(family):
    model = load(f"random:{family}")
    texts = [("ab", "cdefg"), ("hijklmnopqrstuvwxyz", "0123"), ("x", "y")]
    rows = []
    for prompt, answer in texts:
        ids = model.encode([prompt + answer]).rows()[0]
        rows.append(TrainingRow(ids, ids, 1 + len(prompt), [False] * len(ids)))
    vector = torch.randn(model.architecture.width, generator=torch.Generator().manual_seed(0))
    edits = Add("blocks.0.output", vector, phase="prefill", positions=[0, 1, -1])
    batch = pack(rows, 0, 32)
    assert len(batch) == 2
    with torch.no_grad(), edit(model, edits), capture(model, ["blocks.2.output"]) as acts:
        model(batch)
        packed = acts["blocks.2.output"]
        for row in rows:
            model(pad([row.input_ids], [row.prompt_length], 0))
            single = acts["blocks.2.output"][0]
            places = [
                (r, batch.document_ids_BT[r] == d)
                for r in range(len(batch))
                for d in range(int(batch.document_ids_BT[r].max()) + 1)
            ]
            match = [packed[r, c] for r, c in places if batch.input_ids_BT[r, c].tolist() == row.input_ids]
            torch.testing.assert_close(match[0], single, atol=2e-5, rtol=1e-4)


def test_collate_keeps_labels_and_earlier_turns_aligned():
    rows = [TrainingRow([1, 2, 3], [-100, 2, 3], 1, [False] * 3), TrainingRow([4], [-100], 1, [False])]
    batch = collate(rows, 0)
    assert batch.labels_BT.tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch.generated_BT is None
    sticky = [TrainingRow([1, 2, 3], [-100, 2, 3], 2, [False, True, False]), rows[1]]
    assert collate(sticky, 0, "left").generated_BT.tolist() == [[False, True, False], [False] * 3]
    assert collate(sticky, 0).phase_mask("decode").tolist() == [[False, True, True], [False] * 3]
    assert collate(sticky, 0).phase_mask("decode_boundary").tolist() == [
        [True, True, True],
        [True, False, False],
    ]


def test_the_function_accepts_strings_and_one_length_a_token():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    lengths = torch.tensor([[2, 2, 2, 1, 1]])
    real = torch.ones(1, 5, dtype=torch.long)
    assert phase_mask("prefill", positions, lengths, real).tolist() == [[True, True, False, True, False]]
    with pytest.raises(ValueError, match="not a valid Phase"):
        phase_mask("prompt", positions, lengths, real)


def test_bad_rows_are_refused():
    with pytest.raises(UserError, match="at least one row"):
        pad([], [], 0)
    with pytest.raises(UserError, match="Row 1 is empty"):
        pad([[1], []], [1, 0], 0)
    with pytest.raises(UserError, match="prompt length 3"):
        pad([[1, 2]], [3], 0)
    with pytest.raises(UserError, match="padding_side"):
        pad([[1, 2]], [1], 0, "middle")
    with pytest.raises(UserError, match="does not fit"):
        pack([TrainingRow([1, 2, 3], [1, 2, 3], 1, [False] * 3)], 0, 2)
    model = load("random:llama")
    with pytest.raises(UserError, match="list of rows"):
        model.encode("one text")
    assert History("sticky") is History.STICKY
