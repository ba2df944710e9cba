"""Pre-train PixMIM, or with --lowpass_radius 0 --crop rrc its host alone (MAE). Defaults: ViT-B/16, 300 epochs, 8 devices."""

import argparse
import json

import torch
from timm.optim import param_groups_weight_decay

from engine_pretrain import grad_scaler, pretrain_loss, train_one_epoch, wrap
from models import ENCODERS, build_model
from util.args import (
    Parser,
    add_data_arguments,
    add_device_arguments,
    add_method_arguments,
    add_model_arguments,
    add_run_arguments,
    add_schedule_arguments,
    number,
    resolve_defaults,
    run_main,
)
from util.checkpoint.saver import Saver
from util.data.batches import load_batch, train_loader
from util.data.sources import labelled_sources, pretrain_source
from util.data.transforms import Normalize, pretrain_transform
from util.evaluate.health import check_examples, check_loss
from util.evaluate.knn import knn
from util.meters import due
from util.plots.reconstruction import log_pictures, reconstruct
from util.run import start


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    data = add_data_arguments(
        parser, "images: train/<class>/ as ImageNet, a folder of any other structure, tar shards, or a stream of them"
    )
    add_model_arguments(parser, ENCODERS, model="vit_base")
    # fmt: off
    data.add_argument("--stream_samples", type=number(int, 1),
        help="images that make an epoch of a stream, which does not tell; others need none")
    add = add_method_arguments(parser).add_argument
    add("--crop", choices=["src", "rrc"], default="src",
        help="SimpleResizedCrop (PixMIM) or RandomResizedCrop of 0.2 to 1 of the area (MAE)")
    add("--crop_interpolation", choices=["auto", "bilinear", "bicubic"], default="auto",
        help="of the crop's resize; auto = bilinear for src as the release, bicubic for rrc as MAE")
    add("--grad_checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add_schedule_arguments(
        parser, batch_size=512, epochs=300, warmup_epochs=40, blr=1.5e-4, min_lr=0.0, weight_decay=0.05
    )
    add_device_arguments(parser)
    add = add_run_arguments(parser, output_dir="output/pretrain").add_argument
    add("--image_every", type=number(int, 0), default=20, help="epochs between pictures on TensorBoard; 0 = none")
    add("--knn_every", type=number(int, 0), default=0,
        help="epochs between kNN accuracies (needs class folders in train/ and val/); 0 = none")
    add("--knn_path", metavar="DIR", help="folder with train/<class>/ and val/<class>/ for them; None = --data_path")
    # fmt: on
    return parser


def main() -> None:
    args = resolve_defaults(get_parser().parse_args())
    source = pretrain_source(args)
    labelled = labelled_sources(args.knn_path or args.data_path) if args.knn_every else None
    run = start(args)
    device = run.world.device
    model = build_model(args).to(device)
    transform = pretrain_transform(args.crop, args.input_size, args.crop_interpolation)
    loader = train_loader(run, source, transform, flip=True, noise_length=model.noise_length)
    examples = load_batch(loader.dataset, [i * len(source) // 4 for i in range(4)], device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, run.lr, betas=(0.9, 0.95), fused=True)
    scaler = grad_scaler(run)
    normalize = Normalize(args, device)
    wrapped, loss_fn = wrap(model, run), pretrain_loss(normalize)
    saver = Saver(run, model, optimizer, scaler, loader)
    progress = saver.resume()
    for line in check_examples(model, normalize(examples), args):
        run.log.info(line)

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(run, wrapped, loader, optimizer, scaler, loss_fn, progress.within(epoch), saver)
        saver.after_epoch(progress)
        done = epoch + 1
        if run.world.is_main and (warning := check_loss(done, model, normalize(examples), examples["noise"], args)):
            run.log.info(warning)
        if due(args.image_every, done, args.epochs) and run.world.is_main:
            log_pictures(run.log, reconstruct(model, normalize(examples), examples["noise"], args), done)
        if labelled and due(args.knn_every, done, args.epochs):
            result = knn(args, run.world, model.encoder, labelled)
            run.log.scalars({"epoch": done, **{f"knn_{k}": v for k, v in result.items()}})
            run.log.info(f"epoch {done}  kNN {json.dumps(result)}")
    saver.close()
    run.log.info(f"{args.epochs} epochs done: {run.folder / 'last.pth'}")
    run.close()


if __name__ == "__main__":
    run_main(main)
