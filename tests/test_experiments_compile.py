"""experiments.compile: the numbers read from a compiled program are right, and jaxsoft moves the fewest bytes."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pandas as pd
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments._door import InputError
from experiments.benchmark.cases import BOTH, Case, cases
from experiments.compile import __main__ as script
from experiments.compile.__main__ import Config, run
from experiments.compile.cases import DENSE, HEAD, MESHES, SUITES, Placed
from experiments.compile.hlo import parse, trip_count
from experiments.compile.measure import COLUMNS, measure, seconds, summary
from experiments.compile.report import cell, markdown
from experiments.compile.targets import TARGETS, missing, with_peak
from experiments.compile.work import kernels

pytestmark = [pytest.mark.scripts, pytest.mark.x32, pytest.mark.optimized]

# Programs by hand, as GPUs' and TPUs' compilers write them.

LOOP = """
HloModule loop, is_scheduled=true

%step (p: s32[]) -> s32[] {
  %p = s32[]{:T(128)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  ROOT %next = s32[]{:T(128)} add(%p, %one)
}

%fused (p.1: f32[8,16], p.2: f32[4,16], p.3: s32[]) -> f32[8,16] {
  %p.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %p.2 = f32[4,16]{1,0:T(8,128)S(1)} parameter(1)
  %p.3 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %there = f32[4,16]{1,0:T(8,128)} dynamic-slice(%p.1, %p.3, %zero), dynamic_slice_sizes={4,16}
  %sum = f32[4,16]{1,0:T(8,128)} add(%there, %p.2)
  ROOT %changed = f32[8,16]{1,0:T(8,128)} dynamic-update-slice(%p.1, %sum, %p.3, %zero)
}

%condition (state: (s32[], f32[8,16], f32[4,16], s32[])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, /*index=3*/s32[]) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} BOUND
  ROOT %more = pred[]{:T(512)} compare(%n, %bound), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (state.1: (s32[], f32[8,16], f32[4,16], s32[])) -> (s32[], f32[8,16], f32[4,16], s32[]) {
  %state.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, /*index=3*/s32[]) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %copy = s32[]{:T(128)S(6)} copy(%n.1)
  %n.2 = s32[]{:T(128)} fusion(%copy), kind=kLoop, calls=%step, backend_config={"estimated_cycles":"10"}
  %whole = f32[8,16]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %part = f32[4,16]{1,0:T(8,128)S(1)} get-tuple-element(%state.1), index=2
  %bound.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=3
  %reduced = f32[4,16]{1,0:T(8,128)S(1)} all-reduce(%part), channel_id=1, to_apply=%add
  %written = f32[8,16]{1,0:T(8,128)} fusion(%whole, %reduced, %n.1), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %turn = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, /*index=3*/s32[]) tuple(%n.2, %written, %reduced, %bound.1)
}

