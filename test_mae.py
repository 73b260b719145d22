"""The tests: `pytest test_mae.py`.

In order: the model, the data, the programs, interruption, several processes, bad input, pictures,
the README. Programs run through their command lines, `run(program, flags)`, on small models and
files made here; no test needs the network, and only one the real CIFAR-10.
"""
import argparse
import contextlib
import copy
import csv
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import mae
import pretrain
import visualize
from mae import MAEViT, PatchShuffle, ViTClassifier, patchify, unpatchify

HERE = Path(__file__).parent
torch.set_num_threads(1)     # models this small gain nothing from more
TINY = dict(patch_size=8, dim=16, depth=2, heads=2, decoder_dim=12, decoder_depth=1,
            decoder_heads=2)


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
    assert mask.unique(dim=0).shape[0] > 1700           # of the 1820 ways to choose 12 of 16


def test_masked_pixels_cannot_influence_the_encoder():
    model, images, noise = tiny_mae(), random_images(4), random_noise(4, 16)
    patches = patchify(images, 8).requires_grad_()
    visible, restore, mask = model.shuffle(patches, noise)
    latent = model.encoder(visible, restore)
    gradient, = torch.autograd.grad(latent.square().sum(), patches)
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


def test_decoder_depends_on_position_and_on_every_visible_patch():
    model, images, noise = tiny_mae(), random_images(2), random_noise(2, 16)
    _, pred, mask = model(images, noise)
    masked = pred[0][mask[0] == 1]
    assert (masked[0] - masked[1]).abs().max() > 1e-3   # the same mask token, another place
    images.requires_grad_()
    _, pred, mask = model(images, noise)
    gradient, = torch.autograd.grad(pred[mask == 1].square().sum(), images)
    assert (patchify(gradient, 8).abs().sum(dim=-1) > 0).equal(mask == 0)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier_sees_all_patches_and_computes_what_the_encoder_computes(pool):
    encoder, images = tiny_mae().encoder, random_images(2).requires_grad_()
    classifier = ViTClassifier(encoder, 5, pool)
    codes = encoder(patchify(images, 8))                # (2, 1 + 16, 16)
    code = codes[:, 0] if pool == "cls" else codes[:, 1:].mean(dim=1)
    torch.testing.assert_close(classifier(images), code @ classifier.head.weight.T)
    gradient, = torch.autograd.grad(classifier(images).square().sum(), images)
    assert (patchify(gradient, 8).abs().amax(dim=-1) > 0).all()
    noise = random_noise(2, 16)
    assert torch.equal(classifier(images, noise), classifier(images))   # mask ratio 0
    in_order = torch.arange(16).expand(2, -1)           # nothing masked: the codes of `restore`
    torch.testing.assert_close(encoder(patchify(images, 8), in_order), codes)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier_leaves_patches_out_where_noise_says_so(pool):
    encoder, noise = tiny_mae().encoder, random_noise(2, 16)
    images = random_images(2).requires_grad_()
    classifier = ViTClassifier(encoder, 5, pool, mask_ratio=0.75)
    gradient, = torch.autograd.grad(classifier(images, noise).square().sum(), images)
    seen = patchify(gradient, 8).abs().sum(dim=-1) > 0  # (2, 16)
    assert seen.equal(PatchShuffle(0.75)(patchify(images, 8), noise)[2] == 0)
    assert torch.equal(classifier(images), ViTClassifier(encoder, 5, pool).features(images)
                       @ classifier.head.weight.T)
    with pytest.raises(ValueError, match="leaves no visible patch out of 16"):
        ViTClassifier(encoder, mask_ratio=0.99)


def test_attention_maps_are_those_that_the_blocks_use():
    encoder, images = tiny_mae().encoder, random_images(2)
    maps = encoder.attention_maps(images)
    assert len(maps) == 2 and maps[0].shape == (2, 2, 17, 17)
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(2, 2, 17))
    block, tokens = encoder.blocks[0], encoder.embed(patchify(images, 8))
    v = block.attn.split_heads(block.norm1(tokens))[2]
    written_out = block.attn.proj((maps[0] @ v).transpose(1, 2).reshape(2, 17, 16))
    torch.testing.assert_close(block.attn(block.norm1(tokens)), written_out)


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
    for i in range(12):                                 # the names of timm's VisionTransformer
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


