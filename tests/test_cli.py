"""The command line: what it does, what it says, and how it ends."""

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, QFormat, cli
from nuqjax._src.calibration import flow
from nuqjax._src.cli import options


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint, in the folder where the commands run."""
    rng = np.random.default_rng(0)
    tensors = {"conv.weight": rng.normal(size=(32, 8, 3, 3)).astype("f4"), "conv.bias": np.zeros(32, "f4")}
    safetensors.numpy.save_file(tensors | {"head.weight": rng.normal(size=(24, 40)).astype("f2")}, tmp_path / "in.st")
    (tmp_path / "in.st").rename(tmp_path / "in.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, capsys):
    """Status, output and errors of a command, run in this process."""
    try:
        status = cli.main(shlex.split(command))
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


COMPRESS = "compress in.safetensors out.safetensors --bits 3 --method normal --output-axis 0"


def test_compress_does_what_the_function_does(folder, capsys):
    status, out, err = run(
        COMPRESS + " --granularity channel --rule 'head:bits=8,granularity=channels/4,codebook_format=fixed/8'", capsys
    )
    assert status == 0, err
    assert "conv/weight" in out
    assert "3/3 head/weight" in err  # the progress bar
    params = nuqjax.open_checkpoint("in.safetensors").read()
    rules = [nuqjax.Rule("head", bits=8, granularity=ChannelGroups(4), codebook_format=AutoQFormat(8))]
    wanted = nuqjax.compress(params, bits=3, method="normal", axis=0, granularity="channel", rules=rules)
    for x, y in zip(jax.tree.leaves(nuqjax.load("out.safetensors")), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert sorted(os.listdir()) == ["in.safetensors", "out.safetensors"]


def test_there_and_back(folder, capsys):
    assert run(COMPRESS + " --quiet --entropy-coding --max-shard-size 1KB", capsys) == (0, "", "")
    assert os.path.exists("out.safetensors.index.json")
    dense = nuqjax.decompress(nuqjax.load("out.safetensors"))
    for target in ("back.safetensors", "back.npz", "back.msgpack", "back"):
        got = run(f"decompress out.safetensors {target}", capsys)
        assert got == (0, "", ""), (target, got)
        found = nuqjax.open_checkpoint(target).read()
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, found, dense))
        status, out, _ = run(f"compare out.safetensors {target}", capsys)
        assert status == 0
        assert out.endswith("no bit differs\n")


def test_inspect_and_compare(folder, capsys):
    run(COMPRESS + " --quiet", capsys)
    status, out, _ = run("inspect out.safetensors", capsys)
    assert (status, out.rstrip("\n")) == (0, str(nuqjax.inspect("out.safetensors")))
    status, out, _ = run("inspect out.safetensors --json", capsys)
    assert json.loads(out)["total"]["nbytes_after"] == nuqjax.inspect("out.safetensors").total["nbytes_after"]
    status, out, _ = run("compare in.safetensors out.safetensors --json", capsys)
    found = {leaf["path"]: leaf for leaf in json.loads(out)["leaves"]}
    for leaf in nuqjax.inspect("out.safetensors").compressed:
        assert found[leaf.path]["sqnr_db"] == pytest.approx(leaf.sqnr_db, rel=1e-9)
        assert found[leaf.path]["largest_error"] == pytest.approx(leaf.largest_error, rel=1e-9)
    assert found["conv/bias"] | {"equal": True, "sqnr_db": None} == found["conv/bias"]
    status, out, _ = run("compare in.safetensors out.safetensors", capsys)
    assert "SQNR of all floating tensors" in out


def table_of(out):
    """The rows of a table, by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


