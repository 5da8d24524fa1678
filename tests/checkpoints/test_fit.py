"""Tensors of a checkpoint against a model's, both ways."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from nitp_titan.checkpoints.fit import Misfit, a_few, in_several_files, not_read_from_hugging_face
from nitp_titan.models.registry import model_registry
from tests.helpers.ranks import run_on_ranks


def stored(folder, tensors):
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


def zeros(**sizes):
    return {name.replace("_", "."): torch.zeros(size) for name, size in sizes.items()}


def test_what_is_the_same_has_no_misfit(tmp_path):
    tensors = zeros(layers_0_w=(2, 3), norm=(3,))
    more = {"optimizer": {"state": {"norm": torch.zeros(1)}}, "train_state": {"step": 1}, "dataloader": b"x"}
    found = Misfit.of(stored(tmp_path, {**tensors, **more}), tensors)
    assert found == Misfit(missing=(), extra=(), resized=())
    assert found.sentences() == []


def test_both_sides_and_sizes_are_told(tmp_path):
    found = Misfit.of(stored(tmp_path, zeros(a=(2, 3), b=(1,), c=(4,))), zeros(a=(3, 2), c=(4,), d=(1,), e=(1,)))
    assert found == Misfit(missing=("d", "e"), extra=("b",), resized=("a 2x3, not 3x2",))
    assert found.sentences() == [
        "lacks tensors for the job's model: d, e",
        "has tensors too many for the job's model: b",
        "has tensors of other sizes for the job's model: a 2x3, not 3x2",
    ]
    assert found.without({"d", "b"}) == Misfit(missing=("e",), extra=(), resized=("a 2x3, not 3x2",))


def test_an_object_in_a_tensors_place_is_told(tmp_path):
    assert Misfit.of(stored(tmp_path, {"a": "text"}), zeros(a=(2,))).resized == ("a no tensor, not 2",)


def test_a_few_names_stand_for_many():
    assert a_few(["a", "b", "c"]) == "a, b, c"
    assert a_few(list("abcde")) == "a, b, c and 2 more"


def _parts() -> Misfit:
    # Each rank has a layer of two; the checkpoint has three of them, and no norm.
    wanted = zeros(layers_0=(1,)) if dist.get_rank() == 0 else zeros(layers_1=(2,), norm=(1,))
    layers = {f"layers.{i}": SimpleNamespace(size=torch.Size((1,))) for i in range(3)}
    return Misfit.of(layers, wanted).of_all_ranks()


def test_ranks_with_parts_of_a_model_find_the_same():
    whole = Misfit(missing=("norm",), extra=("layers.2",), resized=("layers.1 1, not 2",))
    assert run_on_ranks(2, _parts) == [whole, whole]


def adapter_of(flavor, **shape):
    spec = model_registry(flavor, **shape)
    return spec.state_dict_adapter(spec.model, None)


@pytest.mark.parametrize(("flavor", "depth"), [("debug", 6), ("debug_moe", 4)])
def test_what_transformers_leaves_is_left(flavor, depth, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_nextn_predict_layers": 1}))
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.bias", f"model.layers.{depth + 1}.mlp.up_proj.weight"]
    head, block = f"model.layers.{depth}.enorm.weight", "model.mtp_block.0.mlp.up_proj.weight"
    given = [*names, "lm_head.weight", head, block]
    found = not_read_from_hugging_face(given, adapter_of(flavor), tmp_path)
    assert found.keys() == {head, block}
    assert "lm_head.weight" in not_read_from_hugging_face(given, adapter_of(flavor, tie_embeddings=True), tmp_path)
    (tmp_path / "config.json").unlink()
    # Without the word of the configuration a block too many is one.
    assert not_read_from_hugging_face([head], adapter_of(flavor), tmp_path) == {}


def test_buffers_and_scales_are_left(tmp_path):
    inverse, scale = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert not_read_from_hugging_face([inverse, scale], adapter_of("debug"), tmp_path).keys() == {inverse}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    assert not_read_from_hugging_face([inverse, scale], adapter_of("debug"), tmp_path).keys() == {inverse, scale}


def test_two_versions_of_a_tensor_are_found(tmp_path):
    save_file(zeros(a=(2,), b=(3,)), tmp_path / "model-1.safetensors")
    assert in_several_files(HuggingFaceStorageReader(str(tmp_path)).read_metadata().state_dict_metadata) == []
    save_file(zeros(b=(3,)), tmp_path / "model.safetensors")
    assert in_several_files(HuggingFaceStorageReader(str(tmp_path)).read_metadata().state_dict_metadata) == ["b"]
