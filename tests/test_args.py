"""Command line: recipes, value ranges, help and one-line errors."""

import argparse
import errno
import re
import shutil
import sys
from argparse import Namespace

import pytest
from conftest import DEVICE, PRETRAIN, ROOT, call, ended, files, parsers_of, spawn

import main_pretrain
from util.args import IMAGENET_MEAN, IMAGENET_STD, channel_statistics, expand, resolve_defaults, run_main
from util.run import split_effective_batch

PARSERS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted({*ROOT.glob("*.py"), *(ROOT / "util").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")})
    if "def get_parser" in path.read_text()
]


def parse(*words: str):
    return main_pretrain.get_parser().parse_args(["--data_path", "x", *words])


# -------------------------------------------------------------------------------------------------------------- recipes


def test_recipes_contain_flags_and_comments(tmp_path):
    (tmp_path / "a.args").write_text(
        "# the head\n--epochs 3   # not many\n--output_dir 'two words'\n\n--norm_pix_loss\n"
    )
    assert expand([f"@{tmp_path}/a.args", "x"]) == [
        "--epochs",
        "3",
        "--output_dir",
        "two words",
        "--norm_pix_loss",
        "x",
    ]


def test_included_recipes_are_relative_to_the_including_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.args").write_text("@sub/b.args\n--epochs 3")
    (tmp_path / "sub" / "b.args").write_text("@../c.args\n--blr 1")
    (tmp_path / "c.args").write_text("--epochs 1")
    assert expand([f"@{tmp_path}/a.args"]) == ["--epochs", "1", "--blr", "1", "--epochs", "3"]


def test_later_flags_override_earlier_ones(tmp_path):
    (tmp_path / "a.args").write_text("--epochs 3 --crop rrc")
    assert parse("--epochs", "9", f"@{tmp_path}/a.args").epochs == 3
    args = parse(f"@{tmp_path}/a.args", "--epochs", "9")
    assert (args.epochs, args.crop) == (9, "rrc")


def test_error_names_the_missing_recipe(tmp_path):
    (tmp_path / "a.args").write_text("@gone.args")
    with pytest.raises(ValueError, match=f"@gone.args: .*{tmp_path}/gone.args"):
        parse(f"@{tmp_path}/a.args")


def test_error_names_a_recursive_or_unreadable_recipe(tmp_path):
    (tmp_path / "a.args").write_text("@b.args")
    (tmp_path / "b.args").write_text("@a.args")
    with pytest.raises(ValueError, match=r"a\.args .*itself"):
        parse(f"@{tmp_path}/a.args")
    (tmp_path / "a.args").write_text("--output_dir 'open")
    with pytest.raises(ValueError, match=r"a\.args .*closing quotation"):
        parse(f"@{tmp_path}/a.args")
    (tmp_path / "a.args").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.args .*decode"):
        parse(f"@{tmp_path}/a.args")


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--mask_ratio", "1.5"),
        ("--mask_ratio", "-0.1"),
        ("--mask_ratio", "nan"),
        ("--lowpass_radius", "-1"),
        ("--epochs", "0"),
        ("--batch_size", "2.5"),
        ("--warmup_epochs", "-1"),
        ("--blr", "fast"),
        ("--input_size", "1 2 3"),
        ("--input_size", "0"),
        ("--std", "0"),
        ("--amp", "half"),
        ("--crop", "center"),
        ("--seed", "-1"),
    ],
)
def test_values_out_of_range_exit_with_status_2_and_name_the_flag(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        parse(flag, *value.split())
    assert end.value.code == 2
    assert f"{flag}" in capsys.readouterr().err.splitlines()[-1]


def test_abbreviated_flags_are_rejected(capsys):
    with pytest.raises(SystemExit):
        parse("--epoch", "3")
    assert "--epoch" in capsys.readouterr().err


def test_input_size_takes_one_number_or_two():
    assert resolve_defaults(parse()).input_size == (224, 224)
    assert parse("--input_size", "64").input_size == (64, 64)
    assert parse("--input_size", "64", "96").input_size == (64, 96)


def test_mean_and_std_default_to_imagenet_for_three_channels_and_are_required_otherwise():
    assert channel_statistics(3, None, None) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_statistics(3, [0, 0, 0], None) == ((0, 0, 0), IMAGENET_STD)
    assert channel_statistics(1, [0.4], [0.3]) == ((0.4,), (0.3,))
    with pytest.raises(ValueError, match=r"--mean: 0 .*--in_chans 5"):
        channel_statistics(5, None, None)
    with pytest.raises(ValueError, match=r"--std: 3 .*--in_chans 2"):
        channel_statistics(2, [0, 0], [1, 1, 1])


def test_defaults_match_the_300_epoch_setting_of_the_paper_on_8_devices():
    args = resolve_defaults(parse())
    assert args.batch_size * args.accum_iter * 8 == 4096  # arXiv:2111.06377, table 8
    assert args.blr * 4096 / 256 == pytest.approx(2.4e-3)
    assert (args.model, args.epochs, args.warmup_epochs, args.weight_decay) == ("vit_base", 300, 40, 0.05)
    assert (args.decoder_dim, args.decoder_depth, args.decoder_heads) == (512, 8, 16)
    assert (args.mask_ratio, args.norm_pix_loss, args.lowpass, args.crop) == (0.75, True, "reference", "src")


# -------------------------------------------------------------------------------------------------------- invalid flags
# They are rejected before an existing run is changed, even with --overwrite.

NUMBERS = [
    (flag, value)
    for flag in ("--blr", "--weight_decay", "--lowpass_radius", "--save_minutes")
    for value in ("nan", "inf")
]
INVALID_FLAGS = {
    "--input_size 30": "30 x 30 .*patch size 8",
    "--input_size 8": "mask ratio .*0.75 .* 0 of 1 patches",
    "--patch_size 5": "16 x 16 .*patch size 5",
    "--model convvit_tiny --patch_size 6": "--patch_size 6",
    "--mask_unit 9": "mask units of 9 .*grid",
    "--mask_ratio 0": "mask ratio .* 4 of 4 patches",
    "--mask_ratio 1": "mask ratio .* 0 of 4 patches",
    "--lowpass_radius 99": "--lowpass_radius 99 .*every.* 16 x 16 px",
    "--lowpass_radius 0.5": "--lowpass_radius 0.5 .*no .*16 x 16 px",
    "--decoder_dim 6": "width 6",
    "--decoder_heads 3": "width 32 .* 3 .*heads",
    "--fuse_layers 1": "--fuse_layers: --model vit_pico",
    "--model mff_vit_tiny --fuse_layers 99": "--fuse_layers 99",
    "--in_chans 1": "--mean: 0 .*--in_chans 1",
    "--mean 0.5": "--mean: 1 .*--in_chans 3",
    "--in_chans 4 --mean 0 0 0 0 --std 1 1 1 1": "JPG .*--in_chans 4",
    "--batch_size 17": "--batch_size 17 .* 16",
    "--batch_size 4 --accum_iter 5": "--accum_iter 5 .*20",
    "--effective_batch 17": "= 17 images",
    "--min_lr 1": "--min_lr 1 .*0.0009",
    "--amp fp16": "--amp fp16 .*cpu",
    "--device tpu": "--device tpu",
    "--device meta": "--device meta",
    "--stream_samples 4": "--stream_samples 4: .*--data_path",
    "--data_path /nowhere": "--data_path.*/nowhere",
    "--knn_every 1 --knn_path /nowhere": "/nowhere/train",
    "--resume /nowhere.pth": "--resume /nowhere.pth",
    "--resume /etc/passwd": "--resume /etc/passwd: damaged",
    "--resume auto --mask_ratio 0.5": "--mask_ratio 0.75, not 0.5",
    "--resume auto --batch_size 4": "8, not 4 .*--effective_batch 8",
    "--resume none": "--resume none: .*--overwrite",
}  # fmt: skip


@pytest.fixture(scope="module")
def existing_run(pretrained, tmp_path_factory):
    return shutil.copytree(pretrained, tmp_path_factory.mktemp("existing_run") / "run")


@pytest.mark.parametrize("words", INVALID_FLAGS)
def test_invalid_flags_are_rejected_before_an_existing_run_is_changed(words, existing_run, photos):
    sizes = ["--epochs", "2", "--batch_size", "8", "--warmup_epochs", "1", "--blr", "0.03", "--data_path", photos]
    overwrite = [] if words.startswith("--resume") else ["--resume", "none", "--overwrite"]
    before = files(existing_run)
    with pytest.raises((ValueError, OSError), match=INVALID_FLAGS[words]) as error:
        call("main_pretrain", *PRETRAIN, *sizes, *overwrite, "--output_dir", existing_run, *words.split())
    assert "\n" not in str(error.value)
    assert files(existing_run) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--knn_every", "15"], r"--knn_every 15 .*{0}/train;.*--knn_every 0"),
        (["--knn_every", "15", "--knn_path", "{0}/none"], r"--knn_every 15 .*{0}/none/train;.*--knn_every 0"),
    ],
)
def test_a_flat_folder_is_refused_by_the_flag_that_needs_classes(words, message, photos, tmp_path):
    shutil.copytree(photos / "train" / "ant", tmp_path / "flat")
    folder = str(tmp_path / "flat")
    flags = [word.format(folder) for word in words]
    with pytest.raises(ValueError, match=message.format(folder)) as error:
        call("main_pretrain", *PRETRAIN, "--data_path", folder, "--output_dir", tmp_path / "out", *flags)
    assert "\n" not in str(error.value)


