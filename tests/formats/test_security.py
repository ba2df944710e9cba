"""Malicious files: no code in them is executed, no file outside their folder is read or written. Open sockets."""

import io
import os
import re
import shutil
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, PRETRAIN, call, ended, files, free_ports, pretrain, records, spawn

from util.checkpoint.state import read_checkpoint, write_checkpoint
from util.data.archives import Archives, scan_archive
from util.data.decode import read_image
from util.data.pixels import PixelOptions
from util.formats.read import read_weights

REFUSAL = "(refused|readable)"


class Malicious:
    """Unpickling it executes a command."""

    def __init__(self, executed: Path):
        self.executed = executed

    def __reduce__(self):
        return os.system, (f"touch {self.executed}",)


@pytest.fixture
def executed(tmp_path) -> Path:
    """File that exists once the code of a malicious file was executed."""
    return tmp_path / "executed"


# ------------------------------------------------------------------------------------------------------------- pickles


@pytest.fixture(params=[True, False], ids=["zip", "old"])
def malicious(request, pretrained, executed, tmp_path) -> Path:
    """A malicious checkpoint, derived from one of ours; the control below shows that it works."""
    content = torch.load(pretrained / "last.pth", weights_only=True) | {"args": Malicious(executed)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=request.param)
    return tmp_path / "evil.pth"


def test_the_malicious_checkpoint_executes_code_if_unpickled(malicious, executed):
    torch.load(malicious, weights_only=False)
    assert executed.exists()


@pytest.mark.parametrize(
    "name", ["main_knn", "main_linprobe", "main_finetune", "main_features", "visualize", "util.convert"]
)
def test_every_main_refuses_a_malicious_checkpoint(name, malicious, executed, photos, tmp_path):
    words = ["--checkpoint", malicious, "--data_path", photos, *DEVICE]
    words = {
        "main_features": [*words, "--output", tmp_path / "x.npy"],
        "visualize": ["--checkpoint", malicious, "--images", photos, "--output", tmp_path / "x.png"],
        "util.convert": [malicious, tmp_path / "x.pth"],
    }.get(name, words)
    with pytest.raises(ValueError, match=rf"evil\.pth .*{REFUSAL}"):
        call(name, *words)
    assert not executed.exists()


def test_eval_and_resume_refuse_a_malicious_checkpoint(malicious, executed, photos, tmp_path):
    words = ["--data_path", photos, "--output_dir", tmp_path / "run", "--batch_size", "8"]
    with pytest.raises(ValueError, match=rf"evil\.pth .*{REFUSAL}"):
        call("main_finetune", *words, *DEVICE, "--checkpoint", malicious, "--eval")
    with pytest.raises(ValueError, match=r"--resume .*evil\.pth .*weights"):
        call("main_pretrain", *words, *PRETRAIN, "--resume", malicious)
    assert not executed.exists()


def test_resume_skips_a_malicious_last_pth(malicious, executed, pretrained, photos, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "run")
    shutil.copy(malicious, folder / "last.pth")
    pretrain(photos, folder, "--save_every", 1, "--image_every", 1)
    assert not executed.exists()
    assert (folder / "last.pth.damaged").read_bytes() == malicious.read_bytes()
    assert [x["epoch"] for x in records(folder)] == [0.5, 1, 1.5, 2]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_malicious_weights_in_a_folder_are_refused(name, malicious, executed, tmp_path):
    (tmp_path / "hub").mkdir()
    shutil.copy(malicious, tmp_path / "hub" / name)
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "vit", "auto_map": {"AutoModel": "evil.Model"}}')
    (tmp_path / "hub" / "evil.py").write_text(f"import os; os.system('touch {executed}')")
    with pytest.raises(ValueError, match=rf"{name} .*{REFUSAL}"):
        call("util.convert", tmp_path / "hub", tmp_path / "x.pth")
    assert not executed.exists()


# -------------------------------------------------------------------------------------------------------------- images


def malicious_array(executed: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Malicious(executed)], object), allow_pickle=True)
    return file.getvalue()


