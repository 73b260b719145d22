"""Use the encoder: `python finetune.py --init runs/pretrain`.

Input: images with labels and, with --init, an encoder from pretrain.py. Output: the run folder of a
classifier (config.json, log.csv, checkpoint.pt, weights.pt, curves.png).

    --init RUN                  fine-tuning: all weights are trained (MAE, appendix A.1)
    --init RUN --mode linear    linear probe: the encoder is frozen, only the head is trained (A.1)
    (without --init)            the same network from scratch, to compare with
    --evaluate RUN              no training: the test accuracy of a saved classifier

The weights of the saved classifier load into timm's VisionTransformer. In this order: settings and
recipes, `main`, the two ways to train (`finetune` and `probe`), and what they call. The training
loop, the optimizers and the run folder are those of pretrain.py.
"""
import dataclasses
import os
import time

import pretrain                 # before torch: it sets how threads wait for each other
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import mae
from data import COUNT, BadInput, note
from pretrain import (FRACTION, VIT_TINY, Machine, PretrainSettings, Run, Settings, absolute, flag,
                      refuse_infinite, refuse_other, set_learning_rate)


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(Settings):
    epochs: int = flag(4, "passes over the training images")
    base_lr: float = flag(2e-2, "learning rate for a batch of 256; scaled with --batch-size",
                          type=data.number(float, 0, 1000))
    augment: str = flag("flip", "as for pretrain.py", choices=data.AUGMENTATIONS)
    init: str | None = flag(None, "checkpoint or run folder of pretrain.py, whose encoder is the "
                            "start (default: from scratch)", type=absolute)
    mode: str = flag("finetune", "finetune: all weights are trained; linear: only the head, on a "
                     "frozen encoder", choices=["finetune", "linear"])
    pool: str = flag("mean", "what the head reads: the class token, or the mean over the patches",
                     choices=["cls", "mean"])
    layer_decay: float = flag(0.75, "factor of the learning rate from each layer to the one "
                              "below (1: no decay)", type=FRACTION)
    patch_dropout: float = flag(0.5, "fraction of the patches left out of each training image",
                                type=FRACTION)
    whole: float = flag(0.0, "fraction of the epochs, at the end, without PatchDropout",
                        type=FRACTION)
    mix: bool = flag(False, "mixup or CutMix: mix each training image, and its label, with another "
                     "one")
    labels_per_class: int | None = flag(None, "train on N random images of each class",
                                        type=COUNT, metavar="N")
    repeat: int = flag(1, "show each training image N times per epoch")


LUNCH = dict(epochs=44, whole=0.1, batch_size=128, augment="color")
FULL = dict(VIT_TINY, pool="cls", epochs=100, warmup=0.05, batch_size=128, base_lr=1e-3,
            optimizer="adamw", layer_decay=1.0, augment="none", patch_dropout=0.0)
PROBE_FIXED = dict(             # a linear probe refuses other values of these
    optimizer="adamw", layer_decay=1.0, augment="none", patch_dropout=0.0, mix=False, whole=0.0,
    repeat=1, compile=False)
PROBE = dict(PROBE_FIXED, epochs=100, warmup=0.1, batch_size=512, base_lr=1e-2, weight_decay=0.0,
             checkpoint_every=10, micro_batch_size=64)      # all patches are visible: more memory
DEFAULTS = {                    # by kind of training and recipe: what differs from those above
    "finetune": {"laptop": dict(), "lunch": dict(LUNCH, base_lr=1.4e-2), "full": FULL},
    "scratch": {                # best from scratch: an eighth of the learning rate, no layer decay
        "laptop": dict(base_lr=2.5e-3, layer_decay=1.0),
        "lunch": dict(LUNCH, base_lr=1.75e-3, layer_decay=1.0), "full": FULL},
    "linear": {"laptop": PROBE, "lunch": PROBE, "full": dict(PROBE, pool="cls")},
}


def main(argv: list[str] | None = None) -> None:
    parser, given = pretrain.read_flags(
        "finetune.py", "Fine-tune an encoder, probe it, or train the same network from scratch.",
        FinetuneSettings, argv, evaluate=dict(
            metavar="CHECKPOINT", type=os.path.expanduser, help="print the test accuracy of a "
            "saved classifier, in float32 by default, and train nothing"))
    checkpoint = None
    if "evaluate" in given:
        defaults = evaluation_settings(given)
    elif "resume" in given:
        defaults, checkpoint = pretrain.resumed_settings(FinetuneSettings, "classifier", given)
    else:
        defaults = new_settings(given)
    settings = pretrain.make_settings(parser, FinetuneSettings, defaults, given)
    if settings.mode == "linear":
        refuse_other(given, PROBE_FIXED, "a linear probe")
    machine = pretrain.join_machine(settings)
    if "evaluate" in given:
        evaluate_classifier(given["evaluate"], settings, machine)
    elif settings.mode == "linear":
        probe(settings, machine, checkpoint)
    else:
        finetune(settings, machine, checkpoint)
    machine.leave()


