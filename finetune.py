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
import sys

import pretrain                 # before torch: it sets how threads wait for each other
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import mae
from data import COUNT, BadInput
from pretrain import SHARE, VIT_TINY, Machine, PretrainSettings, Run, Settings, absolute, flag


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(Settings):
    epochs: int = flag(4, "passes over the training images")
    base_lr: float = flag(2e-2, "learning rate for a batch of 256; the one used is this x batch "
                          "size / 256", type=data.number(float, 0, 1000))
    augment: str = flag("flip", "as for pretrain.py", choices=data.AUGMENTATIONS)
    init: str | None = flag(None, "checkpoint or run folder of pretrain.py, whose encoder is the "
                            "start (default: from scratch)", type=absolute)
    mode: str = flag("finetune", "finetune: all weights are trained; linear: only the head, on a "
                     "frozen encoder", choices=["finetune", "linear"])
    pool: str = flag("mean", "what the head reads: the class token, or the mean over the patches",
                     choices=["cls", "mean"])
    layer_decay: float = flag(0.75, "each layer learns at this factor of the learning rate of the "
                              "layer above", type=SHARE)
    patch_dropout: float = flag(0.5, "share of the patches that is left out of training images",
                                type=SHARE)
    whole: float = flag(0.0, "share of the epochs, at the end, in which no patches are left out",
                        type=SHARE)
    mix: bool = flag(False, "mixup or CutMix: mix each training image, and its label, with another "
                     "one")
    labels_per_class: int | None = flag(None, "train on N random images of each class",
                                        type=COUNT, metavar="N")
    repeat: int = flag(1, "show each training image N times per epoch")

    @property
    def start(self) -> str:
        return f"encoder from {self.init}" if self.init else "from scratch"


RECIPES = {                     # what differs from the defaults above
    "laptop": dict(),
    "lunch": dict(epochs=44, whole=0.1, batch_size=128, base_lr=1.4e-2, augment="color"),
    "full": dict(
        VIT_TINY, pool="cls", epochs=100, warmup=0.05, batch_size=128, base_lr=1e-3,
        optimizer="adamw", layer_decay=1.0, augment="none", patch_dropout=0.0),
}
FROM_SCRATCH = {                # what is best without --init: an eighth of the rate, no layer decay
    "laptop": dict(base_lr=2.5e-3, layer_decay=1.0),
    "lunch": dict(base_lr=1.75e-3, layer_decay=1.0),
    "full": dict(),
}
PROBE_FIXED = dict(             # a linear probe has no use for other values of these
    optimizer="adamw", layer_decay=1.0, augment="none", patch_dropout=0.0, mix=False, whole=0.0,
    repeat=1, compile=False)
PROBE_DEFAULTS = PROBE_FIXED | dict(    # with --mode linear, instead of the recipe's values
    epochs=100, warmup=0.1, batch_size=512, micro_batch_size=512, base_lr=1e-2, weight_decay=0.0,
    checkpoint_every=10)
HELP = "Fine-tune a pre-trained encoder, probe it, or train the same network from scratch."


def main(argv: list[str] | None = None) -> None:
    given = pretrain.parse_flags(
        "finetune.py", FinetuneSettings, RECIPES, HELP, argv, evaluate=dict(
            metavar="CHECKPOINT", type=os.path.expanduser, help="print the test accuracy of a "
            "saved classifier, in float32 unless --precision says otherwise, and train nothing"))
    if "evaluate" in given:
        return evaluate_classifier(given)
    checkpoint = None
    if "resume" in given:
        settings, checkpoint = pretrain.resumed_settings(FinetuneSettings, "classifier", given)
    else:
        settings = new_settings(given)
    machine, settings = pretrain.join_machine(settings)
    train = probe if settings.mode == "linear" else finetune
    train(settings, machine, checkpoint)
    machine.leave()