NAN = np.float32("nan")
ALIKE = {
    # name: (A, B, equal, equal_values, nan, largest error)
    "large integers": (np.array([2**60]), np.array([2**60 + 1]), False, False, [0, 0], 1),
    "unsigned integers": (np.array([2**64 - 1], "u8"), np.array([0], "u8"), False, False, [0, 0], 2**64 - 1),
    "integers of two kinds": (np.array([2**64 - 1], "u8"), np.array([-1]), False, False, [0, 0], 2**64),
    "an integer beside a float": (np.array([2**60 + 1]), np.array([2.0**60]), False, False, [0, 0], 0.0),
    "small values": (np.array([1e-200]), np.array([5e-200]), False, False, [0, 0], 4e-200),
    "the smallest values": (np.array([5e-324]), np.array([0.0]), False, False, [0, 0], 5e-324),
    "nan on both sides": (np.array([NAN, 1]), np.array([NAN, 1]), True, True, [1, 1], 0.0),
    "nan on one side": (np.array([NAN, 1]), np.array([2, 1], "f4"), False, False, [1, 0], None),
    "nan of other bits": (np.array([NAN]), np.array([-NAN]), False, True, [1, 1], 0.0),
    "infinity": (np.array([np.inf, -np.inf]), np.array([np.inf, -np.inf]), True, True, [0, 0], 0.0),
    "infinity and its sign": (np.array([np.inf]), np.array([-np.inf]), False, False, [0, 0], None),
    "two dtypes": (np.array([0.5], "f2"), np.array([0.5]), False, True, [0, 0], 0.0),
    "the sign of zero": (np.array([0.0]), np.array([-0.0]), False, True, [0, 0], 0.0),
    "truth": (np.array([True]), np.array([False]), False, False, [0, 0], 1),
    "complex numbers": (np.array([1 + 1j]), np.array([1 + 2j]), False, False, [0, 0], 1.0),
    "nothing": (np.zeros((0, 2)), np.zeros((0, 2)), True, True, [0, 0], 0.0),
}  # fmt: skip


def test_compare_tells_bits_from_values(folder, capsys):
    for i, side in enumerate("ab"):
        np.savez(f"{side}.npz", **{name: case[i] for name, case in ALIKE.items()})
    status, out, _ = run("compare a.npz b.npz --json", capsys)
    assert status == 0
    found = {leaf["path"]: leaf for leaf in json.loads(out)["leaves"]}
    for name, (_, _, *wanted) in ALIKE.items():
        leaf = found[name]
        assert [leaf[key] for key in ("equal", "equal_values", "nan", "largest_error")] == wanted, name
        assert (leaf["sqnr_db"] is None) or math.isfinite(leaf["sqnr_db"])
    assert json.loads(out)["total"]["nan"] == [3, 2]
    rows = table_of(run("compare a.npz b.npz", capsys)[1])
    assert rows["large integers"] == ["1", "differs", "1", "0/0"]
    assert rows["nan on both sides"] == ["2", "equal", "", "1/1"]
    assert rows["nan on one side"] == ["2", "nan", "nan", "1/0"]
    assert rows["two dtypes"] == ["1", "equal values", "", "0/0"]


def test_compare_of_a_file_with_itself(folder, capsys):
    for i, side in enumerate("ab"):
        np.savez(f"{side}.npz", **{name: case[i] for name, case in ALIKE.items()})
        status, out, _ = run(f"compare {side}.npz {side}.npz", capsys)
        assert (status, out.splitlines()[-1][:14]) == (0, "no bit differs")


def test_the_total_of_compare_is_of_floating_leaves(folder, capsys):
    float_ = np.array([1.0, 100.0], "f4")
    np.savez("a.npz", w=float_, step=np.array([2**60]), tiny=np.array([1e-200]))
    np.savez("b.npz", w=float_ * np.float32(1.1), step=np.array([2**60]), tiny=np.array([1e-200]))
    status, out, _ = run("compare a.npz b.npz", capsys)
    assert (status, out.splitlines()[-1]) == (0, "SQNR of all floating tensors 20.00 dB")
    np.savez("a.npz", w=np.array([1e-200]))
    np.savez("b.npz", w=np.array([1.1e-200]))
    assert run("compare a.npz b.npz", capsys)[1].splitlines()[-1] == "SQNR of all floating tensors 20.00 dB"


# Nothing from a file is markup or control


EVIL = [
    "a[/b]",
    "[red]x[/red]",
    "[link=http://x]y",
    ":smile:",
    "\x1b[31mred\x1b]0;title\x07",
    "a\rb",
    "b\u202ec",
    "$x_{",
    "\x9bJ",
]


