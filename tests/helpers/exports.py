"""Checkpoints to export, what transformers computes with what leaves, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from nitp_titan.checkpoints.stored import ExportError
from nitp_titan.job import Job, load_job
from nitp_titan.job.backbone import model_spec
from nitp_titan.job.shape import changes_of
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.titan.spec import nitp_model_spec
from nitp_titan.tools.export.folder import export
from tests.helpers.decoders import built

EOS = 257


def job_of(*words: str) -> Job:
    """A job with the byte tokenizer and NITP at the first block."""
    common = ["--tokenizer.name=byte", "--dataloader.dataset=python_stdlib", "--nitp.target_layer=1"]
    return load_job(None, [*common, *words], 1)


def shrunken(flavor: str, *words: str) -> Job:
    """A flavor's twin: its depth pattern, head dims and tying, with few blocks, heads, experts and tokens."""
    shape = FLAVORS[flavor].shape
    small = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "dim": 4 * shape.head_dim, "hidden_dim": 96}
    # An epsilon and a base that are nobody's defaults show in the logits.
    small |= {"vocab_size": 512, "norm_eps": 1e-2, "rope_theta": 700.0}
    if shape.num_experts:
        small |= {"num_experts": 8, "top_k": 3, "expert_hidden_dim": 48}
    changes = [f"--model.shape.{key}={value}" for key, value in small.items()]
    return job_of(f"--model.flavor={flavor}", *changes, "--training.seq_len=256", *words)


def trained(job: Job, folder: Path, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Save a checkpoint of the job's NITP twin with random weights, as training does; return the twin.

    Args:
        bias: random selection biases, rather than zero.
    """
    table = job["model"]
    spec = model_spec(table["module"], table["flavor"], "flex", **changes_of(job["model.shape"]))
    model = built(nitp_model_spec(spec, job.nitp))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("expert_bias_E"):
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator) * bias
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    optimizer = {"state": {"lm_head.weight.exp_avg": torch.zeros(3)}}
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    dcp.save({**weights, "optimizer": optimizer, "train_state": {"step": 3}}, checkpoint_id=folder, no_dist=True)
    return model.eval()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of the backbone: (B, L) -> (B, L, V)."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        return model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))


def greedy(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> list[int]:
    for _ in range(steps):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == EOS:
            break
    return tokens[0].tolist()


def loaded(folder: Path, **options) -> torch.nn.Module:
    """What transformers loads: every key, and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def check_same(ours: torch.nn.Module, theirs: torch.nn.Module, vocab_size: int, within: float = 1e-5) -> None:
    tokens = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = logits_of(ours, tokens)
    with torch.no_grad():
        found = theirs(input_ids=tokens).logits
    assert found.dtype == expected.dtype
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < within * expected.abs().max()
    prompt = tokens[:1, :9]
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    assert continued[0].tolist() == greedy(ours, prompt, 8)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(*arguments, **options) -> str:
    with pytest.raises(ExportError) as caught:
        export(*arguments, **options)
    return str(caught.value)
