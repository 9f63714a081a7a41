"""Configs in files: what is written is read again, and everything else is refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pab_kernels.rules.config import MODULE_KINDS, Broadcast, PABConfig
from pab_kernels.rules.formats import (
    load_config,
    named_config,
    save_config,
)

_RANGES = st.integers(1, 9)
_LAYERS = st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=4)
_PAIRS = {
    "fraction": st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True),
    "step": st.lists(st.integers(0, 60), min_size=2, max_size=2, unique=True),
    "timestep": st.lists(st.integers(0, 1000) | st.floats(0, 1000), min_size=2, max_size=2, unique=True),
}


@st.composite
def _rules(draw: st.DrawFn) -> Broadcast:
    unit = draw(st.sampled_from(sorted(_PAIRS)))
    if unit != "fraction" and draw(st.booleans()):
        return Broadcast(
            draw(_RANGES),
            unit=unit,
            layers=draw(_LAYERS),
            at=draw(st.lists(st.integers(0, 999), min_size=1, max_size=4)),
        )
    return Broadcast(draw(_RANGES), tuple(sorted(draw(_PAIRS[unit]))), unit, layers=draw(_LAYERS))


_CONFIGS = st.builds(
    PABConfig,
    **{kind: st.none() | _RANGES | _rules() for kind in MODULE_KINDS},
    model=st.none() | _RANGES | _rules().map(lambda rule: dataclasses.replace(rule, layers=None, reuse="forecast")),
    rules=st.lists(st.tuples(st.sampled_from(MODULE_KINDS), _rules()), max_size=3),
    cache_dtype=st.sampled_from([None, "float8_e4m3fn", "int8", "int4"]),
    cache_point=st.sampled_from(["pre_gate", "post_gate", "unprojected"]),
)


def _refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^[^\\n]*{re.escape(message)}[^\\n]*$")


# Files


@pytest.mark.parametrize("ending", [".json", ".yaml", ".yml", ".YAML"])
@given(config=_CONFIGS)
@settings(max_examples=60)
def test_a_config_survives_its_file(ending: str, config: PABConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("yaml")
    path = save_config(config, tmp_path_factory.getbasetemp() / f"config{ending}")
    assert load_config(path) == config


def test_a_file_is_written_as_people_write_it(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text(
        "spatial: 2\nmlp:\n  range: 2\n  window: [0.3, 0.8]\nrules:\n- [cross, {range: 3, layers: [0, 1]}]\n"
    )
    config = PABConfig(spatial=2, mlp=Broadcast(2, (0.3, 0.8)), rules=(("cross", Broadcast(3, layers=(0, 1))),))
    assert load_config(str(tmp_path / "c.yaml")) == config
    (tmp_path / "c.json").write_text('{"spatial": 2, "cache_dtype": "int8"}')
    assert load_config(tmp_path / "c.json") == PABConfig(spatial=2, cache_dtype="int8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "{", "c.json: Expecting property name"),
        ("c.yaml", "spatial: [2", "c.yaml: while parsing a flow sequence"),
        ("c.yaml", "", "c.yaml: PABConfig is read from a dict, got None"),
        ("c.yaml", "spatail: 2", "c.yaml: PABConfig has no field 'spatail'; it has spatial, temporal, cross"),
        ("c.json", '{"spatial": 0}', "c.json: range must be a whole number of at least 1, got 0"),
        ("c.json", '{"spatial": {"window": [0, 1]}}', "c.json: range must be a whole number of at least 1, got None"),
        ("c.json", b"\xff\xfe", "c.json: 'utf-8' codec can't decode"),
        ("c.toml", "spatial = 2", "c.toml: a config file ends in .json, .yaml or .yml, got '.toml'"),
        ("config", "{}", "a config file ends in .json, .yaml or .yml, got no ending"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    name: str, text: str | bytes, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with _refused(ValueError, message):
        load_config(tmp_path / name)


@pytest.mark.parametrize("ending", [".json", ".yaml"])
def test_what_a_config_was_found_by_is_written_beside_it_and_left_out_of_it(ending: str, tmp_path: Path) -> None:
    config = PABConfig(model=Broadcast(at=(0, 1, 3), unit="step", reuse="forecast"))
    path = save_config(config, tmp_path / f"found{ending}", calibration={"steps": 12, "prompts": ["a red circle"]})
    assert "a red circle" in path.read_text() and load_config(path) == config
    assert path.read_text().startswith("# Found by pab.calibrate") is (ending == ".yaml")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with _refused(FileNotFoundError, "there is no file"):
        load_config(tmp_path / "c.json")


_NESTED = 100_000
_ALIASES = "rules:\n- &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"- &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "c.json",
            '{"spatial": {"range": 2, "window": [0.1, NaN]}}',
            "c.json: NaN is not a number of JSON; they are finite",
        ),
        (
            "c.json",
            '{"cross": {"range": 2, "unit": "step", "window": [-Infinity, 3]}}',
            "c.json: -Infinity is not a number of JSON",
        ),
        (
            "c.json",
            '{"cross": {"range": 2, "unit": "step", "window": [0, 1e999]}}',
            "c.json: 1e999 is not a number of JSON",
        ),
        (
            "c.yaml",
            "cross: {range: 2, unit: step, window: [0, .inf]}",
            "c.yaml: a window's ends must be at most 2**63 - 1",
        ),
        (
            "c.yaml",
            "cross: {range: 2, window: [.nan, 1]}",
            "c.yaml: window must be two numbers with lo < hi, got [nan, 1]",
        ),
        ("c.json", '{"cross": {"range": 2, "range": 3}}', "c.json: 'range' occurs twice"),
        ("c.yaml", "spatial: 2\ncross: 3\nspatial: 4\n", "c.yaml: 'spatial' occurs twice"),
        ("c.json", '{"rules": ' + "[" * _NESTED, "c.json: it is nested too deep"),
        ("c.yaml", "rules: " + "[" * 60_000, "c.yaml: it is nested deeper than 32 levels"),
        ("c.yaml", "".join(f"{' ' * i}mlp:\n" for i in range(50)), "c.yaml: it is nested deeper than 32 levels"),
        ("c.yaml", _ALIASES, "c.yaml: it has more than 10,000 values, counting those of an alias at each use"),
        ("c.yaml", "rules: &r [[spatial, *r]]", "c.yaml: the alias *r refers to what contains it"),
        ("c.yaml", "mlp: &m\n  <<: *m\n  range: 2\n", "c.yaml: the alias *m refers to what contains it"),
        ("c.json", '{"mlp": ' + "9" * 4000 + "}", "c.json: range must be at most 2**63 - 1, got 999"),
        ("c.json", '{"mlp": ' + "9" * 9000 + "}", "c.json: Exceeds the limit"),
        ("c.yaml", "mlp: 0x" + "f" * 9000, "c.yaml: range must be at most 2**63 - 1, got a number of very many digits"),
        (
            "c.json",
            '{"mlp": {"range": 2, "layers": [' + "7, " * 5000 + "7]}}",
            "c.json: layers lists at most 4,096 numbers, got [7, 7",
        ),
        ("c.json", '{"' + "x" * 10_000 + '": 1}', "c.json: PABConfig has no field 'xxx"),
        ("c.json", " " * 2**20 + "{}", "c.json has more than 1,048,576 bytes; it holds no config"),
        (
            "c.yaml",
            "#" * 2**17,
            "c.yaml: it has 131,072 characters; at most 65,536 are supported in YAML: write a longer config as JSON",
        ),
        (
            "c.json",
            b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41\xff\xd8",
            "'utf-8' codec can't decode byte 0xff",
        ),
        ("c.yaml", b"\x89PNG\r\n\x1a\n\x00", "'utf-8' codec can't decode byte 0x89"),
        ("c.yaml", "mlp: !!python/object/apply:os.abort []", "c.yaml: could not determine a constructor"),
        ("c.yaml", "mlp: 2000-13-40", "c.yaml: month must be in 1..12"),
    ],
)
def test_a_hostile_file_is_refused_in_one_short_line(
    name: str, text: str | bytes, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with _refused(ValueError, message) as refused:
        load_config(tmp_path / name)
    assert len(str(refused.value)) < 1000 + len(str(tmp_path))


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text(
        "spatial: &s {range: 2, window: [0.2, 0.8]}\ntemporal: *s\ncross: {<<: *s, range: 6}\n"
    )
    rule = Broadcast(2, (0.2, 0.8))
    assert load_config(tmp_path / "c.yaml") == PABConfig(spatial=rule, temporal=rule, cross=Broadcast(6, (0.2, 0.8)))


def test_a_mark_of_utf_8_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"spatial": 3}')
    assert load_config(tmp_path / "c.json") == PABConfig(spatial=3)


def _link(path: Path, target: str | Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder.mkdir() or folder, ValueError, "c.yaml is a folder, not a file"),
        (lambda folder: os.mkfifo(folder) or folder, ValueError, "c.yaml is a pipe, a device or a socket, not a file"),
        (lambda folder: _link(folder, "/dev/zero"), ValueError, "c.yaml is a pipe, a device or a socket, not a file"),
        (lambda folder: _link(folder, folder), ValueError, "c.yaml cannot be read: Too many levels of symbolic links"),
        (lambda folder: _link(folder, "nowhere"), FileNotFoundError, "there is no file"),
        (lambda folder: folder / "c.yaml", FileNotFoundError, "there is no file"),
        (
            lambda folder: folder.write_text("") and folder or folder / "c.yaml",
            ValueError,
            "cannot be read: Not a directory",
        ),
        (lambda folder: "n" * 5000 + ".yaml", ValueError, "cannot be read: File name too long"),
        (lambda folder: "n/" * 3000 + "c.json", ValueError, "cannot be read: File name too long"),
        (lambda folder: "c\0.json", ValueError, "no file can be named 'c\\x00.json'"),
        (lambda folder: "\udfff.json", ValueError, "no file can be named '\\udfff.json'"),
        (lambda folder: "", ValueError, "no file can be named ''"),
        (lambda folder: None, ValueError, "a path is a string or a pathlib.Path, got None"),
        (lambda folder: b"c.json", ValueError, "a path is a string or a pathlib.Path, got b'c.json'"),
        (lambda folder: 7, ValueError, "a path is a string or a pathlib.Path, got 7"),
    ],
)
@pytest.mark.parametrize("read", [load_config, named_config])
def test_what_is_no_file_is_refused_at_once(
    make: Any, error: type[Exception], message: str, read: Any, tmp_path: Path
) -> None:
    given = make(tmp_path / "c.yaml")
    with _refused(error, message) as refused:
        read(given)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_a_long_name_that_is_no_file_is_no_preset() -> None:
    with _refused(ValueError, "there is no preset 'ppp"):
        named_config("p" * 5000)


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_config(PABConfig(spatial=2), tmp_path / "c.json")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*c.json'"):
        save_config(PABConfig(spatial=3), path)
    assert load_config(path) == PABConfig(spatial=2) and list(tmp_path.iterdir()) == [path]


def test_without_pyyaml_json_works_and_yaml_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert load_config(save_config(PABConfig(spatial=2), tmp_path / "c.json")) == PABConfig(spatial=2)
    with _refused(
        ModuleNotFoundError, "writing YAML files needs the package yaml, which is not installed: pip install"
    ):
        save_config(PABConfig(), tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()
    (tmp_path / "c.yaml").write_text("spatial: 2")
    with _refused(ModuleNotFoundError, "reading YAML files needs the package yaml"):
        load_config(tmp_path / "c.yaml")
