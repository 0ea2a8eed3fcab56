"""Tokenized records: padding left out, masks as TRL means them, contradictions refused."""

import pytest

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.formats import check_records
from megablocks_utils.training.data.sources import Record

IDS, LABELS = [5, 6, 7, 8], [-100, 6, 7, 8]


def encode(**columns):
    record = Record("d.jsonl:3", {"input_ids": IDS, "labels": LABELS, **columns})
    checked = check_records([record])
    return checked.data_format.encode([record], None)[0]


USED = [
    ({}, (IDS, LABELS)),
    ({"labels": [-100, 6, 9, 8]}, (IDS, [-100, 6, 9, 8])),
    ({"attention_mask": [1, 1, 1, 1]}, (IDS, LABELS)),
    ({"attention_mask": [True] * 4, "position_ids": [0, 1, 2, 3]}, (IDS, LABELS)),
    (
        {"attention_mask": [1, 1, 0, 0], "labels": [-100, 6, -100, -100]},
        ([5, 6], [-100, 6]),
    ),
    (
        {
            "attention_mask": [0, 1, 1, 1],
            "labels": [-100, -100, 7, 8],
            "position_ids": [1, 0, 1, 2],
            "token_type_ids": [0, 0, 0, 0],
            "seq_lengths": [4],
        },
        ([6, 7, 8], [-100, 7, 8]),
    ),
    ({"attention_mask": [0, 0, 0, 0], "labels": [-100] * 4}, ([], [])),
    ({"labels": None, "completion_mask": [0, 0, 1, 1]}, (IDS, [-100, -100, 7, 8])),
    (
        {"labels": None, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1]},
        (IDS, [-100, -100, 7, 8]),
    ),
    (
        {"labels": None, "loss_mask": [0, 1, 1, 0], "attention_mask": [1, 1, 1, 0]},
        ([5, 6, 7], [-100, 6, 7]),
    ),
    ({"loss_mask": [0, 1, 1, 1]}, (IDS, LABELS)),
    ({"labels": IDS, "loss_mask": [0, 1, 1, 1]}, (IDS, IDS)),
]


@pytest.mark.parametrize(("columns", "example"), USED)
def test_what_stands_beside_tokens_is_used(columns, example):
    assert encode(**columns) == example


REFUSED = [
    (
        {"labels": None},
        "input_ids has no labels beside it; add labels (-100 for what is not learned",
    ),
    ({"input_ids": None}, "input_ids must be a list of whole numbers"),
    ({"input_ids": [[5, 6]]}, "input_ids must be a list of whole numbers"),
    ({"input_ids": [5, 6, 7, 2**31]}, "input_ids holds the token 2147483648"),
    ({"labels": [-100, 6, 7, 10**30]}, "labels must be tokens or -100, this one holds 1000"),
    (
        {"attention_mask": [1, 0, 1, 1]},
        "attention_mask has a 0 between ones (item 2), only padding",
    ),
    ({"attention_mask": [1, 1, 1, 0]}, "labels has a token to learn where attention_mask is 0"),
    ({"attention_mask": [1, 1]}, "input_ids has 4 items and attention_mask has 2, they must be "),
    ({"attention_mask": [1, 1, 2, 1]}, "attention_mask must be a list of zeros and ones"),
    ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask must be a list of zeros and ones"),
    ({"attention_mask": "1111"}, "attention_mask must be a list of zeros and ones"),
    ({"position_ids": [0, 1, 0, 1]}, "position_ids must count from 0, other ones are not trained"),
    ({"position_ids": [0, 1, 2]}, "input_ids has 4 items and position_ids has 3, they must be"),
    ({"token_type_ids": [0, 0, 1, 1]}, "token_type_ids must all be 0, other ones are not trained"),
    (
        {"seq_lengths": [2, 2]},
        "seq_lengths is a list of 2: packed texts must be records of their own",
    ),
    ({"loss_mask": [0, 0, 1, 1]}, "loss_mask and labels differ in what is learned; drop one"),
    ({"loss_mask": [0, 1, 1]}, "input_ids has 4 items and loss_mask has 3, they must be equally"),
]


@pytest.mark.parametrize(("columns", "message"), REFUSED)
def test_tokens_that_do_not_fit_together_are_one_sentence(columns, message):
    with pytest.raises(DataError) as caught:
        encode(**columns)
    assert str(caught.value).startswith(f"d.jsonl:3: {message}")
