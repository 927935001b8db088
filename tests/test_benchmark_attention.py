"""The attention benchmark: wrong answers are never ranked, bytes are counted, tables can be read. No time is judged."""

import json
import math
import re

import pytest
import torch

from drl import benchmark_attention, benchmark_peers, cli
from drl.benchmark_attention import call, measure_all, named
from drl.benchmark_device import Timing
from drl.benchmark_inputs import Protocol, error, fresh, make_inputs, right_answers, rows_checked, views
from drl.benchmark_peers import Operator
from drl.benchmark_table import Cell, Shape, floor_bytes, markdown, notes, ratio
from drl.errors import UserError
from drl.kernels import linear_attention

SMALL = Shape(2, 5, 2, 4)
QUICK = Protocol(seconds=0)


def chunked(feature_map="elu1"):
    found, _ = benchmark_peers.operators("chunked", feature_map=feature_map, step=False, fast_transformers="")
    return found[0]


def scaled(factor_forward, factor_backward):
    """Ours with the output, or its gradient alone, off by a factor."""
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * factor_forward

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor_backward

    return Operator("peer", "peers", lambda q, k, v: Scaled.apply(linear_attention(q, k, v)[0]))


def cell(operator="chunked", group="ours", *, work="forward", eager=10.0, graph=None, errors=0.0, **fields):
    timing = Timing(0.5, (eager, eager, eager), graph and (graph, graph, graph))
    return Cell(Shape(64, 60, 4, 32), work, operator, group, "bfloat16", errors={"out": errors}, timing=timing,
                **fields)


@pytest.mark.parametrize("text", ["64x60x4", "64x60x4x32x1", "64x60x4xD", "0x60x4x32", "64,60,4,32"])
def test_a_shape_that_is_none_is_answered_with_an_example(text):
    with pytest.raises(UserError, match="64x60x4x32"):
        Shape.parse(text)
    assert Shape.parse("64x60x4x32") == (64, 60, 4, 32)


def test_bytes_of_the_floor_by_hand():
    # 64 * 60 * 4 * 32 = 491,520 numbers in each of q, k, v, out; the state of 256 heads is 32 * 32 + 32 float32
    shape = Shape(64, 60, 4, 32)
    assert floor_bytes(shape, "forward", "bfloat16") == 4 * 983_040 + 1_081_344
    assert floor_bytes(shape, "forward and backward", "bfloat16") == 12 * 983_040 + 1_081_344
    assert floor_bytes(Shape(1, 3, 4, 32), "step", "float32") == 4 * 1_536 + 2 * 16_896


def test_the_percent_of_the_floor_is_of_the_time_in_the_graph():
    # 5,013,504 bytes at 5.013504e12 bytes per second take 1 us
    assert cell(eager=100.0, graph=4.0).floor_percent(5.013504e12) == pytest.approx(25)
    assert cell(eager=100.0).floor_percent(5.013504e12) == pytest.approx(1)


def test_ratios_compare_graphs_with_graphs_and_say_so_where_they_cannot():
    ours = cell(eager=20.0, graph=2.0)
    assert ratio(cell(eager=40.0, graph=8.0), ours) == (4, "")
    assert ratio(cell(eager=40.0), ours) == (2, " (eager)")
    assert ratio(cell(eager=40.0), cell(eager=20.0)) == (2, "")
    assert math.isnan(ratio(cell(errors=0.5), ours)[0])
    assert math.isnan(ratio(ours, None)[0])


@pytest.mark.parametrize("wrong", [0.021, math.nan, math.inf])
def test_ours_is_no_measure_where_it_is_wrong(wrong):
    rows = [cell("triton", eager=1.0, errors=wrong), cell("chunked", eager=8.0), cell("peer", "fla", eager=4.0)]
    table = markdown(rows, "forward", 1e12).splitlines()[2:]
    assert "WRONG: out" in table[0] and table[0].split(" | ")[9] == "-"
    assert [line.split(" | ")[9] for line in table[1:]] == ["1.00x", "0.50x"]