def test_a_small_batch_can_be_overfitted():
    model, images, noise = tiny_mae(dim=64, decoder_dim=64), random_images(2), random_noise(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(images, noise)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02                           # uniform pixels have a variance of 0.33


@pytest.mark.parametrize("make, message", [
    (lambda: MAEViT(patch_size=5), "patch size 5 does not divide"),
    (lambda: MAEViT(heads=5), "5 heads do not divide a width of 192"),
    (lambda: MAEViT(decoder_heads=7), "7 heads do not divide a width of 192"),
    (lambda: MAEViT(depth=0), "at least 1"),
    (lambda: MAEViT(mask_ratio=1.0), "mask ratio 1.0"),
    (lambda: MAEViT(mask_ratio=0.0), "mask ratio 0.0"),
    (lambda: MAEViT(patch_size=16, mask_ratio=0.95), "leaves no visible patch out of 4"),
    (lambda: MAEViT(patch_size=16, mask_ratio=0.05), "leaves no masked patch out of 4"),
    (lambda: tiny_mae()(torch.zeros(2, 3, 28, 28)), "images must be (B, 3, 32, 32)"),
    (lambda: tiny_mae()(torch.zeros(2, 1, 32, 32)), "images must be (B, 3, 32, 32)"),
    (lambda: patchify(torch.zeros(3, 32, 32), 4), "(B, C, H, W)"),
    (lambda: unpatchify(torch.zeros(1, 15, 48), 4), "no square RGB image"),
    (lambda: ViTClassifier(tiny_mae().encoder, pool="max"), "pool"),
    (lambda: ViTClassifier(tiny_mae().encoder, num_classes=0), "classes"),
])
def test_what_does_not_fit_together_is_a_value_error(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_bf16_follows_fp32_and_compiled_follows_eager():
    images, noise = 0.5 + 0.3 * random_images(8), random_noise(8, 16)

    def train(precision: str, compiled: bool) -> list[float]:
        machine = pretrain.Machine(torch.device("cpu"), precision, compiled)
        model = pretrain.prepare_model(tiny_mae(depth=1), machine)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            logged = pretrain.gradient(model, pretrain.masked_loss,
                                       (data.unscale(images), noise), 8, machine)
            losses.append(logged.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    exact = train("fp32", False)
    assert exact[-1] < 0.5 * exact[0]
    assert train("bf16", False) == pytest.approx(exact, rel=0.02)
    if not pretrain.missing_to_compile("cpu"):
        assert train("fp32", True) == pytest.approx(exact, rel=1e-4)


# ------------------------------------------------------------------------------ the data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A folder with the data set `shapes`, and small files in the formats of both CIFARs."""
    folder = tmp_path_factory.mktemp("data")
    data.load_dataset("shapes", folder)
    for name in ("cifar10", "cifar100"):
        write_records(name, folder, count=40 if name == "cifar10" else 300)
    return folder


def write_records(name: str, folder: Path, count: int) -> None:
    """Noise in a data set's binary format; each class has a colour, the same in all files."""
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
    small = order(3, 8, 0, 1)                           # fewer images than a batch
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
    padded = torch.nn.functional.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    for image, result in zip(padded, cropped):
        mirrored = image.flip(2)
        ways = [(dy, dx, source is mirrored) for dy, dx, source in
                itertools.product(range(9), range(9), (image, mirrored))
                if torch.equal(result, source[:, dy:dy + 32, dx:dx + 32])]
        assert len(ways) == 1
        seen.update(ways)
    assert len(seen) > 140                              # of 162


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
    inside = (height < 32) & (width < 32) & ~blended        # a box of the images' own shape,
    edges = changed[:, [0, -1]].any(dim=(1, 2)) | changed[:, :, [0, -1]].any(dim=(1, 2))
    assert ((height - width).abs() <= 1)[inside & ~edges].all() and (inside & ~edges).sum() > 50


def test_batches_are_mixed_smoothed_and_noised_where_settings_say_so():
    images, labels = data.unscale(random_images(12)), torch.arange(12) % 4
    settings = dict(seed=0, batch_size=4, repeat=2, num_classes=4, augment="none", mix=False,
                    label_smoothing=0.0, mask_ratio=0.0)

    def batches(**changes) -> list[tuple]:
        namespace = pretrain.argparse.Namespace(**{**settings, **changes})
        return list(finetune.epoch_batches(images, labels, namespace, 16, epoch=1))

    plain = batches()
    assert len(plain) == 6 and all(len(batch) == 2 for batch in plain)
    shown = torch.cat([batch[0] for batch in plain]).flatten(1)
    assert ((shown[:, None] == images.flatten(1)).all(dim=2).sum(dim=0) == 2).all()    # repeat
    for (x, y), (_, _, noise) in zip(plain, batches(mask_ratio=0.5)):
        assert noise.shape == (4, 16) and noise.unique().numel() == 64
    for (x, y), (same, targets) in zip(plain, batches(label_smoothing=0.2)):
        assert same.equal(x) and targets.argmax(dim=1).equal(y)
        torch.testing.assert_close(targets.amin(dim=1), torch.full((4,), 0.05))
    for (x, y), (mixed, targets) in zip(plain, batches(mix=True)):
        assert targets.shape == (4, 4) and not mixed.equal(x.float())


def test_smoothed_labels_share_a_part_of_the_probability():
    smoothed = finetune.smooth(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(smoothed, torch.tensor([[0.05, 0.05, 0.85, 0.05],
                                                       [0.85, 0.05, 0.05, 0.05]]))


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
    with pytest.raises(data.BadInput, match="in use, 1000 are of class disc"):
        dataset.balanced(1001, seed=0)


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


def assert_same_state(a, b) -> None:
    """Equal bit for bit: tensors, and whatever holds them."""
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_state(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, log and pictures of two runs are the same."""
    first, second = (data.load_checkpoint(folder / "checkpoint.pt") for folder in (a, b))
    for key in ("model", "optimizer", "epoch"):
        assert_same_state(first[key], second[key])
    assert read_log(a) == read_log(b)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
             for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith("reconstructions/"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture(scope="session")
def small(data_dir) -> list:
    """Flags of both programs: 96 of 200 random images, on the CPU."""
    return ["--dataset", "cifar10", "--data-dir", data_dir, "--limit", 96, "--batch-size", 32,
            "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="session")
def tiny(small) -> list:
    """The flags of a small model besides."""
    return [*small, "--patch-size", 8, "--dim", 16, "--depth", 1, "--heads", 2]


@pytest.fixture(scope="session")
def tiny_pretrain(tiny) -> list:
    return [*tiny, "--decoder-dim", 16, "--decoder-heads", 2]


MORE = {"pretrain": [], "finetune": ["--mix", "--label-smoothing", 0.1],
        "linear": ["--mode", "linear"]}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_pretrain, small) -> dict[str, Path]:
    """A finished run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("pretrain", "finetune", "scratch", "linear")
    out = {name: folder / name for name in names}
    succeed(pretrain, *tiny_pretrain, "--epochs", 3, "--out", out["pretrain"])
    init = ["--init", out["pretrain"]]
    succeed(finetune, *small, *init, *MORE["finetune"], "--epochs", 2, "--out", out["finetune"])
    succeed(finetune, *tiny_pretrain[:-4], "--epochs", 2, "--out", out["scratch"])
    succeed(finetune, *small, *init, *MORE["linear"], "--epochs", 12, "--out", out["linear"])
    return out


def test_pretraining_leaves_a_whole_run_folder(runs):
    out = runs["pretrain"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png",
                     *(f"reconstructions/epoch-{epoch:04}.png" for epoch in (1, 2, 3))}
    log = read_log(out)
    assert [row["epoch"] for row in log] == ["1", "2", "3"] and float(log[-1]["lr"]) == 0
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["dataset"] == "cifar10" and config["settings"]["dim"] == 16
    assert config["versions"]["torch"] == torch.__version__


def test_fine_tuning_starts_from_the_pretrained_encoder_and_scratch_does_not(runs, small, tmp_path):
    pretrained = data.load_checkpoint(runs["pretrain"])["model"]
    flags = [*small, "--epochs", 1, "--base-lr", 1e-12]
    succeed(finetune, *flags, "--init", runs["pretrain"], "--out", tmp_path / "init")
    started = data.load_checkpoint(tmp_path / "init")["model"]
    for name, value in started.items():
        if not name.startswith("head."):
            torch.testing.assert_close(value, pretrained[f"encoder.{name}"])
    sizes = ["--patch-size", 8, "--dim", 16, "--depth", 1, "--heads", 2]
    succeed(finetune, *flags, *sizes, "--seed", 7, "--out", tmp_path / "scratch")
    weight = data.load_checkpoint(tmp_path / "scratch")["model"]["blocks.0.attn.qkv.weight"]
    assert (weight - pretrained["encoder.blocks.0.attn.qkv.weight"]).abs().max() > 0.1
    tuned = data.load_checkpoint(runs["finetune"])["model"]["blocks.0.attn.qkv.weight"]
    assert not torch.equal(tuned, pretrained["encoder.blocks.0.attn.qkv.weight"])


def test_linear_probe_trains_the_head_alone_and_is_folded_into_it(runs, data_dir):
    pretrained = data.load_checkpoint(runs["pretrain"])["model"]
    checkpoint = data.load_checkpoint(runs["linear"])
    for name, value in checkpoint["model"].items():
        if not name.startswith("head."):
            assert torch.equal(value, pretrained[f"encoder.{name}"])
    log = read_log(runs["linear"])
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])
    out = succeed(finetune, "--evaluate", runs["linear"], "--data-dir", data_dir)
    assert f"test accuracy {float(log[-1]['test_accuracy']):.2f} %" in out
    assert f"loss {float(log[-1]['test_loss']):.4f}" in out


@pytest.mark.parametrize("kind", ["finetune", "scratch"])
def test_evaluate_prints_the_accuracy_of_the_last_epoch(runs, data_dir, kind):
    accuracy = float(read_log(runs[kind])[-1]["test_accuracy"])
    out = succeed(finetune, "--evaluate", runs[kind] / "checkpoint.pt", "--data-dir", data_dir)
    assert out.endswith(f"test accuracy {accuracy:.2f} %\n")
    half = succeed(finetune, "--evaluate", runs[kind] / "weights.pt", "--data-dir", data_dir)
    loss = float(read_log(runs[kind])[-1]["test_loss"])
    assert float(re.search("loss ([0-9.]+)", half)[1]) == pytest.approx(loss, abs=0.003)
    _, out, err = run(finetune, "--evaluate", runs[kind], "--dataset", "shapes",
                      "--data-dir", data_dir)
    assert "note: it learned from cifar10, not from shapes" in err and "test accuracy" in out


@pytest.mark.parametrize("flags", ["--epochs 20", "--epochs 60 --mode linear",
                                   "--epochs 30 --mix --label-smoothing 0.1 --mask-ratio 0"])
def test_a_classifier_learns_what_can_be_learned(flags, runs, small, tmp_path):
    """Classes that differ in colour alone: chance is 10 %."""
    succeed(finetune, *small, "--init", runs["pretrain"], *flags.split(), "--base-lr", 0.02,
            "--out", tmp_path / "run")
    assert float(read_log(tmp_path / "run")[-1]["test_accuracy"]) > 50


def test_repeat_shows_few_images_often(small, tmp_path, tiny):
    out = succeed(finetune, *tiny, "--labels-per-class", 2, "--repeat", 8, "--epochs", 1,
                  "--batch-size", 32, "--out", tmp_path / "run")
    assert "20 training" in out and "1 epochs of 5 steps of 32 images" in out


def test_settings_are_chosen_on_images_held_out_and_evaluated_on_the_test_images(
        data_dir, tmp_path, tiny):
    held_out = [*tiny, "--limit", 64, "--validation", 24, "--epochs", 1]
    out = succeed(pretrain, *held_out, "--out", tmp_path / "encoder")
    assert "64 training and 24 validation images" in out
    out = succeed(finetune, *held_out, "--labels-per-class", 1, "--out", tmp_path / "run")
    assert "10 training and 24 validation images" in out
    assert re.search(r"done: .*run, validation accuracy", out)
    out = succeed(finetune, "--evaluate", tmp_path / "run", "--data-dir", data_dir)
    assert "40 test images" in out


def test_an_encoder_that_is_unfinished_or_has_seen_the_validation_images_is_noted(
        runs, small, tmp_path):
    unfinished = data.load_checkpoint(runs["pretrain"])
    unfinished["settings"]["epochs"] = 5
    data.save_checkpoint(tmp_path / "unfinished.pt", unfinished)
    flags = [*small, "--epochs", 1, "--init"]
    _, _, err = run(finetune, *flags, runs["pretrain"], "--out", tmp_path / "run")
    assert "has done" not in err and "has seen" not in err
    _, _, err = run(finetune, *flags, tmp_path / "unfinished.pt", "--validation", 8,
                    "--out", tmp_path / "noted")
    assert "unfinished.pt has done 3 of its 5 epochs" in err
    assert "unfinished.pt has seen the validation images, without labels" in err


def test_a_run_from_before_there_were_validation_images_goes_on(runs, tmp_path):
    shutil.copytree(runs["pretrain"], tmp_path / "run")
    checkpoint = data.load_checkpoint(tmp_path / "run")
    del checkpoint["settings"]["validation"]
    data.save_checkpoint(tmp_path / "run" / "checkpoint.pt", checkpoint)
    succeed(pretrain, "--out", tmp_path / "run", "--resume", "--epochs", 4)
    assert len(read_log(tmp_path / "run")) == 4


def test_cifar100_has_a_hundred_classes(data_dir, tmp_path, tiny):
    succeed(finetune, *tiny, "--dataset", "cifar100", "--epochs", 1, "--out", tmp_path / "run")
    assert data.load_checkpoint(tmp_path / "run")["model"]["head.weight"].shape == (100, 16)


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = pretrain.argparse.Namespace(base_lr=1e-3, batch_size=512, warmup_epochs=5, epochs=25)

    def rate(epoch: float) -> float:
        return pretrain.learning_rate(settings, epoch)

    assert rate(0) == 0 and rate(2.5) == pytest.approx(1e-3) and rate(5) == pytest.approx(2e-3)
    assert rate(15) == pytest.approx(1e-3) and rate(25) == pytest.approx(0, abs=1e-12)
    assert rate(10) == pytest.approx(2e-3 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_its_optimizer_and_weight_decay(optimizer):
    """Weight decay spares biases, norms, tokens and positions; Muon steps matrices of blocks."""
    model = tiny_mae()
    settings = pretrain.argparse.Namespace(optimizer=optimizer, weight_decay=0.05)
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


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16)])
def test_orthogonalize_keeps_directions_and_makes_them_equally_long(shape):
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64),
                                full_matrices=False)
    lengths = torch.logspace(-2, 0, 16, dtype=torch.float64)    # the longest 100 times the shortest
    result = U.mT @ pretrain.orthogonalize(U @ (lengths[:, None] * Vh)) @ Vh.mT
    values = result.diagonal(dim1=1, dim2=2)
    assert (result - torch.diag_embed(values)).abs().max() < 1e-9   # the directions are kept
    assert 0.6 < values.min() and values.max() < 1.2


