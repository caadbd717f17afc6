"""fm.data.Episodes: N-way K-shot sampling that is fair, disjoint and deterministic in (seed, i)."""

import math
import pickle

import pytest
import torch
from tensors import equal
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fastmeta.data import Episode, Episodes

CLASSES, EXAMPLES = 9, 6
SIZES = {"ways": 4, "shots": 2, "query": 3, "tasks": 5, "iterations": 30}


def images() -> torch.Tensor:
    """[9, 6, 1, 2]: every example is (class, number within the class)."""
    grid = torch.cartesian_prod(torch.arange(CLASSES), torch.arange(EXAMPLES))
    return grid.reshape(CLASSES, EXAMPLES, 1, 2).float()


class Pairs(Dataset):
    """(x, label) pairs with `targets`; counts how often an item is read."""

    def __init__(self, x, y):
        self.x, self.targets, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads += 1
        return self.x[index], self.targets[index]


def test_items_are_episodes_of_the_right_shapes():
    episode = Episodes(images(), **SIZES)[0]
    assert isinstance(episode, Episode)
    assert [tuple(t.shape) for t in episode] == [(5, 8, 1, 2), (5, 8), (5, 12, 1, 2), (5, 12)]
    assert episode.support_y.dtype == episode.query_y.dtype == torch.int64
    assert all(t.is_contiguous() for t in episode)


def test_every_task_is_balanced_and_support_and_query_are_disjoint():
    for episode in Episodes(images(), **SIZES):
        for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
            assert torch.equal(support_y.bincount(minlength=4), torch.full((4,), 2))
            assert torch.equal(query_y.bincount(minlength=4), torch.full((4,), 3))
            drawings = torch.cat((support_x, query_x)).reshape(-1, 2).long()
            assert len(drawings.unique(dim=0)) == 4 * (2 + 3)
            # One class of the data for each label, another for another label.
            labels = torch.cat((support_y, query_y))
            owners = [drawings[labels == label, 0].unique() for label in range(4)]
            assert all(len(owner) == 1 for owner in owners)
            assert len(torch.cat(owners).unique()) == 4


