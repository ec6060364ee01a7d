"""dvc.lock is read fast, and as YAML 1.2, which DVC writes."""

from conftest import ROOT
from ruamel.yaml import YAML

from workflow.runtime import dvc_lock

STAGES = """
schema: '2.0'
stages:
  train@one-1:
    cmd: train
    deps: [{path: code.txt, hash: md5, md5: "0123", size: 5}, {path: far, hash: etag, etag: abc}]
    params:
      params.yaml: {rate: 1e-05, warm: 1.0e-3, on: on, no: "no", steps: 10, flag: true, none: null, more: {a: -1.5}}
    outs: [{path: results/w, md5: 0456.dir}]
"""


def test_numbers_and_texts_are_those_of_yaml_1_2():
    (stage,) = dvc_lock.parse(STAGES).values()
    assert stage.deps == {"code.txt": "0123", "far": None} and stage.outs == {"results/w": "0456.dir"}
    assert stage.params == {
        "rate": 1e-05, "warm": 0.001, "on": "on", "no": "no", "steps": 10, "flag": True, "none": None, "more": {"a": -1.5},
    }  # fmt: skip


def test_a_studys_lock_is_read_as_the_slow_reader_reads_it():
    text = (ROOT / "results/studies/reference_study/dvc.lock").read_text(encoding="utf-8")
    slow = YAML(typ="safe", pure=True).load(text)["stages"]
    fast = dvc_lock.parse(text)
    assert list(fast) == list(slow)
    for name, stage in slow.items():
        assert fast[name].params == stage.get("params", {}).get("params.yaml", {})
        assert fast[name].outs == {out["path"]: out["md5"] for out in stage["outs"]}


def test_every_difference_is_named():
    stages = dvc_lock.parse(STAGES)
    params = {
        "rate": 2e-05,
        "warm": 0.001,
        "on": "on",
        "no": "no",
        "steps": 10,
        "flag": True,
        "more": {"a": -1.5},
    }
    found = list(dvc_lock.differences(stages, params, {"code.txt": "0123", "results/w": "0789.dir"}.get))
    assert [(one.kind, one.name, one.missing) for one in found][:2] == [
        ("out", "results/w", False), ("dep", "far", True),
    ]  # fmt: skip
    assert ("param", "rate") in [(one.kind, one.name) for one in found]
