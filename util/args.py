"""The command line: recipes, the flags that the scripts share, and errors as one line."""

import argparse
import errno
import os
import re
import resource
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from util.files import printable

METHOD = {
    "lowpass_radius": "auto", "lowpass": "reference", "mask_ratio": 0.75, "mask_unit": 1, "norm_pix_loss": True,
    "predict_ratio": None, "decoder": "self", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "fuse_levels": False,
    "fuse_layers": None, "pos_embed": "sincos",
}  # fmt: skip
PRETRAIN = {"model": "vit_base", "input_size": (224, 224), "in_chans": 3}  # without --checkpoint
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = "folder with train/<class>/ and val/<class>/, tar or zip files, or a table (.txt .csv .tsv .parquet)"
ROOT = Path(__file__).parents[1]


def expand(words: list[str], folder: Path = Path(), parents: tuple[Path, ...] = ()) -> list[str]:
    """Words with every @FILE replaced by the words in that recipe.

    A recipe that the current folder lacks is looked up in this repository. In a recipe `#` starts a comment, and @FILE is
    relative to the recipe. ValueError for a missing, unreadable or recursive recipe.
    """
    expanded = []
    for word in words:
        if not word.startswith("@"):
            expanded.append(word)
            continue
        recipe = folder / word[1:]
        if not recipe.is_file() and not parents:
            recipe = ROOT / word[1:]  # a recipe of this repository, from any folder
        if not recipe.is_file():
            raise ValueError(f"{word}: recipe {recipe} not found; `ls recipes` lists the recipes of this repository")
        if recipe.resolve() in parents:
            raise ValueError(f"{recipe} includes itself; remove one @{recipe.name}")
        try:
            inside = shlex.split(recipe.read_text(encoding="utf-8-sig"), comments=True)
        except ValueError as error:  # unbalanced quotes, or not UTF-8
            raise ValueError(f"{recipe} is not a valid recipe: {error}; write flags as on the command line") from error
        expanded += expand(inside, recipe.parent, (*parents, recipe.resolve()))
    return expanded


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to each help text, except where it is None and the text explains what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def explain_defaults(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Append "(default: TEXT)" to the help of flags whose default is None; `defaults`: flag -> TEXT."""
    for action in parser._actions:
        if action.default is None and action.dest in defaults and "(default: " not in (action.help or ""):
            action.help = f"{action.help} (default: {defaults[action.dest]})"


class Parser(argparse.ArgumentParser):
    """argparse with recipes, printed defaults and without abbreviated flags."""

    def __init__(self, description: str | None = None, **options):
        epilog = "@FILE reads flags from a recipe. Later flags override earlier ones."
        options |= {"epilog": epilog, "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = expand(sys.argv[1:] if args is None else list(args))
        flag = "of no flag"
        for word in words:
            flag = word.partition("=")[0] if word.startswith("--") else flag
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error(f"argument {flag}: its value is empty, perhaps an unset variable; give one or omit the flag")
        return super().parse_known_args(words, namespace)


def number(kind: type, low: float, high: float = 10**9, *, words: Sequence[str] = ()) -> Callable:
    """argparse type: an int or float in [low, high], or one of `words`. nan and inf are rejected."""

    def convert(text: str):
        if text in words:
            return text
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


def size_share(text: str) -> list:
    """argparse type: SIZE:SHARE -> [pixels, share of the epochs]."""
    size, share = text.split(":")
    return [number(int, 1)(size), number(float, 0, 1)(share)]


def picture(text: str) -> str:
    """argparse type: file name of a picture to write."""
    if Path(text).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png or .jpg")
    return text


class SizeAction(argparse.Action):
    """argparse action: one number or two -> (H, W)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes one number or two (H W), not {len(values)}")
        setattr(namespace, self.dest, (values[0], values[-1]))


class RangeAction(argparse.Action):
    """argparse action: `auto`, `full`, `percentile P Q`, or LOW HIGH pairs."""

    def __call__(self, parser, namespace, values, option_string=None):
        mode, numbers = values[0], values[isinstance(values[0], str) :]
        pairs = [*zip(numbers[::2], numbers[1::2], strict=False)]
        count = {"auto": (0,), "full": (0,), "percentile": (2,)}.get(mode, range(2, 10**4, 2))
        percent = mode == "percentile"
        wrong = len(numbers) not in count or any(isinstance(x, str) for x in numbers) or any(x >= y for x, y in pairs)
        if wrong or (percent and not 0 <= numbers[0] < numbers[1] <= 100):
            parser.error(f"{option_string} {' '.join(map(str, values))}: expected auto, full, LOW HIGH (one pair, or one per channel) "
                         "or percentile P Q, the lower first")  # fmt: skip
        setattr(namespace, self.dest, values)


# fmt: off
def add_model_arguments(parser: argparse.ArgumentParser, encoders, *otherwise: str):
    """Flags of the architecture, which a checkpoint states; `otherwise`: --model, --input_size, --in_chans without one."""
    group = parser.add_argument_group("model")
    sources = [f" (default: as in --checkpoint{x and f', else {x}'})" for x in otherwise or ("", "", "")]
    group.add_argument("--model", choices=sorted(encoders), help=f"encoder{sources[0]}")
    group.add_argument("--patch_size", type=number(int, 1), help="side of a patch in pixels (default: the model's, 16 or 14)")
    group.add_argument("--input_size", type=number(int, 1), nargs="+", action=SizeAction, metavar="H",
                       help=f"side of the input in pixels, or height and width{sources[1]}")
    group.add_argument("--in_chans", type=number(int, 1), help=f"number of image channels{sources[2]}")
    group.add_argument("--class_tokens", type=number(int, 1),
                       help="number of class tokens, whose mean is the image feature; 8 = Pixio (default: as in --checkpoint, else 1; "
                            "ConvMAE has none)")
    group.add_argument("--mean", type=number(float, -(10**9)), nargs="+",
                       help="mean of each channel, pixels in [0, 1] (default: ImageNet's for 3 channels)")
    group.add_argument("--std", type=number(float, 1e-6), nargs="+",
                       help="standard deviation of each channel, pixels in [0, 1] (default: ImageNet's for 3 channels)")
    group.add_argument("--crop_pct", type=number(float, 0.01, 1),
                       help="side of the evaluation crop as a share of the resized image (default: as in --checkpoint, else 0.875 up "
                            "to 224 px and 1 above, as in MAE)")
    return group


def add_method_arguments(parser: argparse.ArgumentParser, **defaults):
    """Flags of the pre-training method; `defaults` override METHOD."""
    group = parser.add_argument_group("method")
    group.add_argument("--lowpass_radius", type=number(float, 0, words=["auto"]),
                       help="cut-off of the target in frequency bins; 0 = raw pixels (MAE); auto = 40 at 224 px, "
                            "in proportion to the shorter side")
    group.add_argument("--lowpass", choices=["reference", "centered"],
                       help="low-pass filter: reference = the release's, half a bin off centre; centered = zero phase")
    group.add_argument("--mask_ratio", type=number(float, 0, 1), help="share of patches removed, 0 to 1")
    group.add_argument("--mask_unit", type=number(int, 1), help="side of the blocks in which patches are removed, in patches; 2 = LSMAE")
    group.add_argument("--predict_ratio", type=number(float, 0, 1),
                       help="share of all patches that is predicted, drawn from the removed ones (default: every removed patch)")
    group.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction,
                       help="normalise each target patch by its own mean and standard deviation")
    group.add_argument("--decoder", choices=["self", "cross"],
                       help="attention of the decoder: self = among visible and predicted patches (MAE); cross = of predicted patches to "
                            "the encoder's tokens (CrossMAE)")
    for name, least, what in (("dim", 4, "width"), ("depth", 1, "number of blocks"), ("heads", 1, "number of attention heads")):
        group.add_argument(f"--decoder_{name}", type=number(int, least), help=f"decoder: {what}")
    group.add_argument("--fuse_levels", action=argparse.BooleanOptionalAction,
                       help="--decoder cross: each block reads its own weighted sum of the outputs of all encoder blocks, as CrossMAE")
    group.add_argument("--pos_embed", choices=["sincos", "learned"],
                       help="position embeddings: sincos = fixed (MAE); learned = trained (Pixio)")
    group.add_argument("--fuse_layers", type=number(int, 0), nargs="+",
                       help="layers that an MFF encoder fuses, counted from 0 (default: 0 2 4 6 8 11 of 12 layers)")
    parser.set_defaults(**METHOD | defaults)
    explain_defaults(parser, {name: f"as in --checkpoint, else {value}" for name, value in METHOD.items()})
    return group


