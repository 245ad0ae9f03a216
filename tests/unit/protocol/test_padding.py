"""Elements of several lengths: which share a request, what is sent, what comes back, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton import BatchingPolicy
from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol import InferRequestEncoder, InferResponse, ModelSpec, TensorSpec, to_array
from beam_triton.testing.server_codec import decode_infer_request

IDS = TensorSpec("ids", "INT64", (-1,))
MASK = TensorSpec("mask", "INT64", (-1,))
IMAGE = TensorSpec("image", "FP32", (3, -1, -1))
HIDDEN = TensorSpec("hidden", "FP32", (-1, 2))
CLASS = TensorSpec("class", "FP32", (32,))


def encoder(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec] = (), *, binary: bool = True, **options: Any
) -> InferRequestEncoder:
    model = ModelSpec("m", inputs=tuple(inputs), outputs=tuple(outputs), max_batch_size=64)
    policy = BatchingPolicy.from_options({"bucket_boundaries": [4, 8], **options})
    return InferRequestEncoder(model, binary=binary, padding=policy)


def sent(model: InferRequestEncoder, elements: Sequence[Any]) -> dict[str, Any]:
    """The tensors of the request that these elements share, as a server reads them."""
    prepared = [model.prepare(element) for element in elements]
    assert len({element.signature for element in prepared}) == 1
    encoded = model.encode_batch(prepared)
    body = b"".join(encoded.parts)
    assert len(body) == encoded.content_length
    return decode_infer_request(model.model, body, encoded.json_length).inputs


def rows(model: InferRequestEncoder, elements: Sequence[Any], **outputs: Any) -> list[dict[str, Any]]:
    """What each element gets of an answer of these outputs."""
    encoded = model.encode_batch([model.prepare(element) for element in elements])
    assert encoded.lengths is not None
    return list(encoded.lengths.cut(InferResponse("m", "1", "", {}, outputs)).rows(len(elements)))


def test_elements_of_a_bucket_are_padded_to_its_boundary() -> None:
    """Whatever form they come in, also an empty one; another bucket is another signature."""
    ids = encoder([IDS])
    inputs = sent(ids, [[1, 2], np.array([3, 4, 5]), (), {"ids": [6]}, np.arange(4)])
    assert inputs["ids"].tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [0] * 4, [6, 0, 0, 0], [0, 1, 2, 3]]
    assert ids.prepare([1] * 5).signature == ((8,),) != ids.prepare([1]).signature


def test_elements_beyond_the_last_boundary_are_padded_to_the_longest() -> None:
    """Their buckets end at twice the length, and again; a request of them is no longer than it must be."""
    ids = encoder([IDS])
    assert [ids.prepare([1] * n).signature[0][0] for n in (8, 9, 16, 17, 33)] == [8, 16, 16, 32, 64]
    assert sent(ids, [[1] * 9, [1] * 11])["ids"].shape == (2, 11)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20))
def test_size_counts_padding(lengths: list[int]) -> None:
    """It is never less than what is sent, and exactly that up to the last boundary."""
    ids = encoder([IDS, MASK], mask="mask")
    for length in lengths:
        prepared = ids.prepare([1] * length)
        tensors = sum(map(len, ids.encode_batch([prepared]).parts[1:]))
        assert prepared.nbytes == tensors if length <= 8 else tensors <= prepared.nbytes < 2 * tensors


@pytest.mark.parametrize("binary", [True, False])
def test_mask_is_made_where_the_element_gives_none(binary: bool) -> None:
    """Its own is kept, and padded with 0 whatever the other inputs are padded with."""
    ids = encoder([IDS, MASK], binary=binary, pad=7, mask="mask")
    inputs = sent(ids, [[1, 2], {"ids": [3, 4, 5]}, {"ids": [6, 7, 8], "mask": [1, 0, 1]}])
    assert inputs["ids"].tolist() == [[1, 2, 7, 7], [3, 4, 5, 7], [6, 7, 8, 7]]
    assert inputs["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("datatype", "pad", "values", "padded"),
    [
        ("BYTES", None, ["a", b"bc"], [b"a", b"bc", b"", b""]),
        ("BYTES", "<pad>", ["a", b"bc"], [b"a", b"bc", b"<pad>", b"<pad>"]),
        ("BOOL", None, [True], [True, False, False, False]),
        ("FP32", -1e9, [1.5], [1.5, -1e9, -1e9, -1e9]),
        ("FP16", float("-inf"), [1.5], [1.5, -np.inf, -np.inf, -np.inf]),
        ("BF16", 1, [2.0], [2.0, 1.0, 1.0, 1.0]),
        ("UINT64", 2**64 - 1, [3], [3, *[2**64 - 1] * 3]),
    ],
)
def test_every_kind_of_value_is_padded(datatype: str, pad: Any, values: Any, padded: Any) -> None:
    """With a value of the input's datatype."""
    inputs = sent(encoder([TensorSpec("x", datatype, (-1,))], pad=pad), [values])
    expected = np.float32(padded).tolist() if datatype == "FP32" else padded
    assert inputs["x"].tolist() == [expected]


