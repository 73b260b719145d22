"""A masked autoencoder (MAE) with a Vision Transformer, from pixels to loss.

What goes in: images, (B, 3, H, W), scaled to -1..1. What comes out: the mean squared error of
the predicted pixels over the masked patches. In between, as in figure 1 of the MAE paper:

    images -> patchify -> PatchShuffle -> Encoder -> Decoder -> pred
              cut up      hide 75 %       visible    mask tokens  compare where hidden
                                          only       in the gaps

Read top to bottom: patches, shuffle, attention, block, encoder, decoder, MAEViT, classifier.

    B  images in a batch            D   width of the encoder
    N  patches in an image          D'  width of the decoder
    K  visible patches              T   tokens in a sequence
    p  side of a patch in pixels    h   attention heads

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    ViT   Dosovitskiy et al. 2020, An Image Is Worth 16x16 Words, arXiv 2010.11929

Departures from the MAE paper, usual at CIFAR's size: position embeddings learn; no LayerNorm stands
between the decoder's blocks and its head; queries, keys and values have no bias; where encoder and
decoder are of one width, no linear layer stands between them. Of our own: the sines and cosines
that the positions start from fit the small grid, and the decoder's head starts small.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ------------------------------------------------------------------------------ patches


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: (B, C, H, W) -> (B, N, C*p*p), N = (H/p) * (W/p).

    Patches follow row by row; inside a patch channel, then y, then x (ViT, section 3.1).
    Raises ValueError where the patch size does not divide the image.
    """
    p = patch_size
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), not {tuple(images.shape)}")
    B, C, H, W = images.shape
    if p < 1 or H % p or W % p:
        raise ValueError(f"patch size {p} does not divide an image of {H} x {W} pixels")
    grid = images.reshape(B, C, H // p, p, W // p, p)       # (B, C, rows, y, columns, x)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put the patches of square RGB images together again: (B, N, 3*p*p) -> (B, 3, H, W).

    Raises ValueError where N is not a square or the patches are not of 3*p*p values.
    """
    p = patch_size
    B, N, values = patches.shape
    side = math.isqrt(N)
    if side * side != N or values != 3 * p * p:
        raise ValueError(f"{N} patches of {values} values are no square RGB image "
                         f"of patches of {p} x {p} pixels")
    grid = patches.reshape(B, side, side, 3, p, p)          # (B, rows, columns, C, y, x)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, side * p, side * p)


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch minus its own mean, divided by its own standard deviation (MAE, section 3,
    "Reconstruction target"): (B, N, 3*p*p) -> the same shape."""
    mean = patches.mean(dim=-1, keepdim=True)               # (B, N, 1)
    var = patches.var(dim=-1, keepdim=True)                 # (B, N, 1)
    return (patches - mean) / (var + 1e-6).sqrt()


# ------------------------------------------------------------------------------ masking


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Row b of the result is tokens[b, ids[b]]: (B, N, D), (B, M) -> (B, M, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class PatchShuffle(nn.Module):
    """Random masking by shuffling (MAE, section 3, "Simple implementation").

    Each image's patches are put in random order; the first K = round(N * (1 - mask_ratio))
    stay visible, the others are masked: exactly N - K of every image. The class token is not
    one of them.
    """

    def __init__(self, mask_ratio: float) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask ratio {mask_ratio} is not between 0 and 1")
        self.mask_ratio = mask_ratio

    def count_visible(self, N: int) -> int:
        """K of N patches stay visible. Raises ValueError where none or all would."""
        K = round(N * (1 - self.mask_ratio))
        if not 0 < K < N:
            kind = "visible" if K == 0 else "masked"
            raise ValueError(f"mask ratio {self.mask_ratio} leaves no {kind} patch out of {N}")
        return K

    def forward(self, tokens: Tensor, noise: Tensor | None = None):
        """(B, N, D) -> visible (B, K, D), restore (B, N), mask (B, N): 1 masked, 0 visible.

        noise (B, N), uniform, decides the order: the same noise masks the same patches.
        """
        B, N, _ = tokens.shape
        K = self.count_visible(N)
        if noise is None:
            noise = torch.rand(B, N, device=tokens.device)
        shuffle = noise.argsort(dim=1)                      # (B, N) place -> patch
        restore = shuffle.argsort(dim=1)                    # (B, N) patch -> place, its inverse
        visible = take(tokens, shuffle[:, :K])              # (B, K, D)
        mask = (restore >= K).float()                       # (B, N)
        return visible, restore, mask


# ------------------------------------------------------------------------------ transformer


class Attention(nn.Module):
    """Multi-head self-attention (ViT, appendix A): softmax(q k^T / sqrt(D/h)) v.

    (B, T, D) -> (B, T, D). Raises ValueError where the heads do not divide the width.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, tokens: Tensor):
        """(B, T, D) -> q, k, v, each (B, h, T, D/h)."""
        B, T, D = tokens.shape
        return self.qkv(tokens).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """How much each token looks at each other one: (B, h, T, T), rows sum to 1."""
        scale = q.shape[-1] ** -0.5
        return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T, D = tokens.shape
        q, k, v = self.split_heads(tokens)                  # each (B, h, T, D/h)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            heads = self.weights(q, k) @ v                  # here faster than the fused kernel
        else:                                               # the same without (T, T) in memory
            heads = F.scaled_dot_product_attention(q, k, v)  # (B, h, T, D/h)
        return self.proj(heads.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside (ViT, section 3.1)."""

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

    `proj` is a convolution of stride p, as in timm, so that weights move between the two; on
    patches that are already cut out it is a plain matrix product.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def sine_cosine(N: int, D: int) -> Tensor:
    """Where the position embeddings of N patches start, (N, D): sines and cosines of each patch's
    row, then of its column, at falling frequencies (Vaswani et al. 2017, arXiv 1706.03762,
    section 3.5; MAE, appendix A.1). Theirs fall from 1 to 1/10,000, for long texts; ours to 1 over
    the grid's side, for slower waves would hardly change from patch to patch."""
    side, waves = math.isqrt(N), D // 4
    frequencies = side ** (-torch.arange(waves) / max(waves, 1))            # (D/4)
    angles = torch.arange(side)[:, None] * frequencies      # (side, D/4)
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    rows = codes[:, None].expand(-1, side, -1)              # (side, side, D/2)
    columns = codes[None].expand(side, -1, -1)              # (side, side, D/2)
    positions = torch.cat([rows, columns], dim=2).flatten(0, 1)     # (N, 4 * waves)
    return F.pad(positions, (0, D - 4 * waves))             # zeros where 4 does not divide D


class Encoder(nn.Module):
    """A ViT that sees the visible patches alone (MAE, section 3, "MAE encoder").

    Raises ValueError where the sizes do not fit together.
    """

    def __init__(self, image_size: int = 32, patch_size: int = 2, dim: int = 192,
                 depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        if min(image_size, patch_size, dim, depth) < 1:
            raise ValueError("image size, patch size, width and depth must be at least 1")
        if image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide an image of "
                             f"{image_size} x {image_size} pixels")
        self.image_size, self.patch_size, self.dim = image_size, patch_size, dim
        self.num_patches = (image_size // patch_size) ** 2  # N
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sine_cosine(self.num_patches, dim)      # (N, D), none for the class token
        self.pos_embed = nn.Parameter(positions[None])      # (1, N, D)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        initialize(self)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, 3*p*p). Raises ValueError where H, W are not those built for."""
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be (B, {', '.join(map(str, expected))}), "
                             f"not {tuple(images.shape)}")
        return patchify(images, self.patch_size)

    def embed(self, patches: Tensor, restore: Tensor | None = None) -> Tensor:
        """Embed patches, add their positions, put the class token in front.

        All patches in image order, (B, N, 3*p*p) -> (B, 1 + N, D), or, given `restore`, the
        visible ones of that shuffle, (B, K, 3*p*p) -> (B, 1 + K, D).
        """
        B, K, _ = patches.shape
        positions = self.pos_embed                          # (1, N, D)
        if restore is not None:
            ids = restore.argsort(dim=1)[:, :K]             # (B, K) which patches are visible
            positions = F.embedding(ids, positions[0])      # (B, K, D)
        tokens = self.patch_embed(patches) + positions
        return torch.cat([self.cls_token.expand(B, -1, -1), tokens], dim=1)

    def forward(self, patches: Tensor, restore: Tensor | None = None) -> Tensor:
        """The codes of the class token and then of the patches, in the order of `embed`."""
        tokens = self.embed(patches, restore)               # (B, 1 + K, D)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """What each block's heads look at in whole images: (B, h, 1 + N, 1 + N) a block."""
        tokens, maps = self.embed(self.patchify(images)), []
        for block in self.blocks:
            q, k, _ = block.attn.split_heads(block.norm1(tokens))
            maps.append(block.attn.weights(q, k))
            tokens = block(tokens)
        return maps


def initialize(module: nn.Module) -> None:
    """Xavier-uniform weights (MAE, appendix A.1) and zero biases; tokens normal with deviation
    0.02, as in the authors' code."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))  # a patch as one row, as in a linear
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name in ("cls_token", "mask_token"):
        if hasattr(module, name):
            nn.init.normal_(getattr(module, name), std=0.02)


# ------------------------------------------------------------------------------ decoder


class Decoder(nn.Module):
    """From the visible patches' codes to the pixels of all (MAE, section 3, "MAE decoder")."""

    def __init__(self, encoder_dim: int, num_patches: int, patch_size: int, dim: int = 192,
                 depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        if min(dim, depth) < 1:
            raise ValueError("decoder width and depth must be at least 1")
        self.embed = nn.Identity() if dim == encoder_dim else nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = F.pad(sine_cosine(num_patches, dim), (0, 0, 1, 0))  # zeros: the class token's
        self.pos_embed = nn.Parameter(positions[None])      # (1, N + 1, D')
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, 3 * patch_size ** 2)
        initialize(self)
        nn.init.normal_(self.head.weight, std=0.02)         # else the first loss is large

    def forward(self, latent: Tensor, restore: Tensor) -> Tensor:
        """(B, 1 + K, D), (B, N) -> pred (B, N, 3*p*p), in image order."""
        B, N = restore.shape
        tokens = self.embed(latent)                         # (B, 1 + K, D')
        cls, visible = tokens[:, :1], tokens[:, 1:]         # (B, 1, D'), (B, K, D')
        masked = self.mask_token.to(tokens.dtype).expand(B, N - visible.shape[1], -1)
        patches = take(torch.cat([visible, masked], dim=1), restore)    # (B, N, D') unshuffled
        tokens = torch.cat([cls, patches], dim=1) + self.pos_embed      # (B, 1 + N, D')
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 1:])                     # the class token is dropped