def add_checkpoint_arguments(parser: argparse.ArgumentParser, pools: Sequence[str] = ("token", "mean")):
    """Flags of the weights and of the image feature, which is one of `pools`; with "ep" several can be given."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--checkpoint", required=True, metavar="FILE|none",
                       help="weights in any format that util/convert.py reads; none = untrained --model")
    group.add_argument("--init_channels", choices=["mean", "cycle"],
                       help="with --in_chans other than the file's: each channel of the patch embedding gets the mean of the file's, or "
                            "the file's are repeated; in torchgeo-bench (issue 85) repeating RGB weights made 16 of 17 results worse, "
                            "by 3.9 points on average (default: other channels are refused)")
    group.add_argument("--use_ema", action="store_true", help="read the moving average of the weights, which some files hold beside them")
    if pools:
        ep = ", or ep = efficient probing of the patch tokens; several train side by side" if "ep" in pools else ""
        group.add_argument("--pool", choices=pools, nargs="+" if ep else None,
                           help=f"image feature: class token (the mean of several) or mean of the patch tokens{ep} (default: as the checkpoint was "
                                "probed, else the class token if there is one)")
    return group


def add_pixel_arguments(group, stated: str = "as in --checkpoint, else ") -> None:
    """Flags of the values of an image; `stated`: begin of their default, where it is read first."""
    group.add_argument("--bands", type=number(int, 1), nargs="+",
                       help="bands, channels or pages of each image to use, in this order; 1 = first (default: " + stated + "all)")
    group.add_argument("--value_range", type=number(float, -(10**12), 10**12, words=["auto", "full", "percentile"]), nargs="+",
                       action=RangeAction, metavar="auto|full|LOW HIGH|percentile P Q",
                       help="values that become black and white. auto = one range for all images that are not 8-bit: the declared one, "
                            "else from a sample of at most 256; full = range of the number type, 0 to 1 for floats; LOW HIGH, or such a "
                            "pair per channel = of all images; percentile = of each channel of each image (default: " + stated + "auto)")
    group.add_argument("--alpha", choices=["auto", "composite", "drop", "channel"],
                       help="fourth channel: composite = blend over white; drop = ignore; channel = use as any other; auto = composite, "
                            "but channel in GeoTIFFs (default: " + stated + "auto)")


def add_data_arguments(parser: argparse.ArgumentParser, layout: str, splits: bool = True, packed: bool = True):
    """Flags of the data. `splits`: of labels and splits, too; `packed`: of tables and tar shards, too."""
    group = parser.add_argument_group("data")
    add_source_arguments(group, layout, splits, packed)
    if splits and packed:
        group.add_argument("--val_path", nargs="+", metavar="PATH",
                           help="validation images, as --data_path (default: val/, valid/ or test/ in --data_path)")
        group.add_argument("--label_column", metavar="NAME", help="column of a table with the class (default: label, class, category or target)")
    group.add_argument("--num_workers", type=number(int, 0, 256),
                       help="data-loader workers per rank (default: the rank's share of the CPU cores, at most 24)")
    add_pixel_arguments(group)
    group.add_argument("--on_bad_image", choices=["stop", "skip"], default="stop",
                       help="unreadable image: stop = end the run; skip = training uses the next image, evaluation leaves "
                            "it out; listed in OUTPUT_DIR/bad_images.txt, or printed if there is no OUTPUT_DIR")
    return group


def add_source_arguments(group, layout: str, splits: bool = True, packed: bool = True) -> None:
    """Flags that name images, for a parser or a group of it."""
    group.add_argument("--data_path", nargs="+", required=True, metavar="PATH", help=layout + ("; several are joined" if packed else ""))
    group.add_argument("--image_column", metavar="NAME",
                       help="column of a table with the images or their paths (default: image, file_name or path, for example)")
    if splits:
        group.add_argument("--split_column", metavar="NAME",
                           help="column of a table with the name of the split, such as train or val (default: split)")
    if not packed:
        return
    group.add_argument("--tar_key", metavar="KEY",
                       help="image of each sample in tar shards that hold several, such as input.jpg of x.input.jpg; '*' = all "
                            "(default: the only one)")
    group.add_argument("--verbose_data", action="store_true", help="list each class and each file that is left out")


def add_subset_arguments(parser: argparse.ArgumentParser):
    """Flags of evaluation with few labels."""
    group = parser.add_argument_group("few labels")
    group.add_argument("--train_fraction", type=number(float, 1e-9, 1), default=1.0,
                       help="share of each training class to use, drawn by --seed, at least one image a class")
    group.add_argument("--train_list", metavar="FILE", help="training images to use: CLASS/IMAGE, one a line (default: all)")


def add_results_argument(parser: argparse.ArgumentParser, otherwise: str = "none"):
    """Flag of the file that `util.report` reads; `otherwise`: the file without the flag."""
    parser.add_argument("--results", metavar="FILE", help="file to which the result and its origin are appended as a line of JSON, for "
                        f"python -m util.report (default: {otherwise})")


def add_device_arguments(parser: argparse.ArgumentParser, amp: bool = True):
    """Flags of the device and the precision."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto = GPU if available")
    if amp:
        group.add_argument("--amp", choices=["bf16", "fp16", "off"], default="bf16",
                           help="precision of the model: fp16 = with loss scaling, for GPUs without bf16; off = float32. "
                                "Target and loss are always float32")
    group.add_argument("--timeout_minutes", type=number(float, 1e-3, 10**5), default=30,
                       help="time limit for another rank to answer and for an image to be read")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of initial weights, sample order, crops and masks")
    return group


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str):
    """Flags of the output folder, checkpoints and logging."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=output_dir, help="folder for checkpoints and logs")
    group.add_argument("--resume", default="auto", metavar="auto|none|FILE",
                       help="auto = resume from OUTPUT_DIR/last.pth if it exists; none = start a new run; FILE = resume from this checkpoint")
    group.add_argument("--overwrite", action="store_true", help="with --resume none: delete the run in OUTPUT_DIR")
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile; the first step takes minutes")
    group.add_argument("--max_skipped", type=number(int, 0), default=10,
                       help="consecutive updates that may be skipped because loss or gradient is not finite; one more ends the run")
    group.add_argument("--log_every", type=number(int, 1), default=20, help="steps between two log lines")
    group.add_argument("--save_every", type=number(int, 1), default=20, help="epochs between two permanent checkpoints, epoch-NNNN.pth")
    group.add_argument("--save_minutes", type=number(float, 0), default=30, help="minutes between two saves of last.pth within an epoch")
    group.add_argument("--on_full_disk", choices=["wait", "stop"], default="wait",
                       help="disk full: wait = continue training and retry the save; stop = end the run")
    return group


def add_schedule_arguments(parser: argparse.ArgumentParser, blr: float | list[float], **defaults):
    """Flags of batch size and learning rate; `defaults`: batch_size, epochs, warmup_epochs, min_lr, weight_decay."""
    group = parser.add_argument_group("schedule")
    group.add_argument("--batch_size", type=number(int, 1), help="images per rank and forward pass")
    group.add_argument("--accum_iter", type=number(int, 1), default=1,
                       help="forward passes per optimiser step; effective batch = batch_size x accum_iter x ranks")
    group.add_argument("--effective_batch", type=number(int, 1),
                       help="images per optimiser step on any number of ranks (default: batch_size x accum_iter x ranks). "
                            "Overrides accum_iter; batch_size becomes the maximum per forward pass")
    group.add_argument("--epochs", type=number(int, 1, 10**6), help="number of epochs")
    group.add_argument("--warmup_epochs", type=number(float, 0), help="epochs of linear warm-up of the learning rate from 0")
    several = "; several values train several heads at once, --min_lr is that of the largest" if isinstance(blr, list) else ""
    group.add_argument("--blr", type=number(float, 0), default=blr, nargs="+" if several else None,
                       help=f"base learning rate; peak learning rate = blr x effective batch / 256{several}")
    group.add_argument("--min_lr", type=number(float, 0), help="learning rate at the end of the schedule, not scaled by the batch")
    group.add_argument("--weight_decay", type=number(float, 0), help="weight decay; not applied to biases and norms")
    parser.set_defaults(**defaults)
    return group


def classifier_parser(description: str, encoders, output_dir: str, pools: Sequence[str], **schedule) -> Parser:
    """Parser with the flags that probing and fine-tuning share."""
    parser = Parser(description)
    add_data_arguments(parser, CLASSES)
    add_subset_arguments(parser)
    add_checkpoint_arguments(parser, pools)
    add_model_arguments(parser, encoders)
    add_schedule_arguments(parser, **schedule)
    add_device_arguments(parser)
    group = add_run_arguments(parser, output_dir)
    group.add_argument("--eval", action="store_true",
                       help="only evaluate --checkpoint, a classifier, on DIR/val/<class>/, on DIR/<class>/ (ImageNet-A, -R, -Sketch) or on "
                            "DIR/<corruption>/<1 to 5>/<class>/ (ImageNet-C)")
    add_results_argument(group, "OUTPUT_DIR/results.jsonl; none with --eval")
    return parser
# fmt: on


def channel_statistics(in_chans: int, mean, std) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel: the given values, else ImageNet's if there are three channels."""
    if in_chans == 3:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values or ()) != in_chans:
            raise ValueError(f"{flag}: {len(values or ())} values given, --in_chans {in_chans} needs {in_chans}")
    return tuple(mean), tuple(std)


