"""How many tokens a run has seen, on all ranks together: TorchTitan counts each rank's own, and saves one rank's."""

from __future__ import annotations

from torchtitan.distributed import ParallelDims

TOKENS_SEEN = "tokens_seen"
"""Name of the count of all ranks in a checkpoint, beside TorchTitan's ``ntokens_seen`` of one."""


class TokensSeen:
    """Between the count of all ranks and a rank's own, of which TorchTitan logs the sum over the ranks of the loss."""

    def __init__(self, dims: ParallelDims):
        mesh = dims.get_optional_mesh("loss")
        self._ranks, self._rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
        # Of all ranks, what is more or less than this rank's own count times their number.
        self._uneven = 0

    def of_all(self, own: int) -> int:
        """Return the count of all ranks; they see equally many tokens in every step."""
        return own * self._ranks + self._uneven

    def share(self, total: int) -> int:
        """Return this rank's part of a count that any number of ranks has made: the parts add up to it."""
        own = total // self._ranks + (self._rank < total % self._ranks)
        self._uneven = total - own * self._ranks
        return own

    def share_of_one(self, of_one: int, drawn: int) -> tuple[int, str]:
        """Return this rank's part where a checkpoint has only what one of its ranks counted, and a remark.

        Args:
            of_one: the count of one rank, of an unknown number of them.
            drawn: tokens of all sequences that the data loader has yielded to them; 0 where it does not say.
        """
        if of_one and drawn and drawn % of_one == 0:
            ranks = drawn // of_one
            return self.share(drawn), f"counted on {ranks} rank{'s' * (ranks > 1)}, as the data tell" * (ranks > 1)
        remark = f"as if counted on {self._ranks} ranks: this older checkpoint has one rank's count" * (self._ranks > 1)
        return self.share(of_one * self._ranks), remark
