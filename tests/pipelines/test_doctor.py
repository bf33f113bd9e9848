"""doctor.py: what is missing is named with its mending, and decides how the command ends."""

import json

import pytest
from worldloom.pipelines import doctor as module
from worldloom.pipelines.doctor import Diagnosis, DoctorConfig, Finding, doctor


@pytest.fixture(scope="module")
def diagnosis():
    return doctor(DoctorConfig())


def test_nothing_required_is_missing_where_the_tests_run(diagnosis):
    assert diagnosis.exit_code == 0
    assert str(diagnosis).endswith("all that is required is here")


def test_every_group_is_looked_at_and_the_two_number_formats_are_compared(diagnosis):
    found = {(row.group, row.name): row.found for row in diagnosis.findings}
    assert {group for group, _ in found} == {"versions", "devices", "codecs", "extras", "disk"}
    assert {"torch", "numpy", "x-transformers"} <= {n for group, n in found if group == "versions"}
    assert "times the speed of float32" in found["devices", "bfloat16"]
    assert found["codecs", "h264 encoder"]


def test_everything_that_is_missing_says_how_to_mend_it(diagnosis):
    assert all(row.mend for row in diagnosis.findings if not row.found)


@pytest.mark.parametrize(("required", "code"), [(True, 1), (False, 0)])
def test_only_what_is_required_and_missing_ends_with_1(required, code):
    lost = Finding(group="g", name="part", found="", required=required, mend="fetch it")
    here = Finding(group="g", name="other", found="1.0", required=True)
    for as_json in (False, True):
        sick = Diagnosis(findings=(here, lost), as_json=as_json)
        assert sick.exit_code == code
        assert "fetch it" in str(sick)
    assert json.loads(str(sick))["ok"] == (code == 0)


def test_a_package_that_is_absent_too_old_or_broken_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in (("wl-broken", "raise OSError('no libGL')"), ("wl-whole", "")):
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(code)
        about = tmp_path / f"{name.replace('-', '_')}-1.2.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.0\n")
    assert module._look("wl-whole", "1.2") == ("1.2.0", "")
    assert module._look("wl-whole", "1.10") == ("", "1.2.0 is too old")
    assert module._look("wl-broken", "1") == (
        "", "1.2.0 is installed, but its import fails: no libGL",
    )  # fmt: skip
    assert module._look("wl-absent", "1") == ("", "not installed")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("torch>=2.10", ("torch", "2.10")),
        ("gymnasium[classic-control]>=1.0; extra == 'envs'", ("gymnasium", "1.0")),
        ("worldloom-common", ("worldloom-common", "0")),
    ],
)
def test_requirements_are_read_as_a_build_tool_writes_them(text, parts):
    assert module._requirement(text) == parts
