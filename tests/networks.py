"""The networks that the engine is held against brute force on, small enough for that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from influence.companion.zoo import models


def image(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(5))


def tokens(count: int) -> Tensor:
    return torch.randint(0, 20, (count, 7), generator=torch.Generator().manual_seed(5))


class Bert(nn.Module):
    """An encoder as Hugging Face writes it: position and type embeddings, additive mask, heads by view and permute."""

    def __init__(self, classes: int, *, width: int = 12, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.word = nn.Embedding(20, width, padding_idx=0)
        self.position, self.kind = nn.Embedding(16, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> object:
        mask = torch.where(ids > 3, 0.0, -1e4).to(self.norm.weight.dtype)[:, None, None, :]
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.norm(self.word(ids) + self.kind(torch.zeros_like(ids)) + self.position(places))
        for layer in self.layers:
            x = layer(x, mask)

        class Output:
            logits = self.classifier(torch.tanh(self.pooler(x[:, 0])))

        return Output()


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.norm2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.split(f(x)) for f in (self.query, self.key, self.value))
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(dim=-1)
        mixed = (attention @ v).permute(0, 2, 1, 3).contiguous().flatten(2)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Gpt(nn.Module):
    """A decoder: Conv1D by addmm, causal attention by the fused kernel, RMSNorm, gated unit, last token's logits."""

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.norm, self.scale = nn.RMSNorm(width), nn.Parameter(torch.ones(width))
        self.attn, self.attn_bias = nn.Parameter(torch.randn(width, 3 * width)), nn.Parameter(torch.zeros(3 * width))
        self.gate, self.up = nn.Linear(width, 16, bias=False), nn.Linear(width, 16, bias=False)
        self.down, self.head = nn.Linear(16, width, bias=False), nn.Linear(width, classes, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        packed = torch.addmm(self.attn_bias, self.norm(x).view(-1, x.shape[-1]), self.attn).view(*x.shape[:2], -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in packed.split(x.shape[-1], dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))[:, -1]


class Encoder(nn.Module):
    """PyTorch's own encoder layer, sequence first, with a class token and learned positions."""

    def __init__(self, classes: int, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + self.places
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.layer(x)
        return self.head(x[:, 0] if self.batch_first else x[0])


class Recurrent(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 5), nn.LSTM(5, 6, batch_first=True, num_layers=2)
        self.head = nn.Linear(6, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class Tied(nn.Module):
    """The embedding is the output layer's weight, and one layer is called twice."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, 6)
        self.twice, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, classes)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids % self.embed.num_embeddings).mean(dim=1)
        return self.head(self.norm(torch.tanh(self.twice(torch.tanh(self.twice(x))))))


class Convolutions(nn.Module):
    """Every form of convolution and of normalisation."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, padding_mode="reflect", padding=1),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Conv2d(6, 12, 3, groups=6, padding=2, dilation=2),
            nn.Tanh(),
            nn.ConvTranspose2d(12, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2, dilation=2),
            nn.Tanh(),
            nn.Flatten(2),
            nn.Conv1d(2, 3, 5, stride=3),
            nn.BatchNorm1d(3),
            nn.Tanh(),
        )
        self.deep = nn.Sequential(nn.Conv3d(3, 2, (1, 3, 2), padding=(0, 1, 1)), nn.BatchNorm3d(2), nn.Tanh())
        self.plain, self.head = nn.Conv2d(2, 5, (2, 3)), nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)[..., :72].unflatten(2, (4, 3, 6))
        return self.head(torch.tanh(self.plain(self.deep(x)[:, :, 1])).flatten(1))


class Functional(nn.Module):
    """Parameters used functionally: slices, gathered biases, scales, scalars, einsum, and one that is not used."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.arange(12).remainder(9))
        self.weight, self.scalar = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.tensor(0.7))
        self.scale, self.unused = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(3))
        self.mixer = nn.Parameter(torch.randn(5, 4))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.conv2d(x, self.weight[:, :, None, None]) * self.scale)
        y = y.flatten(2).transpose(1, 2)[:, :12]
        bias = self.table[self.index].view(1, 12, 2).permute(0, 1, 2)
        y = torch.cat([y[..., :2] + bias, y[..., 2:] - self.scalar], dim=-1)
        y = torch.einsum("ntc,dc->ntd", torch.tanh(y), self.mixer)
        return self.head(torch.tanh(self.normed(torch.tanh(y.mean(dim=1)))))


def _vit(classes: int) -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 12, 20, num_classes=classes)


def _swin(classes: int) -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 12, [2, 2], [2, 3], [4, 4], num_classes=classes)


def _convnext(classes: int) -> nn.Module:
    blocks = [CNBlockConfig(12, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, num_classes=classes, layer_scale=0.5)


def _inception(classes: int) -> nn.Module:
    return torchvision.models.inception_v3(num_classes=classes, init_weights=False, aux_logits=False)


def _companion(name: str, width: float) -> Callable[[int], nn.Module]:
    return lambda classes: models.build(name, shape=(3, 16, 16), n_classes=classes, width=width)


# Builder for K classes, inputs for N examples.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], Tensor]]] = {
    "resnet50": (_companion("resnet50", 0.1), image(16)),
    "densenet121": (_companion("densenet121", 0.1), image(16)),
    "resnet18": (lambda k: torchvision.models.resnet18(num_classes=k), image(32)),
    "mobilenet_v3_small": (lambda k: torchvision.models.mobilenet_v3_small(num_classes=k), image(32)),
    "shufflenet_v2_x0_5": (lambda k: torchvision.models.shufflenet_v2_x0_5(num_classes=k), image(32)),
    "convnext": (_convnext, image(16)),
    "vit": (_vit, image(16)),
    "swin": (_swin, image(16)),
    "inception_v3": (_inception, image(75)),
    "bert": (Bert, tokens),
    "gpt": (Gpt, tokens),
    "encoder": (partial(Encoder, batch_first=False), lambda n: image(8, 5)(n)[..., 0].transpose(1, 2)),
    "lstm": (Recurrent, tokens),
    "tied": (Tied, tokens),
    "convolutions": (Convolutions, image(9)),
    "functional": (Functional, image(4)),
}


def build(name: str, classes: int, *, seed: int = 0) -> nn.Module:
    """A network in evaluation mode, float64, with normalisation that does something."""
    builder, inputs = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder(classes).train()
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            model(inputs(8))  # statistics of data, so that no signal vanishes on its way
        for norm in norms:
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
                for p in module.parameters(recurse=False):
                    nn.init.normal_(p, mean=0.5, std=0.3)
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.2)
    return model.double()


def inputs(name: str, count: int, dtype: torch.dtype) -> Tensor:
    x = NETWORKS[name][1](count)
    return x.to(dtype) if x.is_floating_point() else x
