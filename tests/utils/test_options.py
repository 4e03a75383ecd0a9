from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from utils.errors import UserError
from utils.files.yaml_files import read_yaml
from utils.options import Place, boolean, build, by_parameter, choice, integer, listed, match, number, option, parameters, shown

NAMES = {f"layer{i}.{j}.conv{k}.weight": 4 for i in (1, 2) for j in (0, 1) for k in (1, 2)} | {"fc.weight": 2, "fc.bias": 1}


def place(names=None):
    return Place("here", names or NAMES, {})


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        (number(least=0), "abc", "here: must be a number, not 'abc'"),
        (number(), True, "here: must be a number, not True"),
        (number(), float("nan"), "here: must be a number, not nan"),
        (number(), 10**400, "here: must be a number, not 1000000"),
        (number(least=0, below=1), 1, "here: is 1; it must be at least 0 and below 1"),
        (number(above=0), "0", "here: is 0; it must be above 0"),
        (integer(1, 3), 4, "here: is 4; it must be at least 1 and at most 3"),
        (integer(), 1.0, "here: must be a whole number, not 1.0"),
        (boolean, 1, "here: must be true or false, not 1"),
        (choice("Max", None), "maxi", "here: is 'maxi'. Did you mean 'Max'? Valid: Max"),
        (listed(integer(), 2), [1], "here: must be a list of 2, not [1]"),
        (listed(integer()), [0, "a"], "here[1]: must be a whole number, not 'a'"),
        (by_parameter(number()), {}, "here: is empty; it must name parameters"),
        (by_parameter(number()), ["fc.weight"], "here: must be a mapping, not ['fc.weight']"),
        (parameters, [], "here: is empty; it must name parameters"),
        (parameters, ["fc.weigth"], "here[0]: 'fc.weigth' matches no parameter. Did you mean 'fc.weight'? The network has 10"),
        (parameters, [7], "here[0]: must be the name or pattern of parameters, not 7"),
        (parameters, ["x" * 201], "here[0]: must be the name or pattern of parameters, not 'xxx"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place_and_what_would_fit(reader, value, message):
    with pytest.raises(UserError) as refusal:
        reader(value, place())
    assert str(refusal.value).startswith(message)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert number()("1e-4", place()) == 1e-4
    assert number(least=0, most=2)(2, place()) == 2.0


@dataclass
class Thing:
    size: int = option(integer(1))
    mode: str = option(choice("a", "b"), "a")

    def __post_init__(self) -> None:
        if self.size == 13:
            raise UserError("not 13")


def test_build_checks_names_what_is_missing_and_what_the_instance_itself_refuses():
    assert build(Thing, {"size": 2}, place()) == Thing(2, "a")
    assert build(Thing, {"size": 2, "old": [1]}, place(), ignored=["old"]) == Thing(2)
    for values, message in (
        ({"size": 2, "mod": "a"}, "here: unknown argument 'mod'. Did you mean 'mode'? Valid: size, mode"),
        ({"mode": "a"}, "here: 'size' is missing"),
        (None, "here: 'size' is missing"),
        ({"size": 13}, "here: not 13"),
        ({"size": 0}, "here.size: is 0; it must be at least 1"),
        ([], "here: must be a mapping, not []"),
        ({"a\nb\x00": 1}, "here: unknown argument 'a b\\x00'. Valid: size, mode"),
    ):
        with pytest.raises(UserError) as refusal:
            build(Thing, values, place())
        assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("fc.weight", 1),
        ("module.fc.weight", 1),
        ("fc.module.weight", 1),
        ("_orig_mod.module.fc.weight", 1),
        ("layer1.*", 4),
        ("module.layer1.*", 4),
        ("layer[12].0.conv?.weight", 4),
        ("*", 9),  # all but the bias
        ("*.weight", 9),
        (r"layer\d+\.0\.conv1\.weight", 2),
        (r"module\.layer1.*", 4),
        (r"(layer1|layer2)\.(0|1)\.conv1\.weight", 4),
        (r"fc\.(weight|bias)", 2),
    ],
)
def test_a_pattern_matches_names_with_and_without_module_as_in_a_shell_and_as_an_expression(pattern, count):
    at = place()
    found = match(pattern, at)
    assert len(found) == count
    assert at.matches == {"here": found}


def test_names_of_a_network_inside_dataparallel_are_found_by_plain_names_too():
    wrapped = {f"module.{name}": dims for name, dims in NAMES.items()}
    assert match("module.fc.weight", place(wrapped)) == ["module.fc.weight"]
    assert match("fc.weight", place(wrapped)) == ["module.fc.weight"]
    assert match("f?.weight", place(wrapped)) == ["module.fc.weight"]
    assert match(r"(fc|head)\.weight", place(wrapped)) == ["module.fc.weight"]
    found = by_parameter(number())({"layer1.0.conv1.weight": 2, "layer1.*": 1}, place(wrapped))
    assert found["module.layer1.0.conv1.weight"] == 2
    assert found["module.layer1.1.conv1.weight"] == 1


