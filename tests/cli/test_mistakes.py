"""A mistake at the command line is a line: what came, where, what is expected, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import single_precision  # noqa: F401
from f2d2_lightning.cli import main
from f2d2_lightning.cli._given import all_given, short, with_variables
from f2d2_lightning.cli._mistakes import in_a_line, refusals
from f2d2_lightning.cli._parser_text import leaves
from odd_command_lines import LONGEST, classify, models, warm
from odd_lines import BASE, CODE, drawn, lines

# Lightning's log keeps the stream that was there when it was imported, which must not be one of a single test
warm()

TEACHER = {"flow_map": BASE["model"]["init_args"]["flow_map"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"class_path": "f2d2_lightning.FlowMatchingModule", "init_args": TEACHER}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, "model": model}))
    # a name of its own: other tests have a module of that name as well
    (tmp_path / "my_classes.py").write_text(CODE)
    monkeypatch.setenv("F2D2_DEBUG", "")
    yield tmp_path
    sys.modules.pop("my_classes", None)


def said(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "base.yaml", *arguments])
    printed = capsys.readouterr().err
    assert stop.value.code == code
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


NODES = "model.init_args.flow_map.init_args.width"
FILES = {
    "data: {init_args: {batch_size: 0}}": (
        "data.init_args.batch_size=0 (in odd.yaml): batch_size=0; it must be at least 1"
    ),
    "model: {init_args: {flow_map: {init_args: {width: wide}}}}": f"{NODES}='wide' (in odd.yaml): int is expected",
    "model: {init_args: {ema_dekay: 3}}": (
        "there is no model.init_args.ema_dekay (in odd.yaml): f2d2_lightning.FlowMatchingModule takes no 'ema_dekay'; "
        "did you mean 'ema_decay'?"
    ),
    "trainer: {max_step: 3}": "there is no key trainer.max_step (in odd.yaml); did you mean 'trainer.max_steps'?",
    "dta: {}": "there is no key dta (in odd.yaml); did you mean 'data'?",
    "data: {class_path: Digts}": (
        "data='Digts' (in odd.yaml): there is no FlowDataModule of this name; did you mean "
        "'f2d2_lightning.data.Digits'?"
    ),
    "trainer: {callbacks: [{class_path: my_classes.Level, init_args: {level: 1}}]}": (
        "trainer.callbacks[0].init_args.level=1 (in odd.yaml): level 1 is too low"
    ),
    "trainer: {max_steps: [1\n": "--config odd.yaml, line 2: this is no YAML (did not find expected ',' or ']')",
    "trainer:\n\tmax_steps: 1\n": (
        "--config odd.yaml, line 2: this is no YAML (found character that cannot start any token); YAML is indented by "
        "spaces, and there is a tab"
    ),
    "": "--config odd.yaml is empty; a mapping is needed, such as 'trainer: {max_steps: 1000}'",
    "- 1": "--config odd.yaml is a list, '[1]'; a mapping is needed, such as 'trainer: {max_steps: 1000}'",
}


@pytest.mark.parametrize("text", FILES)
def test_mistakes_of_a_file(text, folder, capsys):
    (folder / "odd.yaml").write_text(text)
    assert said(capsys, "--config", "odd.yaml") == FILES[text]


LINES = {
    "--trainer.max_step=5": "there is no option --trainer.max_step=5; did you mean '--trainer.max_steps'?",
    "--model.ema_decay=2": "model.init_args.ema_decay='2' (--model.ema_decay): ema_decay=2.0; it lies in [0, 1)",
    "--model.optimizer.lr=-1": (
        "model.init_args.optimizer.init_args.lr='-1' (--model.optimizer.lr): Invalid learning rate: -1.0"
    ),
    "--model.flow_map=PreconditionedMPL": (
        "model.init_args.flow_map='PreconditionedMPL' (--model.flow_map): there is no FlowMap of this name; did you "
        "mean 'f2d2_lightning.nn.PreconditionedMLP'?"
    ),
    "--model=F2D2Modul": (
        "--model 'F2D2Modul': there is no FlowModule of this name; did you mean 'f2d2_lightning.F2D2Module'?"
    ),
    "--trainer.devices=0": (
        "trainer.devices='0' (--trainer.devices): `Trainer(devices='0')` value is not a valid input using cpu "
        "accelerator."
    ),
    "--seed-everything=x": "--seed_everything 'x': bool or int is expected",
    "extra": "'extra' is no option, and nothing takes it; options begin with --",
}


@pytest.mark.parametrize("option", LINES)
def test_mistakes_of_a_line(option, folder, capsys):
    assert said(capsys, "--model.optimizer=torch.optim.AdamW", option) == LINES[option]


def test_files_that_are_no_configurations(folder, capsys):
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "configs_of_mine").mkdir()
    assert said(capsys, "--config", "binary.yaml").startswith("--config binary.yaml is no text (byte 128)")
    assert said(capsys, "--config", "bsae.yaml").startswith("--config bsae.yaml is no file, and no configuration")
    assert "did you mean 'base.yaml'?" in said(capsys, "--config", "bsae.yaml")
    assert said(capsys, "--config", "configs_of_mine") == "--config configs_of_mine is a folder; give a file in YAML"


def test_ones_own_code(folder, capsys):
    line = said(capsys, "--model", "my_classes.Fails", code=1)
    number = CODE.splitlines().index('        raise KeyError("of my own")') + 1
    assert line == f"KeyError: 'of my own' (my_classes.py:{number}); --debug shows the traceback"
    with pytest.raises(KeyError, match="of my own"):
        main(["fit", "--config", "base.yaml", "--model", "my_classes.Fails", "--debug"])


def test_a_bug_of_this_package_says_so(folder, capsys, monkeypatch):
    def broken(self, batch, index):
        raise KeyError("batch")

    # as if it stood in the package
    code = broken.__code__.replace(co_filename=sys.modules["f2d2_lightning.modules.base"].__file__)
    broken.__code__ = code
    monkeypatch.setattr("f2d2_lightning.FlowMatchingModule.training_step", broken)
    line = said(capsys, code=1)
    assert line.startswith("KeyError: 'batch' (f2d2_lightning/modules/base.py:")
    assert "a bug in f2d2_lightning, please report it; --debug shows the traceback" in line


def test_a_refusal_is_no_more_than_the_error_elsewhere(monkeypatch):
    """As of a command line of one's own, around F2D2CLI."""
    monkeypatch.setenv("F2D2_DEBUG", "")
    for within, expected in ((nullcontext(), ValueError), (in_a_line(), SystemExit)):
        with pytest.raises(expected), within, refusals("Level", {"level": 1}, "trainer"):
            raise ValueError("level is too low")


