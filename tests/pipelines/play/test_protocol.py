"""protocol.py: every message of docs/protocol.md, and any bytes where one should be."""

import json
import re
import resource
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import FormatError
from worldloom.pipelines.play import protocol
from worldloom.pipelines.play.protocol import (
    Autoplay,
    Compare,
    Format,
    Input,
    Pace,
    Record,
    Reset,
    Rewind,
    Run,
    Seen,
    Settings,
    Step,
    pack_frame,
    pack_text,
    parse_message,
    unpack_frame,
)

DOCS = Path(__file__).parents[3] / "docs" / "protocol.md"
GOOD = {
    '{"type":"input","held":["UP","FIRE"],"n":7}': Input(("UP", "FIRE"), 7),
    '{"type":"input","held":[],"n":0}': Input((), 0),
    '{"type":"run","on":true}': Run(on=True),
    '{"type":"step"}': Step(),
    '{"type":"reset"}': Reset(),
    '{"type":"reset","start":2,"seed":9}': Reset(start=2, seed=9),
    '{"type":"reset","picture":"a1"}': Reset(picture="a1"),
    '{"type":"settings","temperature":1,"top_k":3}': Settings({"temperature": 1.0, "top_k": 3}),
    '{"type":"settings","decoder":"raster"}': Settings({"decoder": "raster"}),
    '{"type":"pace","frames_per_s":0}': Pace(0.0),
    '{"type":"rewind","position":12}': Rewind(12),
    '{"type":"autoplay","on":false}': Autoplay(on=False),
    '{"type":"compare","with":"truth"}': Compare("truth"),
    '{"type":"record","on":true}': Record(on=True),
    '{"type":"format","image":"png"}': Format("png"),
    '{"type":"seen","frames":3}': Seen(3),
}
BAD = {
    "": "JSON",
    "{": "JSON",
    "[" * 10_000: "JSON",
    '"\ud800"': "JSON",
    "[1]": "object",
    "{}": "called type",
    '{"type":3}': "called type",
    '{"type":"inptu"}': "did you mean 'input'",
    '{"type":"input","held":[]}': "'n' is missing",
    '{"type":"input","held":[],"n":0,"m":1}': "'m' is unknown",
    '{"type":"step","on":true}': "it has none",
    '{"type":"input","held":"UP","n":0}': "list",
    '{"type":"input","held":[1],"n":0}': "text",
    '{"type":"input","held":["A","A"],"n":0}': "twice",
    json.dumps({"type": "input", "held": [str(k) for k in range(65)], "n": 0}): "at most 64",
    json.dumps({"type": "input", "held": ["x" * 101], "n": 0}): "at most 100",
    '{"type":"input","held":[],"n":-1}': "whole number",
    '{"type":"input","held":[],"n":1.5}': "whole number",
    '{"type":"input","held":[],"n":true}': "whole number",
    '{"type":"input","held":[],"n":9007199254740993}': "whole number",
    '{"type":"run","on":1}': "true or false",
    '{"type":"pace","frames_per_s":-1}': "[0.01, 1000], or 0",
    '{"type":"pace","frames_per_s":1e-11}': "[0.01, 1000], or 0",
    '{"type":"pace","frames_per_s":NaN}': "NaN",
    '{"type":"pace","frames_per_s":1e999}': "must be a number",
    '{"type":"settings","temperature":"hot"}': "must be a number",
    '{"type":"settings","tempratur":1}': "did you mean 'temperature'",
    f'{{"type":"settings","temperature":{"9" * 400}}}': "must be a number",
    f'{{"type":"settings","top_k":{"9" * 5000}}}': "JSON",
    '{"type":"format","image":"gif"}': "jpeg or png",
    '{"type":"compare"}': "'with' is missing",
    json.dumps({"type": "step", "x": "y" * (16 << 10)}): "16384",
}


