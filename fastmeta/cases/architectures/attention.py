"""Attention in its many forms, over tokens [N, S, I]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.architectures.small import small

TOKENS, INPUTS, WIDTH, HEADS = 4, 3, 4, 2


class Encoder(nn.Module):
    """A `TransformerEncoderLayer` between a linear embedding and a linear head."""

    def __init__(self, norm_first: bool, activation: str) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 6, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Decoder(nn.Module):
    """A `TransformerDecoderLayer`: learned queries attend to each other, causally, and to the
    tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, WIDTH))
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        causal = torch.ones(2, 2, dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.layer(queries, self.embed(x), tgt_mask=causal))[..., 0]


class Padded(nn.Module):
    """Token ids, of which 0 is padding that nothing attends to."""

    def __init__(self, vocabulary: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.begin = nn.Parameter(torch.randn(WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = torch.cat([self.begin.expand(len(ids), 1, -1), self.embedding(ids)], 1)
        padding = F.pad(ids == 0, (1, 0))  # the first token is always there
        attended, _ = self.attention(tokens, tokens, tokens, key_padding_mask=padding)
        return self.head(attended[:, 0])


class Causal(nn.Module):
    """`MultiheadAttention` with a causal mask, its weights read too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        attended, weights = self.attention(tokens, tokens, tokens, attn_mask=mask)
        return self.head(attended + weights.sum(-2, keepdim=True).transpose(1, 2))


class Ranker(nn.Module):
    """A question of token ids and passages of features, by attention from one to the other; what a
    passage's length leaves out is masked."""

    def __init__(self, vocabulary: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.passage = nn.Linear(INPUTS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor, passage: Tensor, length: Tensor) -> Tensor:
        places = torch.arange(1, passage.shape[1] + 1, device=ids.device)
        keys = self.passage(passage)
        hidden = places > length.abs() + 1  # the first is always there
        attended, _ = self.attention(self.embedding(ids), keys, keys, key_padding_mask=hidden)
        return self.head(attended.mean(1))


class SelfAttention(nn.Module):
    """Projections to heads and back; what happens between is a subclass's own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(INPUTS, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return self.out(self.mix(q, k, v).transpose(1, 2).reshape(n, tokens, WIDTH))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[N, heads, S, D] -> [N, heads, S, D]."""
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return scores.softmax(-1) @ v


class Fused(SelfAttention):
    """By PyTorch's own function, causal."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Linear(SelfAttention):
    """Without softmax, by sums of outer products (Katharopoulos et al., 2020)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("nhsd,nhse->nhde", k, v)
        norm = torch.einsum("nhsd,nhd->nhs", q, k.sum(2))
        return torch.einsum("nhsd,nhde->nhse", q, state) / norm[..., None]


class Alibi(SelfAttention):
    """Scores less the distance, a slope a head, causal (Press et al., 2022)."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at
        scores = q @ k.mT / q.shape[-1] ** 0.5 - self.slopes[:, None, None] * distance
        return scores.masked_fill(distance < 0, float("-inf")).softmax(-1) @ v


class Rotary(SelfAttention):
    """Queries and keys turned by their positions (Su et al., 2021)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[-1] // 2
        frequencies = 100.0 ** (-torch.arange(half, dtype=q.dtype, device=q.device) / half)
        angles = torch.arange(q.shape[2], dtype=q.dtype, device=q.device)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()

        def turned(x: Tensor) -> Tensor:
            a, b = x[..., :half], x[..., half:]
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        return super().mix(turned(q), turned(k), v)


class Perceiver(nn.Module):
    """Learned latents that attend to the tokens, then to themselves (Jaegle et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(2, WIDTH))
        self.norm = nn.LayerNorm(INPUTS)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, kdim=INPUTS, vdim=INPUTS, batch_first=True)
        self.own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        latents, x = self.latents.expand(len(x), -1, -1), self.norm(x)
        latents = latents + self.cross(latents, x, x, need_weights=False)[0]
        latents = latents + self.own(latents, latents, latents, need_weights=False)[0]
        return self.head(latents.mean(1))


class RmsNorm(nn.Module):
    """Scaled to a mean square of one, in plain tensor code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    """RMS norms, causal attention with fewer keys than queries, SwiGLU (Touvron et al., 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = RmsNorm(WIDTH), RmsNorm(WIDTH)
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = nn.Linear(WIDTH, 2, bias=False), nn.Linear(WIDTH, 2, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 6, bias=False), nn.Linear(WIDTH, 6, bias=False)
        self.down = nn.Linear(6, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        h = self.attention_norm(x)
        q = self.wq(h).view(n, tokens, HEADS, 2).transpose(1, 2)
        k, v = (w(h).view(n, tokens, 1, 2).transpose(1, 2).expand_as(q) for w in (self.wk, self.wv))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        h = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Gpt(nn.Module):
    """Token ids with learned positions through a Llama block, to logits by the embedding."""

    def __init__(self, vocabulary: int = 5) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.block = LlamaBlock()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.block(self.tokens(ids) + self.positions(positions))
        return self.norm(x[:, -1]) @ self.tokens.weight.T


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, an encoder layer (Dosovitskiy et al.,
    2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 6, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


class Fnet(nn.Module):
    """Fourier transforms in place of attention (Lee-Thorp et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(INPUTS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(F.gelu(self.norm(x + torch.fft.fft2(x).real)).mean(1))


class ShiftedWindows(SelfAttention):
    """Attention within windows of two tokens that are shifted by one (Liu et al., "Swin", 2021)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        windows = [part.roll(-1, 2).unflatten(2, (-1, 2)) for part in (q, k, v)]
        scores = torch.einsum("nhwid,nhwjd->nhwij", windows[0], windows[1])
        return torch.einsum("nhwij,nhwjd->nhwid", scores.softmax(-1), windows[2]).flatten(2, 3).roll(1, 2)


_TOKENS = (TOKENS, INPUTS)

CASES = (
    small("encoder_post_norm", lambda: Encoder(False, "relu"), _TOKENS, kinks=True),
    small("encoder_pre_norm", lambda: Encoder(True, "gelu"), _TOKENS, loss="ce"),
    small("decoder", Decoder, _TOKENS, kinks=True),
    small("padded_attention", Padded, (4,), loss="ce", ids=6),
    small("ranker", Ranker, (3,), ids=6, more_inputs=(_TOKENS, (1,))),
    small("causal_attention", Causal, _TOKENS),
    small("attention_by_hand", SelfAttention, _TOKENS),
    small("fused_attention", Fused, _TOKENS),
    small("linear_attention", Linear, _TOKENS, kinks=True),
    small("alibi", Alibi, _TOKENS),
    small("rotary", Rotary, _TOKENS),
    small("perceiver", Perceiver, _TOKENS),
    small("llama_block", LlamaBlock, (TOKENS, WIDTH)),
    small("gpt", Gpt, (TOKENS,), loss="ce", ids=5),
    small("fnet", Fnet, _TOKENS),
    small("shifted_windows", ShiftedWindows, _TOKENS),
    small("vision_transformer", VisionTransformer, (1, 4, 4), loss="ce"),
)
