"""Fine-tune an encoder as a classifier, end to end. The defaults are MAE's for ViT-B on 8 devices."""

import argparse

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision import transforms as T

from engine_pretrain import grad_scaler, train_one_epoch, wrap
from models import ENCODERS, build_encoder
from util.args import classifier_parser, number, run_main
from util.checkpoint.saver import Saver
from util.data.batches import eval_loader, train_loader
from util.data.sources import labelled_sources
from util.data.transforms import Normalize, eval_transform
from util.evaluate.classifier import evaluate_classifier, save_classifier
from util.evaluate.encoder import load_encoder, read_architecture
from util.evaluate.scores import print_result, validate
from util.rng import SeededTransform
from util.run import start


def get_parser() -> argparse.ArgumentParser:
    schedule = {"batch_size": 128, "epochs": 100, "warmup_epochs": 5, "blr": 5e-4, "min_lr": 1e-6, "weight_decay": 0.05}
    parser = classifier_parser(__doc__, ENCODERS, "output/finetune", pool=False, **schedule)
    # fmt: off
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--layer_decay", type=number(float, 0.01, 1), default=0.65,
        help="learning rate of a layer over that of the layer after it; 1 = the same for all, 0.75 for ViT-L and ViT-H")
    add("--drop_path", type=number(float, 0, 0.99), default=0.1, help="rate of the last block, rising linearly from 0")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an augmentation policy; none = no augmentation")
    add("--reprob", type=number(float, 0, 1), default=0.25, help="probability of erasing a part of an image")
    add("--mixup", type=number(float, 0), default=0.8, help="alpha of mixup; 0 = off")
    add("--cutmix", type=number(float, 0), default=1.0, help="alpha of cutmix; 0 = off; with both, each half of the time")
    add("--smoothing", type=number(float, 0, 1), default=0.1, help="label smoothing")
    # fmt: on
    return parser


def finetune_transform(args) -> SeededTransform:
    """Crop, flip and augmentation policy of timm; erasing follows on the device."""
    policy = None if args.aa == "none" else args.aa
    try:
        augment = create_transform(
            args.input_size, True, use_prefetcher=True, interpolation="bicubic", color_jitter=None, auto_augment=policy
        )
    except AssertionError as error:
        raise ValueError(f"--aa {args.aa}: timm knows no such policy ({error})") from error
    return SeededTransform(T.Compose(augment.transforms[:-1]))  # all but the conversion to a tensor


def finetune_loss(args, normalize, num_classes: int, device):
    """(model, batch) -> cross-entropy against labels mixed as the images are."""
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


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS)
    if args.eval:
        evaluate_classifier(args, build_encoder, weights)
        return
    train, val = labelled_sources(args.data_path)
    run = start(args)
    if args.batch_size % 2 and (args.mixup or args.cutmix):
        raise ValueError(f"--batch_size {args.batch_size}: mixup and cutmix mix pairs; use an even one, or 0 for both")
    device = run.world.device
    classes = len(train.classes)
    options = {"num_classes": classes, "global_pool": "avg", "drop_path_rate": args.drop_path}
    model = load_encoder(args, build_encoder, weights, **options).requires_grad_(True).to(device)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    loader = train_loader(run, train, finetune_transform(args), flip=False)
    val_loader = eval_loader(args, run.world, val, eval_transform(args.input_size))
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(), layer_decay=args.layer_decay)
    optimizer, scaler = torch.optim.AdamW(groups, run.lr, fused=True), grad_scaler(run)
    wrapped, loss_fn = wrap(model, run), finetune_loss(args, Normalize(args, device), classes, device)
    saver = Saver(run, model, optimizer, scaler, loader)
    progress = saver.resume()

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(run, wrapped, loader, optimizer, scaler, loss_fn, progress.within(epoch), saver)
        saver.after_epoch(progress)
        results = validate(run, model, val_loader, classes, epoch + 1)
    saver.close()
    save_classifier(run, model.state_dict(), train.classes)
    run.close()
    print_result(run.world, results[0])


if __name__ == "__main__":
    run_main(main)
