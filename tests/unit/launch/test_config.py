"""Composition, checking, and the nearest name for what does not exist."""

import dataclasses
import json
import subprocess
import sys
from importlib import import_module
from typing import Annotated, Any

import pytest
import yaml
from annotated_types import Len
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, OptionError
from launch.config.check import check_choice, options_of, options_within
from launch.config.compose import command_line, compose, config_folder, read_value, to_yaml
from launch.config.settings import Config, ParallelSettings, mesh_sizes
from launch.train import main as train_command
from scaling.models import MODELS
from scaling.parallel.mesh import check_sizes


def options_in(group: str) -> list[str]:
    return sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))


def composed(*overrides: str) -> Config:
    return compose("train", overrides, Config)


def test_values_come_from_groups_then_experiment_then_command_line():
    config = composed("experiment=recall", "train.steps=7", "optim.betas=[0.8,0.95]", "name=mine")
    assert (config.task["name"], config.model["name"]) == ("recall", "se3_hyena")
    assert config.name == "mine" and config.train.steps == 7 and config.optim.betas == (0.8, 0.95)
    assert composed("experiment=recall", "task=denoising").task["name"] == "denoising"
    assert composed("engine=ddp").engine.name == "ddp"
    assert composed("model=se3_hyena_paper").model["name"] == "se3_hyena_paper"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.stepz=3", "unknown key train.stepz, did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian, did you mean train?"),
        ("lr=0.1", "unknown key lr, did you mean optim.lr?"),
        ("sp=2", "unknown key sp, did you mean parallel.sp?"),
        ("task=recal", "task=recal does not exist, did you mean recall?"),
        ("experiment=frist_light", "did you mean first_light?"),
        ("engine=dpp", "engine=dpp does not exist, did you mean ddp?; options: ddp, deepspeed"),
        ("train.steps=many", "train.steps='many': must be a valid integer"),
        ("train.steps=true", "train.steps=True"),
        ("train.steps=2.5", "train.steps=2.5"),
        ("train.steps=null", "train.steps=None"),
        ("train.precision=fp16", "train.precision='fp16': must be 'float32', 'float64' or 'bf16'"),
        ("train=3", "train=3"),
        ("train.steps=0", "train.steps=0: must be greater than or equal to 1"),
        ("parallel.sp=0", "parallel.sp=0: must be greater than or equal to 1"),
        ("optim.lr=nan", "optim.lr=nan: must be a finite number"),
        ("train.profile_steps=-1", "train.profile_steps=-1: must be greater than or equal to 0"),
        ("engine.zero_stage=4", "engine.zero_stage=4: must be less than or equal to 3"),
        ("optim.betas=[0.5,1]", "optim.betas=[0.5, 1]: must be less than 1"),
        ("execution.tile_bytes=0", "execution.tile_bytes=0: must be greater than or equal to 1"),
        *(
            (f"name={name}", f"name='{name}': must be one folder")
            for name in ("a/b", "..", ".", "")
        ),
        ("train.seed=-1", "train.seed=-1: must be greater than or equal to 0"),
        (f"train.seed={2**63}", f"train.seed={2**63}: must be less than or equal to {2**63 - 1}"),
        *(
            (f"parallel.timeout_s={value}", f"parallel.timeout_s={value}: must be ")
            for value in ("nan", "inf", "0.5", "2592001")
        ),
        ("train.steps", "train takes no path, and 'train.steps' is no key=value: write key=value"),
        ("a..b=1", "cannot read 'a..b=1': write key=value"),
        (
            "train.seed=1,2",
            "must be a valid integer; one run takes one value (a list: ",
        ),
        ("train.seed=${nothing}", "train.seed='${nothing}': must be a valid integer"),
        (
            "optim.betas=[0.8",
            """quote texts within it, and the whole for the shell: 'opt""",
        ),
        ("model.channels=${x}", "model.channels='${x}': must be a valid integer"),
        (
            "model.channelz=3",
            "unknown key model.channelz for model=se3_hyena, did you mean model.ch",
        ),
        ("--frobnicate", "unknown option --frobnicate"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override: str, named: str):
    with pytest.raises(ConfigError) as error:
        command_line([override], "train", Config)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_options_are_checked_against_the_constructor():
    """Unknown, of a wrong type, missing, and a name that no constructor has."""
    model = composed().model
    check_choice("model", model, MODELS, filled=("vectors", "scalars"))
    for change, named in [
        ({"channelz": 3}, "unknown key model.channelz for model=se3_hyena, did you mean model.ch"),
        ({"vectors": 3}, "unknown key model.vectors"),
        ({"channels": "3"}, "model.channels='3': must be a valid integer"),
        ({"padding": "round"}, "model.padding='round': must be 'circular' or 'causal'"),
        ({"name": "se3_hyna"}, "unknown model.name=se3_hyna, did you mean se3_hyena?"),
    ]:
        with pytest.raises(ConfigError, match=named.replace("?", r"\?").replace(".", r"\.")):
            check_choice("model", model | change, MODELS, filled=("vectors", "scalars"))

    def needs(path: str) -> None: ...

    with pytest.raises(ConfigError, match=r"task\.path is missing"):
        check_choice("task", {"name": "needs"}, {"needs": needs})


