"""Layers of random networks: on vectors and sequences, on sequences alone, on images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

from random_parts import RIGHT_OR_REFUSED, Draw, Op, activation, kept, lengths, parameter, part

# -- on the last dimension of vectors and sequences -------------------------------------------------------------------


@part("vector sequence", weight=2)
def linear(d: Draw, x: Tensor) -> nn.Module:
    act = activation(d)
    return Op(lambda m, x: act(m.a(x)), a=nn.Linear(x.shape[-1], d.randint(2, 7), bias=d.maybe(0.8)))


@part("vector sequence")
def norm(d: Draw, x: Tensor) -> nn.Module:
    if x.ndim == 2 and d.maybe(0.4):
        return nn.BatchNorm1d(x.shape[1])
    kinds = [nn.LayerNorm, nn.RMSNorm]
    return d.choice(kinds)(x.shape[-1] if d.maybe(0.7) else x.shape[1:], elementwise_affine=d.maybe(0.9))


@part("vector sequence")
def used_twice(d: Draw, x: Tensor) -> nn.Module:
    return Op(lambda m, x: torch.tanh(m.a(torch.tanh(m.a(x)))), a=nn.Linear(x.shape[-1], x.shape[-1]))


@part("vector sequence", weight=2)
def parametrised(d: Draw, x: Tensor) -> nn.Module:
    width, out = x.shape[-1], d.randint(2, 6)
    kind = d.choice(["weight_norm", "spectral_norm", "low rank", "generated", "flat", "masked"])
    if kind in ("weight_norm", "spectral_norm"):
        return Op(lambda m, x: torch.tanh(m.a(x)), a=getattr(parametrizations, kind)(nn.Linear(width, out)))
    if kind == "low rank":
        merged = d.maybe(0.5)

        def adapt(m: Any, x: Tensor) -> Tensor:
            if merged:
                return F.linear(x, m.base.weight + m.up @ m.down, m.base.bias)
            return m.base(x) + 2 * F.linear(F.linear(x, m.down), m.up)

        up = nn.Parameter(torch.zeros(out, 2)) if d.maybe(0.5) else parameter(out, 2)
        base = nn.Linear(width, out).requires_grad_(False)
        return Op(adapt, base=base, up=up, down=parameter(2, width))
    if kind == "generated":
        make = parameter(3, out * width)
        return Op(lambda m, x: F.linear(x, (m.code @ m.make).view(out, width)), code=parameter(3), make=make)
    if kind == "flat":
        size = out * width
        return Op(lambda m, x: F.linear(x, m.flat[:size].view(out, width), m.flat[size:]), flat=parameter(size + out))
    mask = (torch.rand(out, width) > 0.4).to(x.dtype)
    return Op(lambda m, x: torch.tanh(F.linear(x, m.w * mask)), w=parameter(out, width))


@part("vector sequence")
def parameter_hook(d: Draw, x: Tensor) -> nn.Module:
    """Masked fine-tuning."""
    layer = nn.Linear(x.shape[-1], d.randint(2, 6))
    mask = torch.rand(layer.weight.shape) > 0.5
    layer.weight.register_hook(lambda grad: grad * mask)
    return Op(lambda m, x: torch.tanh(m.a(x)), a=layer)


@part("vector sequence")
def tensor_hook(d: Draw, x: Tensor) -> nn.Module:
    module = Op(hooked, a=nn.Linear(x.shape[-1], x.shape[-1]), on=d.maybe(0.5))
    d.changes.append(lambda: setattr(module, "on", True))
    return module


def hooked(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(m.a(x))
    if m.on and y.requires_grad:
        y.register_hook(lambda grad: 3 * grad)
    return y


@part("vector sequence")
def module_hook(d: Draw, x: Tensor) -> nn.Module:
    """Hooks on a module: one that changes what comes out, or what goes back."""
    layer = nn.Linear(x.shape[-1], x.shape[-1])
    kind = d.choice(["forward", "pre", "backward"])
    if kind == "forward":
        layer.register_forward_hook(lambda m, inputs, y: torch.tanh(y) + inputs[0])
    elif kind == "pre":
        layer.register_forward_pre_hook(lambda m, inputs: (torch.sin(inputs[0]),))
    else:
        layer.register_full_backward_hook(lambda m, before, after: tuple(None if g is None else 2 * g for g in before))
    return Op(lambda m, x: torch.tanh(m.a(x)), a=layer)


@part("vector sequence image", weight=0.5)
def custom_function(d: Draw, x: Tensor) -> nn.Module:
    function = d.choice([Sine, Straight])
    return Op(lambda m, x: function.apply(x))


@part("vector sequence")
def custom_linear(d: Draw, x: Tensor) -> nn.Module:
    return Op(lambda m, x: FusedLinear.apply(x, m.w), w=parameter(d.randint(2, 5), x.shape[-1]))


class FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2)


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@part("vector sequence", weight=0.4, fate=RIGHT_OR_REFUSED)
def complex_parameters(d: Draw, x: Tensor) -> nn.Module:
    """A spectral filter."""
    weight = nn.Parameter(torch.randn(x.shape[-1] // 2 + 1, dtype=x.dtype.to_complex()))
    return Op(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w, n=x.shape[-1]), w=weight)


@part("vector sequence")
def vectorised(d: Draw, x: Tensor) -> nn.Module:
    """torch.func within forward."""
    w = parameter(x.shape[-1], x.shape[-1])
    if d.maybe(0.5):
        return Op(lambda m, x: torch.func.vmap(lambda row: torch.tanh(row @ m.w))(x), w=w)
    return Op(lambda m, x: torch.func.vmap(torch.func.grad(lambda row: torch.tanh(row @ m.w).square().sum()))(x), w=w)


@part("vector sequence")
def inner_gradient(d: Draw, x: Tensor) -> nn.Module:
    """The forces of a learned energy."""

    def forces(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone() if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad((torch.tanh(x @ m.w) * x).sum(), x, create_graph=True)[0]

    return Op(forces, w=parameter(x.shape[-1], x.shape[-1]))


@part("vector sequence")
def product(d: Draw, x: Tensor) -> nn.Module:
    if d.maybe(0.5):
        return Op(lambda m, x: m.a(x, torch.tanh(x)), a=nn.Bilinear(x.shape[-1], x.shape[-1], d.randint(2, 4)))
    return Op(lambda m, x: F.silu(m.a(x)) * m.b(x), a=nn.Linear(x.shape[-1], 3), b=nn.Linear(x.shape[-1], 3))


@part("vector sequence image")
def reordered(d: Draw, x: Tensor) -> nn.Module:
    """Operators without parameters."""
    kinds: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: x.cumsum(dim=1),
        lambda m, x: x.sort(dim=-1).values,
        lambda m, x: x.flip(1) + torch.where(x > 0, x, 0.1 * x),
        lambda m, x: F.normalize(x, dim=1),
        lambda m, x: x.softmax(dim=-1).clamp(min=0.1),
        lambda m, x: torch.stack(x.unbind(1)[::-1], dim=1),
        lambda m, x: x.topk(2, dim=-1).values,
    ]
    return Op(d.choice(kinds)) if d.maybe(0.7) else nn.PReLU()


@part("vector sequence")
def einsum(d: Draw, x: Tensor) -> nn.Module:
    w, scale = parameter(x.shape[-1], d.randint(2, 5)), parameter(1)
    return Op(lambda m, x: torch.einsum("n...d,de->n...e", torch.tanh(x), m.w) * m.scale.exp(), w=w, scale=scale)


@part("vector sequence")
def in_place(d: Draw, x: Tensor) -> nn.Module:
    def change(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y.add_(m.scale).mul_(2)
        y[..., :1] += 0.5 * x[..., :1]
        return y.tanh_()

    return Op(change, a=nn.Linear(x.shape[-1], x.shape[-1]), scale=parameter(x.shape[-1]))


@part("vector sequence", weight=2)
def routed(d: Draw, x: Tensor) -> nn.Module:
    """Top-1 mixture of experts: each expert sees the tokens that are sent to it, from whatever examples."""
    width, count = x.shape[-1], d.randint(2, 3)
    with_hook = d.maybe(0.2)
    experts = nn.ModuleList(
        Op(hooked, a=nn.Linear(width, width), on=True) if with_hook and e == 1 else nn.Linear(width, width)
        for e in range(count)
    )
    ordered, act = d.maybe(0.5), activation(d)

    def route(m: Any, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, width)
        gate, chosen = m.router(tokens).softmax(dim=-1).max(dim=-1)
        places = [(chosen == e).nonzero().squeeze(1) for e in range(count)]
        parts = [act(expert(tokens[at])) for expert, at in zip(m.experts, places, strict=True)]
        if ordered:
            out = torch.cat(parts)[torch.cat(places).argsort()]
        else:
            out = torch.zeros_like(tokens)
            for at, part in zip(places, parts, strict=True):
                out = out.index_add(0, at, part.to(out.dtype))
        return (out * gate[:, None]).view(x.shape)

    return Op(route, router=nn.Linear(width, count), experts=experts)


@part("vector sequence")
def folded(d: Draw, x: Tensor) -> nn.Module:
    """Heads or windows in the batch dimension, behind the examples or before them."""
    heads, width, first = d.randint(2, 3), x.shape[-1], d.maybe(0.5)

    def fold(m: Any, x: Tensor) -> Tensor:
        y = m.split(x).unflatten(-1, (heads, -1)).movedim(-2, 1 if first else 0)
        shape = y.shape
        y = torch.tanh(m.norm(m.a(y.reshape(-1, *shape[2:])))).view(*shape[:-1], -1)
        return y.movedim(1 if first else 0, -2).flatten(-2)

    return Op(fold, split=nn.Linear(width, 2 * heads), a=nn.Linear(2, 3), norm=nn.LayerNorm(3))


# -- sequences --------------------------------------------------------------------------------------------------------


@part("sequence", weight=3)
def attention(d: Draw, x: Tensor) -> nn.Module:
    width, heads, kind = x.shape[-1], d.choice([1, 2]), d.choice(["by hand", "fused", "module", "encoder", "masked"])
    if kind in ("module", "encoder") and width % heads == 0:
        first = d.maybe(0.5)
        if kind == "module":
            inner: nn.Module = nn.MultiheadAttention(width, heads, batch_first=first)
            call = lambda m, y: m.a(y, y, y, need_weights=heads == 2)[0]  # noqa: E731
        else:
            inner = nn.TransformerEncoderLayer(width, heads, 5, dropout=0.0, batch_first=first, norm_first=d.maybe(0.5))
            call = lambda m, y: m.a(y)  # noqa: E731
        return Op(lambda m, x: call(m, x) if first else call(m, x.transpose(0, 1)).transpose(0, 1), a=inner)
    causal = d.maybe(0.5)

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in m.qkv(x).chunk(3, dim=-1))
        if kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if kind == "masked":
                scores = scores.masked_fill(~kept(x)[:, None, None], -torch.inf)
            y = scores.softmax(dim=-1) @ v
        return m.out(y.transpose(1, 2).flatten(2))

    return Op(attend, qkv=nn.Linear(width, 6 * heads), out=nn.Linear(2 * heads, width))


@part("sequence", weight=2)
def recurrent(d: Draw, x: Tensor) -> nn.Module:
    first, packed = d.maybe(0.5), d.maybe(0.5)
    kind = d.choice([nn.RNN, nn.LSTM, nn.GRU])
    layer = kind(
        x.shape[-1], d.randint(2, 4), num_layers=d.randint(1, 2), batch_first=first, bidirectional=d.maybe(0.3)
    )

    def run(m: Any, x: Tensor) -> Tensor:
        y = x if first else x.transpose(0, 1)
        if packed:
            y = rnn.pack_padded_sequence(y, lengths(x).cpu(), batch_first=first, enforce_sorted=False)
            y = rnn.pad_packed_sequence(m.a(y)[0], batch_first=first, total_length=x.shape[1])[0]
        else:
            y = m.a(y)[0]
        return y if first else y.transpose(0, 1)

    return Op(run, a=layer)


@part("sequence", weight=3)
def unpadded(d: Draw, x: Tensor) -> nn.Module:
    """Tokens that are no padding, gathered from all examples and scattered back."""
    width, way = x.shape[-1], d.choice(["assign", "masked_scatter", "index_add"])

    def gather(m: Any, x: Tensor) -> Tensor:
        keep = kept(x)
        y = m.b(torch.tanh(m.norm(m.a(x[keep]))))
        if way == "assign":
            out = torch.zeros_like(x, dtype=y.dtype)
            out[keep] = y
            return out
        if way == "masked_scatter":
            return torch.zeros_like(x, dtype=y.dtype).masked_scatter(keep[..., None].expand_as(x), y)
        at = keep.flatten().nonzero().squeeze(1)
        return torch.zeros_like(x, dtype=y.dtype).flatten(0, 1).index_add(0, at, y).view(x.shape)

    return Op(gather, a=nn.Linear(width, 4), norm=nn.LayerNorm(4), b=nn.Linear(4, width))


@part("sequence", weight=2)
def trimmed(d: Draw, x: Tensor) -> nn.Module:
    """As long as the longest of the batch, sequence first."""
    width = x.shape[-1]

    def trim(m: Any, x: Tensor) -> Tensor:
        longest = int(lengths(x).max())
        y = torch.tanh(m.norm(m.a(x[:, :longest].transpose(0, 1))))
        if m.scale is not None:
            y = y * m.scale
        y = y.transpose(0, 1) * (torch.arange(longest) < lengths(x)[:, None])[..., None]
        return F.pad(y, (0, 0, 0, x.shape[1] - longest))

    scale = parameter(width) if d.maybe(0.5) else None
    return Op(trim, a=nn.Linear(width, width), norm=nn.LayerNorm(width), scale=scale)


@part("sequence")
def conv1d(d: Draw, x: Tensor) -> nn.Module:
    width, groups = x.shape[-1], d.choice([1, x.shape[-1]])
    size = d.randint(1, 3)
    kind = d.choice([nn.Conv1d, nn.Conv1d, nn.ConvTranspose1d])
    layer = kind(width, width * d.randint(1, 2), size, stride=d.randint(1, 2), padding=size // 2, groups=groups)
    return Op(lambda m, x: torch.tanh(m.a(x.transpose(1, 2))).transpose(1, 2), a=layer)


@part("sequence")
def positions(d: Draw, x: Tensor) -> nn.Module:
    if d.maybe(0.5):
        return Op(lambda m, x: x + m.places, places=parameter(1, *x.shape[1:]))
    return Op(lambda m, x: x + m.places(torch.arange(x.shape[1])), places=nn.Embedding(9, x.shape[2]))


@part("sequence")
def mixer(d: Draw, x: Tensor) -> nn.Module:
    return Op(lambda m, x: torch.tanh(m.a(x.mT)).mT, a=nn.Linear(x.shape[1], d.randint(2, 5)))


@part("sequence")
def sequence_first(d: Draw, x: Tensor) -> nn.Module:
    def turn(m: Any, x: Tensor) -> Tensor:
        y = m.a(x.transpose(0, 1).contiguous()).flatten(0, 1)
        return torch.tanh(m.b(y)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)

    return Op(turn, a=nn.Linear(x.shape[-1], 3), b=nn.Linear(3, 4))


@part("sequence", weight=0.5)
def pooled_sequence(d: Draw, x: Tensor) -> nn.Module:
    kinds = [lambda m, x: x.mean(dim=1), lambda m, x: x[:, -1], lambda m, x: x.amax(dim=1), lambda m, x: x.flatten(1)]
    return Op(d.choice(kinds))


# -- images -----------------------------------------------------------------------------------------------------------


@part("image", weight=4)
def convolution(d: Draw, x: Tensor) -> nn.Module:
    channels, side = x.shape[1], min(x.shape[2:])
    kind = d.choice([nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d])
    groups = d.choice([1, 1, channels])
    stride, size = d.randint(1, 2), (d.randint(1, 3), d.randint(1, 3))
    dilation = d.randint(1, 2) if side >= 5 or kind is nn.ConvTranspose2d else 1
    options: dict[str, Any] = {"stride": stride, "padding": (size[0] // 2, size[1] // 2), "dilation": dilation}
    if kind is nn.Conv2d and d.maybe(0.3) and side > 2:
        options["padding_mode"] = d.choice(["circular", "reflect", "replicate"])
    layer = kind(channels, channels * d.randint(1, 2), size, groups=groups, bias=d.maybe(0.7), **options)
    last, act = d.maybe(0.3), activation(d)
    return Op(lambda m, x: act(m.a(x.contiguous(memory_format=torch.channels_last) if last else x)), a=layer)


@part("image")
def conv3d(d: Draw, x: Tensor) -> nn.Module:
    kind = d.choice([nn.Conv3d, nn.ConvTranspose3d])
    layer = kind(1, 2, (d.randint(1, 2), 2, 1), stride=(1, d.randint(1, 2), 1), padding=(0, 1, 0))
    return Op(lambda m, x: torch.tanh(m.a(x.unsqueeze(1))).flatten(1, 2), a=layer)


@part("image", weight=2)
def image_norm(d: Draw, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    kinds = [nn.BatchNorm2d(channels), nn.GroupNorm(d.choice([1, channels]), channels)]
    if x[0, 0].numel() > 1:
        # Not with running statistics: PyTorch's own gradient is wrong for one example, channels last (2.14).
        kinds.append(nn.InstanceNorm2d(channels, affine=True))
    return d.choice(kinds)


@part("image")
def gated_channels(d: Draw, x: Tensor) -> nn.Module:
    channels = x.shape[1]

    def gate(m: Any, x: Tensor) -> Tensor:
        weights = torch.sigmoid(m.b(torch.tanh(m.a(x.mean(dim=(2, 3))))))
        return x * weights[:, :, None, None] * m.scale

    return Op(gate, a=nn.Linear(channels, 2), b=nn.Linear(2, channels), scale=parameter(channels, 1, 1))


@part("image")
def resized(d: Draw, x: Tensor) -> nn.Module:
    kinds: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: F.adaptive_avg_pool2d(x, 2),
        lambda m, x: F.interpolate(x, size=(3, 4), mode="bilinear"),
        lambda m, x: x.roll((1, 1), (2, 3)),
        lambda m, x: F.max_pool2d(x, 2, stride=1, padding=1),
        lambda m, x: F.fold(F.unfold(x, 2), x.shape[2:], 2),
    ]
    return Op(d.choice(kinds))


@part("image", weight=0.7)
def image_to_sequence(d: Draw, x: Tensor) -> nn.Module:
    return Op(lambda m, x: x.flatten(2).transpose(1, 2) if x.shape[2] * x.shape[3] < 17 else x.mean(3).transpose(1, 2))


@part("image", weight=0.5)
def pooled_image(d: Draw, x: Tensor) -> nn.Module:
    return Op(d.choice([lambda m, x: x.mean(dim=(2, 3)), lambda m, x: x.flatten(1)]))
