import jax.numpy as jnp
import pytest

from fastcifar_jax.schedules import Triangle, WarmupDecay, count_steps, piecewise_linear

STEPS = 97  # an epoch of CIFAR-10 at batch size 512

# Section 10 of the specification: (epochs, schedule, peak) -> {step: rate}
GOLDEN = {
    (24, WarmupDecay(warmup=5 / 24), 0.4): {
        1: 0.000824742,
        97: 0.08,
        485: 0.4,
        486: 0.399782963,
        1000: 0.288225719,
        2327: 0.000217037,
        2328: 0.0,
    },
    (10, WarmupDecay(end=0.1, flat_epochs=2), 1.0): {1: 0.005154639, 97: 0.5, 194: 1.0, 485: 0.55, 776: 0.1, 970: 0.1},
    (13, WarmupDecay(end=0.1, flat_epochs=2), 1.0): {
        1: 0.003965107,
        252: 0.999206979,
        253: 0.999116348,
        1067: 0.1,
        1261: 0.1,
    },
}


@pytest.mark.parametrize(("run", "golden"), GOLDEN.items(), ids=str)
def test_golden_rates(run, golden):
    num_epochs, shape, peak = run
    schedule = shape(num_epochs)
    for step, expected in golden.items():
        assert float(peak * schedule(jnp.float32(step / STEPS))) == pytest.approx(expected, rel=2e-6, abs=1e-7), step


def test_constant_outside_the_knots():
    schedule = piecewise_linear((1.0, 2.0), (3.0, 5.0))
    assert [float(schedule(jnp.float32(t))) for t in (0, 1, 1.5, 2, 9)] == [3, 3, 4, 5, 5]


def test_too_short_a_run_says_what_to_change():
    WarmupDecay(end=0.1, flat_epochs=2)(3)
    with pytest.raises(ValueError, match=r"0, 0.4, 0 .*train for more epochs"):
        WarmupDecay(end=0.1, flat_epochs=2)(2)


@pytest.mark.parametrize("fields", [{"warmup": 0.0}, {"warmup": 1.0}, {"end": -0.1}, {"flat_epochs": -1}])
def test_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        WarmupDecay(**fields)


def test_knots_and_values_must_pair():
    with pytest.raises(ValueError, match="2 knots and 3 values"):
        piecewise_linear((0.0, 1.0), (0.0, 1.0, 2.0))


def test_triangle_of_airbench94():
    """airbench.md, section 5: 476 steps, the peak at step 109, 0.07 at the step after the last."""
    num_steps = count_steps(9.9, 48)
    assert num_steps == 476
    schedule = Triangle()(num_steps)
    found = [float(schedule(jnp.float32(step))) for step in (0, 109, 476)]
    assert found == pytest.approx([0.2, 1.0, 0.07])
    assert float(schedule(jnp.float32(54.5))) == pytest.approx(0.6)


def test_triangle_without_a_way_up():
    schedule = Triangle(peak=0.0, end=0.0)(200)
    assert [float(schedule(jnp.float32(step))) for step in (0, 50, 200)] == pytest.approx([1.0, 0.75, 0.0])


@pytest.mark.parametrize(
    ("num_epochs", "steps_per_epoch", "steps"), [(8, 25, 200), (9.9, 10, 99), (1.1, 10, 11), (1, 7, 7)]
)
def test_count_steps(num_epochs, steps_per_epoch, steps):
    assert count_steps(num_epochs, steps_per_epoch) == steps


@pytest.mark.parametrize("fields", [{"start": -0.1}, {"peak": 1.0}, {"end": -1.0}])
def test_triangle_refuses(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        Triangle(**fields)