@pytest.mark.parametrize("text", GOOD)
def test_every_message_is_understood_as_text_and_as_bytes(text):
    assert parse_message(text) == parse_message(text.encode()) == GOOD[text]


def test_every_type_of_message_has_an_example_here_and_in_the_documentation():
    documented = set(re.findall(r'\{"type": "(\w+)"', DOCS.read_text()))
    parsed = {json.loads(text)["type"] for text in GOOD}
    assert parsed == set(protocol._KINDS)
    assert parsed < documented


def test_the_examples_of_the_documentation_are_understood():
    to_server, _, _ = DOCS.read_text().partition("## From the server")
    examples = re.findall(r'^\{"type".*\}$', to_server, re.MULTILINE)
    assert {json.loads(example)["type"] for example in examples} == set(protocol._KINDS)
    for example in examples:
        parse_message(example)


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused_with_what_is_wrong(text):
    with pytest.raises(FormatError, match=re.escape(BAD[text])) as refused:
        parse_message(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_frame_is_unpacked_as_it_was_packed():
    header, images = {"n": 3, "action": "UP", "last": True}, [b"\xff\xd8abc", b"", b"png"]
    message = pack_frame(header, images)
    assert unpack_frame(message) == ({**header, "sizes": [5, 0, 3]}, images)
    assert int.from_bytes(message[:4], "little") + 4 + 8 == len(message)


@pytest.mark.parametrize("cut", [0, 3, 4, 20, -1])
def test_a_frame_that_is_cut_is_refused(cut):
    with pytest.raises(FormatError):
        unpack_frame(pack_frame({"n": 1}, [b"abc"])[:cut])


def test_what_is_no_number_of_json_is_never_sent():
    with pytest.raises(ValueError, match="JSON"):
        pack_text({"type": "state", "pace": float("nan")})


WORDS = st.sampled_from(
    [*protocol._KINDS, "held", "n", "on", "start", "picture", "seed", "position", "with", "image",
     "frames_per_s", "type", "temperature", "top_k", "decoder", "jpeg", "UP", "", "\ud800", "é"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
NEAR = st.builds(
    lambda kind, rest: {**rest, "type": kind},
    WORDS,
    st.dictionaries(WORDS, VALUES, max_size=4),
).map(json.dumps)
"""JSON that is nearly a message: random bytes hardly get past the first check."""
CUT = st.builds(
    lambda text, at, put: text[:at] + put + text[at + len(put) :],
    st.sampled_from([*GOOD, *BAD]) | NEAR,
    st.integers(0, 60),
    st.text(max_size=3) | st.sampled_from(["{", "}", "[", "]", '"', ",", ":", "e999", "-", "\\u"]),
)
MESSAGES = protocol.Message


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=10_000, database=None)
@given(NEAR | CUT | VALUES.map(json.dumps) | st.text(max_size=200) | st.binary(max_size=200))
def test_whatever_a_page_sends_is_a_message_or_an_error_of_ours_at_once(sent):
    began = time.process_time()
    try:
        answer = parse_message(sent)
    except FormatError as error:
        answer = error
    assert isinstance(answer, MESSAGES) or len(str(answer)) < 400
    assert time.process_time() - began < 0.5


@settings(deadline=None, derandomize=True, max_examples=500, database=None)
@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=3))
def test_whatever_a_page_takes_for_a_frame_is_one_or_an_error_of_ours(noise, at, put):
    packed = pack_frame({"n": 1}, [b"abc"])
    for sent in (noise, packed[:at] + put + packed[at + len(put) :]):
        try:
            header, images = unpack_frame(sent)
        except FormatError:
            continue
        assert header["sizes"] == [len(image) for image in images]


def test_the_largest_message_is_read_in_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in ("[" * 16_000, "[1," * 5_000, '{"a":' * 3_000, '"' + "\\u0001" * 2_700 + '"'):
        with pytest.raises(FormatError):
            parse_message(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10