def test_images_are_padded_in_both_dimensions() -> None:
    """Each has a bucket of its own, and the answer is cut in both."""
    model = encoder([IMAGE], [TensorSpec("heat", "FP32", (-1, -1)), TensorSpec("class", "FP32", (5,))])
    images = [np.full((3, 3, 7), 1, np.float32), np.full((3, 4, 5), 2, np.float32)]
    inputs = sent(model, images)
    assert inputs["image"].shape == (2, 3, 4, 8)
    assert inputs["image"].sum(axis=(1, 2, 3)).tolist() == [63, 120]
    heat = inputs["image"].sum(axis=1)
    answers = rows(model, images, heat=heat, **{"class": np.zeros((2, 5), np.float32)})
    assert [answer["heat"].shape for answer in answers] == [(3, 7), (4, 5)]
    assert [answer["heat"].min() for answer in answers] == [3, 6]


def test_only_outputs_of_the_padded_length_are_cut() -> None:
    """Not those of fixed size, not those that the model has made shorter."""
    model = encoder([IDS], [HIDDEN, CLASS, TensorSpec("frames", "FP32", (-1,))])
    elements = [[1] * 5, [1] * 8]
    hidden = np.arange(32).reshape(2, 8, 2)
    outputs = {"hidden": hidden, "class": np.zeros((2, 32)), "frames": np.zeros((2, 4))}
    first, second = rows(model, elements, **outputs)
    assert first["hidden"].tolist() == hidden[0, :5].tolist()
    assert second["hidden"].tolist() == hidden[1].tolist()
    assert first["class"].shape == (32,) and first["frames"].shape == (4,)


def test_every_variable_dimension_of_an_output_is_cut_to_the_only_length() -> None:
    """Attention weights have the length twice."""
    model = encoder([IDS], [TensorSpec("weights", "FP32", (2, -1, -1))])
    (row,) = rows(model, [[1] * 3], weights=np.zeros((1, 2, 4, 4)))
    assert row["weights"].shape == (2, 3, 3)


def test_classes_of_an_output_are_not_cut() -> None:
    """As many classes as the padded length are a coincidence."""
    model = ModelSpec("m", inputs=(IDS,), outputs=(TensorSpec("y", "FP32", (-1,)),), max_batch_size=8)
    padding = BatchingPolicy(bucket_boundaries=[4])
    classes = InferRequestEncoder(model, padding=padding, classification={"y": 4})
    (row,) = rows(classes, [[1, 2]], y=np.array([[b"a", b"b", b"c", b"d"]], object))
    assert row["y"].shape == (4,)


def test_cut_outputs_overrides_the_rule() -> None:
    """An output that happens to have the padded size is left whole by ``None``."""
    model = encoder([IDS], [HIDDEN], cut_outputs={"hidden": None})
    (row,) = rows(model, [[1]], hidden=np.zeros((1, 4, 2)))
    assert row["hidden"].shape == (4, 2)


def test_inputs_of_independent_lengths_come_in_a_list() -> None:
    """Each pads by itself, has its own mask, and the user says which output is whose."""
    query, document = TensorSpec("query", "INT64", (-1,)), TensorSpec("document", "INT64", (-1,))
    model = encoder(
        [query, MASK, document],
        [HIDDEN],
        pad=[{"query": 0, "mask": 0}, {"document": 9}],
        mask=["mask"],
        cut_outputs={"hidden": "document"},
    )
    elements = [{"query": [1, 2], "document": [3] * 5}, {"query": [1], "document": [3] * 6}]
    inputs = sent(model, elements)
    assert {name: array.shape for name, array in inputs.items()} == {
        "query": (2, 4),
        "mask": (2, 4),
        "document": (2, 8),
    }
    assert inputs["mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert [row["hidden"].shape for row in rows(model, elements, hidden=np.zeros((2, 8, 2)))] == [
        (5, 2),
        (6, 2),
    ]


