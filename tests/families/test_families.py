"""One family of each class, trained for a step and compared with stock; all: tests.families."""

import pytest

from tests.families.check import Verdict, check_family

# Names only, sigmoid router with a correction bias, bias + interleaved + explicit masks.
COVERING = ("mixtral", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", COVERING)
def test_a_family_of_each_class_equals_stock(ranks2, tmp_path, family):
    row = check_family(ranks2, family, tmp_path, with_lora=False)
    assert (row.verdict, row.why) == (Verdict.WORKS, "")