def test_every_row_has_the_columns_of_its_head():
    rows = [cell(), cell("a", "fla", graph=3.0), cell("b", "fla", failure="RuntimeError: no"), cell("c", finite=False)]
    lines = markdown(rows, "forward", 1e12).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "failed" in lines[4] and "WRONG: not finite" in lines[5]
    assert notes(rows) == ["failed: RuntimeError: no (b, 1 rows, first 64x60x4x32 forward)"]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("feature_map", ["elu1", "identity"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_is_right_in_every_protocol(separate, feature_map, dtype):
    protocol = QUICK._replace(separate=separate, feature_map=feature_map, dtype=dtype)
    cells, stopped = measure_all([chunked(feature_map)], [SMALL, Shape(1, 130, 1, 4)], protocol, "cpu")
    assert not stopped and [c.work for c in cells] == 2 * ["forward", "forward and backward"]
    assert all(c.ranked for c in cells), cells
    assert list(cells[1].errors) == ["out", "dq", "dk", "dv"]
    assert all(0 < value for value in cells[1].errors.values())


def test_steps_are_right_in_output_and_state():
    operators, _ = benchmark_peers.operators("chunked", feature_map="elu1", step=True, fast_transformers="")
    (measured,), stopped = measure_all(operators, [Shape(3, 3, 2, 4)], QUICK._replace(step=True), "cpu")
    assert not stopped and measured.ranked and list(measured.errors) == ["out", "kv", "z"]


@pytest.mark.parametrize(
    "operator, wrong",
    [
        (scaled(1.1, 1), ({"out"}, {"out"})),
        (scaled(1, 1.1), (set(), {"dq", "dk", "dv"})),
        (scaled(math.nan, 1), ({"not finite"}, {"not finite"})),
    ],
    ids=["output", "gradients", "nan"],
)
def test_a_wrong_peer_is_called_wrong_and_not_ranked(operator, wrong):
    cells, _ = measure_all([chunked(), operator], [SMALL], QUICK, "cpu")
    for work, names in zip(("forward", "forward and backward"), wrong):
        ours, peer = (c for c in cells if c.work == work)
        assert ours.ranked and peer.ranked is not bool(names)
        found = {part if part == "not finite" else part.split()[0] for part in peer.wrong.split(", ") if part}
        assert found == names
        row = markdown(cells, work, 1e9).splitlines()[3]
        assert ("WRONG" in row) == bool(names) and (row.split(" | ")[9] == "-") == bool(names)


def test_a_wrong_last_sequence_is_seen():
    def last_is_zero(q, k, v):
        out, _ = linear_attention(q, k, v)
        return torch.cat([out[:-1], 0 * out[-1:]])

    shape = Shape(50, 3, 1, 4)
    cells, _ = measure_all([Operator("peer", "peers", last_is_zero)], [shape], QUICK, "cpu")
    assert rows_checked(50) == [0, 16, 33, 49] and rows_checked(1) == [0] and rows_checked(3) == [0, 1, 2]
    assert all(c.wrong for c in cells)


def test_a_peer_that_fails_is_told_and_the_others_go_on():
    def fails(q, k, v):
        raise RuntimeError("first line\nsecond line")

    cells, stopped = measure_all([Operator("peer", "peers", fails), chunked()], [SMALL], QUICK, "cpu")
    assert [c.failure for c in cells] == 2 * ["RuntimeError: first line"] + 2 * [""]
    assert not stopped and "| peer | failed |" in markdown(cells, "forward", 1e9)


def test_another_operator_is_measured_but_its_numbers_are_not_compared():
    operators, _ = benchmark_peers.operators("ours,softmax", feature_map="elu1", step=False, fast_transformers="")
    operators = [operator for operator in operators if operator.name in ("chunked", "softmax")]
    cells, _ = measure_all(operators, [SMALL], QUICK, "cpu")
    assert [c.operator for c in cells] == ["chunked", "chunked", "softmax", "softmax"]
    assert "| softmax | another operator |" in markdown(cells, "forward", 1e9)
    results = call(operators[1], fresh(make_inputs(SMALL, QUICK, "cpu")[0], "forward"), "forward")
    assert results[0].shape == (2, 5, 2, 4)


def test_own_dtypes_are_cast_named_and_judged_by_their_own_tolerance():
    peer = chunked()._replace(name="peer", group="peers", dtype=torch.float32)
    cells, _ = measure_all([chunked(), peer], [SMALL], QUICK._replace(dtype="bfloat16"), "cpu")
    assert [c.dtype for c in cells] == 2 * ["bfloat16"] + 2 * ["float32"]
    assert cells[2].errors["out"] < 1e-5 < cells[0].errors["out"]
    assert "| peer (float32) |" in markdown(cells, "forward", 1e9)


def test_inputs_are_views_of_one_tensor_unless_they_stand_alone():
    together = make_inputs(SMALL, QUICK, "cpu")
    assert len(together) == 4 and not torch.equal(together[0].leaves[0], together[1].leaves[0])
    q, k, _ = views(together[0])
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and not q.is_contiguous()
    alone = make_inputs(SMALL, QUICK._replace(separate=True), "cpu")
    assert all(x.is_contiguous() for x in views(alone[0]))


def test_mapped_inputs_are_what_the_map_makes():
    inputs = make_inputs(SMALL, QUICK._replace(feature_map="identity"), "cpu")[0]
    q, k, v = views(inputs)
    assert (q > 0).all() and (k > 0).all() and (v < 0).any()


def test_an_error_is_relative_to_the_right_answer():
    right = {"out": torch.full((4, 2), 2.0, dtype=torch.float64)}
    assert error(torch.full((4, 2), 2.2), right["out"]) == pytest.approx(0.1, rel=1e-5)
    inputs = make_inputs(SMALL, QUICK, "cpu")[0]
    answers = right_answers(inputs, QUICK)
    results = named(call(chunked(), fresh(inputs, "forward and backward"), "forward and backward"),
                    "forward and backward")
    assert results.keys() == answers.keys() and all(results[name].shape == answers[name].shape for name in answers)


def test_no_row_begins_after_the_limit():
    cells, stopped = measure_all([chunked()], [SMALL], QUICK._replace(limit=1e-9), "cpu")
    assert not cells and stopped == "Stopped after 1e-09 s: 0 of 2 rows."


def test_what_was_measured_before_an_interruption_is_told():
    def interrupted(q, k, v):
        raise KeyboardInterrupt

    cells, stopped = measure_all([chunked(), Operator("peer", "peers", interrupted)], [SMALL], QUICK, "cpu")
    assert [c.operator for c in cells] == ["chunked", "chunked"] and stopped == "Interrupted: 2 of 4 rows."


def test_what_is_missing_is_named_with_its_reason():
    found, missing = benchmark_peers.operators("", feature_map="elu1", step=False, fast_transformers="")
    assert {"chunked", "chunked-compiled", "softmax"} <= {operator.name for operator in found}
    if not torch.cuda.is_available():
        assert missing.keys() >= {"fla", "fast-transformers"} and missing["fla"] == "needs CUDA"
    with pytest.raises(UserError, match="did you mean 'fla-chunk'"):
        benchmark_peers.operators("fla-chunks", feature_map="elu1", step=False, fast_transformers="")


def test_the_command_prints_a_table_for_each_pass_and_keeps_the_numbers(tmp_path, capsys):
    kept = tmp_path / "numbers.json"
    arguments = ["benchmark", "attention", "--peers", "chunked,softmax", "--shapes", "2x5x2x4", "--seconds", "0"]
    assert cli.main([*arguments, "--json", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (forward[a-z ]*), BxTxHxD", printed, re.M) == ["forward", "forward and backward"]
    assert len(re.findall(r"^\| 2x5x2x4 \|", printed, re.M)) == 4
    assert f"torch {torch.__version__}" in printed and "GB/s" in printed
    numbers = json.loads(kept.read_text())
    assert len(numbers["cells"]) == 4 and numbers["bandwidth"] > 0
    assert numbers["cells"][1]["errors"].keys() == {"out", "dq", "dk", "dv"}
    assert numbers["cells"][0]["timing"]["eager_us"][1] > 0


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys):
    arguments = ["benchmark", "attention", "--shapes", "2x5x2x4", "--json", str(tmp_path / "missing" / "x.json")]
    assert cli.main(arguments) == 2
    assert "make it first" in capsys.readouterr().err


def test_the_default_shapes_are_shapes():
    for text in benchmark_attention.SHAPES.values():
        assert all(Shape.parse(part) for part in text.split())


@pytest.mark.cuda
@pytest.mark.parametrize("step", [False, True])
def test_on_a_gpu_graphs_are_timed_kernels_counted_and_memory_seen(step):
    operators, _ = benchmark_peers.operators("triton,chunked", feature_map="elu1", step=step, fast_transformers="")
    protocol = Protocol(seconds=0, dtype="float32" if step else "bfloat16", step=step)
    cells, stopped = measure_all(operators, [Shape(64, 3 if step else 60, 4, 32)], protocol, "cuda")
    assert not stopped
    for measured in cells:
        assert measured.ranked and measured.timing.graph_us and not measured.timing.notes, measured
        assert measured.timing.launches > 0 and measured.timing.memory_mb > 0 and measured.sets >= 4


@pytest.mark.cuda
def test_on_a_gpu_what_cannot_be_captured_keeps_its_eager_time():
    def waits(q, k, v):
        out, _ = linear_attention(q, k, v)
        return out * float(out.isfinite().all())  # waits for the device, which a capture refuses

    operators = [Operator("peer", "peers", waits), Operator("other", "peers", waits, capturable=False)]
    cells, stopped = measure_all(operators, [SMALL], QUICK, "cuda")
    assert not stopped and all(c.ranked and c.timing.graph_us is None for c in cells)
    assert all(c.timing.notes[0].startswith("no graph: ") for c in cells)
    (after, _), _ = measure_all([chunked()], [SMALL], QUICK, "cuda")
    assert after.timing.graph_us, "a capture that fails must not spoil the next"
