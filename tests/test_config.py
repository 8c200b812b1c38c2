"""Recipes: what is accepted, what is refused and in which words."""

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import example, given, settings

from clipcov_stream.config import (
    EvalColumnsConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ProxyConfig,
    SelectionConfig,
    StreamConfig,
    TrainConfig,
    load_config,
    parse,
)

RECIPES = sorted((Path(__file__).parent.parent / "yamls").glob("*.yaml"))
MINIMAL = """
model: {name: ViT-B-32}
stream: {local: data, global_pool_size: 100}
max_duration: 10ba
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Writes a recipe and returns the config of it."""

    def load(text: str, *overrides: str) -> TrainConfig:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(str(path), overrides)

    return load


def test_a_minimal_recipe_has_the_defaults(recipe: Any) -> None:
    config = recipe(MINIMAL)
    assert config == TrainConfig(
        model=ModelConfig(name="ViT-B-32"),
        stream=StreamConfig(100, local="data", shuffle_seed=9176),
        selection=SelectionConfig(seed=0),
        max_duration="10ba",
    )
    assert (config.selection.selector, config.selection.embed) == ("clipcov", "online")


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.1), ("sgd", 0.1), ("decoupled_adamw", 1e-5)])
def test_weight_decay_is_what_the_optimizer_makes_of_it(recipe: Any, name: str, decay: float) -> None:
    """The decoupled optimizer does not scale it by the learning rate."""
    assert recipe(MINIMAL, f"optimizer.name={name}").optimizer.weight_decay == decay
    given = recipe(MINIMAL, f"optimizer.name={name}", "optimizer.weight_decay=3e-4").optimizer
    assert given.weight_decay == 3e-4


def test_one_seed_seeds_everything_that_has_none_of_its_own(recipe: Any) -> None:
    config = recipe(MINIMAL, "seed=3")
    assert (config.selection.seed, config.stream.shuffle_seed) == (3, 9179)
    config = recipe(MINIMAL, "seed=3", "selection.seed=0", "stream.shuffle_seed=1")
    assert (config.selection.seed, config.stream.shuffle_seed) == (0, 1)


def test_twins_have_names_of_their_own(recipe: Any) -> None:
    names = ("run_name=a_{selector}_{seed}", "save_folder=runs/{run_name}/{rank}", "metrics_file=runs/{run_name}.jsonl")
    config = recipe(MINIMAL, *names, "selection.selector=random", "seed=7")
    assert config.run_name == "a_random_7"
    assert config.save_folder == "runs/a_random_7/{rank}"  # Composer fills in the rest
    assert config.metrics_file == "runs/a_random_7.jsonl"
    config = recipe(MINIMAL, "save_folder=runs/{run_name}", "metrics_file=runs/{selector}.jsonl")
    assert config.save_folder == "runs/{run_name}"  # by the name that Composer makes up
    assert config.metrics_file == "runs/clipcov.jsonl"
    with pytest.raises(ValueError, match=r"metrics_file=.runs/\{run_name\}.jsonl. needs a run_name"):
        recipe(MINIMAL, "metrics_file=runs/{run_name}.jsonl")


