from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.files.yaml_files import read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' stands twice"),
        ("0: x\n0: y", "the key '0' stands twice"),
        ("a: !!python/object/apply:os.system ['touch hacked']", "not valid YAML"),
        ("? [a, b]\n: 1", "not valid YAML"),  # a key that can't be one
        ("", "must hold a mapping, not nothing"),
        ("&a [*a]", "must hold a mapping, not list"),
        ("a: [1, 2", "not valid YAML"),
    ],
)
def test_what_is_no_plain_mapping_is_refused_in_one_line_and_nothing_runs(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        read_yaml(path, "data")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "hacked").exists()


def test_merge_keys_and_nested_mappings_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nmore:\n  <<: *base\n  b: 3\n")
    assert read_yaml(path, "data") == {"base": {"a": 1, "b": 2}, "more": {"a": 1, "b": 3}}