def test_muon_steps_as_that_of_torch_does():
    """Which is scaled to half of ours and computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(32, 64, generator=generator) for _ in range(2)]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
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


def test_expecting_a_time_changes_nothing():
    settings = pretrain.argparse.Namespace(optimizer="muon", weight_decay=0.05)
    model = tiny_mae()
    optimizers = pretrain.make_optimizers(model, settings, (0.9, 0.95))
    N = model.encoder.num_patches
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.rand(4, N)
    for optimizer in optimizers:                            # as in the middle of a run
        for group in optimizer.param_groups:
            group["lr"] = 0.1
    learners = model, *optimizers
    before = copy.deepcopy([learner.state_dict() for learner in learners])
    pretrain.say_expected(model, pretrain.masked_loss, iter([batch]), 8, 2, optimizers, 4,
                          pretrain.Machine(torch.device("cpu"), "fp32", False))
    torch.testing.assert_close([learner.state_dict() for learner in learners], before, rtol=0,
                               atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("recipe", ["full", "laptop"])
def test_the_first_loss_is_about_that_of_predicting_grey(recipe):
    torch.manual_seed(0)
    model = mae.build_model("pretrain", pretrain.RECIPES[recipe])
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    loss, pred, _ = model(images)
    assert pred.std() < 0.5 and loss < 1.7 * images.square().mean()


def test_layer_decay_scales_the_learning_rate_of_each_layer(runs, small, tmp_path):
    model = ViTClassifier(tiny_mae().encoder)               # of 2 blocks
    expected = {"patch_embed": 3, "cls_token": 3, "pos_embed": 3, "blocks.0": 2, "blocks.1": 1,
                "norm": 0, "head": 0}
    for name, _ in model.named_parameters():
        start = next(start for start in expected if name.startswith(start))
        assert finetune.layers_above(name, depth=2) == expected[start], name
    succeed(finetune, *small, "--init", runs["pretrain"], "--layer-decay", 0, "--epochs", 1,
            "--out", tmp_path / "run")                      # 0: only the top layer learns
    before = data.load_checkpoint(runs["pretrain"])["model"]
    for name, value in data.load_checkpoint(tmp_path / "run")["model"].items():
        if not name.startswith("head"):
            assert value.equal(before[f"encoder.{name}"]) == (not name.startswith("norm")), name


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_gradients_add_up_to_the_same_step_whatever_the_micro_batch(micro):
    machine = pretrain.Machine(torch.device("cpu"), "fp32", False)
    batch = (data.unscale(random_images(16)), random_noise(16, 16))

    def gradients(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = tiny_mae()
        loss = pretrain.gradient(model, pretrain.masked_loss, batch, size, machine)
        return loss, [parameter.grad for parameter in model.parameters()]

    (loss, whole), (loss_of_parts, parts) = gradients(16), gradients(micro)
    torch.testing.assert_close(loss, loss_of_parts)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", finetune.RECIPES)
def test_a_step_makes_nothing_on_another_device(recipe, monkeypatch):
    """As a GPU would find out; here on the device `meta`, whose tensors have no values."""
    machine = pretrain.Machine(torch.device("meta"), "fp32", False)
    monkeypatch.setattr(pretrain.Machine, "autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(data, "seeded_generator", lambda *_: torch.Generator())
    images, labels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long()
    dataset = data.Dataset("shapes", list(data.SHAPES), images, labels, images, labels)
    dataset = dataset.to(machine.device)

    def take_step(model, settings, objective, batches) -> None:
        model.to(machine.device)
        batch = next(batches)
        assert all(tensor.is_meta for tensor in batch)
        pretrain.gradient(model, objective, batch, 8, machine)
        for optimizer in pretrain.make_optimizers(model, settings, betas=(0.9, 0.95)):
            if isinstance(optimizer, pretrain.Muon):        # AdamW, torch's own, refuses meta
                optimizer.step()

    common = dict(depth=2, decoder_depth=1, seed=0, batch_size=16, num_classes=10, repeat=1)
    if recipe in pretrain.RECIPES:
        settings = argparse.Namespace(**{**pretrain.RECIPES[recipe], **common})
        model = mae.build_model("pretrain", vars(settings))
        take_step(model, settings, pretrain.masked_loss,
                  pretrain.epoch_batches(dataset, settings, model.encoder.num_patches, 1))
    settings = argparse.Namespace(**{**finetune.RECIPES[recipe], **common})
    model = mae.build_model("classifier", vars(settings))
    take_step(model, settings, finetune.classify, finetune.epoch_batches(
        dataset.train_images, dataset.train_labels, settings, model.num_patches, 1))


def test_a_seed_fixes_the_run_and_another_seed_changes_it(runs, tiny_pretrain, tmp_path):
    succeed(pretrain, *tiny_pretrain, "--epochs", 3, "--out", tmp_path / "pretrain")
    assert_same_run(runs["pretrain"], tmp_path / "pretrain")
    succeed(pretrain, *tiny_pretrain, "--epochs", 3, "--seed", 1, "--out", tmp_path / "other")
    assert read_log(tmp_path / "other") != read_log(runs["pretrain"])


@pytest.mark.parametrize("kind", ["pretrain", "scratch", "linear"])
def test_benchmark_prints_a_speed_and_writes_nothing(kind, tiny_pretrain, tiny, small, runs,
                                                     tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "BENCHMARK_SECONDS", 0)
    flags = {"pretrain": tiny_pretrain, "scratch": tiny,
             "linear": [*small, "--init", runs["pretrain"], "--mode", "linear"]}[kind]
    out = succeed(pretrain if kind == "pretrain" else finetune, *flags, "--benchmark")
    assert re.search(r"speed +[\d,.]+ images/s", out) and "GFLOP an image" in out
    assert "MiB at the peak" in out and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ interruption


def run_in_child(module: str, flags: list[str], errors: str, limit_file_size: int | None) -> None:
    """A program in a process of its own, its standard error in a file."""
    torch.set_num_threads(1)
    sys.stderr = open(errors, "w", buffering=1)
    sys.stdout = open(os.devnull, "w")
    if limit_file_size:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_size, limit_file_size))
    with data.exit_on_bad_input():
        sys.modules[module].main(flags)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(program, flags) -> a process that runs a program, forked from one that has imported
    torch already; `process.errors` is the file of its standard error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_mae"])
    folder, count = tmp_path_factory.mktemp("errors"), itertools.count()

    def start(program, *flags, limit_file_size: int | None = None):
        errors = folder / str(next(count))
        process = context.Process(target=run_in_child, args=(
            program.__name__, [str(flag) for flag in flags], str(errors), limit_file_size))
        process.start()
        process.errors = errors
        return process
    return start


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("program, kind, epochs", [
    (pretrain, "pretrain", 3), (finetune, "finetune", 2), (finetune, "linear", 12)])
def test_a_run_stopped_after_an_epoch_ends_bit_for_bit_where_the_unbroken_one_does(
        program, kind, epochs, runs, tmp_path, monkeypatch, tiny_pretrain, small):
    out, save, saved = tmp_path / kind, data.save_checkpoint, []

    def save_then_stop(path, checkpoint):
        save(path, checkpoint)
        if path.name == "checkpoint.pt":
            saved.append(checkpoint["epoch"])
            if len(saved) == epochs:                        # epochs 0, 1, ... are saved: not all
                raise KeyboardInterrupt

    monkeypatch.setattr(data, "save_checkpoint", save_then_stop)
    monkeypatch.setattr(pretrain, "FREE_SECONDS", math.inf)     # also where the disk is slow
    flags = tiny_pretrain if program is pretrain else [*small, "--init", runs["pretrain"]]
    flags = [*flags, *MORE[kind]]
    status, _, err = run(program, *flags, "--epochs", epochs, "--out", out)
    assert status == 130
    assert f"python {program.__name__}.py --out {out} --resume" in err
    monkeypatch.undo()
    assert data.load_checkpoint(out)["epoch"] == epochs - 1
    (out / "reconstructions").mkdir(exist_ok=True)
    if program is pretrain:                                 # a picture of the future
        (out / "reconstructions" / "epoch-0099.png").write_bytes(b"")
    else:
        (out / "reconstructions").rmdir()
    succeed(program, "--out", out, "--resume")
    assert_same_run(out, runs[kind])
    assert "done" in succeed(program, "--out", out, "--resume")     # nothing is left to do
    assert_same_run(out, runs[kind])


def test_where_checkpoints_cost_much_there_are_few_and_nothing_else_changes(
        runs, tiny_pretrain, tmp_path, monkeypatch):
    out, write_log = tmp_path / "pretrain", pretrain.write_log

    def interrupt(*_):
        raise KeyboardInterrupt

    def write_two_then_stop(out, log):
        write_log(out, log)
        if len(log) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.Pace, "is_due", lambda pace: pace.end == -math.inf)
    monkeypatch.setattr(pretrain, "write_log", write_two_then_stop)
    status, _, _ = run(pretrain, *tiny_pretrain, "--epochs", 3, "--out", out)
    assert status == 130 and len(read_log(out)) == 2
    assert data.load_checkpoint(out)["epoch"] == 0
    monkeypatch.setattr(pretrain, "write_log", write_log)
    monkeypatch.setattr(pretrain, "train_epoch", interrupt)
    assert run(pretrain, "--out", out, "--resume")[0] == 130
    assert not (out / "log.csv").exists()                   # no row beyond the checkpoint
    monkeypatch.undo()
    succeed(pretrain, "--out", out, "--resume")
    assert_same_run(out, runs["pretrain"])


def test_checkpoints_take_a_twentieth_of_the_time_where_they_are_not_short(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = pretrain.Pace()
    assert pace.is_due()
    for seconds, wait in ((0.01, 0), (0.09, 0), (0.5, 10), (5, 100)):
        with pace.timed():
            now += seconds
        now += max(wait - 0.01, 0)
        assert pace.is_due() == (wait == 0)
        now += 0.02
        assert pace.is_due()


def test_a_run_killed_at_many_random_moments_ends_where_the_unbroken_one_does(
        tiny_pretrain, tmp_path, start):
    flags = [*tiny_pretrain, "--epochs", 8, "--picture-every", 2]
    began = time.monotonic()
    process = start(pretrain, *flags, "--out", tmp_path / "unbroken" / "run")
    process.join()
    assert process.exitcode == 0, process.errors.read_text()
    length, rng, kills = time.monotonic() - began, random.Random(0), 0
    out = tmp_path / "killed" / "run"
    while kills < 24 or process.exitcode:
        resume = (out / "checkpoint.pt").exists()
        process = start(pretrain, *(["--resume"] if resume else flags), "--out", out)
        process.join(rng.uniform(0.05, 0.3) * length if kills < 24 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, process.errors.read_text()
            assert_same_run(tmp_path / "unbroken" / "run", out)
            if kills < 24:
                shutil.rmtree(out)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(number, status, tiny_pretrain, tmp_path, start):
    out = tmp_path / "run"
    process = start(pretrain, *tiny_pretrain, "--epochs", 2000, "--out", out)
    wait_for(lambda: (out / "log.csv").exists())
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    last = process.errors.read_text().strip().splitlines()[-1]
    assert last == f"stopped. Go on with: python pretrain.py --out {out} --resume"


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(runs, tmp_path, start):
    out = tmp_path / "run"
    shutil.copytree(runs["pretrain"], out)
    before = (out / "checkpoint.pt").read_bytes()
    process = start(pretrain, "--out", out, "--resume", "--epochs", 9,
                    limit_file_size=len(before) // 2)
    process.join(60)
    assert process.exitcode == 2
    assert f"error: cannot write {out / 'checkpoint.pt'}" in process.errors.read_text()
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.rglob(".*"))


def test_more_epochs_can_be_asked_for_and_what_the_schedule_does_is_said(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs["pretrain"], out)
    text = succeed(pretrain, "--out", out, "--resume", "--epochs", 5)
    assert "the cosine now ends after epoch 5 instead of 3" in text
    log = read_log(out)
    assert [row["epoch"] for row in log] == list("12345")
    assert log[:3] == read_log(runs["pretrain"]) and float(log[3]["lr"]) > 0 == float(log[4]["lr"])


def test_a_run_folder_deleted_underneath_is_a_clear_error(tiny_pretrain, tmp_path, start):
    out = tmp_path / "run"
    process = start(pretrain, *tiny_pretrain, "--epochs", 2000, "--out", out)
    wait_for(lambda: (out / "log.csv").exists())
    out.rename(tmp_path / "elsewhere")
    process.join(60)
    assert process.exitcode == 2
    assert f"error: {out} was deleted or emptied" in process.errors.read_text()
    assert data.load_checkpoint(tmp_path / "elsewhere") and read_log(tmp_path / "elsewhere")


def test_two_programs_cannot_write_to_one_folder(tiny_pretrain, tmp_path, start):
    out = tmp_path / "run"
    process = start(pretrain, *tiny_pretrain, "--epochs", 2000, "--out", out)
    wait_for(lambda: (out / "log.csv").exists())
    status, _, err = run(pretrain, "--out", out, "--resume", "--device", "cpu")
    process.kill()
    process.join()
    assert status == 2 and f"another program is writing to {out}" in err


def test_a_run_does_not_go_on_with_other_images(runs, tmp_path, data_dir):
    shutil.copytree(runs["pretrain"], tmp_path / "run")
    write_records("cifar10", tmp_path / "other", count=30)
    assert_bad_input(tmp_path, "holds 150 + 30 images, the run was made with 200 + 40", pretrain,
                     "--out", tmp_path / "run", "--resume", "--data-dir", tmp_path / "other")


# ------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("program, name", [(pretrain, "pretrain"), (finetune, "finetune"),
                                           (finetune, "linear")])
def test_two_processes_compute_what_one_does(program, name, runs, tiny_pretrain, small, tmp_path):
    flags = tiny_pretrain if program is pretrain else [*small, "--init", runs["pretrain"]]
    flags = [*flags, *MORE[name], "--epochs", len(read_log(runs[name]))]
    flags += [] if name == "linear" else ["--micro-batch-size", 8]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", HERE / f"{program.__name__}.py", *flags, "--out", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True,
                            text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/") == 1             # only one prints
    for one, two in zip(read_log(runs[name]), read_log(tmp_path / "two"), strict=True):
        for column, value in one.items():
            assert float(two[column]) == pytest.approx(float(value), rel=1e-3), column
    one, two = (data.load_checkpoint(folder)["model"] for folder in (runs[name], tmp_path / "two"))
    for parameter in one:
        torch.testing.assert_close(one[parameter], two[parameter], rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------------------ bad input


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)}


def assert_bad_input(folder: Path, message: str, program, *flags) -> None:
    """One line on standard error that holds `message`, status 2, `folder` as it was."""
    before = snapshot(folder)
    status, _, err = run(program, *flags)
    assert status == 2, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line, err
    assert "Traceback" not in err
    assert snapshot(folder) == before


FLAG_FAULTS = [
    (pretrain, "--epochs -3", "--epochs: '-3' is not a whole number of at least 1"),
    (pretrain, "--epochs 0", "--epochs"),
    (pretrain, "--epochs 2.5", "--epochs"),
    (pretrain, "--epochs many", "--epochs"),
    (pretrain, "--mask-ratio 0", "--mask-ratio: '0' is not a number above 0 and below 1"),
    (pretrain, "--mask-ratio 1", "--mask-ratio"),
    (pretrain, "--mask-ratio 1.5", "--mask-ratio"),
    (pretrain, "--mask-ratio nan", "--mask-ratio"),
    (pretrain, "--patch-size 16 --mask-ratio 0.95", "leaves no visible patch out of 4"),
    (pretrain, "--patch-size 16 --mask-ratio 0.05", "leaves no masked patch out of 4"),
    (pretrain, "--batch-size 0", "--batch-size"),
    (pretrain, "--micro-batch-size 64", "--micro-batch-size 64 does not divide the 32"),
    (pretrain, "--micro-batch-size 5", "--micro-batch-size 5 does not divide the 32"),
    (pretrain, "--epochs 2 --warmup-epochs 3", "--warmup-epochs 3.0 is longer than --epochs 2"),
    (pretrain, "--base-lr 0", "--base-lr"),
    (pretrain, "--base-lr inf", "--base-lr"),
    (pretrain, "--weight-decay -1", "--weight-decay"),
    (pretrain, "--seed -1", "--seed"),
    (pretrain, "--limit 0", "--limit"),
    (pretrain, "--limit 201", "--limit 201: cifar10 has 200 training images"),
    (pretrain, "--patch-size 5", "patch size 5 does not divide an image of 32 x 32"),
    (pretrain, "--heads 3", "3 heads do not divide a width of 16"),
    (pretrain, "--decoder-heads 3", "3 heads do not divide a width of 16"),
    (pretrain, "--device tpu", "--device"),
    (pretrain, "--precision fp8", "--precision"),
    (pretrain, "--recipe best", "--recipe"),
    (pretrain, "--epoch 3", "unrecognized arguments: --epoch 3"),
    (pretrain, "--resume", "--resume needs --out"),
    (pretrain, "--resume --out {empty}", "holds no run"),
    (pretrain, "--out {runs}/pretrain", "already holds a run: go on with `python pretrain.py"),
    (pretrain, "--out {runs}/pretrain --resume --dim 32", "--dim 32 contradicts the run"),
    (pretrain, "--out {runs}/pretrain --resume --epochs 2", "--epochs 2 contradicts the run"),
    (pretrain, "--out {runs}/pretrain --resume --norm-pix-loss", "--norm-pix-loss"),
    (pretrain, "--out {runs}/pretrain --resume --optimizer adamw", "--optimizer adamw contradicts"),
    (pretrain, "--out {runs}/finetune --resume", "holds a classifier from finetune.py"),
    (pretrain, "--out {empty}/file/run", "cannot write"),
    (pretrain, "--base-lr 1e30 --epochs 2 --out {empty}/nan", "no longer finite in epoch 1, step"),
    (pretrain, "--benchmark --out {empty}/x", "--out does nothing with --benchmark"),
    (finetune, "--mode linear", "--mode linear needs --init"),
    (finetune, "--mode linear --init {runs}/pretrain --batch-size 1", "--batch-size 1"),
    (finetune, "--mode linear --init {runs}/pretrain --micro-batch-size 8", "--micro-batch-size"),
    (finetune, "--evaluate {runs}/finetune --resume --out {empty}", "does nothing with --evaluate"),
    (finetune, "--mode linear --init {runs}/pretrain --augment flip", "--augment flip"),
    (finetune, "--mode linear --init {runs}/pretrain --mask-ratio 0.5", "--mask-ratio 0.5"),
    (finetune, "--mode linear --init {runs}/pretrain --mix", "--mix"),
    (finetune, "--mode linear --init {runs}/pretrain --optimizer muon", "--optimizer muon"),
    (finetune, "--mode linear --init {runs}/pretrain --repeat 2", "--repeat 2"),
    (finetune, "--label-smoothing 1", "--label-smoothing"),
    (finetune, "--mode linear --init {runs}/pretrain --no-mix --resume", "--resume needs --out"),
    (finetune, "--out {runs}/linear --resume --micro-batch-size 4", "--micro-batch-size does noth"),
    (finetune, "--out {runs}/finetune --resume --no-mix", "--no-mix contradicts the run"),
    (finetune, "--dim 1000000 --heads 1 --depth 1", "out of memory"),
    (finetune, "--repeat 0", "--repeat: '0' is not a whole number of at least 1"),
    (finetune, "--mask-ratio 1", "mask ratio 1.0 is not between 0 and 1"),
    (finetune, "--init {runs}/pretrain --dim 32", "--dim 32 contradicts"),
    (finetune, "--init {runs}/pretrain --out {runs}/finetune", "already holds a run"),
    (finetune, "--init {runs}/finetune", "an autoencoder from pretrain.py is needed"),
    (finetune, "--init {empty}/nothing.pt", "No such file"),
    (finetune, "--out {runs}/finetune --resume --pool cls", "--pool cls contradicts the run"),
    (finetune, "--out {runs}/pretrain --resume", "a classifier from finetune.py is needed"),
    (finetune, "--labels-per-class 5000", "5000: of the 96 training images of cifar10"),
    (finetune, "--validation 200", "200: cifar10 has 200 training images"),
    (finetune, "--evaluate {runs}/pretrain", "a classifier from finetune.py is needed"),
    (finetune, "--evaluate {runs}/finetune --dataset cifar100", "tells 10 classes apart"),
    (finetune, "--evaluate {runs}/finetune --epochs 3", "--epochs"),
]


@pytest.mark.parametrize("program, flags, message", FLAG_FAULTS,
                         ids=[flags for _, flags, _ in FLAG_FAULTS])
def test_flags_that_cannot_be(program, flags, message, runs, data_dir, small, tiny_pretrain,
                              tmp_path, monkeypatch):
    if "nan" in flags:
        monkeypatch.setattr(pretrain, "save_epoch", lambda *_, **__: None)
        monkeypatch.setattr(pretrain, "write_config", lambda *_: None)
    (tmp_path / "file").write_text("a file where a folder is wanted")
    flags = shlex.split(flags.format(runs=runs["pretrain"].parent, empty=tmp_path))
    base = tiny_pretrain if program is pretrain else small
    if "--evaluate" in flags or "--resume" in flags:
        base = ["--data-dir", data_dir]
    monkeypatch.chdir(tmp_path)
    assert_bad_input(tmp_path, message, program, *base, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_there(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(tmp_path, "--device cuda: torch finds no such device here", pretrain, *small,
                     "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)   # one without bfloat16
    monkeypatch.setattr(pretrain, "multiplies_bf16", lambda device: False)
    assert_bad_input(tmp_path, "--precision bf16: this cuda device cannot", pretrain, *small,
                     "--device", "cuda", "--precision", "bf16")


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_memory_that_is_not_there(text, capsys):
    with pytest.raises(SystemExit) as stop, data.exit_on_bad_input():
        raise RuntimeError(text)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory")


def test_a_compiler_that_is_not_there(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_bad_input(tmp_path, "--compile needs a compiler (no-such-compiler)", pretrain, *small,
                     "--compile")


def replace_first(content: bytes):
    return lambda path: path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def mislabel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3 * 3073] = 10
    path.write_bytes(content)


def forbid(path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may read every file")
    path.chmod(0)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DATA_FAULTS = {
    "missing file": (Path.unlink, "No such file"),
    "empty file": (replace_first(b""), "has 0 bytes"),
    "truncated record": (truncate, "not a whole number of 3,073-byte CIFAR-10 records"),
    "a byte too many": (replace_first(bytes(3073 * 20 + 1)), "not a whole number"),
    "label out of range": (mislabel, "record 3 has label 10"),
    "HTML page": (replace_first(b"<html><h1>Moved</h1></html>"), "has 27 bytes"),
    "gzip": (replace_first(b"\x1f\x8b\x08" + bytes(5000)), "not a whole number"),
    "CIFAR-100 records": (replace_first(bytes(3074 * 20)), "not a whole number"),
    "folder instead of file": (make_folder, "Is a directory"),
    "unreadable file": (forbid, "Permission denied"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_files_that_cannot_be(fault, data_dir, tmp_path, tiny_pretrain):
    damage, message = DATA_FAULTS[fault]
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    shutil.copytree(data_dir / folder.name, folder)
    damage(folder / "data_batch_3.bin")
    for dataset in ("cifar10", "auto"):                     # what is there and wrong is never
        assert_bad_input(tmp_path, message, pretrain, *tiny_pretrain,           # passed over
                         "--data-dir", tmp_path / "data", "--dataset", dataset,
                         "--out", tmp_path / "run")
    assert "data_batch_3.bin" in run(pretrain, *tiny_pretrain, "--data-dir", tmp_path / "data",
                                     "--dataset", "cifar10")[2]


def make_archive(data_dir: Path, *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        if (data_dir / "cifar-10-batches-bin").exists():
            tar.add(data_dir / "cifar-10-batches-bin", "cifar-10-batches-bin")
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def make_member(name: str, link: str = "", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, 0 if link else 1
    return member


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


def answer_with(content: bytes, length: int | None = None, status: int = 200, wait: float = 0):
    def answer(handler) -> None:
        time.sleep(wait)
        with contextlib.suppress(OSError):
            handler.send_response(status)
            handler.send_header("Content-Length", str(length or len(content)))
            handler.end_headers()
            handler.wfile.write(content)
    return answer


DOWNLOAD_FAULTS = ["refused", "time-out", "404", "cut off", "wrong checksum", "no archive",
                   "half an archive", "../ member", "absolute member", "symbolic link", "hard link",
                   "another folder"]


@pytest.mark.parametrize("fault", DOWNLOAD_FAULTS)
def test_downloads_that_fail_leave_nothing_and_a_second_try_succeeds(
        fault, server, data_dir, tmp_path, tiny_pretrain, monkeypatch):
    good, outside = make_archive(data_dir), tmp_path / "outside"
    members = {"../ member": make_member("../../outside"),
               "absolute member": make_member(str(outside)),
               "symbolic link": make_member("cifar-10-batches-bin/link", "/etc", tarfile.SYMTYPE),
               "hard link": make_member("cifar-10-batches-bin/link", "../../x", tarfile.LNKTYPE)}
    served = {"no archive": b"<html>sign in</html>", "half an archive": good[:len(good) // 2],
              "wrong checksum": good[:-1] + b"!"}.get(fault, good)
    if fault in members:
        served = make_archive(data_dir, members[fault])
    if fault == "another folder":
        served = make_archive(data_dir / "nothing", make_member("something/else"))
    server.answer = {
        "404": answer_with(b"gone", status=404),
        "time-out": answer_with(b"", wait=2),
        "cut off": answer_with(good[:len(good) // 2], length=len(good)),
    }.get(fault, answer_with(served))
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.5)

    def serve(content: bytes, port: int) -> None:
        md5 = data.hashlib.md5(content).hexdigest()
        source = data.dataclasses.replace(data.SOURCES["cifar10"], md5=md5,
                                          url=f"http://127.0.0.1:{port}/cifar.tar.gz")
        monkeypatch.setitem(data.SOURCES, "cifar10", source)

    serve(good if fault == "wrong checksum" else served, 9 if fault == "refused"
          else server.server_port)
    flags = [*tiny_pretrain, "--dataset", "cifar10", "--data-dir", tmp_path / "data",
             "--limit", 64, "--epochs", 1, "--out", tmp_path / "run"]
    assert_bad_input(tmp_path, "http://127.0.0.1:", pretrain, *flags)
    assert not outside.exists() and not list((tmp_path / "data").iterdir())

    server.answer = answer_with(good)
    serve(good, server.server_port)
    succeed(pretrain, *flags)
    assert snapshot(tmp_path / "data") == {
        name: content for name, content in snapshot(data_dir).items()
        if name.startswith("cifar-10-batches-bin")}


def test_auto_falls_back_to_shapes_loudly_and_says_so_everywhere(
        tmp_path, data_dir, tiny_pretrain, monkeypatch):
    source = data.dataclasses.replace(data.SOURCES["cifar10"], url="http://127.0.0.1:9/x.tar.gz")
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir / "shapes", tmp_path / "data" / "shapes")
    flags = [*tiny_pretrain, "--dataset", "auto", "--data-dir", "data", "--epochs", 1]
    status, out, err = run(pretrain, *flags)
    assert status == 0 and "CIFAR-10 IS NOT HERE" in err and "data       shapes" in out
    config = json.loads((tmp_path / "runs/pretrain-shapes-laptop/config.json").read_text())
    assert config["settings"]["dataset"] == "shapes"
    assert not (tmp_path / "data" / "cifar-10-batches-bin").exists()


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, (f"touch {HERE / 'evil-was-here'}",)


def save(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def spoil(checkpoint: Path, fault: str) -> bytes | None:
    """The bytes of a checkpoint with a fault."""
    content, good = checkpoint.read_bytes(), data.load_checkpoint(checkpoint)
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    return {
        "empty": b"",
        "truncated": content[:len(content) // 2],
        "a picture": picture.getvalue(),
        "a pickle that runs code": pickle.dumps(Evil()),
        "a checkpoint that runs code": save({**good, "model": Evil()}),
        "of something else": save({"state_dict": good["model"]}),
        "not a dictionary": save([1, 2, 3]),
        "of other things": save({**good, "model": [1, 2, 3]}),
        "of another version": save({**good, "version": data.CHECKPOINT_VERSION + 1}),
        "of another size": save({**good, "settings": {**good["settings"], "dim": 32}}),
        "without a weight": save({**good, "model": dict(list(good["model"].items())[1:])}),
    }[fault]


@pytest.mark.parametrize("fault", [
    "missing", "empty", "truncated", "a picture", "a pickle that runs code",
    "a checkpoint that runs code", "of something else", "not a dictionary", "of other things",
    "of another version", "of another size", "without a weight"])
def test_checkpoints_that_cannot_be(fault, runs, tmp_path, small, data_dir):
    message = {"missing": "No such file",
               "of another version": f"checkpoint version {data.CHECKPOINT_VERSION + 1}",
               "of another size": "do not fit", "without a weight": "do not fit"}.get(
                   fault, "is no")
    for kind in ("pretrain", "finetune"):
        shutil.copytree(runs[kind], tmp_path / kind)
        file = tmp_path / kind / "checkpoint.pt"
        spoiled = spoil(file, fault) if fault != "missing" else None
        file.unlink()
        if spoiled is not None:
            file.write_bytes(spoiled)
    init, classifier = tmp_path / "pretrain/checkpoint.pt", tmp_path / "finetune/checkpoint.pt"
    for program, flags in [
            (pretrain, ["--out", tmp_path / "pretrain", "--resume"]),
            (finetune, [*small, "--init", init, "--out", tmp_path / "new"]),
            (finetune, ["--evaluate", classifier, "--data-dir", data_dir]),
            (finetune, ["--out", tmp_path / "finetune", "--resume"]),
            (visualize, ["reconstruct", "--checkpoint", init, "--data-dir", data_dir,
                         "--out", tmp_path / "x.png"])]:
        assert_bad_input(tmp_path, message, program, *flags)
    assert not (HERE / "evil-was-here").exists()


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


def test_normalised_predictions_are_brought_back_to_pixels():
    model, patches = tiny_mae(norm_pix_loss=True), patchify(random_images(2), 8)
    back = visualize.to_pixels(model, patches, mae.normalize_patches(patches))
    torch.testing.assert_close(back, patches, rtol=1e-4, atol=1e-5)


def test_the_timeline_cuts_its_tiles_out_of_the_pictures_exactly(tmp_path):
    model, images, noise = tiny_mae(), data.unscale(random_images(5)), random_noise(5, 16)
    picture = visualize.reconstruction_grid(model, images, noise, "noise", epoch=7)
    visualize.save_png(picture, tmp_path / "epoch-0007.png")
    epoch, caption, tiles = visualize.read_tiles(tmp_path / "epoch-0007.png")
    assert epoch == 7 and caption.startswith("noise")
    assert torch.equal(tiles, visualize.reconstruct(model, images, noise)[0])


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


@pytest.mark.parametrize("flags", PICTURES)
def test_every_picture_is_drawn(flags, runs, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = flags.split()[0]
    flags = shlex.split(flags.format(runs=runs["pretrain"].parent))
    if name not in ("timeline", "curves", "embeddings"):
        flags += ["--data-dir", data_dir]
    out = succeed(visualize, *flags)
    file, = tmp_path.iterdir()
    assert out.endswith(f"wrote {file.name}\n")
    with Image.open(file) as picture:
        if file.suffix != ".png":
            assert picture.n_frames == 3
        assert picture.width >= 640
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    if name == "reconstruct":
        assert len(re.findall("error [0-9.]+", out)) >= 2


def test_curves_of_runs_of_different_length_differ_in_colour(tmp_path):
    rows = [{"epoch": e, "train_loss": 2 - e / 9, "test_loss": 2 - e / 10, "lr": 0.1,
             "train_accuracy": 9.0 * e, "test_accuracy": 8.0 * e, "seconds": 3.0}
            for e in range(1, 9)]
    picture = visualize.draw_curves({"long": rows, "short": rows[:3]})
    colors = [color for _, color in picture.getcolors(1 << 20)]
    assert all(color in colors for color in visualize.COLORS[:2])
    assert visualize.COLORS[0] in [color for _, color in visualize.draw_curves(
        {"one": rows[:1]}).getcolors(1 << 20)]              # a single epoch is a dot


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_figure_of_the_model_states_the_loss_of_the_model(norm_pix_loss, monkeypatch):
    model = tiny_mae(norm_pix_loss=norm_pix_loss).eval()
    image, noise = data.unscale(random_images(1))[0], random_noise(1, 16)
    monkeypatch.setattr(visualize, "draw_flow", lambda stages, *_: stages)
    name, drawn, _ = visualize.draw_architecture(model, image, noise, "")[-1]
    loss = model(data.scale(image[None]), noise)[0].item()
    assert name == "loss" and float(drawn[0]) == pytest.approx(loss, abs=6e-5)


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


BROKEN_PICTURES = {"missing": None, "not an image": b"<html>", "empty": b"",
                   "truncated": encode(Image.new("RGB", (500, 500)), compress_level=0)[:9000],
                   "a decompression bomb": encode(Image.new("1", (14_000, 14_000)))}


@pytest.mark.parametrize("fault", BROKEN_PICTURES)
def test_pictures_that_cannot_be(fault, runs, tmp_path):
    file = tmp_path / "picture.png"
    if BROKEN_PICTURES[fault] is not None:
        file.write_bytes(BROKEN_PICTURES[fault])
    assert_bad_input(tmp_path, f"cannot read the picture {file}", visualize, "reconstruct", file,
                     "--checkpoint", runs["pretrain"], "--out", tmp_path / "out.png")


BROKEN_LOGS = {
    "missing": (None, "No such file"),
    "empty": ("", "no log.csv"),
    "header alone": ("epoch,loss,test_loss,lr,seconds\n", "no epoch yet"),
    "half a row": ("epoch,loss,test_loss,lr,seconds\n1,0.5,0.4,0.1,3\n2,0.4,0.", "line 3"),
    "other columns": ("time,value\n1,2\n", "no log.csv"),
    "words": ("epoch,loss,test_loss,lr,seconds\n1,much,0.4,0.1,3\n", "line 2"),
    "binary": ("\0\1\2", "no log.csv"),
}


@pytest.mark.parametrize("fault", BROKEN_LOGS)
def test_logs_that_cannot_be(fault, tmp_path):
    text, message = BROKEN_LOGS[fault]
    if text is not None:
        (tmp_path / "log.csv").write_text(text)
    assert_bad_input(tmp_path, message, visualize, "curves", tmp_path / "log.csv", "--out",
                     tmp_path / "out.png")


def test_a_log_with_nan_is_drawn_with_a_gap_and_says_so(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,test_loss,lr,seconds\n1,0.5,0.4,0.1,3\n"
                                      "2,nan,0.4,0.1,3\n3,0.3,0.4,0.1,3\n")
    status, _, err = run(visualize, "curves", tmp_path / "log.csv", "--out", tmp_path / "out.png")
    assert status == 0 and "1 values are not finite" in err and (tmp_path / "out.png").exists()


# ------------------------------------------------------------------------------ the README


def run_small(command: str, done: list[str]) -> None:
    """A command of the README on 64 images and a small model; a later flag wins."""
    file, *flags = shlex.split(command)
    program = sys.modules[file.removesuffix(".py")]
    if program is not visualize and not {"--resume", "--evaluate"} & set(flags):
        flags += shlex.split("--limit 64 --epochs 1 --batch-size 32 --device cpu --precision fp32")
        if "--init" not in flags:
            flags += shlex.split("--dim 48 --depth 1 --heads 3")
        if "--labels-per-class" in flags:
            flags += shlex.split("--labels-per-class 2")
        if "--validation" in flags:
            flags += shlex.split("--validation 8")
        if program is pretrain:
            flags += shlex.split("--decoder-dim 48 --decoder-depth 1 --decoder-heads 3")
        if command in done:                                 # the same run, with torchrun
            flags += ["--out", f"runs/{len(done)}"]
    status, _, err = run(program, *flags)
    assert status == 0, f"{command}: {err}"
    done.append(command)


README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"^    (?:python|torchrun .*?) ?((?:pretrain|finetune|visualize)\.py.*)$",
                      README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_command_in_the_readme_works(data_dir, tmp_path, monkeypatch):
    """In the order of the README, on 200 images and a small model; a later flag wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "BENCHMARK_SECONDS", 0)
    os.symlink(data_dir, "data")
    os.symlink(HERE / "results", "results")
    assert len(COMMANDS) > 25
    done = []
    for command in COMMANDS:
        run_small(command, done)