def test_classes_examples_and_order_are_drawn_uniformly():
    data = Episodes(images(), ways=3, shots=1, query=2, tasks=100, iterations=100, seed=8)
    first = torch.cat([e.support_x.reshape(100, 3, 2) for e in data]).long()  # [10000, 3, 2]
    n = len(first)
    for label in range(3):
        code = first[:, label, 0] * EXAMPLES + first[:, label, 1]
        counts = code.bincount(minlength=CLASSES * EXAMPLES).double()
        share = 1 / (CLASSES * EXAMPLES)
        assert (counts / n - share).abs().max() < 5 * math.sqrt(share / n)
    # Ordered pairs of classes are equally likely too.
    pairs = (
        (first[:, 0, 0] * CLASSES + first[:, 1, 0]).bincount(minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    )
    assert pairs.diagonal().sum() == 0
    share = 1 / (CLASSES * (CLASSES - 1))
    off = pairs[~torch.eye(CLASSES, dtype=torch.bool)].double()
    assert (off / n - share).abs().max() < 5 * math.sqrt(share / n)


def test_everything_can_be_used_up():
    data = Episodes(images(), ways=CLASSES, shots=EXAMPLES - 1, query=1, tasks=2, iterations=1)
    support, query = data.indices(0)
    for task in range(2):
        assert sorted([*support[task], *query[task]]) == list(range(CLASSES * EXAMPLES))


def test_items_depend_on_seed_and_index_alone():
    one, two = Episodes(images(), **SIZES, seed=3), Episodes(images(), **{**SIZES, "iterations": 99}, seed=3)
    assert all(equal(one[i], two[i]) for i in (29, 0, 7, 29))
    assert not equal(one[0], one[1])
    assert not equal(one[0], Episodes(images(), **SIZES, seed=4)[0])


def test_indices_name_the_examples():
    data = Episodes(images(), **SIZES)
    support, query = data.indices(2)
    flat = images().flatten(0, 1)
    assert torch.equal(flat[torch.from_numpy(support)], data[2].support_x)
    assert torch.equal(flat[torch.from_numpy(query)], data[2].query_x)


def test_workers_give_the_same_sequence_as_the_loop():
    data = Episodes(images(), **SIZES, seed=1)
    loaded = list(DataLoader(data, batch_size=None, num_workers=2))
    assert len(loaded) == 30
    assert all(isinstance(a, Episode) and equal(a, b) for a, b in zip(loaded, data, strict=True))


def test_pickled_data_gives_the_same_items():
    data = Episodes(images(), **SIZES, seed=9)
    assert equal(pickle.loads(pickle.dumps(data))[18], data[18])


def test_labelled_tensors_and_datasets_match_the_images():
    x = images().flatten(0, 1)
    y = torch.arange(CLASSES).repeat_interleave(EXAMPLES) * 10 - 7
    expected = Episodes(images(), **SIZES)[3]
    assert equal(Episodes((x, y), **SIZES)[3], expected)
    assert equal(Episodes(TensorDataset(x, y), **SIZES)[3], expected)
    assert equal(Episodes(Pairs(x, y.tolist()), **SIZES)[3], expected)
    assert equal(Episodes(Subset(Pairs(x, y.tolist()), range(len(x))), **SIZES)[3], expected)


def test_shuffled_unequal_classes_are_sampled_from_their_own_examples():
    counts = torch.tensor([5, 9, 6, 30, 5])
    y = torch.arange(5).repeat_interleave(counts)[
        torch.randperm(55, generator=torch.Generator().manual_seed(0))
    ]
    x = torch.stack((y, torch.arange(55)), dim=1)
    seen = set()
    for episode in Episodes((x, y), ways=3, shots=2, query=3, tasks=4, iterations=40):
        both = torch.cat((episode.support_x, episode.query_x), dim=1)  # [4, 15, 2]
        labels = torch.cat((episode.support_y, episode.query_y), dim=1)
        for task, label in zip(both, labels, strict=True):
            assert len(task[:, 1].unique()) == 15
            assert all(len(task[label == way, 0].unique()) == 1 for way in range(3))
            seen |= set(task[:, 1].tolist())
    assert seen == set(range(55))


def test_targets_spare_reading_the_dataset():
    data = Pairs(images().flatten(0, 1), torch.arange(CLASSES).repeat_interleave(EXAMPLES))
    episodes = Episodes(data, **SIZES)
    assert data.reads == 0
    episodes[0]
    assert data.reads == 5 * 4 * (2 + 3)


def test_episode_moves_to_a_device():
    moved = Episodes(images(), **SIZES)[0].to("meta")
    assert isinstance(moved, Episode)
    assert all(t.device.type == "meta" for t in moved)


def test_rejects_too_few_classes():
    with pytest.raises(ValueError, match="Episodes: `ways` must be at most 9, the classes of `data`, got 10"):
        Episodes(images(), **{**SIZES, "ways": 10})


def test_rejects_too_few_examples():
    with pytest.raises(ValueError, match=r"must have shots \+ query = 7 examples, class 0 has 6"):
        Episodes(images(), **{**SIZES, "query": 5})
    y = torch.tensor([3] * 5 + [4] * 9 + [8] * 4)
    with pytest.raises(ValueError, match=r"must have shots \+ query = 5 examples, class 8 has 4"):
        Episodes((torch.zeros(18, 1), y), **{**SIZES, "ways": 2})


@pytest.mark.parametrize("name", ["ways", "shots", "query", "tasks", "iterations"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError)])
def test_rejects_bad_counts(name, value, error):
    with pytest.raises(error, match=f"Episodes: `{name}` must be"):
        Episodes(images(), **{**SIZES, name: value})


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(5), ValueError, r"must be \[classes, examples, ...\], got \(5,\)"),
        (torch.zeros(0, 4, 1), ValueError, "must have examples, got none"),
        ((torch.zeros(4, 1), torch.zeros(4)), TypeError, "labels of `data` must be integers, got float32"),
        ((torch.zeros(4, 1), torch.zeros(3, dtype=torch.int64)), ValueError, r"its 4 examples, got \(3,\)"),
        (TensorDataset(torch.zeros(4, 1)), TypeError, "must be a pair"),
        ([1, 2], TypeError, "got list"),
    ],
    ids=["flat", "empty", "float-labels", "label-count", "no-labels", "list"],
)
def test_rejects_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        Episodes(data, **SIZES)


def test_rejects_examples_that_are_no_tensors():
    episodes = Episodes(Pairs([[0.0]] * 12, [0] * 6 + [1] * 6), **{**SIZES, "ways": 2})
    with pytest.raises(TypeError, match=r"example \d+ of `data` must be a tensor, got list"):
        episodes[0]


def test_rejects_an_index_out_of_range():
    with pytest.raises(IndexError, match="Episodes: `index` must be below iterations = 30, got 30"):
        Episodes(images(), **SIZES)[30]


@pytest.mark.parametrize("index", [1.0, slice(0, 2), "0"], ids=["float", "slice", "string"])
def test_rejects_an_index_that_is_no_integer(index):
    with pytest.raises(
        TypeError, match="Episodes: `index` must be an integer, the number of a meta-batch, got "
    ):
        Episodes(images(), **SIZES)[index]