ENTRY %main (x: f32[8,16], y: f32[4,16], limit: s32[]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %y = f32[4,16]{1,0:T(8,128)} parameter(1)
  %limit = s32[]{:T(128)} parameter(2)
  %first = s32[]{:T(128)} constant(0)
  %five = s32[]{:T(128)} constant(5)
  %copy-start = (f32[4,16]{1,0:T(8,128)S(1)}, f32[4,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[4,16]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %init = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, /*index=3*/s32[]) tuple(%first, %x, %copy-done, %five)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, /*index=3*/s32[]) while(%init), condition=%condition, body=%body STATED
  ROOT %last = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
CONSTANT, CARRIED, UNKNOWN = (
    "constant(7)",
    "get-tuple-element(%state), index=3",
    "custom-call(%n), custom_call_target=x",
)
STATED = ', backend_config={"known_trip_count":{"n":"9"},"known_init_step":{"init":"0","step":"1"}}'
TILE = 4 * 16 * 4


def loop(bound, stated=""):
    return parse(LOOP.replace("BOUND", bound).replace("STATED", stated))


@pytest.mark.parametrize(
    ("bound", "stated", "trips"),
    [(CONSTANT, "", 7), (CARRIED, "", 5), (UNKNOWN, "", None), (UNKNOWN, STATED, 9)],
    ids=["constant in the condition", "carried along", "unknown", "stated"],
)
def test_a_loop_runs_as_often_as_its_integers_say(bound, stated, trips):
    module = loop(bound, stated)
    assert trip_count(module, "main", module.computations["main"].instructions["loop"]) == trips


def test_a_loop_s_kernels_count_as_often_as_it_runs():
    found = {kernel.name: kernel for kernel in kernels(loop(CONSTANT), on_chip={1, 6})}
    # A copy into the vector memory; a reduction there; a slice that is read and written where it lies.
    assert {name: (k.nbytes, k.times) for name, k in found.items() if name != "n.2"} == {
        "copy-start": (TILE, 1),
        "reduced": (0, 7),
        "written": (2 * TILE + 4, 7),
    }
    assert found["written"].operations == 4 * 16
    assert (found["reduced"].collective, found["reduced"].carried) == ("all-reduce", TILE)
    assert (found["n.2"].cycles, found["written"].cycles) == (10, None)
    assert {k.name: k.nbytes for k in kernels(loop(CONSTANT))}["reduced"] == 2 * TILE


def test_sums_state_collectives_in_loops_and_unknown_counts():
    target = TARGETS["tpu-v5p"]
    known = summary(kernels(loop(CONSTANT), target.on_chip), target)
    assert (known["kernels"], known["launches"]) == (3, 21)
    assert (known["collectives"], known["collectives in loops"]) == ("", "7 × all-reduce of 256 B")
    assert known["MB"] * 1e6 == pytest.approx(TILE + 7 * (2 * TILE + 4 + 4))
    assert known["Mcycles"] * 1e6 == pytest.approx(70)
    unknown = summary(kernels(loop(UNKNOWN), target.on_chip), target)
    assert unknown["kernels"] == 3
    assert all(pd.isna(unknown[name]) for name in ("launches", "MB", "GFLOP", "roofline ms", "Mcycles"))


PARTS = """
%left (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

%right (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %m = f32[4]{0} negate(%q)
  ROOT %o = f32[4]{0} negate(%m)
}

%gathered (r: bf16[100,8], i: s32[3]) -> bf16[3,8] {
  %r = bf16[100,8]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %wide = f32[100,8]{1,0} convert(%r)
  %rows = f32[3,8]{1,0} gather(%wide, %i), offset_dims={1}
  ROOT %narrow = bf16[3,8]{1,0} convert(%rows)
}

%scattered (r.1: f32[100,8], i.1: s32[3], up: f32[3,8]) -> f32[100,8] {
  %r.1 = f32[100,8]{1,0} parameter(0)
  %i.1 = s32[3]{0} parameter(1)
  %up = f32[3,8]{1,0} parameter(2)
  ROOT %sum.1 = f32[100,8]{1,0} scatter(%r.1, %i.1, %up), update_window_dims={1}, to_apply=%sum
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%offloaded (from: f32[100,8], at: s32[3]) -> f32[3,8] {
  %from = f32[100,8]{1,0} parameter(0)
  %at = s32[3]{0} parameter(1)
  ROOT %beside = f32[3,8]{1,0} gather(%from, %at), offset_dims={1}
}, execution_thread="sparsecore"

%same (whole: bf16[8,16]) -> bf16[8,16] {
  %whole = bf16[8,16]{1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copied = bf16[8,16]{1,0:T(8,128)(2,1)} copy(%whole)
}

%put (into: bf16[8,16], part: bf16[2,16], row: s32[]) -> bf16[8,16] {
  %into = bf16[8,16]{1,0:T(16,128)(2,1)} parameter(0)
  %relaid = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%into), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%same
  %part = bf16[2,16]{1,0:T(8,128)(2,1)} parameter(1)
  %row = s32[] parameter(2)
  %column = s32[] constant(0)
  ROOT %changed = bf16[8,16]{1,0:T(16,128)(2,1)} dynamic-update-slice(%relaid, %part, %row, %column)
}

%product (u: bf16[8,32], v: bf16[16,32]) -> f32[8,16] {
  %u = bf16[8,32]{1,0} parameter(0)
  %v = bf16[16,32]{1,0} parameter(1)
  ROOT %w = f32[8,16]{1,0} convolution(%u, %v), dim_labels=bf_oi->bf
}

ENTRY %main (x: f32[4], k: s32[], table: bf16[100,8], index: s32[3], u.1: bf16[8,32], v.1: bf16[16,32], to: f32[100,8], up.1: f32[3,8], slice: bf16[2,16]) -> f32[] {
  %x = f32[4]{0} parameter(0)
  %k = s32[] parameter(1)
  %table = bf16[100,8]{1,0} parameter(2)
  %index = s32[3]{0} parameter(3)
  %u.1 = bf16[8,32]{1,0} parameter(4)
  %v.1 = bf16[16,32]{1,0} parameter(5)
  %either = f32[4]{0} conditional(%k, %x, %x), branch_computations={%left, %right}
  %some = bf16[3,8]{1,0} fusion(%table, %index), kind=kLoop, calls=%gathered
  %to = f32[100,8]{1,0} parameter(6)
  %up.1 = f32[3,8]{1,0} parameter(7)
  %added = f32[100,8]{1,0} fusion(%to, %index, %up.1), kind=kInput, calls=%scattered
  %gather-start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%offloaded
  %gather-update = ((f32[100,8]{1,0}, s32[3]{0}), f32[3,8]{1,0}) call-update(%gather-start, %to, %index)
  %gather-done = f32[3,8]{1,0} call-done(%gather-update)
  %mixed = f32[100,3]{1,0} dot(%table, %up.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %all-gather-start = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}
  %all = f32[16]{0} all-gather-done(%all-gather-start)
  %conv = f32[8,16]{1,0} fusion(%u.1, %v.1), kind=kOutput, calls=%product
  %dot = f32[8,16]{1,0} dot(%u.1, %v.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %lib = (f32[8,16]{1,0}, s8[64]{0}) custom-call(%u.1, %v.1), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %buffer = bf16[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %slice = bf16[2,16]{1,0} parameter(8)
  %kept = bf16[8,16]{1,0} fusion(%buffer, %slice, %k), kind=kLoop, calls=%put
  %one = f32[]{:T(128)} constant(1)
  %two = f32[] multiply(%one, %one)
  ROOT %total = f32[] reduce(%x, %two), dimensions={0}, to_apply=%sum
}
"""


def test_each_kind_of_kernel_is_counted_by_the_bytes_it_touches():
    found = {kernel.name: kernel for kernel in kernels(parse(PARTS))}
    longer_branch, called = {"m", "o"}, {"beside"}
    others = {"some", "added", "mixed", "all-gather-start", "conv", "dot", "lib", "kept", "total"}
    assert found.keys() == longer_branch | called | others
    assert found["beside"].nbytes == 2 * 3 * 8 * 4
    assert found["some"].nbytes == (3 * 8 + 3 * 8) * 2 + 3 * 4
    assert found["added"].nbytes == (3 + 2 * 3) * 8 * 4 + 3 * 4  # updates, and rows that are read and written
    assert found["mixed"].products == {"f32": 2 * 100 * 3 * 8}
    assert (found["all-gather-start"].collective, found["all-gather-start"].nbytes) == ("all-gather", 5 * 16)
    assert [found[name].products for name in ("conv", "dot", "lib")] == [{"bf16": 2 * 8 * 16 * 32}] * 3
    assert found["conv"].nbytes == (8 + 16) * 32 * 2 + 8 * 16 * 4
    assert found["kept"].nbytes == 2 * 2 * 16 * 2 + 4  # a slice, and where it goes, in an array that lies still
    assert (found["total"].nbytes, found["total"].operations) == (16 + 4 + 4, 4)


def test_the_second_attempt_of_a_head_counts_as_none():
    named = PARTS.replace("={%left, %right}", '={%left, %right}, metadata={op_name="jit(f)/second_attempt/cond"}')
    assert {kernel.name for kernel in kernels(parse(named))} & {"m", "n", "o"} == {"n"}


def test_the_slower_of_moving_and_multiplying_counts():
    target, found = TARGETS["h100"], {kernel.name: kernel for kernel in kernels(parse(PARTS))}
    dot = dataclasses.replace(found["dot"], nbytes=3_350_000, products={"bf16": 494_500_000})
    assert seconds(dot, target) == pytest.approx(1e-6)
    assert seconds(dataclasses.replace(dot, products={"bf16": 1_978_000_000}), target) == pytest.approx(2e-6)
    assert seconds(dataclasses.replace(dot, products={"f32": 1_976_000_000}), target) == pytest.approx(4e-6)


# Programs of this machine's compiler.


def found_in(fn, *arguments):
    return kernels(parse(jax.jit(fn).lower(*arguments).compile().as_text()))


def test_a_pass_reads_and_writes_once():
    x = jnp.ones((64, 256))
    assert sum(kernel.nbytes for kernel in found_in(lambda x: jnp.exp(x) + 1, x)) == 2 * x.nbytes


def test_matmuls_in_a_loop_are_counted_with_the_loop():
    x, w = jnp.ones((6, 32, 64)), jnp.ones((64, 48))
    ran = found_in(lambda x, w: jax.lax.map(lambda row: row @ w, x), x, w)
    assert sum(sum(k.products.values()) * k.times for k in ran) == 6 * 2 * 32 * 64 * 48
    assert {k.loops for k in ran if k.products} == {(6,)}


def test_collectives_are_told_apart_by_loops():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def block(x):
        return jax.lax.psum(jax.lax.fori_loop(0, 3, lambda n, y: jnp.sin(jax.lax.psum(y, "data") + n), x).sum(), "data")

    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    mapped = jax.shard_map(block, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    said = summary(found_in(mapped, x), TARGETS["h100"])
    assert said["collectives"] == "1 × all-reduce of 4 B"
    assert said["collectives in loops"] == "3 × all-reduce of 32 B"


# The table.

HEADS = [
    *map(Placed, cases(HEAD, [(16, 8, 40)], BOTH[1:])),
    *(Placed(case, mesh) for case in cases(HEAD[1:], [(16, 8, 40)], BOTH[1:]) for mesh in MESHES),
]
TINY = [Placed(Case(shape=(6, 50), dtype=BOTH[n % 2], **kind)) for n, kind in enumerate(DENSE)] + HEADS
TINY_IN_BOTH = [*map(Placed, cases(DENSE, [(6, 50)], BOTH)), *HEADS]


@pytest.fixture
def here(monkeypatch):
    """The CPU of this machine in place of a target."""
    monkeypatch.setattr(script, "devices_of", lambda target: jax.devices()[:4])
    monkeypatch.setitem(SUITES, "full", TINY)


@pytest.mark.parametrize(
    "suite", [TINY, pytest.param(TINY_IN_BOTH, marks=pytest.mark.exhaustive)], ids=["each kind", "each kind and dtype"]
)
def test_the_table_is_written(here, suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SUITES, "full", suite)
    table = run(Config(out=tmp_path))
    assert [*table] == COLUMNS
    assert {*table["implementation"]} >= {"jaxsoft", "jax.nn", "optax", "optax, full logits"}
    assert table[["kernels", "MB", "roofline ms", "over least", "temporaries MB"]].notna().to_numpy().all()
    assert (table["collectives"] != "").tolist() == (table["mesh"] != "").tolist()
    written = pd.read_csv(tmp_path / "results.csv")
    assert [*written] == COLUMNS
    assert written["roofline ms"].tolist() == pytest.approx(table["roofline ms"].tolist())
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# NVIDIA H100 80GB HBM3, compiled for and not run on\n")
    assert text.count("\n| ") == len(table) + 1
    assert text in capsys.readouterr().out
    assert (tmp_path / "excess.png").stat().st_size > 10_000


def test_cases_are_chosen_by_part_of_their_name(here, tmp_path):
    table = run(Config(only="(16, 8, 40) bfloat16 on data 2", out=tmp_path))
    assert {*table["mesh"]} == {"data 2 × model 2"}
    with pytest.raises(InputError, match="--only: expected part of one of"):
        run(Config(only="nothing", out=tmp_path))


def test_the_least_time_is_for_one_device():
    alone, model = TINY[-3], TINY[-1]
    assert alone.least_bytes == 2 * (16 * 8 + 8 * 40) * 2 + 16 * 4
    assert model.least_bytes == 2 * (16 * 8 / 2 + 8 * 40 / 2) * 2 + 16 * 4 / 2
    assert alone.least_operations == 4 * model.least_operations == 6 * 16 * 8 * 40
    assert Placed(cases(DENSE[1:2], [(6, 50)], BOTH)[1]).least_bytes == 4 * 6 * 50 * 2


def test_a_library_that_does_not_compile_is_named_and_an_error_in_jaxsoft_raised(monkeypatch):
    placed, target, devices = TINY[0], TARGETS["h100"], jax.devices()[:4]
    monkeypatch.setattr(jax.nn, "softmax", lambda z, axis: z.no_such_method())
    ours, theirs = measure(placed, target, devices)
    assert "kernels" in ours
    assert theirs["not compiled"].startswith("AttributeError: ")
    monkeypatch.setattr("jaxsoft.softmax", lambda z, axis: z.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        measure(placed, target, devices)


def test_another_peak_is_stated():
    target = with_peak(TARGETS["h100"], 500)
    assert (target.half, round(target.single / target.half, 2), target.bandwidth) == (5e14, 0.5, 3.35e12)
    text = markdown(pd.DataFrame([], columns=COLUMNS), target, "", {})
    assert "500 TFLOP/s for bfloat16 matmuls" in text
    assert "matmuls: as given" in text
    with pytest.raises(InputError, match="--peak: expected a positive number"):
        run(Config(peak=0))


def test_unknown_counts_are_called_unknown():
    target = TARGETS["tpu-v5p"]
    row = dict.fromkeys(COLUMNS[:5], "x") | summary(kernels(loop(UNKNOWN), target.on_chip), target)
    refused = dict.fromkeys(COLUMNS[:5], "x") | {"not compiled": "why"}
    lines = markdown(pd.DataFrame([row, refused], columns=COLUMNS), target, "", {}).splitlines()
    assert lines[-2:] == [
        "| x | x | x | x | x | 3 | unknown | unknown | unknown | unknown × all-reduce of 256 B | unknown | unknown |  |",
        "| x | x | x | x | x |  |  |  |  |  |  |  | why |",
    ]


@pytest.mark.parametrize(("value", "said"), [(1234.5, "1,234"), (7.0, "7"), (0.12345, "0.123"), (None, ""), ("a", "a")])
def test_a_cell_is_three_digits_or_a_whole_number(value, said):
    assert cell(value) == said


@pytest.mark.parametrize(
    ("device", "extra"), [("b200", "compile-gpu"), ("tpu-v6e", "compile-tpu"), ("tpu7x", "compile-tpu")]
)
def test_a_compiler_that_is_not_installed_is_one_line(monkeypatch, tmp_path, device, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as refused:
        run(Config(device=device, out=tmp_path))
    name = TARGETS[device].kind
    assert str(refused.value) == f"no compiler for {name} is installed: pip install -e '.[experiments,{extra}]'"


# Devices that are not there.


@pytest.fixture(scope="module", params=["h100", "tpu-v5p"])
def compiled(request, tmp_path_factory):
    if why := missing(TARGETS[request.param]):
        pytest.skip(why)
    out = tmp_path_factory.mktemp(request.param)
    return run(Config(device=request.param, suite="small", out=out)).set_index(["case", "mesh", "implementation"])


def test_logits_are_read_no_more_often_than_promised(compiled):
    passes = compiled["passes"].dropna()
    ours = passes.xs("jaxsoft", level="implementation").droplevel("mesh")
    promised = {
        "softmax": 3, "softmax + VJP": 7, "log_softmax + VJP": 6, "cross-entropy": 1, "cross-entropy + gradient": 3,
    }  # fmt: skip
    assert {*ours.index} == {*promised}
    assert not {case: found for case, found in ours.items() if found > promised[case] + 0.05}
    for (case, _, _), theirs in passes.items():
        assert ours[case] <= theirs


def test_a_fused_head_never_stores_all_logits(compiled):
    head = compiled.xs(("linear cross-entropy + gradient", "", "jaxsoft"))
    # A quarter for what is kept, in half precision, and the rest for a tile, which libtpu counts twice in a loop.
    assert head["temporaries MB"] * 1e6 < 0.5 * 8192 * 32768 * 4
    assert head["launches"] > head["kernels"]  # in tiles, and how many is known


def test_nothing_large_is_reduced_inside_a_loop(compiled):
    ours = compiled.xs("jaxsoft", level="implementation")["collectives in loops"].droplevel("case")
    assert ours["data 4"] == ""
    assert not re.search("[MG]B", ours["data 2 × model 2"])
    assert {*re.findall(r"× (\S+) of", ours["data 2 × model 2"])} <= {"all-reduce"}


def test_the_kernels_gradient_is_reduced_once(compiled):
    ours = compiled.xs("jaxsoft", level="implementation")["collectives"].droplevel("case")
    for layout, columns in (("data 4", 32768), ("data 2 × model 2", 16384)):
        sizes = re.findall(r"(\d+) × (?:all-reduce|reduce-scatter) of ([\d.]+) MB", ours[layout])
        large = [int(count) for count, megabytes in sizes if float(megabytes) > 0.9 * 512 * columns * 2 / 1e6]
        assert large == [1]
        assert "all-gather" not in ours[layout]
