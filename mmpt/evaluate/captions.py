"""What a model says of pictures: `<media>... <emb> <bos>` --model--> the likeliest next token, again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmpt.config import ModelConfig
from mmpt.data.collate import Item
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import evaluating
from mmpt.evaluate.prompts import prompt_batch
from mmpt.types import IGNORE, IMAGE, MediaSpan, ModelOutput, PackedBatch, TokenizedDocument


def captions(
    model: nn.Module,
    tokenizer: Tokenizer,
    pictures: Sequence[Item],
    config: ModelConfig,
    device: torch.device | str,
    max_tokens: int = 24,
) -> list[str]:
    """The likeliest continuation of each picture, one token at a time until <eos>, `max_tokens` or the last learned position.

    All pictures go side by side as segments of one pack. Each step computes the whole prefix anew: names are
    a few tokens long, and a cache of keys and values would be a second path through every attention layer.
    """
    written: list[list[int]] = [[] for _ in pictures]
    active = list(range(len(pictures)))
    if config.transformer.max_positions:
        prompt = max((_slots(picture, config) for picture in pictures), default=0) + 2
        max_tokens = min(max_tokens, config.transformer.max_positions - prompt + 1)
    with evaluating(model):
        for _ in range(max_tokens):
            if not active:
                break
            batch = _prompts([pictures[i] for i in active], [written[i] for i in active], config, tokenizer)
            ends = torch.cat([(batch.document_ids.diff() != 0).nonzero().flatten(), torch.tensor([len(batch.tokens) - 1])])
            chosen = _likeliest(model(batch.to(device)), ends.to(device), tokenizer)
            for picture, token in zip(active, chosen, strict=True):
                written[picture] += [token] if token != tokenizer.eos else []
            active = [picture for picture, token in zip(active, chosen, strict=True) if token != tokenizer.eos]
    return [tokenizer.decode(ids) for ids in written]


def _prompts(pictures: Sequence[Item], written: Sequence[list[int]], config: ModelConfig, tokenizer: Tokenizer) -> PackedBatch:
    """Segments as a document's row begins whose picture stands first, the written tokens at their ends."""
    segments = []
    for picture, ids in zip(pictures, written, strict=True):
        slots = _slots(picture, config)
        tokens = (*[tokenizer.media] * slots, tokenizer.emb, tokenizer.bos, *ids)
        shown = MediaSpan(start=0, length=slots, modality=IMAGE, item=0)
        segments.append(TokenizedDocument(tokens=tokens, labels=(IGNORE,) * len(tokens), media=(shown,)))
    return prompt_batch(segments, config, tokenizer.pad, pictures, IMAGE)


def _slots(picture: Item, config: ModelConfig) -> int:
    return len(picture.values) // config.image.merge**2


def _likeliest(output: ModelOutput, at: Tensor, tokenizer: Tokenizer) -> list[int]:
    """The token with the highest logit at each of these positions: <eos> or one of text."""
    logits: Float[Tensor, "B vocabulary"] = output.output_hidden[at].float() @ output.output_weight.float().T
    if output.output_bias is not None:
        logits = logits + output.output_bias.float()
    special = {tokenizer.pad, *tokenizer.special} - {tokenizer.eos}
    logits[:, sorted(special)] = -torch.inf
    logits[:, len(tokenizer) :] = -torch.inf  # rows of the embedding beyond the vocabulary
    return logits.argmax(dim=1).tolist()
