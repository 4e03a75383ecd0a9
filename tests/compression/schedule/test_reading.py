from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from compression.schedule.loop import ScheduledLoop
from compression.schedule.reading import parse_schedule, read_schedule
from compression.schedule.timeline import warnings
from compression.schedule.windows import read_window
from utils.errors import UserError
from utils.options import Place

NAMES = {"conv1.weight": 4, "conv1.bias": 1, "layer1.0.conv1.weight": 4, "layer1.0.conv2.weight": 4, "fc.weight": 2, "fc.bias": 1}

SENSITIVITY = """
    pruners:
      s: {class: SensitivityPruner, sensitivities: {fc.weight: 0.5}}
    policies:
      - pruner: {instance_name: s}
        epochs: [0]
"""


def read(tmp_path, text, names=NAMES):
    path = tmp_path / "s.yaml"
    path.write_text(textwrap.dedent(text))
    return read_schedule(path, names)


def refusal(tmp_path, text):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    message = str(error.value)
    assert message.isprintable()
    assert message.startswith(f"{tmp_path / 's.yaml'}")
    return message.removeprefix(f"{tmp_path / 's.yaml'}").removeprefix(": ")


def with_pruner(arguments, policy="epochs: [0]"):
    return f"pruners:\n  p: {{{arguments}}}\npolicies:\n  - pruner: {{instance_name: p}}\n    {policy}\n"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("module.layer1.0.conv1.weight", ["layer1.0.conv1.weight"]),
        ("layer1.module.0.conv1.weight", ["layer1.0.conv1.weight"]),
        ("layer1.*", ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]),
        (r"layer1\.0\.conv\d\.weight", ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]),
        ("*", ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "fc.weight"]),
    ],
)
def test_weights_are_named_with_and_without_module_by_wildcard_by_expression_and_all(tmp_path, name, found):
    schedule = read(tmp_path, with_pruner(f"class: SensitivityPruner, sensitivities: {{'{name}': 0.5}}"))
    assert list(schedule.entries[0].instance.sensitivities) == found
    assert schedule.matches == {f"pruners.p.sensitivities.{name}": found}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_pruner("class: SensitivityPruner, sensitivities: {layer1.0.conv3.weight: 1}"),
         "pruners.p.sensitivities.layer1.0.conv3.weight: 'layer1.0.conv3.weight' matches no parameter. "
         "Did you mean 'layer1.0.conv2.weight'? The network has 6"),
        (with_pruner("class: SensitivityPruner, sensitivities: {'*conv1.weight': 1, 'layer1.*': 2}"),
         "pruners.p.sensitivities: '*conv1.weight' and 'layer1.*' both match layer1.0.conv1.weight"),
        ("pruner:\n  p: {}\npolicies: []",
         "unknown section 'pruner'. Did you mean 'pruners'? Valid: version, pruners, regularizers, quantizers, lr_schedulers, "
         "extensions, distillers, policies"),
        (with_pruner("class: SensitivityPrunner, sensitivities: {fc.weight: 1}"),
         "pruners.p.class: unknown pruner 'SensitivityPrunner'. Did you mean 'SensitivityPruner'? Valid: Magnitude"),
        (with_pruner("sensitivities: {fc.weight: 1}"), "pruners.p: 'class' is missing"),
        (with_pruner("class: [SensitivityPruner]"), "pruners.p.class: unknown pruner ['SensitivityPruner']."),
        (with_pruner("class: SensitivityPruner, sensitivity: {fc.weight: 1}"),
         "pruners.p: unknown argument 'sensitivity'. Did you mean 'sensitivities'? Valid: sensitivities"),
        (with_pruner("class: SensitivityPruner, sensitivities: {fc.weight: -1}"),
         "pruners.p.sensitivities.fc.weight: is -1; it must be at least 0"),
        (with_pruner("class: SensitivityPruner, sensitivities: {fc.weight: 1}", "epoch: [0]"),
         "policies[0]: unknown key 'epoch'. Did you mean 'epochs'?"),
        (SENSITIVITY.replace("instance_name: s}", "instance_name: t}"), "policies[0].pruner.instance_name: no 't' under pruners. There: s"),
        (SENSITIVITY.replace("instance_name: s}", "instance: s}"),
         "policies[0].pruner: unknown key 'instance'. Did you mean 'instance_name'?"),
        (SENSITIVITY.replace("instance_name: s}", "args: {}}"), "policies[0].pruner: 'instance_name' is missing"),
        (SENSITIVITY.replace("instance_name: s}", "instance_name: s, args: {keep_masks: true}}"),
         "policies[0].pruner.args: unknown argument 'keep_masks'. Did you mean 'keep_mask'?"),
        (SENSITIVITY.replace("instance_name: s}", "instance_name: s, args: {keep_mask: 1}}"),
         "policies[0].pruner.args.keep_mask: must be true or false, not 1"),
        (SENSITIVITY.replace("- pruner:", "- regularizer: {instance_name: r}\n        pruner:"), "policies[0]: must name one of pruner, "),
        (SENSITIVITY.replace("epochs: [0]", "frequency: 2"), "policies[0]: 'starting_epoch' is missing; give starting_epoch, ending_epoch"),
        (SENSITIVITY.replace("epochs: [0]", "starting_epoch: 2"), "policies[0]: 'ending_epoch' is missing; give starting_epoch"),
        (SENSITIVITY.replace("epochs: [0]", "epochs: [0]\n        ending_epoch: 3"),
         "policies[0]: 'epochs' and 'ending_epoch' exclude each other"),
        (SENSITIVITY.replace("epochs: [0]", "starting_epoch: 3\n        ending_epoch: 3"),
         "policies[0]: ending_epoch 3 is exclusive, so it must be above starting_epoch 3"),
        (SENSITIVITY.replace("epochs: [0]", "epochs: []"), "policies[0].epochs: must be a list, not empty, not []"),
        (SENSITIVITY.replace("epochs: [0]", "epochs: [-1]"), "policies[0].epochs[0]: is -1; it must be at least 0"),
        ("version: 2\n" + textwrap.dedent(SENSITIVITY), "version is 2; this reads version 1"),
        ("version: 1", "'policies' must be a list that says what acts when, not nothing"),
        ("policies: {}", "'policies' must be a list that says what acts when, not a mapping"),
        ("policies: []", "'policies' must be a list that says what acts when, not []"),
        ("policies: [a]", "policies[0]: must be a mapping, not 'a'"),
        ("", " must hold a mapping, not nothing"),
        ("a: [", " is not valid YAML: while parsing"),
        ("pruners: []\npolicies: [a]", "pruners: must be a mapping, not []"),
        ("pruners: {1: {class: X}}\npolicies: [a]", "pruners.1.class: unknown pruner 'X'."),
        ('pruners: {"a\\nb": {class: X}}\npolicies: [a]', "pruners: the name 'a\\nb' must be one line of at most 100 characters"),
        ("quantizers: {q: {class: DorefQuantizer}}\npolicies: [a]",
         "quantizers.q.class: unknown quantizer 'DorefQuantizer'. Did you mean 'DorefaQuantizer'? Valid: "),
        ("lr_schedulers: {r: {class: ExponentialRL, gamma: 1}}\npolicies: [a]",
         "lr_schedulers.r: unknown learning-rate scheduler 'ExponentialRL'. Did you mean 'ExponentialLR'?"),
        ("lr_schedulers: {r: {class: ExponentialLR, gama: 1}}\npolicies: [a]",
         "lr_schedulers.r: unknown argument 'gama'. Did you mean 'gamma'?"),
        ("extensions: {e: {class: FilterRemoval}}\npolicies: [a]", "extensions.e.class: unknown extension 'FilterRemoval'. Did you mean"),
        ("distillers: {d: {class: KnowledgeDistillation, temp: 1}}\npolicies: [a]", "distillers.d: unknown argument 'temp'."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_place_its_value_and_the_nearest_match(tmp_path, text, message):
    assert refusal(tmp_path, text).startswith(message)


def test_the_same_key_twice_is_refused_at_every_depth(tmp_path):
    doubled = SENSITIVITY.replace("{fc.weight: 0.5}", "{fc.weight: 0.5, fc.weight: 0.6}")
    assert refusal(tmp_path, doubled) == "the key 'fc.weight' stands twice, in lines 3 and 3, with different values"
    assert "the key 'policies' stands twice, in lines 4 and 7" in refusal(tmp_path, SENSITIVITY + "    policies: []\n")
    names = SENSITIVITY.replace("      s: {", "      1: {class: SensitivityPruner, sensitivities: {'*': 1}}\n      '1': {")
    assert refusal(tmp_path, names) == "pruners: the name '1' is used twice"


def test_the_same_key_twice_with_equal_values_is_a_warning(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(textwrap.dedent(SENSITIVITY).replace("{fc.weight: 0.5}", "{fc.weight: 0.5, fc.weight: 0.5}"))
    schedule = read_schedule(path, {"fc.weight": 2})
    assert warnings(schedule, 99)[0] == "warning: the key 'fc.weight' stands twice, in lines 3 and 3, with equal values"


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch hacked']",
        "!!python/object/new:os.system ['touch hacked']",
        "!!python/name:os.system",
        "!own x",
    ],
)
def test_a_tag_that_asks_for_code_is_refused_and_nothing_runs(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    text = f"pruners:\n  p: {tag}\npolicies: []\n"
    assert "is not valid YAML: could not determine a constructor" in refusal(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_two_quantizers_are_refused(monkeypatch):
    from compression.schedule import reading

    monkeypatch.setitem(reading.SECTIONS, "quantizers", reading.Section("quantizer", {"Q": reading.NoOptions}))
    content = {"quantizers": {"a": {"class": "Q"}, "b": {"class": "Q"}}, "policies": [{"quantizer": {"instance_name": "a"}, "epochs": [0]}]}
    with pytest.raises(UserError, match="quantizers: there can be one, not 2"):
        parse_schedule(content, NAMES)
    del content["quantizers"]["b"]
    assert parse_schedule(content, NAMES).of("quantizer")[0].class_name == "Q"


def test_an_old_file_s_injected_and_meaningless_arguments_are_accepted(tmp_path):
    text = """
        version: 1
        pruners:
          p: {class: SensitivityPruner, name: p, model: null, sensitivities: {module.fc.weight: 0.5}}
        lr_schedulers:
          r: {class: StepLR, step_size: 3, gamma: 0.5, last_epoch: -1, optimizer: null, verbose: true}
        extensions:
          e: {class: FilterRemover, thinning_func_str: remove_filters, arch: resnet20_cifar, dataset: cifar10, layer_names: [conv1]}
        policies:
          - lr_scheduler: {instance_name: r}
            starting_epoch: 0
          - pruner: {instance_name: p, args: {levels: null}}
            epochs: [3, 1, 3]
          - extension: {instance_name: e}
            epochs: [4]
    """
    schedule = read(tmp_path, text)
    assert [entry.kind for entry in schedule.entries] == ["pruner", "extension", "lr_scheduler"]  # rates come last
    assert schedule.entries[0].window.epochs == (1, 3)
    assert schedule.entries[2].window.epochs[-1] > 10**5  # to the end of any run
    assert schedule.entries[2].instance.of([0.1], 6) == [[0.1]] * 3 + [[0.05]] * 3 + [[0.025]]


def test_describe_names_every_match_every_window_and_what_is_not_used(tmp_path):
    text = """
        pruners:
          p: {class: SensitivityPruner, sensitivities: {'layer1.*': 0.5, '*': 0.1, '*.bias': 0.2}}
          spare: {class: MagnitudeParameterPruner, thresholds: {'*': 0.5}}
        lr_schedulers:
          r: {class: ExponentialLR, gamma: 0.9}
        policies:
          - pruner: {instance_name: p}
            starting_epoch: 0
            ending_epoch: 5
            frequency: 2
          - lr_scheduler: {instance_name: r}
            starting_epoch: 3
    """
    assert read(tmp_path, text).describe() == [
        "pruner p: SensitivityPruner, epochs 0 to 4, every 2",
        "lr_scheduler r: ExponentialLR, epochs 3 to the end",
        "pruners.p.sensitivities.layer1.* -> layer1.0.conv1.weight, layer1.0.conv2.weight",
        "pruners.p.sensitivities.*.bias -> conv1.bias, fc.bias",
        "pruners.p.sensitivities.* -> conv1.weight, fc.weight",
        "pruners.spare.thresholds.* -> conv1.weight, layer1.0.conv1.weight, layer1.0.conv2.weight ... fc.weight (4)",
        "pruners.spare is described, but no policy uses it",
    ]


def test_gradual_pruning_in_listed_epochs_reaches_its_end():
    """Epochs 0, 1, 4: 0.9 - 0.9 (1 - e/4)^3 = 0, 0.9 (1 - 27/64) = 0.5203125, 0.9 of 20 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 2, bias=False))
    content = {
        "pruners": {"p": {"class": "AutomatedGradualPruner", "initial_sparsity": 0, "final_sparsity": 0.9, "weights": ["0.weight"]}},
        "policies": [{"pruner": {"instance_name": "p"}, "epochs": [0, 1, 4]}],
    }
    loop = ScheduledLoop(content, model, torch.optim.SGD(model.parameters(), lr=0.1), 6, 1, report=lambda line: None)
    found = []
    for epoch in range(6):
        loop.on_epoch_begin(epoch)
        found.append(int((model[0].weight == 0).sum()))
        loop.on_epoch_end()
    assert found == [0, 10, 10, 10, 18, 18]  # floor(10.40625) = 10


def test_a_window_knows_its_last_epoch_alone_and_within_a_run():
    place = Place("here", {}, {})
    window = read_window({"starting_epoch": 1, "ending_epoch": 7, "frequency": 3}, place)
    assert [epoch for epoch in range(9) if window.applies(epoch)] == [1, 4]
    assert (window.first, window.last, window.end, str(window)) == (1, 4, 7, "epochs 1 to 4, every 3")
    assert [window.last_within(epochs) for epochs in (1, 2, 4, 5, 100)] == [-1, 1, 1, 4, 4]
    listed = read_window({"epochs": [5, 0, 5]}, place)
    assert (listed.epochs, listed.end, str(listed)) == ((0, 5), 6, "epochs 0, 5")
    assert [listed.last_within(epochs) for epochs in (0, 1, 5, 6)] == [-1, 0, 0, 5]


@pytest.mark.parametrize(("what", "role"), [("remove_filters", "producer"), ("remove_channels", "reader")])
def test_distillers_structure_remover_is_either_remover(tmp_path, what, role):
    text = f"extensions:\n  e: {{class: StructureRemover, thinning_func_str: {what}, arch: resnet20_cifar, dataset: cifar10}}\n"
    schedule = read(tmp_path, text + "policies:\n  - extension: {instance_name: e}\n    epochs: [1]\n")
    assert schedule.entries[0].instance.role == role


@pytest.mark.parametrize(("kind", "other"), [("FilterRemover", "remove_channels"), ("ChannelRemover", "remove_filters")])
def test_a_remover_that_is_told_to_remove_the_other_is_refused(tmp_path, kind, other):
    text = f"extensions:\n  e: {{class: {kind}, thinning_func_str: {other}}}\n"
    found = refusal(tmp_path, text + "policies:\n  - extension: {instance_name: e}\n    epochs: [1]\n")
    assert f"{kind} and thinning_func_str '{other}' contradict each other" in found


@pytest.mark.parametrize("section", ["network", "rl_lib"])
def test_what_is_not_done_says_why(tmp_path, section):
    assert "is of reinforcement learning (AMC), which is not done here" in refusal(tmp_path, f"{section}: {{}}\n")


def test_words_are_taken_in_any_case_and_inputs_have_overrides_of_their_own(tmp_path):
    text = "quantizers:\n  q: {{class: PostTrainLinearQuantizer, {}}}\npolicies:\n  - quantizer: {{instance_name: q}}\n    epochs: [0]\n"
    assert read(tmp_path, text.format("clip_acts: AVG")).entries[0].instance.clip_acts == "avg"
    quantizer = (
        read(
            tmp_path,
            text.format(
                "inputs_quant_auto_fallback: false, overrides: {conv1: {input_overrides: {0: {from_output: true}}}, "
                "fc: {clip_acts: None, input_overrides: {0: {clip_acts: N_STD, clip_n_stds: 3, bits_activations: 6}}}}"
            ),
        )
        .entries[0]
        .instance
    )
    assert quantizer.overrides == {"conv1": {}, "fc": {"clip_acts": "n_std", "clip_n_stds": 3.0, "bits_activations": 6}}
    message = refusal(tmp_path, text.format("overrides: {'layer.*relu.*': {bits_activations: 4, quantize_inputs: false}}"))
    assert "'quantize_inputs' is not done: the inputs of convolutions and linear layers are quantized here" in message
    assert "has an input 1" in refusal(tmp_path, text.format("overrides: {fc: {input_overrides: {1: {clip_acts: avg}}}}"))


EARLY, LATE = "bits_overrides: {fc: {wts: null, acts: 4}}", "overrides: {fc: {bits_weights: null, bits_activations: 4}}"


@pytest.mark.parametrize("form", [EARLY, LATE])
def test_overrides_of_bits_in_distillers_early_form(tmp_path, form):
    text = f"quantizers:\n  q: {{class: PACTQuantizer, bits_activations: 8, bits_weights: 3, {form}}}\n"
    schedule = read(tmp_path, text + "policies:\n  - quantizer: {instance_name: q}\n    epochs: [0]\n")
    assert schedule.entries[0].instance.overrides == {"fc": {"bits_weights": None, "bits_activations": 4}}