# ------------------------------------------------------------------------------ the autoencoder


class MAEViT(nn.Module):
    """The masked autoencoder (MAE, figure 1). Raises ValueError where sizes do not fit together.

    norm_pix_loss: predict each patch normalised by its own mean and deviation instead of its
    pixels (MAE, section 3, "Reconstruction target").
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
        self.shuffle.count_visible(self.encoder.num_patches)
        self.norm_pix_loss = norm_pix_loss

    def forward(self, images: Tensor, noise: Tensor | None = None):
        """images (B, 3, H, W), noise (B, N) -> loss (), pred (B, N, 3*p*p), mask (B, N)."""
        patches = self.encoder.patchify(images)             # (B, N, 3*p*p)
        visible, restore, mask = self.shuffle(patches, noise)   # only `visible` is encoded
        latent = self.encoder(visible, restore)             # (B, 1 + K, D)
        pred = self.decoder(latent, restore)                # (B, N, 3*p*p)
        return self.loss(patches, pred, mask), pred, mask

    def loss(self, patches: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches alone (MAE, section 3)."""
        target = normalize_patches(patches) if self.norm_pix_loss else patches
        error = (pred.float() - target).square().mean(dim=-1)   # (B, N)
        return (error * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------ the classifier


class ViTClassifier(Encoder):
    """The encoder on whole images, and a linear head on what it makes of them.

    It shares the encoder's modules, without copying, under the names that timm's
    VisionTransformer gives them. pool: the head reads the code of the class token ("cls") or
    the mean over those of the patches ("mean"; MAE, appendix A.1). mask_ratio: the part of the
    patches that is left out where noise is given, which is in training (PatchDropout, Liu et al.
    2022, arXiv 2208.07220): it costs less and regularises. Raises ValueError for another pool,
    fewer than one class, or a mask ratio that leaves no patch.
    """

    def __init__(self, encoder: Encoder, num_classes: int = 10, pool: str = "cls",
                 mask_ratio: float = 0.0) -> None:
        nn.Module.__init__(self)                            # the parts exist: none is made anew
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", not {pool!r}')
        if num_classes < 1:
            raise ValueError(f"the number of classes must be at least 1, not {num_classes}")
        self.image_size, self.patch_size = encoder.image_size, encoder.patch_size
        self.dim, self.num_patches, self.pool = encoder.dim, encoder.num_patches, pool
        self.cls_token, self.pos_embed = encoder.cls_token, encoder.pos_embed
        self.patch_embed, self.blocks, self.norm = encoder.patch_embed, encoder.blocks, encoder.norm
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.shuffle = PatchShuffle(mask_ratio) if mask_ratio else None
        self.count_visible()                                # raises where none would be left

    def count_visible(self) -> int:
        """K: how many patches are encoded where noise is given."""
        return self.shuffle.count_visible(self.num_patches) if self.shuffle else self.num_patches

    def features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), noise (B, N) or none -> (B, D): what the head reads."""
        patches, restore = self.patchify(images), None      # (B, N, 3*p*p)
        if self.shuffle and noise is not None:
            patches, restore, _ = self.shuffle(patches, noise)  # (B, K, 3*p*p)
        tokens = super().forward(patches, restore)          # (B, 1 + K, D)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), noise (B, N) or none -> logits (B, classes)."""
        return self.head(self.features(images, noise))


# ------------------------------------------------------------------------------ from a checkpoint


MODEL_SIZES = ("patch_size", "dim", "depth", "heads")
DECODER_SIZES = ("decoder_dim", "decoder_depth", "decoder_heads")


def build_model(kind: str, settings: dict) -> nn.Module:
    """A fresh MAEViT ("pretrain") or ViTClassifier ("classifier") of the sizes in `settings`.

    Raises ValueError where they do not fit together.
    """
    sizes = {name: settings[name] for name in MODEL_SIZES}
    if kind == "classifier":
        return ViTClassifier(Encoder(**sizes), settings["num_classes"], settings["pool"],
                             settings["mask_ratio"])
    decoder = {name: settings[name] for name in DECODER_SIZES}
    return MAEViT(**sizes, **decoder, mask_ratio=settings["mask_ratio"],
                  norm_pix_loss=settings["norm_pix_loss"])
