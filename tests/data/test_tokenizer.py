"""nitp_titan.data.tokenizer"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nitp_titan.data.tokenizer import ByteTokenizer


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids[0] == tokenizer.bos_id == 256
    assert ids[-1] == tokenizer.eos_id == 257
    assert ids[1:-1] == list(text.encode()) == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_built_as_the_trainer_builds_it():
    tokenizer = ByteTokenizer.Config().build(tokenizer_path="./assets/none")
    assert tokenizer.get_vocab_size() == tokenizer.vocab_size == 258
    assert tokenizer.encode(text="a") == [97]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_decode_takes_any_sequence_and_drops_what_is_no_byte(make):
    assert ByteTokenizer().decode(make([256, 104, 105, 300, 257])) == "hi"


def test_decode_of_half_a_character():
    assert ByteTokenizer().decode(list("é".encode())[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_lone_surrogate():
    assert ByteTokenizer().encode("\ud800") == [ord("?")]
