"""What a configuration says otherwise than a saved one."""

from __future__ import annotations

import json
from typing import Any

from megaloop.config import Config
from megaloop.config.changes import ChangedSetting, changed_settings

VALUES: dict[str, Any] = {
    "depth": 8,
    "data": {"sources": [{"path": "none"}]},
    "growth": {"operator": "lidas", "start": 4},
    "train": {"steps": 100, "precision": "fp32"},
}


def config(**sections: Any) -> Config:
    merged = {
        name: {**VALUES.get(name, {}), **values} if isinstance(values, dict) else values
        for name, values in sections.items()
    }
    return Config.model_validate(VALUES | merged)


def saved(one: Config) -> dict[str, Any]:
    """As a manifest has it."""
    return json.loads(json.dumps(one.model_dump(mode="json")))


def test_a_configuration_is_its_own_whatever_its_sections_hold() -> None:
    for one in (config(), config(depth="2-2x3-2", growth=None, loop={"injection": "add"}), config(growth=None)):
        assert changed_settings(saved(one), one) == []


def test_settings_that_decide_the_curve_are_told_by_their_keys() -> None:
    now = config(
        model={"document_masking": True},
        optimizer={"beta2": 0.99},
        schedule={"kind": "cosine"},
        train={"precision": "bf16"},
    )
    assert changed_settings(saved(config()), now) == [
        ChangedSetting("model.document_masking", False, True),
        ChangedSetting("optimizer.beta2", 0.95, 0.99),
        ChangedSetting("schedule.kind", "trapezoid", "cosine"),
        ChangedSetting("train.precision", "fp32", "bf16"),
    ]


def test_a_section_that_appears_is_one_change() -> None:
    before, now = config(growth=None), config()
    (change,) = changed_settings(saved(before), now)
    assert (change.key, change.before, change.now) == ("growth", None, saved(now)["growth"])


def test_what_does_not_decide_the_curve_is_not_told() -> None:
    now = config(
        parallel={"pp": 2},
        train={"steps": 200, "micro_batch": 2},
        checkpoint={"every": 5},
        logging={"every": 7},
        name="other",
    )
    assert changed_settings(saved(config()), now) == []


def test_what_an_earlier_version_did_not_have_counts_as_unchanged() -> None:
    before = saved(config())
    del before["model"]["document_masking"], before["loop"], before["train"]
    assert changed_settings(before, config(model={"document_masking": True})) == []
    assert changed_settings({}, config()) == []


def test_a_damaged_section_is_told_as_it_is() -> None:
    assert changed_settings({"optimizer": 3, "train": []}, config()) == [
        ChangedSetting("optimizer", 3, saved(config())["optimizer"])
    ]