def test_the_recipe_for_own_photographs_trains_on_a_flat_folder(photos, tmp_path):
    shutil.copytree(photos / "train" / "ant", tmp_path / "flat")
    tiny = [*PRETRAIN, "--batch_size", 4, "--epochs", 1, "--lowpass_radius", 4, "--output_dir", tmp_path / "out"]
    command = re.search(
        r"main_pretrain\.py (@\S+) --data_path my_photos$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert command
    lines = call("main_pretrain", command[1], "--data_path", tmp_path / "flat", *tiny)
    assert lines[-1] == f"1 epochs finished: {tmp_path}/out/last.pth"


@pytest.mark.parametrize(
    "words",
    [["--output_dir", ""], ["--output_dir="], ["--data_path", "a", ""], ["--output_dir", "", "--output_dir", "x"]],
)
def test_an_empty_flag_value_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        main_pretrain.get_parser().parse_args(words)
    assert re.search(rf"argument {words[0].rstrip('=')}: .*empty", capsys.readouterr().err.splitlines()[-1])


INVALID_EVALUATIONS = {
    "main_linprobe --checkpoint none": "--checkpoint none .*--model",
    "main_linprobe --in_chans 1 --mean 0.5 --std 0.5": "--in_chans 1: .*last.pth has 3",
    "main_linprobe --eval": "--eval: --checkpoint .*last.pth .*classifier",
    "main_finetune --model vit_base": "last.pth.*--model vit_base: .*shape",
    "main_finetune --aa none-such": "--aa none-such",
    "main_finetune --aa rand-m9-foo": "--aa rand-m9-foo: .*foo .*number",
    "main_finetune --batch_size 3": "--batch_size 3: .*mixup",
    "main_finetune --effective_batch 5": "--batch_size 1: .*mixup",
    "main_knn --data_path /nowhere": "/nowhere/train",
    "main_features --output x.txt": "--output x.txt.*.npy or .safetensors",
}


@pytest.mark.parametrize("words", INVALID_EVALUATIONS)
def test_invalid_evaluation_flags_are_rejected(words, pretrained, photos, tmp_path):
    name, *flags = words.split()
    sizes = ["--epochs", "1", "--warmup_epochs", "0", "--output_dir", tmp_path]
    given = ["--checkpoint", pretrained / "last.pth", "--data_path", photos, "--batch_size", "4", *DEVICE]
    with pytest.raises((ValueError, OSError), match=INVALID_EVALUATIONS[words]) as error:
        call(name, *given, *(sizes if name in ("main_linprobe", "main_finetune") else []), *flags)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        *[("main_pretrain", flag, value) for flag, value in NUMBERS],
        ("main_pretrain", "--mean", "inf"),
        ("main_pretrain", "--timeout_minutes", "inf"),
        ("main_pretrain", "--epochs", "99999999999999999999"),
        ("main_pretrain", "--num_workers", "10000"),
        ("main_finetune", "--layer_decay", "0"),
        ("main_finetune", "--drop_path", "1"),
        ("main_finetune", "--mixup", "nan"),
        ("main_linprobe", "--blr", "inf"),
        ("main_knn", "--temperature", "0"),
        ("visualize", "--filter", "nan"),
        ("visualize", "--output", "picture.txt"),
        ("util.plots.curves", "--output", "picture"),
    ],
)
def test_errors_name_the_flag_and_the_invalid_value(name, flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        call(name, flag, value)
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert flag in message
    assert value in message


def test_effective_batch_must_be_divisible_by_the_number_of_ranks():
    with pytest.raises(ValueError, match=r"--effective_batch 15 .* 2 ranks"):
        split_effective_batch(15, 512, 2)


def test_warns_if_warmup_covers_all_epochs(photos, tmp_path):
    words = [
        "--data_path",
        photos,
        "--output_dir",
        tmp_path,
        "--batch_size",
        "8",
        "--epochs",
        "1",
        "--warmup_epochs",
        "2",
    ]
    lines = call("main_pretrain", *PRETRAIN, *words)
    assert any(re.match("warning: --warmup_epochs 2 .*--epochs 1", line) for line in lines)


# ------------------------------------------------------------------------------------------------------ help and errors


@pytest.mark.parametrize("name", PARSERS)
def test_help_explains_every_flag_and_prints_its_default(name, capsys):
    parsers = parsers_of(name)
    for command, parser in parsers.items():
        with pytest.raises(SystemExit) as end:
            parsers[""].parse_args([*([command] if command else []), "--help"])
        assert end.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) or "--help" in action.option_strings:
                continue
            assert action.help, action.dest
            if action.option_strings and not action.required:
                default = parser.get_default(action.dest)
                explained = default is None and action.help.count("(default: ") == 1
                assert explained or text.count(f"(default: {default})") >= 1, action.dest
        assert re.search("@FILE .*recipe", text)
        assert "(default: None)" not in text


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FloatingPointError])
def test_user_errors_print_one_line_and_exit_with_status_1(error, monkeypatch):
    def main():
        raise error("--flag 3 is too much")

    monkeypatch.setattr("sys.argv", ["/somewhere/main_x.py"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == "main_x.py: error: --flag 3 is too much"  # Python prints it and exits with 1
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match=r"^main_x\.py \(rank 3\): error: "):
        run_main(main)
    monkeypatch.setenv("PIXMIM_DEBUG", "1")
    with pytest.raises(error):
        run_main(main)


@pytest.mark.parametrize(
    "reason", ["CUDA out of memory. Tried", "[enforce fail at alloc_cpu.cpp:127] can't allocate memory"]
)
def test_out_of_memory_prints_one_line(reason, monkeypatch, capsys):
    def main():
        raise RuntimeError(reason)

    monkeypatch.setattr("util.args.exit_after_save", lambda: None)
    run_main(main)
    assert f"error: {reason}; reduce --batch_size" in capsys.readouterr().err


def test_assertion_errors_keep_their_traceback():
    def main():
        raise AssertionError("the encoder changed")

    with pytest.raises(AssertionError):
        run_main(main)


def test_keyboard_interrupt_exits_with_130():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 130


def test_pixmim_debug_prints_the_traceback_of_a_main(tmp_path):
    words = ["main_knn.py", "--checkpoint", tmp_path / "x.pth", "--data_path", tmp_path]
    plain, debug = [spawn(*words, PIXMIM_DEBUG=value) for value in ("", "1")]
    status, out, err = ended(plain)
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"main_knn\.py: error: {tmp_path}/x\.pth: .*\n", err)
    status, _, err = ended(debug)
    assert status == 1
    assert err.startswith("Traceback")


