"""The tests: `pytest test_mae.py`.

In this order: the model, the data, the programs, interruption, several processes, bad input,
pictures, the README, the results. Programs run through their command lines, `run(program,
*flags)`, on small models and files made here. No test needs the network. One uses the real
CIFAR-10, if it is in data/. Those that need POSIX are skipped on other systems.
"""
import contextlib
import csv
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, PngImagePlugin
from torch import nn
from torch.nn import functional as F

import data
import finetune
import mae
import pretrain
import visualize
from finetune import FinetuneSettings
from mae import MAEViT, PatchShuffle, ViTClassifier, patchify, unpatchify
from pretrain import PretrainSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results"
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
WITH_GPU = dict(os.environ)
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "no_proxy": "*"}     # the same tests everywhere
torch.set_num_threads(1)            # models this small gain nothing from more
TINY = dict(patch_size=8, dim=16, depth=2, heads=2, decoder_dim=12, decoder_depth=1,
            decoder_heads=2)
pretrain.PICTURED = 2               # a picture of two images is drawn faster than one of twelve
draw_all_shapes = functools.cache(data.make_shapes)         # takes seconds, so once and
data.make_shapes = lambda: draw_all_shapes().limited(200)   # only if they are needed


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch) -> None:
    """Each test works in an empty folder."""
    monkeypatch.chdir(tmp_path)


def random_images(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_noise(count: int, patches: int) -> torch.Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(1))


def tiny_mae(**changes) -> MAEViT:
    torch.manual_seed(0)
    return MAEViT(**{**TINY, **changes})


# ------------------------------------------------------------------------------ the model


def test_patches_are_cut_row_by_row_hold_channel_y_x_and_can_be_put_together_again():
    images = random_images(2, side=12)
    patches = patchify(images, 4)
    assert torch.equal(patches, F.unfold(images, 4, stride=4).mT)
    assert torch.equal(unpatchify(patches, 4), images)


@pytest.mark.parametrize("N, mask_ratio", [(256, 0.75), (16, 0.5), (7, 0.3)])
def test_shuffle_masks_exactly_and_restore_undoes_it(N, mask_ratio):
    tokens = torch.arange(5 * N * 2, dtype=torch.float32).view(5, N, 2)
    noise, K, shuffle = random_noise(5, N), round(N * (1 - mask_ratio)), PatchShuffle(mask_ratio)
    visible, ids_restore, mask = shuffle(tokens, noise)
    assert torch.equal(visible, mae.take(tokens, noise.argsort(dim=1)[:, :K]))
    assert visible.shape == (5, K, 2) and ids_restore.shape == mask.shape == (5, N)
    assert (mask.sum(dim=1) == N - K).all() and set(mask.unique().tolist()) == {0, 1}
    filled = torch.cat([visible, torch.full((5, N - K, 2), -1.0)], dim=1)
    restored = mae.take(filled, ids_restore)
    assert torch.equal(restored, torch.where(mask[..., None] == 1, -1.0, tokens))
    assert not shuffle(tokens)[2].equal(shuffle(tokens)[2])     # without noise: at random


def test_masked_pixels_cannot_influence_the_encoder_and_predictions_know_their_place():
    model, images, noise = tiny_mae(), random_images(4), random_noise(4, 16)
    patches = patchify(images, 8).requires_grad_()
    visible, _, mask = model.shuffle(model.encoder.embed(patches), noise)
    gradient, = torch.autograd.grad(model.encoder(visible).square().sum(), patches)
    assert (gradient != 0).any(dim=-1).equal(mask == 0)

    _, pred, _ = model(images, noise)
    hidden = mask[..., None] == 1
    changed = unpatchify(torch.where(hidden, torch.rand_like(patches), patches), 8)
    assert torch.equal(model(changed, noise)[1], pred)
    seen_changed = unpatchify(torch.where(hidden, patches, patches + 0.1), 8)
    assert not torch.allclose(model(seen_changed, noise)[1], pred)
    masked = pred[0][mask[0] == 1]
    assert (masked[0] - masked[1]).abs().max() > 1e-3       # the same mask token, another place
    reordered = mask + torch.rand_like(mask)                # the same patches in another order
    torch.testing.assert_close(model(images, reordered)[1], pred)


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


TORCH_NAMES = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj",
               "linear": "mlp.fc", "norm": "norm"}      # how the names of torch and ours begin


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier_computes_what_a_vit_of_torchs_own_layers_computes(pool):
    """With our weights, copied by name."""
    classifier, images = ViTClassifier(tiny_mae().encoder, 5, pool), random_images(3)
    torch.manual_seed(1)
    for parameter in classifier.parameters():               # neither zeros nor ones
        nn.init.normal_(parameter, std=0.3)
    weights = classifier.state_dict()
    tokens = F.conv2d(images, weights.pop("patch_embed.proj.weight"),
                      weights.pop("patch_embed.proj.bias"), stride=8).flatten(2).mT
    tokens = tokens + weights.pop("pos_embed")
    tokens = torch.cat([weights.pop("cls_token").expand(3, -1, -1), tokens], dim=1)
    for i in range(2):
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        for name, value in layer.state_dict().items():
            start = next(start for start in TORCH_NAMES if name.startswith(start))
            ours = f"blocks.{i}.{name.replace(start, TORCH_NAMES[start])}"
            has_none = name == "self_attn.in_proj_bias"     # queries, keys and values
            value.copy_(torch.zeros(48) if has_none else weights.pop(ours))
        normed = layer.norm1(tokens)
        _, attention = layer.self_attn(normed, normed, normed, average_attn_weights=False)
        torch.testing.assert_close(classifier.attention_maps(images)[i], attention)
        tokens = layer(tokens)
    codes = F.layer_norm(tokens, (16,), weights.pop("norm.weight"), weights.pop("norm.bias"))
    code = codes[:, 0] if pool == "cls" else codes[:, 1:].mean(dim=1)
    logits = F.linear(code, weights.pop("head.weight"), weights.pop("head.bias"))
    torch.testing.assert_close(classifier(images), logits)
    assert not weights


def test_classifier_leaves_patches_out_only_if_it_is_given_noise():
    encoder, noise, images = tiny_mae().encoder, random_noise(2, 16), random_images(2)
    images.requires_grad_()
    _, _, mask = PatchShuffle(0.75)(patchify(images, 8), noise)
    for dropout, given, seen in ((0.75, noise, mask == 0), (0.75, None, mask >= 0),
                                 (0.0, noise, mask >= 0)):
        logits = ViTClassifier(encoder, 5, "mean", dropout)(images, given)
        gradient, = torch.autograd.grad(logits.square().sum(), images)
        assert (patchify(gradient, 8) != 0).any(dim=-1).equal(seen)
    copied = ViTClassifier(encoder).state_dict()
    assert all(value.equal(copied[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("model, inputs", [
    (tiny_mae(), 2), (ViTClassifier(tiny_mae().encoder, 5, "cls"), 1),
    (ViTClassifier(tiny_mae().encoder, 5, "mean"), 1)], ids=["autoencoder", "cls", "mean"])
def test_an_exported_model_runs_with_any_batch_and_an_empty_one_passes_through(model, inputs):
    batch = [random_images(7), random_noise(7, 16)][:inputs]
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in batch)
    two = tuple(tensor[:2] for tensor in batch)
    exported = torch.export.export(model.eval(), two, dynamic_shapes=dynamic).module()
    for count in (1, 3, 7):
        some = [tensor[:count] for tensor in batch]
        torch.testing.assert_close(exported(*some), model(*some))
    empty = model(*(tensor[:0] for tensor in batch))
    assert (empty if inputs == 1 else empty[1]).shape[0] == 0


def test_the_model_has_the_size_and_the_positions_of_the_design():
    model = MAEViT()                                        # 16 x 16 patches
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_212_684
    positions = model.encoder.pos_embed[0].detach().view(16, 16, 192)
    for row, column, i in itertools.product((0, 5, 15), (0, 3, 15), (0, 7, 47)):
        frequency = 16 ** (-i / 48)
        expected = [math.sin(row * frequency), math.cos(row * frequency),
                    math.sin(column * frequency), math.cos(column * frequency)]
        assert positions[row, column, i::48].tolist() == pytest.approx(expected, abs=1e-5)
    assert (model.decoder.pos_embed[0, 0] == 0).all()       # the class token has no place
    assert torch.equal(model.decoder.pos_embed[0, 1:], model.encoder.pos_embed[0])


# ------------------------------------------------------------------------------ the data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Small files in the formats of both CIFARs. Those in `other` name the classes."""
    folder = tmp_path_factory.mktemp("data")
    write_records("cifar10", folder, count=40)
    write_records("cifar10", folder / "other", count=30)
    names = folder / "other" / "cifar-10-batches-bin" / "batches.meta.txt"
    names.write_text("\n".join("abcdefghij"))
    write_records("cifar100", folder, count=300)
    return folder


def write_records(name: str, folder: Path, count: int) -> None:
    """Noise in a data set's binary format. Each class has a color, the same in all files."""
    source, rng = data.SOURCES[name], np.random.default_rng(0)
    colors = rng.integers(0, 120, (source.num_classes, 3, 1))
    (folder / source.folder).mkdir(parents=True, exist_ok=True)
    for file in source.train + source.test:
        records = rng.integers(0, 10, (count, source.label_bytes + 3072))
        records[:, source.label_bytes - 1] = labels = np.arange(count) % source.num_classes
        pixels = colors[labels] + rng.integers(0, 136, (count, 3, 1024))
        records[:, source.label_bytes:] = pixels.reshape(count, 3072)
        (folder / source.folder / file).write_bytes(records.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name, label_bytes", [("cifar10", 1), ("cifar100", 2),
                                               ("the real cifar10", 1)])
def test_what_is_loaded_is_what_is_in_the_files(data_dir, name, label_bytes):
    name, real = name.split()[-1], name.startswith("the real")
    folder, source = HERE / "data" if real else data_dir, data.SOURCES[name]
    if not (folder / source.folder).exists():
        pytest.skip("the real CIFAR-10 is not in data/")
    dataset = data.load_dataset(name, folder)
    assert dataset.train_images.dtype == torch.uint8 and dataset.train_labels.dtype == torch.int64
    assert not real or dataset.classes[dataset.train_labels[0]] == "frog"
    for files, images, labels in [(source.train, dataset.train_images, dataset.train_labels),
                                  (source.test, dataset.test_images, dataset.test_labels)]:
        content = b"".join((folder / source.folder / file).read_bytes() for file in files)
        records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3072)
        assert images.shape[1:] == (3, 32, 32)              # channel, then y, then x
        assert np.array_equal(images.flatten(1), records[:, label_bytes:])
        assert np.array_equal(labels, records[:, label_bytes - 1])


