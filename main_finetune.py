"""python main_finetune.py --checkpoint FILE --data_path DIR: fine-tune an encoder end to end as a classifier.

The defaults are MAE's for ViT-B/16 on 8 devices.
"""

import argparse
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision import transforms as T

from engine_pretrain import LossFn, TrainState, prepare_training, train_one_epoch
from models import ENCODERS, build_encoder
from util.args import classifier_parser, number, run_main
from util.checkpoint.resume import recorded_args
from util.checkpoint.saver import Saver
from util.data.batches import eval_loader, train_loader
from util.data.folders import Source
from util.data.ranges import resolve_pixels
from util.data.sources import labelled_sources, select_training_images, write_list
from util.data.transforms import Normalize, eval_transform
from util.evaluate.classifier import evaluate_classifier, save_classifier
from util.evaluate.encoder import load_encoder, read_architecture
from util.evaluate.scores import print_result, validate
from util.rng import SeededTransform
from util.run import Run, start_run


def get_parser() -> argparse.ArgumentParser:
    schedule = {"batch_size": 128, "epochs": 100, "warmup_epochs": 5, "blr": 5e-4, "min_lr": 1e-6, "weight_decay": 0.05}
    parser = classifier_parser(__doc__, ENCODERS, "output/finetune", pools=(), **schedule)
    # fmt: off
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--layer_decay", type=number(float, 0.01, 1), default=0.65,
        help="factor of the learning rate from a layer to the layer before it; 1 = no decay, 0.75 for ViT-L and ViT-H")
    add("--freeze_layers", type=number(int, 0), default=0,
        help="blocks that are not trained, from the first; 1 or more also freezes the embedding (partial fine-tuning)")
    add("--drop_path", type=number(float, 0, 0.99), default=0.1, help="drop-path rate of the last block, rising linearly from 0")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="augmentation policy by timm's name; none = no augmentation")
    add("--reprob", type=number(float, 0, 1), default=0.25, help="probability of random erasing")
    add("--mixup", type=number(float, 0), default=0.8, help="alpha of mixup; 0 = off")
    add("--cutmix", type=number(float, 0), default=1.0, help="alpha of cutmix; 0 = off; with mixup each is used for half of the batches")
    add("--smoothing", type=number(float, 0, 1), default=0.1, help="label smoothing")
    # fmt: on
    return parser


def finetune_transform(args: Namespace) -> SeededTransform:
    """timm's crop, flip and augmentation policy; random erasing follows on the device."""
    policy = None if args.aa == "none" else args.aa
    try:
        for part in args.aa.split("-")[1:]:  # timm ignores parts without a number
            assert re.match(r"[a-z]+\d", part), f"{part} has no number"
        options = {"interpolation": "bicubic", "color_jitter": None, "auto_augment": policy}
        augment = create_transform(args.input_size, True, use_prefetcher=True, **options)
    except AssertionError as error:
        raise ValueError(f"--aa {args.aa}: unknown to timm ({error}); use none or rand-m9-mstd0.5-inc1") from error
    return SeededTransform(T.Compose(augment.transforms[:-1]))  # all but the conversion to a tensor


def finetune_loss(args: Namespace, normalize: Normalize, num_classes: int, device: torch.device) -> LossFn:
    """Cross-entropy with random erasing, mixup, cutmix and label smoothing."""
    erase = RandomErasing(args.reprob, mode="pixel", device=device)
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)

    def loss(model, batch):
        images, labels = erase(normalize(batch)), batch["label"]
        if mixup:
            images, labels = mixup(images, labels)
            return F.cross_entropy(model(images).float(), labels)
        return F.cross_entropy(model(images).float(), labels, label_smoothing=args.smoothing)

    return loss


def freeze_layers(model: Any, count: int) -> None:
    """Freeze the first `count` blocks and what is before them (MAE, section 4.3); ConvMAE's convolutions are before them."""
    # 0 = embedding, then the blocks, then the head
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    if count >= max(layers.values()):
        raise ValueError(f"--freeze_layers {count}: --checkpoint has {max(layers.values()) - 1} blocks")
    for name, parameter in model.named_parameters():
        if 0 < count >= layers[name]:
            parameter.requires_grad_(False)


def setup(args: Namespace, begin: Callable[[Namespace], Run] = start_run) -> tuple[TrainState, Source]:
    """(training state, validation images): data, model, optimiser, loss."""
    args, weights = read_architecture(args, ENCODERS)
    train, val = labelled_sources(args.data_path, args)
    args = resolve_pixels(args, train, recorded_args(args))
    train = select_training_images(train, args)
    run = begin(args)
    if run.world.is_main:
        write_list(run.folder, train)
    if run.batch_size % 2 and (args.mixup or args.cutmix):
        raise ValueError(f"--batch_size {run.batch_size}: mixup and cutmix mix pairs; use an even one, or 0 for both")
    device, classes = run.world.device, len(train.classes)
    options = {"num_classes": classes, "global_pool": "avg", "drop_path_rate": args.drop_path}
    model = load_encoder(args, build_encoder, weights, **options).requires_grad_(True).to(device)
    freeze_layers(model, args.freeze_layers)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    loader = train_loader(run, train, finetune_transform(args), flip=False)
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(), layer_decay=args.layer_decay)
    optimizer = torch.optim.AdamW(groups, run.lr, fused=True)
    loss_fn = finetune_loss(args, Normalize(args, device), classes, device)
    return prepare_training(run, model, optimizer, loss_fn, loader), val


def main() -> None:
    args = get_parser().parse_args()
    if args.eval:
        evaluate_classifier(*read_architecture(args, ENCODERS), build_encoder)
        return
    state, val = setup(args)
    run, args, model = state.run, state.run.args, state.model
    val_loader = eval_loader(args, run.world, val, eval_transform(args.input_size, args.crop_pct))
    saver = Saver(state)
    progress = saver.resume()

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(state, progress.start_of(epoch), saver)
        saver.after_epoch(progress)
        results = validate(run, model, val_loader, len(val.classes), epoch + 1)
    saver.close()
    save_classifier(run, model.state_dict(), val.classes)
    run.close()
    print_result(run.world, results[0], args)


if __name__ == "__main__":
    run_main(main)