def test_the_tables_of_the_results_say_what_the_logs_say():
    text = (HERE / "results" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w[\w-]+)` \|.* \| (\d+) \| (?:test loss )?([\d.]+)(?: %)? \| \d+ \|",
                      text, re.MULTILINE)
    assert {name for name, _, _ in rows} == {path.parent.name for path in
                                             (HERE / "results").glob("*/log.csv")}
    for name, epochs, result in rows:
        last = visualize.read_log(HERE / "results" / name)[-1]
        value = last["test_accuracy"] if "test_accuracy" in last else last["test_loss"]
        digits = len(result.split(".")[1])
        assert (int(epochs), float(result)) == (last["epoch"], round(value, digits)), name


@pytest.mark.parametrize("tier", ["laptop", "gpu"])
def test_the_script_of_the_results_works_goes_on_and_ends(tier, data_dir, tmp_path, monkeypatch):
    """First with a stand-in for python, which says what it is to do; then what it said."""
    text = (HERE / "results" / "README.md").read_text()
    script, = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    trial, = re.findall(r"^    (RUNS=.*)$", text, re.MULTILINE)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\nmkdir -p "$3"\ntouch "$3/$LEAVE"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "script.sh").write_text(script)

    def commands(leave: str) -> list[str]:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LEAVE": leave}
        command = trial.replace("/tmp/try", "runs") + f" bash script.sh {tier}"
        return subprocess.run(command, shell=True, env=environment, cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.splitlines()

    begun = commands("checkpoint.pt")
    assert len(begun) >= 5
    for command, again in zip(begun, commands("weights.pt"), strict=True):
        assert again.startswith(" ".join(command.split()[:3]) + " --resume ")
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


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1])
def test_every_snippet_in_the_readme_works(snippet, monkeypatch):
    if "timm" in snippet:
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(HERE)
    exec(snippet, {})
