"""The tests: `pytest test_mae.py`.

In this order: the model, the data, the programs, interruption, several processes, bad input,
pictures, the README. Programs run through their command lines, `run(program, *flags)`, on small
models and files made here. No test needs the network, and only one the real CIFAR-10.
"""
import argparse
import contextlib
import csv
import fcntl
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import finetune
import mae
import pretrain
import visualize
from mae import MAEViT, PatchShuffle, ViTClassifier, patchify, unpatchify

HERE = Path(__file__).parent
torch.set_num_threads(1)            # models this small gain nothing from more
TINY = dict(patch_size=8, dim=16, depth=2, heads=2, decoder_dim=12, decoder_depth=1,
            decoder_heads=2)
CPU = pretrain.Machine(torch.device("cpu"), "fp32", compile=False)


def random_images(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_noise(count: int, patches: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(seed))


def tiny_mae(**changes) -> MAEViT:
    torch.manual_seed(0)
    return MAEViT(**{**TINY, **changes})


# ------------------------------------------------------------------------------ the model


def test_patches_are_cut_row_by_row_and_hold_channel_y_x():
    images = random_images(2, side=12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    for b, row, column, c, y, x in itertools.product(range(2), *[range(3)] * 2, range(3),
                                                     *[range(4)] * 2):
        value = images[b, c, row * 4 + y, column * 4 + x]
        assert patches[b, row * 3 + column, c * 16 + y * 4 + x] == value


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 32])
def test_unpatchify_undoes_patchify(patch_size):
    images = random_images(3)
    assert torch.equal(unpatchify(patchify(images, patch_size), patch_size), images)


@pytest.mark.parametrize("N, mask_ratio", [(256, 0.75), (64, 0.75), (16, 0.5), (100, 0.9),
                                           (7, 0.3)])
def test_shuffle_masks_exactly_and_restore_undoes_it(N, mask_ratio):
    tokens = torch.arange(5 * N * 2, dtype=torch.float32).view(5, N, 2)
    visible, restore, mask = PatchShuffle(mask_ratio)(tokens)
    K = round(N * (1 - mask_ratio))
    assert visible.shape == (5, K, 2) and restore.shape == mask.shape == (5, N)
    assert (mask.sum(dim=1) == N - K).all() and set(mask.unique().tolist()) == {0, 1}
    filled = torch.cat([visible, torch.full((5, N - K, 2), -1.0)], dim=1)
    restored = mae.take(filled, restore)
    assert torch.equal(restored, torch.where(mask[..., None] == 1, -1.0, tokens))


def test_every_patch_is_equally_likely_to_be_masked():
    torch.manual_seed(0)
    n, N = 20_000, 16
    _, _, mask = PatchShuffle(0.75)(torch.zeros(n, N, 1))
    spread = math.sqrt(0.75 * 0.25 / n)
    assert (mask.mean(dim=0) - 0.75).abs().max() < 4.5 * spread
    assert mask.unique(dim=0).shape[0] > 1700               # of the 1820 ways to choose 12 of 16