def default_radius(size: tuple[int, int]) -> float:
    """Radius of the low-pass target in bins: the paper's 40 at 224 px, in proportion to the shorter side."""
    return 40 * min(size) / 224


def default_crop_pct(size: tuple[int, int]) -> float:
    """Side of the evaluation crop as a share of the resized image, as in facebookresearch/mae: 1 above 224 px."""
    return 224 / 256 if max(size) <= 224 else 1.0


def resolve_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Copy of the arguments with "auto" and unset values replaced: architecture, radius, crop interpolation, mean, std.

    Flags that the arguments lack stay absent. Checkpoints of earlier versions store None for the last four.
    """
    defaults: dict[str, Any] = PRETRAIN | METHOD
    found: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in vars(args).items()}
    if found.get("lowpass_radius", 0) in ("auto", None):
        found["lowpass_radius"] = default_radius(found["input_size"])
    if found.get("crop_interpolation", "") in ("auto", None):
        found["crop_interpolation"] = "bilinear" if found["crop"] == "src" else "bicubic"
    if "mean" in found:
        found["mean"], found["std"] = channel_statistics(found["in_chans"], found["mean"], found["std"])
    return argparse.Namespace(**found)


def effective_args(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved arguments, unset ones replaced by the value with the same effect, for comparing two runs."""
    found = vars(resolve_defaults(args))
    defaults = {"predict_ratio": found.get("mask_ratio"), "class_tokens": 1, "alpha": "auto"}
    defaults["crop_pct"] = default_crop_pct(found["input_size"])
    return {name: defaults.get(name) if value is None else value for name, value in found.items()}


