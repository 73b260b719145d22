"""A masked autoencoder (MAE) with a Vision Transformer (ViT), from pixels to loss.

Input: images (B, 3, H, W), scaled to -1..1. Output: the mean squared error of the predicted pixels
over the masked patches. The steps are those of figure 1 in the MAE paper. This file follows them
from top to bottom:

    images -> patches -> tokens -> visible tokens -> encoder -> decoder -> pred
              cut up     embed,    mask 75 % of               mask tokens  compared with the
                         position  them at random             in the gaps  masked patches

    B  images in a batch            D   width of the encoder
    N  patches in an image          D'  width of the decoder
    K  visible patches              T   tokens in a sequence
    p  side of a patch in pixels    h   attention heads

Names in the authors' code (github.com/facebookresearch/mae) and here:
    random_masking  PatchShuffle        decoder_embed           Decoder.embed
    ids_keep        ids_shuffle[:, :K]  decoder_blocks          Decoder.blocks
    forward_loss    MAEViT.loss         decoder_pred            Decoder.head
                                        get_2d_sincos_pos_embed sine_cosine

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    ViT   Dosovitskiy et al. 2020, An Image Is Worth 16x16 Words, arXiv 2010.11929

Differences from the MAE paper that are common for small images: position embeddings are learned,
queries, keys and values have no bias, and there is no LayerNorm between the decoder's blocks and
its head. If encoder and decoder have the same width, there is no linear layer between them. Two
choices are our own: the frequencies of the initial position embeddings fit a small grid, and the
weights of the decoder's head start small.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ------------------------------------------------------------------------------ patches


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: (B, C, H, W) -> (B, N, C*p*p), N = (H/p) * (W/p).

    Patches are in order row by row; inside a patch: channel, then y, then x (ViT, section 3.1).
    Raises ValueError if there are not four dimensions or the patch size does not divide H and W.
    """
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"patch size {p} does not divide an image of {H} x {W} pixels")
    grid = images.reshape(B, C, H // p, p, W // p, p)       # (B, C, rows, y, columns, x)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put the patches of square RGB images together again: (B, N, 3*p*p) -> (B, 3, H, W).

    Raises ValueError if N is not a square number or a patch does not have 3*p*p values.
    """
    B, N, values = patches.shape
    p, side = patch_size, math.isqrt(N)
    if side * side != N or values != 3 * p * p:
        raise ValueError(f"{N} patches of {values} values are not a square RGB image in patches "
                         f"of {p} x {p} pixels")
    grid = patches.reshape(B, side, side, 3, p, p)          # (B, rows, columns, C, y, x)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, side * p, side * p)


def mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of each patch's values: (B, N, 3*p*p) -> two (B, N, 1)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Subtract each patch's own mean and divide by its own std (MAE, section 3, "Reconstruction
    target"): (B, N, 3*p*p) -> the same shape."""
    mean, std = mean_and_std(patches)
    return (patches - mean) / std


def denormalize_patches(normalized: Tensor, patches: Tensor) -> Tensor:
    """The inverse, given the original `patches`: (B, N, 3*p*p) each -> the same shape."""
    mean, std = mean_and_std(patches)
    return normalized * std + mean


# ------------------------------------------------------------------------------ masking


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Row b of the result is tokens[b, ids[b]]: (B, N, D), (B, M) -> (B, M, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class PatchShuffle(nn.Module):
    """Random masking by shuffling (MAE, section 3, "Simple implementation").

    The tokens of each image are shuffled. The first K = round(N * (1 - mask_ratio)) stay visible,
    the other N - K are masked. The class token is not among them. The methods raise ValueError if
    all tokens would be masked, or none.
    """

    def __init__(self, mask_ratio: float) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio

    def count_visible(self, N: int, mask_ratio: float | None = None) -> int:
        """K, the number of visible tokens out of N. mask_ratio: replaces the module's own."""
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        K = round(N * (1 - ratio))
        if not 0 < K < N:
            kind = "visible" if K <= 0 else "masked"
            raise ValueError(f"a ratio of {ratio} leaves no {kind} patch out of {N}")
        return K

    def forward(self, tokens: Tensor, noise: Tensor | None = None,
                mask_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> visible (B, K, D), ids_restore (B, N), mask (B, N): 1 masked, 0 visible.

        noise: (B, N), uniform. Its order is the shuffle: the same noise masks the same tokens.
        """
        B, N, _ = tokens.shape
        K = self.count_visible(N, mask_ratio)
        if noise is None:
            noise = torch.rand(B, N, device=tokens.device)
        ids_shuffle = noise.argsort(dim=1)                  # (B, N) place -> token
        ids_restore = ids_shuffle.argsort(dim=1)            # (B, N) token -> place, the inverse
        visible = take(tokens, ids_shuffle[:, :K])          # (B, K, D)
        mask = (ids_restore >= K).float()                   # (B, N)
        return visible, ids_restore, mask


# ------------------------------------------------------------------------------ transformer


class Attention(nn.Module):
    """Multi-head self-attention (ViT, appendix A): softmax(q k^T / sqrt(D/h)) v.

    (B, T, D) -> (B, T, D). Raises ValueError if dim is not divisible by heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"a width of {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> q, k and v, stacked: (3, B, h, T, D/h)."""
        B, T, D = tokens.shape
        return self.qkv(tokens).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """How much each token attends to every token: (B, h, T, T), rows sum to 1.

        The softmax is in float32: more precise, and on a CPU faster than in bf16 for few tokens.
        """
        scale = q.shape[-1] ** -0.5
        scores = (q * scale) @ k.transpose(-2, -1)          # (B, h, T, T)
        return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T, D = tokens.shape
        q, k, v = self.split_heads(tokens)                  # each (B, h, T, D/h)
        if q.device.type == "cpu":                          # faster there, above all in bf16
            mixed = self.weights(q, k) @ v
        else:                                               # the same without storing (T, T)
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(B, T, D))    # mixed is (B, h, T, D/h)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside (ViT, section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """A pre-norm transformer block (ViT, equations 2 and 3): (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


# ------------------------------------------------------------------------------ encoder


class PatchEmbed(nn.Module):
    """One linear layer on the pixels of a patch (ViT, equation 1): (B, N, 3*p*p) -> (B, N, D).

    `proj` is a convolution with stride p, as in timm, so that weights can be exchanged. Applied to
    patches that are already cut out, it is a matrix product.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def sine_cosine(N: int, D: int) -> Tensor:
    """The initial position embeddings of N patches, (N, D): sines and cosines of each patch's row,
    then of its column (Vaswani et al. 2017, arXiv 1706.03762, section 3.5; MAE, appendix A.1).

    The original frequencies, made for long texts, fall from 1 to 1/10,000. Ours fall from 1 to
    about 1/side (side: patches in a row), since slower waves hardly change from patch to patch.
    """
    side, waves = math.isqrt(N), D // 4
    frequencies = side ** (-torch.arange(waves) / max(waves, 1))    # (D/4,)
    angles = torch.arange(side)[:, None] * frequencies      # (side, D/4)
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    rows = codes[:, None].expand(-1, side, -1)              # (side, side, D/2)
    columns = codes[None].expand(side, -1, -1)              # (side, side, D/2)
    positions = torch.cat([rows, columns], dim=2).flatten(0, 1)     # (N, 4 * waves)
    return F.pad(positions, (0, D - 4 * waves))             # zeros if D is not divisible by 4


def initialize(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases (MAE, appendix A.1); class and mask tokens from a
    normal distribution with standard deviation 0.02, as in the authors' code."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))    # the convolution as a linear layer
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in module.named_parameters():
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


class Encoder(nn.Module):
    """A ViT that sees only the tokens that it is given (MAE, section 3, "MAE encoder").

    Raises ValueError if the sizes do not fit together.
    """

    def __init__(self, image_size: int = 32, patch_size: int = 2, dim: int = 192,
                 depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        if min(image_size, patch_size, dim, depth) < 1:
            raise ValueError("image size, patch size, width and depth must be at least 1")
        if image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide an image of "
                             f"{image_size} x {image_size} pixels")
        self.image_size, self.patch_size = image_size, patch_size
        self.dim, self.depth, self.heads = dim, depth, heads
        self.num_patches = (image_size // patch_size) ** 2  # N
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sine_cosine(self.num_patches, dim)      # (N, D), without the class token
        self.pos_embed = nn.Parameter(positions[None])      # (1, N, D)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        initialize(self)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, 3*p*p). Raises ValueError if the images have another size."""
        size = self.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
        return patchify(images, self.patch_size)

    def embed(self, patches: Tensor) -> Tensor:
        """Embed all patches and add their positions: (B, N, 3*p*p) -> (B, N, D)."""
        return self.patch_embed(patches) + self.pos_embed

    def add_class_token(self, tokens: Tensor) -> Tensor:
        """(B, K, D) -> (B, 1 + K, D)."""
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embedded patches (B, K, D) -> latent (B, 1 + K, D), the class token first."""
        tokens = self.add_class_token(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The attention weights of every block on whole images: (B, h, 1 + N, 1 + N) each."""
        tokens, maps = self.add_class_token(self.embed(self.patchify(images))), []
        for block in self.blocks:
            q, k, _ = block.attn.split_heads(block.norm1(tokens))
            maps.append(block.attn.weights(q, k))
            tokens = block(tokens)
        return maps


# ------------------------------------------------------------------------------ decoder


class Decoder(nn.Module):
    """From the encoded visible patches to all pixels (MAE, section 3, "MAE decoder")."""

    def __init__(self, encoder_dim: int, num_patches: int, patch_size: int, dim: int = 192,
                 depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        if min(dim, depth) < 1:
            raise ValueError("decoder width and depth must be at least 1")
        self.embed = nn.Identity() if dim == encoder_dim else nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = F.pad(sine_cosine(num_patches, dim), (0, 0, 1, 0))  # zeros: the class token
        self.pos_embed = nn.Parameter(positions[None])      # (1, 1 + N, D')
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, 3 * patch_size ** 2)
        initialize(self)
        nn.init.normal_(self.head.weight, std=0.02)         # otherwise the first loss is large

    def fill_gaps(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Append a mask token for each masked patch and put all tokens back in image order:
        (B, 1 + K, D), (B, N) -> (B, 1 + N, D')."""
        B, N = ids_restore.shape
        tokens = self.embed(latent)                         # (B, 1 + K, D'), in bf16 under autocast
        cls, visible = tokens[:, :1], tokens[:, 1:]         # (B, 1, D'), (B, K, D')
        gaps = self.mask_token.to(tokens.dtype).expand(B, N - visible.shape[1], -1)
        shuffled = torch.cat([visible, gaps], dim=1)        # (B, N, D')
        return torch.cat([cls, take(shuffled, ids_restore)], dim=1)     # in image order

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """(B, 1 + K, D), (B, N) -> pred (B, N, 3*p*p), in image order."""
        tokens = self.fill_gaps(latent, ids_restore) + self.pos_embed   # (B, 1 + N, D')
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 1:])                     # without the class token


# ------------------------------------------------------------------------------ autoencoder


class MAEViT(nn.Module):
    """The masked autoencoder (MAE, figure 1). Raises ValueError if the sizes do not fit together.

    norm_pix_loss: predict normalized patches, not pixels (MAE, section 3, "Reconstruction target").
    """

    def __init__(self, image_size: int = 32, patch_size: int = 2, dim: int = 192,
                 depth: int = 12, heads: int = 3, decoder_dim: int = 192, decoder_depth: int = 4,
                 decoder_heads: int = 3, mask_ratio: float = 0.75,
                 norm_pix_loss: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder(image_size, patch_size, dim, depth, heads)
        self.decoder = Decoder(dim, self.encoder.num_patches, patch_size, decoder_dim,
                               decoder_depth, decoder_heads)
        self.shuffle = PatchShuffle(mask_ratio)
        self.shuffle.count_visible(self.encoder.num_patches)    # raises if the ratio is impossible
        self.norm_pix_loss = norm_pix_loss

    def forward(self, images: Tensor, noise: Tensor | None = None,
                mask_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W), noise (B, N) -> loss (), pred (B, N, 3*p*p), mask (B, N).
        mask_ratio: replaces the model's own."""
        patches = self.encoder.patchify(images)             # (B, N, 3*p*p)
        tokens = self.encoder.embed(patches)                # (B, N, D)
        visible, ids_restore, mask = self.shuffle(tokens, noise, mask_ratio)
        # visible (B, K, D), ids_restore (B, N), mask (B, N)
        latent = self.encoder(visible)                      # (B, 1 + K, D)
        pred = self.decoder(latent, ids_restore)            # (B, N, 3*p*p)
        return self.loss(patches, pred, mask), pred, mask

    def loss(self, patches: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """The mean squared error over the masked patches only (MAE, section 3)."""
        target = normalize_patches(patches) if self.norm_pix_loss else patches
        error = (pred.float() - target).square().mean(dim=-1)   # (B, N)
        return (error * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------ classifier


class ViTClassifier(Encoder):
    """An encoder with the sizes and weights of another one, and a linear head. The parameters have
    the names and shapes that timm's VisionTransformer gives them.

    pool: the head reads the encoded class token ("cls"), or the mean over the encoded patches
    ("mean"; MAE, appendix A.1). patch_dropout: if noise is given, as in training, this share of the
    patches is dropped (PatchDropout, Liu et al. 2022, arXiv 2208.07220), which is faster and
    regularizes. Without noise no patch is dropped. Raises ValueError if the pool is unknown or the
    dropout is not 0 and leaves no patch or drops none.
    """

    def __init__(self, encoder: Encoder, num_classes: int = 10, pool: str = "cls",
                 patch_dropout: float = 0.0) -> None:
        super().__init__(encoder.image_size, encoder.patch_size, encoder.dim, encoder.depth,
                         encoder.heads)
        self.load_state_dict(encoder.state_dict())
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", not {pool!r}')
        self.pool = pool
        self.head = nn.Linear(self.dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.shuffle = PatchShuffle(patch_dropout) if patch_dropout else None
        if self.shuffle:
            self.shuffle.count_visible(self.num_patches)    # raises if no patch is left

    def features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), noise (B, N) or None -> (B, D): what the head reads."""
        tokens = self.embed(self.patchify(images))          # (B, N, D)
        if self.shuffle and noise is not None:
            tokens, _, _ = self.shuffle(tokens, noise)      # (B, K, D)
        latent = super().forward(tokens)                    # (B, 1 + K, D)
        return latent[:, 0] if self.pool == "cls" else latent[:, 1:].mean(dim=1)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), noise (B, N) or None -> logits (B, classes)."""
        return self.head(self.features(images, noise))