def test_shapes_are_balanced_varied_and_the_same_every_time():
    shapes, rng = draw_all_shapes(), np.random.default_rng(0)
    labels = rng.permutation(np.arange(2000) % 10)
    assert shapes.train_labels[:2000].tolist() == labels.tolist()
    assert np.array_equal(shapes.train_images[:2000], data.draw_shapes(labels, rng))
    assert shapes.train_labels.bincount().tolist() == [1000] * 10
    assert shapes.test_labels.bincount().tolist() == [200] * 10
    everything = torch.cat([shapes.train_images, shapes.test_images]).numpy()
    assert len({image.tobytes() for image in everything}) == 12_000


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    def order(count: int, *seed: int) -> torch.Tensor:
        return data.epoch_order(count, 4, data.seeded_generator("cpu", *seed))

    assert order(12, 0, 1).flatten().sort().values.tolist() == list(range(12))
    assert order(14, 0, 1).shape == (3, 4) and len(order(14, 0, 1).unique()) == 12
    assert torch.equal(order(12, 0, 1), order(12, 0, 1))
    assert not torch.equal(order(12, 0, 1), order(12, 0, 2))
    assert not torch.equal(order(12, 0, 1), order(12, 1, 1))
    assert order(3, 0, 1).shape == (1, 4) and len(order(3, 0, 1).unique()) == 3    # fewer: again


def test_augmentation_flips_and_shifts_whole_images():
    images = data.unscale(random_images(400))
    generator = data.seeded_generator("cpu", 0)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    for kind, shifts, least in (("none", [4], 1), ("flip", [4], 2), ("crop", range(9), 140)):
        seen = []
        for image, result in zip(padded, data.augment(images, kind, generator)):
            way, = [(dy, dx, flip) for dy, dx, flip in itertools.product(shifts, shifts, (0, 1))
                    if result.equal((image.flip(2) if flip else image)[:, dy:, dx:][:, :32, :32])]
            seen.append(way)
        assert len(set(seen)) >= least                      # of 1, 2 and 162 ways
        assert sum(flip for *_, flip in seen) in (range(150, 250) if kind != "none" else [0])
    with pytest.raises(ValueError):
        data.augment(images, "crops", generator)


def test_color_jitter_is_a_saturation_a_contrast_and_a_brightness_of_each_image():
    images = torch.full((500, 3, 32, 32), 100)              # gray: 80 on the left, 120 on the right
    images += torch.where(torch.arange(32) < 16, -20, 20) + torch.tensor([5, 0, -5])[:, None, None]

    def measure(images: torch.Tensor) -> torch.Tensor:      # brightness, contrast, saturation
        contrast = (images[..., 31] - images[..., 0]).mean(dim=(1, 2))
        color = (images[:, 0] - images[:, 2]).mean(dim=(1, 2))
        return torch.stack([images.mean(dim=(1, 2, 3)), contrast, color])       # (3, 500)

    jittered = data.color_jitter(images.to(torch.uint8), data.seeded_generator("cpu", 0))
    factors = measure(jittered) / measure(images.float())
    factors[1:] /= factors[:-1].clone()                     # each multiplies what comes after it
    assert 0.599 < factors.min() and factors.max() < 1.401
    assert (factors.amin(dim=1) < 0.62).all() and (factors.amax(dim=1) > 1.38).all()
    assert (torch.corrcoef(factors) - torch.eye(3)).abs().max() < 0.15          # independent
    bright = data.augment(torch.full_like(images, 250), "color", data.seeded_generator("cpu", 0))
    assert bright.min() >= 0 and bright.max() == 255


def test_mixed_labels_are_the_shares_of_what_the_images_show():
    values = torch.arange(0, 250, 5).repeat(20)             # each image of one brightness
    images = values[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    labels = torch.eye(50).repeat(20, 1)
    mixed, targets = data.mixup_or_cutmix(images, labels, data.seeded_generator("cpu", 0))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ values[:50].float(),
                               rtol=1e-4, atol=0)
    shares = (targets * labels).sum(dim=1)                  # of the image itself
    torch.testing.assert_close((targets * labels.roll(1, 0)).sum(dim=1), 1 - shares)
    blended = mixed.amax(dim=(1, 2, 3)) == mixed.amin(dim=(1, 2, 3))
    assert 0.45 < blended.float().mean() < 0.55             # mixup or CutMix
    assert 0.45 < shares[blended].mean() < 0.55
    assert 0.63 < shares[~blended].mean() < 0.72            # boxes are cut off at the edges


# A folder of pictures: three sizes, five kinds of file, names that are not ASCII, other files.