def new_settings(given: dict) -> FinetuneSettings:
    """The settings of a new run: the recipe, what the encoder and a probe fix, what is given.
    Raises BadInput, OSError."""
    init, linear = given.get("init"), given.get("mode") == "linear"
    recipe = given.get("recipe", "laptop")
    defaults = dict(RECIPES[recipe])
    if linear and not init:
        raise BadInput("--mode linear needs --init CHECKPOINT: there is no encoder to probe")
    if linear:
        pretrain.refuse_other(given, PROBE_FIXED, "a linear probe")
        defaults |= PROBE_DEFAULTS
    if not init:
        defaults |= FROM_SCRATCH[recipe]
    else:
        checkpoint = data.load_checkpoint(init, "pretrain")
        saved = pretrain.saved_settings(PretrainSettings, checkpoint, init)
        sizes = data.model_settings(mae.Encoder, saved)
        pretrain.refuse_other(given, sizes, f"the encoder of {init}")
        defaults |= sizes
        if saved["dataset"] == "shapes":                    # perhaps instead of CIFAR-10: the name
            defaults |= dict(dataset="shapes")              # of the run should not depend on it
        elif saved["dataset"] != "cifar10":
            given = dict(dataset=saved["dataset"]) | given
        same = given.get("dataset", saved["dataset"]) == saved["dataset"]
        if same and os.path.isdir(saved["data_dir"]):
            defaults |= dict(data_dir=saved["data_dir"])
    kind = "linear" if linear else "finetune" if init else "scratch"
    defaults |= dict(out=pretrain.run_folder(kind, given))
    return FinetuneSettings(**defaults | given)


# ------------------------------------------------------------------------------ fine-tuning


def finetune(settings: FinetuneSettings, machine: Machine, checkpoint: dict | None) -> None:
    """Train all weights with labels, from a pre-trained encoder or from scratch (MAE, section 4 and
    appendix A.1).

    checkpoint: that of the run that is resumed, or None.
    """
    dataset, settings = load_labeled_data(settings, machine)
    model = pretrain.make_model("classifier", settings, machine, len(dataset.classes))
    if settings.init and not checkpoint:
        load_encoder(model, settings, machine)
    optimizers = pretrain.make_optimizers(
        model, settings, betas=(0.9, 0.999),                # MAE, table 9
        lr_scale=lambda name: settings.layer_decay ** layers_above(name, settings.depth))

    def make_batch(ids: Tensor, epoch: int, generator: torch.Generator) -> list[Tensor]:
        return labeled_batch(dataset, ids, epoch, generator, settings, model.num_patches)

    settings = pretrain.choose_threads(settings, machine, model, classify, make_batch)
    run = Run("classifier", settings, machine, dataset, optimizers, {"model": model})
    run.begin(checkpoint)

    def test(precise: bool) -> list[float]:
        batches = pretrain.in_batches(dataset.test_images, dataset.test_labels)
        return pretrain.evaluate(model, classify, batches, machine, precise)

    pretrain.train(run, machine.compiled(model, settings), classify,
                   len(dataset.train_images) * settings.repeat, make_batch, test,
                   after_epoch=lambda epoch: None)


def labeled_batch(dataset: data.Dataset, ids: Tensor, epoch: int, generator: torch.Generator,
                  settings: FinetuneSettings, num_patches: int) -> list[Tensor]:
    """Images (B, 3, H, W) of -1..1; labels (B,) or, if images are mixed, (B, classes); and, if
    patches are left out, noise (B, N)."""
    ids = ids % len(dataset.train_images)                   # each image `repeat` times
    images = data.augment(dataset.train_images[ids], settings.augment, generator)
    labels = dataset.train_labels[ids]
    if settings.mix:
        labels = F.one_hot(labels, len(dataset.classes)).float()
        images, labels = data.mixup_or_cutmix(images, labels, generator)
    batch = [data.scale(images), labels]
    whole_epochs = round(settings.whole * settings.epochs)
    if settings.patch_dropout and epoch <= settings.epochs - whole_epochs:
        batch.append(torch.rand(len(ids), num_patches, generator=generator, device=images.device))
    return batch


