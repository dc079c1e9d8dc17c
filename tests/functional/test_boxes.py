import torch
from torch.testing import assert_close

from smalti.functional.boxes import normalize_boxes


def test_boxes_become_shares_of_their_own_image():
    boxes = torch.tensor([[0.0, 0.0, 50.0, 40.0], [10, 20, 20, 40], [25, 10, 50, 20], [0, 0, 5, 80]])  # 2 views of 2
    source_size = torch.tensor([[40, 50], [80, 20]])  # height, width
    expected = torch.tensor([[0, 0, 1, 1], [0.5, 0.25, 1, 0.5], [0.5, 0.25, 1, 0.5], [0, 0, 0.25, 1]])
    assert_close(normalize_boxes(boxes, source_size), expected)