# ------------------------------------------------------------------------------ fine-tuning


def finetune(settings: FinetuneSettings, machine: Machine, checkpoint: dict | None) -> None:
    """Train all weights with labels, from a pre-trained encoder or from scratch (MAE, section 4 and
    appendix A.1). checkpoint: the one to resume from, or None."""
    dataset = load_labeled_data(settings, machine)
    model = pretrain.make_model("classifier", settings, machine, len(dataset.classes))
    if settings.init and not checkpoint:
        load_encoder(model, settings, dataset)
    optimizers = pretrain.make_optimizers(
        model, settings, machine, betas=(0.9, 0.999),       # MAE, table 9
        lr_scale=lambda name: settings.layer_decay ** layers_above(name, settings.depth))
    pretrain.choose_threads(model, settings, machine, checkpoint)
    count = len(dataset.train_images) * settings.repeat
    steps = max(1, count // settings.batch_size)
    run = Run("classifier", settings, machine, dataset, optimizers, {"model": model})
    run.begin(checkpoint, steps)
    compiled = machine.compiled(model, settings.batch_size)     # shares the weights of `model`
    whole_epochs = round(settings.whole * settings.epochs)      # at the end

    progress = data.Progress((settings.epochs - run.epoch) * steps)
    for epoch in range(run.epoch + 1, settings.epochs + 1):
        model.train()
        drop_patches = settings.patch_dropout > 0 and epoch <= settings.epochs - whole_epochs
        generator = data.seeded_generator(machine.device, settings.seed, epoch)
        order = data.epoch_order(count, settings.batch_size, generator)
        scores = torch.zeros(steps, 2, device=machine.device)          # loss and accuracy
        began = time.perf_counter()
        for step, ids in enumerate(order):
            ids = ids % len(dataset.train_images)           # each image `repeat` times
            images = data.augment(dataset.train_images[ids], settings.augment, generator)
            labels = dataset.train_labels[ids]              # (B,)
            if settings.mix:
                labels = F.one_hot(labels, len(dataset.classes)).float()        # (B, classes)
                images, labels = data.mixup_or_cutmix(images, labels, generator)
            images = data.scale(images)                     # (B, 3, H, W), -1..1
            if drop_patches:                                # PatchDropout
                noise = torch.rand(len(ids), model.num_patches, generator=generator,
                                   device=machine.device)   # (B, N)
            for part, weight in machine.micro_batches(len(ids)):
                with machine.autocast():
                    logits = compiled(images[part], noise[part] if drop_patches else None)
                loss, accuracy = score(logits, labels[part])
                (loss * weight).backward()
                scores[step] += torch.stack([loss.detach(), accuracy]) * weight
            machine.add_up_gradients(model)
            set_learning_rate(optimizers, settings, epoch - 1 + (step + 0.5) / steps)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if progress.advance() and machine.main:
                loss = scores[step, 0] * machine.processes  # estimated from this process's share
                progress.show(f"epoch {epoch}/{settings.epochs}  step {step + 1}/{steps}  "
                              f"loss {loss:.4f}")
        train_loss, train_accuracy = machine.sum(scores).mean(dim=0).tolist()
        images_per_second = steps * settings.batch_size / (time.perf_counter() - began)
        if machine.main:
            fp32 = epoch == settings.epochs                 # the result is that of the last epoch
            test_loss, test_accuracy = evaluate(model, dataset.test_images, dataset.test_labels,
                                                machine, fp32)
            metrics = {"train_loss": train_loss, "train_accuracy": train_accuracy,
                       "test_loss": test_loss, "test_accuracy": test_accuracy}
            refuse_infinite(metrics, epoch)
            run.end_epoch(metrics, images_per_second, progress.time_left())
    run.finish()


def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy () and the accuracy in percent () of logits (B, classes). labels: (B,), or
    (B, classes) as probabilities, of which the largest counts for the accuracy."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels)
    labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
    return loss, 100 * (logits.argmax(dim=1) == labels).float().mean()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, machine: Machine,
             fp32: bool) -> list[float]:
    """The mean loss and the accuracy in percent of images uint8 (n, 3, H, W) with labels (n,).
    fp32: compute in float32, whatever the precision of training."""
    model.eval()
    total, size = 0, machine.micro_batch_size
    with machine.autocast(fp32):
        for batch, batch_labels in zip(images.split(size), labels.split(size)):
            scores = torch.stack(score(model(data.scale(batch)), batch_labels))
            total = total + scores * len(batch)
    return (total / len(images)).tolist()