# -------------------------------------------------------------------------------------------------------------- errors

MIN_OPEN_FILES = 256
LOADER_ERROR = re.compile(r"DataLoader (worker|timed out)")
MEMORY_ERROR = re.compile("out of memory|can't allocate memory")
LOST_RANK = re.compile("connection (closed|reset|refused)|pair closure|time(d )?out|remote process exited", re.I)
RANK_ERROR = re.compile(f"gloo|TCPStore|{LOST_RANK.pattern}", re.I)
WRITER_THREAD = "checkpoint"  # name of the thread that writes checkpoints


def explain_error(error: Exception) -> str | None:
    """One line for out-of-memory errors, dead workers and dead ranks, which torch raises as RuntimeError; else None."""
    reason = str(error).splitlines()[0][:160] if str(error) else ""
    if isinstance(error, MemoryError) or MEMORY_ERROR.search(reason):
        remedy = "reduce --batch_size or --input_size, or pre-train with --grad_checkpointing"
        return f"{reason or 'out of memory'}; {remedy}"
    if LOADER_ERROR.search(reason):
        if reason.startswith("Caught "):  # the traceback of the worker, whose last line is the cause
            reason = str(error).splitlines()[-1][:160]
        again = "; run the same command again to resume, with fewer --num_workers if memory was short"
        return f"a data-loader worker died or timed out: {reason}{shared_memory_hint(error) or again}"
    if not is_rank():
        return None
    if "EADDRINUSE" in str(error):
        return f"MASTER_PORT {os.environ.get('MASTER_PORT')} is used by another process on this node; set it to a free port"
    if "NCCL" in str(error) and not LOST_RANK.search(str(error)):
        return f"NCCL failed: {str(error).rpartition('Last error:')[2].strip()[:300]}; NCCL_DEBUG=INFO shows more"
    if RANK_ERROR.search(str(error)):
        return f"another rank died or did not answer within --timeout_minutes; see its output ({reason})"
    return None


