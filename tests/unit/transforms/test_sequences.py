"""`TritonSequenceInference` where requests are seen one by one, and fail on demand; and its arguments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms import window
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Optional, Tuple, Union

from beam_triton import (
    ConfigurationError,
    DeadlineExceededError,
    ModelSpec,
    SequenceEndedError,
    TensorSpec,
    TritonSequenceInference,
)
from beam_triton.protocol import PreparedElement
from beam_triton.transforms.model_dofn import check_can_be_scored
from beam_triton.transforms.sequence_scorer import RemoteSequence, SequenceMemory
from tests.support import pipelines
from tests.support.answers import Answer
from tests.support.fault_server import Fault, FaultServer, serve
from tests.support.faults import answered, closed_without_answer, silence
from tests.support.scripted_servers import ScriptedServer, tensor

SPEC = ModelSpec(
    "m",
    "",
    (TensorSpec("x", "FP32", (1,)),),
    (TensorSpec("predict", "FP32", (1,)),),
    8,
    sequence_batching=True,
)
LOST = Answer(400, b'{"error": "... must specify the START flag on the first request of the sequence"}', ())


class Fleet(ExitStack):
    """Scripted servers that answer each element with itself, and record the requests."""

    def __init__(self, servers: int = 1, faults: Iterable[Fault] = ()) -> None:
        super().__init__()
        self.models = [ScriptedServer((tensor("x", "FP32", [-1, 1]),)) for _ in range(servers)]
        scripts = [list(faults)] + [[]] * servers
        self.servers = [
            self.enter_context(FaultServer(model, script, when=lambda line: b"/infer" in line))
            for model, script in zip(self.models, scripts, strict=False)
        ]

    @property
    def endpoints(self) -> list[str]:
        return [server.endpoint for server in self.servers]

    @property
    def requests(self) -> list[tuple[int, float, dict[str, Any]]]:
        """Server, value and parameters of each request that a model has answered."""
        return [
            (number, request["inputs"][0]["data"][0], request["parameters"])
            for number, model in enumerate(self.models)
            for request in model.requests
        ]


def score(fleet: Fleet, sequences: dict[str, list[float]], **options: Any) -> pipelines.Run:
    """Score in one bundle; the key's first element comes first."""
    elements = [(key, [value]) for key, values in sequences.items() for value in values]
    options = {"model_spec": SPEC, "binary": False, **options}
    transform = TritonSequenceInference(fleet.endpoints, "m", **options)
    return pipelines.score(elements, transform.with_exception_handling())


def test_flags_mark_first_and_last_and_every_sequence_has_an_id_of_its_own() -> None:
    with Fleet() as fleet:
        score(fleet, {"a": [1, 2, 3], "b": [4], "c": [5, 6]})
        flags = {value: parameters for _, value, parameters in fleet.requests}
    ids = {value: parameters.pop("sequence_id") for value, parameters in flags.items()}
    assert flags == {
        1: {"sequence_start": True},
        2: {},
        3: {"sequence_end": True},
        4: {"sequence_start": True, "sequence_end": True},
        5: {"sequence_start": True},
        6: {"sequence_end": True},
    }
    assert ids[1] == ids[2] == ids[3] and ids[5] == ids[6]
    assert len(set(ids.values())) == 3 and 0 not in ids.values()


def test_a_sequence_goes_to_one_server_and_many_to_all() -> None:
    with Fleet(servers=3) as fleet:
        score(fleet, {f"{key}": [key, key, key, key] for key in range(60)})
        servers = defaultdict(set)
        for server, key, _ in fleet.requests:
            servers[key].add(server)
    assert all(len(each) == 1 for each in servers.values())
    assert set.union(*servers.values()) == {0, 1, 2}


def test_sequence_is_sent_again_under_another_id_where_a_request_may_still_be_on_its_way() -> None:
    with Fleet(faults=[serve, serve, closed_without_answer]) as fleet:
        run = score(fleet, {"a": [1, 2, 3, 4]})
        values = [(value, parameters["sequence_id"]) for _, value, parameters in fleet.requests]
    assert [value for value, _ in values] == [1, 2, 1, 2, 3, 4]
    assert len({number for _, number in values[:2]}) == len({number for _, number in values[2:]}) == 1
    assert values[0][1] != values[2][1]
    assert [int(result.inference["predict"][0]) for _, result in run.results] == [1, 2, 3, 4]
    assert run.counters["replayed_elements"] == 2


def test_sequence_that_the_server_does_not_know_is_started_again_in_its_place() -> None:
    with Fleet(faults=[serve, serve, answered(LOST)]) as fleet:
        run = score(fleet, {"a": [1, 2, 3]})
        assert [value for _, value, _ in fleet.requests] == [1, 2, 1, 2, 3]
        assert len({parameters["sequence_id"] for *_, parameters in fleet.requests}) == 1
    assert run.failures == []