def test_names_are_plain_text_wherever_they_are_shown(folder, capsys):
    rng = np.random.default_rng(0)
    tensors = {f"{name}/w": rng.normal(size=(24, 40)).astype("f4") for name in EVIL}
    safetensors.numpy.save_file(tensors, "evil.safetensors")
    text = ""
    for command in ("compress evil.safetensors out.safetensors --method normal", "inspect out.safetensors",
                    "compare evil.safetensors out.safetensors", "inspect out.safetensors --json",
                    "plot out.safetensors dir --leaves x_", "compare evil.safetensors out.safetensors --skip smile",
                    "decompress out.safetensors back.npz", "compare evil.safetensors in.safetensors"):  # fmt: skip
        status, out, err = run(command, capsys)
        assert status == (1 if "in.safe" in command else 0), err
        text += out + err
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    for shown in (
        "a[/b]/w",
        "[red]x[/red]/w",
        ":smile:/w",
        r"\x1b[31mred\x1b]0;title\x07/w",
        r"b\u202ec/w",
        r"\x9bJ/w",
    ):
        assert shown in text


def test_a_stored_report_is_plain_text(folder, capsys):
    cparams, report = nuqjax.compress({"w": np.ones((24, 40), "f4")}, method="normal", return_report=True)
    evil = dataclasses.replace(report.leaves[0], method="\x1b[2J[/b]", granularity="[/x]", codebook_format="\x1b")
    nuqjax.save("out.safetensors", cparams, report=type(report)((evil,)))
    status, out, err = run("inspect out.safetensors", capsys)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert r"\x1b[2J[/b]" in out


def test_what_is_not_read_is_left_out_and_said(folder, capsys):
    np.savez("a.npz", good=np.ones((24, 40), "f4"), bad=np.array(["text"]))
    status, _, err = run("compress a.npz out --quiet", capsys)
    assert status == 1
    assert "a.npz: 'bad' holds text or Python objects of dtype <U4, which is not read; skip='bad' leaves it out" in err
    assert run("compress a.npz out --quiet --skip bad", capsys) == (0, "", "nuqjax: left out of a.npz: bad\n")
    status, out, _ = run("compare a.npz a.npz", capsys)
    assert status == 0
    assert out.endswith("no bit differs; 1 tensors are not read\n")
    assert run("compare a.npz out --skip bad", capsys)[0] == 1  # which has none
    status, _, err = run("compress a.npz out --skip nothing", capsys)
    assert "skip='nothing' matches none of the 2 leaves" in err


def test_plot(folder, capsys):
    run(COMPRESS + " --quiet", capsys)
    status, out, _ = run("plot out.safetensors pictures --source in.safetensors", capsys)
    assert (status, out) == (0, "3 pictures in pictures\n")
    names = ["levels-conv-weight.png", "levels-head-weight.png", "report.png"]
    assert sorted(os.listdir("pictures")) == names
    assert all((folder / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_demo(folder, capsys):
    status, out, _ = run("demo", capsys)
    assert status == 0
    assert "bytes on disk" in out
    assert os.listdir() == ["in.safetensors"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(folder, capsys, shell):
    status, out, _ = run(f"completion {shell}", capsys)
    assert status == 0
    for word in ("compress", "decompress", "inspect", "entropy-coding"):
        assert word in out


@pytest.mark.parametrize("command", ["", "compress", "decompress", "inspect", "plot", "compare", "demo", "completion"])
def test_help(folder, capsys, command):
    status, out, err = run(f"{command} --help", capsys)
    assert (status, err) == (0, "")
    assert out.startswith("usage: nuqjax")
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compress nothing.safetensors out", "nothing.safetensors: No such file or directory"),
        (
            "compress . out",
            ".: a directory with several files of weights (in.safetensors, other.safetensors): name one",
        ),
        ("compress empty out", "empty: a directory that is not an orbax checkpoint and has no safetensors"),
        ("compress in.safetensors .", "is a directory; a file is wanted"),
        ("compress in.safetensors no/out", "no/out.partial: No such file or directory"),
        ("compress in.safetensors /dev/null/out", "/dev/null/out.partial: Not a directory"),
        ("compress in.safetensors out --method kmeans", "unknown method 'kmeans'; known: knq, enq"),
        ("compress in.safetensors out --rule 'w8:bits=8'", "rule 'w8' matches none of the 3 leaves; the nearest"),
        ("compress in.safetensors out --output-axis 4", "conv/weight (shape (32, 8, 3, 3)): output axis 4"),
        ("compress in.safetensors out --max-shard-size big", "max_shard_size='big', but a number of bytes"),
        ("compress in.safetensors out --format npz", "not a zip file"),
        ("decompress in.safetensors out", "in.safetensors: not a compressed file"),
        ("inspect in.safetensors", "nuqjax.save did not write this file"),
        ("inspect nothing", "nothing: No such file or directory"),
        ("plot in.safetensors pictures", "nuqjax.save did not write this file"),
        ("compare in.safetensors nothing", "nothing: No such file or directory"),
        ("compare in.safetensors other.safetensors", "'conv/bias' is in only one of"),
    ],
)
def test_one_line_says_what_is_wrong(folder, capsys, command, message):
    safetensors.numpy.save_file({"x": np.ones(1)}, "other.safetensors")
    os.mkdir("empty")
    before = sorted(os.listdir())
    status, out, err = run(command, capsys)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("nuqjax: error: ")
    assert message in err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("squash a b", "invalid choice: 'squash'"),
        ("compress in.safetensors", "the following arguments are required: OUT"),
        ("compress a b --bits 9", "argument --bits: invalid choice: 9"),
        ("compress a b --granularity row", "'row', but tensor, channel, channels/N or inputs/N is wanted"),
        ("compress a b --granularity channels/0", "'channels/0', but tensor"),
        ("compress a b --scale tensor", "'tensor', but none, channel or inputs/N is wanted"),
        ("compress a b --codebook-format int8", "'int8', but a floating dtype, fixed/WORD"),
        ("compress a b --codebook-format fixed/99", "'fixed/99', but a floating dtype"),
        ("compress a b --output-axis last", "'last', but a whole number is wanted"),
        ("compress a b --rule kernel", "'kernel', but PATTERN:option=value,… is wanted; options: bits, method"),
        ("compress a b --rule 'kernel:bits=many'", "bits='many'"),
        ("compress a b --rule 'kernel:width=8'", "'width=8', but PATTERN:option=value"),
        ("compress a b --rule '(:bits=8'", "not a regular expression"),
        ("completion fish", "invalid choice: 'fish'"),
    ],
)
def test_what_is_not_understood(folder, capsys, command, message):
    status, out, err = run(command, capsys)
    assert (status, out) == (2, "")
    assert message in err