def layers_above(name: str, depth: int) -> int:
    """How many layers of a ViT are above that of a parameter: 0 for norm, head and what is new, 1
    for the last block, `depth` for the first block, depth + 1 for the embeddings. For the layer-
    wise decay of the learning rate (Clark et al. 2020, arXiv 2003.10555; MAE, table 9)."""
    part, *rest = name.split(".")
    if part == "blocks":
        return depth - int(rest[0])
    return depth + 1 if part in ("patch_embed", "cls_token", "pos_embed") else 0


# ------------------------------------------------------------------------------ linear probe


def probe(settings: FinetuneSettings, machine: Machine, checkpoint: dict | None) -> None:
    """Train a linear layer on the features of a frozen encoder, which are computed once (MAE,
    section 4.1 and appendix A.1). Several processes all compute the same. checkpoint: the one to
    resume from, or None."""
    dataset = load_labeled_data(settings, machine)
    classifier = pretrain.make_model("classifier", settings, machine, len(dataset.classes))
    classifier.requires_grad_(False)                        # frozen
    if not checkpoint:
        load_encoder(classifier, settings, dataset)
    elif checkpoint["epoch"] < settings.epochs:
        checkpoint["log"] = []                              # it starts over, in a few minutes
    head = nn.Linear(classifier.dim, len(dataset.classes), device=machine.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer, = pretrain.make_optimizers(head, settings, machine, betas=(0.9, 0.999))
    pretrain.choose_threads(classifier, settings, machine, checkpoint)
    steps = max(1, len(dataset.train_images) // settings.batch_size)
    run = Run("classifier", settings, machine, dataset, [], {"model": classifier})
    run.begin(checkpoint, steps)
    features, test_features, mean, std = compute_features(classifier, dataset, machine)

    progress = data.Progress((settings.epochs - run.epoch) * steps)
    for epoch in range(run.epoch + 1, settings.epochs + 1):
        generator = data.seeded_generator(machine.device, settings.seed, epoch)
        order = data.epoch_order(len(features), settings.batch_size, generator)
        scores = torch.zeros(steps, 2, device=machine.device)               # loss and accuracy
        began = time.perf_counter()
        for step, ids in enumerate(order):
            with machine.autocast():
                logits = head(features[ids])                # (B, classes)
            loss, accuracy = score(logits, dataset.train_labels[ids])
            loss.backward()
            scores[step] = torch.stack([loss.detach(), accuracy])
            set_learning_rate([optimizer], settings, epoch - 1 + (step + 0.5) / steps)
            optimizer.step()
            optimizer.zero_grad()
            if progress.advance() and machine.main:
                progress.show(f"epoch {epoch}/{settings.epochs}")
        images_per_second = steps * settings.batch_size / (time.perf_counter() - began)
        if machine.main:
            train_loss, train_accuracy = scores.mean(dim=0).tolist()
            test_loss, test_accuracy = score(head(test_features), dataset.test_labels)
            metrics = {"train_loss": train_loss, "train_accuracy": train_accuracy,
                       "test_loss": test_loss.item(), "test_accuracy": test_accuracy.item()}
            refuse_infinite(metrics, epoch)
            fold_probe(head, mean, std, classifier.head)
            run.end_epoch(metrics, images_per_second, progress.time_left())
    run.finish()


@torch.no_grad()
def compute_features(classifier: mae.ViTClassifier, dataset: data.Dataset, machine: Machine
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The features (n, D) of the training images and of the test images, normalized as the paper's
    BatchNorm does, with the mean and the std of the training features; then these two, (D,) each.
    Test features are computed in float32, as --evaluate does."""
    classifier.eval()
    progress = data.Progress(sum(dataset.counts()))

    def compute(images: Tensor, fp32: bool) -> Tensor:      # uint8 (n, 3, H, W) -> (n, D)
        features = []
        with machine.autocast(fp32):
            for batch in images.split(machine.micro_batch_size):
                features.append(classifier.features(data.scale(batch)).float())
                if progress.advance(len(batch)) and machine.main:
                    progress.show("computing features")
        return torch.cat(features)

    features = compute(dataset.train_images, fp32=False)
    test_features = compute(dataset.test_images, fp32=True)
    var, mean = torch.var_mean(features, dim=0, correction=0)               # (D,)
    std = (var + 1e-6).sqrt()
    return (features - mean) / std, (test_features - mean) / std, mean, std


@torch.no_grad()
def fold_probe(linear: nn.Linear, mean: Tensor, std: Tensor, head: nn.Linear) -> None:
    """Write the probe, which reads normalized features, into the head, which reads plain ones:
    W (x - m) / s + b = (W / s) x + (b - (W / s) m)."""
    head.weight.copy_(linear.weight / std)
    head.bias.copy_(linear.bias - head.weight @ mean)


# ------------------------------------------------------------------------------ start and end


def new_settings(given: dict) -> dict:
    """The defaults of a new run: its recipe, and the sizes and the data set of its encoder. Raises
    BadInput, OSError."""
    init = given.get("init")
    kind = "linear" if given.get("mode") == "linear" else "finetune" if init else "scratch"
    defaults = dict(DEFAULTS[kind][given.get("recipe", "laptop")])
    if kind == "linear" and not init:
        raise BadInput("--mode linear needs --init CHECKPOINT: there is no encoder to probe")
    if init:
        checkpoint = data.load_checkpoint(init, "pretrain")
        saved = pretrain.saved_settings(PretrainSettings, checkpoint, init)
        sizes = data.model_settings(mae.Encoder, saved)
        refuse_other(given, sizes, f"the encoder of {init}")
        defaults |= sizes
        name = given.get("dataset", saved["dataset"])
        defaults |= dict(data_dir=data.find_folder(name, saved))
        if saved["dataset"] not in ("cifar10", "shapes"):   # or else CIFAR-10, if it is there
            defaults |= dict(dataset=saved["dataset"])
    return defaults | dict(out=pretrain.run_folder(kind, defaults | given))


def load_labeled_data(settings: FinetuneSettings, machine: Machine) -> data.Dataset:
    """The data set on the device, with --labels-per-class images of each class for training.
    Raises BadInput if it has no labels."""
    dataset = pretrain.load_data(settings, machine)
    if not dataset.classes:
        raise BadInput(f"{settings.data_dir} has no labels: put the pictures of each class into "
                       "train/CLASS/")
    if settings.labels_per_class:
        dataset = dataset.balanced(settings.labels_per_class, settings.seed)
    return dataset


def load_encoder(classifier: mae.ViTClassifier, settings: FinetuneSettings,
                 dataset: data.Dataset) -> None:
    """Copy the encoder of --init into a classifier. Says so if it is unfinished, of another data
    set or may have seen validation images. Raises BadInput, OSError."""
    autoencoder, checkpoint = data.load_model(settings.init, "pretrain")
    classifier.load_state_dict(autoencoder.encoder.state_dict(), strict=False)  # all but the head
    saved = pretrain.saved_settings(PretrainSettings, checkpoint, settings.init)
    if checkpoint["epoch"] < saved["epochs"]:
        note(f"{settings.init} has done {checkpoint['epoch']} of its {saved['epochs']} epochs")
    if saved["dataset"] != dataset.name:
        note(f"{settings.init} was pre-trained on {saved['dataset']}, not on {dataset.name}")
    elif settings.validation > saved["validation"]:
        note(f"{settings.init} may have seen validation images, without labels")


USED_BY_EVALUATE = {"dataset", "data_dir", "limit", "device", "precision", "micro_batch_size",
                    "threads", "evaluate", "command", "help"}


def evaluation_settings(given: dict) -> dict:
    """For --evaluate: the data set of a saved classifier, and float32. Its run's other settings and
    its machine are not used. Raises BadInput, OSError."""
    path = given["evaluate"]
    for name in given.keys() - USED_BY_EVALUATE:
        raise BadInput(f"--{name.replace('_', '-')} has no effect on --evaluate: leave it out")
    checkpoint = data.load_checkpoint(path, "classifier")
    saved = pretrain.saved_settings(FinetuneSettings, checkpoint, path)
    kept = {name: saved[name] for name in ("dataset", "image_size", "batch_size")}
    folder = data.find_folder(given.get("dataset", saved["dataset"]), saved)
    return kept | dict(data_dir=folder, precision="fp32", compile=False)


def evaluate_classifier(path: str, settings: FinetuneSettings, machine: Machine) -> None:
    """Print the test accuracy of a saved classifier. Raises BadInput, OSError."""
    model, checkpoint = data.load_model(path, "classifier")
    dataset = pretrain.load_data(settings, machine, checkpoint["classes"])
    dataset.refuse_other_classes(path, checkpoint["classes"])
    trained_on = checkpoint["settings"]["dataset"]
    if dataset.name != trained_on:
        note(f"it was trained on {trained_on}, not on {dataset.name}")
    if machine.main:
        loss, accuracy = evaluate(model.to(machine.device), dataset.test_images,
                                  dataset.test_labels, machine, fp32=False)
        print(f"{dataset.title}, {len(dataset.test_images):,} test images: loss {loss:.4f}\n"
              f"test accuracy {accuracy:.2f} %")


if __name__ == "__main__":
    with data.as_program():
        main()
