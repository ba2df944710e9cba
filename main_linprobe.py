"""python main_linprobe.py --checkpoint FILE --data_path DIR: train linear classifiers on frozen features.

Several --blr train one classifier each in the same pass. The defaults are MAE's for ViT-B/16 on 8 devices.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Callable

import torch.nn.functional as F
from timm.optim import Lars

from engine_pretrain import LossFn, TrainState, prepare_training, train_one_epoch
from models import ENCODERS, build_encoder
from util.args import classifier_parser, run_main
from util.checkpoint.resume import recorded_args
from util.checkpoint.saver import Saver
from util.data.batches import eval_loader, train_loader
from util.data.folders import Source
from util.data.ranges import resolve_pixels
from util.data.sources import labelled_sources, select_training_images, write_list
from util.data.transforms import Normalize, eval_transform, probe_transform
from util.evaluate.classifier import evaluate_classifier, save_classifier, val_interpolation
from util.evaluate.encoder import load_encoder, pooling, read_architecture
from util.evaluate.probes import Probe
from util.evaluate.scores import print_result, validate
from util.run import Run, start_run


def get_parser() -> argparse.ArgumentParser:
    schedule = {"batch_size": 2048, "epochs": 90, "warmup_epochs": 10, "blr": [0.1], "min_lr": 0.0, "weight_decay": 0.0}
    parser = classifier_parser(__doc__, ENCODERS, "output/linprobe", pool=True, **schedule)
    add = parser.add_argument_group("probe").add_argument
    add(
        "--probe_as",
        choices=["mae", "mmselfsup"],
        help="protocol: facebookresearch/mae's, or mmselfsup's, where LARS also adapts the bias and val is resized bilinearly "
        "(default: mae; with --eval as the classifier was trained)",
    )
    return parser


def build_lars(model: Probe, run: Run) -> Lars:
    """LARS of facebookresearch/mae, with neither weight decay nor trust ratio for biases, or the release's with both."""
    release, decay, groups = run.args.probe_as == "mmselfsup", run.args.weight_decay, []
    for head, blr in zip(model.heads, run.args.blr, strict=True):
        scale = blr / (max(run.args.blr) or 1.0)
        groups.append({"params": [head.weight], "always_adapt": True, "lr_scale": scale})
        groups.append({"params": [head.bias], "always_adapt": release, "lr_scale": scale})
    optimizer = Lars(groups, run.lr, momentum=0.9, weight_decay=decay if release else 0, trust_coeff=0.001)
    if decay and not release:
        # MAE's trust ratio has |gradient + decay|; timm's, as the release's, |gradient| + |decay|
        def add_decay(*_) -> None:
            for head in model.heads:
                head.weight.grad.add_(head.weight.detach(), alpha=decay)

        optimizer.register_step_pre_hook(add_decay)
    return optimizer


def probe_loss(normalize: Normalize) -> LossFn:
    """Sum of the cross-entropies of all heads, so that each head learns as if it were alone."""

    def loss(model, batch):
        logits = model(normalize(batch)).float()
        heads = logits.shape[1]
        return F.cross_entropy(logits.flatten(0, 1), batch["label"].repeat_interleave(heads)) * heads

    return loss


def setup(args: Namespace, begin: Callable[[Namespace], Run] = start_run) -> tuple[TrainState, Source]:
    """(training state, validation images): data, frozen encoder with heads, optimiser, loss."""
    args, weights = read_architecture(Namespace(**vars(args) | {"probe_as": args.probe_as or "mae"}), ENCODERS)
    train, val = labelled_sources(args.data_path, args)
    args = resolve_pixels(args, train, recorded_args(args))
    train = select_training_images(train, args)
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights, args.pool))
    run = begin(args)
    if run.world.is_main:
        write_list(run.folder, train)
    model = Probe(encoder, len(train.classes), len(args.blr)).to(run.world.device)
    loader = train_loader(run, train, probe_transform(args.input_size), flip=True)
    loss_fn = probe_loss(Normalize(args, run.world.device))
    return prepare_training(run, model, build_lars(model, run), loss_fn, loader), val


def main() -> None:
    args = get_parser().parse_args()
    if args.eval:
        evaluate_classifier(*read_architecture(args, ENCODERS), build_encoder)
        return
    state, val = setup(args)
    run, args, model = state.run, state.run.args, state.model
    val_loader = eval_loader(
        args, run.world, val, eval_transform(args.input_size, args.crop_pct, val_interpolation(args.probe_as))
    )
    saver = Saver(state)
    progress = saver.resume()

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(state, progress.start_of(epoch), saver)
        model.average_statistics(run.world)
        saver.after_epoch(progress)
        results = validate(run, model, val_loader, len(val.classes), epoch + 1)
    saver.close()
    for blr, result in zip(args.blr, results, strict=True):
        run.log.info(f"--blr {blr:g}: {json.dumps(result)}")
    best = max(range(len(results)), key=lambda i: results[i]["acc1"])
    save_classifier(run, model.classifier(best), val.classes)
    run.close()
    print_result(run.world, {**results[best], "blr": args.blr[best], "selected_on": "val"}, args)


if __name__ == "__main__":
    run_main(main)
