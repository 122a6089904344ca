"""Tests of the row: its key, its checks, its way through JSON."""

from __future__ import annotations

import dataclasses
import json
import pickle  # the workers' way
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.registry import BadInput
from bnbench.study import trial as trial_module
from bnbench.study.trial import Trial, trial_from

FIELDS = [f.name for f in dataclasses.fields(Trial)]


def test_keys_stay_what_they_are() -> None:
    """Whoever changes a default or the way of hashing must raise ROW_VERSION, and then these keys."""
    assert Trial().key == "710fc9751ae52830"
    row = Trial(model="cnn", norm="group", norm_options={"num_groups": 4}, lr=1, seed=3, data_seed=3,
                score_on="test")  # fmt: skip
    assert row.key == "9c5eea1095497cef"


def test_the_key_reads_only_what_differs_from_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {name: getattr(Trial(), name) for name in FIELDS}
    assert Trial(**defaults).key == Trial().key
    assert Trial(**defaults).changed() == {}
    before = Trial().key
    monkeypatch.setattr(trial_module, "ROW_VERSION", trial_module.ROW_VERSION + 1)
    assert Trial().key != before


ANOTHER = {
    "data": "digits", "data_options": {"a": 1}, "data_seed": 1, "n_train": 10, "n_eval": 10,
    "label_noise": 0.1,
    "augment": "crop-flip", "model": "cnn", "model_options": {"width": 8}, "norm": "layer",
    "norm_options": {"eps": 0.1}, "reparam": "weight_norm", "order": "act-norm", "activation": "tanh",
    "last_norm_options": {"gamma_init": 0.5}, "logit_scale": 0.5, "gamma_decay": 0.1,
    "until_train_nll": 0.3, "probes": {"rank": {"steps": [0]}}, "repeat": 1, "alone": True,
    "dropout": 0.1, "dropout_at": "last", "init": "xavier", "init_scale": 2.0, "bias_init": 0.5,
    "optimizer": "sgd", "lr": 0.2, "momentum": 0.5, "weight_decay": 0.1, "decay_norm": True,
    "schedule": "constant", "warmup": 0.5, "clip_norm": 1.0, "adaptive_clip": 0.1,
    "label_smoothing": 0.1, "batch_size": 32,
    "steps": 1, "seed": 1, "score_on": "test", "curve_points": 3, "recalibration": "precise", "devices": 2,
    "num_nodes": 2, "precision": "64-true", "backend": "eager",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_counts_in_the_key(name: str) -> None:
    changed = Trial(**{name: ANOTHER[name]})
    if name == "optimizer":  # there is only one so far
        assert changed == Trial()
    else:
        assert changed.key != Trial().key
        assert changed.changed() == {name: ANOTHER[name]}
    assert trial_from(json.loads(json.dumps(changed.as_dict()))) == changed


def test_a_whole_number_in_a_float_field_is_the_same_row() -> None:
    assert Trial(lr=1).key == Trial(lr=1.0).key
    assert Trial(weight_decay=-0.0, bias_init=-0.0).key == Trial(weight_decay=0, bias_init=0).key
    assert type(Trial(lr=1).lr) is float
    assert Trial(bias_init=0).key != Trial(bias_init="zero").key


def test_options_are_compared_as_numbers_whatever_their_order() -> None:
    row = Trial(norm_options={"a": 1.0, "b": [2.0, {"c": -0.0, "d": 0.5}]})
    same = Trial(norm_options={"b": [2, {"d": 0.5, "c": 0}], "a": 1})
    assert row == same and row.key == same.key and hash(row) == hash(same)
    assert Trial(norm_options={"a": True}) != Trial(norm_options={"a": 1})
    assert Trial(norm_options={"a": (1, 2)}) == Trial(norm_options={"a": [1, 2]})
    assert Trial(norm_options={"eps": 1e300}).norm_options == {"eps": 1e300}


def test_a_repetition_joins_the_training_seed_unless_it_is_the_first() -> None:
    assert Trial(seed=3).training_seed == (3, "val")
    seeds = [Trial(seed=s, score_on=on, repeat=r).training_seed for s in (0, 1) for on in ("val", "test")
             for r in (0, 1, 2)]  # fmt: skip
    assert len(set(seeds)) == 12


def test_options_are_a_copy() -> None:
    options: dict[str, Any] = {"sizes": [1]}
    row = Trial(model_options=options)
    options["sizes"].append(2)
    assert row.model_options == {"sizes": [1]}
    row.as_dict()["model_options"]["new"] = 1
    assert row.model_options == {"sizes": [1]}


def test_a_row_crosses_to_a_worker() -> None:
    row = Trial(norm="group", norm_options={"num_groups": 4})
    assert pickle.loads(pickle.dumps(row)) == row


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nrom": "batch"}, "no field 'nrom'; did you mean 'norm'?"),
        ({"lr": "0.1"}, "lr must be float, not '0.1'"),
        ({"lr": True}, "lr must be float, not True"),
        ({"lr": 0}, "lr must be above 0, not 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number, not nan"),
        ({"lr": 10**400}, "lr must be a finite number"),
        ({"steps": 1.5}, "steps must be int, not 1.5"),
        ({"steps": 0}, "steps must be a whole number of 1 or more, not 0"),
        ({"steps": 2**63}, "steps must be a whole number below 2**63"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, not -1"),
        ({"batch_size": None}, "batch_size must be int, not None"),
        ({"n_train": 0}, "n_train must be 1 or more, or None, not 0"),
        ({"n_eval": 0}, "n_eval must be 1 or more, or None, not 0"),
        ({"decay_norm": 1}, "decay_norm must be bool, not 1"),
        ({"norm": ["batch"]}, "norm must be str, not ['batch']"),
        ({"reparam": 3}, "reparam must be str or None, not 3"),
        ({"bias_init": None}, "bias_init must be str or float, not None"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"warmup": 1.01}, "warmup must be between 0 and 1"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more, not -1.0"),
        ({"curve_points": -1}, "curve_points must be 0 or more, not -1"),
        ({"gamma_decay": -0.1}, "gamma_decay must be 0 or more, not -0.1"),
        ({"logit_scale": 0}, "logit_scale must be above 0, not 0.0"),
        ({"until_train_nll": 0}, "until_train_nll must be above 0, or None, not 0.0"),
        ({"repeat": -1}, "repeat must be a whole number of 0 or more, not -1"),
        ({"last_norm_options": "eps"}, "last_norm_options must be a mapping of option names to values"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, or None, not 0.0"),
        ({"schedule": "cosin"}, "schedule cannot be 'cosin'; did you mean 'cosine'?"),
        ({"score_on": "tset"}, "score_on cannot be 'tset'; did you mean 'test'?"),
        ({"norm_options": None}, "norm_options must be a mapping of option names to values, not None"),
        ({"norm_options": {1: 2}}, "norm_options must be a mapping of option names to values, not {1: 2}"),
        ({"norm_options": {"a": float("inf")}}, "norm_options must hold plain finite JSON values"),
        ({"norm_options": {"a": object}}, "norm_options must hold plain finite JSON values"),
        ([], "a trial is a JSON object of field names and values, not list"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values: Any, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        trial_from(values, "t.json")
    assert str(caught.value).startswith("t.json") and said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_replace_refuses_unknown_fields() -> None:
    assert Trial().replace(lr=1).lr == 1.0
    with pytest.raises(BadInput, match="no field 'weight_decy'; did you mean 'weight_decay'"):
        Trial().replace(weight_decy=1)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(["batch", "val", "test", "constant", "zero", "precise", "64-true"])
NUMBERS = st.integers(1, 2**70) | st.floats(0, 1) | st.just(10**400)


@given(st.dictionaries(st.sampled_from([*FIELDS, "nrom"]), PLAIN | WORDS | NUMBERS, max_size=4) | PLAIN)
def test_any_json_is_a_trial_or_explained(values: Any) -> None:
    try:
        made = trial_from(values)
    except BadInput as error:
        assert "\n" not in str(error)
        return
    for again in (made.as_dict(), made.changed()):
        back = trial_from(json.loads(json.dumps(again, allow_nan=False)))
        assert back == made and back.key == made.key and back.as_dict() == made.as_dict()
        assert {k: type(v) for k, v in back.as_dict().items()} == {
            k: type(v) for k, v in made.as_dict().items()
        }


@given(st.dictionaries(st.sampled_from(FIELDS), st.just(0) | PLAIN | WORDS | NUMBERS, max_size=3))
def test_equal_values_give_equal_keys(values: dict[str, Any]) -> None:
    """Integers and floats of one value are one row, so that a file and a program name the same thing."""
    floats = json.loads(
        json.dumps(values), parse_int=lambda text: float(text) if len(text) < 15 else int(text)
    )
    try:
        made = Trial(**values)
        other = Trial(**{k: v if type(values[k]) is int else floats[k] for k, v in values.items()})
    except BadInput:
        return
    assert made.key == other.key
