"""The stack of blocks against published ones on the same weights, and what recomputation must not change."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from open_clip.transformer import LayerNorm as ClipLayerNorm
from open_clip.transformer import QuickGELU
from open_clip.transformer import Transformer as ClipTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, LlamaConfig, LlamaModel, MixtralConfig, MixtralModel, Qwen3Config, Qwen3Model
from transformers.models.bert.modeling_bert import BertEncoder

from mmpt.config import BlocksConfig, ExpertsConfig
from mmpt.model.attention import AttentionLayout
from mmpt.model.experts import Origin
from mmpt.model.rotary import rotary_angles
from mmpt.model.transformer import Transformer
from mmpt.types import NOTHING

DIM, LAYERS, HEADS, FFN = 32, 2, 4, 48
LENGTHS = (5, 1, 9, 5)
NUMBERS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def blocks(**changes) -> BlocksConfig:
    return BlocksConfig(**({"dim": DIM, "layers": LAYERS, "n_heads": HEADS, "ffn_dim": FFN, "qk_norm": False} | changes))


def perturbed(module: nn.Module) -> nn.Module:
    """Norms and biases away from where they start, so that each is seen to take part."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            parameter.add_(1.0 if parameter.dim() == 1 else 0.0)
    return module


def together(name: str, parts: list[Tensor]) -> Tensor:
    """Ours of theirs: one below the other, but the rows of `qkv` by head of keys, with the queries that share it before them."""
    whole = torch.cat(parts)
    if "qkv" not in name:
        return whole
    heads = whole.unflatten(0, (-1, DIM // HEADS))
    shared = (len(heads) - HEADS) // 2
    each = HEADS // shared
    order = [i for head in range(shared) for i in (*range(head * each, (head + 1) * each), HEADS + head, HEADS + shared + head)]
    return heads[order].flatten(0, 1)


def assert_same(ours: Transformer, run: Callable, reference: nn.Module, pairs: dict[str, list[Tensor]], rotary=None, causal=True):
    """Packed documents through ours, each alone through `run`: outputs, every gradient. `pairs` has theirs for each of ours."""
    perturbed(reference)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(together(name, pairs[name]))
    x = torch.randn(len(NUMBERS), DIM)
    upstream = torch.randn_like(x)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    layout = AttentionLayout.from_document_ids(NUMBERS, causal=causal)
    out, _ = ours(mine, layout, rotary, Origin(torch.zeros_like(NUMBERS), 1, lambda counts: counts))
    expected = torch.cat([run(part[None])[0] for part in other.split(list(LENGTHS))])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in ours.named_parameters():
        gradient = together(name, [part.grad for part in pairs[name]])
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def llama_pairs(theirs: nn.Module) -> dict[str, list[Tensor]]:
    """Of attention and norms, which Mixtral shares."""
    pairs = {"norm.weight": [theirs.norm.weight]}
    for i, layer in enumerate(theirs.layers):
        attention = layer.self_attn
        pairs |= {
            f"blocks.{i}.attention_norm.weight": [layer.input_layernorm.weight],
            f"blocks.{i}.attention.qkv.weight": [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
            f"blocks.{i}.attention.out.weight": [attention.o_proj.weight],
            f"blocks.{i}.ffn_norm.weight": [layer.post_attention_layernorm.weight],
        }
    return pairs


LLAMA = {
    "hidden_size": DIM,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 8,
}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_llama_and_qwen3(qk_norm: bool):
    """Pre-norm, RMS, SwiGLU, grouped queries, rotary; Qwen3 normalises queries and keys besides."""
    head_dim = {"head_dim": DIM // HEADS}
    theirs = Qwen3Model(Qwen3Config(**LLAMA, **head_dim)) if qk_norm else LlamaModel(LlamaConfig(**LLAMA))
    pairs = llama_pairs(theirs)
    for i, layer in enumerate(theirs.layers):
        pairs |= {f"blocks.{i}.ffn.{n}.weight": [getattr(layer.mlp, f"{n}_proj").weight] for n in ("gate", "up", "down")}
        if qk_norm:
            pairs[f"blocks.{i}.attention.q_norm.weight"] = [layer.self_attn.q_norm.weight]
            pairs[f"blocks.{i}.attention.k_norm.weight"] = [layer.self_attn.k_norm.weight]
    ours = Transformer(blocks(n_kv_heads=2, norm_eps=1e-5, qk_norm=qk_norm))
    rotary = rotary_angles(POSITIONS[None], DIM // HEADS, 10_000.0)
    assert_same(ours, lambda x: theirs(inputs_embeds=x).last_hidden_state, theirs, pairs, rotary)


def test_equals_mixtral_in_a_window():
    config = MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=3)
    theirs = MixtralModel(config)
    pairs = llama_pairs(theirs)
    for i, layer in enumerate(theirs.layers):
        pairs[f"blocks.{i}.ffn.router.weight"] = [layer.mlp.gate.weight]
        pairs[f"blocks.{i}.ffn.gate_up"] = [layer.mlp.experts.gate_up_proj]
        pairs[f"blocks.{i}.ffn.down"] = [layer.mlp.experts.down_proj]
    ours = Transformer(blocks(n_kv_heads=2, norm_eps=1e-5), experts=ExpertsConfig(count=4, top_k=2))
    rotary = rotary_angles(POSITIONS[None], DIM // HEADS, config.rope_parameters["rope_theta"])
    windowed = partial(AttentionLayout.from_document_ids, window=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionLayout, "from_document_ids", windowed)
        assert_same(ours, lambda x: theirs(inputs_embeds=x).last_hidden_state, theirs, pairs, rotary)


def test_equals_bert():
    """Post-norm, layer norm, GELU, biases, no mask, no last norm."""
    config = BertConfig(
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    theirs = BertEncoder(config)
    pairs = {}
    for i, layer in enumerate(theirs.layer):
        inner = layer.attention.self
        for kind in ("weight", "bias"):
            pairs |= {
                f"blocks.{i}.attention.qkv.{kind}": [getattr(part, kind) for part in (inner.query, inner.key, inner.value)],
                f"blocks.{i}.attention.out.{kind}": [getattr(layer.attention.output.dense, kind)],
                f"blocks.{i}.attention_norm.{kind}": [getattr(layer.attention.output.LayerNorm, kind)],
                f"blocks.{i}.ffn.up.{kind}": [getattr(layer.intermediate.dense, kind)],
                f"blocks.{i}.ffn.down.{kind}": [getattr(layer.output.dense, kind)],
                f"blocks.{i}.ffn_norm.{kind}": [getattr(layer.output.LayerNorm, kind)],
            }
    ours = Transformer(blocks(norm="layer", norm_placement="post", norm_eps=1e-12, bias=True, activation="gelu"))
    assert ours.norm is None
    assert_same(ours, lambda x: theirs(x).last_hidden_state, theirs, pairs, causal=False)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_open_clip(activation: str, causal: bool):
    """Pre-norm, layer norm, biases: both towers' blocks, with the last norm that open_clip keeps outside."""
    act = QuickGELU if activation == "quick_gelu" else nn.GELU
    tower = ClipTransformer(DIM, LAYERS, HEADS, FFN / DIM, act_layer=act, norm_layer=ClipLayerNorm)
    theirs = nn.ModuleList([tower, ClipLayerNorm(DIM)])
    pairs = {f"norm.{kind}": [getattr(theirs[1], kind)] for kind in ("weight", "bias")}
    for i, block in enumerate(tower.resblocks):
        pairs[f"blocks.{i}.attention.qkv.weight"] = [block.attn.in_proj_weight]
        pairs[f"blocks.{i}.attention.qkv.bias"] = [block.attn.in_proj_bias]
        modules = {
            "attention.out": block.attn.out_proj,
            "attention_norm": block.ln_1,
            "ffn_norm": block.ln_2,
            "ffn.up": block.mlp.c_fc,
            "ffn.down": block.mlp.c_proj,
        }
        pairs |= {f"blocks.{i}.{n}.{k}": [getattr(m, k)] for n, m in modules.items() for k in ("weight", "bias")}
    ours = Transformer(blocks(norm="layer", norm_eps=1e-5, bias=True, activation=activation))

    def run(x: Tensor) -> Tensor:
        future = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        return theirs[1](tower(x, attn_mask=future if causal else None))

    assert_same(ours, run, theirs, pairs, causal=causal)


VARIANTS = {
    "llama-like": {"n_kv_heads": 2, "qk_norm": True},
    "bert-like": {"norm": "layer", "norm_placement": "post", "bias": True, "activation": "gelu"},
    "clip-like": {"norm": "layer", "bias": True, "activation": "quick_gelu"},
}
EXPERTS = {
    "dense": None,
    "auxiliary": ExpertsConfig(count=4, top_k=2, shared=1),
    "bias": ExpertsConfig(count=4, top_k=2, balance="bias"),
}
PADDED = torch.tensor([0, 0, 0, 1, 2, 2, 2, -1, 3, 3, 3, 3, 3, 4, 4, -1])
ORIGIN = Origin(torch.where(PADDED >= 0, torch.arange(16) // 8, NOTHING), 2, lambda counts: counts)
SPANS = torch.tensor([-1, 0, 0, -1, 1, 1, -1, -1, -1, 2, 2, 2, -1, -1, -1, -1])
MASKS = {"causal": {"causal": True}, "window": {"causal": True, "window": 2}, "spans": {"causal": True, "spans": SPANS}}


def run_once(model: Transformer, mask: str, autocast: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs and loads, gradients) of one step with a balance loss."""
    model.zero_grad()
    x = torch.randn(16, DIM, generator=torch.Generator().manual_seed(5)).requires_grad_()
    layout = AttentionLayout.from_document_ids(PADDED, **MASKS[mask])
    rotary = rotary_angles(torch.arange(16)[None], DIM // HEADS, 1e4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, routing = model(x, layout, rotary, origin=ORIGIN)
    balance = sum(layer.balance.sum() for layer in routing if layer.balance is not None)
    (out.float().square().mean() + balance).backward()
    found = [out, *(layer.load for layer in routing), *(layer.balance for layer in routing if layer.balance is not None)]
    return found, [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("variant", "experts", "mask"),
    [
        ("llama-like", "dense", "causal"),
        ("llama-like", "auxiliary", "window"),
        ("llama-like", "bias", "spans"),
        ("bert-like", "auxiliary", "causal"),
        ("clip-like", "dense", "spans"),
    ],
)
def test_recomputation_changes_nothing(variant: str, experts: str, mask: str):
    torch.manual_seed(0)
    model = Transformer(blocks(**VARIANTS[variant]), experts=EXPERTS[experts])
    model.initialize()
    for autocast in (False, True):
        model.recompute = "none"
        found, gradients = run_once(model, mask, autocast)
        assert all(gradient is not None for gradient in gradients)
        for recompute in ("selective", "full"):
            model.recompute = recompute
            other, other_gradients = run_once(model, mask, autocast)
            for before, after in zip([*found, *gradients], [*other, *other_gradients], strict=True):
                assert torch.equal(before, after)


class Count(TorchDispatchMode):
    """How often operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def test_selective_recomputes_neither_products_nor_attention():
    torch.manual_seed(0)
    model = Transformer(blocks(**VARIANTS["llama-like"]))
    model.initialize()
    calls = {}
    for recompute in ("none", "selective", "full"):
        model.recompute = recompute
        with Count() as count:
            run_once(model, "causal")
        products = sum(count.calls.get(name, 0) for name in ("mm", "addmm", "bmm"))
        calls[recompute] = (products, count.calls["_scaled_dot_product_flash_attention_for_cpu"], count.calls["silu"])
    none, selective, full = calls["none"], calls["selective"], calls["full"]
    assert selective[:2] == none[:2] and selective[2] > none[2]
    assert full[0] > none[0] and full[1] > none[1]


def test_recomputation_keeps_less_alive():
    """Bytes of the tensors that the forward pass leaves for the backward pass."""
    torch.manual_seed(0)
    model = Transformer(blocks(layers=4))
    model.initialize()
    layout = AttentionLayout.from_lengths(torch.tensor([40, 24]), causal=True)
    kept = {}
    for recompute in ("none", "full"):
        model.recompute = recompute
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes=sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(64, DIM, requires_grad=True), layout)
        kept[recompute] = sum(sizes.values())
    assert kept["full"] < 0.6 * kept["none"], kept


def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch):
    """Traced and differentiated by the compiler's front; another layout is not compiled anew."""
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = Transformer(blocks(**VARIANTS["llama-like"]))
    model.initialize()
    found, gradients = run_once(model, "causal")
    windowed, _ = run_once(model, "window")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model.compile_blocks()
    other, other_gradients = run_once(model, "causal")
    compiled = len(counted)
    for before, after in zip([*found, *gradients], [*other, *other_gradients], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run_once(model, "window")[0], windowed, rtol=1e-5, atol=1e-6)
    assert 0 < compiled == len(counted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_one_document_does_not_touch_another(variant: str, experts: str):
    """By one bit; but a product over another number of an expert's rows may round otherwise."""
    torch.manual_seed(0)
    model = Transformer(blocks(**VARIANTS[variant]), experts=EXPERTS[experts])
    model.initialize()
    layout = AttentionLayout.from_document_ids(PADDED, causal=True)
    x = torch.randn(16, DIM)
    changed = torch.where((PADDED == 3)[:, None], -x, x)
    before, after = (model(tokens, layout, origin=ORIGIN)[0] for tokens in (x, changed))
    tolerance = 0.0 if EXPERTS[experts] is None else 1e-5
    same = ((before - after).abs() <= tolerance).all(dim=1)
    assert same[PADDED != 3].all() and not same[PADDED == 3].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_the_same_seed_draws_the_same_weights(variant: str, experts: str):
    drawn = []
    for seed in (3, 3, 4):
        model = Transformer(blocks(**VARIANTS[variant]), experts=EXPERTS[experts])
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(torch.nan)
        torch.manual_seed(seed)
        model.initialize()
        drawn.append(model.state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    for name, weight in drawn[0].items():
        assert weight.isfinite().all(), name
        if "norm" in name and name.endswith("weight"):
            assert (weight == 1).all()
        elif name.endswith("bias"):
            assert (weight == 0).all()
        else:
            assert not torch.equal(weight, drawn[2][name]), name


def test_the_spread_of_drawn_weights():
    """fan-in ** -0.5; those that write into the residual stream by (2 layers) ** -0.5 less, routers by 10."""
    torch.manual_seed(0)
    config = blocks(dim=64, ffn_dim=256, layers=8)
    model = Transformer(config, experts=ExpertsConfig(count=4, shared=1))
    model.initialize()
    weights = model.blocks[0].state_dict()
    expected = {
        "attention.qkv.weight": 64**-0.5,
        "attention.out.weight": 64**-0.5 / 4,
        "ffn.router.weight": 64**-0.5 / 10,
        "ffn.gate_up": 64**-0.5,
        "ffn.down": 256**-0.5 / 4,
        "ffn.shared.gate.weight": 64**-0.5,
        "ffn.shared.up.weight": 64**-0.5,
        "ffn.shared.down.weight": 256**-0.5 / 4,
    }
    assert {name for name in weights if "norm" not in name} == set(expected)
    for name, deviation in expected.items():
        assert float(weights[name].std()) == pytest.approx(deviation, rel=0.1), name


def test_biases_of_routing_move_by_the_loads_of_their_layer():
    model = Transformer(blocks(), experts=ExpertsConfig(count=3, top_k=1, balance="bias", bias_rate=0.25))
    model.initialize()
    model.rebalance(torch.tensor([[5, 0, 1], [2, 2, 2]]))
    assert model.blocks[0].ffn.bias.tolist() == [-0.25, 0.25, 0.25]
    assert model.blocks[1].ffn.bias.tolist() == [0.0, 0.0, 0.0]


def test_padding_does_not_count_in_routing():
    model = Transformer(blocks(layers=1), experts=ExpertsConfig(count=4, top_k=2))
    model.initialize()
    layout = AttentionLayout.from_document_ids(PADDED, causal=True)
    x = torch.randn(16, DIM)
    _, (routing,) = model(x, layout, origin=ORIGIN)
    other = torch.where((PADDED >= 0)[:, None], x, torch.randn(16, DIM))
    _, (changed,) = model(other, layout, origin=ORIGIN)
    assert int(routing.load.sum()) == 2 * 14
    assert torch.equal(routing.load, changed.load) and torch.equal(routing.balance, changed.balance)
    assert routing.balance.shape == (2,)


def test_builds_on_meta():
    with torch.device("meta"):
        model = Transformer(blocks(layers=3), experts=ExpertsConfig(count=4, shared=1, balance="bias"))
    attention = DIM * 3 * DIM + DIM * DIM
    experts = 4 * 3 * DIM * FFN + 3 * DIM * FFN + 4 * DIM
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * (attention + experts + 2 * DIM) + DIM
    assert all(parameter.is_meta for parameter in model.parameters())
