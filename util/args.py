"""The command line: recipes, the flags that mains share, and the one line that a user's mistake deserves."""

import argparse
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

METHOD = {
    "lowpass_radius": "auto", "lowpass": "reference", "mask_ratio": 0.75, "mask_unit": 1, "norm_pix_loss": True,
    "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "fuse_layers": None,
}  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def expand(words: list[str], folder: Path = Path(), within: tuple[Path, ...] = ()) -> list[str]:
    """Words with every @FILE replaced by the words in it; `#` starts a comment, an @FILE inside is next to its file."""
    expanded = []
    for word in words:
        if not word.startswith("@"):
            expanded.append(word)
            continue
        recipe = folder / word[1:]
        if not recipe.is_file():
            raise ValueError(f"{word}: there is no recipe {recipe}; `ls recipes` lists ours")
        if recipe in within:
            raise ValueError(f"{recipe} includes itself")
        try:
            inside = shlex.split(recipe.read_text(), comments=True)
        except ValueError as error:  # an open quote, or no text at all
            raise ValueError(f"{recipe} is no recipe: {error}") from error
        expanded += expand(inside, recipe.parent, (*within, recipe))
    return expanded


class Parser(argparse.ArgumentParser):
    """argparse with recipes, printed defaults and no abbreviations."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            epilog="@FILE reads flags from a recipe; later flags win.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(expand(sys.argv[1:] if args is None else list(args)), namespace)


def number(kind: type, low: float, high: float = 10**9) -> Callable:
    """Converter for argparse: an int or float in [low, high]; neither nan nor inf is in any."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


def auto_or(convert: Callable) -> Callable:
    """Converter for argparse: the word auto, which `resolve_defaults` replaces, or what `convert` accepts."""

    def convert_or_auto(text: str):
        return text if text == "auto" else convert(text)

    convert_or_auto.__name__ = convert.__name__
    return convert_or_auto


def picture(text: str) -> str:
    """Converter for argparse: the name of a picture to write."""
    if Path(text).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png or .jpg")
    return text


class SizeAction(argparse.Action):
    """One number or two -> (H, W)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes one number or two (H W), not {len(values)}")
        setattr(namespace, self.dest, (values[0], values[-1]))


# fmt: off
def add_model_arguments(parser: argparse.ArgumentParser, encoders, model: str | None = None):
    """Architecture; a main that reads it from a checkpoint leaves `model` None."""
    group = parser.add_argument_group("model")
    source = "" if model else "; None = as in --checkpoint"
    group.add_argument("--model", choices=sorted(encoders), default=model, help=f"encoder{source}")
    group.add_argument("--patch_size", type=number(int, 1), help="side of a patch in pixels; None = the model's own")
    group.add_argument("--input_size", type=number(int, 1), nargs="+", action=SizeAction, metavar="H",
                       default=(224, 224) if model else None, help=f"side of the input in pixels, or H W{source}")
    group.add_argument("--in_chans", type=number(int, 1), default=3 if model else None,
                       help=f"channels of an image{source}")
    group.add_argument("--mean", type=number(float, -(10**9)), nargs="+",
                       help="mean of each channel, pixels in [0, 1]; None = ImageNet's (3 channels)")
    group.add_argument("--std", type=number(float, 1e-6), nargs="+", help="standard deviation of each channel, likewise")
    return group


def add_method_arguments(parser: argparse.ArgumentParser, **defaults):
    """What PixMIM does with an encoder; `defaults` replace those of ViT-B."""
    group = parser.add_argument_group("method")
    group.add_argument("--lowpass_radius", type=auto_or(number(float, 0)),
                       help="cut-off of the target in frequency bins; 0 = raw pixels (MAE); auto = 40 at 224 px, "
                            "in proportion to the shorter side")
    group.add_argument("--lowpass", choices=["reference", "centered"],
                       help="the release's filter, half a bin off centre, or the zero-phase one")
    group.add_argument("--mask_ratio", type=number(float, 0, 1), help="share of patches removed, 0 to 1")
    group.add_argument("--mask_unit", type=number(int, 1), help="patches are removed in blocks of this side; 2 = LSMAE")
    group.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction,
                       help="normalise each patch of the target by its mean and deviation")
    group.add_argument("--decoder_dim", type=number(int, 4), help="width of the decoder")
    group.add_argument("--decoder_depth", type=number(int, 1), help="blocks of the decoder")
    group.add_argument("--decoder_heads", type=number(int, 1), help="attention heads of the decoder")
    group.add_argument("--fuse_layers", type=number(int, 0), nargs="+",
                       help="layers of an MFF encoder that the decoder reads, from 0; unless given, 0 2 4 6 8 11 of twelve")
    parser.set_defaults(**METHOD | defaults)
    return group


def add_checkpoint_arguments(parser: argparse.ArgumentParser, pool: bool = True):
    """Which weights, and which feature of them is measured."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--checkpoint", required=True, metavar="FILE|none",
                       help="weights in any format that util/convert.py reads; none = an untrained --model")
    if pool:
        group.add_argument("--pool", choices=["token", "mean"],
                           help="feature of an image: the class token, or the mean of the patch tokens; None = as the "
                                "checkpoint was probed, else the class token where there is one")
    return group