CLASSES = {"apple": (220, 30, 40), "empty": None, "été": (40, 200, 60), "狗": (30, 60, 230)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    kinds = itertools.cycle([".png", ".JPG", ".webp", ".gif", ".bmp"])
    for part, count, classes in (("train", 10, CLASSES), ("test", 5, ["apple", "狗"])):
        for title in classes:
            (folder / part / title).mkdir(parents=True)
            (folder / part / title / "notes.txt").write_text("not a picture")
            for i in range(count if CLASSES[title] else 0):
                width, height = ((40, 60), (48, 48), (100, 30))[i % 3]
                pixels = CLASSES[title] + rng.normal(0, 20, (height, width, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(folder / part / title / f"{title} {i}{next(kinds)}")
    return folder


def test_a_folder_of_pictures_can_be_learned_evaluated_and_drawn(pictures, monkeypatch):
    few = shlex.split("--batch-size 10 --threads 1 --device cpu --precision fp32")
    sizes = shlex.split("--image-size 24 --patch-size 8 --dim 16 --depth 1 --heads 2 --epochs 1")
    out = succeed(pretrain, "--dataset", "folder", "--data-dir", pictures, *sizes, *few)
    assert f"{pictures.name}: 30 training and 10 test images" in out
    run_folder = "runs/pretrain-folder"
    succeed(finetune, "--init", run_folder, "--data-dir", pictures, *few, "--epochs", 20)
    out = succeed(finetune, "--evaluate", "runs/finetune-folder")
    assert out.endswith("test accuracy 100.00 %\n")         # the classes are colors
    for one in (run_folder, "runs/finetune-folder", "runs/finetune-folder/weights.pt"):
        assert data.load_checkpoint(one)["classes"] == ["apple", "été", "狗"]
    out = succeed(visualize, "reconstruct", "--checkpoint", run_folder, "--count", 3)
    assert re.search("^0 (apple|狗): error", out, re.MULTILINE)


@posix
def test_a_folder_of_pictures_may_hold_other_things_which_are_counted(pictures, capsys):
    folder = shutil.copytree(pictures, Path("pictures"))
    dog, photo = folder / "train" / "狗", next(folder.glob("train/apple/*.JPG"))
    (dog / "link.png").symlink_to("nothing")
    (dog / "text.png").write_text("not a picture")
    (dog / "empty.jpg").touch()
    for name in ("train", "train/__MACOSX", "train/@eaDir/x", "train/狗/@eaDir", "train/.hidden",
                 "test", "test/pear", "val"):               # besides 17 notes.txt
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / name / "x.jpg")
    (folder / "train" / "cats").symlink_to(pictures / "train" / "été")
    os.renames(photo, photo.parent / "images" / "deeper" / "x.jfif")
    dataset = data.load_dataset("folder", folder, image_size=8)
    assert dataset.classes == ["apple", "cats", "été", "狗"]
    assert dataset.train_labels.bincount().tolist() == [10, 10, 10, 10]
    assert dataset.test_labels.bincount().tolist() == [5, 0, 0, 5]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    left_out = sum(path.name == "notes.txt" for path in folder.rglob("*")) + 1 + 3 + 7
    assert len(notes) == 1 and notes[0].startswith(f"note: {left_out} of {left_out + 50} files in")
    assert (folder / notes[0].partition("for example ")[2]).is_file()


def test_a_tenth_of_each_class_is_held_out_for_testing():
    folder = Path("pictures")
    for title, count in (("many", 12), ("one", 1), ("two", 2)):
        (folder / "train" / title).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(folder / "train" / title / f"{i}.png")
    dataset = data.load_dataset("folder", folder, image_size=8)
    assert dataset.train_labels.bincount().tolist() == [10, 1, 1]
    assert dataset.test_labels.bincount().tolist() == [2, 0, 1]
    assert dataset.test_images.unique().tolist() == [1, 9]  # in order of names: 0, 1, 10, 11, 2
    tested = data.load_dataset("folder", folder, image_size=8, classes=dataset.classes)
    assert tested.test_labels.equal(dataset.test_labels) and tested.counts() == [0, 3]
    shutil.rmtree(folder / "train" / "many"), shutil.rmtree(folder / "train" / "two")
    with pytest.raises(data.BadInput, match="too few pictures in .*: put at least two of each"):
        data.load_dataset("folder", folder)
    for name in ("0.png", "1.png"):
        (folder / "train" / "one" / name).write_bytes(b"")
    with pytest.raises(data.BadInput, match=r"0\.png is not a picture of a kind that can be read"):
        data.load_dataset("folder", folder)


@posix
def test_a_classifier_refuses_other_classes_and_is_tested_without_training_pictures(
        pictures, flags):
    """`apple`, renamed `pear`, would change the order of the labels."""
    folder, out = shutil.copytree(pictures, Path("pictures")), Path("run")
    _, _, err = run(finetune, *flags["scratch"], "--dataset", "folder", "--data-dir", folder,
                    "--limit", 30, "--epochs", 1, "--out", out)
    assert "note: steps in all: 1, too few to learn much; raise --repeat" in err
    _, answer, err = run(finetune, "--evaluate", out)
    assert "reading 10 pictures" in err and "reading 30" not in err
    (folder / "train" / "apple").rename(folder / "train" / "pear")
    both_lists = "has the classes apple, été, 狗, but pictures has pear, été, 狗"
    assert_bad_input(both_lists, finetune, "--evaluate", out)
    (folder / "test" / "apple").rename(folder / "test" / "pear")
    assert_bad_input(both_lists, finetune, "--resume", out, "--epochs", 2)
    shutil.rmtree(folder / "train")
    assert_bad_input("but pictures has pear, 狗", finetune, "--evaluate", out)
    (folder / "test" / "pear").rename(folder / "test" / "apple")
    assert succeed(finetune, "--evaluate", out) == answer
    assert " 4 test images" in succeed(finetune, "--evaluate", out, "--limit", 4)
    folder.rename("moved")
    assert_bad_input(f"there is no folder {folder.absolute()}: name that of the pictures with "
                     "--data-dir", finetune, "--evaluate", out)


def test_pictures_alone_are_for_pretraining_and_a_tenth_of_them_is_held_out(
        pictures, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(pictures / "train" / "apple", "train")
    more = ["--dataset", "folder", "--data-dir=~", "--limit", 9, "--out=~/run"]
    assert_bad_input(f"{tmp_path} has no labels: put the pictures of each class into train/CLASS/",
                     finetune, *flags["scratch"], *more)
    status, out, err = run(pretrain, *flags["pretrain"], *more)
    assert status == 0 and "9 training and 1 test images" in out
    assert "a tenth of train is held out for testing" in err and "raise --epochs" in err
    assert data.load_checkpoint("run/weights.pt")["classes"] == []


def test_subsets_are_the_first_images_or_balanced_or_hold_images_out():
    whole = draw_all_shapes()
    few, again, others = (whole.balanced(7, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(few.train_images, again.train_images)
    assert not torch.equal(few.train_images, others.train_images)
    assert few.train_labels.bincount().tolist() == [7] * 10
    first, held_out = whole.limited(9), whole.hold_out(1000)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(first, name), getattr(whole, name)[:9])
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
            with data.as_program():
                program.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return status, out.getvalue(), err.getvalue()


def succeed(program, *flags) -> str:
    status, out, err = run(program, *flags)
    assert status == 0, err
    return out


def read_log(folder: Path | str) -> list[dict]:
    """The rows of a log without the columns that are measured."""
    with open(Path(folder, "log.csv")) as file:
        return [{name: value for name, value in row.items()
                 if name not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]


def read_settings(folder: Path | str) -> dict:
    return data.load_checkpoint(folder)["settings"]


def read_model(folder: Path | str) -> dict[str, torch.Tensor]:
    return data.load_checkpoint(folder)["model"]


def call_before(monkeypatch, owner, name: str, action) -> None:
    """From now on call action(*args) before each call of owner.name(*args)."""
    function = getattr(owner, name)

    def both(*args, **options):
        action(*args, **options)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, both)


def change_checkpoint(folder: Path, **changes) -> None:
    data.save_checkpoint(folder / "checkpoint.pt", data.load_checkpoint(folder) | changes)


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs have the same files, and weights, optimizers, log and pictures bit for bit."""
    for file in ("checkpoint.pt", "weights.pt"):
        first, second = (data.load_checkpoint(folder / file) for folder in (a, b))
        for key in ("model", "optimizers", "epoch"):
            torch.testing.assert_close(first.get(key), second.get(key), rtol=0, atol=0)
    assert read_log(a) == read_log(b)
    files = [{name: content if name.endswith(".npy") else ""    # the names, and the tiles
              for name, content in snapshot(folder).items()} for folder in (a, b)]
    assert files[0] == files[1]


def assert_close_logs(a: Path, b: Path, tolerance: float) -> None:
    """Equal up to `tolerance`, and accuracies up to 1 of 40 test or 2 of 96 training images, since
    two classes may be about equally likely."""
    for one, other in zip(read_log(a), read_log(b), strict=True):
        for column, value in one.items():
            images = 2.6 if "accuracy" in column else 0     # in percent
            assert float(other[column]) == pytest.approx(float(value), rel=tolerance,
                                                         abs=images), column


KINDS = {"pretrain": pretrain, "finetune": finetune, "scratch": finetune, "linear": finetune}


@pytest.fixture(scope="session")
def runs(flags, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind."""
    return {kind: tmp_path_factory.getbasetemp() / "runs" / kind for kind in KINDS}


@pytest.fixture(scope="session")
def flags(data_dir, tmp_path_factory) -> dict[str, list]:
    """The flags of a run of each kind, without --out: 96 of 200 random images, a small model. Also
    makes these runs: two of them start from the first."""
    folder = tmp_path_factory.getbasetemp() / "runs"
    small = ["--threads", 1, "--dataset", "cifar10", "--data-dir", data_dir, "--limit", 96,
             "--batch-size", 32, "--device", "cpu", "--precision", "fp32"]
    sizes = ["--patch-size", 8, "--dim", 16, "--depth", 1, "--heads", 2]
    init = ["--init", folder / "pretrain"]
    flags = {"pretrain": [*small, *sizes, "--decoder-dim", 16, "--decoder-heads", 2, "--epochs", 3],
             "finetune": [*small, *init, "--epochs", 2, "--mix"],
             "scratch": [*small, *sizes, "--epochs", 2],
             "linear": [*small, *init, "--mode", "linear", "--epochs", 5]}
    for kind, program in KINDS.items():
        succeed(program, *flags[kind], "--out", folder / kind)
    return flags


def test_pretraining_leaves_a_whole_run_folder(runs):
    out = runs["pretrain"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png",
                     *(f"reconstructions/epoch-{epoch:04}.{kind}" for epoch in range(4)
                       for kind in ("png", "npy"))}
    log, half = read_log(out), data.load_checkpoint(out / "weights.pt")
    assert [row["epoch"] for row in log] == ["1", "2", "3"] and float(log[-1]["lr"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["settings"] == read_settings(out) == half["settings"]
    assert config["versions"]["torch"] == torch.__version__ and "optimizers" not in half
    for name, value in read_model(out).items():
        assert half["model"][name].equal(value.half())


@pytest.mark.parametrize("kind, hardware", [("finetune", True), ("linear", True),
                                            ("finetune", False)])
def test_evaluate_prints_the_last_row_of_the_log_whether_the_machine_has_bf16_or_not(
        kind, hardware, flags, monkeypatch):
    monkeypatch.setattr(pretrain, "has_bf16_matmuls", lambda device: hardware)
    out = succeed(finetune, *flags[kind], "--precision", "auto", "--epochs", 10, "--base-lr", 0.1,
                  "--out", "run")
    assert f"machine    cpu, {'bf16' if hardware else 'fp32'}, " in out
    last = read_log("run")[-1]
    assert float(last["test_accuracy"]) > 30                # chance is 10: it has learned colors
    monkeypatch.setattr(pretrain, "has_bf16_matmuls", lambda device: True)
    out = succeed(finetune, "--evaluate", "run")
    assert out.endswith(f"test accuracy {float(last['test_accuracy']):.2f} %\n")
    loss = float(re.search("loss ([0-9.]+)", out)[1])       # of 4 decimals
    assert loss == pytest.approx(float(last["test_loss"]), abs=0.6e-4)


def test_settings_are_chosen_on_images_held_out_and_evaluated_on_the_test_images(flags, data_dir):
    out = succeed(finetune, *flags["scratch"], "--limit", 64, "--validation", 24, "--epochs", 1,
                  "--labels-per-class", 1, "--out", "run")
    assert "CIFAR-10, validation: 10 training and 24 test images" in out
    assert [line.split()[0] for line in out.splitlines()] == [
        "recipe", "machine", "data", "model", "run", "epoch", "done"]
    assert "from scratch" in out.splitlines()[3]
    assert "40 test images" in succeed(finetune, "--evaluate", "run")
    out = succeed(finetune, "--evaluate", "run", "--limit", 16)
    assert "16 test images" in out                          # a quick look is quick
    out = succeed(finetune, "--evaluate", "run", "--data-dir", data_dir / "other")
    assert "30 test images" in out                          # names are not other classes


@pytest.mark.parametrize("program, command, shown", [
    (pretrain, "", "epochs 8, base-lr 0.01, dim 128, recipe laptop"),
    (pretrain, "--recipe full --seed 3", "epochs 2000, batch-size 4096, patch-size 2, seed 3"),
    (pretrain, "--resume {runs}/pretrain", "epochs 3, dim 16, limit 96"),
    (finetune, "", "base-lr 0.0025, layer-decay 1.0, epochs 4, pool mean"),  # best from scratch
    (finetune, "--recipe lunch", "base-lr 0.00175, layer-decay 1.0, epochs 44"),
    (finetune, "--init {runs}/pretrain", "base-lr 0.02, layer-decay 0.75, dim 16"),
    (finetune, "--init {runs}/pretrain --recipe full --epochs 7", "epochs 7, dim 16, pool cls"),
    (finetune, "--mode linear --init {runs}/pretrain", "base-lr 0.01, epochs 100, batch-size 512"),
    (finetune, "--evaluate {runs}/finetune", "precision fp32, batch-size 32, device auto")])
def test_typed_flags_win_over_the_encoder_and_the_encoder_over_the_recipe_as_help_shows(
        program, command, shown, runs):
    command = command.format(runs=runs["pretrain"].parent)
    text = " ".join(succeed(program, *command.split(), "--help").split())
    assert "default: None" not in text
    for name, value in (part.split() for part in shown.split(", ")):
        defaults = re.search(rf" --{name} .*?\(default: (.*?)\)", text)
        assert defaults[1] == value, name


def make_stripes() -> data.Dataset:
    """2,000 noisy pictures for training, 400 for testing: the classes are ten angles."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32] * np.pi / 4
    labels = rng.integers(0, 10, 2400)
    angle, phase = labels[:, None, None] * np.pi / 10, rng.uniform(0, 2 * np.pi, (2400, 1, 1))
    waves = np.sin(x * np.cos(angle) + y * np.sin(angle) + phase)
    images = 128 + 50 * waves[:, None] + rng.normal(0, 60, (2400, 3, 32, 32))
    images, labels = torch.tensor(images.clip(0, 255).astype(np.uint8)), torch.tensor(labels)
    return data.Dataset("shapes", "stripes", list("0123456789"), images[:2000], labels[:2000],
                        images[2000:], labels[2000:])


def test_pretraining_makes_a_linear_probe_better(flags, monkeypatch):
    monkeypatch.setattr(data, "make_shapes", make_stripes)
    accuracy, more = {}, ["--dataset", "shapes", "--limit", 2000, "--batch-size", 64]
    for name, lr in (("trained", 0.05), ("random", 1e-12)):
        succeed(pretrain, *flags["pretrain"], *more, "--dim", 32, "--epochs", 6, "--base-lr", lr,
                "--augment", "none", "--picture-every", 9, "--out", name)
        succeed(finetune, *flags["linear"], *more, "--init", name, "--epochs", 20,
                "--out", f"{name}-linear")
        accuracy[name] = float(read_log(f"{name}-linear")[-1]["test_accuracy"])
    assert accuracy["trained"] > accuracy["random"] + 30, accuracy


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = PretrainSettings(base_lr=1e-3, batch_size=512, warmup=0.2, epochs=25)
    for epoch, lr in ((0, 0), (2.5, 1e-3), (5, 2e-3), (15, 1e-3), (25, 0),
                      (10, 1e-3 * (1 + math.cos(math.pi / 4)))):
        assert pretrain.learning_rate(settings, epoch) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_its_optimizer_and_weight_decay(optimizer):
    """Weight decay spares biases, norms, tokens and positions. Muon steps matrices of blocks. What
    is frozen has none."""
    model, settings = tiny_mae(), PretrainSettings(optimizer=optimizer)
    model.encoder.blocks[0].requires_grad_(False)
    machine = pretrain.Machine(torch.device("cpu"), "fp32", False, 8)
    places = [(parameter, type(one).__name__, group["weight_decay"])
              for one in pretrain.make_optimizers(model, settings, machine, betas=(0.9, 0.95))
              for group in one.param_groups for parameter in group["params"]]
    found = {id(parameter): where for parameter, *where in places}
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(places) == len(found) == len(trained)
    for name, parameter in trained.items():
        matrix = re.search(r"(qkv|proj|fc1|fc2|embed|head)\.weight$", name)
        muon = optimizer == "muon" and re.search(r"blocks\.\d\.(attn|mlp)\.\w+\.weight", name)
        assert found[id(parameter)] == ["Muon" if muon else "AdamW", 0.05 if matrix else 0], name


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_muon_steps_as_that_of_torch_does(shape):
    """At the same learning rate torch's takes steps half as long. It computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [pretrain.Muon([{"params": [ours], "lr": 0.01, "weight_decay": 0.5}]),
                  torch.optim.Muon([theirs], lr=0.02, weight_decay=0.25,
                                   adjust_lr_fn="match_rms_adamw")]
    optimizers[0].step()                                    # without a gradient: nothing happens
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_a_linear_probe_trains_the_head_alone_and_layer_decay_scales_what_each_layer_learns(
        runs, flags):
    layers = {"patch_embed.proj.bias": 3, "cls_token": 3, "pos_embed": 3, "blocks.0.norm1.bias": 2,
              "blocks.1.mlp.fc1.weight": 1, "norm.bias": 0, "head.weight": 0}
    assert {name: finetune.layers_above(name, depth=2) for name in layers} == layers
    out, before = Path("run"), read_model(runs["pretrain"])
    succeed(finetune, *flags["finetune"], "--layer-decay", 0, "--epochs", 1, "--out", out)
    for folder, trained in ((runs["linear"], "head"), (out, ("head", "norm"))):
        for name, value in read_model(folder).items():
            kept = value.equal(before.get(f"encoder.{name}", torch.tensor(0)))
            assert kept != name.startswith(trained), name


@pytest.mark.parametrize("more, mixed, noisy", [("", 0, 12), ("--mix", 18, 12),
                                                ("--patch-dropout 0", 0, 0)])
def test_labels_are_mixed_and_patches_left_out_if_the_settings_say_so(
        more, mixed, noisy, flags, monkeypatch):
    """In three epochs of six steps: each image is shown twice, the last epoch is whole."""
    noises, targets = [], []

    def record_noise(model, images, noise=None):
        if model.training:
            noises.append(noise)

    def record_labels(logits, labels, *_):
        if logits.requires_grad:
            targets.append(labels)

    call_before(monkeypatch, ViTClassifier, "forward", record_noise)
    call_before(monkeypatch, finetune, "score", record_labels)
    succeed(finetune, *flags["scratch"], "--epochs", 3, "--whole", 0.34, "--repeat", 2,
            *more.split(), "--out", "run")
    assert len(noises) == len(targets) == 18
    assert [noise is not None for noise in noises] == [True] * noisy + [False] * (18 - noisy)
    assert len({noise.sum().item() for noise in noises[:noisy]}) == noisy
    assert sum(labels.ndim == 2 and (labels < 1).all(1).any().item() for labels in targets) == mixed
    _, accuracy = finetune.score(torch.eye(2), torch.tensor([[0.6, 0.4], [0.3, 0.7]]))
    assert accuracy == 100                                  # the larger share of a label counts
    if not mixed:                                           # each image twice
        assert torch.cat(targets[:6]).bincount().tolist() == [20] * 6 + [18] * 4


def test_threads_are_chosen_when_a_run_begins_and_kept(runs, flags, monkeypatch):
    """Of eight threads, here two are made the fastest."""
    forward, out, numbers = MAEViT.forward, Path("run"), []

    def forward_slowly(*args, **options):
        time.sleep(0.05 * abs(numbers[-1] - 2) if numbers else 0)
        return forward(*args, **options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1] if numbers else 8)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(MAEViT, "forward", forward_slowly)
    for cores, command, expected in (
            (8, [*flags["pretrain"][2:], "--out", out], [1, 2, 4, 2]),      # 4 was slower
            (8, ["--resume", out], [2]), (9, ["--resume", out], [1, 2, 4, 2]),
            (8, ["--resume", out, "--threads", 3], [3]),
            (2, ["--resume", out, "--threads", 64], [2])):
        numbers.clear()
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert f"threads: {expected[-1]}, " in succeed(pretrain, *command)
        assert numbers == expected
    assert_same_run(out, runs["pretrain"])                  # timing has changed nothing


def test_a_checkpoint_of_a_better_machine_is_used_here_with_a_note(runs):
    better = dict(device="cuda", compile=True, precision="bf16", threads=64)
    for kind in ("pretrain", "finetune"):
        out = shutil.copytree(runs[kind], Path(kind))
        change_checkpoint(out, settings=read_settings(out) | better, machine=better | {"cores": 96})
        if kind == "finetune":
            assert "test accuracy" in succeed(finetune, "--evaluate", out)
        assert_bad_input("--device cuda: torch finds no such device here",
                         KINDS[kind], "--resume", out)
        status, _, err = run(KINDS[kind], "--resume", out, "--device", "cpu", "--no-compile",
                             "--precision", "fp32", "--epochs", 4)
        assert status == 0 and "note: --threads 64: this machine has " in err
        assert "device cuda -> cpu, precision bf16 -> fp32, compile True -> False, thr" in err
        assert len(read_log(out)) == 4


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_step_makes_every_tensor_on_the_device_of_the_data(kind, flags, monkeypatch):
    """As a GPU would find out. Here what is made without a device is on `meta` instead."""
    steps = []

    def end_step(*_):
        torch.set_default_device(None)
        steps.append("done")

    call_before(monkeypatch, data, "augment", lambda *_: torch.set_default_device("meta"))
    monkeypatch.setattr(pretrain.Machine, "add_up_gradients", end_step)
    try:
        succeed(KINDS[kind], *flags[kind], "--augment", "color", "--epochs", 1,
                "--micro-batch-size", 20, "--out", "run")
    finally:
        torch.set_default_device(None)
    assert len(steps) == 3


def test_another_seed_gives_other_weights_and_another_order(runs, flags, monkeypatch):
    seed, first = torch.manual_seed, "reconstructions/epoch-0000.npy"       # without training
    succeed(pretrain, *flags["pretrain"], "--seed", 1, "--out", "other")
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed(0))            # of the weights
    succeed(pretrain, *flags["pretrain"], "--seed", 1, "--out", "other-order")
    same, other, same_weights = (Path(folder, first).read_bytes() for folder in (
        runs["pretrain"], "other", "other-order"))
    assert other != same == same_weights and read_log("other-order") != read_log(runs["pretrain"])


def test_cuda_computes_what_the_cpu_does(runs, flags):
    if python("-c", "import torch; assert torch.cuda.is_available()", env=WITH_GPU).wait():
        pytest.skip("CUDA is not here")
    for kind in ("pretrain", "finetune", "linear"):
        few = ["--labels-per-class", 9] if kind == "finetune" else []
        for more in ([*flags[kind], *few, "--device", "auto", "--precision", "auto", "--out", kind],
                     ["--resume", kind, "--epochs", 6, "--micro-batch-size", 5]):
            process = python(KINDS[kind].__file__, *more, env=WITH_GPU)     # on CUDA, in bf16
            _, err = process.communicate()
            assert process.returncode == 0, err
        log = read_log(kind)
        assert data.load_checkpoint(kind)["machine"]["device"] == "cuda" and len(log) == 6
        for row, same in zip(read_log(runs[kind]), log):    # the first epochs
            for name in row.keys() & {"loss", "train_loss", "test_loss"}:
                assert float(same[name]) == pytest.approx(float(row[name]), rel=0.3), name


# ------------------------------------------------------------------------------ interruption


def test_two_runs_that_begin_at_the_same_time_do_not_share_a_folder(flags, runs, monkeypatch):
    """The second one begins and ends while the first one reads its data."""
    load = pretrain.load_data

    def load_after_another(*args):
        monkeypatch.setattr(pretrain, "load_data", load)
        succeed(pretrain, *flags["pretrain"], "--out", "run")
        return load(*args)

    monkeypatch.setattr(pretrain, "load_data", load_after_another)
    status, _, err = run(pretrain, *flags["pretrain"], "--seed", 1, "--out", "run")
    assert status == 2 and "error: another run has just begun in run: name another folder" in err
    assert_same_run(Path("run"), runs["pretrain"])


class Killed(BaseException):
    """Nothing in the programs catches it."""


def run_until(stop, program, *flags) -> bool:
    """Kill a program after it has written a file for which stop(path) is true. Returns whether
    that happened."""
    write = data.write_file

    def write_and_stop(path, content) -> None:
        write(path, content)
        if stop(Path(path)):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(data, "write_file", write_and_stop)
        succeed(program, *flags)
        return False
    return True


@pytest.mark.parametrize("kind, more, least", [
    ("pretrain", ["--checkpoint-every", 2], 16), ("finetune", [], 8),
    ("linear", ["--checkpoint-every", 2], 11)])
def test_a_run_killed_after_any_file_ends_bit_for_bit_as_the_unbroken_one(
        kind, more, least, flags, runs):
    """Also if it is killed before its first epoch."""
    killed, count = True, 0
    while killed:
        out, writes = Path(str(count)), itertools.count()
        killed = run_until(lambda _: next(writes) == count, KINDS[kind], *flags[kind], *more,
                           "--out", out)
        succeed(KINDS[kind], "--resume", out)
        assert_same_run(out, runs[kind])
        count += 1
    assert count > least


def assert_survives_a_kill(*flags) -> None:
    """A run killed in its last epoch ends as the unbroken one."""
    succeed(pretrain, *flags, "--out", "unbroken")
    assert run_until(lambda path: path.name == "weights.pt", pretrain, *flags, "--out", "killed")
    before = read_settings("killed")                        # in the checkpoint of an earlier epoch
    with contextlib.chdir("killed"):
        succeed(pretrain, "--resume", ".")                  # from another folder
    assert read_settings("killed") == before | {"out": "."}
    assert_same_run(Path("killed"), Path("unbroken"))


@pytest.mark.parametrize("how, tolerance", [("--compile", 1e-3), ("--precision bf16", 0.03)])
def test_a_run_may_be_compiled_or_in_bf16_and_name_its_data_from_elsewhere(
        how, tolerance, flags, runs, data_dir, monkeypatch):
    compile = functools.partial(torch.compile, backend="aot_eager")         # needs no compiler
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: compile(model))
    assert_survives_a_kill(*flags["pretrain"], "--data-dir", os.path.relpath(data_dir),
                           *how.split())
    (model, checkpoint), bf16 = data.load_model("killed"), how != "--compile"
    assert checkpoint["settings"]["data_dir"] == str(data_dir)
    machine = checkpoint["machine"]
    assert machine["compile"] != bf16 and machine["precision"] == ("bf16" if bf16 else "fp32")
    assert_close_logs(Path("killed"), runs["pretrain"], tolerance)
    images = data.load_dataset("cifar10", data_dir).test_images
    loss, _, _ = model(data.scale(images), visualize.random_noise(images, model, seed=0))
    assert checkpoint["log"][-1]["test_loss"] == pytest.approx(loss.item(), abs=1e-6)   # in fp32


def test_cifar_may_have_moved_to_data_and_a_data_set_may_be_new(runs, data_dir, monkeypatch):
    os.symlink(data_dir, "data")
    Path("emptied").mkdir()
    for kind in ("pretrain", "finetune"):
        out = shutil.copytree(runs[kind], Path(kind))
        moved = {"data_dir": os.path.abspath("emptied")}
        change_checkpoint(out, settings=read_settings(out) | moved)
        status, _, err = run(KINDS[kind], "--resume", out, "--epochs", 4)
        assert status == 0 and f"CIFAR-10 is not in {moved['data_dir']}: looking in data\n" in err
        assert read_settings(out)["data_dir"] == os.path.abspath("data")
    assert "test accuracy" in succeed(finetune, "--evaluate", "finetune")
    monkeypatch.setitem(data.SOURCES, "mine", data.SOURCES["cifar10"])
    change_checkpoint(Path("pretrain"), settings=read_settings("pretrain") | {"dataset": "mine"})
    assert "(default: mine)" in succeed(finetune, "--init", "pretrain", "--help")


def test_another_optimizer_can_be_resumed(flags, monkeypatch):
    monkeypatch.setattr(pretrain, "make_optimizers", lambda model, settings, machine, betas: [
        torch.optim.SGD([{"params": [*model.parameters()], "lr_scale": 1.0}], momentum=0.9)])
    assert_survives_a_kill(*flags["pretrain"])


def test_a_finished_run_may_have_more_epochs_and_remembers_how_it_was_started(
        runs, flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--its-own-flag"])     # nothing of this
    out = shutil.copytree(runs["pretrain"], Path("run"))
    (out / "log.csv").unlink()                              # the checkpoint has its rows
    shown = succeed(pretrain, *flags["pretrain"], "--resume", out)          # its own flags again
    assert read_log(out) == read_log(runs["pretrain"])
    assert "finished   all 3 epochs are done; a larger --epochs goes on" in shown
    shown = succeed(pretrain, "--resume", out, "--epochs", 5, "--micro-batch-size", 5,
                    "--checkpoint-every", 2, "--picture-every", 2)
    assert "finished  " not in shown
    log, settings = read_log(out), read_settings(out)
    assert [row["epoch"] for row in log] == list("12345")
    assert log[:3] == read_log(runs["pretrain"])
    assert float(log[3]["lr"]) > 0 and float(log[4]["lr"]) == 0
    assert settings["command"].startswith("pretrain.py --threads 1 --dataset cifar10 ")
    assert settings["command"].endswith(f"--epochs 3 --out {runs['pretrain']}")


@pytest.mark.parametrize("kind", ["pretrain", "linear"])
def test_more_epochs_are_not_forgotten_if_the_run_is_killed_at_once(kind, runs):
    out = shutil.copytree(runs[kind], Path("run"))
    assert run_until(lambda first_file: True, KINDS[kind], "--resume", out, "--epochs", 7,
                     "--checkpoint-every", 5)
    if kind == "linear":                                    # killed again, after its first epochs
        assert run_until(lambda path: len(path.read_bytes().splitlines()) == 4, KINDS[kind],
                         "--resume", out)
    succeed(KINDS[kind], "--resume", out)
    assert [row["epoch"] for row in read_log(out)] == list("1234567")
    assert "finished  " in succeed(KINDS[kind], "--resume", out)


def test_an_older_run_goes_on_with_a_new_column_in_its_log_and_its_curve(runs):
    """Here as if `loss` had been added later. In pictures letters lose their accents."""
    out = shutil.copytree(runs["pretrain"], Path("été"))
    log = data.load_checkpoint(out)["log"]
    change_checkpoint(out, log=[{name: row[name] for name in row if name != "loss"} for row in log])
    succeed(pretrain, "--resume", out, "--epochs", 4)
    log = visualize.read_log(out)
    assert [math.isnan(row["loss"]) for row in log] == [True, True, True, False]
    assert [row["lr"] > 0 for row in log] == [True, True, False, False]     # no value has moved
    with Image.open(out / "curves.png") as drawn:
        assert drawn.tobytes() == visualize.plot_curves({"ete": log}, "CIFAR-10").tobytes()


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "linear"])
def test_a_micro_batch_bounds_everything_that_is_computed_at_once(kind, flags, monkeypatch):
    """Training, evaluation and features."""
    sizes = []
    call_before(monkeypatch, mae.Encoder, "embed", lambda _, patches: sizes.append(len(patches)))
    succeed(KINDS[kind], *flags[kind], "--micro-batch-size", 7, "--out", "run")
    assert max(sizes) == 7
    sizes.clear()
    succeed(KINDS[kind], *flags[kind], "--batch-size", 10, "--epochs", 1, "--out", "x")
    assert max(sizes) == 10                                 # a batch is a bound, too


@pytest.mark.parametrize("kind, defaults", [("pretrain", PretrainSettings()),
                                            ("finetune", FinetuneSettings())])
def test_a_checkpoint_that_is_older_than_a_setting_has_its_default(kind, defaults, runs, flags):
    """Here without those that have their defaults, except those of the model."""
    out, older = (shutil.copytree(runs[kind], Path(name)) for name in ("run", "older"))
    model, settings = data.load_model(older)[0], read_settings(older)
    change_checkpoint(older, settings={
        name: value for name, value in settings.items()
        if value != getattr(defaults, name) or name in data.model_settings(type(model), settings)})
    if kind == "pretrain":
        succeed(visualize, "reconstruct", "--checkpoint", older, "--out", "x.png")
        succeed(finetune, *flags["finetune"], "--init", older, "--out", "tuned")
    else:
        assert succeed(finetune, "--evaluate", older) == succeed(finetune, "--evaluate", out)
    for folder in (out, older):
        succeed(KINDS[kind], "--resume", folder, "--epochs", 5)
    assert_same_run(older, out)


@pytest.mark.parametrize("kind, program, flag", [
    ("pretrain", pretrain, "--resume"), ("pretrain", finetune, "--init"),
    ("finetune", finetune, "--resume"), ("finetune", finetune, "--evaluate")])
def test_an_unknown_setting_of_a_checkpoint_is_named(kind, program, flag, runs):
    out = shutil.copytree(runs[kind], Path("run"))
    change_checkpoint(out, settings=read_settings(out) | {"mood": "good"})
    assert_bad_input("has the setting 'mood', which this program does not know", program, flag, out)


@pytest.mark.parametrize("name", ["log.csv", "reconstructions/epoch-0001.png"])
def test_a_log_or_a_picture_that_cannot_be_written_costs_a_note(name, flags, runs, monkeypatch):
    file = Path("run", name)
    refuse = Mock(side_effect=[PermissionError(13, "it is open", str(file))] + [None] * 9)
    call_before(monkeypatch, data, "write_file", lambda path, _: path == file and refuse())
    status, _, err = run(pretrain, *flags["pretrain"], "--out", "run")
    assert status == 0 and err.splitlines()[1:] == [        # the first note: too few steps
        f"note: {file}: it is open; the run goes on"]
    file.touch()                                            # the picture that is missing
    assert_same_run(Path("run"), runs["pretrain"])


def test_a_picture_that_fails_costs_a_note_with_the_traceback(flags, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "Canvas", lambda *_: 1 / 0)
    pretrain.main([*map(str, flags["pretrain"]), "--epochs", "1", "--out", "run"])
    out, err = capsys.readouterr()
    assert "done  " in out
    assert err.count("note: Traceback") == 3                # of epochs 0 and 1, and the curves
    assert err.endswith("\nZeroDivisionError: division by zero; the run goes on\n")


def test_a_file_that_is_held_for_a_moment_is_replaced_all_the_same(monkeypatch):
    """As a virus scanner holds it on Windows."""
    held = Mock(side_effect=[PermissionError(13, "held")] * 3 + [None])
    call_before(monkeypatch, os, "replace", held)
    data.write_file("file", b"new")
    assert snapshot(Path()) == {"file": b"new"}


@posix
@pytest.mark.parametrize("shell", ["{} 2>&-", "{} >&-", "PYTHONIOENCODING=ascii {}"])
def test_a_stream_may_be_missing_or_unable_to_print_a_letter(shell, flags):
    out = Path("mäe-狗")
    command = [sys.executable, pretrain.__file__, *flags["pretrain"], "--epochs", 1, "--out", out]
    done = subprocess.run(shell.format(shlex.join(map(str, command))), shell=True, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr.count("\n") == ("2>" not in shell)     # the note
    assert (out / "weights.pt").exists() and (out / "curves.png").exists()
    assert ("done  " in done.stdout) == (shell != "{} >&-")


def test_a_console_that_is_not_a_file_shows_the_time_left(monkeypatch):
    """As that of a development environment."""
    console = io.StringIO()
    console.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", console)
    with data.as_program():
        progress = data.Progress(10)
        progress.began, progress.shown = progress.began - 30, progress.shown - 1
        assert progress.advance(3)
        progress.show("epoch 1")
        assert not progress.advance(1)                      # only twice a second
    assert console.getvalue() == "epoch 1  0:01:10 left\x1b[K\r"


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(runs):
    resource = pytest.importorskip("resource")              # POSIX
    out = shutil.copytree(runs["pretrain"], Path("run"))
    before = (out / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))    # of every file
    status, _, err = run(pretrain, "--resume", out, "--epochs", 9, "--picture-every", 100)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and err == f"error: {out / 'checkpoint.pt'}: File too large\n"
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.rglob(".*"))


