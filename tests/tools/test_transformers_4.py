"""What transformers 4 computes with an export, where ``TRANSFORMERS4_PYTHON`` names an interpreter that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.tools.export.folder import export
from nitp_titan.tools.export.tokenizer import write_tokenizer
from tests.helpers.exports import job_of, logits_of, shrunken, trained
from tests.helpers.tokenizers_of_others import KINDS, TEXTS, write_kind

PYTHON = os.environ.get("TRANSFORMERS4_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="TRANSFORMERS4_PYTHON names no interpreter with transformers 4")

START = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4."), transformers.__version__
folder = sys.argv[1]
"""
LOGITS = """
model, report = transformers.AutoModelForCausalLM.from_pretrained(folder + "/hf", output_loading_info=True)
assert not any(report.values()), report
with torch.no_grad():
    logits = model.eval()(input_ids=load_file(folder + "/tokens")["tokens"]).logits
save_file({"logits": logits}, folder + "/logits")
"""
IDS = """
tokenizer = transformers.AutoTokenizer.from_pretrained(folder + "/hf")
ids = [tokenizer(text)["input_ids"] for text in json.load(open(folder + "/texts"))]
print(json.dumps([ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]))
"""


def run(code: str, folder: Path) -> str:
    done = subprocess.run([str(PYTHON), "-c", START + code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


FOREIGN = [("llama3", "debugmodel"), ("qwen3", "debugmodel"), ("tests.helpers.foreign", "qwen3_moe")]
FOREIGN += [("tests.helpers.foreign", "deepseek_v3")]


@pytest.mark.parametrize(("module", "flavor"), [("nitp_titan", "debug"), ("nitp_titan", "debug_moe"), *FOREIGN])
def test_it_computes_what_we_do(module, flavor, tmp_path):
    words = (f"--model.module={module}", f"--model.flavor={flavor}", "--training.seq_len=256")
    job = shrunken(flavor) if module == "nitp_titan" else job_of(*words)
    ours = trained(job, tmp_path / "step-3", bias=flavor in ("debug_moe", "deepseek_v3"))
    export(tmp_path / "step-3", tmp_path / "hf", job)
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(2))
    save_file({"tokens": tokens}, tmp_path / "tokens")
    run(LOGITS, tmp_path)
    found, expected = load_file(tmp_path / "logits")["logits"], logits_of(ours, tokens)
    assert (found - expected).abs().max() < (1e-4 if flavor == "deepseek_v3" else 1e-5) * expected.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "ernie4_5_moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_ids_are_those_of_training(kind, model_type, tmp_path):
    assets = write_kind(kind, tmp_path / "assets")
    ours = HuggingFaceTokenizer(tokenizer_path=str(assets))
    (tmp_path / "hf").mkdir()
    pad = write_tokenizer(ours, assets, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "texts").write_text(json.dumps(TEXTS))
    ids = [ours.encode(text, add_bos=True, add_eos=False) for text in TEXTS]
    assert json.loads(run(IDS, tmp_path)) == [ids, ours.bos_id, ours.eos_id, pad]