def add_data_arguments(parser: argparse.ArgumentParser, layout: str):
    """Where the images are and who reads them."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", required=True, help=layout)
    group.add_argument("--num_workers", type=number(int, 0, 256),
                       help="loader processes of each rank; None = its share of the cores, at most 16")
    return group


def add_device_arguments(parser: argparse.ArgumentParser, amp: bool = True):
    """Where and how precisely it is computed."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto = a GPU where there is one")
    if amp:
        group.add_argument("--amp", choices=["bf16", "fp16", "off"], default="bf16",
                           help="precision of the model; fp16, for GPUs without bf16, scales the loss; off = float32; "
                                "target and loss are float32 in each")
    group.add_argument("--timeout_minutes", type=number(float, 1e-3, 10**5), default=30,
                       help="how long another rank, or the disk that an image is on, may take to answer")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of initial values, order, crops and masks")
    return group


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str):
    """What a run writes and how it goes on."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=output_dir, help="folder of checkpoints and logs")
    group.add_argument("--resume", default="auto", metavar="auto|none|FILE",
                       help="auto = go on from OUTPUT_DIR/last.pth if it is there; none = start anew; FILE = from there")
    group.add_argument("--on_bad_image", choices=["stop", "skip"], default="stop",
                       help="a training image that cannot be read ends the run, or is replaced by another and listed "
                            "in OUTPUT_DIR/bad_images.txt; evaluation always stops")
    group.add_argument("--overwrite", action="store_true", help="with --resume none: replace the run in OUTPUT_DIR")
    group.add_argument("--compile", action="store_true", help="torch.compile the model; the first step takes minutes")
    group.add_argument("--max_skipped", type=number(int, 0), default=10,
                       help="updates in a row that are skipped because loss or gradient is not finite, before the run ends")
    group.add_argument("--replay", type=number(int, 1), metavar="STEP",
                       help="look into a step that was skipped: compute it again from a checkpoint before it, write nothing "
                            "but OUTPUT_DIR/replay-STEP.pth (and -rankR), and say which layer and which images are not finite")
    group.add_argument("--log_every", type=number(int, 1), default=20, help="steps between log lines")
    group.add_argument("--save_every", type=number(int, 1), default=20, help="epochs between checkpoints that are kept")
    group.add_argument("--save_minutes", type=number(float, 0), default=30, help="minutes between checkpoints within an epoch")
    group.add_argument("--on_full_disk", choices=["wait", "stop"], default="wait",
                       help="a checkpoint that cannot be written is tried again while the run goes on, or ends it")
    return group


def add_schedule_arguments(parser: argparse.ArgumentParser, blr: float | list[float], **defaults):
    """Batch and learning rate; `defaults`: batch_size, epochs, warmup_epochs, min_lr, weight_decay."""
    group = parser.add_argument_group("schedule")
    group.add_argument("--batch_size", type=number(int, 1), help="images of one rank in one forward pass")
    group.add_argument("--accum_iter", type=number(int, 1), default=1,
                       help="forward passes in a step; batch = batch_size x accum_iter x ranks")
    group.add_argument("--effective_batch", type=number(int, 1),
                       help="images of a step, the same on any number of ranks: sets accum_iter, and batch_size to at most "
                            "what was given")
    group.add_argument("--epochs", type=number(int, 1, 10**6), help="passes over the data")
    group.add_argument("--warmup_epochs", type=number(float, 0), help="epochs in which the learning rate rises from 0")
    several = "; several = several probes at once" if isinstance(blr, list) else ""
    group.add_argument("--blr", type=number(float, 0), default=blr, nargs="+" if several else None,
                       help=f"learning rate of 256 samples; the peak is blr x batch / 256{several}")
    group.add_argument("--min_lr", type=number(float, 0), help="learning rate at the end, not scaled by the batch")
    group.add_argument("--weight_decay", type=number(float, 0), help="of weights; biases and norms have none")
    parser.set_defaults(**defaults)
    return group


def classifier_parser(description: str, encoders, output_dir: str, pool: bool, **schedule) -> Parser:
    """The flags that probing and fine-tuning share."""
    parser = Parser(description)
    add_data_arguments(parser, "folder with train/<class>/ and val/<class>/")
    add_checkpoint_arguments(parser, pool)
    add_model_arguments(parser, encoders)
    add_schedule_arguments(parser, **schedule)
    add_device_arguments(parser)
    group = add_run_arguments(parser, output_dir)
    group.add_argument("--eval", action="store_true", help="only evaluate --checkpoint, a classifier.pth, on val/")
    return parser
# fmt: on


def channel_statistics(in_chans: int, mean, std) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel: as given, else ImageNet's for three channels."""
    if in_chans == 3:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values or ()) != in_chans:
            raise ValueError(f"--in_chans {in_chans} needs {in_chans} values of {flag}, not {len(values or ())}")
    return tuple(mean), tuple(std)