def test_masked_pixels_cannot_influence_the_encoder():
    model, images, noise = tiny_mae(), random_images(4), random_noise(4, 16)
    patches = patchify(images, 8).requires_grad_()
    visible, _, mask = model.shuffle(model.encoder.embed(patches), noise)
    gradient, = torch.autograd.grad(model.encoder(visible).square().sum(), patches)
    assert (gradient[mask == 1] == 0).all()
    assert (gradient[mask == 0].abs().amax(dim=-1) > 0).all()

    _, pred, _ = model(images, noise)
    hidden = mask[..., None].expand_as(patches) == 1
    changed = unpatchify(torch.where(hidden, torch.rand_like(patches), patches), 8)
    assert torch.equal(model(changed, noise)[1], pred)
    seen_changed = unpatchify(torch.where(hidden, patches, patches + 0.1), 8)
    assert not torch.allclose(model(seen_changed, noise)[1], pred)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_one_computed_in_numpy(norm_pix_loss):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), random_images(3)
    loss, pred, mask = model(images, random_noise(3, 16))
    pixels, pred, mask = images.double().numpy(), pred.detach().double().numpy(), mask.numpy()
    errors = []
    for b, row, column in itertools.product(range(3), range(4), range(4)):
        if mask[b, row * 4 + column]:
            target = pixels[b, :, row * 8:row * 8 + 8, column * 8:column * 8 + 8].reshape(-1)
            if norm_pix_loss:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((pred[b, row * 4 + column] - target) ** 2).mean())
    assert len(errors) == 3 * 12
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_same_noise_gives_the_same_result_and_other_noise_another():
    model, images = tiny_mae(), random_images(3)
    first, again = (model(images, random_noise(3, 16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(model(images, random_noise(3, 16, seed=2))[2], first[2])
    assert not torch.equal(model(images)[2], model(images)[2])


@pytest.mark.parametrize("mask_ratio", [0.25, 0.9])
def test_another_mask_ratio_gives_what_a_model_of_that_ratio_gives(mask_ratio):
    images, noise = random_images(3), random_noise(3, 16)
    for a, b in zip(tiny_mae(mask_ratio=mask_ratio)(images, noise),
                    tiny_mae()(images, noise, mask_ratio)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="leaves no visible patch out of 16"):
        tiny_mae()(images, noise, 0.99)


def test_decoder_depends_on_position_and_on_every_visible_patch():
    model, images, noise = tiny_mae(), random_images(2), random_noise(2, 16)
    _, pred, mask = model(images, noise)
    masked = pred[0][mask[0] == 1]
    assert (masked[0] - masked[1]).abs().max() > 1e-3       # the same mask token, another place
    images.requires_grad_()
    _, pred, mask = model(images, noise)
    gradient, = torch.autograd.grad(pred[mask == 1].square().sum(), images)
    assert (patchify(gradient, 8).abs().sum(dim=-1) > 0).equal(mask == 0)


TORCH_NAMES = {"self_attn.in_proj_weight": "attn.qkv.weight",
               "self_attn.out_proj.weight": "attn.proj.weight",
               "self_attn.out_proj.bias": "attn.proj.bias",
               "linear1.weight": "mlp.fc1.weight", "linear1.bias": "mlp.fc1.bias",
               "linear2.weight": "mlp.fc2.weight", "linear2.bias": "mlp.fc2.bias",
               "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias",
               "norm2.weight": "norm2.weight", "norm2.bias": "norm2.bias"}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier_computes_what_a_vit_of_torchs_own_layers_computes(pool):
    classifier, images = ViTClassifier(tiny_mae().encoder, 5, pool), random_images(3)
    torch.manual_seed(1)
    for parameter in classifier.parameters():                # neither zeros nor ones
        nn.init.normal_(parameter, std=0.3)
    weights = classifier.state_dict()
    tokens = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"],
                      stride=8).flatten(2).mT + weights["pos_embed"]
    tokens = torch.cat([weights["cls_token"].expand(3, -1, -1), tokens], dim=1)
    for i in range(2):
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        layer.load_state_dict({theirs: weights[f"blocks.{i}.{ours}"]
                               for theirs, ours in TORCH_NAMES.items()}
                              | {"self_attn.in_proj_bias": torch.zeros(48)})
        tokens = layer(tokens)
    codes = F.layer_norm(tokens, (16,), weights["norm.weight"], weights["norm.bias"])
    code = codes[:, 0] if pool == "cls" else codes[:, 1:].mean(dim=1)
    logits = F.linear(code, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(classifier(images), logits)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier_leaves_patches_out_only_if_it_is_given_noise(pool):
    encoder, noise = tiny_mae().encoder, random_noise(2, 16)
    images = random_images(2).requires_grad_()
    classifier = ViTClassifier(encoder, 5, pool, mask_ratio=0.75)

    def seen(*noise: torch.Tensor) -> torch.Tensor:         # (2, 16)
        gradient, = torch.autograd.grad(classifier(images, *noise).square().sum(), images)
        return patchify(gradient, 8).abs().sum(dim=-1) > 0

    assert seen().all()
    assert seen(noise).equal(PatchShuffle(0.75)(patchify(images, 8), noise)[2] == 0)
    whole = ViTClassifier(encoder, 5, pool)                 # its mask ratio is 0
    assert torch.equal(whole(images, noise), whole(images))
    assert torch.equal(whole.features(images), classifier.features(images))
    with pytest.raises(ValueError, match="leaves no visible patch out of 16"):
        ViTClassifier(encoder, mask_ratio=0.99)


def test_attention_maps_are_those_that_the_blocks_use():
    encoder, images = tiny_mae().encoder, random_images(2)
    maps = encoder.attention_maps(images)
    assert len(maps) == 2 and maps[0].shape == (2, 2, 17, 17)
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(2, 2, 17))
    tokens = encoder.add_class_token(encoder.embed(patchify(images, 8)))
    for block, weights in zip(encoder.blocks, maps):
        v = block.attn.split_heads(block.norm1(tokens))[2]
        mixed = block.attn.proj((weights @ v).transpose(1, 2).reshape(2, 17, 16))
        torch.testing.assert_close(block.attn(block.norm1(tokens)), mixed)
        tokens = block(tokens)


def test_positions_start_as_sines_and_cosines_of_row_and_column():
    model = MAEViT()                                        # 16 x 16 patches
    positions = model.encoder.pos_embed[0].detach().view(16, 16, 192)
    for row, column, i in itertools.product((0, 5, 15), (0, 3, 15), (0, 7, 47)):
        frequency = 16 ** (-i / 48)
        expected = [math.sin(row * frequency), math.cos(row * frequency),
                    math.sin(column * frequency), math.cos(column * frequency)]
        assert positions[row, column, i::48].tolist() == pytest.approx(expected, abs=1e-5)
    assert (model.decoder.pos_embed[0, 0] == 0).all()       # the class token has no place
    assert torch.equal(model.decoder.pos_embed[0, 1:], model.encoder.pos_embed[0])
    assert model.encoder.pos_embed.requires_grad


def test_parameters_are_as_designed():
    model = MAEViT()
    assert sum(p.numel() for p in model.parameters()) == 7_212_684
    names = {"cls_token": (1, 1, 192), "pos_embed": (1, 256, 192),
             "patch_embed.proj.weight": (192, 3, 2, 2), "patch_embed.proj.bias": (192,)}
    for i in range(12):                                     # the names of timm's VisionTransformer
        names |= {f"blocks.{i}.{name}": shape for name, shape in {
            "norm1.weight": (192,), "norm1.bias": (192,), "attn.qkv.weight": (576, 192),
            "attn.proj.weight": (192, 192), "attn.proj.bias": (192,), "norm2.weight": (192,),
            "norm2.bias": (192,), "mlp.fc1.weight": (768, 192), "mlp.fc1.bias": (768,),
            "mlp.fc2.weight": (192, 768), "mlp.fc2.bias": (192,)}.items()}
    names |= {"norm.weight": (192,), "norm.bias": (192,)}
    assert {n: tuple(p.shape) for n, p in model.encoder.state_dict().items()} == names
    head = {"head.weight": (10, 192), "head.bias": (10,)}
    classifier = ViTClassifier(model.encoder)
    assert {n: tuple(p.shape) for n, p in classifier.state_dict().items()} == names | head
    decoder = dict(model.decoder.named_parameters())
    assert decoder["pos_embed"].shape == (1, 257, 192) and decoder["head.weight"].shape == (12, 192)
    assert {"mask_token", "head.bias", "blocks.3.mlp.fc2.bias"} <= decoder.keys()
    assert not any(name.startswith("embed.") for name in decoder)
    assert "embed.weight" in dict(tiny_mae().decoder.named_parameters())    # other widths


@pytest.mark.parametrize("recipe", ["full", "laptop"])
def test_the_first_loss_is_about_that_of_predicting_grey(recipe):
    torch.manual_seed(0)
    model = data.build_model("pretrain", pretrain.RECIPES[recipe])
    images = random_images(8)
    loss, pred, _ = model(images)
    assert pred.std() < 0.5 and loss < 1.7 * images.square().mean()


@pytest.mark.parametrize("make, message", [
    (lambda: MAEViT(patch_size=5), "patch size 5 does not divide"),
    (lambda: MAEViT(heads=5), "width of 192 is not divisible by 5 heads"),
    (lambda: MAEViT(decoder_heads=7), "width of 192 is not divisible by 7 heads"),
    (lambda: MAEViT(depth=0), "at least 1"),
    (lambda: MAEViT(decoder_depth=0), "at least 1"),
    (lambda: MAEViT(mask_ratio=1.0), "mask ratio 1.0"),
    (lambda: MAEViT(mask_ratio=0.0), "mask ratio 0.0"),
    (lambda: MAEViT(patch_size=16, mask_ratio=0.95), "leaves no visible patch out of 4"),
    (lambda: MAEViT(patch_size=16, mask_ratio=0.05), "leaves no masked patch out of 4"),
    (lambda: tiny_mae()(torch.zeros(2, 3, 28, 28)), "images must be (B, 3, 32, 32)"),
    (lambda: tiny_mae()(torch.zeros(2, 1, 32, 32)), "images must be (B, 3, 32, 32)"),
    (lambda: patchify(torch.zeros(3, 32, 32), 4), "not enough values"),
    (lambda: unpatchify(torch.zeros(1, 15, 48), 4), "not a square RGB image"),
    (lambda: ViTClassifier(tiny_mae().encoder, pool="max"), "pool"),
    (lambda: ViTClassifier(tiny_mae().encoder, num_classes=0), "classes"),
])
def test_what_does_not_fit_together_is_a_value_error(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ------------------------------------------------------------------------------ the data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A folder with the data set `shapes`, and small files in the formats of both CIFARs."""
    folder = tmp_path_factory.mktemp("data")
    data.load_dataset("shapes", folder)
    write_records("cifar10", folder, count=40)
    write_records("cifar100", folder, count=300)
    return folder


def write_records(name: str, folder: Path, count: int) -> None:
    """Noise in a data set's binary format. Each class has a colour, the same in all files."""
    source, rng = data.SOURCES[name], np.random.default_rng(0)
    colours = rng.integers(0, 120, (source.num_classes, 3, 1))
    (folder / source.folder).mkdir(parents=True, exist_ok=True)
    for file in source.train + source.test:
        records = rng.integers(0, 10, (count, source.label_bytes + 3072))
        records[:, source.label_bytes - 1] = labels = np.arange(count) % source.num_classes
        pixels = colours[labels] + rng.integers(0, 136, (count, 3, 1024))
        records[:, source.label_bytes:] = pixels.reshape(count, 3072)
        (folder / source.folder / file).write_bytes(records.astype(np.uint8).tobytes())


def assert_read_independently(dataset: data.Dataset, folder: Path, label_bytes: int) -> None:
    """Compare every label, and every pixel of every seventh record, read with nothing but `bytes`
    and Pillow."""
    source = data.SOURCES[dataset.name]
    for files, images, labels in [(source.train, dataset.train_images, dataset.train_labels),
                                  (source.test, dataset.test_images, dataset.test_labels)]:
        size, index = label_bytes + 3072, 0
        for file in files:
            content = (folder / file).read_bytes()
            for start in range(0, len(content), size):
                assert labels[index] == content[start + label_bytes - 1]
                if index % 7 == 0:
                    planes = [Image.frombytes("L", (32, 32), content[
                        start + label_bytes + 1024 * c:start + label_bytes + 1024 * (c + 1)])
                        for c in range(3)]
                    picture = np.asarray(Image.merge("RGB", planes))    # (32, 32, 3)
                    assert (images[index].permute(1, 2, 0).numpy() == picture).all()
                index += 1
        assert index == len(images) == len(labels)


@pytest.mark.parametrize("name, label_bytes", [("cifar10", 1), ("cifar100", 2), ("shapes", 1)])
def test_what_is_loaded_is_what_stands_in_the_files(data_dir, name, label_bytes):
    dataset = data.load_dataset(name, data_dir)
    assert dataset.train_images.dtype == torch.uint8 and dataset.train_labels.dtype == torch.int64
    assert len(dataset.classes) == (100 if name == "cifar100" else 10)
    assert_read_independently(dataset, data_dir / data.SOURCES[name].folder, label_bytes)


def test_the_real_cifar10_is_loaded_as_it_is():
    folder = HERE / "data" / "cifar-10-batches-bin"
    if not folder.exists():
        pytest.skip("the real CIFAR-10 is not in data/")
    dataset = data.load_dataset("cifar10", HERE / "data")
    assert dataset.train_images.shape == (50_000, 3, 32, 32) and len(dataset.test_labels) == 10_000
    assert dataset.train_labels.bincount().tolist() == [5000] * 10
    assert dataset.classes[6] == "frog" == dataset.classes[dataset.train_labels[0]]
    assert_read_independently(dataset, folder, 1)


def test_shapes_are_balanced_varied_and_the_same_every_time(data_dir, tmp_path):
    first, again = (data.load_dataset("shapes", folder) for folder in (data_dir, tmp_path))
    assert torch.equal(first.train_images, again.train_images)
    assert first.train_labels.bincount().tolist() == [1000] * 10
    assert first.test_labels.bincount().tolist() == [200] * 10
    everything = torch.cat([first.train_images, first.test_images]).numpy()
    assert len({image.tobytes() for image in everything}) == 12_000


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    def order(count: int, batch: int, *seed: int) -> torch.Tensor:
        return data.epoch_order(count, batch, data.seeded_generator("cpu", *seed))

    assert order(12, 4, 0, 1).flatten().sort().values.tolist() == list(range(12))
    assert order(14, 4, 0, 1).shape == (3, 4) and len(order(14, 4, 0, 1).unique()) == 12
    assert torch.equal(order(12, 4, 0, 1), order(12, 4, 0, 1))
    assert not torch.equal(order(12, 4, 0, 1), order(12, 4, 0, 2))
    assert not torch.equal(order(12, 4, 0, 1), order(12, 4, 1, 1))
    small = order(3, 8, 0, 1)                               # fewer images than a batch
    assert small.shape == (1, 8) and set(small.flatten().tolist()) == {0, 1, 2}


def test_augmentation_flips_and_shifts_whole_images():
    images = data.unscale(random_images(400))
    generator = data.seeded_generator("cpu", 0)
    assert data.augment(images, "none", generator) is images
    flipped = data.augment(images, "flip", generator)
    is_flip = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert (is_flip | (flipped == images).flatten(1).all(dim=1)).all()
    assert 150 < is_flip.sum() < 250

    cropped, seen = data.augment(images, "crop", generator), set()
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    for image, result in zip(padded, cropped):
        mirrored = image.flip(2)
        ways = [(dy, dx, source is mirrored) for dy, dx, source in
                itertools.product(range(9), range(9), (image, mirrored))
                if torch.equal(result, source[:, dy:dy + 32, dx:dx + 32])]
        assert len(ways) == 1
        seen.update(ways)
    assert len(seen) > 140                                  # of 162


def test_mixed_labels_are_the_shares_of_what_the_images_show():
    values = torch.arange(0, 250, 5).repeat(20)             # each image of one brightness
    images = values[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    labels = torch.eye(50).repeat(20, 1)
    mixed, targets = data.mix(images, labels, data.seeded_generator("cpu", 0))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(1000))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ values[:50].float(),
                               rtol=1e-4, atol=0)
    shares = (targets * labels).sum(dim=1)                  # of the image itself
    torch.testing.assert_close((targets * labels.roll(1, 0)).sum(dim=1), 1 - shares)
    changed = mixed[:, 0] != images[:, 0]                   # (1000, 32, 32)
    blended = changed.all(dim=(1, 2)) & (mixed.amax(dim=(1, 2, 3)) == mixed.amin(dim=(1, 2, 3)))
    assert 0.45 < blended.float().mean() < 0.55             # mixup or CutMix
    assert 0.45 < shares[blended].mean() < 0.55
    assert 0.63 < shares[~blended].mean() < 0.72            # boxes are cut off at the edges
    height, width = changed.any(dim=2).sum(dim=1), changed.any(dim=1).sum(dim=1)
    assert torch.equal((height * width)[~blended], changed.sum(dim=(1, 2))[~blended])   # one box


def test_labelled_batches_are_mixed_repeated_and_noised_if_the_settings_say_so():
    images, labels = data.unscale(random_images(12)), torch.arange(12) % 4
    dataset = data.Dataset("cifar10", ["a class"] * 4, images, labels, images, labels)

    def batches(**changes) -> list[tuple]:
        settings = dict(seed=0, batch_size=4, repeat=2, augment="none", mix=False, mask_ratio=0.0)
        settings = argparse.Namespace(**settings | changes)
        return list(finetune.labelled_batches(dataset, 16, 1, settings))

    plain = batches()
    assert len(plain) == 6 and all(len(batch) == 2 for batch in plain)
    shown = data.unscale(torch.cat([batch[0] for batch in plain])).flatten(1)
    assert ((shown[:, None] == images.flatten(1)).all(dim=2).sum(dim=0) == 2).all()    # repeat
    for (x, y), (_, _, noise) in zip(plain, batches(mask_ratio=0.5)):
        assert noise.shape == (4, 16) and noise.unique().numel() == 64
    for (x, y), (mixed, targets) in zip(plain, batches(mix=True)):
        assert targets.shape == (4, 4) and not mixed.equal(x)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))


def test_scaling_is_undone_exactly():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert data.scale(every).min() == -1 and data.scale(every).max() == 1
    assert torch.equal(data.unscale(data.scale(every)), every)


def test_balanced_subsets_hold_n_of_each_class_and_depend_on_the_seed(data_dir):
    dataset = data.load_dataset("shapes", data_dir)
    subset = dataset.balanced(7, seed=0)
    assert subset.train_labels.bincount().tolist() == [7] * 10
    assert torch.equal(subset.train_images, dataset.balanced(7, seed=0).train_images)
    assert not torch.equal(subset.train_images, dataset.balanced(7, seed=1).train_images)
    assert len(subset.test_labels) == 2000


def test_images_held_out_are_tested_on_and_not_learned_from(data_dir):
    whole = data.load_dataset("shapes", data_dir)
    held_out = whole.hold_out(1000)
    assert torch.equal(held_out.train_images, whole.train_images[:-1000])
    assert torch.equal(held_out.train_labels, whole.train_labels[:-1000])
    assert torch.equal(held_out.test_images, whole.train_images[-1000:])
    assert torch.equal(held_out.test_labels, whole.train_labels[-1000:])


# ------------------------------------------------------------------------------ the programs


