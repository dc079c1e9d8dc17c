"""What every protocol is given."""

import pytest
import torch

from smalti.data.dataset import Dataset, Labelled
from smalti.data.images.labelled import open_labelled
from smalti.evaluation.context import EvaluationContext, own_head, spread
from smalti.models.encoder import ClassHead


@pytest.mark.parametrize(("number", "count", "expected"), [(0, 3, ()), (2, 5, (0, 1)), (10, 5, (0, 2, 4, 6, 8))])
def test_spread_indices_are_distinct_ascending_and_at_most_as_many_as_asked(number, count, expected):
    assert spread(number, count) == expected


def test_values_are_computed_once(tiny, greys):
    context = EvaluationContext(tiny, open_labelled(greys, need="labels"))
    calls = []
    assert [context.once("a", lambda: calls.append(1) or 7) for _ in range(3)] == [7, 7, 7] and calls == [1]
    assert context.evaluated == "val images" and len(context.names) == len(context.data.test)
    assert context.device == torch.device("cpu") and context.shown == spread(len(context.names), 8)


def test_a_stored_head_is_used_for_its_own_classes_only(tiny):
    tiny.class_head = ClassHead(torch.zeros(2, tiny.embed_dim), torch.zeros(2), ("a", "b"))
    assert own_head(tiny, ("a", "b")) is tiny.class_head
    assert own_head(tiny, ("a", "c")) is None and own_head(tiny, ("a", "b", "c")) is None
    tiny.class_head = tiny.class_head._replace(classes=())
    assert own_head(tiny, ("x", "y")) is tiny.class_head  # names are not stored


def test_images_are_a_dataset(greys):
    labelled = open_labelled(greys, need="labels")
    assert isinstance(labelled, Labelled) and isinstance(labelled.train, Dataset)
    assert labelled.train.labels is not None and len(labelled.train.labels) == len(labelled.train)
    source = labelled.train.source(1)
    assert len(source) == len(labelled.train) and source.read(0).shape[2] == 1
    assert source.path(0) == labelled.train.paths[0]