def test_words_of_the_command_line():
    assert options.granularity("inputs/64") == InputGroups(64)
    assert options.scale("inputs/8") == InputGroups(8)
    assert options.scale("none") is options.codebook_format("none") is None
    assert options.codebook_format("fixed/6") == AutoQFormat(6)
    assert options.codebook_format("fixed/6/-2") == QFormat(6, -2)
    assert options.codebook_format("bfloat16") == jnp.bfloat16
    assert options.rule("a:output_axis=-2,-1,skip=false,keep_zero=true,stack_axes=1") == nuqjax.Rule(
        "a", axis=(-2, -1), skip=False, keep_zero=True, stack_axes=1
    )


# As a process


def start(*words, **more):
    command = [sys.executable, "-m", "nuqjax", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(folder, capsys, ending):
    rng = np.random.default_rng(0)
    shapes = [(40 + 8 * i, 64) for i in range(20)]  # each shape compiles anew, so there is time
    tensors = {f"w{i:02}": rng.normal(size=shape).astype("f4") for i, shape in enumerate(shapes)}
    safetensors.numpy.save_file(tensors, "many.safetensors")
    words = ["compress", "many.safetensors", "out.safetensors", "--method", "normal", "--quiet"]
    process = start(*words)
    journal = folder / "out.safetensors.partial" / "journal"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(ending)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert (
        err
        == "nuqjax: interrupted; out.safetensors.partial has what is done; --resume (resume=True) goes on from there\n"
    )
    assert not os.path.exists("out.safetensors")
    assert run(shlex.join([*words, "--resume"]), capsys) == (0, "", "")
    resumed = (folder / "out.safetensors").read_bytes()
    assert run(shlex.join(words), capsys) == (0, "", "")
    assert (folder / "out.safetensors").read_bytes() == resumed


def test_a_signal_that_python_drops_comes_again(folder, capsys, monkeypatch):
    class Collected:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)  # the handler runs here, where its exception is dropped

    def command():
        held = Collected()
        del held
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setitem(cli._COMMANDS, "demo", command)
    assert run("demo", capsys) == (130, "", "nuqjax: interrupted\n")


