"""NITP in a training loop of your own: a stock Hugging Face Llama learns a repeating text, on a CPU, in seconds.

    python examples/huggingface_llama.py

B = sequences, L = tokens of a sequence, D = model dim
"""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nitp_titan import Projector, nitp_loss, pair_mask, shift_left

TARGET_LAYER, WEIGHT, STEPS = 1, 1.0, 60


def main() -> list[tuple[float, float]]:
    """Train; return the NTP and the NITP loss of every step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=256))
    projector = Projector(64)
    optimizer = torch.optim.AdamW([*model.parameters(), *projector.parameters()], lr=3e-3)
    text_BL = torch.tensor(list(b"Next implicit token prediction. " * 9)).repeat(4, 1)
    tokens_BL, labels_BL = text_BL[:, :-1], text_BL[:, 1:]
    positions_BL = torch.arange(tokens_BL.shape[1]).expand(tokens_BL.shape)  # one document a row; 0 begins the next
    losses = []
    for _ in range(STEPS):
        out = model(tokens_BL, position_ids=positions_BL, output_hidden_states=True)
        ntp = F.cross_entropy(out.logits.flatten(0, 1), labels_BL.flatten())
        h_BLD = out.hidden_states[-1]  # what the unembedding sees, behind the final norm
        z_BLD = out.hidden_states[TARGET_LAYER].detach()  # the implicit tokens: an early layer of the same forward pass
        mask_BL = pair_mask(positions_BL, labels_BL)  # where a token has a successor in its document
        nitp = nitp_loss(projector(h_BLD), shift_left(z_BLD), mask_BL) / mask_BL.sum()
        optimizer.zero_grad()
        (ntp + WEIGHT * nitp).backward()
        optimizer.step()
        losses.append((ntp.item(), nitp.item()))
    return losses


if __name__ == "__main__":
    for step, (ntp, nitp) in enumerate(main(), 1):
        if step % 10 == 0:
            print(f"step {step:3}  ntp {ntp:.4f}  nitp {nitp:.4f}")
