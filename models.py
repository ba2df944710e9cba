"""Encoders by name, and the PixMIM model that the flags describe."""

from argparse import Namespace
from inspect import signature

from torch import nn

import models_convmae
import models_mff
import models_pixmim
from models_pixmim import LowPass, MaskedViT, PixMIM, low_pass_disc, mask_units

ENCODERS = models_pixmim.ENCODERS | models_convmae.ENCODERS | models_mff.ENCODERS


def build_encoder(args: Namespace, **options) -> nn.Module:
    """The encoder that the model flags describe; `options` are timm's."""
    encoder = ENCODERS[args.model]
    if args.patch_size is not None:
        options["patch_size"] = args.patch_size
    if (tokens := args.class_tokens) is not None:
        if "reg_tokens" not in getattr(getattr(encoder, "func", encoder), "supported", ()):
            raise ValueError(f"--class_tokens {tokens}: --model {args.model} has no class tokens; use vit_* or mff_*")
        options["reg_tokens"] = tokens - 1
    return encoder(img_size=args.input_size, in_chans=args.in_chans, **options)


def build_target(args: Namespace) -> nn.Module:
    """The target: LowPass, or with --lowpass_radius 0 nn.Identity (MAE). ValueError for a radius without effect."""
    radius = args.lowpass_radius
    if radius == 0:
        return nn.Identity()
    height, width = args.input_size
    kept = low_pass_disc(args.input_size, radius, args.lowpass)
    if kept.all() or not kept.any():
        kept_share = f"{'every' if kept.any() else 'no'} frequency of {height} x {width} px"
        raise ValueError(f"--lowpass_radius {radius:g} keeps {kept_share}; 0 is the target of MAE")
    return LowPass(args.input_size, radius, args.mean, args.std, args.lowpass)


def build_model(args: Namespace) -> PixMIM:
    """The initialised PixMIM model that the model and method flags describe."""
    options = {"drop_path_rate": args.drop_path}
    if args.fuse_layers:
        if "fuse_layers" not in signature(ENCODERS[args.model]).parameters:
            raise ValueError(f"--fuse_layers: --model {args.model} does not fuse layers; use an mff_* model")
        options["fuse_layers"] = args.fuse_layers
    method = {name: value for name, value in vars(args).items() if name in signature(PixMIM).parameters}
    learned = args.pos_embed == "learned"
    model = PixMIM(build_encoder(args, **options), build_target(args), learned_positions=learned, **method)
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def noise_length_at(side: int, model: PixMIM, args: Namespace) -> int:
    """Number of random values of the mask of square images of a size of --sizes; ValueError if it does not fit the model."""
    if not isinstance(model.encoder, MaskedViT):
        raise ValueError(f"--sizes: --model {args.model} has one input size; use vit_* or mff_vit_*, or omit --sizes")
    unit = model.encoder.patch * model.mask_unit
    if side % unit or side > args.input_size[0]:
        raise ValueError(f"--sizes {side}: use multiples of {unit} px (--patch_size x --mask_unit) up to --input_size")
    discs = (low_pass_disc(size, args.lowpass_radius, args.lowpass) for size in ((side, side), args.input_size))
    kept, all_kept = (int(disc.sum()) for disc in discs)
    if args.lowpass_radius and kept < all_kept:
        raise ValueError(
            f"--sizes {side}: has only {kept} of the target's {all_kept} frequencies; use a larger size or a smaller "
            f"radius than --lowpass_radius {args.lowpass_radius:g}"
        )
    grid = (side // model.encoder.patch,) * 2
    model.check_mask(grid)
    return mask_units(grid, model.mask_unit)
