"""`TritonBatchInference` on a real Triton: Arrow tables in and out, and Parquet from file to file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_triton import TritonBatchInference
from beam_triton.protocol import DATATYPES
from beam_triton.score import score_command
from beam_triton.testing import LocalTriton
from tests.support.pipelines import score

_PAGE = Path(__file__).parents[2] / "docs" / "arrow.md"


def numbers_table(count: int) -> pa.Table:
    """Rows of four numbers; every tenth is null."""
    values = [None if n % 10 == 9 else [float(n)] * 4 for n in range(count)]
    return pa.table({"id": range(count), "pixels": pa.array(values, pa.list_(pa.float32()))})


def test_the_example_of_the_documentation(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes the results, and prints the rows that failed."""
    (code,) = re.findall(r"```python\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    pq.write_table(numbers_table(500), tmp_path / "rows.parquet", row_group_size=64)
    exec(code, {"endpoint": triton.endpoint, "folder": str(tmp_path)})
    (written,) = tmp_path.glob("scored*")
    table = pq.read_table(written)
    assert table.schema.names == ["id", "double_y"]
    assert table["double_y"].type == pa.list_(pa.float32(), 4)
    good = [n for n in range(500) if n % 10 != 9]
    assert sorted(table["id"].to_pylist()) == good
    assert table.sort_by("id")["double_y"].to_pylist() == [[2.0 * n] * 4 for n in good]
    failed = sorted(int(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert failed == [n for n in range(500) if n % 10 == 9]


def test_the_file_command_writes_the_same(triton: LocalTriton, tmp_path: Path) -> None:
    """Results as lists, and the failed rows beside them."""
    pq.write_table(numbers_table(200), tmp_path / "rows.parquet")
    arguments = [
        *("--files", str(tmp_path / "rows.parquet"), "--endpoint", triton.endpoint, "--model", "double"),
        *("--input", "x=pixels", "--keep", "id", "--output", str(tmp_path / "out.parquet")),
    ]
    assert score_command.main(arguments) == 0
    table = pq.read_table(tmp_path / "out.parquet").sort_by("id")
    good = [n for n in range(200) if n % 10 != 9]
    assert table.select(["id", "y"]).to_pydict() == {"id": good, "y": [[2.0 * n] * 4 for n in good]}
    failures = (tmp_path / "out-failures.jsonl").read_text().splitlines()
    assert len(failures) == 20
    assert "null where input x FP32 [4] takes a value" in failures[0]


def test_every_datatype_comes_back(triton: LocalTriton) -> None:
    """All in one request, each from a column of its own; BF16 as float."""
    numbers = np.arange(40) % 100
    columns: dict[str, Any] = {"id": np.arange(20)}
    for name, datatype in DATATYPES.items():
        values = pa.array(
            [b"%d" % n for n in numbers] if name == "BYTES" else numbers.astype(datatype.array_dtype)
        )
        columns[f"x_{name.lower()}"] = pa.FixedSizeListArray.from_arrays(values, 2)
    outcome = score([pa.table(columns)], TritonBatchInference(triton.endpoint, "every_datatype"))
    (result,) = outcome.results
    assert result["id"].to_pylist() == list(range(20))
    for name in map(str.lower, DATATYPES):
        assert result[f"y_{name}"].to_pylist() == columns[f"x_{name}"].to_pylist()
        assert result[f"y_{name}"].type.value_type == columns[f"x_{name}"].type.value_type


def test_several_inputs_and_outputs(triton: LocalTriton) -> None:
    """Each input from its column, all outputs as columns of the same name."""
    a, b = np.arange(160, dtype=np.int32), np.ones(160, np.int32)
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(each), 16) for name, each in (("a", a), ("b", b))
    }
    batch = pa.record_batch(columns)
    (result,) = score([batch], TritonBatchInference(triton.endpoint, "sum_and_difference")).results
    assert isinstance(result, pa.RecordBatch)
    assert result["sum"].flatten().to_pylist() == (a + b).tolist()
    assert result["difference"].flatten().to_pylist() == (a - b).tolist()


def test_an_optional_input_may_be_null(triton: LocalTriton) -> None:
    """Rows without it go in requests without it."""
    table = pa.table(
        {
            "x": pa.array([[1.0] * 4, [2.0] * 4, [3.0] * 4]),
            "factor": pa.array([10.0, None, 100.0], pa.float32()),
        }
    )
    (result,) = score([table], TritonBatchInference(triton.endpoint, "optional_input")).results
    first = [row[0] for row in result["y"].to_pylist()]
    (without,) = score(
        [table.drop(["factor"])], TritonBatchInference(triton.endpoint, "optional_input")
    ).results
    plain = [row[0] for row in without["y"].to_pylist()]
    assert first == [plain[0] * 10, plain[1], plain[2] * 100]


@pytest.mark.parametrize("text", [False, True])
def test_texts(triton: LocalTriton, text: bool) -> None:
    """BYTES are binary, or strings where they are said to be text."""
    table = pa.table({"text": ["a", "bé", ""]})
    transform = TritonBatchInference(triton.endpoint, "shout", text_outputs=text)
    (result,) = score([table], transform).results
    assert result.schema == transform.output_schema(table.schema)
    assert result["loud"].type == (pa.string() if text else pa.binary())
    assert result["length_bytes"].to_pylist() == [1, 3, 0]
    loud = [each.encode().upper().decode() for each in table["text"].to_pylist()]
    assert result["loud"].to_pylist() == (loud if text else [each.encode() for each in loud])


def test_bytes_that_are_no_text_fail_alone(triton: LocalTriton) -> None:
    """The other rows of their requests have results."""
    values = [b"a", b"\xff", b"c"]
    table = pa.table({"id": range(3), "x": pa.array([[each] for each in values])})
    transform = TritonBatchInference(triton.endpoint, "identity_bytes", text_outputs=True)
    outcome = score([table], transform.with_exception_handling())
    assert outcome.results[0].to_pydict() == {"id": [0, 2], "y": [["a"], ["c"]]}
    (failure,) = outcome.failures
    assert failure.element["id"] == 1
    assert "no UTF-8 text" in failure.error_message


def test_a_model_without_a_batch_dimension(triton: LocalTriton) -> None:
    """Each row is a request of its own."""
    column = pa.array([[[1.0, 2.0, 3.0, 4.0]], [[5.0] * 4, [6.0] * 4]])
    outcome = score([pa.table({"x": column})], TritonBatchInference(triton.endpoint, "unbatched"))
    assert outcome.results[0]["y"].to_pylist() == [[[2.0, 3.0, 4.0, 5.0]], [[6.0] * 4, [7.0] * 4]]
    assert outcome.counters["requests"] == 2


def test_numbers_are_sent_as_they_lie_in_memory(triton: LocalTriton) -> None:
    """A table of several requests' rows, in chunks that do not fit these."""
    values = np.random.default_rng(3).random((1000, 128), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 128)
    table = pa.table({"x": pa.chunked_array([column.slice(0, 333), column.slice(333)])})
    transform = TritonBatchInference(triton.endpoint, "echo", batching={"max_batch_size": 64}, keep="all")
    outcome = score([table], transform)
    (result,) = outcome.results
    assert result["y"].equals(table["x"].cast(result["y"].type))
    assert outcome.counters["requests"] == 16