def test_variables_stand_for_options(folder, capsys, monkeypatch):
    monkeypatch.setenv("F2D2_FIT__TRAINER__MAX_STEPS", "7")
    monkeypatch.setenv("F2D2_DEBUG", "")
    for more, expected in (([], 7), (["--trainer.max-steps", "8"], 8)):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "base.yaml", *more, "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == expected
    monkeypatch.setenv("F2D2_FIT__TRAINER__MAX_STEP", "7")
    expected = "there is no option --trainer.max_step=7 (F2D2_FIT__TRAINER__MAX_STEP); did you mean"
    assert said(capsys).startswith(expected)


def test_where_values_stand(folder, monkeypatch):
    monkeypatch.setenv("F2D2_FIT__A__B", "3")
    (folder / "odd.yaml").write_text("a: {init_args: {c: [1, {d: 2}]}}")
    arguments = with_variables("fit", ["--config", "odd.yaml", "--a.e", "4", "--f=5"])
    assert arguments == ["--config", "odd.yaml", "--a.b=3", "--a.e", "4", "--f=5"]
    found = {given.key: (given.value, given.where) for given in all_given("fit", arguments)}
    assert found["a.c.d"] == (2, "in odd.yaml")
    assert found["a.b"] == ("3", "F2D2_FIT__A__B")
    assert found["a.e"] == ("4", "--a.e")
    assert found["f"] == ("5", "--f")
    assert short("--a.init_args.b[0].init_args.c") == "a.b.c"


def test_the_branch_of_a_union_that_is_meant():
    text = """Parser key "a":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'x.A'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'x.B':
        Parser key "n":
          Expected a <class 'int'>. Got value: z
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'n': 'z'}"""
    inner, outer = leaves(text)
    assert (inner.key, inner.owners, inner.value) == ("a.init_args.n", ("x.B",), "z")
    assert (outer.key, outer.problem) == ("a", "Expected a <class 'NoneType'>")


@pytest.mark.parametrize("arguments", [["ft"], ["fit", "--config", "nowhere"], ["configs", "x"], ["--foo"]])
def test_usage_errors_come_before_torch(arguments):
    code = (
        "import sys\nfrom f2d2_lightning.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    assert stop.code == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ")


@pytest.fixture(scope="module")
def tiny_models():
    with models():
        yield


@pytest.mark.usefixtures("tiny_models")
def test_odd_command_lines():
    """A sample of those that the benchmark counts, which are to be 98 % of all."""
    every = list(lines())
    assert len(every) > 1000
    found = [(line, *classify(line)) for line in every[7 :: len(every) // 25]]
    unclear = [(line.arguments, said) for line, outcome, said in found if outcome == "unclear"]
    assert unclear == []
    assert sum(outcome == "clear" for _, outcome, _ in found) >= 22
    assert max(len(said) for _, _, said in found) <= LONGEST + 4


@pytest.mark.usefixtures("tiny_models")
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(draw=st.randoms(use_true_random=False))
def test_any_value_of_any_option_is_taken_or_refused_in_a_line(draw):
    line = drawn(draw)
    outcome, said = classify(line)
    assert outcome in ("clear", "accepted"), f"{line.arguments} {line.files}: {said}"
