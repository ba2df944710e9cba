"""Kinds of image files: what is read equals array arithmetic, in every reader; the decision of --value_range auto."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from conftest import CPU, DEVICE, MODEL, PRETRAIN, ROOT, call, one_rank, pretrain, records, result
from PIL import Image

from util.data.batches import DevicePrefetcher, train_loader
from util.data.cache import Cache
from util.data.decode import read_image
from util.data.folders import image_folder, list_images
from util.data.pixels import PixelOptions
from util.data.ranges import resolve_pixels
from util.data.sources import pretrain_source
from util.data.transforms import pretrain_transform

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python >= 3.12: forked workers
SIZE = (24, 18)  # height and width of the test images
GEO = [(34735, 3, 4, (1, 1, 0, 0), True)]  # GeoKeyDirectory


def grey(seed: int = 0, high: int = 255, channels: int = 1) -> np.ndarray:
    """Smooth values (H, W, C) from 0 to `high`, in integers."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.linspace(0, 1, side)[:, None] for side in SIZE)
    waves = [np.cos(3 * rng.random() * rows + 4 * rng.random() * columns.T + i) for i in range(channels)]
    image = np.stack([(wave - wave.min()) / np.ptp(wave) for wave in waves], axis=2)
    return np.round(image * high).astype(np.int64)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def pillow(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(values: np.ndarray, bits: int | None = None) -> bytes:
    """16-bit PNG of one to four channels, which Pillow cannot write, with sBIT."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    depth = chunk(b"sBIT", bytes([bits] * channels)) if bits else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + depth + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def dicom(values: np.ndarray, bits: int, slope: float = 1, intercept: float = 0, kind: str = "MONOCHROME2") -> bytes:
    """Frames (H, W) of 16-bit values."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, kind
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(values.min() < 0)
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.PixelData = values.astype("<i2" if values.min() < 0 else "<u2").tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def to_8bit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The arithmetic that each kind is compared with."""
    return np.floor(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


BYTES, TWELVE, RGB12, FIVE = grey(), grey(1, 4095), grey(2, 4095, 3), grey(3, 255, 5)
UNIT, CT = grey(4, 10_000) / 10_000, grey(5, 3000) - 1000
ALPHA = np.dstack([grey(6, 255, 3), grey(7, 255)]).astype(np.uint8)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.floor((colours.astype(float) * alpha + 255.0 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)


# kind -> (file name, content, flags, pixels (H, W, C))
Row = tuple[str, bytes, str, np.ndarray]
U8, U16 = np.uint8, np.uint16
KINDS: dict[str, Row] = {
    "12 bits in a 16-bit PNG": ("x.png", png16(TWELVE), "", to_8bit(TWELVE, 0, 4095)),
    "sBIT 14": ("x.png", png16(TWELVE, 14), "", to_8bit(TWELVE, 0, 16383)),
    "sBIT 12, values scaled to 16 bits": ("x.png", png16(TWELVE << 4, 12), "", to_8bit(TWELVE << 4, 0, 65535)),
    "RGB 16-bit PNG": ("x.png", png16(RGB12), "", to_8bit(RGB12, 0, 4095)),
    "PGM with maxval 1000": (
        "x.pgm",
        b"P5\n18 24\n1000\n" + (TWELVE % 1000).astype(">u2").tobytes(),
        "",
        to_8bit(TWELVE % 1000, 0, 1000),
    ),
    "12 bits in a 16-bit TIFF": ("x.tif", tiff(TWELVE[..., 0].astype(U16)), "", to_8bit(TWELVE, 0, 4095)),
    "14 bits declared by OME": (
        "x.ome.tif",
        tiff(TWELVE[..., 0].astype(U16), ome=True, metadata={"axes": "YX", "SignificantBits": 14}),
        "",
        to_8bit(TWELVE, 0, 16383),
    ),
    "full": ("x.tif", tiff(TWELVE[..., 0].astype(U16)), "--value_range full", to_8bit(TWELVE, 0, 65535)),
    "LOW HIGH": ("x.tif", tiff(TWELVE[..., 0].astype(U16)), "--value_range 100 900", to_8bit(TWELVE, 100, 900)),
    "LOW HIGH of 8 bits": ("x.png", pillow(Image.fromarray(BYTES[..., 0].astype(U8)), "PNG"), "--value_range 50 90",
                           to_8bit(BYTES, 50, 90)),
    "percentile": ("x.tif", tiff(TWELVE[..., 0].astype(U16)), "--value_range percentile 5 95",
                   to_8bit(TWELVE, *np.percentile(TWELVE, (5, 95)))),
    "RGB 16-bit TIFF, deflate": ("x.tif", tiff(RGB12.astype(U16), photometric="rgb", compression="zlib"), "", to_8bit(RGB12, 0, 4095)),
    "RGB TIFF, planar, deflate": ("x.tif", tiff(np.moveaxis(FIVE[..., :3], 2, 0).astype(U8), photometric="rgb",
                                                planarconfig="separate", compression="zlib"), "", FIVE[..., :3]),
    "BigTIFF, tiles, LZW": ("x.tif", tiff(RGB12.astype(U16), bigtiff=True, tile=(16, 16), compression="lzw",
                                          photometric="rgb"), "", to_8bit(RGB12, 0, 4095)),
    "float16 TIFF": ("x.tif", tiff(UNIT[..., 0].astype(np.float16)), "", to_8bit(UNIT.astype(np.float16), 0, 1)),
    "float32 TIFF": ("x.tif", tiff(UNIT[..., 0].astype(np.float32)), "", to_8bit(UNIT.astype(np.float32), 0, 1)),
    "float64 TIFF of whole numbers": ("x.tif", tiff(BYTES[..., 0].astype(np.float64)), "", BYTES),
    "uint32 TIFF": ("x.tif", tiff(TWELVE[..., 0].astype(np.uint32)), "", to_8bit(TWELVE, 0, 4095)),
    "int16 TIFF": ("x.tif", tiff(CT[..., 0].astype(np.int16)), "--value_range -160 240", to_8bit(CT, -160, 240)),
    "int32 TIFF": ("x.tif", tiff(CT[..., 0].astype(np.int32)), "--value_range -160 240", to_8bit(CT, -160, 240)),
    "int8 TIFF": ("x.tif", tiff((BYTES[..., 0] - 128).astype(np.int8)), "--value_range full", BYTES),
    "0 is white": ("x.tif", tiff(TWELVE[..., 0].astype(U16), photometric="miniswhite"), "", 255 - to_8bit(TWELVE, 0, 4095)),
    "CYX of OME": ("x.tif", tiff(np.moveaxis(RGB12[..., :2], 2, 0).astype(U16), ome=True, metadata={"axes": "CYX"}),
                   "--in_chans 2", to_8bit(RGB12[..., :2], 0, 4095)),
    "five pages": ("x.tif", tiff(np.moveaxis(FIVE, 2, 0).astype(U8)), "--in_chans 5", FIVE),
    "(H, W, 5) written as pages": ("x.tif", tiff(FIVE.astype(U8)), "--in_chans 5", FIVE),
    "five samples": ("x.tif", tiff(FIVE.astype(U8), photometric="minisblack", planarconfig="contig"), "--in_chans 5", FIVE),
    "--bands of pages": ("x.tif", tiff(np.moveaxis(FIVE, 2, 0).astype(U8)), "--bands 5 2 1", FIVE[..., [4, 1, 0]]),
    "--bands of a PNG": ("x.png", pillow(Image.fromarray(FIVE[..., :3].astype(U8)), "PNG"), "--bands 3 2 1", FIVE[..., 2::-1]),
    "one band of five": ("x.npy", npy(FIVE.astype(U8)), "--bands 4 --in_chans 1", FIVE[..., 3:4]),
    "(H, W, C) float64 npy": ("x.npy", npy(FIVE / 255), "--in_chans 5", FIVE),
    "(C, H, W) uint16 npy": ("x.npy", npy(np.moveaxis(FIVE, 2, 0).astype(U16)), "--in_chans 5", FIVE),
    "one range per channel": ("x.npy", npy(RGB12.astype(np.int32)), "--value_range 0 1000 0 2000 500 4000",
                              to_8bit(RGB12, np.array([0, 0, 500]), np.array([1000, 2000, 4000]))),
    "RGB TIFF with alpha": ("x.tif", tiff(ALPHA, photometric="rgb", extrasamples=["unassalpha"]), "--alpha composite",
                            over_white(ALPHA[..., :3], ALPHA[..., 3:])),
    "R, G, B, NIR of GDAL": ("x.tif", tiff(ALPHA, photometric="rgb", extrasamples=["unassalpha"], extratags=GEO),
                             "--in_chans 4", ALPHA),
    "NIR dropped": ("x.tif", tiff(ALPHA, photometric="rgb", extrasamples=["unassalpha"], extratags=GEO),
                    "--alpha drop", ALPHA[..., :3]),
    "alpha of a PNG as channel": ("x.png", pillow(Image.fromarray(ALPHA), "PNG"), "--alpha channel --in_chans 4", ALPHA),
    "16-bit grey PNG with alpha": ("x.png", png16(ALPHA[..., 2:].astype(U16) * 257), "", over_white(ALPHA[..., 2:3], ALPHA[..., 3:])),
    "16-bit PNG with alpha": ("x.png", png16(ALPHA.astype(U16) * 257), "", over_white(ALPHA[..., :3], ALPHA[..., 3:])),
    "DICOM, CT": ("x.dcm", dicom(CT[..., 0] + 1024, 12, 1, -1024), "--value_range -160 240", to_8bit(CT, -160, 240)),
    "DICOM, 12 bits declared": ("x.dcm", dicom(TWELVE[..., 0] // 2, 12), "", to_8bit(TWELVE // 2, 0, 4095)),
    "DICOM, MONOCHROME1": ("x.dcm", dicom(TWELVE[..., 0], 12, kind="MONOCHROME1"), "", 255 - to_8bit(TWELVE, 0, 4095)),
    "JPEG 2000, 16 bits": ("x.jp2", pillow(Image.fromarray(TWELVE[..., 0].astype(U16)), "JPEG2000"), "", to_8bit(TWELVE, 0, 4095)),
    "a PNG named .jpg": ("x.jpg", pillow(Image.fromarray(FIVE[..., :3].astype(U8)), "PNG"), "", FIVE[..., :3]),
    "a TIFF named .jfif": ("x.jfif", tiff(FIVE[..., :3].astype(U8), photometric="rgb"), "", FIVE[..., :3]),
    "no extension": ("x", pillow(Image.fromarray(FIVE[..., :3].astype(U8)), "BMP"), "", FIVE[..., :3]),
}  # fmt: skip


def expected(row: Row, in_chans: int = 3) -> np.ndarray:
    """Pixels with a grey image repeated for three channels."""
    pixels = row[3].astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 and in_chans == 3 else pixels


def parse_row(row: Row, folder: Path) -> Namespace:
    """Arguments of main_pretrain for this row, its file in the folder."""
    import main_pretrain
    from util.args import resolve_defaults

    (folder / row[0]).write_bytes(row[1])
    words = [*PRETRAIN, "--data_path", str(folder), "--output_dir", str(folder / "no"), *row[2].split()]
    args = main_pretrain.get_parser().parse_args(words)
    count = args.in_chans or 3
    args = resolve_defaults(Namespace(**vars(args) | {"mean": [0.5] * count, "std": [0.5] * count}))
    return resolve_pixels(args, pretrain_source(args))


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_pixels_equal_array_arithmetic(kind, tmp_path):
    row = KINDS[kind]
    args = parse_row(row, tmp_path)
    source = image_folder(str(tmp_path))
    bands = source.read(0, PixelOptions.from_args(args))
    found = np.dstack([np.asarray(band) for band in bands])
    assert np.abs(found.astype(int) - expected(row, args.in_chans)).max() <= (1 if "float16" in kind else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_equals_reading_online(kind, tmp_path):
    row = KINDS[kind]
    (tmp_path / "images").mkdir()
    args = parse_row(row, tmp_path / "images")
    words = ["--data_path", tmp_path / "images", "--out", tmp_path / "cache", "--input_size", 16, "--workers", 0]
    call("util.cache", "build", *words, *row[2].split())
    packed = Cache(tmp_path / "cache")
    assert packed.flags["value_range"] == args.value_range
    unset = Namespace(**vars(args) | {"bands": None, "value_range": None, "alpha": None})
    packed.check_flags(unset)
    of_cache = resolve_pixels(unset, packed)
    batches = []
    for source, flags in ((image_folder(str(tmp_path / "images")), args), (packed, of_cache)):
        run = one_rank(
            tmp_path, **vars(flags) | {"batch_size": 1, "input_size": [16, 16], "num_workers": 0, "accum_iter": 1}
        )
        loader = train_loader(run, source, pretrain_transform("src", (16, 16), "bilinear"), flip=True)
        batches.append(next(iter(DevicePrefetcher(loader, CPU)))["images"])
    assert torch.equal(*batches)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_pictures_equal_those_of_the_8_bit_image(kind, tmp_path):
    name, content, words, _ = row = KINDS[kind]
    count = int(match[1]) if (match := re.search(r"--in_chans (\d)", words)) else 3
    channels = ["--in_chans", count, "--mean", *[0.5] * count, "--std", *[0.5] * count]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / name).write_bytes(content)
    np.save(tmp_path / "b" / "x.npy", expected(row, count))
    features, pictures = [], []
    for folder, flags in (("a", words.split()), ("b", [])):
        model = ["--checkpoint", "none", *MODEL, *channels, *flags]
        call("main_features", *model, *DEVICE, "--data_path", tmp_path / folder, "--output", tmp_path / f"{folder}.npy")
        call("visualize", *model, "--masks", "--images", tmp_path / folder, "--output", tmp_path / f"{folder}.png")
        features.append(np.load(tmp_path / f"{folder}.npy"))
        pictures.append(np.asarray(Image.open(tmp_path / f"{folder}.png")))
    assert np.allclose(*features, atol=0.05 if "float16" in kind else 0)  # one grey level
    assert np.abs(np.subtract(*pictures, dtype=int)).max() <= ("float16" in kind)


# ----------------------------------------------------------------------------------------------------- one decision


def write(folder: Path, *contents: bytes, name: str = "{}.tif") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(contents):
        (folder / name.format(i)).write_bytes(content)
    return folder


def test_value_range_auto_is_chosen_per_data_set_and_not_per_image(tmp_path):
    dark, bright = (tiff(values[..., 0].astype(U16)) for values in (TWELVE // 8, TWELVE))
    args = Namespace(in_chans=1)
    both = resolve_pixels(args, image_folder(str(write(tmp_path / "a", dark, bright))))
    assert both.value_range == ["auto", "int", 0, 4095]
    (band,) = read_image(os.fsencode(tmp_path / "a" / "0.tif"), PixelOptions.from_args(both))
    assert np.array_equal(np.asarray(band), to_8bit(TWELVE[..., 0] // 8, 0, 4095))


def test_signed_and_real_values_are_mapped_by_percentiles_of_the_sample_per_channel(tmp_path):
    values = np.random.default_rng(0).normal([0, 100], [1, 20], (50, 40, 2))
    args = resolve_pixels(Namespace(in_chans=2), image_folder(str(write(tmp_path, npy(values), name="{}.npy"))))
    limits = np.quantile(values.reshape(-1, 2), (0.001, 0.999), axis=0).T.ravel()
    np.testing.assert_allclose(args.value_range[2:], limits, rtol=1e-5)


def test_8_bit_images_are_not_sampled_and_keep_their_values(tmp_path, monkeypatch):
    photo = Image.fromarray(FIVE[..., :3].astype(U8))
    write(tmp_path, *[pillow(photo, "JPEG")] * 2, name="{}.jpg")
    source = image_folder(str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr("util.data.folders.read_image", None)
        assert resolve_pixels(Namespace(in_chans=3), source).value_range == ["auto"]
    (tmp_path / "x.tif").write_bytes(tiff(TWELVE[..., 0].astype(U16)))
    args = resolve_pixels(Namespace(in_chans=3), image_folder(str(tmp_path)))
    assert args.value_range == ["auto", "int", 0, 4095]
    (image,) = read_image(os.fsencode(tmp_path / "0.jpg"), PixelOptions.from_args(args))
    assert np.array_equal(image, np.asarray(Image.open(tmp_path / "0.jpg")))


def test_value_range_auto_reads_at_most_256_files(tmp_path, monkeypatch):
    write(tmp_path, *[pillow(Image.new("L", (2, 2)), "PNG")] * 300, name="{}.png")
    seen = []
    monkeypatch.setattr("util.data.folders.read_image", lambda path, options: seen.append(path) or [])
    resolve_pixels(Namespace(in_chans=3), image_folder(str(tmp_path)))
    assert len(seen) == 256


def test_value_types_that_value_range_auto_did_not_sample_give_an_error_with_the_flag(tmp_path):
    write(tmp_path, tiff(UNIT[..., 0].astype(np.float32)))
    for value_range in (("auto",), ("auto", "int", 0, 4095)):
        with pytest.raises(ValueError, match=r"float32.*--value_range auto .*LOW HIGH"):
            read_image(os.fsencode(tmp_path / "0.tif"), PixelOptions(1, value_range=value_range))


def test_a_run_records_its_value_range_and_resumed_runs_and_evaluations_use_it(tmp_path):
    folder = tmp_path / "images" / "train"
    for label in range(2):
        write(folder / str(label), *[tiff(TWELVE[..., 0].astype(U16))] * 8)
    flags = [tmp_path / "images", tmp_path / "run", "--epochs", 1]
    pretrain(*flags, "--warmup_epochs", 0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert config["value_range"] == ["auto", "int", 0, 4095]
    (folder / "0" / "0.tif").write_bytes(tiff(grey(0, 65535)[..., 0].astype(U16)))  # would be decided otherwise
    pretrain(*flags, "--warmup_epochs", 0)
    assert len(records(tmp_path / "run")) == 2
    words = ["--data_path", folder, "--checkpoint", tmp_path / "run" / "last.pth", *DEVICE]
    output = [tmp_path / "a.npy", tmp_path / "b.npy"]
    call("main_features", *words, "--output", output[0])
    call("main_features", *words, "--output", output[1], "--value_range", 0, 4095)
    assert np.array_equal(*map(np.load, output))


def test_warns_if_the_alpha_of_most_tiffs_varies(tmp_path, capsys):
    write(tmp_path, *[tiff(ALPHA, photometric="rgb", extrasamples=["unassalpha"])] * 3)
    resolve_pixels(Namespace(in_chans=3), image_folder(str(tmp_path)))
    assert re.search("fourth .*3 of 3 TIFFs", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (tiff(np.moveaxis(FIVE, 2, 0).astype(U8)), {}, "5 bands.*--bands 1 2 3 .*--in_chans 5"),
        (tiff(FIVE.astype(U8)), {"bands": (6, 1, 2)}, "5 bands.*--bands 6 1 2"),
        (tiff(ALPHA, photometric="rgb", extrasamples=["unassalpha"], extratags=GEO), {}, "has 4 bands.*--alpha drop"),
        (pillow(Image.fromarray(ALPHA), "PNG"), {"in_chans": 4}, "--alpha channel"),
        (npy(np.zeros((9, 9, 3), complex)), {}, "complex128, not numbers"),
        (npy(np.zeros((2, 2, 2, 2), U8)), {}, r"\(2, 2, 2, 2\), not"),
        (npy(np.zeros((100, 120, 200), U8)), {"bands": (1, 2, 3)}, r"axes \(100, 120, 200\)"),
    ],
)  # fmt: skip
def test_errors_name_the_bands_of_the_file_and_the_remedy(content, options, message, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image(os.fsencode(tmp_path / "x"), PixelOptions(**{"in_chans": 3, "value_range": ("full",)} | options))


def test_images_of_two_sizes_in_a_tiff_are_an_error(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(np.zeros((9, 7), U8))
        file.write(np.zeros((5, 6), U8))
    with pytest.raises(ValueError, match=r"sizes \(9, 7\) and \(5, 6\)"):
        read_image(os.fsencode(tmp_path / "x.tif"), PixelOptions(3))


def test_overviews_of_gdal_are_ignored(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(BYTES[..., 0].astype(U8))
        file.write(BYTES[::2, ::2, 0].astype(U8), subfiletype=1)
    (band,) = read_image(os.fsencode(tmp_path / "x.tif"), PixelOptions(1))
    assert np.array_equal(band, BYTES[..., 0])


@pytest.mark.parametrize(
    ("module", "content", "line"),
    [
        ("tifffile", tiff(FIVE.astype(U8)), "pip install tifffile"),
        ("pydicom", dicom(TWELVE[..., 0], 12), "pip install pydicom"),
        ("pillow_heif", b"\0\0\0\x18ftypheic" + bytes(200), "pip install pillow-heif"),
    ],
)
def test_a_missing_package_is_an_error_with_the_install_line(module, content, line, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=line):
        read_image(os.fsencode(tmp_path / "x"), PixelOptions(3))


def test_heic_and_avif_are_read_by_content(tmp_path):
    from pillow_heif import from_pillow

    image = Image.fromarray(grey(0, 255, 3).astype(U8)).resize((64, 64))
    from_pillow(image).save(tmp_path / "x.heic", quality=95)
    image.save(tmp_path / "y.avif", quality=95)
    for name in ("x.heic", "y.avif"):
        os.rename(tmp_path / name, tmp_path / "z.jpg")
        (found,) = read_image(os.fsencode(tmp_path / "z.jpg"), PixelOptions(3))
        assert np.abs(np.asarray(found).astype(int) - np.asarray(image)).mean() < 4  # lossy


def test_lab_is_read_with_one_channel(tmp_path):
    Image.new("LAB", (3, 2), (128, 128, 128)).save(tmp_path / "x.tif")
    (band,) = read_image(os.fsencode(tmp_path / "x.tif"), PixelOptions(1))
    assert np.ptp(np.asarray(band)) == 0
    assert abs(int(np.asarray(band)[0, 0]) - 119) < 3  # L* 50 is sRGB 119


def test_files_without_extension_are_images_if_they_begin_like_one(tmp_path):
    write(tmp_path, tiff(BYTES[..., 0].astype(U8)), b"plain text", name="IM_{}")
    (tmp_path / "1.2.840.7").write_bytes(dicom(TWELVE[..., 0], 12))
    assert [os.path.basename(path) for path in list_images(tmp_path)] == [b"1.2.840.7", b"IM_0"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_16_bit_and_planar_files_are_applied(orientation, tmp_path):
    tag = [(274, 3, 1, orientation, True)]
    write(
        tmp_path,
        tiff(BYTES[..., 0].astype(U8), extratags=tag),
        tiff(BYTES[..., 0].astype(U16) * 257, extratags=tag),
        tiff(np.stack([BYTES[..., 0].astype(U16) * 257] * 2), extratags=tag),
    )
    full = {"value_range": ("full",)}
    eight, sixteen = (
        np.asarray(read_image(os.fsencode(tmp_path / f"{i}.tif"), PixelOptions(1, **full))[0]) for i in (0, 1)
    )
    assert np.array_equal(eight, sixteen)
    pages = read_image(os.fsencode(tmp_path / "2.tif"), PixelOptions(2, **full))
    assert np.array_equal(eight, pages[0])


def test_files_that_declare_huge_arrays_are_refused_before_allocation(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    file = bytearray(tiff(np.zeros((8, 8), np.float16)))
    for code in (256, 257, 278):
        at = file.index(struct.pack("<HH", code, 4 if code != 278 else 3)[:2], 8)
        file[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 2**20)
    for content in (head.getvalue(), bytes(file)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=r"1000000|1048576"):
            read_image(os.fsencode(tmp_path / "x"), PixelOptions(1))


@pytest.mark.parametrize(
    "words",
    ["auto 3", "full 0 1", "percentile 5", "percentile 50 101", "9 3", "1 2 3", "1 auto", "percentile auto 3", "nan 1"],
)
def test_refuses_malformed_value_ranges(words, capsys):
    import main_pretrain

    with pytest.raises(SystemExit):
        main_pretrain.get_parser().parse_args(["--data_path", "x", "--value_range", *words.split()])
    assert "--value_range" in capsys.readouterr().err


def test_bands_and_ranges_must_fit_the_channels():
    with pytest.raises(ValueError, match="--bands 1 2: 2 bands for --in_chans 3"):
        PixelOptions.from_args(Namespace(in_chans=3, bands=[1, 2]))
    with pytest.raises(ValueError, match="--value_range: 4 numbers for --in_chans 3"):
        PixelOptions.from_args(Namespace(in_chans=3, value_range=[0, 1, 0, 1]))


# -------------------------------------------------------------------------------------------------------------- tiles


def test_tiles_of_a_cache_are_the_parts_of_the_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    write(
        tmp_path / "images",
        pillow(Image.fromarray(pixels), "PNG"),
        pillow(Image.new("RGB", (32, 32)), "PNG"),
        name="{}.png",
    )
    words = ["--data_path", tmp_path / "images", "--input_size", 32, "--workers", 0, "--tile", 32]
    call("util.cache", "build", *words, "--out", tmp_path / "cache")
    packed = Cache(tmp_path / "cache")
    assert len(packed) == 2 * 3 + 1
    options = PixelOptions(3)
    for i, (top, left) in enumerate([(0, 0), (0, 32), (0, 64), (32, 0), (32, 32), (32, 64)]):
        assert np.array_equal(packed.read(i, options), pixels[top : top + 32, left : left + 32])
        assert packed.name(i) == f"tile at row {top}, column {left} of image 0 of {tmp_path}/cache"
    assert packed.read(6, options).max() == 0
    with pytest.raises(ValueError, match="tile"):
        call("util.cache", "build", *words[:-1], 16, "--out", tmp_path / "cache")


def test_error_of_a_too_large_image_names_the_tile_flag(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"20000 x 20000.*--tile"):
        read_image(os.fsencode(tmp_path / "x.png"), PixelOptions(1))


# -------------------------------------------------------------------------------------------------- real microscopy


@pytest.mark.slow
def test_nuclei_in_other_file_formats_have_the_features_of_the_png(tmp_path):
    folder = ROOT.parent / "shared" / "data" / "nuclei" / "val" / "images"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/nuclei")
    for n, path in enumerate(sorted(folder.iterdir())[:8]):
        pixels = np.asarray(Image.open(path).convert("L"))
        twelve = np.round(pixels / 255 * 4095).astype(U16)
        Image.fromarray(pixels).save(write(tmp_path / "png") / f"{n}.png")
        tifffile.imwrite(write(tmp_path / "twelve") / f"{n}.tif", twelve)
        tifffile.imwrite(write(tmp_path / "float") / f"{n}.tif", (pixels / 255).astype(np.float32))
        tifffile.imwrite(write(tmp_path / "two") / f"{n}.tif", np.stack([twelve, 4095 - twelve]))
    rows = {}
    for name, flags in (("png", []), ("twelve", []), ("float", []), ("two", ["--bands", 1])):
        words = ["--checkpoint", "none", *MODEL, *DEVICE, "--data_path", tmp_path / name, *flags]
        result("main_features", *words, "--output", tmp_path / f"{name}.npy")
        rows[name] = np.load(tmp_path / f"{name}.npy")
        for n in range(8):
            args = resolve_pixels(Namespace(in_chans=3, bands=flags[1:]), image_folder(str(tmp_path / name)))
            (image,) = read_image(image_folder(str(tmp_path / name)).paths[n], PixelOptions.from_args(args))
            assert (
                np.abs(
                    np.asarray(image).astype(int) - np.asarray(Image.open(tmp_path / "png" / f"{n}.png"))[..., None]
                ).max()
                <= 1
            )
    for name, found in rows.items():
        assert np.allclose(found, rows["png"], atol=0.02 * np.abs(rows["png"]).max()), name  # one grey level


def test_a_run_ends_with_a_one_line_error(tmp_path):
    write(tmp_path, tiff(np.moveaxis(FIVE, 2, 0).astype(U8)))
    words = [*PRETRAIN, "--data_path", tmp_path, "--output_dir", tmp_path / "out", "--batch_size", 1]
    done = subprocess.run(
        [sys.executable, "main_pretrain.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.match(rf"main_pretrain\.py: error: {tmp_path}/0\.tif .*5 bands", done.stderr.splitlines()[-1])