def resolve_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Copy of the arguments in which no flag is "auto" or None for want of a value: radius, crop interpolation, mean, std.

    Flags that the arguments lack stay absent. Runs that were begun before these were resolved hold None.
    """
    found = dict(vars(args))
    if found.get("lowpass_radius", 0) in ("auto", None):
        found["lowpass_radius"] = 40 * min(found["input_size"]) / 224
    if found.get("crop_interpolation", "") in ("auto", None):
        found["crop_interpolation"] = "bilinear" if found["crop"] == "src" else "bicubic"
    if "mean" in found:
        found["mean"], found["std"] = channel_statistics(found["in_chans"], found["mean"], found["std"])
    return argparse.Namespace(**found)


LOADER = re.compile(r"DataLoader (worker|timed out)")
MEMORY = re.compile("out of memory|can't allocate memory")
LOST = re.compile("gloo|nccl|connection (closed|reset|refused)|pair closure|time(d )?out|TCPStore", re.IGNORECASE)


def explained(error: RuntimeError | MemoryError) -> str | None:
    """A line for what torch raises when memory or another process is to blame; it has no class of its own."""
    reason = str(error).splitlines()[0][:160] if str(error) else ""
    if isinstance(error, MemoryError) or MEMORY.search(reason):
        less = "a smaller --batch_size or --input_size needs less, so does pre-training with --grad_checkpointing"
        return f"{reason or 'out of memory'}; {less}"
    if LOADER.search(reason):
        return f"a loader process ended or did not answer: {reason}; fewer --num_workers need less memory, the same command goes on"
    if ("RANK" in os.environ or "SLURM_PROCID" in os.environ) and LOST.search(str(error)):
        return f"another rank ended or did not answer within --timeout_minutes; see its output ({reason})"
    return None


WRITER = "checkpoint"  # name of the thread that writes it


def exit_after_save() -> None:
    """Exit status 1 as soon as a checkpoint that is being written is whole: what binds lost ranks is not taken down."""
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join(60)
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:  # torchrun takes a node that died for a living one for 15 s,
        time.sleep(20)  # and would wait for it in vain, and end, if it started the others again before
    os._exit(1)


def run_main(main: Callable[[], None]) -> None:
    """Run a main; what the user can mend ends it with one line and exit status 1, PIXMIM_DEBUG=1 shows where."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        said = explained(error) if isinstance(error, RuntimeError | MemoryError) else str(error)
        if os.environ.get("PIXMIM_DEBUG") or said is None:
            raise
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        line = f"{Path(sys.argv[0]).name}{rank}: error: {said}"
        if not isinstance(error, RuntimeError | MemoryError):
            sys.exit(line)
        print(line, file=sys.stderr, flush=True)
        exit_after_save()