def test_element_on_which_the_model_hangs_fails_after_three_times() -> None:
    faults = [serve, silence] * 3
    with Fleet(faults=faults) as fleet:
        run = score(fleet, {"a": [1, 2, 3]}, timeout_seconds=0.4)
    assert [kind for _, (kind, *_) in run.failures] == [DeadlineExceededError, SequenceEndedError]
    assert len(run.results) == 1


def test_sequence_that_is_lost_over_and_over_ends() -> None:
    with Fleet(faults=[serve, closed_without_answer] * 20) as fleet:
        run = score(fleet, {"a": [1, 2, 3]}, retry={"max_retries": 3})
    assert len(run.results) == 1 and len(run.failures) == 2
    assert run.counters["replayed_sequences"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ends": "last"}, 'ends must be a callable that takes an element, "window"'),
        ({"ends": {"col": "x"}}, "ends must be"),
        ({"order_by": "time"}, "order_by must be a callable"),
        ({"after_error": "skip"}, 'after_error must be "end" or "replay"'),
        ({"max_replay_elements": -1}, "max_replay_elements must be a whole number from 0"),
        ({"max_replay_elements": True}, "max_replay_elements must be"),
        ({"batching": {"max_batch_size": 4}}, "takes no batching"),
        ({"request_parameters": {"sequence_id": 3}}, "leave out 'sequence_id'"),
        ({"keep": ["id"]}, 'need output="row"'),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TritonSequenceInference("http://triton:8000", "m", **options)


def test_unbounded_input_in_the_global_window_needs_to_know_what_ends_a_sequence() -> None:
    elements = beam.Pipeline() | beam.Create([("a", 1)])
    elements.is_bounded = False
    with pytest.raises(ConfigurationError, match="nor have its sequences: give the input windows"):
        _ = elements | TritonSequenceInference("http://triton:8000", "m")
    _ = elements | "Column" >> TritonSequenceInference("http://triton:8000", "m", ends={"column": "last"})
    _ = elements | "None" >> TritonSequenceInference("http://triton:8000", "m", ends=None)
    windowed = elements | beam.WindowInto(window.FixedWindows(10))
    _ = windowed | "Windows" >> TritonSequenceInference("http://triton:8000", "m")


def test_elements_without_a_key_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"takes \(key, element\).*not <class 'int'>"):
        _ = beam.Pipeline() | beam.Create([1, 2]) | TritonSequenceInference("http://triton:8000", "m")
    untyped = beam.Map(lambda number: number).with_output_types(beam.typehints.Any)
    with Fleet() as fleet, pytest.raises(Exception, match=r"takes \(key, element\).*not 1"):
        transform = TritonSequenceInference(fleet.endpoints, "m", model_spec=SPEC, binary=False)
        pipelines.score([1, 2], untyped | transform)


@pytest.mark.parametrize(
    "element_type",
    [
        Union[Tuple[str, int], Tuple[str, float]],
        Union[Tuple[str, int], Tuple[None, int]],
        Tuple[AnyType, ...],
        Optional[Tuple[str, AnyType]],
        object,
    ],
    ids=str,
)
def test_elements_that_may_have_a_key_are_taken(element_type: Any) -> None:
    """As Create and Flatten give them of pairs of many types, or a function that does not say more."""
    typed = beam.Map(lambda pair: pair).with_output_types(element_type)
    with Fleet() as fleet:
        transform = TritonSequenceInference(fleet.endpoints, "m", model_spec=SPEC, binary=False)
        run = pipelines.score([("a", [1]), ("a", [2.5])], typed | transform.with_exception_handling())
    assert sorted(result.inference["predict"][0] for _, result in run.results) == [1, 2.5]


@pytest.mark.parametrize("datatype", ["UINT32", "INT32", "STRING"])
def test_correlation_ids_that_would_be_cut_are_refused(datatype: str) -> None:
    spec = ModelSpec("m", sequence_batching=True, correlation_id_datatype=datatype)
    with pytest.raises(ConfigurationError, match=f"gets correlation IDs as {datatype}"):
        check_can_be_scored(spec, of_sequences=True)


def test_memory_drops_what_has_waited_longest() -> None:
    memory = SequenceMemory(max_bytes=6000)

    def sequence() -> RemoteSequence:
        made = RemoteSequence()
        made.keep(PreparedElement(((250,),), (np.zeros(250, np.float32),), 1000), 9)
        return made

    for key in "abc":
        memory.put(key, sequence())
    assert memory.take("a") is None
    kept = memory.take("b")
    assert kept is not None and memory.take("b") is None
    memory.put("b", kept)
    memory.put("b", kept)
    assert memory.take("c") is not None and memory.take("b") is kept