@pytest.mark.parametrize("group", ["model", "task"])
def test_every_option_file_lists_only_what_its_constructor_takes(group: str):
    from data_pipeline.tasks.registry import TASKS

    registry = {"model": MODELS, "task": TASKS}[group]
    assert set(registry) <= set(options_in(group))
    for option in options_in(group):
        choice = getattr(composed(f"{group}={option}"), group)
        assert choice["name"] in registry
        check_choice(group, choice, registry, filled=("vectors", "scalars"))


def test_every_experiment_goes_with_every_model_and_task():
    for experiment in options_in("experiment"):
        for model in options_in("model"):
            config = composed(f"experiment={experiment}", f"model={model}")
            assert config.model["name"] in MODELS
        for task in options_in("task"):
            config = composed(f"experiment={experiment}", f"task={task}")
            assert task.startswith(config.task["name"])
    assert composed().model["readout"] == 0.1  # the main job's
    assert composed("model=se3_hyena").model["readout"] == 1.0


def test_names_are_checked_before_anything_is_printed(capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match=r"unknown key model\.channelz"):
        train_command(["--cfg", "model.channelz=3"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("dp", "sp", "world", "sizes"),
    [
        (None, None, 4, (1, 4)),
        (2, None, 4, (2, 2)),
        (None, 2, 4, (2, 2)),
        (None, 1, 4, (4, 1)),
        (2, 2, 6, (2, 2)),  # Mesh refuses it, and names the product
        (8, None, 2, (8, 1)),
    ],
)
def test_null_sizes_fill_what_the_other_leaves(dp, sp, world, sizes):
    assert mesh_sizes(ParallelSettings(dp=dp, sp=sp), world) == sizes


@pytest.mark.parametrize(
    ("dp", "sp", "world", "ways"),
    [
        (2, 1, 1, "try dp=1, or start 2 ranks"),  # a node less
        (2, 3, 8, "try sp=4, or start 6 ranks"),
        (2, 2, 8, "try dp=4 or sp=4, or start 4 ranks"),
        (2, 2, 3, "try dp=1 sp=3, or start 4 ranks"),
    ],
)
def test_a_mesh_that_does_not_fit_says_which_do(dp, sp, world, ways):
    with pytest.raises(OptionError, match=f"the world has {world} ranks?; {ways}"):
        check_sizes(dp, sp, world)


def test_printed_configuration_composes_to_the_same(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        command_line(["--local_rank=1", "train.steps=9", "--cfg"], "train", Config)
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    config = composed("train.steps=9")
    assert printed == yaml.safe_load(to_yaml(config))
    references = composed("runs=a${", "task.store=${x}")
    assert yaml.safe_load(to_yaml(references))["runs"] == "a${"
    assert printed["train"]["steps"] == 9
    assert set(printed) == {field.name for field in dataclasses.fields(Config)}


def test_help_lists_groups_options_and_keys(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        command_line(["--help"], "train", Config)
    text = capsys.readouterr().out
    for word in (
        "Train a model",
        "engine      ddp, deepspeed",
        "materialised, nbody, needles, needles_million, recall",
        "batch_size: ",
    ):
        assert word in text


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed()
    assert not list(tmp_path.iterdir())


def test_a_bad_key_answers_before_torch_is_loaded():
    """One line on stderr, exit code 2, and no heavy import on the way."""
    watch = (
        "import sys; sys.argv = ['longfold', *sys.argv[1:]]; from launch.__main__ import main;"
        "code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for arguments, said in [
        (["train", "train.stepz=3"], "error: unknown key train.stepz, did you mean train.steps?\n"),
        (["trian"], "error: unknown command trian, did you mean train?; commands: train, eval"),
        (["eval", "runs/none"], "error: runs/none is no run (there is no such folder): name"),
    ]:
        ended = subprocess.run(
            [sys.executable, "-c", watch, *arguments], capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 2 and ended.stderr.startswith(said), ended.stderr
        assert ended.stderr.count("\n") == 1 and not ended.stdout


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
"""What an argument can hold."""
AWKWARD = ["a=b", "a#b", "{}", "[]", "é ü", "123", "true", "1e3", "007", "null", "a,b", "${x}",
           "x${oc.env:HOME}",
           "\\${x}", "[a", "{a: 1}", "f(x)", "'", "a\\,b", " ", "", "~a", "+a"]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_where_a_text_is_wanted_every_value_is_one(text: str):
    """Of a field, and of an option that takes a list, too."""
    config = composed(f"runs={text}", f"task.store={text}")
    assert config.runs == text
    assert config.task["store"] == ([] if text == "[]" else text)


@settings(max_examples=25, deadline=None)
@given(TEXTS)
def test_any_text_arrives_as_it_was_written(text: str):
    assume(not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""))
    assert composed("runs=other", f"+runs={text}").runs == text


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text("abc", min_size=1, max_size=3), inner, max_size=3), max_leaves=6,
))  # fmt: skip
def test_numbers_lists_and_mappings_are_read(value: object):
    assert read_value(json.dumps(value).replace('"', "")) == value