def classify(model: nn.Module, inputs: Tensor, labels: Tensor,
             *noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and what to log: the loss and the accuracy in percent, (2,).

    inputs: images (B, 3, H, W) or features (B, D); labels: (B,), or (B, classes) as probabilities,
    of which the largest counts for the accuracy; noise: (B, N), if patches are left out.
    """
    logits = model(inputs, *noise).float()                  # (B, classes)
    loss = F.cross_entropy(logits, labels)
    labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
    accuracy = 100 * (logits.argmax(dim=1) == labels).float().mean()
    return loss, torch.stack([loss.detach(), accuracy])


def layers_above(name: str, depth: int) -> int:
    """How many layers of a ViT are above that of a parameter: 0 for norm and head, 1 for the last
    block, `depth` for the first block, depth + 1 for the embeddings. For the layer-wise decay of
    the learning rate (Clark et al. 2020, arXiv 2003.10555; MAE, table 9)."""
    part, *rest = name.split(".")
    if part == "blocks":
        return depth - int(rest[0])
    return depth + 1 if part in ("patch_embed", "cls_token", "pos_embed") else 0


# ------------------------------------------------------------------------------ linear probe


def probe(settings: FinetuneSettings, machine: Machine, checkpoint: dict | None) -> None:
    """Train a linear layer on the features of a frozen encoder, which are computed once (MAE,
    section 4.1 and appendix A.1).

    checkpoint: that of the run that is resumed, or None.
    """
    dataset, settings = load_labeled_data(settings, machine)
    classifier = pretrain.make_model("classifier", settings, machine, len(dataset.classes))
    if not checkpoint:
        load_encoder(classifier, settings, machine)
    probe_head = nn.Linear(classifier.dim, len(dataset.classes), device=machine.device)
    nn.init.zeros_(probe_head.weight)
    nn.init.zeros_(probe_head.bias)
    optimizers = pretrain.make_optimizers(probe_head, settings, betas=(0.9, 0.999))
    settings = pretrain.choose_threads(
        settings, machine, classifier, classify, lambda ids, epoch, generator:
        (data.scale(dataset.train_images[ids]), dataset.train_labels[ids]))
    run = Run("classifier", settings, machine, dataset, optimizers,
              {"model": classifier, "probe": probe_head})
    run.begin(checkpoint)
    features = compute_features(classifier, dataset.train_images, machine, precise=False)
    test_features = compute_features(classifier, dataset.test_images, machine, precise=True)
    var, mean = torch.var_mean(features, dim=0, correction=0)               # (D,)
    std = (var + 1e-6).sqrt()
    features, test_features = (features - mean) / std, (test_features - mean) / std

    def make_batch(ids: Tensor, epoch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return features[ids], dataset.train_labels[ids]     # (B, D), (B,)

    def test(precise: bool) -> list[float]:
        batches = [(test_features, dataset.test_labels)]
        return pretrain.evaluate(probe_head, classify, batches, machine, precise=True)

    pretrain.train(run, probe_head, classify, len(features), make_batch, test,
                   lambda epoch: fold_probe(probe_head, mean, std, classifier.head))


@torch.no_grad()
def compute_features(classifier: mae.ViTClassifier, images: Tensor, machine: Machine,
                     precise: bool) -> Tensor:
    """What the head reads of each image: uint8 (n, 3, H, W) -> (n, D).

    precise: in float32, so that the log has the accuracy that --evaluate prints.
    """
    classifier.eval()
    progress, features = data.Progress(len(images)), []
    with machine.autocast(precise):
        for (batch,) in pretrain.in_batches(images):
            features.append(classifier.features(batch).float())
            if progress.advance(len(batch)) and machine.main:
                progress.show("computing features")
    return torch.cat(features)


@torch.no_grad()
def fold_probe(probe_head: nn.Linear, mean: Tensor, std: Tensor, head: nn.Linear) -> None:
    """Write the probe, which reads normalized features, into the head, which reads plain ones:
    W (x - m) / s + b = (W / s) x + (b - (W / s) m)."""
    head.weight.copy_(probe_head.weight / std)
    head.bias.copy_(probe_head.bias - head.weight @ mean)


# ------------------------------------------------------------------------------ start and end


def load_labeled_data(settings: FinetuneSettings, machine: Machine):
    """The data set on the device, with --labels-per-class images of each class for training, and
    the settings with its name. Raises BadInput if it has no labels."""
    dataset, settings = pretrain.load_data(settings, machine)
    if not dataset.classes:
        raise BadInput(f"{settings.data_dir} has no labels: put the pictures of each class into "
                       "train/CLASS/")
    if settings.labels_per_class:
        dataset = dataset.balanced(settings.labels_per_class, settings.seed)
    return dataset, settings


def load_encoder(classifier: mae.ViTClassifier, settings: FinetuneSettings,
                 machine: Machine) -> None:
    """Copy the encoder of --init into a classifier. Says so if it is unfinished, of another data
    set or may have seen validation images. Raises BadInput, OSError."""
    autoencoder, checkpoint = data.load_model(settings.init, "pretrain")
    classifier.load_state_dict(autoencoder.encoder.state_dict(), strict=False)  # all but the head
    saved = pretrain.saved_settings(PretrainSettings, checkpoint, settings.init)
    notes = []
    if checkpoint["epoch"] < saved["epochs"]:
        notes.append(f"has done {checkpoint['epoch']} of its {saved['epochs']} epochs")
    if saved["dataset"] != settings.dataset:
        notes.append(f"was pre-trained on {saved['dataset']}, not on {settings.dataset}")
    elif settings.validation > saved["validation"]:
        notes.append("may have seen validation images, without labels")
    for note in notes:
        if machine.main:
            print(f"note: {settings.init} {note}", file=sys.stderr)


def evaluate_classifier(given: dict) -> None:
    """Print the test accuracy of a saved classifier. Raises BadInput, OSError."""
    path = given.pop("evaluate")
    for name in given.keys() - {"dataset", "data_dir", "limit", "device", "precision", "threads",
                                "command"}:
        raise BadInput(f"--{name.replace('_', '-')} means nothing to --evaluate: leave it out")
    model, checkpoint = data.load_model(path, "classifier")
    saved = pretrain.saved_settings(FinetuneSettings, checkpoint, path)
    if not os.path.isdir(saved["data_dir"]):                # the weights may be from elsewhere
        saved.pop("data_dir")
    settings = FinetuneSettings(**saved | dict(precision="fp32", limit=None, validation=0,
                                               labels_per_class=None, compile=False) | given)
    machine, settings = pretrain.join_machine(settings)
    dataset, settings = pretrain.load_data(settings, machine)
    if len(dataset.classes) != model.head.out_features:
        raise BadInput(f"{path} distinguishes {model.head.out_features} classes, {dataset.title} "
                       f"has {len(dataset.classes)}: name its data set with --dataset")
    if machine.main:
        if dataset.name != saved["dataset"]:
            print(f"note: it was trained on {saved['dataset']}, not on {dataset.name}",
                  file=sys.stderr)
        batches = pretrain.in_batches(dataset.test_images, dataset.test_labels)
        loss, accuracy = pretrain.evaluate(model.to(machine.device), classify, batches, machine,
                                           precise=False)
        print(f"{dataset.title}, {len(dataset.test_images):,} test images: loss {loss:.4f}\n"
              f"test accuracy {accuracy:.2f} %")
    machine.leave()


if __name__ == "__main__":
    with data.as_program():
        main()