def is_rank() -> bool:
    """True if a launcher started this process as one of its ranks, as far as the environment tells."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def end_rank(status: int) -> None:
    """End a process that a launcher started; does nothing in others.

    Python's own exit has aborted there in a thread of torch, with status 134, by which Slurm does not requeue.
    """
    if is_rank():
        sys.stdout.flush()
        os._exit(status)


def exit_after_save() -> None:
    """End the process with status 1 once a checkpoint in progress is written, without tearing down the process group."""
    for thread in threading.enumerate():
        if thread.name == WRITER_THREAD:
            thread.join(60)
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        time.sleep(20)  # torchrun counts a dead node as alive for 15 s and would wait for it in a restart
    os._exit(1)


def shared_memory_hint(error: Exception) -> str:
    """The remedy if loader workers fail because /dev/shm, by which they pass images, is small; else empty."""
    without_file = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
    if not (without_file or LOADER_ERROR.search(str(error))) or not os.path.isdir("/dev/shm"):
        return ""
    usage = shutil.disk_usage("/dev/shm")
    if usage.free > 2**26:
        return ""
    return (
        f": /dev/shm has {usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB free; use --num_workers 0, or enlarge it "
        "(docker run --shm-size=8g or --ipc=host)"
    )


def prepare_process() -> None:
    """Open closed standard streams on /dev/null, and refuse a limit of open files with which loader workers hang."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get this number, and the output
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r+", closefd=False))  # noqa: SIM115  open until the process ends
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_OPEN_FILES <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_OPEN_FILES, hard))
    elif soft < MIN_OPEN_FILES:
        sys.exit(f"{Path(sys.argv[0]).name}: error: at most {hard} open files; raise it to {MIN_OPEN_FILES}: ulimit -n")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main. Errors that the user can fix become one line and exit status 1.

    PIXMIM_DEBUG=1 shows the traceback instead.
    """
    prepare_process()
    try:
        main()
        end_rank(0)
    except SystemExit as ending:
        if isinstance(ending.code, int):
            end_rank(ending.code)
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        of_torch = isinstance(error, RuntimeError | MemoryError)
        message = explain_error(error) if of_torch else str(error) + shared_memory_hint(error)
        if os.environ.get("PIXMIM_DEBUG") or message is None:
            raise
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        line = printable(f"{Path(sys.argv[0]).name}{rank}: error: {message}")
        if not of_torch:
            sys.exit(line)
        print(line, file=sys.stderr, flush=True)
        exit_after_save()
