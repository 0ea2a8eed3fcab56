"""One family of each class, trained for a step and compared with stock; all: tests.families."""

import pytest

from tests.families.check import Verdict, check_family

# Sigmoid router with a correction bias; bias, transposed, interleaved and explicit masks; no gate
# and padded; another activation, in a folder that also sees; linear attention in such a folder.
COVERING = ("deepseek_v3", "gpt_oss", "nemotron_h", "gemma4", "qwen3_5_moe")


@pytest.mark.parametrize("family", COVERING)
def test_a_family_of_each_class_equals_stock(ranks2, tmp_path, family):
    row = check_family(ranks2, family, tmp_path, with_lora=False)
    assert (row.verdict, row.why) == (Verdict.WORKS, "")