def test_a_name_goes_before_a_pattern_a_star_takes_the_rest_and_two_patterns_for_one_parameter_are_refused():
    read = by_parameter(number())
    at = place()
    found = read({"layer1.*": 1, "module.layer1.0.conv1.weight": 2, "*": 3}, at)
    assert found["layer1.0.conv1.weight"] == 2
    assert found["layer1.1.conv2.weight"] == 1
    assert found["fc.weight"] == 3
    assert "fc.bias" not in found
    assert list(found) == [name for name in NAMES if name in found]  # in the network's order
    assert len(at.matches["here.*"]) == 5  # four of layer2, and fc.weight
    with pytest.raises(UserError, match=r"'layer1\.\*' and '\*conv1\.weight' both match layer1\.0\.conv1\.weight"):
        read({"layer1.*": 1, "*conv1.weight": 2}, place())
    with pytest.raises(UserError, match=r"'fc\.weight' and 'module\.fc\.weight' both match fc\.weight"):
        read({"fc.weight": 1, "module.fc.weight": 2}, place())


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+x",
        "(.*)*x",
        "((a*)b*)*x",
        "(a|a)*x",
        "(a|aa)+x",
        "(.*a){20}x",
        "((a|b)c)+x",
        ".*.*.*.*.*.*.*.*x",
        "a?" * 30 + "a" * 30,
        "(a|a)" * 30 + "x",
        "(?:a{1,200}){1,200}x",
        "(?=(a+)+)x",
        r"([^.]+\.)+x",
    ],
)
def test_an_expression_that_could_take_very_long_is_refused_at_once(pattern):
    names = {"a" * 40: 2, "layer1.0.downsample.0.weight" * 2: 4}
    start = time.process_time()
    with pytest.raises(UserError, match="as a regular expression it may take very long"):
        match(pattern, place(names))
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize("pattern", [".*a.*b.*c.*x", "(a|b|c)(d|e).*.*x", "(", "[", "[[a]x", "(?P<n", "a{99999999999}", "(?i)(?i)x", r"\1"])
def test_what_matches_nothing_or_is_no_expression_ends_soon_in_one_line(pattern):
    names = {"ab" * 20 + str(i): 2 for i in range(200)}
    start = time.process_time()
    with pytest.raises(UserError, match="matches no") as refusal:
        match(pattern, place(names))
    assert time.process_time() - start < 2.0
    assert str(refusal.value).isprintable()


def test_values_are_shown_short_and_on_one_line():
    assert shown(None) == "nothing"
    assert shown({"a": 1}) == "a mapping"
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 100) == "'" + "x" * 59 + "..."


def bomb(levels, width=10):
    """Return a YAML of a few lines that stands for width ** levels values."""
    lines = ["a0: &a0 [x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "values with its aliases written out; at most 100,000 are read"),
        (
            "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]}}\n" for i in range(8)),
            "at most 100,000",
        ),
        ("a: &a [*a]", "an alias refers to what it stands in"),
        ("a: &a {b: {c: *a}}", "an alias refers to what it stands in"),
        ("a: &a {<<: *a}", "an alias refers to what it stands in"),
        ("a: " + "[" * 45 + "]" * 45, "46 levels deep; at most 40 are read"),  # the mapping and 45 lists
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)), "62 levels deep"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: !!bool perhaps", "not valid YAML"),
        ("a:\n  b:\n  -\ufeff 1\n  - x", r"-\\ufeff 1"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!map x", "not valid YAML"),
        ("a: 0x" + "f" * 2000, "a number of 8000 bits"),
        ("? !!timestamp 2001-01-01\n: 1\n? !!timestamp 2001-01-01\n: 2", "the key '2001-01-01' stands twice"),
        (".5: 1\n0.5: 2", "the key '0.5' stands twice"),
        ("- a\n- b", "must hold a mapping, not list"),
        ("abc", "must hold a mapping, not str"),
    ],
)
def test_a_file_that_would_explode_or_never_end_is_refused_in_one_line_and_at_once(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(UserError, match=message) as refusal:
        read_yaml(path, "schedule")
    assert time.process_time() - start < 3.0
    assert str(refusal.value).isprintable()


def test_a_few_aliases_are_read_as_ever(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(bomb(3, 3))
    assert read_yaml(path, "schedule")["a2"] == [[["x", "x"]] * 3] * 3