def python(*command, env=os.environ) -> subprocess.Popen:
    """A program as a user would start it, with pipes. Ctrl-C reaches it even if these tests run in
    the background, where shells ignore it for all that is started there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, env={
        **env, "PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@posix
def test_kill_9_costs_an_epoch_at_most_and_ctrl_c_ends_a_program_without_a_traceback(flags, runs):
    for stop, epochs in ((signal.SIGKILL, 3), (signal.SIGINT, 10**6)):
        process = python(pretrain.__file__, *flags["pretrain"], "--epochs", epochs,
                         "--out", f"run-{epochs}")
        assert any(line.startswith("epoch 1/") for line in process.stdout)  # told without delay
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    succeed(pretrain, "--resume", "run-3")                  # the one that was killed
    assert read_log("run-3") == read_log(runs["pretrain"])


# ------------------------------------------------------------------------------ several processes


LEAVING = """
import importlib, pathlib, sys
with importlib.import_module("data").as_program():
    importlib.import_module(sys.argv.pop(1)).main()
sys.exit(any("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
"""                             # a thread of gloo that outlives Python may abort the process


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "linear"])
def test_two_processes_compute_what_one_does_and_can_resume_it(kind, flags):
    """From the beginning, or after a kill; with batches and micro-batches of any size."""
    flags = [*flags[kind], "--batch-size", 31, "--checkpoint-every", 1]
    one, two = Path("one"), Path("two")
    succeed(KINDS[kind], *flags, "--out", one)
    flags += ["--out", two]
    if kind != "pretrain":
        assert run_until(lambda path: path.name == "weights.pt", KINDS[kind], *flags)
        flags = ["--resume", two]
    process = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                     "--no-python", sys.executable, "-c", LEAVING, KINDS[kind].__name__, *flags,
                     "--micro-batch-size", 7)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    epochs = len(read_log(one))
    assert "processes: 2" in out and out.count(f"epoch {epochs}/{epochs}") == 1     # one prints
    assert_close_logs(one, two, 1e-3)
    torch.testing.assert_close(read_model(one), read_model(two), rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------------------ bad input


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)}


def assert_bad_input(message: str, program, *flags) -> None:
    """One line on standard error that holds `message`, status 2, no file changed."""
    before = snapshot(Path())
    status, _, err = run(program, *flags)
    assert status == 2, err
    *notes, line = err.splitlines()
    assert line.startswith("error: ") and message in line, err
    assert all(note.startswith(("note: ", "reading ")) for note in notes), err
    assert snapshot(Path()) == before


BAD_INPUT = [
    (pretrain, "--epochs 0", "--epochs: '0' is not a whole number from 1 to 1000000"),
    (pretrain, "--base-lr nan", "--base-lr: 'nan' is not a number from 0 to 1000"),
    (pretrain, "--mask-ratio 1", "a ratio of 1.0 leaves no visible patch out of 16"),
    (pretrain, "--patch-size 5", "patch size 5 does not divide an image of 32 x 32"),
    (pretrain, "--validation 200", "--validation 200: CIFAR-10 has 200 training images"),
    (pretrain, "--image-size 64", "only --dataset folder can have another size"),
    (pretrain, "--data-dir link", "/link: File exists"),
    (pretrain, "--out file/run", ": Not a directory"),
    (pretrain, "--data-dir nothing --out {runs}/finetune",      # before data are read
     "already holds files: to continue that run, python pretrain.py --resume {runs}/finetune; to "
     "start another one, add --out {runs}/finetune-2"),
    (pretrain, "--resume .", "checkpoint.pt: No such file"),
    (pretrain, "--resume {runs}/finetune", "from finetune.py, but one from pretrain.py is needed"),
    (pretrain, "--resume {runs}/pretrain --dim 32", "--dim is 16 for the run in"),
    (pretrain, "--resume {runs}/pretrain --epochs 2", "--epochs 2: 3 epochs are done already"),
    (pretrain, "--resume {runs}/pretrain --data-dir {data}/other", "tested on [96, 40] images"),
    (finetune, "--labels-per-class 5000", "only 10 of the 96 training images"),
    (finetune, "--init {runs}/pretrain --dim 32", "--dim is 16 for the encoder of"),
    (finetune, "--mode linear", "--mode linear needs --init"),
    (finetune, "--mode linear --init {runs}/pretrain --mix", "--mix is False for a linear probe"),
    (finetune, "--evaluate {runs}/finetune --epochs 9", "--epochs has no effect on --evaluate"),
    (finetune, "--evaluate {runs}/finetune --dataset cifar100 --data-dir {data}",
     "but CIFAR-100 has 0, 1, 2, 3, 4"),
    (pretrain, "--resume {weights}/pretrain.pt", "pretrain.pt cannot be resumed: name the folder"),
    (pretrain, "--resume {runs}/pretrain/weights.pt", "weights.pt cannot be resumed: name the"),
    (finetune, "--resume {runs}/linear --compile", "--compile is False for a linear probe"),
    (visualize, "predict --checkpoint {runs}/finetune --dataset shapes", "but shapes has disc"),
    (visualize, "architecture --checkpoint {runs}/pretrain --count 2", "only one image"),
    (visualize, "--out x.jpg", "must end in .png"),
    (visualize, "reconstruct x.png --out x.png", "is one of the pictures to read"),
    (visualize, "attention --checkpoint {runs}/pretrain --block 3", "--block 3: the encoder has 1"),
    (visualize, "predict --checkpoint {runs}/pretrain", "pretrain.py, but one from finetune.py is"),
    (visualize, "photo.jpg", "photo.jpg: No such file"),
]


@posix
@pytest.mark.parametrize("program, command, message", BAD_INPUT,
                         ids=[command for _, command, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_harms_nothing(program, command, message, runs, data_dir, flags):
    Path("file").write_text("a file in the place of a folder")
    Path("link").symlink_to("nothing")
    names = dict(runs=runs["pretrain"].parent, data=data_dir, weights=RESULTS / "weights")
    command = shlex.split(command.format(**names))
    if program is not visualize and not {"--resume", "--evaluate"} & set(command):
        init = "--init" in command
        base = flags["pretrain" if program is pretrain else "finetune" if init else "scratch"]
        command = [*base[:-1], *command] if init else [*base, *command]     # without --mix
    before = snapshot(names["runs"])
    assert_bad_input(message.format(**names), program, *command)
    assert snapshot(names["runs"]) == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(flags):
    explosive = ["--base-lr", 999, "--optimizer", "adamw", "--epochs", 50, "--warmup", 0.4]
    status, _, err = run(pretrain, *flags["pretrain"], *explosive, "--out", "run")
    assert status == 2 and err.count("\n") == 1 and "finite" in err and "--base-lr" in err
    assert all(value.isfinite().all() for value in read_model("run").values())


def test_a_compiler_that_does_not_work_is_an_error_only_if_asked_for(flags, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    assert_bad_input("torch.compile does not work here: division by zero; train with --no-compile",
                     pretrain, *flags["pretrain"], "--compile")
    assert pretrain.works_compiled(None, torch.device("cuda")) is False     # the default there
    note = capsys.readouterr().err
    assert note.startswith("note: torch.compile does not work here: ") and note.count("\n") == 1


def test_a_gpu_that_torch_cannot_use_gives_way_to_the_cpu_unless_asked_for(flags, monkeypatch):
    no_kernels = RuntimeError("CUDA error: no kernel image is available\nfor this device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", Mock(side_effect=no_kernels))
    assert_bad_input("--device cuda: torch", pretrain, *flags["pretrain"], "--device", "cuda")
    status, out, err = run(pretrain, *flags["pretrain"], "--device", "auto", "--epochs", 1)
    assert status == 0 and "machine    cpu, fp32" in out
    assert "cannot use this GPU: CUDA error: no kernel image is available; using the CPU" in err


def test_mps_has_small_micro_batches_and_neither_compiles_nor_shares(monkeypatch):
    """Products of more than 32,768 rows were wrong there; a batch of `full` has 32,896."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    settings = PretrainSettings(device="mps", batch_size=4096)
    assert pretrain.join_machine(settings).micro_batch_size == 64
    assert pretrain.find_device("auto", 0).type == "cpu"    # MPS has never been tried
    for processes, compile in ((1, True), (2, None)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(data.BadInput, match="--device mps works without --compile"):
            pretrain.join_machine(replace(settings, compile=compile))


@pytest.mark.parametrize("processes, micro_batch_size, graphs", [
    (1, 64, True), (1, 32, False), (2, 32, True), (2, 31, False), (3, 21, False)])
def test_cuda_graphs_are_used_if_each_process_has_one_micro_batch(processes, micro_batch_size,
                                                                  graphs, monkeypatch):
    """The next replay overwrites the gradients that the last one returned."""
    monkeypatch.setattr(torch, "compile", lambda model, mode: mode)
    machine = pretrain.Machine(torch.device("cuda"), "fp32", True, micro_batch_size, 0, processes)
    mode = machine.compiled(nn.Identity(), batch_size=64)
    assert mode == ("reduce-overhead" if graphs else None)
    parts = [replace(machine, rank=rank).micro_batches(64) for rank in range(processes)]
    assert (max(map(len, parts)) == 1) == graphs


@pytest.mark.parametrize("precision, bf16", [("bf16", True), ("auto", False)])
def test_bf16_is_used_and_if_it_is_emulated_that_is_told(precision, bf16, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "has_bf16_matmuls", lambda device: False)
    machine = pretrain.join_machine(PretrainSettings(device="cpu", precision=precision))
    assert ("note: bf16 is emulated here" in capsys.readouterr().err) == bf16
    with machine.autocast():
        assert ((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16) == bf16


@pytest.mark.parametrize("system, line", [("linux", "python x.py --resume 'my run'"),
                                          ("win32", 'python x.py --resume "my run"')])
def test_a_command_to_type_is_quoted_as_the_system_needs_it(system, line, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    assert data.shell_line("python", "x.py", "--resume", "my run") == line


@pytest.mark.parametrize("fault", [
    lambda *_, **__: np.empty((2**30, 2**20)), lambda *_, **__: torch.empty(2**30, 2**20),
    *(Mock(side_effect=RuntimeError(text)) for text in (
        "CUDA out of memory.", "DefaultCPUAllocator: not enough memory",
        "Invalid buffer size: 12.00 GB"))])
@pytest.mark.parametrize("function", ["torch.load", "torch.nn.Module.load_state_dict"])
def test_too_little_memory_is_one_line_and_no_damage(fault, function, runs, monkeypatch):
    monkeypatch.setattr(function, fault)
    assert_bad_input("error: out of memory", visualize, "ratios", "--checkpoint", runs["pretrain"])


def test_a_fault_of_the_program_keeps_its_traceback(runs, monkeypatch):
    """Here one that a reader makes in the model. The checkpoint is not called damaged."""
    monkeypatch.setattr(mae, "Attention", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), data.as_program():
        visualize.main(["ratios", "--checkpoint", str(runs["pretrain"])])


@pytest.mark.parametrize("damage", [
    None, lambda good: b"", lambda good: good[:-100],
    lambda good: good[:3 * 3073] + bytes([10]) + good[3 * 3073 + 1:]],          # a label
    ids=["missing", "empty", "cut off", "label"])
def test_damaged_data_files_are_bad_input(damage, data_dir, flags):
    folder = shutil.copytree(data_dir / "cifar-10-batches-bin", Path("cifar-10-batches-bin"))
    file = folder.absolute() / "data_batch_3.bin"
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    message = (f"{file} is missing or damaged: it is not made of 3,073-byte records with labels "
               f"from 0 to 9; put the right file there, or move {file.parent} away")
    for dataset in ("cifar10", "auto"):                     # a damaged one is never replaced
        assert_bad_input(message, pretrain, *flags["pretrain"], "--data-dir", ".", "--dataset",
                         dataset)


class Server(socketserver.StreamRequestHandler):
    """Stands in for the server of CIFAR-10: sends the answer, whatever it is asked."""
    answer = b""

    def handle(self) -> None:
        self.request.recv(10_000)
        self.wfile.write(b"HTTP/1.0 " + self.answer)


@pytest.fixture
def archive(data_dir, tmp_path_factory, monkeypatch) -> bytes:
    """The archive of CIFAR-10 that the server should send."""
    file = shutil.make_archive(tmp_path_factory.mktemp("archive") / "cifar", "gztar", data_dir,
                               "cifar-10-batches-bin")
    archive = Path(file).read_bytes()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(data.SOURCES, "cifar10", replace(
            data.SOURCES["cifar10"], md5=hashlib.md5(archive).hexdigest(),
            url=f"http://127.0.0.1:{server.server_address[1]}/cifar.tar.gz"))
        yield archive
        server.shutdown()


@pytest.mark.parametrize("fault", ["404", "cut off", "changed", "an address that is none"])
def test_a_download_that_fails_leaves_nothing_and_can_be_repeated(fault, archive, data_dir, flags):
    folder, source = Path("data"), data.SOURCES["cifar10"]
    Server.answer = {
        "404": b"404 Not Found\r\n\r\n", "changed": b"200 OK\r\n\r\n" + archive[:-1] + b"!",
        "cut off": b"200 OK\r\nContent-Length: 9999999\r\n\r\n" + archive[:-9],
        "an address that is none": b"302 Found\r\nLocation: http://[/\r\n\r\n"}[fault]
    command = [*flags["pretrain"], "--data-dir", folder, "--epochs", 1, "--out"]
    assert_bad_input(source.url, pretrain, *command, "run")
    status, out, err = run(pretrain, *command, "shapes", "--dataset", "auto")
    assert status == 0 and "CIFAR-10 IS NOT HERE" in err and "data       shapes" in out
    assert not list(folder.iterdir())

    Server.answer = b"200 OK\r\nContent-Length: abc\r\n\r\n" + archive  # an unknown length
    succeed(pretrain, *command, "run")
    assert os.listdir(folder) == [source.folder]
    assert snapshot(folder / source.folder) == snapshot(data_dir / source.folder)


def test_two_programs_may_download_at_the_same_time(archive, monkeypatch):
    """The second one begins and ends while the first one downloads."""
    fetch, Server.answer = data.fetch, b"200 OK\r\n\r\n" + archive

    def fetch_after_another(*args) -> None:
        monkeypatch.setattr(data, "fetch", fetch)
        data.load_dataset("cifar10", "data")
        fetch(*args)

    monkeypatch.setattr(data, "fetch", fetch_after_another)
    assert data.load_dataset("cifar10", "data").counts() == [200, 40]
    assert os.listdir("data") == ["cifar-10-batches-bin"]


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(HERE / 'evil-was-here'))}",)


def written(save, *args, **options) -> bytes:
    """What save(file, ...) writes to the file."""
    buffer = io.BytesIO()
    save(buffer, *args, **options)
    return buffer.getvalue()


def test_damaged_checkpoints_are_bad_input(runs):
    file = shutil.copytree(runs["pretrain"], Path("run")) / "checkpoint.pt"
    good, content = data.load_checkpoint(file), file.read_bytes()
    model, (adamw, muon) = good["model"], good["optimizers"]
    tensor = model["encoder.pos_embed"].numpy().tobytes()
    for broken in (b"", content[:-2000], content.replace(tensor, tensor[::-1]),
                   pickle.dumps(Evil()), written(lambda buffer: torch.save(
                       {"state_dict": model}, buffer))):
        file.write_bytes(broken)
        assert_bad_input(str(file), pretrain, "--resume", file.parent)
        assert_bad_input(str(file), visualize, "ratios", "--checkpoint", file)
    for change in (
            {"model": Evil()}, {"model": None}, {"model": dict(list(model.items())[1:])},
            {"model": {name: value[..., :1] for name, value in model.items()}},
            {"version": data.CHECKPOINT_VERSION + 1}, {"version": "new"}, {"kind": ["pretrain"]},
            {"settings": None}, {"settings": good["settings"] | {"dim": 32}},
            {"optimizers": None}, {"optimizers": [adamw]}, {"optimizers": [muon, adamw]}):
        data.save_checkpoint(file, good | change)
        assert_bad_input(str(file), pretrain, "--resume", file.parent)
    assert not (HERE / "evil-was-here").exists()


# ------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_reconstruction_shows_what_was_masked_predicted_and_there(norm_pix_loss):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), data.unscale(random_images(3))
    patches, noise = patchify(data.scale(images), 8), random_noise(3, 16)
    _, pred, mask = model(data.scale(images), noise)
    if norm_pix_loss:
        pred = mae.denormalize_patches(pred, patches)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    predicted = data.unscale(unpatchify(pred, 8))
    tiles, errors = visualize.reconstruct(model, images, noise)
    masked, filled, original = tiles.unbind(dim=1)
    assert torch.equal(original, images)
    assert torch.equal(masked, torch.where(hidden, visualize.HIDDEN, images))
    assert torch.equal(filled, torch.where(hidden, predicted, images))
    assert torch.equal(visualize.reconstruct(model, images, noise, raw=True)[0][:, 1], predicted)
    error = (pred - patches).square().mean(dim=-1)          # (3, 16), of the pixels
    torch.testing.assert_close(errors, (error * mask).sum(dim=1) / mask.sum(dim=1))
    other = tiny_mae(mask_ratio=0.5, norm_pix_loss=norm_pix_loss)
    half, _ = visualize.reconstruct(model, images, noise, mask_ratio=0.5)
    assert torch.equal(half, visualize.reconstruct(other, images, noise)[0])
    for epoch, one in ((12, other), (7, model)):            # what a timeline is drawn from
        visualize.save_epoch(Path("reconstructions"), epoch, one, images, noise, "")
    assert torch.equal(visualize.read_epochs(Path())[7], tiles)


PICTURES = [
    "reconstruct --checkpoint {runs}/pretrain --count 2 --raw --mask-ratio 0.5",
    "ratios --checkpoint {runs}/pretrain --indices 3,1,12",
    "timeline {runs}/pretrain",
    "timeline {runs}/pretrain --out x.gif",
    "predict --checkpoint {runs}/finetune --count 2",
    "curves {runs}/finetune {runs}/scratch/log.csv {runs}/linear",
    "attention --checkpoint {runs}/finetune --patch 1,2 --block 1",
    "embeddings --checkpoint {runs}/linear",
    "architecture --checkpoint {runs}/pretrain"]


@pytest.mark.parametrize("command", PICTURES)
def test_every_picture_is_drawn(command, runs):
    name, *_ = command = shlex.split(command.format(runs=runs["pretrain"].parent))
    out = succeed(visualize, *command)
    file, = Path().iterdir()
    assert out.endswith(f"wrote {file.name}\n")
    assert out.count(": error ") == (2 if name == "reconstruct" else 0)
    with Image.open(file) as picture:
        assert file.suffix == ".png" or picture.n_frames == 4
        assert picture.width >= 640
        below = picture.convert("RGB").crop((0, 200, *picture.size))        # of the caption
        assert len(below.getcolors(1 << 24)) > 20


def test_the_tiles_of_a_grid_are_squares_in_rows_and_columns():
    colors = [(40 * i, 90, 200) for i in range(6)]          # three columns of two tiles
    tiles = torch.tensor(colors, dtype=torch.uint8).view(3, 2, 3, 1, 1).expand(3, 2, 3, 8, 8)
    first, *others = (visualize.Column("column", column) for column in tiles)
    groups = [[first._replace(notes=["a note", "another"]), others[0]], [others[1]]]
    pixels, corners = np.array(visualize.draw_grid(groups, "Title", "caption")), []
    for color in colors:
        y, x = np.nonzero((pixels == color).all(axis=-1))
        assert len(y) == 320**2 and np.ptp(y) == np.ptp(x) == 319       # a filled square
        corners.append((x.min(), y.min()))
    x, y = np.array(corners).reshape(3, 2, 2).transpose(2, 1, 0)        # (rows, columns) each
    assert (x[0] == x[1]).all() and (np.diff(x[0]) == [326, 350]).all()     # gaps of 6 and 30
    assert (y.T == y[:, 0]).all() and (np.diff(y[:, 0]) == 360).all()   # room for a note


def test_large_images_are_drawn_smaller_to_fit_the_page():
    model, image = tiny_mae(image_size=512, patch_size=64), torch.zeros(3, 512, 512).byte()
    tiles, _ = visualize.reconstruct(model, image[None].expand(3, -1, -1, -1), random_noise(3, 64))
    assert visualize.draw_triples(tiles, "title", "caption").width <= visualize.WIDTH
    for _, content, *_ in visualize.make_stages(model, image, random_noise(1, 64)):
        if torch.is_tensor(content):
            assert max(visualize.mosaic(content, visualize.STAGE).size) <= visualize.STAGE


def test_pictures_are_true_if_patches_are_masked_in_another_way():
    """Here the last ones stay visible, whatever the noise says."""
    class FromTheEnd(PatchShuffle):
        def forward(self, tokens, noise=None, mask_ratio=None):
            order = -torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
            return super().forward(tokens, order, mask_ratio)

    model = tiny_mae()
    model.shuffle = FromTheEnd(0.75)
    images, noise, gray = data.unscale(random_images(1)), random_noise(1, 16), visualize.HIDDEN
    stages = visualize.make_stages(model, images[0], noise)
    shown = {name: content for name, content, *_ in stages}
    patches, tokens, errors = (shown[name] for name in ("patches", "tokens", "error per patch"))
    assert shown["visible tokens"].equal(patches.flip(0)[:4])
    assert tokens[12:].equal(patches[12:]) and (tokens[:12] == gray).all()
    assert (errors[12:] == gray).all() and not (errors[:12] == gray).all()
    for ratio, rows in ((None, 24), (0.5, 16)):             # the model's own ratio, and another
        tiles, _ = visualize.reconstruct(model, images, noise, mask_ratio=ratio)
        assert tiles[:, 0, :, rows:].equal(images[:, :, rows:])
        assert (tiles[:, 0, :, :rows] == gray).all()


def test_predictions_are_told_and_drawn_and_wrong_ones_are_marked(runs):
    """By classifiers that predict the same for every image."""
    folder, picture_file = shutil.copytree(runs["finetune"], Path("run")), Path("x.PNG")

    def predict(probabilities: list[float], classes: list[str], *flags) -> tuple[list[str], set]:
        head = {"head.weight": torch.zeros(len(classes), 16),
                "head.bias": torch.tensor(probabilities).log()}
        change_checkpoint(folder, classes=classes, model=read_model(folder) | head)
        out = succeed(visualize, "predict", *flags, "--checkpoint", folder, "--out", picture_file)
        with Image.open(picture_file) as drawn:
            colors = {color for _, color in drawn.getcolors(1 << 24)}
        return out.splitlines()[:-1], colors & {visualize.TRUE, visualize.WRONG}

    ten = [0.004, 0.006, 0.01, 0.5, 0.28, 0.02, 0.1, 0.03, 0.05, 0]
    lines, colors = predict(ten, [*map(str, range(10))], "--indices", "3,4,9,13")
    best = "3 50.0 %, 4 28.0 %, 6 10.0 %, 8 5.0 %, 7 3.0 %"
    assert lines == [f"3 3: {best}", f"4 4: {best} (wrong)", f"9 9: {best} (wrong)",
                     f"13 3: {best}"]
    assert colors == {visualize.TRUE, visualize.WRONG}
    Path("photo.png").write_bytes(picture(SMOOTH))
    classes = ["cat", "été 狗" * 20]
    assert predict([0.75, 0.25], classes, "photo.png") == (
        [f"photo: cat 75.0 %, {classes[1]} 25.0 %"], {visualize.TRUE})
    frog = [HERE / "assets" / "examples" / "04-frog.png", "--out", "x.png"]
    assert succeed(visualize, "predict", *frog).startswith("04-frog: frog ")
    assert succeed(visualize, *frog).startswith("04-frog: error ")      # without a picture's name


def test_a_pillow_that_cannot_draw_text_is_one_line(runs, monkeypatch):
    monkeypatch.setattr(ImageFont, "load_default", Mock(side_effect=ImportError("no FreeType")))
    visualize.font.cache_clear()
    assert_bad_input("cannot draw text", visualize, "ratios", "--checkpoint", runs["pretrain"])


SMOOTH = np.stack(np.broadcast_arrays(np.arange(0, 256, 8)[:, None], np.arange(0, 128, 4), 90),
                  axis=-1).astype(np.uint8)                 # (32, 32, 3)
DEEP = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
LONG_TEXT, LYING = PngImagePlugin.PngInfo(), Image.Exif()
LONG_TEXT.add_text("a long text", "x" * 2_000_000, zip=True)
LYING[0x0112] = 6                                           # on its left side
OPAQUE = np.repeat([[0, 255]], 16, axis=1).astype(np.uint8).repeat(32, axis=0)      # (32, 32)


def picture(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    """The content of a picture file."""
    return written(Image.fromarray(pixels).convert(mode).save, kind, **options)


@pytest.mark.parametrize("content, expected, tolerance", [
    (picture(np.rot90(SMOOTH), "JPEG", exif=LYING, quality=100, subsampling=0), SMOOTH, 4),
    (picture(SMOOTH, "JPEG", "CMYK", quality=100), SMOOTH, 8),
    (picture(np.dstack([SMOOTH, OPAQUE])), np.where(OPAQUE[..., None], SMOOTH, 255), 0),
    (picture(DEEP), (DEEP / 257).round()[..., None], 0),
    (picture(0 * SMOOTH + 90, "GIF", save_all=True, append_images=[Image.new("L", (32, 32))]),
     90, 0),
    (picture(SMOOTH, pnginfo=LONG_TEXT), SMOOTH, 0),
    (picture(SMOOTH, icc_profile=bytes(2_000_000)), SMOOTH, 0),
    (picture(np.pad(SMOOTH, ((0, 0), (20, 20), (0, 0)))), SMOOTH, 0)],
    ids=["lying", "cmyk", "transparent", "16 bits", "animated", "long text", "profile", "wide"])
def test_pictures_are_read_upright_opaque_square_and_with_8_bits(content, expected, tolerance):
    Path("picture").write_bytes(content)
    pixels = data.read_image("picture", 32).permute(1, 2, 0).numpy()
    assert abs(pixels.astype(int) - expected).max() <= tolerance


TILES = np.zeros((5, 3, 3, 32, 32), np.uint8)               # of five images
LOG = b"epoch,loss,test_loss,lr,seconds\n"
BROKEN_FILES = [    # subcommand, content of the file that it reads, message
    ("reconstruct", b"<html>", "file is not a picture of a kind that can be read ("),
    ("reconstruct", picture(np.zeros((500, 500), np.uint8), compress_level=0)[:9000],
     "file is damaged"),
    ("reconstruct", picture(np.zeros((9_000, 24_000), bool)),
     "file is too large: it has 216 megapixels, the limit is 100"),
    *(("reconstruct", picture(DEEP, "TIFF", mode), "has 32-bit values") for mode in "IF"),
    *(("curves", content, "is not a whole log.csv") for content in (
        b"\0\xff\2", LOG, LOG + b"1,0.5,0.4,0.1,3\n2,0.4,0.4,0.1,1", LOG + b"1,much,0.4,0.1,3\n")),
    ("timeline", pickle.dumps(Evil()), "is damaged"),
    ("timeline", written(np.save, TILES[:4]), "is damaged")]


@pytest.mark.parametrize("command, content, message", BROKEN_FILES)
def test_files_that_cannot_be_drawn(command, content, message, runs):
    given = file = Path("file")
    more = ["--checkpoint", runs["pretrain"]] if command == "reconstruct" else []
    if command == "timeline":
        given, file = ".", Path("reconstructions/epoch-0002.npy")
        file.parent.mkdir()
        np.save(file.with_stem("epoch-0001"), TILES)
    file.write_bytes(content)
    assert_bad_input(message, visualize, command, given, *more, "--out", "out.png")
    assert not (HERE / "evil-was-here").exists()


def test_a_log_may_have_a_byte_order_mark_and_values_that_are_missing_or_huge():
    """As a spreadsheet writes it."""
    rows = b"1,0.5,0.4,0.1,3\n2,nan,1e308,0.1,3\n3,,-1e308,0.1,\n"
    Path("log.csv").write_bytes(b"\xef\xbb\xbf" + LOG + rows)
    assert succeed(visualize, "curves", ".") == "wrote curves.png\n"


# ------------------------------------------------------------------------------ the README


README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"^ *(?:python|torchrun .*?) ((?:pretrain|finetune|visualize)\.py.*)$",
                      README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_tiny(command: str) -> None:
    """A command of the README, with one epoch and a small model. A later flag wins."""
    file, *flags = shlex.split(command)
    if file != "visualize.py" and not {"--resume", "--evaluate"} & set(flags):
        if "--init" not in flags:
            flags += shlex.split("--patch-size 8 --dim 48 --depth 1 --heads 3")
        for flag, value in (("--labels-per-class", 2), ("--repeat", 2)):
            flags += [flag, value] if flag in flags else []         # a smaller number, if any
        flags += shlex.split("--epochs 1 --batch-size 100 --device cpu --precision fp32 "
                             "--no-compile --threads 1")
    status, _, err = run(sys.modules[file.removesuffix(".py")], *flags)
    assert status == 0, f"{command}: {err}"


@posix
@pytest.mark.parametrize("cifar_is_here", [True, False])
def test_every_command_in_the_readme_works(cifar_is_here, data_dir, pictures, monkeypatch):
    """In the order of the README, each once. The first ones also without CIFAR-10 and a network."""
    source = replace(data.SOURCES["cifar10"], url="http://127.0.0.1:9/x.tar.gz")
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    for name, target in (("results", RESULTS), ("assets", HERE / "assets"),
                         ("my_pictures", pictures), ("data", data_dir)):
        if cifar_is_here or name != "data":
            os.symlink(target, name)
    assert len(COMMANDS) > 15
    for command in dict.fromkeys(COMMANDS):
        if cifar_is_here or not re.search("recipe|limit|folder|cifar|out runs|results", command):
            run_tiny(command.replace("2000", "100"))        # there are 200 images
    datasets = {read_settings(run)["dataset"] for run in Path("runs").iterdir()}
    assert datasets == ({"cifar10", "cifar100", "folder"} if cifar_is_here else {"shapes"})


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1])
def test_every_snippet_in_the_readme_works(snippet, monkeypatch):
    if "timm" in snippet:
        try:
            importlib.import_module("timm")
        except Exception as error:  # it, or what it needs, is missing or does not fit torch
            pytest.skip(f"timm cannot be imported: {error}")
    monkeypatch.chdir(HERE)
    exec(snippet, {})


# ------------------------------------------------------------------------------ the results

with open(RESULTS / "runs.csv") as file:
    RUNS = {row["name"]: row for row in csv.DictReader(file)}
STATED = {      # in README.md, and the run behind it, or what the runs of several seeds begin with
    "92.16 ± 0.20 %": "finetune-lunch", "89.22 ± 0.07 %": "scratch-lunch-69-mix",
    "81.65 ± 0.13 %": "finetune-bf16", "54.9 ± 0.2 %": "finetune-50-labels",
    "32.8 ± 2.1 %": "scratch-50-labels", "89.96 %": "finetune-20-20",
    "92.56 %": "gpu-wide-finetune", "93.00 %": "finetune-afternoon", "73.39 %": "scratch",
    "56.8 %": "linear-pretrain-3", "57.0 %": "linear-mask-50", "54.1 %": "linear-pixels-3",
    "49.2 %": "linear-patch-8", "53.7 %": "linear-adamw",
}


def test_the_table_of_the_results_says_what_logs_and_weights_say():
    logs = {path.stem: visualize.read_log(path) for path in RESULTS.glob("logs/*.csv")}
    weights = {path.stem: data.load_model(path)[1]["log"] for path in RESULTS.glob("weights/*.pt")}
    assert weights and logs.keys() == RUNS.keys()
    for name, log in [*logs.items(), *weights.items()]:
        assert float(RUNS[name]["test_loss"]) == log[-1]["test_loss"], name
        assert float(RUNS[name]["test_accuracy"] or 0) == log[-1].get("test_accuracy", 0), name


@pytest.mark.parametrize("text, run", STATED.items())
def test_the_accuracies_in_the_readme_are_those_of_the_runs(text, run):
    values = [float(row["test_accuracy"]) for name, row in RUNS.items()
              if re.fullmatch(rf"{run}(-\d)?", name)]
    decimals = len(re.match(r"\d+\.(\d+)", text)[1])
    spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    assert f"{np.mean(values):.{decimals}f}{spread} %" == text and text in README


@posix
@pytest.mark.parametrize("tier", ["laptop", "lunch", "wider"])
def test_the_script_of_the_results_resumes_and_its_commands_work(
        tier, data_dir, tmp_path, monkeypatch):
    """First with a stand-in for python that prints its arguments, then with the commands that it
    printed."""
    script = (RESULTS / "reproduce.sh").read_text()
    trial, = re.findall(r"^#     RUNS=/tmp/try (.*)$", script, re.MULTILINE)
    Path("python").write_text('#!/bin/sh\necho "$@"\nmkdir -p "$3"\ntouch "$3/$LEAVE"\n')
    Path("python").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def commands(leave: str) -> list[str]:
        command = f"LEAVE={leave} RUNS=runs {trial} bash {RESULTS}/reproduce.sh {tier}"
        return subprocess.check_output(command, shell=True, text=True).splitlines()

    begun = commands("checkpoint.pt")
    resumed = [f"{program} --resume {out}" for program, _, out, *_ in map(str.split, begun)]
    assert len(begun) >= 2 and commands("curves.png") == resumed and commands("curves.png") == []
    shutil.rmtree("runs")
    os.symlink(data_dir, "data")
    for command in begun:
        file, *flags = shlex.split(command)
        flags += ["--repeat", 2] if "--repeat" in flags else []
        succeed(sys.modules[file.removesuffix(".py")], *flags, "--device", "cpu", "--threads", 1)


@posix
def test_the_script_of_the_results_collects_what_the_machine_did(flags, tmp_path):
    """The precision of the run, and not "auto", which was asked."""
    succeed(pretrain, *flags["pretrain"], "--epochs", 1, "--precision", "auto", "--out", "runs/new")
    os.makedirs("results/logs")
    shutil.copy(RESULTS / "runs.csv", "results")
    Path("python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    Path("python").chmod(0o755)
    places = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", RUNS=f"{tmp_path}/runs",
                  RESULTS=f"{tmp_path}/results")
    subprocess.run(["bash", RESULTS / "reproduce.sh", "collect"], cwd=HERE, check=True,
                   env=os.environ | places)
    with open("results/runs.csv") as file:
        row = {row["name"]: row for row in csv.DictReader(file)}["new"]
    machine = json.loads(Path("runs/new/config.json").read_text())["machine"]
    assert (row["precision"], row["threads"]) == (machine["precision"], "1")
    assert row["precision"] in ("fp32", "bf16") and float(row["pflop"]) > 0
    assert Path("results/logs/new.csv").read_bytes() == Path("runs/new/log.csv").read_bytes()