def test_recipes_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--model" in expand(["@recipes/demo.args"])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.args").write_text("--epochs 3")  # one of the current folder has priority
    assert expand(["@recipes/demo.args"]) == ["--epochs", "3"]


def test_a_byte_order_mark_of_a_recipe_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.args").write_text("--epochs 3", encoding="utf-8-sig")
    assert expand(["@a.args"]) == ["--epochs", "3"]
    (tmp_path / "b.args").write_text("--epochs 3", encoding="utf-16")
    with pytest.raises(ValueError, match=r"b\.args .*recipe"):
        expand(["@b.args"])


def test_a_recipe_that_includes_itself_through_another_path_is_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.args").write_text("@sub/../a.args")
    with pytest.raises(ValueError, match=r"a\.args .*itself"):
        expand(["@a.args"])


SCRIPT = "import sys, {first}; import main_pretrain; from util.args import run_main; run_main(main_pretrain.main)"


def run_after(first: str, *words) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of main_pretrain after these statements."""
    return ended(spawn("-c", SCRIPT.format(first=first), *PRETRAIN, "--batch_size", 8, "--epochs", 1, *words))


@pytest.mark.parametrize(("number", "name"), [(1, "stdout"), (2, "stderr")])
def test_a_closed_output_does_not_end_a_run_and_its_file_descriptor_is_not_reused(number, name, photos, tmp_path):
    first = f"os; os.close({number}); sys.{name} = None"
    status, out, err = run_after(first, "--data_path", photos, "--output_dir", tmp_path, "--warmup_epochs", 0)
    assert status == 0, err
    assert (tmp_path / "last.pth").exists()
    assert ("1 epochs finished" in out) == (name == "stderr")


def test_too_few_open_files_are_refused_before_loader_workers_hang(photos, tmp_path):
    first = "resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))"
    status, _, err = run_after(first, "--data_path", photos, "--output_dir", tmp_path, "--num_workers", 2)
    assert status == 1
    assert "24 open files" in err.splitlines()[-1]
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error."),
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: unable to allocate"
        ),
    ],
)
def test_errors_name_a_small_shared_memory(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("util.args.exit_after_save", lambda: sys.exit(1))
    for free, named in ((2**20, True), (2**33, False)):
        monkeypatch.setattr(
            "util.args.shutil.disk_usage", lambda path, free=free: Namespace(total=free, used=0, free=free)
        )
        with pytest.raises(SystemExit) as ending:
            run_main(fail)
        message = f"{ending.value.code} {capsys.readouterr().err}"
        assert bool(re.search(r"/dev/shm .*1\.0 .*1\.0 MiB", message)) == named
        assert "Caught" not in message
