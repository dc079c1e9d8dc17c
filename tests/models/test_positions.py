"""Positions of tokens at any grid, from a table and from a field."""

import pytest
import torch
from torch.testing import assert_close

from smalti.functional.positions import Resampling
from smalti.layers.position_field import PositionField
from smalti.models.build import build_encoder
from smalti.models.positions import field_positions, field_table, table_positions


def vit(**arguments):
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, seed=0, depth=1, embed_dim=24, num_heads=2, **arguments
    )
    return encoder.vit


@pytest.mark.parametrize("no_embed_class", [True, False])
def test_a_table_at_its_own_grid_is_the_table(no_embed_class):
    model = vit(no_embed_class=no_embed_class)
    patches, prefix = table_positions(model, (4, 4), Resampling())
    assert_close(patches, model.pos_embed[:, 0 if no_embed_class else 1 :])
    assert (prefix is None) == no_embed_class
    if prefix is not None:
        assert_close(prefix, model.pos_embed[:, :1])
    patches, _ = table_positions(model, (2, 6), Resampling())
    assert patches.shape == (1, 12, 24)


def test_a_model_without_positions_has_none():
    model = vit(pos_embed="none")
    assert table_positions(model, (4, 4), Resampling()) is None


def test_a_field_becomes_the_table_that_gives_the_same_positions():
    torch.manual_seed(0)
    model = vit()
    field = PositionField(24, (5, 5), has_class_token=True)
    torch.nn.init.normal_(field.class_position)
    patches, prefix = field_positions(field, (4, 4), 1)
    table, token = field_table(model, field, (4, 4))
    assert_close(table, torch.cat([prefix, patches], dim=1))
    assert_close(token, model.cls_token)
    apart = vit(no_embed_class=True)  # timm's table has no row for the class token: its position goes into the token
    table, token = field_table(apart, field, (4, 4))
    assert_close(table, patches)
    assert_close(token, apart.cls_token + prefix)