def run(program, *flags) -> tuple[int, str, str]:
    """A program with its command line: exit status, standard output, standard error."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with data.exit_on_bad_input():
                program.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(program, *flags) -> str:
    status, out, err = run(program, *flags)
    assert status == 0, err
    return out


def read_log(folder: Path) -> list[dict]:
    """The rows of a log without the columns that are measured."""
    with open(folder / "log.csv") as file:
        return [{name: value for name, value in row.items()
                 if name not in ("seconds", "images_per_second", "peak_memory_mb")}
                for row in csv.DictReader(file)]


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["settings"]


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    return data.load_checkpoint(folder)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs have the same files, and weights, optimizers, log and pictures bit for bit."""
    first, second = (data.load_checkpoint(folder / "checkpoint.pt") for folder in (a, b))
    for key in ("model", "optimizers", "epoch", "probe"):
        torch.testing.assert_close(first.get(key), second.get(key), rtol=0, atol=0)
    torch.testing.assert_close(*(data.load_checkpoint(folder / "weights.pt")["model"]
                                 for folder in (a, b)), rtol=0, atol=0)
    assert read_log(a) == read_log(b)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
             for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".npy"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


def assert_close_logs(a: Path, b: Path, tolerance: float) -> None:
    for one, other in zip(read_log(a), read_log(b), strict=True):
        for column, value in one.items():
            assert float(other[column]) == pytest.approx(float(value), rel=tolerance), column


KINDS = {"pretrain": pretrain, "finetune": finetune, "scratch": finetune, "linear": finetune}


@pytest.fixture(scope="session")
def flags_of_runs(data_dir, tmp_path_factory) -> dict[str, list]:
    """The flags of a run of each kind, without --out: 96 of 200 random images, a small model."""
    small = ["--recipe", "laptop", "--dataset", "cifar10", "--data-dir", data_dir, "--limit", 96,
             "--batch-size", 32, "--device", "cpu", "--precision", "fp32"]
    sizes = ["--patch-size", 8, "--dim", 16, "--depth", 1, "--heads", 2]
    init = ["--init", tmp_path_factory.getbasetemp() / "runs" / "pretrain"]
    return {"pretrain": [*small, *sizes, "--decoder-dim", 16, "--decoder-heads", 2, "--epochs", 3],
            "finetune": [*small, *init, "--epochs", 2, "--mix"],
            "scratch": [*small, *sizes, "--epochs", 2],
            "linear": [*small, *init, "--mode", "linear", "--epochs", 5]}