def test_lists_and_mappings_stay_where_they_are_wanted():
    config = composed(
        "engine.deepspeed_config={}", "task.store=[stores/é, a=b,  c]", "task.atoms=[]"
    )
    assert config.engine.deepspeed_config == {} and config.task["atoms"] == []
    assert config.task["store"] == ["stores/é", "a=b", "c"]
    assert composed("task.store=['a b', \"c]\"]").task["store"] == ["a b", "c]"]
    nested = composed("engine.deepspeed_config.a.b=3", "engine.deepspeed_config.c=é").engine
    assert nested.deepspeed_config == {"a": {"b": 3}, "c": "é"}
    config = composed("runs='a b'", "name='null'")
    assert (config.runs, config.name) == ("a b", "null")


@dataclasses.dataclass
class Prepare:
    source: dict[str, Any]
    store: str
    action: str
    figures: str | None
    paths: Annotated[list[str], Len(1, 2)]


def prepared(*overrides: str) -> Prepare:
    return compose("prepare", overrides, Prepare, ["path"])


def test_a_reference_is_followed_only_where_the_default_is_one():
    assert prepared("source=nbody").store == "stores/nbody"
    assert prepared("store=x/${source.name}/${action}", "action=a=b").store == "x/bundled/a=b"
    assert prepared("action=${source.name}").action == "${source.name}"
    assert prepared("figures=null").figures is None and prepared("figures=1").figures == "1"
    assert prepared("source.name=a${b}").store == "stores/a${b}"
    with pytest.raises(ConfigError, match="Interpolation key 'nothing' not found"):
        prepared("store=${nothing}")


def test_paths_stand_before_the_first_override(capsys: pytest.CaptureFixture):
    def paths(*arguments: str) -> list[str]:
        return command_line(arguments, "prepare", Prepare)[0].paths

    assert paths("runs/a") == ["runs/a"]
    assert paths("runs/a", "./b=c", "store=x") == ["runs/a", "./b=c"]
    for arguments, named in [
        ([], "^prepare takes folders before the first key=value"),
        (["a", "b", "c"], r"^paths=\['a', 'b', 'c'\]: list should have at most 2 items"),
        (["a", "store=x", "b"], "cannot read 'b': .* paths stand before 'store=x'"),
    ]:
        with pytest.raises(ConfigError, match=named):
            paths(*arguments)
    with pytest.raises(SystemExit):
        paths("--help")
    assert "usage: python -m launch prepare path ... [group" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "prepare", "sweep", "bench", "plan"])
def test_a_path_that_no_command_takes_is_named(command: str):
    with pytest.raises(ConfigError, match=f"^{command} takes no path, and 'runs/a' is no key=val"):
        import_module(f"launch.{command}").main(["runs/a", "name=x"])


def test_an_option_that_a_lower_floor_refuses_gets_its_section():
    config = composed()
    for sections, key, full in [
        (("task",), "atoms", "task.atoms"),
        (("train", "optim", "engine"), "lr", "optim.lr"),
        (("train", "optim", "engine"), "deepspeed_config.x", "engine.deepspeed_config.x"),
        (("train", "optim"), "unknown", "train.unknown"),
    ]:
        with (
            pytest.raises(OptionError, match=f"^{full}=1: no$"),
            options_within(config, "parallel"),
            options_within(config, *sections),
        ):
            raise OptionError(key, 1, "no")


def test_options_leave_the_name_out():
    assert options_of({"name": "x", "a": 1}) == {"a": 1}


def test_parameters_take_the_place_of_a_models_width():
    model = composed("model.parameters=5000").model
    assert model["parameters"] == 5000 and "hidden" not in model
    assert composed("model=transformer", "model.parameters=5000").model["heads"] == 4
    with pytest.raises(ConfigError, match=r"model\.parameters=5000: chooses hidden"):
        composed("model.parameters=5000", "model.hidden=8")
