"""Files whose values are not 8-bit colours: TIFF, 16-bit PNG and PGM, NumPy, DICOM; formats of optional packages."""

import re
from contextlib import nullcontext
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from util.data.pixels import PixelOptions, RawImage, range_of_type
from util.files import import_package

GEOTIFF = (34735, 33550)  # GeoKeyDirectory, ModelPixelScale
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def turn_upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Values (H, W, C) as an EXIF or TIFF orientation from 1 to 8 says."""
    values = values.swapaxes(0, 1) if orientation >= 5 else values
    return values[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def channel_axis(shape: tuple[int, ...], options: PixelOptions) -> int:
    """-1 for (H, W, C), 0 for (C, H, W): the axis that has --in_chans entries, else the one unlike the other two, else the shorter."""
    first, middle, last = shape
    if not options.bands and options.in_chans in (first, last):
        return -1 if last == options.in_chans else 0
    if (first == middle) != (middle == last):
        return -1 if first == middle else 0
    if min(first, last) > 64:
        orders = "(height, width, channels) or (channels, height, width)"
        raise ValueError(f"has the axes {shape}: {orders}? Save fewer channels")
    return -1 if last <= first else 0


def with_channels(values: np.ndarray, options: PixelOptions) -> np.ndarray:
    """Array of two or three axes -> (H, W, C)."""
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"holds {values.dtype} {values.shape}, not (height, width) with channels first or last")
    return np.moveaxis(values, channel_axis(values.shape, options), -1) if values.ndim == 3 else values[..., None]


def declared_range(tags: Any) -> tuple[float, float] | None:
    """(0, largest possible value) of a TIFF with fewer bits than its type: by its tags, or OME's SignificantBits."""
    bits, most, text = (tags.get(code) for code in (258, 281, 270))
    bits, most = (value[0] if isinstance(value, tuple) else value for value in (bits, most))
    found = re.search(r'SignificantBits="(\d\d?)"', text) if isinstance(text, str) else None
    if found or (bits and 8 < bits < 16):
        return 0, 2 ** int(found[1] if found else bits) - 1
    return (0, 2 ** int(most).bit_length() - 1) if most and 255 < most < 65535 else None


def read_tiff(file: str | BytesIO, options: PixelOptions) -> RawImage:
    """All samples and pages of a TIFF that Pillow does not read in full."""
    what = "is a TIFF of several bands or pages, or of an uncommon type of number, which"
    tifffile = import_package("tifffile", what)
    with tifffile.TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.series[0].keyframe
        # overviews and masks, as GDAL adds them, do not count as images
        others = [x.shape for x in tiff.series[1:] if not (x.keyframe.is_reduced or x.keyframe.is_mask)]
        if others:
            raise ValueError(f"holds images of sizes {series.shape} and {others[0]}; save one in its own file")
        if page.photometric not in (0, 1, 2):
            raise ValueError(f"is a TIFF of several pages or bands as {page.photometric!s}; convert it to RGB or grey")
        options.check_size(series.shape, series.dtype.itemsize)
        try:
            values = series.asarray(maxworkers=1)
        except ValueError as error:
            remedy = ": pip install imagecodecs" if "imagecodecs" in str(error) else ""
            raise ValueError(f"{error}{remedy}") from error
        if set(series.axes) & set("QI") or not {*"YX"} <= set(series.axes):  # axes unknown to tifffile
            values = with_channels(values, options)
        else:
            order = [series.axes.index(axis) for axis in "YX"]
            values = values.transpose(*order, *(i for i in range(values.ndim) if i not in order))
            values = values.reshape(*values.shape[:2], -1)
        tags = {tag.code: tag.value for tag in page.tags}
        alpha, extra = "", page.extrasamples
        if len(extra) == 1 and values.shape[2] == page.samplesperpixel:
            alpha = "tiff" if extra[0] in (1, 2) and not any(tag in tags for tag in GEOTIFF) else "band"
    colour = page.photometric == 2 and values.shape[2] == 3 + bool(alpha)
    values = turn_upright(values, tags.get(274, 1))
    return RawImage(values, colour, alpha, declared_range(tags), page.photometric == 0 and values.dtype != np.bool_)


def pillow_reads_all(image: Any) -> bool:
    """Whether Pillow reads all pages and samples of this TIFF, with their values."""
    tags, bands = image.tag_v2, len(image.getbands())
    bits, samples = tags.get(258, (1,)), tags.get(277, 1)
    if image.n_frames > 1 or samples != bands or (samples > 1 and tags.get(284, 1) != 1):
        return False
    exact = image.mode[0] in "IF" and not (bits[0] == 32 and tags.get(339, (1,))[0] == 1)  # no unsigned 32 bits
    return exact or (max(bits) <= 8 and tags.get(339, (1,))[0] != 2)  # no int8


