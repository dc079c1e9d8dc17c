"""The judge of orders: its likelihood is the normal law's, it looks at nothing hidden, and learns who tells whom."""

import math

import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.layers.tokens import PatchTokenSource
from smalti.methods.prefix import Prediction, Prefix, PrefixConfig, gaussian_nll, random_seen

SMALL = PrefixConfig(dim=24, depth=2, num_heads=3)


def judge(num: int = 4, dim: int = 3) -> Prefix:
    torch.manual_seed(0)
    return Prefix(PatchTokenSource(8 * num, 3, 8, dim), SMALL).eval()


def test_the_loss_is_the_normal_laws():
    torch.manual_seed(0)
    told, tokens = Prediction(torch.randn(3, 5, 2), torch.randn(3, 5, 2)), torch.randn(3, 5, 2)
    seen = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    law = torch.distributions.Normal(told.mean, (told.log_variance / 2).exp())
    each = -law.log_prob(tokens).mean(-1)
    expected = torch.stack([one[~here].mean() for one, here in zip(each, seen, strict=True)]).mean()
    assert_close(gaussian_nll(told, tokens, seen), expected)
    sure = Prediction(tokens, torch.zeros_like(tokens))
    assert_close(gaussian_nll(sure, tokens, seen).item(), math.log(2 * math.pi) / 2)


def test_any_number_of_tokens_is_seen_but_never_all():
    seen = random_seen(torch.arange(4000), 8)
    counts = torch.bincount(seen.sum(1), minlength=9)
    assert counts[8] == 0 and counts[:8].min() > 400 and counts[:8].max() < 600
    assert (seen.float().mean(0) - 7 / 16).abs().max() < 0.03


def test_hidden_tokens_are_not_looked_at_and_seen_ones_are():
    method = judge()
    tokens = torch.randn(2, 16, 3)
    seen = random_seen(torch.arange(5, 7), 16)
    assert 0 < seen.sum() < 32
    other = torch.where(seen[..., None], tokens, torch.randn(2, 16, 3))
    for mine, theirs in zip(method.predict(tokens, seen), method.predict(other, seen), strict=True):
        assert torch.equal(mine, theirs)
    changed = tokens + torch.where(seen[..., None], 1.0, 0.0)
    assert not torch.allclose(method.predict(tokens, seen).mean, method.predict(changed, seen).mean, atol=1e-6)


def test_it_learns_which_token_tells_the_others():
    torch.manual_seed(0)
    method = judge(num=2, dim=2).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 250)
    for number in range(250):
        keys = torch.arange(64) + 64 * number
        tokens = torch.randn(64, 4, 2)
        tokens[:, 1:3] = tokens[:, :1]  # 1 and 2 repeat 0; nothing tells 3
        seen = random_seen(keys, 4)
        optimizer.zero_grad()
        gaussian_nll(method.predict(tokens, seen), tokens, seen).backward()
        optimizer.step()
        schedule.step()
    tokens = torch.randn(256, 4, 2)
    tokens[:, 1:3] = tokens[:, :1]
    with torch.no_grad():
        told = method.eval().predict(tokens, torch.tensor([True, False, False, False]).expand(256, 4))
    error = (told.mean - tokens).square().mean((0, 2))
    assert error[1:3].max() < 0.1 and abs(error[3] - 1) < 0.25
    assert told.log_variance[:, 1:3].mean() < -2.5 and abs(told.log_variance[:, 3].mean()) < 0.5  # -inf and 0 at best


def test_widths_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"method.dim=26: must be a multiple of 4 and of method.num_heads=3"):
        Prefix(PatchTokenSource(16, 3, 8), PrefixConfig(dim=26))
    with pytest.raises(ConfigError, match="at least 1 is needed"):
        PrefixConfig(depth=0)
