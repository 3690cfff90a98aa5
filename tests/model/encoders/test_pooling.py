"""Pooling items of several lengths, item by item."""

import torch
from media_batches import assert_close
from open_clip.transformer import AttentionalPooler

from mmpt.config import BlocksConfig
from mmpt.model.encoders.pooling import AttentionPool, mean_of_items, reduce_items

LENGTHS = [3, 1, 5, 3, 1]


def test_items_come_back_in_their_order():
    x = torch.arange(13.0)[:, None]
    calls = []

    def biggest(rows: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(rows.shape))
        return rows.amax(1)

    assert reduce_items(x, torch.tensor(LENGTHS), biggest).flatten().tolist() == [2, 3, 8, 11, 12]
    assert calls == [(2, 1, 1), (2, 3, 1), (1, 5, 1)]


def test_means_and_their_gradients():
    x = torch.randn(13, 4, requires_grad=True)
    found = mean_of_items(x, torch.tensor(LENGTHS))
    expected = torch.stack([item.mean(0) for item in x.split(LENGTHS)])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(5, 4)
    for a, b in zip(torch.autograd.grad(found, x, upstream), torch.autograd.grad(expected, x, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_means_of_bf16_are_sums_in_fp32():
    x = torch.cat([torch.full((1, 1), 256.0), torch.ones(511, 1)]).bfloat16()
    assert mean_of_items(x, torch.tensor([512])).item() == (256 + 511) / 512


def test_attention_is_open_clips_item_by_item():
    """Their pooler reads items of one length; ours all at once. With as many heads as divide the width."""
    torch.manual_seed(0)
    theirs = AttentionalPooler(d_model=12, context_dim=16, n_head=4, n_queries=1)
    ours = AttentionPool(BlocksConfig(dim=16, n_heads=2, norm="layer", norm_eps=1e-5, bias=True), 12)
    ours.initialize()
    assert ours.heads == 4
    with torch.no_grad():
        theirs.query.copy_(ours.query[None])
        for letter, bias in zip("qkv", theirs.attn.in_proj_bias.chunk(3), strict=True):
            linear = getattr(ours, letter)
            torch.nn.init.normal_(linear.bias)
            getattr(theirs.attn, f"{letter}_proj_weight").copy_(linear.weight)
            bias.copy_(linear.bias)
        theirs.attn.out_proj.load_state_dict(ours.out.state_dict())
        theirs.ln_k = torch.nn.Identity()  # ours is the transformer's last norm
    x = torch.randn(13, 16)
    expected = torch.cat([theirs(item[None])[0] for item in x.split(LENGTHS)])
    assert_close({"pooled": ours(x, torch.tensor(LENGTHS))}, {"pooled": ours.norm(expected)}, 1e-6)
