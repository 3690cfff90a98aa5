"""How the ranks of a run share its work."""

from __future__ import annotations

from pydantic import Field

from mmpt.config.section import Positive, Section


class ParallelConfig(Section):
    """Ranks along each axis of the mesh, outermost first; their product is the number of ranks.

    What is learned does not depend on it: a run may go on under another layout than it was begun with.
    """

    dp_replicate: Positive = Field(1, description="copies of the sharded model, each with packs of its own (HSDP)")
    dp_shard: Positive | None = Field(
        None, description="shards of the model, each with packs of its own (FSDP2); none: the ranks that are left"
    )
    ring: Positive = Field(1, description="ranks that share a batch's tokens and pass keys and values around (ring attention)")
    ulysses: Positive = Field(1, description="ranks that share tokens, and in attention heads (arXiv 2309.14509)")
    tp: Positive = Field(1, description="ranks that share the matrices of the shared transformer, and tokens (arXiv 2205.05198)")
