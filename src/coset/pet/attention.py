"""One transformer layer: flat tokens in, flat tokens out; padding exists only inside attention.

Legend of suffixes: R rotations, T tokens (centers, then kept edges), D width, H heads, C width of a
head, M members of a class (atoms with about the same number of tokens), W tokens of a member.

The attention bias depends on the key alone, b = log f, so a neighbor fades out as f -> 0.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from coset.edge_model import Geometry
from coset.pet.hypers import NetworkHypers

PADDING_BIAS = -1e30
LAYER_NORM_EPS = 1e-5
SMALLEST_CLASS = 16
CLASS_STEP = 4

Norm = Callable[[Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight; eps None: the machine epsilon of the dtype."""

    def __init__(self, width: int, eps: float | None) -> None:
        """Unit weights."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Normalized rows."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        normalized: Tensor = _RMSNorm.apply(x, self.weight, eps)  # type: ignore[no-untyped-call]
        return normalized


class _RMSNorm(torch.autograd.Function):
    """The norm in three passes; its backward pass is differentiable, so all orders are exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return x * _inverse_rms(x, eps) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        inverse = _inverse_rms(x, ctx.eps)
        y, weighted = x * inverse, grad * weight
        by_x = inverse * (weighted - y * (weighted * y).mean(-1, keepdim=True))
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grad * y).reshape(-1, len(weight)).sum(0)
        return by_x, by_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm * norm / x.shape[-1] + eps)


class LayerNorm(nn.Module):
    """(x - mean)/sqrt(var + eps) * weight + bias, eps 1e-5, correct to every derivative."""

    def __init__(self, width: int) -> None:
        """Unit weights, zero bias."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Normalized rows."""
        normalized: Tensor = _LayerNorm.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return normalized


class _LayerNorm(torch.autograd.Function):
    """The library's kernels for values and first derivatives, plain operations for higher ones.

    The library's own higher derivatives are wrong from the third on (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401
        out, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, LAYER_NORM_EPS)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, bias, mean, inverse = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            by_all: tuple[Tensor | None, ...] = torch.ops.aten.native_layer_norm_backward(
                grad, x, weight.shape, mean, inverse, weight, bias, needed
            )
            return by_all
        centered = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt((centered * centered).mean(-1, keepdim=True) + LAYER_NORM_EPS)
        y, weighted = centered * inverse, grad * weight
        projected = (weighted * y).mean(-1, keepdim=True)
        by_x = inverse * (weighted - weighted.mean(-1, keepdim=True) - y * projected)
        by_weight = (grad * y).reshape(-1, len(weight)).sum(0) if needed[1] else None
        by_bias = grad.reshape(-1, len(weight)).sum(0) if needed[2] else None
        return by_x, by_weight, by_bias


class FeedForward(nn.Module):
    """w_out(v * sigmoid(g)) with (v, g) = w_in(x) for `glu`; w_out(silu(w_in(x))) for `silu`."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        """Two linear maps, the first twice as wide for `glu`."""
        super().__init__()
        self.glu = activation == "glu"
        self.w_in = nn.Linear(width, 2 * hidden if self.glu else hidden)
        self.w_out = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Transformed rows."""
        hidden = self.w_in(x)
        inner = functional.glu(hidden, dim=-1) if self.glu else functional.silu(hidden)
        transformed: Tensor = self.w_out(inner)
        return transformed


def make_norm(network: NetworkHypers, width: int, eps: float | None) -> nn.Module:
    """The normalization that the hyperparameters name."""
    return LayerNorm(width) if network.normalization == "layer" else RMSNorm(width, eps)