def test_paths_begin_at_home_where_they_say_so(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("metrics_file", "ledger", "gallery", "save_folder", "load_path", "model.pretrained")
    keys += ("stream.local", "stream.sidecar", "eval.x.local", "selection.proxy.pretrained")
    config = recipe(MINIMAL, *(f"{key}=~/{{seed}}/{key}" for key in keys), "run_name=~r")
    for key in keys:
        found: Any = config
        for name in key.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        seed = "0" if key in keys[:4] else "{seed}"
        assert found == f"/home/me/{seed}/{key}"
    assert config.run_name == "~r"
    plain = ("stream.local=a/~", "stream.remote=s3://b/~/c", "model.pretrained=openai", "save_folder=~none/x")
    config = recipe(MINIMAL, *plain)
    stream = config.stream
    assert (stream.local, stream.remote) == ("a/~", "s3://b/~/c")
    assert (config.model.pretrained, config.save_folder) == ("openai", "~none/x")


def test_a_full_recipe_becomes_its_sections(recipe: Any) -> None:
    config = recipe(
        MINIMAL
        + """
selection: {filter_ratio: 0.5, warmup: 3, proxy: {name: RN50, pretrained: openai}}
optimizer: {lr: 1.0e-3, betas: [0.8, 0.9]}
eval:
  imagenet: {local: in1k, columns: {label: y}}
  coco: {tasks: [retrieval], remote: s3://bucket/coco}
callbacks: {lr_monitor: null, speed_monitor: {window_size: 5}}
device_train_microbatch_size: auto
"""
    )
    assert config.selection == SelectionConfig(
        filter_ratio=0.5, warmup=3, proxy=ProxyConfig(name="RN50", pretrained="openai"), seed=0
    )
    assert config.optimizer == OptimizerConfig(lr=1e-3, betas=(0.8, 0.9))
    assert config.eval == {
        "imagenet": EvalConfig(local="in1k", columns=EvalColumnsConfig(label="y")),
        "coco": EvalConfig(tasks=("retrieval",), remote="s3://bucket/coco"),
    }
    assert config.callbacks == {"lr_monitor": None, "speed_monitor": {"window_size": 5}}
    assert config.device_train_microbatch_size == "auto"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.filter_ration=0.5", r"selection\.filter_ration is not a config key; did you mean 'filter_ratio'\?"),
        ("selecton.seed=1", r"selecton is not a config key; did you mean 'selection'\?"),
        ("stream.columns.img=jpg", r"stream\.columns\.img is not a config key; did you mean 'image'\?"),
        ("eval.coco.batchsize=2", r"eval\.coco\.batchsize is not a config key; did you mean 'batch_size'\?"),
        ("selection.proxy.nam=RN50", r"selection\.proxy\.nam is not a config key; did you mean 'name'\?"),
        ("scheduler.zzz=1", r"scheduler\.zzz is not a config key; its keys are alpha_f, name, t_warmup"),
        ("stream.global_pool_size=10.5", r"stream\.global_pool_size=10\.5 must be of type int"),
        ("stream.global_pool_size=ten", r"stream\.global_pool_size='ten' must be of type int"),
        ("stream.shuffle=1", r"stream\.shuffle=1 must be of type bool"),
        ("seed=true", r"seed=True must be of type int"),
        ("optimizer.lr=fast", r"optimizer\.lr='fast' must be of type float"),
        ("optimizer.lr=true", r"optimizer\.lr=True must be of type float"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\] must have 2 entries"),
        ("optimizer.betas=[0.9,x]", r"optimizer\.betas\[1\]='x' must be of type float"),
        ("optimizer.betas=0.9", r"optimizer\.betas=0\.9 must be of type tuple"),
        ("eval.coco.tasks=[1]", r"eval\.coco\.tasks\[0\]=1 must be of type str"),
        ("model.name=3", r"model\.name=3 must be of type str"),
        ("selection.warmup=0.5", r"selection\.warmup=0\.5 must be one of str, int"),
        ("selection=clipcov", r"selection='clipcov' must be a section of keys"),
        ("eval=[a]", r"eval=\['a'\] must be of type dict"),
        ("callbacks.lr_monitor=3", r"callbacks\.lr_monitor=3 must be of type dict"),
        ("max_duration=200", r"max_duration=200 needs a unit: 200ba for batches"),
        ("save_interval=200", r"save_interval=200 needs a unit: 200ba for batches"),
        ("max_duration=null", r"max_duration=None must be of type str"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(recipe: Any, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stream: {global_pool_size: 1}\nmax_duration: 1ba", r"^model is missing"),
        ("model: {}\nstream: {local: x}\nmax_duration: 1ba", r"^stream\.global_pool_size is missing"),
        ("model: {}\nstream: {global_pool_size: 1}", r"^max_duration is missing"),
        ("", r"model is missing"),
        ("- a\n- b", "recipe"),
        ("just words", "just words is not a config key"),
        ("a: b: c", "is not YAML"),
        ("a: [", "is not YAML"),
        ("model: ${\nstream: {}", "recipe"),
        ("\x01", "recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(text)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe at '.*none\.yaml'"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="cannot read recipe"):
        load_config(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ValueError, match="recipe"):
        load_config(str(tmp_path / "latin.yaml"))


def test_overrides_win_and_may_open_sections(recipe: Any) -> None:
    config = recipe(
        MINIMAL, "stream.global_pool_size=7", "selection.proxy.name=RN50", "model.name=null", "run_name=a=b"
    )
    assert config.stream.global_pool_size == 7 and config.stream.local == "data"
    assert config.selection.proxy == ProxyConfig(name="RN50")
    assert config.model.name is None
    assert config.run_name == "a=b"


@pytest.mark.parametrize("override", ["seed", "--seed", "seed:3", ""])
def test_an_override_needs_a_value(recipe: Any, override: str) -> None:
    with pytest.raises(ValueError, match=rf"override '{override}' is not of the form key\.sub=value"):
        recipe(MINIMAL, override)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5E-4", 5e-4), ("2", 2.0), (".inf", math.inf)])
def test_numbers_without_a_dot_are_floats(recipe: Any, text: str, value: float) -> None:
    for config in (recipe(MINIMAL, f"optimizer.lr={text}"), recipe(f"{MINIMAL}optimizer: {{lr: {text}}}")):
        assert type(config.optimizer.lr) is float and config.optimizer.lr == value


def test_the_launch_line_is_no_key(recipe: Any) -> None:
    assert recipe(f'launch: r"""\n{MINIMAL}# """; print()'.replace('r"""\n', 'r"""  # text\n')) == recipe(MINIMAL)


@pytest.mark.parametrize("text", ["${oc.env:CLIPCOV_SECRET}", "${seed}", "a_${model.name}", "${oc.decode:x}"])
def test_interpolations_are_refused_unread(recipe: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CLIPCOV_SECRET", "leaked")
    nested = f"{MINIMAL}callbacks: {{x: {{y: ['{text}']}}}}"
    for make in ((MINIMAL, f"run_name={text}"), (f"{MINIMAL}run_name: {text}",), (nested,)):
        with pytest.raises(ValueError, match="a recipe has none: write the value itself") as raised:
            recipe(*make)
        assert "leaked" not in str(raised.value)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['{owned}']",
        "!!python/object/new:os.mkdir ['{owned}']",
        "!!python/name:os.mkdir ''",
        "!!python/tuple [1]",
    ],
)
def test_python_tags_are_refused(recipe: Any, tmp_path: Path, value: str) -> None:
    owned = tmp_path / "owned"
    value = value.format(owned=owned)
    for text, overrides in ((f"{MINIMAL}run_name: {value}", ()), (MINIMAL, (f"run_name={value}",))):
        with pytest.raises(ValueError, match="recipe"):
            recipe(text, *overrides)
    assert not owned.exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_yaml_and_python(path: Path) -> None:
    config = load_config(str(path))
    assert config.run_name == f"{path.stem}_clipcov_0"
    for name in (config.save_folder, config.metrics_file):
        assert name is None or config.run_name in name
    text = path.read_text(encoding="utf-8")
    compile(text, str(path), "exec")
    first, *_, last = text.splitlines()
    assert first.startswith('launch: r"""') and f"`composer yamls/{path.name}`" in first
    assert last.startswith('# """; __name__ == "__main__" and ') and last.endswith(".main(__file__)")
    assert f"#   composer yamls/{path.name}" in text
    # Nothing between the two lines may end the string, or be YAML that Python runs.
    assert text.count('"""') == 2


def test_there_are_recipes() -> None:
    assert RECIPES


def field_names(kind: type) -> list[str]:
    return sorted(kind.__dataclass_fields__)


SECTIONS = (ModelConfig, StreamConfig, SelectionConfig, EvalConfig)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["1e-3", "10ba", "auto"])
)
KEYS = st.one_of(
    st.sampled_from(field_names(TrainConfig)),
    st.sampled_from(
        [n for kind in (ModelConfig, StreamConfig, SelectionConfig, EvalConfig) for n in field_names(kind)]
    ),
    st.text(max_size=6),
    st.integers(),
    st.none(),
    st.booleans(),
    st.floats(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=5),
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(field_names(StreamConfig)), inner, max_size=5),
        st.dictionaries(st.sampled_from(field_names(OptimizerConfig)), inner, max_size=5),
    ),
    max_leaves=12,
)
VALID = {"model": {}, "stream": {"global_pool_size": 4}, "max_duration": "1ba"}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(field_names(TrainConfig)), TREES, max_size=8))
@example({"optimizer": {"lr": 10**400}})
@example({"selection": {"half_life": -(10**400)}})
def test_any_tree_is_a_config_or_a_value_error(tree: dict[str, Any]) -> None:
    try:
        config = parse(TrainConfig, {**VALID, **tree}, "")
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(config, TrainConfig)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tree=TREES)
@example(tree={None: 1})
@example(tree={"launch": {1: 2}, "optimizer": {"lr": 10**400}})
def test_any_yaml_is_a_config_or_a_value_error(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({**VALID, **tree} if isinstance(tree, dict) else tree), encoding="utf-8")
    try:
        assert isinstance(load_config(str(path)), TrainConfig)
    except ValueError as error:
        assert str(error)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=60), override=st.text(max_size=20))
@example(text="- a", override="[")
def test_any_text_is_a_config_or_a_value_error(
    text: str, override: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for body, overrides in ((text, []), (MINIMAL, [f"seed={override}"]), (MINIMAL, [f"{override}=1"])):
        path.write_bytes(body.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load_config(str(path), overrides), TrainConfig)
        except ValueError as error:
            assert str(error)