def png_range(file: Any) -> tuple[float, float] | None:
    """(0, largest value) of the significant bits that a PNG declares (sBIT)."""
    position, depth = file.tell(), 0
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        content = file.read(min(int.from_bytes(head[:4]), 4))
        depth = max(content) if head[4:] == b"sBIT" and content else depth
        file.seek(int.from_bytes(head[:4]) - len(content) + 4, 1)
    file.seek(position)
    return (0, 2**depth - 1) if depth else None


# Raw modes by which Pillow returns the high and the low bytes of a 16-bit PNG, or both as channels in turn
PNG_BYTES = {"RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L"), "LA;16B": ("RGBA",)}


def read_png(image: Any, file: str | BytesIO) -> RawImage:
    """16-bit PNG of several channels, which Pillow reduces to 8 bits."""
    declared, halves = png_range(image.fp), []
    for mode in PNG_BYTES[image.tile[0][3]]:
        with Image.open(file, formats=["PNG"]) as part:
            part.tile = [(*part.tile[0][:3], mode)]  # type: ignore[list-item]
            part.load()
            ImageOps.exif_transpose(part, in_place=True)
            halves.append(np.asarray(part).astype(np.uint16))
    high, low = halves if len(halves) > 1 else (halves[0][..., ::2], halves[0][..., 1::2])
    count = high.shape[2]
    return RawImage(high * 256 + low, count > 2, "" if count == 3 else "alpha", declared)


def read_values(image: Any, file: str | BytesIO, options: PixelOptions) -> RawImage | None:
    """Values of an image that Pillow has opened but would not read exactly; None for 8-bit colours."""
    tags, mode = getattr(image, "tag_v2", {}), image.tile[0][3] if image.tile else ""
    if image.format == "TIFF" and not pillow_reads_all(image):
        return read_tiff(file, options)
    if image.format == "PNG" and mode in PNG_BYTES:
        return read_png(image, file)
    if image.mode[0] not in "IF":
        return None
    declared, maxval = declared_range(tags), 65535
    if image.format == "PNG":
        declared = png_range(image.fp)
    elif image.format == "PPM" and image.mode == "I" and isinstance(mode, tuple):
        declared, maxval = (0, mode[1]), mode[1]
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    values = np.atleast_3d(np.asarray(image))
    if maxval != 65535:  # Pillow has scaled the values to 16 bits
        values = (values * maxval + 32767) // 65535
    return RawImage(values, declared=declared, inverted=tags.get(262) == 0)


def read_npy(file: Any, options: PixelOptions) -> RawImage:
    """An array of numbers, (H, W), (H, W, C) or (C, H, W). Pickled objects are refused."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    options.check_size(shape, dtype.itemsize)
    file.seek(0)
    return RawImage(with_channels(np.load(file, allow_pickle=False), options))


def read_dicom(file: Any, options: PixelOptions) -> RawImage:
    """Frames of a DICOM file, rescaled to its units (CT: Hounsfield units)."""
    pydicom, pixels = (import_package(name, "is a DICOM file, which") for name in ("pydicom", "pydicom.pixels"))
    dataset = pydicom.dcmread(file)
    frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
    options.check_size((frames, dataset.Rows, dataset.Columns, samples), dataset.BitsAllocated // 8)
    values = dataset.pixel_array
    values = np.moveaxis(values, 0, 2) if frames > 1 else np.atleast_3d(values)
    values = values.reshape(*values.shape[:2], -1)
    declared = None
    if values.dtype != np.uint8 or "RescaleSlope" in dataset:
        least, most = (0, 1) if values.dtype.kind == "f" else range_of_type(values.dtype)
        shift = dataset.BitsAllocated - dataset.BitsStored
        ends = np.array([least / 2**shift, (most + 1) / 2**shift - 1]).reshape(1, 2)
        declared = tuple(sorted(pixels.apply_modality_lut(ends, dataset).ravel().tolist()))
        values = pixels.apply_modality_lut(values, dataset).astype(np.float32)
    return RawImage(values, samples == 3, "", declared, dataset.get("PhotometricInterpretation") == "MONOCHROME1")


def read_foreign(file: str | BytesIO, options: PixelOptions, error: Exception) -> RawImage | Image.Image:
    """Values of, or image in, a file that is in none of the usual formats, by its first bytes; else `error` is raised."""
    given: Any = nullcontext(file) if isinstance(file, BytesIO) else open(file, "rb")  # noqa: SIM115  closed by `with`
    with given as opened:
        opened.seek(0)
        head = opened.read(132)
        opened.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return read_npy(opened, options)
        if head[128:] == b"DICM":
            return read_dicom(opened, options)
    if head.startswith(TIFF):
        return read_tiff(file, options)
    if head[4:8] == b"ftyp" and head[8:12] in HEIF:
        import_package("pillow_heif", "is HEIC, which", "pillow-heif").register_heif_opener()
        return Image.open(file, formats=["HEIF"])
    raise error