@pytest.fixture(scope="session")
def runs(flags_of_runs, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind."""
    folder = tmp_path_factory.getbasetemp() / "runs"
    for kind, program in KINDS.items():
        succeed(program, *flags_of_runs[kind], "--out", folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="session")
def flags(flags_of_runs, runs) -> dict[str, list]:
    """The same, once the runs are there: two of them start from another one."""
    return flags_of_runs


def test_pretraining_leaves_a_whole_run_folder(runs):
    out = runs["pretrain"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png",
                     *(f"reconstructions/epoch-{epoch:04}.{kind}" for epoch in (1, 2, 3)
                       for kind in ("png", "npy"))}
    log = read_log(out)
    assert [row["epoch"] for row in log] == ["1", "2", "3"] and float(log[-1]["lr"]) == 0
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["dataset"] == "cifar10" and config["settings"]["dim"] == 16
    assert config["versions"]["torch"] == torch.__version__


def test_the_last_weights_are_kept_in_half_precision_too(runs):
    for out in runs.values():
        half = data.load_checkpoint(out / "weights.pt")
        assert "optimizers" not in half
        for name, value in read_model(out / "checkpoint.pt").items():
            assert half["model"][name].equal(value.half())


def test_fine_tuning_starts_from_the_pretrained_encoder_and_scratch_does_not(runs, flags, tmp_path):
    pretrained = read_model(runs["pretrain"])
    still = ["--epochs", 1, "--base-lr", 1e-12]
    succeed(finetune, *flags["finetune"], *still, "--out", tmp_path / "init")
    for name, value in read_model(tmp_path / "init").items():
        if not name.startswith("head."):
            torch.testing.assert_close(value, pretrained[f"encoder.{name}"])
    succeed(finetune, *flags["scratch"], *still, "--seed", 7, "--out", tmp_path / "scratch")
    weight = read_model(tmp_path / "scratch")["blocks.0.attn.qkv.weight"]
    assert (weight - pretrained["encoder.blocks.0.attn.qkv.weight"]).abs().max() > 0.1
    tuned = read_model(runs["finetune"])["blocks.0.attn.qkv.weight"]
    assert not torch.equal(tuned, pretrained["encoder.blocks.0.attn.qkv.weight"])


def test_linear_probe_trains_the_head_alone(runs):
    pretrained, log = read_model(runs["pretrain"]), read_log(runs["linear"])
    for name, value in read_model(runs["linear"]).items():
        if not name.startswith("head."):
            assert torch.equal(value, pretrained[f"encoder.{name}"])
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])


@pytest.mark.parametrize("hardware", [True, False], ids=["with bfloat16", "without bfloat16"])
@pytest.mark.parametrize("kind", ["finetune", "linear"])
def test_evaluate_prints_the_last_row_of_the_log_whatever_the_machine_multiplies(
        kind, hardware, flags, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "multiplies_bf16", lambda device: hardware)
    succeed(finetune, *flags[kind], "--precision", "auto", "--epochs", 10, "--base-lr", 0.1,
            "--out", tmp_path / "run")
    assert read_settings(tmp_path / "run")["precision"] == ("bf16" if hardware else "fp32")
    last = read_log(tmp_path / "run")[-1]
    for elsewhere in (hardware, not hardware):
        monkeypatch.setattr(pretrain, "multiplies_bf16", lambda device: elsewhere)
        out = succeed(finetune, "--evaluate", tmp_path / "run", "--data-dir", data_dir)
        assert out.endswith(f"test accuracy {float(last['test_accuracy']):.2f} %\n")
        loss = float(re.search("loss ([0-9.]+)", out)[1])   # of 4 decimals
        assert loss == pytest.approx(float(last["test_loss"]), abs=0.6e-4)


def test_evaluate_takes_weights_in_half_precision_and_other_data_sets(runs, data_dir):
    out = succeed(finetune, "--evaluate", runs["scratch"] / "weights.pt", "--data-dir", data_dir)
    loss = float(read_log(runs["scratch"])[-1]["test_loss"])
    assert float(re.search("loss ([0-9.]+)", out)[1]) == pytest.approx(loss, abs=0.003)
    _, out, err = run(finetune, "--evaluate", runs["scratch"], "--dataset", "shapes",
                      "--data-dir", data_dir)
    assert "note: it was trained on cifar10, not on shapes" in err and "test accuracy" in out


@pytest.mark.parametrize("more", ["--epochs 20", "--epochs 60 --mode linear",
                                  "--epochs 30 --mix --mask-ratio 0"])
def test_a_classifier_learns_what_can_be_learned(more, flags, tmp_path):
    """Classes that differ in colour alone: chance is 10 %."""
    start = flags["finetune"][:-1]                          # without --mix
    succeed(finetune, *start, *more.split(), "--base-lr", 0.02, "--out", tmp_path / "run")
    assert float(read_log(tmp_path / "run")[-1]["test_accuracy"]) > 50


def test_repeat_shows_few_images_often(flags, tmp_path):
    succeed(finetune, *flags["scratch"], "--labels-per-class", 2, "--repeat", 8, "--epochs", 1,
            "--out", tmp_path / "run")
    steps, = {state["step"].item() for state in data.load_checkpoint(tmp_path / "run")[
        "optimizers"][0].values()}
    assert steps == 2 * 10 * 8 // 32


def test_settings_are_chosen_on_images_held_out_and_evaluated_on_the_test_images(
        flags, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held_out = ["--limit", 64, "--validation", 24, "--epochs", 1]
    out = succeed(pretrain, *flags["pretrain"], *held_out)
    assert "64 training and 24 validation images" in out
    out = succeed(finetune, *flags["scratch"], *held_out, "--labels-per-class", 1, "--out", "run")
    assert "10 training and 24 validation images" in out
    assert "40 test images" in succeed(finetune, "--evaluate", "run", "--data-dir", data_dir)


def test_a_run_has_a_folder_whose_name_says_what_it_is(flags, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tail = "cifar10-laptop"
    for name, kind, more in [
            (f"pretrain-{tail}", "pretrain", []), (f"finetune-{tail}", "finetune", []),
            (f"scratch-{tail}", "scratch", []), (f"linear-{tail}", "linear", []),
            (f"pretrain-validation-{tail}", "pretrain", ["--validation", 8]),
            (f"pretrain-{tail}-64-images", "pretrain", ["--limit", 64])]:
        start = flags[kind].copy()
        del start[6:8]                                      # --limit 96
        succeed(KINDS[kind], *start, *more, "--epochs", 1)
        assert (tmp_path / "runs" / name / "weights.pt").exists(), name


def test_what_a_reader_should_know_of_the_encoder_is_noted(runs, flags, tmp_path):
    def notes(*more, **settings) -> str:
        checkpoint = data.load_checkpoint(runs["pretrain"])
        checkpoint["settings"] |= settings
        data.save_checkpoint(tmp_path / "encoder.pt", checkpoint)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        status, _, err = run(finetune, *flags["finetune"], "--epochs", 1, *more, "--init",
                             tmp_path / "encoder.pt", "--out", tmp_path / "run")
        assert status == 0, err
        return err

    seen = "encoder.pt has seen the validation images, without labels"
    assert notes() == ""
    assert "encoder.pt has done 3 of its 5 epochs" in notes(epochs=5)
    assert seen in notes("--validation", 8)
    assert seen not in notes("--validation", 8, validation=8)
    elsewhere = notes("--validation", 8, dataset="shapes")
    assert "encoder.pt was pre-trained on shapes, not on cifar10" in elsewhere
    assert seen not in elsewhere


def test_cifar100_has_a_hundred_classes(flags, tmp_path):
    succeed(finetune, *flags["scratch"], "--dataset", "cifar100", "--out", tmp_path / "run")
    assert read_model(tmp_path / "run")["head.weight"].shape == (100, 16)


def write_stripes(folder: Path) -> None:
    """2,000 training images of noisy stripes in CIFAR-10's format: the classes are ten angles."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]
    folder.mkdir(parents=True)
    for file in (*data.BATCHES, "test_batch.bin"):
        angle = rng.permutation(np.arange(400) % 10)[:, None, None] * np.pi / 10
        waves = np.sin((x * np.cos(angle) + y * np.sin(angle)) * np.pi / 4
                       + rng.uniform(0, 2 * np.pi, (400, 1, 1)))
        pixels = 128 + 50 * waves[:, None] + rng.normal(0, 60, (400, 3, 32, 32))
        records = np.concatenate([np.rint(angle[:, 0] * 10 / np.pi),
                                  pixels.clip(0, 255).reshape(400, 3072)], axis=1)
        (folder / file).write_bytes(records.astype(np.uint8).tobytes())


def test_pretraining_makes_a_linear_probe_better(flags, tmp_path):
    write_stripes(tmp_path / "data" / "cifar-10-batches-bin")
    accuracy, more = {}, ["--data-dir", tmp_path / "data", "--limit", 2000, "--batch-size", 64]
    for name, rate in (("trained", 0.05), ("random", 1e-12)):
        succeed(pretrain, *flags["pretrain"], *more, "--dim", 32, "--epochs", 6, "--base-lr", rate,
                "--augment", "none", "--picture-every", 9, "--out", tmp_path / name)
        succeed(finetune, *flags["linear"], *more, "--init", tmp_path / name, "--epochs", 20,
                "--out", tmp_path / f"{name}-linear")
        accuracy[name] = float(read_log(tmp_path / f"{name}-linear")[-1]["test_accuracy"])
    assert accuracy["trained"] > accuracy["random"] + 30, accuracy


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = argparse.Namespace(base_lr=1e-3, batch_size=512, warmup_epochs=5, epochs=25)

    def rate(epoch: float) -> float:
        return pretrain.learning_rate(settings, epoch)

    assert rate(0) == 0 and rate(2.5) == pytest.approx(1e-3) and rate(5) == pytest.approx(2e-3)
    assert rate(15) == pytest.approx(1e-3) and rate(25) == pytest.approx(0, abs=1e-12)
    assert rate(10) == pytest.approx(2e-3 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_its_optimizer_and_weight_decay(optimizer):
    """Weight decay spares biases, norms, tokens and positions. Muon steps matrices of blocks."""
    model = tiny_mae()
    settings = argparse.Namespace(optimizer=optimizer, weight_decay=0.05, precision="fp32")
    optimizers = pretrain.make_optimizers(model, settings, (0.9, 0.95))
    names = ["AdamW"] if optimizer == "adamw" else ["AdamW", "Muon"]
    assert [type(one).__name__ for one in optimizers] == names
    places = [(parameter, one, group) for one in optimizers for group in one.param_groups
              for parameter in group["params"]]
    found = {id(parameter): (one, group) for parameter, one, group in places}
    assert len(places) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        one, group = found[id(parameter)]
        matrix = re.search(r"(qkv|proj|fc1|fc2|embed|head)\.weight$", name)
        assert matrix or re.search(r"(bias|norm\d?\.weight|_token|pos_embed)$", name)
        assert group["weight_decay"] == (0.05 if matrix else 0)
        assert (one is optimizers[-1]) == (optimizer == "adamw" or bool(
            re.search(r"blocks\.\d\.(attn|mlp)\.\w+\.weight", name))), name


@pytest.mark.parametrize("dtype, mixed", [(torch.float64, 1e-9), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16)])
def test_orthogonalize_keeps_directions_and_makes_them_equally_long(shape, dtype, mixed):
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64),
                                full_matrices=False)
    lengths = torch.logspace(-1.5, 0, 16, dtype=torch.float64)  # the longest 30 times the shortest
    result = pretrain.orthogonalize(U @ (lengths[:, None] * Vh), dtype)
    result = U.mT @ result.double() @ Vh.mT
    values = result.diagonal(dim1=1, dim2=2)
    assert (result - torch.diag_embed(values)).abs().max() < mixed  # the directions are kept
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_steps_as_that_of_torch_does():
    """Which is scaled to half of ours and computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(32, 64, generator=generator) for _ in range(2)]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [pretrain.Muon([{"params": [ours[0]], "lr": 0.01, "weight_decay": 0.5},
                                 {"params": [ours[1]], "lr": 0.02}])]
    optimizers += [torch.optim.Muon([matrix], lr=2 * lr, weight_decay=decay / 2,
                                    adjust_lr_fn="match_rms_adamw")
                   for matrix, lr, decay in zip(theirs, (0.01, 0.02), (0.5, 0.0))]
    for _ in range(4):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(32, 64, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, matrix in zip(ours, theirs, start):
        assert (one - other).norm() < 0.03 * (one - matrix).norm()


def test_layer_decay_scales_the_learning_rate_of_each_layer(runs, flags, tmp_path):
    model = ViTClassifier(tiny_mae().encoder)               # of 2 blocks
    expected = {"patch_embed": 3, "cls_token": 3, "pos_embed": 3, "blocks.0": 2, "blocks.1": 1,
                "norm": 0, "head": 0}
    for name, _ in model.named_parameters():
        start = next(start for start in expected if name.startswith(start))
        assert finetune.layers_above(name, depth=2) == expected[start], name
    succeed(finetune, *flags["finetune"], "--layer-decay", 0, "--epochs", 1,
            "--out", tmp_path / "run")                      # 0: only the top layer learns
    before = read_model(runs["pretrain"])
    for name, value in read_model(tmp_path / "run").items():
        if not name.startswith("head"):
            assert value.equal(before[f"encoder.{name}"]) == (not name.startswith("norm")), name


@pytest.mark.parametrize("micro", [1, 5, 7, 64])
def test_gradients_add_up_to_the_same_step_whatever_the_micro_batch(micro):
    batch = random_images(16), random_noise(16, 16)

    def gradients(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = tiny_mae()
        settings = argparse.Namespace(batch_size=16, micro_batch_size=size)
        learner = pretrain.Learner(model, pretrain.masked_loss, [])
        loss = pretrain.compute_gradient(learner, batch, settings, CPU)
        return loss, [parameter.grad for parameter in model.parameters()]

    torch.testing.assert_close(gradients(micro), gradients(16), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", finetune.RECIPES)
def test_a_step_makes_nothing_on_another_device(recipe, monkeypatch):
    """As a GPU would find out; here on the device `meta`, whose tensors have no values."""
    machine = pretrain.Machine(torch.device("meta"), "fp32", compile=False)
    monkeypatch.setattr(pretrain.Machine, "autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(data, "seeded_generator", lambda *_: torch.Generator())
    images, labels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long()
    dataset = data.Dataset("shapes", list(data.SHAPES), images, labels, images, labels)
    dataset = dataset.to(machine.device)

    def take_step(model, settings, objective, batches) -> None:
        batch = next(batches)
        assert all(tensor.is_meta for tensor in batch)
        optimizers = pretrain.make_optimizers(model, settings, betas=(0.9, 0.95))
        pretrain.compute_gradient(pretrain.Learner(model, objective, optimizers), batch, settings,
                                  machine)
        for optimizer in optimizers[1:]:                    # Muon. AdamW, torch's own, refuses meta
            optimizer.step()

    common = dict(depth=2, decoder_depth=1, seed=0, batch_size=16, micro_batch_size=8, repeat=1,
                  precision="fp32", dataset="shapes")
    if recipe in pretrain.RECIPES:
        settings = argparse.Namespace(**pretrain.RECIPES[recipe] | common)
        model = pretrain.make_model("pretrain", settings, machine)
        take_step(model, settings, pretrain.masked_loss, pretrain.mae_batches(
            dataset.train_images, model.encoder.num_patches, 1, settings))
    settings = argparse.Namespace(**finetune.RECIPES[recipe] | common)
    model = pretrain.make_model("classifier", settings, machine)
    take_step(model, settings, finetune.classify,
              finetune.labelled_batches(dataset, model.num_patches, 1, settings))


def test_a_seed_fixes_the_run_and_another_seed_changes_it(runs, flags, tmp_path):
    succeed(pretrain, *flags["pretrain"], "--out", tmp_path / "again")
    assert_same_run(runs["pretrain"], tmp_path / "again")
    succeed(pretrain, *flags["pretrain"], "--seed", 1, "--out", tmp_path / "other")
    assert read_log(tmp_path / "other") != read_log(runs["pretrain"])


@pytest.mark.parametrize("kind", ["pretrain", "scratch"])
def test_benchmark_prints_a_speed_and_writes_nothing(kind, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "BENCHMARK_SECONDS", 0)
    out = succeed(KINDS[kind], *flags[kind], "--benchmark")
    assert re.search(r"speed +[\d,.]+ images/s", out) and "GFLOP per image" in out
    assert "MiB at the peak" in out and not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not here")
@pytest.mark.parametrize("kind", ["pretrain", "finetune", "linear"])
def test_cuda_computes_what_the_cpu_does(kind, runs, flags, tmp_path):
    start = flags[kind].copy()
    place = start.index("--device")
    del start[place:place + 4]                              # auto: CUDA, in bfloat16, compiled
    out = succeed(KINDS[kind], *start, "--out", tmp_path / "run")
    assert "cuda" in out and read_settings(tmp_path / "run")["device"] == "cuda"
    for row, same in zip(read_log(runs[kind]), read_log(tmp_path / "run"), strict=True):
        for name in row.keys() & {"loss", "train_loss", "test_loss"}:
            assert float(same[name]) == pytest.approx(float(row[name]), rel=0.3), name
    succeed(KINDS[kind], "--out", tmp_path / "run", "--resume", "--epochs", 6)


# ------------------------------------------------------------------------------ interruption


class Killed(BaseException):
    """Ends a program at once, as a signal would."""


@contextlib.contextmanager
def after_each_write(action):
    """action(number, path) is called after each file that a program writes, counted from 0."""
    write, numbers = data.write_file, itertools.count()

    def write_then_act(path, content) -> None:
        write(path, content)
        action(next(numbers), Path(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "write_file", write_then_act)
        yield


def run_until(stop, program, *flags) -> bool:
    """Whether stop(number, path) became true after a write, at which the program was killed."""
    def act(number: int, path: Path) -> None:
        if stop(number, path):
            raise Killed

    with after_each_write(act):
        try:
            succeed(program, *flags)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("kind, more", [
    ("pretrain", ["--checkpoint-every", 2]), ("finetune", []),
    ("linear", ["--checkpoint-every", 2])])
def test_a_run_killed_after_any_file_ends_bit_for_bit_as_the_unbroken_one(
        kind, more, flags, runs, tmp_path):
    for last in itertools.count():
        out = tmp_path / str(last)
        killed = run_until(lambda number, _: number == last, KINDS[kind], *flags[kind], *more,
                           "--out", out)
        succeed(KINDS[kind], "--out", out, "--resume")
        assert_same_run(out, runs[kind])
        if not killed:
            break
    assert last > 6


def test_a_run_killed_before_its_first_checkpoint_begins_anew_with_its_settings(flags, tmp_path):
    for name in ("unbroken", "killed"):
        stop = {"unbroken": "nothing", "killed": "log.csv"}[name]
        run_until(lambda _, path: path.name == stop, pretrain, *flags["pretrain"], "--seed", 5,
                  "--checkpoint-every", 3, "--out", tmp_path / name)
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()
    succeed(pretrain, "--out", tmp_path / "killed", "--resume")
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.parametrize("kind, how", [("pretrain", "--compile"), ("pretrain", "--precision bf16"),
                                       ("finetune", "--precision bf16")])
def test_a_resumed_run_computes_as_before_wherever_it_is_resumed(
        kind, how, flags, runs, data_dir, tmp_path, monkeypatch):
    """Compiled or in bfloat16, with the data set in a folder that was named from elsewhere."""
    monkeypatch.chdir(data_dir.parent)
    start = [*flags[kind], "--data-dir", data_dir.name, "--device", "auto", *how.split()]
    if torch.cuda.is_available():
        start += ["--device", "cpu"]
    status, _, err = run(KINDS[kind], *start, "--out", tmp_path / "unbroken")
    if "--compile: torch.compile does not work here" in err:
        pytest.skip("torch.compile does not work here")
    assert status == 0, err
    assert run_until(lambda _, path: path.name == "log.csv", KINDS[kind], *start,
                     "--out", tmp_path / "killed")
    before = read_settings(tmp_path / "killed")
    monkeypatch.chdir(tmp_path)
    succeed(KINDS[kind], "--out", "killed", "--resume")
    assert read_settings(tmp_path / "killed") == before
    assert before["device"] == "cpu" and before["data_dir"] == str(data_dir)
    assert before["compile"] == (how == "--compile")
    assert before["precision"] == ("bf16" if "bf16" in how else "fp32")
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")
    assert_close_logs(tmp_path / "killed", runs[kind], 1e-3 if how == "--compile" else 0.03)


def test_more_epochs_can_be_asked_for_and_what_the_schedule_does_is_said(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs["pretrain"], out)
    text = succeed(pretrain, "--out", out, "--resume", "--epochs", 5, "--micro-batch-size", 5,
                   "--checkpoint-every", 2, "--picture-every", 2)
    assert read_settings(out)["micro_batch_size"] == 5
    assert "the cosine now ends after epoch 5, not 3" in text
    log = read_log(out)
    assert [row["epoch"] for row in log] == list("12345")
    assert log[:3] == read_log(runs["pretrain"]) and float(log[3]["lr"]) > 0 == float(log[4]["lr"])


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_run_whose_folder_is_taken_away_ends_and_leaves_another_run_alone(
        replaced, flags, runs, tmp_path):
    out, written, after = tmp_path / "run", set(), []

    def take_away(_, path: Path) -> None:
        written.add(path.name)
        if {"log.csv", "checkpoint.pt"} <= written and not after:   # the end of the first epoch
            after.append("begun")
            shutil.rmtree(out)
            if replaced:
                succeed(finetune, *flags["scratch"], "--out", out)
            after.append(snapshot(tmp_path))

    with after_each_write(take_away):
        status, _, err = run(pretrain, *flags["pretrain"], "--out", out)
    assert status == 2
    assert err == f"error: {out} was deleted or replaced while its run was going on\n"
    assert snapshot(tmp_path) == after[1]
    if replaced:
        assert_same_run(out, runs["scratch"])


# What follows runs in processes of its own.


def run_in_child(module: str, flags: list[str], output: str, environment: dict[str, str],
                 source: data.Source | None, at: tuple[str, int, int] | None,
                 file_size: int | None) -> None:
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    data.SOURCES["cifar10"] = source or data.SOURCES["cifar10"]
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    write, count = data.write_file, itertools.count(1)

    def raise_signal_and_write(path, content) -> None:
        if at and Path(path).name == at[0] and next(count) == at[1]:
            os.kill(os.getpid(), at[2])
        write(path, content)

    data.write_file = raise_signal_and_write
    with data.exit_on_bad_input():
        sys.modules[module].main(flags)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(program, *flags) -> a process that runs a program, forked from one that has imported
    torch already; `process.output` is the file with all that it prints.

    at: (name of a file, which time, signal): the process sends itself a signal before it writes it.
    source: where CIFAR-10 is. file_size: no file may become larger.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "test_mae"])
    folder, count, processes = tmp_path_factory.mktemp("output"), itertools.count(), []
    warm_up = context.Process(target=int)
    warm_up.start()
    warm_up.join()

    def start(program, *flags, output: str | None = None, environment: dict | None = None,
              source: data.Source | None = None, at: tuple | None = None,
              file_size: int | None = None):
        output = output or folder / str(next(count))
        process = context.Process(target=run_in_child, args=(
            program.__name__, [str(flag) for flag in flags], str(output), environment or {}, source,
            at, file_size))
        process.start()
        process.output = Path(output)
        processes.append(process)
        return process
    yield start
    for process in processes:
        end(process)


def end(process) -> None:
    """With kill -9."""
    process.kill()
    process.join()


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def succeed_in_child(process) -> None:
    process.join(120)
    assert process.exitcode == 0, process.output.read_text()


def test_a_run_killed_at_many_random_moments_ends_as_the_unbroken_one(flags, tmp_path, start):
    flags = [*flags["pretrain"], "--epochs", 5, "--picture-every", 2]
    began = time.monotonic()
    succeed_in_child(start(pretrain, *flags, "--out", tmp_path / "unbroken"))
    length, rng, kills, out = time.monotonic() - began, random.Random(0), 0, tmp_path / "killed"
    while kills < 8:
        resume = (out / "config.json").exists()
        process = start(pretrain, *(["--resume"] if resume else flags), "--out", out)
        process.join(rng.uniform(0.1, 0.6) * length)
        if process.exitcode is None:
            end(process)
            kills += 1
        else:                                               # it was faster
            succeed_in_child(process)
            assert_same_run(tmp_path / "unbroken", out)
            shutil.rmtree(out)
    resume = (out / "config.json").exists()
    succeed_in_child(start(pretrain, *(["--resume"] if resume else flags), "--out", out))
    assert_same_run(tmp_path / "unbroken", out)


def test_no_other_program_can_write_to_the_folder_of_a_running_one(flags, tmp_path, start):
    out = tmp_path / "run"
    process = start(pretrain, *flags["pretrain"], "--out", out, at=("log.csv", 2, signal.SIGSTOP))
    wait_for(lambda: is_stopped(process))
    (out / "checkpoint.pt").write_bytes(b"not to be read before the folder is free")
    for program, command in ((pretrain, flags["pretrain"]), (finetune, flags["scratch"]),
                             (pretrain, ["--resume"])):
        assert_bad_input(tmp_path, f"another program is writing to {out}", program, *command,
                         "--out", out)
    end(process)


def is_stopped(process) -> bool:
    """Whether SIGSTOP has taken effect."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(runs, tmp_path, start):
    out = tmp_path / "run"
    shutil.copytree(runs["pretrain"], out)
    before = (out / "checkpoint.pt").read_bytes()
    process = start(pretrain, "--out", out, "--resume", "--epochs", 9, "--picture-every", 100,
                    file_size=len(before) // 2)
    process.join(60)
    assert process.exitcode == 2
    assert f"error: {out / 'checkpoint.pt'}: File too large" in process.output.read_text()
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.rglob(".*"))