def test_inputs_that_are_not_named_keep_their_exact_shapes() -> None:
    """They still decide which elements share a request."""
    extra = TensorSpec("extra", "FP32", (-1,))
    model = encoder([IDS, extra], pad={"ids": 0})
    assert model.prepare({"ids": [1], "extra": [1.0]}).signature == ((4,), (1,))
    assert model.prepare({"ids": [1], "extra": [1.0, 2.0]}).signature == ((4,), (2,))
    assert sent(model, [{"ids": [1], "extra": [1.0]}] * 2)["extra"].tolist() == [[1.0], [1.0]]


def test_optional_inputs_may_be_absent() -> None:
    """Elements with and without one do not share a request."""
    model = encoder([IDS, TensorSpec("bias", "FP32", (-1,), optional=True)])
    assert model.prepare({"ids": [1, 2]}).signature == ((4,), None)
    assert list(sent(model, [{"ids": [1, 2]}])) == ["ids"]


def test_different_lengths_of_one_element_are_its_error() -> None:
    """Padding must not hide that ids and mask do not fit each other."""
    with pytest.raises(LocalProtocolError, match=r"'ids' and 'mask' .* equal lengths, not 2 and 3.*pad=\["):
        encoder([IDS, MASK]).prepare({"ids": [1, 2], "mask": [1, 1, 1]})


def test_whole_tensors_are_not_padded() -> None:
    """`TritonClient.infer` sends what it is given."""
    encoded = encoder([IDS]).encode(np.zeros((2, 3), np.int64))
    assert b'"shape":[2,3]' in bytes(encoded.parts[0])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([CLASS], {}, "no input has a variable dimension"),
        ([IDS], {"pad": {"idz": 0}}, r"batching\.pad .* has no input 'idz'; inputs: ids INT64"),
        ([IDS, CLASS], {"pad": {"class": 0}}, "'class' has no variable dimension"),
        ([IDS], {"pad": 0.5}, r"batching\.pad .*INT64.*only whole numbers"),
        ([IDS], {"pad": "x"}, r"batching\.pad .*INT64"),
        ([IDS], {"pad": [{"ids": 0}, {"ids": 0}]}, "named twice"),
        ([IDS], {"mask": "mask"}, r"batching\.mask .* has no input 'mask'"),
        ([IDS], {"mask": "ids"}, "no input has a variable dimension"),
        ([IMAGE, MASK], {"mask": "mask"}, r"name 'mask' in the mapping"),
        ([IDS, TensorSpec("mask", "BYTES", (-1,))], {"mask": "mask"}, "BYTES"),
        ([IDS], {"cut_outputs": {"nothing": None}}, r"'nothing' is no output that is asked for"),
        ([IDS], {"cut_outputs": {"hidden": "id"}}, r"'id' is no input that is padded: ids"),
        ([IMAGE], {"cut_outputs": {"hidden": "image"}}, "different numbers of variable dimensions"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(
    inputs: Sequence[TensorSpec], options: Mapping[str, Any], message: str
) -> None:
    """When the model is opened, not at the first element."""
    with pytest.raises(ConfigurationError, match=message):
        encoder(inputs, [HIDDEN], **options)


def test_output_of_two_possible_lengths_must_be_declared() -> None:
    """A guess would be right for some requests and wrong for others."""
    pad = [{"ids": 0}, {"mask": 0}]
    with pytest.raises(ConfigurationError, match=r"'ids' or 'mask': say which by batching\.cut_outputs"):
        encoder([IDS, MASK], [HIDDEN], pad=pad)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelSpec("m"), "does not name the inputs"),
        (ModelSpec("m", inputs=(IDS,)), "no batch dimension"),
    ],
)
def test_models_that_cannot_be_padded_are_refused(model: ModelSpec, message: str) -> None:
    """Without inputs there is nothing to find, without a batch dimension nothing to share."""
    with pytest.raises(ConfigurationError, match=message):
        InferRequestEncoder(model, padding=BatchingPolicy(bucket_boundaries=[4]))


def test_bf16_arrays_of_an_element_are_cast_each_time() -> None:
    """An array of the wire's own dtype (uint16) holds numbers, not bits."""
    model = encoder([TensorSpec("x", "BF16", (-1,))])
    for _ in range(2):
        assert sent(model, [np.array([1, 2], np.uint16)])["x"].tolist() == [[1.0, 2.0, 0.0, 0.0]]
    assert to_array([1.0], TensorSpec("x", "BF16", (-1,))).dtype == np.uint16