class Attention(nn.Module):
    """softmax(q.k/(sqrt(C) temperature) + b_key) v over the tokens of each atom."""

    def __init__(self, network: NetworkHypers) -> None:
        """One map to q, k, v and one back."""
        super().__init__()
        d = network.d_pet
        self.n_heads = network.n_heads
        self.scale = 1.0 / (math.sqrt(d // network.n_heads) * network.attention_temperature)
        self.input_linear = nn.Linear(d, 3 * d)
        self.output_linear = nn.Linear(d, d)

    def forward(
        self,
        x_RTD: Float[Tensor, "rotations tokens width"],
        bias_T: Float[Tensor, " tokens"],
        geometry: Geometry,
        *,
        create_graph: bool,
    ) -> Float[Tensor, "rotations tokens width"]:
        """Mixed tokens."""
        qkv = self.input_linear(x_RTD)
        if create_graph:
            mixed = attend(qkv, bias_T, geometry, self.n_heads, self.scale)
        else:
            mixed = _FirstOrderAttention.apply(qkv, bias_T, geometry, self.n_heads, self.scale)  # type: ignore[no-untyped-call]
        out: Tensor = self.output_linear(mixed)
        return out


class TransformerLayer(nn.Module):
    """Attention and feed-forward over the center and edge tokens of every atom."""

    def __init__(self, network: NetworkHypers, eps: float | None) -> None:
        """The center token is contracted to d_pet and expanded back if node features are wider."""
        super().__init__()
        d, d_node = network.d_pet, network.d_node
        self.pre = network.norm_placement == "pre"
        self.expanded = network.expanded
        self.attention = Attention(network)
        self.norm_attention = make_norm(network, d, eps)
        self.norm_mlp = make_norm(network, d, eps)
        self.mlp = FeedForward(d, network.d_feedforward, network.activation)
        if self.expanded:
            self.center_contraction = nn.Linear(d_node, d)
            self.center_expansion = nn.Linear(d, d_node)
            self.norm_center_features = make_norm(network, d_node, eps)
            self.center_mlp = FeedForward(d_node, 2 * d_node, network.activation)

    def forward(
        self,
        node: Float[Tensor, "rotations atoms d_node"],
        edge: Float[Tensor, "rotations kept d_pet"],
        bias_T: Float[Tensor, " tokens"],
        geometry: Geometry,
        *,
        create_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        """New node features and edge tokens."""
        center = self.center_contraction(node) if self.expanded else node
        tokens = torch.cat([center, edge], dim=1)
        n_atoms = node.shape[1]
        mixed = self.attention(
            self.norm_attention(tokens) if self.pre else tokens,
            bias_T,
            geometry,
            create_graph=create_graph,
        )
        parts = [n_atoms, edge.shape[1]]
        if self.pre:
            center, update = mixed.split(parts, dim=1)
            edge = edge + update
            edge = edge + self.mlp(self.norm_mlp(edge))
        else:
            tokens = self.norm_attention(tokens + mixed)
            tokens = self.norm_mlp(tokens + self.mlp(tokens))
            center, edge = tokens.split(parts, dim=1)
        if not self.expanded:
            return center, edge
        node = node + self.center_expansion(center)
        return node + self.center_mlp(self.norm_center_features(node)), edge


def token_classes(
    centers: Int[Tensor, " kept"], n_atoms: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Int[Tensor, " tokens"]]:
    """Atoms sorted into classes of similar width: token rows and counts per class, and `place`.

    Widths are 16, 20, 24, ...: below 16 tokens the softmax of one vector is slower than padding.
    """
    device = centers.device
    counts = torch.bincount(centers, minlength=n_atoms)
    first = torch.cumsum(counts, 0) - counts + n_atoms
    tokens = counts + 1
    widths = ((tokens + CLASS_STEP - 1) // CLASS_STEP * CLASS_STEP).clamp_min(SMALLEST_CLASS)
    place = centers.new_zeros(n_atoms + len(centers))
    rows, sizes, offset = [], [], 0
    for width in torch.unique(widths).tolist():
        members = torch.nonzero(widths == width)[:, 0]
        column = torch.arange(width, device=device)
        row = first[members, None] + column - 1
        row[:, 0] = members
        real = column < tokens[members, None]
        row = torch.where(real, row, members[:, None])
        flat = offset + torch.arange(row.numel(), device=device).view_as(row)
        place[row[real]] = flat[real]
        rows.append(row)
        sizes.append(tokens[members])
        offset += row.numel()
    return tuple(rows), tuple(sizes), place


def attend(
    qkv_RTD: Float[Tensor, "rotations tokens three_widths"],
    bias_T: Float[Tensor, " tokens"],
    geometry: Geometry,
    n_heads: int,
    scale: float,
) -> Float[Tensor, "rotations tokens width"]:
    """Attention in plain differentiable operations, to any order."""
    parts = []
    for rows, counts in zip(geometry.tokens, geometry.counts, strict=True):
        q, k, v = _heads(qkv_RTD, rows, n_heads)
        weights = torch.softmax(scale * q @ k.mT + _key_bias(bias_T, rows, counts), dim=-1)
        parts.append(_merged(weights @ v))
    return _tokens_of(parts, geometry) if parts else qkv_RTD[..., :0]


def _heads(
    qkv_RTD: Tensor, rows: Int[Tensor, "members width"], n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a class: [rotations, members, heads, width, channels] each."""
    n_rotations, (members, width) = qkv_RTD.shape[0], rows.shape
    picked = qkv_RTD.index_select(1, rows.reshape(-1))
    picked = picked.reshape(n_rotations, members, width, 3, n_heads, -1)
    q, k, v = picked.permute(3, 0, 1, 4, 2, 5).contiguous().unbind(0)
    return q, k, v


def _key_bias(
    bias_T: Tensor, rows: Int[Tensor, "members width"], counts: Int[Tensor, " members"]
) -> Float[Tensor, "members 1 1 width"]:
    """Bias of every key, a large negative number for padding."""
    real = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
    padding = torch.full_like(bias_T[:1], PADDING_BIAS)
    return torch.where(real, bias_T[rows], padding)[:, None, None, :]


def _merged(values: Float[Tensor, "rotations members heads width channels"]) -> Tensor:
    """[rotations, members * width, heads * channels]."""
    n_rotations, members, n_heads, width, channels = values.shape
    turned = values.transpose(2, 3)
    return turned.reshape(n_rotations, members * width, n_heads * channels)


class _FirstOrderAttention(torch.autograd.Function):
    """`attend` with an analytic backward pass, for calls that differentiate once."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        qkv: Tensor,
        bias: Tensor,
        geometry: Geometry,
        n_heads: int,
        scale: float,
    ) -> Tensor:
        ctx.geometry, ctx.scale, saved, parts = geometry, scale, [], []
        for rows, counts in zip(geometry.tokens, geometry.counts, strict=True):
            q, k, v = _heads(qkv, rows, n_heads)
            keys = _key_bias(bias, rows, counts).expand(q.shape[0], -1, n_heads, -1, -1)
            logits = torch.baddbmm(
                keys.reshape(-1, 1, rows.shape[1]), _flat(q), _flat(k).mT, alpha=scale
            )
            weights = torch.softmax(logits, dim=-1)
            parts.append(_merged(torch.bmm(weights, _flat(v)).view_as(v)))
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        return _tokens_of(parts, geometry) if parts else qkv[..., :0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        geometry, scale, saved = ctx.geometry, ctx.scale, ctx.saved_tensors
        n_slots = sum(rows.numel() for rows in geometry.tokens)
        padded = grad.new_zeros(grad.shape[0], n_slots, grad.shape[2])
        padded.index_copy_(1, geometry.place, grad)
        qkv_grads, bias_grads, start = [], [], 0
        for index, rows in enumerate(geometry.tokens):
            q, k, v, weights = saved[4 * index : 4 * index + 4]
            n_rotations, members, n_heads, width, channels = q.shape
            piece = padded[:, start : start + rows.numel()]
            piece = piece.reshape(n_rotations, members, width, n_heads, channels)
            g = piece.transpose(2, 3).reshape(-1, width, channels)
            by_weights = torch.bmm(g, _flat(v).mT)
            logits = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            factors = (
                torch.bmm(logits, _flat(k)).mul_(scale),
                torch.bmm(logits.mT, _flat(q)).mul_(scale),
                torch.bmm(weights.mT, g),
            )
            joined = grad.new_empty(n_rotations, members, width, 3, n_heads, channels)
            for place, factor in enumerate(factors):
                joined[:, :, :, place] = factor.view_as(q).transpose(2, 3)
            qkv_grads.append(joined.reshape(n_rotations, members * width, -1))
            shaped = logits.view(n_rotations, members, n_heads, width, width)
            bias_grads.append(shaped.sum((0, 2, 3)).reshape(1, -1, 1))
            start += rows.numel()
        if not qkv_grads:
            return None, None, None, None, None
        by_bias = _tokens_of(bias_grads, geometry)[0, :, 0]
        return _tokens_of(qkv_grads, geometry), by_bias, None, None, None


def _tokens_of(parts: list[Tensor], geometry: Geometry) -> Tensor:
    """Rows of the classes put in the order of the tokens; a single class is not copied first."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return joined.index_select(1, geometry.place)


def _flat(values: Tensor) -> Tensor:
    """Leading axes joined: [problems, width, channels]."""
    return values.reshape(-1, *values.shape[-2:])