@pytest.fixture
def terminal():
    """A terminal of 80 columns: the file to write to, and what has been written so far."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):                  # the terminal was closed
            while content := os.read(master, 4096):
                shown.extend(content)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield os.ttyname(slave), shown
    os.close(slave)
    thread.join(10)
    os.close(master)


@pytest.mark.parametrize("kind, begin", [("pretrain", "epoch "), ("linear", "computing features ")])
def test_progress_is_one_line_of_a_terminal_that_tells_the_time_left(
        kind, begin, flags, runs, tmp_path, start, terminal):
    file, shown = terminal
    if kind == "pretrain":
        more = ["--epochs", 10_000]
    else:                                                   # an encoder that takes its time
        checkpoint = data.load_checkpoint(runs["pretrain"])
        checkpoint["settings"] |= dict(patch_size=2, dim=64, depth=4)
        checkpoint["model"] = data.build_model("pretrain", checkpoint["settings"]).state_dict()
        data.save_checkpoint(tmp_path / "encoder.pt", checkpoint)
        more = ["--init", tmp_path / "encoder.pt", "--dataset", "shapes", "--limit", 10_000]

    def lines() -> list[str]:
        return re.findall(r"([^\r\n]*)\x1b\[K\r", bytes(shown).decode())

    process = start(KINDS[kind], *flags[kind], *more, "--out", tmp_path / "run", output=file)
    wait_for(lambda: len(lines()) > 1)
    end(process)
    for line in lines():
        assert line.startswith(begin) and len(line) <= 79 and re.search(r"\d:\d\d:\d\d left", line)


def python(*command) -> subprocess.Popen:
    """A program as a user would start it, with pipes."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("program, moment", [(pretrain, "start"), (finetune, "start"),
                                             (pretrain, "training")])
def test_ctrl_c_ends_a_program_without_a_traceback(program, moment, flags, tmp_path):
    process = python("-X", "importtime", program.__file__, *flags["pretrain"], "--epochs", 10_000,
                     "--out", tmp_path / "run")
    if moment == "start":                                   # torch is not imported yet
        while not process.stderr.readline().rstrip().endswith("argparse"):
            pass
    else:
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while not process.stdout.readline().startswith("epoch "):
            pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_a_closed_pipe_ends_a_program_without_a_traceback(flags, tmp_path):
    """As in `python pretrain.py | head -1`."""
    process = python(pretrain.__file__, *flags["pretrain"], "--epochs", 10_000,
                     "--out", tmp_path / "run")
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


# ------------------------------------------------------------------------------ several processes


@pytest.fixture
def start_two(start):
    """start_two(program, *flags) -> the two processes of a run, the main one first."""
    def start_two(program, *flags, at: tuple | None = None) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [start(program, *flags, at=at, environment=dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port))) for rank in range(2)]
    return start_two


def test_torchrun_starts_processes_that_compute_what_one_does(flags, runs, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               pretrain.__file__, *flags["pretrain"], "--out", tmp_path / "two"]
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=150)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/") == 1             # only one of them prints
    assert_close_logs(tmp_path / "two", runs["pretrain"], 1e-3)


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "linear"])
def test_two_processes_share_batches_of_any_size_and_can_be_resumed(
        kind, flags, tmp_path, start_two):
    flags = [*flags[kind], "--batch-size", 31, "--micro-batch-size", 7]
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    succeed(KINDS[kind], *flags, "--out", one)
    for process in start_two(KINDS[kind], *flags, "--out", two):
        succeed_in_child(process)
    assert_close_logs(one, two, 1e-3)
    torch.testing.assert_close(read_model(one), read_model(two), rtol=1e-2, atol=1e-4)

    main, other = start_two(KINDS[kind], *flags, "--out", resumed,
                            at=("log.csv", 2, signal.SIGKILL))
    main.join(120)
    assert main.exitcode == -signal.SIGKILL
    end(other)
    for process in start_two(KINDS[kind], "--out", resumed, "--resume"):
        succeed_in_child(process)
    assert_same_run(two, resumed)


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "linear"])
def test_two_processes_leave_together_and_end_well_every_time(kind, flags, tmp_path, start_two):
    """One that leaves while the other is still writing can end in an abort."""
    for i in range(4):
        for process in start_two(KINDS[kind], *flags[kind], "--out", tmp_path / str(i)):
            succeed_in_child(process)
    main, other = start_two(KINDS[kind], *flags[kind], "--out", tmp_path / "slow",
                            at=("curves.png", 1, signal.SIGSTOP))
    wait_for(lambda: is_stopped(main))
    other.join(1)
    assert other.exitcode is None
    os.kill(main.pid, signal.SIGCONT)
    succeed_in_child(main)
    succeed_in_child(other)


# ------------------------------------------------------------------------------ bad input


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)}


def assert_bad_input(folder: Path, message: str, program, *flags) -> None:
    """One line on standard error that holds `message`, status 2, `folder` as it was."""
    before = snapshot(folder)
    status, _, err = run(program, *flags)
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert snapshot(folder) == before


@pytest.mark.parametrize("number, good, bad", [
    (data.number(int, 1), ["1", "7", "1000000"], ["0", "-3", "2.5", "many", "", "nan", "1e3"]),
    (data.number(int, 0, 9), ["0", "9"], ["-1", "10"]),
    (data.number(float, 0, 1), ["0", "1", "0.5", "1e-3"], ["-0.1", "1.1", "nan", "inf", "x"]),
    (data.number(float, 0, 1, open_ends=True), ["0.5"], ["0", "1", "nan", "-inf"]),
    (data.number(float, 0), ["0", "1e300"], ["inf", "-1", "1e999"])])
