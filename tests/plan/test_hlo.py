"""Collectives of programs written by hand, with numbers worked out by hand."""

import pytest

from metamorph_jax.plan import hlo

# Four turns of a loop that gathers 64 x 8 bfloat16 (in three pieces of one channel) and moves 8
# floats to a neighbour; a loop from 2 in steps of 3 up to 11; one that runs until its data says so.
LOOPS = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[8,8]) -> bf16[64,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %ag.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8,'y'=2] {'x'}, dimensions={0}
}

%done (p: bf16[8,8]) -> bf16[64,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[64,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['x'=8,'y'=2] {'x'}, dimensions={0}
}

%condition (s: (s32[], bf16[8,8])) -> pred[] {
  %s = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT
}

%body (s: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %s.1 = (s32[]{:T(128)}, bf16[8,8]{1,0}, /*index=2*/f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %x = bf16[8,8]{1,0} get-tuple-element(%s.1), index=1
  %y = f32[8]{0} get-tuple-element(%s.1), index=2
  %f.1 = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  %cp = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %cpd = f32[8]{0} collective-permute-done(%cp)
  ROOT %t.1 = (s32[], bf16[8,8], f32[8]) tuple(%next, %x, %cpd)
}

%condition.2 (s: (s32[], f32[16])) -> pred[] {
  %s.2 = (s32[], f32[16]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %eleven = s32[] constant(11)
  ROOT %less.2 = pred[] compare(%i.2, %eleven), direction=LT
}

%body.2 (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s.3 = (s32[], f32[16]) parameter(0)
  %i.3 = s32[] get-tuple-element(%s.3), index=0
  %three = s32[] constant(3)
  %next.2 = s32[] add(%i.3, %three)
  %z = f32[16] get-tuple-element(%s.3), index=1
  %ar = f32[16] all-reduce(%z), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t.2 = (s32[], f32[16]) tuple(%next.2, %ar)
}

%condition.3 (s: (s32[], s32[], f32[16])) -> pred[] {
  %s.4 = (s32[], s32[], f32[16]) parameter(0)
  %i.4 = s32[] get-tuple-element(%s.4), index=0
  %n = s32[] get-tuple-element(%s.4), index=1
  ROOT %less.3 = pred[] compare(%i.4, %n), direction=LT
}

%body.3 (s: (s32[], s32[], f32[16])) -> (s32[], s32[], f32[16]) {
  %s.5 = (s32[], s32[], f32[16]) parameter(0)
  %v = f32[16] get-tuple-element(%s.5), index=2
  %rs = f32[2] reduce-scatter(%v), channel_id=11, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  ROOT %t.3 = (s32[], s32[], f32[16]) tuple(%s.5, %s.5, %v)
}

ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {
  %p.2 = bf16[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %v.0 = f32[16] parameter(1)
  %w.0 = f32[8] parameter(2)
  %init = (s32[], bf16[8,8], f32[8]) tuple(%zero, %p.2, %w.0)
  %loop = (s32[], bf16[8,8], f32[8]) while(%init), condition=%condition, body=%body
  %init.2 = (s32[], f32[16]) tuple(%two, %v.0)
  %loop.2 = (s32[], f32[16]) while(%init.2), condition=%condition.2, body=%body.2
  %init.3 = (s32[], s32[], f32[16]) tuple(%zero, %zero, %v.0)
  %loop.3 = (s32[], s32[], f32[16]) while(%init.3), condition=%condition.3, body=%body.3
  %a2a = bf16[16,4]{1,0} all-to-all(%p.2), channel_id=12, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %out = bf16[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_loops_pieces_and_groups():
    found = hlo.traffic(LOOPS, 16)
    assert found.count == {
        "all-gather": 4, "collective-permute": 4, "all-reduce": 3, "reduce-scatter": 1,
        "all-to-all": 1,
    }  # fmt: skip
    assert found.size == {
        "all-gather": 4 * 1024,
        "collective-permute": 4 * 32,
        "all-reduce": 3 * 64,
        "reduce-scatter": 64,  # the whole, not the piece that is kept
        "all-to-all": 128,
    }
    assert found.wire["all-gather"] == 4 * 1024 * 7 / 8
    assert found.wire["all-reduce"] == 3 * 64 * 2 * 3 / 4
    assert found.wire["reduce-scatter"] == 64 * 7 / 8
    assert found.wire["all-to-all"] == 128 * 15 / 16
    assert found.wire["collective-permute"] == 4 * 32
    assert found.unknown_loops == 1


def test_a_count_that_xla_knows_comes_first():
    known = LOOPS.replace(
        "condition=%condition.3, body=%body.3",
        'condition=%condition.3, body=%body.3, backend_config={"known_trip_count":{"n":"5"}}',
    )
    found = hlo.traffic(known, 16)
    assert found.count["reduce-scatter"] == 5 and found.unknown_loops == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", 3),
        ("replica_groups=[4,2]<=[8]T(1,0)", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_group_size(text, size):
    assert hlo.group_size(text, 8) == size


def test_sizes_of_shapes():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[], s32[0], f8e4m3fn[5])"
    assert hlo.sizes(shape) == [12, 4, 0, 5]
