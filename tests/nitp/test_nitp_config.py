"""The [nitp] options: ranges, messages, and which block is the target."""

import math
import subprocess
import sys

import pytest

from nitp_titan.nitp.config import NITPConfig


def test_defaults_are_the_papers_best_settings():
    config = NITPConfig()
    assert config.enable
    assert config.weight == 1.0
    assert config.target_layer is None
    assert (config.projector, config.projector_ratio) == ("swiglu", 4)
    assert (config.loss, config.shift, config.stop_gradient, config.start_step) == ("cosine", 1, True, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -0.1),
        ("weight", math.nan),
        ("weight", math.inf),
        ("target_layer", -1),
        ("projector_ratio", 0),
        ("start_step", -1),
        ("geometry_freq", -1),
    ],
)
def test_value_outside_its_range_is_named_with_what_was_found(key, value):
    with pytest.raises(ValueError, match=rf"nitp\.{key}: found {value}, expected"):
        NITPConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0.0), ("target_layer", 0), ("projector_ratio", 1), ("start_step", 0), ("geometry_freq", 0)],
)
def test_lowest_value_of_a_range_is_accepted(key, value):
    assert getattr(NITPConfig(**{key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), [("loss", "cosin"), ("projector", "mlp"), ("shift", 2)])
def test_value_that_is_no_choice_is_named_with_the_choices(key, value):
    with pytest.raises(ValueError, match=rf"nitp\.{key}: found {value!r}, expected one of"):
        NITPConfig(**{key: value})


def test_every_bad_value_is_named_in_one_error():
    bad = {"weight": -1.0, "target_layer": -2, "projector_ratio": 0, "start_step": -3, "geometry_freq": -4}
    with pytest.raises(ValueError, match="nitp") as error:
        NITPConfig(**bad)
    for key, value in bad.items():
        assert f"nitp.{key}: found {value}" in str(error.value)


@pytest.mark.parametrize(
    ("n_layers", "target"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (16, 3), (24, 5), (28, 6), (61, 12)]
)
def test_unset_target_layer_is_a_fifth_of_the_depth_and_at_least_one(n_layers, target):
    assert NITPConfig().target_layer_of(n_layers) == target


@pytest.mark.parametrize("target_layer", [0, 1, 24])
def test_set_target_layer_is_kept_up_to_the_last_block(target_layer):
    assert NITPConfig(target_layer=target_layer).target_layer_of(24) == target_layer


def test_target_layer_beyond_the_depth_is_an_error_that_tells_the_range():
    with pytest.raises(ValueError, match=r"nitp\.target_layer: found 25, expected 0\.\.24"):
        NITPConfig(target_layer=25).target_layer_of(24)


def test_config_is_importable_without_torch():
    code = "import sys, nitp_titan.nitp.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("flavor_dim", "vocabulary", "ratio", "tokens"),
    [
        (896, 152_064, 4, 2048 * 2 * 152_064 // (36 * 896)),
        (896, 152_064, 2, 2048 * 2 * 152_064 // (24 * 896)),
        (4096, 32_000, 4, 2048),  # less memory than its logits' would be too few for a fast product
    ],
)
def test_the_projector_takes_what_a_chunks_logits_take(flavor_dim, vocabulary, ratio, tokens):
    found = NITPConfig(projector_ratio=ratio).projector_tokens(2048, dim=flavor_dim, vocab_size=vocabulary)
    assert found == tokens


def test_without_a_projector_the_loss_takes_more_tokens_at_a_time():
    found = NITPConfig(projector="none").projector_tokens(10, dim=10, vocab_size=600)
    assert found == 10 * 2 * 600 // 120
