"""``smalti doctor --keep``: times of an encoder with all patches, with some, and with ranking."""

import json

import pytest

from command import smalti
from smalti.models.build import build_encoder
from smalti.preflight.keep import BATCHES, KeepReport, KeepTiming, measure_keep

SMALL = "random:vit_tiny_patch16_224"


def test_both_batch_sizes_are_measured():
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, seed=0, depth=1, embed_dim=24, num_heads=2
    )
    report = measure_keep(encoder.eval(), 5)
    assert (report.keep, report.num_patches, report.device) == (5, 16, "cpu")
    assert [one.batch_size for one in report.timings] == list(BATCHES)
    assert all(min(one.whole_s, one.keep_s, one.ranked_s) > 0 for one in report.timings)


@pytest.mark.parametrize(
    ("ranked_s", "pays", "said"), [(0.5, True, "saves time on this machine"), (1.5, False, "saves no time")]
)
def test_it_pays_if_ranking_included_is_faster(ranked_s, pays, said):
    timings = (KeepTiming(1, 1.0, 0.4, 0.5), KeepTiming(8, 1.0, 0.4, ranked_s))
    report = KeepReport("vit", 5, 16, "cpu", 1, "a ranker", timings)
    assert report.pays is pays
    assert said in report.lines()[-1]


def test_the_command_prints_times_and_writes_them(tmp_path):
    done = smalti("doctor", "--keep", "43", "--encoder", SMALL, "--json", tmp_path / "d.json")
    assert "43 of 196 patches of vit_tiny_patch16_224" in done.stdout
    found = json.loads((tmp_path / "d.json").read_text())["keep"]
    assert found["keep"] == 43 and isinstance(found["pays"], bool) and len(found["timings"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep", "3"], "--keep 3 needs --encoder"),
        (["--encoder", SMALL], "need --keep K"),
        (["--keep", "0", "--encoder", SMALL], "keep=0: an image of 224x224 pixels has 196 patches"),
        (["--keep", "197", "--encoder", SMALL], "keep=197: an image of 224x224 pixels has 196 patches"),
    ],
)
def test_bad_input_gets_one_line(words, said):
    done = smalti("doctor", *words, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1
