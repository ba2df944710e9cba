"""The command line: recipes, ranges, help, and the one line that a mistake deserves."""

import importlib

import pytest
from conftest import ended, spawn

import main_pretrain
from util.args import IMAGENET_MEAN, IMAGENET_STD, channel_statistics, expand, report_mistakes

MAINS = ["main_pretrain", "main_knn", "main_linprobe", "main_finetune", "visualize"]


def parse(*words: str):
    return main_pretrain.get_parser().parse_args(["--data_path", "x", *words])


# ------------------------------------------------------------------------------------------------------------- recipes


def test_recipes_hold_the_words_of_the_command_line_and_comments(tmp_path):
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


def test_recipes_are_included_relative_to_their_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.args").write_text("@sub/b.args\n--epochs 3")
    (tmp_path / "sub" / "b.args").write_text("@../c.args\n--blr 1")
    (tmp_path / "c.args").write_text("--epochs 1")
    assert expand([f"@{tmp_path}/a.args"]) == ["--epochs", "1", "--blr", "1", "--epochs", "3"]


def test_later_flags_win(tmp_path):
    (tmp_path / "a.args").write_text("--epochs 3 --crop rrc")
    assert parse("--epochs", "9", f"@{tmp_path}/a.args").epochs == 3
    args = parse(f"@{tmp_path}/a.args", "--epochs", "9")
    assert (args.epochs, args.crop) == (9, "rrc")


def test_a_missing_recipe_is_named(tmp_path):
    (tmp_path / "a.args").write_text("@gone.args")
    with pytest.raises(
        ValueError, match=f"@gone.args: there is no recipe {tmp_path}/gone.args; `ls recipes` lists ours"
    ):
        parse(f"@{tmp_path}/a.args")


def test_a_recipe_that_includes_itself_or_is_none_is_named(tmp_path):
    (tmp_path / "a.args").write_text("@b.args")
    (tmp_path / "b.args").write_text("@a.args")
    with pytest.raises(ValueError, match=r"a\.args includes itself"):
        parse(f"@{tmp_path}/a.args")
    (tmp_path / "a.args").write_text("--output_dir 'open")
    with pytest.raises(ValueError, match=r"a\.args is no recipe: No closing quotation"):
        parse(f"@{tmp_path}/a.args")
    (tmp_path / "a.args").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.args is no recipe: .*decode"):
        parse(f"@{tmp_path}/a.args")


# -------------------------------------------------------------------------------------------------------------- values


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
def test_a_value_out_of_range_ends_with_status_2_and_names_the_flag(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        parse(flag, *value.split())
    assert end.value.code == 2
    assert f"{flag}" in capsys.readouterr().err.splitlines()[-1]


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        parse("--epoch", "3")
    assert "--epoch" in capsys.readouterr().err


def test_input_size_takes_one_number_or_two():
    assert parse().input_size == (224, 224)
    assert parse("--input_size", "64").input_size == (64, 64)
    assert parse("--input_size", "64", "96").input_size == (64, 96)


def test_channel_statistics_are_imagenet_s_for_three_channels_and_asked_for_otherwise():
    assert channel_statistics(3, None, None) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_statistics(3, [0, 0, 0], None) == ((0, 0, 0), IMAGENET_STD)
    assert channel_statistics(1, [0.4], [0.3]) == ((0.4,), (0.3,))
    with pytest.raises(ValueError, match="--in_chans 5 needs 5 values of --mean, not 0"):
        channel_statistics(5, None, None)
    with pytest.raises(ValueError, match="--in_chans 2 needs 2 values of --std, not 3"):
        channel_statistics(2, [0, 0], [1, 1, 1])


def test_the_defaults_are_the_paper_s_300_epochs_on_8_devices():
    args = parse()
    assert args.batch_size * args.accum_iter * 8 == 4096  # reference.md section 4
    assert args.blr * 4096 / 256 == pytest.approx(2.4e-3)
    assert (args.model, args.epochs, args.warmup_epochs, args.weight_decay) == ("vit_base", 300, 40, 0.05)
    assert (args.decoder_dim, args.decoder_depth, args.decoder_heads) == (512, 8, 16)
    assert (args.mask_ratio, args.norm_pix_loss, args.lowpass, args.crop) == (0.75, True, "reference", "src")


# ---------------------------------------------------------------------------------------------------- help and mistakes


@pytest.mark.parametrize("name", MAINS)
def test_help_explains_every_flag_and_prints_its_default(name, capsys):
    parser = importlib.import_module(name).get_parser()
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings[0] not in ("-h", "--help") and not action.required:
            assert f"(default: {parser.get_default(action.dest)})" in text
    assert "@FILE reads flags from a recipe; later flags win." in text


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FloatingPointError])
def test_a_mistake_is_one_line_and_status_1(error, monkeypatch):
    def main():
        raise error("--flag 3 is too much")

    monkeypatch.setattr("sys.argv", ["/somewhere/main_x.py"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        report_mistakes(main)
    assert end.value.code == "main_x.py: error: --flag 3 is too much"  # Python prints it and exits with 1
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match=r"^main_x\.py \(rank 3\): error: "):
        report_mistakes(main)
    monkeypatch.setenv("PIXMIM_DEBUG", "1")
    with pytest.raises(error):
        report_mistakes(main)


def test_our_own_slips_keep_their_traceback():
    def main():
        raise AssertionError("the encoder changed")

    with pytest.raises(AssertionError):
        report_mistakes(main)


def test_an_interrupted_main_exits_with_130():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        report_mistakes(main)
    assert end.value.code == 130


def test_pixmim_debug_shows_where_a_real_main_failed(tmp_path):
    words = ["main_knn.py", "--checkpoint", tmp_path / "x.pth", "--data_path", tmp_path]
    plain, debug = [spawn(*words, PIXMIM_DEBUG=value) for value in ("", "1")]
    status, out, err = ended(plain)
    assert (status, out, err) == (1, "", f"main_knn.py: error: {tmp_path}/x.pth: no such file\n")
    status, _, err = ended(debug)
    assert status == 1
    assert err.startswith("Traceback")