def test_a_number_is_within_its_range(number, good, bad):
    for text in good:
        assert number(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            number(text)


BAD_INPUT = [
    (pretrain, "--epochs 0", "--epochs: '0' is not a whole number of at least 1"),
    (pretrain, "--mask-ratio 1", "--mask-ratio: '1' is not a number above 0 and below 1"),
    (pretrain, "--base-lr 1e300", "--base-lr"),
    (pretrain, "--batch-size 0", "--batch-size"),
    (pretrain, "--micro-batch-size 0", "--micro-batch-size"),
    (pretrain, "--checkpoint-every 0", "--checkpoint-every"),
    (pretrain, "--seed -1", "--seed"),
    (pretrain, "--device tpu", "--device"),
    (pretrain, "--recipe best", "--recipe"),
    (pretrain, "--epoch 3", "unrecognized arguments: --epoch 3"),
    (pretrain, "--epochs 2 --warmup-epochs 3", "--warmup-epochs 3 is longer than --epochs 2"),
    (pretrain, "--patch-size 16 --mask-ratio 0.95", "leaves no visible patch out of 4"),
    (pretrain, "--patch-size 16 --mask-ratio 0.05", "leaves no masked patch out of 4"),
    (pretrain, "--patch-size 5", "patch size 5 does not divide an image of 32 x 32"),
    (pretrain, "--heads 3", "a width of 16 is not divisible by 3 heads"),
    (pretrain, "--decoder-heads 3", "a width of 16 is not divisible by 3 heads"),
    (pretrain, "--limit 201", "--limit 201: only 200 training images"),
    (pretrain, "--validation 200", "--validation 200: cifar10 has 200 training images"),
    (pretrain, "--data-dir {data}/cifar-10-batches-bin", "is the folder of CIFAR-10 itself"),
    (pretrain, "--benchmark --out {empty}/x", "--benchmark leaves no run"),
    (pretrain, "--out {empty}/file/run", "file/run: Not a directory"),
    (pretrain, "--out {empty}/file", "file: File exists"),
    (pretrain, "--out {runs}/finetune", "{runs}/finetune already holds a run"),
    (pretrain, "--resume", "--resume needs --out RUN"),
    (pretrain, "--resume --out {empty}", "{empty} does not hold a run"),
    (pretrain, "--resume --out {runs}/finetune", "settings of a run of pretrain.py"),
    (pretrain, "--resume --out {runs}/pretrain --dim 32", "--dim: the run in"),
    (pretrain, "--resume --out {runs}/pretrain --epochs 2", "--epochs: the run in"),
    (pretrain, "--resume --out {runs}/pretrain --norm-pix-loss", "--norm-pix-loss: the run in"),
    (pretrain, "--resume --out {runs}/pretrain --limit 200", "--limit: the run in"),
    (finetune, "--mask-ratio 1", "mask ratio 1.0 is not between 0 and 1"),
    (finetune, "--labels-per-class 5000", "only 10 of the 96 training images"),
    (finetune, "--init {empty}/nothing.pt", "{empty}/nothing.pt: No such file"),
    (finetune, "--init {empty}", "{empty}/checkpoint.pt: No such file"),
    (finetune, "--init {runs}/finetune", "from pretrain.py is needed"),
    (finetune, "--init {runs}/pretrain --dim 32", "--dim"),
    (finetune, "--init {runs}/pretrain --depth 2", "--depth"),
    (finetune, "--out {runs}/pretrain", "{runs}/pretrain already holds a run"),
    (finetune, "--resume --out {runs}/finetune --no-mix", "--mix: the run in"),
    (finetune, "--resume --out {runs}/finetune --mode linear", "--mode: the run in"),
    (finetune, "--resume --out {runs}/pretrain", "settings of a run of finetune.py"),
    (finetune, "--mode linear", "--mode linear needs --init"),
    *((finetune, f"--mode linear --init {{runs}}/pretrain {flag}", flag.split()[0])
      for flag in ("--augment flip", "--mask-ratio 0.5", "--mix", "--optimizer muon", "--repeat 2",
                   "--layer-decay 0.5", "--benchmark")),
    (finetune, "--evaluate {runs}/pretrain", "from finetune.py is needed"),
    (finetune, "--evaluate {runs}/finetune --dataset cifar100", "distinguishes 10 classes"),
    (finetune, "--evaluate {runs}/finetune --epochs 3", "unrecognized arguments: --epochs 3"),
    (visualize, "--out {empty}/x.jpg", "must end in .png"),
    (visualize, "reconstruct {empty}/x.png --out {empty}/x.png", "is one of the pictures to read"),
    (visualize, "reconstruct --checkpoint {runs}/finetune", "from pretrain.py is needed"),
    (visualize, "reconstruct --checkpoint {runs}/pretrain --indices 40", "numbered 0 to 39"),
    (visualize, "reconstruct --checkpoint {runs}/pretrain --mask-ratio 0.99", "leaves no visible"),
    (visualize, "attention --checkpoint {runs}/pretrain --block 3", "--block 3: the encoder has 1"),
    (visualize, "attention --checkpoint {runs}/pretrain --patch 4,0", "--patch needs ROW,COLUMN"),
    (visualize, "timeline {runs}/finetune", "has no epoch-*.npy"),
    (visualize, "curves {runs}/finetune --metric loss", "choose from cross-entropy, accuracy, lr"),
    (visualize, "curves {empty}/nothing", "{empty}/nothing: No such file"),
    (visualize, "portrait", "portrait"),
]


@pytest.mark.parametrize("program, command, message", BAD_INPUT,
                         ids=[command for _, command, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_harms_nothing(program, command, message, runs, data_dir, flags,
                                                 tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file in the place of a folder")
    names = dict(runs=runs["pretrain"].parent, data=data_dir, empty=tmp_path)
    command = shlex.split(command.format(**names))
    if program is not visualize and not {"--resume", "--evaluate"} & set(command):
        init = "--init" in command and "nothing" not in str(command)
        base = flags["pretrain" if program is pretrain else "finetune" if init else "scratch"]
        command = [*base[:-1], *command] if init else [*base, *command]     # without --mix
    elif {"--evaluate", "reconstruct", "attention"} & set(command):
        command += ["--data-dir", data_dir]
    before = snapshot(names["runs"])
    assert_bad_input(tmp_path, message.format(**names), program, *command)
    assert snapshot(names["runs"]) == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(flags, tmp_path):
    explosive = ["--base-lr", 999, "--optimizer", "adamw", "--epochs", 50, "--warmup-epochs", 20]
    status, _, err = run(pretrain, *flags["pretrain"], *explosive, "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1 and "finite" in err and "--base-lr" in err
    assert all(value.isfinite().all() for value in read_model(tmp_path / "run").values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_there(flags, tmp_path):
    assert_bad_input(tmp_path, "--device cuda: torch finds no such device here", pretrain,
                     *flags["pretrain"], "--device", "cuda", "--out", tmp_path / "run")


@pytest.mark.parametrize("allocate", [
    lambda: np.empty((2**30, 2**20)), lambda: torch.empty(2**30, 2**20),
    lambda: bytearray(2**62)], ids=["numpy", "torch", "python"])
def test_too_little_memory_is_one_line(allocate, capsys):
    with pytest.raises(SystemExit) as stop, data.exit_on_bad_input():
        allocate()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: out of memory") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_too_little_memory_of_a_gpu_is_one_line_and_other_faults_keep_their_traceback(text):
    with pytest.raises(SystemExit), data.exit_on_bad_input():
        raise RuntimeError(text)
    for fault in (RuntimeError("of ours"), ValueError("of ours"), KeyError("of ours")):
        with pytest.raises(type(fault)), data.exit_on_bad_input():
            raise fault


def test_a_compiler_that_does_not_work(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    assert_bad_input(tmp_path, "--compile: torch.compile does not work here: division by zero",
                     pretrain, *flags["pretrain"], "--compile", "--out", tmp_path / "run")


DATA_FAULTS = {         # what data_batch_3.bin is -> its content, or None if it is missing; message
    "missing": (lambda good: None, "No such file"),
    "empty": (lambda good: b"", "has 0 bytes"),
    "truncated": (lambda good: good[:-100], "not a whole number of 3,073-byte CIFAR-10 records"),
    "a byte too long": (lambda good: good + b"!", "not a whole number"),
    "mislabelled": (lambda good: good[:3 * 3073] + b"\12" + good[3 * 3073 + 1:],
                    "record 3 has label 10"),
    "a web page": (lambda good: b"<html><h1>Moved</h1></html>", "has 27 bytes"),
    "of CIFAR-100": (lambda good: bytes(3074 * 20), "not a whole number"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_files_that_cannot_be(fault, data_dir, tmp_path, flags):
    damage, message = DATA_FAULTS[fault]
    folder = shutil.copytree(data_dir / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-bin")
    file = folder / "data_batch_3.bin"
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    for dataset in ("cifar10", "auto"):                     # never replaced if it is there
        command = [*flags["pretrain"], "--data-dir", tmp_path, "--dataset", dataset]
        assert_bad_input(tmp_path, message, pretrain, *command, "--out", tmp_path / "run")
        assert str(file) in run(pretrain, *command)[2]


def test_a_run_is_not_resumed_with_other_images(runs, tmp_path):
    shutil.copytree(runs["pretrain"], tmp_path / "run")
    write_records("cifar10", tmp_path / "other", count=18)
    assert_bad_input(tmp_path, "--limit 96: only 90", pretrain, "--out", tmp_path / "run",
                     "--resume", "--data-dir", tmp_path / "other")
    write_records("cifar10", tmp_path / "other", count=30)
    assert_bad_input(tmp_path, "trained and tested on [96, 40] images", pretrain, "--out",
                     tmp_path / "run", "--resume", "--data-dir", tmp_path / "other")


# Downloads.


@pytest.fixture
def server():
    """A web server on 127.0.0.1; server.answer(handler) decides what it says."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answer_with(content: bytes, length: int | None = None, status: int = 200,
                wait: threading.Event | None = None):
    """Send the content and then, if `wait` is given, wait for that before closing."""
    def answer(handler) -> None:
        with contextlib.suppress(OSError):
            handler.send_response(status)
            handler.send_header("Content-Length", str(length or len(content)))
            handler.end_headers()
            handler.wfile.write(content)
            handler.wfile.flush()
            if wait:
                wait.wait(60)
    return answer


@pytest.fixture(scope="session")
def archive(data_dir) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(data_dir / "cifar-10-batches-bin", "cifar-10-batches-bin")
    return buffer.getvalue()


def cifar10_at(server, archive: bytes) -> data.Source:
    """CIFAR-10, to be downloaded from a server of ours."""
    return replace(data.SOURCES["cifar10"], md5=hashlib.md5(archive).hexdigest(),
                   url=f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")


@pytest.mark.parametrize("fault", ["refused", "404", "cut off", "wrong checksum"])
def test_downloads_that_fail_leave_nothing_and_a_second_try_succeeds(
        fault, server, archive, data_dir, tmp_path, flags, monkeypatch):
    source = cifar10_at(server, archive)
    bad = replace(source, url="http://127.0.0.1:9/x.tar.gz") if fault == "refused" else source
    server.answer = {"404": answer_with(b"gone", status=404),
                     "cut off": answer_with(archive[:len(archive) // 2], length=len(archive)),
                     "refused": None,
                     "wrong checksum": answer_with(archive[:-1] + b"!")}[fault]
    monkeypatch.setitem(data.SOURCES, "cifar10", bad)
    command = [*flags["pretrain"], "--data-dir", tmp_path / "data", "--out", tmp_path / "run"]
    assert_bad_input(tmp_path, "http://127.0.0.1:", pretrain, *command)
    assert not list((tmp_path / "data").iterdir())

    server.answer = answer_with(archive)
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    succeed(pretrain, *command)
    assert snapshot(tmp_path / "data") == {
        name: content for name, content in snapshot(data_dir).items()
        if name.startswith("cifar-10-batches-bin")}


def test_a_server_that_falls_silent_is_not_waited_for(server, tmp_path):
    silence = threading.Event()
    server.answer = answer_with(b"the first bytes", length=1000, wait=silence)
    with pytest.raises(OSError, match="timed out"):
        data.fetch(f"http://127.0.0.1:{server.server_port}", tmp_path / "file", timeout=0.3)
    silence.set()


def test_a_killed_download_leaves_nothing_after_the_next_program(
        server, archive, tmp_path, flags, start, monkeypatch):
    source, silence = cifar10_at(server, archive), threading.Event()
    command = [*flags["pretrain"], "--data-dir", tmp_path / "data", "--out", tmp_path / "run"]
    server.answer = answer_with(archive[:-9], length=len(archive), wait=silence)
    process = start(pretrain, *command, source=source)
    wait_for(lambda: any(path.is_file() and path.stat().st_size
                         for path in (tmp_path / "data").rglob("*")))
    end(process)
    silence.set()
    assert len(list((tmp_path / "data").iterdir())) == 1    # what was killed
    server.answer = answer_with(archive)
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    succeed(pretrain, *command)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-bin"]


def test_auto_falls_back_to_shapes_loudly_and_says_so_everywhere(
        tmp_path, data_dir, flags, monkeypatch):
    source = replace(data.SOURCES["cifar10"], url="http://127.0.0.1:9/x.tar.gz")
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir / "shapes", tmp_path / "data" / "shapes")
    status, out, err = run(pretrain, *flags["pretrain"], "--dataset", "auto", "--data-dir", "data",
                           "--epochs", 1)
    assert status == 0 and "CIFAR-10 IS NOT HERE" in err and "data       shapes" in out
    assert read_settings(tmp_path / "runs/pretrain-shapes-laptop-96-images")["dataset"] == "shapes"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shapes"]
    assert_bad_input(tmp_path, "cannot download", pretrain, *flags["pretrain"], "--dataset",
                     "cifar10", "--data-dir", "data", "--out", "run")


# Checkpoints.


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(HERE / 'evil-was-here'))}",)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def save(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BAD_SETTINGS = [
    ("dim", "16"), ("dim", math.nan), ("dim", None), ("dim", 0), ("dim", [16]), ("dim", 32),
    ("dim", 16.0), ("dim", True), ("heads", 0), ("heads", 3), ("heads", None), ("depth", 2),
    ("depth", 10**9), ("patch_size", 5), ("patch_size", None), ("mask_ratio", 1.5),
    ("mask_ratio", None), ("mask_ratio", 0.99), ("batch_size", "32"), ("epochs", -1),
    ("epochs", None), ("dataset", "imagenet"), ("dataset", 7), ("dataset", None),
    ("norm_pix_loss", "yes"), ("decoder_dim", None), ("decoder_heads", 5), ("seed", 0.5),
    ("base_lr", math.inf), ("unknown", 1)]


def bad_checkpoints(good: dict):
    """Contents of files that are not a checkpoint, and what to change in a good one."""
    settings, log, model = good["settings"], good["log"], good["model"]
    yield from (b"", save(good)[:-2000], encode(Image.new("RGB", (9, 9))), pickle.dumps(Evil()),
                save([1, 2, 3]), save({"state_dict": model}))
    yield from ({"model": Evil()}, {"version": data.CHECKPOINT_VERSION + 1}, {"version": "new"},
                {"kind": "diffusion"}, {"kind": "classifier"}, {"epoch": 2}, {"epoch": "third"})
    (name, first), *others = model.items()
    yield from ({"model": model} for model in (
        None, [1, 2, 3], dict.fromkeys(model, "heavy"), dict(others), {**dict(others), 7: first},
        {**dict(others), "encoder.other": first}, {name: first, **dict(others[:-1])},
        {name: value[..., :1] for name, value in model.items()}))
    yield from ({"log": log} for log in (
        None, ["epoch 1", "epoch 2", "epoch 3"], [log[0] | {"loss": "small"}, *log[1:]],
        [log[0] | {"mood": 1.0}, *log[1:]], [{}, *log[1:]]))
    yield from ({"settings": bad} for bad in (
        None, list(settings), dict(list(settings.items())[1:]),
        *(settings | {name: value} for name, value in BAD_SETTINGS)))


def bad_optimizers(adamw: dict, muon: dict):
    """What cannot be the states of these two optimizers."""
    yield from (None, "adamw", [adamw], [muon, adamw], [{}, {}],
                [dict(list(adamw.items())[1:]), muon],
                [dict(zip(adamw, reversed(adamw.values()))), muon],
                [adamw, {i: {"average": state["average"].T} for i, state in muon.items()}])
    yield from ([{i: change(state) for i, state in adamw.items()}, muon] for change in (
        lambda state: state | {"exp_avg": state["exp_avg"][..., :1]},
        lambda state: state | {"step": 3},
        lambda state: dict.fromkeys(state, "fast"),
        lambda state: {"step": state["step"], "exp_avg": state["exp_avg"]}))


@pytest.fixture
def spoiled(runs, tmp_path) -> Path:
    """A copy of the run of pretrain.py, to be damaged."""
    return shutil.copytree(runs["pretrain"], tmp_path / "run")


def test_checkpoints_that_cannot_be(spoiled):
    file = spoiled / "checkpoint.pt"
    good = data.load_checkpoint(file)
    for content in bad_checkpoints(good):
        file.write_bytes(content if isinstance(content, bytes) else save(good | content))
        with pytest.raises(data.BadInput, match=re.escape(str(file))):
            data.load_model(file, "pretrain")
            pytest.fail(f"was loaded: {content}")
        if isinstance(content, bytes) or "settings" not in content:
            assert_bad_input(spoiled, str(file), pretrain, "--out", spoiled, "--resume")
    assert not (HERE / "evil-was-here").exists()


def test_states_of_optimizers_that_cannot_be(spoiled):
    good = data.load_checkpoint(spoiled)
    for states in bad_optimizers(*good["optimizers"]):
        data.save_checkpoint(spoiled / "checkpoint.pt", good | {"optimizers": states})
        assert_bad_input(spoiled, "the state of its optimizers is missing or does not fit",
                         pretrain, "--out", spoiled, "--resume")


@pytest.mark.parametrize("config", [
    "", "[]", "7", "{}", "[" * 10**5, "\udcff", '{"settings": null}', '{"settings": []}',
    '{"settings": {"dim": 16}}', {"dim": None}, {"epochs": "3"}, {"unknown": 1}],
                         ids=lambda config: repr(config)[:30])
def test_a_config_that_does_not_hold_the_settings_of_a_run(config, spoiled):
    if isinstance(config, dict):
        config = json.dumps({"settings": read_settings(spoiled) | config})
    (spoiled / "config.json").write_text(config, errors="surrogateescape")
    assert_bad_input(spoiled, "config.json does not hold the settings of a run of pretrain.py",
                     pretrain, "--out", spoiled, "--resume")


def test_every_program_refuses_a_damaged_checkpoint(runs, data_dir, flags, tmp_path):
    for kind in ("pretrain", "finetune"):
        (tmp_path / kind).write_bytes((runs[kind] / "checkpoint.pt").read_bytes()[:-2000])
    for program, command in [
            (finetune, [*flags["finetune"], "--init", tmp_path / "pretrain"]),
            (finetune, ["--evaluate", tmp_path / "finetune", "--data-dir", data_dir]),
            (visualize, ["reconstruct", "--checkpoint", tmp_path / "pretrain", "--data-dir",
                         data_dir])]:
        assert_bad_input(tmp_path, "is not a checkpoint, or it is damaged", program, *command)


# ------------------------------------------------------------------------------ pictures


def test_a_reconstruction_shows_what_was_masked_predicted_and_there():
    model, images, noise = tiny_mae(), data.unscale(random_images(3)), random_noise(3, 16)
    _, pred, mask = model(data.scale(images), noise)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    hidden = hidden.expand(-1, 3, -1, -1)
    predicted = data.unscale(unpatchify(pred, 8))
    tiles, errors = visualize.reconstruct(model, images, noise)
    masked, filled, original = tiles.unbind(dim=1)
    assert torch.equal(original, images)
    assert torch.equal(masked, torch.where(hidden, visualize.HIDDEN, images))
    assert torch.equal(filled, torch.where(hidden, predicted, images))
    assert torch.equal(visualize.reconstruct(model, images, noise, raw=True)[0][:, 1], predicted)
    for i in range(3):
        loss = model(data.scale(images[i:i + 1]), noise[i:i + 1])[0]
        assert errors[i].item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(visualize.reconstruct(model, images, noise, mask_ratio=0.5)[0],
                       visualize.reconstruct(tiny_mae(mask_ratio=0.5), images, noise)[0])


def test_normalised_predictions_are_brought_back_to_pixels():
    patches = patchify(random_images(2), 8)
    normalized = mae.normalize_patches(patches)
    torch.testing.assert_close(normalized.mean(dim=-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalized.std(dim=-1), torch.ones(2, 16), rtol=1e-4, atol=0)
    torch.testing.assert_close(mae.denormalize_patches(normalized, patches), patches)
    model, images = tiny_mae(norm_pix_loss=True), data.unscale(random_images(2))
    pred = model(data.scale(images), random_noise(2, 16))[1]
    pixels = mae.denormalize_patches(pred, patchify(data.scale(images), 8))
    assert torch.equal(visualize.reconstruct(model, images, random_noise(2, 16), raw=True)[0][:, 1],
                       data.unscale(unpatchify(pixels, 8)))


def test_a_timeline_is_drawn_from_the_tiles_of_each_epoch(tmp_path):
    images, noise, folder = data.unscale(random_images(5)), random_noise(5, 16), {}
    for epoch in (12, 7):
        torch.manual_seed(epoch)
        folder[epoch] = MAEViT(**TINY)
        visualize.save_epoch(tmp_path / "reconstructions", epoch, folder[epoch], images, noise, "")
    epochs = visualize.read_epochs(tmp_path)
    assert list(epochs) == [7, 12]
    for epoch, model in folder.items():
        assert torch.equal(epochs[epoch], visualize.reconstruct(model, images, noise)[0])


PICTURES = [
    "reconstruct --checkpoint {runs}/pretrain --indices 3,1,12",
    "reconstruct --checkpoint {runs}/pretrain --count 2 --raw --split train --mask-ratio 0.5",
    "ratios --checkpoint {runs}/pretrain",
    "timeline {runs}/pretrain",
    "timeline {runs}/pretrain --out x.gif",
    "timeline {runs}/pretrain --out x.webp",
    "curves {runs}/pretrain --log",
    "curves {runs}/finetune {runs}/scratch/log.csv {runs}/linear --x time",
    "attention --checkpoint {runs}/pretrain",
    "attention --checkpoint {runs}/finetune --patch 1,2 --block 1",
    "embeddings --checkpoint {runs}/pretrain",
    "embeddings --checkpoint {runs}/linear",
    "architecture --checkpoint {runs}/pretrain",
]


@pytest.mark.parametrize("command", PICTURES)
def test_every_picture_is_drawn(command, runs, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *_ = command = shlex.split(command.format(runs=runs["pretrain"].parent))
    if name not in ("timeline", "curves", "embeddings"):
        command += ["--data-dir", data_dir]
    out = succeed(visualize, *command)
    file, = tmp_path.iterdir()
    assert out.endswith(f"wrote {file.name}\n")
    with Image.open(file) as picture:
        if file.suffix != ".png":
            assert picture.n_frames == 3
        assert picture.width >= 640
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    if name == "reconstruct":
        assert len(re.findall("error [0-9.]+", out)) >= 2


@pytest.mark.parametrize("patch_size", [1, 32])
def test_embeddings_fit_on_the_page_at_any_patch_size(patch_size):
    """Nothing is drawn on the margins."""
    model = tiny_mae(patch_size=patch_size, dim=16, mask_ratio=0.5) if patch_size == 1 else \
        ViTClassifier(mae.Encoder(32, patch_size, 16, 1, 2))
    pixels = np.asarray(visualize.draw_embeddings(model, "a caption"))
    assert (pixels[:, -10:] == 255).all() and (pixels[-10:] == 255).all()


def test_curves_of_runs_of_different_length_differ_in_colour():
    rows = [{"epoch": e, "train_loss": 2 - e / 9, "test_loss": 2 - e / 10, "lr": 0.1,
             "train_accuracy": 9.0 * e, "test_accuracy": 8.0 * e, "seconds": 3.0}
            for e in range(1, 9)]
    picture = visualize.draw_curves({"long": rows, "short": rows[:3]})
    colors = [color for _, color in picture.getcolors(1 << 20)]
    assert all(color in colors for color in visualize.COLORS[:2])
    assert visualize.COLORS[0] in [color for _, color in visualize.draw_curves(
        {"one": rows[:1]}).getcolors(1 << 20)]              # a single epoch is a dot


def test_pictures_of_every_kind_simply_work(runs, tmp_path):
    square = Image.fromarray(data.unscale(random_images(1))[0].permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6                                        # stored lying on its left side
    deep = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    kinds = {
        "rgba.png": encode(square.convert("RGBA")), "palette.png": encode(square.quantize(64)),
        "grey.png": encode(square.convert("L")), "16-bit.png": encode(deep),
        "1x1.png": encode(square.crop((0, 0, 1, 1))), "wide.png": encode(square.resize((99, 7))),
        "turned.jpg": encode(square.rotate(90), "JPEG", exif=exif, quality=100, subsampling=0)}
    for name, content in kinds.items():
        (tmp_path / name).write_bytes(content)
    out = succeed(visualize, "reconstruct", *(tmp_path / name for name in kinds), "--checkpoint",
                  runs["pretrain"], "--out", tmp_path / "out.png")
    assert all(Path(name).stem in out for name in kinds)
    upright = visualize.read_image(tmp_path / "turned.jpg", 32).permute(1, 2, 0).numpy()
    assert abs(upright.astype(int) - np.asarray(square)).mean() < 8
    assert (visualize.read_image(tmp_path / "rgba.png", 32).permute(1, 2, 0).numpy()
            == np.asarray(square)).all()
    bright = visualize.read_image(tmp_path / "16-bit.png", 32)[0].numpy()
    assert abs(bright.astype(int) - np.asarray(deep) // 256).max() <= 1


def tiles_of(images: int, side: int = 32, kind: type = np.uint8, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((images, 3, 3, side, side), kind), **options)
    return buffer.getvalue()


LOG = "epoch,loss,test_loss,lr,seconds\n"
BROKEN_FILES = {    # what it is -> (subcommand, file, content, message)
    "a missing picture": ("reconstruct", "x.png", None, "No such file"),
    "a web page as a picture": ("reconstruct", "x.png", b"<html>", "cannot read the picture"),
    "an empty picture": ("reconstruct", "x.png", b"", "cannot read the picture"),
    "half a picture": ("reconstruct", "x.png", encode(
        Image.new("RGB", (500, 500)), compress_level=0)[:9000], "cannot read the picture"),
    "a decompression bomb": ("reconstruct", "x.png", encode(
        Image.new("1", (14_000, 14_000))), "cannot read the picture"),
    "a missing log": ("curves", "log.csv", None, "No such file"),
    "an empty log": ("curves", "log.csv", b"", "is not a log.csv"),
    "a log of other columns": ("curves", "log.csv", b"time,value\n1,2\n", "is not a log.csv"),
    "a binary log": ("curves", "log.csv", b"\0\xff\2", "is not a log.csv"),
    "a log without rows": ("curves", "log.csv", LOG.encode(), "has no epoch yet"),
    "a log that is cut off": ("curves", "log.csv", (
        LOG + "1,0.5,0.4,0.1,3\n2,0.4,0.").encode(), "line 3"),
    "a log with words": ("curves", "log.csv", (LOG + "1,much,0.4,0.1,3\n").encode(), "line 2"),
    "an epoch of 400 digits": ("curves", "log.csv", (
        LOG + "9" * 400 + ",1,0.4,0.1,3\n").encode(), "line 2"),
    "tiles that are something else": ("timeline", "epoch-0002.npy", b"<html>", "is damaged"),
    "tiles that run code": ("timeline", "epoch-0002.npy", pickle.dumps(Evil()), "is damaged"),
    "tiles of no images": ("timeline", "epoch-0002.npy", tiles_of(0), "is damaged"),
    "tiles of another size": ("timeline", "epoch-0002.npy", tiles_of(5, 16), "is damaged"),
    "tiles of other numbers": ("timeline", "epoch-0002.npy", tiles_of(5, 32, float), "is damaged"),
    "tiles of other images": ("timeline", "epoch-0002.npy", tiles_of(4), "shows other images"),
}


@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_files_that_cannot_be_drawn(fault, runs, tmp_path):
    command, name, content, message = BROKEN_FILES[fault]
    folder = tmp_path / "reconstructions" if command == "timeline" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "epoch-0001.npy").write_bytes(tiles_of(5))
    if content is not None:
        (folder / name).write_bytes(content)
    more = ["--checkpoint", runs["pretrain"]] if command == "reconstruct" else []
    assert_bad_input(tmp_path, message, visualize, command, tmp_path if command == "timeline"
                     else folder / name, *more, "--out", tmp_path / "out.png")
    assert not (HERE / "evil-was-here").exists()


@pytest.mark.parametrize("rows, note", [
    ("1,0.5,0.4,0.1,3\n2,nan,0.4,0.1,3\n3,0.3,0.4,0.1,3\n", "1 values are not finite"),
    ("1,1e-320,0.4,0.1,3\n2,0.3,1e300,0.1,3\n", "1 values are not finite"),
    ("1,0.5,0.4,0.1,\n", "1 values are not finite"), ("1,0.5,0.4,0.1,3", "")])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "as a spreadsheet writes it"])
def test_odd_values_in_a_log_are_gaps_and_are_noted(rows, note, mark, tmp_path):
    (tmp_path / "log.csv").write_bytes(mark + (LOG + rows).encode() + b"\n" * (rows[-1] != "\n"))
    for config in ("[]", "", '{"settings": 7}', '{"settings": {"dataset": [], "mask_ratio": "x"}}'):
        (tmp_path / "config.json").write_text(config)
        status, _, err = run(visualize, "curves", tmp_path, "--log", "--out", tmp_path / "out.png")
        assert status == 0 and note in err and (tmp_path / "out.png").exists()


# ------------------------------------------------------------------------------ the README


README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"^    (?:python|torchrun .*?) ((?:pretrain|finetune|visualize)\.py.*)$",
                      README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = {"--epochs": 1, "--batch-size": 100, "--device": "cpu", "--precision": "fp32"}
SMALL_MODEL = {"--patch-size": 8, "--dim": 48, "--depth": 1, "--heads": 3}
SMALL_IF_GIVEN = {"--labels-per-class": 2, "--validation": 8, "--repeat": 2, "--decoder-depth": 1}


def shrink(command: str) -> tuple:
    """The program of a command in the README, and its flags for a small model and data set."""
    file, *flags = shlex.split(command)
    program = sys.modules[file.removesuffix(".py")]
    if program is not visualize and not {"--resume", "--evaluate"} & set(flags):
        small = SMALL | ({} if "--init" in flags else SMALL_MODEL)
        small |= {} if "--recipe" in flags else {"--recipe": "laptop"}
        small |= {name: value for name, value in SMALL_IF_GIVEN.items() if name in flags}
        flags += [part for pair in small.items() for part in pair]
    return program, flags


def test_every_command_in_the_readme_works(tmp_path, data_dir, monkeypatch):
    """In the order of the README, on 200 images and a small model. A later flag wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "BENCHMARK_SECONDS", 0)
    for name, target in (("data", data_dir), ("results", HERE / "results"),
                         ("assets", HERE / "assets")):
        os.symlink(target, name)
    assert len(COMMANDS) > 15
    done = []
    for command in COMMANDS:
        program, flags = shrink(command)
        again = ["--out", f"runs/{len(done)}"] if command in done else []   # the same, by torchrun
        status, _, err = run(program, *flags, *again)
        assert status == 0, f"{command}: {err}"
        done.append(command)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1])
def test_every_snippet_in_the_readme_works(snippet, monkeypatch):
    if "timm" in snippet:
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(HERE)
    exec(snippet, {})


# ------------------------------------------------------------------------------ the results

RESULTS = HERE / "results"


def test_the_table_of_the_results_says_what_the_logs_say(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    page = tmp_path / "results" / "README.md"
    page.write_text(re.sub(r"(<!-- runs -->\n).*(<!-- end -->)", r"\1\2", page.read_text(),
                           flags=re.DOTALL))
    environment = {**os.environ, "RUNS": "none", "RESULTS": str(tmp_path / "results"),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", RESULTS / "reproduce.sh", "collect"], env=environment, check=True)
    assert snapshot(tmp_path / "results") == snapshot(RESULTS)
    with open(RESULTS / "runs.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {path.stem for path in RESULTS.glob("logs/*.csv")}
    for name, row in rows.items():
        last = visualize.read_log(RESULTS / "logs" / f"{name}.csv")[-1]
        assert float(row["test_loss"]) == last["test_loss"], name
        assert float(row["test_accuracy"] or 0) == last.get("test_accuracy", 0), name
    for path in RESULTS.glob("weights/*.pt"):
        log = data.load_model(path)[1]["log"]
        assert float(rows[path.stem]["test_loss"]) == log[-1]["test_loss"]


@pytest.mark.parametrize("tier", ["laptop", "gpu"])
def test_the_script_of_the_results_can_be_stopped_and_ends(tier, data_dir, tmp_path, monkeypatch):
    """First with a stand-in for python, which says what it is to do; then what it said."""
    script = (RESULTS / "reproduce.sh").read_text()
    trial, = re.findall(r"^#     RUNS=/tmp/try (.*)$", script, re.MULTILINE)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\nmkdir -p "$3"\ntouch "$3/$LEAVE"\n')
    (tmp_path / "python").chmod(0o755)

    def commands(leave: str) -> list[str]:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LEAVE": leave}
        command = f"RUNS=runs {trial} bash {RESULTS}/reproduce.sh {tier}"
        return subprocess.run(command, shell=True, env=environment, cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.splitlines()

    begun = commands("config.json")
    assert len(begun) >= 5
    for command, again in zip(begun, commands("weights.pt"), strict=True):
        assert again == " ".join(command.split()[:3]) + " --resume"
    assert commands("weights.pt") == []
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    os.symlink(data_dir, "data")
    for command in begun:
        file, *flags = shlex.split(command)
        flags += ["--repeat", 2] if "--repeat" in flags else []
        flags += ["--decoder-depth", 1] if file == "pretrain.py" else []
        succeed(sys.modules[file.removesuffix(".py")], *flags, "--device", "cpu")
    assert len(list((tmp_path / "runs").glob("*/weights.pt"))) == len(begun)