def test_no_room_on_the_disk(folder, capsys):
    """A limit on the size of files stands for it."""
    run(COMPRESS + " --quiet", capsys)
    before = (folder / "out.safetensors").read_bytes()
    command = f"ulimit -f 3; exec {sys.executable} -m nuqjax {COMPRESS} --quiet"
    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    kept = "out.safetensors.partial has what is done; --resume (resume=True) goes on from there"
    assert err == f"nuqjax: error: {folder}/out.safetensors.partial: File too large; {kept}\n"
    assert (folder / "out.safetensors").read_bytes() == before


def test_a_reader_that_goes_away(folder, capsys):
    run(COMPRESS + " --quiet", capsys)
    process = start("inspect", "out.safetensors", "--json")
    process.stdout.close()
    assert process.wait() == 1  # it may have been in the middle of its work
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("command", ["inspect out.safetensors", "inspect out.safetensors --json", "demo",
                                     "compare in.safetensors out.safetensors"])  # fmt: skip
def test_a_standard_output_that_is_closed(folder, capsys, monkeypatch, command):
    run(COMPRESS + " --quiet", capsys)
    monkeypatch.setattr(sys, "stdout", None)
    status = cli.main(shlex.split(command))
    monkeypatch.undo()
    assert status == 1
    assert capsys.readouterr().err == "nuqjax: error: standard output is closed: nothing can be shown\n"


def test_no_file_is_opened_under_the_number_of_a_stream_that_is_closed(folder):
    command = f"exec {sys.executable} -m nuqjax {COMPRESS} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 1  # the report could not be shown
    assert nuqjax.inspect("out.safetensors").compressed


def test_a_file_that_grew_is_told_in_one_line(folder, capsys):
    np.savez_compressed("zeros.npz", w=np.zeros((16, 16), "f4"))
    for quiet in ("", " --quiet"):
        status, _, err = run("compress zeros.npz zeros.safetensors --method normal" + quiet, capsys)
        assert status == 0
        assert "nuqjax: warning: the file takes " in err


@pytest.mark.parametrize("words", ["compress a b --\x1b[31m", "\x1b[31m", "compress a b --bits \x1b[31m"])
def test_what_is_quoted_of_the_arguments_moves_no_cursor(folder, capsys, words):
    status, _, err = run(words, capsys)
    assert status == 2
    assert "\x1b" not in err
    assert r"\x1b[31m" in err


def interrupt(*_):
    raise KeyboardInterrupt


def test_compress_with_a_function_and_its_inputs(folder, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 32)).astype(np.float32), "b": np.zeros(32, np.float32)}
    np.savez("in.npz", **params)
    x = rng.normal(size=(20, 16)).astype(np.float32)
    np.savez("inputs.npz", x)
    (folder / "a_model.py").write_text("def run(params, x):\n    return x @ params['w'] + params['b'][None]\n")
    command = "compress in.npz out.safetensors --bits 3 --fn a_model:run --batches inputs.npz --batch-size 10"
    status, out, err = run(command, capsys)
    assert status == 0, err
    assert "10 examples that were held out" in out
    fn = lambda params, x: x @ params["w"] + params["b"][None]  # noqa: E731
    wanted = nuqjax.compress(params, 3, fn=fn, batches=[x[:10], x[10:]])
    for one, other in zip(jax.tree.leaves(nuqjax.load("out.safetensors")), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    written = (folder / "out.safetensors").read_bytes()
    with monkeypatch.context() as patch:  # interrupted behind the leaf
        patch.setattr(flow, "corrected", interrupt)
        status, _, err = run(command, capsys)
    assert (status, err.splitlines()[-1]) == (
        130,
        "nuqjax: interrupted; out.safetensors.partial has what is done; --resume (resume=True) goes on from there",
    )
    assert run(command + " --resume --quiet", capsys) == (0, "", "")
    assert (folder / "out.safetensors").read_bytes() == written
    assert not os.path.exists("out.safetensors.partial")
    for changed, words in {
        "--batches inputs.npz": "given together",
        "a_model:run": "MODULE:FUNCTION",
        "inputs.npz": "the same number of examples",
    }.items():
        replacement = {"a_model:run": "a_model:walk", "inputs.npz": "in.npz"}.get(changed, "")
        status, _, err = run(command.replace(changed, replacement), capsys)
        assert status in (1, 2)
        assert words in err