def test_pickled_arrays_are_refused_in_folders_and_tars(executed, tmp_path):
    (tmp_path / "x.npy").write_bytes(malicious_array(executed))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x.npy", "x.npy")
    for read in (
        lambda: read_image(os.fsencode(tmp_path / "x.npy"), PixelOptions(3)),
        lambda: Archives([tmp_path / "x.tar"]).read(0, PixelOptions(3)),
    ):
        with pytest.raises(ValueError, match="allow_pickle=False"):
            read()
    assert not executed.exists()
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert executed.exists()  # control


def test_postscript_named_jpg_is_not_executed(executed, tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {executed}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # cached by Pillow
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.jpg").write_bytes(eps)
    with pytest.raises(OSError, match="cannot identify"):
        read_image(os.fsencode(tmp_path / "x.jpg"), PixelOptions(3))
    assert not executed.exists()
    from PIL import Image

    with pytest.raises(OSError, match=r".*"), Image.open(tmp_path / "x.jpg") as image:
        image.load()
    assert executed.exists()  # control: Pillow by itself runs it


# ---------------------------------------------------------------------------------------------------------------- tars


@pytest.fixture
def escaping(photos, tmp_path) -> Path:
    """A folder with a shard whose members have paths outside of it, links and pipes."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "secret.png").write_bytes(next((photos / "train" / "ant").glob("*.png")).read_bytes())
    image = (tmp_path / "secret.png").read_bytes()
    with tarfile.open(tmp_path / "shards" / "x.tar", "w") as tar:
        for name in ("../escaped.png", f"{tmp_path}/escaped.png", "fine.png"):
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(member)
    return tmp_path / "shards"


def test_tar_members_are_not_extracted_and_links_not_followed(escaping, tmp_path, pretrained):
    before = set(files(tmp_path))
    source = Archives([escaping / "x.tar"])
    assert [len(source.read(i, PixelOptions(3))) for i in range(len(source))] == [
        1,
        1,
        1,
    ]  # without the links and the pipe
    call(
        "main_features",
        "--checkpoint",
        pretrained / "last.pth",
        "--data_path",
        escaping,
        *DEVICE,
        "--output",
        escaping / "f.npy",
    )
    written = {path.relative_to(tmp_path).parts[0] for path in set(files(tmp_path)) - before}
    assert written == {"shards"}


def test_a_shard_index_is_not_unpickled_and_cannot_point_outside_the_shard(escaping, executed):
    status = (escaping / "x.tar").stat()
    state = [[status.st_size, status.st_mtime_ns]]
    scan = scan_archive(escaping / "x.tar")
    known = {"states": state, "counts": [3], "names": scan.names, "left_out": ["{}"]}
    np.savez(escaping / "index.npz", shards=np.array([Malicious(executed)], object), members=scan.rows, **known)
    assert len(Archives([escaping / "x.tar"])) == 3
    assert not executed.exists()
    far = [[2**40, 100, 0, -1], [-5, 100, 0, -1], [0, 2**62, 0, -1]]
    np.savez(escaping / "index.npz", shards=["x.tar"], members=np.array(far), **known)
    for i in range(3):
        with pytest.raises((OSError, MemoryError, OverflowError, ValueError)):
            Archives([escaping / "x.tar"]).read(i, PixelOptions(3))


# -------------------------------------------------------------------------------------------------------------- sockets


def listening_sockets(pids: list[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which these processes listen."""
    held = set()
    for descriptor in (path for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # closed since it was listed
            held.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            address, port = local.split(":")
            if state == "0A" and f"socket:[{inode}]" in held:
                found.add((address, int(port, 16)))
    return found


def inspect_training(photos, folder: Path, count: int, look: Callable, **group):
    """Result of `look` at the processes of a training run, which is then stopped by SIGTERM."""
    words = [
        "main_pretrain.py",
        *PRETRAIN,
        "--data_path",
        photos,
        "--output_dir",
        folder,
        "--batch_size",
        "4",
        "--epochs",
        "500",
    ]
    spawned = [spawn(*words, **(group | ({"RANK": r, "LOCAL_RANK": r} if group else {}))) for r in range(count)]
    until = time.monotonic() + 100
    while not ((folder / "log.jsonl").exists() and records(folder)):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in spawned)
        time.sleep(0.1)
    seen = look([process.pid for process in spawned])
    spawned[0].send_signal(signal.SIGTERM)
    assert [ended(process)[0] for process in spawned] == [75] * count
    return seen


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")
def test_a_single_process_opens_no_listening_socket(photos, tmp_path):
    assert inspect_training(photos, tmp_path / "run", 1, listening_sockets) == set()


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")
def test_ranks_listen_on_the_master_port_and_the_loopback_interface_only(photos, tmp_path):
    (port,) = free_ports(1)
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    seen = inspect_training(photos, tmp_path / "run", 2, listening_sockets, **group)
    assert port in {number for _, number in seen}
    others = {address for address, number in seen if number != port}
    assert all(re.fullmatch(r"0100007F|0{24}01000000|0{16}FFFF00000100007F", address) for address in others), seen


# --------------------------------------------------------------------------------------- settings, names, inflating files


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "vit_of_a_fork"), ("model", 3), ("patch_size", 0), ("patch_size", "x"), ("patch_size", [1, "y"]), ("mean", -1),
        ("std", True), ("mask_unit", 0), ("mask_ratio", float("nan")), ("lowpass_radius", 10**12), ("crop_pct", -1),
        ("decoder_heads", 1.5), ("input_size", "wide"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("main", ["main_knn", "visualize"])
def test_invalid_settings_in_a_checkpoint_are_refused_or_not_needed(main, name, value, pretrained, photos, tmp_path):
    content = read_checkpoint(pretrained / "last.pth")
    args = content["args"] | {name: value}
    write_checkpoint(tmp_path / "x.pth", {"model": content["model"], "args": args, "progress": content["progress"]})
    words = (
        ["--data_path", photos] if main == "main_knn" else ["--images", photos / "val", "--output", tmp_path / "x.png"]
    )
    command = [*words, "--checkpoint", tmp_path / "x.pth", *(DEVICE if main == "main_knn" else DEVICE[4:])]
    if name == "input_size":  # the position embedding tells it
        assert call(main, *command)
        return
    with pytest.raises(ValueError, match=rf"x\.pth.*{name}") as error:
        call(main, *command)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_a_zip_bomb_is_refused_before_it_is_read(pretrained, tmp_path):
    with zipfile.ZipFile(pretrained / "last.pth") as old, zipfile.ZipFile(tmp_path / "x.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/data/bomb", bytes(10**7), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pth").stat().st_size < 10**7
    with pytest.raises(ValueError, match=r"x\.pth .*larger"):
        read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth .*readable"):
        read_weights(tmp_path / "x.pth")


TITLE = "\x1b]0;owned\x07"  # sets the title of a terminal


def test_control_characters_in_names_are_escaped(pretrained, photos, tmp_path):
    """A tensor and an image whose names hold control characters and a forged last line."""
    forged = f"a{TITLE}\nmain_knn.py: all fine"
    content = read_checkpoint(pretrained / "last.pth")
    torch.save({"model": content["model"] | {forged: torch.ones(1)}}, tmp_path / "x.pth")
    status, out, err = ended(spawn("main_knn.py", "--checkpoint", tmp_path / "x.pth", "--data_path", photos, *DEVICE))
    assert status == 1
    assert r"a\x1b]0;owned\x07\nmain_knn.py: all fine" in err.splitlines()[-1]
    assert not set("\x1b\x07") & set(out + err)
    shutil.copytree(photos, tmp_path / "photos")
    (next((tmp_path / "photos" / "train").iterdir()) / f"{forged}.png").write_bytes(b"no image")
    (next((tmp_path / "photos" / "train").iterdir()) / f"{forged}.txt").touch()
    words = ["--checkpoint", pretrained / "last.pth", "--data_path", tmp_path / "photos", *DEVICE]
    for more in ([], ["--on_bad_image", "skip"], ["--verbose_data"]):
        _, out, err = ended(spawn("main_knn.py", *words, *more))
        assert not set("\x1b\x07") & set(out + err)
        assert r"owned\x07\nmain_knn.py" in out + err
        assert "main_knn.py: all fine" not in (out + err).splitlines()
    words = [
        "--data_path",
        tmp_path / "photos",
        "--output_dir",
        tmp_path / "run",
        *PRETRAIN,
        "--batch_size",
        4,
        "--on_bad_image",
        "skip",
    ]
    status, out, err = ended(spawn("main_pretrain.py", *words))
    assert status == 0, err
    assert not set("\x1b\x07") & set(out + err)
