"""python -m util.convert IN OUT --to FORMAT: convert checkpoints between repositories."""

import argparse
import os
import shutil
import sys
from pathlib import Path

if not __package__:  # python util/convert.py
    sys.path[0] = str(Path(__file__).parents[1])

from util.args import Parser, SizeAction, number, run_main
from util.files import import_package, write_failure
from util.formats.commands import load_command
from util.formats.keys import DECODER, FORMATS
from util.formats.read import read_weights
from util.formats.resize import resize_weights
from util.formats.write import rename_tensors, select_tensors, write_weights


def convert(
    source: Path, out: Path, target: str, *, folder: bool = False, encoder_only: bool = False,
    input_size: tuple[int, int] | None = None, backbone: str = "MAE", use_ema: bool = False,
) -> str:  # fmt: skip
    """Write `out`, a file or folder with the tensors of `source` in the format `target`; returns the report.

    ValueError if the format cannot hold the weights or `out` cannot be written.
    """
    if source.resolve() == out.resolve():
        raise ValueError(f"IN and OUT are the same file, {out}: choose another OUT")
    _check_flags(target, folder, encoder_only, backbone)
    folder = folder or target == "hf"
    occupied = any(out.iterdir()) if folder and out.is_dir() else out.exists() if folder else out.is_dir()
    if occupied or not out.parent.is_dir():
        what = "new or empty folder" if folder else "file"
        raise ValueError(f"cannot write {out}: OUT must be a {what} in an existing folder")
    weights = read_weights(source, input_size, use_ema)
    # before resampling: an encoder that the format cannot hold is refused
    select_tensors(weights, target, encoder_only)
    weights = weights if input_size is None else resize_weights(weights, input_size)
    line = load_command(weights, target, out, folder, encoder_only, backbone)
    chosen = select_tensors(weights, target, encoder_only)
    state = rename_tensors(chosen, target, backbone)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        write_weights(temporary, weights.with_state(chosen), state, target, folder)
        if folder and out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:
        raise write_failure(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
    removed = [key for key in weights.state if key not in chosen]
    decoder = sum(1 for key in removed if DECODER.fullmatch(key))
    dropped = weights.dropped + ([f"mask_token and decoder_* ({decoder} keys)"] if decoder else [])
    dropped += [key for key in removed if not DECODER.fullmatch(key)]
    raw = target == "hf" and "mask_token" in chosen and weights.norm_pix_loss is None
    assumed = "assumed  norm_pix_loss true, which IN does not state; for raw pixels (mae_visualize_*) edit it\n"
    return (
        f"read     {source}: {weights.source}, {len(weights.state)} keys mapped\n"
        f"dropped  {', '.join(dropped) or 'nothing'}\n"
        f"wrote    {out}: {target}, {len(state)} keys\n{assumed if raw else ''}"
        f"load it  {line}"
    )


def _check_flags(target: str, folder: bool, encoder_only: bool, backbone: str) -> None:
    if folder and target not in ("timm", "hf"):
        raise ValueError(f"--folder requires --to timm (--to hf always writes a folder), not --to {target}")
    if encoder_only and target != "hf":
        raise ValueError(f"--encoder_only requires --to hf, not --to {target}")
    if backbone != "MAE" and target != "mmseg":
        raise ValueError(f"--backbone {backbone} requires --to mmseg, not --to {target}")


def push(folder: Path, name: str) -> None:
    """Upload a folder to the Hugging Face Hub. A new repository is private. OSError if the upload fails."""
    hub = import_package("huggingface_hub", f"--push_to_hub {name}")
    try:
        api = hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # network, hub and name errors have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"--push_to_hub {name}: {reason}; {folder} is complete, upload it by hand") from error


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = Parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("IN", type=Path, help="checkpoint of PixMIM, MAE, ConvMAE, mmselfsup / mmpretrain / mmsegmentation, timm or transformers; "
                              "or a folder of timm or transformers")
    add("OUT", type=Path, help="file to write; with --folder or --to hf a new folder")
    add("--to", choices=FORMATS["vit"], default="timm", help="format; mae includes Alpha-VL/ConvMAE")
    add("--folder", action="store_true", help="timm: write a folder with config.json, for local-dir: and the Hub")
    add("--encoder_only", action="store_true", help="hf: write a ViTModel without decoder, not a ViTMAEForPreTraining")
    add("--backbone", choices=["MAE", "VisionTransformer"], default="MAE", help="mmseg: backbone class that loads the file")
    add("--input_size", type=number(int, 1), nargs="+", action=SizeAction, metavar="H",
        help="resample the position embeddings to this input size in pixels: one side, or H W (default: that of IN)")
    add("--use_ema", action="store_true", help="read the moving average of the weights, which some files hold beside them")
    add("--push_to_hub", metavar="NAME",
        help="upload the folder to this repository of the Hugging Face Hub; a new one is private (default: no upload)")
    # fmt: on
    return parser


def main() -> None:
    args = get_parser().parse_args()
    options = {name: getattr(args, name) for name in ("folder", "encoder_only", "input_size", "backbone", "use_ema")}
    if args.push_to_hub and not (args.folder or args.to == "hf"):
        raise ValueError(f"--push_to_hub {args.push_to_hub} requires --folder or --to hf")
    print(convert(args.IN, args.OUT, args.to, **options))
    if args.push_to_hub:
        push(args.OUT, args.push_to_hub)
        print(f"pushed   {args.push_to_hub}")


if __name__ == "__main__":
    run_main(main)
