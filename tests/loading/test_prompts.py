"""Prompts that can't be, told in one line before anything is computed."""
import pytest
from conftest import tiny_llama

from loading.config import check_prompts
from loading.files import UserError


def test_prompts_that_cannot_be():
    config = tiny_llama().config                                                 # a context of 96
    with pytest.raises(UserError, match="prompt 2 is empty"):
        check_prompts([[1], []], config)
    with pytest.raises(UserError, match="the prompt is empty: give at least one token"):
        check_prompts([[]], config)
    with pytest.raises(UserError, match="the prompt has 96 tokens, the context holds 96: shorten the prompt"):
        check_prompts([[1] * 96], config)
    with pytest.raises(UserError, match="prompt 3 has 97 tokens, the context holds 96"):
        check_prompts([[1], [1] * 95, [1] * 97], config)
    check_prompts([[1] * 95], config)                                            # one place left
    check_prompts([[1], [5] * 3, [1] * 95], config)
