"""fm.data.Sinusoid: the distribution of Finn et al. 2017 section 5.1, deterministic in (seed,
i)."""

import math
import pickle

import pytest
import torch
from tensors import equal
from torch.utils.data import DataLoader

from fastmeta.data import Episode, Sinusoid


def test_items_are_episodes_of_the_right_shapes():
    episode = Sinusoid(3, shots=7, query=4, iterations=2)[0]
    assert isinstance(episode, Episode)
    assert [tuple(t.shape) for t in episode] == [(3, 7, 1), (3, 7, 1), (3, 4, 1), (3, 4, 1)]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in episode)
    assert Sinusoid(3, shots=7, iterations=1)[0].query_x.shape == (3, 7, 1)


def test_the_loop_has_iterations_items():
    data = Sinusoid(2, 3, iterations=37)
    episodes = list(data)
    assert len(data) == len(episodes) == 37
    assert equal(data[-1], episodes[36])
    assert len({e.support_x[0, 0, 0].item() for e in episodes}) == 37


def test_items_depend_on_seed_and_index_alone():
    one, two = Sinusoid(4, 5, iterations=40, seed=3), Sinusoid(4, 5, iterations=100, seed=3)
    assert all(equal(one[i], two[i]) for i in (39, 0, 17, 16, 15, 39))
    assert not equal(one[0], Sinusoid(4, 5, iterations=40, seed=4)[0])


def test_items_are_the_callers_own():
    data = Sinusoid(2, 3, iterations=2, dtype=torch.float64)
    before = data[0]
    amplitude = data.parameters(0)[0]
    for tensor in (*data[0], data.parameters(0)[0]):
        tensor.fill_(math.nan)
    assert equal(data[0], before)
    assert torch.equal(data.parameters(0)[0], amplitude)


def test_workers_give_the_same_sequence_as_the_loop():
    data = Sinusoid(2, 3, iterations=35, seed=1)
    loaded = list(DataLoader(data, batch_size=None, num_workers=2))
    assert len(loaded) == 35
    assert all(isinstance(a, Episode) and equal(a, b) for a, b in zip(loaded, data, strict=True))


def test_pickled_data_gives_the_same_items():
    data = Sinusoid(2, 3, iterations=20, seed=9)
    assert equal(pickle.loads(pickle.dumps(data))[18], data[18])


def test_targets_match_reference():
    data = Sinusoid(6, 5, 8, iterations=20, dtype=torch.float64)
    for i in (0, 19):
        amplitude, phase = data.parameters(i)
        assert amplitude.shape == phase.shape == (6,)
        for x, y in (data[i][:2], data[i][2:]):
            reference = amplitude[:, None, None] * torch.sin(x - phase[:, None, None])
            assert (y - reference).norm() <= 1e-14 * reference.norm()


def test_float32_is_the_rounded_float64():
    low, high = (Sinusoid(4, 5, iterations=1, dtype=t)[0] for t in (torch.float32, torch.float64))
    assert equal(low, Episode(*(t.float() for t in high)))


def test_parameters_and_inputs_match_the_uniform_distributions():
    data = Sinusoid(200, 10, iterations=100, seed=5, dtype=torch.float64)
    pairs = [data.parameters(i) for i in range(100)]
    samples = {
        (0.1, 5.0): torch.cat([amplitude for amplitude, _ in pairs]),
        (0.0, math.pi): torch.cat([phase for _, phase in pairs]),
        (-5.0, 5.0): torch.cat([torch.cat((e.support_x, e.query_x)).flatten() for e in data]),
    }
    for (low, high), values in samples.items():
        width, n = high - low, len(values)
        assert values.min() >= low
        assert values.max() <= high
        # Mean, variance and fourth moment of the uniform distribution, each within five standard
        # errors.
        unit = (values - low) / width - 0.5
        for power, mean in ((1, 0.0), (2, 1 / 12), (4, 1 / 80)):
            error = math.sqrt((0.25**power / (2 * power + 1) - mean**2) / n)
            assert abs((unit**power).mean().item() - mean) < 5 * error


def test_amplitude_phase_and_inputs_are_independent():
    data = Sinusoid(500, 1, iterations=40, seed=2, dtype=torch.float64)
    rows = [
        torch.stack((*data.parameters(i), data[i].support_x[:, 0, 0], data[i].query_x[:, 0, 0]))
        for i in range(40)
    ]
    correlation = torch.corrcoef(torch.cat(rows, dim=1))
    assert (correlation - torch.eye(4, dtype=torch.float64)).abs().max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("name", ["tasks", "shots", "query", "iterations"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), ("2", TypeError)]
)
def test_rejects_bad_counts(name, value, error):
    arguments = {"tasks": 2, "shots": 3, "query": 3, "iterations": 4, name: value}
    with pytest.raises(error, match=f"Sinusoid: `{name}` must be"):
        Sinusoid(**arguments)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_rejects_bad_seeds(seed):
    with pytest.raises(ValueError, match="Sinusoid: `seed` must be in 0"):
        Sinusoid(2, 3, iterations=4, seed=seed)


def test_neighbouring_seeds_differ_over_the_whole_range():
    firsts = {
        Sinusoid(2, 3, iterations=4, seed=seed)[0].support_x[0, 0, 0].item()
        for seed in (0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    }
    assert len(firsts) == 8


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, "float32"])
def test_rejects_other_dtypes(dtype):
    with pytest.raises(TypeError, match="Sinusoid: `dtype` must be"):
        Sinusoid(2, 3, iterations=4, dtype=dtype)


@pytest.mark.parametrize("index", [4, -5])
def test_rejects_an_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"Sinusoid: `index` must be below iterations = 4, got {index}"):
        Sinusoid(2, 3, iterations=4)[index]
