import jax
import jax.numpy as jnp
import pytest

from metamorph_jax.errors import ConfigError
from metamorph_jax.train.profile import Trace, parse


def test_parse():
    assert parse("10:15") == (10, 15) and parse("3:3") == (3, 3)
    for wrong in ("10", "5:4", "0:3", "a:b", "1:2:3"):
        with pytest.raises(ConfigError, match="START:STOP"):
            parse(wrong)


def test_trace_of_two_steps(tmp_path):
    said = []
    trace = Trace(tmp_path, (2, 3), 0, said.append)
    double = jax.jit(lambda x: x @ x)
    for step in range(1, 6):
        with trace.step(step):
            report = double(jnp.ones((8, 8)))
        assert (trace.done(step, report) > 0) == (step == 3)
        assert trace.running == (step == 2)
    trace.close()
    (file,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"train" in file.read_bytes()
    assert said == [f"trace of steps 2 to 3: {tmp_path / 'profile'} (xprof --logdir)"]


def test_over_already_or_cut_off(tmp_path):
    said = []
    trace = Trace(tmp_path, (5, 6), 5, said.append)
    assert "step 5 is over" in said[0] and trace.span is None
    trace = Trace(tmp_path, (1, 9), 0, said.append)
    with trace.step(1):
        pass
    trace.close()  # the run ended before step 9
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
