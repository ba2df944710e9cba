"""python main_pretrain.py --data_path DIR: pre-train PixMIM, or with --lowpass_radius 0 --crop rrc plain MAE.

The defaults are the paper's ViT-B/16, 300 epochs, on 8 devices.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Callable

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

import util.args as cli
from engine_pretrain import TrainState, prepare_training, pretrain_loss, train_one_epoch
from models import ENCODERS, build_model, noise_length_at
from models_pixmim import PixMIM, sincos_pos_embed
from muon import build_muon
from util.checkpoint.resume import Progress, recorded_args
from util.checkpoint.saver import Saver
from util.data.batches import load_batch, train_loader
from util.data.folders import Source
from util.data.ranges import resolve_pixels
from util.data.samples import Stage
from util.data.sources import labelled_sources, pretrain_source
from util.data.transforms import Normalize, pretrain_transform
from util.evaluate.encoder import MODEL_FLAGS, knn_layer, read_architecture
from util.evaluate.health import LossCheck, check_examples, compare_with_constant
from util.evaluate.knn import knn
from util.formats.initial import initial_state
from util.formats.keys import mae_names, pixmim_names
from util.formats.weights import Weights
from util.lr_sched import size_ends
from util.plots.reconstruction import log_pictures, reconstruct
from util.run import Run, is_due, start_run

DECODER = ("decoder", "decoder_dim", "decoder_depth", "decoder_heads", "fuse_levels", "pos_embed")
FROM_FILE = (*MODEL_FLAGS, *DECODER, "fuse_layers")  # flags that are read from --checkpoint if they are not given


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    # fmt: off
    data = cli.add_data_arguments(parser, "images: a folder of any structure (train/ if it has one), tar or zip files, a list or table "
                                  "(.txt .csv .tsv .parquet), a stream of shards, or a packed cache")
    cli.add_model_arguments(parser, ENCODERS, *map(str, cli.PRETRAIN.values()))
    add = parser.add_argument_group("initial weights").add_argument
    add("--checkpoint", metavar="FILE|FOLDER",
        help="start from these weights, in any format that util/convert.py reads; flags of the model that are not given are those of "
             "the file (default: random weights). To resume a run, use --resume")
    add("--init_channels", choices=["new", "mean", "cycle"], default="new",
        help="--in_chans other than the file's: new = random weights for patch embedding and prediction; mean, cycle = made of the "
             "file's channels (torchgeo-bench, issue 85: repeating RGB weights made 16 of 17 results worse, by 3.9 points on average)")
    add("--resample_patches", action="store_true", help="allow a --patch_size other than the file's, as in FlexiViT")
    add("--freeze_encoder_epochs", type=cli.number(int, 0), default=0,
        help="epochs in which only the decoder is trained, for a new decoder on a trained encoder")
    data.add_argument("--stream_samples", type=cli.number(int, 1),
        help="images per epoch of streamed shards, whose number is unknown; required for these (default: none)")
    add = cli.add_method_arguments(parser, **dict.fromkeys(DECODER)).add_argument
    add("--crop", choices=["src", "rrc"], default="src",
        help="src = SimpleResizedCrop (PixMIM); rrc = RandomResizedCrop of 0.2 to 1 of the area (MAE)")
    add("--crop_interpolation", choices=["auto", "bilinear", "bicubic"], default="auto",
        help="interpolation of the crop; auto = bilinear for src (as the release), bicubic for rrc (as MAE)")
    add("--grad_checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")
    add("--drop_path", type=cli.number(float, 0, 0.99), default=0.0, help="drop-path rate of the encoder's last block, rising linearly from 0")
    schedule = {"batch_size": 512, "epochs": 300, "warmup_epochs": 40, "blr": 1.5e-4, "min_lr": 0.0, "weight_decay": 0.05}
    add = cli.add_schedule_arguments(parser, **schedule).add_argument
    add("--sizes", type=cli.size_share, nargs="+", metavar="PIXELS:SHARE",
        help="an experiment: image sizes in turn and their shares of the epochs, such as 112:0.75 224:0.25; the last is --input_size "
             "(default: --input_size throughout)")
    add("--optimizer", choices=["adamw", "muon"], default="adamw",
        help="muon = orthogonalised updates of the hidden layers' weights, AdamW for the others; an experiment, --blr as for adamw")
    add("--lr_scale_by_prediction", action="store_true",
        help="multiply the peak learning rate by --predict_ratio / --mask_ratio, as CrossMAE's code does")
    cli.add_device_arguments(parser)
    add = cli.add_run_arguments(parser, output_dir="output/pretrain").add_argument
    add("--image_every", type=cli.number(int, 0), default=20, help="epochs between pictures on TensorBoard; 0 = no pictures")
    add("--knn_every", type=cli.number(int, 0), default=0,
        help="epochs between kNN evaluations, which need labelled train and val images; 0 = none")
    add("--knn_path", nargs="+", metavar="PATH", help=f"{cli.CLASSES}, for kNN (default: --data_path)")
    # fmt: on
    return parser


def knn_sources(args: Namespace) -> tuple[Source, Source]:
    """(train, val) of the kNN evaluation; ValueError that names --knn_every if they do not exist."""
    flag = "--knn_path" if args.knn_path else "--data_path"
    paths = args.knn_path or args.data_path
    try:
        return labelled_sources(paths, args, flag)
    except (ValueError, OSError) as error:
        needed = f"--knn_every {args.knn_every} needs classes in train and val of {flag} {' '.join(paths)}"
        raise ValueError(f"{needed} ({error}); use --knn_every 0, or --knn_path") from error


def setup(args: Namespace, begin: Callable[[Namespace], Run] = start_run) -> tuple[TrainState, Source]:
    """(training state, image source): data, model, optimiser, loss."""
    args, weights = read_architecture(args, ENCODERS, FROM_FILE) if args.checkpoint else (args, None)
    args = cli.resolve_defaults(args)
    source = pretrain_source(args)
    args = resolve_pixels(args, source, recorded_args(args))
    torch.manual_seed(args.seed)
    model = build_model(args)
    stages = size_stages(args, model) if args.sizes else []
    report = load_initial(args, model, weights) if weights else []
    run = begin(args)  # after everything that may refuse the flags
    for line in report:
        run.log.info(line)
    device = run.world.device
    model.to(device)
    transform = pretrain_transform(args.crop, args.input_size, args.crop_interpolation)
    loader = train_loader(run, source, transform, flip=True, noise_length=model.noise_length, stages=stages)
    groups = param_groups_weight_decay(model, args.weight_decay)
    if args.freeze_encoder_epochs:
        groups = param_groups_weight_decay(model.decoder, args.weight_decay)
        frozen = {"frozen_epochs": args.freeze_encoder_epochs}
        groups += [group | frozen for group in param_groups_weight_decay(model.encoder, args.weight_decay)]
    if args.optimizer == "muon":
        optimizer = build_muon(groups, model, run.lr)
    else:
        optimizer = torch.optim.AdamW(groups, run.lr, betas=(0.9, 0.95), fused=True)
    return prepare_training(run, model, optimizer, pretrain_loss(Normalize(args, device)), loader), source


def size_stages(args: Namespace, model: PixMIM) -> list[Stage]:
    """Crop and mask of each part of --sizes; ValueError for sizes that do not fit the model or each other."""
    stages = []
    ends = size_ends(args.sizes, args.epochs, args.input_size)
    for (pixels, _), end in zip(args.sizes, ends, strict=True):
        crop = pretrain_transform(args.crop, (pixels, pixels), args.crop_interpolation)
        stages.append(Stage(end, crop, noise_length_at(pixels, model, args)))
    return stages


def load_initial(args: Namespace, model: PixMIM, weights: Weights) -> list[str]:
    """Load the weights into the model; returns a report: what is from the file, what was changed and what is new."""
    state, report = initial_state(weights, mae_names(model.state_dict()), model.encoder, args, sincos_pos_embed)
    model.load_state_dict(pixmim_names(state))
    return report


def compare_with_untrained(state: TrainState, images: Tensor, noise: Tensor) -> str:
    """The loss of the example images before the first step, and that of random weights."""
    run = state.run
    torch.manual_seed(run.args.seed)
    random = build_model(run.args).to(run.world.device)
    (loss, _), (untrained, constant) = (compare_with_constant(model, images, noise) for model in (state.model, random))
    return f"loss of the example images {loss:.4f}; of random weights {untrained:.4f}, of a constant prediction {constant:.4f}"


def main() -> None:
    args = get_parser().parse_args()
    labelled = knn_sources(args) if args.knn_every else None
    state, source = setup(args)
    run, args, model = state.run, state.run.args, state.model
    examples = load_batch(state.loader.dataset, [i * len(source) // 4 for i in range(4)], run.world.device)
    images, noise = Normalize(args, run.world.device)(examples), examples["noise"]
    saver = Saver(state)
    progress = saver.resume()
    if args.checkpoint and progress == Progress(0, 0):
        run.log.info(compare_with_untrained(state, images, noise))
    for line in check_examples(model, images, args):
        run.log.info(line)
    loss_check = LossCheck(run, model, images, noise, progress == Progress(0, 0)) if run.world.is_main else None

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(state, progress.start_of(epoch), saver)
        saver.after_epoch(progress)
        done = epoch + 1
        if loss_check:
            loss_check.after_epoch(done, saver.steps)
        if is_due(args.image_every, done, args.epochs) and run.world.is_main:
            log_pictures(run.log, reconstruct(model, images, noise, args), done)
        if labelled and is_due(args.knn_every, done, args.epochs):
            layer = knn_layer(None)
            (result,) = knn(args, run.world, model.encoder, labelled, [layer], run=run).values()
            run.log.scalars({"epoch": done, "knn_features": layer, **{f"knn_{k}": v for k, v in result.items()}})
            run.log.info(f"epoch {done}  kNN {layer} {json.dumps(result)}")
    saver.close()
    run.log.info(f"{args.epochs} epochs finished: {run.folder / 'last.pth'}")
    run.close()


if __name__ == "__main__":
    cli.run_main(main)
